"""Files and folders that a user names for a session.

Those of a flag are relative to where pytest was called, those of the ini file to its own folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


def model_folder(config: pytest.Config) -> Path | None:
    source, folder = _path(config, "model")
    if folder is None:
        return None
    if not folder.is_dir():
        hint = _hub_hint(config.getoption("lora_model") or "") or "; models are never downloaded"
        raise pytest.UsageError(f"{source}: there is no folder {str(folder)!r}{hint}")
    if not (folder / "config.json").is_file():
        raise pytest.UsageError(
            f"{source}: {str(folder)!r} holds no config.json, so it is no transformers model"
        )
    return folder


def base(config: pytest.Config) -> Path | str | None:
    source, path = _path(config, "base")
    if path is None or path.is_file() or (path / "config.json").is_file():
        return path
    given: str = config.getoption("lora_base") or config.getini("lora_base")
    from pytest_lora.inspection.public_bases import find_shape, is_name

    names = {line.partition("=")[0].strip() for line in config.getini("lora_bases")}
    if not path.exists() and is_name(given) and (given in names or find_shape(given) is not None):
        return given
    raise pytest.UsageError(
        f"{source}: {str(path)!r} is no model folder and no config.json, and {_shown(given)} is no public model that "
        "is known"
    )


def named_base(config: pytest.Config, line: str) -> tuple[str, Path]:
    name, equals, place = (part.strip() for part in line.partition("="))
    if not (name and equals and place):
        raise pytest.UsageError(f"ini lora_bases: {_shown(line)} is not NAME = PATH")
    path = _placed("ini lora_bases", _beside_ini(config), place)
    if not (path.is_file() or (path / "config.json").is_file()):
        raise pytest.UsageError(f"ini lora_bases: {str(path)!r} is no model folder and no config.json")
    return name, path


def adapter_folders(config: pytest.Config) -> Iterator[Path]:
    for flag in config.getoption("lora_adapters"):
        yield _folder_of_adapters("--lora-adapters", config.invocation_params.dir, flag)
    if config.getoption("lora_adapters") or config.args_source is config.ArgsSource.ARGS:
        return
    for line in config.getini("lora_adapters"):
        yield _folder_of_adapters("ini lora_adapters", _beside_ini(config), line)


def report_file(config: pytest.Config, given: str) -> Path:
    from pytest_lora.report import FORMATS, format_of

    path = _placed("--lora-report", config.invocation_params.dir, given)
    if not format_of(path.name):
        raise pytest.UsageError(f"--lora-report: {_shown(given)} must end in {', '.join(sorted(FORMATS))}")
    if path.is_dir():
        raise pytest.UsageError(f"--lora-report: {_shown(given)} is a folder; name a file")
    return path


def baseline_file(config: pytest.Config) -> Path | None:
    given = config.getoption("lora_baseline")
    if given is None:
        if config.getoption("lora_update_baseline"):
            raise pytest.UsageError("--lora-update-baseline: say which file, with --lora-baseline FILE")
        return None
    path = _placed("--lora-baseline", config.invocation_params.dir, given)
    if path.is_dir() or not path.parent.is_dir():
        raise pytest.UsageError(f"--lora-baseline: {_shown(given)} must be a file in a folder that exists")
    return path


def recipe_places(config: pytest.Config) -> Iterator[Path]:
    flags = config.getoption("lora_recipes")
    for flag in flags:
        yield _recipe_place("--lora-recipes", config.invocation_params.dir, flag)
    if not flags and config.args_source is not config.ArgsSource.ARGS:
        for line in config.getini("lora_recipes"):
            yield _recipe_place("ini lora_recipes", _beside_ini(config), line)


def _recipe_place(source: str, where: Path, given: str) -> Path:
    place = _placed(source, where, given)
    if not place.exists():
        raise pytest.UsageError(f"{source}: there is no file or folder {str(place)!r}{_hub_hint(given)}")
    return place.resolve()


def _folder_of_adapters(source: str, where: Path, given: str) -> Path:
    folder = _placed(source, where, given)
    if not folder.is_dir():
        hint = _hub_hint(given) or "; adapters are never downloaded"
        raise pytest.UsageError(f"{source}: there is no folder {str(folder)!r}{hint}")
    return folder.resolve()


def _hub_hint(given: str) -> str:
    from pytest_lora.arguments import hub_hint  # a worker of xdist reads no more than it needs

    return hub_hint(given)


def _placed(source: str, home: Path, given: str) -> Path:
    """A path as it was written, relative to a folder.

    Raises:
        pytest.UsageError: The system cannot look at it: it is too long, say, or has a NUL.
    """
    try:
        path = home / Path(given).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # the last for a home that there is not
        raise pytest.UsageError(f"{source}: {_shown(given)} is no path: {_shown(str(error))}") from error
    return path


def _path(config: pytest.Config, name: str) -> tuple[str, Path | None]:
    """Where a path is set, and the path: the flag is relative to where pytest was called, ini to its own folder."""
    if flag := config.getoption(f"lora_{name}"):
        return f"--lora-{name}", _placed(f"--lora-{name}", config.invocation_params.dir, flag)
    if ini := config.getini(f"lora_{name}"):
        return f"ini lora_{name}", _placed(f"ini lora_{name}", _beside_ini(config), ini)
    return "", None


def _beside_ini(config: pytest.Config) -> Path:
    return config.inipath.parent if config.inipath else config.rootpath


def _shown(value: object) -> str:
    from pytest_lora.values import shown  # not where a session starts that has nothing to refuse

    return shown(value)
