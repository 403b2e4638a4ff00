"""torchvision's networks for ImageNet-size images: the originals behind our small-image forms.

They are here for two purposes: the cost study, which needs no weights, and fine-tuning on folders of images, which
begins from the weights that torchvision publishes, fetched once into torch's own cache (`$TORCH_HOME`, by default
`~/.cache/torch`), or placed there by hand where there is no network. torchvision is imported when first asked.
"""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.error import URLError

import torch
from torch import nn

from trainer.errors import ConfigError, DataError
from trainer.models.layers import Dropout, check_image_size

MIN_IMAGE_SIZE = 64


def build_original(name: str, *, num_classes: int = 1000) -> nn.Module:
    """torchvision's network of that name, for 3x224x224 images, with fresh weights and without auxiliary heads.

    Its dropout is ours, at torchvision's rates: a continued run must drop what the undisturbed one does.
    """
    from torchvision import models

    options: dict[str, Any] = {"num_classes": num_classes}
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": False}
    network: nn.Module = models.get_model(name, weights=None, **options)
    dropouts = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Dropout)]
    for layer, (name, module) in enumerate(dropouts):
        network.set_submodule(name, Dropout(module.p, layer=layer))
    return network


def build_pretrained(name: str, *, num_channels: int, image_size: int, num_classes: int) -> nn.Module:
    """The network with torchvision's first published ImageNet weights (IMAGENET1K_V1), but for a new last layer.

    Raises:
        ConfigError: the images are grey or too small.
        DataError: the weights are not there and cannot be fetched.
    """
    if num_channels != 3:
        raise ConfigError(
            f"fine-tuning takes colour images: these have {num_channels} channel, and {name} was taught 3"
        )
    check_image_size(f"fine-tuning of {name}", image_size, MIN_IMAGE_SIZE)
    network = build_original(name, num_classes=num_classes)
    head = _head(network)
    weights = _published_weights(name)
    mine = network.state_dict()
    # Auxiliary heads are not in ours; the last layer has other classes.
    kept = {key: value for key, value in weights.items() if key in mine and not key.startswith(f"{head}.")}
    missing = sorted(key for key in mine if key not in kept and not key.startswith(f"{head}."))
    if missing:
        raise DataError(f"the published weights of {name} lack {missing[0]}: this torchvision has changed its layers")
    network.load_state_dict({**mine, **kept})
    return network


def _published_weights(name: str) -> dict[str, torch.Tensor]:
    from torchvision import models

    from trainer.data.store import hold_lock

    published = models.get_model_weights(name)["IMAGENET1K_V1"]
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / Path(published.url).name
    try:
        with hold_lock(folder / f"{path.name}.lock", print):  # one download, however many ranks
            if not path.exists():
                torch.hub.download_url_to_file(published.url, str(path), _digest_prefix(path), progress=False)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except UnpicklingError as error:
        raise DataError(f"{path} is damaged: remove it to fetch it again, or place the file there by hand") from error
    except (URLError, OSError, RuntimeError) as error:
        raise DataError(
            f"cannot fetch the published weights of {name} from {published.url} ({error}): "
            f"place the file at {path} by hand"
        ) from error


def _digest_prefix(path: Path) -> str:
    """The first digits of its SHA-256, which are in the file's name."""
    return path.stem.rpartition("-")[2]


def _head(network: nn.Module) -> str:
    """The name of the last linear layer."""
    linear: list[str] = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return linear[-1]
