"""Configurations that PEFT's own examples and guides use, on bases of the kind that they use them on: all are sound."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import transformers
from peft import AdaLoraConfig, LoraConfig

from pytest_lora import check_config

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

CAUSAL: dict[str, dict[str, Any]] = {
    "causal language modelling": {"r": 8, "lora_alpha": 32, "lora_dropout": 0.1},
    "8-bit training": {
        "r": 16,
        "lora_alpha": 32,
        "target_modules": ["q_proj", "v_proj"],
        "lora_dropout": 0.05,
    },
    "4-bit training": {"r": 8, "lora_alpha": 32, "target_modules": ATTENTION, "lora_dropout": 0.05},
    "supervised fine-tuning": {
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "target_modules": ATTENTION + MLP,
    },
    "all linear layers": {"r": 16, "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": "all-linear"},
    "DoRA": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ATTENTION, "use_dora": True},
    "rsLoRA": {"r": 64, "lora_alpha": 16, "target_modules": ATTENTION, "use_rslora": True},
    "PiSSA": {"r": 16, "lora_alpha": 16, "init_lora_weights": "pissa", "target_modules": ATTENTION},
    "fast PiSSA": {
        "r": 16,
        "lora_alpha": 16,
        "init_lora_weights": "pissa_niter_16",
        "target_modules": ATTENTION,
    },
    "OLoRA": {"r": 32, "lora_alpha": 16, "init_lora_weights": "olora", "target_modules": ATTENTION},
    "orthogonal": {"r": 16, "lora_alpha": 32, "init_lora_weights": "orthogonal", "target_modules": ATTENTION},
    "gaussian": {"r": 16, "lora_alpha": 16, "init_lora_weights": "gaussian", "target_modules": ATTENTION},
    "layers of one's own": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ATTENTION,
        "layers_to_transform": [0, 1],
    },
    "ranks by pattern": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ATTENTION,
        "rank_pattern": {"q_proj": 4},
        "alpha_pattern": {"q_proj": 8},
    },
    "Activated LoRA": {
        "r": 32,
        "lora_alpha": 32,
        "target_modules": ATTENTION,
        "alora_invocation_tokens": [5, 6, 7],
    },
    "new tokens": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ATTENTION,
        "trainable_token_indices": [1, 2, 3],
    },
    "MiCA": {"r": 16, "lora_alpha": 16, "init_lora_weights": "mica", "target_modules": ATTENTION},
}

OTHERS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "sequence classification": (
        "RobertaConfig",
        "RobertaForMaskedLM",
        {"task_type": "SEQ_CLS", "r": 8, "lora_alpha": 16, "lora_dropout": 0.1},
    ),
    "token classification": (
        "BertConfig",
        "BertForMaskedLM",
        {"task_type": "TOKEN_CLS", "r": 16, "lora_alpha": 16, "lora_dropout": 0.1},
    ),
    "question answering": (
        "BertConfig",
        "BertForMaskedLM",
        {"task_type": "QUESTION_ANS", "r": 8, "lora_alpha": 16},
    ),
    "feature extraction": (
        "BertConfig",
        "BertModel",
        {
            "task_type": "FEATURE_EXTRACTION",
            "r": 8,
            "lora_alpha": 16,
            "target_modules": ["key", "query", "value"],
        },
    ),
    "image classification": (
        "ViTConfig",
        "ViTForImageClassification",
        {
            "r": 16,
            "lora_alpha": 16,
            "lora_dropout": 0.1,
            "target_modules": ["q_proj", "v_proj"],
            "modules_to_save": ["classifier"],
        },
    ),
    "speech recognition": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {"r": 32, "lora_alpha": 64, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
    ),
    "translation": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"task_type": "SEQ_2_SEQ_LM", "r": 8, "lora_alpha": 32, "lora_dropout": 0.1},
    ),
}

LAYERS = {"num_hidden_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2}


def base(kind: str, architecture: str | None) -> Any:
    made = getattr(transformers, kind)()
    for name, number in LAYERS.items():
        if hasattr(made, name):
            setattr(made, name, number)
    made.architectures = architecture and [architecture]
    return made


def loud(config: Any, described: Any) -> list[str]:
    report = check_config(config, described)
    return [str(finding) for finding in (*report.errors, *report.warnings)]


def known(fields: dict[str, Any]) -> bool:
    names = {field.name for field in dataclasses.fields(LoraConfig)}
    return fields.keys() <= names


@pytest.mark.parametrize("example", CAUSAL)
def test_configurations_for_causal_language_models_are_sound(example: str) -> None:
    fields = CAUSAL[example]
    described = base("LlamaConfig", "LlamaForCausalLM")
    if not known(fields) or (example == "MiCA" and "kasa_config" not in LoraConfig.__dataclass_fields__):
        pytest.skip("this PEFT does not know it yet")
    assert not loud(LoraConfig(task_type="CAUSAL_LM", **fields), described)


@pytest.mark.parametrize("example", OTHERS)
def test_configurations_for_other_tasks_are_sound(example: str) -> None:
    kind, architecture, fields = OTHERS[example]
    described = base(kind, architecture)
    if example == "image classification" and transformers.__version__ < "5":
        fields = {**fields, "target_modules": ["query", "value"]}
    assert not loud(LoraConfig(**fields), described)


def test_the_schedule_of_adalora_is_sound() -> None:
    config = AdaLoraConfig(
        init_r=12,
        target_r=8,
        beta1=0.85,
        beta2=0.85,
        tinit=200,
        tfinal=1000,
        deltaT=10,
        total_step=3000,
        lora_alpha=32,
        lora_dropout=0.1,
        task_type="SEQ_2_SEQ_LM",
    )
    assert not loud(config, base("T5Config", "T5ForConditionalGeneration"))
