"""LeNet-5 (LeCun, Bottou, Bengio and Haffner, 1998; page 13 of the lecture)."""

import torch
import torch.nn.functional as F
from torch import nn

from trainer.models.layers import check_image_size

MIN_IMAGE_SIZE = 16
_PAPER_IMAGE_SIZE = 32


class LeNet5(nn.Module):
    """conv 5x5x6, pool 2, conv 5x5x16, pool 2, fc 120, fc 84, fc.

    Differences from the paper: ReLU instead of a scaled tanh; max-pooling instead of averages with a learned factor;
    every map of C3 sees all six of S2, not a chosen few; logits and cross-entropy instead of radial basis functions.
    Images smaller than the paper's 32x32 pixels are padded to it with zeros, the mean of a normalised image, as the
    paper pads MNIST's 28x28. Larger images make the first fully connected layer larger.

    61,706 parameters (the paper: 60,000) and 416,520 multiply-adds for 1x28x28 images and 10 classes; 62,006 and
    651,720 for 3x32x32.

    Args:
        image_size: height and width in pixels; at least 16.

    Raises:
        ConfigError: the images are too small.
    """

    def __init__(self, *, num_channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        check_image_size("LeNet-5", image_size, MIN_IMAGE_SIZE)
        missing = max(0, _PAPER_IMAGE_SIZE - image_size)
        self.padding = (missing // 2, missing - missing // 2) * 2
        final_size = ((image_size + missing - 4) // 2 - 4) // 2
        self.conv1 = nn.Conv2d(num_channels, 6, kernel_size=5)
        self.conv2 = nn.Conv2d(6, 16, kernel_size=5)
        self.fc1 = nn.Linear(16 * final_size**2, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns logits `[B, num_classes]` of normalised images `[B, num_channels, image_size, image_size]`."""
        x = F.pad(images, self.padding)
        x = F.max_pool2d(F.relu(self.conv1(x)), kernel_size=2)
        x = F.max_pool2d(F.relu(self.conv2(x)), kernel_size=2)
        x = F.relu(self.fc2(F.relu(self.fc1(x.flatten(1)))))
        logits: torch.Tensor = self.fc3(x)
        return logits
