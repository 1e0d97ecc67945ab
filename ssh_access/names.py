"""How a devbox is named in SSH: a host name below the domain, or part of the user name.

dbx-01k9….ssh.<domain>     the `url` of create_ssh_key: the TLS listener's server name
user+dbx_01k9…             on the plain port, and dbx_01k9… alone for the devbox's own user
"""

from __future__ import annotations

from api.ids import is_id

PREFIX = "dbx"


def host_name(devbox_id: str, domain: str) -> str:
    """The host name of a devbox. An id has an underscore, which a host name may not have."""
    return f"{devbox_id.replace('_', '-')}.ssh.{domain}"


def devbox_of_host(name: str) -> str | None:
    """The devbox that a host name is of; None when it is none's. Any domain will do: which one was meant is ours."""
    label, _, rest = name.lower().partition(".")
    devbox_id = label.replace("-", "_")
    return devbox_id if rest.startswith("ssh.") and is_id(PREFIX, devbox_id) else None


def devbox_of_user(name: str) -> tuple[str | None, str | None]:
    """(devbox, user) of a user name on the plain port; without a user the devbox's own is meant."""
    user, _, devbox_id = name.rpartition("+")
    if not is_id(PREFIX, devbox_id.lower()):
        return None, None
    return devbox_id.lower(), user or None
