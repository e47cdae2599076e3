"""Nearest-neighbour memory bank to compare MINT-AD with: one bank per class, of all its patches.

    python tests/memory_bank.py --data mvtec --root DIR --backbone NAME --weights FILE --pool area

A patch is the feature of one position, each channel divided by its deviation over the class's
training images. Map: the distance to the nearest training patch, enlarged. Score: its maximum.
--pool bilinear and area have MINT-AD's features and enlargement, so that only the methods differ.
--pool blur averages levels 4, 8 and 16 over 3 x 3 positions and resizes by half-pixel centres.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import metrics
import mintad


class Blurred(mintad.Backbone):
    """Images B x 3 x S x S in 0..1 -> patches B x P x C of the levels 4, 8 and 16."""

    def forward(self, image):
        levels = self.net((image - self.image_mean) / self.image_std)[1:]
        levels = [F.avg_pool2d(x, 3, stride=1, padding=1) for x in levels]
        levels = [F.interpolate(x, (self.H, self.W), mode="bilinear") for x in levels]
        return torch.cat(levels, 1).flatten(2).transpose(1, 2)  # B x C x H x W -> B x P x C


@torch.no_grad()
def bank_maps(backbone, train, test, device):
    """Maps M x S x S of test images, uint8 M x S x S x 3; train: N x S x S x 3 of their class."""

    def features(images):  # N x P x C
        labels = torch.zeros(len(images))
        return mintad.infer(lambda image, _: [backbone(image)], images, labels, device)[0]

    f = features(train)
    _, std = mintad.channel_statistics(f)
    bank = (f / std).flatten(0, 1).to(device)  # N x P x C -> N*P x C
    nearest = []
    for x in features(test) / std:  # an image at a time: P x N*P distances are 50 to 200 MB
        nearest.append(torch.cdist(x.to(device), bank).amin(1))
    s = torch.stack(nearest).unflatten(1, (1, backbone.H, backbone.W))  # M x P -> M x 1 x H x W
    aligned = backbone.pool == "bilinear"
    s = F.interpolate(s, test.shape[1:3], mode="bilinear", align_corners=aligned)
    return s.squeeze(1).cpu().numpy()


def compare(args):
    """{row: metrics} of the data set; prints a line per class."""
    classes, train, test = data.load(args.data, args.root, args.classes)
    images = data.decode(train, args.size)
    test_images = data.decode(test, args.size)
    masks = data.decode_masks(test, args.size)
    device = torch.device(args.device)
    torch.manual_seed(0)  # an untrained backbone is the same each time
    kind = Blurred if args.pool == "blur" else mintad.Backbone
    backbone = kind(args.backbone, args.weights, args.size, pool=args.pool).to(device)

    maps = np.zeros(masks.shape, np.float32)
    for cls in classes:
        start = time.time()
        own = np.flatnonzero([sample.cls == cls for sample in train])
        mine = np.flatnonzero([sample.cls == cls for sample in test])
        if len(mine):
            maps[mine] = bank_maps(backbone, images[own], test_images[mine], device)
        print(f"{cls}: {time.time() - start:.0f} s", flush=True)

    results = {}
    for row in dict.fromkeys(sample.row for sample in test):
        index = np.flatnonzero([sample.row == row for sample in test])
        s = maps[index]
        results[row] = metrics.evaluate([test[i] for i in index], s.max((1, 2)), s, masks[index])
    return results


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sets = [name for name in data.SETS if name != "cifar10"]  # its anomalies have no bank
    parser.add_argument("--data", choices=sets, default="toy")
    parser.add_argument("--root", help="where the data lies, if not in data/NAME")
    parser.add_argument("--classes", nargs="+", help="a subset")
    parser.add_argument("--backbone", default="tf_efficientnet_b4.aa_in1k", help="any timm CNN")
    parser.add_argument("--weights", help="its checkpoint, or none: untrained")
    parser.add_argument("--pool", choices=["blur", "bilinear", "area"], default="blur")
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    try:
        print(metrics.table([compare(parser.parse_args(argv))], {}))
    except data.DataError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
