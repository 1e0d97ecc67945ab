"""The URL of SSH keys: the async route and the view that declares it in the schema."""

from django.urls import path

from api.asynchronous import Route
from ssh_access import api, schemas

ASYNC_ROUTES: list[Route] = [
    Route("POST", "/v1/devboxes/{id}/create_ssh_key", api.create_ssh_key, "create_ssh_key"),
]

urlpatterns = [path("v1/devboxes/<str:id>/create_ssh_key", schemas.CreateSshKey.as_view())]
