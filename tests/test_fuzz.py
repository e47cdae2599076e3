"""Mangled trees, images and checkpoints: used, counted or refused, never silently something else.

FUZZ=1000 tries that many seeds of each.
"""

import os
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
import trees

import data

SEEDS = range(int(os.environ.get("FUZZ", 60)))
IMAGES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
NAMES = ["good", "Good", "crack", "lot1", "test", "train", "ground_truth", "masks", "ok", ".git"]


def mangle(root, rng):
    """Renames, moves, copies or deletes a file or a folder."""
    path = rng.choice(
        [path for path in sorted(root.rglob("*")) if path.parent != root or rng.random() < 0.2]
    )
    folders = [other for other in sorted(root.rglob("*")) if other.is_dir()]
    names = [path.stem.upper(), f"{path.stem}_mask", "a b", path.name, rng.choice(NAMES)]
    suffixes = ["", path.suffix, ".PNG", ".jpg", ".gif", ".txt"]
    name = rng.choice(names) + rng.choice(suffixes if path.is_file() else [""])
    target = rng.choice([path.parent, *folders]) / name
    if target.exists() or path in target.parents or rng.random() < 0.1:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif path.is_file() and rng.random() < 0.3:
        shutil.copy(path, target)
    else:
        path.rename(target)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_file_of_a_mangled_tree_is_used_as_its_folders_say_or_counted(tmp_path, seed, caplog):
    root = trees.mvtec(tmp_path, ["pill"]) / "pill"
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 4)):
        mangle(root, rng)
    try:
        _, train, test = data.load("folder", tmp_path)
    except data.DataError as error:
        assert len(str(error).splitlines()) == 1
        return

    files = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    files = [path for path in files if not any(part.startswith(".") for part in path.parts)]
    expected = {}
    for path in files:
        if path.suffix.lower() in IMAGES and path.parts[:2] == ("train", "good"):
            expected[path] = "train", 0
        elif path.suffix.lower() in IMAGES and path.parts[0] == "test" and len(path.parts) > 2:
            expected[path] = "test", int(path.parts[1] != "good")
    used = {Path(s.image).relative_to(root): ("train", s.label) for s in train}
    used |= {Path(s.image).relative_to(root): ("test", s.label) for s in test}
    assert used == expected

    masks = {s.mask for s in test if s.mask}
    told = re.findall(r"not used: .*?(?: and (\d+) more)?$", caplog.text, re.MULTILINE)
    unused = sum(1 + int(more or 0) for more in told)
    assert len(files) == len(used) + len(masks) + unused


def damaged(content, rng):
    """Some bytes changed, zeroed or cut off."""
    content = bytearray(content)
    start = rng.randrange(len(content))
    if rng.random() < 0.3:
        return bytes(content[:start])
    for i in range(start, min(len(content), start + rng.choice([1, 1, 4, 60]))):
        content[i] = rng.choice([0, rng.randrange(256)])
    return bytes(content)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_damaged_image_is_read_as_rgb_or_refused_by_name(tmp_path, seed, suffix):
    path = Path(trees.image(tmp_path / f"a.{suffix}"))
    path.write_bytes(damaged(path.read_bytes(), random.Random(seed)))
    try:
        assert data.read_image(path)[0].mode == "RGB"
    except data.DataError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_damaged_checkpoint_has_the_same_tensors_or_is_refused_by_name(tmp_path, seed):
    path, w = tmp_path / "a.pt", torch.arange(500.0)
    torch.save({"w": w, "epoch": 3}, path)
    path.write_bytes(damaged(path.read_bytes(), random.Random(seed)))
    try:
        assert torch.equal(data.read_tensors(path)["w"], w)
    except data.DataError as error:
        assert str(path) in str(error)
