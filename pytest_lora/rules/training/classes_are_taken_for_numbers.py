from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule

YES_OR_NO = {0, 1}
"""Classes that cannot be ratings as well; other whole numbers, such as stars from 1 to 5, can."""


@rule("LORA376", severity="warning", needs=TrainingFacts)
def classes_are_taken_for_numbers(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """Class numbers are labels of a model with one output, which fits a line to them.

    ## What it does
    Looks at labels of a whole dtype where `num_labels` is 1 and no `problem_type` is set, so that transformers
    takes the mean squared error. Labels of 0 and 1 alone are a warning; other whole numbers, which may be ratings, are
    an info. Floats say that numbers are meant.

    ## Why is this bad?
    The model learns a number between the classes and not which one it is: an arg-max over one output is class 0
    always, and the accuracy is the share of that class.

    ## Example
    ```python
    from transformers import LlamaConfig, LlamaForSequenceClassification
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=96, num_labels=1, pad_token_id=0, **sizes)
    targets = ["q_proj", "v_proj"]
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="SEQ_CLS")
    model = get_peft_model(LlamaForSequenceClassification(config), adapter)
    batch["input_ids"] %= 96
    batch["labels"] = torch.arange(4) % 2
    report = check_training(model, batch)
    ```

    ## Use instead
    ```python
    from transformers import LlamaConfig, LlamaForSequenceClassification
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=96, num_labels=2, pad_token_id=0, **sizes)
    targets = ["q_proj", "v_proj"]
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="SEQ_CLS")
    model = get_peft_model(LlamaForSequenceClassification(config), adapter)
    batch["input_ids"] %= 96
    batch["labels"] = torch.arange(4) % 2
    report = check_training(model, batch)
    ```

    ## References
    - https://huggingface.co/docs/transformers/main_classes/configuration (num_labels, problem_type)
    """
    values = sorted({value for found in facts.whole_targets for value in found.values})
    if values and min(values) >= 0:
        classes = max(values) + 1
        sure = set(values) <= YES_OR_NO
        yield Violation(
            where=f"labels of a {facts.model.base.architecture} with num_labels=1",
            observed=f"whole numbers ({_shown(values)}) are fitted as numbers by the mean squared error",
            expected="an output a class, or floats where numbers are meant",
            fix=f"load the base with {max(2, classes)} labels (num_labels), or give labels as floats where they are "
            "numbers that mean something",
            severity=None if sure else "info",
        )


def _shown(values: list[int]) -> str:
    return ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")
