"""assert_reload_exact and assert_merge_exact: healthy set-ups pass, broken ones are named, nothing changes."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from peft import LoraConfig, PeftMixedModel, get_peft_model
from torch import nn

import pytest_lora.roundtrip
from pytest_lora import LoraHealthError, LoraHealthWarning, Report, assert_merge_exact, assert_reload_exact
from pytest_lora.roundtrip import check_merge, check_reload
from tests.rules.bases import BASES

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


def test_a_refused_merge_is_named() -> None:
    model = adapted()
    for module in model.modules():
        if hasattr(module, "merge_adapter") or "lora.layer" in type(module).__module__:
            vars(module)["merge"] = _refuse
    report = check_merge(model, BATCH)
    assert codes(report) == {"LORA919": "error"}
    assert "not this one" in report.errors[0].observed


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
        monkeypatch.setattr(pytest_lora.roundtrip, "_output", _broken_output())
        with pytest.raises(RuntimeError, match="out of luck"):
            check(model, BATCH)
    else:
        check(model, BATCH)
    assert_same(state(model), before)


def _broken_output() -> Callable[[nn.Module, Any], torch.Tensor]:
    real, calls = pytest_lora.roundtrip._output, []

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
