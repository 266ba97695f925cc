"""Published steps on several GPUs, predicted: prediction over measurement, and the share within the bounds.

    python benchmarks/multi_gpu.py ROWS.json [--only WORD] [--json benchmarks/results/multi_gpu.json]

The rows are a list of objects with ``gpus``, ``strategy``, ``base``, ``quantization``, ``adapter``, ``dtype``,
``per_device_batch``, ``seq_len``, ``gradient_checkpointing``, ``cpu_offload``, ``measured`` and ``versions`` in the
words of who published them. Where the transformers of a row's time did something else than the installed one, that is
put in, and named; a row whose kernels are not modelled (fused ones, Liger's, a compiled model) is printed, and not
counted. A figure of the whole device is compared with all that is reserved, CUDA's context and NCCL
(``estimate.on_device``); rows that have one beside another figure are compared twice.
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
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, _init_utils
from torch.nn import functional
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.loss import loss_utils
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.gpt_bigcode.modeling_gpt_bigcode import GPTBigCodeAttention, GPTBigCodeForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from pytest_lora import estimate_memory
from pytest_lora.facts.memory_choices import Parallel
from pytest_lora.inspection.memory.cuda_allocator import COMMUNICATORS
from pytest_lora.memory import kept

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
    if "zero" in row:
        return {"parallel": Parallel(row["gpus"], strategy_of(row), options=tuple(row["zero"].items()))}
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
    whole = row.get("dtype") == "float32"
    return {
        "batch_size": row.get("per_device_batch") or 1,
        "seq_len": row.get("seq_len") or 2048,
        "gpus": row["gpus"],
        **by_strategy(row),
        "offload": "cpu" if offloads else None,
        "quantization": packed,
        "prepare_for_kbit": False,
        "gradient_checkpointing": row.get(
            "checkpointing", "reentrant" if row.get("gradient_checkpointing") is not None else True
        ),
        **({"dtype": "float32"} if whole else {}),
        "autocast": "bfloat16" if whole and autocast else autocast,
        "adapter_dtype": "bfloat16" if pure else "float32",
        "outputs_held": pure or bool(row.get("outputs_held")),
    }


KINDS = ("allocated", "reserved", "device")
"""``max_memory_allocated``, ``max_memory_reserved``, and a figure of the whole device: ``nvidia-smi``'s, or one that
says no more than "per GPU". PEFT's documentation has a screenshot, "64 GB (80 %)", and Qwen's README a sum."""

NVLS = 16 * 2 * (4 + 2) * 8 * 2**20
"""Bytes that a communicator of eight H100s behind an NVSwitch takes for NVLink SHARP: 16 channels, a buffer of 4 MiB
and 2 MiB of flags for each direction and each of eight heads (``nvlsPerRankSize`` in NCCL's nvls.cc since 2.18)."""

_EARLY_2024 = {"versions": "transformers 4.38 or 4.39"}
WRITTEN_BESIDE: dict[str, dict[str, Any]] = {
    "peftdocs-70b-lora-zero3": {"gradient_checkpointing": None, **_EARLY_2024},
    "peftdocs-70b-qlora-zero3": {"per_device_batch": 2, **_EARLY_2024},
    "peftdocs-70b-qlora-fsdp-offload": _EARLY_2024,
    "peftdocs-70b-qlora-fsdp": _EARLY_2024,
    "qwen-72b-lora-zero3-4gpu": {
        "zero": {
            "overlap_comm": True,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        }
    },
}
"""What the source of a row says and the row does not, or says otherwise: ``--per_device_train_batch_size 2``,
``--use_reentrant False``, and when its figures were written: in February and March 2024, for ``transformers>4.38.2``
(docs/source/accelerate/deepspeed.md and fsdp.md of PEFT, commits aa2ca83 and 6008f27). Qwen's script takes
finetune/ds_config_zero3.json."""

FURTHER: list[dict[str, Any]] = [
    {
        "id": "accelerate-benchmark-fsdp2-full",
        "gpus": 8,
        "strategy": "FSDP2 (accelerate, transformer_based_wrap)",
        "base": "Qwen/Qwen2.5-1.5B",
        "adapter": {"r": 1, "target_modules": ["q_proj"]},
        "all_weights_train": True,
        "dtype": "float32",
        "trainer_bf16": True,
        "outputs_held": True,
        "checkpointing": False,
        "per_device_batch": 2,
        "seq_len": 128,
        "measured": {"bytes": 4400 * 2**20, "reserved_bytes": 7050 * 2**20},
        "source": "benchmarks/fsdp2/imgs/allocated_memory.png and reserved_memory.png of accelerate, to 25 MiB",
    },
]
"""Published steps that are not in the file. The first trains all weights, which an adapter of rank 1 stands beside; its
curves are samples of what is allocated, 10 ms apart (measure_utils.py), not the largest figure."""


def measured(row: dict[str, Any]) -> tuple[float, str]:
    """Bytes, and which of ``KINDS`` they are."""
    found = row["measured"]
    if found.get("max_memory_allocated_gib"):
        return found["max_memory_allocated_gib"] * GIB, "allocated"
    if "by_seq_len_gb" in found:
        return found["by_seq_len_gb"]["2048"] * 1e9 / row["gpus"], "device"
    size = found.get("bytes") or found.get("gib", 0) * GIB or found.get("gb", 0) * 1e9
    return size, "allocated" if "bytes" in found else "reserved" if "gib" in found else "device"


def of_kind(row: dict[str, Any], estimate: Any, kind: str) -> int:
    """The predicted figure that a measured one of this kind is compared with."""
    if kind == "allocated":
        return int(estimate.peak_allocated)
    if kind == "reserved":
        return int(estimate.peak_reserved)
    has_nvls = row["gpus"] == 8 and "H100" in row.get("gpu", "")
    communicators = COMMUNICATORS.get(strategy_of(row), 1)
    return int(estimate.on_device + (communicators * NVLS if has_nvls else 0))


def also_measured(row: dict[str, Any]) -> dict[str, float]:
    """Bytes of further kinds that a row has."""
    found = row["measured"]
    found = {"device": found.get("nvidia_smi_mib_mean"), "reserved": found.get("reserved_bytes")}
    units = {"device": 2**20, "reserved": 1}
    return {kind: float(size) * units[kind] for kind, size in found.items() if size}


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
    if row["base"].startswith("Qwen-"):  # its own code: ``QWenLMHeadModel.forward``
        found["shifted copy"] = partial(shifted_copy, in_float32=False)
    if row.get("all_weights_train"):
        found["all weights train"] = all_weights_train
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
    kept.forget()
    try:
        yield
    finally:
        kept.forget()


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


@contextmanager
def all_weights_train() -> Iterator[None]:
    """A base that PEFT does not freeze."""
    freeze = BaseTuner._mark_only_adapters_as_trainable
    BaseTuner._mark_only_adapters_as_trainable = lambda self, model: None
    try:
        yield
    finally:
        BaseTuner._mark_only_adapters_as_trainable = freeze


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
    line: dict[str, Any] = {"id": row["id"], "strategy": strategy_of(row), "not_counted": unshared(row)}
    try:
        estimate = predicted(row)
    except (ValueError, RuntimeError) as error:
        return {**line, "error": str(error)[:200]}
    size, kind = measured(row)
    peak = of_kind(row, estimate, kind)
    further = {
        f"{more}_ratio": of_kind(row, estimate, more) / held for more, held in also_measured(row).items()
    }
    after = row["measured"].get("after_step_bytes")
    return {
        **line,
        "emulated": ", ".join(emulations_of(row)),
        "kind": kind,
        "predicted_gib": peak / GIB,
        "ratio": peak / size if size else None,
        "after_step_ratio": estimate.after_step / after if after else None,
        **further,
        "phase": estimate.peak_phase,
        "breakdown_gib": {name: round(held / GIB, 2) for name, held in estimate.breakdown.items()},
    }


FURTHER_RATIOS = ("reserved_ratio", "device_ratio")
WHOLE_DEVICE = (0.93, 1.07)
"""Bounds of what is compared beside another figure."""


def share_of_devices(lines: list[dict[str, Any]], word: str = "") -> tuple[int, int]:
    """How many readings of whole devices beside another figure lie within the bounds, and of how many."""
    counted = [line for line in lines if word in line["id"] and not line["not_counted"]]
    found = [line["device_ratio"] for line in counted if "device_ratio" in line]
    low, high = WHOLE_DEVICE
    return sum(low <= ratio <= high for ratio in found), len(found)


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
    for row in [*json.loads(asked.rows.read_text()), *FURTHER]:
        if asked.only not in row["id"] or (asked.counted and unshared(row)):
            continue
        line = compared(row)
        lines.append(line)
        after = line.get("after_step_ratio")
        print(
            f"{line['id']:72s} {line['strategy']:6s}",
            line["error"] if "error" in line else f"{line['ratio'] or 0:6.3f}",
            f"after step {after:.3f}" if after else "",
            *(f"{name.split('_')[0]} {line[name]:.3f}" for name in FURTHER_RATIOS if name in line),
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
    for word in ("", *OLD):
        within, of = share_of_devices(lines, word)
        if of:
            print(f"whole devices, {word or 'all'}: {within} of {of} within {WHOLE_DEVICE}")
    if asked.json:
        found = {"torch": torch.__version__, "transformers": version("transformers"), "rows": lines}
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
