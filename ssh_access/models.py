"""Keys that open a devbox to SSH, and the key that the SSH service itself is known by.

Of a user's key only the hash of its public part is kept; the private part was in the answer of create_ssh_key.
"""

from __future__ import annotations

from django.db import models
from django.db.models.functions import Now

from api.ids import new_id


def key_id() -> str:
    return new_id("ssk")


class SshKey(models.Model):
    """Opens one devbox, until it expires, the devbox ends, or the API key that made it does."""

    id = models.TextField(primary_key=True, default=key_id, editable=False)
    devbox = models.ForeignKey("devboxes.Devbox", on_delete=models.CASCADE, related_name="+", db_index=False)
    account_id = models.TextField()
    key_id = models.TextField(help_text="The API key that made it: when that one ends, so does this.")
    public_sha256 = models.BinaryField(help_text="Of the public key as it travels in SSH.")
    created_at = models.DateTimeField(db_default=Now(), editable=False)
    expires_at = models.DateTimeField()

    class Meta:
        verbose_name = "SSH key"
        indexes = [models.Index(fields=["expires_at"], name="ssh_key_expiry")]
        constraints = [models.UniqueConstraint(fields=["devbox", "public_sha256"], name="ssh_key_of_devbox")]

    def __str__(self) -> str:
        return f"{self.id} of {self.devbox_id}"


class HostKey(models.Model):
    """The one key that every SSH server of this installation shows: clients remember it."""

    id = models.SmallIntegerField(primary_key=True, default=1, editable=False)
    private_sealed = models.BinaryField()
    public = models.TextField(help_text="As it stands in a known_hosts file.")
    created_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        constraints = [models.CheckConstraint(condition=models.Q(id=1), name="one_ssh_host_key")]

    def __str__(self) -> str:
        return self.public
