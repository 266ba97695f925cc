from __future__ import annotations

import math
from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.steps import TensorFacts
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import CAST_TRAINED, optimizer_anew


@rule("LORA315", severity="error", needs=TrainingFacts)
def adapter_does_not_move(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """Gradients arrive, the optimizer steps, and the adapter stays what it was.

    ## What it does
    Looks for adapter tensors that the optimizer holds, that got a gradient at a learning rate above zero,
    and that no step changed. Where 90 % of the numbers of every `lora_B` in bfloat16 or float16 stayed what
    they were under Adam, that is a warning.

    ## Why is this bad?
    Then the update is smaller than the weights can hold (bfloat16 keeps three digits), or the optimizer's
    step does not reach these tensors, as with a wrapper that skips it.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    class Skipping(torch.optim.SGD):
        def step(self, closure=None):
            return None

    optimizer = Skipping(model.parameters(), lr=0.1)
    report = check_training(model, batch, optimizer=optimizer)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_training(model, batch, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    ```

    ## References
    - https://arxiv.org/abs/2010.06192
    """
    held = [t for t in facts.adapter_tensors if t.held and t.reached]
    if not held or facts.some_rate_is_zero or facts.scaler or facts.max_grad_norm == 0 or not facts.finite:
        return
    if facts.failure or _run_down(facts):
        return
    moved = any(t.moved for t in held)
    still = [t for t in held if not t.moved]
    if not moved:
        yield Violation(
            where=grouped(t.name for t in still),
            observed=f"{len(facts.steps)} steps at a learning rate of "
            f"{max(facts.steps[-1].rates):g} changed nothing",
            expected="tensors that move with every step",
            fix="raise the learning rate, keep trainable weights in float32, and look at what the step of this "
            f"optimizer does, or take {optimizer_anew(2e-4)}",
        )
        return
    if facts.optimizer.adaptive and (lost := _lost_in_rounding(facts, held)):
        part = f"lora_{lost[0].part.upper()}"
        yield Violation(
            where=grouped(t.name for t in lost),
            observed=f"a step at a learning rate of {max(facts.steps[-1].rates):g} left "
            f"{100 * min(t.stayed for t in lost):.0f} % of the numbers of {part} what they were: it is lost in the "
            f"rounding of {lost[0].dtype}",
            expected="trainable weights in float32, which hold such a step",
            fix=f"keep autocast_adapter_dtype, or cast what trains: {CAST_TRAINED}",
            severity="warning",
        )


LOST = 0.9
"""Share of numbers that did not move. bfloat16 keeps a step of 1/256 of a number, Adam's first steps move all."""

MOST_LOST = 0.5
"""The same share of ``lora_A``, which is no number near zero: the rest moves by more than the step to make up
for it only where its numbers happen to be small."""

HELD_UP_TO = 384.0
"""Times a step that a number in bfloat16 may be and still take it: what is below half the distance to the next
number is rounded away, and that distance is 2**-8 to 2**-7 of a number with 8 bits."""


def _lost_in_rounding(facts: TrainingFacts, held: list[TensorFacts]) -> list[TensorFacts]:
    """Tensors of short dtypes that lose most of a usual step: all of ``lora_B``, or else all of ``lora_A``."""
    short = [t for t in held if t.dtype in ("bfloat16", "float16")]
    b, a = ([t for t in short if t.part == part] for part in ("b", "a"))
    finished = facts.schedule is not None and (facts.history_fell or not facts.history)
    if b and not finished and min(t.stayed for t in b) >= LOST:
        return b
    rate = facts.peak_rate
    lost = [t for t in a if t.gradients[-1] and t.stayed >= MOST_LOST and _share_lost(t, rate) >= MOST_LOST]
    return lost if a and len(lost) == len(a) else []


def _share_lost(tensor: TensorFacts, rate: float) -> float:
    """Share of numbers in bfloat16, spread evenly around zero as ``lora_A`` begins, that a step of ``rate`` is too
    small for."""
    largest = math.sqrt(3) * tensor.scale
    return max(0.0, 1 - HELD_UP_TO * rate / largest) if largest and tensor.dtype == "bfloat16" else 0.0


def _run_down(facts: TrainingFacts) -> bool:
    """Whether a schedule has all but come to its end; LORA305 judges whether that was too early."""
    return facts.schedule is not None and facts.optimizer.adaptive and max(facts.steps[-1].rates) < RUN_DOWN


RUN_DOWN = 1e-7
"""A step of Adam this large is lost in the rounding of most float32 weights."""
