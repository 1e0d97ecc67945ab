"""Keeping a host's row and its hostd up to date, whenever it is heard anew and with every report.

In charge of what `hello` tells: capacity, free memory and pool, boot id; of shipping the present bundle when another
one runs; of the number of warm boxes.
"""

from __future__ import annotations

import dataclasses
import logging

from django.conf import settings
from django.db import connection

from hosts import shipping
from hosts.client import HostClient, HostRefused

log = logging.getLogger(__name__)


class WrongHost(Exception):
    """What answers belongs to another cluster or is another host: nothing of it is believed or touched."""


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """What was found. `rebooted`: its boot id is not the one of the row; `upgraded`: hostd is about to be replaced."""

    rebooted: bool
    upgraded: bool


_NOTE = """
    UPDATE hosts_host h
       SET boot_id = %(boot_id)s, digest = %(digest)s, cpu_millis = %(cpu)s, memory_mb = %(memory)s, disk_mb = %(disk)s,
           memory_free_mb = %(memory_free)s, pool_free_mb = %(pool_free)s, seen_at = clock_timestamp(), lost_at = NULL
      FROM (SELECT id, boot_id FROM hosts_host WHERE id = %(id)s FOR UPDATE) before
     WHERE h.id = before.id AND h.state IN ('ready', 'retiring')
    RETURNING before.boot_id, h.warm, h.image_id
"""


def keep_up(client: HostClient) -> Kept:
    """Ask the host, note what it says, upgrade it if need be. Raises HostUnreachable, HostRefused, WrongHost."""
    hello = client.hello()
    cluster = settings.BERTH.cluster
    if hello["host"] != client.host_id or (cluster and hello["cluster"] != cluster):
        raise WrongHost(f"{hello['host']} of cluster {hello['cluster']} answers for {client.host_id}")
    with connection.cursor() as cursor:
        cursor.execute(
            _NOTE,
            {
                "id": client.host_id,
                "boot_id": hello["boot_id"],
                "digest": hello["digest"],
                "cpu": hello["cpus"] * 1000,
                "memory": hello["memory_bytes"] >> 20,
                "disk": hello["pool_bytes"] >> 20,
                "memory_free": hello["memory_free_bytes"] >> 20,
                "pool_free": hello["pool_free_bytes"] >> 20,
            },
        )
        row = cursor.fetchone()
    if row is None:
        raise WrongHost(f"host {client.host_id} is not in service any more")
    boot_before, warm, image = row
    rebooted = bool(boot_before) and boot_before != hello["boot_id"]
    upgraded = _upgrade(client, hello["digest"])
    if not upgraded and image:
        _try_warm(client, warm, image)
    return Kept(rebooted=rebooted, upgraded=upgraded)


def _upgrade(client: HostClient, running: str) -> bool:
    what = shipping.bundle()
    if running in (what.digest, ""):  # "": run from a source tree by somebody who knows why
        return False
    log.warning("host %s runs hostd %s, becoming %s", client.host_id, running[:12], what.digest[:12])
    client.ship(digest=what.digest, body=what.data)
    client.restart(digest=what.digest)
    return True


def _try_warm(client: HostClient, count: int, image: str) -> None:
    try:
        client.set_warm(count=count, image=image)
    except HostRefused as error:
        log.warning("host %s keeps no %d warm boxes: %s", client.host_id, count, error)
