"""Taking a machine into the cluster as a VM host, and giving it back.

In charge of the order of enrolment and retirement and of the host's row while they run; also of cordoning. What is
done on the machine is `hosts.shipping` (as root), what it must show `hosts.proofs`.

Enrolment may be repeated after a failure: every step looks before it makes, and the row keeps id and install number.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import posixpath
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from django.conf import settings
from django.db import IntegrityError, connection, transaction
from django.db.models.functions import Now

from accounts.sealing import seal, unseal
from api.ids import new_id
from hosts import delivery, images, links, proofs, registry, shipping, ssh
from hosts.client import HostClient, HostError, HostUnreachable
from hosts.models import Host, HostState
from hosts.registry import BoxExitEvent, ExpectedBox
from hosts.ssh.admin import CommandFailed

SETUP_SECONDS: Final = 1800.0
"""Set-up may install packages and build the image."""
TEARDOWN_SECONDS: Final = 300.0
ADMIN_SECONDS: Final = 30.0
_GIB: Final = 1 << 30
_POOL_DEFAULT_MAX: Final = 200 * _GIB

log = logging.getLogger(__name__)
Progress = Callable[[str], None]


_FAILURES: Final = (
    ssh.SshError,
    shipping.ShippingFailed,
    images.NoStream,
    proofs.ProofFailed,
    CommandFailed,
    HostError,
    ValueError,
)


class EnrolmentFailed(Exception):
    """A step of enrolment or retirement failed; the text says which and why. The row says so as well."""


def _quiet(line: str) -> None:
    return None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What enrolment is asked for. `root` and `run_dir` default to the install's own on that machine."""

    name: str
    address: str
    port: int = 22
    admin_user: str = "root"
    admin_key: str = dataclasses.field(repr=False)
    """The private key's text."""
    pool_gb: int | None = None
    """GiB of a file made for the disks; None: 60 % of what is free, at most 200 GiB."""
    pool_device: str | None = None
    install: int | None = None
    dns: Sequence[str] = ()
    warm: int = 0
    root: str | None = None
    run_dir: str | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further fields of `host.json`."""


def enrol(
    wanted: Wanted, *, accept_key: Callable[[str, str], bool], progress: Progress = _quiet, cluster: str | None = None
) -> Host:
    """Make the machine a VM host and return its row, `ready`.

    `accept_key` is shown the host key ("type base64") and its fingerprint, and decides. Raises EnrolmentFailed; the
    row, once there is one, is then `failed` with the reason, and enrolling again under the same name goes on with it.
    """
    cluster = cluster or settings.BERTH.cluster
    if not cluster:
        raise EnrolmentFailed("BERTH_CLUSTER is not set: everything on a host carries the cluster's id")
    row: Host | None = None
    try:
        progress(f"asking {wanted.address} port {wanted.port} for its host key")
        host_key = ssh.scan_host_key(wanted.address, wanted.port)
        if not accept_key(host_key, ssh.fingerprint(host_key)):
            raise EnrolmentFailed("the host key was not accepted")
        login = ssh.Login(wanted.address, wanted.port, wanted.admin_user, wanted.admin_key, host_key)
        progress(f"logging in as {wanted.admin_user}")
        with ssh.Admin(login, timeout=10) as admin:
            row = _row(wanted, host_key)
            _make(row, wanted, cluster, admin, progress)
        return _accept(row, progress)
    except _FAILURES as error:
        problem: Exception = EnrolmentFailed(str(error))
        problem.__cause__ = error
    except EnrolmentFailed as error:
        problem = error
    if row is not None:
        Host.objects.filter(pk=row.pk, state=HostState.ENROLLING).update(
            state=HostState.FAILED, error_code="enrolment", error_detail=str(problem)[:2000]
        )
    raise problem


def _row(wanted: Wanted, host_key: str) -> Host:
    """The row of that name, new or of a failed try, set to what is wanted now."""
    fields: dict[str, Any] = {
        "address": wanted.address,
        "port": wanted.port,
        "admin_user": wanted.admin_user,
        "admin_key_sealed": seal(wanted.admin_key),
        "host_key": host_key,
        "warm": wanted.warm,
    }
    try:
        with transaction.atomic():
            return Host.objects.create(
                id=new_id("hst"), name=wanted.name, step="enrolling", wake_at=None, state=HostState.ENROLLING, **fields
            )
    except IntegrityError:
        hit = Host.objects.filter(name=wanted.name, state__in=[HostState.FAILED, HostState.ENROLLING]).update(
            state=HostState.ENROLLING, error_code=None, error_detail=None, **fields
        )
        if not hit:
            raise EnrolmentFailed(f"there is a host named {wanted.name!r} already") from None
        return Host.objects.get(name=wanted.name, state=HostState.ENROLLING)


# Arguments: bundle, root or "", install or "". Takes the install number, and tells about the machine.
_CLAIM = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from hostd import config
install = int(sys.argv[3]) if sys.argv[3] else None
install, root = config.claim_install(sys.argv[2] or None, install)
found = os.statvfs(root)
try:
    with open(root + "/host.json") as file: present = json.load(file)
except (OSError, ValueError): present = None
print(json.dumps({"install": install, "root": root, "free": found.f_bavail * found.f_frsize,
                  "machine": os.uname().machine, "present": present}))
"""

# Arguments: bundle, root, install. For an enrolment that ended before there was a configuration to tear down by.
_RELEASE = """
import os, shutil, sys
sys.path.insert(0, sys.argv[1])
from hostd import config
root = sys.argv[2]
if os.path.isdir(root) and not os.path.ismount(root + "/pool"): shutil.rmtree(root)
config.release_install(int(sys.argv[3]), root)
"""

# Arguments: user, home.
_LINK_USER = """set -eu
if getent passwd "$1" > /dev/null; then
    usermod --home "$2" --password '*' "$1"
else
    useradd --system --user-group --home-dir "$2" --no-create-home --shell /usr/sbin/nologin --password '*' "$1"
fi
install -d -m 755 -o root -g root "$2" "$2/.ssh"
"""


def _make(row: Host, wanted: Wanted, cluster: str, admin: ssh.Admin, progress: Progress) -> None:
    what = shipping.bundle()
    progress(f"shipping hostd {what.digest[:12]}")
    with shipping.staged(admin, what) as path:
        install = "" if wanted.install is None and not row.root else str(row.install if row.root else wanted.install)
        argv = [shipping.PYTHON, "-I", "-c", _CLAIM, path, wanted.root or row.root or "", install]
        machine = json.loads(admin.run(argv, timeout=ADMIN_SECONDS))
    present = machine["present"] or {}
    if present.get("cluster", cluster) != cluster:
        raise EnrolmentFailed(
            f"{machine['root']} belongs to another cluster ({present['cluster']}): retire it there first"
        )
    root: str = machine["root"]
    run_dir = wanted.run_dir or f"/run/berth-{machine['install']}"
    user = f"berth-link-{machine['install']}"
    # The key is kept from an earlier try, so that a link that was proven stays valid while we repeat.
    private = str(unseal(row.link_key_sealed)) if row.link_key_sealed else ssh.new_key("berth")[0]
    row.install, row.root, row.run_dir = machine["install"], root, run_dir
    row.link_user, row.link_key_sealed, row.socket_path = user, seal(private), f"{run_dir}/hostd.sock"
    row.architecture, row.digest = machine["machine"], what.digest
    kept = ("install", "root", "run_dir", "link_user", "link_key_sealed", "socket_path", "architecture", "digest")
    Host.objects.filter(pk=row.pk).update(**{name: getattr(row, name) for name in kept})
    links.forget(row.pk)

    path = shipping.put_bundle(admin, root, what)
    progress(f"install {row.install} in {root}; making the login {user}")
    home = posixpath.join(root, "link")
    admin.run(["sh", "-c", _LINK_USER, "link-user", user, home], timeout=ADMIN_SECONDS)
    shipping.put_file(admin, f"{home}/.ssh/authorized_keys", _authorized(private, row.socket_path).encode())
    config = {
        "cluster": cluster,
        "host": row.pk,
        "install": row.install,
        "root": root,
        "run": run_dir,
        "socket_group": user,
        "dns": list(wanted.dns),
        "warm": wanted.warm,
        **_pool(wanted, present, machine["free"]),
        **wanted.extra,
    }
    image = images.wanted(row, progress)
    if image is not None:
        config["image"] = image.id
    shipping.put_file(admin, f"{root}/host.json", json.dumps(config, indent=2).encode() + b"\n", "0600")

    def step(line: dict[str, Any]) -> None:
        rest = ", ".join(f"{key} {value}" for key, value in line.items() if key != "step")
        progress(f"set-up: {line.get('step', '')}{': ' if rest else ''}{rest}")

    if image is not None:
        images.send(admin, path, f"{root}/host.json", image, progress)
    progress("setting the machine up")
    done = shipping.run_hostd(admin, path, "setup", f"{root}/host.json", timeout=SETUP_SECONDS, on_progress=step)
    row.image_id = str(done.get("image") or "")
    if image is None:
        _keep_image(admin, done, progress)
    elif done["received_uuid"] != image.received_uuid:
        there = done["received_uuid"]
        raise EnrolmentFailed(f"{row.image_id} was received there as {there}, elsewhere as {image.received_uuid}")
    Host.objects.filter(pk=row.pk).update(image_id=row.image_id)
    progress("starting hostd")
    shipping.start_hostd(admin, root, f"{root}/host.json")
    progress("trying what the link's key must not do")
    for warning in proofs.prove_confinement(admin, links.where_is(row.pk).login):
        progress(f"warning: {warning}")


def _keep_image(admin: ssh.Admin, done: dict[str, Any], progress: Progress) -> None:
    """The first host's image becomes the cluster's. One that cannot be kept now is fetched when the next host comes."""
    try:
        images.keep(admin, done["image"], done["image_stream"], done["received_uuid"], progress)
    except (images.NoStream, CommandFailed) as error:
        progress(f"warning: the image is not kept in S3 yet: {error}")


def _authorized(private_key: str, socket_path: str) -> str:
    # permitopen in this form names a socket; permitlisten allows a port that an unprivileged user cannot have.
    options = f'restrict,port-forwarding,command="/bin/false",permitopen="[{socket_path}]:*",permitlisten="127.0.0.1:1"'
    return f"{options} {ssh.public_key(private_key)} berth\n"


def _pool(wanted: Wanted, present: dict[str, Any], free: int) -> dict[str, Any]:
    if wanted.pool_device:
        return {"pool_device": wanted.pool_device}
    if wanted.pool_gb is not None:
        return {"pool_bytes": wanted.pool_gb * _GIB}
    if present.get("pool_bytes"):
        return {"pool_bytes": present["pool_bytes"]}
    size = min(_POOL_DEFAULT_MAX, int(free * 0.6)) // _GIB * _GIB
    if size < 4 * _GIB:
        raise EnrolmentFailed(
            f"only {free / _GIB:.1f} GiB are free for the disks; say --pool-gb to use less than 4 GiB"
        )
    return {"pool_bytes": size}


def _accept(row: Host, progress: Progress) -> Host:
    client = HostClient(row.pk)
    try:
        hello = client.hello()
    except HostUnreachable as error:
        raise EnrolmentFailed(f"hostd is not reached over the link: {error.reason}") from error
    if hello["host"] != row.pk:
        raise EnrolmentFailed(f"hostd says that it is {hello['host']}, not {row.pk}")
    progress("making a box, running `true` in it and removing it")
    took = proofs.prove_box(client, row.image_id)
    progress(f"a box did its work in {took * 1000:.0f} ms")
    hello = client.hello()
    hit = Host.objects.filter(pk=row.pk, state=HostState.ENROLLING).update(
        state=HostState.READY,
        step="ready",
        cordoned=False,
        cpu_millis=hello["cpus"] * 1000,
        memory_mb=hello["memory_bytes"] >> 20,
        disk_mb=hello["pool_bytes"] >> 20,
        memory_free_mb=hello["memory_free_bytes"] >> 20,
        pool_free_mb=hello["pool_free_bytes"] >> 20,
        boot_id=hello["boot_id"],
        seen_at=Now(),
        lost_at=None,
    )
    if not hit:
        raise EnrolmentFailed("the host was retired while it was being enrolled")
    if row.warm:
        client.set_warm(count=row.warm, image=row.image_id)
    row.refresh_from_db()
    return row


# --- cordon and retire ---


def cordon(host_ids: Sequence[str], cordoned: bool = True) -> int:
    """No new devboxes there, or again some. Returns how many hosts changed."""
    return Host.objects.filter(pk__in=host_ids, cordoned=not cordoned).update(cordoned=cordoned)


def boxes_of(host_id: str) -> list[str]:
    """The devboxes whose rows are placed on that host."""
    found: list[str] = []
    for kind in registry.kinds().values():
        found += [row.box for row in kind.expected_on_host(host_id) if isinstance(row, ExpectedBox)]
    return found


def retire(name: str, *, force: bool = False, progress: Progress = _quiet) -> Host:
    """Take the host out of the cluster and every trace of the cluster off the machine.

    Cordons first. Refuses while devboxes are placed there, unless `force`: these end as lost. With `force` a machine
    that cannot be reached is given up as it is. Raises EnrolmentFailed; it may be repeated.
    """
    row = Host.objects.exclude(state=HostState.RETIRED).filter(name=name).first()
    if row is None:
        raise EnrolmentFailed(f"there is no host named {name!r}")
    Host.objects.filter(pk=row.pk).exclude(state=HostState.RETIRED).update(cordoned=True)
    there = boxes_of(row.pk)
    if (there or _promised(row.pk)) and not force:
        raise EnrolmentFailed(
            f"{name} is cordoned, but has {len(there)} devboxes: shut them down first, or retire it by force"
        )
    Host.objects.filter(pk=row.pk).exclude(state=HostState.RETIRED).update(state=HostState.RETIRING)
    if there:
        now = int(time.time() * 1000)
        delivery.deliver_box_exits(
            BoxExitEvent(row.pk, box, None, False, now, lost="its host was retired by force") for box in there
        )
    try:
        _remove(row, progress)
    except (ssh.SshError, shipping.ShippingFailed, CommandFailed) as error:
        if not force:
            raise EnrolmentFailed(f"{name} could not be cleaned: {error}") from error
        progress(f"warning: the machine was given up as it is, {row.root} may still be on it: {error}")
    links.forget(row.pk)
    Host.objects.filter(pk=row.pk).update(
        state=HostState.RETIRED, step="retired", completed_at=Now(), link_key_sealed=None, admin_key_sealed=seal("")
    )
    row.refresh_from_db()
    return row


def _promised(host_id: str) -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SELECT used_memory_mb > 0 OR used_cpu_millis > 0 FROM hosts_host WHERE id = %s", [host_id])
        return bool(cursor.fetchone()[0])


def _remove(row: Host, progress: Progress) -> None:
    login = ssh.Login(row.address, row.port, row.admin_user, str(unseal(row.admin_key_sealed)), row.host_key)
    with ssh.Admin(login, timeout=10) as admin:
        if row.root:
            with shipping.staged(admin, shipping.bundle()) as path:  # the host's own copy goes with the root
                config = f"{row.root}/host.json"
                if admin.run(["sh", "-c", 'test -e "$1" && echo yes || true', "test", config], timeout=ADMIN_SECONDS):
                    progress("ending everything of ours on the machine")
                    shipping.run_hostd(
                        admin,
                        path,
                        "teardown",
                        config,
                        timeout=TEARDOWN_SECONDS,
                        on_progress=lambda line: progress(f"teardown: {line.get('step', line)}"),
                    )
                argv = [shipping.PYTHON, "-I", "-c", _RELEASE, path, row.root, str(row.install)]
                admin.run(argv, timeout=ADMIN_SECONDS)
        if row.link_user:
            progress(f"removing the login {row.link_user}")
            # Its connections first: userdel refuses while one is open.
            script = 'if getent passwd "$1" >/dev/null; then pkill -KILL -u "$1" || true; sleep 0.2; userdel "$1"; fi'
            admin.run(["sh", "-c", script, "remove-user", row.link_user], timeout=ADMIN_SECONDS)
