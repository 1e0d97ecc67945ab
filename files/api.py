"""The file operations: what they take, what they answer, and the handlers behind them.

In charge of HTTP: parsing, the caller's access, ranges, errors in the API's words. Not in charge of what a path means
or who may use it, which is settled in the box (`hostd.files`), or of the bytes on their way (`hosts.files`). No handler
holds more of a file than a few pieces, but for the two that answer and take text as a whole.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Final, cast

from django.utils.http import content_disposition_header

from accounts.caps import CountedStream, limits, open_socket
from api.asynchronous import Request, Response, StreamResponse, in_database, json_response
from api.callers import Caller
from api.errors import ApiError, BadRequest, NotFound, TooLarge, TooManyRequests, Unavailable
from api.validation import validated
from devboxes import logs
from devboxes.log_notes import notes
from devboxes.selectors import ExecutionContext
from devboxes.services import TOUCH_SECONDS, touch, use_running
from files import forms
from files.schemas import DevboxDownloadFileParameters, DevboxReadFileParameters, DevboxWriteFileParameters
from hostd.messages import User
from hosts.client import HostRefused, HostUnreachable, async_client_for
from hosts.files import SMALL_BYTES, FileRead, FileWrite

log = logging.getLogger(__name__)

TEXT_MAX: Final = 100 * 1000 * 1000
TEXT_BODY_MAX: Final = 128 * 1024 * 1024
"""The text as JSON with a fair share of escapes; the contract sets the limit of the text only."""
UPLOAD_MAX: Final = 1 << 44
"""The devbox's disk is what really limits an upload."""
PATH_MAX: Final = 4096

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_NO_RETRY: Final = {"x-should-retry": "false"}


def context_of(caller: Caller, params: Mapping[str, str]) -> ExecutionContext:
    """The running devbox. Raises NotFound, BadRequest when it does not run."""
    return use_running(caller, params["id"], "its files can be used", "file")


def _context(request: Request) -> ExecutionContext:
    context: ExecutionContext = request.prepared
    return context


def _logged(context: ExecutionContext, what: str, path: str, size: int) -> None:
    """One entry of the devbox's log for what was done."""
    notes.add(context.devbox_id, logs.Entry("files", message=f"{what} {path}: {size} bytes"))


def _read(context: ExecutionContext, path: str, **what: Any) -> FileRead:
    client = async_client_for(context.host_id or "")
    return client.read_file(box=context.devbox_id, user=cast(User, context.user), path=path.encode(), **what)


def _write(context: ExecutionContext, path: bytes | None) -> FileWrite:
    client = async_client_for(context.host_id or "")
    return client.write_file(box=context.devbox_id, user=cast(User, context.user), path=path)


@contextlib.contextmanager
def _told(context: ExecutionContext) -> Iterator[None]:
    """Say the host's errors in the API's words."""
    try:
        yield
    except HostUnreachable as error:
        log.info("a file operation of %s could not go on: %s", context.devbox_id, error)
        raise Unavailable(f"the host of devbox {context.devbox_id} does not answer; try again shortly") from error
    except HostRefused as error:
        raise _error(context, error) from error


def _error(context: ExecutionContext, error: HostRefused) -> ApiError:
    match error.code:
        case "no_such_file":
            return NotFound(error.message, code=error.code)
        case "not_a_file" | "bad_path" | "denied" | "no_space" | "box_io" | "bad_request":
            return BadRequest(error.message, code=error.code, headers=_NO_RETRY)
        case "not_text":
            return BadRequest(f"{error.message}; use download_file", code=error.code, headers=_NO_RETRY)
        case "too_large":
            return BadRequest(f"{error.message}; use download_file", code=error.code, headers=_NO_RETRY)
        case "busy":
            return TooManyRequests(error.message, retry_after=1)
        case "not_ready" | "unknown_box" | "lost":
            return Unavailable(f"devbox {context.devbox_id} cannot be reached at the moment: {error.message}")
    return ApiError(f"the host of devbox {context.devbox_id} could not do it: {error.message}")


async def read_file_contents(request: Request) -> Response:
    """A text file as it is."""
    path = validated(DevboxReadFileParameters, await request.json())["file_path"]
    context = _context(request)
    with _told(context):
        async with _read(context, path, limit=TEXT_MAX, text=True) as file:
            request.body.take_for_answer(file.length)
            text = b"".join([piece async for piece in file])
    _logged(context, "read", path, len(text))
    return Response(200, {"content-type": "text/plain; charset=utf-8"}, text)


async def write_file_contents(request: Request) -> Response:
    """A text file, made or replaced at once and whole."""
    try:
        given = validated(DevboxWriteFileParameters, await request.json(TEXT_BODY_MAX))
        data = given["contents"].encode()
        if len(data) > TEXT_MAX:
            raise TooLarge("")
    except TooLarge:
        raise TooLarge(f"contents: over the {TEXT_MAX} bytes that write_file_contents takes; use upload_file") from None
    context = _context(request)
    with _told(context):
        writing = _write(context, given["file_path"].encode())
        if len(data) <= SMALL_BYTES:
            await writing.whole(data)
        else:
            async with writing:
                await writing.write(data)
                await writing.finish()
    _logged(context, "wrote", given["file_path"], len(data))
    return json_response({"devbox_id": context.devbox_id, "stdout": "", "stderr": "", "exit_status": 0})


async def upload_file(request: Request) -> Response:
    """A file of any kind and size, made or replaced when all of it has arrived. The parts may come in any order."""
    boundary_first = request.headers.get("content-type")
    forms.boundary_of(boundary_first)
    context = _context(request)
    cap = (await in_database(limits, request.caller.account_id)).open_streams
    in_use = _InUse(context)
    path, size = b"", 0
    seen: set[str] = set()
    with _told(context):
        async with contextlib.AsyncExitStack() as held:
            held.enter_context(open_socket(request.caller.account_id, cap))
            writing: FileWrite | None = None
            named = False
            current = ""
            async for item in forms.parts(boundary_first, request.body.chunks(UPLOAD_MAX)):
                if isinstance(item, forms.Part):
                    current = _part(item.name, seen)
                    if current == "file":
                        named = bool(path)
                        writing = await held.enter_async_context(_write(context, path if named else None))
                elif current == "path":
                    path += item
                    if len(path) > PATH_MAX:
                        raise BadRequest(f"path: longer than {PATH_MAX} bytes")
                elif writing is not None:
                    await writing.write(item)
                    size += len(item)
                    await in_use.note()
            if not path:
                raise BadRequest("path: this part of the form is missing or empty")
            if writing is None:
                await _write(context, path).whole(b"")
            else:
                await writing.finish(None if named else path)
    _logged(context, "uploaded", path.decode("utf-8", "replace"), size)
    return json_response({})


def _part(name: str, seen: set[str]) -> str:
    if name not in ("path", "file"):
        raise BadRequest(f"unknown field: {name[:80]}")
    if name in seen:
        raise BadRequest(f"{name}: given twice")
    seen.add(name)
    return name


async def download_file(request: Request) -> Response | StreamResponse:
    """A file of any kind and size, or one range of it."""
    path = validated(DevboxDownloadFileParameters, await request.json())["path"]
    context = _context(request)
    wanted = _range(request.headers.get("range"))
    cap = (await in_database(limits, request.caller.account_id)).open_streams
    with _told(context):
        file = await _opened(context, path, *(wanted or (0, None)))
        if wanted is not None and request.headers.get("if-range", _etag(file)) != _etag(file):
            await file.aclose()
            wanted = None
            file = await _opened(context, path, 0, None)
    headers = {
        "content-type": "application/octet-stream",
        "content-disposition": content_disposition_header(True, path.rsplit("/", 1)[-1]) or "attachment",
        "content-length": str(file.length),
        "accept-ranges": "bytes",
        "etag": _etag(file),
        "x-content-type-options": "nosniff",
    }
    _logged(context, "downloaded", path, file.length)
    if wanted is None:
        return StreamResponse(200, headers, await _counted(request, cap, file))
    if file.length == 0:
        await file.aclose()
        raise ApiError(
            f"the file has {file.size} bytes, and none in this range",
            status=416,
            code="range_not_satisfiable",
            headers={"content-range": f"bytes */{file.size}"},
        )
    headers["content-range"] = f"bytes {file.offset}-{file.offset + file.length - 1}/{file.size}"
    return StreamResponse(206, headers, await _counted(request, cap, file))


async def _counted(request: Request, cap: int, file: FileRead) -> CountedStream:
    try:
        return CountedStream(request.caller.account_id, cap, _Sent(file, _context(request)))
    except TooManyRequests:
        await file.aclose()
        raise


async def _opened(context: ExecutionContext, path: str, offset: int, length: int | None) -> FileRead:
    """The file, to be closed by who reads it."""
    return await _read(context, path, offset=offset, length=length).__aenter__()


class _InUse:
    """Says every few seconds that a devbox is in use, as long as bytes of a file move."""

    def __init__(self, context: ExecutionContext) -> None:
        self._context = context
        self._at = time.monotonic()

    async def note(self) -> None:
        """Some moved."""
        if time.monotonic() - self._at > TOUCH_SECONDS:
            self._at = time.monotonic()
            await in_database(touch, self._context.devbox_id, "file")


class _Sent:
    """A file as the body of an answer: closed whether or not anything of it was sent."""

    def __init__(self, file: FileRead, context: ExecutionContext) -> None:
        self._file = file
        self._in_use = _InUse(context)
        self._pieces = aiter(file)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        await self._in_use.note()
        return await anext(self._pieces)

    async def aclose(self) -> None:
        await self._file.aclose()


def _etag(file: FileRead) -> str:
    return f'"{file.mtime_ms:x}-{file.size:x}"'


def _range(header: str | None) -> tuple[int, int | None] | None:
    """Offset (from the end when negative) and length of the one range asked for; None for the whole file.

    What is no single range of bytes is ignored, as HTTP wants it.
    """
    match = _RANGE.fullmatch(header.strip()) if header else None
    if match is None:
        return None
    first, last = match.groups()
    if not first:
        return (-int(last), None) if last and int(last) else None
    if not last:
        return int(first), None
    return (int(first), int(last) - int(first) + 1) if int(last) >= int(first) else None
