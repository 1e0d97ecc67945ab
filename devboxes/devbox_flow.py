"""The flow of a devbox: one step each for finding it a place, its disk, its box, its launch work, and its end.

In charge of: the steps and what their failures mean. Not in charge of: which moves are legal (`devboxes.states`), what
the launch work is (`devboxes.launch`), or requests from outside (`devboxes.services`, `devboxes.hosted`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings

from accounts.sealing import SealBroken
from devboxes import clocks, launch, launch_logs, logs, saves, states, suspending
from devboxes.flow_rows import DISK_LEFT_MIN, MIB, DevboxRow, entering, fail, host_is_lost, host_lost, transition
from devboxes.launch_logs import LAUNCH_HOLD_MS, LAUNCH_LOOK_SECONDS
from devboxes.models import Devbox
from devboxes.origins import origins
from flows.engine import Flow, Settled
from flows.outcomes import DatabaseNow, Done, Next, Outcome, Superseded, Wait
from hosts import placement, registry
from hosts.client import HostRefused, HostUnreachable, StaleFence

PIDS = 4096
PLACE_AGAIN_SECONDS = 1.0
ORIGIN_AGAIN_SECONDS = 0.3
ORIGIN_TRIES = 4
LAUNCH_SLICE = timedelta(seconds=3)
SILENCE_LOOK_SECONDS = 5.0
BEFORE_DESTROY = timedelta(seconds=60)
BEFORE_DESTROY_AGAIN_SECONDS = 0.5


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
            states.RUNNING: clocks.running,
            states.LAST_LOOK: clocks.last_look,
            states.RUN_HOOKS: suspending.run_hooks,
            states.QUIET: suspending.quiet,
            states.SUSPEND: suspending.suspend,
            states.SUSPENDED: suspending.suspended,
            states.READMIT: suspending.readmit,
            states.TAKE_DISK: suspending.take_disk,
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
        starts = step == states.RUNNING and row.step in (states.PREPARE_DISK, states.BOOT)
        passed = [states.STATUS[states.LAUNCH]] if starts else []
        return Settled(columns, transition(str(columns["status"]), str(reason) if reason else None, passed))

    def expired(self, row: DevboxRow) -> Outcome | None:
        """Past a step's time the devbox fails, naming the clock that fired.

        A host's silence does not count: what is on it is waited for until it is heard again or declared lost, but not
        for longer than that takes, for then nobody listens to hosts at all.
        """
        seconds = states.seconds_for(row.step)
        if seconds is None:
            return None
        if row.step in suspending.EXPIRED:
            return suspending.EXPIRED[row.step](row)
        if row.host_id is not None and not placement.is_heard(row.host_id):
            if host_is_lost(row.host_id):
                return host_lost(row.host_id, f"its host was lost while it was in {row.step}")
            if row.now - row.step_since < timedelta(seconds=seconds + settings.BERTH.LOST_AFTER):
                return Wait(SILENCE_LOOK_SECONDS, {"deadline_at": DatabaseNow(seconds)})
            return host_lost(row.host_id, f"its host was not heard for too long while it was in {row.step}")
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
        if row.step in (states.TEARDOWN, states.CLEAN_UP, states.LAST_LOOK):
            return None
        if row.step == states.RUN_HOOKS:
            return Next(states.QUIET) if isinstance(error, HostRefused) else None
        if isinstance(error, HostRefused):
            if error.code == "no_space":
                why = f"its host has no space left: {error.message}"
                return fail("out_of_disk", why, "host_refused", step=row.step, code=error.code)
            if error.code == "storage" and row.attempts >= ORIGIN_TRIES:
                why = f"S3 does not give its snapshot: {error.message}"
                return fail("health_check_failed", why, "snapshot_failed", snapshot_id=row.snapshot_id)
            if error.code == "lost" and row.step == states.LAUNCH:
                return None  # with its box, most likely; why is told in a moment
            if error.code in ("unknown_image", "unknown_box", "lost", "bad_request", "unknown_verb"):
                why = f"its host refused {row.step}: {error.message}"
                return fail("health_check_failed", why, "host_refused", step=row.step, code=error.code)
        if isinstance(error, SealBroken):
            return fail("execution_failed", f"what it was made with cannot be read any more: {error}", "sealed")
        if isinstance(error, HostUnreachable) and row.step in (states.TAKE_DISK, states.BOOT):
            elsewhere = suspending.think_again(row)
            if elsewhere is not None:
                return elsewhere
        if isinstance(error, HostUnreachable) and row.host_id and host_is_lost(row.host_id):
            return host_lost(row.host_id, f"its host was lost: {error.reason}")
        return None

    # The steps.

    def place(self, row: DevboxRow) -> Outcome:
        """Promise it room on a host; wait while all are full. One that is made of a kept disk waits for that first, and
        goes where it is, if there is room."""
        learnt: dict[str, object] = {}
        image, prefer = None, list[str]()
        if row.snapshot_id is not None:
            origin = origins().look(row.snapshot_id)
            if origin is None or origin.failed:
                why = origin.failed if origin else f"snapshot {row.snapshot_id} is gone"
                return fail("health_check_failed", why, "snapshot_failed", snapshot_id=row.snapshot_id)
            if not origin.ready:
                return Wait(ORIGIN_AGAIN_SECONDS, {"deadline_at": DatabaseNow(settings.BERTH.PLACE_FOR)})
            size = origin.size_bytes or 0
            if row.disk_mb * MIB - size < DISK_LEFT_MIN:
                why = f"snapshot {row.snapshot_id} has {size} bytes, too many for its disk of {row.disk_mb} MiB"
                return fail("out_of_disk", why, "snapshot_failed", snapshot_id=row.snapshot_id)
            image, prefer, learnt = origin.image_id, list(origins().holders(row.snapshot_id)), {"source_bytes": size}
        hosts = placement.choose(*row.size, row.architecture, image, prefer=prefer, limit=1)
        if not hosts:
            return Wait(PLACE_AGAIN_SECONDS)
        host_id, image = hosts[0]
        return Next(
            states.PREPARE_DISK,
            {
                **learnt,
                "host_id": host_id,
                "image_id": image,
                "reserved": True,
                "compute_reserved": True,
                "placed_at": DatabaseNow(),
            },
            also=lambda cursor: placement.reserve(cursor, host_id, *row.size),
        )

    def prepare_disk(self, row: DevboxRow) -> Outcome:
        """Have its disk made; or a warm box claimed for it, which is up and only wants its limits."""
        if row.snapshot_id is not None and not origins().fetch(row.snapshot_id, row.host.host_id):
            # Its host bounds how long that may take, and says so.
            return Wait(ORIGIN_AGAIN_SECONDS, {"deadline_at": DatabaseNow(states.seconds_for(row.step) or 0)})
        reply = row.host.prepare_disk(
            box=row.id, fence=row.fence, image=row.image_id, disk_bytes=row.disk_bytes, snapshot=row.snapshot_id
        )
        learnt: dict[str, object] = {"slot": reply["slot"], "disk_at": DatabaseNow()}
        return self.boot(row, learnt) if reply["warm"] else Next(states.BOOT, learnt)

    def boot(self, row: DevboxRow, prepared: Mapping[str, object] | None = None) -> Outcome:
        """Have its box started. `prepared` is what the same go has learnt already."""
        reply = row.host.boot(
            box=row.id,
            fence=row.fence,
            cpu_millis=row.cpu_millis,
            memory_bytes=row.memory_mb * MIB,
            pids=PIDS,
            disk_bytes=row.disk_bytes,
            hostname=row.id.replace("_", "-"),
        )
        learnt = {"slot": reply["slot"], "address": reply["address"], "seen": "up", "seen_at": DatabaseNow()}
        learnt |= {"booted_at": DatabaseNow(), "host_clock_at_start": reply.get("monotonic")}
        if not row.machine_id:
            learnt["machine_id"] = reply.get("machine_id") or ""
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
        host, index, entries = row.host, row.launch_index, list[logs.Entry]()
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
                learnt = {"launch_index": index, "launch_items": [*items, launch_logs.item(piece, state)]}
                return Wait(LAUNCH_LOOK_SECONDS, learnt, also=launch_logs.writing(row.id, entries))
            items.append(launch_logs.item(piece, state))
            if not piece.awaited:
                entries.append(logs.Entry(piece.source, piece.id, cmd=piece.title))
                index += 1
                continue
            ended = launch_logs.ended(host, row.id, piece, state)
            entries += ended.entries
            if ended.failure is not None:
                reason, why, evidence = ended.failure
                why = f"launch work {index + 1} of {len(work)} ({launch_logs.short(piece.title)}) {why}"
                failure = fail(reason, why, "launch_failed", item=index, title=items[-1]["title"], **evidence)
                learnt = {**failure.learnt, "launch_index": index, "launch_items": items}
                return Next(failure.step, learnt, also=launch_logs.writing(row.id, entries))
            index += 1
            if datetime.now() - began > LAUNCH_SLICE and index < len(work):
                learnt = {"launch_index": index, "launch_items": items}
                return Next(states.LAUNCH, learnt, also=launch_logs.writing(row.id, entries))
        return self._start(row, index, entries, items)

    def _start(self, row: DevboxRow, index: int, entries: Sequence[logs.Entry], items: list[dict[str, Any]]) -> Wait:
        learnt: dict[str, object] = {
            "launch_index": index,
            "launch_items": items,
            "started_at": DatabaseNow(),
            "last_activity_at": DatabaseNow(),
            "end_at": DatabaseNow(row.keep_alive_seconds) if row.idle_seconds is None else None,
            "clock_offset": None,
        }
        if row.save_id:
            saves.drop(row.save_id)
            learnt |= {"save_id": "", "stored_at": None}
        if row.launch_total:  # else it was told with the boot, a moment ago
            learnt["host_clock_at_start"] = row.host.hello()["monotonic"]
        also = launch_logs.writing(row.id, entries) if entries else None
        return Wait(clocks.first_look(row), learnt, also=also, step=states.RUNNING)

    def teardown(self, row: DevboxRow) -> Outcome:
        """Take its box apart after it was shut down."""
        return self._take_apart(row, states.GONE, row.shutdown_reason or "shutdown")

    def clean_up(self, row: DevboxRow) -> Outcome:
        """Take its box apart after it failed."""
        return self._take_apart(row, states.FAILED, row.failure_reason or "failure")

    def _take_apart(self, row: DevboxRow, end: str, reason: str) -> Outcome:
        # 1. Let the other rooms bring home what they need from the host, 60 s at most, and what the entrypoint wrote.
        # 2. Have the box destroyed; of one that was lost while it ran, or that failed when it was resumed, the host
        #    keeps the disk for a day. A host that is lost itself is not waited for: reconcile destroys the box, should
        #    it return.
        # 3. Let the other rooms close what hung on it. 4. Take the promise back, with the end itself.
        if row.host_id is None:
            registry.after_destroy(row.id, reason)
            return Done(step=end)
        if row.now - row.step_since < BEFORE_DESTROY and not registry.before_destroy(row.id):
            return Wait(BEFORE_DESTROY_AGAIN_SECONDS)
        launch_logs.keep_entrypoint(row)
        launch_logs.keep_late(row)
        try:
            row.host.destroy(box=row.id, fence=row.fence, keep_disk=_is_lost(row))
        except HostUnreachable:
            if not host_is_lost(row.host_id):
                raise
        registry.after_destroy(row.id, reason)
        saves.drop(row.save_id)
        return Done({"reserved": False, "seen": "gone", "seen_at": DatabaseNow()}, also=_release(row), step=end)


def _is_lost(row: DevboxRow) -> bool:
    if row.failure_reason is None or row.started_at is None:
        return False
    return row.failure_reason == "health_check_failed" or row.starts > 0


def _release(row: DevboxRow) -> Callable[[Any], bool] | None:
    if not row.reserved or row.host_id is None:
        return None
    host_id = row.host_id
    size = row.size if row.compute_reserved else (0, 0, row.disk_mb)

    def release(cursor: Any) -> bool:
        placement.release(cursor, host_id, *size)
        return True

    return release


devbox_flow = DevboxFlow()
