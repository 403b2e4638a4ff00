"""ONNX models run as configured; configurations that do not match the model are rejected."""

import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper
from onnxruntime import get_available_providers

from protos.model_config_pb2 import ModelConfig
from serving.backends import onnx
from serving.errors import LoadError
from serving.models.autocomplete import complete_tensors
from serving.models.devices import count_gpus
from serving.models.spec import to_spec
from serving.protocol.tensors import DATATYPES
from tests.serving.model_files import (
    SCALE_CONFIG,
    add_without_batch,
    classifier,
    echo_strings,
    onnx_model,
    scale,
    sum_and_difference,
)


@pytest.fixture
def model_file(tmp_path):
    def write(content: bytes):
        (tmp_path / "model.onnx").write_bytes(content)
        return tmp_path / "model.onnx"

    return write


def load(file, text: str = ""):
    """Opens an instance on the CPU; the file completes the configuration."""
    config = text_format.Parse(text, ModelConfig())
    complete_tensors(config, *onnx.describe(file))
    return onnx.load(file, to_spec(config), None, 1)


def load_bound(file):
    """Opens an instance that binds inputs and outputs, as on a GPU."""
    inputs, outputs = onnx.describe(file)
    return onnx.OnnxBackend(load(file)._session, SimpleNamespace(inputs=inputs, outputs=outputs), binds=True)


def test_a_read_only_uint8_input_gives_two_outputs(model_file):
    backend = load(model_file(classifier()))
    images = np.frombuffer(bytes(range(12)), np.uint8).reshape(3, 1, 2, 2)
    logits, probabilities = backend.run([images])
    assert (logits.shape, logits.dtype, probabilities.shape) == ((3, 3), np.float32, (3, 3))
    assert logits.flags.c_contiguous
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(backend.run([images[:1]])[0], logits[:1], atol=1e-6)


def test_tensors_follow_the_configuration_s_order_and_names(model_file):
    backend = load(
        model_file(sum_and_difference()),
        """
        max_batch_size: 8
        input { name: "b" data_type: TYPE_INT64 dims: 2 } input { name: "a" data_type: TYPE_INT64 dims: 2 }
        output { name: "difference" data_type: TYPE_INT64 dims: 2 } output { name: "sum" data_type: TYPE_INT64 dims: 2 }
        """,
    )
    b, a = np.array([[1, 2]]), np.array([[10, 20]])
    difference, total = backend.run([b, a])
    assert (difference.tolist(), total.tolist()) == ([[9, 18]], [[11, 22]])


def test_a_model_without_batch_dimension(model_file):
    backend = load(model_file(add_without_batch()))
    (answer,) = backend.run([np.ones((2, 3), np.float32)])
    assert answer.tolist() == [[2.0] * 3] * 2


def test_strings_are_utf_8_and_invalid_bytes_are_replaced(model_file):
    backend = load(model_file(echo_strings()))
    given = np.array([["é".encode(), b""], [b"a\0b", b"\xff"]], object)
    (answer,) = backend.run([given])
    assert answer.tolist() == [["é", ""], ["a\0b", "\N{REPLACEMENT CHARACTER}"]]


def test_an_error_of_the_model_is_raised_and_the_next_batch_runs(model_file):
    backend = load(model_file(scale(2)))
    with pytest.raises(Exception, match="invalid dimensions"):
        backend.run([np.ones((1, 4), np.float32)])
    assert backend.run([np.ones((1, 3), np.float32)])[0].tolist() == [[2.0] * 3]


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_bound_inputs_and_outputs_give_the_same_outputs(model_file, rows):
    """IOBinding, which instances on GPUs use, also for read-only inputs and batches of different sizes."""
    file = model_file(classifier())
    plain, bound = load(file), load_bound(file)
    images = np.frombuffer(bytes(range(4 * rows)), np.uint8).reshape(rows, 1, 2, 2)
    answers = bound.run([images])
    for ours, expected in zip(answers, plain.run([images]), strict=True):
        assert (ours.dtype, ours.tolist()) == (expected.dtype, expected.tolist())
        assert ours.flags.c_contiguous
    before = [answer.copy() for answer in answers]
    bound.run([images[::-1].copy()])
    assert [answer.tolist() for answer in answers] == [answer.tolist() for answer in before], "the caller may keep them"


def test_a_failed_batch_of_bound_inputs_raises(model_file):
    bound = load_bound(model_file(scale(2)))
    with pytest.raises(Exception, match="invalid dimensions"):
        bound.run([np.ones((1, 4), np.float32)])
    assert bound.run([np.ones((1, 3), np.float32)])[0].tolist() == [[2.0] * 3]


def test_strings_are_not_bound(model_file):
    bound = load_bound(model_file(echo_strings()))
    assert bound.run([np.array([[b"a", b"\xff"]], object)])[0].tolist() == [["a", "\N{REPLACEMENT CHARACTER}"]]


def test_onnx_runtime_does_not_change_the_device_by_itself(model_file):
    assert not onnx._open(model_file(scale(2)), None, 1)._enable_fallback


def test_describe_returns_minus_one_for_open_sizes(model_file):
    inputs, outputs = onnx.describe(model_file(classifier()))
    assert [(spec.name, spec.datatype.name, spec.shape) for spec in (*inputs, *outputs)] == [
        ("images", "UINT8", (-1, 1, 2, 2)),
        ("logits", "FP32", (-1, 3)),
        ("probabilities", "FP32", (-1, 3)),
    ]


def test_every_datatype_of_the_protocol_has_an_onnx_type():
    assert set(onnx._ELEMENT_TYPES.values()) == set(DATATYPES)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (SCALE_CONFIG.replace('"x"', '"z"'), "the configuration has input 'z', but the model has 'x'"),
        (SCALE_CONFIG.replace('"y"', '"z"'), "the configuration has output 'z', but the model has 'y'"),
        (
            SCALE_CONFIG.replace("TYPE_FP32", "TYPE_FP64", 1),
            "input 'x' is FP64 in the configuration and FP32 in the model",
        ),
        (SCALE_CONFIG.replace("[ 3 ]", "[ 4 ]"), r"input 'x' has shape \[-1, 4\].* and \[-1, 3\] in the model"),
        (SCALE_CONFIG.replace("[ 3 ]", "[ -1 ]"), r"input 'x' has shape \[-1, -1\].* and \[-1, 3\] in the model"),
        (SCALE_CONFIG.replace("max_batch_size: 4", ""), r"input 'x' has shape \[3\].* and \[-1, 3\] in the model"),
    ],
)
def test_a_configuration_that_does_not_match_the_model_is_rejected(model_file, text, reason):
    with pytest.raises(LoadError, match=reason):
        load(model_file(scale(2)), text)


def test_a_fixed_batch_size_in_the_model_is_rejected(model_file):
    with pytest.raises(LoadError, match=r"input 'x' has shape \[-1, 3\].* and \[1, 3\] in the model"):
        load(model_file(scale(2, batch=1)), SCALE_CONFIG)


def test_an_input_missing_from_the_configuration_is_named(model_file):
    text = 'max_batch_size: 8 input { name: "a" data_type: TYPE_INT64 dims: 2 }'
    with pytest.raises(LoadError, match="the model has input 'b', which the configuration does not list"):
        load(model_file(sum_and_difference()), text)


@pytest.mark.parametrize("content", [b"", b"no model", scale(2)[:40]])
def test_a_damaged_file_is_reported_in_one_line(model_file, content):
    with pytest.raises(LoadError, match=r"^ONNX Runtime cannot load model\.onnx: .+") as caught:
        onnx.describe(model_file(content))
    assert "\n" not in str(caught.value)


def test_a_shape_of_unknown_rank_must_be_configured(model_file):
    reshape = onnx_model(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        [("x", TensorProto.FLOAT, ["N", 2]), ("shape", TensorProto.INT64, ["k"])],
        [("y", TensorProto.FLOAT, None)],
    )
    with pytest.raises(LoadError, match="does not define how many dimensions 'y' has"):
        onnx.describe(model_file(reshape))


def test_threads_are_limited_and_do_not_spin(model_file):
    session = onnx._open(model_file(scale(2)), None, 3)
    options = session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert session.get_providers() == ["CPUExecutionProvider"]


def test_run_releases_the_gil(model_file):
    """A batch that computes must not block the front ends."""
    nodes = [helper.make_node("MatMul", ["x" if n == 0 else f"h{n}", "w"], [f"h{n + 1}"]) for n in range(20)]
    size = 700
    heavy = onnx_model(
        nodes,
        [("x", TensorProto.FLOAT, ["N", size])],
        [("h20", TensorProto.FLOAT, ["N", size])],
        {"w": np.full((size, size), 1e-3, np.float32)},
    )
    backend = load(model_file(heavy))
    batch = np.ones((64, size), np.float32)
    began, done = threading.Event(), threading.Event()

    def run() -> None:
        began.set()
        backend.run([batch])
        done.set()

    thread = threading.Thread(target=run)
    thread.start()
    began.wait()
    steps = 0
    while not done.is_set():
        steps += 1
    thread.join()
    assert steps > 0


def test_a_server_of_onnx_models_never_loads_torch():
    code = "import sys, serving.models.repository; from serving.backends import onnx; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(count_gpus() == 0, reason="needs a CUDA device")
@pytest.mark.skipif("CUDAExecutionProvider" not in get_available_providers(), reason="needs onnxruntime-gpu")
def test_the_gpu_gives_the_same_outputs(model_file):
    file = model_file(classifier())
    config = ModelConfig()
    complete_tensors(config, *onnx.describe(file))
    on_gpu, on_cpu = (onnx.load(file, to_spec(config), gpu, 1) for gpu in (0, None))
    images = np.random.default_rng(0).integers(0, 256, (17, 1, 2, 2)).astype(np.uint8)
    for gpu, cpu in zip(on_gpu.run([images]), on_cpu.run([images]), strict=True):
        np.testing.assert_allclose(gpu, cpu, atol=1e-4)
