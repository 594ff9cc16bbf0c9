"""What several test files share. Every test runs on one thread, since tests of other people may run beside it."""

import json
import os
import shutil

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

import numpy as np
import pytest
import torch

from support import plots
from support.run import Run

torch.set_num_threads(1)
compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def csv(tmp_path_factory):
    """A file of 300 points of 3 columns on a parabola, with a header."""
    generator, path = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "points.csv"
    t, noise = generator.normal(size=300), 0.3 * generator.normal(size=(300, 3))
    np.savetxt(path, np.stack([t, t * t, 100 - 20 * t], 1) + noise, delimiter=",", header="a,b,c", comments="")
    return path


@pytest.fixture(scope="session")
def npy(tmp_path_factory):
    """A file of 350 images of 4 × 4 pixels, each a shade with noise: 250 to train, 50 to validate, 50 to test."""
    generator, path = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "images.npy"
    shade = generator.integers(0, 200, (350, 1, 1))
    np.save(path, (shade + generator.integers(0, 56, (350, 4, 4))).astype(np.uint8))
    return path


def without_pictures(monkeypatch):
    """Drawing takes longer than the small runs of most tests."""
    for name in ("save", "curves", "mosaic", "toy", "ebm", "mode_weights"):
        monkeypatch.setattr(plots, name, lambda *args, **kwargs: None)


@pytest.fixture
def no_pictures(monkeypatch):
    without_pictures(monkeypatch)


def failing(main):
    """A function (capsys, *arguments) -> the one line with which the command exits, its status not 0."""
    def fails(capsys, *args):
        with pytest.raises(SystemExit) as exit:
            main([*map(str, args)])
        assert exit.value.code not in (0, None)
        line = exit.value.code if isinstance(exit.value.code, str) else capsys.readouterr().err.strip().splitlines()[-1]
        assert "\n" not in line
        return line
    return fails


def stop_after(monkeypatch, saves):
    """Ctrl-C after so many checkpoints have been written."""
    save, count = Run.save, []

    def stopping(self, *args, **kwargs):
        save(self, *args, **kwargs)
        count.append(1)
        if len(count) == saves:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", stopping)


def checkpoint(directory):
    return torch.load(directory / "checkpoint.pt", weights_only=True)


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def timeless(rows):
    """The rows of a run's metrics without what depends on the machine."""
    timed = ("seconds", "batches_per_second", "sml_share_of_time")
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


def assert_same_bits(a, b):
    """Two states, of tensors and numbers in dictionaries and lists, are equal to the last bit."""
    pairs = []
    torch.utils._pytree.tree_map(lambda x, y: pairs.append((x, y)), a, b)
    assert len(pairs) > 10 and any(torch.is_tensor(x) for x, _ in pairs)
    assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in pairs)
