"""What trains an adapter, as facts."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from pytest_lora.facts.training import OptimizerFacts


def optimizer_facts(model: nn.Module, optimizer: Optimizer) -> OptimizerFacts:
    """Compare, by identity, what an optimizer holds with what a model trains.

    Raises:
        TypeError: ``optimizer`` has no ``param_groups``.
    """
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    holds = {id(p) for group in groups for p in group["params"]}
    own = {id(p) for p in model.parameters()}
    trainable = {n: id(p) for n, p in model.named_parameters() if p.requires_grad}
    return OptimizerFacts(
        optimizer=type(optimizer).__name__,
        held=tuple(n for n, i in trainable.items() if i in holds),
        missing=tuple(n for n, i in trainable.items() if i not in holds),
        foreign=len(holds - own),
    )
