"""The fixtures. Each can be overridden at any level, and the others work with what it returns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeVar

    import torch
    from peft import LoraConfig, PeftModel
    from torch import Tensor, nn

    from pytest_lora.expect import Expect
    from pytest_lora.plugin.shared_base import Guarded
    from pytest_lora.sweep.result import SweepResult

    T = TypeVar("T")


@pytest.fixture(scope="session")
def lora_device(request: pytest.FixtureRequest) -> torch.device:
    """The torch.device of the LoRA fixtures: of --lora-device, else CUDA if there is one, else the CPU.

    Overrides need session scope.
    """
    from pytest_lora.plugin.gpu import devices

    return _or_fail(devices.device_of, request.config)


@pytest.fixture(scope="session")
def lora_base_model(request: pytest.FixtureRequest, lora_device: torch.device) -> nn.Module:
    """The frozen base model, shared by all tests: a small pretrained causal LM in 4 bits (nf4), or --lora-model.

    Override it to test on a model of your own, any torch.nn.Module; in session scope it is built once, watched
    and put back after each test. A test that changes its weights, buffers or layers is an error at teardown.
    """
    from pytest_lora.inspection.quiet import warnings_only_warn
    from pytest_lora.plugin.session_options import options_of

    folder = options_of(request.config).model
    with warnings_only_warn():
        if folder is None:
            from pytest_lora.bases.tiny import load_tiny

            return load_tiny(device=lora_device)
        from pytest_lora.bases import load_in_4bit

        return load_in_4bit(folder, lora_device)


@pytest.fixture
def lora_config(request: pytest.FixtureRequest) -> LoraConfig:
    """The peft.LoraConfig of the test, from ini lora_config, @pytest.mark.lora and indirect parametrization.

    Without them: rank 8 on all linear layers of a causal LM. lora_alpha is twice the rank unless it is set.
    ``@pytest.mark.parametrize("lora_config", [4, 8, 16], indirect=True)`` runs a test with these ranks; dicts
    of fields and LoraConfig objects work there too.
    """
    from pytest_lora.plugin import lora_settings

    return _or_fail(lora_settings.config_for, request.node, getattr(request, "param", None))


@pytest.fixture
def lora_expect(request: pytest.FixtureRequest) -> Expect:
    """The pytest_lora.Expect of the test, from ini lora_config and @pytest.mark.lora.

    Pass it on: ``assert_lora_healthy(lora_model, expect=lora_expect)``. Without expect=, assertions assume the
    defaults and know nothing of the marks.
    """
    from pytest_lora.plugin import markers

    return _or_fail(markers.expect_for, request.node)


@pytest.fixture
def _lora_base_guard(request: pytest.FixtureRequest) -> Iterator[Guarded]:
    """The shared base under watch: put back after the test, which is named if it damaged the base."""
    from pytest_lora.plugin import shared_base

    guarded = shared_base.enter(request)
    yield guarded
    damage = guarded.leave(request)
    if damage:
        pytest.fail(damage, pytrace=False)


@pytest.fixture
def lora_model(
    request: pytest.FixtureRequest,
    lora_base_model: nn.Module,
    lora_config: LoraConfig,
    _lora_base_guard: Guarded,
) -> PeftModel:
    """The shared base with a fresh adapter of lora_config on it, a peft.PeftModel; taken off after the test.

    The adapter's weights are the same in every run, and no random state is touched.
    """
    from pytest_lora.plugin import lora_settings

    config = _or_fail(lora_settings.fitted, lora_config, lora_base_model, request.node)
    return _or_fail(_lora_base_guard.put_on, config)


@pytest.fixture
def lora_batch(lora_base_model: nn.Module, lora_device: torch.device) -> dict[str, Tensor]:
    """One fixed batch of text on lora_device: input_ids, attention_mask and labels, int64 of shape (4, 64).

    Ids are bytes of text. A base with fewer than 259 of them gets the ids modulo its vocabulary. Override it
    for a base that is no language model.
    """
    from pytest_lora.bases.tiny import text_batch
    from pytest_lora.plugin import lora_settings

    return lora_settings.within_vocabulary(text_batch(device=lora_device), lora_base_model)


@pytest.fixture
def lora_rank_sweep(
    request: pytest.FixtureRequest, lora_base_model: nn.Module, lora_config: LoraConfig
) -> Callable[..., SweepResult]:
    """Sweep ranks on copies of the base: ``lora_rank_sweep(train, evaluate, **settings)``, a SweepResult.

    Settings are those of pytest_lora.rank_sweep. Unless they are given, ranks are those of --lora-ranks (4, 8, 16),
    the adapter is that of lora_config, and no progress bar is shown.
    """
    from pytest_lora.plugin import lora_settings

    return _or_fail(lora_settings.sweeper, request.node, lora_base_model, lora_config)


def _or_fail(settle: Callable[..., T], *arguments: object) -> T:
    """Call; a ValueError fails the test with its message alone, as a setting is wrong and no code is to blame."""
    try:
        return settle(*arguments)
    except ValueError as error:
        problem = str(error)
    pytest.fail(problem, pytrace=False)
