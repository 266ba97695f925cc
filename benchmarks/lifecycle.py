"""Runs of the lifecycle state machine over PEFT's operations: how many, how long, and what they found.

``python benchmarks/lifecycle.py [--runs N] [--steps N] [--base small|built-in] [--json PATH]`` runs blocks of 25 runs,
each block with a seed of its own, and prints a Markdown table. A finding ends its block, is shrunk, and is listed. With
``--json`` every block is written as soon as it is done, and a file that is there already is continued.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import bitsandbytes
import peft
import torch
import transformers
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from pytest_lora.strategies import lifecycle
from pytest_lora.strategies.lifecycle import LoraLifecycle
from tests.strategies.test_lifecycle import SmallLifecycle

BLOCK = 25
COUNTED = {
    "combinations": "combination_error",
    "bases packed": "pack_linear_layers",
    "models under the laws": "check_lora_laws",
}
"""Operations that are rare or dear, by the function that the machine calls once for each."""


class Counted(LoraLifecycle):
    """The same machine, counting, on the built-in base."""

    counts: ClassVar[Counter[str]] = Counter()

    def _same(self, *args: Any, **kwargs: Any) -> None:
        super()._same(*args, **kwargs)
        Counted.counts["outputs as they should be"] += 1

    def teardown(self) -> None:
        Counted.counts["runs"] += 1


def counting(operation: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        Counted.counts[operation] += 1
        return function(*args, **kwargs)

    return counted


class Small(SmallLifecycle, Counted):
    """On the network of four layers that the tests use, which is fast."""


BASES = {"small": Small, "built-in": Counted}


def block(machine: type[Counted], number: int, steps: int) -> dict[str, Any]:
    """One block: what was counted, and what it found."""
    chosen = settings(
        max_examples=BLOCK,
        stateful_step_count=steps,
        deadline=None,
        report_multiple_bugs=False,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    Counted.counts.clear()
    states, started, finding = LoraLifecycle.steps, time.perf_counter(), None
    try:
        run_state_machine_as_test(seed(number)(machine), settings=chosen)
    except Exception as error:
        finding = "\n".join((repr(error), *getattr(error, "__notes__", ())))
    return {
        "block": number,
        **Counted.counts,
        "states checked": LoraLifecycle.steps - states,
        "seconds": round(time.perf_counter() - started, 1),
        "finding": finding,
    }


def known(path: Path | None, setup: dict[str, Any]) -> list[dict[str, Any]]:
    """Blocks of an earlier call with the same set-up."""
    if path is None or not path.exists():
        return []
    written = json.loads(path.read_text())
    if {name: written.get(name) for name in setup} != setup:
        raise SystemExit(f"{path} is of another set-up; remove it or name another file")
    blocks: list[dict[str, Any]] = written["blocks"]
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--base", choices=BASES, default="small")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for operation, function in COUNTED.items():
        setattr(lifecycle, function, counting(operation, getattr(lifecycle, function)))
    setup = {
        "base": options.base,
        "longest": options.steps,
        "versions": {m.__name__: m.__version__ for m in (peft, transformers, bitsandbytes, torch)},
        "python": platform.python_version(),
    }
    blocks = known(options.json, setup)
    while sum(done.get("runs", 0) for done in blocks) < options.runs:
        blocks.append(block(BASES[options.base], len(blocks), options.steps))
        if options.json:
            options.json.write_text(json.dumps({**setup, "blocks": blocks}, indent=1) + "\n")
    show(blocks, options.steps)


def show(blocks: list[dict[str, Any]], steps: int) -> None:
    def total(name: str) -> Any:
        return sum(done.get(name, 0) for done in blocks)

    findings = [done["finding"] for done in blocks if done["finding"]]
    columns = ("states checked", "outputs as they should be", *COUNTED)
    numbers = " | ".join(f"{total(name):,}" for name in columns)
    print(f"| runs | steps at most | {' | '.join(columns)} | findings | seconds |")
    print("| ---: | ---: |" + " ---: |" * len(columns) + " ---: | ---: |")
    print(f"| {total('runs'):,} | {steps} | {numbers} | {len(findings)} | {total('seconds'):,.0f} |")
    for finding in findings:
        print(f"\n```\n{finding}\n```")


if __name__ == "__main__":
    main()
