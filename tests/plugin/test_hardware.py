"""Which GPUs there are, by stand-ins for NVML and for what torch says of its devices."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pytest_lora.plugin.gpu import hardware, memory
from pytest_lora.plugin.gpu.devices import Devices
from pytest_lora.plugin.gpu.hardware import Device, Hardware
from pytest_lora.plugin.gpu.marks import Need
from tests.simulated_cuda import MACHINES, play

GB = 10**9


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (hardware.REPLACED, hardware.VISIBLE, "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", None)


def nvml(monkeypatch: pytest.MonkeyPatch, *gigabytes: int) -> SimpleNamespace:
    """An NVML with cards of these sizes."""
    module = SimpleNamespace(open=0)

    def opened(by: int) -> None:
        module.open += by

    module.nvmlInit = lambda: opened(1)
    module.nvmlShutdown = lambda: opened(-1)
    module.nvmlDeviceGetCount = lambda: len(gigabytes)
    module.nvmlDeviceGetHandleByIndex = lambda index: index
    module.nvmlDeviceGetName = lambda index: b"card" if index else "card"
    module.nvmlDeviceGetCudaComputeCapability = lambda index: (8, 9)
    module.nvmlDeviceGetMemoryInfo = lambda index: SimpleNamespace(total=gigabytes[index] * GB)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def cuda(monkeypatch: pytest.MonkeyPatch, *gigabytes: int, hip: str | None = None) -> None:
    """A torch with CUDA devices of these sizes."""
    properties = [
        SimpleNamespace(name="card", total_memory=size * GB, major=9, minor=0) for size in gigabytes
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gigabytes))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gigabytes))
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda: len(gigabytes), raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    monkeypatch.setattr(torch.version, "hip", hip)


def test_the_driver_is_asked_before_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nvml(monkeypatch, 24, 24)
    monkeypatch.setattr(hardware, "_from_torch", None)
    found = hardware.found()
    assert found == Hardware(
        "cuda",
        (Device("cuda:0", "0", "card", 24 * GB, (8, 9)), Device("cuda:1", "1", "card", 24 * GB, (8, 9))),
        is_sure=False,
    )
    assert module.open == 0
    assert hardware.count_without_starting() == 2


@pytest.mark.parametrize(
    ("visible", "keys"), [("1,0", ["1", "0"]), ("1", ["1"]), ("1,-1,0", ["1"]), ("5", [])]
)
def test_the_driver_lists_hidden_devices_too(
    monkeypatch: pytest.MonkeyPatch, visible: str, keys: list[str]
) -> None:
    nvml(monkeypatch, 24, 24)
    monkeypatch.setenv(hardware.VISIBLE, visible)
    devices = hardware.found().devices
    assert [device.key for device in devices] == keys
    assert [device.label for device in devices] == [f"cuda:{i}" for i in range(len(keys))]


@pytest.mark.parametrize("why", ["unlike", "uuid", "error"])
def test_torch_is_asked_where_the_driver_cannot_tell(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    module = nvml(monkeypatch, 24, 80 if why == "unlike" else 24)
    if why == "uuid":
        monkeypatch.setenv(hardware.VISIBLE, "GPU-1234")
    if why == "error":
        module.nvmlDeviceGetMemoryInfo = None
    cuda(monkeypatch, 80)
    found = hardware.found()
    assert found.is_sure
    assert found.devices == (Device("cuda:0", "GPU-1234" if why == "uuid" else "0", "card", 80 * GB, (9, 0)),)
    assert module.open == 0


def test_the_order_of_the_bus_makes_unlike_cards_one_numbering(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml(monkeypatch, 24, 80)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert [device.total for device in hardware.found().devices] == [24 * GB, 80 * GB]


def test_rocm_has_no_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda(monkeypatch, 192, hip="6.2")
    assert hardware.found().devices[0].capability is None


def test_xpu_and_mps_are_found_when_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda(monkeypatch)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12 * GB)
    assert hardware.found() == Hardware("mps", (Device("mps", "mps", "Apple GPU", 12 * GB),))
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
    told = SimpleNamespace(name="Max", total_memory=48 * GB)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda index: told)
    assert hardware.found() == Hardware("xpu", (Device("xpu:0", "0", "Max", 48 * GB),))
    assert hardware.found("mps").kind == "mps"
    assert hardware.found("cuda").devices == ()


def test_without_any_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert hardware.found().why_none == f"torch {torch.__version__} is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert hardware.found().why_none == f"torch {torch.__version__} finds none"
    monkeypatch.setenv(hardware.VISIBLE, "")
    assert hardware.found().why_none == "CUDA_VISIBLE_DEVICES is ''"
    assert hardware.found("cpu").why_none == "--lora-device cpu rules them out"


def test_memory_is_read_by_the_functions_that_torch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, tuple[Any, ...]]] = []

    def record(name: str, result: Any = None) -> Any:
        return lambda *args: calls.append((name, args)) or result

    for name, result in {
        "init": None,
        "synchronize": None,
        "memory_allocated": 5,
        "max_memory_allocated": 7,
        "reset_peak_memory_stats": None,
        "mem_get_info": (3, 10),
        "empty_cache": None,
    }.items():
        for kind in ("cuda", "xpu"):
            assert hasattr(getattr(torch, kind), name)
            monkeypatch.setattr(getattr(torch, kind), name, record(name, result))
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", record("workspaces"), raising=False)
    for kind in ("cuda", "xpu"):
        card = memory.of_kind(kind)
        assert (card.allocated(1), card.peak(1), card.taken(1)) == (5, 7, 7)
        card.restart(1)
        card.synchronize()
        card.release()
    expected = ["init", "memory_allocated", "max_memory_allocated", "mem_get_info", "reset_peak_memory_stats"]
    expected += ["synchronize", "workspaces", "empty_cache"]
    assert [name for name, _ in calls] == expected + [name for name in expected if name != "workspaces"]
    for name in ("synchronize", "current_allocated_memory", "driver_allocated_memory", "empty_cache"):
        assert hasattr(torch.mps, name)


@pytest.mark.parametrize("name", [name for name, one in MACHINES.items() if one.kind == "cuda"])
def test_torch_says_what_there_is_on_every_machine(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    machine = MACHINES[name]
    if machine.visible:
        monkeypatch.setenv(hardware.VISIBLE, machine.visible)
    played = play(monkeypatch, machine)
    found = hardware.found()
    first = machine.visible.partition(",")[0] if machine.visible else "0"
    capability = None if machine.hip else machine.capability
    assert found.devices[0] == Device("cuda:0", first, machine.name, machine.total, capability)
    assert len(found.devices) == machine.count
    assert played.started


def test_workers_choose_among_mig_slices_and_start_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = MACHINES["MIG"]
    played = play(monkeypatch, machine)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("torch starts CUDA to count slices"))
    monkeypatch.setenv(hardware.VISIBLE, str(machine.visible))
    assert hardware.count_without_starting() == 2
    assert not played.started


@pytest.mark.parametrize(
    ("worker", "seen"), [("gw0", 0), ("gw1", 1), ("gw2", 0)], ids=["first", "second", "shares the first"]
)
def test_each_worker_gets_a_mig_slice(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, worker: str, seen: int
) -> None:
    machine = MACHINES["MIG"]
    play(monkeypatch, machine)
    slices = str(machine.visible).split(",")
    monkeypatch.setenv(hardware.VISIBLE, str(machine.visible))
    monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
    config = pytester.parseconfig("--lora-gpu-report")
    assert os.environ[hardware.VISIBLE] == slices[seen]
    devices = Devices(config)
    assert devices.obstacle(Need(vram=20 * GB)) == ""
    (device,) = devices.of(Need()).values()
    assert (device.key, device.label) == (slices[seen], f"cuda:{seen}")
    assert "needs 2 devices; there is 1" in devices.obstacle(Need(count=2))


def test_a_list_of_uuids_is_kept_as_it_is_written(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, MACHINES["two L4"])
    monkeypatch.setenv(hardware.VISIBLE, "GPU-1234, GPU-5678")
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw1")
    pytester.parseconfig("--lora-gpu-report")
    assert os.environ[hardware.VISIBLE] == "GPU-5678"
