from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.rules import Violation, rule


@rule("LORA212", severity="error", needs=ModelFacts)
def saved_copy_has_another_shape(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """A modules_to_save copy has other shapes than the module it stands for.

    ## What it does
    Compares the shapes of each copy with those of the original module.

    ## Why is this bad?
    The saved adapter cannot be loaded on the base it came from ("size mismatch"). It happens when a
    vocabulary or a number of labels is changed after the adapter was made: only one of the two is resized.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(base, config)
    model.base_model.model.lm_head.modules_to_save["default"] = nn.Linear(64, 136, bias=False)
    report = check_model(model)
    ```

    ## Use instead
    ```python
    base.resize_token_embeddings(136)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model = get_peft_model(base, config)
    report = check_model(model)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/troubleshooting#extending-the-vocabulary
    """
    for copy in facts.saved:
        if copy.shape != copy.original_shape:
            yield Violation(
                where=copy.module,
                observed=f"the modules_to_save copy of adapter {copy.adapter!r} has shape {copy.shape}, "
                f"the original {copy.original_shape}",
                expected="the same shapes in the copy and in the original",
                fix="resize the base (resize_token_embeddings, num_labels) before get_peft_model",
            )
