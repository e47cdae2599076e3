"""How images, masks and weights are read, what is refused, and the cache of decoded images."""

import contextlib
import io
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from hub import serve_hub  # noqa: F401
from PIL import Image, ImageFilter, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import nn
from torchvision import transforms
from trees import SQUARE

import data

NOISE = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
RGB = NOISE[..., :3].copy()


def sample(image, mask=None):
    return data.Sample(str(image), int(mask is not None), "x", "x", mask and str(mask))


def read(path):
    return np.asarray(data.read_image(path)[0])


def refused(function, *args):
    """The line that says why."""
    with pytest.raises(data.UserError) as error:
        function(*args)
    return str(error.value)


# ------------------------------------------------------------------------------------------- images


def save_frames(path, **options):
    others = [Image.fromarray(RGB)]
    Image.new("RGB", (16, 16)).save(path, save_all=True, append_images=others, **options)


def copy(path):
    """Of tifffile and pypng: Pillow writes no 16 bit RGB."""
    shutil.copy(Path(__file__).with_name(path.name), path)


def huge(path):
    """Of 420 megapixels, says its header."""
    content = bytearray(Path(trees.image(path)).read_bytes())
    content[16:24] = struct.pack(">II", 21000, 20000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


REFUSED = {
    "rgb16.png": copy,
    "rgb16.tif": copy,
    "float.tif": lambda path: trees.save(path, NOISE[..., 0].astype("f4")),
    "pages.tif": save_frames,
    "animation.png": save_frames,
    "cut.png": lambda path: path.write_bytes(Path(trees.image(path)).read_bytes()[:900]),
    "missing.png": lambda path: None,
    "huge.png": huge,
    "pipe.png": os.mkfifo,
}


@pytest.mark.parametrize("name", REFUSED)
def test_all_but_8_bits_a_channel_and_one_frame_is_refused_by_name(tmp_path, name):
    path = tmp_path / name
    REFUSED[name](path)
    assert str(path) in refused(data.read_image, path)
    assert str(path) in refused(data.read_mask, sample(trees.image(tmp_path / "a.png"), path))


def test_of_a_phones_photo_of_two_frames_the_first_counts(tmp_path):
    save_frames(tmp_path / "a.jpg", format="MPO")
    assert read(tmp_path / "a.jpg").max() == 0


@pytest.mark.parametrize("pixels, two", [(2000, False), (500, True)])  # the photos have 1024
def test_of_large_photos_two_at_a_time_are_decoded(tmp_path, monkeypatch, pixels, two):
    now = []
    counts = []

    def decode(image, **options):
        now.append(1)
        counts.append(len(now))
        time.sleep(0.1)
        now.pop()

    monkeypatch.setattr(data, "LARGE", pixels)
    monkeypatch.setattr(ImageOps, "exif_transpose", decode)
    paths = [trees.image(tmp_path / f"{i}.png") for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(data.read_image, paths))
    assert (max(counts) == 2) == two


def test_what_is_odd_but_no_pixel_is_read_without_a_warning(tmp_path):
    notes = PngInfo()
    notes.add_text("notes", "x" * 2_000_000, zip=True)
    exif = Image.Exif()
    exif[270] = "a description"
    photo = Image.fromarray(RGB)
    photo.save(tmp_path / "notes.png", pnginfo=notes)
    photo.save(tmp_path / "exif.jpg", exif=exif.tobytes()[:30])
    photo.quantize(4).save(tmp_path / "palette.png", transparency=b"\0\xff\xff\xff")
    Image.new("L", (10000, 9000)).save(tmp_path / "90_megapixels.png")
    code = "import sys, data; [data.read_image(path) for path in sys.argv[1:]]"
    command = [sys.executable, "-W", "error", "-c", code, *tmp_path.iterdir()]
    subprocess.run(command, cwd=Path(data.__file__).parent, check=True)  # pytest has filters


def test_alpha_is_dropped_and_images_with_transparent_pixels_are_counted(tmp_path, caplog):
    opaque = NOISE | np.uint8([0, 0, 0, 255])
    paths = [trees.save(tmp_path / f"{i}.png", x) for i, x in enumerate([opaque] + [NOISE] * 3)]
    np.testing.assert_array_equal(read(paths[1]), RGB)
    for _ in range(2):
        data.decode([sample(path) for path in paths], 16, cache=tmp_path)
    assert len(re.findall("warning.*/1.png and 2 more", caplog.text)) == 2


WIDE = np.zeros((24, 40), np.uint8)
WIDE[:8, :8] = 255


def test_images_and_masks_are_turned_upright_by_exif(tmp_path):
    turned, upside_down = Image.Exif(), Image.Exif()
    turned[274] = 6
    upside_down[274] = 3
    photo = trees.save(tmp_path / "a.png", np.rot90(WIDE), exif=turned)
    mask = trees.save(tmp_path / "mask.png", np.rot90(WIDE, 2), exif=upside_down)
    np.testing.assert_array_equal(read(photo)[..., 0], WIDE)
    np.testing.assert_array_equal(data.read_mask(sample(photo, mask))[0], WIDE > 0)


@pytest.mark.parametrize("size, crop", [(48, None), (48, 41), (20, 16)])
def test_images_and_masks_are_resized_and_cropped_as_torchvision_does(tmp_path, size, crop):
    photo = Image.fromarray(RGB).resize((90, 70), Image.Resampling.BICUBIC)
    mask = Image.fromarray(NOISE[..., 0] > 180).resize((90, 70))
    found = sample(tmp_path / "a.png", tmp_path / "mask.png")
    photo.save(found.image)
    mask.save(found.mask)
    centre = transforms.CenterCrop(crop or size)
    nearest = transforms.Resize((size, size), transforms.InterpolationMode.NEAREST)
    expected = centre(transforms.Resize((size, size))(photo))
    np.testing.assert_array_equal(data.decode([found], size, crop, tmp_path)[0], expected)
    np.testing.assert_array_equal(data.decode_masks([found], size, crop)[0], centre(nearest(mask)))


def test_cifar10_is_enlarged_by_lanczos_as_in_uniad(tmp_path):
    for pixels in RGB, NOISE[..., 1:].copy():  # the cache tells them apart
        image = data.Sample("cifar10/test/0", 0, "x", "x", pixels=pixels)
        larger = Image.fromarray(pixels).resize((48, 48), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(data.decode([image], 48, cache=tmp_path)[0], larger)


def test_images_are_found_once_each_and_other_files_of_a_folder_are_told(tmp_path, caplog):
    for name in "a/2.png", "a/deep/1.jpg", "a/.hidden.png", "b.bmp", "a/verdicts/0.jpg":
        trees.image(tmp_path / name)
    for name in "a/Thumbs.db", "a/IMG_1.HEIC", "a/notes.txt", "named", "a/verdicts/predictions.csv":
        (tmp_path / name).touch()
    asked = [tmp_path / name for name in ("a", "b.bmp", "a/2.png", "named")]
    found = data.find_images(asked)
    expected = "a/2.png", "a/deep/1.jpg", "b.bmp", "named"
    assert found == [f"{tmp_path}/{name}" for name in expected]
    assert re.search("not used: .*/IMG_1.HEIC and 3 more", caplog.text)
    assert "missing.png" in refused(data.find_images, [tmp_path / "a", tmp_path / "missing.png"])


# -------------------------------------------------------------------------------------------- masks


def values(*values):
    return np.resize(np.array(values, np.uint8), (32, 32)) * SQUARE


def layer(inside, outside):
    """SQUARE painted on nothing: the grey of each, opaque and transparent."""
    grey = np.where(SQUARE, inside, outside)
    return np.dstack([grey, grey, grey, SQUARE * 255]).astype(np.uint8)


SMOOTH = np.asarray(Image.fromarray(SQUARE).convert("L").filter(ImageFilter.GaussianBlur(2)))
DOT = np.arange(1024).reshape(32, 32) == 0
SMALL = SMOOTH // 4 * 3  # its maximum is less than 255
MASKS = {  # the mask, what of it is defect, what is said of it at 10 pixels
    "many class ids": (values(*range(1, 13)), SQUARE, None),
    "five greys": (values(51, 102, 153, 204, 255), SQUARE, None),
    "one channel": (np.dstack([values(i) for i in (0, 0, 1)]), SQUARE, None),
    "black layer": (layer(0, 0), SQUARE, None),
    "black layer, of white": (layer(0, 255), SQUARE, None),
    "white layer": (layer(255, 255), SQUARE, None),
    "all transparent": (np.dstack([values(9)] * 3 + [0 * values(9)]), SQUARE, None),
    "many greys": (SMALL, SMALL >= SMALL.max() / 2, "note"),
    "inverted": (~SQUARE, ~SQUARE, "warning"),
    "inverted, of many greys": (255 - SMOOTH, 255 - SMOOTH >= 127.5, "warning"),
    "empty": (SQUARE & False, SQUARE & False, "warning"),
    "vanishing": (DOT, DOT, "warning"),
}


@pytest.mark.parametrize("kind", MASKS)
def test_any_value_is_defect_and_odd_masks_are_named(tmp_path, caplog, kind):
    mask, expected, said = MASKS[kind]
    photo = trees.image(tmp_path / "photo.png")
    found = [sample(photo, trees.save(tmp_path / f"{i}.png", mask)) for i in range(2)]
    np.testing.assert_array_equal(data.read_mask(found[0])[0], expected)
    data.decode_masks(found, 10)
    assert re.search(f"{said}: .*/0.png and 1 more" if said else "^$", caplog.text)


JPEG = io.BytesIO()
Image.fromarray(SQUARE * np.uint8(255)).save(JPEG, "JPEG")
PALETTE = Image.fromarray(values(1, 2))
PALETTE.putpalette([255, 255, 255, 0, 0, 0, 200, 0, 0])  # its background is white


def test_a_palettes_numbers_are_classes_a_jpegs_are_not(tmp_path):
    photo = trees.image(tmp_path / "photo.png")
    (tmp_path / "jpeg.png").write_bytes(JPEG.getvalue())
    PALETTE.save(tmp_path / "palette.png")
    for name in "jpeg.png", "palette.png":
        np.testing.assert_array_equal(data.read_mask(sample(photo, tmp_path / name))[0], SQUARE)
    classes = trees.save(tmp_path / "classes.jpg", values(1, 2, 3), quality=95)
    assert re.search("classes.jpg: .* as PNG", refused(data.read_mask, sample(photo, classes)))


FITS = [(24, 40), (48, 80), (11, 19)]  # the last but for rounding


@pytest.mark.parametrize("shape", [*FITS, (40, 24), (48, 40), (24, 37)])
def test_a_turned_mask_or_one_of_another_aspect_is_refused_as_is_one_of_all_pixels(tmp_path, shape):
    photo = trees.save(tmp_path / "photo.png", WIDE)
    for mask in np.eye(*shape) > 0, np.ones(shape, bool):
        found = sample(photo, trees.save(tmp_path / "mask.png", mask))
        if shape in FITS and not mask.all():
            assert data.read_mask(found)[0].shape == shape
        else:
            assert "mask.png" in refused(data.read_mask, found)


# --------------------------------------------------------------------------------- cache and copies


@pytest.fixture
def photos(tmp_path):
    """Three bitmaps, whose files are of one size."""
    return [sample(trees.image(tmp_path / f"{i}.bmp", i)) for i in range(3)]


def test_the_cache_is_used_again_without_reading_an_image(tmp_path, photos):
    first = data.decode(photos, 16, None, tmp_path / "c").copy()
    before = os.stat(photos[1].image)
    Path(photos[1].image).write_bytes(bytes(before.st_size))
    os.utime(photos[1].image, ns=(before.st_atime_ns, before.st_mtime_ns))
    np.testing.assert_array_equal(data.decode(photos, 16, None, tmp_path / "c"), first)


@pytest.mark.parametrize("change", ["time", "resolution", "crop", "order", "folder"])
def test_after_any_change_the_images_are_decoded_anew(tmp_path, photos, change):
    data.decode(photos, 16, None, tmp_path / "c")
    if change == "time":
        trees.image(photos[1].image, 9)
        os.utime(photos[1].image, (1, 1))
    if change == "order":
        photos.reverse()
    if change == "folder":
        moved = trees.image(tmp_path / "folder/1.bmp", 9)
        shutil.copystat(photos[1].image, moved)
        photos[1] = sample(moved)
    size, crop = {"resolution": (18, None), "crop": (20, 16)}.get(change, (16, None))
    expected = data.decode(photos, size, crop, tmp_path / "other")
    np.testing.assert_array_equal(data.decode(photos, size, crop, tmp_path / "c"), expected)


def test_a_damaged_image_is_named_and_leaves_no_half_written_cache(tmp_path, photos):
    Path(photos[1].image).write_bytes(b"")
    assert photos[1].image in refused(data.decode, photos, 16, None, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_few_images_are_read_ahead_of_a_slow_disk():
    seen = []
    results = data.in_threads(seen.append, range(10_000), "")
    next(results)
    results.close()
    assert len(seen) <= data.AHEAD


def save(path, state):
    with data.saved(path) as file:
        torch.save(state, file)


def test_a_full_disk_is_told_with_the_space_and_nothing_is_left_there(tmp_path, photos):
    (tmp_path / "c").mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        said = refused(data.decode, photos, 32, None, tmp_path / "c")
        said += refused(save, tmp_path / "c/a.pt", {"x": torch.ones(10**5)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search("npy of 0.0 MB, .* MB free.*c/a.pt of 0.4 MB, .* MB free", said)
    with pytest.raises(data.UserError, match="all of 1000000000000.0 MB, .* MB free: .*No space"):
        with data.written(tmp_path / "c/all", 10**18):
            pytest.fail("it is begun though it cannot fit")
    assert list((tmp_path / "c").iterdir()) == []


def test_leftovers_of_killed_processes_of_this_host_go_at_the_next_start(tmp_path, photos, caplog):
    ended = subprocess.Popen(["true"])
    ended.wait()
    for start in lambda: data.remove_leftovers("."), lambda: data.decode(photos, 16, None, "."):
        with contextlib.chdir(tmp_path), data.written("a") as own:
            killed = own.name.replace(str(os.getpid()), str(ended.pid))
            others = own.name, killed.replace(data.HOST, "0123abcd"), f".{data.HOST}-notes-a"
            for name in killed, *others:
                Path(name).touch()
            start()
            assert all(map(os.path.exists, others)) and not os.path.exists(killed)
            assert others[1] in caplog.text and own.name not in caplog.text


@pytest.mark.parametrize("split", [2, 1])
def test_copies_in_train_and_test_or_twice_in_test_are_named_both(tmp_path, photos, caplog, split):
    pixels = data.decode(photos, 16, None, tmp_path)
    data.warn_of_copies(photos[:split], pixels[:split], photos[split:], pixels[split:])
    assert caplog.text == ""
    test = [*photos[split:], sample("copy.bmp")]
    data.warn_of_copies(photos[:split], pixels[:split], test, [*pixels[split:], pixels[1]])
    assert re.search("warning.*copy.bmp.*/1.bmp", caplog.text)


# ------------------------------------------------------------------------------------------ weights


def network():
    """Of the keys stem.weight, stem.bias and stages.0.*."""
    return nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3), "stages": nn.ModuleList([nn.BatchNorm2d(4)])})


def test_weights_are_found_by_name_in_any_order_below_model_and_in_timms_spelling(tmp_path):
    theirs, ours = network().state_dict(), network()
    renamed = {key.replace("stages.0", "stages_0"): x for key, x in reversed(theirs.items())}
    state = {"model": renamed | {"head.weight": torch.ones(2)}, "epoch": 3}
    torch.save(state, tmp_path / "a.pt")
    data.load_weights(ours, tmp_path / "a.pt")
    assert torch.equal(ours["stem"].weight, theirs["stem.weight"])


UNFIT = {
    "'module.": lambda state: {f"module.{key}": x for key, x in state.items()},
    "1 .*stem.bias": lambda state: {key: x for key, x in state.items() if key != "stem.bias"},
    "1 .*bias": lambda state: state | {"stem.bias": [0.0]},
    "1 .*stem.weight": lambda state: state | {"stem.weight": torch.ones(4, 3, 5, 5)},
}


@pytest.mark.parametrize("named", UNFIT)
def test_a_prefix_and_a_missing_or_unfit_tensor_are_refused(tmp_path, named):
    path = tmp_path / "a.pt"
    torch.save(UNFIT[named](dict(network().state_dict())), path)
    assert re.search(named, refused(data.load_weights, network(), path))


FILES = {
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n",
    "web page": b"\n<!DOCTYPE html><html>not found</html>",
    "not a readable checkpoint": b"PK\3\4abc",
}


@pytest.mark.parametrize("what", FILES)
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_file_that_is_no_checkpoint_is_told_as_what_it_is(tmp_path, name, what):
    (tmp_path / name).write_bytes(FILES[what])
    assert re.search(f"{name}.*{what}", refused(data.read_tensors, tmp_path / name))


def test_a_checkpoint_of_other_tensors_than_were_saved_is_refused(tmp_path):
    w = torch.arange(500.0)
    torch.save({"w": w}, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(content.replace(w.numpy().tobytes(), bytes(2000)))
    assert "a.pt: damaged" in refused(data.read_tensors, tmp_path / "a.pt")


class Danger:
    def __reduce__(self):
        return os.mkdir, (os.environ["MARK"],)


def test_a_checkpoint_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    torch.save({"w": Danger()}, tmp_path / "a.pt")
    refused(data.read_tensors, tmp_path / "a.pt")
    assert not (tmp_path / "mark").exists()


def test_a_file_of_the_hub_is_downloaded_once(hub):
    hub.files["owner/repository/a.pth"] = b"weights"
    path = Path(data.download("owner/repository", "a.pth"))
    assert path.read_bytes() == b"weights"
    hub.files.clear()
    assert data.download("owner/repository", "a.pth") == str(path)


@pytest.mark.parametrize("what", ["absent", "cut short", "no network", "offline"])
def test_what_cannot_be_downloaded_is_named_with_the_reason_at_once(hub, monkeypatch, what):
    if what != "absent":
        hub.files["owner/repository/a.pth"] = b"weights"
    if what == "cut short":
        hub.sent["owner/repository/a.pth"] = b"we"
    if what == "no network":
        hub.shutdown()
        hub.server_close()
    if what == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    reasons = {
        "absent": "404",
        "cut short": "size 7 ",
        "no network": "refused",
        "offline": "OFFLINE",
    }
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits"))
    said = refused(data.download, "owner/repository", "a.pth")
    assert re.search(f"a.pth of owner/repository, .*--weights FILE.*{reasons[what]}", said)
