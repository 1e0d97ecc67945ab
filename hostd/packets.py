"""One message = one SOCK_SEQPACKET packet: a JSON object, perhaps with descriptors.

In charge of: JSON without the `json` package (which pulls in `re` and costs every keeper half a megabyte; `array` pulls
in `collections`), and sending and receiving packets whose descriptors are close-on-exec and never leak.
Not in charge of: what the messages mean (keeper_spec.py has the table), stream sockets, clients' requests.
"""

from __future__ import annotations

import _json
import _socket
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any

MSG_CMSG_CLOEXEC = 0x40000000
"""Without it a received descriptor leaks into whatever is started between recvmsg and fcntl."""

MAX_PACKET = 200_000
"""Bytes of one packet. The kernel refuses one near SO_SNDBUF, 212,992 by default; longer things travel in a memfd."""

MAX_DESCRIPTORS = 64
"""Descriptors of one packet (the kernel's own limit is 253)."""


class Malformed(ValueError):
    """The text is not one JSON object."""


class _Scan:
    """What the C scanner reads its options from."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    memo: dict[str, str] = {}

    @staticmethod
    def parse_constant(name: str) -> None:
        """Refuse NaN and the infinities: they are not JSON."""
        raise Malformed(f"{name} is not JSON")


_scan: Callable[[str, int], tuple[Any, int]] = _json.make_scanner(_Scan)  # type: ignore[arg-type]


def _refuse(value: object) -> None:
    raise TypeError(f"{type(value).__name__} has no JSON form")


_encode: Callable[[Any, int], Iterable[str]] = _json.make_encoder(
    None, _refuse, _json.encode_basestring_ascii, None, ":", ",", False, False, False
)


def dumps(value: object) -> bytes:
    """Return `value` as compact ASCII JSON; TypeError or ValueError if it has no JSON form."""
    return "".join(_encode(value, 0)).encode("ascii")


def loads(text: bytes | bytearray) -> dict[str, Any]:
    """Return the one JSON object that `text` is; raise Malformed for anything else, trailing bytes included."""
    try:
        string = bytes(text).decode("utf-8").strip(" \t\r\n")
        value, end = _scan(string, 0)
    except (UnicodeDecodeError, StopIteration, ValueError, RecursionError, SystemError) as error:
        # SystemError: the C scanner looks for json.decoder's exception class, which nobody here has imported.
        raise Malformed(f"not JSON: {type(error).__name__}") from None
    if end != len(string):
        raise Malformed(f"not one JSON object: {len(string) - end} more characters after it")
    if not isinstance(value, dict):
        raise Malformed("not a JSON object")
    return value


def send(sock: _socket.socket, message: object, descriptors: Sequence[int] = (), *, wait: bool = True) -> None:
    """Send one packet.

    With `wait=False` a full queue raises BlockingIOError. A dead peer raises OSError (never SIGPIPE).
    """
    flags = _socket.MSG_NOSIGNAL | (0 if wait else _socket.MSG_DONTWAIT)
    rights = []
    if descriptors:
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack(f"{len(descriptors)}i", *descriptors))]
    sock.sendmsg([dumps(message)], rights, flags)


def receive_raw(sock: _socket.socket, *, wait: bool = True) -> tuple[bytes, list[int]]:
    """Receive one packet and its descriptors; (b"", []) when the peer is gone.

    A truncated packet counts as malformed: its descriptors are closed and Malformed is raised. With `wait=False` an
    empty queue raises BlockingIOError.
    """
    flags = MSG_CMSG_CLOEXEC | (0 if wait else _socket.MSG_DONTWAIT)
    try:
        data, ancillary, got, _ = sock.recvmsg(MAX_PACKET + 4096, _socket.CMSG_SPACE(MAX_DESCRIPTORS * 4), flags)
    except ConnectionError:
        return b"", []
    descriptors: list[int] = []
    for level, kind, payload in ancillary:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            descriptors += struct.unpack(f"{len(payload) // 4}i", payload[: len(payload) // 4 * 4])
    if got & (_socket.MSG_TRUNC | _socket.MSG_CTRUNC):
        close_all(descriptors)
        raise Malformed("packet cut off: too long or too many descriptors")
    return data, descriptors


def receive(sock: _socket.socket, *, wait: bool = True) -> tuple[dict[str, Any] | None, list[int]]:
    """Like `receive_raw`, parsed; (None, []) when the peer is gone. Malformed closes the descriptors first."""
    data, descriptors = receive_raw(sock, wait=wait)
    if not data:
        close_all(descriptors)
        return None, []
    try:
        return loads(data), descriptors
    except Malformed:
        close_all(descriptors)
        raise


def accept(listener: _socket.socket) -> _socket.socket:
    """Accept a connection, close-on-exec and blocking. Raises BlockingIOError when there is none."""
    descriptor, _ = listener._accept()  # type: ignore[attr-defined]  # what socket.socket.accept is made of
    os.set_blocking(descriptor, True)
    return _socket.socket(listener.family, listener.type, 0, descriptor)


def close_all(descriptors: Iterable[int]) -> None:
    """Close each descriptor; one that is already closed is no error."""
    for descriptor in descriptors:
        try:
            os.close(descriptor)
        except OSError:
            pass
