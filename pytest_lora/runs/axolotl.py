"""The checks in a run of Axolotl, by two lines of its YAML.

Written after ``axolotl.integrations.base`` and ``axolotl.integrations.config`` of July 2026: the plugin is made without
arguments, ``get_input_args`` names a class of fields that are mixed into Axolotl's own configuration, and
``add_callbacks_pre_trainer`` gives callbacks of the transformers Trainer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_lora.expect import Expect
from pytest_lora.runs.trainer import LoraHealthCallback

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import BaseModel

    class BasePlugin:
        """What Axolotl's own is to a type checker, which has no Axolotl."""
else:
    try:
        from axolotl.integrations.base import BasePlugin
    except ImportError as error:
        raise ImportError("LoraHealthPlugin is for Axolotl, which is not installed here") from error
    from pydantic import BaseModel  # which comes with Axolotl


class LoraHealthArgs(BaseModel):
    """The key that the plugin adds to Axolotl's configuration.

    Attributes:
        lora_health: Arguments of ``LoraHealthCallback``, as in ``{on_error: stop, ignore: [LORA109]}``; ``expect`` is a
            mapping of the fields of ``Expect``.
    """

    lora_health: dict[str, Any] | None = None


class LoraHealthPlugin(BasePlugin):
    """Judges a run of Axolotl.

    In its YAML: ``plugins: [pytest_lora.runs.axolotl.LoraHealthPlugin]``, and if need be ``lora_health``.
    """

    def get_input_args(self) -> str:
        """The class with our key, as Axolotl imports it."""
        return f"{__name__}.{LoraHealthArgs.__name__}"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[LoraHealthCallback]:
        """The callback, for the trainer that is about to be made.

        Raises:
            TypeError: ``lora_health`` has a key that ``LoraHealthCallback`` does not take, or a value of another type.
            ValueError: A value of it is out of its range.
        """
        given: Mapping[str, Any] = cfg.get("lora_health") or {}
        arguments = {name: value for name, value in given.items() if value is not None}
        if "expect" in arguments:
            arguments["expect"] = Expect(**arguments["expect"])
        return [LoraHealthCallback(**arguments)]
