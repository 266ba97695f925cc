from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import Change, change
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.facts.settings import Settings, alpha_divisor
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA127", severity="error", needs=ConfigFacts, on_saved="alone")
def scaling_differs_from_expected(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """The effective scaling is not the one that was stated.

    ## What it does
    Needs `Expect(alpha_ratio=...)`. Compares the effective scaling of every adapted module with it.

    ## Why is this bad?
    Alpha does not follow the rank by itself: after a change of rank the same alpha is another scaling,
    and another learning rate in effect.

    ## Example
    ```python
    config = LoraConfig(r=16, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    report = check_config(config, base, expect=Expect(alpha_ratio=2.0))
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    report = check_config(config, base, expect=Expect(alpha_ratio=2.0))
    ```

    ## References
    - LoRA, section 4.1: https://arxiv.org/abs/2106.09685
    """
    ratio = expect.alpha_ratio
    if ratio is None:
        return
    off = [layer for layer in facts.layers if abs(layer.scaling - ratio) > 1e-6 * max(ratio, layer.scaling)]
    for scaling in sorted({layer.scaling for layer in off}):
        layers = [layer for layer in off if layer.scaling == scaling]
        rank, alpha, rslora = layers[0].rank, layers[0].alpha, layers[0].use_rslora
        yield Violation(
            where=grouped(layer.module for layer in layers),
            observed=f"r={rank} with alpha={alpha:g}{' under rsLoRA' if rslora else ''}: the scaling is {scaling:.4g}",
            expected=f"a scaling of {ratio:g}",
            fix=_alphas(facts.settings, ratio),
        )


def _alphas(settings: Settings, ratio: float) -> Change:
    """The alpha of every rank that the configuration has, so that no module is left with another scaling."""

    def alpha(rank: int) -> float:
        return ratio * alpha_divisor(rank, rslora=settings.use_rslora)

    fields: dict[str, object] = {"lora_alpha": alpha(settings.r)}
    if settings.rank_pattern or settings.alpha_pattern:
        fields["alpha_pattern"] = {key: alpha(rank) for key, rank in settings.rank_pattern}
    return change("set", **fields)
