"""How a command's end is told: the reason kept in the row, and the sentence made of it for people.

In charge of the words. Not in charge of deciding that something ended.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any, Final

ASKED: Final = "asked"
"""`stop_why` of a stop that came through the API."""
DEVBOX_ENDING: Final = "devbox_ending"
"""`stop_why` of commands whose devbox is being torn down."""
DEVBOX_SUSPENDED: Final = "devbox_suspended"
"""`stop_why` of commands whose devbox is being suspended."""

_SENTENCES: Final = {
    ASKED: "it was killed on request",
    DEVBOX_ENDING: "its devbox ended",
    DEVBOX_SUSPENDED: "its devbox was suspended",
    "devbox_ended": "its devbox ended",
    "oom": "it ran out of memory",
    "killed": "it was killed from outside",
    "signal": "it was ended by a signal",
    "killed_before_start": "it was killed before it started",
    "lost": "it was lost",
    "exec_failed": "it could not be started",
}


def stopped_reason(
    stop_why: str | None, exit_status: int, reason: Mapping[str, object] | None
) -> dict[str, object] | None:
    """The reason to keep: a stop that was wanted explains a death, unless the command had ended well before it."""
    if stop_why is not None and exit_status != 0:
        return {"kind": stop_why, **({"reported": dict(reason)} if reason else {})}
    return dict(reason) if reason is not None else None


def signal_name(number: object) -> str:
    """A signal as people write it: its number and its name."""
    try:
        return f"{number} ({signal.Signals(int(str(number))).name})"
    except ValueError:
        return str(number)


def why(reason: Mapping[str, Any] | None) -> str | None:
    """One sentence for a reason; None when the exit status tells everything."""
    if reason is None:
        return None
    if reason.get("kind") == "signal":
        return f"it was ended by signal {signal_name(reason.get('signal'))}"
    sentence = _SENTENCES.get(str(reason.get("kind")), f"it ended: {reason.get('kind')}")
    detail = reason.get("detail")
    return f"{sentence}: {detail}" if detail else sentence
