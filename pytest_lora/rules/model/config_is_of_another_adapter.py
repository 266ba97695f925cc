from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.facts.settings import alpha_divisor
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA242", severity="warning", needs=ModelFacts)
def config_is_of_another_adapter(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """Factors were swapped in, and the configuration is still that of the adapter before.

    ## What it does
    On layers that were prepared for hot-swapping, or of whose ranks some are empty in both factors: compares the
    scaling in effect with alpha / r of the configuration.

    ## Why is this bad?
    `hotswap_adapter` replaces weights and scaling, and leaves `peft_config` as it was. The model answers rightly for as
    long as it lives; saved and loaded again, the new weights act with the old rank and alpha.

    ## Example
    ```python
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    hotswap_adapter(model, adapter(r=8, lora_alpha=64), adapter_name="default")
    report = check_model(model, expect=Expect(purpose="inference"))
    ```

    ## Use instead
    ```python
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    hotswap_adapter(model, adapter(r=8, lora_alpha=8), adapter_name="default")
    report = check_model(model, expect=Expect(purpose="inference"))
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/hotswap
    - https://github.com/huggingface/peft/issues/3581
    """
    for adapter in facts.adapters:
        swapped = [layer for layer in facts.of(adapter) if layer.is_swapped]
        for scaling in sorted({layer.scaling for layer in swapped}):
            layers = [layer for layer in swapped if layer.scaling == scaling]
            first = layers[0]
            held = first.a.shape[0] if first.a.name == "lora_A" else first.rank
            rank = held - first.empty_ranks
            alpha = scaling * alpha_divisor(rank, rslora=first.use_rslora)
            yield Violation(
                where=grouped(layer.module for layer in layers),
                observed=f"the weights of {adapter!r} act with a scaling of {scaling:g} over rank {rank}, as of "
                f"r={rank}, lora_alpha={alpha:g}; peft_config says r={first.rank}, lora_alpha={first.alpha:g}: a "
                "hot-swap brought another adapter's weights. Saved and loaded again they act with "
                f"{first.configured_scaling:g}",
                expected=f"alpha / r of the configuration: {first.configured_scaling:g}",
                fix="give all adapters of one slot the same r and lora_alpha, or load the adapter (load_adapter) "
                "instead of swapping it in; never save a model after a swap",
            )
