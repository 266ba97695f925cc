"""Configurations with one fault each, and the rule that must name it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from pytest_lora.expect import Expect
from pytest_lora.rules import code_of
from pytest_lora.strategies.configs import Draw, made, several
from pytest_lora.strategies.search_space import SearchSpace, space_of

if TYPE_CHECKING:
    import os

    from peft import LoraConfig
    from torch import nn
    from transformers import PretrainedConfig

Fields = dict[str, Any]

_LIMITS = Expect()
_ABSENT = "no_such_module"
_OTHER_TASK = {"CAUSAL_LM": "SEQ_CLS"}
"""A task type that contradicts a model and that PEFT accepts on it, so that nothing else is wrong."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One way to be wrong.

    Attributes:
        rule: Name of the rule that must fire.
        possible: Whether a base allows this fault.
        plant: Draws the fault into the fields of a sound configuration.
    """

    rule: str
    possible: Callable[[SearchSpace], bool]
    plant: Callable[[Draw, SearchSpace, Fields], Fields]


def misconfigured_lora_configs(
    base: nn.Module | PretrainedConfig | str | os.PathLike[str] | None = None,
) -> st.SearchStrategy[tuple[LoraConfig, str]]:
    """Draw a ``LoraConfig`` with one fault, and the code of the rule that ``check_config`` must report.

    The fault may bring others with it: a matrix that is targeted and saved in full may also be quantized. Drawn
    are the faults that the base allows and that are faults without knowing what was meant: those of rules that
    need ``Expect`` are not among them.

    Args:
        base: As for ``lora_configs``. Without one, the faults are those that any base of Llama's names shows.

    Raises:
        TypeError: ``base`` is nothing that a base can be made of.
        ValueError: It cannot be built, carries an adapter, or has nothing that could be adapted.
    """
    space = space_of(base)
    return _misconfigured(space, [fault for fault in FAULTS if fault.possible(space)])


@st.composite
def _misconfigured(draw: Draw, space: SearchSpace, faults: list[Fault]) -> tuple[LoraConfig, str]:
    fault = draw(st.sampled_from(faults))
    return made(draw, fault.plant(draw, space, _sound(draw, space))), code_of(fault.rule)


def _sound(draw: Draw, space: SearchSpace) -> Fields:
    """Rank, alpha and targets without fault; the rest at its defaults, so that there is one fault."""
    targets = draw(several(space.targets))
    ranks = space.ranks_for(min(target.size for target in targets))
    rank = draw(st.sampled_from(ranks))
    fields = {"r": rank, "lora_alpha": rank, "target_modules": [target.name for target in targets]}
    if any("Conv1D" in target.kinds for target in targets):
        fields["fan_in_fan_out"] = True
    return fields | dict(space.base_targets.needs)


def _always(space: SearchSpace) -> bool:
    return True


def _field(name: str, *values: Any) -> Callable[[Draw, SearchSpace, Fields], Fields]:
    """Plants one of some values of a field."""

    def plant(draw: Draw, space: SearchSpace, fields: Fields) -> Fields:
        return fields | {name: draw(st.sampled_from(values))}

    return plant


def _small_alpha(draw: Draw, space: SearchSpace, fields: Fields) -> Fields:
    share = draw(st.sampled_from((2, 4, 16)))
    return fields | {"lora_alpha": fields["r"] * _LIMITS.min_scaling / share}


def _large_alpha(draw: Draw, space: SearchSpace, fields: Fields) -> Fields:
    times = draw(st.sampled_from((2, 4, 16)))
    return fields | {"lora_alpha": int(fields["r"] * _LIMITS.max_scaling * times)}


def _misspelled(draw: Draw, space: SearchSpace, fields: Fields) -> Fields:
    return fields | {"target_modules": [*fields["target_modules"], _ABSENT]}


def _has_blocks(space: SearchSpace) -> bool:
    return space.base_targets.facts is not None and bool(space.base_targets.facts.layer_indices)


def _layer_too_high(draw: Draw, space: SearchSpace, fields: Fields) -> Fields:
    assert space.base_targets.facts is not None
    last = max(space.base_targets.facts.layer_indices)
    return fields | {"layers_to_transform": [last + draw(st.integers(1, 64))]}


def _idle_exclusion(draw: Draw, space: SearchSpace, fields: Fields) -> Fields:
    return fields | {"exclude_modules": [_ABSENT]}


def _idle_pattern(draw: Draw, space: SearchSpace, fields: Fields) -> Fields:
    """A key that is anchored at the top of the base, where the module is not, or that has a part too much."""
    field = draw(st.sampled_from(("rank_pattern", "alpha_pattern")))
    name = draw(st.sampled_from(fields["target_modules"]))
    facts = space.base_targets.facts
    keys = [f"^{name}"] if facts is None or name not in facts.module_names else []
    return fields | {field: {draw(st.sampled_from([*keys, f"{_ABSENT}.{name}"])): fields["r"]}}


def _several_targets(space: SearchSpace) -> bool:
    return len(space.targets) > 1


def _uneven(draw: Draw, space: SearchSpace, fields: Fields) -> Fields:
    names = [target.name for target in space.targets]
    some = list(dict.fromkeys([*fields["target_modules"], *names]))[: max(2, len(fields["target_modules"]))]
    patterns = {some[0]: fields["lora_alpha"] * 2 * _LIMITS.max_scaling_spread}
    conv = any("Conv1D" in t.kinds for t in space.targets if t.name in some)
    return (
        fields
        | {"target_modules": some, "alpha_pattern": patterns}
        | ({"fan_in_fan_out": True} if conv else {})
    )


def _too_large_rank(draw: Draw, space: SearchSpace, fields: Fields) -> Fields:
    target = draw(st.sampled_from([t for t in space.targets if t.linear]))
    rank = (target.smallest + 1) * draw(st.sampled_from((1, 2)))
    fields = fields | {"r": rank, "lora_alpha": rank, "target_modules": [target.name]}
    return fields | ({"fan_in_fan_out": True} if "Conv1D" in target.kinds else {})


def _knows_sizes(space: SearchSpace) -> bool:
    return space.base_targets.facts is not None and any(target.linear for target in space.targets)


def _lost_module(draw: Draw, space: SearchSpace, fields: Fields) -> Fields:
    return fields | {"modules_to_save": [*fields.get("modules_to_save", ()), _ABSENT]}


def _also_saved(draw: Draw, space: SearchSpace, fields: Fields) -> Fields:
    twice = draw(st.sampled_from(fields["target_modules"]))
    return fields | {"modules_to_save": [*fields.get("modules_to_save", ()), twice]}


def _has_new_head(space: SearchSpace) -> bool:
    facts = space.base_targets.facts
    return facts is not None and any(head.fresh for head in facts.heads)


def _frozen_head(draw: Draw, space: SearchSpace, fields: Fields) -> Fields:
    return {k: v for k, v in fields.items() if k not in ("task_type", "modules_to_save")}


def _tied(space: SearchSpace) -> tuple[str, ...]:
    facts = space.base_targets.facts
    groups = () if facts is None else facts.tied
    modules = {m.name for m in facts.modules} if facts else set()
    return tuple(n.rpartition(".")[2] for group in groups for n in group if n in modules)


def _one_side_of_a_tie(draw: Draw, space: SearchSpace, fields: Fields) -> Fields:
    side = draw(st.sampled_from(_tied(space)))
    return fields | {"target_modules": [*fields["target_modules"], side]}


def _init_on_quantized(draw: Draw, space: SearchSpace, fields: Fields) -> Fields:
    target = draw(st.sampled_from([t for t in space.targets if t.quantized]))
    rank = min(fields["r"], max(space.ranks_for(target.size)))
    changed = {"r": rank, "lora_alpha": rank, "target_modules": [target.name]}
    return fields | changed | {"init_lora_weights": draw(st.sampled_from(("pissa", "pissa_niter_4")))}


def _has_quantized(space: SearchSpace) -> bool:
    return space.base_targets.facts is not None and any(t.quantized for t in space.targets)


def _saves_quantized(draw: Draw, space: SearchSpace, fields: Fields) -> Fields:
    target = draw(st.sampled_from([t for t in space.targets if t.quantized]))
    others = [name for name in fields["target_modules"] if name != target.name]
    others = others or [next(t.name for t in space.targets if t.name != target.name)]
    return fields | {"target_modules": others, "modules_to_save": [target.name]}


def _has_vocabulary(space: SearchSpace) -> bool:
    facts = space.base_targets.facts
    return facts is not None and facts.vocab_size is not None and not facts.tied


def _row_too_high(draw: Draw, space: SearchSpace, fields: Fields) -> Fields:
    assert space.base_targets.facts is not None
    size = space.base_targets.facts.vocab_size or 0
    embedding = (space.base_targets.facts.input_embeddings or "").rpartition(".")[2]
    row = size + draw(st.integers(0, 100))
    others = [name for name in fields["target_modules"] if name != embedding] or [space.targets[0].name]
    return fields | {"target_modules": others, "trainable_token_indices": [row]}


def _other_task_known(space: SearchSpace) -> bool:
    facts = space.base_targets.facts
    return facts is not None and facts.task_type in _OTHER_TASK


def _wrong_task(draw: Draw, space: SearchSpace, fields: Fields) -> Fields:
    assert space.base_targets.facts is not None
    return fields | {"task_type": _OTHER_TASK[space.base_targets.facts.task_type or ""]}


def _norms(space: SearchSpace) -> list[str]:
    facts = space.base_targets.facts
    names = () if facts is None else facts.module_names
    return sorted({leaf for leaf in (n.rpartition(".")[2] for n in names) if "norm" in leaf.lower()})


def _unsupported(draw: Draw, space: SearchSpace, fields: Fields) -> Fields:
    return fields | {"target_modules": [*fields["target_modules"], draw(st.sampled_from(_norms(space)))]}


def _has_plain_linear(space: SearchSpace) -> bool:
    return any(t.linear and not t.quantized for t in space.targets)


def _odd_rank(draw: Draw, space: SearchSpace, fields: Fields) -> Fields:
    targets = [t for t in space.targets if t.linear and not t.quantized]
    target = draw(st.sampled_from(targets))
    rank = draw(st.sampled_from([r for r in space.ranks_for(target.size) if r % 2]))
    changed = {"r": rank, "lora_alpha": rank, "target_modules": [target.name]}
    return fields | changed | {"init_lora_weights": "orthogonal"}


FAULTS = (
    Fault("alpha_is_not_positive", _always, _field("lora_alpha", 0, -8)),
    Fault("alpha_damps_the_adapter", _always, _small_alpha),
    Fault("alpha_blows_up_the_adapter", _always, _large_alpha),
    Fault("target_matches_nothing", _always, _misspelled),
    Fault("layer_does_not_exist", _has_blocks, _layer_too_high),
    Fault("exclusion_excludes_nothing", _always, _idle_exclusion),
    Fault("pattern_key_has_no_effect", _always, _idle_pattern),
    Fault("scaling_differs_between_modules", _several_targets, _uneven),
    Fault("rank_exceeds_the_matrix", _knows_sizes, _too_large_rank),
    Fault("saved_module_matches_nothing", _always, _lost_module),
    Fault("target_is_also_saved", _always, _also_saved),
    Fault("new_head_is_not_trained", _has_new_head, _frozen_head),
    Fault("tied_weight_is_adapted_on_one_side", lambda space: bool(_tied(space)), _one_side_of_a_tie),
    Fault("init_does_not_fit_the_weights", _has_quantized, _init_on_quantized),
    Fault("init_is_random", _always, _field("init_lora_weights", False)),
    Fault("biases_of_the_base_are_trained", lambda space: space.base_targets.biases, _field("bias", "all")),
    Fault("frozen_by_inference_mode", _always, _field("inference_mode", True)),
    Fault("token_index_does_not_exist", _has_vocabulary, _row_too_high),
    Fault("dropout_starves_the_adapter", _always, _field("lora_dropout", 0.9, 0.95, 1.0)),
    Fault("task_type_contradicts_the_model", _other_task_known, _wrong_task),
    Fault("saved_module_is_quantized", _has_quantized, _saves_quantized),
    Fault("peft_refuses_the_config", lambda space: bool(_norms(space)), _unsupported),
    Fault("rank_is_odd_for_orthogonal_init", _has_plain_linear, _odd_rank),
)
"""Every fault that is one whatever was meant, by the name of its rule."""
