"""Training from its first line to its table: what a run leaves, what it learns from which images,
and how interrupted runs go on."""

import json
import logging
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import mintad


def result(folder):
    return json.loads(Path(folder, "metrics.json").read_text())


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def checkpoint(path):
    """The tensors of a checkpoint, which the two scripts name differently."""
    return load(path).get("model") or load(path)["detector"]


def same_model(path, other):
    theirs = checkpoint(other)
    weights = all(torch.equal(tensor, theirs[key]) for key, tensor in checkpoint(path).items())
    return weights and load(path)["calibration"] == load(other)["calibration"]


def assert_same_run(one, other):
    """Both have the same checkpoints and the same table, to the last bit."""
    for path in Path(one).glob("*.pt"):
        assert same_model(path, Path(other, path.name))
    assert result(one)["classes"] == result(other)["classes"]


def epochs(folder):
    """The figures in the log's line of each epoch; the last, seconds, is left out."""
    lines = re.findall(r"epoch \d+/\d+: (.*)", Path(folder, "log.txt").read_text())
    return [[float(x) for x in re.findall(r"-?\d+\.\d+", line)[:-1]] for line in lines]


# ---------------------------------------------------------------------------------- the toy runs


def test_the_toy_set_is_learned_and_by_muon_not_worse(toy_run):
    found = {
        name: result(toy_run(name))["mean"]["i_auroc"] for name in ("mintad", "muon", "minimaxad")
    }
    assert min(found.values()) > 0.9
    assert found["muon"] >= found["mintad"] - 0.01


def test_a_run_leaves_its_settings_log_table_and_checkpoint(tiny_run):
    names = sorted(path.name for path in tiny_run.iterdir())
    assert names == ["args.json", "log.txt", "metrics.json", "unified.pt"]
    settings = json.loads((tiny_run / "args.json").read_text())
    assert (settings["epochs"], settings["classes"], settings["root"]) == (3, None, "photos")
    lines = (tiny_run / "log.txt").read_text().splitlines()
    assert sum("epoch 3/3: " in line for line in lines) == 1
    rows = result(tiny_run)["classes"] | {"mean": result(tiny_run)["mean"]}
    assert list(rows) == ["pill", "weave", "mean"]
    for name, row in rows.items():
        assert [name, *(f"{value:.3f}" for value in row.values())] in map(str.split, lines)


def test_a_failed_attempt_does_not_block_the_corrected_command(script, tiny, call):
    call(script, *tiny, "--root", "nowhere", "--out", "run")
    assert call(script, *tiny, "--epochs", 1, "--out", "run").status == 0
    assert json.loads(Path("run/args.json").read_text())["root"] == "photos"


# ----------------------------------------------------------------------------- which images do what


@pytest.fixture
def separate(script, tiny, call):
    """Flags of a run of one epoch for each class, which lies in the folder "separate"."""
    flags = *tiny, "--no-unified", "--epochs", 1
    call(script, *flags, "--out", "separate")
    return flags


def test_a_separate_model_is_that_of_its_class_alone(script, separate, call):
    call(script, *separate, "--classes", "weave", "--out", "alone")
    assert list(result("alone")["classes"]) == ["weave"]
    assert same_model("alone/weave.pt", "separate/weave.pt")


def test_a_separate_model_has_the_row_of_its_class_only(script, separate, call):
    call(script, "--eval", "separate/pill.pt", "--out", "pill")
    assert result("pill")["classes"] == {"pill": result("separate")["classes"]["pill"]}
    refused = call(script, "--eval", "separate/pill.pt", "--classes", "weave")
    assert (refused.status, "--classes" in refused.error) == (2, True)


def test_without_masks_the_table_has_image_metrics_only(script, tiny, call):
    shutil.rmtree("photos/pill/ground_truth")
    assert re.search(r"pill +[01]\.\d+ +- +- +-\n", call(script, *tiny, "--epochs", 1).out)


def test_the_domains_of_aebad_are_rows(script, tiny, call):
    for domain in "same", "view":
        for kind in "train/good", "test/good", "test/stain", "ground_truth/stain":
            shutil.copytree(f"photos/pill/{kind}", f"aebad/AeBAD_S/{kind}/{domain}")
    call(script, *tiny, "--data", "aebad", "--root", "aebad", "--epochs", 1, "--out", "run")
    assert list(result("run")["classes"]) == ["same", "view"]


def test_an_image_that_trains_and_tests_is_told(script, tiny, call):
    shutil.copy("photos/pill/train/good/000.png", "photos/pill/test/good/copy.png")
    assert "copy.png is photos/pill/train" in call(script, *tiny, "--epochs", 1).out


@pytest.mark.parametrize("script", ["minimaxad"])
def test_what_crop_cuts_away_makes_no_difference(script, tiny, call):
    flags = *tiny, "--epochs", 1, "--size", 80, "--crop", 64
    call(script, *flags, "--out", "one")
    call(script, "--eval", "one", "--predict", "photos/pill/test", "--out", "verdicts")
    for path in Path("photos").glob("*/*/*/*.png"):
        framed = Image.new("RGB", (128, 128), "green")
        framed.paste(Image.open(path).crop((8, 8, 120, 120)), (8, 8))
        framed.save(path)
    call(script, *flags, "--out", "other")
    assert_same_run("one", "other")
    call(script, "--eval", "other", "--predict", "photos/pill/test", "--out", "verdicts2")
    one, other = (Path(x, "predictions.csv").read_text() for x in ("verdicts", "verdicts2"))
    assert one == other


def test_cifar10_is_tested_on_all_classes(script, tiny, call, cifar10):
    cifar10("photos")
    call(script, *tiny, "--data", "cifar10", "--normals", "13579", "--epochs", 1, "--out", "run")
    assert result("run")["classes"]["13579"]["i_auroc"] is not None
    predict = "--predict", "photos/pill/test", "--out", "new"
    assert call(script, "--eval", "run", *predict).status == 0  # by the same levels


# ------------------------------------------------------------------------------------ the training


def test_amp_learns_nearly_the_same(script, tiny, tiny_run, call):
    call(script, *tiny, "--amp", "--out", "run")
    found, expected = epochs("run")[-1], epochs(tiny_run)[-1]
    assert found[0] == pytest.approx(expected[0], rel=0.1)
    assert found != expected


def test_an_odd_batch_or_side_trains(script, tiny, call):
    side = "--crop" if script == "minimaxad" else "--size"
    for odd in ["--batch-size", 1], [side, 56]:  # does not halve, as 400 of mad
        assert call(script, *tiny, "--epochs", 1, *odd, "--out", odd[0][2:]).status == 0


@pytest.mark.parametrize(
    "script, parts", [("mintad", {"model"}), ("minimaxad", {"bottleneck", "decoder"})]
)
def test_a_seed_draws_all_weights_but_an_untrained_backbone(script, parts, tiny, call):
    for seed in 1, 2:
        call(script, *tiny, "--lr", 0, "--epochs", 1, "--seed", seed, "--out", f"seed{seed}")
    one, two = (checkpoint(f"seed{seed}/unified.pt") for seed in (1, 2))
    drawn = [key for key in one if not torch.equal(one[key], two[key])]
    drawn = [key for key in drawn if "running" not in key]  # BatchNorm's differ by the order
    assert {key.split(".")[0] for key in drawn} - {"whitening"} == parts


# ------------------------------------------------------------------- interrupted and resumed runs


class Killed(BaseException):
    """As a kill: nothing in the scripts catches it."""


@pytest.fixture
def killed(call, monkeypatch):
    """A function that starts a run and kills it as it logs a text.

    After each epoch some seconds pass, by default more than there are between checkpoints.
    """

    def killed(script, *flags, at, seconds=61):
        clock = time.time
        passed = 0

        def watch(record):
            nonlocal passed
            if "epoch" in record.getMessage():
                passed += seconds
            if at in record.getMessage():
                raise Killed
            return True

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(time, "time", lambda: clock() + passed)
            patch.setattr(logging.getLogger(script), "filters", [watch])
            call(script, *flags, "--out", "killed")

    return killed


@pytest.mark.parametrize("script", ["mintad"])
def test_a_killed_run_by_muon_goes_on_bit_for_bit(script, tiny, killed, call):
    call(script, *tiny, "--optimizer", "muon", "--out", "straight")
    killed(script, *tiny, "--optimizer", "muon", at="epoch 3/3")
    call(script, "--out", "killed", "--resume")
    assert_same_run("straight", "killed")


def test_a_separate_run_goes_on_with_the_next_class_and_its_own_backbone(
    script, tiny, killed, call
):
    """Which the checkpoints hold: its file is gone by then."""
    torch.save(timm.create_model("test_efficientnet").state_dict(), "weights.pt")
    flags = "--no-unified --epochs 1 --backbone test_efficientnet --weights weights.pt".split()
    call(script, *tiny, *flags, "--out", "straight")
    killed(script, *tiny, *flags, at="weave epoch 1/1")
    Path("weights.pt").unlink()
    call(script, "--out", "killed", "--resume")
    assert_same_run("straight", "killed")


def test_a_checkpoint_is_written_when_a_minute_has_passed(script, tiny, killed):
    killed(script, *tiny, "--epochs", 4, at="epoch 4/4", seconds=31)
    assert torch.load("killed/unified.pt", weights_only=True)["epoch"] == 2


@pytest.mark.parametrize("last, resumable", [("calibrate", False), ("evaluate", True)])
def test_an_interrupt_says_how_to_go_on_if_there_is_a_checkpoint(
    script, tiny, call, monkeypatch, last, resumable
):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"metrics.{last}", interrupt)
    result = call(script, *tiny, "--epochs", 1, "--out", "run")
    assert (result.status, "--resume" in result.error) == (130, resumable)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    script, tiny, tiny_run, killed, call, monkeypatch
):
    def half(path, content):
        nonlocal written
        written += path.suffix == ".pt"
        write(path, content if written < 2 else content[:10_000])
        if written == 2:
            raise Killed

    written = 0
    write = Path.write_bytes
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        patch.setattr(Path, "unlink", lambda *args, **options: None)  # nothing is tidied up
        patch.setattr(os, "getpid", lambda: 1)  # nor does a later process have the same number
        killed(script, *tiny, at="epoch 3/3")
    call(script, "--out", "killed", "--resume")
    assert_same_run(tiny_run, "killed")
    assert call(script, "--eval", "killed").status == 0


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(script, tiny, killed, call):
    killed(script, *tiny, at="epoch 1/3")
    Path("killed/.host-1-unified.pt").touch()  # what a kill while it is written leaves
    refused = call(script, "--out", "killed", "--resume")
    assert (refused.status, "without --resume" in refused.error) == (2, True)
    assert call(script, *tiny, "--epochs", 1, "--out", "killed").status == 0


def test_a_finished_run_resumed_has_its_table_again_and_stays_as_it_was(script, tiny_run, call):
    shutil.copytree(tiny_run, "run")
    Path("run/metrics.json").unlink()
    assert call(script, "--out", "run", "--resume", "--root", "nowhere").status == 2
    assert "I-AUROC" in call(script, "--out", "run", "--resume").out
    for name in "unified.pt", "args.json":
        assert Path("run", name).read_bytes() == (tiny_run / name).read_bytes()
    assert result("run")["classes"] == result(tiny_run)["classes"]


def test_a_run_is_not_resumed_with_other_images(script, tiny, killed, call):
    killed(script, *tiny, at="epoch 2/3")
    Image.new("RGB", (128, 128)).save("photos/pill/train/good/another.png")
    refused = call(script, "--out", "killed", "--resume")
    assert (refused.status, "other images" in refused.error) == (2, True)


DIVERGING = {  # after the first epoch
    "mintad": ["--weight-decay", 3e4, "--epochs", 20],
    "minimaxad": ["--gamma", 1e9],
}


def test_divergence_is_told_and_leaves_a_good_checkpoint(script, tiny, call, monkeypatch):
    monkeypatch.setattr(f"{script}.SAVE_EVERY", -1)
    ended = call(script, *tiny, *DIVERGING[script], "--out", "run")
    assert (ended.status, "--lr" in ended.error) == (2, True)
    for tensor in checkpoint("run/unified.pt").values():
        assert torch.isfinite(tensor.double()).all()


@pytest.mark.parametrize("script", ["mintad"])
def test_constant_features_are_refused(script, tiny, call, monkeypatch):
    def constant(self, image):
        return torch.zeros(len(image), self.H * self.W, self.C)

    monkeypatch.setattr(mintad.Backbone, "forward", constant)
    ended = call(script, *tiny)
    assert (ended.status, "features" in ended.error) == (2, True)
