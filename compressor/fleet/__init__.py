"""The host service: what the fleet reports, what follows from it, and how it reaches the devices again.

service                     who builds and starts what; one process per fleet
ingest | http               the edges: broker, HTTP
inbox samples               hostile bytes -> plain values, or a counted refusal
evidence planner rollout    merged sums; what to do; how far an update got (the last two are pure)
database                    everything that must survive, the only door to sqlalchemy
"""
