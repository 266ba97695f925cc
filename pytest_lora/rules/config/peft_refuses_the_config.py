from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.rules import Violation, rule


@rule("LORA124", severity="error", needs=ConfigFacts)
def peft_refuses_the_config(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """PEFT stops at this configuration.

    ## What it does
    Lets PEFT put the adapter on the structure of the base and reports its error, unless another rule
    explains it.

    ## Why is this bad?
    `get_peft_model` would raise the same error, after the base has been loaded.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["input_layernorm"])
    report = check_config(config, base)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"])
    report = check_config(config, base)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/troubleshooting
    """
    refusal = facts.refusal
    if refusal is None or facts.base.carries_adapter or _explained_elsewhere(facts):
        return
    message = " ".join(refusal.message.split())
    on_meta_alone = "meta tensor" in message or "meta device" in message
    yield Violation(
        where=f"LoraConfig on {facts.base.architecture}",
        observed=f"{refusal.error}: {message[:300]}",
        expected="a configuration that PEFT accepts for this base",
        fix=_fix(facts, message),
        severity="info" if on_meta_alone else "error",
    )


def _explained_elsewhere(facts: ConfigFacts) -> bool:
    nothing_found = any(facts.unmatched("target_modules")) or any(facts.unmatched("target_parameters"))
    layers = set(facts.settings.layers_to_transform)
    no_such_layer = bool(layers and facts.base.layer_indices) and not layers & set(facts.base.layer_indices)
    rows = [row for _, group in facts.settings.trainable_token_indices for row in group]
    no_such_row = facts.base.vocab_size is not None and any(row >= facts.base.vocab_size for row in rows)
    return nothing_found or no_such_layer or no_such_row


def _fix(facts: ConfigFacts, message: str) -> str:
    if facts.settings.r <= 0 or any(rank <= 0 for _, rank in facts.settings.rank_pattern):
        return "set r, and every rank in rank_pattern, to a whole number above 0"
    if "is not supported" in message:
        return "name linear, embedding or convolution layers themselves, not norms or the blocks around them"
    if "target_modules" in message and facts.settings.target_modules is None:
        return "set target_modules, for instance to 'all-linear'"
    return "change what the message names"
