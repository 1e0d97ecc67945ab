"""HTTP for devboxes: parse, ask for access, call one service or selector, answer.

In charge of: status codes and the shape of requests. Not in charge of: rules and writes (`devboxes.services`), reads
(`devboxes.selectors`), or the document (`devboxes.schemas`, `devboxes.routes`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any, Final

from django.conf import settings
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, OpenApiResponse, extend_schema
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from accounts.caps import CountedStream, limits
from api import asynchronous
from api.asynchronous import StreamResponse, going_down, in_database, json_response
from api.callers import Caller
from api.errors import BadRequest, Conflict, NotFound
from api.ids import new_id
from api.pages import parse_flag, parse_page
from api.permissions import caller_of, raw_body_of, request_id_of
from api.validation import check_metadata_key, parse_object, validated
from api.views import AsyncElsewhere
from api.waiting import hub, wait_over
from devboxes import schemas, selectors, services, states
from devboxes.queries import metadata_filters
from hosts import registry

CREATE_HOLD_SECONDS: Final = 12.0
WAIT_DEFAULT_SECONDS: Final = 10.0
WAIT_MAX_SECONDS: Final = 30.0
HEARTBEAT_SECONDS: Final = 10.0

_STARTING = ("provisioning", "initializing")


def _answer(caller: Caller, devbox_id: str) -> Response:
    return Response(selectors.view(selectors.access_devbox(caller, devbox_id)))


def _filters(request: Request) -> selectors.Filters:
    status = request.query_params.get("status") or None
    if status is not None and status not in schemas.ASKABLE_STATUSES:
        raise BadRequest(f"status: {status[:40]!r} is none of {', '.join(states.STATUSES)}")
    metadata = metadata_filters(request.query_params)
    name = request.query_params.get("name") or None
    if name is not None and "\0" in name:
        raise BadRequest("name: contains a NUL character")
    return selectors.Filters(status=status, name=name, metadata=metadata)


_PAGE = [
    OpenApiParameter("limit", OpenApiTypes.INT, description="How many to answer with: 20 if not given, at most 5000."),
    OpenApiParameter("starting_after", OpenApiTypes.STR, description="The last id of the page before."),
    OpenApiParameter("include_total_count", OpenApiTypes.BOOL, description="Whether to count all of them; true."),
]
_TAGS = ["Devbox"]
_VIEW = {200: schemas.DevboxView}
_NOT_FOUND = {404: OpenApiResponse(description="There is no such devbox.")}


class Devboxes(APIView):
    """All devboxes of the account."""

    @extend_schema(
        operation_id="createDevbox",
        summary="Create a devbox",
        description="Answers at once; the devbox is `provisioning`, then `initializing` while its launch work runs, "
        "then `running`.",
        tags=_TAGS,
        request=schemas.DevboxCreateParameters,
        responses={
            **_VIEW,
            400: OpenApiResponse(description="A field is not valid, not available yet, or no host is large enough."),
            429: OpenApiResponse(description="The account has as many devboxes as it may have at once."),
            503: OpenApiResponse(description="No VM host is enrolled."),
        },
    )
    def post(self, request: Request) -> Response:
        caller = caller_of(request)
        parameters = validated(schemas.DevboxCreateParameters, request.data)
        devbox_id = services.create_devbox(
            caller, parameters, raw_body=raw_body_of(request), request_id=request_id_of(request)
        )
        return _answer(caller, devbox_id)

    @extend_schema(
        operation_id="listDevboxes",
        summary="List devboxes",
        description="Newest first. `metadata[KEY]=VALUE` and `metadata[KEY][in]=A,B` narrow it to devboxes with that "
        "metadata.",
        tags=_TAGS,
        parameters=[
            OpenApiParameter(
                "status", OpenApiTypes.STR, enum=states.STATUSES, description="Only those in this status."
            ),
            OpenApiParameter("name", OpenApiTypes.STR, description="Only those of this name."),
            OpenApiParameter("metadata[key]", OpenApiTypes.STR, description="Only those with this value of the key."),
            OpenApiParameter("metadata[key][in]", OpenApiTypes.STR, description="Only those with one of these values."),
            *_PAGE,
        ],
        responses={
            200: schemas.DevboxListView,
            400: OpenApiResponse(description="A filter is not valid."),
            404: OpenApiResponse(description="`starting_after` is not a devbox."),
        },
    )
    def get(self, request: Request) -> Response:
        caller = caller_of(request)
        page = parse_page(request.query_params)
        listed = selectors.list_devboxes(caller, _filters(request), page)
        answer: dict[str, Any] = {"devboxes": [selectors.view(row) for row in listed.rows], "has_more": listed.has_more}
        if listed.total is not None:
            answer["total_count"] = listed.total
        return Response(answer)


class Devbox(APIView):
    """One devbox."""

    @extend_schema(
        operation_id="getDevbox",
        summary="Get a devbox",
        tags=_TAGS,
        responses={**_VIEW, 400: OpenApiResponse(description="There is no such devbox.")},
    )
    def get(self, request: Request, id: str) -> Response:
        try:
            return _answer(caller_of(request), id)
        except NotFound as error:
            # Clients expect 400 here, of all places.
            raise BadRequest(error.message) from None

    @extend_schema(
        operation_id="updateDevbox",
        summary="Change a devbox's name or metadata",
        description="A field that is left out or null stays as it is; an empty name or empty metadata clear. Given "
        "metadata replaces all of it.",
        tags=_TAGS,
        request=schemas.DevboxUpdateParameters,
        responses={**_VIEW, **_NOT_FOUND},
    )
    def post(self, request: Request, id: str) -> Response:
        caller = caller_of(request)
        parameters = validated(schemas.DevboxUpdateParameters, request.data)
        services.update_devbox(caller, id, parameters, raw_body=raw_body_of(request), request_id=request_id_of(request))
        return _answer(caller, id)


class Shutdown(APIView):
    """The end of a devbox."""

    @extend_schema(
        operation_id="shutdownDevbox",
        summary="Shut a devbox down",
        description="At once, whatever it is doing, and as often as you like: the answer already says `shutdown`.",
        tags=_TAGS,
        parameters=[
            OpenApiParameter(
                "force", OpenApiTypes.STR, description="`true`: even while one of its snapshots is in progress."
            )
        ],
        request=None,
        responses={
            **_VIEW,
            **_NOT_FOUND,
            409: OpenApiResponse(description="One of its snapshots is in progress and `force` was not given."),
        },
    )
    def post(self, request: Request, id: str) -> Response:
        caller = caller_of(request)
        force = parse_flag(request.query_params, "force", default=False)
        row = selectors.access_devbox(caller, id)
        if not row.over:
            if not force and (why := registry.why_not_shut_down(id)) is not None:
                raise Conflict(f"devbox {id} is not shut down now: {why}; force=true does it nevertheless")
            services.request_shutdown(id, caller=caller)
        return _answer(caller, id)


class Suspend(APIView):
    """The sleep of a devbox."""

    @extend_schema(
        operation_id="suspendDevbox",
        summary="Suspend a devbox",
        description="Answers at once with `suspending`; it is `suspended` when its disk is written for good on its "
        "host. What runs in it ends: commands as completed with 137, terminals and streams cleanly. Of a devbox that "
        "sleeps only the disk takes up room.",
        tags=_TAGS,
        request=None,
        responses={**_VIEW, 400: OpenApiResponse(description="The devbox does not run."), **_NOT_FOUND},
    )
    def post(self, request: Request, id: str) -> Response:
        caller = caller_of(request)
        services.suspend_devbox(caller, id, request_id=request_id_of(request))
        return _answer(caller, id)


class Resume(APIView):
    """Its waking."""

    @extend_schema(
        operation_id="resumeDevbox",
        summary="Resume a suspended devbox",
        description="Answers at once with `provisioning`; then it goes on as one that was created, on the disk it had: "
        "`initializing` while its launch commands run again, then `running`. Its keep-alive time begins anew. Is its "
        "host full for too long, it is `suspended` again.",
        tags=_TAGS,
        request=None,
        responses={
            **_VIEW,
            400: OpenApiResponse(description="The devbox is not suspended."),
            **_NOT_FOUND,
            429: OpenApiResponse(description="The account has as many devboxes running as it may."),
        },
    )
    def post(self, request: Request, id: str) -> Response:
        caller = caller_of(request)
        services.resume_devbox(caller, id, request_id=request_id_of(request))
        return _answer(caller, id)


class KeepAlive(APIView):
    """The devbox's idle clock."""

    @extend_schema(
        operation_id="keepAliveDevbox",
        summary="Reset a devbox's idle clock",
        tags=_TAGS,
        request=None,
        responses={
            200: {"type": "object", "properties": {}},
            400: OpenApiResponse(description="The devbox is over."),
            **_NOT_FOUND,
        },
    )
    def post(self, request: Request, id: str) -> Response:
        row = selectors.access_devbox(caller_of(request), id)
        if row.over:
            raise BadRequest(f"devbox {id} is over: its status is {row.status}")
        services.keep_alive(id)
        return Response({})


class MetadataKeys(APIView):
    """Metadata keys of all devboxes."""

    @extend_schema(
        operation_id="getDevboxMetadataKeys",
        summary="List the metadata keys in use",
        tags=_TAGS,
        responses={200: schemas.MetadataKeysView},
    )
    def get(self, request: Request) -> Response:
        return Response({"keys": selectors.metadata_keys(caller_of(request))})


class MetadataValues(APIView):
    """Values of one metadata key."""

    @extend_schema(
        operation_id="getDevboxMetadataValues",
        summary="List the values of a metadata key in use",
        tags=_TAGS,
        responses={
            200: schemas.MetadataValuesView,
            400: OpenApiResponse(description="That cannot be a metadata key."),
        },
    )
    def get(self, request: Request, key: str) -> Response:
        caller = caller_of(request)
        if not check_metadata_key(key):
            raise BadRequest("key: 1 to 128 characters of A-Z a-z 0-9 _ . / - are allowed")
        return Response({"key": key, "values": selectors.metadata_values(caller, key)})


class _NotAvailable(APIView):
    what = ""

    def _refuse(self, request: Request, id: str) -> Response:
        selectors.access_devbox(caller_of(request), id)
        raise BadRequest(f"{self.what} are not available here")


_REFUSED = {400: OpenApiResponse(description="Not available."), **_NOT_FOUND}


class CreateGatewayToken(_NotAvailable):
    """Not available."""

    what = "gateway tokens"

    @extend_schema(summary="Not available", tags=_TAGS, request=None, responses=_REFUSED)
    def post(self, request: Request, id: str) -> Response:
        return self._refuse(request, id)


class CreateMcpToken(_NotAvailable):
    """Not available."""

    what = "MCP tokens"

    @extend_schema(summary="Not available", tags=_TAGS, request=None, responses=_REFUSED)
    def post(self, request: Request, id: str) -> Response:
        return self._refuse(request, id)


# --- on the event loop ---


async def create_and_await_running(request: asynchronous.Request) -> asynchronous.Response:
    """Create, then hold while it starts, 12 s at most; the view as it is then, whatever the status."""
    raw = await request.read(settings.BERTH.BODY_MAX)
    caller, new = request.caller, new_id("dbx")

    def create() -> str:
        parameters = validated(schemas.DevboxCreateParameters, parse_object(raw))
        return services.create_devbox(
            caller, parameters, raw_body=raw, request_id=request.request_id, route=services.CREATE_AND_WAIT, id=new
        )

    deadline = asyncio.get_running_loop().time() + CREATE_HOLD_SECONDS
    devbox_id = await hub.make(new, create, deadline)
    read = partial(selectors.access_devbox, caller, devbox_id)
    row = await hub.wait_until(devbox_id, read, _has_started, deadline, request.disconnected())
    return json_response(selectors.view(row))


def _has_started(row: selectors.DevboxRow) -> bool:
    return row.status not in _STARTING


async def wait_for_status(request: asynchronous.Request) -> asynchronous.Response:
    """Hold until it is in one of the statuses. Raises WaitTimedOut; WaitInterrupted when the server is stopped."""
    wanted = validated(schemas.DevboxWaitForStatusRequest, await request.json())
    statuses = frozenset(wanted["statuses"])
    asked = wanted.get("timeout_seconds")
    seconds = min(WAIT_DEFAULT_SECONDS if asked is None else asked, WAIT_MAX_SECONDS)
    deadline = asyncio.get_running_loop().time() + seconds
    devbox_id = request.params["id"]
    read = partial(selectors.access_devbox, request.caller, devbox_id)
    row = await hub.wait_until(devbox_id, read, lambda row: row.status in statuses, deadline, request.disconnected())
    if row.status not in statuses:
        now = f"devbox {devbox_id} is {row.status}"
        raise wait_over(deadline, f"after {seconds:g} s {now}", now)
    return json_response(selectors.view(row))


async def watch_evictions(request: asynchronous.Request) -> StreamResponse:
    """Nothing is ever taken away from an account here, so there is nothing but heartbeats."""
    headers = {"content-type": "text/event-stream", "cache-control": "no-store", "x-accel-buffering": "no"}
    account_id = request.caller.account_id
    cap = (await in_database(limits, account_id)).open_streams
    return StreamResponse(200, headers, CountedStream(account_id, cap, _heartbeats()))


async def _heartbeats() -> AsyncGenerator[bytes, None]:
    while not going_down.is_set():
        yield b": ping\n\n"
        try:
            await asyncio.wait_for(going_down.wait(), HEARTBEAT_SECONDS)
        except TimeoutError:
            continue
    yield b'event: error\ndata: {"code":408,"message":"the server restarts; connect again"}\n\n'


class CreateAndAwaitRunning(AsyncElsewhere):
    """Schema of `create_and_await_running`."""

    @extend_schema(
        operation_id="createAndAwaitRunningDevbox",
        summary="Create a devbox and wait for it to run",
        description="Holds 12 s at most, then answers with the devbox as it is.",
        tags=_TAGS,
        request=schemas.DevboxCreateParameters,
        responses=_VIEW,
    )
    def post(self, request: Request) -> Response:
        return self._elsewhere(request)  # type: ignore[no-any-return]


class WaitForStatus(AsyncElsewhere):
    """Schema of `wait_for_status`."""

    @extend_schema(
        operation_id="waitForDevboxStatus",
        summary="Wait for a devbox to reach one of some statuses",
        tags=_TAGS,
        request=schemas.DevboxWaitForStatusRequest,
        responses={
            **_VIEW,
            400: OpenApiResponse(description="No status, or one that does not exist, was given."),
            **_NOT_FOUND,
            408: OpenApiResponse(description="The time is over, or the server is being stopped; ask again."),
        },
    )
    def post(self, request: Request, id: str) -> Response:
        return self._elsewhere(request)  # type: ignore[no-any-return]


class WatchEvictions(AsyncElsewhere):
    """Schema of `watch_evictions`."""

    @extend_schema(
        operation_id="watchDevboxEvictions",
        summary="Be told of devboxes that will be taken away",
        description="An open stream of server-sent events with heartbeats; nothing is ever taken away here.",
        tags=_TAGS,
        responses={(200, "text/event-stream"): schemas.EvictionEvent},
    )
    def get(self, request: Request) -> Response:
        return self._elsewhere(request)  # type: ignore[no-any-return]
