from __future__ import annotations

import json
import re
from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CheckpointFacts
from pytest_lora.facts.saved_tensors import Key
from pytest_lora.findings import grouped, starred
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import name_in_keys


@rule("LORA424", severity="error", needs=CheckpointFacts)
def layers_are_missing(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """The file lacks adapted modules that the configuration names.

    ## What it does
    With a base, compares the modules that PEFT adapts on it with those in the file. Without one, looks for
    gaps in the numbers of the layers.

    ## Why is this bad?
    PEFT leaves the missing modules at their initial values, where they do nothing, and says so in a warning
    that scrolls by. Half of the training seems lost.

    ## Example
    ```python
    path = adapter()
    edit(path, lambda tensors: {k: v for k, v in tensors.items() if "layers.1." not in k})
    report = check_checkpoint(path, base)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter(), base)
    ```

    ## References
    - https://github.com/huggingface/peft/issues/1932
    """
    if not facts.is_judged or facts.misnamed or not facts.adapted:
        return
    held = {module.name for module in facts.adapted}
    fit = facts.fits
    if fit is not None:
        lost = [
            m for m in dict.fromkeys(Key.of(n).module for n in fit.missing if ".lora_" in n) if m not in held
        ]
        if lost:
            total = len(lost) + len(held)
            yield Violation(
                where=grouped(lost),
                observed=f"the file has no adapter keys for {len(lost)} of {total} adapted modules of "
                f"{fit.base.architecture}; they are missing and would stay untrained",
                expected="tensors for every module that the configuration adapts on this base",
                fix=name_in_keys(facts) or _narrower(facts, lost, held) or TRAINED_BASE,
            )
    elif facts.fit is None and facts.settings is not None and not facts.settings.layers_to_transform:
        yield from _gaps(held, facts.settings.target_modules)


TRAINED_BASE = "load it on the base that it was trained on, or save the whole adapter again"


def _narrower(facts: CheckpointFacts, lost: list[str], held: set[str]) -> str | None:
    """What to write where all that is lost lies in a part of the base that the file knows nothing of."""
    part = _own_part(lost, held)
    if part is None or facts.settings is None or facts.settings.exclude_modules:
        return None
    pattern = json.dumps(rf"{re.escape(part)}\..*")
    return (
        f'if {part} was not adapted in training, keep it out of reach: "exclude_modules": {pattern} in '
        f"adapter_config.json; else {TRAINED_BASE}"
    )


def _own_part(lost: list[str], held: set[str]) -> str | None:
    """The first part of the base that holds all of the lost modules and none of the others, above any layer."""
    parts: list[str] = []
    for level in zip(*(name.split(".")[:-1] for name in lost), strict=False):
        if len(set(level)) > 1 or level[0].isdigit():
            return None
        parts.append(level[0])
        part = ".".join(parts)
        if not any(name.startswith(f"{part}.") for name in held):
            return part
    return None


def _gaps(held: set[str], targets: object) -> Iterator[Violation]:
    # A pattern or full names may leave layers out on purpose, and so may models whose layers differ.
    if not isinstance(targets, tuple) or any("." in name for name in targets):
        return
    groups: dict[str, list[int]] = {}
    for name in held:
        number = next((int(part) for part in name.split(".") if part.isdigit() and len(part) < 6), None)
        if number is not None:
            groups.setdefault(starred(name), []).append(number)
    for pattern, numbers in groups.items():
        count = max(numbers) + 1 - len(set(numbers))
        if 0 < count <= len(numbers) // 4 and pattern.count("*") == 1:
            lost = sorted(set(range(max(numbers) + 1)) - set(numbers))
            yield Violation(
                where=pattern,
                observed=f"layers {', '.join(map(str, lost[:8]))} are missing between layers that the file has",
                expected="every layer up to the last",
                fix="compare with the base model (base=...); if it has these modules, save the adapter again",
                severity="info",
            )
