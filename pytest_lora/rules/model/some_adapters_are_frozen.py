from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.facts.model_parts import LayerState
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA209", severity="warning", needs=ModelFacts)
def some_adapters_are_frozen(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """Some modules of an adapter are frozen while the others train.

    ## What it does
    Compares the modules of each active adapter, and each factor of them. A factor that is frozen everywhere
    (LoRA-FA) or by the variant's own design is no mistake. The magnitudes of DoRA, frozen everywhere while both factors
    train, are an info.

    ## Why is this bad?
    The frozen part keeps its initial zero and does nothing, though the configuration and the saved file say
    that it is adapted. It usually happens when layers of the base are frozen by a name such as `layers.0.`,
    which also hits their LoRA weights.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "layers.0." in name:
            parameter.requires_grad_(False)
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], layers_to_transform=[1])
    )
    report = check_model(model)
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/lora#peft.LoraConfig.layers_to_transform
    - https://github.com/unslothai/unsloth/issues/3108
    - https://github.com/meta-pytorch/torchtune/issues/2250
    """
    if expect.purpose != "train":
        return
    for adapter in facts.active:
        layers = [layer for layer in facts.of(adapter) if layer.active and not layer.disabled]
        frozen = [layer for layer in layers if not layer.trainable]
        if 0 < len(frozen) < len(layers):
            yield Violation(
                where=grouped(layer.module for layer in frozen),
                observed=f"{len(frozen)} of {len(layers)} LoRA modules of adapter {adapter!r} are frozen, "
                "the others train",
                expected="all modules of an active adapter trainable",
                fix=f"freeze the base before get_peft_model, not after; here call model.set_adapter({adapter!r}); to "
                "adapt only some layers say so with layers_to_transform",
            )
        else:
            yield from _frozen_factors(adapter, layers)


def _frozen_factors(adapter: str, layers: list[LayerState]) -> Iterator[Violation]:
    """One of the two factors, or the magnitude, that is frozen in some modules and trains in others."""
    held = [(layer.module, part) for layer in layers for part in layer.parts if not part.frozen_by_design]
    for name in dict.fromkeys(part.name for _, part in held):
        frozen = {module: not part.trainable for module, part in held if part.name == name}
        if 0 < sum(frozen.values()) < len(frozen):
            modules = [module for module, still in frozen.items() if still]
            yield Violation(
                where=grouped(modules),
                observed=f"{name} of adapter {adapter!r} is frozen in {len(modules)} of {len(frozen)} LoRA modules",
                expected=f"{name} trainable everywhere, or frozen everywhere (LoRA-FA)",
                fix=f"call model.set_adapter({adapter!r}), which makes all of an adapter trainable",
            )
        elif (
            name == MAGNITUDE
            and all(frozen.values())
            and all(x.a.trainable and x.b.trainable for x in layers)
        ):
            yield Violation(
                where=grouped(frozen),
                observed=f"the magnitudes ({name}) of adapter {adapter!r} are frozen in all {len(frozen)} DoRA "
                "modules: it learns what LoRA learns, at the price of DoRA",
                expected="magnitudes that train, which is what DoRA adds to LoRA",
                fix=f"call model.set_adapter({adapter!r}), which makes all of an adapter trainable, or leave "
                "use_dora out",
                severity="info",
            )


MAGNITUDE = "lora_magnitude_vector"
