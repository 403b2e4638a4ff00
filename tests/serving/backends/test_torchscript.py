"""TorchScript models: inputs are matched to arguments, results to outputs."""

import contextlib
import warnings
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from google.protobuf import text_format

from protos.model_config_pb2 import ModelConfig
from serving.backends import torchscript
from serving.backends.torch_instance import TorchInstance
from serving.errors import LoadError
from serving.models.devices import CudaUnavailable, count_gpus
from serving.models.spec import to_spec


class Two(torch.nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return a + b, a - b


class Double(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float() * 2


class Named(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"negative": -x, "same": x}


Pair = namedtuple("Pair", ["first", "second"])


class PairOf(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> Pair:
        return Pair(x.t().t() + 1, x + 2)


def config(inputs: str, outputs: str, kind: str = "TYPE_FP32") -> str:
    sides = (("input", inputs), ("output", outputs))
    tensors = [
        f'{side} {{ name: "{name}" data_type: {kind} dims: 2 }}' for side, all_ in sides for name in all_.split()
    ]
    return f"max_batch_size: 4 {' '.join(tensors)}"


@pytest.fixture
def load(tmp_path):
    def load_module(module: torch.nn.Module, text: str) -> TorchInstance:
        file = tmp_path / "model.pt"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated
            torch.jit.script(module).save(file)
        return torchscript.load(file, to_spec(text_format.Parse(text, ModelConfig())), None, 1)

    return load_module


def test_a_gpu_that_torch_cannot_use_raises_cuda_unavailable(tmp_path, monkeypatch) -> None:
    """The loader then falls back to the CPU, unless a GPU is required."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    spec = to_spec(text_format.Parse(config("x", "y"), ModelConfig()))
    with pytest.raises(CudaUnavailable, match="this torch cannot use CUDA"):
        torchscript.load(tmp_path / "model.pt", spec, 0, 1)


A = np.array([[10, 20]], np.float32)
B = np.array([[1, 2]], np.float32)


@pytest.mark.parametrize(
    ("inputs", "outputs", "given", "expected"),
    [
        ("b a", "sum difference", [B, A], [[11, 22], [9, 18]]),
        ("INPUT__1 INPUT__0", "OUTPUT__1 OUTPUT__0", [B, A], [[9, 18], [11, 22]]),
        ("a b", "OUTPUT__1", [A, B], [[9, 18]]),
        ("a b", "sum", [A, B], [[11, 22]]),
    ],
)
def test_names_are_matched_to_arguments_and_results(load, inputs, outputs, given, expected):
    backend = load(Two(), config(inputs, outputs))
    assert [answer[0].tolist() for answer in backend.run(given)] == expected


def test_a_single_input_may_have_any_name_and_be_read_only(load):
    text = config("whatever", "y").replace("TYPE_FP32", "TYPE_UINT8", 1)
    backend = load(Double(), text)
    (answer,) = backend.run([np.frombuffer(b"\x01\x02\xff\x04", np.uint8).reshape(2, 2)])
    assert (answer.dtype, answer.tolist()) == (np.float32, [[2, 4], [510, 8]])


@pytest.mark.parametrize(("module", "outputs"), [(Named(), "negative"), (PairOf(), "second first")])
def test_named_results_are_selected_by_name(load, module, outputs):
    answers = load(module, config("x", outputs)).run([A])
    expected = {"negative": [[-10, -20]], "second": [[12, 22]], "first": [[11, 21]]}
    assert [answer.tolist() for answer in answers] == [expected[name] for name in outputs.split()]
    assert all(answer.flags.c_contiguous for answer in answers)


@pytest.mark.parametrize(
    ("inputs", "outputs", "reason"),
    [
        ("a", "y", r"the configuration has 1 inputs, but the model takes \['a', 'b'\]"),
        ("a c", "y", r"inputs \['a', 'c'\] are neither the model's arguments \['a', 'b'\] nor numbered"),
        ("I__0 I__2", "y", "nor numbered"),
    ],
)
def test_inputs_without_matching_argument_are_rejected(load, inputs, outputs, reason):
    with pytest.raises(LoadError, match=reason):
        load(Two(), config(inputs, outputs))


@pytest.mark.parametrize(
    ("module", "outputs", "reason"),
    [
        (Named(), "positive", r"returns \['negative', 'same'\], but not 'positive'"),
        (Double(), "y z", r"returns 1 tensors, but the configuration has outputs \['y', 'z'\]"),
        (Double(), "OUTPUT__3", "returns 1 tensors"),
    ],
)
def test_missing_results_are_named_by_the_first_run(load, module, outputs, reason):
    backend = load(module, config("x", outputs))
    with pytest.raises(ValueError, match=reason):
        backend.run([A])


@pytest.fixture
def pretend_gpu(monkeypatch):
    """Lets a backend on the CPU take the path of a GPU, without page-locked memory. Lists when it synchronises."""
    synchronised = []
    empty = torch.empty

    def unpinned(*shape, pin_memory=False, **options):
        assert pin_memory
        return empty(*shape, **options)

    def pretend(backend):
        backend._stream = SimpleNamespace(synchronize=lambda: synchronised.append(True))
        return synchronised

    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return pretend


@pytest.mark.parametrize(
    ("module", "inputs", "outputs", "given"),
    [
        (Two(), "b a", "sum difference", [B, A]),
        (PairOf(), "x", "second first", [A]),
        (Named(), "x", "negative", [np.frombuffer(A.tobytes(), np.float32).reshape(1, 2)]),
    ],
)
def test_the_path_of_a_gpu_gives_the_same_outputs(load, pretend_gpu, module, inputs, outputs, given):
    backend = load(module, config(inputs, outputs))
    expected = backend.run(given)
    synchronised = pretend_gpu(backend)
    answers = backend.run(given)
    assert [answer.tolist() for answer in answers] == [answer.tolist() for answer in expected]
    assert [answer.dtype for answer in answers] == [answer.dtype for answer in expected]
    assert all(answer.flags.c_contiguous for answer in answers)
    assert synchronised == [True]
    before = [answer.copy() for answer in answers]
    backend.run([array + 1 for array in given])
    assert [answer.tolist() for answer in answers] == [answer.tolist() for answer in before], "the caller may keep them"


@pytest.mark.gpu
@pytest.mark.skipif(count_gpus() == 0, reason="needs a CUDA device")
def test_the_instances_of_a_gpu_have_streams_of_their_own(tmp_path):
    file = tmp_path / "model.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Two()).save(file)
    spec = to_spec(text_format.Parse(config("a b", "sum difference"), ModelConfig()))
    one, other = (torchscript.load(file, spec, 0, 1) for _ in range(2))
    assert one._stream != other._stream != torch.cuda.default_stream()
    assert [answer.tolist() for answer in one.run([A, B])] == [[[11, 22]], [[9, 18]]]
    assert [answer.tolist() for answer in other.run([B, A])] == [[[11, 22]], [[-9, -18]]]


def test_strings_are_rejected(load):
    with pytest.raises(LoadError, match="torch's models have no strings, but 'x' is TYPE_STRING"):
        load(Double(), config("x", "y", "TYPE_STRING"))


def test_a_damaged_file_is_reported_in_one_line(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"no model")
    with pytest.raises(LoadError, match=r"^torch cannot load model\.pt: .+") as caught:
        torchscript.load(tmp_path / "model.pt", to_spec(text_format.Parse(config("x", "y"), ModelConfig())), None, 1)
    assert "\n" not in str(caught.value)


def test_threads_are_limited(load):
    before = torch.get_num_threads()
    try:
        load(Double(), config("x", "y"))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
