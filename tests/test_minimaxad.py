"""minimaxad.py: parity with the authors' code, fusion, losses on one process and two, loading, maps and scores.

The golden tensors were computed by the authors' code: unireplknet_n_features.safetensors (two images and the encoder's
outputs for the first, with the weights of fill()) and minimaxad_losses.safetensors (three cases).
"""

import argparse
import copy
import json
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import scipy.signal
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision import transforms

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import data
import metrics
import minimaxad

torch.set_num_threads(1)


def fill(shapes):
    """A checkpoint with values that depend on each tensor's key and shape only, as used for the golden features."""
    filled = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The authors' UniRepLKNet-N file, as far as its keys and shapes go, with stage 4 and head."""
    path = tmp_path_factory.mktemp("weights") / "unireplknet_n.safetensors"
    save_file(fill(json.loads((HERE / "unireplknet_n_keys.json").read_text())), path)
    return path


@pytest.fixture(scope="module")
def small():
    """A checkpoint of UniRepLKNet-A under the authors' keys."""
    shapes = {minimaxad.authors_key(key): list(value.shape)
              for key, value in minimaxad.UniRepLKNet("unireplknet_a").state_dict().items()}
    return fill(shapes)


def encoder_a(seed=0):
    torch.manual_seed(seed)
    return minimaxad.load_encoder("unireplknet_a", "none")


# ---------------------------------------------------------------- parity with the authors' code


def test_features_fused_and_not(checkpoint, capsys):
    golden = load_file(HERE / "unireplknet_n_features.safetensors")
    encoder = minimaxad.load_encoder("unireplknet_n", str(checkpoint))
    assert "618 tensors loaded" in capsys.readouterr().out
    assert not [m for m in encoder.modules() if isinstance(m, (torch.nn.BatchNorm2d, minimaxad.DilatedReparam))]
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    plain = minimaxad.UniRepLKNet("unireplknet_n").eval()
    tensors = load_file(checkpoint)
    plain.load_state_dict({key: tensors[minimaxad.authors_key(key)] for key in plain.state_dict()})
    for network in (encoder, plain):
        with torch.no_grad():
            maps = network(golden["image"])
        assert [m.shape for m in maps] == [(2, 80, 16, 16), (2, 160, 8, 8), (2, 320, 4, 4)]
        for k in range(3):
            torch.testing.assert_close(maps[k][:1], golden[f"feature{k}"], rtol=0, atol=1e-5)


def golden_case(case):
    """Encoder's maps, decoder's maps, S, and the rest of a golden case by name. Two cases share decoder maps and S."""
    golden = load_file(HERE / "minimaxad_losses.safetensors")
    maps = "hard" if case == "lax" else case
    S = golden[f"{maps}.map"].repeat_interleave(4, 1).repeat_interleave(4, 2)  # was constant on 4 x 4 pixels
    rest = {key.removeprefix(f"{case}."): value for key, value in golden.items() if key.startswith(f"{case}.")}
    return [golden[f"encoder{k}"] for k in range(3)], [golden[f"{maps}.decoder{k}"] for k in range(3)], S, rest


@pytest.mark.parametrize("case", ["hard", "lax", "limit"])
def test_losses_and_gradients(case):
    encoder_maps, decoder_maps, golden_S, golden = golden_case(case)
    for d in decoder_maps:
        d.requires_grad_()
    S = minimaxad.anomaly_map(encoder_maps, decoder_maps, 64, "nearest")
    torch.testing.assert_close(S, golden_S, rtol=0, atol=1e-6)
    p_hard, p_lim = golden["p"].tolist()
    loss = minimaxad.adc_loss(S, p_hard, p_lim)
    assert loss.ndim == 0
    torch.testing.assert_close(loss[None], golden["adc"], rtol=0, atol=1e-6)
    global_loss = minimaxad.global_loss(encoder_maps, decoder_maps)
    torch.testing.assert_close(global_loss[None], golden["global"], rtol=0, atol=1e-6)
    for k, gradient in enumerate(torch.autograd.grad(loss, decoder_maps)):
        torch.testing.assert_close(gradient, golden[f"grad{k}"], rtol=0, atol=1e-6)
        torch.testing.assert_close(gradient, golden[f"grad{k}"], rtol=1e-4, atol=1e-9)  # 1e-7 in one case


def test_golden_cases_take_both_branches():
    for case, beta in (("hard", False), ("lax", False), ("limit", True)):
        *_, S, golden = golden_case(case)
        assert bool(golden["branch_beta"]) == beta
        p_hard, p_lim = golden["p"].tolist()
        alpha, variance = np.quantile(S.double(), p_hard), S.double().var().item()
        assert ((S.square() >= alpha - variance).sum().item() < S.numel() * (1 - p_lim)) == beta


def hard_mined(S, p_lim):
    """Eq. 9."""
    return minimaxad.mined_mean(S, minimaxad.quantile(S.square().flatten(), p_lim))[0]


def test_other_losses_by_hand():
    S = torch.tensor([[[0.1, 0.2], [0.3, 0.4]], [[0.5, 0.6], [0.7, 1.0]]])
    assert minimaxad.mined_mean(S, 0)[0].item() == pytest.approx((.01 + .04 + .09 + .16 + .25 + .36 + .49 + 1) / 8)
    assert hard_mined(S, 5 / 7).item() == pytest.approx((.36 + .49 + 1) / 3)  # >=: the sixth counts
    assert hard_mined(S, 5.5 / 7).item() == pytest.approx((.49 + 1) / 2)


@pytest.mark.parametrize("name", ["local", "local-hm", "adc", "global"])
def test_training_loss_is_the_loss_of_that_name(name):
    encoder_maps, decoder_maps, S, _ = golden_case("hard")
    loss, mined = minimaxad.training_loss(name, encoder_maps, decoder_maps, 64, 0.9, 0.99)
    p = np.quantile(S, 0.9) - S.var().item()
    expected = {"local": (S.square().mean(), S.numel()),
                "local-hm": (hard_mined(S, 0.99), (S >= np.quantile(S, 0.99)).sum()),
                "adc": (minimaxad.adc_loss(S, 0.9, 0.99), (S.square() >= p).sum()),
                "global": (minimaxad.global_loss(encoder_maps, decoder_maps), S.numel())}[name]
    assert loss.item() == pytest.approx(expected[0].item()) and int(mined) == int(expected[1])


def test_global_loss_by_hand():
    e, d = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    a, b = e.double().numpy().reshape(2, -1), d.double().numpy().reshape(2, -1)
    expected = np.mean([1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b)])
    channels_last = d.contiguous(memory_format=torch.channels_last)  # flattened in the same order whatever the layout
    assert minimaxad.global_loss([e] * 3, [channels_last] * 3).item() == pytest.approx(3 * expected, abs=1e-6)


# ---------------------------------------------------------------- quantile


@pytest.mark.parametrize("p", [0.0, 0.31, 0.5, 0.95, 0.9995, 1.0])
def test_quantile_against_numpy(p):
    generator = np.random.default_rng(0)
    for n in (1, 2, 7, 1000, 4999):
        for x in (generator.normal(size=n), generator.integers(0, 4, n) / 2):
            x = x.astype(np.float32)
            expected = np.quantile(x.astype(float), p)
            assert minimaxad.quantile(torch.tensor(x), p).item() == pytest.approx(expected, abs=1e-6)


def test_losses_beyond_the_elements_that_torch_quantile_takes():
    B = 105
    assert B * 400 * 400 > 2**24
    S = torch.rand(B, 400, 400, generator=torch.Generator().manual_seed(0)).pow_(8)
    squares = S.numpy().ravel() ** 2
    n = squares.size
    rank = 0.9995 * (n - 1)
    low, high = np.partition(squares, [int(rank), int(rank) + 1])[[int(rank), int(rank) + 1]].astype(float)
    beta = low + (high - low) * (rank - int(rank))
    assert minimaxad.quantile(S.square().flatten(), 0.9995).item() == pytest.approx(beta, rel=1e-6)
    assert hard_mined(S, 0.9995).item() == pytest.approx(squares[squares >= beta].mean(dtype=float), rel=1e-5)
    variance = S.numpy().var(dtype=float)
    mined = squares >= float(S.max()) - variance  # alpha for p_hard = 1
    if mined.sum() < n * 0.0005:
        mined = squares >= beta - variance
    assert minimaxad.adc_loss(S, 1.0, 0.9995).item() == pytest.approx(squares[mined].mean(dtype=float), rel=1e-5)


# ---------------------------------------------------------------- several processes


LOSSES = {  # name, p_hard, p_lim; in the last two only A and N of both processes together tell the branch
    "global": ("global", 0.9999, 0.9995), "local": ("local", 0.9999, 0.9995), "local-hm": ("local-hm", 0.9999, 0.9),
    "adc, alpha": ("adc", 0.3, 0.999), "adc, beta": ("adc", 1.0, 0.9),
    "adc, just alpha": ("adc", 0.6, 0.6), "adc, just beta": ("adc", 0.6, 0.56),
}


def maps_of_a_batch(case):
    generator = torch.Generator().manual_seed(3)
    shapes = [(5, 8, 8, 8), (5, 16, 4, 4), (5, 32, 2, 2)]
    encoder_maps = [torch.randn(shape, generator=generator) for shape in shapes]
    noise = 0.1 if case == "adc, beta" else 1.0  # S well below 1: S^2 nowhere reaches alpha
    return encoder_maps, [e + noise * torch.randn(e.shape, generator=generator) for e in encoder_maps]


def loss_and_gradients(case, images):
    """Loss and mined pixels of some of the images, gradients by the decoder's maps and by a weight that all share."""
    name, p_hard, p_lim = LOSSES[case]
    encoder_maps, decoder_maps = maps_of_a_batch(case)
    weight = torch.ones(32, requires_grad=True)
    leaves = [d[images].clone().requires_grad_() for d in decoder_maps]
    outputs = [leaf * weight[:leaf.shape[1], None, None] for leaf in leaves]
    loss, mined = minimaxad.training_loss(name, [e[images] for e in encoder_maps], outputs, 32, p_hard, p_lim)
    loss.backward()
    return loss.detach(), int(mined), [leaf.grad for leaf in leaves], weight.grad


def negative_numbers():
    return torch.randn(100, generator=torch.Generator().manual_seed(0)) - 10


def batchnorm_case(kind):
    """A BatchNorm of four channels, five images and the loss's gradient by its output."""
    torch.manual_seed(0)
    norm, (x, g) = kind(4), torch.randn(2, 5, 4, 6, 7)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    return norm, (2 * x + torch.randn(4, 1, 1)).requires_grad_(), g


def batchnorm_results(images):
    norm, x, g = batchnorm_case(minimaxad.BatchNorm)
    x = x.detach()[images].requires_grad_()
    y = norm(x)
    (y * g[images]).sum().backward()
    return dict(norm.named_buffers(), output=y.detach(), gradient=x.grad, weight=norm.weight.grad, bias=norm.bias.grad)


def process(rank, folder):
    torch.set_num_threads(1)
    minimaxad.RANK, minimaxad.WORLD = rank, 2
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    shards = {"uneven": [[0, 1, 2], [3, 4]], "empty": [[0, 1, 2, 3, 4], []]}
    results = {(split, case): loss_and_gradients(case, images[rank])
               for split, images in shards.items() for case in LOSSES}
    results |= {("batchnorm", split): batchnorm_results(images[rank]) for split, images in shards.items()}
    x = negative_numbers().split([90, 10])[rank]  # 10 are fewer than the 91 largest, which p = 0.1 takes
    pixels = minimaxad.all_pixels(x)
    results["statistics"] = minimaxad.quantile(pixels, 0.1), pixels.var()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    mp.spawn(process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("split", ["uneven", "empty"])
@pytest.mark.parametrize("case", LOSSES)
def test_two_processes_give_the_loss_and_gradient_of_one(two_processes, split, case):
    loss, mined, gradients, weight_gradient = loss_and_gradients(case, [0, 1, 2, 3, 4])
    parts = [results[split, case] for results in two_processes]
    assert sum(part[0] for part in parts).item() == pytest.approx(loss.item(), abs=1e-6)
    assert [part[1] for part in parts] == [mined, mined]
    for k in range(3):
        together = torch.cat([part[2][k] for part in parts])
        torch.testing.assert_close(together, gradients[k], rtol=0, atol=1e-6)
        assert together.abs().max() > 1e-5
    torch.testing.assert_close(sum(part[3] for part in parts), weight_gradient, rtol=0, atol=1e-6)


def test_quantile_and_variance_over_two_processes(two_processes):
    x = negative_numbers().double().numpy()
    for results in two_processes:
        quantile, variance = results["statistics"]
        assert quantile.item() == pytest.approx(np.quantile(x, 0.1), abs=1e-5)
        assert variance.item() == pytest.approx(x.var(ddof=1), abs=1e-5)


def test_the_cases_of_two_processes_take_both_branches():
    for case in LOSSES:
        if not case.startswith("adc"):
            continue
        _, p_hard, p_lim = LOSSES[case]
        S = minimaxad.anomaly_map(*maps_of_a_batch(case), 32, "nearest")
        pixels = (S.square() >= np.quantile(S, p_hard) - S.var()).sum().item()
        assert (pixels < S.numel() * (1 - p_lim)) == case.endswith("beta")


# ---------------------------------------------------------------- layers, fusion


def test_grn_is_equations_5_and_6():
    grn = minimaxad.GRN(6)
    x = torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(grn(x), x)  # gamma = beta = 0 at the start
    torch.nn.init.normal_(grn.gamma), torch.nn.init.normal_(grn.beta)
    expected = torch.empty_like(x)
    for b in range(2):
        g = [x[b, :, :, c].pow(2).sum().sqrt() for c in range(6)]
        for c in range(6):
            n = g[c] / (sum(g) / 6 + 1e-6)
            expected[b, :, :, c] = grn.gamma[0, 0, 0, c] * (x[b, :, :, c] * n) + grn.beta[0, 0, 0, c] + x[b, :, :, c]
    torch.testing.assert_close(grn(x), expected)


def trained(encoder, arch="minimax", size=64):
    """A model after four training steps at the paper's learning rate, its state before, and the losses."""
    torch.manual_seed(0)
    model = minimaxad.MiniMaxAD(encoder, arch).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for step in range(4):
        images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(step))
        loss, _ = minimaxad.training_loss("local", *model(images), size)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, before, losses


def assert_fuses(model, size=64):
    """The fused copy's maps differ by 1e-5 (of maps whose largest value is about 3; RD's grow larger)."""
    model.eval()
    fused = minimaxad.fuse(model)
    assert not [m for m in fused.modules() if isinstance(m, (torch.nn.BatchNorm2d, minimaxad.DilatedReparam))]
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        for expected, maps in zip(model(images), fused(images)):
            for e, m in zip(expected, maps):
                torch.testing.assert_close(m, e, rtol=0, atol=1e-5 * max(1, e.abs().max().item() / 3))
        S, fused_S = (minimaxad.anomaly_map(*net(images), size, "bilinear") for net in (model, fused))
    torch.testing.assert_close(fused_S, S, rtol=0, atol=1e-5)
    assert [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]  # the model itself is left as it was


def test_training_moves_bottleneck_and_decoder_only_and_fuses_afterwards():
    model, before, losses = trained(encoder_a())
    assert losses[-1] < losses[0]
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert not [key for key in moved if key.startswith("encoder")] and not model.encoder.training
    still = [key for key in before if key not in moved and not key.startswith("encoder")]
    assert still == []
    block = model.decoder[0][2][0]
    assert block.gamma.abs().median() > 1e-3 and block.grn.gamma.abs().median() > 1e-3
    assert_fuses(model)


def test_fusing_with_large_statistics():
    """Every BatchNorm, layer scale and GRN far from where it starts; in double precision, where nothing small hides."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(minimaxad.Block(8, kernel) for kernel in (13, 3, 13))).eval()
    for module in model.modules():
        for key, value in list(module.named_parameters(recurse=False)) + list(module.named_buffers(recurse=False)):
            if value.is_floating_point():
                positive = key == "running_var"
                value.data.uniform_(0.5, 1.5) if positive else value.data.add_(0.5 * torch.randn_like(value))
    x = torch.randn(2, 8, 20, 17)
    with torch.no_grad():
        expected, fused = model.double()(x.double()), minimaxad.fuse(model)(x.double())
    assert (expected - x).abs().mean() > 0.1
    torch.testing.assert_close(fused, expected, rtol=1e-9, atol=1e-9)


def test_storage_is_the_papers():
    model = minimaxad.MiniMaxAD(minimaxad.load_encoder("unireplknet_n", "none"))
    assert metrics.storage(minimaxad.fuse(model)) == pytest.approx(119.4, abs=0.05)  # MiB; the paper's 119 MB
    assert metrics.storage(model) > 120


@pytest.mark.parametrize("name, dims, kernels", [
    ("unireplknet_a", [40, 80, 160], [[3] * 2, [13] * 2, [13] * 6]),
    ("unireplknet_f", [48, 96, 192], [[3] * 2, [13] * 2, [13] * 6]),
    ("unireplknet_p", [64, 128, 256], [[3] * 2, [13] * 2, [13] * 6]),
    ("unireplknet_n", [80, 160, 320], [[3] * 2, [13] * 2, [13] * 8]),
    ("unireplknet_t", [80, 160, 320], [[3] * 3, [13] * 3, [13, 3] * 9])])
def test_sizes_and_mirrored_decoder(name, dims, kernels):
    with torch.device("meta"):
        encoder = minimaxad.UniRepLKNet(name)
        model = minimaxad.MiniMaxAD(encoder)
        encoder_maps, decoder_maps = model(torch.empty(2, 3, 96, 64))

    def shape(stage):
        blocks = [m for m in stage.modules() if isinstance(m, minimaxad.Block)]
        return [(13 if isinstance(b.dwconv, minimaxad.DilatedReparam) else 3, len(b.gamma)) for b in blocks]

    expected = [[(kernel, dim) for kernel in stage] for dim, stage in zip(dims, kernels)]
    assert [shape(stage) for stage in encoder.stages] == expected
    assert [shape(stage) for stage in model.decoder] == expected[::-1]
    assert shape(model.bottleneck) == [(3, 2 * dims[2])] * 2
    sizes = [(2, dim, 96 // stride, 64 // stride) for dim, stride in zip(dims, (4, 8, 16))]
    assert [tuple(m.shape) for m in encoder_maps] == [tuple(m.shape) for m in decoder_maps] == sizes


def test_initial_values():
    model = minimaxad.MiniMaxAD(encoder_a())
    conv = model.bottleneck.compress[0]
    assert conv.weight.std().item() == pytest.approx((2 / (conv.out_channels * 9)) ** 0.5, rel=0.01)  # fan out, relu
    up = model.decoder[0][0]
    bound = (1 / (up.weight.shape[1] * 4)) ** 0.5  # torch's default: uniform
    assert 0.95 * bound < up.weight.max().item() <= bound
    block = model.decoder[0][2][0]
    assert (block.gamma == 1e-6).all() and (block.grn.gamma == 0).all() and (block.grn.beta == 0).all()


def test_encoder_outputs_are_normalised_over_channels():
    encoder = encoder_a()
    for m in encoder(torch.rand(1, 3, 64, 64)):
        assert m.mean(1).abs().max() < 1e-5
        torch.testing.assert_close(m.var(1, correction=0), torch.ones_like(m[:, 0]), rtol=0, atol=1e-3)


# ---------------------------------------------------------------- encoders and weights


@pytest.mark.parametrize("form", ["top level", "model", "models", "state_dict", "safetensors"])
def test_weights_wherever_the_tensors_lie(form, small, tmp_path, capsys):
    path = tmp_path / ("a.safetensors" if form == "safetensors" else "a.pth")
    if form == "safetensors":
        save_file(small, path)
    else:
        torch.save(small if form == "top level" else {form: small, "epoch": 3, "args": argparse.Namespace(lr=1)}, path)
    encoder = minimaxad.load_encoder("unireplknet_a", str(path))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and f"{len(small)} tensors loaded from {path}, 0 others" in lines[0]
    torch.testing.assert_close(encoder.downsample_layers[0][0].weight, small["downsample_layers.0.0.weight"])


@pytest.mark.parametrize("key, ours", [
    ("stages.1.0.dwconv.dil_bn_k3_5.running_var",) * 2, ("stages.2.5.act.1.gamma", "stages.2.5.grn.gamma"),
    ("stages.0.1.pwconv2.2.bias", "stages.0.1.norm2.bias"), ("downsample_layers.2.1.weight",) * 2])
def test_missing_or_misshapen_tensor_is_named(key, ours, small, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({k: value for k, value in small.items() if k != key}, path)
    with pytest.raises(data.DataError, match=f'Missing.*"{ours}"') as error:
        minimaxad.load_encoder("unireplknet_a", str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    save_file({**small, key: torch.ones(7)}, path)
    with pytest.raises(data.DataError, match=f"size mismatch for {ours}.*7"):
        minimaxad.load_encoder("unireplknet_a", str(path))


def test_bad_names_and_files(tmp_path):
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "bad.safetensors").write_bytes(b"not one")
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    torch.save({"model": {3: torch.ones(3)}}, tmp_path / "numbers.pth")
    for name, weights, message in [
            ("unireplknet_a", None, "--weights FILE.*UniRepLKNet.*--weights none"),
            ("unireplknet_x", "none", "unknown, did you mean 'unireplknet_"),
            ("resnet81", "none", "unknown, did you mean 'resnet18"),
            ("resnet18.tv", "none", "resnet18.tv"),
            ("vit_tiny_patch16_224", "none", "strides"),
            ("swin_tiny_patch4_window7_224", "none", "not a CNN"),
            ("unireplknet_a", tmp_path / "none.pth", "none.pth: not a readable checkpoint: No such file"),
            ("unireplknet_a", tmp_path / "none.safetensors", "none.safetensors: not a readable checkpoint: No such file"),
            ("unireplknet_a", tmp_path / "empty.pth", "empty.pth: not a readable"),
            ("unireplknet_a", tmp_path / "bad.safetensors", "bad.safetensors: not a readable"),
            ("unireplknet_a", tmp_path / "tensor.pth", "tensor.pth: not a readable"),
            ("unireplknet_a", tmp_path / "numbers.pth", "Missing.*downsample_layers.0.0.weight")]:
        with pytest.raises(data.DataError, match=message) as error:
            minimaxad.load_encoder(name, weights if weights in (None, "none") else str(weights))
        assert "\n" not in str(error.value)


def test_timm_encoder_from_a_file_without_the_last_stage(tmp_path):
    torch.manual_seed(1)
    whole = timm.create_model("resnet18").eval()
    for m in whole.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(), m.running_var.uniform_(0.5, 2), m.bias.data.normal_()
    state = {key: value for key, value in whole.state_dict().items()
             if not key.startswith(("layer4", "fc")) and not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "resnet18.pth")
    encoder = minimaxad.load_encoder("resnet18", str(tmp_path / "resnet18.pth"))
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        x = whole.maxpool(whole.act1(whole.bn1(whole.conv1(image))))
        expected = [x := layer(x) for layer in (whole.layer1, whole.layer2, whole.layer3)]
        for m, e in zip(encoder(image), expected):
            torch.testing.assert_close(m, e, rtol=1e-4, atol=1e-4)
    del state["layer2.0.bn1.weight"]
    torch.save(state, tmp_path / "resnet18.pth")
    with pytest.raises(data.DataError, match="Missing.*layer2.0.bn1.weight"):
        minimaxad.load_encoder("resnet18", str(tmp_path / "resnet18.pth"))


def test_input_statistics_are_the_backbones():
    lite = minimaxad.load_encoder("tf_efficientnet_lite0", "none")
    assert lite.mean.flatten().tolist() == [0.5] * 3 and lite.std.flatten().tolist() == [0.5] * 3
    assert lite.mean.shape == (3, 1, 1)
    model = minimaxad.MiniMaxAD(lite)
    assert encoder_a().mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert encoder_a().std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    with torch.no_grad():
        encoder_maps, decoder_maps = model.eval()(torch.zeros(1, 3, 64, 64))
    assert [m.shape[1] for m in decoder_maps] == [24, 40, 112] == [m.shape[1] for m in encoder_maps]


def test_input_size_that_32_does_not_divide():
    model = minimaxad.MiniMaxAD(encoder_a()).eval()
    with torch.no_grad():
        encoder_maps, decoder_maps = model(torch.randn(1, 3, 400, 400))
    assert [m.shape[2] for m in encoder_maps] == [100, 50, 25]
    assert [m.shape[2] for m in decoder_maps] == [104, 52, 26]
    # nearest: pixel i of n takes pixel floor(i m / n) of m
    index = [torch.arange(n) * m // n for n, m in ((100, 104), (50, 52), (25, 26))]
    resized = [d[:, :, i][:, :, :, i] for d, i in zip(decoder_maps, index)]
    for mode in ("nearest", "bilinear"):
        S = minimaxad.anomaly_map(encoder_maps, decoder_maps, 400, mode)
        assert S.shape == (1, 400, 400)
        torch.testing.assert_close(S, minimaxad.anomaly_map(encoder_maps, resized, (400, 400), mode))
    assert minimaxad.global_loss(encoder_maps, decoder_maps) == minimaxad.global_loss(encoder_maps, resized)


# ---------------------------------------------------------------- the baseline


@pytest.mark.parametrize("name, channels, blocks", [
    ("resnet18", [64, 128, 256], [2, 2, 2, 2]), ("resnet50", [256, 512, 1024], [3, 3, 4, 6])])
def test_rd_shapes(name, channels, blocks):
    model = minimaxad.MiniMaxAD(minimaxad.load_encoder(name, "none"), "rd")
    with torch.no_grad():
        encoder_maps, decoder_maps = model.eval()(torch.randn(1, 3, 64, 96))
        code = model.bottleneck(encoder_maps)
    sizes = [(1, c, 64 // s, 96 // s) for c, s in zip(channels, (4, 8, 16))]
    assert [tuple(m.shape) for m in encoder_maps] == [tuple(m.shape) for m in decoder_maps] == sizes
    assert code.shape == (1, 2 * channels[2], 2, 3)
    stages = [model.bottleneck.compress, *model.decoder]
    assert [sum(isinstance(m, minimaxad.Residual) for m in stage) for stage in stages] == blocks


def test_rd_wide_resnet_has_the_weights_of_reverse_distillation():
    """Its public code: bottleneck and decoder of WideResNet-50, base width 128, worked out layer by layer."""
    with torch.device("meta"):
        model = minimaxad.MiniMaxAD(minimaxad.TimmEncoder("wide_resnet50_2"), "rd")

    def block(inputs, width, outputs, resize=None):
        middle = 4 if resize == "up" else 9
        shortcut = inputs * outputs * (4 if resize == "up" else 1) + 2 * outputs if resize else 0
        return inputs * width + middle * width**2 + width * outputs + 2 * (2 * width + outputs) + shortcut

    fusion = 9 * (256 * 512 + 512 * 1024 + 512 * 1024) + 2 * (512 + 1024 + 1024)
    stage4 = block(3072, 1024, 2048, "down") + 2 * block(2048, 1024, 2048)
    assert sum(p.numel() for p in model.bottleneck.parameters()) == fusion + stage4
    decoder = (block(2048, 512, 1024, "up") + 2 * block(1024, 512, 1024) + block(1024, 256, 512, "up")
               + 3 * block(512, 256, 512) + block(512, 128, 256, "up") + 5 * block(256, 128, 256))
    assert sum(p.numel() for p in model.decoder.parameters()) == decoder


def test_rd_trains_and_fuses():
    encoder = minimaxad.load_encoder("resnet18", "none")
    model, before, losses = trained(encoder, "rd")
    assert losses[-1] < losses[0]
    assert_fuses(model)


def test_rd_needs_a_resnet():
    with pytest.raises(data.DataError, match="--arch rd needs a ResNet"):
        minimaxad.MiniMaxAD(encoder_a(), "rd")


# ---------------------------------------------------------------- anomaly map and score


def test_map_is_equations_3_and_4():
    shapes = (1, 3, 8, 6), (1, 5, 4, 3), (1, 7, 2, 2)
    encoder_maps, decoder_maps = ([torch.randn(s, dtype=torch.double) for s in shapes] for _ in range(2))
    M = [1 - (e * d).sum(1) / e.norm(dim=1) / d.norm(dim=1) for e, d in zip(encoder_maps, decoder_maps)]
    zoomed = [scipy.ndimage.zoom(m[0].numpy(), (16 / m.shape[1], 12 / m.shape[2]), order=1) for m in M]
    S = minimaxad.anomaly_map(encoder_maps, decoder_maps, (16, 12), "bilinear")
    np.testing.assert_allclose(S[0], sum(zoomed), atol=1e-5)
    nearest = sum(np.repeat(np.repeat(m[0].numpy(), 16 // m.shape[1], 0), 12 // m.shape[2], 1) for m in M)
    S = minimaxad.anomaly_map(encoder_maps, decoder_maps, (16, 12), "nearest")
    np.testing.assert_allclose(S[0], nearest, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 64, 48), (3, 9, 33), (1, 1, 5)])
def test_scores_against_scipy(shape):
    S = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    smooth = np.stack([scipy.ndimage.gaussian_filter(s.astype(float), 4) for s in S.numpy()])
    for score, expected in (("max", smooth.max((1, 2))), ("mean", smooth.mean((1, 2)))):
        maps, scores = minimaxad.image_score(S, score)
        np.testing.assert_allclose(maps, smooth, atol=1e-6)
        np.testing.assert_allclose(scores, expected, atol=1e-6)
    g = np.exp(-np.arange(-2, 3) ** 2 / 32)
    kernel = np.outer(g, g) / np.outer(g, g).sum()
    smooth = np.stack([scipy.signal.convolve2d(s, kernel, "same") for s in S.numpy()])  # zero beyond the border
    maps, scores = minimaxad.image_score(S, "top1")
    np.testing.assert_allclose(maps, smooth, atol=1e-6)
    k = max(1, int(0.01 * smooth[0].size))
    np.testing.assert_allclose(scores, [np.sort(s.ravel())[-k:].mean() for s in smooth], atol=1e-6)


def test_variance_of_normalised_maps():
    maps = [torch.randn(2, c, 5, 4) + 0.3 for c in (3, 8, 16)]
    unit = [m.numpy() / np.linalg.norm(m.numpy(), axis=1, keepdims=True) for m in maps]
    assert minimaxad.map_variance(maps).item() == pytest.approx(sum(u.var(ddof=1) for u in unit), rel=1e-5)
    zero_mean = [m - m.mean(1, keepdim=True) for m in maps]
    assert minimaxad.map_variance(zero_mean).item() == pytest.approx(1 / 3 + 1 / 8 + 1 / 16, rel=0.1)


def test_presets():
    assert minimaxad.parse(["--data", "cifar10", "--no-unified"]).unified  # its only setting
    assert minimaxad.parse(["--bench", "--arch", "rd"]).backbone == minimaxad.RD["backbone"]
    assert minimaxad.parse(["--arch", "rd"]).epochs == minimaxad.TOY["epochs"]
    assert minimaxad.parse(["--data", "aebad", "--size", "300"]).crop is None


def test_paper_figures():
    def rows(*key):
        return list(metrics.read_table(minimaxad.TABLES[key]))

    def figures(*argv, found):
        return minimaxad.paper_figures(minimaxad.parse(list(argv)), found)

    assert figures("--data", "goodsad", found=rows("goodsad", False))["mean"] == {"i_auroc": 0.86, "p_aupr": 0.453, "aupro": 0.874}
    assert set(figures("--data", "goodsad", found=["food_box"])) == {"food_box"}
    assert figures("--data", "mvtec", "--unified", found=["pill"]) == {}
    assert figures("--data", "visa", "--unified", "--loss", "local", found=rows("visa", True)) == {"mean": {"i_auroc": 0.93}}
    assert figures("--data", "aebad", found=rows("aebad", False))["view"] == {"i_auroc": 0.859, "aupro": 0.778}
    assert figures("--data", "goodsad", "--p-lim", "0.9999", "--p-hard", "1", found=rows("goodsad", False)) == {}
    assert figures("--data", "mvtec", "--unified", "--arch", "rd", found=rows("mvtec", True))["bottle"] == {"i_auroc": 0.799}
    assert figures("--data", "mad", "--arch", "rd", found=["01Gorilla"]) == {"01Gorilla": {"i_auroc": 0.755}}  # at 400 px
    assert figures("--data", "goodsad", "--arch", "rd", found=["drink_can"])["drink_can"]["aupro"] == 0.819  # at 224 px
    assert figures("--data", "goodsad", "--arch", "rd", "--size", "256", found=["drink_can"]) == {}
    assert figures("--data", "mvtec", "--unified", "--arch", "rd", "--loss", "adc", found=rows("mvtec", True)) == {}
    assert figures("--data", "visa", found=["candle"]) == {}  # the paper has only the mean over all classes
    assert figures("--data", "visa", found=rows("visa", True))["mean"] == {"i_auroc": 0.964, "aupro": 0.904}


# ---------------------------------------------------------------- what is easily got wrong in the layers


def test_own_convolutions_have_no_bias_and_blocks_have_the_authors():
    """Weights of bottleneck and decoder: by hand and, for blocks, from the authors' file of UniRepLKNet-N."""
    with torch.device("meta"):
        model = minimaxad.MiniMaxAD(minimaxad.UniRepLKNet("unireplknet_n"))

    def count(*modules):
        return sum(p.numel() for module in modules for p in module.parameters())

    def authors(stage):
        shapes = json.loads((HERE / "unireplknet_n_keys.json").read_text())
        return sum(int(np.prod(shape)) for key, shape in shapes.items() if key.startswith(f"stages.{stage}.")
                   and not key.endswith(("running_mean", "running_var", "num_batches_tracked")))

    def block(C):
        """With 3 x 3 kernel: depthwise, BatchNorm; SE; linear layers and GRN, 4C wide; BatchNorm, scale."""
        se, linear, grn = (C * C + C) // 4 + C * C // 4 + C, (4 * C * C + 4 * C) + 4 * C * C, 8 * C
        return 9 * C + 2 * C + se + linear + grn + 2 * C + C

    assert authors(0) == 2 * block(80)  # by hand is right
    assert count(model.bottleneck.compress) == 9 * 960 * 640 + 2 * block(640)
    down = 9 * (80 * 160 + 2 * 160 * 320) + 2 * (160 + 2 * 320)  # 3 x 3 convolutions and a BatchNorm each
    assert count(model.bottleneck.from1, model.bottleneck.from2) == down
    up = 4 * (640 * 320 + 320 * 160 + 160 * 80) + 2 * (320 + 160 + 80)  # transposed 2 x 2, and LayerNorms
    assert count(model.decoder) == up + sum(map(authors, (2, 1, 0)))


def test_depthwise_gradient_under_autocast_on_a_cpu():
    """In bfloat16, dilated and channels last, torch 2.14's own weight gradient has values of 1e37."""
    torch.manual_seed(0)
    layer = minimaxad.Depthwise(128, 7, 2)
    x, g = torch.randn(2, 16, 128, 32, 32).unbind()
    x = x.contiguous(memory_format=torch.channels_last)
    expected, = torch.autograd.grad((layer(x) * g).sum(), layer.weight)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.bfloat16())
    gradient, = torch.autograd.grad((y.float() * g).sum(), layer.weight)
    assert (gradient - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("split", ["uneven", "empty"])
def test_batchnorm_over_two_processes_is_torchs_of_the_whole_batch(two_processes, split):
    norm, x, g = batchnorm_case(torch.nn.BatchNorm2d)
    y = norm(x)
    (y * g).sum().backward()
    parts = [results["batchnorm", split] for results in two_processes]
    for key, expected in (("output", y.detach()), ("gradient", x.grad)):
        torch.testing.assert_close(torch.cat([part[key] for part in parts]), expected, rtol=1e-4, atol=1e-5)
    for key in "weight", "bias":
        total = sum(part[key] for part in parts)
        torch.testing.assert_close(total, getattr(norm, key).grad, rtol=1e-4, atol=1e-4)
    for part in parts:
        for key in "running_mean", "running_var", "num_batches_tracked":
            torch.testing.assert_close(part[key], getattr(norm, key))


@pytest.mark.parametrize("shape", [(2, 64, 48), (3, 9, 33), (1, 1, 5)])
def test_max5x5_against_scipy(shape):
    S = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    g = np.exp(-np.arange(-2, 3) ** 2 / 32)
    smooth = scipy.ndimage.convolve(S.double().numpy(), np.outer(g, g)[None] / g.sum() ** 2, mode="constant")
    maps, scores = minimaxad.image_score(S, "max5x5")
    np.testing.assert_allclose(maps, smooth, atol=1e-6)
    np.testing.assert_allclose(scores, smooth.max((1, 2)), atol=1e-6)


def test_augmented_is_torchvisions_crop_and_flip_of_the_whole_image(tmp_path):
    samples, pictures = [], []
    for i, size in enumerate([(90, 60), (50, 120), (64, 64), (200, 150), (33, 70)]):
        picture = Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        picture.save(tmp_path / f"{i}.png")
        samples.append(data.Sample(str(tmp_path / f"{i}.png"), 0, None, "a", "a"))
        pictures.append(picture)
    bicubic = transforms.InterpolationMode.BICUBIC
    crop = transforms.RandomResizedCrop(48, scale=(0.7, 1), interpolation=bicubic)
    one = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor()])
    torch.manual_seed(5)
    images = minimaxad.augmented(samples, 48, torch.device("cpu"))
    assert images.shape == (5, 3, 48, 48) and 0 <= images.min() and images.max() <= 1
    torch.manual_seed(5)
    torch.testing.assert_close(images, torch.stack([one(picture) for picture in pictures]))
    assert minimaxad.augmented([], 48, torch.device("cpu")).shape == (0, 3, 48, 48)
