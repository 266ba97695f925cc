"""What keeps a gradient from an adapter: the cause is named, and its remedy mends it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pytest_lora import Report, check_model, check_training
from pytest_lora.bases.examples.models import BASES, WIDTH, image_text_batch, language_batch
from pytest_lora.facts.model_parts import at_the_end_of_a_stream
from tests.rules.training.setups import TwoTowers, adam, adapted

pytestmark = pytest.mark.filterwarnings("ignore")

Batch = dict[str, torch.Tensor]


def checkpointed(base: str, *, reentrant: bool, hook: bool) -> Any:
    """An adapted model with gradient checkpointing, and perhaps a hook on its text embeddings and on no others."""
    net = BASES[base]()
    model = get_peft_model(net, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])).train()
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for module in net.modules():
        module._forward_hooks.clear()
    if hook:
        net.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_(True))
    return model


def said(report: Report) -> list[tuple[str, str]]:
    return [(f.code, f.severity) for f in report.findings]


def test_checkpointing_that_cuts_one_tower_off_is_named() -> None:
    report = check_training(checkpointed("image_text_base", reentrant=True, hook=True), image_text_batch())
    (finding,) = report.findings
    assert (finding.code, finding.severity) == ("LORA314", "warning")
    assert "vision_tower" in finding.where
    assert "language_model" not in finding.where
    assert "reentrant gradient checkpointing" in finding.observed
    assert "use_reentrant" in finding.fix


def test_either_remedy_brings_the_gradient_to_the_tower() -> None:
    batch = image_text_batch()
    assert not check_training(checkpointed("image_text_base", reentrant=False, hook=True), batch).findings
    model = checkpointed("image_text_base", reentrant=True, hook=True)
    tower = next(
        n
        for n, _ in model.named_modules()
        if n.endswith(("vision_tower.embeddings", "vision_model.embeddings"))
    )
    embeddings = model.get_submodule(tower)
    embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_(True))
    assert not check_training(model, batch).findings


def embedded(model: nn.Module, batch: Batch) -> Batch:
    """The batch with the embeddings of its tokens in their place."""
    found: Any = model
    with torch.no_grad():
        embeds = found.get_input_embeddings()(batch["input_ids"]).clone()
    return {"inputs_embeds": embeds.requires_grad_(False), "labels": batch["labels"]}


def test_embeddings_from_outside_pass_the_hook_by() -> None:
    model = checkpointed("base", reentrant=True, hook=True)
    batch = embedded(model, language_batch())
    (finding,) = check_training(model, batch).findings
    assert finding.code == "LORA313"
    assert "inputs_embeds come from outside" in finding.observed
    assert "inputs_embeds.requires_grad_(True)" in finding.fix
    batch["inputs_embeds"].requires_grad_(True)
    assert not check_training(model, batch).findings


def test_adapted_embeddings_that_are_passed_by_are_named() -> None:
    model = adapted(target_modules=["embed_tokens", "q_proj"])
    batch = embedded(model, language_batch())
    (finding,) = check_training(model, batch).findings
    assert (finding.code, finding.where) == ("LORA314", "model.embed_tokens")
    assert "inputs_embeds come from outside, past the embeddings" in finding.observed


class WithoutGraph(nn.Module):
    """A tower that runs under ``torch.no_grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            seen: torch.Tensor = self.q_proj(pixels)
        return seen


def with_pixels() -> Batch:
    return {**language_batch(), "pixels": torch.randn(4, 16, WIDTH)}


def test_a_tower_under_no_grad_is_named() -> None:
    towers = TwoTowers()
    towers.vision_tower["q_proj"] = WithoutGraph()
    model = adapted(towers, target_modules=["q_proj.q_proj", "language_model.q_proj"])
    (finding,) = check_training(model, with_pixels()).findings
    assert finding.code == "LORA314"
    assert "it runs under torch.no_grad()" in finding.observed


def test_a_tower_whose_input_is_in_no_batch_is_a_warning() -> None:
    report = check_training(adapted(TwoTowers(), target_modules=["q_proj"]), language_batch())
    assert said(report) == [("LORA314", "warning")]
    assert "give a batch that needs them" in report.findings[0].fix


def test_a_tower_whose_input_is_in_another_batch_is_an_info() -> None:
    batches = [language_batch(), language_batch(), language_batch(), with_pixels()]
    report = check_training(adapted(TwoTowers(), target_modules=["q_proj"]), batches)
    assert said(report) == [("LORA314", "info")]


def test_a_tower_whose_input_is_there_is_left_alone() -> None:
    report = check_training(
        adapted(TwoTowers(), target_modules=["q_proj"]), [language_batch(), with_pixels()]
    )
    assert not report.findings, str(report)


class LastBlockEndsAStream(nn.Module):
    """Two streams read each other; the text ends in the last block, whose query for it has no use."""

    def __init__(self) -> None:
        super().__init__()
        names = ("image_q", "text_q")
        self.blocks = nn.ModuleList(nn.ModuleDict({n: nn.Linear(16, 16) for n in names}) for _ in range(3))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        image = text = x
        for block in self.blocks:
            made: Any = block
            image, text = made["image_q"](image + text), made["text_q"](image + text)
        return {"loss": image.pow(2).mean()}


def test_what_the_last_block_makes_for_no_one_is_an_info() -> None:
    model = adapted(LastBlockEndsAStream(), target_modules=["image_q", "text_q"], r=1, lora_alpha=2)
    optimizer = adam(model)
    batch = {"x": torch.randn(4, 16)}
    (finding,) = check_training(model, batch, optimizer=optimizer).findings
    assert (finding.code, finding.severity, finding.where) == ("LORA314", "info", "blocks.2.text_q")
    for _ in range(2):
        model(**batch)["loss"].backward()
        optimizer.step()
    assert ("LORA226", "info") in said(check_model(model))


@pytest.mark.parametrize(
    ("idle", "working", "ends"),
    [
        ({"blocks.2.text_q"}, {"blocks.2.image_q", "blocks.0.text_q"}, True),
        ({"blocks.1.text_q"}, {"blocks.2.image_q", "blocks.0.text_q"}, False),
        ({"blocks.2.text_q"}, {"blocks.1.image_q", "blocks.0.text_q"}, False),
        ({"blocks.2.text_q"}, {"blocks.2.image_q"}, False),
        ({"text_q"}, {"image_q"}, False),
    ],
)
def test_where_a_stream_ends(idle: set[str], working: set[str], ends: bool) -> None:
    assert at_the_end_of_a_stream(idle, working) == (idle if ends else set())
