from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.served import ServedAdapter
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.serving_words import treated


@rule("LORA462", severity="error", needs=ServedAdapter)
def server_drops_part_of_the_adapter(facts: ServedAdapter, expect: Expect) -> Iterator[Violation]:
    """The server that the adapter is for leaves a part of it out without an error.

    ## What it does
    Compares what the adapter has with what the server named by `Expect(serve=...)` or `--lora-serve` loads, and says
    which part is not applied. Without that it is silent.

    ## Why is this bad?
    The server answers, with a log line at most, and the answers are not those of the adapter that was evaluated.

    ## Example
    ```python
    path = adapter(modules_to_save=["lm_head"])
    report = check_checkpoint(path, expect=Expect(serve="tgi"))
    ```

    ## Use instead
    ```python
    path = adapter(target_modules=["q_proj", "o_proj"])
    report = check_checkpoint(path, expect=Expect(serve="tgi"))
    ```

    ## References
    - https://github.com/huggingface/text-generation-inference/blob/main/server/text_generation_server/adapters/lora.py
    - https://github.com/predibase/lorax/blob/main/server/lorax_server/adapters/lora.py
    - https://github.com/sgl-project/sglang/blob/main/python/sglang/srt/lora/lora.py
    """
    yield from treated(facts, expect, "drops")
