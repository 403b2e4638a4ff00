"""Plain DistributedDataParallel with our data and network, to compare `World.all_reduce` and virtual shards with.

Run by `benchmarks/training.py` under torchrun; prints one JSON line. Everything but the reduction is as in a run of the
recipe `mnist`: pixels from one tensor, channels last, bfloat16 where that is fast, one thread per rank.
"""

import json
import os
import statistics
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from convoy.allocator import keep_freed_memory
from trainer.data import load_dataset
from trainer.hardware import has_fast_bfloat16
from trainer.models import Classifier
from trainer.models.lecture import LectureNet
from trainer.paths import default_data_dir

BATCH_SIZE, NUM_STEPS, WINDOW = 100, 1000, 50


def main() -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    dataset = load_dataset("mnist", default_data_dir(), log=lambda line: None)
    network = LectureNet(num_channels=1, image_size=28, num_classes=10)
    model = Classifier(network, torch.tensor(dataset.mean), torch.tensor(dataset.std))
    model.to(memory_format=torch.channels_last)
    ddp = DistributedDataParallel(model, static_graph=True, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(0))
    use_bfloat16 = has_fast_bfloat16(torch.device("cpu"))
    windows = []
    for step in range(NUM_STEPS):
        if step % WINDOW == 0:
            began = time.perf_counter()
        start = step * BATCH_SIZE % (len(order) - BATCH_SIZE)
        batch = order[start : start + BATCH_SIZE][rank * BATCH_SIZE // size : (rank + 1) * BATCH_SIZE // size]
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=use_bfloat16):
            logits = ddp(dataset.train.images[batch])
        F.cross_entropy(logits.float(), dataset.train.labels[batch]).backward()
        optimizer.step()
        if step % WINDOW == WINDOW - 1:
            windows.append(WINDOW * BATCH_SIZE / (time.perf_counter() - began))
    if rank == 0:
        print(json.dumps({"images_per_second": statistics.median(windows[1:])}))
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort a process that exits in the usual way


if __name__ == "__main__":
    main()
