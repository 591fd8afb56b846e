"""A request on its way through the fake engine, and its choices."""

from __future__ import annotations

from dataclasses import dataclass, field

from replicas.engine.detokenizer import Detokenizer
from replicas.engine.phases import Phases
from replicas.engine.waiting import Account
from replicas.protocol import GenerateRequest


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way. hashes: full blocks of its prompt; row_blocks: further ones of each choice.

    It waits as long as it has no rows; parked: those that it had, when it made way for a request of another key.
    """

    request: GenerateRequest
    phases: Phases
    root: bytes
    hashes: list[bytes]
    row_blocks: int
    uncached: int
    cached: int = 0
    completed: int = 0
    came: float = 0.0
    ready_at: float = 0.0
    account: Account = field(default_factory=Account)
    rows: list[Row] = field(default_factory=list)
    parked: list[Row] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Row:
    """One choice; its next token is piece `position` of the script and falls due at `due`."""

    job: Job
    index: int
    position: int
    due: float
    text: Detokenizer
    tokens: list[int] = field(default_factory=list)
