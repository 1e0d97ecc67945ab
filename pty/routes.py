"""The URLs of terminals: async routes, the views that declare them in the schema, and the WebSocket."""

from django.urls import path, re_path

from api.asynchronous import Route
from pty import api, schemas
from pty.consumers import TerminalConsumer
from pty.web import terminal_view, ticket_view
from pty.web_consumer import WebTerminalConsumer

ASYNC_ROUTES: list[Route] = [
    Route("POST", "/v1/devboxes/{id}/create_pty_tunnel", api.create_pty_tunnel, "create_pty_tunnel"),
    Route("GET", "/pty/{session_name}", api.connect, "connect_pty_session"),
    Route("POST", "/pty/{session_name}/control", api.control, "control_pty_session"),
]

_WEB = "admin/devboxes/devbox/<str:devbox_id>/terminal/"

urlpatterns = [
    path(_WEB, terminal_view, name="web_terminal"),
    path(f"{_WEB}ticket/", ticket_view, name="web_terminal_ticket"),
    path("v1/devboxes/<str:id>/create_pty_tunnel", schemas.CreatePtyTunnel.as_view()),
    path("pty/<str:session_name>", schemas.PtySession.as_view()),
    path("pty/<str:session_name>/control", schemas.PtySessionControl.as_view()),
]

WEBSOCKET_ROUTES = [
    re_path(r"^/?pty/(?P<session_name>[^/]+)/attach$", TerminalConsumer.as_asgi()),
    re_path(
        r"^/?admin/devboxes/devbox/(?P<devbox_id>[^/]+)/terminal/(?P<session_name>[^/]+)/attach$",
        WebTerminalConsumer.as_asgi(),
    ),
]
