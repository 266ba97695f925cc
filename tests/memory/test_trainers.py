"""A trainer decides what a step takes: its own code runs, and allocates what a real step on the CPU allocates."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, TrainingArguments

from pytest_lora import estimate_memory, step_memory
from pytest_lora.facts.memory import StepSetting
from pytest_lora.inspection.memory import dry_run
from pytest_lora.inspection.memory.dry_run import Trace
from pytest_lora.inspection.memory.layer_stacks import Cut
from pytest_lora.inspection.memory.meta_model import build
from pytest_lora.memory.setting import checked_setting

trl = pytest.importorskip("trl", minversion="1.16")

VOCABULARY = 3000
BATCH, LENGTH, PROMPT = 3, 48, 16
BASE = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=4,
    num_hidden_layers=3,
    vocab_size=VOCABULARY,
    pad_token_id=0,
    attn_implementation="eager",
)
CONFIG = LoraConfig(r=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


class Allocations(TorchDispatchMode):
    """Bytes of all storages that are made inside and live, and the largest of them."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.sizes: dict[int, int] = {}
        self.watched: dict[int, weakref.ref[Any]] = {}
        self.before: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self._was_there(leaf.untyped_storage())
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._made(leaf.untyped_storage())
        return out

    def _was_there(self, storage: Any) -> None:
        key = id(storage)
        if key not in self.sizes and key not in self.before:
            self.before[key] = weakref.ref(storage, lambda _: self.before.pop(key))

    def _made(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.sizes or key in self.before:
            return
        self.sizes[key] = size
        self.watched[key] = weakref.ref(storage, lambda _: self._freed(key))
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)

    def _freed(self, key: int) -> None:
        self.live -= self.sizes.pop(key)
        del self.watched[key]


def tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w1"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="w0", eos_token="w2", bos_token="w3", unk_token="w1"
    )


def rows(**columns: list[Any]) -> Any:
    return pytest.importorskip("datasets").Dataset.from_dict(columns)


def plain(path: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(path),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "per_device_train_batch_size": BATCH,
        **more,
    }


def numbers(*shape: int) -> torch.Tensor:
    return torch.randint(4, VOCABULARY, shape)


def sft(path: Path, **more: Any) -> tuple[Any, dict[str, Any]]:
    trainer = trl.SFTTrainer(
        model=LlamaForCausalLM(BASE),
        args=trl.SFTConfig(**plain(path, **more)),
        train_dataset=rows(text=["w5 w6 w7"] * 4),
        processing_class=tokenizer(),
        peft_config=CONFIG,
    )
    ids = numbers(BATCH, LENGTH)
    return trainer, {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def dpo(path: Path, **more: Any) -> tuple[Any, dict[str, Any]]:
    trainer = trl.DPOTrainer(
        model=LlamaForCausalLM(BASE),
        args=trl.DPOConfig(**plain(path, **more)),
        train_dataset=rows(prompt=["w5"] * 4, chosen=["w6 w7"] * 4, rejected=["w8"] * 4),
        processing_class=tokenizer(),
        peft_config=CONFIG,
    )
    ids = numbers(2 * BATCH, LENGTH)
    ones = torch.ones_like(ids)
    return trainer, {"input_ids": ids, "attention_mask": ones, "completion_mask": ones.clone()}


def kto(path: Path, **more: Any) -> tuple[Any, dict[str, Any]]:
    trainer = trl.KTOTrainer(
        model=LlamaForCausalLM(BASE),
        args=trl.KTOConfig(**plain(path, **more)),
        train_dataset=rows(prompt=["w5"] * 4, completion=["w6 w7"] * 4, label=[True, False] * 2),
        processing_class=tokenizer(),
        peft_config=CONFIG,
    )
    batch: dict[str, Any] = {"label": torch.tensor([True, False, True])}
    for kind in ("", "KL_"):
        ids = numbers(BATCH, LENGTH)
        masks = {name: torch.ones_like(ids) for name in ("attention_mask", "completion_mask")}
        batch.update({f"{kind}{name}": value for name, value in {"input_ids": ids, **masks}.items()})
    return trainer, batch


def reward(path: Path, **more: Any) -> tuple[Any, dict[str, Any]]:
    trainer = trl.RewardTrainer(
        model=LlamaForSequenceClassification(LlamaConfig(**{**BASE.to_dict(), "num_labels": 1})),
        args=trl.RewardConfig(**plain(path, **more)),
        train_dataset=rows(chosen=["w6 w7"] * 4, rejected=["w8"] * 4),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "down_proj"], task_type="SEQ_CLS"),
    )
    trainer.model.config._attn_implementation = "eager"
    ids = numbers(2 * BATCH, LENGTH)
    return trainer, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def grpo(path: Path, **more: Any) -> tuple[Any, dict[str, Any]]:
    completion = LENGTH - PROMPT
    trainer = trl.GRPOTrainer(
        model=LlamaForCausalLM(BASE),
        args=trl.GRPOConfig(**plain(path, num_generations=BATCH, max_completion_length=completion, **more)),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=rows(prompt=["w5 w6"] * 4),
        processing_class=tokenizer(),
        peft_config=CONFIG,
    )
    trainer.current_gradient_accumulation_steps = 1
    prompt, answer = numbers(BATCH, PROMPT), numbers(BATCH, completion)
    return trainer, {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": answer,
        "completion_mask": torch.ones_like(answer),
        "advantages": torch.randn(BATCH),
        "num_items_in_batch": torch.tensor(float(BATCH * completion)),
    }


REAL: dict[str, Callable[..., tuple[Any, dict[str, Any]]]] = {
    "trl-sft": sft,
    "trl-dpo": dpo,
    "trl-kto": kto,
    "trl-reward": reward,
    "trl-grpo": grpo,
}


@contextmanager
def as_it_is(*_: Any) -> Iterator[None]:
    """In the place of what puts in the memory of CUDA's kernels."""
    yield


def peak_and_largest(trace: Trace) -> tuple[int, int]:
    live = peak = 0
    for event in trace.events:
        live += trace.sizes[event] if event >= 0 else -trace.sizes[~event]
        peak = max(peak, live)
    return peak, max(trace.sizes)


def in_place(into: Any, left: Any, right: Any, **_: Any) -> int:
    """torch counts the product that CUDA adds in one call, and not the one in its place on the CPU."""
    return int(2 * left[0] * left[1] * right[1])


def require_same(
    trainer: str, made: Any, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch, config: Any = None
) -> None:
    """Hold a step of a real trainer against the one that is traced for its arguments."""
    made.model.train()
    made.model.gradient_checkpointing_enable(made.args.gradient_checkpointing_kwargs)
    gc.collect()
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place})
    real = Allocations()
    for looking in (real, counter):  # not at once: the counter keeps tensors alive
        with looking:
            loss = made.compute_loss(made.model, batch, num_items_in_batch=torch.tensor(BATCH * LENGTH))
            loss.backward()
            del loss

    setting = checked_setting(
        args=made.args,
        dtype="float32",
        autocast=False,
        gradient_checkpointing=made.args.gradient_checkpointing,
    )
    point = {"batch_size": BATCH, "seq_len": LENGTH}
    asked = StepSetting(**{**{n: getattr(setting, n) for n in setting.__dataclass_fields__}, **point})
    config = config or LoraConfig(
        r=8,
        target_modules=["q_proj", "down_proj"],
        task_type="SEQ_CLS" if trainer == "trl-reward" else "CAUSAL_LM",
    )
    on_a_gpu = dry_run.trace(build(BASE, config, asked, cut=Cut(0)), asked)
    assert sum(count for *_, count in on_a_gpu.flops) == counter.get_total_flops()
    monkeypatch.setattr(dry_run, "fused_kernels", as_it_is)
    peak, largest = peak_and_largest(dry_run.trace(build(BASE, config, asked, cut=Cut(0)), asked))
    assert largest == real.largest
    assert peak == pytest.approx(real.peak, rel=0.01)


@pytest.mark.lora_slow
@pytest.mark.parametrize("trainer", REAL)
def test_a_step_allocates_what_a_real_one_does(
    trainer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, batch = REAL[trainer](tmp_path)
    require_same(trainer, made, batch, monkeypatch)


SEVEN: Any = LlamaConfig(
    hidden_size=256, intermediate_size=512, num_attention_heads=4, num_hidden_layers=8, vocab_size=128_000
)
POINT: dict[str, Any] = {"batch_size": 4, "seq_len": 512, "quantization": "nf4"}


def test_trl_never_holds_all_logits_and_the_trainer_does() -> None:
    plainly = estimate_memory(CONFIG, SEVEN, trainer="transformers", gradient_checkpointing=True, **POINT)
    by_trl = estimate_memory(CONFIG, SEVEN, trainer="trl-sft", **POINT)
    logits = 4 * 512 * 128_000
    assert plainly.breakdown["logits and loss"] >= 2 * 4 * logits
    assert by_trl.breakdown.get("logits and loss", 0) == 0
    assert by_trl.peak_allocated < plainly.peak_allocated - 4 * logits
    assert by_trl.setting.gradient_checkpointing, "as TRL's arguments have it by default"


def test_trl_keeps_adapters_of_a_quantized_base_in_bfloat16_and_casts_nothing() -> None:
    whole = estimate_memory(CONFIG, SEVEN, trainer="transformers", **POINT)
    half = estimate_memory(CONFIG, SEVEN, trainer="trl-sft", **POINT)
    assert 1.9 < whole.breakdown["adapters"] / half.breakdown["adapters"] < 2.1
    assert whole.breakdown["embeddings and head"] == 2 * half.breakdown["embeddings and head"]
    unquantized = estimate_memory(CONFIG, SEVEN, trainer="trl-sft", batch_size=4, seq_len=512)
    assert unquantized.breakdown["adapters"] == whole.breakdown["adapters"]


def test_pairs_are_read_side_by_side() -> None:
    one, pairs = (step_memory(CONFIG, SEVEN, trainer=name) for name in ("trl-sft", "trl-dpo"))
    assert pairs.peak_allocated(2, 512) == pytest.approx(one.peak_allocated(4, 512), rel=0.05)


def test_kto_reads_mismatched_completions_only_where_its_loss_asks_for_them(tmp_path: Path) -> None:
    config = LoraConfig(r=8, target_modules=["q_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")

    def of(**more: Any) -> Any:
        args = trl.KTOConfig(**plain(tmp_path), **more)
        return step_memory(config, SEVEN, args=args).flops(BATCH, 64)

    plainly, by_apo = of(), of(loss_type="apo_zero_unpaired")
    assert plainly.forward == pytest.approx(2 * by_apo.forward, rel=0.02), "four readings against two"
    assert plainly.backward == by_apo.backward
    ready = of(precompute_ref_log_probs=True)
    assert ready.forward == pytest.approx(by_apo.forward, rel=0.02), "the KL term without a reference"


def test_preference_trainers_turn_dropout_off(tmp_path: Path) -> None:
    config = LoraConfig(r=8, target_modules=["q_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    off, on = (
        step_memory(
            config,
            SEVEN,
            args=trl.DPOConfig(**plain(tmp_path), disable_dropout=disable, gradient_checkpointing=False),
        ).peak_allocated(2, 128)
        for disable in (True, False)
    )
    assert on >= off + 7 * 4 * 128 * 256, "a byte a number of the input of each layer but the last"


def test_a_loop_of_ones_own_holds_its_outputs() -> None:
    loop = estimate_memory(CONFIG, SEVEN, trainer="loop", batch_size=4, seq_len=512)
    trainer = estimate_memory(CONFIG, SEVEN, trainer="transformers", batch_size=4, seq_len=512)
    assert (loop.setting.outputs_held, loop.setting.autocast) == (True, "")
    assert loop.peak_allocated > trainer.peak_allocated


def test_arguments_say_everything(tmp_path: Path) -> None:
    with contextlib.suppress(ImportError):
        args = trl.SFTConfig(
            **plain(
                tmp_path, gradient_accumulation_steps=2, optim="adamw_8bit", max_length=256, packing=True
            ),
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )
    found = estimate_memory(CONFIG, SEVEN, args=args)
    asked = found.setting
    assert (asked.batch_size, asked.seq_len, asked.accumulation) == (BATCH, 256, 2)
    assert (asked.trainer, asked.optimizer, asked.gradient_checkpointing) == (
        "trl-sft",
        "adamw_8bit",
        "reentrant",
    )
    assert asked.padding_free
    assert asked.autocast == ""
    assert estimate_memory(CONFIG, SEVEN, args=args, batch_size=1).setting.batch_size == 1
    with pytest.raises(ValueError, match=r"^trainer: a SFTConfig is for 'trl-sft', not 'trl-dpo'; leave one"):
        estimate_memory(CONFIG, SEVEN, args=args, trainer="trl-dpo")


def test_the_arguments_of_the_trainer_of_transformers(tmp_path: Path) -> None:
    args = TrainingArguments(**plain(tmp_path, gradient_checkpointing=True, torch_empty_cache_steps=4))
    asked = estimate_memory(CONFIG, SEVEN, args=args, seq_len=64).setting
    # Reentrant is what transformers took for granted before its version 5.
    usual = True if Version(transformers.__version__) >= Version("5") else "reentrant"
    assert (asked.trainer, asked.gradient_checkpointing, asked.empty_cache) == ("transformers", usual, True)
    with pytest.raises(
        TypeError, match=r"^estimate_memory needs seq_len=, or args= of a trainer that have it$"
    ):
        estimate_memory(CONFIG, SEVEN, args=args)


def test_a_trainer_that_is_not_known_is_named(tmp_path: Path) -> None:
    args = trl.RLOOConfig(**plain(tmp_path, num_generations=BATCH))
    with pytest.raises(ValueError, match=r"^args: the trainer of a RLOOConfig is not known here; known are "):
        estimate_memory(CONFIG, SEVEN, args=args)
    for loss in ("full", "cut"):
        with pytest.raises(ValueError, match=r"^loss: 'trl-sft' computes its own loss, in tiles"):
            estimate_memory(CONFIG, SEVEN, trainer="trl-sft", loss=loss, **POINT)


def test_liger_of_arguments_means_its_layers_and_in_the_trainer_its_loss(tmp_path: Path) -> None:
    def found(kind: Any, **config: Any) -> tuple[Any, str]:
        args = kind(**plain(tmp_path))
        args.use_liger_kernel, args.liger_kernel_config = True, config or None
        asked = estimate_memory(CONFIG, SEVEN, args=args, seq_len=64).setting
        return asked.kernels, asked.loss

    assert found(trl.SFTConfig) == ("liger", "full"), "beside TRL's own head"
    assert found(TrainingArguments) == ("liger", "liger")
    assert found(TrainingArguments, fused_linear_cross_entropy=False) == ("liger", "full")


def test_what_generation_takes_is_a_lower_bound() -> None:
    found = estimate_memory(CONFIG, SEVEN, trainer="trl-grpo", batch_size=4, seq_len=512)
    assert found.bound == "at least"
    assert "keys and values take 16.0 MiB or more" in str(found), (
        "2 x 2 bytes x 8 layers x 256 wide x 2048 tokens"
    )


def test_completions_of_all_steps_that_share_a_generation_are_made_at_once(tmp_path: Path) -> None:
    def words(**more: Any) -> str:
        args = trl.GRPOConfig(**plain(tmp_path, num_generations=BATCH, gradient_accumulation_steps=4, **more))
        found = estimate_memory(CONFIG, SEVEN, args=args, batch_size=4, seq_len=512)
        return "; ".join(part.what for part in found.unmodelled)

    assert "keys and values take 64.0 MiB or more" in words(), "four times a batch of 16 MiB"
    assert "keys and values take 32.0 MiB or more" in words(steps_per_generation=2)
    assert words(use_vllm=True, vllm_mode="server") == ""
    beside = words(use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.25)
    assert beside == "vLLM on the same GPU, which is given 25 % of the GPU, is"


def test_float32_weights_under_autocast_are_kept_in_bfloat16_for_the_backward(tmp_path: Path) -> None:
    config = LoraConfig(r=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(BASE), config)
    model.config.use_cache = False
    ids = numbers(BATCH, LENGTH)
    gc.collect()
    with Allocations() as real:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        del loss
    setting = checked_setting(dtype="float32", autocast="bfloat16", trainer="loop", outputs_held=False)
    asked = replace(setting, batch_size=BATCH, seq_len=LENGTH)
    peak, largest = peak_and_largest(dry_run.trace(build(BASE, config, asked, cut=Cut(0)), asked))
    assert largest == real.largest
    assert peak == pytest.approx(real.peak, rel=0.01)


def test_what_is_moved_to_the_host_makes_an_upper_bound(tmp_path: Path) -> None:
    args = trl.SFTConfig(**plain(tmp_path, activation_offloading=True))
    assert estimate_memory(CONFIG, SEVEN, args=args, seq_len=64).bound == "at most"
