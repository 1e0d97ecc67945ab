"""The web terminal's page in the admin, and the tickets that it asks for before it connects.

Not in charge of the connection (`pty.web_consumer`) or of what the page does (`static/pty/terminal.js`).
"""

from __future__ import annotations

from typing import Any, Final

from django.conf import settings
from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render
from django.views.decorators.http import require_GET, require_POST

from api.errors import BadRequest
from devboxes.models import Devbox
from pty import operators, sessions

SESSION: Final = "web"
# xterm.js writes the sizes of its cells and its colours into style elements.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def _devbox(request: HttpRequest, devbox_id: str) -> Devbox:
    if not operators.may_use(request.user):
        raise PermissionDenied
    devbox = Devbox.objects.filter(pk=devbox_id).select_related("account").first()
    if devbox is None:
        raise Http404
    return devbox


@require_GET
def terminal(request: HttpRequest, devbox_id: str) -> HttpResponse:
    """The page. `session`: another session than the page's own."""
    devbox = _devbox(request, devbox_id)
    try:
        session = sessions.checked_name(request.GET.get("session", SESSION))
    except BadRequest as error:
        return HttpResponse(error.message, status=400, content_type="text/plain")
    there = {"devbox": devbox, "session": session, "is_built": settings.WEB_FILES.is_dir()}
    answer = render(request, "pty/terminal.html", there)
    answer["Content-Security-Policy"] = POLICY
    answer["Referrer-Policy"] = "no-referrer"
    return answer


@require_POST
def ticket(request: HttpRequest, devbox_id: str) -> HttpResponse:
    """A ticket for one connection."""
    devbox = _devbox(request, devbox_id)
    if devbox.status != "running":
        return JsonResponse({"message": f"the devbox is {devbox.status}"}, status=409)
    user: Any = request.user
    return JsonResponse({"ticket": operators.make_ticket(user, devbox.pk)})


# Signed in to the admin, never cached, and for the POST with its token against forgery.
terminal_view = admin.site.admin_view(terminal)
ticket_view = admin.site.admin_view(ticket)
