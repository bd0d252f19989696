"""Scripts that run in the peers' own environments; each answers JSON lines."""
