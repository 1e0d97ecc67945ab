"""``manage.py revoke_key KEY``: ends an API key at once."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from accounts.models import ApiKey
from accounts.services import revoke_key


class Command(BaseCommand):
    help = "Revoke an API key, by its id or by the prefix that the admin shows."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("key", help="key_… or the beginning of the secret (ak_…)")

    def handle(self, *args: Any, **options: Any) -> None:
        given = options["key"]
        found = ApiKey.objects.filter(pk=given) if given.startswith("key_") else ApiKey.objects.filter(prefix=given[:9])
        ids = list(found.values_list("pk", flat=True))
        if len(ids) != 1:
            raise CommandError(f"{len(ids)} keys match {given[:9]}…; name one by its id")
        self.stdout.write("revoked" if revoke_key(ids[0]) else "it was revoked already")
