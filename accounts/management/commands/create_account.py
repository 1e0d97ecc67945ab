"""``manage.py create_account NAME``: a new tenant."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from accounts.services import create_account


class Command(BaseCommand):
    help = "Make an account and print its id."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name")

    def handle(self, *args: Any, **options: Any) -> None:
        self.stdout.write(create_account(options["name"]).pk)
