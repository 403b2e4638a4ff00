"""Asks a server what images show: `python examples/classify.py [--target HOST:PORT] [--model NAME] [IMAGE ...]`."""

import argparse
from pathlib import Path

from serving.client import Client

parser = argparse.ArgumentParser()
parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE")
parser.add_argument("--target", default="127.0.0.1:8001")
parser.add_argument("--model", default="mnist")
options = parser.parse_args()
images = options.images or sorted((Path(__file__).parent / "digits").glob("*.png"))

with Client(options.target) as client:
    for image, result in zip(images, client.classify(options.model, images, top_k=1), strict=True):
        best = result.predictions[0]
        print(f"{image}: {best.label} ({best.probability:.1%})")
