"""One walk over a model: where its base, its LoRA layers and its wrappers are, under clean base names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from pytest_lora.inspection.peft_internals import (
    WRAPPERS,
    BaseTunerLayer,
    LoraLayer,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
    fused_parameter,
    held_layer,
    wrapped_base,
)
from pytest_lora.values import shown

WRAPPER_CLASSES = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "DeepSpeedEngine": "module",
    "PreTrainedModelWrapper": "pretrained_model",
}
"""Classes that hold one model each (of torch, DeepSpeed and TRL's value heads), and what they call it."""


@dataclass(slots=True)
class Survey:
    """What one walk found.

    Attributes:
        root: The base model itself, with everything that wraps it taken off.
        nested: PEFT models wrapped around each other.
        modules: Every module of the base by its name there, adapter layers replaced by what they adapt.
        lora: LoRA layers by the name of the module (or fused parameter) that they adapt.
        saved: ``modules_to_save`` wrappers by module name.
        tokens: ``trainable_token_indices`` wrappers by module name.
        other_tuners: Names of modules that another PEFT method adapts.
        covering: LoRA layers over those of ``lora``, with the names of these: a mixed model puts AdaLoRA over LoRA.
    """

    root: nn.Module
    nested: int
    modules: dict[str, nn.Module] = field(default_factory=dict)
    lora: dict[str, LoraLayer] = field(default_factory=dict)
    saved: dict[str, ModulesToSaveWrapper] = field(default_factory=dict)
    tokens: dict[str, TrainableTokensWrapper] = field(default_factory=dict)
    other_tuners: list[str] = field(default_factory=list)
    covering: list[tuple[str, LoraLayer]] = field(default_factory=list)

    @property
    def layers(self) -> list[tuple[str, LoraLayer]]:
        """Every LoRA layer with the name of what it adapts."""
        return [*self.lora.items(), *self.covering]

    @property
    def carries_adapter(self) -> bool:
        """Whether any PEFT layer was found."""
        return bool(self.lora or self.saved or self.tokens or self.other_tuners)

    def visit(self, module: nn.Module, name: str) -> None:
        """Walk down from ``module``, which the base calls ``name``."""
        module = _unwrapped(module)
        if isinstance(module, LoraLayer):
            self._visit_lora(module, name)
        elif isinstance(module, ModulesToSaveWrapper):
            self.saved[name] = module
            self.visit(module.original_module, name)
        elif isinstance(module, TrainableTokensWrapper):
            self.tokens[name] = module
            self.visit(module.original_module, name)
        elif isinstance(module, BaseTunerLayer):
            self.other_tuners.append(name)
            self.visit(held_layer(module), name)
        elif (inner := wrapped_base(module)) is not None:
            self.visit(inner, name)
        else:
            self.modules[name] = module
            for child_name, child in module.named_children():
                self.visit(child, f"{name}.{child_name}" if name else child_name)

    def _visit_lora(self, layer: LoraLayer, name: str) -> None:
        parameter = fused_parameter(layer)
        adapts = f"{name}.{parameter[0]}" if parameter else name
        self.lora[adapts] = layer
        self.visit(layer.base_layer, name)
        if self.lora[adapts] is not layer:
            self.covering.append((adapts, layer))


_PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What wrappers of parts of a model call what they hold: ``torch.compile``, FSDP, torch's checkpointing."""


def _unwrapped(module: nn.Module) -> nn.Module:
    held = next((name for name in _PARTS if name in module._modules), None)
    return module if held is None else _unwrapped(getattr(module, held))


def every_module(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model as ``model.modules()`` gives them, without a generator for each depth, which is slow."""
    seen: set[int] = set()
    further: list[nn.Module | None] = [model]
    while further:
        module = further.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            yield module
            if module._modules:
                further.extend(reversed(module._modules.values()))


def survey(model: nn.Module) -> Survey:
    """Walk a model: a plain base, or one under PEFT, DDP, ``torch.compile``, a value head, in any order.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {shown(model)}")
    outer = outermost_peft(model) or _outermost_adapted(model)
    nested = 0
    root = outer
    while True:
        nested += isinstance(root, WRAPPERS)
        inner = wrapped_base(_unwrapped(root))
        if inner is None:
            break
        root = inner
    found = Survey(_unwrapped(root), nested)
    found.visit(root, "")
    return found


def outermost_peft(model: nn.Module) -> nn.Module | None:
    """The outermost PEFT model in a model; None where there is none."""
    return next((m for m in model.modules() if isinstance(m, WRAPPERS)), None)


def _outermost_adapted(model: nn.Module) -> nn.Module:
    """The model that carries adapters itself, as transformers' ``add_adapter`` has it; else what wrappers hold.

    A child that is called ``module`` or ``pretrained_model`` makes no wrapper: models of users have such, too.
    """
    adapted = next((m for m in model.modules() if "peft_config" in vars(m)), None)
    if adapted is not None:
        return adapted
    while True:
        model = _unwrapped(model)
        held = next(
            (WRAPPER_CLASSES[c.__name__] for c in type(model).__mro__ if c.__name__ in WRAPPER_CLASSES), ""
        )
        inner = model._modules.get(held)
        if inner is None:
            return model
        model = inner
