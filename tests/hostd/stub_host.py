"""hostd itself, on stubs of what is below it: boxes are files and a sleeping process, keepers a small script.

Started as a process by tests/hostd/stub_daemon.py: everything above the stubs is the real thing, needs no root
and no pool, and may be killed at will. Commands a stub keeper understands: ``exit N``, ``sleep SECONDS N``, ``die``.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # else the tree to be tested is on the path already, as a bundle
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hostd import boxes, bundles, config, images, jobs, keeper_spec, keepers, namespaces, packets, serve, setup, zygotes
from hostd.boxes import Slot, SlotState
from hostd.config import HostConfig
from hostd.keepers import start_time
from hostd.messages import Refused

IMAGE = "img_stub"


def slot_path(cfg: HostConfig, slot: str) -> Path:
    return Path(cfg.slots) / f"{slot}.json"


def new_slot(cfg: HostConfig, image: str, disk_bytes: int, box: str | None = None, *, machine_id: str = "") -> Slot:
    taken = {config.slot_number(path.stem) for path in Path(cfg.slots).glob("*.json")}
    n = next(n for n in range(100) if n not in taken)
    slot = f"s{n}-{secrets.token_hex(3)}"
    slot_path(cfg, slot).write_text(json.dumps({"image": image, "warm": False}))
    if box is not None:
        os.symlink(slot, f"{cfg.names}/{box}")
    return Slot(slot, n, image, disk_bytes)


def claim_warm(cfg: HostConfig, slot: str, box: str) -> bool:
    try:
        os.rename(f"{cfg.warm_slots}/{slot}", f"{cfg.names}/{box}")
    except FileNotFoundError:
        return False
    return True


def mark_warm(cfg: HostConfig, slot: str) -> None:
    os.symlink(slot, f"{cfg.warm_slots}/{slot}")


def list_slots(cfg: HostConfig) -> list[SlotState]:
    names = {os.readlink(path): path.name for path in Path(cfg.names).iterdir()}
    warm = {path.name for path in Path(cfg.warm_slots).iterdir()}
    found = []
    for path in Path(cfg.slots).glob("*.json"):
        made = Path(cfg.run) / "b" / path.stem
        state = "disk" if not made.exists() else "up"
        n = config.slot_number(path.stem)
        found.append(SlotState(path.stem, n, names.get(path.stem), path.stem in warm, state, IMAGE, None))
    return found


def make_disk(
    cfg: HostConfig, slot: str, n: int, image: str, disk_bytes: int, snapshot: str | None = None
) -> dict[str, Any]:
    time.sleep(float(os.environ.get("STUB_DISK_SECONDS", "0")))
    Path(cfg.disk(slot)).mkdir(parents=True, exist_ok=True)
    return {}


def boot(cfg: HostConfig, slot: str, n: int, limits: dict[str, int], hostname: str, box: str | None) -> dict[str, Any]:
    Path(cfg.bundle(slot)).parent.mkdir(parents=True, exist_ok=True)
    Path(cfg.bundle(slot)).write_text("")
    time.sleep(float(os.environ.get("STUB_BOOT_SECONDS", "0")))
    # An orphan at once, as a real init is: hostd inherits it.
    orphan = ["/bin/sh", "-c", "setsid /bin/sleep 600 >/dev/null & echo $!"]
    init = int(subprocess.run(orphan, stdout=subprocess.PIPE, check=True).stdout)
    while Path(f"/proc/{init}/comm").read_text() != "sleep\n":
        time.sleep(0.001)
    Path(cfg.bundle(slot)).write_text(str(init))
    keeper = start_keeper(cfg, slot)
    return {
        "spec": {"slot": slot, "box": box},
        "pid": keeper,
        "start": start_time(keeper),
        "init_pid": init,
        "init_start": start_time(init),
        "address": cfg.address(n),
        "booted_at_ms": int(time.time() * 1000),
        "phases": {},
    }


def start_keeper(cfg: HostConfig, slot: str) -> int:
    child = os.fork()
    if child == 0:
        os.setsid()
        os.closerange(3, 4096)
        os.execv(sys.executable, [sys.executable, __file__, "keeper", cfg.path, slot])
    Path(cfg.run, "stub-keeper", slot).write_text(str(child))
    return child


def restart_keeper(cfg: HostConfig, slot: str, n: int, spec: dict[str, Any]) -> dict[str, Any]:
    if not Path(cfg.run, "stub-keeper", slot).exists():
        raise Refused("not_ready", "the box is not up")
    pid = int(Path(cfg.run, "stub-keeper", slot).read_text())
    if start_time(pid) is None:
        pid = start_keeper(cfg, slot)
    return {"pid": pid, "start": start_time(pid)}


def set_limits(cfg: HostConfig, slot: str, limits: dict[str, int], hostname: str) -> dict[str, Any]:
    Path(cfg.root, "limits").write_text(json.dumps(limits))
    return {}


def stop(cfg: HostConfig, slot: str, n: int) -> dict[str, Any]:
    for path in (Path(cfg.run, "stub-keeper", slot), Path(cfg.bundle(slot))):
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(path.read_text()), signal.SIGKILL)
        path.unlink(missing_ok=True)
    return {}


def destroy(cfg: HostConfig, slot: str, n: int, keep_disk: bool, box: str | None) -> dict[str, Any]:
    time.sleep(float(os.environ.get("STUB_DESTROY_SECONDS", "0")))
    stop(cfg, slot, n)
    for folder in (cfg.names, cfg.warm_slots):
        for path in Path(folder).iterdir():
            if os.readlink(path) == slot:
                path.unlink()
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(cfg.disk(slot))
    slot_path(cfg, slot).unlink(missing_ok=True)
    return {}


def nothing(*_: Any, **__: Any) -> dict[str, Any]:
    return {}


def start_zygote(_: HostConfig) -> socket.socket:
    ours, theirs = socket.socketpair()
    theirs.detach()
    return ours


def serve_stub(path: str, inherited: tuple[int, int] | None) -> int:
    cfg = config.load(path)
    for folder in (cfg.slots, cfg.names, cfg.warm_slots, cfg.run, f"{cfg.run}/k", f"{cfg.run}/stub-keeper", cfg.pool):
        os.makedirs(folder, exist_ok=True)
    keepers.HUNG_SECONDS = float(os.environ.get("STUB_HUNG_SECONDS", "600"))
    bundles.machine_id = lambda *_: "0" * 32
    for name in ("new_slot", "claim_warm", "mark_warm", "list_slots"):
        setattr(boxes, name, globals()[name])
    for name in ("make_disk", "boot", "set_limits", "stop", "destroy", "restart_keeper"):
        jobs.JOBS[name] = globals()[name]
    for name in ("thaw_all", "start_zygote", "adopt_keeper", "drop_kept_disks"):
        jobs.JOBS[name] = nothing
    zygotes.ensure = lambda *_: False
    keeper_spec.start_zygote = start_zygote  # type: ignore[assignment]
    namespaces.enter = setup.bring_up = nothing  # type: ignore[assignment]
    images.list_images = lambda _: [IMAGE]  # type: ignore[assignment]
    images.has_image = lambda _, image: image == IMAGE  # type: ignore[assignment]
    return serve.serve(cfg, path, inherited)


# --- the stub keeper


class Keeper:
    def __init__(self, cfg: HostConfig, slot: str) -> None:
        self.path = Path(cfg.root) / f"stub-{slot}.json"
        self.known: dict[str, dict[str, Any]] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.box: str | None = None
        where = cfg.keeper_socket(slot)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(where)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(where)
        self.listener.listen(8)
        self.hosts: list[socket.socket] = []
        self.clients: dict[socket.socket, bytes] = {}

    def loop(self) -> None:
        while True:
            ready, _, _ = select.select([self.listener, *self.hosts, *self.clients], [], [], 0.02)
            for sock in ready:
                if sock is self.listener:
                    host = sock.accept()[0]
                    self.hosts.append(host)
                    packets.send(host, {"event": "hello", "box": self.box, "pid": os.getpid()})
                    for id in list(self.known):
                        self.tell(id, host)
                elif sock in self.hosts:
                    self.from_host(sock)
                else:
                    data = sock.recv(65536)
                    if data:
                        self.feed(sock, data)
                    else:
                        del self.clients[sock]
                        sock.close()
            for id, execution in self.known.items():
                if execution["state"] == "running" and time.time() >= execution["ends"]:
                    execution["state"] = "exited"
                    for host in self.hosts:
                        self.tell(id, host)
            self.save()

    def save(self) -> None:
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps(self.known))
        fresh.rename(self.path)

    def tell(self, id: str, host: socket.socket) -> None:
        execution = self.known[id]
        if execution["state"] == "exited" and not execution.get("acked"):
            packets.send(host, {"event": "exit", **self.view(id), "started_at_ms": 1, "exited_at_ms": 2})

    def view(self, id: str) -> dict[str, Any]:
        execution = self.known[id]
        view = {"id": id, "state": execution["state"], "sizes": [0, 0], "dropped": [0, 0], "reason": None}
        return {**view, "exit": execution["exit"]} if execution["state"] == "exited" else view

    def from_host(self, host: socket.socket) -> None:
        message, descriptors = packets.receive(host)
        if message is None:
            self.hosts.remove(host)
        elif "box" in message:
            self.box = message["box"]
        elif "ack" in message:
            for id in message["ack"]:
                if id in self.known:
                    self.known[id]["acked"] = True
        elif "connection" in message:
            client = socket.socket(fileno=descriptors[0])
            client.setblocking(True)
            self.clients[client] = b""
            import base64

            line = json.dumps(message["connection"]).encode() + b"\n"
            self.feed(client, line + base64.b64decode(message.get("rest", "")))

    def feed(self, client: socket.socket, data: bytes) -> None:
        self.clients[client] += data
        while b"\n" in self.clients[client]:
            line, _, rest = self.clients[client].partition(b"\n")
            request = json.loads(line)
            body = rest[: request.get("body", 0)]
            if len(body) < request.get("body", 0):
                return
            self.clients[client] = rest[len(body) :]
            client.sendall(json.dumps({"ok": True, **self.answer(request, body)}).encode() + b"\n")

    def answer(self, request: dict[str, Any], body: bytes) -> dict[str, Any]:
        verb, id = request["verb"], request.get("id", "")
        if verb == "list":
            return {"executions": [{"id": id, "state": known["state"]} for id, known in self.known.items()]}
        if verb == "spawn" and id not in self.known:
            words = json.loads(body)["command"].split()
            if words[0] == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            seconds = float(words[1]) if words[0] == "sleep" else 0.0
            self.known[id] = {"state": "running", "ends": time.time() + seconds, "exit": int(words[-1])}
            self.save()
        if id in self.known:
            return {**self.view(id), "named": self.box}
        return {"error": {"code": "unknown_id", "message": "no"}}


def main(argv: list[str]) -> int:
    if argv[0] == "keeper":
        Keeper(config.load(argv[1]), argv[2]).loop()
    if argv[0] == "version":
        return 0
    inherited = None
    if "--inherit" in argv:
        listener, lock = argv[argv.index("--inherit") + 1].split(",")
        inherited = int(listener), int(lock)
    return serve_stub(argv[argv.index("--config") + 1], inherited)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
