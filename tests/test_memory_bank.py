"""memory_bank.py against scikit-learn's nearest neighbours, and its table of the toy set."""

import memory_bank
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestNeighbors

import mintad


@pytest.mark.parametrize(
    "kind, pool, aligned",
    [
        (memory_bank.Blurred, "blur", False),
        (mintad.Backbone, "area", False),
        (mintad.Backbone, "bilinear", True),
    ],
)
def test_map_is_the_distance_to_the_nearest_training_patch(kind, pool, aligned):
    net = kind("test_efficientnet", "none", 64, pool=pool)
    images = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
    maps = memory_bank.bank_maps(net, images[:5], images[5:], torch.device("cpu"))

    f = net(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    std = f[:5].std((0, 1))
    f = f / std.clamp_min(0.01 * std.mean())
    bank = NearestNeighbors(n_neighbors=1).fit(f[:5].flatten(0, 1))
    distances, _ = bank.kneighbors(f[5:].flatten(0, 1))
    s = torch.tensor(distances).view(3, 1, 4, 4)
    expected = F.interpolate(s, (64, 64), mode="bilinear", align_corners=aligned).squeeze(1)
    np.testing.assert_allclose(maps, expected, rtol=1e-3)


def test_a_class_has_a_bank_of_its_own(capsys):
    """Its row is the same whatever other class there is."""
    rows = []
    for classes in ["pill"], ["weave", "pill"]:
        toy = "--weights none --backbone test_efficientnet --size 64 --classes".split()
        memory_bank.main([*toy, *classes])
        table = capsys.readouterr().out.partition("class ")[2].splitlines()
        rows.append(next(line.split() for line in table if line.startswith("pill")))
    assert rows[0] == rows[1]
