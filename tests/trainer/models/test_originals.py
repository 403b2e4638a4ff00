"""torchvision's networks, and fine-tuning from published weights that were placed by hand."""

import urllib.request
from pathlib import Path

import pytest
import torch

from trainer.errors import ConfigError, DataError
from trainer.models import build_network
from trainer.models.cost import count_cost
from trainer.models.layers import dropout_layers
from trainer.models.originals import build_original
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
    """An empty cache of torch's, with the folder in which weights are looked for."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def build(name: str = "resnet18", *, num_channels: int = 3, image_size: int = 64) -> torch.nn.Module:
    shape = {"num_channels": num_channels, "image_size": image_size, "num_classes": 4}
    return build_network(f"pretrained:{name}", **shape, widths=())  # type: ignore[arg-type]


def test_published_weights_are_kept_but_for_the_last_layer(torch_home: Path) -> None:
    torch.manual_seed(1)
    published = build_original("resnet18").state_dict()
    torch.save(published, torch_home / "resnet18-f37072fd.pth")
    network = build()
    mine = network.state_dict()
    assert mine["fc.weight"].shape == (4, 512)
    assert all(torch.equal(mine[name], published[name]) for name in mine if not name.startswith("fc."))
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 4)


def test_weights_that_cannot_be_had_are_one_line(torch_home: Path) -> None:
    (torch_home / "resnet18-f37072fd.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(DataError, match=r"resnet18-f37072fd.pth is damaged: remove it"):
        build()


def test_without_a_network_the_way_out_is_told(torch_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(urllib.request, "_opener", None)  # which would keep the proxies, here or from here on
    with pytest.raises(DataError, match=r"place the file at .*resnet18-f37072fd.pth by hand"):
        build()


def test_grey_and_small_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="colour images"):
        build(num_channels=1)
    with pytest.raises(ConfigError, match="at least 64 x 64"):
        build(image_size=32)
