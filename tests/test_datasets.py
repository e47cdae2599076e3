"""Which images train and test, their labels, classes and masks, and what is told about the rest."""

import hashlib
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
    "toy": (lambda root: root, "weave granite flange pill", (112, 40, 48, 48)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_its_classes_images_and_masks(tmp_path, name):
    build, classes, expected = LAYOUTS[name]
    found, train, test = data.load(name.split(",")[0], build(tmp_path))
    assert (found, counts(train, test)) == (classes.split(), expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_file_of_a_layout_is_used(tmp_path, caplog, name):
    assert warnings(caplog, name.split(",")[0], LAYOUTS[name][0](tmp_path)) == []


def test_the_folder_decides_split_label_and_mask(tmp_path):
    root = trees.mvtec(tmp_path, ["nut"], train=1, good=1, per_defect=1) / "nut"
    _, train, test = data.load("mvtec", tmp_path)
    parts = ("train", train), ("test", test)
    found = {(part, s.image): (s.label, s.mask) for part, x in parts for s in x}
    assert found == {
        ("train", f"{root}/train/good/000.png"): (0, None),
        ("test", f"{root}/test/good/000.png"): (0, None),
        ("test", f"{root}/test/crack/000.png"): (1, f"{root}/ground_truth/crack/000_mask.png"),
        ("test", f"{root}/test/hole/000.png"): (1, f"{root}/ground_truth/hole/000_mask.png"),
    }


@pytest.mark.parametrize("wrong", ["train,anomaly", "valid,anomaly", "test,abnormal", "train,"])
def test_visas_csv_with_another_split_or_label_is_refused(tmp_path, wrong):
    path = trees.visa_raw(tmp_path) / "split_csv/1cls.csv"
    path.write_text(path.read_text().replace("test,anomaly", wrong, 1))
    assert "spot-diff" in refused("visa", tmp_path)


@pytest.mark.parametrize("normals", ["01234", "56789", "02468"])
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


def test_a_damaged_batch_of_cifar10_is_refused(tmp_path, monkeypatch):
    trees.cifar10(tmp_path, monkeypatch)
    (tmp_path / "cifar-10-batches-py/data_batch_3").write_bytes(b"damaged")
    assert "https://www.cs.toronto.edu/~kriz/cifar.html" in refused("cifar10", tmp_path)


def test_the_toy_set_is_the_same_on_every_machine():
    _, train, test = data.load("toy")
    sha256 = hashlib.sha256()
    for sample in train + test:
        sha256.update(sample.pixels.tobytes() + sample.defect.tobytes())
    assert sha256.hexdigest() == "91cc45062509d8f63874330c789dedaec4d6bebc8c38460d6e144d9eec544bb8"


def test_classes_and_rows_of_joined_sets_carry_the_sets_name(tmp_path):
    trees.btad(tmp_path / "btad")
    trees.aebad(tmp_path / "aebad")
    _, _, test = data.load("btad+aebad", tmp_path)
    expected = [(f"btad/{cls}", f"btad/{cls}") for cls in ("01", "02", "03")]
    domains = "background", "illumination", "same", "view"  # also the rows of aebad alone
    expected += [("aebad/AeBAD_S", f"aebad/{domain}") for domain in domains]
    assert sorted({(s.cls, s.row) for s in test}) == sorted(expected)


def test_a_subset_of_the_classes_is_all_that_is_loaded(tmp_path):
    trees.mvtec(tmp_path / "mvtec")
    trees.mvtec(tmp_path / "mad")
    _, train, test = data.load("mvtec+mad", tmp_path, ["mvtec/screw"])
    assert {s.cls for s in train + test} == {"mvtec/screw"}


def test_without_a_root_a_set_lies_in_data_and_its_name(tmp_path, monkeypatch):
    trees.mvtec(tmp_path / "data/goodsad")
    monkeypatch.chdir(tmp_path)
    assert data.load("goodsad")[0] == ["bottle", "screw"]


@pytest.mark.parametrize("name", ["mvtek", "", "mvtec+mvtec", "mvtec+cifar10", "mvtec+"])
def test_an_unknown_set_or_an_impossible_join_is_refused_with_the_known_sets(tmp_path, name):
    trees.mvtec(tmp_path / "mvtec")
    assert "goodsad" in refused(name, tmp_path)


def test_an_unknown_class_is_refused_with_the_known_ones(tmp_path):
    message = refused("mvtec", trees.mvtec(tmp_path), classes=["bottle", "botle"])
    assert re.search("botle.*bottle, screw", message)


@pytest.mark.parametrize("name", [name for name in data.SETS if name not in ("toy", "folder")])
def test_a_missing_root_is_named_with_where_the_set_can_be_had(tmp_path, name):
    assert re.search(f"{tmp_path}/nowhere.*https://", refused(name, tmp_path / "nowhere"))


MOVED = {
    "no training images": ("train/good", "train/bad", "pill/train/good"),
    "missing masks": ("ground_truth/crack", "masks", "test/crack/000.png and 1 more"),
    "another spelling of good": ("test/good", "test/Good", "test/Good"),
    "MVTec LOCO": ("ground_truth/crack/001_mask.png", "ground_truth/crack/001/0.png", "LOCO"),
    "MVTec AD 2": ("test", "test_public", "MVTec AD 2"),
}


@pytest.mark.parametrize("case", MOVED)
def test_what_is_missing_or_in_another_layout_is_refused_by_name(pill, case):
    move(pill / MOVED[case][0], pill / MOVED[case][1])
    name = "mvtec" if case == "missing masks" else "folder"  # whose masks are optional
    assert MOVED[case][2] in refused(name, pill.parent)


def test_a_copy_that_is_not_full_is_told_with_both_numbers(tmp_path, caplog):
    data.load("mvtec", trees.mvtec(tmp_path))
    assert re.search(r"\(6, 4, 8\).*\(3629, 467, 1258\)", caplog.text)


@pytest.mark.parametrize("full, classes", [((6, 4, 8), None), ((3629, 467, 1258), ["bottle"])])
def test_a_full_copy_or_a_chosen_subset_is_not_told(tmp_path, caplog, monkeypatch, full, classes):
    monkeypatch.setitem(data.SETS, "mvtec", data.SETS["mvtec"]._replace(counts=full))
    data.load("mvtec", trees.mvtec(tmp_path), classes)
    assert "warning" not in caplog.text


UNUSED = [
    *("007.png", "test/007.png", "test/crack/007", "test/crack/007.heic", "train/good/no_suffix"),
    *("train/007.png", "train/bad/007.png", "valid/good/007.png", "Test/crack/007.jpg"),
    *("ground_truth/007.png", "ground_truth/crack/007_mask.png", "ground_truth/good/000.png"),
    *("ground_truth/crack/000_mask.tif", "ground_truth/crack/000.png", "notes.txt", "test.zip"),
    "test/crack/000.jpg",  # is used, but shares its mask with 000.png
]


@pytest.mark.parametrize("name", UNUSED)
def test_a_file_that_is_not_used_or_shares_a_mask_is_named(pill, caplog, name):
    trees.image(pill / "new.png")
    move(pill / "new.png", pill / name)
    assert name in warnings(caplog, "folder", pill.parent)[0]


def test_unused_files_are_counted(pill, caplog):
    for path in list((pill / "train/good").iterdir())[:2]:
        path.rename(path.with_suffix(""))
    assert " and 1 more" in warnings(caplog, "folder", pill.parent)[0]


def test_a_folder_that_is_no_class_is_named(pill, caplog):
    (pill.parent / "results").mkdir()
    assert "root/results" in warnings(caplog, "folder", pill.parent)[0]


@pytest.mark.parametrize("name", ["Thumbs.db", "test/crack/.a.png", "@eaDir/a.png", ".git/a.png"])
def test_hidden_files_and_known_junk_are_silent(pill, caplog, name):
    trees.image(pill / "new.png")
    move(pill / "new.png", pill / name)
    assert warnings(caplog, "folder", pill.parent) == []


def test_a_class_without_test_images_is_warned_of(tmp_path, caplog):
    trees.mvtec(tmp_path, ["pill"], good=0, defects=())
    assert "no test images" in warnings(caplog, "folder", tmp_path)[0]


def test_every_class_has_a_line_of_its_counts(pill, caplog):
    caplog.set_level(logging.INFO)
    data.load("folder", pill.parent)
    assert caplog.messages == ["pill: 3 train, 2 good, 4 defective, 4 masks"]


def test_images_and_their_masks_may_lie_in_folders_below(pill):
    for name in "test/crack/001.png", "ground_truth/crack/001_mask.png":
        move(pill / name, (pill / name).parent / "lot1" / Path(name).name)
    assert counts(*data.load("mvtec", pill.parent)[1:]) == (3, 2, 4, 4)


def test_linked_folders_are_followed_and_loops_are_not(pill):
    move(pill / "test/crack", pill.parents[1] / "elsewhere")
    (pill / "test/crack").symlink_to(pill.parents[1] / "elsewhere")
    (pill / "test/crack/loop").symlink_to(pill)
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
