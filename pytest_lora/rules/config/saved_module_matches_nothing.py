from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from pytest_lora.changes import Advice, advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import without


@rule("LORA110", severity="error", needs=ConfigFacts, on_saved="with_base")
def saved_module_matches_nothing(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """A name in modules_to_save matches no module, so that it is neither trained nor saved.

    ## What it does
    Matches each entry of `modules_to_save` against the base. A bare string instead of a list is read
    letter by letter by PEFT and is named as such. Where only a configuration of the base is given and no task type,
    any class that transformers loads it into may have the modules.

    ## Why is this bad?
    PEFT says nothing. A new head or embedding that was meant to be trained in full stays frozen at its
    initial values and is missing from the saved adapter.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_haed"])
    report = check_config(config, base)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    report = check_config(config, base)
    ```

    ## References
    - https://github.com/huggingface/peft/issues/876
    - https://huggingface.co/docs/peft/package_reference/lora#peft.LoraConfig.modules_to_save
    """
    lost = [match.name for match in facts.unmatched("modules_to_save")]
    if not lost:
        return
    letters = len(lost) > 2 and all(len(name) == 1 for name in lost)
    kept = without(facts.settings.modules_to_save, *lost)
    yield Violation(
        where=f"modules_to_save on {facts.base.architecture}",
        observed="it is a string, which PEFT reads letter by letter"
        if letters
        else f"no module of the base matches {lost}; nothing is trained or saved for it",
        expected="a list of names, each the end of a module's full name",
        fix=advise(
            "put the name into a list: ", change(modules_to_save=("".join(facts.settings.modules_to_save),))
        )
        if letters
        else _fix(lost[0], kept, facts),
    )


_OF_TASKS = ("score", "classifier", "qa_outputs", "classification_head")
"""Names of heads that predict classes or spans; PEFT knows the first three (``peft.peft_model``)."""


def _fix(lost: str, kept: tuple[str, ...], facts: ConfigFacts) -> Advice:
    drop = advise("drop it: ", change(modules_to_save=kept))
    base = facts.base
    if lost in _OF_TASKS and not base.heads:
        return advise(
            drop,
            f"; {base.architecture} has no head for a task, and one is made where another class loads the base",
        )
    meant = _meant(lost, facts)
    if not meant:
        return drop
    return advise(f"did you mean {meant!r}? ", change(modules_to_save=_with(kept, meant)), "; else ", drop)


def _meant(lost: str, facts: ConfigFacts) -> str | None:
    """The module that was meant: for the name of a head the head that is there, else the most alike."""
    base = facts.base
    heads = [head.name for head in base.heads]
    known = [name for name in heads if name in _OF_TASKS] or heads[-1:]
    if known and lost in (*_OF_TASKS, "lm_head", "head"):
        return known[0]
    close = get_close_matches(lost, {name.rpartition(".")[2] for name in base.module_names}, n=1)
    return next(iter((*close, *known)), base.output_embeddings)


def _with(names: tuple[str, ...], name: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*names, name)))
