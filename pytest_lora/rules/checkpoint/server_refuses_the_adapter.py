from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.served import ServedAdapter
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.serving_words import treated


@rule("LORA461", severity="error", needs=ServedAdapter)
def server_refuses_the_adapter(facts: ServedAdapter, expect: Expect) -> Iterator[Violation]:
    """The server that the adapter is for refuses to load it.

    ## What it does
    Compares what the adapter has (DoRA, biases, modules saved in full, trained tokens, rank patterns, targets) with
    what the server named by `Expect(serve=...)` or `--lora-serve` allows. Without that it is silent.

    ## Why is this bad?
    The adapter works in PEFT, and the first request to the server fails: after the training has been paid for.

    ## Example
    ```python
    path = adapter(use_dora=True)
    report = check_checkpoint(path, expect=Expect(serve="vllm"))
    ```

    ## Use instead
    ```python
    path = adapter(use_rslora=True, rank_pattern={"v_proj": 4})
    report = check_checkpoint(path, expect=Expect(serve="vllm"))
    ```

    ## References
    - https://github.com/vllm-project/vllm/blob/main/vllm/lora/peft_helper.py
    - https://github.com/sgl-project/sglang/blob/main/python/sglang/srt/lora/lora_manager.py
    - https://github.com/ggml-org/llama.cpp/blob/master/convert_lora_to_gguf.py
    """
    yield from treated(facts, expect, "refuses")
