"""The launch work of a devbox: what is run in its box before it is `running`, as a list of commands for the host.

In charge of: turning user, mounts, launch commands and entrypoint into commands, in order, each under an id that is
always the same for the same devbox and place in the list, so that asking for one twice starts it once. Not in charge
of: running them (`devboxes.devbox_flow`) or what their failure means.

Nothing is interpolated into a shell: scripts are constants, values travel as arguments, contents and tokens on stdin.
A token is never an argument, an environment variable of the command, part of a URL or of a log.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

from accounts.sealing import unseal
from devboxes.environment import PATH, command_environment
from devboxes.logs import Source
from devboxes.models import Devbox
from hostd.messages import SpawnBody, User

ROOT = User(name="root", uid=0, gid=0, home="/root")
ENTRYPOINT: Literal["entrypoint"] = "entrypoint"
SETUP: Literal["setup_commands"] = "setup_commands"

PREFIX = "set_"
"""Of the ids of launch work."""
SUSPEND_DEADLINE_MS = 30_000
SUSPEND_DEADLINE_MS_MAX = 60_000
DEFAULT_USER = "user"
DEFAULT_UID = 1000

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"

_MAKE_USER = r"""
name=$1 uid=$2 home=$3
now=$(getent passwd "$name" | cut -d: -f3 || true)
if [ "$now" = "$uid" ]; then exit 0; fi
if [ -n "$now" ]; then echo "user $name exists with uid $now" >&2; exit 1; fi
group=$(getent group "$name" | cut -d: -f1 || true)
if [ -z "$group" ]; then groupadd -o -g "$uid" -- "$name"; fi
useradd -o -u "$uid" -g "$name" -d "$home" -s /bin/bash -M -- "$name"
if [ ! -d "$home" ]; then cp -a /etc/skel "$home"; fi
chown -R -- "$uid:$name" "$home"
chmod 0755 -- "$home"
printf '%s ALL=(ALL) NOPASSWD:ALL\n' "$name" > "/etc/sudoers.d/90-$name"
chmod 0440 -- "/etc/sudoers.d/90-$name"
"""

# Two machines must not have the same host keys, nor a copy of the machine id beside the one that hosts give.
_RENEW = r"""
if compgen -G '/etc/ssh/ssh_host_*' > /dev/null; then
  rm -f /etc/ssh/ssh_host_*
  ssh-keygen -A
fi
if [ -f /var/lib/dbus/machine-id ] && [ ! -L /var/lib/dbus/machine-id ]; then
  ln -sf /etc/machine-id /var/lib/dbus/machine-id
fi
"""

_WRITE_FILE = r"""
target=$1 owner=$2
umask 022
folder=$(dirname -- "$target")
top=
step=$folder
while [ ! -e "$step" ]; do top=$step; step=$(dirname -- "$step"); done
mkdir -p -- "$folder"
new=; [ -e "$target" ] || new=1
cat > "$target"
if [ -n "$top" ]; then chown -R -- "$owner" "$top"; elif [ -n "$new" ]; then chown -- "$owner" "$target"; fi
"""

# git asks the program named by GIT_ASKPASS, which takes the token from the environment that only this script's own
# children see. `checkout` after the clone serves a commit's name, which --branch does not take.
_CLONE = r"""
url=$1 folder=$2 ref=$3
IFS= read -r token || true
if [ -d "$folder/.git" ]; then rm -rf -- "$folder"; fi
ask=$(mktemp)
trap 'rm -f -- "$ask"' EXIT
cat > "$ask" <<'END'
#!/bin/sh
case "$1" in
  Username*) printf '%s\n' x-access-token ;;
  *) printf '%s\n' "$BERTH_CODE_MOUNT_TOKEN" ;;
esac
END
chmod 0700 -- "$ask"
export GIT_TERMINAL_PROMPT=0 GIT_ASKPASS="$ask" BERTH_CODE_MOUNT_TOKEN="$token"
mkdir -p -- "$(dirname -- "$folder")"
if [ -z "$ref" ]; then
  git clone --quiet -- "$url" "$folder"
elif printf '%s' "$ref" | grep -Eq '^[0-9a-f]{40}$'; then
  git clone --quiet -- "$url" "$folder"
  git -C "$folder" checkout --quiet --detach "$ref"
else
  git clone --quiet --branch "$ref" -- "$url" "$folder"
fi
"""


@dataclass(frozen=True, slots=True)
class Work:
    """One command of the launch. `title` is what logs and messages call it; `secrets` are cut out of its output."""

    id: str
    title: str
    body: SpawnBody
    source: Source = SETUP
    awaited: bool = True
    secrets: Sequence[str] = field(default=())


def work_id(devbox_id: str, what: int | str, starts: int = 0) -> str:
    """The host's id for a piece of launch work of the so-manieth start: derived, so that a step that runs again asks
    for the same one."""
    place = f"{starts}/{what}" if starts else f"{what}"
    number = int.from_bytes(hashlib.sha256(f"{devbox_id}/{place}".encode()).digest()[:16])
    return PREFIX + "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


def clone_url(owner: str, name: str) -> str:
    """Where a code mount is cloned from."""
    return f"https://github.com/{owner}/{name}.git"


def needs_user(user_name: str, user_uid: int) -> bool:
    """Whether the user is one that the image does not have."""
    return (user_name, user_uid) not in ((DEFAULT_USER, DEFAULT_UID), ("root", 0))


def count(
    *,
    user_name: str,
    user_uid: int,
    mounts: Sequence[Any],
    launch_commands: Sequence[str],
    entrypoint: str,
    is_copy: bool = False,
) -> int:
    """How many pieces of work `plan` will make of this. `is_copy`: its disk is made of another devbox's."""
    mount_work = sum(2 if mount.get("install_command") else 1 for mount in mounts)
    return is_copy + needs_user(user_name, user_uid) + mount_work + len(launch_commands) + bool(entrypoint)


def _absolute(path: str, home: str) -> str:
    if path == "~" or path.startswith("~/"):
        path = path[2:]
    return path if path.startswith("/") else f"{home}/{path}"


def _script(script: str, *arguments: str, user: User, env: dict[str, str], stdin: bytes = b"") -> SpawnBody:
    body = SpawnBody(
        argv=["/bin/bash", "-euo", "pipefail", "-c", script, "launch", *arguments],
        env=env,
        cwd="/",
        user=user,
        stdin="none",
        login=False,
    )
    if stdin:
        body["input"] = base64.b64encode(stdin).decode()
    return body


def _command(command: str, *, user: User, env: dict[str, str], cwd: str) -> SpawnBody:
    return SpawnBody(command=command, env=env, cwd=cwd, user=user, stdin="none", login=True)


def user_of(name: str, uid: int, home: str) -> User:
    """The devbox's user as hosts want it."""
    return User(name=name, uid=uid, gid=uid, home=home)


def count_again(devbox_id: str) -> int:
    """How many pieces of work `plan` will make for a devbox that is started again."""
    started_at, user_name, user_uid, mounts_sealed, launch_commands, entrypoint, origin = Devbox.objects.values_list(
        "started_at", "user_name", "user_uid", "mounts_sealed", "launch_commands", "entrypoint", "snapshot_id"
    ).get(pk=devbox_id)
    if started_at is not None:
        return len(launch_commands) + bool(entrypoint)
    mounts = unseal(mounts_sealed) if mounts_sealed else []
    return count(
        user_name=user_name,
        user_uid=user_uid,
        mounts=mounts,
        launch_commands=launch_commands,
        entrypoint=entrypoint,
        is_copy=origin is not None,
    )


@dataclass(frozen=True, slots=True)
class SuspendWork:
    """Suspend commands, and how long they may take together."""

    work: list[Work]
    within: timedelta


def suspend_work(devbox_id: str) -> SuspendWork:
    """What is run in a devbox before it is suspended, this time. One SELECT; raises SealBroken."""
    name, uid, home, environment_sealed, parameters, starts = Devbox.objects.values_list(
        "user_name", "user_uid", "user_home", "environment_sealed", "launch_parameters", "starts"
    ).get(pk=devbox_id)
    hooks = (parameters.get("lifecycle") or {}).get("lifecycle_hooks") or {}
    commands = hooks.get("suspend_commands") or []
    within = timedelta(milliseconds=hooks.get("suspend_deadline_ms") or SUSPEND_DEADLINE_MS)
    if not commands:
        return SuspendWork([], within)
    env = command_environment(
        user_name=name,
        user_home=home,
        devbox_id=devbox_id,
        variables=unseal(environment_sealed) if environment_sealed else {},
    )
    user = user_of(name, uid, home)
    work = [
        Work(
            work_id(devbox_id, f"suspend/{place}", starts),
            command,
            _command(command, user=user, env=env, cwd=home),
        )
        for place, command in enumerate(commands)
    ]
    return SuspendWork(work, within)


def plan(devbox_id: str) -> list[Work]:
    """All launch work of a devbox, in order: host keys of a copy, user, mounts, launch commands, entrypoint; the last
    two only when it has been running before, for the others are on its disk. One SELECT.

    Raises accounts.sealing.SealBroken when its secrets cannot be opened any more.
    """
    row = Devbox.objects.values_list(
        "user_name", "user_uid", "user_home", "environment_sealed", "mounts_sealed", "launch_commands", "entrypoint",
        "starts", "started_at", "snapshot_id"
    ).get(pk=devbox_id)  # fmt: skip
    name, uid, home, environment_sealed, mounts_sealed, launch_commands, entrypoint, starts, started_at, origin = row
    env = command_environment(
        user_name=name,
        user_home=home,
        devbox_id=devbox_id,
        variables=unseal(environment_sealed) if environment_sealed else {},
    )
    bare = {"PATH": PATH, "HOME": ROOT["home"], "LANG": "C.UTF-8"}
    is_new = started_at is None
    mounts: list[dict[str, Any]] = unseal(mounts_sealed) if mounts_sealed and is_new else []
    user = user_of(name, uid, home)
    found: list[Work] = []

    def add(title: str, body: SpawnBody, *, secrets: Sequence[str] = ()) -> None:
        found.append(Work(work_id(devbox_id, len(found), starts), title, body, secrets=secrets))

    if is_new and origin is not None:
        add("renew host keys", _script(_RENEW, user=ROOT, env=bare))
    if is_new and needs_user(name, uid):
        add(f"make user {name}", _script(_MAKE_USER, name, str(uid), home, user=ROOT, env=bare))
    for mount in mounts:
        if mount["type"] == "file_mount":
            target = _absolute(mount["target"], home)
            content = mount["content"].encode()
            add(f"write {target}", _script(_WRITE_FILE, target, f"{uid}:{uid}", user=ROOT, env=bare, stdin=content))
            continue
        folder = f"{home}/{mount['repo_name']}"
        url = clone_url(mount["repo_owner"], mount["repo_name"])
        token = mount.get("token") or ""
        ref = mount.get("git_ref") or ""
        clone = _script(_CLONE, url, folder, ref, user=user, env=env, stdin=f"{token}\n".encode())
        add(f"git clone {url}" + (f" at {ref}" if ref else ""), clone, secrets=[token] if token else [])
        if mount.get("install_command"):
            install = _command(mount["install_command"], user=user, env=env, cwd=folder)
            add(mount["install_command"], install, secrets=[token] if token else [])
    for command in launch_commands:
        add(command, _command(command, user=user, env=env, cwd=home))
    if entrypoint:
        body = _command(entrypoint, user=user, env=env, cwd=home)
        found.append(Work(work_id(devbox_id, ENTRYPOINT, starts), entrypoint, body, source=ENTRYPOINT, awaited=False))
    return found
