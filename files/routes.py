"""The URLs of file operations: the async routes that serve them, and the views that declare them in the schema."""

from django.urls import path

from api.asynchronous import Route
from files import api, schemas

_DEVBOX = "/v1/devboxes/{id}"

ASYNC_ROUTES: list[Route] = [
    Route("POST", f"{_DEVBOX}/read_file_contents", api.read_file_contents, "read_file_contents", reads=True),
    Route("POST", f"{_DEVBOX}/write_file_contents", api.write_file_contents, "write_file_contents"),
    Route("POST", f"{_DEVBOX}/write_file", api.write_file_contents, "write_file"),
    Route("POST", f"{_DEVBOX}/upload_file", api.upload_file, "upload_file"),
    Route("POST", f"{_DEVBOX}/download_file", api.download_file, "download_file", reads=True),
]

urlpatterns = [
    path("v1/devboxes/<str:id>/read_file_contents", schemas.ReadFileContents.as_view()),
    path("v1/devboxes/<str:id>/write_file_contents", schemas.WriteFileContents.as_view()),
    path("v1/devboxes/<str:id>/write_file", schemas.WriteFile.as_view()),
    path("v1/devboxes/<str:id>/upload_file", schemas.UploadFile.as_view()),
    path("v1/devboxes/<str:id>/download_file", schemas.DownloadFile.as_view()),
]
