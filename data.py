# An unofficial reimplementation of EBFlow (arXiv 2305.15267). MIT licence, copyright (c) 2026 its contributors.
"""Images: files of bytes, dequantisation, and a flow that takes and gives bytes. Points: files of numbers."""

import gzip
import hashlib
import math
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

MNIST = Path(__file__).parent / "mnist"


class DataError(ValueError):
    """A data file is missing or not what it should be. The message names the file and says what was expected."""


def regular(path):
    """The path of a regular file. Who reads a named pipe waits for ever for somebody who writes."""
    if not Path(path).is_file():
        raise OSError("no regular file is there")
    return path


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
    if 0 in shape or len(raw) != header + math.prod(shape):
        raise DataError(f"{path} holds {len(raw) - header} bytes of data, its header promises {shape}")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy())


def load_images(path):
    """Training, validation and test images: three uint8 tensors (n, C, H, W).

    path    a directory with the files of MNIST (or Fashion-MNIST, KMNIST; gzipped or not), or with those of the binary
            version of CIFAR-10; or a NumPy file of bytes, (n, H, W) or (n, H, W, C)

    The last sixth of the training images is the validation split, with images of CIFAR-10's size the last fifth. So
    MNIST has 50,000, 10,000 and 10,000 images, CIFAR-10 40,000 to train. In a NumPy file, the last seventh is the test
    split. Raises DataError.
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
                raise DataError(f"{path} is no directory with {name}.gz or {name}: --data takes a directory of MNIST's "
                                "or of CIFAR-10's (binary) files, or a .npy file")
            splits.append(read_idx(file)[:, None])
        train, test = splits
    n = len(train) - len(train) // (5 if train.shape[1:] == (3, 32, 32) else 6)
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
        raw = np.fromfile(regular(path), np.uint8)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}; CIFAR-10 has data_batch_1 … 5.bin and test_batch.bin") from None
    if len(raw) == 0 or len(raw) % 3073:
        raise DataError(f"{path} holds {len(raw)} bytes, no multiple of 3,073: it is no binary file of CIFAR-10")
    return torch.from_numpy(raw.reshape(-1, 3073)[:, 1:].reshape(-1, 3, 32, 32).copy())


def read_npy(path):
    """The images in a NumPy file of bytes, (n, H, W) or (n, H, W, C).   -> uint8 (n, C, H, W)"""
    images = read_array(path)
    if images.dtype != np.uint8:
        raise DataError(f"{path} holds {images.dtype}, not bytes: save images of 0 … 255 as uint8")
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[3] not in (1, 3, 4):
        raise DataError(f"{path} has the shape {images.shape}, not (n, H, W) or (n, H, W, 1, 3 or 4 channels)")
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def read_array(path):
    """The one array in a NumPy file, loaded without executing code."""
    try:
        with open(regular(path), "rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # numpy raises many kinds for a damaged file
        raise DataError(f"cannot read {path}: {error}; it must be one array of numbers") from None


def dequantize(images):
    """x = image + u, u uniform on [0, 1): bytes to x in [0, 256] of torch's default dtype.   uint8 (B, …) -> (B, …)

    The integral of p(x) over a unit cube is the probability of an image. So -E[log p(x)] is an upper bound on the
    negative log-likelihood of the image. Source: Uria et al., "RNADE" (2013).
    """
    return images + torch.rand(images.shape, device=images.device)


def augment(images):
    """Mirrors each image with probability ½; shifts it by -1, 0 or 1 pixel each way, the edge repeated.   (B, C, H, W)

    Source: the published recipe of Chao et al. for CIFAR-10.
    """
    B, C, H, W = images.shape
    rows, columns = ((torch.arange(n, device=images.device) + torch.randint(-1, 2, (B, 1), device=images.device)).clamp(
        0, n - 1) for n in (H, W))  # (B, H), (B, W)
    columns = torch.where(torch.rand(B, 1, device=images.device) < 0.5, columns.flip(1), columns)
    return images.gather(2, rows[:, None, :, None].expand(B, C, H, W)).gather(
        3, columns[:, None, None].expand(B, C, H, W))


class ImageModel(nn.Module):
    """A flow of x in [0, 256)^D as a model of images: bytes go in, are dequantised here, and bytes come out.

    flow    an EBFlow on events (C, H, W) or (C·H·W,)
    image   (C, H, W)

    All methods but `inverse` and `sample` take bytes, uint8 (n, C, H, W). They raise TypeError for any other dtype: of
    pixels in [0, 1], or of whole numbers without the noise, the flow's log-density is another, and looks plausible.
    Each call draws its own noise, so log p differs from call to call; torch.manual_seed fixes it.
    """

    def __init__(self, flow, image):
        super().__init__()
        self.flow, self.image = flow, tuple(image)

    def log_prob(self, images):
        """log p(x) in nats, exact.   -> (n,)"""
        return self.flow.log_prob(self.x(images))

    def energy(self, images):
        """E(x) in nats.   -> (n,)"""
        return self.flow.energy(self.x(images))

    def bits_per_dim(self, images):
        """-log p(x) / (D ln 2).   -> (n,)"""
        return -self.log_prob(images) / (math.prod(self.image) * math.log(2))

    def score(self, images):
        """∇_x log p(x), in nats per grey level.   -> (n, C, H, W)"""
        return self.flow.score(self.x(images)).view(-1, *self.image)

    def forward(self, images):
        """The latent variable u = g(x).   -> (n, *flow.shapes[-1])"""
        return self.flow(self.x(images))

    def inverse(self, u):
        """The image whose unit cube has g⁻¹(u) in it.   (n, *flow.shapes[-1]) -> bytes (n, C, H, W)"""
        return self.bytes(self.flow.inverse(u))

    def sample(self, n):
        """n draws.   -> bytes (n, C, H, W)"""
        return self.bytes(self.flow.sample(n))

    def bytes(self, x):
        """x of the flow, rounded down. Without the clamp 256 would be 0, and white black.   -> bytes (n, C, H, W)"""
        return x.view(-1, *self.image).clamp(0, 255).to(torch.uint8)

    def x(self, images):
        """What the flow takes: dequantised, on its device.   bytes (n, C, H, W) -> (n, *flow.shape)"""
        if images.dtype != torch.uint8:
            raise TypeError(f"images are bytes of 0 … 255, torch.uint8, not {images.dtype}")
        if images.shape[1:] != self.image:
            raise ValueError(f"images have the shape (n, {', '.join(map(str, self.image))}), not {tuple(images.shape)}")
        like = next(self.flow.parameters())
        return dequantize(images.to(like.device)).to(like.dtype).reshape(-1, *self.flow.shape)


# ---- Points ----------------------------------------------------------------------------------------------------------

class Points:
    """The rows of a file: 80 % to train, 10 % to validate, 10 % to test, shuffled by `seed`.

    path    a text file with commas between the columns, and perhaps a header; or a NumPy file (n, D)

    `mean` and `std` (D,) are those of the training rows. Raises DataError for what is not a finite number, for columns
    that are constant or depend linearly on others (such points have no density), and unless 2 ≤ D ≤ 64, n ≥ 100.
    """

    def __init__(self, path, seed):
        x = torch.from_numpy(read_points(path))
        n, D = x.shape
        if not (2 <= D <= 64 and n >= 100):
            raise DataError(f"{path} has {n} rows of {D} columns: it takes at least 100 of 2 to 64")
        for i, j in (~x.isfinite()).nonzero()[:1].tolist():
            raise DataError(f"{path}: column {j + 1} of row {i + 1} is not a finite number")
        x = x[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
        train, val, test = x.split([n - 2 * (n // 10), n // 10, n // 10])
        self.std, self.mean = torch.std_mean(train, 0)
        for j in (self.std <= 1e-4 * self.mean.abs()).nonzero()[:1, 0].tolist():  # float32 would lose its digits
            raise DataError(f"{path}: column {j + 1} is constant, or nearly so beside its mean: subtract the mean")
        if torch.linalg.eigvalsh(train.T.corrcoef())[0] < 1e-9:
            raise DataError(f"{path}: a column is a linear function of the others: leave it out")
        gaussian = torch.distributions.MultivariateNormal(self.mean, train.T.cov())
        self.gaussian_nll = -gaussian.log_prob(test).mean().item()  # of the test rows, in nats
        self.train, self.val, self.test = (rows.to(torch.get_default_dtype()) for rows in (train, val, test))
        self.identity = {"points": [n, D], "sha256": hashlib.sha256(x.numpy().tobytes()).hexdigest()}

    def sample(self, n, device, smoothing):
        """n of the training rows, with noise that has `smoothing` times a column's deviation.   -> (n, D)"""
        rows = self.train[torch.randint(len(self.train), (n,))]
        return (rows + smoothing * self.std.to(rows) * torch.randn_like(rows)).to(device)


def read_points(path):
    """The numbers in a text file or a NumPy file; what is no number is nan.   -> float64 (n, D)"""
    if Path(path).suffix == ".npy":
        rows = read_array(path)
        if rows.ndim != 2 or rows.dtype.kind not in "fiu":
            raise DataError(f"{path} holds {rows.dtype} of the shape {rows.shape}, not numbers (n, D)")
        return rows.astype(np.float64)
    try:
        lines = Path(regular(path)).read_text("utf-8-sig").strip().splitlines() or ["nan"]
        rows = np.genfromtxt(lines, delimiter=",", ndmin=2)
    except (OSError, ValueError) as error:  # no file, no text, rows of different lengths
        raise DataError(f"cannot read {path}: {error}") from None
    return rows[1:] if np.isnan(rows[:1]).all() else rows  # a header
