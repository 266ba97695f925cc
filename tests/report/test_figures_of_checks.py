"""What checks show beside findings, on real models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig

from pytest_lora import (
    Expect,
    LoraHealthError,
    Report,
    assert_lora_healthy,
    assert_loss_decreases,
    check_checkpoint,
    check_config,
    check_memory,
    check_model,
    check_training,
    diagnose_history,
)
from pytest_lora.assertions import delivered
from pytest_lora.bases.examples.folders import edit, pickle_weights, save_adapter
from pytest_lora.bases.examples.models import BASES, language_batch
from pytest_lora.facts.figures import AdapterMap, LossCurve, MemoryBudget

pytestmark = pytest.mark.filterwarnings("ignore")


def adapted(base: str = "base", **changes: Any) -> Any:
    fields: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], **changes}
    return get_peft_model(BASES[base](), LoraConfig(**fields)).train()


def the_map(report: Report) -> AdapterMap:
    (found,) = (one for one in report.figures if isinstance(one, AdapterMap))
    return found


def test_a_model_is_a_map_of_layers_and_modules() -> None:
    found = the_map(check_model(adapted(rank_pattern={"layers.1.self_attn.v_proj": 4})))
    assert found.base == "LlamaForCausalLM"
    assert found.adapter == "default"
    assert found.rows == ("model.layers.0", "model.layers.1")
    assert found.columns == ("self_attn.q_proj", "self_attn.v_proj")
    assert found.states == ("live",) * 4
    assert found.ranks == (8, 8, 8, 4)
    assert found.scalings == (2.0, 2.0, 2.0, 4.0)
    assert found.gradients == found.updates == ()
    assert found.trainable_parameters == sum(
        p.numel()
        for p in adapted(rank_pattern={"layers.1.self_attn.v_proj": 4}).parameters()
        if p.requires_grad
    )
    assert found.percent == pytest.approx(100 * found.trainable_parameters / found.total_parameters)


def test_layers_left_out_are_missing_and_other_towers_are_not_shown() -> None:
    found = the_map(check_model(adapted(layers_to_transform=[1])))
    assert found.column("self_attn.q_proj", found.states) == ("missing", "live")
    assert found.column("self_attn.q_proj", found.ranks) == (None, 8)
    towers = the_map(check_model(adapted("vision_language_base", target_modules=r"language_model.*q_proj")))
    assert (towers.rows, towers.columns) == (("",), ("language_model.q_proj",))


def test_frozen_dead_and_idle_cells() -> None:
    model = adapted()
    first, second = (layer.self_attn for layer in model.base_model.model.model.layers)
    first.q_proj.lora_A.requires_grad_(False)
    first.q_proj.lora_B.requires_grad_(False)
    first.v_proj.scaling["default"] = 0.0
    second.q_proj.merge()
    assert the_map(check_model(model)).states == ("frozen", "dead", "idle", "live")


def test_an_inactive_adapter_has_a_map_of_its_own() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj"]))
    maps = [one for one in check_model(model).figures if isinstance(one, AdapterMap)]
    assert [(one.adapter, one.columns) for one in maps] == [
        ("default", ("self_attn.q_proj", "self_attn.v_proj")),
        ("other", ("self_attn.k_proj",)),
    ]
    assert set(maps[1].states) == {"idle"}


def test_steps_show_gradients_and_updates() -> None:
    model = adapted()
    layer = model.base_model.model.model.layers[1].self_attn
    layer.v_proj.forward = layer.v_proj.base_layer.forward  # as where a fused kernel passes the adapter by
    found = the_map(check_training(model, language_batch()))
    assert found.states == ("live", "live", "live", "dead")
    assert found.gradients[3] == found.updates[3] == 0
    assert all(value and value > 0 for value in (*found.gradients[:3], *found.updates[:3]))
    # One step of AdamW at the learning rate of check_training moves every number by about that.
    assert found.updates[0] == pytest.approx(1e-3, rel=0.5)


def test_steps_that_show_nothing_kill_no_cell() -> None:
    batch = language_batch()
    batch["labels"][:] = -100
    assert set(the_map(check_training(adapted(), batch)).states) == {"live"}


def test_experts_of_a_layer_are_one_column() -> None:
    found = the_map(check_model(adapted("moe_base", target_modules="all-linear")))
    assert len(found.columns) == len(set(found.columns)) < 12
    assert set(found.states) == {"live"}


def test_a_configuration_is_a_map_too() -> None:
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], task_type="CAUSAL_LM")
    found = the_map(check_config(config, LlamaConfig()))
    assert (len(found.rows), found.columns) == (32, ("self_attn.q_proj",))
    assert found.trainable_parameters == 32 * 8 * (4096 + 4096)
    assert found.total_parameters == 6_738_415_616 + found.trainable_parameters


def saved(tmp_path: Path, **changes: Any) -> tuple[Path, Any]:
    """A saved adapter with values of a trained one, and its base."""
    base = BASES["base"]()
    return save_adapter(tmp_path, base, **changes), base


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_saved_adapter_is_a_map_too(tmp_path: Path, dtype: torch.dtype) -> None:
    folder, base = saved(tmp_path, rank_pattern={"layers.1.self_attn.v_proj": 4}, use_rslora=True)
    edit(folder, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    tensors = load_file(folder / "adapter_model.safetensors")
    sizes = [
        tensors[f"base_model.model.model.layers.{n}.self_attn.{kind}.lora_B.weight"].double()
        for n in (0, 1)
        for kind in ("q_proj", "v_proj")
    ]
    found = the_map(check_checkpoint(folder, base))
    assert (found.base, found.adapter, found.saved) == ("LlamaForCausalLM", folder.name, True)
    assert (found.rows, found.columns) == (
        ("model.layers.0", "model.layers.1"),
        ("self_attn.q_proj", "self_attn.v_proj"),
    )
    assert found.states == ("live",) * 4
    assert found.ranks == (8, 8, 8, 4)
    assert found.scalings == pytest.approx((16 / 8**0.5,) * 3 + (16 / 2,), rel=1e-3)
    assert found.gradients == ()
    assert found.updates == pytest.approx([b.square().mean().sqrt().item() for b in sizes], rel=1e-3)
    assert found.trainable_parameters == sum(tensor.numel() for tensor in tensors.values())
    assert found.total_parameters == sum(p.numel() for p in base.parameters()) + found.trainable_parameters


def test_what_a_saved_adapter_does_not_hold_is_dead_or_missing(tmp_path: Path) -> None:
    folder, base = saved(tmp_path)
    edit(
        folder,
        lambda tensors: {
            name: tensor * 0 if "0.self_attn.q_proj.lora_B" in name else tensor
            for name, tensor in tensors.items()
            if "1.self_attn.v_proj" not in name
        },
    )
    found = the_map(check_checkpoint(folder, base))
    assert found.states == ("dead", "live", "live", "missing")
    assert (found.updates[0], found.updates[3], found.ranks[3]) == (0, None, None)
    alone = the_map(check_checkpoint(folder))
    assert alone.states == ("dead", "live", "live", None)
    assert (alone.base, alone.total_parameters) == ("org/tiny-llama", 0)
    pickle_weights(folder)
    assert the_map(check_checkpoint(folder, expect=Expect(read_pickle=True))).updates == alone.updates


def test_a_file_of_names_without_order_is_no_map(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    factor = torch.ones(2, 2)
    edit(
        folder,
        lambda _: {
            f"base_model.model.l{n}.{n}.m{n}.lora_{part}.weight": factor for n in range(150) for part in "AB"
        },
    )
    assert check_checkpoint(folder).figures == ()


def test_selecting_and_training_keep_the_map() -> None:
    delivered.clear()
    assert_lora_healthy(adapted(), batches=language_batch(), ignore=["LORA1"])
    assert the_map(delivered[-1]).gradients


def test_a_loss_assertion_shows_its_curve_passing_or_not() -> None:
    delivered.clear()
    passed = assert_loss_decreases(adapted(), language_batch(), steps=4)
    with pytest.raises(LoraHealthError) as failed:
        assert_loss_decreases(adapted(), language_batch(), steps=2, by=0.9)
    for report, steps, by in ((delivered[0], 4, 0.01), (failed.value.report, 2, 0.9)):
        (curve,) = (one for one in report.figures if isinstance(one, LossCurve))
        assert (len(curve.losses), curve.window, curve.wanted) == (steps, (0, steps), by)
    (curve,) = (one for one in delivered[0].figures if isinstance(one, LossCurve))
    assert passed is delivered[0]
    assert passed.measure("loss drop within 4 steps") == pytest.approx(curve.drop)


def test_a_long_history_is_thinned_and_keeps_its_ends() -> None:
    losses = [5 - 4 * n / 5000 + 0.1 * math.sin(n) for n in range(5000)]
    losses[1234], losses[2345] = 9.0, math.nan
    (curve,) = diagnose_history(losses, {2000: 3.0}, steps_per_loss=10).figures
    assert isinstance(curve, LossCurve)
    assert len(curve.losses) <= 410
    assert (9.0 in curve.losses, any(map(math.isnan, curve.losses))) == (True, True)
    assert curve.steps[curve.losses.index(9.0)] == 12350
    assert (curve.eval_steps, curve.eval_losses) == ((2000,), (3.0,))
    assert curve.window == (10, 23450)
    assert curve.drop == pytest.approx(0.4, abs=0.1)


def test_a_budget_shows_what_fills_it() -> None:
    config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    base = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    for budget, fits in (("1GiB", True), ("200MiB", False)):
        (shown,) = check_memory(base, config, batch_size=8, seq_len=256, budget=budget).figures
        assert isinstance(shown, MemoryBudget)
        assert sum(size for _, size in shown.breakdown) == shown.peak_allocated
        assert shown.fits is fits
        assert bool(shown.what_if) is not fits
        assert all(one.fits is (one.peak <= shown.budget) for one in shown.what_if)
