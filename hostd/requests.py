"""Strict parsing of what clients ask of a keeper.

In charge of: the shape and the bounds of every field, and the argv a command becomes.
Not in charge of: whether the request can be carried out (executions.py), the wire (clients.py).
"""

from __future__ import annotations

import binascii

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

LINE_BYTES = 65536
"""A request line. hostd refuses longer ones before they come here."""
COMMAND_BYTES = 1 << 20
PIECE_BYTES = 120_000
"""One string of argv ends at 131,071 bytes, so a longer command travels in pieces."""
INPUT_BYTES = 1 << 20
STDIN_BYTES = 1 << 20
"""Body of one `stdin` request."""
ENVIRONMENT_BYTES = 256 << 10
SPAWN_BODY_BYTES = 4 << 20
"""Command, input in base64, environment: together."""
ARGUMENTS = 4096
READ_BYTES = 16 << 20
HOLD_MS = 5000
CAP_MIN, CAP_MAX = 64 << 10, 1 << 40
"""Bounds of the bytes kept of one stream."""
IDS = 1000
"""Ids in one `ack` or `forget`."""
PATH64_BYTES = 5600
"""A path of 4,096 bytes as base64."""
OUR_UID = 65533
"""The spawner's uid: nothing else runs as it."""

SHELL_NAME = 128
"""Characters in the name of a shell."""
SHELL = ["/bin/bash", "--login", "/proc/self/fd/9"]
"""A named shell: it reads what to do from a pipe (see shells.py)."""

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
JOIN_PIECES = 'IFS=; set -- "$*"; unset IFS; eval "shift;$1"'
"""Puts a command together again that is longer than one string of argv may be. Only `${IFS@Q}` tells the difference."""

_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz")
_ID_CHARACTERS = _LETTERS | frozenset("0123456789")
_SESSION_CHARACTERS = _ID_CHARACTERS | frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ-_")
_SIGNALS = frozenset(range(1, 32))


class Refused(Exception):
    """A request is answered with an error: `code` of the wire contract, `extra` more fields of the error object."""

    def __init__(self, code: str, message: str, **extra: Any) -> None:
        super().__init__(message)
        self.code = code
        self.extra = extra

    def reply(self) -> dict[str, Any]:
        """Return the answer."""
        return {"error": {"code": self.code, "message": str(self), **self.extra}}


def bad(message: str) -> Refused:
    """Return a bad_request."""
    return Refused("bad_request", message)


def whole(request: dict[str, Any], name: str, low: int, high: int, default: int | None = None) -> int:
    """Return an integer field within [low, high]."""
    value = request.get(name, default)
    if type(value) is not int or not low <= value <= high:
        raise bad(f"{name} must be a whole number from {low} to {high}")
    return value


def flag(request: dict[str, Any], name: str, default: bool) -> bool:
    """Return a boolean field."""
    value = request.get(name, default)
    if type(value) is not bool:
        raise bad(f"{name} must be true or false")
    return value


def text(request: dict[str, Any], name: str, limit: int, default: str | None = None) -> str:
    """Return a string field of at most `limit` bytes of UTF-8, without NUL."""
    return _string(request.get(name, default), name, limit)


def _string(value: object, name: str, limit: int) -> str:
    if not isinstance(value, str):
        raise bad(f"{name} must be a string")
    try:
        size = len(value.encode("utf-8"))
    except UnicodeEncodeError:
        raise bad(f"{name} is not Unicode text") from None
    if "\0" in value:
        raise bad(f"{name} contains NUL")
    if size > limit:
        raise Refused("too_large", f"{name} has {size} bytes, the limit is {limit}")
    return value


def execution_id(request: dict[str, Any]) -> str:
    """Return the `id` field: it becomes a file name, so it is a prefix, an underscore, letters and digits."""
    value = request.get("id")
    if not isinstance(value, str) or not is_id(value):
        raise bad("id must be like exe_01abc…: a prefix, an underscore, lower-case letters and digits")
    return value


def is_id(value: str) -> bool:
    """Does this look like an id of ours?"""
    prefix, mark, rest = value.partition("_")
    return (
        mark == "_"
        and 2 <= len(prefix) <= 8
        and 1 <= len(rest) <= 64
        and _LETTERS.issuperset(prefix)
        and _ID_CHARACTERS.issuperset(rest)
    )


def ids(request: dict[str, Any]) -> list[str]:
    """Return the `ids` field."""
    value = request.get("ids")
    if not isinstance(value, list) or len(value) > IDS or not all(isinstance(i, str) for i in value):
        raise bad(f"ids must be a list of at most {IDS} strings")
    return value


def stream_number(request: dict[str, Any]) -> int:
    """Return 1 or 2 for the `stream` field."""
    value = request.get("stream")
    if value == "stdout":
        return 1
    if value == "stderr":
        return 2
    raise bad("stream must be stdout or stderr")


def session(request: dict[str, Any]) -> str:
    """Return the `session` field: a terminal's name."""
    value = request.get("session")
    if not isinstance(value, str) or not 1 <= len(value) <= 256 or not _SESSION_CHARACTERS.issuperset(value):
        raise bad("session must be 1 to 256 of A-Z a-z 0-9 - _")
    return value


def size(request: dict[str, Any]) -> tuple[int, int]:
    """Return the `cols` and `rows` fields."""
    return whole(request, "cols", 1, 1000), whole(request, "rows", 1, 1000)


def signal_number(request: dict[str, Any]) -> int:
    """Return the `signal` field."""
    value = request.get("signal", 15)
    if type(value) is not int or value not in _SIGNALS:
        raise bad("signal must be a number from 1 to 31")
    return value


class Command:
    """A checked spawn request. `message` is what the spawner is told; `input` goes into a memfd as stdin.

    `shell` is the name of the shell that shall run it, None for a process of its own; `text` is then what it shall run.
    """

    __slots__ = ("input", "message", "shell", "text")

    def __init__(self, message: dict[str, Any], given: bytes | None, shell: str | None, text: str) -> None:
        self.message = message
        self.input = given
        self.shell, self.text = shell, text


def command(body: dict[str, Any]) -> Command:
    """Check the body of a spawn; raise Refused (bad_request, too_large)."""
    known = {"command", "argv", "env", "cwd", "user", "stdin", "input", "limits", "login", "shell"}
    for name in body:
        if name not in known:
            raise bad(f"unknown field {name!r}")
    if body.get("limits"):
        raise bad("limits of a single command are not supported")
    who, home = user(body)
    given = _given(body)
    stdin = body.get("stdin", "none")
    if stdin not in ("none", "pipe"):
        raise bad("stdin must be none or pipe")
    if given is not None:
        if stdin == "pipe":
            raise bad("input and stdin=pipe exclude each other")
        stdin = "given"
    cwd = body.get("cwd")
    shell = _shell(body)
    if shell is not None and given is not None:
        raise bad("input is not for a command in a shell; use stdin=pipe")
    message = {
        "argv": SHELL if shell is not None else _argv(body),
        "env": _environment(body, who["name"], home),
        "cwd": home if cwd is None else _absolute(cwd, "cwd"),
        "cwd_required": cwd is not None and shell is None,
        **who,
        "stdin": stdin,
    }
    return Command(message, given, shell, body["command"] if shell is not None else "")


def _shell(body: dict[str, Any]) -> str | None:
    if body.get("shell") is None:
        return None
    name = text(body, "shell", 4 * SHELL_NAME)
    if not 1 <= len(name) <= SHELL_NAME or not name.isprintable():
        raise bad(f"shell must be a name of 1 to {SHELL_NAME} printable characters")
    if "argv" in body or not flag(body, "login", True):
        raise bad("a shell takes a command, and is a login shell")
    text(body, "command", COMMAND_BYTES)
    return name


def user(body: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the `user` field as the spawner wants it (name, uid, gid), and the home directory."""
    value = body.get("user")
    if not isinstance(value, dict):
        raise bad("user must be an object of name, uid, gid and home")
    name = _string(value.get("name"), "user.name", 64)
    uid = whole(value, "uid", 0, 65534)
    gid = whole(value, "gid", 0, 65534)
    home = _absolute(value.get("home"), "user.home")
    if OUR_UID in (uid, gid):
        raise bad(f"id {OUR_UID} is reserved")
    return {"name": name, "uid": uid, "gid": gid}, home


def _absolute(value: object, name: str) -> str:
    path = _string(value, name, 4095)
    if not path.startswith("/"):
        raise bad(f"{name} must be an absolute path")
    return path


def _argv(body: dict[str, Any]) -> list[str]:
    if ("command" in body) == ("argv" in body):
        raise bad("exactly one of command and argv is needed")
    if "argv" in body:
        argv = body["argv"]
        if not isinstance(argv, list) or not 1 <= len(argv) <= ARGUMENTS:
            raise bad(f"argv must be a list of 1 to {ARGUMENTS} strings")
        argv = [_string(item, "argv", 131_071) for item in argv]
        if not argv[0]:
            raise bad("argv[0] is empty")
        if sum(len(item.encode("utf-8")) + 1 for item in argv) > COMMAND_BYTES:
            raise Refused("too_large", f"argv has more than {COMMAND_BYTES} bytes")
        return argv
    mode = "-lc" if flag(body, "login", True) else "-c"
    line = text(body, "command", COMMAND_BYTES)
    if len(line.encode("utf-8")) <= PIECE_BYTES:
        return ["/bin/bash", mode, line]
    step = PIECE_BYTES // 4  # characters of up to four bytes
    pieces = [line[i : i + step] for i in range(0, len(line), step)]
    return ["/bin/bash", mode, JOIN_PIECES, "/bin/bash", *pieces]


def _environment(body: dict[str, Any], name: str, home: str) -> dict[str, str]:
    given = body.get("env", {})
    if not isinstance(given, dict):
        raise bad("env must be an object of strings")
    environment = {
        "HOME": home,
        "USER": name,
        "LOGNAME": name,
        "SHELL": "/bin/bash",
        "PATH": PATH,
        "LANG": "C.UTF-8",
    }
    size = 0
    for key, value in given.items():
        _string(key, "the name of an environment variable", 1024)
        if not key or "=" in key:
            raise bad(f"{key!r} cannot name an environment variable")
        _string(value, f"environment variable {key}", 131_000 - len(key))
        size += len(key) + len(value.encode("utf-8"))
        environment[key] = value
    if size > ENVIRONMENT_BYTES:
        raise Refused("too_large", f"the environment has {size} bytes, the limit is {ENVIRONMENT_BYTES}")
    return environment


def file_task(request: dict[str, Any]) -> dict[str, Any]:
    """Check a `file` request and return the task that files.py carries out; raise Refused bad_request."""
    _, home = user(request)
    op = request.get("op")
    if op not in ("read", "write"):
        raise bad("op must be read or write")
    path = request.get("path64")
    if path is None and op == "read":
        raise bad("path64 is missing")
    if path is not None and (not isinstance(path, str) or len(path) > PATH64_BYTES):
        raise bad(f"path64 must be at most {PATH64_BYTES} characters of base64")
    task: dict[str, Any] = {"op": op, "home": home, "path64": path}
    if op == "read":
        task["offset"] = whole(request, "offset", -(1 << 62), 1 << 62, default=0)
        for name in ("length", "limit"):
            task[name] = None if request.get(name) is None else whole(request, name, 0, 1 << 62)
        task["text"] = flag(request, "text", False)
    return task


def decoded_rest(message: dict[str, Any]) -> bytes:
    """Return what hostd had read behind the request line; raise ValueError for nonsense."""
    rest = message.get("rest")
    return binascii.a2b_base64(rest) if rest else b""


def _given(body: dict[str, Any]) -> bytes | None:
    value = body.get("input")
    if value is None:
        return None
    if not isinstance(value, str):
        raise bad("input must be base64 text")
    try:
        data = binascii.a2b_base64(value.encode("ascii"), strict_mode=True) if value else b""
    except (binascii.Error, UnicodeEncodeError):
        raise bad("input is not base64") from None
    if len(data) > INPUT_BYTES:
        raise Refused("too_large", f"input has {len(data)} bytes, the limit is {INPUT_BYTES}")
    return data
