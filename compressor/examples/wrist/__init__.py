"""Wrist exercises from a smart watch: the demo task."""
