"""HTTP for snapshots: parse, ask for access, call one service or selector, answer.

In charge of status codes and the shape of requests. Not in charge of rules and writes (`snapshots.services`), reads
(`snapshots.selectors`).
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, Final

from django.conf import settings
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, OpenApiResponse, extend_schema
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from api import asynchronous
from api.asynchronous import in_database, json_response
from api.errors import ApiError, BadRequest
from api.ids import new_id
from api.pages import parse_page
from api.permissions import caller_of
from api.validation import check_metadata_key, parse_object, validated
from api.views import AsyncElsewhere
from api.waiting import hub, wait_over
from devboxes.queries import metadata_filters
from devboxes.schemas import MetadataKeysView, MetadataValuesView
from devboxes.selectors import access_devbox
from snapshots import schemas, selectors, services, states

HOLD_SECONDS: Final = 300.0
"""How long `snapshot_disk` holds; clients repeat it under the same x-request-id and come back to the same snapshot."""

_TAGS = ["Devbox"]
_VIEW = {200: schemas.DevboxDiskSnapshotView}
_NOT_FOUND = {404: OpenApiResponse(description="There is no such snapshot.")}
_LIST = [
    OpenApiParameter("devbox_id", OpenApiTypes.STR, description="Only those of this devbox."),
    OpenApiParameter("source_blueprint_id", OpenApiTypes.STR, description="Only those of this blueprint."),
    OpenApiParameter("metadata[key]", OpenApiTypes.STR, description="Only those with this value of the key."),
    OpenApiParameter("metadata[key][in]", OpenApiTypes.STR, description="Only those with one of these values."),
    OpenApiParameter("limit", OpenApiTypes.INT, description="How many to answer with: 20 if not given, at most 5000."),
    OpenApiParameter("starting_after", OpenApiTypes.STR, description="The last id of the page before."),
    OpenApiParameter("include_total_count", OpenApiTypes.BOOL, description="Whether to count all of them; true."),
]


class _Listing(APIView):
    public = False

    def _list(self, request: Request) -> Response:
        caller = caller_of(request)
        query = request.query_params
        devbox_id = query.get("devbox_id") or None
        if devbox_id is not None and not self.public:
            access_devbox(caller, devbox_id)
        filters = selectors.Filters(devbox_id, query.get("source_blueprint_id") or None, metadata_filters(query))
        listed = selectors.list_snapshots(caller, filters, parse_page(query), public=self.public)
        rows = [selectors.view(row) for row in listed.rows]
        answer: dict[str, Any] = {"snapshots": rows, "has_more": listed.has_more}
        if listed.total is not None:
            answer["total_count"] = listed.total
        return Response(answer)

    def _keys(self, request: Request) -> Response:
        return Response({"keys": selectors.metadata_keys(caller_of(request), public=self.public)})

    def _values(self, request: Request, key: str) -> Response:
        caller = caller_of(request)
        if not check_metadata_key(key):
            raise BadRequest("key: 1 to 128 characters of A-Z a-z 0-9 _ . / - are allowed")
        return Response({"key": key, "values": selectors.metadata_values(caller, key, public=self.public)})


class Snapshots(_Listing):
    """All snapshots of the account."""

    @extend_schema(
        operation_id="getDevboxDiskSnapshotList",
        summary="List snapshots",
        description="Newest first; neither failed nor deleted ones. `metadata[KEY]=VALUE` and `metadata[KEY][in]=A,B` "
        "narrow it to snapshots with that metadata.",
        tags=_TAGS,
        parameters=_LIST,
        responses={
            200: schemas.DevboxDiskSnapshotListView,
            404: OpenApiResponse(description="There is no such devbox."),
        },
    )
    def get(self, request: Request) -> Response:
        return self._list(request)


class PublicSnapshots(_Listing):
    """Snapshots that every account may create from."""

    public = True

    @extend_schema(
        operation_id="listPublicSnapshots",
        summary="List public snapshots",
        tags=_TAGS,
        parameters=_LIST,
        responses={200: schemas.DevboxDiskSnapshotListView},
    )
    def get(self, request: Request) -> Response:
        return self._list(request)


class MetadataKeys(_Listing):
    """Metadata keys of the account's snapshots."""

    @extend_schema(
        operation_id="getSnapshotMetadataKeys",
        summary="List the metadata keys in use on snapshots",
        tags=_TAGS,
        responses={200: MetadataKeysView},
    )
    def get(self, request: Request) -> Response:
        return self._keys(request)


class MetadataValues(_Listing):
    """Values of one metadata key of the account's snapshots."""

    @extend_schema(
        operation_id="getSnapshotMetadataValues",
        summary="List the values of a metadata key in use on snapshots",
        tags=_TAGS,
        responses={200: MetadataValuesView, 400: OpenApiResponse(description="That cannot be a metadata key.")},
    )
    def get(self, request: Request, key: str) -> Response:
        return self._values(request, key)


class PublicMetadataKeys(_Listing):
    """Metadata keys of public snapshots."""

    public = True

    @extend_schema(
        operation_id="getPublicSnapshotMetadataKeys",
        summary="List the metadata keys in use on public snapshots",
        tags=_TAGS,
        responses={200: MetadataKeysView},
    )
    def get(self, request: Request) -> Response:
        return self._keys(request)


class PublicMetadataValues(_Listing):
    """Values of one metadata key of public snapshots."""

    public = True

    @extend_schema(
        operation_id="getPublicSnapshotMetadataValues",
        summary="List the values of a metadata key in use on public snapshots",
        tags=_TAGS,
        responses={200: MetadataValuesView, 400: OpenApiResponse(description="That cannot be a metadata key.")},
    )
    def get(self, request: Request, key: str) -> Response:
        return self._values(request, key)


class Snapshot(APIView):
    """One snapshot."""

    @extend_schema(
        operation_id="updateDiskSnapshot",
        summary="Change a snapshot's name, message or metadata",
        description="A field that is left out or null stays as it is; an empty text or empty metadata clear. Given "
        "metadata replaces all of it.",
        tags=_TAGS,
        request=schemas.DevboxSnapshotRequest,
        responses={**_VIEW, **_NOT_FOUND},
    )
    def post(self, request: Request, id: str) -> Response:
        caller = caller_of(request)
        services.update_snapshot(caller, id, validated(schemas.DevboxSnapshotRequest, request.data))
        return Response(selectors.view(selectors.access_snapshot(caller, id)))


class Delete(APIView):
    """The end of a snapshot."""

    @extend_schema(
        operation_id="deleteSnapshot",
        summary="Delete a snapshot",
        description="As often as you like. Devboxes that were made of it keep their disks.",
        tags=_TAGS,
        request=None,
        responses={
            200: {"type": "object", "properties": {}},
            **_NOT_FOUND,
            409: OpenApiResponse(description="It is in progress, or failed."),
        },
    )
    def post(self, request: Request, id: str) -> Response:
        services.delete_snapshot(caller_of(request), id)
        return Response({})


class Status(APIView):
    """How a snapshot is."""

    @extend_schema(
        operation_id="queryDiskSnapshotAsync",
        summary="Get the status of a snapshot",
        tags=_TAGS,
        responses={200: schemas.DevboxSnapshotAsyncStatusView, **_NOT_FOUND},
    )
    def get(self, request: Request, id: str) -> Response:
        return Response(selectors.status_view(selectors.read_snapshot(caller_of(request), id)))


# --- on the event loop ---


def _create(request: asynchronous.Request, raw: bytes, route: str, new: str) -> str:
    parameters = validated(schemas.DevboxSnapshotRequest, parse_object(raw))
    return services.take_snapshot(
        request.caller,
        request.params["id"],
        parameters,
        raw_body=raw,
        request_id=request.request_id,
        route=route,
        id=new,
    )


async def snapshot_disk(request: asynchronous.Request) -> asynchronous.Response:
    """Take a snapshot and hold until it is complete. Raises WaitTimedOut after HOLD_SECONDS, ApiError if it failed."""
    raw = await request.read(settings.BERTH.BODY_MAX)
    deadline = asyncio.get_running_loop().time() + HOLD_SECONDS
    new = new_id("snp")
    snapshot_id = await hub.make(new, partial(_create, request, raw, "snapshot_disk", new), deadline)
    read = partial(selectors.access_snapshot, request.caller, snapshot_id)
    row = await hub.wait_until(snapshot_id, read, lambda row: row.over, deadline, request.disconnected())
    if not row.over:
        now = f"snapshot {snapshot_id} is in progress"
        raise wait_over(deadline, f"after {HOLD_SECONDS:g} s {now}; ask again", now)
    if row.status == states.ERROR:
        message = f"snapshot {snapshot_id} failed: {row.error_message}"
        raise ApiError(message, code="snapshot_failed", headers={"x-should-retry": "false"})
    return json_response(selectors.view(row))


async def snapshot_disk_async(request: asynchronous.Request) -> asynchronous.Response:
    """Begin a snapshot."""
    raw = await request.read(settings.BERTH.BODY_MAX)
    snapshot_id = await in_database(_create, request, raw, "snapshot_disk_async", new_id("snp"))
    return json_response(selectors.view(await in_database(selectors.access_snapshot, request.caller, snapshot_id)))


_TAKEN = {
    **_VIEW,
    400: OpenApiResponse(description="The devbox does not run."),
    404: OpenApiResponse(description="There is no such devbox."),
    429: OpenApiResponse(description="Too many snapshots of the account are in progress."),
}


class SnapshotDisk(AsyncElsewhere):
    """Schema of `snapshot_disk`."""

    @extend_schema(
        operation_id="createDiskSnapshot",
        summary="Take a snapshot of a devbox's disk and wait for it",
        description="Answers once the snapshot is complete: kept outside of its host, and read back. The devbox stands "
        "still for some milliseconds. A repetition with the same `x-request-id` waits for the same snapshot.",
        tags=_TAGS,
        request=schemas.DevboxSnapshotRequest,
        responses={
            **_TAKEN,
            408: OpenApiResponse(description="It takes longer; ask again with the same `x-request-id`."),
            500: OpenApiResponse(description="It failed; the message says why."),
        },
    )
    def post(self, request: Request, id: str) -> Response:
        return self._elsewhere(request)  # type: ignore[no-any-return]


class SnapshotDiskAsync(AsyncElsewhere):
    """Schema of `snapshot_disk_async`."""

    @extend_schema(
        operation_id="createDiskSnapshotAsync",
        summary="Begin a snapshot of a devbox's disk",
        description="Answers at once; its status tells when it is complete.",
        tags=_TAGS,
        request=schemas.DevboxSnapshotRequest,
        responses=_TAKEN,
    )
    def post(self, request: Request, id: str) -> Response:
        return self._elsewhere(request)  # type: ignore[no-any-return]
