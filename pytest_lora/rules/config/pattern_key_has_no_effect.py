from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import Advice, Change, advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts, PatternKey
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule

PREFIX = "base_model.model."
"""What PEFT puts before the names of the base in a model that it has wrapped."""


@rule("LORA107", severity="error", needs=ConfigFacts, on_saved="with_base")
def pattern_key_has_no_effect(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """A key of rank_pattern or alpha_pattern decides for no adapted module.

    ## What it does
    Matches every key as PEFT does (`(.*\\.)?(key)$` on the full module name, the first key that matches
    decides) and looks for keys that decide for no module, or no longer once the configuration is saved:
    `save_pretrained` writes the keys in the order of the alphabet.

    ## Why is this bad?
    The rank or alpha written there is ignored without a word: `^q_proj` can only match a module whose
    full name starts so, a key for a module that is not a target does nothing, and of two keys that
    match, the later is never used. Ranks that change with the order of keys make the saved adapter one that cannot
    be loaded; alphas that do give it another scaling without a word.

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
        if pattern.taken:
            yield Violation(
                where=f"{pattern.field} on {facts.base.architecture}",
                observed=f"key {pattern.key!r} (value {pattern.value:g}) decides for {grouped(pattern.taken)} because "
                f"it stands before {pattern.taker!r}; save_pretrained sorts the keys, and loaded again it decides",
                expected="keys that mean the same in the order of the alphabet",
                fix=advise(
                    "parentheses sort before letters: ",
                    _rewritten(pattern, facts, _sorted_before(pattern.key, str(pattern.taker))),
                ),
            )
        if pattern.decides or any(match.name == pattern.key for match in facts.unmatched("target_modules")):
            continue
        if pattern.shadowed_by:
            seen = f"the earlier key {pattern.shadowed_by!r} already decides for every module that it matches"
            fix = _moved(pattern, facts)
        elif not pattern.is_expression:
            seen = "it is no regular expression"
            fix = advise("write the end of a module's name, or drop it: ", _rewritten(pattern, facts))
        elif pattern.elsewhere:
            seen = f"it matches {grouped(pattern.elsewhere)}, which are no LoRA targets"
            fix = advise(_targeted(pattern, facts), "drop it: ", _rewritten(pattern, facts))
        elif any(module.startswith(f"{pattern.key}.") for module in facts.base.module_names):
            seen = "it is the start of names, and a key has to match their end"
            fix = advise(
                "for every module inside it ", _rewritten(pattern, facts, pattern.key + ".*", "write")
            )
        elif pattern.key.startswith(PREFIX):
            seen = "it matches no module of the base, whose names do not start with what PEFT puts around it"
            fix = advise(_rewritten(pattern, facts, pattern.key.removeprefix(PREFIX), "write"))
        else:
            seen = "it matches no module"
            fix = _known(pattern, facts)
        yield Violation(
            where=f"{pattern.field} on {facts.base.architecture}",
            observed=f"key {pattern.key!r} (value {pattern.value:g}) is ignored: {seen}",
            expected="every key to match at least one adapted module",
            fix=fix,
        )


def _rewritten(pattern: PatternKey, facts: ConfigFacts, key: str | None = None, verb: str = "") -> Change:
    """The field with the key written anew in its place, or without it."""
    pairs = [
        (key if old == pattern.key else old, value) for old, value in getattr(facts.settings, pattern.field)
    ]
    return change(verb, **{pattern.field: {name: value for name, value in pairs if name is not None}})


def _moved(pattern: PatternKey, facts: ConfigFacts) -> Advice:
    earlier = next(p for p in facts.patterns if (p.field, p.key) == (pattern.field, pattern.shadowed_by))
    drop = advise("drop it: ", _rewritten(pattern, facts))
    if set(earlier.decides) <= set(pattern.own):
        return advise(f"{earlier.key!r} means the same modules; ", drop)
    pairs = dict(getattr(facts.settings, pattern.field))
    first = {_sorted_before(pattern.key, earlier.key): pairs.pop(pattern.key), **pairs}
    return advise(f"put it before {earlier.key!r}: ", change(**{pattern.field: first}), "; or ", drop)


def _sorted_before(key: str, other: str) -> str:
    """A key that means the same and comes before another in the order in which PEFT saves them."""
    while key > other and key.count("(") <= other.count("("):
        key = f"({key})"
    return key


def _targeted(pattern: PatternKey, facts: ConfigFacts) -> Advice:
    targets = facts.settings.target_modules
    linear = {module.name: module.leaf for module in facts.base.modules if module.is_linear}
    leaves = sorted({linear[module] for module in pattern.elsewhere if module in linear})
    if not isinstance(targets, tuple) or not leaves or any(facts.modules_of(leaf) for leaf in leaves):
        return advise()
    return advise("adapt it, too: ", change(target_modules=(*targets, *leaves)), "; or ")


def _known(pattern: PatternKey, facts: ConfigFacts) -> Advice:
    key = pattern.key.lstrip("^")
    drop = advise("drop it: ", _rewritten(pattern, facts))
    if pattern.by_its_end:
        return advise("write the end of the name: ", _rewritten(pattern, facts, key), "; or ", drop)
    return advise("write the end of an adapted module's name, or ", drop)
