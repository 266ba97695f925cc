from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CheckpointFacts
from pytest_lora.facts.saved_tensors import Key
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA428", severity="error", needs=CheckpointFacts)
def base_weights_are_in_the_file(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """The adapter file contains weights of the base model.

    ## What it does
    Looks for weights that are neither of LoRA nor of a module that the configuration saves. Embeddings,
    which PEFT saves by itself after the vocabulary was resized, and few others are mentioned only.

    ## Why is this bad?
    model.state_dict() was written instead of the adapter: the file is as large as the model, and loading it
    overwrites the weights of the base, which fails on a quantized one.

    ## Example
    ```python
    path = adapter()
    add_base_weights(path, base)
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter())
    ```

    ## References
    - https://github.com/huggingface/peft/issues/2092
    - https://github.com/hiyouga/LLaMA-Factory/issues/6622
    """
    settings = facts.settings
    if not facts.is_judged or settings is None or facts.is_foreign or facts.misnamed or not facts.lora:
        return
    extra = [t for t in facts.plain if not _is_meant(facts.key(t), facts)]
    if not extra:
        return
    adapted = {module.name for module in facts.adapted}
    own = [t for t in extra if _base_module(facts.key(t)) in adapted]
    numbers = sum(t.numbers for t in extra)
    share = numbers / max(1, sum(t.numbers for t in facts.tensors))
    yield Violation(
        where=f"{facts.weights} in {facts.name}",
        observed=f"the file contains {len(extra)} weights of the base model beside the adapter, "
        f"{share:.0%} of its numbers: {grouped(dict.fromkeys(_base_module(facts.key(t)) for t in extra))}",
        expected="the adapter alone",
        fix="write save_pretrained of the PeftModel, not model.state_dict()",
        severity=None if own else "info",
    )


_EMBEDDINGS = (
    "embed_tokens",
    "lm_head",
    "wte",
    "wpe",
    "word_embeddings",
    "shared",
    "embed_in",
    "embed_out",
    "embeddings",
)


def _base_module(key: Key) -> str:
    return key.module.removesuffix(".base_layer")


def _is_meant(key: Key, facts: CheckpointFacts) -> bool:
    settings = facts.settings
    module = _base_module(key)
    if settings is None or module.rpartition(".")[2] in _EMBEDDINGS or "token_adapter" in key.peft_name:
        return True
    if facts.fit is not None and key.peft_name in facts.fit.wanted:
        return True
    return settings.saves(module) or (settings.bias != "none" and key.peft_name.endswith("bias"))
