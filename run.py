"""What every training run shares: a directory that is never overwritten by accident, checkpoints that are
written whole or not at all, a metrics log and its curves, the moving average, and errors of one line."""

import contextlib
import copy
import json
import os
import sys
import zipfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


class RunError(Exception):
    """Something the user can put right; the message is one line and says how."""


class Run:
    """The directory of one training run: config.json, checkpoint.pt, metrics.jsonl and pictures.

    config     the settings that decide the result, a flat dict of JSON values
    resume     go on from the checkpoint, whose settings must be these
    overwrite  drop the run that the directory holds

    `state` is what the last checkpoint holds, None at the beginning; `metrics` a list of rows. Raises RunError.
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
            elif any((self.directory / name).exists() for name in ("config.json", "checkpoint.pt")):
                if not overwrite:
                    raise RunError(f"{self.directory} already holds a run: continue it with --resume, "
                                   "replace it with --overwrite, or name another --out")
                for name in ("checkpoint.pt", "metrics.jsonl", "curves.png", "samples.png"):
                    (self.directory / name).unlink(missing_ok=True)
            self.write("config.json", (json.dumps(config, indent=2) + "\n").encode())
        except OSError as error:
            raise RunError(f"cannot write to {self.directory}: {error}") from None

    def _load(self, path):
        if not path.exists():
            if not (self.directory / "config.json").exists():
                raise RunError(f"nothing to resume: there is no {path}; start the run without --resume")
            return  # killed before its first checkpoint: it goes on at the beginning
        try:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:  # checksums, which torch.load does not look at
                    raise zipfile.BadZipFile
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # data only, never code
            config, self.state, self.metrics = (checkpoint[k] for k in ("config", "state", "metrics"))
        except OSError as error:
            raise RunError(f"cannot read {path}: {error}") from None
        except Exception as error:  # torch raises many kinds for a damaged file
            raise RunError(f"{path} is damaged ({type(error).__name__}): delete it and start anew with --overwrite") from None
        different = [f"{k} is {config.get(k)} there and {self.config.get(k)} here"
                     for k in sorted({*config, *self.config}) if config.get(k) != self.config.get(k)]
        if different:
            raise RunError(f"{path} belongs to other settings: " + ", ".join(different))

    def save(self, state):
        """Writes the checkpoint, then the metrics log that belongs to it."""
        checkpoint = {"config": self.config, "state": state, "metrics": self.metrics}
        with self._whole("checkpoint.pt") as file:
            torch.save(checkpoint, file)
        self.write_metrics()

    def write_metrics(self):
        self.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.metrics).encode())

    def write(self, name, data):
        with self._whole(name) as file:
            file.write(data)

    def picture(self, name, figure):
        with self._whole(name) as file:
            figure.savefig(file, format="png", dpi=150)

    @contextlib.contextmanager
    def _whole(self, name):
        """A file that appears under its name complete, or not at all (a kill, a full disk)."""
        temporary = self.directory / f".{name}.part"
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.directory / name)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
            raise RunError(f"cannot write {self.directory / name}: {error}; what was there is as it was") from None
        finally:
            temporary.unlink(missing_ok=True)


class MovingAverage:
    """θ̃ ← mθ̃ + (1-m)θ after each step (the paper's EMA), over the parameters that are trained.

    In the first steps m is (1+n)/(10+n), so that θ̃ soon forgets where it started. The count is kept on the host:
    torch's AveragedModel keeps it on the device, and a GPU would have to be waited for at every step.
    """

    def __init__(self, model, m):
        self.model = copy.deepcopy(model)
        self.m, self.n = m, 0
        self.averages, self.parameters = trainable(self.model), trainable(model)

    @torch.no_grad()
    def update(self):
        m = min(self.m, (1 + self.n) / (10 + self.n)) if self.n else 0.0
        torch._foreach_lerp_(self.averages, self.parameters, 1 - m)
        self.n += 1

    def state_dict(self):
        return {"model": self.model.state_dict(), "n": self.n}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.n = state["n"]


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


@contextlib.contextmanager
def fast_matmul():
    """Lets a CPU multiply in bfloat16 where it has units for that (AMX). Where it has none the products stay
    float32, but come from oneDNN instead of MKL, which is slow on AMD processors. For training only."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


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


@contextlib.contextmanager
def one_line_errors(*kinds):
    """Turns RunError and `kinds` into one line on stderr and exit status 1; Ctrl-C into exit status 130."""
    try:
        yield
    except (RunError, *kinds) as error:
        sys.exit("error: " + " ".join(str(error).split()))
    except KeyboardInterrupt:
        print("\nstopped: the last checkpoint is kept, --resume goes on from it", file=sys.stderr)
        sys.exit(130)
