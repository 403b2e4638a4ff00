"""The lecture's MNIST training (pages 41 and 42) as it is written today. See `mnist_2018.py`.

It trains on four fifths of the training images, and is measured on the rest: test images are for the end of a study.
Run: `python examples/mnist_today.py`; with `mnist` behind it, on 60,000 images.
"""

import sys

import torch
from torch import nn
from torch.nn import functional as F

from trainer.data import load_dataset
from trainer.paths import default_data_dir

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
data = load_dataset(sys.argv[1] if len(sys.argv) > 1 else "mnist-mini", default_data_dir(), log=print).train
images, labels = data.images[:].float().to(device), data.labels.to(device)
known = len(images) * 4 // 5
images = (images - images[:known].mean()) / images[:known].std()

net = nn.Sequential(
    nn.Conv2d(1, 32, kernel_size=5),
    nn.MaxPool2d(3),
    nn.ReLU(),
    nn.Conv2d(32, 64, kernel_size=5),
    nn.MaxPool2d(2),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(256, 200),
    nn.ReLU(),
    nn.Linear(200, 10),
).to(device)
optimizer = torch.optim.SGD(net.parameters(), lr=1e-1)
for _ in range(10):
    for batch, target in zip(images[:known].split(100), labels[:known].split(100), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(net(batch), target).backward()
        optimizer.step()

with torch.inference_mode():
    answers = torch.cat([net(batch).argmax(dim=1) for batch in images[known:].split(1000)])
errors = (answers != labels[known:]).sum().item()
print(f"error on new images {100 * errors / len(answers):.2f} %")
