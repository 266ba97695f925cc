"""What was seen, as frozen dataclasses of plain strings and numbers; no torch here."""

from pytest_lora.facts import base as base
from pytest_lora.facts import behaviour as behaviour
from pytest_lora.facts import checkpoint as checkpoint
from pytest_lora.facts import config as config
from pytest_lora.facts import curve as curve
from pytest_lora.facts import history as history
from pytest_lora.facts import labels as labels
from pytest_lora.facts import layer_state as layer_state
from pytest_lora.facts import loss_drop as loss_drop
from pytest_lora.facts import memory as memory
from pytest_lora.facts import model as model
from pytest_lora.facts import optimizer as optimizer
from pytest_lora.facts import properties as properties
from pytest_lora.facts import recipe as recipe
from pytest_lora.facts import resumption as resumption
from pytest_lora.facts import served as served
from pytest_lora.facts import settings as settings
from pytest_lora.facts import steps as steps
from pytest_lora.facts import sweep as sweep
from pytest_lora.facts import training as training
