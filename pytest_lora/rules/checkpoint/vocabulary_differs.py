from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CheckpointFacts
from pytest_lora.rules import Violation, rule


@rule("LORA434", severity="error", needs=CheckpointFacts)
def vocabulary_differs(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """The adapter was trained with another size of the vocabulary than the base has.

    ## What it does
    Compares the rows of embeddings and output heads in the file with those of the base, and the tokens of a
    tokenizer in the folder with both. Where no base is given and the adapter's own name for it is that of a public
    model, nothing is said: the vocabulary may have been extended for this adapter.

    ## Why is this bad?
    Loading fails with a size mismatch, or tokens have no row: an index error, or a token that means
    nothing.

    ## Example
    ```python
    path = adapter(vocab_size=130, modules_to_save=["embed_tokens", "lm_head"])
    report = check_checkpoint(path, base)
    ```

    ## Use instead
    ```python
    path = adapter(modules_to_save=["embed_tokens", "lm_head"])
    report = check_checkpoint(path, base)
    ```

    ## References
    - https://huggingface.co/docs/peft/developer_guides/troubleshooting#extending-the-vocabulary
    """
    if facts.fit is None or facts.is_foreign or facts.fit.may_be_extended:
        return
    base = facts.fit.base
    rows: dict[str, int] = {}
    for misfit in facts.fit.misfits:
        key = facts.keys[misfit.name]
        module = key.module.removesuffix(".base_layer")
        if module in (base.input_embeddings, base.output_embeddings) and misfit.found and misfit.wanted:
            side = 1 if key.part == "lora_embedding_A" else 0
            packed = misfit.found[1:] == (1,) and misfit.wanted[1:] != (1,)  # bytes of bitsandbytes, not rows
            if key.part in ("lora_A", "lora_embedding_B") or len(misfit.found) <= side or packed:
                continue
            if misfit.found[side] not in (0, misfit.wanted[side]):
                rows[module] = misfit.found[side]
    for found in sorted(set(rows.values())):
        modules = [module for module, number in rows.items() if number == found]
        leaves = " and ".join(repr(module.rpartition(".")[2]) for module in modules)
        yield Violation(
            where=", ".join(modules),
            observed=f"the file has {found} rows for {leaves}, but the vocabulary of "
            f"{base.architecture} has {base.vocab_size}",
            expected="a base with the vocabulary of the training",
            fix=f"call base.resize_token_embeddings({found}) before the adapter is loaded",
        )
    highest = facts.tokens
    if not rows and highest is not None and base.vocab_size and highest >= base.vocab_size:
        yield Violation(
            where=f"tokenizer in {facts.name}",
            observed=f"the tokenizer knows token {highest}, but the vocabulary of {base.architecture} has only "
            f"{base.vocab_size} rows, and the file adds none",
            expected="a row for every token",
            fix=f"call base.resize_token_embeddings({highest + 1}) and train the new rows, "
            "or take the tokenizer of the base",
        )
