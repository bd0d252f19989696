"""Example tasks, shaped as a user's own would be."""
