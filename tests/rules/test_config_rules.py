"""Rules on configurations, beyond the examples of their documentation."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from pytest_lora import Expect, Finding, check_config
from pytest_lora.bases.examples.models import BASES, VOCABULARY

QV = ["q_proj", "v_proj"]


def findings(base: str = "base", expect: Expect | None = None, **fields: Any) -> dict[str, Finding]:
    fields.setdefault("target_modules", QV)
    report = check_config(LoraConfig(**fields), BASES[base](), expect=expect)
    return {finding.code: finding for finding in report.findings}


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_key_that_is_no_regular_expression_is_named(field: str) -> None:
    """Older PEFT never compiles a key behind one that always matches; newer PEFT stops at it."""
    (found,) = findings(**{field: {".*": 8, "(": 8}}).values()
    assert (found.code, found.observed) in (
        ("LORA107", "key '(' (value 8) is ignored: it is no regular expression"),
        ("LORA124", "error: missing ), unterminated subpattern at position 7"),
        ("LORA124", "PatternError: missing ), unterminated subpattern at position 7"),
    )


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_an_expected_config_with_a_broken_pattern_is_compared_all_the_same(field: str) -> None:
    meant = LoraConfig(**{"target_modules": QV, field: "("})
    assert findings(expect=Expect(config=meant)).keys() <= {"LORA126"}


@pytest.mark.parametrize(
    ("targets", "fix"),
    [
        ("all_linear", "write target_modules='all-linear'"),
        ("q_proj|v_proj", "for plain names write target_modules=['q_proj', 'v_proj']"),
        ("q_proj,v_proj", "for plain names write target_modules=['q_proj', 'v_proj']"),
        ([".*q_proj"], "give the pattern as one string, target_modules='.*q_proj'"),
    ],
)
def test_targets_written_in_another_form_get_the_form_to_use(targets: Any, fix: str) -> None:
    found = findings(target_modules=targets)
    assert found.keys() == {"LORA104"}
    assert fix in found["LORA104"].fix


@pytest.mark.parametrize(
    ("targets", "severity"),
    [
        (["q_proj", "v_proj", "query", "value", "to_q"], "info"),
        (["q_proj", "k_proj", "v_proj", "c_attn"], "info"),
        (["q_proj", "v_proj", "query", "key"], "error"),
        (["q_proj", "v_proj", "c_attn"], "error"),
        (["q_proj", "v_proj", "query", "qq_proj"], "error"),
        (["query", "value"], "error"),
    ],
)
def test_a_list_for_several_families_loses_nothing(targets: list[str], severity: str) -> None:
    """PEFT's examples for Stable Diffusion name ``query`` beside ``to_q``, which newer models have alone."""
    assert findings(target_modules=targets)["LORA104"].severity == severity


FAULTY: list[tuple[str, str, dict[str, Any]]] = [
    ("LORA101", "base", {"lora_alpha": -16}),
    ("LORA103", "base", {"r": 1, "lora_alpha": 64}),
    ("LORA105", "base", {"layers_to_transform": [0, 9]}),
    ("LORA106", "base", {"exclude_modules": ["q_prj"]}),
    ("LORA107", "base", {"rank_pattern": {"q_proj": 4, "layers.0.self_attn.q_proj": 16}}),
    ("LORA107", "base", {"rank_pattern": {"layers.0.self_attn.q_proj": 16, "k_proj|q_proj": 4}}),
    ("LORA107", "base", {"alpha_pattern": {"layers.0.self_attn.q_proj": 16, "(k|q)_proj": 4}}),
    ("LORA108", "base", {"alpha_pattern": {"q_proj": 256}}),
    ("LORA110", "base", {"modules_to_save": "lm_head"}),
    ("LORA111", "classifier_base", {"target_modules": ["q_proj", "score"], "task_type": "SEQ_CLS"}),
    ("LORA113", "tied_base", {"modules_to_save": ["embed_tokens"]}),
    ("LORA115", "base_4bit", {"init_lora_weights": "pissa", "r": 8}),
    ("LORA120", "base", {"trainable_token_indices": [500]}),
    ("LORA121", "base", {"lora_dropout": 1.0}),
    ("LORA124", "base", {"r": 0}),
    ("LORA124", "base", {"target_modules": ["self_attn"]}),
    ("LORA124", "base", {"init_lora_weights": "corda"}),
    ("LORA104", "base", {"target_modules": ["q_proj", "v_proj.weight"]}),
    ("LORA104", "base", {"target_modules": ["q_proj", "embed_tokens"], "layers_to_transform": [1]}),
    ("LORA107", "base", {"rank_pattern": {"model.layers.1": 16}}),
    ("LORA107", "base", {"rank_pattern": {"base_model.model.model.layers.0.self_attn.q_proj": 16}}),
    ("LORA111", "base", {"trainable_token_indices": [5], "modules_to_save": ["embed_tokens"]}),
    ("LORA121", "base", {"lora_dropout": -0.1}),
    ("LORA124", "base", {"trainable_token_indices": {"wte": [5]}}),
    ("LORA132", "torch_attention_base", {"target_modules": ["out_proj"]}),
    ("LORA132", "torch_attention_base", {"target_modules": "all-linear"}),
]
"""The rule, the base and the fields of configurations that have one fault."""


@pytest.mark.parametrize(("code", "base", "fields"), FAULTY)
def test_fault_is_named_alone(code: str, base: str, fields: dict[str, Any]) -> None:
    assert findings(base, **fields).keys() == {code}


@pytest.mark.parametrize(
    ("base", "fields"),
    [
        ("base", {"target_modules": r".*\.self_attn\.(q|v)_proj"}),
        ("base", {"target_modules": ["lm_head"]}),
        ("base", {"r": 1, "lora_alpha": 16}),
        ("base", {"r": 16, "lora_alpha": 16}),
        ("base", {"use_dora": True}),
        ("base", {"layers_to_transform": 1}),
        ("base", {"bias": "all"}),
        ("base_4bit", {"init_lora_weights": "olora"}),
        ("tied_base", {"trainable_token_indices": [126, 127]}),
        ("classifier_base", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
        ("gpt2_base", {"target_modules": ["c_attn"]}),
        ("base", {"modules_to_save": ["layernorm"]}),
        ("base", {"layers_to_transform": [1], "target_modules": ["q_proj", "lm_head"]}),
        ("classifier_base", {"modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS"}),
        ("torch_attention_base", {"target_modules": ["self_attn", "linear1"]}),
    ],
)
def test_unusual_but_healthy_configuration_is_left_alone(base: str, fields: dict[str, Any]) -> None:
    assert not findings(base, **fields)


@pytest.mark.parametrize(
    ("base", "fields", "fix"),
    [
        ("base", {"rank_pattern": {"model.layers.1": 16}}, "write rank_pattern={'model.layers.1.*': 16}"),
        ("base", {"modules_to_save": ["embed_token"]}, "did you mean 'embed_tokens'?"),
        (
            "base",
            {"alpha_pattern": {"base_model.model.model.layers.0.self_attn.q_proj": 16}},
            "write alpha_pattern={'model.layers.0.self_attn.q_proj': 16}",
        ),
        ("base", {"rank_pattern": {"*q_proj": 16}}, "rank_pattern={'.*q_proj': 16}"),
        (
            "base",
            {"trainable_token_indices": {"wte": [5]}},
            "trainable_token_indices={'model.embed_tokens': [5]}",
        ),
        ("base", {"target_modules": []}, "set target_modules"),
        (
            "base",
            {"target_modules": "all-linear", "exclude_modules": ".*"},
            "no target to adapt: exclude_modules=None",
        ),
        ("base", {"rank_pattern": {"q_proj": "16"}}, "write numbers, not text"),
        ("base", {"bias": "true"}, "set bias='none'"),
    ],
)
def test_the_fix_says_what_to_write(base: str, fields: dict[str, Any], fix: str) -> None:
    (found,) = findings(base, **fields).values()
    assert fix in found.fix


ALORA = "alora_invocation_tokens"


@pytest.mark.skipif(ALORA not in LoraConfig.__dataclass_fields__, reason="this PEFT has no aLoRA")
@pytest.mark.parametrize(
    ("tokens", "task_type", "flagged"),
    [
        ([5, 9], "CAUSAL_LM", False),
        ([5, 9], None, True),
        ([5, VOCABULARY], "CAUSAL_LM", True),
        ([], "CAUSAL_LM", True),
    ],
)
def test_invocations_that_never_come(tokens: list[int], task_type: str | None, flagged: bool) -> None:
    found = findings(task_type=task_type, **{ALORA: tokens})
    assert found.keys() == ({"LORA133"} if flagged else set())


def outputs_after_merging(**fields: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a trained adapter on a base with tied embeddings, and those after merging it."""
    model: Any = get_peft_model(BASES["tied_base"](), LoraConfig(**{"target_modules": QV, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        ids = torch.arange(120, VOCABULARY)[None]
        before = model.eval()(input_ids=ids).logits
        return before, model.merge_and_unload()(input_ids=ids).logits


takes_rows_of_a_head = pytest.mark.skipif(
    "ensure_weight_tying" not in LoraConfig.__dataclass_fields__,
    reason="this version of PEFT trains rows of embeddings",
)


@takes_rows_of_a_head
def test_rows_of_a_tied_head_alone_are_told() -> None:
    rows = {"lm_head": [126, 127]}
    before, after = outputs_after_merging(trainable_token_indices=rows)
    assert not torch.allclose(before, after, atol=1e-3)
    (found,) = findings("tied_base", trainable_token_indices=rows).values()
    assert found.code == "LORA113"
    assert "name the embedding in trainable_token_indices: {'embed_tokens'" in found.fix


@takes_rows_of_a_head
def test_other_rows_of_a_tied_head_than_of_the_embedding_are_told() -> None:
    rows = {"embed_tokens": [125, 126], "lm_head": [126, 127]}
    before, after = outputs_after_merging(trainable_token_indices=rows)
    assert not torch.allclose(before, after, atol=1e-3)
    (found,) = findings("tied_base", trainable_token_indices=rows).values()
    assert found.code == "LORA113"
    assert "train other rows each" in found.observed
    assert found.fix.endswith("trainable_token_indices={'embed_tokens': [125, 126, 127]}")
    before, after = outputs_after_merging(trainable_token_indices={"embed_tokens": [125, 126, 127]})
    assert torch.allclose(before, after, atol=1e-4)


@takes_rows_of_a_head
def test_the_same_rows_of_a_tied_head_and_its_embedding() -> None:
    rows = {"embed_tokens": [126, 127], "lm_head": [126, 127]}
    before, after = outputs_after_merging(trainable_token_indices=rows)
    assert torch.allclose(before, after, atol=1e-4)
    assert not findings("tied_base", trainable_token_indices=rows)
    turned = {"embed_tokens": [126, 127], "lm_head": [127, 126]}
    before, after = outputs_after_merging(trainable_token_indices=turned)
    assert torch.allclose(before, after, atol=1e-4) == (
        not findings("tied_base", trainable_token_indices=turned)
    )


@pytest.mark.parametrize("rows", [[126, 127], {"embed_tokens": [126, 127]}])
def test_remedy_of_rows_of_a_tied_head(rows: Any) -> None:
    before, after = outputs_after_merging(trainable_token_indices=rows)
    assert torch.allclose(before, after, atol=1e-4)
    assert not findings("tied_base", trainable_token_indices=rows)


@takes_rows_of_a_head
def test_rows_of_an_untied_head_are_meant() -> None:
    rows = {"embed_tokens": [126, 127], "lm_head": [126, 127]}
    assert not findings("base", trainable_token_indices=rows)


@pytest.mark.skipif(
    "ensure_weight_tying" not in LoraConfig.__dataclass_fields__,
    reason="this version of PEFT ties no adapters",
)
def test_adapters_that_are_tied_are_told_where_they_will_be_merged() -> None:
    fields: dict[str, Any] = {"target_modules": [*QV, "embed_tokens"], "ensure_weight_tying": True}
    assert not findings("tied_base", **fields)
    before, after = outputs_after_merging(**fields)
    merged = Expect(will_merge=True)
    assert ("LORA113" in findings("tied_base", merged, **fields)) == (
        not torch.allclose(before, after, atol=1e-3)
    )
    assert not findings("tied_base", merged, trainable_token_indices=[126, 127])


@takes_rows_of_a_head
@pytest.mark.parametrize("field", ["modules_to_save", "target_modules"])
@pytest.mark.parametrize("name", ["wte", "lm_head"])
def test_tying_that_peft_does_not_do_or_loses_at_loading_is_told(
    field: str, name: str, tmp_path: Path
) -> None:
    """PEFT knows an embedding by the name of embed_tokens or lm_head, and saves what it ties under the embedding's."""
    fields: dict[str, Any] = {
        "target_modules": ["c_attn"],
        "fan_in_fan_out": True,
        "ensure_weight_tying": True,
    }
    fields[field] = [*fields.get(field, ()), name]
    found = findings("gpt2_base", **fields)["LORA113"]
    assert "ensure_weight_tying=True" in found.observed
    assert all("ensure_weight_tying" not in change.settings for change in found.changes)
    model: Any = get_peft_model(BASES["gpt2_base"](), LoraConfig(**copy.deepcopy(fields)))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(BASES["gpt2_base"](), tmp_path)
    head = again.base_model.model.lm_head
    assert type(head) is nn.Linear, (
        "the head is plain after loading" if name == "lm_head" else "it always was"
    )


@takes_rows_of_a_head
def test_a_head_by_a_name_unknown_to_peft_is_tied_through_its_embedding() -> None:
    """Whisper's head is proj_out, its embedding embed_tokens."""
    base = transformers.WhisperConfig(
        vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        pad_token_id=0, architectures=["WhisperForConditionalGeneration"],
    )  # fmt: skip
    fields: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["proj_out"]}
    for tied in (False, True):
        (found,) = check_config(LoraConfig(**fields, ensure_weight_tying=tied), base).errors
        assert found.code == "LORA113"
        for change in found.changes:
            assert not check_config(
                LoraConfig(**{**fields, **copy.deepcopy(dict(change.settings))}), base
            ).errors


@pytest.mark.parametrize("field", [{"lora_dropout": 0.05}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_experts_that_are_parameters_take_plain_lora(field: dict[str, Any]) -> None:
    """Newer PEFT makes parameters of "all-linear", so that the refused field is all there is to change."""
    base = transformers.MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, architectures=["MixtralForCausalLM"],
    )  # fmt: skip
    fields: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    errors = check_config(LoraConfig(**fields, **field), base).errors
    if "ParamWrapper" in str(errors):
        (found,) = errors
        (change,) = found.changes
        assert set(change.settings) == set(field)
        assert not check_config(LoraConfig(**{**fields, **field, **change.settings}), base).errors
    else:
        assert not errors


def test_corda_is_refused_on_a_model_that_lacks_its_preparation_alone() -> None:
    """``preprocess_corda`` leaves its results on layers, which a ``config.json`` has not."""
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="corda")
    base: Any = BASES["base"]()
    assert [found.code for found in check_config(config, base).errors] == ["LORA124"]
    base.config.architectures = [type(base).__name__]
    assert not check_config(config, base.config).errors


ENDLESS = "(?i)(a+)+_proj|" + "".join(f"[\u0100-\uffff{chr(0x4E00 + n)}]" for n in range(3900))


@pytest.mark.parametrize(
    ("targets", "repaired"),
    [
        (r"self_attn\.(q|v)_proj", r"(.*\.)?(self_attn\.(q|v)_proj)"),
        (["nothing.*", r"^.*\.(q|v)$"], r"(.*\.(q|v))\w*"),
        ("nothing.*", None),
        (ENDLESS, None),
    ],
    ids=["text", "list", "nothing", "endless"],
)
def test_forms_of_lost_patterns_are_tried_in_the_limited_process(
    monkeypatch: pytest.MonkeyPatch, targets: Any, repaired: str | None
) -> None:
    from pytest_lora.facts.config import NameMatch
    from pytest_lora.inspection import repairs as module

    monkeypatch.setattr(module, "REPAIR_S", 0.05)
    monkeypatch.setattr(re, "compile", lambda text, flags=0: pytest.fail(f"compiled here: {text[:40]}"))
    names = [f"model.layers.{number}.self_attn.{leaf}_proj" for number in (0, 1) for leaf in "qv"]
    modules = tuple(SimpleNamespace(name=name, is_linear=True) for name in names)
    base: Any = SimpleNamespace(modules=modules, module_names=names)
    written: Any = SimpleNamespace(target_modules=targets)
    texts = [targets] if isinstance(targets, str) else targets
    lost = [NameMatch("target_modules", text, ()) for text in texts]
    lost += [NameMatch("exclude_modules", r".*q_proj", ()), NameMatch("target_modules", ".*v_proj", ("v",))]
    found = module.repairs(written, lost, base, refused=False)
    assert found.fitting == (() if repaired is None else ((texts[-1], repaired),))


@pytest.mark.parametrize(
    ("text", "broken", "mended"),
    [("(q", True, None), ("*q", True, ".*q"), ("q", False, None), (ENDLESS, False, None)],
)
def test_a_broken_pattern_is_found_and_mended_in_the_limited_process(
    monkeypatch: pytest.MonkeyPatch, text: str, broken: bool, mended: str | None
) -> None:
    from pytest_lora.inspection import repairs as module

    monkeypatch.setattr(module, "REPAIR_S", 0.05)
    written: Any = SimpleNamespace(
        rank_pattern=((text, 8),), alpha_pattern=(), target_modules=("q",), exclude_modules=None
    )
    found = module.repairs(written, (), cast("Any", None), refused=True)
    assert found.broken == (("rank_pattern", text) if broken else None)
    assert found.mended == mended


@pytest.mark.parametrize(
    ("base", "lost", "fix"),
    [
        ("classifier_base", "lm_head", "did you mean 'score'? modules_to_save=['score']"),
        ("classifier_base", "classifier", "did you mean 'score'? modules_to_save=['score']"),
        ("classifier_base", "qa_outputs", "did you mean 'score'? modules_to_save=['score']"),
        ("base", "lm_haed", "did you mean 'lm_head'? modules_to_save=['lm_head']"),
        ("base", "score", "drop it: modules_to_save=None; LlamaForCausalLM has no head for a task"),
    ],
)
def test_the_head_that_is_there_is_proposed(base: str, lost: str, fix: str) -> None:
    config = LoraConfig(target_modules=["q_proj"], lora_alpha=16, modules_to_save=[lost])
    (finding,) = check_config(config, BASES[base](), select=["LORA110"]).findings
    assert finding.fix.startswith(fix)
