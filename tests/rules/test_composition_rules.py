"""Adapters beside each other, in wrappers, under other code: faults, remedies, and healthy models of each kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from pytest_lora import Expect, Finding, check_model
from pytest_lora.bases.examples.models import BASES

pytestmark = pytest.mark.filterwarnings("ignore")

SERVING = Expect(purpose="inference", fresh=False)


def config(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], **changes})


def adapted(*names: str, trained: bool = True, **changes: Any) -> Any:
    first, *others = names or ("default",)
    model = get_peft_model(BASES["base"](), config(**changes), adapter_name=first)
    for name in others:
        model.add_adapter(name, config(**changes))
    if trained:
        train_b(model)
    return model


def train_b(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)


def found(code: str, model: nn.Module, expect: Expect | None = None) -> list[Finding]:
    return [finding for finding in check_model(model, expect=expect).findings if finding.code == code]


def serving(model: Any, *names: str) -> Any:
    """The model with these adapters active, all frozen."""
    model.base_model.set_adapter(list(names))
    return model.requires_grad_(False).eval()


# ---------------------------------------------------------------------------------------- merged in part


def merged_in_part() -> Any:
    model = serving(adapted("default", "second"), "default", "second")
    model.merge_adapter(["default"])
    return model


def test_an_active_adapter_beside_a_merged_one_has_no_effect() -> None:
    (finding,) = found("LORA240", merged_in_part(), SERVING)
    assert "'default' is merged" in finding.observed
    assert "without 'second'" in finding.observed


@pytest.mark.parametrize("mend", [lambda m: m.unmerge_adapter(), lambda m: m.merge_adapter(["second"])])
def test_remedies_of_a_merge_in_part(mend: Any) -> None:
    model = merged_in_part()
    mend(model)
    assert not check_model(model, expect=SERVING).findings


def test_a_merged_adapter_beside_one_that_is_not_active_is_meant() -> None:
    model = serving(adapted("default", "second"), "default")
    model.merge_adapter(["default"])
    assert not check_model(model, expect=SERVING).findings


# ---------------------------------------------------------------------------------------- hot-swaps


def file_of(tmp: Path, **changes: Any) -> str:
    adapted(**changes).save_pretrained(str(tmp / "new"))
    return str(tmp / "new")


def test_a_namesake_that_a_swap_wiped_is_named(tmp_path: Path) -> None:
    model = adapted("legal", "legal_v2")
    hotswap_adapter(model, file_of(tmp_path), adapter_name="legal")
    if any(p.any() for n, p in model.named_parameters() if ".legal_v2." in n):
        pytest.skip("this version of PEFT wipes no namesake")
    (finding,) = found("LORA241", model, SERVING)
    assert "'legal_v2' are all zero" in finding.observed
    assert not found("LORA225", model, SERVING)


def test_adapters_of_other_names_are_left_alone_by_a_swap(tmp_path: Path) -> None:
    model = serving(adapted("legal", "contracts"), "contracts")
    hotswap_adapter(model, file_of(tmp_path), adapter_name="legal")
    assert not check_model(model, expect=SERVING).findings


def test_a_fresh_namesake_is_not_wiped() -> None:
    model = adapted("legal", "legal_v2")
    for name, parameter in model.named_parameters():
        if "lora_B.legal_v2" in name:
            nn.init.zeros_(parameter)
    assert not found("LORA241", model)


def swapped(tmp_path: Path, *, prepare: bool, rank: int = 8, **new: Any) -> Any:
    model = adapted(r=8, lora_alpha=8)
    if prepare:
        prepare_model_for_compiled_hotswap(model, target_rank=rank)
    hotswap_adapter(model, file_of(tmp_path, **new), adapter_name="default")
    return serving(model, "default")


def test_a_swap_under_another_config_is_told_at_inference_too(tmp_path: Path) -> None:
    model = swapped(tmp_path, prepare=True, r=4, lora_alpha=32)
    (finding,) = found("LORA242", model, SERVING)
    assert finding.severity == "warning"
    assert not found("LORA228", model, SERVING)
    assert "as of r=4, lora_alpha=32; peft_config says r=8, lora_alpha=8" in finding.observed


def test_remedy_of_a_swap_is_one_rank_and_alpha(tmp_path: Path) -> None:
    assert not check_model(swapped(tmp_path, prepare=True, r=8, lora_alpha=8), expect=SERVING).findings


def test_a_model_that_is_only_prepared_for_swaps_is_left_alone() -> None:
    model = adapted(r=8, lora_alpha=16)
    prepare_model_for_compiled_hotswap(model, target_rank=16, config=model.peft_config)
    assert not found("LORA242", serving(model, "default"), SERVING)


def test_a_scaling_chosen_at_inference_is_an_info() -> None:
    model = serving(adapted(), "default")
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.set_scale("default", 0.5)
    assert [(f.code, f.severity) for f in check_model(model, expect=SERVING).findings] == [
        ("LORA228", "info")
    ]


def test_an_rslora_adapter_that_acts_with_alpha_over_r_is_told() -> None:
    model = serving(adapted(r=16, lora_alpha=32, use_rslora=True), "default")
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            layer.scaling["default"] = 32 / 16
    (finding,) = found("LORA228", model, SERVING)
    assert finding.severity == "warning"
    assert (
        "scaling is 2 in 4 of 4 modules, which is alpha / r: the root of rsLoRA was left out"
        in finding.observed
    )
    assert finding.expected == "alpha / sqrt(r) = 8 (alpha=32, r=16)"
    exec(finding.fix.partition(": ")[2], {"model": model})
    assert not check_model(model, expect=SERVING).findings


def test_patterns_that_a_swap_forgets_are_told_at_inference(tmp_path: Path) -> None:
    changes = {"lora_alpha": 9, "rank_pattern": {"v_proj": 4}}
    path = file_of(tmp_path, **changes)
    model = serving(adapted(**changes), "default")
    assert not check_model(model, expect=SERVING).findings
    hotswap_adapter(model, path, adapter_name="default")
    if not found("LORA228", model, SERVING):
        pytest.skip("this version of PEFT minds patterns in a swap")
    (finding,) = found("LORA228", model, SERVING)
    assert finding.severity == "warning"
    assert "1.125 in 2 of 4 modules, as if no pattern named them" in finding.observed
    for layer in model.modules():  # as the fix says
        hasattr(layer, "set_scale") and layer.set_scale("default", 1)
    assert not check_model(model, expect=SERVING).findings


@pytest.mark.parametrize("only", ["v_proj", "q_proj", ""])
def test_a_scaling_that_is_set_under_patterns_is_an_info(only: str) -> None:
    model = serving(adapted(lora_alpha=9, rank_pattern={"v_proj": 4}), "default")
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear) and only in name:
            module.set_scale("default", 0.7)
    assert {f.severity for f in found("LORA228", model, SERVING)} == {"info"}


# ---------------------------------------------------------------------------------------- filled in part


def fill(model: Any, part: Any) -> Any:
    """Train a part of every ``lora_B``."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(part(parameter))
    return model


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (lambda b: b[:, :4], "4 of 8 ranks"),
        (lambda b: b[:, 2:4], "6 of 8 ranks"),
        (lambda b: b[: len(b) // 2], "50 % of the rows"),
        (lambda b: b[-len(b) // 4 :], "75 % of the rows"),
    ],
    ids=["first ranks", "one rank's slice", "first half", "last quarter"],
)
def test_the_same_part_of_every_factor_is_told(part: Any, words: str) -> None:
    (finding,) = found("LORA243", fill(adapted(trained=False), part), SERVING)
    assert words in finding.observed


def of_one_module(b: torch.Tensor) -> torch.Tensor:
    return b if len(b) == 64 else b[: len(b) // 2]


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        (lambda b: b, {}),
        (of_one_module, {}),  # q_proj whole, v_proj by half: one kind of modules alone
        (lambda b: b[: len(b) // 3], {}),
        (lambda b: b[:, ::2], {"target_modules": ["layers.0.self_attn.q_proj"]}),
    ],
    ids=["whole", "half of one kind", "a third", "a single module"],
)
def test_factors_that_are_whole_or_unlike_are_left_alone(part: Any, changes: dict[str, Any]) -> None:
    assert not found("LORA243", fill(adapted(trained=False, **changes), part), SERVING)


def test_ranks_that_are_padded_in_both_factors_are_left_alone() -> None:
    model = adapted(r=4, lora_alpha=8)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert not found("LORA243", model)


# ---------------------------------------------------------------------------------------- other code


class Gated(LoraLinear):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result: torch.Tensor = super().forward(x, *args, **kwargs)
        return torch.tanh(result)


def with_a_class_of_ones_own() -> Any:
    model = adapted()
    for module in model.modules():
        if type(module) is LoraLinear:
            module.__class__ = Gated
    return model


def test_a_class_that_is_not_pefts_is_named() -> None:
    (finding,) = found("LORA244", with_a_class_of_ones_own())
    assert f"class {__name__}.Gated" in finding.observed
    assert finding.severity == "warning"


def test_a_class_that_is_registered_is_meant() -> None:
    model = with_a_class_of_ones_own()
    model.peft_config["default"]._register_custom_module({nn.Linear: Gated})
    assert not found("LORA244", model)


def test_the_hooks_of_accelerate_are_no_code_of_ones_own() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = adapted()
    for module in model.modules():
        if isinstance(module, LoraLinear):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    assert not found("LORA244", model)


# ---------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "names", [("self_attn", "second"), ("0", "1"), ("second", "q_proj"), ("layers", "x")]
)
def test_names_of_modules_lose_keys(names: tuple[str, ...]) -> None:
    findings = found("LORA245", adapted(*names))
    assert findings
    assert all(finding.severity == "error" for finding in findings)
    assert "saving leaves out or spoils" in findings[0].observed


@pytest.mark.parametrize("name", ["lora", "lora_A", "self_attn", "model"])
def test_a_single_adapter_of_such_a_name_is_told_at_least(name: str) -> None:
    (finding,) = found("LORA245", adapted(name))
    assert finding.where == f"adapter {name!r}"


@pytest.mark.parametrize(
    "names", [("default",), ("legal", "legal_v2"), ("a", "b"), ("q", "attn", "lora_")[:2]]
)
def test_other_names_are_left_alone(names: tuple[str, ...]) -> None:
    assert not found("LORA245", adapted(*names))


def test_an_adapter_with_a_name_of_its_own_is_saved_as_a_whole(tmp_path: Path) -> None:
    """The remedy."""
    model = adapted("adapter_1", "adapter_2")
    assert not found("LORA245", model)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(BASES["base"](), str(tmp_path / "adapter_2"))
    own = {n.replace("adapter_2", "default"): p for n, p in model.named_parameters() if "adapter_2" in n}
    assert all(torch.equal(p, own[n]) for n, p in again.named_parameters() if "lora_" in n)


# ---------------------------------------------------------------------------------------- wrappers


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def late_in_ddp() -> nn.Module:
    base = BASES["base"]()
    wrapped = DistributedDataParallel(base)
    base.requires_grad_(False)
    inject_adapter_in_model(config(), base)
    return wrapped


def late_in_fsdp() -> nn.Module:
    base = BASES["base"]()
    for layer in base.model.layers:
        fully_shard(layer)
    fully_shard(base)
    base.requires_grad_(False)
    inject_adapter_in_model(config(), base)
    return base


@pytest.mark.parametrize("build", [late_in_ddp, late_in_fsdp])
def test_adapters_that_come_after_their_wrapper_are_told(alone: None, build: Any) -> None:
    model = build()
    (finding,) = found("LORA247", model)
    assert finding.severity == "error"
    assert "does not know 8 parameters" in finding.observed
    assert not found("LORA247", model, SERVING)


def test_adapters_around_a_wrapped_base_are_told(alone: None) -> None:
    (finding,) = found("LORA247", get_peft_model(DistributedDataParallel(BASES["base"]()), config()))
    assert "DistributedDataParallel wrapped the model before" in finding.observed


def in_ddp() -> nn.Module:
    return DistributedDataParallel(adapted(trained=False))


def in_fsdp() -> nn.Module:
    model = adapted(trained=False)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


@pytest.mark.parametrize("build", [in_ddp, in_fsdp])
def test_adapters_that_are_wrapped_are_left_alone(alone: None, build: Any) -> None:
    assert not check_model(build()).findings


def sharded(model: nn.Module, originals: bool) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=originals, device_id=torch.device("cpu"))


@pytest.mark.parametrize("originals", [True, False])
def test_the_first_fsdp_knows_its_adapters(alone: None, originals: bool) -> None:
    model = adapted(trained=False).requires_grad_(True)
    assert not found("LORA247", sharded(model, originals))
    base = BASES["base"]()
    wrapped = sharded(base, originals)
    inject_adapter_in_model(config(), base)
    assert found("LORA247", wrapped)


def test_an_adapter_on_a_compiled_model_is_a_warning_and_the_other_order_mends_it() -> None:
    (finding,) = found("LORA247", get_peft_model(torch.compile(BASES["base"](), backend="eager"), config()))
    assert finding.severity == "warning"
    assert "_orig_mod." in finding.observed
    assert not check_model(torch.compile(adapted(trained=False), backend="eager")).findings


def test_compiled_blocks_are_left_alone() -> None:
    model = adapted(trained=False)
    layers = model.base_model.model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer, backend="eager")
    assert not check_model(model).findings


# ---------------------------------------------------------------------------------------- values of a saved adapter


def test_a_saved_configuration_with_the_values_of_a_new_adapter(tmp_path: Path) -> None:
    adapted().save_pretrained(str(tmp_path))
    inference = Expect(purpose="inference")
    wrong = get_peft_model(BASES["base"](), PeftConfig.from_pretrained(str(tmp_path))).eval()
    (finding,) = found("LORA225", wrong, inference)
    assert finding.severity == "warning"
    assert "that of a saved adapter (inference_mode=True)" in finding.observed
    assert not found("LORA225", wrong, Expect(purpose="inference", fresh=True))
    right = PeftModel.from_pretrained(BASES["base"](), str(tmp_path)).eval()
    assert not found("LORA225", right, inference)
    new = adapted(trained=False).eval()
    assert not found("LORA225", new, inference), "tests judge new adapters as they would be served"


# ------------------------------------------------------------------------- deleted below the PEFT model


def below() -> Any:
    """The first of two adapters was deleted on the tuner: the PEFT model goes on to call it active."""
    model = adapted("first", "second", task_type="CAUSAL_LM")
    model.base_model.delete_adapter("first")
    return model.requires_grad_(False).eval()


def test_an_adapter_that_is_gone_is_not_the_active_one() -> None:
    model = below()
    with pytest.raises(KeyError):
        model(torch.ones(1, 2, dtype=torch.long))
    (finding,) = found("LORA265", model, SERVING)
    assert finding.severity == "error"
    assert "calls adapter 'first' active, which it does not have" in finding.observed
    assert "model.set_adapter('second')" in finding.fix
    model.set_adapter("second")
    model.requires_grad_(False)
    model(torch.ones(1, 2, dtype=torch.long))
    assert not check_model(model, expect=SERVING).findings


def test_a_mixed_model_that_calls_none_active() -> None:
    model = get_peft_model(BASES["base"](), config(), mixed=True)
    train_b(model)
    model.requires_grad_(False).eval()
    assert not found("LORA265", model, SERVING)
    model.base_model.active_adapter = []
    (finding,) = found("LORA265", model, SERVING)
    assert finding.severity == "warning"
    assert finding.observed.endswith("but its layers apply 'default'")


def test_adapters_that_were_activated_on_the_tuner_are_meant() -> None:
    model = serving(adapted("first", "second"), "second")
    assert model.active_adapter == "first"
    assert not found("LORA265", model, SERVING)


def test_the_head_of_an_adapter_that_is_gone() -> None:
    model = adapted("first", "second", modules_to_save=["lm_head"])
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.delete_adapter("first")
            module.set_adapter("second")
    del model.peft_config["first"]
    model.active_adapter = "second"
    model.requires_grad_(False).eval()
    (finding,) = found("LORA211", model, SERVING)
    assert "copy of adapter 'first' is active, and there is no such adapter any more" in finding.observed
    model.set_adapter("second")
    model.requires_grad_(False)
    assert not check_model(model, expect=SERVING).findings


# --------------------------------------------------------------------- what an older library leaves, or saves


@pytest.mark.parametrize("scaling", [4.0, 1.0, 0.5])
def test_a_scaling_without_the_root_of_rslora(scaling: float) -> None:
    model = serving(adapted(r=16, use_rslora=True), "default")
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.scaling["default"] = scaling
    said = [finding.severity for finding in found("LORA228", model, SERVING)]
    assert said == {4.0: [], 1.0: ["warning"], 0.5: ["info"]}[scaling]


def test_keys_that_mean_the_same_after_saving(tmp_path: Path) -> None:
    """What LORA107 advises is loaded as it was; what it warns of is not."""
    for key, same in (("layers.0.self_attn.q_proj", False), ("(layers.0.self_attn.q_proj)", True)):
        model = adapted(alpha_pattern={key: 32, "k_proj|q_proj": 4})
        model.save_pretrained(tmp_path)
        pattern = PeftConfig.from_pretrained(tmp_path).alpha_pattern
        assert (list(pattern) == [key, "k_proj|q_proj"]) is same
        layer = (
            PeftModel.from_pretrained(BASES["base"](), tmp_path)
            .base_model.model.model.layers[0]
            .self_attn.q_proj
        )
        assert layer.scaling["default"] == (4 if same else 0.5)
        assert bool(found("LORA107", model)) is not same


def test_the_head_of_an_adapter_that_is_not_active() -> None:
    model: Any = adapted("first", modules_to_save=["lm_head"])
    model.add_adapter("second", config())
    train_b(model)
    model.set_adapter("second")
    model.requires_grad_(False).eval()
    assert not found("LORA211", model, SERVING)
    model.base_model.model.lm_head.enable_adapters(True)  # PEFT 0.17 switched the copies off with the adapter
    model.base_model.model.lm_head.set_adapter("first")
    model.requires_grad_(False)
    (finding,) = found("LORA211", model, SERVING)
    assert finding.severity == "warning"
    assert "copy of adapter 'first' is active, and that adapter is not" in finding.observed
    model.set_adapter("second")
    model.requires_grad_(False)
    assert not check_model(model, expect=SERVING).findings


def test_heads_that_peft_names_for_an_adapter_without_a_task_type() -> None:
    model: Any = get_peft_model(BASES["classifier_base"](), config(task_type="SEQ_CLS"))
    model.add_adapter("second", config())
    model.set_adapter("second")
    assert {"classifier", "score"} <= set(model.peft_config["second"].modules_to_save)
    assert not found("LORA110", model)
