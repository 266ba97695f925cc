"""float64 where a device has none, and float32 that is float32: Apple's GPUs and TF32, both played."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from pytest_lora import check_lora_laws, check_merge, check_reload, check_training
from pytest_lora.bases.examples.models import BASES, language_batch
from pytest_lora.inspection.behaviour import PIECE, distance
from pytest_lora.inspection.behaviour.merge import combination_error
from pytest_lora.inspection.peft_internals import SVD_SCALES_TWICE
from pytest_lora.inspection.state.precision import Float32Precision, in_float64, without_tf32

pytestmark = pytest.mark.filterwarnings("ignore")


class OnMps(Tensor):
    """A tensor that says it is on Apple's GPU, which has no float64."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__self__", None) is Tensor.device:
            return torch.device("mps", 0)
        if func is Tensor.cpu:
            with torch._C.DisableTorchFunctionSubclass():
                return args[0].as_subclass(Tensor)
        out = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(out, OnMps) and out.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return out


def on_mps(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(OnMps)


def test_float64_is_had_from_a_device_without_it() -> None:
    given = on_mps(torch.tensor([1.0, 2.5]))
    with pytest.raises(TypeError, match="float64"):
        given.double()
    assert torch.equal(in_float64(given), torch.tensor([1.0, 2.5], dtype=torch.float64))
    assert distance(given, on_mps(torch.tensor([1.0, 2.0]))) == 0.5


def trained(base: str = "base") -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(BASES[base](), config).eval()


@pytest.mark.parametrize("check", [check_merge, check_reload, check_lora_laws])
def test_behaviour_is_checked_on_apples_gpus(check: Callable[..., Any]) -> None:
    model = trained()
    head = model.base_model.model.lm_head
    head.register_forward_hook(lambda module, given, out: on_mps(out))
    batch = {name: tensor for name, tensor in language_batch().items() if name != "labels"}
    assert not check(model, batch).errors


def test_combinations_are_checked_on_apples_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained()
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "both", combination_type="cat")
    layers = [m for m in model.modules() if hasattr(m, "get_delta_weight")]
    for kind in {type(layer) for layer in layers}:
        real = kind.get_delta_weight
        monkeypatch.setattr(
            kind, "get_delta_weight", lambda self, name, _real=real: on_mps(_real(self, name))
        )
    assert combination_error(model, "both", {"default": 0.5, "other": 2.0}, "cat") is None


@pytest.mark.skipif(SVD_SCALES_TWICE, reason="this PEFT scales twice")
@pytest.mark.parametrize(("kind", "meant"), [("svd", True), ("cat", False)])
def test_only_the_best_approximation_may_lose_what_its_rank_cannot_hold(kind: str, meant: bool) -> None:
    """Of two updates of rank 4, a combination of rank 4 holds the half."""
    model = trained()
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "both", combination_type="svd", svd_rank=4)
    assert (combination_error(model, "both", {"default": 0.5, "other": 2.0}, kind) is None) == meant


def test_a_distance_takes_no_more_memory_than_a_piece() -> None:
    first = torch.zeros(2 * PIECE + 5, dtype=torch.int8)
    second = first.clone()
    second[-1] = 3
    assert distance(first, second) == 3.0
    second[0] = -9
    assert distance(first, second) == 9.0
    nan = torch.tensor([0.0, float("nan")])
    assert distance(nan, nan) == 0.0
    assert not distance(nan, torch.zeros(2)) <= 1e30


# ---------------------------------------------------------------------------------------- TF32


def tf32(tensor: Tensor) -> Tensor:
    """Rounded to the 10 bits of mantissa that TF32 multiplies."""
    return (
        (tensor.view(torch.int32) & ~0x1FFF).view(torch.float32) if tensor.dtype == torch.float32 else tensor
    )


@pytest.fixture
def _tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of matrices as an Ampere GPU computes them, where TF32 is on."""
    real = functional.linear

    def linear(given: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if torch.get_float32_matmul_precision() == "highest":
            return real(given, weight, bias)
        return real(tf32(given), tf32(weight), bias)

    monkeypatch.setattr(functional, "linear", linear)


def setting(old: str | None, new: str | None, convolutions: str | None) -> None:
    if old:
        torch.set_float32_matmul_precision(old)
    if new:
        torch.backends.cuda.matmul.fp32_precision = new
    if convolutions:
        torch.backends.cudnn.conv.fp32_precision = convolutions


SETTINGS = [
    (None, None, None),
    ("high", None, None),
    ("medium", None, None),
    (None, "tf32", None),
    (None, None, "ieee"),
    (None, "ieee", "tf32"),
]


@pytest.fixture
def _put_back() -> Any:
    before = Float32Precision()
    yield
    before.restore()


def switches() -> list[Any]:
    found: list[Any] = []
    for read in (torch.get_float32_matmul_precision, lambda: torch.backends.cudnn.allow_tf32):
        try:
            found.append(read())
        except RuntimeError:
            found.append(RuntimeError)
    return [*found, torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision]


@pytest.mark.usefixtures("_tensor_cores", "_put_back")
def test_tf32_is_no_error_of_the_merge() -> None:
    torch.manual_seed(0)
    base: Any = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))
    names = [str(i) for i in range(8)]
    model: Any = get_peft_model(base, LoraConfig(r=8, target_modules=names, init_lora_weights=False)).eval()
    batch = {"input": torch.randn(16, 256)}
    torch.set_float32_matmul_precision("high")
    before = switches()
    apart = distance(model(**batch), model.merge_and_unload()(batch["input"]))
    assert apart > 1e-4  # what TF32 alone makes of it
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))
    model = get_peft_model(base, LoraConfig(r=8, target_modules=names, init_lora_weights=False)).eval()
    assert not check_merge(model, batch).errors
    assert switches() == before


@pytest.mark.usefixtures("_put_back")
@pytest.mark.parametrize(("old", "new", "convolutions"), SETTINGS)
def test_switches_are_off_inside_and_as_they_were_afterwards(
    old: str | None, new: str | None, convolutions: str | None
) -> None:
    setting(old, new, convolutions)
    before = switches()
    with without_tf32():
        assert "tf32" not in switches()
        assert torch.get_float32_matmul_precision() == "highest"
    assert switches() == before


@pytest.mark.usefixtures("_put_back")
@pytest.mark.parametrize(("old", "new", "convolutions"), SETTINGS)
def test_a_check_leaves_the_switches_of_tf32(
    old: str | None, new: str | None, convolutions: str | None
) -> None:
    model = get_peft_model(BASES["base"](), LoraConfig(r=4, target_modules=["q_proj"])).train()
    setting(old, new, convolutions)
    before = switches()
    check_training(model, language_batch())
    assert switches() == before
