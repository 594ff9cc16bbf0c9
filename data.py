"""Data: images in MNIST's format as bytes, and the noise that makes them continuous."""

import gzip
import hashlib
import math
import zlib
from pathlib import Path

import numpy as np
import torch


class DataError(ValueError):
    """A data file is missing or not what it should be; the message names it and says what was expected."""


def read_idx(path):
    """The array of bytes in an IDX file, gzipped or not.   -> uint8 (n, …)

    Format: two zero bytes, 0x08 for unsigned bytes, the number of axes, each axis as a big-endian 32-bit
    integer, then the bytes. Source: the home page of MNIST (LeCun, Cortes, Burges).
    """
    try:
        raw = Path(path).read_bytes()
        if str(path).endswith(".gz"):
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:  # a damaged gzip raises any of the three
        raise DataError(f"cannot read {path}: {error}") from None
    axes = raw[3] if raw[:3] == b"\x00\x00\x08" and len(raw) > 3 else 0
    header = 4 + 4 * axes
    shape = np.frombuffer(raw[4:header], ">u4").tolist() if len(raw) >= header else []
    if axes == 0 or len(shape) != axes:
        raise DataError(f"{path} is not an IDX file of unsigned bytes")
    if len(raw) != header + math.prod(shape):
        raise DataError(f"{path} holds {len(raw) - header} bytes of data, its header promises {math.prod(shape)}")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy())


def mnist(directory):
    """Images of a data set in MNIST's format: to train, to validate, to test; 50,000, 10,000, 10,000 for MNIST.

    -> three uint8 tensors (n, 1, H, W). The last sixth of the training file is the validation split.

    Each file may be gzipped. If the directory holds a file SHA256SUMS (as `sha256sum` prints), each file that
    it lists must match. Fashion-MNIST and KMNIST come in the same files. Raises DataError.
    """
    train, test = (_images(Path(directory), name) for name in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"))
    if train.shape[1:] != test.shape[1:]:
        raise DataError(f"training images are {tuple(train.shape[1:])}, test images {tuple(test.shape[1:])}")
    n = len(train) - len(train) // 6
    if n == len(train) or len(test) == 0:
        raise DataError(f"{len(train)} training and {len(test)} test images in {directory} are too few")
    return train[:n], train[n:], test


def _images(directory, name):
    path = next((p for p in (directory / f"{name}.gz", directory / name) if p.is_file()), None)
    if path is None:
        raise DataError(f"no {name}.gz (nor {name}) in {directory}: --data takes a directory with the "
                        "files of a data set in MNIST's format")
    check_sha256(path)
    images = read_idx(path)
    if images.dim() != 3:
        raise DataError(f"{path} holds an array of {images.dim()} axes, not (images, rows, columns)")
    return images[:, None]


def check_sha256(path):
    """Raises DataError if SHA256SUMS beside the file lists it with another sum. Lines are those of `sha256sum`."""
    sums = path.with_name("SHA256SUMS")
    if not sums.is_file():
        return
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        lines = [line.replace(" *", "  ") for line in sums.read_text().splitlines() if line.strip()]
        expected = dict(reversed(line.split(maxsplit=1)) for line in lines)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot check {path} against {sums}: {error}") from None
    if expected.get(path.name, found) != found:
        raise DataError(f"{path} is damaged or altered: its SHA-256 is {found}, {sums} says {expected[path.name]}")


def dequantize(images):
    """x = image + u, u uniform on [0, 1): bytes to a datum in [0, 256] of torch's default dtype.   (B, …) -> (B, …)

    The density of x integrates over each unit cube to the probability of an image, so that -E[log p(x)] bounds
    the discrete negative log-likelihood from above. Source: Uria et al., "RNADE" (2013).
    """
    return images + torch.rand(images.shape, device=images.device)
