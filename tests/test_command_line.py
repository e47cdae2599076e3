"""The command line of both scripts: what the flags mean, and what is refused, in one line."""

import argparse
import csv
import importlib.util
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from PIL import Image
from safetensors.torch import save_file

import data
import metrics
import minimaxad
import mintad

MODULES = {"mintad": mintad, "minimaxad": minimaxad}


def rows(folder):
    return json.loads(Path(folder, "metrics.json").read_text())["classes"]


# ------------------------------------------------------------------------------------- refusals

OUT_OF_RANGE = """--size 0, --epochs 0, --batch-size 0, --lr -1, --lr nan, --lr x, --holdout 2,
--quantile 2, --quantile 0.9, --seed 99999999999999999999, --device cuda:99, --device meta,
--predict photos, --export net.pt2, --score nonsense"""
NOT_UNIADS = "--prompt label, --no-adapter, --no-cls-loss, --no-prior-loss, --literal, --query inr"

BOTH = [  # a command line, and what the line on stderr must name
    *[(line, line.split()[0]) for line in OUT_OF_RANGE.split(",")],
    ("--root nowhere", "nowhere"),
    ("--data toy --root photos", "--data folder"),
    ("--backbone nonsense", "nonsense"),
    ("--backbone vit_tiny_patch16_224", "vit_tiny_patch16_224"),
    ("--weights nowhere.pth", "nowhere.pth"),
    ("--data cifar10 --no-unified", "cifar10"),
    ("--out photos", "photos"),
    ("--out photos/pill/train/good/000.png", "000.png"),
]
OWN = {
    "mintad": [
        *[(f"--uniad {line}", "uniad") for line in NOT_UNIADS.split(",")],
        ("--query per-class", "--uniad"),
        ("--uniad --query text", "--text"),
        ("--uniad --query text --text nowhere.safetensors", "nowhere.safetensors"),
        ("--text nowhere.safetensors", "--query text"),
        ("--uniad --size 32", "--size"),
        ("--query learned --no-prior-loss --prompt image", "--prompt"),
        ("--prompt none", "--prompt"),
        ("--data cifar10 --prompt label", "cifar10"),
    ],
    "minimaxad": [
        ("--crop 73", "--crop"),
        ("--crop 32", "--size"),  # one position is left
        ("--crop 0 --size 32", "--size"),
        ("--arch rd", "--arch rd"),
        ("--p-hard 2", "--p-hard"),
        ("--p-lim -1", "--p-lim"),
    ],
}
TRAINED = [  # RUN stands for the folder of a finished run, which has the settings
    ("--eval nowhere.pt", "nowhere.pt"),
    ("--eval photos", "--eval photos: no checkpoint"),
    ("--eval ~/here", "/home/me/here"),
    ("--eval RUN --lr 3", "--lr"),
    ("--eval RUN --batch-size 4", "--batch-size"),  # also what the run has
    ("--eval RUN --resume", "--resume"),
    ("--eval RUN --save-maps", "--out"),
    ("--eval RUN --export a.pt2 --classes gro\u0308n", "expected one of pill, weave"),
    ("--eval RUN --out photos", "photos"),
    ("--eval RUN --predict photos", "--out"),
    ("--eval RUN --predict nowhere --out new", "nowhere"),
    ("--eval RUN --predict ~/here --out new", "/home/me/here"),
    ("--eval RUN --export net", "net.pt2"),
    ("--resume", "--out"),
    ("--resume --out nowhere", "nowhere; start it again"),
    ("--resume --out RUN --lr 3", "--lr"),
]
REFUSED = [(script, *row) for script in MODULES for row in BOTH + OWN[script]]


def assert_refused(result, said):
    assert result.status == 2
    assert said in result.error


@pytest.mark.parametrize("script, line, said", REFUSED)
def test_refused(script, line, said, tiny, call):
    assert_refused(call(script, *tiny, "--epochs", 1, *line.split()), said)


@pytest.mark.parametrize("line, said", TRAINED)
def test_refused_of_a_finished_run(script, tiny_run, line, said, call, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert_refused(call(script, *line.replace("RUN", str(tiny_run)).split()), said)


@pytest.mark.parametrize("flag", ["--eval", "--root", "--out", "--classes", "--weights"])
def test_an_unset_variable_is_refused(script, tiny, flag, call):
    assert_refused(call(script, *tiny, flag, ""), flag)


def test_predict_and_export_are_for_one_process(script, tiny_run, call, monkeypatch):
    monkeypatch.setattr(MODULES[script], "WORLD", 2)
    for flags in ["--export", "net.pt2"], ["--predict", "photos", "--out", "new"]:
        assert_refused(call(script, "--eval", tiny_run, *flags), "torchrun")


def test_a_checkpoint_of_the_other_script_is_refused(script, tiny_runs, call):
    (other,) = MODULES.keys() - {script}
    assert_refused(call(script, "--eval", tiny_runs[other]), str(tiny_runs[other]))


def test_an_unfinished_run_is_not_evaluated(script, tiny_run, call):
    state = torch.load(tiny_run / "unified.pt", weights_only=True)
    torch.save(state | {"trained": False, "epoch": 2}, "unified.pt")
    assert_refused(call(script, "--eval", "unified.pt"), "--resume")


EDITS = [{"args": args} for args in (None, [], argparse.Namespace(size=64))]
EDITS += [{"epoch": "3"}, {"classes": "pill"}, {"model": None, "detector": None}]
EDITS += [{"calibration": None}, {"calibration": {"": {}, "pill": {}, "weave": {}}}]


@pytest.mark.parametrize("edit", EDITS)
def test_a_checkpoint_that_is_not_as_it_was_written_is_refused(script, tiny_run, call, edit):
    state = torch.load(tiny_run / "unified.pt", weights_only=True)
    state.update({key: value for key, value in edit.items() if key in state})
    torch.save(state, "other.pt")
    assert_refused(call(script, "--eval", "other.pt"), "other.pt")


def test_a_tensor_of_another_shape_is_refused(script, tiny_run, call):
    state = torch.load(tiny_run / "unified.pt", weights_only=True)
    tensors = state.get("model") or state["detector"]
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 4)
    tensors[name] = tensors[name][..., :1]
    Path("edited").mkdir()
    torch.save(state, "edited/unified.pt")
    assert_refused(call(script, "--eval", "edited"), name)
    flags = "--eval", "edited", "--predict", "photos", "--out", "new"
    assert_refused(call(script, *flags), name)
    torch.save(state | {"trained": False}, "edited/unified.pt")
    assert_refused(call(script, "--out", "edited", "--resume"), name)


# ------------------------------------------------------------ one model a class, collected later


@pytest.fixture
def models(script, tiny, call):
    """A function that trains models of one class each, side by side, and collects them."""

    def models(**flags):
        Path("all").mkdir()
        for cls, more in flags.items():
            own = "--no-unified", "--classes", cls, "--epochs", 1, "--out", cls
            assert call(script, *tiny, *own, *more.split()).status == 0
            (Path("all") / f"{cls}.pt").write_bytes(Path(cls, f"{cls}.pt").read_bytes())

    return models


def test_models_that_were_trained_side_by_side_have_one_table(script, models, call):
    models(pill="", weave="")
    call(script, "--eval", "all", "--out", "table")
    assert rows("table") == rows("pill") | rows("weave")


def test_models_of_other_settings_or_of_one_class_are_not_collected(script, models, call):
    models(pill="", weave="--seed 2")
    assert_refused(call(script, "--eval", "all"), "--seed")
    Path("all/weave.pt").write_bytes(Path("all/pill.pt").read_bytes())
    assert_refused(call(script, "--eval", "all"), "both have pill")


def test_models_of_other_roots_are_collected_if_one_has_their_classes(script, models, call):
    shutil.copytree("photos", "other")
    models(pill="", weave="--root other")
    assert_refused(call(script, "--eval", "all"), "--root")
    call(script, "--eval", "all", "--root", "photos", "--out", "table")
    assert rows("table") == rows("pill") | rows("weave")
    shutil.rmtree("photos/weave")
    for path in Path("all").iterdir():
        state = torch.load(path, weights_only=True)
        state["args"]["classes"] = None  # as of a run on a root that has no other
        torch.save(state, path)
    assert "weave: no test images" in call(script, "--eval", "all", "--root", "photos").out


# ------------------------------------------------------------------------- defaults and presets

# Of the papers (Sec. 4.1 of both; MiniMaxAD's baseline) and of DESIGN's choices beyond them.
PRESETS = """
mintad --data mvtec: size=224 epochs=1000 batch_size=32 lr=0.0001 weight_decay=0.0001 holdout=0.0
mintad --data mvtec: backbone=tf_efficientnet_b4.aa_in1k query=inr prompt=feature unified=False
mintad --data mvtec: pool=bilinear distance=euclidean optimizer=adamw score=max levels=4
mintad --data folder: pool=area distance=mahalanobis optimizer=muon lr=0.0005 epochs=50 batch_size=8
mintad --data folder --epochs 7 --pool bilinear: epochs=7 pool=bilinear optimizer=muon
mintad --data cifar10: unified=True levels=5 score=mean
mintad --uniad: query=layerwise score=avgpool
mintad --data cifar10 --uniad: query=layerwise score=mean levels=5
mintad --query mlp: prior_loss=False
mintad --query mlp --prior-loss: prior_loss=True
mintad --query learned --no-cls-loss --no-prior-loss: prompt=none
mintad --no-unified: weights=none out=runs/mintad-toy-separate
minimaxad --data visa --loss adc --size 64: size=64 epochs=130 loss=adc
minimaxad --data goodsad: size=224 crop=0 epochs=240 loss=adc batch_size=16 lr=0.005 gamma=0.995
minimaxad --data mad: size=400 epochs=150 loss=adc p_hard=0.9999 p_lim=0.9995 weight_decay=5e-05
minimaxad --data mad --arch rd: size=400 epochs=200 loss=global lr=0.005 gamma=1.0 weight_decay=0.0
minimaxad --data mad --arch rd: backbone=wide_resnet50_2.tv_in1k batch_size=16
minimaxad --data mvtec --unified: size=256 crop=0 epochs=100 loss=adc backbone=unireplknet_n
minimaxad --data visa: size=256 crop=0 epochs=130 loss=global score=max
minimaxad --data mvtec: size=256 epochs=130 loss=global
minimaxad --data aebad --unified: size=256 crop=224 epochs=130 loss=global
minimaxad --data folder --unified: size=256 epochs=240 loss=adc holdout=0.1
minimaxad --data cifar10: unified=True score=mean
minimaxad --no-unified: weights=none out=runs/minimaxad-toy-separate
"""


@pytest.mark.parametrize("line", PRESETS.strip().splitlines())
def test_typed_wins_over_the_preset_and_that_over_the_default(line):
    command, expected = line.split(": ")
    script, *flags = command.split()
    args, _ = MODULES[script].parse_args(flags)
    found = [f"{key}={getattr(args, key)}" for key in re.findall(r"(\w+)=", expected)]
    assert " ".join(found) == expected


NOT_ITS = "--backbone resnet18, --size 256, --literal, --pool area, --distance mahalanobis"
NOT_ITS += ", --query mlp, --query learned, --prompt label, --prompt image, --no-adapter"
NOT_ITS += ", --no-cls-loss, --no-prior-loss, --classes screw, --weights none"
FIGURES = [  # of the papers, which stand beside their own models only
    ("mintad", "mvtec --unified --optimizer muon", "mean", "i_auroc=0.986 p_aupr=0.498"),
    ("mintad", "mvtec --unified --uniad", "screw", "i_auroc=0.875 p_aupr=0.296"),
    ("mintad", "visa --unified", "mean", "i_auroc=0.957 p_aupr=0.394"),
    ("mintad", "cifar10", "01234", "i_auroc=0.867"),
    ("mintad", "mvtec --classes screw", "screw", "i_auroc=0.978"),
    ("mintad", "mvtec --classes screw", "mean", ""),
    *[("mintad", f"mvtec --unified {line}", "screw", "") for line in NOT_ITS.split(",")],
    ("minimaxad", "aebad", "view", "i_auroc=0.859 aupro=0.778"),
    ("minimaxad", "visa", "mean", "i_auroc=0.964 aupro=0.904"),
    ("minimaxad", "mvtec --unified", "pill", "i_auroc=0.979"),
    ("minimaxad", "visa --unified --arch rd", "macaroni2", "i_auroc=0.862"),
    ("minimaxad", "goodsad", "food_box", "i_auroc=0.789 p_aupr=0.2 aupro=0.839"),
    ("minimaxad", "goodsad --arch rd", "drink_can", "i_auroc=0.633 p_aupr=0.174 aupro=0.819"),
    ("minimaxad", "mad --epochs 9", "mean", "i_auroc=0.847"),
    ("minimaxad", "mvtec --unified --classes pill", "pill", ""),
    ("minimaxad", "goodsad --classes food_box", "mean", ""),
    ("minimaxad", "goodsad --size 64", "food_box", ""),
    ("minimaxad", "goodsad --weights none", "food_box", ""),
    ("minimaxad", "goodsad --loss local", "food_box", ""),
]


@pytest.mark.parametrize("script, line, row, expected", FIGURES)
def test_the_papers_figures_stand_beside_its_own_models_only(script, line, row, expected):
    args, _ = MODULES[script].parse_args(["--data", *line.split()])
    figures = MODULES[script].published(args, [*"ab"]).get(row, {})
    assert {key: str(round(x, 3)) for key, x in figures.items()} == dict(
        part.split("=") for part in expected.split()
    )


TABLES = [("mintad", "mvtec --unified"), ("mintad", "visa --unified"), ("mintad", "mvtec")]
TABLES += [("minimaxad", line) for line in ("mvtec --unified", "visa --unified", "goodsad")]


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("script, line", TABLES)
def test_the_mean_of_the_papers_rows_is_the_one_it_prints(script, line, baseline):
    flags = {"mintad": ["--uniad"], "minimaxad": ["--arch", "rd"]}[script] if baseline else []
    args, _ = MODULES[script].parse_args(["--data", *line.split(), *flags])
    rows = MODULES[script].published(args, [*"ab"])
    for metric, mean in rows.pop("mean").items():
        assert np.mean([row[metric] for row in rows.values()]) == pytest.approx(mean, abs=6e-4)


def test_mintad_tells_which_settings_are_not_the_papers(tiny_runs):
    log = (tiny_runs["mintad"] / "log.txt").read_text()
    assert "'lr': 0.0005" in log  # of the preset
    assert "'optimizer': 'adamw'" in log  # typed


@pytest.mark.parametrize("flag, told", [("--unified", False), ("--no-unified", True)])
@pytest.mark.parametrize("script", ["minimaxad"])
def test_minimaxad_tells_that_a_setting_is_not_the_papers(script, flag, told, tiny, call):
    out = call(script, *tiny, "--data", "mvtec", flag, "--classes", "pill", "--epochs", 1).out
    assert bool(re.search("note: .*paper", out)) == told


# ---------------------------------------------------------------------------- evaluating a run


def test_eval_finds_images_that_were_moved_and_draws_each(script, tiny_run, call, monkeypatch):
    drawn = []
    save_maps = metrics.save_maps
    monkeypatch.setattr(metrics, "save_maps", lambda *x: drawn.append(x) or save_maps(*x))
    Path("photos").rename("moved")
    call(script, "--eval", tiny_run, "--root", "moved", "--save-maps", "--out", "new")
    assert rows("new") == rows(tiny_run)
    assert len(list(Path("new/maps").glob("*/*.*"))) == 8
    size = {"mintad": (64, None), "minimaxad": (72, 64)}[script]
    for _, images, samples, _, _, masks, _ in drawn:
        np.testing.assert_array_equal(images, data.decode(samples, *size))
        np.testing.assert_array_equal(masks, data.decode_masks(samples, *size))
    call(script, "--eval", tiny_run, "--root", "moved", "--classes", "weave", "--out", "weave")
    assert rows("weave") == {"weave": rows(tiny_run)["weave"]}


ANOTHER = {"mintad": ("--distance", "mahalanobis"), "minimaxad": ("--score", "top1")}


def test_eval_can_score_in_another_way_but_predict_has_the_runs_limits(script, tiny_run, call):
    call(script, "--eval", tiny_run, *ANOTHER[script], "--out", "new")
    assert rows("new") != rows(tiny_run)
    for use in ["--predict", "photos"], ["--save-maps"]:
        flags = *use, "--out", "verdicts", *ANOTHER[script]
        assert_refused(call(script, "--eval", tiny_run, *flags), f"{ANOTHER[script][0]} ")


@pytest.mark.parametrize("script", ["mintad"])
def test_what_was_typed_against_a_presets_choice_holds_when_the_run_is_evaluated(
    script, tiny, call
):
    call(script, *tiny, "--query", "mlp", "--prior-loss", "--epochs", 1, "--out", "run")
    call(script, "--eval", "run", "--out", "new")
    assert rows("new") == rows("run")


@pytest.mark.parametrize("script", ["mintad"])
def test_a_variant_that_needs_the_class_keeps_its_texts_and_is_told_the_class(script, tiny, call):
    texts = {"pill": torch.zeros(5), "weave": torch.ones(5)}
    save_file(texts, "texts.safetensors")
    flags = "--uniad --query text --text texts.safetensors --size 128 --out run".split()
    call(script, *tiny, *flags)
    Path("texts.safetensors").unlink()
    state = torch.load("run/unified.pt", map_location="cpu", weights_only=True)
    kept = state["detector"]["model.text"]
    assert torch.equal(kept, torch.stack([texts["pill"], texts["weave"]]))
    call(script, "--eval", "run", "--out", "new")
    assert rows("new") == rows("run")
    assert_refused(call(script, "--eval", "run", "--predict", "photos", "--out", "1"), "--classes")


@pytest.mark.parametrize("flags", [[], ["--classes", "weave"]])
def test_an_exported_program_judges_a_photo_of_any_size_as_predict(script, tiny_run, call, flags):
    assert "net.pt2" in call(script, "--eval", tiny_run, "--export", "net.pt2", *flags).out
    network = torch.export.load("net.pt2").module()
    for size in (64, 64), (300, 200), (97, 1024):
        for i, cls in enumerate(["pill", "weave"]):
            image = Image.open(next(Path(f"photos/{cls}/test/good").iterdir())).resize(size)
            trees.save(f"odd/{i}.png", np.array(image))
        call(script, "--eval", tiny_run, "--predict", "odd", "--out", f"{size}", *flags)
        with open(f"{size}/predictions.csv", newline="") as file:
            verdicts = list(csv.DictReader(file))
        photos = [np.array(Image.open(row["file"])) for row in verdicts]
        batch = torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2)
        maps, scores, *classes, thresholds = (x.numpy() for x in network(batch))
        assert maps.shape == (2, 64, 64)
        for key, found in ("score", scores), ("threshold", thresholds):
            assert found.tolist() == pytest.approx([float(row[key]) for row in verdicts], rel=1e-3)
        for found in classes:  # mintad.py's
            assert [["pill", "weave"][k] for k in found] == [row["class"] for row in verdicts]


@pytest.mark.parametrize("script", ["mintad"])
def test_a_variant_that_needs_the_class_is_exported_for_one(script, tiny, call):
    call(script, *tiny, "--prompt", "label", "--epochs", 1, "--out", "run")
    assert_refused(call(script, "--eval", "run", "--export", "net.pt2"), "--classes")
    call(script, "--eval", "run", "--export", "net.pt2", "--classes", "weave")
    network = torch.export.load("net.pt2").module()
    assert network(torch.zeros(3, 3, 90, 70, dtype=torch.uint8))[2].tolist() == [1, 1, 1]


def test_export_replaces_no_file(script, tiny_run, call):
    Path("mine.pt2").write_text("mine")
    assert_refused(call(script, "--eval", tiny_run, "--export", "mine.pt2"), "mine.pt2")
    assert Path("mine.pt2").read_bytes() == b"mine"


def test_without_torchrun_there_is_one_process(script, tiny, monkeypatch):
    monkeypatch.setenv("RANK", "1")  # as a job scheduler may set them
    monkeypatch.setenv("WORLD_SIZE", "2")
    spec = importlib.util.spec_from_file_location("anew", MODULES[script].__file__)
    anew = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(anew)
    networks = {"mintad": "MINTAD", "minimaxad": "UNIREPLKNET"}[script]  # the small ones
    monkeypatch.setattr(anew, networks, getattr(MODULES[script], networks))
    anew.main([*tiny, "--epochs", "1", "--out", "run"])
    assert list(rows("run")) == ["pill", "weave"]
