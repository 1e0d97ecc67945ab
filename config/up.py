"""``make up``: everything on this machine, from nothing to a first devbox, then the supervisor in the foreground.

In charge of the order of the steps and of what the newcomer reads.  Each step is repeatable, so a start that failed
half-way is continued by the next one, and a start of what is complete changes nothing.  Not in charge of how a server
is made (``config.servers``), of processes (``config.supervisor``), nor of rows (``config.prepare``, which is the only
part with Django).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from cryptography.fernet import Fernet

from config import certificates, first, packages, roles, servers, web_files
from config.seclusion import View, view_for
from config.state import (
    CHECKOUT,
    Owner,
    State,
    StateError,
    free_port,
    port_is_free,
    process_environment,
    reserve,
)
from config.supervisor import (
    Progress,
    Service,
    StepFailed,
    Supervisor,
    end_leftovers,
    last_words,
    raise_open_files,
)

#: The ports of what listens, when they are free and none was asked for; only a habit, others are found otherwise.
_USUAL_PORTS = {"BERTH_BIND": 8420, "BERTH_TLS_BIND": 8421, "BERTH_SSH_BIND": 8422, "BERTH_SSH_TLS_BIND": 8423}

#: Instead of the address in BERTH_TLS_BIND: the API and tunnels are served without TLS only.
OFF = "off"


@dataclass(frozen=True)
class Options:
    """What differs between the installation of a person and a throwaway one (``config.prove``, the live tests)."""

    #: Make a devbox and run a command in it after the first start.
    first_devbox: bool = True
    #: The size of the pool of disks; None: most of what is free.
    pool_gb: int | None = None

    @classmethod
    def of(cls, given: Mapping[str, str]) -> Options:
        """What a person asked for.  Raises StateError for a size that is none."""
        size = given.get("BERTH_POOL_GB")
        if size is not None and not (size.isdigit() and int(size) >= 1):
            raise StateError(f"BERTH_POOL_GB must be a whole number of GiB, not {size!r}")
        return cls(pool_gb=int(size) if size else None)


class Installation:
    """One installation being started, watched and stopped.  Hold its lock (``State.locked``) around it."""

    def __init__(self, state: State, given: Mapping[str, str], options: Options, say: Progress) -> None:
        self.state, self.given, self.options, self.say = state, given, options, say
        self.supervisor = Supervisor(state, say)
        self.env: dict[str, str] = {}
        self.roles_user: Owner | None = None
        self.roles_view: View | None = None
        self._hosts_may_run = False
        self._ports: list[socket.socket] = []

    # -- start ---------------------------------------------------------------------------------------------------------

    def start(self) -> dict[str, Any]:
        """All steps up to a working API.  Returns what ``config.prepare`` said.  Raises StepFailed or StateError."""
        end_leftovers(self.state, self.say)
        packages.ensure(self.state, self.say)
        web_files.ensure(self.state, self.say)
        user = self.state.ensure_user()
        self.roles_view = view_for(user)
        self.roles_user = user if self.roles_view is not None else None
        self.env = settings(self.state, self.given)
        for bind in filter(None, (self.env["BERTH_BIND"], self.tls_bind)):
            self._ports.append(reserve(bind, self.roles_user))
        certificates.ensure(self.state.path / "tls", self.env["BERTH_DOMAIN"], self.roles_user)
        prepared = servers.plan(self.state, self.given)
        self.env |= prepared.env
        self.state.record(given=sorted(name for name in self.given if name in prepared.env))
        self.state.write_env(self.env, user)
        if self.roles_user is None:
            self.say(f"roles        run as root: {user.name} may not read {CHECKOUT} or {sys.executable}")
        self.supervisor.start(prepared.services)
        servers.finish(self.state, prepared)
        facts = self.prepare("database", *self._known_secrets(), within=120.0)
        self._store_secrets(facts)
        self._store_host_key(facts.pop("ssh_host_key"))
        self.supervisor.start(self.role_services())
        self._hosts_may_run = True
        facts |= self.prepare("host", *self._host_arguments(), within=600.0)
        self.say(f"{'host':<12} ready   {facts['host_id']}")
        facts |= {"tls": self.tls_bind, "domain": self.env["BERTH_DOMAIN"]}
        facts |= {"ssh": self.env["BERTH_SSH_BIND"], "ssh_tls": self.env["BERTH_SSH_TLS_BIND"]}
        self.supervisor.announce(base_url=self.base_url, ready=True, state=str(self.state.path), **facts)
        return facts

    @property
    def base_url(self) -> str:
        return f"http://{self.env['BERTH_BIND']}"

    @property
    def tls_bind(self) -> str | None:
        """Where the API and tunnels are served with TLS; None: nowhere."""
        bind = self.env["BERTH_TLS_BIND"]
        return None if bind == OFF else bind

    def role_env(self) -> dict[str, str]:
        """What every role's process gets: its settings come from the file, plus what the person gave on the command
        line."""
        own = {name: value for name, value in self.given.items() if name.startswith("BERTH_")}
        return {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.state.path),
            "LANG": "C.UTF-8",
            "PYTHONUNBUFFERED": "1",
            **own,
            **roles.web_settings(self.env["BERTH_BIND"]),
            "BERTH_STATE": str(self.state.path),
        }

    def role_services(self) -> list[Service]:
        env = self.role_env()
        ready = {"web": lambda: first.answers(self.base_url), "ssh": lambda: first.greets(self.env["BERTH_SSH_BIND"])}
        where = {"web": self.base_url, "ssh": self.env["BERTH_SSH_BIND"]}
        services = [
            Service(
                name,
                [sys.executable, *argv[1:]],
                ready=ready.get(name, _alive),
                where=where.get(name, ""),
                env=env,
                user=self.roles_user,
                view=self.roles_view,
                cwd=CHECKOUT,
                ready_within=60.0,
                stop_within=20.0,
            )
            for name, argv in roles.ROLES.items()
        ]
        return [*services, *self._web_with_tls(services[0])]

    def _web_with_tls(self, web: Service) -> list[Service]:
        address = self.tls_bind
        if address is None:
            return []
        folder = self.state.path / "tls"
        certificate = self.given.get("BERTH_TLS_CERTIFICATE", str(folder / "server.pem"))
        key = self.given.get("BERTH_TLS_KEY", str(folder / "server.key"))
        env = {**web.env, **roles.tls_settings(address, certificate, key)}
        ready = partial(first.shakes_hands, address)
        return [replace(web, name="web_tls", env=env, ready=ready, where=f"https://{address}")]

    def prepare(self, verb: str, *arguments: str, within: float, needs_services: bool = True) -> dict[str, Any]:
        """Run a step that needs Django, as root, since it reads the keys; prints its facts as one JSON line at its
        end."""
        argv = [sys.executable, "-m", "config.prepare", verb, *arguments]
        lines = self.supervisor.run_step(
            verb, argv, self.role_env(), within, cwd=CHECKOUT, needs_services=needs_services
        )
        facts: dict[str, Any] = json.loads(lines[-1])
        return facts

    def _host_arguments(self) -> Sequence[str]:
        port, key = servers.sshd_port(self.state), servers.admin_key_file(self.state)
        arguments = ["--port", str(port), "--key-file", str(key), "--root", str(host_root(self.state))]
        arguments += ["--host-key-file", str(self.state.path / "sshd" / "host_key")]
        if self.options.pool_gb is not None:
            arguments += ["--pool-gb", str(self.options.pool_gb)]
        return arguments

    def _known_secrets(self) -> list[str]:
        known = []
        if self.state.api_key_file.exists():
            key = self.state.api_key_file.read_text().strip()
            known += ["--key-sha256", hashlib.sha256(key.encode()).hexdigest()]
        return known + (["--admin-known"] if self.state.admin_file.exists() else [])

    def _store_secrets(self, facts: dict[str, Any]) -> None:
        """Secrets are shown once by the code that makes them; they go to files that only the owner reads."""
        if key := facts.pop("api_key", None):
            self.state.write_private(self.state.api_key_file, key + "\n")
        if password := facts.pop("admin_password", None):
            text = f"{self.base_url}/admin/\nuser: {facts['admin_user']}\npassword: {password}\n"
            self.state.write_private(self.state.admin_file, text)

    def _store_host_key(self, key: str) -> None:
        """What an SSH client believes without a question: this file as its UserKnownHostsFile."""
        host, _, port = self.env["BERTH_SSH_BIND"].rpartition(":")
        names = f"[{host.strip('[]')}]:{port},*.ssh.{self.env['BERTH_DOMAIN']}"
        self.state._write(self.state.known_hosts_file, f"{names} {key}\n", 0o644)

    # -- stop ----------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """End this machine's devboxes, then everything that runs, in the reverse order.  Data stays."""
        if self._hosts_may_run:
            self.supervisor.stop(["web", "web_tls", "ssh", "beat"])
            try:
                ended = self.prepare("end_devboxes", within=90.0, needs_services=False)["ended"]
                self.say(f"devboxes     {ended} ended" if ended != 1 else "devboxes     1 ended")
            except (StepFailed, StateError) as failure:
                self.say(f"devboxes     could not be ended in order: {failure}")
            self.supervisor.stop(["watcher", "worker"])
            try:
                stop_host(self.state, self.say)
            except StepFailed as failure:
                self.say(f"host         {failure}")
        self.supervisor.stop()
        for port in self._ports:
            port.close()


def host_root(state: State) -> Path:
    """Where this machine keeps its pool and all else that it has as VM host: in the folder, like everything."""
    return state.path / "host"


def host_config(state: State) -> Path:
    return host_root(state) / "host.json"


def stop_host(state: State, say: Progress) -> bool:
    """End all that runs on this machine as VM host, and unmount its pool; its data stays.  True when it was a host.

    Raises StepFailed.
    """
    if not host_config(state).exists():
        return False
    log = state.logs / "stop-host.log"
    with open(log, "ab") as out:
        done = subprocess.run(
            [sys.executable, "-m", "hostd", "stop", "--config", str(host_config(state))],
            cwd=CHECKOUT, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=90, check=False,
        )  # fmt: skip
    if done.returncode != 0:
        raise StepFailed("host", f"the VM host could not be stopped: {last_words(log)}", log)
    say("host         stopped, its pool unmounted")
    return True


def _alive() -> None:
    """Roles without a port are ready when they run; the first devbox shows that they work."""


def settings(state: State, given: Mapping[str, str]) -> dict[str, str]:
    """The installation's settings: what was given now, else what was recorded, else made now."""
    recorded = state.read_env()
    taken: set[int] = set()
    addresses = {name: _address(name, usual, given, recorded, taken) for name, usual in _USUAL_PORTS.items()}
    made: dict[str, Callable[[], str]] = {
        "BERTH_SECRET_KEY": lambda: secrets.token_urlsafe(48),
        "BERTH_SEAL_KEYS": lambda: Fernet.generate_key().decode(),
        "BERTH_CLUSTER": lambda: str(uuid.uuid4()),
    }
    kept = {name: given.get(name) or recorded.get(name) or make() for name, make in made.items()}
    servers_given = {
        name: value
        for name, value in recorded.items()
        if name in ("DATABASE_URL", "REDIS_URL") or name.startswith("S3_")
    }
    named = given.get("BERTH_DOMAIN") or recorded.get("BERTH_DOMAIN", "")
    domain = certificates.domain_of(named, given.get("BERTH_PUBLIC_URL", ""))
    return {**servers_given, **kept, **addresses, "BERTH_DOMAIN": domain}


def _address(name: str, usual: int, given: Mapping[str, str], recorded: Mapping[str, str], taken: set[int]) -> str:
    """Where a role listens: as given, else as before if that is still free, else on another port; added to `taken`."""
    bind = given.get(name)
    if name == "BERTH_TLS_BIND" and OFF in (bind, recorded.get(name) if not bind else None):
        return OFF
    if bind:
        host, _, port = bind.rpartition(":")
        if not port.isdigit() or not host:
            raise StateError(f"{name} must be ADDRESS:PORT, not {bind!r}")
        if int(port) in taken or not port_is_free(int(port), host.strip("[]")):
            raise StateError(f"{name}: another program listens on {bind}; choose another port, or leave it unset")
    else:
        host, _, port = recorded.get(name, f"127.0.0.1:{usual}").rpartition(":")
        port = str(free_port(int(port), frozenset(taken), address=host.strip("[]")))
        bind = f"{host}:{port}"
    taken.add(int(port))
    return bind


def main() -> int:
    """Start, show, watch, stop.  Exit status 0 after a stop that was asked for, 1 after a step that failed."""
    say = Progress()
    given = process_environment()
    try:
        state = State.from_environment()
        state.create()
        with state.locked():
            return run(Installation(state, given, Options.of(given), say))
    except StateError as error:
        if (facts := first.running(State.from_environment())) is not None:
            say("already running; nothing was changed")
            first.show(State.from_environment(), facts, output=None)
            return 0
        sys.stderr.write(f"make up: {error}\n")
        return 1


def run(installation: Installation) -> int:
    """``main`` for a held lock; also what the throwaway installations run."""
    say = installation.say
    raise_open_files(say)
    with interrupts() as ignore_further:
        code = 0
        try:
            facts = installation.start()
            output = (
                first.devbox(installation.state, installation.base_url, say)
                if installation.options.first_devbox
                else None
            )
            first.show(installation.state, facts | {"base_url": installation.base_url}, output)
            installation.supervisor.watch()
        except KeyboardInterrupt:
            pass
        except (StepFailed, StateError) as failure:
            sys.stderr.write(f"\nFAILED  {failure}\n\n")
            code = 1
        except Exception as error:  # nothing that was started may be left behind by what nobody thought of
            sys.stderr.write(f"\nFAILED  {_unforeseen(installation.state, error)}\n\n")
            code = 1
        ignore_further()
        say("stopping")
        installation.stop()
        say("stopped; nothing is running, data stays in " + str(installation.state.path))
        return code


def _unforeseen(state: State, error: Exception) -> StepFailed:
    """An error that no step expects, in a line; the whole of it goes to a log."""
    log = state.logs / "up.log"
    with open(log, "a") as out:
        traceback.print_exception(error, file=out)
    return StepFailed("up", f"{type(error).__name__}: {error}", log)


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], None]]:
    """SIGTERM and SIGHUP interrupt as Ctrl-C does; once stopping, further ones only say so."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def told(_number: int, _frame: FrameType | None) -> None:
        os.write(1, b"           still stopping; every step is bounded\n")

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}

    def ignore_further() -> None:
        for number in numbers:
            signal.signal(number, told)

    try:
        yield ignore_further
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
