"""What a user has set about GPUs; all that a worker of pytest-xdist reads before anything is imported."""

from __future__ import annotations

import pytest

MOST_DIGITS = 6
"""Of a number of GPUs or a rank."""


def device_of(text: str) -> str:
    """A device as ``--lora-device`` names it.

    Raises:
        pytest.UsageError: There is no such device.
    """
    kind, colon, index = text.partition(":")
    if kind not in ("auto", "cpu", "cuda", "xpu", "mps") or (
        colon and not (kind == "cuda" and index.isdecimal())
    ):
        raise pytest.UsageError(f"--lora-device: {_shown(text)} is none of auto, cpu, cuda, cuda:N, xpu, mps")
    return text


def gpus_per_worker(config: pytest.Config) -> int:
    """The ini value; 0 if it is not set.

    Raises:
        pytest.UsageError: It is no number.
    """
    text = config.getini("lora_gpus_per_worker") or "0"
    if not text.isdecimal() or len(text) > MOST_DIGITS:
        raise pytest.UsageError(f"ini lora_gpus_per_worker: {_shown(text)} is no number of GPUs")
    return int(text)


def asks_for_gpus(early_config: pytest.Config) -> bool:
    """Whether the command line or the ini file shows, before anything is imported, that there are GPU tests.

    Raises:
        pytest.UsageError: There is no such device.
    """
    flags = early_config.known_args_namespace
    device = device_of(flags.lora_device)
    asked = flags.lora_require_gpu or flags.lora_gpu_report or early_config.getini("lora_gpus_per_worker")
    return device.startswith("cuda") or bool(device == "auto" and asked)


def _shown(value: object) -> str:
    from pytest_lora.values import shown  # not where a session starts that has nothing to refuse

    return shown(value)
