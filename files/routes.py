"""The URLs of file operations: the async routes that serve them, and the views that declare them in the schema."""

from django.urls import path

from api.asynchronous import Handler, Route
from files import api, schemas


def _route(operation: str, handler: Handler, *, reads: bool = False) -> Route:
    return Route("POST", f"/v1/devboxes/{{id}}/{operation}", handler, operation, reads, api.context_of)


ASYNC_ROUTES: list[Route] = [
    _route("read_file_contents", api.read_file_contents, reads=True),
    _route("write_file_contents", api.write_file_contents),
    _route("write_file", api.write_file_contents),
    _route("upload_file", api.upload_file),
    _route("download_file", api.download_file, reads=True),
]

urlpatterns = [
    path("v1/devboxes/<str:id>/read_file_contents", schemas.ReadFileContents.as_view()),
    path("v1/devboxes/<str:id>/write_file_contents", schemas.WriteFileContents.as_view()),
    path("v1/devboxes/<str:id>/write_file", schemas.WriteFile.as_view()),
    path("v1/devboxes/<str:id>/upload_file", schemas.UploadFile.as_view()),
    path("v1/devboxes/<str:id>/download_file", schemas.DownloadFile.as_view()),
]
