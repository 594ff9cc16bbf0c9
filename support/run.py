"""The directory of a run, its checkpoint (written whole or not at all), its progress bar, and errors of one line."""

import contextlib
import io
import json
import math
import os
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from sampling import SamplingError
from support import STOPPED

PICTURES = ("curves.png", "samples.png", "density.png", "mode_weights.png")
KEPT = "the last checkpoint, if there is one, is kept"
UNTRAINED = "no step was taken yet, so a setting of the model or of the objective is too small or too large"
OTHER_VERSION = "the checkpoint is of another version of this code: start anew with --overwrite"


class RunError(Exception):
    """Something that the user can put right. The message is one line and says how."""


class State(dict):
    """A dictionary from a checkpoint: a name that it lacks raises RunError."""

    def __missing__(self, name):
        raise RunError(OTHER_VERSION)


class Run(contextlib.AbstractContextManager):
    """One training run in its directory: config.json, checkpoint.pt, metrics.jsonl and pictures.

        with Run(s, "lower --lr", dict(model=model, optimizer=optimizer), sha256=…) as run:

    s       the settings; those that decide the result, and **data, are the identity that a checkpoint must have
    remedy  what to do where a loss, a gradient or the validation NLL is not finite
    parts   what is saved beside numbers, and put back with --resume: anything with a state_dict

    `state` is what else was saved, {"epoch": -1} at the beginning, and `metrics` a list of rows. A singular weight or
    lost chains inside become a RunError that names the step. Under torchrun only the first process writes. It locks the
    directory, and a kill unlocks it.
    Raises RunError where the directory is locked, or holds a run that may not be replaced or does not fit.
    """

    def __init__(self, s, remedy, parts, **data):
        self.directory, self.config, self.remedy, self.parts = s.out, s.config() | data, remedy, parts
        self.state, self.metrics, self.at = State(epoch=-1), [], "before the first step"
        self.first = not dist.is_initialized() or dist.get_rank() == 0  # of several processes
        config, checkpoint, metrics = s.out / "config.json", s.out / "checkpoint.pt", s.out / "metrics.jsonl"
        with contextlib.ExitStack() as stack:  # unlocks where anything fails
            try:
                s.out.mkdir(parents=True, exist_ok=True)
                taken = [self.first and not lock(s.out, stack)]
            except OSError as error:
                raise RunError(f"cannot write to {s.out}: {error}") from None
            if dist.is_initialized():
                dist.broadcast_object_list(taken)
            if taken[0]:
                raise RunError(f"another process writes to {s.out}: wait until it has ended, or name another --out")
            if s.resume and checkpoint.exists():
                self._restore(checkpoint)
            elif s.resume and config.exists():  # it was killed before its first checkpoint
                self._compare(config, read_config(config))
            elif s.resume:
                raise RunError(f"nothing to resume: there is no {checkpoint}; start the run without --resume")
            elif not s.overwrite and (config.exists() or checkpoint.exists() or metrics.exists()):
                raise RunError(f"{s.out} already holds a run: continue it with --resume, replace it with --overwrite, "
                               "or name another --out")
            if dist.is_initialized():
                dist.barrier()  # all have looked before the first one writes
            if self.first:
                for name in ("checkpoint.pt", "metrics.jsonl", *PICTURES) if s.overwrite else ():
                    (s.out / name).unlink(missing_ok=True)
                write(config, (json.dumps(self.config, indent=2) + "\n").encode())
            self.unlock = stack.pop_all().close
        print(textwrap.fill(str(self.config).strip("{}").replace("'", ""), 120), flush=True)
        self.start = time.perf_counter()  # of the first epoch here

    def _compare(self, path, config):
        free = {"epochs"} if self.config.get("schedule") == "steps" else set()  # which does not look at their number
        different = [f"{k} is {config.get(k)} there and {self.config.get(k)} here"
                     for k in sorted({*config, *self.config} - free) if config.get(k) != self.config.get(k)]
        if different:
            raise RunError(f"{path} belongs to other settings: " + ", ".join(different))

    def _restore(self, path):
        checkpoint = read_checkpoint(path)
        self._compare(path, checkpoint["config"])
        self.state, self.metrics = State(checkpoint["state"]), checkpoint["metrics"]
        try:
            for name, part in self.parts.items():
                part.load_state_dict(self.state[name])
            best = self.state.get("best", {"val_nll": 0.0, "model": {}})
            numbers = [best["val_nll"], len(best["model"]), *(row["seconds"] for row in self.metrics)]
            if None in numbers or len(numbers) != self.state["epoch"] + 3:  # a row for each epoch
                raise ValueError
        except torch.OutOfMemoryError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError):  # of torch, when names or shapes differ
            raise RunError(OTHER_VERSION) from None
        if self.state["epoch"] > self.config.get("epochs", math.inf):
            raise RunError(f"{path} is of epoch {self.state['epoch']}: raise --epochs")

    def __exit__(self, kind, error, traceback):
        self.unlock()
        if isinstance(error, (torch.linalg.LinAlgError, SamplingError)):
            raise RunError(f"{error}, {self.at}: {self._remedy(self.at)}") from None

    def _remedy(self, at):
        """What to do about what happened there. Where no step was taken, the learning rate is not the cause."""
        return f"{UNTRAINED if at in ('after epoch 0', 'at epoch 1, step 1') else self.remedy}; {KEPT}"

    def watch(self, epoch, batches):
        """The batches of an epoch, behind a progress bar if standard error is a terminal. Afterwards `means` holds the
        means of what the loop `record`ed, and batches per second. Raises RunError where a figure is not finite, and
        names the first such step. It looks every 50 steps, since a GPU must be waited for to look."""
        self.trace, self.names, steps, start = [], (), len(batches), time.perf_counter()
        silent = None if self.first else True  # None: where there is no terminal
        with tqdm(total=steps, desc=f"epoch {epoch}", leave=False, dynamic_ncols=True, disable=silent) as bar:
            for step, batch in enumerate(batches, start=1):
                self.at = f"at epoch {epoch}, step {step}"
                yield batch
                if step % 50 == 0 or step == steps:
                    self._look(epoch, step, bar)
        self.at = f"after epoch {epoch}"
        self.means = dict(zip(self.names, torch.stack(self.trace).mean(0).tolist())) if self.trace else {}
        self.means["batches_per_second"] = steps / (time.perf_counter() - start) if self.trace else None

    def _look(self, epoch, step, bar):
        first = (step - 1) // 50 * 50
        recent = torch.stack(self.trace[first:]).cpu()  # (50, figures)
        for i in (~recent.isfinite().all(1)).nonzero()[:1, 0]:
            figures = ", ".join(f"{name} {value:g}" for name, value in zip(self.names, recent[i].tolist()))
            at = f"at epoch {epoch}, step {first + i + 1}"
            raise RunError(f"not finite {at} ({figures}): {self._remedy(at)}")
        bar.set_postfix(loss=f"{recent[:, 0].mean():.4g}", refresh=False)
        bar.update(step - first)

    def record(self, figures):
        """Keeps the figures of a step, {name: ()}, on their device. The first is the loss."""
        self.names = [*figures]
        self.trace.append(torch.stack([*figures.values()]))

    def save(self, row, state, shown=()):
        """Ends an epoch: adds the row and its seconds to the metrics, prints `shown`, writes checkpoint and metrics.

        Raises RunError where val_nll is a number, and not finite.
        """
        if row["val_nll"] is not None and not math.isfinite(row["val_nll"]):
            at = f"after epoch {row['epoch']}"
            raise RunError(f"the validation NLL is {row['val_nll']} {at}: {self._remedy(at)}")
        row["seconds"] = time.perf_counter() - self.start + (self.metrics[-1]["seconds"] if self.metrics else 0.0)
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
        self.start = time.perf_counter()

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


def lock(directory, stack):
    """Locks a directory until `stack` is closed or the process ends, even by a kill.   -> False where another has it"""
    try:
        import fcntl
        descriptor = os.open(directory, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows and some file systems have no locks
        pass
    return True


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


def read_config(path):
    """What is in a config.json. Raises RunError where it is missing or damaged."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}): start anew with --overwrite") from None


def read_checkpoint(path):
    """What `Run.save` wrote: config, state and metrics. Raises RunError where the file is missing or damaged."""
    try:
        if not path.is_file():  # a pipe would wait for someone to write
            raise FileNotFoundError("there is no such file")
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # checksums, which torch.load does not look at
                raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # data only, never code
        return {name: kind(checkpoint[name]) for name, kind in (("config", dict), ("state", dict), ("metrics", list))}
    except OSError as error:
        raise RunError(f"cannot read {path}: {error}") from None
    except Exception as error:  # torch raises many kinds for a damaged file
        raise RunError(f"{path} is damaged ({type(error).__name__}): start anew with --overwrite") from None


@contextlib.contextmanager
def one_line_errors(*kinds):
    """Turns RunError, OSError, `kinds` and lack of memory into one line and exit status 1, Ctrl-C into status 130."""
    try:
        yield
        print(end="", flush=True)
    except (RunError, OSError, *kinds) as error:
        if isinstance(error, OSError):  # perhaps of a full standard output, which Python would flush again at the end
            sys.stdout = None
        sys.exit("error: " + " ".join(str(error).split()))
    except (RuntimeError, MemoryError) as error:
        on_cpu = "can't allocate memory" in str(error)
        if not on_cpu and not isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            raise
        sys.exit("error: not enough memory for these sizes: take smaller batches or a smaller model; " + KEPT)
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        sys.exit(130)
