"""LoraHealthCallback in real runs of TRL's trainers, on a tiny model."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from pytest_lora import LoraHealthCallback, LoraHealthWarning

SPECIAL = ("<pad>", "<s>", "</s>")
VOCABULARY = {token: i for i, token in enumerate((*SPECIAL, *string.printable))}
STEPS = 4
WORDS = ("red", "green", "blue", "grey", "black", "white", "brown", "gold")


@pytest.fixture(autouse=True)
def _needs_trl() -> None:
    pytest.importorskip("trl", reason="the extra clients is not installed")


def tokenizer() -> Any:
    """One token a character."""
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCABULARY, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def llama(kind: Any = LlamaForCausalLM, **changes: Any) -> Any:
    torch.manual_seed(0)
    return kind(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **changes,
        )
    )


def sft(trl: Any, common: dict[str, Any], run: dict[str, Any]) -> Any:
    rows = [{"text": f"the colour is {word}"} for word in WORDS]
    return trl.SFTTrainer(llama(), args=trl.SFTConfig(**common), train_dataset=dataset(rows), **run)


def dpo(trl: Any, common: dict[str, Any], run: dict[str, Any]) -> Any:
    rows = [{"prompt": "a colour: ", "chosen": word, "rejected": word[::-1]} for word in WORDS]
    return trl.DPOTrainer(llama(), args=trl.DPOConfig(**common), train_dataset=dataset(rows), **run)


def kto(trl: Any, common: dict[str, Any], run: dict[str, Any]) -> Any:
    rows = [{"prompt": "a colour: ", "completion": w, "label": i % 2 == 0} for i, w in enumerate(WORDS)]
    return trl.KTOTrainer(llama(), args=trl.KTOConfig(**common), train_dataset=dataset(rows), **run)


def grpo(trl: Any, common: dict[str, Any], run: dict[str, Any]) -> Any:
    arguments = trl.GRPOConfig(**common, num_generations=2, max_completion_length=6)
    rows = [{"prompt": f"after {word} comes "} for word in WORDS]
    return trl.GRPOTrainer(llama(), letters, args=arguments, train_dataset=dataset(rows), **run)


def letters(completions: list[str], **_: Any) -> list[float]:
    """A reward: the share of letters in a completion."""
    return [sum(c.isalpha() for c in text) / (len(text) or 1) for text in completions]


def reward(trl: Any, common: dict[str, Any], run: dict[str, Any]) -> Any:
    rows = [{"chosen": f"a colour: {word}", "rejected": f"a colour: {word[::-1]}"} for word in WORDS]
    model = llama(LlamaForSequenceClassification, num_labels=1)
    run["peft_config"].task_type = "SEQ_CLS"
    return trl.RewardTrainer(model, args=trl.RewardConfig(**common), train_dataset=dataset(rows), **run)


def dataset(rows: list[dict[str, Any]]) -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(rows)


Make = Callable[[Any, dict[str, Any], dict[str, Any]], Any]


def trainer(make: Make, folder: Path, callback: LoraHealthCallback) -> Any:
    import trl

    common = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "learning_rate": 1e-4,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    run = {
        "processing_class": tokenizer(),
        "callbacks": [callback],
        "peft_config": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    }
    return make(trl, common, run)


@pytest.mark.parametrize("make", [sft, dpo, kto, grpo, reward])
def test_a_healthy_run_passes_in_silence(make: Make, tmp_path: Path) -> None:
    callback = LoraHealthCallback(on_error="raise")
    trainer(make, tmp_path, callback).train()
    told = [f for report in callback.watch.reports for f in (*report.errors, *report.warnings)]
    assert not told
    assert callback.watch.count == STEPS


@pytest.mark.parametrize("make", [sft, dpo, kto, grpo, reward])
def test_adapters_without_a_way_to_learn_are_told(make: Make, tmp_path: Path) -> None:
    callback = LoraHealthCallback()
    made = trainer(make, tmp_path, callback)
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if "lora_A" in name:
                parameter.zero_()
    with pytest.warns(LoraHealthWarning) as told:
        made.train()
    assert any("LORA224" in str(warning.message) for warning in told)
