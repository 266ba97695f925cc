from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.behaviour import ParameterShareFacts
from pytest_lora.rules import Violation, rule


@rule("LORA901", severity="error", needs=ParameterShareFacts)
def parameter_ratio_outside_band(facts: ParameterShareFacts, expect: Expect) -> Iterator[Violation]:
    """The share of trainable parameters lies outside the band that a test asserts.

    ## What it does
    Divides the trainable by all logical parameters, 4-bit weights counted as what they stand for, and
    compares with `low` and `high`.

    ## Why is this bad?
    A share far from the usual one is the first sign of a wrong rank, of targets that match too much or too
    little, and of a base that was not frozen.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_param_ratio(model, low=0.0005, high=0.01)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_param_ratio(model, low=0.01, high=0.1)
    ```

    ## References
    - LoRA trains 0.003 to 0.6 % of a large base: https://arxiv.org/abs/2106.09685
    """
    if facts.inside:
        return
    observed = f"{facts.trainable:,} of {facts.total:,} parameters are trainable: {facts.percent:.4g} %"
    if facts.packed:
        observed += (
            f" (a count of the {facts.stored:,} stored numbers, 4-bit weights packed, "
            f"prints {facts.stored_percent:.4g} %)"
        )
    yield Violation(
        where=facts.model,
        observed=observed,
        expected=f"{100 * facts.low:g} % to {100 * facts.high:g} % (low={facts.low!r}, high={facts.high!r})",
        fix=_fix(facts),
    )


def _fix(facts: ParameterShareFacts) -> str:
    if not facts.trainable:
        return "make the adapter trainable: PeftModel.from_pretrained(..., is_trainable=True)"
    if facts.percent < 100 * facts.low:
        return f"raise r, adapt more modules, or, if so few are meant, low={0.99 * facts.percent / 100:.3g}"
    if facts.trainable > facts.adapter:
        return "freeze the base: more trains than the adapters hold"
    return f"lower r, adapt fewer modules, or, if so many are meant, high={1.01 * facts.percent / 100:.3g}"
