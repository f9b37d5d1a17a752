"""Training data: token streams, the blend plan, and the loader that reads what the plan says."""
