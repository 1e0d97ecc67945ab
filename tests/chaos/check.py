"""What must be true after a run, command by command and for the whole installation; everything that is not is a
finding.

In charge of judging. Not in charge of collecting what explains a finding (`evidence`).
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.chaos.drive import STREAMS, Command, Run
from tests.chaos.site import everybody, tcp

#: Resident MiB that no long-lived process may pass, by the beginning of its name.
#: A web process may hold four answers of 16 MiB at once, each several times over while it is made.
MEMORY_MB = {"web": 450, "worker": 320, "watcher": 250, "beat": 200, "hostd": 120, "keeper": 64, "redis": 300}
NEAR_SECONDS = 12.0
"""A command that was being started, or input that was being written, so near to a blow at its box may be lost."""
SETTLED_WITHIN = 60.0
OUTAGE_MOST = 30.0
_ENDED = re.compile(r"^\[ *[\d.]+ s\] (\S+) +ended with (.*) \(pid (\d+)\); again in ([\d.]+) s", re.MULTILINE)


async def torment(run: Run) -> None:
    """The run and all checks. What goes wrong with either is a finding too."""
    try:
        await run.run()
        await everything(run)
    except Exception as error:
        run.find(f"the run broke: {error!r}")
    finally:
        run.striker.undo()
        await run.caller.http.aclose()


async def everything(run: Run) -> None:
    """Close the devboxes, wait until all is at rest, and look at all there is."""
    await run.close_boxes()
    await _at_rest(run)
    await run.read_again()
    for command in run.commands:
        _command(run, command)
        _explained(run, command)
        _logged(run, command)
    await _listed(run)
    _boxes(run)
    await _nothing_left(run)
    _objects(run)
    await _channels(run)
    _memory(run)
    _supervised(run)
    for since, until in run.outages:
        # A web server that is hit again while it starts owes nothing for the time before.
        excused = max([since, *(at for at in run.striker.on_api if at < until)])
        if until - excused > OUTAGE_MOST:
            run.find(f"the API did not answer for {until - since:.1f} s, {until - excused:.1f} s of it for no reason")


# -- commands ----------------------------------------------------------------------------------------------------------


def _command(run: Run, command: Command) -> None:
    final, title = command.final, command.title
    if not command.id:
        return  # never begun: said already
    if final is None or final.get("status") != "completed":
        run.find(f"{title}: it has not completed: {str(final)[:200]}")
        return
    seen = command.answer
    if seen is not None and seen["exit_status"] != final["exit_status"]:
        run.find(f"{title}: its exit status was {seen['exit_status']} and is now {final['exit_status']}")
    if _lost(run, command, final):
        return
    for stream in STREAMS:
        _stream(run, command, stream, final, seen)
    status, whole = final["exit_status"], command.job.exit_status
    if command.killed:
        # It may have ended by itself before the kill came.
        if status not in (137, whole):
            run.find(f"{title}: killed, and its exit status is {status}: {final.get('why')}")
        elif status == 137 and whole != 137 and not final.get("why"):
            run.find(f"{title}: it was killed, and nothing says why it ended")
    elif command.job.ending == "hog" and "memory" not in str(final.get("why")):
        run.find(f"{title}: it took more memory than there is and ended with {status}: {final.get('why')}")
    elif status != whole:
        run.find(f"{title}: its exit status is {status} instead of {whole}: {final.get('why')}")


def _lost(run: Run, command: Command, final: dict[str, Any]) -> bool:
    """Whether it is called lost, which is the truth when its keeper or spawner was hit while it was being started."""
    if final["exit_status"] != -1:
        return False
    if not _hit(run, command.began, command.began + NEAR_SECONDS):
        run.find(f"{command.title}: it is called lost: {final.get('why')}")
    else:
        run.say(f"{command.title}: truthfully lost: {final.get('why')}")
    return True


def _after_a_loss(run: Run, command: Command) -> bool:
    """Whether an earlier command of its shell was lost: nobody can tell then what that has left in the shell."""
    return any(
        other.job.shell == command.job.shell != "" and other.box == command.box and other.job.place < command.job.place
        for other in run.commands
        if other.final is not None and other.final["exit_status"] == -1
    )


def _hit(run: Run, since: float, until: float) -> bool:
    return any(since - NEAR_SECONDS < at < until for at, _ in run.striker.on_boxes)


def _stream(run: Run, command: Command, stream: str, final: dict[str, Any], seen: dict[str, Any] | None) -> None:
    title = f"{command.title}: {stream}"
    stored = command.stored.get(stream)
    if stored is None:
        return  # said already
    text, size = stored
    if stream in command.live and command.live[stream] != stored:
        run.find(f"{title} was followed as {_differs(command.live[stream][0], text)} (live | stored)")
    for when, view in (("at once", seen), ("in the end", final)):
        if view is not None and not view.get(f"{stream}_truncated") and view[stream] != text:
            run.find(f"{title} was answered {when} as {_differs(view[stream], text)} (answer | stored)")
    if command.job.ending == "echo":
        if stream == "stdout":
            _echoed(run, command, text, title)
        return
    whole = command.job.output(stream)
    wanted = whole.decode(errors="replace")
    if stream == "stderr" and _after_a_loss(run, command):
        return
    if command.killed:
        if not wanted.startswith(text.rstrip("\ufffd")) and not text.startswith(wanted):
            run.find(f"{title} is {_differs(text, wanted)} (stored | written)")
    elif text != wanted or size != len(whole):
        run.find(f"{title} has {size} of {len(whole)} bytes: {_differs(text, wanted)} (stored | written)")


def _explained(run: Run, command: Command) -> None:
    """The account of it names the cause, and its phases are in order."""
    account, final = command.account, command.final
    if account is None or final is None:
        return
    cause = account["cause"] and account["cause"]["kind"]
    wanted: set[str | None] = {"exit_status"}
    match final["exit_status"]:
        case 0:
            wanted = {None}
        case -1:
            wanted = {"lost"}
        case 137 if command.job.ending == "hog":
            wanted = {"out_of_memory"}
        case 137 if command.killed:
            wanted = {"kill_requested", "devbox_ended", "devbox_suspended"}
        case _ if command.job.ending == "signal":
            wanted = {"signal"}
    if cause not in wanted:
        run.find(f"{command.title}: its account names {cause} as the cause of {final['exit_status']}, not {wanted}")
    times = {phase["phase"]: phase["at_ms"] for phase in account["phases"]}
    order = [times[name] for name in ("queued", "spawned", "exited") if name in times]
    if not {"queued", "exited"} <= times.keys() or order != sorted(order):
        run.find(f"{command.title}: its phases are {account['phases']}")


def _logged(run: Run, command: Command) -> None:
    """Its logs have the lines of each stream once and in order, after the command and before its exit code."""
    logs, final = command.logs, command.final
    if logs is None or final is None or final["exit_status"] == -1:
        return
    for stream, level in (("stdout", "info"), ("stderr", "error")):
        text = command.stored.get(stream, ("", 0))[0]
        told = [
            entry["message"]
            for entry in logs
            if entry["level"] == level and "exit_code" not in entry and "message" in entry
        ]
        if told != text.splitlines():
            run.find(f"{command.title}: {stream} in the logs is {_differs(chr(10).join(told), text)} (logs | stored)")
    codes = [entry["exit_code"] for entry in logs if "exit_code" in entry]
    if codes != [final["exit_status"]] or "exit_code" not in logs[-1] or "cmd" not in logs[0]:
        run.find(f"{command.title}: its logs begin with {str(logs[0])[:150]} and end with {str(logs[-1])[:150]}")


async def _listed(run: Run) -> None:
    """Every execution is in the list of its devbox, once."""
    for box in sorted(run.every_box):
        listed = Counter(await run.listed(box))
        wrong = {
            command.id for command in run.commands if command.box == box and command.id and listed[command.id] != 1
        }
        wrong |= {id for id, times in listed.items() if times != 1}
        if wrong:
            run.find(f"the list of devbox {box} has these not exactly once: {sorted(wrong)[:10]}")


def _echoed(run: Run, command: Command, text: str, title: str) -> None:
    """Every line that was taken is there once and in order; one that was not may be there where a keeper died."""
    lines = iter(text.splitlines())
    line = next(lines, None)
    for given, taken in command.given:
        if line == f"{command.job.name} o {given}".rstrip("\n"):
            line = next(lines, None)
        elif taken and not command.killed:
            run.find(f"{title}: {given!r} was taken and is not there: {text[-200:]!r}")
            return
        if not taken and not _hit(run, command.began, command.ended):
            run.find(f"{title}: {given!r} was not taken")
    if line is not None:
        run.find(f"{title}: {line!r} was not given, or comes again")


def _differs(one: str, other: str) -> str:
    """Where two texts part, with what is around it."""
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    cut = slice(max(0, at - 30), at + 50)
    return f"{len(one)} | {len(other)} characters, parting at {at}: {one[cut]!r} | {other[cut]!r}"


# -- the installation --------------------------------------------------------------------------------------------------


async def _until(look: Callable[[], object], within: float = SETTLED_WITHIN) -> object:
    """What is still odd after a while; falsy when nothing is."""
    deadline = time.monotonic() + within
    while True:
        try:
            odd = await asyncio.to_thread(look)
        except Exception as error:
            odd = repr(error)
        if not odd or time.monotonic() > deadline:
            return odd
        await asyncio.sleep(0.5)


async def _at_rest(run: Run) -> None:
    """Every row of the run has come to its end, and nobody holds one."""
    ids = list(run.every_box)

    def open_rows() -> object:
        boxes = run.site.rows(
            "SELECT id, status, step, error_detail FROM devboxes_devbox"
            " WHERE id = ANY(%s) AND (completed_at IS NULL OR lease IS NOT NULL OR wake_at IS NOT NULL)",
            ids,
        )
        return boxes + run.site.rows(
            "SELECT id, devbox_id, status, step, error_detail FROM executions_execution WHERE devbox_id = ANY(%s)"
            " AND (completed_at IS NULL OR lease IS NOT NULL OR wake_at IS NOT NULL OR step <> 'done')",
            ids,
        )

    odd = await _until(open_rows)
    if odd:
        run.find(f"not at rest {SETTLED_WITHIN:g} s after everything was over: {str(odd)[:1500]}")


def _boxes(run: Run) -> None:
    rows = run.site.rows(
        "SELECT id, status, shutdown_reason, failure_reason FROM devboxes_devbox WHERE id = ANY(%s)",
        list(run.every_box),
    )
    for missing in run.every_box - {row[0] for row in rows}:
        run.find(f"devbox {missing} was acknowledged and has no row")
    for box, status, shutdown_reason, failure_reason in rows:
        if status != "shutdown" or shutdown_reason != "api_shutdown":
            run.find(f"devbox {box} ended as {status}, {shutdown_reason or failure_reason}")
    twice = run.site.rows(
        "SELECT name, count(*) FROM devboxes_devbox WHERE name LIKE 'steady-%%' OR name LIKE 'passing-%%'"
        " GROUP BY name HAVING count(*) > 1"
    )
    if twice:
        run.find(f"a create that was asked for once was done more often: {twice}")


async def _nothing_left(run: Run) -> None:
    if odd := await _until(run.site.strangers):
        run.find(f"left on the host: {odd}")


def _objects(run: Run) -> None:
    rows = run.site.rows(
        "SELECT devbox_id, id, out_size - out_dropped, err_size - err_dropped FROM executions_execution"
        " WHERE kept = 'store'"
    )
    wanted = {f"executions/{box}/{id}/stdout": out for box, id, out, _ in rows if out}
    wanted |= {f"executions/{box}/{id}/stderr": err for box, id, _, err in rows if err}
    found = run.site.objects()
    run.say(f"{len(found)} objects with {sum(found.values()) >> 20} MiB in S3")
    if found != wanted:
        odd = {key: (found.get(key), wanted.get(key)) for key in found | wanted if found.get(key) != wanted.get(key)}
        run.find(f"objects in S3 and rows that name them differ (stored, wanted): {str(odd)[:1000]}")


async def _channels(run: Run) -> None:
    """Every SSH connection belongs to a role that lives, and few channels are open."""
    site = run.site

    def orphans() -> object:
        mine, clients = set(), set()
        for local, remote, inode, state in tcp():
            if state == "01" and local == site.ssh_port:
                mine.add((remote, inode))
            elif state == "01" and remote == site.ssh_port:
                clients.add(local)
        return [pair for pair in mine if pair[0] not in clients]

    def strays() -> object:
        """Roles of this installation that the supervisor does not know (any more)."""
        known = set(site.roles().values())
        mark = f"BERTH_STATE={site.state.path}\0".encode()
        found = []
        for pid, name, _ in everybody():
            try:
                with open(f"/proc/{pid}/environ", "rb") as file:
                    ours = mark in file.read()
                with open(f"/proc/{pid}/stat") as file:
                    parent = int(file.read().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
            if ours and pid not in known and parent not in known and _adopted(parent):
                found.append((pid, name))
        return found

    if odd := await _until(orphans, 30):
        run.find(f"SSH connections that nobody has any more: {odd}")
    if odd := await _until(strays, 5):
        run.find(f"processes that nobody looks after: {odd}")


def _adopted(parent: int) -> bool:
    """Whether this parent is one that gets orphans."""
    if parent == 1:
        return True
    try:
        with open(f"/proc/{parent}/comm") as file:
            return file.read().strip() in ("init", "systemd", "tini", "catatonit", "containerd-shim", "dumb-init")
    except OSError:
        return True


def _memory(run: Run) -> None:
    for name, sample in sorted(run.memory.items()):
        for start, limit in MEMORY_MB.items():
            if name.startswith(start) and sample.most > limit:
                run.find(f"{name} had {sample.most:.0f} MiB, the limit is {limit}")


def _supervised(run: Run) -> None:
    """Nothing ended by itself, and nothing is down."""
    ends = [(name, how, int(pid), float(pause)) for name, how, pid, pause in _ENDED.findall(run.site.said())]
    run.say(
        f"the supervisor started {len(ends)} again; its longest pause was {max((e[3] for e in ends), default=0):g} s"
    )
    for name, how, pid, _ in ends:
        # PostgreSQL refuses to start while processes of the one that was killed are still there, and is tried again.
        if pid not in run.striker.struck and name != "postgres":
            run.find(f"{name} (pid {pid}) ended by itself with {how}")
    missing = {"web", "worker", "beat", "watcher", "ssh"} - run.site.roles().keys()
    if missing:
        run.find(f"not running in the end: {', '.join(sorted(missing))}")
