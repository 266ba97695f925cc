"""Every public check that takes a model leaves it, and all that trains it, as it was, bit for bit, also on errors."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import TrainingArguments

import pytest_lora
from pytest_lora import (
    LoraHealthError,
    assert_adapter_shapes,
    assert_adapters_in_sync,
    assert_alpha_ratio,
    assert_checkpoint_healthy,
    assert_config_healthy,
    assert_fits_memory,
    assert_lora_healthy,
    assert_lora_laws,
    assert_loss_decreases,
    assert_merge_exact,
    assert_param_ratio,
    assert_recipe_healthy,
    assert_reload_exact,
    assert_resumable,
    assert_run_healthy,
    assert_training_healthy,
    card_table,
    check_adapter_shapes,
    check_adapters_in_sync,
    check_alpha_ratio,
    check_checkpoint,
    check_config,
    check_lora_laws,
    check_loss_decreases,
    check_memory,
    check_merge,
    check_model,
    check_param_ratio,
    check_recipe,
    check_reload,
    check_resume,
    check_run,
    check_training,
    count_parameters,
    estimate_memory,
    largest_that_fits,
    oom_frontier,
    rank_prices,
    rank_table,
    step_memory,
    suggest_learning_rate,
    suggest_rank,
    watch_training,
)
from pytest_lora.bases.examples.models import BASES, language_batch
from pytest_lora.bases.tiny import load_tiny, text_batch
from pytest_lora.inspection.peft_state import saved_state

pytestmark = pytest.mark.filterwarnings("ignore")


class BoomError(Exception):
    pass


class Setup(NamedTuple):
    """A model amid its training, with all that has a state, and its base without adapters."""

    model: Any
    base: Any
    batch: dict[str, torch.Tensor]
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    config: LoraConfig

    @property
    def trained(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}


def _watched(setup: Setup) -> None:
    with watch_training(setup.model, setup.optimizer) as watch:
        watch.log(2.0)


def _in_sync(setup: Setup, check: Callable[[Any], object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=0, world_size=1)
        try:
            check(setup.model)
        finally:
            torch.distributed.destroy_process_group()


TARGETS = ("q_proj", "v_proj")


def _on_saved(setup: Setup, check: Callable[[str], object]) -> None:
    """Run a check on a folder that holds what the model's adapter is now."""
    with tempfile.TemporaryDirectory() as folder:
        tensors = {name: tensor.clone() for name, tensor in saved_state(setup.model, "default").items()}
        save_file(tensors, f"{folder}/adapter_model.safetensors")
        named = getattr(setup.base, "name_or_path", "") or "org/base"
        config = {
            **setup.config.to_dict(),
            "target_modules": sorted(setup.config.target_modules),
            "base_model_name_or_path": named,
        }
        Path(folder, "adapter_config.json").write_text(json.dumps(config))
        check(folder)


RECIPE = (
    "r: 8\nlora_alpha: 16\ntarget_modules: [q_proj, v_proj]\nlearning_rate: 0.0002\nnum_train_epochs: 1\n"
)


def _on_recipe(setup: Setup, check: Callable[..., object]) -> None:
    """Run a check on a recipe of one's own for the base."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_text(RECIPE)
        check(path, base=setup.base, select=["LORA1"])


def _on_arguments(setup: Setup, check: Callable[..., object]) -> None:
    """Run a check on the arguments of a script for the base."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(output_dir=folder, learning_rate=2e-4, use_cpu=True, report_to=[])
        check(args, setup.config, setup.base, select=["LORA1"])


RUNNING: dict[str, Callable[[Setup], object]] = {
    "check_training": lambda s: check_training(s.model, s.batch, max_grad_norm=1.0, **s.trained),
    "check_training, own optimizer": lambda s: check_training(s.model, s.batch),
    "assert_training_healthy": lambda s: assert_training_healthy(s.model, s.batch, **s.trained),
    "assert_lora_healthy, batch": lambda s: assert_lora_healthy(
        s.model, batches=s.batch, optimizer=s.optimizer
    ),
    "assert_loss_decreases": lambda s: assert_loss_decreases(
        s.model, s.batch, steps=2, optimizer=s.optimizer, device="cpu"
    ),
    "check_loss_decreases": lambda s: check_loss_decreases(s.model, s.batch, steps=2, device="cpu"),
    "check_adapter_shapes, batch": lambda s: check_adapter_shapes(s.model, batches=s.batch),
    "assert_adapter_shapes, batch": lambda s: assert_adapter_shapes(s.model, batches=s.batch),
    "check_reload": lambda s: check_reload(s.model, s.batch),
    "check_merge": lambda s: check_merge(s.model, s.batch),
    "check_lora_laws": lambda s: check_lora_laws(s.model, s.batch),
    "assert_reload_exact": lambda s: assert_reload_exact(s.model, s.batch),
    "assert_merge_exact": lambda s: assert_merge_exact(s.model, s.batch),
    "assert_lora_laws": lambda s: assert_lora_laws(s.model, s.batch),
}
"""Those that run a forward pass."""

LOOKING: dict[str, Callable[[Setup], object]] = {
    "check_config": lambda s: check_config(s.config, s.base),
    "assert_config_healthy": lambda s: assert_config_healthy(s.config, s.base),
    "check_checkpoint": lambda s: _on_saved(s, lambda path: check_checkpoint(path, s.base)),
    "assert_checkpoint_healthy": lambda s: _on_saved(
        s, lambda path: assert_checkpoint_healthy(path, s.base, select=["LORA43"])
    ),
    "assert_resumable": lambda s: _on_saved(s, lambda path: assert_resumable(path, s.config, s.base)),
    "check_model": lambda s: check_model(s.model, optimizer=s.optimizer),
    "assert_lora_healthy": lambda s: assert_lora_healthy(s.model, optimizer=s.optimizer),
    "assert_adapter_shapes": lambda s: assert_adapter_shapes(s.model),
    "check_adapter_shapes": lambda s: check_adapter_shapes(s.model),
    "check_param_ratio": lambda s: check_param_ratio(s.model, 0.0, 1.0),
    "check_alpha_ratio": lambda s: check_alpha_ratio(s.model, 2.0),
    "check_resume": lambda s: _on_saved(s, lambda path: check_resume(path, s.config, s.base)),
    "assert_param_ratio": lambda s: assert_param_ratio(s.model, 0.0, 1.0),
    "assert_alpha_ratio": lambda s: assert_alpha_ratio(s.model, 2.0),
    "count_parameters": lambda s: count_parameters(s.model),
    "rank_table": lambda s: rank_table(s.base, [2, 4], target_modules=[*s.config.target_modules]),
    "suggest_rank": lambda s: suggest_rank(s.base, tokens=5000),
    "suggest_learning_rate": lambda s: suggest_learning_rate(s.base),
    "rank_prices": lambda s: rank_prices(s.config, s.base, [2, 4], batch_size=2, seq_len=16),
    "card_table": lambda s: card_table(s.config, s.base, batch_size=2, seq_len=16, cards=["1MiB"]),
    "estimate_memory": lambda s: estimate_memory(s.config, s.base, batch_size=2, seq_len=16),
    "step_memory": lambda s: step_memory(s.config, s.base).peak_allocated(2, 16),
    "largest_that_fits": lambda s: largest_that_fits(
        s.config, s.base, "64MiB", vary="batch_size", seq_len=16
    ),
    # What else would fit is asked of the smaller base only, as it takes many estimates.
    "check_memory": lambda s: check_memory(
        s.base,
        s.config,
        batch_size=2,
        seq_len=16,
        budget="2MiB",
        advise=not getattr(s.base, "is_loaded_in_4bit", False),
    ),
    "assert_fits_memory": lambda s: assert_fits_memory(
        s.base, s.config, batch_size=2, seq_len=16, budget="80GiB"
    ),
    "check_recipe": lambda s: _on_recipe(s, check_recipe),
    "assert_recipe_healthy": lambda s: _on_recipe(s, assert_recipe_healthy),
    "check_run": lambda s: _on_arguments(s, check_run),
    "assert_run_healthy": lambda s: _on_arguments(s, assert_run_healthy),
    "watch_training": _watched,
    "check_adapters_in_sync": lambda s: _in_sync(s, check_adapters_in_sync),
    "assert_adapters_in_sync": lambda s: _in_sync(s, assert_adapters_in_sync),
    "oom_frontier": lambda s: oom_frontier(s.config, s.base, "1GiB", seq_lens=[16], dtype="float32"),
}
"""Those that look only."""


def test_every_check_that_takes_a_model_is_here() -> None:
    listed = {name.partition(",")[0] for name in (*RUNNING, *LOOKING)}
    models = {"model", "base", "model_or_config"}
    public = {name: getattr(pytest_lora, name) for name in pytest_lora.__all__}
    takes = {
        name
        for name, value in public.items()
        if inspect.isfunction(value) and models & set(inspect.signature(value).parameters)
    }
    assert listed == takes


def _bytes(tensor: torch.Tensor | None) -> Any:
    if tensor is None:
        return None
    data = tensor.detach().cpu().contiguous()
    return (
        str(data.dtype),
        tuple(data.shape),
        tensor.stride(),
        data.flatten().view(torch.uint8).numpy().tobytes(),
    )


def _plain(value: Any) -> Any:
    """Numbers and texts as they are, the bytes of tensors, the identity of all else."""
    if isinstance(value, torch.Tensor):
        return id(value), _bytes(value)
    if isinstance(value, dict):
        return {id(k) if isinstance(k, torch.Tensor) else k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)


def _model_state(model: nn.Module) -> dict[str, Any]:
    named = dict(
        [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    )
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        "values": {n: (id(t), _bytes(t)) for n, t in named.items()},
        "gradients": {n: (id(t.grad), _bytes(t.grad)) for n, t in named.items()},
        "requires_grad": {n: t.requires_grad for n, t in named.items()},
        "packing": {n: _plain(vars(q)) for n, t in named.items() if (q := getattr(t, "quant_state", None))},
        "modes": {n: m.training for n, m in modules.items()},
        "hooks": {
            n: [list(v) for k, v in vars(m).items() if k.endswith("_hooks")] for n, m in modules.items()
        },
        "attributes": {n: {k: _plain(v) for k, v in vars(m).items()} for n, m in modules.items()},
        "configs": copy.deepcopy({n: c.to_dict() for n, c in getattr(model, "peft_config", {}).items()}),
    }


def _state(setup: Setup) -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        **{f"model's {part}": state for part, state in _model_state(setup.model).items()},
        **{f"base's {part}": state for part, state in _model_state(setup.base).items()},
        "batch": _plain(setup.batch),
        "optimizer": _plain(setup.optimizer.state_dict()),
        "optimizer's own": _plain(vars(setup.optimizer)),
        "scheduler": _plain(vars(setup.scheduler)),
        "scaler": _plain({k: v for k, v in vars(setup.scaler).items() if k != "_per_optimizer_states"}),
        "Python's random numbers": random.getstate(),
        "NumPy's": str(np.random.get_state()),
        "torch's": _bytes(torch.get_rng_state()),
        "CUDA's": [_bytes(state) for state in cuda],
        "settings": (torch.is_grad_enabled(), torch.get_default_dtype()),
    }


def _setup(
    base: Callable[[], Any], batch: dict[str, torch.Tensor], targets: tuple[str, ...] = TARGETS
) -> Setup:
    """Two steps taken, gradients left lying about, one layer in another mode, a hook."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), lora_dropout=0.1)
    model: Any = get_peft_model(base(), copy.deepcopy(config)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=9)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(model(**batch).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
    model(**batch).loss.backward()
    next(m for m in model.modules() if isinstance(m, nn.Dropout)).eval()
    model.register_forward_hook(_do_nothing)
    return Setup(model, base(), batch, optimizer, scheduler, scaler, config)


def _do_nothing(*_: Any) -> None:
    """A hook of the user's."""


MODELS: dict[str, Callable[[], Setup]] = {
    "float": lambda: _setup(BASES["base"], language_batch()),
    # PEFT draws the factors of an embedding itself, on whatever device it is.
    "embedding": lambda: _setup(BASES["base"], language_batch(), ("q_proj", "embed_tokens")),
    "built-in 4-bit base": lambda: _setup(load_tiny, text_batch(batch_size=2, seq_len=8)),
}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def setup(request: pytest.FixtureRequest) -> Setup:
    """One for all: none of the tests changes it, or they fail."""
    found: Setup = request.param()
    return found


def _equal(before: dict[str, Any], after: dict[str, Any]) -> None:
    changed = [part for part in before if before[part] != after[part]]
    assert not changed


def _raising_at_second_call(monkeypatch: pytest.MonkeyPatch, model: Any) -> list[int]:
    """Let the forward pass of the base raise at its second call, of copies too; gives the calls."""
    kind = type(model.get_base_model())
    forward, calls = kind.forward, [0]

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] > 1:
            random.random(), np.random.rand(), torch.rand(1)
            raise BoomError
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", failing)
    return calls


CASES = [
    *((check, ends) for check in RUNNING for ends in ("well", "in an error")),
    *((check, "well") for check in LOOKING),
]


@pytest.mark.parametrize(("check", "ends"), CASES, ids=[f"{check} ends {ends}" for check, ends in CASES])
def test_no_trace(setup: Setup, check: str, ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = {**RUNNING, **LOOKING}[check]
    if ends == "well":
        before = _state(setup)
        with contextlib.suppress(LoraHealthError):
            run(setup)
        after = _state(setup)
    else:
        calls = _raising_at_second_call(monkeypatch, setup.model)
        before = _state(setup)
        with pytest.raises(BoomError):
            run(setup)
        after = _state(setup)
        assert calls == [2]
    _equal(before, after)


def _turn_in_memory(tensor: torch.Tensor) -> None:
    """The same values in another order of the bytes."""
    tensor.data = tensor.data.t().contiguous().t()


@pytest.mark.parametrize(
    "change",
    [
        lambda s: next(p for p in s.model.parameters() if p.requires_grad).data.add_(1e-7),
        lambda s: next(p for p in s.base.parameters() if p.is_floating_point()).data.add_(1e-3),
        lambda s: _turn_in_memory(next(p for p in s.base.parameters() if p.ndim == 2)),
        lambda s: next(p for p in s.model.parameters() if p.requires_grad).requires_grad_(False),
        lambda s: next(p for p in s.model.parameters() if p.grad is not None).grad.add_(1),
        lambda s: s.optimizer.zero_grad(),
        lambda s: s.model.eval(),
        lambda s: s.model.register_forward_hook(_do_nothing),
        lambda s: s.scheduler.step(),
        lambda s: s.scaler.update(3.0),
        lambda s: s.optimizer.step(),
        lambda s: random.random(),
        lambda s: np.random.rand(),
        lambda s: torch.rand(1),
    ],
)  # fmt: skip
def test_a_trace_is_seen(change: Callable[[Setup], object]) -> None:
    setup = MODELS["float"]()
    before = _state(setup)
    _equal(before, _state(setup))
    change(setup)
    with pytest.raises(AssertionError):
        _equal(before, _state(setup))
