from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.rules import Violation, rule


@rule("LORA118", severity="error", needs=ConfigFacts)
def frozen_by_inference_mode(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """inference_mode=True makes an adapter that is frozen from the start.

    ## What it does
    Looks for `inference_mode=True` in a configuration that is meant for training.

    ## Why is this bad?
    Every saved adapter_config.json says `inference_mode: true`. Used for a new run, it gives zero
    trainable parameters.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], inference_mode=True)
    report = check_config(config, base)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    report = check_config(config, base)
    ```

    ## References
    - https://github.com/huggingface/transformers/issues/24463
    """
    if facts.settings.inference_mode and not facts.live and expect.purpose == "train":
        yield Violation(
            where="inference_mode",
            observed="inference_mode=True: the adapter is made frozen, with 0 trainable parameters",
            expected="inference_mode=False where the adapter is to be trained",
            fix=advise(
                change("set", inference_mode=False),
                ", or load with PeftModel.from_pretrained(..., is_trainable=True) to go on training a saved adapter",
            ),
        )
