"""Several adapters on one model: shared tensors, sums of others; and bases that were never loaded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pytest_lora import Expect, check_model
from pytest_lora.bases.examples.models import BASES
from pytest_lora.inspection.adapters_beside import combined_adapters
from pytest_lora.inspection.base import base_parameters
from pytest_lora.inspection.base_values import read_base
from pytest_lora.inspection.peft_internals import lora_configs
from pytest_lora.inspection.survey import survey

pytestmark = pytest.mark.filterwarnings("ignore")


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"q_proj": nn.Linear(16, 16), "v_proj": nn.Linear(16, 16)})


def adapted(*names: str, **fields: Any) -> Any:
    """A model with adapters whose factors are all random."""
    fields = {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
        "init_lora_weights": False,
    } | fields
    model: Any = get_peft_model(plain(), LoraConfig(**fields))
    for name in names:
        model.add_adapter(name, LoraConfig(**fields))
    return model


def copied(model: Any, name: str) -> None:
    own = dict(model.named_parameters())
    for key, parameter in own.items():
        if f".{name}" in key:
            parameter.data = own[key.replace(f".{name}", ".default")].data.clone()


def combined(model: Any) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    found = survey(model)
    return {c.adapter: (c.sources, c.kinds) for c in combined_adapters(found.lora, lora_configs(found.root))}


@pytest.mark.parametrize("kind", ["linear", "cat"])
@pytest.mark.parametrize("field", ["use_rslora", "use_dora"])
def test_sums_of_adapters_are_known_by_their_factors(kind: str, field: str) -> None:
    model = adapted("second", **{field: True}, lora_alpha=8)
    if field == "use_dora":
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.data.mul_(1.1)
    model.add_weighted_adapter(["default", "second"], [1.0, 0.5], "both", combination_type=kind)
    assert combined(model) == {"both": (("default", "second"), (field,))}


def test_one_adapter_times_one_is_told_of_with_its_factor() -> None:
    model = adapted(use_rslora=True, r=16, lora_alpha=16)
    model.add_weighted_adapter(["default"], [1.0], "both", combination_type="linear")
    (finding,) = [
        f for f in check_model(model, expect=Expect(purpose="inference")).findings if f.code == "LORA258"
    ]
    assert "use_rslora scales it by 4 once more" in finding.observed


@pytest.mark.parametrize("fields", [{"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}])
def test_copies_averages_and_others_are_no_sums(fields: dict[str, bool]) -> None:
    model = adapted("copy", **fields)
    assert combined(model) == {}, "two adapters that have nothing to do with each other"
    copied(model, "copy")
    assert combined(model) == {}
    mean = adapted("second", "mean", **fields)
    own = dict(mean.named_parameters())
    for key, parameter in own.items():
        if ".mean" in key:
            parameter.data = (
                own[key.replace("mean", "default")] + own[key.replace("mean", "second")]
            ).data / 2
    assert combined(mean) == {}
    plain_sum = adapted("second")
    plain_sum.add_weighted_adapter(["default", "second"], [1.0, 0.5], "both", combination_type="linear")
    assert combined(plain_sum) == {}, "what PEFT combines as it should"


def both(weights: list[float], kind: str, **fields: Any) -> Any:
    model = adapted("second", **fields)
    try:
        model.add_weighted_adapter(["default", "second"], weights, "both", combination_type=kind)
    except ValueError as error:  # a root of a negative number
        pytest.skip(f"this version of PEFT combines with no negative weight: {error}")
    model.set_adapter("both")
    return model


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_of_factors_without_numbers_no_sum_is_told(fields: dict[str, Any]) -> None:
    model = both([1.0, 0.5], "linear", **fields)
    assert combined(model.to("meta")) == {}


def taken_off(model: Any) -> list[str]:
    report = check_model(model, expect=Expect(purpose="inference", fresh=False))
    return [f.observed for f in report.warnings if f.code == "LORA258"]


@pytest.mark.parametrize("fields", [{}, {"lora_alpha": 16}, {"use_rslora": True}])
@pytest.mark.parametrize("weight", [-1.0, -0.2])
def test_linear_takes_no_adapter_off(weight: float, fields: dict[str, Any]) -> None:
    model = both([1.0, weight], "linear", **fields)
    meant = missed = 0.0
    for layer in model.base_model.model.values():
        first, second, sum_of_both = (layer.get_delta_weight(n) for n in ("default", "second", "both"))
        scaling = layer.scaling["both"]  # rsLoRA scales the sum once more, which is told of by itself
        meant += float((first + weight * second).norm()) ** 2
        missed += float((sum_of_both / scaling - first - weight * second).norm()) ** 2
    (said,) = [words for words in taken_off(model) if "taken off" in words]
    assert "'default', 'second' with 'second' taken off" in said
    assert f"is {(missed / meant) ** 0.5:.0%} of that difference away" in said


@pytest.mark.parametrize(
    ("weights", "kind"),
    [([1.0, -1.0], "cat"), ([1.0, -1.0], "svd"), ([0.7, 0.3], "linear"), ([1.0, 1.0], "linear")],
)
def test_what_is_combined_as_asked_is_left_alone(weights: list[float], kind: str) -> None:
    """``cat`` is what the fix asks for; a positive average by factors is what ``linear`` is chosen for."""
    assert not taken_off(both(weights, kind))


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}])
def test_adapters_that_are_not_finite_are_not_added_up(fields: dict[str, bool]) -> None:
    model = adapted("second", "third", **fields)
    for name, parameter in model.named_parameters():
        if ".third" in name and "lora_B" in name:
            parameter.data[0, 0] = float("nan")
    assert combined(model) == {}


def shared(model: Any, *parts: str) -> list[str]:
    for module in model.modules():
        for part in parts if hasattr(module, "lora_A") else ():
            factor = getattr(module, part)
            factor["second"].weight = factor["default"].weight
    return [f.code for f in check_model(model).findings if f.code == "LORA257"]


def test_adapters_that_are_one_are_told_and_copies_are_not() -> None:
    assert shared(adapted("second"), "lora_A", "lora_B") == ["LORA257"]
    assert shared(adapted("second"), "lora_A") == [], "a common lora_A is a choice"
    twin = adapted("second")
    copied(twin, "second")
    assert shared(twin) == []
    served = adapted("second").requires_grad_(requires_grad=False)
    assert shared(served, "lora_A", "lora_B") == [], "two names for one adapter that nothing trains"


def zeros(base: nn.Module, *names: str) -> tuple[str, ...]:
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if any(part in name for part in names):
                parameter.zero_()
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"]))
    found = survey(model)
    return read_base(base_parameters(found), "model.embed_tokens").zero


def test_parts_of_a_base_that_were_never_loaded() -> None:
    assert zeros(BASES["base"](), "layers.1.") == ("model.layers.1",)
    assert zeros(BASES["base"](), "embed_tokens") == ("model.embed_tokens",)
    everything = zeros(BASES["base"](), "")
    assert everything[0] == "model.embed_tokens"
    assert len(everything) > 2


@pytest.mark.parametrize(("matrices", "told"), [(2, ()), (3, ("layers.0",))])
def test_a_block_is_told_from_a_few_matrices_on(matrices: int, told: tuple[str, ...]) -> None:
    def block() -> nn.Module:
        return nn.ModuleList(nn.Linear(2, 2) for _ in range(matrices))

    base = nn.ModuleDict(
        {"layers": nn.ModuleList([block(), block()]), "q_proj": nn.Linear(2, 2), "v_proj": nn.Linear(2, 2)}
    )
    assert zeros(base, "layers.0.") == told


@pytest.mark.parametrize(
    "on_purpose",
    [(), ("o_proj", "down_proj"), ("norm",), ("lm_head",), ("layers.1.self_attn", "layers.1.mlp")],
    ids=["nothing", "added blocks", "norms", "a new head", "a pruned block"],
)
def test_zeros_on_purpose_are_no_news(on_purpose: tuple[str, ...]) -> None:
    assert zeros(BASES["base"](), *on_purpose) == ()


def test_weights_without_values_are_no_zeros() -> None:
    base = BASES["base"]().to("meta")
    assert zeros(base) == ()
    gates = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)))
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.zero_()
    holder = nn.ModuleDict({"zero": gates, "q_proj": nn.Linear(4, 4), "v_proj": nn.Linear(4, 4)})
    assert zeros(copy.deepcopy(holder)) == ()


def test_the_diagonal_of_kasa_is_not_in_a_sum() -> None:
    lora = pytest.importorskip("peft.tuners.lora.config")
    if not hasattr(lora, "KasaConfig"):
        pytest.skip("this version of PEFT has no KaSA")
    model = adapted(kasa_config=lora.KasaConfig())
    for name, parameter in model.named_parameters():
        if "diag" in name:
            parameter.data.fill_(0.3)
    model.add_weighted_adapter(["default"], [1.0], "both", combination_type="linear")
    assert combined(model) == {"both": (("default",), ("kasa_config",))}
    twin = adapted("second", kasa_config=lora.KasaConfig())
    copied(twin, "second")
    assert combined(twin) == {}
