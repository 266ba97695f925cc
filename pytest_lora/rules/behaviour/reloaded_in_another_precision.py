from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.behaviour import ReloadFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA913", severity="warning", needs=ReloadFacts)
def reloaded_in_another_precision(facts: ReloadFacts, expect: Expect) -> Iterator[Violation]:
    """A saved adapter loads in another dtype.

    ## What it does
    Compares the dtype of every tensor of the adapter before saving and after loading, where the values are
    equal.

    ## Why is this bad?
    The arithmetic is another one: outputs and further training differ a little from those that were
    evaluated.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16().float().half()
    report = check_reload(model.half(), {"input_ids": batch["input_ids"]})
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_reload(model, batch)
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/peft_model#peft.PeftModel.from_pretrained
    """
    if facts.recast and facts.dtypes is not None:
        before, after = facts.dtypes
        yield Violation(
            where=grouped(facts.recast),
            observed=f"saved as {before}, loaded as {after}: the values are the same, the arithmetic is not",
            expected="one precision in training and in use",
            fix="cast the loaded adapter back, or train it in float32 (autocast_adapter_dtype=True)",
        )
