"""An in-memory VM host with the methods of `HostClient`: boxes, executions, fences, exits, scripted failures.

In charge of behaving like hostd for tests of flows: every verb may be sent twice, older fences are refused,
tombstones outlive what they bury. Commands never end by themselves unless scripted: `finish` ends one, `script`
says beforehand how a command ends.

    fake = FakeHost("hst_…")
    use_fake(fake.host_id, fake)              # client_for / async_client_for now answer with it
    fake.fail("boot", times=1)                # unreachable, nothing done
    fake.fail("boot", after=True)             # done, the answer lost
    fake.fail("prepare_disk", HostRefused("no_space", "the pool is full"))
    fake.script("true", exit=0, stdout=b"")   # this command ends at once
    fake.finish("exe_…", exit=3, stderr=b"no")
    fake.deliver()                            # what the watcher does with the exits: owners, then acknowledge
"""

from __future__ import annotations

import base64
import collections
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from django.conf import settings

from api.ids import new_id
from hostd import messages
from hosts.client import Activity, IndexResult, ReadResult
from hosts.delivery import deliver
from hosts.errors import HostRefused, HostUnreachable, StaleFence
from tests.fake_boxes import Box, Execution, Failure, verb
from tests.fake_snapshots import FakeSnapshots
from tests.fake_streams import FakeChanges, FakeFollowing, FakeWatching


class FakeHost(FakeSnapshots):
    """See the module's docstring. Thread-safe; no method sleeps."""

    def __init__(self, host_id: str, *, image: str = "base", slots: int = 1000) -> None:
        super().__init__()
        self.host_id = host_id
        self.image = image
        self.slots = slots
        self.lock = threading.RLock()
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.unreachable = False
        self.hooks: dict[str, Callable[..., None]] = {}
        """verb -> called with the same arguments after the effect, outside of the lock: to race with a step."""
        self.boxes: dict[str, Box] = {}
        self.fences: dict[str, int] = {}
        self.tombstones: set[str] = set()
        self.kept_disks: set[str] = set()
        self.asleep: dict[str, Box] = {}
        self.slow_suspends = 0
        """So many times `suspend` answers that it goes on."""
        self.unacked: dict[tuple[str, str], dict[str, Any]] = collections.OrderedDict()
        self.shipped: dict[str, bytes] = {}
        self.digest = "0" * 64
        self.boot_id = "boot-1"
        self.cluster = settings.BERTH.cluster
        self.warm = 0
        self.passed = 0.0
        """Seconds that the test says have passed on this host's own clock."""
        self.attached = 0
        """Terminals with somebody at them."""
        self.used_at = time.monotonic()
        """When a box was last used, by this host's own clock."""
        self._failures: dict[str, list[Failure]] = collections.defaultdict(list)
        self._scripts: dict[str, dict[str, Any]] = {}
        self._buried: dict[str, set[str]] = collections.defaultdict(set)
        self._slot = 0
        self.watching: list[FakeWatching] = []

    # --- scripting ---

    def fail(
        self,
        verb: str,
        error: BaseException | None = None,
        *,
        times: int = 1,
        after: bool = False,
        when: Callable[..., bool] | None = None,
    ) -> None:
        """Let the next `times` calls of `verb` (that `when(**arguments)` accepts) raise; `after`: once it is done."""
        what = error or HostUnreachable(self.host_id, f"scripted failure of {verb}")
        self._failures[verb].append(Failure(what, times, after, when))

    def script(
        self,
        command: str,
        *,
        exit: int = 0,
        stdout: bytes = b"",
        stderr: bytes = b"",
        reason: Mapping[str, Any] | None = None,
    ) -> None:
        """How a command (the whole text, or `*` for any) ends, at once when it is spawned."""
        self._scripts[command] = {"exit": exit, "stdout": stdout, "stderr": stderr, "reason": reason}

    def finish(
        self,
        id: str,
        *,
        exit: int = 0,
        stdout: bytes = b"",
        stderr: bytes = b"",
        reason: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """End a running command with this output; its exit waits for `deliver`."""
        with self.lock:
            box, execution = self._find(id)
            out, err = execution.stdout + stdout, execution.stderr + stderr
            execution.stdout, execution.stderr, execution.notes = out, err, list(notes)
            self._end(box, execution, exit, reason)

    def box_exit(self, box: str, *, exit: int = 137, oom: bool = False) -> None:
        """PID 1 of the box dies: its commands end as killed, the box is down."""
        with self.lock:
            found = self.boxes[box]
            found.state = "down"
            kind = "oom" if oom else "killed"
            for execution in found.executions.values():
                if execution.state == "running":
                    self._end(found, execution, 137, {"kind": kind, "detail": "its box ended"})
            self.unacked[box, messages.BOX_EXIT_ID] = {
                "event": "box_exit",
                "box": box,
                "exit": exit,
                "oom": oom,
                "at_ms": _now_ms(),
            }

    def notice(self, box: str, source: str, message: str, *, level: str = "info", at_ms: int | None = None) -> str:
        """Something happens to a box; waits for `deliver`."""
        with self.lock:
            id = new_id("ntc")
            event = {"event": "notice", "box": box, "id": id, "source": source, "level": level, "message": message}
            self.unacked[box, id] = {**event, "at_ms": at_ms or _now_ms()}
            return id

    def reboot(self) -> None:
        """The machine restarts: boxes are disks again, commands and unacknowledged exits of them are gone."""
        with self.lock:
            self.boot_id = f"boot-{int(self.boot_id.split('-')[1]) + 1}"
            for box in self.boxes.values():
                if box.state == "up":
                    event = {"event": "box_exit", "box": box.box, "exit": -1, "oom": False, "at_ms": _now_ms()}
                    self.unacked[box.box, messages.BOX_EXIT_ID] = {**event, "rebooted": True}
                box.state = "down"
                box.executions.clear()

    def deliver(self) -> list[tuple[str, str]]:
        """What the watcher does: hand unacknowledged events to their owners, acknowledge what they took."""
        with self.lock:
            events = list(self.unacked.values())
        acks = deliver(self.host_id, events)
        with self.lock:
            for pair in acks:
                self._acknowledge(*pair)
        return acks

    def monotonic(self) -> float:
        """This host's own clock, which nobody sets."""
        return time.monotonic() + self.passed

    def called(self, verb: str) -> list[dict[str, Any]]:
        """The arguments of every call of that verb so far."""
        return [arguments for name, arguments in self.calls if name == verb]

    @property
    def asynchronous(self) -> AsyncFakeHost:
        """The same host for the event loop."""
        return AsyncFakeHost(self)

    # --- the host's verbs ---

    @verb
    def hello(self) -> dict[str, Any]:
        return {
            "protocol": messages.PROTOCOL,
            "digest": self.digest,
            "cluster": self.cluster,
            "host": self.host_id,
            "install": 0,
            "boot_id": self.boot_id,
            "monotonic": self.monotonic(),
            "cpus": 64,
            "memory_bytes": 256 << 30,
            "memory_free_bytes": 200 << 30,
            "pool_bytes": 1 << 40,
            "pool_free_bytes": 1 << 40,
            "images": [self.image],
            "boxes": len(self.boxes),
            "warm": self.warm,
            "kernel": "6.12",
            "cgroup": "v2",
        }

    @verb
    def report(self) -> dict[str, Any]:
        return {
            "boxes": [
                {
                    "box": box.box,
                    "slot": box.slot,
                    "fence": self.fences.get(box.box, 0),
                    "state": box.state,
                    "image": box.image,
                    "executions": [{"id": e.id, "state": e.state} for e in box.executions.values() if not e.acked],
                }
                for box in self.boxes.values()
            ]
            + [
                {
                    "box": box,
                    "slot": "",
                    "fence": self.fences.get(box, 0),
                    "state": "asleep",
                    "image": "",
                    "executions": [],
                }
                for box in self.asleep.keys() - self.boxes.keys()
            ],
            "warm": [],
            "snapshots": self.reported_snapshots(),
            "at_ms": _now_ms(),
        }

    @verb
    def prepare_disk(
        self, *, box: str, fence: int, image: str, disk_bytes: int, snapshot: str | None = None
    ) -> dict[str, Any]:
        self._fence(box, fence)
        if snapshot is not None and snapshot not in self.snapshots:
            raise HostRefused("unknown_id", f"no snapshot {snapshot}", host_id=self.host_id)
        if image != self.image:
            raise HostRefused("unknown_image", f"no image {image}", host_id=self.host_id)
        found = self.boxes.get(box)
        if found is None:
            if len(self.boxes) >= self.slots:
                raise HostRefused("no_slot", "all slots are taken", host_id=self.host_id)
            self._slot += 1
            found = self.boxes[box] = Box(box, f"s{self._slot:04d}", fence, image, disk_bytes)
            self.tombstones.discard(box)
        return {"slot": found.slot, "warm": False}

    @verb
    def boot(
        self, *, box: str, fence: int, cpu_millis: int, memory_bytes: int, pids: int, disk_bytes: int, hostname: str
    ) -> dict[str, Any]:
        self._fence(box, fence)
        found = self._box(box)
        found.limits = {
            "cpu_millis": cpu_millis,
            "memory_bytes": memory_bytes,
            "pids": pids,
            "disk_bytes": disk_bytes,
            "hostname": hostname,
        }
        found.machine_id = found.machine_id or f"{number_of(found):032x}"
        if found.state != "up":
            found.state = "up"
            found.booted_at_ms = _now_ms()
        number = number_of(found)
        return {
            "slot": found.slot,
            "address": f"10.213.{number // 256}.{number % 256}",
            "init_pid": 100_000 + number,
            "keeper_pid": 200_000 + number,
            "booted_at_ms": found.booted_at_ms,
            "monotonic": self.monotonic(),
            "machine_id": found.machine_id,
        }

    @verb
    def suspend(self, *, box: str, fence: int) -> bool:
        self._fence(box, fence)
        if box not in self.asleep:
            self.asleep[box] = self._box(box)
        if self.slow_suspends > 0:
            self.slow_suspends -= 1
            return False
        self.boxes.pop(box, None)
        for key in [key for key in self.unacked if key[0] == box]:
            del self.unacked[key]
        return True

    @verb
    def resume(
        self,
        *,
        box: str,
        fence: int,
        image: str,
        disk_bytes: int,
        machine_id: str | None = None,
        snapshot: str | None = None,
    ) -> str:
        self._fence(box, fence)
        if box in self.boxes:
            return self.boxes[box].slot
        lying = self.asleep.pop(box, None)
        if lying is None and snapshot is None:
            raise HostRefused("unknown_box", f"no disk of {box}", host_id=self.host_id)
        self._slot += 1
        machine = machine_id or (lying.machine_id if lying is not None else "")
        self.boxes[box] = Box(box, f"s{self._slot:04d}", fence, image, disk_bytes, machine_id=machine)
        return self.boxes[box].slot

    @verb
    def destroy(self, *, box: str, fence: int, keep_disk: bool = False) -> None:
        self._fence(box, fence)
        found = self.boxes.pop(box, None) or self.asleep.get(box)
        self.asleep.pop(box, None)
        self.tombstones.add(box)
        if found is not None and keep_disk:
            self.kept_disks.add(box)
        for key in [key for key in self.unacked if key[0] == box]:
            del self.unacked[key]

    @verb
    def set_warm(self, *, count: int, image: str) -> None:
        self.warm = count

    @verb
    def ship(self, *, digest: str, body: bytes) -> None:
        self.shipped[digest] = body

    @verb
    def restart(self, *, digest: str) -> None:
        if digest not in self.shipped:
            raise HostRefused("bad_request", "that bundle was not shipped", host_id=self.host_id)
        self.digest = digest

    @verb
    def watch(self, *, stats_seconds: int | None = None) -> FakeWatching:
        return FakeWatching(self)

    # --- a box's verbs ---

    @verb
    def spawn(
        self,
        *,
        box: str,
        id: str,
        fence: int,
        body: Mapping[str, Any],
        hold_ms: int | None = None,
        cap: int | None = None,
    ) -> dict[str, Any]:
        found = self._up(box)
        execution = found.executions.get(id)
        if execution is None:
            self._fence(id, fence)
            execution = found.executions[id] = Execution(id, fence, dict(body), started_at_ms=_now_ms(), cap=cap)
            if id in self._buried[box]:
                self._end(found, execution, 137, {"kind": "killed_before_start"})
            else:
                ending = self._scripts.get(str(body.get("command")), self._scripts.get("*"))
                if ending is not None:
                    execution.stdout, execution.stderr = ending["stdout"], ending["stderr"]
                    self._end(found, execution, ending["exit"], ending["reason"])
        return self._state(execution)

    @verb
    def state(self, *, box: str, id: str) -> dict[str, Any]:
        return self._state(self._execution(box, id))

    @verb
    def kill(
        self, *, box: str, id: str, fence: int, signal: int, group: bool = True, request: str | None = None
    ) -> dict[str, Any]:
        found = self._up(box)
        self._fence(id, fence)
        execution = found.executions.get(id)
        if execution is not None and request is not None:
            if request in execution.requests or execution.state != "running":
                return {**self._state(execution), "sent": request in execution.requests}
            execution.requests.add(request)
        if execution is None:
            self._buried[box].add(id)
            execution = found.executions[id] = Execution(id, fence, {}, started_at_ms=_now_ms())
            self._end(found, execution, 137, {"kind": "killed_before_start"})
        elif execution.state == "running" and signal in (9, 15, 2):
            self._end(found, execution, 128 + signal, {"kind": "killed", "signal": signal})
            return {**self._state(execution), "sent": True}
        return {**self._state(execution), "sent": False}

    @verb
    def ack(self, *, box: str, ids: Sequence[str]) -> None:
        for one in ids:
            self._acknowledge(box, one)

    @verb
    def forget(self, *, box: str, id: str, fence: int) -> None:
        self._fence(id, fence)
        execution = self._execution(box, id)
        execution.moved = execution.state == "exited"
        if execution.moved:
            self._acknowledge(box, id)

    @verb
    def read(
        self, *, box: str, id: str, stream: str, offset: int, limit: int, last_lines: int | None = None
    ) -> ReadResult:
        late = ("late_stdout", "late_stderr")
        if stream in late:
            whole = self._execution(box, id).late[late.index(stream)]
        else:
            whole = getattr(self._output(box, id), stream)
        data = whole[offset : offset + limit]
        if last_lines is not None:
            tail = whole[max(0, len(whole) - limit) :]
            lines = tail.splitlines(keepends=True)
            data = b"".join(lines[-last_lines:]) if last_lines else b""
            offset = len(whole) - len(data)
        return ReadResult(len(whole), offset, data)

    @verb
    def activity(self, *, box: str) -> Activity:
        found = self._up(box)
        running = sum(one.state == "running" and not one.id.startswith("set_") for one in found.executions.values())
        idle = 0.0 if running or self.attached else self.monotonic() - self.used_at
        return Activity(running, self.attached, 0, idle, self.monotonic())

    @verb
    def follow(self, *, box: str, id: str, stream: str, offset: int = 0) -> FakeFollowing:
        return FakeFollowing(self, self._output(box, id), stream, offset)

    @verb
    def index(self, *, box: str, id: str, late: bool = False, last: int | None = None) -> IndexResult:
        execution = self._execution(box, id)
        sizes, tails = _sizes(execution)["sizes"], _sizes(execution)["late"]
        exited = execution.state == "exited"
        records = _records(execution.late_records if late else execution.records, execution, late=late)
        records = records[-messages.INDEX_RECORD.size * (last or 4096) :]
        return IndexResult((sizes[0], sizes[1]), (tails[0], tails[1]), exited, execution.started_at_ms, records)

    @verb
    def sizes(self, *, box: str) -> Sequence[dict[str, Any]]:
        found = self._up(box).executions.values()
        return [_sizes(execution) for execution in found if not execution.acked or any(execution.late)]

    @verb
    def changes(self, *, box: str) -> FakeChanges:
        found = self._up(box)
        return FakeChanges(self, lambda: [_sizes(execution) for execution in found.executions.values()])

    @verb
    def stdin(self, *, box: str, id: str, request: str, eof: bool = False, body: bytes = b"") -> dict[str, Any]:
        execution = self._execution(box, id)
        if request in execution.requests:
            return {"accepted": True}
        if execution.state == "exited" or execution.stdin_eof or execution.body.get("stdin") != "pipe":
            return {"accepted": False}
        execution.requests.add(request)
        execution.stdin += body
        execution.stdin_eof = execution.stdin_eof or eof
        return {"accepted": True}

    @verb
    def list(self, *, box: str) -> dict[str, Any]:
        return {"executions": [{"id": e.id, "state": e.state} for e in self._up(box).executions.values()]}

    # --- inside ---

    def _failure(self, verb: str, arguments: dict[str, Any]) -> Failure | None:
        for failure in self._failures[verb]:
            if failure.times > 0 and (failure.when is None or failure.when(**arguments)):
                failure.times -= 1
                return failure
        return None

    def _fence(self, id: str, fence: int) -> None:
        known = self.fences.get(id, 0)
        if fence < known:
            raise StaleFence(f"{id}: fence {fence} is older than {known}", {"fence": known}, host_id=self.host_id)
        self.fences[id] = fence

    def _box(self, box: str) -> Box:
        found = self.boxes.get(box)
        if found is None:
            raise HostRefused("unknown_box", f"no box {box}", host_id=self.host_id)
        return found

    def _up(self, box: str) -> Box:
        found = self._box(box)
        if found.state != "up":
            raise HostRefused("not_ready", f"{box} is {found.state}", host_id=self.host_id)
        return found

    def _execution(self, box: str, id: str) -> Execution:
        found = self._box(box).executions.get(id)
        if found is None:
            raise HostRefused("unknown_id", f"no {id} in {box}", host_id=self.host_id)
        return found

    def _output(self, box: str, id: str) -> Execution:
        execution = self._execution(box, id)
        if execution.moved:
            raise HostRefused("unknown_id", f"the output of {id} is not kept here any more", host_id=self.host_id)
        return execution

    def _find(self, id: str) -> tuple[Box, Execution]:
        for box in self.boxes.values():
            if id in box.executions:
                return box, box.executions[id]
        known = [execution for box in self.boxes.values() for execution in box.executions]
        raise AssertionError(f"nothing was spawned as {id}; known: {known}")

    def _end(self, box: Box, execution: Execution, exit: int, reason: Mapping[str, Any] | None) -> None:
        execution.state = "exited"
        execution.exit = exit
        execution.reason = dict(reason) if reason else None
        execution.exited_at_ms = _now_ms()
        event = {"event": "exit", "box": box.box, "dropped": execution.dropped, **self._state(execution)}
        event.pop("state")
        self.unacked[box.box, execution.id] = event

    def _state(self, execution: Execution) -> dict[str, Any]:
        answer: dict[str, Any] = {
            "id": execution.id,
            "state": execution.state,
            "sizes": [len(execution.stdout), len(execution.stderr)],
            "started_at_ms": execution.started_at_ms,
        }
        if execution.state == "running":
            return answer | {"pid": 4242}
        answer |= {"exit": execution.exit, "reason": execution.reason, "exited_at_ms": execution.exited_at_ms}
        answer |= {"notes": execution.notes} if execution.notes else {}
        if any(answer["sizes"]):
            answer["first_byte_at_ms"] = execution.exited_at_ms
        if sum(answer["sizes"]) <= messages.INLINE_MAX:
            answer["stdout"] = base64.b64encode(execution.stdout).decode()
            answer["stderr"] = base64.b64encode(execution.stderr).decode()
            answer["index"] = base64.b64encode(_records(execution.records, execution, late=False)).decode()
        return answer

    def _acknowledge(self, box: str, id: str) -> None:
        self.unacked.pop((box, id), None)
        found = self.boxes.get(box)
        if found is not None and id in found.executions:
            found.executions[id].acked = True


class AsyncFakeHost:
    """The loop's view of a `FakeHost`: the same verbs, awaited; `follow` answers at once with its stream."""

    def __init__(self, host: FakeHost) -> None:
        self.host = host
        self.host_id = host.host_id

    def follow(self, **arguments: Any) -> FakeFollowing:
        return self.host.follow(**arguments)  # type: ignore[no-any-return]

    def changes(self, **arguments: Any) -> FakeChanges:
        return self.host.changes(**arguments)  # type: ignore[no-any-return]

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        if verb not in messages.VERBS:
            raise AttributeError(verb)
        function = getattr(self.host, verb)

        async def call(**arguments: Any) -> Any:
            return function(**arguments)

        return call


def number_of(box: Box) -> int:
    return int(box.slot[1:])


def _sizes(execution: Execution) -> dict[str, Any]:
    return {
        "id": execution.id,
        "state": execution.state,
        "sizes": [len(execution.stdout), len(execution.stderr)],
        "late": [len(piece) for piece in execution.late],
        "started_at_ms": execution.started_at_ms,
    }


def _records(given: Sequence[tuple[int, int, int]], execution: Execution, *, late: bool) -> bytes:
    if not given:
        pieces = execution.late if late else (execution.stdout, execution.stderr)
        at_ms = (execution.exited_at_ms or 0) if late else execution.started_at_ms
        given = [(at_ms, number, len(piece)) for number, piece in enumerate(pieces, 1) if piece]
    return b"".join(messages.INDEX_RECORD.pack(at_ms * 2 + number - 1, end) for at_ms, number, end in given)


def _now_ms() -> int:
    return int(time.time() * 1000)
