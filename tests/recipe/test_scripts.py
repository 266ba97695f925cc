"""The arguments of a script are judged as a recipe is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig
from transformers import TrainingArguments

from pytest_lora import check_run
from pytest_lora.inspection import recipe as script

BASE = "Qwen/Qwen2.5-0.5B"


def codes(
    tmp_path: Path, *, budget: str | None = None, targets: Any = "all-linear", **fields: Any
) -> set[str]:
    given = {"learning_rate": 2e-4, "per_device_train_batch_size": 1, **fields}
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **given)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    return {f.code for f in check_run(args, config, BASE, budget=budget).findings if f.severity != "info"}


def test_a_healthy_run_has_no_findings(tmp_path: Path) -> None:
    assert codes(tmp_path) == set()


def test_rules_on_recipes_judge_arguments(tmp_path: Path) -> None:
    assert codes(tmp_path, lr_scheduler_type="constant", warmup_steps=10) == {"LORA613"}
    assert codes(tmp_path, max_steps=50, warmup_steps=80) == {"LORA620"}
    assert codes(tmp_path, learning_rate=0.02) == {"LORA621"}
    assert codes(tmp_path, targets=["c_attn"]) == {"LORA104"}


def test_what_is_no_training_arguments_is_refused() -> None:
    with pytest.raises(TypeError, match=r"args must be transformers\.TrainingArguments, not {}"):
        check_run({}, LoraConfig(r=8), BASE)


def test_the_tool_of_arguments_is_that_of_their_class(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    given = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    tools = [check_run(made(**given), config, BASE).subject for made in (TrainingArguments, trl.SFTConfig)]
    assert [subject.rpartition(" of ")[2] for subject in tools] == ["Trainer", "TRL"]


@pytest.mark.parametrize(
    ("said", "strategy"),
    [
        ({"fsdp": False}, None),
        ({"fsdp": []}, None),
        ({"fsdp": True, "plugin": {"fsdp_version": 2}}, "fsdp2"),
        ({"fsdp": True, "plugin": {"fsdp_version": 2, "cpu_offload": True}}, "fsdp2_offload"),
        ({"fsdp": True, "plugin": {"fsdp_version": 1}, "config": {"version": 2}}, "fsdp1"),
        ({"fsdp": ["full_shard"], "config": {"version": 2}}, "fsdp2"),
        ({"fsdp": ["full_shard", "offload"], "config": {"fsdp_version": 1}}, "fsdp1_offload"),
        ({"fsdp": ["full_shard"], "config": {"version": 1, "offload_params": True}}, "fsdp1_offload"),
    ],
)
def test_arguments_of_older_and_newer_libraries_say_how_fsdp_runs(
    said: dict[str, Any], strategy: str | None
) -> None:
    """Newer ones have ``fsdp_plugin_args``, older ones a list of words."""
    args = SimpleNamespace(fsdp=said["fsdp"], fsdp_config=said.get("config"))
    if "plugin" in said:
        args.fsdp_plugin_args = said["plugin"]
    assert script._fsdp(args) == strategy
    unsaid = SimpleNamespace(fsdp=["full_shard"], fsdp_config=None)
    assert script._fsdp(unsaid) == f"fsdp{script.fsdp_version_of_arguments()}"


@pytest.mark.parametrize(
    ("name", "objective"),
    [("DPOConfig", "dpo"), ("SFTConfig", "sft"), ("KTOConfig", "kto"), ("MyConfig", None)],
)
def test_the_objective_is_that_of_a_class_of_trl_or_below_one(
    tmp_path: Path, name: str, objective: str | None
) -> None:
    kind = type(name, (TrainingArguments,), {})
    for made in (kind, type("Own", (kind,), {})):
        args = made(output_dir=str(tmp_path), use_cpu=True, report_to="none")
        found = script.script_facts(args, LoraConfig(r=8), BASE, None).setting
        assert found is not None
        of_trl = ("TRL", "chunked") if objective else ("Trainer", "full")
        assert (found.objective.value, found.tool, found.loss.value) == (objective, *of_trl)
