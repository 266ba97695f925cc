from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA333", severity="warning", needs=TrainingFacts)
def dropout_is_live_in_evaluation(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """Dropout is active while the model is evaluated.

    ## What it does
    With `Expect(purpose="eval")` or `"inference"`, looks for dropouts above zero in training mode.

    ## Why is this bad?
    Evaluation then differs from run to run, and is worse than the model.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["q_proj"]))
    report = check_training(model, batch, expect=Expect(purpose="eval"))
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["q_proj"]))
    report = check_training(model.eval(), batch, expect=Expect(purpose="eval"))
    ```

    ## References
    - https://github.com/huggingface/peft/issues/2438
    """
    if facts.dropouts and expect.purpose != "train":
        yield Violation(
            where=grouped(facts.dropouts),
            observed=f"the model is for {expect.purpose}, but dropout is active: these modules are in training mode",
            expected="evaluation mode while evaluating",
            fix="call model.eval() before evaluating",
        )
