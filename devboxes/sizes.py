"""Sizes of devboxes: the presets, and the rules of CUSTOM_SIZE.

In charge of: turning launch parameters into CPU, memory and disk. Pure. Not in charge of: whether a host has the room.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

GIB_MB = 1024
CUSTOM: Final = "CUSTOM_SIZE"
DEFAULT: Final = "SMALL"
CPU_CORES_MAX = 16
MEMORY_GB_MAX = 64
DISK_GB_MIN, DISK_GB_MAX = 2, 64
RATIO_MIN, RATIO_MAX = 2, 8

_CUSTOM_FIELDS = ("custom_cpu_cores", "custom_gb_memory", "custom_disk_size")


@dataclass(frozen=True, slots=True)
class Size:
    """CPU in thousandths of a core, memory and disk in MiB."""

    cpu_millis: int
    memory_mb: int
    disk_mb: int


PRESETS: Final[dict[str, Size]] = {
    "X_SMALL": Size(500, 1 * GIB_MB, 4 * GIB_MB),
    "SMALL": Size(1000, 2 * GIB_MB, 4 * GIB_MB),
    "MEDIUM": Size(2000, 4 * GIB_MB, 8 * GIB_MB),
    "LARGE": Size(2000, 8 * GIB_MB, 16 * GIB_MB),
    "X_LARGE": Size(4000, 16 * GIB_MB, 16 * GIB_MB),
    "XX_LARGE": Size(8000, 32 * GIB_MB, 16 * GIB_MB),
}
NAMES: Final = (*PRESETS, CUSTOM)


class BadSize(ValueError):
    """A size that may not be asked for. `field` is the launch parameter to blame."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message


def size_of(parameters: Mapping[str, Any]) -> Size:
    """The size that launch parameters ask for. Raises BadSize."""
    name = parameters.get("resource_size_request") or DEFAULT
    if name != CUSTOM:
        for field in _CUSTOM_FIELDS:
            if parameters.get(field) is not None:
                raise BadSize(field, f"only goes with resource_size_request {CUSTOM}")
        return PRESETS[name]
    cpu, memory, disk = (parameters.get(field) for field in _CUSTOM_FIELDS)
    if cpu is None:
        raise BadSize("custom_cpu_cores", f"is needed for {CUSTOM}")
    if memory is None:
        raise BadSize("custom_gb_memory", f"is needed for {CUSTOM}")
    if not (cpu in (0.5, 1) or (cpu >= 2 and cpu % 2 == 0 and cpu <= CPU_CORES_MAX)):
        raise BadSize("custom_cpu_cores", f"must be 0.5, 1 or a multiple of 2, at most {CPU_CORES_MAX}")
    if not (memory == 1 or (memory >= 2 and memory % 2 == 0 and memory <= MEMORY_GB_MAX)):
        raise BadSize("custom_gb_memory", f"must be 1 or a multiple of 2, at most {MEMORY_GB_MAX}")
    if not RATIO_MIN <= memory / cpu <= RATIO_MAX:
        raise BadSize("custom_gb_memory", f"must be {RATIO_MIN} to {RATIO_MAX} times custom_cpu_cores")
    if disk is None:
        disk = 4 if memory <= 2 else 8 if memory <= 4 else 16  # as the preset of that memory has
    if not (DISK_GB_MIN <= disk <= DISK_GB_MAX and disk % 2 == 0):
        raise BadSize("custom_disk_size", f"must be a multiple of 2 from {DISK_GB_MIN} to {DISK_GB_MAX}")
    return Size(int(cpu * 1000), int(memory) * GIB_MB, int(disk) * GIB_MB)
