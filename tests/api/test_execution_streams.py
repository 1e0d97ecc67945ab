"""Output as server-sent events: order, offsets, heartbeats, the end, and what a cut looks like."""

import asyncio
import dataclasses
import random

import pytest

from accounts import caps
from api.stopping import GoingDown
from executions import streams
from executions.models import Execution
from tests.execution_world import Holed, Streaming, World
from tests.fake_streams import FakeFollowing


@pytest.fixture
def world(web, alice):
    return World(web, alice.account_id)


def url(world, execution_id, stream="stdout", query=""):
    return world.execution_url(execution_id, f"/stream_{stream}_updates{query}")


def completed(world, party, stdout=b"", stderr=b"", command="cmd"):
    world.fake.script(command, stdout=stdout, stderr=stderr)
    execution_id = party.post(f"{world.url}/execute_async", {"command": command}).json()["execution_id"]
    world.work()
    assert world.row(execution_id).status == "completed"
    return execution_id


def say(world, execution_id, data, stream="stdout"):
    execution = world.fake.boxes[world.devbox_id].executions[execution_id]
    setattr(execution, stream, getattr(execution, stream) + data)


def run(world, coroutine):
    with world.working():
        return world.web.run(coroutine)


def replay(world, party, execution_id, stream="stdout", query=""):
    async def scenario():
        return await Streaming(party, url(world, execution_id, stream, query)).end()

    return run(world, scenario())


def test_a_running_command_streams_as_it_speaks_and_ends_with_it(world, alice):
    execution_id = world.started(alice)

    async def scenario():
        out = Streaming(alice, url(world, execution_id))
        err = Streaming(alice, url(world, execution_id, "stderr"))
        await out.until(lambda events: events.comments == 1)
        assert out.headers["content-type"].startswith("text/event-stream")
        for word in ("one\n", "two\n", "three\n"):
            say(world, execution_id, word.encode())
            await out.until(lambda events, word=word: events.text.endswith(word), within=1)
        say(world, execution_id, b"trouble", "stderr")
        await err.until(lambda events: events.text == "trouble", within=1)
        assert not out.over
        world.fake.finish(execution_id, stdout=b"last")
        return await out.end(), await err.end()

    out, err = run(world, scenario())
    assert out.updates == [
        {"output": "one\n", "offset": 4},
        {"output": "two\n", "offset": 8},
        {"output": "three\n", "offset": 14},
        {"output": "last", "offset": 18},
    ]
    assert (err.text, out.error, err.error) == ("trouble", None, None)


def test_a_stream_opened_before_the_start_waits_for_it(world, alice):
    world.paused = True
    execution_id = alice.post(f"{world.url}/execute_async", {"command": "x"}).json()["execution_id"]

    async def scenario():
        stream = Streaming(alice, url(world, execution_id))
        await stream.until(lambda events: events.comments == 1)
        world.fake.script("x", stdout=b"hello")
        world.paused = False
        return await stream.end()

    assert run(world, scenario()).text == "hello"


def test_after_completion_the_whole_output_is_replayed(world, alice):
    text = "".join(f"line {n} é\n" for n in range(3000))
    execution_id = completed(world, alice, text.encode(), b"err")
    events = replay(world, alice, execution_id)
    assert events.text == text == alice.get(world.execution_url(execution_id, "?last_n=5000")).json()["stdout"]
    assert events.offset == len(text.encode())
    assert replay(world, alice, execution_id, "stderr").text == "err"


def test_an_empty_output_is_a_clean_end(world, alice):
    events = replay(world, alice, completed(world, alice))
    assert (events.updates, events.error) == ([], None)


@pytest.mark.parametrize("kept", ["row", "host"])
def test_coming_back_at_every_offset_loses_and_repeats_nothing(world, alice, monkeypatch, kept):
    if kept == "host":
        monkeypatch.setattr("storage.objects.put", refuse)
        monkeypatch.setattr("hostd.messages.INLINE_MAX", 10)
    monkeypatch.setattr("executions.streams.EVENT_BYTES", 3)
    data = "aé日🎉z".encode() + b"\xff\xe2\x82"
    execution_id = completed(world, alice, data)
    assert world.row(execution_id).kept == kept
    whole = replay(world, alice, execution_id)
    assert whole.text == data.decode("utf-8", "replace")
    assert whole.offset == len(data)
    for index, update in enumerate(whole.updates):
        rest = replay(world, alice, execution_id, query=f"?offset={update['offset']}")
        assert "".join(one["output"] for one in whole.updates[: index + 1]) + rest.text == whole.text


def refuse(*args, **kwargs):
    from storage.objects import StorageError

    raise StorageError("store", "key", "away")


def test_events_never_end_inside_a_character(world, alice):
    execution_id = world.started(alice)
    data = "aé日🎉".encode() * 20
    random.seed(1)

    async def scenario():
        stream = Streaming(alice, url(world, execution_id))
        at = 0
        while at < len(data):
            step = random.randint(1, 3)
            say(world, execution_id, data[at : at + step])
            at += step
            await asyncio.sleep(0.006)
        world.fake.finish(execution_id)
        return await stream.end()

    events = run(world, scenario())
    assert len(events.updates) > 10
    assert events.text == data.decode()
    at = 0
    for update in events.updates:
        at += len(update["output"].encode())
        assert update["offset"] == at


@pytest.mark.parametrize(("query", "want"), [("?offset=", "hello"), ("?offset=0", "hello"), ("?offset=3", "lo")])
def test_an_offset_is_the_first_byte_to_send(world, alice, query, want):
    assert replay(world, alice, completed(world, alice, b"hello"), query=query).text == want


@pytest.mark.parametrize("offset", ["5", "6", "99999999999999"])
def test_an_offset_at_or_past_the_end_is_a_clean_end(world, alice, offset):
    events = replay(world, alice, completed(world, alice, b"hello"), query=f"?offset={offset}")
    assert (events.updates, events.error) == ([], None)


@pytest.mark.parametrize("offset", ["-1", "x", "1.0"])
def test_an_offset_that_is_none_is_refused(world, alice, offset):
    execution_id = completed(world, alice, b"hello")
    assert alice.get(url(world, execution_id, query=f"?offset={offset}")).status_code == 400


def test_silence_is_filled_with_comments(world, alice, monkeypatch):
    monkeypatch.setattr(streams, "HEARTBEAT_SECONDS", 0.05)
    execution_id = world.started(alice)

    async def scenario():
        stream = Streaming(alice, url(world, execution_id))
        await stream.until(lambda events: events.comments >= 4, within=2)
        assert b"id:" not in stream.body
        assert b"retry:" not in stream.body
        world.fake.finish(execution_id, stdout=b"x")
        return await stream.end()

    assert run(world, scenario()).text == "x"


def test_the_official_heartbeat_is_often_enough():
    assert streams.HEARTBEAT_SECONDS <= 15


def test_a_host_that_comes_back_is_not_noticed(world, alice, monkeypatch):
    monkeypatch.setattr(streams, "RETRY_FIRST_SECONDS", 0.02)
    execution_id = world.started(alice)

    async def scenario():
        stream = Streaming(alice, url(world, execution_id))
        say(world, execution_id, "sch\u00f6n".encode()[:4])
        await stream.until(lambda events: events.text == "sch")
        world.reporting, world.fake.unreachable = False, True
        await asyncio.sleep(0.1)
        assert not stream.over
        world.fake.unreachable, world.reporting = False, True
        world.fake.finish(execution_id, stdout="sch\u00f6n".encode()[4:])
        return await stream.end()

    events = run(world, scenario())
    assert (events.text, events.error) == ("schön", None)


def test_a_host_that_stays_away_ends_the_stream_with_408(world, alice, monkeypatch):
    monkeypatch.setattr(streams, "RETRY_FIRST_SECONDS", 0.02)
    monkeypatch.setattr(streams, "TROUBLE_SECONDS", 0.3)
    execution_id = world.started(alice)

    async def scenario():
        stream = Streaming(alice, url(world, execution_id))
        say(world, execution_id, b"begin")
        await stream.until(lambda events: events.text == "begin")
        world.fake.unreachable = True
        events = await stream.end()
        world.fake.unreachable = False
        return events

    world.paused = True
    events = run(world, scenario())
    assert (events.error["code"], events.error["resumable"], events.offset) == (408, True, 5)
    world.paused = False
    world.fake.finish(execution_id, stdout=b"+end")
    assert replay(world, alice, execution_id, query=f"?offset={events.offset}").text == "+end"


def test_an_end_that_is_heard_elsewhere_lets_the_stream_go_on_from_the_row(world, alice, monkeypatch):
    monkeypatch.setattr(streams, "RETRY_FIRST_SECONDS", 0.02)
    execution_id = world.started(alice)

    async def scenario():
        stream = Streaming(alice, url(world, execution_id))
        say(world, execution_id, b"begin")
        await stream.until(lambda events: events.text == "begin")
        world.fake.finish(execution_id, stdout=b"+end")
        world.fake.fail("follow", times=100)
        return await stream.end()

    assert run(world, scenario()).text == "begin+end"


def test_lost_output_ends_with_500(world, alice):
    execution_id = world.started(alice)
    from executions.services import after_destroy

    after_destroy(world.devbox_id, "health_check_failed")
    events = replay(world, alice, execution_id)
    assert (events.error["code"], events.error["resumable"]) == (500, False)
    assert "lost" in events.error["message"]
    body = alice.get(world.execution_url(execution_id)).json()
    assert (body["exit_status"], body["stdout"], body["stdout_truncated"]) == (-1, "", True)


def test_a_server_that_stops_says_408(world, alice, monkeypatch):
    execution_id = world.started(alice)

    stopping = GoingDown()
    monkeypatch.setattr(streams, "going_down", stopping)

    async def scenario():
        stream = Streaming(alice, url(world, execution_id))
        say(world, execution_id, b"begin")
        await stream.until(lambda events: events.text == "begin")
        stopping.begin()
        return await stream.end()

    events = run(world, scenario())
    assert (events.text, events.error["code"]) == ("begin", 408)


def test_a_server_that_stops_ends_a_stream_that_never_pauses(world, alice, monkeypatch):
    monkeypatch.setattr(streams, "EVENT_BYTES", 100)
    execution_id = completed(world, alice, b"x" * 60_000)
    stopping = GoingDown()
    monkeypatch.setattr(streams, "going_down", stopping)
    monkeypatch.setattr(streams, "PIECE_BYTES", 100)

    async def scenario():
        stream = Streaming(alice, url(world, execution_id))
        await stream.until(lambda events: len(events.updates) > 5)
        stopping.begin()
        return await stream.end()

    events = run(world, scenario())
    assert events.error["code"] == 408
    assert events.offset == len(events.text) < 60_000


def test_a_client_that_leaves_a_busy_stream_leaves_nothing_behind(world, alice, monkeypatch):
    monkeypatch.setattr(streams, "PIECE_BYTES", 10)
    execution_id = completed(world, alice, b"x" * 60_000)

    async def scenario():
        stream = Streaming(alice, url(world, execution_id))
        await stream.until(lambda events: len(events.updates) > 5)
        await stream.leave()
        await asyncio.sleep(0.02)
        return [task for task in asyncio.all_tasks() if "anext" in repr(task) or "GoingDown" in repr(task)]

    assert run(world, scenario()) == []
    assert not caps._open


def test_a_client_that_leaves_frees_its_place(world, alice, settings):
    settings.BERTH = dataclasses.replace(settings.BERTH, CAP_STREAMS=1)
    execution_id = world.started(alice)

    async def scenario():
        first = Streaming(alice, url(world, execution_id))
        await first.until(lambda events: events.comments == 1)
        second = Streaming(alice, url(world, execution_id, "stderr"))
        await asyncio.wait_for(second.task, 5)
        assert second.status == 429
        assert int(second.headers["retry-after"]) >= 1
        await first.leave()
        assert not caps._open
        third = Streaming(alice, url(world, execution_id))
        await third.until(lambda events: events.comments == 1)
        world.fake.finish(execution_id)
        await third.end()

    run(world, scenario())
    assert not caps._open


def test_a_stranger_streams_nothing(world, alice, bob, charlie):
    execution_id = completed(world, alice, b"secret")
    assert replay(world, bob, execution_id).text == "secret"
    answer = charlie.get(url(world, execution_id))
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/json")
    assert Execution.objects.count() == 1


# --- output that was too long to keep ---

HEAD, MIDDLE, TAIL = "kopf é\n" * 3000, "m" * 50_000, "schwanz é\n" * 3000
WHOLE = (HEAD + MIDDLE + TAIL).encode()
HOLE = (len(HEAD.encode()), len(HEAD.encode()) + len(MIDDLE))
SEEN = f"{HEAD}\n[{len(MIDDLE)} bytes of output were not kept]\n{TAIL}"


class Bucket:
    """Objects in memory, in parts of a size that makes many of them."""

    PART_BYTES = 10_000

    def __init__(self, monkeypatch):
        self.objects, self.parts = {}, {}
        monkeypatch.setattr("storage.objects.PART_BYTES", self.PART_BYTES)
        for name in ("put", "begin_upload", "put_part", "complete_upload", "get_range"):
            monkeypatch.setattr(f"storage.objects.{name}", getattr(self, name))

    def put(self, key, data):
        self.objects[key] = data

    def begin_upload(self, key):
        self.parts[key] = {}
        return f"upload of {key}"

    def put_part(self, key, upload_id, number, data):
        assert upload_id == f"upload of {key}"
        assert len(data) <= self.PART_BYTES
        self.parts[key][number] = data
        return f"etag {number}"

    def complete_upload(self, key, upload_id, etags, size):
        parts = self.parts.pop(key)
        assert etags == [f"etag {number}" for number in sorted(parts)]
        assert all(len(parts[number]) == self.PART_BYTES for number in sorted(parts)[:-1])
        self.objects[key] = b"".join(parts[number] for number in sorted(parts))
        assert len(self.objects[key]) == size

    def get_range(self, key, start, length):
        return self.objects[key][start : start + length]


@pytest.mark.parametrize("kept", ["running", "host", "store"])
def test_a_dropped_middle_is_jumped_with_one_event(world, alice, monkeypatch, kept):
    bucket = Bucket(monkeypatch)
    if kept != "store":
        monkeypatch.setattr("storage.objects.begin_upload", refuse)
    Holed(world.fake, *HOLE)
    execution_id = world.started(alice)
    say(world, execution_id, WHOLE)
    world.fake.boxes[world.devbox_id].executions[execution_id].dropped = [len(MIDDLE), 0]

    async def live():
        stream = Streaming(alice, url(world, execution_id))
        await stream.until(lambda events: events.text == SEEN)
        world.fake.finish(execution_id)
        return await stream.end()

    if kept == "running":
        events = run(world, live())
    else:
        world.fake.finish(execution_id)
        world.work()
        world.work()
        row = world.row(execution_id)
        assert (row.kept, row.out_dropped) == (kept, len(MIDDLE))
        if kept == "store":
            assert row.out_hole == HOLE[0]
            assert list(bucket.objects.values()) == [(HEAD + TAIL).encode()]
        events = replay(world, alice, execution_id)
    assert events.text == SEEN
    assert events.offset == len(WHOLE)
    assert next(update for update in events.updates if "not kept" in update["output"])["offset"] == HOLE[1]
    for offset in (HOLE[0] + 1, HOLE[1] - 1):
        assert replay(world, alice, execution_id, query=f"?offset={offset}").text.endswith(TAIL)
    assert replay(world, alice, execution_id, query=f"?offset={HOLE[1]}").text == TAIL
    near = replay(world, alice, execution_id, query=f"?offset={HOLE[0] - 1}").text
    assert near == f"\n\n[{len(MIDDLE)} bytes of output were not kept]\n{TAIL}"
    body = alice.get(world.execution_url(execution_id, "?last_n=2")).json()
    assert (body["stdout"], body["stdout_truncated"]) == ("schwanz é\n" * 2, True)
    body = alice.get(world.execution_url(execution_id, "?last_n=100000")).json()
    assert (body["stdout"], body["stdout_truncated"]) == (TAIL, True)


def test_a_copy_over_a_dropped_middle_is_taken_up_where_it_was_left(world, alice, monkeypatch):
    bucket = Bucket(monkeypatch)
    monkeypatch.setattr("executions.execution_flow.STORE_SECONDS", 0.0)
    Holed(world.fake, *HOLE)
    execution_id = world.started(alice)
    say(world, execution_id, WHOLE)
    world.fake.boxes[world.devbox_id].executions[execution_id].dropped = [len(MIDDLE), 0]
    world.fake.finish(execution_id)
    world.fake.fail("read", times=3, when=lambda offset, **_: offset > HOLE[0] + 100)
    world.work()
    for _ in range(6):
        Execution.objects.filter(wake_at__isnull=False).update(wake_at="2020-01-01T00:00Z")
        world.work()
    assert world.row(execution_id).kept == "store"
    assert list(bucket.objects.values()) == [(HEAD + TAIL).encode()]
    assert replay(world, alice, execution_id).text == SEEN


def test_a_whole_answer_never_hides_what_was_dropped(world, alice):
    execution_id = world.started(alice)
    Execution.objects.filter(pk=execution_id).update(
        status="completed", exit_status=0, completed_at="2020-01-01T00:00Z", wake_at=None, step="done", kept="store"
    )
    Execution.objects.filter(pk=execution_id).update(out_size=10, out_dropped=4, request_key="execute_sync:1")
    headers = {"x-request-id": "1"}
    answer = alice.post(f"{world.url}/execute_sync", {"command": "sleep 1000"}, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (413, "output_too_large")


def test_a_follower_goes_on_from_the_stored_output_when_the_host_forgets_it(world, alice, monkeypatch):
    """No gap and no repeat, and no pause: the row says where it is by then."""
    bucket = Bucket(monkeypatch)
    execution_id = world.started(alice)
    text = "".join(f"line {n} é\n" for n in range(20_000)).encode()
    real = FakeFollowing._piece

    def late(following):
        """The follower has not taken the rest when the host forgets it."""
        ended = following.execution.state == "exited" and not following.execution.moved
        return b"" if ended else real(following)

    monkeypatch.setattr(FakeFollowing, "_piece", late)
    say(world, execution_id, text[:100_001])

    async def follow():
        stream = Streaming(alice, url(world, execution_id))
        await stream.until(lambda events: len(events.updates) > 0)
        world.fake.finish(execution_id, stdout=text[100_001:])
        return await stream.end()

    events = run(world, follow())
    assert (events.text, events.error) == (text.decode(), None)
    assert events.offset == len(text)
    assert list(bucket.objects.values()) == [text]
    assert world.fake.called("forget")
