"""Which GPUs there are: one frozen value, from NVML where that can tell, else from torch.

``PYTEST_LORA_HARDWARE`` replaces it, as JSON: ``{"kind": "cuda", "devices": [{"name": "A", "total": 24000000000,
"capability": [8, 9]}]}`` describes a machine, of which CUDA_VISIBLE_DEVICES shows a part like of any other. A MIG slice
has a ``key`` too, by which it is shown.
"""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

REPLACED = "PYTEST_LORA_HARDWARE"
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Device:
    """One GPU.

    Attributes:
        label: As messages call it: ``"cuda:0"`` by the caller's numbering, also where a worker sees only this one.
        key: What tells it from the others on the machine: its entry in CUDA_VISIBLE_DEVICES.
        name: Of the product.
        total: Its memory, in bytes.
        capability: CUDA compute capability, major and minor; ``None`` where there is no such thing.
    """

    label: str
    key: str
    name: str
    total: int
    capability: tuple[int, int] | None = None


@dataclass(frozen=True)
class Hardware:
    """The GPUs that this process sees.

    Attributes:
        kind: torch's name of their sort: ``"cuda"`` (ROCm too), ``"xpu"``, ``"mps"``; ``"cpu"`` without any.
        devices: In the order in which torch numbers them.
        why_none: Why there is none, for messages.
        is_sure: Whether torch has been asked, or need not be.
    """

    kind: str
    devices: tuple[Device, ...] = ()
    why_none: str = ""
    is_sure: bool = True


def none(why: str) -> Hardware:
    """A machine without a GPU that can be used, and why."""
    return Hardware("cpu", why_none=why)


def found(wanted: str = "auto") -> Hardware:
    """The GPUs that this process sees.

    Args:
        wanted: ``"auto"``, or the kind that counts: ``"cpu"``, ``"cuda"``, ``"xpu"``, ``"mps"``.

    Returns:
        The value. If it is not ``is_sure``, torch was not asked and :func:`confirmed` may still differ.
    """
    if wanted == "cpu":
        return none("--lora-device cpu rules them out")
    return _of_kind(wanted, _replaced() or _from_nvml(wanted) or _from_torch(wanted))


def confirmed(wanted: str = "auto") -> Hardware:
    """The GPUs that torch can use, by torch's word; imports torch and starts CUDA."""
    return _of_kind(wanted, _replaced() or _from_torch(wanted))


def _of_kind(wanted: str, hardware: Hardware) -> Hardware:
    if hardware.devices and wanted not in ("auto", hardware.kind):
        return none(f"the devices are of kind {hardware.kind}, and --lora-device is {wanted}")
    return hardware


def is_replaced() -> bool:
    """Whether the hardware is made up."""
    return REPLACED in os.environ


def count_without_starting() -> int:
    """Number of CUDA devices to choose from; CUDA is not started, so that this process may still see fewer of them.

    Of several MIG slices a process sees the first only, so that a worker may choose one; torch would start CUDA to
    count them.
    """
    entries = visible()
    if entries and all(entry.startswith("MIG-") for entry in entries):
        return len(entries)
    hardware = _replaced() or _from_nvml("cuda")
    if hardware is not None:
        return len(hardware.devices) if hardware.kind == "cuda" else 0
    import torch

    return torch.cuda.device_count()


def visible() -> list[str] | None:
    """The entries of CUDA_VISIBLE_DEVICES up to the first that hides the rest; ``None`` if it is not set."""
    text = os.environ.get(VISIBLE)
    if text is None:
        return None
    entries: list[str] = []
    for entry in (part.strip() for part in text.split(",")):
        if not entry or entry.startswith("-"):
            break
        entries.append(entry)
    return entries


def _shown(machine: list[Device]) -> tuple[Device, ...] | None:
    """The part of a machine's devices that is visible; ``None`` where the entries are neither indexes nor keys."""
    entries = visible()
    if entries is None:
        return tuple(machine)
    by_entry = {str(index): device for index, device in enumerate(machine)}
    by_entry |= {device.key: device for device in machine}
    if not all(entry.isdecimal() or entry in by_entry for entry in entries):
        return None
    if entries and entries[0].startswith("MIG-"):
        entries = entries[:1]
    known = [by_entry[entry] for entry in takewhile(by_entry.__contains__, entries)]
    return tuple(replace(device, label=f"cuda:{i}") for i, device in enumerate(known))


def _hidden() -> str:
    entries = visible()
    return f"{VISIBLE} is {os.environ[VISIBLE]!r}" if entries == [] else ""


def _replaced() -> Hardware | None:
    text = os.environ.get(REPLACED)
    if text is None:
        return None
    answer = json.loads(text)
    kind = answer["kind"]
    machine = [
        Device(
            f"{kind}:{i}",
            one.get("key", str(i)),
            one["name"],
            int(one["total"]),
            _pair(one.get("capability")),
        )
        for i, one in enumerate(answer["devices"])
    ]
    devices = (_shown(machine) or ()) if kind == "cuda" else tuple(machine)
    return (
        Hardware(kind, devices) if devices else none(_hidden() or answer.get("why_none", "there is no GPU"))
    )


def _pair(capability: list[int] | None) -> tuple[int, int] | None:
    return (capability[0], capability[1]) if capability else None


def _from_nvml(wanted: str) -> Hardware | None:
    """What the driver says, without torch; ``None`` where it cannot tell."""
    if wanted not in ("auto", "cuda"):
        return None
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # not installed, no driver, another maker: each of its own type
        return None
    try:
        machine = [_nvml_device(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    except Exception:
        return None
    finally:
        nvml.nvmlShutdown()
    # CUDA numbers the fastest first, NVML by the bus: one numbering only if all are alike.
    alike = len({(device.total, device.capability) for device in machine}) <= 1
    devices = _shown(machine)
    if devices is None or not (alike or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"):
        return None
    return Hardware("cuda", devices, is_sure=False) if devices else none(_hidden() or "the driver lists none")


def _nvml_device(nvml: Any, index: int) -> Device:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    name = nvml.nvmlDeviceGetName(handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Device(
        label=f"cuda:{index}",
        key=str(index),
        name=name.decode() if isinstance(name, bytes) else name,
        total=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        capability=(major, minor),
    )


def _from_torch(wanted: str) -> Hardware:
    import torch

    if wanted in ("auto", "cuda") and torch.cuda.is_available():
        # torch.cuda.device_count() reads CUDA_VISIBLE_DEVICES as it is now, not as it was when CUDA was started.
        started: Any = getattr(torch._C, "_cuda_getDeviceCount", torch.cuda.device_count)
        return Hardware("cuda", tuple(_cuda_device(index) for index in range(started())))
    if wanted in ("auto", "xpu") and torch.xpu.is_available():
        return Hardware("xpu", tuple(_xpu_device(index) for index in range(torch.xpu.device_count())))
    if wanted in ("auto", "mps") and torch.backends.mps.is_available():
        total = int(torch.mps.recommended_max_memory())
        return Hardware("mps", (Device("mps", "mps", "Apple GPU", total),))
    return none(_why_torch_has_none(wanted))


def _cuda_device(index: int) -> Device:
    import torch

    properties = torch.cuda.get_device_properties(index)
    entries = visible()
    return Device(
        label=f"cuda:{index}",
        key=entries[index] if entries and index < len(entries) else str(index),
        name=properties.name,
        total=int(properties.total_memory),
        # What ROCm reports there numbers other architectures.
        capability=None if torch.version.hip else (properties.major, properties.minor),
    )


def _xpu_device(index: int) -> Device:
    import torch

    properties = torch.xpu.get_device_properties(index)
    return Device(f"xpu:{index}", str(index), str(properties.name), int(properties.total_memory))


def _why_torch_has_none(wanted: str) -> str:
    import torch

    of_cuda = wanted in ("auto", "cuda")
    if of_cuda and not (torch.version.cuda or torch.version.hip):
        return f"torch {torch.__version__} is built without CUDA"
    return (of_cuda and _hidden()) or f"torch {torch.__version__} finds none"
