"""Both scripts as a user runs them: the same words, the same files. Tiny models on the toy set, on a CPU."""
import argparse
import contextlib
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import data
import mintad
import minimaxad
import trees

SCRIPTS = {"mintad": mintad, "minimaxad": minimaxad}
TINY = ["--size", "64", "--batch-size", "8", "--weights", "none", "--backbone"]
BACKBONE = {"mintad": "resnet18", "minimaxad": "unireplknet_a"}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
torch.set_num_threads(1)


def tiny(script, *more):
    return [*TINY, BACKBONE[script], *map(str, more)]


def toy(script, *more):
    return tiny(script, "--epochs", "3", "--classes", "pill", *more)


def command(script, *args):
    """Run a script as a user does; returns the finished process."""
    return subprocess.run([sys.executable, SCRIPTS[script].__file__, *map(str, args)], capture_output=True, text=True,
                          timeout=280, env=ENVIRONMENT)


def inside(script, *args):
    """The same in this process, which saves the seconds that importing torch takes."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        SCRIPTS[script].main(list(map(str, args)))
    return subprocess.CompletedProcess(args, end.value.code, out.getvalue(), err.getvalue())


def succeed(result):
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request):
    return request.param


@pytest.fixture(scope="module")
def run(script, tmp_path_factory):
    out = tmp_path_factory.mktemp(script) / "a"
    succeed(command(script, *toy(script), "--out", out))
    return out


def test_files_of_a_run(run):
    result = json.loads((run / "metrics.json").read_text())
    assert set(result["classes"]) == {"pill"} and result["args"]["epochs"] == 3
    assert all(set(row) == {"i_auroc", "p_auroc", "p_aupr", "aupro"} for row in result["classes"].values())
    log = (run / "log.txt").read_text()
    assert "epoch 3/3: " in log and "untrained" in log
    assert {p.name for p in run.iterdir() if p.name[0] != "."} == {"args.json", "log.txt", "metrics.json", "seed1.pt"}


def test_eval_reproduces_to_the_last_digit(script, run, tmp_path):
    succeed(inside(script, "--eval", run, "--out", tmp_path / "e", "--save-maps"))
    assert (tmp_path / "e/metrics.json").read_bytes() == (run / "metrics.json").read_bytes()
    assert len(list((tmp_path / "e/maps/seed1/pill").glob("*.png"))) == 22
    assert (tmp_path / "e/maps/seed1/pill.png").exists()
    assert (tmp_path / "e/maps/seed1-queries.png").exists() == (script == "mintad")


def test_resume_after_kills_is_bit_identical(script, run, tmp_path):
    """Killed while a checkpoint is being written: mintad.py the first and then the second, minimaxad.py the second."""
    out = tmp_path / "b"
    for epoch in (1, 2) if script == "mintad" else (2,):
        process = subprocess.Popen([sys.executable, SCRIPTS[script].__file__, *toy(script), "--out", str(out), "--resume"],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
        while process.poll() is None and f"epoch {epoch}/3: " not in (
                (out / "log.txt").read_text() if (out / "log.txt").exists() else ""):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "metrics.json").exists()
    succeed(inside(script, *toy(script), "--out", out, "--resume"))
    assert not list(out.glob(".partial*"))  # what the killed processes were writing
    a, b = (torch.load(x / "seed1.pt", weights_only=True) for x in (run, out))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert (run / "metrics.json").read_bytes() == (out / "metrics.json").read_bytes()


def test_seeds_and_separate_models(script, tmp_path):
    args = tiny(script, "--classes", "weave", "pill", "--seed", 1, 2, "--no-unified", "--epochs", 1, "--out", tmp_path / "s")
    succeed(inside(script, *args))
    first = (tmp_path / "s/metrics.json").read_bytes()
    result = json.loads(first)
    assert set(result["seeds"]) == {"1", "2"} and set(result["std"]) == set(result["mean"])
    assert len(list((tmp_path / "s").glob("*.pt"))) == 4
    (tmp_path / "s/metrics.json").unlink()
    (tmp_path / "s/seed2-pill.pt").unlink()  # as if killed before the last model
    again = succeed(inside(script, *args, "--resume"))
    assert again.stdout.count("epoch 1/1") == 1 and (tmp_path / "s/metrics.json").read_bytes() == first


@pytest.mark.parametrize("args, said", [
    (["--data", "mvtecc"], "mvtec"), (["--data", "mvtec", "--root", "/nowhere"], "/nowhere"), (["--classes", "pil"], "pill"),
    (["--epochs", "0"], "--epochs"), (["--weights", "/nowhere.pt"], "/nowhere.pt"), (["--eval", "/nowhere.pt"], "/nowhere.pt"),
    (["--predict", "x.png"], "--eval"), (["--seed", "x"], "--seed"), (["--device", "cuda:99"], "--device"), (["--device", "meta"], "--device meta"),
    (["--seed", "20250101123456"], "--seed 20250101123456"), (["--size", "32"], "--size 32"), (["--lr", "nan"], "--lr nan"),
    (["--crop", "129"], "--crop 129 is larger than --size 128"),
    (["--backbone", "vit_tiny_patch16_224", "--weights", "none"], "vit_tiny"), (["--bench", "--eval", "x"], "--bench"),
    (["--backbone", "nonsense", "--weights", "none"], "nonsense"), (["--eval", __file__], "not a readable checkpoint")],
    ids=str)
def test_bad_input_is_one_line(script, args, said, tmp_path):
    result = inside(script, "--out", tmp_path / "o", *args)
    assert result.returncode == 2 and said in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
    assert "--crop" not in args or not (tmp_path / "o").exists()


def test_eval_takes_everything_from_the_checkpoint(script, run, tmp_path):
    for flag, *value in ["--lr", "0.1"], ["--holdout", "0"], ["--no-unified"]:
        result = inside(script, "--eval", run, flag, *value, "--out", tmp_path)
        assert result.returncode == 2 and f"{flag} does not go with --eval" in result.stderr
    result = inside(script, "--eval", run, "--predict", "x.png", "--classes", "pil", "--out", tmp_path)
    assert result.returncode == 2 and "pill" in result.stderr


def test_eval_of_an_unfinished_training_says_so(script, run, tmp_path):
    state = torch.load(run / "seed1.pt", weights_only=True)
    torch.save({**state, "epoch": 2, "normal": None}, tmp_path / "seed1.pt")
    result = succeed(inside(script, "--eval", tmp_path))
    assert "training stopped after epoch 2 of 3" in result.stdout
    result = inside(script, "--eval", tmp_path, "--predict", "x.png")
    assert result.returncode == 2 and "--resume" in result.stderr


def test_a_unified_model_of_some_classes_judges_without_a_class(tmp_path, script="mintad"):  # the other's lines are the same
    succeed(inside(script, *tiny(script), "--epochs", 1, "--classes", "pill", "weave", "--out", tmp_path / "r"))
    data.read_image("toy:pill/test/good/000").save(tmp_path / "a.png")
    succeed(inside(script, "--eval", tmp_path / "r/seed1.pt", "--predict", tmp_path / "a.png", "--out", tmp_path / "p"))


def test_one_output_at_a_time(script, run):
    result = inside(script, "--eval", run, "--predict", "x.png", "--export", "y.pt2")
    assert result.returncode == 2 and "not allowed with" in result.stderr


def test_a_separate_model_takes_its_own_text(tmp_path):
    rows = {cls: torch.randn(7) for cls in ("weave", "pill")}
    save_file(rows, tmp_path / "text.safetensors")
    succeed(inside("mintad", *tiny("mintad"), "--size", 128, "--epochs", 1, "--classes", *rows, "--no-unified", "--uniad",
                   "--query", "text", "--text", tmp_path / "text.safetensors", "--out", tmp_path / "o"))
    for cls, row in rows.items():
        assert torch.equal(torch.load(tmp_path / f"o/seed1-{cls}.pt", weights_only=True)["model"]["text"], row[None])
    for rows in {"weave": row}, {"weave": row, "pill": row[1:]}:
        save_file({cls: x.clone() for cls, x in rows.items()}, tmp_path / "bad.safetensors")
        with pytest.raises(data.DataError, match="--text .*bad.safetensors: expected a row for each of weave, pill, all of one length"):
            mintad.read_text(tmp_path / "bad.safetensors", ["weave", "pill"])


def test_eval_finds_the_default_root(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    trees.mvtec(tmp_path / "data/mvtec")
    succeed(inside(script, *tiny(script), "--epochs", 1, "--data", "mvtec", "--unified"))
    folder = tmp_path / f"runs/{script}-mvtec-unified"
    succeed(inside(script, "--eval", folder))
    assert (folder / "metrics.json").read_bytes() == (folder / "eval/metrics.json").read_bytes()


def test_a_run_is_not_overwritten_nor_resumed_with_other_arguments(script, run):
    result = inside(script, *toy(script), "--out", run)
    assert result.returncode == 2 and "--resume" in result.stderr
    result = inside(script, *toy(script), "--out", run, "--resume", "--lr", "0.5")
    assert result.returncode == 2 and "lr = 0.00" in result.stderr and "not 0.5" in result.stderr


PARTS = ["--data", "folder", "--root", "parts", "--size", "64", "--weights", "none", "--epochs", "1", "--batch-size", "4",
         "--cache", "none"]


@pytest.fixture
def parts(script, tmp_path, monkeypatch):
    """A user's folder parts/pill: the toy class saved as files; and the flags of a run on it."""
    monkeypatch.chdir(tmp_path)
    dataset = data.load("toy", classes=["pill"], log=str)
    for sample in [*dataset.train[:10], *dataset.test[:16]]:
        _, split, defect, name = sample.image.split("/")
        folder = tmp_path / "parts/pill" / split / defect
        folder.mkdir(parents=True, exist_ok=True)
        data.read_image(sample.image).save(folder / f"{name}.png")
        if sample.label:
            folder = tmp_path / "parts/pill/ground_truth" / defect
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(data.read_mask(sample.image)[0]).save(folder / f"{name}_mask.png")
    return [*PARTS, "--backbone", BACKBONE[script]]


def test_eval_uses_no_stored_result(script, parts):
    succeed(inside(script, *parts, "--out", "run"))
    os.rename("parts/pill/test", "away")
    result = inside(script, "--eval", "run")
    assert result.returncode == 2 and "no test images" in result.stderr and "I-AUROC" not in result.stdout


def test_resume_evaluates_anew_and_refuses_other_images(script, parts):
    os.rename("parts/pill/ground_truth", "masks")
    before = succeed(inside(script, *parts, "--out", "run"))
    assert "pill: no pixel metrics" in before.stdout
    os.rename("masks", "parts/pill/ground_truth")
    after = succeed(inside(script, *parts, "--out", "run", "--resume", "--workers", 1))
    assert json.load(open("run/args.json"))["args"]["workers"] == 1
    assert json.load(open("run/metrics.json"))["mean"]["aupro"] is not None and "epoch" not in after.stdout.split("done")[1]
    shutil.copy("parts/pill/train/good/003.png", "parts/pill/train/good/0031.png")
    arguments = Path("run/args.json").read_bytes()
    result = inside(script, *parts, "--out", "run", "--resume")
    assert result.returncode == 2 and "other images" in result.stderr and ".png" in result.stderr
    result = inside(script, *parts, "--out", "run", "--resume", "--lr", "0.5")
    assert result.returncode == 2 and "not 0.5" in result.stderr
    assert Path("run/args.json").read_bytes() == arguments  # as no such run has begun


def test_checkpoints_of_different_settings_are_not_averaged(script, parts):
    succeed(inside(script, *parts, "--out", "a"))
    succeed(inside(script, *parts, "--out", "b", "--seed", 2, "--lr", "0.002"))
    shutil.copy("b/seed2-pill.pt", "a")
    result = inside(script, "--eval", "a")
    assert result.returncode == 2 and "seed2-pill.pt has lr = 0.002" in result.stderr


def test_an_untrained_class_is_named_and_stays_out(script, parts):
    succeed(inside(script, *parts, "--unified", "--out", "run"))
    shutil.copytree("parts/pill", "parts/nut")
    result = succeed(inside(script, "--eval", "run"))
    assert "class 'nut' was not trained" in result.stdout
    assert set(json.load(open("run/eval/metrics.json"))["classes"]) == {"pill"}


def test_no_file_of_the_user_is_lost(script, parts):
    os.makedirs("mine")
    for name in ("notes.txt", ".tmp1-letter.txt", "seed1-pill.pt"):
        open(f"mine/{name}", "w").write("mine")
    before = succeed(inside(script, *parts, "--out", "run"))
    photos = "parts/pill/test/good"
    kept = {name: open(f"{photos}/{name}", "rb").read() for name in os.listdir(photos)}
    for flags in (*parts, "--out", "mine"), ("--eval", "run", "--out", "mine"), \
            ("--eval", "run", "--predict", photos, "--out", photos), (*parts, "--out", photos):
        result = inside(script, *flags)
        assert result.returncode == 2 and "did not write" in result.stderr
    assert sorted(os.listdir("mine")) == [".tmp1-letter.txt", "notes.txt", "seed1-pill.pt"]
    assert kept == {name: open(f"{photos}/{name}", "rb").read() for name in os.listdir(photos)}
    open("run/.tmp1-letter.txt", "w").write("mine")
    succeed(inside(script, *parts, "--out", "run", "--resume"))
    assert open("run/.tmp1-letter.txt").read() == "mine" and before.returncode == 0


def test_a_folder_is_one_runs(script, parts):
    first = subprocess.Popen([sys.executable, SCRIPTS[script].__file__, *parts, "--epochs", "1000", "--out", "run"],
                             stdout=subprocess.PIPE, env=ENVIRONMENT, text=True)
    while "epoch 1/" not in first.stdout.readline():
        assert first.poll() is None
    result = inside(script, *parts, "--epochs", "1000", "--out", "run", "--resume")
    first.kill()
    first.communicate()
    assert result.returncode == 2 and "another run" in result.stderr


def test_odd_photos(script, parts):
    """A name that is not UTF-8, a broken file, a strip, one name with two suffixes: rows come as they are judged."""
    succeed(inside(script, *parts, "--out", "run"))
    os.makedirs("photos")
    image = Image.open("parts/pill/test/good/000.png")
    for name in (b"caf\xe9.png", b"a.png", b"a.jpg", b"n" * 250 + b".png"):
        image.save(os.fsdecode(b"photos/" + name))
    image.resize((3000, 10)).save("photos/strip.png")
    open("photos/broken.png", "w").write("no image")
    result = inside(script, "--eval", "run/seed1-pill.pt", "--predict", "photos", "--out", "p")
    assert result.returncode == 1 and "broken.png" in result.stdout
    rows = list(csv.DictReader(open("p/predictions.csv", encoding="utf-8", errors="surrogateescape")))
    assert len(rows) == 6 and len({row["picture"] for row in rows if row["picture"]}) == 5
    assert os.fsdecode(b"photos/caf\xe9.png") in {row["file"] for row in rows}
    for picture in os.listdir("p"):
        if picture.endswith(".png"):
            assert max(Image.open(f"p/{picture}").size) < 2500
    again = inside(script, "--eval", "run/seed1-pill.pt", "--predict", "photos/a.png", "p", "--out", "p")
    assert again.returncode == 2 and "no image at p" in again.stderr  # our own pictures are not judged
    succeed(inside(script, "--eval", "run/seed1-pill.pt", "--predict", "photos/a.png", "--out", "p"))
    assert [name for name in os.listdir("p") if name.endswith(".png")] == ["a.png"]


def test_export_wants_a_new_file(script, run, tmp_path):
    (tmp_path / "old.pt2").write_text("mine")
    for name in ("nowhere/x.pt2", "x", "old.pt2"):
        result = inside(script, "--eval", run, "--export", tmp_path / name)
        assert result.returncode == 2 and name in result.stderr
    assert (tmp_path / "old.pt2").read_text() == "mine"


def test_predict(script, run, tmp_path):
    folder = tmp_path / "photos \u00e4"
    folder.mkdir()
    for sample in data.load("toy", classes=["pill"], log=str).test[:12]:
        image = data.read_image(sample.image)
        image.resize((300, 200)).convert("L").save(folder / f"{sample.image.split('/')[-2]} {sample.image.split('/')[-1]}.png")
    (folder / "broken.png").write_bytes(b"no image")
    result = inside(script, "--eval", run / "seed1.pt", "--predict", folder, "--out", tmp_path / "p")
    assert result.returncode == 1 and "skipped" in result.stdout and "held-out" in result.stdout, result.stderr
    with open(tmp_path / "p/predictions.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 13 and {row["verdict"] for row in rows} <= {"good", "defective", "unreadable"}
    for row in rows:
        if row["score"]:
            assert (row["verdict"] == "defective") == (float(row["score"]) > float(row["threshold"]))
    assert len(list((tmp_path / "p").glob("*.png"))) == 12


def test_export_loads_without_the_project(script, run, tmp_path):
    succeed(inside(script, "--eval", run, "--export", tmp_path / "net.pt2"))
    state = torch.load(run / "seed1.pt", weights_only=True)
    model = SCRIPTS[script].build(state)
    settings = argparse.Namespace(**state["settings"])
    eager = SCRIPTS[script].Inference(model, settings)
    torch.save(images := torch.rand(8, 3, 64, 64), tmp_path / "images.pt")
    subprocess.run([sys.executable, "-c", "import torch; p = torch.export.load('net.pt2').module(); "
                    "x = torch.load('images.pt'); torch.save([p(x), p(x[:1])], 'out.pt')"], cwd=tmp_path, check=True)
    with torch.no_grad():
        for got, x in zip(torch.load(tmp_path / "out.pt"), (images, images[:1])):
            for a, b in zip(got, eager(x)):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_bench(script):
    result = succeed(inside(script, "--bench", "--backbone", BACKBONE[script], "--size", 64))
    assert "storage" in result.stdout and "training" in result.stdout and "cpu" in result.stdout


@pytest.mark.parametrize("name", ("aebad", "cifar10", "mvtec+btad"))
def test_sets_of_special_evaluation(script, name, tmp_path, monkeypatch):
    """Rows of the table that are not classes: AeBAD's domains, CIFAR-10's split; and joined sets, with an empty mask."""
    for part in name.split("+"):
        (tmp_path / part).mkdir()
        getattr(trees, part)(tmp_path / part, *([monkeypatch] if part == "cifar10" else []))
    root = tmp_path if "+" in name else tmp_path / name
    succeed(inside(script, *tiny(script), "--unified", "--epochs", 1, "--data", name, "--root", root,
                   "--cache", tmp_path / "cache", "--out", tmp_path / "out"))
    rows = json.loads((tmp_path / "out/metrics.json").read_text())["classes"]
    if name == "aebad":
        assert set(rows) == {"same", "background", "illumination", "view"}
    elif name == "cifar10":
        assert set(rows) == {"01234"} and rows["01234"]["aupro"] is None
    else:
        assert {"mvtec/bottle", "btad/01"} <= set(rows)
        assert "mean of btad" in (tmp_path / "out/log.txt").read_text()
