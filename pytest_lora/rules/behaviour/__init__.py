"""Rules on behaviour (codes 9xx): properties pinned by a test, round trips, laws, resumption, ranks in sync."""
