"""Writes small copies of every layout, with the naming and the masks that the real sets have."""
import hashlib
import pickle
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10

import data

SIZE = 32


def image(path, seed=0, size=SIZE):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def mask(path, value=255, channels=1, size=SIZE):
    """A square defect of the given value; value 0: an empty mask."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size, size), np.uint8)
    pixels[4:12, 8:20] = value
    if channels == 3:                  # in one channel only, which is not the first
        pixels = np.stack([0 * pixels, 0 * pixels, pixels], -1)
    Image.fromarray(pixels).save(path)
    return path


def mvtec(root, classes=("bottle", "screw"), train=3, good=2, defects=("crack", "hole"), per_defect=2,
          suffix=".png",
          mask_name="{}_mask.png", good_name="good"):
    for c, cls in enumerate(classes):
        base = Path(root, cls)
        for i in range(train):
            image(base / "train" / good_name / f"{i:03d}{suffix}", 100 * c + i)
        for i in range(good):
            image(base / "test" / good_name / f"{i:03d}{suffix}", 100 * c + 10 + i)
        for d, defect in enumerate(defects):
            for i in range(per_defect):
                image(base / "test" / defect / f"{i:03d}{suffix}", 100 * c + 20 + 10 * d + i)
                if mask_name:
                    mask(base / "ground_truth" / defect / mask_name.format(f"{i:03d}"))
    return Path(root)


folder = mvtec


def visa_raw(root, classes=("candle", "pcb1")):
    lines = ["object,split,label,image,mask"]
    for cls in classes:
        for split, label, count in ("train", "normal", 3), ("test", "normal", 2), ("test", "anomaly", 2):
            for i in range(count):
                name = f"{cls}/Data/Images/{label.capitalize()}/{split}{i:03d}.JPG"
                image(Path(root, name), i)
                truth = f"{cls}/Data/Masks/Anomaly/{split}{i:03d}.png" if label == "anomaly" else ""
                if truth:
                    mask(Path(root, truth), value=1 + i)                  # class ids, not 255
                lines.append(f"{cls},{split},{label},{name},{truth}")
    Path(root, "split_csv").mkdir()
    Path(root, "split_csv/1cls.csv").write_text("\n".join(lines) + "\n")
    return Path(root)


def visa_prepared(root, classes=("candle", "pcb1"), level="1cls"):
    mvtec(Path(root, level), classes, defects=("bad",), suffix=".JPG", mask_name="{}.png")
    for cls in classes:
        mask(Path(root, level, cls, "ground_truth/bad/001.png"), value=3, channels=3)
    return Path(root)


def btad(root):
    for cls, suffix, mask_suffix in ("01", ".bmp", ".png"), ("02", ".png", ".png"), ("03", ".bmp", ".bmp"):
        mvtec(root, [cls], defects=("ko",), suffix=suffix, mask_name="{}" + mask_suffix, good_name="ok")
    mask(Path(root, "02/ground_truth/ko/001.png"), value=0)               # defective, with an empty mask
    return Path(root)


def goodsad(root):
    return mvtec(root, ("cigarette_box", "drink_bottle"), defects=("opened",), suffix=".jpg",
                 mask_name="{}.png")


def mad(root):
    mvtec(Path(root, "MAD-Sim"), ("01Gorilla", "02Unicorn"), defects=("Burrs", "Missing", "Stains"))
    mvtec(Path(root, "MAD-Real"), ("Bear", "Bird"), defects=("Stains",), mask_name="{}.png")
    return Path(root)


def aebad(root):
    for domain in "same", "background", "illumination":  # view is a domain of the test images only
        for i in range(2):
            image(Path(root, "AeBAD_S/train/good", domain, f"IMG_{i}.png"), i)
    for domain in "same", "background", "illumination", "view":
        for defect in "good", "ablation", "groove":
            for i in range(2):
                image(Path(root, "AeBAD_S/test", defect, domain, f"IMG_{i}.png"), i)
                if defect != "good":
                    mask(Path(root, "AeBAD_S/ground_truth", defect, domain, f"IMG_{i}.png"))
    return Path(root)


def cifar10(root, monkeypatch, per_class=2):
    """Batches of 20 images; torchvision is told their MD5."""
    base = Path(root, "cifar-10-batches-py")
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for batch in *(f"data_batch_{i}" for i in range(1, 6)), "test_batch":
        labels = list(range(10)) * per_class
        content = {"batch_label": batch, "labels": labels, "filenames": [f"{label}.png" for label in labels],
                   "data": rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8)}
        (base / batch).write_bytes(pickle.dumps(content, protocol=2))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": data.CIFAR10}))
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in base.iterdir()}
    monkeypatch.setattr(CIFAR10, "train_list",
                        [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    data.cifar10_arrays.cache_clear()
    return Path(root)
