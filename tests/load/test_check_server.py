"""The check of a real server passes over one that is right and finds what is wrong with others."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from deploy.fleet import parse
from load.check_server import CHECKS, check, fleet
from load.loop import run
from replicas.mock_upstream import MockUpstream
from tests.gateway.conftest import make_key, running
from tests.gateway.upstream import mock

__all__ = ["mock"]

Found = dict[str, tuple[bool, str]]


@pytest.fixture
def checked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Found]:
    """What is found of the server at a base URL under a name of its model."""

    def begin(url: str, model: str) -> Found:
        home = tmp_path_factory.mktemp("outer")
        config = parse(fleet(url, model, None)).gateway_config(
            database_url=f"sqlite:///{home}/signalbox.db", state_dir=str(home)
        )
        with running(config, make_key(config, "load")) as gateway:
            return {name: (held, said) for name, held, said in run(check(gateway.base_url, gateway.key))}

    return begin


def test_a_right_server_holds(checked: Callable[[str, str], Found], mock: MockUpstream) -> None:
    found = checked(mock.base_url, "normal:gap_ms=1")
    assert len(found) == len(CHECKS)
    wrong = {name for name, (held, _) in found.items() if not held}
    assert wrong == {"a wrong field"}, "this one answers whatever it is asked"


@pytest.mark.parametrize(
    ("behaviour", "wrong"),
    [("close:after=2", {"a stream", "a whole answer", "four at once"}), ("status:code=500", {"a completion"})],
)
def test_a_wrong_server_does_not(
    checked: Callable[[str, str], Found], mock: MockUpstream, behaviour: str, wrong: set[str]
) -> None:
    found = checked(mock.base_url, behaviour)
    assert wrong <= {name for name, (held, _) in found.items() if not held}
