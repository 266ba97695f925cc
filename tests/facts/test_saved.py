"""What the facts of a saved adapter say of it, where each statement turns: on adapters made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_lora.facts.base import BaseFacts, BaseModule
from pytest_lora.facts.checkpoint import CheckpointFacts, Entry, FileFault
from pytest_lora.facts.config import ConfigFacts, Fit, LayerFacts
from pytest_lora.facts.measures import _scalings, of_checkpoint
from pytest_lora.facts.saved_config import config_of_the_file
from pytest_lora.facts.saved_tensors import AdaptedModule, Key, TensorFacts, Values, target_of
from pytest_lora.facts.served import ServedAdapter, ServedModule, padded, served_checkpoint, served_config
from pytest_lora.inspection.checkpoint.config_file import config_file
from tests.changed import replace
from tests.facts.test_adapter_maps import saved

P = "base_model.model."


def configured(facts: CheckpointFacts, **fields: Any) -> CheckpointFacts:
    return replace(
        facts,
        config=config_file(
            {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], **fields}, None
        ),
    )


def with_tensors(facts: CheckpointFacts, *tensors: tuple[str, tuple[int, ...]]) -> CheckpointFacts:
    every = (*facts.tensors, *(TensorFacts(name, "F32", shape) for name, shape in tensors))
    return replace(facts, tensors=every, keys={one.name: Key.of(one.name) for one in every})


def a_base(*names: str, layers: int = 0, tied: tuple[tuple[str, ...], ...] = ()) -> BaseFacts:
    return BaseFacts(
        "Model", None, tuple(BaseModule(name, "Linear", 3, 5, None) for name in names), names, 60,
        tuple(range(layers)), (), tied, None, None, None, False, (), (), None, False, (),
    )  # fmt: skip


# ------------------------------------------------------------------ keys


@pytest.mark.parametrize(
    ("key", "own_module", "module", "prefixes", "wrappers", "peft_name"),
    [
        (f"{P}module.q.lora_A.weight", True, "module.q", 1, (), f"{P}module.q.lora_A.weight"),
        (f"{P}module.q.lora_A.weight", False, "q", 1, ("module",), f"{P}q.lora_A.weight"),
        (f"module.{P}q.lora_A.weight", True, "q", 1, ("module",), f"{P}q.lora_A.weight"),
        (f"module.module.{P}q.lora_A.weight", False, "q", 1, ("module", "module"), f"{P}q.lora_A.weight"),
        (f"{P}{P}q.lora_B.bias", False, "q", 2, (), f"{P}q.lora_B.bias"),
        (f"{P}a._orig_mod.q.lora_A.x.weight", False, "a.q", 1, ("_orig_mod",), f"{P}a.q.lora_A.weight"),
        ("lora_A.weight", False, "", 0, (), f"{P}.lora_A.weight"),
        ("plain", False, "plain", 0, (), f"{P}plain"),
        ("q.weight", False, "q", 0, (), f"{P}q.weight"),
    ],
)
def test_prefixes_and_wrappers_of_a_key(
    key: str, own_module: bool, module: str, prefixes: int, wrappers: tuple[str, ...], peft_name: str
) -> None:
    found = Key.of(key, own_module)
    assert (found.module, found.prefixes, found.wrappers, found.peft_name) == (
        module, prefixes, wrappers, peft_name,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("key", "part", "adapter", "is_cut", "before", "tool_name"),
    [
        (f"x.{P}q.lora_A.weight", "lora_A", "", False, "x", ""),
        (f"x.{P}q.weight", "", "", False, "x", ""),
        (f"{P}x.{P}q.lora_A.weight", "lora_A", "", False, "", ""),
        (f"{P}q.lora_magnitude_vector", "lora_magnitude_vector", "", False, "", ""),
        (f"{P}q.lora_A.mine", "lora_A", "mine", True, "", ""),
        ("q.lora_down.weight", "", "", False, "", "lora_down"),
        ("q.lora_downs.weight", "", "", False, "", ""),
    ],
)
def test_parts_of_a_key(key: str, part: str, adapter: str, is_cut: bool, before: str, tool_name: str) -> None:
    found = Key.of(key)
    assert (found.part, found.adapter, found.is_cut, found.before, found.tool_name) == (
        part, adapter, is_cut, before, tool_name,
    )  # fmt: skip


def test_numbers_and_zeros_of_a_module() -> None:
    def tensor(name: str, *shape: int, zero: bool | None = None) -> TensorFacts:
        return TensorFacts(name, "F32", shape, None if zero is None else Values(0, 0, zero))

    assert tensor("a", 2, 3, 4).numbers == 24
    assert tensor("a").numbers == 1
    module = AdaptedModule("q", tensor("q.lora_A.weight", 2, 3, zero=True), None, None, 2)
    assert (module.zero_parts, module.holds_nothing) == (("lora_A",), True)
    other = replace(module, a=tensor("a", 2, 3), b=tensor("b", 5, 2, zero=False), magnitude=tensor("m", 5))
    assert (other.zero_parts, other.holds_nothing) == ((), False)
    assert replace(other, magnitude=tensor("m", 5, zero=True)).zero_parts == ("lora_magnitude_vector",)
    assert (module.rank, module.b_rank, module.ranks_agree) == (2, None, False)
    assert replace(module, a=None).ranks_agree
    turned = replace(module, a=tensor("q.lora_A.weight", 3, 2), b=tensor("q.lora_B.weight", 2, 5))
    assert turned.turned == ("lora_A", "lora_B")
    assert replace(turned, a=tensor("q.lora_embedding_A", 3, 2), b=tensor("b", 2, 5, 1, 1)).turned == ()
    assert replace(turned, configured_rank=7).turned == ()
    assert (target_of("a.out_proj.base_layer"), target_of("a.base_layer.q")) == ("a.out_proj", "a")


# ------------------------------------------------------------------ the file


def test_whose_adapter_it_is() -> None:
    plain = saved(["q"])
    assert (plain.origin, plain.other_method, plain.is_judged) == (None, None, True)
    assert configured(plain).is_judged
    assert plain.unread == 0
    other = configured(plain, peft_type="IA3")
    assert (other.other_method, other.is_judged) == ("peft_type IA3", False)
    assert other.contradicts_method
    assert not configured(plain, peft_type="ADALORA").contradicts_method
    assert not plain.contradicts_method
    assert not replace(other, weights=None).contradicts_method
    head = with_tensors(other, (f"{P}score.weight", (2, 2)))
    assert not head.contradicts_method
    assert configured(plain, peft_type="").other_method is None
    arrow = configured(plain, use_bdlora=True, velora_config={"a": 1})
    assert (arrow.other_method, arrow.is_judged) == ("LoRA with use_bdlora, velora_config", False)
    fault = FileFault("adapter_model.safetensors", "format", "x")
    assert not replace(plain, faults=(fault,)).is_readable
    assert replace(plain, faults=(replace(fault, file="other"),)).is_readable
    assert not replace(plain, weights=None).is_readable
    mlx = configured(plain, peft_type="", fine_tune_type="lora")
    assert (mlx.origin, mlx.other_method) == ("mlx-lm", "an adapter of mlx-lm")
    files = (Entry("adapters.safetensors", "file", 1),)
    assert replace(plain, entries=files).origin is None
    assert replace(plain, entries=files, weights=None).origin == "mlx-lm"
    assert replace(plain, entries=files, weights="adapters.safetensors").origin == "mlx-lm"
    assert replace(plain, entries=(replace(files[0], kind="folder"),), weights=None).origin is None
    assert configured(replace(plain, entries=files, weights=None)).origin is None


@pytest.mark.parametrize(
    ("key", "misnamed"),
    [
        (f"{P}q.lora_A.weight", False),
        (f"{P}q.lora_A.default.weight", False),
        (f"{P}q.lora_A.mine.weight", True),
        ("q.lora_A.weight", True),
        (f"{P}{P}q.lora_A.weight", True),
        (f"{P}_orig_mod.q.lora_A.weight", True),
        (f"{P}q.lora_A", True),
    ],
)
def test_what_peft_does_not_recognise(key: str, misnamed: bool) -> None:
    facts = with_tensors(saved([]), (key, (2, 2)))
    assert [one.name for one in facts.misnamed] == [key] * misnamed
    assert replace(facts, fit=Fit(a_base("q"), None, None, loads=True)).misnamed == ()
    assert len(replace(facts, fit=Fit(a_base("q"), None, None)).misnamed) == misnamed
    assert replace(facts, weights=None).misnamed == ()


@pytest.mark.parametrize(
    ("module", "base", "loads", "foreign"),
    [
        ("q", "q", False, False),
        ("q.base_layer", "q", False, False),
        ("q", "q.", False, False),
        ("q", "v", False, True),
        ("q", "v", True, False),
    ],
)
def test_an_adapter_is_foreign_where_the_base_has_none_of_its_modules(
    module: str, base: str, loads: bool, foreign: bool
) -> None:
    fit = Fit(a_base(base), None, None, compared=True, loads=loads)
    facts = replace(saved([module]), fit=fit)
    assert facts.is_foreign is foreign
    assert (facts.fits is not None) is (not foreign and not loads)
    assert replace(facts, fit=replace(fit, compared=False)).fits is None
    assert not replace(facts, fit=None).is_foreign
    assert not replace(facts, adapted=()).is_foreign
    assert replace(saved([module, "v", "q"]), fit=fit).is_foreign is False


def test_plain_tensors_and_the_modules_that_own_them() -> None:
    facts = with_tensors(
        saved(["q"]), (f"{P}a.score.dense.weight", (2, 2)), ("odd.lora_down.weight", (2, 2)), ("plain", ())
    )
    assert [one.name for one in facts.plain] == [f"{P}a.score.dense.weight", "plain"]
    assert len(facts.lora) == 3
    held = ["score", "a.score", "score.dense", "dense", "a", "plain"]
    assert [name for name in [*held, "core", "odd", "q", "weight"] if facts.holds(name)] == held


@pytest.mark.parametrize(
    ("theirs", "is_other"),
    [(10_000 + 4096 + 2048, False), (10_000 + 4096 + 2049, True), (3856, False), (3855, True)],
)
def test_a_pickle_beside_it_is_another_by_its_size(theirs: int, is_other: bool) -> None:
    ours = Entry("adapter_model.safetensors", "file", 10_000)
    pickle = Entry("adapter_model.bin", "file", theirs)
    facts = replace(saved(["q"]), entries=(ours, pickle))
    assert facts.other_pickle == (pickle if is_other else None)
    assert replace(facts, weights="adapter_model.bin").other_pickle is None
    assert replace(facts, entries=(ours,)).other_pickle is None
    assert replace(facts, entries=(pickle,)).other_pickle is None
    fault = FileFault("adapter_model.safetensors", "format", "x")
    assert replace(facts, faults=(fault,)).other_pickle is None


# ------------------------------------------------------------------ its configuration on its own modules


def test_the_configuration_of_a_file_on_its_own_modules() -> None:
    facts = configured(saved(["a.q", "a.v"]), base_model_name_or_path="org/base", rank_pattern={"v": 1})
    found = config_of_the_file(facts)
    assert found is not None
    assert [(one.module, one.kind, one.rank, one.alpha, one.scaling) for one in found.layers] == [
        ("a.q", "Linear", 2, 4.0, 2.0),
        ("a.v", "Linear", 1, 4.0, 4.0),
    ]
    assert {(one.in_features, one.out_features, one.kernel, one.experts) for one in found.layers} == {
        (2, 2, 1, 1)
    }
    assert [one.parameters for one in found.layers] == [8, 8]
    assert (found.base.architecture, found.base.parameters) == ("org/base", 0)
    assert [(m.name, m.in_features, m.out_features) for m in found.base.modules] == [
        ("a.q", 2, 2),
        ("a.v", 2, 2),
    ]
    assert (found.live, found.base.has_biases, found.base.carries_adapter) == (True, False, False)
    unnamed = config_of_the_file(configured(saved(["q"])))
    assert unnamed is not None
    assert unnamed.base.architecture == "its base"


@pytest.mark.parametrize(
    ("fields", "kinds"),
    [
        ({"target_modules": ["q"]}, ["Linear", "Linear"]),
        ({"target_modules": ["q"], "target_parameters": ["v"]}, ["Linear", "Parameter"]),
        ({"target_modules": ["q", "v"], "target_parameters": ["x"]}, ["Linear", "Linear"]),
    ],
)
def test_what_no_name_targets_is_a_parameter(fields: dict[str, Any], kinds: list[str]) -> None:
    found = config_of_the_file(configured(saved(["q", "v"]), **fields))
    assert found is not None
    assert [layer.kind for layer in found.layers] == kinds


def test_what_is_not_to_be_judged_has_no_configuration() -> None:
    facts = configured(saved(["q"]))
    (module,) = facts.adapted
    assert module.a is not None
    assert module.b is not None
    for other in (
        saved(["q"]),
        replace(facts, weights=None),
        replace(facts, adapted=()),
        replace(facts, adapted=(replace(module, a=None),)),
        replace(facts, adapted=(replace(module, b=None),)),
        replace(facts, adapted=(replace(module, a=replace(module.a, shape=(0, 2))),)),
        replace(facts, adapted=(replace(module, b=replace(module.b, shape=(2, 0))),)),
    ):
        assert config_of_the_file(other) is None
    magnitude = TensorFacts("m", "F32", (5,))
    larger = config_of_the_file(replace(facts, adapted=(replace(module, magnitude=magnitude),)))
    assert larger is not None
    assert larger.layers[0].parameters == 13


# ------------------------------------------------------------------ as a server meets it


@pytest.mark.parametrize(("rank", "given"), [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (64, 64), (65, 80)])
def test_ranks_that_kernels_are_given(rank: int, given: int) -> None:
    assert padded(rank) == given


def served(facts: CheckpointFacts) -> ServedAdapter:
    found = served_checkpoint(facts)
    assert found is not None
    return found


QKV = [f"model.layers.{n}.self_attn.{part}" for n in (0, 1) for part in ("q_proj", "k_proj", "v_proj")]


@pytest.mark.parametrize(
    ("modules", "fields", "features"),
    [
        (QKV, {}, {}),
        (QKV, {"use_dora": True, "use_rslora": True, "lora_bias": True, "bias": "all"},
         {"dora": ("use_dora",), "bias": ("bias='all'",), "lora_bias": ("lora_bias",), "rslora": ("use_rslora",)}),
        (QKV, {"modules_to_save": ["score", "norm", "embed_tokens"]},
         {"task_head": ("score",), "saved_modules": ("norm",), "whole_embeddings": ("embed_tokens",)}),
        (QKV, {"trainable_token_indices": [1]}, {"token_rows": ("trainable_token_indices",)}),
        (QKV, {"r": 3}, {"rank_pattern": tuple(QKV)}),
        (QKV, {"alpha_pattern": {"q_proj": 8}}, {"alpha_pattern": (QKV[0], QKV[3])}),
        (QKV, {"target_modules": ".*q_proj"}, {"target_pattern": (".*q_proj",)}),
        (QKV, {"target_modules": "all-linear"}, {}),
        (QKV, {"target_modules": "ALL"}, {}),
        (QKV, {"init_lora_weights": "pissa"}, {"unconverted_init": ("pissa",)}),
        (QKV, {"init_lora_weights": "gaussian"}, {}),
        (QKV, {"layers_to_transform": [0, 1]}, {"layers_in_part": ("q_proj", "k_proj", "v_proj")}),
        (QKV[:4], {}, {"attention_in_part": ("model.layers.1.self_attn",), "layers_in_part": ("k_proj", "v_proj")}),
        (QKV[1:2], {}, {"attention_in_part": ("model.layers.0.self_attn",)}),
        (["model.layers.0.mlp.k"], {}, {}),
        (["lm_head"], {}, {"head": ("lm_head",)}),
        (["visual.blocks.0.q"], {}, {"vision": ("visual.blocks.0.q",)}),
        (["supervisual.q"], {}, {}),
        (["a.experts"], {}, {"experts": ("a.experts",)}),
        (["a.b"], {"target_parameters": ["a.b.weight"]}, {"experts": ("a.b",)}),
        (["a.c"], {"target_parameters": ["a.b.weight"]}, {"experts": ("a.b.weight",)}),
        (["a.b"], {"kasa_config": {"a": 1}}, {"structure": ("kasa_config",)}),
    ],
)  # fmt: skip
def test_what_servers_treat_differently(
    modules: list[str], fields: dict[str, Any], features: dict[str, tuple[str, ...]]
) -> None:
    facts = configured(saved(modules), **fields)
    assert {
        name: where for name, where in served(facts).features.items() if name != "padded_rank"
    } == features


def test_ranks_of_what_is_served() -> None:
    def of(*ranks: tuple[str, int]) -> dict[str, tuple[str, ...]]:
        facts = configured(saved([]))
        modules = tuple(
            AdaptedModule(
                name, TensorFacts("a", "F32", (rank, 3)), TensorFacts("b", "F32", (5, rank)), None, None
            )
            for name, rank in ranks
        )
        found = served(replace(facts, adapted=modules)).features
        return {name: found[name] for name in ("padded_rank", "ranks_by_layer") if name in found}

    assert of(("layers.0.q", 8), ("layers.1.q", 8)) == {}
    assert of(("layers.0.q", 4), ("layers.1.q", 8)) == {}
    assert of(("layers.0.q", 4), ("layers.1.v", 8)) == {"padded_rank": ("q",)}
    assert of(("layers.0.q", 8), ("layers.1.q", 16)) == {"ranks_by_layer": ("q",)}
    assert of(("layers.0.q", 16), ("layers.1.v", 24)) == {"padded_rank": ("v",)}


def test_what_only_the_file_shows() -> None:
    facts = configured(saved(["a.q"]))
    more = with_tensors(
        facts,
        (f"{P}a.v.lora_magnitude_vector", (2,)),
        (f"{P}a.v.lora_B.bias", (2,)),
        (f"{P}a.lm_head.weight", (2, 2)),
        (f"{P}a.embed_tokens.bias", (2, 2)),
        (f"{P}a.other.weight", (2, 2)),
        ("a.k.lora_A.weight", (2, 2)),
        (f"{P}a.v.lora_A.mine.weight", (2, 2)),
    )
    assert served(more).features == {
        "dora": ("a.v",),
        "lora_bias": ("a.v",),
        "whole_embeddings": ("a.lm_head",),
        "no_prefix": ("a.k.lora_A.weight",),
        "adapter_in_keys": (f"{P}a.v.lora_A.mine.weight",),
    }
    named = with_tensors(configured(facts, modules_to_save=["a.lm_head"]), (f"{P}a.lm_head.weight", (2, 2)))
    assert "whole_embeddings" in served(named).features
    assert served(named).features["whole_embeddings"] == ("a.lm_head",)
    assert served(replace(facts, pickled=True)).features == {"pickle": ("adapter_model.bin",)}
    beside = (Entry("adapter_model.bin", "file", 1),)
    assert served(replace(facts, entries=beside)).features == {}
    assert served(replace(facts, entries=beside, weights=None)).features == {"pickle": ("adapter_model.bin",)}


def test_what_is_served_at_all() -> None:
    facts = configured(saved(["a.q"]))
    assert served(facts).highest_rank == 2
    assert served(facts).saved
    empty = served(replace(configured(facts, r=2, rank_pattern={"q": 5, "v": 1}), adapted=()))
    assert empty.highest_rank == 5
    assert served_checkpoint(saved(["a.q"])) is None
    assert served_checkpoint(replace(facts, weights=None)) is None
    assert served_checkpoint(configured(facts, peft_type="IA3")) is None
    mlx = served(configured(facts, peft_type="", fine_tune_type="lora"))
    assert (mlx.tool, mlx.lacking) == ("mlx-lm", ("adapters.safetensors", "num_layers", "lora_parameters"))
    assert mlx.highest_rank == 0
    whole = configured(facts, peft_type="", fine_tune_type="lora", num_layers=2, lora_parameters={"a": 1})
    assert served(replace(whole, entries=(Entry("adapters.safetensors", "file", 1),))).lacking == ()


def test_what_is_served_on_its_base() -> None:
    def of(facts: CheckpointFacts) -> dict[str, tuple[str, ...]]:
        return {name: where for name, where in served(facts).features.items() if name != "padded_rank"}

    facts = configured(saved(["layers.0.q", "layers.1.q", "lm_head"]))
    three = replace(facts, fit=Fit(a_base(layers=3, tied=(("embed", "lm_head"),)), None, None))
    assert of(three) == {
        "head": ("lm_head",),
        "tied_head": ("lm_head",),
        "layers_in_part": ("q",),
    }
    two = replace(facts, fit=Fit(a_base(layers=2), None, None))
    assert of(two) == {"head": ("lm_head",)}
    unknown = replace(facts, fit=Fit(a_base(), None, None))
    assert of(unknown) == {"head": ("lm_head",)}
    listed = replace(configured(facts, layers_to_transform=[0, 1]), fit=two.fit)
    assert of(listed) == {"head": ("lm_head",)}


def test_modules_of_a_file_by_what_they_hold() -> None:
    def kind(name: str, *shape: int) -> ServedModule:
        facts = configured(saved([]))
        module = AdaptedModule("q", TensorFacts(name, "F32", shape), None, None, 7)
        return served(replace(facts, adapted=(module,))).modules[0]

    assert kind("q.lora_embedding_A", 2, 3).kind == "embedding"
    assert kind("q.lora_A.weight", 2, 3, 1).kind == "convolution"
    assert (kind("q.lora_A.weight", 2, 3).kind, kind("q.lora_A.weight", 2, 3).rank) == ("linear", 2)
    facts = configured(saved(["a.experts"]))
    (experts,) = served(replace(facts, adapted=(replace(facts.adapted[0], configured_rank=1),))).modules
    assert (experts.kind, experts.rank) == ("experts", 1)
    assert served(facts).modules[0].rank == 2
    assert [ServedModule(name, "linear", 1, 1).layer for name in ("a.layers.3.q", "h.12", "a.q", "q")] == [
        3, 12, None, None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "kernel", "wanted"),
    [
        ("Parameter", 1, "experts"),
        ("Embedding", 1, "embedding"),
        ("Linear", 1, "linear"),
        ("Conv1D", 1, "linear"),
        ("Conv1d", 3, "convolution"),
        ("Conv2d", 1, "convolution"),
        ("Conv3d", 1, "convolution"),
    ],
)
def test_a_configuration_as_a_server_meets_it(kind: str, kernel: int, wanted: str) -> None:
    settings = configured(saved(["q"])).settings
    assert settings is not None
    layer = LayerFacts("layers.0.q", kind, "default", 3, 5, kernel, 1, 2, 4.0, 2.0, False, False, 0.0, 16)
    facts = ConfigFacts(
        "default", settings, a_base("layers.0.q", layers=1), (layer,), (), (), (), (), None, False
    )
    found = served_config(facts)
    assert found.modules == (ServedModule("layers.0.q", wanted, 2, 4.0),)
    assert not found.saved
    assert "layers_in_part" not in found.features
    part = served_config(replace(facts, base=a_base("layers.0.q", layers=2)))
    assert part.features["layers_in_part"] == ("q",)
    assert "layers_in_part" not in served_config(replace(facts, base=a_base("layers.0.q"))).features


def test_scalings_of_many_kinds_are_told_as_one() -> None:
    def named(kinds: int) -> list[str]:
        return [name for name, _ in _scalings("a", ((f"kind{number}", 2.0) for number in range(kinds)))]

    assert len(named(1_000)) == 1_000
    assert named(1_001) == ["scaling of all modules in a"]


def test_nothing_is_measured_of_a_file_that_was_not_read() -> None:
    facts = configured(saved(["q"]), r=2)
    assert of_checkpoint(facts)
    assert of_checkpoint(replace(facts, weights=None)) == ()
    assert of_checkpoint(replace(facts, adapted=())) == ()
