"""Is feedback, or an override, on the disk before it is accepted, if that was asked for?"""

import asyncio
import json
from pathlib import Path

import pytest

from policies.log_reader import LogTail
from policies.records import Feedback
from policies.storage import Storage, open_storage
from serve_app.decision_ids import DecisionIds
from serve_app.durable_log import RETRY_S
from serve_app.replica import PolicyReplica
from tests.disks import Disk
from tests.serving_helpers import NAME, Reply, call, publish, random_policy, read_new, replica_of

DOORS = ("feedback", "overrides")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = open_storage(tmp_path / "storage")
    publish(storage, random_policy(1))
    return storage


def replica_on(storage: Storage, disk: Disk, durability: str) -> PolicyReplica:
    replica = replica_of(storage, durability=durability, log_timeout_s=0.2)
    for log in (replica._feedback, replica._overrides):
        if log.commit is not None:
            log.commit._fsync = disk.fsync
    return replica


async def report(storage: Storage, replica: PolicyReplica, door: str, name: str = "r") -> Reply:
    decision_id = DecisionIds.of(storage).name(name)
    path, body = "/v1/feedback", {"decision_id": decision_id, "reward": 1.0}
    if door == "overrides":
        path, body = f"/v1/decisions/{decision_id}/override", {"action": 0, "reason": "operator took over"}
    return await call(replica.api, "POST", path, json.dumps(body).encode(), key=storage.api_key_file.read_text())


def after_power_cut(storage: Storage, disk: Disk, door: str) -> bytes:
    return disk.after_power_cut(storage.feedback(NAME) if door == "feedback" else storage.overrides(NAME))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("durability", ["fsync", "write"])
def test_what_was_accepted_survives_a_power_cut_with_fsync_and_only_then(storage: Storage, door: str, durability: str) -> None:
    """`write` is the negative control: it is accepted, in the page cache alone."""
    disk = Disk()

    async def scenario() -> None:
        replica = replica_on(storage, disk, durability)
        reply = await report(storage, replica, door)
        assert (reply.status, reply.json()) == (200, {"accepted": 1})
        assert (DecisionIds.of(storage).name("r").encode() in after_power_cut(storage, disk, door)) == (durability == "fsync")
        await replica._stop()

    asyncio.run(scenario())


@pytest.mark.parametrize("door", DOORS)
def test_it_is_not_accepted_before_the_disk_has_it_nor_when_that_fails(storage: Storage, door: str) -> None:
    disk = Disk()

    async def scenario() -> None:
        replica = replica_on(storage, disk, "fsync")
        disk.can_go_on.clear()
        asked = asyncio.create_task(report(storage, replica, door, "first"))
        while not disk.num_syncs:
            await asyncio.sleep(0.01)
        assert not asked.done()
        disk.can_go_on.set()
        assert (await asked).status == 200
        disk.fails_next = True
        assert (await report(storage, replica, door, "fails")).status == 503
        await asyncio.sleep(RETRY_S)
        disk.can_go_on.clear()
        hangs = await report(storage, replica, door, "hangs")  # given up after log_timeout_s
        assert hangs.status == 503 and "fsync" in hangs.error
        writer = (replica._feedback if door == "feedback" else replica._overrides).writer
        num_segments = writer.num_segments
        assert {(await report(storage, replica, door, f"while-{n}")).status for n in range(30)} == {503}
        assert (
            replica._feedback if door == "feedback" else replica._overrides
        ).writer.num_segments == num_segments  # each try would begin one
        disk.can_go_on.set()
        await asyncio.sleep(RETRY_S + 0.1)
        assert (await report(storage, replica, door, "again")).status == 200
        kept = after_power_cut(storage, disk, door)
        assert b"first" in kept and b"again" in kept and b"fails" not in kept
        await replica._stop()

    asyncio.run(scenario())


@pytest.mark.parametrize("still_fails", [True, False])
def test_one_request_tries_a_disk_that_failed_and_the_others_do_not_wait_for_it(storage: Storage, still_fails: bool) -> None:
    disk = Disk()

    async def scenario() -> None:
        replica = replica_on(storage, disk, "fsync")
        disk.fails_next = True
        assert (await report(storage, replica, "feedback", "fails")).status == 503
        await asyncio.sleep(RETRY_S)
        num_segments, disk.fails_next, disk.duration_s = replica._feedback.writer.num_segments, still_fails, 0.02
        replies = await asyncio.gather(*(report(storage, replica, "feedback", f"r{n}") for n in range(20)))
        assert sorted(reply.status for reply in replies) == ([503] * 20 if still_fails else [200] + [503] * 19)
        assert replica._feedback.writer.num_segments == num_segments + 1  # each try begins one
        if not still_fails:  # it is well again at once, for all
            replies = await asyncio.gather(*(report(storage, replica, "feedback", f"later-{n}") for n in range(20)))
            assert {reply.status for reply in replies} == {200}
        await replica._stop()

    asyncio.run(scenario())


def test_many_rewards_that_arrive_together_share_their_flushes(storage: Storage) -> None:
    """Without sharing, 50 requests would be 50 fsyncs; those that came while the first was running need one more."""
    disk = Disk()

    async def scenario() -> None:
        replica = replica_on(storage, disk, "fsync")
        replies = await asyncio.gather(*(report(storage, replica, "feedback", f"r{n}") for n in range(50)))
        assert {reply.status for reply in replies} == {200}
        await replica._stop()

    asyncio.run(scenario())
    assert disk.num_syncs <= 6  # the segment, its directory once, and as much again
    assert len(read_new(LogTail(storage.feedback(NAME), Feedback))) == 50
