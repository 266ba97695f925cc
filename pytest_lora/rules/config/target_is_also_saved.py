from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import Advice, advise, advise_any, change, noun
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import without


@rule("LORA111", severity="warning", needs=ConfigFacts)
def target_is_also_saved(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """A module is trained in two ways at once, of which PEFT takes one or breaks.

    ## What it does
    Looks for names in both `target_modules` and `modules_to_save`, and for embeddings of `trainable_token_indices`
    that one of the two names as well.

    ## Why is this bad?
    PEFT trains a module of both lists in full and puts no adapter on it, without a word: the adapter file holds
    a whole copy where a few megabytes were expected. Over an embedding that is trained in full, single trainable
    rows fail in the forward pass; over one with an adapter PEFT raises.

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
    - https://github.com/huggingface/peft/issues/2653
    """
    rows = [m for m in facts.token_modules if facts.keeps(m)]
    if rows:
        yield Violation(
            where=f"trainable_token_indices and modules_to_save on {facts.base.architecture}",
            observed=f"{rows} are trained in full by modules_to_save and row by row by trainable_token_indices: the "
            "forward pass fails",
            expected="an embedding trained in one way",
            fix=advise(
                "train a few new rows with ",
                noun(modules_to_save=_saved_less(facts, rows)),
                ", or the whole embedding with ",
                noun(trainable_token_indices=None),
            ),
            severity="error",
        )
    if not isinstance(facts.settings.target_modules, tuple):
        return
    both = [name for name in facts.settings.target_modules if _is_saved_everywhere(name, facts)]
    if both:
        yield Violation(
            where=f"target_modules and modules_to_save on {facts.base.architecture}",
            observed=f"{both} are both LoRA targets and in modules_to_save: they are trained and saved in full",
            expected="each module in one of the two lists",
            fix=_fix(facts, both),
        )


def _is_saved_everywhere(name: str, facts: ConfigFacts) -> bool:
    # PEFT saves the head of some task types by itself. In a live model that is no sign of a name written twice.
    modules = [m for m in facts.modules_of(name) if not (facts.live and _is_in_a_head(m, facts))]
    return bool(modules) and all(facts.settings.saves(m) or m in facts.saved_modules for m in modules)


def _is_in_a_head(module: str, facts: ConfigFacts) -> bool:
    return any(module == head.name or module.startswith(f"{head.name}.") for head in facts.base.heads)


def _fix(facts: ConfigFacts, both: list[str]) -> Advice:
    """One of the two lists without these modules; a head that its task type saves cannot leave the second."""
    settings = facts.settings
    targets = without(settings.target_modules or (), *both)
    saved = _saved_less(facts, [module for name in both for module in facts.modules_of(name)])
    ways = [advise("for a full copy ", change("set", target_modules=targets))] if targets else []
    if not facts.live and saved != settings.modules_to_save:
        ways.append(advise("for a LoRA ", change("set", modules_to_save=saved)))
    return advise_any(ways or ["make a configuration that names it once"], ", or ")


def _saved_less(facts: ConfigFacts, modules: list[str]) -> tuple[str, ...]:
    saved = facts.settings.modules_to_save
    return without(saved, *(name for name in saved if any(name in m.split(".") for m in modules)))
