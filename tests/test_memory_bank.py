"""memory_bank.py against the same bank by SciPy and scikit-learn, and its table of the toy set."""
import numpy as np
import pytest
import scipy.ndimage
import torch
from sklearn.neighbors import NearestNeighbors

import data
import memory_bank

CLASSES = list(data.TOY)[:2]


def patches(backbone, images):
    """N x 16 x C of 64 x 64 pixels. Half the size: the mean of 2 x 2; a quarter: of 4 x 4's middle 2 x 2."""
    x = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - backbone.image_mean) / backbone.image_std
    levels = []
    for level in backbone.net(x):
        level = scipy.ndimage.uniform_filter(level.double().numpy(), (1, 1, 3, 3), mode="constant")
        step = level.shape[-1] // 4
        middle = {(step - 1) // 2, step // 2}
        levels.append(np.mean([level[:, :, i::step, j::step] for i in middle for j in middle], 0))
    return np.concatenate(levels, 1).reshape(len(images), -1, 16).transpose(0, 2, 1)


def test_maps_are_the_distances_to_the_nearest_training_patch():
    torch.manual_seed(0)
    backbone = memory_bank.Patches("resnet18", 64, "none", (4, 8, 16))
    train, test = np.random.default_rng(0).integers(0, 256, (2, 4, 64, 64, 3), dtype=np.uint8)
    maps = memory_bank.bank_maps(backbone, train, test, torch.device("cpu"))
    bank, queries = patches(backbone, train), patches(backbone, test)
    std = bank.std((0, 1))
    std = np.maximum(std, 0.01 * std.mean())
    bank, queries = (x.reshape(64, -1) / std for x in (bank, queries))
    distances, _ = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(bank).kneighbors(queries)
    expected = [scipy.ndimage.zoom(s, 16, order=1, mode="nearest", grid_mode=True)
                for s in distances.reshape(4, 4, 4)]
    np.testing.assert_allclose(maps, expected, rtol=2e-3)  # features are kept in half precision


def test_table_of_the_toy_set(capsys):
    memory_bank.main(["--weights", "none", "--backbone", "resnet18", "--size", "64", "--classes", *CLASSES])
    lines = capsys.readouterr().out.splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("class ")):]
    assert [line.split()[0] for line in table if not line.startswith("-")] == ["class", *CLASSES, "mean"]
    assert float(table[-1].split()[1]) > 0.9  # an untrained backbone sees the defects too


def test_a_bank_is_of_its_own_class(monkeypatch):
    counts = []

    def bank_maps(backbone, train, test, device):
        counts.append((len(train), len(test)))
        return np.full(test.shape[:3], len(counts))

    monkeypatch.setattr(memory_bank, "bank_maps", bank_maps)
    memory_bank.main(["--weights", "none", "--backbone", "resnet18", "--size", "64", "--classes", *CLASSES])
    assert counts == [(28, 22)] * 2


def test_an_error_is_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        memory_bank.main(["--weights", "none", "--classes", "nobody"])
    assert end.value.code == 2 and capsys.readouterr().err.startswith("error: --classes nobody")
