"""Models that hold what no check expects: every check works, or says which argument it cannot work with; no trace."""

from __future__ import annotations

import re
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import pytest_lora
from pytest_lora.arguments import is_meant
from pytest_lora.inspection.state.reachable import Reachable
from tests.state.observed import plain

pytestmark = pytest.mark.filterwarnings("ignore")
WIDTH = 8


class Net(nn.Module):
    """Two layers with something between, and a loss that may be changed."""

    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.middle = middle or nn.Identity()
        self.out = nn.Linear(WIDTH, WIDTH)
        self.changed: Callable[[Any], Any] = lambda loss: loss

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        seen = self.out(self.middle(self.lin(x)))
        return {"loss": self.changed(nn.functional.mse_loss(seen, labels)), "logits": seen}


class Words(nn.Module):
    """A sparse embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, WIDTH, sparse=True)
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        seen = self.lin(self.embed(x))
        return {"loss": nn.functional.mse_loss(seen, labels), "logits": seen}


def batch() -> dict[str, torch.Tensor]:
    return {"x": torch.ones(2, WIDTH), "labels": torch.zeros(2, WIDTH)}


def adapted(base: nn.Module | None = None) -> Any:
    torch.manual_seed(0)
    return get_peft_model(base or Net(), LoraConfig(r=2, target_modules=["lin"]))


def _changed(change: Callable[[Any], object]) -> Callable[[], Any]:
    """A sound model, and what is done to it: the base, under its adapter."""

    def make() -> Any:
        model = adapted()
        change(model.get_base_model())
        return model

    return make


def _float8(layer: Any) -> None:
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    layer.forward = types.MethodType(
        lambda self, x: nn.functional.linear(x, self.weight.float(), self.bias), layer
    )


def _quantized() -> Any:
    inner = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    return adapted(Net(torch.ao.quantization.quantize_dynamic(inner, {nn.Linear}, dtype=torch.qint8)))


def _spread() -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh, model = init_device_mesh("cpu", (1,)), adapted()
    for module in model.modules():
        for name, held in [(n, p) for n, p in module._parameters.items() if p is not None]:
            whole = distribute_tensor(held.data, mesh, [Replicate()])
            module._parameters[name] = nn.Parameter(whole, requires_grad=held.requires_grad)
    return model


def _sharded() -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = adapted()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model


def _nested() -> Any:
    inner: nn.Module = nn.Identity()
    for _ in range(1_100):
        inner = nn.Sequential(inner)
    model = adapted()
    model.get_base_model().unused = inner
    model.named_parameters = model.named_buffers = tuple  # they are nested too deeply for torch itself
    return model


def _config(**fields: Any) -> Callable[[], Any]:
    def make() -> Any:
        model = adapted()
        vars(model.peft_config["default"]).update(fields)
        return model

    return make


MODELS: dict[str, Callable[[], Any]] = {
    "scripted": lambda: adapted(Net(torch.jit.script(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())))),
    "traced": lambda: adapted(Net(torch.jit.trace(nn.Linear(WIDTH, WIDTH), torch.ones(1, WIDTH)))),
    "dynamically quantized": _quantized,
    "sparse gradients": lambda: get_peft_model(
        Words(), LoraConfig(target_modules=["lin"], modules_to_save=["embed"])
    ),
    "float8": _changed(lambda base: _float8(base.out)),
    "float8 under the adapter": _changed(lambda base: _float8(base.lin.base_layer)),
    "spread over ranks": _spread,
    "sharded": _sharded,
    "a part of itself": _changed(lambda base: base.middle.add_module("up", base.middle)),
    "an adapted part of itself": _changed(lambda base: base.lin.add_module("up", base)),
    "too deep": _nested,
    "not initialized": lambda: adapted(Net(nn.LazyLinear(WIDTH))),
    "a superscript": _changed(lambda base: base.add_module("\u00b2", nn.Linear(2, 2))),
    "5,000 digits": _changed(lambda base: base.add_module("9" * 5_000, nn.Linear(2, 2))),
    "escapes": _changed(lambda base: base.add_module("\x1b[2J::error::", nn.Linear(2, 2))),
    "spectral norm": _changed(lambda base: torch.nn.utils.parametrizations.spectral_norm(base.out)),
    "weight norm": _changed(lambda base: torch.nn.utils.weight_norm(base.out)),
    "a loss of 1e308": _changed(lambda base: setattr(base, "changed", lambda loss: loss.double() * 1e308)),
    "a complex loss": _changed(lambda base: setattr(base, "changed", lambda loss: loss * 1j)),
    "no loss": _changed(lambda base: setattr(base, "changed", lambda loss: None)),
    "a mock": _changed(lambda base: setattr(base, "config", MagicMock())),
    "no base": _changed(lambda base: setattr(base.lin, "base_layer", None)),
    "no scaling": _changed(lambda base: base.lin.scaling.clear()),
    "a scaling in words": _changed(lambda base: base.lin.scaling.update(default="two")),
    "no rank": _changed(lambda base: base.lin.r.clear()),
    "no factor": _changed(lambda base: base.lin.lora_A.clear()),
    "an active number": _changed(lambda base: setattr(base.lin, "_active_adapter", 3)),
    "alpha of 400 digits": _config(lora_alpha=10**399),
    "a configuration in words": _config(r="two", target_modules=3, rank_pattern=None),
}
CHECKS: dict[str, Callable[[Any, Any], object]] = {
    "check_model": lambda model, batch: pytest_lora.check_model(model),
    "check_training": lambda model, batch: pytest_lora.check_training(model, batch, steps=2),
    "check_loss_decreases": lambda model, batch: pytest_lora.check_loss_decreases(model, batch, steps=1),
    "check_adapter_shapes": lambda model, batch: pytest_lora.check_adapter_shapes(model, batches=batch),
    "check_merge": pytest_lora.check_merge,
    "check_reload": pytest_lora.check_reload,
    "check_alpha_ratio": lambda model, batch: pytest_lora.check_alpha_ratio(model),
    "check_config": lambda model, batch: pytest_lora.check_config(LoraConfig(target_modules=["lin"]), model),
    "count_parameters": lambda model, batch: pytest_lora.count_parameters(model),
}
NAMES = re.compile(r"\b(model|batch|batches|optimizer|config|base|model_or_config)\b")


@pytest.fixture(scope="module")
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import torch.distributed as dist

    file: Path = tmp_path_factory.mktemp("group") / "file"
    dist.init_process_group("gloo", init_method=file.as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _raised_by(call: Callable[[], object]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def _held(model: Any) -> dict[str, Any]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: _values(tensor) for name, tensor in named}


def _values(tensor: torch.Tensor) -> Any:
    if hasattr(tensor, "_local_tensor"):
        tensor = tensor._local_tensor
    return plain(tensor) if type(tensor) in (torch.Tensor, nn.Parameter) else id(tensor)


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("kind", MODELS)
def test_every_check_works_or_names_what_it_cannot_work_with(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = MODELS[kind]()
    given = batch()
    if kind == "sparse gradients":
        given = {"x": torch.tensor([[1, 2]]), "labels": torch.zeros(1, 2, WIDTH)}
    before = _held(model)
    for check, call in CHECKS.items():
        error = _raised_by(lambda call=call: call(model, given))
        said = "model" if error is None else " ".join((str(error), *getattr(error, "__notes__", ())))
        assert error is None or is_meant(error), f"{check}: {error!r}"
        assert NAMES.search(said), f"{check}: {said}"
        assert len(said) < 2_000
        assert _held(model) == before, check


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize(
    "kind",
    [
        "scripted",
        "dynamically quantized",
        "float8",
        "float8 under the adapter",
        "sharded",
        "a superscript",
    ],
)
def test_what_can_be_trained_is(kind: str) -> None:
    report = pytest_lora.check_training(MODELS[kind](), batch(), select=["LORA30"])
    assert report.ok, report


def test_what_the_users_own_code_raises_goes_on_with_a_note() -> None:
    model = adapted()

    def raise_it(loss: Any) -> Any:
        raise LookupError("of the user")

    model.get_base_model().changed = raise_it
    with pytest.raises(LookupError, match="of the user") as caught:
        pytest_lora.check_training(model, batch())
    assert "batches: the model raised this for one of ['x', 'labels']" in caught.value.__notes__


def test_an_adapter_without_values_is_refused_before_it_is_trained() -> None:
    model = adapted().to("meta")
    for check in (pytest_lora.check_training, pytest_lora.check_loss_decreases):
        with pytest.raises(ValueError, match=r"^model: its adapter is on the meta device and has no values"):
            check(model, batch())


def test_names_of_what_is_linked_a_thousand_times_stay_short() -> None:
    model = adapted()
    first: list[Any] = []
    last = first
    for _ in range(5_000):
        last.append([])
        last = last[0]
    found = Reachable()
    found.add("model.linked", first)
    assert max(map(len, vars(found._containers))) < 400
    assert len(vars(found._containers)) == 5_001
    model.linked = first
    assert not pytest_lora.check_training(model, batch(), steps=1).errors
