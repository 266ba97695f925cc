"""Rules on behaviour and on sweeps where they turn, on facts made by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from pytest_lora.facts.behaviour import (
    LawFacts,
    Leak,
    MergeFacts,
    ModuleScaling,
    ParameterShareFacts,
    ReloadFacts,
    ScalingFacts,
    SyncFacts,
    TargetFacts,
    UpdateRankFacts,
    WeightDifference,
)
from pytest_lora.facts.model_parts import LateAdapter
from pytest_lora.facts.saved_config import FieldChange, RankChange, ResumptionFacts
from pytest_lora.facts.steps import UpdateFacts
from pytest_lora.facts.sweep import Difference, LockedRankFacts, MeasuredRank, RankLockFacts
from tests.rules.saying import says, told

# ------------------------------------------------------------------ merging and reloading

MERGED = MergeFacts(apart=0.1, effect=1.0, tolerance=(1e-3, 0.1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"apart": 0.11}, ["error: differs by up to 0.11"]),
        ({"apart": 0.1}, []),
        ({"apart": math.nan}, ["error: differs by up to nan"]),
        ({"apart": 0.11, "refusal": "no"}, []),
        ({"apart": 0.11, "quantized": ("q",)}, []),
    ],
)
def test_a_merged_output(changes: dict[str, Any], words: list[str]) -> None:
    says("merged_output_differs", replace(MERGED, **changes), *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"apart": 0.5}, ["info: the adapter itself moves it by 1 (50%)"]),
        ({"apart": 0.51}, ["warning: the adapter itself moves it by 1 (51%)"]),
        ({"apart": 0.8, "effect": 2.0}, ["info: moves it by 2 (40%)"]),
        ({"effect": 0.0}, ["info: the adapter itself does not move it yet"]),
        ({"apart": 0.9, "refusal": "no"}, []),
        ({"apart": 0.9, "quantized": ()}, []),
    ],
)
def test_a_merge_into_quantized_weights(changes: dict[str, Any], words: list[str]) -> None:
    says("merging_requantizes_the_base", replace(MERGED, **{"quantized": ("q",), **changes}), *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"apart": 0.1}, ["error: differs by up to 0.1"]),
        ({}, []),
        ({"apart": 0.1, "refusal": "no"}, []),
        ({"apart": 0.1, "changed": ("q",)}, []),
        ({"apart": 0.1, "foreign": ("q",)}, []),
    ],
)
def test_a_reloaded_output(changes: dict[str, Any], words: list[str]) -> None:
    says("reloaded_output_differs", ReloadFacts(**changes), *words)


def test_what_a_round_trip_shows() -> None:
    says(
        "merged_output_differs",
        replace(MERGED, biases=("q",)),
        "error: the merged bias is not that of the base",
    )
    says("merged_output_differs", replace(MERGED, biases=("q",), refusal="no"))
    says("adapter_cannot_be_merged", MERGED)
    says(
        "adapter_cannot_be_merged",
        replace(MERGED, refusal="it is DoRA", unmerged=("q",)),
        "error: refuses to merge",
    )
    says("reloaded_weights_differ", ReloadFacts())
    says("reloaded_weights_differ", ReloadFacts(refusal="no q"), "error: cannot be loaded on the base: no q")
    says("reloaded_weights_differ", ReloadFacts(changed=("a", "b")), "error: 2 tensors of the adapter")
    recast = ReloadFacts(recast=("a",), dtypes=("float32", "bfloat16"))
    says("reloaded_in_another_precision", recast, "warning: saved as float32, loaded as bfloat16")
    says("reloaded_in_another_precision", replace(recast, dtypes=None))
    says("reloaded_in_another_precision", replace(recast, recast=()))


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ((), []),
        (("model.q.bias", "model.v.bias"), ['error: set bias="all" in the LoraConfig']),
        (("model.q.bias", "model.norm.weight"), ["error: put them into modules_to_save=['norm', 'q']"]),
        (("model.embed_tokens.weight",), ["error: train new tokens with trainable_token_indices"]),
        (("transformer.wte.weight", "model.norm.weight"), ["error: train new tokens"]),
    ],
)
def test_weights_that_are_not_saved(lost: tuple[str, ...], words: list[str]) -> None:
    says("trained_weights_are_not_saved", ReloadFacts(lost=lost), *words)


def test_laws() -> None:
    says("disabled_adapter_changes_the_base", LawFacts())
    says("disabled_adapter_changes_the_base", LawFacts(disabled=0.0), "error: differs by up to 0")
    says("zeroed_adapter_changes_the_output", LawFacts())
    says("zeroed_adapter_changes_the_output", LawFacts(zeroed=0.0), "error: differs by up to 0")
    says("second_adapter_leaks_into_the_first", LawFacts())
    leak = Leak(("one", "two"), 0.1, "after a step of two")
    says("second_adapter_leaks_into_the_first", LawFacts(leak=leak), "error: the output under one, two")
    pairs = (("a", 0.1), ("b", 0.3), ("c", 0.2))
    says("output_is_not_linear_in_the_scaling", LawFacts(nonlinear=pairs), "error: off by up to 0.3")
    says("padding_the_rank_changes_the_output", LawFacts(padded=pairs), "error: move the output by 0.3")


# ------------------------------------------------------------------ ranks in sync


def test_weights_that_differ_between_ranks() -> None:
    kinds = [("missing", None), ("form", None), ("values", 0.5)]
    few = tuple(WeightDifference("q", (1,), kind, largest) for kind, largest in kinds)
    (found,) = told("adapters_differ_between_ranks", SyncFacts(2, 20, few))
    assert found.observed == (
        "q: rank 1 unlike rank 0, where only some have it; q: rank 1 unlike rank 0, in shape or dtype; "
        "q: rank 1 unlike rank 0, by up to 0.5"
    )
    ten = tuple(WeightDifference(f"w{n}", (1, 2), "values", 0.5) for n in range(10))
    (found,) = told("adapters_differ_between_ranks", SyncFacts(3, 20, ten))
    assert found.observed.endswith("w9: ranks 1, 2 unlike rank 0, by up to 0.5")
    eleven = (*ten, WeightDifference("w10", (1,), "values", 0.5))
    (found,) = told("adapters_differ_between_ranks", SyncFacts(3, 20, eleven))
    assert found.observed.endswith("w9: ranks 1, 2 unlike rank 0, by up to 0.5; and 1 more")
    says("adapters_differ_between_ranks", SyncFacts(3, 20, ()))


A = WeightDifference("q.lora_A.default.weight", (1,), "values", 0.1)
B = replace(A, name="q.lora_B.default.weight")
HEAD = replace(A, name="score.modules_to_save.default.weight")
LATE = LateAdapter("FSDP", ("q.lora_A",))


@pytest.mark.parametrize(
    ("differing", "late", "words"),
    [
        ((A, B), (), "observed: the gradients are not averaged over the ranks: q"),
        ((B,), (), "fix: wrap the whole model in DDP or FSDP after the adapter was made, call what wraps it"),
        (
            (A,),
            (),
            "observed: what starts at zero is the same everywhere, so the ranks began with other random",
        ),
        ((A, HEAD), (), "fix: call torch.manual_seed with one number on every rank"),
        ((replace(A, name="e.lora_embedding_B.default"),), (), "observed: what starts at zero is the same"),
        ((replace(A, name="e.lora_embedding_A.default"),), (), "observed: the gradients are not averaged"),
        (
            (A, replace(B, zero=(1, 2))),
            (),
            "observed: lora_B is zero on ranks 1, 2 and not on the others, so it",
        ),
        ((replace(B, zero=(0,)),), (), "fix: load the adapter on every rank, or broadcast it from rank 0"),
        ((replace(A, zero=(1,)),), (), "fix: call torch.manual_seed"),
        ((B, replace(A, kind="form")), (), "observed: q.lora_B"),
        ((replace(B, zero=(1,)),), (LATE,), "observed: FSDP wrapped the model before the adapter was put in"),
    ],
)
def test_which_weights_differ_tells_why(
    differing: tuple[WeightDifference, ...], late: tuple[LateAdapter, ...], words: str
) -> None:
    (found,) = told("adapters_differ_between_ranks", SyncFacts(3, 20, differing, late))
    field, _, begin = words.partition(": ")
    assert getattr(found, field).startswith(begin)


# ------------------------------------------------------------------ what a test pins down

SHARE = ParameterShareFacts("Model", 10, 10, 1000, 1000, 0.01, 0.02)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"trainable": 20}, []),
        ({"trainable": 9}, ["error: raise r, adapt more modules, or, if so few are meant, low=0.00891"]),
        ({"trainable": 21, "adapter": 21}, ["error: adapt fewer modules, or, if so many are meant, high=0.0212"]),
        ({"trainable": 21, "adapter": 20}, ["error: freeze the base"]),
        ({"trainable": 9, "adapter": 8}, ["error: raise r"]),
        ({"trainable": 0}, ["error: make the adapter trainable"]),
        ({"trainable": 21, "stored": 500}, ["error: 4-bit weights packed, prints 4.2 %"]),
        ({"trainable": 21}, ["error: 21 of 1,000 parameters are trainable: 2.1 %"]),
    ],
)  # fmt: skip
def test_a_share_beside_its_band(changes: dict[str, Any], words: list[str]) -> None:
    says("parameter_ratio_outside_band", replace(SHARE, **changes), *words)


def scaling(
    value: float, alpha: float = 16, *, expected: float = 2.0, use_rslora: bool = False
) -> ScalingFacts:
    return ScalingFacts((ModuleScaling("q", value, alpha, 4 if use_rslora else 8, use_rslora),), expected)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (scaling(2.0), []),
        (scaling(2.0 * (1 + 9e-7)), []),
        (scaling(2.0 * (1 + 2e-6)), ["error: scaling 2, though alpha 16 / rank 8 is 2"]),
        (scaling(4.0, 32), ["error: scaling 4 (alpha 32 / rank 8)"]),
        (scaling(4.0, 32), ["error: an alpha of 16 (lora_alpha"]),
        (scaling(4.0), ["error: undo what changed the scaling"]),
        (scaling(8.0, 16, use_rslora=True), ["error: scaling 8 (alpha 16 / sqrt(rank 4))"]),
        (scaling(8.0, 16, use_rslora=True), ["error: an alpha of 4 "]),
        (scaling(4.0, 16 * (1 + 9e-7)), ["error: undo"]),
        (scaling(4.0, 16 * (1 + 2e-6)), ["error: an alpha of 16"]),
        (scaling(4.0 * (1 + 9e-7), 32), ["error: scaling 4 (alpha 32"]),
    ],
)
def test_a_scaling_beside_a_number(facts: ScalingFacts, words: list[str]) -> None:
    says("scaling_is_not_the_asserted_one", facts, *words)


UPDATE = UpdateFacts("q", "default", 8, 8, True, 1.0, 0.1, False, "")


@pytest.mark.parametrize(
    ("steps", "changes", "words"),
    [
        (2, {}, []),
        (2, {"rank": 9}, ["error: the update of 2 steps has rank 9, allowed is 8"]),
        (2, {"rank": 9}, ["error: rank 8 at most (r)"]),
        (2, {"rank": 9, "from_zero": False}, ["error: rank 8 at most (2 r,"]),
        (2, {"rank": 9}, ["error: look for what else writes"]),
        (2, {"rank": 9, "base_moved": True}, ["error: freeze the base weight"]),
        (2, {"rank": 9, "base_moved": True}, ["error: allowed is 8; the base weight underneath moved"]),
        (2, {"base_moved": True}, ["error: the base weight underneath moved"]),
        (2, {"rank": None, "unknown": "too large"}, ["info: was not measured: too large"]),
        (2, {"rank": None}, []),
        (2, {"norm": 0.0}, ["error: no adapter moved in 2 steps"]),
        (2, {"norm": 0.0}, ["error: make the adapter trainable and active"]),
        (0, {"norm": 0.0}, ["error: give a batch whose labels"]),
        (2, {"norm": 0.0, "base_moved": True}, ["error: the base weight underneath moved"]),
        (
            2,
            {"norm": 0.0, "rank": None, "unknown": "x"},
            ["info: not measured: x", "error: no adapter moved"],
        ),
    ],
)
def test_the_rank_of_an_update(steps: int, changes: dict[str, Any], words: list[str]) -> None:
    facts = UpdateRankFacts("Model", steps, (replace(UPDATE, **changes),))
    says("update_exceeds_its_rank", facts, *words)


def test_one_module_that_moved_is_enough() -> None:
    moved = UpdateRankFacts("Model", 2, (replace(UPDATE, norm=0.0), UPDATE))
    says("update_exceeds_its_rank", moved)


TARGETS = TargetFacts("targets=['q']", (), (), (), ("q",))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"unknown": (("qq", ("q", "k")),)}, ["error: perhaps 'q' or 'k' was meant"]),
        ({"unknown": (("qq", ()),)}, ["error: correct targets=['q']"]),
        ({"missing": ("v",)}, ["error: missing: no adapter here"]),
        ({"missing": ("v",)}, ["error: target_modules=['q'], or take them out of the test, targets=['q']"]),
        ({"unexpected": ("v",)}, ["error: unexpected: there is an adapter here"]),
        ({"missing": ("v",), "adapted": tuple("abcdefgh")}, ["error: of the test, targets=['a', 'b',"]),
        ({"missing": ("v",), "adapted": tuple("abcdefghi")}, ["error: of the test, by a regular expression"]),
    ],
)
def test_modules_beside_names(changes: dict[str, Any], words: list[str]) -> None:
    says("adapted_modules_are_not_those_named", replace(TARGETS, **changes), *words)


# ------------------------------------------------------------------ resumption

RESUMED = ResumptionFacts("out", "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("rule", "changes", "words"),
    [
        ("checkpoint_is_not_usable", {"unusable": ""}, [""]),
        (
            "base_differs_from_checkpoint",
            {"base": ("a", "b")},
            ["for the base 'a', the checkpoint was trained on 'b'"],
        ),
        (
            "alpha_differs_from_checkpoint",
            {"alpha": ("q", 32.0, 16.0)},
            ["lora_alpha=32, the checkpoint 16, as for q"],
        ),
        (
            "rank_differs_from_checkpoint",
            {"ranks": (RankChange(8, 4, ("q",)),)},
            ["has r=8, the checkpoint rank 4 in q"],
        ),
        (
            "targets_differ_from_checkpoint",
            {"gone": ("q",)},
            ["the configuration does not adapt q of the checkpoint"],
        ),
        ("targets_differ_from_checkpoint", {"new": ("v",)}, ["the checkpoint has no tensors for v"]),
        (
            "structure_differs_from_checkpoint",
            {"fields": (FieldChange("bias", "a", "b"),)},
            ["bias is a in the conf"],
        ),
    ],
)
def test_what_differs_from_a_checkpoint(rule: str, changes: dict[str, Any], words: list[str]) -> None:
    says(rule, replace(RESUMED, **changes), *(f"error: {one}" for one in words))
    says(rule, RESUMED)


# ------------------------------------------------------------------ sweeps


def locked(share: float | None, metric: str | None = "0.5", before: str | None = "0.1") -> LockedRankFacts:
    ranks = (
        MeasuredRank(4, share, metric, ("it broke",)),
        MeasuredRank(8, 0.8, "0.6", ()),
        MeasuredRank(16, 1.0, "0.9", ()),
    )
    return LockedRankFacts("accuracy", 4, 0.9, before, ranks)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (locked(0.9), []),
        (locked(0.9 - 9e-10), []),
        (locked(0.9 - 2e-9), ["error: accuracy is 0.5 at r=4 and 0.9 at r=16"]),
        (locked(0.5), ["error: counted from 0.1 before"]),
        (locked(0.5), ["error: r=16 has 100 %"]),
        (locked(0.5, before=None), ["error: 50 % of the best"]),
        (locked(None), []),
    ],
)
def test_a_rank_that_no_longer_suffices(facts: LockedRankFacts, words: list[str]) -> None:
    says("rank_no_longer_suffices", facts, *words)
    assert "counted from None" not in str(told("rank_no_longer_suffices", facts))


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (locked(0.0), []),
        (locked(None), ["error: no rank is better than the 0.1 before training"]),
        (locked(None, before=None), ["error: the metric before training is not known"]),
        (locked(None, metric=None), ["error: no trial of this rank has a metric: it broke"]),
    ],
)
def test_a_rank_without_a_share(facts: LockedRankFacts, words: list[str]) -> None:
    says("rank_can_not_be_judged", facts, *words)


def test_what_is_not_as_it_was_locked() -> None:
    kept = RankLockFacts("rank.json", 4, (), ())
    used = (Difference("r", "4", "8"), Difference("lora_alpha", "8", "32"))
    says("training_leaves_the_locked_rank", kept)
    says("training_leaves_the_locked_rank", replace(kept, in_use=used), "error: set r=4 with lora_alpha=8")
    says("locked_evidence_is_from_elsewhere", kept)
    drift = (Difference("steps", "x" * 60, "y" * 61),)
    words = f"info: steps '{'x' * 60}' is now '{'y' * 60}...'"
    says("locked_evidence_is_from_elsewhere", replace(kept, drift=drift), words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unchanged": 0.51, "effect": 0.2}, ["warning: lies 50% of the adapter's effect off"]),
        ({"unchanged": 0.51, "effect": 0.21}, ["info: lies 48% of the adapter's effect off"]),
        ({"unchanged": 0.51, "effect": 0.0}, ["info: lies 0% of the adapter's effect off"]),
        ({"unchanged": 0.5, "effect": 0.2}, []),
        ({"unchanged": None}, []),
        ({"unchanged": 0.51, "apart": 0.11}, []),
    ],
)
def test_a_merge_that_rounds_the_update_away(changes: dict[str, Any], words: list[str]) -> None:
    says("merge_rounds_the_update_away", replace(MERGED, dtypes=("bfloat16",), **changes), *words)
