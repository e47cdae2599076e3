"""Which images train and test, their labels, classes and masks, and what is told about the rest."""

import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest

import data


def touch(root, *names):
    """Empty files: which images there are is known without reading them."""
    for name in names:
        Path(root, name).parent.mkdir(parents=True, exist_ok=True)
        Path(root, name).touch()


def listed(root, name, *classes):
    """A line for each image: train, good or defective, its row of the table, its file, its mask."""
    _, train, test = data.load(name, root, classes)
    kinds = ["train"] * len(train) + [("good", "defective")[s.label] for s in test]
    lines = set()
    for kind, s in zip(kinds, train + test, strict=True):
        line = f"{kind} {s.row} {s.image} {s.mask or ''}"
        lines.add(line.replace(f"{root}/", "").strip())
    return lines


def refused(name, root, classes=None):
    """The line that says why a set cannot be loaded."""
    with pytest.raises(data.DataError) as error:
        data.load(name, root, classes)
    return str(error.value)


@pytest.fixture
def pill(tmp_path):
    """The folder of a class of the user's own."""
    for i in range(3):
        touch(tmp_path / "pill", f"train/good/{i}.png", f"test/good/{i}.png")
        for kind in "crack", "hole":
            touch(tmp_path / "pill", f"test/{kind}/{i}.png", f"ground_truth/{kind}/{i}_mask.png")
    return tmp_path / "pill"


LAYOUTS = {
    "visa": """
        train pcb1 1cls/pcb1/train/good/0.JPG
        good pcb1 1cls/pcb1/test/good/1.JPG
        defective pcb1 1cls/pcb1/test/bad/2.JPG 1cls/pcb1/ground_truth/bad/2.png""",
    "btad": """
        train 01 01/train/ok/0.bmp
        good 01 01/test/ok/0.bmp
        defective 01 01/test/ko/0.bmp 01/ground_truth/ko/0.png
        train 03 03/train/ok/0.bmp
        defective 03 03/test/ko/0.bmp 03/ground_truth/ko/0.bmp""",
    "goodsad": """
        train box box/train/good/0.jpg
        defective box box/test/open/0.jpg box/ground_truth/open/0.png""",
    "aebad": """
        train same AeBAD_S/train/good/same/1.png
        good same AeBAD_S/test/good/same/1.png
        good view AeBAD_S/test/good/view/1.png
        defective view AeBAD_S/test/groove/view/1.png AeBAD_S/ground_truth/groove/view/1.png""",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_of_a_set(tmp_path, caplog, name):
    expected = LAYOUTS[name].split("\n        ")[1:]
    for line in expected:
        touch(tmp_path, *line.split()[2:])
    assert listed(tmp_path, name) == set(expected)
    assert "not used" not in caplog.text


VISA = """\ufeffobject,split,label,image,mask\r
pcb1,train,normal,Normal/0.JPG,\r
pcb1,test,normal,Normal/1.JPG,Masks/1.png\r
pcb2,train,normal,Normal/2.JPG,\r
pcb1,test,anomaly,Anomaly/0.JPG,Masks/0.png\r
"""


def test_visas_csv_tells_split_label_and_mask_also_after_windows(tmp_path, caplog):
    touch(tmp_path, "split_csv/1cls.csv")
    (tmp_path / "split_csv/1cls.csv").write_text(VISA, newline="")
    assert "0.JPG: not a file" in refused("visa", tmp_path)
    touch(tmp_path, *re.findall(r"\w+/\d\.\w+", VISA))
    assert listed(tmp_path, "visa") == {
        "train pcb1 Normal/0.JPG",
        "train pcb2 Normal/2.JPG",
        "good pcb1 Normal/1.JPG Masks/1.png",
        "defective pcb1 Anomaly/0.JPG Masks/0.png",
    }
    (tmp_path / "split_csv/1cls.csv").write_text(VISA.replace("anomaly", "abnormal"))
    assert "abnormal" in refused("visa", tmp_path)
    (tmp_path / "split_csv/1cls.csv").write_text(VISA.replace("Masks/0.png", ""))
    assert "no mask of" in refused("visa", tmp_path)
    assert re.search("not used: .*/Anomaly and 2 more", caplog.text)


@pytest.mark.parametrize("normals", ["01234", "02468"])
def test_cifar10_trains_five_classes_and_tests_all(tmp_path, cifar10, normals):
    cifar10(tmp_path)
    classes, train, test = data.load("cifar10", tmp_path, normals=normals)
    digits = sorted(map(int, normals))
    pixels = data.decode(train + test, 8, cache=tmp_path).reshape(-1, 8 * 8 * 3)
    expected = [10 * file + digit for digit in digits for file in range(1, 6)] + list(range(10))
    np.testing.assert_array_equal(pixels, np.repeat(np.array(expected)[:, None], 192, axis=1))
    assert classes == [data.CIFAR10[digit] for digit in digits]
    assert [s.label for s in test] == [int(digit not in digits) for digit in range(10)]
    assert {s.row for s in train + test} == {normals}


def test_the_toy_set_is_the_same_each_time_and_no_two_images_of_it_are():
    images, again = ([s.pixels.tobytes() for s in data.load("toy")[1]] for _ in range(2))
    assert images == again
    assert len(set(images)) == 112


@pytest.mark.parametrize("cls", data.TOY)
def test_a_toy_images_mask_is_where_it_differs_from_one_without_the_defect(cls):
    for seed in range(20):
        good, _ = data.toy_image(cls, "good", seed)
        for kind in "scratch", "missing", "stain":
            pixels, mask = data.toy_image(cls, kind, seed)
            difference = abs(pixels[..., 0] - good[..., 0].astype(int))
            assert difference[~mask].max() == 0
            assert mask.sum() > 100 and difference[mask].min() > 20


def test_classes_and_rows_of_joined_sets_carry_the_sets_name(tmp_path):
    for name in "btad", "aebad":
        for line in LAYOUTS[name].splitlines()[1:]:
            touch(tmp_path / name, *line.split()[2:])
    found, _, test = data.load("btad+aebad", tmp_path, ["btad/01", "aebad/AeBAD_S"])
    assert found == ["btad/01", "aebad/AeBAD_S"]
    assert {s.row for s in test} == {"btad/01", "aebad/same", "aebad/view"}


# ---------------------------------------------------------------------------------- a user's folder


USED = """
    train pill pill/train/good/0.png
    train pill pill/train/good/lot1/0.JPG
    good pill pill/test/good/a b.tif
    good pill pill/test/good/lot1/crack/0.png
    defective pill pill/test/crack/0.bmp pill/ground_truth/crack/0_mask.png
    defective pill pill/test/crack/1.png pill/ground_truth/crack/1.webp
    defective pill pill/test/crack/2_mask.png pill/ground_truth/crack/2_mask.png
    defective pill pill/test/crack/lot1/0.png pill/ground_truth/crack/lot1/0.jpeg
    defective pill pill/test/lot1/0.png"""
UNUSED = """0.png train/0.png train/crack/0.png test/0.png test/crack/0.gif test/good/notes.txt
    ground_truth/0.png ground_truth/crack/0.png ground_truth/crack/1_mask.txt
    ground_truth/lot2/0.png ground_truth/good/0.png
    test/crack/.hidden.png test/Thumbs.db/0.png train/good/@eaDir/0.png"""


def test_every_file_of_a_class_is_used_as_its_folders_say_or_counted(tmp_path, caplog):
    expected = USED.split("\n    ")[1:]
    touch(tmp_path, *re.findall("pill/.*?[.][a-zA-Z]+", USED))
    touch(tmp_path / "pill", *UNUSED.split())
    touch(tmp_path, ".trash/train/good/0.png", "beside.png")
    assert listed(tmp_path, "folder") == set(expected)
    (told,) = re.findall("not used: .* and (.*) more$", caplog.text, re.MULTILINE)
    assert 1 + int(told) == len(UNUSED.split()) - 3  # hidden files and other systems' are not
    assert re.search("not used: .*/beside.png$", caplog.text, re.MULTILINE)


LONG = "é" * 101  # of two bytes each
ODD = {
    "pill/train/good/0.png pill/test/Normal/a/0.png": "pill/test/Normal: rename it to good",
    "pill/train/good/0.png pill/test/OK/0.png": "pill/test/OK: rename it to good",
    "pill/train/ok/0.png pill/test/good/0.png": "pill/train/ok: rename it to good",
    "mean/train/good/0.png": "named mean: rename it",
    "pill/test/a/0.png pill/test/a/0.JPG pill/ground_truth/a/0.png": "ground_truth/a/0.png: a mask "
    "of .*/test/a/0.JPG and .*/test/a/0.png",
    f"{LONG}/train/good/0.png": "over 200 bytes",
    "a\u0308/train/good/0.png ä/train/good/0.png": "of two folders",  # two forms of one letter
    # Wrong first tries of a user's own photos.
    "": "no class.*there is no image",
    "0.JPG": "there is /.*/0.JPG; put .* into /.*/CLASS/train/good",
    "cup/0.jpg": "cup/0.jpg; put .*/cup/train/good",
    "cup/train/0.jpg": "no training images of cup.*cup/train/0.jpg; put .*/cup/train/good",
    "cup/test/good/0.jpg": "no training images of cup.*cup/test/good/0.jpg; put .*/cup/train/good",
    "photos/cup/train/good/0.jpg": "photos/cup/train/good/0.jpg .*--root /.*/photos ",
    "test/good/0.jpg train/good/0.jpg": "test/good/0.jpg it is --root /.*/home ",
}


@pytest.mark.parametrize("files", ODD)
def test_an_odd_layout_is_refused_with_what_is_there_and_what_to_do(tmp_path, files):
    root = tmp_path / "home/root"
    touch(root, ".hidden.png", *files.split())
    assert re.search(ODD[files], refused("folder", root))


def test_btads_good_is_ok_and_an_image_of_aebad_needs_a_domain_not_named_mean(tmp_path):
    touch(tmp_path / "btad", "01/train/ok/0.bmp", "01/test/good/0.bmp")
    assert "01/test/good: rename it to ok" in refused("btad", tmp_path / "btad")
    touch(tmp_path / "aebad/AeBAD_S", "train/good/1.png", "test/good/same/2.png")
    assert "AeBAD_S/train/good" in refused("aebad", tmp_path / "aebad")
    touch(tmp_path / "aebad/AeBAD_S", "train/good/mean/1.png")
    assert "named mean" in refused("aebad", tmp_path / "aebad")


def test_to_evaluate_a_class_needs_no_training_images(tmp_path):
    touch(tmp_path, "pill/test/good/0.png")
    _, train, test = data.load("folder", tmp_path, training=False)
    assert train == [] and [sample.cls for sample in test] == ["pill"]


def test_a_broken_link_is_named_with_where_it_leads(pill):
    (pill / "train/good/3.png").symlink_to("gone.png")
    assert "good/3.png: not a file, but a broken link to gone.png" in refused("folder", pill.parent)


def test_linked_folders_are_followed_and_loops_are_not(pill):
    before = listed(pill.parent, "folder")
    (pill / "test/crack").rename(pill.parent / ".elsewhere")
    (pill / "test/crack").symlink_to(pill.parent / ".elsewhere")
    (pill / "test/crack/loop").symlink_to(pill)
    (pill / "test/crack/another").symlink_to(pill / "test")
    (pill / "test/crack/above").symlink_to(pill.parents[1])
    assert listed(pill.parent, "folder") == before


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_are_compared_in_one_normal_form_of_unicode(tmp_path, forms):
    image = unicodedata.normalize(forms[0], "Büste/test/Riß/größe.png")
    mask = unicodedata.normalize(forms[1], "Riß/größe.png")
    name = image.split("/")[0]
    touch(tmp_path, image, f"{name}/train/good/0.png", f"{name}/ground_truth/{mask}")
    lines = listed(tmp_path, "folder", unicodedata.normalize(forms[1], name))
    assert f"defective Büste {image} {name}/ground_truth/{mask}" in lines


# ------------------------------------------------------------------------- what is refused and told


ASKED = [(name, None, "goodsad") for name in ("mvtek", "", "mvtec+mvtec", "cifar10+mvtec")]
ASKED += [("folder", ["pill", "pil"], "pil.*pill")]


@pytest.mark.parametrize("name, classes, known", ASKED)
def test_an_unknown_set_class_or_join_is_refused_with_the_known_ones(pill, name, classes, known):
    assert re.search(known, refused(name, pill.parent, classes))


SOURCES = {
    "visa": "VisA_20220922.tar, then mkdir -p nowhere && tar -x -C nowhere -f VisA_20220922.tar",
    "cifar10": "import CIFAR10; CIFAR10('nowhere', download=True)\"",
}


@pytest.mark.parametrize("name", [name for name in data.SETS if name not in ("toy", "folder")])
def test_a_missing_root_is_named_with_where_the_set_can_be_had(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert SOURCES.get(name, "see https://") in refused(name, "nowhere")
    assert f"data/{name}: " in refused(name, None)


def test_missing_masks_are_counted(pill):
    (pill / "ground_truth/crack").rename(pill / "masks")
    assert "test/crack/0.png and 2 more" in refused("mvtec", pill.parent)


@pytest.mark.parametrize("counts, classes, told", [(9, None, 1), (6, None, 0), (9, ["pill"], 0)])
def test_a_whole_copy_that_is_not_full_is_told(pill, caplog, monkeypatch, counts, classes, told):
    monkeypatch.setitem(data.SETS, "mad", data.SETS["mad"]._replace(counts=(3, 3, counts)))
    data.load("mad", pill.parent, classes)
    assert len(re.findall(r"warning.*\(3, 3, 6\).*\(3, 3, 9\)", caplog.text)) == told


HELD_OUT = [
    ("aaaaaaaaaa", 0.2, [0, 5]),
    ("aaaaaaaaaa", 0.3, [0, 3, 6]),
    ("abbababbbb", 0.34, [0, 1, 6]),  # one of three, two of seven
    ("aaaaaaaaaabb", 0.1, [0, 10]),
    ("aaa", 1.0, [0, 1]),
    ("a", 0.5, []),
    ("aa", 0.0, []),
]


@pytest.mark.parametrize("classes, share, expected", HELD_OUT)
def test_an_even_share_of_each_class_but_never_all_is_held_out(classes, share, expected):
    samples = [data.Sample("", 0, cls, "row") for cls in classes]
    assert np.flatnonzero(data.hold_out(samples, share)).tolist() == expected


def test_many_classes_each_have_calibration_images_of_their_own():
    """2,000 of a, of which every second was held out, 3 of b of which none: evenly 500 of a."""
    samples = [data.Sample("", 0, cls, "row") for cls in ["a"] * 2000 + ["b"] * 3]
    held = np.arange(2003) % 2 == 1
    held[2000:] = False
    chosen = data.calibration_images(samples, held)
    assert chosen.tolist() == [*range(1, 2000, 4), 2000, 2001, 2002]
    many = [data.Sample("", 0, str(i % 20), "") for i in range(4000)]
    assert len(data.calibration_images(many, np.zeros(4000, bool))) == 20 * 100


def test_the_digest_of_a_run_is_of_its_images_names_and_sizes_wherever_they_lie(tmp_path):
    digests = {}
    for name, content in ("a/1", "x"), ("b/1", "y"), ("b/2", "x"), ("c/1", "xx"):
        touch(tmp_path, name)
        (tmp_path / name).write_text(content)
        digests[name] = data.digest([data.Sample(str(tmp_path / name), 0, "", "")])
    assert digests["a/1"] == digests["b/1"]
    assert len(set(digests.values())) == 3
