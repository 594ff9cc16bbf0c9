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

import torch
import torch.distributed as dist
from tqdm import tqdm

PICTURES = ("curves.png", "samples.png", "density.png", "mode_weights.png")
REMEDY = "lower --lr, or take settings nearer to the defaults; the last checkpoint, if there is one, is kept"


class RunError(Exception):
    """Something that the user can put right. The message is one line and says how."""


class Run:
    """One training run in its directory: config.json, checkpoint.pt, metrics.jsonl and pictures.

    s       the settings; those that decide the result, and **data, are the identity that a checkpoint must have
    parts   what is saved beside numbers, and put back with --resume: anything with a state_dict
    state   what else is saved, as it is at the beginning; {"epoch": -1} comes to it

    `state` is then what was saved, and `metrics` a list of rows. Raises RunError where the directory holds a run that
    may not be replaced, is damaged, or is of other settings or data.
    """

    def __init__(self, s, parts, state={}, **data):
        self.directory, self.config, self.parts = s.out, s.config() | data, parts
        self.state, self.metrics, checkpoint = {"epoch": -1} | state, [], s.out / "checkpoint.pt"
        s.out.mkdir(parents=True, exist_ok=True)
        if first_process():
            try:
                import fcntl  # the lock ends with the process, even by a kill
                fcntl.lockf(os.open(s.out / ".lock", os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"another process writes to {s.out}: wait, or name another --out") from None
            except (ImportError, OSError):  # Windows and some file systems have no locks
                pass
        if s.resume:
            with intact(checkpoint):
                saved = read_checkpoint(checkpoint)
                there, state, rows = saved["config"], saved["state"], saved["metrics"]
                free = {"epochs"} if there.get("schedule") == "steps" else set()  # which does not look at their number
                different = [f"{k} is {there.get(k)} there and {self.config.get(k)} here"
                             for k in sorted({*there, *self.config} - free) if there.get(k) != self.config.get(k)]
                if different:
                    raise RunError(f"{checkpoint} belongs to other settings: " + ", ".join(different))
                for optimizer in [part for part in parts.values() if state["epoch"] and hasattr(part, "step")]:
                    for p in optimizer.param_groups[0]["params"]:
                        p.grad = torch.zeros_like(p)
                    optimizer.step()  # its moments come with its first step
                # What is put back must look like what is here: fused Adam would write past the end of short moments.
                here = self.state | {name: part.state_dict() for name, part in parts.items()}
                figures = [[r["epoch"], r["step"], r["seconds"], r["loss"] or 0.0, r["val_nll"] or 0.0] for r in rows]
                if form([state, figures]) != form([here, [[0, 0, 0.0, 0.0, 0.0]] * (state["epoch"] + 1)]):
                    raise ValueError
                self.state, self.metrics = state, rows
                for name, part in parts.items():
                    part.load_state_dict(self.state[name])
        elif first_process() and checkpoint.exists() and not s.overwrite:
            raise RunError(f"{s.out} already holds a run: continue it with --resume, replace it with --overwrite, "
                           "or name another --out")
        write(s.out / "config.json", (json.dumps(self.config, indent=2) + "\n").encode())
        for name in ("checkpoint.pt", "metrics.jsonl", *PICTURES) if s.overwrite and first_process() else ():
            (s.out / name).unlink(missing_ok=True)
        print(textwrap.fill(str(self.config).strip("{}").replace("'", ""), 120), flush=True)
        self.start, self.told = time.perf_counter(), []  # of the first epoch here; times of its steps 10 and 20

    def watch(self, epoch, batches):
        """The batches of an epoch, behind a progress bar if standard error is a terminal. Afterwards `means` holds the
        means of what the loop `record`ed, and batches per second. Raises RunError where a figure is not finite, and
        names the first such step. It looks every 50 steps, since a GPU must be waited for to look. After 20 steps it
        says how long the run will take, if that is more than an hour."""
        self.trace, self.names, start = [], (), time.perf_counter()
        bar = tqdm(batches, f"epoch {epoch}", leave=False, dynamic_ncols=True, disable=not first_process() or None)
        for step, batch in enumerate(bar, start=1):
            yield batch
            if step in (10, 20) and len(self.told) < 2:  # the first steps set things up
                self.trace[-1].cpu()  # waits for a GPU
                self.told.append(time.perf_counter())
                steps = len(batches) * (self.config["epochs"] - epoch + 1)
                if step == 20 and (hours := (self.told[1] - self.told[0]) / 10 * steps / 3600) > 1:
                    print(f"this will take about {hours:.1f} hours", flush=True)
            if step % 50 == 0 or step == len(batches):
                first = (step - 1) // 50 * 50
                recent = torch.stack(self.trace[first:]).cpu()  # (50, figures)
                for i in (~recent.isfinite().all(1)).nonzero()[:1, 0]:
                    figures = ", ".join(f"{name} {value:g}" for name, value in zip(self.names, recent[i].tolist()))
                    raise RunError(f"not finite at epoch {epoch}, step {first + i + 1} ({figures}): {REMEDY}")
                bar.set_postfix(loss=f"{recent[:, 0].mean():.4g}", refresh=False)
        self.means = dict(zip(self.names, torch.stack(self.trace).mean(0).tolist())) if self.trace else {}
        self.means["batches_per_second"] = len(batches) / (time.perf_counter() - start) if self.trace else None

    def record(self, figures):
        """Keeps the figures of a step, {name: ()}, on their device. The first is the loss."""
        self.names = [*figures]
        self.trace.append(torch.stack([*figures.values()]))

    def save(self, row, state, shown=()):
        """Ends an epoch: adds the row and its seconds to the metrics, prints `shown`, writes checkpoint and metrics.
        Raises RunError where val_nll is a number, and not finite."""
        if row["val_nll"] is not None and not math.isfinite(row["val_nll"]):
            raise RunError(f"the validation NLL is {row['val_nll']} after epoch {row['epoch']}: {REMEDY}")
        row["seconds"] = time.perf_counter() - self.start + (self.metrics[-1]["seconds"] if self.metrics else 0.0)
        self.metrics.append(row)
        print(f"epoch {row['epoch']:4}" + "".join(f"  {name} {row[name]:.6g}" for name in ("val_nll", *shown)
                                                  if row.get(name) is not None), flush=True)
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        buffer = io.BytesIO()
        torch.save({"config": self.config, "state": state, "metrics": self.metrics}, buffer)
        write(self.directory / "checkpoint.pt", buffer.getvalue())
        write(self.directory / "metrics.jsonl", ("\n".join(map(json.dumps, self.metrics)) + "\n").encode())
        self.start = time.perf_counter()

    def finish(self, figures, words=None):
        """Adds the final figures to the last row of the metrics, and prints them, or those that have `words`."""
        self.metrics[-1] |= figures
        start, end = (self.metrics[i]["val_nll"] for i in (0, -1))
        if (end or -math.inf) > (start or math.inf):
            print(f"warning: the validation NLL rose from {start:.6g} to {end:.6g}: {REMEDY}", file=sys.stderr)
        write(self.directory / "metrics.jsonl", ("\n".join(map(json.dumps, self.metrics)) + "\n").encode())
        shown = {name: figures[name] for name in words or figures if name in figures}
        for name, value in (shown | {"minutes": self.metrics[-1]["seconds"] / 60}).items():
            values = value if isinstance(value, list) else [value]
            line = f"{name:24}" + " ".join(f"{v:.4f}" if isinstance(v, float) else str(v) for v in values)
            print(f"{line:56}{words.get(name, '')}".rstrip() if words else line)
        print(f"{'written to':24}{self.directory}", flush=True)


def form(x):
    """What a saved value must share with a fresh one: structure, types and shapes; no tensor has nan or inf."""
    return torch.utils._pytree.tree_map(lambda t: (t.shape, t.dtype, bool(t.isfinite().all())) if torch.is_tensor(t)
                                        else (type(t), t == t), x)


def first_process():
    """Whether this is the process that writes: the only one, or under torchrun the first."""
    return not dist.is_initialized() or dist.get_rank() == 0


def write(path, data):
    """Writes a file that appears under its name complete, or not at all (a kill, a full disk), in the first process."""
    temporary = path.with_name(f".{path.name}.part")
    if first_process():
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def intact(path):
    """Around what reads a checkpoint. Raises RunError where it is missing, damaged, or of another version."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:  # torch raises many kinds
        raise RunError(f"cannot use {path} ({type(error).__name__}): it is missing, damaged, or of another version of "
                       "this code; start anew with --overwrite") from None


def read_checkpoint(path):
    """What `Run.save` wrote: {"config", "state", "metrics"}. Raises RunError like `intact`."""
    with intact(path), zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:  # checksums, which torch.load does not look at
            raise zipfile.BadZipFile
        return torch.load(path, map_location="cpu", weights_only=True)  # data only, never code


def steady_streams():
    """Printing ends no run: a character that standard output lacks becomes "?", and a closed stream swallows all."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w", errors="replace") for stream in (sys.stdout, sys.stderr))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


@contextlib.contextmanager
def one_line_errors(*kinds):
    """Turns RunError, OSError and `kinds` into one line and exit status 1, Ctrl-C into status 130."""
    try:
        yield
    except (RunError, OSError, *kinds) as error:
        sys.exit("error: " + " ".join(str(error).split()))
    except KeyboardInterrupt:
        print("\nstopped: what was written is kept; a training run continues with --resume", file=sys.stderr)
        sys.exit(130)
