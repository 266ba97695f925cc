from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.rules import Violation, rule


@rule("LORA252", severity="info", needs=ModelFacts)
def unused_weights_are_looked_for(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """DDP looks for unused weights at every step though there are none.

    ## What it does
    Looks for `find_unused_parameters=True` where every tensor of the reducer belongs to an active adapter, and
    the model has neither experts nor a tower for other inputs than text, which some steps may leave out.

    ## Why is this bad?
    DDP walks the whole graph after each forward pass to find what took no part. torch warns that it adds to every step.

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    wrapped = in_one_process(nn.parallel.DistributedDataParallel, model, find_unused_parameters=True)
    report = check_model(wrapped)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    wrapped = in_one_process(nn.parallel.DistributedDataParallel, model)
    report = check_model(wrapped)
    ```

    ## References
    - https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html
    """
    for reducer in facts.wrappers.reducers:
        if expect.purpose != "train" or not reducer.finds_unused or reducer.static_graph:
            continue
        if not (reducer.idle or reducer.optional or reducer.reentrant):
            yield Violation(
                where="DistributedDataParallel",
                observed="find_unused_parameters=True, and every weight that it reduces belongs to an active adapter",
                expected="the search only where a step may leave trained weights out",
                fix="leave find_unused_parameters out, unless your forward skips layers",
            )
