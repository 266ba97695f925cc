"""A folder of five saved adapters, two of them broken, checked by pytest without a line of test code.

The adapters are made here; the check itself is one command, which works on any folder of adapters:

    pytest --lora-adapters=adapters --lora-base=base

Each adapter becomes six tests: files, config, keys, shapes, values, base. ``pytest -s`` shows the whole report. Nothing
in the folder is unpickled, imported or executed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from pytest_lora.bases.tiny import load_tiny

TOPICS = ("chemistry", "cooking", "history", "law", "music")


def save_adapters(folder: Path, base_folder: Path) -> None:
    """Save five adapters of the built-in base; their values are made up instead of trained."""
    torch.manual_seed(0)
    base = load_tiny(quantization=None)
    base.name_or_path = "pytest-lora/tiny"
    base.config.save_pretrained(base_folder)
    for topic in TOPICS:
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        model.save_pretrained(folder / topic, save_embedding_layers=False)  # "auto" asks the hub
        base = model.unload()


def give_it_another_rank(adapter: Path) -> None:
    """What happens when the configuration of another run is copied beside the weights."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 16}))


def save_it_from_a_compiled_model(adapter: Path) -> None:
    """What happens when the state dict of ``torch.compile(model)`` is saved: no key matches, and PEFT only warns."""
    file = adapter / "adapter_model.safetensors"
    save_file({f"_orig_mod.{key}": value for key, value in load_file(file).items()}, file)


def test_two_of_five_adapters_are_broken(tmp_path: Path) -> None:
    adapters, base = tmp_path / "adapters", tmp_path / "base"
    save_adapters(adapters, base)
    give_it_another_rank(adapters / "cooking")
    save_it_from_a_compiled_model(adapters / "law")

    command = [sys.executable, "-m", "pytest", f"--lora-adapters={adapters}", f"--lora-base={base}"]
    done = subprocess.run(
        [*command, f"--rootdir={tmp_path}", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    lines = done.stdout.splitlines()
    assert "2 failed, 28 passed" in lines[-1]
    assert (
        "FAILED adapters/cooking/adapter_config.json::shapes - LORA431: adapter cooking on LlamaForCausalLM: 1 error"
        in lines
    )
    assert (
        "FAILED adapters/law/adapter_config.json::keys - LORA422: adapter law on LlamaForCausalLM: 1 error"
        in lines
    )
    assert any(
        line.startswith("  fix:      take '_orig_mod.' out of the keys: save_file({k.replace(")
        for line in lines
    )
