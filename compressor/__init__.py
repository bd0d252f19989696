"""The host side of Edgewarden: from a model and data to the smallest artifact that keeps its promises.

Of `agent` it imports only what is public there: contract, decisions, drift, engine, sketch, client, clock.
"""
