"""What is asked of PEFT about a configuration on a base, and what of the answers is told."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pytest_lora.facts.base import BaseFacts
from pytest_lora.facts.config import ConfigFacts, NameMatch, PatternKey, Refusal
from pytest_lora.inspection import parameters, wrappers
from pytest_lora.inspection.base import base_facts, base_parameters, is_index
from pytest_lora.inspection.config import _name_matches, config_facts
from pytest_lora.inspection.fsdp_internals import Group, Held, Place
from pytest_lora.inspection.layers import FULL, fills, read_values
from pytest_lora.inspection.parameters import AdapterSize, adapter_sizes, count, stored_in_4bit
from pytest_lora.inspection.peft_internals import BaseTunerLayer
from pytest_lora.inspection.rehearsal import refused_merge
from pytest_lora.inspection.repairs import explained
from pytest_lora.inspection.survey import survey

# ------------------------------------------------------------------ factors


def test_which_ranks_and_outputs_of_factors_hold_anything() -> None:
    a, b = torch.ones(4, 3), torch.ones(5, 4)
    a[1], b[:, 1] = 0, 0  # empty
    b[:, 2] = 0  # idle
    a[3] = 0  # at zero in the random factor alone
    last, first, apart = b.clone(), b.clone(), b.clone()
    last[3:], first[:1], apart[2] = 0, 0, 0
    found = fills([(a, last), (a, first), (a, apart), (torch.ones(4, 3), torch.ones(5, 4))])
    assert [tuple(found[id(one)]) for one in (last, first, apart)] == [(1, 1, 2), (1, 1, 1), (1, 1, 0)]
    assert len(found) == 4
    assert tuple(list(found.values())[3]) == tuple(FULL) == (0, 0, 0)
    for one, other in (
        (torch.ones(3, 4), torch.ones(5, 4)),
        (torch.ones(4, 3, 1), torch.ones(5, 4)),
        (torch.ones(4, 3, 1), torch.ones(5, 4, 1)),
        (torch.ones(4, 3), torch.ones(5, 4, device="meta")),
    ):
        assert fills([(one, other)]) == {}


@pytest.mark.parametrize(
    ("values", "seen"),
    [
        ([0.0, -0.0], (True, True, 0.0)),
        ([-3.0, 2.0], (False, True, 3.0)),
        ([-1.0, 2.0], (False, True, 2.0)),
        ([0.0, 2.0], (False, True, 2.0)),
        ([float("inf"), 1.0], (False, False, None)),
        ([1.0, float("-inf")], (False, False, None)),
        ([float("nan"), 0.0], (False, False, None)),
    ],
)
def test_the_values_of_a_factor(values: list[float], seen: Any) -> None:
    tensor = torch.tensor(values)
    assert tuple(read_values([tensor, None])[id(tensor)]) == seen


def test_what_has_no_values_to_read() -> None:
    for tensor in (
        torch.ones(2, device="meta"), torch.ones(0), torch.ones(2, dtype=torch.int32),
        torch.ones(2, dtype=torch.float8_e4m3fn), torch.ones(2, 2).to_sparse(),
    ):  # fmt: skip
        assert read_values([tensor]) == {}
    assert len(read_values([torch.ones(2, dtype=torch.float16)])) == 1


# ------------------------------------------------------------------ sizes


def test_sizes_between_two_ranks_are_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def size(config: LoraConfig, model: nn.Module, rank: int) -> AdapterSize:
        asked.append(rank)
        return AdapterSize(10 + 3 * rank, 5 * rank, 7 + rank)

    monkeypatch.setattr(parameters, "_adapter_size", size)
    linear, grouped = (
        nn.Sequential(nn.Linear(2, 2), nn.Dropout()),
        nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)),
    )
    ranks = [1, 2, 3, 8]
    for config, model, every in (
        (LoraConfig(), linear, [1, 8]),
        (LoraConfig(), nn.Sequential(nn.Conv2d(4, 4, 1)), [1, 8]),
        (LoraConfig(), grouped, [1, 8, 2, 3]),
        (LoraConfig(init_lora_weights="eva"), linear, [1, 8, 2, 3]),
    ):
        asked.clear()
        found = adapter_sizes(config, model, ranks)
        assert found == {rank: AdapterSize(10 + 3 * rank, 5 * rank, 7 + rank) for rank in ranks}
        assert sorted(asked) == sorted(every), (config.init_lora_weights, asked)
    asked.clear()
    assert list(adapter_sizes(LoraConfig(), linear, [4])) == asked == [4]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.norm = nn.Linear(4, 6, bias=False), nn.Linear(4, 6), nn.LayerNorm(4)


class Toy(nn.Module):
    """Two blocks, an embedding and a head; they answer nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers, self.lm_head = (
            nn.Embedding(9, 4),
            nn.ModuleList([Block(), Block()]),
            nn.Linear(4, 9),
        )

    def prepare_inputs_for_generation(self) -> None:
        pass


def test_numbers_that_a_toy_holds() -> None:
    size = adapter_sizes(LoraConfig(r=2, target_modules=["q_proj"], bias="all"), Toy(), [2])[2]
    biases = 2 * (6 + 4) + 9
    assert (size.trainable, size.added, size.saved) == (2 * 20 + biases, 40, 40 + biases)
    model = Toy()
    model.embed.requires_grad_(False)
    found = survey(model)
    parameters = base_parameters(found)
    totals = count(model, found, parameters)
    whole = 36 + 2 * (24 + 30 + 8) + 45
    assert (totals.trainable, totals.total, totals.base, totals.adapter) == (whole - 36, whole, whole, 0)
    assert (totals.stored, totals.stored_bytes) == (whole, 4 * whole)
    facts = base_facts(found, parameters)
    assert stored_in_4bit(facts, parameters) == 36 + 2 * (12 + 12 + 6 + 8) + 18 + 9


# ------------------------------------------------------------------ names


def told(**fields: Any) -> ConfigFacts:
    return config_facts(LoraConfig(r=2, lora_alpha=4, **fields), Toy())


Q = tuple(f"layers.{n}.q_proj" for n in (0, 1))
V = tuple(f"layers.{n}.v_proj" for n in (0, 1))


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"target_modules": ["q_proj"]}, [("target_modules", "q_proj", Q, ())]),
        ({"target_modules": ["q_proj", "0.v_proj", "v_porj"]},
         [("target_modules", "0.v_proj", V[:1], ()), ("target_modules", "q_proj", Q, ()),
          ("target_modules", "v_porj", (), ("v_proj",))]),
        ({"target_modules": r".*\.q_proj"}, [("target_modules", r".*\.q_proj", Q, ())]),
        ({"target_modules": "all-linear"}, [("target_modules", "all-linear", (Q[0], V[0], Q[1], V[1], "lm_head"), ())]),
        ({"target_modules": ["q_proj"], "modules_to_save": ["orm", "m"]},
         [("target_modules", "q_proj", Q, ()), ("modules_to_save", "m", (), ()),
          ("modules_to_save", "orm", ("layers.0.norm", "layers.1.norm"), ())]),
        ({"target_modules": ["q_proj"], "exclude_modules": ["v_porj"]},
         [("target_modules", "q_proj", Q, ()), ("exclude_modules", "v_porj", (), ("v_proj",))]),
        ({"target_modules": ["q_proj", "x" * 994 + ".q_prj", "y" * 993 + ".q_prj", "x." + "q" * 998]},
         [("target_modules", "q_proj", Q, ()), ("target_modules", "x." + "q" * 998, (), ()),
          ("target_modules", "x" * 994 + ".q_prj", (), ()),
          ("target_modules", "y" * 993 + ".q_prj", (), ("q_proj", "v_proj"))]),
    ],
)  # fmt: skip
def test_what_names_match_in_a_base(fields: dict[str, Any], names: list[tuple[Any, ...]]) -> None:
    found = told(**fields)
    assert [NameMatch(*one) for one in names] == [
        one for one in found.names if one.field != "target_parameters"
    ]


@pytest.mark.parametrize(
    ("written", "applied", "matches"),
    [
        (("up", "q"), ("experts.up",), [("q", ("a.q",)), ("up", ("mlp.experts.up",))]),
        (("up", "q"), (), [("q", ("a.q",)), ("up", ())]),
    ],
    ids=["rewritten", "as written"],
)  # fmt: skip
def test_names_that_peft_turned_into_fused_parameters_match_those(
    written: Any, applied: Any, matches: Any
) -> None:
    kept = (
        ("q",) if applied else ()
    )  # PEFT takes long lists together: what it leaves out is no sign of a rewriting
    fields: dict[str, Any] = {"exclude_modules": None, "modules_to_save": None}
    base: Any = SimpleNamespace(module_names=["a.q"], modules=())
    layers: Any = (SimpleNamespace(module="mlp.experts.up"),)
    found = _name_matches(
        cast("Any", SimpleNamespace(target_modules=written, target_parameters=(), **fields)),
        cast("Any", SimpleNamespace(target_modules=kept, target_parameters=applied, **fields)),
        base,
        layers if applied else (),
        [],
    )
    assert sorted((one.name, one.modules) for one in found) == matches


def test_similar_names_are_looked_for_of_fifty() -> None:
    names = [f"q_pro{chr(97 + n // 8)}{n % 8}" for n in range(51)]
    found = told(target_modules=["q_proj", *names])
    wrong = [one for one in found.names if not one.modules]
    assert len(wrong) == 51
    assert [one.similar != () for one in wrong] == [True] * 50 + [False]


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        ({"q_proj": 4}, [("rank_pattern", "q_proj", 4.0, Q, None, ())]),
        ({"0.q_proj": 4, "q_proj": 8, "layers.0.q_proj": 2},
         [("rank_pattern", "0.q_proj", 4.0, Q[:1], None, ()), ("rank_pattern", "q_proj", 8.0, Q[1:], None, ()),
          ("rank_pattern", "layers.0.q_proj", 2.0, (), "0.q_proj", (), Q[:1])]),
        ({"v_proj": 4, "x": 2},
         [("rank_pattern", "v_proj", 4.0, (), None, V), ("rank_pattern", "x", 2.0, (), None, ())]),
        ({}, []),
    ],
)  # fmt: skip
def test_what_keys_of_a_pattern_decide(pattern: dict[str, int], keys: list[tuple[Any, ...]]) -> None:
    found = told(target_modules=["q_proj"], rank_pattern=pattern)
    assert list(found.patterns) == [PatternKey(*one) for one in keys]


def test_a_configuration_on_a_toy_in_facts() -> None:
    found = told(target_modules=["q_proj"], modules_to_save=["lm_head"], rank_pattern={"0.q_proj": 4})
    assert [(one.module, one.rank, one.parameters, one.kernel, one.experts) for one in found.layers] == [
        (Q[0], 4, 40, 1, 1),
        (Q[1], 2, 20, 1, 1),
    ]
    assert (found.saved_modules, found.token_modules, found.refusal, found.live) == (
        ("lm_head",),
        (),
        None,
        False,
    )
    refused = told(target_modules=["norm"])
    assert refused.refusal is not None
    assert refused.refusal.error == "ValueError"
    assert set(refused.refusal.modules) == {"layers.0.norm", "layers.1.norm"}
    assert refused.patterns == ()
    with pytest.raises(TypeError, match=r"config must be a peft\.LoraConfig, not dict"):
        config_facts({}, Toy())


def merges(base: nn.Module, config: LoraConfig) -> bool:
    """Whether PEFT merges the adapter."""
    try:
        get_peft_model(base, config).merge_and_unload()
    except Exception:
        return False
    return True


@pytest.mark.parametrize("is_on", [True, False])
def test_the_garbage_collector_waits_until_peft_has_answered(is_on: bool) -> None:
    starts = []
    threshold, was_on = gc.get_threshold(), gc.isenabled()

    def seen(phase: str, info: dict[str, int]) -> None:
        starts.append(phase)

    config = LoraConfig(r=2, target_modules="all-linear")
    (gc.enable if is_on else gc.disable)()
    gc.callbacks.append(seen)
    gc.set_threshold(20)
    try:
        config_facts(config, "meta-llama/Llama-2-7b-hf")
        assert gc.isenabled() is is_on
        with pytest.raises(ValueError, match="base"):
            config_facts(config, "no-such/base")
        assert gc.isenabled() is is_on
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(seen)
        (gc.enable if was_on else gc.disable)()
    # Some come in the moments around it; while PEFT works, twenty objects would be made thousands of times.
    assert len(starts) < 1000


@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(4, 6),
        lambda: nn.Linear(4, 6, bias=False),
        lambda: nn.Conv2d(4, 6, 3),
        lambda: nn.Conv2d(4, 6, 3, groups=2),
        lambda: nn.Embedding(9, 4),
        lambda: nn.MultiheadAttention(4, 2),
    ],
    ids=["linear", "without a bias", "convolution", "in groups", "embedding", "attention"],
)
def test_what_peft_refuses_to_merge_is_told(make: Any, lora_bias: bool) -> None:
    config = LoraConfig(r=2, target_modules=["0"], lora_bias=lora_bias)
    found = config_facts(config, nn.Sequential(make()))
    if found.refusal is None:
        assert (found.merge_refusal is None) is merges(nn.Sequential(make()), config)


def test_a_kind_of_layer_without_a_merge() -> None:
    layer: Any = type("NoMerge", (), {"merge": BaseTunerLayer.merge})()
    assert str(refused_merge(LoraConfig(), [(layer, 2)])) == "NoMerge has no merge"


# ------------------------------------------------------------------ exclusions


MODULES: dict[str, nn.Module] = {
    "vision": nn.Module(), "vision.q": nn.Bilinear(1, 1, 1), "vision.0.q": nn.Bilinear(1, 1, 1),
    "text": nn.Module(), "text.q": nn.Linear(1, 1), "text.v": nn.Bilinear(1, 1, 1),
}  # fmt: skip


@pytest.mark.parametrize(
    ("message", "targets", "takes", "modules", "exclusion"),
    [
        ("Target module Bilinear(1) is", ["q"], lambda tried: True, ("vision.q", "vision.0.q"), ".*(vision).*"),
        ("Target module Bilinear(1) is", ["q"], lambda tried: tried == {"q"}, ("vision.q", "vision.0.q"), ("q",)),
        ("Target module Bilinear(1) is", ["q"], lambda tried: False, ("vision.q", "vision.0.q"), None),
        ("Target module Bilinear(1) is", ["q", "v"], lambda tried: True,
         ("vision.q", "vision.0.q", "text.v"), ("q", "v")),
        ("Target module Linear(1) is", ["q"], lambda tried: True, ("text.q",), ".*(text).*"),
        ("Module 'vision.q' is incompatible", ["q"], lambda tried: True, ("vision.q",), ("q",)),
        ("Module 'vision.q' is incompatible", ["v"], lambda tried: True, (), None),
        ("Module 'vision.q' is incompatible", "all-linear", lambda tried: True, ("vision.q",), ".*(vision).*"),
        ("Something else", ["q"], lambda tried: True, (), None),
    ],
)  # fmt: skip
def test_what_to_exclude_so_that_peft_takes_the_rest(
    message: str, targets: Any, takes: Any, modules: tuple[str, ...], exclusion: Any
) -> None:
    def tried(config: LoraConfig) -> Exception | None:
        return None if takes(config.exclude_modules) else ValueError("no")

    given = LoraConfig(target_modules=targets)
    assert explained(Refusal("ValueError", message), given, MODULES, tried) == Refusal(
        "ValueError", message, modules, exclusion
    )
    assert given.exclude_modules is None


def test_nothing_is_excluded_in_place_of_what_is() -> None:
    config = LoraConfig(target_modules=["q"], exclude_modules=["x"])
    found = explained(Refusal("ValueError", "Target module Bilinear(1)"), config, MODULES, lambda tried: None)
    assert (found.modules, found.exclusion) == (("vision.q", "vision.0.q"), None)


# ------------------------------------------------------------------ numbers in names, and what shares


def test_numbers_and_shared_weights_of_a_base() -> None:
    assert [is_index(part) for part in ("3", "9" * 11, "9" * 12, "x", "²", "")] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]
    model = Toy()

    def facts() -> BaseFacts:
        found = survey(model)
        return base_facts(found, base_parameters(found))

    assert facts().tied == ()
    assert facts().layer_indices == (0, 1)
    model.lm_head.weight = nn.Parameter(model.embed.weight.data)
    assert facts().tied == ()
    model.lm_head.weight = model.embed.weight
    assert facts().tied == (("embed", "lm_head"),)


@pytest.mark.parametrize(("ranks", "unseen"), [(1, 0), (2, 2)])
def test_adapters_that_ranks_divide_are_not_seen(
    monkeypatch: pytest.MonkeyPatch, ranks: int, unseen: int
) -> None:
    model = nn.ModuleDict({"lora_A": nn.Linear(2, 3), "q": nn.Linear(1, 4)})
    held = tuple(
        Held((Place(module, name),), tuple(p.shape), p.dtype, module is model["q"], (p,))
        for module in model.values()
        for name, p in module.named_parameters()
    )
    group = Group(2, model, ranks, torch.bfloat16, held)
    monkeypatch.setattr(wrappers, "groups", lambda modules: [group])
    found = wrappers.wrapper_facts(model, list(model.modules()), survey(model))
    assert found.unseen == unseen
    (shard,) = found.shards
    assert (shard.version, shard.name, shard.ranks, shard.gathered_as) == (2, "", ranks, "bfloat16")
    assert (shard.trained, shard.frozen, shard.trained_dtypes, shard.packed_as) == (8, 9, ("float32",), ())
    assert found.late == ()
