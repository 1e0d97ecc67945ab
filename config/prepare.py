"""The steps of ``make up`` and of its stop that need Django: rows, the bucket, the host.  ``python -m config.prepare
VERB``.

In charge of making them once and finding them again: every verb may run any number of times.  Prints progress as
lines that begin with ``# `` and ends with one JSON line of facts, secrets that were made now among them;
``config.up`` puts those into files. Not in charge of processes.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: The account that ``make up`` makes for the person at this machine, its key, and the operator of the admin.
ACCOUNT, KEY, OPERATOR = "local", "make up", "operator"

#: The name of this machine among the VM hosts.
HOST = "local"

#: How long the shut down devboxes may take together, in seconds.
END_WITHIN = 60.0

#: How long this machine's hostd may take to answer after a start, in seconds.
WAKE_WITHIN = 60.0


def say(text: str) -> None:
    """A progress line for the supervisor to show."""
    sys.stdout.write(f"# {text}\n")
    sys.stdout.flush()


def database(options: argparse.Namespace) -> dict[str, Any]:
    """Migrations, the bucket, the account with its key, the operator, and the key that the SSH service shows."""
    from django.core.management import call_command
    from django.db import connection, transaction
    from django.db.migrations.executor import MigrationExecutor

    from ssh_access.services import host_key
    from storage import objects

    executor = MigrationExecutor(connection)
    missing = executor.migration_plan(executor.loader.graph.leaf_nodes())
    if missing:
        say(f"{len(missing)} migrations to apply")
        call_command("migrate", interactive=False, verbosity=0)
    objects.ensure_bucket()
    with transaction.atomic():
        facts = _account(options.key_sha256) | _operator(options.admin_known)
    return facts | {"ssh_host_key": host_key()[1]}


def _account(key_sha256: str | None) -> dict[str, Any]:
    from accounts.models import Account, ApiKey, Member
    from accounts.services import create_account, create_key, create_member

    account = Account.objects.filter(name=ACCOUNT).order_by("created_at").first()
    if account is None:
        account = create_account(ACCOUNT)
        create_member(account.pk, OPERATOR)
        say(f"account {account.pk} made")
    facts = {"account_id": account.pk}
    alive = key_sha256 and ApiKey.objects.filter(
        account=account, secret_sha256=bytes.fromhex(key_sha256), revoked_at=None, expires_at=None
    )
    if alive and alive.exists():
        return facts
    member = Member.objects.filter(account=account).order_by("created_at").first()
    row, secret = create_key(account.pk, KEY, member=member.pk if member else None)
    say(f"API key {row.prefix}… made")
    return facts | {"api_key": secret}


def _operator(known: bool) -> dict[str, Any]:
    from django.contrib.auth import get_user_model

    users: Any = get_user_model().objects
    operator = users.filter(username=OPERATOR).first()
    if operator is not None and known:
        return {"admin_user": OPERATOR}
    password = secrets.token_urlsafe(15)
    if operator is None:
        users.create_superuser(OPERATOR, password=password)
        say("operator of the admin made")
    else:
        operator.set_password(password)
        operator.save(update_fields=["password"])
        say("operator of the admin given a new password: the old one's file is gone")
    return {"admin_user": OPERATOR, "admin_password": password}


def host(options: argparse.Namespace) -> dict[str, Any]:
    """This machine as VM host: enrolled over the loopback sshd like any other, or woken when it is one already."""
    from hosts.models import Host, HostState

    row = Host.objects.filter(name=HOST).exclude(state=HostState.RETIRED).first()
    if row is not None and row.state == HostState.READY:
        return _wake(row.pk, options.port)
    from django.conf import settings

    from hosts.services import EnrolmentFailed, Wanted, enrol

    expected = Path(f"{options.host_key_file}.pub").read_text().split()[:2]
    wanted = Wanted(
        name=HOST,
        address="127.0.0.1",
        port=options.port,
        admin_key=Path(options.key_file).read_text(),
        root=options.root,
        pool_gb=options.pool_gb,
        warm=settings.BERTH.warm,
    )
    try:
        enrolled = enrol(wanted, accept_key=lambda key, _: key.split()[:2] == expected, progress=say)
    except EnrolmentFailed as failure:
        sys.exit(f"enrolling this machine: {failure}")
    return {"host_id": enrolled.pk}


def _wake(host_id: str, port: int) -> dict[str, Any]:
    """Have hostd answer: the first call that finds it dead starts it, with this checkout's code."""
    from hosts import links
    from hosts.client import HostUnreachable, client_for
    from hosts.models import Host

    if Host.objects.filter(pk=host_id).exclude(port=port).update(port=port):
        links.forget(host_id)
    deadline = time.monotonic() + WAKE_WITHIN
    while True:
        try:
            client_for(host_id).hello()
            return {"host_id": host_id}
        except HostUnreachable as error:
            if time.monotonic() > deadline:
                sys.exit(f"this machine's hostd does not answer within {WAKE_WITHIN:g} s: {error.reason}")
            time.sleep(0.3)


def end_devboxes(options: argparse.Namespace) -> dict[str, Any]:
    """Shut down every devbox of this machine and wait until nothing of them is left; the workers do it."""
    from django.db.models import Q

    from devboxes.models import Devbox
    from devboxes.services import request_shutdown
    from hosts.models import Host, HostState

    here = Q(host__name=HOST)
    if not Host.objects.filter(state=HostState.READY).exclude(name=HOST).exists():
        here |= Q(host=None)  # those that wait for a place: nobody else could give them one
    ended = 0
    for devbox_id in Devbox.objects.filter(here, ended_at=None).values_list("pk", flat=True):
        ended += request_shutdown(devbox_id, why="the machine that it ran on was stopped")
    left = Devbox.objects.filter(here, completed_at=None)
    deadline = time.monotonic() + END_WITHIN
    while (count := left.count()) and time.monotonic() < deadline:
        time.sleep(0.1)
    if count:
        say(f"{count} devboxes were not taken apart within {END_WITHIN:g} s; their processes are ended all the same")
    return {"ended": ended, "left": count}


VERBS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "database": database,
    "host": host,
    "end_devboxes": end_devboxes,
}


def main() -> None:
    """Run one verb with Django ready."""
    import os

    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
    import django

    parser = argparse.ArgumentParser(prog="python -m config.prepare")
    parser.add_argument("verb", choices=sorted(VERBS))
    parser.add_argument("--key-sha256", help="digest of the key that the state folder holds")
    parser.add_argument("--admin-known", action="store_true", help="the state folder holds the operator's password")
    parser.add_argument("--port", type=int, help="where the loopback sshd listens")
    parser.add_argument("--key-file", help="the private key that enrols this machine")
    parser.add_argument("--host-key-file", help="the loopback sshd's own key: the one to find there")
    parser.add_argument("--root", help="the host's folder, when not the usual one")
    parser.add_argument("--pool-gb", type=int, help="size of the pool of disks, when not the usual one")
    options = parser.parse_args()
    django.setup()
    began = time.monotonic()
    try:
        facts = VERBS[options.verb](options)
    except Exception as error:
        # The whole of it for the log, and a last line that says it all: that is what the supervisor shows.
        traceback.print_exc()
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
    sys.stdout.write(json.dumps(facts | {f"{options.verb}_seconds": round(time.monotonic() - began, 2)}) + "\n")


if __name__ == "__main__":
    main()
