"""Round trips of an adapter: saved and loaded again, merged and taken out again. Done on copies of the model."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pytest_lora.copies import (
    TOLERANCES,
    adapted_copy,
    as_module,
    base_without_adapter,
    copy_of,
    distance,
    identical,
    largest,
    no_trace,
    output_of,
    quiet_eval,
    require_batch,
    watched_output,
    without_adapter,
)
from pytest_lora.facts.config import rewrites_base
from pytest_lora.findings import Finding, Report, Severity, grouped
from pytest_lora.inspection.model import adapted_survey
from pytest_lora.inspection.peft_internals import (
    WRAPPERS,
    BaseTunerLayer,
    LoraLayer,
    active_adapters,
    adapter_names,
    lora_configs,
)

Base = nn.Module | Callable[[], nn.Module]

_ADAPTER_PARTS = ("lora_", "modules_to_save", "trainable_tokens_")
_NAMES = {
    "LORA910": "reloaded_output_differs",
    "LORA911": "trained_weights_are_not_saved",
    "LORA912": "reloaded_weights_differ",
    "LORA913": "reloaded_in_another_precision",
    "LORA914": "base_is_not_the_same",
    "LORA915": "merged_output_differs",
    "LORA916": "merging_requantizes_the_base",
    "LORA917": "unmerge_does_not_restore_the_base",
    "LORA918": "unload_does_not_give_the_base_back",
    "LORA919": "adapter_cannot_be_merged",
}
_UNMERGE_STEPS = 4
_LOST_TO_QUANTIZATION = 0.5


def check_reload(model: nn.Module, batch: Any, *, base: Base | None = None) -> Report:
    """Save the adapters, load them on a fresh base, and compare; see ``assert_reload_exact``."""
    require_batch(batch)
    _require_base(model, base)
    with no_trace():
        adapted = adapted_copy(model)
        trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
        expected, moving = watched_output(adapted, batch)
        fresh = _given_base(base) if base is not None else base_without_adapter(adapted, forget_trained=True)
        try:
            reloaded = _reloaded(adapted, fresh)
        except _LoadingError as error:
            findings = [_unloadable(error)]
        else:
            findings = list(_tensor_findings(adapted, reloaded, trained, moving, base is not None))
            findings += _output_findings(expected, output_of(reloaded, batch), findings)
    return Report(f"reload of {type(model).__name__}", tuple(findings))


def check_merge(
    model: nn.Module, batch: Any, *, rtol: float | None = None, atol: float | None = None
) -> Report:
    """Merge, unmerge and unload the adapters, and compare; see ``assert_merge_exact``."""
    require_batch(batch)
    _require_tolerance("rtol", rtol)
    _require_tolerance("atol", atol)
    with no_trace():
        adapted = adapted_copy(model)
        layers = {n: m for n, m in adapted.named_modules() if isinstance(m, LoraLayer)}
        expected, moving = watched_output(adapted, batch)
        before = {name: tensor.clone() for name, tensor in adapted.state_dict().items() if name not in moving}
        findings = list(_unload_findings(adapted))
        findings += _merge_findings(adapted, layers, batch, expected, (rtol, atol), before)
    return Report(f"merge of {type(model).__name__}", tuple(findings))


def _finding(code: str, severity: Severity, where: str, observed: str, expected: str, fix: str) -> Finding:
    return Finding(code, _NAMES[code], severity, where, observed, expected, fix)


# ---------------------------------------------------------------------------------------- reload


def _require_base(model: nn.Module, base: Base | None) -> None:
    """Raise where what is given as ``base`` does not suit the model."""
    found = adapted_survey(model)
    if base is None:
        for config in lora_configs(found.root).values():
            if rewrites_base(config.init_lora_weights):
                raise ValueError(
                    f"base must be given: init_lora_weights={config.init_lora_weights!r} rewrote the weights under "
                    "the adapter, and loading it starts from the original ones"
                )
        return
    if not callable(base):
        raise TypeError(f"base must be a model or a function that makes one, not {type(base).__name__}")
    merged = [name for name, layer in found.lora.items() if layer.merged]
    if merged:
        raise ValueError(
            f"model is merged on {grouped(merged)}, which rounds the weights that base is compared with; "
            "load it anew, or leave base out"
        )


def _given_base(base: Base) -> nn.Module:
    if isinstance(base, nn.Module):
        made: Any = base
    else:
        try:
            made = base()
        except Exception as error:  # whatever the user's function raises
            raise ValueError(f"base: the function raises {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise TypeError(f"base must be a model or a function that makes one, not {type(made).__name__}")
    if any(isinstance(m, BaseTunerLayer) for m in made.modules()):
        raise ValueError("base must be a model without adapters")
    return copy_of("base", made) if made is base else quiet_eval("base", made)


class _LoadingError(Exception):
    """What was saved cannot be loaded."""


def _unloadable(error: _LoadingError) -> Finding:
    return _finding(
        "LORA912",
        "error",
        "the saved adapter",
        f"it cannot be loaded on the base: {error}",
        "a checkpoint that loads",
        "see that save_pretrained writes every tensor of the adapter, and that the base has the modules it names",
    )


@contextmanager
def _saving() -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"the adapter cannot be saved into a temporary folder in {tempfile.gettempdir()}: {error}; "
            "let TMPDIR be a folder that can be written and has room for it"
        ) from error


@contextmanager
def _loading() -> Iterator[None]:
    try:
        yield
    except (KeyError, RuntimeError, ValueError, OSError) as error:
        raise _LoadingError(f"{type(error).__name__}: {error}") from error


def _reloaded(adapted: nn.Module, fresh: nn.Module) -> nn.Module:
    layer = next(m for m in adapted.modules() if isinstance(m, LoraLayer))
    active = list(active_adapters(layer))
    reload = _reloaded_peft if isinstance(adapted, WRAPPERS) else _reloaded_transformers
    with ExitStack() as stack:
        with _saving():
            folder = stack.enter_context(tempfile.TemporaryDirectory())
        return quiet_eval("model", reload(adapted, fresh, active, Path(folder)))


def _reloaded_peft(adapted: Any, fresh: nn.Module, active: list[str], folder: Path) -> nn.Module:
    from peft import PeftModel

    if not isinstance(adapted, PeftModel):
        raise ValueError(f"model cannot be saved: PEFT has no save_pretrained for {type(adapted).__name__}")
    with _saving():
        save_adapters(adapted, str(folder))
    homes = {name: folder if name == "default" else folder / name for name in adapted.peft_config}
    (first, home), *others = homes.items()
    with _loading():
        reloaded: Any = type(adapted).from_pretrained(fresh, str(home), adapter_name=first)
        for name, home in others:
            reloaded.load_adapter(str(home), adapter_name=name)
        reloaded.base_model.set_adapter(active)
    return as_module(reloaded)


def save_adapters(model: Any, folder: str, **how: Any) -> None:
    """PEFT's ``save_pretrained`` without the model card, whose template takes longer than all the rest."""
    vars(model)["create_or_update_model_card"] = lambda output_dir: None
    try:
        model.save_pretrained(folder, **how)
    finally:
        del vars(model)["create_or_update_model_card"]


def _reloaded_transformers(adapted: Any, fresh: Any, active: list[str], folder: Path) -> nn.Module:
    if len(active) != 1 or not hasattr(adapted, "save_pretrained") or not hasattr(fresh, "load_adapter"):
        raise ValueError(
            f"model cannot be saved: {type(adapted).__name__} with active adapters {active} has no save_pretrained "
            "that writes one adapter; wrap it with peft.get_peft_model"
        )
    with _saving():
        adapted.save_pretrained(str(folder))
    with _loading():
        fresh.load_adapter(str(folder), adapter_name=active[0])
    return as_module(fresh)


def _tensor_findings(
    adapted: nn.Module, reloaded: nn.Module, trained: set[str], moving: frozenset[str], base_given: bool
) -> Iterator[Finding]:
    left_out = _unsaved_adapters(adapted)
    before = {
        name: tensor
        for name, tensor in adapted.state_dict().items()
        if name not in moving and not left_out.intersection(name.split("."))
    }
    after = reloaded.state_dict()
    lost: list[str] = []
    changed: list[str] = []
    recast: list[str] = []
    foreign: list[str] = []
    for name, tensor in before.items():
        other = after.get(name)
        same = other is not None and other.shape == tensor.shape and identical(other.to(tensor), tensor)
        is_adapter = any(part in name for part in _ADAPTER_PARTS)
        if not same:
            (changed if is_adapter else lost if name in trained else foreign).append(name)
        elif is_adapter and other is not None and other.dtype != tensor.dtype:
            recast.append(name)
    if lost:
        yield _finding(
            "LORA911",
            "error",
            grouped(lost),
            f"{len(lost)} trained tensors are not in the saved adapter",
            "every tensor that was trained comes back",
            _fix_for_lost(lost),
        )
    if changed:
        yield _finding(
            "LORA912",
            "error",
            grouped(changed),
            f"{len(changed)} tensors of the adapter have other values or shapes after loading",
            "the values that were saved",
            "see that no step or hook changes the model while it is saved, and that adapter names hold no dots",
        )
    if foreign and base_given:
        yield _finding(
            "LORA914",
            "error",
            grouped(foreign),
            f"{len(foreign)} tensors of the base differ from the base under the trained adapter",
            "the base on which the adapter was trained, weights and buffers alike",
            "load the adapter on the very base and quantization that it was trained on; modules that changed in "
            "training (BatchNorm statistics, a new head) go into modules_to_save",
        )
    if recast:
        pair = before[recast[0]].dtype, after[recast[0]].dtype
        yield _finding(
            "LORA913",
            "warning",
            grouped(recast),
            f"saved as {pair[0]}, loaded as {pair[1]}: the values are the same, the arithmetic is not",
            "one precision in training and in use",
            "cast the loaded adapter back, or train it in float32 (autocast_adapter_dtype=True)",
        )


def _unsaved_adapters(adapted: nn.Module) -> set[str]:
    """Names of adapters that the model's ``save_pretrained`` does not write: with transformers' own, the inactive."""
    if isinstance(adapted, WRAPPERS):
        return set()
    layers = [m for m in adapted.modules() if isinstance(m, LoraLayer)]
    return {name for layer in layers for name in adapter_names(layer) if name not in active_adapters(layer)}


def _fix_for_lost(lost: list[str]) -> str:
    modules = sorted({name.rpartition(".")[0].rpartition(".")[2] for name in lost})
    if all(name.endswith(".bias") for name in lost):
        return 'set bias="all" in the LoraConfig (PEFT 0.17 loses the biases of "lora_only"), or freeze the biases'
    if any("embed" in module or module == "wte" for module in modules):
        return (
            "train new tokens with trainable_token_indices, or put the embedding into modules_to_save; or save "
            "with save_embedding_layers=True"
        )
    return f"put them into modules_to_save={modules}, or freeze them"


def _output_findings(expected: Tensor, got: Tensor, explained: list[Finding]) -> list[Finding]:
    apart = distance(expected, got)
    if explained or identical(expected, got):
        return []
    return [
        _finding(
            "LORA910",
            "error",
            "the output of the reloaded model",
            f"it differs by up to {apart:.3g}, though every saved tensor came back as it was",
            "the same output, bit for bit",
            "look for what is neither weight nor configuration: attributes set by hand, hooks, another active "
            "adapter, scaling changed with set_scale",
        )
    ]


# ---------------------------------------------------------------------------------------- merge


def _merge_findings(
    adapted: nn.Module,
    layers: dict[str, Any],
    batch: Any,
    expected: Tensor,
    tolerance: tuple[float | None, float | None],
    before: dict[str, Tensor],
) -> Iterator[Finding]:
    without = without_adapter(layers, lambda: output_of(adapted, batch))
    try:
        for layer in layers.values():
            layer.merge()
    except (ValueError, NotImplementedError, RuntimeError) as error:
        yield _finding(
            "LORA919",
            "error",
            grouped(n for n, layer in layers.items() if not layer.merged_adapters),
            f"PEFT refuses to merge: {error}",
            "an adapter that can be merged",
            "keep the adapter apart, or train one without the variant that the message names",
        )
        return
    merged = output_of(adapted, batch)
    sizes = {n: largest(t) for n, t in adapted.state_dict().items() if n in before and t.is_floating_point()}
    quantized = [n for n, layer in layers.items() if _is_quantized(layer)]
    if quantized:
        yield from _requantized(quantized, expected, merged, without)
    else:
        yield from _merged_differs(layers, expected, merged, tolerance)
    for layer in layers.values():
        layer.unmerge()
    if not quantized:
        yield from _unmerge_findings(adapted, before, sizes)


def _is_quantized(layer: Any) -> bool:
    weight = getattr(layer.get_base_layer(), "weight", None)
    return weight is not None and not weight.is_floating_point()


def _requantized(
    quantized: list[str], expected: Tensor, merged: Tensor, without: Tensor
) -> Iterator[Finding]:
    loss, effect = distance(expected, merged), distance(expected, without)
    # A fresh adapter has no effect yet that could be lost.
    share = loss / effect if effect else 0.0
    own = f"moves it by {effect:.3g} ({share:.0%})" if effect else "does not move it yet"
    yield _finding(
        "LORA916",
        "warning" if share > _LOST_TO_QUANTIZATION else "info",
        grouped(quantized),
        f"merging rounds the weights to the quantized grid again: the output moves by up to {loss:.3g}, where the "
        f"adapter itself {own}",
        "a merge that loses little of what the adapter does",
        "dequantize the base or load it in bfloat16, merge there, and quantize the result if need be",
    )


def _merged_differs(
    layers: dict[str, Any], expected: Tensor, merged: Tensor, tolerance: tuple[float | None, float | None]
) -> Iterator[Finding]:
    dtypes = {p.dtype for layer in layers.values() for p in layer.get_base_layer().parameters()}
    rtol, atol = tolerance
    if rtol is None:
        rtol = max(TOLERANCES.get(dtype, 0.0) for dtype in (*dtypes, expected.dtype))
    allowed = (atol or 0.0) + rtol * largest(expected)
    apart = distance(expected, merged)
    if not apart <= allowed:
        yield _finding(
            "LORA915",
            "error",
            "the output of the merged model",
            f"it differs by up to {apart:.3g} from that of the model with its adapter",
            f"at most {allowed:.3g}, {rtol:g} of the largest output",
            "look at targets that share a weight (tied embeddings), at weights too coarse for the update, and at "
            "adapters that are active on some modules only",
        )


def _unmerge_findings(
    adapted: nn.Module, before: dict[str, Tensor], merged_sizes: dict[str, float]
) -> Iterator[Finding]:
    after = adapted.state_dict()
    damaged = [n for n, size in merged_sizes.items() if not _restored(before[n], after[n], size)]
    if damaged:
        yield _finding(
            "LORA917",
            "error",
            grouped(damaged),
            f"{len(damaged)} tensors are not what they were after merge and unmerge",
            f"the same weights, to {_UNMERGE_STEPS} steps of rounding",
            "keep a copy of the base for training on, or merge into a copy",
        )


def _restored(before: Tensor, after: Tensor, merged_size: float) -> bool:
    """Whether adding and taking away again changed no more than rounding at the largest merged value does."""
    if identical(before, after):
        return True
    step = torch.finfo(before.dtype).eps * max(merged_size, largest(before))
    return distance(before, after) <= _UNMERGE_STEPS * step


def _unload_findings(adapted: nn.Module) -> Iterator[Finding]:
    """PEFT's ``unload`` against the base as it lies under the adapter; transformers has no ``unload``."""
    if not isinstance(adapted, WRAPPERS):
        return
    given: Any = copy.deepcopy(adapted)
    kept = _kept_modules(given)
    unloaded = given.unload().state_dict()
    base = base_without_adapter(adapted).state_dict()
    wrong = [
        name
        for name, tensor in base.items()
        if not name.startswith(kept)
        and not (
            name in unloaded and unloaded[name].shape == tensor.shape and torch.equal(unloaded[name], tensor)
        )
    ]
    if wrong:
        yield _finding(
            "LORA918",
            "error",
            grouped(wrong),
            f"{len(wrong)} tensors differ from those of the base after unload()",
            "the base as it was before the adapter",
            "load the base anew instead of unloading the adapter",
        )


def _kept_modules(adapted: nn.Module) -> tuple[str, ...]:
    """Modules whose trained copy PEFT leaves in place when it unloads, by design."""
    return tuple(f"{name}." for name in adapted_survey(adapted).saved) + tuple(
        f"{name}." for name in adapted_survey(adapted).tokens
    )


def _require_tolerance(name: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, not {value!r}")
