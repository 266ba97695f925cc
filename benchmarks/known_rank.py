"""Does a rank sweep find a rank that is known by construction?

For each rank k a task on the built-in base whose target is a change of the output head of exact rank k
(``pytest_lora/bases/tiny/known_rank.py``); ``rank_sweep`` tries ranks 1 to 32, and ``choose()`` with its defaults is to
name k. Each seed draws the teacher, the adapters' weights and the order of the data anew.

    python benchmarks/known_rank.py [--seeds 10] [--out benchmarks/results/known_rank.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from pytest_lora import rank_sweep
from pytest_lora.bases.tiny.known_rank import KnownRankTask

KNOWN = (2, 4, 8, 16)
RANKS = (1, 2, 4, 8, 16, 32)
RESULTS = Path(__file__).parent / "results" / "known_rank.json"


def sweep(k: int, seed: int) -> dict[str, object]:
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
    )
    choice = result.choose()
    return {
        "k": k,
        "seed": seed,
        "chosen": choice.rank,
        "explained": {
            row.rank: round(row.metric, 4) if row.metric is not None else None for row in result.rows
        },
        "seconds": [round(row.seconds or 0.0, 3) for row in result.rows],
    }


def table(runs: list[dict[str, object]]) -> str:
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
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = [sweep(k, seed) for k in KNOWN for seed in range(args.seeds)]
    print(table(runs))
    args.out.write_text(json.dumps({"ranks": RANKS, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
