from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import Advice, advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.base import HEADS_BY_TASK_TYPE
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.facts.settings import is_named
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import without


@rule("LORA112", severity="warning", needs=ConfigFacts)
def new_head_is_not_trained(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """The task head is new, and the configuration neither trains nor saves it.

    ## What it does
    For classes such as `...ForSequenceClassification`, looks whether the head is in `modules_to_save`
    (PEFT adds it by itself for some task types, if it is called `classifier`, `score` or `qa_outputs`; that of T5
    and BART is a `classification_head`). So for a layer with one output that reward and value models of
    one's own call `v_head`, `value_head`, `reward_head` or `score`. A head whose values are no longer those of the
    initialisation is taken as trained elsewhere, and so is one under `Expect(pretrained_head=True)`.

    ## Why is this bad?
    The head starts at random values. If it is frozen, nothing above chance can be learned; if only a
    LoRA on it is trained, the random values below are not in the adapter file, and the reloaded model
    answers differently every time.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    report = check_config(config, classifier_base)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    report = check_config(config, classifier_base)
    ```

    ## References
    - https://github.com/huggingface/peft/issues/876
    - https://github.com/huggingface/peft/issues/577
    """
    if expect.pretrained_head or expect.purpose == "inference" or facts.refusal is not None:
        return
    for head in facts.base.heads:
        if head.fresh is False or facts.keeps(head.name):
            continue
        adapted = any(
            layer.module == head.name or layer.module.startswith(f"{head.name}.") for layer in facts.layers
        )
        state = "is a LoRA target, but its own random weight is never saved" if adapted else "stays frozen"
        yield Violation(
            where=f"{head.name} on {facts.base.architecture}",
            observed=f"the head {head.name!r} is new and not in modules_to_save: it {state}",
            expected="a new head to be trained in full and saved with the adapter",
            fix=_fix(head.name, facts),
            severity="warning" if head.fresh else "info",
        )


def _fix(head: str, facts: ConfigFacts) -> Advice:
    settings = facts.settings
    fields: dict[str, object] = {"modules_to_save": tuple(dict.fromkeys((*settings.modules_to_save, head)))}
    if isinstance(settings.target_modules, tuple):
        rest = without(settings.target_modules, *(n for n in settings.target_modules if is_named(head, n)))
        if rest and rest != settings.target_modules:
            fields["target_modules"] = rest
    # PEFT does not know of every head by its name: not of the pooler of DeBERTa, or the projector of Hubert.
    task_type = facts.base.fitting_task_type
    adds = settings.task_type != task_type and head in HEADS_BY_TASK_TYPE.get(task_type or "", ())
    by_task_type = (
        (", or ", change(task_type=task_type), ", which adds it") if adds and len(fields) == 1 else ()
    )
    return advise(change("set", **fields), *by_task_type)
