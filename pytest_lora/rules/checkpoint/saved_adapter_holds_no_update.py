from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CheckpointFacts
from pytest_lora.facts.saved_tensors import AdaptedModule
from pytest_lora.findings import Severity, grouped, starred
from pytest_lora.rules import Violation, rule


@rule("LORA442", severity="error", needs=CheckpointFacts)
def saved_adapter_holds_no_update(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """The factors of a saved adapter are zero, so that it changes nothing.

    ## What it does
    Looks for modules of which one factor is all zero (usually lora_B, which starts at zero). Under
    `Expect(fresh=True)` that is meant. Layers at zero beside trained layers of the same kind, and targets at zero
    beside trained targets of the same block, are a warning. So are heads and embeddings in the file whose
    weights are all zero. A folder `ref` or `reference` in that of an adapter is an info: TRL's preference trainers
    keep the start of the policy there.

    ## Why is this bad?
    The adapter was saved before training, or training did not reach it: the optimizer did not hold it, another
    copy was trained, or the forward pass takes the weight of a target without calling the module. Whole
    matrices of zeros are parts that were not gathered.

    ## Example
    ```python
    path = adapter()
    edit(path, lambda tensors: {k: v * 0 if "lora_B" in k else v for k, v in tensors.items()})
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter())
    ```

    ## References
    - https://github.com/huggingface/peft/issues/793
    - https://github.com/huggingface/peft/issues/1402
    """
    if not facts.is_judged or expect.fresh is True:
        return
    yield from _empty_weights(facts)
    whole = [
        m
        for m in facts.adapted
        if m.a and m.b and 0 not in m.a.shape + m.b.shape and m.a.values and m.b.values
    ]
    dead = [m for m in whole if m.holds_nothing]
    if not dead:
        return
    if facts.is_reference:
        yield _of_a_reference(dead)
        return
    kind: Severity | None = None
    if len(dead) < len(whole):
        alive = {starred(m.name) for m in whole if not m.holds_nothing}
        blocks = {_block(m.name) for m in whole if not m.holds_nothing} - {""}
        beside = [m for m in dead if starred(m.name) in alive or _block(m.name) in blocks]
        unused = all(any(part in m.name for part in _LEFT_OUT) for m in beside)
        kind = "info" if unused else "warning"
    part = dead[0].zero_parts[0]
    effect = "the modules give out zero" if "magnitude" in part else "the adapter changes nothing there"
    yield Violation(
        where=grouped(m.name for m in dead),
        observed=f"{part} is all zero in {len(dead)} of {len(whole)} modules: {effect}",
        expected="trained values",
        fix="check that the optimizer held the adapter and that the trained copy was saved, then train and save again",
        severity=kind,
    )


def _of_a_reference(dead: list[AdaptedModule]) -> Violation:
    return Violation(
        where=grouped(m.name for m in dead),
        observed=f"{dead[0].zero_parts[0]} is all zero, as in the reference that a training from a new adapter keeps",
        expected="the trained adapter to be loaded from the folder around this one",
        fix="load the folder around this one; this one changes nothing",
        severity="info",
    )


_LEFT_OUT = ("expert", "vision", "visual", "image", "audio")
"""Parts that a training may never have run: experts that no token went to, towers without inputs, and the last layers
of a tower of which an inner layer is used (``vision_feature_layer``)."""


def _block(module: str) -> str:
    """The part of a numbered layer that a module stands in, beside its like; empty outside of layers."""
    around = module.rpartition(".")[0]
    return around if any(part.isdigit() for part in around.split(".")[:-1]) else ""


def _empty_weights(facts: CheckpointFacts) -> Iterator[Violation]:
    zero = [t for t in facts.plain if len(t.shape) > 1 and t.numbers and t.values and t.values.zero]
    matrices = [t for t in zero if "token_adapter" not in t.name]
    if matrices:
        yield Violation(
            where=grouped(facts.key(t).module for t in matrices),
            observed=f"{len(matrices)} of {len(facts.plain)} weights that are saved in full are all zero",
            expected="the weights of the head or embedding that was trained",
            fix="gather the weights before saving, and save again; load_state_dict of these zeros would replace what "
            "the base has",
            severity="warning",
        )
