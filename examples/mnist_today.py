"""The lecture's MNIST training (pages 41 and 42) as it is written today. See `mnist_2018.py`.

It is trained on 4,000 images of mnist-mini and measured on 1,000 others. Run it with `python examples/mnist_today.py`.
"""

import torch
from torch import nn
from torch.nn import functional as F

from trainer.data import load_dataset
from trainer.paths import default_data_dir

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
data = load_dataset("mnist-mini", default_data_dir(), log=print).train
images, labels = data.images[:].float().to(device), data.labels.to(device)
images = (images - images[:4000].mean()) / images[:4000].std()

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
    for batch, target in zip(images[:4000].split(100), labels[:4000].split(100), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(net(batch), target).backward()
        optimizer.step()

with torch.inference_mode():
    errors = (net(images[4000:]).argmax(dim=1) != labels[4000:]).sum().item()
print(f"error on new images {100 * errors / len(labels[4000:]):.2f} %")
