"""Published steps on several GPUs, predicted: prediction over measurement, and the share within the bounds.

    python benchmarks/multi_gpu.py ROWS.json [--only WORD] [--json benchmarks/results/multi_gpu.json]

The rows are a list of objects with ``gpus``, ``strategy``, ``base``, ``quantization``, ``adapter``, ``dtype``,
``per_device_batch``, ``seq_len``, ``gradient_checkpointing``, ``cpu_offload``, ``measured`` and ``versions`` in the
words of who published them. Where the transformers of a row's time did something else than the installed one, that is
put in, and named; a row whose kernels are not modelled (fused ones, Liger's, a compiled model), or whose figure is one
of the whole device, is printed, and not counted.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, _init_utils
from torch.nn import functional
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.loss import loss_utils
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.gpt_bigcode.modeling_gpt_bigcode import GPTBigCodeAttention, GPTBigCodeForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from pytest_lora import estimate_memory
from pytest_lora.facts.parallel import Parallel
from pytest_lora.memory import estimate as kept_estimates

GIB = 2**30
BOUNDS = {"fsdp1": (0.95, 1.05), "fsdp2": (0.93, 1.07), "zero3": (0.93, 1.07), "ddp": (0.95, 1.05)}
OTHER_NAMES = {
    "Llama-2-7B": "meta-llama/Llama-2-7b-hf",
    "Llama-2-70B": "meta-llama/Llama-2-70b-hf",
    "Llama-3.1-70B": "meta-llama/Llama-3.1-70B",
    "Llama-3.1-405B": "meta-llama/Llama-3.1-405B",
    "Yi-34B": "01-ai/Yi-34B",
}
SHAPES: dict[str, dict[str, Any]] = {
    "bigcode/gpt_bigcode-santacoder": {
        "model_type": "gpt_bigcode",
        "n_embd": 2048,
        "n_layer": 24,
        "n_head": 16,
        "n_positions": 2048,
        "vocab_size": 49280,
        "multi_query": True,
        "n_inner": 8192,
        "tie_word_embeddings": True,
    },
    "ibm/PowerLM-3b": {
        "model_type": "granite",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 40,
        "num_attention_heads": 36,
        "num_key_value_heads": 36,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "01-ai/Yi-34B": {
        "model_type": "llama",
        "hidden_size": 7168,
        "intermediate_size": 20480,
        "num_hidden_layers": 60,
        "num_attention_heads": 56,
        "num_key_value_heads": 8,
        "vocab_size": 64000,
    },
    "Qwen-72B": {  # its own code; the same sizes as a Llama with biases
        "model_type": "qwen2",
        "hidden_size": 8192,
        "intermediate_size": 24576,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "vocab_size": 152064,
    },
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def strategy_of(row: dict[str, Any]) -> str:
    """The strategy by our name for it."""
    written = row["strategy"]
    if "NO_SHARD" in written:
        return "ddp"
    return "fsdp2" if "FSDP2" in written else "zero3" if "ZeRO-3" in written else "fsdp1"


def base_of(row: dict[str, Any]) -> Any:
    """A name that is known, or a configuration."""
    name = OTHER_NAMES.get(row["base"], row["base"])
    shape = next(
        (s for known, s in SHAPES.items() if known.rpartition("/")[2] == name.rpartition("/")[2]), None
    )
    if shape is None:
        return name
    return AutoConfig.for_model(**{"tie_word_embeddings": False, **shape})


def adapter_of(row: dict[str, Any]) -> LoraConfig:
    """The adapter; where the publisher names none, torchtune's of its recipe."""
    given = row.get("adapter") or {
        "r": 16,
        "lora_alpha": 32,
        "target_modules": ["q_proj", "v_proj", "o_proj"],
    }
    targets = given["target_modules"]
    if isinstance(targets, str) and targets != "all-linear":
        targets = LINEAR
    if "santacoder" in row["base"]:
        targets = [*ATTENTION, "c_attn"]
    rest = {name: given[name] for name in ("r", "lora_alpha", "lora_dropout") if name in given}
    return LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **rest)


def by_strategy(row: dict[str, Any]) -> dict[str, Any]:
    """How its GPUs share the step; answer.ai's DDP is FSDP1 that divides nothing."""
    if "NO_SHARD" in row["strategy"]:
        return {"parallel": Parallel(row["gpus"], "fsdp1", options=(("sharding_strategy", "NO_SHARD"),))}
    return {"strategy": strategy_of(row)}


def setting_of(row: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``estimate_memory``.

    answer.ai's script makes its own ``Linear4bit`` and leaves ``compress_statistics`` at bitsandbytes' default, which
    is to quantize the statistics too (``replace_linear`` of its train.py; bitsandbytes/nn/modules.py).
    """
    pure = "pure" in str(row.get("dtype"))
    packed = None
    if row.get("quantization"):
        double = any(word in row["quantization"] for word in ("double quant", "dq", "own Linear4bit"))
        packed = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype="bfloat16",
            bnb_4bit_quant_storage="bfloat16",
        )
    autocast = bool(row.get("trainer_bf16", not pure))
    offloads = row.get("cpu_offload") or "offload_params" in row["strategy"]
    return {
        "batch_size": row.get("per_device_batch") or 1,
        "seq_len": row.get("seq_len") or 2048,
        "gpus": row["gpus"],
        **by_strategy(row),
        "offload": "cpu" if offloads else None,
        "quantization": packed,
        "prepare_for_kbit": False,
        "gradient_checkpointing": "reentrant" if row.get("gradient_checkpointing") is not None else True,
        "autocast": autocast,
        "adapter_dtype": "bfloat16" if pure else "float32",
        "outputs_held": pure,
    }


KINDS = ("allocated", "reserved", "device")
"""``max_memory_allocated``, ``max_memory_reserved``, and a figure that says no more than "per GPU"."""

WHOLE_DEVICE = "a figure of the whole device, or of unknown kind"
"""Why a figure of the last kind is compared, and not counted: PEFT's documentation shows a screenshot, "64 GB (80 %)",
which is NVML's share of a card in use, and Qwen's README sums what it does not name. That has NCCL's buffers in it, the
CUDA context, whatever loading and an evaluation left reserved, and no part of it can be told from the others."""

_EARLY_2024 = {"versions": "transformers 4.38 or 4.39"}
WRITTEN_BESIDE: dict[str, dict[str, Any]] = {
    "peftdocs-70b-lora-zero3": {"gradient_checkpointing": None, **_EARLY_2024},
    "peftdocs-70b-qlora-zero3": {"per_device_batch": 2, **_EARLY_2024},
    "peftdocs-70b-qlora-fsdp-offload": _EARLY_2024,
    "peftdocs-70b-qlora-fsdp": _EARLY_2024,
}
"""What the source of a row says and the row does not, or says otherwise: ``--per_device_train_batch_size 2``,
``--use_reentrant False``, and when its figures were written: in February and March 2024, for ``transformers>4.38.2``
(docs/source/accelerate/deepspeed.md and fsdp.md of PEFT, commits aa2ca83 and 6008f27)."""


def measured(row: dict[str, Any]) -> tuple[float, str]:
    """Bytes, and which of ``KINDS`` they are."""
    found = row["measured"]
    if found.get("max_memory_allocated_gib"):
        return found["max_memory_allocated_gib"] * GIB, "allocated"
    if "by_seq_len_gb" in found:
        return found["by_seq_len_gb"]["2048"] * 1e9 / row["gpus"], "device"
    size = found.get("bytes") or found.get("gib", 0) * GIB or found.get("gb", 0) * 1e9
    return size, "allocated" if "bytes" in found else "reserved" if "gib" in found else "device"


def of_kind(estimate: Any, kind: str) -> int:
    """The predicted figure that a measured one of this kind is compared with."""
    if kind == "allocated":
        return int(estimate.peak_allocated)
    return int(estimate.peak_reserved + (estimate.cuda_context if kind == "device" else 0))


def uncounted(row: dict[str, Any]) -> str:
    """Why a row does not count; empty where it does."""
    return unshared(row) or (WHOLE_DEVICE if measured(row)[1] == "device" else "")


def unshared(row: dict[str, Any]) -> str:
    """What of a row the installed code does not do; empty where it does all of it."""
    if row.get("liger"):
        return "Liger's loss"
    if row.get("fused_kernels"):
        return "fused LoRA kernels"
    if row.get("quantization") and "Mixtral" in row["base"]:
        return "experts that transformers 5 fuses, and so leaves whole"
    if "torch.compile" in row["strategy"]:
        return "torch.compile"
    return ""


OLD = ("4.48", "4.45", "4.39")


def emulations_of(row: dict[str, Any]) -> dict[str, Any]:
    """What the transformers that a row was measured with does otherwise than the installed one, by name."""
    versions = str(row.get("versions", ""))
    found: dict[str, Any] = {}
    if strategy_of(row) == "fsdp1" and any(version in versions for version in OLD):
        found["checkpoints around FSDP"] = checkpoints_around_fsdp
    if "torch 2.2" in versions:
        found["broadcasts that NCCL still reads"] = broadcasts_freed_late
    if "gpt_bigcode" in row["base"]:
        found["shifted copy"] = partial(shifted_copy, in_float32=False)
        found["kept keys and values"] = kept_keys_and_values
    elif "4.48" in versions or "4.38" in versions:
        found["shifted float32 copy"] = shifted_copy
    if "4.38" in versions:
        found["outputs with float32 logits"] = float32_logits
    return found


@contextmanager
def checkpoints_around_fsdp() -> Iterator[None]:
    """transformers up to 4.52: the model checkpoints its layers from outside, so that FSDP is within the checkpoint.

    The hooks that FSDP1 sets on the inputs of frozen layers then keep them, and their gradients, to the end of the
    backward.
    """
    plain, sharded = nn.Module.__call__, FullyShardedDataParallel.__call__
    inside = GradientCheckpointingLayer.__call__

    def around(self: Any, *args: Any, **kwargs: Any) -> Any:
        layer = self.module
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing and layer.training:
            return layer._gradient_checkpointing_func(partial(plain, self, **kwargs), *args)
        return sharded(self, *args, **kwargs)

    FullyShardedDataParallel.__call__ = around
    GradientCheckpointingLayer.__call__ = plain
    try:
        yield
    finally:
        FullyShardedDataParallel.__call__ = sharded
        GradientCheckpointingLayer.__call__ = inside


@contextmanager
def estimated_anew() -> Iterator[None]:
    """Traces with one behaviour say nothing of the other."""
    known = kept_estimates._predictors
    kept_estimates._predictors = {}
    try:
        yield
    finally:
        kept_estimates._predictors = known


@contextmanager
def shifted_copy(*, in_float32: bool = True) -> Iterator[None]:
    """transformers up to 4.49: logits in float32, and a copy of all but the last position; GPTBigCode has one."""

    def loss(logits: Any, labels: Any, vocab_size: int, *_: Any, ignore_index: int = -100, **__: Any) -> Any:
        wide = logits.float() if in_float32 else logits
        shifted = wide[..., :-1, :].contiguous().view(-1, vocab_size)
        wanted = labels[..., 1:].contiguous().view(-1)
        return functional.cross_entropy(shifted, wanted, ignore_index=ignore_index)

    before = loss_utils.LOSS_MAPPING["ForCausalLM"]
    loss_utils.LOSS_MAPPING["ForCausalLM"] = loss
    try:
        yield
    finally:
        loss_utils.LOSS_MAPPING["ForCausalLM"] = before


@contextmanager
def float32_logits() -> Iterator[None]:
    """transformers up to 4.48: the model hands out the logits that it cast to float32 (``logits = logits.float()``).

    That counts where the caller holds its outputs in the backward, as answer.ai's script does.
    """
    plain = LlamaForCausalLM.__init__

    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        self.lm_head.register_forward_hook(lambda _, given, logits: logits.float())

    LlamaForCausalLM.__init__ = made
    try:
        yield
    finally:
        LlamaForCausalLM.__init__ = plain


@contextmanager
def broadcasts_freed_late() -> Iterator[None]:
    """torch up to 2.7: what a collective reads is recorded on NCCL's stream (``recordStream``, ProcessGroupNCCL.cpp).

    The allocator does not take such a block again before NCCL is done with it. FSDP1 flattens and cuts a unit right
    after it has sent it, so that neither finds room in the buffers that were sent.
    """
    held: list[torch.Tensor] = []
    send, cut = dist._broadcast_coalesced, _init_utils._init_param_handle_from_params

    def sent(group: Any, tensors: list[torch.Tensor], size: int, source: int) -> None:
        buckets = dist._compute_bucket_assignment_by_size(tensors, [size])[0]
        together = (bucket for bucket in buckets if len(bucket) > 1)  # what is alone is sent as it lies
        held.extend(torch.cat([tensors[i].reshape(-1) for i in bucket]) for bucket in together)

    def cut_before_they_go(*given: Any) -> None:
        cut(*given)
        held.clear()

    dist._broadcast_coalesced, _init_utils._init_param_handle_from_params = sent, cut_before_they_go
    try:
        yield
    finally:
        dist._broadcast_coalesced, _init_utils._init_param_handle_from_params = send, cut


@contextmanager
def kept_keys_and_values() -> Iterator[None]:
    """transformers up to 4.48: GPTBigCode hands out keys and values of every layer, with checkpointing too.

    They are views of all that ``c_attn`` gives, which so stays until the outputs go (``use_cache`` is not turned off
    in modeling_gpt_bigcode.py).
    """
    plain, attend = GPTBigCodeForCausalLM.forward, GPTBigCodeAttention.forward
    kept: list[torch.Tensor] = []
    running = [False]

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        running[0] = True
        try:
            outputs = plain(self, *args, **kwargs)
        finally:
            running[0] = False
        outputs["past_key_values"] = tuple(kept)
        kept.clear()
        return outputs

    def attended(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not running[0]:  # computed again in the backward
            return attend(self, *args, **kwargs)
        handle = self.c_attn.register_forward_hook(lambda _, given, out: kept.append(out.detach()))
        try:
            return attend(self, *args, **kwargs)
        finally:
            handle.remove()

    GPTBigCodeForCausalLM.forward, GPTBigCodeAttention.forward = called, attended
    try:
        yield
    finally:
        GPTBigCodeForCausalLM.forward, GPTBigCodeAttention.forward = plain, attend


def predicted(row: dict[str, Any]) -> Any:
    """The estimate, with what the libraries of the row's time do otherwise."""
    with ExitStack() as old:
        old.enter_context(estimated_anew())
        for emulated in emulations_of(row).values():
            old.enter_context(emulated())
        return estimate_memory(adapter_of(row), base_of(row), **setting_of(row))


def compared(row: dict[str, Any]) -> dict[str, Any]:
    """One line of the table."""
    row = {**row, **WRITTEN_BESIDE.get(row["id"], {})}
    line: dict[str, Any] = {"id": row["id"], "strategy": strategy_of(row), "not_counted": uncounted(row)}
    try:
        estimate = predicted(row)
    except (ValueError, RuntimeError) as error:
        return {**line, "error": str(error)[:200]}
    size, kind = measured(row)
    peak = of_kind(estimate, kind)
    after = row["measured"].get("after_step_bytes")
    return {
        **line,
        "emulated": ", ".join(emulations_of(row)),
        "kind": kind,
        "predicted_gib": peak / GIB,
        "ratio": peak / size if size else None,
        "after_step_ratio": estimate.after_step / after if after else None,
        "phase": estimate.peak_phase,
        "breakdown_gib": {name: round(held / GIB, 2) for name, held in estimate.breakdown.items()},
    }


def share(lines: list[dict[str, Any]], strategy: str, kind: str = "") -> tuple[int, int]:
    """How many of a strategy's counted rows lie within its bounds, and of how many; of one kind, or of all."""
    low, high = BOUNDS[strategy]
    counted = [line for line in lines if line["strategy"] == strategy and not line["not_counted"]]
    counted = [line for line in counted if kind in ("", line.get("kind"))]
    return sum(low <= (line.get("ratio") or 0) <= high for line in counted), len(counted)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--details", action="store_true")
    parser.add_argument(
        "--counted", action="store_true", help="leave out rows whose kernels are not modelled"
    )
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    lines = []
    for row in json.loads(asked.rows.read_text()):
        if asked.only not in row["id"] or (asked.counted and unshared(row)):
            continue
        line = compared(row)
        lines.append(line)
        after = line.get("after_step_ratio")
        print(
            f"{line['id']:72s} {line['strategy']:6s}",
            line["error"] if "error" in line else f"{line['ratio'] or 0:6.3f}",
            f"after step {after:.3f}" if after else "",
            line.get("kind", ""),
            line["not_counted"] or line.get("emulated", ""),
            line.get("breakdown_gib", "") if asked.details else "",
            flush=True,
        )
    for strategy in BOUNDS:
        within, of = share(lines, strategy)
        if of == 0 and any(line["strategy"] == strategy for line in lines):
            print(f"{strategy}: none counted")
        if of:
            low, high = BOUNDS[strategy]
            kinds = {kind: share(lines, strategy, kind) for kind in KINDS}
            parts = ", ".join(f"{some} of {all_} {kind}" for kind, (some, all_) in kinds.items() if all_)
            print(f"{strategy}: {within} of {of} within {low} to {high} ({parts})")
    if asked.json:
        found = {"torch": torch.__version__, "transformers": version("transformers"), "rows": lines}
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
