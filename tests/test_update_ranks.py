"""What some steps change has the rank of the adapter, and a change of another rank is caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pytest_lora import LoraHealthError, assert_adapter_shapes, check_training
from pytest_lora.bases.examples.models import BASES, image_batch, language_batch
from pytest_lora.bases.tiny import load_tiny, text_batch

pytestmark = pytest.mark.filterwarnings("ignore")


def adapted(base: str = "base", **changes: Any) -> Any:
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **changes}
    return get_peft_model(BASES[base](), LoraConfig(**fields)).train()


def squares(model: Any, batch: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = model(batch)
    return output.pow(2).sum()


class Pooled(nn.Module):
    """One layer that a test names, and a loss of its output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Experts(nn.Module):
    """Four experts, stacked in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 12, 20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eio->beo", x, self.up)


def bare(layer: nn.Module, **changes: Any) -> Any:
    return get_peft_model(Pooled(layer), LoraConfig(r=2, target_modules=["layer"], **changes)).train()


LANGUAGE: dict[str, Callable[[], Any]] = {
    "linear": adapted,
    "4 bit": lambda: adapted("base_4bit"),
    "Conv1D of GPT-2": lambda: adapted("gpt2_base", target_modules=["c_attn"], fan_in_fan_out=True),
    "embedding": lambda: adapted(target_modules=["embed_tokens", "q_proj"]),
    "DoRA": lambda: adapted(use_dora=True),
    "rsLoRA with patterns": lambda: adapted(
        use_rslora=True, rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 32}
    ),
    "bfloat16": lambda: adapted().to(torch.bfloat16),
    "two active adapters": lambda: two_adapters(),
    "PiSSA": lambda: adapted(init_lora_weights="pissa"),
    "random": lambda: adapted(init_lora_weights=False),
}
SINGLE: dict[str, tuple[Callable[[], Any], Callable[[], torch.Tensor]]] = {
    "conv2d": (lambda: bare(nn.Conv2d(4, 12, 3)), lambda: torch.randn(2, 4, 8, 8)),
    "conv2d of 1 x 1": (lambda: bare(nn.Conv2d(8, 12, 1)), lambda: torch.randn(2, 8, 4, 4)),
    "grouped conv2d": (lambda: bare(nn.Conv2d(8, 12, 3, groups=2)), lambda: torch.randn(2, 8, 8, 8)),
    "conv1d": (lambda: bare(nn.Conv1d(4, 12, 3)), lambda: torch.randn(2, 4, 8)),
    "conv3d": (lambda: bare(nn.Conv3d(4, 12, 3)), lambda: torch.randn(2, 4, 4, 4, 4)),
    "wide linear, sketched": (lambda: bare(nn.Linear(600, 700)), lambda: torch.randn(8, 600)),
    "fused experts": (
        lambda: get_peft_model(
            Pooled(Experts()), LoraConfig(r=2, target_modules=[], target_parameters=["layer.up"])
        ).train(),
        lambda: torch.randn(8, 12),
    ),
}


def two_adapters() -> Any:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    return model


@pytest.mark.parametrize("build", LANGUAGE.values(), ids=LANGUAGE)
def test_healthy_language_models(build: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    report = assert_adapter_shapes(build(), batches=language_batch())
    assert not report.findings, str(report)


@pytest.mark.parametrize(("build", "batch"), SINGLE.values(), ids=SINGLE)
def test_healthy_layers(build: Callable[[], Any], batch: Callable[[], torch.Tensor]) -> None:
    torch.manual_seed(0)
    report = assert_adapter_shapes(build(), batches=[batch()], loss_fn=squares)
    assert not report.findings, str(report)


def test_the_built_in_base() -> None:
    model = get_peft_model(load_tiny(), LoraConfig(r=4, target_modules="all-linear"))
    assert not assert_adapter_shapes(model, "all-linear", batches=text_batch()).findings


def layer_of(model: Any) -> Any:
    return model.base_model.model.model.layers[0].self_attn.q_proj


def failure(model: Any, batch: Any = None, **options: Any) -> str:
    with pytest.raises(LoraHealthError) as caught:
        assert_adapter_shapes(model, batches=language_batch() if batch is None else batch, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "init"), [(torch.float32, True), (torch.bfloat16, True), (torch.float32, False)]
)
def test_a_base_weight_that_trains(dtype: torch.dtype, init: bool) -> None:
    model = adapted(init_lora_weights=init).to(dtype)
    layer_of(model).base_layer.weight.requires_grad_(True)
    allowed = 4 if init else 8
    message = failure(model)
    assert message.startswith("LORA904: ")
    assert "--> model.layers.0.self_attn.q_proj\n" in message
    assert f"allowed is {allowed}; the base weight underneath moved" in message
    rank = int(message.partition("has rank ")[2].partition(",")[0])
    assert rank > 2 * allowed
    assert f"expected: rank {allowed} at most" in message


def test_a_wide_base_weight_that_trains() -> None:
    model = bare(nn.Linear(600, 700))
    model.base_model.model.layer.base_layer.weight.requires_grad_(True)
    message = failure(model, [torch.randn(32, 600)], loss_fn=squares)
    assert "has rank 10, allowed is 2; the base weight underneath moved" in message


def test_packed_weights_that_move() -> None:
    model = adapted("base_4bit")

    def loss(model: Any, batch: Any) -> Any:
        layer_of(model).base_layer.weight.data[:4] += 1
        return model(**batch).loss

    assert "observed: the base weight underneath moved\n" in failure(model, loss_fn=loss)


def test_factors_of_more_than_the_stated_rank() -> None:
    """Shapes that fit what the layer says, and an adapter that does more than its factors."""
    model = adapted()
    layer = layer_of(model)
    grow = layer.get_delta_weight
    layer.get_delta_weight = lambda adapter: (
        grow(adapter) + torch.diag(layer.lora_B[adapter].weight.sum() * torch.ones(64))
    )
    message = failure(model)
    assert "has rank 64, allowed is 4\n" in message
    assert "what else writes into this weight" in message


def test_nothing_that_moves_is_no_proof() -> None:
    model = adapted()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert "no adapter moved in 2 steps" in failure(model)
    wrong = language_batch()
    wrong["labels"][0, 3] = 100_000
    assert "no step could be taken" in failure(adapted(), wrong)


def test_an_update_that_can_not_be_measured_is_said() -> None:
    model = adapted()
    layer = layer_of(model)

    def refuse(adapter: str) -> torch.Tensor:
        raise NotImplementedError

    layer.get_delta_weight = refuse
    assert not assert_adapter_shapes(model, batches=language_batch()).findings, "the factors tell it"

    layer.get_delta_weight = lambda adapter: torch.full((64, 64), float("nan"))
    (info,) = assert_adapter_shapes(model, batches=language_batch()).findings
    assert info.severity == "info"
    assert info.where == "model.layers.0.self_attn.q_proj"
    assert info.observed == "the rank of the update was not measured: it is not finite"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"steps": 1.5}, TypeError, "steps must be a whole number"),
        ({"loss_fn": 3, "batches": {}}, TypeError, "loss_fn must be called"),
        ({"loss_fn": squares}, ValueError, "loss_fn needs batches"),
    ],
)
def test_bad_arguments_are_named_before_any_work(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        assert_adapter_shapes(None, **options)


@pytest.mark.parametrize("batch", [3, "text", [], torch.ones(3)])
def test_a_batch_of_another_form(batch: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^batch"):
        assert_adapter_shapes(adapted(), batches=batch)


# Scales under another initialisation (LORA338).


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "orthogonal", False])
def test_scales_under_another_initialisation_are_one_info(init: Any) -> None:
    torch.manual_seed(0)
    report = check_training(adapted(init_lora_weights=init), language_batch())
    (info,) = report.findings
    assert (info.code, info.severity) == ("LORA338", "info")
    assert info.where == "4 modules: model.layers.*.self_attn.q_proj, model.layers.*.self_attn.v_proj"
    assert f"init_lora_weights={init}, 3 steps: model.layers.*.self_attn.q_proj: update " in info.observed


def test_the_scales_are_those_of_the_steps() -> None:
    """Against the same steps, taken by hand."""
    model, batch = (
        adapted(init_lora_weights=False, target_modules=["layers.0.self_attn.q_proj"]),
        language_batch(),
    )
    (info,) = check_training(model, batch, steps=2).findings
    layer = layer_of(model)
    before = layer.get_delta_weight("default").detach()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    gradient = sum(float(p.grad.pow(2).sum()) for p in model.parameters() if p.grad is not None) ** 0.5
    update = float((layer.get_delta_weight("default") - before).norm() / layer.base_layer.weight.norm())
    assert f"update {update:.2g} of the base weight, gradient {gradient:.2g}" in info.observed


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_usual_initialisations_are_silent(init: Any) -> None:
    assert not check_training(adapted(init_lora_weights=init), language_batch()).findings


def test_packed_weights_are_unpacked_for_their_norm() -> None:
    (info,) = check_training(adapted("base_4bit", init_lora_weights=False), language_batch()).findings
    shares = [float(part.split()[0]) for part in info.observed.split("update ")[1:]]
    assert all(0 < share < 1 for share in shares)


def test_batch_normalised_images_pass() -> None:
    model = adapted("batchnorm_base", target_modules=["conv"], modules_to_save=["head"])
    assert not assert_adapter_shapes(model, batches=image_batch()).findings
