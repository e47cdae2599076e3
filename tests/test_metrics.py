"""metrics.py against scikit-learn, a brute-force loop over all thresholds, and figures by hand."""

import csv
import json
import math
import re
import runpy
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import trees
from PIL import Image
from scipy import ndimage, stats
from sklearn.metrics import average_precision_score, roc_auc_score

import data
import metrics

NAN = math.nan
UNDEFINED = {"p_auroc": NAN, "p_aupr": NAN, "aupro": NAN}


def brute_force_aupro(maps, masks, limit):
    """With the threshold at every value: per-region overlap over the false positive rate."""
    regions = []
    for s, mask in zip(maps, masks, strict=True):
        label, count = ndimage.label(mask, np.ones((3, 3)))
        regions += [s[label == i + 1] for i in range(count)]
    rate, overlap = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        rate.append(np.mean(maps[~masks] >= threshold))
        overlap.append(np.mean([np.mean(region >= threshold) for region in regions]))
    last = np.searchsorted(rate, limit)  # the first rate that is not below the limit
    end = np.interp(limit, rate[last - 1 : last + 1], overlap[last - 1 : last + 1])
    return np.trapezoid([*overlap[:last], end], [*rate[:last], limit]) / limit


@pytest.mark.parametrize("limit", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(40))
def test_pixel_metrics_are_those_of_scikit_learn_and_of_all_thresholds(seed, limit):
    """Maps of 1 to 4 images, every second with few levels and many ties; masks of any density."""
    rng = np.random.default_rng(seed)
    shape = rng.integers((1, 2, 2), (5, 10, 10))
    masks = rng.random(shape) < rng.choice([0.05, 0.2, 0.5, 0.9])
    masks.flat[:2] = True, False
    maps = rng.normal(size=shape) + masks * rng.choice([-1, 0, 1, 2])
    if seed % 2:
        maps = np.round(maps * rng.choice([0.5, 1, 3]))
    maps = maps.astype(rng.choice([np.float32, np.float64]))
    expected = {
        "p_auroc": roc_auc_score(masks.ravel(), maps.ravel()),
        "p_aupr": average_precision_score(masks.ravel(), maps.ravel()),
        "aupro": brute_force_aupro(maps, masks, limit),
    }
    assert metrics.pixel_metrics(maps, masks, limit) == pytest.approx(expected, abs=1e-9)


def test_aupro_is_integrated_up_to_a_false_positive_rate_of_0_3():
    masks = np.arange(11)[None, None] == 0
    # All tie: one ramp from (0, 0) to (1, 1), of area 0.3 * 0.3 / 2 below the limit.
    assert metrics.pixel_metrics(np.zeros((1, 1, 11)), masks)["aupro"] == pytest.approx(0.15)


@pytest.mark.parametrize("masks", [np.zeros((2, 3, 3)), np.ones((2, 3, 3)), np.zeros((0, 3, 3))])
def test_pixel_metrics_of_one_label_are_nan(masks):
    found = metrics.pixel_metrics(np.ones(masks.shape), masks)
    assert found == pytest.approx(UNDEFINED, nan_ok=True)


def row_of_the_table():
    """Four good and four defective images: samples, scores, maps, masks."""
    rng = np.random.default_rng(1)
    masks = rng.random((8, 6, 6)) < np.arange(8)[:, None, None] // 4 * 0.2
    samples = [data.Sample(f"{i}.png", i // 4, "c", "row", "m" * (i // 4)) for i in range(8)]
    return samples, rng.random(8), rng.random((8, 6, 6)) + 0.4 * masks, masks


@pytest.mark.parametrize("mask", ["m", None])
def test_a_row_has_the_metrics_of_its_images_and_pixels_unless_a_mask_is_unknown(mask):
    samples, scores, maps, masks = row_of_the_table()
    samples[5] = samples[5]._replace(mask=mask)
    expected = metrics.pixel_metrics(maps, masks) if mask else UNDEFINED
    expected |= {"i_auroc": roc_auc_score([0] * 4 + [1] * 4, scores)}
    assert metrics.evaluate(samples, scores, maps, masks) == pytest.approx(expected, nan_ok=True)


@pytest.mark.filterwarnings("error")
def test_a_row_of_good_images_only_has_no_auroc_of_its_images():
    assert math.isnan(metrics.evaluate(*(part[:4] for part in row_of_the_table()))["i_auroc"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("which", ["score", "map"])
def test_a_score_or_map_that_is_not_finite_names_the_image(which, value):
    samples, scores, maps, masks = row_of_the_table()
    (scores if which == "score" else maps)[6:7].flat[0] = value
    with pytest.raises(data.DataError, match="6.png"):
        metrics.evaluate(samples, scores, maps, masks)


# -------------------------------------------------------------------------------- the result table


def result(**rows):
    """Metrics of x, x - .1, x - .2 and x - .3 in each row; x below .5: image level only."""
    values = {row: [x, x - 0.1, x - 0.2, x - 0.3] if x >= 0.5 else [x] for row, x in rows.items()}
    keys = "i_auroc", "p_auroc", "p_aupr", "aupro"
    return {row: dict(zip(keys, x + [NAN] * 3, strict=False)) for row, x in values.items()}


def cells(runs, paper=None):
    return [re.split("  +", line) for line in metrics.table(runs, paper or {}).splitlines()]


def test_the_table_has_a_row_per_class_their_mean_and_the_papers_figures_beside_ours():
    paper = {"bottle": {"i_auroc": 1.0}, "mean": {"aupro": 0.5}, "other": {"p_aupr": 0.3}}
    assert cells([result(bottle=0.98765, cifar=0.4)], paper) == [
        ["class", "I-AUROC", "paper", "P-AUROC", "P-AUPR", "AUPRO", "paper"],
        ["bottle", "0.988", "1.000", "0.888", "0.788", "0.688", "-"],
        ["cifar", "0.400", "-", "-", "-", "-", "-"],
        ["mean", "0.694", "-", "0.888", "0.788", "0.688", "0.500"],
    ]


def test_several_runs_have_mean_and_deviation():
    assert cells([result(bottle=0.9, cifar=0.4), result(bottle=0.8, cifar=0.4)])[1:3] == [
        ["bottle", "0.850 ± 0.071", "0.750 ± 0.071", "0.650 ± 0.071", "0.550 ± 0.071"],
        ["cifar", "0.400 ± 0.000", "-", "-", "-"],
    ]


def test_joined_sets_have_a_mean_each():
    found = cells([result(**{"mvtec/a": 0.5, "mvtec/b": 0.7, "btad/01": 0.9})])[4:]
    means = {row: value for row, value, *_ in found}
    assert means == {"mean of mvtec": "0.600", "mean of btad": "0.900", "mean": "0.700"}


ARGS = {"data": "toy", "out": Path("runs/x"), "lr": 1e-4}
PAPER = {"mean": {"aupro": 0.9}}


def test_metrics_json_has_all_with_null_for_undefined_and_is_printed_again(tmp_path, capsys):
    metrics.save_result(tmp_path, ARGS, result(a=1 / 3), PAPER)
    row = {"i_auroc": 1 / 3, "p_auroc": None, "p_aupr": None, "aupro": None}
    assert json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail) == {
        "args": {"data": "toy", "out": "runs/x", "lr": 1e-4},
        "classes": {"a": row},
        "mean": row,
        "paper": PAPER,
    }
    metrics.main([tmp_path])
    assert capsys.readouterr().out == metrics.table([result(a=1 / 3)], PAPER) + "\n"


@pytest.mark.parametrize("other", ["has other classes", "is not finished"])
def test_runs_that_cannot_be_compared_are_named(tmp_path, other):
    for name, row in ("first", "a"), ("second", "b"):
        (tmp_path / name).mkdir()
        if name == "first" or other == "has other classes":
            metrics.save_result(tmp_path / name, ARGS, result(**{row: 0.9}), PAPER)
    with pytest.raises(data.DataError, match="second"):
        metrics.main([tmp_path / "first", tmp_path / "second"])


@pytest.mark.parametrize("flags, status", [(["--help"], 0), ([], 2)])
def test_metrics_py_has_a_help_and_wants_a_run(monkeypatch, capsys, flags, status):
    monkeypatch.setattr(sys, "argv", ["metrics.py", *flags])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(metrics.__file__, run_name="__main__")
    assert end.value.code == status
    assert "usage" in "".join(capsys.readouterr())


# ----------------------------------------------------------------------------------------- pictures


def test_brighter_heat_is_more_anomalous():
    heat = metrics.overlay(np.full((1, 20, 3), 100, np.uint8), np.linspace(2, 3, 20)[None], 2, 3)
    brightness = np.asarray(Image.fromarray(heat).convert("L"))[0].astype(int)
    assert np.diff(brightness).min() > 0


def test_strips_are_named_by_rank_and_show_the_image_and_its_mask(tmp_path):
    names = "good/a.png", "crack/c.png", "crack/b.JPG", f"good/{'長' * 80}/{'長' * 80}.png"
    samples = [data.Sample(f"test/{name}", "good" not in name, "c", "c") for name in names]
    images = np.stack([np.full((32, 32, 3), 10 * i, np.uint8) for i in range(4)])
    masks, maps = np.stack([trees.SQUARE] * 4), np.random.default_rng(0).random((4, 32, 32))
    normal = metrics.calibrate(maps, np.arange(4), samples)
    scores = np.array([1, 2, 3, 0])  # the highest comes first
    metrics.save_maps(tmp_path / "maps", images, samples, scores, maps, masks, normal)
    first, *paths = sorted((tmp_path / "maps").iterdir())
    assert first.name == "0000-defective-crack-b.png"
    assert [path.name for path in paths[:2]] == [
        "0001-defective-crack-c.png",
        "0002-good-good-a.png",
    ]
    expected = np.hstack([np.full((32, 32), 20), trees.SQUARE * 255])
    np.testing.assert_array_equal(np.asarray(Image.open(first))[:32, :64, 0], expected)


# ------------------------------------------------------------------------------- verdicts on images


def test_each_class_and_all_together_are_calibrated():
    rng = np.random.default_rng(0)
    maps, scores = rng.random((6, 8, 8)), rng.random(6)
    expected = {}
    for cls, part in ("", slice(None)), ("a", slice(0, 6, 2)), ("b", slice(1, 6, 2)):
        low, peak = np.median(maps[part]), np.quantile(maps[part].max((1, 2)), 0.99)
        scale = {"low": low, "peak": peak, "high": 2 * peak - low}
        expected[cls] = {"scores": scores[part].tolist(), **scale}
    samples = [data.Sample("", 0, cls, cls) for cls in "ababab"]
    assert metrics.calibrate(maps, scores, samples) == expected


@pytest.mark.parametrize("quantile, limit, above", [(1.0, 20, 0), (0.9, 18, 2)])
def test_the_threshold_is_a_quantile_with_clopper_and_pearsons_bound(quantile, limit, above):
    found, text = metrics.threshold({"scores": list(range(21))}, quantile)
    most = 100 * stats.beta.ppf(0.95, above + 1, 21 - above)
    assert found == pytest.approx(limit)
    assert f"{limit} " in text and f"{most:.1f} %" in text


def scores_of(**counts):
    return {cls.strip("_"): {"scores": list(range(n)), **SCALE} for cls, n in counts.items()}


SCALE = {"low": 0.0, "peak": 0.5, "high": 1.0}
LIMITS = [
    (scores_of(_=30, a=15, b=15), "a b all classes"),
    (scores_of(_=30, a=30), "a"),
    (scores_of(_=30), "all classes"),
]


@pytest.mark.parametrize("normal, named", LIMITS)
def test_every_limit_that_can_be_used_is_logged_by_name(caplog, normal, named):
    caplog.set_level("INFO")
    assert set(metrics.thresholds(normal, 0.9)) == set(normal)
    found = re.findall("^limit for (.*): ", "\n".join(caplog.messages), re.MULTILINE)
    assert sorted(" ".join(found).split()) == sorted(named.split())


@pytest.mark.parametrize("count, quantile, few", [(9, 0.9, 1), (10, 0.9, 0), (99, 0.99, 1)])
def test_a_limit_that_few_images_decide_is_warned_of(caplog, count, quantile, few):
    metrics.thresholds(scores_of(_=count + 1, a=count), quantile)
    assert len(re.findall("warning.* a.*--holdout", caplog.text)) == few


NORMAL = {"": SCALE | {"scores": [0.5]}, "a": SCALE | {"scores": [0.25]}}


def brightness(images):
    """Dark images are of class a."""
    maps = images.mean(-1) / 255
    scores = maps.max((1, 2))
    return maps, scores, ["a" if score < 0.4 else "" for score in scores]


def predict(folder, paths, judge=brightness, normal=NORMAL, crop=None):
    """Whether all could be read, and the rows of predictions.csv."""
    folder.mkdir()
    complete = metrics.predict(paths, judge, normal, 0.99, folder, 2, 16, crop)
    with open(folder / "predictions.csv", newline="") as file:
        return complete, list(csv.DictReader(file))


@pytest.fixture
def photos(tmp_path):
    """Five flat images, brighter from one to the next, of which the second is damaged."""
    flat = np.ones((4, 64, 3), np.uint8)
    paths = [trees.save(tmp_path / f"{i}.png", flat * np.uint8(51 * i)) for i in range(5)]
    Path(paths[1]).write_bytes(b"damaged")
    return paths


def test_every_file_has_a_row_in_the_given_order(tmp_path, photos, monkeypatch, caplog):
    read = data.read_image
    slow = {photos[4]: 0.2}
    monkeypatch.setattr(data, "read_image", lambda x: time.sleep(slow.get(x, 0)) or read(x))
    complete, rows = predict(tmp_path / "out", photos[::-1])
    keys = "file", "score", "verdict", "class", "threshold"
    assert [tuple(row[key] for key in keys) for row in rows] == [
        (photos[4], "0.8", "defective", "", "0.5"),
        (photos[3], "0.6", "defective", "", "0.5"),
        (photos[2], "0.4", "good", "", "0.5"),
        (photos[1], "", "unreadable", "", ""),
        (photos[0], "0", "good", "a", "0.25"),
    ]
    assert not complete
    assert photos[1] in caplog.text


def test_a_score_at_the_threshold_is_good_and_a_map_that_is_not_finite_has_no_verdict(
    tmp_path, photos
):
    normal = {"": NORMAL[""] | {"scores": [0.0]}}
    _, rows = predict(tmp_path / "a", photos[:1], normal=normal)
    assert rows[0]["verdict"] == "good"
    _, rows = predict(tmp_path / "b", photos[:1], lambda x: (x.mean(-1) * NAN, [0.1], ["a"]))
    assert (rows[0]["verdict"], rows[0]["score"]) == ("failed", "")


def test_every_row_names_its_own_picture(tmp_path, photos):
    complete, rows = predict(tmp_path / "out", photos[::2] * 2)
    pictures = [path.name for path in sorted((tmp_path / "out").glob("*.png"))]
    assert complete
    assert [row["picture"] for row in rows] == pictures


def test_the_centre_crop_is_what_is_judged(tmp_path):
    centre = np.zeros((16, 16, 3), np.uint8)
    centre[4:12, 4:12] = 255
    path = trees.save(tmp_path / "a.png", centre)
    _, rows = predict(
        tmp_path / "out", [path], lambda x: (x[..., 0], x.mean((1, 2, 3)), [""]), crop=8
    )
    assert rows[0]["score"] == "255"


def test_a_few_batches_at_most_are_in_memory(tmp_path, photos, monkeypatch):
    opened, drawn, ahead = [], [], []
    image = Image.open(photos[0]).convert("RGB")
    monkeypatch.setattr(data, "read_image", lambda path: opened.append(1) or (image.copy(), False))

    def draw_slowly(*_):
        time.sleep(0.002)
        drawn.append(1)
        ahead.append(len(opened) - len(drawn))

    monkeypatch.setattr(metrics, "save_strip", draw_slowly)
    predict(tmp_path / "out", photos[:1] * 60)
    assert max(ahead) <= 6 * 2  # batches of 2
