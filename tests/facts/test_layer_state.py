"""One adapter on one module, and how far a loss fell: each statement where it turns."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from pytest_lora.facts.curve_shape import FITS, LossDrop
from pytest_lora.facts.measures import of_drop
from pytest_lora.facts.model_parts import LayerState
from pytest_lora.inspection.layers import layer_states
from pytest_lora.inspection.survey import survey
from tests.test_live_facts import adapted


@pytest.fixture
def layer() -> LayerState:
    return next(layer_states(survey(adapted()).layers))


@pytest.mark.parametrize(
    ("before", "after", "learned", "drop", "fits", "healthy"),
    [
        (2.0, 1.0, True, 0.5, False, True),
        (2.0, 1.0, False, 0.5, False, False),
        (2.0, 1.75, True, 0.125, False, True),
        (2.0, 1.76, True, 0.12, False, False),
        (0.0, 0.0, True, None, True, True),
        (FITS / 2, FITS / 2, True, 0.0, True, True),
        (FITS, FITS / 2, True, 0.5, False, True),
        (FITS / 2, FITS, True, -1.0, False, False),
        (-FITS / 2, -FITS / 2, True, 0.0, True, True),
    ],
)
def test_a_drop_is_relative_and_what_fits_need_not_fall(
    before: float, after: float, learned: bool, drop: float | None, fits: bool, healthy: bool
) -> None:
    found = LossDrop(before, after, (before,) * 3, None, 0.125, learned)
    assert math.isnan(found.drop) if drop is None else found.drop == pytest.approx(drop)
    assert (found.fits_already, found.healthy) == (fits, healthy)
    assert of_drop(found) == (() if drop is None else (("loss drop within 3 steps", found.drop),))


@pytest.mark.parametrize(
    ("a", "b", "learns", "changes"),
    [
        ((True, False), (True, True), True, False),
        ((False, False), (True, True), True, False),
        ((True, False), (False, True), False, False),
        ((True, True), (True, False), True, False),
        ((False, True), (True, False), False, False),
        ((False, False), (False, False), False, True),
        ((True, None), (True, None), True, None),
        ((True, False), (True, None), True, None),
    ],
)
def test_whether_factors_can_learn_and_change_outputs(
    layer: LayerState, a: Any, b: Any, learns: bool, changes: bool | None
) -> None:
    found = replace(
        layer, a=replace(layer.a, trainable=a[0], zero=a[1]), b=replace(layer.b, trainable=b[0], zero=b[1])
    )
    assert (found.can_learn, found.changes_output, found.trainable) == (learns, changes, a[0] or b[0])


def test_scalings_and_swapped_factors(layer: LayerState) -> None:
    off = replace(layer, scaling=layer.scaling * 1.00002)
    assert layer.is_scaled_as_configured
    assert replace(layer, scaling=layer.scaling * 1.000005).is_scaled_as_configured
    assert not off.is_scaled_as_configured
    for swappable, empty, swapped in ((True, 0, True), (False, 1, True), (False, 0, False)):
        assert replace(off, swappable=swappable, empty_ranks=empty).is_swapped is swapped
        assert not replace(layer, swappable=swappable, empty_ranks=empty).is_swapped
    assert [replace(layer, module=name).in_expert for name in ("a.experts.0.q", "a.q")] == [True, False]
    assert [replace(layer.a, dtype=dtype).is_quantized for dtype in ("uint8", "float32")] == [True, False]
