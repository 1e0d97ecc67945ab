"""One request and its answer over a byte stream: the reading side of the protocol, for threads and for the loop.

In charge of finding lines and bodies in what arrives in pieces, and of saying what a cut was cut from. The protocol
itself is `hostd.messages`; connections are `hosts.links` and `hosts.loop_links`.
"""

from __future__ import annotations

from typing import Any

from hostd import messages
from hosts.errors import HostUnreachable, refused
from hosts.ssh import ConnectionCut


class Inbox:
    """Bytes that came and were not used yet. Feed it pieces; take lines and bodies out of it."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._looked = 0

    def feed(self, data: bytes) -> None:
        """More bytes came; b"" (the end of the stream) raises ConnectionCut: whoever feeds still wants something."""
        if not data:
            raise ConnectionCut("the host closed the channel before its answer was complete")
        self._held += data

    def line(self) -> bytes | None:
        """A whole line without its newline, None when it has not come yet. Raises ProtocolError when it is too long."""
        at = self._held.find(b"\n", self._looked)
        if at < 0:
            self._looked = len(self._held)
            if self._looked > messages.REPLY_MAX:
                raise messages.ProtocolError(f"a line is over the limit of {messages.REPLY_MAX} bytes")
            return None
        line = bytes(self._held[:at])
        del self._held[: at + 1]
        self._looked = 0
        return line

    def body(self, size: int) -> bytes | None:
        """Exactly `size` bytes, None when they have not all come yet."""
        if len(self._held) < size:
            return None
        body = bytes(self._held[:size])
        del self._held[:size]
        return body

    def rest(self) -> bytes:
        """Everything that is held."""
        rest = bytes(self._held)
        self._held.clear()
        self._looked = 0
        return rest


def answer(host_id: str, line: bytes) -> dict[str, Any]:
    """The reply in a line. Raises HostRefused (StaleFence); HostUnreachable when it makes no sense."""
    try:
        return messages.parse_reply(line)
    except messages.Refused as no:
        raise refused(host_id, no.code, no.message, no.extra) from None
    except messages.ProtocolError as error:
        raise HostUnreachable(host_id, f"its answer makes no sense: {error}") from error


def body_size(host_id: str, reply: dict[str, Any], limit: int) -> int:
    """The size of the raw body that follows a reply. Raises HostUnreachable when it is none or over the limit."""
    size = reply.get("body")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= limit:
        raise HostUnreachable(host_id, f"it announced a body of {size!r} bytes, the limit is {limit}")
    return size


def offset(reply: dict[str, Any]) -> int | None:
    """Where a followed stream begins, when the reply says so."""
    found = reply.get("offset")
    return found if isinstance(found, int) else None
