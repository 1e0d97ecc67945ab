"""What the clocks of devboxes are asked for and tell, as DRF serializers: a part of `devboxes.schemas`.

In charge of their fields. Not in charge of when they fire (`devboxes.clocks`).
"""

from __future__ import annotations

from typing import Any

from rest_framework import serializers

from api.validation import INT64_MAX, FlagField, StrictSerializer, WholeField
from devboxes import states

IDLE_MAX = 2**31 - 1


class IdleConfigurationParameters(StrictSerializer):
    """What is done with a devbox that is not used: no byte or call of any kind, no command, nobody at a terminal."""

    idle_time_seconds = WholeField(min_value=1, max_value=IDLE_MAX, help_text="So long after it was last used.")
    on_idle = serializers.ChoiceField(choices=["shutdown", "suspend"])


class ResumeTriggers(StrictSerializer):
    """What resumes a devbox that is suspended."""

    http = FlagField(
        required=False,
        allow_null=True,
        help_text="A request through its tunnel. Comes before the tunnel's own `wake_on_http`.",
    )
    axon_event = FlagField(required=False, allow_null=True, help_text="Not available yet.")

    def validate_axon_event(self, value: bool | None) -> bool | None:
        if value:
            raise serializers.ValidationError("Axons are not available yet.")
        return value


class NextClockView(serializers.Serializer[Any]):
    """The clock that fires next when nothing happens. A command that runs, or somebody at a terminal, puts
    `after_idle` off when it comes to that."""

    clock = serializers.ChoiceField(choices=["keep_alive", "after_idle"])
    action = serializers.ChoiceField(choices=["shutdown", "suspend"])
    at_ms = serializers.IntegerField(max_value=INT64_MAX, min_value=0)
    seconds = serializers.IntegerField(help_text="Its time,")
    since_ms = serializers.IntegerField(max_value=INT64_MAX, min_value=0, help_text="which began then,")
    since = serializers.ChoiceField(choices=["start", *states.ACTIVITIES], help_text="with that.")
