"""Writes images for the tests."""

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
