"""The IDX reader against the format's own definition, and everything that it refuses."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from data import DataError, dequantize, digest, load_images, read_idx

MNIST = Path(__file__).parent.parent / "mnist"


def write_idx(path, images):
    header = struct.pack(">HBB", 0, 8, images.dim()) + struct.pack(f">{images.dim()}I", *images.shape)
    data = header + images.numpy().tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def small_data_set(directory, n=300, test=40, size=4):
    """A data set in MNIST's format: each image a random shade with noise."""
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", n), ("t10k", test)):
        shade = torch.randint(0, 200, (count, 1, 1), generator=generator)
        images = (shade + torch.randint(0, 56, (count, size, size), generator=generator)).to(torch.uint8)
        write_idx(directory / f"{name}-images-idx3-ubyte.gz", images)
    return directory


def one_pixel_brighter(directory):
    """The same data set but for the last pixel of the last test image."""
    path = small_data_set(directory) / "t10k-images-idx3-ubyte.gz"
    images = read_idx(path)
    images[-1, -1, -1] += 1
    write_idx(path, images)
    return directory


def test_a_data_set_is_known_by_every_pixel_of_its_three_splits(tmp_path):
    splits = load_images(small_data_set(tmp_path))
    found = {digest(splits)}
    for split in splits:
        split[-1, -1, -1, -1] += 1
        found.add(digest(splits))
    assert len(found) == 4


def test_mnist_is_what_everybody_knows_it_to_be():
    train, validation, test = load_images(MNIST)
    assert train.shape == (50_000, 1, 28, 28) and validation.shape == test.shape == (10_000, 1, 28, 28)
    assert train.dtype == torch.uint8
    pixels = torch.cat([train, validation]).double() / 255
    assert abs(pixels.mean() - 0.1307) < 5e-5 and abs(pixels.std() - 0.3081) < 5e-5  # the figures in many a script
    assert read_idx(MNIST / "t10k-labels-idx1-ubyte.gz")[:5].tolist() == [7, 2, 1, 0, 4]


def test_a_file_is_read_gzipped_or_not(tmp_path):
    images = torch.arange(24, dtype=torch.uint8).view(2, 3, 4)
    for name in ("a.gz", "a"):
        write_idx(tmp_path / name, images)
        assert torch.equal(read_idx(tmp_path / name), images)


def test_any_data_set_in_the_format_is_taken(tmp_path):
    train, validation, test = load_images(small_data_set(tmp_path, n=30, test=7))
    assert (len(train), len(validation), len(test)) == (25, 5, 7)


def damage(directory, kind):
    path = directory / "train-images-idx3-ubyte.gz"
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "not gzip":
        path.write_bytes(b"<html>404</html>")
    elif kind == "not idx":
        path.write_bytes(gzip.compress(b"\x00\x00\x0d\x03" + bytes(12)))
    elif kind == "short":
        path.write_bytes(gzip.compress(gzip.decompress(data)[:-1]))
    elif kind == "flipped":  # gzip has a checksum
        path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    elif kind == "stub":
        path.write_bytes(gzip.compress(b"\0\0\x08"))
    elif kind == "many axes":
        path.write_bytes(gzip.compress(b"\0\0\x08" + bytes([70]) + 70 * b"\0\0\0\x01" + b"\0"))
    elif kind == "labels":
        write_idx(path, torch.zeros(300, dtype=torch.uint8))
    elif kind == "no pixels":
        write_idx(path, torch.zeros(300, 0, 4, dtype=torch.uint8))
    elif kind == "other size":
        write_idx(path, torch.zeros(300, 5, 5, dtype=torch.uint8))


@pytest.mark.parametrize("kind, message", [
    ("missing", "no train-images-idx3-ubyte.gz"), ("truncated", "cannot read .*train-images"),
    ("not gzip", "cannot read .*train-images"), ("not idx", "not an IDX file"),
    ("short", "4799 bytes of data, its header promises 4800"), ("flipped", "cannot read .*train-images"),
    ("stub", "not an IDX file"), ("many axes", "not an IDX file"), ("labels", "1 axes"),
    ("no pixels", r"holds images without pixels: their shape is \(1, 0, 4\)"),
    ("other size", r"\(1, 5, 5\), test images \(1, 4, 4\)")])
def test_a_bad_file_is_named_with_what_was_expected(tmp_path, kind, message):
    damage(small_data_set(tmp_path), kind)
    with pytest.raises(DataError, match=message):
        load_images(tmp_path)


def test_too_few_images_for_the_validation_split(tmp_path):
    with pytest.raises(DataError, match="too few"):
        load_images(small_data_set(tmp_path, n=5))


def test_every_bundled_file_has_the_checksum_that_stands_beside_it():
    listed = dict(line.split()[::-1] for line in (MNIST / "SHA256SUMS").read_text().splitlines())
    assert listed == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in MNIST.glob("*.gz")}


def test_dequantisation_is_uniform_within_each_unit_cube():
    images = torch.tensor([[0, 7, 255]], dtype=torch.uint8).repeat(20_000, 1)
    u = dequantize(images) - images
    assert u.min() >= 0 and u.max() <= 1 and u.dtype == torch.float32
    assert (u.mean(0) - 0.5).abs().max() < 0.01 and (u.var(0) - 1 / 12).abs().max() < 0.003


# ---- Other formats ---------------------------------------------------------------------------------------------------

def write_cifar(directory, per_batch=12):
    """CIFAR-10's binary version with few images: label, then red, green and blue, each row by row.   -> uint8 (n, …)"""
    images = torch.randint(0, 256, (6 * per_batch, 3, 32, 32), dtype=torch.uint8)
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for name, batch in zip(names, images.split(per_batch)):
        (directory / name).write_bytes(b"".join(b"\x07" + image.numpy().tobytes() for image in batch))
    return images


def test_cifar_10_is_read_as_its_home_page_says(tmp_path):
    images = write_cifar(tmp_path)
    splits = load_images(tmp_path)
    assert [len(split) for split in splits] == [50, 10, 12] and torch.equal(torch.cat(splits), images)


@pytest.mark.parametrize("kind, message", [
    ("missing", "cannot read .*data_batch_3.bin.*CIFAR-10 has data_batch_1 … 5.bin and test_batch.bin"),
    ("short", "data_batch_3.bin holds 36875 bytes, no multiple of 3,073"), ("empty", "holds 0 bytes")])
def test_a_bad_batch_of_cifar_10_is_named(tmp_path, kind, message):
    write_cifar(tmp_path)
    path = tmp_path / "data_batch_3.bin"
    data = path.read_bytes()
    path.unlink()
    if kind != "missing":
        path.write_bytes(data[:-1] if kind == "short" else b"")
    with pytest.raises(DataError, match=message):
        load_images(tmp_path)


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_a_numpy_file_of_bytes_is_read_grey_or_in_colour(tmp_path, channels):
    images = np.random.default_rng(0).integers(0, 256, (70, 4, 6, *channels), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    splits = load_images(tmp_path / "images.npy")
    assert [len(split) for split in splits] == [50, 10, 10]
    together = torch.cat(splits).permute(0, 2, 3, 1).numpy()
    assert (together == images.reshape(70, 4, 6, -1)).all()


@pytest.mark.parametrize("make, message", [
    (lambda: np.zeros((70, 4, 4)), "holds float64, not bytes: save images of 0 … 255 as uint8"),
    (lambda: np.zeros(70, np.uint8), r"has the shape \(70,\): images are"),
    (lambda: np.zeros((70, 3, 32, 32), np.uint8), r"1, 3 or 4 channels C"),
    (lambda: np.zeros((70, 4, 4, 2), np.uint8), r"1, 3 or 4 channels C"),
    (lambda: np.zeros((70, 0, 4), np.uint8), "images without pixels"),
    (lambda: np.zeros((5, 4, 4), np.uint8), "too few"),
    (lambda: np.array([np.zeros((2, 2)), np.zeros(3)], object), "one array of images of one shape")])
def test_a_bad_numpy_file_is_named_with_what_was_expected(tmp_path, make, message):
    np.save(tmp_path / "images.npy", make())
    with pytest.raises(DataError, match=message):
        load_images(tmp_path / "images.npy")


def test_what_is_no_numpy_file_or_missing_is_named(tmp_path):
    (tmp_path / "images.npy").write_bytes(b"no array")
    np.savez(tmp_path / "several", a=np.zeros(3, np.uint8))
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    np.save(tmp_path / "whole.npy", np.zeros((70, 4, 4), np.uint8))
    whole = (tmp_path / "whole.npy").read_bytes()
    (tmp_path / "unclosed.npy").write_bytes(whole.replace(b"}", b" "))
    (tmp_path / "huge.npy").write_bytes(whole.replace(b"(70, 4, 4), }" + 9 * b" ", b"(70000000000, 4, 4), }"))
    for name in ("images.npy", "missing.npy", "several.npy", "unclosed.npy", "huge.npy"):
        with pytest.raises(DataError, match=f"cannot read .*{name}"):
            load_images(tmp_path / name)
