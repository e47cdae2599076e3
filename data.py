"""Every data set: where its images and masks lie, how they are read, the cache; a run's files and messages.

    load("mvtec", "data/mvtec")          which images train and test, their labels and masks
    decode(samples, 224, cache="cache")  their pixels, uint8 N x 224 x 224 x 3, decoded once

A set is one short function below and one line of SETS. Label 1 means defective and comes from the folder or
the csv, never from the mask: a defect that resizing removes from the mask still makes a defective image.
"""
import argparse
import contextlib
import csv
import difflib
import glob
import hashlib
import os
import re
import sys
import zlib
from collections import Counter, namedtuple
from functools import lru_cache, partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import safetensors.torch
import timm
import torch
from PIL import Image, ImageOps
from torchvision import datasets
from torchvision.transforms.functional import center_crop
from tqdm import tqdm

RANK = int(os.environ.get("RANK", 0))  # set by torchrun; process 0 speaks and writes
WORLD, LOCAL_RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
LOG = []                               # the run's log.txt, once claim() has opened it

class DataError(Exception):
    """One line for the user: what is wrong, with which file or option, and what to do."""
    def __str__(self):
        return printable(super().__str__())

def printable(text):
    """One line of valid UTF-8: a file name may hold line breaks, and bytes on which print would fail."""
    return " ".join(text.splitlines()).encode("utf-8", "backslashreplace").decode()

@contextlib.contextmanager
def explain(text, *errors, hint=""):
    """An error in the block, of these classes or any, becomes a DataError: the text, its reason, the hint."""
    try:
        yield
    except DataError:
        raise
    except errors or Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError("; ".join(filter(None, [f"{text}: {reason[:200]}", hint]))) from None

def log(text):
    """A line to the screen and to the run's log.txt, by process 0 alone."""
    for file in (sys.stdout, *LOG) if RANK == 0 else ():
        tqdm.write(text.encode(errors="backslashreplace").decode(), file)     # a name need not be UTF-8
        file.flush()

def progress(iterable, name, count=None):
    """A bar in a terminal, after a second, and nothing in a file."""
    return tqdm(iterable, name, count, leave=False, disable=RANK > 0 or None, delay=1, dynamic_ncols=True)

class Sample(NamedTuple):
    image: str        # path; "cifar10:ROOT/SPLIT#INDEX"; "toy:CLASS/SPLIT/DEFECT/INDEX"
    label: int        # 0 good, 1 defective
    mask: str | None  # None: a good image, or a defective one whose mask is not known
    cls: str          # the class it trains as
    row: str          # the row of the table it counts in: the class, AeBAD's domain or CIFAR-10's split

Dataset = namedtuple("Dataset", "name classes train test")       # train, test: lists of Sample

# ---------------------------------------------------------------- the walk over a tree
# What Pillow opens, less the formats that it only recognises or hands to other programs
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN
            and kind not in ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")}
# What may hold images that are missed: photos that Pillow does not open, arrays, archives
OTHERS = set(".heic .heif .jxl .svg .raw .dng .cr2 .nef .arw .npy .npz .zip .tar .tgz .gz .7z .rar".split())
JUNK = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}

def walk(folder, follow=True, skip=(), above=()):
    """Yields the paths of what looks like data, images and OTHERS, below a folder, in natural order.
    follow: go into links to folders; a broken link is then an error. skip: subfolders to leave out."""
    here = Path(os.path.realpath(folder))
    above = above or tuple(here.parents)
    if here not in above:              # a link may lead to a folder that holds it
        for name, is_folder in entries(folder, follow):
            path = os.path.join(folder, name)
            if is_folder and name not in skip:
                yield from walk(path, follow, (), (*above, here))
            elif not is_folder and Path(name).suffix.lower() in SUFFIXES | OTHERS:
                yield path

def entries(folder, follow=True):
    """(name, whether it is a folder) in natural order (2 before 10), without hidden files and JUNK."""
    try:
        found = sorted(os.scandir(folder), key=lambda entry: natural(entry.name))
        return [(entry.name, entry.stat(follow_symlinks=follow) and entry.is_dir(follow_symlinks=follow))
                for entry in found if not entry.name.startswith(".") and entry.name not in JUNK]
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from None

def subfolders(root):
    return [name for name, is_folder in entries(root) if is_folder]

def natural(name):
    return [int(part) if i % 2 else part.casefold() for i, part in enumerate(re.split(r"(\d+)", name))], name

# ---------------------------------------------------------------- data sets
# A layout is a function, (root, class, files) -> ("train" or "test", Sample) for every image; files are what
# walk() found in root/CLASS. What a layout leaves over is named by load().

def mvtec(root, cls, files, good="good", domains=False):
    """CLASS/{train/good,test/good,test/DEFECT,ground_truth/DEFECT}/**, the folders in any case.
    domains: the folders below good and DEFECT are rows of the table."""
    images = {path: [part.casefold() for part in Path(path).relative_to(root / cls).parts[:-1]]
              for path in files if Path(path).suffix.lower() in SUFFIXES}
    beside = {os.path.splitext(path)[0] + "_mask" for path in images}     # masks may lie beside images
    masks = {}
    for path, folders in images.items():
        if folders[:1] == ["ground_truth"] or os.path.splitext(path)[0] in beside:
            masks.setdefault((*folders[1:], Path(path).stem.casefold()), []).append(path)
    for path, folders in images.items():
        if len(folders) > 1 + domains and os.path.splitext(path)[0] not in beside and \
                (folders[0] == "test" or folders[:2] == ["train", good]):
            mask = None if folders[1] == good else find_mask(masks, folders[1:], path)
            yield folders[0], Sample(path, int(folders[1] != good), mask, cls, folders[2] if domains else cls)

def find_mask(masks, folders, image):
    """An image's mask, STEM_mask.* or STEM.* in its folders or the first of them, or None.
    masks: {(*folders, stem): paths}, the keys in lower case."""
    stem = Path(image).stem
    for place in folders, folders[:1]:
        for name in stem + "_mask", stem:
            if found := masks.get((*place, name.casefold())):     # of several: the same case first, then png
                return min(found, key=lambda path: (Path(path).stem != name, not path.endswith(".png"), path))

def mvtec_classes(root):               # others, as results/, are none
    return [name for name in subfolders(root)
            if {"train", "test"} & {folder.casefold() for folder in subfolders(root / name)}]

def visa(root, cls, files):
    """Raw: split_csv/1cls.csv lists object, split, label, image, mask, below root. Prepared: as mvtec."""
    lines = visa_csv(root)
    if not lines:
        yield from mvtec(root, cls, files)
    for _, split, label, image, mask in (line for line in lines if line[0] == cls):
        mask = str(root / mask) if label == "anomaly" and mask else None
        yield split, Sample(str(root / image), int(label == "anomaly"), mask, cls, cls)

def visa_csv(root):
    """The lines (object, split, label, image, mask); none if there is no such file."""
    columns, path = ("object", "split", "label", "image", "mask"), root / "split_csv/1cls.csv"
    if not path.exists():
        return []
    with explain(f"cannot read {path}, columns {', '.join(columns)}"):
        lines = [tuple(line[column].strip().replace("\\", "/") for column in columns)
                 for line in csv.DictReader(path.read_text("utf-8-sig").split("\n"), restval="")]
    for line in lines:
        if line[1:3] not in (("train", "normal"), ("test", "normal"), ("test", "anomaly")):
            raise DataError(f"{path}: unknown split or label: {', '.join(line)}")
    return lines

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

def cifar10(root, cls, files, normals):
    """UniAD's protocol: five classes are normal and train, all ten test."""
    if not re.fullmatch("[0-9]{5}", normals) or len(set(normals)) < 5:
        raise DataError(f"--normals {normals}: expected five different digits, for example 01234")
    label = int(str(CIFAR10.index(cls)) not in normals)
    for split in ("train", "test")[label:]:
        for index in np.flatnonzero(cifar10_arrays(str(root), split)[1] == CIFAR10.index(cls)):
            yield split, Sample(f"cifar10:{root}/{split}#{index}", label, None, cls, normals)

@lru_cache(2)
def cifar10_arrays(root, split):
    """uint8 N x 32 x 32 x 3 and N labels of the train or test images of CIFAR-10's python version."""
    try:                               # it checks every file's MD5 before it unpickles
        part = datasets.CIFAR10(Path(root).resolve().parent, train=split == "train")
    except Exception:
        raise DataError(f"{root}: a file is missing or its MD5 wrong: get {datasets.CIFAR10.url}") from None
    return part.data, np.array(part.targets)

def toy(root, cls, files):
    """28 train, 10 good and 12 defective test images, drawn by toy_image()."""
    groups = ("train", "good", 28), ("test", "good", 10), *(("test", defect, 4) for defect in TOY[cls])
    for split, defect, count in groups:
        for name in (f"toy:{cls}/{split}/{defect}/{index:03d}" for index in range(count)):
            yield split, Sample(name, int(defect != "good"), None if defect == "good" else name, cls, cls)

class Set(NamedTuple):
    samples: Callable                   # a layout
    source: str                         # where it can be had, or its layout; ends every error
    counts: tuple = ()                  # of full copies: classes, train, good, defective
    inside: tuple = ()                  # folders that the root may hold instead of being one
    classes: Callable = mvtec_classes   # root -> names
    masks: bool = True                  # whether a defective image without one is an error

SETS = {
    "mvtec": Set(mvtec, "https://www.mvtec.com/company/research/datasets/mvtec-ad", [(15, 3629, 467, 1258)]),
    "visa": Set(visa, "https://github.com/amazon-science/spot-diff", [(12, 8659, 962, 1200)], ["1cls"],
                lambda root: list(dict.fromkeys(line[0] for line in visa_csv(root))) or mvtec_classes(root)),
    "btad": Set(partial(mvtec, good="ok"), "https://github.com/pankajmishra000/VT-ADL",
                [(3, 1799, 451, 290)]),
    "goodsad": Set(mvtec, "https://github.com/jianzhang96/GoodsAD", [(6, 3136, 1328, 1660)]),
    "mad": Set(mvtec, "https://github.com/EricLee0224/PAD", [(20,), (10,)], ["MAD-Sim", "MAD-Real"]),
    "aebad": Set(partial(mvtec, domains=True), "https://github.com/zhangzilongc/MMR", [(1, 521, 490, 1149)],
                 ["AeBAD_S"]),
    "cifar10": Set(cifar10, "https://www.cs.toronto.edu/~kriz/cifar.html (python version)",
                   [(5, 25000, 5000, 5000)], ["cifar-10-batches-py"], lambda root: CIFAR10, masks=False),
    "folder": Set(mvtec, "ROOT/CLASS/{train/good,test/good,test/DEFECT,ground_truth/DEFECT}", masks=False),
    "toy": Set(toy, "data.py"),
}

def load(names, root=None, classes=None, normals="01234", log=log):
    """Lists the images of a set, or of several joined by "+", whose classes are then called "set/class".
    root: where the set lies, default data/NAME; of joined sets what holds a folder per set, default data.
    classes: a subset. normals: the digits of CIFAR-10's five normal classes. log: called with a line per
    class and per warning ("warning: .."). train or test may be empty. Raises DataError."""
    parts, found = names.split("+"), []
    for name in sorted(set(parts) - set(SETS)):
        raise DataError(f"--data {names}: unknown set '{name}'{nearest(name, SETS)}")
    if len(set(parts)) < len(parts) or parts[1:] and "cifar10" in parts:
        raise DataError(f"--data {names}: a set is named twice, or cifar10 is joined with another")
    for name in parts:
        prefix = f"{name}/" * (len(parts) > 1)
        folder = Path(root or "data", name) if prefix or not root else Path(root)
        try:
            found.append(load_one(name, folder.expanduser(), classes, normals, prefix, log))
        except DataError as error:
            raise DataError(f"{name}: {error}; see {SETS[name].source}") from None
    known, *lists = (sum(each, []) for each in zip(*found))
    for cls in sorted(set(classes or ()) - set(known)):
        raise DataError(f"--classes {cls}: no such class{nearest(cls, known)}")
    return Dataset(names, *lists)

def load_one(name, root, classes, normals, prefix, log):
    """One set's classes, those asked for, and their training and test samples; a prefix begins all names."""
    def warn(who, what, files):
        if files:
            log(printable(f"warning: {who}: {what}: {len(files)} files, for example {files[0]}"))

    kind, (root, found, others) = SETS[name], locate(name, root)
    layout = partial(cifar10, normals=normals) if name == "cifar10" else kind.samples
    chosen = [cls for cls in found if not classes or prefix + cls in classes]
    train, test = [], []
    for cls in chosen:
        files = list(walk(root / cls)) if os.path.isdir(root / cls) else []
        pairs = [(split, sample._replace(cls=prefix + sample.cls, row=prefix + sample.row))
                 for split, sample in layout(root, cls, files)]
        if not pairs:
            raise DataError(f"no images of class '{cls}' in {root} (--classes says which classes to take)")
        train += [sample for split, sample in pairs if split == "train"]
        test += [sample for split, sample in pairs if split == "test"]
        count = Counter((split, sample.label) for split, sample in pairs)
        masks = Counter(sample.mask for _, sample in pairs if sample.mask)
        log(printable(f"{prefix}{cls}: {count['train', 0]} train, {count['test', 0]} good, "
                      f"{count['test', 1]} defective, {len(masks)} masks"))
        if not count["test", 0] + count["test", 1]:
            log(printable(f"warning: {prefix}{cls}: no test images, so no row in the table"))
        used = {*masks, *(sample.image for _, sample in pairs)}
        warn(prefix + cls, "not used", [path for path in files if path not in used])
        warn(prefix + cls, "images that share a mask", [s.image for _, s in pairs if masks[s.mask] > 1])
    warn(root, "not used, no part of a class", others)
    if "mean" in {sample.row for sample in train + test}:
        raise DataError(f"{root}: a class cannot be called 'mean' as the table's last row; rename its folder")
    bare = [sample for sample in test if sample.label and not sample.mask]
    if bare and kind.masks:
        truth = Path(bare[0].image.replace("/test/", "/ground_truth/"))
        raise DataError(f"no mask of {bare[0].image}: looked for {truth.with_suffix('')}[_mask].*")
    for cls in dict.fromkeys(sample.cls for sample in bare) if any(sample.mask for sample in test) else ():
        warn(cls, "defective images without a mask", [sample.image for sample in bare if sample.cls == cls])
    trained = {sample.cls for sample in train}
    untrained = [cls for cls in chosen
                 if prefix + cls not in trained and (train or os.path.isdir(root / cls / "train"))]
    if untrained and name != "cifar10":                # its anomalous classes only test
        raise DataError(f"no train images of class '{untrained[0]}' in {root / untrained[0] / 'train'}")
    chosen = [cls for cls in chosen if cls not in untrained]
    have = len(chosen), len(train), sum(not s.label for s in test), sum(s.label for s in test)
    if not classes and kind.counts and not any(have[:len(count)] == count for count in kind.counts):
        log(f"warning: {name}: classes, train, good, defective {have}; a full copy {kind.counts[0]}")
    return [prefix + cls for cls in found], [prefix + cls for cls in chosen], train, test

def locate(name, root):
    """The folder that holds the classes, their names, and the files beside them that look like data."""
    if name == "toy":
        return root, list(TOY), []
    if not os.path.isdir(root):
        raise DataError(f"no folder {root} (--root says where the data lies)")
    inside = [folder for folder in SETS[name].inside if os.path.isdir(root / folder)]
    if len(inside) > 1:
        raise DataError(f"{root} holds {' and '.join(inside)}: take one, as --root {root / inside[0]}")
    root = Path(root, *inside)
    if "train" in map(str.casefold, subfolders(root)):            # the root is a class itself
        root = Path(os.path.abspath(root))
        return root.parent, [root.name], []
    found = SETS[name].classes(root)
    if not found:
        raise DataError(f"no images in {root}: looked for CLASS/train/good and CLASS/test in it")
    return root, found, list(walk(root, follow=False, skip=found))

def nearest(name, known):
    match = difflib.get_close_matches(name, known, 1)
    listed = f"; known: {', '.join(known)}" if len(known) < 100 else ""        # timm has 1,300 names
    return "".join(f", did you mean '{other}'?" for other in match) + listed

def listing(samples):
    """A line per sample: its path below the deepest folder that holds all, whatever root is, and its size."""
    files = {sample.image for sample in samples if os.path.isfile(sample.image)}
    base = os.path.dirname(os.path.commonprefix(list(files))) or "."
    return [printable(f"{os.path.relpath(name, base)} {os.path.getsize(name)}") if name in files
            else name.rpartition("cifar-10-batches-py/")[2] for name in (sample.image for sample in samples)]

# ---------------------------------------------------------------- reading images and masks
Image.MAX_IMAGE_PIXELS = 200_000_000   # Pillow refuses twice as many; line scans are that large
SOFTWARE = "mint-minimax-ad"           # the text chunk "Software" of the pictures that this program writes

@contextlib.contextmanager
def opened(name):
    """The file as a Pillow image, not decoded yet; what goes wrong in the block is a DataError too."""
    with explain(f"cannot read image {name}"):         # Pillow's readers raise anything on a damaged file
        if os.path.exists(name) and not os.path.isfile(name):     # a pipe would wait for ever
            raise OSError("not a regular file")
        with Image.open(name) as image:
            yield image

def read_image(name):
    """Any image as an RGB Pillow image, upright by its EXIF orientation, alpha dropped.
    Integers of 0..65535 and floats of 0..1 or 0..255 are scaled to 8 bit. Raises DataError on a file that is
    missing, truncated, no image, too large, or of any other range, which it names."""
    if name.startswith("toy:"):
        return Image.fromarray(toy_image(name)[0])
    if name.startswith("cifar10:"):
        file, _, index = name.removeprefix("cifar10:").rpartition("#")
        return Image.fromarray(cifar10_arrays(*os.path.split(file))[0][int(index)])
    with opened(name) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):
            # The scale must not depend on how bright an image is: values below a sixteenth of the range (12
            # bit data in a 16 bit file, floats of 0..10) are refused, not stretched; a file cannot tell.
            values = np.asarray(image).astype(np.float32)
            low, high = values.min(), values.max()                # nan if any value is
            limit = 65535 if image.mode != "F" else 1 if high <= 1 else 255
            if not 0 <= low <= high <= limit or limit > 1 and 0 < high < limit / 16:
                raise ValueError(f"its scale is unclear, values of {low:g} to {high:g}, not 0 to 65535, or "
                                 "floats of 0 to 1 or 0 to 255; save the whole set as 8 bit")
            image = Image.fromarray((values * (255 / limit) + 0.5).astype(np.uint8))
        return image.convert("RGBA" if image.mode == "P" else "RGB").convert("RGB")   # P: with transparency

NOTES = ("note: {}: masks of many grey values, which are defect from half their maximum on",
         "warning: {}: masks in the alpha channel only, read from there",
         "warning: {}: empty masks of defective images",
         "warning: {}: every mask covers most of its image; if black means defect, invert them")

def read_mask(name):
    """bool H x W at the file's own size, and of each of NOTES whether it holds. DataError as read_image.
    Channels reduce by their maximum, a palette counts by its colours. A label map (few values, or small ones)
    is defect wherever it is not 0; a mask of many greys was smoothed or a JPEG: from half the maximum on."""
    if name.startswith("toy:"):
        return toy_image(name)[1], [False] * len(NOTES)
    in_alpha = False
    with opened(name) as file:
        ImageOps.exif_transpose(file, in_place=True)
        if file.mode != "L" and file.mode[0] not in "1IF":
            file = file.convert("RGBA")
        values = np.asarray(file)
        if values.ndim == 3:
            colours, alpha = values[..., :3], values[..., 3]
            in_alpha = (colours == colours[0, 0]).all() and alpha.min() < alpha.max()
            values = alpha if in_alpha else colours.max(-1)
    mask = values != 0
    levels = np.unique(values[mask])
    many_greys = len(levels) > 8 and (levels[-1] >= 128 or values.dtype.kind == "f")
    if many_greys:
        mask = values >= levels[-1] / 2
    return mask, list(map(bool, (many_greys, in_alpha, not mask.any(), mask.mean() > 0.5)))

def find_images(patterns):
    """Files, folders (with subfolders; links to folders are not followed), globs -> paths in natural order.
    Folders and globs yield no hidden files and none of the program's own pictures. DataError: no image."""
    found = {}                         # as an ordered set: overlapping patterns name a file once
    for pattern in patterns:
        paths, named = [], [pattern] if os.path.lexists(pattern) else glob.glob(pattern, recursive=True)
        for path in sorted(named, key=natural):
            is_folder = os.path.isdir(path) and (path == pattern or os.path.basename(path) not in JUNK)
            paths += walk(path, follow=False) if is_folder else [path]
        paths = [path for path in paths if path == pattern
                 or Path(path).suffix.lower() in SUFFIXES and not is_own(path)]
        if not paths:
            raise DataError(f"no image at {pattern}: expected an image file, a folder of images or a glob")
        found.update(dict.fromkeys(paths))
    return list(found)

def is_own(path):                      # a picture that this program wrote
    with contextlib.suppress(DataError), opened(path) as image:
        return image.info.get("Software") == SOFTWARE

# ---------------------------------------------------------------- decoding, and the cache of decoded images
def decode(samples, size, crop=None, masks=False, cache=None, workers=None, name="", log=log):
    """The samples' images or masks, resized to size x size, then the central crop x crop (S = crop or size).
    Returns uint8 N x S x S x 3 (RGB, bilinear; CIFAR-10 Lanczos, as UniAD), or with masks bool N x S x S
    (nearest; zeros without a mask): in memory, or with cache=DIR memory-mapped, read-only, from a file that
    is used again while the files and all that shapes the pixels are the same. workers: threads. log: called
    with a line per class and oddity of its masks. DataError: an unreadable image, a cache not to be written.
    """
    side, settings = crop or size, {"size": size, "crop": crop, "masks": masks}
    record = np.dtype([("pixels", bool if masks else np.uint8, (side, side) if masks else (side, side, 3)),
                       ("notes", bool, len(NOTES))])

    def decoded():                     # in threads: Pillow decodes and resizes without the GIL
        with ThreadPool(workers) as pool:
            results = pool.imap(partial(decode_one, **settings), samples)
            yield from progress(results, f"decoding {name}", len(samples))

    with contextlib.closing(decoded()) as images:      # so that an error ends the threads' work too
        if cache is None or not samples:
            table = np.fromiter(images, record, len(samples))
        else:
            table = cached(cache, samples, settings, record, images, log)
    for cls in dict.fromkeys(sample.cls for sample in samples if sample.mask):
        mine = [i for i, sample in enumerate(samples) if sample.mask and sample.cls == cls]
        for text, odd in zip(NOTES, table["notes"][mine].T):
            if odd.all() or odd.any() and "every mask" not in text:
                example = samples[mine[odd.argmax()]].mask
                log(printable(f"{text.format(cls)}: {odd.sum()} of {len(mine)}, for example {example}"))
    return table["pixels"]

def to_device(images, device):
    """uint8 N x S x S x 3 -> float N x 3 x S x S in 0..1."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255

def decode_one(sample, size, crop, masks):
    """uint8 S x S x 3 or bool S x S, and its notes."""
    notes = [False] * len(NOTES)
    if masks:
        mask = np.zeros((size, size), bool)
        if sample.mask:
            mask, notes = read_mask(sample.mask)
        image, method = Image.fromarray(mask), Image.Resampling.NEAREST
    else:
        image, is_cifar = read_image(sample.image), sample.image.startswith("cifar10:")
        method = Image.Resampling.LANCZOS if is_cifar else Image.Resampling.BILINEAR
    return np.asarray(center_crop(image.resize((size, size), method), crop or size)), notes

def cached(folder, samples, settings, record, images, log):
    """The records (pixels, notes) of these samples, memory-mapped from their cache file, written if need be.
    It holds the records and their CRC-32; its name digests its sources."""
    files = [(fingerprint(s.image), settings["masks"] and s.mask and fingerprint(s.mask)) for s in samples]
    key = hashlib.sha256(repr((4, settings, files)).encode()).hexdigest()[:32]      # 4: version of the bytes
    path, size = Path(folder, f"decoded-{settings['size']}-{key}.bin"), len(samples) * record.itemsize
    with contextlib.suppress(OSError):                 # no such file yet
        content = np.memmap(path, mode="r") if os.path.getsize(path) == size + 4 else b""
        if zlib.crc32(content) == zlib.crc32(bytes(4)):           # as of all that ends with its CRC-32
            return np.memmap(path, record, "r", shape=len(samples))
        log(f"note: {path} is damaged: building it anew")
    with atomic(path, f"{size / 1e9:.2f} GB; name another folder: --cache DIR, or --cache none") as temporary:
        os.makedirs(folder, exist_ok=True)
        with open(temporary, "wb") as file:
            crc = 0
            for pixels, notes in images:
                block = pixels.tobytes() + bytes(notes)
                file.write(block)
                crc = zlib.crc32(block, crc)
            file.write(crc.to_bytes(4, "little"))
    return np.memmap(path, record, "r", shape=len(samples))

def fingerprint(name):
    """What changes when an image file does: path, size, times (a copy may keep one of them) and inode."""
    if not os.path.exists(name):       # toy, CIFAR-10 (of known MD5); of others the reader says what is wrong
        return name
    found = os.stat(name)
    return os.path.abspath(name), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino

# ---------------------------------------------------------------- files of a run
@contextlib.contextmanager
def atomic(path, hint=""):
    """Yields a temporary path beside path, of its suffix; renamed to path at success, removed on error.
    An OSError or a RuntimeError (torch.save on a full disk) becomes a DataError, which ends with the hint."""
    temporary = str(Path(path).parent / f".partial-{os.getpid()}-{os.urandom(4).hex()}{Path(path).suffix}")
    try:
        with explain(f"cannot write {path}", OSError, RuntimeError, hint=hint):
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())    # or a power failure could leave the new name with an empty file
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)

def claim(folder, program, resume):
    """Makes a run's folder and returns its log.txt, open to append text and locked until it is closed.
    Raises DataError if the folder cannot be written, holds files but no ".PROGRAM", by which the program
    marks its own, if another run has it, or if it holds a run (seed*.pt) and resume is false."""
    folder, mark = Path(folder), Path(folder, f".{program}")
    with explain(f"--out {folder}: cannot write there", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not mark.exists():
            raise DataError(f"--out {folder}: holds files that {program}.py did not write; name an empty one")
        mark.touch()
        if any(folder.glob("seed*.pt")) and not resume:
            raise DataError(f"--out {folder}: holds a run; --resume goes on, another --out starts anew")
        log = open(folder / "log.txt", "a", encoding="utf-8", errors="backslashreplace")
        with explain(f"--out {folder}: another run is writing into it", BlockingIOError):
            with contextlib.suppress(ImportError):     # Windows has no fcntl: no lock there
                import fcntl
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in folder.glob(".partial-[0-9]*-" + 8 * "[0-9a-f]" + "*"):      # of a killed atomic()
            path.unlink()
        return log

def read_tensors(path):
    """The dict of a .safetensors file or of a torch checkpoint of tensors and plain containers."""
    with explain(f"{path}: not a readable checkpoint"):
        if str(path).endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):      # some scripts save their arguments
            return dict(torch.load(path, map_location="cpu", weights_only=True))

def load_weights(net, name, weights, key_in_file=str):
    """Fill net from a checkpoint FILE, its tensors at the top or under "model", "models" or "state_dict".
    weights: FILE; "none": net stays untrained; None: timm's download of the model called name.
    key_in_file: net's key -> the file's. DataError: unreadable, no download, tensor missing or misshapen."""
    if weights == "none":
        return
    with explain(f"--backbone {name}: cannot download its weights, --weights FILE takes a local file"):
        state = read_tensors(weights) if weights else timm.create_model(name, pretrained=True).state_dict()
    for key in ("model", "models", "state_dict"):
        state = state[key] if isinstance(state.get(key), dict) else state
    found = {str(key).replace(".", "_"): x for key, x in state.items()}       # timm: stages_0 for stages.0
    wanted = {key: key_in_file(key).replace(".", "_") for key in net.state_dict()}
    tensors = {key: found[theirs] for key, theirs in wanted.items() if theirs in found}
    with explain(f"--weights {weights}: does not fit {name}"):
        net.load_state_dict(tensors)   # strict, but for BatchNorm's num_batches_tracked
    rest = len(found) - len(tensors)
    log(f"{name}: {len(tensors)} tensors loaded from {weights or 'timm'}, {rest} others not needed")

# ---------------------------------------------------------------- the toy set
# Two textures and two objects, drawn from a seed that is the image's name

TOY = {"weave": ["blotch", "scratch", "stain"], "granite": ["blotch", "scratch", "stain"],
       "flange": ["missing", "scratch", "stain"], "pill": ["missing", "blotch", "stain"]}
SCRATCH = {"weave": (250, 250, 250), "granite": (25, 25, 30), "flange": (190, 70, 20)}

def toy_image(name):
    """"toy:CLASS/SPLIT/DEFECT/INDEX" -> uint8 128 x 128 x 3, and bool 128 x 128, where its defect is."""
    cls, _, defect, _ = name.removeprefix("toy:").split("/")
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    y, x = np.mgrid[:128, :128][..., None] - 63.5                 # 128 x 128 x 1, as all below of one channel
    angle, dx, dy = rng.uniform((-0.06, -2, -2), (0.06, 2, 2))
    u = (x - dx) * np.cos(angle) + (y - dy) * np.sin(angle)
    v = (y - dy) * np.cos(angle) - (x - dx) * np.sin(angle)
    part, ground = -9.0, 0             # signed distance to the object's outline, and the colour around it
    if cls == "weave":
        s, t = u / 12 + rng.random(), v / 12 + rng.random()
        over = (np.floor(s) + np.floor(t)) % 2 == 0
        thread = 1 - np.abs(np.where(over, s, t) % 1 - 0.5)
        image = thread * np.where(over, (225, 190, 140), (190, 150, 105))
    elif cls == "granite":
        grain = rng.random((66, 66, 1)).repeat(2, 0).repeat(2, 1)
        grain = sum(grain[i:i + 128, j:j + 128] for i in range(3) for j in range(3)) / 9
        image = (110 + 110 * grain + 30 * rng.random((128, 128, 1))) * (1, 0.98, 0.95)
    elif cls == "flange":
        bolts = [6 - np.hypot(u - 32 * np.cos(k), v - 32 * np.sin(k)) for k in np.arange(6) * np.pi / 3]
        part = np.maximum.reduce([np.hypot(u, v) - 46, 14 - np.hypot(u, v), *bolts])
        ground = 52, 58, 66
        image = (175 + 0.5 * u - 0.3 * v) * (1, 1, 1.03)
    else:
        part, ground = np.hypot(u - u.clip(-28, 28), v) - 22, (214, 212, 205)
        image = np.where(u < 0, (200, 60, 50), (240, 225, 150)) * (1 - (v / 36) ** 2)
    inside = np.clip(0.5 - part, 0, 1)                 # 1 inside, 0 outside, smooth over a pixel
    image = ground + (image - ground) * inside
    shape, colour, strength = np.full(x.shape, np.inf), 0, 0.9    # shape: signed distance to the outline
    if defect == "missing":            # a bite at the edge of the object
        side = rng.choice([-1, 1])
        a, b, radius = (rng.uniform(-15, 15), 22 * side, 17) if cls == "pill" else (0, 44 * side, 21)
        shape, colour, strength = np.hypot(u - a, v - b) - radius, ground, 1
    elif defect != "good":
        centre = rng.uniform(-1, 1, 2) * ((24, 6) if cls == "pill" else 38)
        a, b = centre / np.hypot(*centre) * 28 if cls == "flange" else centre     # there on its ring
        if defect == "scratch":        # a line with round ends
            p, q = rng.uniform(10, 22) * rng.choice([-1, 1]), rng.uniform(10, 22)
            t = np.clip(((x - a) * p + (y - b) * q) / (p * p + q * q), -1, 1)
            shape, colour = np.hypot(x - a - t * p, y - b - t * q) - 3, SCRATCH[cls]
        elif defect == "blotch":
            discs, colour = rng.uniform((-9, -9, 8), (9, 9, 12), (4, 3)), (35, 25, 25)
            shape = np.minimum.reduce([np.hypot(x - a - p, y - b - q) - r for p, q, r in discs])
        else:
            shape, colour = np.hypot(x - a, y - b) - rng.uniform(12, 15), (30, 80, 220)
    cover = np.clip(0.5 - shape, 0, 1)
    mask = np.minimum(cover, inside) * strength
    image = image + (colour - image) * (cover if defect == "missing" else mask)
    image = image * rng.uniform(0.97, 1.03) + rng.uniform(-3, 3, image.shape)
    return image.clip(0, 255).round().astype(np.uint8), mask[..., 0] > 0.45
