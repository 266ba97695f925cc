from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import assigned, without


@rule("LORA110", severity="error", needs=ConfigFacts, on_saved="with_base")
def saved_module_matches_nothing(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """A name in modules_to_save matches no module, so that it is neither trained nor saved.

    ## What it does
    Matches each entry of `modules_to_save` against the base. A bare string instead of a list is read
    letter by letter by PEFT and is named as such.

    ## Why is this bad?
    PEFT says nothing. A new head or embedding that was meant to be trained in full stays frozen at its
    initial values and is missing from the saved adapter.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
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
    close = get_close_matches(lost[0], {name.rpartition(".")[2] for name in facts.base.module_names}, n=1)
    heads = close or [head.name for head in facts.base.heads] or [facts.base.output_embeddings or ""]
    kept = without(facts.settings.modules_to_save, *lost)
    drop = f"drop it: {assigned(modules_to_save=kept)}"
    meant = f"did you mean {heads[0]!r}? {assigned(modules_to_save=_with(kept, heads[0]))}; else {drop}"
    yield Violation(
        where=f"modules_to_save on {facts.base.architecture}",
        observed="it is a string, which PEFT reads letter by letter"
        if letters
        else f"no module of the base matches {lost}; nothing is trained or saved for it",
        expected="a list of names, each the end of a module's full name",
        fix=f"put the name into a list: {assigned(modules_to_save=(''.join(facts.settings.modules_to_save),))}"
        if letters
        else meant
        if heads[0]
        else drop,
    )


def _with(names: tuple[str, ...], name: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*names, name)))
