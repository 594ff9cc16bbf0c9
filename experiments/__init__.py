"""What the experiments share: flags, training runs and files of results that go on where they stopped, and panels.

Each writes its figures to results/NAME.json and its picture to results/NAME.png, where nothing else is said, and prints
its table of the docs. One that trains by a script leaves the runs under runs/, and continues them; flags that
its --help does not list go to that script.
"""

import argparse
import json
import platform
import re
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

from support import settings
from support.run import RunError, steady_streams, write


def folder(text):
    """The type of --results. The folder is made before the work, so that nothing is lost after it.   -> Path"""
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


FLAGS = {"--results": dict(type=folder, default="results"), "--runs": dict(type=Path, default=Path("runs")),
         "--device": dict(choices=["auto", "cpu", "cuda"], default="auto"),
         "--seeds": dict(type=int, default=3, choices=range(1, 6), help="the number of seeds")}


def command_line(doc, *flags, passes=None):
    """The parser of an experiment with this docstring, with those of FLAGS. Other flags it `passes` to a script."""
    steady_streams()
    parser = argparse.ArgumentParser(description=doc.splitlines()[0], allow_abbrev=False,
                                     epilog=passes and f"Other flags go to {passes}.")
    for flag in flags:
        parser.add_argument(flag, **FLAGS[flag])
    return parser


def passed_on(kind, own, flags):
    """The settings by the experiment's own flags and by the user's, which may not change them.   -> settings"""
    s, alone = settings.parse(kind, [*own, *flags]), settings.parse(kind, own)
    for flag in own:
        name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
        if flag.startswith("--") and vars(s)[name] != vars(alone)[name]:
            sys.exit(f"error: --{name.replace('_', '-')} is set by the experiment: leave it out")
    return s


def trained(script, own, out, flags):
    """Trains by a script, or continues a run that was stopped.   -> its settings, and the rows of its metrics"""
    own = [*own, "--out", str(out)]
    s = passed_on(script.Settings, own, flags)
    script.main([*own, *flags, *["--resume"] * (out / "checkpoint.pt").exists()])
    return s, read_metrics(out)


def read_metrics(directory):
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def machine():
    """What the figures of an experiment were measured on, in words."""
    cpuinfo = Path("/proc/cpuinfo")  # on Linux
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    cpu = f"{model[1] if model else platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu}, {torch.get_num_threads()} threads{gpu}, torch {torch.__version__}"


def record(path, result):
    """Writes a dict to the file as JSON, whole or not at all."""
    write(path, (json.dumps(result, indent=1) + "\n").encode())


def completed(path, jobs, **identity):
    """Runs the jobs whose results are not in the file yet, and writes it after each.   -> all results, by name

    jobs  {name: () -> dict or list}. Raises RunError where the file is of another identity or machine.
    """
    new = json.loads(json.dumps(identity)) | {"machine": machine(), "runs": {}}  # lists for tuples, as in the file
    result = json.loads(path.read_text()) if path.exists() else new
    different = [f"{key} is {result[key]!r} there and {new[key]!r} here"
                 for key in new if key != "runs" and result[key] != new[key]]
    if different:
        raise RunError(f"{path} is of another run: {', '.join(different)}; move it away, or name another --results")
    for name, job in jobs.items():
        if name not in result["runs"]:
            print(name, flush=True)
            result["runs"][name] = job()
            record(path, result)
    return result["runs"]


def panels(rows, columns, width, height, **more):
    """A figure of this size in inches, and its axes (rows, columns), each with a grid."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **more)
    for one in axes.flat:
        one.grid(alpha=0.3)
    return figure, axes


def sheet(images, shape, down):
    """Images in a grid, with words beside its rows.   (rows, columns, …) -> figure"""
    rows, columns, (C, H, W) = *images.shape[:2], shape
    left, width, height = 0.1 * max(map(len, down)), 0.5 * columns, 0.5 * rows * H / W  # inches
    figure = Figure(figsize=(left + width, height))
    axes = figure.add_axes((left / (left + width), 0, width / (left + width), 1))
    pixels = images.view(rows, columns, C, H, W).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (rows H, …, C)
    axes.imshow(pixels.clamp(0, 256).numpy() / 256, cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.set_yticks([H * (i + 0.5) for i in range(rows)], down)
    axes.tick_params(length=0)
    return figure
