"""What servers make of an adapter that PEFT saved, as read in their source; a table each."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

Feature = Literal[
    "dora",
    "bias",
    "lora_bias",
    "saved_modules",
    "task_head",
    "whole_embeddings",
    "token_rows",
    "rslora",
    "rank_pattern",
    "alpha_pattern",
    "ranks_by_layer",
    "padded_rank",
    "target_pattern",
    "embedding",
    "head",
    "tied_head",
    "experts",
    "convolution",
    "vision",
    "layers_in_part",
    "attention_in_part",
    "unconverted_init",
    "alora",
    "structure",
    "no_prefix",
    "adapter_in_keys",
    "pickle",
    "target",
]
"""What an adapter can have that not every server knows."""

Outcome = Literal["refuses", "drops", "rescales"]
"""It raises, it goes on without that part, or it multiplies the product by another scaling than PEFT."""


@dataclass(frozen=True, slots=True)
class Treatment:
    """What one server does with one feature.

    Attributes:
        outcome: What comes of it.
        reason: What its source does.
        warns: Whether another way of loading on the same server is right, so that this is only a warning.
    """

    outcome: Outcome
    reason: str
    warns: bool = False


@dataclass(frozen=True, slots=True)
class Server:
    """One server.

    Attributes:
        title: What it calls itself.
        version: The version whose source was read.
        source: The files that say so, relative to the repository.
        repository: ``owner/name`` on GitHub.
        features: What it does with the features that it does not serve as PEFT does.
        ranks: Values that its rank limit can take; empty where any will do.
        default_rank: The limit where nobody sets one; None where there is none.
        rank_option: How the limit is set; empty where there is none.
        targets: Last parts of the names of modules that it has LoRA layers for; empty where all linear ones do.
        own_format: Whether it reads a format of its own instead of PEFT's.
    """

    title: str
    version: str
    source: str
    repository: str
    features: dict[Feature, Treatment] = field(default_factory=dict)
    ranks: tuple[int, ...] = ()
    default_rank: int | None = None
    rank_option: str = ""
    targets: frozenset[str] = frozenset()
    own_format: bool = False

    @property
    def name(self) -> str:
        """Title and version."""
        return f"{self.title} {self.version}"


_refuses = partial(Treatment, "refuses")
_drops = partial(Treatment, "drops")
_rescales = partial(Treatment, "rescales")
_ATTENTION_AND_MLP = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj")

VLLM = Server(
    title="vLLM",
    version="0.33.0",
    source="vllm/lora/peft_helper.py, vllm/lora/lora_model.py, vllm/lora/utils.py, vllm/config/lora.py",
    repository="vllm-project/vllm",
    ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
    default_rank=16,
    rank_option="--max-lora-rank",
    features={
        "dora": _refuses("raises 'vLLM does not yet support DoRA'"),
        "bias": _refuses("raises 'Adapter bias is not supported'"),
        "lora_bias": _refuses("raises 'vLLM does not support LoRA bias (lora_bias)'"),
        "saved_modules": _refuses("allows no modules_to_save but classifier and score"),
        "whole_embeddings": _refuses("raises 'is unsupported LoRA weight' at an embedding saved in full"),
        "token_rows": _refuses("raises 'is unsupported LoRA weight' at trained token rows"),
        "unconverted_init": _refuses(
            "allows no init_lora_weights that rewrites the base (PiSSA, OLoRA, CorDA, LoftQ)"
        ),
        "alora": _refuses("raises 'vLLM does not support Activated LoRA (aLoRA)'"),
        "structure": _refuses("does not implement this field and raises"),
        "convolution": _refuses("has LoRA layers for linear layers and embeddings alone"),
        "adapter_in_keys": _refuses("raises 'is unsupported LoRA weight' at such a key"),
        "vision": _drops(
            "applies LoRA to the language model alone, unless it is started with --enable-tower-connector-lora"
        ),
    },
)

SGLANG = Server(
    title="SGLang",
    version="0.5.23",
    source="python/sglang/srt/lora/lora_config.py, lora.py, lora_manager.py, mem_pool.py, utils.py",
    repository="sgl-project/sglang",
    rank_option="--max-lora-rank",
    targets=frozenset(
        {
            *_ATTENTION_AND_MLP,
            *(
                "gate_up_proj",
                "out_proj",
                "in_proj",
                "q_a_proj",
                "kv_a_proj_with_mqa",
                "q_b_proj",
                "kv_b_proj",
            ),
            *("embed_tokens", "lm_head", "unembed_tokens", "w1", "w2", "w3"),
        }
    ),
    features={
        "dora": _refuses('raises "doesn\'t support DoRA adapters"'),
        "bias": _drops("takes a bias for lora_B, and puts lora_B in its place"),
        "lora_bias": _drops("takes a bias for lora_B, and puts lora_B in its place"),
        "rank_pattern": _refuses("makes every buffer of rank r, and asserts that the weights fit"),
        "target_pattern": _refuses("allows no pattern for target_modules but 'all-linear'"),
        "experts": _refuses("finds no target module for the keys of fused experts"),
        "convolution": _refuses("has LoRA layers for linear layers and embeddings alone"),
        "attention_in_part": _refuses(
            "stacks q_proj, k_proj and v_proj, and looks q_proj and v_proj up in every layer"
        ),
        "target": _refuses("does not know the sizes of this layer ('get_hidden_dim not implemented')"),
        "saved_modules": _drops("skips the weights of modules saved in full"),
        "task_head": _drops("skips the weights of modules saved in full"),
        "whole_embeddings": _drops("skips embeddings saved in full"),
        "token_rows": _drops("skips trained token rows"),
        "unconverted_init": _drops("does not read init_lora_weights, and leaves the base as it is"),
        "alora": _drops("does not read alora_invocation_tokens, and applies the adapter to every token"),
        "structure": _drops("does not read this field"),
        "rslora": _rescales("computes lora_alpha / r for every adapter; use_rslora is not read"),
        "alpha_pattern": _rescales("computes one lora_alpha / r for all modules"),
    },
)

_PUNICA: dict[Feature, Treatment] = {
    "dora": _drops("never looks for the magnitude vector"),
    "bias": _drops("loads lora_A and lora_B alone"),
    "lora_bias": _drops("loads lora_A and lora_B alone"),
    "saved_modules": _drops("loads lora_A and lora_B alone"),
    "task_head": _drops("loads lora_A and lora_B alone"),
    "whole_embeddings": _drops("loads lora_A and lora_B alone"),
    "token_rows": _drops("loads lora_A and lora_B alone"),
    "embedding": _drops("never looks for lora_embedding_A and lora_embedding_B"),
    "experts": _drops("never looks for the keys of fused experts"),
    "convolution": _drops("has LoRA layers for linear layers alone"),
    "layers_in_part": _drops(
        "leaves a target out altogether where one layer of the model has no weights for it"
    ),
    "target": _drops("has no LoRA layer for this target"),
    "unconverted_init": _drops("does not read init_lora_weights, and leaves the base as it is"),
    "alora": _drops("does not read alora_invocation_tokens, and applies the adapter to every token"),
    "structure": _drops("does not read this field"),
    "no_prefix": _drops("looks for keys that begin with base_model.model. alone"),
    "adapter_in_keys": _drops("looks for keys that end with lora_A.weight alone"),
    "ranks_by_layer": _refuses("stacks the layers of a target, which have to have one rank"),
    "rank_pattern": _rescales("divides lora_alpha by r whatever rank the module has"),
    "alpha_pattern": _rescales("computes one lora_alpha / r for all modules"),
    "padded_rank": _rescales(
        "pads ranks to 8 or to a multiple of 16, and divides lora_alpha by the padded rank from the second target on"
    ),
}

LORAX = Server(
    title="LoRAX",
    version="main at a7394ba (May 2026)",
    source="server/lorax_server/adapters/lora.py, server/lorax_server/utils/adapter.py, utils/punica.py",
    repository="predibase/lorax",
    targets=frozenset(
        {
            *_ATTENTION_AND_MLP,
            *(
                "gate_up_proj",
                "lm_head",
                "out_proj",
                "c_attn",
                "c_proj",
                "c_fc",
                "fc1",
                "fc2",
                "w1",
                "w2",
                "w3",
            ),
            *("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "query", "key", "value", "Wqkv"),
        }
    ),
    features=_PUNICA,
)

TGI = Server(
    title="Text Generation Inference",
    version="3.3.7",
    source="server/text_generation_server/adapters/lora.py, utils/adapter.py, models/__init__.py",
    repository="huggingface/text-generation-inference",
    targets=frozenset({*_ATTENTION_AND_MLP, "c_proj", "c_fc"}),
    features={**_PUNICA, "pickle": _refuses("looks for .safetensors alone")},
)

LLAMA_CPP = Server(
    title="llama.cpp",
    version="convert_lora_to_gguf.py at 0b03ada",
    source="convert_lora_to_gguf.py, src/llama-adapter.h",
    repository="ggml-org/llama.cpp",
    features={
        "dora": _refuses("stops at every tensor that is neither lora_A nor lora_B"),
        "bias": _refuses("stops at every tensor that is neither lora_A nor lora_B"),
        "lora_bias": _refuses("stops at every tensor that is neither lora_A nor lora_B"),
        "saved_modules": _refuses("stops at every tensor that is neither lora_A nor lora_B, norms aside"),
        "task_head": _refuses("stops at every tensor that is neither lora_A nor lora_B"),
        "whole_embeddings": _refuses("stops at embed_tokens.weight and lm_head.weight"),
        "token_rows": _refuses("stops at every tensor that is neither lora_A nor lora_B"),
        "experts": _refuses("finds no tensor of the base for the keys of fused experts"),
        "convolution": _refuses("has LoRA for matrices alone"),
        "tied_head": _refuses("raises 'lm_head is present in adapter, but is ignored in base model'"),
        "adapter_in_keys": _refuses("stops at every tensor that is neither lora_A nor lora_B"),
        "unconverted_init": _drops("does not read init_lora_weights, and leaves the base as it is"),
        "structure": _drops("does not read this field"),
        "rslora": _rescales("writes lora_alpha, which is divided by the rank; use_rslora is not read"),
        "alpha_pattern": _rescales("writes one lora_alpha for all modules"),
    },
)

MLX = Server(
    title="mlx-lm",
    version="0.32.0",
    source="mlx_lm/tuner/utils.py, mlx_lm/tuner/lora.py",
    repository="ml-explore/mlx-lm",
    own_format=True,
    features={
        "bias": _refuses("loads lora_a, lora_b and m alone"),
        "lora_bias": _refuses("loads lora_a, lora_b and m alone"),
        "saved_modules": _refuses("loads lora_a, lora_b and m alone"),
        "task_head": _refuses("loads lora_a, lora_b and m alone"),
        "whole_embeddings": _refuses("loads lora_a, lora_b and m alone"),
        "token_rows": _refuses("loads lora_a, lora_b and m alone"),
        "convolution": _refuses("has LoRA for linear layers, experts and embeddings alone"),
    },
)

TRANSFORMERS = Server(
    title="transformers",
    version="5.23.0",
    source="src/transformers/integrations/peft.py, run with PEFT 0.21.2",
    repository="huggingface/transformers",
    features={
        "dora": Treatment(
            "drops",
            "does not read the magnitude vectors in load_adapter(); PeftModel.from_pretrained does",
            warns=True,
        ),
    },
)

SERVERS = {
    "vllm": VLLM,
    "sglang": SGLANG,
    "lorax": LORAX,
    "tgi": TGI,
    "llama.cpp": LLAMA_CPP,
    "mlx": MLX,
    "transformers": TRANSFORMERS,
}
"""The servers, by the name that ``Expect(serve=...)`` takes."""
