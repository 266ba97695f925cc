"""Where texts begin and end in a batch, the shift of the loss, and tokens without values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    LlamaForCausalLM,
    MBartConfig,
    MBartForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from pytest_lora import Expect, Report, check_training
from pytest_lora.bases.examples.models import VOCABULARY, WIDTH, language_batch, made
from tests.rules.training.setups import END, Build, adapted, with_labels

pytestmark = pytest.mark.filterwarnings("ignore")


def padded(end: int | None, *, prompts: bool = True) -> dict[str, torch.Tensor]:
    """Four texts of different lengths, padded on the right, that end with a token or with whatever they hold."""
    batch = language_batch()
    batch["input_ids"] = batch["input_ids"].clamp(min=10)
    for row, length in enumerate((16, 13, 11, 9)):
        batch["input_ids"][row, length - 1] = 20 + row if end is None else end
        batch["input_ids"][row, length:] = batch["attention_mask"][row, length:] = 0
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    if prompts:
        batch["labels"][:, :4] = -100
    return batch


def ended(end: int | None, **given: Any) -> Report:
    model = adapted()
    model.config.eos_token_id = END
    return check_training(model, padded(end), **given)


def mbart(*, shifted: bool) -> Report:
    """A decoder that leaves the shift of the labels to its user."""
    config = MBartConfig(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        encoder_layers=1,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        is_decoder=True,
        is_encoder_decoder=False,
    )
    model = adapted(MBartForCausalLM(config), target_modules=r".*self_attn\.(q|v)_proj")
    batch = language_batch()
    if shifted:
        batch["labels"] = nn.functional.pad(batch["input_ids"][:, 1:], (0, 1), value=-100)
    return check_training(model, batch)


def own_loss(shift: int) -> Report:
    def loss(model: Any, batch: Any) -> torch.Tensor:
        logits = model(input_ids=batch["input_ids"]).logits
        logits = logits[:, : logits.shape[1] - shift]
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, shift:].flatten())

    return check_training(adapted(), language_batch(), loss_fn=loss)


def masked_inputs() -> Report:
    """A diffusion language model: in place, but of tokens that it does not read."""

    def loss(model: Any, batch: Any) -> torch.Tensor:
        hidden = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        hidden[:, ::2] = True
        logits = model(input_ids=batch["input_ids"].masked_fill(hidden, 5)).logits
        return nn.functional.cross_entropy(logits[hidden], batch["labels"][hidden])

    return check_training(adapted(), language_batch(), loss_fn=loss)


def packed(first: int | None, *, masked: bool = False) -> Report:
    model = adapted()
    model.config.use_cache = False
    batch = language_batch()
    del batch["attention_mask"]
    batch["position_ids"] = torch.cat([torch.arange(7), torch.arange(9)]).repeat(4, 1)
    if first is not None:
        batch["input_ids"][batch["position_ids"] == 0] = first
    batch["labels"] = batch["input_ids"].masked_fill((batch["position_ids"] == 0) & masked, -100)
    return check_training(model, batch)


def whisper(*, started: bool) -> Report:
    fields = ("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads")
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=32,
        pad_token_id=2,
        bos_token_id=2,
        eos_token_id=2,
        decoder_start_token_id=5,
        **dict.fromkeys(fields, 1),
    )
    labels = language_batch()["input_ids"][:, :8].clamp(min=10)
    labels[:, 0] = 5 if started else 6
    inputs = torch.randn(4, 8, 40, generator=torch.Generator().manual_seed(0))
    return check_training(
        adapted(WhisperForConditionalGeneration(config)), {"input_features": inputs, "labels": labels}
    )


def prompts_labelled(token: int, **given: Any) -> Report:
    return check_training(adapted(), with_labels(lambda b: b["labels"][:, :8].fill_(token)), **given)


def of_inputs_alone(model: Any, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
    return loss


def zero_rows(**config: Any) -> Report:
    """Two tokens whose rows hold nothing, the second one a target."""
    base: LlamaForCausalLM = made("base")
    for weight in (base.model.embed_tokens.weight, base.lm_head.weight):
        weight.data[100:102] = 0
    batch = language_batch()
    batch["input_ids"] = batch["input_ids"].clamp(max=90)
    batch["input_ids"][:, 0], batch["input_ids"][:, -1] = 100, 101
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, 0] = -100
    return check_training(adapted(base, **config), batch)


NAMED: dict[str, tuple[Build, str, str]] = {
    "end": (lambda: ended(None, expect=Expect(completion_only=True)), "LORA374", "3 texts end before"),
    "mbart": (lambda: mbart(shifted=False), "LORA369", "does not shift labels itself"),
    "own loss": (lambda: own_loss(0), "LORA369", "logits[:, :-1] against labels[:, 1:]"),
    "whisper": (lambda: whisper(started=True), "LORA367", "begin with 5"),
    "prompt": (lambda: prompts_labelled(0), "LORA366", "the one token 0"),
    "rows": (zero_rows, "LORA375", "101, and they are targets"),
    "rows in part": (lambda: zero_rows(modules_to_save=["lm_head"]), "LORA375", "embed_tokens"),
}

CLEAN: dict[str, Build] = {
    "end": lambda: ended(END, expect=Expect(completion_only=True)),
    "end of their own": lambda: ended(99, expect=Expect(completion_only=True)),
    "no end, and nobody says that there are answers": lambda: ended(None),
    "mbart": lambda: mbart(shifted=True),
    "own loss": lambda: own_loss(1),
    "masked inputs": masked_inputs,
    "whisper": lambda: whisper(started=False),
    "prompt": lambda: prompts_labelled(-100),
    "own loss of filled labels": lambda: prompts_labelled(0, loss_fn=of_inputs_alone),
    "trained rows": lambda: zero_rows(modules_to_save=["embed_tokens", "lm_head"]),
}


@pytest.mark.parametrize("name", NAMED)
def test_the_fault_is_named(name: str) -> None:
    build, code, words = NAMED[name]
    report = build()
    loud = [f for f in report.findings if f.severity != "info"]
    assert {f.code for f in loud} == {code}, str(report)
    assert any(words in str(f) for f in loud), str(report)


@pytest.mark.parametrize("name", CLEAN)
def test_its_twin_is_left_alone(name: str) -> None:
    report = CLEAN[name]()
    assert not [f for f in report.findings if f.severity != "info"], str(report)


def test_texts_that_never_end_are_mentioned_where_prompts_are_masked() -> None:
    assert "LORA374" in {f.code for f in ended(None).findings}
    model = adapted()
    model.config.eos_token_id = END
    assert "LORA374" not in {f.code for f in check_training(model, padded(None, prompts=False)).findings}


@pytest.mark.parametrize(
    ("first", "masked", "told"), [(None, False, True), (None, True, False), (1, False, False)]
)
def test_labels_at_the_seams_of_documents_are_mentioned(first: int | None, masked: bool, told: bool) -> None:
    report = packed(first, masked=masked)
    assert not [f for f in report.findings if f.severity != "info"], str(report)
    assert any(f.code == "LORA368" and "4 labels" in f.observed for f in report.infos) == told


def test_some_rows_without_labels() -> None:
    batch = {name: value.repeat(2, 1) for name, value in language_batch().items()}
    batch["labels"][:1] = -100
    assert "LORA320" not in {f.code for f in check_training(adapted(), batch).findings}
    batch["labels"][:2] = -100
    assert "2 of 8 rows" in str(check_training(adapted(), batch))
