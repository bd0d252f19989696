"""The worker's edge to its clients: HTTP/1.1 over Unix socket and TCP, Open Inference Protocol v2."""
