"""Rules on saved adapters: files (40x), configuration (41x), keys (42x), shapes (43x), values (44x), base (45x)."""
