"""What several rules advise, in the same words: the assignment or the call that a reader copies, and how adapters of
other tools become adapters of PEFT without loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from pytest_lora.changes import Advice, Change, advise, change
from pytest_lora.facts.base import is_tied_by_name
from pytest_lora.facts.saved_tensors import Key
from pytest_lora.facts.settings import alpha_divisor, is_named

if TYPE_CHECKING:
    from pytest_lora.expect import Expect
    from pytest_lora.facts.checkpoint import CheckpointFacts
    from pytest_lora.facts.config import ConfigFacts
    from pytest_lora.facts.saved_config import ResumptionFacts
    from pytest_lora.facts.settings import Settings


CAST_TRAINED = "for p in model.parameters(): p.data = p.data.float() if p.requires_grad else p.data"

START_ANEW = (
    "start the adapter anew: for layer in model.modules(): hasattr(layer, 'reset_lora_parameters') and "
    "layer.reset_lora_parameters({active!r}, True)"
)


def optimizer_anew(rate: float) -> str:
    """An optimizer that holds what trains, with a learning rate."""
    return f"optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr={rate:g})"


def ending(name: str) -> str:
    """The last two parts of a name, by which ``target_parameters`` means it: ``"experts.down_proj"``."""
    return ".".join(name.split(".")[-2:])


def on_parameters(settings: Settings, names: Iterable[str]) -> dict[str, object]:
    """The fields under which PEFT adapts these parameters: it refuses a dropout on them."""
    fields: dict[str, object] = {"target_parameters": tuple(names)}
    if settings.lora_dropout:
        fields["lora_dropout"] = 0.0
    return fields


def without(names: Iterable[str], *dropped: str) -> tuple[str, ...]:
    """A list of names less some of them, in order."""
    gone = frozenset(dropped)
    return tuple(name for name in names if name not in gone)


def tied_as_one(facts: ConfigFacts, field: str, touched: Iterable[str]) -> Change | None:
    """The fields under which PEFT trains modules of one weight as one, also after loading; None where it cannot.

    Args:
        facts: The configuration on its base.
        field: The list that names the modules, ``target_modules`` or ``modules_to_save``.
        touched: The modules of the weight that it names.
    """
    touched, names = tuple(touched), getattr(facts.settings, field)
    embedding = facts.base.input_embeddings
    if embedding is None or not is_tied_by_name(embedding):
        return None
    if any(is_tied_by_name(module) for module in touched):
        return None if facts.settings.ensure_weight_tying else change("set", ensure_weight_tying=True)
    if not isinstance(names, tuple):
        return None
    rest = without(names, *(name for name in names for module in touched if is_named(module, name)))
    leaf = embedding.rpartition(".")[2]
    return change("set", **{field: (*rest, leaf)}, ensure_weight_tying=True)


def scaled(settings: Settings, module: str, scaling: float, rank: int | None = None) -> dict[str, object]:
    """The field that gives a module this scaling: a key of ``alpha_pattern``, or ``lora_alpha``.

    The key is the one that decides for the alpha already, or for the rank. ``rank`` is the rank that it is to
    have, if that changes, too.
    """
    rank = settings.rank_of(module) if rank is None else rank
    alpha = scaling * alpha_divisor(rank, rslora=settings.use_rslora)
    key = settings.alpha_key(module) or settings.rank_key(module)
    if key is None:
        return {"lora_alpha": alpha}
    return {"alpha_pattern": {**dict(settings.alpha_pattern), key: alpha}}


def ranked(settings: Settings, module: str, rank: int) -> dict[str, object]:
    """The fields that give a module this rank and leave its scaling as it is."""
    key = settings.rank_key(module)
    fields: dict[str, object] = (
        {"r": rank} if key is None else {"rank_pattern": {**dict(settings.rank_pattern), key: rank}}
    )
    return {**fields, **scaled(settings, module, settings.scaling_of(module) or 2.0, rank)}


START_FRESH = "start fresh with this configuration, or go on with that of the checkpoint"


def as_in_checkpoint(facts: ResumptionFacts, *fields: str) -> Advice:
    """The fields as the checkpoint has them, or another start."""
    if facts.saved is None:
        return advise(START_FRESH)
    values = {field: getattr(facts.saved, field) for field in fields}
    written = {f: dict(value) if f.endswith("pattern") else value for f, value in values.items()}
    return advise(change(**written), f", as in the checkpoint; or {START_FRESH}")


def name_in_keys(facts: CheckpointFacts) -> str | None:
    """What to do where the adapter is called as a part of its modules is.

    Older PEFT takes ``.name`` out of every key while it saves, and so out of the names of the modules, too. It saves
    an adapter into a folder of its name.
    """
    part = f".{facts.name}"
    if facts.fit is None or not facts.adapted:
        return None
    wanted = {Key.of(name).module for name in facts.fit.wanted if ".lora_" in name}
    held = {module.name for module in facts.adapted}
    lost = held - wanted
    if not lost or not lost <= {module.replace(part, "") for module in wanted}:
        return None
    return (
        f"the adapter is called {facts.name!r}, as its modules are, and older PEFT takes that out of the keys: save it "
        "from the trained model under another name"
    )


def lower_rate(learning_rate: float | None, divisor: int) -> str:
    """Advice to divide the learning rate, which is named where it is known."""
    if not learning_rate:
        return f"divide the learning rate by {divisor}"
    return f"lower the learning rate from {learning_rate:g} to {learning_rate / divisor:.2g}"


def next_rank(expect: Expect, learning_rate: float | None) -> str:
    """Advice to double the rank at the same scaling and learning rate, all of it named where it is known.

    rsLoRA divides by the square root of the rank, so that alpha may stay (https://arxiv.org/abs/2312.03732).
    """
    config: Any = expect.config
    rate = f" of {learning_rate:g}" if learning_rate else ""
    same = f"the scaling is the same then, and the learning rate{rate} can stay"
    if config is None:
        return f"double the rank and lora_alpha with it ({same})"
    rank, alpha = config.r, config.lora_alpha
    if getattr(config, "use_rslora", False):
        as_they_are = f"the lora_alpha of {alpha:g} and the learning rate{rate} as they are"
        return f"double the rank from {rank} to {2 * rank} with {as_they_are}"
    return f"double the rank from {rank} to {2 * rank} and lora_alpha with it from {alpha:g} to {2 * alpha:g} ({same})"


def ways_to_train_rows(facts: ConfigFacts, side: str, first: int, count: int) -> Iterator[Change | Advice]:
    """What trains added rows: a copy in full, unless tied or by rows already; rows alone, which older PEFT has for
    embeddings only."""
    leaf = side.rpartition(".")[2]
    if not facts.base.tied_to(side) and side not in facts.token_modules:
        yield change("set", modules_to_save=(*facts.settings.modules_to_save, leaf))
    if side == facts.base.input_embeddings or side in facts.token_modules:
        rows = _rows(facts, leaf, first, count)
        yield advise("train the new rows alone: ", change(trainable_token_indices=rows))


def _rows(facts: ConfigFacts, leaf: str, first: int, count: int) -> dict[str, object]:
    """The rows that are trained already and the new ones, by the name of the embedding."""
    new = range(first, first + count)
    others = dict(facts.settings.trainable_token_indices)
    known = [row for row in (*others.pop("", ()), *others.pop(leaf, ())) if row not in new]
    return {leaf: (*known, new) if known else new, **others}


TO_PEFT = {
    "mlx-lm": "convert it: transpose lora_a and lora_b into lora_A.weight and lora_B.weight under base_model.model., "
    "and write a LoraConfig with r=rank and lora_alpha=scale * rank (its scale is the whole scaling, not alpha)",
    "AdapterHub": "convert it: lora_A and lora_B of ...loras.NAME become lora_A.weight and lora_B.weight of the same "
    "layers under base_model.model., its r and alpha become r and lora_alpha; with use_gating or another "
    "composition_mode than 'add' merge it there instead (model.merge_adapter) and save the model",
    "diffusers": "nothing, if a pipeline of diffusers is to load it; for PEFT load it there (load_lora_weights) and "
    "save the LoraConfig in peft_config of the unet or transformer with get_peft_model_state_dict beside it",
    "kohya-ss": "nothing, if a pipeline of diffusers is to load it; for PEFT lora_down becomes lora_A and lora_up "
    "lora_B, the rows of lora_down are the rank, and each .alpha goes into alpha_pattern (where it is missing, "
    "alpha is the rank)",
    "torchtune": "convert it with tune_to_peft_adapter_weights and tune_to_peft_adapter_config of "
    "torchtune.models.convert_weights, which also reorder the rows of lora_B of q_proj and k_proj",
}
"""From mlx-lm 0.32 (``tuner/lora.py``: ``scale * x @ lora_a @ lora_b``), adapters 1.3 (``methods/lora.py``), diffusers'
``load_lora_weights``, and torchtune 0.6 (``models/convert_weights.py``)."""

TO_MLX = (
    "convert it: transpose lora_A.weight and lora_B.weight into lora_a and lora_b without base_model.model., save them "
    "as adapters.safetensors, and write adapter_config.json with fine_tune_type, num_layers, and lora_parameters of "
    "rank, scale={scale}, dropout and keys; or merge the adapter and convert the model with mlx_lm.convert"
)
"""To mlx-lm, from ``load_adapters`` of ``mlx_lm/tuner/utils.py``."""


def positive_ranks(settings: Settings) -> Change:
    """Ranks below 1 replaced by PEFT's default, or left out of the pattern."""
    fields: dict[str, object] = {} if settings.r > 0 else {"r": 8}  # PEFT's default
    if settings.rank_pattern:
        fields["rank_pattern"] = {key: rank for key, rank in settings.rank_pattern if rank > 0}
    return change(**fields)


def in_numbers(settings: Settings) -> Change:
    """Ranks and alphas as the numbers that their text says."""
    patterns = {"rank_pattern": dict(settings.rank_pattern), "alpha_pattern": dict(settings.alpha_pattern)}
    written = {field: pattern for field, pattern in patterns.items() if pattern}
    return change(r=settings.r, lora_alpha=settings.lora_alpha, **written)
