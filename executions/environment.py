"""What a command is started with: its environment, its directory and its user, as the host's `spawn` wants them.

In charge of the shape. Not in charge of the variables, which all that runs in a devbox shares (`devboxes.environment`).
"""

from __future__ import annotations

from collections.abc import Mapping

from devboxes.environment import command_environment
from hostd.messages import SpawnBody


def spawn_body(
    *,
    command: str,
    user_name: str,
    user_uid: int,
    user_home: str,
    devbox_id: str,
    variables: Mapping[str, str],
    attach_stdin: bool,
    shell_name: str | None = None,
) -> SpawnBody:
    """A command run by a login bash as the devbox's user, from its home, or by the named shell, from where that is."""
    body: SpawnBody = {
        "command": command,
        "env": command_environment(user_name=user_name, user_home=user_home, devbox_id=devbox_id, variables=variables),
        "cwd": user_home,
        "user": {"name": user_name, "uid": user_uid, "gid": user_uid, "home": user_home},
        "stdin": "pipe" if attach_stdin else "none",
        "login": True,
    }
    if shell_name is not None:
        body["shell"] = shell_name
    return body
