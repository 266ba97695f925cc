from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.rules import Violation, rule


@rule("LORA122", severity="warning", needs=ConfigFacts, on_saved="with_base")
def task_type_contradicts_the_model(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """task_type is that of another kind of model.

    ## What it does
    Compares `task_type` with the class of the base. Where PEFT refuses the combination it is an error. A model that
    takes no `input_ids` (speech, images) needs none: the classes that PEFT has for tasks hand them on.

    ## Why is this bad?
    PEFT chooses its wrapper, the head to save and how generation works by the task type. With that of
    another kind of model a head is not saved, or `generate` and the loss do not work as they should.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    report = check_config(config, base)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    report = check_config(config, base)
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/peft_types#peft.TaskType
    - https://github.com/huggingface/peft/issues/1988
    """
    written, fits = facts.settings.task_type, facts.base.fitting_task_type
    if written is not None and not facts.base.takes_input_ids:
        yield Violation(
            where=f"task_type on {facts.base.architecture}",
            observed=f"task_type={written!r}, for which PEFT hands on input_ids; the model takes none",
            expected="no task_type on a model that takes other inputs",
            fix=advise(change("set", task_type=None)),
        )
        return
    if written in (None, "FEATURE_EXTRACTION") or fits is None or written == fits:
        return
    yield Violation(
        where=f"task_type on {facts.base.architecture}",
        observed=f"task_type={written!r} on a {facts.base.architecture}",
        expected=f"task_type={fits!r}",
        fix=advise(change("set", task_type=fits), f", or load the base as a model for {written}"),
        severity="error" if facts.refusal else "warning",
    )
