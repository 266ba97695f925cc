from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches

from pytest_lora.changes import Advice, Change, advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts, NameMatch
from pytest_lora.facts.settings import is_named
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import ending, on_parameters, without


@rule("LORA104", severity="error", needs=ConfigFacts, on_saved="refused")
def target_matches_nothing(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """A name in the targets matches no module, so that fewer modules are adapted than configured.

    ## What it does
    Matches each entry of `target_modules` and `target_parameters` against the base, as PEFT does: a
    name in a list must be the end of a module's full name, a string is a regular expression for the
    whole name. It is an info where every lost name is what another family calls projections that matched names
    adapt (`query` beside `to_q`): such a list serves several models. Under `layers_to_transform` a name that means
    modules outside the numbered blocks alone matches nothing either.

    ## Why is this bad?
    PEFT raises only when nothing matches at all. When some names match, the others are dropped without a
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
            severity="info" if field == "target_modules" and _serves_several(lost, facts) else "error",
        )
    layers = list(facts.settings.layers_to_transform)
    outside = [] if facts.refusal or not layers else [m.name for m in facts.names if _is_outside(m, facts)]
    if outside:
        inside = without(facts.names_of("target_modules"), *outside)
        yield Violation(
            where=f"target_modules and layers_to_transform on {facts.base.architecture}",
            observed=f"{outside} get no adapter: layers_to_transform={layers} keeps adapters to modules in numbered "
            "blocks, and these are in none",
            expected="every name to match at least one module",
            fix=advise(
                f"drop {outside}: ",
                change(target_modules=inside),
                "; or say all in one regular expression for target_modules, without layers_to_transform",
            ),
            severity="warning",
        )


_PROJECTIONS = {
    "q": r"q|q_proj|q_lin|query|query_proj|to_q|wq",
    "k": r"k|k_proj|k_lin|key|key_proj|to_k|wk",
    "v": r"v|v_proj|v_lin|value|value_proj|to_v|wv",
    "qkv": r"qkv|qkv_proj|query_key_value|c_attn|Wqkv|to_qkv",
}
"""Names of the projections of attention in models of transformers and diffusers (`peft.utils.constants` has most)."""


def _projections(name: str) -> frozenset[str]:
    """Which of q, k and v a module of this name makes; none for another module."""
    leaf = name.rpartition(".")[2]
    return frozenset("".join(made for made, names in _PROJECTIONS.items() if re.fullmatch(names, leaf)))


def _serves_several(lost: list[NameMatch], facts: ConfigFacts) -> bool:
    """Whether all that the lost names could mean is adapted by its name in this base."""
    adapted = frozenset[str]().union(*(_projections(module) for module in facts.adapted))
    return all(made and made <= adapted for made in map(_projections, (match.name for match in lost)))


def _is_of_experts(name: str) -> bool:
    """Whether a name is one that experts have where each is a module: w1, w2, w3, or a projection of an MLP."""
    return bool(re.fullmatch(r"(.*\.)?(w[123]|(gate|up|down|gate_up)_proj|experts?.*)", name))


def _is_outside(match: NameMatch, facts: ConfigFacts) -> bool:
    """Whether a target name means modules, but none of them is in a numbered block."""
    numbered = any(part.isdigit() for module in match.modules for part in module.split("."))
    named = match.field == "target_modules" and bool(match.modules)
    return named and not numbered and facts.adapted.isdisjoint(match.modules)


def _fix(field: str, settings: object, lost: list[NameMatch], facts: ConfigFacts) -> Advice:
    if field == "target_parameters":
        return _parameters_fix(lost, facts)
    if isinstance(settings, str):
        return _text_fix(settings, facts)
    kept = without(facts.names_of(field), *(match.name for match in lost))
    if any(_is_all_linear(match.name) for match in lost):
        return advise(change("write", target_modules="all-linear"), ", as text and not in a list")
    if experts := _experts(lost, facts):
        fused = change(**_fused(kept, experts, facts))
        return advise("the experts are fused parameters, not modules: ", fused)
    if any(match.is_pattern for match in lost):
        pattern = _joined([match.name for match in lost], kept, facts)
        return advise("names in a list are no patterns; give the pattern as one string, ", pattern)
    meant = tuple(dict.fromkeys(name for match in lost for name in _meant(match, facts)))
    drop = advise("drop the name: ", change(target_modules=kept)) if kept else None
    if meant:
        named = change(target_modules=tuple(dict.fromkeys((*kept, *meant))))
        rest = ("; else ", drop) if drop else ()
        return advise(f"did you mean {' and '.join(map(repr, meant))}? ", named, *rest)
    others = without(_linear(facts), *kept)
    more = f"; or use names of this model: {', '.join(others[:12])}" if others else ""
    return advise(drop, more) if drop else _any(facts)


def _is_all_linear(text: str) -> bool:
    return re.sub(r"[\W_]", "", text.lower()) == "alllinear"


def _linear(facts: ConfigFacts) -> list[str]:
    return sorted({module.leaf for module in facts.base.modules if module.is_linear})


def _any(facts: ConfigFacts) -> Advice:
    """What to write where nothing tells what was meant: names of this base."""
    if linear := _linear(facts):
        named = f"use names of this model: {', '.join(linear[:12])}; or all of them, "
        return advise(named, change(target_modules="all-linear"))
    if facts.base.fused:
        experts = sorted({ending(parameter.name) for parameter in facts.base.fused})
        return advise("this base has fused parameters instead: ", change(**_fused((), experts, facts)))
    leaves = sorted({module.leaf for module in facts.base.modules})
    return advise("this base has no linear layers; name others: ", change(target_modules=tuple(leaves[:12])))


def _experts(lost: list[NameMatch], facts: ConfigFacts) -> list[str]:
    """The fused parameters that the lost names are about: those of these names, else all of them."""
    fused = sorted({ending(parameter.name) for parameter in facts.base.fused})
    leaves = {match.name.rpartition(".")[2] for match in lost}
    same = [name for name in fused if name.rpartition(".")[2] in leaves]
    about_experts = any(_is_of_experts(match.name) for match in lost)
    return same or (fused if about_experts else [])


def _fused(kept: tuple[str, ...], experts: list[str], facts: ConfigFacts) -> dict[str, object]:
    known = without(facts.names_of("target_parameters"), *experts)
    return {"target_modules": kept or [], **on_parameters(facts.settings, (*known, *experts))}


def _parameters_fix(lost: list[NameMatch], facts: ConfigFacts) -> Advice:
    fused = sorted({ending(parameter.name) for parameter in facts.base.fused})
    kept = without(facts.names_of("target_parameters"), *(match.name for match in lost))
    if fused:
        return advise(change("use", target_parameters=tuple(dict.fromkeys((*kept, *fused)))))
    fields: dict[str, object] = {"target_parameters": kept}
    if not kept and not facts.settings.target_modules:
        fields["target_modules"] = "all-linear"
    return advise("this base stacks no weights; name its modules in target_modules: ", change(**fields))


def _meant(match: NameMatch, facts: ConfigFacts) -> list[str]:
    """Names of modules instead of one that matches nothing: less what PEFT or a file adds to it, or alike."""
    bare = re.sub(r"\.(weight|bias|lora_[AB])$", "", match.name.removeprefix("base_model.model."))
    if bare != match.name and any(is_named(module, bare) for module in facts.base.module_names):
        return [bare]
    known = facts.names_of("target_modules")
    return [name for name in match.similar if name not in known][:1]


def _text_fix(text: str, facts: ConfigFacts) -> Advice:
    """What to write instead of a string, which PEFT reads as a regular expression for the whole name."""
    if _is_all_linear(text):
        return _any(facts) if text == "all-linear" else advise(change("write", target_modules="all-linear"))
    leaves = _linear(facts)
    names = [name for name in re.split(r"[\s|,;()\[\]'\"]+", text) if name]
    if all(re.fullmatch(r"[\w.]+", name) for name in names):
        known = [n for n in names if any(is_named(m, n) for m in facts.base.module_names)]
        known = known or [close for n in names for close in get_close_matches(n, leaves, n=1)]
        if known:
            plain = change("write", target_modules=tuple(dict.fromkeys(known)))
            return advise("a string is a regular expression for the whole name; for plain names ", plain)
    if pattern := dict(facts.repairs.fitting).get(text):
        mended = change(target_modules=pattern)
        return advise("a string is a regular expression for the whole name: ", mended)
    words = [word for word in re.findall(r"[A-Za-z]\w+", re.sub(r"\\\w", " ", text)) if word in leaves]
    if words:
        named = change(target_modules=tuple(words))
        return advise("the pattern fits no whole name; name modules instead: ", named)
    return advise("the pattern fits no whole name; ", _any(facts))


def _joined(patterns: list[str], names: tuple[str, ...], facts: ConfigFacts) -> Change | Advice:
    """Patterns of a list and the names beside them as one regular expression, as far as they match."""
    fitting = dict(facts.repairs.fitting)
    repaired = [fitting[text] for text in patterns if text in fitting]
    plain = [rf"(.*\.)?({'|'.join(map(re.escape, names))})"] if names else []
    return change(target_modules="|".join((*plain, *repaired))) if repaired or plain else _any(facts)
