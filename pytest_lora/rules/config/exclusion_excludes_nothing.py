from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import Advice, advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts, NameMatch
from pytest_lora.facts.settings import is_named
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import without


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
    everything = str(facts.settings.target_modules).lower() == "all-linear"
    linear = {module.name for module in facts.base.modules if module.is_linear}
    for match in facts.names:
        if match.field != "exclude_modules":
            continue
        inside = [m for m in facts.adapted for name in match.modules if m.startswith(f"{name}.")]
        if match.modules and (
            not inside or any(m in linear if everything else facts.settings.targets(m) for m in match.modules)
        ):
            continue
        seen = (
            f"{len(inside)} adapted modules are inside it" if inside else "no module of the base matches it"
        )
        yield Violation(
            where=f"exclude_modules on {facts.base.architecture}",
            observed=f"{match.name!r} excludes nothing: {seen}",
            expected="every entry to match modules that would be adapted",
            fix=_fix(match, inside, facts),
        )


def _fix(match: NameMatch, inside: list[str], facts: ConfigFacts) -> Advice:
    written = facts.settings.exclude_modules
    names = (written,) if isinstance(written, str) else written or ()
    rest = without(names, match.name)
    drop = advise("drop it, which changes nothing: ", change(exclude_modules=rest))
    meant = [name for name in match.similar if any(is_named(module, name) for module in facts.adapted)]
    if meant:
        named = change(exclude_modules=(*rest, meant[0]))
        return advise(f"did you mean {meant[0]!r}? ", named, "; else ", drop)
    leaves = sorted({module.rpartition(".")[2] for module in inside})
    caught = {layer.module for layer in facts.layers if layer.leaf in leaves}
    if inside and caught == set(inside) and caught != facts.adapted:
        named = change(exclude_modules=(*rest, *leaves))
        return advise("name the adapted modules themselves: ", named, "; or ", drop)
    return advise("name adapted modules, or ", drop)
