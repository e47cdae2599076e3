"""mintad.py's mathematics: each equation, layer and training step against independent code."""

import json
import math
import re
import tempfile
import zlib
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.ndimage
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import data
import mintad

CPU = torch.device("cpu")
B, C, H, W, K, D = 2, 12, 8, 10, 3, 16
P = H * W
LABEL = torch.tensor([2, 1])
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


def settings(line=""):
    return mintad.parse_args(["--data", "mvtec", *line.split()])[0]


def build(line="", **size):
    """The model that a command line names, for features B x P x C."""
    args = settings(line)
    size = {"C": C, "H": H, "W": W, "K": K, "D": D, "layers": 2, "query": args.query} | size
    if args.uniad:
        return mintad.UniAD(text=torch.arange(5.0 * K).view(K, 5).sin(), **size)
    losses = {"cls_loss": args.cls_loss, "prior_loss": args.prior_loss}
    return mintad.MINTAD(prompt=args.prompt, adapter=args.adapter, **losses, **size)


def noisy(module):
    """In evaluation mode, biases and norms moved away from zeros and ones."""
    for p in module.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return module.eval()


def linear(layer, x):
    return x @ layer.weight.T + layer.bias


def linears(module):
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


@pytest.fixture(autouse=True)
def small_and_seeded(monkeypatch):
    """Detectors get narrow networks of two layers."""
    torch.manual_seed(0)
    for name in "MINTAD", "UniAD":
        monkeypatch.setattr(mintad, name, partial(getattr(mintad, name), D=D, layers=2))


# ------------------------------------------------------------------------------ Sec. 3.2: backbone


def pooled(level, pool):
    """C x h x w -> 4 x 4 x C: sampled with its corners kept in place, or the means of the cells."""
    step = level.shape[1] // 4
    if pool == "area":
        level = level.reshape(-1, 4, step, 4, step).mean((2, 4))
    else:
        level = scipy.ndimage.zoom(level, (1, 4 / level.shape[1], 4 / level.shape[2]), order=1)
    return level.transpose(1, 2, 0)


@pytest.mark.parametrize(
    "line, levels", [("", 4), ("--pool area", 4), ("--data cifar10", 5)], ids=str
)
def test_features_are_the_networks_levels_of_the_standardised_image(tmp_path, line, levels):
    """Of the weights in a file, by timm's whole network in evaluation mode."""
    net = noisy(timm.create_model("test_efficientnet"))
    save_file(net.state_dict(), tmp_path / "weights.safetensors")
    args = settings(f"--size 64 --backbone test_efficientnet {line}")
    backbone = mintad.Backbone(args, tmp_path / "weights.safetensors")
    image = torch.rand(1, 3, 64, 64)
    mean, std = (torch.tensor(net.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    found = net.forward_intermediates((image - mean) / std, intermediates_only=True)
    expected = [pooled(x[0].detach().numpy(), args.pool) for x in found[:levels]]
    expected = np.concatenate(expected, -1).reshape(1, 16, -1)
    np.testing.assert_allclose(backbone(image), expected, rtol=1e-4, atol=1e-4)


def test_a_network_without_the_strides_is_refused():
    with pytest.raises(data.DataError, match="convnext_atto.*4, 8, 16"):
        mintad.Backbone(settings("--backbone convnext_atto --size 64"), "none")


@pytest.mark.parametrize("name, channels", [("mvtec", 272), ("cifar10", 720)])
def test_the_papers_network_has_the_papers_size(name, channels):
    backbone = mintad.Backbone(settings(f"--data {name}"), "none")
    assert (backbone.C, backbone.H, backbone.W) == (channels, 14, 14)


# ------------------------------------------------------------------ Sec. 3.3: class token and query


@pytest.mark.parametrize(
    "part, count",
    [
        ("inr", 602_368),  # Table 9: 0.602 M
        ("token", 69_888 + 65_792 + 8_224 + 1_605_888 + 65_792 + 8_224 + 495),  # Table 12
        ("distribution", 2 * 65_792 + 139_808),  # Table 14
    ],
)
def test_part_has_the_papers_weights(part, count):
    model = build(C=272, H=14, W=14, K=15, D=256, layers=1)
    assert sum(p.numel() for p in model.get_submodule(part).parameters()) == count


def test_class_token_is_a_softmax_of_the_positions_softmaxes():
    prompt = noisy(mintad.FeaturePrompt(C, 4, K))
    f_ = torch.randn(B, 4, C)
    one, two, three, four, five, six, head = (partial(linear, x) for x in linears(prompt))
    x = three(two(one(f_).relu()).relu()).softmax(-1).reshape(B, 4 * 32)
    z = six(F.leaky_relu(five(F.leaky_relu(four(x))))).softmax(-1)
    close(prompt(f_), (z, head(z)))


def test_classifier_learns_behind_two_softmaxes():
    means = torch.randn(6, 1, 32)
    prompt = mintad.FeaturePrompt(32, 16, 6, D=64)
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=1e-3)
    for _ in range(100):
        label = torch.randint(6, (16,))
        loss = F.cross_entropy(prompt(means[label] + torch.randn(16, 16, 32))[1], label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2


def test_inr_is_equations_8_and_9():
    inr = noisy(mintad.INR()).double()
    p = torch.randn(5, 3).double()
    z = torch.randn(B, 32).double()
    q = inr(p, z)
    for b in range(B):
        for k in range(5):
            h = torch.cat([z[b], p[k]])
            x = p[k]
            for modulation, synthesis in zip(inr.modulation, inr.synthesis, strict=True):
                h = (modulation.weight @ h + modulation.bias).clamp_min(0)
                x = torch.sin(synthesis.weight @ x + synthesis.bias) * h
            close(q[b, k], inr.output.weight @ x + inr.output.bias)


def test_query_starts_at_the_scale_of_a_learned_one_in_positions_and_classes():
    model = build(D=256, layers=1)
    q = model.inr(model.positions, F.one_hot(torch.arange(2), 32).float())
    deviations = [q.std().item(), q.std(1).mean().item(), (q[0] - q[1]).std().item()]
    assert deviations == pytest.approx([1, 1, 1], abs=0.7)


# -------------------------------------------------------------------------- transformer, and UniAD


def reference(transformer, f, queries, hidden=None, token=None):
    """UniAD's forward pass as its authors' code does it, by torch's attention, sequence first.

    queries: for each layer P x B x D; hidden: P x P, or None.
    """

    def attention(layer, q, k, v):
        theirs = nn.MultiheadAttention(v.shape[-1], 8)
        theirs.load_state_dict(layer.state_dict())
        return theirs(q, k, v, attn_mask=hidden)[0]

    def norm(layer, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * layer.weight + layer.bias

    x = linear(transformer.input_proj, f.transpose(0, 1))
    pairs = [(r, c) for r in transformer.row_embed.weight for c in transformer.col_embed.weight]
    pos = torch.stack([torch.cat([col, row]) for row, col in pairs]).unsqueeze(1)  # P x 1 x D
    if token is not None:
        x = torch.cat([x, token.unsqueeze(0)])
        pos = torch.cat([pos, torch.zeros_like(pos[:1])])
    for n in transformer.encoder:
        x = norm(n.norm1, x + attention(n.self_attn, x + pos, x + pos, x))
        x = norm(n.norm2, x + linear(n.linear2, linear(n.linear1, x).relu()))
    memory = x
    for n, q in zip(transformer.decoder, queries, strict=True):
        q = norm(n.norm1, q + attention(n.self_attn, q + pos, memory + pos, memory))
        q = norm(n.norm2, q + attention(n.multihead_attn, q + pos, x + pos, x))
        x = norm(n.norm3, q + linear(n.linear2, linear(n.linear1, q).relu()))
    return linear(transformer.output_proj, norm(transformer.norm, x))[: f.shape[1]].transpose(0, 1)


@pytest.mark.parametrize(
    "ours, theirs, inputs",
    [
        (mintad.EncoderLayer, nn.TransformerEncoderLayer, [0]),
        (mintad.DecoderLayer, nn.TransformerDecoderLayer, [0, 0, 1]),  # q is the memory
    ],
)
def test_layer_is_torchs_in_training_where_there_are_no_positions(ours, theirs, inputs):
    """Dropout falls on the same places."""
    ours = noisy(ours(D, 8, 32)).train()
    theirs = theirs(D, 8, 32, dropout=0.1, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, B, P, D)
    torch.manual_seed(1)
    expected = theirs(*(x[i] for i in sorted(set(inputs))))
    torch.manual_seed(1)
    close(ours(*(x[i] for i in inputs), 0), expected)


def neighbours():
    """P x P: 0, or minus infinity where a key is at most 3 rows and 3 columns from the query."""
    mask = torch.zeros(H, W, H, W)
    for i in range(H):
        for j in range(W):
            mask[i, j, max(i - 3, 0) : i + 4, max(j - 3, 0) : j + 4] = -math.inf
    return mask.view(P, P)


@pytest.mark.parametrize("query", ["layerwise", "pool", "token", "text"])
def test_uniad_is_the_authors_network_and_table_4s_variants_of_it(query):
    model = noisy(build("--uniad", query=query))
    f = torch.randn(B, P, C)
    hidden = neighbours()
    token = None
    if query == "text":  # at every position and layer
        queries = linear(model.query, model.text[LABEL]).expand(2, P, B, D)
    elif query == "pool":  # a query per class
        queries = model.query[LABEL].permute(1, 2, 0, 3)
    else:
        queries = model.query[0].unsqueeze(2).expand(-1, -1, B, -1)
    if query == "token":  # that all positions see
        token = linear(model.token, F.one_hot(LABEL, K).float())
        hidden = F.pad(hidden, (0, 1, 0, 1))
    expected = reference(model.transformer, f, queries, hidden, token)
    close(model(f, LABEL)[:2], (f, expected))


def test_too_few_positions_for_the_neighbour_mask_are_refused():
    with pytest.raises(data.DataError, match="--size"):
        build("--uniad", H=4, W=4)


@pytest.mark.parametrize("train", [True, False])
def test_jitter_is_20_times_a_tokens_length_over_the_channels_in_training_only(train):
    transformer = mintad.Transformer(C, 20, 20, D=D, layers=0).train(train)
    f = torch.randn(50, 400, C) * torch.rand(50, 400, 1)
    seen = []
    transformer.input_proj.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    transformer(f, [])
    noise = (seen[0] - f) / (20 * f.norm(dim=-1, keepdim=True) / C)
    assert (noise.mean().item(), noise.std().item()) == pytest.approx((0, float(train)), abs=0.01)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize(
    "name, alike",
    [("self_attn.in_proj_weight", True), ("self_attn.out_proj.weight", False)]
    + [("linear1.weight", False), ("linear2.weight", False)],
)
def test_layers_start_as_copies_but_for_linear_ones(kind, name, alike):
    first, second = (dict(x.named_parameters()) for x in getattr(build().transformer, kind))
    assert torch.equal(first[name], second[name]) == alike


@pytest.mark.parametrize(
    "name, low, high",
    [
        ("transformer.row_embed.weight", 0, 1),  # UniAD's
        ("transformer.col_embed.weight", 0, 1),
        ("transformer.decoder.0.linear1.weight", -math.sqrt(6 / 1280), math.sqrt(6 / 1280)),
        ("transformer.decoder.0.linear1.bias", 0, 0),
        ("inr.synthesis.0.weight", -10, 10),  # SIREN's omega, 30, over three inputs
    ],
)
def test_a_tensor_starts_uniform(name, low, high):
    x = build(D=256, layers=1).get_parameter(name)
    found = x.min().item(), x.mean().item(), x.max().item()
    assert found == pytest.approx((low, (low + high) / 2, high), abs=0.03 * (high - low))


@pytest.mark.parametrize(
    "name, deviation",
    [("positions", 1), ("token.head.weight", 5), ("token.channel_encoder.0.weight", 0.158)],
)
def test_a_tensor_starts_normal(name, deviation):
    x = build(K=15).get_parameter(name)  # 0.158: root of 2 over 80 positions
    assert x.std().item() == pytest.approx(deviation, rel=0.1)


def test_adapter_starts_as_the_identity():
    f = torch.randn(B, P, C)
    assert torch.equal(build()(f)[0], f)


@pytest.mark.parametrize("model", [mintad.MINTAD, mintad.UniAD])
def test_transformer_has_four_and_four_layers_of_width_256(model):
    found = model(C, H, W, K).transformer
    sizes = len(found.encoder), len(found.decoder), found.input_proj.out_features
    assert sizes == (4, 4, 256)


def test_uniads_queries_start_normal_and_alike_in_each_layer():
    query = build("--uniad", H=14, W=14).query
    one = query[:, :1]
    assert torch.equal(query, one.expand_as(query)) and abs(one.std() - 1) < 0.05


def fill(key, shape):
    """The value that the authors' code was given for a tensor of this name and shape."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    if len(shape) > 1:
        return noise / math.sqrt(shape[1])
    return 1 + 0.1 * noise if key.endswith("weight") else 0.1 * noise


def authors_name(ours):
    ours = re.sub("^(row|col)_embed", r"pos_embed.\1_embed", ours)
    ours = re.sub("^(en|de)coder", r"transformer.\1coder.layers", ours)
    return re.sub("^norm", "transformer.decoder.norm", ours)


def test_uniad_gives_the_map_of_its_authors_code():
    """At full size, with every tensor filled from its name."""
    values = json.loads(Path(__file__).with_name("uniad_values.json").read_text())
    theirs = {key: fill(key, shape) for key, shape in values["keys"].items()}
    detector = detector_of_residuals("--uniad", 272, 14, 14, 15)
    detector.model = model = mintad.UniAD(272, 14, 14, 15, D=256, layers=4).eval()
    state = {ours: theirs.pop(authors_name(ours)) for ours in model.transformer.state_dict()}
    model.transformer.load_state_dict(state)
    embeds = [theirs.pop(f"transformer.decoder.layers.{i}.learned_embed.weight") for i in range(4)]
    model.query.data = torch.stack(embeds).unsqueeze(0)
    f = torch.randn(2, 272, 14, 14, generator=torch.Generator().manual_seed(77))
    s = detector(f.flatten(2).transpose(1, 2))[0].flatten()
    close(s[:: len(s) // 64][:64], torch.tensor(values["map"]), rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------- the model of Figure 3

VARIANTS = ["", "--query mlp", "--query mlp --prompt label", "--query learned"]
VARIANTS += ["--query learned --no-prior-loss", "--prompt label", "--prompt image"]
VARIANTS += ["--query learned --no-prior-loss --no-cls-loss --no-adapter"]
VARIANTS += ["--no-prior-loss", "--no-cls-loss", "--no-adapter"]
UNIADS = [f"--uniad --query {query}" for query in ("layerwise", "pool", "token")]


@pytest.mark.parametrize("line", VARIANTS)
def test_a_variant_is_its_parts_put_together(line):
    args = settings(line)
    model = noisy(build(line))
    model.mean = torch.randn(C)
    model.std = torch.rand(C) + 0.5
    f = torch.randn(B, P, C)

    f_ = (f - model.mean) / model.std
    if args.adapter:
        f_ = linear(model.adapter, f_)
    z = logits = gaussian = None
    if args.prompt == "label":
        z = linear(model.token, F.one_hot(LABEL, K).float())
    elif args.prompt == "image":
        z = linear(model.token, f_.mean(1))
    elif "token" in dict(model.named_children()):
        z, logits = model.token(f_)
    if args.query == "learned":
        q = model.learned.expand(B, P, D)
    elif args.query == "mlp":
        one, two, three = linears(model.mlp)
        q = linear(three, linear(two, linear(one, z).relu()).relu()).view(B, P, D)
    else:
        q = model.inr(model.positions, z)
    r = reference(model.transformer, f_, q.transpose(0, 1).expand(2, P, B, D))  # in each layer
    if args.prior_loss:
        one, two, three = linears(model.distribution)  # Table 14
        q = model.inr(model.positions, z)
        both = linear(three, F.leaky_relu(linear(two, F.leaky_relu(linear(one, q)))))
        gaussian = both[..., :C], both[..., C:]
    found = [x for x in model(f, LABEL) if x is not None]
    close(found, [x for x in (f_, r, logits, gaussian) if x is not None])


@pytest.mark.parametrize("line", VARIANTS + UNIADS)
def test_every_parameter_of_a_variant_gets_a_gradient(line):
    """DistributedDataParallel wants it so."""
    model = build(line)
    mintad.objective(model, model(torch.randn(B, P, C), LABEL), LABEL)[0].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_deviation_of_the_prior_is_bounded():
    model = build()
    model.distribution[-1].bias.data[C:] = torch.linspace(-1000, 1000, C)
    _, _, _, (_, log_sigma) = model(torch.randn(B, P, C))
    assert log_sigma.abs().max() == 5


@pytest.mark.parametrize(
    "line, lost", [("--query mlp", "prior_loss"), ("--prompt label", "cls_loss")]
)
def test_a_variant_goes_without_the_loss_that_it_has_no_part_for(line, lost):
    assert not getattr(settings(line), lost)  # Sec. 0.B.6


# ------------------------------------------------------------------------------- Eq. 1, 4, 5 and 6


@pytest.mark.parametrize("kind", ["ours", "literal", "no adapter", "uniad"])
def test_loss_is_equation_6(kind):
    """With the determinants of Eq. 3 as at objective; literal: as printed; UniAD: Eq. 5 alone."""
    model = build()
    W = model.adapter.weight.data = torch.randn(C, C)
    f_, r, mu = torch.randn(3, B, P, C)
    sigma = torch.rand(B, P, C) + 0.5
    logits = torch.randn(B, K)
    mse = ((r - f_) ** 2).mean()  # Eq. 5
    ce = -sum(logits[b].softmax(0)[LABEL[b]].log() for b in range(B)) / B  # Eq. 1
    prior = -torch.distributions.Normal(mu, sigma).log_prob(f_).mean()  # Eq. 4
    expected = mse + 1.0 * ce + 0.1 * prior
    found = f_, r, logits, (mu, sigma.log())
    if kind == "ours":  # s = 1/2
        expected -= (2 / 2**2 + 0.1) * torch.linalg.det(W).abs().log() / C
    elif kind == "no adapter":
        model.adapter = nn.Identity()
    elif kind == "uniad":
        model, found, expected = build("--uniad"), (f_, r, None, None), mse
    close(mintad.objective(model, found, LABEL, literal=kind == "literal")[0], expected)


def test_nothing_is_detached():
    """The adapter's gradient is the slope of the loss, through f' as input, target and sample."""
    model = build().eval()
    f = torch.randn(B, P, C)
    direction = torch.randn(C, C)

    def loss(step):
        model.adapter.weight.data = torch.eye(C) + step * direction
        return mintad.objective(model, model(f, LABEL), LABEL)[0]

    slope = (loss(1e-4) - loss(-1e-4)).item() / 2e-4
    loss(0).backward()
    assert (model.adapter.weight.grad * direction).sum().item() == pytest.approx(slope, rel=0.03)


# --------------------------------------------------- Eq. 7: map and score; --distance mahalanobis


class Plain(nn.Module):
    """A stand-in for the backbone: it is given the features themselves."""

    def __init__(self, **values):
        super().__init__()
        vars(self).update(values)

    def forward(self, f):
        return f


def detector_of_residuals(line, C=C, H=H, W=W, classes=K):
    """It is given f' - r, whose last channels' means are the logits of a model that has any."""
    args = settings(line)
    detector = mintad.Detector(
        args, [*"abcdefghijklmno"[:classes]], Plain(pool=args.pool, C=C, H=H, W=W)
    )

    def forward(d, label):
        logits = d[..., -classes:].mean(1) if args.cls_loss and not args.uniad else None
        return d + 1, torch.ones_like(d), logits, None

    detector.model.forward = forward
    return detector


@pytest.mark.parametrize(
    "pool, options", [("bilinear", {}), ("area", {"grid_mode": True, "mode": "nearest"})]
)
def test_map_is_the_residuals_length_enlarged(pool, options):
    """Bilinear keeps the corners in place, as the features were sampled; area the cells."""
    detector = detector_of_residuals(f"--size 40 --pool {pool}")
    detector.whitening.normal_()  # not for this distance
    d = torch.randn(1, P, C)
    coarse = np.sqrt(np.square(d[0].numpy()).sum(-1)).reshape(H, W)  # Eq. 7
    expected = scipy.ndimage.zoom(coarse, (40 / H, 40 / W), order=1, **options)
    np.testing.assert_allclose(detector(d)[0][0], expected, rtol=1e-4)


def pooled_maximum(s):
    return max(s[i : i + 16, j : j + 16].mean() for i, j in np.ndindex(9, 9))


@pytest.mark.parametrize(
    "line, score", [("", np.max), ("--data cifar10", np.mean), ("--uniad", pooled_maximum)]
)
def test_score_is_the_maps_maximum_or_mean_or_pooled_maximum(line, score):
    s, scores, _ = detector_of_residuals(f"--size 24 {line}")(torch.randn(1, P, C))
    assert scores.item() == pytest.approx(score(s[0].numpy()), rel=1e-5)


@pytest.mark.parametrize(
    "line, expected",
    [("", [1, 2]), ("--prompt label", [2, 0]), ("--uniad --query pool", [2, 0])]
    + [("--prompt image", [0, 0]), ("--uniad", [0, 0])],
)
def test_class_is_the_classifiers_or_else_the_label_that_the_model_needs(line, expected):
    d = F.one_hot(torch.tensor([C - 2, C - 1]), C).float().unsqueeze(1).repeat(1, P, 1)
    detector = detector_of_residuals(f"--size 24 {line}")
    assert detector(d, torch.tensor([2, 0]))[2].tolist() == expected


def moment(d):
    d = d.reshape(-1, d.shape[-1])
    return d.T @ d / len(d)


def mahalanobis(d, residuals, H=H, W=W):
    """d: P x C; residuals: N x P x C of its class -> H x W, by explicit inverses."""
    d = d.double().numpy().reshape(H, W, -1)
    residuals = residuals.double().numpy().reshape(len(residuals), H, W, -1)
    s = np.zeros((H, W))
    for y, x in np.ndindex(2, 2):
        rows = slice(y * H // 2, (y + 1) * H // 2)
        columns = slice(x * W // 2, (x + 1) * W // 2)
        S = 0.5 * moment(residuals) + 0.5 * moment(residuals[:, rows, columns])
        inverse = np.linalg.inv(S + 0.02 * np.trace(S) / len(S) * np.eye(len(S)))
        v = d[rows, columns]
        s[rows, columns] = np.sqrt(np.einsum("yxi,ij,yxj->yx", v, inverse, v))
    return s


@pytest.mark.parametrize(
    "line, channels, counts, classes",
    [
        ("", C, (5, 40, 3), [1, 2]),
        ("", 90, (9, 9, 1), [2, 2]),  # 80 residuals of 90 channels
        ("--prompt label", C, (5, 9, 3), [2, 0]),
        ("--uniad --query token", C, (5, 9, 3), [2, 0]),
        ("--uniad", C, (5, 9, 3), None),
        ("--prompt image", C, (5, 9, 3), None),
        ("--no-cls-loss", C, (5, 9, 3), None),
    ],
)
def test_map_is_the_mahalanobis_distance_of_the_class(line, channels, counts, classes):
    """Of the class that the classifier finds or the model needs; without one of all images."""
    detector = detector_of_residuals(f"--size 64 --distance mahalanobis {line}", channels)
    labels = torch.arange(K).repeat_interleave(torch.tensor(counts))[torch.randperm(sum(counts))]
    mixing = torch.randn(K, P, channels, channels)  # of each class and position
    d = torch.einsum("npi,npij->npj", torch.randn(len(labels), P, channels), mixing[labels])
    detector.whitening = mintad.fit_distance(detector, d, labels, CPU)
    label = torch.tensor(classes or [2, 0])
    tested = torch.randn(2, P, channels)
    tested[..., -K:] += F.one_hot(label, K).unsqueeze(1)
    s, _, _ = detector(tested, label if line else None)
    mine = [d[labels == k] for k in classes] if classes else [d, d]
    expected = [*map(mahalanobis, tested, mine)]
    np.testing.assert_allclose(s[:, ::9, ::7], expected, rtol=1e-3)  # at the positions


# ---------------------------------------------------------------------------------------- training

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
SAMPLES = [data.Sample(str(i), 0, "ab"[i % 2], "ab"[i % 2], None, x) for i, x in enumerate(IMAGES)]
PIXELS = torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 255


class Cells(Plain):
    """A stand-in for the backbone: the feature of a position is its cell's 2 x 2 pixels."""

    def forward(self, image):
        return F.unfold(image, 2, stride=2).transpose(1, 2)


CELLS = Cells(pool="bilinear", C=C, H=4, W=4)
FEATURES = CELLS(PIXELS).half().float()


@cache
def train(line, classes="ab", backbone=CELLS, zoom=1):
    """A training on IMAGES, of the classes a and b in turn, of two epochs of three steps:

    detector, state; seen: the images and their labels of each step; norms: of the gradient that
    the optimizers got at each step; rates: {optimizer: what its learning rate was at each step}
    """
    images = IMAGES.repeat(zoom, 1).repeat(zoom, 2)
    run = SimpleNamespace(seen=[], norms=[], rates={})

    def see(model, inputs):
        if model.training:
            index = [i for x in inputs[0] for i in range(12) if torch.equal(x, FEATURES[i])]
            run.seen.append((index, inputs[1].tolist()))

    def step(optimizer, *_):
        (group,) = optimizer.param_groups
        run.norms.append(torch.stack([p.grad.norm() for p in group["params"]]).norm().item())
        run.rates.setdefault(type(optimizer).__name__, []).append(group["lr"])

    with tempfile.TemporaryDirectory() as folder:
        options = f"--size {len(images[0])} --epochs 2 --batch-size 5 --out {folder}"
        args = settings(f"{options} {line}")
        run.detector = mintad.Detector(args, [*classes], backbone)
        run.state = mintad.new_state(args, [*classes])
        run.detector.model.register_forward_pre_hook(see)
        handle = register_optimizer_step_pre_hook(step)
        mintad.train(run.detector, run.state, args, SAMPLES, images, CPU)
        handle.remove()
    return run


@pytest.mark.parametrize(
    "run, expected",
    [([""], range(12)), (["", "b"], range(1, 12, 2))]
    + [(["--holdout 0.33"], [2, 3, 4, 5, 8, 9, 10, 11])],
)
def test_each_epoch_trains_once_on_each_image_of_its_classes_but_held_out_ones(run, expected):
    seen = sum((index for index, _ in train(*run).seen), [])
    assert sorted(seen) == sorted([*expected] * 2)


def test_each_epoch_has_an_order_of_its_own():
    seen = train("").seen
    assert seen[:3] != seen[3:]


def test_a_batch_has_as_many_images_as_asked_for():
    assert [len(index) for index, _ in train("").seen] == [5, 5, 2] * 2


def test_an_image_is_labelled_by_its_class():
    for index, labels in train("").seen:
        assert labels == [i % 2 for i in index]


@pytest.mark.parametrize("line, index", [("--holdout 0.33", [0, 1, 6, 7]), ("", range(12))])
def test_normal_scores_are_of_the_held_out_or_else_the_training_images(line, index):
    run = train(line)
    with torch.no_grad():
        expected = run.detector(PIXELS[index])[1].tolist()
    assert run.state["normal"][""]["scores"] == pytest.approx(expected, rel=1e-4)


def test_features_are_standardised_by_the_training_images():
    model = train("", "b").detector.model
    values = FEATURES[1::2].flatten(0, 1).numpy()
    found = torch.stack([model.mean, model.std])
    np.testing.assert_allclose(found, [values.mean(0), values.std(0, ddof=1)], rtol=1e-4)


def test_a_channel_that_hardly_moves_is_not_blown_up():
    _, std = mintad.channel_statistics(torch.randn(50, 20, 2) * torch.tensor([2, 1e-9]))
    assert std[1].item() == pytest.approx(0.01 * std[0].item() / 2, rel=1e-3)


@pytest.mark.parametrize("value", [0.0, math.inf])
def test_features_that_are_constant_or_overflow_are_refused(value):
    with pytest.raises(data.DataError):
        mintad.channel_statistics(torch.full((2, 4, C), value))


def test_training_leaves_the_backbone_as_it_was():
    """BatchNorm's statistics too, as it is in evaluation mode."""
    backbone = mintad.Backbone(settings("--size 32 --backbone test_efficientnet"), "none")
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    train("", backbone=backbone, zoom=4)
    close(backbone.state_dict(), before, rtol=0, atol=0)


def test_literal_objective_lets_the_adapted_features_shrink():
    printed, ours = (
        train(line).detector.model.adapter.weight.trace().item() for line in ("--literal", "")
    )
    assert printed < ours


def test_map_after_training_is_the_mahalanobis_distance_by_the_training_images():
    """Of their residuals in evaluation mode."""
    detector = train("--distance mahalanobis").detector
    detector.size = 4
    with torch.no_grad():
        f_, r, logits, _ = detector.model(FEATURES)
        s, _, _ = detector(PIXELS)
    d = f_ - r
    expected = [mahalanobis(d[i], d[k::2], 4, 4) for i, k in enumerate(logits.argmax(1))]
    np.testing.assert_allclose(s, expected, rtol=5e-3)


def test_gradients_norm_is_clipped_at_a_tenth():
    assert train("").norms == pytest.approx([0.1] * 6, rel=1e-3)


def test_gradients_of_a_step_are_its_own(monkeypatch):
    """At a rate of 0, and without noise, all steps with all images have the same."""
    for name, value in {"CLIP": 1e9, "DROPOUT": 0.0, "JITTER": 0.0}.items():
        monkeypatch.setattr(mintad, name, value)
    first, second = train("--lr 0 --batch-size 12").norms
    assert second == pytest.approx(first, rel=1e-3)


def test_rate_of_adamw_falls_to_a_tenth_after_80_percent_of_the_steps():
    assert train("").rates == {"AdamW": pytest.approx([1e-4] * 5 + [1e-5])}


def test_rate_of_muon_is_four_times_adamws_and_both_fall_to_zero():
    fall = np.array([1e-4 * (1 - step / 6) for step in range(6)])
    rates = {"AdamW": pytest.approx(fall), "Muon": pytest.approx(4 * fall)}
    assert train("--optimizer muon").rates == rates


@pytest.mark.parametrize(
    "lr, optimizer, expected",  # of steps 0, 50, 799, 800 of 1000
    [(3e-5, "adamw", [3e-5, 3e-5, 3e-5, 3e-6]), (5e-4, "adamw", [1e-4, 1.5e-4, 5e-4, 5e-5])]
    + [(5e-4, "muon", [1e-4, 1.5e-4, 5e-4 * 0.201, 5e-4 * 0.2])],
)
def test_rate_above_the_papers_is_warmed_up_by_as_much_in_100_steps(lr, optimizer, expected):
    args = SimpleNamespace(lr=lr, optimizer=optimizer)
    rates = [mintad.learning_rate(args, step, 1000) for step in (0, 50, 799, 800)]
    assert rates == pytest.approx(expected)


def test_muon_takes_the_transformers_matrices_and_adamw_all_else():
    model = build()
    names = {p: name for name, p in model.named_parameters()}
    matrices = {name for name in names.values() if re.search("^trans.*(proj|linear).*weight", name)}
    taken = [
        {names[p] for p in optimizer.param_groups[0]["params"]}
        for optimizer in mintad.make_optimizers(model, settings("--optimizer muon"))
    ]
    assert taken == [set(names.values()) - matrices, matrices]


def test_weights_decay_as_asked_for():
    args = settings("--optimizer muon --weight-decay 0.03")
    found = [x.param_groups[0]["weight_decay"] for x in mintad.make_optimizers(build(), args)]
    assert found == [0.03, 0.03]


def test_a_step_of_muon_has_a_fifth_of_the_rate_as_root_mean_square():
    """As about AdamW's, whatever the matrix."""
    model = build(D=128, layers=1)
    _, muon = mintad.make_optimizers(model, settings("--optimizer muon --weight-decay 0"))
    muon.param_groups[0]["lr"] = 1e-2
    matrix = model.transformer.encoder[0].linear1.weight
    before = matrix.detach().clone()
    matrix.grad = torch.randn_like(matrix)
    muon.step()
    assert (matrix - before).square().mean().sqrt().item() == pytest.approx(2e-3, rel=0.2)


def test_networks_get_images_as_rgb_between_0_and_1_in_their_order():
    images = np.random.default_rng(0).integers(0, 256, (70, 4, 4, 3), np.uint8)
    found = mintad.infer(lambda *inputs: inputs, images, torch.arange(70), CPU)
    close(found, [torch.tensor(images.transpose(0, 3, 1, 2) / 255).float(), torch.arange(70)])


def test_a_class_that_did_not_train_is_given_as_the_first():
    samples = [data.Sample("", 0, cls, "") for cls in ("b", "c", "a")]
    assert mintad.class_index(samples, ["a", "b"]).tolist() == [1, 0, 0]  # CIFAR-10's anomalies


# ----------------------------------------------------------------- settings, and published figures


PAPERS = ["adamw", 1e-4, 1000, 32, "bilinear", "euclidean"]
OURS = ["muon", 5e-4, 50, 8, "area", "mahalanobis"]


@pytest.mark.parametrize("line, expected", [("--unified", PAPERS), ("--data folder", OURS)])
def test_settings_of_a_set(line, expected):
    keys = "optimizer", "lr", "epochs", "batch_size", "pool", "distance"
    assert [getattr(settings(line), key) for key in keys] == expected


def published(line, rows=()):
    """The paper's figures beside those of rows, or of all rows of MVTec AD or VisA."""
    table = mintad.VISA if "visa" in line else mintad.MVTEC
    return mintad.published(settings(line), dict.fromkeys(rows or {*table} - {"mean"}))


@pytest.mark.parametrize(
    "line, row, i_auroc, p_aupr",
    [
        ("--unified", "mean", 0.986, 0.498),
        ("--unified --optimizer muon", "screw", 0.983, 0.512),
        ("--unified --uniad", "mean", 0.965, 0.445),
        ("", "mean", 0.977, None),
        ("--uniad", "screw", 0.919, None),
        ("--data visa --unified", "mean", 0.957, 0.394),
        ("--data cifar10", "01234", 0.867, None),
    ],
)
def test_the_papers_figure_stands_beside_ours(line, row, i_auroc, p_aupr):
    expected = {"i_auroc": i_auroc} | ({"p_aupr": p_aupr} if p_aupr else {})
    assert published(line)[row] == pytest.approx(expected)


OTHERS = ["--backbone resnet18", "--size 256", "--literal", *UNIADS[1:], *VARIANTS[1:]]


@pytest.mark.parametrize("line", ["--data visa"] + [f"--unified {line}" for line in OTHERS])
def test_other_models_have_no_published_figure(line):
    assert published(line) == {}


def test_a_unified_model_of_fewer_classes_has_no_published_figure():
    assert published("--unified", ["screw"]) == {}


def test_a_separate_model_of_one_class_has_its_figure_only():
    assert published("", ["screw"]) == {"screw": {"i_auroc": pytest.approx(0.978)}}
