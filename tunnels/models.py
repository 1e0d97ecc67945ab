"""Tunnels: one row per devbox that has one. A devbox without a row is reached through no tunnel.

The key and the token are shown to their owner as often as asked, so they are kept sealed; what comes from outside is
found by hashes.
"""

from __future__ import annotations

from django.db import models
from django.db.models.functions import Now

from api.ids import new_id


def tunnel_id() -> str:
    return new_id("tun")


class Tunnel(models.Model):
    """Opens the TCP ports of one devbox to HTTP."""

    id = models.TextField(primary_key=True, default=tunnel_id, editable=False)
    devbox = models.OneToOneField("devboxes.Devbox", on_delete=models.CASCADE, related_name="+")
    sealed = models.BinaryField(help_text="Its key and its token.")
    key_sha256 = models.BinaryField(unique=True)
    token_sha256 = models.BinaryField(null=True, help_text="Null: open to everybody who knows the key.")
    http_keep_alive = models.BooleanField(help_text="Whether its traffic counts as use of the devbox.")
    wake_on_http = models.BooleanField(help_text="Whether its traffic resumes a suspended devbox.")
    created_at = models.DateTimeField(db_default=Now(), editable=False)

    def __str__(self) -> str:
        return f"{self.id} of {self.devbox_id}"
