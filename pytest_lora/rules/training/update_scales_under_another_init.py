from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from pytest_lora.expect import Expect
from pytest_lora.facts.model import unusual_inits
from pytest_lora.facts.steps import UpdateFacts
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.findings import grouped, starred
from pytest_lora.rules import Violation, rule


@rule("LORA338", severity="info", needs=TrainingFacts)
def update_scales_under_another_init(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """How far steps and gradients reach under an initialisation of its own.

    ## What it does
    For adapters with an `init_lora_weights` other than the default and `"gaussian"`, gives what the steps
    really did, by group of modules: the norm of the change of `scaling * B @ A` over the norm of the base
    weight, and the norm of the gradient of both factors at the last step; median, smallest, largest.

    ## Why is this bad?
    It is not: this is worth knowing. PiSSA, OLoRA, LoftQ and the like start from factors taken from the
    weights, and random or orthogonal ones from two factors other than zero, so that `alpha / r` alone does
    not say how large a step is. A learning rate that suits the default may be far too high or too low.

    ## Example
    ```python
    model = get_peft_model(
        base,
        LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa"),
    )
    report = check_training(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    report = check_training(model, batch)
    ```

    ## References
    - https://arxiv.org/abs/2404.02948
    - https://huggingface.co/docs/peft/package_reference/lora#peft.LoraConfig.init_lora_weights
    """
    inits = unusual_inits(facts.model)
    groups: dict[str, list[UpdateFacts]] = {}
    for update in facts.updates:
        if update.adapter in inits and not update.unknown and update.relative is not None:
            groups.setdefault(starred(update.module), []).append(update)
    if not groups:
        return
    told = "; ".join(
        f"{name}: update {_spread(u.relative or 0.0 for u in members)} of the base weight, "
        f"gradient {_spread(_gradient(facts, u) for u in members)}"
        for name, members in groups.items()
    )
    yield Violation(
        where=grouped(u.module for members in groups.values() for u in members),
        observed=f"init_lora_weights={', '.join(dict.fromkeys(inits.values()))}, "
        f"{len(facts.steps)} steps: {told} (median, smallest to largest)",
        expected="to be known: here alpha / r alone does not say how far a step reaches",
        fix="nothing; where one group moves far more than the others, or all far more than under the default, "
        "lower the learning rate",
    )


def _gradient(facts: TrainingFacts, update: UpdateFacts) -> float:
    """Norm of the gradient of both factors at the last step."""
    own = (t for t in facts.tensors if (t.module, t.adapter) == (update.module, update.adapter))
    last = (t.gradients[-1] for t in own if t.part in ("a", "b") and t.gradients)
    return math.hypot(*filter(None, last))


def _spread(values: Iterator[float]) -> str:
    found = sorted(values)
    if len(found) == 1:
        return f"{found[0]:.2g}"
    return f"{median(found):.2g} ({found[0]:.2g} to {found[-1]:.2g})"
