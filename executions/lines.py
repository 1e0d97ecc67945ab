"""The last lines of an output, exactly.

In charge of: finding where the last n lines begin, in bytes in memory or in a stored object read backwards.
Not in charge of: decoding, or where the bytes are kept.

A line ends with a newline; a last piece without one counts as a line of its own, as `tail -n` counts.
"""

from __future__ import annotations

from collections.abc import Callable

BLOCK_BYTES = 64 * 1024


def start_of_last_lines(data: bytes, count: int) -> int:
    """The index in `data` where its last `count` lines begin."""
    if count <= 0:
        return len(data)
    at = len(data) - 1 if data.endswith(b"\n") else len(data)
    for _ in range(count):
        at = data.rfind(b"\n", 0, at)
        if at < 0:
            return 0
    return at + 1


def last_lines(data: bytes, count: int, limit: int) -> bytes:
    """The last `count` lines of `data`, at most `limit` bytes of them, never beginning inside a character."""
    return within(data[start_of_last_lines(data, count) :], limit)


def within(data: bytes, limit: int) -> bytes:
    """The last `limit` bytes of `data`; a character cut at the front is left out whole."""
    if len(data) <= limit:
        return data
    start = len(data) - limit
    # At most three continuation bytes belong to a character that began before the cut.
    for _ in range(3):
        if start < len(data) and data[start] & 0xC0 == 0x80:
            start += 1
    return data[start:]


def read_last_lines(read: Callable[[int, int], bytes], size: int, count: int, limit: int) -> bytes:
    """The same as `last_lines` for `size` bytes kept elsewhere; `read(start, length)` fetches a part.

    Reads backwards in blocks that double, so a short tail of a large output costs one small read. At most
    `limit` bytes (and a block) are held.
    """
    if count <= 0 or size <= 0:
        return b""
    have = b""
    block = BLOCK_BYTES
    start = size
    while start > 0 and len(have) < limit:
        length = min(block, start, limit + 4 - len(have))
        start -= length
        have = read(start, length) + have
        begin = start_of_last_lines(have, count)
        if begin > 0:
            return within(have[begin:], limit)
        block *= 2
    return within(have, limit)
