"""What a test asks of the GPUs by its marks, and what it lacks."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pytest_lora.facts.numbers import parse_bytes
from pytest_lora.plugin.markers import farthest_first
from pytest_lora.plugin.options import has_own
from pytest_lora.plugin.session_options import options_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pytest

    from pytest_lora.plugin.gpu.hardware import Device

ARGUMENTS = ("min_vram_gb", "count", "capability")
GB = 10**9
BUILT_IN = 2 * 10**9
"""Bytes that a test on the built-in base is given: the base has a million parameters; CUDA's context takes most."""
KEPT_BY_THE_DRIVER = 0.03
"""Share of its memory that a card may lack: of the 16 GB of a T4 torch sees 15.8, of the 24 GB of an L4 23.7."""

_MEANT = {
    "vram": "min_vram_gb",
    "min_vram": "min_vram_gb",
    "vram_gb": "min_vram_gb",
    "memory": "min_vram_gb",
    "gpus": "count",
    "min_gpus": "count",
    "num_gpus": "count",
    "n": "count",
}


class Limit(NamedTuple):
    """The most that may be allocated at a time: in bytes, and as the mark has it."""

    size: int
    text: str


@dataclass(frozen=True)
class Need:
    """What a test needs.

    Attributes:
        vram: Bytes on each device; ``None`` if not said.
        count: Number of devices.
        capability: Least CUDA compute capability, major and minor; ``None`` for any.
        limit: From ``lora_vram_limit``; ``None`` without.
    """

    vram: int | None = None
    count: int = 1
    capability: tuple[int, int] | None = None
    limit: Limit | None = None

    @property
    def share(self) -> int | None:
        """Bytes that it takes of each device: what it declares, else at most its limit; None if neither is said."""
        return self.limit.size if self.vram is None and self.limit else self.vram

    def suits(self, device: Device) -> bool:
        """Whether one device has what each of them must have."""
        enough = self.vram is None or device.total >= self.vram * (1 - KEPT_BY_THE_DRIVER)
        able = self.capability is None or (device.capability or (0, 0)) >= self.capability
        return enough and able


def need_of_fixtures(item: pytest.Item) -> Need:
    """What a test takes that asks for no GPU but has its fixtures on one: little, on the built-in base."""
    is_built_in = has_own(item, "lora_base_model") and options_of(item.config).model is None
    return Need(vram=BUILT_IN) if is_built_in else Need()


def need_of(item: pytest.Item) -> Need:
    """What the marks of a test ask for; the closest wins, argument by argument.

    Raises:
        ValueError: An argument does not exist or has a value that it cannot have.
    """
    given: dict[str, object] = {}
    for mark in farthest_first(item, "lora_gpu"):
        if mark.args:
            raise ValueError(_positional(item.nodeid, mark.args[0]))
        given |= mark.kwargs
    for name in given:
        if name not in ARGUMENTS:
            hint = f"did you mean {_closest(name)!r}?"
            raise ValueError(f"{item.nodeid}: @pytest.mark.lora_gpu has no argument {name!r}; {hint}")
    try:
        vram, count, capability = _vram(given), _count(given), _capability(given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{item.nodeid}: @pytest.mark.lora_gpu: {error}") from error
    return Need(vram, count, capability, _limit(item))


def lacking(need: Need, devices: Sequence[Device], elsewhere: Sequence[Device] = ()) -> str:
    """What a test lacks on the devices it would run on: what it needs and what there is; empty if nothing.

    Args:
        need: What it needs.
        devices: What it would get, at least one.
        elsewhere: Devices of the session that it would not get.
    """
    if len(devices) >= need.count and all(need.suits(device) for device in devices):
        return ""
    asked = []
    if need.vram is not None:
        asked.append(_gb(need.vram))
    if need.capability is not None:
        asked.append(f"compute capability {_dotted(need.capability)}")
    what = " and ".join(asked)
    if need.count > 1:
        what += f" on each of {need.count} devices" if asked else f"{need.count} devices"
    elif asked:
        what += " on one device"
    there = ", ".join(_described(need, device) for device in devices)
    if len(devices) < need.count:
        there = f"there {'is' if len(devices) == 1 else 'are'} {len(devices)}: {there}"
    others = [device.label for device in elsewhere if need.suits(device)]
    hint = f" ({others[0]} would do: --lora-device {others[0]})" if others and need.count == 1 else ""
    return f"needs {what}; {there}{hint}"


def _described(need: Need, device: Device) -> str:
    parts = []
    if need.vram is not None:
        parts.append(_gb(device.total))
    if need.capability is not None:
        parts.append(
            f"compute capability {_dotted(device.capability)}"
            if device.capability
            else "no compute capability"
        )
    return f"{device.label} has {' and '.join(parts)}" if parts else device.label


def _gb(size: int) -> str:
    """Bytes in the unit of ``min_vram_gb``: "40 GB", "15.8 GB"."""
    return f"{size / GB:.1f}".removesuffix(".0") + " GB"


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _vram(given: Mapping[str, object]) -> int | None:
    value = given.get("min_vram_gb")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"min_vram_gb must be a number of GB (10**9 bytes) on each device, not {value!r}")
    if not 0 < value < float("inf"):
        raise ValueError(f"min_vram_gb must be greater than 0, not {value!r}")
    return int(value * GB)


def _count(given: Mapping[str, object]) -> int:
    value = given.get("count", 1)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"count must be a whole number of devices, 1 or more, not {value!r}")
    return value


def _capability(given: Mapping[str, object]) -> tuple[int, int] | None:
    value = given.get("capability")
    if value is None:
        return None
    if isinstance(value, tuple | list) and len(value) == 2 and all(type(part) is int for part in value):
        return value[0], value[1]
    if isinstance(value, str | float) and (match := re.fullmatch(r"(\d+)\.(\d)", str(value))):
        return int(match[1]), int(match[2])
    raise ValueError(f'capability must be as in (8, 0) or "8.0", not {value!r}')


def _limit(item: pytest.Item) -> Limit | None:
    marks = list(farthest_first(item, "lora_vram_limit"))
    if not marks:
        return None
    mark = marks[-1]
    if len(mark.args) != 1 or mark.kwargs:
        raise ValueError(
            f'{item.nodeid}: @pytest.mark.lora_vram_limit takes one size, as in lora_vram_limit("8GiB")'
        )
    try:
        size = parse_bytes(mark.args[0], "the limit of @pytest.mark.lora_vram_limit")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{item.nodeid}: {error}") from error
    return Limit(size, f"@pytest.mark.lora_vram_limit({mark.args[0]!r})".replace("'", '"'))


def _closest(name: str) -> str:
    return _MEANT.get(name) or difflib.get_close_matches(name, ARGUMENTS, n=1, cutoff=0.0)[0]


def _positional(nodeid: str, value: object) -> str:
    name = "min_vram_gb" if isinstance(value, int | float) else "capability"
    return (
        f"{nodeid}: @pytest.mark.lora_gpu takes arguments by name, not the positional {value!r}; "
        f"did you mean {name}={value!r}?"
    )
