from __future__ import annotations

import re
from collections.abc import Iterator

from pytest_lora.changes import advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CheckpointFacts
from pytest_lora.rules import Violation, rule


@rule("LORA453", severity="warning", needs=CheckpointFacts)
def base_name_differs(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """adapter_config.json names another base than the one that is given.

    ## What it does
    Compares the last parts of the two names, less what tells a precision or a quantization. Paths without a
    telling name are not compared.

    ## Why is this bad?
    Shapes of two models of one family fit each other, so that a wrong base loads without a word and answers
    badly: an adapter of the instruct model on the plain one, of version 0.1 on 0.3.

    ## Example
    ```python
    path = adapter()
    base.name_or_path = "org/tiny-llama-instruct"
    report = check_checkpoint(path, base)
    ```

    ## Use instead
    ```python
    base.name_or_path = "unsloth/tiny-llama-bnb-4bit"
    report = check_checkpoint(adapter(), base)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/checkpoint
    """
    if facts.fit is None or facts.config is None or not facts.config.base or not facts.fit.base_name:
        return
    if facts.is_foreign or facts.names_itself:
        return
    named, given = facts.config.base, facts.fit.base_name
    ours, theirs = _leaf(given), _leaf(named)
    if not ours or not theirs or ours == theirs:
        return
    yield Violation(
        where=f"base_model_name_or_path in {facts.name}",
        observed=f"the adapter is for the base model {named!r}, and the given base is {given!r}",
        expected="the base that the adapter was trained on",
        fix=advise(
            f"load it on {named!r}; or, if the two are the same weights, ",
            change("write", base_model_name_or_path=given),
            " into the configuration",
        ),
        severity="info" if _is_local(named) or _is_local(given) else None,
    )


_PRECISION = re.compile(
    r"(?:[-_.](?:unsloth|bnb|nf4|fp4|int4|int8|fp8|fp16|bf16|f16|4bit|8bit|awq|gptq|hqq|gguf|mlx|hf|dynamic))+$"
)

_VAGUE = re.compile(
    r"(?:|model|base|base[-_]?model|checkpoint(?:-\d+)?|output|outputs|final|main|latest|tmp\w*|[0-9a-f]{40})$"
)


def _leaf(name: str) -> str:
    """The part of a name or path that tells models apart; empty where there is none."""
    parts = [part for part in re.split(r"[/\\\\]", name) if part and part != "config.json"]
    for part in parts:
        if part.startswith("models--"):
            return _plain(part.rpartition("--")[2])
    return _plain(parts[-1]) if parts else ""


def _plain(part: str) -> str:
    plain = _PRECISION.sub("", part.lower())
    return "" if _VAGUE.match(plain) else plain


def _is_local(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name
