from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.rules import Violation, rule


@rule("LORA218", severity="warning", needs=ModelFacts)
def reported_percent_is_wrong(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """The trainable percentage that your code reports is not that of this model.

    ## What it does
    Compares `Expect(reported_percent=...)` with trainable / total, to the precision in which it was given.

    ## Why is this bad?
    Weights in 4 bits are packed two to a byte, so that `sum(p.numel())` counts half of them and the
    percentage doubles. Figures from such a count cannot be compared with papers or other runs.

    ## Example
    ```python
    model = get_peft_model(base_4bit, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    percent = 100 * model.num_parameters(only_trainable=True) / sum(p.numel() for p in model.parameters())
    report = check_model(model, expect=Expect(reported_percent=percent))
    ```

    ## Use instead
    ```python
    model = get_peft_model(base_4bit, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    trainable, total = model.get_nb_trainable_parameters()
    report = check_model(model, expect=Expect(reported_percent=100 * trainable / total))
    ```

    ## References
    - https://github.com/artidoro/qlora/issues/260
    - https://github.com/huggingface/peft/issues/1020
    """
    reported = expect.reported_percent
    if reported is None:
        return
    trainable, total = facts.trainable_parameters, facts.total_parameters
    if _states(reported, trainable, total) or _states(reported, trainable, facts.base.parameters):
        return
    packed = _states(reported, trainable, facts.stored_parameters)
    fraction = _states(100 * reported, trainable, total)
    reason = (
        f"it counts packed 4-bit storage ({facts.stored_parameters:,} stored numbers, two weights in a byte)"
        if packed
        else "it is the fraction, not the percentage"
        if fraction
        else "it fits no count of this model's parameters"
    )
    yield Violation(
        where=f"reported_percent of {facts.base.architecture}",
        observed=f"{reported:.6g} % trainable is reported; {reason}",
        expected=f"{100 * trainable / max(total, 1):.6g} %: {trainable:,} trainable of {total:,} parameters",
        fix="count with pytest_lora, percent = count_parameters(model).percent, not with numel",
    )


def _states(percent: float, part: int, whole: int) -> bool:
    """Whether a percentage, rounded or cut to the digits it is given in, says part / whole."""
    true = 100 * part / max(whole, 1)
    exponent = Decimal(repr(percent)).as_tuple().exponent
    last_digit = 10.0**exponent if isinstance(exponent, int) else 0.0
    return abs(percent - true) <= max(last_digit, 1e-6 * true)
