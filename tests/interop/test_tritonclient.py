"""The unmodified public client, tritonclient[http], against a real worker over TCP."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.interop.graphs import KINDS, ODD, ragged, service, types
from tests.models import engine_plan, expected_probability, floor_plan, service_plan, window, worker_plan
from tests.processes import RunningWorker, Sockets

triton = pytest.importorskip("tritonclient.http")
utils = pytest.importorskip("tritonclient.utils")

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("triton")
    others = (service(folder, "types", types()), service(folder, "ragged", ragged()))
    plan = worker_plan(service_plan(engine_plan(folder, "wrist", version=3), floor_plan()), *others)
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
    parameters = {"ew_time_s": 12.5, "ew_deadline_ms": 80_000.0}
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


# --- every datatype, several inputs and outputs --------------------------------------------------------------
VALUES = {
    "BOOL": np.array([[True, False]]), "FP16": np.array([[0.5, -65504.0]], np.float16),
    "FP32": np.array([[1.5, -(2.0**100)]], np.float32), "FP64": np.array([[0.1, -1e300]]),
    "BYTES": np.array([["", "ü \u0000 end"]], object),
    **{f"{kind}{bits}".upper(): np.array([[np.iinfo(f"{kind}{bits}").min, np.iinfo(f"{kind}{bits}").max]],
        f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
}  # fmt: skip


def every_type(*, binary: bool) -> list[triton.InferInput]:
    inputs = []
    for kind in KINDS:
        given = triton.InferInput(f"{ODD} {kind}", [1, 2], kind)
        given.set_data_from_numpy(VALUES[kind], binary_data=binary or kind == "FP16")
        inputs.append(given)
    return inputs


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_every_datatype_goes_and_comes_back(
    client: triton.InferenceServerClient, *, binary_in: bool, binary_out: bool
) -> None:
    wanted = [
        triton.InferRequestedOutput(f"{kind}:out", binary_data=binary_out or kind == "FP16")
        for kind in reversed(KINDS)
    ]
    result = client.infer("types", every_type(binary=binary_in), outputs=wanted)
    assert [output["name"] for output in result.get_response()["outputs"]] == [
        f"{kind}:out" for kind in reversed(KINDS)
    ]
    for kind, values in VALUES.items():
        given = result.as_numpy(f"{kind}:out")
        if kind == "BYTES" and given.dtype == object:
            given = np.array([[one if isinstance(one, str) else one.decode() for one in given.ravel()]], object)
        assert given.shape == (1, 2)
        assert given.tolist() == values.tolist()


def test_fp16_asked_for_as_json_is_the_clients_own_exception(client: triton.InferenceServerClient) -> None:
    wanted = [triton.InferRequestedOutput("FP16:out", binary_data=False)]
    with pytest.raises(utils.InferenceServerException, match="no JSON form") as caught:
        client.infer("types", every_type(binary=True), outputs=wanted)
    assert caught.value.status() == "400"


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 0)])
def test_free_axes_and_a_scalar_output(client: triton.InferenceServerClient, shape: tuple[int, int]) -> None:
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    given = triton.InferInput("x", list(shape), "FP32")
    given.set_data_from_numpy(x)
    result = client.infer("ragged", [given])
    assert result.as_numpy("twice").tolist() == (2 * x).tolist()
    assert result.as_numpy("count").tolist() == x.size


def test_an_asynchronous_error_is_raised_where_the_answer_is_taken(client: triton.InferenceServerClient) -> None:
    requests = [client.async_infer("ankle", [tensor(window())]), client.async_infer("wrist", [tensor(window())])]
    with pytest.raises(utils.InferenceServerException, match="no model 'ankle'"):
        requests[0].get_result()
    assert requests[1].get_result().as_numpy("probability").shape == (1, 4)
