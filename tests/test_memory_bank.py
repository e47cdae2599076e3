"""memory_bank.py against scikit-learn's nearest neighbours, and its table of the toy set."""

import argparse

import memory_bank
import numpy as np
import pytest
import scipy.ndimage
import torch
from sklearn.neighbors import NearestNeighbors

import mintad

TOY = "--weights none --backbone test_efficientnet --size 64".split()


def backbone(pool):
    torch.manual_seed(0)
    kind = memory_bank.Blurred if pool == "blur" else mintad.Backbone
    settings = {"data": "mvtec", "backbone": "test_efficientnet", "size": 64, "pool": pool}
    return kind(argparse.Namespace(**settings), "none")


def blurred(net, images):
    """N x 16 x C: a level's mean of 3 x 3, then the mean of the 2 x 2 at each cell's middle."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    levels = []
    for level in net.net((x - net.image_mean) / net.image_std)[1:]:
        level = scipy.ndimage.uniform_filter(level.numpy(), (1, 1, 3, 3), mode="constant")
        step = level.shape[-1] // 4
        middle = {(step - 1) // 2, step // 2}
        levels.append(np.mean([level[:, :, i::step, j::step] for i in middle for j in middle], 0))
    return np.concatenate(levels, 1).reshape(len(images), -1, 16).transpose(0, 2, 1)


def mintads(net, images):
    return net(torch.from_numpy(images).permute(0, 3, 1, 2) / 255).numpy()


@pytest.mark.parametrize(
    "pool, features, grid_mode",
    [("blur", blurred, True), ("bilinear", mintads, False), ("area", mintads, True)],
)
def test_map_is_the_distance_to_the_nearest_training_patch(pool, features, grid_mode):
    net = backbone(pool)
    train, test = np.random.default_rng(0).integers(0, 256, (2, 5, 64, 64, 3), np.uint8)
    maps = memory_bank.bank_maps(net, train, test[:3], torch.device("cpu"))
    patches = features(net, train)
    std = patches.std((0, 1), ddof=1)
    std = np.maximum(std, 0.01 * std.mean())
    bank, queries = (x.reshape(-1, len(std)) / std for x in (patches, features(net, test[:3])))
    distances, _ = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(bank).kneighbors(queries)
    mode = "nearest" if grid_mode else "constant"
    expected = [
        scipy.ndimage.zoom(s, 16, order=1, mode=mode, grid_mode=grid_mode)
        for s in distances.reshape(3, 4, 4)
    ]
    np.testing.assert_allclose(maps, expected, rtol=1e-3)


@pytest.fixture
def table(capsys):
    """table(options, ..) -> the lines of the table."""

    def table(*options):
        memory_bank.main([*TOY, *options])
        return capsys.readouterr().out.partition("class ")[2].splitlines()

    return table


def test_table_has_a_row_per_class_and_the_mean(table):
    rows = table("--classes", "weave", "pill")[1:]
    assert [row.split()[0] for row in rows] == ["weave", "pill", "mean"]


def test_a_class_has_a_bank_of_its_own(table):
    """Its row is the same whatever other class there is."""
    _, _, beside_weave, _ = table("--classes", "weave", "pill")
    _, alone, _ = table("--classes", "pill")
    assert beside_weave.split() == alone.split()


def test_an_untrained_network_finds_the_toy_sets_defects(table):
    assert float(table("--classes", "weave", "--pool", "area")[-1].split()[1]) > 0.9


def test_an_error_is_one_line(table, capsys):
    with pytest.raises(SystemExit):
        table("--classes", "nobody")
    assert capsys.readouterr().err.startswith("error: --classes nobody")
