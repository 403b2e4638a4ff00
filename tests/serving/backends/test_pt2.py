"""Models of torch.export answer as the module that was exported; compiled packages do, too."""

import shutil
import warnings
import zipfile

import numpy as np
import pytest
import torch
from google.protobuf import text_format

from protos.model_config_pb2 import ModelConfig
from serving.backends import pt2
from serving.errors import LoadError
from serving.models.devices import count_gpus
from serving.models.spec import to_spec

A, B = (np.array(rows, np.float32) for rows in ([[1, 2], [3, 4], [5, 6]], [[10, 20], [30, 40], [50, 60]]))


QUICK = {"aot_inductor.precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0"}
"""Halves the time that the compiler takes."""


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return a + b, self.factor * a - b


class Named(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"negative": -x, "same": x * 1}


def config(inputs, outputs):
    tensors = [f'input {{ name: "{name}" data_type: TYPE_FP32 dims: 2 }}' for name in inputs]
    tensors += [f'output {{ name: "{name}" data_type: TYPE_FP32 dims: 2 }}' for name in outputs]
    return to_spec(text_format.Parse(f"max_batch_size: 4 {' '.join(tensors)}", ModelConfig()))


def program(module, num_inputs):
    examples = tuple(torch.zeros(2, 2) for _ in range(num_inputs))
    return torch.export.export(module, examples, dynamic_shapes=({0: torch.export.Dim("batch")},) * num_inputs)


def save(module, num_inputs, folder):
    file = folder / "model.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program(module, num_inputs), file)
    return file


def test_inputs_are_matched_by_the_names_of_the_arguments(tmp_path):
    """One test, because the first export of a process imports for seconds."""
    file = save(Two(), 2, tmp_path)
    with pytest.raises(LoadError, match=r"neither the model's arguments \['a', 'b'\] nor numbered"):
        pt2.load(file, config(["x", "y"], ["sum", "difference"]), None, 1)
    instance = pt2.load(file, config(["b", "a"], ["sum", "difference"]), None, 1)
    for rows in (3, 1):
        total, difference = instance.run([B[:rows], A[:rows]])
        np.testing.assert_array_equal(total, (A + B)[:rows])
        np.testing.assert_array_equal(difference, (3 * A - B)[:rows])


@pytest.mark.minutes
def test_outputs_are_matched_by_the_keys_of_a_dictionary(tmp_path):
    instance = pt2.load(save(Named(), 1, tmp_path), config(["x"], ["same", "negative"]), None, 1)
    same, negative = instance.run([A])
    np.testing.assert_array_equal(same, A)
    np.testing.assert_array_equal(negative, -A)
    assert negative.flags.c_contiguous


def test_other_files_are_rejected(tmp_path):
    file = tmp_path / "model.pt2"
    file.write_bytes(b"no archive")
    with pytest.raises(LoadError, match=r"torch cannot load model\.pt2: File is not a zip file"):
        pt2.load(file, config(["a", "b"], ["sum", "difference"]), None, 1)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("other", "")
    with pytest.raises(LoadError, match=r"torch cannot load model\.pt2: "):
        pt2.load(file, config(["a", "b"], ["sum", "difference"]), None, 1)


@pytest.mark.minutes
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_package_of_aotinductor_answers(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch._inductor.aoti_compile_and_package(
            program(Two(), 2), package_path=str(tmp_path / "model.pt2"), inductor_configs=QUICK
        )
    instance = pt2.load(tmp_path / "model.pt2", config(["B__1", "A__0"], ["SUM__0", "DIFFERENCE__1"]), None, 1)
    for rows in (3, 2, 1):
        total, difference = instance.run([B[:rows], A[:rows]])
        np.testing.assert_allclose(total, (A + B)[:rows])
        np.testing.assert_allclose(difference, (3 * A - B)[:rows])


@pytest.mark.gpu
@pytest.mark.skipif(count_gpus() == 0, reason="needs a CUDA device")
def test_a_program_of_the_cpu_answers_on_a_gpu(tmp_path):
    instance = pt2.load(save(Two(), 2, tmp_path), config(["a", "b"], ["sum", "difference"]), 0, 1)
    total, difference = instance.run([A, B])
    np.testing.assert_allclose(total, A + B)
    np.testing.assert_allclose(difference, 3 * A - B)
