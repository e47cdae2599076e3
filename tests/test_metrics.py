"""metrics.py against scikit-learn, a brute-force loop over all thresholds, and figures by hand."""

import csv
import itertools
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
    masks[7] = False  # of a defect that resizing removed
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


def test_a_detector_that_is_wrong_is_below_one_half_in_metrics_and_table():
    samples, _, _, masks = row_of_the_table()
    row = metrics.evaluate(samples, np.array([0.9] * 3 + [0.1] * 5), 1.0 - masks, masks)
    assert (row["i_auroc"], row["p_auroc"], row["aupro"]) == (0.125, 0, 0)
    assert [line[1:3] for line in cells([{"c": row}])[1:]] == [["0.125", "0.000"]] * 2


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


def test_several_runs_have_mean_and_deviation_class_by_class():
    assert cells([result(bottle=0.9, cifar=0.4), result(cifar=0.4, bottle=0.8)])[1:3] == [
        ["bottle", "0.850 ± 0.071", "0.750 ± 0.071", "0.650 ± 0.071", "0.550 ± 0.071"],
        ["cifar", "0.400 ± 0.000", "-", "-", "-"],
    ]


def test_joined_sets_have_a_mean_each_and_no_mean_hides_a_class():
    rows = {"mvtec/a": 0.5, "mvtec/b": 0.7, "btad/01": 0.9, "mean of btad": 0.5, "mean": 0.4}
    found = [line[:2] for line in cells([result(**rows)])[1:]]
    assert found[:5] == [[name, f"{value:.3f}"] for name, value in rows.items()]
    assert found[5:] == [["mean of mvtec", "0.600"], ["mean of btad", "0.900"], ["mean", "0.600"]]


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


# ----------------------------------------------------------------------------------------- pictures
# Images, masks and maps are of tiles that all differ.

SCALES = {"a": (0, 1), "b": (2, 6), "": (-3, 9)}
CALIBRATION = {cls: {"low": low, "peak": 99, "high": high} for cls, (low, high) in SCALES.items()}
KINDS = ["good", "defective"]


def tiled(values, h=16, w=16):
    return values.repeat(h, 1).repeat(w, 2)


def tiles(path, rows, columns, h=16, w=16):
    """The mean colours of a strip's tiles."""
    strip = np.asarray(Image.open(path))
    assert strip[rows * h :].min() < 50  # a line of text
    strip = strip[: rows * h, : columns * w]
    return strip.reshape(rows, h, columns, w, 3)[:, 4:-4, :, 4:-4].mean((1, 3))


def heated(colours, levels):
    """The ramp at levels from 0 to 1 over the grey colours."""
    grey = colours @ np.array([0.299, 0.587, 0.114])
    at = np.clip(4 * levels - 0.5, 0, 3)  # a quarter for each of the ramp's four colours
    ramp = [np.interp(at, range(4), channel) for channel in np.transpose(metrics.RAMP)]
    return 0.55 * grey[..., None] + 0.45 * np.stack(ramp, -1)


def maps_of(levels, classes):
    low, high = np.transpose([SCALES.get(cls, SCALES[""]) for cls in classes])[..., None, None]
    return tiled(low + levels * (high - low))


@pytest.fixture
def texts(monkeypatch):
    """{name of a picture: the line below it}."""
    said, save = {}, metrics.save_strip

    def save_strip(path, pictures, text):
        said[path.name] = text
        save(path, pictures, text)

    monkeypatch.setattr(metrics, "save_strip", save_strip)
    return said


def test_a_strip_is_of_one_sample_on_its_classs_scale_the_highest_score_first(tmp_path, texts):
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (6, 2, 2, 3), np.uint8)
    masks, levels, scores = rng.random((6, 2, 2)) < 0.5, rng.random((6, 2, 2)), rng.random(6)
    labels = [0, 1, 1, 0, 1, 0]  # not the masks'
    samples = [data.Sample(f"d/{i}.x.png", labels[i], "abc"[i % 3], "") for i in range(6)]
    for name in "00006-good-old.jpg", "00006-note.jpg", "6-good-.jpg":
        Path(tmp_path, name).touch()

    stacked = scores, maps_of(levels, "abcabc"), tiled(masks)
    metrics.save_maps(tmp_path, tiled(colours), samples, *stacked, CALIBRATION)
    names = ["00006-note.jpg", "6-good-.jpg"]
    for rank, i in enumerate(np.argsort(scores)[::-1]):
        names.append(f"{rank:05d}-{KINDS[labels[i]]}-d-{i}.x.jpg")
        mask = np.repeat(255 * masks[i, ..., None], 3, -1)
        expected = np.hstack([colours[i], mask, heated(colours[i], levels[i])])
        np.testing.assert_allclose(tiles(tmp_path / names[-1], 2, 6), expected, atol=6)
        assert texts[names[-1]] == f"{scores[i]:.4g} {KINDS[labels[i]]} d/{i}.x.png"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


@pytest.mark.parametrize("size, crop", [(32, None), (64, 32)])
def test_a_verdict_shows_a_photo_as_the_network_sees_it_beside_its_own_heat(tmp_path, size, crop):
    """Photos of 4 x 4 tiles of 16 x 32 pixels; the network sees 32 x 32."""
    rng = np.random.default_rng(0)
    colours, levels = rng.integers(0, 256, (5, 4, 4, 3), np.uint8), rng.random((5, 2, 2))
    paths = []
    for i, pixels in enumerate(tiled(colours, w=32)):
        paths.append(trees.save(tmp_path / f"{i}.png", pixels))
    results = zip(maps_of(levels, "ababa"), [1, -1, 1, -1, 1], "ababa", strict=True)

    def judge(pixels):
        assert pixels.shape[1:] == (32, 32, 3)
        return zip(*itertools.islice(results, len(pixels)), strict=True)

    metrics.predict(paths, judge, CALIBRATION, {"a": 0, "b": 0}, tmp_path, 2, size, crop)
    for i in range(5):
        photo, level, shape = colours[i], levels[i].repeat(2, 0).repeat(2, 1), (4, 8, 16, 32)
        if crop:
            photo, level, shape = colours[i, 1:3, 1:3], levels[i], (2, 4)
        found = tiles(tmp_path / f"{i:05d}-{KINDS[(i + 1) % 2]}-{i}.jpg", *shape)
        np.testing.assert_allclose(found, np.hstack([photo, heated(photo, level)]), atol=6)


def test_the_outline_is_of_what_no_normal_image_of_the_class_has(tmp_path):
    """A map of 20 x 20 that steps from 0 to .4 to .8, of a grey photo of 100 x 100."""
    s = np.zeros((1, 20, 20))
    s[:, 6:14, :14] = 0.4
    s[:, 6:14, 6:14] = 0.8
    path = trees.save(tmp_path / "photo.png", np.full((100, 100, 3), 90, np.uint8))
    calibration = CALIBRATION | {"a": {"low": 0, "peak": 0.5, "high": 1}}
    metrics.predict([path], lambda _: (s, [0.8], "a"), calibration, {"a": 0}, tmp_path, 1, 20)
    heat = np.asarray(Image.open(tmp_path / "00000-defective-photo.jpg").convert("L"))
    heat = heat[:100, 100:200]
    rim = np.zeros((100, 100), bool)
    rim[25:75, 25:75] = True  # where the map passes the scale's peak
    rim[40:60, 40:60] = False
    assert heat[rim].max() > 240 > heat[~rim].max()


# ------------------------------------------------------------------------------- verdicts on photos


def test_each_class_and_all_together_are_calibrated():
    rng = np.random.default_rng(0)
    maps, scores = rng.random((6, 8, 8)), rng.random(6)
    samples = [data.Sample("", 0, cls, "row") for cls in "abcabc"]
    held = np.array([True, False, True, True, False, False])
    expected = {}
    for cls, part in ("", slice(6)), ("a", [0, 3]), ("b", [1, 4]), ("c", [2, 5]):
        low, peak = np.median(maps[part]), np.quantile(maps[part].max((1, 2)), 0.99)
        scale = {"low": low, "peak": peak, "high": 2 * peak - low}
        expected[cls] = {"scores": scores[part].tolist(), "held_out": cls == "a", **scale}
    assert metrics.calibrate(maps, scores, samples, held) == expected


def normal(count, held_out=True, first=0):
    return {"scores": list(range(first, first + count)), "held_out": held_out}


@pytest.mark.parametrize(
    "count, quantile, above, few",
    [(21, 1.0, 0, 1), (21, 0.9, 2, 0), (9, 0.9, 1, 1), (10, 0.9, 1, 0), (99, 0.99, 1, 1)],
)
def test_a_threshold_is_a_quantile_with_clopper_and_pearsons_bound_or_few_decide_it(
    caplog, count, quantile, above, few
):
    caplog.set_level("INFO")
    calibration = {"": normal(1), "a": normal(count), "b": normal(1000)}
    found = metrics.thresholds(calibration, quantile, ["a", "b"])
    most = 100 * stats.beta.ppf(0.95, above + 1, count - above)
    assert found["a"] == pytest.approx(quantile * (count - 1))
    assert caplog.messages[0] == (
        f"threshold for a: {found['a']:.4g}, the {quantile} quantile of {count} normal images; "
        f"at most {most:.1f} % false alarms, with 95 % confidence"
    )
    assert len(re.findall("warning: few .* threshold for a[ :].*--holdout", caplog.text)) == few


def test_each_class_has_its_own_threshold_and_claims_no_rate_if_it_trained(caplog):
    caplog.set_level("INFO")
    calibration = {"": normal(5, False), "a": normal(3), "b": normal(2, False, 9), "c": normal(1)}
    assert metrics.thresholds(calibration, 0.5, ["b", "", "b", "a"]) == {"b": 9.5, "": 2, "a": 1}
    found = [(line.split(":")[0], "trained" in line, "%" in line) for line in caplog.messages]
    assert found == [
        ("threshold for b", True, False),
        ("threshold for all classes", True, False),
        ("threshold for a", False, True),
    ]
    with pytest.raises(data.UserError, match="bottle"):
        metrics.thresholds(calibration, 0.5, ["a", "bottle"])


def brightness(images):
    """Dark images are of class a. A white one has no finite map."""
    maps = images.mean(-1) / 255
    scores = maps.max((1, 2))
    maps[maps == 1] = NAN
    return maps, scores, ["a" if score < 0.4 else "" for score in scores]


def predict(paths, judge, folder, batch_size):
    return metrics.predict(paths, judge, CALIBRATION, {"": 0.5, "a": 0}, folder, batch_size, 16)


def rows(folder):
    return list(csv.reader((folder / "predictions.csv").read_text("utf-8").splitlines()))


def test_every_file_has_a_row_in_the_given_order(tmp_path, caplog, texts):
    flat, name = np.ones((4, 64, 3), np.uint8), "é" * 110
    paths = [trees.save(tmp_path / f"{i}{name}.png", flat * np.uint8(51 * i)) for i in range(6)]
    Path(paths[1]).write_bytes(b"damaged")
    assert not predict(paths[::-1], brightness, tmp_path, 4)
    name = name[:99]  # with its digit 199 bytes: a 200th is half of a character
    assert rows(tmp_path) == [
        ["file", "score", "verdict", "class", "threshold", "picture"],
        [paths[5], "", "failed", "", "", ""],
        [paths[4], "0.8", "defective", "", "0.5", f"00001-defective-4{name}.jpg"],
        [paths[3], "0.6", "defective", "", "0.5", f"00002-defective-3{name}.jpg"],
        [paths[2], "0.4", "good", "", "0.5", f"00003-good-2{name}.jpg"],
        [paths[1], "", "unreadable", "", "", ""],
        [paths[0], "0", "good", "a", "0", f"00005-good-0{name}.jpg"],  # at the threshold: good
    ]
    assert len(list(tmp_path.glob("*.jpg"))) == 4
    said = texts[f"00001-defective-4{name}.jpg"], texts[f"00005-good-0{name}.jpg"]
    first, last = Path(paths[4]).name, Path(paths[0]).name
    assert said == (f"defective 0.8 (threshold 0.5)  {first}", f"good 0 (threshold 0) a {last}")
    assert paths[1] in caplog.text


def test_photos_are_read_a_few_batches_ahead_and_an_interrupt_keeps_the_rows(tmp_path, monkeypatch):
    paths = [trees.image(tmp_path / f"{i}.png") for i in range(40)]
    read, judged, ahead = [], [], []
    read_image = data.read_image
    monkeypatch.setattr(data, "read_image", lambda path: read.append(path) or read_image(path))

    def judge(images):
        judged.extend(images)
        ahead.append(len(read) - len(judged))
        if len(judged) == 20:
            assert [file for file, *_ in rows(tmp_path)[1:]] == paths[: 20 - 2 * 2]
            raise KeyboardInterrupt
        return brightness(images)

    with pytest.raises(KeyboardInterrupt):
        predict(paths, judge, tmp_path, 2)
    assert max(ahead) <= 3 * 2
    assert len(rows(tmp_path)) > 20 - 2 * 2
