"""Writes small copies of every data set's layout, with the names and the masks of the real ones."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10

SQUARE = np.zeros((32, 32), bool)  # the defect of every mask
SQUARE[4:12, 8:20] = True


def save(path, pixels, **options):
    """Pixels as a file, whose folders are made; returns its path as text."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return str(path)


def image(path, seed=0, size=32):
    return save(path, np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


def mask(path, value=255):
    return save(path, SQUARE * np.uint8(value))


def mvtec(
    root,
    classes=("bottle", "screw"),
    counts=(3, 2, 2),
    defects=("crack", "hole"),
    suffix=".png",
    mask_name="{}_mask.png",
    good="good",
):
    """counts: to train, good, of each defect. mask_name: of an image's stem; None: no masks."""
    folders = {f"train/{good}": counts[0], f"test/{good}": counts[1]}
    folders |= {f"test/{defect}": counts[2] for defect in defects}
    for c, cls in enumerate(classes):
        for f, (folder, count) in enumerate(folders.items()):
            for i in range(count):
                image(Path(root, cls, folder, f"{i:03d}{suffix}"), 1000 * c + 100 * f + i)
                if mask_name and f > 1:
                    truth = folder.replace("test", "ground_truth")
                    mask(Path(root, cls, truth, mask_name.format(f"{i:03d}")))
    return Path(root)


def visa_raw(root, classes=("candle", "pcb1")):
    """Masks hold class ids, not 255."""
    lines = ["object,split,label,image,mask"]
    for cls in classes:
        for i, part in enumerate(["train,normal"] * 3 + ["test,normal"] * 2 + ["test,anomaly"] * 2):
            name = f"{cls}/Data/Images/{part.split(',')[1].capitalize()}/{i:03d}.JPG"
            truth = f"{cls}/Data/Masks/Anomaly/{i:03d}.png" if i > 4 else ""
            image(Path(root, name), 10 * len(lines) + i)
            if truth:
                mask(Path(root, truth), i)
            lines.append(f"{cls},{part},{name},{truth}")
    Path(root, "split_csv").mkdir()
    Path(root, "split_csv/1cls.csv").write_text("\n".join(lines) + "\n")
    return Path(root)


def btad(root):
    for cls, suffix, mask in ("01", "bmp", "png"), ("02", "png", "png"), ("03", "bmp", "bmp"):
        mvtec(root, [cls], (3, 2, 2), ["ko"], f".{suffix}", f"{{}}.{mask}", "ok")
    return Path(root)


def aebad(root):
    """AeBAD_S/KIND/DOMAIN; view is a domain of the test images only."""
    for d, domain in enumerate(["same", "background", "illumination", "view"]):
        for k, kind in enumerate(["train/good", "test/good", "test/ablation", "test/groove"]):
            for i in range(2 if d < 3 or k else 0):
                image(Path(root, "AeBAD_S", kind, domain, f"IMG_{i}.png"), 100 * d + 10 * k + i)
                if k > 1:
                    truth = kind.replace("test", "ground_truth")
                    mask(Path(root, "AeBAD_S", truth, domain, f"IMG_{i}.png"))
    return Path(root)


def cifar10(root, monkeypatch):
    """Batches of 20 images, two of each class in turn, whose MD5 torchvision is told."""
    rng = np.random.default_rng(0)
    content = {"batches.meta": {"label_names": [str(i) for i in range(10)]}}
    for name in *(f"data_batch_{i}" for i in range(1, 6)), "test_batch":
        pixels = rng.integers(0, 256, (20, 3072), np.uint8)
        content[name] = {"labels": list(range(10)) * 2, "data": pixels}
    sums = []
    for name, values in content.items():
        path = Path(root, "cifar-10-batches-py", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(values))
        sums.append([name, hashlib.md5(path.read_bytes()).hexdigest()])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums[0][1]})
    monkeypatch.setattr(CIFAR10, "train_list", sums[1:6])
    monkeypatch.setattr(CIFAR10, "test_list", sums[6:])
    return Path(root)
