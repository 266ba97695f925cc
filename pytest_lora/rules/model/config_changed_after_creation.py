from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.facts.model_parts import LayerState
from pytest_lora.facts.settings import Settings
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA232", severity="warning", needs=ModelFacts)
def config_changed_after_creation(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """The configuration was changed after the adapter was made from it.

    ## What it does
    Compares rank, alpha and rsLoRA of the adapter's configuration with those of its layers, where no
    pattern decides and AdaLoRA takes no ranks away.

    ## Why is this bad?
    The layers keep what they were made with, so that the change does nothing now; but the changed
    configuration is what `save_pretrained` writes. The reloaded adapter then has another scaling, or does
    not load at all.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.peft_config["default"].lora_alpha = 64
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/lora#peft.LoraConfig
    """
    for config in facts.configs:
        layers = facts.of(config.adapter)
        for field, value, made in _compared(config.settings, layers):
            other = [layer for layer, own in zip(layers, made, strict=True) if own != value]
            if other:
                own = next(own for own in made if own != value)
                yield Violation(
                    where=grouped(layer.module for layer in other),
                    observed=f"the configuration of adapter {config.adapter!r} says {field}={value:g}, its "
                    f"layers have {own:g}",
                    expected="a configuration that is not changed once its adapter exists",
                    fix=f"set {field} before get_peft_model, not after; here put it back: "
                    f"model.peft_config[{config.adapter!r}].{field} = {own!r}",
                    severity="error" if field == "r" else None,
                )


def _compared(settings: Settings, layers: tuple[LayerState, ...]) -> Iterator[tuple[str, float, list[float]]]:
    """Field, its value in the configuration, and its value in each layer."""
    if not settings.rank_pattern and not any(layer.prunes_ranks for layer in layers):
        yield "r", settings.r, [layer.rank for layer in layers]
    if not settings.alpha_pattern:
        yield "lora_alpha", settings.lora_alpha, [layer.alpha for layer in layers]
    yield "use_rslora", settings.use_rslora, [layer.use_rslora for layer in layers]
