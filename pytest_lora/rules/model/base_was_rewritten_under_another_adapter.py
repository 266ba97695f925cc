from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.facts.settings import rewrites_base
from pytest_lora.rules import Violation, rule


@rule("LORA246", severity="warning", needs=ModelFacts)
def base_was_rewritten_under_another_adapter(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """An adapter took a part of the base weights with it, while another one stands on the same base.

    ## What it does
    Looks for an adapter whose `init_lora_weights` moves a part of the base into itself (PiSSA, OLoRA, CorDA, LoRA-GA,
    LoftQ), or KaSA, which cuts the base, beside another adapter.

    ## Why is this bad?
    The adapters share the base: what the first takes out of it is missing under the others, whose output moves.
    With each such adapter that is loaded the base is another one.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    pissa = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa")
    model.add_adapter("pissa", pissa)
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("second", LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/lora#initialization
    - PiSSA: https://arxiv.org/abs/2404.02948
    """
    if len(facts.adapters) < 2:
        return
    for config in facts.configs:
        settings = config.settings
        if rewrites_base(settings.init_lora_weights) or settings.kasa_config:
            others = [name for name in facts.adapters if name != config.adapter]
            way = (
                "kasa_config" if settings.kasa_config else f"init_lora_weights={settings.init_lora_weights!r}"
            )
            yield Violation(
                where=f"adapter {config.adapter!r} beside {', '.join(map(repr, others))}",
                observed=f"{way} rewrote the base weights when {config.adapter!r} was added: under the other adapters "
                "the base is no longer the one that they were trained on",
                expected="the original base under every adapter",
                fix="convert it to plain LoRA first: save_pretrained(..., "
                "path_initial_model_for_weight_conversion=...), or give it a base of its own",
            )
