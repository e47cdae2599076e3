"""How images, masks and checkpoints are read, what is refused, and the cache of decoded images."""

import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from PIL import Image, ImageFilter
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


def save_png16(path):
    """Pillow's grey of 16 bits, but a third as wide and RGB by its header."""
    content = Path(trees.save(path, np.zeros((16, 48), np.uint16))).read_bytes()
    header = b"IHDR" + struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])


def save_tiff16(path):
    """Pillow's RGB of 8 bits, but half as high and of 16 bits by its header."""
    content = Path(trees.save(path, np.zeros((32, 16, 3), np.uint8))).read_bytes()
    content = content.replace(struct.pack("<HHI", 257, 4, 1) + b" ", b"\x01\x01\4\0\1\0\0\0\x10")
    path.write_bytes(content.replace(struct.pack("<3H", 8, 8, 8), struct.pack("<3H", 16, 16, 16)))


def save_frames(path, **options):
    others = [Image.fromarray(RGB)]
    Image.new("RGB", (16, 16)).save(path, save_all=True, append_images=others, **options)


REFUSED = {
    "rgb16.png": save_png16,
    "rgb16.tif": save_tiff16,
    "float.tif": lambda path: trees.save(path, NOISE[..., 0].astype("f4")),
    "pages.tif": save_frames,
    "animation.png": save_frames,
    "cut.png": lambda path: path.write_bytes(Path(trees.image(path)).read_bytes()[:900]),
    "missing.png": lambda path: None,
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
    image = data.Sample("cifar10/test/0", 0, "x", "x", pixels=RGB)
    larger = Image.fromarray(RGB).resize((48, 48), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(data.decode([image], 48, cache=tmp_path)[0], larger)


def test_images_are_found_once_each_and_other_files_of_a_folder_are_told(tmp_path, caplog):
    for name in "a/2.png", "a/deep/1.jpg", "a/.hidden.png", "b.bmp":
        trees.image(tmp_path / name)
    for name in "a/Thumbs.db", "a/IMG_1.HEIC", "a/notes.txt", "named":
        (tmp_path / name).touch()
    asked = [tmp_path / name for name in ("a", "b.bmp", "a/2.png", "named")]
    found = data.find_images(asked)
    expected = "a/2.png", "a/deep/1.jpg", "b.bmp", "named"
    assert found == [f"{tmp_path}/{name}" for name in expected]
    assert re.search("not used: .*/IMG_1.HEIC and 1 more", caplog.text)
    assert "missing.png" in refused(data.find_images, [tmp_path / "a", tmp_path / "missing.png"])


# -------------------------------------------------------------------------------------------- masks


def values(*values):
    return np.resize(np.array(values, np.uint8), (32, 32)) * SQUARE


SMOOTH = np.asarray(Image.fromarray(SQUARE).convert("L").filter(ImageFilter.GaussianBlur(2)))
DOT = np.arange(1024).reshape(32, 32) == 0
SMALL = SMOOTH // 4 * 3  # its maximum is less than 255
MASKS = {  # the mask, what of it is defect, what is said of it at 10 pixels
    "many class ids": (values(*range(1, 13)), SQUARE, None),
    "five greys": (values(51, 102, 153, 204, 255), SQUARE, None),
    "one channel": (np.dstack([values(i) for i in (0, 0, 1)]), SQUARE, None),
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


FITS = [(24, 40), (48, 80), (11, 19)]  # the last but for rounding


@pytest.mark.parametrize("shape", [*FITS, (40, 24), (48, 40), (24, 37)])
def test_a_turned_mask_or_one_of_another_aspect_is_refused(tmp_path, shape):
    photo = trees.save(tmp_path / "photo.png", WIDE)
    found = sample(photo, trees.save(tmp_path / "mask.png", np.ones(shape, bool)))
    if shape in FITS:
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


@pytest.mark.parametrize("change", ["time", "resolution", "crop", "order"])
def test_after_any_change_the_images_are_decoded_anew(tmp_path, photos, change):
    data.decode(photos, 16, None, tmp_path / "c")
    if change == "time":
        trees.image(photos[1].image, 9)
        os.utime(photos[1].image, (1, 1))
    if change == "order":
        photos.reverse()
    size, crop = {"resolution": (18, None), "crop": (16, 12)}.get(change, (16, None))
    expected = data.decode(photos, size, crop, tmp_path / "other")
    np.testing.assert_array_equal(data.decode(photos, size, crop, tmp_path / "c"), expected)


def test_a_damaged_image_is_named_and_leaves_no_half_written_cache(tmp_path, photos):
    Path(photos[1].image).write_bytes(b"")
    assert photos[1].image in refused(data.decode, photos, 16, None, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("split", [2, 1])
def test_copies_in_train_and_test_or_twice_in_test_are_named_both(tmp_path, photos, caplog, split):
    pixels = data.decode(photos, 16, None, tmp_path)
    data.warn_of_copies(photos[:split], pixels[:split], photos[split:], pixels[split:])
    assert caplog.text == ""
    test = [*photos[split:], sample("copy.bmp")]
    data.warn_of_copies(photos[:split], pixels[:split], test, [*pixels[split:], pixels[1]])
    assert re.search("warning.*copy.bmp.*/1.bmp", caplog.text)


# -------------------------------------------------------------------------------------- checkpoints


def network():
    """Of the keys stem.weight, stem.bias and stages.0.*."""
    return nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3), "stages": nn.ModuleList([nn.BatchNorm2d(4)])})


def test_weights_are_found_by_name_in_any_order_below_model_and_in_timms_spelling(tmp_path):
    theirs, ours = network().state_dict(), network()
    renamed = {key.replace("stages.0", "stages_0"): x for key, x in reversed(theirs.items())}
    torch.save({"model": renamed | {"head.weight": torch.ones(2)}, "epoch": 3}, tmp_path / "a.pt")
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
