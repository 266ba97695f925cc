"""A run whose loss stays flat: what three checks say of it, and the mended run beside it.

The mistake is a classic: LoRA+ trains ``lora_B`` faster than ``lora_A``, so the parameters are put into groups by hand,
and the group of ``lora_B`` is left out. ``lora_B`` starts at zero and stays there: nothing is ever added to the base.
No error is raised, and the loss looks like that of a slow start. ``pytest -s`` shows both runs.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from pytest_lora import LoraHealthError, assert_loss_decreases, check_training, diagnose_history

STEPS = 40


def parameters(model: PeftModel, factor: str) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if p.requires_grad and factor in name]


def flat(model: PeftModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": parameters(model, "lora_A"), "lr": 2e-3}])


def mended(model: PeftModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [
            {"params": parameters(model, "lora_A"), "lr": 2e-3},
            {"params": parameters(model, "lora_B"), "lr": 4e-3},
        ]
    )


def train(model: PeftModel, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> list[float]:
    """A training loop like any other; it works on one row of the batch after the other."""
    losses = []
    for step in range(STEPS):
        row = step % len(batch["input_ids"])
        loss = model(**{name: rows[row : row + 1] for name, rows in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def side_by_side(left: Iterable[float], right: Iterable[float], between: Iterable[str]) -> str:
    """Two curves, five steps a line, with text between them."""
    means = [[sum(c[i : i + 5]) / 5 for i in range(0, STEPS, 5)] for c in (list(left), list(right))]
    said = [*between, *[""] * STEPS]
    width = max(map(len, said))
    lines = [f"step    flat  {'diagnosis':{width}}  mended"]
    for i, (a, b) in enumerate(zip(*means, strict=True)):
        lines.append(f"{5 * i + 1:>4}  {a:6.3f}  {said[i]:{width}}  {b:6.3f}")
    return "\n".join(lines)


def test_training_for_three_steps_names_the_mistake(
    lora_model: PeftModel, lora_batch: dict[str, Tensor]
) -> None:
    (error,) = check_training(lora_model, lora_batch, optimizer=flat(lora_model)).errors
    assert error.code == "LORA301"
    assert error.observed == "the optimizer misses lora_B, which are trainable"
    assert "torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]" in error.fix


def test_the_loss_of_the_same_batch_does_not_fall(
    lora_model: PeftModel, lora_batch: dict[str, Tensor]
) -> None:
    with pytest.raises(LoraHealthError) as failure:
        assert_loss_decreases(lora_model, lora_batch, optimizer=flat(lora_model))
    assert [error.code for error in failure.value.report.errors] == ["LORA301", "LORA316"]
    assert "a drop of 0 %" in str(failure.value)
    assert_loss_decreases(lora_model, lora_batch, optimizer=mended(lora_model), by=0.1)


def test_flat_and_mended_side_by_side(lora_model: PeftModel, lora_batch: dict[str, Tensor]) -> None:
    flat_losses = train(lora_model, lora_batch, flat(lora_model))
    history = diagnose_history(flat_losses, total_steps=STEPS)
    training = check_training(lora_model, lora_batch, optimizer=flat(lora_model))

    # Nothing was learned: lora_B is still zero, and the second run starts where the first did.
    mended_losses = train(lora_model, lora_batch, mended(lora_model))

    diagnosis = [f"{f.code} {f.title}" for f in (*history.findings, *training.errors)]
    print("", side_by_side(flat_losses, mended_losses, diagnosis), "", history, "", training, sep="\n")
    assert sum(mended_losses[-5:]) < 0.9 * sum(mended_losses[:5])
    assert not diagnose_history(mended_losses, total_steps=STEPS).errors
