from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from replicas.engine.deadlines import Deadlines


@given(st.lists(st.tuples(st.sampled_from(["add", "discard", "late"]), st.integers(0, 9), st.integers(0, 40))))
def test_it_agrees_with_a_plain_dictionary(commands: list[tuple[str, int, int]]) -> None:
    deadlines, model = Deadlines(), dict[str, float]()
    for what, number, at in commands:
        name = str(number)
        if what == "add" and name not in model:
            deadlines.add(name, at)
            model[name] = at
        elif what == "discard":
            deadlines.discard(name)
            model.pop(name, None)
        elif what == "late":
            late = {name for name, when in model.items() if when <= at}
            assert set(deadlines.take_late(at)) == late
            model = {name: when for name, when in model.items() if name not in late}
        assert deadlines.next() == min(model.values(), default=None)
        assert len(deadlines) == len(model)


def test_an_id_used_again_has_its_new_deadline_only() -> None:
    deadlines = Deadlines()
    deadlines.add("a", 5.0)
    deadlines.discard("a")
    deadlines.add("a", 50.0)
    assert deadlines.take_late(10.0) == []
    assert deadlines.take_late(50.0) == ["a"]


def test_requests_that_end_in_time_leave_nothing_behind() -> None:
    deadlines = Deadlines()
    for i in range(10_000):
        deadlines.add(str(i), 1e9)
        deadlines.discard(str(i))
    assert len(deadlines._heap) < 100
