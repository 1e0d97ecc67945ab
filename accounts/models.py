"""Accounts, their members and their API keys. Rows change through ``accounts.services`` only."""

from __future__ import annotations

from django.db import models
from django.db.models.functions import Now

from api.ids import new_id


def account_id() -> str:
    return new_id("acc")


def member_id() -> str:
    return new_id("mem")


def key_id() -> str:
    return new_id("key")


class Account(models.Model):
    """A tenant. Everything a caller sees belongs to one; the caps are settings unless given here."""

    class Status(models.TextChoices):
        ENABLED = "enabled"
        DISABLED = "disabled"

    id = models.TextField(primary_key=True, default=account_id, editable=False)
    name = models.TextField()
    status = models.TextField(choices=Status.choices, default=Status.ENABLED)
    max_running_devboxes = models.PositiveIntegerField(null=True, blank=True)
    max_executions_at_once = models.PositiveIntegerField(null=True, blank=True)
    max_open_streams = models.PositiveIntegerField(null=True, blank=True)
    created_at = models.DateTimeField(db_default=Now(), editable=False)

    def __str__(self) -> str:
        return f"{self.name} ({self.pk})"


class Member(models.Model):
    """A person of an account."""

    id = models.TextField(primary_key=True, default=member_id, editable=False)
    account = models.ForeignKey(Account, on_delete=models.CASCADE, related_name="members")
    name = models.TextField()
    email = models.EmailField(blank=True)
    created_at = models.DateTimeField(db_default=Now(), editable=False)

    def __str__(self) -> str:
        return f"{self.name} ({self.pk})"


class ApiKey(models.Model):
    """A bearer key. Only the hash of its secret is kept; ``prefix`` is what a person recognises it by."""

    class Access(models.TextChoices):
        FULL = "full"
        READ_ONLY = "read_only"

    id = models.TextField(primary_key=True, default=key_id, editable=False)
    account = models.ForeignKey(Account, on_delete=models.CASCADE, related_name="keys")
    member = models.ForeignKey(Member, on_delete=models.CASCADE, related_name="keys", null=True, blank=True)
    name = models.TextField(blank=True)
    access = models.TextField(choices=Access.choices, default=Access.FULL)
    scopes = models.JSONField(null=True, blank=True)
    prefix = models.TextField(editable=False)
    secret_sha256 = models.BinaryField(unique=True, editable=False)
    created_at = models.DateTimeField(db_default=Now(), editable=False)
    expires_at = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True, editable=False)
    last_used_at = models.DateTimeField(null=True, blank=True, editable=False)

    class Meta:
        verbose_name = "API key"

    def __str__(self) -> str:
        return f"{self.prefix}… ({self.name or self.pk})"
