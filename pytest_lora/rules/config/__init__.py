"""Rules on a LoraConfig and the base it is for (codes 1xx)."""
