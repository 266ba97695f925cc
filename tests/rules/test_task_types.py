"""What is built from a ``config.json`` that names the class a base was pretrained as: the task type decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from pytest_lora import check_checkpoint, check_config, check_training, estimate_memory
from pytest_lora.inspection.skeleton import resolve_base

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def described(kind: str, architecture: str | None, **changes: Any) -> Any:
    config = getattr(transformers, kind)(**SMALL, **changes)
    config.architectures = None if architecture is None else [architecture]
    return config


@pytest.mark.parametrize(
    ("kind", "architecture", "task_type", "built"),
    [
        ("BertConfig", "BertForMaskedLM", "SEQ_CLS", "BertForSequenceClassification"),
        ("BertConfig", "BertModel", "TOKEN_CLS", "BertForTokenClassification"),
        ("BertConfig", "BertForPreTraining", "QUESTION_ANS", "BertForQuestionAnswering"),
        ("BertConfig", "BertForMaskedLM", "FEATURE_EXTRACTION", "BertModel"),
        ("BertConfig", "BertForMaskedLM", None, "BertForMaskedLM"),
        ("BertConfig", "BertForTokenClassification", "SEQ_CLS", "BertForTokenClassification"),
        ("BertConfig", None, "SEQ_CLS", "BertForSequenceClassification"),
        ("LlamaConfig", "LlamaForCausalLM", "SEQ_CLS", "LlamaForSequenceClassification"),
        ("LlamaConfig", "LlamaForCausalLM", "CAUSAL_LM", "LlamaForCausalLM"),
        ("LlamaConfig", "LlamaForCausalLM", "SEQ_2_SEQ_LM", "LlamaForCausalLM"),
    ],
)
def test_the_task_type_chooses_the_class(
    kind: str, architecture: str | None, task_type: str | None, built: str
) -> None:
    assert type(resolve_base(described(kind, architecture), task_type)).__name__ == built


def test_models_of_several_kinds_of_input_stay_what_they_are() -> None:
    text = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 96}
    vision = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text, num_attention_heads=4),
        vision_config=transformers.CLIPVisionConfig(**vision),
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    for task_type in (None, "CAUSAL_LM", "FEATURE_EXTRACTION"):
        assert type(resolve_base(config, task_type)).__name__ == "LlavaForConditionalGeneration"


def test_a_classifier_on_a_pretrained_encoder_is_healthy() -> None:
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["query"], task_type="SEQ_CLS", modules_to_save=["classifier"]
    )
    assert not loud(check_config(config, described("BertConfig", "BertForMaskedLM")))
    decoder = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], task_type="SEQ_CLS")
    assert not loud(check_config(decoder, described("LlamaConfig", "LlamaForCausalLM")))


@pytest.mark.parametrize(
    ("kind", "architecture", "names", "codes"),
    [
        ("ViTConfig", "ViTModel", ["classifier"], []),
        ("ViTConfig", "ViTModel", ["clasifier"], ["LORA110"]),
        ("BertConfig", "BertForMaskedLM", ["classifier"], []),
        ("LlamaConfig", "LlamaForCausalLM", ["classifier"], ["LORA110"]),
    ],
)
def test_without_a_task_type_the_saved_modules_choose_the_class(
    kind: str, architecture: str, names: list[str], codes: list[str]
) -> None:
    """Vision and audio have no task type, and PEFT's own example saves the classifier of a ``ViTModel``."""
    targets = ".*(query|value|q_proj|v_proj)"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, modules_to_save=names)
    assert loud(check_config(config, described(kind, architecture))) == codes


def test_a_task_type_is_not_overruled_by_the_saved_modules() -> None:
    config = LoraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM", modules_to_save=["score"])
    assert loud(check_config(config, described("LlamaConfig", "LlamaForCausalLM"))) == ["LORA110"]


def loud(report: Any) -> list[str]:
    return [finding.code for finding in (*report.errors, *report.warnings)]


def saved(model: Any, folder: Path, **fields: Any) -> Path:
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=["query"], init_lora_weights=False, **fields)
    )
    adapted.peft_config["default"].base_model_name_or_path = "org/base"
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("labels", [2, 5])
@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_a_saved_classifier_fits_the_config_of_its_pretrained_base(
    tmp_path: Path, labels: int, task_type: str | None
) -> None:
    """The class comes from the task type, or from auto_mapping; the number of classes from the head in the file."""
    model = transformers.BertForSequenceClassification(described("BertConfig", None, num_labels=labels))
    path = saved(model, tmp_path, task_type=task_type, modules_to_save=["classifier"])
    assert not loud(check_checkpoint(path, described("BertConfig", "BertForMaskedLM")))


def test_a_head_that_the_config_speaks_of_is_compared_with_it(tmp_path: Path) -> None:
    model = transformers.BertForSequenceClassification(described("BertConfig", None, num_labels=5))
    path = saved(model, tmp_path, task_type="SEQ_CLS")
    base = described("BertConfig", "BertForSequenceClassification", num_labels=3)
    assert loud(check_checkpoint(path, base)) == ["LORA433"]


def test_memory_of_a_classifier_has_no_logits_over_the_vocabulary() -> None:
    wide = described("LlamaConfig", "LlamaForCausalLM", pad_token_id=0)
    wide.vocab_size = 32_000
    peaks = {}
    for task_type in ("SEQ_CLS", "CAUSAL_LM"):
        config = LoraConfig(r=4, target_modules=["q_proj"], task_type=task_type)
        estimate = estimate_memory(config, wide, batch_size=2, seq_len=256)
        peaks[task_type] = estimate.peak_allocated
        assert ("Classification" in estimate.architecture) == (task_type == "SEQ_CLS")
    logits = 2 * 256 * 32_000 * torch.finfo(torch.bfloat16).bits // 8
    assert peaks["CAUSAL_LM"] - peaks["SEQ_CLS"] > logits


@pytest.mark.parametrize("model_type", ["chatglm", "some_model"])
def test_a_base_with_code_of_its_own_is_to_be_built_by_the_user(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(
        f'{{"model_type": "{model_type}", "architectures": ["ChatGLMModel"], '
        '"auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig"}}'
    )
    with pytest.raises(ValueError, match="never run here; build the model yourself"):
        check_config(LoraConfig(target_modules=["q_proj"]), tmp_path)


def speech() -> Any:
    names = ("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads")
    config = transformers.WhisperConfig(
        vocab_size=96,
        d_model=16,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_mel_bins=4,
        max_source_positions=8,
        max_target_positions=16,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
        **dict.fromkeys(names, 1),
    )
    return transformers.WhisperForConditionalGeneration(config)


@pytest.mark.parametrize("task_type", ["SEQ_2_SEQ_LM", "CAUSAL_LM", None])
def test_a_model_that_takes_no_input_ids_has_no_task_type(task_type: str | None) -> None:
    """The class that PEFT has for the task hands on what the batch does not have; with None the step is taken."""
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type=task_type)
    said = [f for f in check_config(config, speech()).findings if f.code == "LORA122"]
    assert [f.fix for f in said] == ([] if task_type is None else ["set task_type=None"])
    model = get_peft_model(speech(), config)
    batch = {"input_features": torch.randn(2, 4, 16), "labels": torch.full((2, 5), 7)}
    failed = [f for f in check_training(model, batch).errors if f.code == "LORA319"]
    assert len(failed) == len(said)
    for finding in failed:
        assert finding.observed.startswith("TypeError: ")
        assert "'input_ids'" in finding.observed
        assert "task_type=None" in finding.fix


def test_an_image_classifier_may_have_its_task_type() -> None:
    """Its forward takes further keywords and leaves them alone."""
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=8)
    base = transformers.ViTForImageClassification(config)
    targets = ["q_proj"] if any("q_proj" in name for name, _ in base.named_modules()) else ["query"]
    report = check_config(LoraConfig(r=2, target_modules=targets, task_type="SEQ_CLS"), base)
    assert "LORA122" not in report.codes


class _OfSound(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(4, 4)

    def forward(self, input_values: torch.Tensor) -> Any:
        return self.q_proj(input_values)


class _OfMore(_OfSound):
    def forward(self, input_values: torch.Tensor, **more: Any) -> Any:
        return self.q_proj(input_values)


@pytest.mark.parametrize(("base", "told"), [(_OfSound, ["LORA122"]), (_OfMore, [])])
def test_what_a_forward_leaves_alone_does_no_harm(base: type[torch.nn.Module], told: list[str]) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="FEATURE_EXTRACTION")
    model = get_peft_model(base(), config)
    assert [f.code for f in check_config(config, base()).warnings if f.code == "LORA122"] == told
    if told:
        with pytest.raises(TypeError, match="input_ids"):
            model(input_values=torch.ones(1, 4))
    else:
        model(input_values=torch.ones(1, 4))
