"""One rank of a step on several GPUs: the installed code of torch shards the model, and tensors stay without values."""
