"""MiniMaxAD: A Lightweight Autoencoder for Feature-Rich Anomaly Detection, arXiv 2405.09933.

A frozen ImageNet network (UniRepLKNet-N) turns an image into feature maps at three scales. A bottleneck and a
decoder that mirrors the network learn to reproduce those of normal images; where they fail is an anomaly.

    python minimaxad.py                                              # built-in toy set, no data, no download
    python minimaxad.py --data goodsad --weights unireplknet_n.pth   # MiniMaxAD-fr, one per class (Table 4)
    torchrun --nproc_per_node=4 minimaxad.py --data mvtec --unified --weights unireplknet_n.pth  # Table 3
    python minimaxad.py --data visa --unified --arch rd              # the baseline (Table 7, first line)
    python minimaxad.py --eval runs/minimaxad-goodsad-separate/seed1-drink_can.pt --predict photos/

    B  batch    C  channels    H, W  height, width    k = 1, 2, 3  scale, at strides 4, 8, 16
    maps        list of three tensors B x C_k x H_k x W_k, from fine to coarse
    S           anomaly map, B x H x W at the image's size

Details and their sources; where paper and authors' code disagree, or this file differs, the line says so:

 1. Encoder: UniRepLKNet's stages 1 to 3, frozen, fused; each output passes a LayerNorm without learned values
    (the authors' norm0..2 are not in the ImageNet checkpoint, so stay 1 and 0). Or any timm CNN.
 2. Bottleneck, decoder: Kaiming, fan out (transposed: torch's default); no bias outside blocks (their code).
 3. Eq. 4's index 0 is a slip for 1. Eq. 8 compares S^2 with a quantile of S (paper and authors' code).
 4. Test: S is blurred (sigma 4), the score its maximum (Reverse Distillation, the authors' first evaluation).
 5. AdamW, lr 5e-3, x 0.995 each epoch, weight decay 5e-5 (authors' code 1e-5), the last batch is kept.
 6. Over several processes every loss, quantile, count and BatchNorm is that of the global batch.
 7. Each epoch sets the random state from (seed, epoch, process): a checkpoint alone continues bit for bit.
"""
import argparse
import contextlib
import copy
import ctypes
import math
import os
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
from scipy import ndimage
from timm.layers import LayerNorm2d, SEModule
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

import data
import metrics
from data import LOCAL_RANK, RANK, WORLD, log, progress

# ---------------------------------------------------------------- settings
PAPER = dict(data="toy", root=None, unified=False, classes=None, normals="01234", size=256, crop=None,
             augment=False, arch="minimax", backbone="unireplknet_n", weights=None, loss=None, p_hard=0.9999,
             p_lim=0.9995, seed=[1], epochs=None, batch_size=16, lr=5e-3, gamma=0.995, weight_decay=5e-5,
             amp=False, holdout=0.0, score="max")
PRESETS = {  # (set, unified?): adc is MiniMaxAD-fr, for feature-rich sets, global MiniMaxAD-fp
    ("goodsad", False): dict(size=224, epochs=240, loss="adc"),
    ("mad", False): dict(size=400, epochs=150, loss="adc"),
    ("mvtec", True): dict(size=256, epochs=100, loss="adc"),
    ("visa", True): dict(size=256, epochs=100, loss="adc"),  # authors' code 160 epochs
    ("visa", False): dict(size=256, epochs=130, loss="global"),  # authors' code 150 epochs
    ("aebad", False): dict(size=256, crop=224, epochs=130, loss="global"),
}
RD = dict(backbone="wide_resnet50_2.tv_in1k", epochs=200, gamma=1.0, weight_decay=0.0, loss="global")
TOY = dict(unified=True, size=128, epochs=6, loss="adc", backbone="unireplknet_a", weights="none",
           holdout=0.1)
SETTINGS = [key for key in PAPER if key not in ("root", "seed")]  # a checkpoint keeps them
PROGRAM = Path(__file__).stem

# ---------------------------------------------------------------- layers
class BatchNorm(nn.BatchNorm2d):
    """BatchNorm with the global batch's training statistics, on a CPU too (torch's SyncBatchNorm: GPUs)."""
    def forward(self, x):
        if not self.training or WORLD == 1:
            return super().forward(x)
        y = x.float()
        n = y.new_full((1,), y[:, 0].numel())
        sums = torch.cat([y.sum((0, 2, 3)), y.square().sum((0, 2, 3)), n])  # 2C + 1
        sums = dist.nn.all_reduce(sums)  # its gradient is summed over the processes, too
        n, (mean, square) = sums[-1], (sums[:-1] / sums[-1]).chunk(2)
        var = square - mean.square()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        return (y * scale.view(1, -1, 1, 1) + (self.bias - mean * scale).view(1, -1, 1, 1)).to(x.dtype)

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

class Depthwise(nn.Conv2d):
    """Depthwise convolution, on a CPU in float32: in bfloat16 torch's weight gradient, dilated, is wrong."""
    def __init__(self, channels, kernel, dilation=1):
        super().__init__(channels, channels, kernel, padding=dilation * (kernel - 1) // 2, dilation=dilation,
                         groups=channels, bias=False)

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.to(self.weight.dtype) if x.is_cpu else x)

class DilatedReparam(nn.Module):
    """Depthwise 13 x 13 convolution plus parallel small dilated ones, each with its BatchNorm, summed."""
    BRANCHES = (5, 1), (7, 2), (3, 3), (3, 4), (3, 5)  # kernel, dilation: all reach within 13 x 13

    def __init__(self, channels):
        super().__init__()
        self.lk_origin, self.origin_bn = Depthwise(channels, 13), BatchNorm(channels)
        for kernel, dilation in self.BRANCHES:
            self.add_module(f"dil_conv_k{kernel}_{dilation}", Depthwise(channels, kernel, dilation))
            self.add_module(f"dil_bn_k{kernel}_{dilation}", BatchNorm(channels))

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
            inside = slice(6 - reach, 7 + reach, step)  # where its taps fall in the large kernel
            merged.weight.data[:, :, inside, inside] += conv.weight.data
            merged.bias.data += conv.bias.data
        return merged

def layout(x):
    """Channels last on a CPU, where it trains faster; first elsewhere, as torch's CUDA depthwise kernels."""
    return x.contiguous(memory_format=torch.channels_last if x.is_cpu else torch.contiguous_format)

class Block(nn.Module):
    """UniRepLKNet's block: SmaK with a depthwise 3 x 3, LarK with the dilated reparam 13 x 13 convolution."""
    def __init__(self, channels, kernel):
        super().__init__()
        self.dwconv = DilatedReparam(channels) if kernel == 13 else Depthwise(channels, kernel)
        self.norm = BatchNorm(channels)
        self.se = SEModule(channels, rd_channels=channels // 4)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.grn = GRN(4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels, bias=False)
        self.norm2 = BatchNorm(channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x):
        x = layout(x)
        y = self.se(self.norm(self.dwconv(x)))
        y = F.gelu(self.pwconv1(y.permute(0, 2, 3, 1)))  # B x H x W x 4C
        y = self.pwconv2(self.grn(y)).permute(0, 3, 1, 2)  # B x C x H x W
        return torch.addcmul(x, self.norm2(y), self.gamma[:, None, None])

class Residual(nn.Module):
    """ResNet's block, basic (width = out) or bottleneck; mode "down" halves the size, "up" doubles it."""
    def __init__(self, in_channels, width, out_channels, mode="same"):
        super().__init__()
        if width == out_channels:
            convs = [conv(in_channels, width, 3, mode), conv(width, out_channels, 3)]
        else:
            convs = [conv(in_channels, width, 1), conv(width, width, 3, mode), conv(width, out_channels, 1)]
        layers = [m for c in convs for m in (c, BatchNorm(c.out_channels), nn.ReLU())]
        self.residual = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Sequential()
        if mode != "same" or in_channels != out_channels:
            self.shortcut = nn.Sequential(conv(in_channels, out_channels, 1, mode), BatchNorm(out_channels))

    def forward(self, x):
        return F.relu(self.residual(x) + self.shortcut(x))

def conv(in_channels, out_channels, kernel, mode="same"):
    """Convolution without bias: "down" halves the size (rounded up), "up" doubles it (transposed, 2 x 2)."""
    if mode == "up":
        return nn.ConvTranspose2d(in_channels, out_channels, 2, 2, bias=False)
    return nn.Conv2d(in_channels, out_channels, kernel, 2 if mode == "down" else 1, kernel // 2, bias=False)

def halve(in_channels, out_channels):
    return nn.Sequential(conv(in_channels, out_channels, 3, "down"), BatchNorm(out_channels), nn.ReLU())

def fold(layer, bn):
    """A copy of a convolution or linear layer with the BatchNorm after it folded in."""
    if isinstance(layer, nn.Linear):
        return nn.utils.fuse_linear_bn_eval(layer, bn)
    return nn.utils.fuse_conv_bn_eval(layer, bn, transpose=isinstance(layer, nn.ConvTranspose2d))

def fuse(model):
    """A copy of the model for inference that gives, up to rounding, the model's output in eval mode.
    A dilated reparam becomes one convolution, a BatchNorm goes into the layer registered before it (here and
    in timm the one that feeds it), a GRN's beta into the layer after it."""
    model = copy.deepcopy(model).eval()
    for parent in list(model.modules()):
        if isinstance(parent, Block) and isinstance(parent.dwconv, DilatedReparam):
            parent.dwconv = parent.dwconv.fused()
        for (name, layer), (bn_name, bn) in pairwise(list(parent.named_children())):
            linear = isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
            if linear and type(bn) in (nn.BatchNorm2d, BatchNorm):
                setattr(parent, name, fold(layer, bn))
                setattr(parent, bn_name, nn.Identity())
        if isinstance(parent, Block) and parent.grn.beta is not None:  # fold() gave pwconv2 a bias
            parent.pwconv2.bias.data += parent.pwconv2.weight @ parent.grn.beta.flatten()
            parent.grn.beta = None
    return model.requires_grad_(False)

# ---------------------------------------------------------------- model
UNIREPLKNET = {  # channels of stage 1, doubled from stage to stage; kernels of the blocks of stages 1 to 3
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
            nn.Sequential(nn.Conv2d(3, c // 2, 3, 2, 1), LayerNorm2d(c // 2), nn.GELU(),
                          nn.Conv2d(c // 2, c, 3, 2, 1), LayerNorm2d(c)),
            nn.Sequential(nn.Conv2d(c, 2 * c, 3, 2, 1), LayerNorm2d(2 * c)),
            nn.Sequential(nn.Conv2d(2 * c, 4 * c, 3, 2, 1), LayerNorm2d(4 * c)),
        ])
        self.stages = nn.ModuleList(map(stage, self.channels, self.kernels))
        self.norms = nn.ModuleList(LayerNorm2d(channels, affine=False) for channels in self.channels)

    def forward(self, image):
        x, maps = layout(image), []
        for downsample, stage, norm in zip(self.downsample_layers, self.stages, self.norms):
            x = stage(downsample(x))
            maps.append(norm(x))
        return maps

class TimmEncoder(nn.Module):
    """A timm CNN's features at strides 4, 8, 16; its decoder has as many blocks as UniRepLKNet-N's."""
    def __init__(self, name):
        super().__init__()
        with data.explain(f"--backbone {name}: not a CNN with features at strides 4, 8, 16"):
            with torch.device("meta"):
                info = timm.create_model(name, features_only=True).feature_info
            index = dict(zip(info.reduction(), info.out_indices))
            self.net = timm.create_model(name, features_only=True, out_indices=[index[s] for s in (4, 8, 16)])
            self.kernels, self.channels = UNIREPLKNET["unireplknet_n"][1:], self.net.feature_info.channels()
            shape = self.net.eval()(torch.zeros(1, 3, 64, 64))[0].shape
            if shape != (1, self.channels[0], 16, 16):
                raise ValueError(f"its features are {tuple(shape)}")

    def forward(self, image):
        return self.net(layout(image))

def load_encoder(name, weights):
    """The frozen encoder, fused for inference: standardised images B x 3 x H x W -> maps.
    name: a key of UNIREPLKNET or any timm CNN of strides 4, 8, 16. weights, errors: data.load_weights.
    Its buffers mean and std, 3 x 1 x 1, standardise RGB in 0..1."""
    mean, std = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
    if name in UNIREPLKNET:
        encoder = UniRepLKNet(name)
        if weights is None:
            raise data.DataError(f"--backbone {name}: pass --weights FILE, the ImageNet-1K checkpoint from "
                                 "https://github.com/AILab-CVC/UniRepLKNet, or --weights none (untrained)")
        data.load_weights(encoder, name, weights, authors_key)
    elif not timm.is_model(name):
        guess = data.nearest(name, [*UNIREPLKNET, *timm.list_models()])
        raise data.DataError(f"--backbone {name}: unknown{guess}")
    else:
        encoder = TimmEncoder(name)
        data.load_weights(encoder.net, name, weights)
        mean, std = encoder.net.pretrained_cfg["mean"], encoder.net.pretrained_cfg["std"]
    encoder.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
    encoder.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
    return fuse(encoder)

def authors_key(key):
    """A tensor's name in the authors' UniRepLKNet files."""
    names = {"pwconv1": "pwconv1.1", "grn": "act.1", "pwconv2": "pwconv2.0", "norm2": "pwconv2.2",
             "se.fc1": "se.down", "se.fc2": "se.up"}
    for ours, theirs in names.items():
        key = key.replace(f".{ours}.", f".{theirs}.")
    return key

class Bottleneck(nn.Module):
    """Three maps, brought to the size and width of the third, `compress`ed: -> B x 2C_3 x H_3/2 x W_3/2."""
    def __init__(self, channels, compress):
        super().__init__()
        c1, c2, c3 = channels
        self.from1 = nn.Sequential(*halve(c1, c2), *halve(c2, c3))
        self.from2 = nn.Sequential(*halve(c2, c3))
        self.compress = compress

    def forward(self, maps):
        return self.compress(torch.cat([self.from1(maps[0]), self.from2(maps[1]), maps[2]], 1))  # of 3C_3

def minimax(encoder):
    """MiniMaxAD's bottleneck and the decoder's three stages, which mirror the encoder's."""
    widths, stages = encoder.channels, []
    channels = 2 * widths[2]
    compress = nn.Sequential(conv(3 * widths[2], channels, 3, "down"), stage(channels, [3, 3]))
    for width, kernels in zip(widths[::-1], encoder.kernels[::-1]):
        up = conv(channels, width, 2, "up")
        stages.append(nn.Sequential(up, LayerNorm2d(width), stage(width, kernels)))
        channels = width
    return Bottleneck(widths, compress), nn.ModuleList(stages)

def reverse_distillation(encoder):
    """Bottleneck and decoder of the baseline: residual stages. DataError if the encoder is no timm ResNet."""
    layers = [getattr(getattr(encoder, "net", None), f"layer{k}", None) for k in (1, 2, 3)]
    if None in layers:
        raise data.DataError("--arch rd needs a ResNet, for example --backbone wide_resnet50_2.tv_in1k")
    outputs, stages = encoder.channels, []
    widths, depths = [layer[0].conv1.out_channels for layer in layers], [len(layer) for layer in layers]
    channels = 2 * outputs[2]
    compress = residual_stage(3 * outputs[2], 2 * widths[2], channels, "down", depths[0])
    for width, output, depth in zip(widths[::-1], outputs[::-1], depths):  # depths: not reversed, as RD's
        stages.append(residual_stage(channels, width, output, "up", depth))
        channels = output
    return Bottleneck(outputs, compress), nn.ModuleList(stages)

def residual_stage(in_channels, width, out_channels, mode, depth):
    return nn.Sequential(Residual(in_channels, width, out_channels, mode),
                         *(Residual(out_channels, width, out_channels) for _ in range(depth - 1)))

class MiniMaxAD(nn.Module):
    """Frozen encoder, bottleneck and decoder: standardised images B x 3 x H x W -> encoder's, decoder's maps.
    arch: "minimax", or "rd" for Reverse Distillation, whose encoder is a timm ResNet (else DataError)."""
    needs_label = False  # at test time

    def __init__(self, encoder, arch="minimax"):
        super().__init__()
        self.encoder = encoder
        self.bottleneck, self.decoder = reverse_distillation(encoder) if arch == "rd" else minimax(encoder)
        for module in (*self.bottleneck.modules(), *self.decoder.modules()):
            if isinstance(module, nn.Conv2d):  # transposed ones keep torch's default
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def train(self, mode=True):
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, image):
        with torch.no_grad():
            encoder_maps = self.encoder(image)
        x, decoder_maps = self.bottleneck(encoder_maps), []
        for stage in self.decoder:  # from coarse to fine, each doubles the size
            x = stage(x)
            decoder_maps.insert(0, x)
        return encoder_maps, decoder_maps

# ---------------------------------------------------------------- losses
# Every loss is this process's part of the loss of the global batch, which may be split unevenly, with nothing
# for some: the parts, and so their gradients, add up to what one process gets for the whole batch.

def all_pixels(S):
    """S, B x H x W, of the global batch as a vector, without gradient, on every process."""
    S = S.detach().flatten()
    if WORLD == 1:
        return S
    sizes = gather(torch.tensor([len(S)])).tolist()
    parts = gather(F.pad(S, (0, max(sizes) - len(S))).unsqueeze(0))  # WORLD x the longest
    return torch.cat([part[:size] for part, size in zip(parts, sizes)])

def quantile(x, p):
    """p-quantile of a vector x as torch.quantile's, but fast for p near 1 and of any number of elements."""
    rank = p * (len(x) - 1)
    k = len(x) - int(rank)  # the k largest end at the element just below the rank
    top = x.topk(k).values
    below, above = top[k - 1], top[max(k - 2, 0)]
    return below + (above - below) * (rank - int(rank))

def adc_threshold(pixels, p_hard=0.9999, p_lim=0.9995):
    """Eq. 8: the value of S^2 from which on a pixel is mined; pixels: S of the global batch, a vector."""
    alpha = quantile(pixels, p_hard)  # of S, although S^2 is compared: so in the paper and the authors' code
    beta = quantile(pixels.square(), p_lim)
    sigma2 = pixels.var()
    A = (pixels.square() >= alpha - sigma2).sum()  # as many as alpha would mine
    N = max(1, len(pixels) * (1 - p_lim))  # the least to mine; p_lim = 1 would mine none
    return torch.where(A >= N, alpha, beta) - sigma2

def mined_mean(S, threshold):
    """Mean of S^2 over the pixels with S^2 >= threshold, and their number in the global batch (Figure 4a)."""
    squares = S.square()
    mined = squares >= threshold
    count = total(mined.sum())
    return (squares * mined).sum() / count, count

def adc_loss(S, p_hard=0.9999, p_lim=0.9995):
    """Eq. 8 of S, B x H x W."""
    return mined_mean(S, adc_threshold(all_pixels(S), p_hard, p_lim))[0]

def global_loss(encoder_maps, decoder_maps):
    """Eq. 2: 1 - cosine of the flattened maps, summed over the scales, mean over the batch."""
    batch = int(total(torch.tensor(len(encoder_maps[0]))))
    flat = [(e.flatten(1), d.flatten(1)) for e, d in pairs(encoder_maps, decoder_maps)]
    return sum(1 - F.cosine_similarity(e, d) for e, d in flat).sum() / batch

def training_loss(name, encoder_maps, decoder_maps, size, p_hard=0.9999, p_lim=0.9995):
    """The loss "local", "local-hm", "adc" or "global" of size x size images; the pixels that enter it."""
    if name == "global":
        pixels = torch.tensor(len(encoder_maps[0]) * size**2, device=encoder_maps[0].device)
        return global_loss(encoder_maps, decoder_maps), total(pixels)
    S = anomaly_map(encoder_maps, decoder_maps, size, "nearest")
    threshold = 0  # Eq. 7, "local": all pixels. (Eq. 1, the mean of M on each scale, is its predecessor.)
    if name == "local-hm":
        threshold = quantile(all_pixels(S).square(), p_lim)  # Eq. 9
    elif name == "adc":
        threshold = adc_threshold(all_pixels(S), p_hard, p_lim)  # Eq. 8
    return mined_mean(S, threshold)

# ---------------------------------------------------------------- anomaly map and score
def pairs(encoder_maps, decoder_maps):
    """Both maps of each scale, the decoder's resized (nearest): at 400 pixels 104, 52, 26 to 100, 50, 25."""
    for e, d in zip(encoder_maps, decoder_maps):
        yield e.float(), (d if d.shape == e.shape else F.interpolate(d, e.shape[2:])).float()

def anomaly_map(encoder_maps, decoder_maps, size, mode):
    """Eq. 4: S, B x H x W with (H, W) = size or (size, size), from 0 (as expected) to 6.
    mode: how scales are resized, "nearest" (training) or "bilinear" with aligned corners (test)."""
    S, options = 0, {"align_corners": True} if mode == "bilinear" else {}
    for e, d in pairs(encoder_maps, decoder_maps):
        M = 1 - F.cosine_similarity(e, d, dim=1)  # Eq. 3, B x H_k x W_k
        S = S + F.interpolate(M[:, None], size, mode=mode, **options)[:, 0]  # B x H x W
    return S  # authors' code: S / 3 at test time

def gaussian_blur(S, radius, mode):
    """B x H x W convolved with a Gaussian of sigma 4 cut off at radius; mode: SciPy's, for the border."""
    rows, columns = (ndimage.gaussian_filter1d(np.eye(length), 4.0, 0, mode=mode, radius=radius)
                     for length in S.shape[1:])
    return S.new_tensor(rows) @ S @ S.new_tensor(columns).T

def image_score(S, score="max"):
    """The blurred map, B x H x W, and the image scores, B. score:
    "max", "mean" (CIFAR-10): blurred as in Reverse Distillation and the authors' first evaluation.
    "max5x5", "top1": maximum, or mean of the top 1 %, of the authors' later ones, the former on VisA."""
    small = score in ("max5x5", "top1")
    S = gaussian_blur(S, 2, "constant") if small else gaussian_blur(S, 16, "reflect")  # 0 or c b a | a b c
    pixels = S.flatten(1)  # B x HW
    if score == "top1":
        return S, pixels.topk(max(1, pixels.shape[1] // 100)).values.mean(1)
    return S, pixels.mean(1) if score == "mean" else pixels.amax(1)

def map_variance(maps):
    """Figure 3c: variance of the L2-normalised maps, summed over the scales.
    At most the sum of 1 / C_k, reached at mean zero: 0.0219 for UniRepLKNet-N, 0.0068 for a ResNet-50."""
    return sum(F.normalize(m.float(), dim=1).var() for m in maps)

# ---------------------------------------------------------------- train
def train(model, state, samples, images, index, folder, device):
    """Train bottleneck and decoder in place on images[index], from where state stops; saved each epoch."""
    s = argparse.Namespace(**state["settings"])
    size, name = s.crop or s.size, state["name"]
    Adam, betas = (torch.optim.Adam, (0.5, 0.999)) if s.arch == "rd" else (torch.optim.AdamW, (0.9, 0.999))
    optimizer = Adam([p for p in model.parameters() if p.requires_grad], s.lr, betas,
                     weight_decay=s.weight_decay, fused=device.type in ("cpu", "cuda"))
    if state["optimizer"]:
        optimizer.load_state_dict(state["optimizer"])
    parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if WORLD > 1 else model
    for epoch in range(state["epoch"], s.epochs):
        start, losses, mined = time.time(), 0.0, 0.0
        for group in optimizer.param_groups:
            group["lr"] = s.lr * s.gamma**epoch  # ExponentialLR
        seed = 1_000_003 * state["seed"] + epoch
        order = torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed * 4099 + RANK)  # augmentation; nothing else is random
        model.train()
        batches = order.split(s.batch_size)
        for batch in progress(batches, f"{name} epoch {epoch + 1}"):
            part = index[batch[RANK::WORLD].numpy()]  # this process's share of the global batch, maybe none
            if s.augment:
                x = augmented([samples[i] for i in part], size, device)
            else:
                x = data.to_device(images[part], device)
            with torch.autocast(device.type, torch.bfloat16, enabled=s.amp):
                encoder_maps, decoder_maps = parallel((x - model.encoder.mean) / model.encoder.std)
            loss, count = training_loss(s.loss, encoder_maps, decoder_maps, size, s.p_hard, s.p_lim)
            optimizer.zero_grad()
            (WORLD * loss).backward()  # DistributedDataParallel takes the mean over the processes
            optimizer.step()
            losses, mined = losses + loss.detach(), mined + count
        loss, mined = total(losses).item() / len(batches), mined.item() / len(batches)
        if not math.isfinite(loss):
            raise data.DataError(f"diverged in epoch {epoch + 1}; the last checkpoint is good. Lower --lr")
        encoder, decoder = (map_variance(maps).item() for maps in (encoder_maps, decoder_maps))
        log(f"{name} epoch {epoch + 1}/{s.epochs}: {s.loss} loss {loss:.5f}, mined pixels {mined:.0f}, "
            f"variance of the maps {encoder:.5f} encoder {decoder:.5f} decoder, {time.time() - start:.1f} s")
        state.update(epoch=epoch + 1, model=model.state_dict(), optimizer=optimizer.state_dict())
        save(folder, state)

def augmented(samples, size, device):
    """The authors' augmentation for AeBAD, random resized crop and flip: B x 3 x size x size in 0..1."""
    from torchvision.transforms import v2
    one = v2.Compose([v2.RandomResizedCrop(size, (0.7, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
                      v2.RandomHorizontalFlip(), v2.PILToTensor()])
    with ThreadPoolExecutor() as threads:
        images = [one(image) for image in threads.map(data.read_image, [sample.image for sample in samples])]
    images = torch.stack(images) if images else torch.zeros(0, 3, size, size)
    return images.to(device, non_blocking=True).float() / 255

# ---------------------------------------------------------------- evaluate
class Inference(nn.Module):
    """The fused network: image B x 3 x S x S in 0..1 -> anomaly map B x S x S, score B."""
    def __init__(self, model, args):
        super().__init__()
        self.model, self.size, self.score = fuse(model), args.crop or args.size, args.score

    def forward(self, image):
        maps = self.model((image - self.model.encoder.mean) / self.model.encoder.std)
        return image_score(anomaly_map(*maps, self.size, "bilinear"), self.score)

def judge(model, args, classes, samples, images, device):
    """Maps N x S x S and scores N of the images; no class (-1) is predicted."""
    return *infer(Inference(model, args), images, device), [-1] * len(images)

def evaluate(model, state, test, images, masks, args, folder, device):
    """{row: metrics} of the test images of the model's classes; with --save-maps their pictures."""
    index = [i for i, sample in enumerate(test) if args.data == "cifar10" or sample.cls in state["classes"]]
    if not index:
        return {}
    samples, images, masks = [test[i] for i in index], images[index], masks[index]
    maps, scores, _ = judge(model, args, state["classes"], samples, images, device)
    if RANK:
        return {}
    if args.save_maps:
        pictures = folder / "maps" / f"seed{state['seed']}"
        metrics.save_maps(pictures, samples, images, masks, maps, scores, state["normal"], args.quantile)
    return metrics.evaluate(samples, scores, maps, masks, log)["classes"]

# ---------------------------------------------------------------- a run and its files
def train_run(args, device):
    """Train and evaluate a model per seed and, unless --unified, per class; then the table."""
    folder, results = claim(args), {seed: {} for seed in args.seed}
    settings = {key: getattr(args, key) for key in SETTINGS}
    log(f"{PROGRAM}.py: {show(settings)}, seeds {args.seed}, {WORLD} process(es), {device}")
    dataset, *test = load(args)
    images = decode(args, dataset.train, "training images")
    held_out = metrics.hold_out(dataset.train, args.holdout)
    if args.weights == "none":
        log("warning: the backbone is untrained (--weights none): good to see the code run, not for results")
    torch.manual_seed(0)  # an untrained backbone is the same for all seeds and processes
    backbone = build_backbone(settings, args.weights)
    for seed in args.seed:
        for classes in [dataset.classes] if args.unified else [[cls] for cls in dataset.classes]:
            of_classes = np.array([sample.cls in classes for sample in dataset.train])
            index, kept = np.flatnonzero(of_classes & ~held_out), np.flatnonzero(of_classes & held_out)
            listing = data.listing([dataset.train[i] for i in index])
            name = f"seed{seed}" if args.unified else f"seed{seed}-{classes[0].replace('/', '_')}"
            # What a checkpoint holds; model and optimizer are those after the epoch, images are names and
            # sizes, normal is, once trained, what normal images look like to the model (metrics.calibrate).
            state = dict(name=name, settings=settings, root=args.root, seed=seed, classes=classes, epoch=0,
                         images=listing, model=None, optimizer=None, normal=None)
            state = from_first(resume, folder, state) if args.resume else state
            from_first(metrics.save_json, folder / "args.json", vars(args), {})
            torch.manual_seed(seed)
            model = build(state, backbone).to(device)
            if state["normal"] is None:  # not finished
                train(model, state, dataset.train, images, index, folder, device)
                seen = kept if len(kept) else index[::math.ceil(len(index) / 1000)]  # 1000 will do
                samples = [dataset.train[i] for i in seen]
                maps, scores, _ = judge(model, args, classes, samples, images[seen], device)
                state["normal"] = metrics.calibrate(maps, scores, [s.cls for s in samples], len(kept) > 0)
                state["optimizer"] = None  # it is not needed any more
                save(folder, state)
            results[seed] |= evaluate(model, state, dataset.test, *test, args, folder, device)
    report(args, results, folder)

def eval_run(args, device):
    """Evaluate a checkpoint, or all of a run's folder, on the test images as they lie there now."""
    states = load_run(args)
    folder, results = claim(args), {seed: {} for seed in args.seed}
    dataset, *test = load(args)
    for cls in sorted(set(dataset.classes) - {cls for state in states for cls in state["classes"]}):
        log(f"warning: class '{cls}' was not trained and is left out")
    for state in states:
        if state["normal"] is None:
            log(f"warning: {state['name']}: training stopped after epoch {state['epoch']} of {args.epochs}")
        model = build(state).to(device)
        results[state["seed"]] |= evaluate(model, state, dataset.test, *test, args, folder, device)
    report(args, results, folder)

def load(args):
    """The data set, its test images and masks; DataError if there is nothing to train on or to evaluate."""
    dataset = data.load(args.data, args.root, args.classes, args.normals)
    if not (dataset.test if args.eval else dataset.train):
        raise data.DataError(f"{args.data}: no {'test' if args.eval else 'training'} images")
    return dataset, decode(args, dataset.test, "test images"), decode(args, dataset.test, "masks")

def decode(args, samples, name):
    """uint8 N x S x S x 3 images, or if name is "masks" the bool N x S x S masks, decoded once a node."""
    cache = None if args.cache == "none" or args.data == "toy" else args.cache
    if LOCAL_RANK and cache:
        total(torch.zeros(1))  # waits until the node's first process has filled the cache
    array = data.decode(samples, args.size, args.crop, name == "masks", cache, args.workers, name)
    if LOCAL_RANK == 0 and cache:
        total(torch.zeros(1))
    return array

def report(args, results, folder):
    """Print the table and write metrics.json, from {seed: {row: metrics}}."""
    if RANK == 0:
        result = metrics.over_seeds(results)
        log(metrics.table(result, paper_figures(args, result["classes"])))
        settings = {key: getattr(args, key) for key in ("seed", *SETTINGS)}
        metrics.save_json(folder / "metrics.json", settings, result)
        log(f"written to {folder}")

def claim(args):
    """The run's folder: --out, runs/PROGRAM-SET-SETTING, or eval or predict beside the checkpoint."""
    folder = Path(args.out or f"runs/{PROGRAM}-{args.data}-{'unified' if args.unified else 'separate'}")
    if args.eval and not args.out:
        source = Path(args.eval)
        folder = (source if source.is_dir() else source.parent) / ("predict" if args.predict else "eval")
    if RANK == 0:
        data.LOG.append(data.claim(folder, PROGRAM, args.resume))
        if args.eval:
            metrics.save_json(folder / "args.json", vars(args), {})
    return folder

def save(folder, state):
    if RANK == 0:
        with data.atomic(folder / f"{state['name']}.pt", "--resume goes on from the last epoch") as temporary:
            torch.save(state, temporary)

def read_state(path, like=None):
    """A checkpoint; DataError if it is none of this version or, given a state `like`, of other settings."""
    state = data.read_tensors(path)
    with data.explain(f"{path}: not a checkpoint of this version of {PROGRAM}.py"):
        for key in "name", "root", "images", "seed", "classes", "epoch", "model", "normal":
            state[key]  # a KeyError becomes the line above
        for key in SETTINGS:
            mine, theirs = state["settings"][key], (like or state)["settings"][key]
            if mine != theirs:
                raise data.DataError(f"{path} has {key} = {mine}, not {theirs}; give the same or another run")
    return state

def resume(folder, state):
    """The state in the folder, or the given one if there is none. DataError for other settings or images."""
    path = folder / f"{state['name']}.pt"
    if not path.exists():
        log(f"{path}: no checkpoint yet, starting from the beginning")
        return state
    found = read_state(path, state)
    if others := set(found["images"]) ^ set(state["images"]):
        raise data.DataError(f"{path} was trained on other images ({min(others)}); change --root or --out")
    log(f"{path}: {found['epoch']} of {found['settings']['epochs']} epochs done")
    return found

def load_run(args):
    """States of the checkpoint --eval, or of all in a run's folder, whose settings the arguments adopt."""
    path, states = Path(args.eval), []
    for file in from_first(lambda: sorted(path.glob("seed*.pt")) or [path]):
        states.append(from_first(read_state, file, *states[:1]))
    if (args.predict or args.export) and len(states) * WORLD > 1:
        raise data.DataError(f"--eval {path}: --predict and --export take one .pt file, in one process")
    if (args.predict or args.export or args.save_maps) and any(state["normal"] is None for state in states):
        raise data.DataError(f"--eval {path}: its training stopped early; finish it with --resume")
    typed = {key: value for key, value in vars(args).items() if value is not None}
    vars(args).update(states[0]["settings"] | typed)
    args.seed, args.root = sorted({state["seed"] for state in states}), args.root or states[0]["root"]
    return states

def build_backbone(settings, weights):
    return load_encoder(settings["backbone"], weights)

def build(state, encoder=None):
    """The model that the settings name, with the state's tensors if it has any."""
    model = MiniMaxAD(encoder or build_backbone(state["settings"], "none"), state["settings"]["arch"])
    if state["model"]:
        with data.explain(f"{state['name']}.pt does not fit its settings"):
            model.load_state_dict(state["model"])
    return model

# ---------------------------------------------------------------- a trained model's use
def predict(args, device):
    """Score, verdict, class and picture of the images --predict names; True if all could be judged."""
    typed, (state,) = args.classes, load_run(args)  # which fills in the classes of the training
    model, classes = build(state).to(device), state["classes"]
    asked = typed or (classes if len(classes) == 1 else [])
    if len(asked) > 1 or not {*asked} <= {*classes} or model.needs_label and not asked:
        raise data.DataError(f"--classes: this model takes one of {', '.join(classes)}")

    def look(images):
        samples = [data.Sample("", 0, None, *(asked or [""]), "")] * len(images)
        maps, scores, found = judge(model, args, classes, samples, images, device)
        return maps, scores, asked or [classes[int(k)] if k >= 0 else None for k in found]
    return metrics.predict(data.find_images(args.predict), look, args.size, args.crop, state["normal"],
                           args.quantile, claim(args), log)

def export(args, device):
    """Write the network as a torch.export program, which loads without this project."""
    state, = load_run(args)
    model, side = build(state), args.crop or args.size
    inputs = torch.rand(2, 3, side, side), *[torch.zeros(2, dtype=torch.long)] * model.needs_label
    program = torch.export.export(Inference(model, args), inputs,
                                  dynamic_shapes=({0: torch.export.Dim("batch", min=1)},) * len(inputs))
    with data.atomic(args.export) as temporary:
        torch.export.save(program, temporary)
    log(f"{args.export}: image B x 3 x {side} x {side} in 0..1 -> map, score (mintad.py: and class)")

def bench(args, device):
    """Images per second, training steps per second, and storage beside the paper's 119 MB."""
    size, encoder = args.crop or args.size, load_encoder(args.backbone, "none")
    model = MiniMaxAD(encoder, args.arch).to(device).eval()
    if args.backbone in UNIREPLKNET:  # as loaded, with its branches
        model.encoder = UniRepLKNet(args.backbone).to(device).eval().requires_grad_(False)
    fused = fuse(model)
    log(f"{args.arch}, {args.backbone}, {size} x {size}, {device}, {torch.get_num_threads()} threads")
    log(f"storage: {metrics.storage(fused):.1f} MiB, unfused {metrics.storage(model):.1f} (paper: 119 MB)")

    @torch.no_grad()
    def look():
        return anomaly_map(*network(x), size, "bilinear").cpu()

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            maps = model(x)
        loss, _ = training_loss(args.loss, *maps, size)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    for name, network in ("unfused", model), ("fused", fused):
        for B in (1, 16):
            x = torch.rand(B, 3, size, size, device=device)
            rate = B / metrics.seconds(look)
            log(f"{name}, batch {B}: {rate:.1f} images/s (paper: 40.7 at batch 1 on a GTX 1080 Ti)")
    model.train().encoder = encoder.to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    log(f"training, batch {B}, {args.loss}: {1 / metrics.seconds(step):.3f} steps/s")

# ---------------------------------------------------------------- processes and logging
def start(name):
    """The device of this process; joins the process group under torchrun. DataError: no such device."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    with data.explain(f"--device {name or best}: not usable here"):
        device = torch.device(name or best)
        if device.type == "cuda":
            device = torch.device("cuda", LOCAL_RANK if device.index is None else device.index)
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        # The memory of freed tensors stays in the process: fresh pages cost more than computing with them.
        for option, value in (-4, 0), (-1, 2**30):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)
    if WORLD > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1))
    return device

def from_first(function, *args):
    """function(*args) on process 0; its result is sent to all."""
    box = [function(*args) if RANK == 0 else None]
    if WORLD > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]

def total(x):
    """Sum of a tensor over the processes, without gradient."""
    x = x.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(x)
    return x

@torch.no_grad()
def infer(network, images, device, *labels):
    """The network's outputs for uint8 images N x S x S x 3: numpy arrays of N rows, on every process."""
    N, parts = len(images), []
    rows = torch.arange(RANK, N + -N % WORLD, WORLD).clamp(max=N - 1)  # as many on each; the surplus is cut
    for batch in progress(rows.split(32), "inference"):
        x = data.to_device(images[batch.numpy()], device)
        outputs = network(x, *(label[batch].to(device) for label in labels))
        parts.append([gather(output.cpu()) for output in outputs])
    return [torch.cat(part)[:N].numpy() for part in zip(*parts)]

def gather(x):
    """Rows RANK::WORLD, as many on each process -> all, in order, on every process."""
    if WORLD == 1:
        return x
    parts = list(x.new_empty(WORLD, *x.shape))
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)  # n x WORLD x .. -> N x ..

# ---------------------------------------------------------------- the paper's published figures, in %
TABLES = {  # (set, unified?): columns (rd: RD + global, fr: MiniMaxAD + adc, fp: MiniMaxAD + global), rows
    ("mvtec", True): """ rd:i_auroc fr:i_auroc
        carpet 98.3 99.9  grid  99.0 98.2  leather    100  100   tile       98.1 100   wood      99.3 99.4
        bottle 79.9 100   cable 86.8 99.0  capsule    96.3 96.0  hazelnut   100  100   metal_nut 99.8 100
        pill   92.8 97.9  screw 96.5 94.1  toothbrush 97.5 98.9  transistor 93.3 97.6  zipper    98.6 99.7
        mean       95.8 98.7""",  # Table 3
    ("visa", True): """ rd:i_auroc fr:i_auroc
        candle    93.6 98.7  capsules  67.8 91.3  cashew 94.6 97.8  chewinggum 95.3 98.9  fryum 94.4 96.8
        macaroni1 97.2 98.5  macaroni2 86.2 89.4  pcb1   96.5 98.0  pcb2       93.0 97.0  pcb3  94.5 97.5
        pcb4       100  99.8   pipe_fryum 99.7 99.7   mean     92.7 97.0""",  # Table 3
    ("goodsad", False): """ rd:i_auroc fr:i_auroc rd:p_aupr rd:aupro fr:p_aupr fr:aupro
        cigarette_box 65.1 97.8  23.7 72.7 60.0 86.2    drink_bottle  67.2 80.4  12.5 84.2 49.2 86.8
        drink_can     63.3 90.8  17.4 81.9 49.1 87.0    food_bottle   76.6 91.0  25.4 84.3 63.0 92.8
        food_box      63.3 78.9   5.8 75.9 20.0 83.9    food_package  63.5 77.3   7.7 79.4 30.7 87.5
        mean          66.5 86.0  15.4 79.7 45.3 87.4""",  # Tables 4, A3
    ("aebad", False): """ rd:aupro rd:i_auroc fp:aupro fp:i_auroc
        same          86.4 82.4  81.4 86.4              background    86.4 84.3  82.1 90.7
        illumination  86.7 84.3  86.0 87.2              view          82.9 71.9  77.8 85.9
        mean          85.6 81.0  81.8 87.6""",  # Table 1
    ("visa", False): """ rd:aupro rd:i_auroc fp:aupro fp:i_auroc
        mean          70.9 96.0  90.4 96.4""",  # Table 2
    ("mad", False): """ rd:i_auroc fr:i_auroc
        01Gorilla 75.5 72.1  02Unicorn    73.9 92.9  03Mallard  53.6 89.1  04Turtle    77.0 88.4
        05Whale   59.2 78.8  06Bird       74.5 90.8  07Owl      70.2 84.3  08Sabertooth 69.0 93.0
        09Swan    56.7 88.4  10Sheep      76.9 94.6  11Pig      71.5 86.2  12Zalika    57.6 82.0
        13Pheonix 58.6 74.8  14Elephant   61.0 85.9  15Parrot   51.9 80.8  16Cat       65.4 70.6
        17Scorpion 67.4 87.0 18Obesobeso  81.8 89.9  19Bear     72.0 89.4  20Puppy     62.3 75.2
        mean       66.8 84.7""",  # Table A6
}
TABLE_7 = """ goodsad visa-unified aebad visa
    rd        66.5  92.7  81.0  96.0
    local     80.2  93.0  86.1  94.4
    local-hm  80.6  96.3  85.4  95.6
    fp        77.6  92.7  87.6  96.4
    fr        86.0  97.0  84.6  95.4"""

def paper_figures(args, found):
    """{row: {metric: the paper's figure}} for this set, setting, architecture and loss, {} if it gives none.
    found: our result's rows. A mean, and any row of a unified model, compares only over all their classes."""
    key = args.data, args.unified and args.data != "aebad"  # AeBAD is one class
    method = "rd" if args.arch == "rd" else {"adc": "fr", "global": "fp"}.get(args.loss, args.loss)
    rows = metrics.read_table(TABLES.get(key, "none"))
    of_set = [metrics.read_table(text) for (name, _), text in TABLES.items() if name == args.data]
    complete = set().union(*of_set) - {"mean"} <= set(found)
    usual = PRESETS.get(key) and PAPER | PRESETS[key] | (RD if args.arch == "rd" else {})
    fixed = ["size", "backbone", "p_hard", "p_lim"] + ["loss"] * (args.arch == "rd")
    if not usual or key[1] and not complete or any(getattr(args, x) != usual[x] for x in fixed):
        return {}
    figures = {row: {column.partition(":")[2]: x for column, x in values.items()
                     if column.startswith(f"{method}:")}
               for row, values in rows.items() if row in found or row == "mean" and complete}
    mean = metrics.read_table(TABLE_7)[method].get(args.data + "-unified" * key[1])
    if mean and complete:
        figures.setdefault("mean", {})["i_auroc"] = mean
    return {row: {metric: round(value / 100, 3) for metric, value in values.items()}
            for row, values in figures.items() if values}

# ---------------------------------------------------------------- command line
RANGES = dict(size=(64, 2**14), crop=(64, 2**14), holdout=(0, 0.9), workers=(1, 1024), epochs=(1, 10**6),
              batch_size=(1, 10**6), lr=(0, 1e3), weight_decay=(0, 1e3), gamma=(0, 1), quantile=(0, 1),
              seed=(0, 2**31 - 1), p_hard=(0, 1), p_lim=(0, 1))

def flag(key, value=None):
    return ("--no-" if value is False else "--") + key.replace("_", "-")

def show(settings):
    return ", ".join(f"{flag(key)[2:]} {value}" for key, value in settings.items() if value is not None)

def new_parser(description, defaults):
    """The flags of both scripts. A setting's default is None: the preset or the checkpoint fills it in."""
    parser = argparse.ArgumentParser(
        description=description, epilog="Commands: the header of this file. Defaults: " + defaults,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=118))
    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="NAME[+NAME..]", help=f"{' '.join(data.SETS)} (default toy)")
    add("--root", metavar="DIR", help="where the data lies (default data/NAME)")
    add("--classes", nargs="+", metavar="A", help="a subset of the classes")
    add("--normals", help="cifar10: the five normal classes (default 01234)")
    add("--unified", action=argparse.BooleanOptionalAction, help="one model for all classes, not one each")
    add("--size", type=int, help="images are resized to size x size pixels")
    add("--crop", type=int, help="then the centre crop x crop is taken")
    add("--holdout", type=float, metavar="SHARE", help="kept back to find the threshold (folder, toy: 0.1)")
    add("--cache", default="cache", metavar="DIR|none", help="decoded images (default cache)")
    add("--workers", type=int, help="decoding threads (default: all cores)")
    add = parser.add_argument_group("training").add_argument
    add("--backbone", metavar="NAME", help="any timm CNN; minimaxad.py: also unireplknet_a, _f, _p, _n, _t")
    add("--weights", metavar="FILE|none", help="its checkpoint (default: timm's, if any); none: untrained")
    add("--epochs", type=int)
    add("--batch-size", type=int, help="global: split over the processes")
    add("--lr", type=float, help="learning rate")
    add("--weight-decay", type=float)
    add("--seed", type=int, nargs="+", metavar="S", help="several: mean and deviation (default 1)")
    add("--amp", action="store_const", const=True, help="train in bfloat16; evaluation is in full precision")
    add("--device", help="cpu, cuda, cuda:N or mps (default: the best there is)")
    run = parser.add_argument_group("run")
    run.add_argument("--out", metavar="DIR", help="an empty folder (default runs/SCRIPT-SET-SETTING)")
    run.add_argument("--resume", action="store_const", const=True, help="go on with the run in --out")
    run.add_argument("--eval", metavar="CKPT", help="evaluate a checkpoint, or all of a run's folder")
    run.add_argument("--quantile", type=float, default=0.99, help="of normal scores: the threshold (0.99)")
    add = run.add_mutually_exclusive_group().add_argument
    add("--predict", nargs="+", metavar="PATH", help="with --eval: files, folders or globs to judge")
    add("--export", metavar="FILE", help="with --eval: write the network as a torch.export program (.pt2)")
    add("--save-maps", action="store_true", help="pictures of all test images and a sheet per class")
    add("--bench", action="store_const", const=True, help="speed and cost, no data needed")
    return parser

def check(parser, args):
    """Ends with one line where a value is out of range or flags do not go together."""
    for key, (low, high) in RANGES.items():
        values = getattr(args, key, None)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not low <= value <= high:
                parser.error(f"{flag(key)} {value}: expected {low} to {high}")
    free = ("classes",) if args.predict else ("score",)  # all else is the checkpoint's
    for key in (*SETTINGS, "seed", "resume", "bench"):
        if args.eval and getattr(args, key) is not None and key not in free:
            parser.error(f"{flag(key, getattr(args, key))} does not go with --eval: the checkpoint says it")
    if (args.predict or args.export) and not args.eval:
        parser.error(f"{'--predict' if args.predict else '--export'} needs --eval CKPT")
    if args.crop and args.crop > args.size:
        parser.error(f"--crop {args.crop} is larger than --size {args.size}")
    if args.export and (not args.export.endswith(".pt2") or os.path.lexists(args.export)):
        parser.error(f"--export {args.export}: expected a new file that ends in .pt2")

def parse(argv=None):
    """The arguments; what the user left out comes from the preset, or with --eval from the checkpoint."""
    presets = {f"{name}{' unified' * unified}": found for (name, unified), found in PRESETS.items()}
    presets |= {"toy": TOY, "--arch rd": RD}
    defaults = "; ".join([show(PAPER), *(f"{name}: {show(found)}" for name, found in presets.items())])
    parser = new_parser("MiniMaxAD (arXiv 2405.09933): train, evaluate, predict.", defaults)
    add = parser.add_argument_group("MiniMaxAD").add_argument
    add("--loss", choices=("local", "local-hm", "global", "adc"), help="adc: MiniMaxAD-fr, global: -fp")
    add("--arch", choices=("minimax", "rd"), help="rd: Reverse Distillation, the baseline")
    add("--p-hard", type=float, help="Eq. 8, Table A4 (default 0.9999)")
    add("--p-lim", type=float, help="Eq. 8, 9, Tables A4, A5 (default 0.9995)")
    add("--gamma", type=float, help="the learning rate is multiplied by it each epoch")
    add("--augment", action="store_const", const=True, help="random crop and flip (authors' code on AeBAD)")
    add("--score", choices=("max", "mean", "max5x5", "top1"), help="default max, cifar10 mean; with --eval")
    args = parser.parse_args(argv)
    if not args.eval:
        parser.set_defaults(**preset(args))
        args = parser.parse_args(argv)  # what the user typed wins
        args.unified |= args.data == "cifar10"  # UniAD's protocol has no other setting
    check(parser, args)
    return args

def preset(args):
    """The paper's settings for this set in this setting, or the nearest; a line says so."""
    name = "mvtec" if args.bench else args.data or "toy"
    unified = bool(args.unified or args.bench) or name == "cifar10"
    found = PAPER | {"unified": unified, "score": "mean" if name == "cifar10" else "max"}
    key = (name, unified and name != "aebad")  # AeBAD is one class
    if name == "toy":
        found |= TOY | ({"weights": None} if args.backbone else {})
    elif key in PRESETS:
        found |= PRESETS[key]
    else:
        nearest = ("goodsad", False) if name == "folder" else ("mvtec", True) if unified else ("visa", False)
        found |= PRESETS[nearest] | ({"size": 256, "holdout": 0.1} if name == "folder" else {})
        log(f"note: the paper has no settings for {name}{' unified' * unified}; taking those of {nearest[0]}")
    if args.arch == "rd":
        found |= RD | ({"epochs": TOY["epochs"], "backbone": "resnet18"} if name == "toy" else {})
    return found | ({"crop": None} if args.size else {})  # the preset's crop belongs to its size

def main(argv=None):
    """Parse, then one of train, evaluate, predict, export, bench.
    Exit status 0; 1: an image not judged, or a process died; 2: a line says why; 130: interrupted."""
    code, line = 0, None
    try:
        with contextlib.redirect_stderr(open(os.devnull, "w", errors="replace") if RANK else sys.stderr):
            args = parse(argv)
        action = (bench if args.bench else
                  predict if args.predict else
                  export if args.export else
                  eval_run if args.eval else train_run)
        code = int(action(args, start(args.device)) is False)  # predict's: not all images were judged
    except (data.DataError, OSError) as error:
        code, line = 2, f"error: {error}"
        time.sleep(10 if RANK else 0)  # process 0 mostly has the same error; torchrun then ends this process
        if WORLD > 1:
            ErrorHandler().record_exception(error)  # torchrun's last lines then tell it
    except KeyboardInterrupt:
        code, line = 130, None if RANK else "interrupted"
    except RuntimeError as error:
        if not dist.is_initialized() or "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        code, line = 1, f"process {RANK} stops, because another process has ended"
    if line:
        print(line.encode(errors="backslashreplace").decode(), file=sys.stderr, flush=True)
    if dist.is_initialized() and code == 0:
        dist.destroy_process_group()
    while data.LOG:
        data.LOG.pop().close()
    sys.exit(code)

if __name__ == "__main__":
    main()
