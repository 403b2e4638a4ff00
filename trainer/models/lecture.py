"""The MNIST convnet of Fleuret's AMLD 2018 introduction to PyTorch (page 42 of the lecture)."""

import torch
from torch import nn

from trainer.kernels.operations import conv_pool_relu, linear
from trainer.models.layers import check_image_size

MIN_IMAGE_SIZE = 22


class LectureNet(nn.Module):
    """conv 5x5x32, max-pool 3, ReLU, conv 5x5x64, max-pool 2, ReLU, fc 200, ReLU, fc.

    105,506 parameters for the lecture's 1x28x28 images and 10 classes. Other image sizes only
    change the number of inputs of the first fully connected layer.

    Args:
        image_size: height and width in pixels; at least 22.

    Raises:
        ConfigError: the images are too small.
    """

    suits_kernels = True
    """Weights are used in their layers alone, so that a step may cast them together; a forward pass keeps no state."""

    def __init__(self, *, num_channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        check_image_size("the lecture's net", image_size, MIN_IMAGE_SIZE)
        final_size = ((image_size - 4) // 3 - 4) // 2
        self.conv1 = nn.Conv2d(num_channels, 32, kernel_size=5)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=5)
        self.fc1 = nn.Linear(64 * final_size**2, 200)
        self.fc2 = nn.Linear(200, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns logits `[B, num_classes]` of normalised images `[B, num_channels, image_size, image_size]`."""
        x = conv_pool_relu(images, self.conv1, 3)
        x = conv_pool_relu(x, self.conv2, 2, flat=True)
        return linear(linear(x, self.fc1, relu=True), self.fc2)
