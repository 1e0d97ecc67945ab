"""`manage.py retire_host`: give a machine back."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from hosts.services import EnrolmentFailed, retire


class Command(BaseCommand):
    """Refuses while devboxes are there, unless forced."""

    help = "Take a VM host out of the cluster and every trace of Berth, but system packages, off the machine."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Which, and whether devboxes may be lost."""
        parser.add_argument("name")
        parser.add_argument("--force", action="store_true", help="lose its devboxes; give up an unreachable machine")

    def handle(self, *args: Any, **options: Any) -> None:
        """Run it; a failure is told in one line and exits non-zero."""
        try:
            host = retire(options["name"], force=options["force"], progress=self.stdout.write)
        except EnrolmentFailed as error:
            raise CommandError(str(error)) from error
        self.stdout.write(self.style.SUCCESS(f"{host.name} ({host.id}) is retired"))
