"""What trains an adapter, and what some real steps of it show, as facts."""

from pytest_lora.inspection.placement import place
from pytest_lora.inspection.training.batches import LossFn
from pytest_lora.inspection.training.first_steps import FirstSteps
from pytest_lora.inspection.training.loader import first_rows
from pytest_lora.inspection.training.loss_drop import loss_drop
from pytest_lora.inspection.training.optimizer import optimizer_facts
from pytest_lora.inspection.training.plan import Plan
from pytest_lora.inspection.training.probe import training_facts
from pytest_lora.inspection.training.rows import row_facts

__all__ = [
    "FirstSteps",
    "LossFn",
    "Plan",
    "first_rows",
    "loss_drop",
    "optimizer_facts",
    "place",
    "row_facts",
    "training_facts",
]
