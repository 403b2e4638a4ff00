"""Tests of the lecture's families in their small-image forms: cost, training and export."""

import copy
import io
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from trainer.data import ImageSet
from trainer.errors import ConfigError
from trainer.export.folding import fold
from trainer.export.formats import EXPORTED_PROGRAM, TORCHSCRIPT, convert, load_predictor
from trainer.export.parity import THOROUGH, TOLERANCE, ParityCheck, reference_logits
from trainer.export.parity_images import ParityImages
from trainer.export.repository import MAX_BATCH_SIZE, ONNX
from trainer.models import Classifier, build_network
from trainer.models.cost import count_cost
from trainer.models.layers import dropout_layers, use_dropout_seeds

# Parameters and multiply-adds of one image for 10 classes, as the docstrings state them.
COSTS = {
    ("lecture", 1, 28): (105_506, 1_333_200),
    ("lecture", 3, 32): (107_106, 3_214_800),
    ("lenet5", 1, 28): (61_706, 416_520),
    ("lenet5", 3, 32): (62_006, 651_720),
    ("alexnet", 1, 28): (7_703_242, 171_486_208),
    ("alexnet", 3, 32): (7_706_442, 225_650_688),
    ("bn-alexnet", 1, 28): (7_706_442, 171_486_208),
    ("bn-alexnet", 3, 32): (7_709_642, 225_650_688),
    ("bn-nin", 1, 28): (958_794, 162_814_848),
    ("bn-nin", 3, 32): (968_394, 222_486_528),
    ("vgg16", 1, 28): (14_722_890, 267_646_976),
    ("vgg16", 3, 32): (14_724_042, 313_201_664),
    ("vgg19", 1, 28): (20_033_866, 343_734_272),
    ("vgg19", 3, 32): (20_035_018, 398_136_320),
    ("googlenet", 1, 28): (5_868_458, 1_105_337_344),
    ("googlenet", 3, 32): (5_871_914, 1_447_241_728),
    ("resnet18", 1, 28): (11_172_810, 455_800_832),
    ("resnet18", 3, 32): (11_173_962, 555_422_720),
    ("resnet34", 1, 28): (21_280_970, 935_917_568),
    ("resnet34", 3, 32): (21_282_122, 1_159_402_496),
    ("resnet50", 1, 28): (23_519_690, 1_046_819_840),
    ("resnet50", 3, 32): (23_520_842, 1_297_829_888),
    ("resnet101", 1, 28): (42_511_818, 1_974_875_136),
    ("resnet101", 3, 32): (42_512_970, 2_509_983_744),
    ("resnet152", 1, 28): (58_155_466, 2_902_930_432),
    ("resnet152", 3, 32): (58_156_618, 3_722_137_600),
}
FAMILIES = tuple(dict.fromkeys(name for name, _, _ in COSTS))
FOLDED = ("lenet5", "bn-alexnet", "bn-nin", "resnet18")
"""One cheap network for each kind of layer that the export folds."""
# ResNet-101 and ResNet-152 are left out: they are ResNet-50 with more blocks.
COMPUTED = [name for name in FAMILIES if name not in ("resnet101", "resnet152")]
# So are ResNet-34 and VGG-19 of ResNet-18 and VGG-16, which an export does not see: it converts block by block.
EXPORTED = [name for name in COMPUTED if name not in ("resnet34", "vgg19")]


def classifier(name: str, num_channels: int = 3, image_size: int = 32) -> Classifier:
    torch.manual_seed(0)
    network = build_network(name, num_channels=num_channels, image_size=image_size, num_classes=10, widths=())
    return Classifier(network, torch.full((num_channels,), 120.0), torch.full((num_channels,), 60.0))


def calibrated(name: str, num_channels: int, image_size: int) -> Classifier:
    """Returns a classifier in evaluation mode whose norms have the statistics of a batch.

    Without them the outputs of a deep network, and so its rounding errors, are about 1e8 times as large.
    """
    model = classifier(name, num_channels, image_size).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad(), use_dropout_seeds(dropout_layers(model), torch.arange(8)):
        model(pixels(8, num_channels, image_size))
    return model.eval()


@torch.no_grad()
def is_as_exact(outputs: torch.Tensor, model: Classifier, images: torch.Tensor) -> bool:
    """Returns whether outputs are within 1e-4 of those in float64, or about as close as those of eager float32.

    A hundred layers of random weights magnify rounding: eager float32 itself is off by more than 1e-4.
    """
    exact = copy.deepcopy(model).double()(images)
    error, eager_error = ((found - exact).abs().max() for found in (outputs, model(images)))
    return bool(error <= max(1e-4, 3 * eager_error))


def pixels(num_images: int, num_channels: int = 3, image_size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_images)
    return torch.randint(
        256, (num_images, num_channels, image_size, image_size), dtype=torch.uint8, generator=generator
    )


@pytest.mark.parametrize(("shape", "cost"), COSTS.items(), ids=lambda value: "-".join(map(str, value)))
def test_parameters_and_multiply_adds_match_the_docstrings(shape: tuple[str, int, int], cost: tuple[int, int]) -> None:
    name, num_channels, size = shape
    found = count_cost(
        lambda: build_network(name, num_channels=num_channels, image_size=size, num_classes=10, widths=()),
        num_channels=num_channels,
        image_size=size,
    )
    assert (found.num_parameters, found.multiply_adds) == cost


def test_the_first_layer_of_lenet_matches_page_13_of_the_lecture() -> None:
    network = build_network("lenet5", num_channels=1, image_size=28, num_classes=10, widths=())
    first = network.get_submodule("conv1")
    assert sum(parameter.numel() for parameter in first.parameters()) == 156
    shapes = []
    first.register_forward_hook(lambda module, args, output: shapes.append((args[0].shape, output.shape)))
    network(torch.zeros(1, 1, 28, 28))
    assert shapes == [((1, 1, 32, 32), (1, 6, 28, 28))]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [28, 32, 64])
def test_common_image_sizes_are_taken(name: str, size: int) -> None:
    with torch.device("meta"):
        network = build_network(name, num_channels=3, image_size=size, num_classes=7, widths=())
        assert network.eval()(torch.empty(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", FAMILIES)
def test_images_that_are_too_small_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="takes images of at least"):
        build_network(name, num_channels=1, image_size=4, num_classes=10, widths=())


@pytest.mark.parametrize("widths", [(), (0, 8, 8, 8), (8, 8, 8, -1)])
@pytest.mark.parametrize("name", ["compact", "airbench", "airbench-residual", "airbench-strided"])
def test_impossible_widths_are_refused_with_possible_ones(name: str, widths: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"widths of at least 1, not .*: give them, as in --set widths=\d+,\d+,"):
        build_network(name, num_channels=1, image_size=40, num_classes=2, widths=widths)


def test_the_compact_net_has_four_widths() -> None:
    with pytest.raises(ConfigError, match=r"4 widths of at least 1, not 8,16:"):
        build_network("compact", num_channels=1, image_size=40, num_classes=2, widths=(8, 16))


@pytest.mark.parametrize("name", COMPUTED)
def test_a_few_steps_lower_the_loss(name: str) -> None:
    model = classifier(name).train()
    images, labels = pixels(8), torch.arange(8)
    # A rate at which even a hundred layers learn from the first step, however their sums are rounded.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9)
    losses = []
    for _ in range(5):
        with use_dropout_seeds(dropout_layers(model), labels):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] < 5  # ln 10 is 2.3: the initial outputs have a sensible scale


@pytest.mark.parametrize("name", EXPORTED)
def test_torchscript_and_torch_export_match_eager_at_every_batch_size(name: str) -> None:
    model = calibrated(name, 3, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns at every step that TorchScript is deprecated
        traced = torch.jit.trace(model, (pixels(2),), check_trace=False)  # it is checked below
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        traced = torch.jit.load(file)
        exported = torch.export.export(
            model, (pixels(2),), dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}}
        ).module()
    for batch_size in (1, 3):
        images = pixels(batch_size)
        for other in (traced, exported):
            assert is_as_exact(other(images), model, images)


@pytest.mark.parametrize("name", EXPORTED)
def test_onnx_matches_eager_at_every_batch_size(name: str, tmp_path: Path) -> None:
    import onnxruntime

    model = calibrated(name, 1, 28)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (pixels(2, 1, 28),),
            tmp_path / "model.onnx",
            dynamo=True,
            dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch_size in (1, 3):
        images = pixels(batch_size, 1, 28)
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        assert is_as_exact(torch.from_numpy(found), model, images)


@pytest.mark.parametrize("name", FOLDED)
def test_folded_networks_pass_the_parity_check(name: str) -> None:
    model = calibrated(name, 3, 32)
    images = ImageSet(pixels(20), torch.arange(20) % 10)
    parity_images = ParityImages((images, torch.arange(20)), (images, torch.arange(0)), 0)
    reference = reference_logits(model, parity_images.batches(MAX_BATCH_SIZE, len(parity_images)))
    check = ParityCheck(
        images=parity_images, reference=reference, plan=THOROUGH, log=lambda line: None, tolerance=TOLERANCE
    )
    files = convert(fold(model), pixels(2))
    assert set(files) == {TORCHSCRIPT, ONNX, EXPORTED_PROGRAM}
    for file, content in files.items():
        results = check.run(file, load_predictor(file, content))
        assert [result.num_images for result in results] == [20] * 5
