"""Rules on rank sweeps (codes 94x)."""
