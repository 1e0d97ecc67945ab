"""Reaching a devbox that may not be running: one that starts, or a suspended one that traffic may wake.

In charge of holding the request while the devbox gets ready, of asking for its resume, and of looking again when a
devbox is not where it was a second ago.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from api.errors import NotFound, Unavailable
from api.threads import in_database
from api.waiting import hub
from devboxes.services import request_resume
from tunnels import doors
from tunnels.doors import Door
from tunnels.upstream import NothingListens

T = TypeVar("T")

HELD_SECONDS: Final = 60.0
"""How long a request is held for its devbox to run."""
LISTENING_SECONDS: Final = 10.0
"""How long after that its server may take until it listens."""
TRIES: Final = 5
STARTING: Final = frozenset({"provisioning", "initializing"})
ASLEEP: Final = frozenset({"suspending", "suspended"})


async def reached(key: str, door: Door, take: Callable[[Door], Awaitable[T]]) -> tuple[Door, T]:
    """What `take` answers for the door of a running devbox, and that door. Raises as `running`, and as `take`."""
    until = 0.0
    tries = TRIES
    while True:
        if door.status != "running":
            door = await running(key, door)
            until = time.monotonic() + LISTENING_SECONDS
        try:
            return door, await take(door)
        except (NothingListens, Unavailable) as error:
            if isinstance(error, NothingListens) and time.monotonic() < until:
                await asyncio.sleep(0.1)  # it has just woken up
                continue
            found = await doors.doors.find(key, fresh=True)
            tries -= 1
            if found == door or not tries:
                raise
            if found is None:
                raise NotFound("there is no such tunnel") from None
            door = found


async def running(key: str, door: Door) -> Door:
    """The door once its devbox runs. Raises Unavailable when it does not within HELD_SECONDS, or will not; NotFound
    when it ended meanwhile, TooManyRequests when its account may have no more that run."""
    if door.status in ASLEEP:
        if not door.wake_on_http:
            raise Unavailable(f"the devbox is {door.status}, and its tunnel does not wake it", retry_after=10)
        await in_database(request_resume, door.devbox_id)
    elif door.status not in STARTING:
        raise Unavailable(f"the devbox is {door.status}", retry_after=10)
    deadline = asyncio.get_running_loop().time() + HELD_SECONDS
    found = await hub.wait_until(
        door.devbox_id, lambda: doors.find(key), lambda now: now is None or now.status == "running", deadline
    )
    if found is None:
        raise NotFound("there is no such tunnel")
    if found.status != "running":
        raise Unavailable(f"the devbox is still {found.status} after {HELD_SECONDS:g} s", retry_after=5)
    return found
