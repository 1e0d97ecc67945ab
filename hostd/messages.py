"""The protocol between the server side and a host, typed once and used by both ends.

In charge of: names and bounds of every verb, request, reply, event and error; encoding and strict parsing of lines and
frames. Not in charge of: sockets, waiting, what a verb does.

A connection carries one JSON request line and is answered by one JSON line::

    -> {"v": 1, "verb": "state", "box": "dbx_…", "id": "exe_…"}\\n
    <- {"ok": true, …}\\n            or   {"error": {"code": "unknown_id", "message": "…"}}\\n

Host verbs may follow one another on a kept connection. After a box verb the connection belongs to that box's keeper,
and further verbs for the same box may follow on it. A request with ``"body": N`` is followed by N raw bytes. A raw
answer is framed (`framing.py`): u32 big-endian length and bytes, repeated; a zero length; a JSON trailer line. An
answer that ends without its trailer was cut and must not be taken for complete. `watch` is answered by its ok line, and
then by one line per event for as long as the connection lasts; lines of acks go the other way.

The protocol only grows: unknown fields of a request or a reply are ignored, known ones are checked strictly.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal, NotRequired, TypedDict, cast

from hostd.checks import HOSTNAME as _HOSTNAME
from hostd.checks import REQUEST as _REQUEST
from hostd.checks import Check
from hostd.checks import flag as _flag
from hostd.checks import is_box_id as is_box_id
from hostd.checks import is_digest as is_digest
from hostd.checks import is_image_id as is_image_id
from hostd.checks import is_work_id as is_work_id
from hostd.checks import matches as _matches
from hostd.checks import one_of as _one_of
from hostd.checks import whole as _whole
from hostd.framing import FRAMES_END as FRAMES_END
from hostd.framing import FrameParser as FrameParser
from hostd.framing import ProtocolError as ProtocolError
from hostd.framing import frame as frame
from hostd.framing import parse_object as parse_object
from hostd.snapshot_messages import VERBS as SNAPSHOT_VERBS
from hostd.snapshot_messages import ReceiveReply as ReceiveReply
from hostd.snapshot_messages import ReportedSnapshot as ReportedSnapshot
from hostd.snapshot_messages import SendReply as SendReply
from hostd.snapshot_messages import SnapshotReply as SnapshotReply

PROTOCOL: Final = 1

# Bounds, in bytes unless the name says otherwise. Both sides refuse what is larger.
LINE_MAX: Final = 64 * 1024  # a request line, with its newline
REPLY_MAX: Final = 16 * 1024 * 1024  # a reply or event line; `report` of a full host is the largest
READ_MAX: Final = 16 * 1024 * 1024  # one `read`
SPAWN_BODY_MAX: Final = 4 * 1024 * 1024  # command (1 MiB), environment and input
STDIN_BODY_MAX: Final = 1024 * 1024
SHIP_BODY_MAX: Final = 16 * 1024 * 1024
CAP_MIN: Final = 64 * 1024  # the least and the most that may be kept of one stream of a command
CAP_MAX: Final = 2**40
INDEX_MAX: Final = 64 * 1024 + 256  # the records of one command
INLINE_MAX: Final = 64 * 1024  # outputs up to this size together travel inside the exit event
ACKS_MAX: Final = 500  # pairs in one ack line; keeps the line below LINE_MAX
IDS_MAX: Final = 500

# Clocks, in seconds.
HEARTBEAT_SECONDS: Final = 2.0
IDLE_SECONDS: Final = 10.0  # a fresh connection must send its line within this time
KEPT_SECONDS: Final = 90.0  # a kept connection may be idle between two lines for this long
TOMBSTONE_SECONDS: Final = 24 * 3600
HOLD_MS_MAX: Final = 4000  # the longest time a spawn's reply may be held for an early exit

BOX_EXIT_ID: Final = "box"  # a box_exit event is acknowledged as [box, "box"]

BOX_VERBS: Final = frozenset(
    {
        "spawn",
        "state",
        "kill",
        "ack",
        "forget",
        "follow",
        "read",
        "stdin",
        "list",
        "index",
        "sizes",
        "activity",
        "changes",
        "file",
        "run",
        "terminal",
        "dial",
    }
)

ErrorCode = Literal[
    "stale_fence",  # a newer request for this id was served; extra: fence
    "unknown_box",
    "unknown_id",
    "unknown_image",
    "unknown_verb",
    "bad_request",
    "too_large",
    "busy",  # a bound on work at once was hit: try again
    "not_ready",  # the host or the box is still starting: try again
    "no_space",  # the pool is full
    "no_slot",  # all box numbers of the host are taken
    "lost",  # it cannot be proven what became of the request's effect
    "internal",
    "attached",  # the terminal has a client
    "storage",  # S3 did not take or give what was asked; extra: kind, as in hostd/snapshot_messages.py
    "refused",  # nothing listens on that port of the box
    # What a file in a box can have against being read or written:
    "no_such_file",
    "not_a_file",  # a directory, a FIFO, a device
    "bad_path",
    "denied",  # to the box's user
    "not_text",
    "box_io",
]
ERROR_CODES: Final[frozenset[str]] = frozenset(ErrorCode.__args__)  # type: ignore[attr-defined]
RETRYABLE: Final = frozenset({"busy", "not_ready"})


class Refused(Exception):
    """An answer that says no. ``code`` is one of :data:`ERROR_CODES`; ``extra`` holds the code's further fields."""

    def __init__(self, code: str, message: str, **extra: Any) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.extra = extra


# --- what travels ---------------------------------------------------------------------------------------------------

ExecutionState = Literal["running", "exited"]
BoxState = Literal["disk", "up", "down", "asleep"]  # asleep: suspended, there is only its disk
ReasonKind = Literal["oom", "killed", "signal", "lost", "exec_failed", "killed_before_start"]
Stream = Literal["stdout", "stderr"]
LateStream = Literal["late_stdout", "late_stderr"]  # what came after the exit; only its last 1 MiB is kept


class Reason(TypedDict):
    """Why an execution ended as it did, when the exit status alone does not tell."""

    kind: ReasonKind
    detail: NotRequired[str]
    signal: NotRequired[int]  # that ended it, of kinds killed and signal
    kills: NotRequired[int]  # of kind oom: processes of the box that were killed while it ran
    limit_bytes: NotRequired[int]  # of kind oom, as the kernel told them at the exit: the box's memory
    usage_bytes: NotRequired[int]
    peak_bytes: NotRequired[int]


class HelloReply(TypedDict):
    protocol: int
    digest: str  # sha256 of the running bundle; "" when run from a source tree
    cluster: str
    host: str
    install: int
    boot_id: str
    monotonic: float  # seconds
    cpus: int
    memory_bytes: int
    memory_free_bytes: int
    pool_bytes: int
    pool_free_bytes: int
    images: list[str]
    boxes: int
    warm: int
    kernel: str
    cgroup: Literal["v1", "v2"]


class ReportedExecution(TypedDict):
    id: str
    state: ExecutionState


class ReportedBox(TypedDict):
    """One box of a report. ``executions`` is None when its keeper could not be asked just now: that says nothing about
    them, and must never be taken for their absence."""

    box: str
    slot: str
    fence: int
    state: BoxState
    image: str
    executions: list[ReportedExecution] | None


class ReportedWarm(TypedDict):
    slot: str
    image: str


class ReportReply(TypedDict):
    boxes: list[ReportedBox]
    warm: list[ReportedWarm]
    snapshots: NotRequired[list[ReportedSnapshot]]
    at_ms: int


class PrepareDiskReply(TypedDict):
    slot: str
    warm: bool


class BootReply(TypedDict):
    slot: str
    address: str
    init_pid: int
    keeper_pid: int
    booted_at_ms: int
    monotonic: float  # seconds, when this was answered
    machine_id: NotRequired[str]


class User(TypedDict):
    name: str
    uid: int
    gid: int
    home: str


class SpawnBody(TypedDict):
    """The JSON body of ``spawn``. Exactly one of ``command`` and ``argv``."""

    command: NotRequired[str]  # run as `bash -lc`
    argv: NotRequired[list[str]]
    env: dict[str, str]
    cwd: str
    user: User
    stdin: Literal["none", "pipe"]
    input: NotRequired[str]  # base64; fed to stdin, then closed
    login: NotRequired[bool]
    shell: NotRequired[str]  # the name of the shell that runs it; it takes one command at a time, else `busy`
    limits: NotRequired[dict[str, int]]


class StateReply(TypedDict):
    """The answer to ``spawn``, ``state`` and ``kill``. ``stdout`` and ``stderr`` are base64, both or none."""

    id: str
    state: ExecutionState
    sizes: list[int]
    started_at_ms: NotRequired[int]
    first_byte_at_ms: NotRequired[int]
    pid: NotRequired[int]
    notes: NotRequired[list[str]]  # what happened to its shell
    exit: NotRequired[int]
    reason: NotRequired[Reason | None]
    dropped: NotRequired[list[int]]
    stdout: NotRequired[str]
    stderr: NotRequired[str]
    index: NotRequired[str]  # base64 of index records, at most 1,024; beside stdout and stderr
    exited_at_ms: NotRequired[int]
    sent: NotRequired[bool]  # `kill`: whether the command was signalled, by this request or an earlier one of its name


class Sizes(TypedDict):
    """A command with output to look at: bytes of its two streams, and of what came after its exit."""

    id: str
    state: ExecutionState
    sizes: list[int]
    late: list[int]
    started_at_ms: int


class ListReply(TypedDict):
    executions: list[ReportedExecution]


class FollowTrailer(TypedDict):
    """``complete`` is True at the real end. False: what was dropped begins here, follow again at ``resume``; or
    ``moved``: it is not kept on the host any more, and was stored before."""

    total: int
    exit: int | None
    reason: Reason | None
    complete: bool
    resume: NotRequired[int]
    moved: NotRequired[bool]
    dropped: NotRequired[list[int]]


class StdinReply(TypedDict):
    accepted: bool


NOTES_MAX = 8
"""What is told of the shell of one command: so many lines."""


class ExitEvent(TypedDict):
    """An execution ended. Sent again on every connect until it is acknowledged as ``[box, id]``."""

    event: Literal["exit"]
    box: str
    id: str
    exit: int  # 0..255, -1 when nobody can tell
    reason: Reason | None
    sizes: list[int]
    dropped: list[int]
    started_at_ms: int
    first_byte_at_ms: NotRequired[int]  # of output; absent when there was none
    exited_at_ms: int
    notes: NotRequired[list[str]]
    stdout: NotRequired[str]  # base64
    stderr: NotRequired[str]
    index: NotRequired[str]


class BoxExitEvent(TypedDict):
    """A box's init ended although nobody destroyed it. Acknowledged as ``[box, "box"]``."""

    event: Literal["box_exit"]
    box: str
    exit: int
    oom: bool
    at_ms: int
    rebooted: NotRequired[bool]  # it went with a restart of the machine
    memory: NotRequired[dict[str, int]]  # when oom: kills, limit_bytes, usage_bytes, peak_bytes


class NoticeEvent(TypedDict):
    """Something happened to a box. Acknowledged as ``[box, id]``; only the newest of a box are kept until then."""

    event: Literal["notice"]
    box: str
    id: str
    source: Literal["stats", "kmsg", "exec"]
    level: Literal["info", "warning", "error"]
    message: str
    at_ms: int


class HeartbeatEvent(TypedDict):
    event: Literal["heartbeat"]
    monotonic: float


Event = ExitEvent | BoxExitEvent | NoticeEvent | HeartbeatEvent

INDEX_RECORD: Final = struct.Struct("<QQ")
"""One record of an index: (milliseconds since 1970) * 2 + (0 for stdout, 1 for stderr); bytes of that stream by then.
Every byte of a stream belongs to the first record of that stream that reaches beyond it."""

# --- checking -------------------------------------------------------------------------------------------------------


def _ids(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= IDS_MAX and all(is_work_id(item) for item in value)


_fence = _whole(0, 2**62)
_size = _whole(0, 2**62)
_stream = _one_of("stdout", "stderr")

# verb -> field -> (check, required)
_FIELDS: Final[dict[str, dict[str, tuple[Check, bool]]]] = {
    "hello": {},
    "report": {},
    "prepare_disk": {
        "box": (is_box_id, True),
        "fence": (_fence, True),
        "image": (is_image_id, True),
        "disk_bytes": (_whole(16 * 1024 * 1024, 2**50), True),
        "snapshot": (is_work_id, False),
    },
    "boot": {
        "box": (is_box_id, True),
        "fence": (_fence, True),
        "cpu_millis": (_whole(10, 1_024_000), True),
        "memory_bytes": (_whole(16 * 1024 * 1024, 2**50), True),
        "pids": (_whole(16, 4_000_000), True),
        "disk_bytes": (_whole(16 * 1024 * 1024, 2**50), True),
        "hostname": (_matches(_HOSTNAME), True),
    },
    "suspend": {"box": (is_box_id, True), "fence": (_fence, True)},
    "resume": {
        "box": (is_box_id, True),
        "fence": (_fence, True),
        "image": (is_image_id, True),
        "disk_bytes": (_whole(16 * 1024 * 1024, 2**50), True),
        "machine_id": (_matches(re.compile(r"[0-9a-f]{32}")), False),
        "snapshot": (is_work_id, False),
    },
    "destroy": {"box": (is_box_id, True), "fence": (_fence, True), "keep_disk": (_flag, False)},
    "watch": {"stats_seconds": (_whole(0, 86_400), False)},
    "set_warm": {"count": (_whole(0, 200), True), "image": (is_image_id, True)},
    "ship": {"digest": (is_digest, True), "body": (_whole(1, SHIP_BODY_MAX), True)},
    "restart": {"digest": (is_digest, True)},
    **SNAPSHOT_VERBS,
    "spawn": {
        "box": (is_box_id, True),
        "id": (is_work_id, True),
        "fence": (_fence, True),
        "body": (_whole(2, SPAWN_BODY_MAX), True),
        "hold_ms": (_whole(0, HOLD_MS_MAX), False),
        "cap": (_whole(CAP_MIN, CAP_MAX), False),
    },
    "state": {"box": (is_box_id, True), "id": (is_work_id, True)},
    "kill": {
        "box": (is_box_id, True),
        "id": (is_work_id, True),
        "fence": (_fence, True),
        "signal": (_whole(1, 64), True),
        "group": (_flag, False),
        "request": (_matches(_REQUEST), False),
    },
    "ack": {"box": (is_box_id, True), "ids": (_ids, True)},
    "forget": {"box": (is_box_id, True), "ids": (_ids, True), "fence": (_fence, False)},
    "follow": {
        "box": (is_box_id, True),
        "id": (is_work_id, True),
        "stream": (_stream, True),
        "offset": (_size, True),
    },
    "read": {
        "box": (is_box_id, True),
        "id": (is_work_id, True),
        "stream": (_one_of("stdout", "stderr", "late_stdout", "late_stderr"), True),
        "offset": (_size, True),
        "limit": (_whole(0, READ_MAX), True),
        "last_lines": (_whole(0, 2**31), False),
    },
    "stdin": {
        "box": (is_box_id, True),
        "id": (is_work_id, True),
        "request": (_matches(_REQUEST), True),
        "eof": (_flag, False),
        "body": (_whole(0, STDIN_BODY_MAX), True),
    },
    "list": {"box": (is_box_id, True)},
    "index": {
        "box": (is_box_id, True),
        "id": (is_work_id, True),
        "late": (_flag, False),
        "last": (_whole(1, 4096), False),
    },
    "sizes": {"box": (is_box_id, True)},
    "activity": {"box": (is_box_id, True)},
    "changes": {"box": (is_box_id, True)},
    # Their further fields are the keeper's to check; what they are answered is told in hostd/terminals.py and files.py.
    "terminal": {
        "box": (is_box_id, True),
        "op": (_one_of("open", "attach", "resize", "signal", "close"), True),
        "session": (_matches(re.compile(r"[A-Za-z0-9_-]{1,256}")), True),
        "body": (_whole(0, 512 * 1024), False),
    },
    "run": {"box": (is_box_id, True), "body": (_whole(2, SPAWN_BODY_MAX), True)},  # see hostd/relay.py
    "file": {"box": (is_box_id, True), "op": (_one_of("read", "write"), True)},
    "dial": {"box": (is_box_id, True), "port": (_whole(1, 65535), True)},  # see hostd/dials.py
}


VERBS: Final = frozenset(_FIELDS)
HOST_VERBS: Final = VERBS - BOX_VERBS


def fields_of(verb: str) -> frozenset[str]:
    """The names of a verb's fields. Raises KeyError for an unknown verb."""
    return frozenset(_FIELDS[verb])


def encode(message: Mapping[str, Any]) -> bytes:
    """One line of compact JSON, newline included."""
    return json.dumps(message, ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"


def request(verb: str, **fields: Any) -> bytes:
    """A request line. Raises ValueError when the verb is unknown, a field is missing or out of bounds, or the line is
    longer than :data:`LINE_MAX`: a caller's mistake never travels."""
    message = {"v": PROTOCOL, "verb": verb, **{name: value for name, value in fields.items() if value is not None}}
    try:
        check_request(message)
    except Refused as refused:
        raise ValueError(refused.message) from None
    line = encode(message)
    if len(line) > LINE_MAX:
        raise ValueError(f"a request line of {len(line)} bytes is over the limit of {LINE_MAX}")
    return line


def check_request(message: Mapping[str, Any]) -> None:
    """Raise :class:`Refused` (unknown_verb, bad_request, too_large) unless every known field is right."""
    if message.get("v") != PROTOCOL:
        raise Refused("bad_request", f"this host speaks protocol {PROTOCOL}")
    verb = message.get("verb")
    fields = _FIELDS.get(verb) if isinstance(verb, str) else None
    if fields is None:
        raise Refused("unknown_verb", "no such verb")
    for name, (check, required) in fields.items():
        if name not in message:
            if required:
                raise Refused("bad_request", f"{verb}: {name} is missing")
        elif not check(message[name]):
            if name == "body" and isinstance(message[name], int) and message[name] > 0:
                raise Refused("too_large", f"{verb}: the body is over its limit")
            raise Refused("bad_request", f"{verb}: {name} is not allowed to be that")


def parse_request(line: bytes) -> dict[str, Any]:
    """A checked request. Raises :class:`Refused`, which the serving side answers with."""
    try:
        message = parse_object(line)
    except ProtocolError as error:
        raise Refused("bad_request", str(error)) from None
    check_request(message)
    return message


def ok(**fields: Any) -> bytes:
    """A reply line that says yes."""
    return encode({"ok": True, **fields})


def error(code: str, message: str, **extra: Any) -> bytes:
    """A reply line that says no."""
    if code not in ERROR_CODES:
        code = "internal"
    return encode({"error": {"code": code, "message": message[:1000], **extra}})


def refusal(refused: Refused) -> bytes:
    return error(refused.code, refused.message, **refused.extra)


def parse_reply(line: bytes) -> dict[str, Any]:
    """The fields of a reply. Raises :class:`Refused` when it says no, :class:`ProtocolError` when it is neither."""
    message = parse_object(line)
    if message.get("ok") is True:
        return message
    problem = message.get("error")
    if isinstance(problem, dict) and isinstance(problem.get("code"), str):
        extra = {name: value for name, value in problem.items() if name not in ("code", "message")}
        raise Refused(problem["code"], str(problem.get("message", "")), **extra)
    raise ProtocolError("the reply is neither ok nor an error")


def parse_event(line: bytes) -> Event:
    """One line of a watch. Raises :class:`ProtocolError`; events of unknown kinds are returned as they are."""
    message = parse_object(line)
    kind = message.get("event")
    if not isinstance(kind, str):
        raise ProtocolError("the line is not an event")
    if kind == "exit" and not (
        is_box_id(message.get("box"))
        and is_work_id(message.get("id"))
        and _whole(-1, 255)(message.get("exit"))
        and _two_sizes(message.get("sizes"))
    ):
        raise ProtocolError("an exit event has a wrong field")
    if kind == "box_exit" and not is_box_id(message.get("box")):
        raise ProtocolError("a box_exit event has a wrong field")
    if kind == "notice" and not (
        is_box_id(message.get("box"))
        and is_work_id(message.get("id"))
        and _one_of("stats", "kmsg", "exec")(message.get("source"))
        and _one_of("info", "warning", "error")(message.get("level"))
        and isinstance(message.get("message"), str)
        and _whole(0, 2**53)(message.get("at_ms"))
    ):
        raise ProtocolError("a notice has a wrong field")
    return cast(Event, message)


def _two_sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_size(item) for item in value)


def acks(pairs: Iterable[tuple[str, str]]) -> list[bytes]:
    """Ack lines for ``(box, id)`` pairs, each within the bounds."""
    found = list(pairs)
    return [
        encode({"ack": [list(pair) for pair in found[at : at + ACKS_MAX]]}) for at in range(0, len(found), ACKS_MAX)
    ]


def parse_acks(line: bytes) -> list[tuple[str, str]]:
    """The pairs of one ack line. Raises :class:`ProtocolError`."""
    pairs = parse_object(line).get("ack")
    if not isinstance(pairs, list) or len(pairs) > ACKS_MAX:
        raise ProtocolError("an ack is a list of pairs")
    found: list[tuple[str, str]] = []
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and is_box_id(pair[0])):
            raise ProtocolError("an ack is a pair of a box and an id")
        if not (pair[1] == BOX_EXIT_ID or is_work_id(pair[1])):
            raise ProtocolError("an ack is a pair of a box and an id")
        found.append((pair[0], pair[1]))
    return found
