"""Interrupts at random moments of every check that runs a model, builds one or looks at one: none may leave a trace.

    python benchmarks/interrupts.py [--times 200] [--seed 0] [--only NAME ...] [--json FILE]

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


def checks(setup: Setup) -> dict[str, Callable[[], object]]:
    """Calls on a model amid its training, by name."""
    import pytest_lora as ours
    from pytest_lora.bases import examples
    from pytest_lora.inspection.behaviour.batch_law import BatchLaw
    from pytest_lora.inspection.behaviour.merge import combination_error
    from pytest_lora.inspection.training.batches import Plan
    from pytest_lora.inspection.training.probe import prepared

    model, batch, base = setup.model, setup.batches.batch, setup.model.get_base_model()
    adapter, config = examples.adapter(), model.peft_config["default"]
    cut = {name: values.clone() for name, values in batch.items()}
    cut["attention_mask"] = torch.ones_like(cut["input_ids"])
    cut["attention_mask"][:, -3:] = 0

    def alone() -> object:
        with prepared(model, cut, Plan(steps=1, rate=1e-3)):
            return BatchLaw(model, base, {0: cut}).compared()

    return {
        "check_training": lambda: ours.check_training(model, setup.batches, **setup.trainers),
        "check_loss_decreases": lambda: ours.check_loss_decreases(
            model, batch, steps=2, optimizer=setup.optimizer, device="cpu"
        ),
        "check_model": lambda: ours.check_model(model, batches=batch, steps=1),
        "check_adapter_shapes": lambda: ours.check_adapter_shapes(model, batches=batch),
        "check_merge": lambda: ours.check_merge(model, batch),
        "check_reload": lambda: ours.check_reload(model, batch),
        "check_lora_laws": lambda: ours.check_lora_laws(model, batch),
        "batch law": alone,
        "combination": lambda: combination_error(model, "default", {"default": 1.0}, "svd"),
        "lifecycle": _lifecycle,
        "check_resume": lambda: ours.check_resume(adapter, config, base=examples.llama_7b),
        "check_checkpoint": lambda: ours.check_checkpoint(adapter, examples.llama_7b),
        "trial of a sweep": lambda: _trial(batch),
    }


def _lifecycle() -> None:
    """Steps of the state machine that draw random numbers and hold its invariants, on a model of its own."""
    from pytest_lora.strategies.lifecycle import LoraLifecycle

    machine = LoraLifecycle()
    machine.begin(seed=0, rank=2, variant="plain")
    machine.add(seed=1, rank=2, variant="rslora")
    machine.train()
    machine.merge()
    machine.laws_hold()


def _trial(batch: dict[str, torch.Tensor]) -> object:
    """One trial of a sweep, on a model of its own."""
    from pytest_lora.bases.examples.models import made
    from pytest_lora.sweep import TrainOn, TrialPlan
    from pytest_lora.sweep.trial import Job, run_trial

    plan = TrialPlan(rank=2, alpha=4, seed=0, fraction=1.0, epochs=1)

    def make() -> Any:
        return made("base")

    return run_trial(Job(make, TrainOn([batch] * 2, lr=1e-3), lambda _: 0.5, None, plan, "metric"))


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


def measured(times: int, seed: int, only: list[str]) -> dict[str, Any]:
    """Counts by check."""
    from tests.state.observed import amid_training

    torch.manual_seed(0)
    torch.set_num_threads(1)
    setup = amid_training()
    rows = {}
    for name, call in checks(setup).items():
        if not only or name in only:
            rows[name] = _row(outcomes(call, setup, times, seed))
            print(f"{name}: {rows[name]}", file=sys.stderr, flush=True)
    return rows


def _row(found: list[Outcome]) -> dict[str, Any]:
    return {
        "interrupts": len(found),
        "before the end": sum(outcome.interrupted for outcome in found),
        "with a trace": sum(bool(outcome.left) for outcome in found),
        "entries": dict(Counter(entry for outcome in found for entry in outcome.left)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=200, help="interrupts of each check")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="names of checks; all when empty")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = measured(options.times, options.seed, options.only)
    print("| check | interrupts | before its end | with a trace |\n| --- | ---: | ---: | ---: |")
    for name, row in rows.items():
        print(f"| `{name}` | {row['interrupts']} | {row['before the end']} | {row['with a trace']} |")
    if options.json:
        known = {"python": platform.python_version(), "torch": version("torch"), "peft": version("peft")}
        options.json.write_text(json.dumps({"seed": options.seed, **known, "checks": rows}, indent=2) + "\n")
    return int(any(row["with a trace"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
