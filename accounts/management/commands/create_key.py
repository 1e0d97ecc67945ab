"""``manage.py create_key ACCOUNT``: an API key, its secret printed once or written to a file of its owner's."""

from __future__ import annotations

import datetime
import os
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from accounts.models import Account, Member
from accounts.services import create_key


class Command(BaseCommand):
    help = "Make an API key for an account; its secret is shown once."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("account", help="the account's id (acc_…)")
        parser.add_argument("--name", default="", help="what to call the key")
        parser.add_argument("--member", help="the member (mem_…) who holds it")
        parser.add_argument("--read-only", action="store_true", help="the key may read but not change anything")
        parser.add_argument("--expires-in-days", type=float, help="days until the key ends; never if not given")
        parser.add_argument("--secret-file", help="write the secret to this new file, mode 0600, instead of the screen")

    def handle(self, *args: Any, **options: Any) -> None:
        if not Account.objects.filter(pk=options["account"]).exists():
            raise CommandError(f"there is no account {options['account']}")
        member = options["member"]
        if member and not Member.objects.filter(pk=member, account_id=options["account"]).exists():
            raise CommandError(f"{member} is no member of {options['account']}")
        days = options["expires_in_days"]
        expires_at = None
        if days is not None:
            if not 0 < days < 36500:
                raise CommandError("--expires-in-days must be more than 0 and less than 36500")
            expires_at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
        target = None
        if options["secret_file"]:
            try:
                target = os.open(options["secret_file"], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            except OSError as error:
                raise CommandError(f"--secret-file: {error}") from error
        key, secret = create_key(
            options["account"], options["name"], member=member, expires_at=expires_at, read_only=options["read_only"]
        )
        if target is None:
            self.stdout.write(secret)
        else:
            with os.fdopen(target, "w") as file:
                file.write(secret + "\n")
            self.stdout.write(key.pk)
