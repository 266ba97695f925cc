"""What a trainer's arguments ask for that is not modelled: each part makes the figures a bound."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pytest_lora.facts.memory import Bound, Unmodelled
from pytest_lora.facts.memory_choices import LIGER_LAYERS

_SHARING = ("deepspeed", "fsdp")


def not_modelled(args: Any, setting: Mapping[str, Any]) -> tuple[Unmodelled, ...]:
    """The parts of a step that these arguments ask for and its estimate leaves out.

    Args:
        args: Of a trainer, as ``read_arguments`` takes them.
        setting: What is given beside them.
    """
    values: dict[str, Any] = vars(args)
    checkpoints = values.get("gradient_checkpointing_kwargs") or {}
    found = [
        *_of_checkpointing(checkpoints if values.get("gradient_checkpointing") else {}),
        *_of_a_step(values),
    ]
    if setting.get("parallel") is None and setting.get("gpus") is None:
        found += [(f"that {name} divides is", "at most") for name in _SHARING if values.get(name)]
    return tuple(Unmodelled(what, bound) for what, bound in found)


def _of_checkpointing(asked: Mapping[str, Any]) -> Iterator[tuple[str, Bound]]:
    """Keys that TRL and transformers take out of ``gradient_checkpointing_kwargs`` for themselves."""
    if asked.get("selective"):
        yield "what selective checkpointing keeps is", "at least"
    if (asked.get("every_n_layers") or 1) > 1:
        yield "layers that are not checkpointed under every_n_layers are", "at least"
    if asked.get("offload"):
        yield "checkpoints that are moved to the host are", "at most"


def _of_a_step(values: Mapping[str, Any]) -> Iterator[tuple[str, Bound]]:
    if values.get("torch_compile"):
        yield "operations that torch.compile fuses are", "at most"
    if values.get("auto_find_batch_size"):
        yield "that auto_find_batch_size takes fewer sequences where these do not fit is", "at most"
    ahead = values.get("precompute_ref_batch_size") or 0
    if values.get("precompute_ref_log_probs") and ahead > values["per_device_train_batch_size"]:
        yield f"the reference, read by {ahead} before the training, is", "at least"
    config = values.get("liger_kernel_config") or {}
    if values.get("use_liger_kernel") and not takes_layers(config):
        yield "layers of Liger of which liger_kernel_config takes a part are", "at most"


def takes_layers(config: Mapping[str, Any]) -> bool:
    """Whether a ``liger_kernel_config`` leaves all the layers on that are counted."""
    return all(config.get(name, True) for name in LIGER_LAYERS)
