"""Where the operations on devboxes are: plain ones and schemas in `urlpatterns`, those that wait in ASYNC_ROUTES."""

from api.asynchronous import Route
from api.waiting import hub
from devboxes import api, log_api
from devboxes.urls import urlpatterns

__all__ = ["ASYNC_ROUTES", "urlpatterns"]

hub.register("dbx", "devboxes_devbox")

ASYNC_ROUTES: list[Route] = [
    Route("POST", "/v1/devboxes/create_and_await_running", api.create_and_await_running, "create_and_await_running"),
    Route("POST", "/v1/devboxes/{id}/wait_for_status", api.wait_for_status, "wait_for_devbox", reads=True),
    Route("GET", "/v1/devboxes/evictions/watch", api.watch_evictions, "watch_evictions"),
    Route("GET", "/v1/devboxes/{id}/logs", log_api.list_logs, "list_logs"),
    Route("GET", "/v1/devboxes/{id}/logs/tail", log_api.tail_logs, "tail_logs"),
]
