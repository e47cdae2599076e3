"""Which images train and test, their labels, classes and masks, and what is told about the rest."""

import logging
import re
import unicodedata
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import trees
from PIL import Image

import data


def counts(train, test):
    """Training, good and defective images, masks."""
    defective = sum(s.label for s in test)
    return len(train), len(test) - defective, defective, sum(s.mask is not None for s in test)


def warnings(caplog, name, root):
    """What loading a set warns of, but for the counts of a full copy."""
    data.load(name, root)
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    return [line for line in lines if "full copy" not in line]


def refused(name, root, **options):
    """The line that says why a set cannot be loaded."""
    with pytest.raises(data.DataError) as error:
        data.load(name, root, **options)
    return str(error.value)


def move(path, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)


@pytest.fixture
def pill(tmp_path):
    """A class of the user's own: 3 train, 2 good, 4 defective images of two kinds, 4 masks."""
    return trees.mvtec(tmp_path / "root", ["pill"]) / "pill"


def visa_of_windows(root):
    path = trees.visa_raw(root) / "split_csv/1cls.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    return root


LAYOUTS = {
    "mvtec": (trees.mvtec, "bottle screw", (6, 4, 8, 8)),
    "visa": (trees.visa_raw, "candle pcb1", (6, 4, 4, 4)),
    "visa, saved on Windows": (visa_of_windows, "candle pcb1", (6, 4, 4, 4)),
    "visa, prepared": (lambda x: trees.mvtec(x / "1cls").parent, "bottle screw", (6, 4, 8, 8)),
    "btad": (trees.btad, "01 02 03", (9, 6, 6, 6)),
    "goodsad": (partial(trees.mvtec, mask_name="{}.png"), "bottle screw", (6, 4, 8, 8)),
    "mad": (partial(trees.mvtec, suffix=".JPG"), "bottle screw", (6, 4, 8, 8)),
    "aebad": (trees.aebad, "AeBAD_S", (6, 8, 16, 16)),
    "folder": (partial(trees.mvtec, mask_name=None), "bottle screw", (6, 4, 8, 0)),
    "toy": (lambda root: root, "weave granite pill flange", (112, 40, 48, 48)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_its_classes_and_all_its_files_are_used(tmp_path, caplog, name):
    build, classes, expected = LAYOUTS[name]
    root = build(tmp_path)
    found, train, test = data.load(name.split(",")[0], root)
    assert (found, counts(train, test)) == (classes.split(), expected)
    assert warnings(caplog, name.split(",")[0], root) == []


def test_the_folder_decides_split_label_and_mask(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    root = trees.mvtec(tmp_path, ["nut"], (3, 1, 1)) / "nut"
    _, train, test = data.load("folder", tmp_path)
    assert [s.image for s in train] == [f"{root}/train/good/00{i}.png" for i in range(3)]
    assert {s.image.removeprefix(f"{root}/test/"): (s.label, s.mask) for s in test} == {
        "good/000.png": (0, None),
        "crack/000.png": (1, f"{root}/ground_truth/crack/000_mask.png"),
        "hole/000.png": (1, f"{root}/ground_truth/hole/000_mask.png"),
    }
    assert caplog.messages == ["nut: 3 train, 1 good, 2 defective, 2 masks"]


@pytest.mark.parametrize("wrong", ["train,anomaly", "valid,anomaly", "test,abnormal", "train,"])
def test_visas_csv_with_another_split_or_label_is_refused(tmp_path, wrong):
    path = trees.visa_raw(tmp_path) / "split_csv/1cls.csv"
    path.write_text(path.read_text().replace("test,anomaly", wrong, 1))
    assert "spot-diff" in refused("visa", tmp_path)


@pytest.mark.parametrize("normals", ["01234", "02468"])
def test_cifar10_trains_five_classes_and_tests_all(tmp_path, monkeypatch, normals):
    root = trees.cifar10(tmp_path, monkeypatch)
    _, train, test = data.load("cifar10", root, normals=normals)
    good = {cls: str(i) in normals for i, cls in enumerate(data.CIFAR10)}
    expected = {(1, cls, 0, normals): 10 for cls in good if good[cls]}
    expected |= {(0, cls, int(not good[cls]), normals): 2 for cls in good}
    assert Counter((s in train, s.cls, s.label, s.row) for s in [*train, *test]) == expected


def test_cifar10_is_enlarged_by_lanczos_as_in_uniad(tmp_path, monkeypatch):
    _, _, test = data.load("cifar10", trees.cifar10(tmp_path, monkeypatch))
    larger = Image.fromarray(test[5].pixels).resize((48, 48), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(data.decode([test[5]], 48, cache=tmp_path)[0], larger)


def test_the_toy_set_is_the_same_each_time_and_no_two_images_of_it_are():
    images, again = ([s.pixels.tobytes() for s in data.load("toy")[1]] for _ in range(2))
    assert images == again
    assert len(set(images)) == len(images)


@pytest.mark.parametrize("cls", data.TOY)
def test_a_toy_images_mask_is_where_it_differs_from_one_without_the_defect(cls):
    for seed in range(20):
        good, nothing = data.toy_image(cls, "good", seed)
        assert not nothing.any()
        for kind in "scratch", "missing", "stain":
            pixels, mask = data.toy_image(cls, kind, seed)
            difference = abs(pixels[..., 0] - good[..., 0].astype(int))
            assert difference[~mask].max() == 0
            assert mask.sum() > 100 and difference[mask].min() > 20


def test_classes_and_rows_of_joined_sets_carry_the_sets_name(tmp_path):
    trees.btad(tmp_path / "btad")
    trees.aebad(tmp_path / "aebad")
    _, _, test = data.load("btad+aebad", tmp_path, ["btad/02", "aebad/AeBAD_S"])
    domains = "background", "illumination", "same", "view"  # also the rows of aebad alone
    expected = {("aebad/AeBAD_S", f"aebad/{domain}") for domain in domains}
    assert {(s.cls, s.row) for s in test} == expected | {("btad/02", "btad/02")}


def test_without_a_root_a_set_lies_in_data_and_its_name(tmp_path, monkeypatch):
    trees.mvtec(tmp_path / "data/goodsad")
    monkeypatch.chdir(tmp_path)
    assert data.load("goodsad")[0] == ["bottle", "screw"]


ASKED = [
    (name, None, "goodsad") for name in ("mvtek", "", "mvtec+mvtec", "mvtec+cifar10", "mvtec+")
]
ASKED += [("mvtec", ["bottle", "botle"], "botle.*bottle, screw")]


@pytest.mark.parametrize("name, classes, known", ASKED)
def test_an_unknown_set_class_or_join_is_refused_with_the_known_ones(
    tmp_path, name, classes, known
):
    trees.mvtec(tmp_path)
    trees.mvtec(tmp_path / "mvtec")
    assert re.search(known, refused(name, tmp_path, classes=classes))


@pytest.mark.parametrize("name", [name for name in data.SETS if name not in ("toy", "folder")])
def test_a_missing_root_is_named_with_where_the_set_can_be_had(tmp_path, name):
    assert re.search(f"{tmp_path}/nowhere.*https://", refused(name, tmp_path / "nowhere"))


MOVED = [
    ("folder", "train/good", "train/bad", "pill/train/good"),
    ("folder", "test/good", "test/Good", "test/Good"),
    ("mvtec", "ground_truth/crack", "masks", "test/crack/000.png and 1 more"),
    ("mvtec", "ground_truth/crack/001_mask.png", "ground_truth/crack/001/0.png", "crack/001.png"),
]


@pytest.mark.parametrize("name, path, target, named", MOVED)
def test_what_is_missing_or_in_another_place_is_refused_by_name(pill, name, path, target, named):
    move(pill / path, pill / target)
    assert named in refused(name, pill.parent)


FULL = (3629, 467, 1258)


@pytest.mark.parametrize("full, classes", [(FULL, None), ((6, 4, 8), None), (FULL, ["bottle"])])
def test_a_whole_copy_that_is_not_full_is_told_with_both_numbers(
    tmp_path, caplog, monkeypatch, full, classes
):
    monkeypatch.setitem(data.SETS, "mvtec", data.SETS["mvtec"]._replace(counts=full))
    data.load("mvtec", trees.mvtec(tmp_path), classes)
    told = re.search(r"warning.*\(6, 4, 8\).*\(3629, 467, 1258\)", caplog.text)
    assert bool(told) == (full == FULL and classes is None)


UNUSED = [
    *("007.png", "test/007.png", "test/crack/007", "test/crack/007.heic", "train/good/no_suffix"),
    *("train/007.png", "train/bad/007.png", "valid/good/007.png", "Test/crack/007.jpg"),
    *("ground_truth/007.png", "ground_truth/crack/007_mask.png", "ground_truth/good/000.png"),
    *("ground_truth/crack/000_mask.tif", "ground_truth/crack/000.png", "notes.txt", "test.zip"),
]
SILENT = ["Thumbs.db", "test/crack/.a.png", "@eaDir/a.png", ".git/a.png"]


@pytest.mark.parametrize("name", UNUSED + SILENT)
def test_a_file_that_is_not_used_is_named_unless_hidden_or_known_junk(pill, caplog, name):
    trees.image(pill / "new.png")
    move(pill / "new.png", pill / name)
    told = warnings(caplog, "folder", pill.parent)
    assert len(told) == (name in UNUSED)
    assert all(name in line for line in told)


def test_unused_files_are_counted_and_a_folder_that_is_no_class_is_named(pill, caplog):
    for path in list((pill / "train/good").iterdir())[:2]:
        path.rename(path.with_suffix(""))
    (pill.parent / "results").mkdir()
    folder, files = warnings(caplog, "folder", pill.parent)
    assert "root/results" in folder and " and 1 more" in files


def test_a_class_without_test_images_is_warned_of(tmp_path, caplog):
    trees.mvtec(tmp_path, ["pill"], (3, 0, 0))
    assert "no test images" in warnings(caplog, "folder", tmp_path)[0]


def test_images_and_their_masks_may_lie_in_folders_below(pill):
    for name in "test/crack/001.png", "ground_truth/crack/001_mask.png":
        move(pill / name, (pill / name).parent / "lot1" / Path(name).name)
    assert counts(*data.load("mvtec", pill.parent)[1:]) == (3, 2, 4, 4)


def test_linked_folders_are_followed_and_loops_are_not(pill):
    move(pill / "test/crack", pill.parents[1] / "elsewhere")
    (pill / "test/crack").symlink_to(pill.parents[1] / "elsewhere")
    (pill / "test/crack/loop").symlink_to(pill)
    (pill / "test/crack/another").symlink_to(pill / "test")
    assert counts(*data.load("folder", pill.parent)[1:]) == (3, 2, 4, 4)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_are_compared_in_one_normal_form_of_unicode(pill, forms):
    trees.image(pill / unicodedata.normalize(forms[0], "test/Riß/größe.png"))
    mask = trees.mask(pill / unicodedata.normalize(forms[1], "ground_truth/Riß/größe.png"))
    assert mask in [s.mask for s in data.load("folder", pill.parent)[2]]


HELD_OUT = [
    ("aaaaaaaaaa", 0.2, [0, 5]),
    ("aaaaaaaaaa", 0.3, [0, 3, 6]),
    ("abbababbbb", 0.34, [0, 1, 6]),  # one of three, two of seven
    ("aaa", 1.0, [0, 1]),
    ("a", 0.5, []),
    ("aaaa", 0.0, []),
]


@pytest.mark.parametrize("classes, share, expected", HELD_OUT)
def test_an_even_share_of_each_class_but_never_all_is_held_out(classes, share, expected):
    samples = [data.Sample("", 0, cls, cls) for cls in classes]
    assert np.flatnonzero(data.hold_out(samples, share)).tolist() == expected


@pytest.mark.parametrize("change", ["none", "size", "name", "gone"])
def test_other_images_are_another_set_and_a_moved_set_is_the_same(tmp_path, change):
    first, second = (data.load("mvtec", trees.mvtec(tmp_path / place))[1] for place in "ab")
    path = Path(second[2].image)
    if change == "size":
        trees.image(path, size=40)
    elif change != "none":
        path.rename(path.with_name("9.png" if change == "name" else "9.txt"))
    second = data.load("mvtec", tmp_path / "b")[1]
    assert (data.digest(first) == data.digest(second)) == (change == "none")
