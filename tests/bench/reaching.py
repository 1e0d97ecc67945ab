"""Files and terminals: small files, large files beside `scp`, a key's echo, a terminal's flood."""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from websockets.sync.client import ClientConnection, connect

from tests.bench import terminado
from tests.bench.creating import timed
from tests.bench.figures import Figure, figure
from tests.bench.installation import Target
from tests.bench.shares import Meter, Parts
from tests.bench.ssh import loopback_ssh
from tests.bench.wire import Inbox, Unexpected, head

MIB = 1024 * 1024


def small_file_rw_ms(target: Target) -> Iterator[Figure]:
    """1 KB written, then read, over one kept connection; the baseline is the same two requests for a devbox's view."""
    count = 60 if target.quick else 300
    text = "x" * 1024
    with target.boxes(1) as (box,):
        path = f"/v1/devboxes/{box}"

        def both() -> None:
            target.post(f"{path}/write_file_contents", {"file_path": "small", "contents": text})
            answer = target.client.post(f"{path}/read_file_contents", json={"file_path": "small"})
            if answer.text != text:
                raise Unexpected("another text was read than was written")

        for _ in range(20):
            both()
        took = [timed(both) for _ in range(count)]
        views = [timed(lambda: (target.get(path), target.get(path))) for _ in range(count)]
    yield figure("small_file_rw_ms", "ms", took, statistics.median(views))


def large_files_mb_s(target: Target) -> Iterator[Figure]:
    """One large file up and down with a raw client, beside `scp` to and from the same machine."""
    size = (64 if target.quick else 512) * MIB
    times = 2 if target.quick else 4
    parts = Parts(target.up)
    with tempfile.TemporaryDirectory() as folder, target.boxes(1, cores=2) as (box,):
        scp_up, scp_down = _scp(target, Path(folder), size, times)
        with Meter(parts) as up_meter:
            up = [_upload(target, box, size) for _ in range(times)]
        with Meter(parts) as down_meter:
            down = [_download(target, box, size) for _ in range(times)]
    rate = size / 1e6
    yield figure("scp_up_mb_s", "MB/s", [rate / one for one in scp_up])
    yield figure("scp_down_mb_s", "MB/s", [rate / one for one in scp_down])
    baseline_up = statistics.median(rate / one for one in scp_up)
    baseline_down = statistics.median(rate / one for one in scp_down)
    yield figure("upload_mb_s", "MB/s", [rate / one for one in up], baseline_up).with_cpu(up_meter.shares())
    yield figure("download_mb_s", "MB/s", [rate / one for one in down], baseline_down).with_cpu(down_meter.shares())


def _scp(target: Target, folder: Path, size: int, times: int) -> tuple[list[float], list[float]]:
    """Seconds up and down. The copy lies in the same folder."""
    source, copy = folder / "source", folder / "copy"
    with source.open("wb") as file:
        for _ in range(size // MIB):
            file.write(b"x" * MIB)
    with loopback_ssh(target) as argv_of:
        ssh = argv_of("")
        options = ["-P" if one == "-p" else one for one in ssh[1:-2]]
        there = f"{ssh[-2]}:{copy}"

        def seconds(*paths: str) -> float:
            return timed(lambda: subprocess.run(["scp", "-q", *options, *paths], check=True, timeout=120)) / 1000

        up = [seconds(str(source), there) for _ in range(times)]
        return up, [seconds(there, str(source)) for _ in range(times)]


def _upload(target: Target, box: str, size: int) -> float:
    piece = b"x" * MIB
    before = (
        b'--bench\r\nContent-Disposition: form-data; name="path"\r\n\r\nlarge\r\n'
        b'--bench\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
    )
    after = b"\r\n--bench--\r\n"
    server = target.server
    more = {
        "Content-Type": "multipart/form-data; boundary=bench",
        "Content-Length": str(len(before) + size + len(after)),
    }
    with server.connect() as sock:
        sock.settimeout(120)
        began = time.perf_counter()
        sock.sendall(server.request("POST", f"/v1/devboxes/{box}/upload_file", more=more) + before)
        for _ in range(size // MIB):
            sock.sendall(piece)
        sock.sendall(after)
        inbox = Inbox()
        while (answer := inbox.feed(sock.recv(65536))) is None:
            pass
        if answer.status != 200:
            raise Unexpected(f"upload_file answered {answer.status}: {answer.body[:200]!r}")
        return time.perf_counter() - began


def _download(target: Target, box: str, size: int) -> float:
    server = target.server
    buffer = memoryview(bytearray(MIB))
    with server.connect() as sock:
        sock.settimeout(120)
        began = time.perf_counter()
        sock.sendall(server.request("POST", f"/v1/devboxes/{box}/download_file", {"path": "large"}))
        held = b""
        while b"\r\n\r\n" not in held:
            held += sock.recv(65536)
        raw, rest = held.split(b"\r\n\r\n", 1)
        status, headers = head(raw)
        if status != 200 or int(headers["content-length"]) != size:
            raise Unexpected(f"download_file answered {status} with {headers.get('content-length')} bytes")
        left = size - len(rest)
        while left > 0:
            count = sock.recv_into(buffer)
            if not count:
                raise Unexpected(f"download_file ended {left} bytes early")
            left -= count
        return time.perf_counter() - began


def _attached(target: Target, box: str, session: str) -> ClientConnection:
    url = f"{target.base_url.replace('http', 'ws', 1)}/pty/{session}/attach?devbox_id={box}"
    return connect(url, additional_headers={"authorization": f"Bearer {target.key}"}, max_size=None, proxy=None)


def _until(socket: ClientConnection, wanted: bytes) -> int:
    """Receive up to these bytes; how many came."""
    seen, size = b"", 0
    while wanted not in seen:
        data = socket.recv(timeout=60)
        assert isinstance(data, bytes)
        size += len(data)
        seen = seen[-len(wanted) :] + data
    return size


def _echoes(type_and_see: Callable[[str], None], count: int) -> list[float]:
    """Milliseconds of so many letters, after some for practice."""
    took = []
    for number in range(count + 20):
        letter = chr(97 + number % 26)
        took.append(timed(partial(type_and_see, letter)))
        time.sleep(0.002)
    return took[20:]


def _terminado_echoes(count: int) -> list[float]:
    with terminado.attached() as socket:
        terminado.send(socket, "stty -icanon; echo re''ady; cat\r")
        while "ready\r\n" not in terminado.received(socket):
            pass
        time.sleep(0.3)

        def type_and_see(letter: str) -> None:
            terminado.send(socket, letter)
            while letter not in terminado.received(socket):
                pass

        return _echoes(type_and_see, count)


def terminals(target: Target) -> Iterator[Figure]:
    """A byte typed until it is seen, beside terminado's; and a flood until its end."""
    count, lines = (100, 200_000) if target.quick else (500, 2_000_000)
    with target.boxes(1, cores=2) as (box,):
        with _attached(target, box, "echo") as socket:
            socket.send("stty -icanon; echo re''ady; cat\n")
            _until(socket, b"ready\r\n")
            time.sleep(0.3)

            def type_and_see(letter: str) -> None:
                socket.send(letter)
                while letter.encode() not in socket.recv(timeout=20):
                    pass

            took = _echoes(type_and_see, count)
        baseline = statistics.median(_terminado_echoes(count))
        yield figure("pty_echo_ms", "ms", took, baseline)
        parts = Parts(target.up)
        with _attached(target, box, "flood") as socket, Meter(parts) as meter:
            socket.send("stty -echo -onlcr; echo re''ady\n")
            _until(socket, b"ready\n")
            rates = []
            for _ in range(3):
                began = time.perf_counter()
                socket.send(f"yes 0123456789abcdef0123456789abcdef | head -n {lines}; echo the e''nd\n")
                rates.append(_until(socket, b"the end\n") / 1e6 / (time.perf_counter() - began))
    yield figure("pty_mb_s", "MB/s", rates).with_cpu(meter.shares())
