"""LoraConfig, batch and sweep for a test: defaults, marks, parameters, and what the base at hand allows."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from pytest_lora.inspection.quiet import warnings_only_warn
from pytest_lora.plugin.markers import fields_for, split
from pytest_lora.plugin.session_options import options_of
from pytest_lora.values import in_short, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import pytest
    from torch import Tensor

    from pytest_lora.sweep.result import SweepResult

DEFAULTS: dict[str, object] = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def config_for(node: pytest.Item, parameter: object = None) -> LoraConfig:
    """The configuration of a test.

    Args:
        node: The test, for its marks.
        parameter: From indirect parametrization: a rank, a dict of fields, a LoraConfig, or ``None``.

    Raises:
        ValueError: A field does not exist, the parameter is something else, or PEFT refuses the fields.
    """
    if isinstance(parameter, LoraConfig):
        return copy.deepcopy(parameter)
    fields: dict[str, Any] = DEFAULTS | fields_for(node).config | _parameter_fields(node, parameter)
    if isinstance(fields["r"], int):
        fields.setdefault("lora_alpha", 2 * fields["r"])
    try:
        with warnings_only_warn():
            return LoraConfig(**fields)
    except Exception as error:  # whatever PEFT raises for what is no value of a field
        raise ValueError(
            f"{node.nodeid}: peft refuses LoraConfig({_spelled(fields)}): {in_short(error)}"
        ) from error


def fitted(config: LoraConfig, base: nn.Module, node: pytest.Item) -> LoraConfig:
    """The configuration, or a copy in which defaults that only fit a causal LM of transformers fit the base.

    Raises:
        ValueError: A fixture of the user's gives something else for one of them.
    """
    if not isinstance(config, LoraConfig):
        raise ValueError(f"the fixture lora_config must return a peft.LoraConfig, not {shown(config)}")
    if not isinstance(base, nn.Module):
        raise ValueError(f"the fixture lora_base_model must return a torch.nn.Module, not {shown(base)}")
    changes: dict[str, object] = {}
    if not hasattr(base, "prepare_inputs_for_generation") and "task_type" not in fields_for(node).config:
        changes["task_type"] = None
    if config.target_modules == "all-linear" and not isinstance(base, PreTrainedModel):
        changes["target_modules"] = [
            name for name, module in base.named_modules() if name and isinstance(module, nn.Linear)
        ]
    if not changes:
        return config
    config = copy.deepcopy(config)
    vars(config).update(changes)
    return config


def within_vocabulary(batch: dict[str, Tensor], base: nn.Module) -> dict[str, Tensor]:
    """The batch with its ids folded into the base's vocabulary, if that is smaller."""
    size = getattr(getattr(base, "config", None), "vocab_size", None)
    if not isinstance(size, int) or size > int(batch["input_ids"].max()):
        return batch
    labels = batch["labels"]
    return batch | {
        "input_ids": batch["input_ids"] % size,
        "labels": labels.where(labels < 0, labels % size),
    }


def _parameter_fields(node: pytest.Item, parameter: object) -> dict[str, object]:
    if parameter is None:
        return {}
    if isinstance(parameter, int) and not isinstance(parameter, bool):
        return {"r": parameter, "lora_alpha": 2 * parameter}
    if isinstance(parameter, dict):
        fields = split(parameter, f"{node.nodeid}: the parameter of lora_config")
        if fields.expect:
            names = ", ".join(fields.expect)
            raise ValueError(f"{node.nodeid}: the parameter of lora_config has Expect fields: {names}")
        return fields.config
    raise ValueError(
        f"{node.nodeid}: a parameter of lora_config is a rank, a dict of fields or a LoraConfig, not {shown(parameter)}"
    )


def _spelled(fields: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={shown(value)}" for name, value in fields.items())


def sweeper(node: pytest.Item, base: nn.Module, config: LoraConfig) -> Callable[..., SweepResult]:
    """``rank_sweep`` with the base copied for every trial; keywords of the caller go first."""
    from pytest_lora.sweep.runner import rank_sweep

    settled = fitted(config, base, node)

    def sweep(train: Any, evaluate: Any, **settings: Any) -> SweepResult:
        defaults: dict[str, Any] = {
            "ranks": options_of(node.config).ranks,
            "config": settled,
            "progress": False,
        }
        return rank_sweep(lambda: copy.deepcopy(base), train, evaluate, **defaults | settings)

    return sweep
