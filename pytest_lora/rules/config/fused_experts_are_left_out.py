from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import Change, advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import ending, on_parameters


@rule("LORA129", severity="info", needs=ConfigFacts)
def fused_experts_are_left_out(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """Experts that are stored as fused parameters are left out, though the names of their projections are targets.

    ## What it does
    Looks for `target_modules="all-linear"` on a mixture of experts whose expert weights are one stacked
    parameter each, and hold most of the base, while no `target_parameters` adapts them. That is an info. A warning is
    a name such as `up_proj` or `down_proj` that the fused weights carry too, and that matches other modules only: a
    shared expert, or the dense layers before the first mixture.

    ## Why is this bad?
    Newer transformers stores the experts of a layer as one parameter, which is no linear module. "all-linear" then
    adapts attention alone. That can be meant; it did not use to be what the word does. With names, what they match
    hides what they do not: the adapter trains, and the routed experts, most of the model, stand still.

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
    - https://github.com/unslothai/unsloth/pull/11014
    """
    yield from _named_but_left(facts)
    if str(facts.settings.target_modules).lower() != "all-linear":
        return
    left = [p for p in facts.base.fused if p.name not in facts.adapted]
    numbers = sum(p.numbers for p in left)
    if numbers * 2 > facts.base.parameters:
        names = sorted({ending(p.name) for p in left})
        yield Violation(
            where=f"{len(left)} fused parameters: {', '.join(names)}",
            observed=f"'all-linear' adapts {len(facts.layers)} modules; {numbers / facts.base.parameters:.0%} of the "
            "base are fused expert weights without an adapter",
            expected="nothing, if attention alone was meant",
            fix=advise("to adapt the experts too, ", _experts_too(facts, names)),
        )


def _named_but_left(facts: ConfigFacts) -> Iterator[Violation]:
    """Fused weights that carry the name of a target, which matches modules elsewhere."""
    targets = facts.settings.target_modules
    if isinstance(targets, str):
        return
    matched = {
        t for t in targets or () if any(f".{layer.module}".endswith(f".{t}") for layer in facts.layers)
    }
    left = [p for p in facts.base.fused if p.name not in facts.adapted and any(map(p.stands_for, matched))]
    if not left:
        return
    names = sorted({ending(p.name) for p in left})
    also = sorted(t for t in matched if any(p.stands_for(t) for p in left))
    elsewhere = [f".{layer.module}" for layer in facts.layers]
    instead = next(m for m in elsewhere if m.endswith(f".{also[0]}")).lstrip(".")
    yield Violation(
        where=f"{len(left)} fused parameters: {', '.join(names)}",
        observed=f"{also} match {instead} and its like alone; the routed experts, "
        f"{sum(p.numbers for p in left) / facts.base.parameters:.0%} of the base, are parameters and get no adapter",
        expected="adapters on the experts too, or names that say which modules are meant",
        fix=advise(
            "to adapt the experts, ",
            _experts_too(facts, names),
            f"; if they are to stay as they are, write more of the name: '{ending(instead)}'",
        ),
        severity="warning",
    )


def _experts_too(facts: ConfigFacts, names: list[str]) -> Change:
    return change("set", **on_parameters(facts.settings, (*facts.settings.target_parameters, *names)))
