"""Every data set: where its images and masks lie, how they are read, the cache of decoded images.

    classes, train, test = load("mvtec", "data/mvtec")  which images train and test
    pixels = decode(train, 224)                         uint8 N x 224 x 224 x 3, decoded once
    masks = decode_masks(test, 224)                     bool N x 224 x 224

A set is one short function below and one line of SETS. Label 1 means defective and comes from the
folder or the csv, never from the mask: a defect that resizing removes from its mask still makes a
defective image. What is unusual (16 bit, several frames, a mask of another aspect, an unknown
layout) is refused in one line, a DataError, instead of being guessed at.
"""

import argparse
import contextlib
import csv
import errno
import hashlib
import io
import logging
import os
import platform
import re
import shutil
import threading
import unicodedata
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import numpy as np
import safetensors.torch
import timm
import torch
from huggingface_hub.utils import get_session
from PIL import ExifTags, Image, ImageOps, PngImagePlugin
from torchvision import datasets
from torchvision.transforms.functional import center_crop
from tqdm import tqdm

log = logging.getLogger(__name__)
for name in "httpx", "httpx2":  # a line for each request
    logging.getLogger(name).setLevel(logging.ERROR)
huggingface_hub.utils.logging.set_verbosity_error()  # download says it in one line
warnings.filterwarnings("ignore", module="PIL")  # of odd metadata, which no pixel depends on
Image.MAX_IMAGE_PIXELS = None  # opened() has bounds of its own
PngImagePlugin.MAX_TEXT_CHUNK = 2**30  # nor on a photo's notes
PngImagePlugin.MAX_TEXT_MEMORY = 2**30

FORMATS = ["BMP", "JPEG", "PNG", "TIFF", "WEBP"]
SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
JUNK = {
    "__MACOSX",
    "@eaDir",
    "Thumbs.db",
    "desktop.ini",
    "license.txt",
    "readme.txt",
    "image_anno.csv",
    "split_csv",
}


class UserError(Exception):
    """One line for the user: what is wrong, with which file or option, and what to do."""

    def __str__(self):  # a file name may hold line breaks, and bytes on which print would fail
        return " ".join(super().__str__().split()).encode(errors="backslashreplace").decode()


class DataError(UserError):
    """The same, about a data set or an image."""


class Sample(NamedTuple):
    """An image of a data set. What has no file (toy, cifar10) brings its pixels along."""

    image: str  # its path, or a name
    label: int  # 0 good, 1 defective
    cls: str  # the class it trains as
    row: str  # the row of the table it counts in: its class, AeBAD's domain, CIFAR-10's normals
    mask: str | None = None  # None: a good image, or a defective one whose mask is not known
    pixels: np.ndarray | None = None  # uint8 H x W x 3
    defect: np.ndarray | None = None  # bool H x W


# ------------------------------------------------------------------------------- the sets' layouts
# A layout is a function (root, class) -> [("train" or "test", Sample)].


def mvtec(root, cls, good="good", by_domain=False):
    """CLASS/{train/good,test/good,test/DEFECT,ground_truth/DEFECT}, and any folders below these.

    by_domain: the folders below good and DEFECT are the rows of the table (AeBAD).
    """
    masks = {}
    samples = []
    for path in list_files(root / cls):  # sorted: ground_truth comes before test
        split, *folders = path.relative_to(root / cls).parts
        key = composed("/".join([*folders[:-1], path.stem]))
        if path.suffix.lower() not in SUFFIXES:
            continue
        if split == "ground_truth":
            masks.setdefault(key, str(path))
        if split not in ("train", "test") or len(folders) < 2 + by_domain:
            continue

        kind, *below = folders[:-1]
        label = int(kind != good)
        if label and kind.lower() in ("good", "ok", "normal"):
            raise DataError(f"{root / cls / split / kind}: rename it to {good}")
        if split == "train" and label:
            continue
        row = below[0] if by_domain else cls
        mask = None
        if label:
            mask = masks.get(f"{key}_mask", masks.get(key))
        samples.append((split, Sample(str(path), label, cls, row, mask)))
    return samples


def composed(name):
    """In one form of Unicode: macOS writes an umlaut as two characters."""
    return unicodedata.normalize("NFC", name)


def mvtec_classes(root):
    classes = []
    for path in sorted(filter(is_shown, root.iterdir())):
        if (path / "train").is_dir() or (path / "test").is_dir():
            classes.append(path.name)
    return classes


def visa(root, cls):
    """Raw: split_csv/1cls.csv lists object, split, label, image, mask. Prepared: as mvtec."""
    rows = visa_rows(root)
    if not rows:
        return mvtec(root, cls)
    labels = {("train", "normal"): 0, ("test", "normal"): 0, ("test", "anomaly"): 1}
    samples = []
    for row in rows:
        if row["object"] == cls:
            label = labels[row["split"], row["label"]]
            mask = str(root / row["mask"]) if row["mask"] else None
            samples.append((row["split"], Sample(str(root / row["image"]), label, cls, cls, mask)))
    return samples


def visa_rows(root):
    path = root / "split_csv" / "1cls.csv"
    if not path.exists():
        return []
    return list(csv.DictReader(path.read_text("utf-8-sig").splitlines()))


def visa_classes(root):
    return list(dict.fromkeys(row["object"] for row in visa_rows(root))) or mvtec_classes(root)


def cifar10(root, cls, normals):
    """UniAD's protocol: the five classes of the digits `normals` train, all ten test."""
    digit = CIFAR10.index(cls)
    label = int(str(digit) not in normals)
    samples = []
    for split in ["train", "test"][label:]:
        part = cifar10_part(root, split == "train")
        for i in np.flatnonzero(np.equal(part.targets, digit)):
            sample = Sample(f"cifar10/{split}/{i}", label, cls, normals, pixels=part.data[i])
            samples.append((split, sample))
    return samples


@cache
def cifar10_part(root, train):
    return datasets.CIFAR10(root, train)  # checks each file's MD5


CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()


def toy(root, cls):
    """28 train, 10 good and 12 defective test images, drawn by toy_image."""
    kinds = ["good"] * 38 + ["scratch"] * 4 + ["missing"] * 4 + ["stain"] * 4
    samples = []
    for i, kind in enumerate(kinds):
        split = "train" if i < 28 else "test"
        name = f"toy:{cls}/{split}/{kind}/{i:03d}"
        pixels, defect = toy_image(cls, kind, zlib.crc32(name.encode()))
        label = int(kind != "good")
        sample = Sample(name, label, cls, cls, name if label else None, pixels, defect)
        samples.append((split, sample))
    return samples


def toy_image(cls, kind, seed):
    """uint8 128 x 128 x 3, and bool 128 x 128: where its defect of that kind is."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:128, :128] - rng.integers(60, 68, (2, 1, 1))
    shapes = {
        "weave": 0.7 + 0.3 * np.sin(x / 3) * np.sin(y / 3),
        "granite": rng.uniform(0.4, 1, x.shape),
        "flange": abs(np.hypot(x, y) - 32) < 16,
        "pill": np.hypot(x / 2, y) < 24,
    }
    shape = shapes[cls]
    image = 90 + 110 * shape

    angle = rng.uniform(0, 6.28)
    x = x - 30 * np.cos(angle)
    y = y - 16 * np.sin(angle)
    defects = {
        "good": (x > 128, 0),
        "stain": (np.hypot(x, y) < 9, 40),
        "scratch": ((abs(x - y) < 4) & (abs(x + y) < 30), 60),
        "missing": ((np.maximum(abs(x), abs(y)) < 9) & (shape > 0), 90),
    }
    mask, grey = defects[kind]
    image[mask] = grey
    image = image * rng.uniform(0.97, 1.03) + rng.normal(0, 3, x.shape)
    image = image[..., None] * np.roll((1, 0.9, 0.8), TOY.index(cls))
    return image.clip(0, 255).astype(np.uint8), mask


TOY = ["weave", "granite", "pill", "flange"]


class Set(NamedTuple):
    layout: Callable
    source: str  # where it can be had, or its layout; ends every error
    counts: tuple | None = None  # of a full copy: train, good, defective
    classes: Callable = mvtec_classes  # root -> names
    optional: str = ""  # "masks": a defective image may have none; "train": a class may only test
    inside: str = ""  # a folder that may lie between the root and the classes
    normals: bool = False  # its layout takes the digits of --normals; not joined with others


SETS = {
    "mvtec": Set(
        mvtec, "https://www.mvtec.com/company/research/datasets/mvtec-ad", (3629, 467, 1258)
    ),
    "visa": Set(
        visa,
        "https://amazon-visual-anomaly.s3.us-west-2.amazonaws.com/VisA_20220922.tar, then "
        "mkdir -p ROOT && tar -x -C ROOT -f VisA_20220922.tar",
        (8659, 962, 1200),
        visa_classes,
        inside="1cls",  # where it is prepared
    ),
    "btad": Set(
        partial(mvtec, good="ok"), "https://github.com/pankajmishra000/VT-ADL", (1799, 451, 290)
    ),
    "goodsad": Set(mvtec, "https://github.com/jianzhang96/GoodsAD", (3136, 1328, 1660)),
    "mad": Set(mvtec, "https://github.com/EricLee0224/PAD"),
    "aebad": Set(
        partial(mvtec, by_domain=True),
        "https://github.com/zhangzilongc/MMR",
        (521, 490, 1149),
        lambda root: ["AeBAD_S"],
    ),
    "cifar10": Set(
        cifar10,
        """python -c "from torchvision.datasets import CIFAR10; CIFAR10('ROOT', download=True)\"""",
        (25000, 5000, 5000),
        lambda root: CIFAR10,
        "masks train",
        normals=True,
    ),
    "folder": Set(
        mvtec, "ROOT/CLASS/{train/good,test/good,test/DEFECT,ground_truth/DEFECT}", optional="masks"
    ),
    "toy": Set(toy, "data.py", None, lambda root: TOY),
}


def load(names, root=None, classes=None, normals="01234", training=True):
    """Lists a set, or several joined by "+", whose classes are then "set/class".

    root: where the set lies, default data/NAME; of joined sets what holds a folder per set, default
    data. classes: a subset. normals: the digits of CIFAR-10's five normal classes. training=False:
    a class may have test images only.
    Returns the names of the classes that train, and the training and the test samples.
    Logs a line per class and warnings. Raises DataError.
    """
    parts = names.split("+")
    joined = len(parts) > 1
    for name in parts:
        if name not in SETS or parts.count(name) > 1 or (joined and SETS[name].normals):
            raise DataError(f"--data {names}: expected one of {', '.join(SETS)}, or several with +")
    classes = list(map(composed, classes or []))
    known = []
    pairs = []
    for name in parts:
        folder = Path(root or "data", "" if root and not joined else name)
        prefix = f"{name}/" * joined
        kind = SETS[name]
        try:
            found, listed = list_set(folder, kind, prefix, classes, normals, training)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".removeprefix("DataError: ")
            if isinstance(error, FileNotFoundError):
                reason = f"there is no {error.filename}"
            source = kind.source.replace("ROOT", str(folder))
            raise DataError(f"{folder}: {reason} (--root; see {source})") from None
        known += found
        pairs += listed

    for cls in classes:
        if cls not in known:
            raise DataError(f"--classes {cls}: no such class; known: {', '.join(known)}")
    train = [sample for split, sample in pairs if split == "train"]
    test = [sample for split, sample in pairs if split == "test"]
    return list(dict.fromkeys(sample.cls for sample in train)), train, test


def list_set(root, kind, prefix, classes, normals, training):
    """The names of all classes of a set, and (split, sample) of those asked for."""
    if kind.normals:
        kind = kind._replace(layout=partial(kind.layout, normals=normals))
    if (root / kind.inside).is_dir():
        root = root / kind.inside
    folders = kind.classes(root)
    if root.is_dir() and not kind.normals:
        beside = sorted(filter(is_shown, root.iterdir()))
        warn_unused([str(path) for path in beside if path.name not in folders])
    if not folders:
        raise DataError(f"no class in it, CLASS/train/good; {found_instead(root)}")
    known = [composed(prefix + folder) for folder in folders]
    pairs = []
    for cls, folder in zip(known, folders, strict=True):
        if len(os.fsencode(cls)) > 200 or known.count(cls) > 1:
            raise DataError(f"{cls}: a name of over 200 bytes, or of two folders; rename it")
        if not classes or cls in classes:
            pairs += list_class(root, folder, kind, prefix, training)

    have = count(pairs)
    if kind.counts and not classes and have != kind.counts:
        log.warning(f"warning: {root}: {have} train, good, defective; a full copy {kind.counts}")
    return known, pairs


def list_class(root, folder, kind, prefix, training):
    """Its (split, sample). Logs how many there are, and warns of files that are not used."""
    cls = composed(prefix + folder)
    pairs = []
    owners = {}  # a mask's image
    for split, sample in kind.layout(root, folder):
        row = composed(prefix + sample.row)
        pairs.append((split, sample._replace(cls=cls, row=row)))
        if sample.pixels is None:
            for path in filter(None, [sample.image, sample.mask]):
                check_file(path)
        if row == "mean":
            raise DataError("a class or domain named mean: rename it, the table has such a row")
        if sample.mask:
            owner = owners.setdefault(sample.mask, sample.image)
            if owner != sample.image:
                raise DataError(f"{sample.mask}: a mask of {owner} and {sample.image}; rename one")
    used = owners.keys() | {sample.image for _, sample in pairs}

    train, good, defective = count(pairs)
    log.info(f"{cls}: {train} train, {good} good, {defective} defective, {len(owners)} masks")
    warn_unused([path for path in map(str, list_files(root / folder)) if path not in used])
    if not good + defective:
        log.warning(f"warning: {cls}: no test images, so no row in the table")

    if training and not train and "train" not in kind.optional:
        seen = found_instead(root / folder, cls=root / folder)
        raise DataError(f"no training images of {cls}, {cls}/train/good; {seen}")
    bare = [sample.image for _, sample in pairs if sample.label and not sample.mask]
    if bare and "masks" not in kind.optional:
        raise DataError(f"no mask of {counted(bare)}: looked for ground_truth/../STEM[_mask].*")
    return pairs


def check_file(path):
    """DataError: it is absent, a link to nothing, or a pipe, which would be read for ever."""
    if not os.path.isfile(path):
        leads = f", but a broken link to {os.readlink(path)}" if os.path.islink(path) else ""
        raise DataError(f"{path}: not a file{leads}")


def found_instead(root, cls=None):
    """What lies below a root, or a class's folder, where no training images were found."""
    root = Path(os.path.abspath(root))
    paths = (path for depth in range(5) for path in sorted(root.glob("[!.]*/" * depth + "[!.]*")))
    image = next((path for path in paths if path.suffix.lower() in SUFFIXES), None)
    if not image:
        return f"there is no image, {', '.join(sorted(SUFFIXES))}"
    if not cls and image.parents[1].name in ("train", "test", "ground_truth"):
        return f"for {image} it is --root {image.parents[3]}"
    if not cls:
        cls = root / ("CLASS" if image.parent == root else image.relative_to(root).parts[0])
    return f"there is {image}; put the good ones into {cls}/train/good"


def count(pairs):
    """How many train, good, defective images."""
    counts = Counter((split, sample.label) for split, sample in pairs)
    return counts["train", 0], counts["test", 0], counts["test", 1]


def warn_unused(paths):
    if paths:
        log.warning(f"warning: not used: {counted(paths)}")


def list_files(folder, above=()):
    """Paths of all files below a folder, sorted; hidden ones and JUNK left out."""
    if not folder.is_dir():
        return []
    here = [folder.resolve(), *(above or folder.resolve().parents)]
    files = []
    for path in sorted(filter(is_shown, folder.iterdir())):
        if not path.is_dir():
            files.append(path)
        elif path.resolve() not in here:  # not a link back up
            files += list_files(path, here)
    return files


def is_shown(path):
    return not path.name.startswith(".") and path.name not in JUNK


def counted(names):
    """The first name, on one line, and how many more there are."""
    first = " ".join(names[0].split())
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"


def evenly(indices, count):
    """Some of them, from the first on at even distances."""
    return indices[np.linspace(0, len(indices), count, endpoint=False, dtype=int)]


def hold_out(samples, share):
    """bool N: an even share of each class's samples, to be kept out of training.

    share > 0: at least one of a class that has two or more, never all.
    """
    held = np.zeros(len(samples), bool)
    for cls in {sample.cls for sample in samples}:
        mine = np.flatnonzero([sample.cls == cls for sample in samples])
        count = min(max(round(share * len(mine)), share > 0), len(mine) - 1)
        held[evenly(mine, count)] = True
    return held


def calibration_images(samples, held):
    """Indices: of each class its held-out images, or else those that trained; of many an even
    choice, a thousand in all or a hundred of each class."""
    classes = dict.fromkeys(sample.cls for sample in samples)
    each = max(100, 1000 // len(classes))
    chosen = []
    for cls in classes:
        mine = np.flatnonzero([sample.cls == cls for sample in samples])
        if held[mine].any():
            mine = mine[held[mine]]
        chosen.extend(evenly(mine, min(each, len(mine))))
    return np.array(chosen)


def digest(samples):
    """Of the images' names and sizes: a run is not resumed with others."""
    names = [Path(sample.image).name for sample in samples]
    sizes = [os.path.getsize(s.image) for s in samples if s.pixels is None]
    return hashlib.sha256(repr([names, sizes]).encode()).hexdigest()


# ------------------------------------------------------------------------ reading images and masks


LARGE = 30e6  # pixels; of images that have more two at a time are decoded
TWO = threading.Semaphore(2)
MOST = 400e6  # pixels that are decoded


@contextlib.contextmanager
def opened(path):
    """An image file of 8 bits a channel and one frame, not decoded yet. DataError: any other."""
    with explain(f"cannot read image {path}", DataError), contextlib.ExitStack() as stack:
        check_file(path)
        image = stack.enter_context(Image.open(path, formats=FORMATS))
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # a phone's, whose first frame is the photo
            raise ValueError(f"{frames} frames; save the one to use as 8 bit RGB")

        # Pillow narrows 16 bit RGB without a word; PNG's raw mode and TIFF's tag 258 tell.
        deep = image.format == "PNG" and ";16" in str(image.tile)
        if image.format == "TIFF":
            deep = max(image.tag_v2.get(258, [8])) > 8
        if deep:
            raise ValueError("more than 8 bits a channel; save it as 8 bit RGB")

        pixels = image.width * image.height
        if pixels > MOST:
            raise ValueError(f"{pixels / 1e6:.0f} megapixels; save it smaller")
        if pixels > LARGE:
            stack.enter_context(TWO)
        yield image


def read_image(path):
    """A file as an upright RGB image, alpha dropped; whether it has transparent pixels."""
    with opened(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        transparent = False
        if image.has_transparency_data:
            image = image.convert("RGBA")
            transparent = image.getchannel("A").getextrema()[0] < 255
        if image.mode != "RGB":  # else it would be a copy
            image = image.convert("RGB")
        return image, transparent


def read_mask(sample):
    """bool H x W of a defective sample, at the mask's own size; whether it has many grey values.

    A label map is defect wherever it is not 0; a JPEG, and a mask of many greys as it was smoothed,
    from half of its maximum on. DataError: its aspect is not the image's, it is defect everywhere,
    or a JPEG of a label map.
    """
    if sample.defect is not None:
        return sample.defect, False
    with opened(sample.image) as file:
        width, height = file.size
        if file.getexif().get(ExifTags.Base.Orientation, 1) > 4:  # it lies on its side
            width, height = height, width
    with opened(sample.mask) as file:
        values = mask_values(ImageOps.exif_transpose(file))
        jpeg = file.format == "JPEG"
    h, w = values.shape
    if abs(width * h - height * w) > max(width, height, w, h):  # more than a pixel of rounding
        raise DataError(f"{sample.mask}: a mask of {w} x {h} for an image of {width} x {height}")

    mask = values > 0
    most = values.max()
    if jpeg and 0 < most < 128:
        raise DataError(f"{sample.mask}: JPEG does not keep small class numbers; save it as PNG")
    many_greys = most >= 128 and (jpeg or len(np.unique(values[mask])) > 8)
    if many_greys:
        mask = values >= most / 2
    if mask.all():
        raise DataError(f"{sample.mask}: all of the image is defect; mark the defect only")
    return mask, many_greys


def mask_values(image):
    """uint8 H x W of a mask: class numbers or greys, 0 where it is background."""
    if image.mode == "P":  # class numbers, whatever their colours
        return np.asarray(image)
    pixels = np.asarray(image.convert("RGBA"))
    values = pixels[..., :3].max(-1)
    alpha = pixels[..., 3]
    if alpha.min() < alpha.max():  # a layer: what is transparent is background
        values = np.where(alpha > 0, values, 0)
        if not values.any():
            values = alpha
    return values


# ---------------------------------------------------------------- decoding, and the cache of images


def resized(image, size, crop, method):
    """A PIL image resized to size x size, then its centre crop x crop, as an array."""
    across = image.resize((size, image.height), method)  # first, in any version of Pillow
    return np.asarray(center_crop(across.resize((size, size), method), crop or size))


def resized_tensor(photo, size, crop=None):
    """The same of uint8 B x 3 x H x W, any H and W, as an exported program does it -> 0..1.

    Pillow's filter to the last bit: a triangle whose weights have 22 bits, first along the rows,
    then along the columns, each rounded to whole numbers.
    """

    def weights(n):  # size x n
        scale = torch.full((), n, dtype=torch.float64, device=photo.device) / size
        to = torch.arange(size, dtype=torch.float64, device=photo.device).view(-1, 1)
        source = torch.arange(n, dtype=torch.float64, device=photo.device)
        distance = (source + 0.5 - (to + 0.5) * scale) / scale.clamp_min(1)
        w = (1 - distance.abs()).clamp_min(0)
        w = w / w.sum(1, keepdim=True)
        return (w * 2**22 + 0.5).floor() / 2**22

    x = (photo.double() @ weights(photo.shape[3]).mT + 0.5).floor()  # B x 3 x H x size
    x = (weights(photo.shape[2]) @ x + 0.5).floor()  # B x 3 x size x size
    return center_crop(x.float() / 255, crop or size)


def in_threads(function, items, name):
    """Results of function(item) in order, beside a progress bar."""
    starts = range(0, len(items), AHEAD)
    with ThreadPoolExecutor() as pool:
        parts = (pool.map(function, items[i : i + AHEAD]) for i in starts)
        results = (result for part in parts for result in part)
        yield from tqdm(results, name, len(items), leave=False, disable=None)


AHEAD = 256  # results that a slow disk may keep in memory


def decode(samples, size, crop=None, cache="cache"):
    """The samples' images, uint8 N x S x S x 3 (S = crop or size), RGB, bilinear.

    cache: a folder whose file of these images is used again, memory-mapped, while the files' names,
    sizes and times are the same. Warns of dropped alpha. DataError: an image that cannot be read.
    """
    side = crop or size
    record = np.dtype([("pixels", np.uint8, (side, side, 3)), ("transparent", bool)])

    def decode_one(sample):
        if sample.pixels is not None:  # CIFAR-10's are enlarged as by UniAD
            image = Image.fromarray(sample.pixels)
            return resized(image, size, crop, Image.Resampling.LANCZOS), False
        image, transparent = read_image(sample.image)
        return resized(image, size, crop, Image.Resampling.BILINEAR), transparent

    key = hashlib.sha256(repr([size, crop, *map(fingerprint, samples)]).encode()).hexdigest()
    path = Path(cache, f"{key[:32]}.npy")
    remove_leftovers(cache)
    if not path.exists():
        os.makedirs(cache, exist_ok=True)
        total = record.itemsize * len(samples)
        header = {"descr": record.descr, "fortran_order": False, "shape": (len(samples),)}
        # Not by a memory map: where the disk is full, that is killed without a word.
        with written(path, total) as temporary, open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for pixels, transparent in in_threads(decode_one, samples, "images"):
                file.write(pixels.tobytes() + bytes([transparent]))
    with explain(f"{path}: damaged, delete it"):
        table = np.load(path, mmap_mode="r")

    transparent = [samples[i].image for i in np.flatnonzero(table["transparent"])]
    if transparent:
        log.warning(f"warning: alpha dropped, though some is transparent: {counted(transparent)}")
    return table["pixels"]


def fingerprint(sample):
    """What changes when an image does."""
    if sample.pixels is not None:
        return hashlib.sha256(sample.pixels.tobytes()).hexdigest()
    found = os.stat(sample.image)
    return sample.image, found.st_size, found.st_mtime_ns


def decode_masks(samples, size, crop=None):
    """bool N x S x S, nearest; zeros without a mask. Warns of odd masks. DataError as decode."""
    side = crop or size
    masks = np.zeros((len(samples), side, side), bool)
    odd = defaultdict(list)

    def decode_one(sample):
        if not sample.mask:
            return False, None
        mask, many_greys = read_mask(sample)
        small = resized(Image.fromarray(mask), size, crop, Image.Resampling.NEAREST)
        note = None
        if many_greys:
            note = "note: masks of many greys, defect from half of their maximum on"
        if mask.mean() > 0.5:
            note = "warning: masks that mark more than half of their image"
        if not small.any():
            note = f"warning: masks without a defect, or none that is left at {side} pixels"
        return small, note

    for i, (mask, note) in enumerate(in_threads(decode_one, samples, "masks")):
        masks[i] = mask
        if note:
            odd[note].append(samples[i].mask)
    for note, names in odd.items():
        log.warning(f"{note}: {counted(names)}")
    return masks


def warn_of_copies(train, train_pixels, test, test_pixels):
    """Names test images whose decoded pixels are those of a training or another test image."""
    seen = {}
    for sample, pixels in zip(train, train_pixels, strict=True):
        seen[hashlib.sha256(pixels).digest()] = sample.image
    copies = []
    for sample, pixels in zip(test, test_pixels, strict=True):
        key = hashlib.sha256(pixels).digest()
        if key in seen:
            copies.append(f"{sample.image} is {seen[key]}")
        seen[key] = sample.image
    if copies:
        log.warning(f"warning: the same image in test and train, or twice: {counted(copies)}")


def find_images(paths):
    """Files, and folders with all below them -> paths of images. DataError: there is none."""
    found = []
    unused = []
    for path in map(Path, paths):
        images = []
        for file in list_files(path) or [path]:
            is_image = file.is_file() and (file == path or file.suffix.lower() in SUFFIXES)
            if file != path and file.with_name("predictions.csv").exists():
                is_image = False  # it shows an earlier verdict
            if is_image:
                images.append(str(file))
            else:
                unused.append(str(file))
        if not images:
            raise DataError(f"no image at {path}: expected a file or a folder of images")
        found += images
    warn_unused(unused)
    return list(dict.fromkeys(found))  # overlapping folders name a file once


# --------------------------------------------------------------------------------- files and errors


@contextlib.contextmanager
def explain(text, kind=UserError):
    """An error in the block becomes a UserError: the text and its reason."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise kind(f"{text}: {str(error) or type(error).__name__}") from None


@contextlib.contextmanager
def written(path, size=0):
    """A temporary name beside path, renamed to path when the block has written it.

    size: how many bytes it takes, if that is known. UserError: no space for it, or another reason.
    """
    path = Path(path)
    temporary = path.with_name(f".{HOST}-{os.getpid()}-{path.name}")
    free = shutil.disk_usage(path.parent).free
    space = f" of {size / 1e6:.1f} MB, {free / 1e6:.1f} MB free" if size else ""
    try:
        with explain(f"cannot write {path}{space}"):
            if size > free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


HOST = f"{zlib.crc32(platform.node().encode()):08x}"  # short, as file systems take 255 bytes


def remove_leftovers(folder):
    """Deletes the temporary files that killed processes left in a folder; names other machines'."""
    for path in Path(folder).glob(".*-*-*"):
        name = re.match(r"\.([0-9a-f]{8})-(\d+)-", path.name)
        if not name:
            continue
        host, pid = name.groups()
        if host != HOST:
            log.warning(f"warning: half written on another machine; if it is idle, delete {path}")
            continue
        try:
            os.kill(int(pid), 0)  # no signal: asks whether there is that process
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except OSError:  # another user's process
            pass


@contextlib.contextmanager
def saved(path):
    """A file in memory, written to path when the block has filled it. UserError: as written."""
    content = io.BytesIO()  # the libraries' own file writers do not tell a full disk
    yield content
    with written(path, content.getbuffer().nbytes) as temporary:
        temporary.write_bytes(content.getbuffer())


def download(repo, file):
    """The path of a repository's file on the Hugging Face hub, downloaded if it is not cached.

    The library's HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE hold. UserError: no network, no such file.
    """
    cached = huggingface_hub.try_to_load_from_cache(repo, file)
    if isinstance(cached, str):
        return cached
    url = huggingface_hub.hf_hub_url(repo, file)
    with explain(f"cannot download {file} of {repo}, so pass it as --weights FILE"):
        # Without a network, or with a broken server, hf_hub_download tries again for long.
        answer = get_session().head(url, timeout=5)
        if answer.status_code >= 500:
            answer.raise_for_status()
        return huggingface_hub.hf_hub_download(repo, file)


def timm_weights(name):
    """The path of a timm network's own weights, downloaded. UserError: as download, or none."""
    source = timm.get_pretrained_cfg(name)
    if not (source and source.hf_hub_id):
        raise UserError(f"--backbone {name}: no weights to download; pass --weights FILE, or none")
    return download(source.hf_hub_id, source.hf_hub_filename or "model.safetensors")


def check_like(x, like):
    """ValueError where what was read from a file has other keys or types than like.

    None may be a text, a list or a dict as well.
    """
    if like is None and isinstance(x, str | list | dict | None):
        return
    if type(x) is not type(like):
        raise ValueError(f"{x!r:.40} where {like!r:.40} was expected")
    if isinstance(like, dict):
        if x.keys() != like.keys():
            raise ValueError(f"not the entries {', '.join(like)}")
        for key in like:
            check_like(x[key], like[key])


def read_tensors(path):
    """The dict of a .safetensors file or of a torch checkpoint of tensors and plain containers."""
    with explain(f"{path}: not a readable checkpoint (if it is a download, delete it)"):
        with open(path, "rb") as file:
            start = file.read(64).lstrip()
        if start.startswith((b"version https://git-lfs", b"<")):
            raise DataError(f"{path}: a Git LFS pointer (git lfs pull) or a web page, not the file")
        if str(path).endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise DataError(f"{path}: damaged, its checksums do not fit")
        with torch.serialization.safe_globals([argparse.Namespace]):  # some save their arguments
            return dict(torch.load(path, map_location="cpu", weights_only=True))


def load_weights(net, path, key_in_file=str):
    """Fill net from a checkpoint, all by name; its tensors may lie one level down, as "model".

    key_in_file: net's key -> the file's. DataError: a tensor is missing, or of another shape.
    """
    state = read_tensors(path)
    for key in "model", "models", "state_dict":
        if isinstance(state.get(key), dict):
            state = state[key]
    by_name = {str(key).replace(".", "_"): x for key, x in state.items()}  # timm: stages_0

    tensors = {}
    unfit = []
    for key, ours in net.state_dict().items():
        theirs = by_name.get(key_in_file(key).replace(".", "_"))
        if getattr(theirs, "shape", None) == ours.shape:
            tensors[key] = theirs
        elif not key.endswith("num_batches_tracked"):
            unfit.append(key)
    if unfit:
        raise DataError(
            f"{path}: {len(unfit)} tensors are missing or of another shape, as {unfit[0]}; "
            f"the file's first is {next(iter(state), None)!r}: is this --backbone's file?"
        )
    net.load_state_dict(tensors)  # strict, but for BatchNorm's num_batches_tracked
    log.info(f"{len(tensors)} tensors loaded from {path}, {len(state) - len(tensors)} not needed")
