"""The losses of trainers: their installed code runs on a batch without values."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import MISSING, dataclass, fields
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from pytest_lora.facts.memory import StepSetting
from pytest_lora.facts.memory_choices import SMOOTHING
from pytest_lora.inspection.skeleton import META


@dataclass(frozen=True)
class TrainerKind:
    """A trainer of TRL.

    Attributes:
        name: Its class in ``trl``.
        arguments: The class of its arguments there.
        batch: Makes its batch.
        sequences: Sequences that the model reads at once for each one of the batch.
        scored: What its fused head computes for each token; None where it has none.
    """

    name: str
    arguments: str
    batch: Callable[[StepSetting], dict[str, Any]]
    sequences: int = 1
    scored: tuple[str, ...] | None = None


def _integers(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.long, device=META)


def _sft(setting: StepSetting) -> dict[str, Any]:
    """As ``DataCollatorForLanguageModeling`` gives them: padded, or without padding in one row."""
    if setting.padding_free:
        shape = 1, setting.batch_size * setting.seq_len
        return {
            "input_ids": _integers(*shape),
            "labels": _integers(*shape),
            "position_ids": _integers(*shape),
        }
    shape = setting.batch_size, setting.seq_len
    return {"input_ids": _integers(*shape), "labels": _integers(*shape), "attention_mask": _integers(*shape)}


def _pairs(setting: StepSetting) -> dict[str, Any]:
    shape = 2 * setting.batch_size, setting.seq_len
    return {"input_ids": _integers(*shape), "attention_mask": _integers(*shape)}


def _dpo(setting: StepSetting) -> dict[str, Any]:
    """Chosen and rejected, one above the other (``DataCollatorForPreference``)."""
    pairs = {**_pairs(setting), "completion_mask": _integers(2 * setting.batch_size, setting.seq_len)}
    return {**pairs, **_known_before(setting, "ref_chosen_logps", "ref_rejected_logps")}


def _kto(setting: StepSetting) -> dict[str, Any]:
    """Completions, each with its label, and mismatched ones for the KL term (``DataCollatorForUnpairedPreference``)."""
    shape = setting.batch_size, setting.seq_len
    names = ["input_ids", "attention_mask", "completion_mask"]
    if _estimates_kl(trainer_arguments(setting)):
        names += [f"KL_{name}" for name in names]
    label = torch.empty(setting.batch_size, dtype=torch.bool, device=META)
    batch = {**{name: _integers(*shape) for name in names}, "label": label}
    return {**batch, **_known_before(setting, "ref_logps", "ref_KL_logps")}


def _known_before(setting: StepSetting, *names: str) -> dict[str, torch.Tensor]:
    """Log-probabilities of the reference, a number a sequence, where they are computed before the training."""
    if not getattr(trainer_arguments(setting), "precompute_ref_log_probs", False):
        return {}
    return {name: torch.empty(setting.batch_size, device=META) for name in names}


def _estimates_kl(arguments: Any) -> bool:
    """As ``KTOTrainer`` decides it."""
    return getattr(arguments, "loss_type", "") != "apo_zero_unpaired"


_CORRECTED = "vllm_importance_sampling_correction"


def _grpo(setting: StepSetting) -> dict[str, Any]:
    """Completions with their prompts, after generation and scoring."""
    arguments = trainer_arguments(setting)
    completion = min(arguments.max_completion_length or setting.seq_len, setting.seq_len - 1)
    rows, prompt = setting.batch_size, setting.seq_len - completion
    batch: dict[str, Any] = {
        "prompt_ids": _integers(rows, prompt),
        "prompt_mask": _integers(rows, prompt),
        "completion_ids": _integers(rows, completion),
        "completion_mask": _integers(rows, completion),
        "advantages": torch.empty(rows, device=META),
        "num_items_in_batch": torch.empty((), device=META),
    }
    if arguments.beta:
        batch["ref_per_token_logps"] = torch.empty(rows, completion, device=META)
    if getattr(arguments, "use_vllm", False) and getattr(arguments, _CORRECTED, False):
        by_sequence = "sequence" in str(getattr(arguments, "vllm_importance_sampling_mode", ""))
        batch["importance_sampling_ratio"] = torch.empty(rows, 1 if by_sequence else completion, device=META)
    if arguments.num_iterations > 1:
        batch["old_per_token_logps"] = torch.empty(rows, completion, device=META)
    return batch


TRL: dict[str, TrainerKind] = {
    "trl-sft": TrainerKind("SFTTrainer", "SFTConfig", _sft, scored=("log_probs", "entropy", "is_top1")),
    "trl-dpo": TrainerKind(
        "DPOTrainer",
        "DPOConfig",
        _dpo,
        sequences=2,
        scored=("log_probs", "entropy", "mean_logits", "is_top1"),
    ),
    "trl-kto": TrainerKind("KTOTrainer", "KTOConfig", _kto, scored=("log_probs", "entropy", "mean_logits")),
    "trl-reward": TrainerKind("RewardTrainer", "RewardConfig", _pairs, sequences=2),
    "trl-grpo": TrainerKind("GRPOTrainer", "GRPOConfig", _grpo, scored=("log_probs", "entropy")),
}


def class_of_trl(name: str) -> Any:
    """A class of TRL.

    Raises:
        ValueError: TRL is not installed, or this version has no such class.
    """
    try:
        return getattr(importlib.import_module("trl"), name)
    except (ImportError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"trainer: its step is run by TRL itself, which has no {name} here ({error}); pip install trl"
        ) from error


def trainer_arguments(setting: StepSetting) -> Any:
    """The arguments of a TRL trainer: its own defaults, and what was given."""
    values = {**defaults_of(class_of_trl(TRL[setting.trainer].arguments)), **dict(setting.args)}
    if values.get("steps_per_generation", "absent") is None:
        values["steps_per_generation"] = setting.accumulation
    return SimpleNamespace(**values)


def defaults_of(kind: Any) -> dict[str, Any]:
    """What a dataclass has where nothing is given."""
    declared: Any = fields(kind)
    return {
        f.name: f.default if f.default is not MISSING else f.default_factory()
        for f in declared
        if f.default is not MISSING or f.default_factory is not MISSING
    }


def set_up(adapted: nn.Module, transformer: Any, setting: StepSetting) -> None:
    """Change a model as the installed trainer does: no dropout, a fused head; older versions have none."""
    kind = TRL[setting.trainer]
    arguments = trainer_arguments(setting)
    if getattr(arguments, "disable_dropout", False):
        _utilities().disable_dropout_in_model(adapted)
    fuse = getattr(_utilities(), "add_fused_lm_head", None)
    if fuse is None or kind.scored is None:
        return
    more = {}
    if setting.trainer == "trl-grpo":
        cast = arguments.cast_lm_head_to_fp32
        more = {"temperature": arguments.temperature, "cast_lm_head_to_fp32": cast}
        if cast and transformer.config.tie_word_embeddings:
            _embed_in(transformer, getattr(torch, setting.dtype))
    weighted = ("log_sum_sq_probs",) if getattr(arguments, "use_weighting", False) else ()
    fuse(transformer, outputs=(*kind.scored, *weighted), **more)


def _embed_in(transformer: Any, dtype: torch.dtype) -> None:
    """As ``GRPOTrainer`` does where the embeddings are tied to a head that it casts."""
    transformer.get_input_embeddings().register_forward_hook(lambda module, args, output: output.to(dtype))


def _utilities() -> Any:
    return importlib.import_module("trl.trainer.utils")


def trl_loss(model: nn.Module, setting: StepSetting) -> torch.Tensor:
    """The loss that the installed trainer computes for a batch, its reference model and metrics included."""
    kind = TRL[setting.trainer]
    trainer = trainer_without_data(class_of_trl(kind.name), model, trainer_arguments(setting), setting)
    batch = kind.batch(setting)
    count = torch.empty((), dtype=torch.long, device=META)
    loss: torch.Tensor = trainer.compute_loss(model, batch, num_items_in_batch=count)
    return loss


def _label_smoother(arguments: Any) -> Any:
    factor = getattr(arguments, SMOOTHING, 0.0)
    return importlib.import_module("transformers.trainer_pt_utils").LabelSmoother(factor) if factor else None


def trainer_without_data(kind: Any, model: nn.Module, arguments: Any, setting: StepSetting) -> Any:
    """A trainer that was never set up: no data, no processes; what its loss asks for is there."""
    losses = getattr(arguments, "loss_type", None)
    losses = [losses] if isinstance(losses, str) and setting.trainer == "trl-dpo" else losses
    weights = getattr(arguments, "loss_weights", None)
    known = {
        **vars(arguments),
        "args": arguments,
        "model": model,
        "accelerator": _Accelerator(),
        "ref_model": None,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "current_gradient_accumulation_steps": setting.accumulation,
        "aux_loss_enabled": False,
        "router_aux_loss_coef": 0.0,
        "compute_loss_func": None,
        "label_smoother": _label_smoother(arguments),
        "calculate_KL": _estimates_kl(arguments),
        "precompute_ref_logps": getattr(arguments, "precompute_ref_log_probs", False),
        "loss_types": list(losses) if isinstance(losses, (list, tuple)) else losses,
        "loss_weights": weights or [1.0] * len(losses or ()),
        "epsilon_low": getattr(arguments, "epsilon", None),
        "epsilon_high": getattr(arguments, "epsilon_high", None) or getattr(arguments, "epsilon", None),
        "_entropy_bonus_enabled": bool(getattr(arguments, "entropy_coef", 0.0)),
        "_last_world_entropy": float("inf"),
        "_entropy_window_stats": None,
        "is_deepspeed_enabled": False,
        "is_fsdp_enabled": False,
        "can_return_loss": False,
        "model_accepts_loss_kwargs": False,
        "_prepare_inputs": lambda inputs: inputs,
        "compute_loss_context_manager": nullcontext,
    }
    made = object.__new__(kind)
    vars(made).update(known)
    return made


class _Accelerator:
    """One process. What is gathered is logged, from the host."""

    num_processes = 1
    is_main_process = True
    sync_gradients = True
    parallelism_config = None
    device = META

    def gather(self, value: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        return torch.zeros(value.shape, dtype=value.dtype)

    gather_for_metrics = gather
    reduce = gather

    def pad_across_processes(self, value: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        return value

    def unwrap_model(self, model: nn.Module, *rest: Any, **named: Any) -> nn.Module:
        return model

    def autocast(self) -> Any:
        return nullcontext()
