"""Rules on the predicted memory of a training step (codes 5xx)."""
