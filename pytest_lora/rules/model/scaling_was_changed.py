from __future__ import annotations

import math
from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.facts.model_parts import LayerState
from pytest_lora.findings import Severity, grouped
from pytest_lora.rules import Violation, rule


@rule("LORA228", severity="warning", needs=ModelFacts)
def scaling_was_changed(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """The scaling of a live layer is not what its rank and alpha give.

    ## What it does
    Compares the scaling in effect with alpha / r (alpha / sqrt(r) under rsLoRA). At inference a scaling set
    by hand is usual and only an info; one of zero in every module of what `Expect(fresh=False)` calls trained is a
    warning, and so is alpha / r where rsLoRA divides by sqrt(r), and so are modules that rank_pattern or alpha_pattern
    name and that act with the scaling of those that no pattern names: PEFT's hot-swap leaves it so.

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
    - https://github.com/huggingface/peft/issues/3738
    - https://github.com/huggingface/peft/issues/2733
    """
    changed = [
        layer for layer in facts.active_layers if not layer.is_scaled_as_configured and not layer.is_swapped
    ]
    for value in sorted({layer.scaling for layer in changed}):
        layers = [layer for layer in changed if layer.scaling == value]
        first = layers[0]
        root = "sqrt(r)" if first.use_rslora else "r"
        unnamed = _is_of_no_pattern(facts, layers)
        rootless = first.use_rslora and math.isclose(value, first.alpha / first.rank, rel_tol=1e-5)
        yield Violation(
            where=grouped(layer.module for layer in layers),
            observed=f"scaling is {value:g} in {len(layers)} of {len(facts.active_layers)} modules"
            + (", so that the adapter does nothing and gets no gradient" if value == 0 else "")
            + (", as if no pattern named them" if unnamed else "")
            + (
                ", which is alpha / r: the root of rsLoRA was left out, as set_scale of older PEFT does"
                * rootless
            ),
            expected=f"alpha / {root} = {first.configured_scaling:g} (alpha={first.alpha:g}, r={first.rank})",
            fix=(
                "load the adapter (load_adapter) instead of swapping it in, or put the scaling back: "
                if unnamed
                else "leave it if an adapter of another alpha was hot-swapped in; else put it back: "
            )
            + _restored(first),
            severity=_severity(
                value == 0, len(layers) == len(facts.active_layers), unnamed or rootless, expect
            ),
        )


def _restored(layer: LayerState) -> str:
    """A line that puts the scaling back; ``set_scale`` of older PEFT (0.17) knows no rsLoRA."""
    name = repr(layer.adapter)
    if not layer.use_rslora:
        return f"for layer in model.modules(): hasattr(layer, 'set_scale') and layer.set_scale({name}, 1)"
    configured = f"layer.lora_alpha[{name}] / layer.r[{name}] ** 0.5"
    return (
        f"for layer in model.modules(): {name} in getattr(layer, 'lora_alpha', ()) and "
        f"layer.scaling.update({{{name}: {configured}}})"
    )


def _severity(silent: bool, everywhere: bool, slipped: bool, expect: Expect) -> Severity | None:
    """A copy of a model whose scaling was not copied along (an EMA) answers as its base."""
    if expect.purpose != "inference":
        return "error" if silent else None
    return "warning" if slipped or (silent and everywhere and expect.fresh is False) else "info"


def _is_of_no_pattern(facts: ModelFacts, layers: list[LayerState]) -> bool:
    """Whether patterns name all these modules, and they act with the scaling that modules without a pattern have.

    All other modules of the adapter act as configured: a scaling set by hand is set everywhere.
    """
    adapter = layers[0].adapter
    config = facts.config_of(adapter)
    if config is None or any(layer.adapter != adapter for layer in layers):
        return False
    settings = config.settings
    plain = settings.scaling_of("")
    named = [bool(settings.rank_key(layer.module) or settings.alpha_key(layer.module)) for layer in layers]
    others = [layer for layer in facts.of(adapter) if layer not in layers]
    return (
        plain is not None
        and all(named)
        and math.isclose(layers[0].scaling, plain, rel_tol=1e-5)
        and all(layer.is_scaled_as_configured for layer in others)
    )
