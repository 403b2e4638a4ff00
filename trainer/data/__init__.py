"""Data sets: verified, decoded once, and mapped into every process as uint8 tensors."""

from trainer.data.datasets import (
    Dataset,
    Images,
    ImageSet,
    dataset_names,
    load_dataset,
    split_validation,
    without_test_images,
)

__all__ = [
    "Dataset",
    "ImageSet",
    "Images",
    "dataset_names",
    "load_dataset",
    "split_validation",
    "without_test_images",
]
