"""Finding the victim of a fault and striking it. Every blow is at a process of the given installation, by its pid."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable

import psycopg
import redis

from tests.chaos.plan import Fault
from tests.chaos.site import Process, Site, children

_TABLE = "berth_chaos"
WITHOUT_API = frozenset({"postgres", "postgres backend"})


class Striker:
    """Carries out faults, undoes those that last, and remembers what it did."""

    def __init__(self, site: Site, say: Callable[[str], None]) -> None:
        self.site, self._say = site, say
        self.began = time.monotonic()
        #: (seconds after the start, kind, pids, what more there is to say)
        self.done: list[tuple[float, str, tuple[int, ...], str]] = []
        self.struck: set[int] = set()
        #: slot -> when its keeper, its spawner or the zygote was hit; "" stands for all slots
        self.on_boxes: list[tuple[float, str]] = []
        #: when blows that take the API away were over
        self.on_api: list[float] = []
        self._frozen: set[Process] = set()
        #: role -> the pids of those that run beside the supervisor's
        self.more: dict[str, Callable[[], set[int]]] = {}
        self._cut: set[int] = set()

    def strike(self, fault: Fault) -> None:
        """Do it. A fault that lasts is kept up for its time, so call it from a thread of its own."""
        verb, _, what = fault.kind.partition(" ")
        if verb == "flush":
            self._note(fault, (), self._flush())
        elif verb == "cut":
            self._hold_cut(fault, self.site.ports[what])
        elif fault.kind == "kill postgres backend":
            self._note(fault, (), self._kill_backend(fault))
        else:
            victims = self._victims(what, fault)
            if verb == "freeze":
                self._freeze(fault, victims)
            else:
                self._note(fault, tuple(one.pid for one in victims), "" if victims else "nobody there")
                number = {"restart": signal.SIGINT, "stop": signal.SIGTERM}.get(verb, signal.SIGKILL)
                for one in victims:
                    self._signal(one, number)

    def undo(self) -> None:
        """Let everything go on, whatever happened."""
        for one in list(self._frozen):
            self._signal(one, signal.SIGCONT)
        for port in list(self._cut):
            self._end_cut(port)

    # -- victims -------------------------------------------------------------------------------------------------------

    def _victims(self, what: str, fault: Fault) -> list[Process]:
        site, roles = self.site, self.site.roles()
        pids: list[int | None]
        match what:
            case "web" if fault.kind == "stop web":
                pids = [roles.get("web")]
            case "web" | "postgres" if fault.kind in ("kill web", "freeze web", "freeze postgres"):
                pids = [roles.get(what), *children(roles.get(what, 0))]
            case "worker" | "watcher":
                pids = self._one(sorted({roles.get(what, 0), *self.more.get(what, lambda: set())()} - {0}), fault)
            case "web worker":
                pids = self._one(sorted(children(roles.get("web", 0))), fault)
                self.struck.add(roles.get("web", 0))  # which ends when it loses the same one again at once
            case "web master":
                pids = [roles.get("web")]
            case "ssh connection":
                # Either of the two processes that sshd has for each: the privileged one, or the one that serves it.
                pids = self._one(sorted({pid for pid, _ in site.ssh_connections()}), fault)
            case "hostd":
                pids = [site.hostd()]
            case "maker":
                pids = self._one(sorted(site.makers()), fault)
            case "zygote":
                pids = [site.zygote()]
                self.on_boxes.append((self._now(), ""))
            case "keeper":
                keepers = sorted(site.keepers().items())
                slot, pid = keepers[int(fault.pick * len(keepers))] if keepers else ("", None)
                pids = [pid]
                self.on_boxes.append((self._now(), slot))
            case "spawner":
                pids = self._one(sorted(site.spawners()), fault)
                self.on_boxes.append((self._now(), ""))
            case _:
                pids = [roles.get(what)]
        return [one for pid in pids if pid and (one := Process.of(pid, what))]

    @staticmethod
    def _one(pids: list[int], fault: Fault) -> list[int | None]:
        return [pids[int(fault.pick * len(pids))]] if pids else []

    # -- blows ---------------------------------------------------------------------------------------------------------

    def _signal(self, one: Process, number: int) -> None:
        if number != signal.SIGCONT:
            self.struck.add(one.pid)
        with contextlib.suppress(ProcessLookupError):
            handle = os.pidfd_open(one.pid)
            try:
                if one.alive:
                    signal.pidfd_send_signal(handle, number)
            finally:
                os.close(handle)

    def _freeze(self, fault: Fault, victims: list[Process]) -> None:
        self._note(fault, tuple(one.pid for one in victims), f"for {fault.lasts:.1f} s" if victims else "nobody there")
        self._frozen |= set(victims)
        for one in victims:
            self._signal(one, signal.SIGSTOP)
        time.sleep(fault.lasts if victims else 0)
        for one in victims:
            self._signal(one, signal.SIGCONT)
        self._frozen -= set(victims)

    def _flush(self) -> str:
        client = redis.Redis.from_url(self.site.env["REDIS_URL"], socket_timeout=1, socket_connect_timeout=1)
        try:
            client.flushall()
        except redis.RedisError as error:
            return f"Redis was not there: {error}"
        finally:
            client.close()
        return ""

    def _kill_backend(self, fault: Fault) -> str:
        """One of PostgreSQL's own processes: it then restarts by itself, without its postmaster having died."""
        try:
            with psycopg.connect(self.site.env["DATABASE_URL"], autocommit=True, connect_timeout=2) as connection:
                found = connection.execute(
                    "SELECT pid FROM pg_stat_activity WHERE datname = 'berth' AND pid <> pg_backend_pid() ORDER BY pid"
                ).fetchall()
        except psycopg.OperationalError as error:
            return f"PostgreSQL was not there: {error}"
        for pid in self._one([int(row[0]) for row in found], fault):
            if pid and (one := Process.of(pid, "postgres")):
                self._signal(one, signal.SIGKILL)
                return f"pid {pid}"
        return "nobody there"

    def _hold_cut(self, fault: Fault, port: int) -> None:
        """Packets to and from a server of ours are dropped, as a network that went away would: nobody is told."""
        rules = f"""
        table inet {_TABLE}_{port} {{
            chain input {{
                type filter hook input priority -300; policy accept;
                iifname "lo" tcp dport {port} drop
                iifname "lo" tcp sport {port} drop
            }}
        }}"""
        self._note(fault, (), f"port {port} for {fault.lasts:.1f} s")
        self._cut.add(port)
        subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True, capture_output=True, timeout=10)
        time.sleep(fault.lasts)
        self._end_cut(port)

    def _end_cut(self, port: int) -> None:
        argv = ["nft", "delete", "table", "inet", f"{_TABLE}_{port}"]
        subprocess.run(argv, check=False, capture_output=True, timeout=10)
        self._cut.discard(port)

    # -- the timeline --------------------------------------------------------------------------------------------------

    def _now(self) -> float:
        return time.monotonic() - self.began

    def _note(self, fault: Fault, pids: tuple[int, ...], more: str) -> None:
        self.done.append((self._now(), fault.kind, pids, more))
        if fault.kind.split(" ", 1)[1] in WITHOUT_API or "web" in fault.kind:
            self.on_api.append(self._now() + fault.lasts)
        who = f" pid {' '.join(str(pid) for pid in pids)}" if pids else ""
        self._say(f"{fault.kind}{who}{' ' + more if more else ''}")
