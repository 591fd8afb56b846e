from __future__ import annotations

import asyncio

import pytest

from replicas.directory import Directory, DirectoryService
from replicas.protocol import ReplicaAddress


def address(replica_id: str, incarnation: str = "1") -> ReplicaAddress:
    return ReplicaAddress(
        replica_id=replica_id, incarnation=incarnation, model="m", endpoint="tcp://a:1", events_endpoint="tcp://a:2"
    )


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_lease_that_is_renewed_lives_and_one_that_is_not_runs_out(clock: Clock) -> None:
    directory = Directory(10, clock)
    directory.register(address("a"))
    directory.register(address("b"))
    for _ in range(5):
        clock.now += 6
        assert directory.renew("a", "1")
    assert directory.view().addresses == (address("a"),)
    assert not directory.renew("b", "1")


def test_only_changes_change_the_version(clock: Clock) -> None:
    directory = Directory(10, clock)
    versions = [directory.view().version]
    for change in (
        lambda: directory.register(address("a")),
        lambda: directory.register(address("a", "2")),
        lambda: directory.deregister("a", "2"),
    ):
        change()
        versions.append(directory.view().version)
    assert len(set(versions)) == 4
    directory.register(address("a"))
    before = directory.view().version
    directory.register(address("a"))
    directory.renew("a", "1")
    directory.deregister("a", "an older life")
    directory.deregister("nobody", "1")
    assert directory.view().version == before


def test_a_new_incarnation_takes_the_place_of_the_old_one(clock: Clock) -> None:
    directory = Directory(10, clock)
    directory.register(address("a", "1"))
    directory.register(address("a", "2"))
    assert directory.view().addresses == (address("a", "2"),)
    assert not directory.renew("a", "1")
    directory.deregister("a", "1")
    assert directory.view().addresses == (address("a", "2"),)


def test_a_restarted_directory_is_incomplete_until_everybody_had_time_to_register(clock: Clock) -> None:
    old, new = Directory(10, clock), Directory(10, clock)
    assert old.view().version != new.view().version
    clock.now = 9.9
    assert not new.view().complete
    incomplete = new.view().version
    clock.now = 10
    assert new.view().complete
    assert new.view().version != incomplete


async def test_watch_answers_when_something_changes() -> None:
    service = DirectoryService(lease_s=5)
    first = await service.watch("", 1)
    waiting = asyncio.create_task(service.watch(first.version, 5))
    await asyncio.sleep(0.02)
    assert not waiting.done()
    await service.register(address("a"))
    view = await asyncio.wait_for(waiting, 0.2)
    assert view.addresses == (address("a"),)


async def test_watch_answers_when_a_lease_runs_out_or_its_time_is_up() -> None:
    service = DirectoryService(lease_s=0.1)
    await service.register(address("a"))
    view = await service.watch("", 1)
    while view.addresses:
        view = await asyncio.wait_for(service.watch(view.version, 5), 1)
    quiet = await asyncio.wait_for(service.watch(view.version, 0.05), 1)
    assert quiet.version == view.version
