"""GPU tests: what they need, which devices they get, what they took, and what is reported of it."""
