"""Hints: "this row changed, read it again", by Redis pub/sub.

In charge of: publishing them, bounded and best effort. Not in charge of: hearing them (`api.waiting`), nor of truth:
whoever waits also reads again every now and then, so a hint that is lost costs time and nothing else.
"""

from flows.nudge import broker

CHANNEL = "hints"


def publish(*ids: str) -> None:
    """Tell every waiting process that these rows changed. Never raises; does nothing while Redis is away."""
    if ids:
        broker.command("PUBLISH", CHANNEL, " ".join(ids))
