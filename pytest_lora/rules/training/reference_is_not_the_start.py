from __future__ import annotations

import math
from collections.abc import Iterator

from pytest_lora.changes import advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.settings import rewriter
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule

START = math.log(2)
"""The loss of DPO where policy and reference are one: -log(sigmoid(0)). arXiv:2305.18290, equation 7."""

OFF = 0.02
"""Nats that bfloat16 and dropout may add to it at a batch."""

ABOVE = 0.1
"""Nats above ln(2) in a run of a trainer, whose first loss is a mean over steps that may have gained already."""


@rule("LORA372", severity="warning", needs=TrainingFacts)
def reference_is_not_the_start(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """The reference of a preference or policy loss is not the model that training begins with.

    ## What it does
    Looks at the first loss that compares chosen with rejected answers, of an optimizer that has taken no step yet.
    Where the adapter has been trained before and is switched off for the reference, the reference is the base without
    it: a warning if the loss is not ln(2). In a run of TRL's DPOTrainer with the published loss, a first loss more than
    0.1 above ln(2) shows the same. So does, of a trained adapter and whatever the loss, a reference adapter that
    is zero everywhere, and an adapter switched off in a loss that rewards sampled answers (inputs called
    `advantages` or `rewards`). An adapter whose initialisation rewrote the base weights (PiSSA, OLoRA, CorDA, LoftQ,
    LoRA-GA, KaSA) is no reference when it is switched off, be it new or trained.

    ## Why is this bad?
    The loss holds the model to its reference. Against the base it takes credit for what supervised fine-tuning had
    learned, or pulls the model back to before it; accuracy is near 1 or 0 from the first step. Without its
    PiSSA adapter a base is what that left of it, which is no model that anybody trained.

    ## Example
    ```python
    def score(model, ids):
        return model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).sum((1, 2))

    def preference_loss(model, batch):
        gained = score(model, batch["chosen_input_ids"]) - score(model, batch["rejected_input_ids"])
        with torch.no_grad(), model.disable_adapter():
            before = score(model, batch["chosen_input_ids"]) - score(model, batch["rejected_input_ids"])
        return -torch.nn.functional.logsigmoid(0.1 * (gained - before)).mean()

    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    trained = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(10):
        model(input_ids=batch["input_ids"][:2], labels=batch["input_ids"][:2]).loss.backward()
        trained.step()
        trained.zero_grad()
    pairs = {"chosen_input_ids": batch["input_ids"][:2], "rejected_input_ids": batch["input_ids"][2:4]}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-6)
    report = check_training(model, pairs, optimizer=optimizer, loss_fn=preference_loss)
    ```

    ## Use instead
    ```python
    def score(model, ids):
        return model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).sum((1, 2))

    def preference_loss(model, batch):
        gained = score(model, batch["chosen_input_ids"]) - score(model, batch["rejected_input_ids"])
        with torch.no_grad(), model.disable_adapter():
            before = score(model, batch["chosen_input_ids"]) - score(model, batch["rejected_input_ids"])
        return -torch.nn.functional.logsigmoid(0.1 * (gained - before)).mean()

    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    trained = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(10):
        model(input_ids=batch["input_ids"][:2], labels=batch["input_ids"][:2]).loss.backward()
        trained.step()
        trained.zero_grad()
    merged = model.merge_and_unload()
    model = get_peft_model(merged, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    pairs = {"chosen_input_ids": batch["input_ids"][:2], "rejected_input_ids": batch["input_ids"][2:4]}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-6)
    report = check_training(model, pairs, optimizer=optimizer, loss_fn=preference_loss)
    ```

    ## References
    - Direct Preference Optimization: https://arxiv.org/abs/2305.18290
    - https://github.com/huggingface/trl/issues/1340
    - https://github.com/huggingface/peft/issues/2184
    """
    if not facts.optimizer_is_fresh or not facts.steps or not facts.finite:
        return
    rewritten = _rewritten(facts)
    if rewritten and facts.switched_off and (facts.compares_answers or facts.rewards_answers):
        yield _of_what_is_left(rewritten)
        return
    if not facts.is_fresh:
        known = facts.compares_answers or facts.rewards_answers
        empty = tuple(name for name in facts.empty_references if known or "ref" in name.lower())
        if empty or (facts.rewards_answers and facts.switched_off and not facts.compares_answers):
            yield _of_the_base(empty)
            return
    if not facts.compares_answers:
        return
    loss = facts.steps[0].loss
    against_the_base = facts.switched_off and not facts.is_fresh and abs(loss - START) > OFF
    if not against_the_base and not (facts.objective == "DPO" and loss > START + ABOVE):
        return
    how = ": the adapter, trained before, is disabled for the reference" if against_the_base else ""
    yield Violation(
        where="loss",
        observed=f"the first loss is {loss:.4g}, and {START:.4f} where reference and model are the same{how}",
        expected="a reference that is the model as it starts, with what it learned before",
        fix=_FIX,
    )


_FIX = (
    "merge the adapter into the base before preference tuning and add a new one, or load it a second time as a "
    "frozen adapter for the reference"
)


def _rewritten(facts: TrainingFacts) -> str | None:
    """What initialised an active adapter by taking its start out of the base weights."""
    configs = [facts.model.config_of(adapter) for adapter in facts.model.active]
    return next((name for config in configs if config and (name := rewriter(config.settings))), None)


def _of_what_is_left(by: str) -> Violation:
    return Violation(
        where="loss",
        observed=f"the adapter is disabled for the reference, and {by} took its start out of the base weights: the "
        "reference is what it left of them, and not the base",
        expected="a reference that is the model as it starts",
        fix=advise(
            "give the loss a frozen copy of the base as its reference, or begin with a plain adapter: ",
            change(kasa_config=None) if by == "kasa_config" else change(init_lora_weights=True),
        ),
    )


def _of_the_base(empty: tuple[str, ...]) -> Violation:
    """A reference that is the base, where training goes on from an adapter."""
    names = ", ".join(map(repr, empty))
    why = f"adapter {names}, zero everywhere, is" if empty else "the adapter is disabled for"
    return Violation(
        where="loss",
        observed=f"{why} the reference, which so is the base; the adapter that trains has been trained before",
        expected="a reference that is the model as it starts, with what it learned before",
        fix=_FIX,
    )
