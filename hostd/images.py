"""Base images: built or imported once, kept as one stream, received into the pool.

In charge of: the recipe of Berth's own image, the cache of streams, image ids. Not in charge of: boxes' disks
(`disks`), nor how a stream reaches another machine's cache (`deliveries`): its id goes into that machine's
configuration before `setup`.

An image is a read-only btrfs subvolume. It is always received from its stream, on the machine that built it as well:
increments between hosts need the same received uuid everywhere. The id is taken from the stream's own bytes, so one id
means one stream; two hosts that built the same recipe by themselves have two different ids.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import IO, Any, Final

from hostd import btrfs
from hostd.config import HostConfig, write_file
from hostd.messages import Refused

Say = Callable[..., None]  # say("event", field=value): progress for whoever watches

RECIPE: Final = 2  # raise it when the steps below change what comes out
PACKAGES: Final = (
    *("bash", "coreutils", "sudo", "less", "nano", "vim-tiny", "file", "xz-utils", "unzip", "rsync", "mount"),
    *("curl", "ca-certificates", "git", "openssh-client", "openssh-server", "netbase", "iproute2", "iputils-ping"),
    *("procps", "psmisc", "strace", "python3", "python3-pip", "python3-venv", "libnss-myhostname"),
)
_LEFT_OUT: Final = ("/usr/share/man/*", "/usr/share/locale/*", "/usr/share/doc/*")
_KEPT: Final = ("/usr/share/doc/*/copyright", "/usr/share/locale/locale.alias")

_IN_STREAM: Final = "image"  # the subvolume's name inside every stream
_BUILDING: Final = "building"
_BUILD_SECONDS: Final = 1800
_STREAM_SECONDS: Final = 900
_STREAM_MAX_BYTES: Final = 64 << 30
_CHUNK: Final = 1 << 20
_ID = re.compile(r"img_[0-9a-f]{12}")


def list_images(cfg: HostConfig) -> list[str]:
    """Ids of the images in the pool, sorted. Raises OSError when the pool is not there."""
    return sorted(name for name in os.listdir(cfg.images) if _ID.fullmatch(name))


def has_image(cfg: HostConfig, image: str) -> bool:
    return bool(_ID.fullmatch(image)) and os.path.isdir(cfg.image_path(image))


def ensure(cfg: HostConfig, say: Say, *, rebuild: bool = False) -> str:
    """Have ``cfg.image`` in the pool (the image of our own recipe when that is empty) and return its id.

    From the pool, else from the cache, else (our own only) by building it. Raises Refused: unknown_image, no_space,
    internal.
    """
    with _lock(cfg):
        wanted = cfg.image or (None if rebuild else _cached_recipe(cfg))
        if wanted and not _ID.fullmatch(wanted):
            raise Refused("unknown_image", f"{wanted!r} is not an image id")
        if wanted and has_image(cfg, wanted):
            say("image", image=wanted, source="pool")
            return wanted
        if wanted and os.path.exists(stream_path(cfg, wanted)):
            _receive(cfg, wanted)
            say("image", image=wanted, source="cache")
            return wanted
        if wanted:
            raise Refused("unknown_image", f"{wanted} is neither in the pool nor in {cfg.image_cache}")
        say("image_build", packages=len(PACKAGES), note="about a minute")
        image = _make(cfg, lambda folder: _bootstrap(cfg, folder, say), {"recipe": _recipe_key()})
        write_file(f"{cfg.image_cache}/recipe-{_recipe_key()}", image.encode())
        say("image", image=image, source="built")
        return image


def import_tar(cfg: HostConfig, path: str, say: Say) -> str:
    """Make an image of a root file system's tar (any compression tar knows) and return its id.

    The tar is trusted as much as the operator who gives it: it is unpacked as root. Raises Refused internal, OSError.
    """
    with _lock(cfg):
        image = _make(cfg, lambda folder: _unpack(path, folder), {"tar": os.path.basename(path)})
        say("image", image=image, source="tar")
        return image


def received_uuid(cfg: HostConfig, image: str) -> str:
    """What an incremental stream against this image refers to; equal on every host that has the image."""
    return btrfs.received_uuid(cfg.image_path(image))


def stream_path(cfg: HostConfig, image: str) -> str:
    """Where the cache keeps an image's stream. Raises Refused unknown_image for what is no id."""
    if not _ID.fullmatch(image):
        raise Refused("unknown_image", f"{image!r} is not an image id")
    return f"{cfg.image_cache}/{image}.btrfs.zst"


# --- making ---------------------------------------------------------------------------------------------------------


def _make(cfg: HostConfig, fill: Callable[[str], None], about: dict[str, Any]) -> str:
    """Fill a fresh subvolume, make a stream of it in the cache, and receive that."""
    folder = f"{cfg.images}/{_BUILDING}"
    _discard(cfg, _BUILDING)
    _discard(cfg, _IN_STREAM)
    btrfs.create_subvolume(cfg.images, _BUILDING)
    try:
        os.chmod(folder, 0o755)
        fill(folder)
        btrfs.set_read_only(folder, True)
        os.rename(folder, f"{cfg.images}/{_IN_STREAM}")  # a stream names what it creates
        image = _send(cfg, about)
    finally:
        _discard(cfg, _BUILDING)
        _discard(cfg, _IN_STREAM)
    _receive(cfg, image)
    return image


def _send(cfg: HostConfig, about: dict[str, Any]) -> str:
    os.makedirs(cfg.image_cache, mode=0o755, exist_ok=True)
    _forget_unfinished(cfg)
    unfinished = f"{cfg.image_cache}/{os.getpid()}.new"
    digest = hashlib.sha256()
    total = 0
    try:
        with open(unfinished, "wb") as file:
            with pipe(["btrfs", "-q", "send", f"{cfg.images}/{_IN_STREAM}"], stdout=subprocess.PIPE) as send:
                with pipe(["zstd", "-q", "-3", "-T2", "-c"], stdin=subprocess.PIPE, stdout=file) as pack:
                    assert send.stdout and pack.stdin
                    for piece in iter(lambda: send.stdout.read(_CHUNK), b""):  # type: ignore[union-attr]
                        digest.update(piece)
                        total += len(piece)
                        pack.stdin.write(piece)
                    pack.stdin.close()
            file.flush()
            os.fsync(file.fileno())
        image = f"img_{digest.hexdigest()[:12]}"
        about = {"id": image, "sha256": digest.hexdigest(), "stream_bytes": total, **about}
        write_file(f"{cfg.image_cache}/{image}.json", json.dumps(about).encode() + b"\n")
        os.rename(unfinished, stream_path(cfg, image))
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)
    return image


def _forget_unfinished(cfg: HostConfig) -> None:
    """Remove what a killed making left in the cache."""
    for name in os.listdir(cfg.image_cache):
        path = f"{cfg.image_cache}/{name}"
        with contextlib.suppress(FileNotFoundError):
            if name.endswith(".new") and time.time() - os.stat(path).st_mtime > _STREAM_SECONDS:
                os.unlink(path)


def _receive(cfg: HostConfig, image: str) -> None:
    """Receive a cached stream, checking its bytes against its id on the way. Raises Refused."""
    _discard(cfg, _IN_STREAM)
    digest = hashlib.sha256()
    total = 0
    try:
        with pipe(["zstd", "-q", "-dc", stream_path(cfg, image)], stdout=subprocess.PIPE) as unpack:
            with pipe(["btrfs", "-q", "receive", "--chroot", cfg.images], stdin=subprocess.PIPE) as receive:
                assert unpack.stdout and receive.stdin
                for piece in iter(lambda: unpack.stdout.read(_CHUNK), b""):  # type: ignore[union-attr]
                    digest.update(piece)
                    total += len(piece)
                    if total > _STREAM_MAX_BYTES:
                        raise Refused("internal", f"image {image} is longer than {_STREAM_MAX_BYTES} bytes")
                    receive.stdin.write(piece)
                receive.stdin.close()
        if not digest.hexdigest().startswith(image.removeprefix("img_")):
            raise Refused("internal", f"the cached stream of {image} is damaged: remove {stream_path(cfg, image)}")
        # Within one folder: a read-only subvolume cannot be moved to another.
        os.rename(f"{cfg.images}/{_IN_STREAM}", cfg.image_path(image))
    finally:
        _discard(cfg, _IN_STREAM)
    btrfs.sync(cfg.images)


@contextlib.contextmanager
def pipe(argv: list[str], **streams: int | IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A program at one end of a pipe; raises Refused internal with its last words when it fails. A pipe that breaks
    (the other end failed first) is left to that end's message."""
    process: subprocess.Popen[bytes] = subprocess.Popen(argv, stderr=subprocess.PIPE, **streams)  # type: ignore[call-overload]
    try:
        try:
            yield process
        except BrokenPipeError:
            pass
        if process.stdin:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        assert process.stderr
        words = process.stderr.read(65_536)
        status = process.wait(timeout=_STREAM_SECONDS)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()
    if status:
        text = words.decode(errors="replace").strip()
        code = "no_space" if "No space left" in text or "quota exceeded" in text else "internal"
        raise Refused(code, f"{argv[0]} {argv[1]} ended with {status}: {text[-500:]}")


def _discard(cfg: HostConfig, name: str) -> None:
    path = f"{cfg.images}/{name}"
    if not os.path.isdir(path):
        return
    btrfs.set_read_only(path, False)
    for nested in btrfs.nested_subvolumes(path):
        btrfs.delete_subvolume_by_id(cfg.images, nested)
    btrfs.delete_subvolume(cfg.images, name)


# --- our own recipe -------------------------------------------------------------------------------------------------


def _bootstrap(cfg: HostConfig, folder: str, say: Say) -> None:
    """Debian as this machine has it, from this machine's own package sources."""
    argv = ["mmdebstrap", "--mode=root", "--variant=apt", f"--include={','.join(PACKAGES)}"]
    argv += ['--aptopt=Apt::Install-Recommends "false"']
    argv += [f"--aptopt={line}" for line in _apt_proxies()]
    argv += [f"--dpkgopt=path-exclude={path}" for path in _LEFT_OUT]
    argv += [f"--dpkgopt=path-include={path}" for path in _KEPT]
    argv += [_codename(), folder]
    sources = "".join(f"{line}\n" for line in apt_sources(_codename()))
    log = f"{cfg.root}/image-build.log"
    with open(log, "wb") as out, tempfile.TemporaryFile() as given:
        given.write(sources.encode())
        given.seek(0)
        # "-": sources from standard input; without any, mmdebstrap takes Debian's own mirrors.
        process = subprocess.Popen([*argv, "-"] if sources else argv, stdin=given, stdout=out, stderr=out)
        try:
            status = _await_bootstrap(process, log, say)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if status:
        raise Refused("internal", f"mmdebstrap ended with {status}: {_tail(log)}")
    _customise(folder)


def _await_bootstrap(process: subprocess.Popen[bytes], log: str, say: Say) -> int:
    """Its exit status, telling each new line that is about a step. Raises Refused when it takes too long."""
    deadline = time.monotonic() + _BUILD_SECONDS
    told = ""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=2)
        steps = [line[3:] for line in _tail(log).splitlines() if line.startswith("I: ")]
        if steps and steps[-1] != told:
            told = steps[-1]
            say("image_build", doing=told)
        if time.monotonic() > deadline:
            raise Refused("internal", f"mmdebstrap took more than {_BUILD_SECONDS} s: see {log}")


def _customise(folder: str) -> None:
    """What makes a Debian a box: its user, and nothing that must differ from box to box."""
    _chroot(folder, "useradd", "-m", "-u", "1000", "-U", "-s", "/bin/bash", "user")
    # "*" is no password; "!" would make sshd call the account locked.
    _chroot(folder, "usermod", "-p", "*", "user")
    _write(folder, "etc/sudoers.d/user", "user ALL=(ALL:ALL) NOPASSWD: ALL\nDefaults !fqdn\n", 0o440)
    _write(folder, "etc/hosts", "127.0.0.1 localhost\n127.0.1.1 box\n")
    _write(folder, "etc/hostname", "box\n")
    _write(folder, "etc/resolv.conf", "")  # the host binds its own over it
    _write(folder, "etc/machine-id", "")  # likewise
    _write(folder, "etc/profile", keep_path(_read(folder, "etc/profile")))
    for name in os.listdir(f"{folder}/etc/ssh"):
        if name.startswith("ssh_host_"):
            os.unlink(f"{folder}/etc/ssh/{name}")
    for name in ("etc/apt/apt.conf.d/99mmdebstrap", "etc/apt/apt.conf"):  # this machine's proxies are not the box's
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{folder}/{name}")
    for name in os.listdir(f"{folder}/var/log"):
        path = f"{folder}/var/log/{name}"
        if os.path.isfile(path):
            os.truncate(path, 0)
    shutil.rmtree(f"{folder}/var/lib/apt/lists", ignore_errors=True)
    os.makedirs(f"{folder}/var/lib/apt/lists/partial", exist_ok=True)
    os.chmod(f"{folder}/tmp", 0o1777)


def keep_path(profile: str) -> str:
    """/etc/profile that leaves a PATH it was given alone: a devbox's own environment must survive a login shell.

    bash makes up a PATH of its own when it gets none, and does not export that one; so "was it exported" is the test.
    bash itself is asked first: every command runs through here, and a program costs it two milliseconds.
    """
    exported = """[ "${BASH_VERSION-}" ] && eval '[[ ${PATH@a} == *x* ]]'"""
    block = re.compile(r'^if \[ "\$\(id -u\)" -eq 0 \]; then\n.*?^fi\nexport PATH\n', re.MULTILINE | re.DOTALL)
    return block.sub(
        lambda found: f"if ! {{ {exported} || /usr/bin/printenv PATH >/dev/null; }}; then\n{found[0]}fi\n",
        profile,
        count=1,
    )


def _unpack(path: str, folder: str) -> None:
    argv = ["tar", "-C", folder, "--numeric-owner", "--xattrs", "--xattrs-include=*", "--acls", "-xpf", path]
    done = subprocess.run(argv, capture_output=True, timeout=_BUILD_SECONDS, check=False)
    if done.returncode:
        raise Refused("internal", f"tar ended with {done.returncode}: {done.stderr.decode(errors='replace')[-500:]}")
    for name in ("etc", "proc", "sys", "dev", "run", "tmp"):
        os.makedirs(f"{folder}/{name}", exist_ok=True)


def apt_sources(codename: str) -> list[str]:
    """This machine's package sources for Debian ``codename`` itself, in one-line form. Other vendors' are left out."""
    suites = {codename, f"{codename}-updates", f"{codename}-security", f"{codename}/updates"}
    lines: list[str] = []
    paths = ["/etc/apt/sources.list"]
    with contextlib.suppress(FileNotFoundError):
        paths += sorted(f"/etc/apt/sources.list.d/{name}" for name in os.listdir("/etc/apt/sources.list.d"))
    for path in paths:
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                text = file.read()
        except FileNotFoundError:
            continue
        lines += _deb822(text, suites) if path.endswith(".sources") else _one_line(text, suites, path)
    return list(dict.fromkeys(lines))


def _one_line(text: str, suites: set[str], path: str) -> list[str]:
    if not path.endswith(".list"):
        return []
    found = []
    for line in text.splitlines():
        parts = re.fullmatch(r"deb\s+(?:\[([^]]*)\]\s+)?(\S+)\s+(\S+)\s+(.+)", line.split("#")[0].strip())
        if parts and parts[3] in suites:
            found.append(_source(parts[2], parts[3], parts[4].split(), (parts[1] or "").split()))
    return found


def _deb822(text: str, suites: set[str]) -> list[str]:
    found = []
    for stanza in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        last = ""
        for line in stanza.splitlines():
            if line.startswith("#"):
                continue
            if line[:1] in (" ", "\t") and last:
                fields[last] += " " + line.strip()
            elif ":" in line:
                last, value = (part.strip() for part in line.split(":", 1))
                last = last.lower()
                fields[last] = value
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() == "no":
            continue
        signed = fields.get("signed-by", "")
        options = [f"signed-by={signed}"] if signed.startswith("/") else []
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                if suite in suites:
                    found.append(_source(uri, suite, fields.get("components", "main").split(), options))
    return found


def _source(uri: str, suite: str, components: list[str], options: list[str]) -> str:
    # The distribution's own keyring is found without being named; naming it would need the file inside the image too.
    kept = [word for word in options if word.startswith("signed-by=") and "debian-archive" not in word]
    return " ".join(["deb", *([f"[{' '.join(kept)}]"] if kept else []), uri, suite, *components])


def _apt_proxies() -> list[str]:
    done = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, timeout=30, check=False)
    return [line for line in done.stdout.splitlines() if re.match(r"Acquire::https?::Proxy", line)]


def _codename() -> str:
    with open("/etc/os-release", encoding="utf-8") as file:
        found = re.search(r'^VERSION_CODENAME="?([a-z]+)"?$', file.read(), re.MULTILINE)
    return found[1] if found else "stable"


def _recipe_key() -> str:
    """Names what would be built here; the same on machines whose builds are interchangeable."""
    parts = [RECIPE, PACKAGES, _LEFT_OUT, _KEPT, _codename(), platform.machine()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _cached_recipe(cfg: HostConfig) -> str | None:
    try:
        with open(f"{cfg.image_cache}/recipe-{_recipe_key()}", encoding="ascii") as file:
            image = file.read(64).strip()
    except FileNotFoundError:
        return None
    return image if os.path.exists(stream_path(cfg, image)) else None


@contextlib.contextmanager
def _lock(cfg: HostConfig) -> Iterator[None]:
    """One maker of images per pool at a time: everything in the making has a fixed name."""
    lock = os.open(f"{cfg.root}/images.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _chroot(folder: str, *argv: str) -> None:
    done = subprocess.run(["chroot", folder, *argv], capture_output=True, timeout=60, check=False)
    if done.returncode:
        raise Refused("internal", f"{argv[0]} in the image failed: {done.stderr.decode(errors='replace')[-300:]}")


def _write(folder: str, name: str, text: str, mode: int = 0o644) -> None:
    path = f"{folder}/{name}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # it may be a link that leads out of the image
    with open(path, "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), mode)
        file.write(text)


def _read(folder: str, name: str) -> str:
    with open(f"{folder}/{name}", encoding="utf-8") as file:
        return file.read()


def _tail(path: str) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 600))
        return file.read().decode(errors="replace").strip()
