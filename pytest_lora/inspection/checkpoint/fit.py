"""How a saved adapter fits a base: PEFT is asked on a copy of the base's structure without weights."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from pytest_lora.facts.config import ConfigFacts, Fit, Misfit, Refusal
from pytest_lora.facts.saved_tensors import PREFIX, WRAPPERS, Key, TensorFacts
from pytest_lora.facts.settings import Settings, is_named
from pytest_lora.inspection.base import base_facts, base_parameters
from pytest_lora.inspection.checkpoint.config_file import lora_config
from pytest_lora.inspection.config import ADAPTER, assembled, dry_run, refused, with_ranks
from pytest_lora.inspection.layers import layer_facts
from pytest_lora.inspection.peft_internals import heads_by_task_type
from pytest_lora.inspection.peft_state import load_state, saved_state
from pytest_lora.inspection.rehearsal import refused_merge
from pytest_lora.inspection.skeleton import (
    build_on_meta,
    depends_on_task,
    model_or_config,
    resolve_base,
    skeleton,
)
from pytest_lora.inspection.state import leaves_no_trace
from pytest_lora.inspection.survey import survey
from pytest_lora.inspection.transformers_internals import READS_OTHER_PREFIXES

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from pytest_lora.facts.base import BaseFacts
    from pytest_lora.inspection.survey import Survey


class Base:
    """A base to compare adapters with, built once."""

    @leaves_no_trace
    def __init__(self, base: Any, *, may_be_extended: bool = False) -> None:
        """Take a live model, a ``PretrainedConfig``, or the path of a model folder or ``config.json``.

        ``may_be_extended`` is a fact of every comparison with it, see ``Fit``.

        Raises:
            TypeError: ``base`` is none of these.
            ValueError: It cannot be read or built, or carries adapters itself.
        """
        given = model_or_config(base)
        self.config = None if isinstance(given, nn.Module) else given
        self._may_be_extended = may_be_extended
        self._meant: dict[tuple[str, ...], Base] = {}
        self._look_at(resolve_base(given), base)

    def _look_at(self, model: nn.Module, base: Any) -> None:
        self.model = model
        self.found: Survey = survey(self.model)
        if self.found.carries_adapter:
            raise ValueError("base: it carries adapters itself; give the base model without them")
        self.facts: BaseFacts = base_facts(self.found, base_parameters(self.found))
        self.name = _name(self.model, base)
        held = () if self.model is base else getattr(base, "_modules", ())
        self.wrapper = next((name for name in WRAPPERS if name in held), "")

    def meant_by(self, raw: dict[str, Any], tensors: tuple[TensorFacts, ...], keys: dict[str, Key]) -> Base:
        """The base of the class that an adapter's own configuration means, where a ``config.json`` names another.

        A live model is what it is. Of a head that the ``config.json`` says nothing of, the file tells the classes.
        """
        if self.config is None:
            return self
        config, task_type = _class_of_the_adapter(self.config, raw)
        if config is self.config and not depends_on_task(config, task_type):
            return self
        labels = _labels(tensors, keys)
        if config is not self.config and labels:
            config.num_labels = labels
        key = str(config.architectures), str(task_type), str(labels)
        if key not in self._meant:
            self._meant[key] = meant = copy.copy(self)
            meant._look_at(build_on_meta(config, task_type, labels), self.name)
        return self._meant[key]

    def fit(self, raw: dict[str, Any], tensors: tuple[TensorFacts, ...], keys: dict[str, Key]) -> Fit:
        """Compare an adapter; ``raw`` is its configuration, whose fields have been checked."""
        plain = Fit(
            self.facts,
            self.name,
            None,
            read_by_load_adapter=self._reads_other_prefix(keys),
            may_be_extended=self._may_be_extended,
        )
        try:
            config = lora_config(raw)
            settings = Settings.of(config)
        except Exception as error:
            return replace(plain, config=self._refused(raw, error))
        injected, raised = dry_run(config, skeleton(self.model))
        if injected is None:
            return replace(plain, config=self._facts(settings, settings, self.found, refused(raised)))
        after = survey(injected)
        facts = self._facts(settings, Settings.of(config), after, None)
        merged = refused(refused_merge(config, with_ranks(after, ADAPTER)))
        fit = _compared(replace(plain, config=replace(facts, merge_refusal=merged)), injected, tensors, keys)
        # What wraps the base is taken off here, but not where PEFT is given it.
        return replace(fit, wrapper=fit.wrapper or self.wrapper)

    def _reads_other_prefix(self, keys: dict[str, Key]) -> bool:
        """Whether every adapted module exists here under another ``base_model_prefix``, which load_adapter mends."""
        prefix = getattr(self.model, "base_model_prefix", "")
        known = set(self.facts.module_names)
        adapted = {key.module for key in keys.values() if key.part}
        if not READS_OTHER_PREFIXES or not prefix or not adapted:
            return False
        return all(f"{prefix}.{name}" in known for name in adapted) or all(
            name.startswith(f"{prefix}.") and name.removeprefix(f"{prefix}.") in known for name in adapted
        )

    def _refused(self, raw: dict[str, Any], error: Exception) -> ConfigFacts:
        from types import SimpleNamespace

        settings = Settings.of(SimpleNamespace(**{"r": 8, "lora_alpha": 8, **raw}))
        return self._facts(settings, settings, self.found, refused(error))

    def _facts(
        self, written: Settings, applied: Settings, after: Survey, refusal: Refusal | None
    ) -> ConfigFacts:
        # A saved adapter is frozen and has its values: what is about the start of a training is past.
        added = heads_by_task_type(written.task_type)
        saved = tuple(n for n in written.modules_to_save if n not in added or self._has(n))
        written = replace(written, inference_mode=False, modules_to_save=saved)
        layers = tuple(layer_facts(after.layers, ADAPTER))
        return assembled(ADAPTER, written, applied, self.facts, after, layers, refusal, live=True)

    def _has(self, name: str) -> bool:
        return any(is_named(module, name) for module in self.facts.module_names)


def _compared(plain: Fit, injected: nn.Module, tensors: tuple[TensorFacts, ...], keys: dict[str, Key]) -> Fit:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = {name: tuple(t.shape) for name, t in saved_state(injected, ADAPTER).items()}
    packed = _of_quantized_modules(plain.base, tensors)
    tensors = tuple(t for t in tensors if t.name not in packed)
    wanted = {name: shape for name, shape in wanted.items() if name not in packed}
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
        drops_named=any(keys[t.name].adapter == ADAPTER for t in tensors)
        and _loads(injected, tuple(t._replace(name=keys[t.name].peft_name) for t in tensors)),
    )


def _of_quantized_modules(base: BaseFacts, tensors: tuple[TensorFacts, ...]) -> frozenset[str]:
    """Weights of an adapted embedding that were saved as they are packed, and their statistics.

    PEFT writes the weight of an adapted head beside the adapter. Over the packed weight of this base it loads it as it
    is, and has no use for the statistics, which are those of the base.
    """
    quantized = {module.name for module in base.modules if module.quantization}
    marked = [t.name.partition(mark)[0] for t in tensors for mark in _STATISTICS if mark in t.name]
    modules = {n for n in marked if Key.of(f"{n}.weight").module.removesuffix(".base_layer") in quantized}
    return frozenset(t.name for t in tensors if any(t.name.startswith(f"{module}.") for module in modules))


_STATISTICS = (".weight.quant_state", ".SCB")
"""What bitsandbytes writes beside a weight in 4 and in 8 bits."""


def _wrapper(wanted: frozenset[str], unused: tuple[str, ...]) -> str:
    """The name of a wrapper without which the keys that PEFT looks for would be those that the file has."""
    for wrapper in WRAPPERS:
        wrapped = [key for key in wanted if f".{wrapper}." in key]
        if wrapped and {key.replace(f".{wrapper}.", ".") for key in wrapped} >= set(unused) and unused:
            return wrapper
    return ""


def _loads(injected: nn.Module, tensors: tuple[TensorFacts, ...]) -> bool:
    """Whether PEFT finds a place for every tensor and a tensor for every place, as it converts old formats."""
    # A tensor without numbers is made once for each shape.
    made = {
        shape: torch.empty(shape, dtype=torch.float32, device="meta") for shape in {t.shape for t in tensors}
    }
    state = {t.name: made[t.shape] for t in tensors}
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


def _class_of_the_adapter(
    config: PretrainedConfig, raw: dict[str, Any]
) -> tuple[PretrainedConfig, str | None]:
    """What to build for an adapter: by its task type, or else by the class of transformers in ``auto_mapping``."""
    task_type, mapping = raw.get("task_type"), raw.get("auto_mapping")
    if isinstance(task_type, str):
        return config, task_type
    name = str(mapping.get("base_model_class")) if isinstance(mapping, dict) else ""
    made = getattr(transformers, name, None)
    if getattr(made, "config_class", None) is not type(config) or name in (config.architectures or ()):
        return config, None
    config = copy.deepcopy(config)
    config.architectures = [name]
    return config, None


def _labels(tensors: tuple[TensorFacts, ...], keys: dict[str, Key]) -> int | None:
    """Rows of the last matrix of a task head in the file, which are its classes; None where it has none."""
    parts = [
        (keys[t.name].module.split("."), t.shape)
        for t in tensors
        if len(t.shape) == 2 and not keys[t.name].part
    ]
    return min((shape[0] for path, shape in parts if HEADS.intersection(path)), default=None)


HEADS = frozenset(
    head for task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") for head in heads_by_task_type(task)
)


def _name(model: nn.Module, base: Any) -> str | None:
    for place in (model, getattr(model, "config", None)):
        for attribute in ("name_or_path", "_name_or_path"):
            value = getattr(place, attribute, None)
            if isinstance(value, str) and value.strip():
                return value.strip()
    return str(base) if isinstance(base, str) else None
