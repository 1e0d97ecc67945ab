"""The pool, its images, and disks: made twice, limited, nested, kept, deleted, dropped."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from hostd import btrfs, config, disks, images, slots
from hostd.messages import Refused
from tests.hostd.trial import Trial, why_not

SLOT = "s7-abcdef"


def test_groups_are_as_unique_as_slots() -> None:
    given = ["s0-000000", "s0-000001", "s1-000000", "s1999-ffffff", "s16-000000", "s1-600000"]
    groups = {disks.group_of(slot) for slot in given}
    assert len(groups) == len(given)
    assert all(group >> 48 == 1 for group in groups)
    for wrong in ("", "s1", "s2000-000000", "s1-00000", "s1-00000g", "../s1-000000", "s1-000000\n"):
        with pytest.raises(ValueError, match=r"slot|number"):
            disks.group_of(wrong)


def test_structures_have_the_kernels_sizes() -> None:
    # The size of its argument is part of an ioctl's number: these are the kernel's own numbers.
    assert btrfs._SNAP_CREATE_V2 == 0x50009417
    assert btrfs._SUBVOL_CREATE_V2 == 0x50009418
    assert btrfs._SNAP_DESTROY_V2 == 0x5000943F
    assert btrfs._QUOTA_CTL == 0xC0109428
    assert btrfs._QGROUP_LIMIT == 0x8030942B
    for name in ("a/b", "", ".", "..", "x" * 256):
        with pytest.raises(ValueError, match="subvolume"):
            btrfs._name(name)


@pytest.mark.live
def test_a_disk_made_and_deleted_twice(trial: Trial) -> None:
    cfg = trial.cfg
    disks.make_disk(cfg, SLOT, cfg.image, 64 << 20)
    identity = btrfs.subvolume_id(cfg.disk(SLOT))
    disks.make_disk(cfg, SLOT, cfg.image, 96 << 20)
    assert btrfs.subvolume_id(cfg.disk(SLOT)) == identity
    held, limit = disks.disk_usage(cfg, SLOT)
    assert limit == 96 << 20
    assert held < 1 << 20  # the image's bytes are not the disk's
    disks.delete_disk(cfg, SLOT)
    disks.delete_disk(cfg, SLOT)
    assert not disks.has_disk(cfg, SLOT)
    deadline = time.monotonic() + 60
    while disks.group_of(SLOT) in btrfs.quota_groups(cfg.pool, 1):
        assert time.monotonic() < deadline, "the quota group of a deleted disk stays"
        btrfs.sync(cfg.pool)
        disks.drop_idle_groups(cfg)
        time.sleep(0.2)


@pytest.mark.live
def test_the_limit_holds_for_nested_subvolumes_and_they_go_with_the_disk(trial: Trial) -> None:
    cfg = trial.cfg
    disks.make_disk(cfg, SLOT, cfg.image, 32 << 20)
    btrfs.create_subvolume(f"{cfg.disk(SLOT)}/home", "one")
    btrfs.create_subvolume(f"{cfg.disk(SLOT)}/home/one", "two")
    path = f"{cfg.disk(SLOT)}/home/one/two/f"
    with pytest.raises(OSError, match="quota"):
        with open(path, "wb") as file:
            for _ in range(64):
                file.write(os.urandom(1 << 20))
                file.flush()
                os.fsync(file.fileno())
    assert disks.disk_usage(cfg, SLOT)[0] <= 33 << 20
    disks.delete_disk(cfg, SLOT)  # at its limit, and not empty
    assert not disks.has_disk(cfg, SLOT)


@pytest.mark.live
def test_a_group_about_to_be_used_is_not_dropped(trial: Trial) -> None:
    cfg = trial.cfg
    slot = slots.new_slot(cfg, cfg.image, 1 << 20)
    btrfs.create_qgroup(cfg.pool, disks.group_of(slot.slot))
    disks.drop_idle_groups(cfg)
    assert disks.group_of(slot.slot) in btrfs.quota_groups(cfg.pool, 1)
    slots.forget(cfg, slot.slot)
    assert disks.drop_idle_groups(cfg) >= 1
    assert disks.group_of(slot.slot) not in btrfs.quota_groups(cfg.pool, 1)


@pytest.mark.live
def test_refusals(trial: Trial) -> None:
    cfg = trial.cfg
    with pytest.raises(Refused) as refused:
        disks.make_disk(cfg, SLOT, "img_000000000000", 64 << 20)
    assert refused.value.code == "unknown_image"
    disks.delete_disk(cfg, SLOT)
    with pytest.raises(FileNotFoundError):
        disks.disk_usage(cfg, "s8-000000")


@pytest.mark.live
def test_quota_is_simple_where_the_kernel_has_it(trial: Trial) -> None:
    release = os.uname().release.split(".")
    modern = (int(release[0]), int(release[1])) >= (6, 7)
    assert btrfs.quota_kind(trial.cfg.pool) == ("simple" if modern else "full")


@pytest.mark.live
def test_limits_hold_without_simple_quotas(trial: Trial, tmp_path: Path) -> None:
    """As on a kernel before 6.7: ordinary quota groups, in a pool of its own."""
    cfg = config.from_dict({**trial.cfg.as_dict(), "root": str(tmp_path), "pool_bytes": None})
    for folder in (cfg.pool, cfg.slots):
        os.mkdir(folder)
    file = str(tmp_path / "pool.img")
    with open(file, "wb") as image:
        image.truncate(1 << 30)
    disks.run("mkfs.btrfs", "-q", file)
    disks.run("mount", "-o", "loop", file, cfg.pool)
    try:
        btrfs.enable_full_quota(cfg.pool)
        assert disks.prepare_pool(cfg) == "full"
        btrfs.create_subvolume(cfg.images, "img_0123456789ab")
        Path(cfg.image_path("img_0123456789ab"), "big").write_bytes(os.urandom(40 << 20))
        btrfs.sync(cfg.pool)
        for _ in range(2):
            disks.make_disk(cfg, SLOT, "img_0123456789ab", 24 << 20)
        with pytest.raises(OSError, match="quota"):
            with open(f"{cfg.disk(SLOT)}/f", "wb") as growing:
                for _ in range(64):
                    growing.write(os.urandom(1 << 20))
                    growing.flush()
                    os.fsync(growing.fileno())
        held, limit = disks.disk_usage(cfg, SLOT)
        assert limit == 24 << 20
        assert 16 << 20 < held <= 25 << 20  # the image's forty are not counted
        disks.delete_disk(cfg, SLOT)
        disks.delete_disk(cfg, SLOT)
        disks.drop_idle_groups(cfg)
    finally:
        disks.run("umount", cfg.pool)


@pytest.mark.live
def test_the_pools_file_is_allocated(trial: Trial) -> None:
    found = os.stat(trial.cfg.pool_file)
    assert found.st_blocks * 512 >= found.st_size
    [loop] = disks.loops_of(trial.cfg.pool_file)
    assert Path(f"/sys/block/{os.path.basename(loop)}/loop/dio").read_text().strip() == "1"


@pytest.mark.live
def test_a_device_with_something_on_it_is_never_overwritten(tmp_path: Path) -> None:
    if why_not():
        pytest.skip(str(why_not()))
    file = tmp_path / "disk"
    file.write_bytes(b"")
    os.truncate(file, 256 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(file)], check=True)
    with pytest.raises(Refused, match="holds something already"):
        disks._make_pool_on(str(file))
    assert "ext4" in disks.run("blkid", "-p", str(file))


# --- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.live
def test_an_image_is_the_same_in_every_pool(trial: Trial) -> None:
    cfg = trial.cfg
    assert images.list_images(cfg) == [cfg.image]
    assert btrfs.is_read_only(cfg.image_path(cfg.image))
    before = images.received_uuid(cfg, cfg.image)
    assert before != "0" * 32
    # Received once more from its stream, as on another machine.
    btrfs.set_read_only(cfg.image_path(cfg.image), False)
    btrfs.delete_subvolume(cfg.images, cfg.image)
    said: list[tuple[str, dict[str, object]]] = []
    assert images.ensure(cfg, lambda event, **more: said.append((event, more))) == cfg.image
    assert said[-1][1]["source"] == "cache"
    assert images.received_uuid(cfg, cfg.image) == before


@pytest.mark.live
def test_a_damaged_stream_is_refused(trial: Trial, tmp_path: Path) -> None:
    cfg = trial.cfg
    other = config.from_dict({**cfg.as_dict(), "image": "img_" + "0" * 12, "image_cache": str(tmp_path)})
    with pytest.raises(Refused) as refused:
        images.ensure(other, lambda *_, **__: None)
    assert refused.value.code == "unknown_image"
    os.link(f"{cfg.image_cache}/{cfg.image}.btrfs.zst", tmp_path / f"{other.image}.btrfs.zst")
    with pytest.raises(Refused, match="damaged"):
        images.ensure(other, lambda *_, **__: None)
    assert images.list_images(cfg) == [cfg.image]


@pytest.mark.live
def test_a_tar_becomes_an_image(trial: Trial, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc" / "mark").write_text("imported\n")
    os.chown(tree / "etc" / "mark", 12, 34)
    subprocess.run(["tar", "-C", str(tree), "-czf", str(tmp_path / "root.tar.gz"), "."], check=True)
    cfg = config.from_dict({**trial.cfg.as_dict(), "image_cache": str(tmp_path / "cache")})
    image = images.import_tar(cfg, str(tmp_path / "root.tar.gz"), lambda *_, **__: None)
    found = os.stat(f"{cfg.image_path(image)}/etc/mark")
    assert (found.st_uid, found.st_gid) == (12, 34)
    assert btrfs.is_read_only(cfg.image_path(image))
    assert (tmp_path / "cache" / f"{image}.btrfs.zst").exists()
    btrfs.set_read_only(cfg.image_path(image), False)
    btrfs.delete_subvolume(cfg.images, image)


def test_a_given_path_is_kept_by_the_profile() -> None:
    profile = (
        "# /etc/profile\n\n"
        'if [ "$(id -u)" -eq 0 ]; then\n  PATH="/root/bin"\nelse\n  PATH="/user/bin"\nfi\nexport PATH\n\n'
        'if [ "${PS1-}" ]; then\n  :\nfi\n'
    )
    kept = images.keep_path(profile)
    own = {"PATH": "/mine:/usr/bin:/bin"}
    for shell, program, given, expected in (
        ("bash", kept, own, "/mine:/usr/bin:/bin"),
        ("bash", kept.replace("/usr/bin/printenv", "/none"), own, "/mine:/usr/bin:/bin"),  # no program is run for it
        ("bash", kept, {}, "/root/bin" if os.geteuid() == 0 else "/user/bin"),
        ("sh", kept, own, "/mine:/usr/bin:/bin"),
        ("sh", kept, {}, "/root/bin" if os.geteuid() == 0 else "/user/bin"),
    ):
        argv = [f"/bin/{shell}", "-c", program + "\necho $PATH"]
        done = subprocess.run(argv, env=given, capture_output=True, text=True, check=True)
        assert (done.stdout.strip(), done.stderr) == (expected, "")


def test_package_sources_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    suites = {"bookworm", "bookworm-updates"}
    stanza = (
        "Types: deb deb-src\n# a comment\nURIs: http://a.example/debian\nSuites: bookworm\n bookworm-updates\n"
        "Components: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n"
        "Types: deb\nURIs: https://vendor.example\nSuites: nodistro\nComponents: main\n\n"
        "Types: deb\nEnabled: no\nURIs: http://off.example\nSuites: bookworm\nComponents: main\n"
    )
    assert images._deb822(stanza, suites) == [
        "deb http://a.example/debian bookworm main",
        "deb http://a.example/debian bookworm-updates main",
    ]
    lines = (
        "deb [arch=amd64 signed-by=/k/mine.gpg] http://b.example/debian bookworm main contrib # ours\n"
        "#deb http://c.example bookworm main\ndeb http://d.example/apt bookworm-pgdg main\n"
        "deb-src http://b.example bookworm main\n"
    )
    assert images._one_line(lines, suites, "x.list") == [
        "deb [signed-by=/k/mine.gpg] http://b.example/debian bookworm main contrib"
    ]
