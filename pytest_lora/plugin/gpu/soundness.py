"""Whether CUDA still works in this process: after some errors it answers nothing but errors."""

from __future__ import annotations

import pytest

from pytest_lora.plugin.gpu import memory


class Soundness:
    """What is known of it.

    Attributes:
        words: Of the error that broke CUDA; empty as long as it works.
        broken_by: The test in which that was.
    """

    def __init__(self) -> None:
        self.words = self.broken_by = ""

    def note(self, test: str, error: BaseException) -> bool:
        """Look at an error of a test; whether this test broke CUDA, by its words or as a look at the device found."""
        if memory.poison(error):
            self.end(test, error)
        return self.broken_by == test

    def end(self, test: str, error: BaseException) -> None:
        """CUDA is broken: what a look at the device raises, whatever its words, is no error of the test alone."""
        if not self.words:
            self.words = memory.poison(error) or str(error).partition("\n")[0] or type(error).__name__
            self.broken_by = test

    def require(self, before: str) -> None:
        """Fail a test that broke CUDA without an error of its own; ``before`` are the words before it."""
        if self.words and not before:
            pytest.fail(f"this test left CUDA broken: {self.words}", pytrace=False)
