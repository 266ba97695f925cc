"""Round trips of an adapter, done on copies of the model; a module for each."""
