"""The lecture's MNIST training (pages 41 and 42) as it was written in 2018, after our notes of its pages.

The loop over batches is as printed: its range lacks the start, 0, so that nothing is trained, and about 90 % of the
answers are wrong. `mnist_today.py` is the same training as it is written now. Run: `python examples/mnist_2018.py`.
"""

import torch
from torch import nn
from torch.autograd import Variable
from torch.nn import functional as F

from trainer.data import load_dataset
from trainer.paths import default_data_dir

data = load_dataset("mnist-mini", default_data_dir(), log=print)  # 5,000 images; the lecture has 60,000
train_input, train_target = Variable(data.train.images[:].float()), Variable(data.train.labels)
mu, std = train_input.mean(), train_input.std()
train_input.sub_(mu).div_(std)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=5)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=5)
        self.fc1 = nn.Linear(256, 200)
        self.fc2 = nn.Linear(200, 10)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), kernel_size=3))
        x = F.relu(F.max_pool2d(self.conv2(x), kernel_size=2))
        x = x.view(-1, 256)
        x = F.relu(self.fc1(x))
        return self.fc2(x)


model, criterion, lr, bs = Net(), nn.CrossEntropyLoss(), 1e-1, 100
for _ in range(10):
    for b in range(train_input.size(0), bs):  # as printed: begins where it should end
        loss = criterion(model(train_input.narrow(0, b, bs)), train_target.narrow(0, b, bs))
        model.zero_grad()
        loss.backward()
        for p in model.parameters():
            p.data.sub_(lr * p.grad.data)

with torch.no_grad():
    errors = (model(train_input[:1000]).max(1)[1] != train_target[:1000]).sum()
print(f"training error {errors.item() / 10:.2f} %")
