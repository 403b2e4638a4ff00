"""The kernels on a GPU, at the sizes of the recipes, compared with torch's operations there."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from tests.trainer.kernels.comparison import Tensors, assert_close, conv_step, images, norm_step
from trainer.data.augment import augment_batch, draw_params
from trainer.kernels import choice
from trainer.kernels.operations import Activation, conv_bias_gelu, convolution, linear
from trainer.kernels.updates import cast
from trainer.loop.loss import TrainingLoss
from trainer.loop.muon import muon_step
from trainer.loop.optim import Optimizer
from trainer.models import Classifier, build_network
from trainer.recipes import ParamGroup
from trainer.recipes.augmentation import Augment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 is float32, and the kernels work."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    assert choice.unsupported_reason(CUDA) is None


SHAPES = [
    pytest.param((100, 64, 31, 31), 2, "gelu", id="cifar10, first stage"),
    pytest.param((100, 256, 7, 7), 1, "gelu", id="cifar10, second stage"),
    pytest.param((250, 16, 28, 28), 2, "relu", id="mnist-fast, stem"),
    pytest.param((1, 70, 5, 5), 1, "gelu", id="one image"),
]


@pytest.mark.parametrize(("shape", "pool", "activation"), SHAPES)
def test_norms(shape: tuple[int, ...], pool: int, activation: Activation) -> None:
    x = images(*shape).to(CUDA)
    ours, again = norm_step(x, activation, pool), norm_step(x, activation, pool)
    with choice.torch_only():
        theirs = norm_step(x, activation, pool)
    assert_close(ours, theirs, rounding=1e-5)
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    low = norm_step(x.bfloat16(), activation, pool)  # `images` are multiples of 1/4: bfloat16 has them all
    assert_close({name: low[name] for name in ("z", "dx")}, {name: theirs[name] for name in ("z", "dx")}, rounding=1e-2)


def test_norm_with_residual() -> None:
    x, residual = images(128, 64, 32, 32).to(CUDA), images(128, 64, 32, 32, seed=2).to(CUDA) - 3
    ours = norm_step(x, "relu", 1, residual=residual)
    with choice.torch_only():
        assert_close(ours, norm_step(x, "relu", 1, residual=residual), rounding=1e-5)


@pytest.mark.parametrize("kind", ["gelu", "relu"])
def test_convolutions(kind: str) -> None:
    # No two largest values of a window, and no maximum and 0, are closer than 1e-5: rounding decides nothing.
    x = images(30, 8, 31, 31, seed=4).to(CUDA) - 3
    ours = conv_step(x, kind)
    with choice.torch_only():
        assert_close(ours, conv_step(x, kind), rounding=1e-5)


@pytest.mark.parametrize(
    ("channels", "filters", "size", "kernel"), [(1, 32, 28, 5), (16, 32, 14, 3), (32, 64, 8, 5), (24, 64, 31, 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_convolutions(channels: int, filters: int, size: int, kernel: int, dtype: torch.dtype) -> None:
    images_ = images(250, channels, size, size).to(CUDA, dtype) - 3
    conv = nn.Conv2d(channels, filters, kernel, padding=1, bias=False).to(CUDA, memory_format=torch.channels_last)
    results = []
    for context in (nullcontext(), choice.torch_only()):
        conv.weight.grad, x = None, images_.detach().requires_grad_()
        with context, torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            y = convolution(x, conv)
        (y.float() * torch.arange(y.numel(), device=CUDA).view_as(y).sin()).sum().backward()
        results.append({"y": y.detach(), "weight": conv.weight.grad, "x": x.grad})
    assert_close(*results, rounding=1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("learns_bias", [False, True])
def test_whitening(learns_bias: bool) -> None:
    torch.manual_seed(0)
    whiten, conv = nn.Conv2d(3, 24, 2).to(CUDA), nn.Conv2d(24, 64, 3, padding=1, bias=False).to(CUDA)
    assert whiten.bias is not None
    whiten.weight.requires_grad_(False)
    whiten.bias.requires_grad_(learns_bias)
    x = images(500, 3, 32, 32).to(CUDA) - 3
    results: list[Tensors] = []
    for context in (nullcontext(), choice.torch_only()):
        whiten.bias.grad = conv.weight.grad = None
        with context:
            z = conv_bias_gelu(x, whiten)
            y = convolution(z, conv)
        (y * torch.arange(y.numel(), device=CUDA).view_as(y).sin()).sum().backward()
        found = {"z": z.detach()[:, :24], "y": y.detach(), "weight": conv.weight.grad}
        results.append({**found, "bias": whiten.bias.grad} if learns_bias else found)
    assert_close(*results, rounding=1e-4)


@pytest.mark.parametrize("size", [None, 24])
def test_gathered_images(size: int | None) -> None:
    pool = torch.randint(256, (500, 3, 32, 32), dtype=torch.uint8, device=CUDA)
    indices = torch.randint(500, (200,), device=CUDA)
    for augment in (Augment(flip="random", shift=2), Augment(shift=2, rotate_degrees=10, scale=0.1)):
        params = draw_params(augment, 200, seed=0, epoch=0).to(CUDA)
        ours = augment_batch(augment, pool, indices, params, size)
        with choice.torch_only():
            theirs = augment_batch(augment, pool, indices, params, size)
        exact = size is None and not augment.is_affine
        torch.testing.assert_close(ours, theirs, atol=0 if exact else 0.05, rtol=0)


def test_losses() -> None:
    logits, labels = torch.randn(2000, 10, device=CUDA), torch.randint(10, (2000,), device=CUDA)
    results = []
    for context in (nullcontext(), choice.torch_only()):
        leaf = logits.clone().requires_grad_()
        with context:
            loss = TrainingLoss(0.2).measure(leaf, labels, 0.5)
        loss.backward()
        results.append({"sums": loss.sums, "gradient": leaf.grad})
    assert_close(*results, rounding=1e-5)


@pytest.mark.parametrize(("inputs", "outputs", "relu"), [(576, 200, True), (200, 10, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layers(inputs: int, outputs: int, relu: bool, dtype: torch.dtype) -> None:
    x = torch.randn(100, inputs, device=CUDA, dtype=dtype).requires_grad_()
    layer = nn.Linear(inputs, outputs).to(CUDA, dtype)
    results = []
    for context in (nullcontext(), choice.torch_only()):
        x.grad = layer.weight.grad = layer.bias.grad = None
        with context:
            z = linear(x, layer, relu=relu)
        (z.float() * torch.arange(z.numel(), device=CUDA).view_as(z).sin()).sum().backward()
        results.append({"z": z.detach(), "x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad})
    assert_close(*results, rounding=1e-5 if dtype == torch.float32 else 1e-2)


def test_sgd_and_casts() -> None:
    shapes = [(70,), (64, 24, 3, 3), (1,), (16, 1, 3, 3), (512, 512, 3, 3), (10, 512)] * 7
    start, gradients = ([torch.randn(shape, device=CUDA) for shape in shapes] for _ in range(2))
    results = []
    for context in (nullcontext(), choice.torch_only()):
        weights = [nn.Parameter(channels_last(each.clone())) for each in start]
        settings = [ParamGroup(lr=0.1, momentum=0.9, weight_decay=0.2), ParamGroup(lr=0.3)]
        optimizer = Optimizer([(group, weights[number::2]) for number, group in enumerate(settings)])
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad_dtype = None
            weight.grad = gradient.to(torch.bfloat16 if gradient.ndim > 1 else torch.float32)
        with context:
            optimizer.step(torch.tensor(0.5, device=CUDA))
            optimizer.step(torch.tensor(0.5, device=CUDA))
            low = [torch.empty_like(weight, dtype=torch.bfloat16) for weight in weights]
            cast(weights, low)
        assert all(torch.equal(mine, weight.bfloat16()) for mine, weight in zip(low, weights, strict=True))
        results.append({str(number): weight.detach() for number, weight in enumerate(weights)})
    assert_close(*results)


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


@pytest.mark.parametrize("sizes", [(24, 64, 256), (16, 32, 64), (3, 600, 40)])
def test_muon(sizes: tuple[int, int, int]) -> None:
    """In bfloat16 all are a few percent away from an orthogonal matrix, each in its own way."""
    first, second, third = sizes
    shapes = [(second, first, 3, 3), (second, second, 3, 3), (third, second, 3, 3), (third, third, 3, 3)]
    start, *steps = ([channels_last(torch.randn(shape, device=CUDA)) for shape in shapes] for _ in range(3))

    def updated(*, is_low: bool) -> list[torch.Tensor]:
        weights = [nn.Parameter(each.clone()) for each in start]
        optimizer = Optimizer([(ParamGroup(lr=0.4, momentum=0.6, optimizer="muon"), weights)])
        for gradients in steps:
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad_dtype = None
                weight.grad = gradient.bfloat16() if is_low else gradient.bfloat16().float()
            optimizer.step(torch.tensor(0.5, device=CUDA))
        momenta: list[torch.Tensor] = optimizer.state_dict()["momenta"][0]
        return [*(weight.detach() for weight in weights), *momenta]

    ours, again = updated(is_low=True), updated(is_low=True)
    with choice.torch_only():
        at_once = updated(is_low=False)
    momenta, theirs = [torch.zeros_like(each) for each in start], [each.clone() for each in start]
    for gradients in steps:
        low = [gradient.bfloat16().float() for gradient in gradients]
        momenta = [0.6 * momentum + each for momentum, each in zip(momenta, low, strict=True)]
        updates = [each + 0.6 * momentum for momentum, each in zip(momenta, low, strict=True)]
        muon_step(theirs, updates, torch.tensor(0.2, device=CUDA))
    for mine, same, other, expected in zip(ours, again, at_once, [*theirs, *momenta], strict=True):
        assert torch.equal(mine, same)
        assert float((mine - expected).norm() / expected.norm()) < 0.02
        assert float((other - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize(
    ("name", "size", "channels"), [("airbench", 32, 3), ("compact", 28, 1), ("lecture", 28, 1), ("resnet18", 32, 3)]
)
def test_a_network_in_bfloat16(name: str, size: int, channels: int) -> None:
    """Gradients of early layers collect the rounding of all later ones, up to half of their size in a ResNet.

    With the kernels they may be about as far from those in float32 as with torch's operations.
    """
    torch.manual_seed(0)
    widths = (16, 32, 32, 64) if name == "compact" else (64, 256, 256)
    network = build_network(name, num_channels=channels, image_size=size, num_classes=10, widths=widths)
    model = Classifier(network, torch.full((channels,), 120.0), torch.full((channels,), 60.0))
    model.to(memory_format=torch.channels_last).to(CUDA).train()
    pixels = torch.randint(256, (128, channels, size, size), dtype=torch.uint8, device=CUDA)
    labels = torch.arange(128, device=CUDA) % 10

    def gradients(*, is_low: bool) -> dict[str, torch.Tensor]:
        model.zero_grad()
        with torch.autocast(CUDA.type, dtype=torch.bfloat16, enabled=is_low):
            logits = model(pixels)
        TrainingLoss(0.1).measure(logits, labels).backward()
        return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}

    ours = gradients(is_low=True)
    with choice.torch_only():
        theirs, exact = gradients(is_low=True), gradients(is_low=False)
    assert ours.keys() == theirs.keys() == exact.keys()
    for parameter, expected in exact.items():
        mine, others = (float((each[parameter] - expected).norm() / expected.norm()) for each in (ours, theirs))
        assert mine < 2 * others + 0.1, parameter
