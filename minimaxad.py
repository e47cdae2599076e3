"""MiniMaxAD: A Lightweight Autoencoder for Feature-Rich Anomaly Detection, arXiv 2405.09933.

A frozen ImageNet network (UniRepLKNet-N) turns an image into feature maps at three scales. A bottleneck and a decoder
that mirrors the network learn to reproduce these maps for normal images; where they fail, the image is anomalous.
Implemented: the encoder in five sizes, or any timm CNN in its place; bottleneck and decoder; the four losses; fusion of
the network for inference; the paper's baseline, Reverse Distillation (`--arch rd`).

Where the paper and the authors' code disagree, or this file departs from both, the line says so.

    B  batch    C  channels    H, W  height, width    k = 1, 2, 3  scale, at strides 4, 8, 16
    maps        list of three tensors B x C_k x H_k x W_k, from fine to coarse
    S           anomaly map, B x H x W at the image's size

    python minimaxad.py                                                # built-in toy set, no data, no download
    python minimaxad.py --data goodsad --weights unireplknet_n.pth     # MiniMaxAD-fr, one model per class (Table 4)
    torchrun --nproc_per_node=4 minimaxad.py --data mvtec --unified --weights unireplknet_n.pth           # Table 3
    python minimaxad.py --data visa --unified --arch rd --loss global                            # Table 7, first line
    python minimaxad.py --eval runs/minimaxad-goodsad-separate/seed1-drink_can.pt --predict photos/

The random state is set from (seed, epoch, process) at the start of each epoch: a resumed run needs no more than the
checkpoint to continue bit by bit.
"""
import argparse
import copy
import difflib
import math
import os
import sys
import time
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import metrics

# ---------------------------------------------------------------- presets

RICH, POOR = {"loss": "adc"}, {"loss": "global"}  # feature-rich sets: MiniMaxAD-fr, feature-poor sets: MiniMaxAD-fp
OPTIMISER = {"lr": 5e-3, "weight_decay": 5e-5, "gamma": 0.995, "batch_size": 16}  # weight decay: authors' code 1e-5
PRESETS = {  # (set, unified?); sets that the paper does not use take the nearest of these (find_preset)
    ("goodsad", False): {"size": 224, "epochs": 240, **RICH},
    ("mad", False): {"size": 400, "epochs": 150, **RICH},
    ("mvtec", True): {"size": 256, "epochs": 100, **RICH},
    ("visa", True): {"size": 256, "epochs": 100, **RICH},  # authors' code 160 epochs
    ("visa", False): {"size": 256, "epochs": 130, **POOR},  # authors' code 150 epochs
    ("aebad", False): {"size": 256, "crop": 224, "epochs": 130, **POOR},
}
RD = {"backbone": "wide_resnet50_2.tv_in1k", "size": 256, "epochs": 200, "gamma": 1.0, "loss": "global",
      "weight_decay": 0.0}
TOY = {"size": 128, "epochs": 6, "loss": "adc", "backbone": "unireplknet_a"}
RD_TOY = {"backbone": "resnet18", "loss": "global", "gamma": 1.0, "weight_decay": 0.0}

# The paper's I-AUROC in %: Tables 3, 4, A6, per class, the last the mean.
MVTEC = ("carpet grid leather tile wood bottle cable capsule hazelnut metal_nut pill screw toothbrush transistor zipper "
         "mean").split()
VISA = ("candle capsules cashew chewinggum fryum macaroni1 macaroni2 pcb1 pcb2 pcb3 pcb4 pipe_fryum mean").split()
GOODSAD = "cigarette_box drink_bottle drink_can food_bottle food_box food_package mean".split()
MAD = ("01Gorilla 02Unicorn 03Mallard 04Turtle 05Whale 06Bird 07Owl 08Sabertooth 09Swan 10Sheep 11Pig 12Zalika 13Pheonix "
       "14Elephant 15Parrot 16Cat 17Scorpion 18Obesobeso 19Bear 20Puppy mean").split()
AEBAD = "same background illumination view mean".split()
FIGURES = {  # (set, unified?, arch, loss): (rows, {metric: figures})
    ("mvtec", True, "minimax", "adc"): (MVTEC, {"i_auroc": (
        99.9, 98.2, 100, 100, 99.4, 100, 99.0, 96.0, 100, 100, 97.9, 94.1, 98.9, 97.6, 99.7, 98.7)}),
    ("mvtec", True, "rd", "global"): (MVTEC, {"i_auroc": (
        98.3, 99.0, 100, 98.1, 99.3, 79.9, 86.8, 96.3, 100, 99.8, 92.8, 96.5, 97.5, 93.3, 98.6, 95.8)}),
    ("visa", True, "minimax", "adc"): (VISA, {"i_auroc": (
        98.7, 91.3, 97.8, 98.9, 96.8, 98.5, 89.4, 98.0, 97.0, 97.5, 99.8, 99.7, 97.0)}),
    ("visa", True, "rd", "global"): (VISA, {"i_auroc": (
        93.6, 67.8, 94.6, 95.3, 94.4, 97.2, 86.2, 96.5, 93.0, 94.5, 100, 99.7, 92.7)}),
    ("goodsad", False, "minimax", "adc"): (GOODSAD, {
        "i_auroc": (97.8, 80.4, 90.8, 91.0, 78.9, 77.3, 86.0), "p_aupr": (60.0, 49.2, 49.1, 63.0, 20.0, 30.7, 45.3),
        "aupro": (86.2, 86.8, 87.0, 92.8, 83.9, 87.5, 87.4)}),
    ("goodsad", False, "rd", "global"): (GOODSAD, {
        "i_auroc": (65.1, 67.2, 63.3, 76.6, 63.3, 63.5, 66.5), "p_aupr": (23.7, 12.5, 17.4, 25.4, 5.8, 7.7, 15.4),
        "aupro": (72.7, 84.2, 81.9, 84.3, 75.9, 79.4, 79.7)}),
    ("aebad", False, "minimax", "global"): (AEBAD, {
        "i_auroc": (86.4, 90.7, 87.2, 85.9, 87.6), "aupro": (81.4, 82.1, 86.0, 77.8, 81.8)}),
    ("aebad", False, "rd", "global"): (AEBAD, {
        "i_auroc": (82.4, 84.3, 84.3, 71.9, 81.0), "aupro": (86.4, 86.4, 86.7, 82.9, 85.6)}),
    ("mad", False, "minimax", "adc"): (MAD, {"i_auroc": (
        72.1, 92.9, 89.1, 88.4, 78.8, 90.8, 84.3, 93.0, 88.4, 94.6, 86.2, 82.0, 74.8, 85.9, 80.8, 70.6, 87.0, 89.9, 89.4,
        75.2, 84.7)}),
    ("mad", False, "rd", "global"): (MAD, {"i_auroc": (
        75.5, 73.9, 53.6, 77.0, 59.2, 74.5, 70.2, 69.0, 56.7, 76.9, 71.5, 57.6, 58.6, 61.0, 51.9, 65.4, 67.4, 81.8, 72.0,
        62.3, 66.8)}),
    ("visa", False, "minimax", "global"): (["mean"], {"i_auroc": (96.4,), "aupro": (90.4,)}),  # Table 2
    ("visa", False, "rd", "global"): (["mean"], {"i_auroc": (96.0,), "aupro": (70.9,)}),
} | {key: (["mean"], {"i_auroc": (value,)}) for key, value in {  # Table 7
    ("goodsad", False, "minimax", "local"): 80.2, ("visa", True, "minimax", "local"): 93.0,
    ("aebad", False, "minimax", "local"): 86.1, ("visa", False, "minimax", "local"): 94.4,
    ("goodsad", False, "minimax", "local-hm"): 80.6, ("visa", True, "minimax", "local-hm"): 96.3,
    ("aebad", False, "minimax", "local-hm"): 85.4, ("visa", False, "minimax", "local-hm"): 95.6,
    ("goodsad", False, "minimax", "global"): 77.6, ("visa", True, "minimax", "global"): 92.7,
    ("aebad", False, "minimax", "adc"): 84.6, ("visa", False, "minimax", "adc"): 95.4}.items()}


A4 = {(0.999, 0.995): 85.6, (0.999, 0.9999): 86.0, (0.999, 1.0): 85.7, (0.9995, 0.995): 85.8, (0.9995, 1.0): 85.9,
      (0.9999, 0.995): 85.4, (0.9999, 0.9999): 85.6, (0.9999, 1.0): 85.2}  # (p_lim, p_hard): I-AUROC on GoodsAD
A5 = {0.999: 81.2, 0.9999: 77.3}  # p_lim of local-hm


def paper_figures(args, found):
    """{row: {metric: the paper's figure}} for this set, setting, architecture and loss, {} if it gives none.

    found: the rows of our result. A mean, and anything of a unified model, compares only over all of the paper's classes.
    """
    unified = args.unified and args.data != "aebad"  # AeBAD is one class
    backbone = {"minimax": "unireplknet_n", "rd": RD["backbone"]}[args.arch]
    rows, figures = FIGURES.get((args.data, unified, args.arch, args.loss), ((), {}))
    classes = {"mvtec": MVTEC, "visa": VISA, "goodsad": GOODSAD, "mad": MAD, "aebad": AEBAD}.get(args.data, ["mean"])[:-1]
    complete = set(classes) <= set(found)
    if args.backbone != backbone or (unified and not complete) or \
            args.size != PRESETS.get((args.data, unified), {"size": 256})["size"]:
        return {}
    if (args.p_lim, args.p_hard) != (0.9995, 0.9999) and args.loss in ("adc", "local-hm"):
        value = A4.get((args.p_lim, args.p_hard)) if args.loss == "adc" else A5.get(args.p_lim)
        fits = value and complete and (args.data, args.arch) == ("goodsad", "minimax")
        return {"mean": {"i_auroc": round(value / 100, 3)}} if fits else {}
    return {row: {metric: round(values[i] / 100, 3) for metric, values in figures.items()} for i, row in enumerate(rows)
            if row in found or row == "mean" and complete}


# ---------------------------------------------------------------- layers


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of B x C x H x W."""

    def __init__(self, channels, learned=True):
        super().__init__(channels, eps=1e-6, elementwise_affine=learned)

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # B x C x H x W


class GRN(nn.Module):
    """Global response normalisation of B x H x W x C."""

    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x):
        g = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)  # B x 1 x 1 x C
        n = g / (g.mean(-1, keepdim=True) + 1e-6)  # Eq. 5
        scale = self.gamma * n + 1
        return x * scale if self.beta is None else torch.addcmul(self.beta, x, scale)  # Eq. 6


class SE(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels):
        super().__init__()
        self.down = nn.Conv2d(channels, channels // 4, 1)
        self.up = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x):
        return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


def depthwise(channels, kernel, dilation=1):
    return nn.Conv2d(channels, channels, kernel, padding=dilation * (kernel - 1) // 2, dilation=dilation,
                     groups=channels, bias=False)


class DilatedReparam(nn.Module):
    """Depthwise 13 x 13 convolution plus parallel small dilated ones, each with its BatchNorm, summed."""

    BRANCHES = (5, 1), (7, 2), (3, 3), (3, 4), (3, 5)  # kernel, dilation: all reach within 13 x 13

    def __init__(self, channels):
        super().__init__()
        self.lk_origin, self.origin_bn = depthwise(channels, 13), nn.BatchNorm2d(channels)
        for kernel, dilation in self.BRANCHES:
            self.add_module(f"dil_conv_k{kernel}_{dilation}", depthwise(channels, kernel, dilation))
            self.add_module(f"dil_bn_k{kernel}_{dilation}", nn.BatchNorm2d(channels))

    def branches(self):
        """Pairs of convolution and BatchNorm, the 13 x 13 one first."""
        modules = list(self.children())
        return zip(modules[0::2], modules[1::2])

    def forward(self, x):
        return sum(bn(conv(x)) for conv, bn in self.branches())

    def fused(self):
        """One 13 x 13 convolution that gives the same output in eval mode."""
        merged, *others = (fold(conv, bn) for conv, bn in self.branches())
        for conv in others:
            reach, step = conv.padding[0], conv.dilation[0]
            inside = slice(6 - reach, 7 + reach, step)  # where the dilated kernel's taps fall in the large one
            merged.weight.data[:, :, inside, inside] += conv.weight.data
            merged.bias.data += conv.bias.data
        return merged


def layout(x):
    """Channels last on CPU, which trains faster there; first elsewhere, as torch's own CUDA depthwise kernels are."""
    return x.contiguous(memory_format=torch.channels_last if x.device.type == "cpu" else torch.contiguous_format)


class Block(nn.Module):
    """UniRepLKNet's block: SmaK with a depthwise 3 x 3, LarK with the dilated reparam 13 x 13 convolution."""

    def __init__(self, channels, kernel):
        super().__init__()
        self.dwconv = DilatedReparam(channels) if kernel == 13 else depthwise(channels, kernel)
        self.norm = nn.BatchNorm2d(channels)
        self.se = SE(channels)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.grn = GRN(4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x):
        x = layout(x)
        y = self.se(self.norm(self.dwconv(x)))
        y = F.gelu(self.pwconv1(y.permute(0, 2, 3, 1)))  # B x H x W x 4C
        y = self.pwconv2(self.grn(y)).permute(0, 3, 1, 2)  # B x C x H x W
        return torch.addcmul(x, self.norm2(y), self.gamma[:, None, None])


class Residual(nn.Module):
    """ResNet's block, basic or (width < out / 2) bottleneck; mode "down" halves the size, "up" doubles it."""

    def __init__(self, in_channels, width, out_channels, mode="same"):
        super().__init__()
        if width == out_channels:
            convs = [conv(in_channels, width, 3, mode), conv(width, out_channels, 3)]
        else:
            convs = [conv(in_channels, width, 1), conv(width, width, 3, mode), conv(width, out_channels, 1)]
        self.residual = nn.Sequential(*[m for c in convs for m in (c, nn.BatchNorm2d(c.out_channels), nn.ReLU())][:-1])
        self.shortcut = nn.Sequential()
        if mode != "same" or in_channels != out_channels:
            self.shortcut = nn.Sequential(conv(in_channels, out_channels, 1, mode), nn.BatchNorm2d(out_channels))

    def forward(self, x):
        return F.relu(self.residual(x) + self.shortcut(x))


def conv(in_channels, out_channels, kernel, mode="same"):
    """Convolution without bias: "down" halves the size (rounded up), "up" doubles it (transposed, 2 x 2)."""
    if mode == "up":
        return nn.ConvTranspose2d(in_channels, out_channels, 2, 2, bias=False)
    return nn.Conv2d(in_channels, out_channels, kernel, 2 if mode == "down" else 1, kernel // 2, bias=False)


def conv_bn_relu(in_channels, out_channels):
    return nn.Sequential(conv(in_channels, out_channels, 3, "down"), nn.BatchNorm2d(out_channels), nn.ReLU())


def fold(layer, bn):
    """A copy of a convolution or linear layer with the BatchNorm after it folded in."""
    layer, scale = copy.deepcopy(layer), bn.weight / (bn.running_var + bn.eps).sqrt()  # C
    shape = [1] * layer.weight.ndim
    shape[1 if isinstance(layer, nn.ConvTranspose2d) else 0] = -1  # the output channels
    bias = 0 if layer.bias is None else layer.bias
    layer.weight = nn.Parameter((layer.weight * scale.view(shape)).detach())
    layer.bias = nn.Parameter((bn.bias + (bias - bn.running_mean) * scale).detach())
    return layer


def fuse(model):
    """A copy of the model for inference that gives, up to rounding, the same output as the model in eval mode.

    Each dilated reparam becomes one convolution, each BatchNorm goes into the layer before it (taken to be the one
    registered before it, as it is here and in timm), each GRN's beta into the layer after it.
    """
    model = copy.deepcopy(model).eval()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, DilatedReparam):
                setattr(parent, name, child.fused())
        for (name, layer), (bn_name, bn) in pairwise(list(parent.named_children())):
            linear = isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
            if linear and type(bn) in (nn.BatchNorm2d, nn.SyncBatchNorm):
                setattr(parent, name, fold(layer, bn))
                setattr(parent, bn_name, nn.Identity())
        if isinstance(parent, Block) and parent.grn.beta is not None:
            parent.pwconv2.bias.data += parent.pwconv2.weight @ parent.grn.beta.flatten()
            parent.grn.beta = None
    return model.requires_grad_(False)


# ---------------------------------------------------------------- model

UNIREPLKNET = {  # channels of the first stage, doubled from stage to stage; kernel sizes of the blocks of stages 1 to 3
    "unireplknet_a": (40, [3] * 2, [13] * 2, [13] * 6),
    "unireplknet_f": (48, [3] * 2, [13] * 2, [13] * 6),
    "unireplknet_p": (64, [3] * 2, [13] * 2, [13] * 6),
    "unireplknet_n": (80, [3] * 2, [13] * 2, [13] * 8),
    "unireplknet_t": (80, [3] * 3, [13] * 3, [13, 3] * 9),
}


def stage(channels, kernels):
    return nn.Sequential(*(Block(channels, kernel) for kernel in kernels))


class UniRepLKNet(nn.Module):
    """Stem and stages 1 to 3 of UniRepLKNet: B x 3 x H x W -> maps."""

    def __init__(self, name):
        super().__init__()
        c, *self.kernels = UNIREPLKNET[name]
        self.channels = [c, 2 * c, 4 * c]
        self.downsample_layers = nn.ModuleList([
            nn.Sequential(nn.Conv2d(3, c // 2, 3, 2, 1), LayerNorm(c // 2), nn.GELU(),
                          nn.Conv2d(c // 2, c, 3, 2, 1), LayerNorm(c)),
            nn.Sequential(nn.Conv2d(c, 2 * c, 3, 2, 1), LayerNorm(2 * c)),
            nn.Sequential(nn.Conv2d(2 * c, 4 * c, 3, 2, 1), LayerNorm(4 * c)),
        ])
        self.stages = nn.ModuleList(map(stage, self.channels, self.kernels))
        # The authors' norm0..2 are not in the ImageNet checkpoint and not trained: weight 1 and bias 0 to the end.
        self.norms = nn.ModuleList(LayerNorm(channels, learned=False) for channels in self.channels)

    def forward(self, image):
        x, maps = layout(image), []
        for downsample, stage, norm in zip(self.downsample_layers, self.stages, self.norms):
            x = stage(downsample(x))
            maps.append(norm(x))
        return maps


class TimmEncoder(nn.Module):
    """A timm CNN's features at strides 4, 8, 16; its decoder has as many blocks as UniRepLKNet-N's."""

    def __init__(self, name, pretrained):
        super().__init__()
        with torch.device("meta"):
            info = timm.create_model(name, features_only=True).feature_info
        index = dict(zip(info.reduction(), info.out_indices))
        if not {4, 8, 16} <= index.keys():
            raise data.DataError(f"--backbone {name}: has features at strides {sorted(index)}, not at 4, 8 and 16")
        self.net = timm.create_model(name, pretrained, features_only=True, out_indices=[index[s] for s in (4, 8, 16)])
        if "NHWC" in str(getattr(self.net, "output_fmt", "")):
            raise data.DataError(f"--backbone {name}: not a CNN")
        self.kernels, self.channels = UNIREPLKNET["unireplknet_n"][1:], self.net.feature_info.channels()

    def forward(self, image):
        return self.net(layout(image))


def load_encoder(name, weights, log=print):
    """The frozen encoder, fused for inference: standardised images B x 3 x H x W -> maps.

    name: a key of UNIREPLKNET or any timm CNN that has features at strides 4, 8 and 16.
    weights: FILE, .safetensors or torch.save, its tensors at the top level or under "model", "models" or "state_dict";
    "none": untrained; None: timm's download.
    The encoder's buffers mean and std, 3 x 1 x 1, standardise RGB in 0..1.
    Raises DataError: unknown name, unreadable file, missing or misshapen tensor.
    """
    mean, std = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
    if name in UNIREPLKNET:
        if weights is None:
            raise data.DataError(f"--backbone {name}: pass --weights FILE, an ImageNet-1K checkpoint linked from "
                                 "https://github.com/AILab-CVC/UniRepLKNet, or --weights none for an untrained encoder")
        encoder = net = UniRepLKNet(name)
    elif timm.is_model(name):
        try:
            encoder = TimmEncoder(name, pretrained=weights is None)
        except data.DataError:
            raise
        except Exception as error:  # no such tag, no features, the many ways a download can fail
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise data.DataError(f"--backbone {name}: {reason} (without a network: --weights FILE or none)") from None
        net, config = encoder.net, timm.data.resolve_model_data_config(encoder.net)
        mean, std = config["mean"], config["std"]
    else:
        close = difflib.get_close_matches(name, [*timm.list_models(), *UNIREPLKNET], 1, cutoff=0)[0]
        raise data.DataError(f"--backbone {name}: unknown, did you mean {close}?")
    encoder.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
    encoder.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    needed = {authors_key(key) if name in UNIREPLKNET else key: value for key, value in net.state_dict().items()
              if not key.endswith("num_batches_tracked")}
    if weights == "none":
        log(f"{name}: untrained, {len(needed)} tensors at random (--weights none)")
    elif weights is None:
        log(f"{name}: {len(needed)} tensors from timm's download")
    else:
        found = read_weights(weights)
        missing = [key for key in needed if flat(key) not in found]
        if missing:
            raise data.DataError(f"--weights {weights}: {missing[0]} is missing, in all {len(missing)} of the "
                                 f"{len(needed)} tensors that {name} needs")
        for key, value in needed.items():
            new = found[flat(key)]
            if new.shape != value.shape:
                raise data.DataError(f"--weights {weights}: {key} has shape {list(new.shape)}, "
                                     f"{name} needs {list(value.shape)}")
            value.copy_(new)
        log(f"{name}: {len(needed)} tensors loaded from {weights}, {len(found) - len(needed)} others in it not needed")
    return fuse(encoder)


def read_weights(path):
    """{flat(key): tensor} of a checkpoint."""
    try:
        if str(path).endswith(".safetensors"):
            state = safetensors.torch.load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # training scripts save their arguments beside
                state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise data.DataError(f"--weights {path}: no such file") from None
    except Exception as error:  # a damaged file can raise anything
        raise data.DataError(f"--weights {path}: not a readable checkpoint ({type(error).__name__})") from None
    for key in ("model", "models", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise data.DataError(f"--weights {path}: holds a {type(state).__name__}, not named tensors")
    return {flat(key): value for key, value in state.items() if torch.is_tensor(value)}


def flat(key):
    """In timm's feature networks "stages.0" is "stages_0"."""
    return str(key).replace(".", "_")


def authors_key(key):
    """A tensor's name in the authors' UniRepLKNet files."""
    for ours, theirs in (("pwconv1", "pwconv1.1"), ("grn", "act.1"), ("pwconv2", "pwconv2.0"), ("norm2", "pwconv2.2")):
        key = key.replace(f".{ours}.", f".{theirs}.")
    return key


class Bottleneck(nn.Module):
    """Brings three maps to the size and width of the third, then `compress`es them: -> B x 2C_3 x H_3/2 x W_3/2."""

    def __init__(self, channels, compress):
        super().__init__()
        c1, c2, c3 = channels
        self.from1 = nn.Sequential(*conv_bn_relu(c1, c2), *conv_bn_relu(c2, c3))
        self.from2 = nn.Sequential(*conv_bn_relu(c2, c3))
        self.compress = compress

    def forward(self, maps):
        x = torch.cat([self.from1(maps[0]), self.from2(maps[1]), maps[2]], 1)  # B x 3C_3 x H_3 x W_3
        return self.compress(x)


class Decoder(nn.Module):
    """Three stages, each doubling the size: B x 2C_3 x H_3/2 x W_3/2 -> maps."""

    def __init__(self, stages):
        super().__init__()
        self.stages = nn.ModuleList(stages)  # coarse to fine

    def forward(self, x):
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.insert(0, x)
        return maps


def minimax(encoder):
    """MiniMaxAD's bottleneck and decoder."""
    widths, stages = encoder.channels, []
    channels = 2 * widths[2]
    compress = nn.Sequential(nn.Conv2d(3 * widths[2], channels, 3, 2, 1), stage(channels, [3, 3]))
    for width, kernels in zip(widths[::-1], encoder.kernels[::-1]):  # the mirrored encoder
        stages.append(nn.Sequential(nn.ConvTranspose2d(channels, width, 2, 2), LayerNorm(width), stage(width, kernels)))
        channels = width
    return Bottleneck(widths, compress), Decoder(stages)


def reverse_distillation(encoder):
    """Bottleneck and decoder of the baseline: residual stages."""
    layers = [getattr(getattr(encoder, "net", None), f"layer{k}", None) for k in (1, 2, 3)]
    if None in layers:
        raise data.DataError("--arch rd needs a ResNet: --backbone wide_resnet50_2.tv_in1k, resnet18.tv_in1k, ...")
    outputs, stages = encoder.channels, []
    widths, depths = [layer[0].conv1.out_channels for layer in layers], [len(layer) for layer in layers]
    channels = 2 * outputs[2]
    compress = residual_stage(3 * outputs[2], 2 * widths[2], channels, "down", depths[0])
    for width, output, depth in zip(widths[::-1], outputs[::-1], depths):  # depths not reversed: so in RD's code
        stages.append(residual_stage(channels, width, output, "up", depth))
        channels = output
    return Bottleneck(outputs, compress), Decoder(stages)


def residual_stage(in_channels, width, out_channels, mode, depth):
    return nn.Sequential(Residual(in_channels, width, out_channels, mode),
                         *(Residual(out_channels, width, out_channels) for _ in range(depth - 1)))


class MiniMaxAD(nn.Module):
    """Frozen encoder, bottleneck and decoder: standardised images B x 3 x H x W -> encoder's maps, decoder's maps.

    arch: "minimax", or "rd" for Reverse Distillation, which needs a timm ResNet as encoder (otherwise DataError).
    """

    def __init__(self, encoder, arch="minimax"):
        super().__init__()
        self.encoder = encoder
        self.bottleneck, self.decoder = (reverse_distillation if arch == "rd" else minimax)(encoder)
        for module in (*self.bottleneck.modules(), *self.decoder.modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def train(self, mode=True):
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, image):
        with torch.no_grad():
            encoder_maps = self.encoder(image)
        return encoder_maps, self.decoder(self.bottleneck(encoder_maps))


def storage(model):
    """Size of the model's tensors in MiB."""
    return sum(tensor.nbytes for tensor in model.state_dict().values()) / 2**20


# ---------------------------------------------------------------- losses
#
# Every loss is this process's part of the loss of the global batch, which may be split unevenly: the parts add up to
# what one process gets for the whole batch, and so do their gradients. So gradients are to be summed, not averaged.


def processes():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(x):
    """Sum of a tensor over the processes, without gradient."""
    x = x.detach().clone()
    if processes() > 1:
        dist.all_reduce(x)
    return x


def total_size(size, device):
    return size if processes() == 1 else total(torch.tensor(size, device=device)).item()


def quantile(x, p):
    """p-quantile of the elements of x over all processes, interpolated linearly as torch.quantile does.

    Exact for any number of elements (torch.quantile refuses more than 2^24 before torch 2.15) and fast for p near 1.
    """
    x = x.detach().flatten()
    n = total_size(x.numel(), x.device)
    rank = p * (n - 1)
    k = n - int(rank)  # the k largest end at the element just below the rank
    top = x.topk(min(k, x.numel())).values
    if processes() > 1:  # the k largest of all are among the k largest of each
        top = F.pad(top, (0, k - top.numel()), value=-math.inf)
        parts = [torch.empty_like(top) for _ in range(processes())]
        dist.all_gather(parts, top)
        top = torch.cat(parts).topk(k).values
    below, above = top[k - 1], top[max(k - 2, 0)]
    return below + (above - below) * (rank - int(rank))


def variance(x):
    """Variance of the elements of x over all processes."""
    n = total_size(x.numel(), x.device)
    mean = total(x.sum()) / n
    return total((x.detach() - mean).square().sum()) / (n - 1)


def adc_threshold(S, p_hard=0.9999, p_lim=0.9995):
    """Eq. 8: the value of S^2 from which on a pixel is mined, as a tensor without dimensions."""
    S = S.detach()
    alpha = quantile(S, p_hard)  # of S, although it is S^2 that is compared: so in the paper and in the authors' code
    beta = quantile(S.square(), p_lim)
    sigma2 = variance(S)
    A = total((S.square() >= alpha - sigma2).sum())
    N = total_size(S.numel(), S.device) * (1 - p_lim)
    return torch.where((A >= N) & (A > 0), alpha, beta) - sigma2  # p_lim 1 makes N 0


def mined_mean(S, threshold):
    """Mean of S^2 over the pixels with S^2 >= threshold, and their number in the global batch (Figure 4a)."""
    squares = S.square()
    mined = squares >= threshold
    count = total(mined.sum())
    return (squares * mined).sum() / count, count


def local_loss(S):
    """Eq. 7: mean of S^2; S is B x H x W."""
    return mined_mean(S, 0)[0]


def local_hm_loss(S, p_lim=0.9995):
    """Eq. 9: mean of S^2 from its p_lim-quantile on."""
    return mined_mean(S, quantile(S.square(), p_lim))[0]


def adc_loss(S, p_hard=0.9999, p_lim=0.9995):
    """Eq. 8: mean of S^2 from adc_threshold on."""
    return mined_mean(S, adc_threshold(S, p_hard, p_lim))[0]


def global_loss(encoder_maps, decoder_maps):
    """Eq. 2: 1 - cosine of the flattened maps, summed over the scales, mean over the batch."""
    batch = total_size(len(encoder_maps[0]), encoder_maps[0].device)
    pairs = zip(encoder_maps, same_size(encoder_maps, decoder_maps))
    distances = [1 - F.cosine_similarity(e.float().flatten(1), d.float().flatten(1)) for e, d in pairs]  # 3 times B
    return sum(distances).sum() / batch


def training_loss(name, encoder_maps, decoder_maps, size, p_hard=0.9999, p_lim=0.9995):
    """The loss "local", "local-hm", "adc" or "global" of size x size images, and how many pixels in all enter it."""
    if name == "global":
        pixels = len(encoder_maps[0]) * size**2
        return global_loss(encoder_maps, decoder_maps), total(torch.tensor(pixels, device=encoder_maps[0].device))
    S = anomaly_map(encoder_maps, decoder_maps, size, "nearest")
    if name == "adc":
        return mined_mean(S, adc_threshold(S, p_hard, p_lim))
    return mined_mean(S, quantile(S.square(), p_lim) if name == "local-hm" else 0)


# ---------------------------------------------------------------- anomaly map and score


def same_size(encoder_maps, decoder_maps):
    """The decoder's maps, resized (nearest) to the encoder's: at 400 pixels 104, 52, 26 to 100, 50, 25."""
    return [d if d.shape == e.shape else F.interpolate(d, e.shape[2:]) for e, d in zip(encoder_maps, decoder_maps)]


def anomaly_map(encoder_maps, decoder_maps, size, mode):
    """Eq. 4: S, B x H x W with (H, W) = size or (size, size), from 0 (as expected) to 6.

    mode: how the scales are brought to that size: "nearest" (training) or "bilinear", corners aligned (test).
    """
    S, options = 0, {"align_corners": True} if mode == "bilinear" else {}
    for e, d in zip(encoder_maps, same_size(encoder_maps, decoder_maps)):
        M = 1 - F.cosine_similarity(e.float(), d.float(), dim=1)  # Eq. 3, B x H_k x W_k
        S = S + F.interpolate(M[:, None], size, mode=mode, **options)[:, 0]  # B x H x W
    return S  # authors' code: S / 3 at test time


def gaussian_blur(S, radius, mirror, sigma=4.0):
    """B x H x W convolved with a Gaussian cut off at radius; beyond the border zero, or mirrored (c b a | a b c)."""
    offsets = torch.arange(-radius, radius + 1, device=S.device)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    weights = weights / weights.sum()
    matrices = []
    for length in S.shape[1:]:
        position = torch.arange(length, device=S.device)[:, None] + offsets  # length x (2 radius + 1)
        inside = torch.full_like(position, mirror, dtype=torch.bool) | (position >= 0) & (position < length)
        position = position % (2 * length)
        position = torch.minimum(position, 2 * length - 1 - position)
        matrix = torch.zeros(length, length, dtype=S.dtype, device=S.device)
        matrices.append(matrix.scatter_add(1, position, (weights * inside).to(S.dtype)))
    rows, columns = matrices
    return rows @ S @ columns.T


def image_score(S, score="max"):
    """The blurred map, B x H x W, and the image scores, B.

    score: "max" or "mean" of the map blurred as by scipy.ndimage.gaussian_filter(sigma=4) (Reverse Distillation and
    the authors' first evaluation), or "top1": mean of the top 1 % after a 5 x 5 kernel of sigma 4 (their later one).
    """
    S = gaussian_blur(S, 2, mirror=False) if score == "top1" else gaussian_blur(S, 16, mirror=True)
    pixels = S.flatten(1)  # B x HW
    if score == "top1":
        return S, pixels.topk(max(1, pixels.shape[1] // 100)).values.mean(1)
    return S, pixels.mean(1) if score == "mean" else pixels.amax(1)


def map_variance(maps):
    """Figure 3c: variance of the L2-normalised maps, summed over the scales.

    At most the sum of 1 / C_k, reached at mean zero: 0.0219 for UniRepLKNet-N, 0.0068 for a ResNet-50.
    """
    return sum(F.normalize(m.float(), dim=1).var() for m in maps)


# ---------------------------------------------------------------- train

STATE = ("name", "settings", "root", "seed", "classes", "epoch", "model", "optimizer", "normal", "result")
SETTINGS = ("data", "unified", "classes", "normals", "arch", "backbone", "weights", "loss", "p_hard", "p_lim", "size",
            "crop", "augment", "epochs", "batch_size", "lr", "weight_decay", "gamma", "amp", "holdout", "score")


def train(model, images, index, settings, seed, device, path, state):
    """Train bottleneck and decoder in place on images[index], a checkpoint after each epoch, from where state stops."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if settings["arch"] == "rd":
        optimizer = torch.optim.Adam(parameters, settings["lr"], betas=(0.5, 0.999), weight_decay=settings["weight_decay"])
    else:
        optimizer = torch.optim.AdamW(parameters, settings["lr"], betas=(0.9, 0.999),
                                      weight_decay=settings["weight_decay"])
    if state["optimizer"]:
        optimizer.load_state_dict(state["optimizer"])
    size, B, epochs = settings["crop"] or settings["size"], settings["batch_size"], settings["epochs"]
    steps = -(-len(index) // B)
    if 0 < len(index) % B < WORLD:
        steps -= 1  # a last batch smaller than the number of processes would leave one without an image
    if steps < 1:
        raise data.DataError(f"{len(index)} training images are too few for {WORLD} processes")
    bar = progress(None, path.stem, total=epochs * steps, initial=state["epoch"] * steps)
    for epoch in range(state["epoch"], epochs):
        start, losses, mined = time.time(), 0.0, 0.0
        for group in optimizer.param_groups:
            group["lr"] = settings["lr"] * settings["gamma"] ** epoch
        order = torch.randperm(len(index), generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
        torch.manual_seed((1_000_003 * seed + epoch) * 4099 + RANK)  # augmentation; nothing else is random
        model.train()
        for batch in order.split(B)[:steps]:
            part = batch[RANK::WORLD]  # each process takes its share of the same global batch
            x = to_device(images[index[part].numpy()], device)
            if settings["augment"]:
                x = AUGMENT(size)(x)
            with torch.autocast(device.type, torch.bfloat16, enabled=settings["amp"]):
                encoder_maps, decoder_maps = model((x - model.encoder.mean) / model.encoder.std)
            loss, count = training_loss(settings["loss"], encoder_maps, decoder_maps, size,
                                        settings["p_hard"], settings["p_lim"])
            optimizer.zero_grad()
            loss.backward()
            sum_gradients(parameters)
            optimizer.step()
            losses, mined = losses + total(loss).item() / steps, mined + count.item() / steps
            bar.update()
        spread = [map_variance(maps).item() for maps in (encoder_maps, decoder_maps)]
        if not math.isfinite(losses):
            raise data.DataError(f"training diverged in epoch {epoch + 1}; the last checkpoint is good. Lower --lr")
        log(f"{path.stem} epoch {epoch + 1}/{epochs}: {settings['loss']} loss {losses:.5f}, mined pixels {mined:.0f}, "
            f"variance of the maps {spread[0]:.5f} encoder {spread[1]:.5f} decoder, {time.time() - start:.1f} s", bar)
        share_buffers(model)
        state.update(epoch=epoch + 1, model=model.state_dict(), optimizer=optimizer.state_dict())
        save(path, state)
    bar.close()


def AUGMENT(size):
    """The authors' augmentation for AeBAD, on the decoded images: random resized crop and horizontal flip, per image."""
    from torchvision.transforms import v2
    one = v2.Compose([v2.RandomResizedCrop(size, scale=(0.8, 1.0), antialias=True), v2.RandomHorizontalFlip()])
    return lambda x: torch.stack([one(image) for image in x])


def sum_gradients(parameters):
    """Sum the gradients over the processes, in one message; the losses are parts of a global mean (see there)."""
    if WORLD > 1:
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(grad.view_as(p))


def share_buffers(model):
    """Process 0's BatchNorm statistics for all: on a CPU torch cannot synchronise them during training."""
    if WORLD > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def save(path, state):
    if RANK == 0:
        try:
            with data.atomic(path) as temporary:
                torch.save(state, temporary)
        except (OSError, RuntimeError) as error:  # torch.save raises the latter on a full disk
            raise data.DataError(f"cannot write {path} ({' '.join(str(error).split())[:120]}); its last version is whole, "
                                 "--resume goes on from it") from None


# ---------------------------------------------------------------- evaluate


class Inference(nn.Module):
    """The fused network as --eval, --predict and --export run it: image B x 3 x S x S in 0..1 -> S, score."""

    def __init__(self, model, size, score):
        super().__init__()
        self.model, self.size, self.score = fuse(model), size, score

    def forward(self, image):
        encoder = self.model.encoder
        encoder_maps, decoder_maps = self.model((image - encoder.mean) / encoder.std)
        return image_score(anomaly_map(encoder_maps, decoder_maps, self.size, "bilinear"), self.score)


@torch.no_grad()
def infer(network, images, device, quiet=False):
    """Anomaly maps N x S x S and image scores N (numpy), in full precision, of uint8 images N x S x S x 3.

    Every process computes its share; process 0 gets all, the others None.
    """
    maps, scores = [torch.zeros(0, network.size, network.size)], [torch.zeros(0)]
    for batch in progress(torch.arange(len(images))[RANK::WORLD].split(16), "evaluate", off=quiet):
        S, score = network(to_device(images[batch.numpy()], device))
        maps.append(S.cpu())
        scores.append(score.cpu())
    maps, scores = (gather(torch.cat(x), len(images), device) for x in (maps, scores))
    return (None, None) if maps is None else (maps.numpy(), scores.numpy())


def to_device(images, device):
    """uint8 N x S x S x 3 -> float N x 3 x S x S in 0..1."""
    return torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 255


def gather(x, N, device):
    """Rows RANK::WORLD of every process -> all N rows on process 0, None elsewhere."""
    if WORLD == 1:
        return x
    x = F.pad(x, (0, 0) * (x.ndim - 1) + (0, -(-N // WORLD) - len(x))).to(device)
    parts = [torch.empty_like(x) for _ in range(WORLD)] if RANK == 0 else None
    dist.gather(x, parts)
    return torch.stack(parts, 1).flatten(0, 1)[:N].cpu() if RANK == 0 else None  # n x WORLD x .. -> N x ..


# ---------------------------------------------------------------- run


def run(args):
    try:
        device = start(args)
    except (RuntimeError, AssertionError) as error:
        raise data.DataError(f"--device {args.device}: not usable here ({str(error).splitlines()[0][:120]})") from None
    if args.bench:
        return bench(args, device)
    states, asked = [], args.classes
    if args.eval:
        states = load_run(args.eval)
        vars(args).update(states[0]["settings"], seed=sorted({state["seed"] for state in states}))
        args.root = args.root or states[0]["root"]
        for state in states:
            if state["normal"] is None:
                said = f"the training of {state['name']} stopped after epoch {state['epoch']} of {args.epochs}"
                if args.predict or args.export or args.save_maps:
                    raise data.DataError(f"--eval {args.eval}: {said}; finish it with --resume")
                log(f"warning: {said}")
    folder = run_folder(args)
    if args.predict or args.export:
        if len(states) > 1:
            raise data.DataError(f"--eval {args.eval}: it holds {len(states)} models; name one of its .pt files")
        if WORLD > 1:
            raise data.DataError("--predict and --export run in one process, without torchrun")
        return (export if args.export else predict)(args, states[0], folder, device, asked)

    cache = None if args.cache == "none" or args.data == "toy" else args.cache
    dataset = data.load(args.data, args.root, args.classes, args.normals, warn=log)
    crop = None if args.augment else args.crop  # the augmentation crops by itself
    decode = lambda samples, name, crop=args.crop, masks=False: data.decode(
        samples, args.size, crop, masks=masks, cache=cache, workers=args.workers, name=name, progress=RANK == 0)
    test_images = in_turn(lambda: decode(dataset.test, "test images"))
    masks = in_turn(lambda: decode(dataset.test, "masks", masks=True))
    results = {}
    for state, network in map(lambda s: (s, restore(s, device)), states) if args.eval else \
            train_all(args, dataset, lambda: decode(dataset.train, "training images", crop), folder, device):
        index = [i for i, s in enumerate(dataset.test) if args.unified or s.cls in state["classes"]]
        if (args.eval or not state["result"] or args.save_maps or args.save_tiff) and index:
            samples = [dataset.test[i] for i in index]
            maps, scores = infer(network, test_images[index], device)
            if RANK == 0:
                state["result"] = metrics.evaluate(samples, scores, maps, masks[index])["classes"]
                if args.save_maps:
                    metrics.save_maps(folder / "maps" / f"seed{state['seed']}", samples, test_images[index],
                                      masks[index], maps, scores, state["normal"], args.quantile)
                if args.save_tiff:
                    metrics.save_tiff(folder / "tiff" / f"seed{state['seed']}", samples, maps)
        if not args.eval:
            state["optimizer"] = None  # finished: it is not needed any more
            save(folder / f"{state['name']}.pt", state)
        results.setdefault(state["seed"], {}).update(state["result"] or {})
    if RANK == 0:
        result = metrics.over_seeds({seed: {"classes": rows, "mean": metrics.mean(rows)}
                                     for seed, rows in results.items()})
        log(metrics.table(result, paper_figures(args, result["classes"])))
        metrics.save_json(folder / "metrics.json", {"seed": args.seed, **{key: getattr(args, key) for key in SETTINGS}},
                          result)
        log(f"written to {folder}")


def train_all(args, dataset, decode, folder, device):
    """Train a model per seed and, unless --unified, per class; yields (state, network for inference) of each."""
    settings = {key: getattr(args, key) for key in SETTINGS}
    log(f"minimaxad.py: {', '.join(f'{key} {value}' for key, value in settings.items())}, seeds {args.seed}, "
        f"{WORLD} process(es), {device}")
    if not dataset.train:
        raise data.DataError(f"--data {args.data}: no training images")
    if args.batch_size < WORLD:
        raise data.DataError(f"--batch-size {args.batch_size}: less than one image for each of {WORLD} processes")
    if RANK == 0:
        metrics.save_json(folder / "args.json", vars(args), {})
    images, names = in_turn(decode), [sample.cls for sample in dataset.train]
    held_out = torch.from_numpy(data.hold_out(dataset.train, args.holdout))
    torch.manual_seed(0)  # an untrained encoder is the same for all seeds and processes
    encoder = in_turn(lambda: load_encoder(args.backbone, args.weights, log))
    if args.weights == "none":
        log("warning: the encoder is untrained (--weights none): good enough to see the code run, not for results")
    for seed in args.seed:
        for classes in [dataset.classes] if args.unified else [[cls] for cls in dataset.classes]:
            name = f"seed{seed}" + ("" if args.unified else "-" + classes[0].replace("/", "_"))
            torch.manual_seed(seed)
            model = MiniMaxAD(encoder, args.arch).to(device)
            if WORLD > 1 and device.type == "cuda":
                model.bottleneck, model.decoder = map(nn.SyncBatchNorm.convert_sync_batchnorm,
                                                      (model.bottleneck, model.decoder))
            state = dict(name=name, settings=settings, root=args.root, seed=seed, classes=classes, epoch=0,
                         model=None, optimizer=None, normal=None, result=None)
            if args.resume and (path := folder / f"{name}.pt").exists():
                state = resume(path, state)
                model.load_state_dict(state["model"])
            if not state["result"]:
                mine = torch.tensor([cls in classes for cls in names])
                train(model, images, (mine & ~held_out).nonzero().squeeze(1), settings, seed, device,
                      folder / f"{name}.pt", state)
            network = Inference(model, args.crop or args.size, args.score)
            if not state["result"]:
                kept, index = mine & held_out, mine.nonzero().squeeze(1)
                normal = (kept.nonzero().squeeze(1) if kept.any() else index[::-(-len(index) // 1000)]).numpy()
                seen = images[normal]  # 1000 will do
                if args.augment and args.crop:  # decoded without the crop
                    edge = (args.size - args.crop) // 2
                    seen = seen[:, edge:edge + args.crop, edge:edge + args.crop]
                maps, scores = infer(network, seen, device)
                if RANK == 0:
                    state["normal"] = metrics.calibrate(maps, scores, [names[i] for i in normal],
                                                        held_out=bool(kept.any()))
            yield state, network


def run_folder(args):
    """--out, or runs/minimaxad-SET-SETTING with a number that is free; refuses to overwrite another run."""
    if args.eval:
        source = Path(args.eval)
        folder = Path(args.out or (source if source.is_dir() else source.parent) / "eval")
    elif args.out:
        folder = Path(args.out)
        if not args.resume and any(folder.glob("seed*.pt")):
            raise data.DataError(f"--out {folder}: holds a run already; --resume goes on with it")
    else:
        stem = f"minimaxad-{args.data}-{'unified' if args.unified else 'separate'}"
        folders = [Path("runs", stem + (f"-{i}" if i > 1 else "")) for i in range(1, 10000)]
        free = next(i for i, f in enumerate(folders) if not f.exists())
        folder = folders[max(free - 1, 0) if args.resume else free]
    barrier()  # every process has chosen before the folder appears
    folder.mkdir(parents=True, exist_ok=True)
    if RANK == 0:
        LOG.append(folder / "log.txt")
        for left in folder.glob(".tmp*"):  # by a run that was killed while it wrote
            left.unlink()
        if args.resume and not any(folder.glob("seed*.pt")):
            log(f"{folder}: no checkpoint yet, starting from the beginning")
    return folder


def load_run(path):
    """States of a checkpoint file, or of all in a run's folder."""
    paths = sorted(Path(path).glob("seed*.pt")) if Path(path).is_dir() else [Path(path)]
    if not paths:
        raise data.DataError(f"--eval {path}: no checkpoint (.pt) in this folder")
    states = []
    for p in paths:
        try:
            states.append(torch.load(p, "cpu", weights_only=True))
        except FileNotFoundError:
            raise data.DataError(f"{p}: no such file") from None
        except Exception as error:  # pickle, zip and OS errors share no base class
            raise data.DataError(f"{p}: not a readable checkpoint ({type(error).__name__})") from None
        state = states[-1]
        if not (isinstance(state, dict) and set(STATE) <= state.keys() and isinstance(state["settings"], dict)
                and set(SETTINGS) <= state["settings"].keys()):
            raise data.DataError(f"{p}: not a checkpoint of this version of minimaxad.py")
    return states


def resume(path, expected):
    """The state in path; DataError that names the difference where it is of other arguments."""
    state = load_run(path)[0]
    for key, mine in {**expected["settings"], "classes": expected["classes"]}.items():
        theirs = state["classes"] if key == "classes" else state["settings"].get(key)
        if theirs != mine:
            raise data.DataError(f"--resume: {path} was made with {key} = {theirs}, not {mine}; "
                                 "give the same arguments or another --out")
    log(f"{path}: {state['epoch']} of {expected['settings']['epochs']} epochs done")
    return state


def restore(state, device):
    """The network for inference from a checkpoint alone."""
    settings = state["settings"]
    model = MiniMaxAD(load_encoder(settings["backbone"], "none", log=lambda line: None), settings["arch"])
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:  # names the tensors
        raise data.DataError(f"{state['name']}.pt does not fit its settings: {' '.join(str(error).split())[:200]}") from None
    return Inference(model.to(device), settings["crop"] or settings["size"], settings["score"])


def predict(args, state, folder, device, asked):
    """Score, verdict and picture of the images --predict names; True if every file could be read."""
    if asked and (len(asked) > 1 or asked[0] not in state["classes"]):
        raise data.DataError(f"--classes {' '.join(asked)}: with --predict one of {', '.join(state['classes'])}")
    network = restore(state, device)
    cls = asked[0] if asked else state["classes"][0] if len(state["classes"]) == 1 else None

    def look(images):
        return *infer(network, images, device, quiet=True), [cls] * len(images)

    return metrics.predict(data.find_images(args.predict), look, args.size, args.crop, state["normal"], args.quantile,
                           folder, log)


def export(args, state, folder, device, asked):
    network, size = restore(state, torch.device("cpu")), args.crop or args.size
    program = torch.export.export(network, (torch.rand(2, 3, size, size),),
                                  dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    with data.atomic(args.export) as temporary:
        torch.export.save(program, temporary)
    log(f"{args.export}: image B x 3 x {size} x {size} in 0..1 -> map, score")
    return True


def bench(args, device):
    """Images per second at batch 1 and 16, fused and not, and storage beside the paper's 119 MB."""
    size = args.crop or args.size
    encoder = load_encoder(args.backbone, "none", log=lambda line: None)
    model = MiniMaxAD(encoder, args.arch).to(device).eval()
    if args.backbone in UNIREPLKNET:
        model.encoder = UniRepLKNet(args.backbone).to(device).eval().requires_grad_(False)  # as loaded: with its branches
    log(f"{args.arch}, {args.backbone}, {size} x {size}, {torch.get_num_threads()} threads, device "
        + (torch.cuda.get_device_name(device) if device.type == "cuda" else device.type))
    fused = fuse(model)
    for name, network in ("unfused", model), ("fused", fused):
        for B in (1, 16):
            x, times = torch.randn(B, 3, size, size, device=device), []
            with torch.no_grad():
                for _ in range(6):
                    begin = time.perf_counter()
                    anomaly_map(*network(x), size, "bilinear").cpu()
                    times.append(time.perf_counter() - begin)
            log(f"{name}, batch {B}: {B / sorted(times[1:])[2]:.1f} images/s (paper: 40.7 at batch 1 on a GTX 1080 Ti)")
    log(f"storage: {storage(fused):.1f} MiB fused, {storage(model):.1f} MiB not (paper: 119 MB)")
    return True


# ---------------------------------------------------------------- processes and logging

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
LOG = []  # the run's log.txt, on process 0


def start(args):
    """Device of this process; joins the process group under torchrun."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(args.device or best)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index)
        torch.cuda.set_device(device)
    torch.zeros(1, device=device)
    if WORLD > 1:  # the others may wait for hours while process 0 decodes
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    return device


def barrier():
    if WORLD > 1:
        dist.barrier()


def in_turn(function):
    """function() on process 0 first, then on the others: downloads and caches are written once."""
    result = function() if RANK == 0 else None
    barrier()
    return result if RANK == 0 else function()


def log(text, bar=None):
    """A line to the screen (with a bar in a terminal: only the bar moves) and to log.txt, by process 0 alone."""
    if RANK == 0:
        if bar is None or bar.disable:
            print(text, flush=True)
        else:
            bar.set_postfix_str(text.partition(": ")[2])
        for path in LOG:
            with open(path, "a", encoding="utf-8") as file:
                file.write(text + "\n")


def progress(iterable, name, off=False, **more):
    return tqdm(iterable, name, leave=False, disable=True if RANK or off else None, dynamic_ncols=True, **more)


# ---------------------------------------------------------------- command line


def number(kind, low, high=math.inf):
    """argparse type: an int or float in low..high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"'{text}' is not {'a whole number' if kind is int else 'a number'} "
                                             + (f"from {low} to {high}" if high < math.inf else f"of {low} or more"))
        return value
    return parse


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description="MiniMaxAD (arXiv 2405.09933): train, evaluate, predict.", epilog="The header of this file has commands.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=118))
    group = parser.add_argument_group("data")
    group.add_argument("--data", default="toy", metavar="NAME[+NAME..]", help=f"{' '.join(data.NAMES)} (default toy)")
    group.add_argument("--root", metavar="DIR", help="where the data lies (default data/NAME)")
    group.add_argument("--classes", nargs="+", metavar="A", help="a subset of the classes")
    group.add_argument("--normals", default="01234", help="cifar10: the five normal classes (default 01234)")
    group.add_argument("--unified", action=argparse.BooleanOptionalAction, help="one model for all classes (default: one per class)")
    group.add_argument("--holdout", type=number(float, 0, 0.9), metavar="SHARE",
                       help="share of the training images kept for --predict's threshold (default: folder, toy 0.1, else 0)")
    group.add_argument("--cache", default="cache", metavar="DIR|none", help="decoded images (default cache)")
    group.add_argument("--workers", type=number(int, 1), help="decoding processes (default: all cores)")

    group = parser.add_argument_group("training", "defaults: the paper's, " + show(OPTIMISER) + "; " + "; ".join(
        f"{name}{' unified' if unified else ''}: {show(preset)}" for (name, unified), preset in PRESETS.items()))
    group.add_argument("--loss", choices=("local", "local-hm", "global", "adc"), help="adc: MiniMaxAD-fr, global: MiniMaxAD-fp")
    group.add_argument("--arch", choices=("minimax", "rd"), default="minimax", help="rd: Reverse Distillation, the baseline")
    group.add_argument("--backbone", metavar="NAME", help=f"{' '.join(UNIREPLKNET)}, or a timm CNN "
                       "(default unireplknet_n; rd: wide_resnet50_2.tv_in1k)")
    group.add_argument("--weights", metavar="FILE|none", help="the encoder's checkpoint (timm names: default timm's download)")
    group.add_argument("--p-hard", type=number(float, 0, 1), default=0.9999, help="Eq. 8, Table A4 (default 0.9999)")
    group.add_argument("--p-lim", type=number(float, 0, 1), default=0.9995, help="Eq. 8, 9, Tables A4, A5 (default 0.9995)")
    group.add_argument("--size", type=number(int, 32), help="images are resized to size x size pixels")
    group.add_argument("--crop", type=number(int, 32), help="then the centre crop x crop is taken")
    group.add_argument("--augment", action="store_true", help="random resized crop and flip, the authors' code on AeBAD")
    group.add_argument("--epochs", type=number(int, 1))
    group.add_argument("--batch-size", type=number(int, 1), help="global: split over the processes")
    group.add_argument("--lr", type=number(float, 0), help="x gamma each epoch")
    group.add_argument("--weight-decay", type=number(float, 0))
    group.add_argument("--gamma", type=number(float, 0, 1))
    group.add_argument("--seed", type=number(int, 0), nargs="+", default=[1], metavar="S", help="several: mean and deviation")
    group.add_argument("--amp", action="store_true", help="train in bfloat16; evaluation is always in full precision")
    group.add_argument("--device", help="cpu, cuda, cuda:N or mps (default: the best there is)")

    group = parser.add_argument_group("run")
    group.add_argument("--score", choices=("max", "top1", "mean"), help="image score (default max; cifar10: mean)")
    group.add_argument("--out", metavar="DIR", help="results (default runs/minimaxad-SET-SETTING, numbered)")
    group.add_argument("--resume", action="store_true", help="go on with the run in --out, or with the last default one")
    group.add_argument("--eval", metavar="CKPT", help="evaluate a checkpoint, or all of a run's folder, instead of training")
    group.add_argument("--predict", nargs="+", metavar="PATH", help="with --eval: files, folders or globs to judge")
    group.add_argument("--quantile", type=number(float, 0, 1), default=0.99,
                       help="--predict: the threshold is this quantile of normal scores (default 0.99)")
    group.add_argument("--export", metavar="FILE", help="with --eval: write the network as a torch.export program (.pt2)")
    group.add_argument("--save-maps", action="store_true", help="pictures of all test images and a sheet per class")
    group.add_argument("--save-tiff", action="store_true", help="float maps at image size, as MVTec's evaluation reads them")
    group.add_argument("--bench", action="store_true", help="images per second and storage, no data needed")

    args = parser.parse_args(argv)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    args.typed = sorted(vars(parser.parse_args(argv)))
    clash = [key for key in args.typed if key in (*SETTINGS, "seed", "resume") and (key != "classes" or not args.predict)]
    if args.eval and clash:
        flag = next(a.option_strings[0] for a in parser._actions if a.dest == clash[0])
        parser.error(f"{flag} does not go with --eval: the checkpoint says it")
    args.seed = sorted(set(args.seed))
    if (args.predict or args.export) and not args.eval:
        parser.error("--predict and --export need --eval CKPT")
    if sum(map(bool, (args.predict, args.export, args.save_maps or args.save_tiff))) > 1:
        parser.error("--predict, --export and --save-maps or --save-tiff are one at a time")
    if args.data == "toy":
        args.unified = True if args.unified is None else args.unified
    args.unified = bool(args.unified) or args.data == "cifar10"
    preset, note = find_preset(args)
    if note and not args.eval:
        log(note)
    for key, value in preset.items():
        if getattr(args, key) is None:  # what the user typed wins
            setattr(args, key, value)
    if args.crop and args.crop > args.size:
        parser.error(f"--crop {args.crop} is larger than --size {args.size}")
    return args


def find_preset(args):
    """(settings, a line that says where they come from if the paper does not use this set in this setting)."""
    common = {"backbone": "unireplknet_n", "weights": None, "crop": None, **OPTIMISER,
              "holdout": 0.1 if args.data in ("toy", "folder") else 0.0,
              "score": "mean" if args.data == "cifar10" else "max"}
    if args.data == "toy" and args.bench:
        return {**common, **PRESETS["mvtec", True], **(RD if args.arch == "rd" else {})}, ""
    if args.data == "toy":
        weights = {} if args.backbone else {"weights": "none"}
        return {**common, **TOY, **weights, **(RD_TOY if args.arch == "rd" else {})}, ""
    nearest = ("goodsad", False) if args.data == "folder" else ("mvtec", True) if args.unified else ("visa", False)
    exact = PRESETS.get((args.data, args.unified and args.data != "aebad"))  # AeBAD is one class
    note = "" if exact else (f"note: the paper has no settings for {args.data} {'unified' if args.unified else 'separate'}; "
                             f"taking those of {nearest[0]} {'unified' if nearest[1] else 'separate'}")
    preset = {**common, **(exact or PRESETS[nearest])}
    if args.data == "folder":
        preset["size"] = 256
    if "size" in args.typed:
        preset["crop"] = None  # the preset's crop belongs to its size
    if args.arch == "rd":
        preset |= RD
    return preset, note


def show(preset):
    return ", ".join(f"{key.replace('_', '-')} {value}" for key, value in preset.items())


def main(argv=None):
    try:
        ok = run(parse(argv))
    except (data.DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(0 if ok in (None, True) else 1)


if __name__ == "__main__":
    main()
