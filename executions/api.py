"""The operations on executions: what they take, what they answer, and the handlers behind them.

In charge of HTTP: parsing, the caller's access, the hold of a wait, the answer. Not in charge of making or stopping
anything (`services`), of output (`outputs`, `streams`), or of which URL is whose (`routes`). Every handler runs on the
event loop, since each may wait or touch a host; the database is used through `in_database`.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import signal as signals
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from rest_framework.serializers import Serializer

from accounts.caps import limits
from api.asynchronous import Request, Response, StreamResponse, in_database, json_response
from api.errors import BadRequest, Unavailable, WaitTimedOut
from api.ids import new_id
from api.validation import validated
from api.waiting import hub, wait_over
from devboxes.services import touch
from executions import answers, selectors, services, streams
from executions.models import Status
from executions.outputs import Stream
from executions.schemas import (
    CreateExecutionParameters,
    KillExecutionRequest,
    SendStdInRequest,
    StartExecutionParameters,
    WaitForCommandRequest,
)
from executions.selectors import ExecutionView
from hostd.messages import STDIN_BODY_MAX
from hosts.client import HostRefused, HostUnreachable, StaleFence, async_client_for

HOLD_MAX_SECONDS: Final = 25.0
SYNC_MAX_SECONDS: Final = 6 * 3600.0
"""The longest execute_sync holds; the command itself has no such limit."""
KILL_HOLD_SECONDS: Final = 5.0
START_HOLD_SECONDS: Final = 10.0
"""How long input waits for a command that is still queued."""
BODY_MAX: Final = 8 * 1024 * 1024
"""A command of 1 MiB may take six times that as JSON."""
LAST_N_DEFAULT: Final = 100
LAST_N_MAX: Final = 2**31 - 1
OFFSET_MAX: Final = 2**62

_WHOLE = re.compile(r"[0-9]{1,19}")
_REQUEST = re.compile(r"[A-Za-z0-9._-]{1,64}")

Read = Callable[[], ExecutionView]


def _parsed(serializer: type[Serializer[Any]], data: Any) -> dict[str, Any]:
    return {name: value for name, value in validated(serializer, data).items() if value is not None}


def _whole(query: dict[str, str], name: str, default: int, most: int) -> int:
    text = query.get(name)
    if text is None:
        return default
    if _WHOLE.fullmatch(text) is None:
        raise BadRequest(f"{name}: must be a whole number, 0 or more")
    return min(int(text), most)


def _last_n(request: Request) -> int:
    return _whole(request.query, "last_n", LAST_N_DEFAULT, LAST_N_MAX)


def _reader(request: Request, execution_id: str | None = None) -> Read:
    params = request.params
    devbox_id = params.get("devbox_id") or params["id"]
    return partial(selectors.access_execution, request.caller, devbox_id, execution_id or params["execution_id"])


def _completed(view: ExecutionView) -> bool:
    return view.completed


async def _wait(read: Read, execution_id: str, done: Callable[[ExecutionView], bool], seconds: float) -> ExecutionView:
    deadline = _in(seconds)
    return await hub.wait_until(execution_id, read, done, deadline)


async def _run(request: Request, new: services.NewExecution, seconds: float) -> tuple[Read, ExecutionView]:
    """Make the execution and wait for its end, `seconds` at most."""
    deadline = _in(seconds)
    create = partial(services.create_execution, request.caller, request.params["id"], new)
    execution_id = await hub.make(new.id, create, deadline)
    read = _reader(request, execution_id)
    return read, await hub.wait_until(execution_id, read, _completed, deadline)


def _in(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


def _refuse_later(given: dict[str, Any], *, stdin: bool) -> None:
    if given.get("attach_stdin") and not stdin:
        raise BadRequest("attach_stdin: not available here; use execute_async for a command that reads input")


async def execute(request: Request) -> Response:
    """Run a command under the caller's own id and hold for its end, up to `optimistic_timeout` seconds."""
    last_n = _last_n(request)
    given = _parsed(StartExecutionParameters, await request.json(BODY_MAX))
    _refuse_later(given, stdin=False)
    new = services.NewExecution(
        operation="execute",
        command=given["command"],
        command_id=given["command_id"],
        shell_name=given.get("shell_name"),
        request_id=request.request_id,
    )
    seconds = min(given.get("optimistic_timeout", HOLD_MAX_SECONDS), HOLD_MAX_SECONDS)
    read, view = await _run(request, new, seconds)
    return json_response(await answers.async_view(read, view, last_n))


async def execute_async(request: Request) -> Response:
    """Start a command and answer at once."""
    given = _parsed(CreateExecutionParameters, await request.json(BODY_MAX))
    _refuse_later(given, stdin=True)
    new = services.NewExecution(
        operation="execute_async",
        command=given["command"],
        shell_name=given.get("shell_name"),
        request_id=request.request_id,
        attach_stdin=given.get("attach_stdin", False),
    )
    execution_id = await in_database(services.create_execution, request.caller, request.params["id"], new)
    read = _reader(request, execution_id)
    return json_response(await answers.async_view(read, await in_database(read), LAST_N_DEFAULT))


async def execute_sync(request: Request) -> Response:
    """Run a command and hold until it has ended, for as long as the client stays (it is cancelled when that leaves;
    the command goes on, and the same x-request-id comes back to it)."""
    given = _parsed(CreateExecutionParameters, await request.json(BODY_MAX))
    _refuse_later(given, stdin=False)
    new = services.NewExecution(
        operation="execute_sync",
        command=given["command"],
        shell_name=given.get("shell_name"),
        request_id=request.request_id,
    )
    read, view = await _run(request, new, SYNC_MAX_SECONDS)
    if not view.completed:
        # The time is up, or this server is being stopped. Asked again with its x-request-id it is the same command.
        raise WaitTimedOut(f"execution {view.id} has not ended yet and goes on; use wait_for_status")
    return json_response(await answers.sync_view(read, view))


def _used(read: Read) -> ExecutionView:
    """The execution, of which something is wanted: its devbox is in use."""
    view = read()
    touch(view.devbox_id, "command")
    return view


async def get(request: Request) -> Response:
    """The execution as it is now."""
    last_n = _last_n(request)
    read = _reader(request)
    return json_response(await answers.async_view(read, await in_database(read), last_n))


async def wait_for_status(request: Request) -> Response:
    """Hold until the execution has one of the wanted statuses; 408 when it has none in time, or the server stops."""
    last_n = _last_n(request)
    given = _parsed(WaitForCommandRequest, await request.json())
    wanted = frozenset(given["statuses"])
    seconds = min(given.get("timeout_seconds", HOLD_MAX_SECONDS), HOLD_MAX_SECONDS)
    read = _reader(request)

    def reached(view: ExecutionView) -> bool:
        return view.status in wanted

    deadline = _in(seconds)
    view = await _wait(read, request.params["execution_id"], reached, seconds)
    if not reached(view):
        asked, now = " or ".join(sorted(wanted)), f"execution {view.id} is {view.status}"
        raise wait_over(deadline, f"{now} and was not {asked} within {seconds:g} s; ask again", now)
    return json_response(await answers.async_view(read, view, last_n))


async def kill(request: Request) -> Response:
    """Stop the command, whatever it does; one that has ended already is simply answered."""
    given = _parsed(KillExecutionRequest, await request.json())
    read = _reader(request)
    view = await in_database(_used, read)
    if not view.completed:
        group = given.get("kill_process_group", False) or view.stop_group
        by = None if view.stop_by else request.caller
        await in_database(services.request_kill, view.id, group=group, by=by)
        view = await _wait(read, view.id, _completed, KILL_HOLD_SECONDS)
    return json_response(await answers.async_view(read, view, LAST_N_DEFAULT))


async def send_std_in(request: Request) -> Response:
    """Give a running command input, the end of its input, or an interrupt."""
    given = _parsed(SendStdInRequest, await request.json(BODY_MAX))
    text, signal = given.get("text"), given.get("signal")
    if (text is None) == (signal is None):
        raise BadRequest("give exactly one of text and signal")
    body = (text or "").encode()
    if len(body) > STDIN_BODY_MAX:
        raise BadRequest(f"text: longer than the {STDIN_BODY_MAX} bytes that one call takes")
    read = _reader(request)
    view = await in_database(_used, read)
    if view.status == Status.QUEUED:
        deadline = _in(START_HOLD_SECONDS)
        view = await _wait(read, view.id, lambda now: now.status != Status.QUEUED, START_HOLD_SECONDS)
        if view.status == Status.QUEUED:
            now = f"execution {view.id} is still queued"
            raise wait_over(deadline, f"{now} after {START_HOLD_SECONDS:g} s; send again", now)
    success = False
    if view.completed:
        success = request.request_id is not None and await _was_taken(view, _request_key(request))
    else:
        try:
            if signal == "INTERRUPT":
                success = await _interrupt(read, view, _request_key(request))
            elif view.attach_stdin:
                reply = await async_client_for(view.host_id).stdin(
                    box=view.devbox_id, id=view.id, request=_request_key(request), eof=signal == "EOF", body=body
                )
                success = reply["accepted"]
        except HostUnreachable as error:
            raise Unavailable(f"the host of devbox {view.devbox_id} does not answer; send again shortly") from error
        except HostRefused as error:
            if error.code in ("busy", "not_ready"):
                raise Unavailable(f"devbox {view.devbox_id} cannot take input at the moment; send again") from error
    return json_response({"devbox_id": view.devbox_id, "execution_id": view.id, "success": success})


async def _was_taken(view: ExecutionView, request_key: str) -> bool:
    """Whether a command that has ended took this request before: the repetition of one whose answer was lost."""
    try:
        reply = await async_client_for(view.host_id).stdin(box=view.devbox_id, id=view.id, request=request_key)
    except (HostUnreachable, HostRefused):
        return False
    return reply["accepted"]


async def _interrupt(read: Read, view: ExecutionView, request_key: str) -> bool:
    """SIGINT to the command's process group, which needs no attached input. The host sends it once for a request, and
    after the input it has accepted before."""
    for left in (1, 0):
        try:
            reply = await async_client_for(view.host_id).kill(
                box=view.devbox_id,
                id=view.id,
                fence=view.fence,
                signal=signals.SIGINT,
                group=True,
                request=request_key,
            )
            return reply.get("sent", True)
        except StaleFence:
            # A step or a stop asked the host in between; what is wanted now stands in the row.
            view = await in_database(read)
            if view.completed or not left:
                return False
    return False


def _request_key(request: Request) -> str:
    """The id by which the host tells a repeated call: the request's own, in the host's alphabet."""
    given = request.request_id
    if given is None:
        return new_id("req")
    return given if _REQUEST.fullmatch(given) else hashlib.sha256(given.encode()).hexdigest()


async def stream_stdout_updates(request: Request) -> StreamResponse:
    """stdout as server-sent events, from `offset` to its end."""
    return await _stream(request, "stdout")


async def stream_stderr_updates(request: Request) -> StreamResponse:
    """stderr as server-sent events, from `offset` to its end."""
    return await _stream(request, "stderr")


async def _stream(request: Request, stream: Stream) -> StreamResponse:
    offset = _whole(request.query, "offset", 0, OFFSET_MAX)
    read = _reader(request)
    view = await in_database(read)
    cap = (await in_database(limits, request.caller.account_id)).open_streams
    updates = streams.Updates(request.caller.account_id, cap, read, view, stream, offset)
    return StreamResponse(200, streams.HEADERS, updates)
