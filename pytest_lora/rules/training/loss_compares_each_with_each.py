from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.rules import Violation, rule


@rule("LORA388", severity="error", needs=TrainingFacts)
def loss_compares_each_with_each(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """A loss compares every prediction with every label.

    ## What it does
    Listens to torch's warning that a target has another size than what is compared with it, while the first loss is
    made, and looks whether both are spread: `[4, 1]` and `[4]` become `[4, 4]`. A number or a row that is spread over
    all others on purpose is no finding.

    ## Why is this bad?
    Each row is drawn to the labels of all others, so that the best prediction is their mean: the loss falls to the
    variance of the labels and stays there, and the model gives about the same for every text.

    ## Example
    ```python
    def scored(model, batch):
        scores = model(batch["input_ids"]).logits[:, -1, :1]
        return nn.functional.mse_loss(scores, torch.arange(4.0))

    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_training(model, batch, loss_fn=scored)
    ```

    ## Use instead
    ```python
    def scored(model, batch):
        scores = model(batch["input_ids"]).logits[:, -1, 0]
        return nn.functional.mse_loss(scores, torch.arange(4.0))

    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_training(model, batch, loss_fn=scored)
    ```

    ## References
    - https://github.com/deepset-ai/FARM/issues/229
    """
    for one in dict.fromkeys(facts.spread):
        yield Violation(
            where="loss_fn" if facts.custom_loss else "the loss of the model",
            observed=f"predictions of shape {list(one.given)} are compared with labels of shape {list(one.target)}: "
            "torch spreads both, and compares each with each",
            expected="predictions and labels of one shape",
            fix="give both one shape, such as predictions.squeeze(-1) for labels of one number a row",
        )
