"""The keeper: everything that a check could change, taken before it and put back after it."""

from pytest_lora.inspection.state.damage import Damage
from pytest_lora.inspection.state.keeper import KEPT, Keeper, NotRestoredError, leaves_no_trace
from pytest_lora.inspection.state.randomness import cuda_in_use
from pytest_lora.inspection.state.snapshot import Snapshot

__all__ = ["KEPT", "Damage", "Keeper", "NotRestoredError", "Snapshot", "cuda_in_use", "leaves_no_trace"]
