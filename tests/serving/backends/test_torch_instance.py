"""Both backends of torch compute in float32, whatever this process or the environment had set."""

import warnings

import numpy as np
import pytest
import torch
from google.protobuf import text_format

from protos.model_config_pb2 import ModelConfig
from serving.backends import pt2, torchscript
from serving.backends.torch_instance import open_device
from serving.models.devices import count_gpus
from serving.models.spec import to_spec

SPEC = to_spec(
    text_format.Parse(
        """
        max_batch_size: 8
        input { name: "images" data_type: TYPE_FP32 dims: [3, 16, 16] }
        output { name: "logits" data_type: TYPE_FP32 dims: 10 }
        """,
        ModelConfig(),
    )
)


class Net(torch.nn.Module):
    """A convolution and a matrix product, whose outputs are about 1."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.filters = torch.nn.Parameter(torch.randn(32, 3, 3, 3, generator=generator) / 5)
        self.head = torch.nn.Parameter(torch.randn(32 * 14 * 14, 10, generator=generator) / 80)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(images, self.filters).relu().flatten(1) @ self.head


def saved(net, backend, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if backend is torchscript:
            torch.jit.script(net).save(folder / "model.pt")
            return folder / "model.pt"
        shapes = ({0: torch.export.Dim("batch")},)
        torch.export.save(
            torch.export.export(net, (torch.zeros(2, 3, 16, 16),), dynamic_shapes=shapes), file := folder / "model.pt2"
        )
        return file


def older_settings() -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True


def newer_settings() -> None:
    torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "tf32"


def bfloat16_on_cpus() -> None:
    torch.set_float32_matmul_precision("medium")


@pytest.mark.parametrize("allow", [older_settings, newer_settings, bfloat16_on_cpus])
def test_a_load_forbids_tf32(allow) -> None:
    allow()
    open_device(SPEC, None, 1)
    backends = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    assert [each.fp32_precision for each in (*backends, torch.backends.mkldnn.matmul)] == ["ieee"] * 4
    assert not torch.backends.cudnn.allow_tf32  # raises an error where older and newer settings disagree
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.gpu
@pytest.mark.skipif(count_gpus() == 0, reason="needs a CUDA device")
@pytest.mark.parametrize("backend", [torchscript, pt2])
def test_a_gpu_computes_in_float32(backend, tmp_path):
    net = Net()
    images = np.random.default_rng(0).standard_normal((8, 3, 16, 16), np.float32)
    with torch.inference_mode():
        expected = net.double()(torch.from_numpy(images).double()).numpy()
    file = saved(Net(), backend, tmp_path)
    older_settings()
    instance = backend.load(file, SPEC, 0, 1)
    (logits,) = instance.run([images])
    np.testing.assert_allclose(logits, expected, atol=2e-5)
