from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.facts.model_parts import LayerState
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA243", severity="warning", needs=ModelFacts)
def factors_are_filled_in_part(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """The same part of every factor still is as it was initialised.

    ## What it does
    Looks for adapters that hold something, but of which the same ranks of lora_B are zero in every module while
    lora_A is not, or the same half, quarter or eighth of its rows.

    ## Why is this bad?
    A step of training moves every number of lora_B. What is zero in all modules alike was never loaded: the shard of
    one GPU was saved or read as if it were the whole, or an adapter of a smaller rank was copied into a larger one.
    The adapter works in part, and nothing raises.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter[:, :4])
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    report = check_model(model)
    ```

    ## References
    - https://huggingface.co/docs/peft/accelerate/fsdp
    """
    for adapter in facts.adapters:
        filled = [layer for layer in facts.of(adapter) if layer.b.zero is False and layer.a.zero is False]
        idle = {(layer.idle_ranks, layer.rank) for layer in filled}
        if len(filled) > 1 and len(idle) == 1 and filled[0].idle_ranks:
            yield _violation(
                filled, adapter, f"{filled[0].idle_ranks} of {filled[0].rank} ranks (columns) of lora_B"
            )
        elif share := _missing_share(filled):
            where = [layer for layer in filled if _share(layer) == share]
            yield _violation(where, adapter, f"{100 * share:g} % of the rows of lora_B, in one block,")


def _violation(layers: list[LayerState], adapter: str, part: str) -> Violation:
    return Violation(
        where=grouped(layer.module for layer in layers),
        observed=f"{part} of {adapter!r} are zero in each of {len(layers)} modules, as they were initialised, and the "
        "rest is not: a part was loaded, such as one rank's slice or shard",
        expected="factors that are loaded or trained as a whole",
        fix="gather the shards of all ranks before saving, load them all, and give the adapter the rank of the file",
    )


_SHARES = (1 / 2, 3 / 4, 7 / 8)
"""What is missing where one of 2, 4 or 8 equal shards is there."""


def _share(layer: LayerState) -> float:
    return layer.zero_outputs / layer.b.shape[0] if layer.b.shape else 0.0


def _missing_share(layers: list[LayerState]) -> float:
    """The share that is missing from modules of several kinds alike, or from all; 0 where there is none.

    One kind alone may be a fused projection of which a part is adapted on purpose.
    """
    kinds: dict[str, set[float]] = defaultdict(set)
    for layer in layers:
        kinds[layer.module.rpartition(".")[2]].add(_share(layer))
    for share in _SHARES:
        alike = [kind for kind, shares in kinds.items() if shares == {share}]
        if len(alike) > 1:
            return share
    return 0.0
