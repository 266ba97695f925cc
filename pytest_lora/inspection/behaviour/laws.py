"""Laws that every sound LoRA keeps, whatever it has learned. Held against copies of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pytest_lora.arguments import raised_on_purpose
from pytest_lora.facts.behaviour import LawFacts, Leak
from pytest_lora.facts.settings import rewriter
from pytest_lora.inspection.behaviour import (
    TOLERANCES,
    adapted_copy,
    base_without_adapter,
    distance,
    identical,
    largest,
    lora_layers,
    output_of,
    stable_output,
    without_adapter,
)
from pytest_lora.inspection.model import adapted_survey
from pytest_lora.inspection.peft_internals import (
    BaseTunerLayer,
    LoraLayer,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
    active_adapters,
    fused_parameter,
    groups_of,
    lora_configs,
    own_geometry,
)
from pytest_lora.inspection.quiet import quiet_libraries
from pytest_lora.inspection.state import Keeper
from pytest_lora.inspection.state.precision import in_float64, without_tf32
from pytest_lora.values import in_short

_SECOND = "pytest_lora_second"


def law_facts(model: nn.Module, batch: Any) -> LawFacts:
    """Hold the laws that apply against copies of a model.

    Raises:
        TypeError: ``model`` carries no LoRA layers.
        ValueError: It cannot be copied or run, or gives no output that can be compared.
    """
    adapted_survey(model)
    with Keeper(model, batch), quiet_libraries(), without_tf32():
        adapted = adapted_copy(model)
        layers = lora_layers(adapted)
        stable_output(adapted, batch)
        disabled = _disabled(adapted, batch)
        leak, not_added = _leak(adapted, batch)
        nonlinear, padded = _layer_laws(adapted, layers, batch)
        # Last, as it takes what the adapters have learned.
        zeroed = _zeroed(adapted, layers, batch)
        return LawFacts(disabled, zeroed, nonlinear, padded, leak, _loads_as_it_is(adapted), not_added)


def _loads_as_it_is(adapted: nn.Module) -> bool:
    """Whether saving and loading is meant to be exact.

    PEFT runs PiSSA, OLoRA and the like again when it loads, on the original base, which is not at hand here; it
    has ``path_initial_model_for_weight_conversion`` for that. It saves no ``PeftMixedModel``, and
    loads no router of Arrow.
    """
    from peft import PeftMixedModel

    configs = lora_configs(adapted_survey(adapted).root).values()
    rewritten = any(rewriter(config) or getattr(config, "arrow_config", None) for config in configs)
    return hasattr(adapted, "save_pretrained") and not isinstance(adapted, PeftMixedModel) and not rewritten


def _disabled(adapted: nn.Module, batch: Any) -> float | None:
    """With its adapters disabled, also those of another method, a model is the model without them, bit for bit."""
    layers = {name: module for name, module in adapted.named_modules() if isinstance(module, BaseTunerLayer)}
    off = without_adapter(layers, lambda: _without_copies(adapted, batch))
    base = output_of(base_without_adapter(adapted), batch)
    return None if identical(off, base) else distance(off, base)


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


def _zeroed(adapted: nn.Module, layers: dict[str, Any], batch: Any) -> float | None:
    """With B = 0 an adapter changes nothing. It has no plain form under DoRA, whose magnitude acts alone."""
    if any(
        getattr(layer, "use_dora", {}).get(a) for layer in layers.values() for a in active_adapters(layer)
    ):
        return None
    for layer in layers.values():
        for factors in (layer.lora_B, layer.lora_embedding_A):
            for parameter in factors.parameters():
                parameter.data.zero_()
    zeroed = output_of(adapted, batch)
    off = without_adapter(layers, lambda: output_of(adapted, batch))
    return None if _near(zeroed, off) else distance(zeroed, off)


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
        """Whether rows of zeros in the two factors are more rank.

        A variant may keep something beside them; the groups of a convolution divide them.
        """
        return groups_of(self.layer) == 1 and not any(
            own_geometry(self.layer, name) for name in active_adapters(self.layer)
        )


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


Deviations = tuple[tuple[str, float], ...]


def _layer_laws(adapted: nn.Module, layers: dict[str, Any], batch: Any) -> tuple[Deviations, Deviations]:
    """Layers that are not linear in the scaling, and layers that padding with zeros changes."""
    calls = _calls(adapted, layers, batch)
    with torch.no_grad():
        linear = {call.name: _deviation_from_linear(call) for call in calls if call.acts_alone}
        padded = {call.name: _deviation_when_padded(call) for call in calls if call.takes_more_rows}
    return _above_rounding(linear), _above_rounding(padded)


def _above_rounding(found: dict[str, float | None]) -> Deviations:
    return tuple((name, off) for name, off in found.items() if off is not None)


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
    expected = in_float64(off) + 2 * (in_float64(once) - in_float64(off))
    return None if _near(twice, expected.to(twice), steps=2.0) else distance(twice, expected)


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


def _leak(adapted: nn.Module, batch: Any) -> tuple[Leak | None, str | None]:
    """A second adapter that is not active changes nothing, neither when it comes nor when it was active.

    Returns:
        What it changes, and why none could be added, each None where there is nothing to say.
    """
    from peft import PeftModel

    if not isinstance(adapted, PeftModel):
        return None, None
    if any(getattr(config, "arrow_config", None) for config in adapted.peft_config.values()):
        return None, None  # its router takes in every adapter that comes
    pair: Any = copy.deepcopy(adapted)
    first = list(pair.base_model.active_adapters)
    before = output_of(pair, batch)
    try:
        pair.add_adapter(_SECOND, _second_config(pair.peft_config[first[0]]))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        return None, _why_alone(error)
    return _changed(pair, batch, first, before), None


def _second_config(config: Any) -> Any:
    """The configuration of a plain adapter on the same modules."""
    second = copy.deepcopy(config)
    second.init_lora_weights, second.bias = False, "none"
    second.modules_to_save = second.trainable_token_indices = None
    second.modules_to_tie = None  # what PEFT itself notes for a tied copy
    second.layer_replication = None  # PEFT would replicate the layers once more
    second.inference_mode = True  # AdaLoRA has one trainable adapter at most
    second.kasa_config = None  # PEFT would truncate the base once more
    return second


def _why_alone(error: Exception) -> str:
    """Why there is no second adapter: PEFT refuses it in its own words, or something else went wrong."""
    if isinstance(error, (ValueError, TypeError, NotImplementedError)) and raised_on_purpose(error, "peft"):
        return f"PEFT refuses it: {in_short(error)}"
    return f"adding it fails, which is no refusal of PEFT: {type(error).__name__}: {in_short(error)}"


def _changed(pair: Any, batch: Any, first: list[str], before: Tensor) -> Leak | None:
    """What a second adapter changes when it is there, and when it was active."""
    # PEFT's attention layer merges and unmerges in every forward.
    rounds = any("Attention" in type(m).__name__ for m in pair.modules() if isinstance(m, LoraLayer))
    pair.eval()
    added = output_of(pair, batch)
    pair.set_adapter(_SECOND)
    output_of(pair, batch)
    # PeftModel.set_adapter alone restores trained copies in PEFT 0.17, and takes one name only.
    pair.set_adapter(first[0]) if len(first) == 1 else pair.base_model.set_adapter(first)
    back = output_of(pair, batch)
    for seen, when in ((added, "after a second adapter was added"), (back, "after the second was active")):
        if not (identical(before, seen) or (rounds and _near(before, seen))):
            return Leak(tuple(first), distance(before, seen), when)
    return None


def _near(first: Tensor, second: Tensor, steps: float = 1.0) -> bool:
    """Equal within what rounding of their dtype makes of it, relative to the largest value."""
    if identical(first, second):
        return True
    return distance(first, second) <= steps * TOLERANCES.get(first.dtype, 0.0) * largest(second)
