"""torchvision's networks with their published ImageNet weights, from which fine-tuning on folders of images starts.

The weights are downloaded once into torch's cache (`$TORCH_HOME`, by default `~/.cache/torch`), or placed there by hand
where there is no network. The cost study builds these networks without weights. torchvision is imported by the first
call.
"""

from pathlib import Path

import torch
from torch import nn

from trainer.errors import ConfigError, DataError
from trainer.files import sha256_of_file
from trainer.models.layers import Dropout, check_image_size
from trainer.models.torchvision_nets import build_torchvision
from trainer.models.weights import Weights, read_weights

MIN_IMAGE_SIZE = 64
_MAX_BYTES = 1 << 30
"""The largest published weights, those of vgg19, take about half of it."""


def build_original(name: str, *, num_classes: int = 1000) -> nn.Module:
    """Builds torchvision's network for 3x224x224 images, with random weights and without auxiliary heads.

    Its dropout layers are ours, at torchvision's rates: a resumed run must drop what an uninterrupted one drops.

    Args:
        name: torchvision's name of the network.
        num_classes: outputs of the last layer.
    """
    network = build_torchvision(name, image_size=224, num_classes=num_classes)
    dropouts = [(path, module) for path, module in network.named_modules() if isinstance(module, nn.Dropout)]
    for layer, (path, module) in enumerate(dropouts):
        network.set_submodule(path, Dropout(module.p, layer=layer))
    return network


def build_pretrained(name: str, *, num_channels: int, image_size: int, num_classes: int) -> nn.Module:
    """Builds a network with torchvision's first published ImageNet weights (IMAGENET1K_V1) and a new last layer.

    Args:
        name: torchvision's name of the network.
        num_channels: channels of the images; must be 3.
        image_size: width and height of the images; at least 64.
        num_classes: outputs of the last layer.

    Raises:
        ConfigError: the images are grey or too small.
        DataError: the weights cannot be downloaded, or the file is not the published one.
    """
    if num_channels != 3:
        raise ConfigError(
            f"fine-tuning takes colour images: these have {num_channels} channel, and {name} was trained on 3"
        )
    check_image_size(f"fine-tuning of {name}", image_size, MIN_IMAGE_SIZE)
    network = build_original(name, num_classes=num_classes)
    head = _head(network)
    weights = _published_weights(name)
    mine = network.state_dict()
    # Our network has no auxiliary heads, and the last layer has other classes.
    kept = {key: value for key, value in weights.items() if key in mine and not key.startswith(f"{head}.")}
    inherited = [key for key in mine if not key.startswith(f"{head}.")]
    unlike = sorted(key for key in inherited if key not in kept or kept[key].shape != mine[key].shape)
    if unlike:
        raise DataError(f"the published weights of {name} have no such {unlike[0]}: torchvision has changed its layers")
    network.load_state_dict({**mine, **kept})
    return network


def _published_weights(name: str) -> Weights:
    from torchvision import models

    url = models.get_model_weights(name)["IMAGENET1K_V1"].url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if path.parts[0] == "~":
        raise DataError(
            "torch keeps published weights in ~/.cache, but this user has no home directory: set TORCH_HOME"
        )
    try:
        _fetch_once(url, path)
    except (DataError, OSError, RuntimeError) as error:
        raise DataError(
            f"cannot fetch the published weights of {name} from {url} ({error}): place the file at {path} by hand"
        ) from error
    _check_published(path)
    return read_weights(path)


def _check_published(path: Path) -> None:
    """Checks the digest of a file of weights, downloaded or placed by hand.

    Raises:
        DataError: it cannot be read, or is not the published file.
    """
    try:
        found = sha256_of_file(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    published = _sha256_prefix(path)
    if not found.startswith(published):
        raise DataError(
            f"{path} is not the published file (sha256 {found[: len(published)]}, not {published}): remove it to fetch "
            "it again, or place the published file there"
        )


def _sha256_prefix(path: Path) -> str:
    """Returns the first digits of a file's SHA-256, which torchvision makes part of its name."""
    return path.stem.rpartition("-")[2]


def _fetch_once(url: str, path: Path) -> None:
    """Downloads the weights if they are missing, in one process of this machine."""
    from trainer.data.published.download import DownloadLimits, download
    from trainer.data.published.progress import LineProgress
    from trainer.data.staging import file_lock

    with file_lock(path.with_name(f"{path.name}.lock"), print):
        if not path.exists():
            download(
                url,
                path,
                max_bytes=_MAX_BYTES,
                limits=DownloadLimits(min_bytes_per_s=0),  # there is no other source
                progress=LineProgress(print),
                sha256_prefix=_sha256_prefix(path),
            )


def _head(network: nn.Module) -> str:
    """Returns the name of the last linear layer."""
    linear: list[str] = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return linear[-1]
