"""How often ``assert_loss_decreases`` is wrong: healthy set-ups that fail, broken ones that pass.

``python benchmarks/loss_decreases.py [--seeds N] [--json PATH]`` draws, for each seed and each of five models, a LoRA
configuration (rank, alpha, targets, dropout, rsLoRA, DoRA) and a batch, and runs the assertion with its defaults on
that set-up as it is and on seven broken forms of it. It prints a Markdown table; both kinds of error must be 0.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import platform
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import bitsandbytes
import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from pytest_lora import LoraHealthError, assert_loss_decreases
from pytest_lora.bases.tiny import load_tiny, sample_texts, text_batch

VOCABULARY = 128
WORKERS = 2
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Result:
    """One run: whether the assertion passed, and by how much the loss fell."""

    model: str
    form: str
    seed: int
    passed: bool
    drop: float
    seconds: float

    @property
    def wrong(self) -> bool:
        """Whether the assertion failed on a healthy set-up or passed on a broken one."""
        return self.passed != (self.form == "healthy")


@dataclass(frozen=True)
class Family:
    """A kind of model: how to build one and a batch for it, and which modules are adapted."""

    build: Callable[[], Any]
    batch: Callable[[random.Random], Batch]
    targets: tuple[tuple[str, ...] | str, ...]
    task: str


def _language(draw: random.Random) -> Batch:
    ids = torch.randint(3, VOCABULARY, (draw.choice((2, 4)), draw.choice((8, 16))))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def _translation(draw: random.Random) -> Batch:
    batch = _language(draw)
    return {**batch, "labels": torch.randint(3, VOCABULARY, tuple(batch["input_ids"].shape))}


def _classification(draw: random.Random) -> Batch:
    ids = torch.randint(3, VOCABULARY, (8, draw.choice((8, 12))))
    labels = torch.randint(0, 3, (8,))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _text(draw: random.Random) -> Batch:
    return text_batch(sample_texts(2, start=draw.randrange(1000)), batch_size=2, seq_len=32)


@cache
def _built_in() -> Any:
    return load_tiny()


def _llama() -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(config)


def _gpt2() -> Any:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config)


def _t5() -> Any:
    config = T5Config(vocab_size=VOCABULARY, d_model=64, d_ff=128, d_kv=16, num_layers=1, num_heads=4)
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


def _bert() -> Any:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
    )
    config.num_labels = 3
    return BertForSequenceClassification(config)


FAMILIES = {
    "tiny Llama": Family(_llama, _language, (("q_proj", "v_proj"), "all-linear"), "CAUSAL_LM"),
    "tiny GPT-2": Family(_gpt2, _language, (("c_attn",), ("c_attn", "c_proj", "c_fc")), "CAUSAL_LM"),
    "tiny T5": Family(_t5, _translation, (("q", "v"), "all-linear"), "SEQ_2_SEQ_LM"),
    "tiny BERT classifier": Family(_bert, _classification, (("query", "value"),), "SEQ_CLS"),
    "built-in 4-bit base": Family(_built_in, _text, (("q_proj", "v_proj"), "all-linear"), "CAUSAL_LM"),
}


def _config(family: Family, draw: random.Random, alpha: float | None) -> LoraConfig:
    rank = draw.choice((1, 2, 4, 8, 16, 32))
    chosen = draw.choice((rank, 2 * rank, 16))
    targets = draw.choice(family.targets)
    return LoraConfig(
        r=rank,
        lora_alpha=chosen if alpha is None else alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        lora_dropout=draw.choice((0.0, 0.05, 0.1)),
        use_rslora=draw.random() < 0.2,
        use_dora=draw.random() < 0.1,
        task_type=family.task,
    )


def _loss(model: Any, batch: Batch) -> torch.Tensor:
    loss: torch.Tensor = model(**batch).loss
    return loss


def _detached(kind: int) -> Callable[[Any, Batch], torch.Tensor]:
    def detached(model: Any, batch: Batch) -> torch.Tensor:
        if kind == 0:
            return _loss(model, batch).detach()
        if kind == 1:
            with torch.no_grad():
                return _loss(model, batch)
        return torch.tensor(float(_loss(model, batch)), requires_grad=True)

    return detached


def _freeze(model: Any, word: str) -> None:
    for name, parameter in model.named_parameters():
        if word in name:
            parameter.requires_grad_(False)


def _trainable(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


FORMS = (
    "healthy",
    "frozen adapter",
    "stale optimizer",
    "lr 0",
    "labels all -100",
    "detached graph",
    "B frozen",
    "alpha 0",
)


def _run(name: str, form: str, seed: int) -> Result:
    family = FAMILIES[name]
    draw = random.Random(f"{name} {seed}")
    torch.manual_seed(seed)
    config = _config(family, draw, 0 if form == "alpha 0" else None)
    model = get_peft_model(family.build(), config).train()
    batch = family.batch(draw)
    arguments: dict[str, Any] = {}
    if form == "frozen adapter":
        _freeze(model, "lora_")
    elif form == "B frozen":
        _freeze(model, "lora_B")
    elif form == "stale optimizer":
        arguments["optimizer"] = torch.optim.AdamW(_trainable(model), lr=1e-2)
        model = get_peft_model(model.unload(), config).train()
    elif form == "lr 0":
        arguments["learning_rate"] = 0.0
    elif form == "labels all -100":
        batch["labels"] = torch.full_like(batch["labels"], -100)
    elif form == "detached graph":
        arguments["loss_fn"] = _detached(seed % 3)
    started = time.perf_counter()
    try:
        report = assert_loss_decreases(model, batch, device="cpu", **arguments)
        passed, drop = True, dict(report.measured).popitem()[1]
    except LoraHealthError:
        passed, drop = False, float("nan")
    seconds = time.perf_counter() - started
    model.unload()
    return Result(name, form, seed, passed, drop, seconds)


def _start() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def _one_seed(seed: int) -> list[Result]:
    return [_run(name, form, seed) for name in FAMILIES for form in FORMS]


def measure(seeds: int) -> Iterator[Result]:
    """Every model in every form with every seed, in ``WORKERS`` processes."""
    with multiprocessing.get_context("spawn").Pool(WORKERS, _start) as pool:
        for results in pool.imap_unordered(_one_seed, range(seeds)):
            yield from results


def table(results: list[Result]) -> str:
    """Markdown: wrong verdicts of each model in each form."""
    lines = [
        f"| model | {' | '.join(FORMS)} | smallest drop | median drop |",
        "|" + " --- |" * (len(FORMS) + 3),
    ]
    for name in FAMILIES:
        own = [r for r in results if r.model == name]
        wrong = [sum(r.wrong for r in own if r.form == form) for form in FORMS]
        drops = [r.drop for r in own if r.form == "healthy" and r.passed]
        lowest, middle = (f"{100 * value:.1f} %" for value in (min(drops), median(drops)))
        lines.append(f"| {name} | {' | '.join(map(str, wrong))} | {lowest} | {middle} |")
    return "\n".join(lines)


def record(results: list[Result], seeds: int) -> dict[str, Any]:
    """What the JSON file holds."""
    healthy = [r for r in results if r.form == "healthy"]
    broken = [r for r in results if r.form != "healthy"]
    return {
        "seeds": seeds,
        "healthy": len(healthy),
        "healthy_that_fail": sum(not r.passed for r in healthy),
        "broken": len(broken),
        "broken_that_pass": sum(r.passed for r in broken),
        "wrong": [asdict(r) for r in results if r.wrong],
        "median_seconds": round(median(r.seconds for r in results), 3),
        "healthy_drops": {
            name: sorted(round(r.drop, 5) for r in healthy if r.model == name and r.passed)
            for name in FAMILIES
        },
        "python": platform.python_version(),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft, bitsandbytes)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    for result in measure(options.seeds):
        results.append(result)
        if result.wrong:
            print(f"wrong: {result}", file=sys.stderr, flush=True)
    found = record(results, options.seeds)
    print(f"Wrong verdicts of assert_loss_decreases over {options.seeds} seeds\n")
    print(table(results))
    print(f"\nhealthy that fail: {found['healthy_that_fail']} of {found['healthy']}")
    print(f"broken that pass: {found['broken_that_pass']} of {found['broken']}")
    print(f"median of a run: {found['median_seconds']} s")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    raise SystemExit(bool(found["wrong"]))


if __name__ == "__main__":
    main()
