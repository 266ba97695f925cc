from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import Severity, grouped
from pytest_lora.rules import Violation, rule


@rule("LORA228", severity="warning", needs=ModelFacts)
def scaling_was_changed(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """The scaling of a live layer is not what its rank and alpha give.

    ## What it does
    Compares the scaling in effect with alpha / r (alpha / sqrt(r) under rsLoRA). At inference a scaling set
    by hand is usual and only an info; one of zero in every module of what `Expect(fresh=False)` calls trained is a
    warning.

    ## Why is this bad?
    Scaling lives in the layer and is not saved: the reloaded adapter acts with alpha / r again, so that
    training and use differ. `set_scale`, `scale_layer` without `unscale_layer`, or a later change of alpha
    leave it behind. At zero, the adapter gets no gradient at all.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.5)
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/helpers#peft.helpers.rescale_adapter_scale
    """
    changed = [
        layer for layer in facts.active_layers if not layer.is_scaled_as_configured and not layer.is_swapped
    ]
    for value in sorted({layer.scaling for layer in changed}):
        layers = [layer for layer in changed if layer.scaling == value]
        first = layers[0]
        root = "sqrt(r)" if first.use_rslora else "r"
        yield Violation(
            where=grouped(layer.module for layer in layers),
            observed=f"scaling is {value:g} in {len(layers)} of {len(facts.active_layers)} modules"
            + (", so that the adapter does nothing and gets no gradient" if value == 0 else ""),
            expected=f"alpha / {root} = {first.configured_scaling:g} (alpha={first.alpha:g}, r={first.rank})",
            fix="leave it if an adapter of another alpha was hot-swapped in; else put it back: "
            f"for layer in model.modules(): hasattr(layer, 'set_scale') and layer.set_scale({first.adapter!r}, 1)",
            severity=_severity(value == 0, len(layers) == len(facts.active_layers), expect),
        )


def _severity(silent: bool, everywhere: bool, expect: Expect) -> Severity | None:
    """A copy of a model whose scaling was not copied along (an EMA) answers as its base."""
    if expect.purpose != "inference":
        return "error" if silent else None
    return "warning" if silent and everywhere and expect.fresh is False else "info"
