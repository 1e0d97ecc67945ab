"""Making a machine ready to carry boxes.

In charge of: the checks, the packages, and the order in which an install's parts come to exist; after a restart of the
machine, of bringing back what lives in the kernel only (:func:`bring_up`). Every step may be repeated, and a cut-short
set-up is finished by the next. Not in charge of: undoing it (`teardown`), running the daemon (`serve`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from typing import Any, Final

from hostd import cgroups, config, disks, firewall, images, namespaces, network, seccomp, slots
from hostd.bundles import CRUN
from hostd.config import HostConfig, write_file
from hostd.messages import Refused

Say = Callable[[dict[str, Any]], None]

PACKAGES: Final = {  # package -> a file that tells it is there
    "crun": CRUN,
    "btrfs-progs": "/usr/bin/btrfs",
    "nftables": "/usr/sbin/nft",
    "mmdebstrap": "/usr/bin/mmdebstrap",
    "zstd": "/usr/bin/zstd",
    "catatonit": "/usr/bin/catatonit",
    "golang-github-containers-common": seccomp.SOURCE,
}
_OLDEST_KERNEL: Final = (5, 15)  # id-mapped mounts of btrfs
_SIMPLE_QUOTA_KERNEL: Final = (6, 7)
_APT_SECONDS: Final = 900


def run(cfg: HostConfig, say: Say) -> int:
    """Set the machine up, telling each step as a JSON object; the last has ``done`` or ``error``. Returns 0 or 1."""
    try:
        say({"done": True, **set_up(cfg, say)})
    except (Refused, config.ConfigError, OSError, subprocess.SubprocessError) as error:
        code = error.code if isinstance(error, Refused) else "internal"
        say({"error": {"code": code, "message": str(error)}})
        return 1
    return 0


def load(path: str) -> HostConfig:
    """The configuration at ``path``; when it names no install number, one is taken and written into it.

    Raises ConfigError, OSError.
    """
    with open(path, "rb") as file:
        data = json.loads(file.read(1 << 20))
    if isinstance(data, dict) and data.get("install") is None:
        install, root = config.claim_install(data.get("root"))
        data = {**data, "install": install, "root": root}
        write_file(path, json.dumps(data, indent=2).encode() + b"\n", mode=0o600)
    return config.from_dict(data)


def set_up(cfg: HostConfig, say: Say) -> dict[str, Any]:
    """Everything, in order. Returns what the caller wants to know. Raises Refused, ConfigError, OSError."""
    warnings: list[str] = []

    def warn(text: str) -> None:
        warnings.append(text)
        say({"step": "warning", "message": text})

    _check_machine(warn)
    install_packages(say)
    config.claim_install(cfg.root, cfg.install)
    os.chmod(cfg.root, 0o711)  # every folder above a box's root must be passable for its unprivileged root
    _check_passable(cfg)
    cfg.save()
    say({"step": "pool", "made": disks.make_pool(cfg)})
    _write_parts(cfg)
    quota = bring_up(cfg)
    say({"step": "machine", "quota": quota, "gateway": cfg.gateway, "resolvers": list(network.resolvers(cfg))})
    if quota == "full":
        warn("this kernel has no simple quotas (Linux 6.7): making a box will take up to 0.4 s more among 200 others")
    if not network.resolvers(cfg):
        warn("no resolver that boxes could reach was found: set dns")
    for chain in firewall.dropping_forward_chains():
        warn(f"{chain} drops forwarded packets by policy: accept those from and to {cfg.link_prefix}* in it")
    cfg = dataclasses.replace(cfg, image=images.ensure(cfg, lambda event, **more: say({"step": event, **more})))
    cfg.save()
    return {
        "config": cfg.path,
        "install": cfg.install,
        "image": cfg.image,
        "image_stream": images.stream_path(cfg, cfg.image),
        "received_uuid": images.received_uuid(cfg, cfg.image),
        "cgroup": cgroups.detect().kind,
        "pool_bytes": disks.space(cfg)[0],
        "warnings": warnings,
    }


def bring_up(cfg: HostConfig) -> str:
    """What a restart of the machine takes away: mount, addresses, rules, cgroups, run-time folders. Repeatable, quick
    when nothing is missing. Call it in the machine's own mount namespace. Returns the kind of quota.

    Raises Refused, OSError.
    """
    config.claim_install(cfg.root, cfg.install)
    os.makedirs(cfg.run, mode=0o711, exist_ok=True)
    for folder in (cfg.runtime_state, f"{cfg.run}/b"):
        os.makedirs(folder, mode=0o711, exist_ok=True)
    os.makedirs(f"{cfg.run}/k", mode=0o700, exist_ok=True)
    slots.prepare(cfg)
    if not namespaces.is_inside(cfg):
        if namespaces.is_pinned(cfg) and not disks.is_pool_mounted(cfg):
            namespaces.unpin(cfg)  # it was made without this pool
        disks.mount_pool(cfg)
    quota = disks.prepare_pool(cfg)
    cgroups.detect().prepare(cfg.cgroup)
    network.machine_up(cfg)
    firewall.load(cfg, network.resolvers(cfg))
    return quota


def _write_parts(cfg: HostConfig) -> None:
    """The install's own copies of what boxes start with: an upgrade or removal of a package changes none of them."""
    profile = seccomp.derive(seccomp.load_source(), nested_namespaces=cfg.nested_user_namespaces)
    write_file(cfg.seccomp_profile, json.dumps(profile).encode(), mode=0o600)
    write_file(cfg.seccomp_filter, seccomp.compile_filter(profile), mode=0o600)
    with open(PACKAGES["catatonit"], "rb") as file:
        write_file(f"{cfg.root}/init", file.read(), mode=0o755)


def _check_machine(warn: Callable[[str], None]) -> None:
    if os.geteuid() != 0:
        raise Refused("internal", "set-up must run as root")
    if os.uname().machine not in ("x86_64", "aarch64"):
        raise Refused("internal", f"boxes are made on x86_64 and aarch64 only, not on {os.uname().machine}")
    kernel = kernel_version(os.uname().release)
    if kernel < _OLDEST_KERNEL:
        raise Refused("internal", f"Linux 5.15 or newer is needed, this is {os.uname().release}")
    if kernel < _SIMPLE_QUOTA_KERNEL:
        warn(
            f"Linux {os.uname().release} has no simple quotas: ordinary quota groups are used, which are slow with "
            "many boxes. Debian's backports have a newer one: apt-get install -t bookworm-backports linux-image-amd64"
        )
    cgroups.detect()  # raises what is missing


def kernel_version(release: str) -> tuple[int, int]:
    """(major, minor) of a kernel's release text; (0, 0) when it has none."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _check_passable(cfg: HostConfig) -> None:
    for path in (cfg.root, cfg.run):
        folder = os.path.dirname(path)
        while folder != "/":
            if os.path.isdir(folder) and not os.stat(folder).st_mode & 0o001:
                raise Refused("internal", f"{folder} must be passable for everybody (chmod o+x) for boxes to start")
            folder = os.path.dirname(folder)


def install_packages(say: Say) -> None:
    """Install what is missing, with the machine's own apt. Raises Refused internal with apt's words."""
    missing = [package for package, file in PACKAGES.items() if not os.path.exists(file)]
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise Refused("internal", f"these packages are missing, and there is no apt-get: {' '.join(missing)}")
    say({"step": "packages", "installing": missing})
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *missing]
    words = ""
    for argv in (install, ["apt-get", "update", "-q"], install):  # lists may be old or not there
        done = subprocess.run(
            argv, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_APT_SECONDS
        )
        words = (done.stderr or done.stdout).strip()
        if argv is install and done.returncode == 0:
            return
    raise Refused("internal", f"{' '.join(install)} failed: {words[-600:]}")
