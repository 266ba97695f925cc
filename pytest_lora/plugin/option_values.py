"""Paths and GPUs that a user has set, checked: all that a worker of pytest-xdist reads before anything is imported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
        raise pytest.UsageError(f"--lora-device: {shown(text)} is none of auto, cpu, cuda, cuda:N, xpu, mps")
    return text


def gpus_per_worker(config: pytest.Config) -> int:
    """The ini value; 0 if it is not set.

    Raises:
        pytest.UsageError: It is no number.
    """
    text = config.getini("lora_gpus_per_worker") or "0"
    if not text.isdecimal() or len(text) > MOST_DIGITS:
        raise pytest.UsageError(f"ini lora_gpus_per_worker: {shown(text)} is no number of GPUs")
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


def adapter_folders(config: pytest.Config) -> tuple[Path, ...]:
    """Folders of saved adapters: those of the flag, else those of ini.

    Raises:
        pytest.UsageError: There is no such folder.
    """
    return _collected(config, "adapters", _folder_of_adapters)


def recipe_places(config: pytest.Config) -> tuple[Path, ...]:
    """Folders of recipes, or recipes: those of the flag, else those of ini.

    Raises:
        pytest.UsageError: There is nothing of that name.
    """
    return _collected(config, "recipes", _recipe_place)


def _collected(
    config: pytest.Config, option: str, place: Callable[[str, Path, str], Path]
) -> tuple[Path, ...]:
    """Places of the flag, else of ini; these count where the command line names no path, or something in them."""
    flags = config.getoption(f"lora_{option}")
    if flags:
        return tuple(place(f"--lora-{option}", config.invocation_params.dir, flag) for flag in flags)
    lines = config.getini(f"lora_{option}")
    places = tuple(place(f"ini lora_{option}", beside_ini(config), line) for line in lines)
    if not places or config.args_source is not config.ArgsSource.ARGS:
        return places
    from pytest_lora.plugin.file_nodes import named_adapters, named_recipes

    files = (named_adapters if option == "adapters" else named_recipes)(config, places)
    return tuple(one for one in places if any(file.is_relative_to(one) for file in files))


def _folder_of_adapters(source: str, where: Path, given: str) -> Path:
    folder = placed(source, where, given)
    if not folder.is_dir():
        hint = hub_hint(given) or "; adapters are never downloaded"
        raise pytest.UsageError(f"{source}: there is no folder {str(folder)!r}{hint}")
    return folder.resolve()


def _recipe_place(source: str, where: Path, given: str) -> Path:
    place = placed(source, where, given)
    if not place.exists():
        raise pytest.UsageError(f"{source}: there is no file or folder {str(place)!r}{hub_hint(given)}")
    return place.resolve()


def placed(source: str, home: Path, given: str) -> Path:
    """A path as it was written, relative to a folder.

    Raises:
        pytest.UsageError: The system cannot look at it: it is too long, say, or has a NUL.
    """
    try:
        path = home / Path(given).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # the last for a home that there is not
        raise pytest.UsageError(f"{source}: {shown(given)} is no path: {shown(str(error))}") from error
    return path


def beside_ini(config: pytest.Config) -> Path:
    """The folder that paths of ini are relative to."""
    return config.inipath.parent if config.inipath else config.rootpath


def hub_hint(given: str) -> str:
    """What to do where a name on the hub stands for a path, or empty."""
    from pytest_lora.arguments import hub_hint  # a worker of xdist reads no more than it needs

    return hub_hint(given)


def shown(value: object) -> str:
    """A value as a message quotes it."""
    from pytest_lora.values import shown  # not where a session starts that has nothing to refuse

    return shown(value)
