"""Every architecture answers, or says what to write: images, audio, classifiers, mixtures, state spaces."""

from __future__ import annotations

import ast
import math
import re
from typing import Any

import pytest
import transformers
from packaging.version import Version
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from pytest_lora import estimate_memory
from pytest_lora.inspection.memory import patience, predictor
from pytest_lora.inspection.transformers_internals import runs_images_without_values

TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 256,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 7,
    "image_size": 56,
    "patch_size": 14,
}


def adapter(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", **fields})


def estimate(base: Any, config: LoraConfig | None = None, **setting: Any) -> Any:
    return estimate_memory(config or adapter(), base, **{"batch_size": 2, "seq_len": 64, **setting})


IMAGES: dict[str, Any] = {
    "llava": lambda: transformers.LlavaConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", **VISION},
    ),
    "gemma3": lambda: transformers.Gemma3Config(
        text_config={**TEXT, "head_dim": 16}, vision_config=VISION, mm_tokens_per_image=4
    ),
    "qwen2.5-vl": lambda: transformers.Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 7,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [3, 6],
        },
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    ),
    "idefics3": lambda: transformers.Idefics3Config(
        text_config={"model_type": "llama", **TEXT}, vision_config=VISION, scale_factor=2
    ),
}


since_5 = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.0.0"),
    reason="transformers 4 compares by values, and fuses no experts",
)


@since_5
@pytest.mark.parametrize("kind", IMAGES)
def test_the_images_of_a_step_are_counted(kind: str) -> None:
    text, one, two = (estimate(IMAGES[kind](), images=images) for images in (0, 1, 2))
    assert text.loaded == one.loaded == two.loaded
    assert text.peak_allocated < one.peak_allocated < two.peak_allocated
    left_out = [part.what for part in one.unmodelled if part.what.startswith("images")]
    assert len(left_out) == (0 if runs_images_without_values() else 1)
    assert not text.unmodelled
    assert one.over_ranks == 0, "there is one GPU"
    larger = estimate(IMAGES[kind](), image_size=112) if kind == "qwen2.5-vl" else None
    if larger is not None:
        assert larger.peak_allocated < one.peak_allocated, "448 pixels are the default of any resolution"


def test_waveforms_are_as_long_as_their_frames() -> None:
    base = transformers.Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=7,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        architectures=["Wav2Vec2ForCTC"],
        vocab_size=32,
    )
    short, long = (estimate(base, adapter(target_modules=["q_proj"]), seq_len=n) for n in (64, 256))
    assert 0 < short.loaded < short.peak_allocated < long.peak_allocated


@pytest.mark.parametrize("name", ["DebertaV2", "Llama"])
def test_classifiers_of_any_kind(name: str) -> None:
    make = getattr(transformers, f"{name}Config")
    base = make(**TEXT, architectures=[f"{name}ForSequenceClassification"], pad_token_id=None)
    assert base.pad_token_id is None
    assert estimate(base, adapter(task_type="SEQ_CLS")).peak_allocated > 0
    assert base.pad_token_id is None


def mamba() -> Any:
    return transformers.MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=7, vocab_size=128)


def test_what_peft_excludes_is_what_to_write() -> None:
    with pytest.raises(ValueError, match=r"Write exclude_modules=\['out_proj'\] in the LoraConfig\.$"):
        estimate(mamba())
    excluded = estimate(mamba(), adapter(exclude_modules=["out_proj"]), seq_len=8)
    assert excluded.peak_allocated > 0


def test_a_layer_that_returns_several_tensors_is_named() -> None:
    base = transformers.Llama4TextConfig(
        **TEXT, intermediate_size_mlp=96, head_dim=16, num_local_experts=2, num_experts_per_tok=1
    )
    with pytest.raises(ValueError, match=r"router returns several tensors, .* exclude_modules=\['router'\]"):
        estimate(base)
    assert estimate(base, adapter(exclude_modules=["router"])).peak_allocated > 0


@since_5
def test_a_layer_that_multiplies_by_a_packed_weight_itself_is_named() -> None:
    base = transformers.JambaConfig(
        **TEXT, num_experts=2, mamba_d_state=4, mamba_d_conv=4, use_mamba_kernels=False, mamba_dt_rank=4
    )
    with pytest.raises(ValueError, match=r"mamba multiplies by a packed weight itself, ") as raised:
        estimate(base, adapter(target_modules=["q_proj", "x_proj"]), seq_len=8, quantization="nf4")
    written = re.search(
        r"BitsAndBytesConfig\(\.\.\., llm_int8_skip_modules=(\[.*\])\); asked: ", str(raised.value)
    )
    assert written
    spared = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=ast.literal_eval(written[1]))
    assert estimate(base, adapter(target_modules=["x_proj"]), seq_len=8, quantization=spared).peak_allocated
    assert "lm_head" in spared.llm_int8_skip_modules, (
        "which would be packed else, and the hidden states cast to it"
    )


@since_5
def test_a_base_that_quantization_leaves_whole_is_said() -> None:
    base = transformers.MixtralConfig(**TEXT, num_local_experts=4)
    assert "stays whole" in str(estimate(base, quantization="nf4"))
    assert "stays whole" not in str(estimate(base))
    assert "stays whole" not in str(estimate(transformers.LlamaConfig(**TEXT), quantization="nf4"))


def test_what_takes_long_says_so_and_gives_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = adapter(exclude_modules=["out_proj"])
    monkeypatch.setattr(patience, "SPEAKS_AFTER", 0.0)
    monkeypatch.setattr(predictor, "WORTH_FITTING", 0.0)  # the step that is asked for is traced itself
    estimate(mamba(), config, seq_len=24)
    said = capsys.readouterr().err
    assert "pytest-lora: estimating a step of MambaForCausalLM, batch 2 x 24, r=4: " in said
    assert "now in the beginning" in said, "before anything that is counted runs"
    monkeypatch.setattr(patience, "GIVES_UP_AFTER", 0.0)
    with pytest.raises(
        ValueError, match=r"^base: a step of MambaForCausalLM, batch 2 x 25, .* shorter seq_len$"
    ):
        estimate(mamba(), config, seq_len=25)
    monkeypatch.setattr(predictor, "WORTH_FITTING", math.inf)  # another step is traced, to see how it grows
    asked = (
        r"^base: a step of MambaForCausalLM, batch 2 x 26, r=4 \(from how it grows, seen at batch \d+ x \d+, "
    )
    with pytest.raises(ValueError, match=asked):
        estimate(mamba(), config, seq_len=26)
    monkeypatch.undo()
    monkeypatch.setattr(patience, "MOST_EVENTS", 100)
    with pytest.raises(ValueError, match="too many to play"):
        estimate(mamba(), config, seq_len=27)
