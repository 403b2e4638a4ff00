"""Tests of the Triton kernels in Triton's interpreter; `test_interpreted` starts them, with TRITON_INTERPRET=1."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trainer.kernels import choice
from trainer.kernels.operations import Activation, conv_bias_gelu, conv_pool_relu, norm_activation

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, of infinities

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets CPU tensors use the kernels, on one thread."""
    monkeypatch.setattr(choice, "_is_supported", lambda device: True)
    assert choice.why_not(torch.device("cpu")) is None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Returns normal values, channels last, with a mean far from 0 and ties within windows."""
    values = (4 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 12).round() / 4
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def norm_step(
    x: torch.Tensor, activation: Activation, pool: int, *, residual: torch.Tensor | None = None, frozen: bool = False
) -> Tensors:
    """Computes a norm's forward and backward pass; returns all results."""
    random = torch.Generator().manual_seed(1)
    norm = nn.BatchNorm2d(x.size(1), momentum=0.3)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5, generator=random)
        norm.bias.normal_(generator=random)
    norm.weight.requires_grad_(not frozen)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    residual = None if residual is None else residual.detach().requires_grad_()
    z = norm_activation(x, norm, activation, pool=pool, residual=residual)
    z.backward(torch.randn(z.shape, generator=random).to(z.dtype))
    results = {"z": z, "dx": x.grad, "dweight": norm.weight.grad, "dbias": norm.bias.grad, **dict(norm.named_buffers())}
    results["dresidual"] = None if residual is None else residual.grad
    return {name: value.detach() for name, value in results.items() if value is not None}


def assert_close(ours: Tensors, theirs: Tensors, *, rounding: float = 1e-6) -> None:
    """Asserts equality up to `rounding`, relative to the largest value of each tensor."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape, name
        scale = max(1.0, float(expected.double().nan_to_num().abs().max()))
        torch.testing.assert_close(
            ours[name].double(), expected.double(), atol=rounding * scale, rtol=rounding, equal_nan=True, msg=name
        )


SHAPES = [
    pytest.param((3, 5, 7, 9), 2, "gelu", id="odd sizes, channels no power of two"),
    pytest.param((1, 70, 5, 4), 1, "gelu", id="one image, two blocks of channels"),
    pytest.param((2, 8, 8, 11), 3, "relu", id="windows of 3, two columns left over"),
    pytest.param((2, 3, 1, 1), 1, "relu", id="two values"),
    pytest.param((9, 24, 6, 6), 2, "gelu", id="several blocks of rows"),
]


@pytest.mark.parametrize(("shape", "pool", "activation"), SHAPES)
def test_norm_in_float32(shape: tuple[int, ...], pool: int, activation: Activation) -> None:
    ours = norm_step(images(*shape), activation, pool)
    with choice.torch_only():
        theirs = norm_step(images(*shape), activation, pool)
    # With two values per channel, normalised values are ±1, and the gradient is a difference of equal numbers.
    assert_close(ours, theirs, rounding=1e-4 if shape[0] * shape[2] * shape[3] < 10 else 2e-6)


def test_norm_has_the_same_bits_each_time() -> None:
    first, second = (norm_step(images(9, 5, 10, 10), "gelu", 2) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("pool", [1, 2])
def test_norm_in_bfloat16_rounds_at_the_end_only(pool: int) -> None:
    x = images(4, 16, 6, 6, dtype=torch.bfloat16)
    ours = norm_step(x, "gelu", pool)
    with choice.torch_only():
        exact = norm_step(x.float(), "gelu", pool)
    assert ours["z"].dtype == ours["dx"].dtype == torch.bfloat16
    assert_close({name: ours[name] for name in ("z", "dx")}, {name: exact[name] for name in ("z", "dx")}, rounding=2e-2)
    assert_close({"mean": ours["running_mean"]}, {"mean": exact["running_mean"]})


def test_norm_with_residual_and_relu() -> None:
    x, residual = images(2, 6, 3, 5), images(2, 6, 3, 5, seed=2) - 3
    ours = norm_step(x, "relu", 1, residual=residual)
    with choice.torch_only():
        theirs = norm_step(x, "relu", 1, residual=residual)
    assert "dresidual" in ours
    assert_close(ours, theirs, rounding=2e-6)


def test_norm_with_frozen_weights_has_gradients_for_the_others() -> None:
    assert "dweight" not in norm_step(images(2, 3, 4, 4), "gelu", 2, frozen=True)


def test_means_far_from_zero_keep_the_variance() -> None:
    x = images(2, 4, 8, 8) + 1000
    ours = norm_step(x, "none", 1)
    with choice.torch_only():
        exact = norm_step(x.double().float(), "none", 1)
    assert_close({"var": ours["running_var"]}, {"var": exact["running_var"]}, rounding=1e-5)


def test_momentum_1_overwrites_the_running_statistics() -> None:
    """`BatchNormSums` reads a shard's statistics from there."""
    norm = nn.BatchNorm2d(2, momentum=1.0)
    norm.running_mean.fill_(1e6)
    x = images(2, 2, 4, 4)
    norm_activation(x, norm, "relu")
    torch.testing.assert_close(norm.running_mean, x.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(norm.running_var, x.var(dim=(0, 2, 3)))


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_spread_as_in_torch(pool: int, value: float) -> None:
    x = images(2, 3, 5, 4)
    x[1, 1, 2, 3] = value
    ours = norm_step(x, "relu", pool)
    with choice.torch_only():
        theirs = norm_step(x, "relu", pool)
    for name in ("z", "dx", "dbias", "running_mean"):
        assert torch.equal(ours[name].isnan(), theirs[name].isnan()), name
    assert bool(ours["z"][:, 1].isnan().all())


def test_cases_without_kernels_are_torchs() -> None:
    norm = nn.BatchNorm2d(3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm_activation(images(1, 3, 1, 1), norm, "relu")
    assert norm_activation(images(0, 3, 4, 4), norm, "relu", pool=2).shape == (0, 3, 2, 2)
    assert not choice.is_fused(images(2, 3, 4, 4).double())
    with torch.no_grad():
        assert not choice.is_fused(images(2, 3, 4, 4))


def test_norm_with_hooks_is_called() -> None:
    """`BatchNormSums` has a shard of one image use the running statistics, by a hook."""
    norm, called = nn.BatchNorm2d(3), []
    norm.register_forward_pre_hook(lambda *_: called.append(True))
    norm_activation(images(1, 3, 4, 4), norm, "relu")
    assert called


def conv_step(x: torch.Tensor, kind: str, *, frozen: bool = False, pool: int = 2) -> Tensors:
    torch.manual_seed(0)
    conv = nn.Conv2d(x.size(1), 12, 3)
    conv.weight.requires_grad_(not frozen)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(not frozen)
    z = conv_bias_gelu(x, conv) if kind == "gelu" else conv_pool_relu(x, conv, pool)
    z.backward(torch.randn(z.shape, generator=torch.Generator().manual_seed(1)))
    results = {"z": z, "dx": x.grad, "dweight": conv.weight.grad, "dbias": conv.bias.grad}
    return {name: value.detach() for name, value in results.items() if value is not None}


@pytest.mark.parametrize("frozen", [False, True])
def test_convolution_bias_gelu(frozen: bool) -> None:
    ours = conv_step(images(3, 3, 8, 7), "gelu", frozen=frozen)
    with choice.torch_only():
        theirs = conv_step(images(3, 3, 8, 7), "gelu", frozen=frozen)
    assert_close(ours, theirs, rounding=2e-6)
    assert ("dweight" in ours) != frozen


@pytest.mark.parametrize("pool", [2, 3])
def test_convolution_pool_relu(pool: int) -> None:
    ours = conv_step(images(3, 1, 10, 13) - 3, "relu", pool=pool)
    with choice.torch_only():
        theirs = conv_step(images(3, 1, 10, 13) - 3, "relu", pool=pool)
    assert_close(ours, theirs, rounding=2e-6)


def test_maximum_of_ties_and_nans_is_torchs() -> None:
    """The gradient goes to the first of equal maxima, and to the last NaN."""
    x = torch.tensor([[1.0, 1.0, 1.0, float("nan")], [1.0, 1.0, float("nan"), 0.0]]).view(1, 1, 2, 4)
    conv = nn.Conv2d(1, 1, 1)
    with torch.no_grad():
        conv.weight.fill_(1)
        conv.bias.fill_(0)
    gradients = []
    for is_ours in (True, False):
        pixels = x.clone().requires_grad_()
        pooled = conv_pool_relu(pixels, conv, 2) if is_ours else F.relu(F.max_pool2d(conv(pixels), 2))
        pooled.backward(torch.ones_like(pooled))
        gradients.append((pooled.detach(), pixels.grad))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=0, atol=0)
