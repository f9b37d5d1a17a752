"""Dense weights to experts: pure tensor code."""
