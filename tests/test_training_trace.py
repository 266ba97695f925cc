"""Training checks leave the model, and all that trains it, bit for bit as they were, also when something raises."""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from pytest_lora import LoraHealthError, assert_loss_decreases, check_training
from pytest_lora.bases.examples.models import BASES, classifier_batch, image_batch, language_batch

pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass
class Setup:
    """A model amid its training, with everything that has a state."""

    model: Any
    batch: dict[str, torch.Tensor]
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    stale: list[nn.Parameter] = field(default_factory=list)


def _adapted(base: str, **changes: Any) -> PeftModel:
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **changes}
    return get_peft_model(BASES[base](), LoraConfig(**fields))


def _amid_training(
    model: Any, batch: dict[str, torch.Tensor], optimizer: type[Any] = torch.optim.AdamW
) -> Setup:
    """Two steps taken, gradients left lying about, a foreign parameter in the optimizer, one layer in eval mode."""
    stale = nn.Parameter(torch.randn(3))
    stale.grad = torch.randn(3)
    trained = optimizer([*(p for p in model.parameters() if p.requires_grad), stale], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        trained,
        [
            torch.optim.lr_scheduler.LinearLR(trained, 0.1, total_iters=2),
            torch.optim.lr_scheduler.CosineAnnealingLR(trained, 10),
        ],
        [2],
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for _ in range(2):
        trained.zero_grad()
        scaler.scale(model(**batch)["loss"]).backward()
        scaler.step(trained)
        scaler.update()
        scheduler.step()
    model(**batch)["loss"].backward()
    next(m for m in model.modules() if isinstance(m, nn.Dropout | nn.Identity)).eval()
    next(model.modules()).register_forward_hook(lambda *_: None)
    random.random(), np.random.rand(), torch.rand(1)
    return Setup(model, batch, trained, scheduler, scaler, [stale])


def _tied() -> Setup:
    return _amid_training(_adapted("tied_base", modules_to_save=["embed_tokens"]), language_batch())


def _dora() -> Setup:
    return _amid_training(
        _adapted("base", use_dora=True, lora_dropout=0.2), language_batch(), torch.optim.RMSprop
    )


def _classifier() -> Setup:
    return _amid_training(_adapted("classifier_base", task_type="SEQ_CLS"), classifier_batch())


def _batch_norm() -> Setup:
    model = _adapted("batchnorm_base", target_modules=["conv"], modules_to_save=["head"])
    return _amid_training(model, image_batch())


def _four_bit(mode: bool) -> Setup:
    return _amid_training(_adapted("base_4bit").train(), language_batch()) if mode else _four_bit_eval()


def _four_bit_eval() -> Setup:
    setup = _four_bit(True)
    setup.model.eval()
    return setup


def _checkpointed() -> Setup:
    model = _adapted("base", bias="lora_only", trainable_token_indices=[3])
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    return _amid_training(model.train(), language_batch(), torch.optim.NAdam)


SETUPS: dict[str, Callable[[], Setup]] = {
    "tied, with a full copy": _tied,
    "DoRA with dropout": _dora,
    "classifier": _classifier,
    "batch normalisation": _batch_norm,
    "4 bit": lambda: _four_bit(True),
    "4 bit in eval mode": _four_bit_eval,
    "checkpointing, biases, token rows": _checkpointed,
}


def _bits(value: Any) -> Any:
    """A value with the bytes of every tensor in it."""
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous()
        raw = (
            data.view(torch.uint8).numpy().tobytes() if data.numel() and data.ndim else data.numpy().tobytes()
        )
        return id(value), str(value.dtype), tuple(value.shape), value.stride(), raw
    if isinstance(value, dict):
        return {_name(k): _bits(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_bits(v) for v in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)


def _name(key: Any) -> Any:
    return id(key) if isinstance(key, torch.Tensor) else key


def _quantization(parameter: nn.Parameter) -> Any:
    state = getattr(parameter, "quant_state", None)
    return None if state is None else _bits({k: v for k, v in vars(state).items() if k != "state2"})


def _state(setup: Setup) -> dict[str, Any]:
    model = setup.model
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    named += [(f"stale {i}", p) for i, p in enumerate(setup.stale)]
    return {
        "values": {n: _bits(t) for n, t in named},
        "gradients": {n: _bits(t.grad) for n, t in named},
        "requires_grad": {n: t.requires_grad for n, t in named},
        "packing": {n: _quantization(t) for n, t in named},
        "modules": {
            n: {k: _bits(v) for k, v in vars(m).items()}
            for n, m in model.named_modules(remove_duplicate=False)
        },
        "optimizer": _bits(setup.optimizer.state_dict()),
        "optimizer's own": {k: _bits(v) for k, v in vars(setup.optimizer).items()},
        "scheduler": _bits({k: v for k, v in vars(setup.scheduler).items() if k != "_schedulers"}),
        "schedules": [_bits(vars(s)) for s in setup.scheduler._schedulers],
        "scaler": _bits({k: v for k, v in vars(setup.scaler).items() if k != "_per_optimizer_states"}),
        "random": (random.getstate(), str(np.random.get_state()), _bits(torch.get_rng_state())[1:]),
        "settings": (torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_anomaly_enabled()),
    }


def _unchanged(setup: Setup, run: Callable[[], object], raises: type[BaseException] | None = None) -> None:
    # state_dict makes new containers at each call; what is compared there are the tensors in them.
    before = _state(setup)
    if raises:
        with pytest.raises(raises):
            run()
    else:
        run()
    after = _state(setup)
    for part, value in before.items():
        assert after[part] == value, part


def _healthy_or_not(run: Callable[[], object]) -> None:
    with contextlib.suppress(LoraHealthError):
        run()


@pytest.fixture(scope="module", params=SETUPS.values(), ids=SETUPS)
def setup(request: pytest.FixtureRequest) -> Setup:
    """One for all: none of the tests changes it, or they fail."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return request.param()


def test_check_training(setup: Setup) -> None:
    def run() -> None:
        check_training(
            setup.model,
            setup.batch,
            optimizer=setup.optimizer,
            scheduler=setup.scheduler,
            scaler=setup.scaler,
            max_grad_norm=0.1,
        )

    _unchanged(setup, run)


def test_check_training_with_an_optimizer_of_its_own(setup: Setup) -> None:
    with torch.no_grad():
        _unchanged(setup, lambda: check_training(setup.model, [setup.batch] * 2))


def test_check_training_takes_real_steps(setup: Setup) -> None:
    """The tests above would pass if nothing happened."""
    seen = []

    def loss(model: Any, batch: Any) -> torch.Tensor:
        seen.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
        found: torch.Tensor = model(**batch)["loss"]
        return found

    check_training(setup.model, setup.batch, optimizer=setup.optimizer, loss_fn=loss)
    assert any(not torch.equal(a, b) for a, b in zip(seen[0], seen[-1], strict=True))


@pytest.mark.parametrize("own", [True, False])
def test_assert_loss_decreases(setup: Setup, own: bool) -> None:
    optimizer = None if own else setup.optimizer
    _unchanged(
        setup,
        lambda: _healthy_or_not(
            lambda: assert_loss_decreases(
                setup.model, setup.batch, steps=3, optimizer=optimizer, device="cpu"
            )
        ),
    )


class BoomError(Exception):
    pass


def _vandal(after: int) -> Callable[[Any, Any], torch.Tensor]:
    """A loss that changes whatever it can reach and raises at its second call."""
    calls = []

    def loss(model: Any, batch: Any) -> torch.Tensor:
        calls.append(1)
        found: torch.Tensor = model(**batch)["loss"]
        if len(calls) <= after:
            return found
        model.eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.requires_grad_(False)
                if parameter.is_floating_point():
                    parameter.mul_(2)
                if parameter.ndim == 2:
                    parameter.t_()
        for module in model.modules():
            module.register_forward_hook(lambda *_: None)
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        raise BoomError

    return loss


@pytest.mark.parametrize("check", [check_training, assert_loss_decreases])
def test_a_loss_function_that_raises(setup: Setup, check: Callable[..., Any]) -> None:
    _unchanged(
        setup,
        lambda: check(setup.model, setup.batch, steps=4, optimizer=setup.optimizer, loss_fn=_vandal(2)),
        BoomError,
    )


@pytest.mark.parametrize("check", [check_training, assert_loss_decreases])
def test_a_model_that_raises(
    setup: Setup, check: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = type(setup.model).forward, []

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 2:
            raise BoomError
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(setup.model), "forward", failing)
    _unchanged(setup, lambda: check(setup.model, setup.batch, steps=4, optimizer=setup.optimizer), BoomError)


@pytest.mark.parametrize("check", [check_training, assert_loss_decreases])
def test_batches_that_raise(setup: Setup, check: Callable[..., Any]) -> None:
    def batches() -> Iterator[Any]:
        torch.rand(3)
        setup.model.eval()
        yield setup.batch
        raise BoomError

    _unchanged(setup, lambda: check(setup.model, batches(), steps=3, optimizer=setup.optimizer), BoomError)


def test_merging_half_way_is_undone() -> None:
    model = _adapted("base")
    torch.nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    setup = _amid_training(model, language_batch())

    def loss(model: Any, batch: Any) -> torch.Tensor:
        model.merge_adapter()
        raise BoomError

    _unchanged(setup, lambda: check_training(setup.model, setup.batch, loss_fn=loss), BoomError)


def test_a_data_loader_keeps_its_generator() -> None:
    setup = _classifier()
    rows = [{k: v[i] for k, v in setup.batch.items()} for i in range(8)]
    generator = torch.Generator().manual_seed(3)
    loader = torch.utils.data.DataLoader(rows, batch_size=2, shuffle=True, generator=generator)
    state = generator.get_state()
    _unchanged(setup, lambda: check_training(setup.model, loader))
    assert torch.equal(generator.get_state(), state)


def test_an_iterator_is_used_as_far_as_needed() -> None:
    setup = _classifier()
    batches = iter([setup.batch] * 5)
    check_training(setup.model, batches, steps=2)
    assert len(list(batches)) == 3


def test_an_optimizer_that_asks_for_the_loss_is_given_it() -> None:
    """LBFGS takes its closure as it does in a loop of one's own, and forgets the steps afterwards."""
    model = _adapted("base").train()
    batch = language_batch()
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], lr=0.5, max_iter=3)
    before = copy.deepcopy(model.state_dict())
    report = check_training(model, batch, optimizer=optimizer, steps=2)
    assert not report.errors
    assert not optimizer.state
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    # A learning rate that moves nothing is told of this optimizer too, so the steps were taken.
    idle = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], lr=0.0)
    assert check_training(model, batch, optimizer=idle, steps=2).findings


def test_numbers_drawn_for_later_steps_are_kept() -> None:
    config = getattr(peft.tuners.lora.config, "MontecloraConfig", None)
    if config is None:
        pytest.skip("this PEFT has no MonteCLoRA")
    model = _adapted("base", r=2, monteclora_config=config(num_samples=2)).train()
    samplers = [m.sampler for m in model.modules() if type(m).__name__ == "MontecloraSampler"]
    before = [(s.index, [id(sample) for sample in s.buffer]) for s in samplers]
    check_training(model, language_batch(), steps=2)
    assert samplers
    assert before == [(s.index, [id(sample) for sample in s.buffer]) for s in samplers]


def test_evaluation_does_not_repack_4_bit_weights() -> None:
    """bitsandbytes 0.50 does so in evaluation mode on CPUs with AVX512-BF16, and gradients are wrong from then on."""
    setup = _four_bit_eval()
    _healthy_or_not(lambda: assert_loss_decreases(setup.model, setup.batch, steps=2, device="cpu"))
    weights = [m.weight for m in setup.model.modules() if type(m).__name__ == "Linear4bit"]
    assert weights
    assert not any(getattr(w.quant_state, "packing_format_for_cpu", False) for w in weights)
    assert all(w.shape[1] == 1 for w in weights)
