"""Every data set: where its images and masks lie, how they are read, and the cache of decoded images.

    load("mvtec", "data/mvtec")          which images train and test, their labels and masks
    decode(samples, 224, cache="cache")  their pixels, uint8 N x 224 x 224 x 3, decoded once

A set is one short function below and one line of SETS. Label 1 means defective and comes from the folder or
the csv, never from the mask: a defect that resizing removes from the mask still makes a defective image.
"""
import contextlib
import csv
import difflib
import functools
import glob
import hashlib
import json
import math
import os
import re
import secrets
import stat
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm


class DataError(Exception):
    """One line for the user: what is wrong, with which file or option, and what to do."""

    def __str__(self):
        return printable(super().__str__())


def printable(text):
    """One line of valid UTF-8: a file name may hold line breaks, and bytes on which print would fail."""
    return " ".join(text.splitlines()).encode("utf-8", "backslashreplace").decode()


def reason(error):
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class Sample(NamedTuple):
    image: str        # path; "FILE#INDEX" in a CIFAR-10 batch; "toy:CLASS/SPLIT/DEFECT/INDEX"
    label: int        # 0 good, 1 defective
    mask: str | None  # None: a good image, or a defective one whose mask is not known
    cls: str          # the class it trains as
    row: str          # the row of the table it counts in: the class, AeBAD's domain or CIFAR-10's split


class Dataset(NamedTuple):
    name: str
    classes: list[str]
    train: list[Sample]
    test: list[Sample]


# ---------------------------------------------------------------------------------------------------------
# The walk over a tree

# What Pillow opens, less the formats that it only recognises or hands to other programs
Image.init()
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN
            and kind not in ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")}
# What may hold images that are missed: photos that Pillow does not open, arrays, archives
OTHERS = set(".heic .heif .jxl .svg .raw .dng .cr2 .nef .arw .npy .npz .zip .tar .tgz .gz .7z .rar".split())
JUNK = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}


def is_image(path):
    return Path(path).suffix.lower() in SUFFIXES and not os.path.basename(path).startswith(".")


def walk(root, parts=(), follow=True, skip=(), above=()):
    """Yields what looks like data in root/PARTS and below, as a tuple of its path's parts, in natural order.

    That is images, also those that Pillow cannot read, and archives. follow: go into links to folders, and a
    broken link is an error. skip: names in root/PARTS to leave out. Raises DataError.
    """
    folder = os.path.join(root, *parts)
    here = Path(os.path.realpath(folder))
    above = above or tuple(here.parents)
    if here not in above:              # a link may lead to a folder that holds it
        for name, is_folder in entries(folder, follow):
            if is_folder and name not in skip:
                yield from walk(root, (*parts, name), follow, (), (*above, here))
            elif not is_folder and (is_image(name) or Path(name).suffix.lower() in OTHERS):
                yield *parts, name


def entries(folder, follow=True):
    """(name, whether it is a folder) in natural order (2 before 10), without hidden files and JUNK."""
    try:
        with os.scandir(folder) as found:
            pairs = [(entry.name, stat.S_ISDIR(entry.stat(follow_symlinks=follow).st_mode)) for entry in found
                     if not entry.name.startswith(".") and entry.name not in JUNK]
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {reason(error)}") from None
    return sorted(pairs, key=lambda pair: natural(pair[0]))


def subfolders(root):
    return [name for name, is_folder in entries(root) if is_folder]


def natural(name):
    return [int(part) if i % 2 else part.casefold() for i, part in enumerate(re.split(r"(\d+)", name))], name


# ---------------------------------------------------------------------------------------------------------
# Layouts: one function each, (root, class, files) -> ("train" or "test", Sample) for every image;
# files: what walk() found in root/CLASS. What a layout leaves over is named by load().

def mvtec(root, cls, files, good="good", domains=False):
    """CLASS/train/good/**, test/good/**, test/DEFECT/**, ground_truth/DEFECT/**, the folders in any case.

    domains: the folders below good and DEFECT are rows of the table.
    """
    images = [(os.path.join(root, *parts), [part.casefold() for part in parts[1:-1]], parts)
              for parts in files if is_image(parts[-1])]
    stems = {os.path.splitext(path)[0] + "_mask" for path, _, _ in images}    # masks may lie beside images
    truth = {path: folders[1:] for path, folders, _ in images
             if folders[:1] == ["ground_truth"] or os.path.splitext(path)[0] in stems}
    masks = index_masks(truth)
    for path, folders, parts in images:
        if path not in truth and len(folders) > 1 + domains and \
                (folders[0] == "test" or folders[:2] == ["train", good]):
            mask = None if folders[1] == good else find_mask(masks, folders[1:], path)
            yield folders[0], Sample(path, int(folders[1] != good), mask, cls, parts[3] if domains else cls)


def visa(root, cls, files):
    """Raw: split_csv/1cls.csv lists object, split, label, image, mask, below root. Prepared: as mvtec."""
    lines = visa_csv(root)
    if not lines:
        yield from mvtec(root, cls, files)
    for _, split, label, image, mask in (line for line in lines if line[0] == cls):
        if (split, label) not in (("train", "normal"), ("test", "normal"), ("test", "anomaly")):
            raise DataError(f"{root / VISA_CSV}: {image} has split '{split}' and label '{label}'")
        for path in (image, mask) if label == "anomaly" else (image,):
            if not os.path.isfile(root / path):
                raise DataError(f"{root / VISA_CSV}: no file '{path}' of {image} in {root}")
        yield split, Sample(str(root / image), int(label == "anomaly"),
                            str(root / mask) if label == "anomaly" else None, cls, cls)


def cifar10(root, cls, files, normals):
    """data_batch_1..5 train, test_batch tests; UniAD's protocol: five classes are normal."""
    number, normal = CIFAR10.index(cls), str(CIFAR10.index(cls)) in normals
    for split in ("train", "test") if normal else ("test",):
        for index in np.flatnonzero(cifar10_arrays(str(root), split)[1] == number):
            name = f"test_batch#{index}"
            if split == "train":
                name = f"data_batch_{index // BATCH + 1}#{index % BATCH}"
            yield split, Sample(str(root / name), int(not normal), None, cls, normals)


def toy(root, cls, files):
    """28 train, 10 good and 12 defective test images, drawn by toy_image()."""
    groups = ("train", "good", 28), ("test", "good", 10), *(("test", defect, 4) for defect in TOY[cls])
    for split, defect, count in groups:
        for name in (f"toy:{cls}/{split}/{defect}/{index:03d}" for index in range(count)):
            yield split, Sample(name, int(defect != "good"), None if defect == "good" else name, cls, cls)


# What the layouts are made of

VISA_CSV = "split_csv/1cls.csv"
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCH = 10000                          # images in a file of CIFAR-10


def index_masks(folders):
    """{path: folders, in lower case} of masks -> {(*folders, stem in lower case): paths}, for find_mask()."""
    masks = {}
    for path, place in folders.items():
        masks.setdefault((*place, Path(path).stem.casefold()), []).append(path)
    return masks


def find_mask(masks, folders, image):
    """The path of an image's mask, STEM_mask.* or STEM.* in its folders or the first of them, or None."""
    stem = Path(image).stem
    for place in folders, folders[:1]:
        for name in stem + "_mask", stem:
            if found := masks.get((*place, name.casefold())):     # of several: the same case first, then png
                return min(found, key=lambda path: (Path(path).stem != name, not path.endswith(".png"), path))
    return None


def mvtec_classes(root):               # others, as results/, are none
    found = [name for name in subfolders(root) if {"train", "test"} & folders_in(root / name)]
    if not found:
        raise DataError(f"no images in {root}: looked for CLASS/train/good and CLASS/test in it")
    return found


def folders_in(root):
    return {name.casefold() for name in subfolders(root)}


def visa_csv(root):
    """The lines (object, split, label, image, mask); none if there is no such file."""
    columns, path = ("object", "split", "label", "image", "mask"), root / VISA_CSV
    if not os.path.lexists(path):
        return []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.DictReader(file, restval=""))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {reason(error)}") from None
    for column in columns:
        if not lines or column not in lines[0]:
            raise DataError(f"{path}: no column '{column}', found {', '.join(map(str, [*lines, {}][0]))}")
    return [tuple(line[column].strip().replace("\\", "/") for column in columns) for line in lines]


def visa_classes(root):
    return list(dict.fromkeys(line[0] for line in visa_csv(root))) or mvtec_classes(root)


@functools.lru_cache(2)
def cifar10_arrays(root, split):
    """uint8 N x 32 x 32 x 3 and the N labels of CIFAR-10's python version in a folder cifar-10-batches-py."""
    from torchvision import datasets   # not at the top: the other sets do without it
    try:                               # it checks every file's MD5 before it unpickles
        found = datasets.CIFAR10(Path(root).resolve().parent, train=split == "train")
        return found.data, np.array(found.targets)
    except Exception:
        raise DataError(f"{root}: a file of cifar-10-batches-py is missing or its MD5 is wrong; unpack "
                        f"{datasets.CIFAR10.url} again") from None


# ---------------------------------------------------------------------------------------------------------
# The table of sets

class Set(NamedTuple):
    samples: Callable                   # a layout
    source: str                         # where it can be had; ends every error
    counts: tuple = ()                  # of full copies: classes, train, good, defective
    inside: tuple = ()                  # folders that the root may hold instead of being one
    classes: Callable = mvtec_classes   # root -> names
    masks: bool = True                  # whether a defective image without one is an error


SETS = {
    "mvtec": Set(mvtec, "MVTec AD: https://www.mvtec.com/company/research/datasets/mvtec-ad",
                 ((15, 3629, 467, 1258),)),
    "visa": Set(visa, "VisA: https://github.com/amazon-science/spot-diff",
                ((12, 8659, 962, 1200),), ("1cls",), visa_classes),
    "btad": Set(functools.partial(mvtec, good="ok"), "BTAD: https://github.com/pankajmishra000/VT-ADL",
                ((3, 1799, 451, 290),)),
    "goodsad": Set(mvtec, "GoodsAD: https://github.com/jianzhang96/GoodsAD", ((6, 3136, 1328, 1660),)),
    "mad": Set(mvtec, "MAD: https://github.com/EricLee0224/PAD", ((20,), (10,)), ("MAD-Sim", "MAD-Real")),
    "aebad": Set(functools.partial(mvtec, domains=True), "AeBAD: https://github.com/zhangzilongc/MMR",
                 ((1, 521, 490, 1149),), ("AeBAD_S",)),
    "cifar10": Set(cifar10, "CIFAR-10, python version: https://www.cs.toronto.edu/~kriz/cifar.html",
                   ((5, 25000, 5000, 5000),), ("cifar-10-batches-py",), masks=False),
    "folder": Set(mvtec, "layout: ROOT/CLASS/{train/good,test/good,test/DEFECT,ground_truth/DEFECT}",
                  masks=False),
    "toy": Set(toy, "built in"),
}
NAMES = list(SETS)


def load(names, root=None, classes=None, normals="01234", log=print):
    """Lists the images of a set, or of several joined by "+", whose classes are then called "set/class".

    root: where the set lies, default data/NAME; of joined sets what holds a folder per set, default data.
    classes: a subset. normals: the digits of CIFAR-10's five normal classes. log: called with a line per
    class and per warning ("warning: .."). train or test may be empty. Raises DataError.
    """
    parts, joined = names.split("+"), "+" in names
    for name in parts:
        if name not in SETS:
            known = f"{nearest(name, NAMES)}; known: {', '.join(NAMES)}"
            raise DataError(f"--data {names}: unknown set '{name}'{known}")
    if len(set(parts)) < len(parts):
        raise DataError(f"--data {names}: a set is named twice")
    for cls in classes or ():
        if joined and cls.split("/")[0] not in parts:
            raise DataError(f"--classes {cls}: of joined sets it carries the set's name, as {parts[0]}/{cls}")
    dataset = Dataset(names, [], [], [])
    for name in parts:
        prefix, folder = "", Path(root or Path("data", name))
        if joined:
            prefix, folder = f"{name}/", Path(root or "data", name)
        own = [cls.removeprefix(prefix) for cls in classes or () if cls.startswith(prefix)]
        if own or not classes:
            try:
                part = load_one(name, folder.expanduser(), own, normals, log, prefix)
            except DataError as error:             # ends with what set it is about and where that can be had
                raise DataError(f"{name}: {error}; {SETS[name].source}") from None
            for into, more in zip(dataset[1:], part):
                into.extend(more)
    return dataset


def load_one(name, root, classes, normals, log, prefix):
    """The classes, training and test samples of one set; its classes and rows are called PREFIX + NAME."""
    def warn(who, what, files):
        if files:
            log(printable(f"warning: {who}: {what}: {len(files)} files, for example {files[0]}"))

    if name == "cifar10" and (not re.fullmatch("[0-9]{5}", normals) or len(set(normals)) < 5):
        raise DataError(f"--normals {normals}: expected five different digits, for example 01234")
    kind, (root, found, others) = SETS[name], locate(name, root)
    for cls in classes:
        if cls not in found:
            known = f"{nearest(cls, found)}; found: {', '.join(found)}"
            raise DataError(f"--classes {cls}: no such class in {root}{known}")
    chosen, train, test = [cls for cls in found if not classes or cls in classes], [], []
    for cls in chosen:
        files = list(walk(root, (cls,))) if os.path.isdir(root / cls) else []
        pairs = list(kind.samples(root, cls, files, **({"normals": normals} if name == "cifar10" else {})))
        if not pairs:
            raise DataError(f"no images of class '{cls}' in {root} (--classes says which classes to take)")
        owner, twice = {}, []          # mask -> the first image that has it
        for split, sample in pairs:
            into = train if split == "train" else test
            into.append(sample._replace(cls=prefix + sample.cls, row=prefix + sample.row))
            if sample.mask and owner.setdefault(sample.mask, sample.image) != sample.image:
                twice.append(f"{owner[sample.mask]} and {sample.image}")
        trained, bad = sum(split == "train" for split, _ in pairs), sum(sample.label for _, sample in pairs)
        log(printable(f"{prefix}{cls}: {trained} train, {len(pairs) - trained - bad} good, {bad} defective, "
                      f"{len(owner)} masks"))
        used = {*owner, *(sample.image for _, sample in pairs)}
        unused = [path for parts in files if (path := os.path.join(root, *parts)) not in used]
        warn(prefix + cls, "not used", unused)
        warn(prefix + cls, "images that share a mask", twice)
    warn(root, "not used, no part of a class", others)
    trained = {sample.cls for sample in train}
    for cls in chosen:
        if prefix + cls not in trained and name != "cifar10" and (train or "train" in folders_in(root / cls)):
            raise DataError(f"no train images of class '{cls}': looked in {root / cls / 'train'}")
    chosen = [prefix + cls for cls in chosen if name != "cifar10" or prefix + cls in trained]
    report_gaps(kind, root, chosen, test, log, warn)
    bad = sum(sample.label for sample in test)
    have = len(chosen), len(train), len(test) - bad, bad
    if not classes and kind.counts and not any(have[:len(count)] == count for count in kind.counts):
        words = "classes", "train", "good", "defective"
        had, full = (", ".join(map("{} {}".format, numbers, words)) for numbers in (have, kind.counts[0]))
        log(printable(f"warning: {name} in {root} has {had} images; a full copy has {full}"))
    return chosen, train, test


def locate(name, root):
    """The folder that holds the classes, their names, and the files beside them that look like data."""
    if name == "toy":
        return root, list(TOY), []
    if not os.path.isdir(root):
        raise DataError(f"no folder {root} (--root says where the data lies)")
    inside = [folder for folder in SETS[name].inside if os.path.isdir(root / folder)]
    if len(inside) > 1:
        raise DataError(f"{root} holds {' and '.join(inside)}: take one, as --root {root / inside[0]}")
    root = root / inside[0] if inside else root
    if name == "cifar10":
        return root, CIFAR10, []
    if "train" in folders_in(root):    # the root is a class itself
        root = Path(os.path.abspath(root))
        return root.parent, [root.name], []
    found = SETS[name].classes(root)
    return root, found, [os.path.join(root, *parts) for parts in walk(root, follow=False, skip=found)]


def report_gaps(kind, root, classes, test, log, warn):
    """Says what leaves a "-" in the table; a missing mask that is required and a class "mean" are errors."""
    tested, rows = {sample.cls for sample in test}, {}
    for sample in test:
        rows.setdefault(sample.row, []).append(sample)
    rows.update((cls, []) for cls in classes if cls not in tested)
    if "mean" in rows:
        raise DataError(f"{root}: a class cannot be called 'mean' as the table's last row; rename its folder")
    for row, samples in rows.items():
        missing = [name for label, name in enumerate(("good", "defective"))
                   if label not in {sample.label for sample in samples}]
        if missing:
            log(printable(f"warning: {row}: no {' and no '.join(missing)} test images: no metrics of it"))
        maskless = [Path(sample.image) for sample in samples if sample.label and not sample.mask]
        if maskless and kind.masks:
            stem, truth = maskless[0].stem, str(maskless[0].parent).replace("/test/", "/ground_truth/")
            raise DataError(f"no mask of {maskless[0]}: looked for {stem}_mask.* and {stem}.* in {truth}")
        if any(sample.mask for sample in test):
            warn(row, "defective images without a mask", maskless)


def hold_out(samples, share):
    """bool N: an even share of each class's samples, less than all, to be kept out of the training."""
    held, index = np.zeros(len(samples), bool), {}
    for i, sample in enumerate(samples):
        index.setdefault(sample.cls, []).append(i)
    for mine in index.values():
        count = min(round(share * len(mine)), len(mine) - 1)
        held[[mine[j * len(mine) // count] for j in range(count)]] = True
    return held


def listing(samples, root=None):
    """A line per sample, a name and the file's size: the same wherever the same files lie.

    Names are taken below the deepest folder that holds all files, whichever folder was given as root.
    """
    files = {sample.image for sample in samples if os.path.isfile(sample.image)}
    base = os.path.dirname(os.path.commonprefix(list(files))) or "."
    return [printable(f"{os.path.relpath(name, base)} {os.path.getsize(name)}") if name in files
            else name.rpartition("cifar-10-batches-py/")[2] for name in (sample.image for sample in samples)]


def nearest(name, known):
    match = difflib.get_close_matches(name, known, 1)
    return f", did you mean '{match[0]}'?" if match else ""


# ---------------------------------------------------------------------------------------------------------
# Reading images and masks

BATCH_IMAGE = re.compile(r"(.*(?:data_batch_\d|test_batch))#(\d+)", re.DOTALL)    # "FILE#INDEX" of CIFAR-10
MAX_PIXELS = 400_000_000               # line scans are that large; a file of a few bytes may claim more
Image.MAX_IMAGE_PIXELS = None          # Pillow's own, lower limit; opened() has ours
SOFTWARE = "mint-minimax-ad"           # the text chunk "Software" of the pictures that this program writes


@contextlib.contextmanager
def opened(name):
    """The file as a Pillow image, not decoded yet; what goes wrong in the block is a DataError too."""
    try:
        if not stat.S_ISREG(os.stat(name).st_mode):               # a pipe would wait for ever
            raise DataError(f"cannot read image {name}: not a regular file")
        with Image.open(name) as image:
            if math.prod(image.size) > MAX_PIXELS:
                raise DataError(f"cannot read image {name}: {image.width} x {image.height} pixels, over the "
                                f"limit of {MAX_PIXELS}; cut it into parts")
            yield image
    except DataError:
        raise
    except Exception as error:         # Pillow's readers raise anything on a damaged file
        raise DataError(f"cannot read image {name}: {reason(error)}") from None


def read_image(name):
    """Any image as an RGB Pillow image, upright by its EXIF orientation, alpha dropped, see to_bytes().

    Raises DataError on a file that is missing, truncated, no image, too large, or of an unclear scale.
    """
    if name.startswith("toy:"):
        return Image.fromarray(toy_image(name)[0])
    if batch := BATCH_IMAGE.fullmatch(name):
        root, file = os.path.split(batch[1])
        if file == "test_batch":
            return Image.fromarray(cifar10_arrays(root, "test")[0][int(batch[2])])
        return Image.fromarray(cifar10_arrays(root, "train")[0][(int(file[-1]) - 1) * BATCH + int(batch[2])])
    with opened(name) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):
            image = to_bytes(image, name)
        if image.mode == "P":          # it may hold transparency
            image = image.convert("RGBA")
        return image.convert("RGB")


def to_bytes(image, name):
    """Integers of 0..65535 and floats of 0..1 or 0..255 as 8 bit. Raises DataError naming any other range.

    The scale must not depend on how bright an image of a set happens to be. So values below a sixteenth of
    the range (12 bit data in a 16 bit file, floats of 0..10) are refused, not stretched; a file cannot tell.
    """
    values = np.asarray(image).astype(np.float32)
    low, high = values.min(), values.max()                        # nan if any value is
    limit = 65535 if image.mode != "F" else 1 if high <= 1 else 255
    if not 0 <= low <= high <= limit or limit > 1 and 0 < high < limit / 16:
        raise DataError(f"cannot tell the scale of image {name}: its values go from {low:g} to {high:g}, not "
                        "0 to 65535, or floats of 0 to 1 or 0 to 255; save the whole set as 8 bit")
    return Image.fromarray((values * (255 / limit) + 0.5).astype(np.uint8))


GREY, ALPHA, EMPTY, MOST, ASPECT = 1, 2, 4, 8, 16       # what is odd about a mask, as bits of a byte
NOTES = {GREY: "note: {}: masks of many grey values, which are defect from half their maximum on",
         ALPHA: "warning: {}: masks in the alpha channel only, read from there",
         EMPTY: "warning: {}: empty masks of defective images",
         MOST: "warning: {}: every mask covers most of its image; if black means defect, invert them",
         ASPECT: "warning: {}: masks of another aspect ratio than their image"}


def read_mask(name):
    """bool H x W at the file's own size, see mask_and_notes(). Raises DataError as read_image."""
    return mask_and_notes(name)[0]


def mask_and_notes(name, image=None):
    """bool H x W, and what is odd about it as bits. image: the name of its image, to compare aspect ratios.

    Channels reduce by their maximum, a palette counts by its colours. A label map (few values, or small ones)
    is defect wherever it is not 0; a mask of many greys was smoothed or a JPEG once: from half the maximum.
    """
    if name.startswith("toy:"):
        return toy_image(name)[1], 0
    notes = 0
    with opened(name) as file:
        ImageOps.exif_transpose(file, in_place=True)
        if file.mode != "L" and file.mode[0] not in "1IF":
            file = file.convert("RGBA")
        values = np.asarray(file)
        if values.ndim == 3:
            colours, values, alpha = values[..., :3], values[..., :3].max(-1), values[..., 3]
            if (colours == colours[0, 0]).all() and alpha.min() < alpha.max():
                values, notes = alpha, ALPHA
    if not np.isfinite(values).all():
        raise DataError(f"cannot use mask {name}: it has values that are not finite")
    mask = values != 0
    levels = np.unique(values[mask])
    if len(levels) > 8 and (levels[-1] >= 128 or values.dtype.kind == "f"):
        mask, notes = values >= levels[-1] / 2, notes | GREY
    notes |= EMPTY * (not mask.any()) | MOST * (mask.mean() > 0.5)
    if image:
        with opened(image) as file:
            width, height = file.size
            if file.getexif().get(0x0112, 1) >= 5:                # EXIF orientation: lying on its side
                width, height = height, width
        ratio = mask.shape[1] * height / (mask.shape[0] * width)
        notes |= ASPECT * (not 0.98 < ratio < 1.02)
    return mask, int(notes)


def mask_lines(samples, notes):
    """The lines that say what is odd about the masks of each class, from the bits of each sample: N."""
    index = {}
    for i, sample in enumerate(samples):
        if sample.mask:
            index.setdefault(sample.cls, []).append(i)
    for cls, mine in index.items():
        for bit, text in NOTES.items():
            found = [i for i in mine if notes[i] & bit]
            if found and (bit != MOST or len(found) == len(mine)):
                example = samples[found[0]].mask
                yield printable(f"{text.format(cls)}: {len(found)} of {len(mine)}, for example {example}")


def find_images(patterns):
    """Files, folders (with subfolders; links to folders are not followed), globs -> paths in natural order.

    Folders and globs yield no hidden files and none of the program's own pictures. Raises DataError for a
    pattern without an image.
    """
    found = {}                         # as an ordered set: overlapping patterns name a file once
    for pattern in patterns:
        matches = []
        named = [pattern]
        if not os.path.lexists(pattern):
            named = sorted(glob.glob(pattern, recursive=True), key=natural)
        for path in named:
            if not os.path.isdir(path):
                matches.append(path)
            elif path == pattern or os.path.basename(path) not in JUNK:
                matches += [os.path.join(path, *parts) for parts in walk(path, follow=False)]
        matches = [path for path in matches if path == pattern or is_image(path) and not is_own(path)]
        if not matches:
            raise DataError(f"no image at {pattern}: expected an image file, a folder of images or a glob")
        found.update(dict.fromkeys(matches))
    return list(found)


def is_own(path):                      # a picture that this program wrote
    with contextlib.suppress(DataError), opened(path) as image:
        return image.info.get("Software") == SOFTWARE


# ---------------------------------------------------------------------------------------------------------
# Decoding, and the cache of decoded images

CACHE_VERSION = 2                      # part of the key: to be raised when the decoded bytes change
CHUNK = 16                             # images per task


def decode(samples, size, crop=None, masks=False, cache=None, workers=None, name="",
           progress=True, log=print):
    """The samples' images or masks, resized to size x size, then the central crop x crop (S = crop or size).

    Returns uint8 N x S x S x 3 (RGB, bilinear; CIFAR-10 Lanczos, as UniAD), or with masks bool N x S x S
    (nearest; zeros without a mask): in memory, or with cache=DIR memory-mapped, read-only, from a file
    that is used again while the files and all that shapes the pixels are the same, built anew when damaged.
    workers: threads, default all cores. log: called with a line per class and oddity of its masks.
    Raises DataError: unreadable image, full disk, folder that cannot be written.
    """
    shape = (len(samples), crop or size, crop or size) + (() if masks else (3,))
    settings = {"size": size, "crop": crop, "masks": masks}
    with contextlib.closing(decoded(samples, settings, workers, name, progress)) as chunks:
        if cache is None or not samples:
            array, notes = np.empty(shape, bool if masks else np.uint8), bytearray()
            for pixels, more in chunks:
                array[len(notes):len(notes) + len(more)] = pixels
                notes += more
        else:
            array, notes = cached(cache, samples, settings, shape, chunks, log)
    for line in mask_lines(samples, notes):
        log(line)
    return array


def cached(folder, samples, settings, shape, chunks, log):
    """Pixels (memory-mapped) and notes from the cache file of these samples, which is written if need be.

    It holds the pixels, a byte of notes per sample and the CRC-32 of both; its name digests its sources.
    """
    files = [(fingerprint(s.image), settings["masks"] and fingerprint(s.mask)) for s in samples]
    key = hashlib.sha256(json.dumps([CACHE_VERSION, settings, files]).encode()).hexdigest()[:32]
    path = Path(folder, f"decoded-{shape[1]}-{key}.bin")
    length = math.prod(shape) + len(samples)
    try:
        if path.exists() and not intact(path, length):
            log(f"note: {path} is damaged: building it anew")
            path.unlink()
        if not path.exists():
            os.makedirs(folder, exist_ok=True)
            with atomic(path) as temporary, open(temporary, "wb") as file:
                crc, notes = 0, bytearray()
                for pixels, more in chunks:
                    file.write(pixels)
                    crc = zlib.crc32(pixels, crc)
                    notes += more
                file.write(notes + zlib.crc32(notes, crc).to_bytes(4, "little"))
        pixels = np.memmap(path, bool if len(shape) == 3 else np.uint8, "r", 0, shape)
        return pixels, np.fromfile(path, np.uint8, len(samples), offset=math.prod(shape))
    except OSError as error:
        raise DataError(f"cannot keep {length / 1e9:.2f} GB of decoded images in {folder}: {reason(error)}; "
                        "name another folder with --cache DIR, or --cache none") from None


def intact(path, length):
    if os.path.getsize(path) != length + 4:
        return False
    content = np.memmap(path, np.uint8, "r")
    return zlib.crc32(content[:-4]) == int.from_bytes(content[-4:], "little")


def fingerprint(name):
    """What changes when an image file does: path, size, times (a copy may keep one of them) and inode."""
    if name is None or name.startswith("toy:"):
        return name
    try:
        batch = BATCH_IMAGE.fullmatch(name)
        found = os.stat(batch[1] if batch else name)
        return os.path.abspath(name), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
    except OSError as error:
        raise DataError(f"cannot read image {name}: {reason(error)}") from None


def decoded(samples, settings, workers, name, progress):
    """Yields (pixels, notes) chunk by chunk; from threads, as Pillow decodes and resizes without the GIL."""
    work = functools.partial(decode_chunk, **settings)
    chunks = [samples[i:i + CHUNK] for i in range(0, len(samples), CHUNK)]
    bar = tqdm(total=len(samples), desc=f"decoding {name}", unit="image", disable=None if progress else True)
    with bar, ThreadPoolExecutor(1 if workers == 0 else workers) as pool:
        try:
            for pixels, notes in pool.map(work, chunks):
                yield pixels, notes
                bar.update(len(pixels))
        finally:                       # after an error or an interrupt the rest is not decoded first
            pool.shutdown(cancel_futures=True)


def decode_chunk(samples, size, crop, masks):
    """uint8 n x S x S x 3 or bool n x S x S, and n bytes of notes."""
    arrays, notes = [], bytearray()
    edge = round((size - (crop or size)) / 2)
    for sample in samples:
        note, method = 0, Image.Resampling.BILINEAR
        if masks:
            mask = np.zeros((size, size), bool)
            if sample.mask:
                mask, note = mask_and_notes(sample.mask, sample.image)
            image, method = Image.fromarray(mask), Image.Resampling.NEAREST
        else:
            image = read_image(sample.image)
            if BATCH_IMAGE.fullmatch(sample.image):
                method = Image.Resampling.LANCZOS
        image = image.resize((size, size), method)
        arrays.append(np.asarray(image.crop((edge, edge, edge + (crop or size), edge + (crop or size)))))
        notes.append(note)
    return np.stack(arrays), notes


# ---------------------------------------------------------------------------------------------------------
# Files written as a whole or not at all

PARTIAL = re.compile(r"\.partial-\d+-[0-9a-f]{8}-.*", re.DOTALL)


@contextlib.contextmanager
def atomic(path):
    """Yields a temporary path beside path, of its suffix; renamed to path at success, removed on error."""
    folder, name = os.path.split(path)
    start = f".partial-{os.getpid()}-{secrets.token_hex(4)}-"
    name = os.fsencode(name)[len(start) - 255:].decode(errors="ignore")        # file systems take 255 bytes
    temporary = os.path.join(folder, start + name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())    # or a power failure could leave the new name with an empty file
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def remove_partial(folder):
    """Removes what an atomic() that was killed has left in the folder, and no other file."""
    for path in Path(folder).iterdir():
        if PARTIAL.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------
# The toy set: two textures and two objects, drawn from a seed that is the image's name

TOY = {"weave": ["blotch", "scratch", "stain"], "granite": ["blotch", "scratch", "stain"],
       "flange": ["missing", "scratch", "stain"], "pill": ["missing", "blotch", "stain"]}
SCRATCH = {"weave": (250, 250, 250), "granite": (25, 25, 30), "flange": (190, 70, 20)}


def toy_image(name):
    """"toy:CLASS/SPLIT/DEFECT/INDEX" -> uint8 128 x 128 x 3, and bool 128 x 128, where its defect is."""
    cls, _, defect, _ = name[len("toy:"):].split("/")
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    y, x = np.mgrid[:128, :128] - 63.5
    angle, dx, dy = rng.uniform((-0.06, -2, -2), (0.06, 2, 2))
    u = (x - dx) * np.cos(angle) + (y - dy) * np.sin(angle)
    v = (y - dy) * np.cos(angle) - (x - dx) * np.sin(angle)
    part = np.full((128, 128), -9.0)   # signed distance to the object's outline; a texture fills the image
    ground = np.zeros((128, 128, 3))

    def cover(distance):               # 1 inside, 0 outside, smooth over a pixel
        return np.clip(0.5 - distance, 0, 1)[..., None]

    if cls == "weave":
        s, t = u / 12 + rng.random(), v / 12 + rng.random()
        over = (np.floor(s) + np.floor(t)) % 2 == 0
        thread = 1 - np.abs(np.where(over, s, t) % 1 - 0.5)
        image = thread[..., None] * np.where(over[..., None], (225, 190, 140), (190, 150, 105))
    elif cls == "granite":
        grain = rng.random((66, 66)).repeat(2, 0).repeat(2, 1)
        grain = sum(grain[i:i + 128, j:j + 128] for i in range(3) for j in range(3)) / 9
        image = (110 + 110 * grain + 30 * rng.random((128, 128)))[..., None] * (1, 0.98, 0.95)
    elif cls == "flange":
        bolts = [(32 * np.cos(k * np.pi / 3), 32 * np.sin(k * np.pi / 3), 6) for k in range(6)]
        holes = [r - np.hypot(u - a, v - b) for a, b, r in [(0, 0, 14), *bolts]]
        part = np.maximum.reduce([np.hypot(u, v) - 46, *holes])
        ground[:] = 52, 58, 66
        image = (175 + 0.5 * u - 0.3 * v)[..., None] * (1, 1, 1.03)
    else:
        part = np.hypot(u - u.clip(-28, 28), v) - 22
        ground[:] = 214, 212, 205
        image = np.where((u < 0)[..., None], (200, 60, 50), (240, 225, 150)) * (1 - (v / 36) ** 2)[..., None]
    image = ground + (image - ground) * cover(part)

    mask = np.zeros((128, 128, 1))
    if defect == "missing":            # a bite at the edge of the object
        side = rng.choice([-1, 1])
        a, b, radius = (rng.uniform(-15, 15), 22 * side, 17) if cls == "pill" else (0, 44 * side, 21)
        bite = np.hypot(u - a, v - b) - radius
        mask, image = cover(np.maximum(bite, part)), image + (ground - image) * cover(bite)
    elif defect != "good":
        a, b = rng.uniform(-1, 1, 2) * {"pill": (24, 6)}.get(cls, (38, 38))
        if cls == "flange":            # on its ring
            a, b = np.array((a, b)) / np.hypot(a, b) * 28
        colour = {"blotch": (35, 25, 25), "stain": (30, 80, 220), "scratch": SCRATCH.get(cls)}[defect]
        if defect == "scratch":        # a line with round ends
            p, q = rng.uniform(10, 22) * rng.choice([-1, 1]), rng.uniform(10, 22)
            t = np.clip(((x - a) * p + (y - b) * q) / (p * p + q * q), -1, 1)
            shape = np.hypot(x - a - t * p, y - b - t * q) - 3
        elif defect == "blotch":
            discs = rng.uniform((-9, -9, 8), (9, 9, 12), (4, 3))
            shape = np.minimum.reduce([np.hypot(x - a - p, y - b - q) - r for p, q, r in discs])
        else:
            shape = np.hypot(x - a, y - b) - rng.uniform(12, 15)
        mask = cover(np.maximum(shape, part)) * 0.9
        image = image + (colour - image) * mask
    image = image * rng.uniform(0.97, 1.03) + rng.uniform(-3, 3, image.shape)
    return image.clip(0, 255).round().astype(np.uint8), mask[..., 0] > 0.45
