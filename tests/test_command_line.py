"""The command line of both scripts: what the flags mean, and what is refused, in one line."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import data
import metrics
import minimaxad
import mintad

MODULES = {"mintad": mintad, "minimaxad": minimaxad}


def rows(folder):
    return json.loads(Path(folder, "metrics.json").read_text())["classes"]


# ------------------------------------------------------------------------------------- refusals

OUT_OF_RANGE = """--size 0, --epochs 0, --batch-size 0, --lr -1, --lr nan, --holdout 2,
--quantile 2, --seed 99999999999999999999, --device cuda:99, --predict photos, --export net.pt2"""
NOT_UNIADS = "--prompt label, --no-adapter, --no-cls-loss, --no-prior-loss, --literal, --query inr"

BOTH = [  # a command line, and what the line on stderr must name
    *[(line, line.split()[0]) for line in OUT_OF_RANGE.split(",")],
    ("--root nowhere", "nowhere"),
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
        ("--query pool", "--uniad"),
        ("--uniad --query text", "--text"),
        ("--uniad --query text --text nowhere.safetensors", "nowhere.safetensors"),
        ("--text nowhere.safetensors", "--query text"),
        ("--uniad --size 32", "--size"),
        ("--query learned --no-prior-loss --prompt image", "--prompt"),
        ("--data cifar10 --prompt label", "cifar10"),
    ],
    "minimaxad": [
        ("--crop 65", "--crop"),
        ("--arch rd", "--arch rd"),
        ("--p-hard 2", "--p-hard"),
        ("--p-lim -1", "--p-lim"),
    ],
}
TRAINED = [  # RUN stands for the folder of a finished run, which has the settings
    ("--eval nowhere.pt", "nowhere.pt"),
    ("--eval photos", "photos"),
    ("--eval ~/here", "/home/me/here"),
    ("--eval RUN --lr 3", "--lr"),
    ("--eval RUN --resume", "--resume"),
    ("--eval RUN --bench", "--bench"),
    ("--eval RUN --save-maps", "--out"),
    ("--eval RUN --out photos", "photos"),
    ("--eval RUN --predict photos", "--out"),
    ("--eval RUN --predict nowhere --out new", "nowhere"),
    ("--eval RUN --predict ~/here --out new", "/home/me/here"),
    ("--eval RUN --predict photos --out new --classes pil", "--classes"),
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


def test_unireplknet_needs_its_checkpoint(photos, call):
    result = call("minimaxad", "--data", "folder", "--root", photos, "--size", 32)
    assert_refused(result, "--weights")


def test_a_checkpoint_of_the_other_script_is_refused(script, tiny_runs, call):
    (other,) = tiny_runs.keys() - {script}
    assert_refused(call(script, "--eval", tiny_runs[other]), str(tiny_runs[other]))


def test_an_unfinished_run_is_not_evaluated(script, tiny_run, call):
    state = torch.load(tiny_run / "unified.pt", weights_only=True)
    torch.save(state | {"normal": None, "epoch": 2}, "unified.pt")
    assert_refused(call(script, "--eval", "unified.pt"), "--resume")


# ------------------------------------------------------------------------- defaults and presets

PRESETS = [
    ("mintad", "--data mvtec", "size=224 epochs=1000 batch_size=32 lr=0.0001 optimizer=adamw"),
    ("mintad", "--data mvtec", "pool=bilinear distance=euclidean weight_decay=0.0001"),
    ("mintad", "--data mvtec", "unified=False query=inr prompt=feature holdout=0.0"),
    ("mintad", "--data mvtec", "backbone=tf_efficientnet_b4.aa_in1k"),
    ("mintad", "--data folder", "optimizer=muon pool=area distance=mahalanobis lr=0.0005"),
    ("mintad", "--data folder", "epochs=50 batch_size=8 size=224"),
    ("mintad", "--data folder --epochs 7 --pool bilinear", "epochs=7 pool=bilinear"),
    ("mintad", "--data cifar10", "unified=True"),
    ("mintad", "--uniad", "query=layerwise"),
    ("mintad", "--prompt image", "cls_loss=False"),
    ("mintad", "--query mlp", "prior_loss=False"),
    ("mintad", "--bench", "size=224 backbone=tf_efficientnet_b4.aa_in1k"),
    ("mintad", "", "size=128 unified=True weights=none out=runs/mintad-toy-unified"),
    ("mintad", "--no-unified", "unified=False out=runs/mintad-toy-separate"),
    ("minimaxad", "--data visa --loss adc --size 64", "size=64 epochs=130 loss=adc"),
    ("minimaxad", "--data goodsad", "size=224 crop=0 epochs=240 loss=adc"),
    ("minimaxad", "--data mad", "size=400 crop=0 epochs=150 loss=adc"),
    ("minimaxad", "--data mad", "batch_size=16 lr=0.005 p_hard=0.9999 p_lim=0.9995 score=max"),
    ("minimaxad", "--data mad", "backbone=unireplknet_n gamma=0.995 weight_decay=5e-05"),
    ("minimaxad", "--data mad --arch rd", "size=400 epochs=200 loss=global batch_size=16 lr=0.005"),
    ("minimaxad", "--data mad --arch rd", "backbone=wide_resnet50_2.tv_in1k gamma=1.0"),
    ("minimaxad", "--data mad --arch rd", "weight_decay=0.0"),
    ("minimaxad", "--data mvtec --unified", "size=256 crop=0 epochs=100 loss=adc"),
    ("minimaxad", "--data visa --unified", "size=256 crop=0 epochs=100 loss=adc"),
    ("minimaxad", "--data visa", "size=256 crop=0 epochs=130 loss=global"),
    ("minimaxad", "--data aebad", "size=256 crop=224 epochs=130 loss=global"),
    ("minimaxad", "--data mvtec", "size=256 epochs=130 loss=global"),
    ("minimaxad", "--data btad --unified", "size=256 epochs=100 loss=adc"),
    ("minimaxad", "--data aebad --unified", "crop=224 epochs=130 loss=global"),
    ("minimaxad", "--data folder --unified", "size=256 epochs=240 loss=adc holdout=0.1"),
    ("minimaxad", "--data cifar10", "unified=True score=mean"),
    ("minimaxad", "--data mad --arch rd --epochs 3", "epochs=3"),
    ("minimaxad", "--bench", "size=256 backbone=unireplknet_n"),
    ("minimaxad", "", "size=128 unified=True weights=none out=runs/minimaxad-toy-unified"),
]


@pytest.mark.parametrize("script, line, expected", PRESETS)
def test_typed_wins_over_the_preset_and_that_over_the_default(script, line, expected):
    args, _ = MODULES[script].parse_args(line.split())
    found = [f"{key}={getattr(args, key)}" for key in re.findall(r"(\w+)=", expected)]
    assert " ".join(found) == expected


NOT_ITS = "--backbone resnet18, --size 256, --literal, --pool area, --distance mahalanobis"
NOT_ITS += ", --query mlp, --query learned, --prompt label, --prompt image, --no-adapter"
NOT_ITS += ", --no-cls-loss, --no-prior-loss, --classes screw"
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


@pytest.mark.parametrize("script, defaults", [("mintad", "224 1000"), ("minimaxad", "256 100")])
def test_help_shows_the_defaults(script, defaults, call):
    text = " ".join(call(script, "--help").out.split())
    found = [re.search(rf"{key} [^(]*\(default: (.*?)\)", text)[1] for key in ("SIZE", "EPOCHS")]
    assert " ".join(found) == defaults


def test_mintad_tells_which_settings_are_not_the_papers(tiny_runs):
    log = (tiny_runs["mintad"] / "log.txt").read_text()
    assert "'lr': 0.0005" in log  # of the preset
    assert "'pool': 'bilinear'" in log  # typed


@pytest.mark.parametrize("flag, told", [("--unified", False), ("--no-unified", True)])
@pytest.mark.parametrize("script", ["minimaxad"])
def test_minimaxad_tells_that_a_setting_is_not_the_papers(script, flag, told, tiny, call):
    out = call(script, *tiny, "--data", "mvtec", flag, "--classes", "pill", "--epochs", 1).out
    assert bool(re.search("note: .*paper", out)) == told


# ---------------------------------------------------------------------------- evaluating a run


def test_eval_finds_images_that_were_moved_and_draws_each(script, tiny_run, call):
    Path("photos").rename("moved")
    call(script, "--eval", tiny_run, "--root", "moved", "--save-maps", "--out", "new")
    assert rows("new") == rows(tiny_run)
    assert len(list(Path("new/maps").glob("*/*.*"))) == 8
    call(script, "--eval", tiny_run, "--root", "moved", "--classes", "weave", "--out", "weave")
    assert rows("weave") == {"weave": rows(tiny_run)["weave"]}


ANOTHER = {"mintad": ("--distance", "mahalanobis"), "minimaxad": ("--score", "top1")}


def test_eval_can_score_in_another_way_but_predict_has_the_runs_limits(script, tiny_run, call):
    call(script, "--eval", tiny_run, *ANOTHER[script], "--out", "new")
    assert rows("new") != rows(tiny_run)
    flags = "--predict", "photos", "--out", "verdicts", *ANOTHER[script]
    assert_refused(call(script, "--eval", tiny_run, *flags), f"{ANOTHER[script][0]} ")


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


def test_an_exported_program_finds_the_same(script, tiny_run, call):
    """The table by --eval and, of mintad.py, the classes; in batches of 1 and 7."""
    flags = {"mintad": ["--distance", "mahalanobis"], "minimaxad": []}[script]
    call(script, "--eval", tiny_run, *flags, "--out", "new")
    call(script, "--eval", tiny_run, *flags, "--export", "net.pt2")
    network = torch.export.load("net.pt2").module()
    _, _, samples = data.load("folder", "photos")
    images = torch.tensor(data.decode(samples, 64)).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        outputs = [network(batch) for batch in images.split([1, 7])]
    maps, scores, *classes = [torch.cat(x).numpy() for x in zip(*outputs, strict=True)]

    masks = data.decode_masks(samples, 64)
    for cls, row in rows("new").items():
        i = np.flatnonzero([sample.cls == cls for sample in samples])
        found = metrics.evaluate([samples[k] for k in i], scores[i], maps[i], masks[i])
        assert found == pytest.approx(row, abs=1e-3)
    if script == "mintad":
        found = [["pill", "weave"][k] for k in classes[0]]
        assert found == [sample.cls for sample in samples]


@pytest.mark.parametrize("script", ["mintad"])
def test_a_variant_that_needs_the_class_is_exported_with_it(script, tiny, call, monkeypatch):
    for path in sorted(Path("photos/weave/train/good").iterdir())[3:]:  # too few to hold one out
        path.unlink()
    call(script, *tiny, "--prompt", "label", "--epochs", 1, "--out", "run")
    monkeypatch.setattr(torch.export, "export", lambda network, inputs, **_: network(*inputs))
    monkeypatch.setattr(torch.export, "save", torch.save)
    said = call(script, "--eval", "run", "--export", "net.pt2").out
    assert "classes from 0 on: pill, weave" in said
    assert re.search("limit for pill: .* of 1 normal images", said)
    *_, classes = torch.load("net.pt2")
    assert classes.tolist() == [0, 0]  # of the two images and labels that it is traced with


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


BENCH = "--bench --backbone test_efficientnet --weights none --size 64".split()


def test_bench_measures_the_network_and_the_whole_path(script, photos, call, monkeypatch):
    predict = metrics.predict
    monkeypatch.setattr(metrics, "predict", lambda paths, *more: predict(paths[:4], *more))
    out = call(script, *BENCH).out
    assert re.search(r"(?s)batch 1: .*batch 16: .*--predict: ", out)
    if script == "mintad":  # nearly each weight multiplies once at each of the 4 x 4 positions
        args, _ = mintad.parse_args(BENCH)
        model = mintad.Detector(args, [*"abcdefghijklmno"], mintad.Backbone(args, "none")).model
        weights = sum(p.numel() for p in model.parameters()) / 1e6
        assert f"parameters, model: {weights:.2f} M" in out
        (products,) = re.findall("multiply-adds, model: (.*) G", out)
        assert float(products) == pytest.approx(16 * weights / 1e3, rel=0.1)
