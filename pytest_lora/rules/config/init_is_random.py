from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.rules import Violation, rule


@rule("LORA116", severity="warning", needs=ConfigFacts)
def init_is_random(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """init_lora_weights=False: the adapter starts as random noise on the base.

    ## What it does
    Looks for `init_lora_weights=False` in a configuration that is going to be trained.

    ## Why is this bad?
    Both factors are random, so that the model is damaged before the first step. PEFT has this for its
    own tests.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    report = check_config(config, base)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    report = check_config(config, base)
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/lora#peft.LoraConfig.init_lora_weights
    """
    if facts.settings.init_lora_weights is False and not facts.live and expect.purpose == "train":
        yield Violation(
            where="init_lora_weights",
            observed="init_lora_weights=False: lora_A and lora_B both start at random",
            expected="an initialisation under which a fresh adapter leaves the base as it is",
            fix=advise(change("set", init_lora_weights=True), ", the default"),
        )
