"""Writes images for the tests."""

import pickle
from pathlib import Path

import numpy as np
from PIL import Image

SQUARE = np.zeros((32, 32), bool)  # a defect
SQUARE[4:12, 8:20] = True


def save(path, pixels, **options):
    """Pixels as a file, whose folders are made; returns its path as text."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return str(path)


def image(path, seed=0, size=32):
    return save(path, np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


def cifar10(root, labels):
    """Files as torchvision reads them, an image of each class, whose pixels tell file and class."""
    folder = Path(root, "cifar-10-batches-py")
    folder.mkdir(parents=True)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": labels}))
    for file, name in enumerate(["test_batch", *(f"data_batch_{i}" for i in range(1, 6))]):
        rows = np.repeat(np.arange(10, dtype=np.uint8)[:, None] + 10 * file, 3072, axis=1)
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": list(range(10))}))
