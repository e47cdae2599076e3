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


# ------------------------------------------------------------------------------------------- images


def save_png16(path, pixels):
    """A PNG of 16 bits a channel, which Pillow writes of grey pixels only."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, part in (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""):
        content += struct.pack(">I", len(part)) + kind + part
        content += struct.pack(">I", zlib.crc32(kind + part))
    path.write_bytes(content)


def save_patched(path, pixels, *patches):
    """A TIFF as Pillow writes it, but for some bytes of its header."""
    content = Path(trees.save(path, pixels)).read_bytes()
    for old, new in patches:
        assert content.count(old) == 1
        content = content.replace(old, new)
    path.write_bytes(content)


def save_frames(path):
    first, second = Image.fromarray(RGB), Image.fromarray(RGB[::-1])
    first.save(path, save_all=True, append_images=[second])


WHITE_IS_ZERO = struct.pack("<HHIH", 262, 3, 1, 1), struct.pack("<HHIH", 262, 3, 1, 0)
HALF_THE_HEIGHT = struct.pack("<HHIH", 257, 4, 1, 32), struct.pack("<HHIH", 257, 4, 1, 16)
TWICE_THE_BITS = struct.pack("<3H", 8, 8, 8), struct.pack("<3H", 16, 16, 16)
ZEROS = np.zeros((32, 16, 3), np.uint8)
REFUSED = {
    "grey16.png": lambda path: trees.save(path, GREY.astype("u2") * 16),
    "grey_alpha16.png": lambda path: save_png16(path, NOISE[..., :2]),
    "rgb16.png": lambda path: save_png16(path, RGB.astype("u2") * 16),
    "rgb_alpha16.png": lambda path: save_png16(path, NOISE.astype("u2") * 16),
    "grey16.tif": lambda path: trees.save(path, GREY.astype("u2")),
    "rgb16.tif": lambda path: save_patched(path, ZEROS, HALF_THE_HEIGHT, TWICE_THE_BITS),
    "int32.tif": lambda path: trees.save(path, GREY.astype("i4")),
    "float.tif": lambda path: trees.save(path, GREY.astype("f4")),
    "white_is_zero16.tif": lambda path: save_patched(path, GREY.astype("u2"), WHITE_IS_ZERO),
    "white_is_zero_float.tif": lambda path: save_patched(path, GREY.astype("f4"), WHITE_IS_ZERO),
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
    REFUSED[name](tmp_path / name)
    assert str(tmp_path / name) in refused(data.read_image, tmp_path / name)


@pytest.mark.parametrize("name", ["grey16.png", "rgb16.tif", "pages.tif"])
def test_masks_are_read_as_strictly_as_images(tmp_path, name):
    REFUSED[name](tmp_path / name)
    photo = trees.image(tmp_path / "photo.png")
    assert name in refused(data.read_mask, sample(photo, tmp_path / name))


def test_of_a_phones_photo_of_two_frames_the_first_counts(tmp_path):
    black, other = Image.new("RGB", (16, 16)), Image.fromarray(RGB)
    black.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[other])
    assert read(tmp_path / "a.jpg").max() == 0


PALETTE = Image.fromarray(RAMP // 16)  # 16 colours, one a row
PALETTE.putpalette(RGB[:, 0].tobytes())
CLEAR = PALETTE.copy()
CLEAR.info["transparency"] = bytes(16)
PLAIN = {
    "rgb.png": (Image.fromarray(RGB), RGB),
    "rgb.bmp": (Image.fromarray(RGB), RGB),
    "grey.png": (Image.fromarray(GREY), np.dstack([GREY] * 3)),
    "bit.png": (Image.fromarray(GREY > 99), np.dstack([GREY > 99] * 3) * 255),
    "palette.png": (PALETTE, RGB[:, 0][RAMP // 16]),
    "palette_alpha.png": (CLEAR, RGB[:, 0][RAMP // 16]),
    "grey_alpha.png": (Image.fromarray(NOISE[..., :2]), np.dstack([GREY] * 3)),
    "rgb_alpha.png": (Image.fromarray(NOISE), RGB),
    "cmyk.tif": (Image.new("CMYK", (9, 9), (255, 0, 0, 0)), np.full((9, 9, 3), (0, 255, 255))),
}


@pytest.mark.parametrize("name", PLAIN)
def test_images_of_8_bits_are_read_as_rgb_and_their_alpha_is_dropped(tmp_path, name):
    PLAIN[name][0].save(tmp_path / name)
    np.testing.assert_array_equal(read(tmp_path / name), PLAIN[name][1])


def test_a_tiff_of_8_bits_whose_zero_is_white_is_read_the_right_way_round(tmp_path):
    save_patched(tmp_path / "a.tif", RAMP, WHITE_IS_ZERO)
    np.testing.assert_array_equal(read(tmp_path / "a.tif")[..., 0], 255 - RAMP)


def test_images_with_transparent_pixels_are_counted(tmp_path, caplog):
    opaque = [np.dstack([RGB, GREY * 0 + 255])]
    paths = [trees.save(tmp_path / f"{i}.png", x) for i, x in enumerate(opaque + [NOISE] * 3)]
    data.decode([sample(path) for path in paths], 16, cache=tmp_path)
    assert re.search("warning.*/1.png and 2 more", caplog.text)


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
def test_images_are_turned_upright(tmp_path, orientation):
    path = save_turned(tmp_path / "a.png", orientation)
    np.testing.assert_array_equal(read(path), UPRIGHT)


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_a_mask_is_turned_as_its_image_is(tmp_path, suffix, orientation):
    photo = save_turned(tmp_path / f"a.{suffix}", orientation)
    mask = save_turned(tmp_path / "mask.png", 8, UPRIGHT[..., 0])
    np.testing.assert_array_equal(data.read_mask(sample(photo, mask))[0], UPRIGHT[..., 0] > 0)


@pytest.fixture
def photos(tmp_path):
    """Three bitmaps, whose files are of one size."""
    return [sample(trees.image(tmp_path / f"{i}.bmp", i)) for i in range(3)]


def test_of_several_damaged_images_the_first_is_named_and_how_many_more(tmp_path, photos):
    for i in 1, 2:
        Path(photos[i].image).write_bytes(b"")
    line = refused(data.decode, photos + photos[:1] + photos[1:], 16, None, tmp_path)
    assert re.search("/1.bmp.* and 3 more", line)


def test_a_damaged_image_leaves_no_half_written_cache(tmp_path, photos):
    Path(photos[2].image).write_bytes(b"")
    refused(data.decode, photos, 16, None, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("size, crop", [(48, None), (48, 41), (20, 16)])
def test_images_are_resized_and_cropped_as_torchvision_does(tmp_path, size, crop):
    photo = Image.fromarray(RGB).resize((90, 70), Image.Resampling.BICUBIC)
    photo.save(tmp_path / "a.png")
    steps = transforms.Resize((size, size)), transforms.CenterCrop(crop or size)
    decoded = data.decode([sample(tmp_path / "a.png")], size, crop, tmp_path)[0]
    np.testing.assert_array_equal(decoded, transforms.Compose(steps)(photo))


def test_images_are_found_in_folders_and_by_name_once_each(tmp_path):
    for name in "b/2.png", "b/deep/1.JPG", "b/.hidden.png", "c.bmp":
        trees.image(tmp_path / name)
    (tmp_path / "b/notes.txt").touch()
    found = data.find_images([tmp_path / "b", tmp_path / "c.bmp", tmp_path / "b/2.png"])
    assert found == [f"{tmp_path}/{name}" for name in ("b/2.png", "b/deep/1.JPG", "c.bmp")]


@pytest.mark.parametrize("name", ["missing.png", "empty"])
def test_a_path_without_an_image_is_named(tmp_path, photos, name):
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path}/{name}" in refused(data.find_images, [tmp_path, tmp_path / name])


# -------------------------------------------------------------------------------------------- masks


def decode_masks(tmp_path, *masks, size=32, crop=None):
    """Masks of images of 32 x 32, saved as mask0.png .. and decoded."""
    photo = trees.image(tmp_path / "photo.png")
    paths = [trees.save(tmp_path / f"mask{i}.png", mask) for i, mask in enumerate(masks)]
    return data.decode_masks([sample(photo, path) for path in paths], size, crop)


SMOOTH = np.asarray(Image.fromarray(SQUARE).convert("L").filter(ImageFilter.GaussianBlur(2)))
MASKS = {
    "0/1": (SQUARE.astype("u1"), SQUARE),
    "0/255": (SQUARE * np.uint8(255), SQUARE),
    "class ids": (np.resize(np.arange(1, 13, dtype="u1"), (32, 32)) * SQUARE, SQUARE),
    "236 to 255": (np.resize(np.arange(236, 256).astype("u1"), (32, 32)) * SQUARE, SQUARE),
    "five greys": (np.resize(np.arange(51, 256, 51).astype("u1"), (32, 32)) * SQUARE, SQUARE),
    "one channel": (np.dstack([SQUARE * np.uint8(i) for i in (0, 0, 1)]), SQUARE),
    "many greys": (SMOOTH // 4 * 3, SMOOTH // 4 * 3 >= SMOOTH.max() // 4 * 3 / 2),
}


@pytest.mark.parametrize("kind", MASKS)
def test_any_value_is_defect_and_of_many_greys_half_of_the_maximum_and_more(tmp_path, kind):
    np.testing.assert_array_equal(decode_masks(tmp_path, MASKS[kind][0])[0], MASKS[kind][1])


ODD = {
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
    assert re.search(f"{word}: .*mask1.png and 1 more", caplog.text)


def test_a_plain_mask_is_not_warned_of(tmp_path, caplog):
    decode_masks(tmp_path, SQUARE, size=10)
    assert caplog.text == ""


@pytest.mark.parametrize("shape", [(40, 24), (24, 24), (48, 40), (1, 40)])
def test_a_turned_mask_or_one_of_another_aspect_is_refused_with_both_sizes(tmp_path, shape):
    photo = trees.save(tmp_path / "photo.png", UPRIGHT)
    mask = trees.save(tmp_path / "mask.png", np.ones(shape, bool))
    line = refused(data.read_mask, sample(photo, mask))
    assert re.search(f"mask.png.*{shape[1]} x {shape[0]}.*40 x 24", line)


@pytest.mark.parametrize("shape", [(24, 40), (48, 80), (11, 19)])
def test_a_mask_of_the_same_aspect_fits_but_for_rounding(tmp_path, shape):
    photo = trees.save(tmp_path / "photo.png", UPRIGHT)
    mask = trees.save(tmp_path / "mask.png", np.ones(shape, bool))
    assert data.read_mask(sample(photo, mask))[0].shape == shape


@pytest.mark.parametrize("size, crop", [(20, None), (20, 15), (64, 50)])
def test_masks_are_resized_nearest_and_cropped_as_torchvision_does(tmp_path, size, crop):
    mask = GREY.repeat(2, 0).repeat(2, 1) > 180
    nearest = transforms.Resize((size, size), transforms.InterpolationMode.NEAREST)
    expected = transforms.CenterCrop(crop or size)(nearest(Image.fromarray(mask)))
    np.testing.assert_array_equal(decode_masks(tmp_path, mask, size=size, crop=crop)[0], expected)


# --------------------------------------------------------------------------------- cache and copies


def test_the_cache_is_used_again_without_reading_an_image(tmp_path, photos):
    first = data.decode(photos, 16, None, tmp_path / "c").copy()
    before = os.stat(photos[1].image)
    Path(photos[1].image).write_bytes(bytes(before.st_size))
    os.utime(photos[1].image, ns=(before.st_atime_ns, before.st_mtime_ns))
    np.testing.assert_array_equal(data.decode(photos, 16, None, tmp_path / "c"), first)


@pytest.mark.parametrize("change", ["time", "size", "order", "resolution", "crop", "file"])
def test_after_any_change_the_images_are_decoded_anew(tmp_path, photos, change):
    data.decode(photos, 16, None, tmp_path / "c")
    before = os.stat(photos[1].image)
    if change in ("time", "size"):
        trees.image(photos[1].image, 9, 40 if change == "size" else 32)
        later = before.st_mtime_ns + (change == "time")
        os.utime(photos[1].image, ns=(later, later))
    photos = photos[::-1] if change == "order" else photos[: 2 if change == "file" else 3]
    size, crop = {"resolution": (18, None), "crop": (16, 12)}.get(change, (16, None))
    expected = data.decode(photos, size, crop, tmp_path / "other")
    np.testing.assert_array_equal(data.decode(photos, size, crop, tmp_path / "c"), expected)


def test_a_damaged_cache_is_named(tmp_path, photos):
    data.decode(photos, 16, None, tmp_path / "c")
    (path,) = (tmp_path / "c").iterdir()
    path.write_bytes(path.read_bytes()[:300])
    assert str(path) in refused(data.decode, photos, 16, None, tmp_path / "c")


@pytest.mark.parametrize("split", [2, 1])
def test_copies_in_train_and_test_or_twice_in_test_are_named_both(tmp_path, photos, caplog, split):
    copy = tmp_path / "copy.bmp"
    copy.write_bytes(Path(photos[1].image).read_bytes())
    train, test = photos[:split], [*photos[split:], sample(copy)]
    pixels = [data.decode(part, 16, None, tmp_path) for part in (train, test)]
    data.warn_of_copies(train, pixels[0], test, pixels[1])
    assert re.search("warning.*copy.bmp.*/1.bmp", caplog.text)


def test_different_images_are_no_copies(tmp_path, photos, caplog):
    pixels = data.decode(photos, 16, None, tmp_path)
    data.warn_of_copies(photos[:1], pixels[:1], photos[1:], pixels[1:])
    assert caplog.text == ""


def test_what_fails_while_it_is_written_leaves_the_old_file_alone(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(data.DataError), data.written(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise OSError("full")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_an_error_is_one_line_that_can_be_printed():
    assert b"\n" not in str(data.DataError("a\nb\udcff")).encode()


# -------------------------------------------------------------------------------------- checkpoints


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.stages = nn.ModuleList([nn.BatchNorm2d(4)])


def saved(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    return tmp_path / "a.pt"


FORMS = {
    "plain": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3},
    "models": lambda state: {"models": state},
    "state_dict": lambda state: {"state_dict": state},
    "model_state_dict": lambda state: {"model_state_dict": state},
    "timm's names": lambda state: {k.replace("stages.0", "stages_0"): x for k, x in state.items()},
    "more than needed": lambda state: state | {"head.weight": torch.ones(2)},
    "without batches": lambda state: {k: x for k, x in state.items() if "batches" not in k},
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_found_by_name(tmp_path, form):
    theirs, ours = Net(), Net()
    data.load_weights(ours, saved(tmp_path, FORMS[form](theirs.state_dict())))
    assert torch.equal(ours.stem.weight, theirs.stem.weight)


def test_weights_are_read_from_safetensors(tmp_path):
    theirs, ours = Net(), Net()
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "a.safetensors")
    data.load_weights(ours, tmp_path / "a.safetensors")
    assert torch.equal(ours.stem.weight, theirs.stem.weight)


UNFIT = {
    "'module": lambda state: {f"module.{key}": x for key, x in state.items()},
    "'backbone": lambda state: {f"backbone.{key}": x for key, x in state.items()},
    "stem.bias": lambda state: {key: x for key, x in state.items() if key != "stem.bias"},
    "stem.weight": lambda state: state | {"stem.weight": torch.ones(4, 3, 5, 5)},
}


@pytest.mark.parametrize("named", UNFIT)
def test_a_prefix_and_a_missing_or_unfit_tensor_are_refused_by_name(tmp_path, named):
    path = saved(tmp_path, UNFIT[named](Net().state_dict()))
    assert named in refused(data.load_weights, Net(), path)


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


@pytest.mark.parametrize("damage", ["bit", "zeros", "cut"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, damage):
    path = saved(tmp_path, {"w": torch.arange(9999.0)})
    content = bytearray(path.read_bytes())
    if damage == "zeros":
        content[8192:16384] = bytes(8192)
    content[20000] ^= damage == "bit"
    path.write_bytes(content[:30000] if damage == "cut" else content)
    assert str(path) in refused(data.read_tensors, path)


class Danger:
    def __reduce__(self):
        return os.mkdir, (os.environ["MARK"],)


def test_a_checkpoint_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    refused(data.read_tensors, saved(tmp_path, {"w": Danger()}))
    assert not (tmp_path / "mark").exists()
