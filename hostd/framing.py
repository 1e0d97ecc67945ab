"""Lines and frames: how bytes are put on a connection and taken off it again.

In charge of: the frames of raw answers and strict parsing of one line. Not in charge of: what the lines say
(`messages.py`, which everybody else imports this through).
"""

from __future__ import annotations

import json
import struct
from typing import Any, Final

FRAME_MAX: Final = 1024 * 1024  # one frame of a raw answer, in bytes
TRAILER_MAX: Final = 64 * 1024


class ProtocolError(Exception):
    """The other side sent what the protocol does not allow. The connection cannot be used any further."""


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object of one line. Raises :class:`ProtocolError` for anything else."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("the line is not JSON") from error
    if not isinstance(message, dict):
        raise ProtocolError("the line is not a JSON object")
    return message


_LENGTH = struct.Struct("!I")
FRAME_HEADER_BYTES: Final = _LENGTH.size
FRAMES_END: Final = _LENGTH.pack(0)


def frame_header(length: int) -> bytes:
    """The four bytes before ``length`` bytes. Raises ValueError outside 1..FRAME_MAX (zero is the end mark)."""
    if not 0 < length <= FRAME_MAX:
        raise ValueError(f"a frame has 1..{FRAME_MAX} bytes, not {length}")
    return _LENGTH.pack(length)


def frame(data: bytes) -> bytes:
    return frame_header(len(data)) + data


class FrameParser:
    """Takes a raw answer apart as it arrives, in pieces of any size, and holds back no bytes of a frame.

    Feed it what follows the reply line. ``trailer`` is set once everything arrived; ``rest`` then holds what came
    after it. Whoever sees the connection end with ``trailer`` still None was cut off.
    """

    def __init__(self) -> None:
        self.trailer: dict[str, Any] | None = None
        self.rest = b""
        self._held = b""
        self._left = 0  # bytes still to come of the current frame
        self._ended = False  # the zero frame was seen

    def feed(self, data: bytes) -> list[bytes]:
        """The payload pieces in ``data``. Raises :class:`ProtocolError`."""
        if self.trailer is not None:
            self.rest += data
            return []
        pieces: list[bytes] = []
        if self._held:
            data = self._held + data
            self._held = b""
        at = 0
        while at < len(data) and not self._ended:
            if self._left:
                piece = data[at : at + self._left]
                pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
                continue
            if len(data) - at < FRAME_HEADER_BYTES:
                break
            (self._left,) = _LENGTH.unpack_from(data, at)
            at += FRAME_HEADER_BYTES
            if self._left == 0:
                self._ended = True
            elif self._left > FRAME_MAX:
                raise ProtocolError(f"a frame of {self._left} bytes is over the limit of {FRAME_MAX}")
        self._held = data[at:]
        if self._ended:
            self._finish()
        return pieces

    def _finish(self) -> None:
        line, newline, rest = self._held.partition(b"\n")
        if newline:
            self.trailer = parse_object(line)
            self._held, self.rest = b"", rest
        elif len(line) > TRAILER_MAX:
            raise ProtocolError(f"a trailer is over the limit of {TRAILER_MAX} bytes")
