from __future__ import annotations

from collections.abc import Iterator

from pytest_lora.changes import Change, advise, change
from pytest_lora.expect import Expect
from pytest_lora.facts.checkpoint import CheckpointFacts
from pytest_lora.facts.saved_tensors import AdaptedModule
from pytest_lora.findings import grouped
from pytest_lora.rules import Violation, rule


@rule("LORA431", severity="error", needs=CheckpointFacts)
def rank_differs_from_config(facts: CheckpointFacts, expect: Expect) -> Iterator[Violation]:
    """The tensors have another rank than adapter_config.json says.

    ## What it does
    Compares the rows of lora_A (and the columns of lora_B) with r and rank_pattern. Factors that have the rank on
    their other side are called transposed. A matrix smaller than the rank gives PiSSA and OLoRA fewer.

    ## Why is this bad?
    Loading fails with a size mismatch. Where only r is read, as in other engines, the scaling alpha/r is
    wrong.

    ## Example
    ```python
    path = adapter(r=8)
    configure(path, r=16)
    report = check_checkpoint(path)
    ```

    ## Use instead
    ```python
    report = check_checkpoint(adapter())
    ```

    ## References
    - https://github.com/huggingface/peft/issues/1746
    - https://github.com/oobabooga/text-generation-webui/issues/3944
    """
    if not facts.is_judged or (facts.fit is not None and facts.fit.loads):
        return
    turned = [m for m in facts.adapted if m.turned]
    if turned:
        first = turned[0]
        shapes = ", ".join(
            f"{part} is {'x'.join(map(str, t.shape))}"
            for part, t in (("lora_A", first.a), ("lora_B", first.b))
            if t is not None
        )
        yield Violation(
            where=grouped(m.name for m in turned),
            observed=f"{shapes}: {' and '.join(first.turned)} {'have' if len(first.turned) > 1 else 'has'} the rank "
            f"r={first.configured_rank} on the wrong side, as if transposed"
            + (", or as if lora_A and lora_B had changed places" if len(first.turned) > 1 else ""),
            expected="lora_A of rank x in_features, lora_B of out_features x rank",
            fix="transpose these factors, or give them each other's name; MLX stores them transposed",
        )
    broken = {m.name for m in turned}
    uneven = [m for m in facts.adapted if m.rank and m.b_rank and not m.ranks_agree and m.name not in broken]
    if uneven:
        yield Violation(
            where=grouped(m.name for m in uneven),
            observed=f"lora_A has rank {uneven[0].rank}, but lora_B has rank {uneven[0].b_rank}",
            expected="two factors of one rank",
            fix="save the adapter again from the trained model; the file is put together from two adapters",
        )
    broken |= {m.name for m in uneven}
    wrong: dict[tuple[int, int], list[str]] = {}
    for module in facts.adapted:
        rank, configured = module.rank, module.configured_rank
        if rank and configured and rank != configured and module.name not in broken:
            fused = bool(facts.settings and facts.settings.target_parameters) and rank % configured == 0
            if not fused and not _is_decomposed(module, facts):
                wrong.setdefault((configured, rank), []).append(module.name)
    for (configured, rank), names in wrong.items():
        yield Violation(
            where=grouped(names),
            observed=f"adapter_config.json says r={configured}, but the tensors have rank {rank} "
            f"in {len(names)} of {len(facts.adapted)} modules",
            expected="the rank of the tensors in r or rank_pattern",
            fix=advise(
                _fields(facts, names, rank),
                " and the lora_alpha of the training; ranks are fixed at initialisation",
            ),
        )


def _fields(facts: CheckpointFacts, names: list[str], rank: int) -> Change:
    """The rank of the file: for all modules, for the key that decides, or for modules of these names."""
    settings = facts.settings
    if settings is None or len(names) == len(facts.adapted):
        if settings is None or not settings.rank_pattern:
            return change("restore", r=rank)
        return change("restore", r=rank, rank_pattern={})
    keys = dict.fromkeys(settings.rank_key(name) or name.rpartition(".")[2] for name in names)
    return change("restore", rank_pattern={**dict(settings.rank_pattern), **dict.fromkeys(keys, rank)})


def _is_decomposed(module: AdaptedModule, facts: CheckpointFacts) -> bool:
    """Whether an initialisation that decomposes the weight found no more ranks in it than the file has."""
    init = str(facts.settings.init_lora_weights).lower() if facts.settings else ""
    if module.a is None or module.b is None or not init.startswith(("pissa", "olora")):
        return False
    return module.rank == min(module.a.shape[1], module.b.shape[0])
