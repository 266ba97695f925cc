"""Live models: the built-in base, or a model of one's own, under a drawn adapter; and settings of Hypothesis for tests
that build them."""

from __future__ import annotations

import copy
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from pytest_lora.bases.tiny import load_tiny
from pytest_lora.inspection.bitsandbytes_internals import keep_packing
from pytest_lora.strategies.configs import lora_configs
from pytest_lora.values import require_flag_or_none

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_UPDATE = 0.05
"""Deviation of a trained ``lora_B``: the output moves by about as much as in a short training."""


@cache
def tiny_base() -> PreTrainedModel:
    """The built-in base in 4 bits, loaded once a process; it is copied before anything changes it."""
    return load_tiny()


def build_lora_model(
    config: LoraConfig, base: nn.Module | None = None, *, trained: bool = False, seed: int = 0
) -> PeftModel:
    """A copy of a base with an adapter on it, which any test may change.

    Args:
        config: The adapter; it is not changed.
        base: A model without adapter. Default: the built-in one in 4 bits, loaded once a process.
        trained: Whether the factors that start at zero get random values, so that the adapter acts.
        seed: Seed of the adapter's values; the global random state is left alone.

    Raises:
        TypeError, ValueError: PEFT refuses the configuration.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        copied = copy.deepcopy(tiny_base() if base is None else base)
        _own_packed_weights(copied)
        model: PeftModel = get_peft_model(copied, copy.deepcopy(config))
        if trained:
            for name, parameter in model.named_parameters():
                if "lora_B" in name or "lora_embedding_A" in name:
                    nn.init.normal_(parameter.data, std=_UPDATE)
    return model


def _own_packed_weights(model: nn.Module) -> None:
    """Let copied 4-bit weights point to their own module; quantizing anew would write into the original."""
    keep_packing(model)
    for module in model.modules():
        for parameter in module._parameters.values():
            if isinstance(getattr(parameter, "module", None), nn.Module):
                vars(parameter)["module"] = module


def require_base(base: object) -> None:
    """Refuse what is no live model."""
    if base is not None and not isinstance(base, nn.Module):
        raise TypeError(f"base must be a torch.nn.Module, not {type(base).__name__}")


def require_configs(configs: object) -> None:
    """Refuse what is no strategy."""
    if configs is not None and not isinstance(configs, st.SearchStrategy):
        raise TypeError(
            f"configs must be a strategy such as lora_configs(base), not {type(configs).__name__}"
        )


def lora_models(
    base: nn.Module | None = None,
    *,
    configs: st.SearchStrategy[LoraConfig] | None = None,
    trained: bool | None = None,
) -> st.SearchStrategy[PeftModel]:
    """Draw live PEFT models, each a copy that a test may change.

    A failing example is printed as a call of ``build_lora_model``, and shrinks as its configuration does.

    Args:
        base: A model without adapter. Default: the built-in one in 4 bits.
        configs: Its adapters. Default: ``lora_configs`` of the base.
        trained: Whether the adapter acts already. Default: either.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The base carries an adapter, or has nothing that could be adapted.
    """
    require_base(base)
    require_configs(configs)
    require_flag_or_none("trained", trained)
    drawn = lora_configs(tiny_base() if base is None else base) if configs is None else configs
    given: dict[str, Any] = {} if base is None else {"base": st.just(base)}
    state = st.booleans() if trained is None else st.just(trained)
    return st.builds(build_lora_model, drawn, trained=state, **given)


SUPPRESSED = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example)
"""Health checks that measure how long and how large examples are: a model takes milliseconds to build."""


def register_profiles() -> None:
    """Register ``lora-ci`` and ``lora-dev``; which profile is used stays with the user.

    Neither has a deadline. ``lora-ci`` draws 200 examples, the same in every run; ``lora-dev`` draws 25.
    Chosen by ``pytest --hypothesis-profile=lora-ci``, or by ``settings.load_profile("lora-ci")`` after
    ``pytest_lora.strategies`` was imported.
    """
    settings.register_profile(
        "lora-ci",
        max_examples=200,
        derandomize=True,
        deadline=None,
        print_blob=True,
        suppress_health_check=SUPPRESSED,
    )
    settings.register_profile("lora-dev", max_examples=25, deadline=None, suppress_health_check=SUPPRESSED)
