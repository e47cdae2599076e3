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
import hashlib
import logging
import os
import unicodedata
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from PIL import Image, ImageOps
from torchvision import datasets
from torchvision.transforms.functional import center_crop
from tqdm import tqdm

log = logging.getLogger(__name__)

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
}


class DataError(Exception):
    """One line for the user: what is wrong, with which file or option, and what to do."""

    def __str__(self):  # a file name may hold line breaks, and bytes on which print would fail
        return " ".join(super().__str__().split()).encode(errors="backslashreplace").decode()


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
    if (root / cls / "test_public").is_dir():
        raise DataError(
            f"{root / cls}: MVTec AD 2's layout; move test_public/good and bad to test/ and "
            "test_public/ground_truth to ground_truth/"
        )
    images = {}
    masks = {}
    for path in list_files(root / cls):
        folders = path.relative_to(root / cls).parts[:-1]
        if path.suffix.lower() not in SUFFIXES:
            continue
        if folders[:1] == ("ground_truth",):
            masks.setdefault(mask_key(folders[1:], path.stem), str(path))
        elif folders[:2] == ("train", good) or (folders[:1] == ("test",) and folders[1:]):
            images[path] = folders

    samples = []
    for path, (split, kind, *below) in images.items():
        if kind != good and kind.lower() == good:
            raise DataError(f"{root / cls / split / kind}: rename it to {good}")
        mask = None
        if kind != good:
            mask = find_mask(masks, [kind, *below], path)
        if by_domain and not below:
            raise DataError(f"{path}: expected a folder for its domain")
        row = below[0] if by_domain else cls
        samples.append((split, Sample(str(path), int(kind != good), cls, row, mask)))
    return samples


def mask_key(folders, stem):
    """In one normal form of Unicode: macOS writes an umlaut as two characters."""
    return unicodedata.normalize("NFC", "/".join([*folders, stem]))


def find_mask(masks, folders, image):
    """STEM_mask.* or STEM.* in the matching folder of ground_truth, or None."""
    key = mask_key(folders, image.stem)
    if any(other.startswith(f"{key}/") for other in masks):
        raise DataError(f"{image}: its mask is a folder (MVTec LOCO); merge it into one {key}.png")
    return masks.get(f"{key}_mask", masks.get(key))


def mvtec_classes(root):
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and is_shown(path.name)]
    found = [path.name for path in folders if (path / "train").is_dir() or (path / "test").is_dir()]
    others = [str(path) for path in folders if path.name not in found]
    if others:
        log.warning(f"warning: not used, as no train or test is in it: {counted(others)}")
    return found


def visa(root, cls):
    """Raw: split_csv/1cls.csv lists object, split, label, image, mask. Prepared: as mvtec."""
    rows = visa_rows(root)
    samples = []
    for row in rows:
        if row["object"] == cls:
            label = ["normal", "anomaly"].index(row["label"])
            if row["split"] not in ["train", "test"][label:]:
                raise DataError(f"1cls.csv: {row['image']} is {row['label']} in {row['split']}")
            mask = str(root / row["mask"]) if row["mask"] else None
            samples.append((row["split"], Sample(str(root / row["image"]), label, cls, cls, mask)))
    return samples if rows else mvtec(root, cls)


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
        part = datasets.CIFAR10(root, train=split == "train")  # checks each file's MD5
        for i in np.flatnonzero(np.equal(part.targets, digit)):
            sample = Sample(f"cifar10/{split}/{i}", label, cls, normals, pixels=part.data[i])
            samples.append((split, sample))
    return samples


CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()


def toy(root, cls):
    """28 train, 10 good and 12 defective test images, drawn by toy_image."""
    counts = {"train/good": 28, "test/good": 10} | {f"test/{kind}": 4 for kind in TOY[cls]}
    samples = []
    for folder, count in counts.items():
        for i in range(count):
            name = f"toy:{cls}/{folder}/{i:03d}"
            pixels, defect = toy_image(name)
            label = int(not folder.endswith("good"))
            sample = Sample(name, label, cls, cls, name if label else None, pixels, defect)
            samples.append((folder.split("/")[0], sample))
    return samples


class Set(NamedTuple):
    layout: Callable
    source: str  # where it can be had, or its layout; ends every error
    counts: tuple | None = None  # of a full copy: train, good, defective
    classes: Callable = mvtec_classes  # root -> names
    optional: str = ""  # "masks": a defective image may have none; "train": a class may only test


SETS = {
    "mvtec": Set(
        mvtec, "https://www.mvtec.com/company/research/datasets/mvtec-ad", (3629, 467, 1258)
    ),
    "visa": Set(
        visa, "https://github.com/amazon-science/spot-diff", (8659, 962, 1200), visa_classes
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
        "https://www.cs.toronto.edu/~kriz/cifar.html (python version)",
        (25000, 5000, 5000),
        lambda root: CIFAR10,
        "masks train",
    ),
    "folder": Set(
        mvtec, "ROOT/CLASS/{train/good,test/good,test/DEFECT,ground_truth/DEFECT}", optional="masks"
    ),
    "toy": Set(toy, "data.py", None, lambda root: list(TOY)),
}


def load(names, root=None, classes=None, normals="01234"):
    """Lists a set, or several joined by "+", whose classes are then "set/class".

    root: where the set lies, default data/NAME; of joined sets what holds a folder per set, default
    data. classes: a subset. normals: the digits of CIFAR-10's five normal classes.
    Returns the names of the classes that train, and the training and the test samples.
    Logs a line per class and warnings. Raises DataError.
    """
    joined = "+" in names
    known = []
    train = []
    test = []
    for name in names.split("+"):
        if name not in SETS or (joined and (name == "cifar10" or names.count(name) > 1)):
            raise DataError(f"--data {names}: expected one of {', '.join(SETS)}, or several with +")
        folder = Path(root or "data", "" if root and not joined else name)
        kind = SETS[name]
        if name == "cifar10":
            kind = kind._replace(layout=partial(cifar10, normals=normals))
        if (folder / "1cls").is_dir():  # of a prepared VisA
            folder = folder / "1cls"
        try:
            known += list_set(
                name, folder, kind, f"{name}/" if joined else "", classes, train, test
            )
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".removeprefix("DataError: ")
            raise DataError(f"{folder}: {reason} (--root; see {kind.source})") from None

    for cls in classes or []:
        if cls not in known:
            raise DataError(f"--classes {cls}: no such class; known: {', '.join(known)}")
    return list(dict.fromkeys(sample.cls for sample in train)), train, test


def list_set(name, root, kind, prefix, classes, train, test):
    """Appends a set's samples of the classes asked for; returns the names of all its classes."""
    known = [prefix + cls for cls in kind.classes(root)]
    if not known:
        raise DataError("no class in it: looked for CLASS/train/good and CLASS/test")
    counts = Counter()
    for cls in known:
        if classes and cls not in classes:
            continue
        pairs = kind.layout(root, cls.removeprefix(prefix))
        report_class(cls, pairs, list_files(root / cls.removeprefix(prefix)))
        for split, sample in pairs:
            sample = sample._replace(cls=cls, row=prefix + sample.row)
            (train if split == "train" else test).append(sample)
            counts[split, sample.label] += 1
        if "train" not in kind.optional and "train" not in dict(pairs):
            raise DataError(f"no training images of {cls}: looked for {cls}/train/good")
        bare = [sample.image for _, sample in pairs if sample.label and not sample.mask]
        if bare and "masks" not in kind.optional:
            raise DataError(f"no mask of {counted(bare)}: looked for ground_truth/../STEM[_mask].*")

    have = counts["train", 0], counts["test", 0], counts["test", 1]
    if kind.counts and not classes and have != kind.counts:
        log.warning(f"warning: {name}: {have} train, good, defective; a full copy {kind.counts}")
    return known


def report_class(cls, pairs, files):
    """Logs how many images and masks of a class there are, and which files are not used."""
    counts = Counter((split, sample.label) for split, sample in pairs)
    train, good, defective = counts["train", 0], counts["test", 0], counts["test", 1]
    masks = Counter(sample.mask for _, sample in pairs if sample.mask)
    log.info(f"{cls}: {train} train, {good} good, {defective} defective, {len(masks)} masks")

    used = {sample.image for _, sample in pairs} | set(masks)
    unused = [str(path) for path in files if str(path) not in used]
    shared = [sample.image for _, sample in pairs if masks[sample.mask] > 1]
    for what, paths in ("not used", unused), ("images that share a mask", shared):
        if paths:
            log.warning(f"warning: {cls}: {what}: {counted(paths)}")
    if not good + defective:
        log.warning(f"warning: {cls}: no test images, so no row in the table")


def list_files(folder):
    """Paths of all files below a folder, sorted; hidden ones and JUNK left out."""
    files = []
    for place, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        here = [os.path.realpath(path) + os.sep for path in (place, *Path(place).parents)]
        for name in list(folders):
            inside = os.path.realpath(os.path.join(place, name)) + os.sep
            if not is_shown(name) or any(path.startswith(inside) for path in here):  # a loop
                folders.remove(name)
        files += [Path(place, name) for name in names if is_shown(name)]
    return sorted(files)


def stop(error):
    if not isinstance(error, FileNotFoundError):
        raise error


def is_shown(name):
    return not name.startswith(".") and name not in JUNK


def counted(names):
    """The first name, on one line, and how many more there are."""
    first = " ".join(names[0].split())
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"


def hold_out(samples, share):
    """bool N: an even share of each class's samples, less than all, to be kept out of training."""
    held = np.zeros(len(samples), bool)
    for cls in {sample.cls for sample in samples}:
        mine = np.flatnonzero([sample.cls == cls for sample in samples])
        count = min(round(share * len(mine)), len(mine) - 1)
        held[mine[np.arange(count) * len(mine) // max(count, 1)]] = True
    return held


def digest(samples):
    """Of the images' names and sizes: a run is not resumed with others."""
    names = [Path(sample.image).name for sample in samples]
    sizes = [os.path.getsize(s.image) for s in samples if s.pixels is None]
    return hashlib.sha256(repr([names, sizes]).encode()).hexdigest()


# ------------------------------------------------------------------------ reading images and masks


@contextlib.contextmanager
def opened(path):
    """An image file of 8 bits a channel and one frame, not decoded yet. DataError: any other."""
    with explain(f"cannot read image {path}"):
        if not os.path.isfile(path):
            raise OSError("no such file")
        with Image.open(path, formats=FORMATS) as image:
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # a phone's, whose first frame is the photo
                raise ValueError(f"{frames} frames; save the one to use as 8 bit RGB")

            # Pillow narrows 16 bit RGB without a word; PNG's raw mode and TIFF's tag 258 tell.
            deep = image.format == "PNG" and ";16" in str(image.tile)
            if image.format == "TIFF":
                deep = max(image.tag_v2.get(258, [8])) > 8
            if deep:
                raise ValueError("more than 8 bits a channel; save it as 8 bit RGB")
            yield image


def read_image(path):
    """A file as an upright RGB image, alpha dropped; whether it has transparent pixels."""
    with opened(path) as file:
        image = ImageOps.exif_transpose(file)
        transparent = False
        if image.has_transparency_data:
            image = image.convert("RGBA")
            transparent = image.getchannel("A").getextrema()[0] < 255
        return image.convert("RGB"), transparent


def read_mask(sample):
    """bool H x W of a defective sample, at the mask's own size; whether it has many grey values.

    A label map is defect wherever it is not 0; a mask of many greys was smoothed or a JPEG: from
    half of its maximum on. DataError: its aspect is not the image's.
    """
    if sample.defect is not None:
        return sample.defect, False
    with opened(sample.image) as file:
        width, height = ImageOps.exif_transpose(file).size
    with opened(sample.mask) as file:
        image = ImageOps.exif_transpose(file)
        values = np.asarray(image.convert("RGB")).max(-1)
    h, w = values.shape
    if abs(width * h - height * w) > max(width, height):  # more than a pixel of rounding
        raise DataError(f"{sample.mask}: a mask of {w} x {h} for an image of {width} x {height}")

    mask = values > 0
    many_greys = len(np.unique(values[mask])) > 8 and values.max() >= 128
    if many_greys:
        mask = values >= values.max() / 2
    return mask, many_greys


# ---------------------------------------------------------------- decoding, and the cache of images


def resized(image, size, crop, method):
    """A PIL image resized to size x size, then its centre crop x crop, as an array."""
    return np.asarray(center_crop(image.resize((size, size), method), crop or size))


def in_threads(function, items, name):
    """Results of function(item) in order. DataError: the first that failed, and how many more."""

    def attempt(item):
        try:
            return function(item)
        except DataError as error:
            return error

    errors = []
    with ThreadPoolExecutor() as pool:
        results = pool.map(attempt, items)
        for result in tqdm(results, name, len(items), leave=False, disable=None, delay=1):
            if isinstance(result, DataError):
                errors.append(str(result))
            else:
                yield result
    if errors:
        raise DataError(counted(errors))


def decode(samples, size, crop=None, cache="cache"):
    """The samples' images, uint8 N x S x S x 3 (S = crop or size), RGB, bilinear.

    cache: a folder whose file of these images is used again, memory-mapped, while the files' names,
    sizes and times are the same. Warns of dropped alpha. DataError: an image that cannot be read.
    """
    side = crop or size
    record = np.dtype([("pixels", np.uint8, (side, side, 3)), ("transparent", bool)])

    def decode_one(sample):
        if sample.pixels is None:
            image, transparent = read_image(sample.image)
            return resized(image, size, crop, Image.Resampling.BILINEAR), transparent
        method = Image.Resampling.BILINEAR
        if sample.image.startswith("cifar10"):  # as UniAD
            method = Image.Resampling.LANCZOS
        return resized(Image.fromarray(sample.pixels), size, crop, method), False

    if not samples or samples[0].image.startswith("toy:"):
        table = np.fromiter(in_threads(decode_one, samples, "images"), record, len(samples))
    else:
        key = hashlib.sha256(repr([size, crop, *map(fingerprint, samples)]).encode()).hexdigest()
        path = Path(cache, f"{key[:32]}.npy")
        if not path.exists():
            os.makedirs(cache, exist_ok=True)
            with written(path) as temporary:
                table = np.lib.format.open_memmap(temporary, "w+", record, (len(samples),))
                for i, pixels in enumerate(in_threads(decode_one, samples, "images")):
                    table[i] = pixels
        with explain(f"{path}: damaged, delete it"):
            table = np.load(path, mmap_mode="r")

    transparent = [samples[i].image for i in np.flatnonzero(table["transparent"])]
    if transparent:
        log.warning(f"warning: alpha dropped, though some is transparent: {counted(transparent)}")
    return table["pixels"]


def fingerprint(sample):
    """What changes when an image file does; CIFAR-10's are known by their MD5."""
    if not os.path.exists(sample.image):
        return sample.image
    found = os.stat(sample.image)
    return os.path.abspath(sample.image), found.st_size, found.st_mtime_ns


def decode_masks(samples, size, crop=None):
    """bool N x S x S, nearest; zeros without a mask. Warns of odd masks. DataError as decode."""
    side = crop or size
    masks = np.zeros((len(samples), side, side), bool)
    known = [i for i, sample in enumerate(samples) if sample.mask]
    odd = defaultdict(list)

    def decode_one(i):
        mask, many_greys = read_mask(samples[i])
        masks[i] = resized(Image.fromarray(mask), size, crop, Image.Resampling.NEAREST)
        notes = []
        if many_greys:
            notes.append("note: masks of many greys, defect from half of their maximum on")
        if mask.mean() > 0.5:
            notes.append("warning: masks that mark more than half of their image")
        if not masks[i].any():
            notes.append(f"warning: masks without a defect, or none that is left at {side} pixels")
        return i, notes

    for i, notes in in_threads(decode_one, known, "masks"):
        for note in notes:
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
    found = {}  # as an ordered set: overlapping folders name a file once
    for path in map(Path, paths):
        files = [path]
        if path.is_dir():
            files = [file for file in list_files(path) if file.suffix.lower() in SUFFIXES]
        if not files or not files[0].exists():
            raise DataError(f"no image at {path}: expected a file or a folder of images")
        found.update(dict.fromkeys(map(str, files)))
    return list(found)


# --------------------------------------------------------------------------------- files and errors


@contextlib.contextmanager
def explain(text):
    """An error in the block becomes a DataError: the text and its reason."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{text}: {str(error)[:300] or type(error).__name__}") from None


@contextlib.contextmanager
def written(path):
    """A temporary name beside path, renamed to path when the block has written it."""
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        with explain(f"cannot write {path}"):
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_tensors(path):
    """The dict of a .safetensors file or of a torch checkpoint of tensors and plain containers."""
    with explain(f"{path}: not a readable checkpoint"):
        with open(path, "rb") as file:
            start = file.read(64).lstrip()
        if start.startswith(b"version https://git-lfs"):
            raise DataError(f"{path}: a Git LFS pointer, not the file itself; run git lfs pull")
        if start.startswith(b"<"):
            raise DataError(f"{path}: a web page, not the file itself; download it again")
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
    for key in "model", "models", "state_dict", "model_state_dict":
        if isinstance(state.get(key), dict):
            state = state[key]
    state = {
        str(key).replace(".", "_"): x for key, x in state.items()
    }  # timm: stages_0 is stages.0

    tensors = {}
    for key in net.state_dict():
        theirs = key_in_file(key).replace(".", "_")
        longer = [name for name in state if name.endswith(f"_{theirs}")]
        if theirs in state:
            tensors[key] = state[theirs]
        elif longer and not tensors:
            prefix = longer[0].removesuffix(theirs)
            raise DataError(f"{path}: its keys begin with {prefix!r}; save it without")
    with explain(f"{path}: does not fit"):
        net.load_state_dict(tensors)  # strict, but for BatchNorm's num_batches_tracked
    log.info(f"{len(tensors)} tensors loaded from {path}, {len(state) - len(tensors)} not needed")


# ---------------------------------------------------------------- the toy set
# Two textures and two objects, drawn from a seed that is the image's name

TOY = {
    "weave": ["blotch", "scratch", "stain"],
    "granite": ["blotch", "scratch", "stain"],
    "flange": ["missing", "scratch", "stain"],
    "pill": ["missing", "blotch", "stain"],
}
SCRATCH = {"weave": (250, 250, 250), "granite": (25, 25, 30), "flange": (190, 70, 20)}


def toy_image(name):
    """toy:CLASS/SPLIT/DEFECT/INDEX -> uint8 128 x 128 x 3; bool 128 x 128, where its defect is."""
    cls, _, defect, _ = name.removeprefix("toy:").split("/")
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    y, x = np.mgrid[:128, :128][..., None] - 63.5  # 128 x 128 x 1, as all below of one channel
    angle, dx, dy = rng.uniform((-0.06, -2, -2), (0.06, 2, 2))
    u = (x - dx) * np.cos(angle) + (y - dy) * np.sin(angle)
    v = (y - dy) * np.cos(angle) - (x - dx) * np.sin(angle)
    part, ground = -9.0, 0  # signed distance to the object's outline, and the colour around it
    if cls == "weave":
        s, t = u / 12 + rng.random(), v / 12 + rng.random()
        over = (np.floor(s) + np.floor(t)) % 2 == 0
        thread = 1 - np.abs(np.where(over, s, t) % 1 - 0.5)
        image = thread * np.where(over, (225, 190, 140), (190, 150, 105))
    elif cls == "granite":
        grain = rng.random((66, 66, 1)).repeat(2, 0).repeat(2, 1)
        grain = sum(grain[i : i + 128, j : j + 128] for i in range(3) for j in range(3)) / 9
        image = (110 + 110 * grain + 30 * rng.random((128, 128, 1))) * (1, 0.98, 0.95)
    elif cls == "flange":
        bolts = [
            6 - np.hypot(u - 32 * np.cos(k), v - 32 * np.sin(k)) for k in np.arange(6) * np.pi / 3
        ]
        part = np.maximum.reduce([np.hypot(u, v) - 46, 14 - np.hypot(u, v), *bolts])
        ground = 52, 58, 66
        image = (175 + 0.5 * u - 0.3 * v) * (1, 1, 1.03)
    else:
        part, ground = np.hypot(u - u.clip(-28, 28), v) - 22, (214, 212, 205)
        image = np.where(u < 0, (200, 60, 50), (240, 225, 150)) * (1 - (v / 36) ** 2)
    inside = np.clip(0.5 - part, 0, 1)  # 1 inside, 0 outside, smooth over a pixel
    image = ground + (image - ground) * inside
    shape, colour, strength = (
        np.full(x.shape, np.inf),
        0,
        0.9,
    )  # shape: signed distance to the outline
    if defect == "missing":  # a bite at the edge of the object
        side = rng.choice([-1, 1])
        a, b, radius = (
            (rng.uniform(-15, 15), 22 * side, 17) if cls == "pill" else (0, 44 * side, 21)
        )
        shape, colour, strength = np.hypot(u - a, v - b) - radius, ground, 1
    elif defect != "good":
        centre = rng.uniform(-1, 1, 2) * ((24, 6) if cls == "pill" else 38)
        a, b = centre / np.hypot(*centre) * 28 if cls == "flange" else centre  # there on its ring
        if defect == "scratch":  # a line with round ends
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
