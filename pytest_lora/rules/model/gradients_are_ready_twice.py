from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.model import ModelFacts
from pytest_lora.rules import Violation, rule


@rule("LORA251", severity="error", needs=ModelFacts)
def gradients_are_ready_twice(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """DDP looks for unused weights while checkpointing is reentrant.

    ## What it does
    Looks for `find_unused_parameters=True` on DDP around a model whose gradient checkpointing is reentrant.

    ## Why is this bad?
    Reentrant checkpointing runs a backward pass inside the backward pass. DDP then marks weights as ready that it has
    marked as unused, and the first step raises "Expected to mark a variable ready only once".

    ## Example
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    wrapped = in_one_process(nn.parallel.DistributedDataParallel, model, find_unused_parameters=True)
    report = check_model(wrapped)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped = in_one_process(nn.parallel.DistributedDataParallel, model)
    report = check_model(wrapped)
    ```

    ## References
    - https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html
      (reentrant checkpointing works where no weight is unused and none is used twice)
    - https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments.ddp_find_unused_parameters
    """
    for reducer in facts.wrappers.reducers:
        if (
            expect.purpose == "train"
            and reducer.reentrant
            and reducer.finds_unused
            and not reducer.static_graph
        ):
            yield Violation(
                where="DistributedDataParallel",
                observed="find_unused_parameters=True around reentrant gradient checkpointing: the first step raises",
                expected="checkpointing that is not reentrant, or no search for unused weights",
                fix="enable checkpointing with use_reentrant False before the model is wrapped, or leave "
                "find_unused_parameters out",
            )
