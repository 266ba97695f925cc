"""Loss curves of real LoRA runs on the built-in 4-bit base, for ``history_diagnosis.py``.

``python benchmarks/history_runs.py [--json PATH] [--seeds 11 12]`` trains, on CPU, healthy LoRAs at several
batch sizes and learning rates, some whose learning rate is far too high, some at learning rate 0, and some on
so few records that they overfit, and writes every loss. About twenty minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from pytest_lora.bases.tiny import load_tiny, sample_texts, text_batch

RESULTS = Path(__file__).parent / "results" / "history_runs.json"
SEQ_LEN = 72  # the longest record is 65 bytes, and begin and end of sequence go around it
HELD_OUT = 5000


@dataclass(frozen=True)
class Setting:
    """One run; ``kind`` says what a diagnosis should say of it."""

    kind: str
    learning_rate: float
    batch_size: int
    seed: int
    steps: int = 120
    records: int = 256
    rank: int = 8
    cosine: bool = False
    evaluate_every: int = 0


def settings(seeds: list[int]) -> list[Setting]:
    """All runs."""
    chosen = [
        Setting("healthy", lr, size, seed)
        for lr, size, seed in product((5e-4, 2e-3, 5e-3), (1, 2, 4, 8), seeds)
    ]
    chosen += [Setting("healthy", 2e-3, size, s, cosine=True) for size, s in product((2, 4), seeds)]
    chosen += [Setting("healthy", 1e-3, 4, s, records=512, evaluate_every=15) for s in seeds]
    chosen += [Setting("flat", 0.0, size, s) for size, s in product((1, 2, 4, 8), seeds)]
    chosen += [Setting("too_high", lr, size, s) for lr, size, s in product((2e-2, 5e-2, 2e-1), (2, 4), seeds)]
    chosen += [
        Setting("overfitting", 3e-3, 4, s, steps=160, records=n, rank=16, evaluate_every=10)
        for n, s in product((8, 16), seeds)
    ]
    return chosen


def train(setting: Setting) -> dict[str, object]:
    """Train once and return the losses."""
    torch.manual_seed(setting.seed)
    config = LoraConfig(
        r=setting.rank, lora_alpha=2 * setting.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(load_tiny(), config)
    texts = sample_texts(setting.records)
    data = text_batch(texts, batch_size=len(texts), seq_len=SEQ_LEN)
    held_out = text_batch(sample_texts(64, start=HELD_OUT), batch_size=64, seq_len=SEQ_LEN)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=setting.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(setting.seed)
    losses: list[float] = []
    evals: dict[int, float] = {}
    order: list[int] = []
    for step in range(1, setting.steps + 1):
        if setting.cosine:
            factor = 0.5 * (1 + math.cos(math.pi * step / setting.steps)) * min(1, step / 12)
            optimizer.param_groups[0]["lr"] = setting.learning_rate * factor
        if len(order) < setting.batch_size:
            order = torch.randperm(len(texts), generator=generator).tolist()
        rows = torch.tensor([order.pop() for _ in range(setting.batch_size)])
        model.train()
        loss = model(**{name: tensor[rows] for name, tensor in data.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 5))
        if setting.evaluate_every and step % setting.evaluate_every == 0:
            model.eval()
            with torch.no_grad():
                evals[step] = round(model(**held_out).loss.item(), 5)
    return {**asdict(setting), "losses": losses, "evals": evals}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="PATH")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12])
    options = parser.parse_args()
    runs = []
    for setting in settings(options.seeds):
        runs.append(train(setting))
        print(f"{setting.kind} lr={setting.learning_rate:g} batch={setting.batch_size} seed={setting.seed}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text("[\n" + ",\n".join(json.dumps(run) for run in runs) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
