"""Turning a stream of raw bytes into text events without losing count of the bytes.

In charge of: cutting UTF-8 only between code points, and of the offset that belongs to each piece of text.
Not in charge of: where the bytes come from, or how an event is framed.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """Text, and the raw byte position in the stream just after it."""

    text: str
    end: int


class TextCutter:
    """Decodes a byte stream that begins at `offset`, holding back an unfinished character.

    Bytes that are not UTF-8 become U+FFFD, exactly as decoding the whole stream at once would give, while the
    offsets keep counting raw bytes. A reader that comes back at a piece's `end` therefore neither loses nor
    repeats anything.
    """

    def __init__(self, offset: int = 0) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._position = offset

    @property
    def resume_at(self) -> int:
        """The position of the first byte whose text has not been handed out."""
        held, _ = self._decoder.getstate()
        return self._position - len(held)

    def feed(self, data: bytes) -> Piece | None:
        """Take the next bytes; None while they finish no character."""
        self._position += len(data)
        text = self._decoder.decode(data)
        return Piece(text, self.resume_at) if text else None

    def finish(self) -> Piece | None:
        """The stream has ended: what is held back can no longer become a character."""
        text = self._decoder.decode(b"", final=True)
        return Piece(text, self._position) if text else None
