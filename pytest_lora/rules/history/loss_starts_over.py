from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.curve import apart_from_the_start
from pytest_lora.facts.history import HistoryFacts
from pytest_lora.rules import Violation, rule

_ALIKE = 0.15
"""Share by which a stretch may differ from that at the start. Of two real runs whose adapter was made anew on the way
all stretches lie within 0.12; of three whose data changed some lie 0.41 to 1.02 apart."""

_FEWEST = 3
"""Stretches of 3, 3 and 6 losses: twelve before the jump, and twelve from it on."""

_SWINGS = 1
"""The jump itself may be one; a loss that swings oftener oscillates (LORA345)."""

_FELL = 0.8
"""The loss has to fall in what is compared: two flat stretches are alike whatever happened."""


@rule("LORA350", severity="warning", needs=HistoryFacts)
def loss_starts_over(facts: HistoryFacts, expect: Expect) -> Iterator[Violation]:
    """The loss jumps back to where it began, and falls from there as it did the first time.

    ## What it does
    Looks for a step at which the loss jumps up, and compares what follows with the start of the curve, stretch by
    stretch: medians of 3, 3, 6, 12, ... losses. It is told where all of them differ by 15 % at most, over twelve losses
    or more in which the loss falls by a fifth. New data raise the loss too, to a level and along a way of their own.
    A loss that swings again and again, and a bump where the schedule starts anew, are left alone.

    ## Why is this bad?
    What had been learned is gone: the run trains a new adapter. So it is when a resumed script calls `get_peft_model`
    and never loads the checkpoint, or loads it under a name that is not active.

    ## Example
    ```python
    losses = [1.0 + 2.0 * 0.8 ** (i % 40) + (37 * i * i % 101) / 2000 for i in range(80)]
    report = diagnose_history(losses)
    ```

    ## Use instead
    ```python
    losses = [1.0 + 2.0 * 0.8**i + (37 * i * i % 101) / 2000 for i in range(80)]
    report = diagnose_history(losses)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/troubleshooting
    """
    if facts.curve is None or facts.curve.jump is None or facts.repetition or facts.curve.swings > _SWINGS:
        return
    jump, start = facts.curve.jump, facts.curve.start.value
    lead = max(1, len(facts.usable) // 10)
    if any(jump.at - lead <= restart <= jump.at for restart in facts.restarts):
        return
    apart = apart_from_the_start(facts.usable, jump.at)
    if len(apart) < _FEWEST or max(map(abs, apart)) > _ALIKE or jump.before > _FELL * start:
        return
    yield Violation(
        where="train_losses",
        observed=f"at step {facts.step(jump.at)} the loss jumps from {jump.before:.4g} back to {jump.after:.4g}, near "
        f"the {start:.4g} of the start, and falls as it did then",
        expected="a loss that goes on from where it was",
        fix="load the adapter that was trained: PeftModel.from_pretrained(base, checkpoint, is_trainable=True) in "
        "place of get_peft_model, or trainer.train(resume_from_checkpoint=True)",
    )
