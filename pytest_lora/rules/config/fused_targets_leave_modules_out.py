from __future__ import annotations

import re
from collections.abc import Iterator

from pytest_lora.changes import advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.base import FusedParameter
from pytest_lora.facts.config import ConfigFacts, LayerFacts
from pytest_lora.facts.settings import is_named
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import ending, on_parameters


@rule("LORA138", severity="info", needs=ConfigFacts)
def fused_targets_leave_modules_out(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """PEFT takes names of projections for the fused experts alone; modules of the same names get no adapter.

    ## What it does
    Where PEFT has made `target_parameters` of names in `target_modules` (`gate_proj`, `up_proj`, `down_proj`, which
    transformers 5 stores as fused parameters of the routed experts): looks for linear modules with these names that
    carry no adapter, in shared experts and in dense layers. That is an info; where a name says more
    (`shared_experts.down_proj`) and the fused experts do not carry it, PEFT has adapted other weights than those
    named: a warning.

    ## Why is this bad?
    PEFT moves the names from one list to the other, so that they mean the routed experts and nothing else. With
    transformers 4 the same configuration adapted the shared experts and the dense layers too, and nothing tells that
    it no longer does.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["o_proj", "gate_proj", "up_proj", "down_proj"])
    report = check_config(config, shared_experts)
    ```

    ## Use instead
    ```python
    shared = [f"shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")]
    dense = [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["o_proj", "gate_proj", "up_proj", "down_proj"],
        target_parameters=[*shared, *dense],
    )
    report = check_config(config, shared_experts)
    ```

    ## References
    - https://github.com/huggingface/peft/blob/main/src/peft/utils/transformers_weight_conversion.py
    - https://huggingface.co/docs/peft/developer_guides/lora#targeting-nnparameter-directly
    """
    converted = {layer.module for layer in facts.layers if _is_converted(layer, facts)}
    fused = [parameter for parameter in facts.base.fused if parameter.name in converted]
    left = [
        module.name
        for module in facts.base.modules
        if module.is_linear
        and any(parameter.stands_for(module.leaf) for parameter in fused)
        and facts.adapted.isdisjoint((module.name, f"{module.name}.weight"))
        and not (facts.settings.excludes(module.name) or facts.settings.skips_layer_of(module.name))
    ]
    if not left:
        return
    weights = sorted({f"{ending(name)}.weight" for name in left})
    fields = on_parameters(facts.settings, (*facts.settings.target_parameters, *weights))
    yield Violation(
        where=grouped(left),
        observed=f"PEFT takes {sorted({name.rpartition('.')[2] for name in left})} for the fused experts, "
        f"{', '.join(sorted({ending(p.name) for p in fused}))}; {len(left)} modules of these names "
        "carry no adapter",
        expected="nothing, if the routed experts alone were meant",
        fix=advise("to adapt these modules too, ", change("set", **fields)),
        severity="warning" if _means_others(left, fused, facts) else None,
    )


def _means_others(left: list[str], fused: list[FusedParameter], facts: ConfigFacts) -> bool:
    """Whether a name was written in more than its last part, and means modules that got no adapter alone."""
    names = facts.settings.target_modules
    return isinstance(names, tuple) and any(
        "." in name
        and any(is_named(module, name) for module in left)
        and not any(
            is_named(parameter.name.rpartition(".")[0] + "." + name.rpartition(".")[2], name)
            for parameter in fused
        )
        for name in names
    )


def _is_converted(layer: LayerFacts, facts: ConfigFacts) -> bool:
    """Whether PEFT adapts a parameter for names of modules; of a live model the pattern for the joint rank tells."""
    named = facts.settings.target_parameters
    if facts.live:
        return layer.leaf in named and any(
            key.startswith(r".*\.") and re.sub(r"\\(.)", r"\1", key[4:]) in named
            for key, _ in facts.settings.rank_pattern
        )
    return not any(is_named(layer.module, name) for name in named)
