"""The URLs of executions: the async routes that serve them, and the views that declare them in the schema."""

from django.urls import path

from api.asynchronous import Route
from api.waiting import hub
from executions import api, listing, schemas, why

_DEVBOX = "/v1/devboxes/{id}"
_EXECUTION = "/v1/devboxes/{devbox_id}/executions/{execution_id}"

hub.register("exe", "executions_execution")

ASYNC_ROUTES: list[Route] = [
    Route("POST", f"{_DEVBOX}/execute", api.execute, "execute"),
    Route("POST", f"{_DEVBOX}/execute_async", api.execute_async, "execute_async"),
    Route("POST", f"{_DEVBOX}/execute_sync", api.execute_sync, "execute_sync"),
    Route("GET", _EXECUTION, api.get, "get_execution"),
    Route("POST", f"{_EXECUTION}/wait_for_status", api.wait_for_status, "wait_for_execution", reads=True),
    Route("POST", f"{_EXECUTION}/kill", api.kill, "kill_execution"),
    Route("POST", f"{_EXECUTION}/send_std_in", api.send_std_in, "send_std_in"),
    Route("GET", f"{_EXECUTION}/stream_stdout_updates", api.stream_stdout_updates, "stream_stdout_updates"),
    Route("GET", f"{_EXECUTION}/stream_stderr_updates", api.stream_stderr_updates, "stream_stderr_updates"),
]

_EXECUTION_URL = "v1/devboxes/<str:devbox_id>/executions/<str:execution_id>"

urlpatterns = [
    path("v1/devboxes/<str:id>/execute", schemas.Execute.as_view()),
    path("v1/devboxes/<str:id>/execute_async", schemas.ExecuteAsync.as_view()),
    path("v1/devboxes/<str:id>/execute_sync", schemas.ExecuteSync.as_view()),
    path("v1/devboxes/<str:id>/executions", listing.Executions.as_view()),
    path(_EXECUTION_URL, schemas.Execution.as_view()),
    path(f"{_EXECUTION_URL}/why", why.Why.as_view()),
    path(f"{_EXECUTION_URL}/wait_for_status", schemas.WaitForStatus.as_view()),
    path(f"{_EXECUTION_URL}/kill", schemas.Kill.as_view()),
    path(f"{_EXECUTION_URL}/send_std_in", schemas.SendStdIn.as_view()),
    path(f"{_EXECUTION_URL}/stream_stdout_updates", schemas.StreamStdoutUpdates.as_view()),
    path(f"{_EXECUTION_URL}/stream_stderr_updates", schemas.StreamStderrUpdates.as_view()),
]
