"""A plain PyTorch training loop: torchvision's data set and transforms, a DataLoader, DDP, torch.optim.

Run by `benchmarks/training.py` under torchrun; prints one JSON line.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from torch.utils.data.distributed import DistributedSampler
from torchvision import datasets, transforms


class Net(nn.Module):
    """The net on page 42 of the lecture."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=5)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=5)
        self.fc1 = nn.Linear(256, 200)
        self.fc2 = nn.Linear(200, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 3))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.relu(self.fc1(x.view(-1, 256)))
        return self.fc2(x)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-steps", type=int, default=10**9)
    parser.add_argument("--num-images", type=int, required=True, help="images per epoch")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    dist.init_process_group("gloo")
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    train_set = Subset(datasets.MNIST(args.root, train=True, transform=transform), range(args.num_images))
    sampler = DistributedSampler(train_set)
    loader = DataLoader(train_set, batch_size=100 // dist.get_world_size(), sampler=sampler, num_workers=args.workers)
    model = DistributedDataParallel(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    began = time.perf_counter()
    warm = began
    for step, (images, labels) in enumerate(loader):
        if step == 20:
            warm = time.perf_counter()
        if step == args.max_steps:
            break
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    else:
        step += 1
    ended, ended_at = time.perf_counter(), time.time()
    if dist.get_rank() == 0:
        rate = (step - 20) * 100 / (ended - warm)
        print(json.dumps({"images_per_second": rate, "seconds": ended - began, "ended_at": ended_at, "steps": step}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
