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
import itertools
import json
import logging
import math
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

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
    """The rows, the mean of each joined set (rows mvtec/bottle, visa/candle ..), and the mean."""
    rows = dict(classes)
    for name in {row.partition("/")[0]: None for row in classes if "/" in row}:
        mine = {row: classes[row] for row in classes if row.startswith(f"{name}/")}
        rows[f"mean of {name}"] = mean(mine)
    return rows | {"mean": mean(classes)}


def table(runs, paper):
    """Text: a line per row and the means, `-` if undefined; of several runs mean ± deviation.

    runs: a list of {row: {metric: value}}, of the same rows. paper: {row: {metric: the paper's
    figure}}; such a metric gets a column "paper" beside it.
    """
    runs = [with_means(classes) for classes in runs]
    rows = list(runs[0])
    columns = [["class", *rows]]
    for key, title in METRICS.items():
        columns.append([title, *(number([run[row][key] for run in runs]) for row in rows)])
        theirs = [number([paper.get(row, {}).get(key, math.nan)]) for row in rows]
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
    with data.written(Path(folder, "metrics.json")) as temporary:
        temporary.write_text(text.replace(": NaN", ": null"))


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
    """File systems take 255 bytes."""
    return os.fsdecode(os.fsencode(name)[:200])


def save_strip(path, pictures, text):
    """A JPEG of pictures of one size, uint8 H x W x 3, side by side above a line of text."""
    strip = Image.fromarray(np.hstack(pictures))
    canvas = Image.new("RGB", (max(strip.width, 400), strip.height + 20), "white")
    canvas.paste(strip)
    font = ImageFont.load_default(13)
    ImageDraw.Draw(canvas).text((4, strip.height + 2), " ".join(text.split()), "black", font)
    with data.written(path) as temporary:
        canvas.save(temporary, "JPEG", quality=90)


def save_maps(folder, images, samples, scores, maps, masks, normal):
    """A strip per test image: image | mask | heat. Sorted by name, the highest score comes first.

    images: uint8 N x S x S x 3; scores: N; maps, masks: N x S x S; normal: see calibrate.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for rank, i in enumerate(np.argsort(-scores)):
        sample = samples[i]
        scale = normal.get(sample.cls, normal[""])
        mask = np.repeat(masks[i, :, :, None] * np.uint8(255), 3, -1)
        heat = overlay(images[i], maps[i], scale["low"], scale["high"])
        kind = ["good", "defective"][sample.label]
        name = f"{rank:04d}-{kind}-{'-'.join(Path(sample.image).with_suffix('').parts[-2:])}"
        text = f"{scores[i]:.4g} {kind} {sample.image}"
        save_strip(folder / f"{shorten(name)}.jpg", [images[i], mask, heat], text)


# ------------------------------------------------------------------------------- verdicts on images


def calibrate(maps, scores, samples):
    """What normal images look like to a model, for each class and for all of them (""), as a
    checkpoint can keep it: their scores, and a colour scale from their maps' median to as far
    above the peak of 99 % of them again. maps: N x H x W; scores: N; samples: N."""
    normal = {}
    classes = [sample.cls for sample in samples]
    for cls in ["", *dict.fromkeys(classes)]:
        mine = [i for i, other in enumerate(classes) if cls in ("", other)]
        low = float(np.median(maps[mine]))
        peak = float(np.quantile(maps[mine].max((1, 2)), 0.99))
        scale = {"low": low, "peak": peak, "high": 2 * peak - low}
        normal[cls] = {"scores": [float(scores[i]) for i in mine], **scale}
    return normal


def threshold(normal, quantile):
    """The quantile of a class's normal scores, and a text that says how far it can be trusted."""
    scores = np.array(normal["scores"])
    limit = float(np.quantile(scores, quantile))
    above = int((scores > limit).sum())
    test = stats.binomtest(above, len(scores), alternative="less")
    most = test.proportion_ci(0.95).high  # Clopper-Pearson
    return limit, (
        f"{limit:.4g} ({quantile} quantile of {len(scores)} normal images; "
        f"at most {100 * most:.1f} % false alarms, with 95 % confidence)"
    )


def thresholds(normal, quantile):
    """{class: limit}, with "" for all classes; logs each, and warns if few images decide."""
    limits = {}
    few = []
    for cls, values in normal.items():
        limits[cls], text = threshold(values, quantile)
        if cls or len(normal) != 2:  # of one class "" is the same
            log.info(f"limit for {cls or 'all classes'}: {text}")
        if 1 - 1 / len(values["scores"]) < quantile:
            few.append(cls or "all classes")
    if few:
        log.warning(
            f"warning: few normal images decide the limit for {data.counted(few)}: "
            "hold out more (--holdout) or take more photos"
        )
    return limits


def read_photo(path, size, crop):
    """The path; uint8 S x S x 3; the photo to be shown, or None if it cannot be read."""
    side = crop or size
    try:
        image, _ = data.read_image(path)
    except data.DataError as error:
        log.warning(f"skipped: {error}")
        return path, np.zeros((side, side, 3), np.uint8), None
    pixels = data.resized(image, size, crop, Image.Resampling.BILINEAR)
    if crop:
        image = Image.fromarray(pixels)
    image.thumbnail((512, 512), reducing_gap=1.0)
    return path, pixels, np.asarray(image)


def judged(photos, judge, batch_size):
    """(photo, map, score, class) of each photo."""
    while batch := list(itertools.islice(photos, batch_size)):
        pixels = np.stack([pixels for _, pixels, _ in batch])
        yield from zip(batch, *judge(pixels), strict=True)


def draw_verdict(numbered, normal, limits, folder):
    """The photo's row of predictions.csv; draws its picture."""
    i, ((path, _, photo), s, score, cls) = numbered
    if photo is None:
        return {"file": path, "verdict": "unreadable"}
    if not (np.isfinite(score) and np.isfinite(s).all()):
        log.warning(f"skipped: {path}: its map is not finite")
        return {"file": path, "verdict": "failed"}

    limit = limits.get(cls, limits[""])
    verdict = "defective" if score > limit else "good"
    picture = f"{i:05d}-{verdict}-{shorten(Path(path).stem)}.jpg"
    text = f"{verdict} {score:.4g} (threshold {limit:.4g}) {cls} {Path(path).name}"

    scale = normal.get(cls, normal[""])
    heat = overlay(photo, s, scale["low"], scale["high"])
    height, width = photo.shape[:2]
    s = Image.fromarray(s.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    above = np.asarray(s) > scale["peak"]
    outline = above & ~ndimage.binary_erosion(above)  # of what no normal image has
    heat[outline] = 255
    save_strip(folder / picture, [photo, heat], text)
    values = path, f"{score:.6g}", verdict, cls, f"{limit:.6g}", picture
    return dict(zip(COLUMNS, values, strict=True))


def predict(paths, judge, normal, quantile, folder, batch_size, size, crop=None):
    """A row of folder/predictions.csv and a picture for each image file; True if all could be read.

    judge: uint8 B x S x S x 3 -> maps B x S x S, scores B, B names of classes ("" if not known). A
    score above the quantile of normal images' is defective. Threads decode ahead and draw behind
    the network; at most a few batches are in memory. An unreadable image costs only itself.
    """
    folder = Path(folder)
    read = partial(read_photo, size=size, crop=crop)
    draw = partial(draw_verdict, normal=normal, limits=thresholds(normal, quantile), folder=folder)
    failures = 0
    with (
        ThreadPoolExecutor() as pool,
        open(folder / "predictions.csv", "w", newline="", errors="surrogateescape") as file,
    ):
        photos = in_order(pool, read, paths, 2 * batch_size)
        numbered = enumerate(judged(photos, judge, batch_size))
        rows = in_order(pool, draw, numbered, 2 * batch_size)
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in tqdm(rows, "images", len(paths), leave=False, disable=None):
            failures += "picture" not in row
            writer.writerow(row)
            file.flush()  # an interrupt keeps the rows
    log.info(f"{len(paths) - failures} images judged, {failures} skipped; written to {folder}")
    return failures == 0


COLUMNS = ["file", "score", "verdict", "class", "threshold", "picture"]


def in_order(pool, function, items, ahead):
    """Results of function(item), worked out in threads, in order and at most `ahead` in advance."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The table of a finished run, or of several.")
    parser.add_argument("runs", nargs="+", help="folders; of several mean and standard deviation")
    try:
        main(parser.parse_args().runs)
    except data.DataError as error:
        parser.exit(2, f"error: {error}\n")
