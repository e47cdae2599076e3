"""MINT-AD (Toward Multi-class Anomaly Detection: Exploring Class-aware Unified Model against Inter-class
Interference, arXiv 2403.14213): one model for all classes, its query an implicit neural representation.

    python mintad.py                                                    # built-in toy set, no download
    python mintad.py --data mvtec --root data/mvtec --unified           # the paper's main setting (Table 1)
    torchrun --nproc_per_node=4 mintad.py --data mvtec --unified        # on four GPUs, the same global batch
    python mintad.py --data mvtec                                       # one model per class ("separate")
    python mintad.py --data visa --unified --uniad                      # the UniAD baseline
    python mintad.py --eval runs/mintad-mvtec-unified                   # a trained model's table again
    python mintad.py --eval runs/mintad-mvtec-unified --predict photos  # score, verdict, class and picture

    f   : B x P x C       features of a frozen backbone, stages 1-4 resized to stage 4 and concatenated
    f'  : B x P x C       adapter(f), one linear layer
    z   : B x 32          class token of f', the layer before the classification head
    q   : B x P x D       INR(positions, z), the transformer decoder's query; q -> mu, log sigma of f'
    r   : B x P x C       f' reconstructed by the transformer; the anomaly map is ||f' - r||

    B batch, C channels, H x W = P positions, D hidden width, K classes, L decoder layers, S image side,
    Z = 32 width of z, E = 3 width of a position

Details of the implementation and where each comes from:

 1. Backbone: levels of reduction 2, 4, 8, 16 (CIFAR-10: 32 too), resized bilinearly (align_corners) to 16.
 2. Features are standardised per channel with the training features' mean and deviation: not in the paper,
    but else the few channels of large scale own every loss. `--uniad` uses raw features, as its authors.
 3. Eq. 4 and 5 are likelihoods of the original features, where Eq. 3 starts; nothing is detached (objective;
    README, "What keeps MINT-AD from collapsing"). `--literal` is the objective as printed, without a floor.
 4. INR: Table 13 and a linear output layer, 602,368 weights: Table 9's 0.602 M. Its start is ours.
 5. Transformer: UniAD's layers, 4 + 4 (Table 15; the text says 6), post-norm, one q for all decoder layers,
    learned row and column positions added to queries and keys, jitter on the input tokens.
 6. AdamW, lr x 0.1 after 80 % of the steps, gradient norm clipped at 0.1 (UniAD), batch 32. An --lr above
    1e-4 is warmed up to. --optimizer muon is ours.
 7. Each epoch sets the random state from (seed, epoch, process): a checkpoint alone continues bit for bit.
"""
import argparse
import contextlib
import ctypes
import math
import os
import platform
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler
from torch.utils.flop_counter import FlopCounterMode

import data
import metrics
from data import LOCAL_RANK, RANK, WORLD, log, progress

# ---------------------------------------------------------------- settings
PAPER = dict(data="toy", root=None, unified=False, classes=None, normals="01234", size=224, crop=None,
             backbone="tf_efficientnet_b4.aa_in1k", weights=None, seed=[1], epochs=1000, batch_size=32,
             lr=1e-4, weight_decay=1e-4, optimizer="adamw", amp=False, holdout=0.0, query="inr",
             prompt="feature", adapter=True, cls_loss=True, prior_loss=True, literal=False, uniad=False,
             text=None)
TOY = dict(unified=True, backbone="tf_efficientnet_b0", weights="none", size=128, epochs=10, batch_size=8,
           lr=1e-3, holdout=0.1)
SETTINGS = [key for key in PAPER if key not in ("root", "seed")]  # a checkpoint keeps them
PROGRAM = Path(__file__).stem
LAMBDA_CE, LAMBDA_PRIOR = 1.0, 0.1  # Eq. 6
JITTER, DROPOUT = 20.0, 0.1  # UniAD's
REDUCTIONS = (2, 4, 8, 16)  # backbone levels

# ---------------------------------------------------------------- layers
class Dropout(nn.Dropout):
    """nn.Dropout, on a CPU from 16 random bits a value: with Attention below 1.7 times as fast to train."""
    def forward(self, x):
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        seed = torch.randint(2**63 - 1, ()).item()
        bits = np.random.SFC64(seed).random_raw(-(-x.numel() // 4)).view(np.int16)
        keep = torch.from_numpy(bits)[:x.numel()].view(x.shape).ge_(round(self.p * 2**16) - 2**15)  # 0 or 1
        return x * keep.to(x.dtype).mul_(1 / (1 - self.p))

class Attention(nn.MultiheadAttention):
    """torch's: query, key, value B x P x D -> B x P x D. Trained on a CPU, written out for Dropout above."""
    def __init__(self, D, heads):
        super().__init__(D, heads, DROPOUT, batch_first=True)
        self.drop = Dropout(DROPOUT)

    def forward(self, query, key, value, mask=None):  # mask: P x P, True = hidden
        if not self.training or query.device.type != "cpu":
            return super().forward(query, key, value, attn_mask=mask, need_weights=False)[0]
        projections = zip((query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3))
        q, k, v = (F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                   for x, weight, bias in projections)  # B x heads x P x D/heads
        a = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # B x heads x P x P
        a = a if mask is None else a.masked_fill(mask, -math.inf)
        a = self.drop(a.softmax(-1)).to(v.dtype) @ v
        return self.out_proj(a.transpose(1, 2).flatten(2))  # B x P x heads x D/heads -> B x P x D

class EncoderLayer(nn.Module):
    """Post-norm self-attention; positions go to queries and keys, never to values (UniAD, Table 15)."""
    def __init__(self, D, heads, hidden):
        super().__init__()
        self.self_attn = Attention(D, heads)
        self.linear1, self.linear2 = nn.Linear(D, hidden), nn.Linear(hidden, D)
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.dropout = Dropout(DROPOUT)

    def forward(self, x, pos, mask=None):  # B x P x D
        x_pos = x + pos
        x = self.norm1(x + self.dropout(self.self_attn(x_pos, x_pos, x, mask)))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))

class DecoderLayer(nn.Module):
    """UniAD's decoder layer: q attends to the encoder memory, the result to the previous layer's output."""
    def __init__(self, D, heads, hidden):
        super().__init__()
        self.self_attn, self.multihead_attn = Attention(D, heads), Attention(D, heads)
        self.linear1, self.linear2 = nn.Linear(D, hidden), nn.Linear(hidden, D)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(D), nn.LayerNorm(D), nn.LayerNorm(D)
        self.dropout = Dropout(DROPOUT)

    def forward(self, q, memory, previous, pos, mask=None):  # each B x P x D
        x = self.norm1(q + self.dropout(self.self_attn(q + pos, memory + pos, memory, mask)))
        x = self.norm2(x + self.dropout(self.multihead_attn(x + pos, previous + pos, previous, mask)))
        return self.norm3(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))

class Transformer(nn.Module):
    """Tokens B x P x C reconstructed from themselves and the decoder layers' queries (Sec. 3.2, Table 15)."""
    def __init__(self, C, H, W, D=256, heads=8, hidden=1024, layers=4):
        super().__init__()
        self.input_proj, self.output_proj = nn.Linear(C, D), nn.Linear(D, C)
        self.row_embed, self.col_embed = nn.Embedding(H, D // 2), nn.Embedding(W, D // 2)
        self.encoder = nn.ModuleList(EncoderLayer(D, heads, hidden) for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(D, heads, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(D)
        for embed in (self.row_embed, self.col_embed):
            nn.init.uniform_(embed.weight)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, f, queries, mask=None, token=None):
        """f: B x P x C; queries: L of B x P x D; mask: P x P, True = hidden; token: B x 1 x D or None.
        The token goes along and is cut off: with it the queries and the mask have P + 1 positions."""
        if self.training:  # UniAD: noise in proportion to each token's length
            f = f + torch.randn_like(f) * (f.norm(dim=-1, keepdim=True) * JITTER / f.shape[-1])
        x = self.input_proj(f)  # B x P x D
        row, col = self.row_embed.weight.unsqueeze(1), self.col_embed.weight  # H x 1 x D/2, W x D/2
        pos = torch.cat(torch.broadcast_tensors(col, row), -1).flatten(0, 1)  # H x W x D -> P x D
        if token is not None:
            x, pos = torch.cat([x, token], 1), F.pad(pos, (0, 0, 0, 1))  # B x (P+1) x D, (P+1) x D
        for layer in self.encoder:
            x = layer(x, pos, mask)
        memory = x
        for layer, q in zip(self.decoder, queries, strict=True):
            x = layer(q, memory, x, pos, mask)
        return self.output_proj(self.norm(x)[:, :f.shape[1]])  # B x P x C

def neighbour_mask(H, W, window=7):
    """UniAD's neighbour masked attention: P x P, True where a key is in the query's window and so hidden."""
    y, x = torch.arange(H * W) // W, torch.arange(H * W) % W
    mask = ((y[:, None] - y).abs() <= window // 2) & ((x[:, None] - x).abs() <= window // 2)
    if mask.all(1).any():
        raise data.DataError(f"--size: UniAD's mask of {window} x {window} hides all of {H} x {W}: too small")
    return mask

class FeaturePrompt(nn.Module):
    """The classifier's token before its head (Sec. 3.3, Table 12); logits B x K are the argument of Eq. 1."""
    def __init__(self, C, P, K, Z=32, D=256):
        super().__init__()
        self.class_encoder = nn.Sequential(  # B x P x C -> B x P x Z
            nn.Linear(C, D), nn.ReLU(), nn.Linear(D, D), nn.ReLU(), nn.Linear(D, Z), nn.Softmax(-1))
        self.channel_encoder = nn.Sequential(  # B x P*Z -> B x Z
            nn.Linear(P * Z, D), nn.LeakyReLU(), nn.Linear(D, D), nn.LeakyReLU(),
            nn.Linear(D, Z), nn.Softmax(-1))
        self.head = nn.Linear(Z, K)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):  # torch's default: both softmaxes so flat that z hardly learns
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)
        # A softmax's norm is at most 1, whatever its width: P inputs count, not Kaiming's P * 32. With a
        # small head z turns one-hot, often alike for two classes, before the logits can tell them apart.
        nn.init.normal_(self.channel_encoder[0].weight, std=math.sqrt(2 / P))
        nn.init.normal_(self.head.weight, std=5.0)

    def forward(self, f, label=None):
        z = self.channel_encoder(self.class_encoder(f).flatten(1))  # B x P x 32 -> B x P*32 -> B x 32
        return z, self.head(z) if self.head else None

class INR(nn.Module):
    """Dual-path implicit neural representation (Eq. 8, 9, Table 13): p (P x E), z (B x Z) -> B x P x D."""
    def __init__(self, Z=32, E=3, D=256, layers=5, omega=30.0):
        super().__init__()
        self.modulation = nn.ModuleList(nn.Linear(D if i else Z + E, D) for i in range(layers))
        self.synthesis = nn.ModuleList(nn.Linear(D if i else E, D) for i in range(layers))
        self.output = nn.Linear(D, D)
        # SIREN's initialisation (its Sec. 3.2), omega_0 inside the weights. The last, linear layer keeps the
        # hidden layers' bound, so that q starts at the scale of a learned query.
        for i, layer in enumerate([*self.synthesis, self.output]):
            bound = math.sqrt(6 / D) if i else omega / E
            nn.init.uniform_(layer.weight, -bound, bound)
        # Kaiming's (torch's default starts q flat); the first layer's input is p and a softmax, |z| <= 1.
        for i, layer in enumerate(self.modulation):
            nn.init.normal_(layer.weight, std=math.sqrt(2 / (D if i else E + 1)))
            nn.init.zeros_(layer.bias)

    def forward(self, p, z):
        B, P = z.shape[0], p.shape[0]
        h = torch.cat([z.unsqueeze(1).expand(B, P, -1), p.expand(B, P, -1)], -1)  # B x P x (Z + E)
        with torch.autocast(p.device.type, enabled=False):  # omega is in here: bfloat16 would blur the sine
            x = torch.sin(self.synthesis[0](p))  # P x D
        h = F.relu(self.modulation[0](h))
        x = x * h  # B x P x D
        for modulation, synthesis in zip(self.modulation[1:], self.synthesis[1:]):
            h = F.relu(modulation(h))  # Eq. 9
            x = torch.sin(synthesis(x)) * h  # Eq. 8
        return self.output(x)

# ---------------------------------------------------------------- model
class Backbone(nn.Module):
    """Frozen multi-scale features (Sec. 3.2): images B x 3 x S x S in 0..1 -> f, B x P x C; has H, W, C.
    weights and what can go wrong: data.load_weights. DataError: a net without these levels."""
    def __init__(self, name, size, weights=None, levels=REDUCTIONS):
        super().__init__()
        with data.explain(f"--backbone {name}: not a CNN with features at strides 2, 4, 8, 16"):
            info = timm.create_model(name, features_only=True).feature_info
            index = [i for i, reduction in enumerate(info.reduction()) if reduction in levels]
            self.net = timm.create_model(name, features_only=True, out_indices=index)
            self.net.eval().requires_grad_(False)
            info, shapes = self.net.feature_info, [x.shape for x in self.net(torch.zeros(1, 3, size, size))]
            if 16 not in info.reduction() or [shape[1] for shape in shapes] != info.channels():
                raise ValueError(f"its features are {list(map(tuple, shapes))}")
        if hasattr(self.net, "blocks"):  # timm's EfficientNets would compute stages beyond the last level too
            del self.net.blocks[int(info.module_name()[-1].split(".")[1]) + 1:]
        data.load_weights(self.net, name, weights)
        config = self.net.pretrained_cfg
        self.register_buffer("image_mean", torch.tensor(config["mean"]).view(3, 1, 1))
        self.register_buffer("image_std", torch.tensor(config["std"]).view(3, 1, 1))
        self.H, self.W = shapes[info.reduction().index(16)][2:]  # stage 4, on CIFAR-10 too
        self.C = sum(info.channels())

    def train(self, mode=True):
        return super().train(False)  # frozen: BatchNorm never leaves eval mode

    def forward(self, image):
        levels = self.net((image - self.image_mean) / self.image_std)
        f = [F.interpolate(x, (self.H, self.W), mode="bilinear", align_corners=True) for x in levels]
        return torch.cat(f, 1).flatten(2).transpose(1, 2)  # B x C x H x W -> B x P x C

class MINTAD(nn.Module):
    """The model of Figure 3 and its variants (Tables 4, 5, 9).
    C, H, W: size of the features f; K: number of classes. query: inr | mlp | learned. prompt: feature, or a
    projection of the label (needed at test time too) or of the image's mean feature: label | image."""
    def __init__(self, C, H, W, K, query="inr", prompt="feature", adapter=True, cls_loss=True,
                 prior_loss=True, D=256, layers=4):
        super().__init__()
        self.H, self.W, self.K, self.query_type, self.prompt_type = H, W, K, query, prompt
        self.needs_label, P, Z = prompt == "label", H * W, 32
        self.transformer = Transformer(C, H, W, D, layers=layers)
        self.register_buffer("mean", torch.zeros(C))
        self.register_buffer("std", torch.ones(C))
        self.adapter = self.prompt = self.inr = self.query = self.distribution = None
        if adapter:  # f' = W f + b (Sec. 3.2), W from the identity
            self.adapter = nn.utils.skip_init(nn.Linear, C, C)
            nn.init.eye_(self.adapter.weight)
            nn.init.zeros_(self.adapter.bias)
        if prompt != "feature":
            self.prompt = nn.Linear(K if prompt == "label" else C, Z)
        elif query != "learned" or cls_loss or prior_loss:  # or nothing uses z
            self.prompt = FeaturePrompt(C, P, K)
            if not cls_loss:
                self.prompt.head = None
        if query == "inr" or prior_loss:
            self.positions = nn.Parameter(torch.randn(P, 3))  # "a learnable embedding", P x E
            self.inr = INR(Z, 3, D)
        if query == "mlp":  # Sec. 0.B.6; hidden width 256: the paper's choice (383.5 M) is not given
            self.query = nn.Sequential(nn.Linear(Z, D), nn.ReLU(), nn.Linear(D, D), nn.ReLU(),
                                       nn.Linear(D, P * D), nn.Unflatten(1, (P, D)))
        elif query == "learned":  # one for all images
            self.query = nn.Parameter(torch.randn(P, D))
        if prior_loss:
            self.distribution = nn.Sequential(  # Table 14
                nn.Linear(D, D), nn.LeakyReLU(), nn.Linear(D, D), nn.LeakyReLU(), nn.Linear(D, 2 * C))

    def forward(self, f, label=None):
        """f: B x P x C raw, label: B -> f', r; logits: B x K or None; (mu, log sigma): B x P x C, or None."""
        f = (f - self.mean) / self.std
        f_ = self.adapter(f).float() if self.adapter else f
        z, logits = self.class_token(f_, label) if self.prompt else (None, None)
        q = q_inr = self.inr(self.positions, z) if self.inr else None
        if self.query_type == "mlp":
            q = self.query(z)
        elif self.query_type == "learned":
            q = self.query.expand(len(f), -1, -1)  # B x P x D
        r = self.transformer(f_, [q] * len(self.transformer.decoder)).float()
        if not self.distribution:
            return f_, r, logits, None
        mu, log_sigma = self.distribution(q_inr).float().chunk(2, -1)
        return f_, r, logits, (mu, log_sigma.clamp(-5, 5))

    def class_token(self, f_, label):  # z: B x 32; logits: B x K or None
        if self.prompt_type == "feature":
            return self.prompt(f_)
        one = F.one_hot(label, self.K).to(f_.dtype) if self.prompt_type == "label" else f_.mean(1)
        return self.prompt(one), None

class UniAD(nn.Module):
    """The baseline, as its authors' code: raw f, neighbour-masked attention, a query per decoder layer.
    query: layerwise (its own), or Table 4's variants: pool, a query per class; token, the class as a token
    more; text, a projection of the class's row of text, K x E. The arguments else and the call as MINTAD's.
    """
    adapter = None

    def __init__(self, C, H, W, K, query="layerwise", text=None, D=256, layers=4):
        super().__init__()
        self.H, self.W, self.K, self.query_type, self.needs_label = H, W, K, query, query != "layerwise"
        self.transformer = Transformer(C, H, W, D, layers=layers)
        self.token, mask = None, neighbour_mask(H, W)
        if query == "token":
            self.token, mask = nn.Linear(K, D), F.pad(mask, (0, 1, 0, 1))  # every position sees the token
        self.register_buffer("mask", mask, persistent=False)
        if query == "text":
            self.register_buffer("text", text)
            self.query = nn.Linear(text.shape[1], D)
        else:
            self.query = nn.Parameter(torch.randn(K if query == "pool" else 1, layers, len(mask), D))

    def forward(self, f, label=None):
        B, L, token = len(f), len(self.transformer.decoder), None
        if self.query_type == "text":
            q = self.query(self.text[label])[:, None, None].expand(B, L, f.shape[1], -1)
        elif self.query_type == "pool":
            q = self.query[label]
        else:
            q = self.query.expand(B, -1, -1, -1)  # B x L x P x D
        if self.token:
            token = self.token(F.one_hot(label, self.K).to(f.dtype)).unsqueeze(1)  # B x 1 x D
        return f, self.transformer(f, q.unbind(1), self.mask, token), None, None

def build_backbone(settings, weights):
    levels = (*REDUCTIONS, 32) if settings["data"] == "cifar10" else REDUCTIONS  # C = 720 with b4, as UniAD
    return Backbone(settings["backbone"], settings["crop"] or settings["size"], weights, levels)

def build(state, backbone=None):
    """The model that the settings name, the backbone a part of it, with the state's tensors if it has any."""
    s, classes, tensors = state["settings"], state["classes"], state["model"]
    backbone = backbone or build_backbone(s, "none")
    size = backbone.C, backbone.H, backbone.W, len(classes)
    if s["uniad"]:
        text = s["text"] and (tensors["text"] if tensors else read_text(s["text"], classes))
        model = UniAD(*size, s["query"], text)
    else:
        model = MINTAD(*size, s["query"], s["prompt"], s["adapter"], s["cls_loss"], s["prior_loss"])
    model.backbone = backbone
    if tensors:
        with data.explain(f"{state['name']}.pt does not fit its settings"):
            model.load_state_dict(tensors)
    return model

def read_text(path, classes):
    """K x E text embeddings from a safetensors file with one row (a tensor of E) per class name."""
    with data.explain(f"--text {path}: expected a row for each of {', '.join(classes)}, all of one length"):
        rows = data.read_tensors(path)
        return torch.stack([rows[cls].float().flatten() for cls in classes])

# ---------------------------------------------------------------- losses
def objective(model, outputs, label, literal=False):
    """(Eq. 6, {name: what is logged}) of a batch; outputs: what model(f, label) returns.
    Eq. 3 starts from the likelihood of the original features; for f' = W f + b it is, per position,
        log p(f) = log N(f'; mu, sigma) + log |det W|          (the paper prints no determinant).
    Eq. 5 is a Gaussian's too, of fixed s = 1/2: -log p(f) = |f' - r|^2 / 2s^2 - log |det W| + const. Times
    2s^2 / C that is (Eq. 5) - (2s^2 / C) log |det W|. Without determinants (literal) f' shrinks."""
    f_, r, logits, gaussian = outputs
    logged = {"mse": F.mse_loss(r, f_)}  # Eq. 5
    det = ce = prior = 0
    if model.adapter and not literal:
        det = logged["det"] = -torch.linalg.slogdet(model.adapter.weight)[1] / f_.shape[-1]
    if logits is not None:
        ce = logged["ce"] = F.cross_entropy(logits.float(), label)  # Eq. 1
        logged["accuracy"] = (logits.argmax(1) == label).float().mean()
    if gaussian:
        mu, log_sigma = gaussian
        nll = 0.5 * ((f_ - mu) / log_sigma.exp()) ** 2 + log_sigma + 0.5 * math.log(2 * math.pi)
        prior = logged["prior"] = nll.mean() + det  # Eq. 2 and 4, of the original features by Eq. 3
    mse = logged["mse"] + 2 * 0.5**2 * det  # the likelihood of the original features, s = 1/2
    return mse + LAMBDA_CE * ce + LAMBDA_PRIOR * prior, logged | {"std f'": f_.detach().std()}  # Eq. 6

# ---------------------------------------------------------------- anomaly map and score
def anomaly_map(f_, r, H, W):
    """Eq. 7: s(h, w) = ||f' - r||_2, B x H x W, from B x P x C."""
    return (f_ - r).norm(dim=-1).unflatten(1, (H, W))

def upsample(s, size):
    """B x H x W -> B x size x size, bilinear with aligned corners (Sec. 3.6)."""
    return F.interpolate(s.unsqueeze(1), (size, size), mode="bilinear", align_corners=True).squeeze(1)

def image_score(maps, kind):
    """B x S x S -> B: "max" (Sec. 3.6), "mean" (CIFAR-10) or "pool", max of 16 x 16 averages (UniAD)."""
    if kind == "pool":
        maps = F.avg_pool2d(maps.unsqueeze(1), 16, stride=1).squeeze(1)
    return maps.mean((1, 2)) if kind == "mean" else maps.amax((1, 2))

# ---------------------------------------------------------------- train
def extract(backbone, images, device):
    """f of the images, N x P x C in half precision, on the GPU if it fits; once, as nothing augments."""
    features = torch.from_numpy(infer(lambda image: [backbone(image).half()], images, device)[0])
    fits = device.type == "cuda" and features.nbytes < 0.5 * torch.cuda.mem_get_info(device)[0]
    return features.to(device) if fits else features

def channel_statistics(features):
    """Mean and standard deviation of each channel of features N x P x C, C each.
    The deviation has a floor of 1 % of the mean one: an untrained backbone has channels that never move."""
    parts = (f.double().flatten(0, 1) for f in features.split(64))
    mean, square = sum(torch.stack([f.sum(0), f.square().sum(0)]) for f in parts) / features[:, :, 0].numel()
    std = (square - mean**2).clamp_min(0).sqrt()
    if not torch.isfinite(std).all() or std.mean() == 0:
        raise data.DataError("the backbone's features are constant or overflow half precision: --weights?")
    return mean.float(), std.clamp_min(0.01 * std.mean()).float()

def optimizers(model, s, device):
    """[(optimizer, factor of the learning rate)]: the paper's AdamW, or Muon for the transformer's matrices.
    Muon (momentum 0.95, update scaled to AdamW's) at 4 times AdamW's rate: of 2, 4 and 10 that which left
    the least of the training images unexplained after 400 steps.
    The query, key and value matrix is taken as one: in three parts it learned the same (README, "Results").
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    muon = [name for name, p in named.items() if s.optimizer == "muon" and p.ndim == 2
            and name.startswith("transformer.") and "_embed" not in name]
    adamw = torch.optim.AdamW([p for name, p in named.items() if name not in muon],
                              weight_decay=s.weight_decay, fused=device.type in ("cpu", "cuda"))
    if not muon:
        return [(adamw, 1)]
    return [(adamw, 1), (torch.optim.Muon([named[name] for name in muon], weight_decay=s.weight_decay,
                                          momentum=0.95, adjust_lr_fn="match_rms_adamw"), 4)]

def learning_rate(lr, step, steps):
    """The rate of a step: lr x 0.1 after 80 % (Sec. 4.1: 800 of 1000 epochs); above the paper's it warms up.
    5e-4 at once blinds the attention: in 200 steps all positions of an image get the same, and for good."""
    if step >= 0.8 * steps:
        return 0.1 * lr
    return min(lr, PAPER["lr"] * (1 + step / 100))

def train(model, state, samples, images, index, folder, device):
    """Train the model in place on images[index]; a checkpoint after each epoch, from where state stops."""
    s, name = argparse.Namespace(**state["settings"]), state["name"]
    features = extract(model.backbone, images[index], device)
    labels = labels_of(samples, state["classes"])[index]
    if not s.uniad and state["epoch"] == 0:
        model.mean, model.std = (x.to(device) for x in channel_statistics(features))
    optimizer_list = optimizers(model, s, device)
    for (optimizer, _), saved in zip(optimizer_list, state["optimizer"] or ()):
        optimizer.load_state_dict(saved)
    parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if WORLD > 1 else model
    steps = -(-len(index) // s.batch_size)
    for epoch in range(state["epoch"], s.epochs):
        start, sums = time.time(), 0
        seed = 1_000_003 * state["seed"] + epoch
        order = torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed * 4099 + RANK)  # dropout and jitter
        model.train()
        batches = progress(order.split(s.batch_size), f"{name} epoch {epoch + 1}")
        for step, batch in enumerate(batches, epoch * steps):
            part = batch[RANK::WORLD]  # each process takes its share of the same global batch
            share = len(part) / len(batch)
            part = part if len(part) else batch[:1]  # no image is left for it: it computes one of weight 0
            f, label = features[part].to(device).float(), labels[part].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=s.amp):
                outputs = parallel(f, label)  # the model's, with the gradients' sum over the processes
            loss, logged = objective(model, outputs, label, s.literal)
            for optimizer, factor in optimizer_list:
                for group in optimizer.param_groups:
                    group["lr"] = factor * learning_rate(s.lr, step, s.epochs * steps)
                optimizer.zero_grad()
            (WORLD * share * loss).backward()  # DistributedDataParallel takes the mean over the processes
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            for optimizer, _ in optimizer_list:
                optimizer.step()
            values = torch.stack([value.detach().to(device) for value in logged.values()])
            sums = sums + values * (len(batch) * share / len(index))
        sums = total(sums).tolist()
        if not all(map(math.isfinite, sums)):
            raise data.DataError(f"diverged in epoch {epoch + 1}; the last checkpoint is good. Lower --lr")
        values = ", ".join(f"{key} {value:.4f}" for key, value in zip(logged, sums))
        log(f"{name} epoch {epoch + 1}/{s.epochs}: {values}, {time.time() - start:.1f} s")
        saved = [optimizer.state_dict() for optimizer, _ in optimizer_list]
        state.update(epoch=epoch + 1, model=model.state_dict(), optimizer=saved)
        save(folder, state)

def labels_of(samples, classes):
    """Index of each sample's class in classes, N; -1: not among them."""
    return torch.tensor([classes.index(s.cls) if s.cls in classes else -1 for s in samples], dtype=torch.long)

# ---------------------------------------------------------------- evaluate
class Inference(nn.Module):
    """Image B x 3 x S x S in 0..1 (and label B) -> map B x S x S, score B, class B (-1: no classifier)."""
    def __init__(self, model, args):
        super().__init__()
        self.model, self.size = model.eval(), args.crop or args.size
        self.kind = "mean" if args.data == "cifar10" else "pool" if args.uniad else "max"

    def forward(self, image, label=None):
        f_, r, logits, _ = self.model(self.model.backbone(image), label)
        maps = upsample(anomaly_map(f_, r, self.model.H, self.model.W), self.size)
        score = image_score(maps, self.kind)
        return maps, score, torch.full_like(score, -1) if logits is None else logits.argmax(1).to(score.dtype)

def judge(model, args, classes, samples, images, device):
    """Maps N x S x S, scores N, predicted classes N of the images."""
    return infer(Inference(model, args), images, device, labels_of(samples, classes))

def evaluate(model, state, test, images, masks, args, folder, device):
    """{row: metrics} of the test images of the model's classes; with --save-maps pictures, and Fig. 4c's."""
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
        save_queries(folder / "maps" / f"{state['name']}-queries.png", model, samples, images,
                     labels_of(samples, state["classes"]), device)
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

@torch.no_grad()
def save_queries(path, model, samples, images, labels, device):
    """Fig. 4c: how a query's positions attend to each other, P x P, for the first test image of each class.
    Shown before the softmax, which is one-hot at the length that q reaches: cosines of q's rows. UniAD's
    query is its first layer's. Positions run row by row over the feature map."""
    classes, seen, pictures = [sample.cls for sample in samples], [], []
    hook = model.transformer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1][0]))
    for cls in dict.fromkeys(classes):
        i = classes.index(cls)
        model(model.backbone(data.to_device(images[[i]], device)), labels[[i]].to(device))
        q = F.normalize(seen.pop()[0], dim=-1)  # P x D
        pictures.append(metrics.panels([metrics.heat((q @ q.T).cpu().numpy(), 0, 1)], cls, 0, 1))
    hook.remove()
    metrics.sheet({"self-attention of the query, per class": pictures}, path)

def bench(args, device):
    """Table 6: parameters, multiply-adds, seconds per batch; training steps per second."""
    backbone, label = build_backbone(vars(args), "none"), torch.arange(64, device=device) % 15
    model = build(dict(settings=vars(args), classes=range(15), model=None), backbone).to(device)
    network, side = Inference(model, args), args.crop or args.size
    log(f"{args.backbone}, {side} x {side}, {device}, {torch.get_num_threads()} threads")
    for name, part in ("in all", model), *model.named_children():
        log(f"parameters, {name}: {sum(p.numel() for p in part.parameters()) / 1e6:.2f} M")

    @torch.no_grad()
    def look():
        return network(image, label[:B])[1].cpu()

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            outputs = model(f, label[:B])
        loss, _ = objective(model, outputs, label[:B])
        loss.backward()
        for optimizer, _ in steppers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    for B in (1, 8, 16, 32, 64):
        image = torch.rand(B, 3, side, side, device=device)
        if B == 1:
            with FlopCounterMode(display=False) as counter:
                look()
            log(f"multiply-adds: {counter.get_total_flops() / 2e9:.2f} G")
        log(f"batch {B}: {metrics.seconds(look):.4f} s")
    log(TABLE_6)
    B, steppers = min(args.batch_size, 64), optimizers(model.train(), args, device)
    f = torch.randn(B, backbone.H * backbone.W, backbone.C, device=device)
    log(f"training, batch {B}: {1 / metrics.seconds(step):.3f} steps/s")
    log(f"storage {metrics.storage(model):.1f} MiB")

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

# ---------------------------------------------------------------- the paper's published figures
TABLES = {  # (set, unified?): first the columns, then the rows
    ("mvtec", True): """ uniad:i_auroc mint:i_auroc uniad:p_aupr mint:p_aupr
        bottle     .997 1.000 .655 .665   cable      .952 .935  .479 .405   capsule    .869 .955  .438 .475
        hazelnut   .998 1.000 .554 .572   metal_nut  .992 .993  .549 .615   pill       .937 .958  .445 .527
        screw      .875 .983  .296 .512   toothbrush .942 1.000 .373 .380   transistor .998 .998  .664 .652
        zipper     .958 .991  .403 .583   carpet     .998 .999  .478 .556   grid       .982 1.000 .226 .340
        leather   1.000 1.000 .331 .369   tile       .993 .992  .415 .417   wood       .986 .994  .372 .400
        mean       .965 .986  .445 .498""",  # Tables 1, 10
    ("mvtec", False): """ uniad:i_auroc mint:i_auroc
    bottle 1.000 .992   cable .976 .986  capsule    .853  .810   hazelnut   .999  1.000  metal_nut .990 .971
    pill   .883  .983   screw .919 .978  toothbrush .950  .956   transistor 1.000 .999   zipper    .967 .996
    carpet .999  1.000  grid  .985 .999  leather    1.000 1.000  tile       .990  .990   wood      .979 .989
        mean       .966 .977""",  # Table 1
    ("visa", True): """ uniad:i_auroc mint:i_auroc uniad:p_aupr mint:p_aupr
        cashew     .928 .882 .502 .286    chewinggum .996 .999 .604 .624    fryum      .898 .954 .476 .387
        pipe_fryum .978 .982 .549 .471    candle     .969 .975 .212 .278    capsules   .721 .899 .513 .579
        macaroni1  .918 .991 .088 .240    macaroni2  .856 .901 .039 .158    pcb1       .957 .965 .674 .782
        pcb2       .934 .964 .089 .277    pcb3       .894 .980 .149 .340    pcb4       .994 .988 .365 .304
        mean       .920 .957 .355 .394""",  # Table 2
    ("cifar10", True): """ uniad:i_auroc mint:i_auroc
        01234      .844 .867   56789     .809 .833   02468     .930 .936   13579     .906 .926""",  # Table 7
}
# Tables 4, 5 and 8, MVTec AD unified: the settings that differ from MINT-AD's defaults.
VARIANTS = """ i_auroc p_aupr
    uniad=True,query=pool .976 .470   uniad=True,query=token .979 .470   uniad=True,query=text .977 .463
    prompt=image,cls_loss=False .978 .465   prompt=label,cls_loss=False .980 .472
    query=mlp,prior_loss=False .980 .498   query=learned .983 .502
    query=learned,adapter=False,cls_loss=False,prior_loss=False .971 .447
    query=learned,cls_loss=False,prior_loss=False .975 .445
    query=learned,prior_loss=False .977 .465   prior_loss=False .981 .477"""
TABLE_8 = """ i_auroc
    backbone=resnet18.tv_in1k .931             backbone=resnet34.tv_in1k .927
    backbone=resnet50.tv_in1k .943             backbone=resnet101.tv_in1k .931
    backbone=tf_efficientnet_b0.aa_in1k .983   backbone=tf_efficientnet_b2.aa_in1k .964
    backbone=tf_efficientnet_b6.aa_in1k .985"""
TABLE_6 = """the paper (b4, 224 x 224, its GPU): parameters, multiply-adds, seconds per batch
    MINT-AD  9.44 M  1.13 G  .026 .035 .057 .104 .194
    UniAD    6.27 M  0.92 G  .032 .068 .089 .146 .2305"""

def paper_figures(args, found):
    """{row: {metric: the paper's figure}} for this set, setting, variant and backbone, {} if it gives none.
    found: our result's rows. A mean, and any row of a unified model, compares only over all their classes."""
    rows = metrics.read_table(TABLES.get((args.data, args.unified), "none"))
    keys = "backbone", "uniad", "query", "prompt", "adapter", "cls_loss", "prior_loss"
    flags = ",".join(f"{key}={getattr(args, key)}" for key in keys if getattr(args, key) != PAPER[key])
    complete = set(rows) - {"mean"} <= set(found)
    if args.size != PAPER["size"] or args.crop or args.literal or (
            args.unified and args.data != "cifar10" and not complete):
        return {}
    if flags in ("", "uniad=True,query=layerwise"):
        method = "uniad:" if args.uniad else "mint:"
        return {row: {column.removeprefix(method): x for column, x in rows[row].items() if method in column}
                for row in rows if row in found or row == "mean" and complete}
    means = metrics.read_table(VARIANTS) | metrics.read_table(TABLE_8)
    return {"mean": means[flags]} if (args.data, args.unified) == ("mvtec", True) and flags in means else {}

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
    defaults = f"{show(PAPER)}; toy: {show(TOY)}"
    parser = new_parser("MINT-AD (arXiv 2403.14213): train, evaluate, predict.", defaults)
    add = parser.add_argument_group("MINT-AD").add_argument
    add("--optimizer", choices=("adamw", "muon"), help="muon, for the transformer's matrices (default adamw)")
    add("--query", choices=("inr", "mlp", "learned", "layerwise", "pool", "token", "text"),
        help="inr (default), mlp, learned; with --uniad layerwise (default), pool, token, text")
    add("--prompt", choices=("feature", "label", "image"), help="source of class token z (default feature)")
    add("--no-adapter", dest="adapter", action="store_const", const=False, help="f' = f, standardised")
    add("--no-cls-loss", dest="cls_loss", action="store_const", const=False, help="without Eq. 1")
    add("--no-prior-loss", dest="prior_loss", action="store_const", const=False, help="without Eq. 4")
    add("--literal", action="store_const", const=True, help="Eq. 4, 5 as printed, without the determinants")
    add("--uniad", action="store_const", const=True, help="the UniAD baseline, whole")
    add("--text", metavar="FILE", help="--query text: safetensors, a row of text embedding per class name")
    args = parser.parse_args(argv)
    if args.eval:
        check(parser, args)
        return args
    for key in ("prompt", "literal", "adapter", "cls_loss", "prior_loss") if args.uniad else ():
        if (value := getattr(args, key)) is not None:
            parser.error(f"{flag(key, value)} does not go with --uniad")
    name = args.data or "toy"
    preset = PAPER | {"query": "layerwise" if args.uniad else "inr"}
    preset |= TOY if name == "toy" and not args.bench else {"holdout": 0.1} if name == "folder" else {}
    preset |= {"weights": None} if args.backbone else {}  # "none" is for the toy set's own
    parser.set_defaults(**preset)
    args = parser.parse_args(argv)  # what the user typed wins
    if (args.query in ("inr", "mlp", "learned")) == args.uniad:
        parser.error(f"--query {args.query} does not go with{'' if args.uniad else 'out'} --uniad")
    if args.query == "learned" and not args.prior_loss and args.prompt != "feature":
        parser.error(f"--prompt {args.prompt}: with --query learned --no-prior-loss nothing uses the token")
    if (args.query == "text") != bool(args.text):
        parser.error("--query text and --text FILE go together")
    if name == "cifar10" and (args.prompt == "label" or args.query in ("pool", "token", "text")):
        parser.error("--data cifar10: this variant needs the class of each test image; anomalies have none")
    args.unified |= name == "cifar10"  # UniAD's protocol has no other setting
    args.cls_loss &= args.prompt == "feature"  # no classifier, no Eq. 1
    args.prior_loss &= args.query != "mlp"  # Sec. 0.B.6
    check(parser, args)
    return args

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
