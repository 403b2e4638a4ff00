"""Tests of the Triton kernels in Triton's interpreter; `test_interpreted` starts them, with TRITON_INTERPRET=1."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.trainer.kernels.comparison import Tensors, assert_close, conv_step, images, norm_step
from trainer.data.augment import augment_batch, draw_params
from trainer.data.augment.colour import jitter
from trainer.kernels import batches, choice, fused, muon, updates
from trainer.kernels import convolution as convolutions
from trainer.kernels.launch import Tiling
from trainer.kernels.operations import (
    Activation,
    conv_bias_gelu,
    conv_pool_relu,
    convolution,
    global_maximum,
    linear,
    norm_activation,
)
from trainer.kernels.updates import cast
from trainer.loop.loss import TrainingLoss
from trainer.loop.optim import Optimizer
from trainer.models import Classifier
from trainer.models.compact import CompactNet
from trainer.recipes import ParamGroup
from trainer.recipes.augmentation import Augment

pytestmark = [  # numpy's, of infinities and NaN, and of how Triton 3.6 reads an array of one number
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets CPU tensors use the kernels, on one thread."""
    monkeypatch.setattr(choice, "_is_supported", lambda device: True)
    assert choice.unsupported_reason(torch.device("cpu")) is None
    torch.set_num_threads(1)


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


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_norm_with_residual(activation: Activation) -> None:
    x, residual = images(2, 6, 3, 5), images(2, 6, 3, 5, seed=2) - 3
    ours = norm_step(x, activation, 1, residual=residual)
    with choice.torch_only():
        theirs = norm_step(x, activation, 1, residual=residual)
    assert "dresidual" in ours
    assert_close(ours, theirs, rounding=2e-6)


@pytest.mark.parametrize("pool", [1, 2])
def test_norm_with_several_blocks_for_each_program(pool: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_STATISTICS", "_POOLED_STATISTICS", "_RESULTS", "_GRADIENT_SUMS", "_GRADIENTS"):
        monkeypatch.setattr(fused, name, Tiling(64, block_channels=8, programs=2))
    x, residual = images(3, 20, 6, 7), images(3, 20, 6, 7, seed=2) - 3 if pool == 1 else None
    ours = norm_step(x, "relu", pool, residual=residual)
    with choice.torch_only():
        theirs = norm_step(x, "relu", pool, residual=residual)
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


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_global_maximum_shares_gradients_among_equal_maxima(value: float) -> None:
    x = images(130, 5, 3, 3).requires_grad_()  # two blocks of images
    with torch.no_grad():
        x[0, 0, 1] = x[0, 0].max()
        x[1, 1, 0, 0] = value
    results = []
    for context in (nullcontext(), choice.torch_only()):
        x.grad = None
        with context:
            z = global_maximum(x, is_training=True)
        z.backward(torch.arange(650.0).view(130, 5))
        results.append({"z": z.detach(), "dx": x.grad})
    assert_close(*results)


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


def augmented(augment: Augment, *, size: int | None = None) -> torch.Tensor:
    pool = torch.randint(256, (4, 3, 7, 9), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    indices = torch.tensor([3, 0, 0, 1, 2])
    return augment_batch(augment, pool, indices, draw_params(augment, 5, seed=0, epoch=0), size)


@pytest.mark.parametrize(
    "augment",
    [
        pytest.param(Augment(), id="nothing"),
        pytest.param(Augment(flip="random", shift=3, fill="reflect"), id="flip, shift and reflect"),
        pytest.param(Augment(flip_vertical="random", shift=2, fill="zero"), id="upside down and zeros"),
    ],
)
def test_gathered_images_are_torchs(augment: Augment) -> None:
    ours, resized = augmented(augment), augmented(augment, size=6)
    with choice.torch_only():
        assert torch.equal(ours, augmented(augment))
        torch.testing.assert_close(resized, augmented(augment, size=6), atol=1e-3, rtol=0)


def test_warped_images_are_torchs() -> None:
    augment = Augment(flip="random", flip_vertical="random", shift=2, rotate_degrees=30, scale=0.2)
    ours = augmented(augment)
    with choice.torch_only():
        torch.testing.assert_close(ours, augmented(augment), atol=1e-2, rtol=0)
    assert ours.dtype == torch.float32


@pytest.mark.parametrize("changed", [{"brightness": 0.4, "contrast": 0.4}, {"saturation": 0.5, "hue": 0.1}])
@pytest.mark.parametrize("channels", [1, 3])
def test_colours_are_torchs(channels: int, changed: dict[str, float]) -> None:
    augment = Augment(**changed)
    pixels = torch.randint(256, (3, channels, 35, 40), generator=torch.Generator().manual_seed(0)).float()
    params = draw_params(augment, 3, seed=0, epoch=0)[:, 6:]
    ours = jitter(augment, pixels, params)
    with choice.torch_only():
        torch.testing.assert_close(ours, jitter(augment, pixels, params), atol=1e-2, rtol=0)
    torch.testing.assert_close(jitter(augment, pixels.byte(), params), ours, atol=0, rtol=0)


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalized_images_are_torchs(num_channels: int, dtype: torch.dtype) -> None:
    pixels = torch.randint(256, (3, num_channels, 5, 7), dtype=torch.uint8)
    mean, deviation = torch.rand(1, num_channels, 1, 1) * 100, torch.rand(1, num_channels, 1, 1) * 50 + 1
    ours = batches.normalize(pixels, mean, deviation, dtype=dtype)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    rounding = 0 if dtype == torch.float32 else 2**-7  # the interpreter cuts digits off, a GPU rounds
    torch.testing.assert_close(ours.float(), (pixels.float() - mean) / deviation, atol=0, rtol=rounding)


@pytest.mark.parametrize(("rows", "classes"), [(1, 10), (130, 10), (300, 10), (3, 257)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_is_torchs(rows: int, classes: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(rows, classes, generator=random)).to(dtype)
    logits[:, 1] = logits[:, 0]  # of equal logits the first is the answer
    labels = torch.randint(classes, (rows,), generator=random)
    results = []
    for context in (nullcontext(), choice.torch_only()):
        leaf = logits.clone().requires_grad_()
        with context:
            loss = TrainingLoss(0.2).measure(leaf, labels, 1 / rows)
        loss.backward()
        assert leaf.grad.dtype == dtype
        assert not loss.sums.requires_grad
        results.append({"loss": loss.sums[0], "correct": loss.sums[1], "gradient": leaf.grad * rows})
    assert_close(*results, rounding=1e-6 if dtype == torch.float32 else 1e-2)
    assert results[0]["correct"] == results[1]["correct"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("label", [0, 1])
def test_cross_entropy_of_nan_and_infinity_is_torchs(value: float, smoothing: float, label: int) -> None:
    logits, labels = torch.tensor([[value, 1.0, 2.0]]), torch.tensor([label])
    results = []
    for context in (nullcontext(), choice.torch_only()):
        leaf = logits.clone().requires_grad_()
        with context:
            loss = TrainingLoss(smoothing).measure(leaf, labels)
        loss.backward()
        results.append((loss.sums[0], leaf.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def conv_results(conv: nn.Conv2d, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Computes a convolution's forward and backward pass; returns all results."""
    x, conv.weight.grad = x.detach().requires_grad_(), None
    y = convolution(x, conv)
    (y * torch.arange(y.numel()).view_as(y).sin()).sum().backward()
    return {"y": y.detach(), "x": x.grad, "weight": conv.weight.grad}


CONVOLUTIONS = [
    pytest.param((2, 1, 7, 6), nn.Conv2d(1, 20, (3, 5), padding=(1, 2), bias=False), id="images"),
    pytest.param((2, 3, 9, 8), nn.Conv2d(3, 5, 2, stride=2, bias=False), id="images, stride 2"),
    pytest.param((1, 3, 5, 5), nn.Conv2d(3, 70, 5, bias=False), id="two blocks of filters, one pixel"),
    pytest.param((3, 20, 6, 5), nn.Conv2d(20, 12, 3, padding=1, bias=False), id="several blocks of columns"),
    pytest.param((2, 40, 4, 4), nn.Conv2d(40, 24, 3, padding=3, bias=False), id="40 channels, wide padding"),
]


@pytest.mark.parametrize(("shape", "conv"), CONVOLUTIONS)
def test_small_convolutions_are_our_own(shape: tuple[int, ...], conv: nn.Conv2d) -> None:
    ours = conv_results(conv, images(*shape) - 3)
    with choice.torch_only():
        theirs = conv_results(conv, images(*shape) - 3)
    assert_close(ours, theirs, rounding=2e-6)
    assert type(convolution(images(*shape), conv).grad_fn).__name__ == "_ConvolutionBackward"


def test_other_convolutions_are_torchs() -> None:
    conv, x = nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect", groups=2), images(2, 6, 5, 4)
    torch.testing.assert_close(convolution(x, conv), conv(x))


@pytest.mark.parametrize("most", [0, 2**30], ids=["cuDNN's product", "our own"])
def test_large_convolutions_keep_cudnns_products(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutions, "_MAX_SMALL_WORK", most)
    conv, x = nn.Conv2d(24, 10, 3, padding=1, bias=False), images(2, 24, 5, 6) - 3
    with choice.torch_only():
        theirs = conv_results(conv, x)
    ours = conv_results(conv, F.pad(x, (0, 0, 0, 0, 0, 8)).contiguous(memory_format=torch.channels_last))
    assert not bool(ours["x"][:, 24:].any())
    assert_close({**ours, "x": ours["x"][:, :24]}, theirs, rounding=2e-6)


@pytest.mark.parametrize("learns_bias", [False, True])
def test_filters_before_gelu_are_padded_with_zeros(learns_bias: bool) -> None:
    """Whitening and the first convolution, together."""
    torch.manual_seed(0)
    whiten, conv = nn.Conv2d(3, 24, 2), nn.Conv2d(24, 6, 3, bias=False)
    assert whiten.bias is not None
    whiten.weight.requires_grad_(False)
    whiten.bias.requires_grad_(learns_bias)
    results: list[Tensors] = []
    for context in (nullcontext(), choice.torch_only()):
        whiten.bias.grad = conv.weight.grad = None
        with context:
            z = conv_bias_gelu(images(3, 3, 6, 7) - 3, whiten)
            y = convolution(z, conv)
        assert z.size(1) == (24 if results else 32)
        assert not bool(z[:, 24:].any())
        (y * torch.arange(y.numel()).view_as(y).sin()).sum().backward()
        found = {"z": z.detach()[:, :24], "y": y.detach(), "weight": conv.weight.grad}
        results.append({**found, "bias": whiten.bias.grad} if learns_bias else found)
    assert_close(*results, rounding=2e-6)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("rows", [3, 130])
def test_linear_layers_are_torchs(rows: int, relu: bool) -> None:
    x = torch.randn(rows, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.manual_seed(0)
    layer = nn.Linear(7, 21)
    results = []
    for context in (nullcontext(), choice.torch_only()):
        x.grad = layer.weight.grad = layer.bias.grad = None
        with context:
            z = linear(x, layer, relu=relu)
        assert (type(z.grad_fn).__name__ == "_LinearBackward") == (not results)
        (z * torch.arange(z.numel()).view_as(z).sin()).sum().backward()
        results.append({"z": z.detach(), "x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad})
    assert_close(*results, rounding=2e-6)


@pytest.mark.parametrize(("dtype", "large"), [(torch.float32, 1000), (torch.bfloat16, 1)])
def test_sgd_of_many_tensors_is_torchs(dtype: torch.dtype, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one start holds, of several groups, layouts and sizes, one of them without a gradient."""
    monkeypatch.setattr(updates, "_MAX_TENSORS", 4)
    monkeypatch.setattr(updates, "_BLOCK", 16)
    monkeypatch.setattr(updates, "_LARGE", large)
    random = torch.Generator().manual_seed(0)
    shapes = [(70,), (2, 3, 5, 7), (1,), (5, 1, 3, 3), (3, 2), (2, 64), (7,)]
    settings = [ParamGroup(lr=0.1, momentum=0.9, weight_decay=0.2), ParamGroup(lr=0.3)]
    start = [torch.randn(shape, generator=random) for shape in shapes]
    gradients = [[torch.randn(shape, generator=random) for shape in shapes] for _ in range(2)]
    results = []
    for context in (nullcontext, choice.torch_only):
        weights = [nn.Parameter(channels_last(each.clone())) for each in start]
        optimizer = Optimizer([(group, weights[number::2]) for number, group in enumerate(settings)])
        for step in gradients:
            for number, (weight, gradient) in enumerate(zip(weights, step, strict=True)):
                weight.grad_dtype = None
                weight.grad = None if number == 4 else gradient.to(dtype if gradient.ndim > 1 else torch.float32)
            with context():
                optimizer.step(torch.tensor(0.5))
        results.append({str(number): weight.detach() for number, weight in enumerate(weights)})
        momenta = [each for group in optimizer.state_dict()["momenta"] for each in group]
        results[-1] |= {f"momentum {number}": each for number, each in enumerate(momenta)}
    assert_close(*results)


@pytest.mark.parametrize(
    "shapes",
    [[(4, 3, 3, 3), (6, 4, 3, 3), (5, 8)], [(3, 4, 3, 3), (2, 40)], [(70, 9, 3, 3)], [(20, 1, 1, 1), (9, 1)]],
)
@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_muon_is_torchs(shapes: list[tuple[int, ...]], momentum: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, as the interpreter cannot multiply matrices in bfloat16; wide, tall and more rows than a tile has."""
    monkeypatch.setattr(muon, "MATRIX_TYPE", torch.float32)
    random = torch.Generator().manual_seed(0)
    start, *steps = ([torch.randn(shape, generator=random) for shape in shapes] for _ in range(3))
    results = []
    for context in (nullcontext, choice.torch_only):
        weights = [nn.Parameter(channels_last(each.clone())) for each in start]
        optimizer = Optimizer([(ParamGroup(lr=0.3, momentum=momentum, optimizer="muon"), weights)])
        for gradients in steps:
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient.clone()
            with context():
                optimizer.step(torch.tensor(0.5))
        results.append({str(number): weight.detach() for number, weight in enumerate(weights)})
        momenta = optimizer.state_dict()["momenta"][0]
        results[-1] |= {f"momentum {number}": each for number, each in enumerate(momenta)}
    assert_close(*results, rounding=1e-5)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [1e25, float("nan")])
def test_muon_survives_gradients_whose_squares_overflow(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their update is 0, as in torch; NaN spreads."""
    monkeypatch.setattr(muon, "MATRIX_TYPE", torch.float32)
    weights = [nn.Parameter(torch.randn(16, 32, generator=torch.Generator().manual_seed(0)))]
    before, weights[0].grad = weights[0].detach().clone(), torch.full((16, 32), value)
    Optimizer([(ParamGroup(lr=0.3, momentum=0.0, optimizer="muon"), weights)]).step(torch.tensor(0.5))
    if math.isnan(value):
        assert bool(weights[0].isnan().all())
    else:
        torch.testing.assert_close(weights[0].detach(), before * (4 / before.norm()))


def test_casts_of_many_tensors_are_torchs() -> None:
    sources = [images(number, 3, 7, 9) for number in range(1, 4)]
    targets = [torch.empty_like(each, dtype=torch.bfloat16) for each in sources]
    cast(sources, targets)
    for ours, expected in zip(targets, sources, strict=True):
        assert torch.equal(ours, expected.bfloat16())  # `images` are multiples of 1/4: bfloat16 has them all


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def test_a_classifier_trains_as_with_torch() -> None:
    """Pixels to gradients, with all kernels of a network together."""
    torch.manual_seed(0)
    network = CompactNet(num_channels=1, image_size=8, num_classes=5, widths=(4, 4, 4, 4))
    pixels = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8)
    model = Classifier(network, torch.full((1,), 120.0), torch.full((1,), 60.0))
    model.to(memory_format=torch.channels_last).train()
    results = []
    for context in (nullcontext(), choice.torch_only()):
        trained = copy.deepcopy(model)
        with context:
            logits = trained(pixels)
            TrainingLoss(0.1).measure(logits, torch.tensor([0, 3, 4])).backward()
        gradients = {name: each.grad for name, each in trained.named_parameters() if each.grad is not None}
        buffers = {name: each for name, each in trained.named_buffers() if each.is_floating_point()}
        results.append({"logits": logits.detach(), **gradients, **buffers})
    assert_close(*results, rounding=1e-4)
