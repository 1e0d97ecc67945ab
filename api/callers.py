"""Who is calling, as every endpoint sees it. How a caller is recognised is the business of ``accounts``."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """An authenticated caller: a key of an account, held by a member or by the account itself.

    An operator (Django superuser) has no key and no account of its own; ``account_id`` is then the account it acts for.
    """

    account_id: str
    key_id: str | None = None
    member_id: str | None = None
    is_operator: bool = False
    read_only: bool = False

    @property
    def is_authenticated(self) -> bool:
        """For DRF, which keeps the caller as ``request.user``."""
        return True
