"""Rules of the stage *history*: losses that a run has logged."""
