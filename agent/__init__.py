"""The device side of Edgewarden: serve a model, watch it, fall back, report.

Map of the package, top to bottom (imports only ever point downward):

    cli                         what a person types; the only file that prints
    daemon | worker             the two processes: who builds and starts what
    frontend admin link systemd the edges: HTTP, admin socket, MQTT, service manager
    serving | monitor           who answers, on which thread; one stream of observations
    attempt service             one request with its failover; one served name
    lineup guard outbox sensors warm engines; input checks; store-and-forward; meters
    client channel              thin client; agent <-> worker frames
    engine drift decisions store metrics journal observation config
    tally sketch                exact counts; quantiles of latencies
    contract clock              what device and host promise each other; time

The agent process never imports onnxruntime; the worker never imports pydantic, paho, tuf, psutil
or sqlite3. Both are tested at run time.
"""

VERSION = "0.1.0"
