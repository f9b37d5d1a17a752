"""Is a machine fit for a training, and what would make it faster (tools/doctor.py)."""
