"""What trains an adapter, and what some real steps of it show, as facts."""

from pytest_lora.inspection.training.batches import LossFn
from pytest_lora.inspection.training.optimizer import optimizer_facts
from pytest_lora.inspection.training.probe import Plan, drop_facts, training_facts

__all__ = ["LossFn", "Plan", "drop_facts", "optimizer_facts", "training_facts"]
