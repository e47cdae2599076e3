"""torchrun: several processes train on the same batches as one, and write what one writes.

Importing torch takes longer than these runs. So most tests share a program that imports it once
and starts torchrun's own agent with forked processes; one test types torchrun's command line.
There SGD stands in for AdamW, whose first steps turn the rounding of a vanishing gradient into a
whole step, and which does not notice a gradient that is wrong by a factor.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# Each line of its input is a job: a name, the number of processes, the script, its flags. It runs
# in the folder of its name, and its output lies there. Says of those of several whether it is done.
AGENT = """
import functools, importlib, multiprocessing, os, sys
sys.path.insert(0, sys.argv[1])
import timm, torch, torchvision, data, metrics
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
torch.set_num_threads(1)

def sgd(parameters, *_, **__):
    return torch.optim.SGD(parameters, 0.01)

def scale(self, x):
    return x * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)

def work(name, script, flags):
    os.chdir(name)
    os.dup2(os.open("output", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    module = importlib.import_module(script)
    torch.optim.AdamW = sgd
    if script == "mintad":  # dropout and jitter are drawn by each process for its own images
        small = functools.partialmethod(module.MINTAD.__init__, D=16, layers=1)
        module.MINTAD.__init__ = small
        module.DROPOUT = module.JITTER = 0.0
        module.CLIP = 1e9
        module.learning_rate = lambda args, step, steps: 0.01
    else:  # on CPUs each process normalises by its own images
        module.UNIREPLKNET["tiny"] = (8, [3], [13], [13])
        torch.nn.BatchNorm2d.forward = scale
    module.main(flags)

for line in sys.stdin:
    name, processes, script, *flags = line.split()
    if processes == "1":
        alone = multiprocessing.get_context("fork").Process(target=work, args=(name, script, flags))
        alone.start()
        alone.join()
        continue
    options = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "start_method": "fork"}
    config = LaunchConfig(1, 1, int(processes), run_id=name, max_restarts=0, **options)
    try:
        elastic_launch(config, work)(name, script, flags)
        print(name, "done", flush=True)
    except Exception:
        print(name, "failed", flush=True)
"""
FLAGS = "--data folder --root photos --unified --size 64 --weights none --holdout 0 --out run"
RUNS = {
    "mintad": "mintad --backbone test_efficientnet --optimizer adamw --distance euclidean",
    "adc": "minimaxad --backbone tiny --loss adc --lr 0.05",
    "global": "minimaxad --backbone tiny --loss global --lr 0.05",
    "local-hm": "minimaxad --backbone tiny --loss local-hm --p-lim 0.9 --lr 0.05",
}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def jobs(photos_to_copy, tmp_path_factory):
    """The folder of the jobs' folders, and {job of several processes: "done" or "failed"}.

    Nine photos train in batches of 4, 4 and 1: of the last, two of three processes have none.
    """
    root = tmp_path_factory.mktemp("jobs")
    lines = []
    for name, flags in RUNS.items():
        for count in 1, 3:
            lines.append(f"{name}{count} {count} {flags} {FLAGS} --epochs 1 --batch-size 4")
    lines.append("refused 2 mintad --data folder --root nowhere --out run")
    for line in lines:
        folder = root / line.split()[0]
        shutil.copytree(photos_to_copy, folder / "photos")
        for i in range(3):
            (folder / f"photos/pill/train/good/{i:03d}.png").unlink()

    options = {"cwd": root, "env": ENVIRONMENT, "text": True, "timeout": 900}
    agent = [sys.executable, "-c", AGENT, ROOT]
    ended = subprocess.run(agent, input="\n".join(lines), stdout=subprocess.PIPE, **options)
    return root, dict(line.split() for line in ended.stdout.splitlines())


@pytest.fixture(params=RUNS)
def runs(jobs, request):
    """The folders of a run of one process and of the same with three."""
    root, ended = jobs
    name = request.param
    assert ended[f"{name}3"] == "done", (root / f"{name}3/output").read_text()
    return root / f"{name}1/run", root / f"{name}3/run"


def test_several_processes_train_the_weights_of_one(runs):
    one, other = (torch.load(run / "unified.pt", weights_only=True) for run in runs)
    key = "detector" if "detector" in one else "model"
    for name, tensor in one[key].items():
        torch.testing.assert_close(other[key][name], tensor, rtol=1e-3, atol=1e-5)


def test_several_processes_write_and_say_what_one_does(runs):
    one, other = (json.loads((run / "metrics.json").read_text())["classes"] for run in runs)
    for cls, row in one.items():
        assert other[cls] == pytest.approx(row, abs=1e-3)
    one, other = ({path.name for path in run.iterdir()} for run in runs)
    assert one == other
    output = (runs[1].parent / "output").read_text()
    assert output.count("epoch 1/1: ") == output.count("I-AUROC") == 1


def test_a_refused_run_fails_and_says_why_once(jobs):
    root, ended = jobs
    output = (root / "refused/output").read_text()
    assert [line.partition(" ")[0] for line in output.splitlines()].count("error:") == 1
    assert ended["refused"] == "failed"


def test_torchrun_runs_a_script(photos, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = f"{FLAGS} --backbone test_efficientnet --classes pill --epochs 1 --batch-size 6".split()
    subprocess.run([*torchrun, ROOT / "minimaxad.py", *flags], env=ENVIRONMENT, check=True)
    files = sorted(path.name for path in Path("run").iterdir())
    assert files == ["args.json", "log.txt", "metrics.json", "unified.pt"]
