from __future__ import annotations

import math
from collections.abc import Iterator

from pytest_lora.changes import Advice, advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts, LayerFacts
from pytest_lora.facts.settings import alpha_divisor
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import ranked


@rule("LORA109", severity="warning", needs=ConfigFacts)
def rank_exceeds_the_matrix(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """The rank is so large that the adapter holds more numbers than the matrix it adapts.

    ## What it does
    Compares `r * (in + out)` with `in * out` for every adapted module (a convolution's input times its
    kernel). It warns where the rank exceeds the smaller dimension itself; below that, or where such
    modules hold less than a tenth of the adapter, it is only mentioned.

    ## Why is this bad?
    The update is no longer low-rank: full training of that matrix would cost less memory and could
    express more.

    ## Example
    ```python
    config = LoraConfig(r=64, lora_alpha=128, target_modules=["k_proj", "v_proj"])
    report = check_config(config, base)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["k_proj", "v_proj"])
    report = check_config(config, base)
    ```

    ## References
    - LoRA, section 4.1: https://arxiv.org/abs/2106.09685
    """
    larger = [layer for layer in facts.layers if _low_rank_numbers(layer) > math.prod(_matrix(layer))]
    if not larger:
        return
    share = sum(map(_low_rank_numbers, larger)) / sum(map(_low_rank_numbers, facts.layers))
    worst = max(larger, key=lambda layer: layer.rank / min(_matrix(layer)))
    inputs, outputs = _matrix(worst)
    size = min(inputs, outputs)
    yield Violation(
        where=grouped(layer.module for layer in larger),
        observed=f"r={worst.rank} on a {inputs} x {outputs} matrix: the adapter holds {_low_rank_numbers(worst):,} "
        f"numbers, more than the matrix itself with {inputs * outputs:,}",
        expected=f"a rank well below the smaller dimension, {size}",
        fix=_fix(larger, facts),
        severity="warning" if worst.rank > size and share >= 0.1 else "info",
    )


def _matrix(layer: LayerFacts) -> tuple[int, int]:
    return layer.in_features * layer.kernel, layer.out_features


def _low_rank_numbers(layer: LayerFacts) -> int:
    return layer.rank * sum(_matrix(layer))


def _fix(larger: list[LayerFacts], facts: ConfigFacts) -> Advice:
    """An eighth of the smaller dimension, for the whole adapter where all of it is too large."""
    settings = facts.settings
    ranks: dict[str, tuple[int, LayerFacts]] = {}
    for layer in larger:
        rank = max(1, min(_matrix(layer)) // 8)
        ranks[layer.leaf] = min(
            (rank, layer), ranks.get(layer.leaf, (rank, layer)), key=lambda found: found[0]
        )
    smallest = min(rank for rank, _ in ranks.values())
    if any(rank * sum(_matrix(layer)) > math.prod(_matrix(layer)) for rank, layer in ranks.values()):
        return advise(
            "adapt larger modules: rank 1 is too large for these; train them in full by modules_to_save"
        )
    if len(larger) == len(facts.layers) and not settings.rank_pattern and not settings.alpha_pattern:
        return advise(change("set", **ranked(settings, larger[0].module, smallest)))
    rank_pattern, alpha_pattern = dict(settings.rank_pattern), dict(settings.alpha_pattern)
    for leaf, (rank, layer) in ranks.items():
        rank_pattern[settings.rank_key(layer.module) or leaf] = rank
        alpha = layer.configured_scaling * alpha_divisor(rank, rslora=layer.use_rslora)
        alpha_pattern[settings.alpha_key(layer.module) or leaf] = alpha
    return advise(change("set", rank_pattern=rank_pattern, alpha_pattern=alpha_pattern))
