from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.behaviour import ReloadFacts
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA914", severity="error", needs=ReloadFacts)
def base_is_not_the_same(facts: ReloadFacts, expect: Expect) -> Iterator[Violation]:
    """The base that is loaded differs from the base under the trained adapter.

    ## What it does
    Compares the weights and buffers of the base that is given with those under the adapter, but for rounding: 3e-5 of
    a tensor's largest number. Where they differ by what the adapter adds, it was merged already and is applied twice.

    ## Why is this bad?
    An adapter is a difference to one base. On another one it means something else, and nothing says so.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_reload(model, batch, base=type(base)(base.config))
    ```

    ## Use instead
    ```python
    from copy import deepcopy

    fresh = deepcopy(base)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_reload(model, batch, base=fresh)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/checkpoint
    """
    if facts.merged:
        yield Violation(
            where=grouped(facts.merged),
            observed=f"{len(facts.merged)} tensors of the base differ from the base under the adapter by exactly what "
            f"the adapter adds to them ({len(facts.foreign)} differ): it is merged into one of the two already, and "
            "the adapter on top of that applies it twice",
            expected="the base without the adapter, in both",
            fix="load the base anew and put the adapter on it; merge a copy, or unmerge after each merge: saving a "
            "merged model twice merges twice",
        )
    elif facts.foreign:
        yield Violation(
            where=grouped(facts.foreign),
            observed=f"{len(facts.foreign)} tensors of the base differ from the base under the trained adapter",
            expected="the base on which the adapter was trained, weights and buffers alike",
            fix="load the adapter on the very base and quantization that it was trained on; modules that changed in "
            "training (BatchNorm statistics, a new head) go into modules_to_save",
        )
