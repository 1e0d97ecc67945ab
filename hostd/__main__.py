"""The command line of hostd, the same from the package and from the shipped bundle.

`setup` and `teardown` print JSON lines of progress and end with ``{"done": true, …}`` or ``{"error": {…}}``. `serve`
runs the daemon; with ``--detach`` it returns, in the same way, once the daemon answers.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import select
import socket
import sys
import time
from typing import Any

import hostd
from hostd import bundle, config, messages
from hostd.config import HostConfig

DETACH_SECONDS = 60.0  # a detached hostd must answer within this time
_REFUSED, _FAILED = 2, 1


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status is 0 only when it did what it should."""
    parser = argparse.ArgumentParser(prog="hostd", description="Makes and keeps devboxes on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("setup", "make this machine ready: pool, network, image"),
        ("stop", "end the boxes and all that runs, and keep the data"),
        ("teardown", "remove every trace of the install, its boxes included"),
        ("serve", "serve requests on the install's socket"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--config", required=True, help="the install's host.json")
        if name == "serve":
            command.add_argument("--detach", action="store_true", help="return once the daemon answers")
            command.add_argument("--inherit", help=argparse.SUPPRESS)
    image = commands.add_parser(
        "image", help="tell what is here of an image's stream; with --sha256, take the rest of it"
    )
    image.add_argument("--config", required=True, help="the install's host.json")
    image.add_argument("--id", required=True)
    image.add_argument("--offset", type=int, default=0, help="how much of it is here already")
    image.add_argument("--size", type=int, default=0, help="the bytes of the whole")
    image.add_argument("--sha256", help="of the whole: given, the rest is read from standard input")
    version = commands.add_parser("version", help="print protocol and digest, having loaded every module")
    version.add_argument("--config", help="a host.json to be understood as well")
    options = parser.parse_args(argv)
    try:
        if options.command == "version":
            return _version(options.config)
        if options.command == "setup":
            from hostd import setup

            return setup.run(setup.load(options.config), say)
        cfg = config.load(options.config)
        if options.command == "image":
            from hostd import deliveries

            given = (options.offset, options.size, options.sha256, sys.stdin.buffer)
            told = deliveries.take(cfg, options.id, *given) if options.sha256 else deliveries.look(cfg, options.id)
            say({"done": True, **told})
            return 0
        if options.command in ("stop", "teardown"):
            from hostd import teardown

            return teardown.run(cfg, say, keep_data=options.command == "stop")
        return _serve(cfg, options)
    except (config.ConfigError, OSError, messages.Refused) as error:
        code = error.code if isinstance(error, messages.Refused) else "internal"
        say({"error": {"code": code, "message": str(error)}})
        return _FAILED


def _version(config_path: str | None) -> int:
    """Tell who this is, having tried all that a running hostd would meet later: it is asked before it takes over."""
    for module in pkgutil.iter_modules(hostd.__path__):
        importlib.import_module(f"hostd.{module.name}")
    if config_path:
        config.load(config_path)
    path = bundle.running_path()
    say({"protocol": messages.PROTOCOL, "digest": bundle.digest_of(path) if path else ""})
    return 0


def say(line: dict[str, Any]) -> None:
    """One line of JSON to whoever started us."""
    print(json.dumps(line), flush=True)


def _serve(cfg: HostConfig, options: argparse.Namespace) -> int:
    from hostd import serve

    path = os.path.abspath(options.config)
    if options.detach:
        return _detach(cfg, path)
    inherited: tuple[int, int] | None = None
    if options.inherit:
        listener, lock = options.inherit.split(",")
        inherited = int(listener), int(lock)
    try:
        return serve.serve(cfg, path, inherited)
    except serve.AlreadyServed as error:
        say({"error": {"code": "busy", "message": str(error)}})
        return _REFUSED


def _detach(cfg: HostConfig, path: str) -> int:
    """Start the daemon as nobody's child, in a session of its own, and wait until it answers."""
    if _answers(cfg):
        say({"done": True, "already": True})
        return 0
    running = bundle.running_path()
    argv = [sys.executable, "-I", os.path.realpath(running)] if running else [sys.executable, "-m", "hostd"]
    folder = f"{cfg.root}/log"
    os.makedirs(folder, mode=0o700, exist_ok=True)
    errors = os.open(f"{folder}/hostd.err", os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    said_before = os.fstat(errors).st_size
    daemon = _start_daemon([*argv, "serve", "--config", path], errors)
    deadline = time.monotonic() + DETACH_SECONDS
    while time.monotonic() < deadline:
        if _answers(cfg):
            say({"done": True})
            return 0
        if daemon is None or select.select([daemon], [], [], 0.05)[0]:
            words = " ".join(os.pread(errors, 65536, said_before).decode(errors="replace").split())
            return _fail(f"hostd ended at once: {words[-1000:] or f'see {folder}/hostd.log'}")
    return _fail(f"hostd did not answer within {DETACH_SECONDS:g} s; see {folder}/hostd.err and hostd.log")


def _start_daemon(argv: list[str], errors: int) -> int | None:
    """A pidfd of a process that is nobody's child; None when it ended already."""
    read, write = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            if grandchild := os.fork():
                os.write(write, str(grandchild).encode())
                os._exit(0)
            null = os.open("/dev/null", os.O_RDWR)
            for target, handle in enumerate((null, errors, errors)):
                os.dup2(handle, target)
            os.closerange(3, 2**20)
            os.execv(argv[0], argv)
        finally:
            os._exit(127)
    os.close(write)
    with open(read, "rb") as pipe:
        pid = int(pipe.read() or b"0")
    os.waitpid(child, 0)
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def _fail(message: str) -> int:
    say({"error": {"code": "internal", "message": message}})
    return _FAILED


def _answers(cfg: HostConfig) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(2.0)
        try:
            sock.connect(cfg.socket_path)
            sock.sendall(messages.request("hello"))
            return sock.recv(1) == b"{"
        except OSError:
            return False


if __name__ == "__main__":
    sys.exit(main())
