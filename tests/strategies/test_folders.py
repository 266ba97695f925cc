"""Saved adapters that are drawn: whole or damaged, in folders that go away, and printed as code."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from pytest_lora import check_checkpoint
from pytest_lora.bases.examples.folders import CONFIG
from pytest_lora.rules import code_of
from pytest_lora.strategies import AdapterFolder, adapter_folders, build_adapter_folder, lora_configs
from pytest_lora.strategies.folders import DAMAGES
from pytest_lora.strategies.models import tiny_base
from tests.strategies.test_models import FEW as DOZEN

FEW = settings(DOZEN, max_examples=6)

PLAIN = lora_configs(tiny_base(), targets=["q_proj", "v_proj"], variants=[])
SAVING = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])


def codes(folder: AdapterFolder) -> dict[str, str]:
    """What is found with and without the base; the latter aside where it is the same."""
    with_base, without = (
        {f.code: f.severity for f in check_checkpoint(folder.path, base).findings}
        for base in (tiny_base(), None)
    )
    assert folder.code is None or folder.code in without
    assert without.items() <= with_base.items()
    return with_base


@FEW
@given(adapter_folders(damaged=False))
def test_whole_adapters_are_clean(folder: AdapterFolder) -> None:
    assert folder.code is None
    assert "error" not in codes(folder).values()
    assert "warning" not in codes(folder).values()


@FEW
@given(adapter_folders(damaged=True))
def test_drawn_damage_is_named(folder: AdapterFolder) -> None:
    assert folder.code in codes(folder)


@pytest.fixture(scope="module")
def whole() -> AdapterFolder:
    return build_adapter_folder(SAVING)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("at", [0, 4711])
def test_every_damage_is_named(whole: AdapterFolder, tmp_path: Path, damage: str, at: int) -> None:
    path = shutil.copytree(whole.path, tmp_path / "adapter")
    DAMAGES[damage].do(path, at)
    code = code_of(damage)
    assert code in codes(AdapterFolder(path, code))


def test_a_folder_goes_with_its_object() -> None:
    folder = build_adapter_folder(SAVING)
    path = folder.path
    assert (path / CONFIG).is_file()
    del folder
    gc.collect()
    assert not path.exists()


def test_damage_shrinks_to_the_smallest_adapter_and_the_simplest_damage() -> None:
    chosen = settings(FEW, max_examples=60, phases=[Phase.generate, Phase.shrink])
    cases = st.tuples(PLAIN, adapter_folders(configs=PLAIN))
    found = find(cases, lambda case: case[1].code is not None, settings=chosen)[1]
    assert found.code == code_of(next(iter(DAMAGES)))
    written = json.loads((found.path / CONFIG).read_text())
    assert (written["r"], written["target_modules"]) == (1, ["q_proj"])


def test_a_failing_folder_is_printed_as_code() -> None:
    @settings(FEW, max_examples=5, print_blob=False)
    @given(folder=adapter_folders(configs=st.builds(LoraConfig, r=st.just(3)), damaged=True))
    def fails(folder: AdapterFolder) -> None:
        raise AssertionError(folder.code)

    with pytest.raises(AssertionError) as caught:
        fails()
    printed = "\n".join(caught.value.__notes__)
    call = printed[printed.index("fails(") :]
    used = {"fails": dict, "build_adapter_folder": build_adapter_folder, "LoraConfig": LoraConfig}
    assert eval(call, used)["folder"].code == str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base": "llama"}, "base must be"),
        ({"configs": 1}, "configs must be"),
        ({"damaged": 1}, "damaged must"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        adapter_folders(**arguments)


def test_damage_that_cannot_be_is_refused() -> None:
    damage = "saved_module_is_not_in_the_file"
    with pytest.raises(
        ValueError, match=f"damage: '{damage}' is none that this adapter can have: weights_are_"
    ):
        build_adapter_folder(LoraConfig(target_modules=["q_proj"]), damage=damage)
