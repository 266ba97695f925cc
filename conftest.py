"""Fixtures that the tests of this repository share."""

import os

# Several workers with several threads each would only wait for each other: the models are tiny.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["pytester"]
