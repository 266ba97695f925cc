"""Laws that every sound LoRA keeps, whatever it has learned. Held against copies of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pytest_lora.facts.config import rewrites_base
from pytest_lora.findings import Finding, Report, grouped
from pytest_lora.inspection.behaviour.copies import (
    TOLERANCES,
    adapted_copy,
    base_without_adapter,
    distance,
    identical,
    largest,
    no_trace,
    output_of,
    require_batch,
    stable_output,
    without_adapter,
)
from pytest_lora.inspection.behaviour.merge import check_merge
from pytest_lora.inspection.behaviour.reload import check_reload
from pytest_lora.inspection.model import adapted_survey
from pytest_lora.inspection.peft_internals import (
    LoraLayer,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
    active_adapters,
    fused_parameter,
    lora_configs,
)

_NAMES = {
    "LORA930": "zeroed_adapter_changes_the_output",
    "LORA931": "disabled_adapter_changes_the_base",
    "LORA932": "output_is_not_linear_in_the_scaling",
    "LORA933": "padding_the_rank_changes_the_output",
    "LORA934": "second_adapter_leaks_into_the_first",
}
_SECOND = "pytest_lora_second"


def check_lora_laws(model: nn.Module, batch: Any) -> Report:
    """Hold the laws that apply against copies of a model; see ``assert_lora_laws``."""
    require_batch(batch)
    with no_trace():
        adapted = adapted_copy(model)
        layers = {n: m for n, m in adapted.named_modules() if isinstance(m, LoraLayer)}
        stable_output(adapted, batch)
        findings = [
            *_disabled(adapted, layers, batch),
            *_leaking(adapted, batch),
            *_layer_laws(adapted, layers, batch),
            *_zeroed(adapted, layers, batch),
        ]
    findings += check_merge(model, batch).errors
    if _loads_as_it_is(adapted):
        findings += check_reload(model, batch).errors
    return Report(f"laws of {type(model).__name__}", tuple(findings))


def _loads_as_it_is(adapted: nn.Module) -> bool:
    """Whether saving and loading is meant to be exact.

    PEFT runs PiSSA, OLoRA and the like again when it loads, on the original base, which is not at hand here; it
    has ``path_initial_model_for_weight_conversion`` for that.
    """
    configs = lora_configs(adapted_survey(adapted).root).values()
    rewritten = any(rewrites_base(config.init_lora_weights) for config in configs)
    return hasattr(adapted, "save_pretrained") and not rewritten


def _finding(code: str, where: str, observed: str, expected: str, fix: str) -> Finding:
    return Finding(code, _NAMES[code], "error", where, observed, expected, fix)


def _disabled(adapted: nn.Module, layers: dict[str, Any], batch: Any) -> Iterator[Finding]:
    """With its LoRA layers disabled a model is the model without them, bit for bit."""
    off = without_adapter(layers, lambda: _without_copies(adapted, batch))
    base = output_of(base_without_adapter(adapted), batch)
    if not identical(off, base):
        yield _finding(
            "LORA931",
            "the output with adapters disabled",
            f"it differs by up to {distance(off, base):.3g} from that of the base",
            "the base, bit for bit",
            "look for base weights that were changed while the adapter was on them, and for hooks",
        )


def _without_copies(adapted: nn.Module, batch: Any) -> Tensor:
    """The output with trained copies of whole modules and of token rows switched off."""
    copies: list[Any] = [
        m for m in adapted.modules() if isinstance(m, (ModulesToSaveWrapper, TrainableTokensWrapper))
    ]
    for wrapper in copies:
        wrapper.enable_adapters(False)
    result = output_of(adapted, batch)
    for wrapper in copies:
        wrapper.enable_adapters(True)
    return result


def _zeroed(adapted: nn.Module, layers: dict[str, Any], batch: Any) -> Iterator[Finding]:
    """With B = 0 an adapter changes nothing. It has no plain form under DoRA, whose magnitude acts alone."""
    if any(
        getattr(layer, "use_dora", {}).get(a) for layer in layers.values() for a in active_adapters(layer)
    ):
        return
    for layer in layers.values():
        for factors in (layer.lora_B, layer.lora_embedding_A):
            for parameter in factors.parameters():
                parameter.data.zero_()
    zeroed = output_of(adapted, batch)
    off = without_adapter(layers, lambda: output_of(adapted, batch))
    if not _near(zeroed, off):
        yield _finding(
            "LORA930",
            "the output with lora_B = 0",
            f"it differs by up to {distance(zeroed, off):.3g} from that with the adapter disabled",
            "no difference: B @ A is zero",
            "look for biases of the adapter (lora_bias=True) or a forward of its own that add to the output",
        )


@dataclass(frozen=True)
class _Call:
    """One LoRA layer and what it was called with."""

    name: str
    layer: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def output(self) -> Tensor:
        result: Tensor = self.layer(*self.args, **self.kwargs)
        return result

    @property
    def acts_alone(self) -> bool:
        """Whether the layer's output is that of its base plus the scaled low-rank product, and nothing else."""
        names = active_adapters(self.layer)
        dora = getattr(self.layer, "use_dora", {})
        return not any(dora.get(name) for name in names)

    @property
    def takes_more_rows(self) -> bool:
        """Whether rows of zeros in the factors are more rank."""
        return True


@dataclass(frozen=True)
class _Update(_Call):
    """A layer whose output is no sum of base and update: its weight is, and the update is looked at alone."""

    def output(self) -> Tensor:
        names = list(active_adapters(self.layer))
        updates = torch.stack([self.layer.get_delta_weight(name) for name in names])
        return torch.zeros_like(updates[0]) if self.layer.disable_adapters else updates.sum(0)

    @property
    def takes_more_rows(self) -> bool:
        """Whether the rank is the number of rows; experts in one parameter have their rows one after another."""
        return fused_parameter(self.layer) is None


def _layer_laws(adapted: nn.Module, layers: dict[str, Any], batch: Any) -> Iterator[Finding]:
    calls = _calls(adapted, layers, batch)
    nonlinear: dict[str, float] = {}
    padded: dict[str, float] = {}
    with torch.no_grad():
        for call in calls:
            if call.acts_alone and (off := _deviation_from_linear(call)) is not None:
                nonlinear[call.name] = off
            if call.takes_more_rows and (off := _deviation_when_padded(call)) is not None:
                padded[call.name] = off
    if nonlinear:
        yield _finding(
            "LORA932",
            grouped(nonlinear),
            f"twice the scaling changes the effect by another factor, off by up to {max(nonlinear.values()):.3g}",
            "an effect that is twice as large",
            "look for a nonlinearity or a clamp between lora_A and lora_B",
        )
    if padded:
        yield _finding(
            "LORA933",
            grouped(padded),
            f"rows of zeros in lora_A and columns of zeros in lora_B move the output by {max(padded.values()):.3g}",
            "the same output: they add nothing",
            "look for a forward that uses the shape of the factors, where the scaling belongs",
        )


def _calls(adapted: nn.Module, layers: dict[str, Any], batch: Any) -> list[_Call]:
    """The last call of each layer whose forward can be repeated on its own, and the updates of the others."""
    found: dict[str, _Call] = {}

    def recorder(name: str, layer: Any) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[name] = _Call(name, layer, args, kwargs)

        return record

    plain = {
        n: m for n, m in layers.items() if fused_parameter(m) is None and "Attention" not in type(m).__name__
    }
    hooks = [m.register_forward_pre_hook(recorder(n, m), with_kwargs=True) for n, m in plain.items()]
    try:
        output_of(adapted, batch)
    finally:
        for hook in hooks:
            hook.remove()
    others = [_Update(n, m, (), {}) for n, m in layers.items() if n not in plain and active_adapters(m)]
    return [*found.values(), *others]


def _deviation_from_linear(call: _Call) -> float | None:
    """How far doubling the scaling is from doubling the effect; None within rounding."""
    off = without_adapter({call.name: call.layer}, call.output)
    once = call.output()
    kept = dict(call.layer.scaling)
    call.layer.scaling.update({name: 2 * value for name, value in kept.items()})
    twice = call.output()
    call.layer.scaling.update(kept)
    expected = off.double() + 2 * (once.double() - off.double())
    return None if _near(twice, expected.to(twice.dtype), steps=2.0) else distance(twice, expected)


def _deviation_when_padded(call: _Call) -> float | None:
    """How far padding the rank with zeros moves the output; None within rounding."""
    before = call.output()
    factors = [
        *((module.weight, 0) for module in call.layer.lora_A.values()),
        *((module.weight, 1) for module in call.layer.lora_B.values()),
        *((parameter, 0) for parameter in call.layer.lora_embedding_A.values()),
        *((parameter, 1) for parameter in call.layer.lora_embedding_B.values()),
    ]
    kept = [parameter.data for parameter, _ in factors]
    for parameter, side in factors:
        parameter.data = torch.cat((parameter.data, torch.zeros_like(parameter.data)), side)
    after = call.output()
    for (parameter, _), data in zip(factors, kept, strict=True):
        parameter.data = data
    return None if _near(after, before) else distance(after, before)


def _leaking(adapted: nn.Module, batch: Any) -> Iterator[Finding]:
    """A second adapter that is not active changes nothing, neither when it comes nor when it was active."""
    from peft import PeftModel

    if not isinstance(adapted, PeftModel):
        return
    pair: Any = copy.deepcopy(adapted)
    first = list(pair.base_model.active_adapters)
    before = output_of(pair, batch)
    # PEFT's attention layer merges and unmerges in every forward.
    rounds = any("Attention" in type(m).__name__ for m in pair.modules() if isinstance(m, LoraLayer))
    config = copy.deepcopy(pair.peft_config[first[0]])
    config.init_lora_weights, config.bias = False, "none"
    config.modules_to_save = config.trainable_token_indices = None
    config.inference_mode = True  # AdaLoRA has one trainable adapter at most
    try:
        pair.add_adapter(_SECOND, config)
    except ValueError:
        if config.target_parameters:  # of which PEFT 0.17 takes one adapter only
            return
        raise
    pair.eval()
    added = output_of(pair, batch)
    pair.set_adapter(_SECOND)
    output_of(pair, batch)
    # PeftModel.set_adapter alone restores trained copies in PEFT 0.17, and takes one name only.
    pair.set_adapter(first[0]) if len(first) == 1 else pair.base_model.set_adapter(first)
    back = output_of(pair, batch)
    for seen, when in ((added, "after a second adapter was added"), (back, "after the second was active")):
        if not (identical(before, seen) or (rounds and _near(before, seen))):
            yield _finding(
                "LORA934",
                f"the output under {', '.join(first)}",
                f"it differs by up to {distance(before, seen):.3g} {when}",
                "the same output, bit for bit",
                "look for state that adapters share: base weights, biases, buffers, hooks",
            )
            return


def _near(first: Tensor, second: Tensor, steps: float = 1.0) -> bool:
    """Equal within what rounding of their dtype makes of it, relative to the largest value."""
    if identical(first, second):
        return True
    return distance(first, second) <= steps * TOLERANCES.get(first.dtype, 0.0) * largest(second)
