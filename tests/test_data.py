"""The readers of image files against the formats' own definitions, and what they refuse."""

import gzip
import hashlib
import io
import os
import signal
import struct

import numpy as np
import pytest
import torch

from data import MNIST, DataError, ImageModel, Points, augment, dequantize, digest, load_images, read_idx
from ebflow import EBFlow, cnn_flow, fc_flow
from layers import Standardize


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
    assert [len(split) for split in splits] == [48, 12, 12] and torch.equal(torch.cat(splits), images)


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
        (None, "no directory with train-images-idx3-ubyte.gz"), (ZIPPED[:len(ZIPPED) // 2], "train-images"),
        (b"<html>404</html>", "train-images"), (ZIPPED[:50] + bytes([ZIPPED[50] ^ 1]) + ZIPPED[51:], "train-images"),
        *((gzip.compress(data), fact) for data, fact in [
            (b"\0\0\x0d\x03" + bytes(12), "train-images.* not an IDX file"), (b"\0\0\x08", "not an IDX file"),
            (b"\0\0\x08" + bytes([70]) + 70 * b"\0\0\0\x01" + b"\0", "not an IDX file"),
            (idx(GREY)[:-1], r"4799 bytes .*\[300, 4, 4\]"), (idx(GREY[:, 0, 0]), r"\(300, 1\)"),
            (idx(GREY[:, :0]), r"\[300, 0, 4\]"),
            (struct.pack(">HBB4I", 0, 8, 4, 0, *3 * [2**32 - 1]), r"\[0, 4294967295, 4294967295, 4294967295\]"),
            (idx(GREY[:, :3]), r"1, 3, 4\).* 1, 4, 4\)"), (idx(GREY[:5]), r"\(5, 1, 4, 4\)")])]),
    ("t10k-images-idx3-ubyte.gz", gzip.compress(idx(GREY[:0])), r"t10k.*\[0, 4, 4\]"),
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


@pytest.mark.parametrize("name", ["images.npy", "data_batch_3.bin", "train-images-idx3-ubyte.gz", "points.csv"])
def test_a_named_pipe_is_refused_at_once(tmp_path, name):
    small_cifar(tmp_path) if name.endswith(".bin") else None
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(5)
    with pytest.raises(DataError, match=name):
        Points(tmp_path / name, 0) if name == "points.csv" else load_images(
            tmp_path / name if name == "images.npy" else tmp_path)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_a_directory_that_is_missing_is_said_to_be(tmp_path):
    with pytest.raises(DataError, match="nowhere is no directory"):
        load_images(tmp_path / "nowhere")


def test_arrays_that_are_not_of_images_are_refused_with_their_shapes(tmp_path):
    for name in ("train", "t10k"):
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(idx(GREY[:, 0, 0]))
    with pytest.raises(DataError, match=r"\(300, 1\)"):
        load_images(tmp_path)


def test_augment_mirrors_half_of_the_images_and_shifts_each_by_at_most_a_pixel_with_its_edge_repeated():
    image = torch.randint(256, (1, 3, 5, 6), dtype=torch.uint8)
    seen = augment(image.expand(9000, 3, 5, 6))
    assert seen.dtype == torch.uint8 and seen.shape == (9000, 3, 5, 6)
    padded, counts = torch.nn.functional.pad(image.float(), (1, 1, 1, 1), mode="replicate").to(torch.uint8), []
    for i in range(3):
        for j in range(3):
            shifted = padded[..., i:i + 5, j:j + 6]
            counts += [(seen == one).flatten(1).all(1).sum().item() for one in (shifted, shifted.flip(3))]
    assert sum(counts) == 9000 and all(400 < count < 600 for count in counts)  # each 500 ± 22


# ---- Bytes in, bytes out ---------------------------------------------------------------------------------------------

def models():
    """A flow of vectors and one of images (2, 4, 4), near the start of both."""
    for shape, flow in (((32,), fc_flow(32)), ((2, 4, 4), cnn_flow((2, 4, 4), 3, 1))):
        layers = [Standardize(60.0, 128.0), *flow.layers]
        for p in flow.parameters():
            p.data += 0.05 * torch.randn_like(p)
        yield ImageModel(EBFlow(layers, shape), (2, 4, 4))


def test_every_figure_of_bytes_is_that_of_the_flow_at_the_dequantised_bytes():
    images = torch.randint(256, (5, 2, 4, 4), dtype=torch.uint8).rot90(1, (2, 3))  # not contiguous
    for model in models():
        def seeded(f):
            torch.manual_seed(1)
            return f(images)

        x, flow = seeded(lambda images: dequantize(images).reshape(5, *model.flow.shape)), model.flow
        assert ((x.view(images.shape) - images - 0.5).abs() <= 0.5).all()
        for found, expected in ((model.log_prob, flow.log_prob(x)), (model.energy, flow.energy(x)), (model, flow(x)),
                                (model.score, flow.score(x).view(images.shape)),
                                (model.bits_per_dim, -flow.log_prob(x) / (32 * np.log(2)))):
            torch.testing.assert_close(seeded(found), expected)


def test_bytes_come_back_from_their_latent_variable_and_white_stays_white():
    images = torch.randint(256, (50, 2, 4, 4), dtype=torch.uint8)
    for model in models():
        back = model.inverse(model(images))
        assert back.dtype == torch.uint8 and (back != images).float().mean() < 0.001
        x = torch.full((1, *model.flow.shape), 256.0003)
        assert (model.inverse(model.flow(x)) >= 254).all() and (model.inverse(model.flow(-x)) == 0).all()
        draws = model.sample(200)
        assert draws.dtype == torch.uint8 and draws.shape == (200, 2, 4, 4)
        torch.manual_seed(0)
        x = model.flow.sample(200).view(draws.shape)
        torch.manual_seed(0)
        assert ((model.sample(200) - x.clamp(0, 255)).abs() < 1).all() and (x > 256).any()


def test_what_is_not_bytes_of_the_right_shape_is_refused():
    """Pixels in [0, 1] and whole numbers without noise have plausible log-densities, which are wrong."""
    for model in models():
        images = torch.randint(256, (3, 2, 4, 4), dtype=torch.uint8)
        for f in (model, model.log_prob, model.energy, model.bits_per_dim, model.score):
            for wrong in (images / 255, images.float(), images.long(), images > 7):
                with pytest.raises(TypeError, match="uint8"):
                    f(wrong)
            for wrong in (images.permute(0, 2, 3, 1), images[0], images.flatten(1), images[..., :3]):
                with pytest.raises(ValueError, match="2, 4, 4"):
                    f(wrong)


# ---- Points ----------------------------------------------------------------------------------------------------------

ROWS = np.random.default_rng(0).normal(size=(200, 3)) * [1, 10, 0.1] + [5, 0, 100]


def text(rows, header=""):
    return "\n".join([*[header] * bool(header), *(",".join(map(str, row)) for row in rows)]).encode()


@pytest.mark.parametrize("name, content", [("a.npy", npy(ROWS)), ("a.npy", npy(ROWS.astype(np.float32))),
                                           ("a.csv", text(ROWS)), ("a.csv", b"\xef\xbb\xbf" + text(ROWS, "x,y 2,z"))])
def test_points_are_read_split_by_the_seed_and_stand_beside_the_gaussian_of_their_rows(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    points, again, other = (Points(tmp_path / name, seed) for seed in (3, 3, 4))
    splits = [points.train, points.val, points.test]
    assert [len(rows) for rows in splits] == [160, 20, 20]
    found = torch.cat(splits)[torch.cat(splits)[:, 0].argsort()]
    np.testing.assert_allclose(found.numpy(), ROWS[ROWS[:, 0].argsort()], rtol=1e-5, atol=1e-5)
    assert torch.equal(points.test, again.test) and not torch.equal(points.test, other.test)
    assert points.identity == again.identity != other.identity
    mean, covariance = points.train.numpy().mean(0), np.cov(points.train.numpy().T)
    d = points.test.numpy() - mean
    squares = np.einsum("ni,ij,nj->n", d, np.linalg.inv(covariance), d).mean()
    nll = 0.5 * (squares + np.linalg.slogdet(2 * np.pi * covariance)[1])
    assert points.gaussian_nll == pytest.approx(nll, rel=1e-3)


def test_a_sample_of_points_is_rows_to_train_with_noise_in_units_of_each_column(tmp_path):
    np.save(tmp_path / "a.npy", ROWS)
    points = Points(tmp_path / "a.npy", 0)
    bare, noisy = points.sample(5000, "cpu", 0.0), points.sample(100_000, "cpu", 2.0)
    assert {*map(tuple, bare.tolist())} == {*map(tuple, points.train.tolist())}
    torch.testing.assert_close(noisy.std(0) / points.std.float(), torch.full((3,), 5**0.5), rtol=0.03, atol=0)


@pytest.mark.parametrize("name, content, fact", [
    ("a.csv", text(ROWS[:99]), "99 rows"), ("a.csv", text(ROWS[:, :1]), "1 columns"), ("a.csv", b"", "0 rows"),
    ("a.csv", text(np.ones((200, 65))), "65 columns"), ("a.csv", text(ROWS).replace(b"\n", b";\n"), "row 1"),
    *(("a.csv", text(ROWS) + row, "column 2 of row 201") for row in (b"\n1,,3", b"\n1,no,3", b"\n1,inf,3")),
    ("a.csv", text(ROWS) + b"\n1,2", "cannot read .*a.csv"),
    ("a.csv", b"\xff\xfe" + bytes(range(128, 256)), "a.csv"),
    ("a.csv", text(ROWS * [1, 0, 1]), "column 2 is constant"), ("a.csv", text(ROWS[:, [0, 1, 0]]), "linear function"),
    ("a.npy", npy(ROWS + [0, 0, 1e6]), "column 3 is constant, or nearly"),
    ("a.npy", npy(ROWS[0]), r"\(3,\)"), ("a.npy", npy(ROWS > 5), "bool"), ("a.npy", b"no array", "cannot read"),
    ("a.npy", npy(np.array([{}], object)), "cannot read"), ("a.npy", None, "cannot read"), ("a.csv", None, "a.csv")])
def test_points_that_have_no_density_are_refused_with_what_is_wrong(tmp_path, name, content, fact):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=fact):
        Points(tmp_path / name, 0)
