"""`manage.py doctor`: look at all that an installation stands on, and say what to do."""

from __future__ import annotations

import sys
from typing import Any

from django.core.management.base import BaseCommand

from config import doctor


class Command(BaseCommand):
    """Prints a line for each thing looked at, with the cure below what is not well. Exits 1 if anything is bad."""

    help = "Check hosts, pools, S3, Redis, database, certificates and clocks, and say what to do about what is wrong."
    requires_system_checks: list[str] = []  # it tells them itself, with the rest

    def handle(self, *args: Any, **options: Any) -> None:
        """Look, and print while looking."""
        worst = 0
        styles = {"well": self.style.SUCCESS, "warning": self.style.WARNING, "bad": self.style.ERROR}
        for finding in doctor.examine():
            self.stdout.write(f"{styles[finding.verdict](f'{finding.verdict:8}')} {finding.what:14} {finding.said}")
            if finding.cure:
                self.stdout.write(f"{'':8} {'':14} → {finding.cure}")
            worst = max(worst, {"well": 0, "warning": 0, "bad": 1}[finding.verdict])
        if worst:
            sys.exit(worst)
