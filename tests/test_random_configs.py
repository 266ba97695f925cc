"""Random configurations on random bases: only documented errors, and the dry run agrees with PEFT itself."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from pytest_lora import Expect, Report, check_config, check_model
from pytest_lora.bases.examples.models import BASES, LAYERS, VOCABULARY, WIDTH

KNOWN_FIELDS = {f.name for f in fields(LoraConfig)}


class Convolutions(nn.Module):
    """Two convolutions and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3)
        self.conv2 = nn.Conv2d(16, 16, 3)
        self.head = nn.Linear(16, 4)


def bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            intermediate_size=WIDTH,
        )
    )


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_ff=WIDTH, d_kv=16, num_layers=LAYERS, num_heads=4)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    **BASES,
    "bert": bert,
    "t5": t5,
    "convolutions": Convolutions,
    "attention": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 4, WIDTH), LAYERS),
}

NAMES = [
    *(
        "q_proj",
        "v_proj",
        "k_proj",
        "down_proj",
        "lm_head",
        "embed_tokens",
        "c_attn",
        "c_proj",
        "wte",
        "query",
    ),
    *("value", "classifier", "score", "q", "v", "wo", "conv1", "conv2", "head", "self_attn", "linear1"),
    *("router", "gate", "experts", "norm", "layers", "nonsense", "w1", "w2"),
]
PATTERNS = ("all-linear", r".*q_proj", r".*\.layers\.0\..*proj", "q_proj", "(", r".*", "ALL-LINEAR")
KEYS = (
    "q_proj",
    "^q_proj",
    "down_proj",
    r"model.layers.0.self_attn.q_proj",
    "nonsense",
    "(",
    r".*proj",
    "c_attn",
)
INITS = (True, True, True, False, "gaussian", "pissa", "olora", "orthogonal", "eva", "corda", "nonsense")
TASKS = (None, None, "CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "FEATURE_EXTRACTION")


def some(rng: random.Random, values: Any, most: int = 3) -> list[Any]:
    return rng.sample(values, rng.randint(1, most))


def draw(rng: random.Random) -> dict[str, Any]:
    """Fields of one configuration, many of them wrong."""
    rare: dict[str, Callable[[], Any]] = {
        "lora_dropout": lambda: rng.choice((0.05, 0.5, 0.9, 1.0, 1.5, -0.1)),
        "bias": lambda: rng.choice(("all", "lora_only", "nonsense")),
        "use_rslora": lambda: True,
        "use_dora": lambda: True,
        "lora_bias": lambda: True,
        "modules_to_save": lambda: rng.choice((some(rng, NAMES, 2), "lm_head")),
        "exclude_modules": lambda: rng.choice((some(rng, NAMES, 2), r".*v_proj")),
        "init_lora_weights": lambda: rng.choice(INITS),
        "layers_to_transform": lambda: rng.choice(([0], [1, 2], 0, 7, [-1])),
        "layers_pattern": lambda: rng.choice(("layers", "h", "nonsense")),
        "rank_pattern": lambda: {k: rng.choice((0, 2, 16, 200)) for k in some(rng, KEYS, 2)},
        "alpha_pattern": lambda: {k: rng.choice((0, 4, 32, 1000)) for k in some(rng, KEYS, 2)},
        "task_type": lambda: rng.choice(TASKS),
        "inference_mode": lambda: True,
        "trainable_token_indices": lambda: rng.choice(([0, 1], [VOCABULARY], [-1], {"embed_tokens": [3]})),
        "target_parameters": lambda: rng.choice((["experts.up"], ["experts.gate_up_proj"], ["nonsense"])),
        "ensure_weight_tying": lambda: True,
        "fan_in_fan_out": lambda: True,
    }
    chosen = {name: make() for name, make in rare.items() if rng.random() < 0.12 and name in KNOWN_FIELDS}
    return {
        "r": rng.choice((1, 2, 3, 8, 16, 64, 256, 0, -1)) if rng.random() < 0.5 else 8,
        "lora_alpha": rng.choice((0, -1, 1, 8, 16, 0.5, 512)) if rng.random() < 0.5 else 16,
        "target_modules": rng.choice(
            (some(rng, NAMES), some(rng, NAMES), rng.choice(PATTERNS), "all-linear", None)
        ),
        **chosen,
    }


def configuration(rng: random.Random) -> LoraConfig:
    """The next configuration that PEFT's own constructor accepts."""
    while True:
        try:
            return LoraConfig(**draw(rng))
        except (ValueError, TypeError):
            continue


def expectation(rng: random.Random) -> Expect:
    return Expect(
        purpose=rng.choice(("train", "eval", "inference")),
        new_tokens=rng.choice((None, 2)),
        scope=rng.choice((None, "layers", "language_model")),
        will_merge=rng.random() < 0.3,
        fresh=rng.choice((None, True, False)),
        param_ratio=rng.choice((None, (0.001, 0.01))),
        alpha_ratio=rng.choice((None, 2.0)),
        reported_percent=rng.choice((None, 1.0)),
        config=rng.choice((None, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"]))),
    )


def judge(seed: int) -> str:
    """Check one combination both ways; say which way it went."""
    rng = random.Random(seed)
    config, expect = configuration(rng), expectation(rng)
    torch.manual_seed(seed)
    base = MODELS[rng.choice(sorted(MODELS))]()
    before = str(sorted(config.to_dict().items(), key=str))
    documented(config, base, expect)
    report = documented(config, base, Expect(purpose=expect.purpose))
    assert str(sorted(config.to_dict().items(), key=str)) == before
    model, refusal = accepted(base, config)
    if model is None:
        assert report is None or not report.ok, f"PEFT refuses, the report does not: {refusal}\n{report}"
        return "refused"
    assert report is not None
    assert "LORA124" not in {f.code for f in report.findings}, f"PEFT accepts: {report}"
    check_model(model, expect=expect)
    return "accepted"


def documented(config: LoraConfig, base: Any, expect: Expect) -> Report | None:
    """The report, or None where the documented error for an unusable field was raised."""
    try:
        return check_config(config, base, expect=expect)
    except ValueError as error:
        if not str(error).startswith("config: "):
            raise
        return None


def accepted(base: nn.Module, config: LoraConfig) -> tuple[nn.Module | None, str]:
    """What PEFT itself makes of it, or why it does not."""
    try:
        return get_peft_model(base, config), ""
    except Exception as refusal:
        return None, repr(refusal)


def tally(seeds: range) -> dict[str, int]:
    outcomes = {"refused": 0, "accepted": 0}
    for seed in seeds:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                outcomes[judge(seed)] += 1
            except Exception as error:
                raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    return outcomes


def test_some_random_configurations() -> None:
    outcomes = tally(range(80))
    assert min(outcomes.values()) > 8, outcomes


def test_configurations_without_weights() -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=LAYERS
    )
    for seed in range(50):
        rng = random.Random(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            documented(configuration(rng), config, expectation(rng))
