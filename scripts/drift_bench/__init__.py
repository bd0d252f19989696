"""`scripts/bench drift`: what the drift monitors promise, what they find, and what both cost, beside their peers."""
