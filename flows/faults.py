"""Dying on purpose: where the live tests kill a worker, to show that a row's life does not depend on one.

In charge of one switch. Off unless `BERTH_FAULT_FILE` names a file; then a worker that reaches a point whose name is in
that file removes the file and kills itself, as a power cut would. Points are `<queue>.<step>.claimed` (nothing done
yet) and `<queue>.<step>.acted` (the host has done it, no row says so).
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from django.conf import settings


def reach(queue: str, step: str, moment: str) -> None:
    """Die here if that is asked for."""
    if not settings.BERTH.FAULT_FILE:
        return
    switch = Path(settings.BERTH.FAULT_FILE)
    try:
        if switch.read_text().strip() != f"{queue}.{step}.{moment}":
            return
        switch.unlink()
    except FileNotFoundError:  # not armed, or another thread was first
        return
    os.kill(os.getpid(), signal.SIGKILL)
