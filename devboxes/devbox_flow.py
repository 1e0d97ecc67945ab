"""The flow of a devbox: one step each for finding it a place, its disk, its box, its launch work, and its end.

In charge of: the steps and what their failures mean. Not in charge of: which moves are legal (`devboxes.states`), what
the launch work is (`devboxes.launch`), or requests from outside (`devboxes.services`, `devboxes.hosted`).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.db import connection, transaction

from accounts.sealing import SealBroken
from devboxes import launch, logs, states
from devboxes.models import Devbox, DevboxLog
from flows.engine import Flow, Row, Settled
from flows.outcomes import DatabaseNow, Done, Next, Outcome, Superseded, Wait
from flows.statements import Alongside
from hostd.messages import LateStream, Sizes, Stream
from hosts import delivery, placement, registry
from hosts.client import HostClient, HostRefused, HostUnreachable, StaleFence, client_for, index_records, outputs
from hosts.models import Host, HostState

log = logging.getLogger(__name__)

MIB = 1 << 20
PIDS = 4096
PLACE_AGAIN_SECONDS = 1.0
LAUNCH_LOOK_SECONDS = 15.0
"""An exit wakes the flow; this is for one that nobody reported."""
LAUNCH_HOLD_MS = 300
LAUNCH_SLICE = timedelta(seconds=3)
RUNNING_LOOK_SECONDS = 3600.0
SILENCE_LOOK_SECONDS = 5.0
CLOCK_SLACK_SECONDS = 2.0
"""How far the two clocks may differ over a devbox's life without one of them having been set."""
BEFORE_DESTROY = timedelta(seconds=60)
BEFORE_DESTROY_AGAIN_SECONDS = 0.5
LATE_KEPT = 200
WHY_LIMIT = 2000
WHY_LINES = 10


@dataclass(slots=True, kw_only=True)
class DevboxRow(Row):
    """What the steps see of a devbox. Its secrets and texts are read by the launch step alone."""

    status: str
    host_id: str | None
    reserved: bool
    image_id: str
    architecture: str
    cpu_millis: int
    memory_mb: int
    disk_mb: int
    keep_alive_seconds: int
    end_at: datetime | None
    host_clock_at_start: float | None
    ended_at: datetime | None
    started_at: datetime | None
    launch_index: int
    launch_total: int
    launch_items: list[dict[str, Any]]
    failure_reason: str | None
    shutdown_reason: str | None
    why: str

    @property
    def size(self) -> tuple[int, int, int]:
        """What is promised to it: CPU in thousandths, memory and disk in MiB."""
        return self.cpu_millis, self.memory_mb, self.disk_mb


def transition(status: str, failure_reason: str | None, passed: Sequence[str] = ()) -> Alongside:
    """The public transition row that goes with a change of status, after those of statuses `passed` on the way."""
    return Alongside(
        "INSERT INTO devboxes_devboxtransition (devbox_id, status, at, failure_reason) "
        "SELECT settled.id, via.status, clock_timestamp(), %s FROM settled, unnest(%s::text[]) AS via (status)",
        (failure_reason, [*passed, status]),
    )


def entering(step: str) -> dict[str, object]:
    """The columns that follow from being in a step, for those who put a devbox there."""
    seconds = states.seconds_for(step)
    status = states.STATUS[step]
    columns: dict[str, object] = {"status": status, "deadline_at": DatabaseNow(seconds) if seconds else None}
    if status in states.OVER:
        columns["ended_at"] = DatabaseNow()
    return columns


def fail(reason: str, why: str, kind: str, /, **evidence: object) -> Next:
    """The devbox has failed: take its box apart and say why, in words and as a kind of cause with its evidence."""
    cause = {"kind": kind, **{name: value for name, value in evidence.items() if value is not None}}
    return Next(states.CLEAN_UP, {"failure_reason": reason, "why": why[:WHY_LIMIT], "cause": cause})


class DevboxFlow(Flow[DevboxRow]):
    """See `devboxes.states` for the picture."""

    model = Devbox
    queue = "devboxes"
    row = DevboxRow

    def __init__(self) -> None:
        self.steps: dict[str, Callable[[DevboxRow], Outcome]] = {
            states.PLACE: self.place,
            states.PREPARE_DISK: self.prepare_disk,
            states.BOOT: self.boot,
            states.LAUNCH: self.launch,
            states.RUNNING: self.running,
            states.TEARDOWN: self.teardown,
            states.CLEAN_UP: self.clean_up,
        }

    # What the engine asks.

    def settled(self, row: DevboxRow, step: str, outcome: Outcome) -> Settled:
        """Status, deadline and public transition follow from the step."""
        if step == row.step:
            return Settled(hint=False)
        if not states.may_move(row.step, step):
            raise RuntimeError(f"devbox {row.id} may not go from {row.step} to {step}")
        columns = entering(step)
        if columns["status"] == row.status:
            columns.pop("ended_at", None)
            return Settled(columns, hint=isinstance(outcome, Done))
        reason = outcome.learnt.get("failure_reason")
        # A devbox without launch work is initialized in no time.
        passed = [states.STATUS[states.LAUNCH]] if step == states.RUNNING and row.step != states.LAUNCH else []
        return Settled(columns, transition(str(columns["status"]), str(reason) if reason else None, passed))

    def expired(self, row: DevboxRow) -> Outcome | None:
        """Past a step's time the devbox fails, naming the clock that fired.

        A host's silence does not count: what is on it is waited for until it is heard again or declared lost, but not
        for longer than that takes, for then nobody listens to hosts at all.
        """
        seconds = states.seconds_for(row.step)
        if seconds is None:
            return None
        if row.host_id is not None and not placement.is_heard(row.host_id):
            if host_is_lost(row.host_id):
                return _host_lost(row.host_id, f"its host was lost while it was in {row.step}")
            if row.now - row.step_since < timedelta(seconds=seconds + settings.BERTH.LOST_AFTER):
                return Wait(SILENCE_LOOK_SECONDS, {"deadline_at": DatabaseNow(seconds)})
            return _host_lost(row.host_id, f"its host was not heard for too long while it was in {row.step}")
        last = f"; the last trouble was: {row.why}" if row.why else ""
        if row.step == states.PLACE:
            return fail("health_check_failed", f"no host had room for it within {seconds:g} s{last}", "no_room")
        if row.step == states.LAUNCH:
            why = f"its launch work took longer than {seconds:g} s{last}"
            return fail("execution_failed", why, "step_timeout", step=row.step, seconds=seconds)
        why = f"{row.step} took longer than {seconds:g} s{last}"
        return fail("health_check_failed", why, "step_timeout", step=row.step, seconds=seconds)

    def on_exception(self, row: DevboxRow, error: Exception) -> Outcome | None:
        """What a host's refusal means. Being unreachable means: try again until the step's time is up."""
        if isinstance(error, StaleFence):
            raise Superseded(row.id) from error
        if row.step in (states.TEARDOWN, states.CLEAN_UP):
            return None
        if isinstance(error, HostRefused):
            if error.code == "no_space":
                why = f"its host has no space left: {error.message}"
                return fail("out_of_disk", why, "host_refused", step=row.step, code=error.code)
            if error.code in ("unknown_image", "unknown_box", "lost", "bad_request", "unknown_verb"):
                why = f"its host refused {row.step}: {error.message}"
                return fail("health_check_failed", why, "host_refused", step=row.step, code=error.code)
        if isinstance(error, SealBroken):
            return fail("execution_failed", f"what it was made with cannot be read any more: {error}", "sealed")
        if isinstance(error, HostUnreachable) and row.host_id and host_is_lost(row.host_id):
            return _host_lost(row.host_id, f"its host was lost: {error.reason}")
        return None

    # The steps.

    def place(self, row: DevboxRow) -> Outcome:
        """Promise it room on a host; wait while all are full."""
        hosts = placement.choose(*row.size, row.architecture, limit=1)
        if not hosts:
            return Wait(PLACE_AGAIN_SECONDS)
        host_id, image = hosts[0]
        return Next(
            states.PREPARE_DISK,
            {"host_id": host_id, "image_id": image, "reserved": True, "placed_at": DatabaseNow()},
            also=lambda cursor: placement.reserve(cursor, host_id, *row.size),
        )

    def prepare_disk(self, row: DevboxRow) -> Outcome:
        """Have its disk made; or a warm box claimed for it, which is up and only wants its limits."""
        reply = self._host(row).prepare_disk(
            box=row.id, fence=row.fence, image=row.image_id, disk_bytes=row.disk_mb * MIB
        )
        learnt: dict[str, object] = {"slot": reply["slot"], "disk_at": DatabaseNow()}
        return self.boot(row, learnt) if reply["warm"] else Next(states.BOOT, learnt)

    def boot(self, row: DevboxRow, prepared: Mapping[str, object] | None = None) -> Outcome:
        """Have its box started. `prepared` is what the same go has learnt already."""
        reply = self._host(row).boot(
            box=row.id,
            fence=row.fence,
            cpu_millis=row.cpu_millis,
            memory_bytes=row.memory_mb * MIB,
            pids=PIDS,
            disk_bytes=row.disk_mb * MIB,
            hostname=row.id.replace("_", "-"),
        )
        learnt = {"slot": reply["slot"], "address": reply["address"], "seen": "up", "seen_at": DatabaseNow()}
        learnt |= {"booted_at": DatabaseNow(), "host_clock_at_start": reply.get("monotonic")}
        learnt = {**(prepared or {}), **learnt}
        if row.launch_total:
            return Next(states.LAUNCH, learnt)
        started = self._start(row, 0, [], [])
        return replace(started, learnt={**learnt, **started.learnt})

    def launch(self, row: DevboxRow) -> Outcome:
        """Run its launch work, one piece after the other; sleep while one runs."""
        if row.launch_index >= row.launch_total:
            return self._start(row, row.launch_index, [], row.launch_items)
        work = launch.plan(row.id)
        host, index, entries = self._host(row), row.launch_index, list[logs.Entry]()
        items = row.launch_items[:index]
        began = datetime.now()
        while index < len(work):
            row.check()
            piece = work[index]
            state = host.spawn(
                box=row.id,
                id=piece.id,
                fence=row.fence,
                body=piece.body,
                hold_ms=LAUNCH_HOLD_MS if piece.awaited else None,
            )
            if piece.awaited and state["state"] == "running":
                # The entry about its start is written with the first sleep, and only then.
                learnt = {"launch_index": index, "launch_items": [*items, _item(piece, state)]}
                return Wait(LAUNCH_LOOK_SECONDS, learnt, also=_log(row.id, entries))
            items.append(_item(piece, state))
            if not piece.awaited:
                entries.append(logs.Entry(piece.source, piece.id, cmd=piece.title))
                index += 1
                continue
            ended = _ended(host, row.id, piece, state)
            entries += ended.entries
            if ended.failure is not None:
                reason, why, evidence = ended.failure
                why = f"launch work {index + 1} of {len(work)} ({_short(piece.title)}) {why}"
                failure = fail(reason, why, "launch_failed", item=index, title=items[-1]["title"], **evidence)
                learnt = {**failure.learnt, "launch_index": index, "launch_items": items}
                return Next(failure.step, learnt, also=_log(row.id, entries))
            index += 1
            if datetime.now() - began > LAUNCH_SLICE and index < len(work):
                learnt = {"launch_index": index, "launch_items": items}
                return Next(states.LAUNCH, learnt, also=_log(row.id, entries))
        return self._start(row, index, entries, items)

    def _start(self, row: DevboxRow, index: int, entries: Sequence[logs.Entry], items: list[dict[str, Any]]) -> Wait:
        learnt: dict[str, object] = {
            "launch_index": index,
            "launch_items": items,
            "started_at": DatabaseNow(),
            "last_activity_at": DatabaseNow(),
            "end_at": DatabaseNow(row.keep_alive_seconds),
        }
        if row.launch_total:  # else it was told with the boot, a moment ago
            learnt["host_clock_at_start"] = self._host(row).hello()["monotonic"]
        seconds = min(row.keep_alive_seconds, RUNNING_LOOK_SECONDS)
        return Wait(seconds, learnt, also=_log(row.id, entries) if entries else None, step=states.RUNNING)

    def running(self, row: DevboxRow) -> Outcome:
        """Nothing, until its keep-alive time is over: by the database's clock, and then by its host's own, which
        nobody sets, so that a jump of the former ends nothing."""
        if row.end_at is None:
            return Wait(row.keep_alive_seconds, {"end_at": DatabaseNow(row.keep_alive_seconds)})
        left = (row.end_at - row.now).total_seconds()
        if left > 0:
            return Wait(min(left, RUNNING_LOOK_SECONDS))
        if row.host_clock_at_start is not None:
            ran = self._host(row).hello()["monotonic"] - row.host_clock_at_start
            left = row.keep_alive_seconds - max(0.0, ran)
            if left > CLOCK_SLACK_SECONDS:
                log.warning("%s has run for %.0f s by its host's clock: the database's jumped", row.id, ran)
                return Wait(min(left, RUNNING_LOOK_SECONDS), {"end_at": DatabaseNow(left)})
        why = f"its keep-alive time of {row.keep_alive_seconds} s is over"
        cause = {"kind": "keep_alive_timeout", "seconds": row.keep_alive_seconds}
        learnt = {"wants": "shutdown", "shutdown_reason": "keep_alive_timeout", "why": why, "cause": cause}
        return Next(states.TEARDOWN, learnt)

    def teardown(self, row: DevboxRow) -> Outcome:
        """Take its box apart after it was shut down."""
        return self._take_apart(row, states.GONE, row.shutdown_reason or "shutdown")

    def clean_up(self, row: DevboxRow) -> Outcome:
        """Take its box apart after it failed."""
        return self._take_apart(row, states.FAILED, row.failure_reason or "failure")

    def _take_apart(self, row: DevboxRow, end: str, reason: str) -> Outcome:
        # 1. Let the other rooms bring home what they need from the host, 60 s at most, and what the entrypoint wrote.
        # 2. Have the box destroyed; of one that was lost while it ran the host keeps the disk for a day. A host that is
        #    lost itself is not waited for: reconcile destroys the box, should it return.
        # 3. Let the other rooms close what hung on it. 4. Take the promise back, with the end itself.
        if row.host_id is None:
            registry.after_destroy(row.id, reason)
            return Done(step=end)
        if row.now - row.step_since < BEFORE_DESTROY and not registry.before_destroy(row.id):
            return Wait(BEFORE_DESTROY_AGAIN_SECONDS)
        self._keep_entrypoint(row)
        self._keep_late(row)
        try:
            self._host(row).destroy(box=row.id, fence=row.fence, keep_disk=_is_lost(row))
        except HostUnreachable:
            if not host_is_lost(row.host_id):
                raise
        registry.after_destroy(row.id, reason)
        return Done({"reserved": False, "seen": "gone", "seen_at": DatabaseNow()}, also=_release(row), step=end)

    def _keep_entrypoint(self, row: DevboxRow) -> None:
        """Log what the entrypoint has written, unless its exit has brought that. Without its host there is nothing."""
        if row.started_at is None or not Devbox.objects.filter(pk=row.id).exclude(entrypoint="").exists():
            return
        work_id = launch.work_id(row.id, launch.ENTRYPOINT)
        if DevboxLog.objects.filter(devbox_id=row.id, execution_id=work_id, started_at__isnull=False).exists():
            return
        host = self._host(row)
        try:
            state = host.state(box=row.id, id=work_id)
            told = _output(host, row.id, work_id, state)
        except (HostRefused, HostUnreachable):
            return
        code = state.get("exit")
        entry = logs.Entry(
            launch.ENTRYPOINT, work_id, "error" if code else "info",
            exit_code=code, at_ms=state.get("exited_at_ms"), output=told,
        )  # fmt: skip
        with transaction.atomic(), connection.cursor() as cursor:
            logs.write(cursor, row.id, [entry])

    def _keep_late(self, row: DevboxRow) -> None:
        """Log the end of what background processes wrote after their commands had ended, of LATE_KEPT commands."""
        host = self._host(row)
        entries: list[logs.Entry] = []
        try:
            moving = [told for told in host.sizes(box=row.id) if any(told["late"])]
            kept = set(
                DevboxLog.objects.filter(
                    devbox_id=row.id, started_at__isnull=False, execution_id__in=[told["id"] for told in moving]
                ).values_list("execution_id", flat=True)
            )
            for told in [told for told in moving if told["id"] not in kept][-LATE_KEPT:]:
                row.check()
                entries.append(logs.Entry("exec", told["id"], output=_late(host, row.id, told)))
        except (HostRefused, HostUnreachable):
            pass  # what is had is kept
        if entries:
            with transaction.atomic(), connection.cursor() as cursor:
                logs.write(cursor, row.id, entries)

    @staticmethod
    def _host(row: DevboxRow) -> HostClient:
        if row.host_id is None:
            raise RuntimeError(f"devbox {row.id} is in step {row.step} without a host")
        return client_for(row.host_id)


def host_is_lost(host_id: str) -> bool:
    """Whether nothing of that host will be heard again, as far as we have decided."""
    return (
        Host.objects.filter(pk=host_id, lost_at__isnull=False).exists()
        or not Host.objects.filter(
            pk=host_id, state__in=[HostState.READY, HostState.RETIRING, HostState.ENROLLING]
        ).exists()
    )


def _host_lost(host_id: str, why: str) -> Next:
    seen_at = Host.objects.values_list("seen_at", flat=True).filter(pk=host_id).first()
    since = int(seen_at.timestamp() * 1000) if seen_at else None
    return fail("health_check_failed", why, "host_lost", silent_since_ms=since)


def _is_lost(row: DevboxRow) -> bool:
    return row.failure_reason == "health_check_failed" and row.started_at is not None


def _release(row: DevboxRow) -> Callable[[Any], bool] | None:
    if not row.reserved or row.host_id is None:
        return None
    host_id, size = row.host_id, row.size

    def release(cursor: Any) -> bool:
        placement.release(cursor, host_id, *size)
        return True

    return release


def _log(devbox_id: str, entries: Sequence[logs.Entry]) -> Callable[[Any], bool]:
    def write(cursor: Any) -> bool:
        logs.write(cursor, devbox_id, entries)
        return True

    return write


def _short(title: str) -> str:
    line = title.strip().splitlines()[0] if title.strip() else title
    return line if len(line) <= 80 else line[:79] + "…"


@dataclass(slots=True)
class _Ended:
    entries: list[logs.Entry]
    failure: tuple[str, str, dict[str, object]] | None


def _item(piece: launch.Work, state: Any) -> dict[str, Any]:
    """What is kept of a piece of launch work; times are the host's."""
    found = {
        "id": piece.id,
        "title": _short(logs.readable(piece.title.encode(), piece.secrets)),
        "source": piece.source,
        "started_at_ms": state.get("started_at_ms"),
    }
    if state["state"] == "exited":
        found |= {"ended_at_ms": state.get("exited_at_ms"), "exit_status": state.get("exit")}
    return {name: value for name, value in found.items() if value is not None}


def _ended(host: HostClient, devbox_id: str, piece: launch.Work, state: Any) -> _Ended:
    """What a finished piece of launch work leaves in the log, and whether the devbox fails by it."""
    wrote = _output(host, devbox_id, piece.id, state, piece.secrets)
    stdout, stderr = wrote.stdout, wrote.stderr
    code = state["exit"]
    out, err = logs.readable(stdout, piece.secrets), logs.readable(stderr, piece.secrets)
    title = logs.readable(piece.title.encode(), piece.secrets)
    level: logs.Level = "error" if code else "info"
    at_ms = state.get("exited_at_ms")
    entries = [logs.Entry(piece.source, piece.id, level, cmd=title, exit_code=code, at_ms=at_ms, output=wrote)]
    if code == 0:
        return _Ended(entries, None)
    told = delivery.told(state.get("reason")) or {}
    lines = [line[:WHY_LIMIT] for line in logs.last_lines(err, WHY_LINES) or logs.last_lines(out, WHY_LINES)]
    tail = ":\n" + "\n".join(lines) if lines else ""
    evidence: dict[str, object] = {"exit_status": code, "output": lines, "reported": told or None}
    if told.get("kind") == "lost":
        detail = told.get("detail") or "its end was not seen"
        return _Ended(entries, ("health_check_failed", f"was lost: {detail}", evidence))
    if told.get("kind") == "oom":
        return _Ended(entries, ("out_of_memory", f"was ended because the devbox's memory was used up{tail}", evidence))
    if "No space left on device" in err or "Disk quota exceeded" in err:
        return _Ended(entries, ("out_of_disk", f"ended with {code} because the disk is full{tail}", evidence))
    return _Ended(entries, ("execution_failed", f"ended with {code}{tail}", evidence))


def _output(host: HostClient, devbox_id: str, work_id: str, state: Any, secrets: Sequence[str] = ()) -> logs.Output:
    """What a piece of launch work has written, for its log."""
    found = outputs(state)
    if found is not None:
        stdout, stderr = found
        index = index_records(state)
    else:
        stdout, stderr = (_tail(host, devbox_id, work_id, stream, secrets) for stream in ("stdout", "stderr"))
        index = _index(host, devbox_id, work_id)
    sizes = state["sizes"]
    if secrets:  # the index speaks of places in the output as it was
        stdout, stderr, index = logs.redacted(stdout, secrets), logs.redacted(stderr, secrets), None
        sizes = [len(stdout), len(stderr)]
    return logs.Output(
        started_ms=state.get("started_at_ms") or int(datetime.now().timestamp() * 1000),
        stdout=stdout,
        stderr=stderr,
        sizes=(max(sizes[0], len(stdout)), max(sizes[1], len(stderr))),
        index=index,
    )


def _tail(host: HostClient, devbox_id: str, work_id: str, stream: Stream, secrets: Sequence[str]) -> bytes:
    limit = logs.OUTPUT_LIMIT
    try:
        size = host.read(box=devbox_id, id=work_id, stream=stream, offset=0, limit=0).size
        data = host.read(box=devbox_id, id=work_id, stream=stream, offset=max(0, size - limit), limit=limit).data
    except HostRefused:
        return b""  # of a command that was lost there may be nothing
    if secrets and size > limit:
        return data.partition(b"\n")[2]  # half a secret would not be known for one
    return data


def _late(host: HostClient, devbox_id: str, told: Sizes) -> logs.Output:
    def tail(stream: LateStream, size: int) -> bytes:
        start = max(0, size - logs.OUTPUT_LIMIT)
        return host.read(box=devbox_id, id=told["id"], stream=stream, offset=start, limit=logs.OUTPUT_LIMIT).data

    out, err = told["late"]
    return logs.Output(
        started_ms=told["started_at_ms"],
        stdout=tail("late_stdout", out),
        stderr=tail("late_stderr", err),
        sizes=(out, err),
        index=host.index(box=devbox_id, id=told["id"], late=True).records,
    )


def _index(host: HostClient, devbox_id: str, work_id: str) -> bytes | None:
    try:
        return host.index(box=devbox_id, id=work_id).records
    except HostRefused:
        return None


devbox_flow = DevboxFlow()
