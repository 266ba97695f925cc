"""What a user can set: flags and ini values from one table, and the markers."""

from __future__ import annotations

import ast
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

MARKERS = (
    "lora(**fields): set fields of peft.LoraConfig (r=16, target_modules='all-linear') or of "
    "pytest_lora.Expect (alpha_ratio=2.0) for the LoRA fixtures of a test, a class or a module; the mark closest "
    "to the test wins, field by field.",
    "lora_slow: a slow LoRA test, skipped unless --lora-slow or RUN_SLOW=1 is given.",
)


class _Option(NamedTuple):
    """One setting: the flag ``--lora-NAME`` takes ``flag`` keywords, the ini ``lora_NAME`` has type ``ini``."""

    name: str
    help: str
    flag: dict[str, Any] | None = None
    ini: Any = None


TABLE = (
    _Option(
        "model",
        "folder of a local transformers model, quantized to 4 bits (nf4), to use as lora_base_model instead of "
        "the built-in one; nothing is ever downloaded",
        {"metavar": "PATH"},
        "string",
    ),
    _Option(
        "config",
        "defaults for every test, one a line: FIELD = PYTHON LITERAL, fields as for @pytest.mark.lora",
        ini="linelist",
    ),
    _Option(
        "slow", "run the tests marked lora_slow; RUN_SLOW=1 does it too", {"action": "store_true"}, "bool"
    ),
    _Option("rules", "list the rules: code, severity, name, summary", {"action": "store_true"}),
    _Option("explain", "print the documentation of a rule, such as LORA203", {"metavar": "CODE"}),
)


def add_options(parser: pytest.Parser) -> None:
    """Declare the flags and ini values of the table."""
    group = parser.getgroup("lora", "LoRA and QLoRA (pytest-lora)")
    for option in TABLE:
        if option.flag is not None:
            group.addoption(
                f"--lora-{option.name}", dest=f"lora_{option.name}", help=option.help, **option.flag
            )
        if option.ini is not None:
            parser.addini(f"lora_{option.name}", option.help, type=option.ini)


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """The settings of a session.

    Attributes:
        model: Folder of the base model, absolute; ``None`` for the built-in one.
        fields: Defaults of ``LoraConfig`` and ``Expect`` fields for every test.
        slow: Whether tests marked ``lora_slow`` run.
    """

    model: Path | None
    fields: dict[str, object]
    slow: bool

    @classmethod
    def from_config(cls, config: pytest.Config) -> LoraOptions:
        """Read flags, ini and environment.

        Raises:
            pytest.UsageError: The model folder is none, or an ini line is not ``field = literal``.
        """
        env = os.environ.get("RUN_SLOW", "").lower() in ("1", "yes", "true", "on", "y")
        return cls(
            model=_model_folder(config),
            fields=dict(_field(line) for line in config.getini("lora_config")),
            slow=bool(config.getoption("lora_slow") or config.getini("lora_slow") or env),
        )


OPTIONS = pytest.StashKey[LoraOptions]()


def _model_folder(config: pytest.Config) -> Path | None:
    if flag := config.getoption("lora_model"):
        source, folder = "--lora-model", config.invocation_params.dir / Path(flag).expanduser()
    elif ini := config.getini("lora_model"):
        origin = config.inipath.parent if config.inipath else config.rootpath
        source, folder = "ini lora_model", origin / Path(ini).expanduser()
    else:
        return None
    if not folder.is_dir():
        raise pytest.UsageError(f"{source}: there is no folder {str(folder)!r}; models are never downloaded")
    if not (folder / "config.json").is_file():
        raise pytest.UsageError(
            f"{source}: {str(folder)!r} holds no config.json, so it is no transformers model"
        )
    return folder


def _field(line: str) -> tuple[str, object]:
    name, equals, literal = (part.strip() for part in line.partition("="))
    try:
        if not equals or not name.isidentifier():
            raise ValueError
        return name, ast.literal_eval(literal)
    except (ValueError, SyntaxError) as error:
        raise pytest.UsageError(
            f"ini lora_config: {line!r} is not FIELD = PYTHON LITERAL, as in r = 16 or target_modules = ['q_proj']"
        ) from error
