"""LeNet-5 (LeCun, Bottou, Bengio and Haffner, 1998; page 13 of the lecture)."""

import torch
import torch.nn.functional as F
from torch import nn

from trainer.errors import ConfigError

MIN_IMAGE_SIZE = 16
_PAPERS_IMAGE_SIZE = 32


class LeNet5(nn.Module):
    """conv 5x5x6, pool 2, conv 5x5x16, pool 2, fc 120, fc 84, fc.

    What differs from the paper: ReLU instead of a scaled tanh; maxima instead of averages with a learnt factor; every
    map of C3 sees all six of S2, not a chosen few; logits and cross-entropy instead of radial basis functions. Images
    smaller than the paper's 32x32 pixels are framed with zeros up to it (of the normalised image, so: with its mean),
    as the paper framed MNIST's 28x28. For larger ones the first fully connected layer grows.

    61,706 parameters (the paper: 60,000) and 416,520 multiply-adds for 1x28x28 images and 10 classes; 62,006 and
    651,720 for 3x32x32.

    Args:
        num_channels: of the images.
        image_size: height and width in pixels; at least 16.
        num_classes: logits.

    Raises:
        ConfigError: the images are too small.
    """

    def __init__(self, *, num_channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        if image_size < MIN_IMAGE_SIZE:
            raise ConfigError(f"LeNet-5 takes images of at least 16 x 16 pixels, not {image_size} x {image_size}")
        missing = max(0, _PAPERS_IMAGE_SIZE - image_size)
        self.frame = (missing // 2, missing - missing // 2) * 2
        final_size = ((image_size + missing - 4) // 2 - 4) // 2
        self.conv1 = nn.Conv2d(num_channels, 6, kernel_size=5)
        self.conv2 = nn.Conv2d(6, 16, kernel_size=5)
        self.fc1 = nn.Linear(16 * final_size**2, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits `[B, num_classes]` of normalised images `[B, num_channels, image_size, image_size]`."""
        x = F.pad(images, self.frame)
        x = F.max_pool2d(F.relu(self.conv1(x)), kernel_size=2)
        x = F.max_pool2d(F.relu(self.conv2(x)), kernel_size=2)
        x = F.relu(self.fc2(F.relu(self.fc1(x.flatten(1)))))
        logits: torch.Tensor = self.fc3(x)
        return logits
