"""Settings of Hypothesis for tests that build models."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

SUPPRESSED = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example)
"""Health checks that measure how long and how large examples are: a model takes milliseconds to build."""


def register_profiles() -> None:
    """Register ``lora-ci`` and ``lora-dev``; which profile is used stays with the user.

    Neither has a deadline. ``lora-ci`` draws 200 examples, the same in every run; ``lora-dev`` draws 25.
    Chosen by ``pytest --hypothesis-profile=lora-ci``, or by ``settings.load_profile("lora-ci")`` after
    ``pytest_lora.strategies`` was imported.
    """
    settings.register_profile(
        "lora-ci",
        max_examples=200,
        derandomize=True,
        deadline=None,
        print_blob=True,
        suppress_health_check=SUPPRESSED,
    )
    settings.register_profile("lora-dev", max_examples=25, deadline=None, suppress_health_check=SUPPRESSED)
