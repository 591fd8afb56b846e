"""Who stands back in a step, so that one key's flood costs the others nothing before their first tokens.

A key floods while it wants more than twice what the others want on the average (`WaitingLine.floods`). For such keys,
as long as others were heard of lately and have had less:

    another waits for its first token   no prompt of theirs is computed, and few of their sequences decode along
    another decodes                     as few decode along, so that others do not stay longer, and be more at once
    nobody else has work                all of them run, but their prompts are cut small: the step in flight when
                                        another comes is short

Alone, a key has the whole engine. `few` is what Pace says that pays: on a GPU all, on a CPU, where each makes the step
longer, a handful together with the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from replicas.engine.pace import Pace
from replicas.engine.sequence import Sequence
from replicas.engine.waiting import Account, WaitingLine

_ALONG = 0.88  # of the tokens a second that any number of sequences could bring: how many may run beside others
_LEAST_PROMPT_TOKENS = 32  # of flooding keys in one step: fewer cost more in steps than they save


@dataclass(slots=True)
class Turn:
    """What one step owes to whom. flooding: accounts that stand back. paused: their sequences that do not run at all.

    closed: none of theirs is admitted. room: prompt tokens of theirs that may still be put into the step.
    """

    flooding: set[Account] = field(default_factory=set)
    paused: set[Sequence] = field(default_factory=set)
    closed: bool = False
    room: int = 0

    def limit(self, seq: Sequence, tokens: int) -> int:
        """How many of the `tokens` that `seq` lacks, and the step has room for, are computed now."""
        if seq in self.paused:
            return 0
        return min(tokens, self.room) if tokens > 1 and seq.account in self.flooding else tokens

    def spend(self, seq: Sequence, tokens: int) -> None:
        if tokens > 1 and seq.account in self.flooding:
            self.room -= tokens


def take_turns(
    running: Iterable[Sequence], head: Sequence | None, line: WaitingLine[Sequence], pace: Pace, budget: int, now: float
) -> Turn:
    """`head`: who is next in line, if it can be admitted now. budget: tokens of a step."""
    turn = Turn(room=budget)
    if not line.shared(now):
        return turn
    accounts = dict.fromkeys(seq.account for seq in running)
    if head is not None:
        accounts[head.account] = None
    flooding = {account for account in accounts if line.floods(account, now)}
    least = min((account.cost for account in accounts if account not in flooding), default=None)
    turn.flooding = {a for a in flooding if least is None or a.cost > least}
    if not turn.flooding:
        return turn
    turn.room = min(pace.tokens_of_a_step(_LEAST_PROMPT_TOKENS), budget)
    others = [seq for seq in running if seq.account not in turn.flooding]
    newcomer = head is not None and head.account not in turn.flooding
    if others or newcomer:
        turn.closed = newcomer or any(seq.num_output == 0 for seq in others)
        _pause(turn, running, max(pace.seats_that_pay(_ALONG, budget) - len(others), 1))
    return turn


def _pause(turn: Turn, running: Iterable[Sequence], few: int) -> None:
    for seq in running:
        if seq.account in turn.flooding:
            if few > 0 and not (turn.closed and seq.num_tokens - seq.num_computed > 1):
                few -= 1
            else:
                turn.paused.add(seq)
