"""Tests that folding removes operations and keeps the outputs."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from trainer.evaluation.views import NUM_VIEWS, average_views
from trainer.export.folding import fold
from trainer.models import Classifier, build_network
from trainer.models.airbench import AirbenchNet
from trainer.recipes import TestTimeViews

NETWORKS = {
    "lecture": {"num_channels": 1, "image_size": 28, "widths": ()},
    "compact": {"num_channels": 1, "image_size": 28, "widths": (16, 32, 32, 64)},
    "airbench": {"num_channels": 3, "image_size": 32, "widths": (8, 16, 16)},
    "resnet18": {"num_channels": 3, "image_size": 32, "widths": ()},
}


def make_classifier(name: str, *, mean: float = 120.0, std: float = 60.0) -> Classifier:
    """Returns a network with fresh weights, and norms with statistics of their own."""
    torch.manual_seed(0)
    shape = NETWORKS[name]
    network = build_network(name, num_classes=10, **shape)  # type: ignore[arg-type]
    channels = torch.ones(shape["num_channels"])  # type: ignore[call-overload]
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean = torch.randn_like(norm.bias)
            norm.running_var = torch.rand_like(norm.bias) + 0.5
            nn.init.normal_(norm.bias)
    classifier = Classifier(network, mean * channels, std * channels)
    if isinstance(network, AirbenchNet):
        network.init_whitening(classifier.normalize(pixels(classifier, 100)))
    return classifier.eval()


def pixels(classifier: Classifier, number: int) -> torch.Tensor:
    size = 28 if classifier.mean.size(1) == 1 else 32
    return torch.randint(0, 256, (number, classifier.mean.size(1), size, size), dtype=torch.uint8)


@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_outputs_stay_the_same(name: str) -> None:
    classifier = make_classifier(name)
    images = pixels(classifier, 20)
    expected = classifier(images)
    logits, probabilities = fold(classifier)(images)
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-6 * float(expected.abs().max()))
    torch.testing.assert_close(probabilities, expected.softmax(dim=1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(classifier(images), expected, rtol=0, atol=0)  # the original is not changed


@pytest.mark.parametrize("name", NETWORKS)
def test_norms_divisors_and_normalization_are_folded(name: str) -> None:
    folded = fold(make_classifier(name))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert "/" not in folded.network.code  # type: ignore[operator]
    assert folded.pixel_std is None
    # A convolution that pads with zeros needs pixels whose mean is 0.
    assert (folded.pixel_mean is None) == (name in ("lecture", "airbench"))


@torch.inference_mode()
def test_a_mean_of_many_standard_deviations_is_subtracted_first() -> None:
    classifier = make_classifier("lecture", mean=250.0, std=0.5)
    folded = fold(classifier)
    assert folded.pixel_mean is not None
    images = pixels(classifier, 20)
    expected = classifier(images)
    torch.testing.assert_close(folded(images)[0], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


class SharedConvolution(nn.Module):
    """A convolution whose output has two readers, and norms that cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.before = nn.BatchNorm2d(1)
        self.head = nn.Linear(4, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.before(images))
        logits: torch.Tensor = self.head((self.norm(x) + x).amax(dim=(2, 3)))
        return logits / 3


@torch.inference_mode()
def test_norms_that_cannot_be_folded_stay() -> None:
    network = SharedConvolution()
    nn.init.normal_(network.norm.bias)
    nn.init.constant_(network.before.bias, 0.5)
    classifier = Classifier(network, torch.tensor([30.0]), torch.tensor([70.0])).eval()
    folded = fold(classifier)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == 2
    assert folded.pixel_mean is not None
    assert folded.pixel_std is not None
    images = pixels(classifier, 10)
    torch.testing.assert_close(folded(images)[0], classifier(images), rtol=1e-5, atol=1e-5)


class NegativeScale(nn.Module):
    """A norm after a pooling, with one negative scale."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 10, 3), nn.BatchNorm2d(10)
        self.norm.weight.data[0] = -1.0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.norm(F.max_pool2d(self.conv(images), 2))
        return x.amax(dim=(2, 3))


@torch.inference_mode()
def test_a_norm_with_a_negative_scale_stays_after_its_pooling() -> None:
    classifier = Classifier(NegativeScale(), torch.tensor([30.0]), torch.tensor([70.0])).eval()
    images = pixels(classifier, 10)
    torch.testing.assert_close(fold(classifier)(images)[0], classifier(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("views", NUM_VIEWS)
@pytest.mark.parametrize("name", ["lecture", "airbench"])
@torch.inference_mode()
def test_views_are_averaged(name: str, views: TestTimeViews) -> None:
    classifier = make_classifier(name)
    images = pixels(classifier, 20)
    expected = average_views(classifier, images, views)
    logits, probabilities = fold(classifier, views)(images)
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-6 * float(expected.abs().max()))
    torch.testing.assert_close(probabilities, expected.softmax(dim=1), rtol=1e-5, atol=1e-5)
    assert torch.allclose(expected, classifier(images)) == (views == "one")


class Branching(nn.Module):
    """torch.fx cannot trace a decision that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(images))
        return (x if x.mean() > -100 else -x).mean(dim=(2, 3))


class Twice(nn.Module):
    """One convolution with two norms after it, and a norm without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.plain = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3, affine=False)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.second(self.conv(self.first(self.conv(images))))
        return self.plain(x).mean(dim=(2, 3))


class Masked(nn.Module):
    """Takes an option that nobody gives, as timm's transformers do; tracing takes it as given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 5, 8), nn.BatchNorm2d(5)

    def forward(self, images: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x: torch.Tensor = self.norm(self.conv(images))
        return (x if mask is None else x * mask).mean(dim=(2, 3))


class Read(nn.Module):
    """The weights of a convolution that its norm would change are read once more."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(input=self.conv(images)))
        return F.conv_transpose2d(x, self.conv.weight).mean(dim=(2, 3))


def changed_convolution(change: Callable[[nn.Conv2d], nn.Module]) -> nn.Module:
    return nn.Sequential(change(nn.Conv2d(3, 3, 3)), nn.BatchNorm2d(3), nn.Conv2d(3, 5, 6))


def doubled(convolution: nn.Conv2d) -> nn.Conv2d:
    convolution.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    return convolution


@pytest.mark.parametrize(
    "network",
    [
        *(Branching(), Twice(), Masked(), Read(), nn.Conv2d(3, 5, 8)),
        *(changed_convolution(change) for change in (weight_norm, spectral_norm, orthogonal, doubled)),
    ],
)
@pytest.mark.parametrize("num_channels", [1, 3])
@torch.inference_mode()
def test_networks_of_the_user_stay_as_they_are_where_folding_would_change_them(
    network: nn.Module, num_channels: int
) -> None:
    """Grey images of a network for colours have their channel repeated by the normalisation, which then stays."""
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean, norm.running_var = torch.randn(norm.num_features), torch.rand(norm.num_features) + 0.5
            if norm.affine:
                nn.init.normal_(norm.weight)
    mean, std = torch.tensor([120.0, 110.0, 100.0]), torch.tensor([60.0, 50.0, 40.0])
    classifier = Classifier(network, mean, std, num_channels=num_channels).eval()
    images = torch.randint(256, (4, num_channels, 8, 8), dtype=torch.uint8)
    expected = classifier(images).flatten(1)
    for _ in range(2):  # the first time changes nothing in the classifier
        logits, _ = fold(classifier)(images)
        torch.testing.assert_close(logits.flatten(1), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        torch.testing.assert_close(classifier(images).flatten(1), expected)
