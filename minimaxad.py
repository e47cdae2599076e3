"""MiniMaxAD: A Lightweight Autoencoder for Feature-Rich Anomaly Detection, arXiv 2405.09933.

A frozen ImageNet network (UniRepLKNet-N) turns an image into feature maps at three scales. A
bottleneck and a decoder that mirrors the network learn to reproduce those of normal images; where
they fail is an anomaly.

    python minimaxad.py                                                  # built-in toy set
    python minimaxad.py --data goodsad --loss adc                        # one model per class
    torchrun --nproc_per_node=4 minimaxad.py --data mvtec --unified      # on four GPUs
    python minimaxad.py --data visa --unified --arch rd                  # the baseline
    python minimaxad.py --data folder --root photos --backbone resnet18  # your own photos
    python minimaxad.py --out RUN --resume                               # go on with a run
    python minimaxad.py --eval RUN                                       # its table again
    python minimaxad.py --eval RUN/cup.pt --predict photos --out verdicts

    B batch, C channels, H, W height and width, N images, k = 1, 2, 3 scale, at strides 4, 8, 16

    maps      list of three tensors B x C_k x H_k x W_k, from fine to coarse
    features  the encoder's maps and the decoder's
    S         anomaly map, B x H x W, as large as the network's image

Details and their sources; where paper and authors' code disagree, or this file differs, the line
says so:

 1. Encoder: UniRepLKNet's stages 1 to 3, frozen, fused; each output passes a LayerNorm without
    learned values (the authors' norm0..2 are not in the ImageNet checkpoint, so stay 1 and 0). Or
    any timm CNN.
 2. Bottleneck, decoder: convolutions start as Kaiming's, fan out (transposed and linear layers:
    torch's default); no bias outside blocks.
 3. Eq. 4's index 0 is a slip for 1; its Psi is nearest in training, bilinear at test (authors'
    code). Eq. 7 replaced Eq. 1, which --loss local-cosine still has. Eq. 8 compares S^2 with a
    quantile of S (paper, authors' code).
 4. Test: S is blurred (sigma 4), the score its maximum (Reverse Distillation, the authors' first
    evaluation; SCORES has their later ones).
 5. AdamW, lr 5e-3, x 0.995 each epoch, weight decay 5e-5 (authors' code 1e-5), the last batch is
    kept (their unified scripts drop it). --arch rd: Adam of betas .5 and .999, a constant rate.
 6. Several processes train as one: each takes its share of a batch through the network, and the
    loss is that of the whole batch. BatchNorm's statistics too are the whole batch's on GPUs; torch
    has no such layer for CPUs, where they are of each process's own images.
 7. Each epoch sets the order of the images from (seed, epoch), so that a checkpoint alone goes on
    with the same batches, on a CPU bit for bit.
"""

import argparse
import copy
import json
import logging
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy import ndimage
from timm.layers import LayerNorm2d, SEModule
from torch import nn

import data
import metrics

# ---------------------------------------------------------------------------------------- settings

SAVE_EVERY = 60  # seconds between checkpoints

# Flag: default, help; None: a text that may be left out. CHOICES, beside the parser, has what can
# be chosen; PRESETS have the paper's values for each set. A checkpoint keeps all of these.
SETTINGS = {
    "data": ("toy", f"{', '.join(data.SETS)}; several as mvtec+visa"),
    "root": (None, "where the data lies, if not in data/NAME"),
    "unified": (False, "one model for all classes, not one each"),
    "classes": (None, "a subset"),
    "normals": ("01234", "cifar10's normal classes"),
    "size": (256, "images are resized to size x size pixels"),
    "crop": (0, "then the centre crop x crop is taken; 0: none"),
    "holdout": (0.0, "share of each class's training images kept back to find its threshold"),
    "arch": ("minimax", "rd: Reverse Distillation, the baseline"),
    "backbone": ("unireplknet_n", "or _a, _f, _p, _t, or any timm CNN of strides 4, 8, 16"),
    "weights": (None, "its checkpoint instead of a download, or none: untrained"),
    "loss": ("adc", "adc: MiniMaxAD-fr, global: MiniMaxAD-fp"),
    "p_hard": (0.9999, "Eq. 8, Table A4"),
    "p_lim": (0.9995, "Eq. 8, 9, Tables A4, A5"),
    "epochs": (100, "Sec. 4.1"),
    "batch_size": (16, "over all processes"),
    "lr": (5e-3, "learning rate"),
    "gamma": (0.995, "the learning rate is multiplied by it after each epoch"),
    "weight_decay": (5e-5, "authors' code 1e-5"),
    "amp": (False, "train in bfloat16; evaluation is in float32, TF32 on a GPU"),
    "seed": (1, "of weights and batches"),
    "score": ("max", "an image's, from S; top1, max5: the authors' later ones"),
}
ACTIONS = {
    "out": (None, "a new or empty folder; default runs/minimaxad-DATA-SETTING"),
    "resume": (False, "go on with the run in --out"),
    "eval": (None, "evaluate a checkpoint, or all of a run's folder"),
    "save_maps": (False, "a picture of each test image"),
    "predict": (None, "with --eval: image files and folders to judge"),
    "quantile": (0.99, "of normal images' scores: the threshold of --predict and --export"),
    "export": (None, "with --eval: write a torch.export program, FILE.pt2"),
    "device": ("cuda" if torch.cuda.is_available() else "cpu", "or cuda:N, mps"),
}

# Feature-rich sets take adc (MiniMaxAD-fr), the others global (MiniMaxAD-fp). Unified models have
# the defaults (for VisA the authors' code has 160 epochs).
SEPARATE = {  # a model per class; a set that is not here starts from VisA's, its nearest
    "goodsad": {"epochs": 240},
    "mad": {"epochs": 150},
    "visa": {"epochs": 130, "loss": "global"},  # authors' code 150 epochs
}
PRESETS = {  # the same in both settings; what the paper has none for is its nearest set's
    "goodsad": {"size": 224},
    "mad": {"size": 400},
    "aebad": {"crop": 224, "epochs": 130, "loss": "global"},
    "folder": {"epochs": 240, "loss": "adc", "holdout": 0.1},
    "cifar10": {"unified": True, "epochs": 100, "loss": "adc", "score": "mean"},
    "toy": {
        "unified": True,
        "size": 128,
        "epochs": 3,
        "loss": "adc",
        "backbone": "unireplknet_a",
        "weights": "none",
        "holdout": 0.1,
    },
}
RD = {  # Reverse Distillation's own
    "arch": "rd",
    "backbone": "wide_resnet50_2.tv_in1k",
    "epochs": 200,
    "gamma": 1.0,
    "weight_decay": 0.0,
    "loss": "global",
}

log = logging.getLogger("minimaxad")


# ------------------------------------------------------------------------------------------ layers


class GRN(nn.Module):
    """Global response normalisation of B x H x W x C."""

    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x):
        g = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)  # B x 1 x 1 x C
        n = g / (g.mean(-1, keepdim=True) + 1e-6)  # Eq. 5
        return torch.addcmul(self.beta, x, self.gamma * n + 1)  # Eq. 6


def depthwise(channels, kernel, dilation=1):
    padding = dilation * (kernel - 1) // 2
    options = {"dilation": dilation, "groups": channels, "bias": False}
    return nn.Conv2d(channels, channels, kernel, padding=padding, **options)


def fold(layer, bn):
    """One layer that does what a convolution or linear layer and the BatchNorm after it do."""
    if isinstance(layer, nn.Linear):
        return nn.utils.fuse_linear_bn_eval(layer, bn)
    transposed = isinstance(layer, nn.ConvTranspose2d)
    return nn.utils.fuse_conv_bn_eval(layer, bn, transpose=transposed)


class DilatedReparam(nn.Module):
    """Depthwise 13 x 13 convolution plus small dilated ones, each with its BatchNorm, summed."""

    SMALL = [(5, 1), (7, 2), (3, 3), (3, 4), (3, 5)]  # kernel, dilation: all within 13 x 13

    def __init__(self, channels):
        super().__init__()
        self.lk_origin = depthwise(channels, 13)
        self.origin_bn = nn.BatchNorm2d(channels)
        for kernel, dilation in self.SMALL:
            branch = depthwise(channels, kernel, dilation)
            self.add_module(f"dil_conv_k{kernel}_{dilation}", branch)
            self.add_module(f"dil_bn_k{kernel}_{dilation}", nn.BatchNorm2d(channels))

    def small_branches(self):
        """The small convolutions, each with its BatchNorm."""
        for kernel, dilation in self.SMALL:
            name = f"k{kernel}_{dilation}"
            yield getattr(self, f"dil_conv_{name}"), getattr(self, f"dil_bn_{name}")

    def forward(self, x):
        x = x.contiguous()  # in channels_last torch's bfloat16 gradient of dilated ones is wrong
        y = self.origin_bn(self.lk_origin(x))
        for branch, bn in self.small_branches():
            y = y + bn(branch(x))
        return y

    def fused(self):
        """One 13 x 13 convolution that gives the same output in eval mode."""
        large = fold(self.lk_origin, self.origin_bn)
        for branch, bn in self.small_branches():
            small = fold(branch, bn)
            reach = branch.padding[0]
            inside = slice(6 - reach, 7 + reach, branch.dilation[0])  # where its taps fall
            large.weight[:, :, inside, inside] += small.weight
            large.bias += small.bias
        return large


class Block(nn.Module):
    """UniRepLKNet's: SmaK with a depthwise 3 x 3, LarK with the dilated reparam 13 x 13."""

    def __init__(self, channels, kernel):
        super().__init__()
        self.dwconv = DilatedReparam(channels) if kernel == 13 else depthwise(channels, kernel)
        self.norm = nn.BatchNorm2d(channels)
        self.se = SEModule(channels, rd_channels=channels // 4)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.grn = GRN(4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x):
        y = self.se(self.norm(self.dwconv(x)))
        y = F.gelu(self.pwconv1(y.permute(0, 2, 3, 1)))  # B x H x W x 4C
        y = self.pwconv2(self.grn(y)).permute(0, 3, 1, 2)  # B x C x H x W
        # x + gamma * norm2(y): gamma scales the layer, it is not Eq. 6's
        return torch.addcmul(x, self.gamma.view(-1, 1, 1), self.norm2(y))

    def fuse(self):
        """Becomes a block for inference, of the same output: one convolution, no BatchNorm."""
        if isinstance(self.dwconv, DilatedReparam):
            self.dwconv = self.dwconv.fused()
        self.dwconv = fold(self.dwconv, self.norm)
        self.norm = nn.Identity()
        self.pwconv2 = fold(self.pwconv2, self.norm2)
        self.norm2 = nn.Identity()
        self.pwconv2.bias += self.pwconv2.weight @ self.grn.beta.flatten()
        self.grn.beta = nn.Parameter(self.grn.beta.new_zeros(1), False)


def stage(channels, kernels):
    return nn.Sequential(*(Block(channels, kernel) for kernel in kernels))


def conv(in_channels, out_channels, kernel, stride=1):
    """Without bias; a stride of 2 halves the size, rounded up."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)


def doubling(in_channels, out_channels):
    """A transposed convolution, 2 x 2, that doubles the size; without bias."""
    return nn.ConvTranspose2d(in_channels, out_channels, 2, 2, bias=False)


class ConvNorm(nn.Sequential):
    """A convolution and its BatchNorm."""

    def __init__(self, layer):
        super().__init__(layer, nn.BatchNorm2d(layer.out_channels))


def halving(in_channels, out_channels):
    """A convolution, 3 x 3, that halves the size, and its BatchNorm."""
    return ConvNorm(conv(in_channels, out_channels, 3, stride=2))


class Residual(nn.Module):
    """ResNet's block: basic, as ResNet-18's, if width is out_channels, else a bottleneck.

    resize: None, "halve" or "double".
    """

    def __init__(self, in_channels, width, out_channels, resize=None):
        super().__init__()

        def resizing(inputs, outputs, kernel):
            if resize == "double":
                return doubling(inputs, outputs)
            return conv(inputs, outputs, kernel, 2 if resize == "halve" else 1)

        if width == out_channels:
            layers = [resizing(in_channels, width, 3), conv(width, width, 3)]
        else:
            layers = [conv(in_channels, width, 1), resizing(width, width, 3)]
            layers.append(conv(width, out_channels, 1))
        steps = []
        for layer in layers:
            steps += [ConvNorm(layer), nn.ReLU()]
        self.residual = nn.Sequential(*steps[:-1])
        self.shortcut = nn.Identity()
        if resize or in_channels != out_channels:
            self.shortcut = ConvNorm(resizing(in_channels, out_channels, 1))

    def forward(self, x):
        return F.relu(self.residual(x) + self.shortcut(x))


def residual_stage(in_channels, width, out_channels, resize, depth):
    blocks = [Residual(in_channels, width, out_channels, resize)]
    for _ in range(depth - 1):
        blocks.append(Residual(out_channels, width, out_channels))
    return nn.Sequential(*blocks)


# Names of a layer and its BatchNorm: in ConvNorm and a timm ResNet's shortcut, in its blocks.
FOLDED = [("0", "1"), ("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")]


@torch.no_grad()
def fuse(network):
    """A frozen copy for inference, of the same output: BatchNorm and small kernels are folded into
    the convolutions."""
    network = copy.deepcopy(network).eval().requires_grad_(False)
    for module in list(network.modules()):
        if isinstance(module, Block):
            module.fuse()
        for conv_name, bn_name in FOLDED:
            layer = getattr(module, conv_name, None)
            bn = getattr(module, bn_name, None)
            is_conv = isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)  # some have a whole stem
            if is_conv and type(bn) in (nn.BatchNorm2d, nn.SyncBatchNorm):
                setattr(module, conv_name, fold(layer, bn))
                setattr(module, bn_name, nn.Identity())
    return network


# --------------------------------------------------------------------------------- frozen encoders

UNIREPLKNET = {  # channels of stage 1, doubled from stage to stage; kernels of stages 1 to 3
    "unireplknet_a": (40, [3] * 2, [13] * 2, [13] * 6),
    "unireplknet_f": (48, [3] * 2, [13] * 2, [13] * 6),
    "unireplknet_p": (64, [3] * 2, [13] * 2, [13] * 6),
    "unireplknet_n": (80, [3] * 2, [13] * 2, [13] * 8),
    "unireplknet_t": (80, [3] * 3, [13] * 3, [13, 3] * 9),
}
FILES = {  # ImageNet-1K weights, in the authors' repository DingXiaoH/UniRepLKNet
    "unireplknet_a": "unireplknet_a_in1k_224_acc77.03.pth",
    "unireplknet_f": "unireplknet_f_in1k_224_acc78.58.pth",
    "unireplknet_p": "unireplknet_p_in1k_224_acc80.23.pth",
    "unireplknet_n": "unireplknet_n_in1k_224_acc81.64.pth",
    "unireplknet_t": "unireplknet_t_in1k_224_acc83.21.pth",
}


class UniRepLKNet(nn.Module):
    """Stem and stages 1 to 3: standardised images B x 3 x H x W -> maps."""

    def __init__(self, name):
        super().__init__()
        c, *self.kernels = UNIREPLKNET[name]
        self.channels = [c, 2 * c, 4 * c]
        stem = [nn.Conv2d(3, c // 2, 3, 2, 1), LayerNorm2d(c // 2), nn.GELU()]
        stem += [nn.Conv2d(c // 2, c, 3, 2, 1), LayerNorm2d(c)]
        self.downsample_layers = nn.ModuleList([nn.Sequential(*stem)])
        for c in self.channels[:-1]:
            down = nn.Sequential(nn.Conv2d(c, 2 * c, 3, 2, 1), LayerNorm2d(2 * c))
            self.downsample_layers.append(down)
        self.stages = nn.ModuleList(map(stage, self.channels, self.kernels))
        self.norms = nn.ModuleList(LayerNorm2d(c, affine=False) for c in self.channels)

    def forward(self, x):
        maps = []
        for down, blocks, norm in zip(self.downsample_layers, self.stages, self.norms, strict=True):
            x = blocks(down(x))
            maps.append(norm(x))
        return maps


class TimmEncoder(nn.Module):
    """A timm CNN's maps; ours: the blocks of its decoder are UniRepLKNet-N's."""

    def __init__(self, name, weights):
        super().__init__()
        with data.explain(f"--backbone {name}: no such timm CNN"):
            with torch.device("meta"):
                info = timm.create_model(name, features_only=True).feature_info
            index = [i for i, stride in enumerate(info.reduction()) if stride in (4, 8, 16)]
            self.net = timm.create_model(name, features_only=True, out_indices=index).eval()
            maps = self.net(torch.zeros(1, 3, 64, 64))

        info = self.net.feature_info
        if info.reduction() != [4, 8, 16]:
            raise data.UserError(f"--backbone {name} has strides {info.reduction()}, not 4, 8, 16")
        self.channels = info.channels()
        self.kernels = UNIREPLKNET["unireplknet_n"][1:]
        if [x.shape[1] for x in maps] != self.channels:
            raise data.UserError(f"--backbone {name}: its maps are not B x C x H x W")
        if weights is None:
            weights = data.timm_weights(name)
        if weights != "none":
            data.load_weights(self.net, weights)

    def forward(self, x):
        return self.net(x)


def load_encoder(name, weights):
    """The frozen encoder, a UniRepLKNet or ResNet fused: standardised images B x 3 x H x W -> maps.

    name: a key of UNIREPLKNET or any timm CNN of strides 4, 8, 16. weights: a file, "none"
    (untrained), or None: downloaded. Its buffers mean and std, 3 x 1 x 1, standardise RGB in 0..1.
    UserError: no such network, weights that cannot be had or do not fit.
    """
    mean = timm.data.IMAGENET_DEFAULT_MEAN
    std = timm.data.IMAGENET_DEFAULT_STD
    if name in UNIREPLKNET:
        encoder = UniRepLKNet(name)
        if weights is None:
            weights = data.download("DingXiaoH/UniRepLKNet", FILES[name])
        if weights != "none":
            data.load_weights(encoder, weights, authors_key)
        encoder = fuse(encoder)
    else:
        encoder = TimmEncoder(name, weights)
        mean = encoder.net.pretrained_cfg["mean"]
        std = encoder.net.pretrained_cfg["std"]
        if hasattr(encoder.net, "layer3"):  # a ResNet
            encoder = fuse(encoder)
    encoder.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
    encoder.register_buffer("std", torch.tensor(std).view(3, 1, 1))
    return encoder.eval().requires_grad_(False)


def authors_key(key):
    """A tensor's name in the authors' UniRepLKNet files."""
    names = {
        "pwconv1": "pwconv1.1",
        "grn": "act.1",
        "pwconv2": "pwconv2.0",
        "norm2": "pwconv2.2",
        "se.fc1": "se.down",
        "se.fc2": "se.up",
    }
    for ours, theirs in names.items():
        key = key.replace(f".{ours}.", f".{theirs}.")
    return key


# ------------------------------------------------------------------------------------------- model


class Bottleneck(nn.Module):
    """Three maps, brought to the size and width of the third and compressed to half its size."""

    def __init__(self, channels, compress):
        super().__init__()
        c1, c2, c3 = channels
        self.from1 = nn.Sequential(halving(c1, c2), nn.ReLU(), halving(c2, c3), nn.ReLU())
        self.from2 = nn.Sequential(halving(c2, c3), nn.ReLU())
        self.compress = compress

    def forward(self, maps):
        x = torch.cat([self.from1(maps[0]), self.from2(maps[1]), maps[2]], 1)
        return self.compress(x)  # B x 3C_3 x H_3 x W_3 -> B x 2C_3 x H_3/2 x W_3/2, rounded up


def minimax(encoder):
    """MiniMaxAD's bottleneck and the decoder's three stages, which mirror the encoder's."""
    widths = encoder.channels
    channels = 2 * widths[2]
    compress = nn.Sequential(conv(3 * widths[2], channels, 3, stride=2), stage(channels, [3, 3]))
    stages = nn.ModuleList()
    for width, kernels in zip(widths[::-1], encoder.kernels[::-1], strict=True):
        up = doubling(channels, width)
        stages.append(nn.Sequential(up, LayerNorm2d(width), stage(width, kernels)))
        channels = width
    return Bottleneck(widths, compress), stages


def reverse_distillation(encoder):
    """Bottleneck and decoder of the baseline: residual stages. UserError: no timm ResNet."""
    net = getattr(encoder, "net", None)
    if not hasattr(net, "layer3"):
        raise data.UserError("--arch rd needs a ResNet, as --backbone wide_resnet50_2.tv_in1k")
    layers = [net.layer1, net.layer2, net.layer3]
    widths = [layer[0].conv1.out_channels for layer in layers]
    outputs = encoder.channels
    channels = 2 * outputs[2]
    depth = len(layers[0])
    compress = residual_stage(3 * outputs[2], 2 * widths[2], channels, "halve", depth)
    stages = nn.ModuleList()
    for i, layer in zip((2, 1, 0), layers, strict=True):  # depths are not reversed, as RD's
        stages.append(residual_stage(channels, widths[i], outputs[i], "double", len(layer)))
        channels = outputs[i]
    return Bottleneck(outputs, compress), stages


# Of an encoder: a module, three maps -> a map of half the third's size; and the decoder's stages,
# from coarse to fine, each of which doubles the size.
ARCHS = {"minimax": minimax, "rd": reverse_distillation}


class MiniMaxAD(nn.Module):
    """Frozen encoder, bottleneck and decoder: B x 3 x H x W in 0..1 -> encoder's, decoder's maps.

    arch: of ARCHS; "rd" is Reverse Distillation, the baseline.
    """

    def __init__(self, encoder, arch="minimax"):
        super().__init__()
        self.encoder = encoder
        self.bottleneck, self.decoder = ARCHS[arch](encoder)
        for module in (*self.bottleneck.modules(), *self.decoder.modules()):
            if isinstance(module, nn.Conv2d):  # transposed ones keep torch's default
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image):
        with torch.no_grad():
            encoder_maps = self.encoder((image - self.encoder.mean) / self.encoder.std)
        x = self.bottleneck(encoder_maps)
        decoder_maps = []
        for up in self.decoder:  # from coarse to fine, each doubles the size
            x = up(x)
            decoder_maps.insert(0, x)
        return encoder_maps, decoder_maps


# ------------------------------------------------------------------------------------------ losses


def pairs(encoder_maps, decoder_maps):
    """Both maps of each scale, the decoder's resized: at 400 px 104, 52, 26 to 100, 50, 25."""
    for e, d in zip(encoder_maps, decoder_maps, strict=True):
        if d.shape != e.shape:
            d = F.interpolate(d, e.shape[2:], mode="nearest")
        yield e, d


def cosine_distances(encoder_maps, decoder_maps):
    """Eq. 3: M of each scale, B x H_k x W_k, 0 where both vectors point the same way, at most 2."""
    return [1 - F.cosine_similarity(e, d, dim=1) for e, d in pairs(encoder_maps, decoder_maps)]


def anomaly_map(encoder_maps, decoder_maps, size, mode):
    """Eq. 4: S, B x size x size.

    mode: Psi, "nearest" (training) or "bilinear" with aligned corners (test).
    """
    S = 0
    for M in cosine_distances(encoder_maps, decoder_maps):
        aligned = True if mode == "bilinear" else None
        M = F.interpolate(M[:, None], size, mode=mode, align_corners=aligned)
        S = S + M[:, 0]  # B x H x W
    return S  # authors' code: S / 3 at test time


def local_cosine_loss(encoder_maps, decoder_maps):
    """Eq. 1."""
    return sum(M.mean() for M in cosine_distances(encoder_maps, decoder_maps))


def global_loss(encoder_maps, decoder_maps):
    """Eq. 2: 1 - cosine of the flattened maps, summed over the scales; the mean over the images."""
    loss = 0
    for e, d in pairs(encoder_maps, decoder_maps):
        loss = loss + (1 - F.cosine_similarity(e.flatten(1), d.flatten(1))).mean()
    return loss


def local_loss(S):
    """Eq. 7."""
    return S.square().mean()


def quantile(x, p):
    """p-quantile of all elements, as torch.quantile's, which takes no more than 16 million."""
    x = x.flatten()
    rank = p * (len(x) - 1)
    k = len(x) - int(rank)  # the k largest end at the element just below the rank
    top = x.topk(k).values
    below = top[k - 1]
    above = top[max(k - 2, 0)]
    return below + (above - below) * (rank - int(rank))


@torch.no_grad()
def adc_pixels(S, p_hard=0.9999, p_lim=0.9995):
    """The pixels of S that Eq. 8 mines, bool B x H x W."""
    squares = S.square()
    alpha = quantile(S, p_hard)  # of S, not S^2: so in the paper and the authors' code
    beta = quantile(squares, p_lim)
    sigma2 = S.var()
    A = (squares >= alpha - sigma2).sum()
    least = S.numel() * (1 - p_lim)  # script B in the paper
    least = max(1, least)  # ours: of p_lim 1 it is 0, and the mean over no pixel nan
    return squares >= torch.where(A >= least, alpha, beta) - sigma2


def adc_loss(S, p_hard=0.9999, p_lim=0.9995):
    """Eq. 8."""
    return S[adc_pixels(S, p_hard, p_lim)].square().mean()


def local_hm_loss(S, p_lim=0.9995):
    """Eq. 9."""
    squares = S.square()
    beta = quantile(squares, p_lim)
    return squares[squares >= beta].mean()


# Of the features and S of a whole batch, and the settings of the run.
LOSSES = {
    "adc": lambda features, S, args: adc_loss(S, args.p_hard, args.p_lim),
    "global": lambda features, S, args: global_loss(*features),
    "local": lambda features, S, args: local_loss(S),
    "local-hm": lambda features, S, args: local_hm_loss(S, args.p_lim),
    "local-cosine": lambda features, S, args: local_cosine_loss(*features),
}

# ----------------------------------------------------------------------------------- map and score


def blur(S, radius, border):
    """B x H x W convolved with a Gaussian of sigma 4 cut off at radius; border: SciPy's mode."""
    kernel = ndimage.gaussian_filter1d(np.eye(S.shape[1]), 4.0, 0, mode=border, radius=radius)
    kernel = S.new_tensor(kernel)  # H x H, and H = W
    return kernel @ S @ kernel.T


def mean_of_top(S):
    """Mean of the 1 % highest pixels."""
    pixels = S.flatten(1)  # B x HW
    return pixels.topk(max(1, pixels.shape[1] // 100)).values.mean(1)


SCORES = {  # radius and border of the blur (reflect: c b a | a b c), and what is taken of it
    "max": (16, "reflect", lambda S: S.amax((1, 2))),  # the authors' first evaluation
    "mean": (16, "reflect", lambda S: S.mean((1, 2))),  # ours, of CIFAR-10, as UniAD's
    "top1": (2, "constant", mean_of_top),  # their later one
    "max5": (2, "constant", lambda S: S.amax((1, 2))),  # theirs, of separate VisA
}


class Detector(nn.Module):
    """The fused network: image B x 3 x H x H in 0..1 -> S, B x H x H, and score, B.

    model: a MiniMaxAD. score: of SCORES.
    """

    def __init__(self, model, score="max"):
        super().__init__()
        self.model = copy.deepcopy(model).eval()
        self.model.bottleneck = fuse(model.bottleneck)
        self.model.decoder = fuse(model.decoder)
        self.score = score

    def forward(self, image):
        radius, border, pool = SCORES[self.score]
        S = anomaly_map(*self.model(image), image.shape[-1], "bilinear")
        S = blur(S, radius, border)
        return S, pool(S)


@torch.no_grad()
def infer(detector, images, device):
    """S, N x H x H, and scores, N, of uint8 images N x H x H x 3, as arrays."""
    outputs = []
    B = 4 if device.type == "cpu" else 32
    for i in range(0, len(images), B):
        image = torch.tensor(images[i : i + B]).to(device)
        image = image.permute(0, 3, 1, 2).float() / 255  # B x 3 x H x H
        outputs.append([x.cpu().numpy() for x in detector(image)])
    return [np.concatenate(x) for x in zip(*outputs, strict=True)]


# ---------------------------------------------------------------------------------------- training

LAUNCHED = dist.is_torchelastic_launched()  # by torchrun
RANK = int(os.environ["RANK"]) if LAUNCHED else 0  # process 0 speaks, writes and evaluates
LOCAL_RANK = int(os.environ["LOCAL_RANK"]) if LAUNCHED else 0
WORLD = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1


def whole_batch(x, count):
    """x of all images of the batch, with the gradient of this process's only.

    x: B x .. of this process's images, batch[RANK::WORLD]. count: images of the batch.
    """
    if WORLD == 1:
        return x
    most = math.ceil(count / WORLD)  # images of a process
    own = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]).contiguous()
    parts = [torch.empty_like(own) for _ in range(WORLD)]
    dist.all_gather(parts, own.detach())
    parts[RANK] = own
    whole = torch.stack(parts, 1).flatten(0, 1)  # in the batch's order, what was missing at its end
    return whole[:count]


def add_gradients(parameters):
    """Each process has the gradient by its own images; the sum is that by the whole batch."""
    if WORLD == 1:
        return
    gradients = [p.grad for p in parameters]
    flat = nn.utils.parameters_to_vector(gradients)
    dist.all_reduce(flat)
    nn.utils.vector_to_parameters(flat, gradients)


def make_optimizer(parameters, args):
    options = {"weight_decay": args.weight_decay, "fused": True}
    if args.arch == "rd":
        return torch.optim.Adam(parameters, betas=(0.5, 0.999), **options)
    return torch.optim.AdamW(parameters, betas=(0.9, 0.999), **options)


def train(model, images, state, args, device):
    """Train bottleneck and decoder on uint8 images N x H x H x 3, from where the state stopped."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, args)
    if state["optimizer"]:
        with data.explain(f"the optimizer in {args.out} is damaged"):
            optimizer.load_state_dict(state["optimizer"])
    if WORLD > 1 and device.type == "cuda":
        for part in model.bottleneck, model.decoder:  # a timm encoder has BatchNorms of its own
            nn.SyncBatchNorm.convert_sync_batchnorm(part)  # in place
    elif WORLD > 1:
        log.info("note: on CPUs BatchNorm is over each process's images, not the global batch")

    saved_at = time.time()
    for epoch in range(state["epoch"], args.epochs):
        start = time.time()
        for group in optimizer.param_groups:
            group["lr"] = args.lr * args.gamma**epoch  # ExponentialLR
        seed = 1_000_003 * args.seed + epoch
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        batches = order.to(images.device).split(args.batch_size)
        model.train()
        model.encoder.eval()
        losses = 0
        for batch in batches:
            part = batch[RANK::WORLD]  # this process's share
            if len(part) == 0:  # none is left for it: one that does not count, but in BatchNorm
                part = batch[:1]
            image = images[part].to(device).permute(0, 3, 1, 2)  # B x 3 x H x H
            image = image.contiguous().float() / 255
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                features = model(image)
            # In bfloat16 a cosine near 1 has steps of .004.
            features = [[whole_batch(x.float(), len(batch)) for x in maps] for maps in features]
            S = anomaly_map(*features, image.shape[-1], "nearest")
            loss = LOSSES[args.loss](features, S, args)

            optimizer.zero_grad()
            loss.backward()
            add_gradients(parameters)
            optimizer.step()
            losses = losses + loss.detach()

        loss = losses.item() / len(batches)
        if not nn.utils.parameters_to_vector(parameters).isfinite().all():
            raise data.UserError(f"diverged in epoch {epoch + 1}: lower --lr")
        text = f"{args.loss} loss {loss:.5f}, {last_batch(features, S, args)}"
        seconds = time.time() - start
        log.info(f"{state['name']} epoch {epoch + 1}/{args.epochs}: {text}, {seconds:.1f} s")
        state["epoch"] = epoch + 1
        if time.time() - saved_at > SAVE_EVERY:
            save(args, state, model, optimizer.state_dict())
            saved_at = time.time()


@torch.no_grad()
def last_batch(features, S, args):
    """Text: the pixels that Eq. 8 mines, whatever the loss (Fig. 4a), and the variance of
    normalised maps (Fig. 3c), in our reading: at most the sum of 1 / C_k over the scales."""
    mined = adc_pixels(S, args.p_hard, args.p_lim).sum()
    variances = []
    for maps in features:
        variances.append(sum(F.normalize(x, dim=1).var(correction=0) for x in maps))
    return (
        f"mined by Eq. 8 {mined} of {S.numel()} pixels, "
        f"variance of the encoder's maps {variances[0]:.5f}, the decoder's {variances[1]:.5f}"
    )


# ------------------------------------------------------------------------------- a model's training


def fit(model, state, args, samples, images, device):
    """Train on the samples of the state's classes, uint8 images N x H x H x 3; then find what a
    threshold needs. Leaves checkpoints in args.out."""
    index = np.array([i for i, sample in enumerate(samples) if sample.cls in state["classes"]])
    held = data.hold_out([samples[i] for i in index], args.holdout)
    training = index[~held]
    if held.any():
        log.info(f"{state['name']}: {len(training)} images train, {held.sum()} are held out")
    digest = data.digest([samples[i] for i in training])
    if state["digest"] not in (None, digest):
        raise data.DataError(f"{args.out} was trained on other images; change --root or --out")
    state["digest"] = digest

    train_images = torch.from_numpy(images[training])
    if device.type == "cuda" and train_images.nbytes < 0.3 * torch.cuda.mem_get_info(device)[0]:
        train_images = train_images.to(device)
    train(model, train_images, state, args, device)

    chosen = data.calibration_images([samples[i] for i in index], held)
    normal = [samples[i] for i in index[chosen]]
    detector = Detector(model, args.score)
    S, scores = infer(detector, images[index[chosen]], device)
    state["calibration"] = metrics.calibrate(S, scores, normal, held[chosen])
    state["trained"] = True
    save(args, state, model, None)


def new_state(args, classes):
    """What a checkpoint holds, here at the start of a training."""
    return {
        "name": "unified" if args.unified else classes[0].replace("/", "_"),
        "args": {key: vars(args)[key] for key in SETTINGS},
        "classes": classes,
        "digest": None,  # of the training images' names and sizes
        "epoch": 0,  # done
        "trained": False,  # all epochs, and what follows them
        "model": None,  # its tensors after that epoch
        "optimizer": None,
        "calibration": None,  # what normal images look like to the trained detector
    }


def save(args, state, model, optimizer):
    if RANK == 0:
        state["model"] = model.state_dict()
        state["optimizer"] = optimizer
        with data.saved(Path(args.out, f"{state['name']}.pt")) as file:
            torch.save(state, file)


def make_model(args, state, encoder):
    """The model that the settings name, with the state's tensors if it has any."""
    model = MiniMaxAD(encoder, args.arch)
    if state["model"]:
        with data.explain(f"{args.eval or args.out}: the checkpoint of {state['name']} is damaged"):
            model.load_state_dict(state["model"])
    return model


# ------------------------------------------------------------------------- the run, and its table


def run(args, states, device):
    """Train what is asked for, a model for all classes or one for each, then test what is trained.

    states: of --eval's checkpoints, or those with which --resume goes on.
    """
    open_folder(args)
    if device.type == "cuda":
        log.info(f"{torch.cuda.get_device_name(device)}, matrix products in TF32")
    training = not args.eval
    sets = args.data, args.root, args.classes, args.normals
    classes, train_samples, test_samples = data.load(*sets, training)
    masks = data.decode_masks(test_samples, args.size, args.crop)
    test_images = data.decode(test_samples, args.size, args.crop)
    torch.manual_seed(0)  # an untrained encoder is the same for all seeds and processes
    weights = args.weights if training and not states else "none"
    encoder = load_encoder(args.backbone, weights)
    if states:  # whose tensors are in the checkpoints: this fills it
        make_model(args, states[0], encoder)

    if training:
        if args.weights == "none":
            log.info("warning: the encoder is untrained: good to see the code run, not for results")
        if (args.data, args.unified) not in TABLES:
            log.info(
                f"note: this setting of {args.data} is not in the paper; some settings are ours"
            )
        images = data.decode(train_samples, args.size, args.crop)
        data.warn_of_copies(train_samples, images, test_samples, test_images)
        groups = [classes] if args.unified else [[cls] for cls in classes]
        started = {state["name"]: state for state in states}
        states = [new_state(args, group) for group in groups]
        states = [started.get(state["name"], state) for state in states]
        for state in states:
            if not state["trained"]:
                torch.manual_seed(args.seed)
                model = make_model(args, state, encoder).to(device)
                fit(model, state, args, train_samples, images, device)

    results = {}
    for state in states:
        if RANK == 0:
            model = make_model(args, state, encoder).to(device)
            results |= test(model, state, args, test_samples, test_images, masks, device)
    if RANK == 0:
        report(args, results)


def test(model, state, args, samples, images, masks, device):
    """{row: metrics} of the test images of the model's classes, one row of the table at a time."""
    detector = Detector(model, args.score)
    rows = {sample.row for sample in samples if sample.cls in state["classes"]}
    if not rows and not args.classes:
        log.warning(f"warning: {state['name']}: no test images of its classes here (--root)")
    results = {}
    for row in dict.fromkeys(sample.row for sample in samples if sample.row in rows):
        index = [i for i, sample in enumerate(samples) if sample.row == row]
        its = [samples[i] for i in index]
        its_images = images[index]
        S, scores = infer(detector, its_images, device)
        results[row] = metrics.evaluate(its, scores, S, masks[index])
        if args.save_maps:
            where = Path(args.out, "maps", row)
            known = masks[index], state["calibration"]
            metrics.save_maps(where, its_images, its, scores, S, *known)
    return results


def report(args, results):
    """The table, the paper's figures beside ours, into the log and RUN/metrics.json."""
    if args.eval and not results:
        raise data.DataError("no test images of the classes that trained (--root, --classes)")
    paper = published(args, results)
    log.info(metrics.table([results], paper))
    if args.out:
        metrics.save_result(args.out, vars(args), results, paper)
        log.info(f"written to {args.out}")


def read_states(folder, typed):
    """The checkpoint, or all of a folder. UserError: not of this version, or models that do not
    belong to one table, as settings differ that were not typed."""
    paths = sorted(Path(folder).glob("[!.]*.pt")) or [Path(folder)]
    if not paths[0].is_file():
        raise data.UserError(f"--eval {folder}: no checkpoint, a file .pt, nor a folder of some")
    states = []
    seen = {}
    for path in paths:
        state = data.read_tensors(path)
        with data.explain(f"{path}: not a checkpoint of this version of minimaxad.py"):
            check_state(state)
        states.append(state)
        for cls in state["classes"]:
            if cls in seen:
                raise data.UserError(f"{path} and {seen[cls]} both have {cls}")
            seen[cls] = path
        for key in SETTINGS.keys() - {"classes"} - typed.keys():
            first, other = states[0]["args"][key], state["args"][key]
            if first != other:
                flag = f"--{key.replace('_', '-')}"
                raise data.UserError(
                    f"{flag} is {first} in {paths[0]} and {other} in {path}; "
                    "take models of one setting (but --root may be typed)"
                )
    return states


def check_state(state):
    """ValueError: not what new_state and fit make."""
    defaults = argparse.Namespace(**{key: default for key, (default, _) in SETTINGS.items()})
    data.check_like(state, new_state(defaults, [""]))
    if isinstance(state["args"]["classes"], str | dict):
        raise ValueError("--classes is no list")
    if state["epoch"] and not state["model"]:
        raise ValueError("no tensors")
    if state["trained"]:
        metrics.check_calibration(state["calibration"], state["classes"])


def open_folder(args):
    """The run's folder: new, or of a run that failed at its start, or to resume; log and args."""
    if RANK > 0 or not args.out:
        return
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    data.remove_leftovers(folder)
    files = {path.name for path in folder.iterdir() if data.is_shown(path)}
    files -= {"log.txt", "args.json"}
    if files and not args.resume:
        raise data.UserError(f"--out {folder} holds files; name a new folder, or --resume that run")
    log.parent.addHandler(logging.FileHandler(folder / "log.txt", errors="backslashreplace"))
    if not args.resume:
        with data.saved(folder / "args.json") as file:
            file.write(json.dumps(vars(args), indent=2).encode())


# ------------------------------------------------------------------------- the paper's own figures

TABLES = {  # (set, unified): the method and metric of each column; figures in %
    # Table 3
    ("mvtec", True): """
rd:i_auroc  adc:i_auroc
carpet       98.3  99.9
grid         99.0  98.2
leather     100.0 100.0
tile         98.1 100.0
wood         99.3  99.4
bottle       79.9 100.0
cable        86.8  99.0
capsule      96.3  96.0
hazelnut    100.0 100.0
metal_nut    99.8 100.0
pill         92.8  97.9
screw        96.5  94.1
toothbrush   97.5  98.9
transistor   93.3  97.6
zipper       98.6  99.7
mean         95.8  98.7
""",
    # Table 3
    ("visa", True): """
rd:i_auroc  adc:i_auroc
candle       93.6  98.7
capsules     67.8  91.3
cashew       94.6  97.8
chewinggum   95.3  98.9
fryum        94.4  96.8
macaroni1    97.2  98.5
macaroni2    86.2  89.4
pcb1         96.5  98.0
pcb2         93.0  97.0
pcb3         94.5  97.5
pcb4        100.0  99.8
pipe_fryum   99.7  99.7
mean         92.7  97.0
""",
    # Tables 4, 5, A3
    ("goodsad", False): """
rd:i_auroc adc:i_auroc rd:p_aupr rd:aupro adc:p_aupr adc:aupro
cigarette_box  65.1  97.8  23.7  72.7  60.0  86.2
drink_bottle   67.2  80.4  12.5  84.2  49.2  86.8
drink_can      63.3  90.8  17.4  81.9  49.1  87.0
food_bottle    76.6  91.0  25.4  84.3  63.0  92.8
food_box       63.3  78.9   5.8  75.9  20.0  83.9
food_package   63.5  77.3   7.7  79.4  30.7  87.5
mean           66.5  86.0  15.4  79.7  45.3  87.4
""",
    # Table 1
    ("aebad", False): """
rd:aupro rd:i_auroc global:aupro global:i_auroc
same          86.4  82.4  81.4  86.4
background    86.4  84.3  82.1  90.7
illumination  86.7  84.3  86.0  87.2
view          82.9  71.9  77.8  85.9
mean          85.6  81.0  81.8  87.6
""",
    # Table 2
    ("visa", False): """
rd:aupro rd:i_auroc global:aupro global:i_auroc
mean  70.9  96.0  90.4  96.4
""",
    # Table 6
    ("mad", False): """
rd:i_auroc adc:i_auroc
mean  66.8  84.7
""",
}


def published(args, rows):
    """The paper's figures, {row: {metric: value}}; {} where the model is not the paper's, trained
    however long."""
    theirs = {key: default for key, (default, _) in SETTINGS.items()} | preset_of(args)
    own = ["size", "crop", "arch", "backbone", "score"]
    if args.arch == "rd":
        own.append("loss")
    if args.unified:
        own.append("classes")  # of fewer it is another model
    if args.weights == "none" or any(vars(args)[key] != theirs[key] for key in own):
        return {}
    method = "rd" if args.arch == "rd" else args.loss
    header, *lines = TABLES.get((args.data, args.unified), "").strip().split("\n")
    result = {}
    for line in lines:
        row, *figures = line.split()
        result[row] = {}
        for column, figure in zip(header.split(), figures, strict=True):
            if column.startswith(f"{method}:"):
                result[row][column.split(":")[1]] = float(figure) / 100
    if args.classes or len(rows) == 1:  # its mean is over all classes
        result.pop("mean", None)
    return result


# --------------------------------------------------------------------------- a trained model's use


def known_class(args, state):
    """The class that all photos are of: the user says it, or there is one; else "", unknown."""
    known = state["classes"]
    classes = args.classes or known
    if args.classes and (len(classes) > 1 or classes[0] not in known):
        raise data.UserError(f"--classes: expected one of {', '.join(known)}")
    return classes[0] if len(classes) == 1 else ""


def predict(args, state, model, device):
    """Score, verdict and picture of each image of --predict; True if all could be read."""
    name = known_class(args, state)
    detector = Detector(model, args.score)
    paths = data.find_images(args.predict)
    open_folder(args)
    thresholds = metrics.thresholds(state["calibration"], args.quantile, [name])

    def judge(pixels):
        return *infer(detector, pixels, device), [name] * len(pixels)

    batch_size = 4 if device.type == "cpu" else 32
    options = state["calibration"], thresholds, args.out, batch_size, args.size, args.crop
    return metrics.predict(paths, judge, *options)


class Program(nn.Module):
    """What --export writes: photos as they are, uint8 B x 3 x H x W of any H and W, RGB -> S of the
    resized and cropped photo, score: B, threshold: B."""

    def __init__(self, detector, size, crop, threshold):
        super().__init__()
        self.detector = detector
        self.size = size
        self.crop = crop
        self.register_buffer("threshold", torch.tensor(threshold))

    def forward(self, photo):
        S, score = self.detector(data.resized_tensor(photo, self.size, self.crop))
        return S, score, self.threshold.expand(photo.shape[0])


def export(args, state, model):
    """Write a torch.export program, which needs nothing but torch."""
    name = known_class(args, state)
    thresholds = metrics.thresholds(state["calibration"], args.quantile, [name])
    detector = Detector(model, args.score)
    program = Program(detector, args.size, args.crop, thresholds[name]).eval()
    program.requires_grad_(False)
    shapes = {0: "B", 2: "H", 3: "W"}
    shapes = {axis: torch.export.Dim(axis_name, min=1) for axis, axis_name in shapes.items()}
    photo = torch.zeros(2, 3, 300, 400, dtype=torch.uint8)
    exported = torch.export.export(program, (photo,), dynamic_shapes=(shapes,))
    with data.saved(args.export) as file:
        torch.export.save(exported, file)
    log.info(f"{args.export}: RGB photos, uint8 B x 3 x H x W -> map, score, threshold")


# -------------------------------------------------------------------------------------- arguments

CHOICES = {
    "normals": ["01234", "56789", "02468", "13579"],
    "arch": ARCHS,
    "loss": LOSSES,
    "score": SCORES,
}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise data.UserError(f"{message} (--help lists the options)")


def get_parser():
    """A flag for each of SETTINGS and ACTIONS, and --no-FLAG for what is on or off."""
    parser = Parser(
        usage="%(prog)s [options]",
        description="MiniMaxAD (arXiv 2405.09933): train, evaluate, predict.",
        epilog=f"Presets: {PRESETS}; separate models: {SEPARATE}; --arch rd: {RD}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for key, (default, text) in (SETTINGS | ACTIONS).items():
        options = {"default": default, "help": text}
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = os.path.expanduser if default is None else type(default)
        if key in CHOICES:
            options["choices"] = list(CHOICES[key])
        if key in ("classes", "predict"):
            options["nargs"] = "+"
        parser.add_argument(f"--{key.replace('_', '-')}", **options)
    return parser


def preset_of(args):
    """The paper's settings for this set in this setting, or those of the nearest."""
    settings = {}
    if not args.unified:
        settings |= SEPARATE.get(args.data, SEPARATE["visa"])
    settings |= PRESETS.get(args.data, {})
    if args.arch == "rd":
        settings |= RD
    return settings


def parse_args(argv=None):
    """The arguments, and the states of the checkpoints of --eval or --resume. UserError.

    What is not typed comes from the set's preset, or with --eval and --resume from that run.
    """
    parser = get_parser()
    untyped = argparse.Namespace(**dict.fromkeys(SETTINGS | ACTIONS))  # stands for the defaults
    typed = vars(parser.parse_args(argv, untyped))
    typed = {key: value for key, value in typed.items() if value is not None}
    args = parser.parse_args([])
    states = []
    if typed.get("eval") or typed.get("resume"):
        states = saved_states(typed)
        preset = dict(states[0]["args"])
        subsets = [state["args"]["classes"] for state in states]
        preset["classes"] = None
        if all(subsets):  # of models that were trained side by side
            preset["classes"] = list(dict.fromkeys(sum(subsets, [])))
        if typed.get("predict") or typed.get("export"):
            preset["classes"] = None  # what is typed says of which class the photos are
    else:
        vars(args).update(typed)
        preset = preset_of(args)
    vars(args).update(preset)
    vars(args).update(typed)
    if args.classes:
        args.classes = list(map(data.composed, args.classes))

    if not args.out and not args.eval:
        args.out = f"runs/minimaxad-{args.data}-{'unified' if args.unified else 'separate'}"
    check(args, typed, states)
    return args, states


def saved_states(typed):
    """The states of --eval or --resume, whose settings are the run's."""
    free = {"root"}
    if typed.get("resume"):
        if "eval" in typed or "out" not in typed:
            raise data.UserError("--resume goes on with the run in --out RUN, without --eval")
        if not list(Path(typed["out"]).glob("[!.]*.pt")):
            raise data.UserError(
                f"--resume: no checkpoint in {typed['out']}; start it again without --resume"
            )
        states = read_states(typed["out"], typed)
    else:
        states = read_states(typed["eval"], typed)
        free |= {"classes"}
        calibrated = {"predict", "export", "save_maps"}  # as the run was
        if not typed.keys() & calibrated:
            free |= {"score"}
        if not all(state["trained"] for state in states):
            raise data.UserError(
                f"--eval {typed['eval']}: its training stopped early; finish it with --resume"
            )
    for key in typed.keys() & SETTINGS.keys() - free:
        saved = states[0]["args"][key]
        raise data.UserError(
            f"--{key.replace('_', '-')} {typed[key]}: the run has {saved}, leave it out"
        )
    return states


def check(args, typed, states):
    """UserError where a value is out of range or flags do not go together."""
    for key, value in typed.items():
        flag = f"--{key.replace('_', '-')}"
        if value == "" or value == [] or (isinstance(value, list) and "" in value):
            raise data.UserError(f"{flag}: empty, as an unset variable is")
        least = 1 if key in ("epochs", "batch_size", "size") else 0
        most = 1 if key in ("holdout", "quantile", "p_hard", "p_lim") else 2**31
        if isinstance(value, int | float) and not least <= value <= most:
            raise data.UserError(f"{flag} {value}: expected {least} to {most}")
    if "root" in typed and args.data == "toy":
        raise data.UserError(f"--root {args.root}: of which set? --data folder for your own photos")
    if args.data == "cifar10" and not args.unified:
        raise data.UserError("--data cifar10 --no-unified: its five classes train one model")
    if args.crop > args.size:
        raise data.UserError(f"--crop {args.crop} is larger than --size {args.size}")
    if (args.crop or args.size) <= 32:  # BatchNorm has no variance of one image's one position
        raise data.UserError("--size, --crop: more than 32, else the bottleneck has one position")
    check_use(args, typed, states)


def check_use(args, typed, states):
    """Of --predict, --export and --save-maps."""
    if args.predict or args.export:
        if len(states) != 1 or not args.eval:
            raise data.UserError("--predict and --export take one model, --eval RUN/FILE.pt")
        if WORLD > 1:
            raise data.UserError("--predict and --export are for one process: without torchrun")
    elif "quantile" in typed:
        raise data.UserError("--quantile is for --predict and --export")
    if (args.predict or args.save_maps) and not args.out:
        raise data.UserError("--predict and --save-maps write into a new folder, --out DIR")
    for path in args.predict or []:
        if Path(args.out).resolve().is_relative_to(Path(path).resolve()):
            raise data.UserError(f"--out {args.out} lies in --predict {path}: name another folder")
    if args.export and not args.export.endswith(".pt2"):
        raise data.UserError(f"--export {args.export}: name it {args.export}.pt2")
    if args.export and Path(args.export).exists():
        raise data.UserError(f"--export {args.export}: exists; name a new file")


def get_device(name):
    """The torch device, of several processes one GPU each; ready for use. UserError: none."""
    with data.explain(f"--device {name}"):
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", LOCAL_RANK)
        torch.zeros(1, device=device).item()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    return device


def main(argv=None):
    """Exit status 0; 1: an image was not judged; 2: a line says why; 130: interrupted."""
    level = logging.ERROR if RANK else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout, force=True)
    logging.raiseExceptions = False  # a full disk is told where a checkpoint is written
    saves = None  # where a training does
    try:
        args, states = parse_args(argv)
        device = get_device(args.device)
        if LAUNCHED:
            backend = "nccl" if args.device == "cuda" else "gloo"  # NCCL: a GPU for each process
            dist.init_process_group(backend, timeout=timedelta(hours=1))
        if args.predict or args.export:
            model = make_model(args, states[0], load_encoder(args.backbone, "none"))
            if args.export:
                export(args, states[0], model)
            if args.predict and not predict(args, states[0], model.to(device), device):
                sys.exit(1)
        else:
            saves = args.out if not args.eval else None
            run(args, states, device)
        if LAUNCHED:
            dist.destroy_process_group()
    except (data.UserError, OSError) as error:
        if RANK:
            time.sleep(10)  # if process 0 says the same, torchrun has ended this one by then
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        resumable = saves and list(Path(saves).glob("[!.]*.pt"))
        hint = "; --resume goes on from the last checkpoint, one a minute"
        if RANK == 0:
            print(f"interrupted{hint if resumable else ''}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a file name need not be UTF-8
    main()
