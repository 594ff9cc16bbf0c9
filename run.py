"""What every training run shares: a directory that is never overwritten by accident, checkpoints that are
written whole or not at all, a metrics log, and errors of one line."""

import contextlib
import json
import os
import sys
import zipfile
from pathlib import Path

import torch


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
            # killed before its first checkpoint: the beginning is where it goes on
            return self._compare(path.with_name("config.json"), json.loads(path.with_name("config.json").read_bytes()))
        try:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:  # checksums, which torch.load does not look at
                    raise zipfile.BadZipFile
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # data only, never code
            config, self.state, self.metrics = (checkpoint[k] for k in ("config", "state", "metrics"))
        except Exception as error:  # torch raises many kinds for a damaged file
            raise RunError(f"{path} is damaged ({type(error).__name__}): delete it and start anew with --overwrite") from None
        self._compare(path, config)

    def _compare(self, path, config):
        different = [f"{k} is {config.get(k)} there and {self.config.get(k)} here"
                     for k in sorted({*config, *self.config}) if config.get(k) != self.config.get(k)]
        if different:
            raise RunError(f"{path} belongs to other settings: " + ", ".join(different))

    def save(self, state):
        """Writes the checkpoint, then the metrics log that belongs to it."""
        checkpoint = {"config": self.config, "state": state, "metrics": self.metrics}
        with self._whole("checkpoint.pt") as file:
            torch.save(checkpoint, file)
        self.state = state
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
