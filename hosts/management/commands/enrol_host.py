"""`manage.py enrol_host`: take a machine into the cluster as a VM host."""

from __future__ import annotations

import pathlib
import sys
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from hosts.services import EnrolmentFailed, Wanted, enrol


class Command(BaseCommand):
    """Shows the host key, asks, and shows each step."""

    help = (
        "Make a machine a VM host: pin its host key, ship hostd, set up pool, network and image, prove it by a box. "
        "The login must be root or a user with `sudo` without a password. Repeat it after a failure."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        """The machine, how to get in, and what it gives."""
        parser.add_argument("--name", required=True, help="how the host is called here")
        parser.add_argument("--address", required=True)
        parser.add_argument("--port", type=int, default=22)
        parser.add_argument("--user", default="root", help="root, or a user who may sudo without a password")
        parser.add_argument("--key-file", required=True, help="the user's private key, without a passphrase")
        parser.add_argument("--host-key", help='the key to expect: "type base64", or its SHA256 fingerprint')
        parser.add_argument("--yes", action="store_true", help="take the host key as it is shown")
        parser.add_argument("--pool-gb", type=int, help="GiB of a file for the disks (60 %% of what is free, <= 200)")
        parser.add_argument("--pool-device", help="a block device for the disks instead; it is wiped")
        parser.add_argument("--install", type=int, help="the install number on that machine, 0..15 (the first free)")
        parser.add_argument("--root", help="the folder on that machine (/var/lib/berth-host/<install>)")
        parser.add_argument("--run-dir", help="its run-time folder (/run/berth-<install>)")
        parser.add_argument("--dns", action="append", default=[], help="a resolver for the boxes; may be repeated")
        parser.add_argument("--warm", type=int, default=0, help="boxes kept ready ahead of need")

    def handle(self, *args: Any, **options: Any) -> None:
        """Run it; a failure is told in one line and exits non-zero."""

        def accept(host_key: str, fingerprint: str) -> bool:
            self.stdout.write(f"host key: {host_key.split()[0]} {fingerprint}")
            expected = options["host_key"]
            if expected:
                return " ".join(expected.split()[:2]) == host_key or expected.strip() == fingerprint
            if options["yes"]:
                return True
            if not sys.stdin.isatty():
                self.stderr.write("nobody can be asked whether that is right: give --host-key, or --yes to take it")
                return False
            return input("is it that machine's? [y/N] ").strip().lower() in ("y", "yes")

        try:
            wanted = Wanted(
                name=options["name"],
                address=options["address"],
                port=options["port"],
                admin_user=options["user"],
                admin_key=pathlib.Path(options["key_file"]).read_text(),
                pool_gb=options["pool_gb"],
                pool_device=options["pool_device"],
                install=options["install"],
                dns=options["dns"],
                warm=options["warm"],
                root=options["root"],
                run_dir=options["run_dir"],
            )
            host = enrol(wanted, accept_key=accept, progress=self.stdout.write)
        except (OSError, EnrolmentFailed) as error:
            raise CommandError(str(error)) from error
        self.stdout.write(
            self.style.SUCCESS(
                f"{host.name} ({host.id}) is ready: {host.cpu_millis / 1000:g} CPUs, {host.memory_mb} MiB of memory, "
                f"{host.disk_mb} MiB of disk, image {host.image_id}"
            )
        )
