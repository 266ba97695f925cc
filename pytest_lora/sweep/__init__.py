"""Rank sweep: trials over ranks, a choice with its reasons, a picture, and a record for the tracker."""

from pytest_lora.sweep.plan import TrainOn, TrialPlan

__all__ = ["TrainOn", "TrialPlan"]
