"""Which tensors use the kernels."""

import importlib.util

import pytest
import torch

from trainer.kernels import choice

CPU = torch.device("cpu")


def test_cpus_use_torchs_operations() -> None:
    assert not choice.is_fused(torch.ones(2, requires_grad=True))
    assert not choice.is_fusible(torch.ones(2, dtype=torch.uint8))
    assert not choice.is_fused(torch.ones(2, device="meta"))


@pytest.mark.parametrize("is_allowed", [True, False])
def test_kernels_that_work_are_used_unless_torchs_are_asked_for(
    is_allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "_is_supported", lambda device: True)
    monkeypatch.setattr(choice, "unsupported_reason", lambda device: None)
    x = torch.ones(2)
    if is_allowed:
        assert choice.is_fused(x)
        assert not choice.is_fused(x.double())
        assert not choice.is_fused(torch.ones(0))
        with torch.no_grad():
            assert not choice.is_fused(x)
            assert choice.is_fusible(x)
    else:
        with choice.torch_only():
            assert not choice.is_fused(x)
        assert choice.is_fused(x)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is for Linux")
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels work here")
def test_a_device_where_triton_does_not_work_says_why_in_one_line() -> None:
    choice.try_kernels.cache_clear()
    reason = choice.unsupported_reason(CPU)
    assert reason
    assert "\n" not in reason


def test_gpus_that_are_too_old_use_torchs_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4, for example: a small kernel works there, and a step would fail at the first product in bfloat16."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reason = choice._try_kernels(torch.device("cuda", 0))
    assert reason == "they need a GPU of capability 8.0 (Ampere) or later, and this one has 7.5"
