"""What the tests of training build on: adapted models, optimizers, batches, and the two judgements of a report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from pytest_lora import Report
from pytest_lora.bases.examples.models import (
    BASES,
    VOCABULARY,
    WIDTH,
    language_batch,
)

Build = Callable[[], Report]
END = 2


def adapted(base: str | nn.Module = "base", **changes: Any) -> Any:
    fields: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], **changes}
    model = BASES[base]() if isinstance(base, str) else base
    return get_peft_model(model, LoraConfig(**fields)).train()


def trainable(model: nn.Module, *words: str) -> list[nn.Parameter]:
    """Trainable parameters, of whose names each has one of the words."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [p for n, p in named if not words or any(word in n for word in words)]


def adam(model: nn.Module, lr: float = 1e-3, **changes: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(trainable(model), lr=lr, **changes)


def t5(**changes: Any) -> nn.Module:
    config = T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_ff=128, d_kv=16, num_layers=1, num_heads=4, **changes
    )
    config.decoder_start_token_id = config.pad_token_id = 0
    return T5ForConditionalGeneration(config)


def bert_base(outputs: int = 3) -> nn.Module:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        num_labels=outputs,
    )
    return BertForSequenceClassification(config)


def bert() -> Any:
    return adapted(bert_base(), target_modules=["query", "value"], task_type="SEQ_CLS")


def with_labels(change: Callable[[dict[str, torch.Tensor]], None]) -> dict[str, torch.Tensor]:
    batch = language_batch()
    change(batch)
    return batch


class TwoTowers(nn.Module):
    """A vision tower that runs only when there are pixels, and a language model."""

    def __init__(self, detached: bool = False) -> None:
        super().__init__()
        self.vision_tower = nn.ModuleDict({"q_proj": nn.Linear(WIDTH, WIDTH)})
        self.language_model = nn.ModuleDict({"q_proj": nn.Linear(WIDTH, WIDTH)})
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.detached = detached

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, pixels: torch.Tensor | None = None, **_: Any
    ) -> dict[str, torch.Tensor]:
        hidden = self.embed(input_ids)
        if pixels is not None:
            seen = self.vision_tower["q_proj"](pixels)
            hidden = hidden + (seen.detach() if self.detached else seen)
        logits = self.head(hidden + self.language_model["q_proj"](hidden))
        return {"loss": nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


FLAT = [4.86, 4.83, 4.87, 4.84, 4.85, 4.86, 4.84, 4.85]
"""Losses that have not fallen."""


def name_the_fault(build: Build, code: str, words: str) -> None:
    """Hold that the report of a training names one fault, in these words."""
    torch.manual_seed(0)
    report = build()
    # From LORA340 on rules are about the history alone; a flat one that is given is named as well.
    loud = [f for f in (*report.errors, *report.warnings) if f.code < "LORA340"]
    assert {f.code for f in loud} == {code}, str(report)
    assert any(words in str(f) for f in loud), str(report)


def leave_alone(build: Build) -> None:
    """Hold that a training has neither errors nor warnings."""
    torch.manual_seed(0)
    report = build()
    assert not (*report.errors, *report.warnings), str(report)
