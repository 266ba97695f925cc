from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import Change, advise, noun
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts, LayerFacts
from pytest_lora.facts.settings import Settings
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA126", severity="error", needs=ConfigFacts, on_saved="alone")
def differs_from_expected_config(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """What is there differs from the configuration that was meant.

    ## What it does
    Needs `Expect(config=...)`. Compares the rank and alpha of every adapted module (patterns applied),
    the targets, rsLoRA, DoRA and dropout with it.

    ## Why is this bad?
    A script that overrides a field, an adapter that was loaded instead of made, or a stale config file
    trains something else than what was decided.

    ## Example
    ```python
    config = LoraConfig(r=16, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    meant = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    report = check_config(config, base, expect=Expect(config=meant))
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    meant = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    report = check_config(config, base, expect=Expect(config=meant))
    ```

    ## References
    - https://github.com/huggingface/peft/issues/1746
    """
    if expect.config is None:
        return
    meant = Settings.of(expect.config)
    for name, seen, wanted, modules in (*_values(facts, meant), *_targets(facts, meant)):
        yield Violation(
            where=grouped(modules) if modules else f"LoraConfig on {facts.base.architecture}",
            observed=f"{name} is {seen}",
            expected=f"{name} {wanted}, as in the expected config",
            fix=advise(
                "make the adapter with ",
                _decided(name, meant),
                "; LoRA shapes and scalings are fixed when it is made",
            ),
        )


_DECIDED_BY = {
    "r": ("r", "rank_pattern"),
    "lora_alpha": ("lora_alpha", "alpha_pattern"),
    "target_modules": ("target_modules", "exclude_modules", "layers_to_transform"),
}
"""The fields that decide one difference together."""


def _decided(name: str, meant: Settings) -> Change:
    """The fields of the expected config, less what is empty there."""
    first, *more = _DECIDED_BY.get(name, (name,))
    fields = {first: getattr(meant, first)}
    for field in more:
        value = getattr(meant, field)
        fields[field] = dict(value) if field.endswith("pattern") else value
    return noun(**fields)


Difference = tuple[str, object, object, list[str]]


def _values(facts: ConfigFacts, meant: Settings) -> Iterator[Difference]:
    def differing(name: str, seen: str, wanted: str) -> Iterator[Difference]:
        pairs: dict[tuple[object, object], list[str]] = {}
        for layer in facts.layers:
            pair = _of(layer, seen), _of_settings(meant, wanted, layer.module)
            if pair[0] != pair[1]:
                pairs.setdefault(pair, []).append(layer.module)
        yield from ((name, got, want, modules) for (got, want), modules in pairs.items())

    yield from differing("r", "rank", "rank_of")
    yield from differing("lora_alpha", "alpha", "alpha_of")
    yield from differing("use_rslora", "use_rslora", "use_rslora")
    yield from differing("use_dora", "use_dora", "use_dora")
    yield from differing("lora_dropout", "dropout", "lora_dropout")


def _of(layer: LayerFacts, name: str) -> object:
    value: object = getattr(layer, name)
    return value


def _of_settings(meant: Settings, name: str, module: str) -> object:
    value = getattr(meant, name)
    return value(module) if callable(value) else value


def _targets(facts: ConfigFacts, meant: Settings) -> Iterator[Difference]:
    wanted = facts.would_adapt(meant)
    if wanted is None:
        return
    inside_attention = tuple(f"{m.module}." for m in facts.layers if m.kind == "MultiheadAttention")
    adapted = {m.module for m in facts.layers if m.kind != "Parameter"}
    extra = sorted(m for m in adapted - wanted if not m.startswith(inside_attention or ("\0",)))
    if missing := sorted(wanted - adapted):
        yield "target_modules", "without an adapter", "including these modules", missing
    if extra:
        yield "target_modules", "wider than meant: these modules are adapted", "without these modules", extra
