"""How several GPUs share a step: from what users write to facts, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pytest_lora.facts.memory_choices import FSDP, HALF_PRECISIONS, MACHINE, OFFLOADED, STRATEGIES, Parallel
from pytest_lora.values import require_flag_or_none, require_one_of, require_whole, shown

_ALSO = {"fsdp": "fsdp2"}
"""What people write for short."""

_OFFLOADING = (*FSDP, "zero1", "zero2", "zero3")
"""Strategies that can move parts to the host; ZeRO-1 and ZeRO-2 the optimizer alone."""


def checked_parallel(
    gpus: Any,
    strategy: Any,
    offload: Any,
    reshard_after_forward: Any,
    wrap: Sequence[str],
    shard_size: Any,
    parallel: Any,
) -> Parallel | None:
    """The arguments of ``estimate_memory`` about several GPUs as facts; None for one GPU.

    Raises:
        TypeError, ValueError: An argument has the wrong type, or does not go with the others; the message names it.
    """
    count = None if gpus is None else require_whole("gpus", gpus, least=1)
    if isinstance(parallel, Parallel) or parallel is None:
        read = parallel
    else:
        from pytest_lora.inspection.parallel_files import read_parallel

        read = read_parallel(parallel, count)
    known = _known(strategy, read)
    if read is None:
        read = Parallel(count or 1, known or "ddp")
    require_flag_or_none("reshard_after_forward", reshard_after_forward)
    found = Parallel(
        gpus=count or read.gpus,
        strategy=known or read.strategy,
        offload=read.offload if offload is None else _offload(offload),
        reshard_after_forward=read.reshard_after_forward
        if reshard_after_forward is None
        else reshard_after_forward,
        wrap=_names(wrap) or read.wrap,
        shard_size=_group(shard_size, known or read.strategy, read.shard_size, count or read.gpus),
        options=read.options,
    )
    _require_together(found)
    return None if found.gpus == 1 else found


def _group(given: Any, strategy: str, read: int, gpus: int) -> int:
    """How many GPUs divide the weights under ``hsdp``; 0 for other strategies."""
    if given is not None:
        require_whole("shard_size", given, least=2)
        if strategy != "hsdp":
            raise ValueError(
                f'shard_size: {strategy} divides among all GPUs; strategy="hsdp" divides in groups'
            )
    if strategy != "hsdp" or gpus == 1:
        return 0
    size: int = given or read or min(MACHINE, gpus)
    if gpus % size:
        raise ValueError(
            f"shard_size: {gpus} GPUs cannot be put in groups of {size}; give a divisor of {gpus}"
        )
    return size


def _names(wrap: Any) -> tuple[str, ...]:
    if isinstance(wrap, str) or not isinstance(wrap, Sequence) or not all(isinstance(n, str) for n in wrap):
        raise TypeError(f'wrap must be a list of names such as ["LlamaDecoderLayer"], not {shown(wrap)}')
    return tuple(wrap)


def _known(strategy: Any, read: Parallel | None) -> str | None:
    if strategy is None:
        return None
    named = _ALSO.get(strategy, strategy) if isinstance(strategy, str) else strategy
    require_one_of("strategy", named, STRATEGIES)
    if read is not None and read.strategy != named:
        raise ValueError(
            f"strategy: parallel says {read.strategy!r}, strategy {named!r}; leave one of them out"
        )
    return str(named)


def _offload(given: Any) -> Any:
    require_one_of("offload", given, OFFLOADED)
    return given


def _require_together(asked: Parallel) -> None:
    if asked.offload is not None:
        if asked.gpus == 1:
            raise ValueError("offload: it is known for several GPUs; give gpus=2 or more")
        if asked.strategy not in _OFFLOADING:
            raise ValueError(
                f"offload: {asked.strategy} keeps everything on its GPU; strategies that can offload are "
                f"{', '.join(_OFFLOADING)}"
            )
        if asked.offload == "cpu" and asked.strategy in ("zero1", "zero2"):
            raise ValueError(
                f'offload: {asked.strategy} divides no weights, so that they stay on the GPU; write offload="optimizer"'
            )
        if asked.offload == "optimizer" and asked.strategy in FSDP:
            raise ValueError(
                f'offload: {asked.strategy} moves parameters and optimizer together; write offload="cpu"'
            )
    if asked.wrap and asked.strategy not in FSDP:
        raise ValueError(f"wrap: {asked.strategy} does not gather by layer classes; {', '.join(FSDP)} do")
    if not asked.reshard_after_forward and asked.strategy not in FSDP:
        raise ValueError(
            f"reshard_after_forward: {asked.strategy} has no such setting; {', '.join(FSDP)} have"
        )


_PRECISIONS = {**HALF_PRECISIONS, "no": ""}


def with_what_is_said(parallel: Any, checkpointing: Any, autocast: Any) -> tuple[Any, Any]:
    """Checkpointing and autocast as they are given, or as a configuration says where they are not.

    Raises:
        TypeError, ValueError: The configuration cannot be read, or says something else.
    """
    if parallel is None or isinstance(parallel, Parallel):
        return checkpointing, autocast
    from pytest_lora.inspection.parallel_files import said_of_step

    said = said_of_step(parallel)
    if said.checkpointing:
        if checkpointing not in (None, True):
            raise ValueError(
                "gradient_checkpointing: parallel says activation_checkpointing True, gradient_checkpointing "
                f"{checkpointing!r}; leave one of them out"
            )
        checkpointing = True
    dtype = _PRECISIONS.get(said.precision)
    if autocast is None or (autocast is True and dtype):
        return checkpointing, dtype
    # A trainer's own precision counts over "no", which is what accelerate writes where nothing is asked for.
    named = str(autocast).removeprefix("torch.")
    if dtype and _PRECISIONS.get(named, named) != dtype:
        raise ValueError(
            f"autocast: parallel says mixed_precision {said.precision!r}, autocast {shown(autocast)}; "
            "leave one of them out"
        )
    return checkpointing, autocast
