"""torchrun: several processes train on the same batches as one, and write what one writes.

The training loops run in forked processes of a gloo group, with SGD for AdamW, whose first steps
turn the rounding of a vanishing gradient into a whole step, and which does not notice a gradient
that is wrong by a factor. The command lines run as they are typed.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import minimaxad
import mintad

ROOT = Path(__file__).resolve().parents[1]
MODULES = {"mintad": mintad, "minimaxad": minimaxad}
CPU = torch.device("cpu")


def in_processes(count, module, work, folder):
    """What work() returns in the first of so many processes."""

    def process(rank, results):
        options = {"rank": rank, "world_size": count, "init_method": f"file://{folder}/group"}
        dist.init_process_group("gloo", **options)
        module.RANK = rank
        module.WORLD = count
        result = work()
        if rank == 0:
            results.put([x.numpy() for x in result])
        dist.destroy_process_group()

    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=process, args=(i, results)) for i in range(count)]
    for each in processes:
        each.start()
    found = [torch.from_numpy(x) for x in results.get(timeout=60)]
    for each in processes:
        each.join()
    return found


def count_images(model):
    """A list that gets the size of each batch."""
    seen = []
    model.register_forward_pre_hook(lambda model, inputs: seen.append(len(inputs[0])))
    return seen


def sgd(parameters, *_, **__):
    return torch.optim.SGD(parameters, 0.01)


# Nine images train in batches of 4, 4 and 1: of the last, two of three processes have none.
LINE = "--data mvtec --epochs 1 --batch-size 4 --lr 0.01 --out unused"


def train_mintad(line, monkeypatch):
    """A function that trains and returns how many images this process saw, and the weights."""
    monkeypatch.setattr(mintad, "CLIP", 1e9)  # would hide a factor
    monkeypatch.setattr(mintad, "JITTER", 0.0)  # each process draws noise for its own images
    monkeypatch.setattr(mintad, "DROPOUT", 0.0)
    monkeypatch.setattr(mintad, "learning_rate", lambda args, step, steps: 0.01)
    model = mintad.MINTAD(8, 2, 3, 2, D=16, layers=1)
    features = torch.randn(9, 6, 8)
    labels = torch.arange(9) % 2
    args, _ = mintad.parse_args([*LINE.split(), *line.split()])
    state = mintad.new_state(args, ["a", "b"])

    def work():
        seen = count_images(model)
        mintad.train(SimpleNamespace(model=model), features, labels, state, args, CPU)
        return [torch.tensor(sum(seen)), *(p.detach() for p in model.parameters())]

    return work


class Encoder(nn.Module):
    channels = [4, 8, 16]
    kernels = [[3], [3], [3]]
    mean = std = 1

    def __init__(self):
        super().__init__()
        sizes = [(3, 4, 4), (4, 8, 2), (8, 16, 2)]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, k, k) for a, b, k in sizes)
        self.requires_grad_(False)

    def forward(self, x):
        return [x := layer(x) for layer in self.layers]


def train_minimaxad(line, monkeypatch):
    """The same."""

    def scale(self, x):  # on CPUs each process normalises by its own images
        return x * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)

    monkeypatch.setattr(nn.BatchNorm2d, "forward", scale)
    model = minimaxad.MiniMaxAD(Encoder())
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8))
    args, _ = minimaxad.parse_args([*LINE.split(), "--size", "64", *line.split()])
    state = minimaxad.new_state(args, ["a"])

    def work():
        seen = count_images(model)
        minimaxad.train(model, pixels, state, args, CPU)
        weights = [p.detach() for p in model.parameters() if p.requires_grad]
        return [torch.tensor(sum(seen)), *weights]

    return work


LOSSES = "adc", "global", "local", "local-hm"
RUNS = [(train_mintad, ""), (train_mintad, "--literal --query mlp")]
RUNS += [(train_minimaxad, f"--loss {loss} --p-lim 0.9") for loss in LOSSES]


@pytest.mark.parametrize("train, line", RUNS)
def test_several_processes_train_the_weights_of_one(train, line, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.optim, "AdamW", sgd)
    module = mintad if train is train_mintad else minimaxad
    trained = {}
    for count in 1, 3:
        torch.manual_seed(0)
        work = train(line, monkeypatch)
        (tmp_path / str(count)).mkdir()
        trained[count] = in_processes(count, module, work, tmp_path / str(count))
    assert trained[1][0] == 9
    assert trained[3][0] <= 2 + 2 + 1
    for one, three in zip(trained[1][1:], trained[3][1:], strict=True):
        torch.testing.assert_close(three, one, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------ torchrun as typed

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONWARNINGS": "error::FutureWarning",  # of torch's DistributedDataParallel
}
TINY = "--data folder --root photos --size 64 --weights none --backbone test_efficientnet"


def torchrun(script, line):
    command = [*TORCHRUN, ROOT / script, *TINY.split(), *line.split()]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("script", MODULES)
def test_torchrun_runs_a_script_that_says_and_writes_everything_once(script, photos):
    line = "--unified --classes pill --epochs 1 --batch-size 6 --holdout 0.2 --out run"
    ended = torchrun(f"{script}.py", line)
    assert ended.returncode == 0, ended.stderr
    files = sorted(path.name for path in Path("run").iterdir())
    assert files == ["args.json", "log.txt", "metrics.json", "unified.pt"]
    assert ended.stdout.count("epoch 1/1: ") == ended.stdout.count("I-AUROC") == 1
    assert "Warning" not in ended.stderr
    assert json.loads(Path("run/metrics.json").read_text())["classes"].keys() == {"pill"}


def test_a_refused_run_fails_and_says_why_once(photos):
    ended = torchrun("mintad.py", "--root nowhere")
    assert ended.returncode != 0
    assert len([line for line in ended.stderr.splitlines() if line.startswith("error: ")]) == 1


@pytest.mark.parametrize("script", MODULES)
def test_every_process_starts_from_the_same_weights(script, tiny, call, monkeypatch):
    starts = []
    monkeypatch.setattr(MODULES[script], "fit", lambda net, *_: starts.append(net.state_dict()))
    for rank in 0, 1:
        monkeypatch.setattr(MODULES[script], "RANK", rank)
        call(script, *tiny, "--out", f"run{rank}")
    torch.testing.assert_close(starts[0], starts[1], rtol=0, atol=0)


def test_an_error_of_a_process_that_is_not_the_first_is_said(monkeypatch, capsys):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for module in MODULES.values():
        monkeypatch.setattr(module, "RANK", 1)
        with pytest.raises(SystemExit):
            module.main(["--epochs", "0"])
        assert "error: --epochs" in capsys.readouterr().err
