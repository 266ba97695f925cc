from __future__ import annotations

import re
from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts, NameMatch
from pytest_lora.rules import Violation, rule


@rule("LORA104", severity="error", needs=ConfigFacts, on_saved="refused")
def target_matches_nothing(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """A name in the targets matches no module, so that fewer modules are adapted than configured.

    ## What it does
    Matches each entry of `target_modules` and `target_parameters` against the base, as PEFT does: a
    name in a list must be the end of a module's full name, a string is a regular expression for the
    whole name. Under `layers_to_transform` a name that means modules outside the numbered blocks alone matches
    nothing either.

    ## Why is this bad?
    PEFT stops only when nothing matches at all. When some names match, the others are dropped without a
    word, and a model trains with half of the adapters that were meant.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "c_attn"])
    report = check_config(config, base)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    report = check_config(config, base)
    ```

    ## References
    - https://github.com/huggingface/peft/issues/3658
    - https://github.com/huggingface/peft/issues/1024
    - https://huggingface.co/docs/peft/package_reference/lora#peft.LoraConfig.target_modules
    """
    for field in ("target_modules", "target_parameters"):
        lost = list(facts.unmatched(field))
        if not lost:
            continue
        settings: object = getattr(facts.settings, field)
        total = 1 if isinstance(settings, str) else len(list(filter(None, facts.names_of(field))))
        written = f"the pattern {settings!r}" if isinstance(settings, str) else f"{[m.name for m in lost]}"
        rest = (
            f"; {total - len(lost)} of {total} names match" if len(lost) < total else "; nothing is adapted"
        )
        yield Violation(
            where=f"{field} on {facts.base.architecture}",
            observed=f"no module of the base matches {written}{rest}",
            expected="every name to match at least one module",
            fix=_fix(field, settings, lost, facts),
        )
    layers = list(facts.settings.layers_to_transform)
    outside = [] if facts.refusal or not layers else [m.name for m in facts.names if _is_outside(m, facts)]
    if outside:
        yield Violation(
            where=f"target_modules and layers_to_transform on {facts.base.architecture}",
            observed=f"{outside} get no adapter: layers_to_transform={layers} keeps adapters to modules in numbered "
            "blocks, and these are in none",
            expected="every name to match at least one module",
            fix=f"drop {outside}, or say all in one regular expression for target_modules, without layers_to_transform",
            severity="warning",
        )


def _is_of_experts(name: str) -> bool:
    """Whether a name is one that experts have where each is a module: w1, w2, w3, or a projection of an MLP."""
    return bool(re.fullmatch(r"(.*\.)?(w[123]|(gate|up|down|gate_up)_proj|experts?.*)", name))


def _is_outside(match: NameMatch, facts: ConfigFacts) -> bool:
    """Whether a target name means modules, but none of them is in a numbered block."""
    numbered = any(part.isdigit() for module in match.modules for part in module.split("."))
    named = match.field == "target_modules" and bool(match.modules)
    return named and not numbered and facts.adapted.isdisjoint(match.modules)


def _fix(field: str, settings: object, lost: list[NameMatch], facts: ConfigFacts) -> str:
    if isinstance(settings, str):
        names = re.findall(r"\w+", settings)
        if settings.lower() == "all-linear":
            kinds = ", ".join(f"{m.leaf!r} ({m.kind})" for m in facts.base.modules[:4])
            return f"this base has no linear layers: name what it has{f', such as {kinds}' if kinds else ''}"
        if [name.lower() for name in names] in (["all", "linear"], ["all_linear"]):
            return f"write {field}='all-linear'"
        return f"a string is a regular expression for the whole name; for plain names write {field}={names}"
    if any(re.search(r"[*|()\[\]^$,]", match.name) for match in lost):
        return f"names in a list are no patterns; give the pattern as one string, {field}='...'"
    fused = sorted({".".join(p.name.split(".")[-2:]) for p in facts.base.fused})
    if field == "target_parameters":
        return f"use {fused}" if fused else "this base stacks no weights; name its modules in target_modules"
    if fused and any(_is_of_experts(match.name) for match in lost):
        return (
            f"the experts of this base are fused parameters, which no module name means: drop "
            f"{[m.name for m in lost]}, and to adapt the experts set target_parameters={fused}"
        )
    found = {match.name for match in facts.names if match.field == field and match.modules}
    available = sorted({module.leaf for module in facts.base.modules if module.is_linear} - found)
    if not available:
        return "drop the name: the others name every linear layer of this model"
    known = f"drop the name, or use those of this model: {', '.join(available[:12])}"
    similar = sorted({name for match in lost for name in match.similar})
    return f"did you mean {' or '.join(similar)}? Else {known}" if similar else known
