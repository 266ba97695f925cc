from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.behaviour import ReloadFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA912", severity="error", needs=ReloadFacts)
def reloaded_weights_differ(facts: ReloadFacts, expect: Expect) -> Iterator[Violation]:
    """A saved adapter does not load, or loads with other values or shapes.

    ## What it does
    Compares every tensor of the adapter before saving and after loading on a fresh base.

    ## Why is this bad?
    The checkpoint is not the model that was trained.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight = nn.Parameter(torch.zeros(4, 64))
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight = nn.Parameter(torch.zeros(64, 4))
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
    if facts.refusal is not None:
        yield Violation(
            where="the saved adapter",
            observed=f"it cannot be loaded on the base: {facts.refusal}",
            expected="a checkpoint that loads",
            fix="see that save_pretrained writes every tensor of the adapter, and that the base has the modules it "
            "names",
        )
    if facts.changed:
        yield Violation(
            where=grouped(facts.changed),
            observed=f"{len(facts.changed)} tensors of the adapter have other values or shapes after loading",
            expected="the values that were saved",
            fix="see that no step or hook changes the model while it is saved, and that adapter names hold no dots",
        )
