from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.behaviour import ShapeFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA903", severity="error", needs=ShapeFacts)
def adapter_shapes_do_not_fit(facts: ShapeFacts, expect: Expect) -> Iterator[Violation]:
    """The factors of an adapter do not have the shapes that its rank and its base weight ask for.

    ## What it does
    Compares `lora_A` with rank x input size and `lora_B` with output size x rank, on every adapted module.

    ## Why is this bad?
    Weights of another adapter were put in. The first forward raises, or the product is broadcast into
    something else.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    layer.lora_A["default"].weight = nn.Parameter(torch.zeros(4, 64))
    report = check_adapter_shapes(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_adapter_shapes(model)
    ```

    ## References
    - https://arxiv.org/abs/2106.09685
    """
    for misfit in facts.misfits:
        yield Violation(
            where=grouped(misfit.modules),
            observed=misfit.observed,
            expected=misfit.expected,
            fix="build the adapter on this base with this rank; weights of another one were put in",
        )
