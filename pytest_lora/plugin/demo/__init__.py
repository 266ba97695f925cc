"""``pytest --lora-demo``: a healthy adapter and five broken ones, judged in a session of their own.

That session knows neither the tests, settings nor plugins of the folder in which it is called, and writes its report
alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def show(config: pytest.Config) -> int:
    """Run the demo.

    Returns:
        0 if the healthy adapter passed and the broken ones failed, each with its diagnosis; else 1.
    """
    given = [
        config.invocation_params.dir / Path(path).expanduser() for path in config.getoption("lora_report")
    ]
    reports = given or [Path(tempfile.mkdtemp(prefix="lora-demo-")) / "report.html"]
    command = [sys.executable, "-m", "pytest", "-p", "pytest_lora.plugin", "-p", "no:cacheprovider"]
    command += [f"--color={config.getoption('color')}", "test_demo.py"]
    command += [f"--lora-report={path}" for path in reports]
    return subprocess.run(command, cwd=HERE, env=_environment(), check=False).returncode


def _environment() -> dict[str, str]:
    """Without what would let other plugins in or write anywhere."""
    dropped = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "GITHUB_STEP_SUMMARY", "GITHUB_ACTIONS")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    return kept | alone
