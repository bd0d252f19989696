"""Views added to adopted graphs: the numbers of the numpy twins, and outputs that do not change by a bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from agent.drift.views import (
    MOST_FEATURES,
    bounded,
    channel_features,
    identity_features,
    image_feature_names,
    image_features,
    projection,
)
from compressor.errors import SurgeryRefused
from compressor.surgery import Wanted, add_view
from tests.models import classifier

OPSETS = (13, 17, 20)


def mlp(numbers: int = 12, hidden: int = 100, *, opset: int = 17, rows: Any = "rows") -> onnx.ModelProto:
    """Input x (rows, numbers) -> Relu layer `layer` (rows, hidden) -> p (rows, 3)."""
    generator = np.random.default_rng(0)
    weights = {"a": generator.normal(size=(numbers, hidden)), "b": generator.normal(size=(hidden, 3))}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["raw"]),
        helper.make_node("Relu", ["raw"], ["layer"]),
        helper.make_node("MatMul", ["layer", "b"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["p"], axis=1),
    ]
    graph = helper.make_graph(
        nodes, "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, numbers])],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, [rows, 3])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def camera(shape: list[Any], kind: int, opset: int) -> onnx.ModelProto:
    """Input x -> p: the largest number of each image's first axis."""
    nodes = [
        helper.make_node("Cast", ["x"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("GlobalMaxPool", ["float"], ["p"]),
    ]
    graph = helper.make_graph(
        nodes, "camera", [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, ["rows", shape[1], 1, 1])],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def told(model: onnx.ModelProto, output: str, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (answer,) = session.run([output], {session.get_inputs()[0].name: x})
    return answer


def wild(x: np.ndarray) -> np.ndarray:
    broken = x.copy()
    broken.reshape(len(x), -1)[0, :3] = (1e30, -1e30, np.finfo(np.float32).max)
    return broken


def close(given: np.ndarray, expected: np.ndarray) -> None:
    assert given.dtype == np.float32
    assert given.shape == expected.shape
    np.testing.assert_allclose(given, expected, rtol=2e-5, atol=2e-5 * max(1.0, np.abs(expected).max() * 1e-2))


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_identity_is_the_numbers(opset: int, rows: int) -> None:
    added = add_view(mlp(opset=opset), Wanted("identity", "x", tuple("abcdefghijkl")))
    x = np.random.default_rng(rows).normal(size=(rows, 12)).astype(np.float32)
    for given in (x, wild(x)):
        close(told(added.model, "ew_view_identity", given), identity_features(given))
    assert added.view.features == list("abcdefghijkl")
    assert told(added.model, "p", x).tobytes() == told(mlp(opset=opset), "p", x).tobytes()


def test_more_numbers_than_a_record_holds_are_projected() -> None:
    added = add_view(mlp(numbers=128), Wanted("identity"))
    x = np.random.default_rng(1).normal(size=(4, 128)).astype(np.float32)
    matrix = projection(128)
    assert matrix is not None
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(MOST_FEATURES), atol=1e-6)
    close(told(added.model, "ew_view_identity", x), identity_features(x, matrix))
    with pytest.raises(SurgeryRefused, match="129 numbers"):
        add_view(mlp(numbers=129), Wanted("identity"))


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("hidden", [20, 100])
def test_hidden_is_the_tensor_or_its_projection(opset: int, hidden: int) -> None:
    model = mlp(hidden=hidden, opset=opset)
    added = add_view(model, Wanted("hidden", "layer"))
    x = np.random.default_rng(1).normal(size=(5, 12)).astype(np.float32)
    layer = np.maximum(x.astype(np.float64) @ numpy_helper.to_array(model.graph.initializer[0]), 0)
    close(told(added.model, "ew_view_hidden", x), identity_features(layer, projection(hidden)))
    assert len(added.view.features) == min(hidden, MOST_FEATURES)


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_channels_are_what_the_monitor_makes_of_a_window(rows: int) -> None:
    model = classifier(view=False)
    added = add_view(model, Wanted("channels", "window", ("ax", "ay", "gx")))
    x = np.random.default_rng(rows).normal(size=(rows, 16, 3)).astype(np.float32)
    constant = np.full_like(x, 9.80665)
    for given in (x, wild(x), constant):
        close(told(added.model, "ew_view_channels", given), channel_features(bounded(given)))
    assert added.view.features[:5] == ["ax.mean", "ax.log_sd", "ax.log_roughness", "ax.log_spike", "ay.mean"]
    assert told(added.model, "probability", x).tobytes() == told(model, "probability", x).tobytes()


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize(("layout", "channels"), [("NHWC", 3), ("NCHW", 3), ("NHWC", 1), ("NCHW", 4)])
@pytest.mark.parametrize("kind", [np.float32, np.uint8])
def test_an_image_is_its_statistics(opset: int, layout: str, channels: int, kind: type) -> None:
    shape = [11, 7, channels] if layout == "NHWC" else [channels, 11, 7]
    model = camera(["rows", *shape], helper.np_dtype_to_tensor_dtype(np.dtype(kind)), opset)
    added = add_view(model, Wanted("image", layout=layout))
    x = np.random.default_rng(2).integers(0, 256, (6, *shape)).astype(kind)
    x[1], x[2] = 0, 255
    for given in (x, wild(x)) if kind is np.float32 else (x,):
        pixels = given if layout == "NHWC" else given.transpose(0, 2, 3, 1)
        close(told(added.model, "ew_view_image", given), image_features(pixels, 0.0, 255.0))
    assert added.view.features == list(image_feature_names(channels))
    assert 8 <= len(added.view.features) <= 16


@pytest.mark.parametrize(
    ("model", "wanted", "words"),
    [
        (mlp(), Wanted("entropy"), "no view 'entropy'"),
        (mlp(), Wanted("identity", "y"), "no input 'y'"),
        (mlp(), Wanted("identity", "x", ("a",)), "1 names were given for 12"),
        (mlp(), Wanted("channels"), "needs windows"),
        (mlp(), Wanted("image"), "'image' needs"),
        (mlp(), Wanted("hidden", "nothing"), "makes no tensor 'nothing'"),
        (mlp(opset=12), Wanted("identity"), "opset 12"),
        (mlp(numbers=60, hidden=60), Wanted("identity"), ""),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_with_the_reason(model: onnx.ModelProto, wanted: Wanted, words: str) -> None:
    if words:
        with pytest.raises(SurgeryRefused, match=words):
            add_view(model, wanted)
        return
    once = add_view(model, wanted).model
    with pytest.raises(SurgeryRefused, match="already"):
        add_view(once, wanted)
    with pytest.raises(SurgeryRefused, match="120 numbers, a record holds 64"):
        add_view(once, Wanted("hidden", "layer"))
