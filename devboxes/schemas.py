"""What the operations on devboxes take and answer, as DRF serializers.

In charge of: the rules of each field, the refusal by name of what is not built, and the OpenAPI document. Not in
charge of: the operations (`devboxes.api`), or of rules that need the database (`devboxes.services`).
"""

from __future__ import annotations

import re
from typing import Any

from django.conf import settings
from drf_spectacular.utils import PolymorphicProxySerializer, extend_schema_field
from rest_framework import serializers

from api.validation import (
    INT64_MAX,
    FlagField,
    MetadataField,
    NumberField,
    SecondsField,
    StrictSerializer,
    TextField,
    WholeField,
    validated,
)
from devboxes import launch, sizes, states
from devboxes.clock_schemas import IdleConfigurationParameters, NextClockView, ResumeTriggers

NAME_MAX = 255
KEEP_ALIVE_DEFAULT = 3600
KEEP_ALIVE_MAX = 172_800
COMMANDS_MAX = 256
MOUNTS_MAX = 256
FILE_MOUNT_BYTES = 2 << 20
PATH_MAX = 4096
VARIABLES_MAX = 1000
VARIABLE_BYTES = 128 * 1024 - 1
ENVIRONMENT_BYTES = 1 << 20
UID_MAX = 60_000
"""Above it live the processes that serve a box, and `nobody`."""

ALSO_KNOWN_STATUSES = ("queued", "scheduled")
"""Statuses that newer clients ask for; nothing is ever in them."""
ASKABLE_STATUSES = (*states.STATUSES, *ALSO_KNOWN_STATUSES)

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_REPO = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,100}")
_GIT_REF = re.compile(r"(?![-/])(?!.*(\.\.|//|@\{))[A-Za-z0-9._/@+#-]{1,255}(?<![/.])")
_TOKEN = re.compile(r"[\x21-\x7e]{1,4096}")


def not_yet(schema: Any, what: str) -> serializers.Field[Any, Any, Any, Any]:
    """A field of the contract that is refused by name until what it needs is built. Null and empty ask for nothing."""

    @extend_schema_field(schema)
    class NotYet(serializers.Field[Any, Any, Any, Any]):
        def to_internal_value(self, data: Any) -> Any:
            if data in ("", {}, []):
                return None
            raise serializers.ValidationError(f"{what} not available yet.")

        def to_representation(self, value: Any) -> Any:
            return value

    return NotYet(required=False, allow_null=True, help_text="Not available yet.")


_TEXT = {"type": "string"}
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}


def check_path(path: str) -> str:
    """A path in a devbox to write a file at: absolute, below `~`, or relative to the home."""
    if not path or path.endswith("/") or path == "~":
        raise serializers.ValidationError("Must name a file.")
    if len(path.encode()) > PATH_MAX:
        raise serializers.ValidationError(f"May have at most {PATH_MAX} bytes.")
    if ".." in path.split("/"):
        raise serializers.ValidationError("May not contain '..'.")
    return path


def check_content(content: str) -> str:
    """A file mount's content."""
    if len(content.encode()) > FILE_MOUNT_BYTES:
        raise serializers.ValidationError(f"May have at most {FILE_MOUNT_BYTES} bytes; upload larger files instead.")
    return content


def check_command(command: str) -> str:
    """A shell command."""
    if len(command.encode()) > settings.BERTH.COMMAND_MAX:
        raise serializers.ValidationError(f"May have at most {settings.BERTH.COMMAND_MAX} bytes.")
    return command


def _matches(pattern: re.Pattern[str], rule: str) -> Any:
    def check(value: str) -> None:
        if pattern.fullmatch(value) is None:
            raise serializers.ValidationError(rule)

    return check


@extend_schema_field(_TEXTS)
class EnvironmentField(serializers.Field[Any, Any, Any, Any]):
    """Environment variables by name."""

    def to_internal_value(self, data: Any) -> dict[str, str]:
        if not isinstance(data, dict):
            raise serializers.ValidationError("Must be an object of texts.")
        if len(data) > VARIABLES_MAX:
            raise serializers.ValidationError(f"At most {VARIABLES_MAX} variables are allowed.")
        total = 0
        for name, value in data.items():
            if _VARIABLE.fullmatch(name) is None:
                raise serializers.ValidationError(f"{name[:80]!r} cannot be the name of a variable.")
            if not isinstance(value, str):
                raise serializers.ValidationError(f"{name[:80]}: the value must be a text.")
            size = len(name) + 1 + len(value.encode())
            if size > VARIABLE_BYTES:
                raise serializers.ValidationError(f"{name[:80]}: a variable may have at most {VARIABLE_BYTES} bytes.")
            total += size
        if total > ENVIRONMENT_BYTES:
            raise serializers.ValidationError(f"All variables together may have at most {ENVIRONMENT_BYTES} bytes.")
        return data

    def to_representation(self, value: Any) -> Any:
        return value


@extend_schema_field(_TEXTS)
class FileMountsField(serializers.Field[Any, Any, Any, Any]):
    """Contents of files by their paths."""

    def to_internal_value(self, data: Any) -> dict[str, str]:
        if not isinstance(data, dict):
            raise serializers.ValidationError("Must be an object of texts.")
        for path, content in data.items():
            if not isinstance(content, str):
                raise serializers.ValidationError(f"{path[:80]!r}: the content must be a text.")
            try:
                check_path(path)
                check_content(content)
            except serializers.ValidationError as error:
                raise serializers.ValidationError(f"{path[:80]!r}: {error.detail[0]}") from None  # type: ignore[index]
        return data

    def to_representation(self, value: Any) -> Any:
        return value


class CodeMountParameters(StrictSerializer):
    """A repository to clone into the home directory."""

    repo_name = TextField(validators=[_matches(_REPO, "Must be the name of a repository.")])
    repo_owner = TextField(validators=[_matches(_REPO, "Must be the owner of a repository.")])
    install_command = TextField(
        required=False, allow_null=True, validators=[check_command], help_text="Run in the clone, after it."
    )
    git_ref = TextField(
        required=False,
        allow_null=True,
        validators=[_matches(_GIT_REF, "Must be a branch, a tag or a commit.")],
        help_text="A branch, a tag or a commit; the default branch if not given.",
    )
    token = TextField(
        required=False,
        allow_null=True,
        validators=[_matches(_TOKEN, "Must be 1 to 4096 printable characters without spaces.")],
        help_text="For private repositories. It is kept sealed, and never in the clone, in logs or in answers.",
    )


class CodeMount(CodeMountParameters):
    """A repository to clone into the home directory."""

    type = serializers.ChoiceField(choices=["code_mount"])


class FileMount(StrictSerializer):
    """A file to write."""

    type = serializers.ChoiceField(choices=["file_mount"])
    target = TextField(validators=[check_path], help_text="Absolute, or relative to the home directory.")
    content = TextField(validators=[check_content])


class ObjectMount(serializers.Serializer[Any]):
    """Not available yet."""

    type = serializers.ChoiceField(choices=["object_mount"])
    object_id = serializers.CharField()
    object_path = serializers.CharField()


class AgentMount(serializers.Serializer[Any]):
    """Not available yet."""

    type = serializers.ChoiceField(choices=["agent_mount"])
    agent_id = serializers.CharField(allow_null=True)
    agent_name = serializers.CharField(allow_null=True)
    agent_path = serializers.CharField(required=False, allow_null=True)
    auth_token = serializers.CharField(required=False, allow_null=True)


class BrokerMount(serializers.Serializer[Any]):
    """Not available yet."""

    type = serializers.ChoiceField(choices=["broker_mount"])
    axon_id = serializers.CharField()
    protocol = serializers.ChoiceField(choices=["acp", "claude_json"], required=False, allow_null=True)
    agent_binary = serializers.CharField(required=False, allow_null=True)
    working_directory = serializers.CharField(required=False, allow_null=True)
    launch_args = serializers.ListField(child=serializers.CharField(), required=False, allow_null=True)


@extend_schema_field(
    PolymorphicProxySerializer(
        component_name="Mount",
        serializers={
            "object_mount": ObjectMount,
            "agent_mount": AgentMount,
            "code_mount": CodeMount,
            "file_mount": FileMount,
            "broker_mount": BrokerMount,
        },
        resource_type_field_name="type",
    )
)
class MountField(serializers.Field[Any, Any, Any, Any]):
    """One mount, told apart by its `type`."""

    _built = {"file_mount": FileMount, "code_mount": CodeMount}
    _later = ("object_mount", "agent_mount", "broker_mount")

    def to_internal_value(self, data: Any) -> dict[str, Any]:
        kind = data.get("type") if isinstance(data, dict) else None
        if kind in self._later:
            raise serializers.ValidationError({"type": f"{kind} is not available yet."})
        if not isinstance(kind, str) or kind not in self._built:
            raise serializers.ValidationError({"type": f"Must be one of {', '.join([*self._built, *self._later])}."})
        return validated(self._built[kind], data)

    def to_representation(self, value: Any) -> Any:
        return value


class LifecycleHooks(StrictSerializer):
    """What is run in a devbox before it is suspended."""

    suspend_commands = serializers.ListField(
        child=TextField(validators=[check_command]),
        required=False,
        allow_null=True,
        max_length=COMMANDS_MAX,
        help_text="Run one after the other as the devbox's user; one that fails is logged and stops nothing.",
    )
    suspend_deadline_ms = WholeField(
        required=False,
        allow_null=True,
        min_value=1,
        max_value=launch.SUSPEND_DEADLINE_MS_MAX,
        help_text=f"How long they may take together; {launch.SUSPEND_DEADLINE_MS} if not given.",
    )


class LifecycleConfigurationParameters(StrictSerializer):
    """What happens to a devbox that sleeps or is not used."""

    after_idle = IdleConfigurationParameters(required=False, allow_null=True)
    resume_triggers = ResumeTriggers(required=False, allow_null=True)
    lifecycle_hooks = LifecycleHooks(required=False, allow_null=True)


class UserParameters(StrictSerializer):
    """The Linux user that everything runs as."""

    username = TextField(validators=[_matches(_USER, "Must be 1 to 32 of a-z 0-9 _ -, and not start with a digit.")])
    uid = WholeField(min_value=0, max_value=UID_MAX)

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        if attrs["username"] == "root" and attrs["uid"] != 0:
            raise serializers.ValidationError({"uid": "root has uid 0."})
        return attrs


class LaunchParameters(StrictSerializer):
    """The size of a devbox, how long it lives, who works in it and what is run before it is `running`."""

    launch_commands = serializers.ListField(
        child=TextField(validators=[check_command]),
        required=False,
        allow_null=True,
        max_length=COMMANDS_MAX,
        help_text="Run one after the other before the entrypoint; the first that fails fails the devbox.",
    )
    resource_size_request = serializers.ChoiceField(
        choices=sizes.NAMES, required=False, allow_null=True, help_text=f"{sizes.DEFAULT} if not given."
    )
    available_ports = serializers.ListField(child=WholeField(), required=False, allow_null=True, help_text="Ignored.")
    keep_alive_time_seconds = WholeField(
        required=False,
        allow_null=True,
        min_value=1,
        max_value=KEEP_ALIVE_MAX,
        help_text=f"The devbox is shut down so long after it started. {KEEP_ALIVE_DEFAULT} if not given.",
    )
    after_idle = IdleConfigurationParameters(
        required=False,
        allow_null=True,
        help_text="In place of `keep_alive_time_seconds`. `lifecycle.after_idle` is the same; given both, they must "
        "be equal.",
    )
    custom_cpu_cores = NumberField(required=False, allow_null=True, most=sizes.CPU_CORES_MAX)
    custom_gb_memory = WholeField(required=False, allow_null=True)
    custom_disk_size = WholeField(required=False, allow_null=True)
    architecture = serializers.ChoiceField(choices=["x86_64", "arm64"], required=False, allow_null=True)
    user_parameters = UserParameters(required=False, allow_null=True)
    required_services = not_yet({"type": "array", "items": _TEXT}, "Services are")
    network_policy_id = not_yet(_TEXT, "Network policies are")
    lifecycle = LifecycleConfigurationParameters(required=False, allow_null=True)
    provisioning_tier = serializers.ChoiceField(choices=["standard", "flex"], required=False, allow_null=True)

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        try:
            sizes.size_of(attrs)
        except sizes.BadSize as error:
            raise serializers.ValidationError({error.field: error.message}) from None
        older, newer = attrs.get("after_idle"), (attrs.get("lifecycle") or {}).get("after_idle")
        if older and newer and older != newer:
            raise serializers.ValidationError({"after_idle": "Must be the same as lifecycle.after_idle."})
        return attrs


class TunnelConfig(StrictSerializer):
    """How a devbox shall be reached from outside."""

    auth_mode = serializers.ChoiceField(
        choices=["open", "authenticated"],
        required=False,
        allow_null=True,
        help_text="Whether the tunnel's key is enough (`open`, if not given) or its token is needed, too.",
    )
    http_keep_alive = FlagField(
        required=False, allow_null=True, help_text="Whether traffic counts as use of the devbox; true if not given."
    )
    wake_on_http = FlagField(
        required=False, allow_null=True, help_text="Whether traffic resumes a suspended devbox; false if not given."
    )


class GatewaySpec(serializers.Serializer[Any]):
    """Not available yet."""

    gateway = serializers.CharField()
    secret = serializers.CharField()


class McpSpec(serializers.Serializer[Any]):
    """Not available yet."""

    mcp_config = serializers.CharField()
    secret = serializers.CharField()


class DevboxCreateParameters(StrictSerializer):
    """What a new devbox shall be like; all of it may be left out."""

    name = TextField(required=False, allow_null=True, max_length=NAME_MAX)
    environment_variables = EnvironmentField(required=False, allow_null=True)
    secrets = not_yet(_TEXTS, "Secrets are")
    file_mounts = FileMountsField(required=False, allow_null=True, help_text="Contents of files by their paths.")
    entrypoint = TextField(
        required=False,
        allow_null=True,
        validators=[check_command],
        help_text="Run once the launch commands are done; the devbox is shut down when it ends.",
    )
    blueprint_id = not_yet(_TEXT, "Blueprints are")
    blueprint_name = not_yet(_TEXT, "Blueprints are")
    repo_connection_id = not_yet(_TEXT, "Repository connections are")
    launch_parameters = LaunchParameters(required=False, allow_null=True)
    snapshot_id = TextField(
        required=False,
        allow_null=True,
        allow_blank=True,
        help_text="Of what to make its disk; gives size and user, too.",
    )
    metadata = MetadataField(required=False, allow_null=True)
    code_mounts = serializers.ListField(child=CodeMountParameters(), required=False, allow_null=True)
    mounts = serializers.ListField(child=MountField(), required=False, allow_null=True)
    tunnel = TunnelConfig(required=False, allow_null=True)
    gateways = not_yet(serializers.DictField(child=GatewaySpec()), "Gateways are")
    mcp = not_yet(serializers.DictField(child=McpSpec()), "MCP servers are")

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        mounts = all_mounts(attrs)
        if len(mounts) > MOUNTS_MAX:
            raise serializers.ValidationError({"mounts": f"At most {MOUNTS_MAX} mounts of all kinds are allowed."})
        names = [mount["repo_name"] for mount in mounts if mount["type"] == "code_mount"]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise serializers.ValidationError({"code_mounts": f"More than one would be cloned to {sorted(twice)[0]}."})
        return attrs


def all_mounts(attrs: dict[str, Any]) -> list[dict[str, Any]]:
    """The mounts of a creation from all its fields, files first, in the order they are made."""
    files = [
        {"type": "file_mount", "target": path, "content": content}
        for path, content in (attrs.get("file_mounts") or {}).items()
    ]
    code = [{"type": "code_mount", **mount} for mount in attrs.get("code_mounts") or []]
    given = [dict(mount) for mount in attrs.get("mounts") or []]
    return sorted([*files, *code, *given], key=lambda mount: str(mount["type"]) != "file_mount")


class DevboxUpdateParameters(StrictSerializer):
    """What to change. A field left out or null stays; an empty name and empty metadata clear."""

    name = TextField(required=False, allow_null=True, max_length=NAME_MAX)
    metadata = MetadataField(required=False, allow_null=True)


class DevboxWaitForStatusRequest(StrictSerializer):
    """Which statuses to wait for."""

    statuses = serializers.ListField(
        child=serializers.ChoiceField(choices=ASKABLE_STATUSES), allow_empty=False, max_length=20
    )
    timeout_seconds = SecondsField(
        required=False, allow_null=True, help_text="Seconds to wait: 10 if not given, at most 30."
    )


# --- answers ---


class DevboxStateTransition(serializers.Serializer[Any]):
    """A status that the devbox reached."""

    status = serializers.ChoiceField(choices=states.STATUSES)
    transition_time_ms = serializers.IntegerField(max_value=INT64_MAX, min_value=0)
    failure_reason = serializers.CharField(required=False, allow_null=True)


class TunnelView(serializers.Serializer[Any]):
    """A devbox's tunnel: its port N is `https://{N}-{tunnel_key}.tunnel.<domain>`."""

    tunnel_key = serializers.CharField(help_text="Part of the host name. Who knows it reaches an open tunnel.")
    auth_mode = serializers.ChoiceField(choices=["open", "authenticated"])
    auth_token = serializers.CharField(
        required=False,
        allow_null=True,
        help_text="Of an authenticated one: as a bearer token in X-Runloop-Tunnel-Authorization or Authorization.",
    )
    create_time_ms = serializers.IntegerField(max_value=INT64_MAX, min_value=0)
    http_keep_alive = serializers.BooleanField()
    wake_on_http = serializers.BooleanField()


class GatewaySpecView(serializers.Serializer[Any]):
    """Not available yet."""

    gateway_config_id = serializers.CharField()
    secret_id = serializers.CharField()


class McpSpecView(serializers.Serializer[Any]):
    """Not available yet."""

    mcp_config_id = serializers.CharField()
    secret_id = serializers.CharField()


class DevboxView(serializers.Serializer[Any]):
    """A devbox. Times are Unix milliseconds."""

    id = serializers.CharField()
    name = serializers.CharField(required=False, allow_null=True)
    status = serializers.ChoiceField(choices=states.STATUSES)
    create_time_ms = serializers.IntegerField(max_value=INT64_MAX, min_value=0)
    end_time_ms = serializers.IntegerField(
        max_value=INT64_MAX, min_value=0, allow_null=True, help_text="When its final status was reached."
    )
    initiator_type = serializers.ChoiceField(
        choices=["unknown", "api", "scenario", "scoring_validation"], required=False
    )
    initiator_id = serializers.CharField(required=False, allow_null=True, help_text="The API key that made it.")
    blueprint_id = serializers.CharField(required=False, allow_null=True)
    snapshot_id = serializers.CharField(required=False, allow_null=True)
    metadata = MetadataField()
    failure_reason = serializers.ChoiceField(choices=states.FAILURE_REASONS, required=False, allow_null=True)
    shutdown_reason = serializers.ChoiceField(choices=states.SHUTDOWN_REASONS, required=False, allow_null=True)
    why = serializers.CharField(required=False, allow_null=True, help_text="The cause of its end, in words.")
    launch_parameters = LaunchParameters()
    capabilities = serializers.ListField(child=serializers.ChoiceField(choices=["unknown", "docker_in_docker"]))
    state_transitions = DevboxStateTransition(many=True)
    tunnel = TunnelView(required=False, allow_null=True)
    gateway_specs = serializers.DictField(child=GatewaySpecView(), required=False, allow_null=True)
    mcp_specs = serializers.DictField(child=McpSpecView(), required=False, allow_null=True)
    last_activity_time_ms = serializers.IntegerField(
        max_value=INT64_MAX, min_value=0, required=False, allow_null=True, help_text="When it was last used."
    )
    last_activity_kind = serializers.ChoiceField(
        choices=states.ACTIVITIES, required=False, allow_null=True, help_text="What it was last used as."
    )
    keep_alive_end_time_ms = serializers.IntegerField(
        max_value=INT64_MAX, min_value=0, required=False, allow_null=True, help_text="When it will be shut down."
    )
    disk_stored_time_ms = serializers.IntegerField(
        max_value=INT64_MAX, min_value=0, required=False, allow_null=True, help_text="When its disk was in S3, too."
    )
    next_clock = NextClockView(
        required=False, allow_null=True, help_text="Which clock fires next, and why then; null unless it runs."
    )


class DevboxListView(serializers.Serializer[Any]):
    """A page of devboxes, newest first."""

    devboxes = DevboxView(many=True)
    has_more = serializers.BooleanField()
    total_count = serializers.IntegerField(required=False, allow_null=True)


class MetadataKeysView(serializers.Serializer[Any]):
    """Metadata keys in use."""

    keys = serializers.ListField(child=serializers.CharField(), required=False)


class MetadataValuesView(serializers.Serializer[Any]):
    """Values of a metadata key in use."""

    key = serializers.CharField(required=False)
    values = serializers.ListField(child=serializers.CharField(), required=False)


class EvictionEvent(serializers.Serializer[Any]):
    """The data of a server-sent event about a devbox that will be taken away."""

    devbox_id = serializers.CharField()
    eviction_deadline_ms = serializers.IntegerField(max_value=INT64_MAX, min_value=0)


class DevboxLog(serializers.Serializer[Any]):
    """One entry of a devbox's log."""

    level = serializers.CharField(help_text="info, warning or error; what a command writes to stderr is error.")
    timestamp_ms = serializers.IntegerField()
    source = serializers.ChoiceField(  # type: ignore[assignment]  # DRF's own attribute of this name is the instance's
        choices=["setup_commands", "entrypoint", "exec", "files", "stats", "kmsg"]
    )
    cmd_id = serializers.CharField(required=False, allow_null=True, help_text="The command that it belongs to.")
    shell_name = serializers.CharField(required=False, allow_null=True, help_text="The named shell it was run in.")
    cmd = serializers.CharField(required=False, allow_null=True, help_text="The command, when it was started.")
    message = serializers.CharField(required=False, allow_null=True, help_text="A line.")
    exit_code = serializers.IntegerField(required=False, allow_null=True, help_text="How it ended.")


class DevboxLogsListView(serializers.Serializer[Any]):
    """The newest entries of a devbox's log, in order."""

    logs = DevboxLog(many=True)
