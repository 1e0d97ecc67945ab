"""A multipart form as it arrives: parts in order, their bytes in pieces, nothing collected.

In charge of the form's bounds and of what a part is called. What the parts are for is the caller's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from typing import Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from api.errors import BadRequest

PARTS_MAX: Final = 16
HEADER_BYTES_MAX: Final = 16 * 1024
"""All headers of one part together."""


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A part begins. `name`: of the form's field."""

    name: str


def boundary_of(content_type: str | None) -> bytes:
    """The boundary that a content type names. Raises BadRequest when it is no form's."""
    kind, options = parse_options_header(content_type or "")
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= 200:
        raise BadRequest("the body must be multipart/form-data, with its boundary in the content type")
    return boundary


class _Listener:
    """What the parser calls; collects what one chunk of the body brought."""

    def __init__(self) -> None:
        self.found: list[Part | bytes] = []
        self.parts = 0
        self.ended = False
        self._name, self._value = b"", b""
        self._size = 0
        self._disposition = b""

    def on_part_begin(self) -> None:
        self.parts += 1
        if self.parts > PARTS_MAX:
            raise BadRequest(f"the form has more than {PARTS_MAX} parts")
        self._name = self._value = self._disposition = b""
        self._size = 0

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._value += data[start:end]

    def _count(self, size: int) -> None:
        self._size += size
        if self._size > HEADER_BYTES_MAX:
            raise BadRequest(f"the headers of a part of the form are over {HEADER_BYTES_MAX} bytes")

    def on_header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = self._value
        self._name = self._value = b""

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name")
        if name is None:
            raise BadRequest("a part of the form has no name")
        self.found.append(Part(name.decode("utf-8", "replace")))

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self.found.append(data[start:end])

    def on_end(self) -> None:
        self.ended = True


async def parts(content_type: str | None, chunks: AsyncIterator[bytes]) -> AsyncIterator[Part | bytes]:
    """Each part's beginning, followed by its bytes. Raises BadRequest for what is no form, and what `chunks` raises."""
    listener = _Listener()
    parser = MultipartParser(
        boundary_of(content_type),
        {
            "on_part_begin": listener.on_part_begin,
            "on_header_field": listener.on_header_field,
            "on_header_value": listener.on_header_value,
            "on_header_end": listener.on_header_end,
            "on_headers_finished": listener.on_headers_finished,
            "on_part_data": listener.on_part_data,
            "on_end": listener.on_end,
        },
    )
    async for chunk in chunks:
        try:
            parser.write(chunk)
        except FormParserError as error:
            raise BadRequest(f"the form cannot be read: {error}") from None
        found, listener.found = listener.found, []
        for item in found:
            yield item
    if not listener.ended:
        raise BadRequest("the form ends before its last boundary")
