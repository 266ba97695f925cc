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
    warning, and so are modules that rank_pattern or alpha_pattern name and that act with the scaling of those that no
    pattern names (PEFT's hot-swap leaves it so), and an rsLoRA adapter that acts with alpha / r everywhere: `set_scale`
    of older PEFT leaves that.

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
        rootless = all(_is_without_the_root(layer) for layer in facts.active_layers)
        yield Violation(
            where=grouped(layer.module for layer in layers),
            observed=f"scaling is {value:g} in {len(layers)} of {len(facts.active_layers)} modules"
            + (", so that the adapter does nothing and gets no gradient" if value == 0 else "")
            + (", as if no pattern named them" if unnamed else "")
            + (", which is alpha / r, as without use_rslora" if rootless else ""),
            expected=f"alpha / {root} = {first.configured_scaling:g} (alpha={first.alpha:g}, r={first.rank})",
            fix=_of_rslora(first)
            if rootless
            else (
                "load the adapter (load_adapter) instead of swapping it in, or put the scaling back: "
                if unnamed
                else "leave it if an adapter of another alpha was hot-swapped in; else put it back: "
            )
            + f"for layer in model.modules(): hasattr(layer, 'set_scale') and layer.set_scale({first.adapter!r}, 1)",
            severity=_severity(
                value == 0, len(layers) == len(facts.active_layers), unnamed or rootless, expect
            ),
        )


def _of_rslora(layer: LayerState) -> str:
    """Older PEFT's own `set_scale` would give alpha / r again."""
    name, scaling = repr(layer.adapter), layer.configured_scaling
    return (
        f"put back the scaling of rsLoRA, of which {layer.scaling / scaling:.2g} is left: for layer in "
        f"model.modules(): hasattr(layer, 'set_scale') and {name} in layer.scaling and "
        f"layer.scaling.update({{{name}: {scaling:g}}})"
    )


def _severity(silent: bool, everywhere: bool, by_mistake: bool, expect: Expect) -> Severity | None:
    """A copy of a model whose scaling was not copied along (an EMA) answers as its base."""
    if expect.purpose != "inference":
        return "error" if silent else None
    return "warning" if by_mistake or (silent and everywhere and expect.fresh is False) else "info"


def _is_without_the_root(layer: LayerState) -> bool:
    """Whether an rsLoRA adapter acts as plain LoRA of its rank and alpha."""
    return (
        layer.use_rslora
        and layer.rank > 1
        and math.isclose(layer.scaling, layer.alpha / layer.rank, rel_tol=1e-5)
    )


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
