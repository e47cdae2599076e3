"""--predict: a row of predictions.csv and a picture for each photo, by a model that a run left."""

import csv
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

import data


def read(folder):
    with open(Path(folder, "predictions.csv"), newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def predict(script, tiny_run, call):
    """A function that judges files, by the tiny run's model, into the folder "new"."""

    def predict(*paths, model=tiny_run, out="new", flags=()):
        return call(script, "--eval", model, "--predict", *paths, "--out", out, *flags)

    return predict


def test_each_photo_has_a_row_in_order_a_picture_and_the_score_of_the_table(predict, tiny_run):
    predict("photos/weave/test", "photos/pill/test")
    rows = read("new")
    files = [sorted(Path("photos", cls, "test").rglob("*.png")) for cls in ("weave", "pill")]
    assert [row["file"] for row in rows] == [str(path) for path in files[0] + files[1]]
    pictures = {path.name for path in Path("new").iterdir()} - {"args.json", "log.txt"}
    assert {row["picture"] for row in rows} == pictures - {"predictions.csv"}

    table = json.loads((tiny_run / "metrics.json").read_text())["classes"]
    for cls in "pill", "weave":
        mine = [row for row in rows if f"/{cls}/" in row["file"]]
        labels = ["/good/" not in row["file"] for row in mine]
        found = roc_auc_score(labels, [float(row["score"]) for row in mine])
        assert found == pytest.approx(table[cls]["i_auroc"])


@pytest.mark.parametrize("flags", [[], ["--classes", "weave"]])
def test_the_class_is_the_users_or_is_found_by_mintad_only(script, predict, flags):
    predict("photos/pill/test", flags=flags)
    found = "pill" if script == "mintad" else ""
    assert {row["class"] for row in read("new")} == {"weave" if flags else found}


@pytest.mark.parametrize("script", ["mintad"])
def test_the_distance_is_that_of_the_users_class(script, tiny, predict, call):
    call(script, *tiny, "--distance", "mahalanobis", "--out", "run")
    scores = {}
    for cls in "pill", "weave":
        predict("photos/pill/test", model="run", out=cls, flags=["--classes", cls])
        scores[cls] = float(read(cls)[0]["score"])
    predict("photos/pill/test", model="run")
    found = read("new")[0]
    assert float(found["score"]) == pytest.approx(scores[found["class"]], rel=1e-3)
    assert scores["pill"] != pytest.approx(scores["weave"], rel=1e-3)


def test_mintad_finds_the_class_among_the_four_of_the_toy_set(toy_run, call, tmp_path):
    _, _, test = data.load("toy")
    for sample in test[::11]:
        Image.fromarray(sample.pixels).save(tmp_path / f"{sample.image[-3:]} {sample.cls}.png")
    call("mintad", "--eval", toy_run("mintad"), "--predict", tmp_path, "--out", tmp_path / "new")
    for row in read(tmp_path / "new"):
        assert Path(row["file"]).stem.split()[1] == row["class"]


def test_a_separate_model_knows_its_class_and_has_its_limit_only(script, tiny, predict, call):
    flags = "--no-unified", "--epochs", 1, "--classes", "weave", "pill"
    call(script, *tiny, *flags, "--out", "run")
    said = predict("photos/pill/test", model="run/weave.pt").out
    assert {row["class"] for row in read("new")} == {"weave"}
    assert re.findall("^limit for (.*): ", said, re.MULTILINE) == ["weave"]


def test_the_threshold_is_the_score_of_the_photo_that_was_held_out(predict):
    predict("photos/pill/train", flags=["--classes", "pill"])
    held, *_ = read("new")  # the first of six
    assert float(held["score"]) == pytest.approx(float(held["threshold"]), rel=1e-3)


@pytest.mark.parametrize("script", ["minimaxad"])
def test_without_a_class_the_threshold_is_that_of_all_held_out_photos_and_is_told(predict):
    limits = {}
    for flags in ["--classes", "pill"], ["--classes", "weave"], ["--quantile", "0.5"]:
        said = predict("photos/pill/test/good", out=flags[1], flags=flags).out
        limits[flags[1]] = float(read(flags[1])[0]["threshold"])
    assert limits["0.5"] == pytest.approx((limits["pill"] + limits["weave"]) / 2, rel=1e-3)
    told = re.search("limit for all classes: ([0-9.e-]+)", said)[1]
    assert float(told) == pytest.approx(limits["0.5"], rel=1e-3)


def test_without_hold_out_the_threshold_is_of_the_training_photos(script, tiny, predict, call):
    call(script, *tiny, "--holdout", 0, "--epochs", 1, "--classes", "pill", "--out", "run")
    for quantile, limit in (0, min), (1, max):
        predict("photos/pill/train", model="run", out=quantile, flags=["--quantile", quantile])
        rows = read(str(quantile))
        expected = limit(float(row["score"]) for row in rows)
        assert float(rows[0]["threshold"]) == pytest.approx(expected, rel=1e-3)


def test_photos_of_other_sizes_and_modes_are_judged_and_an_unreadable_one_is_told(predict):
    Path("odd").mkdir()
    image = Image.open(next(Path("photos/pill/test/good").iterdir()))
    for name, size, mode in [("a", (300, 200), "L"), ("b", (31, 500), "RGBA"), ("c", (9, 9), "P")]:
        image.resize(size).convert(mode).save(f"odd/{name}.png")
    assert predict("odd").status == 0
    Path("odd/b.png").write_text("no image")
    assert predict("odd", out="again").status == 1
    assert [row["verdict"] == "unreadable" for row in read("again")] == [False, True, False]


@pytest.mark.parametrize("out", ["new", "photos", "photos/pill/test/good", "photos/pill/test/new"])
def test_photos_stay_as_they_are(predict, out):
    before = {path: path.read_bytes() for path in Path("photos").rglob("*.*")}
    predict("photos/pill/test", out=out)
    assert all(path.read_bytes() == content for path, content in before.items())
