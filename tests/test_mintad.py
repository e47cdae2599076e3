"""mintad.py's mathematics: each equation, layer and training step against independent code."""

import json
import math
import os
import re
import tempfile
import zlib
from copy import deepcopy
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import data
import mintad

B, C, H, W, K, D = 2, 12, 5, 8, 3, 16
P = H * W
LABEL = torch.tensor([2, 1])
torch.manual_seed(0)
IMAGE = torch.rand(B, 3, 2 * H, 2 * W)
FULL = mintad.MINTAD(272, 14, 14, 15)  # EfficientNet-b4's features of MVTec's 15 classes
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


class Cells(nn.Module):
    """A stand-in for the backbone: a position's feature is its cell's 2 x 2 pixels."""

    C, H, W = C, H, W

    def forward(self, image):
        f = F.unfold(image, 2, stride=2).transpose(1, 2)
        return F.dropout(f, 0.5, self.training)


def settings(line):
    return mintad.parse_args(["--data", "mvtec", *line.split()])[0]


def small(line=""):
    """The detector that a command line names, its transformer of width 16 and two layers."""
    args = settings(line)
    backbone = Cells().eval()
    backbone.pool = args.pool
    with pytest.MonkeyPatch.context() as patch:
        for name in "MINTAD", "UniAD":
            patch.setattr(mintad, name, partial(getattr(mintad, name), D=D, layers=2))
        patch.setattr(mintad, "read_texts", lambda path, classes: torch.randn(K, 5))
        return mintad.make_detector(args, {"classes": [*"abc"], "detector": None}, backbone)


def noisy(module):
    """In evaluation mode, its biases and norms moved away from zeros and ones."""
    for p in module.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return module.eval().requires_grad_(False)


def linears(module):
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


# ------------------------------------------------------------------------------ Sec. 3.2: backbone


NETWORKS = "test_efficientnet", "test_efficientnet_gn"  # of ImageNet's mean and deviation; of .5


@pytest.mark.parametrize("pool, levels", [("bilinear", 4), ("area", 4), ("bilinear", 5)])
@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_the_networks_levels_of_the_standardised_image(tmp_path, name, pool, levels):
    """Of the weights in a file, by timm's whole network in evaluation mode."""
    net = noisy(timm.create_model(name))
    save_file(net.state_dict(), tmp_path / "weights.safetensors")
    backbone = mintad.Backbone(name, tmp_path / "weights.safetensors", 64, levels, pool)
    image = torch.rand(1, 3, 64, 64)
    mean, std = (torch.tensor(net.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    found = net.forward_intermediates((image - mean) / std, intermediates_only=True)
    expected = []
    for x in found[:levels]:
        if pool == "area":
            x = F.avg_pool2d(x, x.shape[-1] // 4)
        expected.append(F.interpolate(x, (4, 4), mode="bilinear", align_corners=True).flatten(2))
    close(backbone(image), torch.cat(expected, 1).mT, atol=1e-4, rtol=1e-4)


# ---------------------------------------------- Sec. 3.3, Tables 9 and 12 to 15: the model's parts


@pytest.mark.parametrize(
    "part, count",
    [
        ("inr", 602_368),  # Table 9: 0.602 M
        ("prompt", 69_888 + 65_792 + 8_224 + 1_605_888 + 65_792 + 8_224 + 495),  # Table 12
        ("distribution", 2 * 65_792 + 139_808),  # Table 14
        ("transformer.encoder", 4 * (263_168 + 525_568 + 2 * 512)),  # Table 15
        ("transformer.decoder", 4 * (2 * 263_168 + 525_568 + 3 * 512)),
    ],
)
def test_part_has_the_papers_weights(part, count):
    assert sum(p.numel() for p in FULL.get_submodule(part).parameters()) == count


@pytest.mark.parametrize(
    "name, mean, deviation",
    [
        ("prompt.class_encoder.0.weight", 0, math.sqrt(2 / 272)),  # Kaiming's
        ("prompt.channel_encoder.0.weight", 0, math.sqrt(2 / 196)),  # its input: 196 softmaxes
        ("prompt.head.weight", 0, 5),
        ("prompt.head.bias", 0, 0),
        ("positions", 0, 1),
        ("inr.synthesis.0.weight", 0, 30 / 3 / math.sqrt(3)),  # SIREN's, with its omega of 30
        ("inr.synthesis.1.weight", 0, math.sqrt(6 / 256 / 3)),
        ("inr.modulation.0.weight", 0, math.sqrt(2 / 4)),
        ("inr.modulation.1.weight", 0, math.sqrt(2 / 256)),
        ("inr.modulation.0.bias", 0, 0),
        ("transformer.row_embed.weight", 1 / 2, 1 / math.sqrt(12)),  # UniAD's: from 0 to 1
        ("transformer.col_embed.weight", 1 / 2, 1 / math.sqrt(12)),
        ("transformer.decoder.0.linear1.weight", 0, math.sqrt(2 / 1280)),  # Xavier's
        ("transformer.decoder.0.linear1.bias", 0, 0),
    ],
)
def test_a_tensor_starts_at_its_scale(name, mean, deviation):
    x = FULL.get_parameter(name)
    assert x.mean().item() == pytest.approx(mean, abs=0.1 * deviation)
    assert x.std().item() == pytest.approx(deviation, rel=0.1)


def test_adapter_starts_as_the_identity():
    f = torch.randn(B, P, C)
    assert torch.equal(small().model(f)[0], f)


def test_uniads_layers_start_as_copies_but_for_linear_ones():
    model = small("--uniad").model
    first, second = model.transformer.decoder
    assert torch.equal(first.self_attn.in_proj_weight, second.self_attn.in_proj_weight)
    assert not torch.equal(first.linear1.weight, second.linear1.weight)
    assert torch.equal(model.learned[:, 0], model.learned[:, 1])


def test_class_token_is_a_softmax_of_the_positions_softmaxes():
    prompt = noisy(mintad.FeaturePrompt(C, 4, K))
    f_ = torch.randn(B, 4, C)
    one, two, three, four, five, six, head = linears(prompt)
    x = three(two(one(f_).relu()).relu()).softmax(-1).reshape(B, 4 * 32)
    z = six(F.leaky_relu(five(F.leaky_relu(four(x))))).softmax(-1)
    close(prompt(f_, None), (z, head(z)))


def test_inr_is_equations_8_and_9():
    inr = noisy(mintad.INR()).double()
    p = torch.randn(5, 3).double()
    z = torch.randn(B, 32).double()
    q = inr(p, z)
    for b, k in np.ndindex(B, 5):
        h = torch.cat([z[b], p[k]])
        x = p[k]
        for modulation, synthesis in zip(inr.modulation, inr.synthesis, strict=True):
            h = modulation(h).relu()
            x = synthesis(x).sin() * h
        close(q[b, k], inr.output(x))


# -------------------------------------------------------------------------- transformer, and UniAD


def fill(name, shape):
    """The value that the authors' code was given for its tensor of this name."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if len(shape) > 1:
        return noise / math.sqrt(shape[1])
    return 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise


def test_uniad_gives_the_map_of_its_authors_code():
    """At full size, with every tensor filled from its name."""
    model = mintad.UniAD(272, 14, 14, 15).eval()
    for ours, tensor in model.transformer.named_parameters():
        theirs = re.sub("^(row|col)_embed", r"pos_embed.\1_embed", ours)
        theirs = re.sub("^(en|de)coder", r"transformer.\1coder.layers", theirs)
        theirs = re.sub("^norm", "transformer.decoder.norm", theirs)
        tensor.data = fill(theirs, tensor.shape)
    for i in range(4):
        name = f"transformer.decoder.layers.{i}.learned_embed.weight"
        model.learned.data[0, i] = fill(name, (196, 256))
    f = torch.randn(2, 272, 14, 14, generator=torch.Generator().manual_seed(77))
    f, r, _, _ = model(f.flatten(2).transpose(1, 2))
    s = (f - r).norm(dim=-1).view(2, 1, 14, 14)
    s = F.interpolate(s, (224, 224), mode="bilinear", align_corners=True).flatten()
    values = json.loads(Path(__file__).with_name("uniad_values.json").read_text())
    close(s[:: len(s) // 64][:64], torch.tensor(values["map"]), rtol=1e-4, atol=1e-4)


def reference(n, f, queries, mask=None, token=None):
    """Transformer n in training, as its authors wrote it; queries: L of B x P x D."""

    def attention(layer, q, k, v):
        return dropout(layer(q, k, v, attn_mask=mask, need_weights=False)[0])

    def feed_forward(m, x):
        return dropout(m.linear2(dropout(m.linear1(x).relu())))

    n.train()
    dropout = partial(F.dropout, p=0.1)
    torch.manual_seed(1)
    x = n.input_proj(f + torch.randn_like(f) * 20 * f.norm(dim=-1, keepdim=True) / C)  # jitter
    pairs = [(row, col) for row in n.row_embed.weight for col in n.col_embed.weight]
    pos = torch.stack([torch.cat([col, row]) for row, col in pairs])  # P x D
    if token is not None:
        x = torch.cat([x, token.unsqueeze(1)], 1)
        pos = torch.cat([pos, torch.zeros(1, D)])
    for m in n.encoder:
        x = m.norm1(x + attention(m.self_attn, x + pos, x + pos, x))
        x = m.norm2(x + feed_forward(m, x))
    memory = x
    for m, q in zip(n.decoder, queries, strict=True):
        q = m.norm1(q + attention(m.self_attn, q + pos, memory + pos, memory))
        q = m.norm2(q + attention(m.multihead_attn, q + pos, x + pos, x))
        x = m.norm3(q + feed_forward(m, q))
    return n.output_proj(n.norm(x))[:, :P]


def in_training(model, f):
    """What the model returns but for what is None, with the dropout and jitter of reference."""
    model.train()
    torch.manual_seed(1)
    return [x for x in model(f, LABEL) if x is not None]


@pytest.mark.parametrize("query", ["layerwise", "per-class", "token", "text --text FILE"])
def test_uniad_has_table_4s_queries(query):
    model = noisy(small(f"--uniad --query {query}").model)
    f = torch.randn(B, P, C)
    mask = mintad.neighbour_mask(H, W)
    token = None
    if query == "per-class":
        queries = model.learned[LABEL].unbind(1)
    elif query.startswith("text"):  # at every position and layer
        queries = [model.project(model.text[LABEL]).unsqueeze(1).expand(B, P, D)] * 2
    else:
        queries = [q.expand(B, -1, D) for q in model.learned[0]]
    if query == "token":  # that all positions see
        token = model.token(F.one_hot(LABEL, K).float())
        mask = F.pad(mask, (0, 1, 0, 1))
    r = reference(model.transformer, f, queries, mask, token)
    close(in_training(model, f), [f, r])


# --------------------------------------------------------------------------- the model of Figure 3

WHERE_Z = {  # the prompt's z of f' and the class
    "feature": lambda prompt, f_: prompt(f_, None)[0],
    "label": lambda prompt, f_: prompt.project(F.one_hot(LABEL, K).float()),
    "image": lambda prompt, f_: prompt.project(f_.mean(1)),
}


@pytest.mark.parametrize("prompt", WHERE_Z)
@pytest.mark.parametrize("query", ["inr", "mlp", "learned"])
def test_z_and_the_query_are_those_of_tables_4_5_and_9(query, prompt):
    model = noisy(small(f"--prompt {prompt} --query {query}").model)
    model.mean = torch.randn(C)
    model.std = torch.rand(C) + 0.5
    f = torch.randn(B, P, C)
    f_ = F.linear((f - model.mean) / model.std, model.adapter.weight, model.adapter.bias)
    z = WHERE_Z[prompt](model.prompt, f_)
    if query == "inr":
        q = model.inr(model.positions, z)
    elif query == "mlp":  # Sec. 0.B.6
        one, two, three = linears(model.query)
        q = three(two(one(z).relu()).relu()).view(B, P, D)
    else:
        q = model.query.q.expand(B, P, D)
    r = reference(model.transformer, f_, [q, q])  # the same in each layer
    close(in_training(model, f)[:2], [f_, r])


def test_prior_and_logits_are_of_the_inrs_output_and_of_z():
    """Also where the transformer gets another query (Table 5, row 5)."""
    model = noisy(small("--query learned").model)
    f = torch.randn(B, P, C)
    z, logits = model.prompt(F.linear(f, model.adapter.weight, model.adapter.bias), None)
    one, two, three = linears(model.distribution)  # Table 14
    three.weight *= 100
    q = model.inr(model.positions, z)
    mu, log_sigma = three(F.leaky_relu(two(F.leaky_relu(one(q))))).chunk(2, -1)
    close(in_training(model, f)[2:], [logits, (mu, log_sigma.clamp(-5, 5))])


ABSENT = {  # a flag, and what of adapter, classifier and prior a model then has not
    "--no-adapter": "adapter",
    "--no-cls-loss": "classifier",
    "--no-prior-loss": "prior",
    "--query mlp": "prior",
    "--prompt label": "classifier",
    "--prompt image": "classifier",
    "--query learned --no-prior-loss --no-cls-loss": "classifier prior",
}


@pytest.mark.parametrize("line", ABSENT)
def test_a_part_that_is_switched_off_is_absent_and_only_that(line):
    model = small(line).model
    f = torch.randn(B, P, C)
    _, _, logits, gaussian = model(f, LABEL)
    parts = {"adapter": [*model.adapter.parameters()], "classifier": logits, "prior": gaussian}
    assert [name for name, x in parts.items() if x is None or x == []] == ABSENT[line].split()


def test_under_bfloat16_the_map_the_losses_and_the_sine_are_in_float32():
    for line in "", "--uniad":
        model = noisy(small(line).model)
        with torch.autocast("cpu", torch.bfloat16):
            f_, r, logits, gaussian = model(torch.randn(B, P, C), LABEL)
        _, losses = mintad.objective(model, (f_, r, logits, gaussian), LABEL)
        found = f_, r, *(gaussian or ()), *losses.values()
        assert {x.dtype for x in found} == {torch.float32}
    inr = mintad.INR()
    sines = []
    inr.synthesis[0].register_forward_hook(lambda module, inputs, y: sines.append(y))
    with torch.autocast("cpu", torch.bfloat16):
        inr(torch.randn(P, 3), torch.randn(B, 32))
    assert sines[0].dtype == torch.float32


@pytest.mark.parametrize("line", ["", *ABSENT, "--uniad", "--uniad --query token"])
def test_every_parameter_of_a_variant_gets_a_gradient(line):
    """DistributedDataParallel wants it so."""
    model = small(line).model
    mintad.objective(model, model(torch.randn(B, P, C), LABEL), LABEL)[0].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("script", ["mintad", "minimaxad"])
def test_every_numbered_equation_of_the_paper_stands_in_its_file(script):
    """Both papers number theirs from 1 to 9."""
    text = Path(mintad.__file__).with_name(f"{script}.py").read_text()
    found = re.findall(r"Eq\. (\d(?:(?:, | and )\d)*)", text)
    assert set(re.findall(r"\d", " ".join(found))) == set("123456789")


# ------------------------------------------------------------------------------- Eq. 1, 4, 5 and 6


@pytest.mark.parametrize(
    "line, literal, factor",
    [("", False, 2 / 2**2 + 0.1), ("", True, 0), ("--no-adapter", False, 0)],
)
def test_loss_is_equation_6_and_detaches_nothing(line, literal, factor):
    """With the determinants of Eq. 3 as at objective, or as printed."""
    model = small(line).model
    W = torch.randn(C, C)
    if line == "":
        model.adapter.weight.data = W
    inputs = torch.randn(3, B, P, C, requires_grad=True)
    f_, r, mu = inputs
    sigma = torch.rand(B, P, C) + 0.5
    logits = torch.randn(B, K)
    ce = -sum(logits[b].softmax(0)[LABEL[b]].log() for b in range(B)) / B  # Eq. 1
    prior = -torch.distributions.Normal(mu, sigma).log_prob(f_).mean()  # Eq. 4
    mse = ((r - f_) ** 2).mean()  # Eq. 5
    expected = mse + 1.0 * ce + 0.1 * prior - factor * torch.linalg.det(W).abs().log() / C
    found, logged = mintad.objective(model, (f_, r, logits, (mu, sigma.log())), LABEL, literal)
    close(found, expected)
    log_det = torch.linalg.det(W).abs().log() / C if factor else torch.tensor(0.0)
    accuracy = (logits.argmax(1) == LABEL).float().mean()
    values = {"mse": mse, "std f'": f_.std(), "ce": ce, "accuracy": accuracy}
    values |= {"log det": log_det, "prior": prior - log_det}
    close(logged, {key: values[key] for key in logged})
    close(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs))


def test_model_detaches_nothing():
    """The adapter's gradient is the slope of the loss."""
    model = small().model.eval()
    f = torch.randn(B, P, C)
    directions = torch.randn(8, C, C)

    def loss(step):
        model.adapter.weight.data = torch.eye(C) + step
        return mintad.objective(model, model(f, LABEL), LABEL)[0]

    slopes = torch.stack([loss(1e-4 * x) - loss(-1e-4 * x) for x in directions]) / 2e-4
    loss(0).backward()
    found = (model.adapter.weight.grad * directions).sum((1, 2))
    assert (found - slopes).norm() < 0.05 * slopes.norm()


# ---------------------------------------------------------------------- Eq. 7: map, score and class


def pooled_maximum(s):
    return max(s[i : i + 16, j : j + 16].mean() for i, j in np.ndindex(9, 9))


@pytest.mark.parametrize(
    "line, aligned, score",
    [
        ("", True, torch.max),  # the corners stay in place, as the features were sampled
        ("--pool area", False, torch.max),  # the cells do
        ("--data cifar10", True, torch.mean),
        ("--uniad", True, pooled_maximum),
        ("--uniad --data cifar10", True, torch.mean),
    ],
)
def test_map_is_the_residuals_length_enlarged_and_gives_the_score(line, aligned, score):
    detector = noisy(small(f"--size 24 {line}"))
    detector.whitening.normal_()  # not for this distance
    f_, r, _, _ = detector.model(detector.backbone(IMAGE))
    s = ((f_ - r) ** 2).sum(-1).sqrt().view(B, 1, H, W)
    s = F.interpolate(s, (24, 24), mode="bilinear", align_corners=aligned).squeeze(1)
    close(detector(IMAGE)[:2], (s, torch.stack([score(x) for x in s])))


# ---------------------------------------------------------------------------------------- training

# Black and white; of classes a and b 2 images each, the others of class c.
IMAGES = 255 * np.random.default_rng(0).integers(0, 2, (40, 2 * H, 2 * W, 3), np.uint8)
LABELS = torch.arange(40).remainder(20).clamp(max=2)
SAMPLES = [data.Sample(str(i), 0, "abc"[LABELS[i]], "", None, IMAGES[i]) for i in range(40)]
PIXELS = torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 255
FEATURES = Cells().eval()(PIXELS)
HELD = np.flatnonzero(data.hold_out(SAMPLES, 0.3))
TRAINED = np.delete(range(40), HELD)


@cache
def train(line):
    """Two epochs of five steps on IMAGES: the model before them, detector, state, the last line of
    the log; and of each step which images it took and the random state."""
    steps = []
    said = []

    def see(model, inputs):
        if model.training:
            same = (FEATURES == inputs[0].unsqueeze(1)).flatten(2).all(2)
            steps.append((same.int().argmax(1).tolist(), torch.get_rng_state()))

    with tempfile.TemporaryDirectory() as folder:
        line += f" --distance mahalanobis --size 29 --epochs 2 --batch-size 9 --out {folder}"
        torch.manual_seed(0)
        detector = small(line)
        model = deepcopy(detector.model)
        detector.model.register_forward_pre_hook(see)
        state = mintad.new_state(settings(line), [*"abc"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mintad.log, "info", said.append)
            mintad.fit(detector, state, settings(line), SAMPLES, IMAGES, torch.device("cpu"))
    return model, detector, state, said[-1], steps


WARM = [1e-4 * (1 + step / 100) for step in range(8)]


@pytest.mark.parametrize(
    "line, rates",
    [
        ("--holdout 0.3", [1e-4] * 5 + [1e-5]),
        ("--optimizer muon --lr 5e-4 --weight-decay 9 --literal", WARM + [1e-4, 5e-5]),
    ],
)
def test_training_is_this_loop(line, rates):
    """On the batches and with the noise that it saw."""
    args = settings(line)
    start, detector, _, said, steps = train(line)
    model = deepcopy(start)
    images = list({i for index, _ in steps for i in index})
    model.mean = FEATURES[images].mean((0, 1))
    model.std = FEATURES[images].std((0, 1))
    others = dict(model.named_parameters())
    optimizers = []
    if args.optimizer == "muon":
        pattern = "transformer.*(proj|linear).*weight"
        matrices = [others.pop(name) for name in [*others] if re.match(pattern, name)]
        options = {"momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
        muon = torch.optim.Muon(matrices, weight_decay=args.weight_decay, **options)
        optimizers.append((muon, 4))
    adamw = torch.optim.AdamW(others.values(), weight_decay=args.weight_decay)
    optimizers.append((adamw, 1))
    values = []
    for (index, random), rate in zip(steps, rates, strict=True):
        torch.set_rng_state(random)
        outputs = model(FEATURES[index], LABELS[index])
        loss, logged = mintad.objective(model, outputs, LABELS[index], args.literal)
        values.append(torch.stack([*logged.values()]) * len(index) / len(images))
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        for optimizer, scale in optimizers:
            optimizer.param_groups[0]["lr"] = scale * rate
            optimizer.step()
    models = start, model, detector.model
    start, expected, found = (nn.utils.parameters_to_vector(m.parameters()) for m in models)
    assert (found - expected).norm() < 1e-3 * (expected - start).norm()
    told = [re.search(rf"{name} (\S+),", said)[1] for name in logged]
    assert [*map(float, told)] == pytest.approx(
        sum(values[len(values) // 2 :]).tolist(), rel=1e-2, abs=1e-4
    )


def test_adamw_too_warms_up_to_a_rate_above_the_papers():
    rates = [mintad.learning_rate(settings("--lr 5e-4"), step, 10) for step in range(10)]
    assert rates == pytest.approx(WARM + [5e-5] * 2)


def test_a_channel_that_hardly_moves_is_not_blown_up():
    _, std = mintad.channel_statistics(torch.randn(50, 20, 2) * torch.tensor([2, 1e-9]))
    assert std[1].item() == pytest.approx(0.01 * std[0].item() / 2, rel=1e-3)


@pytest.mark.parametrize("line, images", [("", range(40)), ("--holdout 0.3", TRAINED)])
def test_each_epoch_has_all_images_but_held_out_ones_and_its_own_order_and_noise(line, images):
    *_, steps = train(line)
    order = sum((index for index, _ in steps), [])
    first, second = np.split(np.array(order), 2)
    assert sorted(first) == sorted(second) == [*images]
    assert [*first] != [*second]
    noise, other = (random for _, random in steps[:: len(steps) // 2])
    assert not torch.equal(noise, other)
    *_, steps = train(f"{line} --seed 2")
    assert steps[0][0] != order[:9]


@pytest.mark.parametrize("line, images", [("", range(40)), ("--holdout 0.3", HELD)])
def test_each_class_is_calibrated_by_its_held_out_or_else_its_training_images(line, images):
    _, detector, state, *_ = train(line)
    for k, cls in enumerate("abc"):
        mine = [i for i in images if LABELS[i] == k]
        expected = detector(PIXELS[mine])[1].tolist()
        assert state["calibration"][cls]["scores"] == pytest.approx(expected, rel=1e-4)
        assert state["calibration"][cls]["held_out"] == (line != "")


def test_features_that_do_not_fit_are_extracted_again_and_train_the_same(monkeypatch):
    _, kept, *_ = train("")
    monkeypatch.setattr(os, "sysconf", lambda name: 1)
    _, again, *_ = train.__wrapped__("")  # not the kept one
    close(again.state_dict(), kept.state_dict())


def test_features_are_kept_in_half_precision():
    images = np.random.default_rng(0).integers(0, 256, (2, 2 * H, 2 * W, 3), np.uint8)
    features = mintad.Features(Cells().eval(), images, np.arange(2), torch.device("cpu"))
    expected = Cells().eval()(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    close(features[torch.arange(2)].float(), expected, rtol=1e-3, atol=0)


def test_processes_draw_noise_of_their_own(monkeypatch):
    """Here with one as if it were the second of two."""
    *_, first = train("")
    monkeypatch.setattr(mintad, "RANK", 1)
    *_, second = train("--seed 1")
    assert not torch.equal(first[0][1], second[0][1])


@pytest.mark.parametrize("line", ["--prompt label", "--uniad --query per-class"])
def test_a_variant_that_needs_the_class_gets_it_and_not_whether_there_is_a_defect(line):
    detector = noisy(small(f"{line} --size 24"))
    samples = [data.Sample("", 1, cls, "") for cls in "bacabb"]
    s, scores = mintad.detect(detector, IMAGES[:6], samples, [*"abc"], torch.device("cpu"))
    expected = detector(PIXELS[:6], torch.tensor([1, 0, 2, 0, 1, 1]))
    close([torch.tensor(s), torch.tensor(scores)], expected[:2])


def test_texts_are_the_rows_of_the_models_classes_in_their_order(tmp_path):
    rows = {cls: torch.randn(1, 5) for cls in ("other", *"cab")}
    save_file(rows, tmp_path / "texts.safetensors")
    found = mintad.read_texts(tmp_path / "texts.safetensors", [*"abc"])
    close(found, torch.cat([rows[cls] for cls in "abc"]))


KNOWN = "", "--prompt label", "--uniad --query per-class"


@pytest.mark.parametrize("line", [*KNOWN, "--no-cls-loss", "--prompt image"])
def test_mahalanobis_distance_is_by_the_training_images_of_the_class(line):
    """By their residuals in evaluation mode; by all images' where the class is unknown."""
    _, detector, *_ = train(line)
    f_, r, _, _ = detector.model(FEATURES, LABELS)
    d = (f_ - r).detach().double().numpy()  # 40 x P x C
    quarter = np.add.outer([0, 0, 0, 2, 2], [0, 0, 0, 0, 1, 1, 1, 1]).flatten()  # P
    expected = np.zeros((40, P))
    for k in range(3):
        mine = LABELS.numpy() == k
        known = d[mine] if line in KNOWN else d
        samples = [known[:, quarter == i].reshape(-1, C) for i in range(4)]
        moments = [x.T @ x / len(x) for x in samples]
        for i in range(4):
            S = (moments[i] + np.mean(moments, 0)) / 2
            inverse = np.linalg.inv(S + 0.02 * np.trace(S) / C * np.eye(C))
            at = np.ix_(mine, quarter == i)
            expected[at] = np.sqrt((d[at] @ inverse * d[at]).sum(-1))
    s, _, _ = detector(PIXELS, LABELS)
    s = s[:, ::7, ::4].flatten(1).detach()  # at the positions
    np.testing.assert_allclose(s, expected, rtol=1e-3)
