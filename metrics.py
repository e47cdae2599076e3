"""Metrics of industrial anomaly detection, the result table, pictures of anomaly maps, and verdicts.

    image AUROC    area under the ROC curve of the image scores
    P-AUROC        the same over all pixels of a class
    P-AUPR         average precision over all pixels (step-wise sum, as in scikit-learn)
    AUPRO          per-region overlap integrated over the false positive rate from 0 to 0.3 (Bergmann et al.,
                   "The MVTec Anomaly Detection Dataset", IJCV 2021), exact: no grid of thresholds

A metric that is undefined (one class of label only, no mask) is nan: `-` in the table, null in metrics.json.
`python metrics.py [N]` compares the pixel metrics of N maps (1725) with scikit-learn's: result, time, memory.
"""
import csv
import json
import math
import os
import re
import sys
import time
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from scipy import ndimage, stats
from sklearn.metrics import average_precision_score, roc_auc_score
from tqdm import tqdm

import data

METRICS = {"i_auroc": "I-AUROC", "p_auroc": "P-AUROC", "p_aupr": "P-AUPR", "aupro": "AUPRO"}
NAN = float("nan")

# ---------------------------------------------------------------------------------------------------------
# Metrics

def image_auroc(scores, labels):
    """AUROC of N image scores for N labels (0 good, 1 defective), nan for one label."""
    return float(roc_auc_score(labels, scores)) if len(np.unique(labels)) == 2 else NAN

def pixel_metrics(maps, masks, fpr_limit=0.3):
    """Exact pixel metrics of one class: {"p_auroc", "p_aupr", "aupro"}, nan if all pixels have one label.

    maps: N x H x W floats (higher = more anomalous). masks: N x H x W, nonzero = defect. fpr_limit: AUPRO's
    upper false positive rate, in (0, 1]. Normal pixels of defective images count as normal pixels.
    Raises data.DataError naming the index of the first map that is not finite.

    An anomalous pixel of score s enters the ROC curve where the threshold passes s. Nothing but the false
    positive rate just above s and the one at s (they differ if normal pixels tie with s) decides what it adds
    to the three areas. So only the normal pixels are sorted, and each area is a mean over anomalous pixels.
    """
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"fpr_limit must lie in (0, 1], not {fpr_limit}")
    maps, masks = np.asarray(maps), np.asarray(masks, dtype=bool)
    if (i := first_not_finite(maps)) is not None:
        raise data.DataError(f"image {i}: its anomaly map has values that are not finite")

    normal, anomalous = maps[~masks], maps[masks]
    n, m = len(normal), len(anomalous)
    if n == 0 or m == 0:
        return {"p_auroc": NAN, "p_aupr": NAN, "aupro": NAN}
    weight, regions = region_weights(masks)
    normal.sort()
    order = np.argsort(anomalous)      # neighbouring look-ups then touch neighbouring memory
    anomalous, weight = anomalous[order], weight[order]

    fp = n - np.searchsorted(normal, anomalous, "left")           # normal pixels >= s
    tp = m - np.searchsorted(anomalous, anomalous, "left")        # anomalous pixels >= s: ties at once
    at = fp / n                                                   # FPR with the threshold at s
    above = (n - np.searchsorted(normal, anomalous, "right")) / n                    # and just above s
    # Between the two rates the pixel's true positive rate rises linearly from 0 to 1. That ramp may straddle
    # the limit, then only its part below it counts: a triangle of base right - left, slope 1 / (at - above).
    left, right = np.minimum(above, fpr_limit), np.minimum(at, fpr_limit)
    ramp = (right - left) ** 2 / (2 * np.maximum(at - above, 1 / n))                # at - above: 0, or >= 1/n
    return {"p_auroc": float(np.mean(1 - (above + at) / 2)),
            "p_aupr": float(np.mean(tp / (tp + fp))),
            "aupro": float(np.sum(weight * (fpr_limit - right + ramp)) / regions / fpr_limit)}

def region_weights(masks):
    """1 / |8-connected region| for each anomalous pixel of bool masks N x H x W, and how many regions."""
    weights, regions = [], 0
    for mask in masks[masks.any(axis=(1, 2))]:
        label, count = ndimage.label(mask, structure=np.ones((3, 3)))
        label = label[mask]
        weights.append((1 / np.bincount(label)[1:])[label - 1])
        regions += count
    return np.concatenate(weights), regions

def first_not_finite(values):
    return next((i for i, value in enumerate(values) if not np.isfinite(value).all()), None)

def evaluate(samples, scores, maps=None, masks=None, log=None):
    """All metrics of each row of the result table, and their mean over the rows, undefined ones left out.

    samples: N data.Sample. scores: N. maps, masks: as for pixel_metrics; None = image level only.
    log: called with a line for each row without I-AUROC or pixel metrics, which says why. A row with a
    defective image of unknown mask has no pixel metrics: its defects would count as normal pixels.
    Returns {"classes": {row: {"i_auroc", "p_auroc", "p_aupr", "aupro"}}, "mean": {the same}}, rows in order
    of first appearance. Raises data.DataError naming the first image whose score or map is not finite.
    """
    scores = np.asarray(scores)
    maps, masks = (None if x is None else np.asarray(x) for x in (maps, masks))
    for values, what in (scores, "score"), (maps, "anomaly map"):
        if values is not None and len(values) != len(samples):
            raise ValueError(f"{len(samples)} samples, but {len(values)} {what}s")
        if values is not None and (i := first_not_finite(values)) is not None:
            raise data.DataError(f"{samples[i].image}: its {what} is not finite; did the training diverge?")
    classes = {}
    for row, index in by_row(samples).items():
        labels = [samples[i].label for i in index]
        maskless = [samples[i].image for i in index if samples[i].label and samples[i].mask is None]
        classes[row] = dict.fromkeys(METRICS, NAN) | {"i_auroc": image_auroc(scores[index], labels)}
        reason = f"no {'good' if 1 in labels else 'defective'} test images"
        if log and len(set(labels)) < 2:
            log(f"{row}: no I-AUROC: {reason}")
        if maps is None or masks is None:
            reason = "no masks were read"
        elif maskless:
            reason = (f"{len(maskless)} of {sum(labels)} defective images have no mask, "
                      f"for example {maskless[0]}")
        else:
            classes[row] |= pixel_metrics(maps[index], masks[index])
            if 1 in labels:
                reason = "the masks leave no normal pixels" if masks[index].any() else "all masks are empty"
        if log and math.isnan(classes[row]["aupro"]):
            log(data.printable(f"{row}: no pixel metrics: {reason}"))
    return {"classes": classes, "mean": mean(classes)}

def by_row(samples):
    rows = dict.fromkeys(sample.row for sample in samples)
    return {row: [i for i, sample in enumerate(samples) if sample.row == row] for row in rows}

def mean(classes):
    """{metric: mean over the rows of {row: {metric: value}}}; undefined values are left out."""
    return reduce(fmean, classes.values())

def reduce(function, results, least=1):
    """function of each metric's defined values in some {metric: value}; nan where fewer than `least` are."""
    values = {key: [result[key] for result in results if defined(result[key])] for key in METRICS}
    return {key: function(v) if len(v) >= least else NAN for key, v in values.items()}

def defined(value):
    return value is not None and not math.isnan(value)            # None: a result read back from metrics.json

def over_seeds(results):
    """Mean over seeds of {seed: evaluate's result}, in the same form, with "seeds" (the results) and "std".

    "std" is the sample standard deviation (n - 1) of the seeds' means. A single seed's result stays as it is.
    Raises data.DataError if the seeds have different rows, as the checkpoints of an unfinished run may.
    """
    runs = list(results.values())
    for seed, run in results.items():
        if missing := set().union(*(other["classes"] for other in runs)) - set(run["classes"]):
            raise data.DataError(f"seed {seed} has no result for {', '.join(sorted(missing))}; "
                                 "finish the run with --resume")
    if len(runs) == 1:
        return runs[0]
    rows = runs[0]["classes"]
    return {"classes": {row: reduce(fmean, [run["classes"][row] for run in runs]) for row in rows},
            "mean": reduce(fmean, [run["mean"] for run in runs]),
            "seeds": {str(seed): run for seed, run in results.items()},
            "std": reduce(stdev, [run["mean"] for run in runs], least=2)}

def table(result, paper=None):
    """The result as text: a line per row and their mean, three decimals, `-` where undefined, `±` over seeds.

    Joined sets (rows as mvtec/bottle) have a mean each, too.
    paper: {row or "mean": {metric: the paper's figure}}; such a metric gets a column "paper" beside it.
    """
    def with_means(run):
        sets = {}
        for row, values in run["classes"].items():
            if "/" in row:
                sets.setdefault(row.partition("/")[0], {})[row] = values
        return run["classes"] | {f"mean of {name}": mean(sets[name]) for name in sets} | {"mean": run["mean"]}

    def text(value, deviation=None):
        number = f"{value:.3f}" if defined(value) else "-"
        return f"{number} ± {deviation:.3f}" if defined(deviation) else number

    ours, runs = with_means(result), [with_means(run) for run in result.get("seeds", {}).values()]
    std = {row: reduce(stdev, [run[row] for run in runs], least=2) for row in ours}
    columns = [["class", *ours]]
    for key, title in METRICS.items():
        columns.append([title, *(text(ours[row][key], std[row][key]) for row in ours)])
        theirs = [text((paper or {}).get(row, {}).get(key)) for row in ours]
        if set(theirs) != {"-"}:
            columns.append(["paper", *theirs])
    for i, column in enumerate(columns):
        width = max(len(cell) for cell in column)
        columns[i] = [cell.rjust(width) if i else cell.ljust(width) for cell in column]
    head, *body = ["  ".join(line) for line in zip(*columns)]
    body.insert(len(result["classes"]), "-" * len(head))
    return "\n".join([head, "-" * len(head), *body])

def save_json(path, args, result):
    """Write {"args": args, **result} to path, atomically. args: a dict. A number not finite becomes null."""
    text = json.dumps({"args": args, **result}, default=str)
    finite = json.loads(text, parse_constant=lambda name: None)   # called for NaN, Infinity and -Infinity
    with data.atomic(path) as temporary:
        Path(temporary).write_text(json.dumps(finite, indent=2))

# ---------------------------------------------------------------------------------------------------------
# Pictures

# Lightness (CIELAB L*) rises evenly from the first colour to the last: brighter always means more anomalous.
RAMP = np.array([[18, 22, 58], [44, 46, 112], [120, 64, 150], [198, 84, 132], [242, 128, 90], [252, 188, 86],
                 [252, 242, 170]])
INK, MARGIN, TEXT_WIDTH = (40, 40, 40), 6, 420
SHORTEST, LONGEST = 32, 960            # bounds of the sides of a picture

def level(map, low, high):
    return np.clip((np.asarray(map, dtype=np.float32) - low) / max(high - low, 1e-12), 0, 1)

def heat(map, low, high):
    """uint8 H x W x 3: an anomaly map H x W on the absolute scale low..high, dark blue to pale yellow."""
    anchors = np.linspace(0, 1, len(RAMP))
    colours = [np.interp(level(map, low, high), anchors, channel) for channel in RAMP.T]
    return np.stack(colours, axis=-1).round().astype(np.uint8)

def overlay(image, map, low, high):
    """uint8 H x W x 3: heat over the grey image (uint8 H x W x 3), the stronger the higher the map H x W."""
    grey = np.asarray(Image.fromarray(image).convert("L"))[..., None]
    alpha = 0.3 + 0.4 * level(map, low, high)[..., None]
    return (grey * (1 - alpha) + heat(map, low, high) * alpha).round().astype(np.uint8)

def fit(size, shorter):
    """(width, height) to show a picture of such a size in: its shorter side is `shorter`, or less to bound
    the longer one. The aspect ratio is kept unless a side would be under SHORTEST, as a line scan's."""
    zoom = min(shorter / min(size), LONGEST / max(size))
    return tuple(max(SHORTEST, round(side * zoom)) for side in size)

def panels(pictures, text, low, high, size=256):
    """PIL image: uint8 H x W (x 3) pictures of one size side by side, see fit, above heat's scale, text."""
    pictures = [Image.fromarray(picture).convert("RGB") for picture in pictures]
    pictures = [picture.resize(fit(picture.size, size), Image.Resampling.BILINEAR) for picture in pictures]
    bar = Image.fromarray(heat(np.tile(np.arange(60), (10, 1)), 0, 59))
    text = " ".join(f"{low:.3g} to {high:.3g} | {text}".split())[:500]     # a file name may hold a line break
    font, start = ImageFont.load_default(13), bar.width + 2 * MARGIN
    step, height = pictures[0].width + MARGIN, pictures[0].height
    width = max(step * len(pictures) - MARGIN, start + min(math.ceil(font.getlength(text)), TEXT_WIDTH))
    while font.getlength(text) > width - start and len(text) > 1:
        text = text[:-2] + "…"
    canvas = Image.new("RGB", (width, height + 22), "white")
    for i, picture in enumerate(pictures):
        canvas.paste(picture, (i * step, 0))
    canvas.paste(bar, (MARGIN, height + 6))
    ImageDraw.Draw(canvas).text((start, height + 11), text, INK, font, anchor="lm")
    return canvas

def strip(image, mask, map, low, high, text="", size=256):
    """PIL image: image (uint8 H x W x 3) | mask (H x W; None, which is grey: not known) | heat overlay."""
    truth = np.full(image.shape[:2], 128) if mask is None else np.where(mask, 255, 0)
    return panels([image, truth.astype(np.uint8), overlay(image, map, low, high)], text, low, high, size)

def place(sample):
    """The path of an image below test/, or else its last folder and its name."""
    below = re.split("/test/", sample.image.replace("\\", "/"), flags=re.IGNORECASE)
    return below[-1] if below[1:] else "/".join(below[0].split("/")[-2:])

def caption(sample, score):
    return f"{'defective' if sample.label else 'good'}, score {score:.4g}, {sample.cls}, {place(sample)}"

def pick(scores, labels, count=4):
    """{title: indices of images} for sheet: those that tell most about a class, `count` of each kind."""
    order = np.argsort(scores, kind="stable")
    good, defective = (order[np.asarray(labels)[order] == label].tolist() for label in (0, 1))
    return {"worst misses: defective images of the lowest scores": defective[:count],
            "worst false alarms: good images of the highest scores": good[::-1][:count],
            "best hits: defective images of the highest scores": defective[::-1][:count]}

def sheet(cells, path):
    """Write an overview as one PNG, see save: a titled row for each entry of {title: [PIL images]}."""
    pictures = [picture for row in cells.values() for picture in row]
    width = max([picture.width for picture in pictures], default=0) + 2 * MARGIN
    height = max([picture.height for picture in pictures], default=0) + 30
    columns = max(map(len, cells.values()), default=0)
    canvas = Image.new("RGB", (max(480, columns * width), max(1, len(cells)) * height), "white")
    for i, (title, row) in enumerate(cells.items()):
        title = title if row else f"{title} (none)"
        ImageDraw.Draw(canvas).text((MARGIN, i * height + 3), title, INK, ImageFont.load_default(17))
        for j, picture in enumerate(row):
            canvas.paste(picture, (MARGIN + j * width, i * height + 25))
    save(canvas, path)

def save(picture, path):
    """Write a PIL image as PNG, marked as of this program. Raises data.DataError if another file is there."""
    if os.path.lexists(path) and not data.is_own(path):
        raise data.DataError(f"{path}: not written by this program, so not replaced; name another --out")
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("Software", data.SOFTWARE)
    with data.atomic(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=chunks)

def picture_names(names):
    """A PNG's name for each of N file names: 000.png for 000.png, but 000.jpg.png for 000.jpg.

    Names that are equal, or differ only in case (which some file systems ignore), get _2, _3 and so on.
    """
    pictures = {}
    for name in names:
        stem, number = name.removesuffix(".png"), 1
        while len(os.fsencode(stem)) > 240:                       # file systems take 255 bytes, with _N.png
            stem = stem[:-1]
        picture = f"{stem}.png"
        while picture.casefold() in pictures:
            number += 1
            picture = f"{stem}_{number}.png"
        pictures[picture.casefold()] = picture
    return list(pictures.values())

def save_maps(folder, samples, images, masks, maps, scores, normal, quantile):
    """A strip per test image in folder/ROW/, and folder/ROW.png: worst misses, worst false alarms, best hits.

    images: uint8 N x S x S x 3. masks, maps: N x S x S. normal: see calibrate. Raises data.DataError as save.
    """
    def picture(i, size=256):
        mask = None if samples[i].label and samples[i].mask is None else masks[i]
        low, high = scale(normal, quantile, samples[i].cls)
        return strip(images[i], mask, maps[i], low, high, caption(samples[i], scores[i]), size)

    for row, index in tqdm(by_row(samples).items(), "pictures", leave=False, disable=None):
        os.makedirs(Path(folder, row), exist_ok=True)
        names = picture_names([place(samples[i]).replace("/", "_") for i in index])
        for i, name in zip(index, names):
            save(picture(i), Path(folder, row, name))
        picked = pick(scores[index], [samples[i].label for i in index])
        cells = {title: [picture(index[i], 192) for i in chosen] for title, chosen in picked.items()}
        sheet(cells, Path(folder, f"{row}.png"))

# ---------------------------------------------------------------------------------------------------------
# Verdicts on images

COLUMNS = ["file", "score", "verdict", "class", "threshold", "picture"]          # of predictions.csv
CSV = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}         # file names need not be UTF-8

def calibrate(maps, scores, classes, held_out):
    """What normal images look like to a model, for threshold and scale, as a checkpoint can keep it.

    maps: N x H x W and scores: N of normal images. classes: their N names. held_out: not trained on.
    """
    return {"held_out": held_out, "classes": list(classes), "scores": np.asarray(scores).tolist(),
            "peaks": maps.max((1, 2)).tolist(), "medians": np.median(maps, axis=(1, 2)).tolist()}

def threshold(normal, quantile, cls=None, key="scores"):
    """(quantile of the normal images' scores or map peaks, how many images); of all if cls has no images."""
    values = of_class(normal, cls, key)
    return float(np.quantile(values, quantile)), len(values)

def of_class(normal, cls, key):
    names = normal["classes"]
    return [value for value, name in zip(normal[key], names) if name == cls or cls not in names]

def scale(normal, quantile, cls=None):
    """low, high of an absolute colour scale: from normal maps' median to as far above their peaks again."""
    low, high = threshold(normal, 0.5, cls, "medians")[0], threshold(normal, quantile, cls, "peaks")[0]
    return low, high + (high - low)

def predict(files, look, size, crop, normal, quantile, folder, log):
    """Judge image files: a line, a row of folder/predictions.csv and a picture each. True if all could be.

    look: uint8 N x S x S x 3 (see data.decode) -> maps N x S x S, scores N, class names N (or None). A score
    above the quantile of the normal images' scores (of the same class, where it is known) is defective. What
    fails with one image costs that image: its verdict is "unreadable" or "failed". The pictures of the last
    prediction are removed. Raises data.DataError before the first image, see clear; OSError on a full disk.
    """
    folder, stated, ok = Path(folder), set(), True
    os.makedirs(folder, exist_ok=True)
    pictures = picture_names([os.path.basename(file) for file in files])
    clear(folder, files, pictures)
    with open(folder / "predictions.csv", "w", **CSV) as out:
        rows = csv.DictWriter(out, COLUMNS)
        rows.writeheader()
        for file, picture in zip(files, pictures):
            row = dict.fromkeys(COLUMNS, "") | {"file": file, "verdict": "unreadable"}
            try:
                pixels, image = read(file, size, crop)
                row["verdict"] = "failed"
                (map,), (score,), (cls,) = look(pixels)
                if not (np.isfinite(score) and np.isfinite(map).all()):
                    raise data.DataError(f"{file}: its score or anomaly map is not finite")
                if cls not in stated:
                    stated.add(cls)
                    log(threshold_line(normal, quantile, cls))
                limit, _ = threshold(normal, quantile, cls)
                verdict = "defective" if score > limit else "good"
                text = [f"{verdict}, score {score:.4g} (threshold {limit:.4g})", cls, os.path.basename(file)]
                save(draw(image, map, ", ".join(filter(None, text)), normal, quantile, cls), folder / picture)
                row |= {"score": f"{score:.6g}", "verdict": verdict, "class": cls or "",
                        "threshold": f"{limit:.6g}", "picture": picture}
                log(data.printable(", ".join(filter(None, [f"{file}: score {score:.4g}", verdict, cls]))))
            except data.DataError as error:
                ok = False
                log(f"skipped: {error}")
            rows.writerow(row)
            out.flush()                # an interrupt keeps the rows
    log(f"written to {folder}")
    return ok

def clear(folder, files, pictures):
    """Remove the pictures that the folder's predictions.csv names. Raises data.DataError if one of the
    pictures to come would replace one of the files, or if predictions.csv is not of this program."""
    path, inputs = folder / "predictions.csv", {os.path.realpath(file): file for file in files}
    for picture in pictures:
        if file := inputs.get(os.path.realpath(folder / picture)):
            raise data.DataError(f"--out {folder}: a picture would replace {file}; name another folder")
    if not path.exists():
        return
    with open(path, **CSV) as file:
        if file.readline().strip() not in ("", ",".join(COLUMNS)):
            raise data.DataError(f"{path}: not written by this program, so not replaced; name another --out")
        for row in csv.DictReader(file, COLUMNS, restval=""):
            old = folder / os.path.basename(row["picture"])
            if data.is_own(old) and os.path.realpath(old) not in inputs:
                old.unlink()

def read(file, size, crop):
    """uint8 1 x S x S x 3 as by data.decode, and the PIL image to show, from one decoding of the file."""
    image, side = data.read_image(file), crop or size
    edge = round((size - side) / 2)
    square = image.resize((size, size), Image.Resampling.BILINEAR)
    square = square.crop((edge, edge, edge + side, edge + side))
    shown = square if crop else image
    return np.asarray(square)[None], shown.resize(fit(shown.size, 384), Image.Resampling.BILINEAR)

def draw(image, map, text, normal, quantile, cls):
    """PIL image: a PIL image beside its heat; what exceeds the peaks of normal images' maps is outlined."""
    map = np.asarray(Image.fromarray(map.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR))
    low, high = scale(normal, quantile, cls)
    heated = overlay(np.asarray(image), map, low, high)
    above = map > threshold(normal, quantile, cls, "peaks")[0]
    heated[above & ~ndimage.binary_erosion(above)] = 255
    return panels([np.asarray(image), heated], text, low, high, 384)

def threshold_line(normal, quantile, cls):
    limit, count = threshold(normal, quantile, cls)
    above = sum(score > limit for score in of_class(normal, cls, "scores"))
    most = stats.binomtest(above, count, alternative="less").proportion_ci(0.95).high    # Clopper-Pearson
    name, kind, note = f"threshold for {cls}" if cls else "threshold", "held-out normal images", ""
    if not normal["held_out"]:
        kind, note = "training images", " on images that the model has seen (--holdout keeps a share unseen)"
    return (f"{name}: {limit:.4g}, the {quantile} quantile of {kind}: {above} of {count} above it, a false "
            f"positive rate of {above / count:.1%}, with 95 % confidence below {most:.1%}{note}")

# ---------------------------------------------------------------------------------------------------------
# Benchmark

def benchmark(count=1725):
    """Compare pixel_metrics with scikit-learn on smooth random maps, higher in random blobs."""
    import resource                    # not on Windows
    rng, maps = np.random.default_rng(0), np.empty((count, 224, 224), np.float32)
    masks = np.empty(maps.shape, bool)
    for i in range(count):
        maps[i], blobs = ndimage.zoom(rng.random((2, 14, 14), np.float32), (1, 16, 16), order=1)
        masks[i] = blobs > 0.85
    maps[masks] += 0.3
    start = time.perf_counter()
    ours = pixel_metrics(maps, masks)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6                  # from kB
    labels, scores, start = masks.ravel(), maps.ravel(), time.perf_counter()
    theirs = roc_auc_score(labels, scores), average_precision_score(labels, scores)
    ratio = (time.perf_counter() - start) / seconds
    difference = max(abs(ours["p_auroc"] - theirs[0]), abs(ours["p_aupr"] - theirs[1]))
    print(f"{count} maps of 224 x 224: {seconds:.2f} s, peak memory {peak:.1f} GB; scikit-learn's AUROC and "
          f"AP take {ratio:.1f} times as long; largest difference {difference:.0e}")

if __name__ == "__main__":
    benchmark(*[int(count) for count in sys.argv[1:2]])
