"""LitServe, one worker, on the CPU: POST /predict {"x": [[...]]}. Fair to it: no logs, no batching delay."""

import sys
from typing import Any

import litserve
import numpy as np
import onnxruntime


class Mlp(litserve.LitAPI):
    def setup(self, device: str) -> None:  # noqa: ARG002
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe reads annotations, and has its own idea of them
        return np.array(request["x"], np.float32)

    def predict(self, x: Any) -> Any:
        return self.session.run(["probability"], {"x": x})[0]

    def encode_response(self, output: Any) -> dict[str, Any]:
        return {"probability": output.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(Mlp(), accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1", port=int(sys.argv[2]), num_api_servers=1, log_level="error", generate_client_file=False
    )
