import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, PngImagePlugin
from torchvision import transforms

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import data
import trees


def quiet(line):
    pass


def load(name, root, **more):
    return data.load(name, root, log=more.pop("log", quiet), **more)


def decode(samples, size=32, **more):
    return data.decode(samples, size, **{"log": quiet, **more})


def read_mask(name):
    return data.read_mask(name)[0]


def lines_of(function, *args, **more):
    """What the call logs."""
    lines = []
    function(*args, log=lines.append, **more)
    assert all("\n" not in line for line in lines)
    return lines


def warnings(name, root, **more):
    return [line for line in lines_of(load, name, root, **more) if line.startswith("warning: ")]


def counts(dataset):
    defective = sum(s.label for s in dataset.test)
    return len(dataset.classes), len(dataset.train), len(dataset.test) - defective, defective


def names(samples):
    return [Path(s.image).name for s in samples]


def error(function, *args, **kwargs):
    """The message of the DataError that the call must raise: exactly one line."""
    with pytest.raises(data.DataError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert message and "\n" not in message and "Traceback" not in message
    return message


SQUARE = np.zeros((32, 32), bool)
SQUARE[4:12, 8:20] = True


# Layouts

def test_mvtec(tmp_path):
    d = load("mvtec", trees.mvtec(tmp_path))
    assert d.name == "mvtec" and d.classes == ["bottle", "screw"] and counts(d) == (2, 6, 4, 8)
    assert all(s.label == 0 and s.mask is None and "/train/good/" in s.image for s in d.train)
    assert {s.cls for s in d.train} == {s.row for s in d.test} == {"bottle", "screw"}
    for s in d.test:
        defect = s.image.split("/")[-2]
        assert s.label == (defect != "good")
        expected = s.image.replace("/test/", "/ground_truth/").replace(".png",
                                                                       "_mask.png") if s.label else None
        assert s.mask == expected
    assert load("mvtec", tmp_path, classes=["screw"]).classes == ["screw"]
    assert load("mvtec", tmp_path / "bottle").classes == ["bottle"]  # a root that is a class itself


def test_default_root(tmp_path, monkeypatch):
    trees.mvtec(tmp_path / "data/mvtec")
    monkeypatch.chdir(tmp_path)
    assert load("mvtec", None).classes == ["bottle", "screw"]


@pytest.mark.parametrize("level", ["", "1cls"])
def test_visa_prepared(tmp_path, level):
    d = load("visa", trees.visa_prepared(tmp_path, level=level))
    assert d.classes == ["candle", "pcb1"] and counts(d) == (2, 6, 4, 4)
    three_channels = [s for s in d.test if s.label and s.mask.endswith("001.png")]
    assert len(three_channels) == 2
    for s in three_channels:
        assert Image.open(s.mask).mode == "RGB"
        np.testing.assert_array_equal(read_mask(s.mask), SQUARE)


def test_visa_raw(tmp_path):
    d = load("visa", trees.visa_raw(tmp_path))
    assert d.classes == ["candle", "pcb1"] and counts(d) == (2, 6, 4, 4)
    defective = [s for s in d.test if s.label]
    assert all("/Anomaly/" in s.image and s.mask for s in defective) and all(s.mask is None for s in d.train)
    for s in defective:
        assert np.asarray(Image.open(s.mask)).max() in (1, 2)                   # class ids
        np.testing.assert_array_equal(read_mask(s.mask), SQUARE)
    np.testing.assert_array_equal(decode(defective, masks=True), np.stack([SQUARE] * 4))


def test_btad(tmp_path):
    d = load("btad", trees.btad(tmp_path))
    assert d.classes == ["01", "02", "03"] and counts(d) == (3, 9, 6, 6)
    suffixes = {s.cls: (Path(s.image).suffix, Path(s.mask).suffix) for s in d.test if s.label}
    assert suffixes == {"01": (".bmp", ".png"), "02": (".png", ".png"), "03": (".bmp", ".bmp")}
    empty = [s for s in d.test if s.label and not read_mask(s.mask).any()]
    assert len(empty) == 1 and "02/test/ko/001" in empty[0].image               # still a defective image


def test_goodsad(tmp_path):
    d = load("goodsad", trees.goodsad(tmp_path))
    assert counts(d) == (2, 6, 4, 4)
    assert {Path(s.mask).name for s in d.test if s.label} == {"000.png", "001.png"}


def test_mad(tmp_path):
    trees.mad(tmp_path)
    sim, real = load("mad", tmp_path / "MAD-Sim"), load("mad", tmp_path / "MAD-Real")
    assert sim.classes == ["01Gorilla", "02Unicorn"] and counts(sim) == (2, 6, 4, 12)
    assert real.classes == ["Bear", "Bird"] and counts(real) == (2, 6, 4, 4)
    assert sim.test[-1].mask.endswith("02Unicorn/ground_truth/Stains/001_mask.png")
    assert real.test[-1].mask.endswith("Bird/ground_truth/Stains/001.png")
    message = error(load, "mad", tmp_path)
    assert "MAD-Sim and MAD-Real" in message and f"--root {tmp_path / 'MAD-Sim'}" in message
    (tmp_path / "MAD-Real").rename(tmp_path / "elsewhere")
    assert load("mad", tmp_path).classes == sim.classes


@pytest.mark.parametrize("inside", ["", "AeBAD_S"])
def test_aebad(tmp_path, inside):
    d = load("aebad", trees.aebad(tmp_path) / inside)
    assert d.classes == ["AeBAD_S"] and counts(d) == (1, 6, 8, 16)
    assert {s.cls for s in d.train + d.test} == {"AeBAD_S"}
    assert {s.row for s in d.train} == {"same", "background", "illumination"}   # every domain found
    assert {s.row for s in d.test} == {"same", "background", "illumination", "view"}
    for s in d.test:
        *_, defect, domain, _ = s.image.split("/")
        assert s.row == domain and s.label == (defect != "good")
        assert s.mask == (s.image.replace("/test/", "/ground_truth/") if s.label else None)


@pytest.fixture
def batches(tmp_path, monkeypatch):
    return trees.cifar10(tmp_path, monkeypatch)


@pytest.mark.parametrize("normals", ["01234", "56789", "02468", "13579"])
def test_cifar10(batches, normals):
    d = load("cifar10", batches, normals=normals)
    classes = [data.CIFAR10[int(digit)] for digit in normals]
    assert d.classes == classes and counts(d) == (5, 50, 10, 10)
    assert {s.cls for s in d.train} == set(classes) and {s.cls for s in d.test} == set(data.CIFAR10)
    assert all(s.label == (s.cls not in classes) and s.row == normals and s.mask is None for s in d.test)
    train = [s for s in d.train if "/train#2" in s.image][3]   # 20 to 29: the second batch's first half
    for batch, sample in ("data_batch_2", train), ("test_batch", d.test[5]):
        with open(batches / "cifar-10-batches-py" / batch, "rb") as file:
            content = pickle.load(file)
        index = int(sample.image.split("#")[1]) % 20
        assert data.CIFAR10[content["labels"][index]] == sample.cls
        expected = content["data"][index].reshape(3, 32, 32).transpose(1, 2, 0)
        np.testing.assert_array_equal(decode([sample])[0], expected)
        larger = Image.fromarray(expected).resize((64, 64), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(decode([sample], 64)[0], np.asarray(larger))
    assert load("cifar10", batches / "cifar-10-batches-py", normals=normals).classes == classes


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_damaged_batch(batches, file):
    """A file whose MD5 is wrong is not unpickled: that could run anything."""
    path, mark = batches / "cifar-10-batches-py" / file, batches / "mark"
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR.")
    message = error(load, "cifar10", batches)
    assert str(path.parent) in message and "MD5" in message and "cifar-10-python.tar.gz" in message
    assert not mark.exists()
    path.unlink()
    assert "missing" in error(load, "cifar10", batches)


@pytest.mark.parametrize("normals", ["0123", "012345", "01233", "abcde", ""])
def test_normals(batches, normals):
    assert "--normals" in error(load, "cifar10", batches, normals=normals)


def test_folder_masks_are_optional(tmp_path):
    d = load("folder", trees.folder(tmp_path, mask_name=None))
    assert counts(d) == (2, 6, 4, 8) and all(s.mask is None for s in d.test)
    trees.mask(tmp_path / "bottle/ground_truth/crack/001_mask.png")
    assert sum(s.mask is not None for s in load("folder", tmp_path).test) == 1


def test_joined(tmp_path):
    trees.mvtec(tmp_path / "mvtec")
    trees.visa_raw(tmp_path / "visa")
    trees.btad(tmp_path / "btad")
    trees.aebad(tmp_path / "aebad")
    d = load("mvtec+visa+btad", tmp_path)
    assert d.name == "mvtec+visa+btad" and counts(d) == (7, 21, 14, 18)
    assert d.classes == ["mvtec/bottle", "mvtec/screw", "visa/candle", "visa/pcb1", "btad/01", "btad/02",
                         "btad/03"]
    assert {s.cls for s in d.train} == {s.row for s in d.test} == set(d.classes)
    assert load("mvtec+visa", tmp_path, classes=["visa/pcb1"]).classes == ["visa/pcb1"]
    d = load("mvtec+aebad+toy", tmp_path)
    assert "aebad/AeBAD_S" in d.classes and "toy/pill" in d.classes
    assert "aebad/view" in {s.row for s in d.test}
    assert "did you mean 'visa/pcb1'" in error(load, "mvtec+visa", tmp_path, classes=["visa/pcb11"])
    assert "mvtec/bottle" in error(load, "mvtec+visa", tmp_path, classes=["bottle"])
    assert "twice" in error(load, "mvtec+mvtec", tmp_path)
    assert "goodsad" in error(load, "mvtec+goodsad", tmp_path)


def test_counts_warn_with_both_numbers(tmp_path, monkeypatch):
    line, = warnings("mvtec", trees.mvtec(tmp_path / "a"))
    assert "(2, 6," in line and "(15, 3629," in line
    assert not warnings("mvtec", tmp_path / "a", classes=["bottle"])
    assert not warnings("folder", tmp_path / "a") and not warnings("toy", None)
    line, = warnings("mad", trees.mad(tmp_path / "mad") / "MAD-Real")
    assert "(2, " in line and "(20,)" in line
    monkeypatch.setitem(data.SETS, "mvtec", data.SETS["mvtec"]._replace(counts=((2, 6, 4, 8),)))
    assert not warnings("mvtec", tmp_path / "a")
    (tmp_path / "a/bottle/test/good/000.png").unlink()
    line, = warnings("mvtec", tmp_path / "a")
    assert "(2, 6, 3, 8)" in line and "(2, 6, 4, 8)" in line


def test_natural_order_and_other_files(tmp_path):
    trees.mvtec(tmp_path, ["a"], train=0)
    for name in "10.png", "9.PNG", "b 2.Jpg", "b 10.jpeg", "größe.tif", "1.webp":
        trees.image(tmp_path / "a/train/good" / name)
    for name in ".DS_Store", "Thumbs.db", "._9.png", ".hidden.png", "notes.txt", "10.png.bak":
        (tmp_path / "a/train/good" / name).write_bytes(b"x")
    (tmp_path / "a/train/good/folder.png").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    d = load("folder", tmp_path)
    assert d.classes == ["a"]
    assert names(d.train) == ["1.webp", "9.PNG", "10.png", "b 2.Jpg", "b 10.jpeg", "größe.tif"]
    assert decode(d.train).shape == (6, 32, 32, 3)


def test_a_set_of_ones_own(tmp_path, monkeypatch):
    """The README's example."""
    def mine(root, cls, files):
        """CLASS/ok/*, CLASS/nok/*, masks CLASS/masks/STEM.png; every fifth good image tests."""
        ok, nok, masks = ([path for path in files if Path(path).parent.name == name]
                          for name in ("ok", "nok", "masks"))
        for i, path in enumerate(ok):
            yield "test" if i % 5 == 4 else "train", data.Sample(path, 0, None, cls, cls)
        for path in nok:
            mask = data.find_mask({(Path(mask).stem,): [mask] for mask in masks}, (), path)
            yield "test", data.Sample(path, 1, mask, cls, cls)

    monkeypatch.setitem(data.SETS, "mine", data.Set(mine, "it lies on the server", classes=data.subfolders))
    for i in range(10):
        trees.image(tmp_path / f"nut/ok/{i}.jpg", i)
    trees.image(tmp_path / "nut/nok/0.jpg")
    assert "nut/nok/0.jpg" in error(load, "mine", tmp_path) and "on the server" in error(load, "mine",
                                                                                         tmp_path)
    trees.mask(tmp_path / "nut/masks/0.png")
    assert counts(load("mine", tmp_path)) == (1, 8, 2, 1)
    assert "bottle" in error(load, "mine", trees.mvtec(tmp_path / "other"))


# What is used, and what is not

@pytest.fixture
def pill(tmp_path):
    """A class of one's own: 4 train, 2 good, 4 defective images in two kinds."""
    return trees.folder(tmp_path / "root", ["pill"], train=4) / "pill"


def move(path, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    return path.rename(target)


def test_a_line_per_class(pill):
    assert lines_of(load, "folder", pill.parent) == ["pill: 4 train, 2 good, 4 defective, 4 masks"]
    trees.mvtec(pill.parents[1] / "joined/mvtec", ["a"])
    lines = lines_of(load, "mvtec+toy", pill.parents[1] / "joined")
    assert "mvtec/a: 3 train, 2 good, 4 defective, 4 masks" in lines
    assert any("toy/pill: 28 train" in line for line in lines)


@pytest.mark.parametrize("target", [
    "ground_truth/crack/000_mask.PNG", "ground_truth/crack/000_mask.bmp", "ground_truth/crack/000.PNG",
    "ground_truth/crack/000.tif", "ground_truth/crack/000_MASK.Tiff", "Ground_Truth/Crack/000.pgm",
    "ground_truth/crack/000.jpg"])
def test_masks_of_any_case_and_suffix(pill, target):
    for source in sorted((pill / "ground_truth/crack").iterdir()):
        path = pill / target.replace("000", source.name[:3])
        pixels = Image.open(source)
        pixels.load()
        source.unlink()
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels.save(path)
    d = load("folder", pill.parent)
    assert not warnings("folder", pill.parent) and all(s.mask for s in d.test if s.label)
    assert [s.mask for s in d.test if "/crack/001" in s.image] == [str(pill / target.replace("000", "001"))]


def test_folders_of_any_case(pill):
    for name in "test/Good", "TRAIN":
        move(pill / name.lower(), pill / name)
    d = load("folder", pill.parent)
    assert counts(d) == (1, 4, 2, 4) and not warnings("folder", pill.parent)


@pytest.mark.parametrize("masks", ["nested", "flat"])
def test_nested_folders(pill, masks):
    move(pill / "test/crack/001.png", pill / "test/crack/lot1/deep/001.png")
    move(pill / "train/good/001.png", pill / "train/good/lot2/001.png")
    if masks == "nested":
        move(pill / "ground_truth/crack/001_mask.png", pill / "ground_truth/crack/lot1/deep/001_mask.png")
    d = load("folder", pill.parent)
    assert counts(d) == (1, 4, 2, 4) and all(s.mask for s in d.test if s.label)
    assert not warnings("folder", pill.parent)


@pytest.mark.parametrize("suffix", [".jfif", ".pgm", ".webp", ".JPE"])
def test_whatever_pillow_reads_is_an_image(pill, suffix):
    for path in list((pill / "test/crack").iterdir()):
        image = Image.open(path)
        image.load()
        path.unlink()
        image.convert("L").save(path.with_suffix(suffix))
    d = load("folder", pill.parent)
    assert counts(d) == (1, 4, 2, 4) and decode(d.test).shape[0] == 6


@pytest.mark.parametrize("unused",
                         ["test/007.png", "ground_truth/007.png", "007.png", "train/007.png",
                          "train/bad/007.png",
                                    "Test images/crack/007.jpg", "test.zip", "test/crack/007.heic",
                          "valid/good/1.png",
                                    "ground_truth/good/000.png", "ground_truth/crack/007_mask.png",
                          "../results/7.png",
                                    "../pill.tar.gz", "../7.png"])
def test_what_is_not_used_is_named(pill, unused):
    path = pill / unused
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    line, = warnings("folder", pill.parent)
    assert "not used" in line and "1 files" in line and path.name in line
    assert counts(load("folder", pill.parent)) == (1, 4, 2, 4)


def test_a_mask_beside_its_image_is_no_defect(pill):
    move(pill / "ground_truth/crack/001_mask.png", pill / "test/crack/001_mask.png")
    d = load("folder", pill.parent)
    assert counts(d) == (1, 4, 2, 4) and all(s.mask for s in d.test if s.label)
    trees.image(pill / "train/good/000_mask.png")
    line, = warnings("folder", pill.parent)
    assert "not used" in line and "train/good/000_mask.png" in line


def test_what_is_no_data_is_silent(pill):
    for name in ("Thumbs.db", ".DS_Store", "notes.txt", "labels.csv", "@eaDir/a.png", "__MACOSX/b.png",
                 "#recycle/c.png",
                 ".cache/d.png", "docs/e.pdf", "test/crack/Thumbs.db", "test/crack/.e.png",
                 "../@eaDir/f.png", "../docs/g.txt"):
        path = pill / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    assert lines_of(load, "folder", pill.parent) == ["pill: 4 train, 2 good, 4 defective, 4 masks"]


def test_gaps_are_named(pill):
    (pill / "ground_truth/crack/001_mask.png").unlink()
    line, = warnings("folder", pill.parent)
    assert "pill" in line and "without a mask: 1 files" in line and "test/crack/001.png" in line
    trees.folder(pill.parent, ["nut"], mask_name=None, good=0)
    trees.folder(pill.parent, ["bolt"], good=0, defects=())
    lines = warnings("folder", pill.parent)
    assert any("nut" in x and "without a mask: 4 files" in x for x in lines)
    assert any("bolt: no test images" in x for x in lines)
    assert not any("nut: no test images" in x for x in lines)  # metrics.py says what it lacks


def test_names_that_differ_in_the_suffix(pill):
    trees.image(pill / "test/crack/000.jpg", 5)
    line, = warnings("folder", pill.parent)
    assert "share a mask: 2 files" in line and "crack/000.jpg" in line
    assert counts(load("folder", pill.parent)) == (1, 4, 2, 5)


def test_a_class_called_mean(tmp_path):
    assert "'mean'" in error(load, "folder", trees.folder(tmp_path, ["mean", "a"]))
    trees.mvtec(tmp_path / "mvtec", ["mean"])
    assert "mvtec/mean" in load("mvtec+toy", tmp_path).classes


def test_links_to_folders(pill):
    (pill / "train/good/again").symlink_to(pill)                                # a loop: left out
    (pill.parents[1] / "elsewhere").mkdir()
    move(pill / "test/crack", pill.parents[1] / "elsewhere/crack")
    (pill / "test/crack").symlink_to(pill.parents[1] / "elsewhere/crack")
    assert counts(load("folder", pill.parent)) == (1, 4, 2, 4)


def test_listing(tmp_path):
    d, e = load("mvtec", trees.mvtec(tmp_path / "a")), load("mvtec", trees.mvtec(tmp_path / "b/c"))
    assert data.listing(d.train) == data.listing(e.train) and len(set(data.listing(d.train + d.test))) == 18
    size = os.path.getsize(d.train[0].image)
    assert data.listing(d.train)[0] == f"bottle/train/good/000.png {size}"
    trees.image(e.train[3].image, size=40)
    assert [a == b for a,
            b in zip(data.listing(d.train), data.listing(e.train))] == [True] * 3 + [False] + [True] * 2
    assert data.listing(data.load("toy", log=quiet).train)[0] == "toy:weave/train/good/000"


def test_listing_of_cifar10(batches):
    assert {"train#0", "train#94"} < set(data.listing(load("cifar10", batches).train))


# Hostile input

def test_missing_root_names_the_download(tmp_path):
    for name in data.SETS:
        if name != "toy":
            message = error(load, name, tmp_path / "nowhere")
            assert str(tmp_path / "nowhere") in message and "--root" in message and name in message
            assert name == "folder" or "https://" in message
    error(load, "mvtec", tmp_path / "two\nlines")
    (tmp_path / "file").write_text("x")
    assert str(tmp_path / "file") in error(load, "mvtec", tmp_path / "file")


def test_unknown_names(tmp_path):
    message = error(load, "mvtek", tmp_path)
    assert "'mvtek'" in message and "did you mean 'mvtec'" in message and "goodsad" in message
    assert "'x'" in error(load, "mvtec+x", tmp_path)
    assert "unknown set ''" in error(load, "", tmp_path)
    assert "cifar10 is joined" in error(load, "mvtec+cifar10", tmp_path)
    message = error(load, "mvtec", trees.mvtec(tmp_path), classes=["botle"])
    assert "--classes botle" in message and "did you mean 'bottle'" in message and "screw" in message


def break_tree(root, how):
    """Damages an mvtec tree; returns what the message has to name."""
    base = root / "bottle"
    if how == "empty root":
        for path in sorted(root.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        return str(root)
    if how == "empty class":
        (root / "zipper/train/good").mkdir(parents=True)
        return "zipper"
    if how == "no train images":
        for path in (base / "train/good").iterdir():
            path.unlink()
        return str(base / "train")
    if how == "no train/good":
        (base / "train/good").rename(base / "train/ok")
        return str(base / "train")
    if how == "class without train":
        (base / "train").rename(root / ".train")
        return "bottle"
    if how == "no mask":
        (base / "ground_truth/crack/001_mask.png").unlink()
        return str(base / "test/crack/001.png")
    if how == "no mask folder":
        (base / "ground_truth/hole").rename(root / ".hole")
        return str(base / "ground_truth/hole")
    if how == "link loop":
        (base / "train/good/loop.png").symlink_to("loop.png")
        return str(base / "train/good/loop.png")
    if how == "folder loop":
        (base / "test/loop").symlink_to("loop")
        return str(base / "test/loop")
    if how == "broken link":
        (base / "test/good/gone.png").symlink_to(root / "nowhere.png")
        return str(base / "test/good/gone.png")
    if how == "train is a file":
        (base / "train").rename(root / ".train")
        (base / "train").write_text("x")
        return "bottle"


@pytest.mark.parametrize("how",
                         ["empty root", "empty class", "no train images", "no train/good",
                          "class without train",
                                 "no mask", "no mask folder", "link loop", "folder loop", "broken link",
                                 "train is a file"])
def test_broken_trees(tmp_path, how):
    trees.mvtec(tmp_path)
    what = break_tree(tmp_path, how)
    message = error(load, "mvtec", tmp_path)
    assert what in message and "https://www.mvtec.com" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("path",
                         ["bottle", "bottle/train/good", "bottle/test/crack", "bottle/ground_truth/crack"])
def test_unreadable_folders(tmp_path, path):
    trees.mvtec(tmp_path)
    (tmp_path / path).chmod(0)
    try:
        assert "bottle" in error(load, "mvtec", tmp_path)
    finally:
        (tmp_path / path).chmod(0o700)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_and_cache(tmp_path):
    d = load("mvtec", trees.mvtec(tmp_path / "set"))
    Path(d.train[0].image).chmod(0)
    message = error(decode, d.train)
    assert d.train[0].image in message and "Permission denied" in message
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o500)
    assert "--cache none" in error(decode, d.test, cache=tmp_path / "cache")


@pytest.mark.parametrize("damage, what", [
    (lambda text: text.replace("label", "lable", 1), "'label'"),
    (lambda text: text.replace("test,anomaly", "test,broken"), "broken"),
    (lambda text: text.replace("candle,train", "candle,training"), "training"),
    (lambda text: text.replace("train,normal", "train,anomaly"), "train000.JPG"),
    (lambda text: text + "\0", "1cls.csv"),
])
def test_visa_csv(tmp_path, damage, what):
    path = trees.visa_raw(tmp_path) / "split_csv/1cls.csv"
    path.write_text(damage(path.read_text()))
    message = error(load, "visa", tmp_path)
    assert what in message and "1cls.csv" in message and "spot-diff" in message
    path.write_bytes(b"\xff\xfe\x00")
    assert "1cls.csv" in error(load, "visa", tmp_path)


def test_missing_files_of_visa_csv(tmp_path):
    path = trees.visa_raw(tmp_path) / "split_csv/1cls.csv"
    text = path.read_text()
    path.write_text(text.replace("Normal/test001", "Normal/test009"))
    assert "Normal/test009.JPG" in error(decode, load("visa", tmp_path).test)
    path.write_text(text.replace("Masks/Anomaly/test001", "Masks/Anomaly/test009"))
    assert "Masks/Anomaly/test009.png" in error(decode, load("visa", tmp_path).test, masks=True)
    path.write_text(text.replace("candle/Data/Masks/Anomaly/test000.png", ""))
    assert "no mask of " in error(load, "visa", tmp_path)


def test_visa_csv_with_backslashes(tmp_path):
    path = trees.visa_raw(tmp_path) / "split_csv/1cls.csv"
    path.write_text(path.read_text().replace("/", "\\"))
    assert counts(load("visa", tmp_path)) == (2, 6, 4, 4)
    trees.image(tmp_path / "candle/Data/Images/Normal/extra.JPG")
    assert "1 files, for example" in " ".join(warnings("visa", tmp_path))


def test_visa_csv_with_byte_order_mark_and_crlf(tmp_path):
    path = trees.visa_raw(tmp_path) / "split_csv/1cls.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert counts(load("visa", tmp_path)) == (2, 6, 4, 4)


def test_broken_aebad(tmp_path):
    trees.aebad(tmp_path)
    (tmp_path / "AeBAD_S/ground_truth/groove/view/IMG_1.png").unlink()
    assert "groove/view/IMG_1.png" in error(load, "aebad", tmp_path)


def test_small_sets_load(tmp_path):
    only_train = load("folder", trees.folder(tmp_path / "a", ["x"], good=0, defects=()))
    assert counts(only_train) == (1, 3, 0, 0)
    (tmp_path / "a/x/test/good").mkdir(parents=True)                            # there but empty
    assert counts(load("folder", tmp_path / "a")) == (1, 3, 0, 0)
    assert decode(only_train.test).shape == (0, 32, 32, 3)
    assert decode(only_train.test, masks=True, cache=tmp_path / "cache").shape == (0, 32, 32)
    assert counts(load("folder", trees.folder(tmp_path / "b", ["x"], good=0))) == (1, 3, 0, 4)
    assert counts(load("folder", trees.folder(tmp_path / "c", ["x"], train=1, good=0, defects=()))) == (1, 1,
                                                                                                        0, 0)
    assert counts(load("folder", trees.folder(tmp_path / "d", ["x"], train=0))) == (1, 0, 2, 4)
    (tmp_path / "d/x/train/good").mkdir(parents=True)
    assert str(tmp_path / "d/x/train") in error(load, "folder", tmp_path / "d")
    name = tmp_path / "e/my parts ü 部品"
    d = load("folder", trees.folder(name, ["große Teile"], defects=("Riß 1",)))
    assert d.classes == ["große Teile"] and decode(d.test, masks=True,
                                                   cache=tmp_path / "ca che ü").sum() == 2 * 96


def test_bad_image_files(tmp_path):
    good = trees.image(tmp_path / "good.png", size=64)
    jpeg = trees.image(tmp_path / "good.jpg", size=64)
    bad = {"zero.png": b"", "text.png": b"not an image\n" * 50, "truncated.png": good.read_bytes()[:2000],
           "header.png": good.read_bytes()[:20], "truncated.jpg": jpeg.read_bytes()[:1000],
           "damaged.png": good.read_bytes()[:500] + b"\0" * 200 + good.read_bytes()[700:],
           "header.bmp": b"BM" + bytes(30), "header.tif": b"II*\0" + bytes(30)}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        for read in data.read_image, data.read_mask:
            assert str(tmp_path / name) in error(read, str(tmp_path / name))
        sample = data.Sample(str(tmp_path / name), 0, None, "x", "x")
        assert str(tmp_path / name) in error(decode, [sample], cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []                          # nothing half written
    assert "gone.png" in error(data.read_image, str(tmp_path / "gone.png"))
    assert "gone.png" in error(decode, [data.Sample(str(tmp_path / "gone.png"), 0, None, "x", "x")],
                               cache=tmp_path)
    assert str(tmp_path) in error(data.read_image, str(tmp_path))


def test_large_images(tmp_path, monkeypatch):
    path = str(trees.image(tmp_path / "a.png"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 511)
    assert "1024 pixels" in error(data.read_image, path) and "1024 pixels" in error(read_mask, path)
    Image.new("1", (12000, 9000)).save(tmp_path / "scan.png")  # more than Pillow allows by itself
    monkeypatch.undo()
    assert read_mask(str(tmp_path / "scan.png")).shape == (9000, 12000)


def test_a_pipe_is_not_waited_for(tmp_path):
    trees.mvtec(tmp_path)
    os.mkfifo(tmp_path / "bottle/test/good/pipe.png")
    assert "pipe.png" in error(decode, load("mvtec", tmp_path).test)
    assert data.find_images([str(tmp_path / "bottle/test/good")])[-1].endswith("pipe.png")


# Image modes

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def grey(array):
    return np.repeat(np.asarray(array, np.uint8)[..., None], 3, -1)


def mode_cases():
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    palette = Image.fromarray(RAMP // 64)
    colours = np.array([[10, 20, 30], [200, 0, 0], [0, 255, 7], [1, 2, 3]], np.uint8)
    palette.putpalette(colours.tobytes())
    transparent = palette.copy()
    transparent.info["transparency"] = bytes([0, 128, 255, 255])
    sixteen = RAMP.astype(np.uint16) * 257
    cyan = np.zeros((16, 16, 4), np.uint8)
    cyan[..., 0], cyan[:8, :, 3] = 255, 255
    cyan_rgb = np.zeros((16, 16, 3), np.uint8)
    cyan_rgb[8:] = 0, 255, 255
    return {
        "rgb.png": (Image.fromarray(noise[..., :3]), noise[..., :3]),
        "grey.png": (Image.fromarray(RAMP), grey(RAMP)),
        "grey alpha.png": (Image.fromarray(noise[..., :2], "LA"), grey(noise[..., 0])),
        "alpha.png": (Image.fromarray(noise), noise[..., :3]),
        "palette.png": (palette, colours[RAMP // 64]),
        "palette alpha.png": (transparent, colours[RAMP // 64]),
        "bit.png": (Image.fromarray(RAMP > 99), grey((RAMP > 99) * 255)),
        "16.png": (Image.fromarray(sixteen), grey(RAMP)),
        "16.tif": (Image.fromarray(sixteen), grey(RAMP)),
        "32.tif": (Image.fromarray(sixteen.astype(np.int32)), grey(RAMP)),
        "float.tif": (Image.fromarray(RAMP.astype(np.float32)), grey(RAMP)),
        "unit.tif": (Image.fromarray(RAMP.astype(np.float32) / 255), grey(RAMP)),
        "dark.tif": (Image.fromarray(RAMP.astype(np.float32) / 2550), grey((RAMP.astype(int) + 5) // 10)),
        "black.png": (Image.fromarray(sixteen * 0), grey(RAMP * 0)),
        "cmyk.tif": (Image.fromarray(cyan, "CMYK"), cyan_rgb),
        "rgb.bmp": (Image.fromarray(noise[..., :3]), noise[..., :3]),
    }


@pytest.mark.filterwarnings("ignore:'mode' parameter")
@pytest.mark.parametrize("name", list(mode_cases()))
def test_image_modes(tmp_path, name):
    image, expected = mode_cases()[name]
    image.save(tmp_path / name)
    read = data.read_image(str(tmp_path / name))
    assert read.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(read), expected)
    sample = data.Sample(str(tmp_path / name), 0, None, "x", "x")
    np.testing.assert_array_equal(decode([sample], 16)[0], expected)


@pytest.mark.parametrize("values, what", [
    (RAMP.astype(np.float32) - 1, "-1 to 254"), (RAMP.astype(np.float32) * 2, "0 to 510"),
    (np.where(RAMP == 9, np.nan, RAMP).astype(np.float32), "nan"),
                                          (RAMP.astype(np.float32) / 100, "0 to 2.55"),
    (np.where(RAMP == 9, np.inf, RAMP).astype(np.float32), "inf"),
                                          (RAMP.astype(np.int32) * 1000, "0 to 255000"),
    (RAMP.astype(np.uint16) * 16, "0 to 4080"), (RAMP.astype(np.int32), "0 to 255"),
                                          (-RAMP.astype(np.int32), "-255")])
def test_unclear_ranges_are_refused(tmp_path, values, what):
    Image.fromarray(values).save(tmp_path / "a.tif")
    message = error(data.read_image, str(tmp_path / "a.tif"))
    assert what in message and "a.tif" in message


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = np.zeros((20, 30, 3), np.uint8)
    upright[:5, :5], upright[:5, -5:] = (255, 0, 0), (0, 255, 0)
    ways = [None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180,
            Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90, Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_270]
    way, stored, exif = ways[orientation - 1], Image.fromarray(upright), Image.Exif()
    exif[0x0112] = orientation
    (stored if way is None else stored.transpose(way)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(data.read_image(str(tmp_path / "a.png"))), upright)
    np.testing.assert_array_equal(read_mask(str(tmp_path / "a.png")), upright.any(-1))


def test_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "a.jpg")
    assert abs(np.asarray(data.read_image(str(tmp_path / "a.jpg"))).astype(int) - (0, 255, 255)).max() < 6


@pytest.mark.filterwarnings("ignore:'mode' parameter")
def test_mask_modes(tmp_path):
    square = SQUARE.astype(np.uint8)
    palette = Image.fromarray(square)
    palette.putpalette([0, 0, 0, 0, 0, 1])
    white_first = Image.fromarray(1 - square)  # a palette may name white before black
    white_first.putpalette([255, 255, 255, 0, 0, 0])
    opaque = np.zeros((32, 32, 4), np.uint8)
    opaque[..., 3] = 255
    opaque[SQUARE, 1] = 1
    for name, image in {"bit.png": Image.fromarray(SQUARE), "one.png": Image.fromarray(square),
                        "16.png": Image.fromarray(square.astype(np.uint16)), "palette.png": palette,
                        "white.png": white_first, "alpha.png": Image.fromarray(opaque),
                        "grey alpha.png": Image.fromarray(opaque[..., [1, 3]], "LA"),
                        "bgr.bmp": Image.fromarray(opaque[..., :3]),
                        "float.tif": Image.fromarray(square.astype(np.float32) * 0.5)}.items():
        image.save(tmp_path / name)
        found = read_mask(str(tmp_path / name))
        assert found.dtype == bool, name
        np.testing.assert_array_equal(found, SQUARE, name)


def mask_notes(tmp_path, **images):
    """What decode says about masks of these images (saved as png) of a class x, whose photos are 32 x 32."""
    samples = []
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
        samples.append(data.Sample(str(trees.image(tmp_path / "photo.png")), 1,
                                   str(tmp_path / f"{name}.png"), "x", "x"))
    lines = lines_of(decode, samples, masks=True, cache=tmp_path / "cache")
    assert lines == lines_of(decode, samples, masks=True, cache=tmp_path / "cache") == lines_of(decode,
                                                                                                samples,
                                                                                                masks=True)
    return lines


def test_masks_of_many_greys(tmp_path):
    """Half of the maximum and more: what was binary before it was blurred, or a JPEG, is that again."""
    sharp = Image.fromarray(np.kron(SQUARE, np.ones((7, 7), bool)))
    smooth = sharp.convert("L").filter(ImageFilter.GaussianBlur(2))
    sharp.convert("L").save(tmp_path / "jpeg.jpg", quality=50)
    smooth.save(tmp_path / "smooth.png")
    for name in "jpeg.jpg", "smooth.png":
        found, wrong = read_mask(str(tmp_path / name)), np.asarray(Image.open(tmp_path / name)) != 0
        area = np.asarray(sharp).sum()
        assert abs(found.sum() / area - 1) < 0.02 and wrong.sum() / area > 1.05
    line, = mask_notes(tmp_path, a=smooth, b=sharp)
    assert line.startswith("note: x: ") and "1 of 2" in line and "a.png" in line


@pytest.mark.parametrize("values",
                         [[1], [255], [1, 2, 3, 12], range(236, 256), range(1, 13), [51, 102, 153, 204, 255]])
def test_label_maps_count_nonzero(tmp_path, values):
    pixels = np.resize(np.array(values, np.uint8), (32, 32)) * SQUARE
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(str(tmp_path / "a.png")), SQUARE)


def test_odd_masks_are_named(tmp_path):
    square, white = SQUARE.astype(np.uint8) * 255, np.full((32, 32), 255, np.uint8)
    inverted, normal = Image.fromarray(255 - square), Image.fromarray(square)
    palette = Image.fromarray(square // 255)
    palette.putpalette([255, 255, 255, 0, 0, 0])
    assert mask_notes(tmp_path, a=normal) == []
    for odd in inverted, palette:
        line, = mask_notes(tmp_path, a=odd, b=odd)
        assert "covers most" in line and "2 of 2" in line and "a.png" in line
        assert mask_notes(tmp_path, a=odd, b=normal) == []                      # a large defect
    for name, rgb in ("white", white), ("black", 0 * white):
        alpha = Image.fromarray(np.stack([rgb, rgb, rgb, square], -1))
        line, = mask_notes(tmp_path, **{name: alpha})
        assert "alpha" in line and name in line
        np.testing.assert_array_equal(read_mask(str(tmp_path / f"{name}.png")), SQUARE)
    line, = mask_notes(tmp_path, a=normal, b=Image.fromarray(0 * white))
    assert "empty" in line and "b.png" in line
    assert warnings("aebad", trees.aebad(tmp_path / "aebad"))[1:] == []          # the count's warning only


# Decoding

def photo(path, size, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)
    return data.Sample(str(path), 0, None, "x", "x")


@pytest.mark.parametrize("size, crop", [(64, None), (64, 56), (48, 41), (46, 41), (200, 168)])
def test_decode_as_torchvision(tmp_path, size, crop):
    samples = [photo(tmp_path / f"{i}.png", wh, i) for i, wh in enumerate([(100, 100), (130, 70), (40, 90)])]
    steps = [transforms.Resize((size, size))] + ([transforms.CenterCrop(crop)] if crop else [])
    expected = np.stack([np.asarray(transforms.Compose(steps)(Image.open(s.image))) for s in samples])
    found = decode(samples, size, crop=crop)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("size, crop", [(64, None), (64, 56), (48, 41)])
def test_decode_masks_as_torchvision(tmp_path, size, crop):
    rng = np.random.default_rng(0)
    samples = [photo(tmp_path / "0.png", (90, 70))]  # a good one between defective ones
    for i, (h, w) in enumerate([(100, 100), (60, 150)], 1):
        values = (rng.random((h, w)) < 0.3) * rng.choice([1, 2, 236, 255], (h, w))
        Image.fromarray(values.astype(np.uint8)).save(tmp_path / f"m{i}.png")
        samples.append(photo(tmp_path / f"{i}.png", (90, 70))._replace(label=1,
                                                                       mask=str(tmp_path / f"m{i}.png")))
    nearest = transforms.InterpolationMode.NEAREST
    steps = [transforms.Resize((size, size), nearest)] + ([transforms.CenterCrop(crop)] if crop else [])
    expected = [np.zeros((crop or size, crop or size), bool)]
    for s in samples[1:]:
        binary = Image.fromarray((np.asarray(Image.open(s.mask)) > 0).astype(np.uint8))
        expected.append(np.asarray(transforms.Compose(steps)(binary)) > 0)
    found = decode(samples, size, crop=crop, masks=True)
    assert found.dtype == bool and found.any()
    np.testing.assert_array_equal(found, np.stack(expected))


def test_label_survives_a_vanished_mask(tmp_path):
    trees.mvtec(tmp_path, ["a"], defects=("crack",), per_defect=1)
    pixels = np.zeros((300, 300), np.uint8)                                     # another size than its image
    pixels[0, 0] = 255  # falls between the samples of 32 x 32
    Image.fromarray(pixels).save(tmp_path / "a/ground_truth/crack/000_mask.png")
    d = load("mvtec", tmp_path)
    defective = [s for s in d.test if s.label]
    assert read_mask(defective[0].mask).sum() == 1
    assert len(defective) == 1 and not decode(defective, masks=True).any()


def test_parallel_equals_serial(tmp_path):
    samples = [photo(tmp_path / f"{i}.png", (60, 50), i) for i in range(70)]
    serial = decode(samples, 24, workers=1)
    np.testing.assert_array_equal(decode(samples, 24, workers=2), serial)
    np.testing.assert_array_equal(decode(samples, 24, workers=2, cache=tmp_path / "cache"), serial)
    Path(samples[60].image).write_bytes(b"")
    assert samples[60].image in error(decode, samples, 24, workers=2)


def test_interrupt(tmp_path):
    """Ctrl-C ends decoding at once, as KeyboardInterrupt, and leaves no file."""
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(data.__file__).parent)!r})
import data
def slow(name):
    print("decoding", flush=True)
    time.sleep(0.05)
    return data.Image.new("RGB", (8, 8))
data.read_image = slow
samples = data.load("toy", log=str).train * 20
data.decode(samples, 8, cache={str(tmp_path / "cache")!r}, workers=2)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    process.stdout.readline()
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert told.strip().endswith("KeyboardInterrupt")
    assert time.monotonic() - start < 20                                        # all of it takes a minute
    assert list((tmp_path / "cache").iterdir()) == []


# Cache

@pytest.fixture
def photos(tmp_path):
    return [photo(tmp_path / f"{i}.png", (40, 30), i) for i in range(5)]


@pytest.fixture
def reads(monkeypatch):
    """The names that are decoded."""
    found = []
    original = data.read_image
    monkeypatch.setattr(data, "read_image", lambda name: found.append(name) or original(name))
    return found


def test_cache_is_used_again(tmp_path, photos, reads):
    first = decode(photos, cache=tmp_path / "c")
    assert len(reads) == 5
    again = decode(photos, cache=tmp_path / "c")
    assert len(reads) == 5 and isinstance(again, np.memmap) and not again.flags.writeable
    np.testing.assert_array_equal(first, decode(photos))
    np.testing.assert_array_equal(again, first)
    batch = torch.from_numpy(again[np.array([3, 1])])
    batch[:] = 0  # a copy: the file stays as it is
    np.testing.assert_array_equal(decode(photos, cache=tmp_path / "c"), first)
    assert len(list((tmp_path / "c").iterdir())) == 1


def test_a_replaced_file_is_read_anew(tmp_path, photos):
    """Of the same size and time, as a copy that keeps times leaves it."""
    old, new = Path(photos[0].image), tmp_path / "new.bmp"
    trees.image(tmp_path / "old.bmp", 1).rename(old)
    trees.image(new, 2)
    before, first = os.stat(old), decode(photos, cache=tmp_path / "c")[0].copy()
    new.write_bytes(new.read_bytes())
    old.write_bytes(new.read_bytes())
    os.utime(old, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (os.stat(old).st_size, os.stat(old).st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert (decode(photos, cache=tmp_path / "c")[0] != first).any()


def test_cache_key(tmp_path, photos, reads, monkeypatch):
    def decoded(samples=photos, size=32, **more):
        reads.clear()
        result = decode(samples, size, cache=tmp_path / "c", **more)
        return len(reads), result

    assert decoded()[0] == 5 and decoded()[0] == 0
    assert decoded(size=30)[0] == 5 and decoded(crop=28)[0] == 5 and decoded(samples=photos[:4])[0] == 4
    assert decoded(size=30, crop=28)[0] == 5 and decoded(samples=photos[::-1])[0] == 5
    assert decoded()[0] == 0
    stat = os.stat(photos[2].image)
    os.utime(photos[2].image, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert decoded()[0] == 5 and decoded()[0] == 0
    before = os.stat(photos[1].image)
    photo(photos[1].image, (41, 31), 99)
    os.utime(photos[1].image, ns=(before.st_atime_ns, before.st_mtime_ns))      # same time, another size
    count, changed = decoded()
    assert count == 5
    np.testing.assert_array_equal(changed, decode(photos))
    masked = [s._replace(mask=s.image, label=1) for s in photos]
    one = decode(masked, masks=True, cache=tmp_path / "c")
    other = decode(masked[:1] + photos[1:], masks=True, cache=tmp_path / "c")
    assert one[1:].any() and other[:1].any() and not other[1:].any()
    monkeypatch.chdir(tmp_path)  # the same files by a relative path
    relative = [s._replace(image=Path(s.image).name) for s in photos]
    assert decoded(samples=relative)[0] == 0


@pytest.mark.parametrize("damage", [
    lambda c: c[:-1], lambda c: c + b"x", lambda c: c[:-100] + bytes(100), lambda c: c[:600], lambda c: b"",
    lambda c: bytes(len(c) - 1) + b"x", lambda c: c[:50] + bytes([c[50] ^ 1]) + c[51:],
                                    lambda c: c[:-5] + b"\1" + c[-4:]])
def test_damaged_cache_is_built_anew(tmp_path, photos, reads, damage):
    first = decode(photos, cache=tmp_path / "c").copy()
    path = next((tmp_path / "c").iterdir())
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert path.read_bytes() != content
    reads.clear()
    told = []
    np.testing.assert_array_equal(decode(photos, cache=tmp_path / "c", log=told.append), first)
    assert len(reads) == 5 and len(told) == 1 and str(path) in told[0] and path.read_bytes() == content
    decode(photos, cache=tmp_path / "c", log=told.append)
    assert len(reads) == 5 and len(told) == 1


def test_full_disk(tmp_path, photos, reads):
    """A limit on the size of files stands in for a full disk: the write fails half way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        message = error(decode, photos * 400, cache=tmp_path / "c")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path / "c") in message and "--cache" in message and "GB" in message
    assert len(reads) < 2000  # the rest is not decoded first
    assert list((tmp_path / "c").iterdir()) == []


def test_cache_folder_is_a_file(tmp_path, photos):
    (tmp_path / "c").write_text("x")
    assert "--cache none" in error(decode, photos, cache=tmp_path / "c")
    assert "--cache none" in error(decode, photos, cache=tmp_path / "c/d")


def test_atomic(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    for problem in ValueError("x"), KeyboardInterrupt(), data.DataError("x"):
        with pytest.raises(type(problem)) as caught:
            with data.atomic(path) as temporary:
                Path(temporary).write_text("half")
                assert path.read_text() == "old" and temporary.endswith(".json")
                raise problem
        assert caught.value is problem
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with data.atomic(str(path)) as temporary:
        Path(temporary).write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("hint", ["", "name another"])
def test_atomic_says_what_cannot_be_written(tmp_path, hint):
    def write(path, problem=None):
        with data.atomic(path, hint) as temporary:
            Path(temporary).write_text("x")
            if problem:
                raise problem

    path, end = tmp_path / "a.pt", f"; {hint}" if hint else ""
    assert error(write, path, OSError(28, "No space left")) == f"cannot write {path}: No space left{end}"
    assert error(write, path, RuntimeError("full disk")) == f"cannot write {path}: full disk{end}"
    path = tmp_path / "none/a.pt"
    assert error(write, path) == f"cannot write {path}: No such file or directory{end}"
    (tmp_path / "folder").mkdir()
    assert error(write, tmp_path / "folder") == f"cannot write {tmp_path / 'folder'}: Is a directory{end}"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_temporary_names(tmp_path):
    """Of any name's suffix, and removed by the next run in the folder, which removes nothing else."""
    out = tmp_path / "out"
    data.claim(out, "mintad", False).close()
    for name in "x" * 251 + ".png", "部" * 85:
        with data.atomic(out / name) as temporary:
            Path(temporary).write_text("x")
            assert temporary.endswith(name[251:])
            Path(temporary + "~").write_text("killed")
        assert (out / name).exists()
    users = [".tmp1-a.png", ".partial-x-0123abcd-a", ".partial-1-0123ABCD-a", "a.partial-1-01234567-b",
             "partial-1-01234567-b", ".partial-1-0123456-b", "below/.partial-12-0123abcd.png"]
    (out / "below").mkdir()
    for name in users:
        (out / name).write_text("x")
    assert len(list(out.glob(".partial-*~"))) == 2
    data.claim(out, "mintad", False).close()
    assert not list(out.glob(".partial-*~")) and all((out / name).exists() for name in users)


def test_claim(tmp_path):
    out = tmp_path / "runs/a"
    log = data.claim(out, "mintad", False)
    print("größe \udcff", file=log, flush=True)
    assert "another run" in error(data.claim, out, "mintad", True)
    code = f"import sys; sys.path.insert(0, {str(Path(data.__file__).parent)!r}); import data; " \
           f"data.claim({str(out)!r}, 'mintad', True)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert other.returncode and "another run is writing into it" in other.stderr.splitlines()[-1]
    log.close()                                                                 # as the end of a process does
    for name in ".partial-12-0123abcd-seed1.pt", ".tmp1-mine.pt", "notes.txt":
        (out / name).write_text("x")
    log = data.claim(out, "mintad", False)
    assert sorted(path.name for path in out.iterdir()) == [".mintad", ".tmp1-mine.pt", "log.txt", "notes.txt"]
    assert log.name == str(out / "log.txt") and log.encoding == "utf-8"
    log.close()
    assert (out / "log.txt").read_text(encoding="utf-8") == "größe \\udcff\n"   # nothing is lost
    (out / "seed1-pill.pt").write_text("x")
    assert "--resume" in error(data.claim, out, "mintad", False)
    data.claim(out, "mintad", True).close()


@pytest.mark.parametrize("name", ["photo.png", "log.txt", ".minimaxad", ".partial-12-0123abcd-a"])
def test_claim_leaves_a_users_folder_alone(tmp_path, name):
    (tmp_path / name).write_text("mine")
    for resume in False, True:
        assert "mintad.py did not write" in error(data.claim, tmp_path, "mintad", resume)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


def test_claim_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in tmp_path / "file", tmp_path / "file/below":
        assert str(out) in error(data.claim, out, "mintad", False)


# Images to predict

def test_find_images(tmp_path, monkeypatch):
    for name in "b/2.png", "b/10.png", "b/deep/1.JPG", "a 1.bmp", "[x].png", "b/.hidden.png":
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "b/notes.txt").write_text("x")
    (tmp_path / "b/again").symlink_to(tmp_path)                                 # a loop of folders
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert data.find_images(["b"]) == ["b/2.png", "b/10.png", "b/deep/1.JPG"]
    assert data.find_images(["b/*"])[:2] == ["b/2.png", "b/10.png"]
    assert data.find_images(["b/*.png", "b/10.png", "a 1.bmp"]) == ["b/2.png", "b/10.png", "a 1.bmp"]
    assert data.find_images(["b/notes.txt"]) == ["b/notes.txt"]  # named: its reader tells what is wrong
    assert data.find_images(["[x].png"]) == ["[x].png"]
    assert data.find_images([str(tmp_path / "b/deep")]) == [str(tmp_path / "b/deep/1.JPG")]
    for pattern in "nothing.png", "*.tif", "empty":
        assert pattern in error(data.find_images, ["b", pattern])


def test_find_images_leaves_out(tmp_path, monkeypatch):
    """Hidden folders, those of file managers, and the program's own pictures, unless named."""
    for name in "a.pgm", "b.JFIF", "c.heic", ".git/d.png", "@eaDir/e.png", ".f.png":
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    about = PngImagePlugin.PngInfo()
    about.add_text("Software", data.SOFTWARE)
    Image.new("L", (8, 8)).save(tmp_path / "own.png", pnginfo=about)
    Image.new("L", (8, 8)).save(tmp_path / "user.png")
    monkeypatch.chdir(tmp_path)
    assert data.find_images(["."]) == ["./a.pgm", "./b.JFIF", "./user.png"]
    assert data.find_images(["*"]) == ["a.pgm", "b.JFIF", "user.png"]
    assert data.find_images(["own.png"]) == ["own.png"]
    name = os.fsdecode(b"\xff\xfe.png")
    Image.new("L", (8, 8)).save(tmp_path / name)
    found = [path for path in data.find_images(["."]) if path.endswith(name)]
    assert len(found) == 1 and data.read_image(found[0]).size == (8, 8)
    (tmp_path / name).write_bytes(b"x")
    error(data.read_image, name).encode("utf-8")


# The toy set

PINNED_AREA = {"weave": 6148, "granite": 6238, "flange": 5661, "pill": 6685}
PINNED_LEVEL = {"weave": 135334148, "granite": 188881522, "flange": 103765264, "pill": 207671564}


def test_toy_is_pinned():
    """Deterministic on every machine: these sums were written down once."""
    d = data.load("toy")
    assert d.classes == ["weave", "granite", "flange", "pill"] and counts(d) == (4, 112, 40, 48)
    masks = decode(d.test, 128, masks=True)
    images = decode(d.test, 128).astype(np.int64)
    np.testing.assert_array_equal(images, decode(d.test, 128))
    assert len({image.tobytes() for image in images}) == len(d.test)
    area = {row: int(sum(m.sum() for m, s in zip(masks, d.test) if s.row == row)) for row in d.classes}
    level = {row: int(sum(i.sum() for i, s in zip(images, d.test) if s.row == row)) for row in d.classes}
    assert area == PINNED_AREA and all(abs(level[row] - PINNED_LEVEL[row]) < 1000 for row in level)
    for sample, mask in zip(d.test, masks):
        assert mask.any() == bool(sample.label) and (not sample.label or 150 < mask.sum() < 1500)


@pytest.mark.parametrize("cls, defect", [(cls, defect) for cls in data.TOY for defect in data.TOY[cls]])
def test_toy_masks_are_exact(monkeypatch, cls, defect):
    """From one seed, with and without the defect: the images differ inside the mask and nowhere else."""
    monkeypatch.setattr(data.zlib, "crc32", lambda name: 7)
    image, mask = data.toy_image(f"toy:{cls}/test/{defect}/000")
    good, nothing = data.toy_image(f"toy:{cls}/test/good/000")
    differs = np.abs(image.astype(int) - good).max(-1) > 24  # more than brightness and noise do
    edge = np.zeros_like(mask)                                                  # half covered pixels
    for dy, dx in [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]:
        edge |= np.roll(mask, (dy, dx), (0, 1))
    assert not nothing.any() and mask.sum() > 150
    assert differs[mask].mean() > 0.97 and not differs[~edge].any()


def test_nearest_neighbours_of_raw_patches_find_the_toy_defects():
    from sklearn.metrics import roc_auc_score
    d = data.load("toy")

    def patches(samples):              # mean, minimum and maximum colour of 8 x 8 pixels: no network at all
        blocks = decode(samples, 128).astype(np.float32).reshape(-1, 16, 8, 16, 8, 3)
        both = [blocks.mean((2, 4)), blocks.min((2, 4)), blocks.max((2, 4))]
        return torch.from_numpy(np.concatenate(both, -1)).flatten(1, 2)         # N x 256 x 9

    areas = []
    for cls in d.classes:
        train, test = [[s for s in samples if s.cls == cls] for samples in (d.train, d.test)]
        bank = patches(train).flatten(0, 1)
        scores = [torch.cdist(image, bank).min(1).values.max().item() for image in patches(test)]
        areas.append(roc_auc_score([s.label for s in test], scores))
    assert np.mean(areas) > 0.95, areas
