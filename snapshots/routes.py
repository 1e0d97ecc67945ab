"""Where the operations on snapshots are. They come before a devbox's own, whose id could else be `disk_snapshots`."""

from django.urls import path

from api.asynchronous import Route
from api.waiting import hub
from snapshots import api

hub.register("snp", "snapshots_disksnapshot")

ASYNC_ROUTES: list[Route] = [
    Route("POST", "/v1/devboxes/{id}/snapshot_disk", api.snapshot_disk, "snapshot_disk"),
    Route("POST", "/v1/devboxes/{id}/snapshot_disk_async", api.snapshot_disk_async, "snapshot_disk_async"),
]

_SNAPSHOTS = "v1/devboxes/disk_snapshots"

urlpatterns = [
    path("v1/devboxes/<str:id>/snapshot_disk", api.SnapshotDisk.as_view()),
    path("v1/devboxes/<str:id>/snapshot_disk_async", api.SnapshotDiskAsync.as_view()),
    path(_SNAPSHOTS, api.Snapshots.as_view()),
    path(f"{_SNAPSHOTS}/list_public", api.PublicSnapshots.as_view()),
    path(f"{_SNAPSHOTS}/metadata/keys", api.MetadataKeys.as_view()),
    path(f"{_SNAPSHOTS}/metadata/keys/<path:key>/values", api.MetadataValues.as_view()),
    path(f"{_SNAPSHOTS}/public/metadata/keys", api.PublicMetadataKeys.as_view()),
    path(f"{_SNAPSHOTS}/public/metadata/keys/<path:key>/values", api.PublicMetadataValues.as_view()),
    path(f"{_SNAPSHOTS}/<str:id>", api.Snapshot.as_view()),
    path(f"{_SNAPSHOTS}/<str:id>/delete", api.Delete.as_view()),
    path(f"{_SNAPSHOTS}/<str:id>/status", api.Status.as_view()),
]
