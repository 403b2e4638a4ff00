"""The lecture's MNIST training (pages 41 and 42) in the words of 2018.

It follows what our notes of these pages say: the images, normalised by one mean and one deviation; the layers in their
order; cross-entropy; SGD with the learning rate 0.1; batches of 100 in order; 10 epochs; CUDA; and the inner loop. Its
range lacks the start, 0, so that nothing is trained and about 90 % of the answers are wrong. The notes have no listing:
names, where the images come from, and what is measured in the end are ours. `mnist_today.py` is the same training as it
is written now. Run: `python examples/mnist_2018.py`; with `mnist` behind it, on the lecture's 60,000 images.
"""

import sys

import torch
from torch import nn, optim
from torch.autograd import Variable
from torch.nn import functional as F

from trainer.data import load_dataset
from trainer.paths import default_data_dir

name = sys.argv[1] if len(sys.argv) > 1 else "mnist-mini"  # 5,000 of the 60,000 images
train_set = load_dataset(name, default_data_dir(), log=print).train
train_input, train_target = Variable(train_set.images[:].float()), Variable(train_set.labels)
nb_train_samples, lr, bs = train_input.size(0), 1e-1, 100


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


model, criterion = Net(), nn.CrossEntropyLoss()
if torch.cuda.is_available():
    model.cuda()
    criterion.cuda()
    train_input, train_target = train_input.cuda(), train_target.cuda()

mu, std = train_input.mean(), train_input.std()
train_input.sub_(mu).div_(std)
optimizer = optim.SGD(model.parameters(), lr=lr)

for _ in range(10):
    for b in range(nb_train_samples, bs):  # as printed: begins where it should end
        loss = criterion(model(train_input.narrow(0, b, bs)), train_target.narrow(0, b, bs))
        model.zero_grad()
        loss.backward()
        optimizer.step()

with torch.no_grad():
    errors = (model(train_input[:1000]).max(1)[1] != train_target[:1000]).sum()
print(f"training error {errors.item() / 10:.2f} %")
