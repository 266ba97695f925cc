"""What a trainer decides about a step: read from its name, or from its arguments; and whose loss and kernels run."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from pytest_lora.facts.memory import Bound, Unmodelled
from pytest_lora.facts.memory_choices import (
    HALF_PRECISIONS,
    KERNELS,
    LIGER_LAYERS,
    LOSSES,
    SMOOTHING,
    Evaluation,
    Kernels,
    Loss,
)
from pytest_lora.values import require_one_of, shown

_BY_ARGUMENTS = {
    "SFTConfig": "trl-sft",
    "DPOConfig": "trl-dpo",
    "KTOConfig": "trl-kto",
    "RewardConfig": "trl-reward",
    "GRPOConfig": "trl-grpo",
}
TRAINERS = ("transformers", *_BY_ARGUMENTS.values(), "loop")

_DETERMINISTIC_WORKSPACE = 16 * 1024 * 8
"""``CUBLAS_WORKSPACE_CONFIG=":16:8"`` of ``transformers.enable_full_determinism``: KiB, and how many."""
_OTHERS = frozenset({"output_dir", "logging_dir", "run_name", "hub_token", "hub_model_id"})
"""Fields that only say where things go."""

_SHARING = ("deepspeed", "fsdp")


def trainer_of(args: Any) -> str:
    """The trainer that arguments are for.

    Raises:
        TypeError, ValueError: They are of no trainer, or of one that is not known here.
    """
    names = [kind.__name__ for kind in type(args).__mro__]
    if "TrainingArguments" not in names:
        raise TypeError(
            f"args must be a transformers.TrainingArguments or one of {', '.join(_BY_ARGUMENTS)} of TRL, "
            f"not {shown(args)}"
        )
    found = next((_BY_ARGUMENTS[name] for name in names if name in _BY_ARGUMENTS), None)
    if found is None and any(kind.__module__.startswith("trl.") for kind in type(args).__mro__):
        raise ValueError(
            f"args: the trainer of a {names[0]} is not known here; known are {', '.join(TRAINERS)}. Describe its step "
            "with the other arguments"
        )
    return found or "transformers"


def read_arguments(args: Any) -> dict[str, Any]:
    """The settings of a step, and its batch and length, as a trainer's arguments have them.

    Raises:
        TypeError, ValueError: See ``trainer_of``; or they ask for something that is not installed.
    """
    trainer = trainer_of(args)
    values: dict[str, Any] = vars(args)
    autocast = next((dtype for field, dtype in HALF_PRECISIONS.items() if values.get(field)), "")
    found: dict[str, Any] = {
        "trainer": trainer,
        "args": args,
        "batch_size": values["per_device_train_batch_size"],
        "accumulation": values["gradient_accumulation_steps"],
        "optimizer": str(getattr(values["optim"], "value", values["optim"])),
        "gradient_checkpointing": _checkpointing(trainer, values),
        "autocast": autocast or False,
        "empty_cache": values.get("torch_empty_cache_steps") is not None,
    }
    if values.get("use_cache") is not None:
        found["use_cache"] = values["use_cache"]
    if values.get("full_determinism"):
        found["workspace"] = _DETERMINISTIC_WORKSPACE
    if values.get("cast_lm_head_to_fp32"):
        found["upcast"] = ("lm_head",)
    if values.get("use_liger_kernel"):
        config = values.get("liger_kernel_config") or {}
        found["kernels"] = "liger" if takes_layers(config) else None
        found["loss"] = _loss_of_liger(config, trainer)
    strategy = values.get("eval_strategy", "no")
    if getattr(strategy, "value", strategy) != "no" or values.get("eval_on_start"):
        found["evaluation"] = Evaluation(
            values["per_device_eval_batch_size"], batches=values.get("eval_accumulation_steps")
        )
    packed = bool(values.get("packing")) and values.get("packing_strategy", "bfd").startswith("bfd")
    if packed or values.get("padding_free"):
        found["padding_free"] = True
    length = values.get("max_length")
    if length is not None:
        multiple = 1 if found.get("padding_free") else values.get("pad_to_multiple_of") or 1
        found["seq_len"] = -(-length // multiple) * multiple
    return found


def _loss_of_liger(config: Mapping[str, Any], trainer: str) -> str | None:
    """TRL keeps its own head beside Liger's layers; the Trainer takes Liger's unless it is told otherwise."""
    if trainer != "transformers":
        return None
    return "liger" if config.get("fused_linear_cross_entropy", True) else "full"


def _checkpointing(trainer: str, values: Mapping[str, Any]) -> bool | str:
    """transformers 5 and TRL checkpoint without reentrance where nothing is said; transformers 4 with it."""
    if not values.get("gradient_checkpointing"):
        return False
    import transformers
    from packaging.version import Version

    older = Version(transformers.__version__) < Version("5.0.0") and trainer == "transformers"
    asked = (values.get("gradient_checkpointing_kwargs") or {}).get("use_reentrant")
    return "reentrant" if (older if asked is None else asked) else True


def loss_fields(args: Any, *, whole: bool) -> tuple[tuple[str, Hashable], ...]:
    """The fields of a trainer's arguments that its loss may read, as facts.

    Args:
        args: The arguments, or their fields already.
        whole: Whether all are taken, as the losses of TRL read them; the Trainer's smooths labels or not.
    """
    if isinstance(args, tuple):
        return args
    if not whole:
        smoothing = getattr(args, SMOOTHING, 0.0)
        return ((SMOOTHING, smoothing),) if smoothing else ()
    return tuple(
        (name, fact) for name, value in vars(args).items() if (fact := _fact(name, value)) is not None
    )


def _fact(name: str, value: Any) -> Hashable | None:
    if name in _OTHERS or name.startswith("_"):
        return None
    if isinstance(value, list):
        value = tuple(value)
    plain = (bool, int, float, str)
    whole = isinstance(value, tuple) and all(isinstance(part, plain) for part in value)
    return value if isinstance(value, plain) or whole else None


def checked_kernels(given: Any) -> Kernels | None:
    if given is not None:
        require_one_of("kernels", given, KERNELS)
    found: Kernels | None = given
    return found


def checked_evaluation(given: Any, *, sharded: bool) -> Evaluation | None:
    if given is None:
        return None
    if not isinstance(given, Evaluation):
        raise TypeError(f"evaluation must be an Evaluation(batch_size=...) or None, not {shown(given)}")
    if sharded:
        raise ValueError(
            "evaluation: it is not predicted where weights are cut over several GPUs; leave it out, and give it for "
            "one GPU or strategy='ddp'"
        )
    return given


def checked_loss(given: Any, kernels: Any, trainer: str) -> Loss:
    if trainer.startswith("trl-"):  # Liger's layers beside TRL's own head, as TRL sets them up
        if given not in (None, "chunked"):
            raise ValueError(
                f"loss: {trainer!r} computes its own loss, in tiles of the logits; leave loss={given!r} out, or "
                "describe the step with trainer='transformers'"
            )
        return "full"
    if given is None:
        return "liger" if kernels == "liger" else "full"
    require_one_of("loss", given, LOSSES)
    found: Loss = given
    return found


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
