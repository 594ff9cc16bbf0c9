"""The settings of a script: one line for each says default, help, range or choices, and what it belongs to."""

import argparse
import math
import operator
from dataclasses import dataclass, field, fields
from pathlib import Path

from support.run import steady_streams

LIMITS = {"above": (operator.gt, "above"), "least": (operator.ge, "at least"),
          "below": (operator.lt, "below"), "most": (operator.le, "at most")}


def setting(default, help, choices=None, of=(), decides=True, **limits):
    """A field of a settings class. `of` names the objectives, architectures, … that have it (none: all do).

    limits: above, least, below, most. What does not `decide` the result is left out of config.json.
    """
    return field(default=default, metadata=dict(help=help, choices=choices, of=of, decides=decides, limits=limits))


@dataclass
class Settings:
    """What all three scripts have. A script's class adds its own, the NAME of a run, and recipe() -> dict."""
    epochs: int = setting(20, "epochs; the model is evaluated after each", above=0)
    batch_size: int = setting(100, "samples in a step", above=0)
    lr: float = setting(1e-4, "highest learning rate", above=0)
    seed: int = setting(0, "start of all random numbers", least=0, below=2**32)
    device: str = setting("auto", "auto takes a GPU if torch sees one", choices=("auto", "cpu", "cuda"), decides=False)
    out: Path = setting(None, "directory of the run; by default runs/ and the names of what is trained", decides=False)
    resume: bool = setting(False, "continue from the checkpoint in --out", decides=False)
    overwrite: bool = setting(False, "replace the run in --out", decides=False)

    def config(self):
        """What decides the result: the settings that the run has, for config.json and for the reader.   -> dict"""
        chosen = {vars(self).get(name) for name in ("arch", "loss", "schedule", "data", "sampler")}
        return {f.name: vars(self)[f.name] for f in fields(self)
                if f.metadata["decides"] and (not f.metadata["of"] or not chosen.isdisjoint(f.metadata["of"]))}


def parse(kind, argv=None):
    """The settings of a run: defaults of `kind`, then its recipe, then the flags. A wrong one exits with one line."""
    steady_streams()
    parser = argparse.ArgumentParser(usage="%(prog)s [--help] [--SETTING VALUE ...]", add_help=False)
    for f in fields(kind):
        text = f.metadata["help"] + " (default: %(default)s" + "; only " * bool(f.metadata["of"])
        how = dict(type=f.type, choices=f.metadata["choices"])
        if f.type is bool:
            how = dict(action=argparse.BooleanOptionalAction if f.default else "store_true")
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default,
                            help=text + ", ".join(f.metadata["of"]) + ")", **how)
    parser.set_defaults(**kind(**vars(parser.parse_known_args(argv)[0])).recipe())
    parser.add_argument("-h", "--help", action="help")  # only now, so that it shows the recipe
    s = kind(**vars(parser.parse_args(argv)))
    name, config = s.NAME.format(**vars(s)), s.config()
    for f in fields(s):
        value, flag = vars(s)[f.name], "--" + f.name.replace("_", "-")
        if f.metadata["decides"] and f.name not in config and value != parser.get_default(f.name):
            parser.error(f"{flag} is not a setting of {name}")
        for limit, bound in f.metadata["limits"].items():
            holds, words = LIMITS[limit]
            if not (math.isfinite(value) and holds(value, bound)):
                parser.error(f"{flag} must be {words} {bound}, not {value}")
    if s.resume and s.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    s.out = s.out or Path("runs") / name
    return s
