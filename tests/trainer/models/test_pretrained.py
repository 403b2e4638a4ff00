"""torchvision's networks, and their published weights: downloaded once, or placed by hand."""

import hashlib
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.trainer.data.faulty_server import FaultyServer, whole
from trainer.errors import ConfigError, DataError
from trainer.models import Classifier, build_network
from trainer.models.cost import count_cost
from trainer.models.layers import dropout_layers
from trainer.models.pretrained import build_original
from trainer.models.torchvision_nets import torchvision_normalization
from trainer.recipes import PRETRAINED


@pytest.mark.parametrize("name", PRETRAINED)
def test_costs_are_those_of_torchvisions_own_metadata(name: str) -> None:
    from torchvision import models

    meta = models.get_model_weights(name)["IMAGENET1K_V1"].meta
    cost = count_cost(lambda: build_original(name), num_channels=3, image_size=224)
    assert cost.num_parameters == meta["num_params"]
    assert cost.multiply_adds / 1e9 == pytest.approx(meta["_ops"], rel=0.01)


def test_dropout_is_ours_at_torchvisions_rates() -> None:
    with torch.device("meta"):
        network = build_original("vgg16")
    assert [(dropout.rate, dropout.layer) for dropout in dropout_layers(network)] == [(0.5, 0), (0.5, 1)]
    assert not any(isinstance(module, torch.nn.Dropout) for module in network.modules())


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch's cache of weights, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def build(name: str = "resnet18", *, num_channels: int = 3, image_size: int = 64) -> torch.nn.Module:
    shape = {"num_channels": num_channels, "image_size": image_size, "num_classes": 4}
    return build_network(f"pretrained:{name}", **shape, widths=())  # type: ignore[arg-type]


def place(content: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Saves a file and makes torchvision name it, with its right digest, as the weights of every network."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path = folder / f"weights-{hashlib.sha256(buffer.getvalue()).hexdigest()[:8]}.pth"
    path.write_bytes(buffer.getvalue())
    weights = {"IMAGENET1K_V1": SimpleNamespace(url=f"http://127.0.0.1:9/{path.name}")}
    monkeypatch.setattr("torchvision.models.get_model_weights", lambda _name: weights)
    return path


def test_published_weights_are_kept_but_for_the_last_layer(torch_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    published = build_original("resnet18").state_dict()
    place(published, torch_home, monkeypatch)
    network = build()
    mine = network.state_dict()
    assert mine["fc.weight"].shape == (4, 512)
    assert all(torch.equal(mine[name], published[name]) for name in mine if not name.startswith("fc."))
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 4)


@pytest.mark.parametrize("name", PRETRAINED)
def test_pixels_are_normalised_as_those_that_the_weights_were_trained_on(name: str) -> None:
    from torchvision import models

    preset = models.get_model_weights(name)["IMAGENET1K_V1"].transforms(crop_size=8, resize_size=8)
    pixels = torch.randint(256, (1, 3, 8, 8), dtype=torch.uint8)
    expected = preset(pixels)
    if name == "googlenet":  # torchvision's network converts its pixels if it has the published weights
        expected = models.GoogLeNet._transform_input(SimpleNamespace(transform_input=True), expected)
    mean, std = (torch.tensor(values) for values in torchvision_normalization(name))
    assert torch.allclose(Classifier(torch.nn.Identity(), mean, std)(pixels), expected, atol=1e-5)


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer().running() as running:
        yield running


def publish(server: FaultyServer, name: str, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes torchvision name a file on the server as the weights of every network."""
    server.routes[f"/{name}"] = whole(data)
    weights = {"IMAGENET1K_V1": SimpleNamespace(url=server.url + name)}
    monkeypatch.setattr("torchvision.models.get_model_weights", lambda _name: weights)


def test_weights_are_downloaded_once(torch_home: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    published = build_original("resnet18").state_dict()
    buffer = io.BytesIO()
    torch.save(published, buffer)
    name = f"resnet18-{hashlib.sha256(buffer.getvalue()).hexdigest()[:8]}.pth"
    publish(server, name, buffer.getvalue(), monkeypatch)
    with ThreadPoolExecutor(2) as pool:  # a file lock excludes threads as it does processes
        networks = list(pool.map(lambda _: build(), range(2)))
    assert server.requests == {f"/{name}": 1}
    assert all(torch.equal(each.state_dict()["conv1.weight"], published["conv1.weight"]) for each in networks)
    assert {path.name for path in torch_home.iterdir()} == {name, f"{name}.lock"}


def test_weights_with_another_digest_are_refused(
    torch_home: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(server, "resnet18-00000000.pth", b"another file", monkeypatch)
    with pytest.raises(DataError, match=r"sent another file \(sha256 \w{8}, not 00000000\)\): place the file at"):
        build()
    assert not list(torch_home.glob("*.pth"))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\3\4 and nothing else"])
def test_a_file_placed_by_hand_must_be_the_published_one(torch_home: Path, content: bytes) -> None:
    """The last rule also refuses the weights of another network of the same shapes."""
    (torch_home / "resnet18-f37072fd.pth").write_bytes(content)
    found = hashlib.sha256(content).hexdigest()[:8]
    with pytest.raises(DataError, match=rf"is not the published file \(sha256 {found}, not f37072fd\): remove it"):
        build()


def test_a_folder_in_place_of_the_weights_is_named(torch_home: Path) -> None:
    (torch_home / "resnet18-f37072fd.pth").mkdir()
    with pytest.raises(DataError, match=r"resnet18-f37072fd\.pth cannot be read: Is a directory"):
        build()


@pytest.mark.parametrize("content", [[1, 2], 7, {}, {"fc.weight": torch.zeros(1)}, {"conv1.weight": torch.zeros(1)}])
def test_a_published_file_with_other_content_is_one_line(
    torch_home: Path, content: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(content, torch_home, monkeypatch)
    with pytest.raises(DataError, match=r"does not hold weights: |the published weights of resnet18 have no such "):
        build()


def test_a_path_that_is_not_utf8_holds_weights(
    torch_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9") / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(folder.parent.parent))
    place(build_original("resnet18").state_dict(), folder, monkeypatch)
    assert build().fc.weight.shape == (4, 512)  # type: ignore[union-attr]


def test_without_a_home_directory_the_message_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(DataError, match="no home directory: set TORCH_HOME"):
        build()


def test_without_a_network_the_message_names_the_path(torch_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # no server listens there
    with pytest.raises(DataError, match=r"place the file at .*resnet18-f37072fd.pth by hand"):
        build()


def test_grey_and_small_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="colour images"):
        build(num_channels=1)
    with pytest.raises(ConfigError, match="at least 64 x 64"):
        build(image_size=32)
