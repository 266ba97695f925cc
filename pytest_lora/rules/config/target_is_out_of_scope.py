from __future__ import annotations

import re
from collections.abc import Iterator

from pytest_lora.changes import Advice, advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA114", severity="warning", needs=ConfigFacts, on_saved="alone")
def target_is_out_of_scope(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """Adapters sit on parts of the model outside the stated scope.

    ## What it does
    Needs `Expect(scope=...)`. Looks for adapted modules whose full name does not contain the scope.

    ## Why is this bad?
    Vision towers and language models share their projection names, so that a list of names adapts both.
    Serving engines reject such adapters, and the tower changes although nobody meant to train it.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    report = check_config(config, vision_language_base, expect=Expect(scope="language_model"))
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=r"language_model.*\\.(q_proj|v_proj)")
    report = check_config(config, vision_language_base, expect=Expect(scope="language_model"))
    ```

    ## References
    - https://github.com/sgl-project/sglang/issues/11519
    """
    if expect.scope is None:
        return
    inside = f".{expect.scope}."
    outside = [layer.module for layer in facts.layers if inside not in f".{layer.module}."]
    if outside:
        yield Violation(
            where=grouped(outside),
            observed=f"target_modules also match {len(outside)} of {len(facts.layers)} modules outside the scope "
            f"{expect.scope!r}",
            expected=f"adapters on modules of {expect.scope} alone",
            fix=_fix(expect.scope, facts),
        )


def _fix(scope: str, facts: ConfigFacts) -> Advice:
    settings, within = facts.settings, rf"(.*\.)?{re.escape(scope)}\."
    if not any(f".{scope}." in f".{layer.module}." for layer in facts.layers):
        return advise(f"name modules inside {scope} in target_modules")
    if isinstance(settings.target_modules, tuple) and not settings.layers_to_transform:
        names = "|".join(map(re.escape, settings.target_modules))
        pattern = rf"{within}(.*\.)?({names})"
        return advise("use a pattern for the whole name: ", change(target_modules=pattern))
    if settings.exclude_modules is None:
        return advise("leave out what is outside: ", change(exclude_modules=rf"(?!{within}).*"))
    return advise(f"exclude what is outside {scope}, too, in exclude_modules")
