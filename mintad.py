"""MINT-AD (Toward Multi-class Anomaly Detection: Exploring Class-aware Unified Model against
Inter-class Interference, arXiv 2403.14213): one model for all classes, the query of whose
transformer is an implicit neural representation of the image's class.

    python mintad.py                                              # built-in toy set, no download
    python mintad.py --data mvtec --unified                       # the paper's main setting
    torchrun --nproc_per_node=4 mintad.py --data mvtec --unified  # the same batches on four GPUs
    python mintad.py --data mvtec                                 # one model per class: "separate"
    python mintad.py --data visa --unified --uniad                # the UniAD baseline
    python mintad.py --data folder --root photos --unified        # your own photos
    python mintad.py --out RUN --resume                           # go on with an interrupted run
    python mintad.py --eval RUN                                   # a trained model's table again
    python mintad.py --eval RUN --predict photos --out verdicts   # score, verdict, class, picture

    f   : B x P x C    features of a frozen backbone, stages 1-4 resized to stage 4 and concatenated
    f'  : B x P x C    adapter of the standardised f, one linear layer; f_ in the code
    z   : B x Z        class token of f', the layer before the classification head
    q   : B x P x D    INR(positions, z) -> mu, log sigma of f'; the transformer decoder's query
    r   : B x P x C    f' reconstructed by the transformer
    s   : B x size x size    anomaly map, ||f' - r|| at each position, enlarged to the image

    B batch, C channels, H x W = P positions, D = 256 hidden width, K classes, L = 4 layers,
    N images, Z = 32 width of z, E = 3 width of a position p

Details of the implementation and where each comes from:

 1. Backbone: levels of stride 2, 4, 8, 16 (--levels 5: 32 too), sampled at the positions of stride
    16 with aligned corners: C = 272 (Tables 11, 12 have b0's channels, and 324). That reads 4 of
    the 64 values under a position of the finest level; ours, --pool area, takes the mean of all.
 2. Features are standardised by the training features' mean and deviation of each channel. The
    paper does not say so, but without it a few channels of large scale are nearly the whole loss.
    --uniad takes raw features, as its authors.
 3. Eq. 3 starts from the original features, which adds log|det W| to Eq. 4. Ours: to Eq. 5 as well,
    which is a likelihood, too (objective; README, "What keeps MINT-AD from collapsing"). --literal
    leaves the determinants out, as printed. Nothing is detached. log sigma stays within -5 and 5.
 4. INR: Table 13 and a linear output layer, 602,368 weights, which is Table 9's 0.602 M. Sec. 3.3
    speaks of amplitude, phase and frequency; Eq. 8, and so this file, modulates the amplitude. The
    paper has no initialisation for it and the class token; here SIREN's and Kaiming's (see INR,
    FeaturePrompt).
 5. Transformer: UniAD's layers, 4 + 4 (Table 15; the text says 6), post-norm, one q for all decoder
    layers, learned positions added to queries and keys, jitter on the input tokens.
 6. AdamW, lr x 0.1 after 80 % of the steps, gradient norm clipped at 0.1 (UniAD), batch 32. An --lr
    above 1e-4 is warmed up to. Ours: --optimizer muon, whose rate falls linearly to zero.
 7. Ours: --distance mahalanobis divides f' - r by its usual size: the covariance over the training
    images of the class, one for each quarter of the image. Eq. 1's classifier says which class.
 8. The label and image prompts of Table 4 are one linear layer each, which is our reading.
 9. Each epoch sets the random state from (seed, epoch, process), so that an interrupted run goes on
    from its checkpoint with the same batches and noise, on a CPU bit for bit.
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
from itertools import pairwise
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import data
import metrics

# ---------------------------------------------------------------------------------------- settings

LAMBDA_CE = 1.0  # Eq. 6
LAMBDA_PRIOR = 0.1  # Eq. 6
HEADS = 8  # UniAD
DROPOUT = 0.1  # Table 15
JITTER = 20.0  # UniAD
CLIP = 0.1  # UniAD
SAVE_EVERY = 60  # seconds between checkpoints

# Flag: default, help; None: a text that may be left out. The defaults are the paper's, but for the
# data and details 2 and 3. CHOICES, beside the parser, has what can be chosen. A checkpoint keeps
# all of these.
SETTINGS = {
    "data": ("toy", f"{', '.join(data.SETS)}; several as mvtec+visa"),
    "root": (None, "where the data lies, if not in data/NAME"),
    "unified": (False, "one model for all classes, not one each"),
    "classes": (None, "a subset"),
    "normals": ("01234", "cifar10's normal classes"),
    "size": (224, "images are resized to size x size pixels"),
    "holdout": (0.0, "share of each class's training images kept back to find its threshold"),
    "backbone": ("tf_efficientnet_b4.aa_in1k", "any timm CNN of strides 2, 4, 8, 16"),
    "weights": (None, "its checkpoint instead of timm's download, or none: untrained"),
    "levels": (4, "of the backbone, from stride 2 on"),
    "pool": ("bilinear", "how levels come to stride 16; area is ours"),
    "uniad": (False, "the UniAD baseline, whole"),
    "query": ("inr", "the decoder's; layerwise, per-class, token and text are --uniad's"),
    "text": (None, "--query text: safetensors, a row of text embedding per class name"),
    "prompt": ("feature", "what the class token z comes from"),
    "adapter": (True, "without: f' = f, standardised"),
    "cls_loss": (True, "Eq. 1"),
    "prior_loss": (True, "Eq. 4"),
    "literal": (False, "Eq. 4, 5 as printed, without the determinants"),
    "epochs": (1000, "Sec. 4.1"),
    "batch_size": (32, "over all processes; Sec. 4.1"),
    "lr": (1e-4, "learning rate"),
    "weight_decay": (1e-4, "UniAD's"),
    "optimizer": ("adamw", "muon is ours"),
    "amp": (False, "train in bfloat16; evaluation is in float32, TF32 on a GPU"),
    "seed": (1, "of weights, batches, dropout and jitter"),
    "distance": ("euclidean", "mahalanobis is ours"),
    "score": ("max", "of a map; avgpool: the maximum of its means over 16 x 16 pixels, UniAD's"),
}
ACTIONS = {
    "out": (None, "a new or empty folder; default runs/mintad-DATA-SETTING"),
    "resume": (False, "go on with the run in --out"),
    "eval": (None, "evaluate a checkpoint, or all of a run's folder"),
    "save_maps": (False, "a picture of each test image"),
    "predict": (None, "with --eval: image files and folders to judge"),
    "quantile": (0.99, "of normal images' scores: the threshold of --predict and --export"),
    "export": (None, "with --eval: write a torch.export program, FILE.pt2"),
    "device": ("cuda" if torch.cuda.is_available() else "cpu", "or cuda:N, mps"),
}
PRESETS = {  # by data set; toy's and folder's are ours
    "toy": {
        "unified": True,
        "backbone": "tf_efficientnet_b0",
        "weights": "none",
        "size": 128,
        "epochs": 5,
        "batch_size": 8,
        "lr": 1e-3,
        "holdout": 0.1,
    },
    "folder": {
        "optimizer": "muon",
        "pool": "area",
        "distance": "mahalanobis",
        "epochs": 50,
        "batch_size": 8,
        "lr": 5e-4,
        "holdout": 0.1,
    },
    # UniAD's protocol: one model, one level more (C = 720 with b4), the map's mean
    "cifar10": {"unified": True, "levels": 5, "score": "mean"},
}
UNIAD = {"query": "layerwise", "score": "avgpool"}  # the baseline's own, with --uniad

log = logging.getLogger("mintad")


# ------------------------------------------------------------------------------------------ layers


class EncoderLayer(nn.Module):
    """Post-norm; positions go to queries and keys, never to values (UniAD, Table 15)."""

    def __init__(self, D):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(D, HEADS, DROPOUT, batch_first=True)
        self.linear1 = nn.Linear(D, 4 * D)
        self.linear2 = nn.Linear(4 * D, D)
        self.norm1 = nn.LayerNorm(D)
        self.norm2 = nn.LayerNorm(D)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x, pos, mask=None):  # B x P x D; P x D; P x P, True = hidden
        x_pos = x + pos
        y, _ = self.self_attn(x_pos, x_pos, x, attn_mask=mask, need_weights=False)
        x = self.norm1(x + self.dropout(y))
        y = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return self.norm2(x + self.dropout(y))


class DecoderLayer(EncoderLayer):
    """UniAD's: q attends to the encoder memory, the result to the previous layer's output.

    Named as in its authors' weights, though self_attn attends to the memory.
    """

    def __init__(self, D):
        super().__init__(D)
        self.multihead_attn = nn.MultiheadAttention(D, HEADS, DROPOUT, batch_first=True)
        self.norm3 = nn.LayerNorm(D)

    def forward(self, q, memory, previous, pos, mask=None):  # three B x P x D; the rest as above
        options = {"attn_mask": mask, "need_weights": False}
        y, _ = self.self_attn(q + pos, memory + pos, memory, **options)
        x = self.norm1(q + self.dropout(y))
        y, _ = self.multihead_attn(x + pos, previous + pos, previous, **options)
        x = self.norm2(x + self.dropout(y))
        y = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return self.norm3(x + self.dropout(y))


class Transformer(nn.Module):
    """Tokens B x P x C reconstructed from themselves and the decoder's queries (Table 15)."""

    def __init__(self, C, H, W, D=256, layers=4):
        super().__init__()
        self.input_proj = nn.Linear(C, D)
        self.output_proj = nn.Linear(D, C)
        self.row_embed = nn.Embedding(H, D // 2)
        self.col_embed = nn.Embedding(W, D // 2)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

        # As UniAD's, the layers start as copies of one, of which linear layers are then drawn anew.
        encoder = EncoderLayer(D)
        decoder = DecoderLayer(D)
        self.encoder = nn.ModuleList(copy.deepcopy(encoder) for _ in range(layers))
        self.decoder = nn.ModuleList(copy.deepcopy(decoder) for _ in range(layers))
        self.norm = nn.LayerNorm(D)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, tokens, queries, mask=None, token=None):
        """tokens: B x P x C; queries: L, each B or 1 x P x D; mask: P x P, True = hidden.

        token: B x 1 x D, one more, cut off at the end: queries and mask have P + 1 positions.
        """
        B, P, C = tokens.shape
        if self.training:  # UniAD's jitter: noise in proportion to each token's length
            scale = JITTER * tokens.norm(dim=-1, keepdim=True) / C
            tokens = tokens + torch.randn_like(tokens) * scale
        x = self.input_proj(tokens)  # B x P x D

        row = self.row_embed.weight.unsqueeze(1)  # H x 1 x D/2
        col = self.col_embed.weight.unsqueeze(0)  # 1 x W x D/2
        pos = torch.cat(torch.broadcast_tensors(col, row), -1).flatten(0, 1)  # H x W x D -> P x D
        if token is not None:
            x = torch.cat([x, token], 1)  # B x (P+1) x D
            pos = F.pad(pos, (0, 0, 0, 1))  # (P+1) x D

        for layer in self.encoder:
            x = layer(x, pos, mask)
        memory = x
        for layer, q in zip(self.decoder, queries, strict=True):
            x = layer(q.expand(B, -1, -1), memory, x, pos, mask)
        return self.output_proj(self.norm(x)[:, :P])  # B x P x C


def mlp(act, *widths):
    """Linear layers of these widths with an activation between two."""
    layers = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), act()]
    return layers[:-1]


class Prompt(nn.Module):
    """f', B x P x C, and labels, B -> class token z, B x Z; logits, B x K, or None: no classifier.

    This one returns neither: for Table 5's learned query alone, where nothing uses z.
    """

    needs_label = False

    def __init__(self, C, P, K, head=True):
        super().__init__()
        self.head = None

    def forward(self, f_, label):
        return None, None


class FeaturePrompt(Prompt):
    """z is the classifier's last layer before its head (Sec. 3.3, Table 12, Eq. 1)."""

    def __init__(self, C, P, K, head=True, Z=32, D=256):
        super().__init__(C, P, K)
        # B x P x C -> B x P x Z
        self.class_encoder = nn.Sequential(*mlp(nn.ReLU, C, D, D, Z), nn.Softmax(-1))
        # B x P*Z -> B x Z; Table 12's 8192 is P = 256, at 224 px P = 196
        self.channel_encoder = nn.Sequential(*mlp(nn.LeakyReLU, P * Z, D, D, Z), nn.Softmax(-1))
        self.head = nn.Linear(Z, K) if head else None
        for module in self.modules():
            if isinstance(module, nn.Linear):  # torch's default leaves z too flat to learn
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)
        # P softmaxes, each of norm 1 at most: a fan-in of P, not P * Z.
        nn.init.normal_(self.channel_encoder[0].weight, std=math.sqrt(2 / P))
        if head:  # if it starts small, z saturates, often alike for two classes, before these part
            nn.init.normal_(self.head.weight, std=5.0)

    def forward(self, f_, label):
        z = self.channel_encoder(self.class_encoder(f_).flatten(1))  # B x P x Z -> B x P*Z -> B x Z
        logits = self.head(z) if self.head else None  # B x K
        return z, logits


class LabelPrompt(Prompt):
    """z is a projection of the one-hot label, which a test image needs, too (Table 4)."""

    needs_label = True

    def __init__(self, C, P, K, head=True, Z=32):
        super().__init__(C, P, K)
        self.K = K
        self.project = nn.Linear(K, Z)

    def forward(self, f_, label):
        one_hot = F.one_hot(label, self.K)
        return self.project(one_hot.to(f_.dtype)), None


class ImagePrompt(Prompt):
    """z is a projection of the image's mean feature (Table 4)."""

    def __init__(self, C, P, K, head=True, Z=32):
        super().__init__(C, P, K)
        self.project = nn.Linear(C, Z)

    def forward(self, f_, label):
        return self.project(f_.mean(1)), None


PROMPTS = {"feature": FeaturePrompt, "label": LabelPrompt, "image": ImagePrompt, "none": Prompt}


class INR(nn.Module):
    """Dual-path implicit neural representation (Table 13): p (P x E), z (B x Z) -> B x P x D."""

    def __init__(self, Z=32, E=3, D=256):
        super().__init__()
        self.modulation = nn.ModuleList([nn.Linear(Z + E, D)])
        self.synthesis = nn.ModuleList([nn.Linear(E, D)])
        for _ in range(4):
            self.modulation.append(nn.Linear(D, D))
            self.synthesis.append(nn.Linear(D, D))
        self.output = nn.Linear(D, D)

        # SIREN's initialisation (its Sec. 3.2), with omega_0 = 30 inside the weights; the linear
        # output keeps the hidden layers' bound, so that q starts at the scale of a learned query.
        bound = math.sqrt(6 / D)
        for layer in [*self.synthesis, self.output]:
            nn.init.uniform_(layer.weight, -bound, bound)
        nn.init.uniform_(self.synthesis[0].weight, -30 / E, 30 / E)
        # Kaiming's; the first layer's input is p and the feature prompt's softmax, |z| <= 1.
        for layer in self.modulation:
            nn.init.normal_(layer.weight, std=math.sqrt(2 / D))
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.modulation[0].weight, std=math.sqrt(2 / (E + 1)))

    def forward(self, p, z):
        B = z.shape[0]
        P = p.shape[0]
        z_at_p = z.unsqueeze(1).expand(B, P, -1)
        zp = torch.cat([z_at_p, p.expand(B, P, -1)], -1)  # B x P x (Z+E)
        with torch.autocast(p.device.type, enabled=False):  # bfloat16 blurs a sine of omega_0 p
            x = torch.sin(self.synthesis[0](p))  # P x D
        h = F.relu(self.modulation[0](zp))  # Eq. 9, B x P x D
        x = x * h  # Eq. 8
        for modulation, synthesis in zip(self.modulation[1:], self.synthesis[1:], strict=True):
            h = F.relu(modulation(h))  # Eq. 9
            x = torch.sin(synthesis(x)) * h  # Eq. 8
        return self.output(x)


class MLPQuery(nn.Module):
    """z -> B x P x D (Sec. 0.B.6), 13 M weights. Table 9's MLP has 383.5 M, for which outputs that
    are "repeated" over positions are too few; P*D of them need a hidden width of 7,600."""

    def __init__(self, P, Z=32, D=256):
        super().__init__()
        self.net = nn.Sequential(*mlp(nn.ReLU, Z, D, D, P * D), nn.Unflatten(1, (P, D)))

    def forward(self, z):
        return self.net(z)


class LearnedQuery(nn.Module):
    """One query for all images (Table 5): 1 x P x D."""

    def __init__(self, P, Z=32, D=256):
        super().__init__()
        self.q = nn.Parameter(torch.randn(P, D))

    def forward(self, z):
        return self.q.unsqueeze(0)


QUERIES = {"inr": None, "mlp": MLPQuery, "learned": LearnedQuery}  # None: the INR's output itself
UNIAD_QUERIES = {"layerwise": False, "per-class": True, "token": True, "text": True}  # needs label


# ------------------------------------------------------------------------------------------- model


def resize(x, size):
    """A map sampled at H x W positions, corners aligned."""
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


POOLS = {"bilinear": resize, "area": F.adaptive_avg_pool2d}  # the paper's; ours: means of cells


class Backbone(nn.Module):
    """Frozen multi-scale features (Sec. 3.2): images B x 3 x size x size in 0..1 -> f, B x P x C.

    name: any timm CNN. weights: a file, "none" (untrained), or None for its download. levels: how
    many, from stride 2 on; H x W is that of stride 16. UserError: a net without these levels,
    weights that cannot be had or do not fit, a size too small.
    """

    def __init__(self, name, weights=None, size=224, levels=4, pool="bilinear"):
        super().__init__()
        self.pool = pool
        strides = [2, 4, 8, 16, 32][:levels]
        with data.explain(f"--backbone {name}: no such timm CNN"):
            info = timm.create_model(name, features_only=True).feature_info
            index = [i for i, stride in enumerate(info.reduction()) if stride in strides]
            self.net = timm.create_model(name, features_only=True, out_indices=index)
        info = self.net.feature_info
        if info.reduction() != strides:
            raise data.UserError(f"--backbone {name} has strides {info.reduction()}, not {strides}")
        if hasattr(self.net, "blocks"):  # timm's EfficientNets compute stages beyond the last level
            last = int(info.module_name()[-1].split(".")[1])
            del self.net.blocks[last + 1 :]
        if weights is None:
            weights = data.timm_weights(name)
        if weights != "none":
            data.load_weights(self.net, weights)

        self.eval().requires_grad_(False)
        config = self.net.pretrained_cfg
        self.register_buffer("image_mean", torch.tensor(config["mean"]).view(3, 1, 1))
        self.register_buffer("image_std", torch.tensor(config["std"]).view(3, 1, 1))
        self.C = sum(info.channels())
        self.H, self.W = self.net(torch.zeros(1, 3, size, size))[3].shape[2:]  # of stride 16
        if min(self.H, self.W) < 2:
            raise data.UserError(f"--size {size} is too small: {self.H} x {self.W} positions")

    def forward(self, image):
        maps = self.net((image - self.image_mean) / self.image_std)
        maps = [POOLS[self.pool](x, (self.H, self.W)) for x in maps]
        return torch.cat(maps, 1).flatten(2).transpose(1, 2)  # B x C x H x W -> B x P x C


class MINTAD(nn.Module):
    """The model of Figure 3 and its variants (Tables 4, 5, 9).

    query: what the transformer's decoder gets, of QUERIES. prompt: what z comes from, of PROMPTS.
    needs_label: a test image comes with its label. knows_class: by its label, or the classifier.
    """

    def __init__(
        self,
        C,
        H,
        W,
        K,
        query="inr",
        prompt="feature",
        adapter=True,
        cls_loss=True,
        prior_loss=True,
        D=256,
        layers=4,
    ):
        super().__init__()
        P = H * W
        self.transformer = Transformer(C, H, W, D, layers=layers)
        self.register_buffer("mean", torch.zeros(C))
        self.register_buffer("std", torch.ones(C))

        self.adapter = nn.Identity()
        if adapter:  # f' = W f + b (Sec. 3.2), W from the identity
            self.adapter = nn.Linear(C, C)
            nn.init.eye_(self.adapter.weight)
            nn.init.zeros_(self.adapter.bias)
        self.prompt = PROMPTS[prompt](C, P, K, head=cls_loss)
        self.needs_label = self.prompt.needs_label
        self.knows_class = self.needs_label or self.prompt.head is not None

        self.inr = None
        if query == "inr" or prior_loss:
            self.positions = nn.Parameter(torch.randn(P, 3))  # "a learnable embedding", E = 3
            self.inr = INR(D=D)
        self.query = None
        if QUERIES[query]:
            self.query = QUERIES[query](P, D=D)
        self.distribution = None
        if prior_loss:  # Table 14, whose 512 outputs are 2 x 256; f' has C channels
            self.distribution = nn.Sequential(*mlp(nn.LeakyReLU, D, D, D, 2 * C))

    def forward(self, f, label=None):
        """f: B x P x C raw, label: B -> f', r; logits: B x K or None; (mu, log sigma) or None."""
        f = (f - self.mean) / self.std
        f_ = self.adapter(f).float()
        z, logits = self.prompt(f_, label)
        gaussian = None
        if self.inr:
            q = self.inr(self.positions, z)  # B x P x D
        if self.distribution:
            mu, log_sigma = self.distribution(q).float().chunk(2, -1)  # B x P x C each
            gaussian = mu, log_sigma.clamp(-5, 5)

        if self.query:
            q = self.query(z)
        r = self.transformer(f_, [q] * len(self.transformer.decoder)).float()
        return f_, r, logits, gaussian


class UniAD(nn.Module):
    """The baseline, as its authors' code: raw f, neighbour-masked attention, a query per layer.

    query: layerwise (its own), or Table 4's variants: per-class (its query pool); token, the class
    as a token more; text, a projection of the class's row of text, K x T. Called as MINTAD.
    """

    def __init__(self, C, H, W, K, query="layerwise", text=None, D=256, layers=4):
        super().__init__()
        P = H * W
        self.K = K
        self.kind = query
        self.needs_label = UNIAD_QUERIES[query]
        self.knows_class = self.needs_label
        self.adapter = nn.Identity()
        self.transformer = Transformer(C, H, W, D, layers=layers)
        mask = neighbour_mask(H, W)
        if query == "token":
            P += 1
            mask = F.pad(mask, (0, 1, 0, 1))  # every position sees the token
            self.token = nn.Linear(K, D)
        self.register_buffer("mask", mask, persistent=False)
        if query == "text":
            self.register_buffer("text", text)
            self.project = nn.Linear(text.shape[1], D)
        else:  # as its authors', those of the layers start alike
            one = torch.randn(K if query == "per-class" else 1, 1, P, D)
            self.learned = nn.Parameter(one.repeat(1, layers, 1, 1))

    def forward(self, f, label=None):
        P = f.shape[1]
        L = len(self.transformer.decoder)
        token = None
        if self.kind == "text":
            q = self.project(self.text[label])[:, None, None].expand(-1, L, P, -1)
        elif self.kind == "per-class":
            q = self.learned[label]
        else:
            q = self.learned  # B or 1 x L x P x D
        if self.kind == "token":
            one_hot = F.one_hot(label, self.K)
            token = self.token(one_hot.to(f.dtype)).unsqueeze(1)  # B x 1 x D
        r = self.transformer(f, q.unbind(1), self.mask, token)
        return f, r.float(), None, None


def neighbour_mask(H, W, window=7):
    """P x P, True where a key lies in the window around the query and so is hidden (UniAD)."""
    y = torch.arange(H * W) // W
    x = torch.arange(H * W) % W
    near_y = (y[:, None] - y).abs() <= window // 2
    near_x = (x[:, None] - x).abs() <= window // 2
    mask = near_y & near_x
    if mask.all(1).any():
        raise data.UserError(f"--size: UniAD's mask hides all of {H} x {W} positions: too small")
    return mask


# ------------------------------------------------------------------------------------------ losses


def objective(model, outputs, label, literal=False):
    """Eq. 6 of a batch, and {name: value} to log; outputs: what model(f, label) returns.

    The likelihood of the original features has log |det W| of f' = W f + b, in Eq. 4 by Eq. 3, and
    in Eq. 5 as that is half of -log N(f'; r, 1/4), but for a constant (README, "What keeps MINT-AD
    from collapsing"). literal: as printed, without them.
    """
    f_, r, logits, gaussian = outputs
    log_det = ce = prior = 0.0  # what a variant has not is zero
    mse = F.mse_loss(r, f_)  # Eq. 5
    logged = {"mse": mse, "std f'": f_.std()}
    if isinstance(model.adapter, nn.Linear) and not literal:
        log_det = torch.linalg.slogdet(model.adapter.weight)[1] / f_.shape[-1]  # per channel
        logged["log det"] = log_det
    if logits is not None:
        ce = F.cross_entropy(logits.float(), label)  # Eq. 1
        logged["ce"] = ce
        logged["accuracy"] = (logits.argmax(1) == label).float().mean()
    if gaussian:
        mu, log_sigma = gaussian
        nll = 0.5 * ((f_ - mu) / log_sigma.exp()) ** 2 + log_sigma + 0.5 * math.log(2 * math.pi)
        prior = nll.mean() - log_det  # Eq. 2 and 4, of the original features by Eq. 3
        logged["prior"] = prior

    loss = mse - 0.5 * log_det + LAMBDA_CE * ce + LAMBDA_PRIOR * prior  # Eq. 6
    return loss, logged


# ----------------------------------------------------------------------------------- map and score


def euclidean(d, whitening, cls, quarter):
    """||f' - r|| at each position (Eq. 7); d: f' - r, B x P x C -> B x P."""
    return d.norm(dim=-1)


def mahalanobis(d, whitening, cls, quarter):
    """The same, whitened: whitening, K x 4 x C x C, is of a class and of a quarter of the image.

    cls: class of each image, B; quarter: of each position, P.
    """
    s = torch.zeros_like(d[..., 0])
    for i in range(4):
        whitened = d @ whitening[cls, i].mT
        s = torch.where(quarter == i, whitened.norm(dim=-1), s)
    return s


# Of d, f' - r, and of what fit_distance and the detector know, which not all use.
DISTANCES = {"euclidean": euclidean, "mahalanobis": mahalanobis}
SCORES = {  # of maps, B x 1 x size x size
    "max": lambda s: s.amax((1, 2, 3)),  # Sec. 3.6
    "mean": lambda s: s.mean((1, 2, 3)),  # UniAD's for CIFAR-10
    "avgpool": lambda s: F.avg_pool2d(s, 16, stride=1).amax((1, 2, 3)),  # UniAD's
}


class Detector(nn.Module):
    """Image B x 3 x size x size in 0..1 -> map s: B x size x size, score: B, class: B.

    label, B: the class, if it is known; some variants need it. Else the classifier finds it, and
    without a classifier it is 0.
    """

    def __init__(self, backbone, model, K, size, distance="euclidean", score="max"):
        super().__init__()
        self.backbone = backbone
        self.model = model
        self.size = size
        self.distance = distance
        self.score = score
        H, W, C = backbone.H, backbone.W, backbone.C
        self.register_buffer("whitening", torch.eye(C).repeat(K, 4, 1, 1))  # see fit_distance
        y = torch.arange(H).view(H, 1)
        x = torch.arange(W).view(1, W)
        quarter = (2 * (y >= H / 2) + (x >= W / 2)).flatten()  # P, 0 to 3
        self.register_buffer("quarter", quarter, persistent=False)

    def forward(self, image, label=None):
        f_, r, logits, _ = self.model(self.backbone(image), label)
        if label is not None:
            cls = label
        elif logits is not None:
            cls = logits.argmax(1)
        else:
            cls = torch.zeros(image.shape[0], dtype=torch.long, device=image.device)

        s = DISTANCES[self.distance](f_ - r, self.whitening, cls, self.quarter)  # B x P
        s = s.unflatten(1, (1, self.backbone.H, self.backbone.W))  # B x P -> B x 1 x H x W
        aligned = self.backbone.pool == "bilinear"  # each value goes where its features come from
        s = F.interpolate(s, (self.size, self.size), mode="bilinear", align_corners=aligned)
        return s.squeeze(1), SCORES[self.score](s), cls


@torch.no_grad()
def infer(network, images, labels, device):
    """The outputs network(image, label) of uint8 images N x size x size x 3, labels N or None."""
    outputs = []
    B = 4 if device.type == "cpu" else 32
    for i in range(0, len(images), B):
        image = torch.tensor(images[i : i + B]).to(device)
        image = image.permute(0, 3, 1, 2).float() / 255  # B x 3 x size x size
        label = None
        if labels is not None:
            label = labels[i : i + B].to(device)
        outputs.append([x.cpu() for x in network(image, label)])
    return [torch.cat(x) for x in zip(*outputs, strict=True)]


def detect(detector, images, samples, classes, device):
    """Maps N x size x size, scores N of the samples' images. A classifier is not told the class."""
    labels = None
    if detector.model.needs_label:
        labels = class_index(samples, classes)
    s, scores, _ = infer(detector, images, labels, device)
    return s.numpy(), scores.numpy()


def class_index(samples, classes):
    """Index of each sample's class, N."""
    return torch.tensor([classes.index(sample.cls) for sample in samples])


# ---------------------------------------------------------------------------------------- training

LAUNCHED = dist.is_torchelastic_launched()  # by torchrun
RANK = int(os.environ["RANK"]) if LAUNCHED else 0  # process 0 speaks, writes and evaluates
LOCAL_RANK = int(os.environ["LOCAL_RANK"]) if LAUNCHED else 0
WORLD = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1


class Features:
    """f of N of the images, uint8 .. x size x size x 3: features[i] is B x P x C in half precision.

    As nothing augments, they are extracted once and kept, on a GPU in half of its free memory, else
    in half of the machine's; if they do not fit, each batch extracts its own again.
    """

    def __init__(self, backbone, images, chosen, device):
        self.backbone = backbone
        self.images = images
        self.chosen = chosen
        self.device = device
        self.kept = None
        shape = (len(chosen), backbone.H * backbone.W, backbone.C)
        nbytes = 2 * math.prod(shape)
        ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        ram //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each process keeps all
        home = "cpu"
        if device.type == "cuda" and nbytes < 0.5 * torch.cuda.mem_get_info(device)[0]:
            home = device
        fits = home == device or nbytes < 0.5 * ram
        where = f"kept on {home}" if fits else "too many to keep: extracted again for each batch"
        log.info(f"features {' x '.join(map(str, shape))}, {nbytes / 1e9:.2f} GB, {where}")

        if fits:
            kept = torch.empty(shape, dtype=torch.half, device=home)
            for i in torch.arange(len(chosen)).split(32):
                kept[i] = self[i].to(home)
            self.kept = kept

    def __len__(self):
        return len(self.chosen)

    @torch.no_grad()
    def __getitem__(self, i):
        if self.kept is not None:
            return self.kept[i].to(self.device)
        image = torch.from_numpy(self.images[self.chosen[i.cpu().numpy()]]).to(self.device)
        image = image.permute(0, 3, 1, 2).float() / 255  # B x 3 x size x size
        return self.backbone(image).half()


def channel_statistics(features):
    """Mean and deviation of each channel of features N x P x C, C each.

    The deviation has a floor of 1 % of the mean one: an untrained backbone's channels may not move.
    """
    count = mean = moment = 0  # of so far, in float64
    for index in torch.arange(len(features)).split(32):
        f = features[index].flatten(0, 1).cpu().double()  # B x P x C -> B*P x C
        total = count + len(f)
        difference = f.mean(0) - mean
        mean = mean + difference * len(f) / total
        moment = moment + ((f - f.mean(0)) ** 2).sum(0) + difference**2 * count * len(f) / total
        count = total
    std = (moment / (count - 1)).sqrt()
    if not 0 < std.mean() < math.inf:
        raise data.UserError("the backbone's features are constant or overflow half precision")
    return mean.float(), std.clamp_min(0.01 * std.mean()).float()


def adamw(parameters, args):
    """The paper's, of named parameters."""
    groups = [{"params": list(parameters.values()), "scale": 1}]
    return [torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)]


def muon(parameters, args):
    """Muon for the transformer's matrices, AdamW for all else.

    Momentum 0.95, update scaled to AdamW's, 4 times AdamW's rate, which of 2, 4 and 10 had the
    lowest training loss after 400 steps.
    """
    matrices = {}
    others = {}
    for name, p in parameters.items():
        is_matrix = name.startswith("transformer.") and p.ndim == 2 and "_embed" not in name
        (matrices if is_matrix else others)[name] = p
    groups = [{"params": list(matrices.values()), "scale": 4}]
    options = {"momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    optimizer = torch.optim.Muon(groups, weight_decay=args.weight_decay, **options)
    return [*adamw(others, args), optimizer]


def fall_late(step, steps):
    """x 0.1 after 80 % (Sec. 4.1: 800 of 1000 epochs)."""
    return 0.1 if step >= 0.8 * steps else 1.0


def fall_linearly(step, steps):
    return 1 - step / steps


OPTIMIZERS = {"adamw": (adamw, fall_late), "muon": (muon, fall_linearly)}  # and its schedule


def learning_rate(args, step, steps):
    """Above the paper's rate it warms up.

    At 5e-4 from the start the attention soon collapses to one output for all positions.
    """
    _, schedule = OPTIMIZERS[args.optimizer]
    warm = 1e-4 * (1 + step / 100)
    return min(warm, args.lr * schedule(step, steps))


def train(detector, features, labels, state, args, device):
    """Train on features N x P x C of labels N, from the epoch at which the state stopped.

    Of several processes the log has the losses of the first one's images.
    """
    model = detector.model
    make_optimizers, _ = OPTIMIZERS[args.optimizer]
    optimizers = make_optimizers(dict(model.named_parameters()), args)
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=False):
        with data.explain(f"the optimizer in {args.out} is damaged"):
            optimizer.load_state_dict(saved)
    parallel = model
    if WORLD > 1:
        parallel = nn.parallel.DistributedDataParallel(model)

    N = len(features)
    steps = math.ceil(N / args.batch_size)  # of an epoch
    saved_at = time.time()
    for epoch in range(state["epoch"], args.epochs):
        start = time.time()
        seed = 1_000_003 * args.seed + epoch
        order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed * 4099 + RANK)  # dropout and jitter
        model.train()
        sums = 0
        batches = order.to(labels.device).split(args.batch_size)
        for step, batch in enumerate(batches, epoch * steps):
            part = batch[RANK::WORLD]  # each process takes its share of the same global batch
            share = len(part) / len(batch)
            if share == 0:  # no image is left for this process: one of weight 0
                part = batch[:1]
            f = features[part].float()
            label = labels[part].to(device)

            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                outputs = parallel(f, label)
            loss, logged = objective(model, outputs, label, args.literal)
            loss = loss * share * WORLD  # DistributedDataParallel takes the mean over processes
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            rate = learning_rate(args, step, args.epochs * steps)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["scale"] * rate
                optimizer.step()
            sums = sums + torch.stack(list(logged.values())).detach() * len(batch) / N

        weights = nn.utils.parameters_to_vector(model.parameters())
        if not weights.isfinite().all():
            raise data.UserError(f"diverged in epoch {epoch + 1}: lower --lr")
        text = ", ".join(f"{name} {x:.4f}" for name, x in zip(logged, sums.tolist(), strict=True))
        seconds = time.time() - start
        log.info(f"{state['name']} epoch {epoch + 1}/{args.epochs}: {text}, {seconds:.1f} s")
        state["epoch"] = epoch + 1
        if time.time() - saved_at > SAVE_EVERY:
            save(args, state, detector, optimizers)
            saved_at = time.time()
    model.eval()


@torch.no_grad()
def fit_distance(detector, features, labels, device):
    """K x 4 x C x C: W of cov = (W^T W)^-1; ||W (f' - r)||^2 = (f' - r)^T cov^-1 (f' - r).

    For any --distance, as --eval may change it. cov, of a class and a quarter of the image: the
    quarter's covariance (about zero) of f' - r over the class's training images and the mean of the
    four, half each, plus .02 of the mean variance, so that fewer residuals than channels have an
    inverse, too. In float64. Where a test image's class is not known all have one, of all images.
    """
    whitening = torch.zeros(detector.whitening.shape, dtype=torch.float64)
    C = whitening.shape[-1]
    eye = torch.eye(C, dtype=torch.float64)
    for k in range(len(whitening)):
        chosen = torch.arange(len(labels))
        if detector.model.knows_class:
            chosen = torch.nonzero(labels.cpu() == k).flatten()
        cov = torch.zeros(4, C, C, dtype=torch.float64)
        for index in chosen.to(labels.device).split(32):
            f_, r, _, _ = detector.model(features[index].float(), labels[index].to(device))
            for i in range(4):
                d = (f_ - r)[:, detector.quarter == i].flatten(0, 1)  # B*P_i x C
                d = d.cpu().double()
                cov[i] += d.T @ d / len(d) * len(index) / len(chosen)
        for i in range(4):
            mixed = (cov[i] + cov.mean(0)) / 2
            factor = torch.linalg.cholesky(mixed + 0.02 * mixed.diagonal().mean() * eye)
            whitening[k, i] = torch.linalg.solve_triangular(factor, eye, upper=False)
        if not detector.model.knows_class:
            whitening[:] = whitening[0]
            break
    return whitening.float().to(device)


# ------------------------------------------------------------------------------- a model's training


def fit(detector, state, args, samples, images, device):
    """Train on the samples of the detector's classes, uint8 images N x size x size x 3; then find
    what --distance and a threshold need. Leaves checkpoints in args.out."""
    index = np.array([i for i, sample in enumerate(samples) if sample.cls in state["classes"]])
    held = data.hold_out([samples[i] for i in index], args.holdout)
    training = index[~held]
    if held.any():
        log.info(f"{state['name']}: {len(training)} images train, {held.sum()} are held out")
    digest = data.digest([samples[i] for i in training])
    if state["digest"] not in (None, digest):
        raise data.DataError(f"{args.out} was trained on other images; change --root or --out")
    state["digest"] = digest

    features = Features(detector.backbone, images, training, device)
    labels = class_index([samples[i] for i in training], state["classes"])
    if features.kept is not None:
        labels = labels.to(features.kept.device)
    if not args.uniad:
        mean, std = channel_statistics(features)
        detector.model.mean = mean.to(device)
        detector.model.std = std.to(device)
    train(detector, features, labels, state, args, device)
    detector.whitening = fit_distance(detector, features, labels, device)

    chosen = data.calibration_images([samples[i] for i in index], held)
    normal = [samples[i] for i in index[chosen]]
    s, scores = detect(detector, images[index[chosen]], normal, state["classes"], device)
    state["calibration"] = metrics.calibrate(s, scores, normal, held[chosen])
    state["trained"] = True
    save(args, state, detector, [])


def new_state(args, classes):
    """What a checkpoint holds, here at the start of a training."""
    return {
        "name": "unified" if args.unified else classes[0].replace("/", "_"),
        "args": {key: vars(args)[key] for key in SETTINGS},
        "classes": classes,
        "digest": None,  # of the training images' names and sizes
        "epoch": 0,  # done
        "trained": False,  # all epochs, and what follows them
        "detector": None,  # its tensors after that epoch
        "optimizers": [],
        "calibration": None,  # what normal images look like to the trained detector
    }


def save(args, state, detector, optimizers):
    if RANK == 0:
        state["detector"] = detector.state_dict()
        state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        with data.saved(Path(args.out, f"{state['name']}.pt")) as file:
            torch.save(state, file)


def make_detector(args, state, backbone):
    """The detector that the settings name, with the state's tensors if it has any."""
    K = len(state["classes"])
    tensors = state["detector"]
    if args.uniad:
        text = None
        if args.query == "text":
            text = tensors["model.text"] if tensors else read_texts(args.text, state["classes"])
        model = UniAD(backbone.C, backbone.H, backbone.W, K, args.query, text)
    else:
        shape = backbone.C, backbone.H, backbone.W, K
        losses = args.cls_loss, args.prior_loss
        model = MINTAD(*shape, args.query, args.prompt, args.adapter, *losses)
    detector = Detector(backbone, model, K, args.size, args.distance, args.score)
    if tensors:
        with data.explain(f"{args.eval or args.out}: the checkpoint of {state['name']} is damaged"):
            detector.load_state_dict(tensors)
    return detector


def read_texts(path, classes):
    """K x T: of a file with a row of one length for each class."""
    with data.explain(f"--text {path}: expected a row of one length for each class"):
        rows = data.read_tensors(path)
        return torch.stack([rows[cls].float().flatten() for cls in classes])


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
    masks = data.decode_masks(test_samples, args.size)
    test_images = data.decode(test_samples, args.size)
    torch.manual_seed(0)  # an untrained backbone is the same for all seeds and processes
    weights = args.weights if training and not states else "none"
    backbone = Backbone(args.backbone, weights, args.size, args.levels, args.pool)
    if states:  # whose tensors are in the checkpoints: this fills it
        make_detector(args, states[0], backbone)

    if training:
        if args.data in ("folder", "toy"):
            ours = {key: vars(args)[key] for key in PRESETS[args.data]}
            log.info(f"not the paper's settings but ours for {args.data}: {ours}")
        images = data.decode(train_samples, args.size)
        data.warn_of_copies(train_samples, images, test_samples, test_images)
        groups = [classes] if args.unified else [[cls] for cls in classes]
        started = {state["name"]: state for state in states}
        states = [new_state(args, group) for group in groups]
        states = [started.get(state["name"], state) for state in states]
        for state in states:
            if not state["trained"]:
                torch.manual_seed(args.seed)
                detector = make_detector(args, state, backbone).to(device)
                fit(detector, state, args, train_samples, images, device)

    results = {}
    for state in states:
        if RANK == 0:
            detector = make_detector(args, state, backbone).to(device).eval()
            results |= test(detector, state, args, test_samples, test_images, masks, device)
    if RANK == 0:
        report(args, results)


def test(detector, state, args, samples, images, masks, device):
    """{row: metrics} of the test images of the model's classes, one row of the table at a time."""
    rows = {sample.row for sample in samples if sample.cls in state["classes"]}
    if not rows and not args.classes:
        log.warning(f"warning: {state['name']}: no test images of its classes here (--root)")
    results = {}
    for row in dict.fromkeys(sample.row for sample in samples if sample.row in rows):
        index = [i for i, sample in enumerate(samples) if sample.row == row]
        its = [samples[i] for i in index]
        its_images = images[index]
        s, scores = detect(detector, its_images, its, state["classes"], device)
        results[row] = metrics.evaluate(its, scores, s, masks[index])
        if args.save_maps:
            where = Path(args.out, "maps", row)
            known = masks[index], state["calibration"]
            metrics.save_maps(where, its_images, its, scores, s, *known)
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
        with data.explain(f"{path}: not a checkpoint of this version of mintad.py"):
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
    if state["epoch"] and not state["detector"]:
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

# I-AUROC (Table 1), P-AUPR (Table 10), separate I-AUROC, each of UniAD and MINT-AD, in %
MVTEC = """
bottle       99.7 100.0   65.5  66.5  100.0  99.2
cable        95.2  93.5   47.9  40.5   97.6  98.6
capsule      86.9  95.5   43.8  47.5   85.3  81.0
hazelnut     99.8 100.0   55.4  57.2   99.9 100.0
metal_nut    99.2  99.3   54.9  61.5   99.0  97.1
pill         93.7  95.8   44.5  52.7   88.3  98.3
screw        87.5  98.3   29.6  51.2   91.9  97.8
toothbrush   94.2 100.0   37.3  38.0   95.0  95.6
transistor   99.8  99.8   66.4  65.2  100.0  99.9
zipper       95.8  99.1   40.3  58.3   96.7  99.6
carpet       99.8  99.9   47.8  55.6   99.9 100.0
grid         98.2 100.0   22.6  34.0   98.5  99.9
leather     100.0 100.0   33.1  36.9  100.0 100.0
tile         99.3  99.2   41.5  41.7   99.0  99.0
wood         98.6  99.4   37.2  40.0   97.9  98.9
mean         96.5  98.6   44.5  49.8   96.6  97.7
"""
# I-AUROC, P-AUPR (Table 2), each of UniAD and MINT-AD, in %
VISA = """
cashew       92.8  88.2   50.2  28.6
chewinggum   99.6  99.9   60.4  62.4
fryum        89.8  95.4   47.6  38.7
pipe_fryum   97.8  98.2   54.9  47.1
candle       96.9  97.5   21.2  27.8
capsules     72.1  89.9   51.3  57.9
macaroni1    91.8  99.1    8.8  24.0
macaroni2    85.6  90.1    3.9  15.8
pcb1         95.7  96.5   67.4  78.2
pcb2         93.4  96.4    8.9  27.7
pcb3         89.4  98.0   14.9  34.0
pcb4         99.4  98.8   36.5  30.4
mean         92.0  95.7   35.5  39.4
"""
# I-AUROC (Table 7) of UniAD and MINT-AD, in %, by the digits of the normal classes
CIFAR10 = """
01234  84.4 86.7
56789  80.9 83.3
02468  93.0 93.6
13579  90.6 92.6
"""
TABLES = {  # (set, unified): the table, and where a metric's two columns begin
    ("mvtec", True): (MVTEC, {"i_auroc": 0, "p_aupr": 2}),
    ("mvtec", False): (MVTEC, {"i_auroc": 4}),
    ("visa", True): (VISA, {"i_auroc": 0, "p_aupr": 2}),
    ("cifar10", True): (CIFAR10, {"i_auroc": 0}),
}


def published(args, rows):
    """The paper's figures, {row: {metric: value}}; {} where the model is not the paper's, trained
    however long."""
    table, columns = TABLES.get((args.data, args.unified), ("", {}))
    own = ["size", "backbone", "levels", "pool", "query", "prompt", "adapter", "cls_loss"]
    own += ["prior_loss", "literal", "distance", "score"]
    if args.unified:
        own.append("classes")  # of fewer it is another model
    theirs = {key: default for key, (default, _) in SETTINGS.items()}
    if args.uniad:
        theirs |= UNIAD
    if args.data == "cifar10":
        theirs |= PRESETS["cifar10"]
    if args.weights == "none" or any(vars(args)[key] != theirs[key] for key in own):
        return {}
    result = {}
    for line in table.split("\n")[1:-1]:
        row, *figures = line.split()
        result[row] = {}
        for key, column in columns.items():
            if not args.uniad:  # MINT-AD's stands beside it
                column += 1
            result[row][key] = float(figures[column]) / 100
    if args.classes or len(rows) == 1:  # its mean is over all classes
        result.pop("mean", None)
    return result


# --------------------------------------------------------------------------- a trained model's use


def what_is_known(args, state, detector):
    """label: index of the class that all photos are of, as the user says or as there is only one,
    else None. names: of each class that the detector may return; "" if it does not know it."""
    known = state["classes"]
    classes = args.classes or known
    if len(classes) == 1 and classes[0] in known:
        return known.index(classes[0]), classes * len(known)
    if args.classes or detector.model.needs_label:
        raise data.UserError(f"--classes: expected one of {', '.join(known)}")
    if detector.model.knows_class:
        return None, known
    return None, [""] * len(known)


def predict(args, state, detector, device):
    """Score, verdict, class and picture of each image of --predict; True if all could be read."""
    label, names = what_is_known(args, state, detector)
    paths = data.find_images(args.predict)
    open_folder(args)
    thresholds = metrics.thresholds(state["calibration"], args.quantile, names)

    def judge(pixels):
        labels = None
        if label is not None:
            labels = torch.full((len(pixels),), label)
        s, scores, cls = infer(detector, pixels, labels, device)
        return s.numpy(), scores.numpy(), [names[k] for k in cls]

    batch_size = 4 if device.type == "cpu" else 32
    options = state["calibration"], thresholds, args.out, batch_size, args.size
    return metrics.predict(paths, judge, *options)


class Program(nn.Module):
    """What --export writes: photos as they are, uint8 B x 3 x H x W of any H and W, RGB -> map
    s: B x size x size, score: B, class: B, and the threshold of that class: B."""

    def __init__(self, detector, thresholds, label):
        super().__init__()
        self.detector = detector
        self.label = label
        self.register_buffer("threshold", torch.tensor(thresholds))

    def forward(self, photo):
        image = data.resized_tensor(photo, self.detector.size)
        label = None
        if self.label is not None:
            # Of B values, whatever B will be.
            label = torch.full_like(photo[:, 0, 0, 0], self.label, dtype=torch.long)
        s, score, cls = self.detector(image, label)
        return s, score, cls, self.threshold[cls]


def export(args, state, detector):
    """Write a torch.export program, which needs nothing but torch."""
    label, names = what_is_known(args, state, detector)
    thresholds = metrics.thresholds(state["calibration"], args.quantile, names)
    values = [thresholds[name] for name in names]
    program = Program(detector, values, label).eval().requires_grad_(False)
    shapes = {0: "B", 2: "H", 3: "W"}
    shapes = {axis: torch.export.Dim(name, min=1) for axis, name in shapes.items()}
    photo = torch.zeros(2, 3, 300, 400, dtype=torch.uint8)
    exported = torch.export.export(program, (photo,), dynamic_shapes=(shapes,))
    with data.saved(args.export) as file:
        torch.export.save(exported, file)
    log.info(f"{args.export}: RGB photos, uint8 B x 3 x H x W -> map, score, class, threshold")
    log.info(f"classes from 0 on: {', '.join(state['classes'])}")


# -------------------------------------------------------------------------------------- arguments

CHOICES = {
    "normals": ["01234", "56789", "02468", "13579"],
    "levels": [4, 5],
    "pool": POOLS,
    "query": [*QUERIES, *UNIAD_QUERIES],
    "prompt": PROMPTS,
    "optimizer": OPTIMIZERS,
    "distance": DISTANCES,
    "score": SCORES,
}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise data.UserError(f"{message} (--help lists the options)")


def get_parser():
    """A flag for each of SETTINGS and ACTIONS, and --no-FLAG for what is on or off."""
    parser = Parser(
        usage="%(prog)s [options]",
        description="MINT-AD (arXiv 2403.14213): train, evaluate, predict.",
        epilog=f"Presets: {PRESETS}; --uniad: {UNIAD}",
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
        preset = UNIAD if typed.get("uniad") else {}
        preset = preset | PRESETS.get(typed.get("data", args.data), {})
        if typed.get("query") == "mlp":
            preset["prior_loss"] = False  # Sec. 0.B.6
    vars(args).update(preset)
    vars(args).update(typed)
    if args.classes:
        args.classes = list(map(data.composed, args.classes))

    if args.query == "learned" and not (args.cls_loss or args.prior_loss or "prompt" in typed):
        args.prompt = "none"  # Table 5: nothing uses z
    if not args.out and not args.eval:
        args.out = f"runs/mintad-{args.data}-{'unified' if args.unified else 'separate'}"
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
            free |= {"distance", "score"}
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
        most = 1 if key in ("holdout", "quantile") else 2**31
        if isinstance(value, int | float) and not least <= value <= most:
            raise data.UserError(f"{flag} {value}: expected {least} to {most}")
    if "root" in typed and args.data == "toy":
        raise data.UserError(f"--root {args.root}: of which set? --data folder for your own photos")
    if args.data == "cifar10" and not args.unified:
        raise data.UserError("--data cifar10 --no-unified: its five classes train one model")
    check_use(args, typed, states)
    check_variant(args)


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


def check_variant(args):
    """Of the papers' variants: what belongs to UniAD, to MINT-AD, to a classifier."""
    own = [args.prompt == "feature", args.adapter, args.cls_loss, args.prior_loss, not args.literal]
    needs_label = PROMPTS[args.prompt].needs_label or UNIAD_QUERIES.get(args.query, False)
    if args.uniad != (args.query in UNIAD_QUERIES):
        raise data.UserError(f"--query {args.query}: {', '.join(UNIAD_QUERIES)} are --uniad's")
    if args.uniad and not all(own):
        raise data.UserError("--uniad is whole: it has no prompt, adapter or loss to choose")
    if (args.query == "text") != bool(args.text):
        raise data.UserError("--query text and --text FILE go together")
    uses_z = (
        args.query != "learned" or args.prior_loss or (args.prompt == "feature" and args.cls_loss)
    )
    if not args.uniad and uses_z == (args.prompt == "none"):
        raise data.UserError(f"--prompt {args.prompt}: z is {'' if uses_z else 'not '}used here")
    if args.data == "cifar10" and needs_label:
        raise data.UserError("--data cifar10: this variant needs the class; an anomaly has none")


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
            backbone = Backbone(args.backbone, "none", args.size, args.levels, args.pool)
            detector = make_detector(args, states[0], backbone).eval().requires_grad_(False)
            if args.export:
                export(args, states[0], detector)
            if args.predict and not predict(args, states[0], detector.to(device), device):
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
