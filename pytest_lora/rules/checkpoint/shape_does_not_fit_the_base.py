from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CheckpointFacts
from pytest_lora.facts.config import Misfit
from pytest_lora.facts.saved_tensors import PREFIX, AdaptedModule
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA433", severity="error", needs=CheckpointFacts)
def shape_does_not_fit_the_base(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """A tensor has another shape than the base asks for.

    ## What it does
    Compares every tensor with the one that PEFT makes for this base and configuration. Ranks and
    vocabularies have rules of their own.

    ## Why is this bad?
    Loading fails with a size mismatch: the adapter is for a base of another width, or the head for another
    number of classes.

    ## Example
    ```python
    wider = adapter(hidden_size=128)
    report = check_checkpoint(wider, base)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter(), base)
    ```

    ## References
    - https://github.com/huggingface/peft/issues/1746
    """
    fit = facts.fits
    if fit is None:
        return
    settings = facts.settings
    packed = bool(settings and settings.target_parameters)
    ranks_differ = {m.name for m in facts.adapted if _has_another_rank(m, packed) or not m.ranks_agree}
    embeddings = {fit.base.input_embeddings, fit.base.output_embeddings}
    wrong: dict[bool, list[tuple[str, Misfit]]] = {}
    for misfit in fit.misfits:
        key = facts.keys[misfit.name]
        module = key.module.removesuffix(".base_layer")
        if 0 in misfit.found:
            continue
        if module not in embeddings and not (key.part and module in ranks_differ):
            wrong.setdefault(bool(key.part), []).append((module, misfit))
    for is_lora, found in wrong.items():
        module, first = found[0]
        is_head = not is_lora and settings is not None and settings.saves(module)
        of_tokens = module.endswith(".token_adapter")
        yield Violation(
            where=grouped(dict.fromkeys(module for module, _ in found)),
            observed=f"{first.name.removeprefix(PREFIX)} is {_shaped(first.found)}, but "
            f"{fit.base.architecture} asks for {_shaped(first.wanted)} "
            f"({len(found)} of {len(facts.tensors)} tensors do not fit)",
            expected="the shapes of the base that the adapter was trained on",
            fix="restore the trainable_token_indices of the training: the file has another number of rows"
            if of_tokens
            else f"load the base with num_labels={first.found[0]}, as in training"
            if is_head and first.found
            else _UNSWAP
            if packed and _swapped(facts, [misfit for _, misfit in found])
            else _trained_base(facts, [misfit for _, misfit in found] if is_lora else []),
        )


_UNSWAP = (
    "these are packed experts with both sides swapped, as Unsloth and older PEFT save them: for each expert the new "
    "lora_A is the transposed lora_B and the new lora_B the transposed lora_A (lora_A counts experts, then ranks; "
    "lora_B ranks, then experts)"
)


def _has_another_rank(module: AdaptedModule, packed: bool) -> bool:
    """Whether the factors have another rank than the configuration; packed experts have a multiple of it."""
    rank, configured = module.rank, module.configured_rank
    return rank != configured and not (packed and rank and configured and rank % configured == 0)


def _swapped(facts: CheckpointFacts, misfits: list[Misfit]) -> bool:
    """Whether every misfit is of packed experts, and one factor has the size that the other one asks for."""
    sizes: dict[str, set[tuple[int, int]]] = {}
    for misfit in misfits:
        key = facts.keys[misfit.name]
        if len(misfit.found) != 2 or len(misfit.wanted) != 2 or key.part not in ("lora_A", "lora_B"):
            return False
        side = 1 if key.part == "lora_A" else 0
        sizes.setdefault(key.module, set()).add((misfit.found[side], misfit.wanted[side]))
    return all(len(found) == 2 and {(b, a) for a, b in found} == found for found in sizes.values())


def _trained_base(facts: CheckpointFacts, misfits: list[Misfit]) -> str:
    parts = _parts(facts, misfits)
    return "load it on the base that it was trained on" + (
        f"; if this is that one, every tensor named has 1/{parts} of its size, as one rank's slice has under tensor "
        "parallelism: gather the slices of all ranks before saving"
        if parts
        else ""
    )


def _parts(facts: CheckpointFacts, misfits: list[Misfit]) -> int | None:
    """In how many equal parts one factor of each of these modules was cut along one side; None for anything else."""
    quotients: set[float] = set()
    modules: set[str] = set()
    for misfit in misfits:
        module = facts.keys[misfit.name].module
        if module in modules or len(misfit.found) != len(misfit.wanted):
            return None
        modules.add(module)
        sides = zip(misfit.found, misfit.wanted, strict=True)
        cut = [wanted / found for found, wanted in sides if found != wanted]
        if len(cut) != 1:
            return None
        quotients.update(cut)
    whole = quotients.pop() if len(quotients) == 1 else 0.0
    return int(whole) if whole >= 2 and whole.is_integer() else None


def _shaped(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"
