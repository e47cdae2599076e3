"""Mangled trees: whatever is done to a data set, it loads or is refused in a line; no image is silently lost.

FUZZ_TREES=700 tries that many trees instead of 60; FUZZ_SEED=7 begins with another one.
"""
import hashlib
import os
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import data
import trees

TREES, SEED = int(os.environ.get("FUZZ_TREES", 60)), int(os.environ.get("FUZZ_SEED", 0))
SETS = {"folder": trees.folder, "mvtec": trees.mvtec, "goodsad": trees.goodsad, "btad": trees.btad,
        "aebad": trees.aebad,
        "visa": trees.visa_prepared, "mad": lambda root: trees.mvtec(root / "MAD-Sim")}
SILENT = ("__MACOSX", "@eaDir", "#recycle")
LOOKS_LIKE_DATA = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".tif", ".tiff", ".pgm", ".gif",
                   ".webp", ".heic",
                   ".svg", ".zip")


def data_files(root):
    """What a user would call data, found without data.py."""
    for folder, _, names in os.walk(root):
        if not any(part in SILENT or part.startswith(".") for part in Path(folder).relative_to(root).parts):
            yield from (os.path.join(folder, name) for name in names
                        if name.lower().endswith(LOOKS_LIKE_DATA) and not name.startswith("."))


def digest(root):
    return {str(path): (os.lstat(path).st_mtime_ns,
                        path.is_file() and hashlib.md5(path.read_bytes()).hexdigest())
            for path in sorted(root.rglob("*"))}


# Each changes one thing below root: a random file or folder

def move(path, target):
    if not target.exists() and path not in target.parents:
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


def file_suffix(path, folders, rng):
    move(path,
         path.with_suffix(rng.choice([".PNG", ".Jpg", ".jfif", ".pgm", ".TIFF", ".gif", ".heic", ".bmp",
                                      ".svg"])))


def file_stem(path, folders, rng):
    stem = path.stem
    move(path,
         path.with_name(rng.choice([stem.upper(), stem + "_mask", stem + " (1)", "x" + stem,
                                    stem.removesuffix("_mask"),
                                          os.fsdecode(b"\xff\xfe"), "a\nb"]) + path.suffix))


def file_moved(path, folders, rng):
    move(path, rng.choice(folders) / path.name)


def file_nested(path, folders, rng):
    move(path, path.parent / rng.choice(["lot1", "lot1/a", "good", "test", "images"]) / path.name)


def file_copied(path, folders, rng):
    target = rng.choice([path.with_suffix(".jpg"), path.with_suffix(".JPEG"),
                         rng.choice(folders) / path.name])
    if not target.exists():
        shutil.copy(path, target)


def file_deleted(path, folders, rng):
    path.unlink()


def file_cut(path, folders, rng):
    path.write_bytes(path.read_bytes()[:rng.choice([0, 10, 100, 700])])


def file_saved_anew(path, folders, rng):
    """Another mode, size, range or orientation."""
    try:
        image = Image.open(path).convert("RGB")
    except OSError:
        return
    grey, exif = np.asarray(image.convert("L")), Image.Exif()
    exif[0x0112] = rng.randint(1, 8)
    images = [grey.astype(np.float32) / 255, grey.astype(np.float32), grey.astype(np.uint16) * 257,
              grey.astype(np.uint16),
              grey.astype(np.float32) * 9, 255 - grey, np.dstack([grey * 0] * 3 + [grey]), grey * 0]
    index = rng.randrange(len(images) + 3)
    changed = Image.fromarray(images[index]) if index < len(images) else [
        image.convert("P"), image.resize((16, 48)), image.convert("1")][index - len(images)]
    changed.save(path, format="TIFF" if changed.mode == "F" else "PNG", exif=exif)


def folder_renamed(path, folders, rng):
    name = path.name
    move(path,
         path.with_name(rng.choice([name.upper(), name.capitalize(), name + "s", "good", "ok", "test",
                                    "masks", "mean"])))


def folder_moved(path, folders, rng):
    move(path, rng.choice(folders) / path.name)


def folder_deleted(path, folders, rng):
    shutil.rmtree(path)


def folder_swapped(path, folders, rng):
    other = rng.choice(folders)
    if path not in (other, *other.parents) and other not in path.parents:
        path.rename(path.with_name("swap"))
        other.rename(path)
        path.with_name("swap").rename(other)


def folder_gets(path, folders, rng):
    name = rng.choice(["Thumbs.db", "._a.png", "notes.txt", "b.png", "c.zip", "d.heic", "@eaDir/e.png",
                       "results/f.png",
                       "__MACOSX/g.png", "label.csv", ".git/h.png", "i.svg"])
    if not (path / name).exists():
        trees.image(path / "new.png", rng.randrange(99))
        move(path / "new.png", path / name)


def folder_linked(path, folders, rng):
    target = path / "link"
    if not target.exists() and not target.is_symlink():
        target.symlink_to(rng.choice([path, path.parent, path / "nowhere"]))


CHANGES = [function for name, function in list(globals().items()) if name.startswith(("file_", "folder_"))]


def mangle(root, rng):
    """Applies one to three changes; returns their names."""
    done = []
    for change in rng.choices(CHANGES, k=rng.randint(1, 3)):
        folders = [path for path in sorted(root.rglob("*")) if path.is_dir() and not path.is_symlink()]
        files = sorted(Path(path) for path in data_files(root))
        choice = folders if change.__name__.startswith("folder") else files
        if choice and folders:
            change(rng.choice(choice), folders, rng)
            done.append(change.__name__)
    return done


def judge(root, name):
    """(lines, how many files were lost silently); None: refused in one line."""
    lines = []
    try:
        dataset = data.load(name, root, log=lines.append)
        samples = dataset.train + dataset.test
        data.decode(samples, 16, workers=1, log=lines.append)
        masks = data.decode(dataset.test, 16, masks=True, workers=1, log=lines.append)
        assert len(masks) == len(dataset.test)
    except data.DataError as error:
        assert "\n" not in str(error) and len(str(error)) > 20
        str(error).encode()
        return lines, None
    for line in lines:
        assert "\n" not in line
        line.encode()
    used = {os.path.realpath(path) for sample in samples for path in (sample.image, sample.mask) if path}
    named = sum(int(count) for line in lines for count in re.findall(r"not used.*: (\d+) files", line))
    unused = {os.path.realpath(path) for path in data_files(root)} - used
    return lines, len(unused) - named


@pytest.mark.filterwarnings("ignore")
def test_mangled_trees(tmp_path):
    refused, silent = 0, []
    for seed in range(SEED, SEED + TREES):
        rng = random.Random(seed)
        name, root = rng.choice([*SETS, *["folder"] * 5]), tmp_path / f"tree{seed}"
        SETS[name](root)
        changes = mangle(root, rng)
        before = digest(root)
        try:
            lines, lost = judge(root, name)
        except Exception as error:
            raise AssertionError(f"tree {seed} ({name}, {', '.join(changes)})") from error
        assert digest(root) == before, f"tree {seed}: changed on disk"
        refused += lost is None
        if lost:
            silent.append((seed, str(name), changes, lost, lines))
        shutil.rmtree(root)
    print(f"{TREES} trees tried, {refused} refused in one line, {len(silent)} silent losses")
    assert not silent, "\n".join(map(str, silent[:5]))
    assert refused < 0.8 * TREES
