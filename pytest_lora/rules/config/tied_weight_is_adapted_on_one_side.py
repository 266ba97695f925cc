from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import Advice, advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.base import is_tied_by_name
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.facts.settings import block_of, is_named
from pytest_lora.findings import grouped, starred
from pytest_lora.rules import Violation, rule
from pytest_lora.rules.remedies import tied_as_one, without


@rule("LORA113", severity="error", needs=ConfigFacts, on_saved="merged")
def tied_weight_is_adapted_on_one_side(facts: ConfigFacts, expect: Expect) -> Iterator[Violation]:
    """A module is adapted whose weight is tied to another module that keeps the old one.

    ## What it does
    Looks for LoRA targets and `modules_to_save` among modules that share their weight (input embedding
    and output head), unless both sides are saved in full, or PEFT ties them under `ensure_weight_tying`. That it
    does for an embedding called `embed_tokens`; by another name (`wte`, `shared`) the sides are not tied, or no
    longer once the adapter is loaded. Modules of one kind that all carry an adapter of their own (the shared blocks
    of Zamba) and copies of one block (`layer_replication`), some or all of them adapted, are fine until they are to
    be merged (`Expect(will_merge=True)`). Rows (`trainable_token_indices`) of the head alone are a finding, and so
    are other rows of the head than of the embedding. The same rows of both are none, nor are those of the embedding
    alone, as PEFT trains them on both sides. Under `Expect(will_merge=True)`, LoRA targets are one with
    `ensure_weight_tying`, too.

    ## Why is this bad?
    The two sides come apart: one uses the adapter, the other does not. Merging writes the update into
    the shared tensor, so that it also changes the side that was never adapted.

    ## Example
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "lm_head"])
    report = check_config(config, tied_base)
    ```

    ## Use instead
    ```python
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    report = check_config(config, tied_base)
    ```

    ## References
    - https://github.com/huggingface/peft/issues/1707
    - https://github.com/huggingface/peft/issues/2018
    - https://github.com/huggingface/peft/issues/2864
    - https://github.com/huggingface/peft/pull/2870
    """
    yield from _rows_of_one_side(facts)
    ensured = facts.settings.ensure_weight_tying
    if ensured and expect.will_merge:
        yield from _merged_twice(facts)
    if expect.will_merge and not facts.live:
        yield from _merged_into_replicas(facts)
    kinds = {module.name: module.kind for module in facts.base.modules}
    for group in facts.base.tied:
        adapted = [m for m in group if m in facts.adapted]
        if ensured and facts.base.input_embeddings in group and _covers(group, facts):
            yield from _not_tied_when_loaded(group, facts)
            continue
        copies = facts.settings.layer_replication and len({starred(m) for m in group}) == 1
        if copies or (len(adapted) == len(group) and len({kinds.get(m) for m in group}) == 1):
            if expect.will_merge and adapted:
                yield _merged_into_one(group, adapted)
            continue
        saved = [] if facts.live else [m for m in group if m in facts.saved_modules]
        if not adapted and len(saved) in (0, len(group)):
            continue
        touched = adapted or saved
        others = [m for m in group if m not in touched]
        way = "a LoRA target" if adapted else "in modules_to_save"
        seen = f"{touched[0]} is {way}, but shares its weight with {', '.join(others)} (tied embeddings)"
        if ensured:
            seen += (
                ", and ensure_weight_tying=True does not tie them: PEFT knows embed_tokens and lm_head alone"
            )
        if not others:
            seen = f"{' and '.join(touched)} share one weight (tied embeddings), and each has an adapter of its own: "
            seen += "merging writes every update into all of them"
        yield Violation(
            where=", ".join(touched),
            observed=seen,
            expected="tied modules to be adapted together or not at all"
            if others
            else "one adapter for one weight",
            fix=_fix(touched, "target_modules" if adapted else "modules_to_save", facts),
        )


def _merged_into_one(group: tuple[str, ...], adapted: list[str]) -> Violation:
    own = (
        "each has an adapter of its own"
        if len(adapted) == len(group)
        else f"{grouped(adapted)} has an adapter"
    )
    return Violation(
        where=grouped(group),
        observed=f"these {len(group)} modules share one weight, and {own}: merging adds every update to that weight",
        expected="modules to be merged whose weight no other one shares",
        fix="keep the adapter apart from the base, or adapt modules that share no weight",
    )


def _merged_into_replicas(facts: ConfigFacts) -> Iterator[Violation]:
    """Copies of a block share its weights: PEFT merges without a word, and what one copy learned changes the others."""
    sources = facts.settings.replicated_blocks
    again = {block for block, source in enumerate(sources) if sources.count(source) > 1}
    hit = [module for module in sorted(facts.adapted) if block_of(module) in again]
    if hit:
        ranges = [list(pair) for pair in facts.settings.layer_replication]
        yield Violation(
            where=grouped(hit),
            observed=f"layer_replication={ranges} puts blocks {sorted({sources[b] for b in again})} of the base into "
            f"the model more than once, with one weight for all copies: merging adds every update to that weight, and "
            f"the merged model computes something else ({len(hit)} adapted modules are in such blocks)",
            expected="modules to be merged whose weight no other one shares",
            fix=advise(
                "keep the adapter apart from the base; or copy the blocks yourself, each with weights of its own, save "
                "that as the base, and ",
                change("set", layer_replication=None),
            ),
        )


def _covers(group: tuple[str, ...], facts: ConfigFacts) -> bool:
    return all(m in facts.adapted for m in group) or all(m in facts.saved_modules for m in group)


def _not_tied_when_loaded(group: tuple[str, ...], facts: ConfigFacts) -> Iterator[Violation]:
    """PEFT ties by the name of either side, but writes the name of the embedding alone into the saved configuration."""
    embedding = facts.base.input_embeddings or ""
    if is_tied_by_name(embedding):
        return
    yield Violation(
        where=", ".join(group),
        observed=f"ensure_weight_tying=True ties {' and '.join(group)} now; the saved adapter names {embedding!r} "
        "alone, by which PEFT does not tie them when it loads it",
        expected="an adapter that is the same after loading",
        fix=_without(list(group), embedding in facts.adapted, facts),
    )


def _fix(touched: list[str], field: str, facts: ConfigFacts) -> Advice:
    left_out = _without(touched, field == "target_modules", facts)
    tied = tied_as_one(facts, field, touched)
    return advise(tied, " (newer PEFT), or ", left_out) if tied else left_out


def _without(modules: list[str], target: bool, facts: ConfigFacts) -> Advice:
    field = "target_modules" if target else "modules_to_save"
    names = getattr(facts.settings, field)
    if not isinstance(names, tuple):
        excluded = facts.settings.exclude_modules or ()
        leaves = [module.rpartition(".")[2] for module in modules]
        more = (excluded, *leaves) if isinstance(excluded, str) else (*excluded, *leaves)
        return advise("leave it out: ", change(exclude_modules=more))
    rest = without(names, *(name for name in names for module in modules if is_named(module, name)))
    return (
        advise("take it out: ", change(**{field: rest}))
        if rest or not target
        else advise("adapt other modules")
    )


def _rows_of_one_side(facts: ConfigFacts) -> Iterator[Violation]:
    """PEFT trains rows of the embedding on what is tied to it, too, but rows of the head on the head alone.

    Where both are named it ties them if the two lists are equal, number by number.
    """
    embedding = facts.base.input_embeddings or ""
    chosen = [(name or embedding, tuple(rows)) for name, rows in facts.settings.trainable_token_indices]
    for group in facts.base.tied:
        rows = {m: indices for m in group for name, indices in chosen if is_named(m, name)}
        if not rows or embedding not in group:
            continue
        others = [m for m, indices in rows.items() if indices != rows.get(embedding)]
        if embedding not in rows:
            yield Violation(
                where=f"trainable_token_indices: {', '.join(rows)}",
                observed=f"rows of {others[0]} are trained, which shares its weight with {embedding} (tied "
                "embeddings): that keeps the old rows, until merging writes the new ones into both",
                expected="rows of the embedding, which PEFT trains on both sides",
                fix=f"name the embedding in trainable_token_indices: {{{embedding.rpartition('.')[2]!r}: [...]}}",
            )
        elif others:
            every = sorted(set().union(*rows.values()))
            yield Violation(
                where=f"trainable_token_indices: {', '.join(rows)}",
                observed=f"{embedding} and {', '.join(others)} share one weight (tied embeddings) and train other rows "
                "each, or the same in another order: a token is read by one row and written by another, until merging "
                "writes all of them into both",
                expected="the same list on both sides, which PEFT then keeps tied",
                fix=advise(
                    "name the embedding alone, with all rows: ",
                    change(trainable_token_indices={embedding.rpartition(".")[2]: every}),
                ),
            )


def _merged_twice(facts: ConfigFacts) -> Iterator[Violation]:
    for group in facts.base.tied:
        if all(module in facts.adapted for module in group):
            yield Violation(
                where=", ".join(group),
                observed=f"{' and '.join(group)} share their weight and their update (ensure_weight_tying): merging "
                "adds it to that weight once for each of them",
                expected="modules to be merged whose weight no other one shares",
                fix="keep the adapter apart from the base, untie the base before training (tie_word_embeddings=False), "
                "or train the embedding with modules_to_save or trainable_token_indices",
            )
