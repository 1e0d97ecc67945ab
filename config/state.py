"""The state folder of one installation: its paths, its settings file, its ports, and the list of what it changed on
the machine.

In charge of every file that sits directly in the folder (``env``, ``traces.json``, ``packages``), of finding free
ports, and of the unprivileged user that the private servers run as.  Not in charge of what the servers keep below it
(``config.servers``), nor of reading settings for Django (``config.env``, which reads the same ``env`` file).

Nothing here imports Django: the folder must be readable when there is no database yet, and when everything is being
taken away.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pwd
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_STATE = Path("/var/lib/berth")
CHECKOUT = Path(__file__).resolve().parent.parent

#: A Unix socket's path ends at 107 bytes; the longest that we make below the folder is ``postgres/run/.s.PGSQL.65535``.
_LONGEST_STATE_PATH = 107 - len("/postgres/run/.s.PGSQL.65535")

#: Ports are looked for below the range from which the kernel picks for outgoing connections, so that one that was free
#: when it was recorded is not taken by a client's connection at the next start.
_PORTS = range(20_000, 32_000)


class StateError(RuntimeError):
    """The folder cannot be used; the message says why and what to do."""


def process_environment() -> dict[str, str]:
    """The variables that this process was started with, empty ones left out.

    For the commands that make and find an installation, which run before there are settings; everything else reads
    ``config.env``.
    """
    return {name: value for name, value in os.environ.items() if value}


@dataclass(frozen=True)
class Owner:
    """An operating-system user that processes and files can be given to."""

    name: str
    uid: int
    gid: int

    @classmethod
    def named(cls, name: str) -> Owner | None:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            return None
        return cls(name, entry.pw_uid, entry.pw_gid)


class State:
    """One installation's folder.  Two installations on one machine have two folders and share nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        if len(str(self.path)) > _LONGEST_STATE_PATH:
            raise StateError(
                f"the state folder's path is {len(str(self.path))} characters long and sockets below it allow "
                f"{_LONGEST_STATE_PATH}: set BERTH_STATE to a shorter one than {self.path}"
            )

    @classmethod
    def from_environment(cls) -> State:
        return cls(Path(process_environment().get("BERTH_STATE", DEFAULT_STATE)))

    # -- paths ---------------------------------------------------------------------------------------------------------

    @property
    def env_file(self) -> Path:
        return self.path / "env"

    @property
    def logs(self) -> Path:
        return self.path / "log"

    @property
    def run(self) -> Path:
        return self.path / "run"

    @property
    def api_key_file(self) -> Path:
        return self.path / "api-key"

    @property
    def admin_file(self) -> Path:
        return self.path / "admin"

    @property
    def known_hosts_file(self) -> Path:
        return self.path / "ssh_known_hosts"

    @property
    def supervisor_file(self) -> Path:
        return self.run / "supervisor.json"

    def create(self) -> None:
        """Make the folder and the plain folders in it.  Repeatable.  Raises StateError when it is not ours to use."""
        if self.path.exists() and not self.path.is_dir():
            raise StateError(f"{self.path} is a file; BERTH_STATE must name a folder")
        if self.path.is_dir() and not (self.path / "traces.json").exists() and any(self.path.iterdir()):
            raise StateError(
                f"{self.path} holds files that are not Berth's; empty it or set BERTH_STATE to another folder"
            )
        for folder in (self.path, self.logs, self.run):
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            folder.chmod(0o755)
        if not (self.path / "traces.json").exists():
            self._write(self.path / "traces.json", "{}\n", 0o644)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the installation's lock.  Raises StateError at once when another supervisor has it."""
        with open(self.run / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StateError(f"another process already runs the installation in {self.path}") from None
            yield

    # -- the settings file ---------------------------------------------------------------------------------------------

    def read_env(self) -> dict[str, str]:
        """The recorded settings; an empty dict before the first start."""
        if not self.env_file.exists():
            return {}
        pairs = (
            line.split("=", 1)
            for line in self.env_file.read_text().splitlines()
            if "=" in line and not line.startswith("#")
        )
        return {key.strip(): value for key, value in pairs}

    def write_env(self, values: Mapping[str, str], reader: Owner) -> None:
        """Record settings, readable by root and by ``reader``'s group alone."""
        for key, value in values.items():
            if "\n" in value:
                raise StateError(f"{key} holds a line break")
        head = (
            "# Written by `make up`: this installation's settings, secrets among them. The process environment wins.\n"
        )
        text = head + "".join(f"{key}={value}\n" for key, value in sorted(values.items()))
        if not self.env_file.exists() or self.env_file.read_text() != text:
            self._write(self.env_file, text, 0o640, gid=reader.gid)

    # -- what was changed on the machine -------------------------------------------------------------------------------

    def traces(self) -> dict[str, Any]:
        """What this installation made outside its folder, for ``config.uninstall``."""
        try:
            found: dict[str, Any] = json.loads((self.path / "traces.json").read_text())
        except FileNotFoundError:
            return {}
        return found

    def record(self, **traces: Any) -> None:
        """Add to the list of traces.  Called before the thing is made, so that a crash in between leaves no unlisted
        trace."""
        known = self.traces()
        if all(known.get(key) == value for key, value in traces.items()):
            return
        self._write(self.path / "traces.json", json.dumps(known | traces, indent=1, sort_keys=True) + "\n", 0o644)

    # -- small files ---------------------------------------------------------------------------------------------------

    def write_private(self, path: Path, text: str) -> None:
        """Write a secret for the person who runs the installation: mode 0600, owned by whoever called sudo, else by
        root."""
        given = process_environment()
        uid, gid = int(given.get("SUDO_UID", os.getuid())), int(given.get("SUDO_GID", os.getgid()))
        self._write(path, text, 0o600, uid=uid, gid=gid)

    @staticmethod
    def _write(path: Path, text: str, mode: int, uid: int = -1, gid: int = -1) -> None:
        """Replace a file in one step, so that a reader or a crash never meets half of it."""
        fresh = path.with_name(path.name + ".new")
        fresh.unlink(missing_ok=True)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as out:
            out.write(text)
            os.fchown(out.fileno(), uid, gid)
            os.fchmod(out.fileno(), mode)
            out.flush()
            os.fsync(out.fileno())
        fresh.rename(path)

    # -- users ---------------------------------------------------------------------------------------------------------

    def user_name(self) -> str:
        """``berth`` for the usual folder; any other folder has a user of its own, so that taking one away touches no
        other."""
        if self.path == DEFAULT_STATE:
            return "berth"
        return "berth-" + hashlib.sha256(str(self.path).encode()).hexdigest()[:8]

    def ensure_user(self) -> Owner:
        """The unprivileged user that runs the private servers: PostgreSQL refuses to run as root.  Made when absent."""
        if os.getuid() != 0:
            raise StateError("this must be run as root: it makes a user and runs servers as that user")
        name = self.user_name()
        if (found := Owner.named(name)) is not None:
            return found
        self.record(user=name)
        subprocess.run(
            ["useradd", "--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent",
             "--shell", "/usr/sbin/nologin", "--comment", "Berth's private servers", name],
            check=True, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        made = Owner.named(name)
        if made is None:
            raise StateError(f"useradd said it made the user {name}, which is not there")
        return made

    def readable_program(self, program: Path, user: Owner) -> Path:
        """``program`` itself when ``user`` can run it, else a copy in the folder (a checkout below /root is closed to
        others)."""
        if can_run(program, user):
            return program
        copy = self.path / "bin" / program.name
        copy.parent.mkdir(mode=0o755, exist_ok=True)
        if not copy.exists() or copy.stat().st_size != program.stat().st_size:
            fresh = copy.with_suffix(".new")
            shutil.copyfile(program, fresh)
            fresh.chmod(0o755)
            fresh.rename(copy)
        return copy


def can_run(program: Path, user: Owner) -> bool:
    """Can ``user`` execute this file, given the folders above it?  Asked of the kernel by a child that is that user."""
    probe = subprocess.run(
        ["test", "-x", str(program)], user=user.uid, group=user.gid, extra_groups=[], check=False, timeout=10, cwd="/"
    )
    return probe.returncode == 0


def port_is_free(port: int, address: str = "127.0.0.1") -> bool:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a closed connection's TIME_WAIT is no owner
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def free_port(preferred: int | None = None, taken: frozenset[int] = frozenset(), address: str = "127.0.0.1") -> int:
    """``preferred`` if nobody listens there, else any free one.  Raises StateError after 200 tries."""
    if preferred is not None and preferred not in taken and port_is_free(preferred, address):
        return preferred
    for _ in range(200):
        port = secrets.choice(_PORTS)
        if port not in taken and port_is_free(port, address):
            return port
    raise StateError(f"no free port found on {address} in 200 tries between {_PORTS.start} and {_PORTS.stop}")


def reserve(bind: str, user: Owner | None) -> socket.socket:
    """Hold ``address:port`` until closed: no other search finds it free, and a server of ``user`` can still listen.

    A server that shares its port (SO_REUSEPORT, as Granian does) would be joined by another installation's.  Sockets
    that share must belong to one user, so the held one is given to the server's.  It never listens, so it is sent
    nothing.  Raises OSError when somebody was faster.
    """
    host, _, port = bind.rpartition(":")
    held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        if user is not None:
            os.fchown(held.fileno(), user.uid, user.gid)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((host.strip("[]"), int(port)))
    except OSError:
        held.close()
        raise
    return held
