"""Nearest neighbour memory bank to compare the methods with: one bank per class, of all training patches.

    python tests/memory_bank.py --data mvtec --root DIR --backbone NAME --weights FILE --size 224

Patch: a position of a frozen backbone's levels, each averaged over 3 x 3 positions (zeros beyond the border)
and resized to stride 16, every channel divided by its deviation over the class's training images. Map:
distance to the nearest training patch, bilinear to the image size. Score: the map's maximum. Unlike the
methods' maps, nothing is resized with aligned corners, which made the bank worse.
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

class Patches(mintad.Backbone):
    """Images B x 3 x S x S in 0..1 -> patches B x P x C, not divided yet."""

    def forward(self, image):
        levels = [F.avg_pool2d(x, 3, 1, 1) for x in self.net((image - self.image_mean) / self.image_std)]
        levels = [F.interpolate(x, (self.H, self.W), mode="bilinear") for x in levels]
        return torch.cat(levels, 1).flatten(2).transpose(1, 2)  # B x C x H x W -> B x P x C

@torch.no_grad()
def bank_maps(backbone, train, test, device):
    """Maps M x S x S of uint8 M x S x S x 3 test images, by N x S x S x 3 training images of their class."""
    f, f_test = (mintad.extract(backbone, x, device) for x in (train, test))
    std = mintad.channel_statistics(f)[1].to(device)
    bank = f.to(device).flatten(0, 1).float() / std  # N*P x C
    # An image at a time: P x N*P distances are 50 to 200 MB.
    nearest = [torch.cdist(x.to(device).float() / std, bank).amin(1) for x in f_test]
    maps = torch.stack(nearest).view(-1, 1, backbone.H, backbone.W)  # M x 1 x H x W
    return F.interpolate(maps, test.shape[1:3], mode="bilinear").squeeze(1).cpu().numpy()

def compare(args):
    """Returns metrics.evaluate's result for the data set; prints a line per class."""
    device, dataset = mintad.start(args.device), data.load(args.data, args.root, args.classes)
    train, test = (data.decode(samples, args.size) for samples in (dataset.train, dataset.test))
    masks = data.decode(dataset.test, args.size, masks=True)
    torch.manual_seed(0)  # an untrained backbone is the same each time
    backbone = Patches(args.backbone, args.size, args.weights, args.levels).to(device)
    maps = np.zeros(masks.shape, np.float32)
    for cls in dataset.classes:
        start = time.time()
        fit, mine = ([i for i, sample in enumerate(samples) if sample.cls == cls]
                     for samples in (dataset.train, dataset.test))
        if mine:
            maps[mine] = bank_maps(backbone, train[fit], test[mine], device)
        print(f"{cls}: {time.time() - start:.0f} s", flush=True)
    return metrics.evaluate(dataset.test, maps.max((1, 2)), maps, masks, print)

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sets = [name for name in data.SETS if name != "cifar10"]  # its anomalies have no bank
    parser.add_argument("--data", choices=sets, default="toy")
    parser.add_argument("--root", metavar="DIR", help="where the data lies (default data/NAME)")
    parser.add_argument("--classes", nargs="+", metavar="A", help="a subset of the classes")
    parser.add_argument("--backbone", default=mintad.PAPER["backbone"], metavar="NAME", help="any timm CNN")
    parser.add_argument("--weights", metavar="FILE|none", help="its checkpoint (default: timm's download)")
    parser.add_argument("--levels", type=int, nargs="+", default=[4, 8, 16], help="strides, 16 among them")
    parser.add_argument("--size", type=int, default=mintad.PAPER["size"], help="pixels (default %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:N or mps (default: the best there is)")
    try:
        print(metrics.table(compare(parser.parse_args(argv))))
    except data.DataError as error:
        parser.exit(2, f"error: {error}\n")

if __name__ == "__main__":
    main()
