from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.facts.model_parts import LayerState, at_the_end_of_a_stream
from pytest_lora.findings import grouped, starred
from pytest_lora.rules import Violation, rule


@rule("LORA226", severity="warning", needs=ModelFacts)
def adapter_is_trained_in_part(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """Some layers of an adapter are trained, others of the same kind are still at zero.

    ## What it does
    Compares modules that differ only in their layer number: some have a product of zeros, some do not.
    Modules of a kind that is at zero throughout, and experts, are left alone; a projection that the last block alone
    has at zero, as it has no use for it (the text's query of Stable Diffusion 3), is an info.

    ## Why is this bad?
    Either a file was loaded that covers only some layers, or no gradient reaches the others. A model with
    `Expect(fresh=False)` is judged by a stricter rule.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        layer = model.base_model.model.model.layers[1].self_attn
        layer.q_proj.lora_B["default"].weight.fill_(0.01)
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    report = check_model(model)
    ```

    ## References
    - https://github.com/huggingface/peft/issues/1932
    - https://github.com/locuslab/open-unlearning/issues/178
    """
    if expect.fresh is not None:
        return
    siblings: dict[tuple[str, str], list[LayerState]] = {}
    for layer in facts.active_layers:
        readable = layer.changes_output is not None and layer.a.finite and layer.b.finite
        if readable and not layer.in_expert:
            siblings.setdefault((layer.adapter, starred(layer.module)), []).append(layer)
    mixed = [group for group in siblings.values() if len({layer.changes_output for layer in group}) == 2]
    empty = [layer for group in mixed for layer in group if not layer.changes_output]
    if empty:
        every = sum(len(group) for group in mixed)
        idle = {layer.module for layer in empty}
        trained = {layer.module for layer in facts.active_layers if layer.changes_output}
        yield Violation(
            where=grouped(layer.module for layer in empty),
            observed=f"{len(empty)} of {every} such modules of adapter {empty[0].adapter!r} are still at "
            "zero, the others are trained",
            expected="all layers of one kind trained, or none",
            fix="check that the loaded file has keys for these layers, and that the loss depends on them",
            severity="info" if at_the_end_of_a_stream(idle, trained) == idle else None,
        )
