"""Training from its first line to its table: what a run leaves, what it learns from which images,
and how interrupted runs go on."""

import json
import logging
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import data
import mintad


def result(folder):
    return json.loads(Path(folder, "metrics.json").read_text())


def checkpoint(path):
    """The tensors of a checkpoint, which the two scripts name differently."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state["model"] if "model" in state else state["detector"]


def assert_same_run(one, other):
    """Both have the same checkpoints and the same table, to the last bit."""
    for path in sorted(Path(one).glob("*.pt")):
        theirs = checkpoint(Path(other, path.name))
        for key, tensor in checkpoint(path).items():
            assert torch.equal(tensor, theirs[key]), f"{path.name} {key}"
    assert result(one)["classes"] == result(other)["classes"]


def epochs(folder):
    """The figures in the log's line of each epoch; the last, seconds, is left out."""
    lines = re.findall(r"epoch \d+/\d+: (.*)", Path(folder, "log.txt").read_text())
    return [[float(x) for x in re.findall(r"-?\d+\.\d+", line)[:-1]] for line in lines]


# ---------------------------------------------------------------------------------- the toy runs


@pytest.mark.parametrize("name", ["mintad", "muon", "minimaxad"])
def test_the_toy_set_is_learned(name, toy_run):
    assert result(toy_run(name))["mean"]["i_auroc"] > 0.9


def test_muon_is_not_behind_adamw(toy_run):
    muon, adamw = (result(toy_run(name))["mean"]["i_auroc"] for name in ("muon", "mintad"))
    assert muon >= adamw - 0.01


# ------------------------------------------------------------------------------ files of a run


def test_a_run_leaves_four_files(tiny_run):
    names = sorted(path.name for path in tiny_run.iterdir())
    assert names == ["args.json", "log.txt", "metrics.json", "unified.pt"]


def test_the_log_has_a_line_for_each_epoch(tiny_run):
    assert (tiny_run / "log.txt").read_text().count("epoch 3/3: ") == 1


def test_the_log_has_the_table(tiny_run):
    row = [f"{value:.3f}" for value in result(tiny_run)["mean"].values()]
    assert ["mean", *row] in [line.split() for line in open(tiny_run / "log.txt")]


def test_metrics_json_has_a_row_of_four_metrics_for_each_class(tiny_run):
    rows = {cls: list(row) for cls, row in result(tiny_run)["classes"].items()}
    assert rows == dict.fromkeys(["pill", "weave"], ["i_auroc", "p_auroc", "p_aupr", "aupro"])


def test_metrics_json_has_the_mean_of_the_classes(tiny_run):
    pill, weave = result(tiny_run)["classes"].values()
    for metric, value in result(tiny_run)["mean"].items():
        assert value == pytest.approx((pill[metric] + weave[metric]) / 2)


@pytest.mark.parametrize("key, value", [("size", 64), ("classes", None), ("root", "photos")])
def test_args_json_has_the_settings(key, value, tiny_run):
    assert json.loads((tiny_run / "args.json").read_text())[key] == value


# ----------------------------------------------------------------------------- which images do what


def test_classes_chooses_some(script, tiny, call):
    call(script, *tiny, "--epochs", 1, "--classes", "weave", "--out", "run")
    assert list(result("run")["classes"]) == ["weave"]


@pytest.fixture
def separate(script, tiny, call):
    """Flags of a run of one epoch for each class, and its folder."""
    flags = *tiny, "--no-unified", "--epochs", 1
    call(script, *flags, "--out", "separate")
    return flags, Path("separate")


def test_a_separate_model_is_that_of_its_class_alone(script, separate, call):
    flags, both = separate
    call(script, *flags, "--classes", "weave", "--out", "alone")
    one, other = (checkpoint(f"{run}/weave.pt") for run in ("alone", both))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_a_row_of_separate_models_is_that_of_its_own(script, separate, call):
    call(script, "--eval", "separate/pill.pt", "--out", "pill")
    assert result("pill")["classes"] == {"pill": result(separate[1])["classes"]["pill"]}


def test_without_masks_the_table_has_image_metrics_only(script, tiny, call):
    shutil.rmtree("photos/pill/ground_truth")
    assert re.search(r"pill +[01]\.\d+ +- +- +-\n", call(script, *tiny, "--epochs", 1).out)


def test_held_out_photos_do_not_train(script, tiny, call):
    flags = *tiny, "--epochs", 1, "--holdout", 0.2
    call(script, *flags, "--out", "one")
    _, train, _ = data.load("folder", "photos")
    for i in np.flatnonzero(data.hold_out(train, 0.2)):
        Image.new("RGB", (128, 128), "green").save(train[i].image)
    call(script, *flags, "--out", "other")
    one, other = (checkpoint(f"{run}/unified.pt") for run in ("one", "other"))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_of_few_photos_none_is_held_out(script, tiny, call):
    for path in list(Path("photos").glob("*/train/good/*"))[2:]:
        path.unlink()
    assert call(script, *tiny, "--classes", "pill", "--epochs", 1, "--holdout", 0.1).status == 0


def test_the_domains_of_aebad_are_rows(script, tiny, call):
    for domain in "same", "view":
        for kind in "train/good", "test/good", "test/stain", "ground_truth/stain":
            shutil.copytree(f"photos/pill/{kind}", f"aebad/AeBAD_S/{kind}/{domain}")
    flags = ["--crop", 0] if script == "minimaxad" else []
    call(script, *tiny, *flags, "--data", "aebad", "--root", "aebad", "--epochs", 1, "--out", "run")
    assert list(result("run")["classes"]) == ["same", "view"]


class CIFAR10:
    """Two images of each class, to train and to test."""

    def __init__(self, root, train):
        self.targets = list(range(10)) * 2
        self.data = np.random.default_rng(train).integers(0, 256, (20, 32, 32, 3), np.uint8)


def test_cifar10_is_tested_on_all_classes(script, tiny, call, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", CIFAR10)
    call(script, *tiny, "--data", "cifar10", "--normals", "13579", "--epochs", 1, "--out", "run")
    assert result("run")["classes"]["13579"]["i_auroc"] is not None


# ------------------------------------------------------------------------------------ the training


def test_amp_learns(script, tiny, call):
    call(script, *tiny, "--amp", "--out", "run")
    (first, *_), *_, (last, *_) = epochs("run")
    assert last < first


def test_batches_of_one_image(script, tiny, call):
    assert call(script, *tiny, "--epochs", 1, "--batch-size", 1).status == 0


@pytest.mark.parametrize("script", ["minimaxad"])
def test_a_side_whose_maps_do_not_halve(script, tiny, call):
    assert call(script, *tiny, "--epochs", 1, "--size", 80).status == 0  # as 400 of the set mad


@pytest.mark.parametrize("script", ["minimaxad"])
def test_what_crop_cuts_away_makes_no_difference(script, tiny, call):
    flags = *tiny, "--epochs", 1, "--size", 80, "--crop", 64
    call(script, *flags, "--out", "one")
    for path in Path("photos").glob("*/*/*/*.png"):
        framed = Image.new("RGB", (128, 128), "green")
        framed.paste(Image.open(path).crop((8, 8, 120, 120)), (8, 8))
        framed.save(path)
    call(script, *flags, "--out", "other")
    assert_same_run("one", "other")


SETTINGS = {
    "mintad": [
        *["", "--seed 2", "--lr 5e-5", "--weight-decay 0.5", "--optimizer muon", "--amp"],
        *["--pool area", "--query mlp", "--query learned", "--prompt label", "--prompt image"],
        *["--no-adapter", "--no-cls-loss", "--no-prior-loss", "--literal", "--uniad --size 128"],
    ],
    "minimaxad": [
        *["", "--seed 2", "--lr 1e-3", "--weight-decay 0.5", "--amp", "--p-hard 0.5"],
        *["--p-lim 0.01", "--loss global", "--loss local", "--loss local-hm"],
        *["--loss local-hm --p-lim 0.9", "--arch rd --backbone test_resnet"],
    ],
}


def test_every_setting_of_the_training_makes_a_difference(script, tiny, call):
    learned = {}
    for i, flags in enumerate(SETTINGS[script]):
        call(script, *tiny, "--epochs", 1, *flags.split(), "--out", i)
        weights = checkpoint(f"{i}/unified.pt").values()
        learned[b"".join(tensor.numpy().tobytes() for tensor in weights)] = flags
    assert [*learned.values()] == SETTINGS[script]


@pytest.mark.parametrize(
    "script, parts", [("mintad", {"model"}), ("minimaxad", {"bottleneck", "decoder"})]
)
def test_a_seed_draws_all_weights_but_an_untrained_backbone(script, parts, tiny, call):
    for seed in 1, 2:
        call(script, *tiny, "--lr", 0, "--epochs", 1, "--seed", seed, "--out", f"seed{seed}")
    one, two = (checkpoint(f"seed{seed}/unified.pt") for seed in (1, 2))
    assert {key.split(".")[0] for key in one if not torch.equal(one[key], two[key])} - {
        "whitening"
    } == parts


def test_each_epoch_has_batches_of_its_own(script, tiny, call, monkeypatch):
    monkeypatch.setattr(mintad, "DROPOUT", 0.0)
    monkeypatch.setattr(mintad, "JITTER", 0.0)
    call(script, *tiny, "--lr", 0, "--epochs", 2, "--out", "run")
    first, second = epochs("run")
    assert first != second


@pytest.mark.parametrize("script", ["mintad"])
def test_each_epoch_has_noise_of_its_own(script, tiny, call):
    for path in sorted(Path("photos").glob("*/train/good/*"))[1:]:  # another order is no matter
        path.unlink()
    call(script, *tiny, "--lr", 0, "--epochs", 2, "--classes", "pill", "--out", "run")
    first, second = epochs("run")
    assert first != second


@pytest.mark.parametrize("script", ["minimaxad"])
def test_gamma_multiplies_the_rate_after_each_epoch(script, tiny, call):
    for count in 1, 3:
        call(script, *tiny, "--gamma", 0, "--epochs", count, "--out", f"{count}")
    one, three = (checkpoint(f"{count}/unified.pt") for count in (1, 3))
    moved = [key for key in one if not torch.equal(one[key], three[key])]
    assert all("running" in key or "num_batches" in key for key in moved)  # BatchNorm's statistics


@pytest.mark.parametrize("script", ["mintad"])
def test_the_rate_is_that_of_the_step_of_the_whole_run(script, tiny, call, monkeypatch):
    def rate(args, step, steps):
        return 1e-3 if step / steps < 1 / args.epochs else 0  # it learns in the first epoch only

    monkeypatch.setattr(mintad, "learning_rate", rate)
    for count in 1, 2:
        call(script, *tiny, "--epochs", count, "--out", f"{count}")
    one, two = (checkpoint(f"{count}/unified.pt") for count in (1, 2))
    assert all(torch.equal(one[key], two[key]) for key in one)


# ------------------------------------------------------------------- interrupted and resumed runs


class Killed(BaseException):
    """As a kill: nothing in the scripts catches it."""


@pytest.fixture
def killed(call, monkeypatch):
    """A function that starts a run and kills it as it logs a text; returns the run's folder.

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
        return Path("killed")

    return killed


@pytest.mark.parametrize(
    "script, flags", [("mintad", []), ("mintad", ["--optimizer", "muon"]), ("minimaxad", [])]
)
def test_a_killed_run_goes_on_bit_for_bit(script, flags, tiny, killed, call):
    call(script, *tiny, *flags, "--out", "straight")
    killed(script, *tiny, *flags, at="epoch 3/3")
    call(script, "--out", "killed", "--resume")
    assert_same_run("straight", "killed")


def test_a_separate_run_goes_on_with_the_next_class(script, separate, killed, call):
    flags, straight = separate
    killed(script, *flags, at="weave epoch 1/1")
    call(script, "--out", "killed", "--resume")
    assert_same_run(straight, "killed")


def test_a_checkpoint_is_written_when_a_minute_has_passed(script, tiny, killed):
    killed(script, *tiny, "--epochs", 4, at="epoch 4/4", seconds=31)
    assert torch.load("killed/unified.pt", weights_only=True)["epoch"] == 2


def test_no_checkpoint_is_written_sooner(script, tiny, killed):
    killed(script, *tiny, at="epoch 2/3", seconds=50)
    assert list(Path("killed").glob("*.pt")) == []


@pytest.fixture
def killed_while_writing(script, tiny, killed, monkeypatch):
    """The folder of a run that was killed as it wrote the second checkpoint."""

    def half(state, path):
        save(state, path)
        if state["epoch"] == 2:
            path.write_bytes(path.read_bytes()[:10_000])
            raise Killed

    save = torch.save
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        patch.setattr(Path, "unlink", lambda *args, **options: None)  # nothing is tidied up
        patch.setattr(os, "getpid", lambda: 1)  # nor does a later process have the same number
        return killed(script, *tiny, at="epoch 3/3")


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    script, killed_while_writing, tiny_run, call
):
    call(script, "--out", killed_while_writing, "--resume")
    assert_same_run(tiny_run, killed_while_writing)


def test_a_run_killed_while_writing_can_be_evaluated_later(script, killed_while_writing, call):
    call(script, "--out", killed_while_writing, "--resume")
    assert call(script, "--eval", killed_while_writing).status == 0


def test_a_finished_run_resumed_keeps_its_checkpoint(script, tiny_run, call):
    shutil.copytree(tiny_run, "run")
    call(script, "--out", "run", "--resume")
    assert Path("run/unified.pt").read_bytes() == (tiny_run / "unified.pt").read_bytes()


def test_a_run_is_not_resumed_with_other_images(script, tiny, killed, call):
    killed(script, *tiny, at="epoch 2/3")
    Image.new("RGB", (128, 128)).save("photos/pill/train/good/another.png")
    refused = call(script, "--out", "killed", "--resume")
    assert (refused.status, "other images" in refused.error) == (2, True)


def test_a_refused_run_leaves_args_json_as_it_was(script, tiny_run, call):
    shutil.copytree(tiny_run, "run")
    call(script, "--out", "run", "--resume", "--root", "nowhere")
    assert Path("run/args.json").read_text() == (tiny_run / "args.json").read_text()


# ---------------------------------------------------------------------------------- divergence

DIVERGING = {  # after the first epoch
    "mintad": ["--weight-decay", 3e4, "--epochs", 20],
    "minimaxad": ["--gamma", 1e9],
}


def test_divergence_is_said_in_a_line(script, tiny, call):
    ended = call(script, *tiny, *DIVERGING[script], "--out", "run")
    assert (ended.status, "--lr" in ended.error) == (2, True)


def test_divergence_leaves_the_last_good_checkpoint(script, tiny, call, monkeypatch):
    monkeypatch.setattr(f"{script}.SAVE_EVERY", -1)
    call(script, *tiny, *DIVERGING[script], "--out", "run")
    tensors = checkpoint("run/unified.pt").values()
    assert all(torch.isfinite(tensor.double()).all() for tensor in tensors)
