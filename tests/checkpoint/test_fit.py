"""How the tensors of a file fit a base, on a toy: PEFT is asked, and the rest is told apart."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import LlamaConfig

from pytest_lora.facts.config import Fit
from pytest_lora.facts.saved_tensors import Key, TensorFacts
from pytest_lora.inspection.checkpoint.fit import Base
from tests.test_asking_peft import Toy

P = "base_model.model."
TINY = LlamaConfig(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, architectures=["LlamaForCausalLM"],
)  # fmt: skip
RAW = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
A, B = (f"{P}layers.0.q_proj.lora_{part}.weight" for part in "AB")


def state(**fields: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes that PEFT writes for the toy."""
    config = {name: value for name, value in {**RAW, **fields}.items() if name != "peft_type"}
    model = get_peft_model(Toy(), LoraConfig(**config))
    return {name: tuple(t.shape) for name, t in get_peft_model_state_dict(model).items()}


@pytest.fixture(scope="module")
def base() -> Base:
    return Base(Toy())


def fit(base: Base, held: dict[str, tuple[int, ...]], **fields: Any) -> Fit:
    tensors = tuple(TensorFacts(name, "F32", shape) for name, shape in held.items())
    return base.fit({**RAW, **fields}, tensors, {name: Key.of(name) for name in held})


def without(held: dict[str, tuple[int, ...]], *names: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in held.items() if name not in names}


def test_what_peft_writes_fits(base: Base) -> None:
    found = fit(base, state())
    assert (found.loads, found.compared, found.wanted) == (True, True, frozenset(state()))
    assert (found.misfits, found.missing, found.unused, found.wrapper) == ((), (), (), "")
    assert found.config is not None
    assert (found.config.refusal, found.config.merge_refusal, len(found.config.layers)) == (None, None, 2)


def test_what_is_missing_left_over_or_of_another_shape(base: Base) -> None:
    lacking = fit(base, without(state(), A))
    assert (lacking.loads, lacking.compared, lacking.missing, lacking.unused) == (False, True, (A,), ())
    more = fit(base, {**state(), f"{P}x.lora_A.weight": (2, 4)})
    assert (more.loads, more.missing, more.unused) == (False, (), (f"{P}x.lora_A.weight",))
    other = fit(base, {**state(), A: (3, 4)})
    assert not other.loads
    assert [(one.name, one.found, one.wanted) for one in other.misfits] == [(A, (3, 4), (2, 4))]
    named = {name.replace("lora_A.weight", "lora_A.mine.weight"): shape for name, shape in state().items()}
    renamed = fit(base, named)
    assert (renamed.loads, renamed.misfits, renamed.missing, renamed.unused) == (False, (), (), ())


def test_heads_that_peft_adds_by_the_task_count_where_the_base_has_them_and_others_always(base: Base) -> None:
    saved = ["lm_haed", "classifier", "score"]
    found = fit(base, state(), task_type="SEQ_CLS", modules_to_save=saved).config
    assert found is not None
    assert {one.name for one in found.names if one.field == "modules_to_save"} == {"lm_haed"}
    whole = Base(nn.ModuleDict({"q_proj": nn.Linear(4, 4), "score": nn.Linear(4, 2)}))
    found = fit(whole, {}, task_type="SEQ_CLS", modules_to_save=saved).config
    assert found is not None
    assert {one.name for one in found.names if one.field == "modules_to_save"} == {"lm_haed", "score"}


def test_a_bias_that_is_missing_stays_that_of_the_base(base: Base) -> None:
    biased = state(bias="all")
    (one, *_) = (name for name in biased if name.endswith("bias"))
    assert fit(base, biased, bias="all").loads
    lacking = fit(base, without(biased, one), bias="all")
    assert (lacking.loads, lacking.missing) == (False, (one,))


def test_whole_weights_of_the_base_are_no_strangers(base: Base) -> None:
    head = f"{P}lm_head.weight"
    same = fit(base, {**without(state(), A), head: (9, 4)})
    assert (same.loads, same.misfits, same.unused) == (False, (), ())
    larger = fit(base, {**state(), head: (11, 4)})
    assert [(one.name, one.found, one.wanted) for one in larger.misfits] == [(head, (11, 4), (9, 4))]
    assert larger.unused == ()


def test_what_is_loaded_in_an_older_form_fits(base: Base) -> None:
    written = state(use_dora=True)
    older = {
        name if not name.endswith("lora_magnitude_vector") else f"{name}.weight": shape
        for name, shape in written.items()
    }
    assert older != written
    found = fit(base, older, use_dora=True)
    assert (found.loads, found.compared, found.missing, found.unused) == (True, True, (), ())


def test_what_peft_refuses_is_not_compared(base: Base) -> None:
    found = fit(base, state(), target_modules=["nothing"])
    assert (found.compared, found.loads) == (False, False)
    assert found.config is not None
    assert found.config.refusal is not None
    assert "nothing" in found.config.refusal.message
    assert fit(base, state(), target_modules=["norm"]).compared is False


def test_heads_that_a_base_does_not_have_are_peft_s_own(base: Base) -> None:
    saved = fit(base, state(), task_type="SEQ_CLS", modules_to_save=["score", "lm_head"]).config
    assert saved is not None
    assert saved.settings.modules_to_save == ("lm_head",)
    assert saved.live


def test_the_name_of_a_base(tmp_path: Any) -> None:
    model: Any = Toy()
    assert Base(model).name is None
    model.name_or_path = " org/base "
    assert Base(model).name == "org/base"
    assert Base(model, may_be_extended=True).fit(RAW, (), {}).may_be_extended
    assert not Base(model).fit(RAW, (), {}).may_be_extended
    with pytest.raises(ValueError, match="it carries adapters itself"):
        Base(get_peft_model(Toy(), LoraConfig(target_modules=["q_proj"])))


@pytest.mark.parametrize(
    ("prefix", "module", "reads"),
    [
        ("layers", "0.q_proj", True),
        ("layers", "layers.layers.0.q_proj", True),
        ("layers", "layers.0.q_proj", False),
        ("model", "model.layers.0.q_proj", True),
        ("model", "layers.0.q_proj", False),
        ("", "0.q_proj", False),
    ],
)
def test_adapters_of_a_model_with_another_prefix(
    monkeypatch: pytest.MonkeyPatch, prefix: str, module: str, reads: bool
) -> None:
    from pytest_lora.inspection.checkpoint import fit as inspected

    model: Any = Toy()
    model.base_model_prefix = prefix
    known = Base(model)
    for switch in (True, False):
        monkeypatch.setattr(inspected, "READS_OTHER_PREFIXES", switch)
        held = {f"{P}{module}.lora_A.weight": (2, 4), f"{P}other.weight": (2, 2)}
        assert fit(known, held).read_by_load_adapter is (reads and switch)
    assert not fit(known, {f"{P}other.weight": (2, 2)}).read_by_load_adapter


# ------------------------------------------------------------------ the class that an adapter is for


PLAIN, CLASSIFIER, TAGGER = (
    "LlamaForCausalLM",
    "LlamaForSequenceClassification",
    "LlamaForTokenClassification",
)


@pytest.mark.parametrize(
    ("raw", "held", "architecture", "labels"),
    [
        ({"task_type": "CAUSAL_LM"}, {}, PLAIN, None),
        ({}, {}, PLAIN, None),
        ({"task_type": "SEQ_CLS"}, {}, CLASSIFIER, 2),
        ({"task_type": "SEQ_CLS"}, {"score.weight": (5, 8), "norm.weight": (3, 8), "score.bias": (4,)}, CLASSIFIER, 5),
        ({"task_type": "SEQ_CLS"}, {"score.lora_A.weight": (7, 8)}, CLASSIFIER, 2),
        ({"task_type": "SEQ_CLS"}, {"score.dense.weight": (8, 8), "score.out.weight": (3, 8)}, CLASSIFIER, 3),
        ({"auto_mapping": {"base_model_class": TAGGER}}, {"score.weight": (5, 8)}, TAGGER, 5),
        ({"auto_mapping": {"base_model_class": TAGGER}}, {}, TAGGER, 2),
        ({"auto_mapping": {"base_model_class": PLAIN}}, {"score.weight": (5, 8)}, PLAIN, None),
        ({"auto_mapping": {"base_model_class": "BertModel"}}, {}, PLAIN, None),
        ({"auto_mapping": "x"}, {}, PLAIN, None),
    ],
)  # fmt: skip
def test_the_class_that_an_adapter_means(
    raw: dict[str, Any], held: dict[str, tuple[int, ...]], architecture: str, labels: int | None
) -> None:
    named = {f"{P}{name}": shape for name, shape in held.items()}
    tensors = tuple(TensorFacts(name, "F32", shape) for name, shape in named.items())
    keys = {name: Key.of(name) for name in named}
    given = Base(TINY)
    meant = given.meant_by(raw, tensors, keys)
    assert meant.facts.architecture == architecture
    heads = [module.out_features for module in meant.facts.modules if module.name == "score"]
    assert heads == ([] if labels is None else [labels])
    assert given.meant_by(raw, tensors, keys) is meant
    live = Base(Toy())
    assert live.meant_by(raw, tensors, keys) is live
    assert TINY.architectures == [PLAIN]
