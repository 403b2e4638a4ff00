"""Data sets: verified, decoded once, and mapped into every process as uint8 tensors."""

from trainer.data.content import Dataset, Images, ImageSet
from trainer.data.datasets import load_dataset, without_test_images

__all__ = ["Dataset", "ImageSet", "Images", "load_dataset", "without_test_images"]
