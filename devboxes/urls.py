"""The URLs of devboxes. Literal paths stand before `{id}`, or an operation's name would be taken for a devbox."""

from django.urls import path

from devboxes import api, log_api, usage, why

urlpatterns = [
    path("v1/devboxes", api.Devboxes.as_view()),
    path("v1/devboxes/create_and_await_running", api.CreateAndAwaitRunning.as_view()),
    path("v1/devboxes/metadata/keys", api.MetadataKeys.as_view()),
    path("v1/devboxes/metadata/keys/<path:key>/values", api.MetadataValues.as_view()),
    path("v1/devboxes/evictions/watch", api.WatchEvictions.as_view()),
    path("v1/devboxes/<str:id>", api.Devbox.as_view()),
    path("v1/devboxes/<str:id>/shutdown", api.Shutdown.as_view()),
    path("v1/devboxes/<str:id>/suspend", api.Suspend.as_view()),
    path("v1/devboxes/<str:id>/resume", api.Resume.as_view()),
    path("v1/devboxes/<str:id>/keep_alive", api.KeepAlive.as_view()),
    path("v1/devboxes/<str:id>/wait_for_status", api.WaitForStatus.as_view()),
    path("v1/devboxes/<str:id>/why", why.Why.as_view()),
    path("v1/devboxes/<str:id>/usage", usage.Usage.as_view()),
    path("v1/devboxes/<str:id>/logs", log_api.Logs.as_view()),
    path("v1/devboxes/<str:id>/logs/tail", log_api.TailLogs.as_view()),
    path("v1/devboxes/<str:id>/create_gateway_token", api.CreateGatewayToken.as_view()),
    path("v1/devboxes/<str:id>/create_mcp_token", api.CreateMcpToken.as_view()),
]
