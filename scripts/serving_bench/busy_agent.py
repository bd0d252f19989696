"""The shipped agent with a thread beside it that keeps its process busy half of the time.

`python -m scripts.serving_bench.busy_agent run --config FILE`: what a heavy monitor or a slow disk would do to
it. The worker, a process of its own, must not notice.
"""

from __future__ import annotations

import sys
import threading
import time

from agent.cli import main

PERIOD_S, DUTY = 0.02, 0.5


def burn() -> None:
    """Pure Python, so that it holds the interpreter lock as our own code would."""
    while True:
        end_s = time.perf_counter() + PERIOD_S * DUTY
        while time.perf_counter() < end_s:
            pass
        time.sleep(PERIOD_S * (1 - DUTY))


if __name__ == "__main__":
    threading.Thread(target=burn, name="burn", daemon=True).start()
    sys.exit(main())
