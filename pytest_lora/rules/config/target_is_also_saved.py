from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.rules import Violation, rule


@rule("LORA111", severity="warning", needs=ConfigFacts)
def target_is_also_saved(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """A module is in target_modules and in modules_to_save; its LoRA is dropped.

    ## What it does
    Looks for names in both lists.

    ## Why is this bad?
    PEFT trains such a module in full and puts no adapter on it, without a word: the adapter file holds
    a whole copy where a few megabytes were expected.

    ## Example
    ```python
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"]
    )
    report = check_config(config, base)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], modules_to_save=["lm_head"])
    report = check_config(config, base)
    ```

    ## References
    - https://github.com/huggingface/peft/issues/2589
    """
    if not isinstance(facts.settings.target_modules, tuple):
        return
    both = [name for name in facts.settings.target_modules if _is_saved_everywhere(name, facts)]
    if both:
        yield Violation(
            where=f"target_modules and modules_to_save on {facts.base.architecture}",
            observed=f"{both} are both LoRA targets and in modules_to_save: they are trained and saved in full",
            expected="each module in one of the two lists",
            fix="keep it in target_modules for a LoRA, in modules_to_save for a full copy",
        )


def _is_saved_everywhere(name: str, facts: ConfigFacts) -> bool:
    # PEFT saves the head of some task types by itself. In a live model that is no sign of a name written twice.
    modules = [m for m in facts.modules_of(name) if not (facts.live and _is_in_a_head(m, facts))]
    return bool(modules) and all(facts.settings.saves(m) or m in facts.saved_modules for m in modules)


def _is_in_a_head(module: str, facts: ConfigFacts) -> bool:
    return any(module == head.name or module.startswith(f"{head.name}.") for head in facts.base.heads)
