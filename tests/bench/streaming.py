"""Output as it happens: from the byte to the event, two hundred streams, much at once, and a reader that dawdles."""

from __future__ import annotations

import hashlib
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, Self, TypeVar

from tests.bench.creating import until
from tests.bench.figures import Figure, figure
from tests.bench.installation import Target, one_web
from tests.bench.shares import Meter, Parts, processes, pss_mb
from tests.bench.ssh import loopback_ssh
from tests.bench.wire import Event, Events, Server, Unexpected, follow_all

T = TypeVar("T")

NUMBERED_LINES = """exec 9<> <(:); read -t {wait} -u 9
for ((i = 1; i <= {count}; i++)); do echo "$i $EPOCHREALTIME"; read -t {pause} -u 9; done; true"""
"""Numbered lines that say when they were written, and no process for any of it."""

_BLOCK = "yes 'the quick brown fox jumps over the lazy dog, 0123456789 times' | head -c {size} >block"


class Sampled(Generic[T]):
    """Asks again and again, on a thread, for the length of a ``with``."""

    def __init__(self, ask: Callable[[], T], every: float) -> None:
        self.samples: list[T] = []
        self._ask, self._every = ask, every
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while True:
            self.samples.append(self._ask())
            if self._over.wait(self._every):
                return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(30)


class Lines:
    """Checks what one stream brings: every line once and in order; keeps how late each came, in ms, but for those that
    were written before anybody listened."""

    def __init__(self, count: int) -> None:
        self.count, self.seen, self.heard_from = count, 0, 0.0
        self.late: list[float] = []
        self._rest = ""

    def take(self, event: Event) -> None:
        """Raises Unexpected for an error event and for a line that should not come now."""
        if event.name:
            raise Unexpected(f"after line {self.seen}: {event.name} {event.data}")
        *lines, self._rest = (self._rest + event.data["output"]).split("\n")
        for line in lines:
            number, _, written = line.partition(" ")
            if int(number) != self.seen + 1:
                raise Unexpected(f"line {number} after line {self.seen}")
            self.seen += 1
            if float(written) >= self.heard_from:
                self.late.append((event.at - float(written)) * 1000)

    def finish(self) -> None:
        """Raises Unexpected unless all came."""
        if self.seen != self.count or self._rest:
            raise Unexpected(f"the stream ended cleanly after line {self.seen} of {self.count}")


def first_byte_ms(target: Target) -> Iterator[Figure]:
    """From the write in the box to the event at a raw client, one line at a time."""
    count = 60 if target.quick else 300
    with target.boxes(1) as (box,):
        lines = Lines(count)
        path = target.start(box, NUMBERED_LINES.format(wait=1, count=count, pause=0.05))
        stream = Events(target.server, f"{path}/stream_stdout_updates")
        try:
            follow_all([stream], 50, lambda _, event: lines.take(event))
        finally:
            stream.close()
        lines.finish()
    yield figure("first_byte_ms", "ms", lines.late)


def streams_200(target: Target) -> Iterator[Figure]:
    """Two hundred streams of slow writers on one web process: each must get every line once; how late lines come and
    what a stream holds in memory there."""
    count, lines_each = (50, 10) if target.quick else (200, 40)
    with target.boxes(4) as boxes, one_web(target) as web:
        parts = Parts(target.up, {"one web": web.pid})
        server = Server(web.base_url, target.key)
        with target.boxes(1) as (box,):  # one of each thing that is made on first use
            drain(Events(server, f"{target.start(box, 'echo')}/stream_stdout_updates"))
        before = pss_mb([web.pid])
        command = NUMBERED_LINES.format(wait=3 if target.quick else 8, count=lines_each, pause=0.5)
        paths = [target.start(boxes[number % 4], command) for number in range(count)]
        checks = [Lines(lines_each) for _ in paths]
        during: list[float] = []
        streams: list[Events] = []
        try:
            for path in paths:
                streams.append(Events(server, f"{path}/stream_stdout_updates"))
            for check in checks:
                check.heard_from = time.time()
            with Meter(parts) as meter, Sampled(lambda: pss_mb([web.pid]), 1.0) as memory:
                follow_all(streams, 80, lambda number, event: checks[number].take(event))
            during = memory.samples
        finally:
            for stream in streams:
                stream.close()
        for check in checks:
            check.finish()
    delays = [late for check in checks for late in check.late]
    yield figure("streams_200", "ms", delays).with_cpu(meter.shares())
    yield figure("streams_200_web_pss_mb", "MB", during, before)


def stream_mb_s(target: Target) -> Iterator[Figure]:
    """Much output of a running command to a raw client that only counts; the baseline is as many bytes through a
    loopback `ssh`. Then the same from where it is kept after its end."""
    size = (64 if target.quick else 192) << 20
    rounds = 2 if target.quick else 5
    parts = Parts(target.up)
    live: list[float] = []
    seconds: dict[str, float] = {}
    wall = 0.0
    for _ in range(rounds):
        with target.boxes(1) as (box,):  # a fresh one: what a box may write at once fills up only by and by
            target.run(box, _BLOCK.format(size=size // 4))
            path = target.start(box, "cat block block block block; sleep 4")
            time.sleep(0.2)
            with Meter(parts) as meter:
                live.append(_rate(target.server, f"{path}/stream_stdout_updates", size))
            wall += meter.wall
            for name, used in meter.seconds.items():
                seconds[name] = seconds.get(name, 0.0) + used
    with target.boxes(1) as (box,):
        target.run(box, _BLOCK.format(size=size))
        path = target.start(box, "cat block")
        _await_stored(target, path)
        kept = [_rate(target.server, f"{path}/stream_stdout_updates", size) for _ in range(rounds)]
    shares = {name: round(100 * used / wall, 1) for name, used in sorted(seconds.items(), key=lambda one: -one[1])}
    with loopback_ssh(target) as ssh:
        beside = statistics.median(_through(ssh(f"head -c {size} /dev/zero"), size) for _ in range(3))
    yield figure("stream_mb_s", "MB/s", live, beside).with_cpu(
        {name: share for name, share in shares.items() if share >= 0.5}
    )
    yield figure("stream_kept_mb_s", "MB/s", kept)


def _rate(server: Server, path: str, size: int) -> float:
    """MB of output a second until `size` bytes of output have come."""
    stream = Events(server, path)
    stream.sock.setblocking(True)
    began, tail = time.perf_counter(), b""
    last = f'"offset":{size}}}'.encode()
    try:
        while last not in tail:
            data = stream.sock.recv(1 << 20)
            if not data:
                raise Unexpected(f"the stream was cut: {tail[-200:]!r}")
            tail = (tail + data)[-256:] if len(data) < 256 else data[-256:]
    finally:
        stream.close()
    return size / 1e6 / (time.perf_counter() - began)


def _through(argv: list[str], size: int) -> float:
    """MB a second of a command that prints so many bytes."""
    began = time.perf_counter()
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=60)
    return size / 1e6 / (time.perf_counter() - began)


def _await_stored(target: Target, path: str) -> None:
    """Wait until the host's copy has been moved to where outputs are kept."""
    execution = path.rpartition("/")[2]
    asked = f"from executions.models import Execution as E; print(E.objects.get(pk='{execution}').kept)"
    until(lambda: target.python(asked).split()[-1] == "store", 60)


def slow_reader_1gib(target: Target) -> Iterator[Figure]:
    """1 GiB (the cap is raised for it) to a client that stops, dawdles and then reads on: how much the web process,
    sshd and the keeper grow meanwhile; what was read is compared by hash with what was written."""
    blocks = 2 if target.quick else 16
    block = 64 << 20
    write = f"for i in {{1..{blocks}}}; do echo block $i; cat block; done"
    with target.boxes(1) as (box,), one_web(target) as web:
        parts = Parts(target.up, {"one web": web.pid})
        # Lines that are all different, so that a block in another's place shows.
        target.run(box, f"base64 -w 63 /dev/urandom | head -c {block} >block")
        wanted = target.run(box, f"({write}) | sha256sum").split()[0]
        server = Server(web.base_url, target.key)
        drain(Events(server, f"{target.start(box, 'echo')}/stream_stdout_updates"))

        def memory() -> dict[str, float]:
            found = parts.pids(processes())
            return {name: pss_mb(found.get(name, ())) for name in ("one web", "sshd", "keepers")}

        before = memory()
        stream = Events(server, f"{target.start(box, write)}/stream_stdout_updates")
        try:
            with Sampled(memory, 0.25) as sampled:
                found, size = dawdle(stream, 2.0 if target.quick else 10.0)
        finally:
            stream.close()
    if found != wanted:
        raise Unexpected(f"{size} bytes came with hash {found[:16]}, written was {wanted[:16]}")
    peaks = {name: max(one[name] for one in sampled.samples) for name in before}
    for name, label in (("one web", "web"), ("sshd", "sshd"), ("keepers", "keeper")):
        grown = [one[name] - before[name] for one in sampled.samples]
        row = "slow_reader_1gib" if label == "web" else f"slow_reader_{label}"
        yield Figure(
            f"{row}_mb", "MB", round(statistics.median(grown), 1), round(peaks[name] - before[name], 1), len(grown)
        )
    yield Figure("slow_reader_read_mb", "MB", round(size / 1e6, 1), round(size / 1e6, 1), 1)


def dawdle(stream: Events, pause: float) -> tuple[str, int]:
    """Read 1 MiB, stop, read slowly for as long, then read on to the end: hash and size of the output."""
    digest, size = hashlib.sha256(), 0
    began, phase = time.monotonic(), "first"
    while not stream.ended:
        now = time.monotonic() - began
        if phase == "first" and size >= 1 << 20:
            time.sleep(pause)
            phase = "slowly"
        elif phase == "slowly":
            if now > 2 * pause:
                phase = "on"
            else:
                time.sleep(0.05)
        events = stream.read()
        if not events:
            time.sleep(0.001)
        for event in events:
            if event.name:
                raise Unexpected(f"after {size} bytes: {event.data}")
            data = event.data["output"].encode()
            digest.update(data)
            size += len(data)
            if event.data["offset"] != size:
                raise Unexpected(f"offset {event.data['offset']} after {size} bytes")
    return digest.hexdigest(), size


def drain(stream: Events) -> None:
    try:
        follow_all([stream], 20, lambda _, event: None)
    finally:
        stream.close()
