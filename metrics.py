"""Metrics of industrial anomaly detection, the result table, pictures of anomaly maps, and verdicts.

    image AUROC    area under the ROC curve of the image scores
    P-AUROC        the same over all pixels of a class
    P-AUPR         average precision over all pixels (step-wise sum, as in scikit-learn)
    AUPRO          per-region overlap integrated over the false positive rate from 0 to 0.3 (Bergmann et al.,
                   "The MVTec Anomaly Detection Dataset", IJCV 2021), exact: no grid of thresholds

A metric that is undefined (one class of label only, no mask) is nan: `-` in the table, null in metrics.json.
"""
import csv
import itertools
import json
import math
import os
import re
import timeit
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from scipy import ndimage, stats
from sklearn.metrics import roc_auc_score

import data

METRICS = {"i_auroc": "I-AUROC", "p_auroc": "P-AUROC", "p_aupr": "P-AUPR", "aupro": "AUPRO"}

# ---------------------------------------------------------------- metrics and the result table
def image_auroc(scores, labels):
    """AUROC of N image scores for N labels (0 good, 1 defective), nan for one label."""
    return float(roc_auc_score(labels, scores)) if len(np.unique(labels)) == 2 else math.nan

def pixel_metrics(maps, masks, fpr_limit=0.3):
    """Exact pixel metrics of one class: {"p_auroc", "p_aupr", "aupro"}, nan if all pixels have one label.
    maps: N x H x W floats (higher = more anomalous). masks: N x H x W, nonzero = defect. fpr_limit: AUPRO's
    upper false positive rate, in (0, 1]. Normal pixels of defective images count as normal pixels.
    Raises data.DataError naming the index of the first map that is not finite.

    An anomalous pixel of score s enters the ROC curve where the threshold passes s. Nothing but the false
    positive rate just above s and the one at s (they differ if normal pixels tie with s) decides what it adds
    to the three areas. So each area is a mean over the anomalous pixels, and takes a sort of the normal
    pixels, one of the anomalous ones, which are far fewer, and look-ups."""
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"fpr_limit must lie in (0, 1], not {fpr_limit}")
    maps, masks = np.asarray(maps), np.asarray(masks, dtype=bool)
    for i, map in enumerate(maps):
        if not np.isfinite(map).all():
            raise data.DataError(f"image {i}: its anomaly map is not finite")
    weight, regions = region_weights(masks)
    normal, anomalous = maps[~masks], maps[masks]
    n, m = len(normal), len(anomalous)
    if n == 0 or m == 0:
        return {"p_auroc": math.nan, "p_aupr": math.nan, "aupro": math.nan}
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
    within = np.zeros((3, 3, 3))
    within[1] = 1                      # the 8 neighbours in the same image, none in the next
    label, regions = ndimage.label(masks, within)
    label = label[masks]
    return 1 / np.bincount(label)[label], regions

def evaluate(samples, scores, maps, masks, log=None):
    """All metrics of each row of the result table, and their mean over the rows, undefined ones left out.
    samples: N data.Sample. scores: N. maps, masks: as for pixel_metrics. A row with a defective image of
    unknown mask has no pixel metrics: its defects would count as normal pixels. log: called with a line that
    says why, for each row without I-AUROC or pixel metrics.
    Returns {"classes": {row: {"i_auroc", "p_auroc", "p_aupr", "aupro"}}, "mean": {the same}}, rows in order
    of first appearance. Raises data.DataError naming the first image whose score or map is not finite."""
    scores, classes = np.asarray(scores), {}
    for what, values in ("score", scores), ("anomaly map", maps):
        for sample, value in zip(samples, values, strict=True):
            if not np.isfinite(value).all():
                raise data.DataError(f"{sample.image}: its {what} is not finite; did the training diverge?")
    for row, index in by_row(samples).items():
        labels = [samples[i].label for i in index]
        known = sum(samples[i].label and samples[i].mask is not None for i in index)
        found = f"{labels.count(0)} good and {labels.count(1)} defective test images, {known} with a mask"
        classes[row] = dict.fromkeys(METRICS, math.nan) | {"i_auroc": image_auroc(scores[index], labels)}
        if known == labels.count(1):
            classes[row] |= pixel_metrics(maps[index], masks[index])
            found += f", {masks[index].mean():.0%} of all pixels are defect"
        for key, what in ("i_auroc", "I-AUROC"), ("aupro", "pixel metrics"):
            if log and math.isnan(classes[row][key]):
                log(data.printable(f"{row}: no {what}: {found}"))
    return {"classes": classes, "mean": mean(classes)}

def by_row(samples):
    rows = dict.fromkeys(sample.row for sample in samples)
    return {row: [i for i, sample in enumerate(samples) if sample.row == row] for row in rows}

def mean(classes):
    """{metric: mean over the rows of {row: {metric: value}}}; undefined values are left out."""
    return reduce(fmean, classes.values())

def reduce(function, results, least=1):
    """function of each metric's defined values in some {metric: value}; nan where fewer than `least` are."""
    values = {key: [result[key] for result in results if not math.isnan(result[key])] for key in METRICS}
    return {key: function(v) if len(v) >= least else math.nan for key, v in values.items()}

def over_seeds(results):
    """{seed: {row: {metric: value}}} in evaluate's form; several seeds' mean with "seeds" (theirs) and "std".
    "std" is the sample standard deviation (n - 1) of the seeds' means.
    Raises data.DataError if the seeds have different rows, as the checkpoints of an unfinished run may."""
    results = {seed: {"classes": classes, "mean": mean(classes)} for seed, classes in results.items()}
    runs = list(results.values())
    rows = dict.fromkeys(row for run in runs for row in run["classes"])
    for seed, run in results.items():
        if missing := ", ".join(sorted(rows.keys() - run["classes"])):
            raise data.DataError(f"seed {seed} has no result for {missing}; finish the run with --resume")
    if len(runs) == 1:
        return runs[0]
    return {"classes": {row: reduce(fmean, [run["classes"][row] for run in runs]) for row in rows},
            "mean": reduce(fmean, [run["mean"] for run in runs]),
            "seeds": {str(seed): run for seed, run in results.items()},
            "std": reduce(stdev, [run["mean"] for run in runs], least=2)}

def table(result, paper=None):
    """The result as text: a line per row and their mean, three decimals, `-` if undefined, `±` over seeds.
    Joined sets (rows as mvtec/bottle) have a mean each, too.
    paper: {row or "mean": {metric: the paper's figure}}; such a metric gets a column "paper" beside it."""
    def with_means(run):
        sets = {}
        for row, values in run["classes"].items():
            if "/" in row:
                sets.setdefault(row.partition("/")[0], {})[row] = values
        return run["classes"] | {f"mean of {name}": mean(sets[name]) for name in sets} | {"mean": run["mean"]}

    def text(value, deviation=math.nan):
        number = "-" if math.isnan(value) else f"{value:.3f}"
        return number if math.isnan(deviation) else f"{number} ± {deviation:.3f}"

    ours, runs = with_means(result), [with_means(run) for run in result.get("seeds", {}).values()]
    std = {row: reduce(stdev, [run[row] for run in runs], least=2) for row in ours}
    names = ["class", *ours]
    columns = [[name.ljust(max(map(len, names))) for name in names]]
    for key, title in METRICS.items():
        columns.append([title, *(text(ours[row][key], std[row][key]) for row in ours)])
        theirs = [text((paper or {}).get(row, {}).get(key, math.nan)) for row in ours]
        if set(theirs) != {"-"}:
            columns.append(["paper", *theirs])
    widths = [max(map(len, column)) for column in columns]
    head, *body = ["  ".join(map(str.rjust, cells, widths)) for cells in zip(*columns)]
    body.insert(len(result["classes"]), "-" * len(head))
    return "\n".join([head, "-" * len(head), *body])

def read_table(text):
    """{row: {column: figure}} of a paper's table: first the columns, then each row's name and figures."""
    head, *lines = text.strip().splitlines()
    columns, words, rows = head.split(), iter(" ".join(lines).split()), {}
    for row in words:
        rows[row] = {column: float(next(words)) for column in columns}
    return rows

def save_json(path, args, result):
    """Write {"args": args, **result} to path, atomically. args: a dict. A number not finite becomes null."""
    text = json.dumps({"args": args, **result}, default=str)
    finite = json.loads(text, parse_constant=lambda name: None)   # called for NaN, Infinity and -Infinity
    with data.atomic(path) as temporary:
        Path(temporary).write_text(json.dumps(finite, indent=2))

def storage(model):
    """Size of a model's tensors in MiB."""
    return sum(tensor.nbytes for tensor in model.state_dict().values()) / 2**20

def seconds(function):
    """Median time of function(), which must wait for the device; the first call is not counted."""
    return np.median(timeit.repeat(function, number=1, repeat=6)[1:])

# ---------------------------------------------------------------- pictures
# Lightness (CIELAB L*) rises evenly from the first colour to the last: brighter always means more anomalous.
RAMP = np.array([[18, 22, 58], [44, 46, 112], [120, 64, 150], [198, 84, 132], [242, 128, 90], [252, 188, 86],
                 [252, 242, 170]])
INK, MARGIN = (40, 40, 40), 6

def heat(map, low, high):
    """uint8 H x W x 3: an anomaly map H x W on the absolute scale low..high, dark blue to pale yellow."""
    anchors = np.linspace(low, high, len(RAMP))
    colours = [np.interp(map, anchors, channel) for channel in RAMP.T]
    return np.stack(colours, axis=-1).round().astype(np.uint8)

def overlay(image, map, low, high):
    """uint8 H x W x 3: heat over the grey image (uint8 H x W x 3), the stronger the higher the map H x W."""
    grey = np.asarray(Image.fromarray(image).convert("L"))[..., None]
    alpha = np.interp(map, (low, high), (0.3, 0.7))[..., None]
    return (grey * (1 - alpha) + heat(map, low, high) * alpha).round().astype(np.uint8)

def fit(size, shorter):
    """(width, height) to show a picture of such a size in: its shorter side is `shorter`, or less to keep the
    longer one within 960. The aspect ratio stays unless a side would be under 32, as a line scan's."""
    zoom = min(shorter / min(size), 960 / max(size))
    return tuple(max(32, round(side * zoom)) for side in size)

def panels(pictures, text, low, high, size=256):
    """PIL image: uint8 H x W (x 3) pictures of one size side by side, see fit, above heat's scale, text."""
    shown = fit(pictures[0].shape[1::-1], size)
    step, height = shown[0] + MARGIN, shown[1]
    bar = Image.fromarray(heat(np.tile(np.arange(60), (10, 1)), 0, 59))
    text = " ".join(f"{low:.3g} to {high:.3g} | {text}".split())[:500]     # a file name may hold a line break
    font, start = ImageFont.load_default(13), bar.width + 2 * MARGIN
    width = max(step * len(pictures) - MARGIN, start + min(math.ceil(font.getlength(text)), 420))
    while font.getlength(text) > width - start and len(text) > 1:
        text = text[:-2] + "…"
    canvas = Image.new("RGB", (width, height + 22), "white")
    for i, picture in enumerate(pictures):
        canvas.paste(Image.fromarray(picture).resize(shown, Image.Resampling.BILINEAR), (i * step, 0))
    canvas.paste(bar, (MARGIN, height + 6))
    ImageDraw.Draw(canvas).text((start, height + 11), text, INK, font, anchor="lm")
    return canvas

def place(sample):
    """The path of an image below test/, or else its last folder and its name."""
    below = re.split("/test/", sample.image.replace("\\", "/"), flags=re.IGNORECASE)
    return below[-1] if below[1:] else "/".join(below[0].split("/")[-2:])

def pick(scores, labels, count=4):
    """{title: indices of images} for sheet: those that tell most about a class, `count` of each kind."""
    order = np.argsort(scores, kind="stable")
    good, defective = (order[np.asarray(labels)[order] == label].tolist() for label in (0, 1))
    return {"worst misses: defective images of the lowest scores": defective[:count],
            "worst false alarms: good images of the highest scores": good[::-1][:count],
            "best hits: defective images of the highest scores": defective[::-1][:count]}

def sheet(cells, path):
    """Write an overview as one PNG, see save: a titled row for each entry of {title: [PIL images]}."""
    pictures = sum(cells.values(), [])
    width, height = np.max([picture.size for picture in pictures], axis=0) + (2 * MARGIN, 30)
    columns = max(map(len, cells.values()))
    canvas = Image.new("RGB", (max(480, columns * width), len(cells) * height), "white")
    for i, (title, row) in enumerate(cells.items()):
        title += "" if row else " (none)"
        ImageDraw.Draw(canvas).text((MARGIN, i * height + 3), title, INK, ImageFont.load_default(17))
        for j, picture in enumerate(row):
            canvas.paste(picture, (MARGIN + j * width, i * height + 25))
    save(canvas, path)

def save(picture, path):
    """Write a PIL image as PNG, marked as of this program: data.find_images leaves it out."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("Software", data.SOFTWARE)
    with data.atomic(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=chunks)

def picture_names(names):
    """A PNG's name for each of N file names: 000.png for 000.png, but 000.jpg.png for 000.jpg.
    Names that are equal, or differ only in case (which some file systems ignore), get _2, _3 and so on."""
    pictures = {}
    for name in names:
        stem = name.removesuffix(".png")
        while len(os.fsencode(stem)) > 240:                       # file systems take 255 bytes, with _N.png
            stem = stem[:-1]
        choices = itertools.chain([f"{stem}.png"], (f"{stem}_{i}.png" for i in itertools.count(2)))
        picture = next(choice for choice in choices if choice.casefold() not in pictures)
        pictures[picture.casefold()] = picture
    return list(pictures.values())

def save_maps(folder, samples, images, masks, maps, scores, normal, quantile):
    """A strip per test image in folder/ROW/: image | mask, grey if it is not known | heat over the image; and
    folder/ROW.png: worst misses, worst false alarms, best hits.

    images: uint8 N x S x S x 3. masks, maps: N x S x S. scores: N. normal: see calibrate."""
    def strip(i, size=256):
        sample, (low, high) = samples[i], scale(normal, quantile, samples[i].cls)
        truth = np.where(masks[i], 255, 0) if sample.mask or not sample.label else np.full_like(maps[i], 128)
        text = f"{['good', 'defective'][sample.label]}, score {scores[i]:.4g}, {sample.cls}, {place(sample)}"
        shown = images[i], truth.astype(np.uint8), overlay(images[i], maps[i], low, high)
        return panels(shown, text, low, high, size)

    for row, index in data.progress(by_row(samples).items(), "pictures"):
        os.makedirs(Path(folder, row), exist_ok=True)
        for i, name in zip(index, picture_names([place(samples[i]).replace("/", "_") for i in index])):
            save(strip(i), Path(folder, row, name))
        picked = pick(scores[index], [samples[i].label for i in index])
        cells = {title: [strip(index[i], 192) for i in chosen] for title, chosen in picked.items()}
        sheet(cells, Path(folder, f"{row}.png"))

# ---------------------------------------------------------------- verdicts on images
def hold_out(samples, share):
    """bool N: an even share of each class's samples, less than all, to be kept out of the training."""
    held = np.zeros(len(samples), bool)
    for cls in {sample.cls for sample in samples}:
        mine = np.flatnonzero([sample.cls == cls for sample in samples])
        count = min(round(share * len(mine)), len(mine) - 1)
        held[mine[np.arange(count) * len(mine) // count]] = True
    return held

def calibrate(maps, scores, classes, held_out):
    """What normal images look like to a model, for threshold and scale, as a checkpoint can keep it.
    maps: N x H x W and scores: N of normal images. classes: their N names. held_out: not trained on."""
    return {"held_out": held_out, "classes": list(classes), "scores": np.asarray(scores).tolist(),
            "peaks": maps.max((1, 2)).tolist(), "medians": np.median(maps, axis=(1, 2)).tolist()}

def threshold(normal, quantile, cls, key="scores"):
    """The quantile of the normal images' scores, or of their maps' "peaks" or "medians"."""
    return float(np.quantile(of_class(normal, cls, key), quantile))

def of_class(normal, cls, key):
    """The values of the class's normal images, or of all if there are none of this class."""
    names = normal["classes"]
    return [value for value, name in zip(normal[key], names) if name == cls or cls not in names]

def scale(normal, quantile, cls):
    """low, high of an absolute colour scale: from normal maps' median to as far above their peaks again."""
    low, peak = threshold(normal, 0.5, cls, "medians"), threshold(normal, quantile, cls, "peaks")
    return low, max(low, 2 * peak - low)

def predict(files, look, size, crop, normal, quantile, folder, log):
    """Judge image files: a line, a row of folder/predictions.csv and a picture each. True if all could be.
    look: uint8 N x S x S x 3 (see data.decode) -> maps N x S x S, scores N, class names N (or None). A score
    above the quantile of the normal images' scores (of the same class, where it is known) is defective. An
    image that cannot be read or judged costs that image: its verdict is "unreadable" or "failed". Raises
    data.DataError before the first image, see clear, or if a picture cannot be written (OSError: the csv)."""
    pictures, stated, ok = picture_names([Path(file).name for file in files]), set(), True
    clear(folder, files, pictures)
    with open(folder / "predictions.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as out:
        rows = csv.DictWriter(out, ["file", "score", "verdict", "class", "threshold", "picture"])
        rows.writeheader()             # with surrogateescape, as a file name need not be UTF-8
        for file, picture in zip(files, pictures):
            row = {"file": file, "verdict": "unreadable"}
            try:
                pixels, image = read(file, size, crop)
                row["verdict"] = "failed"
                (map,), (score,), (cls,) = look(pixels)
                if not (np.isfinite(score) and np.isfinite(map).all()):
                    raise data.DataError(f"{file}: its score or anomaly map is not finite")
            except data.DataError as error:
                ok = False
                log(f"skipped: {error}")
            else:
                if cls not in stated:
                    stated.add(cls)
                    log(threshold_line(normal, quantile, cls))
                limit, named = threshold(normal, quantile, cls), f", {cls}" if cls else ""
                verdict = "defective" if score > limit else "good"
                text = f"{verdict}, score {score:.4g} (threshold {limit:.4g}){named}, {Path(file).name}"
                save(draw(image, map, text, normal, quantile, cls), folder / picture)
                row |= {"score": f"{score:.6g}", "verdict": verdict, "class": cls,
                        "threshold": f"{limit:.6g}", "picture": picture}
                log(data.printable(f"{file}: score {score:.4g}, {verdict}{named}"))
            rows.writerow(row)
            out.flush()                # an interrupt keeps the rows
    log(f"written to {folder}")
    return ok

def clear(folder, files, pictures):
    """Remove the pictures of the last prediction. DataError if a new one would replace a file to judge."""
    inputs = {os.path.realpath(file).casefold(): file for file in files}     # some file systems ignore case
    for name in (*pictures, "predictions.csv"):
        if file := inputs.get(os.path.realpath(folder / name).casefold()):
            raise data.DataError(f"--out {folder}: {name} would replace {file}; name another folder")
    for old in folder.glob("*.png"):
        if data.is_own(old) and os.path.realpath(old).casefold() not in inputs:
            old.unlink()

def read(file, size, crop):
    """uint8 1 x S x S x 3 as by data.decode, and the PIL image to show, from one decoding of the file."""
    image = data.read_image(file)
    square = data.center_crop(image.resize((size, size), Image.Resampling.BILINEAR), crop or size)
    shown = square if crop else image
    return np.asarray(square)[None], shown.resize(fit(shown.size, 384), Image.Resampling.BILINEAR)

def draw(image, map, text, normal, quantile, cls):
    """PIL image: a PIL image beside its heat; what exceeds the peaks of normal images' maps is outlined."""
    map = np.asarray(Image.fromarray(map.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR))
    low, high = scale(normal, quantile, cls)
    heated = overlay(np.asarray(image), map, low, high)
    above = map > threshold(normal, quantile, cls, "peaks")
    heated[above & ~ndimage.binary_erosion(above)] = 255
    return panels([np.asarray(image), heated], text, low, high, 384)

def threshold_line(normal, quantile, cls):
    limit, scores = threshold(normal, quantile, cls), of_class(normal, cls, "scores")
    above, count = sum(score > limit for score in scores), len(scores)
    most = stats.binomtest(above, count, alternative="less").proportion_ci(0.95).high    # Clopper-Pearson
    kind = ("held-out normal images" if normal["held_out"] else
            "training images, which the model has seen (--holdout keeps a share unseen)")
    named = f" for {cls}" if cls else ""
    return (f"threshold{named}: {limit:.4g}, the {quantile} quantile of {kind}: {above} of {count} above it, "
            f"a false positive rate of {above / count:.1%}, with 95 % confidence below {most:.1%}")
