from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.base import BaseFacts
from pytest_lora.facts.checkpoint import CheckpointFacts
from pytest_lora.facts.saved_tensors import AdaptedModule
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import name_in_keys


@rule("LORA451", severity="error", needs=CheckpointFacts)
def base_is_foreign(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """The adapter is for another kind of base model.

    ## What it does
    Looks whether any adapted module of the file exists in the base. One that was made on the same model with or
    without its head is an info where transformers' own `load_adapter` reads it.

    ## Why is this bad?
    Not one tensor finds its place: PEFT raises, or loads nothing.

    ## Example
    ```python
    path = adapter()
    report = check_checkpoint(path, gpt2_base)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter(), base)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/checkpoint
    """
    if not facts.is_judged or facts.fit is None or not facts.is_foreign:
        return
    held = grouped(m.name for m in facts.adapted)
    named = facts.config.base if facts.config else None
    meant = (
        f"load it on {named!r}, which its configuration names"
        if named
        else "load it on the base it was trained on"
    )
    if facts.fit.read_by_load_adapter:
        yield Violation(
            where=facts.fit.base.architecture,
            observed="the adapter was made on this model with its head, or without it: model.load_adapter of "
            f"transformers finds every module ({held}), and PeftModel.from_pretrained finds none",
            expected="the base that the adapter was trained on, or load_adapter",
            fix="load it with model.load_adapter, or on the class that it was trained on",
            severity="info",
        )
        return
    if renamed := _renamed(facts.adapted[0], facts.fit.base):
        meant = f"the base calls it {renamed!r}: if this is the same model, rename the keys; else {meant}"
    yield Violation(
        where=facts.fit.base.architecture,
        observed=f"no adapter key matches this base: not one of the adapted modules exists in it ({held})",
        expected="the base that the adapter was trained on",
        fix=name_in_keys(facts) or meant,
    )


def _renamed(module: AdaptedModule, base: BaseFacts) -> str | None:
    """The module of the base at the same place of a block, under another path: of several the one of its sizes."""
    parts = module.name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if not number:
        return None
    ending = "." + ".".join(parts[number - 1 :])
    there = [name for name in base.module_names if f".{name}".endswith(ending)]
    inputs = module.a.shape[-1:] if module.a is not None else ()
    outputs = module.b.shape[:1] if module.b is not None else ()
    sizes = {known.name: (known.in_features, known.out_features) for known in base.modules}
    alike = (name for name in there if sizes.get(name) == (*inputs, *outputs))
    return next(alike, there[0] if len(there) == 1 else None)
