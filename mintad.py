"""MINT-AD: class-aware unified anomaly detection with an implicit neural representation as query (arXiv 2403.14213).

    f   : B x C x H x W   features of a frozen backbone, stages 1-4 resized to stage 4 and concatenated
    f'  : B x P x C       adapter(f), one linear layer
    z   : B x 32          class token of f', the layer before the classification head
    q   : B x P x D       INR(positions, z), the transformer decoder's query; a decoder maps it to mu, log sigma of f'
    r   : B x P x C       f' reconstructed by the transformer; the anomaly map is ||f' - r||

    python mintad.py                                                      # built-in toy set, no data, no download
    python mintad.py --data mvtec --root data/mvtec --unified             # the paper's main setting (Table 1)
    torchrun --nproc_per_node=4 mintad.py --data mvtec --unified          # the same on four GPUs, global batch of 32
    python mintad.py --data mvtec                                         # one model per class ("separate")
    python mintad.py --data visa --unified --uniad                        # the UniAD baseline
    python mintad.py --eval runs/mintad-mvtec-unified                     # a trained model's table again
    python mintad.py --eval runs/mintad-mvtec-unified --predict photos/   # score, verdict, class and picture per photo

Details of the implementation and where each comes from:

 1. Backbone: levels of reduction 2, 4, 8, 16, resized bilinearly (align_corners) to the last; frozen, eval mode (UniAD).
 2. Features are standardised per channel with the training features' mean and deviation. The paper does not say; without
    it the few channels of large scale own every loss. `--uniad` uses raw features, as its authors.
 3. Adapter: linear, from the identity. Eq. 4 and Eq. 5 are both likelihoods of the *original* features, as Eq. 3 writes it:
    log p(f) = log N(f'; mu, sigma) + log |det W|; "det" is Eq. 5's share. Nothing is detached. Without the determinants the
    objective has no floor: f' shrinks to zero (README, "What keeps MINT-AD from collapsing").
 4. INR: 602,368 weights without the position embedding, the paper's 0.602 M (Table 9). The paper initialises nothing: the
    sines start as SIREN's (its omega_0 = 30 inside the first layer's weights), the modulation by Kaiming's rule, the
    classifier so that z can tell classes apart before it is one-hot (README, "The class token", "The query").
    log sigma is clamped to -5..5.
 5. Transformer: UniAD's layers, 4 + 4 (Table 15; the text says 6), post-norm, one q for all decoder layers, learned row
    and column positions added to queries and keys, jitter on the input tokens.
 6. AdamW, lr x 0.1 after 80 % of the steps, gradient norm clipped at 0.1 (UniAD), batch 32. A larger lr than the paper's is
    reached from the paper's: 5e-4 at once makes the attention blind to positions (README, "The learning rate").
 7. The random state is set from (seed, epoch, process) at the start of each epoch, so that a resumed run needs no more
    than the checkpoint to continue bit by bit.

Shapes: B batch, C channels, H x W = P positions, D hidden width, K classes, L decoder layers.
"""

import argparse
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
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import metrics

# ------------------------------------------------------------------------------------------------------- settings

PAPER = dict(backbone="tf_efficientnet_b4.aa_in1k", size=224, epochs=1000, batch_size=32, lr=1e-4, weight_decay=1e-4)
PRESETS = {  # what differs from the paper's settings (Sec. 4.1), which every other set takes; --weight-decay is UniAD's
    "toy": dict(unified=True, backbone="tf_efficientnet_b0", weights="none", size=128, epochs=10, batch_size=8, lr=1e-3),
}
LAMBDA = {"mse": 1.0, "ce": 1.0, "prior": 0.1,  # Eq. 6
          "det": 0.5}  # 2 s^2 with s = 1/2: Eq. 5 + det is the likelihood of f under N(r, s^2), but for a factor and a constant
REDUCTIONS = (2, 4, 8, 16)  # backbone levels
MEMORY_SHARE = 0.5  # features stay in memory if they fit into this share of it

MVTEC = ("bottle cable capsule hazelnut metal_nut pill screw toothbrush transistor zipper "
         "carpet grid leather tile wood mean").split()
VISA = ("cashew chewinggum fryum pipe_fryum candle capsules macaroni1 macaroni2 pcb1 pcb2 pcb3 pcb4 mean").split()
CIFAR10 = ["01234", "56789", "02468", "13579"]
FIGURES = {  # (set, method, setting): {metric: the paper's figures}; Tables 1, 2, 7, 10
    ("mvtec", "mint", "unified"): {
        "i_auroc": (1.000, .935, .955, 1.000, .993, .958, .983, 1.000, .998, .991, .999, 1.000, 1.000, .992, .994, .986),
        "p_aupr": (.665, .405, .475, .572, .615, .527, .512, .380, .652, .583, .556, .340, .369, .417, .400, .498)},
    ("mvtec", "mint", "separate"): {
        "i_auroc": (.992, .986, .810, 1.000, .971, .983, .978, .956, .999, .996, 1.000, .999, 1.000, .990, .989, .977)},
    ("mvtec", "uniad", "unified"): {
        "i_auroc": (.997, .952, .869, .998, .992, .937, .875, .942, .998, .958, .998, .982, 1.000, .993, .986, .965),
        "p_aupr": (.655, .479, .438, .554, .549, .445, .296, .373, .664, .403, .478, .226, .331, .415, .372, .445)},
    ("mvtec", "uniad", "separate"): {
        "i_auroc": (1.000, .976, .853, .999, .990, .883, .919, .950, 1.000, .967, .999, .985, 1.000, .990, .979, .966)},
    ("visa", "mint", "unified"): {
        "i_auroc": (.882, .999, .954, .982, .975, .899, .991, .901, .965, .964, .980, .988, .957),
        "p_aupr": (.286, .624, .387, .471, .278, .579, .240, .158, .782, .277, .340, .304, .394)},
    ("visa", "uniad", "unified"): {
        "i_auroc": (.928, .996, .898, .978, .969, .721, .918, .856, .957, .934, .894, .994, .920),
        "p_aupr": (.502, .604, .476, .549, .212, .513, .088, .039, .674, .089, .149, .365, .355)},
    ("cifar10", "mint", "unified"): {"i_auroc": (.867, .833, .936, .926)},
    ("cifar10", "uniad", "unified"): {"i_auroc": (.844, .809, .930, .906)},
}
# Means of Tables 4 and 5, MVTec AD unified: (uniad, query, prompt, adapter, cls loss, prior loss): (I-AUROC, P-AUPR)
VARIANTS = {
    (True, "pool", "feature", True, True, True): (.976, .470),
    (True, "token", "feature", True, True, True): (.979, .470),
    (True, "text", "feature", True, True, True): (.977, .463),
    (False, "inr", "image", True, False, True): (.978, .465),
    (False, "inr", "label", True, False, True): (.980, .472),
    (False, "mlp", "feature", True, True, False): (.980, .498),
    (False, "learned", "feature", False, False, False): (.971, .447),
    (False, "learned", "feature", True, False, False): (.975, .445),
    (False, "learned", "feature", True, True, False): (.977, .465),
    (False, "inr", "feature", True, True, False): (.981, .477),
    (False, "learned", "feature", True, True, True): (.983, .502),
}
BACKBONES = {"resnet18.tv_in1k": .931, "resnet34.tv_in1k": .927, "resnet50.tv_in1k": .943, "resnet101.tv_in1k": .931,
             "tf_efficientnet_b0.aa_in1k": .983, "tf_efficientnet_b2.aa_in1k": .964, "tf_efficientnet_b6.aa_in1k": .985}  # Table 8


def paper_figures(args, found):
    """{row: {metric: the paper's figure}} for this set, setting, variant and backbone, {} if it gives none.

    found: the rows of our result. A mean, and anything of a unified model, compares only over all of the paper's classes.
    """
    setting, method = "unified" if args.unified else "separate", "uniad" if args.uniad else "mint"
    rows = {"mvtec": MVTEC, "visa": VISA, "cifar10": CIFAR10}.get(args.data, [])
    complete = set(rows) - {"mean"} <= set(found)
    if args.size != PAPER["size"] or (args.unified and args.data != "cifar10" and not complete):
        return {}
    variant = (args.uniad, args.query, args.prompt, args.adapter, args.cls_loss, args.prior_loss)
    default = variant == (args.uniad, "layerwise" if args.uniad else "inr", "feature", True, True, True)
    if default and args.backbone == PAPER["backbone"]:
        figures = FIGURES.get((args.data, method, setting), {})
        return {row: {metric: values[i] for metric, values in figures.items()} for i, row in enumerate(rows)
                if figures and (row in found or row == "mean" and complete)}
    if (args.data, setting) != ("mvtec", "unified"):
        return {}
    if args.backbone == PAPER["backbone"] and variant in VARIANTS:
        return {"mean": dict(zip(("i_auroc", "p_aupr"), VARIANTS[variant]))}
    return {"mean": {"i_auroc": BACKBONES[args.backbone]}} if default and method == "mint" and args.backbone in BACKBONES else {}


# --------------------------------------------------------------------------------------------------------- layers


class Dropout(nn.Dropout):
    """Dropout; on a CPU from 16 random bits per value, since drawing them one by one takes a third of a training step."""

    def forward(self, x):
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        bits = np.random.SFC64(torch.randint(2**63 - 1, ()).item()).random_raw(-(-x.numel() // 4)).view(np.int16)
        keep = torch.from_numpy(bits)[:x.numel()].view(x.shape).ge_(round(self.p * 2**16) - 2**15)  # 0 or 1
        return x * keep.to(x.dtype).mul_(1 / (1 - self.p))


class Attention(nn.Module):
    """Multi-head attention with torch.nn.MultiheadAttention's parameters: query, key, value B x P x D -> B x P x D."""

    def __init__(self, D, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, Dropout(dropout)
        self.in_proj_weight, self.in_proj_bias = nn.Parameter(torch.empty(3 * D, D)), nn.Parameter(torch.zeros(3 * D))
        self.out_proj = nn.Linear(D, D)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, query, key, value, mask=None):  # mask: P x P, True = hidden
        projections = zip((query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3))
        q, k, v = (F.linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for x, weight, bias in projections)  # B x heads x P x D/heads
        if self.training and q.device.type == "cpu":  # where torch's fused kernel has no dropout
            a = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # B x heads x P x P
            a = self.dropout((a if mask is None else a.masked_fill(mask, -math.inf)).softmax(-1)).to(v.dtype) @ v
        else:
            a = F.scaled_dot_product_attention(q, k, v, None if mask is None else ~mask,
                                               self.dropout.p if self.training else 0.0)
        return self.out_proj(a.transpose(1, 2).flatten(2))  # B x P x heads x D/heads -> B x P x D


class EncoderLayer(nn.Module):
    """Post-norm self-attention layer; positions are added to queries and keys, never to values (UniAD, Table 15)."""

    def __init__(self, D, heads, hidden, dropout):
        super().__init__()
        self.self_attn = Attention(D, heads, dropout)
        self.linear1, self.linear2 = nn.Linear(D, hidden), nn.Linear(hidden, D)
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.dropout = Dropout(dropout)

    def forward(self, x, pos, mask=None):  # B x P x D
        x_pos = x + pos
        x = self.norm1(x + self.dropout(self.self_attn(x_pos, x_pos, x, mask)))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class DecoderLayer(nn.Module):
    """UniAD's decoder layer: q attends to the encoder memory, the result to the previous layer's output."""

    def __init__(self, D, heads, hidden, dropout):
        super().__init__()
        self.self_attn = Attention(D, heads, dropout)
        self.multihead_attn = Attention(D, heads, dropout)
        self.linear1, self.linear2 = nn.Linear(D, hidden), nn.Linear(hidden, D)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(D), nn.LayerNorm(D), nn.LayerNorm(D)
        self.dropout = Dropout(dropout)

    def forward(self, q, memory, previous, pos, mask=None):  # each B x P x D
        x = self.norm1(q + self.dropout(self.self_attn(q + pos, memory + pos, memory, mask)))
        x = self.norm2(x + self.dropout(self.multihead_attn(x + pos, previous + pos, previous, mask)))
        return self.norm3(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class Transformer(nn.Module):
    """Reconstructs tokens B x P x C from themselves and one query B x P x D per decoder layer (Sec. 3.2, Table 15)."""

    def __init__(self, C, H, W, D=256, heads=8, hidden=1024, dropout=0.1, layers=4, jitter=20.0):
        super().__init__()
        self.jitter = jitter
        self.input_proj, self.output_proj = nn.Linear(C, D), nn.Linear(D, C)
        self.row_embed, self.col_embed = nn.Embedding(H, D // 2), nn.Embedding(W, D // 2)
        self.encoder = nn.ModuleList(EncoderLayer(D, heads, hidden, dropout) for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(D, heads, hidden, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(D)
        for embed in (self.row_embed, self.col_embed):
            nn.init.uniform_(embed.weight)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, f, queries, mask=None, token=None):
        """f: B x P x C; queries: L of B x P x D; mask: P x P, True = hidden; token: B x 1 x D goes along and is cut off.

        With a token the queries and the mask have P + 1 positions.
        """
        if self.training and self.jitter:  # UniAD: noise in proportion to each token's length
            f = f + torch.randn_like(f) * (f.norm(dim=-1, keepdim=True) * self.jitter / f.shape[-1])
        x = self.input_proj(f)  # B x P x D
        H, W = self.row_embed.num_embeddings, self.col_embed.num_embeddings
        pos = torch.cat([self.col_embed.weight.expand(H, W, -1),
                         self.row_embed.weight.unsqueeze(1).expand(H, W, -1)], -1).flatten(0, 1)  # H x W x D -> P x D
        if token is not None:
            x, pos = torch.cat([x, token], 1), F.pad(pos, (0, 0, 0, 1))  # B x (P+1) x D, (P+1) x D
        for layer in self.encoder:
            x = layer(x, pos, mask)
        memory = x
        for layer, q in zip(self.decoder, queries, strict=True):
            x = layer(q, memory, x, pos, mask)
        return self.output_proj(self.norm(x)[:, :f.shape[1]])  # B x P x C


def neighbour_mask(H, W, window=7):
    """UniAD's neighbour masked attention: P x P, True where a key lies in the query's window and is hidden."""
    y, x = torch.arange(H * W) // W, torch.arange(H * W) % W
    mask = ((y[:, None] - y).abs() <= window // 2) & ((x[:, None] - x).abs() <= window // 2)
    if mask.all(1).any():
        raise data.DataError(f"--size: a {H} x {W} feature map lies wholly inside UniAD's {window} x {window} neighbour "
                             "mask; take a larger --size")
    return mask


class Adapter(nn.Module):
    """f' = W f + b (Sec. 3.2), W from the identity."""

    def __init__(self, C):
        super().__init__()
        self.W, self.b = nn.Parameter(torch.eye(C)), nn.Parameter(torch.zeros(C))

    def forward(self, f):  # B x P x C
        return F.linear(f, self.W, self.b)

    def log_det(self):  # log |det W|
        return torch.linalg.slogdet(self.W.float())[1]


# -------------------------------------------------------------------- prompts: (f' B x P x C, label B) -> z B x 32, logits


class FeaturePrompt(nn.Module):
    """The classifier's token before its head (Sec. 3.3, Table 12); logits B x K are the argument of Eq. 1."""

    def __init__(self, C, P, K, Z=32, D=256):
        super().__init__()
        self.class_encoder = nn.Sequential(
            nn.Linear(C, D), nn.ReLU(), nn.Linear(D, D), nn.ReLU(), nn.Linear(D, Z), nn.Softmax(-1))
        self.channel_encoder = nn.Sequential(
            nn.Linear(P * Z, D), nn.LeakyReLU(), nn.Linear(D, D), nn.LeakyReLU(), nn.Linear(D, Z), nn.Softmax(-1))
        self.head = nn.Linear(Z, K)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):  # torch's default starts both softmaxes so flat that z hardly learns
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)
        # A softmax has length 1 at most, whatever its width. Kaiming would count P * 32 inputs where there are P such, and
        # start the head so small that z turns one-hot, often the same for two classes, long before the logits can differ.
        nn.init.normal_(self.channel_encoder[0].weight, std=math.sqrt(2 / P))
        nn.init.normal_(self.head.weight, std=5.0)

    def forward(self, f, label=None):
        z = self.channel_encoder(self.class_encoder(f).flatten(1))  # B x P x 32 -> B x P*32 -> B x 32
        return z, self.head(z)


class LabelPrompt(nn.Module):
    """A projection of the one-hot label, which is needed at test time too (Table 4)."""

    def __init__(self, C, P, K, Z=32):
        super().__init__()
        self.project = nn.Linear(K, Z)

    def forward(self, f, label):
        return self.project(F.one_hot(label, self.project.in_features).to(f.dtype)), None


class ImagePrompt(nn.Module):
    """A projection of the mean feature; no label at all (Table 4)."""

    def __init__(self, C, P, K, Z=32):
        super().__init__()
        self.project = nn.Linear(C, Z)

    def forward(self, f, label=None):
        return self.project(f.mean(1)), None


PROMPTS = {"feature": FeaturePrompt, "label": LabelPrompt, "image": ImagePrompt}

# --------------------------------------------------------------------- queries: z B x 32 -> q B x P x D


class INR(nn.Module):
    """Dual-path implicit neural representation (Eq. 8, 9, Table 13): positions P x E, class token B x Z -> B x P x D.

    602,368 weights at the paper's sizes, 0.602 M in Table 9.
    """

    def __init__(self, Z=32, E=3, D=256, layers=5, omega=30.0):
        super().__init__()
        self.modulation = nn.ModuleList(nn.Linear(D if i else Z + E, D) for i in range(layers))
        self.synthesis = nn.ModuleList(nn.Linear(D if i else E, D) for i in range(layers))
        self.output = nn.Linear(D, D)
        # SIREN's initialisation (its Sec. 3.2) with omega_0 inside the weights. The last layer, which is linear, keeps the
        # hidden layers' bound and the modulation starts by Kaiming, so that q starts at the scale of a learned query (deviation
        # 0.04 at torch's default, the same at every position, 5 to 7 after training: too large to hear the memory).
        for i, layer in enumerate([*self.synthesis, self.output]):
            bound = math.sqrt(6 / D) if i else omega / E
            nn.init.uniform_(layer.weight, -bound, bound)
        for i, layer in enumerate(self.modulation):  # Kaiming; the first input's length is that of p and a softmax, |z| <= 1
            nn.init.normal_(layer.weight, std=math.sqrt(2 / (D if i else E + 1)))
            nn.init.zeros_(layer.bias)

    def forward(self, p, z):
        B, P = z.shape[0], p.shape[0]
        h = torch.cat([z.unsqueeze(1).expand(B, P, -1), p.expand(B, P, -1)], -1)  # B x P x (Z + E)
        for i, (modulation, synthesis) in enumerate(zip(self.modulation, self.synthesis)):
            h = F.relu(modulation(h))  # Eq. 9
            if i == 0:
                with torch.autocast(p.device.type, enabled=False):  # arguments up to 100: bfloat16 would blur the sine
                    x = torch.sin(synthesis(p)) * h  # P x D * B x P x D
            else:
                x = torch.sin(synthesis(x)) * h  # Eq. 8
        return self.output(x)


class INRQuery(nn.Module):
    def __init__(self, P, D=256, Z=32, E=3):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(P, E))  # "the position encoding uses a learnable embedding"
        self.inr = INR(Z, E, D)

    def forward(self, z):
        return self.inr(self.positions, z)


class MLPQuery(nn.Module):
    """Plain MLP from z to P x D (Sec. 0.B.6). Hidden width 256, our choice: the paper's 383.5 M grid search is not given."""

    def __init__(self, P, D=256, Z=32, hidden=256):
        super().__init__()
        self.P = P
        self.mlp = nn.Sequential(nn.Linear(Z, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
                                 nn.Linear(hidden, P * D))

    def forward(self, z):
        return self.mlp(z).unflatten(1, (self.P, -1))  # B x P*D -> B x P x D


class LearnedQuery(nn.Module):
    """One learned query, N(0, 1) at the start, that every image shares."""

    def __init__(self, P, D=256):
        super().__init__()
        self.embed = nn.Parameter(torch.randn(P, D))

    def forward(self, z):
        return self.embed


# ---------------------------------------------------------------------------------------------------------- model


class Backbone(nn.Module):
    """Frozen multi-scale features (Sec. 3.2): images B x 3 x S x S in 0..1 -> f, B x P x C; H, W, C are attributes.

    weights: a local checkpoint, "none" (untrained) or None (timm's download). Raises data.DataError for an unknown name,
    weights that cannot be had, and for a missing or misshapen tensor, by name.
    """

    def __init__(self, name, size, weights=None, levels=REDUCTIONS):
        super().__init__()
        try:
            info = timm.create_model(name, features_only=True).feature_info
            index = [i for i, reduction in enumerate(info.reduction()) if reduction in levels]
            self.net = timm.create_model(name, features_only=True, out_indices=index)
        except (RuntimeError, AttributeError, TypeError, ValueError) as error:
            raise data.DataError(f"--backbone {name}: timm makes no feature maps of it ({' '.join(str(error).split())[:150]})")
        if 16 not in info.reduction():
            raise data.DataError(f"--backbone {name}: its reductions {info.reduction()} lack 16")
        if hasattr(self.net, "blocks"):  # timm's EfficientNets would compute the stages beyond the last level too
            del self.net.blocks[int(self.net.feature_info.module_name()[-1].split(".")[1]) + 1:]
        if weights != "none":
            load_backbone(self.net, name, weights)
        self.net.eval().requires_grad_(False)
        self.register_buffer("image_mean", torch.tensor(self.net.pretrained_cfg["mean"]).view(3, 1, 1))
        self.register_buffer("image_std", torch.tensor(self.net.pretrained_cfg["std"]).view(3, 1, 1))
        with torch.no_grad():
            maps = dict(zip(self.net.feature_info.reduction(), self.net(torch.zeros(1, 3, size, size))))
        self.H, self.W = maps[16].shape[-2:]  # stage 4, on CIFAR-10 too
        self.C = sum(info.channels()[i] for i in index)

    def train(self, mode=True):
        return super().train(False)  # frozen: BatchNorm never leaves eval mode

    def forward(self, image):
        levels = self.net((image - self.image_mean) / self.image_std)
        f = [F.interpolate(x, (self.H, self.W), mode="bilinear", align_corners=True) for x in levels]
        return torch.cat(f, 1).flatten(2).transpose(1, 2)  # B x C x H x W -> B x P x C


@torch.no_grad()
def load_backbone(net, name, weights=None):
    """Fill a timm network from a checkpoint file, or from timm's download if weights is None.

    Raises data.DataError for an unreadable file, and for a missing or misshapen tensor, by name.
    """
    if weights is None:
        try:
            state = timm.create_model(name, pretrained=True).state_dict()
        except Exception as error:  # whatever the hub's client raises
            raise data.DataError(f"--backbone {name}: its weights cannot be downloaded ({' '.join(str(error).split())[:150]}); "
                                 "give a local file by --weights FILE, or --weights none for an untrained backbone")
    else:
        state = read_tensors(weights)
        for key in ("state_dict", "model", "models"):
            if isinstance(state, dict) and isinstance(state.get(key), dict):
                state = state[key]
    flat = lambda key: key.replace(".", "_")  # timm's feature networks write stages_0 for stages.0
    found = {flat(key): value for key, value in state.items() if torch.is_tensor(value)} if isinstance(state, dict) else {}
    wanted = {key: value for key, value in net.state_dict().items() if not key.endswith("num_batches_tracked")}
    for key, value in wanted.items():
        if flat(key) not in found:
            raise data.DataError(f"--weights {weights}: no tensor {key}; is this a checkpoint of {name}?")
        if found[flat(key)].shape != value.shape:
            raise data.DataError(f"--weights {weights}: {key} is {tuple(found[flat(key)].shape)}, "
                                 f"{name} has {tuple(value.shape)}")
        value.copy_(found[flat(key)])
    log(f"backbone {name}: {len(wanted)} tensors loaded from {weights or 'timm'}, {len(found) - len(wanted)} not needed")


def read_tensors(path):
    """Contents of a .safetensors file or of a torch checkpoint of tensors and plain containers; DataError if unreadable."""
    try:
        return load_file(path) if str(path).endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError:
        raise data.DataError(f"{path}: no such file")
    except Exception as error:  # pickle, zip, safetensors and OS errors share no base class
        raise data.DataError(f"{path}: not a readable checkpoint ({' '.join(str(error).split())[:120]})")


class MINTAD(nn.Module):
    """The model of Figure 3, or with uniad=True the UniAD baseline; both with the variants of Tables 4, 5 and 9.

    C, H, W: size of the features f; K: number of classes; text: K x E text embeddings for query="text".
    query: inr | mlp | learned; for UniAD layerwise (its own, one per decoder layer) | pool | token | text.
    """

    def __init__(self, C, H, W, K, query="inr", prompt="feature", adapter=True, cls_loss=True, prior_loss=True,
                 uniad=False, text=None, D=256, layers=4):
        super().__init__()
        self.H, self.W, self.uniad, self.cls_loss, self.query_type, self.layers, self.K = H, W, uniad, cls_loss, query, layers, K
        P = H * W
        self.transformer = Transformer(C, H, W, D, layers=layers)
        self.register_buffer("mean", torch.zeros(C))
        self.register_buffer("std", torch.ones(C))
        self.adapter = self.prompt = self.query = self.inr = self.distribution = self.token = None
        if uniad:
            mask = neighbour_mask(H, W)
            if query == "token":
                self.token, mask = nn.Linear(K, D), F.pad(mask, (0, 1, 0, 1))  # every position sees the token
            self.register_buffer("mask", mask, persistent=False)
            if query == "text":
                self.register_buffer("text", text)
                self.query = nn.Linear(text.shape[1], D)
            else:
                self.query = nn.Parameter(torch.randn(K if query == "pool" else 1, layers, len(mask), D))
            return
        self.mask = None
        if adapter:
            self.adapter = Adapter(C)
        if query != "learned" or cls_loss or prior_loss:
            self.prompt = PROMPTS[prompt](C, P, K)
        if query == "inr" or prior_loss:
            self.inr = INRQuery(P, D)
        if query != "inr":
            self.query = {"mlp": MLPQuery, "learned": LearnedQuery}[query](P, D)
        if prior_loss:
            self.distribution = nn.Sequential(nn.Linear(D, D), nn.LeakyReLU(), nn.Linear(D, D), nn.LeakyReLU(),
                                              nn.Linear(D, 2 * C))  # Table 14

    def forward(self, f, label=None):
        """f: B x P x C raw features, label: B or None -> f' and r, B x P x C; logits B x K; (mu, log sigma) B x P x C.

        logits and (mu, log sigma) are None in the variants that have none.
        """
        if self.uniad:
            queries, token = self.uniad_query(f, label)
            return f, self.transformer(f, queries, self.mask, token), None, None
        f = (f - self.mean) / self.std
        f_ = self.adapter(f).float() if self.adapter else f
        z, logits = self.prompt(f_, label) if self.prompt else (None, None)
        logits = logits if self.cls_loss else None  # an untrained head says nothing
        q_inr = self.inr(z) if self.inr else None
        q = self.query(z) if self.query else q_inr
        r = self.transformer(f_, [q.expand(f.shape[0], -1, -1)] * self.layers).float()
        gaussian = None
        if self.distribution:
            mu, log_sigma = self.distribution(q_inr).float().chunk(2, -1)
            gaussian = mu, log_sigma.clamp(-5, 5)
        return f_, r, logits, gaussian

    def uniad_query(self, f, label):
        """L decoder queries of UniAD or its variants in Table 4, B x P x D each, and the class token or None."""
        B, token = f.shape[0], None
        if self.query_type == "text":
            q = self.query(self.text[label])[:, None, None].expand(B, self.layers, f.shape[1], -1)
        else:
            q = self.query[label] if self.query_type == "pool" else self.query.expand(B, -1, -1, -1)  # B x L x P x D
        if self.query_type == "token":
            token = self.token(F.one_hot(label, self.K).to(f.dtype)).unsqueeze(1)  # B x 1 x D
        return q.unbind(1), token

    def losses(self, f, label):
        """Mean losses of a batch: {"mse": Eq. 5, "ce": Eq. 1, "prior": Eq. 4, "det": -log |det W| / C}, and what else is logged.

        Without those that the variant does not have.
        """
        f_, r, logits, gaussian = self(f, label)
        losses, extra = {"mse": F.mse_loss(r, f_)}, {}  # Eq. 5
        if logits is not None:
            losses["ce"] = F.cross_entropy(logits.float(), label)  # Eq. 1
            extra["accuracy"] = (logits.argmax(1) == label).float().mean()
        if self.adapter:
            losses["det"] = -self.adapter.log_det() / f.shape[-1]
        if gaussian:
            mu, log_sigma = gaussian
            prior = (0.5 * ((f_ - mu) / log_sigma.exp()) ** 2 + log_sigma + 0.5 * math.log(2 * math.pi)).mean()  # Eq. 4
            losses["prior"] = prior + losses.get("det", 0)  # Eq. 3: the likelihood of the original features
        return losses, {**extra, "std f'": f_.detach().std()}


def anomaly_map(f_, r, H, W):
    """Eq. 7: s(h, w) = ||f' - r||_2, B x H x W, from B x P x C."""
    return (f_ - r).norm(dim=-1).unflatten(1, (H, W))


def upsample(s, size):
    """B x H x W -> B x size x size, bilinear with aligned corners (Sec. 3.6)."""
    return F.interpolate(s.unsqueeze(1), (size, size), mode="bilinear", align_corners=True).squeeze(1)


def image_score(maps, kind):
    """B x S x S -> B: "max" of the map (Sec. 3.6); "mean" (CIFAR-10); "pool": max of 16 x 16 averages (UniAD)."""
    if kind == "pool":
        maps = F.avg_pool2d(maps.unsqueeze(1), 16, stride=1).squeeze(1)
    return maps.mean((1, 2)) if kind == "mean" else maps.amax((1, 2))


def build_backbone(settings, weights):
    levels = (*REDUCTIONS, 32) if settings["data"] == "cifar10" else REDUCTIONS  # C = 720 with b4, as UniAD
    return Backbone(settings["backbone"], settings["size"], weights, levels)


def build_model(settings, backbone, K, text=None):
    return MINTAD(backbone.C, backbone.H, backbone.W, K, text=text, **{key: settings[key] for key in VARIANT})


# ---------------------------------------------------------------------------------------------------------- train


@torch.no_grad()
def extract(backbone, images, folder, device):
    """f of all training images, N x P x C in half precision: computed once, since training uses no augmentation.

    Every process computes its share. In memory where that fits, else (and with several processes) in one memory-mapped
    file that all of them read; on a GPU in its memory if it fits there.
    """
    shape, N = (len(images), backbone.H * backbone.W, backbone.C), len(images)
    size, memory = 2 * math.prod(shape), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if WORLD == 1 and size < MEMORY_SHARE * memory:
        features = np.empty(shape, np.float16)
    else:
        path = folder / "features.f16"
        if RANK == 0:
            np.memmap(path, np.float16, "w+", shape=shape)
        barrier()
        features = np.memmap(path, np.float16, "r+", shape=shape)
        barrier()
        if RANK == 0:
            path.unlink()  # the mappings keep it alive, and no kill can leave it behind
    for batch in progress(torch.arange(N)[RANK::WORLD].split(32), "features"):
        features[batch] = backbone(to_device(images[batch.numpy()], device)).cpu().numpy()
    barrier()
    features = torch.from_numpy(features)
    if device.type == "cuda" and size < MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]:
        features = features.to(device)
    return features


def channel_statistics(features, index):
    """Mean and standard deviation of each channel over the training features, C each.

    The deviation has a floor of 1 % of the mean deviation: an untrained backbone has channels that never move.
    """
    total = torch.zeros(2, features.shape[-1], dtype=torch.float64, device=features.device)
    for batch in index.split(64):
        f = features[batch].double()
        total += torch.stack([f.sum((0, 1)), f.square().sum((0, 1))])
    mean, square = total / (len(index) * features.shape[1])
    std = (square - mean ** 2).clamp_min(0).sqrt()
    if not torch.isfinite(std).all() or std.mean() == 0:
        raise data.DataError("the backbone's features are constant or overflow half precision; check --weights")
    return mean.float(), std.clamp_min(0.01 * std.mean()).float()


def train(model, features, index, labels, settings, seed, device, path, state):
    """Train the model in place on features[index] with labels; a checkpoint after each epoch, from where `state` stops."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=settings["lr"], weight_decay=settings["weight_decay"],
                                  fused=device.type in ("cpu", "cuda"))
    if state["optimizer"]:
        optimizer.load_state_dict(state["optimizer"])
    if len(index) < WORLD:
        raise data.DataError(f"{path.stem}: {len(index)} training images for {WORLD} processes; start fewer")
    epochs, steps = settings["epochs"], -(-len(index) // settings["batch_size"])
    bar = progress(None, path.stem, total=epochs * steps, initial=state["epoch"] * steps)
    for epoch in range(state["epoch"], epochs):
        start, sums = time.time(), {}
        order = torch.randperm(len(index), generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
        torch.manual_seed((1_000_003 * seed + epoch) * 4099 + RANK)  # dropout and jitter
        model.train()
        for step, batch in enumerate(order.split(settings["batch_size"]), epoch * steps):
            part = batch[RANK::WORLD]  # each process takes its share of the same global batch
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings["lr"], step, epochs * steps)
            optimizer.zero_grad()
            if len(part):
                f = features[index[part]].to(device).float()
                with torch.autocast(device.type, torch.bfloat16, enabled=settings["amp"]):
                    losses, extra = model.losses(f, labels[part].to(device))
                loss = sum(LAMBDA[key] * value for key, value in losses.items())  # Eq. 6
                share = len(part) / len(batch)
                (loss * share).backward()
                for key, value in {**losses, **extra}.items():
                    sums[key] = sums.get(key, 0) + value.detach() * len(part) / len(index)
            sum_gradients(parameters)
            nn.utils.clip_grad_norm_(parameters, 0.1)
            optimizer.step()
            bar.update()
        sums = {key: total(value) for key, value in sums.items()}
        if not math.isfinite(sum(sums.values())):
            raise data.DataError(f"training diverged in epoch {epoch + 1}; the last checkpoint is good. Lower --lr")
        values = ", ".join(f"{key} {value:.4f}" for key, value in sums.items())
        log(f"{path.stem} epoch {epoch + 1}/{epochs}: {values}, {time.time() - start:.1f} s", bar)
        state.update(epoch=epoch + 1, model=model.state_dict(), optimizer=optimizer.state_dict())
        save(path, state)
    bar.close()


def learning_rate(lr, step, steps):
    """The rate of a step: lr x 0.1 after 80 % (Sec. 4.1: 800 of 1000 epochs); what exceeds the paper's is warmed up to.

    5e-4 at once makes the attention blind: all positions of an image get the same (README, "The learning rate").
    """
    return min(lr, PAPER["lr"] * (1 + step / 100)) if step < 0.8 * steps else 0.1 * lr


def sum_gradients(parameters):
    """Sum each parameter's gradient over the processes, in one message; a parameter without one has zeros."""
    if WORLD == 1:
        return
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(grad.view_as(p))


def save(path, state):
    if RANK == 0:
        try:
            with data.atomic(path) as temporary:
                torch.save(state, temporary)
        except (OSError, RuntimeError) as error:  # torch.save raises the latter on a full disk
            raise data.DataError(f"cannot write {path} ({' '.join(str(error).split())[:120]}); its last version is whole, "
                                 "--resume goes on from it") from None


# ------------------------------------------------------------------------------------------------------- evaluate


@torch.no_grad()
def infer(backbone, model, images, args, device, labels=None, quiet=False):
    """Anomaly maps N x S x S, image scores N (numpy) and predicted classes (-1: no classifier), in full precision.

    images: uint8 N x S x S x 3. Every process computes its share; process 0 gets all, the others None.
    """
    model.eval()
    s, classes = [torch.zeros(0, model.H, model.W)], [torch.zeros(0, dtype=torch.long)]
    for batch in progress(torch.arange(len(images))[RANK::WORLD].split(32), "evaluate", off=quiet):
        f = backbone(to_device(images[batch.numpy()], device))
        f_, r, logits, _ = model(f, None if labels is None else labels[batch].to(device))
        s.append(anomaly_map(f_, r, model.H, model.W).cpu())
        classes.append(logits.argmax(1).cpu() if logits is not None else torch.full((len(f),), -1))
    s, classes = (gather(torch.cat(x), len(images), device) for x in (s, classes))
    if s is None:
        return None, None, None
    maps = torch.cat([upsample(part, args.size) for part in s.split(256)])
    return maps.numpy(), image_score(maps, score_kind(args)).numpy(), classes.tolist()


@torch.no_grad()
def save_queries(path, backbone, model, samples, images, device, labels=None):
    """Fig. 4c: how a decoder query's positions attend to each other, P x P, for the first test image of each class.

    Shown before the softmax, as the cosine of q's rows: at the length that q reaches, the softmax is one-hot. UniAD's query is
    its first layer's. Positions run row by row over the feature map.
    """
    first, seen, pictures = {}, [], []
    for i, sample in enumerate(samples):
        first.setdefault(sample.cls, i)
    hook = model.transformer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1][0]))
    model.eval()
    for cls, i in first.items():
        model(backbone(to_device(images[[i]], device)), None if labels is None else labels[[i]].to(device))
        q = F.normalize(seen.pop()[0], dim=-1)  # P x D
        pictures.append(metrics.panels([metrics.heat((q @ q.T).cpu().numpy(), 0, 1)], cls, 0, 1))
    hook.remove()
    metrics.sheet({f"self-attention of the query, classes {i + 1} to {min(i + 5, len(pictures))}": pictures[i:i + 5]
                   for i in range(0, len(pictures), 5)}, path)


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


def score_kind(args):
    return "mean" if args.data == "cifar10" else "pool" if args.uniad else "max"


# ------------------------------------------------------------------------------------------------------------ run

VARIANT = ("query", "prompt", "adapter", "cls_loss", "prior_loss", "uniad")
STATE = ("name", "settings", "root", "seed", "classes", "epoch", "model", "optimizer", "normal", "result")
SETTINGS = ("data", "unified", "classes", "normals", "backbone", "weights", "size", "epochs", "batch_size", "lr",
            "weight_decay", "amp", "holdout", "text", *VARIANT)  # what a result depends on; kept in the checkpoint


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
        backbone, model = restore(states[0], device)
        return (export if args.export else predict)(args, states[0], backbone, model, folder, device, asked)

    cache = None if args.cache == "none" or args.data == "toy" else args.cache
    dataset = data.load(args.data, args.root, args.classes, args.normals, warn=log)
    labels_at_test(args, dataset.test, dataset.classes)  # before hours of training
    decode = lambda samples, name, masks=False: data.decode(  # process 0 fills the cache, the others then open it
        samples, args.size, masks=masks, cache=cache, workers=args.workers, name=name, progress=RANK == 0)
    test_images = in_turn(lambda: decode(dataset.test, "test images"))
    masks = in_turn(lambda: decode(dataset.test, "masks", masks=True))
    results = {}
    for state, backbone, model in map(lambda s: (s, *restore(s, device)), states) if args.eval else \
            train_all(args, dataset, decode, folder, device):
        index = [i for i, s in enumerate(dataset.test) if args.unified or s.cls in state["classes"]]
        if (args.eval or not state["result"] or args.save_maps or args.save_tiff) and index:
            samples = [dataset.test[i] for i in index]
            labels = labels_at_test(args, samples, state["classes"])
            maps, scores, _ = infer(backbone, model, test_images[index], args, device, labels)
            if RANK == 0:
                state["result"] = metrics.evaluate(samples, scores, maps, masks[index])["classes"]
                if args.save_maps:
                    metrics.save_maps(folder / "maps" / f"seed{state['seed']}", samples, test_images[index],
                                      masks[index], maps, scores, state["normal"], args.quantile)
                    save_queries(folder / "maps" / f"{state['name']}-queries.png", backbone, model, samples,
                                 test_images[index], device, labels)
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
    """Train a model per seed and, unless --unified, per class; yields (state, backbone, model) of each."""
    settings = {key: getattr(args, key) for key in SETTINGS}
    log(f"mintad.py: {', '.join(f'{key} {value}' for key, value in settings.items())}, seeds {args.seed}, "
        f"{WORLD} process(es), {device}")
    if not dataset.train:
        raise data.DataError(f"--data {args.data}: no training images")
    if args.batch_size < WORLD:
        raise data.DataError(f"--batch-size {args.batch_size}: less than one image for each of {WORLD} processes")
    if RANK == 0:
        metrics.save_json(folder / "args.json", vars(args), {})
    if args.weights == "none":
        log("warning: the backbone is untrained (--weights none): good enough to see the code run, not for results")
    text = read_text(args.text, dataset.classes) if args.query == "text" else None
    images = in_turn(lambda: decode(dataset.train, "training images"))
    held_out = torch.from_numpy(data.hold_out(dataset.train, args.holdout))
    torch.manual_seed(0)  # an untrained backbone is the same for all seeds and processes
    backbone = in_turn(lambda: build_backbone(settings, args.weights)).to(device)
    features = None
    for seed in args.seed:
        for classes in [dataset.classes] if args.unified else [[cls] for cls in dataset.classes]:
            name = f"seed{seed}" + ("" if args.unified else "-" + classes[0].replace("/", "_"))
            torch.manual_seed(seed)
            rows = text[[dataset.classes.index(cls) for cls in classes]] if args.query == "text" else None
            model = build_model(settings, backbone, len(classes), rows).to(device)
            state = dict(name=name, settings=settings, root=args.root, seed=seed, classes=classes, epoch=0,
                         model=None, optimizer=None, backbone=backbone.state_dict(), normal=None, result=None)
            if args.resume and (path := folder / f"{name}.pt").exists():
                state = resume(path, state)
                fill(state, backbone, model)
            if not state["result"]:
                if features is None:
                    features = extract(backbone, images, folder, device)
                labels = labels_of(dataset.train, classes)
                index = ((labels >= 0) & ~held_out).nonzero().squeeze(1)
                if not args.uniad and state["epoch"] == 0:
                    for buffer, value in zip((model.mean, model.std), channel_statistics(features, index)):
                        buffer.copy_(value)
                train(model, features, index, labels[index], settings, seed, device, folder / f"{name}.pt", state)
                kept = ((labels >= 0) & held_out).nonzero().squeeze(1)
                normal = kept if len(kept) else index[::math.ceil(len(index) / 1000)]  # 1000 will do
                maps, scores, _ = infer(backbone, model, images[normal.numpy()], args, device,
                                        labels[normal] if needs_label(args) else None)
                if RANK == 0:
                    state["normal"] = metrics.calibrate(maps, scores, [classes[k] for k in labels[normal]],
                                                        held_out=len(kept) > 0)
            yield state, backbone, model


def labels_of(samples, classes):
    """Index of each sample's class in classes, N; -1: not among them."""
    return torch.tensor([classes.index(s.cls) if s.cls in classes else -1 for s in samples], dtype=torch.long)


def needs_label(args):
    return args.query in ("pool", "token", "text") if args.uniad else args.prompt == "label"


def labels_at_test(args, samples, classes):
    """Labels of test samples, N, for the variants that need them, else None. Raises data.DataError where they are not known."""
    labels = labels_of(samples, classes) if needs_label(args) else None
    if labels is not None and (labels < 0).any():
        stranger = samples[(labels < 0).nonzero()[0]]
        raise data.DataError(f"--prompt {args.prompt} --query {args.query}: needs the class of every test image, but "
                             f"{stranger.image} is of none of {', '.join(classes)}")
    return labels


def read_text(path, classes):
    """K x E text embeddings from a safetensors file with one row (a tensor of E) per class name."""
    rows = read_tensors(path)
    for cls in classes:
        if not torch.is_tensor(rows.get(cls)):
            raise data.DataError(f"--text {path}: no row '{cls}'; it has {', '.join(sorted(rows))[:200]}")
    return torch.stack([rows[cls].float().flatten() for cls in classes])


def run_folder(args):
    """--out, or runs/mintad-SET-SETTING with a number that is free; refuses to overwrite another run."""
    if args.eval:
        source = Path(args.eval)
        folder = Path(args.out or (source if source.is_dir() else source.parent) / "eval")
    elif args.out:
        folder = Path(args.out)
        if not args.resume and any(folder.glob("seed*.pt")):
            raise data.DataError(f"--out {folder}: holds a run already; --resume goes on with it")
    else:
        stem = f"mintad-{args.data}-{'unified' if args.unified else 'separate'}"
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
    states = [read_tensors(p) for p in paths]
    for p, state in zip(paths, states):
        if not (isinstance(state, dict) and {*STATE, "backbone"} <= state.keys() and isinstance(state["settings"], dict)
                and set(SETTINGS) <= state["settings"].keys()):
            raise data.DataError(f"{p}: not a checkpoint of this version of mintad.py")
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
    """(backbone, model) from a checkpoint alone."""
    backbone = build_backbone(state["settings"], "none")
    model = build_model(state["settings"], backbone, len(state["classes"]), state["model"].get("text"))
    fill(state, backbone, model)
    return backbone.to(device).eval(), model.to(device).eval()


def fill(state, backbone, model):
    """Load a checkpoint's tensors; DataError that names those that do not fit."""
    try:
        backbone.load_state_dict(state["backbone"])
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise data.DataError(f"{state['name']}.pt does not fit its settings: {' '.join(str(error).split())[:200]}") from None


def predict(args, state, backbone, model, folder, device, asked):
    """Score, verdict, class and picture of the images --predict names; True if every file could be read."""
    label = None
    if asked and (len(asked) > 1 or asked[0] not in state["classes"]):
        raise data.DataError(f"--classes {' '.join(asked)}: with --predict one of {', '.join(state['classes'])}")
    if needs_label(args):
        if not asked:
            raise data.DataError("--classes: this model needs the class of the images, one of " + ", ".join(state["classes"]))
        label = torch.tensor([state["classes"].index(asked[0])])

    def look(images):
        maps, scores, k = infer(backbone, model, images, args, device,
                                label.expand(len(images)) if label is not None else None, quiet=True)
        return maps, scores, [asked[0] if asked else state["classes"][i] if i >= 0 else None for i in k]

    return metrics.predict(data.find_images(args.predict), look, args.size, None, state["normal"], args.quantile,
                           folder, log)


class Inference(nn.Module):
    """What --export writes: image B x 3 x S x S in 0..1 -> map B x S x S, score B; normalisation inside."""

    def __init__(self, backbone, model, size, kind):
        super().__init__()
        self.backbone, self.model, self.size, self.kind = backbone, model, size, kind

    def forward(self, image):
        f_, r, _, _ = self.model(self.backbone(image))
        maps = upsample(anomaly_map(f_, r, self.model.H, self.model.W), self.size)
        return maps, image_score(maps, self.kind)


def export(args, state, backbone, model, folder, device, asked):
    if needs_label(args):
        raise data.DataError("--export: this variant needs a class label beside the image and is not exported")
    network = Inference(backbone, model, args.size, score_kind(args)).eval().cpu()
    image = torch.rand(2, 3, args.size, args.size)
    program = torch.export.export(network, (image,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    with data.atomic(args.export) as temporary:
        torch.export.save(program, temporary)
    log(f"{args.export}: image B x 3 x {args.size} x {args.size} in 0..1 -> map, score")
    return True


def bench(args, device):
    """Table 6: parameters, multiply-adds, seconds per batch, peak memory and storage; beside the paper's for its settings."""
    if needs_label(args):
        raise data.DataError("--bench: a variant that needs a label is not timed")
    backbone = build_backbone(vars(args), "none")
    model = build_model(vars(args), backbone, 15)
    network = Inference(backbone, model, args.size, score_kind(args)).eval().to(device).requires_grad_(False)
    parts = {"backbone": backbone, **dict(model.named_children()), "in all": network}
    parameters = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in parts.items()}
    log(f"{args.backbone}, {args.size} x {args.size}, {torch.get_num_threads()} threads, device "
        + (torch.cuda.get_device_name(device) if device.type == "cuda" else device.type))
    same = (args.backbone, args.size) == (PAPER["backbone"], PAPER["size"])
    paper = [" "] * 7 if not same else [f" (paper {x})" for x in (
        ("6.27", "0.92", .032, .068, .089, .146, .2305) if args.uniad else ("9.44", "1.13", .026, .035, .057, .104, .194))]
    log("parameters (M): " + ", ".join(f"{name} {value:.2f}" for name, value in parameters.items()) + paper[0])
    for name, part in ("backbone", backbone), ("in all", network):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            part(torch.rand(1, 3, args.size, args.size, device=device))
        log(f"multiply-adds, {name}: {counter.get_total_flops() / 2e9:.2f} G" + paper[1] * (name == "in all"))
    for B, theirs in zip((1, 8, 16, 32, 64), paper[2:]):
        image, times = torch.rand(B, 3, args.size, args.size, device=device), []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with torch.no_grad():
            for _ in range(6):
                begin = time.perf_counter()
                network(image)[1].cpu()
                times.append(time.perf_counter() - begin)
        memory = f", peak {torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB" if device.type == "cuda" else ""
        log(f"batch {B}: {sorted(times[1:])[2]:.4f} s{theirs}{memory}")
    log(f"storage {sum(v.nbytes for v in network.state_dict().values()) / 2**20:.1f} MiB")
    return True


# --------------------------------------------------------------------------------------------- processes and logging

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


def total(x):
    """Sum of a tensor over the processes, as a number."""
    if WORLD > 1:
        dist.all_reduce(x := x.clone())
    return x.item()


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


# --------------------------------------------------------------------------------------------------- command line


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
        description="MINT-AD (arXiv 2403.14213): train, evaluate, predict.", epilog="The header of this file has commands.",
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

    group = parser.add_argument_group("training", "defaults: the paper's preset " + show(PAPER) + "".join(
        f"; {name}: {show(preset)}" for name, preset in PRESETS.items()))
    group.add_argument("--backbone", metavar="NAME", help="any timm name with features_only")
    group.add_argument("--weights", metavar="FILE|none", help="local checkpoint (default: timm's download); none: untrained")
    group.add_argument("--size", type=number(int, 32), help="image height and width in pixels")
    group.add_argument("--epochs", type=number(int, 1))
    group.add_argument("--batch-size", type=number(int, 1), help="global: split over the processes")
    group.add_argument("--lr", type=number(float, 0), help="x 0.1 after 80 %% of the steps; above 1e-4 warmed up to, 1e-4 each 100 steps")
    group.add_argument("--weight-decay", type=number(float, 0))
    group.add_argument("--seed", type=number(int, 0), nargs="+", default=[1], metavar="S", help="several: mean and deviation")
    group.add_argument("--amp", action="store_true", help="train in bfloat16; evaluation is always in float32")
    group.add_argument("--device", help="cpu, cuda, cuda:N or mps (default: the best there is)")

    group = parser.add_argument_group("variants", "Tables 4, 5, 9 and the UniAD baseline")
    group.add_argument("--query", choices=("inr", "mlp", "learned", "layerwise", "pool", "token", "text"),
                       help="decoder query: inr (default), mlp, learned; with --uniad layerwise (default), pool, token, text")
    group.add_argument("--prompt", choices=tuple(PROMPTS), default="feature", help="source of the class token z (default feature)")
    group.add_argument("--no-adapter", dest="adapter", action="store_false", help="f' = f, standardised")
    group.add_argument("--no-cls-loss", dest="cls_loss", action="store_false", help="without Eq. 1")
    group.add_argument("--no-prior-loss", dest="prior_loss", action="store_false", help="without Eq. 4")
    group.add_argument("--uniad", action="store_true", help="the UniAD baseline, whole")
    group.add_argument("--text", metavar="FILE", help="--query text: safetensors, a row of text embedding per class name")

    group = parser.add_argument_group("run")
    group.add_argument("--out", metavar="DIR", help="results (default runs/mintad-SET-SETTING, numbered)")
    group.add_argument("--resume", action="store_true", help="go on with the run in --out, or with the last default one")
    group.add_argument("--eval", metavar="CKPT", help="evaluate a checkpoint, or all of a run's folder, instead of training")
    group.add_argument("--predict", nargs="+", metavar="PATH", help="with --eval: files, folders or globs to judge")
    group.add_argument("--quantile", type=number(float, 0, 1), default=0.99,
                       help="--predict: the threshold is this quantile of normal scores (default 0.99)")
    group.add_argument("--export", metavar="FILE", help="with --eval: write the network as a torch.export program (.pt2)")
    group.add_argument("--save-maps", action="store_true", help="pictures of all test images, a sheet per class, the queries (Fig. 4c)")
    group.add_argument("--save-tiff", action="store_true", help="float maps at image size, as MVTec's evaluation reads them")
    group.add_argument("--bench", action="store_true", help="cost of the network (Table 6), no data needed")

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
    allowed = ("layerwise", "pool", "token", "text") if args.uniad else ("inr", "mlp", "learned")
    args.query = args.query or allowed[0]
    ignored = [flag for flag, typed in (("--prompt", args.prompt != "feature"), ("--no-adapter", not args.adapter),
                                        ("--no-cls-loss", not args.cls_loss), ("--no-prior-loss", not args.prior_loss)) if typed]
    if args.uniad and ignored:
        parser.error(f"{ignored[0]} does not go with --uniad")
    if args.query not in allowed:
        parser.error(f"--query {args.query}: {'with' if args.uniad else 'without'} --uniad choose from {', '.join(allowed)}")
    if args.query == "learned" and not args.prior_loss and args.prompt != "feature":
        parser.error(f"--prompt {args.prompt}: nothing uses the class token with --query learned --no-prior-loss")
    if (args.query == "text") != bool(args.text):
        parser.error("--query text and --text FILE go together")
    preset = {**PAPER, **({} if args.bench else PRESETS.get(args.data, {}))}
    if args.backbone:
        preset.pop("weights", None)
    for key, value in {"weights": None, "unified": False, "holdout": 0.1 if args.data in ("toy", "folder") else 0.0, **preset}.items():
        if getattr(args, key) is None:  # what the user typed wins
            setattr(args, key, value)
    args.unified |= args.data == "cifar10"  # UniAD's protocol has no other setting
    args.cls_loss &= args.prompt == "feature"  # no classifier, no Eq. 1
    args.prior_loss &= args.query != "mlp"  # Sec. 0.B.6
    return args


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
