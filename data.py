# An unofficial reimplementation of EBFlow (arXiv 2305.15267). MIT licence, copyright (c) 2026 its contributors.
"""Images: files of bytes, and dequantisation."""

import gzip
import hashlib
import math
import zlib
from pathlib import Path

import numpy as np
import torch

MNIST = Path(__file__).parent / "mnist"


class DataError(ValueError):
    """A data file is missing or not what it should be. The message names the file and says what was expected."""


def read_idx(path):
    """The array in an IDX file of unsigned bytes, gzipped or not.   -> uint8 (n, …)

    Format: two zero bytes, 0x08 for unsigned bytes, the number of axes, the length of each axis as a big-endian 32-bit
    integer, then the elements. Raises DataError. Source: the home page of MNIST (LeCun, Cortes, Burges).
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:  # a damaged gzip raises any of the three
        raise DataError(f"cannot read {path}: {error}") from None
    axes = raw[3] if raw[:3] == b"\x00\x00\x08" and len(raw) > 3 else 0
    header = 4 + 4 * axes
    shape = np.frombuffer(raw[4:header], ">u4").tolist() if len(raw) >= header else []
    if not 0 < axes < 5 or len(shape) != axes:
        raise DataError(f"{path} is not an IDX file of unsigned bytes")
    if len(raw) != header + math.prod(shape):
        raise DataError(f"{path} holds {len(raw) - header} bytes of data, its header promises {math.prod(shape)}")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy())


def load_images(path):
    """Training, validation and test images: three uint8 tensors (n, C, H, W).

    path    a directory with the files of MNIST (or Fashion-MNIST, KMNIST; gzipped or not), or with those of the binary
            version of CIFAR-10; or a NumPy file of bytes, (n, H, W) or (n, H, W, C)

    The last sixth of the training images is the validation split, so MNIST has 50,000, 10,000 and 10,000 images. In a
    NumPy file, the last seventh is the test split. Raises DataError.
    """
    path = Path(path)
    if path.suffix == ".npy":
        images = read_npy(path)
        n = len(images) - len(images) // 7
        train, test = images[:n], images[n:]
    elif any(path.glob("*_batch*.bin")):
        train = torch.cat([read_cifar(path / f"data_batch_{i}.bin") for i in range(1, 6)])
        test = read_cifar(path / "test_batch.bin")
    else:
        splits = []
        for name in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"):
            file = next((file for file in (path / f"{name}.gz", path / name) if file.is_file()), None)
            if file is None:
                raise DataError(f"no {name}.gz (nor {name}) in {path}: --data takes a directory of MNIST's or of "
                                "CIFAR-10's (binary) files, or a .npy file")
            splits.append(read_idx(file)[:, None])
        train, test = splits
    n = len(train) - len(train) // 6
    if n == len(train) or train.dim() != 4 or test.numel() == 0 or train.shape[1:] != test.shape[1:]:
        raise DataError(f"{path} has too few images, or not two sets (n, C, H, W) of one size: {tuple(train.shape)} to "
                        f"train, {tuple(test.shape)} to test")
    return train[:n], train[n:], test


def digest(splits):
    """What tells one data set from another: the SHA-256 of the bytes of all its images.   -> str"""
    return hashlib.sha256(b"".join(map(torch.Tensor.numpy, splits))).hexdigest()


def read_cifar(path):
    """The images of a file of CIFAR-10's binary version: a byte for the label, then 3 × 32 × 32 for the image.

    -> uint8 (n, 3, 32, 32). Source: the home page of CIFAR-10 (Krizhevsky).
    """
    try:
        raw = np.fromfile(path, np.uint8)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}; CIFAR-10 has data_batch_1 … 5.bin and test_batch.bin") from None
    if len(raw) == 0 or len(raw) % 3073:
        raise DataError(f"{path} holds {len(raw)} bytes, no multiple of 3,073: it is no binary file of CIFAR-10")
    return torch.from_numpy(raw.reshape(-1, 3073)[:, 1:].reshape(-1, 3, 32, 32).copy())


def read_npy(path):
    """The images in a NumPy file of bytes, (n, H, W) or (n, H, W, C).   -> uint8 (n, C, H, W)"""
    try:
        with open(path, "rb") as file:
            images = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # numpy raises many kinds for a damaged file
        raise DataError(f"cannot read {path}: {error}; it must be one array of images of one shape") from None
    if images.dtype != np.uint8:
        raise DataError(f"{path} holds {images.dtype}, not bytes: save images of 0 … 255 as uint8")
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[3] not in (1, 3, 4):
        raise DataError(f"{path} has the shape {images.shape}, not (n, H, W) or (n, H, W, 1, 3 or 4 channels)")
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def dequantize(images):
    """x = image + u, u uniform on [0, 1): bytes to x in [0, 256] of torch's default dtype.   uint8 (B, …) -> (B, …)

    The integral of p(x) over a unit cube is the probability of an image. So -E[log p(x)] is an upper bound on the
    negative log-likelihood of the image. Source: Uria et al., "RNADE" (2013).
    """
    return images + torch.rand(images.shape, device=images.device)
