"""Running a program as an unprivileged user although it lies below a folder that is closed to everybody else.

In charge of a process's own view of the file system: a checkout below ``/root`` or in a home of mode 0700, and an
interpreter that lies in such a place, appear at their usual paths, and nothing else of the closed folder does.  Rather
than let the roles be root, ``config.up`` gives them such a view.  Not in charge of who the user is (``config.state``)
nor of starting processes (``config.supervisor``).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from config.state import CHECKOUT, Owner
from hostd import namespaces, syscalls

_PROBE_SECONDS = 30.0


@dataclass(frozen=True)
class View:
    """What is to be seen of closed folders: folder -> paths below it."""

    opened: dict[Path, tuple[Path, ...]]

    def enter(self) -> None:
        """Give this process, which is root, a mount namespace of its own with that view.  Raises OSError."""
        if not self.opened:
            return
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        namespaces.leave_installs()
        for folder, paths in self.opened.items():
            held = [os.open(path, os.O_PATH) for path in paths]  # before the folder is covered
            syscalls.mount("none", str(folder), "tmpfs", 0, "size=64k,mode=755")
            for path, descriptor in zip(paths, held, strict=True):
                path.mkdir(parents=True)
                source = f"/proc/self/fd/{descriptor}"
                syscalls.mount(source, str(path), None, syscalls.MS_BIND | syscalls.MS_REC)
                os.close(descriptor)


def become(user: Owner) -> None:
    """Make this process the user's, for good."""
    os.setgroups([])
    os.setresgid(user.gid, user.gid, user.gid)
    os.setresuid(user.uid, user.uid, user.uid)


def view_for(user: Owner) -> View | None:
    """The view in which ``user`` can run this checkout with this interpreter; None when none helps.

    None means that the files themselves are closed (made under a umask of 077), which only their owner should change.
    """
    view = view_of({CHECKOUT, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}, user)
    return view if _runs(view, user, [sys.executable, "-c", "import django, config.state"], CHECKOUT) else None


def view_of(needed: Collection[Path], user: Owner) -> View:
    """The view in which ``user`` can reach these paths, whichever folders above them are closed."""
    opened: dict[Path, list[Path]] = {}
    for path in sorted(needed):
        folder = next((folder for folder in reversed(path.parents) if not _may_pass(folder, user)), None)
        if folder is not None and not any(path.is_relative_to(other) for other in opened.get(folder, [])):
            opened.setdefault(folder, []).append(path)
    return View({folder: tuple(paths) for folder, paths in opened.items()})


def _may_pass(folder: Path, user: Owner) -> bool:
    return _runs(View({}), user, ["test", "-x", str(folder)], Path("/"))


def _runs(view: View, user: Owner, argv: Sequence[str], cwd: Path) -> bool:
    """Asked of the kernel by a child that is that user, rather than worked out from modes."""

    def setup() -> None:
        view.enter()
        become(user)
        os.chdir(cwd)

    try:
        done = subprocess.run(
            argv,
            preexec_fn=setup,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PROBE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0
