from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.rules import Violation, rule


@rule("LORA106", severity="warning", needs=ConfigFacts)
def exclusion_excludes_nothing(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """An entry of exclude_modules keeps no adapter off anything.

    ## What it does
    Matches each entry of `exclude_modules` against the base. A name excludes the modules that end in
    it, not what is inside them.

    ## Why is this bad?
    A module that was meant to stay as it is gets an adapter all the same.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], exclude_modules=["self_attn"])
    report = check_config(config, base)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"])
    report = check_config(config, base)
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/lora#peft.LoraConfig.exclude_modules
    """
    for match in facts.names:
        if match.field != "exclude_modules":
            continue
        inside = [m for m in facts.adapted for name in match.modules if m.startswith(f"{name}.")]
        if match.modules and not inside:
            continue
        seen = (
            f"{len(inside)} adapted modules are inside it" if inside else "no module of the base matches it"
        )
        similar = f"; did you mean {' or '.join(match.similar)}?" if match.similar else ""
        yield Violation(
            where=f"exclude_modules on {facts.base.architecture}",
            observed=f"{match.name!r} excludes nothing: {seen}",
            expected="every entry to match modules that would be adapted",
            fix=f"name the adapted modules themselves, or use a pattern such as '.*{match.name}.*'{similar}",
        )
