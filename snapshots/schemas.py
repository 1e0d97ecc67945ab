"""What the operations on snapshots take and answer, for validation and the document."""

from __future__ import annotations

from typing import Any

from rest_framework import serializers

from api.validation import INT64_MAX, MetadataField, StrictSerializer, TextField
from snapshots import states

NAME_MAX = 255
MESSAGE_MAX = 1000


class DevboxSnapshotRequest(StrictSerializer):
    """How a snapshot is called and described."""

    commit_message = TextField(required=False, allow_null=True, allow_blank=True, max_length=MESSAGE_MAX)
    metadata = MetadataField(required=False, allow_null=True)
    name = TextField(required=False, allow_null=True, allow_blank=True, max_length=NAME_MAX)


class DevboxDiskSnapshotView(serializers.Serializer[Any]):
    """A snapshot. Times are Unix milliseconds."""

    id = serializers.CharField()
    name = serializers.CharField(required=False, allow_null=True)
    create_time_ms = serializers.IntegerField(max_value=INT64_MAX, min_value=0)
    metadata = MetadataField()
    source_devbox_id = serializers.CharField()
    source_blueprint_id = serializers.CharField(required=False, allow_null=True)
    commit_message = serializers.CharField(required=False, allow_null=True)
    size_bytes = serializers.IntegerField(
        max_value=INT64_MAX,
        min_value=0,
        required=False,
        allow_null=True,
        help_text="Of the disk, beyond the base image; null until it is taken.",
    )
    freeze_ms = serializers.FloatField(
        required=False, allow_null=True, help_text="How long the devbox stood still for it. Not in the contract."
    )


class DevboxDiskSnapshotListView(serializers.Serializer[Any]):
    """A page of snapshots, newest first."""

    snapshots = DevboxDiskSnapshotView(many=True)
    has_more = serializers.BooleanField()
    total_count = serializers.IntegerField(required=False, allow_null=True)


class DevboxSnapshotAsyncStatusView(serializers.Serializer[Any]):
    """How a snapshot is. `complete` is said once all of it has been read back from where it is kept."""

    status = serializers.ChoiceField(choices=states.STATUSES)
    error_message = serializers.CharField(required=False, allow_null=True)
    snapshot = DevboxDiskSnapshotView(required=False, allow_null=True)
