from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.behaviour import ReloadFacts
from pytest_lora.rules import Violation, rule


@rule("LORA910", severity="error", needs=ReloadFacts)
def reloaded_output_differs(facts: ReloadFacts, expect: Expect) -> Iterator[Violation]:
    """A saved adapter gives another output when it is loaded, though every tensor came back.

    ## What it does
    Saves the adapter, loads it on a fresh base, and compares the outputs bit for bit where all saved tensors
    are equal.

    ## Why is this bad?
    Something that is neither weight nor configuration has a share in the output, and is lost with the
    process.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").set_scale("default", 3.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    report = check_reload(model, batch)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_reload(model, batch)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/checkpoint
    """
    if facts.apart and not facts.tensors_differ and facts.refusal is None:
        yield Violation(
            where="the output of the reloaded model",
            observed=f"it differs by up to {facts.apart:.3g}, though every saved tensor came back as it was",
            expected="the same output, bit for bit",
            fix="look for what is neither weight nor configuration: attributes set by hand, hooks, another active "
            "adapter, scaling changed with set_scale",
        )
