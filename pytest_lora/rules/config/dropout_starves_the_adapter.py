from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.rules import Violation, rule


@rule("LORA121", severity="warning", needs=ConfigFacts)
def dropout_starves_the_adapter(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """lora_dropout drops so much that the adapter can hardly learn.

    ## What it does
    Looks for a LoRA dropout above `Expect.max_dropout`, and below zero.

    ## Why is this bad?
    Dropout acts on the input of `lora_A`. At 1.0 the adapter never sees anything and gets no gradient;
    far above the usual 0.05 to 0.1 it learns from noise. Often a keep probability was meant. A negative one
    drops nothing, and PEFT says nothing of it.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.9)
    report = check_config(config, base)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    report = check_config(config, base)
    ```

    ## References
    - QLoRA, appendix B: https://arxiv.org/abs/2305.14314
    """
    dropout = facts.settings.lora_dropout
    if dropout < 0:
        yield Violation(
            where="lora_dropout",
            observed=f"lora_dropout={dropout:g} is no probability; nothing is dropped",
            expected="a probability from 0 to 1",
            fix=advise(change("set", lora_dropout=0), " for none, or ", change(lora_dropout=0.05)),
        )
    if dropout > expect.max_dropout and expect.purpose == "train":
        yield Violation(
            where="lora_dropout",
            observed=f"lora_dropout={dropout:g} drops {dropout:.0%} of the adapter's input",
            expected=f"at most {expect.max_dropout:g}; 0 to 0.1 is usual",
            fix=advise(
                change("set", lora_dropout=float(f"{1 - dropout:.2g}")), ", if that share was to be kept"
            )
            if dropout < 1
            else change("set", lora_dropout=0.05),
            severity="error" if dropout >= 1 else "warning",
        )
