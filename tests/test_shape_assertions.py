"""What the assertions on ratio, scaling and shapes say, word for word."""

from __future__ import annotations

import math
import re
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pytest_lora import LoraHealthError, assert_adapter_shapes, assert_alpha_ratio, assert_param_ratio
from pytest_lora.inspection.properties import target_facts

CONFIG = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=50,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(**fields: Any) -> PeftModel:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **fields}
    model = get_peft_model(LlamaForCausalLM(CONFIG), LoraConfig(**settings))
    assert isinstance(model, PeftModel)
    return model


def lora(model: PeftModel, layer: int, name: str) -> Any:
    return model.get_submodule(f"base_model.model.model.layers.{layer}.self_attn.{name}")


def failure(caught: pytest.ExceptionInfo[LoraHealthError]) -> str:
    return str(caught.value)


# Ratio: 1,024 of 24,864 parameters are 4.118 %.


@pytest.mark.parametrize(
    ("low", "high", "fix"),
    [
        (0.0005, 0.01, "lower r, adapt fewer modules, or, if so many are meant, high=0.0416"),
        (0.05, 0.5, "raise r, adapt more modules, or, if so few are meant, low=0.0408"),
    ],
)
def test_ratio_outside_the_band(low: float, high: float, fix: str) -> None:
    model = adapted()
    with pytest.raises(LoraHealthError) as caught:
        assert_param_ratio(model, low, high)
    assert failure(caught) == (
        "LORA901: PeftModel of LlamaForCausalLM: 1 error\n"
        "\n"
        "error[LORA901]: parameter ratio outside band\n"
        "  --> PeftModel\n"
        "  observed: 1,024 of 24,864 parameters are trainable: 4.118 %\n"
        f"  expected: {100 * low:g} % to {100 * high:g} % (low={low}, high={high})\n"
        f"  fix:      {fix}"
    )


def test_ratio_says_what_packed_storage_makes_of_it() -> None:
    base = LlamaForCausalLM(CONFIG)
    for name, module in list(base.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            layer = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
            layer.load_state_dict(module.state_dict())
            base.set_submodule(name, layer.to("cpu"))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with pytest.raises(LoraHealthError) as caught:
        assert_param_ratio(model)
    assert (
        "observed: 1,024 of 24,864 parameters are trainable: 4.118 % "
        "(a count of the 14,624 stored numbers, 4-bit weights packed, prints 7.002 %)"
    ) in failure(caught)
    assert assert_param_ratio(model, 0.0411, 0.0412).ok


def test_ratio_of_an_open_base_and_of_a_frozen_adapter() -> None:
    model = adapted()
    model.get_submodule("base_model.model.model.embed_tokens").requires_grad_(True)
    with pytest.raises(LoraHealthError, match="freeze the base: more trains than the adapters hold"):
        assert_param_ratio(model)
    model.requires_grad_(False)
    with pytest.raises(LoraHealthError, match=r"make the adapter trainable: .*is_trainable=True"):
        assert_param_ratio(model)


@given(st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_ratio_passes_exactly_inside_the_band(one: float, other: float) -> None:
    low, high = sorted((one, other))
    inside = low <= 1024 / 24864 <= high
    try:
        assert assert_param_ratio(MODEL, low, high).ok
    except LoraHealthError:
        assert not inside
    else:
        assert inside


MODEL = adapted()


@pytest.mark.parametrize(
    ("low", "high", "error", "message"),
    [
        ("0", 1, TypeError, "low must be a number, not '0'"),
        (0, True, TypeError, "high must be a number, not True"),
        (0.05, 1.5, ValueError, "high must be a fraction from 0 to 1 (0.01 is 1 %), not 1.5"),
        (-0.1, 1, ValueError, "low must be a fraction from 0 to 1 (0.01 is 1 %), not -0.1"),
        (math.nan, 1, ValueError, "low must be a fraction from 0 to 1 (0.01 is 1 %), not nan"),
        (0.5, 0.1, ValueError, "low must not be above high, but low=0.5 and high=0.1"),
    ],
)
def test_bad_bands_are_named(low: Any, high: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        assert_param_ratio(None, low, high)


# Scaling


def test_scaling_per_module_with_patterns() -> None:
    model = adapted(rank_pattern={"v_proj": 2})
    with pytest.raises(LoraHealthError) as caught:
        assert_alpha_ratio(model)
    assert failure(caught) == (
        "LORA902: PeftModel of LlamaForCausalLM: 1 error\n"
        "\n"
        "error[LORA902]: scaling is not the asserted one\n"
        "  --> 2 modules: model.layers.*.self_attn.v_proj\n"
        "  observed: scaling 4 (alpha 8 / rank 2)\n"
        "  expected: scaling 2 (expected=2.0)\n"
        "  fix:      an alpha of 4 (lora_alpha, or alpha_pattern for single modules), "
        "or expected=4 if this is meant"
    )
    assert assert_alpha_ratio(adapted(rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 4})).ok


def test_scaling_that_somebody_changed() -> None:
    model = adapted()
    lora(model, 1, "q_proj").scale_layer(3)
    with pytest.raises(LoraHealthError) as caught:
        assert_alpha_ratio(model)
    (finding,) = caught.value.report.errors
    assert finding.where == "model.layers.1.self_attn.q_proj"
    assert finding.observed == "scaling 6, though alpha 8 / rank 4 is 2"
    assert finding.fix == "undo what changed the scaling (scale_layer, set_scale) with unscale_layer"
    lora(model, 1, "q_proj").unscale_layer()
    assert assert_alpha_ratio(model).ok


def test_scaling_of_every_adapter() -> None:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj"]))
    with pytest.raises(LoraHealthError, match=r"2 modules: model\.layers\.\*\.self_attn\.q_proj") as caught:
        assert_alpha_ratio(model)
    assert caught.value.report.errors[0].observed == "scaling 1 (alpha 8 / rank 8)"


def test_scaling_of_a_config_alone() -> None:
    assert assert_alpha_ratio(LoraConfig(r=4, lora_alpha=8)).ok
    config = LoraConfig(
        r=4, lora_alpha=16, use_rslora=True, rank_pattern={"v_proj": 16}, alpha_pattern={"o_proj": 8}
    )
    with pytest.raises(LoraHealthError) as caught:
        assert_alpha_ratio(config, 8)
    assert [(f.where, f.observed) for f in caught.value.report.errors] == [
        ("modules of pattern 'v_proj'", "scaling 4 (alpha 16 / sqrt(rank 16))"),
        ("modules of pattern 'o_proj'", "scaling 4 (alpha 8 / sqrt(rank 4))"),
    ]
    with pytest.raises(LoraHealthError, match="modules without a pattern, modules of pattern 'v_proj'"):
        assert_alpha_ratio(LoraConfig(r=4, lora_alpha=4, alpha_pattern={"v_proj": 4}))
    with pytest.raises(LoraHealthError, match=r"(?m)^  --> all modules$"):
        assert_alpha_ratio(LoraConfig(r=4, lora_alpha=4))


@given(
    r=st.integers(1, 64),
    alpha=st.integers(1, 128),
    rslora=st.booleans(),
    ranks=st.dictionaries(st.sampled_from(LINEAR), st.integers(1, 16), max_size=3),
    alphas=st.dictionaries(st.sampled_from(LINEAR), st.integers(1, 64), max_size=3),
)
@settings(max_examples=15, deadline=None)
def test_config_and_model_have_the_same_scalings(
    r: int, alpha: int, rslora: bool, ranks: dict[str, int], alphas: dict[str, int]
) -> None:
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        use_rslora=rslora,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        target_modules=LINEAR,
    )
    impossible = 12_345.0
    told = []
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(CONFIG), config)
    for subject in (config, model):
        with pytest.raises(LoraHealthError) as caught:
            assert_alpha_ratio(subject, impossible)
        told.append({f.observed.partition(" (")[0] for f in caught.value.report.errors})
    by_config, by_model = told
    assert by_model <= by_config
    assert by_config == by_model


@pytest.mark.parametrize(
    ("subject", "expected", "error", "message"),
    [
        (None, "2", TypeError, "expected must be a number, not '2'"),
        (None, 0, ValueError, "expected must be a finite number above 0, not 0"),
        (None, math.inf, ValueError, "expected must be a finite number above 0, not inf"),
        (7, 2.0, TypeError, "model_or_config must be a model with LoRA layers or a LoraConfig, not 7"),
        (nn.Linear(2, 2), 2.0, TypeError, "model_or_config must carry LoRA layers, but this Linear has none"),
        (
            LoraConfig(rank_pattern={"q_proj": 0}),
            2.0,
            ValueError,
            "model_or_config: a rank must be at least 1, but one is 0",
        ),
    ],
)
def test_bad_scaling_arguments_are_named(
    subject: Any, expected: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        assert_alpha_ratio(subject, expected)


# Shapes


SHAPES: dict[str, tuple[nn.Module, dict[str, Any]]] = {
    "linear": (nn.Sequential(nn.Linear(6, 10)), {"target_modules": ["0"]}),
    "embedding": (nn.Sequential(nn.Embedding(9, 6)), {"target_modules": ["0"]}),
    "conv2d": (nn.Sequential(nn.Conv2d(4, 8, 3)), {"target_modules": ["0"]}),
    "grouped conv2d": (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), {"target_modules": ["0"]}),
    "attention": (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1),
        {"target_modules": ["self_attn"]},
    ),
    "dora": (nn.Sequential(nn.Linear(6, 10)), {"target_modules": ["0"], "use_dora": True}),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_shapes_that_peft_makes_fit(kind: str) -> None:
    base, fields = SHAPES[kind]
    assert assert_adapter_shapes(get_peft_model(base, LoraConfig(r=4, **fields))).ok


def test_factors_of_another_rank() -> None:
    model = adapted()
    for layer in (0, 1):
        lora(model, layer, "q_proj").lora_A["default"].weight = nn.Parameter(torch.zeros(8, 32))
    with pytest.raises(LoraHealthError) as caught:
        assert_adapter_shapes(model)
    assert failure(caught) == (
        "LORA903: PeftModel of LlamaForCausalLM: 1 error\n"
        "\n"
        "error[LORA903]: adapter shapes do not fit\n"
        "  --> 2 modules: model.layers.*.self_attn.q_proj\n"
        "  observed: lora_A is 8 x 32\n"
        "  expected: 4 x 32: rank 4, base 32 -> 32\n"
        "  fix:      build the adapter on this base with this rank; weights of another one were put in"
    )


def test_a_factor_without_its_second_dimension() -> None:
    model = adapted()
    lora(model, 0, "v_proj").lora_B["default"].weight = nn.Parameter(torch.zeros(128))
    with pytest.raises(LoraHealthError, match=r"observed: lora_B is 128\n  expected: 32 x 4: rank 4"):
        assert_adapter_shapes(model)


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj", "v_proj"],
        ("self_attn.v_proj", "self_attn.q_proj"),
        {f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qv"},
        r".*\.(q|v)_proj",
        None,
    ],
)
def test_targets_as_peft_writes_them(targets: Any) -> None:
    assert assert_adapter_shapes(MODEL, targets).ok


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_all_linear_is_what_peft_takes_for_it(task_type: str | None) -> None:
    assert assert_adapter_shapes(adapted(target_modules="all-linear", task_type=task_type), "all-linear").ok
    with pytest.raises(LoraHealthError, match=r"(?s)k_proj.*missing: no adapter here"):
        assert_adapter_shapes(MODEL, "all-linear")


def test_missing_and_unexpected_modules() -> None:
    with pytest.raises(LoraHealthError) as caught:
        assert_adapter_shapes(MODEL, ["q_proj", "k_proj"])
    assert failure(caught) == (
        "LORA905: PeftModel of LlamaForCausalLM: 2 errors\n"
        "\n"
        "error[LORA905]: adapted modules are not those named\n"
        "  --> 2 modules: model.layers.*.self_attn.k_proj\n"
        "  observed: missing: no adapter here\n"
        "  expected: one (targets=['q_proj', 'k_proj'])\n"
        "  fix:      add them to the adapter, target_modules=['q_proj', 'k_proj'], or take them out of the test, "
        "targets=['q_proj', 'v_proj']\n"
        "\n"
        "error[LORA905]: adapted modules are not those named\n"
        "  --> 2 modules: model.layers.*.self_attn.v_proj\n"
        "  observed: unexpected: there is an adapter here\n"
        "  expected: none (targets=['q_proj', 'k_proj'])\n"
        "  fix:      take them out of the adapter, target_modules=['q_proj', 'k_proj'], or add them to the test, "
        "targets=['q_proj', 'v_proj']"
    )


def test_what_is_adapted_is_named_by_last_parts_where_these_are_enough() -> None:
    first = ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.q_proj"]
    facts = target_facts(adapted(target_modules=first), "all-linear")
    assert facts.adapted == tuple(first)
    assert target_facts(MODEL, "all-linear").adapted == ("q_proj", "v_proj")
    with pytest.raises(
        LoraHealthError, match=r"test, targets=\['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate"
    ):
        assert_adapter_shapes(adapted(target_modules="all-linear"), ["q_proj"])
    with pytest.raises(LoraHealthError, match="test, by a regular expression"):
        assert_adapter_shapes(adapted(target_modules=r".*(self_attn|layers\.0.mlp).*_proj"), ["q_proj"])


def test_a_misspelt_target() -> None:
    with pytest.raises(LoraHealthError) as caught:
        assert_adapter_shapes(MODEL, ["q_proj", "v_proj", "gate_porj"])
    (finding,) = caught.value.report.errors
    assert finding.observed == "'gate_porj' names no module of the base"
    assert finding.fix.startswith("perhaps 'gate_proj'")


@given(st.sets(st.sampled_from(LINEAR), min_size=1), st.sets(st.sampled_from(LINEAR), min_size=1))
@settings(max_examples=15, deadline=None)
def test_passes_exactly_when_the_targets_are_those(adapt: set[str], want: set[str]) -> None:
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(CONFIG), LoraConfig(r=2, target_modules=adapt))
    try:
        assert assert_adapter_shapes(model, want).ok
    except LoraHealthError as error:
        told = {f.observed.partition(":")[0] for f in error.report.errors}
        wrong = {"missing": want - adapt, "unexpected": adapt - want}
        assert told == {kind for kind, names in wrong.items() if names}
    else:
        assert adapt == want


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (3, TypeError, "targets must be module names or a regular expression, not 3"),
        (["q_proj", 3], TypeError, "targets must be module names, but one is 3"),
        ([], ValueError, "targets must not be empty, got []"),
        ("", ValueError, "targets must not be empty, got ''"),
        ("(", ValueError, "targets: '(' is no regular expression: "),
    ],
)
def test_bad_targets_are_named(targets: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        assert_adapter_shapes(None, targets)


def test_a_model_without_adapters_is_no_pass() -> None:
    base = LlamaForCausalLM(CONFIG)
    for check in (assert_param_ratio, assert_alpha_ratio, assert_adapter_shapes):
        with pytest.raises(TypeError, match=r"^model(_or_config)? must carry LoRA layers, but this Llama"):
            check(base)
