"""How much an account may have at once."""

from __future__ import annotations

import dataclasses

from django.conf import settings

from accounts.models import Account


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    running_devboxes: int
    executions_at_once: int
    open_streams: int


def limits(account_id: str) -> Limits:
    """The caps of an account: its own where it has some, else the settings'."""
    row = (
        Account.objects.filter(pk=account_id)
        .values_list("max_running_devboxes", "max_executions_at_once", "max_open_streams")
        .first()
    ) or (None, None, None)
    own = settings.BERTH
    return Limits(
        running_devboxes=own.CAP_RUNNING_DEVBOXES if row[0] is None else row[0],
        executions_at_once=own.CAP_EXECUTIONS if row[1] is None else row[1],
        open_streams=own.CAP_STREAMS if row[2] is None else row[2],
    )
