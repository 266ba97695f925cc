"""Configurations of accelerate, DeepSpeed and FSDP, read as they are: how they share a step among GPUs."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pytest_lora.facts.memory_choices import Offload, Parallel
from pytest_lora.inspection.recipe.beside import (
    FSDP_OF_ACCELERATE,
    fsdp_version,
    fsdp_version_of_arguments,
    on_host,
    zero_stage,
)
from pytest_lora.inspection.recipe.yaml_file import MAX_BYTES, BrokenError, read_yaml
from pytest_lora.values import in_short

_FSDP_OPTIONS = (
    "backward_prefetch",
    "forward_prefetch",
    "use_orig_params",
    "limit_all_gathers",
    "sync_module_states",
)
_ZERO_OPTIONS = (
    "contiguous_gradients",
    "overlap_comm",
    "reduce_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "memory_efficient_linear",
)
_UNKNOWN_TO_ZERO = {
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "mics_shard_size": -1,
}
"""What changes what a rank holds, and is not known, with the value that leaves it off
(deepspeed/runtime/zero/config.py)."""

_SHARDING = {
    "1": "FULL_SHARD",
    "2": "SHARD_GRAD_OP",
    "3": "NO_SHARD",
    "4": "HYBRID_SHARD",
    "5": "HYBRID_SHARD_ZERO2",
}
"""``torch.distributed.fsdp.ShardingStrategy`` by the numbers that accelerate writes."""


def read_parallel(given: Any, gpus: int | None) -> Parallel:
    """How a configuration shares a step.

    Args:
        given: The path of an accelerate configuration (YAML or JSON) or of a DeepSpeed JSON, or the mapping in it, or
            ``TrainingArguments(fsdp_config=...)``.
        gpus: How many GPUs, where it does not say so itself; what is given counts.

    Raises:
        TypeError, ValueError: It is none of these, or shares a step in a way that is not known; the message says
            ``parallel``.
    """
    name = repr(str(given)) if isinstance(given, (str, os.PathLike)) else "it"
    given, folder = _opened(given)
    kind = str(given.get("distributed_type", "")).upper()
    if kind:
        return _of_accelerate(kind, given, gpus, folder)
    if isinstance(given.get("zero_optimization"), Mapping):
        return _of_deepspeed(given, _count(gpus))
    if any(key.removeprefix("fsdp_") in _FSDP_KEYS for key in map(str, given)):
        by_accelerate = any(str(key).startswith("fsdp_") for key in given)
        version = FSDP_OF_ACCELERATE if by_accelerate else fsdp_version_of_arguments()
        return _of_fsdp(given, _count(gpus), version)
    raise ValueError(
        f"parallel: {name} is no accelerate configuration (it has no distributed_type), no DeepSpeed configuration "
        "(no zero_optimization), and holds no FSDP arguments"
    )


class SaidOfStep(NamedTuple):
    """What a configuration says of a step beside how it is shared.

    Attributes:
        checkpointing: Whether FSDP checkpoints the layers that it gathers.
        precision: ``"bf16"``, ``"fp16"``, ``"no"``, or nothing where the trainer decides.
    """

    checkpointing: bool = False
    precision: str = ""


def said_of_step(given: Any) -> SaidOfStep:
    """What a configuration says of a step; it is read, and refused, as by ``read_parallel``."""
    given, folder = _opened(given)
    of_fsdp = _mapping(given, "fsdp_config") if given.get("distributed_type") else given
    checkpointing = any(_is_on(of_fsdp.get(f"{prefix}activation_checkpointing")) for prefix in ("fsdp_", ""))
    precision = str(given.get("mixed_precision") or "").lower()
    deepspeed = _mapping(given, "deepspeed_config").get("deepspeed_config_file")
    if deepspeed:  # accelerate leaves its own precision out beside one
        given, precision = _file(folder / str(deepspeed)), ""
    for name in ("bf16", "fp16"):
        part = given.get(name)
        if isinstance(part, Mapping) and _is_on(part.get("enabled")) and part.get("enabled") != "auto":
            precision = name
    if precision not in ("", "no", "bf16", "fp16"):
        raise ValueError(f"parallel: mixed_precision {precision!r} is not known; known are no, fp16, bf16")
    return SaidOfStep(checkpointing, precision)


def _opened(given: Any) -> tuple[Mapping[str, Any], Path]:
    """The mapping in a configuration, and the folder that other files are named from."""
    folder = Path()
    if isinstance(given, (str, os.PathLike)):
        folder, given = Path(given).parent, _file(Path(given))
    if not isinstance(given, Mapping):
        raise TypeError(
            "parallel must be the path of an accelerate or DeepSpeed configuration, or a mapping, not "
            f"{type(given).__name__}"
        )
    return given, folder


def _file(path: Path) -> Any:
    if not os.path.isfile(path):  # unlike pathlib's, it takes a name that no file can have
        raise ValueError(f"parallel: there is no file {in_short(path)}")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES)
    try:
        found = json.loads(data) if path.suffix == ".json" else read_yaml(data).root.unwrapped()
    except (ValueError, RecursionError, BrokenError) as error:
        raise ValueError(f"parallel: {str(path)!r} cannot be read: {error}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"parallel: {str(path)!r} is no accelerate configuration: it is no mapping")
    return found


def _count(gpus: Any) -> int:
    if gpus is None:
        raise ValueError("gpus: this configuration does not say how many there are; give gpus=")
    return int(gpus)


def _of_accelerate(kind: str, given: Mapping[str, Any], gpus: int | None, folder: Path) -> Parallel:
    if given.get("parallelism_config"):
        return _of_dimensions(given)
    if kind == "NO":
        return Parallel(1, "ddp")
    if kind not in ("MULTI_GPU", "FSDP", "DEEPSPEED"):
        raise ValueError(
            f"parallel: distributed_type {kind} is not known; known are MULTI_GPU, FSDP, DEEPSPEED and NO"
        )
    # Without it accelerate starts a process for every GPU that it finds.
    count = _count(gpus if gpus is not None else given.get("num_processes"))
    if kind == "MULTI_GPU":
        return Parallel(count, "ddp")
    if kind == "FSDP":
        return _of_fsdp(_mapping(given, "fsdp_config"), count, FSDP_OF_ACCELERATE)
    part = _mapping(given, "deepspeed_config")
    if part.get("deepspeed_config_file"):
        return _of_deepspeed(_file(folder / str(part["deepspeed_config_file"])), count)
    devices = {
        f"offload_{name}": {"device": part.get(f"offload_{name}_device")} for name in ("param", "optimizer")
    }
    return _of_deepspeed({"zero_optimization": {"stage": part.get("zero_stage", 2), **devices}}, count)


def _of_dimensions(given: Mapping[str, Any]) -> Parallel:
    """``accelerate.ParallelismConfig``: how many GPUs repeat, divide and cut the weights."""
    said = _mapping(given, "parallelism_config")
    plain = {str(key).removeprefix("parallelism_config_").removesuffix("_size"): said[key] for key in said}
    sizes = {name: size for name in _DIMENSIONS if (size := int(plain.get(name) or 1)) > 1}
    repeated = sizes.get("dp_replicate", 1)
    if sizes.keys() == {"tp"}:
        return Parallel(sizes["tp"], "tp")
    if sizes.keys() <= {"dp_replicate"}:
        return Parallel(repeated, "ddp")
    if sizes.keys() <= {"dp_replicate", "dp_shard"}:
        divided = sizes["dp_shard"]
        fsdp = _of_fsdp(_mapping(given, "fsdp_config"), repeated * divided, 2)
        return replace(fsdp, strategy="hsdp", shard_size=divided) if repeated > 1 else fsdp
    raise ValueError(
        f"parallel: parallelism_config with {' and '.join(sizes)} is not known; known are tp alone, and dp_replicate "
        "and dp_shard"
    )


_DIMENSIONS = ("dp_replicate", "dp_shard", "tp", "cp", "sp")


def _mapping(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = given.get(name) or {}
    if not isinstance(part, Mapping):
        raise ValueError(f"parallel: {name} must be a mapping, not {part!r}")
    return part


_FSDP_KEYS = (
    "version",
    "sharding_strategy",
    "reshard_after_forward",
    "transformer_layer_cls_to_wrap",
    "auto_wrap_policy",
    "offload_params",
    "cpu_offload",
    *_FSDP_OPTIONS,
)


def _of_fsdp(given: Mapping[str, Any], gpus: int, version: int) -> Parallel:
    """FSDP arguments with or without the prefix that accelerate gives them, and the version where they say none."""
    plain = {str(key).removeprefix("fsdp_"): value for key, value in given.items()}
    version = fsdp_version(given) or version
    sharding = str(plain.get("sharding_strategy") or "")
    if version == 1 and not sharding and isinstance(plain.get("reshard_after_forward"), str):
        sharding = plain["reshard_after_forward"]
    sharding = _SHARDING.get(sharding, sharding).upper()
    if sharding.startswith("HYBRID"):
        raise ValueError(
            f"parallel: {sharding} of FSDP1 is not known; known are FULL_SHARD, SHARD_GRAD_OP and NO_SHARD, and "
            'strategy="hsdp" of FSDP2'
        )
    wrap = plain.get("transformer_layer_cls_to_wrap") or ()
    names = wrap.split(",") if isinstance(wrap, str) else wrap
    offloads = _is_on(plain.get("offload_params")) or _is_on(plain.get("cpu_offload"))
    if sharding == "NO_SHARD":
        return Parallel(gpus, "ddp")
    return Parallel(
        gpus,
        f"fsdp{version}",
        offload="cpu" if offloads else None,
        reshard_after_forward=_reshards(plain, sharding, version),
        wrap=tuple(str(name).strip() for name in names),
        options=tuple((name, _plain(plain[name])) for name in _FSDP_OPTIONS if _said(plain.get(name))),
    )


def _reshards(plain: Mapping[str, Any], sharding: str, version: int) -> bool:
    if version == 1:
        return sharding != "SHARD_GRAD_OP"
    return str(plain.get("reshard_after_forward", True)).lower() != "false"


def _said(value: Any) -> bool:
    return isinstance(value, (str, bool, int, float))


def _plain(value: Any) -> Any:
    """A switch that is written as a word, as accelerate and transformers take it too (``str_to_bool``)."""
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


def _is_on(value: Any) -> bool:
    return bool(_plain(value))


def _of_deepspeed(given: Mapping[str, Any], gpus: int) -> Parallel:
    stage = zero_stage(dict(given))
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"parallel: zero_optimization has no stage from 0 to 3, but {stage!r}")
    zero = _mapping(given, "zero_optimization")
    _require_known(given, zero)
    if stage == 0:
        return Parallel(gpus, "ddp")
    options: list[tuple[str, Hashable]] = [
        (name, _plain(zero[name])) for name in _ZERO_OPTIONS if _said(zero.get(name))
    ]
    return Parallel(gpus, f"zero{stage}", offload=_offload(zero, stage), options=tuple(options))


def _require_known(given: Mapping[str, Any], zero: Mapping[str, Any]) -> None:
    """Nothing that changes what a rank holds goes unread.

    Raises:
        ValueError: Something does, and is not known.
    """
    for name, off in _UNKNOWN_TO_ZERO.items():
        if _plain(zero.get(name, off)) not in (off, None):
            raise ValueError(
                f"parallel: {name} of DeepSpeed is not known; leave it out to see the step without"
            )
    if int(_mapping(given, "tensor_parallel").get("autotp_size") or 1) > 1:
        raise ValueError(
            'parallel: tensor_parallel of DeepSpeed is not known; transformers\' own is, as strategy="tp"'
        )


def _offload(zero: Mapping[str, Any], stage: int) -> Offload | None:
    if stage == 3 and on_host(zero, "offload_param"):
        return "cpu"
    return "optimizer" if on_host(zero, "offload_optimizer") else None
