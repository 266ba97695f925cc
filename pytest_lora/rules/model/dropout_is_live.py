from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA219", severity="error", needs=ModelFacts)
def dropout_is_live(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """Dropout is in training mode although the model is to be evaluated.

    ## What it does
    For the purposes "eval" and "inference": looks for LoRA and base dropouts above zero in training mode.

    ## Why is this bad?
    Two identical calls give different answers, and scores vary from run to run. `get_peft_model` and
    `add_adapter` leave new dropout layers in training mode even on a base that is in eval mode.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], lora_dropout=0.1)
    model = get_peft_model(base.eval(), config)
    report = check_model(model, expect=Expect(purpose="inference"))
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], lora_dropout=0.1)
    model = get_peft_model(base.eval(), config)
    model.eval()
    report = check_model(model, expect=Expect(purpose="inference"))
    ```

    ## References
    - https://github.com/huggingface/peft/issues/3753
    - https://docs.pytorch.org/docs/stable/generated/torch.nn.Dropout.html
    """
    if expect.purpose == "train":
        return
    live = [
        layer for layer in facts.active_layers if layer.dropout_live and not (layer.disabled or layer.merged)
    ]
    if live or facts.base_dropouts:
        lora = f"LoRA dropout p={live[0].dropout:g} in {len(live)} modules" if live else ""
        base = f"dropout of the base in {len(facts.base_dropouts)} modules" if facts.base_dropouts else ""
        yield Violation(
            where=grouped([*(layer.module for layer in live), *facts.base_dropouts]),
            observed=f"{' and '.join(filter(None, (lora, base)))} is in training mode, for purpose "
            f"{expect.purpose!r}",
            expected="every dropout in eval mode, so that equal inputs give equal outputs",
            fix="call model.eval() after the adapter was added and before evaluating",
        )
