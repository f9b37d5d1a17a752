"""The grid, the loop, the optimizer, metrics and signals of a training run."""
