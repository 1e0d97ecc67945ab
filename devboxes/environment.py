"""The environment of everything that is run in a devbox: commands, launch work, the entrypoint.

In charge of: the defaults and what a devbox's own variables replace. Not in charge of: how bash reads its profile.
"""

from collections.abc import Mapping

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
