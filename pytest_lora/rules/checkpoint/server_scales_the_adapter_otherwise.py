from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.served import ServedAdapter
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.serving_words import treated


@rule("LORA463", severity="error", needs=ServedAdapter)
def server_scales_the_adapter_otherwise(facts: ServedAdapter, expect: Expect) -> Iterator[Violation]:
    """The server that the adapter is for multiplies it by another scaling than PEFT.

    ## What it does
    Asks whether the server named by `Expect(serve=...)` or `--lora-serve` reads rsLoRA, rank patterns and alpha
    patterns, and whether it pads the rank before it divides alpha by it. Without that it is silent.

    ## Why is this bad?
    Nothing is logged. Under rsLoRA of rank 64 an adapter is served at an eighth of its strength.

    ## Example
    ```python
    path = adapter(use_rslora=True)
    report = check_checkpoint(path, expect=Expect(serve="sglang"))
    ```

    ## Use instead
    ```python
    path = adapter(use_rslora=True)
    configure(path, use_rslora=False, lora_alpha=16 * 8**0.5)
    report = check_checkpoint(path, expect=Expect(serve="sglang"))
    ```

    ## References
    - https://arxiv.org/abs/2312.03732
    - https://github.com/sgl-project/sglang/blob/main/python/sglang/srt/lora/lora.py
    - https://github.com/ggml-org/llama.cpp/blob/master/src/llama-adapter.h
    """
    yield from treated(facts, expect, "rescales")
