"""metrics.py against scikit-learn, a brute-force region loop over all thresholds, and figures by hand."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import metrics

LIMITS = [0.001, 0.05, 0.3, 0.5, 1.0]


def flood_regions(mask):
    """8-connected regions of one mask as lists of (y, x), by flood fill."""
    todo, regions = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask))}, []
    while todo:
        stack, region = [todo.pop()], []
        while stack:
            y, x = stack.pop()
            region.append((y, x))
            for near in {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & todo:
                todo.remove(near)
                stack.append(near)
        regions.append(region)
    return regions


def pro_curve(maps, masks):
    """(false positive rate, per-region overlap) with the threshold at every distinct score, highest first."""
    regions = [np.array([m[p] for p in region]) for m, k in zip(maps, masks) for region in flood_regions(k)]
    normal = maps[~masks]
    curve = [(0.0, 0.0)]
    for threshold in np.unique(maps)[::-1]:
        curve.append((np.mean(normal >= threshold), np.mean([np.mean(r >= threshold) for r in regions])))
    return curve


def area_below(curve, limit):
    """Trapezoids up to the limit, where the curve is interpolated, divided by the limit."""
    area = 0.0
    for (x0, y0), (x1, y1) in zip(curve, curve[1:]):
        if x0 >= limit:
            break
        if x1 > limit:
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


def random_case(rng):
    shape = tuple(rng.integers([1, 2, 2], [5, 10, 10]))
    masks = rng.random(shape) < rng.choice([0.05, 0.2, 0.5, 0.9])  # single pixels up to one large region
    if rng.random() < 0.3:
        masks[:, : shape[1] // 2] = False  # room for normal pixels in one piece
    if not masks.any() or masks.all():
        masks.flat[0], masks.flat[1] = True, False
    scores = rng.normal(size=shape) + masks * rng.choice([0.0, 0.5, 2.0, -1.0])
    kind = rng.integers(5)
    if kind == 0:
        scores = np.round(scores)  # few levels, among them negative ones
    elif kind == 1:
        scores = np.round(scores * 4) / 4 - 3  # all but a few negative
    elif kind == 2:
        scores = (scores > 0).astype(float)  # two levels: every group straddles the limit
    elif kind == 3:
        scores = np.exp(scores) * 1e-6
    return scores.astype(rng.choice([np.float32, np.float64])), masks


@pytest.mark.parametrize("seed", range(20))
def test_pixel_metrics_equal_scikit_learn_and_brute_force(seed):
    rng = np.random.default_rng(seed)
    for _ in range(20):
        maps, masks = random_case(rng)
        curve = pro_curve(maps, masks)
        for limit in LIMITS:
            got = metrics.pixel_metrics(maps, masks, limit)
            assert got["aupro"] == pytest.approx(area_below(curve, limit), abs=1e-9)
        assert got["p_auroc"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-9)
        assert got["p_aupr"] == pytest.approx(average_precision_score(masks.ravel(), maps.ravel()), abs=1e-9)


def test_a_tie_group_that_straddles_the_limit_is_cut_there():
    maps, masks = np.zeros((1, 1, 11)), np.zeros((1, 1, 11), bool)
    masks[0, 0, 0] = True  # one ramp from (0, 0) to (1, 1): area 0.3 * 0.3 / 2 below the limit
    got = metrics.pixel_metrics(maps, masks)
    assert got == pytest.approx({"p_auroc": 0.5, "p_aupr": 1 / 11, "aupro": 0.15})
    assert metrics.pixel_metrics(maps, masks, 1.0)["aupro"] == pytest.approx(0.5)


def test_the_default_limit_is_0_3():
    maps, masks = random_case(np.random.default_rng(5))
    assert metrics.pixel_metrics(maps, masks) == metrics.pixel_metrics(maps, masks, 0.3)


def test_regions_weigh_the_same_and_diagonal_neighbours_are_one_region():
    maps, masks = np.zeros((2, 4, 8)), np.zeros((2, 4, 8), bool)
    masks[0, 0, 0] = masks[0, 1, 1] = True  # touch at a corner: one region, half of it found
    masks[0, 3, 3:] = True  # five pixels, none found
    masks[1, 0, 0] = True  # lies where an image before has a region, but is its own: found
    maps[masks] = -1.0
    maps[0, 0, 0] = maps[1, 0, 0] = 1.0
    # found at false positive rate 0, the rest only at rate 1
    assert metrics.pixel_metrics(maps, masks)["aupro"] == pytest.approx((0.5 + 0 + 1) / 3)
    weight, regions = metrics.region_weights(masks)
    assert regions == 3
    assert weight == pytest.approx([0.5, 0.5, 0.2, 0.2, 0.2, 0.2, 0.2, 1])


def test_normal_pixels_of_defective_images_count():
    maps = np.array([[[1.0, 2.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 0.0]]])
    masks = np.array([[[1, 0, 0, 0]], [[0, 0, 0, 0]]], bool)
    assert metrics.pixel_metrics(maps, masks, 0.3)["aupro"] == pytest.approx(1 - (1 / 7) / 0.3)


@pytest.mark.parametrize("seed", range(10))
def test_a_monotone_transform_changes_nothing(seed):
    maps, masks = random_case(np.random.default_rng(seed))
    ranks = np.unique(maps, return_inverse=True)[1].reshape(maps.shape)
    for transformed in (ranks, ranks**3 - 100.0, ranks.astype(np.float32) / 7):
        assert metrics.pixel_metrics(transformed, masks) == metrics.pixel_metrics(maps, masks)


def test_inputs_stay_as_they_are_and_masks_may_be_integers():
    maps, masks = random_case(np.random.default_rng(3))
    before = maps.copy()
    got = metrics.pixel_metrics(maps, masks.astype(np.uint8) * 255)
    assert np.array_equal(maps, before) and got == metrics.pixel_metrics(maps, masks)


def test_many_pixels_in_float32():
    rng = np.random.default_rng(0)
    maps = rng.random((4, 64, 64), dtype=np.float32)
    masks = np.zeros(maps.shape, bool)
    masks[1:, 10:30, 10:30] = True
    masks[2:, 40:50, 5:60] = True
    maps[masks] += np.float32(0.3)
    labels, scores = masks.ravel(), maps.ravel()
    got = metrics.pixel_metrics(maps, masks)
    assert got["p_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)
    assert got["p_aupr"] == pytest.approx(average_precision_score(labels, scores), abs=1e-9)
    weights = np.ones(len(labels))  # AUPRO is the area below a weighted ROC curve
    weights[labels] = metrics.region_weights(masks)[0]
    for limit in LIMITS:
        area = roc_auc_score(labels, scores, sample_weight=weights, max_fpr=limit)
        least = limit / 2  # scikit-learn scales the part of the area so that chance is 0.5 (McClish)
        area = area if limit == 1 else least + (2 * area - 1) * (1 - least)
        assert metrics.pixel_metrics(maps, masks, limit)["aupro"] == pytest.approx(area, abs=1e-9)


def test_the_benchmark_compares_with_scikit_learn():
    script = Path(__file__).with_name("benchmark_metrics.py")
    result = subprocess.run([sys.executable, script, "5"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = re.fullmatch(r"5 maps of 224 x 224: [\d.]+ s, peak memory [\d.]+ GB; scikit-learn's AUROC and AP "
                         r"take ([\d.]+) times as long; largest difference (.*)\n", result.stdout)
    assert float(found[1]) > 1 and float(found[2]) < 1e-12


@pytest.mark.parametrize("masks", [np.zeros((2, 3, 3)), np.ones((2, 3, 3)), np.zeros((0, 3, 3))])
def test_undefined_pixel_metrics_are_nan(masks):
    got = metrics.pixel_metrics(np.ones(masks.shape, np.float32), masks)
    assert list(got) == ["p_auroc", "p_aupr", "aupro"] and all(math.isnan(v) for v in got.values())


@pytest.mark.parametrize("limit", [0, -0.1, 1.01, float("nan")])
def test_the_limit_must_lie_in_0_1(limit):
    with pytest.raises(ValueError, match="fpr_limit"):
        metrics.pixel_metrics(np.ones((1, 2, 2)), np.eye(2, dtype=bool)[None], limit)


def test_maps_and_masks_must_agree():
    with pytest.raises(IndexError, match="did not match"):
        metrics.pixel_metrics(np.ones((1, 2, 2)), np.ones((1, 2, 3), bool))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_map_that_is_not_finite_names_the_image(bad):
    maps = np.zeros((4, 3, 3), np.float32)
    maps[2, 1, 1] = bad
    with pytest.raises(data.DataError, match=r"\bimage 2\b"):
        metrics.pixel_metrics(maps, np.zeros(maps.shape, bool))


def test_image_auroc():
    assert metrics.image_auroc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75
    assert metrics.image_auroc(np.zeros(4), [0, 1, 0, 1]) == 0.5
    for labels in ([0, 0], [1, 1], []):
        assert math.isnan(metrics.image_auroc(np.zeros(len(labels)), labels))


# ------------------------------------------------------------------------------------------------ evaluate


def sample(i, label, row, mask="known"):
    image = f"root/{row}/test/{'crack' if label else 'good'}/{i:03d}.png"
    return data.Sample(image, label, mask if label else None, "class", row)


def little_set():
    rng = np.random.default_rng(1)
    samples = [sample(i, i // 2 % 2, "ba"[i % 2]) for i in range(16)]  # rows b and a interleaved, b first
    masks = np.array([rng.random((6, 6)) < 0.2 if s.label else np.zeros((6, 6), bool) for s in samples])
    maps = (rng.random((16, 6, 6)) + 0.4 * masks).astype(np.float32)
    return samples, maps.max((1, 2)), maps, masks


def test_evaluate_works_row_by_row():
    samples, scores, maps, masks = little_set()
    result = metrics.evaluate(samples, scores, maps, masks)
    assert list(result["classes"]) == ["b", "a"]
    for row, first in ("b", 0), ("a", 1):
        want = metrics.pixel_metrics(maps[first::2], masks[first::2])
        want["i_auroc"] = roc_auc_score([s.label for s in samples[first::2]], scores[first::2])
        assert result["classes"][row] == want
    for key in "i_auroc", "p_auroc", "p_aupr", "aupro":
        want = np.mean([result["classes"][row][key] for row in "ab"])
        assert result["mean"][key] == pytest.approx(want, abs=1e-12)
    assert result["classes"]["a"] != result["classes"]["b"]


def test_a_row_with_an_unknown_mask_is_image_level_only():
    samples, scores, maps, masks = little_set()
    samples[3] = samples[3]._replace(mask=None)  # a defective image of row a
    assert samples[3].label and samples[3].row == "a"
    whole, result = metrics.evaluate(*little_set()), metrics.evaluate(samples, scores, maps, masks)
    assert result["classes"]["b"] == whole["classes"]["b"]
    assert result["classes"]["a"]["i_auroc"] == whole["classes"]["a"]["i_auroc"]
    assert all(math.isnan(result["classes"]["a"][key]) for key in ("p_auroc", "p_aupr", "aupro"))
    assert result["mean"]["aupro"] == result["classes"]["b"]["aupro"]  # left out of the mean


def reasons(change=lambda samples, masks: None):
    samples, scores, maps, masks = little_set()
    change(samples, masks)
    lines = []
    metrics.evaluate(samples, scores, maps, masks, lines.append)
    return lines


def test_every_undefined_metric_has_its_reason():
    def relabel(label):
        def change(samples, masks):  # row a has this label only
            samples[1::2] = [sample(i, label, "a") for i in range(1, 16, 2)]
            if not label:
                masks[1::2] = False
        return change

    def lose_masks(samples, masks):
        samples[3], samples[7] = samples[3]._replace(mask=None), samples[7]._replace(mask=None)

    def empty(samples, masks):
        masks[1::2] = False

    def fill(samples, masks):
        masks[1::2] = True

    assert reasons() == []
    good = "8 good and 0 defective test images, 0 with a mask, 0% of all pixels are defect"
    assert reasons(relabel(0)) == [f"a: no I-AUROC: {good}", f"a: no pixel metrics: {good}"]
    line, = reasons(relabel(1))
    assert line.startswith("a: no I-AUROC: 0 good and 8 defective test images, 8 with a mask")
    assert reasons(lose_masks) == ["a: no pixel metrics: 4 good and 4 defective test images, 2 with a mask"]
    have = "a: no pixel metrics: 4 good and 4 defective test images, 4 with a mask"
    assert reasons(empty) == [f"{have}, 0% of all pixels are defect"]
    assert reasons(fill) == [f"{have}, 100% of all pixels are defect"]


@pytest.mark.filterwarnings("error")
def test_good_images_only_and_no_images_at_all_are_no_crash():
    samples = [sample(i, 0, "a") for i in range(3)]
    result = metrics.evaluate(samples, np.arange(3.0), np.zeros((3, 4, 4)), np.zeros((3, 4, 4), bool))
    assert all(math.isnan(v) for v in [*result["classes"]["a"].values(), *result["mean"].values()])
    result = metrics.evaluate([], [], np.zeros((0, 4, 4)), np.zeros((0, 4, 4), bool))
    assert result["classes"] == {} and math.isnan(result["mean"]["i_auroc"])
    metrics.table(result)


def test_scores_and_maps_that_are_not_finite_name_the_image():
    for bad in np.nan, np.inf:
        samples, scores, maps, masks = little_set()
        maps[7, 0, 0] = bad
        with pytest.raises(data.DataError, match="root/a/test/crack/007.png.*map"):
            metrics.evaluate(samples, scores, maps, masks)
        samples, scores, maps, masks = little_set()
        scores[4] = bad
        with pytest.raises(data.DataError, match="root/b/test/good/004.png.*score") as error:
            metrics.evaluate(samples, scores, maps, masks)
        assert "\n" not in str(error.value)


def test_numbers_of_samples_scores_and_maps_must_agree():
    samples, scores, maps, masks = little_set()
    for given in (scores[:15], maps), (np.append(scores, 1), maps), (scores, maps[:15]):
        with pytest.raises(ValueError, match="zip"):
            metrics.evaluate(samples, *given, masks)


# ------------------------------------------------------------------------------------ seeds, table, json


def result_of(**rows):
    """A result whose four metrics are x, x - .1, x - .2, x - .3 in each row; None: image level only."""
    nan = float("nan")
    classes = {
        row: dict(zip(metrics.METRICS, [x, *[nan if row == "image_only" else x - d for d in (0.1, 0.2, 0.3)]]))
        for row, x in rows.items()
    }
    mean = {k: float(np.nanmean([c[k] for c in classes.values()])) for k in metrics.METRICS}
    return {"classes": classes, "mean": mean}


def over_seeds(runs):
    return metrics.over_seeds({seed: run["classes"] for seed, run in runs.items()})


def test_over_seeds_has_mean_deviation_and_every_seed():
    means = (1, 0.9, 0.8), (11, 0.8, 0.6), (111, 1.0, 0.7)
    runs = {seed: result_of(a=a, image_only=b) for seed, a, b in means}
    result = over_seeds(runs)
    assert set(result) == {"classes", "mean", "seeds", "std"}
    assert list(result["seeds"]) == ["1", "11", "111"]
    for seed, run in runs.items():
        assert result["seeds"][str(seed)] == {"classes": run["classes"], "mean": pytest.approx(run["mean"], abs=1e-15)}
    assert result["classes"]["a"]["i_auroc"] == pytest.approx(0.9)
    assert result["mean"]["i_auroc"] == pytest.approx(0.8)
    assert result["std"]["i_auroc"] == pytest.approx(np.std([0.85, 0.7, 0.85], ddof=1))
    assert result["std"]["aupro"] == pytest.approx(0.1)
    assert math.isnan(result["classes"]["image_only"]["aupro"])


def test_a_single_seed_keeps_the_plain_form():
    run = result_of(a=0.9)
    assert over_seeds({1: run}) == {"classes": run["classes"], "mean": pytest.approx(run["mean"], abs=1e-15)}


def lines_of(text):
    return {line.split()[0]: line.split()[1:] for line in text.splitlines()}


def test_table_has_a_row_per_class_and_the_mean():
    text = metrics.table(result_of(bottle=0.98765, image_only=0.5))
    lines = lines_of(text)
    assert lines["class"] == ["I-AUROC", "P-AUROC", "P-AUPR", "AUPRO"]
    assert lines["bottle"] == ["0.988", "0.888", "0.788", "0.688"]
    assert lines["image_only"] == ["0.500", "-", "-", "-"]
    assert lines["mean"] == ["0.744", "0.888", "0.788", "0.688"]
    assert text.splitlines()[-1].startswith("mean")
    assert len({len(line) for line in text.splitlines()}) == 1  # columns are aligned


def test_table_sets_the_papers_figure_beside_ours():
    paper = {"bottle": {"i_auroc": 1.0, "p_aupr": 0.5}, "mean": {"i_auroc": 0.986}, "not run": {"aupro": 0.3}}
    lines = lines_of(metrics.table(result_of(bottle=0.9, screw=0.8), paper))
    assert lines["class"] == ["I-AUROC", "paper", "P-AUROC", "P-AUPR", "paper", "AUPRO"]
    assert lines["bottle"] == ["0.900", "1.000", "0.800", "0.700", "0.500", "0.600"]
    assert lines["screw"] == ["0.800", "-", "0.700", "0.600", "-", "0.500"]
    assert lines["mean"] == ["0.850", "0.986", "0.750", "0.650", "-", "0.550"]


def test_table_of_several_seeds_has_deviations():
    runs = {1: result_of(bottle=0.9, image_only=0.5), 2: result_of(bottle=0.8, image_only=0.5)}
    lines = lines_of(metrics.table(over_seeds(runs), {"mean": {"aupro": 0.7}}))
    assert lines["bottle"] == "0.850 ± 0.071 0.750 ± 0.071 0.650 ± 0.071 0.550 ± 0.071 -".split()
    assert lines["image_only"] == ["0.500", "±", "0.000", "-", "-", "-", "-"]
    assert lines["mean"] == "0.675 ± 0.035 0.750 ± 0.071 0.650 ± 0.071 0.550 ± 0.071 0.700".split()


def test_joined_sets_have_a_mean_each():
    rows = {"mvtec/b": 0.5, "btad/a": 1.0}
    runs = {seed: result_of(**{"mvtec/a": a}, **rows) for seed, a in ((1, 0.7), (2, 0.9))}
    lines = metrics.table(over_seeds(runs)).splitlines()
    assert [line.split("  ")[0].strip() for line in lines[-3:]] == ["mean of mvtec", "mean of btad", "mean"]
    assert lines[-3].split()[3:6] == ["0.650", "±", "0.071"]
    assert lines[-2].split()[3:6] == ["1.000", "±", "0.000"]
    assert lines[-4] == "-" * len(lines[0]) and lines[-5].startswith("btad/a")


def test_seeds_of_different_rows_are_an_unfinished_run():
    with pytest.raises(data.DataError, match="seed 2 has no result for b"):
        over_seeds({1: result_of(a=0.9, b=0.8), 2: result_of(a=0.9)})


def test_json_has_null_for_nan_and_every_digit(tmp_path):
    result = over_seeds({1: result_of(a=1 / 3, image_only=0.5), 2: result_of(a=0.7, image_only=0.4)})
    path = tmp_path / "metrics.json"
    path.write_text("old")
    metrics.save_json(path, {"data": "toy", "out": Path("runs/x"), "seed": [1, 2], "lr": 1e-4}, result)
    assert "NaN" not in path.read_text()
    read = json.loads(path.read_text())
    assert list(read) == ["args", "classes", "mean", "seeds", "std"]
    assert read["args"] == {"data": "toy", "out": str(Path("runs/x")), "seed": [1, 2], "lr": 1e-4}
    assert read["classes"]["image_only"]["p_aupr"] is None
    assert read["seeds"]["2"]["classes"]["image_only"]["aupro"] is None
    assert read["seeds"]["1"]["classes"]["a"]["i_auroc"] == 1 / 3
    assert read["std"].keys() == read["mean"].keys() == set(metrics.METRICS)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]  # no temporary file stays


# ------------------------------------------------------------------------------------------------ pictures


def lightness(rgb):
    linear = np.where(rgb <= 0.04045 * 255, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    return 116 * np.cbrt(linear @ [0.2126, 0.7152, 0.0722]) - 16


def test_heat_is_ordered_in_lightness_on_an_absolute_scale():
    steps = lightness(metrics.heat(np.linspace(2.0, 3.0, 101)[None], 2.0, 3.0)[0])
    assert np.all(np.diff(steps) > 0) and steps[0] < 15 and steps[-1] > 90
    assert np.diff(steps).max() < 2 * np.diff(steps).mean()  # no sudden jump of brightness
    colours = metrics.heat(np.array([[-50.0, 2.0, 2.5, 3.0, 99.0]]), 2.0, 3.0)
    assert colours.dtype == np.uint8 and colours.shape == (1, 5, 3)
    assert np.array_equal(colours[0, 0], colours[0, 1]) and np.array_equal(colours[0, 3], colours[0, 4])
    # whatever else is in the map
    assert np.array_equal(metrics.heat(np.array([[2.5]]), 2.0, 3.0)[0, 0], colours[0, 2])
    assert metrics.heat(np.ones((2, 2)), 1.0, 1.0).shape == (2, 2, 3)  # an empty scale is no division by zero


def test_overlay_is_calm_at_low_and_shows_the_image():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    grey = np.asarray(Image.fromarray(image).convert("L"), dtype=float)
    calm, loud = (metrics.overlay(image, np.full((40, 40), v), 0.0, 1.0).astype(float) for v in (0.0, 1.0))
    assert np.corrcoef(lightness(calm).ravel(), grey.ravel())[0, 1] > 0.98
    assert np.ptp(calm, axis=-1).max() < 30 < np.ptp(loud, axis=-1).min()  # hardly any colour, much colour
    assert lightness(loud).mean() > lightness(calm).mean() + 20


def test_a_strip_shows_image_truth_and_heat(tmp_path):
    image = np.full((32, 32, 3), (200, 30, 30), np.uint8)
    mask, amap = np.zeros((32, 32), bool), np.zeros((32, 32), np.float32)
    mask[8:24, 8:24] = True
    amap[8:24, 8:24] = 5.0
    samples = [data.Sample(f"/d/test/{name}.png", int(name != "good"), mask, "bottle", "bottle")
               for name, mask in (("known", "mask"), ("unknown", None), ("good", None))]
    maps, masks, scores = np.stack([amap] * 3), np.stack([mask, mask * 0, mask * 0]), np.full(3, 5.0)
    normal = {"classes": ["bottle"], "scores": [1.0], "peaks": [2.5], "medians": [0.0]}  # a scale of 0..5
    metrics.save_maps(tmp_path, samples, np.stack([image] * 3), masks, maps, scores, normal, 0.9)
    for name, corner, centre in ("known", 0, 255), ("unknown", 128, 128), ("good", 0, 0):
        pixels = np.asarray(Image.open(tmp_path / f"bottle/{name}.png")).astype(int)
        assert pixels.shape == (256 + 22, 3 * 256 + 2 * 6, 3)
        centres, corners = ([pixels[y, y + i * 262] for i in range(3)] for y in (128, 5))
        assert centres[0].tolist() == corners[0].tolist() == [200, 30, 30]
        assert centres[1].tolist() == [centre] * 3 and corners[1].tolist() == [corner] * 3
        assert lightness(centres[2]) > lightness(corners[2]) + 30
        assert (pixels[256:, :300].min(axis=-1) < 100).sum() > 200  # the text is there


def test_any_file_name_fits_under_a_picture():
    def pixels(text):
        return np.asarray(metrics.panels([np.zeros((16, 16, 3), np.uint8)] * 3, text, 0, 12.5, 160))

    plain = pixels("")
    for text in "W" * 3000, "a" * 37, "Bühne 瓶\udce9.png":
        assert np.array_equal(pixels(text)[:160], plain[:160])  # nothing over the pictures
        assert np.array_equal(pixels(text)[:, :130], plain[:, :130])  # nor over the scale
        assert not np.array_equal(pixels(text), plain)
    assert np.array_equal(pixels("two\nlines"), pixels("two lines"))


def test_pictures_of_any_shape_are_bounded_and_their_text_is_readable():
    text = "defective, score 0.5123 (threshold 0.4), bottle, 000.png"
    for width, height in (6000, 20), (20, 6000), (1, 1), (1, 5000), (300, 200), (4000, 3000):
        picture = metrics.panels([np.full((height, width, 3), 77, np.uint8)] * 2, text, 0, 1, 384)
        assert max(picture.size) <= 2000 and picture.width >= 400
        shown = metrics.fit((width, height), 384)
        assert metrics.fit(shown, 384) == shown  # what is shown is not scaled again
        assert (np.asarray(picture) == 77).all(-1).sum() == 2 * shown[0] * shown[1]
        assert min(shown) >= 32 and max(shown) <= 960
        ink = (np.asarray(picture)[-20:, 75:] < 100).all(-1).any(0)
        assert ink.sum() > 150  # columns of the text's line that have ink
    assert metrics.fit((300, 200), 384) == (576, 384) and metrics.fit((3000, 4000), 384) == (384, 512)
    assert metrics.fit((6000, 20), 384) == (960, 32) and metrics.fit((2000, 400), 384) == (960, 192)


def test_a_picture_is_named_by_the_path_below_test():
    def text(image):
        return metrics.place(data.Sample(image, 1, None, "bottle", "row"))

    assert text("/d/mvtec/bottle/test/crack/007.png") == "crack/007.png"
    assert text("toy:bottle/test/good/3") == "good/3"
    assert text("AeBAD_S/test/groove/view/1.png") == "groove/view/1.png"
    assert text(r"C:\d\bottle\test\crack\007.png") == "crack/007.png"
    assert text("/d/candle/Data/Images/Anomaly/007.JPG") == "Anomaly/007.JPG"


def test_pick_finds_the_worst_and_the_best():
    misses, alarms, hits = metrics.pick([0.9, 0.1, 0.5, 0.3, 0.8, 0.2], [1, 1, 1, 0, 0, 0], count=2).values()
    assert (misses, alarms, hits) == ([1, 2], [4, 3], [0, 2])
    assert list(metrics.pick([0.5], [0]).values()) == [[], [0], []]


def test_sheet_is_one_labelled_picture(tmp_path):
    blue = Image.new("RGB", (200, 90), (0, 0, 255))
    cells = {"worst misses": [blue] * 4, "worst false alarms": [], "best hits": [blue]}
    metrics.sheet(cells, tmp_path / "bottle.png")
    assert [p.name for p in tmp_path.iterdir()] == ["bottle.png"]
    with Image.open(tmp_path / "bottle.png") as picture:
        assert picture.format == "PNG" and picture.info["Software"] == data.SOFTWARE
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    is_blue = (pixels == (0, 0, 255)).all(-1)
    assert is_blue.sum() == 5 * 200 * 90  # nothing is cut off or covered
    ink = (pixels.max(-1) < 100).any(1)
    assert (np.diff(ink.astype(int)) == 1).sum() >= 3  # a title above each of the three rows


# ------------------------------------------------------------------------------------------------ files


def test_names_of_pictures():
    names = metrics.picture_names
    assert names(["000.png", "000.jpg", "000.tar.png"]) == ["000.png", "000.jpg.png", "000.tar.png"]
    assert names(["a.png"] * 3) == ["a.png", "a_2.png", "a_3.png"]
    assert names(["a.png", "A.png", "a_2.png"]) == ["a.png", "A_2.png", "a_2_2.png"]
    assert names(["a_2.png", "a.png", "a.png"]) == ["a_2.png", "a.png", "a_3.png"]
    long = ["瓶" * 83 + ".png", "瓶" * 83 + ".jpg", "x" * 255, "x" * 254 + "y", "\udce9" * 255]
    found = names(long * 3)
    assert len({name.casefold() for name in found}) == 15
    for name in found:
        assert len(os.fsencode(name)) <= 255 and name.endswith(".png")
    assert found[0].strip("瓶") == ".png"  # cut between characters
    assert names(["\udce9.jpg"]) == ["\udce9.jpg.png"]


def test_save_maps_has_a_picture_per_image_and_an_overview_per_row(tmp_path):
    names = ["good/000.png", "good/000.jpg", "crack/000.png", "crack_a/0.png", "crack/a_0.png",
             "good/瓶\udce9.png"]
    samples = [data.Sample(f"/d/bottle/test/{name}", int("crack" in name), None, "bottle", "mvtec/bottle")
               for name in names]
    rng, n = np.random.default_rng(0), len(names)
    maps, images = rng.random((n, 8, 8)), rng.integers(0, 255, (n, 8, 8, 3), dtype=np.uint8)
    normal = metrics.calibrate(maps, maps.max((1, 2)), ["bottle"] * n, True)
    for _ in range(2):  # the second time over its own
        metrics.save_maps(tmp_path, samples, images, maps > 0.9, maps, maps.max((1, 2)), normal, 0.9)
    assert {p.name for p in (tmp_path / "mvtec").iterdir()} == {"bottle", "bottle.png"}
    assert {p.name for p in (tmp_path / "mvtec/bottle").iterdir()} == {
        "good_000.png", "good_000.jpg.png", "crack_000.png", "crack_a_0.png", "crack_a_0_2.png",
        "good_瓶\udce9.png"}
    assert all(data.is_own(p) for p in tmp_path.rglob("*.png"))
