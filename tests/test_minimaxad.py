"""What minimaxad.py computes: encoder, model, losses, training, map and score, settings.

Two golden files hold values of the authors' own code: unireplknet_n_features.safetensors (an image
and the encoder's three maps of it, every tensor of the network being fill() of its key) and
minimaxad_losses.safetensors (maps of encoder and decoder, S, two losses, gradients; three cases).
"""

import copy
import io
import json
import re
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hub import serve_hub  # noqa: F401
from safetensors.torch import load_file, save_file
from scipy import ndimage, stats
from torch import nn

import data
import minimaxad

HERE = Path(__file__).parent
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
IMAGES = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).contiguous() / 255
MEAN = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
STD = torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


class SmallEncoder(nn.Module):
    """Takes the place of the ImageNet network where a test is about what comes after it."""

    channels = [8, 16, 32]
    kernels = [[3], [3], [3]]

    def __init__(self):
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8))
        self.layers = nn.ModuleList([stem, nn.Conv2d(8, 16, 2, 2), nn.Conv2d(16, 32, 2, 2)])
        self.register_buffer("mean", MEAN)
        self.register_buffer("std", STD)
        self.requires_grad_(False)

    def forward(self, x):
        return [x := layer(x) for layer in self.layers]


def randomised(network, scale=0.3):
    """Every parameter and statistic away from where it starts; in evaluation mode."""
    for key, tensor in network.state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point():
            tensor.add_(scale * torch.randn_like(tensor))
    return network.eval()


def small_model():
    model = minimaxad.MiniMaxAD(SmallEncoder()).eval()
    randomised(model.bottleneck)
    randomised(model.decoder)
    return model


# ------------------------------------------------------------------------------------ the encoder


def fill(key, shape):
    """A tensor whose values depend only on its key and shape."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    if key.endswith("running_var"):
        return 1 + 0.1 * noise.abs()
    if noise.ndim >= 2 and min(shape[:2]) > 1:
        return noise / noise[0].numel() ** 0.5
    if noise.ndim == 4:
        return 0.2 * noise
    return 1 + 0.1 * noise if key.endswith(("weight", "gamma")) else 0.1 * noise


def test_unireplknet_n_is_downloaded_and_gives_the_authors_features(hub):
    """The file has their names, and the head, which is not needed, but not the last stage."""
    shapes = json.loads((HERE / "unireplknet_n_keys.json").read_text())
    needed = {key: shape for key, shape in shapes.items() if not re.match(".*(s.3|tracked)", key)}
    file = io.BytesIO()
    torch.save({"model": {key: fill(key, shape) for key, shape in needed.items()}}, file)
    name = "DingXiaoH/UniRepLKNet/unireplknet_n_in1k_224_acc81.64.pth"
    hub.files[name] = file.getvalue()

    encoder = minimaxad.load_encoder("unireplknet_n", None)
    golden = load_file(HERE / "unireplknet_n_features.safetensors")
    features = [x[:1] for x in encoder(golden["image"])]
    expected = [golden[f"feature{k}"] for k in range(3)]
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("download", [True, False])
def test_a_timm_network_gives_its_stages_maps(download, hub, tmp_path):
    net = randomised(timm.create_model("resnet18"), 0.01)
    file = tmp_path / "resnet18.safetensors"
    save_file(net.state_dict(), file)
    if download:
        hub.files["timm/resnet18.a1_in1k/model.safetensors"] = file.read_bytes()
    encoder = minimaxad.load_encoder("resnet18", None if download else str(file))
    image = torch.randn(2, 3, 64, 96)
    x = net.maxpool(net.act1(net.bn1(net.conv1(image))))
    close(encoder(image), [x := layer(x) for layer in (net.layer1, net.layer2, net.layer3)])


def test_an_encoder_is_frozen_and_standardises_as_it_was_trained():
    names = "unireplknet_a", "resnet18", "tf_efficientnet_lite0"
    *imagenets, other = encoders = [minimaxad.load_encoder(name, "none") for name in names]
    for encoder in imagenets:
        close(encoder.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
        close(encoder.std.flatten(), torch.tensor([0.229, 0.224, 0.225]))
    assert (other.mean == 0.5).all() and (other.std == 0.5).all()
    assert not [p for encoder in encoders for p in encoder.parameters() if p.requires_grad]
    norms = [module for module in other.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not [norm for norm in norms if norm.training or (norm.running_var != 1).any()]


# ------------------------------------------------------------------------ layers, and their fusion


def test_grn_is_equations_5_and_6():
    grn = randomised(minimaxad.GRN(6)).double()
    X = 1e-5 * torch.randn(2, 3, 4, 6).double()  # so small that Eq. 5's constant counts
    g = X.square().sum((1, 2)).sqrt()  # B x C
    n = (g / (g.sum(1, keepdim=True) / 6 + 1e-6))[:, None, None]  # Eq. 5
    expected = grn.gamma * (X * n) + grn.beta + X  # Eq. 6
    torch.testing.assert_close(grn(X), expected, rtol=0, atol=1e-9)


def test_a_block_starts_as_almost_the_identity():
    x = torch.randn(8, 16, 12, 12, dtype=torch.double)
    added = minimaxad.Block(16, 13).double()(x) - x
    assert added.std().item() == pytest.approx(1e-6, rel=0.01)  # of unit variance
    assert torch.equal(minimaxad.GRN(12)(x), x)


def test_gradients_of_the_dilated_convolutions_in_bfloat16_are_those_in_float32():
    """Channels last, torch 2.14 on a CPU has a wrong gradient here, off by more than its norm."""
    layer = minimaxad.DilatedReparam(64)
    x, g = torch.randn(2, 1, 64, 32, 32)
    kernels = [p for p in layer.parameters() if p.ndim == 4]
    expected = torch.autograd.grad(layer(x), kernels, g)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.contiguous(memory_format=torch.channels_last))
    for found, exact in zip(torch.autograd.grad(y, kernels, g), expected, strict=True):
        assert (found - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("convert", [nn.Sequential, nn.SyncBatchNorm.convert_sync_batchnorm])
def test_fusing_leaves_the_output_as_it_was(convert):
    blocks = minimaxad.stage(6, [13, 3])
    network = nn.Sequential(blocks, minimaxad.Residual(6, 3, 12, "double"))
    network = convert(randomised(network).double())
    x = torch.randn(2, 6, 20, 17, dtype=torch.double)
    fused = minimaxad.fuse(network)
    torch.testing.assert_close(fused(x), network(x), rtol=1e-9, atol=1e-9)
    assert not [m for m in fused.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


# -------------------------------------------------------------------------------------- the model


def test_the_model_is_the_papers_figure_2():
    model = small_model()
    maps = model.encoder((IMAGES - MEAN) / STD)
    from1, from2, compress = model.bottleneck.children()

    def halved(x, step):
        return step[1](F.conv2d(x, step[0].weight, stride=2, padding=1)).relu()

    one = halved(halved(maps[0], from1[0]), from1[2])
    joined = torch.cat([one, halved(maps[1], from2[0]), maps[2]], 1)
    x = compress[1](F.conv2d(joined, compress[0].weight, stride=2, padding=1))
    outputs = []
    for up, norm, blocks in model.decoder:
        x = F.conv_transpose2d(x, up.weight, stride=2).permute(0, 2, 3, 1)
        x = F.layer_norm(x, x.shape[3:], norm.weight, norm.bias, 1e-6)
        x = blocks(x.permute(0, 3, 1, 2))
        outputs.append(x)
    close(model(IMAGES), (maps, outputs[::-1]))


LIGHT = [[3] * 2, [13] * 2, [13] * 6]
SIZES = [("a", 40, LIGHT), ("f", 48, LIGHT), ("p", 64, LIGHT)]
SIZES += [("n", 80, [[3] * 2, [13] * 2, [13] * 8]), ("t", 80, [[3] * 3, [13] * 3, [13, 3] * 9])]


@pytest.mark.parametrize("name, c, kernels", SIZES)
def test_the_fused_network_takes_the_papers_119_mb(name, c, kernels):
    """Figure 2 counted layer by layer: each stage once in the encoder and once in the decoder."""

    def block(c, kernel):
        attention = 2 * c * c // 4 + c // 4 + c
        ffn = 2 * 4 * c * c + 4 * c + c
        grn = 4 * c + 1  # gamma; beta is in the bias of the layer after it
        return kernel**2 * c + c + attention + ffn + grn + c  # the last: layer scale

    stages = sum(block(c * 2**i, kernel) for i in range(3) for kernel in kernels[i])
    stem = 9 * 3 * c // 2 + 3 * c // 2 + 9 * c // 2 * c + 3 * c
    down = 9 * (2 + 8) * c**2 + 3 * (2 + 4) * c
    fusion = 9 * (2 + 8 + 8 + 12 * 8) * c**2 + (2 + 4 + 4) * c + 2 * block(8 * c, 3)
    up = 4 * (32 + 8 + 2) * c**2 + 2 * (4 + 2 + 1) * c

    with torch.device("meta"):
        encoder = minimaxad.UniRepLKNet(f"unireplknet_{name}")
        model = minimaxad.MiniMaxAD(minimaxad.fuse(encoder))
    count = sum(x.numel() for x in minimaxad.Detector(model).state_dict().values())
    assert count == 2 * stages + stem + down + fusion + up
    assert name != "n" or 4 * count // 2**20 == 119  # Sec. 1: "just 119MB of storage"


STARTS = {
    "bottleneck.compress.0": stats.norm(0, (2 / (64 * 3 * 3)) ** 0.5),  # Kaiming, fan out
    "decoder.0.2.0.dwconv": stats.norm(0, (2 / (32 * 3 * 3)) ** 0.5),
    "decoder.0.0": stats.uniform(-(128**-0.5), 2 * 128**-0.5),  # torch's, of 32 x 2 x 2
    "decoder.0.2.0.pwconv1": stats.uniform(-(32**-0.5), 2 * 32**-0.5),
}


@pytest.mark.parametrize("layer", STARTS)
def test_convolutions_start_as_kaimings_the_others_as_torchs(layer):
    weight = minimaxad.MiniMaxAD(SmallEncoder()).get_submodule(layer).weight
    assert stats.kstest(weight.detach().flatten(), STARTS[layer].cdf).pvalue > 0.001


# ----------------------------------------------------------------------------------- the baseline


@pytest.mark.parametrize(
    "name, sizes", [("resnet18", (64, 128, 128)), ("resnet50", (256, 128, 512))]
)
def test_a_stage_of_the_baseline_is_a_resnets(name, sizes):
    theirs = randomised(timm.create_model(name).layer2, 0.01)
    ours = minimaxad.residual_stage(*sizes, "halve", len(theirs)).eval()
    values = theirs.state_dict().values()  # both in the order in which they are applied
    ours.load_state_dict(dict(zip(ours.state_dict(), values, strict=True)))
    x = torch.randn(2, sizes[0], 9, 8)
    close(ours(x), theirs(x))


def test_the_baseline_is_reverse_distillations():
    """Its decoder is as deep as the encoder's stages 1, 2, 3, in this order: not mirrored."""
    with torch.device("meta"):
        model = minimaxad.MiniMaxAD(minimaxad.load_encoder("wide_resnet50_2", "none"), "rd")
        maps = model(torch.zeros(2, 3, 64, 64))
    assert [x.shape for x in maps[0]] == [x.shape for x in maps[1]]
    stages = [model.bottleneck.compress, *model.decoder]
    assert [len(stage) for stage in stages] == [3, 3, 4, 6]
    assert [stage[1].residual[0][0].out_channels for stage in stages] == [1024, 512, 256, 128]


# -------------------------------------------------------------------------------------- the losses


@pytest.mark.parametrize("case, maps", [("hard", "hard"), ("lax", "hard"), ("limit", "limit")])
def test_s_the_losses_and_the_gradient_are_the_authors(case, maps):
    """hard and lax share their maps, with other quantiles. Only limit takes Eq. 8's beta."""
    golden = load_file(HERE / "minimaxad_losses.safetensors")
    encoder_maps = [golden[f"encoder{k}"] for k in range(3)]
    decoder_maps = [golden[f"{maps}.decoder{k}"].requires_grad_() for k in range(3)]
    S = minimaxad.anomaly_map(encoder_maps, decoder_maps, 64, "nearest")
    loss = minimaxad.adc_loss(S, *golden[f"{case}.p"].tolist())
    gradients = torch.autograd.grad(loss, decoder_maps, retain_graph=True)
    found = {f"{case}.grad{k}": gradients[k] for k in range(3)}
    found |= {f"{maps}.map": S[:, ::4, ::4], f"{case}.adc": loss[None]}
    found |= {f"{case}.global": minimaxad.global_loss(encoder_maps, decoder_maps)[None]}
    expected = {key: golden[key] for key in found}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


def equation_8(S, p_hard, p_lim):
    alpha = np.quantile(S, p_hard)  # of S, not of S^2, as printed
    beta = np.quantile(S**2, p_lim)
    sigma = S.std(ddof=1)
    A = (S**2 >= alpha - sigma**2).sum()
    N = max(1, S.size * (1 - p_lim))
    mined = S**2 >= (alpha if A >= N else beta) - sigma**2
    return (S[mined] ** 2).mean()


@pytest.mark.parametrize("p_lim", [0.5, 0.75, 0.9, 1])
@pytest.mark.parametrize("largest", [0.2, 1, 2, 6])
def test_the_adc_loss_is_equation_8(largest, p_lim):
    S = largest * np.random.default_rng(0).random((2, 4, 8))
    p_hard = np.linspace(0, 1, 101)
    found = [minimaxad.adc_loss(torch.tensor(S), p, p_lim).item() for p in p_hard]
    assert found == pytest.approx([equation_8(S, p, p_lim) for p in p_hard])


@pytest.mark.parametrize("largest", [1, 0.5])  # of which Eq. 8 takes alpha, then beta
def test_the_losses_quantiles_are_the_papers_by_default(largest):
    S = largest * np.random.default_rng(0).random((2, 50, 50)) ** 9
    assert minimaxad.adc_loss(torch.tensor(S)).item() == pytest.approx(
        equation_8(S, 0.9999, 0.9995)
    )
    hard = S**2 >= np.quantile(S**2, 0.9995)
    assert minimaxad.local_hm_loss(torch.tensor(S)).item() == pytest.approx((S[hard] ** 2).mean())


def test_the_local_cosine_loss_is_equation_1():
    maps = [[torch.randn(2, 8, side, side) for side in (8, 4, 2)] for _ in "ed"]
    expected = 0
    for e, d in zip(*maps, strict=True):
        cosine = (e * d).sum(1) / e.norm(dim=1) / d.norm(dim=1)
        expected += (1 - cosine).sum() / 2 / e.shape[2] ** 2
    close(minimaxad.local_cosine_loss(*maps), expected)


def test_the_local_losses_are_equations_7_and_9():
    S = torch.arange(13.0).view(1, 1, 13)
    assert minimaxad.local_loss(S) == sum(i**2 for i in range(13)) / 13
    assert minimaxad.local_hm_loss(S, 0.75) == (9**2 + 10**2 + 11**2 + 12**2) / 4


def test_where_a_side_does_not_halve_the_decoders_map_is_resized_nearest():
    """As at 400 pixels, where the encoder has 100, 50, 25 and the decoder 104, 52, 26."""
    e = torch.randn(2, 8, 10, 10)
    d = torch.randn(2, 8, 12, 12)
    index = torch.arange(10) * 12 // 10
    resized = d[:, :, index][:, :, :, index]
    S, expected = (minimaxad.anomaly_map([e], [x], 40, "nearest") for x in (d, resized))
    close(S, expected)
    close(minimaxad.global_loss([e], [d]), minimaxad.global_loss([e], [resized]))


# ------------------------------------------------------------------------------------ the training


def train(model, pixels, folder, flags=""):
    line = f"--size 72 --crop 64 --holdout 0 --epochs 1 --out {folder} {flags}"
    args, _ = minimaxad.parse_args(line.split())
    samples = [data.Sample("toy", 0, "a", "", pixels=x) for x in pixels]
    state = minimaxad.new_state(args, ["a"])
    minimaxad.fit(model, state, args, samples, pixels, torch.device("cpu"))


LOSSES = {
    "global": lambda maps, S: minimaxad.global_loss(*maps),
    "local": lambda maps, S: minimaxad.local_loss(S),
    "local-hm": lambda maps, S: minimaxad.local_hm_loss(S, 0.9),
    "local-cosine": lambda maps, S: minimaxad.local_cosine_loss(*maps),
    "adc": lambda maps, S: minimaxad.adc_loss(S, 0.8, 0.9),
}
RUNS = [*(("minimax", loss) for loss in LOSSES), ("rd", "global")]


@pytest.mark.parametrize("arch, loss", RUNS)
def test_training_is_the_papers_step_by_step(arch, loss, tmp_path):
    """On an image three times, so that the order makes no difference: batches of two and of one."""
    model = small_model()
    for layer in model.modules():
        if isinstance(layer, minimaxad.GRN):  # a BatchNorm follows: the gradient is rounding only
            layer.beta.requires_grad_(False)
    twin = copy.deepcopy(model)
    flags = f"--arch {arch} --loss {loss} --p-hard 0.8 --p-lim 0.9 --epochs 3 --batch-size 2"
    train(model, PIXELS[[0] * 3], tmp_path, f"{flags} --lr 0.01 --gamma 0.5 --weight-decay 0.2")

    trained = nn.ModuleList([twin.bottleneck, twin.decoder]).train()
    options = {"lr": 0.01, "weight_decay": 0.2}
    if arch == "rd":
        optimizer = torch.optim.Adam(trained.parameters(), betas=(0.5, 0.999), **options)
    else:
        optimizer = torch.optim.AdamW(trained.parameters(), betas=(0.9, 0.999), **options)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(3):
        for count in 2, 1:
            maps = twin(IMAGES[[0] * count])
            S = minimaxad.anomaly_map(*maps, 64, "nearest")
            optimizer.zero_grad()
            LOSSES[loss](maps, S).backward()
            optimizer.step()
        schedule.step()
    close(model.state_dict(), twin.state_dict())


def images_seen(folder, flags):
    """Which of five images the model gets, a list for each batch of the training and then of the
    images that the threshold is found with."""
    seen = []

    def look(_, inputs):
        distances = torch.cdist(inputs[0].flatten(1), IMAGES.flatten(1))
        seen.append(distances.argmin(1).tolist())

    model = small_model()
    model.register_forward_pre_hook(look)
    train(model, PIXELS, folder, flags)
    return seen


def test_each_epoch_takes_each_image_once_in_an_order_of_its_own(tmp_path):
    first, second, *_ = images_seen(tmp_path, "--epochs 2")
    assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4]
    assert first != second
    other, *_ = images_seen(tmp_path, "--epochs 1 --seed 2")
    assert other != first


def test_the_threshold_is_found_with_images_held_back_from_training(tmp_path):
    batch, held = images_seen(tmp_path, "--holdout 0.4")
    assert (sorted(batch), held) == ([1, 3, 4], [0, 2])


@pytest.mark.parametrize("amp", [False, True])
def test_the_log_tells_the_loss_the_mined_pixels_and_how_maps_vary(amp, tmp_path, caplog):
    """The mean loss of the batches, here of two images and of one; the rest of the last batch.

    Maps that the network has in bfloat16 are compared in float32.
    """
    caplog.set_level("INFO")
    model = small_model()
    flags = "--lr 0 --p-hard 1 --p-lim 0.005 --batch-size 2" + " --amp" * amp
    train(model, PIXELS[[0] * 3], tmp_path, flags)
    model.train().encoder.eval()
    losses = []
    for count in 2, 1:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            maps = model(IMAGES[[0] * count])
        maps = [[x.float() for x in scales] for scales in maps]
        S = minimaxad.anomaly_map(*maps, 64, "nearest")
        losses.append(minimaxad.adc_loss(S, 1, 0.005).item())
    mined = (S**2 >= (S**2).quantile(0.005) - S.var()).sum()  # Eq. 8's beta
    e, d = (sum((x / x.norm(dim=1, keepdim=True)).var(correction=0) for x in xs) for xs in maps)
    line = "adc loss (.*), mined by Eq. 8 (.*) of 4096 .*encoder's maps (.*), the decoder's (.*), "
    found = map(float, re.search(line, caplog.text).groups())
    expected = [np.mean(losses), mined.item(), e.item(), d.item()]
    assert [*found] == pytest.approx(expected, rel=1e-5, abs=1e-5)


# ----------------------------------------------------------------------------------- map and score


@pytest.mark.parametrize(
    "score, border, pool",
    [
        ("max", {}, np.max),
        ("mean", {}, np.mean),
        ("top1", {"radius": 2, "mode": "constant"}, lambda x: np.sort(x, None)[-40:].mean()),
        ("max5", {"radius": 2, "mode": "constant"}, np.max),
    ],
)
def test_the_map_is_s_blurred_with_sigma_4_and_the_score_its_pool(score, border, pool):
    """Of the fifth of five images, S worked out by SciPy."""
    model = small_model()
    S = 0
    for e, d in zip(*model(IMAGES), strict=True):
        e, d = e[4].numpy(force=True), d[4].numpy(force=True)
        M = 1 - (e * d).sum(0) / np.linalg.norm(e, axis=0) / np.linalg.norm(d, axis=0)  # Eq. 3
        S = S + ndimage.zoom(M, 64 // len(M), order=1)  # Eq. 4, corners aligned
    expected = ndimage.gaussian_filter(S, 4, **border)

    detector = minimaxad.Detector(model, score)
    found, scores = minimaxad.infer(detector, PIXELS, torch.device("cpu"))
    np.testing.assert_allclose(found[4], expected, atol=1e-4)
    assert scores[4] == pytest.approx(pool(expected), rel=1e-4)
