"""What several scripts need: set-up (shell), goals and their table, the machine, environments of peers."""
