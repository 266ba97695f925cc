from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA241", severity="error", needs=ModelFacts)
def adapter_was_wiped(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """A hot-swap of one adapter wiped another one whose name begins alike.

    ## What it does
    Looks for adapters of which both factors are all zero everywhere, which no initialisation makes, beside an
    adapter that holds something and whose name is a part of theirs.

    ## Why is this bad?
    `hotswap_adapter` zeroes the old weights that the new file does not have, and finds them by the adapter's name
    anywhere in their key: swapping `legal` also zeroes `legal_v2`. That adapter then answers like the base.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]), adapter_name="legal")
    model.add_adapter("legal_v2", LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if ".legal_v2." in name:
            nn.init.zeros_(parameter)
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]), adapter_name="legal")
    model.add_adapter("contracts", LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## References
    - https://github.com/huggingface/peft/issues/3780
    - https://huggingface.co/docs/peft/package_reference/hotswap
    """
    for adapter, namesake in facts.wiped:
        layers = facts.of(adapter)
        yield Violation(
            where=grouped(layer.module for layer in layers),
            observed=f"lora_A and lora_B of {adapter!r} are all zero in each of its {len(layers)} modules, and the "
            f"name of {namesake!r} is a part of its name: a hot-swap of {namesake!r} zeroes {adapter!r} too",
            expected="adapters of which no name is a part of another's, where they are swapped",
            fix=f"call {adapter!r} something else, and load it again",
        )
