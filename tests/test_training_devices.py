"""On which device a check trains: where the model is, or all of it where the user says."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BatchEncoding

from pytest_lora import assert_loss_decreases
from pytest_lora.bases.examples.models import BASES, language_batch
from pytest_lora.bases.tiny import load_tiny
from pytest_lora.inspection.placement import moved, place
from tests.simulated_cuda import MACHINES, play

pytestmark = pytest.mark.filterwarnings("ignore")


def adapted(base: Any) -> Any:
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])).train()


def loss(model: Any, batch: Any) -> torch.Tensor:
    result: torch.Tensor = model(**batch).loss
    return result


@pytest.mark.parametrize("name", ["H200", "two L4", "MIG", "ROCm"])
@pytest.mark.parametrize("loss_fn", [None, loss])
def test_a_model_on_the_cpu_stays_there_beside_a_gpu(
    monkeypatch: pytest.MonkeyPatch, name: str, loss_fn: Any
) -> None:
    model = adapted(BASES["base"]())
    played = play(monkeypatch, MACHINES[name])
    assert_loss_decreases(model, language_batch(), steps=3, by=0, loss_fn=loss_fn)
    assert played.moves == []
    assert not played.started


def test_a_device_that_is_given_gets_the_model_and_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(BASES["base"]())
    played = play(monkeypatch, MACHINES["H200"])
    batches = [language_batch(), language_batch()]
    seen: list[torch.Tensor] = []

    def noted(model: Any, batch: Any) -> torch.Tensor:
        seen.extend(batch.values())
        return loss(model, batch)

    assert_loss_decreases(model, batches, steps=2, by=0, loss_fn=noted, device="cuda:0")
    assert any(one is model for one in played.moves)
    given = {id(tensor) for batch in batches for tensor in batch.values()}
    assert given <= {id(one) for one in played.moves}
    assert not given & {id(tensor) for tensor in seen}


class Pair(NamedTuple):
    first: torch.Tensor
    second: list[torch.Tensor]


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(2),
        (torch.ones(2), 3, None),
        [torch.ones(2)],
        {"a": {"b": torch.ones(2)}, "c": "text"},
        Pair(torch.ones(2), [torch.ones(3)]),
        BatchEncoding({"input_ids": torch.ones(2)}),
    ],
)
def test_a_batch_of_any_form_is_moved_and_left_alone(batch: Any) -> None:
    before = repr(batch)
    found = moved(batch, torch.device("meta"))
    assert type(found) is type(batch)
    assert "cpu" not in repr(found)
    assert repr(found).count("device='meta'") == before.count("tensor(")
    assert repr(batch) == before


def test_a_base_in_8_bits_is_never_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        model = adapted(load_tiny(quantization="int8"))
    except ValueError as refused:  # an older bitsandbytes on the CPU
        pytest.skip(str(refused))
    played = play(monkeypatch, MACHINES["H200"])
    with pytest.raises(ValueError, match=r"quantized to 8 bits on cpu.*load it on cuda, or leave device out"):
        assert_loss_decreases(model, language_batch(), device="cuda")
    assert played.moves == []


def test_a_device_of_the_kind_where_the_model_is_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(BASES["base"]())
    assert_loss_decreases(model, language_batch(), steps=2, by=0, device="cpu")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    play(monkeypatch, MACHINES["L4"])
    with pytest.raises(ValueError, match="device='cuda', but the optimizer trains a model on cpu"):
        assert_loss_decreases(model, language_batch(), optimizer=optimizer, device="cuda")


def test_a_card_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"^device='cuda:1', but torch sees 1 CUDA devices$"):
        place(torch.nn.Linear(1, 1), "cuda:1", None)
