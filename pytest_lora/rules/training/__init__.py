"""Rules on training (codes 3xx)."""
