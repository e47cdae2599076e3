"""mintad.py: the paper's parameter counts and shapes, and its equations against independent code."""
import argparse
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import metrics
import mintad
from test_minimaxad import fill

def count(module):
    return sum(p.numel() for p in module.parameters())


# ------------------------------------------------------------------------------------------- sizes from the paper


def test_inr_has_the_papers_weights():
    assert count(mintad.INR()) == 602_368  # Table 9: 0.602 M


def test_query_starts_at_the_scale_of_a_learned_one_and_tells_positions_and_classes_apart():
    torch.manual_seed(0)
    q = mintad.INR()(torch.randn(64, 3), F.one_hot(torch.arange(2), 32).float()).detach()
    assert 0.5 < q.std() < 1.5
    assert q.std(1).mean() > 0.5 and (q[0] - q[1]).std() > 0.25


def test_classifier_learns_behind_two_softmaxes():
    """Every class gets a token of its own, in 100 steps (with a head of Kaiming's scale the loss is still 1.5)."""
    torch.manual_seed(0)
    means, prompt = torch.randn(6, 1, 32), mintad.FeaturePrompt(32, 16, 6)
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=5e-4)
    for _ in range(100):
        label = torch.randint(6, (16,))
        z, logits = prompt(means[label] + torch.randn(16, 16, 32))
        loss = F.cross_entropy(logits, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    z, logits = prompt(means + torch.randn(6, 16, 32))
    assert loss < 0.2 and logits.argmax(1).tolist() == list(range(6))
    assert (torch.cdist(z, z) + 9 * torch.eye(6)).min() > 0.2


def test_module_shapes():
    C, H, W, K, B = 12, 4, 5, 3, 2
    f = torch.randn(B, H * W, C)
    z, logits = mintad.FeaturePrompt(C, H * W, K)(f)
    assert z.shape == (B, 32) and logits.shape == (B, K)
    torch.testing.assert_close(z.sum(1), torch.ones(B))  # softmax
    assert mintad.INR()(torch.randn(H * W, 3), z).shape == (B, H * W, 256)
    f_, r, logits, (mu, log_sigma) = mintad.MINTAD(C, H, W, K)(f)
    assert f_.shape == r.shape == mu.shape == log_sigma.shape == f.shape
    assert mintad.anomaly_map(f_, r, H, W).shape == (B, H, W)


def test_table_12_to_15_layers():
    model = mintad.MINTAD(272, 14, 14, 15)
    linear = lambda m: [(x.in_features, x.out_features) for x in m.modules() if isinstance(x, nn.Linear)]
    assert linear(model.prompt) == [(272, 256), (256, 256), (256, 32), (6272, 256), (256, 256), (256, 32), (32, 15)]
    assert linear(model.distribution) == [(256, 256), (256, 256), (256, 544)]
    assert linear(model.inr.modulation) == [(35, 256)] + [(256, 256)] * 4
    assert linear(model.inr.synthesis) == [(3, 256)] + [(256, 256)] * 4
    assert len(model.transformer.encoder) == len(model.transformer.decoder) == 4


def test_loss_weights():
    assert (mintad.LAMBDA_CE, mintad.LAMBDA_PRIOR) == (1.0, 0.1)  # Sec. 3.5
    torch.manual_seed(0)
    model, f, label = mintad.MINTAD(4, 2, 2, 2).eval(), torch.randn(3, 4, 4), torch.tensor([0, 1, 0])
    with torch.no_grad():
        model.adapter.weight += 0.1 * torch.randn(4, 4)
        loss, logged = mintad.objective(model, model(f, label), label)
        literal, printed = mintad.objective(model, model(f, label), label, literal=True)
        expected = logged["mse"] + logged["ce"] + 0.1 * logged["prior"] + 0.5 * logged["det"]  # s = 1/2
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(literal, printed["mse"] + printed["ce"] + 0.1 * printed["prior"])
        assert "det" not in printed
        torch.testing.assert_close(logged["prior"] - printed["prior"], logged["det"])


# --------------------------------------------------------------------------------------------------- the equations


def test_inr_is_equations_8_and_9():
    torch.manual_seed(0)
    inr, p, z = mintad.INR().double(), torch.randn(5, 3).double(), torch.randn(2, 32).double()
    out = inr(p, z)
    for b in range(2):
        for k in range(5):
            h, x = torch.cat([z[b], p[k]]), p[k]
            for w, v in zip(inr.modulation, inr.synthesis):
                h = (w.weight @ h + w.bias).clamp_min(0)
                x = torch.sin(v.weight @ x + v.bias) * h
            torch.testing.assert_close(out[b, k], inr.output.weight @ x + inr.output.bias)


def test_prior_is_the_likelihood_of_the_original_features():
    """Eq. 3: log N(f'; mu, sigma) + log |det W|, per channel."""
    torch.manual_seed(0)
    C = 4
    model = mintad.MINTAD(C, 2, 2, 2).eval()
    with torch.no_grad():
        model.adapter.weight.copy_(torch.randn(C, C))
    f, label = torch.randn(3, 4, C), torch.tensor([0, 1, 0])
    f_, _, _, (mu, log_sigma) = model(f)
    W = model.adapter.weight
    torch.testing.assert_close(f_, f @ W.T)
    gaussian = torch.distributions.Normal(mu, log_sigma.exp()).log_prob(f_).sum(-1)  # B x P
    expected = -(gaussian + torch.linalg.slogdet(W)[1]).mean() / C
    torch.testing.assert_close(mintad.objective(model, model(f), label)[1]["prior"], expected)


@pytest.mark.parametrize("prior", (True, False))
def test_reconstruction_error_cannot_collapse(prior):
    """Eq. 5 with its determinant is the likelihood of f under N(r, 1/4): where r stays 0, the best W whitens f to deviation 1/2."""
    torch.manual_seed(0)
    model = mintad.MINTAD(4, 2, 2, 2, prior_loss=prior, layers=1).eval()
    for p in model.transformer.parameters():
        nn.init.zeros_(p)
    f = torch.randn(20, 4, 4) @ torch.randn(4, 4)
    f -= f.mean((0, 1))
    optimizer = torch.optim.LBFGS([model.adapter.weight], 1, 60, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        _, logged = mintad.objective(model, model(f), torch.zeros(20, dtype=torch.long))
        value = logged["mse"] + 0.5 * logged["det"]
        value.backward()
        return value

    optimizer.step(loss)
    f_ = model(f)[0].detach().flatten(0, 1)
    torch.testing.assert_close(f_.T @ f_ / len(f_), torch.eye(4) / 4, atol=2e-3, rtol=0)


def test_checkpoint_of_another_version_is_refused():
    backbone = Unshuffle()
    settings = {key: mintad.PAPER.get(key) for key in mintad.SETTINGS}
    state = {"name": "seed1", "settings": settings, "classes": ["a"], "model": None}
    tensors = mintad.build(state, backbone).state_dict()
    tensors["adapter.W"] = tensors.pop("adapter.weight")
    with pytest.raises(mintad.data.DataError, match="seed1.pt .*adapter.weight"):
        mintad.build(state | {"model": tensors}, backbone)


def test_learning_rate():
    """Sec. 4.1 at the paper's rate, step by step; a larger one is reached from the paper's and dropped to a tenth of itself."""
    assert [mintad.learning_rate(1e-4, step, 1000) for step in (0, 1, 799, 800, 999)] == [1e-4] * 3 + [1e-5] * 2
    assert mintad.learning_rate(3e-5, 0, 1000) == 3e-5
    rates = [mintad.learning_rate(5e-4, step, 1000) for step in range(1000)]
    assert rates[0] == 1e-4 and rates[:401] == sorted(rates[:401]) and rates[400:800] == [5e-4] * 400
    assert max(rates) == 5e-4 and rates[800:] == [5e-5] * 200


def test_anomaly_map_is_equation_7():
    f_, r = torch.randn(1, 6, 5), torch.randn(1, 6, 5)
    s = mintad.anomaly_map(f_, r, 2, 3)
    assert s[0, 1, 2].item() == pytest.approx(math.sqrt(sum((f_[0, 5, c] - r[0, 5, c]).item() ** 2 for c in range(5))), rel=1e-5)


def test_image_scores():
    maps = torch.rand(2, 40, 40)
    assert torch.equal(mintad.image_score(maps, "max"), maps.flatten(1).max(1)[0])
    torch.testing.assert_close(mintad.image_score(maps, "mean"), maps.flatten(1).mean(1))
    pooled = max(maps[1, i:i + 16, j:j + 16].mean().item() for i in range(25) for j in range(25))
    assert mintad.image_score(maps, "pool")[1].item() == pytest.approx(pooled, rel=1e-5)


def test_jitter():
    """N(0, (20 ||token|| / C)^2) on the input tokens, in training only."""
    torch.manual_seed(0)
    C = 16
    transformer = mintad.Transformer(C, 20, 20, layers=0)
    seen = []
    transformer.input_proj.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    f = torch.randn(50, 400, C)
    transformer.train()(f, [])
    noise = (seen[0] - f) / (20 * f.norm(dim=-1, keepdim=True) / C)
    assert abs(noise.mean().item()) < 0.01 and abs(noise.std().item() - 1) < 0.01
    transformer.eval()(f, [])
    assert torch.equal(seen[1], f)


def test_attention_is_torchs():
    torch.manual_seed(0)
    ours, theirs = mintad.Attention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    ours.dropout = ours.drop.p = 0.0
    q, k, v, mask = *torch.randn(3, 2, 9, 32), mintad.neighbour_mask(3, 3, 1)
    expected = theirs(q, k, v, attn_mask=mask, need_weights=False)[0]
    for mode in (True, False):  # two paths
        torch.testing.assert_close(ours.train(mode)(q, k, v, mask), expected)


def test_dropout():
    torch.manual_seed(0)
    x = torch.ones(1_000_003)
    y = mintad.Dropout(0.1).train()(x)
    assert abs((y == 0).double().mean().item() - 0.1) < 1e-3 and y.max().item() == pytest.approx(1 / 0.9)
    assert torch.equal(mintad.Dropout(0.1).eval()(x), x)


# ------------------------------------------------------------------------------------------------- UniAD, written out


def uniad_reference(weights, f, H, W, L=2, heads=8):
    """UniAD's forward pass in evaluation mode as its authors' code does it, sequence first, with nn.MultiheadAttention."""
    D = 256
    attend = {}
    for name in {k.rsplit(".", 1)[0] for k in weights if k.endswith("in_proj_weight")}:
        attend[name] = nn.MultiheadAttention(D, heads)
        attend[name].load_state_dict({k: weights[f"{name}.{k}"] for k in attend[name].state_dict()})
    linear = lambda name, x: F.linear(x, weights[name + ".weight"], weights[name + ".bias"])
    norm = lambda name, x: F.layer_norm(x, (D,), weights[name + ".weight"], weights[name + ".bias"])
    mask = torch.ones(H, W, H, W)
    for i in range(H):
        for j in range(W):
            mask[i, j, max(i - 3, 0):i + 4, max(j - 3, 0):j + 4] = 0
    mask = mask.view(H * W, H * W).masked_fill(mask.view(H * W, H * W) == 0, -math.inf).masked_fill(
        mask.view(H * W, H * W) == 1, 0.0)
    row, col = weights["transformer.row_embed.weight"], weights["transformer.col_embed.weight"]
    pos = torch.cat([torch.cat([col.unsqueeze(0)] * H, dim=0), torch.cat([row.unsqueeze(1)] * W, dim=1)], dim=-1)
    pos = pos.flatten(0, 1).unsqueeze(1).expand(-1, len(f), -1)  # P x B x D
    x = linear("transformer.input_proj", f.transpose(0, 1))
    for i in range(L):
        n = f"transformer.encoder.{i}"
        x = norm(n + ".norm1", x + attend[n + ".self_attn"](x + pos, x + pos, x, attn_mask=mask)[0])
        x = norm(n + ".norm2", x + linear(n + ".linear2", F.relu(linear(n + ".linear1", x))))
    memory = out = x
    for i in range(L):
        n = f"transformer.decoder.{i}"
        tgt = weights["query"][0, i].unsqueeze(1).expand(-1, len(f), -1)
        tgt = norm(n + ".norm1", tgt + attend[n + ".self_attn"](tgt + pos, memory + pos, memory, attn_mask=mask)[0])
        tgt = norm(n + ".norm2", tgt + attend[n + ".multihead_attn"](tgt + pos, out + pos, out, attn_mask=mask)[0])
        out = norm(n + ".norm3", tgt + linear(n + ".linear2", F.relu(linear(n + ".linear1", tgt))))
    return linear("transformer.output_proj", norm("transformer.norm", out)).transpose(0, 1)


def test_uniad_is_the_authors_network():
    torch.manual_seed(0)
    model = mintad.UniAD(12, 8, 9, 3, layers=2).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    f = torch.randn(2, 72, 12)
    f_, r, logits, gaussian = model(f)
    assert f_ is f and logits is None and gaussian is None
    torch.testing.assert_close(r, uniad_reference(model.state_dict(), f, 8, 9), atol=1e-5, rtol=1e-5)


def test_neighbour_mask_wants_room():
    assert mintad.neighbour_mask(14, 14).sum(1).max() == 49
    with pytest.raises(mintad.data.DataError, match="--size"):
        mintad.neighbour_mask(4, 4)


@pytest.mark.parametrize("variant", [
    dict(query="mlp"), dict(query="learned"), dict(query="learned", adapter=False, cls_loss=False, prior_loss=False),
    dict(prompt="label"), dict(prompt="image"), dict(prior_loss=False), dict(cls_loss=False),
    dict(uniad=True), dict(uniad=True, query="pool"), dict(uniad=True, query="token"),
    dict(uniad=True, query="text", text=torch.ones(3, 7))], ids=str)
def test_every_variant_learns(variant):
    """A few steps lower the reconstruction error, and every parameter gets a gradient."""
    torch.manual_seed(0)
    options = {key: value for key, value in variant.items() if key != "uniad"}
    model = (mintad.UniAD if "uniad" in variant else mintad.MINTAD)(10, 8, 8, 3, layers=2, **options)
    f, label = torch.randn(3, 1, 10).repeat(2, 64, 1) + 3, torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer, first = torch.optim.AdamW(model.parameters(), 1e-3), None
    for _ in range(8):
        loss, losses = mintad.objective(model, model(f, label), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = first or losses["mse"].item()
    assert losses["mse"].item() < first
    assert not [name for name, p in model.named_parameters() if p.grad is None]  # DistributedDataParallel wants it so
    parts = {"ce": variant.get("prompt") is None and variant.get("cls_loss", True), "prior": variant.get("prior_loss", True),
             "det": variant.get("adapter", True)}
    assert set(losses) - {"std f'", "accuracy"} == {"mse", *(key for key, there in parts.items() if there and not variant.get("uniad"))}
    with torch.no_grad():
        assert (model(f, label)[2] is not None) == ("ce" in losses)  # an untrained head names no class


def test_mlp_goes_without_the_prior():
    assert not mintad.parse(["--query", "mlp"]).prior_loss  # Sec. 0.B.6


# ---------------------------------------------------------------------------------------------- the paper's figures


MVTEC = list(metrics.read_table(mintad.TABLES["mvtec", True]))


def figures(*argv, found=MVTEC):
    return mintad.paper_figures(mintad.parse(list(argv)), found)


def test_paper_figures():
    assert figures("--data", "mvtec", "--unified")["mean"] == {"i_auroc": 0.986, "p_aupr": 0.498}
    assert figures("--data", "mvtec", "--classes", "screw", found=["screw"]) == {"screw": {"i_auroc": 0.978}}
    assert figures("--data", "mvtec", "--unified", found=["screw"]) == {}  # a model of fewer classes is another one
    assert figures("--data", "cifar10", found=["01234"])["01234"] == {"i_auroc": 0.867}
    assert figures("--data", "mvtec", "--unified", "--backbone", "resnet18.tv_in1k")["mean"] == {"i_auroc": 0.931}
    assert figures("--data", "toy", found=["pill"]) == {}


@pytest.mark.parametrize("flags, i_auroc", [
    ("--uniad", .965), ("--uniad --query pool", .976), ("--uniad --query token", .979),
    ("--uniad --query text --text x", .977), ("--prompt image", .978), ("--prompt label", .980), ("--query mlp", .980),
    ("--query learned --no-adapter --no-cls-loss --no-prior-loss", .971), ("--query learned --no-cls-loss --no-prior-loss", .975),
    ("--query learned --no-prior-loss", .977), ("--no-prior-loss", .981), ("--query learned", .983), ("", .986)])
def test_every_row_of_tables_4_and_5_has_its_figure(flags, i_auroc):
    assert figures("--data", "mvtec", "--unified", *flags.split())["mean"]["i_auroc"] == i_auroc


# -------------------------------------------------------------------------------- the values of UniAD's own code


def authors_name(ours):
    """UniAD's name of one of our tensors."""
    for pattern, theirs in [(r"transformer\.(row|col)_embed", r"pos_embed.\1_embed"),
                            (r"transformer\.(\w+_proj)", r"\1"),
                            (r"transformer\.norm", "transformer.decoder.norm"),
                            (r"transformer\.(en|de)coder", r"transformer.\1coder.layers")]:
        if re.match(pattern, ours):
            return re.sub(pattern, theirs, ours)


def test_uniad_gives_the_values_of_its_authors_code():
    """At full size, every tensor filled from its name; 64 values of each output, flat, as B x C x H x W."""
    golden = json.loads(Path(__file__).with_name("uniad_values.json").read_text())
    theirs = fill(golden["keys"])
    model = mintad.UniAD(272, 14, 14, 15).eval()
    state = {ours: theirs.pop(authors_name(ours))
             for ours in model.state_dict() if ours.startswith("transformer.")}
    embeds = [theirs.pop(f"transformer.decoder.layers.{i}.learned_embed.weight") for i in range(4)]
    assert not theirs
    model.load_state_dict(state | {"query": torch.stack(embeds)[None]})
    image = torch.randn(2, 272, 14, 14, generator=torch.Generator().manual_seed(77))
    with torch.no_grad():
        f_, r, _, _ = model(image.flatten(2).transpose(1, 2))
        maps = mintad.upsample(mintad.anomaly_map(f_, r, 14, 14), 224)
    r = r.transpose(1, 2).flatten()  # B x C x P
    assert r.abs().mean().item() == pytest.approx(golden["rec_mean"], rel=1e-5)
    for ours, values in (r, golden["rec"]), (maps.flatten(), golden["map"]):
        torch.testing.assert_close(ours[::len(ours) // 64][:64], torch.tensor(values), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- Muon


def test_muon_takes_the_transformers_matrices_and_adamw_all_else():
    model = mintad.MINTAD(12, 8, 8, 3, layers=2)
    settings = argparse.Namespace(optimizer="muon", weight_decay=1e-4)
    (adamw, _), (muon, _) = mintad.optimizers(model, settings, torch.device("cpu"))
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    attention = ["self_attn.in_proj_weight", "self_attn.out_proj.weight"]
    cross = [name.replace("self", "multihead") for name in attention]
    matrices = {f"transformer.{part}.{i}.{name}" for i in range(2) for part, attentions in
                (("encoder", attention), ("decoder", attention + cross))
                for name in (*attentions, "linear1.weight", "linear2.weight")}
    matrices |= {"transformer.input_proj.weight", "transformer.output_proj.weight"}
    names = {id(p): name for name, p in model.named_parameters()}
    taken = [[names[id(p)] for group in optimizer.param_groups for p in group["params"]]
             for optimizer in (adamw, muon)]
    assert sorted(taken[1]) == sorted(matrices)
    assert sorted(taken[0] + taken[1]) == sorted(names.values())  # each once
    settings.optimizer = "adamw"
    assert len(mintad.optimizers(model, settings, torch.device("cpu"))) == 1


class Unshuffle(nn.Module):
    """Images B x 3 x 32 x 32 -> features B x 64 x 48: at each of 8 x 8 positions those of 4 x 4 pixels."""

    H = W = 8
    C = 48

    def forward(self, image):
        return F.pixel_unshuffle(image, 4).flatten(2).transpose(1, 2)


def test_muon_learns_and_goes_on_bit_by_bit_after_an_interruption(tmp_path, monkeypatch):
    rng, cpu = np.random.default_rng(0), torch.device("cpu")
    images = (rng.random((8, 1, 1, 3)) * 200 + rng.random((8, 32, 32, 3)) * 50).astype(np.uint8)
    samples = [data.Sample(str(i), 0, None, "ab"[i % 2], "ab"[i % 2]) for i in range(8)]
    args = mintad.parse("--optimizer muon --epochs 6 --batch-size 8 --lr 1e-3".split())  # epochs of one step
    settings = {key: getattr(args, key) for key in mintad.SETTINGS}
    fresh = dict(settings=settings, name="seed1", seed=1, classes=["a", "b"], epoch=0, model=None, optimizer=None,
                 root=None, images=[], normal=None)

    def model():
        torch.manual_seed(0)
        model = mintad.MINTAD(48, 8, 8, 2, layers=1, D=64)
        model.backbone = Unshuffle()
        return model

    def loss(model):
        f, label = model.backbone(data.to_device(images, cpu)), mintad.labels_of(samples, ["a", "b"])
        return mintad.objective(model, model.eval()(f, label), label)[1]["mse"].item()

    def train(model, state):
        mintad.train(model, state, samples, images, np.arange(8), tmp_path, cpu)

    def save_and_stop(folder, state, save=mintad.save):
        save(folder, state)
        if state["epoch"] == 3:
            raise KeyboardInterrupt

    straight = model()
    straight.mean, straight.std = mintad.channel_statistics(straight.backbone(data.to_device(images, cpu)))
    first = loss(straight)
    train(straight, dict(fresh))
    assert loss(straight) < 0.95 * first
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mintad, "save", save_and_stop)
        train(model(), dict(fresh))
    state, resumed = mintad.read_state(tmp_path / "seed1.pt"), model()
    assert state["epoch"] == 3 and len(state["optimizer"]) == 2
    resumed.load_state_dict(state["model"])
    train(resumed, state)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
