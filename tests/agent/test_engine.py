"""The door to onnxruntime: what loads, what is refused, and what a run can come to."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from agent.contract.errors import ArtifactError, Corrupt, EngineFailed, Incompatible, TooLarge, Unavailable
from agent.contract.plan import TensorPlan
from agent.engine import (
    MAX_GOLDEN_BYTES,
    FloorEngine,
    Golden,
    OnnxEngine,
    RunControl,
    check_golden,
    load_golden,
    runtime_version,
)
from tests.models import (
    LENGTH,
    PROBABILITY,
    WINDOW,
    classifier,
    expected_probability,
    model,
    save,
    save_golden,
    window,
)


def load(tmp_path: Path, **options: object) -> OnnxEngine:
    save(classifier(**options), tmp_path / "model.onnx")
    engine = OnnxEngine.load(tmp_path / "model.onnx", name="wrist")
    engine.warm()
    return engine


def test_an_engine_answers_as_numpy_does_alone_and_in_a_batch(tmp_path: Path) -> None:
    engine = load(tmp_path)
    for rows in (1, 5):
        x = window(rows=rows)
        answer = engine.run({"window": x})
        np.testing.assert_allclose(answer["probability"], expected_probability(x), atol=1e-6)
        np.testing.assert_allclose(answer["ew_view_channels"], x.mean(axis=1), atol=1e-6)


def test_the_lane_and_a_plain_run_give_the_same_bits(tmp_path: Path) -> None:
    warmed = load(tmp_path)
    plain = OnnxEngine.load(tmp_path / "model.onnx")
    for seed in range(20):
        x = window(seed=seed)
        ours, theirs = warmed.run({"window": x}), plain.run({"window": x})
        assert ours["probability"].tobytes() == theirs["probability"].tobytes()


def test_answers_do_not_share_memory_with_later_runs(tmp_path: Path) -> None:
    engine = load(tmp_path)
    first = engine.run({"window": window(seed=1)})["probability"]
    kept = first.copy()
    engine.run({"window": window(3.0, seed=2)})
    np.testing.assert_array_equal(first, kept)


def test_inputs_of_any_memory_layout_are_read_rightly(tmp_path: Path) -> None:
    engine = load(tmp_path)
    x = np.asfortranarray(window())
    np.testing.assert_allclose(engine.run({"window": x})["probability"], expected_probability(x), atol=1e-6)


@pytest.mark.parametrize("warm", [0.0, 1.0])
def test_as_many_output_rows_as_there_is_something_to_say(tmp_path: Path, warm: float) -> None:
    nodes = [helper.make_node("NonZero", ["x"], ["found"]), helper.make_node("Transpose", ["found"], ["y"])]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 4])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.INT64, ["many", 2])]
    save(model(nodes, inputs, outputs, []), tmp_path / "model.onnx")
    engine = OnnxEngine.load(tmp_path / "model.onnx")
    engine.warm({"x": np.full((1, 4), warm, np.float32)})
    for x in ([0, 0, 0, 0], [1, 0, 0, 1], [1, 1, 1, 1], [0, 1, 0, 0]):
        answer = engine.run({"x": np.array([x], np.float32)})["y"]
        assert answer.tolist() == [[0, at] for at, value in enumerate(x) if value]


def test_a_subset_of_outputs_can_be_asked_for(tmp_path: Path) -> None:
    engine = load(tmp_path)
    for rows in (1, 2):
        assert list(engine.run({"window": window(rows=rows)}, ["probability"])) == ["probability"]


def test_two_threads_may_run_one_engine(tmp_path: Path) -> None:
    engine = load(tmp_path)
    worst = [0.0, 0.0, 0.0]

    def ask(seed: int) -> None:
        x = window(seed=seed)
        expected = expected_probability(x)
        for _ in range(300):
            difference = np.abs(engine.run({"window": x})["probability"] - expected).max()
            worst[seed] = max(worst[seed], float(difference))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(worst) < 1e-6


def test_an_engine_names_its_tensors_with_free_axes(tmp_path: Path) -> None:
    engine = load(tmp_path)
    assert engine.inputs == (WINDOW,)
    assert engine.outputs[0] == PROBABILITY
    assert engine.warm_us > 0
    assert runtime_version()[0].isdigit()


def test_a_run_that_raises_is_an_engine_failure(tmp_path: Path) -> None:
    engine = load(tmp_path, trouble="raise")
    with pytest.raises(EngineFailed, match="a run of engine 'wrist' failed"):
        engine.run({"window": window(200.0)})
    engine.run({"window": window()})


@pytest.mark.parametrize("rows", [1, 2])
def test_a_stuck_run_can_be_ended_and_the_engine_lives_on(tmp_path: Path, rows: int) -> None:
    engine = load(tmp_path, trouble="slow")
    control = RunControl()
    timer = threading.Timer(0.1, control.stop)
    timer.start()
    with pytest.raises(EngineFailed, match="was ended"):
        engine.run({"window": window(200.0, rows=rows)}, control=control)
    timer.join()
    assert control.stopped
    control.rearm()
    x = window(rows=rows)
    np.testing.assert_allclose(
        engine.run({"window": x}, control=control)["probability"], expected_probability(x), atol=1e-6
    )


def test_inputs_the_model_cannot_take_are_an_engine_failure(tmp_path: Path) -> None:
    engine = load(tmp_path)
    for feeds in ({}, {"window": window()[:, :5]}, {"window": window().astype(np.float64)}, {"other": window()}):
        with pytest.raises(EngineFailed):
            engine.run(feeds)


def test_an_engine_that_hangs_while_warming_is_given_up(tmp_path: Path) -> None:
    step = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Abs", ["state"], ["next"])],
        "step",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
    )
    endless = model(
        [helper.make_node("Loop", ["turns", "begin", "x"], ["y"], body=step)],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        [numpy_helper.from_array(np.array(2**60), "turns"), numpy_helper.from_array(np.array(True), "begin")],
    )
    save(endless, tmp_path / "model.onnx")
    engine = OnnxEngine.load(tmp_path / "model.onnx")
    with pytest.raises(EngineFailed, match="was ended"):
        engine.warm(limit_s=0.1)


def test_text_tensors_are_served(tmp_path: Path) -> None:
    copy = model(
        [helper.make_node("Identity", ["words"], ["same"])],
        [helper.make_tensor_value_info("words", TensorProto.STRING, ["n"])],
        [helper.make_tensor_value_info("same", TensorProto.STRING, ["n"])],
    )
    save(copy, tmp_path / "model.onnx")
    engine = OnnxEngine.load(tmp_path / "model.onnx")
    engine.warm()
    answer = engine.run({"words": np.array(["ä".encode(), b"b"], object)})
    assert list(answer["same"]) == ["ä", "b"]
    assert engine.inputs[0].datatype == "BYTES"


# --- what does not load --------------------------------------------------------------------------------------
def test_the_promised_digest_is_checked(tmp_path: Path) -> None:
    digest = save(classifier(), tmp_path / "model.onnx")
    OnnxEngine.load(tmp_path / "model.onnx", sha256=digest)
    with pytest.raises(Corrupt, match="promised digest"):
        OnnxEngine.load(tmp_path / "model.onnx", sha256="0" * 64)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08", b"\xff" * 100, b"\x3a\xff\xff\xff\xff\x0f"])
def test_other_bytes_are_no_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ArtifactError):
        OnnxEngine.load(tmp_path / "model.onnx")


def test_a_missing_file_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="No such file"):
        OnnxEngine.load(tmp_path / "model.onnx")


def test_custom_operators_are_refused_before_the_runtime_sees_them(tmp_path: Path) -> None:
    proto = classifier()
    proto.graph.node[0].domain = "com.evil"
    proto.opset_import.append(helper.make_opsetid("com.evil", 1))
    save(proto, tmp_path / "model.onnx")
    with pytest.raises(Incompatible, match=r"operators of 'com\.evil'"):
        OnnxEngine.load(tmp_path / "model.onnx")


def test_custom_operators_inside_a_branch_are_refused(tmp_path: Path) -> None:
    proto = classifier(trouble="raise")
    branch = next(node for node in proto.graph.node if node.op_type == "If").attribute[0]
    branch.g.node[0].domain = "com.evil"
    save(proto, tmp_path / "model.onnx")
    with pytest.raises(Incompatible, match=r"operators of 'com\.evil'"):
        OnnxEngine.load(tmp_path / "model.onnx")


def test_weights_outside_the_file_are_refused_even_if_they_are_there(tmp_path: Path) -> None:
    onnx.save_model(
        classifier(), tmp_path / "model.onnx", save_as_external_data=True, location="weights", size_threshold=0
    )
    assert (tmp_path / "weights").exists()
    with pytest.raises(Incompatible, match="keeps weights outside"):
        OnnxEngine.load(tmp_path / "model.onnx")


def test_external_data_of_a_constant_node_are_refused(tmp_path: Path) -> None:
    tensor = numpy_helper.from_array(np.zeros(2, np.float32), "value")
    tensor.ClearField("raw_data")
    tensor.external_data.add(key="location", value="/etc/passwd")
    tensor.data_location = TensorProto.EXTERNAL
    proto = model(
        [helper.make_node("Constant", [], ["y"], value=tensor)],
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
    )
    save(proto, tmp_path / "model.onnx")
    with pytest.raises(Incompatible, match="keeps weights outside"):
        OnnxEngine.load(tmp_path / "model.onnx")


def test_deeply_nested_graphs_are_refused(tmp_path: Path) -> None:
    graph = helper.make_graph([], "leaf", [], [])
    for _ in range(30):
        graph = helper.make_graph(
            [helper.make_node("If", ["c"], ["y"], then_branch=graph, else_branch=graph)], "g", [], []
        )
        if graph.ByteSize() > 1_000_000:  # two branches double the size each time: twelve levels are enough
            break
    save(helper.make_model(graph), tmp_path / "model.onnx")
    with pytest.raises(ArtifactError):
        OnnxEngine.load(tmp_path / "model.onnx")


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_a_damaged_file_loads_or_is_refused_but_never_worse(
    tmp_path_factory: pytest.TempPathFactory, place: float, value: int
) -> None:
    raw = bytearray(classifier().SerializeToString())
    raw[int(place * len(raw))] = value
    path = tmp_path_factory.mktemp("damaged") / "model.onnx"
    path.write_bytes(raw)
    try:
        OnnxEngine.load(path).warm(limit_s=5)
    except (ArtifactError, EngineFailed):
        return


# --- floor ---------------------------------------------------------------------------------------------------
def test_the_floor_repeats_its_constant_for_every_row() -> None:
    floor = FloorEngine({"probability": [0.1, 0.2, 0.3, 0.4]}, (WINDOW,), (PROBABILITY,))
    answer = floor.run({"window": window(rows=3)})
    assert answer["probability"].dtype == np.float32
    np.testing.assert_allclose(answer["probability"], [[0.1, 0.2, 0.3, 0.4]] * 3)


def test_the_floor_counts_rows_along_the_free_first_axis_in_whatever_order_inputs_come() -> None:
    inputs = (TensorPlan("state", "FP32", (2, -1, 4)), TensorPlan("window", "FP32", (-1, 3)))
    floor = FloorEngine({"probability": [0.5, 0.5]}, inputs, (TensorPlan("probability", "FP32", (-1, 2)),))
    feeds = {"state": np.zeros((2, 5, 4), np.float32), "window": np.zeros((5, 3), np.float32)}
    assert floor.run(feeds)["probability"].shape == (5, 2)


def test_the_floor_keeps_the_shape_of_a_row() -> None:
    floor = FloorEngine({"y": [1, 2, 3, 4]}, (WINDOW,), (TensorPlan("y", "INT64", (-1, 2, 2)),))
    assert floor.run({"window": window(rows=2)}, ["y"])["y"].tolist() == [[[1, 2], [3, 4]]] * 2


@pytest.mark.parametrize("rows", [{}, {"probability": [0.5, 0.5]}])
def test_a_floor_without_its_constant_is_corrupt(rows: dict[str, list[float]]) -> None:
    with pytest.raises(Corrupt, match="no constant"):
        FloorEngine(rows, (WINDOW,), (PROBABILITY,))


# --- golden inputs -------------------------------------------------------------------------------------------
def test_golden_inputs_answered_rightly_pass(tmp_path: Path) -> None:
    save_golden(tmp_path / "golden.npz")
    result = check_golden(load(tmp_path), load_golden(tmp_path / "golden.npz"))
    assert result.passed
    assert result.difference < 1e-6


def test_golden_inputs_answered_wrongly_are_told_with_the_difference(tmp_path: Path) -> None:
    save_golden(tmp_path / "golden.npz", wrong=0.25)
    result = check_golden(load(tmp_path), load_golden(tmp_path / "golden.npz"))
    assert not result.passed
    assert result.difference == pytest.approx(0.25, abs=1e-5)
    assert "0.25 off, allowed is 1e-05" in result.text


def test_golden_answers_that_are_not_finite_or_misshapen_do_not_pass(tmp_path: Path) -> None:
    engine = load(tmp_path, trouble="nan")
    x = window(200.0)
    nan = check_golden(engine, Golden({"window": x}, {"probability": np.zeros((1, 4), np.float32)}, 1.0))
    assert (nan.passed, nan.difference) == (False, float("inf"))
    wide = check_golden(engine, Golden({"window": window()}, {"probability": np.zeros((1, 5), np.float32)}, 1.0))
    assert not wide.passed
    assert "shape" in wide.text


def test_golden_inputs_that_are_no_rows_are_one_request() -> None:
    scalar, state = np.array(3, np.int64), np.zeros((2, 1, 5), np.float32)
    golden = Golden({"rate": scalar, "state": state}, {"next": state}, 0.0)
    inputs = (TensorPlan("rate", "INT64", ()), TensorPlan("state", "FP32", (2, -1, 5)))
    assert list(golden.pieces(inputs)) == [(golden.inputs, golden.outputs)]
    assert golden.first(inputs) is golden.inputs


def test_golden_inputs_that_are_rows_are_asked_one_by_one() -> None:
    x = window(rows=3)
    golden = Golden({"window": x}, {"probability": expected_probability(x)}, 0.0)
    pieces = list(golden.pieces((TensorPlan("window", "FP32", (-1, LENGTH, 3)),)))
    assert [feeds["window"].tolist() for feeds, _ in pieces] == [x[row : row + 1].tolist() for row in range(3)]


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"in_window": np.zeros((1, LENGTH, 3)), "out_probability": np.zeros((1, 4))},
        {"in_window": np.zeros((1, LENGTH, 3)), "tolerance": np.array(0.1)},
        {"in_window": np.zeros((0, LENGTH, 3)), "out_probability": np.zeros((0, 4)), "tolerance": np.array(0.1)},
        {"in_window": np.zeros(1), "out_probability": np.zeros(1), "tolerance": np.array(float("nan"))},
        {"in_window": np.array([None]), "out_probability": np.zeros(1), "tolerance": np.array(0.1)},
    ],
)
def test_incomplete_or_pickled_golden_inputs_are_corrupt(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(tmp_path / "golden.npz", **arrays)
    with pytest.raises(Corrupt, match="golden inputs"):
        load_golden(tmp_path / "golden.npz")


def test_other_files_are_no_golden_inputs(tmp_path: Path) -> None:
    (tmp_path / "golden.npz").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(Corrupt):
        load_golden(tmp_path / "golden.npz")
    with pytest.raises(Corrupt, match="No such file"):
        load_golden(tmp_path / "missing.npz")


@pytest.mark.parametrize("members", [1, 3])
def test_golden_inputs_that_unpack_to_more_than_the_limit_are_refused_unread(tmp_path: Path, members: int) -> None:
    megabytes = [b"\0" * (1 << 20)] * (MAX_GOLDEN_BYTES // members // (1 << 20) + 1)
    with zipfile.ZipFile(tmp_path / "golden.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(members):
            with archive.open(f"in_{number}.npy", "w") as member:
                member.writelines(megabytes)
    assert (tmp_path / "golden.npz").stat().st_size < 1 << 20
    with pytest.raises(TooLarge, match="unpacks to"):
        load_golden(tmp_path / "golden.npz")


def test_a_golden_array_that_announces_more_than_memory_holds_is_corrupt(tmp_path: Path) -> None:
    head = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000,), }"
    head = head.ljust(117) + b"\n"
    with zipfile.ZipFile(tmp_path / "golden.npz", "w") as archive:
        archive.writestr("in_x.npy", b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head)
    with pytest.raises(Corrupt):
        load_golden(tmp_path / "golden.npz")


def test_golden_inputs_have_a_size_limit(tmp_path: Path) -> None:
    with (tmp_path / "golden.npz").open("wb") as file:
        file.truncate(MAX_GOLDEN_BYTES + 1)
    with pytest.raises(TooLarge):
        load_golden(tmp_path / "golden.npz")


def test_the_runtime_keeps_and_reports_nothing_about_this_device(tmp_path: Path) -> None:
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    home.mkdir()
    scratch.mkdir()
    model = tmp_path / "model.onnx"
    save(classifier(), model)
    program = (
        f"from pathlib import Path; from agent.engine import OnnxEngine as E; E.load(Path({str(model)!r})).warm()"
    )
    environment = {
        "HOME": str(home),
        "TMPDIR": str(scratch),
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(Path.cwd()),
    }
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
    assert list(home.rglob("*")) == []
    assert list(scratch.iterdir()) == []
