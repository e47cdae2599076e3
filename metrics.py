"""Metrics of industrial anomaly detection, the result table, pictures of anomaly maps, verdicts.

    python metrics.py RUN            a finished run's table again
    python metrics.py RUN RUN ..     mean and standard deviation of several, as of several seeds

    I-AUROC    area under the ROC curve of the image scores
    P-AUROC    the same over all pixels of a class
    P-AUPR     average precision over all pixels (step-wise sum, as in scikit-learn)
    AUPRO      per-region overlap integrated over the false positive rate from 0 to 0.3 (Bergmann et
               al., "The MVTec Anomaly Detection Dataset", IJCV 2021), exact: no grid of thresholds

A metric that is undefined (one class of label only, no mask) is nan: `-` in the table, null in
metrics.json.
"""

import argparse
import csv
import json
import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage, stats
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

import data

log = logging.getLogger(__name__)
METRICS = {"i_auroc": "I-AUROC", "p_auroc": "P-AUROC", "p_aupr": "P-AUPR", "aupro": "AUPRO"}


# ------------------------------------------------------------------------------------------ metrics


def image_auroc(scores, labels):
    """AUROC of N image scores for N labels (0 good, 1 defective), nan for one label."""
    if len(set(labels)) < 2:
        return math.nan
    return float(roc_auc_score(labels, scores))


def pixel_metrics(maps, masks, fpr_limit=0.3):
    """Exact pixel metrics of one class: {"p_auroc", "p_aupr", "aupro"}, nan for one label.

    maps: N x H x W floats (higher = more anomalous). masks: N x H x W, nonzero = defect. fpr_limit:
    AUPRO's upper false positive rate. Normal pixels of defective images count as normal.

    An anomalous pixel of score s enters the ROC curve where the threshold passes s. The false
    positive rate just above s and the one at s (they differ if normal pixels tie with s) decide
    what it adds to the three areas. So each area is a mean over the anomalous pixels, and takes a
    sort of the normal pixels, one of the anomalous ones, which are far fewer, and look-ups.
    """
    maps = np.asarray(maps)
    masks = np.asarray(masks, dtype=bool)
    weight, regions = region_weights(masks)
    normal = np.sort(maps[~masks])
    anomalous = maps[masks]
    n = len(normal)
    m = len(anomalous)
    if n == 0 or m == 0:
        return {"p_auroc": math.nan, "p_aupr": math.nan, "aupro": math.nan}
    order = np.argsort(anomalous)  # neighbouring look-ups then touch neighbouring memory
    anomalous = anomalous[order]

    fp = n - np.searchsorted(normal, anomalous, "left")  # normal pixels >= s
    tp = m - np.searchsorted(anomalous, anomalous, "left")  # anomalous pixels >= s: ties at once
    at = fp / n  # false positive rate with the threshold at s
    above = (n - np.searchsorted(normal, anomalous, "right")) / n  # and just above s

    # Between the two rates the pixel's true positive rate rises linearly from 0 to 1. That ramp may
    # straddle the limit, then only its part below counts: a triangle of slope 1 / (at - above).
    left = np.minimum(above, fpr_limit)
    right = np.minimum(at, fpr_limit)
    ramp = (right - left) ** 2 / (2 * np.maximum(at - above, 1 / n))  # at - above: 0, or >= 1/n
    overlap = weight[order] * (fpr_limit - right + ramp)
    return {
        "p_auroc": float(np.mean(1 - (above + at) / 2)),
        "p_aupr": float(np.mean(tp / (tp + fp))),
        "aupro": float(overlap.sum() / regions / fpr_limit),
    }


def region_weights(masks):
    """1 / |8-connected region| for each anomalous pixel of masks N x H x W; how many regions."""
    within = np.zeros((3, 3, 3))
    within[1] = 1  # the 8 neighbours in the same image, none in the next
    label, regions = ndimage.label(masks, within)
    label = label[masks]
    return 1 / np.bincount(label)[label], regions


def evaluate(samples, scores, maps, masks):
    """The metrics of the N samples of one row of the table. scores: N; maps, masks: N x H x W.

    A row with a defective image of unknown mask has no pixel metrics: its defects would count as
    normal pixels. DataError: a score or a map is not finite.
    """
    for sample, score, s in zip(samples, scores, maps, strict=True):
        if not (np.isfinite(score) and np.isfinite(s).all()):
            raise data.DataError(f"{sample.image}: its anomaly map is not finite")
    labels = [sample.label for sample in samples]
    unknown = [sample.image for sample in samples if sample.label and not sample.mask]
    result = dict.fromkeys(METRICS, math.nan) | {"i_auroc": image_auroc(scores, labels)}
    if unknown:
        log.info(
            f"{samples[0].row}: no pixel metrics, as there is no mask of {data.counted(unknown)}"
        )
    else:
        result |= pixel_metrics(maps, masks)
    return result


# -------------------------------------------------------------------------------- the result table


def mean(classes):
    """{metric: mean over the rows of {row: {metric: value}}}; undefined values are left out."""
    result = {}
    for key in METRICS:
        values = [row[key] for row in classes.values() if not math.isnan(row[key])]
        result[key] = fmean(values) if values else math.nan
    return result


def with_means(classes):
    """(name, metrics) of the rows, of the mean of each joined set (rows mvtec/bottle, visa/candle
    ..), and of the mean."""
    rows = list(classes.items())
    for name in {row.partition("/")[0]: None for row in classes if "/" in row}:
        mine = {row: classes[row] for row in classes if row.startswith(f"{name}/")}
        rows.append((f"mean of {name}", mean(mine)))
    return [*rows, ("mean", mean(classes))]


def table(runs, paper):
    """Text: a line per row and the means, `-` if undefined; of several runs mean ± deviation.

    runs: a list of {row: {metric: value}}, of the same rows. paper: {row: {metric: the paper's
    figure}}; such a metric gets a column "paper" beside it.
    """
    runs = [with_means({row: run[row] for row in runs[0]}) for run in runs]
    names = [name for name, _ in runs[0]]
    columns = [["class", *names]]
    for key, title in METRICS.items():
        ours = [number([row[key] for _, row in rows]) for rows in zip(*runs, strict=True)]
        columns.append([title, *ours])
        theirs = [number([paper.get(name, {}).get(key, math.nan)]) for name in names]
        if set(theirs) != {"-"}:
            columns.append(["paper", *theirs])

    widths = [max(map(len, column)) for column in columns]
    lines = []
    for name, *values in zip(*columns, strict=True):
        cells = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def number(values):
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{fmean(values):.3f} ± {stdev(values):.3f}"


def save_result(folder, args, classes, paper):
    """RUN/metrics.json: the arguments, the rows, their mean, the paper's figures; nan is null."""
    result = {"args": args, "classes": classes, "mean": mean(classes), "paper": paper}
    text = json.dumps(result, default=str, indent=2)
    with data.saved(Path(folder, "metrics.json")) as file:
        file.write(text.replace(": NaN", ": null").encode())


def read_result(folder):
    path = Path(folder, "metrics.json")
    with data.explain(f"{path}: no result of a finished run"):
        result = json.loads(path.read_text())
        for row in result["classes"].values():
            row.update({key: math.nan for key in METRICS if row[key] is None})
    return result


def main(folders):
    results = [read_result(folder) for folder in folders]
    for folder, result in zip(folders, results, strict=True):
        if set(result["classes"]) != set(results[0]["classes"]):
            raise data.DataError(f"{folder} has other classes than {folders[0]}")
    print(table([result["classes"] for result in results], results[0]["paper"]))


# ----------------------------------------------------------------------------------------- pictures

# Lightness (CIELAB L*) rises evenly: brighter always means more anomalous.
RAMP = [
    (18, 22, 58),
    (120, 64, 150),
    (242, 128, 90),
    (252, 242, 170),
]
HEAT = Image.fromarray(np.uint8([RAMP])).resize((256, 1), Image.Resampling.BILINEAR)


def overlay(image, s, low, high):
    """uint8 H x W x 3: a map s of any size as heat over the grey image, H x W x 3."""
    grey = Image.fromarray(image).convert("L").convert("RGB")
    level = np.interp(s, (low, high), (0, 255)).astype(np.uint8)
    heat = Image.fromarray(np.asarray(HEAT)[0, level])
    heat = heat.resize(grey.size)
    return np.array(Image.blend(grey, heat, 0.45))


def shorten(name):
    """At most 200 bytes, as file systems take 255; only whole characters of UTF-8."""
    return os.fsencode(name)[:200].decode(errors="ignore")


def save_strip(path, pictures, text):
    """A JPEG of pictures of one size, uint8 H x W x 3, side by side above a line of text."""
    strip = Image.fromarray(np.hstack(pictures))
    canvas = Image.new("RGB", (max(strip.width, 400), strip.height + 20), "white")
    canvas.paste(strip)
    font = ImageFont.load_default(13)
    ImageDraw.Draw(canvas).text((4, strip.height + 2), " ".join(text.split()), "black", font)
    with data.saved(path) as file:
        canvas.save(file, "JPEG", quality=90)


def save_maps(folder, images, samples, scores, maps, masks, calibration):
    """A strip per test image: image | mask | heat. Sorted by name, the highest score comes first.

    images: uint8 N x S x S x 3; scores: N; maps, masks: N x S x S; calibration: see calibrate, for
    the colour scale of the image's class. Strips of an earlier time in the folder are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        for path in folder.glob(f"{'[0-9]' * 5}-{kind}-*.jpg"):
            path.unlink()

    for rank, i in enumerate(np.argsort(-scores)):
        sample = samples[i]
        scale = calibration.get(sample.cls, calibration[""])  # CIFAR-10 tests classes untrained
        mask = np.repeat(masks[i, :, :, None] * np.uint8(255), 3, -1)
        heat = overlay(images[i], maps[i], scale["low"], scale["high"])
        kind = KINDS[sample.label]
        name = shorten("-".join(Path(sample.image).with_suffix("").parts[-2:]))
        text = f"{scores[i]:.4g} {kind} {sample.image}"
        save_strip(folder / f"{rank:05d}-{kind}-{name}.jpg", [images[i], mask, heat], text)


KINDS = ["good", "defective"]  # of label 0 and 1


# ------------------------------------------------------------------------------- verdicts on photos


def calibrate(maps, scores, samples, held):
    """What normal images look like to a model, as a checkpoint can keep it.

    For each class of the samples, and for all together (""): their scores, whether all of them were
    held out of the training, and a colour scale from their maps' median ("low") to as far above the
    peak of 99 % of them ("peak") again ("high"). maps: N x H x W; scores: N; held: bool N.
    """
    calibration = {}
    for cls in ["", *dict.fromkeys(sample.cls for sample in samples)]:
        mine = np.array([cls in ("", sample.cls) for sample in samples])
        low = float(np.median(maps[mine]))
        peak = float(np.quantile(maps[mine].max((1, 2)), 0.99))
        calibration[cls] = {
            "scores": scores[mine].tolist(),
            "held_out": bool(held[mine].all()),
            "low": low,
            "peak": peak,
            "high": 2 * peak - low,
        }
    return calibration


def check_calibration(calibration, classes):
    """ValueError: not what calibrate gives of these classes."""
    data.check_like(calibration, dict.fromkeys(["", *classes]))
    kinds = {"scores": [], "held_out": True, "low": 0.0, "peak": 0.0, "high": 0.0}
    for known in calibration.values():
        data.check_like(known, kinds)


def thresholds(calibration, quantile, classes):
    """{class: the quantile of its normal scores} for the classes asked for ("": all together).

    Logs each and how far it can be trusted, and warns where few images decide. UserError: a class
    that is not in the calibration.
    """
    found = {}
    few = []
    for cls in dict.fromkeys(classes):
        if cls not in calibration:
            raise data.UserError(f"no threshold for {cls}: no normal image of it was calibrated")
        name = cls or "all classes"
        scores = np.array(calibration[cls]["scores"])
        found[cls] = float(np.quantile(scores, quantile))

        above = int((scores > found[cls]).sum())
        test = stats.binomtest(above, len(scores), alternative="less")
        most = test.proportion_ci(0.95).high  # Clopper-Pearson
        trust = f"at most {100 * most:.1f} % false alarms, with 95 % confidence"
        if not calibration[cls]["held_out"]:
            trust = "some or all trained the model, so no rate of false alarms follows (--holdout)"
        about = f"the {quantile} quantile of {len(scores)} normal images; {trust}"
        log.info(f"threshold for {name}: {found[cls]:.4g}, {about}")
        if 1 - 1 / len(scores) < quantile:
            few.append(name)
    if few:
        log.warning(
            f"warning: few normal images decide the threshold for {data.counted(few)}: "
            "hold out more (--holdout) or take more photos"
        )
    return found


class Photo(NamedTuple):
    path: str
    pixels: np.ndarray  # what the network sees, uint8 S x S x 3
    shown: np.ndarray | None  # what the picture shows, 512 pixels at most; None: unreadable


def read_photo(path, size, crop):
    side = crop or size
    try:
        image, _ = data.read_image(path)
    except data.DataError as error:
        log.warning(f"skipped: {error}")
        return Photo(path, np.zeros((side, side, 3), np.uint8), None)
    pixels = data.resized(image, size, crop, Image.Resampling.BILINEAR)
    if crop:
        image = Image.fromarray(pixels)
    image.thumbnail((512, 512), reducing_gap=1.0)
    return Photo(path, pixels, np.asarray(image))


def draw_verdict(number, photo, s, score, cls, calibration, thresholds, folder):
    """Draws the photo's picture; its row of predictions.csv. s: S x S."""
    if photo.shown is None:
        return {"file": photo.path, "verdict": "unreadable"}
    if not (np.isfinite(score) and np.isfinite(s).all()):
        log.warning(f"skipped: {photo.path}: its map is not finite")
        return {"file": photo.path, "verdict": "failed"}

    threshold = thresholds[cls]
    verdict = KINDS[int(score > threshold)]
    picture = f"{number:05d}-{verdict}-{shorten(Path(photo.path).stem)}.jpg"
    text = f"{verdict} {score:.4g} (threshold {threshold:.4g}) {cls} {Path(photo.path).name}"

    scale = calibration[cls]
    heat = overlay(photo.shown, s, scale["low"], scale["high"])
    height, width = photo.shown.shape[:2]
    s = Image.fromarray(s.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    above = np.asarray(s) > scale["peak"]
    outline = above & ~ndimage.binary_erosion(above)  # of what no normal image has
    heat[outline] = 255
    save_strip(folder / picture, [photo.shown, heat], text)
    return {
        "file": photo.path,
        "score": f"{score:.6g}",
        "verdict": verdict,
        "class": cls,
        "threshold": f"{threshold:.6g}",
        "picture": picture,
    }


COLUMNS = ["file", "score", "verdict", "class", "threshold", "picture"]


def judge_batches(paths, read, judge, draw, batch_size):
    """Yields the rows: while the network judges a batch, threads read the next, draw the last."""
    with ThreadPoolExecutor(4) as pool:  # each may hold a decoded photo
        reading = pool.map(read, paths[:batch_size])
        rows = []
        for start in range(0, len(paths), batch_size):
            end = start + batch_size
            photos = list(reading)
            reading = pool.map(read, paths[end : end + batch_size])
            results = judge(np.stack([photo.pixels for photo in photos]))
            yield from rows
            rows = pool.map(draw, range(start, end), photos, *results)
        yield from rows


def predict(paths, judge, calibration, thresholds, folder, batch_size, size, crop=None):
    """A row of folder/predictions.csv and a picture for each photo; True if all were judged.

    judge: uint8 B x S x S x 3 -> maps B x S x S, scores B, B names of classes ("" if not known). A
    score above its class's threshold is defective. An unreadable photo costs only itself, and an
    interrupt the last two batches; no more are in memory.
    """
    folder = Path(folder)
    read = partial(read_photo, size=size, crop=crop)
    draw = partial(draw_verdict, calibration=calibration, thresholds=thresholds, folder=folder)
    rows = judge_batches(paths, read, judge, draw, batch_size)
    skipped = 0
    path = folder / "predictions.csv"
    try:
        with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            for row in tqdm(rows, "photos", len(paths), leave=False, disable=None):
                skipped += "picture" not in row
                writer.writerow(row)
                file.flush()  # whatever ends the run, the row is kept
    except OSError as error:  # which does not name it where a disk is full
        raise data.UserError(f"cannot write {path}: {error}") from None
    log.info(f"{len(paths) - skipped} photos judged, {skipped} skipped; written to {folder}")
    return skipped == 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The table of a finished run, or of several.")
    parser.add_argument("runs", nargs="+", help="folders; of several mean and standard deviation")
    try:
        main(parser.parse_args().runs)
    except data.UserError as error:
        parser.exit(2, f"error: {error}\n")
