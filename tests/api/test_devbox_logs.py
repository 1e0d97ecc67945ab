"""GET …/logs and …/logs/tail: every source in one order, at once, narrowed, bounded, neither lost nor repeated."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import pytest
from django.db import connection

from api.asynchronous import in_database
from api.ids import new_id
from devboxes import log_lines, log_reading, log_tail, log_works, logs
from devboxes.models import Devbox
from executions.models import Execution, Kept
from executions.services import after_destroy
from tests.execution_world import Streaming, World


@pytest.fixture
def world(web, alice, monkeypatch):
    # Hints are published after commits, which a test's transaction has none of.
    monkeypatch.setattr(log_tail, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(log_tail, "LOOK_LISTENING_SECONDS", 0.05)
    return World(web, alice.account_id)


def read(world: World, party: Any, query: str = "") -> list[dict[str, Any]]:
    with world.working():
        answer = party.get(f"{world.url}/logs{query}")
    assert answer.status_code == 200, answer.text
    return list(answer.json()["logs"])


def messages(entries: list[dict[str, Any]]) -> list[str]:
    return [entry["message"] for entry in entries if "message" in entry]


def completed(world: World, party: Any, stdout: bytes = b"", stderr: bytes = b"", exit: int = 0, command: str = "cmd"):
    world.fake.script(command, stdout=stdout, stderr=stderr, exit=exit)
    execution_id = party.post(f"{world.url}/execute_async", {"command": command}).json()["execution_id"]
    world.work()
    assert world.row(execution_id).status == "completed"
    return execution_id


def say(world: World, execution_id: str, data: bytes, stream: str = "stdout", at_ms: int | None = None) -> None:
    with world.fake.lock:
        execution = world.fake.boxes[world.devbox_id].executions[execution_id]
        setattr(execution, stream, getattr(execution, stream) + data)
        number = 1 if stream == "stdout" else 2
        execution.records.append((at_ms or int(time.time() * 1000), number, len(getattr(execution, stream))))


def note(world: World, *entries: logs.Entry) -> None:
    with connection.cursor() as cursor:
        logs.write(cursor, world.devbox_id, entries)


def run(world: World, coroutine: Any) -> Any:
    with world.working():
        return world.web.run(coroutine)


def end(world: World) -> None:
    """The devbox is over, and nothing more will be written."""
    after_destroy(world.devbox_id, "shutdown")
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE devboxes_devbox SET status = 'shutdown', step = 'gone', ended_at = now(), completed_at = now() "
            "WHERE id = %s",
            [world.devbox_id],
        )


# --- the list ---


def test_a_command_is_its_text_its_lines_and_its_exit(world, alice):
    execution_id = completed(world, alice, b"one\ntwo\n", b"odd\n", exit=3, command="work")
    entries = read(world, alice)
    assert [{**entry, "timestamp_ms": None} for entry in entries] == [
        {"level": "info", "timestamp_ms": None, "source": "exec", "cmd_id": execution_id, "cmd": "work"},
        {"level": "info", "timestamp_ms": None, "source": "exec", "cmd_id": execution_id, "message": "one"},
        {"level": "info", "timestamp_ms": None, "source": "exec", "cmd_id": execution_id, "message": "two"},
        {"level": "error", "timestamp_ms": None, "source": "exec", "cmd_id": execution_id, "message": "odd"},
        {"level": "error", "timestamp_ms": None, "source": "exec", "cmd_id": execution_id, "exit_code": 3},
    ]
    times = [entry["timestamp_ms"] for entry in entries]
    assert times == sorted(times) and abs(times[0] - time.time() * 1000) < 60_000


def test_colleagues_see_it_and_strangers_do_not(world, alice, bob, charlie):
    execution_id = completed(world, alice, b"private\n")
    assert messages(read(world, bob)) == ["private"]
    for query in ("", f"?execution_id={execution_id}"):
        for tail in ("", "/tail"):
            answer = charlie.get(f"{world.url}/logs{tail}{query}")
            unknown = charlie.get(f"/v1/devboxes/{new_id('dbx')}/logs{tail}{query}")
            assert (answer.status_code, unknown.status_code) == (404, 404)
    assert alice.get("/v1/devboxes/nonsense/logs").status_code == 404


def test_an_execution_of_another_devbox_or_account_is_not_found_by_its_id(world, alice, charlie):
    foreign = World.__new__(World)
    foreign.__dict__.update(world.__dict__)
    from tests.execution_world import make_devbox

    foreign.devbox_id = make_devbox(charlie.account_id, world.fake)
    foreign.url = f"/v1/devboxes/{foreign.devbox_id}"
    execution_id = completed(foreign, charlie, b"theirs\n")
    assert read(world, alice, f"?execution_id={execution_id}") == []
    assert messages(read(foreign, charlie, f"?execution_id={execution_id}")) == ["theirs"]


def test_lines_have_the_times_of_the_index_and_streams_are_in_their_order(world, alice):
    execution_id = world.started(alice)
    began = world.fake.boxes[world.devbox_id].executions[execution_id].started_at_ms
    say(world, execution_id, b"first\n", at_ms=began + 100)
    say(world, execution_id, b"second\n", "stderr", at_ms=began + 200)
    say(world, execution_id, b"third\nfourth\n", at_ms=began + 300)
    told = [(entry["message"], entry["timestamp_ms"] - began) for entry in read(world, alice) if "message" in entry]
    assert told == [("first", 100), ("second", 200), ("third", 300), ("fourth", 300)]


def test_what_a_running_command_has_printed_is_there_at_once_even_half_a_line(world, alice):
    execution_id = world.started(alice)
    assert [entry.get("cmd") for entry in read(world, alice)] == ["sleep 1000"]
    say(world, execution_id, b"Password: ")
    assert messages(read(world, alice)) == ["Password: "]
    say(world, execution_id, b"\nnext\n")
    assert messages(read(world, alice)) == ["Password: ", "next"]


def test_an_end_that_only_the_host_knows_hides_nothing(world, alice):
    execution_id = world.started(alice)
    say(world, execution_id, b"last words\n")
    world.reporting = False
    world.paused = True
    world.fake.finish(execution_id, exit=0)
    assert messages(read(world, alice)) == ["last words"]


def test_filters_by_execution_and_shell(world, alice):
    first = completed(world, alice, b"1\n", command="a")
    second = completed(world, alice, b"2\n", command="b")
    Execution.objects.filter(pk=second).update(shell_name="main")
    note(world, logs.Entry("files", message="wrote /a"), logs.Entry("exec", message="replaced", shell_name="main"))
    assert messages(read(world, alice, f"?execution_id={first}")) == ["1"]
    assert messages(read(world, alice, "?shell_name=main")) == ["2", "replaced"]
    assert {entry.get("shell_name") for entry in read(world, alice, "?shell_name=main")} == {"main"}
    assert messages(read(world, alice, "?execution_id=&shell_name=")) == ["1", "2", "wrote /a", "replaced"]
    assert read(world, alice, "?execution_id=exe_none") == read(world, alice, "?shell_name=none") == []
    assert alice.get(f"{world.url}/logs?shell_name={'x' * 300}").status_code == 400
    assert alice.get(f"{world.url}/logs?execution_id=%00").status_code == 400


def test_bytes_of_any_kind_and_lines_of_any_length(world, alice):
    data = random.Random(7).randbytes(20_000).replace(b"\n", b"") + b"\n" + "é".encode() * 30_000 + b"\nend\r\n\n"
    completed(world, alice, b"\xff\0\xfe\n" + data[:40_000])
    assert messages(read(world, alice))[0] == "\ufffd\0\ufffd"
    execution_id = completed(world, alice, "é".encode() * 30_000 + b"\nend\r\n\nlast", command="wide")
    told = messages(read(world, alice, f"?execution_id={execution_id}"))
    assert "".join(told[:-3]) == "é" * 30_000 and told[-3:] == ["end", "", "last"]
    assert all(len(message.encode()) <= log_lines.LINE_BYTES for message in told)


def test_the_newest_are_kept_and_the_first_entry_says_so(world, alice):
    completed(world, alice, b"".join(b"%d\n" % n for n in range(300)), command="a")
    completed(world, alice, b"b\n", command="b")
    told = read(world, alice, "?limit=10")
    assert len(told) == 11 and told[0]["level"] == "warning" and "older entries are left out" in told[0]["message"]
    assert [entry.get("message") for entry in told[1:8]] == ["294", "295", "296", "297", "298", "299", None]
    assert told[-1] == {**told[-1], "exit_code": 0} and told[-2]["message"] == "b"
    assert len(read(world, alice)) == 300 + 1 + 4
    assert len(read(world, alice, "?limit=0")) == 2 and alice.get(f"{world.url}/logs?limit=x").status_code == 400


def test_an_answer_is_bounded_in_bytes(world, alice, monkeypatch):
    monkeypatch.setattr(log_reading, "ANSWER_BYTES", 100_000)
    for number in range(4):
        completed(world, alice, (b"%d" % number) * 40_000, command=str(number))
    told = read(world, alice)
    assert "left out" in told[0]["message"] and sum(len(entry.get("message", "")) for entry in told) < 110_000
    assert told[-2]["message"].endswith("3")


def test_only_the_end_of_a_large_output_is_looked_at(world, alice, monkeypatch):
    monkeypatch.setattr(log_works, "NEWEST_BYTES", 1000)
    execution_id = world.started(alice)
    say(world, execution_id, b"".join(b"line %d\n" % n for n in range(10_000)))
    told = read(world, alice)
    assert "left out" in told[0]["message"] and messages(told)[-1] == "line 9999"
    assert messages(told)[1:] == [f"line {n}" for n in range(10_000 - len(told) + 1, 10_000)]
    assert {call["limit"] for call in world.fake.called("read")} == {1000}


def test_outputs_in_s3_and_lost_ones(world, alice, monkeypatch):
    from storage import objects

    kept = completed(world, alice, b"", command="kept")
    body = b"".join(b"%d\n" % n for n in range(1000))
    Execution.objects.filter(pk=kept).update(kept=Kept.STORE, out_size=len(body), stdout=None)
    monkeypatch.setattr(objects, "get_range", lambda key, start, length: body[start : start + length])
    assert messages(read(world, alice)) == [str(n) for n in range(1000)]

    tries: list[str] = []

    def moved_once(key: str, start: int, length: int) -> Any:
        tries.append(key)
        if len(tries) == 1:
            raise objects.StorageError("read", key, "moved while it was looked for")
        return body[start : start + length]

    monkeypatch.setattr(objects, "get_range", moved_once)
    assert messages(read(world, alice)) == [str(n) for n in range(1000)] and len(tries) > 1

    def broken(*_: Any) -> bytes:
        raise objects.StorageError("read", "a key", "away")

    monkeypatch.setattr(objects, "get_range", broken)
    told = read(world, alice)
    assert [told[0]["cmd"], told[1]["message"], told[2]["exit_code"]] == ["kept", log_reading.GONE, 0]
    Execution.objects.filter(pk=kept).update(kept=Kept.NOWHERE, reason={"kind": "lost", "detail": "gone"})
    assert [entry.get("exit_code") for entry in read(world, alice)] == [None, 0]
    assert read(world, alice)[-1]["message"] == "it was lost: gone"


def test_a_host_that_does_not_answer_is_said_and_hides_only_what_runs(world, alice):
    world.started(alice)
    completed(world, alice, b"done\n")
    world.fake.unreachable = True
    told = read(world, alice)
    assert "done" in messages(told) and "does not answer" in told[-1]["message"] and told[-1]["level"] == "error"


def test_late_output_is_the_executions(world, alice):
    execution_id = completed(world, alice, b"before\n")
    execution = world.fake.boxes[world.devbox_id].executions[execution_id]
    execution.late[0] = b"after\nhalf"
    told = read(world, alice, f"?execution_id={execution_id}")
    assert [entry.get("message", entry.get("exit_code")) for entry in told[1:]] == ["before", 0, "after", "half"]
    assert {entry["cmd_id"] for entry in told} == {execution_id}


def test_it_is_readable_after_the_devbox_has_ended_and_its_host_is_not_asked(world, alice):
    completed(world, alice, b"kept\n")
    end(world)
    world.fake.unreachable = True
    assert messages(read(world, alice)) == ["kept"]


# --- following ---


class Following(Streaming):
    """A follower; `entries` are what it has been told."""

    def __init__(self, world: World, party: Any, query: str = "") -> None:
        super().__init__(party, f"{world.url}/logs/tail{query}")

    @property
    def entries(self) -> list[dict[str, Any]]:
        return self.events.updates

    async def told(self, count: int, within: float = 5.0) -> list[dict[str, Any]]:
        await self.until(lambda events: len(events.updates) >= count, within)
        return self.entries


def test_it_tells_what_is_there_and_then_what_comes_once_each(world, alice):
    before = completed(world, alice, b"old\n", command="before")
    running = world.started(alice)
    say(world, running, b"so far\nhal")

    async def scenario() -> None:
        follower = Following(world, alice)
        assert [entry.get("message") for entry in await follower.told(5)] == [None, "old", None, None, "so far"]
        assert follower.headers["content-type"].startswith("text/event-stream")
        say(world, running, b"f a line\nand mo")
        assert (await follower.told(6))[-1]["message"] == "half a line"
        say(world, running, b"re", "stdout")
        say(world, running, b"odd\n", "stderr")
        assert (await follower.told(7))[-1] == {**follower.entries[-1], "message": "odd", "level": "error"}
        await in_database(note, world, logs.Entry("files", message="wrote /a"))
        assert (await follower.told(8))[-1] == {**follower.entries[-1], "message": "wrote /a", "source": "files"}
        world.fake.finish(running, exit=2)
        told = (await follower.told(10))[-2:]
        assert [told[0]["message"], told[1]["exit_code"]] == ["and more", 2]
        world.fake.script("quick", stdout=b"quick\n")
        await world.web.send("POST", f"{world.url}/execute_async", key=alice.secret, json={"command": "quick"})
        told = (await follower.told(13))[-3:]
        assert [told[0]["cmd"], told[1]["message"], told[2]["exit_code"]] == ["quick", "quick", 0]
        await in_database(end, world)
        await follower.end()
        assert len(follower.entries) == 13 and before != running

    run(world, scenario())


def test_a_flood_is_followed_whole_while_others_have_their_turn(world, alice):
    loud, quiet = world.started(alice, "loud"), world.started(alice, "quiet")
    body = b"".join(b"%d\n" % n for n in range(30_000))

    async def scenario() -> None:
        follower = Following(world, alice)
        await follower.told(2)
        say(world, loud, body)
        say(world, quiet, b"hello\n")
        await follower.told(30_003, within=60)
        loud_lines = [entry["message"] for entry in follower.entries if entry["cmd_id"] == loud and "message" in entry]
        assert loud_lines == [str(n) for n in range(30_000)]
        place = next(n for n, entry in enumerate(follower.entries) if entry.get("message") == "hello")
        assert place < 5000, "it waited for the flood to end"
        await follower.leave()

    run(world, scenario())


def test_a_lost_connection_to_the_host_neither_loses_nor_repeats(world, alice, monkeypatch):
    monkeypatch.setattr(log_tail, "DIAL_SECONDS", 0.05)
    running = world.started(alice)

    async def scenario() -> None:
        follower = Following(world, alice)
        await follower.told(1)
        for number in range(20):
            world.fake.unreachable = number % 3 == 1
            say(world, running, b"%d\n" % number)
            await asyncio.sleep(0.03)
        world.fake.unreachable = False
        await follower.told(21)
        assert messages(follower.entries) == [str(n) for n in range(20)]
        world.fake.finish(running)
        await follower.told(22)
        await asyncio.sleep(0.2)
        assert len(follower.entries) == 22
        await follower.leave()

    run(world, scenario())


def test_late_output_and_filters_while_following(world, alice):
    wanted = completed(world, alice, b"before\n", command="wanted")
    completed(world, alice, b"other\n", command="other")

    async def scenario() -> None:
        follower = Following(world, alice, f"?execution_id={wanted}")
        await follower.told(3)
        execution = world.fake.boxes[world.devbox_id].executions[wanted]
        execution.late = [b"after\n", b""]
        assert (await follower.told(4))[-1]["message"] == "after"
        execution.late = [b"after\nmore\n", b""]
        assert (await follower.told(5))[-1]["message"] == "more"
        await in_database(
            note, world, logs.Entry("files", message="not of it"), logs.Entry("exec", wanted, message="of it")
        )
        assert (await follower.told(6))[-1]["message"] == "of it"
        await in_database(end, world)
        await follower.end()
        assert messages(follower.entries) == ["before", "after", "more", "of it"]

    run(world, scenario())


def test_a_finished_devboxs_log_ends_after_its_last_entry(world, alice):
    completed(world, alice, b"all\n")
    end(world)

    async def scenario() -> Any:
        return await Following(world, alice).end()

    events = run(world, scenario())
    assert [entry.get("message") for entry in events.updates] == [None, "all", None] and events.error is None


def test_silence_is_filled_with_comments_and_streams_are_counted(world, alice, monkeypatch):
    from accounts.models import Account

    monkeypatch.setattr(log_tail, "HEARTBEAT_SECONDS", 0.05)
    Account.objects.filter(pk=alice.account_id).update(max_open_streams=1)

    async def scenario() -> None:
        follower = Following(world, alice)
        await follower.until(lambda events: events.comments > 3)
        refused = Following(world, alice)
        await refused.task
        assert refused.status == 429
        await follower.leave()
        again = Following(world, alice)
        await again.until(lambda events: events.comments > 1)
        await again.leave()

    run(world, scenario())


def test_a_devbox_that_is_not_there_yet_and_one_of_an_earlier_release(world, alice):
    Devbox.objects.filter(pk=world.devbox_id).update(host=None, step="place", status="provisioning")
    assert read(world, alice) == []

    async def scenario() -> None:
        follower = Following(world, alice)
        await follower.until(lambda events: events.comments >= 1)
        await in_database(note, world, logs.Entry("setup_commands", message="soon"))
        assert (await follower.told(1))[-1]["message"] == "soon"
        await follower.leave()

    run(world, scenario())


def test_notices_are_written_once(world, alice):
    for _ in range(2):
        note(world, logs.Entry("kmsg", level="error", message="killed", notice_id="ntc_1", at_ms=1_000))
    assert [(entry["message"], entry["timestamp_ms"]) for entry in read(world, alice)] == [("killed", 1_000)]


def test_notices_of_the_host_are_told_and_not_those_of_another(world, alice):
    from devboxes.hosted import on_notices
    from hosts.registry import NoticeEvent
    from tests.execution_world import make_host

    told = world.fake.notice(world.devbox_id, "kmsg", "Out of memory: killed process python3", level="error")
    world.fake.notice(world.devbox_id, "stats", "memory 1 of 2 MiB", at_ms=1_000)
    assert len(world.fake.deliver()) == 2 and not world.fake.unacked
    other = make_host("other")
    false = NoticeEvent(other.host_id, world.devbox_id, new_id("ntc"), "kmsg", "info", "a lie", 1_000)
    assert on_notices([false]) == [false.id]
    entries = read(world, alice)
    assert [(entry["source"], entry["level"], entry["message"]) for entry in entries] == [
        ("stats", "info", "memory 1 of 2 MiB"),
        ("kmsg", "error", "Out of memory: killed process python3"),
    ]
    assert told.startswith("ntc_")


def test_old_entries_and_too_many_are_deleted(world, alice, settings):
    import dataclasses

    from devboxes import tasks
    from devboxes.models import DevboxLog

    day_ms = 86_400_000
    now = int(time.time() * 1000)
    note(world, *(logs.Entry("stats", message=f"stats {days}", at_ms=now - days * day_ms) for days in (0, 2, 9)))
    note(world, *(logs.Entry("files", message=f"files {days}", at_ms=now - days * day_ms) for days in (0, 2, 9)))
    assert tasks.purge_logs() == 3
    assert sorted(DevboxLog.objects.values_list("message", flat=True)) == ["files 0", "files 2", "stats 0"]
    settings.BERTH = dataclasses.replace(settings.BERTH, LOGS_ROWS_MAX=10)
    note(world, *(logs.Entry("files", message=str(number)) for number in range(20)))
    assert tasks.purge_logs() == 13
    assert DevboxLog.objects.count() == 10 and messages(read(world, alice))[-1] == "19"
