"""The lecture's families in their small-image forms: what they cost, that they learn, that they can be exported."""

import io
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from trainer.errors import ConfigError
from trainer.models import Classifier, build_network
from trainer.models.cost import cost_of

# What the docstrings say: parameters and multiply-adds of one image, for 10 classes.
COSTS = {
    ("lecture", 1, 28): (105_506, 1_333_200),
    ("lenet5", 1, 28): (61_706, 416_520),
    ("lenet5", 3, 32): (62_006, 651_720),
    ("alexnet", 1, 28): (7_703_242, 171_486_208),
    ("alexnet", 3, 32): (7_706_442, 225_650_688),
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
    ("resnet34", 3, 32): (21_282_122, 1_159_402_496),
    ("resnet50", 3, 32): (23_520_842, 1_297_829_888),
    ("resnet101", 3, 32): (42_512_970, 2_509_983_744),
    ("resnet152", 1, 28): (58_155_466, 2_902_930_432),
    ("resnet152", 3, 32): (58_156_618, 3_722_137_600),
}
FAMILIES = tuple(dict.fromkeys(name for name, _, _ in COSTS))
DEEP = ("vgg16", "vgg19", "googlenet", "resnet34", "resnet50", "resnet101", "resnet152")
SLOW_IF_DEEP = [pytest.param(name, marks=pytest.mark.exhaustive if name in DEEP else ()) for name in FAMILIES]


def classifier(name: str, num_channels: int = 3, image_size: int = 32) -> Classifier:
    torch.manual_seed(0)
    network = build_network(name, num_channels=num_channels, image_size=image_size, num_classes=10, widths=())
    return Classifier(network, torch.full((num_channels,), 120.0), torch.full((num_channels,), 60.0))


def pixels(num_images: int, num_channels: int = 3, image_size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_images)
    return torch.randint(
        256, (num_images, num_channels, image_size, image_size), dtype=torch.uint8, generator=generator
    )


@pytest.mark.parametrize(("shape", "cost"), COSTS.items(), ids=lambda value: "-".join(map(str, value)))
def test_parameters_and_multiply_adds_are_those_of_the_docstrings(
    shape: tuple[str, int, int], cost: tuple[int, int]
) -> None:
    name, num_channels, size = shape
    found = cost_of(
        lambda: build_network(name, num_channels=num_channels, image_size=size, num_classes=10, widths=()),
        num_channels=num_channels,
        image_size=size,
    )
    assert (found.num_parameters, found.multiply_adds) == cost


def test_lenets_first_layer_is_that_of_the_lectures_page_13() -> None:
    network = build_network("lenet5", num_channels=1, image_size=28, num_classes=10, widths=())
    first = network.get_submodule("conv1")
    assert sum(parameter.numel() for parameter in first.parameters()) == 156
    shapes = []
    first.register_forward_hook(lambda module, args, output: shapes.append((args[0].shape, output.shape)))
    network(torch.zeros(1, 1, 28, 28))
    assert shapes == [((1, 1, 32, 32), (1, 6, 28, 28))]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [28, 32, 64])
def test_images_of_any_usual_size_are_taken(name: str, size: int) -> None:
    with torch.device("meta"):
        network = build_network(name, num_channels=3, image_size=size, num_classes=7, widths=())
        assert network(torch.empty(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", FAMILIES)
def test_images_that_are_too_small_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="takes images of at least"):
        build_network(name, num_channels=1, image_size=4, num_classes=10, widths=())


@pytest.mark.parametrize("name", SLOW_IF_DEEP)
def test_a_few_steps_lower_the_loss(name: str) -> None:
    model = classifier(name).train()
    images, labels = pixels(8), torch.arange(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] < 5  # ln 10 is 2.3: the initial weights answer at a sensible scale


@pytest.mark.parametrize("name", SLOW_IF_DEEP)
def test_torchscript_and_torch_export_answer_alike_for_every_batch_size(name: str) -> None:
    model = classifier(name).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and says so at each step
        traced = torch.jit.trace(model, (pixels(2),))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        traced = torch.jit.load(file)
        exported = torch.export.export(
            model, (pixels(2),), dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}}
        ).module()
    with torch.no_grad():
        for batch_size in (1, 3):
            images = pixels(batch_size)
            expected = model(images)
            for exporteds in (traced, exported):
                assert torch.allclose(exporteds(images), expected, atol=1e-4)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", FAMILIES)
def test_onnx_answers_alike_for_every_batch_size(name: str, tmp_path: Path) -> None:
    import onnxruntime

    model = classifier(name, 1, 28).eval()
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
        with torch.no_grad():
            assert torch.allclose(torch.from_numpy(found), model(images), atol=1e-4)
