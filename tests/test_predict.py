"""--predict: a row of predictions.csv and a picture for each photo, by a model that a run left."""

import csv
import json
import re
from pathlib import Path

import pytest
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
    said = predict("photos/pill/test", "photos/weave/test", flags=flags).out
    assert ("threshold for all classes" in said) == (script == "minimaxad" and not flags)
    for row in read("new"):
        found = Path(row["file"]).parts[1] if script == "mintad" else ""
        assert row["class"] == ("weave" if flags else found)


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


def test_a_separate_model_knows_its_class_and_has_its_threshold_only(script, tiny, predict, call):
    flags = "--no-unified", "--epochs", 1, "--classes", "weave", "pill"
    call(script, *tiny, *flags, "--out", "run")
    said = predict("photos/pill/test", model="run/weave.pt").out
    assert {row["class"] for row in read("new")} == {"weave"}
    assert re.findall("^threshold for (.*): ", said, re.MULTILINE) == ["weave"]


@pytest.mark.parametrize("count, holdout", [(2, 0.1), (1, 0.1), (2, 0)])
def test_a_classs_threshold_is_of_its_held_out_photos_or_claims_no_rate(
    script, tiny, predict, call, count, holdout
):
    for path in sorted(Path("photos/weave/train/good").iterdir())[count:]:
        path.unlink()
    call(script, *tiny, "--epochs", 1, "--holdout", holdout, "--out", "run")
    for cls in "pill", "weave":
        flags = "--classes", cls, "--quantile", 1
        said = predict(f"photos/{cls}/train", model="run", out=cls, flags=flags).out
        rows = read(cls)
        held_out = holdout > 0 and len(rows) > 1
        scores = [float(row["score"]) for row in rows]
        expected = scores[0] if held_out else max(scores)  # the first is held out
        assert float(rows[0]["threshold"]) == pytest.approx(expected, rel=1e-3)
        (told,) = re.findall("^threshold for .*", said, re.MULTILINE)
        assert told.startswith(f"threshold for {cls}: ")
        assert ("% false alarms" in told, "trained" in told) == (held_out, not held_out)


def test_a_photo_that_is_not_judged_gives_exit_status_1_and_costs_only_itself(predict):
    Path("photos/odd.png").write_text("no image")
    assert predict("photos/odd.png", "photos/pill/test").status == 1
    assert [row["verdict"] == "unreadable" for row in read("new")] == [True] + [False] * 4


@pytest.mark.parametrize(
    "paths, out, flags, status",
    [
        (["photos/pill/test"], "new", [], 0),
        (["photos/pill/test"], "photos/new", [], 0),
        (["photos/pill/test"], "photos/pill/test", [], 2),
        (["photos/weave", "photos/pill/test"], "photos/pill/test/good/new", [], 2),
        (["photos", ""], "../outside", [], 2),
        (["photos"], "new", ["--classes", "bottle"], 2),
    ],
)
def test_photos_stay_as_they_are_and_none_is_judged_if_something_is_wrong(
    predict, paths, out, flags, status
):
    def files():
        return {path: path.read_bytes() for path in Path("photos").rglob("*.*") if path.is_file()}

    before = files()
    result = predict(*paths, out=out, flags=flags)
    assert result.status == status
    assert Path(out, "predictions.csv").exists() == (status == 0)
    assert before.items() <= files().items()
    if status:
        assert files() == before and re.match("error: --(predict|out|classes)", result.error)


def test_an_interrupt_keeps_rows_has_its_own_status_and_says_nothing_of_resume(
    predict, monkeypatch
):
    read_image = data.read_image

    def interrupted(path):  # in a thread, of the last batch
        if path == "photos/weave/train/good/005.png":
            raise KeyboardInterrupt
        return read_image(path)

    monkeypatch.setattr(data, "read_image", interrupted)
    result = predict("photos")
    assert result.status == 130
    assert "interrupted" in result.error and "--resume" not in result.out + result.error
    assert 12 <= len(read("new")) < 24
