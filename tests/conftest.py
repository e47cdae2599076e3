"""What the tests share: the project on the path, tiny runs, and the toy runs.

The toy runs are what a newcomer types, the scripts without data, and take a minute or two each.
They begin when the tests do, in processes of their own; the tests that need them come last.
"""

import contextlib
import functools
import importlib
import io
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import trees

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

import data  # noqa: E402

# -------------------------------------------------------------------------------------- toy runs

TOY_RUNS = {
    "mintad": ["mintad.py"],
    "muon": ["mintad.py", "--optimizer", "muon"],
    "minimaxad": ["minimaxad.py"],
}
TEMPORARY = tempfile.TemporaryDirectory()
started = {}


def needs_toy_run(item):
    return "toy_run" in item.fixturenames


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")  # no library's warning reaches a user
    unwritable = "ignore:The given buffer is not writable"  # torch 2.11's, of its own export.load
    config.addinivalue_line("filterwarnings", unwritable)


def pytest_collection_modifyitems(items):
    items.sort(key=needs_toy_run)


def pytest_collection_finish(session):
    if session.config.option.collectonly or not any(map(needs_toy_run, session.items)):
        return
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONWARNINGS"] = "error::FutureWarning"
    for name, (script, *flags) in TOY_RUNS.items():
        folder = Path(TEMPORARY.name, name)
        folder.mkdir()
        command = [sys.executable, ROOT / script, *flags]
        with open(folder / "output", "w") as output:
            options = {"cwd": folder, "env": environment, "stdout": output, "stderr": output}
            started[name] = subprocess.Popen(command, **options)


def pytest_unconfigure():
    for process in started.values():
        process.kill()
        process.wait()
    TEMPORARY.cleanup()


@pytest.fixture(scope="session")
def toy_run():
    """A function: "mintad", "muon" or "minimaxad" -> the folder of that finished run."""

    def finished(name):
        status = started[name].wait(timeout=1800)
        assert status == 0, Path(TEMPORARY.name, name, "output").read_text()
        script, *_ = TOY_RUNS[name]
        return Path(TEMPORARY.name, name, f"runs/{script.removesuffix('.py')}-toy-unified")

    return finished


# ------------------------------------------------------------------------------------- tiny runs


class Result(NamedTuple):
    status: int
    out: str
    error: str  # the last line of stderr


@pytest.fixture(scope="session")
def call():
    """A function that runs a script in this process: call("mintad", "--eval", folder) -> Result."""

    def call(script, *args):
        out = io.StringIO()
        err = io.StringIO()
        status = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                importlib.import_module(script).main([str(arg) for arg in args])
            except SystemExit as end:
                status = end.code
        return Result(status, out.getvalue(), (err.getvalue().splitlines() or [""])[-1])

    return call


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    logging.getLogger().setLevel("WARNING")  # main() sets another one


@pytest.fixture(params=["mintad", "minimaxad"])
def script(request):
    return request.param


@pytest.fixture(scope="session")
def photos_to_copy(tmp_path_factory):
    """photos/{pill,weave}: 6 images to train, 2 good and 2 defective ones with masks."""
    root = tmp_path_factory.mktemp("original") / "photos"
    for cls in "pill", "weave":
        _, train, test = data.load("toy", classes=[cls])
        for sample in train[:6] + test[:2] + test[-2:]:
            name = sample.image.removeprefix("toy:")
            trees.save(root / f"{name}.png", sample.pixels)
            if sample.label:
                trees.save(root / f"{name.replace('/test/', '/ground_truth/')}.png", sample.defect)
    return root


@pytest.fixture
def photos(photos_to_copy, tmp_path, monkeypatch):
    """The working directory is a new one, in which lie a user's photos."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(photos_to_copy, "photos")


@pytest.fixture
def cifar10(monkeypatch):
    """A function that writes a tiny set, cifar10(root); its files' MD5s are not the set's."""
    check = "torchvision.datasets.cifar.check_integrity"
    monkeypatch.setattr(check, lambda path, md5: os.path.exists(path))
    data.cifar10_part.cache_clear()
    return functools.partial(trees.cifar10, labels=data.CIFAR10)


def shrink(monkeypatch):
    """Networks of a few channels: a run takes less than a second."""
    mintad, minimaxad = map(importlib.import_module, BACKBONE)
    for network in mintad.MINTAD, mintad.UniAD:
        small = functools.partialmethod(network.__init__, D=16, layers=1)
        monkeypatch.setattr(network, "__init__", small)
    monkeypatch.setitem(minimaxad.UNIREPLKNET, "tiny", (8, [3], [13], [13]))


TINY = "--data folder --root photos --unified --size 64 --weights none --epochs 3 --batch-size 4"
BACKBONE = {
    "mintad": "--backbone test_efficientnet --optimizer adamw --distance euclidean",
    "minimaxad": "--backbone tiny --size 72 --crop 64 --score mean",
}


@pytest.fixture
def tiny(script, photos, monkeypatch):
    """The flags of a tiny run on the photos; more may follow."""
    shrink(monkeypatch)
    return f"{TINY} {BACKBONE[script]}".split()


@pytest.fixture(scope="session")
def tiny_runs(photos_to_copy, call, tmp_path_factory):
    """The folder of a finished tiny run of each script, which is trained when it is asked for."""

    class Runs(dict):
        def __missing__(self, script):
            self[script] = tmp_path_factory.mktemp(script) / "run"
            with pytest.MonkeyPatch.context() as monkeypatch:
                shrink(monkeypatch)
                monkeypatch.chdir(photos_to_copy.parent)
                flags = [*TINY.split(), *BACKBONE[script].split()]
                ended = call(script, *flags, "--out", self[script])
            assert ended.status == 0, ended.error
            return self[script]

    return Runs()


@pytest.fixture
def tiny_run(script, tiny, tiny_runs):
    """The folder of the script's tiny run; as for a run, photos and small networks are there."""
    return tiny_runs[script]
