from __future__ import annotations

import math
from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.curve_shape import LossDrop
from pytest_lora.rules import Violation, rule


@rule("LORA316", severity="error", needs=LossDrop)
def loss_does_not_fall(facts: LossDrop, expect: Expect) -> Iterator[Violation]:
    """Training does not lower the loss, or not through the adapter.

    ## What it does
    Compares the mean loss of the same batches before and after some steps, without dropout, with the drop
    that was asked for, and looks whether the adapter moved by a gradient. A loss below 0.1 before and
    after has nothing left to fall.

    ## Why is this bad?
    On a batch that it sees again and again a healthy adapter lowers the loss within a few steps. One that
    does not will not learn from more data either; and where a new head alone learns, the adapter is dead
    weight.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_loss_decreases(model, batch, steps=1, by=0.05)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_loss_decreases(model, batch, steps=20)
    ```

    ## References
    - Overfit a single batch first: https://karpathy.github.io/2019/04/25/recipe/
    """
    if facts.healthy:
        return
    rate = f" at lr={facts.lr:.2g}" if facts.lr is not None else " with the optimizer given"
    measured = f"the loss of the same batches went from {facts.before:.4g} to {facts.after:.4g}"
    if math.isfinite(facts.drop):
        measured += f", a drop of {100 * facts.drop:.3g} %"
    alone = facts.drop >= facts.by and not facts.adapter_learned
    yield Violation(
        where=f"{len(facts.curve)} steps{rate}",
        observed=measured
        + (", but no low-rank factor moved by a gradient: something else lowered it" if alone else "")
        + (f"; step by step {_drawn(facts.curve)}" if facts.curve else "; no step could be taken"),
        expected=f"a drop of {100 * facts.by:.3g} % at least, by the adapter",
        fix="mend what the other findings name"
        if not facts.adapter_learned
        else f"take more steps, steps={max(20, 4 * len(facts.curve))}, and another learning rate; if neither helps, "
        "look at labels and scaling",
    )


def _drawn(curve: tuple[float, ...], points: int = 8) -> str:
    """Some points of the curve, the first and the last among them."""
    last = len(curve) - 1
    at = sorted({round(i * last / (points - 1)) for i in range(points)})
    return " ".join(f"{curve[i]:.4g}" for i in at)
