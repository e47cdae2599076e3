"""Every command line of README is one that its program takes, and its Python lines run."""

import re
import shlex
import shutil
import textwrap
from functools import partial
from pathlib import Path

import bench
import memory_bank
import timm
import torch
from test_datasets import LAYOUTS, touch
from torch.distributed import run as torchrun

import data
import metrics
import minimaxad
import mintad

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
METHODS = {"mintad.py": mintad, "minimaxad.py": minimaxad}
OTHERS = {
    "metrics.py": metrics.main,
    "tests/memory_bank.py": memory_bank.main,
    "tests/bench.py": partial(bench.main, batches=[1], photos=1),
}


def commands():
    """Program and arguments of each command. Flags go on from the section's last one."""
    pattern = r"^(##.*|<details>.*)|^    (\w+ .*)|`([^`\n]+)`"
    for heading, block, span in re.findall(pattern, README, re.MULTILINE):
        if heading:
            last = ["minimaxad.py" if "MiniMaxAD" in heading else "mintad.py"]
            continue
        words = shlex.split(block or span, comments=True)
        if words[0] == "torchrun":
            args = torchrun.parse_args(words[1:])
            words = [args.training_script, *args.training_script_args]
        if words[0] == "python":
            words = words[1:]
        if words[0] in METHODS or (words[0].endswith(".py") and len(words) > 1):
            last = words
            yield words
        elif words[0].startswith("--") and len(words) > 1:
            yield [*last, *words]


def lay_out(args, cifar10):
    """A tiny set of that name where the command looks for it."""
    parts = args.data.split("+")
    for name in parts:
        root = Path(args.root or "data")
        if len(parts) > 1 or not args.root:
            root /= name
        if name == "cifar10" and not root.exists():
            cifar10(root)
        for cls in args.classes or ["cup"]:
            layout = LAYOUTS.get(name, LAYOUTS["goodsad"].replace("box", cls))
            for line in layout.split("\n")[1:]:
                touch(root, *line.split()[2:])


def take(program, words, tiny_runs, cifar10):
    """Its own parser and checks have the arguments; a training finds its data and leaves a run."""
    run = tiny_runs[program.removesuffix(".py") if program in METHODS else "mintad"]
    words = [str(run) if word == "RUN" else word for word in words]
    if program not in METHODS:
        return OTHERS[program](words)
    args, _ = METHODS[program].parse_args(words)
    if not (args.eval or args.resume):
        lay_out(args, cifar10)
        assert all(data.load(args.data, args.root, args.classes, args.normals))
        if args.backbone not in minimaxad.UNIREPLKNET:
            assert timm.models.get_pretrained_cfg(args.backbone), f"no network {args.backbone}"
        shutil.copytree(run, args.out, dirs_exist_ok=True)


def test_every_command_is_taken(tiny_runs, photos, cifar10, monkeypatch):
    monkeypatch.setattr(memory_bank, "compare", lambda args: {})  # what follows the parser
    refused = []
    programs = set()
    for program, *words in commands():
        programs.add(program)
        try:
            take(program, words, tiny_runs, cifar10)
        except (Exception, SystemExit) as error:
            refused.append(f"{program} {shlex.join(words)}: {error!r}")
    assert not refused
    assert programs == METHODS.keys() | OTHERS.keys()


def test_every_flag_that_is_named_exists():
    known = "".join(method.get_parser().format_help() for method in METHODS.values())
    assert set(re.findall(r"`(--[a-z-]+)`", README)) <= set(re.findall(r"--[a-z-]+", known))


def test_the_lines_that_use_an_exported_program_run(script, tiny_run, call):
    assert call(script, "--eval", tiny_run, "--export", "net.pt2").status == 0
    (lines,) = re.findall(r"^    import torch\n(?:    .*\n|\n)+", README, re.MULTILINE)
    if script == "minimaxad":
        lines = lines.replace("s, score, cls, threshold", "S, score, threshold")
        assert "`S, score, threshold`" in README
    names = {"photo": torch.zeros(2, 3, 90, 70, dtype=torch.uint8)}
    exec(textwrap.dedent(lines), names)
    assert names["defective"].shape == (2,)
