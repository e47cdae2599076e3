"""Metrics of industrial anomaly detection, the result table, and pictures of anomaly maps.

    image AUROC    area under the ROC curve of the image scores
    P-AUROC        the same over all pixels of a class
    P-AUPR         average precision over all pixels (step-wise sum, as scikit-learn's average_precision_score)
    AUPRO          per-region overlap integrated over the false positive rate from 0 to 0.3 (Bergmann et al., "The MVTec
                   Anomaly Detection Dataset", IJCV 2021), exact: no grid of thresholds

A metric that is undefined (one class of label only, no mask) is nan: `-` in the table, null in metrics.json.
"""

import csv
import json
import math
import os
from statistics import fmean, stdev

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage, stats
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

import data

METRICS = {"i_auroc": "I-AUROC", "p_auroc": "P-AUROC", "p_aupr": "P-AUPR", "aupro": "AUPRO"}
NAN = float("nan")


# ---------------------------------------------------------------------------------------------------- metrics


def image_auroc(scores, labels):
    """AUROC of N image scores (higher = more anomalous) for N labels (0 good, 1 defective); nan if one class only."""
    return float(roc_auc_score(labels, scores)) if len(np.unique(labels)) == 2 else NAN


def pixel_metrics(maps, masks, fpr_limit=0.3):
    """Exact pixel metrics of one class: {"p_auroc", "p_aupr", "aupro"}, all nan without anomalous or normal pixels.

    maps: N x H x W anomaly maps of any float type (higher = more anomalous). masks: N x H x W, nonzero = defect.
    fpr_limit: AUPRO's upper false positive rate, in (0, 1]. Normal pixels of defective images count as normal pixels.
    Raises data.DataError naming the index of the first map that is not finite.

    An anomalous pixel of score s enters the ROC curve where the threshold passes s. Nothing but the false positive rate
    just above s and the one at s (they differ if normal pixels tie with s) decides what it adds to the three areas, so
    only the normal pixels are sorted, and each area is a mean over anomalous pixels.
    """
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"fpr_limit must lie in (0, 1], not {fpr_limit}")
    maps, masks = np.asarray(maps), np.asarray(masks, dtype=bool)
    if maps.shape != masks.shape:
        raise ValueError(f"maps {maps.shape} and masks {masks.shape} differ in shape")
    if (i := first_not_finite(maps)) is not None:
        raise data.DataError(f"image {i}: its anomaly map has values that are not finite")

    normal, anomalous = maps[~masks], maps[masks]
    n, m = len(normal), len(anomalous)
    if n == 0 or m == 0:
        return {"p_auroc": NAN, "p_aupr": NAN, "aupro": NAN}
    weight, regions = region_weights(masks)
    normal.sort()
    order = np.argsort(anomalous)  # neighbouring look-ups then touch neighbouring memory
    anomalous, weight = anomalous[order], weight[order]

    fp = n - np.searchsorted(normal, anomalous, "left")  # normal pixels >= s
    tp = m - np.searchsorted(anomalous, anomalous, "left")  # anomalous pixels >= s: equal scores are taken at once
    at = fp / n  # FPR with the threshold at s
    above = (n - np.searchsorted(normal, anomalous, "right")) / n  # FPR with the threshold just above s
    # Between the two rates the pixel's true positive rate rises linearly from 0 to 1. That ramp may straddle the limit,
    # then only its part below the limit counts: the triangle of base (right - left), of slope 1 / (at - above).
    left, right = np.minimum(above, fpr_limit), np.minimum(at, fpr_limit)
    ramp = (right - left) ** 2 / (2 * np.maximum(at - above, 1 / n))  # at - above is 0 or >= 1 / n
    return {
        "p_auroc": float(np.mean(1 - (above + at) / 2)),
        "p_aupr": float(np.mean(tp / (tp + fp))),
        "aupro": float(np.sum(weight * (fpr_limit - right + ramp)) / regions / fpr_limit),
    }


def region_weights(masks):
    """1 / |region| for each anomalous pixel of bool masks N x H x W, in masks' order, and the number of regions.

    Regions are 8-connected, within one image.
    """
    weights, regions = [], 0
    for mask in masks[masks.any(axis=(1, 2))]:
        label, count = ndimage.label(mask, structure=np.ones((3, 3)))
        label = label[mask]
        weights.append((1 / np.bincount(label)[1:])[label - 1])
        regions += count
    return np.concatenate(weights), regions


def first_not_finite(values):
    """Index of the first image whose score (N) or map (N x H x W) is not finite, or None."""
    return next((i for i, value in enumerate(values) if not np.isfinite(value).all()), None)


def evaluate(samples, scores, maps=None, masks=None):
    """All metrics of each row of the result table, and their mean over the rows.

    samples: N data.Sample. scores: N image scores. maps, masks: as for pixel_metrics; None = image level only.
    Returns {"classes": {row: {"i_auroc", "p_auroc", "p_aupr", "aupro"}}, "mean": {the same}}, rows in order of first
    appearance. The mean leaves undefined metrics out. A row with a defective image whose mask is not known has no pixel
    metrics: its defects would count as normal pixels. Raises data.DataError naming the first image whose score or map
    is not finite.
    """
    scores = np.asarray(scores)
    maps, masks = (None if x is None else np.asarray(x) for x in (maps, masks))
    for values, what in (scores, "score"), (maps, "anomaly map"):
        if values is not None and len(values) != len(samples):
            raise ValueError(f"{len(samples)} samples, but {len(values)} {what}s")
        if values is not None and (i := first_not_finite(values)) is not None:
            raise data.DataError(f"{samples[i].image}: its {what} is not finite; the training has probably diverged")
    rows = {}
    for i, sample in enumerate(samples):
        rows.setdefault(sample.row, []).append(i)
    classes = {}
    for row, index in rows.items():
        known = all(samples[i].mask is not None for i in index if samples[i].label)
        pixel = pixel_metrics(maps[index], masks[index]) if known and maps is not None and masks is not None else {}
        classes[row] = {"i_auroc": image_auroc(scores[index], [samples[i].label for i in index])}
        classes[row] |= {key: pixel.get(key, NAN) for key in METRICS if key != "i_auroc"}
    return {"classes": classes, "mean": mean(classes)}


def mean(classes):
    """{metric: mean over the rows of {row: {metric: value}}}; undefined values are left out."""
    return _reduce(fmean, classes.values())


def _reduce(function, results, least=1):
    """function of each metric's defined values in a list of {metric: value}; nan where fewer than `least` are."""
    values = {key: [r[key] for r in results if _defined(r[key])] for key in METRICS}
    return {key: function(v) if len(v) >= least else NAN for key, v in values.items()}


def _defined(value):
    return value is not None and not math.isnan(value)  # None: a result read back from metrics.json


def over_seeds(results):
    """Mean over seeds of {seed: evaluate's result}, in the same form, with "seeds" (each seed's result) and "std".

    "std" is the sample standard deviation (n - 1) of the seeds' means. A single seed's result is returned as it is.
    Raises data.DataError if the seeds have different rows, as the checkpoints of an unfinished run may.
    """
    runs = list(results.values())
    for seed, run in results.items():
        if missing := set().union(*(r["classes"] for r in runs)) - set(run["classes"]):
            raise data.DataError(f"seed {seed} has no result for {', '.join(sorted(missing))}; finish the run with --resume")
    if len(runs) == 1:
        return runs[0]
    return {
        "classes": {row: _reduce(fmean, [run["classes"][row] for run in runs]) for row in runs[0]["classes"]},
        "mean": _reduce(fmean, [run["mean"] for run in runs]),
        "seeds": {str(seed): run for seed, run in results.items()},
        "std": _reduce(stdev, [run["mean"] for run in runs], least=2),
    }


def table(result, paper=None):
    """The result as text: a line per row and their mean, three decimals, `-` where undefined, `±` over several seeds.

    Joined sets (rows as mvtec/bottle) have a mean each, too.
    paper: {row or "mean": {metric: the paper's figure}}; a metric that has one gets a column "paper" beside it.
    """
    runs, paper = result.get("seeds", {}).values(), paper or {}
    sets = dict.fromkeys(row.partition("/")[0] for row in result["classes"] if "/" in row)

    def with_means(r):
        return {**r["classes"], **{f"mean of {name}": mean({row: value for row, value in r["classes"].items()
                                                            if row.startswith(f"{name}/")}) for name in sets}, "mean": r["mean"]}

    ours = with_means(result)
    std = {row: _reduce(stdev, [with_means(r)[row] for r in runs], least=2) for row in ours}

    def text(value, deviation=None):
        return (f"{value:.3f}" if _defined(value) else "-") + (f" ± {deviation:.3f}" if _defined(deviation) else "")

    columns = [["class", *ours]]
    for key, title in METRICS.items():
        columns.append([title] + [text(ours[row][key], std[row][key]) for row in ours])
        theirs = [text(paper.get(row, {}).get(key)) for row in ours]
        if set(theirs) != {"-"}:
            columns.append(["paper", *theirs])
    for i, column in enumerate(columns):
        width = max(len(cell) for cell in column)
        columns[i] = [cell.rjust(width) if i else cell.ljust(width) for cell in column]
    head, *body = ["  ".join(line) for line in zip(*columns)]
    body.insert(len(result["classes"]), "-" * len(head))
    return "\n".join([head, "-" * len(head), *body])


def save_json(path, args, result):
    """Write {"args": args, **result} to path, atomically; args is a dict, a number that is not finite becomes null."""

    def plain(x):
        if isinstance(x, dict):
            return {str(key): plain(value) for key, value in x.items()}
        if isinstance(x, (list, tuple)):
            return [plain(value) for value in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    with data.atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(plain({"args": args, **result}), file, indent=2, default=str)


# ---------------------------------------------------------------------------------------------------- pictures

# Lightness (CIELAB L*) rises evenly from the first colour to the last, so that brighter always means more anomalous.
RAMP = np.array(
    [[18, 22, 58], [44, 46, 112], [120, 64, 150], [198, 84, 132], [242, 128, 90], [252, 188, 86], [252, 242, 170]]
)
INK, MARGIN = (40, 40, 40), 6


def _level(map, low, high):
    return np.clip((np.asarray(map, dtype=np.float32) - low) / max(high - low, 1e-12), 0, 1)


def heat(map, low, high):
    """uint8 H x W x 3 colours of an anomaly map H x W on the absolute scale low..high: dark blue to pale yellow."""
    level, anchors = _level(map, low, high), np.linspace(0, 1, len(RAMP))
    return np.stack([np.interp(level, anchors, channel) for channel in RAMP.T], axis=-1).round().astype(np.uint8)


def overlay(image, map, low, high):
    """uint8 H x W x 3: heat over the grey image (uint8 H x W x 3; map H x W), the stronger the higher the map."""
    grey = np.asarray(Image.fromarray(image).convert("L"))[..., None]
    alpha = 0.3 + 0.4 * _level(map, low, high)[..., None]
    return (grey * (1 - alpha) + heat(map, low, high) * alpha).round().astype(np.uint8)


def outline(mask):
    """bool H x W: the pixels of a binary mask H x W that touch its outside or the border of the image."""
    mask = np.asarray(mask, dtype=bool)
    return mask & ~ndimage.binary_erosion(mask)


def caption(sample, score):
    """One line for strip: label, score, class, defect and file name of a data.Sample."""
    name = "/".join(sample.image.replace("\\", "/").rpartition("/test/")[2].split("/")[-3:])
    return f"{'defective' if sample.label else 'good'}, score {score:.4g}, {sample.cls}, {name}"


def panels(pictures, text, low, high, size=256):
    """PIL image: uint8 H x W (x 3) pictures side by side, `size` high, above a line of text and the scale of heat."""
    pictures = [Image.fromarray(p).convert("RGB") for p in pictures]
    pictures = [p.resize((max(1, round(p.width * size / p.height)), size), Image.Resampling.BILINEAR) for p in pictures]
    canvas = Image.new("RGB", (sum(p.width + MARGIN for p in pictures) - MARGIN, size + 22), "white")
    x = 0
    for picture in pictures:
        canvas.paste(picture, (x, 0))
        x += picture.width + MARGIN
    draw, font, y = ImageDraw.Draw(canvas), ImageFont.load_default(13), size + 11
    low, high, bar = f"{low:.3g}", f"{high:.3g}", Image.fromarray(heat(np.tile(np.arange(60), (10, 1)), 0, 59))
    x = canvas.width - 2  # from the right: the scale's upper end, its colours, its lower end; the text has what is left
    draw.text((x, y), high, INK, font, anchor="rm")
    x -= round(font.getlength(high)) + MARGIN + bar.width
    canvas.paste(bar, (x, y - bar.height // 2))
    draw.text((x - MARGIN, y), low, INK, font, anchor="rm")
    x -= round(font.getlength(low)) + 3 * MARGIN
    text = " ".join(text.split())[:500]  # a file name may hold a line break
    while font.getlength(text) > x - 2 and len(text) > 1:
        text = text[:-2] + "…"
    draw.text((2, y), text, INK, font, anchor="lm")
    return canvas


def strip(image, mask, map, low, high, text="", size=256):
    """PIL image: image | ground truth | heat overlay, above a line of text (see caption) and the scale.

    image: uint8 H x W x 3. mask: H x W, nonzero = defect, or None where it is not known (grey). map: H x W.
    """
    truth = np.full(image.shape[:2], 128) if mask is None else np.where(mask, 255, 0)
    return panels([image, truth.astype(np.uint8), overlay(image, map, low, high)], text, low, high, size)


def pick(scores, labels, count=4):
    """{title: image indices} for sheet: the images that tell most about a class, at most `count` of each kind."""
    order = np.argsort(scores, kind="stable")
    good, defective = (order[np.asarray(labels)[order] == label].tolist() for label in (0, 1))
    return {
        "worst misses: defective images of the lowest scores": defective[:count],
        "worst false alarms: good images of the highest scores": good[::-1][:count],
        "best hits: defective images of the highest scores": defective[::-1][:count],
    }


def sheet(cells, path):
    """Write an overview as one PNG, atomically: a titled row for each entry of cells = {title: [PIL images]}."""
    gap, title_height = 2 * MARGIN, 26
    heights = [title_height + max([p.height for p in row], default=0) + gap for row in cells.values()]
    width = max([480] + [sum(p.width + gap for p in row) for row in cells.values()])
    canvas = Image.new("RGB", (gap + width, gap + sum(heights)), "white")
    draw, font, y = ImageDraw.Draw(canvas), ImageFont.load_default(17), gap
    for (title, row), height in zip(cells.items(), heights):
        draw.text((gap, y), title if row else f"{title} (none)", INK, font)
        x = gap
        for picture in row:
            canvas.paste(picture, (x, y + title_height))
            x += picture.width + gap
        y += height
    with data.atomic(path) as temporary:
        canvas.save(temporary, format="PNG")


def calibrate(maps, scores, classes, held_out):
    """What normal images look like to a model: the plain containers that a checkpoint keeps for `threshold` and `scale`.

    maps: N x H x W and scores: N of normal images. classes: their N names. held_out: they were not trained on.
    """
    peaks, middle = maps.max((1, 2)).tolist(), np.median(maps.reshape(len(maps), -1), axis=1).tolist()
    return {"held_out": held_out, "classes": list(classes), "scores": np.asarray(scores).tolist(), "peaks": peaks,
            "medians": middle}


def threshold(normal, quantile, cls=None, key="scores"):
    """(quantile of the normal images' scores or map peaks, how many images); of all classes together if cls is None."""
    cls = cls if cls in normal["classes"] else None
    values = [v for v, c in zip(normal[key], normal["classes"]) if cls in (None, c)]
    return float(np.quantile(values, quantile)), len(values)


def scale(normal, quantile, cls=None):
    """low, high of an absolute colour scale: from the median of normal maps to as far above the threshold again."""
    low, high = threshold(normal, 0.5, cls, "medians")[0], threshold(normal, quantile, cls, "peaks")[0]
    return low, high + (high - low)


def save_maps(folder, samples, images, masks, maps, scores, normal, quantile):
    """A strip per test image in folder/ROW/, and folder/ROW.png: worst misses, worst false alarms, best hits."""
    folder, rows = Path(folder), {}
    for i, sample in enumerate(samples):
        rows.setdefault(sample.row, []).append(i)
    for row, index in tqdm(rows.items(), "pictures", leave=False, disable=None):
        (folder / row).mkdir(parents=True, exist_ok=True)

        def picture(i, size=256):
            sample = samples[i]
            mask = None if sample.label and sample.mask is None else masks[i]
            low, high = scale(normal, quantile, sample.cls)
            return strip(images[i], mask, maps[i], low, high, caption(sample, scores[i]), size)

        for i in index:
            with data.atomic(folder / row / f"{'_'.join(place(samples[i])).replace('/', '_')}.png") as temporary:
                picture(i).save(temporary, format="PNG")
        picked = pick(scores[index], [samples[i].label for i in index])
        sheet({title: [picture(index[i], 192) for i in chosen] for title, chosen in picked.items()}, folder / f"{row}.png")


def place(sample):
    """(folder, name) of a sample's pictures: whatever folders lie below test/, else the last one; name without suffix."""
    path = sample.image.replace(os.sep, "/")
    path = path.rpartition("/test/")[2] if "/test/" in path else "/".join(path.split("/")[-2:])
    folder, _, name = path.rpartition("/")
    return folder, name if data.BATCH_IMAGE.fullmatch(sample.image) else Path(name).stem


def save_tiff(folder, samples, maps):
    """Float maps at each image's own size, folder/CLASS/test/DEFECT/NAME.tiff: the layout of MVTec's evaluation code."""
    for sample, map in zip(samples, maps):
        defect, name = place(sample)
        path = Path(folder, sample.cls, "test", defect, f"{name}.tiff")
        path.parent.mkdir(parents=True, exist_ok=True)
        size = data.read_image(sample.image).size
        with data.atomic(path) as temporary:
            Image.fromarray(map.astype(np.float32)).resize(size, Image.Resampling.BILINEAR).save(temporary, format="TIFF")


def predict(files, look, size, crop, normal, quantile, folder, log):
    """Judge image files: a line and a row of folder/predictions.csv each, and a picture. False if one could not be read.

    look: uint8 N x S x S x 3 -> maps N x S x S, scores N, class names N (or None). A score above the quantile of the
    normal images' scores (of the same class, where it is known) is defective.
    """
    folder, rows, ok, stated, used = Path(folder), [], True, set(), set()
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        try:
            pixels = data.decode([data.Sample(file, 0, None, "", "")], size, crop, progress=False)
        except data.DataError as error:
            log(f"skipped: {error}")
            rows.append([file, "", "unreadable", "", ""])
            ok = False
            continue
        (map,), (score,), (cls,) = look(pixels)
        limit, count = threshold(normal, quantile, cls)
        peak, _ = threshold(normal, quantile, cls, "peaks")
        low, high = scale(normal, quantile, cls)
        if cls not in stated:
            stated.add(cls)
            alike = cls if cls in normal["classes"] else None
            above = sum(v > limit for v, c in zip(normal["scores"], normal["classes"]) if alike in (None, c))
            rate = f"{above} of {count} above it, a false positive rate of {above / count:.1%}, " \
                   f"with 95 % confidence below {stats.beta.ppf(0.95, above + 1, count - above) if above < count else 1:.1%}"
            log(f"threshold{f' for {cls}' if cls else ''}: {limit:.4g}, the {quantile} quantile of "
                + (f"held-out normal images: {rate}" if normal["held_out"] else
                   f"training images: {rate} on images that the model has seen (--holdout trains with a fair share unseen)"))
        verdict = "defective" if score > limit else "good"
        log(f"{file}: score {score:.4g}, {verdict}" + (f", {cls}" if cls else ""))
        rows.append([file, f"{score:.6g}", verdict, cls or "", f"{limit:.6g}"])
        image = data.read_image(file) if crop is None else Image.fromarray(pixels[0])
        scaled = [max(1, round(384 * side / image.height)) for side in image.size]
        image = np.asarray(image.resize(scaled, Image.Resampling.BILINEAR))
        map = np.asarray(Image.fromarray(map.astype(np.float32)).resize(scaled, Image.Resampling.BILINEAR))
        heated = overlay(image, map, low, high)
        heated[outline(map > peak)] = 255
        name = Path(file).stem
        while name in used:  # files of the same name in other folders
            name += "_"
        used.add(name)
        with data.atomic(folder / f"{name}.png") as temporary:
            panels([image, heated], f"{verdict}, score {score:.4g} (threshold {limit:.4g})" + (f", {cls}" if cls else "")
                   + f", {Path(file).name}", low, high, 384).save(temporary, format="PNG")
    with data.atomic(folder / "predictions.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([["file", "score", "verdict", "class", "threshold"], *rows])
    log(f"written to {folder}")
    return ok
