"""The directory of a run: never overwritten by accident, with checkpoints that are written whole or not at all, a
metrics log; its pictures; and errors of one line."""

import contextlib
import json
import os
import sys
import zipfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from processes import rank


class RunError(Exception):
    """Something the user can put right; the message is one line and says how."""


class Run:
    """The directory of one training run: config.json, checkpoint.pt, metrics.jsonl and pictures.

    config     the settings that decide the result, a flat dict of JSON values
    resume     go on from the checkpoint, whose settings must be these
    overwrite  drop the run that the directory holds

    `state` is what the last checkpoint holds, None at the beginning; `metrics` a list of rows. Of several processes
    (see processes.py) all read, and the first one writes. Raises RunError.
    """

    def __init__(self, directory, config, resume=False, overwrite=False):
        self.directory = Path(directory)
        self.config = config
        self.state, self.metrics = None, []
        checkpoint = self.directory / "checkpoint.pt"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if resume:
                self._load(checkpoint)
            elif rank() == 0 and any((self.directory / name).exists() for name in ("config.json", "checkpoint.pt")):
                if not overwrite:
                    raise RunError(f"{self.directory} already holds a run: continue it with --resume, "
                                   "replace it with --overwrite, or name another --out")
                for name in ("checkpoint.pt", "metrics.jsonl", "curves.png", "samples.png", "density.png",
                             "weights.png"):
                    (self.directory / name).unlink(missing_ok=True)
            self.write("config.json", (json.dumps(config, indent=2) + "\n").encode())
        except OSError as error:
            raise RunError(f"cannot write to {self.directory}: {error}") from None

    def _load(self, path):
        if not path.exists():
            if not (self.directory / "config.json").exists():
                raise RunError(f"nothing to resume: there is no {path}; start the run without --resume")
            return  # killed before its first checkpoint: it goes on at the beginning
        checkpoint = read_checkpoint(path)
        config, self.state, self.metrics = (checkpoint[k] for k in ("config", "state", "metrics"))
        different = [f"{k} is {config.get(k)} there and {self.config.get(k)} here"
                     for k in sorted({*config, *self.config}) if config.get(k) != self.config.get(k)]
        if different:
            raise RunError(f"{path} belongs to other settings: " + ", ".join(different))

    def save(self, state):
        """Writes the checkpoint, then the metrics log that belongs to it."""
        checkpoint = {"config": self.config, "state": state, "metrics": self.metrics}
        with whole(self.directory / "checkpoint.pt") as file:
            torch.save(checkpoint, file)
        self.write_metrics()

    def write_metrics(self):
        self.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.metrics).encode())

    def write(self, name, data):
        with whole(self.directory / name) as file:
            file.write(data)

    def picture(self, name, figure):
        save_picture(self.directory / name, figure)


def save_picture(path, figure):
    with whole(path) as file:
        figure.savefig(file, format="png", dpi=150)


def read_metrics(directory):
    """The rows of a run's metrics.jsonl, a dict for each evaluated epoch."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def read_checkpoint(path):
    """What `Run.save` wrote: a dict of config, state and metrics. Raises RunError where the file is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # checksums, which torch.load does not look at
                raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # data only, never code
        return {name: checkpoint[name] for name in ("config", "state", "metrics")}
    except OSError as error:
        raise RunError(f"cannot read {path}: {error}") from None
    except Exception as error:  # torch raises many kinds for a damaged file
        raise RunError(f"{path} is damaged ({type(error).__name__}): delete it and start anew with --overwrite") from None


@contextlib.contextmanager
def whole(path):
    """A file that appears under its name complete, or not at all (a kill, a full disk). Raises RunError.

    Of several processes the first one writes; what the others write goes nowhere.
    """
    if rank() > 0:
        with open(os.devnull, "wb") as nowhere:
            yield nowhere
        return
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise RunError(f"cannot write {path}: {error}; what was there is as it was") from None
    finally:
        temporary.unlink(missing_ok=True)


def curves(metrics, loss):
    """Validation NLL and training objective against epochs."""
    trained = [row for row in metrics if row["loss"] is not None]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([row["epoch"] for row in metrics], [row["val_nll"] for row in metrics], marker=".", label="validation")
    left.plot(metrics[-1]["best_epoch"], metrics[-1]["test_nll"], "k*", label=f"test, {metrics[-1]['test_nll']:.1f} nats")
    left.set(ylabel="NLL (nats)", title="exact negative log-likelihood")
    left.legend()
    right.plot([row["epoch"] for row in trained], [row["loss"] for row in trained], marker=".", color="C1")
    right.set(ylabel="loss", title=f"training objective: {loss}")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        values = axes.lines[0].get_ydata()
        low, late = min(values), max(values[len(values) // 3:])
        if max(values) > low + 20 * (late - low) > low:  # a start far away would flatten the rest
            axes.set_ylim(low - 0.5 * (late - low), low + 4 * (late - low))
    return figure


def lattice(limit, n, like):
    """The points of an n × n grid on [-limit, limit]², first row at the bottom.   -> (n, n, 2)"""
    ticks = torch.linspace(-limit, limit, n, device=like.device, dtype=like.dtype)
    return torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), dim=-1)


@torch.no_grad()
def image(axes, function, x, n=128, **style):
    """Shows a function (B, 2) -> (B,) on the square that holds the points x."""
    limit = 1.02 * x.abs().max().item()
    points = lattice(limit, n, x).flatten(0, 1)
    values = torch.cat([function(batch) for batch in points.split(5000)]).view(n, n)
    axes.imshow(values.cpu().numpy(), origin="lower", extent=(-limit, limit, -limit, limit), **style)
    axes.set(xticks=[], yticks=[])
    return limit


@contextlib.contextmanager
def one_line_errors(*kinds):
    """Turns RunError, `kinds` and lack of memory into one line on stderr and exit status 1; Ctrl-C into exit status 130."""
    try:
        yield
    except (RunError, *kinds) as error:
        sys.exit("error: " + " ".join(str(error).split()))
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)):  # a CPU's
            raise
        sys.exit("error: not enough memory for these sizes: take smaller batches, or a smaller model; what was written is kept")
    except KeyboardInterrupt:
        print("\nstopped: what was written is kept; a training run goes on from it with --resume", file=sys.stderr)
        sys.exit(130)
