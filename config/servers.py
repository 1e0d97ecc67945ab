"""The private servers of an installation: PostgreSQL, Redis, an S3 server and a loopback sshd, all below the state
folder.

In charge of making their data on first use, of their settings, ports and passwords, and of saying how each is started
and when it is ready (as ``config.supervisor.Service``).  Servers named by ``DATABASE_URL``, ``REDIS_URL`` or
``S3_ENDPOINT_URL`` are used instead and never touched.  Not in charge of running them (``config.supervisor``) nor of
what is kept in them.

All listen on loopback and on Unix sockets in folders closed to others, run as an unprivileged user (but sshd, whose
work is to become other users), and have passwords made here.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import redis as redis_client

from config.state import Owner, State, StateError, free_port
from config.supervisor import NotReady, Progress, Service, StepFailed, Supervisor

_POSTGRES_HOME = Path("/usr/lib/postgresql")
_S3_OWN = ("S3_ENDPOINT_URL", "S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY", "S3_BUCKET", "S3_REGION")
_S3_VARIABLES = (*_S3_OWN, "S3_ENDPOINT_FOR_HOSTS", "S3_ENCRYPTION")


@dataclass(frozen=True)
class Plan:
    """What to start, and the settings that lead to it."""

    services: list[Service]
    env: dict[str, str]


def plan(
    state: State, given: Mapping[str, str], which: frozenset[str] = frozenset({"postgres", "redis", "s3", "sshd"})
) -> Plan:
    """Prepare the private servers that ``given`` (usually the process environment) does not replace.

    Makes data folders and passwords on first use and reuses them afterwards; ports are kept while they are free.
    Raises StateError or StepFailed when something needed is not there.
    """
    user = state.ensure_user()
    memory = _Memory(state, user)
    services: list[Service] = []
    env: dict[str, str] = {}
    if url := given.get("DATABASE_URL"):
        env["DATABASE_URL"] = url
    elif "postgres" in which:
        service, env["DATABASE_URL"] = _postgres(state, user, memory)
        services.append(service)
    if url := given.get("REDIS_URL"):
        env["REDIS_URL"] = url
    elif "redis" in which:
        service, env["REDIS_URL"] = _redis(state, user, memory)
        services.append(service)
    if given.get("S3_ENDPOINT_URL"):
        missing = [name for name in _S3_VARIABLES[:4] if not given.get(name)]
        if missing:
            raise StateError(f"S3_ENDPOINT_URL names an S3 server, so these must be set too: {', '.join(missing)}")
        env |= {name: given[name] for name in _S3_VARIABLES if given.get(name)}
    elif "s3" in which:
        service, settings = _s3(state, user, memory)
        services.append(service)
        env |= settings
    if "sshd" in which:
        services.append(_sshd(state, memory))
    memory.save()
    return Plan(services, env)


def finish(state: State, prepared: Plan) -> None:
    """What can only be done once the servers answer: the database inside the private PostgreSQL."""
    if not any(service.name == "postgres" for service in prepared.services):
        return
    url = prepared.env["DATABASE_URL"]
    with psycopg.connect(url.replace("/berth?", "/postgres?"), autocommit=True, connect_timeout=5) as connection:
        if connection.execute("SELECT 1 FROM pg_database WHERE datname = 'berth'").fetchone() is None:
            connection.execute("CREATE DATABASE berth")


@contextlib.contextmanager
def private_servers(
    path: Path, which: frozenset[str] = frozenset({"postgres", "redis", "s3"})
) -> Iterator[dict[str, str]]:
    """Run private servers below ``path`` for the length of a ``with``; yields the settings that lead to them.  For
    tests."""
    state = State(path)
    state.create()
    supervisor = Supervisor(state, Progress(quiet=True))
    try:
        prepared = plan(state, {}, which)
        supervisor.start(prepared.services)
        finish(state, prepared)
        yield prepared.env
    finally:
        supervisor.stop()
        if made := state.traces().get("user"):
            subprocess.run(["userdel", made], check=False, capture_output=True, timeout=30)


class _Memory:
    """Ports and passwords of the private servers, kept between starts in ``servers.json`` (root's alone)."""

    def __init__(self, state: State, user: Owner) -> None:
        self._path = state.path / "servers.json"
        self._user = user
        self._values: dict[str, Any] = json.loads(self._path.read_text()) if self._path.exists() else {}
        self._taken: set[int] = set()

    def port(self, name: str) -> int:
        """The port of this name: the recorded one while nobody else listens there, else another."""
        port = free_port(self._values.get(f"{name}_port"), frozenset(self._taken))
        self._taken.add(port)
        self._values[f"{name}_port"] = port
        return port

    def secret(self, name: str) -> str:
        return str(self._values.setdefault(f"{name}_secret", secrets.token_urlsafe(24)))

    def save(self) -> None:
        State._write(self._path, json.dumps(self._values, indent=1, sort_keys=True) + "\n", 0o600)


def _folder(path: Path, user: Owner) -> Path:
    """A folder that only ``user`` may enter."""
    path.mkdir(mode=0o700, exist_ok=True)
    os.chown(path, user.uid, user.gid)
    path.chmod(0o700)
    return path


def _minimal_env(home: Path, **more: str) -> dict[str, str]:
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(home),
        "LANG": "C.UTF-8",
        **more,
    }


def _program(name: str, package: str) -> Path:
    found = shutil.which(name, path="/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/bin")
    if found is None:
        raise StateError(f"the program {name} is missing: apt-get install {package}")
    return Path(found)


# -- PostgreSQL ------------------------------------------------------------------------------------------------------


def _postgres_programs() -> Path:
    versions = sorted((p for p in _POSTGRES_HOME.glob("*/bin/postgres")), key=lambda p: int(p.parts[-3]), reverse=True)
    if not versions:
        raise StateError(f"no PostgreSQL server below {_POSTGRES_HOME}: apt-get install postgresql")
    return versions[0].parent


def _postgres(state: State, user: Owner, memory: _Memory) -> tuple[Service, str]:
    home = _folder(state.path / "postgres", user)
    run = _folder(home / "run", user)
    data, password, port = home / "data", memory.secret("postgres"), memory.port("postgres")
    if data.exists():
        # Data of an older major version must be served by its own programs.
        programs = _POSTGRES_HOME / (data / "PG_VERSION").read_text().strip() / "bin"
        if not (programs / "postgres").exists():
            raise StateError(f"{data} was made by PostgreSQL {programs.parent.name}, which is no longer installed")
    else:
        programs = _postgres_programs()
        _initdb(state, programs, data, password, user)
    settings = {
        "listen_addresses": "127.0.0.1",
        "port": str(port),
        "unix_socket_directories": str(run),
        "max_connections": "200",
        "shared_buffers": "128MB",
        "password_encryption": "scram-sha-256",
        "log_line_prefix": "%m [%p] ",
    }
    argv = [str(programs / "postgres"), "-D", str(data)]
    for name, value in settings.items():
        argv += ["-c", f"{name}={value}"]
    url = f"postgresql://berth:{password}@/berth?host={run}&port={port}"

    def ready() -> None:
        try:
            psycopg.connect(url.replace("/berth?", "/postgres?"), connect_timeout=2).close()
        except psycopg.OperationalError as error:
            raise NotReady(str(error).strip().splitlines()[-1]) from None

    # SIGINT is PostgreSQL's fast shutdown: sessions are ended, everything is on disk.
    return Service(
        "postgres", argv, ready, f"127.0.0.1:{port}", _minimal_env(home), user, home, 60.0, signal.SIGINT, 30.0
    ), url


def _initdb(state: State, programs: Path, data: Path, password: str, user: Owner) -> None:
    """Make the data folder in one step: a half-made one is thrown away by the next try."""
    fresh, password_file = data.with_name("data.new"), data.with_name("password")
    shutil.rmtree(fresh, ignore_errors=True)
    password_file.write_text(password + "\n")
    os.chown(password_file, user.uid, user.gid)
    log = state.logs / "initdb.log"
    try:
        with open(log, "ab") as out:
            made = subprocess.run(
                [str(programs / "initdb"), "-D", str(fresh), "--username=berth", f"--pwfile={password_file}",
                 "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8"],
                stdout=out, stderr=out, stdin=subprocess.DEVNULL, timeout=120, check=False, cwd=data.parent,
                user=user.uid, group=user.gid, extra_groups=[], env=_minimal_env(data.parent),
            )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise StepFailed("postgres", "initdb was not done within 120 s", log) from None
    finally:
        password_file.unlink()
    if made.returncode != 0:
        raise StepFailed("postgres", f"initdb ended with exit status {made.returncode}", log)
    fresh.rename(data)


# -- Redis -----------------------------------------------------------------------------------------------------------


def _redis(state: State, user: Owner, memory: _Memory) -> tuple[Service, str]:
    home = _folder(state.path / "redis", user)
    password, port = memory.secret("redis"), memory.port("redis")
    program = _program("redis-server", "redis-server")
    # Nothing here is truth: messages are nudges and hints, so nothing is written to disk and a restart starts empty.
    config = f"""\
bind 127.0.0.1
port {port}
unixsocket {home / "redis.sock"}
unixsocketperm 700
requirepass {password}
dir {home}
save ""
appendonly no
maxmemory 256mb
maxmemory-policy noeviction
tcp-backlog 1024
"""
    path = home / "redis.conf"
    State._write(path, config, 0o600, uid=user.uid, gid=user.gid)
    url = f"redis://:{password}@127.0.0.1:{port}/0"

    def ready() -> None:
        client = redis_client.Redis.from_url(url, socket_timeout=2, socket_connect_timeout=2)
        try:
            client.ping()
        except redis_client.RedisError as error:
            raise NotReady(str(error)) from None
        finally:
            client.close()

    return Service(
        "redis", [str(program), str(path)], ready, f"127.0.0.1:{port}", _minimal_env(home), user, home, 20.0
    ), url


# -- S3 --------------------------------------------------------------------------------------------------------------


def _s3(state: State, user: Owner, memory: _Memory) -> tuple[Service, dict[str, str]]:
    """JuiceFS's gateway over plain files, with an SQLite catalogue beside them."""
    home = _folder(state.path / "s3", user)
    data, cache = _folder(home / "data", user), _folder(home / "cache", user)
    program = state.readable_program(Path(sysconfig.get_path("scripts")) / "juicefs", user)
    catalogue = f"sqlite3://{home}/catalogue.db?_journal_mode=WAL"
    if not (home / "formatted").exists():
        log = state.logs / "s3-format.log"
        with open(log, "ab") as out:
            made = subprocess.run(
                [str(program), "format", "--no-agent", "--storage", "file", "--bucket", f"{data}/",
                 "--trash-days", "0", catalogue, "berth"],
                stdout=out, stderr=out, stdin=subprocess.DEVNULL, timeout=60, check=False, cwd=home,
                user=user.uid, group=user.gid, extra_groups=[], env=_minimal_env(home),
            )  # fmt: skip
        if made.returncode != 0:
            raise StepFailed("s3", f"juicefs format ended with exit status {made.returncode}", log)
        (home / "formatted").touch()
    port, key, secret = memory.port("s3"), "berth", memory.secret("s3")
    metrics = memory.port("s3_metrics")
    argv = [
        str(program), "gateway", "--no-agent", "--no-banner", "--no-usage-report", "--multi-buckets", "--keep-etag",
        "--backup-meta", "0", "--cache-size", "0", "--cache-dir", str(cache), "--log", str(home / "gateway.log"),
        "--metrics", f"127.0.0.1:{metrics}", catalogue, f"127.0.0.1:{port}",
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"

    def ready() -> None:
        try:
            with urllib.request.urlopen(f"{url}/minio/health/live", timeout=2) as answer:  # noqa: S310 - our own loopback address
                if answer.status != 200:
                    raise NotReady(f"answers {answer.status}")
        except urllib.error.URLError as error:
            raise NotReady(str(error.reason)) from None

    service = Service(
        "s3",
        argv,
        ready,
        f"127.0.0.1:{port}",
        _minimal_env(home, MINIO_ROOT_USER=key, MINIO_ROOT_PASSWORD=secret),
        user,
        home,
        30.0,
    )
    settings = dict(zip(_S3_OWN, (url, key, secret, "berth", "us-east-1"), strict=True))
    return service, settings


# -- sshd ------------------------------------------------------------------------------------------------------------


def admin_key_file(state: State) -> Path:
    """The private key that may log in as root at the loopback sshd: how this machine is enrolled like any other."""
    return state.path / "sshd" / "admin"


def sshd_port(state: State) -> int:
    values: dict[str, Any] = json.loads((state.path / "servers.json").read_text())
    return int(values["sshd_port"])


def _sshd(state: State, memory: _Memory) -> Service:
    """An sshd of our own on loopback.  The machine's own sshd, if there is one, is neither used nor changed."""
    home = state.path / "sshd"
    home.mkdir(mode=0o755, exist_ok=True)
    port, program = memory.port("sshd"), _program("sshd", "openssh-server")
    for name, comment in (("host_key", "berth loopback host"), ("admin", "berth enrolment")):
        if not (home / name).exists():
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(home / name)],
                check=True, capture_output=True, timeout=30,
            )  # fmt: skip
    keys = home / "root_keys"
    State._write(keys, (home / "admin.pub").read_text(), 0o600)
    # Without PAM, sshd refuses an account whose password field begins with "!", as Debian's installer leaves root's
    # when it was told to use sudo instead.
    with open("/etc/shadow") as shadow:
        locked = any(line.startswith("root:!") for line in shadow)
    # Bash reads ~/.bashrc of root's for each command that comes over SSH, and what that starts may wait for long or be
    # killed half-way with the connection: our logins have a home of their own, which is empty.
    # StrictModes would refuse keys below a world-writable folder, and a throwaway installation lives below /tmp; every
    # file named here was made by root, in folders of root's.
    config = f"""\
Port {port}
ListenAddress 127.0.0.1
HostKey {home / "host_key"}
PidFile none
AuthorizedKeysFile .ssh/authorized_keys
StrictModes no
UsePAM {"yes" if locked else "no"}
PasswordAuthentication no
KbdInteractiveAuthentication no
AuthenticationMethods publickey
PermitRootLogin prohibit-password
UseDNS no
X11Forwarding no
AllowAgentForwarding no
PermitTunnel no
PermitUserRC no
PrintMotd no
ClientAliveInterval 10
ClientAliveCountMax 3
MaxStartups 100:30:200
Subsystem sftp internal-sftp
Match User root
    AuthorizedKeysFile {keys}
    SetEnv HOME={home}
    AllowTcpForwarding no
Match User berth-link-*
    AllowTcpForwarding local
    AllowStreamLocalForwarding local
    PermitListen none
    PermitTTY no
    MaxSessions 0
"""
    path = home / "sshd_config"
    State._write(path, config, 0o600)
    if not Path("/run/sshd").exists():
        # sshd enters this empty folder for each connection; where the package's own service runs, that made it.
        state.record(run_sshd=True)
        Path("/run/sshd").mkdir(mode=0o755)

    def ready() -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.settimeout(2)
            if not connection.recv(4).startswith(b"SSH-"):
                raise NotReady("no SSH greeting")

    return Service(
        "sshd",
        [str(program), "-D", "-e", "-f", str(path)],
        ready,
        f"127.0.0.1:{port}",
        _minimal_env(Path("/root")),
        None,
        home,
        15.0,
    )


def main() -> None:
    """``python -m config.servers FOLDER``: run the private servers alone in the foreground and print the settings."""
    with private_servers(Path(sys.argv[1])) as env:
        sys.stdout.write("".join(f"export {key}='{value}'\n" for key, value in env.items()))
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
