"""From the setting of a run to what PEFT and the estimate of memory take."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from pytest_lora.facts.memory import Quantization
from pytest_lora.facts.memory_choices import divides_weights
from pytest_lora.facts.recipe import RunSetting
from pytest_lora.inspection.survey import embeddings_of

if TYPE_CHECKING:
    from peft import LoraConfig

_CAST = ("target_modules", "exclude_modules", "target_parameters", "modules_to_save", "layers_to_transform")
_MAPPED = ("rank_pattern", "alpha_pattern")
_PLAIN = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias")
COLLECTING = ("Axolotl", "LLaMA-Factory", "ms-swift")
"""Tools that collect the names of linear modules themselves; the others leave "all-linear" to PEFT."""
_OPTIMIZERS = {"adamw_torch_fused": "adamw_torch_fused", "adamw": "adamw_torch", "adamw_hf": "adamw_torch"}


def lora_config(setting: RunSetting, *, several_modalities: bool = False) -> LoraConfig | None:
    """The adapter that a recipe describes; None where PEFT refuses its fields outright.

    Args:
        setting: The setting.
        several_modalities: Whether the base has parts beside its language model, so that leaving them out means
            something.
    """
    from peft import LoraConfig

    fields: dict[str, Any] = {name: _value(setting, name) for name in (*_CAST, *_MAPPED, *_PLAIN)}
    if not several_modalities:
        fields["exclude_modules"] = None
    if fields["layers_to_transform"] is not None and not _are_numbers(fields["layers_to_transform"]):
        fields["layers_to_transform"] = None
    task = str(setting.task_type.value or "CAUSAL_LM").upper()
    given = {name: _listed(value) for name, value in fields.items() if value is not None}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return LoraConfig(task_type=task, **given)
    except (TypeError, ValueError):
        return None


def _value(setting: RunSetting, name: str) -> Any:
    value = getattr(setting, name).value
    if name == "lora_alpha" and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _are_numbers(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, list) and all(isinstance(one, int) for one in value))


def step_arguments(setting: RunSetting, base_dtype: str | None) -> dict[str, Any] | None:
    """The arguments of ``estimate_memory`` for a step of this run; None where one of them cannot be told.

    The one place where a recipe becomes a step. A dtype that the recipe leaves to the base is the base's.
    """
    from pytest_lora.inspection.memory.optimizers import OPTIMIZERS

    batch, length = setting.batch_size.value, setting.seq_len.value
    dtype = setting.dtype.value or base_dtype or "bfloat16"
    quantization = setting.quantization.value
    if not isinstance(batch, int) or not isinstance(length, int) or batch < 1 or length < 1:
        return None
    if dtype not in _FLOATS or quantization not in (None, "nf4", "fp4", "int8"):
        return None
    optimizer = str(setting.optimizer.value or "adamw_torch")
    optimizer = _OPTIMIZERS.get(optimizer, optimizer)
    arguments: dict[str, Any] = {
        "batch_size": batch,
        "seq_len": length,
        "quantization": quantization,
        "dtype": dtype,
        "gradient_checkpointing": setting.gradient_checkpointing.value or False,
        "optimizer": optimizer if optimizer in OPTIMIZERS else "adamw_torch",
        "accumulation": max(1, setting.accumulation.value or 1),
    }
    if quantization in ("nf4", "fp4"):
        arguments["quantization"] = _packed(quantization, dtype, setting)
    if dtype == "float32" or setting.precision.key in _WITHOUT_AUTOCAST:
        arguments["autocast"] = False
    if setting.tool in _KEEPS_DTYPE and quantization is not None:
        arguments["prepare_for_kbit"] = False
    if setting.tool == "TRL" and quantization is not None:
        arguments |= {"adapter_dtype": "bfloat16", "upcast": ("lora_magnitude_vector",)}
    if setting.adapter_dtype.value in _FLOATS:
        arguments["adapter_dtype"] = setting.adapter_dtype.value
    if setting.upcast.value:
        arguments["upcast"] = setting.upcast.value
    return arguments


_FLOATS = ("bfloat16", "float16", "float32")
"""Dtypes of what is trained; FSDP divides packed weights that are stored in one of them, and refuses ``uint8``."""

_WITHOUT_AUTOCAST = ("pure_bf16",)
"""Keys of LLaMA-Factory that say the dtype and leave ``TrainingArguments.bf16`` off (hparams/parser.py).

Adapters are in float32 all the same: ``get_peft_model`` is called with PEFT's defaults (model/adapter.py).
"""


def _packed(kind: str, dtype: str, setting: RunSetting) -> Quantization:
    storage = setting.quant_storage.value
    divided = storage in _FLOATS and divides_weights(setting.strategy.value)
    return Quantization(
        kind,
        double_quant=bool(setting.double_quant.value),
        storage=str(storage) if divided else "uint8",
        compute_dtype=dtype,
    )


_KEEPS_DTYPE = ("Axolotl", "LLaMA-Factory", "TRL")
"""Tools under which norms, embeddings and head of a quantized base train in the dtype of the run, not in float32.

Axolotl calls ``prepare_model_for_kbit_training`` and then casts all of these back (``_configure_embedding_dtypes`` in
axolotl/loaders/model.py). LLaMA-Factory has a preparation of its own, which casts norms only under
``upcast_layernorm`` (model/model_utils/checkpointing.py). TRL prepares nothing and casts adapters to bfloat16
(``SFTTrainer.__init__`` and ``DPOTrainer.__init__`` of the installed one). Nothing is known of ms-swift, nor of scripts
of one's own.
"""


_OF_LIGER = {"kernels": "liger"}
_FUSED = {
    "liger_fused_linear_cross_entropy": {"loss": "liger"},
    "cut_cross_entropy": {"loss": "cut"},
    "plugins": {"loss": "cut"},
    "enable_liger_kernel": _OF_LIGER,
    "use_liger_kernel": _OF_LIGER,
}
"""What the key that decides the loss of a recipe means for ``estimate_memory``."""


def fused_arguments(setting: RunSetting) -> dict[str, Any]:
    """The fused kernels that a tool takes, as arguments of ``estimate_memory``; those that are known.

    Axolotl's own are left out wherever the weights are divided, so that the estimate is not below the step.
    """
    loss = setting.loss
    found: dict[str, Any] = dict(_FUSED.get(loss.key, {})) if loss.value == "chunked" else {}
    whole = not divides_weights(setting.strategy.value)
    if setting.kernels.value and setting.quantization.value != "int8" and whole:
        found.setdefault("kernels", "axolotl")
    return found


class StepWay(NamedTuple):
    """A way to estimate a step: more arguments of ``estimate_memory``, and sequences for each one of the batch."""

    arguments: dict[str, Any]
    sequences: int = 1


def ways_of_a_step(setting: RunSetting) -> Iterator[StepWay]:
    """Ways to estimate a step, the truest first: a base that no fused kernels are for is estimated without.

    Those after the trainer's own loss, which runs where its package is installed, hold all logits, of both answers of
    a pair.
    """
    from pytest_lora.inspection.memory.trainers import TRL

    own, fused = dict(setting.by_trainer), fused_arguments(setting)
    if "kernels" in own:
        yield StepWay(own)
    if own:
        yield StepWay({name: value for name, value in own.items() if name != "kernels"})
    sequences = TRL[own["trainer"]].sequences if own else 1
    if fused:
        yield StepWay(fused, sequences)
    yield StepWay({}, sequences)


def weights_at_least(setting: RunSetting, parameters: int, base_dtype: str | None) -> int:
    """Bytes that the weights of the base take at the least, whatever else the run holds."""
    dtype = setting.dtype.value or base_dtype or "bfloat16"
    if setting.quantization.value in ("nf4", "fp4"):
        return parameters // 2
    if setting.quantization.value is not None:
        return parameters
    return parameters * (4 if dtype == "float32" else 2)


def linear_names(model: nn.Module) -> list[str]:
    """Last parts of the names of the linear modules of a base, its head aside, as tools collect them for "all"."""
    head = embeddings_of(model, "output")
    found = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }
    return sorted(name for name in found if not name.isdigit())
