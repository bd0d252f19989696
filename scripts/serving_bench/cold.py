"""From the exec of a worker to its first good answer, without an agent process: the time a restart costs."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from pathlib import Path

from agent.blueprint import draw_up
from agent.config import load_config
from agent.contract.plan import FromWorker, Ready, WorkerPlan
from agent.generation import Generation, Patience
from agent.observation import create_ring
from scripts.serving_bench.models import Model
from scripts.serving_bench.ours import answer_length, ours_request
from scripts.serving_bench.processes import Failed


def cold_start_s(folder: Path, model: Model) -> float:
    """Seconds. Raises: Failed: no answer came within a minute."""
    config = folder / "agent.toml"
    first, *others, last = model.artifacts
    chain = ", ".join(f'"{one}"' for one in others)
    config.write_text(
        f'[state]\nfolder = "{folder / "state"}"\n[[service]]\nname = "{model.name}"\nartifact = "{first}"\n'
        f'fallbacks = [{chain}]\nfloor = "{last}"\n'
    )
    plan = WorkerPlan(1, tuple(blueprint.plan for blueprint in draw_up(load_config(config, {}).config)))
    return asyncio.run(_start(plan, folder / "cold.sock", ours_request(model, binary=True)))


async def _start(plan: WorkerPlan, path: Path, request: bytes) -> float:
    ended = asyncio.Event()

    def heard(generation: Generation, frame: FromWorker) -> None:
        if isinstance(frame, Ready):
            generation.serve()

    giving, leavings = socket.socketpair()
    generation = Generation(plan, Patience(), giving, on_frame=heard, on_end=lambda _one, _why: ended.set())
    ring = create_ring()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(16)
        began_s = time.monotonic()
        living = asyncio.create_task(generation.live([listener], ring, os.environ, takings={}))
        try:
            async with asyncio.timeout(60):
                await asyncio.to_thread(answer_length, path, request)
            return time.monotonic() - began_s
        except (TimeoutError, OSError) as error:
            raise Failed(f"a worker gave no answer: {error}") from None
        finally:
            generation.drain()
            await living
            leavings.close()
            os.close(ring)
