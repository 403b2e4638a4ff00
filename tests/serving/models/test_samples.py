"""The samples of `model_warmup`: what they hold, how often they run, and what does not fit."""

import numpy as np
import pytest
from google.protobuf import text_format

from protos.model_config_pb2 import ModelConfig
from serving.errors import LoadError, TransientLoadError
from serving.models.samples import read_samples, run_samples
from serving.models.spec import ModelSpec, to_spec
from tests.serving.models.recording_backend import RecordingBackend, double

TENSOR = 'input { name: "x" data_type: %s dims: %s } output { name: "y" data_type: %s dims: %s } max_batch_size: %d '


def spec_of(samples: str, kind: str = "TYPE_FP32", dims: str = "[ 2 ]", max_batch_size: int = 4) -> ModelSpec:
    return to_spec(
        text_format.Parse(TENSOR % (kind, dims, kind, dims, max_batch_size) + samples, ModelConfig(name="m"))
    )


def sample(source: str, kind: str = "TYPE_FP32", dims: str = "[ 2 ]", rest: str = 'name: "w"') -> str:
    return f'model_warmup {{ {rest} inputs {{ key: "x" value {{ data_type: {kind} dims: {dims} {source} }} }} }}'


@pytest.mark.parametrize("kind", ["FP32", "FP16", "INT8", "UINT64", "BOOL"])
def test_zeros_and_random_numbers_have_the_shape_and_type_of_a_batch(tmp_path, kind):
    name = f"TYPE_{kind}"
    rest = 'name: "w" batch_size: 3 count: 2'
    samples = sample("zero_data: true", name, rest=rest) + sample("random_data: true", name, "[ 64 ]")
    zeros, random = read_samples(tmp_path, spec_of(samples, name, "[ -1 ]"))
    assert (zeros.rows, zeros.count, random.rows, random.count) == (3, 2, 1, 1)
    assert not zeros.inputs[0].any()
    assert zeros.inputs[0].shape == (3, 2)
    assert random.inputs[0].shape == (1, 64)
    assert zeros.inputs[0].dtype == random.inputs[0].dtype
    assert len(np.unique(random.inputs[0])) > 1


def test_a_file_holds_one_row_which_fills_the_batch(tmp_path):
    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup" / "x.bin").write_bytes(np.array([5, 7], np.float32).tobytes())
    source = 'input_data_file: "x.bin"'
    (one,) = read_samples(tmp_path, spec_of(sample(source, rest="batch_size: 2")))
    np.testing.assert_array_equal(one.inputs[0], [[5, 7], [5, 7]])
    (whole,) = read_samples(tmp_path, spec_of(sample(source), max_batch_size=0))
    assert (whole.rows, whole.inputs[0].tolist()) == (None, [5, 7])
    (tmp_path / "warmup" / "x.bin").write_bytes(b"\x02\0\0\0ab\0\0\0\0")
    (strings,) = read_samples(tmp_path, spec_of(sample(source, "TYPE_STRING"), "TYPE_STRING"))
    assert strings.inputs[0].tolist() == [[b"ab", b""]]
    (empty,) = read_samples(tmp_path, spec_of(sample("random_data: true", "TYPE_STRING"), "TYPE_STRING"))
    assert empty.inputs[0].tolist() == [[b"", b""]]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (sample("zero_data: true", dims="[ 3 ]"), r"input 'x' is TYPE_FP32 of dims \[2\], got TYPE_FP32 of dims \[3\]"),
        (sample("zero_data: true", "TYPE_INT8"), r"input 'x' is TYPE_FP32 of dims \[2\], got TYPE_INT8 of dims \[2\]"),
        (sample("zero_data: true", dims="[ -1 ]"), r"got TYPE_FP32 of dims \[-1\]"),
        (sample(""), "input 'x' needs zero_data, random_data or input_data_file"),
        (sample("zero_data: true", rest='name: "w" batch_size: 5'), "batch_size must be between 1 and 4, got 5"),
        ('model_warmup { name: "w" }', "expected the inputs x, got none"),
        (sample('input_data_file: "gone"'), "warmup/gone does not exist"),
        (sample('input_data_file: "../config.pbtxt"'), "'input_data_file' must stay in its folder"),
        (sample('input_data_file: "short"'), r"warmup/short does not hold FP32 of shape \[1, 2\]"),
    ],
)
def test_a_sample_that_does_not_fit_is_named(tmp_path, text, reason):
    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup" / "short").write_bytes(b"1234")
    with pytest.raises(LoadError, match=f"^model_warmup 'w': .*{reason}"):
        read_samples(tmp_path, spec_of(text))


def test_samples_run_as_often_as_they_say_and_a_failure_names_them(tmp_path):
    spec = spec_of(
        sample("zero_data: true", rest='name: "a" count: 3') + sample("zero_data: true", rest="batch_size: 4")
    )
    samples = read_samples(tmp_path, spec)
    backend = RecordingBackend(spec, double)
    assert run_samples(backend, spec, samples) > 0
    assert backend.shapes == [(1, 2)] * 3 + [(4, 2)]
    with pytest.raises(TransientLoadError, match=r"^model_warmup 'a': the model fails on a batch of 1 rows: boom"):
        run_samples(RecordingBackend(spec, _fail), spec, samples)
    assert run_samples(backend, spec, []) == 0


def _fail(x):
    raise RuntimeError("boom")
