"""metrics.py against scikit-learn, a brute-force loop over all thresholds, and figures by hand."""

import csv
import json
import math
import re
import runpy
import sys
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


@pytest.mark.parametrize("label", [0, 1])
def test_pixel_metrics_of_one_label_are_nan(label):
    found = metrics.pixel_metrics(np.ones((2, 3, 3)), np.full((2, 3, 3), label))
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
    expected |= {"aupro": brute_force_aupro(maps, masks, 0.3)} if mask else {}
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


def test_metrics_json_has_null_for_undefined_and_is_printed_again(tmp_path, monkeypatch, capsys):
    metrics.save_result(tmp_path, ARGS, result(a=1 / 3), PAPER)
    row = {"i_auroc": 1 / 3, "p_auroc": None, "p_aupr": None, "aupro": None}
    assert json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail) == {
        "args": {"data": "toy", "out": "runs/x", "lr": 1e-4},
        "classes": {"a": row},
        "mean": row,
        "paper": PAPER,
    }
    monkeypatch.setattr(sys, "argv", ["metrics.py", str(tmp_path)])
    runpy.run_path(metrics.__file__, run_name="__main__")
    assert capsys.readouterr().out == metrics.table([result(a=1 / 3)], PAPER) + "\n"


def test_runs_of_other_classes_are_not_compared(tmp_path):
    for name in "a", "b":
        (tmp_path / name).mkdir()
        metrics.save_result(tmp_path / name, ARGS, result(**{name: 0.9}), PAPER)
    with pytest.raises(data.DataError, match="other classes"):
        metrics.main([tmp_path / "a", tmp_path / "b"])


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


@pytest.mark.parametrize("count, quantile, few", [(9, 0.9, 1), (10, 0.9, 0), (99, 0.99, 1)])
def test_a_limit_that_few_images_decide_is_warned_of(caplog, count, quantile, few):
    limits = metrics.thresholds({"a": {"scores": list(range(count))}}, quantile)
    assert limits == pytest.approx({"a": quantile * (count - 1)})
    assert len(re.findall("warning.* a.*--holdout", caplog.text)) == few


SCALE = {"low": 0.0, "peak": 0.5, "high": 1.0}
NORMAL = {"": SCALE | {"scores": [0.5]}, "a": SCALE | {"scores": [0.0]}}


def brightness(images):
    """Dark images are of class a. A white one has no finite map."""
    maps = images.mean(-1) / 255
    scores = maps.max((1, 2))
    maps[maps == 1] = NAN
    return maps, scores, ["a" if score < 0.4 else "" for score in scores]


def test_the_picture_is_bright_where_the_map_is_and_outlines_what_no_normal_image_has(tmp_path):
    """A map of 20 x 20 that steps from 0 to .4 to .8, of a grey photo of 100 x 100."""
    s = np.zeros((1, 20, 20))
    s[:, 6:14, :14] = 0.4
    s[:, 6:14, 6:14] = 0.8
    path = trees.save(tmp_path / "photo.png", np.full((100, 100, 3), 90, np.uint8))
    normal = {"": {"low": 3.0, "peak": 4.0, "high": 5.0, "scores": [4.0]}, "a": NORMAL[""]}
    metrics.predict([path], lambda images: (s, [0.8], ["a"]), normal, 0.99, tmp_path, 1, 20)
    (picture,) = tmp_path.glob("00000-defective-photo.jpg")
    heat = np.asarray(Image.open(picture).convert("L"))[:100, 100:200].astype(int)
    cold, warm, hot = heat[5, 5], heat[50, 15], heat[50, 50]
    assert cold + 20 < warm < hot - 20
    rim = np.zeros((100, 100), bool)
    rim[25:75, 25:75] = True  # where the map passes the scale's peak
    rim[40:60, 40:60] = False
    assert heat[rim].max() > 240 > heat[~rim].max()


def test_strips_of_image_mask_and_heat_begin_with_the_highest_score(tmp_path):
    samples, scores, _, _ = row_of_the_table()
    images = np.full((8, 32, 32, 3), 90, np.uint8)
    maps = np.zeros((8, 32, 32))
    metrics.save_maps(tmp_path, images, samples, scores, maps, maps == 0, NORMAL)
    paths = sorted(tmp_path.iterdir())
    assert [int(path.stem[-1]) for path in paths] == np.argsort(-scores).tolist()
    image, mask, heat = np.split(np.asarray(Image.open(paths[0]))[:32, :96], 3, axis=1)
    np.testing.assert_allclose(image.mean((0, 1)), [90, 90, 90], atol=5)
    np.testing.assert_allclose(mask.mean((0, 1)), [255, 255, 255], atol=5)
    np.testing.assert_allclose(
        heat.mean((0, 1)), 0.55 * 90 + 0.45 * np.array(metrics.RAMP[0]), atol=5
    )


def test_photos_are_read_a_few_batches_ahead_whatever_their_number(tmp_path, monkeypatch):
    paths = [trees.image(tmp_path / f"{i}.png") for i in range(40)]
    read, judged, ahead = [], [], []
    read_image = data.read_image
    monkeypatch.setattr(data, "read_image", lambda path: read.append(path) or read_image(path))

    def judge(images):
        judged.extend(images)
        ahead.append(len(read) - len(judged))
        return brightness(images)

    metrics.predict(paths, judge, NORMAL, 0.99, tmp_path, 2, 16)
    assert max(ahead) <= 3 * 2


def test_every_file_has_a_row_in_the_given_order(tmp_path, caplog):
    flat = np.ones((4, 64, 3), np.uint8)
    paths = [trees.save(tmp_path / f"{i}.png", flat * np.uint8(51 * i)) for i in range(6)]
    Path(paths[1]).write_bytes(b"damaged")
    complete = metrics.predict(paths[::-1], brightness, NORMAL, 0.99, tmp_path, 2, 16)
    rows = list(csv.DictReader((tmp_path / "predictions.csv").read_text().splitlines()))
    keys = "file", "score", "verdict", "class", "threshold"
    assert [tuple(row[key] for key in keys) for row in rows] == [
        (paths[5], "", "failed", "", ""),
        (paths[4], "0.8", "defective", "", "0.5"),
        (paths[3], "0.6", "defective", "", "0.5"),
        (paths[2], "0.4", "good", "", "0.5"),
        (paths[1], "", "unreadable", "", ""),
        (paths[0], "0", "good", "a", "0"),  # a score at the threshold is good
    ]
    assert not complete
    assert paths[1] in caplog.text
