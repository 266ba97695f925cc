from __future__ import annotations

import math
from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import unusual_inits
from pytest_lora.facts.model_parts import LayerState
from pytest_lora.facts.training import TrainingFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule

_STEPS = {
    "eva": "call initialize_lora_eva_weights(model, dataloader) behind get_peft_model",
    "lora_ga": "call preprocess_loraga(base, config, train_step) before get_peft_model",
}
"""Initialisations that PEFT leaves to a call of the user's, and that call."""


@rule("LORA385", severity="warning", needs=TrainingFacts)
def init_was_not_computed(facts: TrainingFacts, expect: Expect) -> Iterator[Violation]:
    """An initialisation that is computed from data never was, and the adapter begins at random.

    ## What it does
    Looks for adapters with `init_lora_weights="eva"` or `"lora_ga"` whose `lora_B` is zero and whose `lora_A` lies in
    the bounds of torch's random initialisation, `1 / sqrt(in_features)`. The directions of EVA have length one, which
    does not fit into these bounds, and the `lora_B` of LoRA-GA is not zero.

    ## Why is this bad?
    PEFT computes neither in `get_peft_model`: each needs a call of its own, with batches. Without it the adapter begins
    as any other, and the run is taken for one of the method that its configuration names.

    ## Example
    ```python
    from peft import EvaConfig
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights="eva", eva_config=EvaConfig()
    )
    model = get_peft_model(base, config)
    report = check_training(model, batch, ignore=["LORA338"])
    ```

    ## Use instead
    ```python
    from peft import EvaConfig, initialize_lora_eva_weights
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0)
    )
    model = get_peft_model(base, config)
    texts = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    initialize_lora_eva_weights(model, [texts] * 4, show_progress_bar=False)
    report = check_training(model, batch, ignore=["LORA338"])
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/lora#eva
    - https://huggingface.co/docs/peft/developer_guides/lora#lora-ga
    """
    for adapter, init in unusual_inits(facts.model).items():
        layers = facts.model.of(adapter)
        if init.lower() in _STEPS and layers and all(map(_is_random, layers)):
            yield Violation(
                where=grouped(layer.module for layer in layers),
                observed=f"init_lora_weights={init!r} of adapter {adapter!r} was not computed: lora_A is a random draw "
                f"in all {len(layers)} modules, and lora_B zero",
                expected=f"what {init} computes from batches",
                fix=f"{_STEPS[init.lower()]}, or leave init_lora_weights out",
            )


def _is_random(layer: LayerState) -> bool:
    bound = 1 / math.sqrt(max(1, layer.in_features))
    return layer.b.zero is True and bool(layer.a.largest) and (layer.a.largest or 0) <= bound * 1.01
