"""BentoML, one worker: POST /predict {"x": [[...]]}. Fair to it: access log, metrics and tracing are off.

Started as `bentoml serve bentoml_server:Mlp`; the model's path is in EW_BENCH_MODEL.
"""

from __future__ import annotations

import os
from typing import Any

import bentoml
import numpy as np
import onnxruntime


@bentoml.service(
    workers=1,
    traffic={"timeout": 60},
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)
class Mlp:
    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        model = os.environ["EW_BENCH_MODEL"]
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    @bentoml.api
    async def predict(self, x: list[list[float]]) -> dict[str, Any]:
        (probability,) = self.session.run(["probability"], {"x": np.array(x, np.float32)})
        return {"probability": probability.tolist()}
