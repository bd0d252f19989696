"""Pure decisions: events and the time go in, commands come out. No clock, no I/O, no threads."""
