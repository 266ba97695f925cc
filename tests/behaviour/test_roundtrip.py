"""assert_reload_exact and assert_merge_exact: healthy set-ups pass, broken ones are named, nothing changes."""

from __future__ import annotations

import copy
import gc
import random
import tempfile
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from peft import LoraConfig, PeftMixedModel, get_peft_model
from safetensors import SafetensorError
from torch import nn

from pytest_lora import (
    LoraHealthError,
    LoraHealthWarning,
    Report,
    assert_merge_exact,
    assert_reload_exact,
    check_lora_laws,
    check_merge,
    check_model,
    check_reload,
)
from pytest_lora.bases.examples.models import BASES
from pytest_lora.inspection import behaviour
from pytest_lora.inspection.behaviour import merge, reload
from pytest_lora.inspection.bitsandbytes_internals import quantization_statistics
from pytest_lora.inspection.peft_internals import BaseTunerLayer, LoraLayer, ModulesToSaveWrapper

BATCH = {"input_ids": torch.arange(3, 35).view(2, 16)}


def base(name: str = "base") -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BASES[name]()


def trained(model: nn.Module) -> nn.Module:
    """The model as if it had been trained: whatever is trainable has moved."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.data += noise.to(parameter.dtype)
    return model


def adapted(name: str = "base", **changes: Any) -> nn.Module:
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **changes})
    return trained(get_peft_model(base(name), config))


def add_adapter(name: str = "base") -> nn.Module:
    model: Any = base(name)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    return trained(model)


def two_adapters() -> nn.Module:
    model: Any = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj"]))
    model.base_model.set_adapter(["default", "other"])
    return trained(model)


HEALTHY: dict[str, Callable[[], nn.Module]] = {
    "plain": adapted,
    "4-bit": lambda: adapted("base_4bit"),
    "tied": lambda: adapted("tied_base"),
    "head": lambda: adapted("classifier_base", task_type="SEQ_CLS"),
    "token rows": lambda: adapted(trainable_token_indices={"embed_tokens": [3, 5]}),
    "embedding to save": lambda: adapted(modules_to_save=["embed_tokens", "lm_head"]),
    "embedding target": lambda: adapted(target_modules=["embed_tokens", "q_proj"]),
    "biases": lambda: adapted("gpt2_base", target_modules=["c_attn"], bias="all"),
    "DoRA": lambda: adapted(use_dora=True),
    "rsLoRA and dropout": lambda: adapted(use_rslora=True, lora_dropout=0.5),
    "two adapters": two_adapters,
    "add_adapter": add_adapter,
    "wrapped": lambda: nn.Sequential(adapted()),
    "training mode": lambda: adapted(lora_dropout=0.1).train(),
}


def merged() -> nn.Module:
    model: Any = two_adapters()
    model.merge_adapter(["default"])
    return trained(model)


def disabled(model: Any) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
            module.enable_adapters(False)
    found: nn.Module = model
    return found


def one_of_two() -> nn.Module:
    model: Any = add_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter(LoraConfig(r=2, target_modules=["k_proj"]), adapter_name="other")
    model.set_adapter("other")
    return trained(model)


class Counting(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        found: torch.Tensor = self.inner(hidden)
        return found


def counting() -> nn.Module:
    model: Any = base()
    model.model.norm = Counting(model.model.norm)
    return model


def masked(model: Any) -> nn.Module:
    """Some words of the vocabulary are never said."""
    model.get_base_model().register_forward_hook(_mask)
    found: nn.Module = model
    return found


def _mask(_: nn.Module, __: Any, output: Any) -> Any:
    output.logits[..., 100:] = -torch.inf
    return output


UNUSUAL: dict[str, Callable[[], nn.Module]] = {
    "merged": merged,
    "disabled": lambda: disabled(adapted("classifier_base", task_type="SEQ_CLS")),
    "add_adapter, disabled": lambda: disabled(add_adapter()),
    "add_adapter, one of two": one_of_two,
    "counts its calls": lambda: trained(
        get_peft_model(counting(), LoraConfig(r=4, target_modules=["q_proj"]))
    ),
    "infinite logits": lambda: masked(adapted()),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_states_are_no_fault(name: str) -> None:
    assert not assert_reload_exact(UNUSUAL[name](), BATCH).findings
    assert not assert_merge_exact(UNUSUAL[name](), BATCH).findings


def test_infinite_logits_hide_no_merge_that_loses() -> None:
    model = masked(adapted("tied_base", target_modules=["embed_tokens"]))
    assert codes(check_merge(model, BATCH)) == {"LORA915": "error"}


def test_a_base_that_was_never_run_has_other_counters() -> None:
    model = trained(get_peft_model(counting(), LoraConfig(r=4, target_modules=["q_proj"])))
    model(**BATCH)
    assert not assert_reload_exact(model, BATCH, base=counting).findings


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_inits_that_rewrite_the_base_need_the_original(init: str) -> None:
    model = adapted(init_lora_weights=init)
    with pytest.raises(ValueError, match=f"base must be given: init_lora_weights='{init}' rewrote"):
        assert_reload_exact(model, BATCH)
    assert not assert_reload_exact(model, BATCH, base=base).findings


def test_a_tensor_that_a_module_remembers_is_no_obstacle() -> None:
    """An auxiliary loss, or PEFT's tied factors: ``deepcopy`` refuses tensors with a graph."""
    model: Any = adapted()
    seen = model(**BATCH).logits.sum()
    model.base_model.remembered = {"losses": [seen, (seen,)]}
    assert not assert_merge_exact(model, BATCH).findings
    assert model.base_model.remembered["losses"][0] is seen


def test_a_fresh_adapter_on_four_bits_has_nothing_to_lose() -> None:
    fresh = get_peft_model(base("base_4bit"), LoraConfig(r=4, target_modules=["q_proj"]))
    (finding,) = assert_merge_exact(fresh, BATCH).findings
    assert (finding.code, finding.severity) == ("LORA916", "info")
    assert finding.observed.endswith("where the adapter itself does not move it yet")


def codes(report: Report) -> dict[str, str]:
    return {f.code: f.severity for f in report.findings}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_models_come_back_bit_for_bit(name: str) -> None:
    assert not assert_reload_exact(HEALTHY[name](), BATCH).findings


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_models_merge(name: str) -> None:
    found = codes(assert_merge_exact(HEALTHY[name](), BATCH))
    assert found == ({"LORA916": "info"} if name == "4-bit" else {})


def test_a_given_base_or_a_function_that_makes_it() -> None:
    model = adapted()
    assert not assert_reload_exact(model, BATCH, base=base()).findings
    assert not assert_reload_exact(model, BATCH, base=base).findings
    other = base()
    other.get_parameter("model.norm.weight").data += 0.5
    with pytest.raises(LoraHealthError, match=r"LORA914.*\n.*model\.norm\.weight") as caught:
        assert_reload_exact(model, BATCH, base=other)
    assert codes(caught.value.report) == {"LORA914": "error"}
    assert "merged" not in caught.value.report.findings[0].observed


@pytest.mark.parametrize("place", ["the model", "the given base"])
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True, "lora_alpha": 2}])
def test_an_adapter_that_is_merged_into_its_base_already(place: str, changes: dict[str, Any]) -> None:
    model: Any = adapted(**changes)
    given: Any = base()
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            held = layer.get_base_layer() if place == "the model" else given.get_submodule(name)
            held.weight.data += layer.get_delta_weight("default")
    (finding,) = check_reload(model, BATCH, base=given).errors
    assert finding.code == "LORA914"
    assert "by exactly what the adapter adds" in finding.observed
    assert "merged into one of the two already" in finding.observed
    assert finding.observed.startswith("4 tensors"), "q and v of two blocks"


@pytest.mark.parametrize(("moved", "told"), [(2**-18, False), (2**-12, True)])
def test_a_base_that_rounding_moved_is_the_same(moved: float, told: bool) -> None:
    """As PEFT's attention does, which merges in every pass; a base that went through bfloat16 moves by 2**-9."""
    other = base()
    weight = other.get_parameter("model.layers.0.mlp.up_proj.weight")
    weight.data[0, 0] += moved * float(weight.detach().abs().max())
    assert codes(check_reload(adapted(), BATCH, base=other)) == ({"LORA914": "error"} if told else {})


@pytest.mark.parametrize(
    ("name", "fix"), [("embed_tokens", "trainable_token_indices"), ("norm", "modules_to_save")]
)
@pytest.mark.parametrize("given", [False, True])
def test_trained_weights_that_are_not_saved(name: str, fix: str, given: bool) -> None:
    model = get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj"]))
    model.get_parameter(f"base_model.model.model.{name}.weight").requires_grad_(True)
    trained(model)
    with pytest.raises(LoraHealthError, match=name) as caught:
        assert_reload_exact(model, BATCH, base=base if given else None)
    assert codes(caught.value.report) == {"LORA911": "error"}
    assert fix in caught.value.report.errors[0].fix


def test_biases_that_are_not_saved() -> None:
    model = get_peft_model(base("gpt2_base"), LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith("bias"))
    report = check_reload(trained(model), BATCH)
    assert codes(report) == {"LORA911": "error"}
    assert 'bias="all"' in report.errors[0].fix


def test_a_checkpoint_without_its_head() -> None:
    model: Any = adapted("classifier_base", task_type="SEQ_CLS")
    save = model.save_pretrained

    def forgetful(folder: str) -> None:
        from safetensors.torch import load_file, save_file

        save(folder)
        path = f"{folder}/adapter_model.safetensors"
        save_file({n: t for n, t in load_file(path).items() if "score" not in n}, path)

    type_with_fault = type(
        "Forgetful", (type(model),), {"save_pretrained": lambda self, folder: forgetful(folder)}
    )
    model.__class__ = type_with_fault
    with pytest.raises(LoraHealthError, match="score"):
        assert_reload_exact(model, BATCH)


def test_half_precision_adapters_are_loaded_in_full() -> None:
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16().float().half()
    report = check_reload(model.half(), {"input_ids": BATCH["input_ids"]})
    assert codes(report) == {"LORA913": "warning"}
    with pytest.warns(LoraHealthWarning, match="LORA913"):
        assert_reload_exact(model, BATCH)


def test_an_attribute_set_by_hand_is_lost() -> None:
    model: Any = adapted()
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)
    assert codes(check_reload(model, BATCH)) == {"LORA910": "error"}


def test_a_merge_of_tied_weights_is_named() -> None:
    model = adapted("tied_base", target_modules=["embed_tokens"])
    assert codes(check_merge(model, BATCH)) == {"LORA915": "error"}


def test_a_merge_that_loses_precision_is_named() -> None:
    report = check_merge(adapted(), BATCH, rtol=0.0)
    assert codes(report) == {"LORA915": "error"}
    assert not check_merge(adapted(), BATCH, rtol=0.0, atol=1.0).findings


def test_an_update_below_the_grid_of_a_quantized_base_is_lost() -> None:
    model = adapted("base_4bit")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 1e-3
    assert codes(check_merge(model, BATCH)) == {"LORA916": "warning"}


def _packs_for_this_cpu() -> bool:
    layer = next(m for m in base("base_4bit").modules() if type(m).__name__ == "Linear4bit")
    return bool(getattr(layer, "support_avx512bf16_for_cpu", False))


def test_a_base_that_an_evaluation_packed_is_compared_as_it_is() -> None:
    """bitsandbytes packs 4-bit weights anew on CPUs with AVX512-BF16, rounds their scales, and undoes it at saving."""
    if not _packs_for_this_cpu():
        pytest.skip("this CPU has no AVX512-BF16, or bitsandbytes packs nothing for it")
    model = adapted("base_4bit").eval()
    with torch.no_grad():
        model(**BATCH)
    weights = [m.weight for m in model.modules() if type(m).__name__ == "Linear4bit"]
    assert all(weight.quant_state.packing_format_for_cpu for weight in weights)
    assert not check_model(model).errors
    assert not check_reload(model, BATCH).findings
    for given in (lambda: base("base_4bit"), base("base_4bit")):
        assert not check_reload(model, BATCH, base=given).findings
        model.state_dict()
    assert not any(weight.quant_state.packing_format_for_cpu for weight in weights)


def test_statistics_of_a_weight_that_was_packed_for_the_cpu() -> None:
    """Packing takes the attribute ``state2`` away."""
    one = torch.ones(1)
    state = SimpleNamespace(absmax=one, code=one, offset=one)
    packed: Any = SimpleNamespace(quant_state=state)
    assert len(quantization_statistics(packed)) == 3
    state.state2 = SimpleNamespace(absmax=one, code=one)
    assert len(quantization_statistics(packed)) == 5


def test_a_refused_merge_is_named() -> None:
    model = adapted()
    for module in model.modules():
        if hasattr(module, "merge_adapter") or "lora.layer" in type(module).__module__:
            vars(module)["merge"] = _refuse
    report = check_merge(model, BATCH)
    assert codes(report) == {"LORA919": "error"}
    assert "not this one" in report.errors[0].observed


def test_a_base_that_peft_cannot_take_apart_refuses_to_be_merged() -> None:
    """PEFT takes any module with a child called ``base_layer`` for one of its own."""

    class Wrapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer, self.out = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.base_layer(x))

    model = trained(get_peft_model(nn.Sequential(Wrapping()), LoraConfig(r=2, target_modules=["out"])))
    batch = {"input": torch.ones(2, 16)}
    assert codes(check_merge(model, batch)) == {"LORA919": "error"}
    assert check_lora_laws(model, batch).ok


def test_layers_that_cannot_be_unmerged_are_reloaded_all_the_same() -> None:
    """Those over the weights of GPTQ, AWQ and others have neither merge nor unmerge."""
    model = adapted()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            vars(module).update(merge=_refuse, unmerge=_refuse)
    assert not codes(check_reload(model, BATCH))


def _refuse(*_: Any, **__: Any) -> None:
    raise NotImplementedError("not this one")


def test_weights_that_do_not_survive_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import Linear, LoraModel

    with monkeypatch.context() as patch:
        patch.setattr(Linear, "unmerge", lambda self: self.merged_adapters.clear())
        assert codes(check_merge(adapted(), BATCH)) == {"LORA917": "error"}
    unload = LoraModel.unload

    def damaging(self: Any) -> Any:
        found = unload(self)
        found.model.norm.weight.data += 1
        return found

    monkeypatch.setattr(LoraModel, "unload", damaging)
    assert codes(check_merge(adapted(), BATCH)) == {"LORA918": "error"}


# ------------------------------------------------------------------ no trace


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "values": {n: t.clone() for n, t in model.state_dict().items()},
        "strides": {n: t.stride() for n, t in model.state_dict().items()},
        "ids": [id(p) for p in model.parameters()],
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "requires": {n: p.requires_grad for n, p in model.named_parameters()},
        "modes": [m.training for m in model.modules()],
        "hooks": [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()],
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "flags": [vars(m).get("support_avx512bf16_for_cpu") for m in model.modules()],
        "random": (torch.get_rng_state(), random.getstate(), repr(numpy.random.get_state())),
    }


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


@pytest.mark.parametrize("check", [check_reload, check_merge])
@pytest.mark.parametrize("name", ["plain", "4-bit", "head", "token rows", "add_adapter"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(
    check: Callable[..., Report], name: str, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = HEALTHY[name]().train()
    model(**BATCH).logits.sum().backward()
    before = state(model)
    if fails:
        output = _broken_output()
        for home in (
            behaviour,
            merge,
            reload,
        ):
            monkeypatch.setattr(home, "output_of", output)
        with pytest.raises(ValueError, match="out of luck"):
            check(model, BATCH)
    else:
        check(model, BATCH)
    assert_same(state(model), before)


def _broken_output() -> Callable[[nn.Module, Any], torch.Tensor]:
    real, calls = behaviour.output_of, []

    def output(model: nn.Module, batch: Any) -> torch.Tensor:
        calls.append(torch.rand(()))
        if len(calls) == 3:
            raise RuntimeError("out of luck")
        return real(model, batch)

    return output


def test_the_given_base_is_left_as_it_was() -> None:
    given, model = base(), adapted()
    before = state(given)
    check_reload(model, BATCH, base=given)
    assert_same(state(given), before)


# ------------------------------------------------------------------ arguments


def test_what_cannot_be_done_is_said() -> None:
    model = adapted()
    with pytest.raises(TypeError, match="model must be a torch"):
        assert_reload_exact("model", BATCH)
    with pytest.raises(TypeError, match="carry LoRA layers"):
        assert_merge_exact(base(), BATCH)
    with pytest.raises(TypeError, match="batch must be"):
        assert_reload_exact(model, "text")
    with pytest.raises(TypeError, match="base must be"):
        assert_reload_exact(model, BATCH, base=lambda: "base")
    with pytest.raises(TypeError, match="base must be"):
        assert_reload_exact(model, BATCH, base="base")
    with pytest.raises(ValueError, match="base must be a model without adapters"):
        assert_reload_exact(model, BATCH, base=adapted())
    with pytest.raises(TypeError, match="rtol"):
        assert_merge_exact(model, BATCH, rtol="small")
    with pytest.raises(ValueError, match="atol"):
        assert_merge_exact(model, BATCH, atol=-1.0)


@pytest.mark.parametrize("check", [assert_reload_exact, assert_merge_exact])
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, "batch: the model raises ValueError for it: You must specify exactly one"),
        ([BATCH], "batch: the model raises TypeError for it: embedding"),
        ({"input_ids": torch.zeros(0, 8).long()}, "batch: the model raises RuntimeError for it"),
        ({"input_ids": torch.full((2, 8), 1000)}, "batch: the model raises IndexError for it: index out of range"),
        ({"input_ids": BATCH["input_ids"].to("meta")}, "batch is on the meta device"),
    ],
    ids=["empty", "a list of batches", "no rows", "outside the vocabulary", "meta"],
)  # fmt: skip
def test_a_batch_that_the_model_does_not_take_is_named(
    check: Callable[..., Report], batch: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check(adapted(), batch)


def deleted(model: Any) -> nn.Module:
    model.delete_adapter("default")
    found: nn.Module = model
    return found


def with_a_lock() -> nn.Module:
    model = adapted()
    vars(model)["lock"] = Lock()
    return model


def without_numbers() -> nn.Module:
    model = adapted()
    model.get_parameter("base_model.model.model.norm.weight").data.fill_(torch.nan)
    return model


@pytest.mark.parametrize("check", [assert_reload_exact, assert_merge_exact])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adapted().to("meta"), "model is on the meta device and has no values"),
        (lambda: deleted(adapted()), "model must carry an adapter, but its LoRA layers hold none any more"),
        (with_a_lock, "model cannot be copied, which this check needs: cannot pickle '_thread.lock' object"),
        (without_numbers, "the model gives no finite number"),
    ],
    ids=["meta", "deleted", "lock", "NaN"],
)
def test_a_model_that_cannot_be_tried_is_named(
    check: Callable[..., Report], make: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        check(make(), BATCH)


def test_a_base_that_cannot_be_had_is_named() -> None:
    def unavailable() -> nn.Module:
        raise OSError("no such folder")

    with pytest.raises(ValueError, match="base: the function raises OSError: no such folder"):
        assert_reload_exact(adapted(), BATCH, base=unavailable)
    with pytest.raises(ValueError, match="base is on the meta device"):
        assert_reload_exact(adapted(), BATCH, base=base().to("meta"))
    with pytest.raises(ValueError, match=r"model is merged on 4 modules: .*leave base out"):
        assert_reload_exact(merged(), BATCH, base=base)


@pytest.mark.parametrize("fault", ["no folder", "no room"])
def test_a_temporary_folder_that_cannot_be_used_is_named(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device")

    model = adapted()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none" if fault == "no folder" else tmp_path))
    if fault == "no room":
        monkeypatch.setattr("safetensors.torch.serialize_file", full)
    with pytest.raises(
        OSError, match=f"cannot be saved into a temporary folder in {tmp_path}.*let TMPDIR be"
    ):
        assert_reload_exact(model, BATCH)
    assert not [*tmp_path.iterdir()]


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    model = add_adapter()
    capfd.readouterr()
    assert_reload_exact(model, BATCH)
    assert not "".join(capfd.readouterr())


def test_mixed_models_cannot_be_saved() -> None:
    model = PeftMixedModel(base(), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="PeftMixedModel"):
        assert_reload_exact(model, BATCH)


def test_random_output_is_refused() -> None:
    model = adapted()
    model.register_forward_hook(lambda module, args, out: {"logits": out["logits"] + torch.rand(())})
    with pytest.raises(ValueError, match="different outputs"):
        assert_reload_exact(model, BATCH)


def test_any_batch_that_the_model_takes() -> None:
    ids = BATCH["input_ids"]
    for batch in (ids, (ids,), {"input_ids": ids, "labels": ids}):
        assert not check_reload(adapted(), batch).findings


def test_warnings_of_the_libraries_stay_out_of_the_way() -> None:
    model = adapted(modules_to_save=["embed_tokens"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_reload_exact(model, BATCH)


@pytest.mark.parametrize("adapters", [1, 2])
def test_an_adapter_is_loaded_where_the_model_is(monkeypatch: pytest.MonkeyPatch, adapters: int) -> None:
    model: Any = get_peft_model(BASES["base"](), LoraConfig(r=4, target_modules=["q_proj"]))
    if adapters == 2:
        model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"]))
    for module in ("peft.peft_model", "peft.utils.save_and_load"):
        monkeypatch.setattr(
            f"{module}.infer_device", lambda: pytest.fail("PEFT chooses a device, which starts CUDA")
        )
    assert check_reload(model, BATCH).ok


def test_no_more_than_two_copies_of_a_model_are_on_the_gpu_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []
    most = []
    real = copy.deepcopy

    def copied(value: Any, *memo: Any) -> Any:
        is_whole = isinstance(value, nn.Module) and not any(memo)  # a model, not a part of one
        made = real(value, *memo)
        if is_whole:
            alive.append(weakref.ref(made))
            most.append(sum(one() is not None for one in alive))
        return made

    model: Any = adapted()
    monkeypatch.setattr(merge.copy, "deepcopy", copied)
    monkeypatch.setattr(merge, "collect", lambda model: gc.collect())  # as on a GPU
    assert check_merge(model, BATCH).ok
    assert most == [1, 2, 2]


def test_memory_that_runs_out_in_a_merge_is_no_refusal_of_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    def merge_layer(self: Any, *args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model: Any = adapted()
    kind = type(next(m for m in model.modules() if hasattr(m, "merged_adapters")))
    monkeypatch.setattr(kind, "merge", merge_layer)
    with pytest.raises(torch.OutOfMemoryError):
        check_merge(model, BATCH)


@pytest.mark.parametrize(
    ("name", "alpha", "told"), [("base", 16, 0), ("base_4bit", 16, 1), ("base_4bit", 4, 0)]
)
def test_a_merged_bias_takes_the_scaling_along(name: str, alpha: int, told: int) -> None:
    """PEFT forgets it on quantized layers (peft#3741), where the output alone would be put down to rounding."""
    made: Any = base(name)
    for layer in made.model.layers:
        q = layer.self_attn.q_proj
        q.bias = nn.Parameter(torch.ones(q.out_features), requires_grad=False)
    model = get_peft_model(made, LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj"], lora_bias=True))
    for key, parameter in model.named_parameters():
        if "lora_B" in key and key.endswith("bias"):
            parameter.data += 0.5
    found = [f for f in check_merge(model, BATCH).errors if "bias" in f.observed]
    assert len(found) == told
