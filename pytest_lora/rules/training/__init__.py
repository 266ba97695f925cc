"""Rules on how adapters are trained (codes 3xx)."""
