"""metrics.predict with a model that is a formula: the score is the image's mean, the map its grey values."""
import csv
import errno
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

import data
import metrics

NORMAL = metrics.calibrate(np.full((20, 4, 4), 50.0), np.arange(50.0, 70.0), ["pill"] * 20, held_out=True)


def look(pixels):
    maps = pixels.mean(-1)
    return maps, maps.mean((1, 2)), ["pill"] * len(maps)


def predict(files, folder, look=look, size=32, crop=None, normal=NORMAL):
    lines = []
    folder.mkdir(parents=True, exist_ok=True)
    ok = metrics.predict([str(file) for file in files], look, size, crop, normal, 0.9, folder, lines.append)
    assert all("\n" not in line for line in lines)
    return ok, lines


def rows(folder):
    with open(folder / "predictions.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def photo(path, level, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level,) * 3).save(path)
    return path


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_rows_pictures_and_lines(tmp_path):
    files = [photo(tmp_path / "in/dark.png", 40), photo(tmp_path / "in/light.jpg", 200)]
    out = tmp_path / "new/out"
    ok, lines = predict(files, out)
    assert ok and [list(row.values()) for row in rows(out)] == [
        [str(files[0]), "40", "good", "pill", "67.1", "dark.png"],
        [str(files[1]), "200", "defective", "pill", "67.1", "light.jpg.png"]]
    assert set(content(out)) == {"predictions.csv", "dark.png", "light.jpg.png"}
    assert all(data.is_own(out / name) for name in ("dark.png", "light.jpg.png"))
    # 2 of 20 above: the 95 % bound of Clopper and Pearson from tables is 28.3 %
    assert lines == ["threshold for pill: 67.1, the 0.9 quantile of held-out normal images: 2 of 20 above "
                     "it, a false positive rate of 10.0%, with 95 % confidence below 28.3%",
                     f"{files[0]}: score 40, good, pill", f"{files[1]}: score 200, defective, pill",
                     f"written to {out}"]


def test_a_class_that_is_not_known_has_the_threshold_of_all(tmp_path):
    _, lines = predict([photo(tmp_path / "a.png", 68)], tmp_path / "out", lambda x: (*look(x)[:2], [None]),
                       normal={**NORMAL, "held_out": False})
    assert lines[0].startswith("threshold: 67.1") and "training images" in lines[0]
    assert lines[1].endswith("score 68, defective") and rows(tmp_path / "out")[0]["class"] == ""


def test_what_exceeds_the_peaks_of_normal_maps_is_outlined(tmp_path):
    image = np.zeros((32, 32, 3), np.uint8)
    image[8:24, 8:24] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    predict([tmp_path / "a.png"], tmp_path / "out")
    heated = np.asarray(Image.open(tmp_path / "out/a.png"))[:384, 390:]
    white = (heated == 255).all(-1)
    row = np.flatnonzero(white[192])
    # the two sides, not the inside
    assert 2 <= len(row) <= 4 and abs(row[0] - 96) < 12 and abs(row[-1] - 288) < 12


@pytest.mark.parametrize("mode,size,crop", [("RGB", 32, None), ("RGB", 37, 20), ("RGB", 36, 23),
                                            ("L", 64, None), ("P", 24, 24), ("RGBA", 16, 5)])
def test_the_model_sees_the_pixels_of_data_decode(tmp_path, mode, size, crop):
    noise = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(tmp_path / "a.png")
    seen = []

    def watch(pixels):
        seen.append(pixels)
        return look(pixels)

    assert predict([tmp_path / "a.png"], tmp_path / "out", watch, size, crop)[0]
    want = data.decode([data.Sample(str(tmp_path / "a.png"), 0, None, "", "")], size, crop)
    assert seen[0].dtype == np.uint8 and np.array_equal(seen[0], want)


def test_a_photo_is_decoded_once(tmp_path, monkeypatch):
    calls, read_image = [], data.read_image
    monkeypatch.setattr(data, "read_image", lambda name: calls.append(name) or read_image(name))
    predict([photo(tmp_path / "a.png", 9)], tmp_path / "out")
    assert calls == [str(tmp_path / "a.png")]


def test_an_input_is_never_replaced(tmp_path):
    files = [photo(tmp_path / "in/a.jpg", 40), photo(tmp_path / "in/b.png", 40)]
    (tmp_path / "link").symlink_to("in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/b.png").symlink_to("../in/b.png")
    before = content(tmp_path / "in")
    for out in tmp_path / "in", tmp_path / "link", tmp_path / "in/../in", tmp_path / "out":
        with pytest.raises(data.DataError, match=r"b\.png"):
            predict(files, out, lambda pixels: pytest.fail("an image was judged"))
        assert content(tmp_path / "in") == before
    ok, _ = predict(files[:1], tmp_path / "in")  # a.jpg.png lands on nothing
    assert ok and content(tmp_path / "in").items() > before.items()


def test_nor_an_input_where_names_differ_in_case_nor_one_at_the_place_of_the_csv(tmp_path):
    out = tmp_path / "out"
    photo(out / "predictions.png", 40).rename(out / "predictions.csv")
    for files in [photo(tmp_path / "in/x.png", 40), photo(out / "X.png", 40)], [out / "predictions.csv"]:
        before = content(out)
        with pytest.raises(data.DataError, match=str(files[-1])):
            predict(files, out)
        assert content(out) == before


def test_a_second_prediction_removes_the_pictures_of_the_first(tmp_path):
    out = tmp_path / "out"
    predict([photo(tmp_path / "in/a.png", 40), photo(tmp_path / "in/b.jpg", 40)], out)
    photo(out / "mine.png", 3)
    (out / "notes.png").write_text("no image")
    metrics.save(Image.new("RGB", (4, 4)), tmp_path / "outside.png")
    predict([photo(tmp_path / "in/c.png", 40)], out)
    assert set(content(out)) == {"predictions.csv", "c.png", "mine.png", "notes.png"}
    assert (tmp_path / "outside.png").exists() and len(rows(out)) == 1


def test_an_earlier_picture_that_is_judged_now_stays(tmp_path):
    out = tmp_path / "out"
    predict([photo(tmp_path / "in/b.jpg", 40)], out)
    (tmp_path / "judged.png").symlink_to(out / "b.jpg.png")
    assert predict([tmp_path / "judged.png"], out)[0] and (out / "b.jpg.png").exists()


def test_names_of_all_kinds(tmp_path):
    names = ["瓶" * 83 + ".png", "two\nlines.png", "a,\"b\".png", "\udce9.png", "x" * 251 + ".png"]
    files = [photo(tmp_path / "in" / "c.png", 40).rename(tmp_path / "in" / name) for name in names]
    files += [photo(tmp_path / f"more{i}" / "a.png", 40) for i in range(3)]
    ok, lines = predict(files, tmp_path / "out")
    found = rows(tmp_path / "out")
    assert ok and [row["file"] for row in found] == [str(file) for file in files]
    assert [row["picture"] for row in found[-3:]] == ["a.png", "a_2.png", "a_3.png"]
    assert all((tmp_path / "out" / row["picture"]).is_file() for row in found)
    for line in lines:
        line.encode()  # can be printed


def test_an_image_that_fails_costs_that_image(tmp_path):
    files = [tmp_path / f"{name}.png" for name in ("none", "broken", "infinite", "fine")]
    files[1].write_bytes(b"no image")
    photo(files[2], 7), photo(files[3], 40)

    def sometimes(pixels):
        maps, scores, classes = look(pixels)
        return maps, np.where(scores == 7, np.nan, scores), classes

    ok, lines = predict(files, tmp_path / "out", sometimes)
    verdicts = [row["verdict"] for row in rows(tmp_path / "out")]
    assert not ok and verdicts == ["unreadable", "unreadable", "failed", "good"]
    assert set(content(tmp_path / "out")) == {"predictions.csv", "fine.png"}
    skipped = [line for line in lines if line.startswith("skipped: ")]
    assert len(skipped) == 3 and all(str(file) in line for file, line in zip(files, skipped))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_ending_in_the_middle_keeps_the_rows(tmp_path, monkeypatch, error):
    files, save = [photo(tmp_path / f"in/{i}.png", 40) for i in range(3)], metrics.save

    def save_one(picture, path):
        assert path.name == "0.png" or len(rows(tmp_path / "out")) == 1  # already on the disk
        if path.name == "1.png":
            raise error
        save(picture, path)

    monkeypatch.setattr(metrics, "save", save_one)
    with pytest.raises(type(error)):
        predict(files, tmp_path / "out")
    assert [row["picture"] for row in rows(tmp_path / "out")] == ["0.png"]


def test_line_scans_and_large_photos_cost_bounded_memory(tmp_path):
    sizes = {"wide": (6000, 20), "tall": (20, 6000), "large": (6000, 4000)}
    files = [photo(tmp_path / f"in/{name}.png", 90, size) for name, size in sizes.items()]
    code = textwrap.dedent("""
        import resource, sys
        sys.path[:0] = sys.argv[1:3]
        import test_predict
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert test_predict.predict(sys.argv[4:], test_predict.metrics.Path(sys.argv[3]))[0]
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """)
    here = os.path.dirname(__file__)
    command = [sys.executable, "-c", code, here, os.path.dirname(here), tmp_path / "out", *files]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 300_000  # kB; the large photo's pixels alone are 72 MB
    for name in sizes:
        with Image.open(tmp_path / f"out/{name}.png") as picture:
            assert max(picture.size) <= 2000 and picture.width >= 400 and picture.height >= 50
