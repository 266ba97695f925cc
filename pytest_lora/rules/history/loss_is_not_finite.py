from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.history import HistoryFacts
from pytest_lora.rules import Violation, rule


@rule("LORA340", severity="error", needs=HistoryFacts)
def loss_is_not_finite(facts: HistoryFacts, expect: Expect) -> Iterator[Violation]:
    """A loss is NaN or infinite.

    ## What it does
    Looks for NaN and infinity among the training losses and the evaluation losses.

    ## Why is this bad?
    The first backward pass from such a loss writes NaN into every adapter weight, and no later step takes it
    out again. Usual causes: float16 weights under plain Adam, whose eps of 1e-8 is zero in float16; a
    learning rate that is far too high; a batch in which every label is ignored.

    ## Example
    ```python
    report = diagnose_history([2.31, 2.18, float("nan"), float("nan")])
    ```

    ## Use instead
    ```python
    report = diagnose_history([2.31, 2.18, 2.05, 1.97])
    ```

    ## References
    - https://github.com/huggingface/transformers/issues/25021
    """
    if facts.nonfinite:
        first = facts.nonfinite[0]
        before = f"; the last one before was {facts.train[first - 1]:.4g}" if first else ""
        yield Violation(
            where="train_losses",
            observed=f"the loss is {facts.train[first]} at step {facts.step(first)}, "
            f"{len(facts.nonfinite)} of {len(facts.train)} losses are not finite{before}",
            expected="finite losses",
            fix="load the adapter anew, for its weights are NaN by now; train it in float32 or bfloat16, lower "
            "the learning rate, clip gradients at 1.0, and look for a batch whose labels are all ignored",
        )
    if facts.nonfinite_evals:
        yield Violation(
            where="eval_losses",
            observed=f"the evaluation loss is not finite at step {facts.nonfinite_evals[0]}",
            expected="finite losses",
            fix="see whether the adapter's weights are finite; if they are, an evaluation batch has no label "
            "that counts, or its attention mask hides every token of a row",
        )
