"""The rules of sizes, each side of each edge."""

from __future__ import annotations

from typing import Any

import pytest

from devboxes.sizes import PRESETS, BadSize, Size, size_of


def custom(cpu: Any = None, memory: Any = None, disk: Any = None) -> dict[str, Any]:
    given = {"custom_cpu_cores": cpu, "custom_gb_memory": memory, "custom_disk_size": disk}
    return {"resource_size_request": "CUSTOM_SIZE", **given}


def test_the_presets_are_the_contract_s() -> None:
    table = {
        name: (size.cpu_millis / 1000, size.memory_mb // 1024, size.disk_mb // 1024) for name, size in PRESETS.items()
    }
    assert table == {
        "X_SMALL": (0.5, 1, 4),
        "SMALL": (1, 2, 4),
        "MEDIUM": (2, 4, 8),
        "LARGE": (2, 8, 16),
        "X_LARGE": (4, 16, 16),
        "XX_LARGE": (8, 32, 16),
    }
    assert size_of({}) == size_of({"resource_size_request": None}) == PRESETS["SMALL"]


@pytest.mark.parametrize(
    ("parameters", "size"),
    [
        (custom(0.5, 1), Size(500, 1024, 4096)),
        (custom(0.5, 4, 2), Size(500, 4096, 2048)),
        (custom(1, 8, 64), Size(1000, 8192, 65536)),
        (custom(2.0, 4), Size(2000, 4096, 8192)),
        (custom(2, 16), Size(2000, 16384, 16384)),
        (custom(16, 64, 30), Size(16000, 65536, 30720)),
    ],
)
def test_custom_sizes(parameters: dict[str, Any], size: Size) -> None:
    assert size_of(parameters) == size


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        (custom(memory=4), "custom_cpu_cores"),
        (custom(cpu=2), "custom_gb_memory"),
        (custom(0, 1), "custom_cpu_cores"),
        (custom(0.25, 1), "custom_cpu_cores"),
        (custom(1.5, 4), "custom_cpu_cores"),
        (custom(3, 8), "custom_cpu_cores"),
        (custom(18, 64), "custom_cpu_cores"),
        (custom(1, 3), "custom_gb_memory"),
        (custom(1, 0), "custom_gb_memory"),
        (custom(16, 66), "custom_gb_memory"),
        (custom(1, 1), "custom_gb_memory"),
        (custom(4, 6), "custom_gb_memory"),
        (custom(0.5, 6), "custom_gb_memory"),
        (custom(1, 10), "custom_gb_memory"),
        (custom(1, 2, 0), "custom_disk_size"),
        (custom(1, 2, 1), "custom_disk_size"),
        (custom(1, 2, 3), "custom_disk_size"),
        (custom(1, 2, 66), "custom_disk_size"),
        ({"custom_cpu_cores": 1}, "custom_cpu_cores"),
        ({"resource_size_request": "SMALL", "custom_gb_memory": 2}, "custom_gb_memory"),
        ({"custom_disk_size": 2}, "custom_disk_size"),
    ],
)
def test_sizes_that_may_not_be_asked_for(parameters: dict[str, Any], field: str) -> None:
    with pytest.raises(BadSize) as caught:
        size_of(parameters)
    assert caught.value.field == field
