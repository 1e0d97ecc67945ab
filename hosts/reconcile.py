"""Comparing a host's whole report with the rows, and putting right what differs.

In charge of levels: events make it quick, this makes it true. `plan` is pure; `apply` acts through verbs that carry a
fence and through the owners' guarded writes (`hosts.registry`). Silence is never a reason to destroy anything: a plan
is made of a report, and what a report does not know (`executions: None`) says nothing.

The rows must be read before the report is asked for. Then a box that a row said was up, and a report does not have, is
gone; read the other way round, one that was booted in between would look so.

A row                          the report                    what follows
up and settled                 has no such box               lost, at once, with the reason
up and settled                 it is not up, twice in a row  lost (at once after a restart of the host)
asleep and settled             has no such disk              lost, at once, with the reason
running                        its box has no such command   lost, at once; with its box as above
none for the box               has it, twice in a row        destroyed, its disk kept for a day
none for the command           runs it, twice in a row       killed, if its owner says that it is over
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterable, Iterator, Sequence

from hostd.messages import ReportReply
from hosts import delivery, registry
from hosts.client import HostClient, HostRefused
from hosts.registry import BoxExitEvent, ExpectedBox, ExpectedExecution

log = logging.getLogger(__name__)

RESTARTED = "its host was restarted"
_DOWN = "down:"


@dataclasses.dataclass(frozen=True, slots=True)
class Corrections:
    """What differs. Ids are sorted, so the same situation gives the same plan."""

    lost_boxes: tuple[tuple[str, str], ...] = ()
    """(box, why)"""
    lost_executions: tuple[tuple[str, str, str], ...] = ()
    """(box, id, why)"""
    unknown_boxes: tuple[tuple[str, int], ...] = ()
    """(box, the fence the host has): in this report and in the one before, in no row."""
    unknown_executions: tuple[tuple[str, str], ...] = ()
    """(box, id): running in this report and in the one before, in no row that runs."""
    seen: frozenset[str] = frozenset()
    """What is odd in this report and asks for a second sight: what the next plan is given as `before`."""


def plan(
    expected: Iterable[ExpectedBox | ExpectedExecution],
    report: ReportReply,
    before: frozenset[str] = frozenset(),
    *,
    rebooted: bool = False,
) -> Corrections:
    """The corrections, from rows read before the report. `before`: `seen` of the previous plan."""
    boxes = {row.box: row for row in expected if isinstance(row, ExpectedBox)}
    running = {row.id: row for row in expected if isinstance(row, ExpectedExecution)}
    reported = {box["box"]: box for box in report["boxes"]}
    gone = RESTARTED if rebooted else "its host has it no more"

    # The end of a box and of its commands is an event that tells why (memory, an exit status); a report that is quicker
    # than the event must not take its place. Nobody tells of what a restart of the host ended.
    down = {box_id for box_id, box in reported.items() if box["state"] != "up"}
    surely_down = {box_id for box_id in down if rebooted or _DOWN + box_id in before}

    lost_boxes = []
    for box_id, row in sorted(boxes.items()):
        if row.up and row.settled:
            if box_id not in reported:  # its disk, too, is gone
                lost_boxes.append((box_id, "its host has it no more"))
            elif box_id in surely_down:
                lost_boxes.append((box_id, RESTARTED if rebooted else "it is not running on its host"))
        elif row.asleep and row.settled and box_id not in reported:
            lost_boxes.append((box_id, "its host does not have its disk any more"))

    lost_executions = []
    for id, execution in sorted(running.items()):
        box = reported.get(execution.box)
        if box is None or execution.box in surely_down:
            lost_executions.append((execution.box, id, gone))
        elif execution.box in down or box["executions"] is None:
            continue
        elif all(one["id"] != id for one in box["executions"]):
            lost_executions.append((execution.box, id, "its box does not know it"))

    unknown = {box_id for box_id in reported if box_id not in boxes}
    stray = {
        (box_id, one["id"])
        for box_id, box in reported.items()
        if box_id in boxes
        for one in box["executions"] or ()
        if one["state"] == "running" and one["id"] not in running
    }
    return Corrections(
        lost_boxes=tuple(lost_boxes),
        lost_executions=tuple(lost_executions),
        unknown_boxes=tuple(sorted((box_id, reported[box_id]["fence"]) for box_id in unknown & before)),
        unknown_executions=tuple(sorted(pair for pair in stray if pair[1] in before)),
        seen=frozenset(unknown | {id for _, id in stray} | {_DOWN + box_id for box_id in down & boxes.keys()}),
    )


def expected_on(host_id: str) -> list[ExpectedBox | ExpectedExecution]:
    """What every owner expects on that host now."""
    return [row for kind in registry.kinds().values() for row in kind.expected_on_host(host_id)]


def apply(client: HostClient, corrections: Corrections) -> None:
    """Make it so. Raises HostUnreachable; what was not done is found again by the next report."""
    host_id = client.host_id
    now = int(time.time() * 1000)
    # Those that start again after a restart of the host come before what ran in them: the end of an entrypoint, which
    # ends its devbox, is not an end of its own then.
    lost = [
        BoxExitEvent(host_id, box, None, False, now, lost=why, rebooted=why == RESTARTED)
        for box, why in corrections.lost_boxes
    ]
    delivery.deliver_box_exits(event for event in lost if event.rebooted)
    if corrections.lost_executions:
        log.warning("host %s: %d commands are lost", host_id, len(corrections.lost_executions))
        delivery.deliver_exits(delivery.lost_event(host_id, *command) for command in corrections.lost_executions)
    if corrections.lost_boxes:
        log.warning("host %s: lost boxes: %s", host_id, corrections.lost_boxes)
        delivery.deliver_box_exits(event for event in lost if not event.rebooted)
    for box, fence in corrections.unknown_boxes:
        log.error("host %s: %s is in no row: it is stopped, and its disk kept for a day", host_id, box)
        with _refusals_noted():
            client.destroy(box=box, fence=fence, keep_disk=True)
    over = _over(corrections.unknown_executions)
    for box, id in corrections.unknown_executions:
        if id in over:
            log.warning("host %s: %s in %s was given up and is killed", host_id, id, box)
            with _refusals_noted():
                client.kill(box=box, id=id, fence=over[id], signal=9)


def drop_superfluous(client: HostClient, report: ReportReply) -> None:
    """Have the host delete what it keeps of disks that nobody wants any more. Raises HostUnreachable."""
    kept = report.get("snapshots", [])
    for prefix, kind in registry.kinds().items():
        for id, fence in kind.superfluous(
            client.host_id, [one for one in kept if one["snapshot"].partition("_")[0] == prefix]
        ):
            log.warning("host %s: it is to delete its copy of %s, which nobody wants any more", client.host_id, id)
            with _refusals_noted():
                client.delete_snapshot(snapshot=id, fence=fence)


def _over(strays: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Those of the commands that are over, with a fence that is newer than any of their rows'."""
    over: dict[str, int] = {}
    for prefix, kind in registry.kinds().items():
        mine = [id for _, id in strays if id.partition("_")[0] == prefix]
        if mine:
            over.update(kind.over(mine))
    return over


@contextlib.contextmanager
def _refusals_noted() -> Iterator[None]:
    try:
        yield
    except HostRefused as error:
        log.warning("a correction was refused, the next report will tell: %s", error)


def declare_lost(host_id: str, why: str, since_ms: int | None = None) -> int:
    """All that was expected on a host is lost: it was silent for LOST_AFTER, since `since_ms`. Returns how many boxes
    and commands."""
    rows = expected_on(host_id)
    now = int(time.time() * 1000)
    executions = [row for row in rows if isinstance(row, ExpectedExecution)]
    boxes = [row for row in rows if isinstance(row, ExpectedBox) and row.up]
    delivery.deliver_exits(delivery.lost_event(host_id, row.box, row.id, why, since_ms) for row in executions)
    delivery.deliver_box_exits(
        BoxExitEvent(host_id, row.box, None, False, now, lost=why, silent_since_ms=since_ms) for row in boxes
    )
    return len(executions) + len(boxes)
