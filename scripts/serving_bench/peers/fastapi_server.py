"""FastAPI with pydantic on uvicorn, one worker, as its guides show it: POST /predict {"x": [[...]]}.

Fair to it: uvloop and httptools (uvicorn[standard]'s loop and parser), no access log, one thread for the runtime,
and the handler is `async def`, so that a quick model does not pay for a thread pool.
"""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
app = FastAPI()


class Question(BaseModel):
    x: list[list[float]]


class Answer(BaseModel):
    probability: list[list[float]]


@app.get("/ready")
async def ready() -> dict[str, bool]:
    return {"ready": True}


@app.post("/predict")
async def predict(question: Question) -> Answer:
    (probability,) = session.run(["probability"], {"x": np.array(question.x, np.float32)})
    return Answer(probability=probability.tolist())


uvicorn.run(
    app, host="127.0.0.1", port=int(sys.argv[2]), loop="uvloop", http="httptools", access_log=False, log_level="error"
)
