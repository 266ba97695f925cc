from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts, compiled
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule

PREFIX = "base_model.model."
"""What PEFT puts before the names of the base in a model that it has wrapped."""


@rule("LORA107", severity="error", needs=ConfigFacts, on_saved="with_base")
def pattern_key_has_no_effect(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """A key of rank_pattern or alpha_pattern decides for no adapted module.

    ## What it does
    Matches every key as PEFT does (`(.*\\.)?(key)$` on the full module name, the first key that matches
    decides) and looks for keys that decide for no module.

    ## Why is this bad?
    The rank or alpha written there is ignored without a word: `^q_proj` can only match a module whose
    full name starts so, a key for a module that is not a target does nothing, and of two keys that
    match, the later is never used.

    ## Example
    ```python
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj"], rank_pattern={"^q_proj": 16}, alpha_pattern={"^q_proj": 32}
    )
    report = check_config(config, base)
    ```

    ## Use instead
    ```python
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj"], rank_pattern={"q_proj": 16}, alpha_pattern={"q_proj": 32}
    )
    report = check_config(config, base)
    ```

    ## References
    - https://github.com/huggingface/peft/issues/3582
    - https://github.com/huggingface/peft/issues/2419
    """
    for pattern in facts.patterns:
        if pattern.decides:
            continue
        if pattern.shadowed_by:
            seen = f"the earlier key {pattern.shadowed_by!r} already decides for every module that it matches"
            fix = f"put {pattern.key!r} before {pattern.shadowed_by!r}, or drop it"
        elif compiled(pattern.key) is None:
            seen = "it is no regular expression"
            fix = "write the end of a module's name, or a regular expression for it"
        elif pattern.elsewhere:
            seen = f"it matches {grouped(pattern.elsewhere)}, which are no LoRA targets"
            fix = f"add it to target_modules, or drop it from {pattern.field}"
        elif any(module.startswith(f"{pattern.key}.") for module in facts.base.module_names):
            seen = "it is the start of names, and a key has to match their end"
            fix = f"write {pattern.key + '.*'!r} for every module inside it"
        elif pattern.key.startswith(PREFIX):
            seen = "it matches no module of the base, whose names do not start with what PEFT puts around it"
            fix = f"write {pattern.key.removeprefix(PREFIX)!r}"
        else:
            seen = "it matches no module"
            fix = f"write {pattern.key.lstrip('^')!r}, or after ^ the full name from the top of the base"
        yield Violation(
            where=f"{pattern.field} on {facts.base.architecture}",
            observed=f"key {pattern.key!r} (value {pattern.value:g}) is ignored: {seen}",
            expected="every key to match at least one adapted module",
            fix=fix,
        )
