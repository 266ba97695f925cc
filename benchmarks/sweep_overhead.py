"""What a rank sweep costs on top of the training itself: CPU time of the sweep over that of the same loops without it.

Both make the built-in base in 4 bits, put the adapter on it, train with the same loop and evaluate, for the same ranks
and seeds. What the sweep adds: keeping the state of the process, counting operations, estimating memory, the health of
the trained model, and the journal. Medians over rounds, the two taking turns.

    python benchmarks/sweep_overhead.py [--rounds 5] [--steps 40] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from pytest_lora import rank_sweep
from pytest_lora.bases.tiny import load_tiny, sample_texts, text_batch
from pytest_lora.sweep import TrainOn, TrialPlan

RESULTS = Path(__file__).parent / "results" / "sweep_overhead.json"
RANKS, SEEDS = (4, 8, 16), 2


def loss(model: Any) -> float:
    with torch.no_grad():
        return float(model(**text_batch()).loss)


def plain(train: TrainOn) -> None:
    for seed in range(SEEDS):
        for rank in RANKS:
            torch.manual_seed(seed)
            base = load_tiny()
            torch.manual_seed(seed)
            config = LoraConfig(
                r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
            )
            model = get_peft_model(base, config)
            model.train()
            train(model, TrialPlan(rank, 2 * rank, seed, 1.0, 1))
            model.eval()
            loss(model)


def swept(train: TrainOn) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rank_sweep(
            load_tiny,
            train,
            loss,
            ranks=RANKS,
            seeds=SEEDS,
            fraction=1.0,
            metric="loss",
            maximise=False,
            journal=Path(folder, "sweep.jsonl"),
            progress=False,
        )


def cpu_seconds(run: Callable[[TrainOn], None], train: TrainOn) -> float:
    start = time.process_time()
    run(train)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train = TrainOn([text_batch(sample_texts(4, start=4 * i)) for i in range(args.steps)], lr=3e-3)
    plain(train), swept(train)  # what is done once a process
    pairs = [(cpu_seconds(plain, train), cpu_seconds(swept, train)) for _ in range(args.rounds)]
    ratios = [sweep / loop for loop, sweep in pairs]
    overhead = statistics.median(ratios) - 1
    print(f"{100 * overhead:.1f} % of CPU time on top, median of {args.rounds} rounds; all: {ratios}")
    args.out.write_text(
        json.dumps({"steps": args.steps, "overhead": overhead, "ratios": ratios}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
