"""What dtype each parameter of a quantized base and its adapter trains in: TRL's trainers are run and compared."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import GPTNeoXConfig, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from pytest_lora.bases.examples.models import quantized
from pytest_lora.facts.memory import Quantization
from pytest_lora.facts.recipe import RunSetting, Value
from pytest_lora.inspection.memory.layer_stacks import Cut
from pytest_lora.inspection.memory.meta_model import build
from pytest_lora.inspection.recipe import recipe_facts
from pytest_lora.inspection.recipe.adapter import step_arguments
from pytest_lora.memory.setting import checked_setting
from tests.memory.test_trainers import plain, rows, tokenizer

trl = pytest.importorskip("trl", minversion="1.16")
pytest.importorskip("bitsandbytes")

BASE = LlamaConfig(
    hidden_size=64,
    intermediate_size=64,
    num_attention_heads=4,
    num_hidden_layers=1,
    vocab_size=3000,
    pad_token_id=0,
)
ADAPTER: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
TRAINERS: dict[str, tuple[str, dict[str, list[str]]]] = {
    "SFT": ("trl-sft", {"text": ["w5 w6 w7"] * 4}),
    "DPO": ("trl-dpo", {"prompt": ["w5"] * 4, "chosen": ["w6 w7"] * 4, "rejected": ["w8"] * 4}),
    "Reward": ("trl-reward", {"chosen": ["w6 w7"] * 4, "rejected": ["w8"] * 4}),
}


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


def really_trained(name: str, folder: Path, config: LoraConfig) -> dict[str, torch.dtype]:
    """By the installed trainer, once it has taken a tiny base in 4 bits and bfloat16."""
    kind: Any = LlamaForSequenceClassification if name == "Reward" else LlamaForCausalLM
    shape = copy.deepcopy(BASE)
    if name == "Reward":
        shape.num_labels = 1
    base = quantized(kind(shape).to(torch.bfloat16), compute_dtype=torch.bfloat16)
    trainer = getattr(trl, f"{name}Trainer")(
        model=base,
        args=getattr(trl, f"{name}Config")(**plain(folder)),
        train_dataset=rows(**TRAINERS[name][1]),
        processing_class=tokenizer(),
        peft_config=config,
    )
    return dtypes(trainer.model)


def estimated(config: LoraConfig, **setting: Any) -> dict[str, torch.dtype]:
    asked = checked_setting(quantization="nf4", **setting)
    return dtypes(build(BASE, config, replace(asked, batch_size=1, seq_len=8), cut=Cut(0)).model)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_of_trl_casts_nothing_but_the_factors(name: str, dora: bool, tmp_path: Path) -> None:
    task = "SEQ_CLS" if name == "Reward" else "CAUSAL_LM"
    config = LoraConfig(**ADAPTER, use_dora=dora, task_type=task)
    real = really_trained(name, tmp_path, config)
    assert real == estimated(config, trainer=TRAINERS[name][0])
    norms = [dtype for parameter, dtype in real.items() if "norm" in parameter or "embed" in parameter]
    assert norms
    assert set(norms) == {torch.bfloat16}


@pytest.mark.parametrize("dora", [False, True])
def test_a_recipe_of_trl_is_estimated_as_its_trainer_trains(dora: bool, tmp_path: Path) -> None:
    values = {"batch_size": 2, "seq_len": 8, "quantization": "nf4", "dtype": "bfloat16"}
    run = RunSetting("TRL", **{name: Value(value, "line 1") for name, value in values.items()})
    found = step_arguments(run, None) or {}
    asked = {name: found[name] for name in ("prepare_for_kbit", "adapter_dtype", "dtype", "upcast")}
    config = LoraConfig(**ADAPTER, use_dora=dora, task_type="CAUSAL_LM")
    assert really_trained("SFT", tmp_path, config) == estimated(config, **asked)
    assert estimated(config, **asked) != estimated(config, dtype="bfloat16"), "a script of one's own"


AXOLOTL = "base_model: a/b\nadapter: qlora\nload_in_4bit: true\nmicro_batch_size: 2\nlora_r: 4\nbf16: true\n"
FACTORY = (
    "model_name_or_path: a/b\nstage: sft\ndo_train: true\nlora_rank: 4\nbf16: true\nquantization_bit: 4\n"
)
NEOX = GPTNeoXConfig(hidden_size=64, intermediate_size=64, num_attention_heads=4, num_hidden_layers=1)


def asked_by(text: str, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "recipe.yaml").write_text(text)
    run = recipe_facts(tmp_path / "recipe.yaml").setting
    assert run is not None
    found = step_arguments(run, None)
    assert found is not None
    return found


def of_step(base: Any, asked: dict[str, Any]) -> dict[str, torch.dtype]:
    target = ["query_key_value"] if base is NEOX else ["q_proj"]
    setting = {name: value for name, value in asked.items() if name not in ("batch_size", "seq_len")}
    made = replace(checked_setting(**setting), batch_size=1, seq_len=8)
    config = LoraConfig(r=4, target_modules=target, task_type="CAUSAL_LM")
    return dtypes(build(base, config, made, cut=Cut(0)).model)


@pytest.mark.parametrize(
    ("text", "base", "in_float32"),
    [
        pytest.param(FACTORY, BASE, ("lora_",), id="LLaMA-Factory"),
        pytest.param(f"{FACTORY}upcast_layernorm: true\n", BASE, ("lora_", "norm"), id="upcast_layernorm"),
        pytest.param(FACTORY.replace("bf16", "pure_bf16"), BASE, ("lora_",), id="pure_bf16"),
        pytest.param(AXOLOTL, BASE, ("lora_",), id="Axolotl"),
        pytest.param(f"{AXOLOTL}embeddings_skip_upcast: true\n", BASE, ("lora_",), id="skip_upcast of Llama"),
        pytest.param(
            f"{AXOLOTL}embeddings_skip_upcast: true\n",
            NEOX,
            ("lora_", "embed_in", "embed_out"),
            id="skip_upcast of GPT-NeoX",
        ),
        pytest.param(f"{AXOLOTL}peft_autocast_adapter_dtype: false\n", BASE, (), id="autocast_adapter_dtype"),
    ],
)
def test_what_keys_of_a_recipe_leave_in_float32(
    text: str, base: Any, in_float32: tuple[str, ...], tmp_path: Path
) -> None:
    found = of_step(base, asked_by(text, tmp_path))
    wide = {name for name, dtype in found.items() if dtype is torch.float32}
    assert wide == {name for name in found if any(part in name for part in in_float32)}
    assert bool(wide) == bool(in_float32)


def test_pure_bf16_trains_without_autocast(tmp_path: Path) -> None:
    assert "autocast" not in asked_by(FACTORY, tmp_path)
    assert asked_by(FACTORY.replace("bf16", "pure_bf16"), tmp_path)["autocast"] is False


@pytest.mark.parametrize("twice", [True, False])
def test_scales_of_a_recipe_are_quantized_twice_unless_it_says_no(twice: bool, tmp_path: Path) -> None:
    asked = asked_by(f"{FACTORY}double_quantization: {str(twice).lower()}\n", tmp_path)
    assert asked["quantization"] == Quantization("nf4", double_quant=twice)
