"""Does a rank sweep find a rank that is known by construction, also where it has to find the learning rate?

For each rank k a task on the built-in base whose target is a change of the output head of exact rank k
(``pytest_lora/bases/tiny/known_rank.py``); ``rank_sweep`` tries ranks 1 to 32, and ``choose()`` with its defaults is to
name k. Each seed draws the teacher, the adapters' weights and the order of the data anew.

With ``--rates`` the sweep is over ranks and four learning rates, the largest 30 times the smallest, with successive
halving. It prints the share of the full grid's training steps that were taken, which are counted by the losses of every
trial, and what a sweep at one rate chooses, for each of the four rates.

    python benchmarks/known_rank.py [--rates] [--seeds 10] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from pytest_lora import SweepResult, rank_sweep
from pytest_lora.bases.tiny.known_rank import KnownRankTask
from pytest_lora.facts.sweep import rate_text

KNOWN = (2, 4, 8, 16)
RANKS = (1, 2, 4, 8, 16, 32)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
FACTOR = 4
RESULTS = Path(__file__).parent / "results"


def sweep(k: int, seed: int, **settings: Any) -> tuple[SweepResult, dict[str, Any]]:
    task = KnownRankTask(k, seed)
    result = rank_sweep(
        task.make_model,
        task.train,
        task.evaluate,
        ranks=RANKS,
        fraction=1.0,
        seeds=[seed],
        config=task.config,
        metric="explained",
        progress=False,
        **settings,
    )
    return result, {
        "k": k,
        "seed": seed,
        "chosen": result.choose().rank,
        "explained": {
            row.rank: round(row.metric, 4) if row.metric is not None else None for row in result.rows
        },
        "seconds": [round(row.seconds or 0.0, 3) for row in result.rows],
    }


def over_ranks(k: int, seed: int) -> dict[str, Any]:
    return sweep(k, seed)[1]


def over_rates(k: int, seed: int) -> dict[str, Any]:
    result, run = sweep(k, seed, learning_rates=RATES, halving=FACTOR)
    full = [len(row.losses) for row in result.trials if row.budget == 1]
    grid = len(RANKS) * len(RATES) * max(full)
    run["steps"] = sum(len(row.losses) for row in result.trials)
    run["steps of the grid"] = grid
    run["rates"] = {row.rank: rate_text(row.learning_rate or 0.0) for row in result.rows}
    print(k, seed, run["chosen"], run["steps"] / grid, run["rates"], flush=True)
    return run


def whole_grid(k: int, seed: int) -> dict[str, Any]:
    """What the full grid chooses, and what each of its columns, a sweep at one rate, would have chosen."""
    result, run = sweep(k, seed, learning_rates=RATES)
    for rate in RATES:
        column = tuple(row for row in result.trials if row.learning_rate == rate)
        alone = SweepResult(result.metric, result.maximise, result.before, column, {}, {})
        run[f"chosen at {rate_text(rate)}"] = alone.choose().rank
    print("whole grid", k, seed, {name: said for name, said in run.items() if "chosen" in name}, flush=True)
    return run


def table(runs: list[dict[str, Any]]) -> str:
    head = f"{'k':>3} {'found':>7}  " + " ".join(f"{f'r={r}':>7}" for r in RANKS)
    lines = [head]
    for k in KNOWN:
        own = [run for run in runs if run["k"] == k]
        found = sum(run["chosen"] == k for run in own)
        means = [statistics.fmean(run["explained"][r] for run in own) for r in RANKS]
        lines.append(f"{k:>3} {f'{found}/{len(own)}':>7}  " + " ".join(f"{100 * m:>5.1f} %" for m in means))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", action="store_true")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--grids", type=int, default=2, help="seeds for which the whole grid is trained too")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = [(k, seed) for k in KNOWN for seed in range(args.seeds)]
    runs = [(over_rates if args.rates else over_ranks)(k, seed) for k, seed in cases]
    print(table(runs))
    found: dict[str, Any] = {"ranks": RANKS, "runs": runs}
    if args.rates:
        taken = sum(run["steps"] for run in runs) / sum(run["steps of the grid"] for run in runs)
        print(f"{100 * taken:.1f} % of the full grid's steps")
        grids = [whole_grid(k, seed) for k, seed in cases if seed < args.grids]
        found |= {"rates": RATES, "halving": FACTOR, "share of the grid's steps": taken, "whole grids": grids}
    out = args.out or RESULTS / ("known_rank_and_rate.json" if args.rates else "known_rank.json")
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
