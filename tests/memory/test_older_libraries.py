"""Published peaks that present libraries do not reach: with what the libraries of that time did put in, they are met.

Measured by fms-acceleration (``scripts/benchmarks/refs/a100_80gb.csv``) on an A100 and by PEFT's own benchmark
(``method_comparison/MetaMathQA``) on an L40S. Nothing is fitted to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig
from transformers import BitsAndBytesConfig, GPTBigCodeConfig, LlamaConfig, MistralConfig, MixtralConfig
from transformers.loss import loss_utils

from pytest_lora import MemoryEstimate, estimate_memory
from pytest_lora.memory import kept

NEW_EXPERTS = Version(transformers.__version__) >= Version("5")
CLOSE = pytest.approx(1.0, abs=0.015)
SHAPE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
}
MISTRAL: Any = MistralConfig(**SHAPE, tie_word_embeddings=False, sliding_window=4096)
MIXTRAL: Any = MixtralConfig(
    **SHAPE, tie_word_embeddings=False, num_local_experts=8, num_experts_per_tok=2, sliding_window=None
)
ADAPTER = LoraConfig(
    task_type="CAUSAL_LM",
    r=16,
    lora_alpha=16,
    lora_dropout=0.1,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
)


def nf4(*, twice: bool = True) -> Any:
    make: Any = BitsAndBytesConfig
    return make(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=twice,
        bnb_4bit_compute_dtype="bfloat16",
    )


def step(
    base: Any, batch: int, *, packed: bool = False, prepared: bool = False, upcast: Sequence[str] = ()
) -> MemoryEstimate:
    return estimate_memory(
        ADAPTER,
        base,
        batch_size=batch,
        seq_len=4096,
        quantization=nf4() if packed else None,
        prepare_for_kbit=prepared,
        upcast=upcast,
        autocast=packed,
        gradient_checkpointing="reentrant",
    )


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    """Predictions are kept by base and setting, which do not say what a test has put in."""
    kept.forget()
    yield
    kept.forget()


@pytest.fixture
def loss_before_450(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers before 4.50 shifted the logits, in float32, into a copy of their own."""

    def loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_: Any) -> torch.Tensor:
        wide = logits.float()
        shifted = wide[..., :-1, :].contiguous().view(-1, vocab_size)
        return torch.nn.functional.cross_entropy(shifted, labels[..., 1:].reshape(-1))

    monkeypatch.setitem(loss_utils.LOSS_MAPPING, "ForCausalLM", loss)


@pytest.fixture
def rotary_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 4.41 (Mixtral: to 4.45) kept cosines and sines of all positions in each layer."""

    def keeping(before: Callable[..., None]) -> Callable[..., None]:
        def made(self: Any, config: Any, *rest: Any, **named: Any) -> None:
            before(self, config, *rest, **named)
            width = config.hidden_size // config.num_attention_heads
            for name in ("cosines", "sines"):
                cache = torch.empty(config.max_position_embeddings, width)
                self.register_buffer(name, cache, persistent=False)

        return made

    models = transformers.models
    for kind in (
        models.mistral.modeling_mistral.MistralAttention,
        models.mixtral.modeling_mixtral.MixtralAttention,
    ):
        monkeypatch.setattr(kind, "__init__", keeping(kind.__init__))


@pytest.fixture
def inputs_kept_by_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes before 0.43.2 kept the input of each 4-bit product ("delete useless buffered activation" there)."""
    functions = pytest.importorskip("bitsandbytes.autograd._functions")
    multiply = functions.MatMul4Bit.forward

    def keeping(ctx: Any, values: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        out: torch.Tensor = multiply(ctx, values, *rest, **named)
        ctx.kept = values
        return out

    monkeypatch.setattr(functions.MatMul4Bit, "forward", staticmethod(keeping))


@pytest.fixture
def keys_and_values_of_bigcode(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPTBigCode of transformers 4.48 handed out keys and values under gradient checkpointing too.

    They are a view of what c_attn made, so that all of it stays until the outputs are let go
    (``modeling_gpt_bigcode.py``: ``query, key_value = self.c_attn(...).split(...)``, ``present = key_value``). Its own
    loss copied the shifted logits (``GPTBigCodeForCausalLM.forward``).
    """
    code = transformers.models.gpt_bigcode.modeling_gpt_bigcode
    attend, run = code.GPTBigCodeAttention.forward, code.GPTBigCodeModel.forward

    def attending(self: Any, *args: Any, **named: Any) -> Any:
        def keep(module: Any, args: Any, projected: torch.Tensor) -> None:
            if not torch.is_grad_enabled():  # not where the backward runs the layer again
                self.present = projected[..., -2 * self.kv_dim :]

        handle = self.c_attn.register_forward_hook(keep)
        try:
            return attend(self, *args, **named)
        finally:
            handle.remove()

    def running(self: Any, *args: Any, **named: Any) -> Any:
        outputs = run(self, *args, **named)
        outputs.past_key_values = tuple(vars(block.attn).pop("present") for block in self.h)
        return outputs

    def loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_: Any) -> torch.Tensor:
        shifted = logits[..., :-1, :].contiguous().view(-1, vocab_size)
        return torch.nn.functional.cross_entropy(shifted, labels[..., 1:].reshape(-1))

    monkeypatch.setattr(code.GPTBigCodeAttention, "forward", attending)
    monkeypatch.setattr(code.GPTBigCodeModel, "forward", running)
    monkeypatch.setitem(loss_utils.LOSS_MAPPING, "ForCausalLM", loss)


def santacoder(batch: int) -> MemoryEstimate:
    base: Any = GPTBigCodeConfig(
        n_embd=2048, n_layer=24, n_head=16, n_positions=2048, vocab_size=49280, n_inner=8192
    )
    adapter = LoraConfig(
        task_type="CAUSAL_LM", r=16, lora_alpha=16, lora_dropout=0.1, target_modules=["c_attn"]
    )
    return estimate_memory(
        adapter,
        base,
        batch_size=batch,
        seq_len=2048,
        quantization=nf4(),
        prepare_for_kbit=False,
        autocast=True,
        gradient_checkpointing="reentrant",
    )


def hand_out_wide_logits(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    """A causal LM before transformers 4.46: ``logits = logits.float()``."""
    make = kind.__init__

    def made(self: Any, config: Any) -> None:
        make(self, config)
        self.lm_head.register_forward_hook(lambda module, args, logits: logits.float())

    monkeypatch.setattr(kind, "__init__", made)


@pytest.fixture
def logits_and_mask_of_438(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 4.38 handed out logits in float32, and gave SDPA a mask of all positions for each sequence.

    ``modeling_llama.py``: ``logits = logits.float()``; ``_update_causal_mask`` repeats a mask of
    ``max_position_embeddings`` squared, of which each layer takes what it needs (``LlamaSdpaAttention.forward``).
    """
    code = transformers.models.llama.modeling_llama
    attend = code.LlamaAttention.forward
    hand_out_wide_logits(monkeypatch, code.LlamaForCausalLM)

    def mask(config: Any, inputs_embeds: torch.Tensor, **_: Any) -> torch.Tensor:
        whole = torch.empty(
            2 * [config.max_position_embeddings], dtype=torch.bool, device=inputs_embeds.device
        )
        repeated = whole[None, None].repeat(len(inputs_embeds), 1, 1, 1)
        return repeated.to(inputs_embeds.dtype) * torch.finfo(inputs_embeds.dtype).min

    def attending(
        self: Any, hidden_states: torch.Tensor, position_embeddings: Any, attention_mask: Any, **named: Any
    ) -> Any:
        length = hidden_states.shape[1]
        positions = torch.empty(length, dtype=torch.int64, device=hidden_states.device)
        part = attention_mask[:, :, positions, :length]
        return attend(self, hidden_states, position_embeddings, part, **named)

    monkeypatch.setattr(code, "create_causal_mask", mask)
    monkeypatch.setattr(code.LlamaAttention, "forward", attending)


class Kept(torch.autograd.Function):
    """Lets through what it is given, and holds a tensor of another width beside it until the backward."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, width: int) -> torch.Tensor:
        ctx.save_for_backward(values.new_empty(*values.shape[:-1], width))
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


@pytest.fixture
def litgpt(monkeypatch: pytest.MonkeyPatch) -> None:
    """litgpt of the week in which its table was published (0cc02afa, 27 October 2023), on Lightning 2.1.

    One projection for q, k and v, which all three are views of; the update of the adapter is held before it is padded
    (``LoRAQKVLinear.zero_pad``: ``index_copy`` keeps its source); the head runs over 128 tokens at once, and Fabric
    hands its outputs on in float32 (``convert_output``); the loss of each part is its own (``chunked_cross_entropy``).
    RMSNorm computes in float32 as transformers' does (``rmsnorm.py``; in 8641822, which the table names, it did not).
    """
    code = transformers.models.llama.modeling_llama
    make, make_model = code.LlamaAttention.__init__, code.LlamaForCausalLM.__init__

    def made(self: Any, config: Any, layer_idx: int) -> None:
        make(self, config, layer_idx)
        width = config.hidden_size
        del self.q_proj, self.k_proj, self.v_proj
        self.qkv = torch.nn.Linear(width, 3 * width, bias=False)

    def attending(
        self: Any, hidden_states: torch.Tensor, position_embeddings: Any, *_: Any, **__: Any
    ) -> Any:
        rows, length, width = hidden_states.shape
        merged = Kept.apply(self.qkv(hidden_states), 2 * width)
        parts = merged.view(rows, length, -1, 3, self.head_dim).permute(0, 2, 3, 1, 4).split(1, dim=2)
        q, k, v = (part.reshape(rows, -1, length, self.head_dim) for part in parts)
        q, k = code.apply_rotary_pos_emb(q, k, *position_embeddings)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, width)), None

    def made_model(self: Any, config: Any) -> None:
        make_model(self, config)
        weight = self.lm_head.weight
        self.lm_head.forward = lambda hidden: [
            torch.nn.functional.linear(part, weight).float() for part in hidden.split(128, dim=1)
        ]

    def loss(logits: list[torch.Tensor], labels: torch.Tensor, vocab_size: int, **_: Any) -> torch.Tensor:
        parts = zip(logits, labels.split(128, dim=1), strict=True)
        losses = [
            torch.nn.functional.cross_entropy(part.reshape(-1, vocab_size), of.reshape(-1), reduction="none")
            for part, of in parts
        ]
        return torch.cat(losses).mean()

    monkeypatch.setattr(code.LlamaAttention, "__init__", made)
    monkeypatch.setattr(code.LlamaAttention, "forward", attending)
    monkeypatch.setattr(code.LlamaForCausalLM, "__init__", made_model)
    monkeypatch.setitem(loss_utils.LOSS_MAPPING, "ForCausalLM", loss)


@pytest.mark.lora_slow
@pytest.mark.usefixtures("litgpt")
@pytest.mark.parametrize(
    ("size", "batch", "length", "rank", "measured"),
    [
        ("7B", 1, 1304, 8, 21.30),
        ("13B", 1, 1304, 8, 38.12),
        ("7B", 2, 512, 32, 19.77),
    ],
)
def test_litgpt(size: str, batch: int, length: int, rank: int, measured: float) -> None:
    """https://github.com/Lightning-AI/litgpt, tutorials/resource-tables.md and config_hub/finetune/README.md."""
    wide: dict[str, int] = {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    }
    base = LlamaConfig(**(wide if size == "13B" else {}), max_position_embeddings=4096)
    found = estimate_memory(
        LoraConfig(task_type="CAUSAL_LM", r=rank, lora_dropout=0.05, target_modules=["qkv"]),
        base,
        batch_size=batch,
        seq_len=length,
        trainer="loop",
        adapter_dtype="bfloat16",
        accumulation=2,
    )
    assert found.peak_allocated / 10**9 / measured == pytest.approx(1.0, abs=0.005)


@pytest.mark.lora_slow
@pytest.mark.usefixtures("loss_before_450")
def test_norms_that_trl_013_cast_to_float32() -> None:
    """``peft_module_casting_to_bf16`` (``trl/trainer/utils.py``) cast embeddings and head back, and norms not."""
    measured = 20_669_338_112
    without = step(MISTRAL, 4, packed=True).peak_allocated / measured
    found = step(MISTRAL, 4, packed=True, upcast=["norm"])
    assert without < 0.8
    assert found.peak_allocated / measured == pytest.approx(1.0, abs=0.004)
    assert found.after_step / 4_307_028_992 == pytest.approx(1.0, abs=0.0005)


@pytest.mark.lora_slow
@pytest.mark.usefixtures("loss_before_450")
@pytest.mark.parametrize(
    ("packed", "measured"), [(False, 25_653_881_344), (True, 15_323_147_776)], ids=["bf16", "nf4"]
)
def test_the_logits_of_445(monkeypatch: pytest.MonkeyPatch, packed: bool, measured: int) -> None:
    before = step(MISTRAL, 4, packed=packed).peak_allocated / measured
    kept.forget()
    hand_out_wide_logits(monkeypatch, transformers.models.mistral.modeling_mistral.MistralForCausalLM)
    after = step(MISTRAL, 4, packed=packed).peak_allocated / measured
    assert after == pytest.approx(1.0, abs=0.001)
    assert abs(after - 1) < abs(before - 1) / 2


@pytest.mark.lora_slow
@pytest.mark.skipif(not NEW_EXPERTS, reason="transformers 4.57 hands the mask over by another name")
@pytest.mark.usefixtures("loss_before_450", "logits_and_mask_of_438")
@pytest.mark.parametrize(("batch", "packed", "measured"), [(4, False, 22.04), (8, True, 20.94)])
def test_fsdp_qlora_of_march_2024(batch: int, packed: bool, measured: float) -> None:
    """One rank without sharding, two RTX 3090: https://github.com/AnswerDotAI/fsdp_qlora, benchmarks_03_2024.md."""
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    found = estimate_memory(
        LoraConfig(task_type="CAUSAL_LM", r=64, lora_alpha=16, lora_dropout=0.1, target_modules=linear),
        LlamaConfig(max_position_embeddings=4096),
        batch_size=batch,
        seq_len=2048,
        quantization=nf4(twice=False) if packed else None,
        prepare_for_kbit=False,
        autocast=False,
        adapter_dtype="bfloat16",
        gradient_checkpointing="reentrant",
        outputs_held=True,
    )
    assert found.peak_reserved / 2**30 / measured == CLOSE


SANTACODER = pytest.mark.parametrize(("batch", "measured"), [(4, 9_147_162_112), (8, 17_486_716_416)])


@pytest.mark.lora_slow
@SANTACODER
def test_santacoder_today(batch: int, measured: int) -> None:
    assert santacoder(batch).peak_allocated / measured == pytest.approx(0.796, abs=0.006)


@pytest.mark.skipif(not NEW_EXPERTS, reason="transformers 4.57 runs the layer of a checkpoint in another way")
@pytest.mark.usefixtures("keys_and_values_of_bigcode")
@SANTACODER
def test_santacoder_with_the_keys_and_values_of_448(batch: int, measured: int) -> None:
    assert santacoder(batch).peak_allocated / measured == CLOSE


@pytest.mark.lora_slow
def test_the_loss_of_448() -> None:
    measured = 38_742_912_512
    assert step(MISTRAL, 8).peak_allocated / measured == pytest.approx(0.939, abs=0.005), "without it"


@pytest.mark.usefixtures("loss_before_450")
def test_the_loss_of_448_put_in() -> None:
    found = step(MISTRAL, 8)
    assert found.peak_allocated / 38_742_912_512 == CLOSE
    assert found.after_step / 14_664_886_272 == CLOSE


@pytest.mark.lora_slow
def test_rotary_caches_and_kept_inputs_of_june_2024() -> None:
    found = step(MISTRAL, 4, packed=True, prepared=True)
    assert found.peak_allocated / 22_825_932_800 == pytest.approx(0.936, abs=0.005), "without them"
    assert found.after_step / 5_368_221_184 == pytest.approx(0.900, abs=0.005)


@pytest.mark.lora_slow
@pytest.mark.skipif(
    not NEW_EXPERTS, reason="with transformers 4.57 and bitsandbytes 0.46 the kept inputs come to 1.03"
)
@pytest.mark.usefixtures("rotary_caches", "inputs_kept_by_bitsandbytes")
@pytest.mark.parametrize(
    ("batch", "measured", "after"), [(4, 22_825_932_800, 5_368_221_184), (8, 40_278_956_032, 5_368_614_400)]
)
def test_rotary_caches_and_kept_inputs_of_june_2024_put_in(batch: int, measured: int, after: int) -> None:
    found = step(MISTRAL, batch, packed=True, prepared=True)
    assert found.peak_allocated / measured == CLOSE
    assert found.after_step / after == pytest.approx(1.0, abs=0.0005)


experts_of_their_own = pytest.mark.skipif(
    NEW_EXPERTS, reason="transformers 5 fuses experts; before, each had layers"
)


@pytest.mark.lora_slow
@experts_of_their_own
@pytest.mark.usefixtures("loss_before_450")
@pytest.mark.parametrize(("batch", "measured"), [(4, 36_731_843_072), (8, 48_770_183_680)])
def test_mixtral_where_bitsandbytes_packs_its_experts(batch: int, measured: int) -> None:
    found = step(MIXTRAL, batch, packed=True)
    assert found.peak_allocated / measured == CLOSE
    assert found.after_step / 24_664_501_248 == pytest.approx(1.0, abs=0.0005)


@pytest.mark.lora_slow
@experts_of_their_own
@pytest.mark.usefixtures("rotary_caches")
def test_mixtral_of_445() -> None:
    assert step(MIXTRAL, 4, packed=True).peak_allocated / 36_218_023_424 == CLOSE


@pytest.mark.lora_slow
@experts_of_their_own
@pytest.mark.usefixtures("rotary_caches", "inputs_kept_by_bitsandbytes")
def test_mixtral_of_june_2024() -> None:
    found = step(MIXTRAL, 4, packed=True, prepared=True)
    assert found.peak_allocated / 46_475_660_288 == CLOSE


@pytest.mark.lora_slow
def test_lora_fa_of_january_2026_froze_its_first_factor() -> None:
    base = LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
    )
    adapter = LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=64, target_modules=["q_proj", "v_proj"])
    setting: dict[str, Any] = {
        "batch_size": 4,
        "seq_len": 700,
        "padding_mask": True,
        "outputs_held": True,
        "use_cache": True,
        "autocast": False,
        "empty_cache": True,
    }
    measured = {"2026-01": 20_206_059_520, "2026-07": 22_240_296_960}
    frozen = estimate_memory(adapter, base, frozen=["lora_A"], **setting).peak_reserved
    trained = estimate_memory(adapter, base, **setting).peak_reserved
    assert frozen / measured["2026-01"] == CLOSE
    assert trained / measured["2026-07"] == CLOSE
