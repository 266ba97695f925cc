from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import Advice, advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CONFIG, CheckpointFacts
from pytest_lora.rules import Violation, rule


@rule("LORA452", severity="warning", needs=CheckpointFacts)
def base_name_is_missing(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """adapter_config.json does not say which base the adapter is for.

    ## What it does
    Looks at base_model_name_or_path: whether it is there, and does not name the adapter's own folder. A base
    class outside transformers has no name, so that there it is not asked for.

    ## Why is this bad?
    Nobody can tell the base from the file later, and AutoPeftModel cannot load it.

    ## Example
    ```python
    path = adapter()
    configure(path, base_model_name_or_path=None)
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter())
    ```

    ## References
    - https://github.com/huggingface/peft/issues/1744
    """
    config = facts.config
    if config is None or not facts.is_judged:
        return
    if facts.names_itself and not facts.merged:
        yield Violation(
            where=f"base_model_name_or_path in {facts.name}",
            observed="base_model_name_or_path is the path of this adapter itself, which is no base model",
            expected="the name or path of the base model",
            fix=_fix(facts),
        )
    if config.base:
        return
    if config.library and not config.library.startswith("transformers"):
        return
    yield Violation(
        where=f"base_model_name_or_path in {facts.name}",
        observed="base_model_name_or_path is missing or null: the base model is not set",
        expected="the name or path of the base model",
        fix=_fix(facts),
    )


def _fix(facts: CheckpointFacts) -> Advice:
    given = facts.fit.base_name if facts.fit is not None and not facts.is_foreign else None
    if given:
        named = change("write", base_model_name_or_path=given)
        return advise("if it was trained on this base, ", named, f" into {CONFIG}")
    return advise(
        f"write base_model_name_or_path into {CONFIG}: the name of the base that the adapter was trained on"
    )
