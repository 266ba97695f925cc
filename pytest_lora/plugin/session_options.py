"""What a user has set for a session; imported where a session has something set, or a test asks."""

from __future__ import annotations

import ast
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest

from pytest_lora.plugin.option_values import (
    MOST_DIGITS,
    adapter_folders,
    beside_ini,
    device_of,
    gpus_per_worker,
    hub_hint,
    placed,
    recipe_places,
    shown,
)


@dataclass(frozen=True)
class LoraOptions:
    """The settings of a session.

    Attributes:
        model: Folder of the base model, absolute; ``None`` for the built-in one.
        adapters: Folders of saved adapters to make test items of, absolute.
        recipes: Folders of recipes, or recipes, to make test items of, absolute.
        card: How many GPUs recipes are for, and the memory of each, as it was written; ``None`` where it is not judged.
        base: Model folder or ``config.json`` that these are compared with, absolute, or the name of a public model;
            ``None`` for none.
        bases: Names of bases, and the model folder or ``config.json`` that each means, absolute.
        fields: Defaults of ``LoraConfig`` and ``Expect`` fields for every test; ``--lora-serve`` sets two.
        select: Codes, or starts of codes, that count; all when empty.
        ignore: Codes, or starts of codes, that are left out.
        strict: Whether warnings fail as errors do.
        slow: Whether tests marked ``lora_slow`` run.
        device: ``"auto"``, or what ``--lora-device`` says.
        require_gpu: Whether GPU tests must run.
        gpu_report: Whether GPU tests are listed at the end.
        gpus_per_worker: How many GPUs an xdist worker sees; 0 to find out.
        ranks: Ranks of the fixture ``lora_rank_sweep``.
        reports: Files to write a report to, absolute.
        baseline: File to compare what was measured with, absolute; ``None`` for none.
        update_baseline: Whether that file is written instead.
        step_summary: GitHub's job summary, to which a report is added; ``None`` elsewhere.
    """

    model: Path | None
    adapters: tuple[Path, ...]
    recipes: tuple[Path, ...]
    card: tuple[int, str | None]
    base: Path | str | None
    bases: dict[str, Path]
    fields: dict[str, object]
    select: tuple[str, ...]
    ignore: tuple[str, ...]
    strict: bool
    slow: bool
    device: str
    require_gpu: bool
    gpu_report: bool
    gpus_per_worker: int
    ranks: tuple[int, ...]
    reports: tuple[Path, ...]
    baseline: Path | None
    update_baseline: bool
    step_summary: Path | None

    @property
    def figures(self) -> bool:
        """Whether anybody is going to look at more than findings, so that it is worth carrying along."""
        return bool(self.reports or self.step_summary or self.baseline)

    @classmethod
    def from_config(cls, config: pytest.Config) -> LoraOptions:
        """Read flags, ini and environment.

        Raises:
            pytest.UsageError: A folder or file that is named does not exist, an ini line is not ``field = literal``,
        fields: Defaults of ``LoraConfig`` and ``Expect`` fields for every test, ``--lora-serve`` included.
        """
        env = os.environ.get("RUN_SLOW", "").lower() in ("1", "yes", "true", "on", "y")
        return cls(
            model=_model_folder(config),
            adapters=adapter_folders(config),
            recipes=recipe_places(config),
            card=_card(config),
            base=_base(config),
            bases=dict(_named_base(config, line) for line in config.getini("lora_bases")),
            fields=_fields(config),
            select=_codes(config, "select"),
            ignore=_codes(config, "ignore"),
            strict=bool(config.getoption("lora_strict") or config.getini("lora_strict")),
            slow=bool(config.getoption("lora_slow") or config.getini("lora_slow") or env),
            device=device_of(config.getoption("lora_device")),
            require_gpu=config.getoption("lora_require_gpu"),
            gpu_report=config.getoption("lora_gpu_report"),
            gpus_per_worker=gpus_per_worker(config),
            ranks=_ranks(config),
            baseline=_baseline_file(config),
            update_baseline=config.getoption("lora_update_baseline"),
            reports=tuple(_report_file(config, given) for given in config.getoption("lora_report")),
            step_summary=Path(summary) if (summary := os.environ.get("GITHUB_STEP_SUMMARY")) else None,
        )


def _fields(config: pytest.Config) -> dict[str, object]:
    if not (config.getini("lora_config") or config.getoption("lora_serve") or config.getini("lora_serve")):
        return {}
    return session_fields(config)


def _codes(config: pytest.Config, name: str) -> tuple[str, ...]:
    """Codes of the flag, else those of the ini value; they are checked where a check first looks at them."""
    flag = config.getoption(f"lora_{name}")
    given = config.getini(f"lora_{name}") if flag is None else [flag]
    return tuple(part.strip() for text in given for part in text.split(",") if part.strip())


_OPTIONS = pytest.StashKey[LoraOptions]()


def options_of(config: pytest.Config) -> LoraOptions:
    """The settings of a session, read once.

    Raises:
        pytest.UsageError: See ``LoraOptions.from_config``.
    """
    if _OPTIONS not in config.stash:
        config.stash[_OPTIONS] = LoraOptions.from_config(config)
    return config.stash[_OPTIONS]


def _model_folder(config: pytest.Config) -> Path | None:
    source, folder = _path(config, "model")
    if folder is None:
        return None
    if not folder.is_dir():
        hint = hub_hint(config.getoption("lora_model") or "") or "; models are never downloaded"
        raise pytest.UsageError(f"{source}: there is no folder {str(folder)!r}{hint}")
    if not (folder / "config.json").is_file():
        raise pytest.UsageError(
            f"{source}: {str(folder)!r} holds no config.json, so it is no transformers model"
        )
    return folder


def _base(config: pytest.Config) -> Path | str | None:
    source, path = _path(config, "base")
    if path is None or path.is_file() or (path / "config.json").is_file():
        return path
    given: str = config.getoption("lora_base") or config.getini("lora_base")
    from pytest_lora.inspection.public_bases import find_shape, is_name

    names = {line.partition("=")[0].strip() for line in config.getini("lora_bases")}
    if not path.exists() and is_name(given) and (given in names or find_shape(given) is not None):
        return given
    raise pytest.UsageError(
        f"{source}: {str(path)!r} is no model folder and no config.json, and {shown(given)} is no public model that "
        "is known"
    )


def _named_base(config: pytest.Config, line: str) -> tuple[str, Path]:
    name, equals, place = (part.strip() for part in line.partition("="))
    if not (name and equals and place):
        raise pytest.UsageError(f"ini lora_bases: {shown(line)} is not NAME = PATH")
    path = placed("ini lora_bases", beside_ini(config), place)
    if not (path.is_file() or (path / "config.json").is_file()):
        raise pytest.UsageError(f"ini lora_bases: {str(path)!r} is no model folder and no config.json")
    return name, path


def _report_file(config: pytest.Config, given: str) -> Path:
    from pytest_lora.report import FORMATS, format_of

    path = placed("--lora-report", config.invocation_params.dir, given)
    if not format_of(path.name):
        raise pytest.UsageError(f"--lora-report: {shown(given)} must end in {', '.join(sorted(FORMATS))}")
    if path.is_dir():
        raise pytest.UsageError(f"--lora-report: {shown(given)} is a folder; name a file")
    return path


def _baseline_file(config: pytest.Config) -> Path | None:
    given = config.getoption("lora_baseline")
    if given is None:
        if config.getoption("lora_update_baseline"):
            raise pytest.UsageError("--lora-update-baseline: say which file, with --lora-baseline FILE")
        return None
    path = placed("--lora-baseline", config.invocation_params.dir, given)
    if path.is_dir() or not path.parent.is_dir():
        raise pytest.UsageError(f"--lora-baseline: {shown(given)} must be a file in a folder that exists")
    return path


_CARD = re.compile(r"(?:(\d{1,6})\s*[xX]\s*)?(\S.*)")


def _card(config: pytest.Config) -> tuple[int, str | None]:
    """How many cards, and the memory of each as it was written."""
    given = config.getoption("lora_card") or config.getini("lora_card")
    if not given:
        return 1, None
    from pytest_lora.facts.numbers import parse_bytes

    match = _CARD.fullmatch(given.strip())
    source = "--lora-card" if config.getoption("lora_card") else "ini lora_card"
    if match is None or not int(match[1] or 1):
        raise pytest.UsageError(f"{source}: {shown(given)} is no memory of cards; write 24GiB or 8x80GiB")
    try:
        parse_bytes(match[2], "size")
    except (TypeError, ValueError) as error:
        raise pytest.UsageError(f"{source}: {shown(given)} is no memory of cards: {error}") from error
    return int(match[1] or 1), match[2]


def _path(config: pytest.Config, name: str) -> tuple[str, Path | None]:
    """Where a path is set, and the path: the flag is relative to where pytest was called, ini to its own folder."""
    if flag := config.getoption(f"lora_{name}"):
        return f"--lora-{name}", placed(f"--lora-{name}", config.invocation_params.dir, flag)
    if ini := config.getini(f"lora_{name}"):
        return f"ini lora_{name}", placed(f"ini lora_{name}", beside_ini(config), ini)
    return "", None


RANKS = (4, 8, 16)


def _ranks(config: pytest.Config) -> tuple[int, ...]:
    for source, text in (
        ("--lora-ranks", config.getoption("lora_ranks")),
        ("ini lora_ranks", config.getini("lora_ranks")),
    ):
        if text:
            parts = [part.strip() for part in text.split(",")]
            sound = all(part.isdecimal() and len(part) <= MOST_DIGITS and int(part) for part in parts)
            if not sound or len(set(parts)) < len(parts):
                raise pytest.UsageError(
                    f"{source}: {shown(text)} are no ranks; write different ones, as in 4,8,16"
                )
            return tuple(map(int, parts))
    return RANKS


def session_fields(config: pytest.Config) -> dict[str, object]:
    """The fields that ini ``lora_config`` sets, and those of ``--lora-serve``.

    Raises:
        pytest.UsageError: A line is not ``field = literal``, or there is no such server.
    """
    return dict(_field(line) for line in config.getini("lora_config")) | _serve(config)


def _field(line: str) -> tuple[str, object]:
    name, equals, literal = (part.strip() for part in line.partition("="))
    try:
        if not equals or not name.isidentifier():
            raise ValueError
        return name, ast.literal_eval(literal)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise pytest.UsageError(
            f"ini lora_config: {shown(line)} is not FIELD = PYTHON LITERAL, as in r = 16 or "
            "target_modules = ['q_proj']"
        ) from error


def _serve(config: pytest.Config) -> dict[str, object]:
    flag, ini = config.getoption("lora_serve"), config.getini("lora_serve")
    given = flag or ini
    if not given:
        return {}
    from pytest_lora.expect import Expect, Serve

    server, colon, limit = given.strip().partition(":")
    fields: dict[str, Any] = {"serve": server}
    try:
        if colon:
            fields["max_lora_rank"] = int(limit)
        Expect(**fields)
    except ValueError as error:
        source = "--lora-serve" if flag else "ini lora_serve"
        raise pytest.UsageError(
            f"{source}: {shown(given)} is no server; write one of {', '.join(get_args(Serve))}, "
            "with its rank limit as in vllm:16"
        ) from error
    return fields
