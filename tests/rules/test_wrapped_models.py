"""Models in DDP and FSDP, in one process: what the rules say, and what torch then does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes
import pytest
import torch
import torch.distributed as dist
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from pytest_lora import Expect, check_model, count_parameters, watch_training
from pytest_lora.bases.examples.models import made, quantized
from pytest_lora.inspection import fsdp_internals
from pytest_lora.inspection.fsdp_internals import Group, groups, is_divided, whole_parameters
from pytest_lora.inspection.model import model_facts
from pytest_lora.inspection.survey import every_module

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.randint(0, 128, (2, 8), generator=torch.Generator().manual_seed(0))
BF16, F32, BYTES = torch.bfloat16, torch.float32, torch.uint8
CPU = {"device_id": torch.device("cpu")}


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def first_of_two() -> Iterator[None]:
    """The first rank of two, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def config(**changes: Any) -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], **changes)


def adapted(base: Any = None, **changes: Any) -> Any:
    model = get_peft_model(made("base") if base is None else base, config(**changes))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def packed(storage: torch.dtype, compute: torch.dtype = F32, dtype: torch.dtype = F32) -> Any:
    base = quantized(made("base").to(dtype), compute_dtype=compute, storage=storage)
    model = get_peft_model(base, config(), autocast_adapter_dtype=dtype == F32)
    return model.train()


def shard1(model: Any, **settings: Any) -> Any:
    policy = ModuleWrapPolicy({LlamaDecoderLayer})
    return FullyShardedDataParallel(
        model, **{"use_orig_params": True, "auto_wrap_policy": policy, **CPU, **settings}
    )


def apart(model: Any) -> Any:
    """As PEFT's policy has it: each factor a flat parameter of its own, the original ones hidden."""
    leaves = {m for n, m in model.named_modules() if "lora_" in n and isinstance(m, nn.Linear)}
    return shard1(
        model,
        use_orig_params=False,
        auto_wrap_policy=lambda module, recurse, **_: recurse or module in leaves,
    )


def shard2(model: Any, **settings: Any) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh, **settings)


def codes(model: Any, *severities: str, **settings: Any) -> set[str]:
    wanted = severities or ("error", "warning")
    return {f.code for f in check_model(model, **settings).findings if f.severity in wanted}


def step(model: Any, times: int = 2) -> None:
    for _ in range(times):
        model(input_ids=IDS, labels=IDS).loss.backward()


# ---------------------------------------------------------------------------------------- DDP


def with_second(trained: bool) -> Any:
    model = adapted()
    model.add_adapter("second", config())
    for name, parameter in model.named_parameters():
        if ".second." in name:
            parameter.requires_grad_(trained)
    return model


def checkpointed(reentrant: bool) -> Any:
    model = adapted()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


def test_ddp_is_judged_as_it_then_behaves(alone: None) -> None:
    stuck = DistributedDataParallel(with_second(True))
    assert codes(stuck) == {"LORA250"}
    with pytest.raises(RuntimeError, match="finished reduction in the prior iteration"):
        step(stuck)
    for settings in ({"find_unused_parameters": True}, {"static_graph": True}):
        waiting = DistributedDataParallel(with_second(True), **settings)
        assert not codes(waiting)
        step(waiting)
    twice = DistributedDataParallel(checkpointed(True), find_unused_parameters=True)
    assert codes(twice) == {"LORA251"}
    with pytest.raises(RuntimeError, match="mark a variable ready only once"):
        step(twice)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda: DistributedDataParallel(with_second(False)),
        lambda: DistributedDataParallel(checkpointed(True)),
        lambda: DistributedDataParallel(checkpointed(True), static_graph=True, find_unused_parameters=True),
    ],
    ids=["second frozen", "reentrant", "static"],
)
def test_sound_ddp_is_left_alone(alone: None, wrapped: Callable[[], Any]) -> None:
    model = wrapped()
    assert not check_model(model).findings
    step(model)


def test_weights_that_are_frozen_or_freed_after_ddp_was_made(alone: None) -> None:
    model = with_second(False)
    wrapped = DistributedDataParallel(model)
    model.set_adapter("second")
    assert codes(wrapped) == {"LORA249"}
    assert "LORA249" not in codes(wrapped, expect=Expect(purpose="inference"))
    half = adapted()
    wrapped = DistributedDataParallel(half)
    for name, parameter in half.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    assert codes(wrapped) == {"LORA250"}
    with pytest.raises(RuntimeError, match="finished reduction in the prior iteration"):
        step(wrapped)


def test_the_search_for_unused_weights_is_an_info_and_left_alone_with_experts(alone: None) -> None:
    assert codes(DistributedDataParallel(adapted(), find_unused_parameters=True), "info") == {"LORA252"}
    experts = get_peft_model(made("moe_base"), config())
    assert "LORA252" not in codes(DistributedDataParallel(experts, find_unused_parameters=True), "info")


# ---------------------------------------------------------------------------------------- FSDP


ONLY_BYTES_ON_CPU = Version(bitsandbytes.__version__) < Version("0.47")
"""Whether bitsandbytes dequantizes nothing else on a CPU, so that no step can be taken."""


@pytest.mark.parametrize(
    ("wrap", "storage", "faulty"),
    [
        (lambda m: shard2(m, mp_policy=MixedPrecisionPolicy(param_dtype=BF16)), F32, True),
        (lambda m: shard2(m, mp_policy=MixedPrecisionPolicy(param_dtype=BF16)), BF16, False),
        (lambda m: shard2(m, mp_policy=MixedPrecisionPolicy(param_dtype=BF16)), BYTES, False),
        (shard2, F32, False),
        (lambda m: shard1(m, mixed_precision=MixedPrecision(param_dtype=BF16)), F32, True),
        (shard1, F32, False),
    ],
    ids=["2 cast", "2 same", "2 bytes", "2 plain", "1 cast", "1 plain"],
)
def test_packed_weights_that_fsdp_would_cast_are_told(
    alone: None, wrap: Callable[[Any], Any], storage: torch.dtype, faulty: bool
) -> None:
    lowered = storage != F32 or faulty
    model = wrap(packed(storage, BF16 if lowered else F32))
    assert ("LORA253" in codes(model)) == faulty
    if storage != BYTES and ONLY_BYTES_ON_CPU:
        return
    if faulty:
        with pytest.raises(RuntimeError, match="shape"):
            step(model)
    else:
        step(model)
        assert "LORA222" not in codes(model)


def test_what_is_stored_as_bfloat16_is_no_number_and_no_infinity(alone: None) -> None:
    model = packed(BF16, BF16, BF16)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.weight.data.view(torch.int16).fill_(
        0x7F80
    )  # bytes that are an infinity where they are read as a number
    assert "LORA208" not in codes(model)
    assert not codes(shard1(model, mixed_precision=MixedPrecision(param_dtype=BF16)))


def test_trained_dtypes_in_one_group(alone: None) -> None:
    mixed = shard2(adapted(made("base").to(BF16), modules_to_save=["lm_head"]))
    assert not codes(mixed), "the head is a group of its own dtype"
    model = adapted(made("base").to(BF16))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = parameter.data.to(BF16)
    model = shard2(model)
    assert codes(model) == {"LORA254"}
    with pytest.raises(AssertionError, match="uniform original parameter dtype"):
        step(model)


def test_dora_whose_base_is_gathered_alone(alone: None) -> None:
    def each(model: Any) -> Any:
        for name, module in model.named_modules():
            if name.endswith("base_layer"):
                fully_shard(module)
        return model

    assert codes(each(adapted(use_dora=True))) == {"LORA256"}
    assert not codes(each(adapted()))
    assert not codes(shard2(adapted(use_dora=True)))
    linear = shard1(adapted(use_dora=True), auto_wrap_policy=ModuleWrapPolicy({nn.Linear}))
    assert codes(linear) == {"LORA256"}


WRAPS = {"1": shard1, "1 hidden": apart, "2": shard2}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_one_rank_of_two_sees_shapes_and_no_values(first_of_two: None, wrap: Callable[[Any], Any]) -> None:
    plain = adapted()
    counted = count_parameters(plain)
    facts = model_facts(plain)
    model = wrap(plain)
    before = [list(vars(m).items()) + list(m._parameters.items()) for m in model.modules()]
    with CommDebugMode() as communication:
        report = check_model(model)
    assert not communication.get_total_counts(), "no rank waits for another"
    assert not [f for f in report.findings if f.severity != "info"]
    why = ("FSDP divides weights among 2 ranks", "values and gradients of 8 adapter tensors")
    assert why in report.not_judged
    seen = model_facts(model)
    assert [layer.module for layer in seen.layers] == [layer.module for layer in facts.layers]
    assert [layer.a.shape for layer in seen.layers] == [layer.a.shape for layer in facts.layers]
    assert {layer.b.zero for layer in seen.layers} == {None}
    assert (seen.trainable_parameters, seen.total_parameters) == (counted.trainable, counted.total)
    after = [list(vars(m).items()) + list(m._parameters.items()) for m in model.modules()]
    assert all(
        x[0] == y[0] and x[1] is y[1]
        for p, q in zip(before, after, strict=True)
        for x, y in zip(p, q, strict=True)
    )


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_one_process_alone_sees_values_also_after_an_evaluation(
    alone: None, wrap: Callable[[Any], Any]
) -> None:
    lowered = {"mp_policy": MixedPrecisionPolicy(param_dtype=BF16)} if wrap is shard2 else {}
    model = wrap(adapted(), **lowered)
    with torch.no_grad():
        model(input_ids=IDS)
    assert not codes(model)
    broken = adapted()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
    broken.get_parameter(name).data[0, 0] = float("nan")
    # Parameters of the second are distributed tensors, which nothing here reads.
    assert ("LORA207" in codes(wrap(broken))) == (wrap is not shard2)


def test_what_a_forward_has_gathered_is_no_dtype_of_the_model(alone: None) -> None:
    model = shard2(packed(BYTES), mp_policy=MixedPrecisionPolicy(param_dtype=BF16))
    before = model_facts(model).base.float_dtypes
    with torch.no_grad():
        model(input_ids=IDS)
    assert model.base_model.model.lm_head.weight.dtype == BF16, "the root stays gathered"
    assert model_facts(model).base.float_dtypes == before == ("float32",)


def test_an_adapter_that_comes_after_fsdp_is_told_also_after_a_forward(alone: None) -> None:
    model = shard2(adapted())
    model.add_adapter("late", config())
    model.set_adapter("late")
    with torch.no_grad():
        model(input_ids=IDS)
    assert codes(model) == {"LORA247"}


# ---------------------------------------------------------------------------------------- watching


def test_a_watch_of_divided_weights_says_what_it_cannot_see_and_waits_for_nobody(first_of_two: None) -> None:
    model = shard2(adapted())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with watch_training(model, optimizer) as watch:
        for _ in range(3):
            step(model, 1)
            with CommDebugMode() as communication:
                optimizer.step()
            assert not communication.get_total_counts()
            watch.log(4.0)
    assert watch.not_judged == (
        ("FSDP divides weights among 2 ranks", "values and gradients of 8 adapter tensors"),
    )
    assert watch.reports[0].not_judged == watch.not_judged
    assert len(watch.reports) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_tells_what_all_judge(rank: int) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
    try:
        frozen = adapted().requires_grad_(False)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with watch_training(frozen) as watch:
                watch.log(1.0)
    finally:
        dist.destroy_process_group()
    assert watch.should_stop
    assert any("LORA2" in str(one.message) for one in told) == (rank == 0)


# ---------------------------------------------------------------------------------------- what FSDP holds


def two_layers() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5, bias=False))
    model[0].bias.requires_grad_(False)
    return model


def of_first(model: nn.Module, **settings: Any) -> Any:
    return FullyShardedDataParallel(model, **CPU, **settings)


def the_group(model: nn.Module) -> Group:
    (group,) = groups(every_module(model))
    return group


def in_full(model: nn.Module) -> dict[str, tuple[tuple[int, ...], str, bool]]:
    """Shape, device and whether it trains, of what is in the model's places while its parameters are whole."""
    with whole_parameters(tuple(every_module(model))):
        inner = getattr(model, "module", model)
        return {
            name: (tuple(p.shape), p.device.type, p.requires_grad) for name, p in inner.named_parameters()
        }


def whole(device: str, bias_trains: bool = False) -> Any:
    shapes = {"0.weight": ((3, 4), True), "0.bias": ((3,), bias_trains), "1.weight": ((5, 3), True)}
    return {name: (shape, device, trains) for name, (shape, trains) in shapes.items()}


@pytest.mark.usefixtures("first_of_two")
@pytest.mark.parametrize("shown", [True, False])
def test_a_flat_parameter_of_two_ranks_is_told_by_its_parts_which_have_no_numbers(shown: bool) -> None:
    base = two_layers() if shown else two_layers().requires_grad_(True)
    model = of_first(base, use_orig_params=shown, mixed_precision=MixedPrecision(param_dtype=BF16))
    group = the_group(model)
    assert (group.version, group.owner, group.ranks, group.gathered_as) == (1, model, 2, BF16)
    names = [(one.places[0].name, one.shape, one.dtype, one.trained) for one in group.held]
    assert names == [
        ("weight", (3, 4), F32, True),
        ("bias", (3,), F32, not shown),
        ("weight", (5, 3), F32, True),
    ]
    assert [len(one.known) for one in group.held] == [2 if shown else 1] * 3
    assert is_divided(model)
    before = [*model.named_parameters()]
    assert in_full(model) == whole("meta", not shown)
    after = [*model.named_parameters()]
    assert [n for n, _ in after] == [n for n, _ in before]
    assert all(one is other for (_, one), (_, other) in zip(after, before, strict=True))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("shown", [True, False])
def test_a_flat_parameter_of_one_rank_has_its_numbers(shown: bool) -> None:
    base = two_layers() if shown else two_layers().requires_grad_(True)
    kept = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = of_first(base, use_orig_params=shown)
    assert (the_group(model).ranks, the_group(model).gathered_as, is_divided(model)) == (1, None, False)
    assert in_full(model) == whole("cpu", not shown)
    with whole_parameters(tuple(every_module(model))):
        for name, parameter in model.module.named_parameters():
            assert torch.equal(parameter, kept[name])


@pytest.mark.usefixtures("first_of_two")
def test_a_tied_weight_of_the_first_fsdp_is_one_at_two_places() -> None:
    base = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    base[1].weight = base[0].weight
    model = of_first(base, use_orig_params=True)
    (held,) = the_group(model).held
    assert [place.module for place in held.places] == [base[0], base[1]]
    with whole_parameters(tuple(every_module(model))):
        assert base[0].weight is base[1].weight
        assert base[0].weight.shape == (4, 4)


@pytest.mark.usefixtures("first_of_two")
@pytest.mark.parametrize("gathered", [False, True])
def test_distributed_parameters_are_known_divided_and_gathered(gathered: bool) -> None:
    base = two_layers()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(
        base, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=BF16), reshard_after_forward=False
    )
    model: Any = base
    if gathered:
        model(torch.ones(1, 4))
    group = the_group(model)
    assert (group.version, group.owner, group.ranks, group.gathered_as) == (2, model, 2, BF16)
    assert [len(one.known) for one in group.held] == [2 if gathered else 1] * 3
    assert is_divided(model)
    assert {(shape, trains) for shape, _, trains in in_full(model).values()} == {
        ((3, 4), True), ((3,), False), ((5, 3), True),
    }  # fmt: skip
    with whole_parameters(tuple(every_module(model))):
        assert {p.dtype for p in model.parameters()} == {F32}
    assert {p.dtype for p in model.parameters()} == {BF16 if gathered else F32}


def test_a_model_in_no_wrapper_is_divided_among_none() -> None:
    assert not [*groups(every_module(two_layers()))]
    assert not is_divided(two_layers())
    policy, mesh = MixedPrecisionPolicy(), object()  # that of copies, which says nothing of shards
    group = type("Group", (), {"fsdp_params": (), "mesh_info": mesh, "mp_policy": policy})()
    assert fsdp_internals._distributed(two_layers(), group).ranks == 1
