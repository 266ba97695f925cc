"""Sound set-ups beyond plain LoRA on one model pass: variants, mixed tuners, names of users, other loaders."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, PeftModel, XLoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from pytest_lora import (
    Expect,
    Report,
    assert_lora_laws,
    assert_merge_exact,
    assert_reload_exact,
    check_checkpoint,
    check_config,
    check_model,
    check_training,
    count_parameters,
)
from pytest_lora.bases.examples.models import FUSED_BY_PEFT, made
from pytest_lora.inspection.model import model_facts
from pytest_lora.inspection.transformers_internals import READS_OTHER_PREFIXES, TIES_WHAT_DIFFERS

IDS = torch.arange(16).reshape(2, 8) + 3
BATCH = {"input_ids": IDS, "labels": IDS}


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        use_cache=False,
        **changes,
    )
    return LlamaForCausalLM(config)


def linears(**more: nn.Module) -> Any:
    torch.manual_seed(0)
    return nn.ModuleDict({"q_proj": nn.Linear(64, 64), "v_proj": nn.Linear(64, 64), **more})


def loud(report: Report) -> list[str]:
    return [finding.code for finding in (*report.errors, *report.warnings)]


def saved(model: Any, folder: Path) -> Path:
    model.peft_config["default"].base_model_name_or_path = "org/base"
    model.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------------------------------- AdaLoRA


def adalora(**changes: Any) -> Any:
    fields = {"init_r": 6, "target_r": 4, "lora_alpha": 12, "target_modules": ["q_proj"], "total_step": 10}
    return AdaLoraConfig(**{**fields, **changes})


def test_adalora_is_judged_with_its_own_rank_and_factors() -> None:
    config = adalora(task_type="CAUSAL_LM")
    assert not check_config(config, llama()).findings
    model = get_peft_model(llama(), config)
    assert not check_model(model, expect=Expect(fresh=True)).findings
    assert not loud(check_training(model, BATCH))


def test_a_scaling_of_adalora_is_alpha_over_its_rank() -> None:
    loudly = check_config(adalora(lora_alpha=300), linears())
    (found,) = loudly.warnings
    assert (found.code, found.observed) == ("LORA103", "r=6 with alpha=300: the scaling is 300/6 = 50")


def test_a_singular_value_that_is_frozen_at_zero_is_told() -> None:
    model = get_peft_model(linears(), adalora())
    for name, parameter in model.named_parameters():
        if "lora_E" in name:
            parameter.requires_grad_(False)
    assert "LORA224" in {f.code for f in check_model(model).errors}


def test_numbers_that_are_not_finite_are_found_in_every_tensor_of_a_variant() -> None:
    for part in ("lora_A", "lora_B", "lora_E"):
        model = get_peft_model(linears(), adalora())
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if part in n)[0, 0] = torch.nan
        assert "LORA207" in {f.code for f in check_model(model).errors}, part


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_without_a_norm_under_dora_are_told(transposed: bool) -> None:
    base: nn.Module = nn.Sequential(Conv1D(16, 16) if transposed else nn.Linear(16, 16))
    weight = next(base.parameters()).data
    (weight.T if transposed else weight)[:3] = 0
    fields: dict[str, Any] = {"r": 4, "target_modules": ["0"], "fan_in_fan_out": transposed}
    assert not check_model(get_peft_model(copy.deepcopy(base), LoraConfig(**fields))).errors
    model = get_peft_model(base, LoraConfig(**fields, use_dora=True))
    assert not model(torch.ones(1, 16)).isfinite().all()
    (finding,) = check_model(model).errors
    assert finding.code == "LORA207"
    assert "3 rows of these base weights are zero, and DoRA divides" in finding.observed
    assert "leave 0 out of target_modules" in finding.fix
    step = check_training(model, torch.ones(1, 16), loss_fn=lambda net, x: net(x).sum(), select=["LORA310"])
    assert "DoRA divides by the norm of rows that are zero: 0" in step.errors[0].observed
    layer: Any = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_B["default"].weight[:3] = 0.1  # an update gives the rows a norm
    assert model(torch.ones(1, 16)).isfinite().all()
    assert not check_model(model).errors
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
        layer.base_layer.weight[:] = 0.5  # a magnitude that somebody set to zero
    assert model(torch.ones(1, 16)).isfinite().all()
    assert not check_model(model).errors


def test_an_optimizer_without_the_other_factor_of_adalora_is_told() -> None:
    model = get_peft_model(linears(), adalora())
    held = [p for n, p in model.named_parameters() if "lora_A" in n or "lora_E" in n]
    found = check_model(model, optimizer=torch.optim.AdamW(held, lr=1e-3)).findings
    assert [(f.code, f.severity) for f in found] == [("LORA301", "warning")]


def test_ranks_that_adalora_took_away_are_no_fault(tmp_path: Path) -> None:
    config = adalora(init_r=6, target_r=1, total_step=12, tinit=1, tfinal=2, task_type="CAUSAL_LM")
    model: Any = get_peft_model(llama(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, 12):
        model(**BATCH).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    assert not loud(check_model(model, expect=Expect(fresh=False)))
    path = saved(model, tmp_path)
    again = PeftModel.from_pretrained(llama(), str(path), is_trainable=True)
    ranks = [layer.rank for layer in model_facts(again).layers]
    assert ranks
    assert max(ranks) < 6
    assert not loud(check_model(again, expect=Expect(fresh=False)))


def test_adalora_merges_reloads_and_keeps_the_laws() -> None:
    model = get_peft_model(llama(), adalora(task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_E" in name:
            nn.init.normal_(parameter)
    assert_merge_exact(model, {"input_ids": IDS})
    assert_reload_exact(model, BATCH)
    assert_lora_laws(model, {"input_ids": IDS})


# ---------------------------------------------------------------------------------------------- X-LoRA and mixtures


@pytest.fixture
def mixture(tmp_path: Path) -> Any:
    for seed in range(2):
        expert = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        torch.manual_seed(seed)
        for name, parameter in expert.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter)
        expert.save_pretrained(tmp_path / str(seed))
    experts = {str(seed): str(tmp_path / str(seed)) for seed in range(2)}
    return get_peft_model(
        llama(), XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_depth=1, adapters=experts)
    )


def test_frozen_experts_under_a_classifier_that_trains_are_meant(mixture: Any) -> None:
    assert not loud(check_model(mixture))
    assert "LORA313" not in loud(check_training(mixture, BATCH))
    mixture.base_model.internal_xlora_classifier.requires_grad_(False)
    assert "LORA201" in loud(check_model(mixture))


def test_a_mixture_is_refused_by_name_where_one_adapter_is_asked_for(mixture: Any) -> None:
    for call in (assert_merge_exact, assert_reload_exact, assert_lora_laws):
        with pytest.raises(ValueError, match="X-LoRA weighs its adapters"):
            call(mixture, BATCH)


@pytest.mark.parametrize("both", [False, True])
def test_another_method_over_lora_leaves_the_lora_below_it_in_sight(both: bool) -> None:
    first = LoraConfig(r=2, target_modules=["q_proj", "v_proj"] if both else ["q_proj"])
    model: Any = get_peft_model(linears(), first, adapter_name="a", mixed=True)
    model.add_adapter("b", LoHaConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter(["a", "b"])
    assert not loud(check_model(model))


def test_adalora_over_lora_is_seen_beside_the_lora_below_it() -> None:
    model: Any = get_peft_model(linears(), LoraConfig(r=2, target_modules=["q_proj"]), "a", mixed=True)
    model.add_adapter(
        "b", AdaLoraConfig(init_r=2, target_r=1, total_step=9, target_modules=["q_proj", "v_proj"])
    )
    model.set_adapter(["a", "b"])
    assert not loud(check_model(model))
    seen = {(layer.adapter, layer.module) for layer in model_facts(model).layers}
    assert {adapter for adapter, module in seen if module == "q_proj"} == {"a", "b"}
    assert count_parameters(model).trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


# ---------------------------------------------------------------------------------------------- names of users


class Named(nn.Module):
    """A user's model with children that are called as wrappers call what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(64, 64))
        self.pretrained_model = nn.Sequential(nn.Linear(64, 64))
        self.head = nn.Linear(64, 64)


@pytest.mark.parametrize("targets", [["head"], ["module.0"], ["0"], "all-linear"])
def test_children_called_as_those_of_wrappers_are_parts_of_the_base(targets: Any, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    report = check_config(config, Named())
    assert loud(report) == ["LORA116"]
    model: Any = get_peft_model(Named(), copy.deepcopy(config))
    assert not loud(check_model(model))
    path = saved(model, tmp_path)
    assert not loud(check_checkpoint(path, Named()))
    if targets != ["0"]:  # where every key begins so, only a base can tell the two apart
        assert not loud(check_checkpoint(path))


@pytest.mark.parametrize("wrap", [nn.DataParallel])
def test_a_wrapper_of_torch_is_taken_off_a_plain_base(wrap: Any) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], rank_pattern={"^q_proj": 2})
    assert not check_config(config, wrap(linears())).findings


# ---------------------------------------------------------------------------------------------- kinds of layers


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(32, 4, batch_first=True)
        self.lin = nn.Linear(32, 32)


@pytest.mark.parametrize("rank_pattern", [{}, {"attn": 2}])
def test_a_saved_attention_is_sound_judged_alone(tmp_path: Path, rank_pattern: dict[str, int]) -> None:
    config = LoraConfig(
        r=4, target_modules=["attn", "lin"], rank_pattern=rank_pattern, init_lora_weights=False
    )
    path = saved(get_peft_model(Attention(), config), tmp_path)
    assert not loud(check_checkpoint(path))
    assert not loud(check_checkpoint(path, Attention()))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_saved_convolution_in_groups_is_sound(tmp_path: Path, groups: int) -> None:
    base = nn.ModuleDict({"c": nn.Conv2d(8, 8, 3, groups=groups)})
    config = LoraConfig(r=4, target_modules=["c"], init_lora_weights=False)
    path = saved(get_peft_model(copy.deepcopy(base), config), tmp_path)
    assert not loud(check_checkpoint(path))
    assert not loud(check_checkpoint(path, base))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(4, 64, 64))


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (nn.Conv1d(64, 64, 9), False),
        (nn.Bilinear(32, 32, 32), False),
        (nn.ParameterDict({"positions": torch.zeros(1, 512, 64)}), False),
        (Experts(), True),
    ],
    ids=["kernel", "bilinear", "positions", "experts"],
)
def test_only_stacked_experts_are_experts(part: nn.Module, told: bool) -> None:
    report = check_config(LoraConfig(r=4, target_modules="all-linear"), linears(part=part))
    assert ("LORA129" in {f.code for f in report.findings}) == told


class Mixture(nn.Module):
    """Routed experts in two parameters, and one shared expert of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.zeros(4, 64, 128))
        self.experts.down_proj = nn.Parameter(torch.zeros(4, 64, 64))
        self.shared = linears(up_proj=nn.Linear(64, 64), down_proj=nn.Linear(64, 64))


@pytest.mark.parametrize(
    ("fields", "left"),
    [
        ({"target_modules": ["q_proj", "up_proj"]}, "1 fused parameters: experts.gate_up_proj"),
        ({"target_modules": ["up_proj", "down_proj"]}, "2 fused parameters"),
        ({"target_modules": ["q_proj"]}, None),
        ({"target_modules": ["q_proj", "shared.up_proj", "shared.down_proj"]}, None),
        ({"target_modules": ["up_proj"], "target_parameters": ["experts.gate_up_proj"]}, None),
    ],
)
def test_names_of_fused_experts_that_match_another_module(fields: dict[str, Any], left: str | None) -> None:
    report = check_config(LoraConfig(r=4, lora_alpha=8, **fields), Mixture())
    assert [left in f.where for f in report.warnings if f.code == "LORA129"] == ([True] if left else [])


@pytest.mark.skipif(
    not FUSED_BY_PEFT, reason="this version of PEFT takes no names of modules for fused experts"
)
@pytest.mark.parametrize(
    ("targets", "left"),
    [
        (["o_proj", "gate_proj", "up_proj", "down_proj"], 6),
        (["o_proj", "down_proj"], 2),
        ("all-linear", 6),
        (r".*\.(o_proj|gate_proj|up_proj|down_proj)", 6),
        (["o_proj"], 0),
        (["o_proj", "kv_b_proj"], 0),
    ],
)
def test_names_that_peft_takes_for_fused_experts_alone(targets: Any, left: int) -> None:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM")
    found = [f.where for f in check_config(config, made("shared_experts")).findings if f.code == "LORA138"]
    assert [int(where.partition(" ")[0]) for where in found] == ([left] if left else [])


@pytest.mark.skipif(
    not FUSED_BY_PEFT, reason="this version of PEFT takes no names of modules for fused experts"
)
@pytest.mark.parametrize(
    ("name", "severity"),
    [("shared_experts.down_proj", "warning"), ("experts.down_proj", "info"), ("down_proj", "info")],
)
def test_a_name_of_shared_experts_that_peft_takes_for_the_routed_ones(name: str, severity: str) -> None:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["o_proj", name], task_type="CAUSAL_LM")
    found = [f for f in check_config(config, made("shared_experts")).findings if f.code == "LORA138"]
    assert [f.severity for f in found] == [severity]


@pytest.mark.skipif(
    not FUSED_BY_PEFT, reason="this version of PEFT takes no names of modules for fused experts"
)
@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"]}, True),
        ({"target_modules": ["o_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}, False),
        (
            {"target_modules": ["o_proj", "down_proj"], "exclude_modules": r".*mlp\.down_proj|.*shared.*"},
            False,
        ),
    ],
)
def test_a_model_that_carries_adapters_on_fused_experts(fields: dict[str, Any], told: bool) -> None:
    """PEFT leaves its own form of the configuration; the joint rank of two projections tells where it is from."""
    config = LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **fields)
    model: Any = get_peft_model(AutoModelForCausalLM.from_config(made("shared_experts")), config)
    assert ("LORA138" in {f.code for f in check_model(model).findings}) == told


@pytest.mark.parametrize(("rank", "alpha", "told"), [(128, 8, True), (64, 8, False), (256, 16, False)])
def test_the_alpha_of_peft_at_a_high_rank(rank: int, alpha: int, told: bool) -> None:
    base = nn.ModuleDict({"q_proj": nn.Linear(512, 512)})
    report = check_config(LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q_proj"]), base)
    assert ("LORA102" in {f.code for f in report.warnings}) == told


# ---------------------------------------------------------------------------------------------- initialisations


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rank", [4, 80])
def test_what_peft_initialises_to_the_same_numbers_again_is_sound(
    tmp_path: Path, init: str, rank: int
) -> None:
    """Also above the rank that the matrix has, where these find fewer."""
    base = linears()
    originals = copy.deepcopy(base), copy.deepcopy(base)
    model: Any = get_peft_model(
        base, LoraConfig(r=rank, lora_alpha=rank, target_modules=["q_proj"], init_lora_weights=init)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.01
    assert "LORA230" not in loud(check_model(model))
    path = saved(model, tmp_path)
    inputs = torch.randn(3, 64)
    again: Any = PeftModel.from_pretrained(originals[0], str(path))
    assert torch.equal(again.base_model.model["q_proj"](inputs), model.base_model.model["q_proj"](inputs))
    for report in (check_checkpoint(path), check_checkpoint(path, originals[1])):
        assert {"LORA443", "LORA431", "LORA433"}.isdisjoint(loud(report))


@pytest.mark.parametrize(
    ("init", "told"), [("pissa", True), ("olora", True), ("gaussian", False), (True, False)]
)
def test_an_adapter_that_rewrites_the_base_under_another_is_told(init: Any, told: bool) -> None:
    model: Any = get_peft_model(linears(), LoraConfig(r=4, target_modules=["q_proj"]))
    assert not loud(check_model(model))
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init))
    report = check_model(model, expect=Expect(purpose="inference"))
    assert ("LORA246" in loud(report)) == told


def test_one_adapter_alone_may_rewrite_its_base() -> None:
    model = get_peft_model(linears(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    assert "LORA246" not in loud(check_model(model))


@pytest.mark.parametrize(
    ("rank", "alpha", "told"),
    [
        (1, 32, False),
        (1, 33, True),
        (4, 32, False),
        (4, 40, True),
        (16, 48, False),
        (16, 64, True),
        (256, 16, False),
    ],
)
def test_rslora_is_held_to_the_limit_of_lora_at_rank_one(rank: int, alpha: int, told: bool) -> None:
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q_proj"], use_rslora=True)
    base = nn.ModuleDict({"q_proj": nn.Linear(512, 512)})
    assert ("LORA103" in loud(check_config(config, base))) == told
    plain = LoraConfig(r=1, lora_alpha=alpha, target_modules=["q_proj"])
    if rank == 1:
        assert loud(check_config(config, base)) == loud(check_config(plain, base))


# ---------------------------------------------------------------------------------------------- tied weights


def test_tied_copies_on_both_sides_are_what_transformers_makes_of_them(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model: Any = get_peft_model(llama(tie_word_embeddings=True), config)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += torch.randn_like(parameter)
    told = "LORA213" in loud(check_model(model, expect=Expect(will_merge=True)))
    assert not loud(check_model(model))
    wanted = model(IDS).logits
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, wanted) != told
    assert told == TIES_WHAT_DIFFERS


def test_tied_targets_on_both_sides_are_told_apart_from_one_side() -> None:
    base = llama(tie_word_embeddings=True)
    (found,) = check_config(LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]), base).errors
    assert found.code == "LORA113"
    assert "share one weight" in found.observed


class SharedBlocks(nn.Module):
    """Two layers over one weight, as the shared blocks of Zamba are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def test_adapters_over_one_weight_are_told_where_they_will_be_merged() -> None:
    config = LoraConfig(r=4, target_modules=["first", "second"], init_lora_weights=False)
    merged = Expect(will_merge=True)
    assert "LORA113" not in loud(check_config(config, SharedBlocks()))
    assert "LORA113" in loud(check_config(config, SharedBlocks(), expect=merged))
    model: Any = get_peft_model(SharedBlocks(), config)
    assert "LORA113" not in loud(check_model(model))
    x = torch.ones(2, 16)
    wanted = model(x)
    assert not torch.allclose(model.merge_and_unload()(x), wanted, atol=1e-3)
    alone = LoraConfig(r=4, target_modules=["second"])
    assert "LORA113" in loud(check_config(alone, SharedBlocks())), "one side alone"


# ---------------------------------------------------------------------------------------------- other loaders and tools


@pytest.mark.parametrize("headless", [False, True])
def test_an_adapter_of_the_model_with_or_without_its_head(tmp_path: Path, headless: bool) -> None:
    """PEFT finds no module; transformers' load_adapter does, from version 5 on."""
    made, other = (llama().model, llama()) if headless else (llama(), llama().model)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model: Any = get_peft_model(made, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    path = saved(model, tmp_path)
    (found,) = [f for f in check_checkpoint(path, other).findings if f.code == "LORA451"]
    wanted = made(IDS)[0] if headless else made.model(IDS)[0]
    other.load_adapter(str(path))
    got = (other.model if headless else other)(IDS)[0]
    assert torch.allclose(got, wanted) == (found.severity == "info") == READS_OTHER_PREFIXES


def test_an_adapter_of_mlx_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(
            {"fine_tune_type": "lora", "lora_parameters": {"rank": 16, "scale": 20.0}, "num_layers": 16}
        )
    )
    (tmp_path / "adapters.safetensors").write_bytes(b"")
    (found,) = check_checkpoint(tmp_path).findings
    assert (found.code, found.severity) == ("LORA415", "warning")
    assert "mlx-lm" in found.observed
    assert "convert it" in found.fix


def test_a_base_in_the_folder_of_its_adapter_is_a_base(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    base = LlamaForCausalLM.from_pretrained(tmp_path)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path)
    assert loud(check_checkpoint(tmp_path)) == ["LORA405"]


def test_all_linear_on_a_base_without_linear_layers_is_not_advised_again() -> None:
    report = check_config(LoraConfig(target_modules="all-linear"), nn.Sequential(nn.Conv2d(3, 8, 3)))
    (found,) = report.errors
    assert "no linear layers" in found.fix
    assert "all-linear" not in found.fix


def test_names_of_experts_that_are_fused_lead_to_their_parameters() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"])
    (found,) = check_config(config, linears(experts=Experts())).errors
    assert "target_parameters=['experts.up']" in found.fix


VELORA = "velora_config" in {field.name for field in dataclasses.fields(LoraConfig)}


@pytest.mark.skipif(not VELORA, reason=f"PEFT {Version(peft.__version__)} has no VeLoRA")
def test_velora_is_taken() -> None:
    from peft.tuners.lora.config import VeloraConfig

    config = LoraConfig(
        r=2, target_modules=["q_proj"], velora_config=VeloraConfig(num_groups=2, init_type="random")
    )
    assert not check_config(config, linears()).findings
