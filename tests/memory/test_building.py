"""How a model on the meta device is set up, called step by step, and the pieces of a micro-batch and an evaluation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pytest_lora.facts.memory import Quantization, StepSetting
from pytest_lora.facts.memory_choices import Evaluation
from pytest_lora.inspection.memory import cut_bases, dry_run, fused_layers, live_model, meta_model
from pytest_lora.inspection.memory.dry_run import _entering, _evaluate, _first_of, _times
from pytest_lora.inspection.memory.live_model import _commonest, described, left_out
from pytest_lora.inspection.memory.meta_model import _bitsandbytes_config, _hint, _prepare
from pytest_lora.inspection.memory.remedies import _modules_at, _own_layers, excluded_by_peft, remedy
from tests.memory.test_estimate import adapter, small


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.done: list[Any] = []
        self.config = SimpleNamespace(use_cache=True)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, bool]) -> None:
        self.done.append(gradient_checkpointing_kwargs["use_reentrant"])

    def enable_input_require_grads(self) -> None:
        self.done.append("inputs")


@pytest.mark.parametrize(
    ("setting", "done", "cache"),
    [
        ({}, [], False),
        ({"use_cache": True}, [], True),
        ({"use_cache": False}, [], False),
        ({"use_cache": True, "gradient_checkpointing": True}, [False], False),
        ({"gradient_checkpointing": "reentrant"}, [True, "inputs"], False),
        ({"gradient_checkpointing": True, "trainer": "trl-sft"}, [False, "inputs"], False),
        ({"trainer": "trl-sft", "use_cache": True}, [], True),
    ],
)
def test_checkpointing_is_switched_on(setting: dict[str, Any], done: list[Any], cache: bool) -> None:
    model = Transformer()
    plain = StepSetting(1, 1, **setting)
    _prepare(model, plain)
    assert model.done == done
    assert model.config.use_cache is (plain.use_cache if "use_cache" not in setting and not done else cache)


@pytest.mark.parametrize("checkpointing", [False, True, "reentrant"])
def test_preparing_for_few_bits_is_peft_s(monkeypatch: pytest.MonkeyPatch, checkpointing: Any) -> None:
    import peft

    asked: dict[str, Any] = {}
    monkeypatch.setattr(peft, "prepare_model_for_kbit_training", lambda model, **how: asked.update(how))
    model = Transformer()
    _prepare(model, StepSetting(1, 1, prepare_for_kbit=True, gradient_checkpointing=checkpointing))
    assert asked["use_gradient_checkpointing"] is bool(checkpointing)
    assert asked["gradient_checkpointing_kwargs"] == {"use_reentrant": checkpointing == "reentrant"}
    assert model.done == []


def test_how_bitsandbytes_is_asked() -> None:
    eight = _bitsandbytes_config(Quantization("int8", skip_modules=("a",)))
    assert (eight.load_in_8bit, eight.load_in_4bit, eight.llm_int8_skip_modules) == (True, False, ["a"])
    assert _bitsandbytes_config(Quantization("int8")).llm_int8_skip_modules is None
    four = _bitsandbytes_config(
        Quantization("nf4", double_quant=True, compute_dtype="float16", skip_modules=("a",))
    )
    assert (four.load_in_8bit, four.load_in_4bit, four.llm_int8_skip_modules) == (False, True, ["a"])
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == ("nf4", True)
    assert four.bnb_4bit_compute_dtype == torch.float16
    assert _bitsandbytes_config(Quantization("fp4")).llm_int8_skip_modules is None


@pytest.mark.parametrize(
    ("method", "kind"), [("int8", "Linear8bitLt"), ("nf4", "Linear4bit"), (None, "Linear")]
)
def test_peft_wraps_each_kind_of_weight_in_its_own_layer(method: Any, kind: str) -> None:
    setting = StepSetting(1, 1, quantization=method and Quantization(method))
    built = meta_model.build(small(num_hidden_layers=1), adapter(), setting)
    adapted = {type(module).__name__ for module in built.model.modules() if hasattr(module, "lora_A")}
    assert adapted == {kind}


def test_what_to_write_where_a_packed_head_is_to_be_trained() -> None:
    error = RuntimeError("only Tensors of floating point dtype can require gradients")
    packed = StepSetting(1, 1, quantization=Quantization("nf4"))
    assert "llm_int8_skip_modules=[its name]" in _hint(error, packed)
    assert _hint(error, StepSetting(1, 1)) == ""
    assert _hint(RuntimeError("else"), packed) == ""


def test_a_model_with_one_score() -> None:
    given = SimpleNamespace(architectures=["A"], id2label={0: "x", 1: "y"}, label2id={"x": 0, "y": 1})
    scoring = cut_bases._scoring(given)
    assert (scoring.architectures, scoring.id2label, scoring.label2id) == (
        None,
        {0: "LABEL_0"},
        {"LABEL_0": 0},
    )
    assert given.architectures == ["A"]
    halved = cut_bases._in_dtype(nn.Linear(2, 2), torch.float16)
    assert {parameter.dtype for parameter in halved.parameters()} == {torch.float16}


# ---------------------------------------------------------------------------------- micro-batches


def test_batches_of_an_evaluation_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[Any] = []

    class Container:
        def __init__(self) -> None:
            self.tensors: Any = None

        def add(self, new: torch.Tensor) -> None:
            sizes.append((None if self.tensors is None else tuple(self.tensors.shape), tuple(new.shape)))
            self.tensors = new

    def step(called: Any, transformer: Any, setting: Any, batch: Any, keeps: str) -> Any:
        return torch.zeros(()), torch.ones(2, 3), None

    monkeypatch.setattr(
        dry_run.importlib, "import_module", lambda name: SimpleNamespace(EvalLoopContainer=Container)
    )
    monkeypatch.setattr(dry_run, "prediction_step", step)
    monkeypatch.setattr(dry_run, "batch_for", lambda transformer, setting: {})
    built: Any = SimpleNamespace(transformer=nn.Module())
    for batches, joined in (
        (None, [(None, (2, 3))]),
        (1, [(None, (2, 3))]),
        (2, [(None, (2, 3)), ((2, 3), (2, 3))]),
        (5, [(None, (2, 3)), ((8, 3), (2, 3))]),
    ):
        sizes.clear()
        _evaluate(built, nn.Module(), StepSetting(1, 1), Evaluation(1, keeps="logits", batches=batches))
        assert sizes == joined
    assert _times(3)(torch.ones(2, 5)).shape == (6, 5)
    assert _times(3)(torch.ones(())).shape == ()


def test_whole_numbers_of_a_configuration() -> None:
    config = SimpleNamespace(first=None, second="3", third=4, fourth=5)
    assert _first_of(config, ("none", "first", "second", "third", "fourth")) == 4
    assert _first_of(config, ("none",)) is None


def test_the_unit_that_runs_is_told_by_calls_and_by_gradients() -> None:
    tracker: Any = SimpleNamespace(unit=-1)
    layer = nn.Linear(2, 2)
    enter = _entering(tracker, 7)
    layer.register_forward_pre_hook(enter)
    layer.register_forward_hook(enter)
    out = layer(torch.ones(1, 2))
    assert tracker.unit == 7
    tracker.unit = -1
    out.sum().backward()
    assert tracker.unit == 7
    held = torch.ones(2, requires_grad=True) * 1
    enter(layer, (held,))  # before the call there are no outputs
    enter(layer, (), (torch.ones(2), held))
    tracker.unit = -1
    held.sum().backward()
    assert tracker.unit == -1
    enter(layer, (), (held,))


# ---------------------------------------------------------------------------------- live models


def test_the_dtype_of_most_numbers() -> None:
    def of(*sizes: tuple[int, torch.dtype]) -> torch.dtype:
        return _commonest([nn.Parameter(torch.zeros(n, dtype=d), requires_grad=False) for n, d in sizes])

    assert of((3, torch.float16), (2, torch.float32)) == torch.float16
    assert of((3, torch.float16), (2, torch.float32), (2, torch.float32)) == torch.float32
    assert of((9, torch.uint8), (1, torch.bfloat16)) == torch.bfloat16
    assert of((9, torch.uint8)) == torch.float32
    assert described(Transformer(), 1, 2) is None  # it carries no adapter
    assert left_out(nn.Linear(1, 1)) == ()
    compiled: Any = nn.Linear(1, 1)
    compiled._compiled_call_impl = print
    assert [one.what for one in left_out(compiled)] == ["operations that torch.compile fuses are"]


@pytest.mark.parametrize("computes", [None, torch.bfloat16])
@pytest.mark.parametrize("twice", [True, False])
def test_how_a_live_model_is_quantized(
    monkeypatch: pytest.MonkeyPatch, computes: torch.dtype | None, twice: bool
) -> None:
    packed = SimpleNamespace(
        quant_state=1, quant_type="fp4", compress_statistics=twice, quant_storage=torch.float16
    )
    layers = [SimpleNamespace(weight=packed, compute_dtype=computes)]
    monkeypatch.setattr(live_model, "quantized_layers", lambda root: iter(layers))
    dtype = "float32" if computes is None else "bfloat16"
    found = live_model.quantization_of_model(nn.Module())
    assert found == Quantization("fp4", double_quant=twice, storage="float16", compute_dtype=dtype)
    layers[0].weight = SimpleNamespace(SCB=1)
    assert live_model.quantization_of_model(nn.Module()) == Quantization("int8", compute_dtype="float16")
    layers.clear()
    assert live_model.quantization_of_model(nn.Module()) is None


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(1, 1)

    def forward(self) -> None:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise RuntimeError("scalar type") from error


def test_where_a_step_failed() -> None:
    outer = nn.Module()
    outer.inner = Fails()
    with pytest.raises(RuntimeError) as raised:
        outer.inner()
    assert [name for name, _ in _modules_at(raised.value, outer)] == ["inner"]
    assert remedy(raised.value, outer) == ""
    assert [name for name, _ in _own_layers(outer)] == ["inner", "inner"]
    assert [name for name, _ in _own_layers(nn.Sequential(nn.ReLU()))] == ["0"]
    told = excluded_by_peft(ValueError("Module 'out_proj' is incompatible"))
    assert told == " Write exclude_modules=['out_proj'] in the LoraConfig."
    assert excluded_by_peft(ValueError("else")) == ""


def lora(**changes: Any) -> Any:
    base = SimpleNamespace(weight=torch.ones(1))
    fields = {"lora_A": {"default": 1}, "lora_magnitude_vector": {}, "get_base_layer": lambda: base}
    return SimpleNamespace(**{**fields, **changes})


@pytest.mark.parametrize(
    ("layer", "adapted"),
    [
        (lora(), True),
        (lora(lora_A={}), False),
        (lora(lora_A={"a": 1, "b": 2}), False),
        (lora(lora_magnitude_vector={"default": 1}), False),
        (lora(get_base_layer=lambda: SimpleNamespace(weight=torch.ones(1, dtype=torch.int8))), False),
        (
            lora(get_base_layer=lambda: SimpleNamespace(weight=SimpleNamespace(quant_state=1))),
            True,
        ),
        (SimpleNamespace(), False),
        (None, False),
    ],
)
def test_layers_that_a_fused_kernel_is_for(layer: Any, adapted: bool) -> None:
    assert fused_layers._is_adapted(layer) is adapted
