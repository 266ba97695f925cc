from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CheckpointFacts
from pytest_lora.facts.saved_tensors import PREFIX, WRAPPERS, Key
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import TO_PEFT


@rule("LORA422", severity="error", needs=CheckpointFacts)
def key_prefix_is_wrong(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """The keys carry another prefix than PEFT looks for, so that they match nothing.

    ## What it does
    Looks at what stands before (and in) the names of the LoRA tensors: `base_model.model.` once and first, no
    name of a wrapper (torch.compile, DDP, FSDP, DeepSpeed), no adapter name of its own; at `.weight` at their
    end; and at what other tools call the factors (`lora_down`, `lora_a`). With a base, PEFT itself has the last
    word.

    ## Why is this bad?
    Keys that PEFT does not know are dropped; the adapter loads with a warning at most, and changes nothing.

    ## Example
    ```python
    path = adapter()
    edit(path, lambda tensors: {f"module.{k}": v for k, v in tensors.items()})
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter())
    ```

    ## References
    - https://github.com/huggingface/peft/issues/2115
    - https://github.com/vllm-project/vllm/issues/34186
    - https://huggingface.co/docs/peft/developer_guides/checkpoint
    """
    alike: dict[tuple[object, ...], list[str]] = {}
    for tensor in facts.misnamed:
        alike.setdefault(_seen(facts.key(tensor)), []).append(tensor.name)
    groups: dict[tuple[str, str], list[str]] = {}
    for names in alike.values():
        groups.setdefault(_diagnosis(facts.keys[names[0]]), []).extend(names)
    for (seen, fix), names in groups.items():
        yield Violation(
            where=f"{facts.weights} in {facts.name}",
            observed=f"{len(names)} of {len(facts.lora)} adapter keys {seen}, so they match nothing in the model: "
            f"{names[0][:150]}",
            expected=f"keys such as {_as_peft(facts.keys[names[0]])[:150]}",
            fix=fix,
            severity="warning" if _may_be_meant(names[0], facts) else None,
        )


def _may_be_meant(name: str, facts: CheckpointFacts) -> bool:
    """Whether a base could call a part of itself "module", which only a base can tell."""
    return facts.fit is None and name.startswith(f"{PREFIX}module.")


_IN_PEFT = {"lora_down": "lora_A", "lora_up": "lora_B", "lora_a": "lora_A", "lora_b": "lora_B"}


def _as_peft(key: Key) -> str:
    if not key.tool_name:
        return key.peft_name
    module = key.module.partition(f".{key.tool_name}")[0]
    return f"{PREFIX}{module}.{_IN_PEFT[key.tool_name]}.weight"


def _seen(key: Key) -> tuple[object, ...]:
    """All of a key that a diagnosis is made of."""
    end = key.peft_name.endswith(".weight")
    return key.tool_name, end, key.wrappers, key.before[:60], key.prefixes, key.is_cut, key.adapter


def _diagnosis(key: Key) -> tuple[str, str]:
    if key.tool_name.endswith(("down", "up")):
        return (
            "are named as diffusers or kohya-ss name them (lora_down, lora_up)",
            "convert the file: lora_down is lora_A, lora_up is lora_B, and the modules need the names of this base",
        )
    if key.tool_name and key.peft_name.endswith(".weight"):
        return "are named as torchtune names them (lora_a.weight, lora_b.weight)", TO_PEFT["torchtune"]
    if key.tool_name:
        return (
            "are named as MLX names them (lora_a, lora_b)",
            "convert the file: lora_a is lora_A.weight and lora_b is lora_B.weight, each transposed; its scale is the "
            "whole scaling, so lora_alpha is scale * r",
        )
    if key.wrappers:
        wrapper = key.wrappers[0]
        origin = WRAPPERS[wrapper]
        return (
            f"carry '{wrapper}.' of {origin}",
            f"take '{wrapper}.' out of the keys: {_without(f'{wrapper}.')}; "
            "save the unwrapped model next time",
        )
    if before := key.before[:60]:
        return (
            f"carry '{before}.' before the prefix base_model.model.",
            f"take '{before}.' off the keys: {_without(f'{before}.')}; "
            "save_pretrained of the PeftModel itself next time",
        )
    if key.prefixes == 0:
        return (
            "lack the prefix base_model.model.",
            f"put it before every key: {_saved(f'{PREFIX!r} + k')}; save_pretrained of the PeftModel writes it",
        )
    if key.prefixes > 1:
        return (
            "carry the prefix base_model.model. twice, as from a PeftModel nested inside a PeftModel",
            f"strip all but one: {_without(PREFIX, key.prefixes - 1)}",
        )
    if key.is_cut:
        return (
            "lack .weight at their end",
            "put it there: " + _saved("k if k.endswith('.weight') else k + '.weight'"),
        )
    return (
        f"carry the adapter name {key.adapter!r}",
        f"take '.{key.adapter}' out of the keys: {_without(f'.{key.adapter}')}; "
        "PEFT puts the name in while it loads",
    )


def _without(text: str, times: int = 1) -> str:
    return _saved(f"k.replace({text!r}, '', {times})")


def _saved(name: str) -> str:
    """The line that writes a file anew with other keys; the names are those of ``safetensors.torch``."""
    return f"save_file({{{name}: v for k, v in load(file.read_bytes()).items()}}, file)"
