"""Rules on a live model, each bound on both sides and each condition alone, on facts made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pytest_lora import Expect
from pytest_lora.facts.base import BaseFacts, Quantization
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.facts.model import (
    CollidingName,
    CombinedAdapter,
    InitialRows,
    ModelFacts,
    SavedModule,
    TrainableBase,
    TrainedRows,
)
from pytest_lora.facts.model_parts import Factor, LateAdapter, LayerState, Reducer, Shard, Wrappers
from tests.rules.made import BASE, config, layer, module, settings, target
from tests.rules.saying import says, told

HELD = replace(BASE, carries_adapter=True)
A = Factor("lora_A", (8, 64), "float32", "cpu", True, False, True, 0.1)
B = Factor("lora_B", (64, 8), "float32", "cpu", True, False, True, 0.1)
STATE = LayerState(
    **{name: getattr(layer("layers.0.q"), name) for name in layer().__slots__},
    a=A,
    b=B,
    expected_a=(8, 64),
    expected_b=(64, 8),
    base_device="cpu",
    active=True,
    disabled=False,
    merged=False,
    dropout_live=False,
    further=(),
)
V = replace(STATE, module="layers.0.v")


def state(
    name: str = "layers.0.q",
    *,
    a: dict[str, Any] | None = None,
    b: dict[str, Any] | None = None,
    **changes: Any,
) -> LayerState:
    """A healthy layer with single facts changed, of its factors too."""
    return replace(STATE, module=name, a=replace(A, **(a or {})), b=replace(B, **(b or {})), **changes)


def model(*layers: LayerState, base: BaseFacts = HELD, **changes: Any) -> ModelFacts:
    """A model of these layers, all of them of active adapters unless said otherwise."""
    adapters = tuple(dict.fromkeys(one.adapter for one in layers))
    made = {
        "configs": tuple(config(known={"adapter": name}) for name in adapters),
        "saved": (),
        "rows": (),
        "trainable_base": (),
        "nonfinite_base": (),
        "inference_base": (),
        "adapters": adapters,
        "active": adapters,
        "nested": 1,
        "training": True,
        "base_dropouts": (),
        "trainable_parameters": 10,
        "total_parameters": 1000,
        "stored_parameters": 500,
        "duplicates": (),
        "reentrant_without_inputs": False,
    }
    return ModelFacts(base=base, layers=layers, **{**made, **changes})


SIDE = replace(V, adapter="side")
FROZEN = {"trainable": False}
STILL = state(a=FROZEN, b=FROZEN)
COPY = SavedModule("head", "default", True, True, (4,), (4,), "float32", True, False, (), False)
ROWS = TrainedRows("embed", "default", 2, True, True, "float32", True)
USED = Expect(purpose="inference")
TRAIN = Expect()

ZERO = {"zero": True}
LOADED = model(
    state(b=ZERO),
    state("v", b=ZERO),
    configs=(config(known={"adapter": "default"}, inference_mode=True),),
)
NAMED = model(
    state(rank=4, scaling=2.0, alpha=16.0),
    V,
    configs=(config(known={"adapter": "default"}, rank_pattern={"q": 4}),),
)
"""As if the rank of q, 4 by its pattern, were the 8 of all others."""


def wrapped(**parts: Any) -> ModelFacts:
    return model(STATE, wrappers=Wrappers(**parts))


def reducer(**changes: Any) -> ModelFacts:
    plain = {
        "finds_unused": False,
        "static_graph": False,
        "unreduced": (),
        "idle": (),
        "reentrant": False,
        "optional": False,
    }
    return wrapped(reducers=(Reducer(**{**plain, **changes}),))


def shard(**changes: Any) -> ModelFacts:
    plain = {
        "version": 1,
        "name": "",
        "ranks": 2,
        "gathered_as": "",
        "packed_as": (),
        "trained_dtypes": (),
        "trained": 0,
        "frozen": 0,
    }
    return wrapped(shards=(Shard(**{**plain, **changes}),))


IDLE = {"idle": ("q.lora_A.weight",)}
SHARES = {"trained": 10, "frozen": 90}
TWO_DTYPES = {"trained_dtypes": ("bfloat16", "float32")}

CASES: list[tuple[str, ModelFacts, Expect, list[str]]] = [
    (
        "active_adapter_is_left_out",
        model(state(merged=True), state(adapter="side")),
        TRAIN,
        ["error: merge_adapter(['default', 'side'])"],
    ),
    ("active_adapter_is_left_out", model(state(merged=True), state(adapter="side", active=False)), TRAIN, []),
    (
        "active_adapter_is_left_out",
        model(state(merged=True), state(adapter="side", disabled=True)),
        TRAIN,
        [],
    ),
    ("active_adapter_is_left_out", model(state(merged=True), state(adapter="side", merged=True)), TRAIN, []),
    ("active_adapter_is_left_out", model(STATE, state(adapter="side")), TRAIN, []),
    (
        "adapter_came_after_the_wrapper",
        wrapped(late=(LateAdapter("torch.compile", ("q.lora_A",)),)),
        USED,
        ["warning: keys are saved with"],
    ),
    (
        "adapter_came_after_the_wrapper",
        wrapped(late=(LateAdapter("FSDP", ("q.lora_A",)),)),
        TRAIN,
        ["error: does not know 1 parameters"],
    ),
    ("adapter_came_after_the_wrapper", wrapped(late=(LateAdapter("FSDP", ("q.lora_A",)),)), USED, []),
    (
        "adapter_can_not_learn",
        model(state(a={"zero": True}, b={"zero": True})),
        TRAIN,
        ["error: both factors are all zero in 1 of 1"],
    ),
    ("adapter_can_not_learn", model(state(a={"zero": True}, b={"zero": True})), USED, []),
    ("adapter_can_not_learn", model(state(a={"zero": True}, b={"trainable": True}), V), TRAIN, []),
    (
        "adapter_can_not_learn",
        model(state(a={"zero": True, "trainable": False}), V),
        TRAIN,
        ["error: lora_A is frozen at zero in 1 of 2"],
    ),
    (
        "adapter_can_not_learn",
        model(state(b={"zero": True, "trainable": False}), V),
        TRAIN,
        ["error: lora_B is frozen at zero in 1 of 2"],
    ),
    (
        "adapter_can_not_learn",
        model(state(a={"zero": True, "trainable": False}, b={"zero": True})),
        TRAIN,
        ["error: both factors"],
    ),
    ("adapter_can_not_learn", model(state(b={"zero": True})), TRAIN, []),
    ("adapter_has_exploded", model(state(a={"largest": 1000.0})), TRAIN, []),
    (
        "adapter_has_exploded",
        model(state(a={"largest": 1001.0})),
        TRAIN,
        ["warning: lora_A of adapter 'default' holds values up to 1e+03"],
    ),
    (
        "adapter_has_exploded",
        model(state(b={"largest": 2e6}, a={"largest": 1e6})),
        TRAIN,
        ["warning: lora_B of adapter"],
    ),
    ("adapter_has_exploded", model(state(a={"largest": None})), TRAIN, []),
    (
        "adapter_holds_no_update",
        model(state(b={"zero": True})),
        Expect(fresh=False),
        ["error: lora_B is all zero in 1 of 1"],
    ),
    (
        "adapter_holds_no_update",
        model(state(a={"zero": True})),
        Expect(fresh=False),
        ["error: lora_A is all zero in 1 of 1"],
    ),
    ("adapter_holds_no_update", model(state(b={"zero": True})), TRAIN, []),
    ("adapter_holds_no_update", model(state(b={"zero": True})), Expect(fresh=True), []),
    ("adapter_holds_no_update", model(STATE), Expect(fresh=False), []),
    ("adapter_holds_no_update", LOADED, USED, ["warning: all 2 modules of 'default' are zero"]),
    ("adapter_holds_no_update", LOADED, TRAIN, []),
    ("adapter_holds_no_update", LOADED, replace(USED, fresh=True), []),
    ("adapter_holds_no_update", replace(LOADED, layers=(*LOADED.layers, V)), USED, []),
    ("adapter_holds_no_update", replace(LOADED, layers=()), USED, []),
    ("adapter_holds_no_update", replace(LOADED, configs=()), USED, []),
    ("adapter_holds_no_update", model(state(b={"zero": True, "name": "lora_E"}), V), Expect(fresh=False), []),
    (
        "adapter_holds_no_update",
        model(state(b={"zero": True, "name": "lora_E"})),
        Expect(fresh=False),
        ["error: lora_E is all zero"],
    ),
    (
        "adapter_holds_no_update",
        model(state("x.experts.0", b={"zero": True}), V),
        Expect(fresh=False),
        ["info: lora_B"],
    ),
    (
        "adapter_holds_no_update",
        model(state("x.experts.0", b={"zero": True}), state(b={"zero": True})),
        Expect(fresh=False),
        ["error: in 2 of 2"],
    ),
    (
        "adapter_is_active_in_part",
        model(STATE, state("v", active=False)),
        TRAIN,
        ["error: is active in 1 of its 2 layers"],
    ),
    ("adapter_is_active_in_part", model(STATE), TRAIN, []),
    (
        "adapter_is_active_twice",
        model(STATE, SIDE, duplicates=(("default", "side"),)),
        TRAIN,
        ["warning: adapters 'default' and 'side' are active"],
    ),
    (
        "adapter_is_active_twice",
        model(state(b={"zero": True}), SIDE, duplicates=(("default", "side"),)),
        TRAIN,
        [],
    ),
    (
        "adapter_is_active_twice",
        model(state(active=False), SIDE, duplicates=(("default", "side"),)),
        TRAIN,
        [],
    ),
    (
        "adapter_is_called_like_a_module",
        model(STATE, colliding=(CollidingName("q", "x.q", (), ()),)),
        TRAIN,
        ["warning: is also a part of keys (x.q)"],
    ),
    (
        "adapter_is_called_like_a_module",
        model(STATE, colliding=(CollidingName("q", "x.q", ("k" * 130,), ("q",)),)),
        TRAIN,
        [f"error: of 'q', such as {'k' * 120}"],
    ),
    (
        "adapter_is_called_like_a_module",
        model(STATE, trains_xlora=True, colliding=(CollidingName("q", "x.q", (), ()),)),
        TRAIN,
        [],
    ),
    (
        "adapter_is_not_finite",
        model(state(a={"finite": False})),
        TRAIN,
        ["error: NaN or infinity in lora_A of adapter 'default'"],
    ),
    (
        "adapter_is_not_finite",
        model(STATE, saved=(replace(COPY, finite=False),)),
        TRAIN,
        ["error: in modules_to_save of adapter"],
    ),
    ("adapter_is_not_finite", model(state(a={"finite": None}), saved=(COPY,), rows=(ROWS,)), TRAIN, []),
    (
        "adapter_is_on_another_device",
        model(state(base_device="cuda:0")),
        TRAIN,
        ['error: model.to("cuda:0")'],
    ),
    (
        "adapter_is_on_another_device",
        model(state(a={"device": "meta"})),
        TRAIN,
        ["error: its values were never loaded"],
    ),
    ("adapter_is_on_another_device", model(state(base_device="meta")), TRAIN, []),
    ("adapter_is_on_another_device", model(state(base_device="")), TRAIN, []),
    ("adapter_is_on_another_device", model(STATE), TRAIN, []),
    (
        "adapter_is_trained_in_part",
        model(state(b={"zero": True}), state("layers.1.q")),
        TRAIN,
        ["warning: 1 of 2 such modules"],
    ),
    (
        "adapter_is_trained_in_part",
        model(state(b={"zero": True}), state("layers.1.q")),
        Expect(fresh=False),
        [],
    ),
    ("adapter_is_trained_in_part", model(state(b={"zero": True}), V), TRAIN, []),
    ("adapter_is_trained_in_part", model(state(b={"zero": None}), state("layers.1.q")), TRAIN, []),
    (
        "adapter_is_trained_in_part",
        model(state(b={"zero": True, "finite": False}), state("layers.1.q")),
        TRAIN,
        [],
    ),
    (
        "adapter_is_trained_in_part",
        model(state(b={"zero": True}, a={"finite": False}), state("layers.1.q")),
        TRAIN,
        [],
    ),
    (
        "adapter_is_trained_in_part",
        model(state("experts.0.q", b={"zero": True}), state("experts.1.q")),
        TRAIN,
        [],
    ),
    (
        "adapter_is_trained_in_part",
        model(state(b={"zero": True}), state("layers.1.q", adapter="side")),
        TRAIN,
        [],
    ),
    ("adapter_left_merged", model(state(merged=True)), TRAIN, ["error: is merged into the base"]),
    ("adapter_left_merged", model(state(merged=True)), USED, []),
    ("adapter_left_merged", model(STATE), TRAIN, []),
    (
        "adapter_was_wiped",
        model(state(adapter="side2", a={"zero": True}, b={"zero": True}), SIDE),
        TRAIN,
        ["error: in each of its 1 modules"],
    ),
    ("adapter_was_wiped", model(state(adapter="side2", b={"zero": True}), SIDE), TRAIN, []),
    (
        "adapters_are_disabled",
        model(state(disabled=True), V),
        TRAIN,
        ["error: disabled in 1 of 2 LoRA layers"],
    ),
    (
        "adapters_are_disabled",
        model(state(disabled=True)),
        USED,
        ["warning: model.base_model.enable_adapter_layers()"],
    ),
    (
        "adapters_are_disabled",
        model(state(disabled=True), nested=0),
        USED,
        ["warning: model.enable_adapters()"],
    ),
    ("adapters_are_disabled", model(STATE), TRAIN, []),
    ("base_is_not_finite", model(STATE, nonfinite_base=("q", "v")), TRAIN, ["error: in 2 base parameters"]),
    ("base_is_not_finite", model(STATE), TRAIN, []),
    (
        "base_is_trainable",
        model(STATE, trainable_base=(TrainableBase("layers.norm.weight", 50),)),
        TRAIN,
        ["error: list ['norm'] in modules_to_save"],
    ),
    (
        "base_is_trainable",
        model(STATE, trainable_base=(TrainableBase("weight", 51),)),
        TRAIN,
        ["error: (51 numbers, 51 % of the base)"],
    ),
    (
        "base_is_trainable",
        model(STATE, trainable_base=(TrainableBase("weight", 51),)),
        TRAIN,
        ["error: freeze the base with model.requires"],
    ),
    (
        "base_is_trainable",
        model(STATE, active=(), trainable_base=(TrainableBase("weight", 51),)),
        TRAIN,
        ["error: model.requires_grad_(False)"],
    ),
    ("base_is_trainable", model(STATE, trainable_base=(TrainableBase("weight", 51),)), USED, []),
    ("base_is_trainable", model(STATE), TRAIN, []),
    (
        "base_is_trainable",
        model(STATE, base=replace(HELD, parameters=0), trainable_base=(TrainableBase("weight", 1),)),
        TRAIN,
        ["error: (1 numbers, 100 % of the base)"],
    ),
    (
        "base_mixes_half_dtypes",
        model(STATE, base=replace(HELD, float_dtypes=("float32", "bfloat16", "float16"))),
        TRAIN,
        ["warning: weights are bfloat16, and some are float16"],
    ),
    (
        "base_mixes_half_dtypes",
        model(STATE, base=replace(HELD, float_dtypes=("float32", "bfloat16"))),
        TRAIN,
        [],
    ),
    (
        "checkpointing_cuts_the_gradient",
        model(STATE, reentrant_without_inputs=True),
        TRAIN,
        ["error: use_reentrant=True"],
    ),
    ("checkpointing_cuts_the_gradient", model(STATE, reentrant_without_inputs=True), USED, []),
    ("checkpointing_cuts_the_gradient", model(STATE), TRAIN, []),
    (
        "dropout_is_live",
        model(state(dropout_live=True, dropout=0.1)),
        USED,
        ["error: LoRA dropout p=0.1 in 1 modules is in training mode"],
    ),
    ("dropout_is_live", model(state(dropout_live=True)), TRAIN, []),
    ("dropout_is_live", model(state(dropout_live=True, disabled=True)), USED, []),
    ("dropout_is_live", model(state(dropout_live=True, merged=True)), USED, []),
    (
        "dropout_is_live",
        model(STATE, base_dropouts=("x",)),
        USED,
        ["error: dropout of the base in 1 modules is in"],
    ),
    (
        "dropout_is_live",
        model(state(dropout_live=True, dropout=0.1), base_dropouts=("x",)),
        USED,
        ["error: in 1 modules and dropout of the base"],
    ),
    ("frozen_weights_get_gradients", shard(**SHARES), TRAIN, ["info: gradients are 10 times as large"]),
    ("frozen_weights_get_gradients", shard(**SHARES), USED, []),
    ("frozen_weights_get_gradients", shard(**SHARES, version=2), TRAIN, []),
    ("frozen_weights_get_gradients", shard(trained=10), TRAIN, []),
    ("frozen_weights_get_gradients", shard(frozen=10), TRAIN, []),
    (
        "trained_dtypes_differ_in_a_shard",
        shard(**TWO_DTYPES, version=2),
        TRAIN,
        ["error: in bfloat16 and float32 in one group"],
    ),
    ("trained_dtypes_differ_in_a_shard", shard(**TWO_DTYPES), TRAIN, []),
    ("trained_dtypes_differ_in_a_shard", shard(**TWO_DTYPES, version=2), USED, []),
    ("trained_dtypes_differ_in_a_shard", shard(trained_dtypes=("float32",), version=2), TRAIN, []),
    (
        "packed_weights_are_cast",
        shard(gathered_as="bfloat16", packed_as=("float32",)),
        TRAIN,
        ["error: stored as float32, and FSDP gathers parameters as bfloat16"],
    ),
    ("packed_weights_are_cast", shard(gathered_as="bfloat16", packed_as=("bfloat16",)), TRAIN, []),
    ("packed_weights_are_cast", shard(packed_as=("bfloat16",)), TRAIN, []),
    ("magnitude_reads_a_divided_weight", wrapped(apart=("q",)), TRAIN, ["error: FSDP gathers"]),
    ("magnitude_reads_a_divided_weight", wrapped(), TRAIN, []),
    (
        "gradients_are_not_reduced",
        reducer(unreduced=("q.lora_A.weight",)),
        TRAIN,
        ["error: 1 trainable tensors were frozen"],
    ),
    ("gradients_are_not_reduced", reducer(unreduced=("q.lora_A.weight",)), USED, []),
    ("gradients_are_not_reduced", reducer(), TRAIN, []),
    (
        "gradients_are_ready_twice",
        reducer(reentrant=True, finds_unused=True),
        TRAIN,
        ["error: the first step raises"],
    ),
    ("gradients_are_ready_twice", reducer(reentrant=True, finds_unused=True), USED, []),
    ("gradients_are_ready_twice", reducer(reentrant=True), TRAIN, []),
    ("gradients_are_ready_twice", reducer(finds_unused=True), TRAIN, []),
    ("gradients_are_ready_twice", reducer(reentrant=True, finds_unused=True, static_graph=True), TRAIN, []),
    ("reduction_waits_for_ever", reducer(**IDLE), TRAIN, ["error: the gradients of 1 tensors"]),
    ("reduction_waits_for_ever", reducer(**IDLE), USED, []),
    ("reduction_waits_for_ever", reducer(**IDLE, finds_unused=True), TRAIN, []),
    ("reduction_waits_for_ever", reducer(**IDLE, static_graph=True), TRAIN, []),
    ("reduction_waits_for_ever", reducer(**IDLE, unreduced=("x",)), TRAIN, []),
    ("reduction_waits_for_ever", reducer(), TRAIN, []),
    (
        "unused_weights_are_looked_for",
        reducer(finds_unused=True),
        TRAIN,
        ["info: find_unused_parameters=True"],
    ),
    ("unused_weights_are_looked_for", reducer(finds_unused=True), USED, []),
    ("unused_weights_are_looked_for", reducer(), TRAIN, []),
    ("unused_weights_are_looked_for", reducer(finds_unused=True, static_graph=True), TRAIN, []),
    ("unused_weights_are_looked_for", reducer(finds_unused=True, **IDLE), TRAIN, []),
    ("unused_weights_are_looked_for", reducer(finds_unused=True, optional=True), TRAIN, []),
    ("unused_weights_are_looked_for", reducer(finds_unused=True, reentrant=True), TRAIN, []),
    (
        "inactive_adapter_is_trainable",
        model(STATE, SIDE, active=("default",)),
        TRAIN,
        ["info: adapter 'side' is inactive but trainable (1,024 numbers)"],
    ),
    ("inactive_adapter_is_trainable", model(STATE, SIDE, active=("default",)), USED, []),
    ("inactive_adapter_is_trainable", model(STILL, SIDE, active=("default",)), TRAIN, []),
    ("inactive_adapter_is_trainable", model(STATE, SIDE), TRAIN, []),
    (
        "layer_runs_other_code",
        model(state(own_code="forward")),
        TRAIN,
        ["warning: their forward was replaced"],
    ),
    (
        "layer_runs_other_code",
        model(state(own_code="class my.Linear")),
        TRAIN,
        ["warning: they are of class my.Linear"],
    ),
    ("layer_runs_other_code", model(state(own_code="forward"), trains_xlora=True), TRAIN, []),
    ("layer_runs_other_code", model(STATE), TRAIN, []),
    ("no_adapter_is_active", model(STATE, base=BASE), TRAIN, ["error: a PEFT model without any LoRA layer"]),
    (
        "no_adapter_is_active",
        model(STATE, active=()),
        TRAIN,
        ["error: none of the adapters 'default' is active"],
    ),
    (
        "no_adapter_is_active",
        model(active=(), adapters=()),
        TRAIN,
        ["error: the LoRA layers hold no adapter any more"],
    ),
    ("no_adapter_is_active", model(STATE), TRAIN, []),
    (
        "no_adapter_is_trainable",
        model(STILL),
        TRAIN,
        ["error: all 1 LoRA layers are frozen (requires_grad=False); trainable: nothing"],
    ),
    ("no_adapter_is_trainable", model(STILL), USED, []),
    ("no_adapter_is_trainable", model(replace(STILL, disabled=True)), TRAIN, []),
    ("no_adapter_is_trainable", model(STILL, active=()), TRAIN, []),
    ("no_adapter_is_trainable", model(STILL, trains_xlora=True), TRAIN, []),
    ("no_adapter_is_trainable", model(STATE), TRAIN, []),
    ("no_adapter_is_trainable", model(STILL, saved=(COPY,)), TRAIN, ["warning: trainable: head only"]),
    (
        "no_adapter_is_trainable",
        model(state(a={**FROZEN, "dtype": "uint8"}, b=FROZEN)),
        TRAIN,
        ["error: their factors quantized to uint8;"],
    ),
    (
        "no_adapter_is_trainable",
        model(STILL, replace(STILL, adapter="side")),
        TRAIN,
        ["error: (requires_grad=False); active: 'default';"],
    ),
    (
        "no_adapter_is_trainable",
        model(STILL),
        TRAIN,
        ["error: model.set_adapter('default') makes the adapter trainable again"],
    ),
    ("peft_wraps_peft", model(STATE, nested=2), TRAIN, ["error: (2 wrappers)"]),
    ("peft_wraps_peft", model(STATE), TRAIN, []),
    (
        "saved_copy_has_another_shape",
        model(STATE, saved=(replace(COPY, shape=(5,)),)),
        TRAIN,
        ["error: has shape (5,)"],
    ),
    ("saved_copy_has_another_shape", model(STATE, saved=(COPY,)), TRAIN, []),
    (
        "saved_copy_is_frozen",
        model(STATE, saved=(replace(COPY, trainable=False),)),
        TRAIN,
        ["error: head is in modules_to_save"],
    ),
    (
        "saved_copy_is_frozen",
        model(STATE, rows=(replace(ROWS, trainable=False),)),
        TRAIN,
        ["error: embed is in trainable_token_indices"],
    ),
    ("saved_copy_is_frozen", model(STATE, saved=(replace(COPY, trainable=False),)), USED, []),
    ("saved_copy_is_frozen", model(state(disabled=True), saved=(replace(COPY, trainable=False),)), TRAIN, []),
    ("saved_copy_is_frozen", model(STILL, saved=(replace(COPY, trainable=False),)), TRAIN, []),
    ("saved_copy_is_frozen", model(STATE, saved=(replace(COPY, trainable=False, active=False),)), TRAIN, []),
    ("saved_copy_is_frozen", model(STATE, active=(), saved=(replace(COPY, trainable=False),)), TRAIN, []),
    ("saved_copy_is_frozen", model(STATE, saved=(COPY,)), TRAIN, []),
    (
        "saved_copy_is_not_used",
        model(STATE, saved=(replace(COPY, active=False),)),
        TRAIN,
        ["error: of adapter 'default' is not active"],
    ),
    (
        "saved_copy_is_not_used",
        model(STATE, saved=(replace(COPY, active=False, disabled=True),)),
        TRAIN,
        ["error: is disabled, while"],
    ),
    ("saved_copy_is_not_used", model(STATE, saved=(COPY,)), TRAIN, []),
    ("saved_copy_is_not_used", model(state(active=False), saved=(replace(COPY, active=False),)), TRAIN, []),
    ("saved_copy_is_not_used", model(state(disabled=True), saved=(replace(COPY, active=False),)), TRAIN, []),
    ("scaling_was_changed", model(state(scaling=3.0), V), TRAIN, ["warning: scaling is 3 in 1 of 2 modules"]),
    ("scaling_was_changed", model(state(scaling=0.0)), TRAIN, ["error: so that the adapter does nothing"]),
    ("scaling_was_changed", model(state(scaling=0.0)), USED, ["info: scaling is 0"]),
    ("scaling_was_changed", model(state(scaling=0.0)), replace(USED, fresh=False), ["warning: scaling is 0"]),
    ("scaling_was_changed", model(state(scaling=0.0), V), replace(USED, fresh=False), ["info: in 1 of 2"]),
    ("scaling_was_changed", model(state(scaling=3.0)), replace(USED, fresh=False), ["info: scaling is 3"]),
    ("scaling_was_changed", NAMED, TRAIN, ["warning: as if no pattern named them"]),
    ("scaling_was_changed", NAMED, USED, ["warning: load the adapter (load_adapter) instead of swapping"]),
    (
        "scaling_was_changed",
        replace(
            NAMED,
            layers=(*NAMED.layers, replace(NAMED.layers[0], adapter="side")),
            active=("default", "side"),
        ),
        USED,
        ["info: leave it if an adapter of another alpha was hot-swapped in"],
    ),
    ("scaling_was_changed", model(state(scaling=3.0, swappable=True)), TRAIN, []),
    ("scaling_was_changed", model(state(scaling=3.0, empty_ranks=1)), TRAIN, []),
    ("scaling_was_changed", model(state(scaling=2.0 * (1 + 9e-6))), TRAIN, []),
    ("scaling_was_changed", model(state(scaling=2.0 * (1 + 2e-5))), TRAIN, ["warning: alpha / r = 2"]),
    (
        "scaling_was_changed",
        model(state(scaling=3.0, use_rslora=True)),
        TRAIN,
        ["warning: alpha / sqrt(r) = 5.65685"],
    ),
    (
        "several_adapters_train_at_once",
        model(STATE, state(adapter="side")),
        TRAIN,
        ["info: 2 adapters train together"],
    ),
    ("several_adapters_train_at_once", model(STATE, state(adapter="side")), USED, []),
    ("several_adapters_train_at_once", model(STATE, SIDE), TRAIN, []),
    ("several_adapters_train_at_once", model(STATE, state(adapter="side", active=False)), TRAIN, []),
    ("several_adapters_train_at_once", model(STATE, state(adapter="side", a=FROZEN, b=FROZEN)), TRAIN, []),
    (
        "some_adapters_are_frozen",
        model(STILL, V),
        TRAIN,
        ["warning: 1 of 2 LoRA modules of adapter 'default' are frozen"],
    ),
    ("some_adapters_are_frozen", model(STILL, V), USED, []),
    ("some_adapters_are_frozen", model(STILL), TRAIN, []),
    ("some_adapters_are_frozen", model(replace(STILL, disabled=True), V), TRAIN, []),
    ("some_adapters_are_frozen", model(replace(STILL, active=False), V), TRAIN, []),
    (
        "some_adapters_are_frozen",
        model(state(a=FROZEN), V),
        TRAIN,
        ["warning: lora_A of adapter 'default' is frozen in 1 of 2"],
    ),
    (
        "some_adapters_are_frozen",
        model(state(a=FROZEN), V, state("k")),
        TRAIN,
        ["warning: lora_A of adapter 'default' is frozen in 1 of 3"],
    ),
    ("some_adapters_are_frozen", model(state(a=FROZEN), state("v", a=FROZEN)), TRAIN, []),
    ("some_adapters_are_frozen", model(state(a={**FROZEN, "frozen_by_design": True}), V), TRAIN, []),
    (
        "trained_weights_are_float16",
        model(state(a={"dtype": "float16"})),
        TRAIN,
        ["error: float16: 1 LoRA layers, 0 saved copies"],
    ),
    (
        "trained_weights_are_float16",
        model(state(a={"dtype": "float16"})),
        TRAIN,
        ["error: convert the base before get_peft_model"],
    ),
    ("trained_weights_are_float16", model(state(a={"dtype": "float16"})), USED, []),
    ("trained_weights_are_float16", model(state(a={"dtype": "float16", "trainable": False})), TRAIN, []),
    (
        "trained_weights_are_float16",
        model(state(a={"dtype": "float8_e4m3fn"})),
        TRAIN,
        ["error: float8_e4m3fn: 1"],
    ),
    (
        "trained_weights_are_float16",
        model(STATE, saved=(replace(COPY, dtype="float16"),)),
        TRAIN,
        ["error: 0 LoRA layers, 1 saved copies"],
    ),
    (
        "trained_weights_are_float16",
        model(STATE, saved=(replace(COPY, dtype="float16", trainable=False),)),
        TRAIN,
        [],
    ),
    ("trained_weights_are_float16", model(state(a={"dtype": "bfloat16"}), saved=(COPY,)), TRAIN, []),
    (
        "weights_are_for_inference",
        model(state(a={"is_inference": True})),
        TRAIN,
        ["error: adapters are inference tensors"],
    ),
    ("weights_are_for_inference", model(state(a={"is_inference": True})), USED, []),
    (
        "weights_are_for_inference",
        model(state(a={"is_inference": True, "trainable": False}, b=FROZEN)),
        TRAIN,
        [],
    ),
    (
        "weights_are_for_inference",
        model(STATE, inference_base=("q",)),
        TRAIN,
        ["error: base weights are inference tensors"],
    ),
    (
        "weights_are_for_inference",
        model(state(a={"is_inference": True}), inference_base=("q",)),
        TRAIN,
        ["error: adapters and base weights"],
    ),
    ("weights_are_for_inference", model(STATE), TRAIN, []),
    (
        "fresh_adapter_changes_the_base",
        model(STATE),
        Expect(fresh=True),
        ["warning: is not at zero in 1 of 1 modules"],
    ),
    ("fresh_adapter_changes_the_base", model(STATE), TRAIN, []),
    ("fresh_adapter_changes_the_base", model(state(b={"zero": True})), Expect(fresh=True), []),
    (
        "fresh_adapter_changes_the_base",
        model(STATE, configs=(config(init_lora_weights="pissa"),)),
        Expect(fresh=True),
        [],
    ),
    ("fresh_adapter_changes_the_base", model(STATE, active=()), Expect(fresh=True), []),
    (
        "tied_weight_is_trained_on_one_side",
        model(STATE, saved=(replace(COPY, tied=("embed",)),)),
        TRAIN,
        ["error: embed keeps the old shared weight"],
    ),
    (
        "tied_weight_is_trained_on_one_side",
        model(STATE, saved=(replace(COPY, tied=("embed",), active=False),)),
        TRAIN,
        [],
    ),
    (
        "tied_weight_is_trained_on_one_side",
        model(STATE, saved=(replace(COPY, tied=("embed",), trainable=False),)),
        TRAIN,
        [],
    ),
    ("tied_weight_is_trained_on_one_side", model(STATE, saved=(COPY,)), TRAIN, []),
    (
        "trainable_adapter_is_not_active",
        model(STILL, SIDE, active=("default",)),
        TRAIN,
        ["error: the active adapter 'default' is frozen; 'side' is"],
    ),
    ("trainable_adapter_is_not_active", model(STILL, SIDE, active=("default",)), USED, []),
    ("trainable_adapter_is_not_active", model(STILL, SIDE, active=()), TRAIN, []),
    ("trainable_adapter_is_not_active", model(STATE, SIDE, active=("default",)), TRAIN, []),
]


@pytest.mark.parametrize(
    ("rule", "facts", "expect", "words"), CASES, ids=[f"{i}-{one[0]}" for i, one in enumerate(CASES)]
)
def test_a_model(rule: str, facts: ModelFacts, expect: Expect, words: list[str]) -> None:
    says(rule, facts, *words, expect=expect)


BOTH_TIED = (
    replace(COPY, tied=("embed",), tied_by_loading=True),
    replace(COPY, module="embed", tied=("head",), tied_by_loading=True),
)


def test_tied_copies_that_a_merge_unites() -> None:
    rule = "tied_weight_is_trained_on_one_side"
    lost = "warning: another one; the merged model ties them"
    says(rule, model(STATE, saved=BOTH_TIED), lost, lost, expect=Expect(will_merge=True))
    says(rule, model(STATE, saved=BOTH_TIED))
    apart = tuple(replace(copy, tied_by_loading=False) for copy in BOTH_TIED)
    says(rule, model(STATE, saved=apart), expect=Expect(will_merge=True))
    untied = tuple(replace(copy, tied=()) for copy in BOTH_TIED)
    says(rule, model(STATE, saved=untied), expect=Expect(will_merge=True))
    named = model(STATE, saved=BOTH_TIED[:1], configs=(config(modules_to_save=["head", "x"]),))
    says(rule, named, "error: modules_to_save=['x'], with")


@pytest.mark.parametrize(
    ("configs", "nested", "words"),
    [
        ((config(inference_mode=True),), 1, "load it with PeftModel.from_pretrained(..., is_trainable=True)"),
        ((config(inference_mode=True),), 0, "load it with model.load_adapter(..., is_trainable=True)"),
        (
            (config(inference_mode=True), config(known={"adapter": "new"})),
            1,
            "adapter 'new' was made to train",
        ),
        (
            (config(inference_mode=True), config(known={"adapter": "new"}, inference_mode=True)),
            1,
            "load it with PeftModel",
        ),
        ((config(), config(known={"adapter": "new"})), 1, "freeze or prepare_model_for_kbit_training"),
    ],
)
def test_how_a_frozen_adapter_is_made_trainable(
    configs: tuple[ConfigFacts, ...], nested: int, words: str
) -> None:
    (found,) = told("no_adapter_is_trainable", model(STILL, configs=configs, nested=nested))
    assert found.fix.startswith(words)


def test_an_adapter_that_was_loaded_for_inference() -> None:
    rule = "trainable_adapter_is_not_active"
    loaded, new = config(inference_mode=True), config(known={"adapter": "new"})
    said = "error: is trained though it was loaded for inference, and 'new' is not"
    says(rule, model(STATE, configs=(loaded, new)), said)
    says(rule, model(STILL, configs=(loaded, new)))
    says(rule, model(STATE, configs=(config(), new)))
    says(rule, model(STATE, configs=(loaded, replace(new, settings=settings(inference_mode=True)))))
    says(rule, model(STATE, configs=(new,)))


# ------------------------------------------------------------------ quantization of the base

FOUR, EIGHT = (module(f"layers.{n}.q", "Linear4bit", bits) for n, bits in enumerate(("4bit", "8bit")))
PLAIN = module("layers.2.q")
DECLARED = Quantization("4bit", (), (), ())


def based(*modules: Any, found: Quantization | None = DECLARED, **changes: Any) -> ModelFacts:
    return model(STATE, base=replace(HELD, modules=modules, quantization=found, **changes))


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (based(PLAIN), ["error: is loaded in 4bit, but 0 of 1 linear layers are quantized"]),
        (
            based(PLAIN, float_dtypes=("bfloat16",)),
            ["error: (load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)"],
        ),
        (based(PLAIN, float_dtypes=("float32", "bfloat16")), ["error: (load_in_4bit=True))"]),
        (
            based(PLAIN, float_dtypes=("float16",), found=replace(DECLARED, declared="8bit")),
            ["error: (load_in_8bit=True))"],
        ),
        (based(FOUR), []),
        (based(EIGHT), ["error: loaded in 4bit, but its layers are quantized to 8bit"]),
        (based(EIGHT, FOUR), []),
        (based(module("q", quantization="gptq")), []),
        (based(PLAIN, found=None), []),
        (based(PLAIN, found=replace(DECLARED, declared=None)), []),
        (based(PLAIN, device_types=("meta",)), []),
    ],
)
def test_what_is_declared(facts: ModelFacts, words: list[str]) -> None:
    says("base_is_not_quantized", facts, *words)


LATER = module("layers.0.v", "Linear4bit", "4bit")


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (based(FOUR, PLAIN), ["warning: 1 of 2 of these are plain Linear"]),
        (
            based(FOUR, PLAIN, found=replace(DECLARED, declared=None)),
            ["info: 1 of 2 of these are plain Linear"],
        ),
        (based(FOUR, PLAIN, found=replace(DECLARED, skipped=("q",))), []),
        (based(FOUR, PLAIN, found=replace(DECLARED, skipped=("layers.2",))), []),
        (based(FOUR, PLAIN, found=replace(DECLARED, skipped=("layers.1",))), ["warning: 1 of 2"]),
        (based(FOUR, PLAIN, found=None), []),
        (based(FOUR), []),
        (based(PLAIN, LATER), []),
        (based(FOUR, module("layers.2.q", "Embedding")), []),
        (
            based(FOUR, EIGHT, module("layers.3.q", "Linear4bit", "4bit")),
            ["warning: in two ways: 2 in 4bit, 1 in 8bit"],
        ),
        (
            based(FOUR, EIGHT, PLAIN),
            ["warning: 1 of 3 of these", "warning: in two ways: 1 in 4bit, 1 in 8bit"],
        ),
    ],
)
def test_a_base_that_is_quantized_in_part(facts: ModelFacts, words: list[str]) -> None:
    says("base_is_partly_quantized", facts, *words)
    assert all(one.where != "layers.0.q" for one in told("base_is_partly_quantized", facts)[:1])


@pytest.mark.parametrize(
    ("compute", "rest", "words"),
    [
        ("float32", ("bfloat16",), ["warning: slower than in 16 bit"]),
        ("float32", ("float16",), ["warning: slower than in 16 bit"]),
        ("float32", ("float32",), []),
        ("float16", ("bfloat16",), ["warning: values above 65504 overflow"]),
        ("float16", ("float16",), []),
        ("bfloat16", ("float16",), []),
        ("bfloat16", ("bfloat16",), []),
        ("float32", (), []),
        ("float32", ("bfloat16", "float32"), ["warning: the rest of the model is bfloat16"]),
    ],
)
def test_a_compute_dtype(compute: str, rest: tuple[str, ...], words: list[str]) -> None:
    found = replace(DECLARED, compute_dtypes=(compute,))
    says("compute_dtype_differs_from_model", based(FOUR, found=found, float_dtypes=rest), *words)
    says("compute_dtype_differs_from_model", based(FOUR, found=None, float_dtypes=rest))
    assert all(
        one.where == "layers.0.q"
        for one in told(
            "compute_dtype_differs_from_model", based(FOUR, EIGHT, found=found, float_dtypes=rest)
        )
    )


def test_a_weight_that_is_not_packed() -> None:
    rule = "quantized_weight_is_not_packed"
    says(rule, based(FOUR, found=replace(DECLARED, unpacked=("q",))), "error: model.to('cuda')")
    says(
        rule,
        based(FOUR, found=replace(DECLARED, unpacked=("q",)), device_types=("cpu",)),
        "error: model.to('cpu')",
    )
    says(rule, based(FOUR))
    says(rule, based(FOUR, found=None))


# ------------------------------------------------------------------ factors


@pytest.mark.parametrize(
    ("facts", "is_told"),
    [
        (STATE, False),
        (state(a={"shape": (8, 63)}), True),
        (state(b={"shape": (63, 8)}), True),
        (state(a={"shape": (8, 63), "dtype": "uint8"}), False),
        (state(b={"shape": (63, 8), "dtype": "int8"}), False),
        (state(a={"shape": (16, 64)}, b={"shape": (64, 16)}), False),
        (state(a={"shape": (16, 64)}, b={"shape": (64, 17)}), True),
        (state(a={"shape": (16, 64)}), True),
        (state(a={"shape": (4, 64)}, b={"shape": (64, 4)}), True),
        (state(a={"shape": (4, 64)}, b={"shape": (64, 4)}, in_features=4), False),
        (state(a={"shape": (4, 64)}, b={"shape": (64, 4)}, out_features=4), False),
        (state(a={"shape": (4, 64)}, b={"shape": (64, 4)}, in_features=5), True),
        (state(a={"shape": (16, 64)}, b={"shape": (64, 16)}, in_features=16), False),
        (state(a={"shape": (8, 64, 3, 3)}, b={"shape": (64, 8, 1, 1)}), False),
        (state(a={"shape": (9, 65)}, b={"shape": (64, 8)}), True),
        (state(a={"shape": (8, 65)}, b={"shape": (65, 8)}), True),
    ],
)
def test_shapes(facts: LayerState, is_told: bool) -> None:
    says("factor_shapes_do_not_fit", model(facts), *(["error: on a base of"] if is_told else []))


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (
            (state(idle_ranks=2), state("v", idle_ranks=2)),
            ["warning: 2 of 8 ranks (columns) of lora_B of 'default' are zero in each of 2"],
        ),
        ((state(idle_ranks=2),), []),
        ((state(idle_ranks=2), state("v", idle_ranks=3)), []),
        ((state(idle_ranks=2), state("v", idle_ranks=2, b={"zero": True})), []),
        ((state(idle_ranks=2), state("v", idle_ranks=2, a={"zero": True})), []),
        ((STATE, V), []),
        (
            (state(zero_outputs=32), state("layers.0.v", zero_outputs=32)),
            ["warning: 50 % of the rows of lora_B, in one block,"],
        ),
        ((state(zero_outputs=48), state("layers.0.v", zero_outputs=48)), ["warning: 75 % of the rows"]),
        ((state(zero_outputs=56), state("layers.0.v", zero_outputs=56)), ["warning: 87.5 % of the rows"]),
        ((state(zero_outputs=33), state("layers.0.v", zero_outputs=33)), []),
        ((state(zero_outputs=32), state("layers.1.q", zero_outputs=32)), []),
        (
            (state(zero_outputs=32), state("layers.0.v", zero_outputs=32), state("k")),
            ["warning: in each of 2 modules"],
        ),
        ((state(zero_outputs=32), state("1.q"), state("layers.0.v", zero_outputs=32)), []),
    ],
)
def test_factors_that_are_filled_in_part(layers: Any, words: list[str]) -> None:
    says("factors_are_filled_in_part", model(*layers), *words)


# ------------------------------------------------------------------ configurations


def configured(facts: ConfigFacts, *layers: LayerState, **changes: Any) -> ModelFacts:
    return model(*(layers or (STATE,)), configs=(facts,), **changes)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (configured(config()), []),
        (configured(config(r=4)), ["error: says r=4, its layers have 8"]),
        (configured(config(r=4, rank_pattern={"q": 8})), []),
        (configured(config(r=4), state(b={"name": "lora_E"})), []),
        (configured(config(lora_alpha=8)), ["warning: says lora_alpha=8, its layers have 16"]),
        (configured(config(lora_alpha=8, alpha_pattern={"q": 16})), []),
        (configured(config(use_rslora=True)), ["warning: says use_rslora=1, its layers have 0"]),
    ],
)
def test_a_configuration_that_was_changed(facts: ModelFacts, words: list[str]) -> None:
    says("config_changed_after_creation", facts, *words)


def test_a_configuration_that_was_changed_for_some() -> None:
    (found,) = told("config_changed_after_creation", configured(config(), STATE, replace(V, rank=4)))
    assert (found.where, "its layers have 4" in found.observed) == ("layers.0.v", True)


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (
            state(scaling=4.0, swappable=True),
            ["warning: as of r=8, lora_alpha=32; peft_config says r=8, lora_alpha=16"],
        ),
        (state(scaling=4.0, empty_ranks=4), ["warning: as of r=4, lora_alpha=16;"]),
        (state(scaling=4.0, empty_ranks=4, a={"shape": (16, 64)}), ["warning: as of r=12, lora_alpha=48;"]),
        (
            state(scaling=4.0, swappable=True, a={"shape": (16, 64), "name": "lora_embedding_B"}),
            ["warning: as of r=8,"],
        ),
        (
            state(scaling=4.0, swappable=True, use_rslora=True, rank=4, a={"shape": (4, 64)}),
            ["warning: r=4, lora_alpha=8;"],
        ),
        (state(scaling=4.0), []),
        (state(swappable=True), []),
    ],
)
def test_a_hot_swap(one: LayerState, words: list[str]) -> None:
    says("config_is_of_another_adapter", model(one), *words)


PISSA = config(init_lora_weights="pissa")


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (
            model(STATE, SIDE, configs=(PISSA,)),
            ["warning: init_lora_weights='pissa' rewrote the base weights"],
        ),
        (model(STATE, configs=(PISSA,)), []),
        (model(STATE, SIDE), []),
        (
            model(STATE, SIDE, configs=(replace(PISSA, settings=replace(settings(), kasa_config=True)),)),
            ["warning: kasa_config rewrote"],
        ),
    ],
)
def test_a_base_that_was_rewritten(facts: ModelFacts, words: list[str]) -> None:
    says("base_was_rewritten_under_another_adapter", facts, *words)
    assert all(
        one.where == "adapter 'default' beside 'side'"
        for one in told("base_was_rewritten_under_another_adapter", facts)
    )


Q2 = target("q", "layers.0.q", "layers.1.q")


def naming(
    *names: Any, known: dict[str, Any] | None = None, layers: Any = None, **fields: Any
) -> ConfigFacts:
    return config(*(layers or (layer(),)), known={"names": names, **(known or {})}, **fields)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (configured(naming(Q2)), ["error: 'q' is in target_modules of adapter 'default', but 1 of 2"]),
        (configured(naming(Q2, known={"saved_modules": ("layers.1.q",)})), []),
        (configured(naming(Q2), active=()), []),
        (configured(naming(Q2, exclude_modules=["x"])), []),
        (configured(naming(Q2, layers_to_transform=[0])), []),
        (configured(naming(Q2, target_parameters=["x"])), []),
        (configured(naming(Q2, target_modules=".*q")), []),
        (configured(naming(replace(Q2, field="exclude_modules"))), []),
        (
            configured(naming(replace(Q2, field="modules_to_save"))),
            ["error: 'q' is in modules_to_save of adapter 'default', but 2 of 2"],
        ),
        (
            configured(naming(replace(Q2, field="modules_to_save"), exclude_modules=["x"])),
            ["error: but 2 of 2"],
        ),
    ],
)
def test_modules_that_carry_nothing(facts: ModelFacts, words: list[str]) -> None:
    says("adapter_is_lost", facts, *words)


K = layer("layers.0.k")


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (configured(naming(Q2, layers=(layer(), K))), ["warning: 1 of 2 modules carry adapter 'default'"]),
        (configured(naming(Q2)), []),
        (configured(naming(Q2, layers=(layer(), K)), active=()), []),
        (configured(naming(layers=(layer(), K))), []),
        (configured(naming(target("x", "layers.0"), layers=(layer(), K))), []),
        (
            configured(
                replace(
                    naming(Q2, layers=(layer(), K)), base=replace(BASE, tied=(("layers.0.q", "layers.0.k"),))
                )
            ),
            [],
        ),
        (
            configured(
                replace(naming(Q2, layers=(layer(), K)), base=replace(BASE, tied=(("x", "layers.0.k"),)))
            ),
            ["warning: 1 of 2"],
        ),
        (
            configured(
                naming(Q2, replace(target("k", "layers.0.k"), field="target_parameters"), layers=(layer(), K))
            ),
            [],
        ),
        (
            configured(
                naming(Q2, replace(target("k", "layers.0.k"), field="exclude_modules"), layers=(layer(), K))
            ),
            ["warning: 1 of 2"],
        ),
    ],
)
def test_modules_that_no_target_names(facts: ModelFacts, words: list[str]) -> None:
    says("adapter_is_not_in_its_config", facts, *words)


NEW = InitialRows("embed", 97, 3)


def grown(rows: InitialRows = NEW, **changes: Any) -> ModelFacts:
    return model(STATE, **{"initial_rows": (rows,), **changes})


@pytest.mark.parametrize(
    ("facts", "expect", "words"),
    [
        (grown(), {}, ["warning: the last 3 of 100 rows equal the mean"]),
        (grown(), {"new_tokens": 3}, []),
        (grown(), {"purpose": "inference"}, []),
        (grown(replace(NEW, padding=True)), {}, []),
        (grown(replace(NEW, count=7)), {}, ["info: the alignment alone"]),
        (grown(trainable_base=(TrainableBase("embed.weight", 1),)), {}, []),
        (grown(trainable_base=(TrainableBase("x.weight", 1),)), {}, ["warning: and nothing trains them"]),
        (grown(configs=(config(known={"saved_modules": ("embed",)}),)), {}, []),
        (grown(configs=(config(layer("embed")),)), {}, []),
        (
            grown(
                configs=(config(known={"token_modules": ("embed",)}, trainable_token_indices=[97, 98, 99]),)
            ),
            {},
            [],
        ),
        (
            grown(
                configs=(config(known={"token_modules": ("embed",)}, trainable_token_indices=[96, 97, 98]),)
            ),
            {},
            ["warning: and nothing"],
        ),
        (
            grown(configs=()),
            {},
            ["warning: train the new rows (trainable_token_indices, or modules_to_save)"],
        ),
        (grown(), {}, ["warning: set modules_to_save=['embed'] or train the new rows alone"]),
        (
            grown(base=replace(HELD, tied=(("embed", "lm_head"),)), configs=(config(layer("lm_head")),)),
            {},
            [],
        ),
    ],
)
def test_rows_that_were_added(facts: ModelFacts, expect: dict[str, Any], words: list[str]) -> None:
    says("new_rows_are_untouched", facts, *words, expect=Expect(**expect))


@pytest.mark.parametrize(
    ("percent", "words"),
    [
        (1.0, []),
        (1, []),
        (0.9, []),
        (1.12, ["warning: it fits no count"]),
        (2.0, ["warning: it counts packed 4-bit storage (500 stored"]),
        (0.01, ["warning: it is the fraction, not the percentage"]),
        (1.000001, []),
        (1.00001, ["warning: it fits no count"]),
        (10.0, []),
        (None, []),
    ],
)
def test_a_reported_percentage(percent: float | None, words: list[str]) -> None:
    facts = model(STATE, base=replace(HELD, parameters=100))
    says("reported_percent_is_wrong", facts, *words, expect=Expect(reported_percent=percent))


def test_the_right_percentage() -> None:
    (found,) = told("reported_percent_is_wrong", model(STATE), Expect(reported_percent=5.0))
    assert found.expected == "1 %: 10 trainable of 1,000 parameters"
    (found,) = told(
        "reported_percent_is_wrong", model(STATE, total_parameters=0), Expect(reported_percent=5.0)
    )
    assert found.expected == "1000 %: 10 trainable of 0 parameters"


@pytest.mark.parametrize(
    ("rule", "facts"),
    [
        ("trained_dtypes_differ_in_a_shard", {**TWO_DTYPES, "version": 2}),
        ("frozen_weights_get_gradients", SHARES),
        ("packed_weights_are_cast", {"gathered_as": "bfloat16", "packed_as": ("float32",)}),
    ],
)
def test_the_name_of_a_group(rule: str, facts: dict[str, Any]) -> None:
    assert [told(rule, shard(name=name, **facts))[0].where for name in ("", "layers.0")] == [
        "the model",
        "layers.0",
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kinds": ("use_rslora",), "scaling": 4.0}, ["warning: and use_rslora scales it by 4 once more"]),
        ({"kinds": ("use_dora",)}, ["warning: and the magnitudes of DoRA"]),
        ({"kinds": ("lora_bias",)}, ["warning: and the biases of its sources"]),
        ({"kinds": ("kasa_config",)}, ["warning: and the diagonals of KaSA"]),
        ({"subtracted": ("b",), "missed": 0.11}, ["warning: its update is 11% of that difference away"]),
        ({"subtracted": ("b",), "missed": 0.1}, []),
        ({"missed": 0.11}, []),
        ({}, []),
    ],
)
def test_a_sum_of_adapters(changes: dict[str, Any], words: list[str]) -> None:
    made = CombinedAdapter(**{"adapter": "c", "sources": ("a", "b"), "kinds": (), "scaling": 1.0, **changes})
    says("combined_adapter_is_no_sum", model(STATE, combined=(made,)), *words)


def test_each_loss_of_a_sum_is_told_by_itself() -> None:
    made = CombinedAdapter("c", ("a", "b"), ("use_dora", "use_rslora"), 1.0)
    (found,) = told("combined_adapter_is_no_sum", model(STATE, combined=(made,)))
    assert found.observed.endswith(
        "and the magnitudes of DoRA (use_dora) are those of the base, not of its sources"
    )
