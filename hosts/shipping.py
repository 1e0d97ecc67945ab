"""Putting hostd on a host over the admin login: files, the bundle by digest, starting it.

In charge of what is run as root on a host and how a file gets there whole or not at all. Over the link, a running
hostd replaces itself (`ship`, `restart`); this is for when there is none.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import posixpath
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from hostd.bundle import Bundle, build
from hosts.ssh import Admin, SshError
from hosts.ssh.admin import CommandFailed

PYTHON: Final = "/usr/bin/python3"
FILE_SECONDS: Final = 60.0
START_SECONDS: Final = 70.0

log = logging.getLogger(__name__)


class ShippingFailed(Exception):
    """A step on the host did not end as it should; the text says which, and what the host said."""


@functools.cache
def bundle() -> Bundle:
    """This checkout's hostd, packed once per process."""
    return build()


def bundle_path(root: str, digest: str) -> str:
    """Where a host keeps a bundle."""
    return posixpath.join(root, "bundles", f"{digest}.pyz")


# Arguments: path, mode, sha256. Verified before the rename, so a cut never leaves half a file under the name.
_PUT = """set -eu
umask 077
mkdir -p "$(dirname "$1")"
trap 'rm -f "$1.new.$$"' EXIT
cat > "$1.new.$$"
echo "$3  $1.new.$$" | sha256sum --check --status || { echo "what arrived has another sha256" >&2; exit 3; }
chmod "$2" "$1.new.$$"
mv -f "$1.new.$$" "$1"
trap - EXIT
"""


def put_file(admin: Admin, path: str, data: bytes, mode: str = "0644") -> None:
    """Write a file as root, whole or not at all. Raises ShippingFailed, or SshError when the way there breaks."""
    digest = hashlib.sha256(data).hexdigest()
    try:
        admin.run(["sh", "-c", _PUT, "put", path, mode, digest], timeout=FILE_SECONDS, body=data)
    except CommandFailed as error:
        raise ShippingFailed(f"{path} could not be written: {error}") from error


def put_bundle(admin: Admin, root: str, what: Bundle) -> str:
    """Have the bundle on the host, verified by its digest, and `current.pyz` point at it. Returns its path."""
    path = bundle_path(root, what.digest)
    check = 'echo "$2  $1" | sha256sum --check --status'
    try:
        admin.run(["sh", "-c", check, "check", path, what.digest], timeout=FILE_SECONDS)
    except CommandFailed:
        put_file(admin, path, what.data)
        _try_bundle(admin, path, what.digest)
    link = posixpath.join(root, "bundles", "current.pyz")
    try:
        # -T: never into what the link points at; by a rename, so it is never absent.
        point = 'ln -sfT "$1" "$2.new" && mv -fT "$2.new" "$2"'
        admin.run(["sh", "-c", point, "point", f"{what.digest}.pyz", link], timeout=FILE_SECONDS)
    except CommandFailed as error:
        raise ShippingFailed(f"{link} could not be set: {error}") from error
    return path


def _try_bundle(admin: Admin, path: str, digest: str) -> None:
    """A bundle that this host's Python cannot run is never made the current one."""
    try:
        said = json.loads(admin.run([PYTHON, "-I", path, "version"], timeout=FILE_SECONDS))
    except (CommandFailed, ValueError) as error:
        raise ShippingFailed(f"{PYTHON} on the host cannot run hostd: {error}") from error
    if said.get("digest") != digest:
        raise ShippingFailed(f"the host runs {said.get('digest')} where {digest} was shipped")


@contextlib.contextmanager
def staged(admin: Admin, what: Bundle) -> Iterator[str]:
    """The bundle in a temporary folder of the host, for commands that are not the install's own. Gives its path."""
    folder = admin.run(["mktemp", "-d", "-t", "berth-XXXXXX"], timeout=FILE_SECONDS).decode().strip()
    try:
        path = posixpath.join(folder, "hostd.pyz")
        put_file(admin, path, what.data)
        yield path
    finally:
        with contextlib.suppress(SshError, CommandFailed):  # what is left is small, and another error matters more
            admin.run(["rm", "-rf", "--", folder], timeout=FILE_SECONDS)


def run_hostd(
    admin: Admin,
    path: str,
    command: str,
    config: str,
    *options: str,
    timeout: float,
    body: bytes | Iterable[bytes] = b"",
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run one of hostd's commands as root, `body` being its input, and return its last line.

    Raises ShippingFailed with what it said, or SshError.
    """
    last: dict[str, Any] = {}

    def line(text: str) -> None:
        nonlocal last
        try:
            said = json.loads(text)
        except ValueError:
            return  # a library on the host printed something
        if isinstance(said, dict):
            last = said
            if on_progress is not None and "done" not in said and "error" not in said:
                on_progress(said)

    # -I: neither the login's environment nor its folder decides which modules are loaded.
    argv = [PYTHON, "-I", path, command, "--config", config, *options]
    failure: CommandFailed | None = None
    try:
        admin.run(argv, timeout=timeout, body=body, on_line=line)
    except CommandFailed as error:
        failure = error
    problem = last.get("error")
    if isinstance(problem, dict):
        raise ShippingFailed(f"{command}: {problem.get('message') or problem.get('code')}") from failure
    if failure is not None:
        raise ShippingFailed(f"{command}: {failure}") from failure
    if last.get("done") is not True:
        raise ShippingFailed(f"{command} ended without saying that it is done")
    return last


def start_hostd(admin: Admin, root: str, config: str, timeout: float = START_SECONDS) -> None:
    """Start the bundle that `current.pyz` names, as a daemon; one that answers already is left alone."""
    run_hostd(admin, posixpath.join(root, "bundles", "current.pyz"), "serve", config, "--detach", timeout=timeout)
