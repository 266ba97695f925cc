from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.rules import Violation, rule


@rule("LORA205", severity="error", needs=ModelFacts)
def peft_wraps_peft(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """A PEFT model is wrapped inside another PEFT model.

    ## What it does
    Counts the PEFT models around the base.

    ## Why is this bad?
    The inner adapter stays in the layers with a configuration that nobody reads any more, keys of a saved
    file carry the prefix `base_model.model` twice and fit neither wrapper, and a checkpoint loaded through
    the outer one may change nothing.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("second", LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## References
    - https://github.com/huggingface/peft/issues/2115
    - https://github.com/huggingface/peft/issues/868
    """
    if facts.nested > 1:
        yield Violation(
            where=f"{facts.nested} PEFT models around {facts.base.architecture}",
            observed=f"a PEFT model is nested inside another one ({facts.nested} wrappers)",
            expected="one PEFT model around the plain base",
            fix="wrap the plain base once; call model.load_adapter(...) or model.add_adapter(...) for another "
            "adapter, model.unload() to start anew",
        )
