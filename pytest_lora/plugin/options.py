"""What a user can set: flags and ini values from one table, and the markers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

MARKERS = (
    "lora(**fields): set fields of peft.LoraConfig (r=16, target_modules='all-linear') or of "
    "pytest_lora.Expect (alpha_ratio=2.0) for the LoRA fixtures of a test, a class or a module; the mark closest "
    "to the test wins, field by field. select=[...], ignore=[...] and strict=True hold for every check of the test.",
    "lora_gpu(min_vram_gb=None, count=1, capability=None): a test that needs GPUs, skipped where they are missing: "
    "GB (10**9 bytes) of memory on each, how many, and the CUDA compute capability, as in (8, 0).",
    "lora_vram_limit(size): a GPU test that fails if more than this, as in '8GiB', is allocated at a time on a GPU.",
    "lora_slow: a slow LoRA test, skipped unless --lora-slow or RUN_SLOW=1 is given.",
)

GPU_NAMES = ("lora_gpu", "lora_vram_limit")
"""Markers of tests that only run on a GPU."""
GPU_PROPERTY = "lora_gpu"
"""The user property in which a GPU test's measurements travel, as JSON."""


def recorded(test: Any, name: str) -> Iterator[str]:
    """The texts that the properties of a test, or of its report, hold under a name.

    Tests and other plugins put there what they like, also under names of ours and in other forms than pytest's pairs.
    """
    return (entry[1] for entry in getattr(test, "user_properties", ()) if is_recorded(entry, name))


def is_recorded(entry: Any, name: str) -> bool:
    """Whether an entry of a test's properties is a text under this name."""
    return type(entry) in (tuple, list) and [*map(type, entry)] == [str, str] and entry[0] == name


def is_gpu_test(item: pytest.Item) -> bool:
    """Whether a test only runs on a GPU."""
    return any(mark.name in GPU_NAMES for mark in item.iter_markers())


def has_own(item: pytest.Item, fixture: str) -> bool:
    """Whether a test uses a fixture as this plugin defines it, not as somebody overrides it."""
    known = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
    return fixture in known and known[fixture][-1].func.__module__ == "pytest_lora.plugin.fixtures"


def may_use_gpu(item: pytest.Item) -> bool:
    """Whether a test runs on a GPU where there is one: it asks for that, or its fixtures are there."""
    return is_gpu_test(item) or has_own(item, "lora_device")


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""Files by which a saved adapter is known, and by which it can be named on the command line."""


class _Option:
    """One setting: ``--lora-NAME`` with argparse keywords ``flag``, and ini ``lora_NAME`` of type ``ini``.

    A plain class, because making a named tuple or a second dataclass would cost every pytest session more.
    """

    def __init__(self, name: str, text: str, flag: dict[str, Any] | None = None, ini: Any = None) -> None:
        self.name, self.text, self.flag, self.ini = name, text, flag, ini


TABLE = (
    _Option(
        "model",
        "folder of a local transformers model, quantized to 4 bits (nf4), to use as lora_base_model instead of "
        "the built-in one; nothing is ever downloaded",
        {"metavar": "PATH"},
        "string",
    ),
    _Option(
        "adapters",
        "folder of saved adapters, each of which becomes test items, one a group of rules; may be given more than "
        "once, and nothing in the folder is executed. From ini it counts where no path is given to pytest",
        {"metavar": "DIR", "action": "append", "default": []},
        "linelist",
    ),
    _Option(
        "recipes",
        "folder of recipes (Axolotl, LLaMA-Factory, TRL, ms-swift, or your own YAML), each of which becomes a test "
        "item, or the path of one; may be given more than once. From ini it counts where no path is given to pytest",
        {"metavar": "PATH", "action": "append", "default": []},
        "linelist",
    ),
    _Option(
        "card",
        "memory of the GPU that recipes are for, as in 24GiB, or of several, as in 8x80GiB",
        {"metavar": "SIZE"},
        "string",
    ),
    _Option(
        "show-recipe",
        "instead of running tests, print what a run of this recipe does, and where each value is from",
        {"metavar": "FILE"},
    ),
    _Option(
        "base",
        "base that saved adapters and recipes are compared with: a model folder, a config.json or the name of a "
        "public model; no weights are read",
        {"metavar": "BASE"},
        "string",
    ),
    _Option(
        "serve",
        "server that adapters and configurations are for, with its rank limit if it has one, as in vllm:16: vllm, "
        "sglang, lorax, tgi, llama.cpp, mlx or transformers; what it refuses or drops is found",
        {"metavar": "SERVER"},
        "string",
    ),
    _Option(
        "bases",
        "names of bases, one a line: NAME = PATH of a model folder or config.json, which is then a base by that name",
        ini="linelist",
    ),
    _Option(
        "config",
        "defaults for every test, one a line: FIELD = PYTHON LITERAL, fields as for @pytest.mark.lora",
        ini="linelist",
    ),
    _Option(
        "select",
        "codes, or starts of codes, that count in every check of the session, as in LORA1,LORA203; all by default",
        {"metavar": "CODES"},
        "args",
    ),
    _Option(
        "ignore",
        "codes, or starts of codes, that are left out of every check of the session, as in LORA109",
        {"metavar": "CODES"},
        "args",
    ),
    _Option("strict", "warnings fail as errors do", {"action": "store_true"}, "bool"),
    _Option(
        "slow", "run the tests marked lora_slow; RUN_SLOW=1 does it too", {"action": "store_true"}, "bool"
    ),
    _Option(
        "device",
        "device of the LoRA fixtures and of GPU tests: auto, cpu, cuda, cuda:N, xpu or mps; auto takes CUDA if there "
        "is any, and for GPU tests else XPU or MPS",
        {"metavar": "DEVICE", "default": "auto"},
    ),
    _Option(
        "require-gpu",
        "fail GPU tests that would be skipped for want of a GPU, and fail the session if no GPU test ran",
        {"action": "store_true"},
    ),
    _Option(
        "gpu-report",
        "list memory and seconds of the GPU tests, and what was skipped; also to $GITHUB_STEP_SUMMARY",
        {"action": "store_true"},
    ),
    _Option(
        "gpus_per_worker",
        "GPUs that each pytest-xdist worker sees; without it as many as the most demanding test counts",
        ini="string",
    ),
    _Option(
        "ranks",
        "ranks of the fixture lora_rank_sweep, as in 4,8,16, which is the default",
        {"metavar": "RANKS"},
        "string",
    ),
    _Option(
        "report",
        "write a report of the session: .html (one file, to open anywhere), .md or .json to look at, .sarif for code "
        "scanning, gl-code-quality*.json for GitLab; may be given more than once",
        {"metavar": "PATH", "action": "append", "default": []},
    ),
    _Option(
        "baseline",
        "compare what the tests measure (trainable parameters, scaling, peaks, drop of the loss, codes that fire) with "
        "this JSON file, and fail the session where something regressed",
        {"metavar": "FILE"},
    ),
    _Option(
        "update-baseline",
        "write what was measured to the file of --lora-baseline instead; tests that did not run keep their lines",
        {"action": "store_true"},
    ),
    _Option(
        "demo",
        "instead of running tests, show the report on a healthy adapter and on five broken ones, and write it "
        "(--lora-report, else in a temporary folder); exit status 0 if all went as it should",
        {"action": "store_true"},
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
                f"--lora-{option.name}",
                dest=f"lora_{option.name}".replace("-", "_"),
                help=option.text,
                **option.flag,
            )
        if option.ini is not None:
            parser.addini(f"lora_{option.name}", option.text, type=option.ini)


def any_set(config: pytest.Config) -> bool:
    """Whether a flag or ini value of the table is set, so that there is something to read."""
    for option in TABLE:
        flag, default = option.flag, None
        if flag is not None:
            default = flag.get("default", False if flag.get("action") == "store_true" else None)
            if config.getoption(f"lora_{option.name}".replace("-", "_")) != default:
                return True
        if option.ini is not None and config.getini(f"lora_{option.name}"):
            return True
    return False
