"""What the device itself can be asked: memory, processor, disk (`device`), energy (`power`), heat (`thermal`),
room for another process (`memory`).

Every reading may be None: unknown is an answer, and is never reported as zero. Each module reads from a root
folder that is `/sys` or `/proc` on a device and a recorded tree in tests.
"""
