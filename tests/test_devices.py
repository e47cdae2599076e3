"""A step of each method with every tensor on torch's "meta" device, which stands for a GPU: a tensor that a step makes on
the CPU is an error there, and so is a value that the host reads and would wait for."""
import argparse
import contextlib

import pytest
import torch

import mintad
import minimaxad

META = torch.device("meta")


def no_autocast(*args, **options):
    return contextlib.nullcontext()


def mint(**variant):
    kind = mintad.UniAD if "uniad" in variant else mintad.MINTAD
    model = kind(12, 8, 8, 3, layers=1, **{key: x for key, x in variant.items() if key != "uniad"}).to(META)
    f, label = torch.randn(4, 64, 12, device=META), torch.tensor([0, 1, 2, 0], device=META)
    loss, _ = mintad.objective(model.train(), model(f, label), label)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    settings = argparse.Namespace(optimizer="muon", weight_decay=1e-4)
    for optimizer, _ in mintad.optimizers(model, settings, META):
        optimizer.step()
    f_, r, _, _ = model.eval()(f, label)
    return mintad.image_score(mintad.upsample(mintad.anomaly_map(f_, r, 8, 8), 64), "pool")


def minimax(arch, loss):
    encoder = minimaxad.load_encoder("resnet18" if arch == "rd" else "unireplknet_a", "none")
    model, x = minimaxad.MiniMaxAD(encoder, arch).to(META), torch.rand(2, 3, 64, 64, device=META)
    value, mined = minimaxad.training_loss(loss, *model.train()(x), 64)
    value.backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-3).step()
    minimaxad.map_variance(model(x)[0])
    S = minimaxad.anomaly_map(*model.eval()(x), 64, "bilinear")
    return torch.stack([minimaxad.image_score(S, score)[1] for score in ("max", "mean", "max5x5", "top1")])


STEPS = {f"mintad {variant}": (mint, variant) for variant in (
    {}, {"query": "mlp", "prior_loss": False}, {"prompt": "label", "cls_loss": False}, {"uniad": True},
    {"uniad": True, "query": "pool"})} | {f"minimaxad {arch} {loss}": (minimax, {"arch": arch, "loss": loss}) for arch, loss in (
        ("minimax", "adc"), ("minimax", "global"), ("rd", "local-hm"))}


@pytest.mark.parametrize("name", list(STEPS))
def test_no_tensor_is_made_on_the_cpu_and_none_is_read_in_the_middle_of_a_step(name, monkeypatch):
    monkeypatch.setattr(torch, "autocast", no_autocast)  # it does not know this device
    make, options = STEPS[name]
    assert make(**options).device == META
