"""The command line of both scripts: what the flags mean, and what is refused, in one line."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import metrics
import minimaxad
import mintad

MODULES = {"mintad": mintad, "minimaxad": minimaxad}


def rows(folder):
    return json.loads(Path(folder, "metrics.json").read_text())["classes"]


# ------------------------------------------------------------------------------------- refusals

REFUSED = [  # a command line, and what the line on stderr must name
    ("--data mvtecc", "mvtecc"),
    ("--data mvtec --root nowhere", "nowhere"),
    ("--classes pil", "pill"),
    ("--normals 012", "--normals"),
    ("--size 0", "--size"),
    ("--size x", "--size"),
    ("--epochs 0", "--epochs"),
    ("--batch-size 0", "--batch-size"),
    ("--lr -1", "--lr"),
    ("--lr nan", "--lr"),
    ("--weight-decay -1", "--weight-decay"),
    ("--holdout 2", "--holdout"),
    ("--holdout -1", "--holdout"),
    ("--quantile 2", "--quantile"),
    ("--seed 99999999999999999999", "--seed"),
    ("--device nonsense", "--device"),
    ("--device cuda:99", "--device"),
    ("--backbone nonsense", "nonsense"),
    ("--backbone vit_tiny_patch16_224", "vit_tiny_patch16_224"),
    ("--weights nowhere.pth", "nowhere.pth"),
    ("--out photos", "photos"),
    ("--predict photos", "--eval"),
    ("--export net.pt2", "--eval"),
]
MINTAD = [
    ("--query nonsense", "--query"),
    ("--query pool", "--uniad"),
    ("--uniad --query inr", "--query inr"),
    ("--uniad --query text", "--text"),
    ("--uniad --query text --text nowhere.safetensors", "nowhere.safetensors"),
    ("--text nowhere.safetensors", "--query text"),
    ("--uniad --prompt label", "--uniad"),
    ("--uniad --no-adapter", "--uniad"),
    ("--uniad --no-cls-loss", "--uniad"),
    ("--uniad --no-prior-loss", "--uniad"),
    ("--uniad --literal", "--uniad"),
    ("--uniad --size 32", "--size"),
    ("--query learned --no-prior-loss --prompt image", "--prompt"),
    ("--data cifar10 --prompt label", "cifar10"),
]
MINIMAXAD = [
    ("--crop 65", "--crop"),
    ("--crop -1", "--crop"),
    ("--arch rd", "--arch rd"),
    ("--p-hard 2", "--p-hard"),
    ("--p-lim -1", "--p-lim"),
]
TRAINED = [  # RUN stands for the folder of a finished run, which has the settings
    ("--eval nowhere.pt", "nowhere.pt"),
    ("--eval photos", "photos"),
    ("--eval ~/here", "/home/me/here"),
    ("--eval RUN --lr 3", "--lr"),
    ("--eval RUN --resume", "--resume"),
    ("--eval RUN --bench", "--bench"),
    ("--eval RUN --classes pil", "pil"),
    ("--eval RUN --save-maps", "--out"),
    ("--eval RUN --out photos", "photos"),
    ("--eval RUN --predict photos", "--out"),
    ("--eval RUN --predict nowhere --out new", "nowhere"),
    ("--eval RUN --predict ~/here --out new", "/home/me/here"),
    ("--eval RUN --predict photos --out photos", "photos"),
    ("--eval RUN --predict photos --out new --classes pil", "--classes"),
    ("--eval RUN --predict photos --out new --export net.pt2", "--export"),
    ("--eval RUN --export photos", "photos"),
    ("--resume", "--out"),
    ("--resume --out nowhere", "nowhere"),
    ("--resume --out RUN --lr 3", "--lr"),
    ("--resume --out RUN --root nowhere", "nowhere"),
]


def assert_refused(result, said):
    assert result.status == 2
    assert said in result.error


BOTH = [(script, *row) for script in MODULES for row in REFUSED]
OWN = [("mintad", *row) for row in MINTAD] + [("minimaxad", *row) for row in MINIMAXAD]


@pytest.mark.parametrize("script, line, said", BOTH + OWN)
def test_refused(script, line, said, tiny, call):
    assert_refused(call(script, *tiny, "--epochs", 1, *line.split()), said)


@pytest.mark.parametrize("line, said", TRAINED)
def test_refused_of_a_finished_run(script, tiny_run, line, said, call, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert_refused(call(script, *line.replace("RUN", str(tiny_run)).split()), said)


def test_a_model_judges_by_the_score_that_its_threshold_is_of(script, tiny_run, call):
    flags = {"mintad": ["--distance", "mahalanobis"], "minimaxad": ["--score", "mean"]}[script]
    predict = "--eval", tiny_run, "--predict", "photos", "--out", "new"
    assert_refused(call(script, *predict, *flags), flags[0])


def test_a_class_without_training_images_is_named(script, tiny, call):
    shutil.rmtree("photos/weave/train")
    assert_refused(call(script, *tiny), "weave")


def test_a_missing_mask_is_named(script, tiny, call):
    mask = min(Path("photos/pill/ground_truth").rglob("*.png"))
    mask.unlink()
    assert_refused(call(script, *tiny, "--data", "mvtec"), mask.name)


def test_a_git_lfs_pointer_instead_of_weights_is_named(script, tiny, call):
    Path("w.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert_refused(call(script, *tiny, "--weights", "w.pth"), "git lfs pull")


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


def test_a_class_that_did_not_train_is_not_evaluated(script, tiny, call):
    call(script, *tiny, "--classes", "weave", "--epochs", 1, "--out", "run")
    assert_refused(call(script, "--eval", "run", "--classes", "pill"), "--classes")


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
    ("mintad", "--uniad --query pool", "query=pool"),
    ("mintad", "--prompt image", "cls_loss=False"),
    ("mintad", "--query mlp", "prior_loss=False"),
    ("mintad", "--bench", "size=224 backbone=tf_efficientnet_b4.aa_in1k"),
    ("mintad", "", "size=128 unified=True weights=none out=runs/mintad-toy-unified"),
    ("mintad", "--no-unified", "unified=False out=runs/mintad-toy-separate"),
    ("minimaxad", "--data goodsad", "size=224 epochs=240 loss=adc batch_size=16 lr=0.005"),
    ("minimaxad", "--data goodsad", "gamma=0.995 weight_decay=5e-05 p_hard=0.9999 p_lim=0.9995"),
    ("minimaxad", "--data goodsad", "backbone=unireplknet_n score=max crop=0 holdout=0.0"),
    ("minimaxad", "--data mad", "size=400 epochs=150 loss=adc"),
    ("minimaxad", "--data mvtec --unified", "size=256 epochs=100 loss=adc"),
    ("minimaxad", "--data visa --unified", "size=256 epochs=100 loss=adc"),
    ("minimaxad", "--data visa", "size=256 epochs=130 loss=global"),
    ("minimaxad", "--data visa --loss adc --size 64", "size=64 epochs=130 loss=adc"),
    ("minimaxad", "--data mvtec", "size=256 epochs=130 loss=global"),
    ("minimaxad", "--data btad --unified", "size=256 epochs=100 loss=adc"),
    ("minimaxad", "--data aebad", "size=256 crop=224 epochs=130 loss=global"),
    ("minimaxad", "--data aebad --unified", "size=256 crop=224 epochs=130 loss=global"),
    ("minimaxad", "--data folder --unified", "size=256 epochs=240 loss=adc holdout=0.1"),
    ("minimaxad", "--data cifar10", "unified=True score=mean"),
    ("minimaxad", "--data mad --arch rd", "size=400 epochs=200 loss=global gamma=1.0"),
    ("minimaxad", "--data mad --arch rd", "backbone=wide_resnet50_2.tv_in1k lr=0.005"),
    ("minimaxad", "--data mad --arch rd --epochs 3", "epochs=3"),
    ("minimaxad", "--bench", "size=256 backbone=unireplknet_n"),
    ("minimaxad", "", "size=128 unified=True weights=none out=runs/minimaxad-toy-unified"),
    ("mintad", "--root ~/here --weights ~/w.pth", "root=/home/me/here weights=/home/me/w.pth"),
    ("minimaxad", "--out ~/here --weights ~/w.pth", "out=/home/me/here weights=/home/me/w.pth"),
]


@pytest.mark.parametrize("script, line, expected", PRESETS)
def test_typed_wins_over_the_preset_and_that_over_the_default(script, line, expected, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args, _ = MODULES[script].parse_args(line.split())
    found = [f"{key}={getattr(args, key)}" for key in re.findall(r"(\w+)=", expected)]
    assert " ".join(found) == expected


@pytest.mark.parametrize("script, defaults", [("mintad", "224 1000"), ("minimaxad", "256 100")])
def test_help_shows_the_defaults(script, defaults, call):
    text = " ".join(call(script, "--help").out.split())
    found = [re.search(rf"{key} [^(]*\(default: (.*?)\)", text)[1] for key in ("SIZE", "EPOCHS")]
    assert " ".join(found) == defaults


# ---------------------------------------------------------------------------- evaluating a run


def test_eval_gives_the_table_of_the_training_to_the_last_digit(script, tiny_run, call):
    call(script, "--eval", tiny_run, "--out", "new")
    assert rows("new") == rows(tiny_run)


def test_eval_gives_the_table_of_a_toy_run_to_the_last_digit(script, toy_run, call, tmp_path):
    call(script, "--eval", toy_run(script), "--out", tmp_path / "new")
    assert rows(tmp_path / "new") == rows(toy_run(script))


def test_eval_finds_images_that_were_moved(script, tiny_run, call):
    Path("photos").rename("moved")
    call(script, "--eval", tiny_run, "--root", "moved", "--out", "new")
    assert rows("new") == rows(tiny_run)


def test_eval_of_some_classes_has_their_rows(script, tiny_run, call):
    call(script, "--eval", tiny_run, "--classes", "pill", "--out", "new")
    assert rows("new") == {"pill": rows(tiny_run)["pill"]}


@pytest.mark.parametrize(
    "script, flags", [("mintad", "--distance mahalanobis"), ("minimaxad", "--score top1")]
)
def test_eval_can_score_in_another_way(script, flags, tiny_run, call):
    call(script, "--eval", tiny_run, *flags.split(), "--out", "new")
    assert rows("new") != rows(tiny_run)


@pytest.mark.parametrize("runs, deviation", [(1, ""), (2, " ± 0.000")])
def test_metrics_py_prints_the_mean_of_runs(script, runs, deviation, tiny_run, capsys):
    metrics.main([tiny_run] * runs)
    cells = "  ".join(f"{value:.3f}{deviation}" for value in rows(tiny_run)["pill"].values())
    assert f"pill {cells}".split() in map(str.split, capsys.readouterr().out.splitlines())


def test_save_maps_draws_each_test_image(script, tiny_run, call):
    call(script, "--eval", tiny_run, "--save-maps", "--out", "new")
    assert len(list(Path("new/maps/pill").iterdir())) == 4


# -------------------------------------------------------------------------- export, and the rest


@pytest.fixture(scope="module")
def exported(tiny_runs, photos_to_copy, shrink, call, tmp_path_factory):
    """script: its table by --eval; the test images; what the exported program says of them, in
    batches of 1 and 3: map, score and class. mintad.py's is with --distance mahalanobis."""
    found = {}
    flags = {"mintad": ["--distance", "mahalanobis"], "minimaxad": []}
    with pytest.MonkeyPatch.context() as monkeypatch, torch.no_grad():
        shrink(monkeypatch)
        monkeypatch.chdir(
            shutil.copytree(photos_to_copy.parent, tmp_path_factory.mktemp("a") / "b")
        )
        _, _, samples = data.load("folder", "photos")
        images = torch.tensor(data.decode(samples, 64)).permute(0, 3, 1, 2) / 255
        for script, run in tiny_runs.items():
            call(script, "--eval", run, *flags[script], "--out", script)
            call(script, "--eval", run, *flags[script], "--export", f"{script}.pt2")
            network = torch.export.load(f"{script}.pt2").module()
            outputs = [network(batch) for batch in images.split([1, 3, 1, 3])]
            outputs = [torch.cat(parts).numpy() for parts in zip(*outputs, strict=True)]
            found[script] = rows(script), samples, outputs
    return found


@pytest.mark.parametrize("metric", ["i_auroc", "p_auroc", "p_aupr", "aupro"])
def test_an_exported_program_gives_the_same_table(script, metric, exported, photos):
    table, samples, (maps, scores, *_) = exported[script]
    masks = data.decode_masks(samples, 64)
    for cls, row in table.items():
        i = np.flatnonzero([sample.cls == cls for sample in samples])
        found = metrics.evaluate([samples[k] for k in i], scores[i], maps[i], masks[i])
        assert found[metric] == pytest.approx(row[metric], abs=1e-3)


def test_the_exported_program_of_mintad_finds_the_class(exported):
    _, samples, (_, _, classes) = exported["mintad"]
    assert [["pill", "weave"][k] for k in classes] == [sample.cls for sample in samples]


def test_export_replaces_no_file(script, tiny_run, call):
    Path("mine.pt2").write_text("mine")
    call(script, "--eval", tiny_run, "--export", "mine.pt2")
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


def test_bench_measures_the_network_and_the_whole_path(script, tiny, call, monkeypatch):
    predict = metrics.predict
    monkeypatch.setattr(metrics, "predict", lambda paths, *more: predict(paths[:4], *more))
    assert re.search(r"(?s)batch 1: .*batch 16: .*--predict: ", call(script, "--bench", *tiny).out)
