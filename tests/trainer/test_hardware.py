"""Precision support, and the description of the machine."""

from typing import Any

import pytest
import torch

from convoy.cpus import available_memory, num_available_cpus
from trainer.hardware import allow_tf32, describe, has_tf32, tf32_settings, without_tf32


def test_the_machine_is_described() -> None:
    described = describe(torch.device("cpu"))
    assert described["cpus"] == num_available_cpus()
    assert described["memory_bytes"] == available_memory()
    assert described["torch"] == torch.__version__
    assert described["device"]


@pytest.mark.parametrize(("capability", "has"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_gpus_since_ampere_have_tf32(capability: tuple[int, int], has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_tf32(torch.device("cuda", 0)) is has
    assert not has_tf32(torch.device("cpu"))


def test_tf32_is_allowed_for_convolutions_and_matrix_products_alike() -> None:
    for is_allowed in (True, False):
        allow_tf32(is_allowed)
        with without_tf32():
            assert tf32_settings() == (False, False)
        assert tf32_settings() == (is_allowed, is_allowed)


def test_tf32_is_forbidden_whatever_a_users_network_has_set() -> None:
    backends: Any = torch.backends
    for setting in (backends, backends.cuda.matmul, backends.mkldnn.matmul):
        setting.fp32_precision = "tf32"
        with without_tf32():
            assert tf32_settings() == (False, False)
        allow_tf32(False)
        assert tf32_settings() == (False, False)
        assert not backends.cudnn.allow_tf32  # raises an error where older and newer settings disagree
        assert not backends.cuda.matmul.allow_tf32
        assert backends.mkldnn.matmul.fp32_precision == "ieee"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_float32_is_float32_on_a_gpu() -> None:
    """A convolution and a matrix product, forward and backward, against float64."""
    device = torch.device("cuda", 0)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 64, 16, 16, dtype=torch.float64, generator=generator)
    filters = torch.randn(64, 64, 3, 3, dtype=torch.float64, generator=generator)
    matrix = torch.randn(64, 64, dtype=torch.float64, generator=generator)

    def compute(kind: torch.dtype) -> list[torch.Tensor]:
        x, w, m = (tensor.to(device, kind).requires_grad_() for tensor in (images, filters, matrix))
        out = torch.nn.functional.conv2d(x, w).mean(dim=(2, 3)) @ m
        out.square().sum().backward()
        return [tensor.double() for tensor in (out.detach(), x.grad, w.grad, m.grad) if tensor is not None]

    exact = compute(torch.float64)
    differences = {}
    for is_allowed in (False, True):
        allow_tf32(is_allowed)
        found = compute(torch.float32)
        differences[is_allowed] = max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
    assert differences[False] < 1e-5
    if has_tf32(device):
        assert differences[True] > 5 * differences[False]
