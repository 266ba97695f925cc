from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.rules import Violation, rule

NEEDED_INIT = {
    "eva_config": "eva",
    "corda_config": "corda",
    "lora_ga_config": "lora_ga",
    "loftq_config": "loftq",
}
"""The ``init_lora_weights`` under which PEFT reads each of these."""


@rule("LORA134", severity="warning", needs=ConfigFacts)
def setting_has_no_effect(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """A field of the configuration belongs to a method that is not switched on.

    ## What it does
    Looks for `eva_config`, `corda_config`, `lora_ga_config` and `loftq_config` without the `init_lora_weights` of
    that name, and for `use_qalora` on a base without GPTQ layers. A `loftq_config` that PEFT is given without
    `init_lora_weights="loftq"` is dropped by `LoraConfig` itself with a warning; nothing is left of it to see.
    `ensure_weight_tying` is told where the base does not tie its head and the configuration trains the input
    embedding alone.

    ## Why is this bad?
    PEFT goes on without the method that was asked for, at best with a warning among many.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], use_qalora=True)
    report = check_config(config, base)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"])
    report = check_config(config, base)
    ```

    ## References
    - https://huggingface.co/docs/peft/package_reference/lora#peft.LoraConfig
    - QA-LoRA: https://arxiv.org/abs/2309.14717
    """
    if facts.live:
        return
    init = str(facts.settings.init_lora_weights)
    for field, needed in NEEDED_INIT.items():
        if getattr(facts.settings, field) and not init.lower().startswith(needed):
            yield Violation(
                where=field,
                observed=f"{field} is set, but ignored: init_lora_weights is {init}",
                expected=f"init_lora_weights={needed!r} beside {field}",
                fix=advise(change("set", init_lora_weights=needed), ", or ", change(**{field: None})),
            )
    if facts.settings.use_qalora and not any(m.quantization == "gptq or awq" for m in facts.base.modules):
        yield Violation(
            where="use_qalora",
            observed="use_qalora=True, but ignored: PEFT has QALoRA for GPTQ layers alone, and this base has none",
            expected="a GPTQ base under QALoRA",
            fix=advise("load the base quantized with GPTQ, or ", change("set", use_qalora=False)),
        )
    yield from _tying_of_an_untied_base(facts)


def _tying_of_an_untied_base(facts: ConfigFacts) -> Iterator[Violation]:
    """A head may be meant alone; an embedding for which tying was asked is not."""
    embedding, head = facts.base.input_embeddings, facts.base.output_embeddings
    if not facts.settings.ensure_weight_tying or not embedding or not head:
        return
    if embedding in facts.base.tied_to(head) or _is_trained(facts, head) or not _is_trained(facts, embedding):
        return
    leaves = [side.rpartition(".")[2] for side in (embedding, head)]
    yield Violation(
        where="ensure_weight_tying",
        observed=f"ensure_weight_tying=True, but ignored: this base does not tie {embedding} and {head}, and the "
        f"configuration trains {embedding} alone",
        expected=f"{head} to be named as well, if it is to train",
        fix=advise(
            f"name {leaves[1]!r} where {leaves[0]!r} is named, or, if that is meant alone, ",
            change("set", ensure_weight_tying=False),
        ),
    )


def _is_trained(facts: ConfigFacts, module: str) -> bool:
    return (
        facts.keeps(module) or module in (*facts.adapted, *facts.stored) or bool(facts.trained_rows(module))
    )
