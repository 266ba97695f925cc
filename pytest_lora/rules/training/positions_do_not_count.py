from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA335", severity="warning", needs=TrainingFacts)
def positions_do_not_count(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """Every token of a row is at the same position.

    ## What it does
    Looks for `position_ids` that are one number throughout a row. Positions that begin anew within a row, as
    in packed text, that begin elsewhere, or that stand still over padding, are no finding.

    ## Why is this bad?
    The model then reads its text as a bag of words: rotary and learned positions say nothing about order.
    The loss still falls a little. It comes from a collator that pads `position_ids` with zeros, or makes
    them from a mask of another shape.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    batch["position_ids"] = torch.zeros_like(batch["input_ids"])
    report = check_training(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    batch["position_ids"] = batch["attention_mask"].cumsum(1) - 1
    report = check_training(model, batch)
    ```

    ## References
    - https://huggingface.co/docs/transformers/glossary#position-ids
    """
    rows, still = (sum(getattr(known, n) for known in facts.labels) for n in ("rows", "still_positions"))
    if still and 2 * still > rows:
        yield Violation(
            where="position_ids",
            observed=f"position_ids are one and the same number throughout {still} of {rows} rows",
            expected="positions that count the tokens",
            fix="leave them out, batch.pop('position_ids'), or count the tokens: "
            "batch['position_ids'] = (batch['attention_mask'].cumsum(1) - 1)",
        )
