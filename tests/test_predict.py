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


@pytest.fixture(scope="module")
def judged_by(tiny_runs, photos_to_copy, shrink, call, tmp_path_factory):
    """script: the rows of the test photos, and the folder of their pictures."""
    found = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        shrink(monkeypatch)
        monkeypatch.chdir(photos_to_copy.parent)
        for script, run in tiny_runs.items():
            folder = tmp_path_factory.mktemp("judged") / script
            photos = "photos/weave/test", "photos/pill/test"
            call(script, "--eval", run, "--predict", *photos, "--out", folder)
            found[script] = read(folder), folder
    return found


@pytest.fixture
def judged(script, judged_by):
    return judged_by[script][0]


def test_rows_are_in_the_order_of_the_command_line_and_then_of_names(judged, photos):
    files = [sorted(Path("photos", cls, "test").rglob("*.png")) for cls in ("weave", "pill")]
    assert [row["file"] for row in judged] == [str(path) for path in files[0] + files[1]]


def test_what_is_above_the_threshold_is_defective(judged):
    for row in judged:
        above = float(row["score"]) > float(row["threshold"])
        assert row["verdict"] == ("defective" if above else "good")


def test_each_row_has_a_picture(script, judged_by):
    rows, folder = judged_by[script]
    assert {row["picture"] for row in rows} == {path.name for path in folder.glob("*.png")}


def test_the_scores_are_those_of_the_table(judged, tiny_run):
    table = json.loads((tiny_run / "metrics.json").read_text())["classes"]
    for cls in "pill", "weave":
        rows = [row for row in judged if f"/{cls}/" in row["file"]]
        labels = ["/good/" not in row["file"] for row in rows]
        found = roc_auc_score(labels, [float(row["score"]) for row in rows])
        assert found == pytest.approx(table[cls]["i_auroc"])


# ------------------------------------------------------------------------------------- the class


@pytest.mark.parametrize("script", ["mintad"])
def test_mintad_finds_the_class(judged):
    assert [row["class"] for row in judged] == [row["file"].split("/")[1] for row in judged]


def test_mintad_finds_the_class_among_the_four_of_the_toy_set(mintad_run, call, tmp_path):
    _, _, test = data.load("toy")
    for sample in test[::11]:
        Image.fromarray(sample.pixels).save(tmp_path / f"{sample.image[-3:]} {sample.cls}.png")
    call("mintad", "--eval", mintad_run, "--predict", tmp_path, "--out", tmp_path / "new")
    for row in read(tmp_path / "new"):
        assert Path(row["file"]).stem.split()[1] == row["class"]


@pytest.mark.parametrize("script", ["minimaxad"])
def test_a_unified_model_of_minimaxad_knows_no_class(judged):
    assert {row["class"] for row in judged} == {""}


def test_classes_says_which_it_is(predict):
    predict("photos/pill/test", flags=["--classes", "weave"])
    assert {row["class"] for row in read("new")} == {"weave"}


@pytest.mark.parametrize("classes", [[], ["--classes", "weave", "pill"]])
def test_a_separate_model_knows_its_class(script, tiny, classes, predict, call):
    call(script, *tiny, "--no-unified", "--epochs", 1, *classes, "--out", "run")
    predict("photos/pill/test", model="run/weave.pt")
    assert {row["class"] for row in read("new")} == {"weave"}


# --------------------------------------------------------------------------------- the threshold


def test_a_separate_model_has_a_threshold_for_its_class_only(script, tiny, predict, call):
    call(script, *tiny, "--no-unified", "--epochs", 1, "--out", "run")
    said = predict("photos/weave/test", model="run/weave.pt").out
    assert re.findall("^threshold ([a-z]+)", said, re.MULTILINE) == ["weave"]


def test_the_threshold_is_the_score_of_the_photo_that_was_held_out(predict):
    predict("photos/pill/train", flags=["--classes", "pill"])
    at = [row["verdict"] for row in read("new") if row["score"] == row["threshold"]]
    assert at == ["good"]  # one of six


@pytest.mark.parametrize("script", ["minimaxad"])
def test_without_a_class_the_threshold_is_that_of_all_held_out_photos(predict):
    limits = {}
    for flags in ["--classes", "pill"], ["--classes", "weave"], ["--quantile", "0.5"]:
        predict("photos/pill/test/good/000.png", out=flags[1], flags=flags)
        limits[flags[1]] = float(read(flags[1])[0]["threshold"])
    assert limits["0.5"] == pytest.approx((limits["pill"] + limits["weave"]) / 2, rel=1e-4)


@pytest.mark.parametrize("quantile, limit", [(0, min), (1, max)])
def test_without_hold_out_the_threshold_is_of_the_training_photos(
    script, tiny, quantile, limit, predict, call
):
    call(script, *tiny, "--holdout", 0, "--epochs", 1, "--classes", "pill", "--out", "run")
    predict("photos/pill/train", model="run", flags=["--quantile", quantile])
    rows = read("new")
    assert float(rows[0]["threshold"]) == limit(float(row["score"]) for row in rows)


# -------------------------------------------------------------------------------- odd photos


def test_photos_of_other_sizes_and_modes_are_judged(predict):
    Path("odd").mkdir()
    image = Image.open("photos/pill/test/good/000.png")
    for name, size, mode in [("a", (300, 200), "L"), ("b", (31, 500), "RGBA"), ("c", (9, 9), "P")]:
        image.resize(size).convert(mode).save(f"odd/{name}.png")
    assert predict("odd").status == 0


def test_an_unreadable_photo_is_told_by_the_exit_status(predict):
    Path("photos/pill/test/good/0000.png").write_text("no image")
    assert predict("photos/pill/test").status == 1


def test_an_unreadable_photo_costs_only_itself(predict):
    Path("photos/pill/test/good/0000.png").write_text("no image")
    predict("photos/pill/test")
    verdicts = {Path(row["file"]).name: row["verdict"] for row in read("new")}
    assert verdicts.pop("0000.png") == "unreadable"
    assert set(verdicts.values()) <= {"good", "defective"}


@pytest.mark.parametrize("out", ["new", "photos", "photos/pill/test/good"])
def test_photos_stay_as_they_are(predict, out):
    before = {path: path.read_bytes() for path in Path("photos").rglob("*.*")}
    predict("photos/pill/test", out=out)
    assert {path: path.read_bytes() for path in Path("photos").rglob("*.*")} == before
