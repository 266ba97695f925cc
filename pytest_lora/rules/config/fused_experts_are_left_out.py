from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import assigned


@rule("LORA129", severity="info", needs=ConfigFacts)
def fused_experts_are_left_out(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """'all-linear' leaves out experts that are stored as fused parameters.

    ## What it does
    Looks for `target_modules="all-linear"` on a mixture of experts whose expert weights are one stacked
    parameter each, and hold most of the base, while no `target_parameters` adapts them.

    ## Why is this bad?
    Newer transformers stores the experts of a layer as one parameter, which is no linear module. "all-
    linear" then adapts attention alone. That can be meant; it did not use to be what the word does.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    report = check_config(config, fused_moe_base)
    ```

    ## Use instead
    ```python
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", target_parameters=["experts.up", "experts.down"]
    )
    report = check_config(config, fused_moe_base)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/lora#targeting-nnparameter-directly
    """
    if str(facts.settings.target_modules).lower() != "all-linear":
        return
    left = [p for p in facts.base.fused if p.name not in facts.adapted]
    numbers = sum(p.numbers for p in left)
    if numbers * 2 > facts.base.parameters:
        names = sorted({".".join(p.name.split(".")[-2:]) for p in left})
        yield Violation(
            where=f"{len(left)} fused parameters: {', '.join(names)}",
            observed=f"'all-linear' adapts {len(facts.layers)} modules; {numbers / facts.base.parameters:.0%} of the "
            "base are fused expert weights without an adapter",
            expected="nothing, if attention alone was meant",
            fix=f"to adapt the experts too, set {assigned(**_experts_too(facts, names))}",
        )


def _experts_too(facts: ConfigFacts, names: list[str]) -> dict[str, object]:
    fields: dict[str, object] = {"target_parameters": (*facts.settings.target_parameters, *names)}
    if facts.settings.lora_dropout:  # PEFT refuses a dropout on parameters
        fields["lora_dropout"] = 0.0
    return fields
