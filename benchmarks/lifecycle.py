"""Runs of the lifecycle state machine over PEFT's operations: how many, how long, and what they found.

``python benchmarks/lifecycle.py [--runs N] [--steps N] [--json PATH]`` runs blocks of 25 runs, each block with a
seed of its own, and prints a Markdown table. A finding ends its block, is shrunk, and is listed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import bitsandbytes
import peft
import torch
import transformers
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from pytest_lora.lifecycle import LoraLifecycle

BLOCK = 25


class Counted(LoraLifecycle):
    """The same machine, counting."""

    counts: ClassVar[Counter[str]] = Counter()

    def _same(self, *args: Any, **kwargs: Any) -> None:
        super()._same(*args, **kwargs)
        Counted.counts["laws held"] += 1

    def teardown(self) -> None:
        Counted.counts["runs"] += 1


def block(number: int, runs: int, steps: int) -> str | None:
    """One block; what it found, or None."""
    chosen = settings(
        max_examples=runs,
        stateful_step_count=steps,
        deadline=None,
        report_multiple_bugs=False,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(seed(number)(Counted), settings=chosen)
    except AssertionError as error:
        return "\n".join((str(error), *getattr(error, "__notes__", ())))
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    blocks = [block(number, BLOCK, options.steps) for number in range(-(-options.runs // BLOCK))]
    findings = [found for found in blocks if found is not None]
    result = {
        "runs": Counted.counts["runs"],
        "longest": options.steps,
        "states": LoraLifecycle.steps,
        "laws_held": Counted.counts["laws held"],
        "findings": findings,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {m.__name__: m.__version__ for m in (peft, transformers, bitsandbytes, torch)},
        "python": platform.python_version(),
    }
    print("| runs | steps at most | states checked | outputs that were as they should | findings | seconds |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    print(
        f"| {result['runs']:,} | {options.steps} | {result['states']:,} | {result['laws_held']:,} | "
        f"{len(findings)} | {result['seconds']:,} |"
    )
    for finding in findings:
        print(f"\n```\n{finding}\n```")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
