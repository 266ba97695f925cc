from __future__ import annotations

import re
from collections.abc import Iterator

from pytest_lora.changes import Advice, advise, noun
from pytest_lora.expect import Expect
from pytest_lora.facts.base import HEADS_BY_TASK_TYPE, BaseFacts
from pytest_lora.facts.checkpoint import CheckpointFacts
from pytest_lora.rules import Violation, rule


@rule("LORA427", severity="warning", needs=CheckpointFacts)
def head_is_not_in_the_file(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """The task head that the adapter was trained with is not in the file.

    ## What it does
    Where the base is of a class with a task head (by the base, or by auto_mapping in the configuration),
    looks for the head in the file. A head whose values are no longer those of the initialisation is taken
    as trained elsewhere, and so is one under `Expect(pretrained_head=True)`.

    ## Why is this bad?
    The head is new at every load: fine in memory, random after a reload.

    ## Example
    ```python
    path = adapter(on=classifier_base, task_type=None)
    report = check_checkpoint(path, classifier_base)
    ```

    ## Use instead
    ```python
    path = adapter(on=classifier_base, task_type="SEQ_CLS")
    report = check_checkpoint(path, classifier_base)
    ```

    ## References
    - https://github.com/huggingface/peft/issues/876
    - https://github.com/huggingface/transformers/issues/26160
    """
    if not facts.is_judged or not facts.lora or facts.is_foreign or expect.pretrained_head:
        return
    settings = facts.settings
    if settings is None:
        return
    if facts.fit is not None:
        heads = [h for h in facts.fit.base.heads if h.fresh is not False]
        lost = [h for h in heads if not facts.holds(h.name) and not settings.saves(h.name)]
        for head in lost:
            yield Violation(
                where=f"{head.name} of {facts.fit.base.architecture}",
                observed=f"the file has no weights of the head {head.name!r}, and it is not in modules_to_save: "
                "the head is new at every load",
                expected="the head that was trained with the adapter",
                fix=advise(
                    _again(head.name, facts.fit.base),
                    "; or, if the head comes with the base, say Expect(pretrained_head=True)",
                ),
                severity=None if head.fresh else "info",
            )
        return
    base_class = facts.config.base_class if facts.config else None
    if base_class and _HEADED.search(base_class) and not facts.plain and not settings.modules_to_save:
        yield Violation(
            where=f"head of {base_class}",
            observed=f"the adapter was trained on a {base_class}, and its head is missing in the file",
            expected="the head, where it was trained with the adapter",
            fix="train with modules_to_save or the task_type of the model; nothing, if the head comes with the base",
            severity="info",
        )


_HEADED = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice|Regression|RewardModel)")


def _again(head: str, base: BaseFacts) -> Advice:
    adds = head in HEADS_BY_TASK_TYPE.get(base.fitting_task_type or "", ())
    way = noun(task_type=base.fitting_task_type) if adds else noun(modules_to_save=[head])
    return advise("train again with ", way, f", so that {head!r} is trained and saved")
