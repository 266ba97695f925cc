from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import Advice, advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import scaled


@rule("LORA128", severity="error", needs=ConfigFacts)
def parameter_share_is_outside_the_band(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """The share of trained parameters is not the one that was stated.

    ## What it does
    Compares the logical numbers that the configuration trains (adapters and modules saved in full) with
    those of the base. With `Expect(param_ratio=(low, high))` a share outside is an error; without, a
    share outside `Expect.advised_percent` is mentioned where the base is large.

    ## Why is this bad?
    Far too many trained parameters cost the memory that LoRA saves and overfit small data; far too few
    cannot hold the task. Often a target list matched more, or less, than was meant.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"])
    report = check_config(config, base, expect=Expect(param_ratio=(0.05, 0.1)))
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"])
    report = check_config(config, base, expect=Expect(param_ratio=(0.01, 0.1)))
    ```

    ## References
    - LoRA, table 15 and QLoRA, section 4: https://arxiv.org/abs/2305.14314
    """
    if not facts.layers:
        return
    if expect.param_ratio is not None:
        low, high = expect.param_ratio
    elif facts.base.parameters >= expect.large_base:
        low, high = (percent / 100 for percent in expect.advised_percent)
    else:
        return
    trained = facts.trainable_parameters
    share = trained / (facts.base.parameters + trained)
    if not low <= share <= high:
        yield Violation(
            where=f"LoraConfig on {facts.base.architecture}",
            observed=f"{trained:,} trained parameters, {share:.4%} of {facts.base.parameters + trained:,}",
            expected=f"{low:.4%} to {high:.4%}",
            fix=advise(
                f"{'raise' if share < low else 'lower'} r",
                _rank(facts, low, high),
                f", or target {'more' if share < low else 'fewer'} modules",
            ),
            severity="error" if expect.param_ratio is not None else "info",
        )


def _rank(facts: ConfigFacts, low: float, high: float) -> Advice:
    """The rank nearest to the present one under which the share is in the band, with alpha to match."""
    settings, base, layer = facts.settings, facts.base.parameters, facts.layers[0]
    adapters = sum(layer.parameters for layer in facts.layers)
    others = facts.trainable_parameters - adapters
    if settings.rank_pattern or settings.use_dora or settings.r < 1:
        return advise()
    trained = ((rank, others + adapters // settings.r * rank) for rank in range(1, 513))
    fitting = [rank for rank, numbers in trained if low <= numbers / (base + numbers) <= high]
    if not fitting:
        return advise()
    rank = min(fitting, key=lambda found: abs(found - settings.r))
    fields = scaled(settings, layer.module, layer.configured_scaling, rank)
    return advise(": ", change(r=rank, **fields))
