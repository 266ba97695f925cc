"""A check leaves a model bit for bit as it was."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pytest_lora import Expect, check_model
from pytest_lora.bases.examples.models import BASES


def _adapted(base: str, **changes: Any) -> nn.Module:
    fields: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], **changes}
    return get_peft_model(BASES[base](), LoraConfig(**fields))


def _merged() -> nn.Module:
    model: Any = _adapted("base")
    model.merge_adapter()
    return model


def _two_adapters() -> nn.Module:
    model: Any = _adapted("base", modules_to_save=["lm_head"])
    model.add_adapter("second", LoraConfig(r=4, target_modules=["k_proj"]))
    model.base_model.disable_adapter_layers()
    return model


def _with_gradients() -> nn.Module:
    model = _adapted("base", lora_dropout=0.1, trainable_token_indices=[3, 4])
    ids = torch.arange(16).reshape(2, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: _adapted("base"),
    "4 bit": lambda: _adapted("base_4bit"),
    "DoRA in eval mode": lambda: _adapted("base", use_dora=True).eval(),
    "tied": lambda: _adapted("tied_base", modules_to_save=["embed_tokens"]),
    "classifier": lambda: _adapted("classifier_base", task_type="SEQ_CLS"),
    "merged": _merged,
    "two adapters, disabled": _two_adapters,
    "with gradients": _with_gradients,
    "meta": lambda: _adapted("base").to("meta"),
}


def _bits(tensor: torch.Tensor | None) -> bytes | str | None:
    if tensor is None:
        return None
    if tensor.device.type == "meta":
        return f"meta {tuple(tensor.shape)} {tensor.dtype}"
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _state(model: nn.Module) -> dict[str, Any]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        "values": {name: _bits(tensor) for name, tensor in named},
        "identities": {name: (id(tensor), tensor._version) for name, tensor in named},
        "requires_grad": {name: tensor.requires_grad for name, tensor in named},
        "gradients": {name: _bits(tensor.grad) for name, tensor in named},
        "modes": {name: module.training for name, module in model.named_modules()},
        "modules": {name: (id(module), sorted(vars(module))) for name, module in model.named_modules()},
        "hooks": {
            name: [list(vars(module)[h]) for h in vars(module) if h.endswith("_hooks")]
            for name, module in model.named_modules()
        },
        "configs": copy.deepcopy({n: c.to_dict() for n, c in getattr(model, "peft_config", {}).items()}),
        "random": (random.getstate(), str(np.random.get_state()), _bits(torch.get_rng_state())),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("purpose", ["train", "inference"])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_check_model_leaves_no_trace(build: Callable[[], nn.Module], purpose: Any) -> None:
    model = build()
    before = _state(model)
    check_model(model, expect=Expect(purpose=purpose, will_merge=True, fresh=False, reported_percent=1.0))
    after = _state(model)
    for part, value in before.items():
        assert after[part] == value, part
