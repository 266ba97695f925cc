"""Two files of weights are compared to the last byte, and neither is unpickled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pytest_lora.inspection.checkpoint import pickled
from pytest_lora.inspection.checkpoint.folder import Folder
from pytest_lora.inspection.checkpoint.pickled import holds_other_numbers

SAVED = {"a": torch.arange(40, dtype=torch.uint8), "b": torch.arange(7, dtype=torch.uint8)}


def other(folder: Path, tensors: dict[str, torch.Tensor]) -> bool | None:
    save_file(SAVED, folder / "it.safetensors")
    torch.save(tensors, folder / "it.bin")
    return holds_other_numbers(Folder(folder), "it.safetensors", "it.bin")


@pytest.mark.parametrize("chunk", [16, 20, 2**20])
@pytest.mark.parametrize("place", [0, 15, 16, 39])
def test_each_byte_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, place: int) -> None:
    monkeypatch.setattr(pickled, "CHUNK", chunk)
    assert other(tmp_path, SAVED) is False
    changed = SAVED["a"].clone()
    changed[place] += 100
    assert other(tmp_path, {**SAVED, "a": changed}) is True


def test_what_cannot_be_compared_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert other(tmp_path, {"a": SAVED["a"]}) is None, "a tensor less"
    assert other(tmp_path, {**SAVED, "b": SAVED["b"][:6].clone()}) is None, "another size"
    assert other(tmp_path, {**SAVED, "c": torch.empty(0)}) is False, "nothing more"
    monkeypatch.setattr(pickled, "MAX_BYTES", 47)
    assert other(tmp_path, SAVED) is False
    monkeypatch.setattr(pickled, "MAX_BYTES", 46)
    assert other(tmp_path, SAVED) is None
    (tmp_path / "it.bin").write_bytes(b"?" * 100)
    assert holds_other_numbers(Folder(tmp_path), "it.safetensors", "it.bin") is None
