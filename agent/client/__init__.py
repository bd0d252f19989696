"""Thin client for local programs: Unix socket or TCP, binary tensors; numpy and the standard library only.

    with Client("unix:/run/edgewarden/serve.sock", retry_once=True) as client:
        answer = client.infer("wrist", {"window": window})
        answer.outputs["probability"], answer.served_by

`agent.client.aio.AsyncClient` has the same methods as coroutines, and many of them at once. Both speak the Open
Inference Protocol through one codec (`agent.client.wire`), so any other v2 server answers them too. Failures are the
errors of `contract.errors`, chosen by HTTP status, with `status` and `retry_after_s` as the server said them.
"""

from agent.client.blocking import Client
from agent.client.streams import Stream
from agent.client.wire import Answer

__all__ = ["Answer", "Client", "Stream"]
