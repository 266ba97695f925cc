from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import Change, advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.base import BaseModule
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import without


@rule("LORA123", severity="error", needs=ConfigFacts)
def saved_module_is_quantized(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """A module in modules_to_save is quantized and cannot be trained in full.

    ## What it does
    Looks for quantized layers inside the modules that `modules_to_save` copies.

    ## Why is this bad?
    Packed integers have no gradients: PEFT raises "only Tensors of floating point dtype can require
    gradients".

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], modules_to_save=["down_proj"])
    report = check_config(config, base_4bit)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "down_proj"])
    report = check_config(config, base_4bit)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/quantization
    """
    saved = [m for m in facts.base.modules if m.quantization and facts.keeps(m.name)]
    if saved:
        yield Violation(
            where=grouped(m.name for m in saved),
            observed=f"modules_to_save copies layers that are quantized to {saved[0].quantization}",
            expected="float weights in every module that is trained in full",
            fix=advise(
                "target them with LoRA instead: ",
                _targeted(saved, facts),
                f"; or load the base with BitsAndBytesConfig(..., llm_int8_skip_modules=[{saved[0].leaf!r}])",
            ),
        )


def _targeted(saved: list[BaseModule], facts: ConfigFacts) -> Change:
    settings = facts.settings
    names = [n for n in settings.modules_to_save if any(n in module.name.split(".") for module in saved)]
    fields: dict[str, object] = {"modules_to_save": without(settings.modules_to_save, *names)}
    if isinstance(settings.target_modules, tuple):
        leaves = sorted({module.leaf for module in saved})
        fields["target_modules"] = (*settings.target_modules, *without(leaves, *settings.target_modules))
    return change(**fields)
