"""The serving bench: our agent and its peers under one load generator, in one run, as ratios."""
