from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import assigned
from pytest_lora.expect import Expect
from pytest_lora.facts.behaviour import TargetFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule

_FEW = 8
"""Names that a line of a test still holds."""


@rule("LORA905", severity="error", needs=TargetFacts)
def adapted_modules_are_not_those_named(facts: TargetFacts, expect: Expect) -> Iterator[Violation]:
    """Other modules are adapted than those that a test names.

    ## What it does
    Compares the modules with an adapter with `targets`: module names, a regular expression, or "all-linear".

    ## Why is this bad?
    A target that matched nothing is lost without a word, and one that matched too much costs memory and
    changes what is learned.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_adapter_shapes(model, targets=["q_proj", "k_proj", "v_proj"])
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_adapter_shapes(model, targets=["q_proj", "v_proj"])
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/lora#peft.LoraConfig.target_modules
    """
    for word, similar in facts.unknown:
        near = (
            f"perhaps {' or '.join(map(repr, similar))} was meant" if similar else f"correct {facts.targets}"
        )
        yield Violation(facts.targets, f"{word!r} names no module of the base", "a module", near)
    # PEFT reads names and regular expressions as the test does.
    of_peft = f"target_modules={facts.targets.removeprefix('targets=')}"
    of_the_test = assigned(targets=facts.adapted) if len(facts.adapted) <= _FEW else "by a regular expression"
    if facts.missing:
        yield Violation(
            where=grouped(facts.missing),
            observed="missing: no adapter here",
            expected=f"one ({facts.targets})",
            fix=f"add them to the adapter, {of_peft}, or take them out of the test, {of_the_test}",
        )
    if facts.unexpected:
        yield Violation(
            where=grouped(facts.unexpected),
            observed="unexpected: there is an adapter here",
            expected=f"none ({facts.targets})",
            fix=f"take them out of the adapter, {of_peft}, or add them to the test, {of_the_test}",
        )
