from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CheckpointFacts
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import TO_PEFT

_FOR_PIPELINES = ("diffusers", "kohya-ss")
"""Formats that a pipeline of diffusers reads as they are."""


@rule("LORA415", severity="info", needs=CheckpointFacts)
def adapter_is_of_another_method(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """The adapter is none of PEFT's LoRA, and was not judged.

    ## What it does
    Recognises other methods of PEFT by peft_type, and the adapters of mlx-lm, AdapterHub, torchtune, diffusers and
    kohya-ss by their configuration, keys and file names, and says how to convert them. Where peft_type names another
    method, but all tensors are lora_A and lora_B, that is a warning, and so are formats that PEFT cannot read. With
    `Expect(serve=...)` they are errors, and adapters of mlx-lm are sound for mlx.

    ## Why is this bad?
    By itself it is not: their keys and shapes follow rules of their own, so that nothing is said about them.
    Damaged files and NaN are found in them as well. Under the peft_type of another method, LoRA factors match
    nothing: PEFT makes a fresh adapter of that method, or knows no such method and raises.

    ## Example
    ```python
    path = adapter()
    configure(path, peft_type="ADALORA")
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter())
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/peft_types
    - https://huggingface.co/docs/diffusers/using-diffusers/other-formats
    """
    if facts.contradicts_method and facts.config is not None:
        yield Violation(
            where=f"peft_type in {facts.name}",
            observed=f"peft_type is {facts.config.peft_type}, but all {len(facts.tensors)} tensors are lora_A and "
            "lora_B: they match nothing of that method and would not be loaded",
            expected="the method that made the tensors: LORA",
            fix="restore the adapter_config.json that the adapter was trained with, with peft_type='LORA'",
            severity="warning",
        )
    elif facts.origin == "mlx-lm" and expect.serve == "mlx":
        return
    elif facts.origin:
        yield Violation(
            where=facts.name,
            observed=f"this is an adapter of {facts.origin}, which PEFT cannot load: nothing else was judged",
            expected="an adapter of PEFT",
            fix=TO_PEFT[facts.origin],
            severity="error" if expect.serve else "info" if facts.origin in _FOR_PIPELINES else "warning",
        )
    elif facts.other_method:
        yield Violation(
            where=facts.name,
            observed=f"{facts.other_method}: keys and shapes were not judged",
            expected="an adapter of peft_type LORA",
            fix="nothing, if this is what it should be",
        )
