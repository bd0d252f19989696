"""The worker's server by itself: `python -m scripts.serving_bench.alone FOLDER SOCKET SERVICE ARTIFACT...`.

What the part `monitors` compares the shipped agent with: the same server, engine and plan cache on a Unix socket, but
no record is written and no agent process reads it. FOLDER is for its configuration.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import uvloop

from agent.express import expect_any_number
from agent.frontend.openinference import OpenInference
from agent.frontend.server import Server
from agent.lineup import load_lineup
from agent.observation import create_ring
from agent.serving import Service, Serving
from scripts.bench_request import Silent, draw_plan


async def serve(folder: Path, unix: Path, name: str, artifacts: Sequence[Path]) -> None:
    """Until the process is ended."""
    plan = draw_plan(folder, name, artifacts)
    service = Service(0, plan, load_lineup(plan)[0])
    serving = Serving([service], Silent(create_ring()), stuck_after_s=5.0, on_unstoppable=lambda: os._exit(70))
    handler = OpenInference(serving)
    gc.collect()
    gc.freeze()
    server = Server(handler.handle, make_plan=handler.plan, max_body_bytes=1 << 26)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(unix))
        listener.listen(64)
        server.listen(listener)
        await asyncio.Event().wait()


if __name__ == "__main__":
    folder, unix, name, *artifacts = sys.argv[1:]
    expect_any_number()
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve(Path(folder), Path(unix), name, [Path(one) for one in artifacts]))
