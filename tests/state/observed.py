"""A model amid its training with all that has a state, and everything of it that a check must leave as it was."""

from __future__ import annotations

import copy
import gc
import logging
import os
import random
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from pytest_lora.bases.examples.models import BASES, language_batch

LOGGERS = (None, "transformers", "peft")


@dataclass
class Batches:
    """A loader with a generator of its own."""

    batch: dict[str, torch.Tensor]
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(3))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            torch.rand(1, generator=self.generator)
            yield self.batch


@dataclass
class Setup:
    """What ``check_training`` is given."""

    model: Any
    batches: Batches
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    gradients: list[torch.Tensor] = field(default_factory=list)

    @property
    def trainers(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}


def do_nothing(*_: Any) -> None:
    """A hook of the user's."""


def amid_training(base: str = "base", optimizer: type[Any] = torch.optim.AdamW) -> Setup:
    """Two steps taken, gradients left lying about, hooks, attributes, one layer in evaluation mode."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
        model: Any = get_peft_model(BASES[base](), config).train()
        batch = dict(language_batch())
        trained = optimizer([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LinearLR(trained, 0.5, total_iters=9)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for _ in range(2):
            trained.zero_grad()
            scaler.scale(model(**batch).loss).backward()
            scaler.step(trained)
            scaler.update()
            scheduler.step()
        model(**batch).loss.backward()
    next(m for m in model.modules() if isinstance(m, nn.Dropout)).eval()
    model.register_forward_hook(do_nothing)
    model.notes = {"losses": [[2.0], [1.0]]}
    first = next(p for p in model.parameters() if p.requires_grad)
    first.register_hook(do_nothing)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return Setup(model, Batches(batch), trained, scheduler, scaler, gradients)


def _bytes(tensor: torch.Tensor | None) -> Any:
    if tensor is None:
        return None
    data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return id(tensor), tensor.data_ptr(), str(tensor.dtype), tuple(tensor.shape), tensor.stride(), data


def plain(value: Any) -> Any:
    """Numbers and texts with their type, the bytes of tensors, what containers hold, the identity of all else."""
    if isinstance(value, torch.Tensor):
        return _bytes(value)
    if isinstance(value, dict):
        return id(value), [(id(k) if isinstance(k, torch.Tensor) else k, plain(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return id(value), sorted(map(str, value))
    return (type(value), value) if isinstance(value, (int, float, str, bool, type(None))) else id(value)


def _hooks(value: Any) -> list[Any]:
    return [plain(v) for k, v in vars(value).items() if k.endswith("_hooks")]


def observed(setup: Setup) -> dict[str, Any]:
    """By entry of the keeper's list; some are seen under several."""
    model = setup.model
    modules = dict(model.named_modules(remove_duplicate=False))
    named = list(model.named_parameters(remove_duplicate=False))
    tensors = [*named, *model.named_buffers(remove_duplicate=False)]
    base = model.get_base_model()
    states = [q for _, t in named if (q := getattr(t, "quant_state", None)) is not None]
    module: Any = warnings
    return {
        "weights": {n: _bytes(t) for n, t in named},
        "buffers": {n: _bytes(t) for n, t in model.named_buffers(remove_duplicate=False)},
        "gradients": ({n: _bytes(t.grad) for n, t in named}, [_bytes(g) for g in setup.gradients]),
        "requires_grad": {n: t.requires_grad for n, t in tensors},
        "quantization states": [(id(q), plain(vars(q))) for q in states],
        "tensor hooks": {
            n: (plain(t._backward_hooks), plain(t._post_accumulate_grad_hooks)) for n, t in named if t.is_leaf
        },
        "modes": {n: m.training for n, m in modules.items()},
        "attributes of modules": {n: plain(vars(m)) for n, m in modules.items()},
        "classes of modules": {n: type(m) for n, m in modules.items()},
        "configurations": [
            (id(c), plain(vars(c)), copy.deepcopy(c.to_dict()))
            for c in (base.config, base.generation_config, *model.peft_config.values())
        ],
        "module hooks": {n: _hooks(m) for n, m in modules.items()},
        "optimizer": (
            plain(vars(setup.optimizer)),
            plain([*setup.optimizer.state.values()]),
            plain(setup.optimizer.param_groups),
        ),
        "scheduler": plain(vars(setup.scheduler)),
        "scaler": plain(vars(setup.scaler)),
        "generators": _bytes(setup.batches.generator.get_state())[5:],
        "batches": plain(setup.batches.batch),
        "random states": (
            random.getstate(),
            [n.tobytes() if isinstance(n, np.ndarray) else n for n in np.random.get_state()],
            _bytes(torch.get_rng_state())[5:],
        ),
        "float32 precision": (
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.allow_tf32,
        ),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.is_autocast_enabled("cuda"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
            _autocast_depth(),
        ),
        "deterministic algorithms": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.benchmark,
        ),
        "anomaly detection": torch.is_anomaly_enabled(),
        "grad mode": torch.is_grad_enabled(),
        "number of threads": torch.get_num_threads(),
        "warning filters": (id(module.filters), list(module.filters), module.showwarning),
        "logging levels": [(g.level, g.disabled) for g in map(logging.getLogger, LOGGERS)],
        "logging handlers": [
            (g.handlers[:], g.filters[:], g.propagate) for g in map(logging.getLogger, LOGGERS)
        ],
        "environment variables": dict(os.environ),
        "garbage collection": gc.isenabled(),
        "disabled logging": logging.root.manager.disable,
        "signal handlers": {n: signal.getsignal(n) for n in signal.valid_signals()},
    }


def _autocast_depth() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The entries that differ."""
    return [entry for entry in before if before[entry] != after[entry]]
