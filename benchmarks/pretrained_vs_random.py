"""How much a LoRA learns on the pretrained built-in base, and on a random base of the same shape.

``python benchmarks/pretrained_vs_random.py [--json PATH]`` trains LoRAs of several ranks on both bases, on
CPU, in 4 bits, with the same data, seeds, steps and optimizer, and prints a Markdown table of medians over
the seeds. The text is the package's own sample text. Training loss is that of all training text before and
after training; held-out loss is that of records which were never trained on. Losses are in nats per byte.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import bitsandbytes
import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model

from pytest_lora.bases.tiny import load_tiny, random_tiny, sample_texts, text_batch

BASES = ("pretrained", "random")
SEQ_LEN = 72  # the longest record is 65 bytes, and begin and end of sequence go around it


@dataclass(frozen=True)
class Setting:
    """What every run has in common. ``alpha`` is ``alpha_ratio`` times the rank."""

    ranks: tuple[int, ...] = (1, 4, 8, 16)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = 60
    learning_rate: float = 3e-3
    rate_sweep: tuple[float, ...] = (1e-3, 1e-2)
    rate_sweep_rank: int = 8
    batch_size: int = 8
    training_records: int = 64
    held_out_records: int = 64
    alpha_ratio: float = 2.0
    quantization: str = "nf4"


@dataclass(frozen=True)
class Run:
    """Losses of one run in nats per byte."""

    base: str
    rank: int
    seed: int
    learning_rate: float
    train_before: float
    train_after: float
    held_out_before: float
    held_out_after: float


def mean_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Loss in nats per byte, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return float(model(**batch).loss)


def train_once(base: str, rank: int, seed: int, setting: Setting, learning_rate: float) -> Run:
    """Train one LoRA; the random base differs from seed to seed, as the LoRA's own start does."""
    model = load_tiny() if base == "pretrained" else random_tiny(seed)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=int(setting.alpha_ratio * rank), target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    texts = sample_texts(setting.training_records)
    training = text_batch(texts, batch_size=len(texts), seq_len=SEQ_LEN)
    unseen = sample_texts(setting.held_out_records, start=setting.training_records)
    held_out = text_batch(unseen, batch_size=len(unseen), seq_len=SEQ_LEN)
    before = mean_loss(adapted, training), mean_loss(adapted, held_out)

    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    adapted.train()
    order: list[int] = []
    for _ in range(setting.steps):
        if len(order) < setting.batch_size:
            order = torch.randperm(len(texts), generator=generator).tolist()
        rows = torch.tensor([order.pop() for _ in range(setting.batch_size)])
        adapted(**{name: tensor[rows] for name, tensor in training.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = mean_loss(adapted, training), mean_loss(adapted, held_out)
    return Run(base, rank, seed, learning_rate, before[0], after[0], before[1], after[1])


def row(runs: list[Run]) -> dict[str, float | int | str]:
    """Medians over the seeds of one base, rank and learning rate."""
    return {
        "base": runs[0].base,
        "rank": runs[0].rank,
        "learning_rate": runs[0].learning_rate,
        "train_before": median(run.train_before for run in runs),
        "train_after": median(run.train_after for run in runs),
        "train_drop": median(run.train_before - run.train_after for run in runs),
        "held_out_before": median(run.held_out_before for run in runs),
        "held_out_after": median(run.held_out_after for run in runs),
        "held_out_drop": median(run.held_out_before - run.held_out_after for run in runs),
    }


def table(rows: list[dict[str, float | int | str]]) -> str:
    """The rows as a Markdown table."""
    titles = {
        "base": "base",
        "rank": "r",
        "learning_rate": "learning rate",
        "train_before": "start loss",
        "train_after": "end loss",
        "train_drop": "drop",
        "held_out_before": "held-out start",
        "held_out_after": "held-out end",
        "held_out_drop": "held-out drop",
    }
    lines = ["| " + " | ".join(titles.values()) + " |", "| --- |" + " ---: |" * (len(titles) - 1)]
    for entry in rows:
        cells = [
            f"{entry[name]:.3f}" if name.startswith(("train", "held_out")) else str(entry[name])
            for name in titles
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rank_effect(rows: list[dict[str, float | int | str]], base: str) -> dict[str, float]:
    """How much lower the end losses of the largest rank are than those of the smallest."""
    own = sorted((entry for entry in rows if entry["base"] == base), key=lambda entry: entry["rank"])
    return {name: float(own[0][name]) - float(own[-1][name]) for name in ("train_after", "held_out_after")}


def main() -> None:
    default = Setting()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write all runs and medians there")
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(default.seeds))
    options = parser.parse_args()
    setting = Setting(seeds=tuple(options.seeds), steps=options.steps)

    runs: list[Run] = []

    def medians(base: str, rank: int, learning_rate: float) -> dict[str, float | int | str]:
        chosen = [train_once(base, rank, seed, setting, learning_rate) for seed in setting.seeds]
        runs.extend(chosen)
        return row(chosen)

    by_rank = [medians(base, rank, setting.learning_rate) for base in BASES for rank in setting.ranks]
    print(table(by_rank))
    effects = {base: rank_effect(by_rank, base) for base in BASES}
    for base, effect in effects.items():
        print(
            f"\n{base}: r={max(setting.ranks)} ends lower than r={min(setting.ranks)}"
            f" by {effect['train_after']:.3f} (training), {effect['held_out_after']:.3f} (held out)"
        )
    # One rate for both could suit one base better; here each can be taken at its best.
    by_rate = [medians(base, setting.rate_sweep_rank, rate) for base in BASES for rate in setting.rate_sweep]
    print("\n" + table(by_rate))
    if options.json:
        result = {
            "setting": asdict(setting),
            "by_rank": by_rank,
            "rank_effect": effects,
            "by_learning_rate": by_rate,
            "runs": [asdict(run) for run in runs],
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "peft": peft.__version__,
                "bitsandbytes": bitsandbytes.__version__,
            },
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
