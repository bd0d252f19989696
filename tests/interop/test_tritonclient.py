"""The unmodified public client, tritonclient[http], against a real worker over TCP."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.models import engine_plan, expected_probability, floor_plan, service_plan, window, worker_plan
from tests.processes import RunningWorker, Sockets

triton = pytest.importorskip("tritonclient.http")
utils = pytest.importorskip("tritonclient.utils")

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("triton")
    plan = worker_plan(service_plan(engine_plan(folder, "wrist", version=3), floor_plan()))
    with Sockets(folder) as sockets, RunningWorker(sockets, plan).serve():
        yield sockets.tcp_address


@pytest.fixture
def client(address: str) -> Iterator[triton.InferenceServerClient]:
    opened = triton.InferenceServerClient(address, concurrency=4)
    yield opened
    opened.close()


def tensor(x: np.ndarray, *, binary: bool = True) -> triton.InferInput:
    given = triton.InferInput("window", list(x.shape), utils.np_to_triton_dtype(x.dtype))
    given.set_data_from_numpy(x, binary_data=binary)
    return given


def test_health(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("wrist")
    assert client.is_model_ready("wrist", "3")
    assert not client.is_model_ready("ankle")


def test_metadata_configuration_index_and_statistics(client: triton.InferenceServerClient) -> None:
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("wrist", "3")
    assert metadata["inputs"] == [{"name": "window", "datatype": "FP32", "shape": [-1, 16, 3]}]
    assert [output["name"] for output in metadata["outputs"]] == ["probability"]
    assert metadata["parameters"]["labels"] == ["PEN", "ABD", "FEL", "IR"]
    assert client.get_model_config("wrist")["input"][0]["data_type"] == "TYPE_FP32"
    assert client.get_model_repository_index()[0]["state"] == "READY"
    assert client.get_inference_statistics("wrist")["model_stats"][0]["name"] == "wrist"
    assert client.get_inference_statistics()["model_stats"][0]["name"] == "wrist"


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_infer_in_every_form(client: triton.InferenceServerClient, binary_in: bool, binary_out: bool | None) -> None:  # noqa: FBT001
    x = window(rows=3)
    wanted = None if binary_out is None else [triton.InferRequestedOutput("probability", binary_data=binary_out)]
    result = client.infer("wrist", [tensor(x, binary=binary_in)], outputs=wanted, request_id="q-1")
    np.testing.assert_allclose(result.as_numpy("probability"), expected_probability(x), atol=1e-6)
    response = result.get_response()
    assert response["id"] == "q-1"
    assert response["parameters"]["ew_served_by"] == "wrist"
    assert [output["name"] for output in response["outputs"]] == ["probability"]


def test_asynchronous_infer(client: triton.InferenceServerClient) -> None:
    windows = [window(seed=seed) for seed in range(20)]
    pending = [client.async_infer("wrist", [tensor(x)], request_id=str(n)) for n, x in enumerate(windows)]
    for number, (x, request) in enumerate(zip(windows, pending, strict=True)):
        result = request.get_result()
        assert result.get_response()["id"] == str(number)
        np.testing.assert_allclose(result.as_numpy("probability"), expected_probability(x), atol=1e-6)


def test_our_request_parameters_pass_through(client: triton.InferenceServerClient) -> None:
    parameters = {"ew_time_s": 12.5, "ew_deadline_ms": 800.0}
    result = client.infer("wrist", [tensor(window())], parameters=parameters, timeout=900_000)
    assert result.get_response()["parameters"]["ew_reason"] == "active"


@pytest.mark.parametrize(
    ("model", "x", "status", "words"),
    [
        ("wrist", window()[:, :5], "400", "must have shape"),
        ("wrist", window().astype(np.float64), "400", "must be FP32"),
        ("ankle", window(), "404", "no model 'ankle'"),
    ],
)
def test_errors_are_the_clients_own_exception(
    client: triton.InferenceServerClient, model: str, x: np.ndarray, status: str, words: str
) -> None:
    with pytest.raises(utils.InferenceServerException) as caught:
        client.infer(model, [tensor(x)])
    assert caught.value.status() == status
    assert words in caught.value.message()


@pytest.mark.parametrize("method", ["load_model", "unload_model"])
def test_loading_is_refused_with_a_reason(client: triton.InferenceServerClient, method: str) -> None:
    with pytest.raises(utils.InferenceServerException, match="decided by its agent"):
        getattr(client, method)("wrist")


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests_are_an_error_and_not_a_dropped_connection(
    client: triton.InferenceServerClient, algorithm: str
) -> None:
    with pytest.raises(utils.InferenceServerException, match="compressed") as caught:
        client.infer("wrist", [tensor(window())], request_compression_algorithm=algorithm)
    assert caught.value.status() == "415"
