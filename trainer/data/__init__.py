"""Data sets: verified, decoded once, mapped into every process as uint8 tensors."""

from trainer.data.datasets import (
    Dataset,
    ImageSet,
    dataset_names,
    default_data_dir,
    full_name,
    image_folder,
    load_dataset,
    split_validation,
    without_test_images,
)

__all__ = [
    "Dataset",
    "ImageSet",
    "dataset_names",
    "default_data_dir",
    "full_name",
    "image_folder",
    "load_dataset",
    "split_validation",
    "without_test_images",
]
