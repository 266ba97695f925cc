"""Rank sweep: trials over ranks, a choice with its reasons, a picture, and a record for the tracker."""

from pytest_lora.sweep.loop import TrainOn
from pytest_lora.sweep.plan import TrialPlan

__all__ = ["TrainOn", "TrialPlan"]
