"""Why a command ended as it did, when its exit status alone does not tell.

In charge of: the reason that goes with an exit. Not in charge of: noticing it, or when it is told (executions.py).
"""

from __future__ import annotations

import os

from hostd.execution import Execution
from hostd.memory import Memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def reason_of(execution: Execution, code: int, memory: Memory, *, box_ended: bool) -> dict[str, Any] | None:
    """Return the reason of an exit with `code`, None when there is nothing to add to it."""
    if execution.exec_error is not None and code in (125, 126, 127):
        return {"kind": "exec_failed", "detail": execution.exec_error}
    if execution.shell is not None and execution.shell.hung:
        return {"kind": "killed", "detail": "its shell carried out nothing any more and was ended"}
    if code == 137:
        kills = memory.kills() - execution.box_kills
        if kills > 0:
            detail = f"{kills} processes of the box were killed for lack of memory meanwhile"
            return {"kind": "oom", "detail": detail, "kills": kills, **memory.figures()}
        if box_ended:
            return {"kind": "killed", "detail": "the box stopped"}
    if execution.killed and code == 128 + execution.killed:
        return {"kind": "killed", "detail": f"signal {execution.killed} by request", "signal": execution.killed}
    if execution.status is not None and os.WIFSIGNALED(execution.status):
        return {"kind": "signal", "signal": os.WTERMSIG(execution.status)}
    return None
