from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.facts.model_parts import LayerState
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA230", severity="error", needs=ModelFacts)
def factor_shapes_do_not_fit(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """The shapes of the low-rank factors fit neither the rank nor the base weight.

    ## What it does
    Compares both factors with the rank and with the sizes of the base weight. Factors padded to one larger
    rank (`prepare_model_for_compiled_hotswap`) are fine, and so are those that PiSSA or OLoRA made of a matrix
    smaller than the rank.

    ## Why is this bad?
    The forward pass fails, or the saved adapter cannot be loaded again ("size mismatch"). The base layer
    was replaced or resized after the adapter was made, or a factor was exchanged by hand.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    layer = nn.Linear(64, 96, bias=False).requires_grad_(False)
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer = layer
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/troubleshooting#extending-the-vocabulary
    """
    wrong = [layer for layer in facts.layers if not _fits(layer)]
    if wrong:
        first = wrong[0]
        yield Violation(
            where=grouped(layer.module for layer in wrong),
            observed=f"{first.a.name} {first.a.shape} and {first.b.name} {first.b.shape} "
            f"on a base of {first.in_features} inputs and {first.out_features} outputs, r={first.rank}",
            expected=f"{first.a.name} {first.expected_a}, {first.b.name} {first.expected_b}",
            fix="change the base (vocabulary, layers) before get_peft_model, and never exchange factors by "
            "hand",
        )


def _fits(layer: LayerState) -> bool:
    if layer.a.is_quantized or layer.b.is_quantized:  # packed numbers have a shape of their own
        return True
    a, b = layer.a.shape[:2], layer.b.shape[:2]
    changes = [
        (is_, asked)
        for is_, asked in zip((*a, *b), (*layer.expected_a, *layer.expected_b), strict=False)
        if is_ != asked
    ]
    smaller = min(layer.in_features, layer.out_features)
    if changes == [(smaller, layer.rank)] * 2 and smaller < layer.rank:
        return True  # PiSSA and OLoRA decompose the weight, which has no more than that
    padded = len(changes) == 2 and len(set(changes)) == 1 and changes[0][1] == layer.rank < changes[0][0]
    return not changes or padded
