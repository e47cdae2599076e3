"""How images, masks and checkpoints are read, what is refused, and the cache of decoded images."""

import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import trees
from PIL import Image, ImageFilter
from torch import nn
from torchvision import transforms
from trees import SQUARE

import data

NOISE = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
RGB, GREY, RAMP = NOISE[..., :3], NOISE[..., 0], np.arange(256, dtype=np.uint8).reshape(16, 16)


def sample(image, mask=None):
    return data.Sample(str(image), int(mask is not None), "x", "x", mask and str(mask))


def read(path):
    return np.asarray(data.read_image(path)[0])


def refused(function, *args):
    """The line that says why."""
    with pytest.raises(data.DataError) as error:
        function(*args)
    return str(error.value)


@pytest.fixture
def photos(tmp_path):
    """Three bitmaps, whose files are of one size."""
    return [sample(trees.image(tmp_path / f"{i}.bmp", i)) for i in range(3)]


# ------------------------------------------------------------------------------------------- images


def save_png16(path):
    """RGB of 16 bits a channel, which Pillow does not write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in RGB)
    header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, part in (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""):
        content += struct.pack(">I", len(part)) + kind + part
        content += struct.pack(">I", zlib.crc32(kind + part))
    path.write_bytes(content)


def save_tiff16(path):
    """Pillow's RGB of 8 bits, but half as high and of 16 bits by its header."""
    content = Path(trees.save(path, np.zeros((32, 16, 3), np.uint8))).read_bytes()
    content = content.replace(struct.pack("<HHI", 257, 4, 1) + b" ", b"\x01\x01\4\0\1\0\0\0\x10")
    path.write_bytes(content.replace(struct.pack("<3H", 8, 8, 8), struct.pack("<3H", 16, 16, 16)))


def save_frames(path):
    first, second = Image.fromarray(RGB), Image.fromarray(RGB[::-1])
    first.save(path, save_all=True, append_images=[second])


REFUSED = {
    "grey16.png": lambda path: trees.save(path, GREY.astype("u2") * 16),
    "rgb16.png": save_png16,
    "grey16.tif": lambda path: trees.save(path, GREY.astype("u2")),
    "rgb16.tif": save_tiff16,
    "int32.tif": lambda path: trees.save(path, GREY.astype("i4")),
    "float.tif": lambda path: trees.save(path, GREY.astype("f4")),
    "pages.tif": save_frames,
    "animation.png": save_frames,
    "animation.webp": save_frames,
    "photo.gif": lambda path: trees.save(path, GREY),
    "empty.png": lambda path: path.write_bytes(b""),
    "text.png": lambda path: path.write_bytes(b"no image" * 99),
    "cut.png": lambda path: path.write_bytes(Path(trees.image(path)).read_bytes()[:900]),
    "missing.png": lambda path: None,
    "folder.png": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_all_but_8_bits_a_channel_and_one_frame_is_refused_by_name(tmp_path, name):
    path = tmp_path / name
    REFUSED[name](path)
    assert str(path) in refused(data.read_image, path)
    assert str(path) in refused(data.read_mask, sample(trees.image(tmp_path / "a.png"), path))


def test_of_a_phones_photo_of_two_frames_the_first_counts(tmp_path):
    black, other = Image.new("RGB", (16, 16)), Image.fromarray(RGB)
    black.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[other])
    assert read(tmp_path / "a.jpg").max() == 0


PALETTE = Image.fromarray(RAMP // 16)  # 16 colours, one a row
PALETTE.putpalette(RGB[:, 0].tobytes())
PLAIN = {
    "rgb.png": (Image.fromarray(RGB), RGB),
    "grey.png": (Image.fromarray(GREY), np.dstack([GREY] * 3)),
    "bit.png": (Image.fromarray(GREY > 99), np.dstack([GREY > 99] * 3) * 255),
    "palette.png": (PALETTE, RGB[:, 0][RAMP // 16]),
    "grey_alpha.png": (Image.fromarray(NOISE[..., :2]), np.dstack([GREY] * 3)),
    "rgb_alpha.png": (Image.fromarray(NOISE), RGB),
    "cmyk.tif": (Image.new("CMYK", (9, 9), (255, 0, 0, 0)), np.full((9, 9, 3), (0, 255, 255))),
}


@pytest.mark.parametrize("name", PLAIN)
def test_images_of_8_bits_are_read_as_rgb_and_their_alpha_is_dropped(tmp_path, name):
    PLAIN[name][0].save(tmp_path / name)
    np.testing.assert_array_equal(read(tmp_path / name), PLAIN[name][1])


def test_images_with_transparent_pixels_are_counted_each_time(tmp_path, caplog):
    opaque = [np.dstack([RGB, GREY * 0 + 255])]
    paths = [trees.save(tmp_path / f"{i}.png", x) for i, x in enumerate(opaque + [NOISE] * 3)]
    for _ in range(2):
        data.decode([sample(path) for path in paths], 16, cache=tmp_path)
    assert len(re.findall("warning.*/1.png and 2 more", caplog.text)) == 2


UPRIGHT = np.zeros((24, 40, 3), np.uint8)  # its upper left corner is light
UPRIGHT[:8, :8] = 255
STORED = [None, *map(Image.Transpose, (0, 3, 1, 5, 2, 6, 4))]  # EXIF's orientations 1 to 8


def save_turned(path, orientation, pixels=UPRIGHT):
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(pixels)
    image = image if orientation == 1 else image.transpose(STORED[orientation - 1])
    image.save(path, exif=exif)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_and_masks_are_turned_upright(tmp_path, orientation):
    photo = save_turned(tmp_path / "a.png", orientation)
    mask = save_turned(tmp_path / "mask.png", 9 - orientation, UPRIGHT[..., 0])
    np.testing.assert_array_equal(read(photo), UPRIGHT)
    np.testing.assert_array_equal(data.read_mask(sample(photo, mask))[0], UPRIGHT[..., 0] > 0)


@pytest.mark.parametrize("size, crop", [(48, None), (48, 41), (20, 16)])
def test_images_and_masks_are_resized_and_cropped_as_torchvision_does(tmp_path, size, crop):
    photo = Image.fromarray(RGB).resize((90, 70), Image.Resampling.BICUBIC)
    mask = Image.fromarray(GREY > 180).resize((90, 70))
    found = sample(tmp_path / "a.png", tmp_path / "mask.png")
    photo.save(found.image)
    mask.save(found.mask)
    centre = transforms.CenterCrop(crop or size)
    nearest = transforms.Resize((size, size), transforms.InterpolationMode.NEAREST)
    expected = centre(transforms.Resize((size, size))(photo))
    np.testing.assert_array_equal(data.decode([found], size, crop, tmp_path)[0], expected)
    masks = data.decode_masks([found], size, crop)
    np.testing.assert_array_equal(masks[0], centre(nearest(mask)))
    assert data.decode([], size, crop, tmp_path).shape == (0, *masks[0].shape, 3)


def test_images_are_found_once_each_and_other_files_and_earlier_pictures_are_told(tmp_path, caplog):
    for name in "a/2.png", "a/deep/1.jpg", "a/.hidden.png", "b.bmp", "a/new/00000-good-2.png":
        trees.image(tmp_path / name)
    for name in "a/Thumbs.db", "a/IMG_1.HEIC", "a/new/predictions.csv":
        (tmp_path / name).touch()
    found = data.find_images([tmp_path / "a", tmp_path / "b.bmp", tmp_path / "a/2.png"])
    assert found == [f"{tmp_path}/{name}" for name in ("a/2.png", "a/deep/1.jpg", "b.bmp")]
    assert re.search("not used: .*/IMG_1.HEIC and 2 more", caplog.text)


@pytest.mark.parametrize("name", ["missing.png", "empty", "IMG_1.HEIC"])
def test_a_path_without_an_image_is_named(tmp_path, photos, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "IMG_1.HEIC").touch()
    assert f"{tmp_path}/{name}" in refused(data.find_images, [tmp_path, tmp_path / name])


# -------------------------------------------------------------------------------------------- masks


def decode_masks(tmp_path, *masks, size=32):
    """Masks of images of 32 x 32, saved as mask0.png .. and decoded."""
    photo = trees.image(tmp_path / "photo.png")
    paths = [trees.save(tmp_path / f"mask{i}.png", mask) for i, mask in enumerate(masks)]
    return data.decode_masks([sample(photo, path) for path in paths], size)


def values(*values):
    return np.resize(np.array(values, np.uint8), (32, 32)) * SQUARE


SMOOTH = np.asarray(Image.fromarray(SQUARE).convert("L").filter(ImageFilter.GaussianBlur(2)))
MASKS = {
    "0/1": (values(1), SQUARE),
    "0/255": (values(255), SQUARE),
    "class ids": (values(*range(1, 13)), SQUARE),
    "236 to 255": (values(*range(236, 256)), SQUARE),
    "five greys": (values(51, 102, 153, 204, 255), SQUARE),
    "one channel": (np.dstack([values(i) for i in (0, 0, 1)]), SQUARE),
    "many greys": (SMOOTH // 4 * 3, SMOOTH // 4 * 3 >= SMOOTH.max() // 4 * 3 / 2),
}


@pytest.mark.parametrize("kind", MASKS)
def test_any_value_is_defect_and_of_many_greys_half_of_the_maximum_and_more(tmp_path, kind):
    np.testing.assert_array_equal(decode_masks(tmp_path, MASKS[kind][0])[0], MASKS[kind][1])


ODD = {
    "plain": (SQUARE, None),
    "many greys": (SMOOTH, "note"),
    "inverted": (~SQUARE, "warning"),
    "inverted, many greys": (255 - SMOOTH, "warning"),
    "empty": (SQUARE & False, "warning"),
    "vanishes at 10 pixels": (np.arange(1024).reshape(32, 32) == 0, "warning"),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_masks_are_named_and_counted(tmp_path, caplog, kind):
    mask, word = ODD[kind]
    decode_masks(tmp_path, SQUARE, mask, mask, size=10)
    assert re.search(f"{word}: .*mask1.png and 1 more" if word else "^$", caplog.text)


FITS = {(24, 40): True, (48, 80): True, (11, 19): True}  # the last but for rounding
FITS |= {(40, 24): False, (24, 24): False, (48, 40): False, (1, 40): False}


@pytest.mark.parametrize("shape", FITS)
def test_a_turned_mask_or_one_of_another_aspect_is_refused_with_both_sizes(tmp_path, shape):
    photo = trees.save(tmp_path / "photo.png", UPRIGHT)
    mask = trees.save(tmp_path / "mask.png", np.ones(shape, bool))
    if FITS[shape]:
        assert data.read_mask(sample(photo, mask))[0].shape == shape
    else:
        line = refused(data.read_mask, sample(photo, mask))
        assert re.search(f"mask.png.*{shape[1]} x {shape[0]}.*40 x 24", line)


# --------------------------------------------------------------------------------- cache and copies


def test_the_cache_is_used_again_without_reading_an_image(tmp_path, photos):
    first = data.decode(photos, 16, None, tmp_path / "c").copy()
    before = os.stat(photos[1].image)
    Path(photos[1].image).write_bytes(bytes(before.st_size))
    os.utime(photos[1].image, ns=(before.st_atime_ns, before.st_mtime_ns))
    np.testing.assert_array_equal(data.decode(photos, 16, None, tmp_path / "c"), first)


@pytest.mark.parametrize("change", ["time", "size", "order", "resolution", "crop", "file", "own"])
def test_after_any_change_the_images_are_decoded_anew(tmp_path, photos, change):
    photos.append(data.Sample("toy", 0, "x", "x", pixels=RGB))
    data.decode(photos, 16, None, tmp_path / "c")
    before = os.stat(photos[1].image)
    if change in ("time", "size"):
        trees.image(photos[1].image, 9, 40 if change == "size" else 32)
        later = before.st_mtime_ns + (change == "time")
        os.utime(photos[1].image, ns=(later, later))
    if change == "own":
        photos[3] = photos[3]._replace(pixels=RGB[::-1])
    photos = photos[::-1] if change == "order" else photos[: 2 if change == "file" else 4]
    size, crop = {"resolution": (18, None), "crop": (16, 12)}.get(change, (16, None))
    expected = data.decode(photos, size, crop, tmp_path / "other")
    np.testing.assert_array_equal(data.decode(photos, size, crop, tmp_path / "c"), expected)


def test_a_damaged_image_is_named_and_leaves_no_half_written_cache(tmp_path, photos):
    Path(photos[1].image).write_bytes(b"")
    assert photos[1].image in refused(data.decode, photos, 16, None, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_cache_is_named(tmp_path, photos):
    data.decode(photos, 16, None, tmp_path / "c")
    (path,) = (tmp_path / "c").iterdir()
    path.write_bytes(path.read_bytes()[:300])
    assert str(path) in refused(data.decode, photos, 16, None, tmp_path / "c")


@pytest.mark.parametrize("split", [2, 1])
def test_copies_in_train_and_test_or_twice_in_test_are_named_both(tmp_path, photos, caplog, split):
    pixels = data.decode(photos, 16, None, tmp_path)
    data.warn_of_copies(photos[:split], pixels[:split], photos[split:], pixels[split:])
    assert caplog.text == ""
    test = [*photos[split:], sample("copy.bmp")]
    data.warn_of_copies(photos[:split], pixels[:split], test, [*pixels[split:], pixels[1]])
    assert re.search("warning.*copy.bmp.*/1.bmp", caplog.text)


def test_what_fails_while_it_is_written_leaves_the_old_file_alone(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(data.DataError), data.written(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise OSError("full")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_an_error_is_one_line_that_can_be_printed():
    assert b"\n" not in str(data.DataError("a\nb\udcff")).encode()


# -------------------------------------------------------------------------------------- checkpoints


def network():
    """Of the keys stem.weight, stem.bias and stages.0.*."""
    return nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3), "stages": nn.ModuleList([nn.BatchNorm2d(4)])})


def saved(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    return tmp_path / "a.pt"


FORMS = {
    "plain": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3},
    "state_dict": lambda state: {"state_dict": state},
    "timm's names": lambda state: {k.replace("stages.0", "stages_0"): x for k, x in state.items()},
    "more than needed": lambda state: state | {"head.weight": torch.ones(2)},
    "without batches": lambda state: {k: x for k, x in state.items() if "batches" not in k},
    "safetensors": lambda state: state,
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_found_by_name(tmp_path, form):
    theirs, ours = network(), network()
    path = saved(tmp_path, FORMS[form](theirs.state_dict()))
    if form == "safetensors":
        path = path.with_suffix(".safetensors")
        safetensors.torch.save_file(theirs.state_dict(), path)
    data.load_weights(ours, path)
    assert torch.equal(ours["stem"].weight, theirs["stem"].weight)


UNFIT = {
    "module.stem.weight": lambda state: {f"module.{key}": x for key, x in state.items()},
    "backbone.stem": lambda state: {f"backbone.{key}": x for key, x in state.items()},
    "1 .*stem.bias": lambda state: {key: x for key, x in state.items() if key != "stem.bias"},
    "1 .*stem.weight": lambda state: state | {"stem.weight": torch.ones(4, 3, 5, 5)},
    "stem": lambda state: {},
}


@pytest.mark.parametrize("named", UNFIT)
def test_a_prefix_and_a_missing_or_unfit_tensor_are_refused_in_a_short_line(tmp_path, named):
    path = saved(tmp_path, UNFIT[named](network().state_dict()))
    line = refused(data.load_weights, network(), path).removeprefix(f"{path}: ")
    assert re.search(named, line) and len(line) < 160


FILES = {
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n",
    "web page": b"\n<!DOCTYPE html><html>not found</html>",
    "not a readable checkpoint": b"abc",
}


@pytest.mark.parametrize("what", FILES)
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_file_that_is_no_checkpoint_is_told_as_what_it_is(tmp_path, name, what):
    (tmp_path / name).write_bytes(FILES[what])
    assert re.search(f"{name}.*{what}", refused(data.read_tensors, tmp_path / name))


class Danger:
    def __reduce__(self):
        return os.mkdir, (os.environ["MARK"],)


def test_a_checkpoint_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    refused(data.read_tensors, saved(tmp_path, {"w": Danger()}))
    assert not (tmp_path / "mark").exists()
