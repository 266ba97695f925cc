"""How a saved adapter fits a base: PEFT is asked on a copy of the base's structure without weights."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pytest_lora.facts.checkpoint import PREFIX, WRAPPERS, Fit, Key, Misfit, TensorFacts
from pytest_lora.facts.config import ConfigFacts, Refusal, Settings, is_named
from pytest_lora.inspection.base import base_facts, base_parameters
from pytest_lora.inspection.checkpoint.config_file import lora_config
from pytest_lora.inspection.config import ADAPTER, assembled, dry_run
from pytest_lora.inspection.layers import layer_facts
from pytest_lora.inspection.peft_internals import heads_by_task_type, load_state, saved_state
from pytest_lora.inspection.skeleton import resolve_base, skeleton
from pytest_lora.inspection.survey import survey

if TYPE_CHECKING:
    from pytest_lora.facts.base import BaseFacts
    from pytest_lora.inspection.survey import Survey


class Base:
    """A base to compare adapters with, built once."""

    def __init__(self, base: Any, task_type: str | None = None) -> None:
        """Take a live model, a ``PretrainedConfig``, or the path of a model folder or ``config.json``.

        Raises:
            TypeError: ``base`` is none of these.
            ValueError: It cannot be read or built, or carries adapters itself.
        """
        self.model = resolve_base(base, task_type)
        self.found: Survey = survey(self.model)
        if self.found.carries_adapter:
            raise ValueError("base: it carries adapters itself; give the base model without them")
        self.facts: BaseFacts = base_facts(self.found, base_parameters(self.found))
        self.name = _name(self.model, base)
        self.wrapper = next((name for name in WRAPPERS if name in getattr(base, "_modules", ())), "")

    def fit(self, raw: dict[str, Any], tensors: tuple[TensorFacts, ...], keys: dict[str, Key]) -> Fit:
        """Compare an adapter; ``raw`` is its configuration, whose fields have been checked."""
        plain = Fit(self.facts, self.name, None)
        try:
            config = lora_config(raw)
            settings = Settings.of(config)
        except Exception as error:
            return replace(plain, config=self._refused(raw, error))
        injected, refused = dry_run(config, skeleton(self.model))
        if injected is None:
            refusal = Refusal(type(refused).__name__, str(refused))
            return replace(plain, config=self._facts(settings, settings, self.found, refusal))
        facts = self._facts(settings, Settings.of(config), survey(injected), None)
        fit = _compared(replace(plain, config=facts), injected, tensors, keys)
        # What wraps the base is taken off here, but not where PEFT is given it.
        return replace(fit, wrapper=fit.wrapper or self.wrapper)

    def _refused(self, raw: dict[str, Any], error: Exception) -> ConfigFacts:
        from types import SimpleNamespace

        settings = Settings.of(SimpleNamespace(**{"r": 8, "lora_alpha": 8, **raw}))
        return self._facts(settings, settings, self.found, Refusal(type(error).__name__, str(error)))

    def _facts(
        self, written: Settings, applied: Settings, after: Survey, refusal: Refusal | None
    ) -> ConfigFacts:
        # A saved adapter is frozen and has its values: what is about the start of a training is past.
        added = heads_by_task_type(written.task_type)
        saved = tuple(n for n in written.modules_to_save if n not in added or self._has(n))
        written = replace(written, inference_mode=False, modules_to_save=saved)
        layers = tuple(layer_facts(after.lora, ADAPTER))
        return assembled(ADAPTER, written, applied, self.facts, after, layers, refusal, live=True)

    def _has(self, name: str) -> bool:
        return any(is_named(module, name) for module in self.facts.module_names)


def _compared(plain: Fit, injected: nn.Module, tensors: tuple[TensorFacts, ...], keys: dict[str, Key]) -> Fit:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = {name: tuple(t.shape) for name, t in saved_state(injected, ADAPTER).items()}
    held = {keys[t.name].peft_name: t for t in tensors}
    misfits = tuple(
        Misfit(held[name].name, held[name].shape, shape)
        for name, shape in wanted.items()
        if name in held and held[name].shape != shape
    )
    missing = tuple(name for name in wanted if name not in held)
    unused = tuple(name for name in held if name not in wanted)
    wanted_names = frozenset(wanted)
    exact = not misfits and {t.name for t in tensors} == wanted_names
    # A missing bias stays that of the base, and PEFT says nothing.
    if exact or (not any(name.endswith("bias") for name in missing) and _loads(injected, tensors)):
        return replace(plain, wanted=wanted_names, compared=True, loads=True)
    own = _weights(injected)
    resized = tuple(
        Misfit(held[name].name, held[name].shape, own[name])
        for name in unused
        if name in own and held[name].shape != own[name]
    )
    unused = tuple(name for name in unused if name not in own)
    return replace(
        plain,
        misfits=misfits + resized,
        missing=missing,
        unused=unused,
        wanted=wanted_names,
        compared=True,
        wrapper=_wrapper(wanted_names, unused),
    )


def _wrapper(wanted: frozenset[str], unused: tuple[str, ...]) -> str:
    """The name of a wrapper without which the keys that PEFT looks for would be those that the file has."""
    for wrapper in WRAPPERS:
        wrapped = [key for key in wanted if f".{wrapper}." in key]
        if wrapped and {key.replace(f".{wrapper}.", ".") for key in wrapped} >= set(unused) and unused:
            return wrapper
    return ""


def _loads(injected: nn.Module, tensors: tuple[TensorFacts, ...]) -> bool:
    """Whether PEFT finds a place for every tensor and a tensor for every place, as it converts old formats."""
    state = {t.name: torch.empty(t.shape, dtype=torch.float32, device="meta") for t in tensors}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            missing, unexpected = load_state(injected, state, ADAPTER)
    except Exception:
        return False
    return not unexpected and not any("lora_" in name and f".{ADAPTER}" in name for name in missing)


def _weights(injected: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the base's own weights, under the keys that they have in a file."""
    found = survey(injected)
    return {
        f"{PREFIX}{name}.{own}" if name else PREFIX + own: tuple(p.shape)
        for name, module in found.modules.items()
        for own, p in module._parameters.items()
        if p is not None
    }


def _name(model: nn.Module, base: Any) -> str | None:
    for place in (model, getattr(model, "config", None)):
        for attribute in ("name_or_path", "_name_or_path"):
            value = getattr(place, attribute, None)
            if isinstance(value, str) and value.strip():
                return value.strip()
    return str(base) if isinstance(base, str) else None
