"""Interrupts at random moments of the checks that run a model: none may leave a trace.

    python benchmarks/interrupts.py [--times 200] [--seed 0] [--json benchmarks/results/interrupts.json]

A timer raises ``KeyboardInterrupt``, as Ctrl-C does, after a time that is drawn evenly from what a check takes and a
tenth more, so that some come while the state is taken and some while it is put back. After each the model, what
trains it and the process are compared with what they were, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from types import FrameType

    from tests.state.observed import Setup

CHECKS = ("check_training", "check_loss_decreases", "check_merge", "check_reload", "check_lora_laws")


class Outcome(NamedTuple):
    """One interrupt.

    Attributes:
        after: Seconds into the check.
        interrupted: Whether it came before the check was over.
        left: What differs afterwards, by entry of the keeper's list.
    """

    after: float
    interrupted: bool
    left: tuple[str, ...]


def check(name: str, setup: Setup) -> Callable[[], object]:
    """A call of a check on a model amid its training."""
    from pytest_lora import (
        check_lora_laws,
        check_loss_decreases,
        check_merge,
        check_reload,
        check_training,
    )

    model, batch = setup.model, setup.batches.batch
    calls: dict[str, Callable[[], object]] = {
        "check_training": lambda: check_training(model, setup.batches, **setup.trainers),
        "check_loss_decreases": lambda: check_loss_decreases(
            model, batch, steps=2, optimizer=setup.optimizer, device="cpu"
        ),
        "check_merge": lambda: check_merge(model, batch),
        "check_reload": lambda: check_reload(model, batch),
        "check_lora_laws": lambda: check_lora_laws(model, batch),
    }
    return calls[name]


def interrupt(call: Callable[[], object], after: float) -> bool:
    """Run a call and interrupt it; gives whether the interrupt came before the end."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, after)
        call()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    return False


def outcomes(call: Callable[[], object], setup: Setup, times: int, seed: int) -> list[Outcome]:
    """Interrupt a check again and again, and compare."""
    from tests.state.observed import changed, observed

    draw = random.Random(seed)
    call()
    start = time.perf_counter()
    call()
    lasts = time.perf_counter() - start
    found = []
    for _ in range(times):
        before = observed(setup)
        after = draw.uniform(1e-4, 1.1 * lasts)
        interrupted = interrupt(call, after)
        found.append(Outcome(after, interrupted, tuple(changed(before, observed(setup)))))
    return found


def measured(times: int, seed: int) -> dict[str, Any]:
    """Counts by check."""
    from tests.state.observed import amid_training

    torch.manual_seed(0)
    torch.set_num_threads(1)
    setup = amid_training()
    rows = {}
    for name in CHECKS:
        found = outcomes(check(name, setup), setup, times if name == CHECKS[0] else times // 4, seed)
        left = Counter(entry for outcome in found for entry in outcome.left)
        rows[name] = {
            "interrupts": len(found),
            "before the end": sum(outcome.interrupted for outcome in found),
            "with a trace": sum(bool(outcome.left) for outcome in found),
            "entries": dict(left),
        }
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--times", type=int, default=200, help="interrupts of check_training; others get a quarter"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = measured(options.times, options.seed)
    print("| check | interrupts | before its end | with a trace |\n| --- | ---: | ---: | ---: |")
    for name, row in rows.items():
        print(f"| `{name}` | {row['interrupts']} | {row['before the end']} | {row['with a trace']} |")
    if options.json:
        known = {"python": platform.python_version(), "torch": version("torch"), "peft": version("peft")}
        options.json.write_text(json.dumps({"seed": options.seed, **known, "checks": rows}, indent=2) + "\n")
    return int(any(row["with a trace"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
