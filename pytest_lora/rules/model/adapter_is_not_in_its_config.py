from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA234", severity="warning", needs=ModelFacts)
def adapter_is_not_in_its_config(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """Modules carry an adapter that its configuration does not name.

    ## What it does
    Compares the modules that carry an active adapter with what `target_modules` and `target_parameters` of
    its configuration match.

    ## Why is this bad?
    They train and are saved, but the configuration in the file does not make them: on reload their tensors
    are unexpected keys and are dropped. It happens when `get_peft_model` is called again on a base that
    still carries the layers of an earlier try.

    ## Example
    ```python
    get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"]))
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## Use instead
    ```python
    first = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"]))
    base = first.unload()
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/lora#peft.LoraModel.unload
    - https://github.com/huggingface/peft/issues/1381
    """
    for config in facts.configs:
        stray = _stray(config) if config.adapter in facts.active else []
        if stray:
            yield Violation(
                where=grouped(stray),
                observed=f"{len(stray)} of {len(config.layers)} modules carry adapter {config.adapter!r}, but "
                "its configuration does not target them",
                expected="adapters only where the configuration that is saved beside them says so",
                fix="the base went through PEFT already: load it anew, or unload() the first PEFT model, before "
                "get_peft_model is called again",
            )


def _stray(config: ConfigFacts) -> list[str]:
    """Adapted modules that no target names, neither themselves nor a module around them nor a tied one."""
    fields = ("target_modules", "target_parameters")
    named = {module for match in config.names if match.field in fields for module in match.modules}
    tied = {module for group in config.base.tied if named.intersection(group) for module in group}
    known = named | tied
    rest = [layer.module for layer in config.layers if layer.module not in known]
    return [m for m in rest if named and not any(m.startswith(f"{around}.") for around in known)]
