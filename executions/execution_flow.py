"""The life of a command, step by step.

    await_turn -> spawn                        in a named shell: every command before it in the line has to end first

    spawn ----> await_exit ----> done          the usual way; the end is mostly written by `services.finish_executions`,
      |             |  |                       which hears of it from the watcher and beats the step to it
      |             |  +-------> store -> forget -> done    outputs too large for the row are copied from the host to
      |             |                              S3; once that is written down, the host may delete them
      +--> kill <---+                          somebody wants it stopped

In charge of what is asked of the host and what its answers mean. Not in charge of rows being made (`services`), or of
anything a client sees. A stop that is wanted diverts from spawn and await_exit to kill, which asks again until the
command is gone. A host that does not answer is waited for; the host's own reconcile decides when it is lost.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from django.conf import settings

from devboxes import selectors as devboxes
from devboxes.models import Devbox
from executions import shells
from executions.copying import Copy, Source, copy_some
from executions.endings import DEVBOX_SUSPENDED, stopped_reason
from executions.environment import spawn_body
from executions.models import Execution, Kept, Status
from executions.outputs import output_key
from flows.engine import Flow, Row, holder
from flows.outcomes import DatabaseNow, Done, Next, Outcome, Superseded, Wait
from hostd.messages import CAP_MAX, CAP_MIN, RETRYABLE, StateReply
from hosts.client import HostRefused, StaleFence, client_for, index_records, outputs
from hosts.delivery import notes, told

SPAWN_HOLD_MS: Final = 25
"""How long the host may keep the answer to spawn back for a command that ends at once: its exit then comes with it."""
LOOK_AGAIN_SECONDS: Final = 120.0
"""How often a running command is asked for although its host reports ends by itself."""
KILL_AGAIN_SECONDS: Final = 2.0
BOX_GONE_TRIES: Final = 4
STORE_SECONDS: Final = 3.0
"""How long one go of `store` may copy before it writes down how far it came."""
STORE_WITHIN_SECONDS: Final = 86_400.0
"""How long storing may take altogether, S3's absences included; the output is then gone."""

FORGET_WITHIN_SECONDS: Final = 3600.0
"""How long a host is asked to delete an output that is stored; it keeps within a budget of its own besides."""

START_WITHIN_SECONDS: Final = 900
"""A command that no host could be asked to start for this long is given up. Waiting for its turn does not count."""
TURN_AGAIN_SECONDS: Final = 15.0
"""How often the next in the line of a shell looks whether it is its turn, in case who ended the one before it died
before he could wake it."""

SIGKILL: Final = 9

_NO_OUTPUT: Final[Mapping[str, object]] = {"kept": Kept.ROW, "stdout": b"", "stderr": b""}
"""What was never started, as far as anybody was told, has written nothing, so nothing of it is lost."""


@dataclass(slots=True, kw_only=True)
class ExecutionRow(Row):
    """What the steps want to know of an execution."""

    devbox_id: str
    host_id: str
    command: str
    attach_stdin: bool
    shell_name: str | None
    shell_place: int | None
    user_name: str
    user_uid: int
    user_home: str
    stop_why: str | None
    stop_group: bool
    completed_at: datetime | None
    out_size: int
    err_size: int
    out_dropped: int
    err_dropped: int
    upload: dict[str, Any] | None
    error_detail: str | None


def _placed(row: ExecutionRow) -> dict[str, object]:
    if row.step != "spawn":
        return {}
    worker, taken_at = holder(row.lease)
    return {"worker": worker, "placed_at": taken_at}


def at(milliseconds: int | None) -> datetime | None:
    """A host's time stamp as a datetime."""
    return None if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC)


class ExecutionFlow(Flow[ExecutionRow]):
    """See the module's docstring."""

    model = Execution
    queue = "executions"
    row = ExecutionRow

    def __init__(self) -> None:
        self.steps: Mapping[str, Callable[[ExecutionRow], Outcome]] = {
            "await_turn": self.await_turn,
            "withdraw": self.withdraw,
            "spawn": self.spawn,
            "await_exit": self.await_exit,
            "kill": self.kill,
            "store": self.store,
            "forget": self.forget,
        }

    def divert(self, row: ExecutionRow) -> str | None:
        """A stop that is wanted comes before everything but storing what there is."""
        if row.stop_why is not None and row.step == "await_turn":
            return "withdraw"
        return "kill" if row.stop_why is not None and row.step in ("spawn", "await_exit") else None

    def expired(self, row: ExecutionRow) -> Outcome | None:
        """What has a deadline: starting, after which nobody ever starts it (the host's reconcile stops a stray one),
        and storing the output, which goes on as long as the host may be expected to have it."""
        if row.step == "kill":
            return self._ended(row, 128 + SIGKILL, {"kind": "killed_before_start"})
        if row.step == "spawn":
            why = f"it could not be started in time: {row.error_detail or 'its host did not answer'}"
            return self._lost(why, _NO_OUTPUT)
        if row.step == "forget":
            return self._forgotten(row)
        return self._gone(row) if row.step == "store" else None

    def on_exception(self, row: ExecutionRow, error: Exception) -> Outcome | None:
        """What a refusal of the host means for the command; None: try again."""
        if isinstance(error, StaleFence):
            # Somebody newer spoke for this row: whatever is true, they know it.
            raise Superseded(row.id) from error
        if not isinstance(error, HostRefused):
            return None
        if row.step == "store":
            return self._gone(row) if error.code in ("unknown_box", "unknown_id") else None
        if row.step == "forget":
            return None if error.code in RETRYABLE else self._forgotten(row)
        match error.code:
            case "unknown_id" | "lost":
                return self._lost(error.message)
            case "bad_request" | "too_large":
                return self._ended(row, -1, {"kind": "exec_failed", "detail": error.message})
            case "unknown_box":
                return self._without_box(row)
        return None

    def _without_box(self, row: ExecutionRow) -> Outcome | None:
        """The host has no such box: believed at once when the devbox is over, else only after it said so repeatedly."""
        status = Devbox.objects.values_list("status", flat=True).get(pk=row.devbox_id)
        if status in ("shutdown", "suspending", "suspended"):
            # Closed here, too, because the row may have been made just after the devbox closed its others.
            gone = {} if row.step == "spawn" else {"kept": Kept.NOWHERE}
            kind = "devbox_ended" if status == "shutdown" else DEVBOX_SUSPENDED
            return self._ended(row, 128 + SIGKILL, {"kind": kind}, gone)
        if status == "running" and row.attempts < BOX_GONE_TRIES:
            return None
        return self._lost("its devbox was gone", _NO_OUTPUT if row.step == "spawn" else {})

    def settle(self, row: ExecutionRow, outcome: Outcome) -> None:
        """Besides, the end of a command in a shell is the turn of the next one."""
        super().settle(row, outcome)
        if row.shell_name is not None and outcome.learnt.get("status") == Status.COMPLETED:
            self.wake(*shells.next_in([(row.devbox_id, row.shell_name)]))

    # The steps.

    def await_turn(self, row: ExecutionRow) -> Outcome:
        """Sleep until every command before it in its shell has ended; the last one's end wakes it."""
        assert row.shell_name is not None and row.shell_place is not None
        ahead = shells.ahead(row.devbox_id, row.shell_name, row.shell_place)
        if ahead == 0:
            return Next("spawn", {"deadline_at": DatabaseNow(START_WITHIN_SECONDS)})
        pause = TURN_AGAIN_SECONDS if ahead == 1 else LOOK_AGAIN_SECONDS
        pause *= random.uniform(0.75, 1.25)  # noqa: S311
        return Wait(pause, {}, step="await_turn")

    def withdraw(self, row: ExecutionRow) -> Outcome:
        """Stopped before its turn: no host has ever heard of it."""
        return self._ended(row, 128 + SIGKILL, {"kind": "killed_before_start"}, _NO_OUTPUT)

    def spawn(self, row: ExecutionRow) -> Outcome:
        """Start it. A spawn of an id that the box knows answers with its state and starts nothing."""
        body = spawn_body(
            command=row.command,
            user_name=row.user_name,
            user_uid=row.user_uid,
            user_home=row.user_home,
            devbox_id=row.devbox_id,
            variables=devboxes.environment(row.devbox_id),
            attach_stdin=row.attach_stdin,
            shell_name=row.shell_name,
        )
        reply = client_for(row.host_id).spawn(
            box=row.devbox_id,
            id=row.id,
            fence=row.fence,
            body=body,
            hold_ms=SPAWN_HOLD_MS,
            cap=min(max(settings.BERTH.OUTPUT_CAP, CAP_MIN), CAP_MAX),
        )
        return self._after(row, reply)

    def await_exit(self, row: ExecutionRow) -> Outcome:
        """Look whether it has ended, in case nobody told."""
        return self._after(row, client_for(row.host_id).state(box=row.devbox_id, id=row.id))

    def kill(self, row: ExecutionRow) -> Outcome:
        """Stop it; one that was never started never will be. Asked again until it is gone."""
        reply = client_for(row.host_id).kill(
            box=row.devbox_id, id=row.id, fence=row.fence, signal=SIGKILL, group=row.stop_group
        )
        if reply["state"] == "exited":
            return self._exited(row, reply)
        # Seen running: waiters for that may know, though it will not last.
        return Wait(KILL_AGAIN_SECONDS, self._running(row, reply), step="kill")

    def store(self, row: ExecutionRow) -> Outcome:
        """Copy the outputs to S3, part by part, for a few seconds; then write down how far that came and go on.

        The box's files do not change any more, so a part that is copied twice is the same part.
        """
        progress: dict[str, Copy] = dict(row.upload or {})
        until = time.monotonic() + STORE_SECONDS
        for stream, size, dropped in (
            ("stdout", row.out_size, row.out_dropped),
            ("stderr", row.err_size, row.err_dropped),
        ):
            if size > dropped and not progress.get(stream, {}).get("done"):
                key = output_key(row.devbox_id, row.id, stream)
                source = Source(row, stream, size, dropped)
                progress[stream] = copy_some(source, key, progress.get(stream, {}), until)
                if not progress[stream].get("done"):
                    return Next("store", {"upload": progress})
        return Next(
            "forget",
            {
                "kept": Kept.STORE,
                "output_index": _index(row),
                "out_hole": progress.get("stdout", {}).get("hole"),
                "err_hole": progress.get("stderr", {}).get("hole"),
                "upload": None,
                "stored_at": DatabaseNow(),
                "deadline_at": DatabaseNow(FORGET_WITHIN_SECONDS),
                # Said again so that this settle is committed for sure before the host deletes what it speaks of.
                "completed_at": row.completed_at,
            },
        )

    def forget(self, row: ExecutionRow) -> Outcome:
        """Let the host delete the outputs that are stored. Followers go on with the stored ones."""
        client_for(row.host_id).forget(box=row.devbox_id, id=row.id, fence=row.fence)
        return self._forgotten(row)

    # What the host's answers mean.

    def _after(self, row: ExecutionRow, reply: StateReply) -> Outcome:
        if reply["state"] == "exited":
            return self._exited(row, reply)
        pause = LOOK_AGAIN_SECONDS * random.uniform(0.75, 1.25)  # noqa: S311
        return Wait(pause, self._running(row, reply), step="await_exit")

    def _running(self, row: ExecutionRow, reply: StateReply) -> dict[str, object]:
        columns = {"status": Status.RUNNING, "started_at": at(reply.get("started_at_ms")), "deadline_at": None}
        return columns | _placed(row)

    def _exited(self, row: ExecutionRow, reply: StateReply) -> Outcome:
        found = outputs(reply)
        out_size, err_size = reply["sizes"]
        out_dropped, err_dropped = reply.get("dropped") or (0, 0)
        learnt: dict[str, object] = {
            "out_size": out_size,
            "err_size": err_size,
            "out_dropped": out_dropped,
            "err_dropped": err_dropped,
            "started_at": at(reply.get("started_at_ms")),
            "exited_at": at(reply.get("exited_at_ms")),
            "first_byte_at": at(reply.get("first_byte_at_ms")),
            **_placed(row),
        }
        if found is not None:
            learnt |= {"kept": Kept.ROW, "stdout": found[0], "stderr": found[1], "stored_at": DatabaseNow()}
            learnt["output_index"] = index_records(reply)
        said = notes(reply.get("notes"))
        return self._ended(row, reply.get("exit", -1), told(reply.get("reason")), learnt, said)

    def _ended(
        self,
        row: ExecutionRow,
        exit_status: int,
        reason: Mapping[str, object] | None,
        learnt: Mapping[str, object] | None = None,
        said: Sequence[str] = (),
    ) -> Outcome:
        also = _noting(row, said) if said else None
        columns: dict[str, object] = {
            "status": Status.COMPLETED,
            "exit_status": exit_status,
            "reason": stopped_reason(row.stop_why, exit_status, reason),
            "deadline_at": None,
            **(learnt or {}),
        }
        if columns.get("kept", Kept.HOST) == Kept.HOST:
            if columns.get("out_size") or columns.get("err_size"):
                return Next(
                    "store",
                    {**columns, "completed_at": DatabaseNow(), "deadline_at": DatabaseNow(STORE_WITHIN_SECONDS)},
                    also,
                )
            # Nothing was written, or nothing was ever started.
            columns |= _NO_OUTPUT
        return Done(columns, also)

    def _forgotten(self, row: ExecutionRow) -> Outcome:
        return Done({"deadline_at": None, "completed_at": row.completed_at})

    def _gone(self, row: ExecutionRow) -> Outcome:
        return Done({"kept": Kept.NOWHERE, "upload": None, "deadline_at": None, "completed_at": row.completed_at})

    def _lost(self, detail: str, learnt: Mapping[str, object] | None = None) -> Outcome:
        return Done(
            {
                "status": Status.COMPLETED,
                "exit_status": -1,
                "reason": {"kind": "lost", "detail": detail},
                "kept": Kept.NOWHERE,
                "deadline_at": None,
                **(learnt or {}),
            }
        )


def _noting(row: ExecutionRow, said: Sequence[str]) -> Callable[[Any], bool]:
    def write(cursor: Any) -> bool:
        shells.write_notes(cursor, row.devbox_id, row.id, row.shell_name or "", said)
        return True

    return write


def _index(row: ExecutionRow) -> bytes | None:
    try:
        return client_for(row.host_id).index(box=row.devbox_id, id=row.id).records
    except HostRefused as error:
        if error.code != "unknown_verb":  # a keeper that was made by an earlier release knows no times
            raise
        return None


execution_flow = ExecutionFlow()
