from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA332", severity="warning", needs=TrainingFacts)
def training_in_eval_mode(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """The model trains in evaluation mode, so that the LoRA dropout does nothing.

    ## What it does
    Looks for a configured `lora_dropout` above zero that is in evaluation mode on every module.

    ## Why is this bad?
    `PeftModel.from_pretrained` and an evaluation pass leave the model in evaluation mode. Nothing fails:
    the dropout that was asked for does not happen, and the adapter overfits.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["q_proj"]))
    model.eval()
    report = check_training(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["q_proj"]))
    model.train()
    report = check_training(model, batch)
    ```

    ## References
    - https://github.com/huggingface/transformers/issues/24463
    """
    off = facts.lora_dropout > 0 and not any(layer.dropout_live for layer in facts.model.active_layers)
    if off and expect.purpose == "train":
        yield Violation(
            where="model.training" if not facts.model.training else "the lora_dropout modules",
            observed=f"lora_dropout={facts.lora_dropout:g} is configured, but the model is in eval mode: "
            "dropout is inactive while training",
            expected="training mode while training",
            fix="call model.train() before the training loop, and after each evaluation",
        )
