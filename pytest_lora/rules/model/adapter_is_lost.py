from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA233", severity="error", needs=ModelFacts)
def adapter_is_lost(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """A module that the configuration adapts or saves carries nothing any more.

    ## What it does
    Looks for names in `target_modules` and `modules_to_save` of an active adapter that match modules of the
    base of which none, or not all of one kind, carries it.

    ## Why is this bad?
    A module replaced after `get_peft_model` (a new head, a resized embedding, a patched layer) takes its
    adapter or its trained copy with it. The rest trains on; the file lacks what was lost, and loading warns
    of missing keys at best.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    layer = nn.Linear(64, 64, bias=False).requires_grad_(False)
    model.base_model.model.model.layers[1].self_attn.q_proj = layer
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/custom_models
    """
    for config in facts.configs:
        if config.adapter in facts.active:
            yield from _lost(config)


def _lost(config: ConfigFacts) -> Iterator[Violation]:
    adapted = config.adapted
    for match in config.names:
        if match.field not in ("target_modules", "modules_to_save") or _chosen(config, match.field):
            continue
        target = match.field == "target_modules"
        bare = [m for m in match.modules if not config.keeps(m) and not (target and m in adapted)]
        if bare:
            yield Violation(
                where=grouped(bare),
                observed=f"{match.name!r} is in {match.field} of adapter {config.adapter!r}, but {len(bare)} of "
                f"{len(match.modules)} such modules carry nothing of it",
                expected="every module that the configuration names to carry its adapter or its copy",
                fix="replace or resize modules of the base before get_peft_model, not after",
            )


def _chosen(config: ConfigFacts, field: str) -> bool:
    """Whether other fields than the names decide, too, which modules carry the adapter."""
    settings = config.settings
    restricted = settings.exclude_modules or settings.layers_to_transform or settings.target_parameters
    return field == "target_modules" and bool(restricted or isinstance(settings.target_modules, str))
