from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA207", severity="error", needs=ModelFacts)
def adapter_is_not_finite(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """An adapter holds NaN or infinity, or gives it.

    ## What it does
    Reads every factor, DoRA magnitude, `modules_to_save` copy and token row. A DoRA adapter gives NaN where rows of
    the base weight are zero: it divides by their norm.

    ## Why is this bad?
    One NaN spreads through the whole forward pass: every output is NaN or the same token, and no later step
    repairs it. Trainers may log such steps as loss 0. Rows of zeros are nothing rare: `o_proj` of Llama-3.1-8B has 511.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        model.base_model.model.model.layers[1].self_attn.v_proj.lora_B["default"].weight[3, 2] = float("nan")
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/troubleshooting
    - https://github.com/huggingface/peft/issues/2049
    """
    yield from _without_a_norm(facts)
    layers = [layer for layer in facts.layers if any(part.finite is False for part in layer.parts)]
    others = [part for part in facts.kept if part.finite is False]
    if layers or others:
        tensors = sorted({p.name for layer in layers for p in layer.parts if p.finite is False})
        kinds = [*tensors, *sorted({part.field for part in others})]
        owners = dict.fromkeys([*(layer.adapter for layer in layers), *(part.adapter for part in others)])
        yield Violation(
            where=grouped([*(layer.module for layer in layers), *(part.module for part in others)]),
            observed=f"NaN or infinity in {', '.join(kinds)} of adapter {', '.join(map(repr, owners))}",
            expected="finite numbers in every trained tensor",
            fix="go back to the last finite checkpoint; lower the learning rate, clip gradients, keep "
            "trained weights in float32",
        )


def _without_a_norm(facts: ModelFacts) -> Iterator[Violation]:
    layers = [layer for layer in facts.layers if layer.normless and layer.use_dora]
    if layers:
        modules = ", ".join(dict.fromkeys(layer.module.rpartition(".")[2] for layer in layers))
        yield Violation(
            where=grouped(layer.module for layer in layers),
            observed=f"{sum(layer.normless for layer in layers)} rows of these base weights are zero, and DoRA divides "
            "by the norm of each: what they give is NaN from the first forward pass on",
            expected="rows with a norm under every module that DoRA adapts",
            fix=f"leave {modules} out of target_modules (or these layers, with exclude_modules), or set "
            "use_dora=False: plain LoRA does not divide",
        )
