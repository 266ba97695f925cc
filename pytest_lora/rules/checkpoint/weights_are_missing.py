from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CONFIG, PICKLE_ENDINGS, PICKLED, WEIGHTS, CheckpointFacts
from pytest_lora.rules import Violation, rule

OF_THE_TRAINER = ("optimizer", "scheduler", "scaler", "rng_state", "training_args")
"""How the names of pickles begin that ``Trainer`` writes beside the weights."""
FORMATS = {
    ".gguf": "is for llama.cpp, whose GGUF PEFT does not read",
    ".npz": "is an archive of arrays, as MLX once wrote adapters",
    ".h5": "is for Keras",
}
"""Files of adapters that only other programs read."""
DIFFUSERS = "pytorch_lora_weights"
"""How the name of a file begins that ``save_lora_weights`` of a pipeline of Diffusers writes."""


@rule("LORA402", severity="error", needs=CheckpointFacts)
def weights_are_missing(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """The folder has a configuration, but no weights that PEFT would load.

    ## What it does
    Looks for adapter_model.safetensors beside adapter_config.json, and names what there is instead.

    ## Why is this bad?
    PEFT raises, or looks for the file on the hub. Checkpoints of DeepSpeed and FSDP hold the adapter in
    files of their own until they are gathered.

    ## Example
    ```python
    path = adapter()
    remove(path, "adapter_model.safetensors")
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter())
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/checkpoint
    - https://huggingface.co/docs/peft/accelerate/fsdp
    """
    if (
        facts.weights is not None
        or facts.config is None
        or facts.config.tool
        or facts.has(PICKLED)
        or facts.shards
        or facts.merged
    ):
        return
    parts = [e.name for e in facts.entries if e.name.endswith(".distcp") or e.name.startswith("global_step")]
    parts += [e.name for e in facts.entries if "fsdp" in e.name]
    if parts:
        seen = f"; {parts[0]} is of a distributed checkpoint"
        fix = "gather the weights while saving: trainer.save_model() with a full state dict, or merge the parts first"
    else:
        seen, fix = _other_file([e.name for e in facts.files]) or ("", SAVE_AGAIN)
    yield Violation(
        where=f"{facts.name}",
        observed=f"there is no {WEIGHTS} beside {CONFIG}{seen}",
        expected=f"{WEIGHTS} with the weights of the adapter",
        fix=fix,
    )


SAVE_AGAIN = "save the adapter again with save_pretrained of the PeftModel, or copy the missing file"


def _other_file(names: list[str]) -> tuple[str, str] | None:
    """What lies there instead, and what to do with it."""
    for name in names:
        if name.startswith(DIFFUSERS):
            return (
                f"; {name} has the names of Diffusers",
                "load it with load_lora_weights of the pipeline, or save it with save_pretrained of the PeftModel",
            )
    for name in names:
        if name.endswith(".safetensors"):
            return f"; there is {name}", f"if {name} is the adapter, rename it to {WEIGHTS}"
    for name in names:
        for ending, says in FORMATS.items():
            if name.endswith(ending):
                return f"; {name} {says}", f"keep {WEIGHTS} from which it was converted, or {SAVE_AGAIN}"
    for name in names:
        if name.endswith(PICKLE_ENDINGS) and not name.startswith(OF_THE_TRAINER):
            return (
                f"; there is {name}, a name that PEFT does not look for",
                f"if {name} holds the adapter, load it and save its tensors as {WEIGHTS} with save_file of "
                f"safetensors, under PEFT's names; else {SAVE_AGAIN}",
            )
    return None
