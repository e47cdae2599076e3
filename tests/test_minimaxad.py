"""What minimaxad.py computes: the networks, Eq. 2 to 9, training, maps and scores, the settings.

Two golden files hold values of the authors' own code: unireplknet_n_features.safetensors (an image
and the encoder's three maps of it, every tensor of the network being fill() of its key) and
minimaxad_losses.safetensors (maps of encoder and decoder, S, two losses, gradients; three cases).
"""

import copy
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy import ndimage, stats
from torch import nn
from torchvision.models import resnet as torchvision_resnet

import data
import minimaxad

HERE = Path(__file__).parent
CPU = torch.device("cpu")


def fill(shapes):
    """Tensors whose values depend only on their key and shape."""
    filled = {}
    for key, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        noise = torch.randn(shape, generator=generator)
        if key.endswith("num_batches_tracked"):
            filled[key] = torch.zeros(shape, dtype=torch.long)
        elif key.endswith("running_var"):
            filled[key] = 1 + 0.1 * noise.abs()
        elif noise.ndim >= 2 and min(shape[:2]) > 1:
            filled[key] = noise / noise[0].numel() ** 0.5
        elif noise.ndim == 4:
            filled[key] = 0.2 * noise
        else:
            filled[key] = 1 + 0.1 * noise if key.endswith(("weight", "gamma")) else 0.1 * noise
    return filled


def randomised(network, scale=0.3):
    """Every parameter and statistic away from where it starts."""
    for key, tensor in network.state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point():
            tensor.add_(scale * torch.randn_like(tensor))
    return network


class SmallEncoder(nn.Module):
    """Takes the place of the ImageNet network where a test is about what comes after it."""

    channels = [8, 16, 32]
    kernels = [[3], [13, 13], [13, 3, 13]]

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8))
        self.down = nn.ModuleList([nn.Conv2d(8, 16, 2, 2), nn.Conv2d(16, 32, 2, 2)])
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, x):
        maps = [self.stem(x)]
        for down in self.down:
            maps.append(down(maps[-1]))
        return maps


class PlainModel(nn.Module):
    """Takes the place of MiniMaxAD where a test needs it fast, without BatchNorm, reproducible."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = SmallEncoder()
        self.bottleneck = nn.Identity()
        self.decoder = nn.ModuleList(nn.Conv2d(c, c, 1) for c in (8, 16, 32))

    def forward(self, image):
        maps = self.encoder(image)
        return maps, [conv(m) for conv, m in zip(self.decoder, maps, strict=True)]


def small_model():
    torch.manual_seed(0)
    return minimaxad.MiniMaxAD(SmallEncoder())


def random_maps(count):
    """Encoder's and decoder's maps of images of 32 x 32 pixels."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(count, 8, 8, 8), (count, 16, 4, 4), (count, 32, 2, 2)]
    encoder_maps = [torch.randn(shape, generator=generator) for shape in shapes]
    return encoder_maps, [e + torch.randn(e.shape, generator=generator) for e in encoder_maps]


def random_images(count):
    return np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), np.uint8)


def in_0_to_1(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255


def settings(*argv):
    return minimaxad.parse_args([str(word) for word in argv])[0]


def train(model, pixels, folder, *argv, classes="aaaaaa"):
    """Train the model on uint8 images of the classes that the letters name, for class a."""
    args = settings("--size", 64, "--holdout", 0, "--epochs", 1, "--out", folder, *argv)
    samples = [data.Sample("toy", 0, classes[i], "", pixels=x) for i, x in enumerate(pixels)]
    minimaxad.train(model, minimaxad.new_state(args, ["a"]), args, samples, pixels, CPU)


# ---------------------------------------------------------------- the encoder and its weights


@pytest.fixture(scope="module")
def tensors():
    """Under the authors' names, with the head that is not needed, without the last stage."""
    shapes = json.loads((HERE / "unireplknet_n_keys.json").read_text())
    return fill({key: shape for key, shape in shapes.items() if not re.match(".*s.3", key)})


@pytest.fixture(scope="module")
def checkpoint(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "unireplknet_n.safetensors"
    save_file(tensors, path)
    return str(path)


@pytest.fixture(scope="module")
def encoder_n(checkpoint):
    return minimaxad.load_encoder("unireplknet_n", checkpoint)


def assert_authors_features(network):
    golden = load_file(HERE / "unireplknet_n_features.safetensors")
    with torch.no_grad():
        maps = network(golden["image"])
    for k in range(3):
        torch.testing.assert_close(maps[k][:1], golden[f"feature{k}"], rtol=0, atol=1e-5)


def test_unireplknet_n_gives_the_authors_features(checkpoint):
    network = minimaxad.UniRepLKNet("unireplknet_n").eval()
    data.load_weights(network, checkpoint, minimaxad.authors_key)
    assert_authors_features(network)


def test_unireplknet_n_fused_gives_the_authors_features(encoder_n):
    assert_authors_features(encoder_n)


def test_a_loaded_encoder_has_no_batchnorm_left(encoder_n):
    assert not [m for m in encoder_n.modules() if isinstance(m, nn.BatchNorm2d)]


def test_a_loaded_encoder_is_frozen(encoder_n):
    assert not [p for p in encoder_n.parameters() if p.requires_grad]


def refusal(backbone, weights):
    with pytest.raises(data.DataError) as error:
        minimaxad.load_encoder(backbone, weights)
    return str(error.value)


NEEDED = {  # the authors' name of a tensor: what the message names
    "downsample_layers.2.1.weight": "downsample_layers.2.1.weight",
    "stages.1.0.dwconv.dil_bn_k3_5.running_var": "stages.1.0.dwconv.dil_bn_k3_5.running_var",
    "stages.2.7.act.1.gamma": "stages.2.7.grn.gamma",
}


@pytest.mark.parametrize("fault", ["missing", "misshapen"])
@pytest.mark.parametrize("key", NEEDED)
def test_a_tensor_that_is_missing_or_misshapen_is_named_in_one_line(key, fault, tensors, tmp_path):
    others = {other: tensor for other, tensor in tensors.items() if other != key}
    path = str(tmp_path / "n.safetensors")
    save_file(others if fault == "missing" else others | {key: torch.ones(7)}, path)
    assert re.fullmatch(f"{path}.*{NEEDED[key]}.*", refusal("unireplknet_n", path))


@pytest.mark.parametrize(
    "backbone, weights, hint",
    [
        ("unireplknet_n", None, "--weights"),
        ("resnet81", "none", "resnet81"),
        ("vit_tiny_patch16_224", "none", "strides"),
        ("coat_lite_tiny", "none", "coat_lite_tiny"),  # takes images of 224 pixels only
        ("mambaout_femto", "none", "mambaout_femto"),  # gives maps B x H x W x C
    ],
)
def test_an_encoder_that_cannot_be_had_is_refused_in_one_line(backbone, weights, hint):
    assert re.fullmatch(f".*{hint}.*", refusal(backbone, weights))


def test_a_timm_network_from_a_file_gives_its_stages_maps(tmp_path):
    torch.manual_seed(0)
    net = randomised(timm.create_model("resnet18"), 0.01).eval()
    state = {key: x for key, x in net.state_dict().items() if not key.startswith(("layer4", "fc"))}
    save_file(state, tmp_path / "resnet18.safetensors")
    encoder = minimaxad.load_encoder("resnet18", str(tmp_path / "resnet18.safetensors"))
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        x = net.maxpool(net.act1(net.bn1(net.conv1(image))))
        expected = [x := layer(x) for layer in (net.layer1, net.layer2, net.layer3)]
        torch.testing.assert_close(encoder(image), expected, rtol=1e-3, atol=1e-3)


def test_a_timm_network_whose_maps_fusing_would_change_is_not_fused():
    encoder = minimaxad.load_encoder("repvit_m0_9", "none")
    assert [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]


def test_a_line_tells_that_a_network_is_not_fused(caplog):
    caplog.set_level("INFO")
    minimaxad.load_encoder("repvit_m0_9", "none")
    assert "repvit_m0_9" in caplog.text


@pytest.mark.parametrize(
    "backbone, mean, std",
    [
        ("unireplknet_a", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ("tf_efficientnet_lite0", [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    ],
)
def test_an_encoder_has_the_mean_and_deviation_that_it_was_trained_with(backbone, mean, std):
    encoder = minimaxad.load_encoder(backbone, "none")
    found = torch.cat([encoder.mean, encoder.std]).flatten().tolist()
    assert found == pytest.approx(mean + std)


# ---------------------------------------------------------------- fusion


@pytest.mark.parametrize(
    "network",
    [
        minimaxad.stage(6, [13, 3]),
        nn.Sequential(nn.Conv2d(6, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.ConvTranspose2d(6, 4, 2, 2, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        minimaxad.Residual(6, 3, 12, "up"),
    ],
    ids=["blocks", "convolution", "transposed convolution", "residual block"],
)
def test_fusing_leaves_the_output_as_it_was(network):
    torch.manual_seed(0)
    network = randomised(network).double().eval()
    x = torch.randn(2, 6, 20, 17, dtype=torch.double)
    torch.testing.assert_close(minimaxad.fuse(network)(x), network(x), rtol=1e-9, atol=1e-9)


def test_the_fused_network_takes_the_papers_119_mb(encoder_n):
    model = minimaxad.fuse(minimaxad.MiniMaxAD(encoder_n))
    mebibytes = sum(x.nbytes for x in model.state_dict().values()) / 2**20
    assert mebibytes == pytest.approx(119.4, abs=0.05)


# ---------------------------------------------------------------- layers


def test_grn_is_equations_5_and_6():
    torch.manual_seed(0)
    grn = randomised(minimaxad.GRN(6))
    X = torch.randn(2, 3, 4, 6)
    g = X.square().sum((1, 2)).sqrt()  # B x C
    n = (g / (g.sum(1, keepdim=True) / 6))[:, None, None]  # Eq. 5
    torch.testing.assert_close(grn(X), grn.gamma * (X * n) + grn.beta + X)  # Eq. 6


def test_grn_passes_on_its_input_at_the_start():
    x = torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(minimaxad.GRN(6)(x), x, rtol=0, atol=0)


def test_a_block_adds_a_millionth_of_unit_variance_at_the_start():
    x = torch.randn(8, 16, 12, 12, dtype=torch.double)
    added = minimaxad.Block(16, 13).double()(x) - x
    assert added.std().item() == pytest.approx(1e-6, rel=0.01)


def test_gradients_of_the_dilated_convolutions_in_bfloat16_are_those_in_float32():
    """Channels last, torch 2.14 on a CPU has a wrong gradient here, off by more than its norm."""
    torch.manual_seed(0)
    block = minimaxad.Block(64, 13)
    block.gamma.data.fill_(1)
    x, g = torch.randn(2, 1, 64, 32, 32)
    kernels = [p for p in block.dwconv.parameters() if p.ndim == 4]
    expected = torch.autograd.grad(block(x), kernels, g)
    for layout in torch.contiguous_format, torch.channels_last:
        with torch.autocast("cpu", torch.bfloat16):
            y = block(x.contiguous(memory_format=torch.channels_last))
        gradients = torch.autograd.grad(y, kernels, g.contiguous(memory_format=layout))
        errors = [(a - b).norm() / b.norm() for a, b in zip(gradients, expected, strict=True)]
        assert max(errors) < 0.05


@pytest.mark.parametrize("mode, stride", [("same", 1), ("down", 2)])
@pytest.mark.parametrize("width, kind", [(12, "BasicBlock"), (3, "Bottleneck")])
def test_the_baselines_residual_blocks_are_torchvisions(width, kind, mode, stride):
    torch.manual_seed(0)
    ours = randomised(minimaxad.Residual(6, width, 12, mode)).eval()
    shortcut = nn.Sequential(nn.Conv2d(6, 12, 1, stride, bias=False), nn.BatchNorm2d(12))
    theirs = getattr(torchvision_resnet, kind)(6, width, stride, shortcut)
    if kind == "Bottleneck":
        theirs.conv3, theirs.bn3 = nn.Conv2d(width, 12, 1, bias=False), nn.BatchNorm2d(12)
    values = ours.state_dict().values()  # both in the order in which they are applied
    theirs.load_state_dict(dict(zip(theirs.state_dict(), values, strict=True)))
    x = torch.randn(2, 6, 9, 8)
    torch.testing.assert_close(ours(x), theirs.eval()(x))


# ---------------------------------------------------------------- bottleneck and decoder


def kernels_and_channels(part):
    """Of its blocks, each with the largest of its depthwise kernels."""
    blocks = [m for m in part.modules() if isinstance(m, minimaxad.Block)]
    depthwise = [[m for m in b.modules() if getattr(m, "groups", 1) > 1] for b in blocks]
    return [(max(m.kernel_size[0] for m in convs), convs[0].groups) for convs in depthwise]


@pytest.mark.parametrize(
    "name, c, kernels",
    [
        ("unireplknet_a", 40, [[3] * 2, [13] * 2, [13] * 6]),
        ("unireplknet_f", 48, [[3] * 2, [13] * 2, [13] * 6]),
        ("unireplknet_p", 64, [[3] * 2, [13] * 2, [13] * 6]),
        ("unireplknet_n", 80, [[3] * 2, [13] * 2, [13] * 8]),
        ("unireplknet_t", 80, [[3] * 3, [13] * 3, [13, 3] * 9]),
    ],
)
def test_the_decoder_mirrors_the_encoder_around_two_small_kernel_blocks(name, c, kernels):
    with torch.device("meta"):
        model = minimaxad.MiniMaxAD(minimaxad.UniRepLKNet(name))
    stages = [[(k, c * 2**i) for k in kernels[i]] for i in range(3)]
    expected = [*stages, [(3, 8 * c)] * 2, *stages[::-1]]
    parts = [*model.encoder.stages, model.bottleneck, *model.decoder]
    assert [kernels_and_channels(part) for part in parts] == expected


def test_the_bottleneck_halves_maps_to_the_thirds_size_and_joins_them():
    bottleneck = randomised(small_model().bottleneck).eval()
    state = bottleneck.state_dict()
    maps = random_maps(2)[0]

    def halved(x, conv, norm):
        x = F.conv2d(x, state[f"{conv}.weight"], stride=2, padding=1)
        names = "running_mean", "running_var", "weight", "bias"
        return F.relu(F.batch_norm(x, *(state[f"{norm}.{name}"] for name in names)))

    first = halved(halved(maps[0], "from1.0", "from1.1"), "from1.3", "from1.4")
    joined = torch.cat([first, halved(maps[1], "from2.0", "from2.1"), maps[2]], 1)
    x = F.conv2d(joined, state["compress.0.weight"], stride=2, padding=1)
    torch.testing.assert_close(bottleneck(maps), bottleneck.compress[1](x))


def test_the_decoder_doubles_normalises_and_passes_each_result_on():
    model = small_model().eval()
    randomised(model.bottleneck), randomised(model.decoder)
    image = torch.rand(2, 3, 64, 64)
    encoder_maps, decoder_maps = model(image)
    x = model.bottleneck(encoder_maps)
    expected = []
    for stage in model.decoder:
        x = F.conv_transpose2d(x, stage[0].weight, stride=2).permute(0, 2, 3, 1)
        x = F.layer_norm(x, x.shape[3:], stage[1].weight, stage[1].bias, 1e-6).permute(0, 3, 1, 2)
        x = stage[2](x)
        expected.append(x)
    torch.testing.assert_close(decoder_maps, expected[::-1])


def test_convolutions_start_from_kaiming_normal_fan_out():
    conv = small_model().bottleneck.compress[0]
    expected = stats.norm(0, (2 / (conv.out_channels * 3 * 3)) ** 0.5)
    assert stats.kstest(conv.weight.detach().flatten(), expected.cdf).statistic < 0.01


def test_transposed_convolutions_and_linear_layers_start_as_torchs():
    up, _, blocks = small_model().decoder[0]  # from 64 channels to 32
    for layer, fan_in in (up, 32 * 2 * 2), (blocks[0].pwconv1, 32):
        expected = stats.uniform(-(fan_in**-0.5), 2 * fan_in**-0.5)
        assert stats.kstest(layer.weight.detach().flatten(), expected.cdf).statistic < 0.03


def test_at_400_pixels_the_decoders_maps_are_resized_nearest():
    torch.manual_seed(0)
    model = small_model().eval()
    encoder_maps, decoder_maps = model(torch.rand(1, 3, 400, 400))
    assert [m.shape[2] for m in decoder_maps] == [104, 52, 26]
    resized = []
    for m, n in zip(decoder_maps, (100, 50, 25), strict=True):
        index = torch.arange(n) * m.shape[2] // n
        resized.append(m[:, :, index][:, :, :, index])
    for result in (
        lambda maps: minimaxad.anomaly_map(encoder_maps, maps, 400, "nearest"),
        lambda maps: minimaxad.anomaly_map(encoder_maps, maps, 400, "bilinear"),
        lambda maps: minimaxad.global_loss(encoder_maps, maps),
    ):
        torch.testing.assert_close(result(decoder_maps), result(resized), rtol=0, atol=1e-6)


# ---------------------------------------------------------------- the baseline's


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_the_baseline_has_the_weights_of_reverse_distillation():
    """Its public code's bottleneck and decoder of WideResNet-50, counted layer by layer."""
    with torch.device("meta"):
        model = minimaxad.MiniMaxAD(minimaxad.TimmEncoder("wide_resnet50_2"), "rd")

    def block(inputs, width, outputs, resize=None):
        middle = 4 if resize == "up" else 9
        shortcut = inputs * outputs * (4 if resize == "up" else 1) + 2 * outputs if resize else 0
        convs = inputs * width + middle * width**2 + width * outputs
        return convs + 2 * (2 * width + outputs) + shortcut

    fusion = 9 * (256 * 512 + 512 * 1024 + 512 * 1024) + 2 * (512 + 1024 + 1024)
    bottleneck = fusion + block(3072, 1024, 2048, "down") + 2 * block(2048, 1024, 2048)
    decoder = [  # as deep as the encoder's stages 1, 2, 3, in this order: not mirrored
        block(2048, 512, 1024, "up") + 2 * block(1024, 512, 1024),
        block(1024, 256, 512, "up") + 3 * block(512, 256, 512),
        block(512, 128, 256, "up") + 5 * block(256, 128, 256),
    ]
    assert [count(model.bottleneck), *map(count, model.decoder)] == [bottleneck, *decoder]


def test_the_baselines_maps_have_the_encoders_sizes():
    with torch.device("meta"):
        encoder = minimaxad.TimmEncoder("resnet18")
        encoder.mean = encoder.std = torch.ones(3, 1, 1)
        _, decoder_maps = minimaxad.MiniMaxAD(encoder, "rd")(torch.empty(2, 3, 64, 96))
    sizes = [(2, 64, 16, 24), (2, 128, 8, 12), (2, 256, 4, 6)]
    assert [tuple(m.shape) for m in decoder_maps] == sizes


def test_the_baseline_refuses_what_is_no_resnet():
    with pytest.raises(data.DataError, match="ResNet"):
        minimaxad.MiniMaxAD(SmallEncoder(), "rd")


# ---------------------------------------------------------------- losses


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


def test_the_global_loss_is_equation_2():
    maps = random_maps(3)
    expected = 0
    for e, d in zip(*maps, strict=True):
        for i in range(3):
            a, b = e[i].numpy().ravel(), d[i].numpy().ravel()
            expected += (1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)) / 3  # of three images
    assert minimaxad.global_loss(*maps).item() == pytest.approx(expected, rel=1e-5)


def sum_of_scales(encoder_maps, decoder_maps, size, resize):
    """Eq. 3 and 4: S of the first image."""
    S = 0
    for e, d in zip(encoder_maps, decoder_maps, strict=True):
        e, d = e[0].numpy(force=True), d[0].numpy(force=True)
        M = 1 - (e * d).sum(0) / np.linalg.norm(e, axis=0) / np.linalg.norm(d, axis=0)
        S = S + resize(M, size // len(M))
    return S


@pytest.mark.parametrize(
    "mode, resize",
    [
        ("nearest", lambda M, n: np.kron(M, np.ones((n, n)))),
        ("bilinear", lambda M, n: ndimage.zoom(M, n, order=1)),  # its corners are aligned
    ],
)
def test_s_is_equations_3_and_4(mode, resize):
    maps = random_maps(1)
    expected = sum_of_scales(*maps, 32, resize)
    np.testing.assert_allclose(minimaxad.anomaly_map(*maps, 32, mode)[0], expected, atol=1e-5)


# Of these ten pixels the variance is 0.1477. The quantile 8/9 of their squares is 0.81.
S10 = torch.tensor([[[0.1, 0.2, 0.3, 0.4, 0.5], [0.6, 0.7, 0.8, 0.9, 1.4]]])


@pytest.mark.parametrize(
    "loss, expected",
    [
        (lambda: minimaxad.local_loss(S10), S10.square().sum() / 10),
        (lambda: minimaxad.local_hm_loss(S10, 8 / 9), (0.81 + 1.96) / 2),
        # alpha - sigma^2 = 0.63 - 0.1477 leaves four pixels, just as many as are to be left:
        (lambda: minimaxad.adc_loss(S10, 5.3 / 9, 0.6), (0.49 + 0.64 + 0.81 + 1.96) / 4),
        # alpha - sigma^2 = 0.9 - 0.1477 leaves two, of at least 2.2, so beta = 0.6434 counts:
        (lambda: minimaxad.adc_loss(S10, 8 / 9, 0.78), (0.64 + 0.81 + 1.96) / 3),
    ],
    ids=["Eq. 7", "Eq. 9", "Eq. 8 by alpha", "Eq. 8 by beta"],
)
def test_a_loss_is_the_papers_equation(loss, expected):
    assert loss().item() == pytest.approx(float(expected))


@pytest.mark.parametrize("p", [0.0, 0.31, 0.5, 0.9995, 1.0])
@pytest.mark.parametrize("n", [1, 2, 7, 4999])
def test_the_quantile_is_torchs(n, p):
    generator = torch.Generator().manual_seed(n)
    for x in torch.randn(n, generator=generator), torch.randint(4, (n,), generator=generator) / 2:
        expected = torch.quantile(x.double(), p).item()
        assert minimaxad.quantile(x, p).item() == pytest.approx(expected, abs=1e-6)


def test_the_quantile_takes_more_elements_than_torchs():
    x = torch.arange(2**24 + 1, dtype=torch.double).flip(0)
    assert minimaxad.quantile(x, 0.9995).item() == pytest.approx(0.9995 * 2**24)


# ---------------------------------------------------------------- losses over several processes

SHARES = {2: [[0, 1, 2], [3, 4]], 3: [[0, 1], [2, 3, 4], []]}  # images of each process
LOSSES = {
    "global": lambda e, d, S: minimaxad.global_loss(e, d),
    "local": lambda e, d, S: minimaxad.local_loss(S),
    "local-hm": lambda e, d, S: minimaxad.local_hm_loss(S, 0.9),
    "adc, by alpha": lambda e, d, S: minimaxad.adc_loss(S, 0.3, 0.999),
    "adc, by beta": lambda e, d, S: minimaxad.adc_loss(S / 5, 1.0, 0.9),
    "adc, where a part would take beta": lambda e, d, S: minimaxad.adc_loss(S, 0.6, 0.6),
    "adc, where a part would take alpha": lambda e, d, S: minimaxad.adc_loss(S, 0.6, 0.56),
}


def loss_and_gradients(loss, images):
    encoder_maps, decoder_maps = random_maps(5)
    leaves = [d[images].requires_grad_() for d in decoder_maps]
    encoder_maps = [e[images] for e in encoder_maps]
    S = minimaxad.anomaly_map(encoder_maps, leaves, 32, "nearest")
    value = LOSSES[loss](encoder_maps, leaves, S)
    return value.detach(), list(torch.autograd.grad(value, leaves))


def trained_plain_model(folder):
    """After batches of 4 images and of 1: all its weights, and the last batch's gradient."""
    model = PlainModel()
    train(model, random_images(5), folder, "--batch-size", 4)
    return [p.detach() for p in model.parameters()] + [p.grad for p in model.decoder.parameters()]


def process(rank, folder):
    torch.set_num_threads(1)
    for world, shares in SHARES.items():
        if rank >= world:
            continue
        minimaxad.RANK, minimaxad.WORLD = rank, world
        store = f"file://{folder}/store{world}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        results = {loss: loss_and_gradients(loss, shares[rank]) for loss in LOSSES}
        results["training"] = trained_plain_model(folder)
        torch.save(results, f"{folder}/{world}-{rank}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """For two and for three processes: what each of them found."""
    folder = tmp_path_factory.mktemp("processes")
    method = "spawn" if torch.accelerator.is_available() else "fork"  # faster, not with a GPU
    mp.start_processes(process, (str(folder),), nprocs=3, start_method=method)
    return {n: [torch.load(folder / f"{n}-{rank}.pt") for rank in range(n)] for n in SHARES}


@pytest.mark.parametrize("world", SHARES)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_of_processes_add_up_to_those_of_one(processes, loss, world):
    parts = [results[loss] for results in processes[world]]
    gradients = [torch.cat(k) for k in zip(*(part[1] for part in parts), strict=True)]
    expected = loss_and_gradients(loss, range(5))
    together = sum(part[0] for part in parts), gradients
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("world, rank", [(2, 0), (2, 1), (3, 2)])
def test_a_training_over_several_processes_is_that_of_one(processes, world, rank, tmp_path):
    found = processes[world][rank]["training"]
    torch.testing.assert_close(found, trained_plain_model(tmp_path), rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize(
    "arch, kind, betas",
    [("minimax", torch.optim.AdamW, (0.9, 0.999)), ("rd", torch.optim.Adam, (0.5, 0.999))],
)
def test_the_optimizer_is_the_papers_and_its_rate_falls_each_epoch(arch, kind, betas, tmp_path):
    pixels = random_images(1).repeat(2, 0)  # the same image twice: so any order gives the same
    model = PlainModel()
    flags = ["--lr", 0.01, "--gamma", 0.5, "--weight-decay", 0.2, "--loss", "global", "--epochs", 3]
    train(model, pixels, tmp_path, "--arch", arch, "--batch-size", 1, *flags)

    twin = PlainModel()
    optimizer = kind(twin.decoder.parameters(), 0.01, betas, weight_decay=0.2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for step in range(6):
        optimizer.zero_grad()
        minimaxad.global_loss(*twin(in_0_to_1(pixels[:1]))).backward()
        optimizer.step()
        if step % 2:
            schedule.step()
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["global", "local", "local-hm", "adc"])
def test_training_minimises_the_loss_that_is_named(loss, tmp_path):
    """On S of the crop's size, with the quantiles that are given."""
    model = PlainModel()
    twin = PlainModel()
    pixels = random_images(1)
    flags = ["--size", 72, "--crop", 64, "--p-hard", 0.8, "--p-lim", 0.9]
    train(model, pixels, tmp_path, "--loss", loss, *flags)
    maps = twin(in_0_to_1(pixels))
    S = minimaxad.anomaly_map(*maps, 64, "nearest")
    expected = {
        "global": minimaxad.global_loss(*maps),
        "local": minimaxad.local_loss(S),
        "local-hm": minimaxad.local_hm_loss(S, 0.9),
        "adc": minimaxad.adc_loss(S, 0.8, 0.9),
    }
    expected[loss].backward()
    gradients = [[p.grad for p in each.decoder.parameters()] for each in (model, twin)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def encoder_inputs(model):
    """A list that gets what the encoder is given from now on."""
    inputs = []
    model.encoder.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    return inputs


def test_training_images_are_standardised_once_with_the_encoders_mean_and_deviation(tmp_path):
    model = small_model()
    inputs = encoder_inputs(model)
    pixels = random_images(1)
    train(model, pixels, tmp_path)
    expected = (pixels[0] / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.25, 0.3]
    np.testing.assert_allclose(inputs[0][0].permute(1, 2, 0), expected, atol=1e-5)


def images_seen(folder, *argv, classes="aaaaa"):
    """Which of five images the encoder gets, a list for each batch of the training and then of
    the images that the threshold is found with."""
    pixels = random_images(5)
    model = PlainModel()
    inputs = encoder_inputs(model)
    train(model, pixels, folder, *argv, classes=classes)
    images = in_0_to_1(pixels)
    return [[int((images - x).flatten(1).norm(dim=1).argmin()) for x in batch] for batch in inputs]


def test_an_epoch_takes_each_image_once_and_keeps_the_last_incomplete_batch(tmp_path):
    first, last, *_ = images_seen(tmp_path, "--batch-size", 3)
    assert (len(first), sorted(first + last)) == (3, [0, 1, 2, 3, 4])


def test_only_images_of_the_models_classes_train(tmp_path):
    batch, *_ = images_seen(tmp_path, classes="abaab")
    assert sorted(batch) == [0, 2, 3]


def test_each_epoch_has_an_order_of_its_own(tmp_path):
    first, second, third, *_ = images_seen(tmp_path, "--epochs", 3)
    assert first != second or second != third


def test_the_threshold_is_found_with_images_held_back_from_training(tmp_path):
    batch, held = images_seen(tmp_path, "--holdout", 0.4)
    assert sorted(batch + held) == [0, 1, 2, 3, 4]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model before and after three epochs."""
    model = small_model()
    before = copy.deepcopy(model)
    train(model, random_images(6), tmp_path_factory.mktemp("run"), "--epochs", 3, "--loss", "local")
    return before, model


def test_training_leaves_the_encoder_and_its_batchnorm_as_they_were(trained):
    before, after = (model.encoder.state_dict() for model in trained)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_training_moves_all_of_bottleneck_and_decoder_and_their_batchnorms_statistics(trained):
    before, after = (model.state_dict() for model in trained)
    still = [key for key in before if torch.equal(before[key], after[key])]
    assert [key for key in still if not key.startswith("encoder.")] == []


def test_the_log_tells_how_many_pixels_are_mined_and_how_the_encoders_maps_vary(tmp_path, caplog):
    caplog.set_level("INFO")
    model = PlainModel()
    pixels = random_images(1)
    train(model, pixels, tmp_path, "--lr", 0, "--p-hard", 0.8, "--p-lim", 0.9)
    maps = model(in_0_to_1(pixels))
    S = minimaxad.anomaly_map(*maps, 64, "nearest").detach().numpy()
    mined = (S**2 >= np.quantile(S, 0.8) - S.var(ddof=1)).sum()
    unit = [m.numpy() / np.linalg.norm(m.numpy(), axis=1, keepdims=True) for m in maps[0]]
    variance = sum(u.var() for u in unit)
    assert re.search(rf"\b{mined} of 4096 pixels.*\b{variance:.4f}", caplog.text)


# ---------------------------------------------------------------- map and score


def detected(model, score):
    """S of an image, worked out by SciPy, and the detector's map and score."""
    pixels = random_images(1)
    maps = model.eval()(in_0_to_1(pixels))
    S = sum_of_scales(*maps, 64, lambda M, n: ndimage.zoom(M, n, order=1))
    args = settings("--size", 72, "--crop", 64, "--score", score)
    found, scores = minimaxad.infer(minimaxad.Detector(args, model), pixels, CPU)
    return S, found[0], scores[0]


def test_the_map_is_the_trained_models_s_blurred_with_sigma_4(trained):
    S, found, _ = detected(trained[1], "max")
    np.testing.assert_allclose(found, ndimage.gaussian_filter(S, 4), atol=1e-4)


@pytest.mark.parametrize("score, pool", [("max", np.max), ("mean", np.mean)])
def test_the_score_is_the_maps_maximum_or_mean(score, pool, trained):
    _, found, value = detected(trained[1], score)
    assert value == pytest.approx(pool(found), rel=1e-5)


def test_top1_is_the_mean_of_the_top_percent_after_a_5_x_5_blur_padded_with_zeros(trained):
    S, _, value = detected(trained[1], "top1")
    g = np.exp(-(np.arange(-2, 3) ** 2) / (2 * 4**2))
    blurred = ndimage.convolve(S, np.outer(g, g) / g.sum() ** 2, mode="constant")
    assert value == pytest.approx(np.sort(blurred.ravel())[-40:].mean(), rel=1e-4)  # of 4096


def test_many_images_are_judged_in_their_order(trained):
    detector = minimaxad.Detector(settings("--size", 64), trained[1])
    pixels = random_images(3).repeat(12, 0)  # 36, more than are judged at once
    _, scores = minimaxad.infer(detector, pixels, CPU)
    _, expected = minimaxad.infer(detector, pixels[::12], CPU)
    np.testing.assert_allclose(scores, expected.repeat(12), rtol=1e-4)


# ---------------------------------------------------------------- settings and published figures


@pytest.mark.parametrize(
    "flags, unified, loss, size, crop, epochs",
    [
        ("goodsad", False, "adc", 224, 0, 240),
        ("mad", False, "adc", 400, 0, 150),
        ("mvtec --unified", True, "adc", 256, 0, 100),
        ("visa --unified", True, "adc", 256, 0, 100),
        ("visa", False, "global", 256, 0, 130),
        ("aebad", False, "global", 256, 224, 130),
        ("mvtec", False, "global", 256, 0, 130),  # as visa; none of the following are the paper's
        ("btad", False, "global", 256, 0, 130),
        ("mvtec+visa --unified", True, "adc", 256, 0, 100),
        ("folder", False, "adc", 256, 0, 240),
        ("folder --unified", True, "adc", 256, 0, 240),
        ("cifar10", True, "adc", 256, 0, 100),
        ("goodsad --arch rd", False, "global", 224, 0, 200),
        ("mad --arch rd", False, "global", 400, 0, 200),
        ("mvtec --unified --arch rd", True, "global", 256, 0, 200),
        ("visa --arch rd", False, "global", 256, 0, 200),
        ("aebad --arch rd", False, "global", 256, 224, 200),
        ("goodsad --epochs 7 --loss local", False, "local", 224, 0, 7),  # what is typed wins
    ],
)
def test_the_settings_of_each_set_are_the_papers(flags, unified, loss, size, crop, epochs):
    args = settings("--data", *flags.split())
    found = args.unified, args.loss, args.size, args.crop, args.epochs
    assert found == (unified, loss, size, crop, epochs)


COMMON = {"batch_size": 16, "lr": 0.005, "p_hard": 0.9999, "p_lim": 0.9995}
OURS = {"backbone": "unireplknet_n", "gamma": 0.995, "weight_decay": 5e-5}
RD = {"backbone": "wide_resnet50_2.tv_in1k", "gamma": 1.0, "weight_decay": 0.0}


@pytest.mark.parametrize("name", ["goodsad", "mad", "mvtec", "visa", "aebad", "cifar10", "folder"])
@pytest.mark.parametrize("arch, own", [("minimax", OURS), ("rd", RD)])
def test_what_all_sets_share_is_the_papers(name, arch, own):
    args = vars(settings("--data", name, "--arch", arch))
    assert {key: args[key] for key in COMMON | own} == COMMON | own


@pytest.mark.parametrize("name, score", [("mvtec", "max"), ("aebad", "max"), ("cifar10", "mean")])
def test_an_images_score_is_its_maps_maximum_but_of_cifar10_the_mean(name, score):
    assert settings("--data", name).score == score


@pytest.mark.parametrize(
    "flags, count, row, figures",  # count: of the table's rows
    [
        ("mvtec --unified", 15, "pill", {"i_auroc": 0.979}),  # Table 3
        ("mvtec --unified --arch rd", 15, "bottle", {"i_auroc": 0.799}),
        ("visa --unified", 12, "macaroni2", {"i_auroc": 0.894}),
        ("visa", 12, "mean", {"i_auroc": 0.964, "aupro": 0.904}),  # Table 2
        ("goodsad", 1, "food_box", {"i_auroc": 0.789, "p_aupr": 0.2, "aupro": 0.839}),  # 4, A3
        ("goodsad --arch rd", 6, "drink_can", {"i_auroc": 0.633, "p_aupr": 0.174, "aupro": 0.819}),
        ("goodsad", 6, "mean", {"i_auroc": 0.86, "p_aupr": 0.453, "aupro": 0.874}),
        ("aebad", 4, "view", {"i_auroc": 0.859, "aupro": 0.778}),  # Table 1
        ("aebad --arch rd", 4, "mean", {"i_auroc": 0.81, "aupro": 0.856}),
        ("mad", 20, "mean", {"i_auroc": 0.847}),  # Table 6
        # What the paper did not run:
        ("mvtec --unified", 14, "pill", {}),
        ("goodsad", 5, "mean", {}),
        ("goodsad --loss local", 6, "food_box", {}),
        ("mvtec", 15, "pill", {}),
    ],
)
def test_the_papers_figures_stand_beside_ours(flags, count, row, figures):
    rows = {f"class {i}" if i or row == "mean" else row: {} for i in range(count)}
    published = minimaxad.published(settings("--data", *flags.split()), rows)
    assert published.get(row, {}) == pytest.approx(figures)
