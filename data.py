"""Every data set: where its images and masks lie, how they are read, and the cache of decoded images.

    load("mvtec", "data/mvtec")          which images train and test, their labels and masks
    decode(samples, 224, cache="cache")  their pixels, uint8 N x 224 x 224 x 3, decoded once, memory-mapped afterwards

A set is one short function below and one line of SETS. Label 1 means defective and comes from the folder or the csv,
never from the mask: a defect that resizing or cropping removes from the mask still makes a defective image.
"""
import contextlib
import csv
import difflib
import functools
import glob
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import signal
import stat
import sys
import time
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm


class DataError(Exception):
    """One line for the user: what is wrong, with which file or option, and what to do."""

    def __str__(self):
        return " ".join(super().__str__().splitlines())


def reason(error):
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class Sample(NamedTuple):
    image: str        # path; "FILE#INDEX" in a CIFAR-10 batch; "toy:CLASS/SPLIT/DEFECT/INDEX"
    label: int        # 0 good, 1 defective
    mask: str | None  # None: a good image, or a defective one whose mask is not known
    cls: str          # the class it trains as
    row: str          # the row of the result table it counts in: the class, AeBAD's domain or CIFAR-10's split


class Dataset(NamedTuple):
    name: str
    classes: list[str]
    train: list[Sample]
    test: list[Sample]


# ---------------------------------------------------------------------------------------------------------------------
# Layouts: one function each, (root, class) -> ("train" or "test", Sample) for every image

def mvtec(root, cls, good="good", masks_required=True):
    """CLASS/train/good/*, CLASS/test/good/*, CLASS/test/DEFECT/*, masks CLASS/ground_truth/DEFECT/* (see find_mask)."""
    base = root / cls
    splits = set(subfolders(base)) & {"train", "test"}
    if not splits:
        raise DataError(f"no images of class '{cls}': looked for {base}/train/{good} and {base}/test (--classes says "
                        "which classes to take)")
    if "train" in splits:
        for path in images(base / "train" / good, required=True):
            yield "train", Sample(path, 0, None, cls, cls)
    for defect in subfolders(base / "test") if "test" in splits else ():
        for path in images(base / "test" / defect):
            mask = None if defect == good else find_mask(path, base / "ground_truth" / defect, masks_required)
            yield "test", Sample(path, int(defect != good), mask, cls, cls)


def visa(root, cls):
    """Raw: split_csv/1cls.csv lists object, split, label, image, mask, relative to the root. Prepared: as mvtec."""
    lines = visa_csv(root)
    if not lines:
        yield from mvtec(root, cls)
    for _, split, label, image, mask in (line for line in lines if line[0] == cls):
        if (split, label) not in (("train", "normal"), ("test", "normal"), ("test", "anomaly")):
            raise DataError(f"{root / VISA_CSV}: {image} has split '{split}' and label '{label}'")
        for path in (image, mask) if label == "anomaly" else (image,):
            if not os.path.isfile(root / path):
                raise DataError(f"{root / VISA_CSV}: no file '{path}' of {image} in {root}")
        yield split, Sample(str(root / image), int(label == "anomaly"),
                            str(root / mask) if label == "anomaly" else None, cls, cls)


def aebad(root, cls):
    """train/good/DOMAIN/*, test/{good,DEFECT}/DOMAIN/*, masks ground_truth/DEFECT/DOMAIN/*; a row per domain."""
    splits = subfolders(root)
    for domain in subfolders(root / "train/good") if "train" in splits else ():
        for path in images(root / "train/good" / domain, required=True):
            yield "train", Sample(path, 0, None, cls, domain)
    for defect in subfolders(root / "test") if "test" in splits else ():
        for domain in subfolders(root / "test" / defect):
            for path in images(root / "test" / defect / domain):
                mask = None if defect == "good" else find_mask(path, root / "ground_truth" / defect / domain)
                yield "test", Sample(path, int(defect != "good"), mask, cls, domain)


def cifar10(root, cls, normals):
    """data_batch_1..5 train, test_batch tests; UniAD's protocol: five classes are normal, the other five anomalous."""
    number, normal = CIFAR10.index(cls), str(CIFAR10.index(cls)) in normals
    for batch in [*(f"data_batch_{i}" for i in range(1, 6) if normal), "test_batch"]:
        for index, label in enumerate(cifar10_batch(str(root / batch))[1]):
            if label == number:
                split = "test" if batch == "test_batch" else "train"
                yield split, Sample(f"{root / batch}#{index}", int(not normal), None, cls, normals)


def toy(root, cls):
    """28 train, 10 good and 12 defective test images, drawn by toy_image()."""
    for split, defect, count in ("train", "good", 28), ("test", "good", 10), *(("test", d, 4) for d in TOY[cls]):
        for name in (f"toy:{cls}/{split}/{defect}/{index:03d}" for index in range(count)):
            yield split, Sample(name, int(defect != "good"), None if defect == "good" else name, cls, cls)


# What the layouts are made of

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
VISA_CSV = "split_csv/1cls.csv"
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def images(folder, required=False):
    """Paths of the images in a folder, in natural order (2 before 10). Hidden and other files do not count."""
    paths = [str(Path(folder, name)) for name, is_folder in entries(folder) if is_image(name) and not is_folder]
    if required and not paths:
        raise DataError(f"no images in {folder}: looked for {' '.join(SUFFIXES)}")
    return paths


def subfolders(folder):
    return [name for name, is_folder in entries(folder) if is_folder and name not in ("split_csv", "__MACOSX")]


def entries(folder):
    """(name, whether it is a folder) of all that is not hidden. A broken or circular link is an error."""
    try:
        names = sorted((name for name in os.listdir(folder) if not name.startswith(".")), key=natural)
        return [(name, stat.S_ISDIR(os.stat(os.path.join(folder, name)).st_mode)) for name in names]
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {reason(error)}") from None


def is_image(path):
    return path.lower().endswith(SUFFIXES) and not os.path.basename(path).startswith(".")


def natural(name):
    return [int(part) if i % 2 else part.casefold() for i, part in enumerate(re.split(r"(\d+)", name))], name


def find_mask(image, folder, required=True):
    """The mask of a defective image: the first that exists of STEM_mask.png, STEM.png and STEM.bmp in the folder."""
    names = [Path(image).stem + tail for tail in ("_mask.png", ".png", ".bmp")]
    for name in names:
        if os.path.isfile(folder / name):
            return str(folder / name)
    if required:
        raise DataError(f"no mask of {image}: looked for {', '.join(names)} in {folder}")


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
            raise DataError(f"{path}: no column '{column}', found {', '.join(map(str, lines[0] if lines else []))}")
    return [tuple(line[column].strip() for column in columns) for line in lines]


def visa_classes(root):
    return list(dict.fromkeys(line[0] for line in visa_csv(root))) or subfolders(root)


class ArraysOnly(pickle.Unpickler):
    """Reads arrays and plain containers; whatever else a pickle asks for is refused and not run."""
    ALLOWED = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
               ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")
        return super().find_class(module, name)


@functools.lru_cache(6)
def cifar10_batch(path):
    """uint8 N x 32 x 32 x 3 and the N labels of one file of CIFAR-10's python version."""
    try:
        with open(path, "rb") as file:
            batch = ArraysOnly(file, encoding="latin1").load()
        labels = [int(label) for label in batch["labels"]]
        if batch["data"].dtype != np.uint8 or batch["data"].shape != (len(labels), 3072):
            raise ValueError("its data are not uint8 N x 3072")
        return batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels
    except Exception as error:         # a damaged pickle raises anything
        raise DataError(f"cannot read CIFAR-10 batch {path}: {type(error).__name__}: {reason(error)}") from None


# ---------------------------------------------------------------------------------------------------------------------
# The table of sets

class Set(NamedTuple):
    samples: Callable                   # a layout
    source: str                         # where it can be had; ends every error
    counts: tuple = ()                  # of a full copy: classes, train, good, defective; several if there are several
    inside: tuple = ()                  # folders that the root may hold instead of being one
    classes: Callable = subfolders      # root -> names


SETS = {
    "mvtec": Set(mvtec, "MVTec AD: https://www.mvtec.com/company/research/datasets/mvtec-ad", ((15, 3629, 467, 1258),)),
    "visa": Set(visa, "VisA: https://github.com/amazon-science/spot-diff", ((12, 8659, 962, 1200),), ("1cls",),
                visa_classes),
    "btad": Set(functools.partial(mvtec, good="ok"), "BTAD: https://github.com/pankajmishra000/VT-ADL",
                ((3, 1799, 451, 290),)),
    "goodsad": Set(mvtec, "GoodsAD: https://github.com/jianzhang96/GoodsAD", ((6, 3136, 1328, 1660),)),
    "mad": Set(mvtec, "MAD: https://github.com/EricLee0224/PAD", ((20,), (10,)), ("MAD-Sim", "MAD-Real")),
    "aebad": Set(aebad, "AeBAD: https://github.com/zhangzilongc/MMR", ((1, 521, 490, 1149),), ("AeBAD_S",),
                 lambda root: ["AeBAD_S"]),
    "cifar10": Set(cifar10, "CIFAR-10, python version: https://www.cs.toronto.edu/~kriz/cifar.html",
                   ((5, 25000, 5000, 5000),), ("cifar-10-batches-py",), lambda root: CIFAR10),
    "folder": Set(functools.partial(mvtec, masks_required=False),
                  "layout: ROOT/CLASS/{train/good,test/good,test/DEFECT,ground_truth/DEFECT}"),
    "toy": Set(toy, "built in", classes=lambda root: list(TOY)),
}
NAMES = list(SETS)


def load(names, root=None, classes=None, normals="01234", warn=print):
    """Lists the images of a set, or of several joined by "+", whose classes are then called "set/class".

    root: where the set lies, default data/NAME; of joined sets one folder that holds a folder per set, default data.
    classes: a subset. normals: the digits of CIFAR-10's five normal classes. warn: called with a line of text when
    the counts are not those of a full copy. train or test may be empty. Raises DataError.
    """
    parts = names.split("+")
    for name in parts:
        if name not in SETS:
            raise DataError(f"--data {names}: unknown set '{name}'{nearest(name, NAMES)}; known: {', '.join(NAMES)}")
    if len(parts) == 1:
        with hint(names):
            return load_one(names, Path(root or Path("data", names)).expanduser(), classes, normals, warn)
    if len(set(parts)) < len(parts):
        raise DataError(f"--data {names}: a set is named twice")
    joined = Dataset(names, [], [], [])
    for cls in classes or ():
        if cls.split("/")[0] not in parts:
            raise DataError(f"--classes {cls}: the classes of joined sets carry the set's name, as {parts[0]}/{cls}")
    for name in parts:
        own = [cls[len(name) + 1:] for cls in classes or () if cls.split("/")[0] == name]
        if own or not classes:
            part = load(name, Path(root or "data", name), own, normals, warn)
            joined.classes.extend(f"{name}/{cls}" for cls in part.classes)
            for into, samples in (joined.train, part.train), (joined.test, part.test):
                into.extend(s._replace(cls=f"{name}/{s.cls}", row=f"{name}/{s.row}") for s in samples)
    return joined


def load_one(name, root, classes, normals, warn):
    if name == "cifar10" and not (re.fullmatch("[0-9]{5}", normals) and len(set(normals)) == 5):
        raise DataError(f"--normals {normals}: expected five different digits, for example 01234")
    if name != "toy" and not os.path.isdir(root):
        raise DataError(f"no folder {root} (--root says where the data lies)")
    inside = [folder for folder in SETS[name].inside if os.path.isdir(root / folder)]
    if len(inside) > 1:
        raise DataError(f"{root} holds {' and '.join(inside)}: take one of them, for example --root {root / inside[0]}")
    root = root / inside[0] if inside else root
    found = SETS[name].classes(root)
    if "train" in found:               # the root is a class itself
        root, found = root.resolve().parent, [root.resolve().name]
    for cls in classes or ():
        if cls not in found:
            raise DataError(f"--classes {cls}: no such class in {root}{nearest(cls, found)}; found: {', '.join(found)}")
    chosen, train, test = [cls for cls in found if not classes or cls in classes], [], []
    more = {"normals": normals} if name == "cifar10" else {}
    for cls in chosen:
        for split, sample in SETS[name].samples(root, cls, **more):
            (train if split == "train" else test).append(sample)
    if not train and not test:
        raise DataError(f"no images in {root}")
    trained = {sample.cls for sample in train}
    if name == "cifar10":
        chosen = [cls for cls in chosen if cls in trained]
    for cls in chosen:
        if train and cls not in trained:
            raise DataError(f"class '{cls}' has no train images in {root}, others have")
    defective = sum(sample.label for sample in test)
    have, counts = (len(chosen), len(train), len(test) - defective, defective), SETS[name].counts
    if not classes and counts and not any(have[:len(count)] == count for count in counts):
        had, full = (", ".join(f"{n} {word}" for n, word in zip(numbers, ("classes", "train", "good", "defective")))
                     for numbers in (have, counts[0]))
        warn(f"warning: {name} in {root} has {had} images; a full copy has {full}")
    return Dataset(name, chosen, train, test)


def hold_out(samples, share):
    """bool N: an even share of each class's samples, at least one of which stays, to be kept out of the training."""
    held, index = np.zeros(len(samples), bool), {}
    for i, sample in enumerate(samples):
        index.setdefault(sample.cls, []).append(i)
    for mine in index.values():
        count = min(round(share * len(mine)), len(mine) - 1)
        held[[mine[j * len(mine) // count] for j in range(count)]] = True
    return held


def nearest(name, known):
    match = difflib.get_close_matches(name, known, 1)
    return f", did you mean '{match[0]}'?" if match else ""


@contextlib.contextmanager
def hint(name):
    """Adds to an error which set it is about and where that can be had."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{name}: {error}; {SETS[name].source}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Reading images and masks

BATCH_IMAGE = re.compile(r"(.*(?:data_batch_\d|test_batch))#(\d+)", re.DOTALL)    # "FILE#INDEX" of CIFAR-10


def read_image(name):
    """Any image as an RGB Pillow image: 16 bit values divided by 257, floats clipped to 0..255, alpha dropped.

    Raises DataError on a file that is missing, truncated, no image, or larger than Pillow's limit against bombs.
    """
    if name.startswith("toy:"):
        return Image.fromarray(toy_image(name)[0])
    if batch := BATCH_IMAGE.fullmatch(name):
        return Image.fromarray(cifar10_batch(batch[1])[0][int(batch[2])])
    with opened(name) as image:
        if image.mode.startswith(("I", "F")):
            values = np.nan_to_num(np.asarray(image).astype(float)) / (257 if image.mode[0] == "I" else 1)
            image = Image.fromarray((values.clip(0, 255) + 0.5).astype(np.uint8))
        return image.convert("RGBA" if image.mode == "P" else image.mode).convert("RGB")    # P may hold transparency


def read_mask(name):
    """bool H x W at the file's own size: nonzero in any channel but alpha. Raises DataError as read_image."""
    if name.startswith("toy:"):
        return toy_image(name)[1]
    with opened(name) as image:
        if image.mode[0] in "1IF" or image.mode == "L":
            return np.asarray(image) != 0
        return (np.asarray(image.convert("RGBA"))[..., :3] != 0).any(-1)


@contextlib.contextmanager
def opened(name):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(name) as image:
                image.load()
                yield image
    except Exception as error:         # Pillow's readers raise anything on a damaged file
        raise DataError(f"cannot read image {name}: {reason(error)}") from None


def find_images(patterns):
    """Files, folders (with subfolders; links to folders are not followed) and globs -> paths in natural order.

    Raises DataError for a pattern without an image.
    """
    def failed(error):
        raise DataError(f"cannot read {error.filename}: {error.strerror}")

    found = {}                         # as an ordered set: overlapping patterns name a file once
    for pattern in patterns:
        literal = os.path.lexists(pattern)
        matches = []
        for path in [pattern] if literal else sorted(glob.glob(pattern, recursive=True), key=natural):
            if os.path.isdir(path):
                matches += sorted((os.path.join(folder, file) for folder, _, files in os.walk(path, onerror=failed)
                                   for file in files if is_image(file)), key=natural)
            elif literal or is_image(path):
                matches.append(path)
        if not matches:
            raise DataError(f"no image at {pattern}: expected an image file, a folder of images or a glob")
        found.update(dict.fromkeys(matches))
    return list(found)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding, and the cache of decoded images

CACHE_VERSION = 1                      # part of the key: to be raised when the decoded bytes change
HEADER = 512                           # bytes before the pixels: one line of json
CHUNK = 16                             # images per task of a worker process
POOL_SECONDS = 10                      # less work than this is done before the processes have started


def decode(samples, size, crop=None, masks=False, cache=None, workers=None, name="", progress=True):
    """The samples' images or masks, resized to size x size, then the central crop x crop (S = crop or size).

    Returns uint8 N x S x S x 3 (RGB, bilinear), or with masks bool N x S x S (nearest; zeros without a mask): in
    memory, or with cache=DIR memory-mapped, read-only, from a file that is used again as long as the image files, their
    sizes and times and all that shapes the pixels are the same, and built anew when it is damaged.
    workers: processes, default all cores. Raises DataError: unreadable image, full disk, folder that cannot be written.
    """
    files = [sample.mask if masks else sample.image for sample in samples]
    shape = (len(files), crop or size, crop or size) + (() if masks else (3,))
    dtype = "bool" if masks else "uint8"
    with contextlib.closing(decoded(files, size, crop, masks, workers, name, progress)) as chunks:
        if cache is None or not files:
            array, done = np.empty(shape, dtype), 0
            for chunk in chunks:
                array[done:done + len(chunk)] = chunk
                done += len(chunk)
            return array
        made_from = [CACHE_VERSION, "nearest" if masks else "bilinear", size, crop, [fingerprint(f) for f in files]]
        head = {"key": hashlib.sha256(json.dumps(made_from).encode()).hexdigest(), "shape": list(shape), "dtype": dtype}
        path = Path(cache, f"{'masks' if masks else 'images'}-{shape[1]}-{head['key'][:16]}.bin")
        try:
            problem = cache_problem(path, head)
            if problem != "":
                if problem:
                    print(f"note: {path} {problem}: building it anew", file=sys.stderr)
                write_cache(path, head, chunks)
            return np.memmap(path, dtype, "r", HEADER, shape)
        except OSError as error:
            raise DataError(f"cannot keep {math.prod(shape) / 1e9:.2f} GB of decoded images in {cache}: "
                            f"{reason(error)}; name another folder with --cache DIR, or --cache none") from None


def write_cache(path, head, chunks):
    """A line of json (key, shape, dtype, CRC-32 of the rest) padded to HEADER bytes, then the pixels."""
    os.makedirs(path.parent, exist_ok=True)
    with atomic(path) as temporary, open(temporary, "wb") as file:
        file.write(b" " * HEADER)
        crc = 0
        for chunk in chunks:
            file.write(chunk)
            crc = zlib.crc32(chunk, crc)
        file.seek(0)
        file.write(json.dumps({**head, "crc32": crc}).encode().ljust(HEADER - 1) + b"\n")


def cache_problem(path, head):
    """Why a file cannot be used: "" if it can, None if there is none."""
    if not os.path.exists(path):
        return None
    with open(path, "rb") as file:
        try:
            stored = json.loads(file.read(HEADER))
            if {key: stored[key] for key in head} != head:
                return "holds other images"
            if os.path.getsize(path) != HEADER + math.prod(head["shape"]):
                return "has the wrong length"
            crc = 0
            while block := file.read(1 << 24):
                crc = zlib.crc32(block, crc)
            return "" if crc == stored["crc32"] else "has a wrong checksum"
        except (ValueError, KeyError, TypeError):
            return "has a damaged header"


def fingerprint(name):
    """What changes when an image file does."""
    if name is None or name.startswith("toy:"):
        return name
    try:
        batch = BATCH_IMAGE.fullmatch(name)
        found = os.stat(batch[1] if batch else name)
        return os.path.abspath(name), found.st_size, found.st_mtime_ns
    except OSError as error:
        raise DataError(f"cannot read image {name}: {reason(error)}") from None


def decoded(files, size, crop, masks, workers, name, progress):
    """Yields the pixels chunk by chunk, in order; from several processes where that pays."""
    work = functools.partial(decode_chunk, size=size, crop=crop, masks=masks)
    chunks = [files[i:i + CHUNK] for i in range(0, len(files), CHUNK)]
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with tqdm(total=len(files), desc=f"decoding {name}".strip(), unit="image", disable=None if progress else True) as bar, \
            contextlib.ExitStack() as stack:
        begin = time.perf_counter()
        first = list(map(work, chunks[:1]))
        run = map
        if workers > 1 and (time.perf_counter() - begin) * (len(chunks) - 1) > POOL_SECONDS:
            # spawn, not fork: the caller has threads. An interrupt is for the parent to handle.
            pool = ProcessPoolExecutor(min(workers, len(chunks) - 1), multiprocessing.get_context("spawn"),
                                       signal.signal, (signal.SIGINT, signal.SIG_IGN))
            stack.callback(pool.shutdown, cancel_futures=True)
            run = pool.map
        try:
            for pixels in itertools.chain(first, run(work, chunks[1:])):
                yield pixels
                bar.update(len(pixels))
        except BrokenProcessPool:
            raise DataError("a process that decodes images was killed (out of memory?): try --workers 1") from None


def decode_chunk(files, size, crop, masks):
    arrays = []
    for name in files:
        if masks:
            image = Image.fromarray(read_mask(name) if name else np.zeros((size, size), bool))
        else:
            image = read_image(name)
        image = image.resize((size, size), Image.Resampling.NEAREST if masks else Image.Resampling.BILINEAR)
        edge = round((size - (crop or size)) / 2)
        arrays.append(np.asarray(image.crop((edge, edge, edge + (crop or size), edge + (crop or size)))))
    return np.stack(arrays)


@contextlib.contextmanager
def atomic(path):
    """Yields a temporary path in path's folder and of its suffix; renamed to path at success, removed on any error."""
    temporary = os.path.join(os.path.dirname(path), f".tmp{os.getpid()}-{os.path.basename(path)}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())    # or a power failure could leave the new name with an empty file
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


# ---------------------------------------------------------------------------------------------------------------------
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
    u, v = (x - dx) * np.cos(angle) + (y - dy) * np.sin(angle), (y - dy) * np.cos(angle) - (x - dx) * np.sin(angle)
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
