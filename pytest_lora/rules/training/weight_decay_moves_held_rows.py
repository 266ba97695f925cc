from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.optimizer import GroupFacts
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule

FELT = 5e-6
"""Share of a row that goes at each step. At this rate the rows of textual inversion lost 6 % within 3,000 steps
(https://github.com/huggingface/diffusers/issues/1009)."""

MOST_HELD = 0.5
"""Share of the tokens of a batch whose rows get no gradient. The last token of a text, which predicts nothing, has none
either."""


@rule("LORA391", severity="warning", needs=TrainingFacts)
def weight_decay_moves_held_rows(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """A hook holds rows of an embedding or head by a gradient of zero, and the weight decay moves them all the same.

    ## What it does
    Looks for a trained table of tokens on which a hook sets the gradient of most tokens of the batch to zero, in a
    group of the optimizer whose weight decay takes at least 0.0005 % off a weight at each step. Less is an info.

    ## Why is this bad?
    The hook is there so that only new tokens are learned. AdamW shrinks every weight of a tensor that it steps,
    whatever its gradient, and Adam with `weight_decay` moves it by whole steps: what the old tokens mean fades.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model = get_peft_model(base, config)
    table = model.get_input_embeddings().weight
    new = torch.zeros(len(table), 1)
    new[batch["input_ids"][0, 0]] = 1
    table.register_hook(lambda gradient: gradient * new)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    report = check_training(model, batch, optimizer=optimizer)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model = get_peft_model(base, config)
    table = model.get_input_embeddings().weight
    new = torch.zeros(len(table), 1)
    new[batch["input_ids"][0, 0]] = 1
    table.register_hook(lambda gradient: gradient * new)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    report = check_training(model, batch, optimizer=optimizer)
    ```

    ## References
    - https://github.com/huggingface/diffusers/issues/1009
    - https://huggingface.co/docs/peft/package_reference/trainable_tokens
    """
    for tensor in facts.tensors:
        decaying = [g for g in facts.optimizer.groups if g.index == tensor.group and g.weight_decay > 0]
        if not decaying or not tensor.held or tensor.held_rows <= MOST_HELD * tensor.token_rows:
            continue
        group = max(decaying, key=_share)
        coupled = facts.optimizer.adam and "AdamW" not in facts.optimizer.optimizer
        moved = "by a step of its own" if coupled else f"by {_share(group):.2g} of itself"
        yield Violation(
            where=tensor.name,
            observed=f"a hook zeroes the gradient of {tensor.held_rows} of {tensor.token_rows} tokens of the batch, "
            f"and weight_decay={group.weight_decay:g} moves each of their rows {moved} at every step",
            expected="rows that are held to stay as they are",
            fix="put this tensor into a group of the optimizer with weight_decay=0.0, or train the new rows alone with "
            "trainable_token_indices",
            severity=None if coupled or _share(group) >= FELT else "info",
        )


def _share(group: GroupFacts) -> float:
    return max(group.lr, group.initial_lr or group.lr) * group.weight_decay
