from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.facts.settings import rewrites_base
from pytest_lora.facts.steps import BaseChange
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA330", severity="error", needs=TrainingFacts, because_of=["base_is_trainable"])
def base_weights_change(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """Weights of the base change while only the adapter should.

    ## What it does
    Compares weights of the base after the steps with those before, and with `base_snapshot` where one is
    given. Trained biases, and norms, embeddings or heads that train on purpose, are no error. Adapted weights in half
    precision that drifted since the snapshot by more than one merge and unmerge explains are a warning.

    ## Why is this bad?
    The adapter file holds the adapter alone. On the base as it was published the saved adapter then gives
    other results than in training, and memory and time are those of full fine-tuning.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.requires_grad_(True)
    report = check_training(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_training(model, batch)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/checkpoint
    """
    by_design = _rewritten_by_initialisation(facts)
    frozen: list[BaseChange] = []
    trained: list[BaseChange] = []
    others: list[BaseChange] = []
    drifted: list[BaseChange] = []
    for change in facts.changes:
        if (
            change.kind == "buffer"
            or change.relative <= ROUNDING * change.precision
            or expect.purpose != "train"
        ):
            if _has_drifted(change) and expect.purpose == "train" and not by_design:
                drifted.append(change)
            continue
        if change.adapted and change.since == "snapshot" and by_design:
            continue
        if change.trainable and change.name.endswith("bias") and _trains_biases(facts):
            continue
        if not change.trainable:
            frozen.append(change)
        else:
            (trained if change.adapted else others).append(change)
    if drifted and not frozen:
        yield Violation(
            where=grouped(dict.fromkeys(change.name for change in drifted)),
            observed=f"frozen weights under the adapter drifted since base_snapshot, by up to "
            f"{100 * max(change.relative for change in drifted):.2g} %: each merge_adapter() and unmerge_adapter() of "
            "weights in half precision leaves rounding errors behind, and they add up as the adapter trains",
            expected="the weights of the base, bit for bit",
            fix="merge a copy, keep the base weights and put them back after each merge, or hold the adapted base "
            "weights in float32; save the base along with this adapter",
            severity="warning",
        )
    for changes in (frozen, trained, others):
        if changes:
            worst = max(changes, key=lambda change: change.relative)
            since = "since base_snapshot" if worst.since == "snapshot" else "in the steps taken here"
            # A snapshot says that the base is to stay put; else a module may be trained in full on purpose.
            meant = changes is others and worst.since != "snapshot"
            yield Violation(
                where=grouped(dict.fromkeys(change.name for change in changes)),
                observed=f"weights of the base changed {since}, by up to {100 * worst.relative:.2g} %"
                + ("" if changes is frozen else f"; {len(changes)} of them have requires_grad=True"),
                expected="frozen base weights; what is to train beside the adapter, in modules_to_save",
                fix="unmerge adapters, and load the base anew" if changes is frozen else _freeze(facts.model),
                severity="info" if meant else "error",
                by_itself=changes is frozen,
            )


ROUNDING = 8
"""Merging and unmerging an adapter leaves rounding errors of a few units in the last place."""

ONE_MERGE = 1.0
"""In machine epsilons, what one merge and unmerge leaves of a weight at most: rounding the merged weight and the
restored one each errs by at most half of one where the update is no larger than the weight. Errors of merges of the
same adapter do not add up; those of an adapter that trains between them do (huggingface/trl#6688)."""


def _has_drifted(change: BaseChange) -> bool:
    """Whether a frozen, adapted weight in half precision is off by more than one merge explains."""
    return (
        change.kind == "weight"
        and change.adapted
        and not change.trainable
        and change.since == "snapshot"
        and change.precision > 1e-4
        and change.relative > ONE_MERGE * change.precision
    )


def _trains_biases(facts: TrainingFacts) -> bool:
    return any(config.settings.bias != "none" for config in facts.model.configs)


def _rewritten_by_initialisation(facts: TrainingFacts) -> bool:
    """Whether an initialisation takes the adapter out of the base weights, as PiSSA, OLoRA, CorDA and LoftQ do."""
    return any(rewrites_base(config.settings.init_lora_weights) for config in facts.model.configs)


def _freeze(model: ModelFacts) -> str:
    again = (
        f" and make the adapter trainable again with model.set_adapter({model.active[0]!r})"
        if model.active
        else ""
    )
    return f"freeze the base, as get_peft_model does: model.requires_grad_(False){again}"
