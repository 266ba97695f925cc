from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.base import BaseModule
from pytest_lora.facts.model import ModelFacts
from pytest_lora.findings import grouped, starred
from pytest_lora.rules import Violation, rule


@rule("LORA220", severity="warning", needs=ModelFacts)
def base_is_partly_quantized(facts: ModelFacts, expect: Expect) -> Iterator[Violation]:
    """Only a part of the linear layers of one kind is quantized.

    ## What it does
    Compares modules that differ only in their layer number: some are quantized, some are not, and
    `llm_int8_skip_modules` does not name them; or some are in 4 bits and some in 8.

    ## Why is this bad?
    Memory lies between 4 and 16 bit, and the layers differ in precision for no reason. It happens when
    layers are replaced, dequantized or merged after quantizing. Where the model declares no quantization of
    its own, it is only an info.

    ## Example
    ```python
    model = get_peft_model(base_4bit, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    layer = nn.Linear(128, 64, bias=False).requires_grad_(False)
    model.base_model.model.model.layers[1].mlp.down_proj = layer
    report = check_model(model)
    ```

    ## Use instead
    ```python
    model = get_peft_model(base_4bit, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    report = check_model(model)
    ```

    ## References
    - https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1331
    - https://huggingface.co/docs/transformers/quantization/bitsandbytes
    """
    found = facts.base.quantization
    if found is None:
        return
    siblings: dict[str, list[BaseModule]] = {}
    for module in facts.base.modules:
        if module.is_linear:
            siblings.setdefault(starred(module.name), []).append(module)
    mixed = [group for group in siblings.values() if len({m.quantization is None for m in group}) == 2]
    plain = [
        m for group in mixed for m in group if m.quantization is None and not _skipped(m.name, found.skipped)
    ]
    if plain:
        every = sum(len(group) for group in mixed)
        yield Violation(
            where=grouped(m.name for m in plain),
            observed=f"only part of the linear layers is quantized: {len(plain)} of {every} of these are "
            f"plain {plain[0].kind}",
            expected=f"all of them quantized ({found.declared or 'like their siblings'}), or named in "
            "llm_int8_skip_modules",
            fix="load the base again and do not replace its layers, or list them in llm_int8_skip_modules",
            severity=None if found.declared else "info",
        )
    kinds = {m.name: m.quantization for group in siblings.values() for m in _of_two_kinds(group)}
    if kinds:
        counts = Counter(kinds.values())
        fewer = min(counts, key=lambda kind: counts[kind])
        yield Violation(
            where=grouped(name for name, kind in kinds.items() if kind == fewer),
            observed="linear layers of one kind are quantized in two ways: "
            + ", ".join(f"{count} in {kind}" for kind, count in counts.items()),
            expected=f"all of them quantized the same way ({found.declared or 'like their siblings'})",
            fix="load the base again and do not replace its layers",
        )


def _of_two_kinds(group: list[BaseModule]) -> list[BaseModule]:
    quantized = [module for module in group if module.quantization]
    return quantized if len({module.quantization for module in quantized}) > 1 else []


def _skipped(module: str, names: Iterable[str]) -> bool:
    """Whether a skip list names a module or one around it, by any part of its path."""
    return any(f".{name}." in f".{module}." or module.startswith(name) for name in names)
