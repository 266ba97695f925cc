from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CheckpointFacts
from pytest_lora.facts.settings import rewrites_base
from pytest_lora.rules import Violation, rule


@rule("LORA443", severity="warning", needs=CheckpointFacts)
def init_is_not_converted(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """The adapter was saved under an initialisation that changed the base, without conversion.

    ## What it does
    Looks at init_lora_weights for the fast PiSSA (`pissa_niter_4`), CorDA, LoRA-GA and LoftQ, which move a part of the
    base weights into the adapter or quantize them anew. PiSSA and OLoRA themselves are fine: PEFT repeats them to the
    same numbers while it loads.

    ## Why is this bad?
    The adapter belongs to the base weights that the initialisation left (the residual), not to those that
    everybody has. What was drawn at random or computed with data comes out otherwise when PEFT repeats it while
    loading, so that the result is wrong.

    ## Example
    ```python
    report = check_checkpoint(adapter(init_lora_weights="pissa_niter_4"))
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter())
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/lora#pissa
    - https://arxiv.org/abs/2404.02948
    """
    settings = facts.settings
    if not facts.is_judged or settings is None or not facts.lora:
        return
    init = str(settings.init_lora_weights).lower()
    if rewrites_base(init) and init not in REPEATABLE:
        yield Violation(
            where=f"init_lora_weights in {facts.name}",
            observed=f"init_lora_weights={settings.init_lora_weights!r}: the adapter was not converted, and fits "
            "only the base weights that this initialisation left (the residual)",
            expected="an adapter for the original base weights",
            fix=_FIX
            if not init.startswith("loftq")
            else "publish the base that LoftQ quantized together with the adapter",
        )


REPEATABLE = ("pissa", "olora")
"""Initialisations that are a function of the base weights alone (an SVD, a QR decomposition)."""

_FIX = (
    "save the fresh adapter before training, and the trained one with "
    "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
)
