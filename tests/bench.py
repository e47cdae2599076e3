"""Speed and cost of both methods beside the papers' figures; no data and no weights needed.

    python tests/bench.py mintad                 # Tables 6 and 9; --uniad, --query mlp
    python tests/bench.py minimaxad              # Fig. 4b
    python tests/bench.py minimaxad --size 256   # any setting of the script

Settings not given are those of MVTec AD (MINT-AD) and of GoodsAD (MiniMaxAD), where the papers
measure. A time is that of one call after a first one.

What Table 6 counts: its rows fit the counter thop, which knows a layer by its exact class. PaDiM's
68.88 M and 11.46 G are all of torchvision's wide_resnet50_2, with its classifier. UniAD's 6.27 M
and 0.92 G are the linear and normalisation layers of UniAD and of all of EfficientNet-PyTorch's b4,
with its unused classifier, but no convolution of it (a class of its own), no attention and no
parameter that lies in no such layer. MINT-AD is then 9.05 M and 1.14 G; the paper's 9.44 M and
1.13 G follow from no reading of Tables 11 to 15 that we tried (C 272 or 324, f' of 256 channels, no
adapter, P*Z 6272 or 8192, no INR output, 512 or no outputs of the distribution decoder).
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import metrics
import minimaxad
import mintad

B4 = 1_918_200, 69_858_048  # parameters and operations of b4 at 224 px that thop counts
TABLE6 = {
    "UniAD": {1: 0.032, 8: 0.068, 16: 0.089, 32: 0.146, 64: 0.2305},
    "MINT-AD": {1: 0.026, 8: 0.035, 16: 0.057, 32: 0.104, 64: 0.194},
}


def parameters(model):
    """{part: number of its parameters}."""
    parts = Counter()
    for name, p in model.named_parameters():
        parts[name.split(".")[0]] += p.numel()
    return parts


def multiply_adds(model, *inputs):
    """Of all matrix products and convolutions, attention's with them."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() // 2


def counted_by_thop(model, *inputs):
    """Parameters and operations of a model's linear and normalisation layers."""
    parameters = 0
    operations = 0

    def count(layer, _, output):
        nonlocal parameters, operations
        parameters += sum(p.numel() for p in layer.parameters())
        each = layer.in_features if isinstance(layer, nn.Linear) else 4
        operations += each * output.numel()

    layers = [x for x in model.modules() if type(x) in (nn.Linear, nn.LayerNorm)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    model(*inputs)
    for hook in hooks:
        hook.remove()
    return parameters, operations


def mebibytes(network):
    return sum(x.nbytes for x in network.state_dict().values()) / 2**20


def seconds(network, *inputs):
    for _ in range(2):  # a first time for its memory and kernels
        start = time.time()
        for x in network(*inputs):
            x.cpu()
    return time.time() - start


@torch.no_grad()
def bench_mintad(args, device, batches):
    """Prints Table 6's figures; the judge of bench_predict."""
    classes = args.classes or [str(k) for k in range(15)]
    shape = args.size, args.levels, args.pool
    backbone = mintad.Backbone(args.backbone, args.weights, *shape)
    detector = mintad.make_detector(args, mintad.new_state(args, classes), backbone)
    detector = detector.to(device).eval().requires_grad_(False)
    model = detector.model

    parts = parameters(model)
    text = ", ".join(f"{part} {count / 1e6:.3f}" for part, count in parts.items())
    print(f"parameters without the backbone: {parts.total() / 1e6:.2f} M: {text}")
    print("    Table 9: inr 0.602; as an MLP 383.5, which differs (README)")
    f = torch.zeros(1, backbone.H * backbone.W, backbone.C, device=device)
    label = torch.zeros(1, dtype=torch.long, device=device)
    print(f"multiply-adds without the backbone: {multiply_adds(model, f, label) / 1e9:.2f} G")
    own = counted_by_thop(model, f, label)
    counts = [(x + y) / d for x, y, d in zip(own, B4, (1e6, 1e9), strict=True)]
    print("as Table 6 counts, which leaves out attention and has b4's classifier (see above): ")
    print("    {:.2f} M, {:.2f} G; the paper: MINT-AD 9.44 M, 1.13 G".format(*counts), end="")
    print(", of which 0.39 M are unexplained; UniAD 6.27 M, 0.92 G")

    method = "UniAD" if args.uniad else "MINT-AD"
    for B in batches:
        image = torch.rand(B, 3, args.size, args.size, device=device)
        label = torch.arange(B, device=device) % len(classes)
        paper = TABLE6[method].get(B, "-")
        print(f"batch {B}: {seconds(detector, image, label):.4f} s (the paper's {method}: {paper})")

    def judge(pixels):
        labels = torch.arange(len(pixels)) % len(classes)
        s, scores, _ = mintad.infer(detector, pixels, labels, device)
        return s.numpy(), scores.numpy()

    return judge


@torch.no_grad()
def bench_minimaxad(args, device, batches):
    """Prints Fig. 4b's figures; the judge of bench_predict."""
    encoder = minimaxad.load_encoder(args.backbone, args.weights)
    model = minimaxad.MiniMaxAD(encoder, args.arch).eval()
    side = args.crop or args.size
    detector = minimaxad.Detector(model, args.score).to(device)
    print(f"storage: {mebibytes(model):.1f} MiB to train, {mebibytes(detector):.1f} MiB fused")
    print("    the paper: 119 MB, if MiB the fused network without the last downsampling")
    for B in batches:
        image = torch.rand(B, 3, side, side, device=device)
        print(f"batch {B}: {B / seconds(detector, image):.1f} images/s")
    print("    the paper: 40.7 at batch 1, GTX 1080 Ti, without efficient large kernels")

    def judge(pixels):
        return minimaxad.infer(detector, pixels, device)

    return judge


def bench_predict(judge, size, crop, device, photos):
    """--predict as it is, from a photo of a megapixel to a picture."""
    side = crop or size
    rng = np.random.default_rng(0)
    maps, scores = judge(rng.integers(0, 256, (4, side, side, 3), np.uint8))
    samples = [data.Sample("", 0, "0", "0")] * 4
    calibration = metrics.calibrate(maps, scores, samples, np.ones(4, bool))
    thresholds = {"": float(np.median(scores))}

    def judge_without_class(pixels):
        return *judge(pixels), [""] * len(pixels)

    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{i}.jpg" for i in range(photos)]
        for path in paths:
            pixels = rng.integers(0, 256, (256, 256, 3), np.uint8)
            Image.fromarray(pixels).resize((1024, 1024)).save(path)
        start = time.time()
        known = calibration, thresholds, folder
        batch_size = 4 if device.type == "cpu" else 32
        metrics.predict(paths, judge_without_class, *known, batch_size, size, crop)
        rate = photos / (time.time() - start)
    print(f"--predict: {rate:.1f} photos/s of 1024 x 1024, from file to picture")


SCRIPTS = {  # and the settings of the papers' measurements
    "mintad": (mintad, bench_mintad, "--data mvtec --weights none", (1, 8, 16, 32, 64)),
    "minimaxad": (minimaxad, bench_minimaxad, "--data goodsad --weights none", (1, 16)),
}


def main(argv=None, batches=None, photos=64):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("script", choices=SCRIPTS)
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="settings of that script")
    typed = parser.parse_args(argv)
    script, bench, settings, usual = SCRIPTS[typed.script]
    try:
        args, states = script.parse_args([*settings.split(), *typed.flags])
        if states:
            raise data.UserError("--eval, --resume: a benchmark takes settings, not a run")
        device = mintad.get_device(args.device)
        print(f"{args.backbone}, {args.size} px, {device}, {torch.get_num_threads()} threads")
        judge = bench(args, device, batches or usual)
        bench_predict(judge, args.size, getattr(args, "crop", None), device, photos)
    except data.UserError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
