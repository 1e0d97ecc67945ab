"""What the file operations take and answer, as DRF serializers: field rules and the OpenAPI document."""

from __future__ import annotations

from typing import Any

from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, OpenApiResponse, extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from api.schema import problem
from api.validation import StrictSerializer, TextField
from api.views import AsyncElsewhere

_PATH = "Absolute, or from the user's home, which `~` stands for, too."


class DevboxReadFileParameters(StrictSerializer):
    """Which file."""

    file_path = TextField(allow_blank=False, help_text=_PATH)


class DevboxWriteFileParameters(StrictSerializer):
    """Which file, and its new contents."""

    file_path = TextField(allow_blank=False, help_text=_PATH)
    contents = TextField(help_text="All of it.")


class DevboxDownloadFileParameters(StrictSerializer):
    """Which file."""

    path = TextField(allow_blank=False, help_text=_PATH)


class FileUpload(serializers.Serializer[Any]):
    """The two parts of the form, in any order."""

    path = serializers.CharField(help_text=_PATH)
    file = serializers.FileField(required=False, help_text="The contents; without it the file will be empty.")


class FileWritten(serializers.Serializer[Any]):
    """The shape of a command's end, with nothing to say."""

    devbox_id = serializers.CharField()
    stdout = serializers.CharField()
    stderr = serializers.CharField()
    exit_status = serializers.IntegerField()
    shell_name = serializers.CharField(required=False, allow_null=True)

    class Meta:
        ref_name = "DevboxFileWrittenView"


_ERRORS = {
    400: problem("The path names no file that the devbox's user may use so, or the devbox is not running."),
    404: problem("No such devbox, or no such file in it."),
    503: problem("The devbox's host does not answer at the moment."),
}
_RANGE = OpenApiParameter(
    "Range", str, OpenApiParameter.HEADER, description="One range of bytes, answered with 206: `bytes=100-199`."
)


class ReadFileContents(AsyncElsewhere):
    """Declares POST /v1/devboxes/{id}/read_file_contents."""

    @extend_schema(
        operation_id="devboxReadFileContents",
        summary="Read a text file.",
        description="UTF-8 up to 100 MB; download_file takes any other.",
        request=DevboxReadFileParameters,
        responses={(200, "text/plain"): OpenApiTypes.STR, **_ERRORS},
    )
    def post(self, request: Request, id: str) -> Response:
        """Declared only."""
        return self._elsewhere(request)  # type: ignore[no-any-return]


class WriteFileContents(AsyncElsewhere):
    """Declares POST /v1/devboxes/{id}/write_file_contents."""

    @extend_schema(
        operation_id="devboxWriteFileContents",
        summary="Write a text file.",
        description="Made with its directories, or replaced at once and whole. Up to 100 MB; upload_file takes more.",
        request=DevboxWriteFileParameters,
        responses={200: FileWritten, 413: problem("Over 100 MB: use upload_file."), **_ERRORS},
    )
    def post(self, request: Request, id: str) -> Response:
        """Declared only."""
        return self._elsewhere(request)  # type: ignore[no-any-return]


class WriteFile(AsyncElsewhere):
    """Declares POST /v1/devboxes/{id}/write_file."""

    @extend_schema(
        operation_id="devboxWriteFile",
        summary="Write a text file: the older name of write_file_contents.",
        deprecated=True,
        request=DevboxWriteFileParameters,
        responses={200: FileWritten, 413: problem("Over 100 MB: use upload_file."), **_ERRORS},
    )
    def post(self, request: Request, id: str) -> Response:
        """Declared only."""
        return self._elsewhere(request)  # type: ignore[no-any-return]


class UploadFile(AsyncElsewhere):
    """Declares POST /v1/devboxes/{id}/upload_file."""

    @extend_schema(
        operation_id="devboxUploadFile",
        summary="Upload a file.",
        description="Of any size, made with its directories, or replaced at once and whole when all of it has arrived.",
        request={"multipart/form-data": FileUpload},
        responses={200: OpenApiTypes.OBJECT, **_ERRORS},
    )
    def post(self, request: Request, id: str) -> Response:
        """Declared only."""
        return self._elsewhere(request)  # type: ignore[no-any-return]


class DownloadFile(AsyncElsewhere):
    """Declares POST /v1/devboxes/{id}/download_file."""

    @extend_schema(
        operation_id="devboxDownloadFile",
        summary="Download a file.",
        description="Of any size.",
        request=DevboxDownloadFileParameters,
        parameters=[
            _RANGE,
            OpenApiParameter("Content-Type", str, OpenApiParameter.HEADER, response=[200], required=True),
            OpenApiParameter("Content-Disposition", str, OpenApiParameter.HEADER, response=[200], required=True),
        ],
        responses={
            (200, "application/octet-stream"): OpenApiTypes.BINARY,
            206: OpenApiResponse(description="The range that was asked for."),
            416: problem("The file has no such range."),
            **_ERRORS,
        },
    )
    def post(self, request: Request, id: str) -> Response:
        """Declared only."""
        return self._elsewhere(request)  # type: ignore[no-any-return]
