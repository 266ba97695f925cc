from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.base import HEADS_BY_TASK_TYPE
from pytest_lora.facts.checkpoint import CheckpointFacts
from pytest_lora.facts.settings import Settings
from pytest_lora.rules import Violation, rule


@rule("LORA426", severity="error", needs=CheckpointFacts)
def saved_module_is_not_in_the_file(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """A module that the configuration saves in full is missing in the file.

    ## What it does
    Looks for the tensors of modules_to_save, of trainable_token_indices and of bias in the file. With a
    base, PEFT says which they are.

    ## Why is this bad?
    The trained head or tokens are lost. PEFT raises a KeyError, or older versions load random values.

    ## Example
    ```python
    path = adapter(modules_to_save=["lm_head"])
    edit(path, lambda tensors: {k: v for k, v in tensors.items() if "lora_" in k})
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter(modules_to_save=["lm_head"]))
    ```

    ## References
    - https://github.com/huggingface/peft/issues/577
    - https://huggingface.co/docs/peft/developer_guides/troubleshooting
    """
    settings = facts.settings
    fix = "save through save_pretrained of the PeftModel, without a filter on 'lora' in the keys"
    if not facts.is_judged or settings is None or facts.misnamed or not facts.lora or facts.is_foreign:
        return
    if facts.fit is not None and facts.fit.compared:
        lost = [_module(name) for name in facts.fit.missing if ".lora_" not in name]
    else:
        added = HEADS_BY_TASK_TYPE.get(settings.task_type or "", ())
        wanted = [name for name in settings.modules_to_save if name not in added]
        lost = [name for name in wanted if not facts.holds(name)]
        # T5 and BART call theirs ``classification_head``, which has to be named by hand.
        of_its_own = any("head" in name for name in wanted)
        if settings.modules_to_save and added and not (of_its_own or any(map(facts.holds, added))):
            lost.append(" or ".join(added))
            fix += (
                "; a head of another name (classification_head in T5 and BART) has to be in modules_to_save"
            )
    if lost:
        yield Violation(
            where=", ".join(dict.fromkeys(lost)),
            observed=f"{_field(facts, settings)} asks for it, but it is missing: the file has no weights of it",
            expected="the weights of every module that the configuration saves",
            fix=fix,
        )
    if settings.trainable_token_indices and not facts.fit and not any("token" in t.name for t in facts.plain):
        yield Violation(
            where="trainable_token_indices",
            observed="rows of tokens were trained, but the file has none: they are missing",
            expected="token_adapter tensors in the file",
            fix="save through save_pretrained of the PeftModel, without a filter on 'lora' in the keys",
        )


def _field(facts: CheckpointFacts, settings: Settings) -> str:
    missing = facts.fit.missing if facts.fit else ()
    if settings.bias != "none" and missing and all(name.endswith("bias") for name in missing):
        return f"bias={settings.bias!r}"
    return "modules_to_save or trainable_token_indices"


def _module(key: str) -> str:
    return key.removeprefix("base_model.model.").rpartition(".")[0]
