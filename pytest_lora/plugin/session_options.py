"""What a user has set for a session; imported where a session has something set, or a test asks."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from pytest_lora.plugin import session_paths


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
                or a value is none of those that a setting takes.
        """
        env = os.environ.get("RUN_SLOW", "").lower() in ("1", "yes", "true", "on", "y")
        return cls(
            model=session_paths.model_folder(config),
            adapters=tuple(session_paths.adapter_folders(config)),
            recipes=tuple(session_paths.recipe_places(config)),
            card=_card(config),
            base=session_paths.base(config),
            bases=dict(session_paths.named_base(config, line) for line in config.getini("lora_bases")),
            fields=_fields(config),
            select=_codes(config, "select"),
            ignore=_codes(config, "ignore"),
            strict=bool(config.getoption("lora_strict") or config.getini("lora_strict")),
            slow=bool(config.getoption("lora_slow") or config.getini("lora_slow") or env),
            device=_device(config.getoption("lora_device")),
            require_gpu=config.getoption("lora_require_gpu"),
            gpu_report=config.getoption("lora_gpu_report"),
            gpus_per_worker=gpus_per_worker(config),
            ranks=_ranks(config),
            baseline=session_paths.baseline_file(config),
            update_baseline=config.getoption("lora_update_baseline"),
            reports=tuple(
                session_paths.report_file(config, given) for given in config.getoption("lora_report")
            ),
            step_summary=Path(summary) if (summary := os.environ.get("GITHUB_STEP_SUMMARY")) else None,
        )


def _fields(config: pytest.Config) -> dict[str, object]:
    if not (config.getini("lora_config") or config.getoption("lora_serve") or config.getini("lora_serve")):
        return {}
    from pytest_lora.plugin.field_options import session_fields

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


_CARD = re.compile(r"(?:(\d{1,6})\s*[xX]\s*)?(\S.*)")


def _card(config: pytest.Config) -> tuple[int, str | None]:
    """How many cards, and the memory of each as it was written."""
    given = config.getoption("lora_card") or config.getini("lora_card")
    if not given:
        return 1, None
    from pytest_lora.facts.byte_sizes import parse_bytes

    match = _CARD.fullmatch(given.strip())
    source = "--lora-card" if config.getoption("lora_card") else "ini lora_card"
    if match is None or not int(match[1] or 1):
        raise pytest.UsageError(f"{source}: {_shown(given)} is no memory of cards; write 24GiB or 8x80GiB")
    try:
        parse_bytes(match[2], "size")
    except (TypeError, ValueError) as error:
        raise pytest.UsageError(f"{source}: {_shown(given)} is no memory of cards: {error}") from error
    return int(match[1] or 1), match[2]


def _device(text: str) -> str:
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


RANKS = (4, 8, 16)

MOST_DIGITS = 6
"""Of a number of GPUs or a rank."""


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
                    f"{source}: {_shown(text)} are no ranks; write different ones, as in 4,8,16"
                )
            return tuple(map(int, parts))
    return RANKS


def asks_for_gpus(early_config: pytest.Config) -> bool:
    """Whether the command line or the ini file shows, before anything is imported, that there are GPU tests.

    Raises:
        pytest.UsageError: There is no such device.
    """
    flags = early_config.known_args_namespace
    device = _device(flags.lora_device)
    asked = flags.lora_require_gpu or flags.lora_gpu_report or early_config.getini("lora_gpus_per_worker")
    return device.startswith("cuda") or bool(device == "auto" and asked)


def _shown(value: object) -> str:
    from pytest_lora.values import shown  # not where a session starts that has nothing to refuse

    return shown(value)
