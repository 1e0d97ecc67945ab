"""Private PostgreSQL and Redis for tests: below a temporary folder, on Unix sockets, as an unprivileged user."""

from __future__ import annotations

import glob
import os
import pathlib
import pwd
import shutil
import subprocess
import tempfile
import time


def unprivileged() -> str | None:
    """The user to run servers as: PostgreSQL refuses root. None when we are not root ourselves."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            pwd.getpwnam(name)
        except KeyError:
            continue
        return name
    raise RuntimeError("there is no user to run PostgreSQL as")


def private_folder(name: str) -> pathlib.Path:
    """A fresh folder that belongs to the unprivileged user. Its path stays short: Unix sockets live in it."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f"berth-{name}-", dir="/tmp"))
    if user := unprivileged():
        shutil.chown(folder, user)
    return folder


class Server:
    """A server process that can be stopped, killed, frozen and started again on the same data."""

    def __init__(self, name: str, argv: list[str], folder: pathlib.Path) -> None:
        self.name, self.argv, self.folder = name, argv, folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                self.argv,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                user=unprivileged(),
                cwd=self.folder,
                start_new_session=True,
            )
        deadline = time.monotonic() + 20
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not start: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.02)

    def ready(self) -> bool:
        raise NotImplementedError

    def stop(self, kill: bool = False) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(9 if kill else self.stop_signal)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(5)
        self.process = None

    stop_signal = 15

    def remove(self) -> None:
        self.stop(kill=True)
        shutil.rmtree(self.folder, ignore_errors=True)


class Postgres(Server):
    stop_signal = 2  # fast: do not wait for clients

    def __init__(self) -> None:
        found = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb")) or [shutil.which("initdb") or ""]
        if not found[-1]:
            raise RuntimeError("PostgreSQL is not installed: set DATABASE_URL, or apt-get install postgresql")
        self.bin = pathlib.Path(found[-1]).parent
        folder = private_folder("pg")
        data = folder / "data"
        subprocess.run(
            [
                self.bin / "initdb",
                "-D",
                data,
                "-U",
                "berth",
                "-A",
                "trust",
                "-E",
                "UTF8",
                "--locale=C.UTF-8",
                "--no-sync",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            user=unprivileged(),
            cwd=folder,
            env={"PATH": os.environ["PATH"]},
        )
        options = {
            "listen_addresses": "",
            "unix_socket_directories": str(folder),
            "fsync": "off",
            "full_page_writes": "off",
            "shared_buffers": "32MB",
            "max_connections": "120",
            "max_wal_size": "256MB",
        }
        flags = [part for key, value in options.items() for part in ("-c", f"{key}={value}")]
        super().__init__("PostgreSQL", [str(self.bin / "postgres"), "-D", str(data), *flags], folder)

    def ready(self) -> bool:
        if not (self.folder / ".s.PGSQL.5432").exists():
            return False
        import psycopg

        try:
            psycopg.connect(self.url("postgres"), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def url(self, database: str) -> str:
        return f"postgresql:///{database}?host={self.folder}&user=berth"


class Redis(Server):
    def __init__(self) -> None:
        binary = shutil.which("redis-server") or shutil.which("valkey-server")
        if binary is None:
            raise RuntimeError("Redis is not installed: apt-get install redis-server")
        folder = private_folder("redis")
        self.socket = folder / "redis.sock"
        super().__init__(
            "Redis",
            [
                binary,
                "--port",
                "0",
                "--unixsocket",
                str(self.socket),
                "--unixsocketperm",
                "777",
                "--save",
                "",
                "--appendonly",
                "no",
                "--dir",
                str(folder),
            ],
            folder,
        )

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def ready(self) -> bool:
        import redis

        try:
            client = redis.Redis.from_url(self.url, socket_timeout=2)
            client.ping()
            client.close()
        except redis.ConnectionError:
            return False
        return True
