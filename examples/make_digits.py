"""Writes one image of each digit into a folder: `python examples/make_digits.py [FOLDER]`.

The images are training images of mnist-mini, which comes with Convoy. So the model `mnist` has trained on them: its
answers show that serving works, and say nothing about its accuracy.
"""

import sys
from pathlib import Path

from PIL import Image

from trainer.data import load_dataset
from trainer.paths import default_data_dir

folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "digits"
folder.mkdir(parents=True, exist_ok=True)
train = load_dataset("mnist-mini", default_data_dir(), log=print).train
labels = train.labels.tolist()
for digit in range(10):
    pixels = train.images[labels.index(digit)][0].numpy()
    Image.fromarray(pixels).save(folder / f"{digit}.png")
