"""The readers of image files against the formats' own definitions, and what they refuse."""

import gzip
import hashlib
import io
import struct

import numpy as np
import pytest
import torch

from data import MNIST, DataError, dequantize, digest, load_images, read_idx


def idx(images):
    """Two zeros, 8 for bytes, the number of axes, the length of each, then the elements."""
    return struct.pack(f">HBB{images.ndim}I", 0, 8, images.ndim, *images.shape) + np.asarray(images).tobytes()


def small_data_set(directory, n=300, test=40):
    """A data set in MNIST's format, of images of 4 × 4 pixels."""
    for name, count in (("train", n), ("t10k", test)):
        data = gzip.compress(idx(np.arange(count * 16, dtype=np.uint8).reshape(count, 4, 4)))
        (directory / f"{name}-images-idx3-ubyte.gz").write_bytes(data)
    return directory


def small_cifar(directory):
    """CIFAR-10's binary version, twelve images a file: label, then red, green and blue, each row by row."""
    images = torch.randint(0, 256, (72, 3, 32, 32), dtype=torch.uint8)
    for name, batch in zip([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"], images.split(12)):
        (directory / name).write_bytes(b"".join(b"\x07" + image.numpy().tobytes() for image in batch))
    return images


def test_mnist_is_what_everybody_knows_it_to_be():
    train, validation, test = load_images(MNIST)
    assert train.shape == (50_000, 1, 28, 28) and validation.shape == test.shape == (10_000, 1, 28, 28)
    counts = torch.cat([train, validation]).flatten().bincount(minlength=256).double()
    pixels, p = torch.arange(256) / 255, counts / counts.sum()
    mean = (p * pixels).sum()
    assert abs(mean - 0.1307) < 5e-5 and abs((p * (pixels - mean) ** 2).sum().sqrt() - 0.3081) < 5e-5  # well known
    assert read_idx(MNIST / "t10k-labels-idx1-ubyte.gz")[:5].tolist() == [7, 2, 1, 0, 4]


def test_every_bundled_file_has_the_checksum_that_stands_beside_it():
    listed = dict(line.split()[::-1] for line in (MNIST / "SHA256SUMS").read_text().splitlines())
    assert listed == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in MNIST.glob("*.gz")}


def test_a_file_is_read_gzipped_or_not_and_split(tmp_path):
    images = torch.arange(24, dtype=torch.uint8).view(2, 3, 4)
    for name, data in (("a.gz", gzip.compress(idx(images))), ("a", idx(images))):
        (tmp_path / name).write_bytes(data)
        assert torch.equal(read_idx(tmp_path / name), images)
    assert [len(split) for split in load_images(small_data_set(tmp_path, n=30, test=7))] == [25, 5, 7]


def test_cifar_10_is_read_as_its_home_page_says(tmp_path):
    images = small_cifar(tmp_path)
    splits = load_images(tmp_path)
    assert [len(split) for split in splits] == [50, 10, 12] and torch.equal(torch.cat(splits), images)


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_a_numpy_file_of_bytes_is_read_grey_or_in_colour(tmp_path, channels):
    images = np.random.default_rng(0).integers(0, 256, (70, 4, 6, *channels), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    splits = load_images(tmp_path / "images.npy")
    assert [len(split) for split in splits] == [50, 10, 10]
    assert (torch.cat(splits).permute(0, 2, 3, 1).numpy() == images.reshape(70, 4, 6, -1)).all()


def test_a_data_set_is_known_by_every_pixel_of_its_three_splits(tmp_path):
    splits = load_images(small_data_set(tmp_path))
    found = {digest(splits)}
    for split in splits:
        split[-1, -1, -1, -1] += 1
        found.add(digest(splits))
    assert len(found) == 4


def test_dequantisation_is_uniform_within_each_unit_cube():
    images = torch.tensor([[0, 7, 255]], dtype=torch.uint8).repeat(20_000, 1)
    u = dequantize(images) - images
    assert u.min() >= 0 and u.max() <= 1 and u.dtype == torch.float32
    assert (u.mean(0) - 0.5).abs().max() < 0.01 and (u.var(0) - 1 / 12).abs().max() < 0.003


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


GREY = np.zeros((300, 4, 4), np.uint8)
ZIPPED, SAVED = gzip.compress(idx(GREY)), npy(GREY)
BAD = [  # a file in place of one of a good data set: its name, its bytes (None: no file), a fact of the message
    *(("train-images-idx3-ubyte.gz", data, fact) for data, fact in [
        (None, "no train-images-idx3-ubyte.gz"), (ZIPPED[:len(ZIPPED) // 2], "train-images"),
        (b"<html>404</html>", "train-images"), (ZIPPED[:50] + bytes([ZIPPED[50] ^ 1]) + ZIPPED[51:], "train-images"),
        *((gzip.compress(data), fact) for data, fact in [
            (b"\0\0\x0d\x03" + bytes(12), "train-images.* not an IDX file"), (b"\0\0\x08", "not an IDX file"),
            (b"\0\0\x08" + bytes([70]) + 70 * b"\0\0\0\x01" + b"\0", "not an IDX file"),
            (idx(GREY)[:-1], "4799 bytes .* 4800"), (idx(GREY[:, 0, 0]), r"\(300, 1\)"),
            (idx(GREY[:, :0]), r"1, 0, 4\)"),
            (idx(GREY[:, :3]), r"1, 3, 4\).* 1, 4, 4\)"), (idx(GREY[:5]), r"\(5, 1, 4, 4\)")])]),
    ("t10k-images-idx3-ubyte.gz", gzip.compress(idx(GREY[:0])), r"\(0, 1, 4, 4\)"),
    ("data_batch_3.bin", None, "data_batch_3.bin"), ("data_batch_3.bin", b"", "data_batch_3.bin holds 0 bytes"),
    ("data_batch_3.bin", bytes(36_875), "data_batch_3.bin holds 36875 bytes"),
    *(("images.npy", data, fact) for data, fact in [
        (None, "images.npy"), (b"no array", "images.npy"), (SAVED.replace(b"}", b" "), "images.npy"),
        (SAVED.replace(b"(300, 4, 4), }" + 9 * b" ", b"(30000000000, 4, 4), } "), "images.npy"),
        (npy(np.array([np.zeros((2, 2)), np.zeros(3)], object)), "images.npy"), (npy(GREY / 2), "float64"),
        (npy(GREY[:, 0, 0]), r"\(300,\)"), (npy(GREY.reshape(75, 4, 4, 4)[..., :2]), "channels"),
        (npy(GREY.reshape(30, 2, 5, 16)), "channels"), (npy(GREY[:, :0]), r"1, 0, 4\)"), (npy(GREY[:5]), "1, 4, 4")])]


@pytest.mark.parametrize("name, data, fact", BAD, ids=range(len(BAD)))
def test_a_bad_file_is_refused_by_its_name_or_with_what_is_wrong(tmp_path, name, data, fact):
    small_cifar(tmp_path) if name.endswith(".bin") else small_data_set(tmp_path)
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError, match=fact):
        load_images(path if name == "images.npy" else tmp_path)


def test_arrays_that_are_not_of_images_are_refused_with_their_shapes(tmp_path):
    for name in ("train", "t10k"):
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(idx(GREY[:, 0, 0]))
    with pytest.raises(DataError, match=r"\(300, 1\)"):
        load_images(tmp_path)
