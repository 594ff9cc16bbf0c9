"""The directory of a run, its checkpoint (written whole or not at all), its progress bar, and errors of one line."""

import contextlib
import io
import json
import math
import os
import sys
import textwrap
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from sampling import SamplingError

PICTURES = ("curves.png", "samples.png", "density.png", "mode_weights.png")
KEPT = "the last checkpoint, if there is one, is kept"


class RunError(Exception):
    """Something that the user can put right. The message is one line and says how."""


class Run(contextlib.AbstractContextManager):
    """One training run in its directory: config.json, checkpoint.pt, metrics.jsonl and pictures.

        with Run(s, "lower --lr", dict(model=model, optimizer=optimizer), sha256=…) as run:

    s       the settings; those that decide the result, and **data, are the identity that a checkpoint must have
    remedy  what to do where a loss, a gradient or the validation NLL is not finite
    parts   what is saved beside numbers, and put back with --resume: anything with a state_dict

    `state` is what else was saved, {"epoch": -1} at the beginning, and `metrics` a list of rows. A singular weight or
    lost chains inside become a RunError that names the step. Under torchrun only the first process writes.
    Raises RunError where the directory holds a run that may not be replaced, or a checkpoint that does not fit.
    """

    def __init__(self, s, remedy, parts, **data):
        self.directory, self.config, self.remedy, self.parts = s.out, s.config() | data, f"{remedy}; {KEPT}", parts
        self.state, self.metrics, self.at = {"epoch": -1}, [], "before the first step"
        self.first = not dist.is_initialized() or dist.get_rank() == 0  # of several processes
        checkpoint = s.out / "checkpoint.pt"
        try:
            s.out.mkdir(parents=True, exist_ok=True)
            exists = (s.out / "config.json").exists() or checkpoint.exists()
        except OSError as error:
            raise RunError(f"cannot write to {s.out}: {error}") from None
        if s.resume and not exists:
            raise RunError(f"nothing to resume: there is no {checkpoint}; start the run without --resume")
        if s.resume and checkpoint.exists():  # else it was killed before its first checkpoint
            self._restore(checkpoint)
        elif exists and not s.resume and not s.overwrite:
            raise RunError(f"{s.out} already holds a run: continue it with --resume, replace it with --overwrite, or "
                           "name another --out")
        if dist.is_initialized():
            dist.barrier()  # all have looked before the first one writes
        if self.first:
            for name in ("checkpoint.pt", "metrics.jsonl", *PICTURES) if s.overwrite else ():
                (s.out / name).unlink(missing_ok=True)
            write(s.out / "config.json", (json.dumps(self.config, indent=2) + "\n").encode())
        print(textwrap.fill(str(self.config).strip("{}").replace("'", ""), 120), flush=True)

    def _restore(self, path):
        checkpoint = read_checkpoint(path)
        self.state, self.metrics, config = (checkpoint[name] for name in ("state", "metrics", "config"))
        free = {"epochs"} if self.config.get("schedule") == "steps" else set()  # which does not look at their number
        different = [f"{k} is {config.get(k)} there and {self.config.get(k)} here"
                     for k in sorted({*config, *self.config} - free) if config.get(k) != self.config.get(k)]
        if different:
            raise RunError(f"{path} belongs to other settings: " + ", ".join(different))
        try:
            for name, part in self.parts.items():
                part.load_state_dict(self.state[name])
        except torch.OutOfMemoryError:
            raise
        except (KeyError, ValueError, RuntimeError):  # of torch, when names or shapes differ
            raise RunError("the checkpoint is of another version of this code: start anew with --overwrite") from None

    def __exit__(self, kind, error, traceback):
        if isinstance(error, (torch.linalg.LinAlgError, SamplingError)):
            raise RunError(f"{error}, {self.at}: {self.remedy}") from None

    def watch(self, epoch, batches):
        """The batches of an epoch, behind a progress bar if standard error is a terminal. Afterwards `means` holds the
        means of what the loop `record`ed. Raises RunError where that is not finite, and names the first such step. It
        looks every 50 steps, since a GPU must be waited for to look."""
        self.trace, self.names, steps = [], (), len(batches)
        silent = None if self.first else True  # None: where there is no terminal
        with tqdm(total=steps, desc=f"epoch {epoch}", leave=False, dynamic_ncols=True, disable=silent) as bar:
            for step, batch in enumerate(batches, start=1):
                self.at = f"at epoch {epoch}, step {step}"
                yield batch
                if step % 50 == 0 or step == steps:
                    self._look(epoch, step, bar)
        self.at = f"after epoch {epoch}"
        self.means = dict(zip(self.names, torch.stack(self.trace).mean(0).tolist())) if self.trace else {}

    def _look(self, epoch, step, bar):
        first = (step - 1) // 50 * 50
        recent = torch.stack(self.trace[first:]).cpu()  # (50, figures)
        for i in (~recent.isfinite().all(1)).nonzero()[:1, 0]:
            figures = ", ".join(f"{name} {value:g}" for name, value in zip(self.names, recent[i].tolist()))
            raise RunError(f"not finite at epoch {epoch}, step {first + i + 1} ({figures}): {self.remedy}")
        bar.set_postfix(loss=f"{recent[:, 0].mean():.4g}", refresh=False)
        bar.update(step - first)

    def record(self, figures):
        """Keeps the figures of a step, {name: ()}, on their device. The first is the loss."""
        self.names = [*figures]
        self.trace.append(torch.stack([*figures.values()]))

    def save(self, row, state, shown=()):
        """Ends an epoch: adds the row to the metrics, prints the figures `shown`, writes checkpoint and metrics.

        Raises RunError where val_nll is a number, and not finite.
        """
        if row["val_nll"] is not None and not math.isfinite(row["val_nll"]):
            raise RunError(f"the validation NLL is {row['val_nll']} after epoch {row['epoch']}: {self.remedy}")
        self.metrics.append(row)
        line = f"epoch {row['epoch']:4}" + ("" if row["val_nll"] is None else f"  val_nll {row['val_nll']:.2f}")
        for name in shown:
            line += f"  {name} {row[name]:.4g}" if row.get(name) is not None else ""
        print(line, flush=True)
        for name, part in self.parts.items():
            state[name] = part.state_dict()
        buffer = io.BytesIO()
        torch.save({"config": self.config, "state": state, "metrics": self.metrics}, buffer)
        if self.first:
            write(self.directory / "checkpoint.pt", buffer.getvalue())
            write(self.directory / "metrics.jsonl", ("\n".join(map(json.dumps, self.metrics)) + "\n").encode())

    def finish(self, figures):
        """Adds the final figures to the last row of the metrics, and prints them."""
        self.metrics[-1] |= figures
        for name, value in (figures | {"minutes": self.metrics[-1]["seconds"] / 60}).items():
            values = value if isinstance(value, list) else [value]
            print(f"{name:24}" + " ".join(f"{v:.4f}" if isinstance(v, float) else str(v) for v in values))
        print(f"{'written to':24}{self.directory}", flush=True)
        if self.first:
            write(self.directory / "metrics.jsonl", ("\n".join(map(json.dumps, self.metrics)) + "\n").encode())

    def picture(self, name, figure):
        if self.first:
            save_picture(self.directory / name, figure)


def write(path, data):
    """Writes a file that appears under its name complete, or not at all (a kill, a full disk). Raises RunError."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error}; what was there is as it was") from None
    finally:
        temporary.unlink(missing_ok=True)


def save_picture(path, figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write(path, buffer.getvalue())


def read_metrics(directory):
    """The rows of a run's metrics.jsonl, a dict for each evaluated epoch."""
    return [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]


def read_checkpoint(path):
    """What `Run.save` wrote: config, state and metrics. Raises RunError where the file is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # checksums, which torch.load does not look at
                raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # data only, never code
        return {name: checkpoint[name] for name in ("config", "state", "metrics")}
    except OSError as error:
        raise RunError(f"cannot read {path}: {error}") from None
    except Exception as error:  # torch raises many kinds for a damaged file
        raise RunError(f"{path} is damaged ({type(error).__name__}): start anew with --overwrite") from None


@contextlib.contextmanager
def one_line_errors(*kinds):
    """Turns RunError, `kinds` and lack of memory into one line and exit status 1, and Ctrl-C into exit status 130."""
    try:
        yield
    except (RunError, *kinds) as error:
        sys.exit("error: " + " ".join(str(error).split()))
    except (RuntimeError, MemoryError) as error:
        on_cpu = "can't allocate memory" in str(error)
        if not on_cpu and not isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            raise
        sys.exit("error: not enough memory for these sizes: take smaller batches or a smaller model; " + KEPT)
    except KeyboardInterrupt:
        print("\nstopped: what was written is kept; a training run continues with --resume", file=sys.stderr)
        sys.exit(130)
