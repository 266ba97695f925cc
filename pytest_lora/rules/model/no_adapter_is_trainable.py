from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA201", severity="error", needs=ModelFacts)
def no_adapter_is_trainable(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """No adapter requires gradients although the model is to be trained.

    ## What it does
    Looks for a trainable LoRA factor; there is none, while the adapters are active and the purpose is
    training. X-LoRA, which trains a classifier over frozen adapters, is fine.

    ## Why is this bad?
    The loss falls by nothing: the optimizer is empty or holds what never gets a gradient.
    `PeftModel.from_pretrained` freezes what it loads unless told otherwise, and
    `prepare_model_for_kbit_training` or `requires_grad_(False)` after `get_peft_model` freezes the adapter
    together with the base. So does quantizing the model then: it packs the factors too. A second adapter that
    was added stays frozen until it is made the active one.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.requires_grad_(False)
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/troubleshooting
    - https://github.com/tloen/alpaca-lora/issues/352
    """
    idle = expect.purpose != "train" or facts.disabled or not facts.active
    if idle or facts.training_adapters or facts.trains_xlora:
        return
    rest = [part.module for part in facts.kept if part.trainable]
    packed = sorted({f.dtype for layer in facts.active_layers for f in layer.parts if f.is_quantized})
    yield Violation(
        where=grouped(layer.module for layer in facts.active_layers),
        observed=f"all {len(facts.layers)} LoRA layers are frozen (requires_grad=False)"
        + (f", their factors quantized to {packed[0]}" if packed else "")
        + (f"; active: {facts.active[0]!r}" if len(facts.adapters) > 1 else "")
        + "; trainable: "
        + (f"{grouped(rest)} only" if rest else "nothing"),
        expected=f"adapter {facts.active[0]!r} trainable",
        fix=_QUANTIZED if packed else _fix(facts),
        severity="warning" if rest else None,
    )


_TRANSFORMERS = "model.load_adapter(..., is_trainable=True)"

_QUANTIZED = "quantize the base before get_peft_model, not the model with its adapter after it"


def _fix(facts: ModelFacts) -> str:
    """What makes the adapter trainable, by how the active one came to be."""
    active = facts.active[0]
    loaded = any(c.settings.inference_mode for c in facts.configs if c.adapter in facts.active)
    fresh = [
        c.adapter for c in facts.configs if c.adapter not in facts.active and not c.settings.inference_mode
    ]
    if loaded and fresh:
        return (
            f"adapter {fresh[0]!r} was made to train, but is not active: call model.set_adapter({fresh[0]!r})"
        )
    if loaded:
        load = "PeftModel.from_pretrained(..., is_trainable=True)" if facts.nested else _TRANSFORMERS
        return f"load it with {load}, or create it with inference_mode=False"
    return (
        "freeze or prepare_model_for_kbit_training the base before get_peft_model, not after; here "
        f"model.set_adapter({active!r}) makes the adapter trainable again"
    )
