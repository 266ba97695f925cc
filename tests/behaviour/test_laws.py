"""Laws of LoRA: kept by every kind of layer, and a planted breach of each is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from peft import LoHaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear, MultiheadAttention
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM

from pytest_lora import LoraHealthError, assert_lora_laws, check_lora_laws
from pytest_lora.bases.examples.models import image_batch
from pytest_lora.bases.tiny import load_tiny
from pytest_lora.strategies import lora_models
from tests.behaviour.test_roundtrip import BATCH, HEALTHY, adapted, assert_same, base, codes, state, trained


def convolution() -> nn.Module:
    config = LoraConfig(r=2, target_modules=["conv", "head"])
    return trained(get_peft_model(base("batchnorm_base"), config))


def grouped() -> nn.Module:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.LazyLinear(3))
    model(torch.randn(2, 4, 8, 8))
    return trained(get_peft_model(model, LoraConfig(r=2, target_modules=["0", "2"])))


def beside_another_method() -> nn.Module:
    """A model that PEFT cannot save, so that nothing is loaded."""
    first = LoraConfig(r=2, target_modules=["q_proj"])
    model = get_peft_model(base(), first, adapter_name="a", mixed=True)
    model.add_adapter("b", LoHaConfig(r=2, target_modules=["v_proj"]))
    model.set_adapter(["a", "b"])
    return trained(model)


class Attention(nn.Module):
    """What PEFT adapts as a whole: projections in one parameter, and one in a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.attention(x, x, x, need_weights=False)[0])
        return result


def attention() -> nn.Module:
    torch.manual_seed(0)
    model: Any = Attention()
    return trained(get_peft_model(model, LoraConfig(r=2, target_modules=["attention", "head"])))


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def experts() -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "vocab_size": 64,
        "num_hidden_layers": 1,
        "head_dim": 8,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    model = GptOssForCausalLM(GptOssConfig(**sizes, **heads))
    return trained(
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=EXPERTS))
    )


def in_8_bits() -> nn.Module:
    try:
        base = load_tiny(quantization="int8")
    except ValueError as refused:
        pytest.skip(str(refused))
    return trained(get_peft_model(base, LoraConfig(r=2, target_modules=["v_proj"])))


LAYERS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    **{name: (make, BATCH) for name, make in HEALTHY.items()},
    "Conv1D": (lambda: adapted("gpt2_base", target_modules=["c_attn"], fan_in_fan_out=True), BATCH),
    "Conv2d": (convolution, image_batch()),
    "Conv2d in groups": (grouped, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))),
    "MultiheadAttention": (attention, torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))),
    "experts in one parameter": (experts, BATCH),
    "8-bit": (in_8_bits, BATCH),
    "DoRA in 4 bits": (lambda: adapted("base_4bit", use_dora=True), BATCH),
    "all-linear": (lambda: adapted(target_modules="all-linear", use_rslora=True), BATCH),
    "ranks of their own": (lambda: adapted(rank_pattern={"q_proj": 7}), BATCH),
    "orthogonal": (lambda: adapted(init_lora_weights="orthogonal"), BATCH),
    "beside another method": (beside_another_method, BATCH),
    "PiSSA": (lambda: adapted(init_lora_weights="pissa"), BATCH),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_keeps_the_laws(name: str) -> None:
    make, batch = LAYERS[name]
    assert not assert_lora_laws(make(), batch).findings


@settings(
    max_examples=5,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(lora_models(base("base_4bit")))
def test_drawn_models_keep_the_laws(model: nn.Module) -> None:
    assert not check_lora_laws(model, BATCH).errors


@pytest.mark.parametrize("name", ["plain", "4-bit", "token rows"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = HEALTHY[name]().train()
    model(**BATCH).logits.sum().backward()
    before = state(model)
    check_lora_laws(model, BATCH)
    assert_same(state(model), before)


# ------------------------------------------------------------------ planted breaches


def broken(monkeypatch: pytest.MonkeyPatch, forward: Callable[..., torch.Tensor]) -> nn.Module:
    real = Linear.forward
    monkeypatch.setattr(Linear, "forward", lambda self, x, *a, **k: forward(self, real(self, x, *a, **k), x))
    return adapted()


def test_an_adapter_that_adds_more_than_its_product(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(layer: Any, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return out if layer.disable_adapters or layer.merged else out + 0.5

    with pytest.raises(LoraHealthError, match="LORA930"):
        assert_lora_laws(broken(monkeypatch, forward), BATCH)


def test_a_disabled_adapter_that_still_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = broken(monkeypatch, lambda layer, out, x: out + 0.5)
    assert "LORA931" in codes(check_lora_laws(model, BATCH))


def test_an_effect_that_is_squared(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(layer: Any, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        plain = layer.base_layer(x)
        return plain + (out - plain) ** 2 * 100 if not (layer.disable_adapters or layer.merged) else out

    assert "LORA932" in codes(check_lora_laws(broken(monkeypatch, forward), BATCH))


def test_a_forward_that_scales_by_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(layer: Any, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        plain = layer.base_layer(x)
        return plain + (out - plain) * layer.lora_A["default"].weight.shape[0]

    assert "LORA933" in codes(check_lora_laws(broken(monkeypatch, forward), BATCH))


@pytest.mark.parametrize(
    ("code", "factor"),
    [
        ("LORA932", lambda layer: layer.scaling["default"]),
        ("LORA933", lambda layer: layer.lora_A["default"].weight.shape[0]),
    ],
)
def test_an_attention_whose_update_is_another(
    monkeypatch: pytest.MonkeyPatch, code: str, factor: Callable[[Any], float]
) -> None:
    real = MultiheadAttention.get_delta_weight
    monkeypatch.setattr(
        MultiheadAttention, "get_delta_weight", lambda self, name: factor(self) * real(self, name)
    )
    model, batch = LAYERS["MultiheadAttention"]
    assert code in codes(check_lora_laws(model(), batch))


def test_adapters_that_share_state(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Linear.update_layer

    def update(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        real(self, adapter_name, *args, **kwargs)
        self.base_layer.weight.data += 1e-3

    model = adapted()
    monkeypatch.setattr(Linear, "update_layer", update)
    assert "LORA934" in codes(check_lora_laws(model, BATCH))


def test_a_merge_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: 2 * real(self, adapter))
    assert "LORA915" in codes(check_lora_laws(adapted(), BATCH))


def test_a_merge_that_peft_refuses_breaks_no_law() -> None:
    """An activated or biased LoRA is not made to be merged; ``check_merge`` is there to ask for it."""
    report = check_lora_laws(adapted(lora_bias=True), BATCH)
    assert not report.findings
    assert [(what, "PEFT refuses" in why) for why, what in report.not_judged] == [("merging", True)]


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (None, "PEFT refuses it: "),
        (KeyError("lost"), "no refusal of PEFT: KeyError: 'lost'"),
        (ValueError("of a hook"), "no refusal of PEFT: ValueError: of a hook"),
    ],
)
def test_only_a_refusal_of_peft_counts_as_one(
    monkeypatch: pytest.MonkeyPatch, raised: Exception | None, said: str
) -> None:
    """A second adapter that cannot be added breaks no law, and what was raised is told as what it is."""

    def failing(self: Any, *args: Any, **kwargs: Any) -> None:
        if raised is not None:
            raise raised

    def refusing(self: Any, config: Any) -> None:
        if config.init_lora_weights is False:
            not_a_config: Any = 1
            LoraConfig(r=2, layers_to_transform=[0], target_modules="q_proj", modules_to_save=not_a_config)

    model = adapted()
    if raised is not None:
        monkeypatch.setattr(type(model), "add_adapter", failing)
    else:
        monkeypatch.setattr(type(model.base_model), "_check_new_adapter_config", refusing)
    report = check_lora_laws(model, BATCH)
    assert not report.findings
    ((why, what),) = report.not_judged
    assert (what, said in why) == ("a second adapter", True)


def test_memory_that_runs_out_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()

    def exhausted(self: Any, *args: Any, **kwargs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(type(model), "add_adapter", exhausted)
    with pytest.raises(MemoryError):
        check_lora_laws(model, BATCH)


def test_a_second_adapter_does_not_replicate_layers_again() -> None:
    model = adapted(layer_replication=[(0, 2), (1, 2)])
    # The merge is off: replicated layers share the weight that each of their adapters is merged into.
    assert set(codes(check_lora_laws(model, BATCH))) == {"LORA915"}


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(TypeError, match="carry LoRA layers"):
        assert_lora_laws(base(), BATCH)
    with pytest.raises(TypeError, match="batch must be"):
        assert_lora_laws(adapted(), "text")
