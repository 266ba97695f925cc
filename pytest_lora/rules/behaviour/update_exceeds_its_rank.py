from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.behaviour import UpdateRankFacts
from pytest_lora.facts.steps import UpdateFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA904", severity="error", needs=UpdateRankFacts)
def update_exceeds_its_rank(facts: UpdateRankFacts, expect: Expect) -> Iterator[Violation]:
    """What some steps changed is not the low-rank update of the adapter.

    ## What it does
    Takes real optimizer steps, and measures the numerical rank of what each adapted weight changed by: r at
    most where `B @ A` was zero before, 2 r else. The base weight underneath has to stay as it is, and
    something has to move.

    ## Why is this bad?
    A base weight that trains along makes the checkpoint useless, as the adapter alone is saved. A forward
    that writes into the weights does the same.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight").requires_grad_(True)
    report = check_adapter_shapes(model, batches=batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_adapter_shapes(model, batches=batch)
    ```

    ## References
    - https://arxiv.org/abs/2106.09685
    """
    grouping: dict[Violation, list[str]] = {}
    for update in facts.updates:
        if (judged := _judged(update, facts.steps)) is not None:
            grouping.setdefault(judged, []).append(update.module)
    for violation, modules in grouping.items():
        yield violation._replace(where=grouped(modules))
    errors = any(violation.severity != "info" for violation in grouping)
    if not errors and not any(update.norm > 0 for update in facts.updates):
        yield Violation(
            where=facts.model,
            observed=f"no adapter moved in {facts.steps} steps, so nothing is shown of its rank",
            expected="an update of low rank",
            fix=f"{_why_still(facts)}; check_training says more",
        )


def _judged(update: UpdateFacts, steps: int) -> Violation | None:
    """What is wrong with one update; None for a healthy one."""
    why = "r" if update.from_zero else "2 r, as B @ A was not zero before"
    expected = f"rank {update.allowed} at most ({why}), on a base weight that stays as it is"
    moved = "the base weight underneath moved" if update.base_moved else ""
    freeze = (
        "freeze the base weight, as get_peft_model does: "
        "for name, p in model.named_parameters(): '.base_layer.' in name and p.requires_grad_(False)"
    )
    if update.rank is not None and update.rank > update.allowed:
        observed = f"the update of {steps} steps has rank {update.rank}, allowed is {update.allowed}"
        fix = freeze if moved else "look for what else writes into this weight or into the factors"
        return Violation("", f"{observed}; {moved}" if moved else observed, expected, fix)
    if moved:
        return Violation("", moved, expected, freeze)
    if update.unknown:
        observed = f"the rank of the update was not measured: {update.unknown}"
        return Violation("", observed, expected, "nothing, if this is meant", "info")
    return None


def _why_still(facts: UpdateRankFacts) -> str:
    if not facts.steps:
        return "give a batch whose labels and tokens exist in the vocabulary: no step could be taken"
    return "make the adapter trainable and active, and give a batch with labels that count"
