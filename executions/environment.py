"""What a command is started with: its environment, its directory and its user, as the host's `spawn` wants them.

In charge of the defaults every command gets and of what a devbox's own variables may replace. Not in charge of where
those variables are kept (`devboxes`), or of how bash reads its profile.
"""

from __future__ import annotations

from collections.abc import Mapping

from hostd.messages import SpawnBody

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def command_environment(
    *, user_name: str, user_home: str, devbox_id: str, variables: Mapping[str, str]
) -> dict[str, str]:
    """The defaults of a login on a plain machine, and over them what the devbox was made with."""
    return {
        "PATH": f"{user_home}/.local/bin:{PATH}",
        "HOME": user_home,
        "USER": user_name,
        "LOGNAME": user_name,
        "SHELL": "/bin/bash",
        "LANG": "C.UTF-8",
        "DEVBOX_ID": devbox_id,
        **variables,
    }


def spawn_body(
    *,
    command: str,
    user_name: str,
    user_uid: int,
    user_home: str,
    devbox_id: str,
    variables: Mapping[str, str],
    attach_stdin: bool,
) -> SpawnBody:
    """A command run by a login bash as the devbox's user, from its home."""
    return {
        "command": command,
        "env": command_environment(user_name=user_name, user_home=user_home, devbox_id=devbox_id, variables=variables),
        "cwd": user_home,
        "user": {"name": user_name, "uid": user_uid, "gid": user_uid, "home": user_home},
        "stdin": "pipe" if attach_stdin else "none",
        "login": True,
    }
