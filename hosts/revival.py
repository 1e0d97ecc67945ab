"""Starting a dead hostd again: whoever is refused by its socket does it, one at a time for the whole cluster.

In charge of the lock and of the admin login's part. Nothing on the host dies with hostd: keepers hold every pipe, and
the new one finds them again. Boxes of a host that was rebooted are another matter (`hosts.reconcile`).
"""

from __future__ import annotations

import logging
import time

from django.db import connection

from accounts.sealing import SealBroken, unseal
from hosts import shipping
from hosts.errors import HostUnreachable
from hosts.ssh import Admin, Login, SshError

log = logging.getLogger(__name__)

_LOCK_SPACE = 0x42455254  # ours among PostgreSQL's advisory locks
PAUSE_SECONDS = 3.0
"""A revival that failed is not tried again by this process for so long."""
_failed_at: dict[str, float] = {}


def revive(host_id: str, deadline: float) -> bool:
    """Have hostd started (the present bundle, shipped if the host lacks it), within the deadline (monotonic clock).

    False: somebody else is at it, so try the socket again. Raises HostUnreachable when it cannot be done.
    """
    since = time.monotonic() - _failed_at.get(host_id, -PAUSE_SECONDS)
    if since < PAUSE_SECONDS:
        raise HostUnreachable(host_id, f"hostd does not answer; starting it failed {since:.1f} s ago")
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_try_advisory_lock(%s, hashtext(%s))", [_LOCK_SPACE, host_id])
        if not cursor.fetchone()[0]:
            return False
        try:
            cursor.execute(
                "SELECT address, port, admin_user, admin_key_sealed, host_key, root FROM hosts_host"
                " WHERE id = %s AND state IN ('ready', 'retiring', 'enrolling')",
                [host_id],
            )
            row = cursor.fetchone()
            if row is None:
                raise HostUnreachable(host_id, "no such host, or it is retired")
            digest = _start(host_id, row, deadline)
            cursor.execute(
                "UPDATE hosts_host SET digest = %s WHERE id = %s AND digest <> %s", [digest, host_id, digest]
            )
            _failed_at.pop(host_id, None)
        except HostUnreachable:
            _failed_at[host_id] = time.monotonic()
            raise
        finally:
            cursor.execute("SELECT pg_advisory_unlock(%s, hashtext(%s))", [_LOCK_SPACE, host_id])
    return True


def _start(host_id: str, row: tuple[str, int, str, bytes, str, str], deadline: float) -> str:
    address, port, user, sealed, host_key, root = row
    log.warning("host %s: hostd does not answer, starting it over the admin login", host_id)
    try:
        login = Login(address, port, user, str(unseal(sealed)), host_key)
        with Admin(login, timeout=max(0.1, deadline - time.monotonic())) as admin:
            what = shipping.bundle()
            shipping.put_bundle(admin, root, what)
            shipping.start_hostd(admin, root, f"{root}/host.json", timeout=max(0.1, deadline - time.monotonic()))
            return what.digest
    except (SshError, shipping.ShippingFailed, SealBroken) as error:
        raise HostUnreachable(host_id, f"hostd does not answer and could not be started: {error}") from error
