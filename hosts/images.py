"""The base image of the cluster: one stream, kept in S3, and sent to every host that has not got it.

In charge of which image a new host gets, and of carrying its stream: from the host that made it to S3 once, from there
to each host at enrolment, over the admin login.  Increments between hosts need the very same stream everywhere, so an
image is never built a second time.  Not in charge of what a host does with a stream (`hostd.deliveries`,
`hostd.images`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any, Final

from django.conf import settings

from accounts.sealing import unseal
from hosts import shipping, ssh
from hosts.models import Host, HostState
from hosts.ssh.admin import CommandFailed
from storage import objects

TRANSFER_SECONDS: Final = 1800.0
TRIES: Final = 3
_PIECE: Final = 4 << 20
_LOOK_SECONDS: Final = 60.0
_CANDIDATES: Final = 20

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """An image whose stream is in S3. `size` and `sha256` are the packed stream's."""

    id: str
    size: int
    sha256: str
    received_uuid: str


class NoStream(Exception):
    """The stream of an image cannot be had or kept; the text says why."""


def _key(image: str) -> str:
    return f"images/{image}.btrfs.zst"


def _about(image: str) -> str:
    return f"images/{image}.json"


def kept(image: str) -> Kept | None:
    """What S3 has of an image, None when it has not the whole of it. Raises NoStream."""
    if not settings.S3["endpoint_url"]:
        return None
    try:
        text = objects.get_range(_about(image), 0, 65536)
        about = json.loads(text)
        found = objects.head(_key(image))
    except objects.ObjectMissing:
        return None
    except (objects.StorageError, ValueError) as error:
        raise NoStream(str(error)) from error
    if found is None or found.size != about["size"]:
        return None
    return Kept(**about)


def keep(admin: ssh.Admin, image: str, path: str, received_uuid: str, progress: Progress) -> Kept:
    """Have the stream that a host has at `path` in S3. Raises NoStream, SshError, CommandFailed."""
    if not settings.S3["endpoint_url"]:
        raise NoStream("no S3 server is configured (S3_ENDPOINT_URL)")
    if (found := kept(image)) is not None:
        return found
    progress(f"keeping the image {image} in S3, for other hosts")
    expected = admin.run(["sha256sum", path], timeout=_LOOK_SECONDS).decode().split()[0]
    digest = hashlib.sha256()

    def pieces() -> Iterator[bytes]:
        for piece in admin.receive(["cat", path], timeout=TRANSFER_SECONDS):
            digest.update(piece)
            yield piece

    try:
        size = objects.put_stream(_key(image), pieces())
        if digest.hexdigest() != expected:
            objects.delete(_key(image))
            raise NoStream(f"{path} changed while it was read")
        about = Kept(image, size, expected, received_uuid)
        # Last: without it the stream does not count.
        objects.put(_about(image), json.dumps(dataclasses.asdict(about)).encode())
    except objects.StorageError as error:
        raise NoStream(str(error)) from error
    return about


def wanted(row: Host, progress: Progress) -> Kept | None:
    """The image that the cluster's hosts of this architecture have; None when this is the first of them.

    Its stream is in S3 afterwards, fetched from a host that has it where need be. Raises NoStream when there is such an
    image but nobody can give it.
    """
    others = Host.objects.exclude(pk=row.pk).exclude(image_id="").filter(architecture=row.architecture)
    # The serving ones' first; those of hosts that are gone count too, since snapshots refer to them.
    ids = [*others.filter(state=HostState.READY).order_by("created_at").values_list("image_id", flat=True)]
    ids += others.exclude(state=HostState.READY).order_by("-created_at").values_list("image_id", flat=True)
    ids = list(dict.fromkeys(ids))[:_CANDIDATES]
    if not ids:
        return None
    for image in ids:
        if (found := kept(image)) is not None:
            return found
        for host in others.filter(image_id=image, state=HostState.READY)[:_CANDIDATES]:
            try:
                return _fetch(host, image, progress)
            except (ssh.SshError, CommandFailed, shipping.ShippingFailed) as error:
                progress(f"warning: {host.name} does not give its image {image}: {error}")
    if not others.filter(state__in=[HostState.READY, HostState.RETIRING]).exists():
        return None  # nobody is left whose image it would have to be
    raise NoStream(f"the hosts of this cluster have the image {ids[0]}, and neither S3 nor any of them gives it")


def _fetch(host: Host, image: str, progress: Progress) -> Kept:
    login = ssh.Login(host.address, host.port, host.admin_user, str(unseal(host.admin_key_sealed)), host.host_key)
    with ssh.Admin(login, timeout=10) as admin, shipping.staged(admin, shipping.bundle()) as path:
        told = shipping.run_hostd(admin, path, "image", f"{host.root}/host.json", "--id", image, timeout=_LOOK_SECONDS)
        if told.get("have") != "cache":
            raise shipping.ShippingFailed(f"{host.name} has the image without its stream")
        return keep(admin, image, str(told["stream"]), str(told["received_uuid"]), progress)


def send(admin: ssh.Admin, path: str, config: str, image: Kept, progress: Progress) -> bool:
    """Have the stream in the cache of the host whose bundle is at `path`. True when it had to be sent.

    A cut transfer goes on where it ended, now or at the next enrolment. Raises NoStream, SshError or ShippingFailed.
    """

    def hostd(*options: str, body: Any = b"", timeout: float = _LOOK_SECONDS) -> dict[str, Any]:
        return shipping.run_hostd(admin, path, "image", config, "--id", image.id, *options, timeout=timeout, body=body)

    for left in reversed(range(TRIES)):
        told = hostd()
        if told["have"]:
            return False
        offset = int(told["offset"]) if int(told["offset"]) <= image.size else 0
        rest = image.size - offset
        progress(f"sending the image {image.id}: {rest >> 20} MiB" + (" more" if offset else ""))
        try:
            options = ("--offset", str(offset), "--size", str(image.size), "--sha256", image.sha256)
            hostd(*options, body=_pieces(image, offset), timeout=TRANSFER_SECONDS)
            return True
        except shipping.ShippingFailed as error:
            if not left:
                raise
            progress(f"warning: {error}; once more")
        except objects.StorageError as error:
            raise NoStream(str(error)) from error
    return False


def _pieces(image: Kept, offset: int) -> Iterator[bytes]:
    while offset < image.size:
        piece = objects.get_range(_key(image.id), offset, min(_PIECE, image.size - offset))
        if not piece:
            raise objects.StorageError("read", _key(image.id), f"it ends at byte {offset}")
        yield piece
        offset += len(piece)
