"""The keys by which a terminal is reached from outside: one row per call of create_pty_tunnel, for a day; one per
connection of the web terminal, for half a minute.

Of keys and tokens only hashes are kept. Sessions have no rows: the host knows them.
"""

from __future__ import annotations

from django.conf import settings
from django.db import models
from django.db.models.functions import Now

from api.ids import new_id


def tunnel_id() -> str:
    return new_id("ptt")


class PtyTunnel(models.Model):
    """Opens the terminals of one devbox, and nothing else, to who knows key and token."""

    id = models.TextField(primary_key=True, default=tunnel_id, editable=False)
    devbox = models.ForeignKey("devboxes.Devbox", on_delete=models.CASCADE, related_name="+")
    account_id = models.TextField()
    key_id = models.TextField(help_text="The API key that made it: when that one ends, so does this.")
    key_sha256 = models.BinaryField(unique=True)
    token_sha256 = models.BinaryField()
    created_at = models.DateTimeField(db_default=Now(), editable=False)
    expires_at = models.DateTimeField()

    class Meta:
        indexes = [models.Index(fields=["expires_at"], name="pty_tunnel_expiry")]

    def __str__(self) -> str:
        return f"{self.id} of {self.devbox_id}"


class WebTicket(models.Model):
    """Lets one page of the web terminal connect once: made for an operator and a devbox, used up within half a minute.

    Of the ticket only a hash is kept.
    """

    ticket_sha256 = models.BinaryField(unique=True)
    devbox = models.ForeignKey("devboxes.Devbox", on_delete=models.CASCADE, related_name="+")
    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="+")
    expires_at = models.DateTimeField()

    def __str__(self) -> str:
        return f"of {self.user_id} for {self.devbox_id}"
