"""The quickstart's story, told by real processes: `python -m scripts.story`."""
