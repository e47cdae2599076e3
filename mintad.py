"""MINT-AD (Toward Multi-class Anomaly Detection: Exploring Class-aware Unified Model against
Inter-class Interference, arXiv 2403.14213): one model for all classes, the query of whose
transformer is an implicit neural representation of the image's class.

    python mintad.py                                              # built-in toy set, no download
    python mintad.py --data mvtec --unified                       # the paper's main setting
    torchrun --nproc_per_node=4 mintad.py --data mvtec --unified  # on four GPUs, the same batches
    python mintad.py --data mvtec                                 # one model per class: "separate"
    python mintad.py --data visa --unified --uniad                # the UniAD baseline
    python mintad.py --data folder --root photos --unified        # your own photos
    python mintad.py --out RUN --resume                           # go on with an interrupted run
    python mintad.py --eval RUN                                   # a trained model's table again
    python mintad.py --eval RUN --predict photos --out verdicts   # score, verdict, class, picture

    f   : B x P x C    features of a frozen backbone, stages 1-4 resized to stage 4 and concatenated
    f'  : B x P x C    adapter of the standardised f, one linear layer; f_ in the code
    z   : B x Z        class token of f', the layer before the classification head
    q   : B x P x D    INR(positions, z), the transformer decoder's query; q -> mu, log sigma of f'
    r   : B x P x C    f' reconstructed by the transformer
    s   : B x S x S    anomaly map, ||f' - r|| at each position, enlarged

    B batch, C channels, H x W = P positions, D = 256 hidden width, K classes, L = 4 layers,
    N images, S image side, Z = 32 width of z, E = 3 width of a position

Details of the implementation and where each comes from:

 1. Backbone: levels of stride 2, 4, 8, 16 (CIFAR-10: 32 too), sampled at the positions of stride 16
    with aligned corners. That reads 4 of the 64 values under a position of the finest level; ours,
    --pool area, takes the mean of all.
 2. Features are standardised by the training features' mean and deviation of each channel. The
    paper does not say so, but without it a few channels of large scale are nearly the whole loss.
    --uniad takes raw features, as its authors.
 3. Eq. 4 and 5 are likelihoods of the original features, where Eq. 3 starts, which adds log|det W|
    to both; nothing is detached (objective; README, "What keeps MINT-AD from collapsing").
    --literal leaves the determinants out, as printed. log sigma stays within -5 and 5.
 4. INR: Table 13 and a linear output layer, 602,368 weights, which is Table 9's 0.602 M. The paper
    has no initialisation for it and the class token; here SIREN's, and Kaiming's with care (INR,
    FeaturePrompt).
 5. Transformer: UniAD's layers, 4 + 4 (Table 15; the text says 6), post-norm, one q for all decoder
    layers, learned positions added to queries and keys, jitter on the input tokens.
 6. AdamW, lr x 0.1 after 80 % of the steps, gradient norm clipped at 0.1 (UniAD), batch 32. An --lr
    above 1e-4 is warmed up to. Ours: --optimizer muon, whose rate falls linearly to zero.
 7. Ours: --distance mahalanobis divides f' - r by its usual size: the covariance over the training
    images of the class, one for each quarter of the image. Eq. 1's classifier says which class.
 8. Each epoch sets the random state from (seed, epoch, process), so that an interrupted run goes on
    from its checkpoint bit for bit.
"""

import argparse
import copy
import json
import logging
import math
import os
import sys
import tempfile
import time
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

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

# Flag: default, help. The defaults are the paper's. A list has the choices, the default first; None
# is a text that may be left out. A checkpoint keeps all of these.
SETTINGS = {
    "data": ("toy", f"{', '.join(data.SETS)}; several as mvtec+visa"),
    "root": (None, "where the data lies, if not in data/NAME"),
    "unified": (False, "one model for all classes, not one each"),
    "classes": (None, "a subset"),
    "normals": (["01234", "56789", "02468", "13579"], "cifar10's normal classes"),
    "size": (224, "images are resized to size x size pixels"),
    "holdout": (0.0, "share of the training images kept back to find --predict's threshold"),
    "backbone": ("tf_efficientnet_b4.aa_in1k", "any timm CNN of strides 2, 4, 8, 16"),
    "weights": (None, "its checkpoint instead of timm's download, or none: untrained"),
    "pool": (["bilinear", "area"], "how levels come to stride 16; area is ours"),
    "uniad": (False, "the UniAD baseline, whole"),
    "query": (["inr", "mlp", "learned", "layerwise", "token", "text", "pool"], "last 4: --uniad's"),
    "text": (None, "--query text: safetensors, a row of text embedding per class name"),
    "prompt": (["feature", "label", "image"], "the source of class token z"),
    "adapter": (True, "without: f' = f, standardised"),
    "cls_loss": (True, "Eq. 1"),
    "prior_loss": (True, "Eq. 4"),
    "literal": (False, "Eq. 4, 5 as printed, without the determinants"),
    "epochs": (1000, "Sec. 4.1"),
    "batch_size": (32, "over all processes; Sec. 4.1"),
    "lr": (1e-4, "learning rate"),
    "weight_decay": (1e-4, "UniAD's"),
    "optimizer": (["adamw", "muon"], "muon is ours"),
    "amp": (False, "train in bfloat16; evaluation is in float32, TF32 on a GPU"),
    "seed": (1, "of weights, batches, dropout and jitter"),
    "distance": (["euclidean", "mahalanobis"], "mahalanobis is ours"),
}
ACTIONS = {
    "out": (None, "a new or empty folder; default runs/mintad-DATA-SETTING"),
    "resume": (False, "go on with the run in --out"),
    "eval": (None, "evaluate a checkpoint, or all of a run's folder"),
    "save_maps": (False, "a picture of each test image"),
    "predict": (None, "with --eval: image files and folders to judge"),
    "quantile": (0.99, "of normal images' scores: the limit of --predict"),
    "export": (None, "with --eval: write a torch.export program, FILE.pt2"),
    "device": ("cuda" if torch.cuda.is_available() else "cpu", "or cuda:N, mps"),
    "bench": (False, "speed and cost, no data needed"),
}
PRESETS = {  # what is not the paper's
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
    "cifar10": {"unified": True},  # UniAD's protocol has no other setting
}

LAUNCHED = dist.is_torchelastic_launched()  # by torchrun
RANK = int(os.environ["RANK"]) if LAUNCHED else 0  # process 0 speaks, writes and evaluates
LOCAL_RANK = int(os.environ["LOCAL_RANK"]) if LAUNCHED else 0
WORLD = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1
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

    The names are those of its authors' weights: self_attn is not one.
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

    def forward(self, f, queries, mask=None, token=None):
        """f: B x P x C; queries: L of B x P x D; mask: P x P, True = hidden; token: B x 1 x D.

        The token goes along and is cut off: with it queries and mask have P + 1 positions.
        """
        P = f.shape[1]
        if self.training:  # UniAD's jitter: noise in proportion to each token's length
            scale = JITTER * f.norm(dim=-1, keepdim=True) / f.shape[-1]
            f = f + torch.randn_like(f) * scale
        x = self.input_proj(f)  # B x P x D

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
            x = layer(q, memory, x, pos, mask)
        return self.output_proj(self.norm(x)[:, :P])  # B x P x C


def mlp(act, *widths):
    """Linear layers of these widths with an activation between two."""
    layers = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), act()]
    return layers[:-1]


class FeaturePrompt(nn.Module):
    """The class token before the classifier's head, and its logits (Sec. 3.3, Table 12, Eq. 1)."""

    def __init__(self, C, P, K, Z=32, D=256, head=True):
        super().__init__()
        # B x P x C -> B x P x Z
        self.class_encoder = nn.Sequential(*mlp(nn.ReLU, C, D, D, Z), nn.Softmax(-1))
        # B x P*Z -> B x Z; Table 12 has P*Z = 8192
        self.channel_encoder = nn.Sequential(*mlp(nn.LeakyReLU, P * Z, D, D, Z), nn.Softmax(-1))
        self.head = nn.Linear(Z, K) if head else None
        for module in self.modules():
            if isinstance(module, nn.Linear):  # torch's default leaves z too flat to learn
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)
        # A softmax's norm is at most 1, whatever its width: P inputs count here, not P * Z.
        nn.init.normal_(self.channel_encoder[0].weight, std=math.sqrt(2 / P))
        if head:  # if small, z turns one-hot, often alike for two classes, before logits differ
            nn.init.normal_(self.head.weight, std=5.0)

    def forward(self, f_):
        z = self.channel_encoder(self.class_encoder(f_).flatten(1))  # B x P x Z -> B x P*Z -> B x Z
        logits = self.head(z) if self.head else None  # B x K
        return z, logits


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
        # Kaiming's; the first layer's input is p and a softmax, of norm |z| <= 1.
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


# ------------------------------------------------------------------------------------------- model


class Backbone(nn.Module):
    """Frozen multi-scale features (Sec. 3.2): images B x 3 x S x S in 0..1 -> f, B x P x C.

    args: data, backbone, size, pool. weights: a file, "none" (untrained), or None for timm's
    download. DataError: a net without these levels, weights that cannot be had or do not fit.
    """

    def __init__(self, args, weights):
        super().__init__()
        self.pool = args.pool
        name = args.backbone
        strides = [2, 4, 8, 16]
        if args.data == "cifar10":
            strides.append(32)  # C = 720 with b4, as UniAD
        with data.explain(f"--backbone {name}: no such timm CNN, or no download (--weights FILE)"):
            info = timm.create_model(name, features_only=True).feature_info
            index = [i for i, stride in enumerate(info.reduction()) if stride in strides]
            options = {"features_only": True, "out_indices": index}
            self.net = timm.create_model(name, pretrained=weights is None, **options)
        info = self.net.feature_info
        if info.reduction() != strides:
            raise data.DataError(f"--backbone {name} has strides {info.reduction()}, not {strides}")
        if hasattr(self.net, "blocks"):  # timm's EfficientNets compute stages beyond the last level
            last = int(info.module_name()[-1].split(".")[1])
            del self.net.blocks[last + 1 :]
        if weights not in (None, "none"):
            data.load_weights(self.net, weights)

        self.eval().requires_grad_(False)
        config = self.net.pretrained_cfg
        self.register_buffer("image_mean", torch.tensor(config["mean"]).view(3, 1, 1))
        self.register_buffer("image_std", torch.tensor(config["std"]).view(3, 1, 1))
        self.C = sum(info.channels())
        self.H, self.W = self.net(torch.zeros(1, 3, args.size, args.size))[3].shape[2:]
        if min(self.H, self.W) < 2:
            raise data.DataError(f"--size {args.size} is too small: {self.H} x {self.W} positions")

    def forward(self, image):
        levels = self.net((image - self.image_mean) / self.image_std)
        size = (self.H, self.W)
        if self.pool == "area":
            levels = [F.adaptive_avg_pool2d(x, size) for x in levels]
        else:
            levels = [F.interpolate(x, size, mode="bilinear", align_corners=True) for x in levels]
        return torch.cat(levels, 1).flatten(2).transpose(1, 2)  # B x C x H x W -> B x P x C


class MINTAD(nn.Module):
    """The model of Figure 3 and its variants (Tables 4, 5, 9).

    query: inr | mlp | learned, what the transformer decoder gets. prompt: what z comes from, the
    classifier (feature), a projection of the label, needed at test time too (label), or of the
    image's mean feature (image).
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
        Z = 32
        self.K = K
        self.query = query
        self.prompt = prompt
        self.prior_loss = prior_loss
        self.needs_label = prompt == "label"
        self.uses_z = query != "learned" or cls_loss or prior_loss
        self.transformer = Transformer(C, H, W, D, layers=layers)
        self.register_buffer("mean", torch.zeros(C))
        self.register_buffer("std", torch.ones(C))

        self.adapter = nn.Identity()
        if adapter:  # f' = W f + b (Sec. 3.2), W from the identity
            self.adapter = nn.Linear(C, C)
            nn.init.eye_(self.adapter.weight)
            nn.init.zeros_(self.adapter.bias)
        if prompt == "feature" and self.uses_z:
            self.token = FeaturePrompt(C, P, K, Z, head=cls_loss)
        elif self.uses_z:
            self.token = nn.Linear(K if prompt == "label" else C, Z)
        if query == "inr" or prior_loss:
            self.positions = nn.Parameter(torch.randn(P, 3))  # "a learnable embedding", P x E
            self.inr = INR(Z, 3, D)
        if query == "mlp":  # Sec. 0.B.6: "repeated", but its 383.5 M weights are P*D outputs
            self.mlp = nn.Sequential(*mlp(nn.ReLU, Z, D, D, P * D), nn.Unflatten(1, (P, D)))
        if query == "learned":  # one for all images
            self.learned = nn.Parameter(torch.randn(P, D))
        if prior_loss:  # Table 14, whose 512 outputs are 2 x 256; f' has C channels
            self.distribution = nn.Sequential(*mlp(nn.LeakyReLU, D, D, D, 2 * C))

    def forward(self, f, label=None):
        """f: B x P x C raw, label: B -> f', r; logits: B x K or None; (mu, log sigma) or None."""
        f = (f - self.mean) / self.std
        f_ = self.adapter(f).float()
        logits = None
        gaussian = None
        if self.uses_z:
            # z: B x Z; logits: B x K, or None without a classifier
            if self.prompt == "feature":
                z, logits = self.token(f_)
            elif self.prompt == "label":
                z = self.token(F.one_hot(label, self.K).to(f_.dtype))
            else:
                z = self.token(f_.mean(1))
        if self.query == "inr" or self.prior_loss:
            q_inr = self.inr(self.positions, z)  # B x P x D

        if self.query == "inr":
            q = q_inr
        elif self.query == "mlp":
            q = self.mlp(z)
        else:
            q = self.learned.expand(f.shape[0], -1, -1)
        r = self.transformer(f_, [q] * len(self.transformer.decoder)).float()
        if self.prior_loss:
            mu, log_sigma = self.distribution(q_inr).float().chunk(2, -1)  # B x P x C each
            gaussian = mu, log_sigma.clamp(-5, 5)
        return f_, r, logits, gaussian


class UniAD(nn.Module):
    """The baseline, as its authors' code: raw f, neighbour-masked attention, a query per layer.

    query: layerwise (its own), or Table 4's variants: pool, a query per class; token, the class as
    a token more; text, a projection of the class's row of text, K x T. Called as MINTAD.
    """

    def __init__(self, C, H, W, K, query="layerwise", text=None, D=256, layers=4):
        super().__init__()
        P = H * W
        self.K = K
        self.query_kind = query
        self.needs_label = query != "layerwise"
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
            self.query = nn.Linear(text.shape[1], D)
        else:  # as its authors', those of the layers start alike
            one = torch.randn(K if query == "pool" else 1, 1, P, D)
            self.query = nn.Parameter(one.repeat(1, layers, 1, 1))

    def forward(self, f, label=None):
        B, P, _ = f.shape
        L = len(self.transformer.decoder)
        token = None
        if self.query_kind == "text":
            q = self.query(self.text[label])[:, None, None].expand(B, L, P, -1)
        elif self.query_kind == "pool":
            q = self.query[label]
        else:
            q = self.query.expand(B, -1, -1, -1)  # B x L x P x D
        if self.query_kind == "token":
            token = self.token(F.one_hot(label, self.K).to(f.dtype)).unsqueeze(1)  # B x 1 x D
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
        raise data.DataError(f"--size: UniAD's mask hides all of {H} x {W} positions: too small")
    return mask


# ------------------------------------------------------------------------------------------ losses


def objective(model, outputs, label, literal=False):
    """Eq. 6 of a batch, and {name: value} to log; outputs: what model(f, label) returns.

        L = L_mse (Eq. 5) + 1.0 L_ce (Eq. 1) + 0.1 L_prior (Eq. 4)

    Eq. 3 starts from the likelihood of the original features; for f' = W f + b it is, per position,
        log p(f) = log N(f'; mu, sigma) + log |det W|          (the paper prints no determinant).
    Eq. 5 is a Gaussian's too, of fixed s = 1/2: -log p(f) = |f' - r|^2 / 2s^2 - log |det W| + c.
    Times 2s^2 / C that is (Eq. 5) - (2s^2 / C) log |det W|. Without determinants (literal) f'
    shrinks.
    """
    f_, r, logits, gaussian = outputs
    mse = F.mse_loss(r, f_)  # Eq. 5
    loss = mse
    logged = {"mse": mse, "std f'": f_.std()}

    log_det = 0  # per channel
    if isinstance(model.adapter, nn.Linear) and not literal:
        log_det = torch.linalg.slogdet(model.adapter.weight)[1] / f_.shape[-1]
        loss = loss - 0.5 * log_det  # 2s^2 = 0.5
        logged["log det"] = log_det
    if logits is not None:
        ce = F.cross_entropy(logits.float(), label)  # Eq. 1
        loss = loss + LAMBDA_CE * ce
        logged["ce"] = ce
        logged["accuracy"] = (logits.argmax(1) == label).float().mean()
    if gaussian:
        mu, log_sigma = gaussian
        nll = 0.5 * ((f_ - mu) / log_sigma.exp()) ** 2 + log_sigma + 0.5 * math.log(2 * math.pi)
        prior = nll.mean() - log_det  # Eq. 2 and 4, of the original features by Eq. 3
        loss = loss + LAMBDA_PRIOR * prior
        logged["prior"] = prior
    return loss, logged


# ----------------------------------------------------------------------------------- map and score


class Detector(nn.Module):
    """Image B x 3 x S x S in 0..1 -> map s: B x S x S, score: B, class: B.

    label, B: the class, if it is known; some variants need it. Else the classifier finds it, and
    without a classifier it is 0.
    """

    def __init__(self, args, classes, backbone, text=None):
        super().__init__()
        C, H, W, K = backbone.C, backbone.H, backbone.W, len(classes)
        self.backbone = backbone
        self.size = args.size
        self.distance = args.distance
        self.score = "max"
        if args.data == "cifar10":
            self.score = "mean"
        elif args.uniad:
            self.score = "average"

        if args.uniad:
            self.model = UniAD(C, H, W, K, args.query, text)
        else:
            losses = args.cls_loss, args.prior_loss
            self.model = MINTAD(C, H, W, K, args.query, args.prompt, args.adapter, *losses)
        self.knows_class = self.model.needs_label or (args.cls_loss and not args.uniad)
        if not self.knows_class:
            K = 1
        self.register_buffer("whitening", torch.eye(C).repeat(K, 4, 1, 1))  # see fit_distance
        y = torch.arange(H).view(H, 1)
        x = torch.arange(W).view(1, W)
        quarter = (2 * (y >= H / 2) + (x >= W / 2)).flatten()  # P, 0 to 3
        self.register_buffer("quarter", quarter, persistent=False)

    def forward(self, image, label=None):
        f_, r, logits, _ = self.model(self.backbone(image), label)
        cls = torch.zeros(image.shape[0], dtype=torch.long, device=image.device)
        if self.knows_class:
            cls = logits.argmax(1) if label is None else label

        d = f_ - r  # B x P x C
        s = d.norm(dim=-1)  # Eq. 7, B x P
        if self.distance == "mahalanobis":
            for i in range(4):
                whitened = d @ self.whitening[cls, i].mT
                s = torch.where(self.quarter == i, whitened.norm(dim=-1), s)
        s = s.unflatten(1, (1, self.backbone.H, self.backbone.W))  # B x P -> B x 1 x H x W
        aligned = self.backbone.pool == "bilinear"  # each value goes where its features come from
        s = F.interpolate(s, (self.size, self.size), mode="bilinear", align_corners=aligned)

        if self.score == "mean":  # UniAD's for CIFAR-10
            score = s.mean((1, 2, 3))
        elif self.score == "average":  # UniAD
            score = F.avg_pool2d(s, 16, stride=1).amax((1, 2, 3))
        else:
            score = s.amax((1, 2, 3))  # Sec. 3.6
        return s.squeeze(1), score, cls


@torch.no_grad()
def infer(network, images, labels, device):
    """The outputs network(image, label) of uint8 images N x S x S x 3 and labels, N or None."""
    outputs = []
    B = 4 if device.type == "cpu" else 32
    for i in range(0, len(images), B):
        image = torch.tensor(images[i : i + B]).to(device)
        image = image.permute(0, 3, 1, 2).float() / 255  # B x S x S x 3 -> B x 3 x S x S
        label = None
        if labels is not None:
            label = labels[i : i + B].to(device)
        outputs.append([x.cpu() for x in network(image, label)])
    return [torch.cat(x) for x in zip(*outputs, strict=True)]


def detect(detector, images, samples, classes, device):
    """Maps N x S x S and scores N of the samples' images. A classifier is not told the class."""
    labels = class_index(samples, classes) if detector.model.needs_label else None
    s, scores, _ = infer(detector, images, labels, device)
    return s.numpy(), scores.numpy()


def class_index(samples, classes):
    """Index of each sample's class, N; 0 for a class that did not train (CIFAR-10's anomalies)."""
    return torch.tensor([classes.index(s.cls) if s.cls in classes else 0 for s in samples])


# ---------------------------------------------------------------------------------------- training


def channel_statistics(features):
    """Mean and deviation of each channel of features N x P x C, C each.

    The deviation has a floor of 1 % of the mean one: an untrained backbone's channels may not move.
    """
    std, mean = torch.std_mean(features.float(), (0, 1))
    if not 0 < std.mean() < math.inf:
        raise data.DataError("the backbone's features are constant or overflow half precision")
    return mean, std.clamp_min(0.01 * std.mean())


def make_optimizers(model, args):
    """The paper's AdamW, or beside it Muon for the transformer's matrices.

    Muon (momentum 0.95, update scaled to AdamW's) at 4 times AdamW's rate: of 2, 4 and 10 that
    which left the least of the training images unexplained after 400 steps.
    """
    matrices = []
    others = []
    for name, p in model.named_parameters():
        is_matrix = name.startswith("transformer.") and p.ndim == 2 and "_embed" not in name
        if args.optimizer == "muon" and is_matrix:
            matrices.append(p)
        else:
            others.append(p)
    decay = args.weight_decay
    groups = [{"params": others, "scale": 1}]
    optimizers = [torch.optim.AdamW(groups, weight_decay=decay, fused=True)]
    if matrices:
        groups = [{"params": matrices, "scale": 4}]
        options = {"momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
        optimizers.append(torch.optim.Muon(groups, weight_decay=decay, **options))
    return optimizers


def learning_rate(args, step, steps):
    """AdamW: x 0.1 after 80 % (Sec. 4.1: 800 of 1000 epochs). Muon: falls linearly to zero.

    Above the paper's rate it warms up: 5e-4 at once blinds the attention, so that in 200 steps all
    positions of an image get the same, and for good.
    """
    warm = min(args.lr, 1e-4 * (1 + step / 100))
    if args.optimizer == "muon":
        return min(warm, args.lr * (1 - step / steps))
    if step >= 0.8 * steps:
        return min(warm, 0.1 * args.lr)
    return warm


def train(detector, features, labels, state, args, device):
    """Train on features N x P x C of labels N, from the epoch at which the state stopped.

    Of several processes the log has the losses of the first one's images.
    """
    model = detector.model
    optimizers = make_optimizers(model, args)
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=False):
        optimizer.load_state_dict(saved)
    parallel = model
    if WORLD > 1:
        parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)

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
        batches = order.to(features.device).split(args.batch_size)
        for step, batch in enumerate(batches, epoch * steps):
            part = batch[RANK::WORLD]  # each process takes its share of the same global batch
            share = len(part) / len(batch)
            if share == 0:  # no image is left for this process: one of weight 0
                part = batch[:1]
            f = features[part].to(device).float()
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
            raise data.DataError(f"diverged in epoch {epoch + 1}: lower --lr")
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
    """K x 4 x C x C: L^-1 of S = L L^T; ||L^-1 (f' - r)||^2 = (f' - r)^T S^-1 (f' - r).

    S is the covariance (about zero) of f' - r over the class's training images: half of it over
    the positions in the same quarter of the image, half the mean of the quarters; shrunk, so that
    a class with fewer residuals than channels has an inverse, too. In float64.
    """
    whitening = torch.zeros(detector.whitening.shape, dtype=torch.float64)
    C = whitening.shape[-1]
    eye = torch.eye(C, dtype=torch.float64)
    for k in range(len(whitening)):
        cov = torch.zeros(4, C, C, dtype=torch.float64)
        chosen = labels == k if detector.knows_class else labels >= 0
        N = int(chosen.sum())
        for f, label in zip(features[chosen].split(32), labels[chosen].split(32), strict=True):
            f_, r, _, _ = detector.model(f.to(device).float(), label.to(device))
            for i in range(4):
                d = (f_ - r)[:, detector.quarter == i].flatten(0, 1)  # B*P_i x C
                d = d.cpu().double()
                cov[i] += d.T @ d / len(d) * len(f) / N
        for i in range(4):
            S = (cov[i] + cov.mean(0)) / 2
            L = torch.linalg.cholesky(S + 0.02 * S.diagonal().mean() * eye)
            whitening[k, i] = torch.linalg.solve_triangular(L, eye, upper=False)
    return whitening.float().to(device)


def fit(detector, state, args, samples, images, device):
    """Train on the samples of the detector's classes, uint8 images N x S x S x 3; then find what
    --distance and --predict need. Leaves checkpoints in args.out."""
    index = np.array([i for i, sample in enumerate(samples) if sample.cls in state["classes"]])
    held = data.hold_out([samples[i] for i in index], args.holdout)
    calibration = index[held] if held.any() else index
    index = index[~held]
    trained = [samples[i] for i in index]
    digest = data.digest(trained)
    if state["digest"] not in (None, digest):
        raise data.DataError(f"{args.out} was trained on other images; change --root or --out")
    state["digest"] = digest

    # f is extracted once, as nothing augments: N x P x C, in half precision, on the GPU if it fits.
    def extract(image, _):
        return [detector.backbone(image).half()]

    (features,) = infer(extract, images[index], None, device)
    labels = class_index(trained, state["classes"])
    if device.type == "cuda" and features.nbytes < 0.5 * torch.cuda.mem_get_info(device)[0]:
        features = features.to(device)
        labels = labels.to(device)
    if not args.uniad:
        mean, std = channel_statistics(features)
        detector.model.mean = mean.to(device)
        detector.model.std = std.to(device)
    train(detector, features, labels, state, args, device)
    detector.whitening = fit_distance(detector, features, labels, device)

    calibration = calibration[:: math.ceil(len(calibration) / 1000)]  # a thousand will do
    normal = [samples[i] for i in calibration]
    s, scores = detect(detector, images[calibration], normal, state["classes"], device)
    state["normal"] = metrics.calibrate(s, scores, normal)
    save(args, state, detector, [])


# ------------------------------------------------------------------------- evaluation, and the run


def evaluate(detector, state, args, samples, images, masks, device):
    """{row: metrics} of the test images of the model's classes, one row of the table at a time."""
    rows = {}
    for i, sample in enumerate(samples):
        if args.data == "cifar10" or sample.cls in state["classes"]:
            rows.setdefault(sample.row, []).append(i)

    detector.eval()
    results = {}
    for row, index in rows.items():
        mine = [samples[i] for i in index]
        pixels = images[index]
        s, scores = detect(detector, pixels, mine, state["classes"], device)
        results[row] = metrics.evaluate(mine, scores, s, masks[index])
        if args.save_maps:
            folder = Path(args.out, "maps", row)
            metrics.save_maps(folder, pixels, mine, scores, s, masks[index], state["normal"])
    return results


def run(args, states, device):
    """Train a model for all classes or one for each, or take those of --eval; then the table."""
    open_folder(args)
    if device.type == "cuda":
        log.info(f"{torch.cuda.get_device_name(device)}, matrix products in TF32")
    classes, train_samples, test = data.load(args.data, args.root, args.classes, args.normals)
    masks = data.decode_masks(test, args.size)
    test_images = data.decode(test, args.size)
    images = None
    if not args.eval:
        if args.data in ("folder", "toy"):
            ours = {key: vars(args)[key] for key in PRESETS[args.data]}
            log.info(f"not the paper's settings but ours for {args.data}: {ours}")
        images = data.decode(train_samples, args.size)
        data.warn_of_copies(train_samples, images, test, test_images)
        groups = [classes] if args.unified else [[cls] for cls in classes]
        started = {state["name"]: state for state in states}
        states = [new_state(args, group) for group in groups]
        states = [started.get(state["name"], state) for state in states]

    torch.manual_seed(0)  # an untrained backbone is the same for all seeds and processes
    backbone = Backbone(args, "none" if args.eval else args.weights)
    results = {}
    for state in states:
        torch.manual_seed(args.seed)
        detector = make_detector(args, state, backbone).to(device)
        if state["normal"] is None:
            fit(detector, state, args, train_samples, images, device)
        if RANK == 0:
            results |= evaluate(detector, state, args, test, test_images, masks, device)
    if args.eval and not results:
        raise data.DataError("no test images of the classes that trained (--root, --classes)")
    if RANK == 0:
        paper = published(args, results)
        log.info(metrics.table([results], paper))
        if args.out:
            metrics.save_result(args.out, vars(args), results, paper)
            log.info(f"written to {args.out}")


def new_state(args, classes):
    """What a checkpoint holds, here at the start of a training."""
    return {
        "name": "unified" if args.unified else classes[0].replace("/", "_"),
        "args": {key: vars(args)[key] for key in SETTINGS},
        "classes": classes,
        "digest": None,  # of the training images' names and sizes
        "epoch": 0,  # done
        "detector": None,  # its tensors after that epoch
        "optimizers": [],
        "normal": None,  # once trained: what normal images look like to the detector
    }


def save(args, state, detector, optimizers):
    if RANK == 0:
        state["detector"] = detector.state_dict()
        state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        with data.written(Path(args.out, f"{state['name']}.pt")) as temporary:
            torch.save(state, temporary)


def read_state(path):
    state = data.read_tensors(path)
    if state.get("args", {}).keys() != SETTINGS.keys():
        raise data.DataError(f"{path}: not a checkpoint of this version of mintad.py")
    return state


def make_detector(args, state, backbone):
    """The detector that the settings name, with the state's tensors if it has any."""
    tensors = state["detector"]
    text = None
    if args.query == "text" and tensors:
        text = tensors["model.text"]
    elif args.query == "text":
        with data.explain(f"--text {args.text}: expected a row of one length for each class"):
            rows = data.read_tensors(args.text)
            text = torch.stack([rows[cls].float().flatten() for cls in state["classes"]])  # K x T
    detector = Detector(args, state["classes"], backbone, text)
    if tensors:
        detector.load_state_dict(tensors)
    return detector


def open_folder(args):
    """The run's folder: new, or of a run that failed at its start, or to resume; log and args."""
    if RANK > 0 or not args.out:
        return
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    files = set(os.listdir(folder)) - {"log.txt", "args.json"}
    if files and not args.resume:
        raise data.DataError(f"--out {folder} holds files; name a new folder, or --resume that run")
    log.parent.addHandler(logging.FileHandler(folder / "log.txt", errors="backslashreplace"))
    if not args.resume:
        (folder / "args.json").write_text(json.dumps(vars(args), indent=2))


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
    """The paper's figures, {row: {metric: value}}, beside its model however trained; else {}."""
    table, columns = TABLES.get((args.data, args.unified), ("", {}))
    own = ["size", "backbone", "pool", "query", "prompt", "adapter", "cls_loss", "prior_loss"]
    own += ["literal", "distance"]
    if args.unified:
        own.append("classes")  # of fewer it is another model
    theirs = vars(get_parser().parse_args([]))
    if args.uniad:
        theirs["query"] = "layerwise"
    if any(vars(args)[key] != theirs[key] for key in own):
        return {}
    result = {}
    for line in table.split("\n")[1:-1]:
        row, *figures = line.split()
        result[row] = {}
        for key, column in columns.items():
            result[row][key] = float(figures[column + (not args.uniad)]) / 100
    if args.classes or len(rows) == 1:  # its mean is over all classes
        result.pop("mean", None)
    return result


# ----------------------------------------------------------- a trained model's use, and benchmark


def predict(args, state, detector, device):
    """Score, verdict, class and picture of each image of --predict; True if all could be read."""
    known = state["classes"]
    classes = known if args.classes == state["args"]["classes"] else args.classes
    label = None  # the classifier's
    if len(classes) == 1 and classes[0] in known:  # the user says which, or there is one
        label = known.index(classes[0])
    elif detector.model.needs_label or classes != known:
        raise data.DataError(f"--classes: expected one of {', '.join(known)}")
    paths = data.find_images(args.predict)
    open_folder(args)

    def judge(pixels):
        labels = None if label is None else torch.full((len(pixels),), label)
        s, scores, cls = infer(detector, pixels, labels, device)
        names = [known[k] for k in cls]
        if label is not None:
            names = [known[label]] * len(pixels)
        elif not detector.knows_class:
            names = [""] * len(pixels)
        return s.numpy(), scores.numpy(), names

    batch_size = 4 if device.type == "cpu" else 32
    options = args.quantile, args.out, batch_size, args.size
    return metrics.predict(paths, judge, state["normal"], *options)


def export(args, state, detector):
    """Write the network as a torch.export program, which loads without this project."""
    inputs = [torch.rand(2, 3, args.size, args.size)]
    if detector.model.needs_label:
        inputs.append(torch.zeros(2, dtype=torch.long))
    shapes = tuple({0: torch.export.Dim("batch", min=1)} for _ in inputs)
    if Path(args.export).exists():
        raise data.DataError(f"--export {args.export}: exists; name a new file")
    with torch.no_grad(), data.written(args.export) as temporary:
        program = torch.export.export(detector, tuple(inputs), dynamic_shapes=shapes)
        torch.export.save(program, temporary)
    log.info(f"{args.export}: RGB B x 3 x {args.size} x {args.size} in 0..1 -> map, score, class")
    log.info(f"classes from 0 on: {', '.join(state['classes'])}")
    metrics.thresholds(state["normal"], args.quantile)


def bench(args, device):
    """Table 6: parameters, multiply-adds, seconds per batch; then the whole path of --predict."""
    state = new_state(args, [str(k) for k in range(15)])
    detector = make_detector(args, state, Backbone(args, "none")).to(device).eval()
    detector.requires_grad_(False)
    log.info(f"{args.backbone}, {args.size} px, {device}, {torch.get_num_threads()} threads")
    for name, part in detector.named_children():
        log.info(f"parameters, {name}: {sum(p.numel() for p in part.parameters()) / 1e6:.2f} M")
    image = torch.rand(64, 3, args.size, args.size, device=device)
    label = torch.arange(64, device=device) % 15
    f = detector.backbone(image[:1])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        detector.model(f, label[:1])
    log.info(f"multiply-adds, model: {counter.get_total_flops() / 2e9:.2f} G")
    for B in (1, 8, 16, 32, 64):
        detector(image[:B], label[:B])  # a first time for its memory and kernels
        start = time.time()
        s, score, _ = (x.cpu() for x in detector(image[:B], label[:B]))
        log.info(f"batch {B}: {time.time() - start:.4f} s")
    log.info("the paper: 9.44 M, 1.13 G; .026 .035 .057 .104 .194 s (UniAD 6.27 M, 0.92 G)")

    samples = [data.Sample("", 0, "0", "0")] * 64
    state["normal"] = metrics.calibrate(s.numpy(), score.numpy(), samples)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(64):
            pixels = np.random.randint(0, 256, (256, 256, 3), np.uint8)
            Image.fromarray(pixels).resize((1024, 1024)).save(f"{folder}/{i}.jpg")
        args.predict = [folder]
        args.out = f"{folder}/out"
        args.classes = ["0"]
        start = time.time()
        predict(args, state, detector, device)
        log.info(f"--predict: {64 / (time.time() - start):.1f} images/s, from file to picture")


# -------------------------------------------------------------------------------------- arguments


def get_parser():
    """A flag for each of SETTINGS and ACTIONS, and --no-FLAG for what is on or off."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]; --help lists them",
        description="MINT-AD (arXiv 2403.14213): train, evaluate, predict.",
        epilog=f"Presets: {PRESETS}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for key, (default, text) in (SETTINGS | ACTIONS).items():
        options = {"default": default, "help": text}
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, list):
            options |= {"default": default[0], "choices": default}
        elif default is None:
            options["type"] = os.path.expanduser
        else:
            options["type"] = type(default)
        if key in ("classes", "predict"):
            options["nargs"] = "+"
        parser.add_argument(f"--{key.replace('_', '-')}", **options)
    return parser


def parse_args(argv=None):
    """The arguments, and the states of the run of --eval or --resume. What the user left out comes
    from the set's preset, or from that run, which what is typed may not contradict."""
    parser = get_parser()
    args = parser.parse_args(argv)
    states = []
    saved = {}
    if args.uniad:
        parser.set_defaults(query="layerwise")
    if args.resume and (args.eval or not args.out):
        parser.error("--resume goes on with the run in --out RUN, without --eval")
    if args.eval or args.resume:
        source = Path(args.eval or args.out)
        paths = sorted(source.glob("[!.]*.pt"))
        if args.resume and not paths:
            parser.error(f"--resume: no checkpoint in {source}; start it again without --resume")
        states = [read_state(path) for path in paths or [source]]
        saved = states[0]["args"]
    elif not args.bench:
        parser.set_defaults(**PRESETS.get(args.data, {}))
    parser.set_defaults(**saved)

    args = parser.parse_args(argv)  # what the user typed wins
    if not args.out and not args.eval:
        args.out = f"runs/mintad-{args.data}-{'unified' if args.unified else 'separate'}"
    free = ["root"]
    if args.eval:
        free += ["classes"] if args.predict else ["classes", "distance"]
    for key, value in saved.items():
        if key not in free and getattr(args, key) != value:
            flag = f"--{key.replace('_', '-')} {getattr(args, key)}"
            parser.error(f"{flag}: the run has {value}")
    check(parser, args, states)
    if args.prompt != "feature":
        args.cls_loss = False  # no classifier, no Eq. 1
    if args.query == "mlp":
        args.prior_loss = False  # Sec. 0.B.6
    return args, states


def check(parser, args, states):
    """Ends with one line where a value is out of range or flags do not go together."""
    for key, value in vars(args).items():
        least = 1 if key in ("epochs", "batch_size", "size") else 0
        most = 1 if key in ("holdout", "quantile") else 2**31
        if isinstance(value, int | float) and not least <= value <= most:
            parser.error(f"--{key.replace('_', '-')} {value}: expected {least} to {most}")
    if args.data == "cifar10" and not args.unified and not args.bench:
        parser.error("--data cifar10 --no-unified: its five normal classes train one model")
    if args.eval and args.bench:
        parser.error("--eval goes without --bench")
    if args.eval and any(state["normal"] is None for state in states):
        parser.error(f"--eval {args.eval}: its training stopped early; finish it with --resume")
    if (args.predict or args.export) and len(states) != 1:
        parser.error("--predict and --export take one model, --eval RUN/FILE.pt")
    if (args.predict or args.save_maps) and not args.out:
        parser.error("--predict and --save-maps write into a new folder, --out DIR")

    needs_label = args.prompt == "label" or args.query in ("pool", "token", "text")
    own = [args.prompt == "feature", args.adapter, args.cls_loss, args.prior_loss, not args.literal]
    if args.uniad != (args.query in ("layerwise", "pool", "token", "text")):
        parser.error(f"--query {args.query}: layerwise, pool, token and text are --uniad's")
    if args.uniad and not all(own):
        parser.error("--uniad is whole: it has no prompt, adapter or loss to choose")
    if (args.query == "text") != bool(args.text):
        parser.error("--query text and --text FILE go together")
    if args.query == "learned" and not args.prior_loss and args.prompt != "feature":
        parser.error("--query learned --no-prior-loss: nothing uses the token of --prompt")
    if args.data == "cifar10" and needs_label:
        parser.error("--data cifar10: this variant needs the class, and an anomaly has none")


def main(argv=None):
    """Exit status 0; 1: an image was not judged; 2: a line says why."""
    level = logging.ERROR if RANK else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout, force=True)
    try:
        args, states = parse_args(argv)
        backend = "gloo"
        with data.explain(f"--device {args.device}"):
            device = torch.device(args.device)
            if device.type == "cuda" and device.index is None:  # a GPU for each process
                backend = "nccl"
                device = torch.device("cuda", LOCAL_RANK)
            torch.zeros(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")  # TF32
        if LAUNCHED:
            dist.init_process_group(backend, timeout=timedelta(hours=1))
        if args.bench:
            bench(args, device)
        elif args.predict or args.export:
            detector = make_detector(args, states[0], Backbone(args, "none")).eval()
            if args.export:
                export(args, states[0], detector)
            if args.predict and not predict(args, states[0], detector.to(device), device):
                sys.exit(1)
        else:
            run(args, states, device)
        if LAUNCHED:
            dist.destroy_process_group()
    except (data.DataError, OSError) as error:
        if LOCAL_RANK == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted; --resume goes on from the last checkpoint, one a minute")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a file name need not be UTF-8
    main()
