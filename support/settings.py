"""Every setting of the training scripts in one line: default, help, range or choices, and what it belongs to.

A recipe is one line, too: what an architecture and an objective change of the defaults. A flag changes one setting.
`python train_mnist.py --arch cnn --loss dsm --help` prints every setting with the default of this recipe.
"""

import argparse
import math
import operator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from data import MNIST
from losses import OBJECTIVES


def setting(default, help, choices=None, of=(), decides=True, **limits):
    """A field of a settings class. `of` names the objectives, architectures, … that have it (none: all do).

    limits: above, least, below, most, apart (from 0). What does not `decide` the result is left out of config.json.
    """
    return field(default=default, metadata=dict(help=help, choices=choices, of=of, decides=decides, limits=limits))


LIMITS = {"above": (operator.gt, "above"), "least": (operator.ge, "at least"),
          "below": (operator.lt, "below"), "most": (operator.le, "at most"),
          "apart": (operator.ge, "away from 0 by at least")}
SIZE = dict(above=0, most=10**6)  # what is larger is a slip of the pen, and would fill the memory before it fails


@dataclass
class Settings:
    """What all three scripts have."""
    epochs: int = setting(20, "epochs; the model is evaluated after each", above=0)
    batch_size: int = setting(100, "samples in a step", **SIZE)
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


@dataclass
class Mnist(Settings):
    """train_mnist.py"""
    NAME = "mnist-{arch}-{loss}"
    loss: str = setting("dsm", "objective, see losses.py", choices=OBJECTIVES)
    arch: str = setting("fc", "architecture, see ebflow.py", choices=("fc", "cnn", "glow"))
    paper: bool = setting(False, "the published recipe in place of ours")
    data: Path = setting(MNIST, "directory of MNIST's or CIFAR-10's files, or a .npy file of bytes", decides=False)
    flip: bool = setting(False, "mirror the images of every other batch")
    map: bool = setting(True, "MaP: match after pre-processing")
    ema: bool = setting(True, "EMA: evaluate the moving average of the weights")
    optimizer: str = setting("adam", "optimiser", choices=("adam", "rmsprop"))
    weight_decay: float = setting(0.0, "L2 penalty, as the optimiser applies it", least=0, below=1)
    schedule: str = setting("cosine", "learning rate: cosine (ours), or the published steps",
                            choices=("cosine", "steps"))
    decay: float = setting(0.95, "factor after each of the first 49 epochs", above=0, most=1, of=("steps",))
    clip: float = setting(0.0, "largest norm of the gradient; 0: any", least=0)
    s: float = setting(1.0, "scale of the logits: z = logit(x / 256) / s", least=0.01, most=100)
    normalize: str = setting("center", "ours: raw logits; mean 0; mean 0 and variance 1; mean 0 and covariance I",
                             choices=("none", "center", "scale", "whiten"))
    diagonal: float = setting(1.0, "weights start at diagonal · I", least=-10, most=10, apart=0.1, of=("fc", "cnn"))
    bias: float = setting(0.0, "biases start at this; of a CNN at random, this times Xavier's deviation", least=0,
                          most=100, of=("fc", "cnn"))
    bend: float = setting(0.0, "ours: the activation bends at -bend and is 0 at 0; None in --paper",
                          least=-1000, most=1000, of=("fc", "cnn"))
    actnorm: str = setting("none", "last layer: none, a trained actnorm, (ours) one that tracks its input's moments; "
                           "held: it and all others stay at the start's moments",
                           choices=("none", "trained", "moments", "held"))
    width: int = setting(32, "channels of the couplings' networks; 512 as published", **SIZE, of=("glow",))
    depth: int = setting(4, "steps of a block; 16 as published", above=0, most=1000, of=("glow",))
    floor: float = setting(0.0, "ours: smallest scale of a coupling; 0: none", least=0, below=1, of=("glow",))
    coupling: str = setting("sigmoid", "scale of a coupling, see layers.py; with tanh, networks have LeakyReLU, too",
                            choices=("sigmoid", "tanh"), of=("glow",))
    model_samples: int = setting(100, "samples of the model in a step", **SIZE, of=("sml",))
    sigma: float = setting(0.4, "noise on the data: dsm's σ; ours: added for ssm and fdssm, too", least=0,
                           most=1000, of=("ssm", "dsm", "fdssm"))
    xi: float = setting(1.0, "length ξ of the finite difference", least=1e-3, most=1000, of=("fdssm",))
    energy_weight: float = setting(0.0, "λ of an added λ E(z); published for Glow", least=0,
                                   of=("ssm", "dsm", "fdssm"))
    compile: bool = setting(False, "torch.compile the gradient, on a CPU", decides=False)

    def recipe(self):
        return (PAPER if self.paper else RECIPES).get(f"{self.arch} {self.loss}")


FC = dict(epochs=8, normalize="whiten", diagonal=2.0, actnorm="moments", sigma=0.7)
CNN_ML = dict(epochs=5, lr=1e-2, normalize="whiten", diagonal=0.6, bend=1.0)
CNN = dict(epochs=6, lr=5e-4, normalize="whiten", diagonal=-0.6, actnorm="moments")
GLOW_ML = dict(epochs=5, lr=1e-3, clip=500.0, actnorm="trained")
GLOW = dict(epochs=5, lr=1e-3, normalize="whiten", floor=0.5, actnorm="moments")
RECIPES = {  # ours
    "fc ml":      dict(epochs=40, batch_size=200, lr=6e-3),
    "fc sml":     dict(epochs=25, batch_size=200, lr=3e-3, model_samples=400),
    "fc ssm":     FC,
    "fc dsm":     FC,
    "fc fdssm":   FC | dict(epochs=16, batch_size=500),
    "cnn ml":     CNN_ML,
    "cnn sml":    CNN_ML,
    "cnn ssm":    CNN | dict(epochs=8, clip=1000.0),
    "cnn dsm":    CNN,
    "cnn fdssm":  CNN | dict(epochs=30, batch_size=1000, lr=1e-3, xi=0.5),
    "glow ml":    GLOW_ML,
    "glow sml":   GLOW_ML | dict(lr=3e-4, floor=0.5),
    "glow ssm":   GLOW | dict(clip=100.0),
    "glow dsm":   GLOW,
    "glow fdssm": GLOW,
}
PAPER_FC = dict(epochs=10_000, optimizer="rmsprop", schedule="steps", s=0.5, normalize="none", diagonal=-1.0, bias=1.0,
                bend=None)
PAPER_CNN = PAPER_FC | dict(epochs=1000, s=0.75, bias=0.01)
PAPER_GLOW = dict(epochs=80, lr=1e-5, schedule="steps", decay=1.0, clip=500.0 * 784, normalize="none", actnorm="held",
                  coupling="tanh", width=512, depth=16)
PAPER = {  # the authors divide ssm, dsm and fdssm by D = 784 and sml by 2: clips, penalties and λ are on our scale
    "fc ml":      PAPER_FC,
    "fc sml":     PAPER_FC,
    "fc ssm":     PAPER_FC | dict(sigma=0.0),
    "fc dsm":     PAPER_FC | dict(sigma=1.0),
    "fc fdssm":   PAPER_FC | dict(sigma=0.0, clip=5.0 * 784),
    "cnn ml":     PAPER_CNN | dict(decay=0.925, weight_decay=1e-5),
    "cnn sml":    PAPER_CNN | dict(decay=0.925, weight_decay=1e-5 * 2),
    "cnn ssm":    PAPER_CNN | dict(sigma=0.0),
    "cnn dsm":    PAPER_CNN | dict(sigma=0.1, weight_decay=1e-5 * 784),
    "cnn fdssm":  PAPER_CNN | dict(sigma=0.0, xi=0.1, clip=5.0 * 784),
    "glow ml":    PAPER_GLOW,  # for Glow the authors publish ssm and dsm alone
    "glow sml":   PAPER_GLOW,
    "glow ssm":   PAPER_GLOW | dict(sigma=0.0, energy_weight=0.1 * 784),
    "glow dsm":   PAPER_GLOW | dict(sigma=0.1, energy_weight=0.1 * 784),
    "glow fdssm": PAPER_GLOW | dict(sigma=0.0, xi=0.1, energy_weight=0.1 * 784),
}


@dataclass
class Toy(Settings):
    """train_toy.py"""
    NAME = "toy-{data}-{loss}"
    loss: str = setting("dsm", "objective, see losses.py", choices=OBJECTIVES)
    data: str = setting("swirl", "density, see data.py", choices=("sine", "swirl", "checkerboard"))
    steps: int = setting(250, "steps of an epoch", **SIZE)
    batch_size: int = setting(512, "fresh points in a step", **SIZE)
    lr: float = setting(3e-3, "highest learning rate", above=0)
    plateau: float = setting(0.0, "fraction of the run at the highest learning rate", least=0, below=1)
    blocks: int = setting(10, "blocks of the flow", above=0, most=1000)
    width: int = setting(64, "units in the couplings' networks", **SIZE)
    start_smoothing: float = setting(2.0, "ours: noise on the points at the start; it falls to 0.375", least=0.375,
                                     most=100)
    anneal: float = setting(0.5, "ours: fraction of the run in which it falls", above=0, most=1)
    model_samples: int = setting(512, "samples of the model in a step", **SIZE, of=("sml",))
    xi: float = setting(0.2, "length ξ of the finite difference", least=1e-3, most=1000, of=("fdssm",))
    test_points: int = setting(20_000, "points that the final figures are means over", least=8, most=10**6)
    compile: bool = setting(False, "torch.compile the gradient, on a CPU", decides=False)

    def recipe(self):
        recipe = TOY_RECIPES.get(self.loss, {})
        return recipe | dict(start_smoothing=2.0, anneal=0.5) if self.data == "sine" else recipe  # no turns to unwind


TOY_MATCHING = dict(start_smoothing=6.0, anneal=0.85)
TOY_RECIPES = {"ssm": TOY_MATCHING, "dsm": TOY_MATCHING | dict(anneal=0.7, plateau=0.5), "fdssm": TOY_MATCHING}


def shares(text):
    """Numbers in proportion to the weights of a mixture, as in 1,2,3,4.   -> tuple that sums to 1"""
    values = [float(value) for value in text.split(",")]
    weights = tuple(value / sum(values) for value in values)
    if not all(0 < weight <= 1 for weight in weights):
        raise ValueError  # argparse tells
    return weights


MIXTURES = ("mixture", "gmm40")


@dataclass
class Ebm(Settings):
    """train_ebm.py"""
    NAME = "ebm-{data}-d{dim}-{sampler}"
    data: str = setting("mixture", "density, see data.py",
                        choices=("mixture", "gmm40", "sine", "swirl", "checkerboard"))
    dim: int = setting(2, "dimension of the mixture or of gmm40", least=2, most=4096)
    weights: shares = setting((0.1, 0.2, 0.3, 0.4), "of the modes, as in 1,2,3,4", of=("mixture",))
    distance: float = setting(10.0, "between neighbouring modes, in standard deviations", above=0, most=100,
                              of=("mixture",))
    sampler: str = setting("flow", "chains with jumps by a flow, without, with swaps between temperatures, or short "
                           "ones from noise", choices=("flow", "langevin", "tempering", "short"))
    start: str = setting("equal", "chains in each mode at the start: equally many, or as many as data", of=MIXTURES,
                         choices=("equal", "data"))
    replicas: int = setting(8, "temperatures, from 1 to --hottest in equal ratios", least=2, most=1000,
                            of=("tempering",))
    hottest: float = setting(10.0, "highest temperature", above=1, of=("tempering",))
    base: str = setting("gaussian", "the density that exp(-f) tilts: none, or one fitted to the data",
                        choices=("none", "gaussian", "flow"))
    adjusted: bool = setting(True, "accept or reject Langevin steps (Metropolis)", of=("flow", "langevin", "short"))
    steps: int = setting(50, "updates of θ and of α in an epoch", **SIZE)
    chains: int = setting(1000, "Markov chains", **SIZE)
    batch_size: int = setting(1000, "fresh data in a step", **SIZE)
    local_steps: int = setting(5, "Langevin steps before each jump", **SIZE)
    step_size: float = setting(0.3, "of Langevin at the start; it adapts to accept 57.4 percent", above=0)
    lr: float = setting(2e-3, "highest learning rate of the energy θ", above=0)
    flow_lr: float = setting(2e-3, "highest learning rate of the flow α", above=0)
    energy_width: int = setting(128, "units of the energy's network", **SIZE)
    blocks: int = setting(6, "blocks of the flow", above=0, most=1000)
    width: int = setting(64, "units in the couplings' networks", **SIZE)
    start_steps: int = setting(300, "steps in which the flow is fitted to the data first", least=0)
    test_points: int = setting(20_000, "points of each evaluation; five times as many at the end", least=8, most=10**6)
    mixing_rounds: int = setting(300, "rounds of the chains at the end, in which crossings are counted", above=0)

    def recipe(self):
        return dict(local_steps=20) if self.sampler == "short" else {}


# ---- The command line ------------------------------------------------------------------------------------------------

def parse(kind, argv=None):
    """The settings of a run: defaults of `kind`, then its recipe, then the flags. A wrong one exits with one line."""
    recipe = {}
    usage = "%(prog)s [--help] [--SETTING VALUE ...]"
    for parser in argparse.ArgumentParser(usage=usage, add_help=False), argparse.ArgumentParser(usage=usage):
        for f in fields(kind):  # the first round finds the recipe, and the second one shows its values in --help
            text = f"{f.metadata['help']} (default: {recipe.get(f.name, f.default)}"
            text += f"; only {', '.join(f.metadata['of'])})" if f.metadata["of"] else ")"
            how = dict(type=f.type, choices=f.metadata["choices"])
            if f.type is bool:
                how = dict(action=argparse.BooleanOptionalAction if f.default else "store_true")
            parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **how)
        given = vars(parser.parse_known_args(argv)[0])
        s = kind(**given)
        recipe, name = s.recipe(), kind.NAME.format(**vars(s))
        if recipe is None:
            parser.error(f"there is no recipe for {name}: add a line to support/settings.py")
    parser.parse_args(argv)  # no flag is unknown
    s = kind(**recipe | given)
    for f in fields(s):
        value, flag = vars(s)[f.name], "--" + f.name.replace("_", "-")
        if f.metadata["of"] and f.name not in s.config():
            if f.name in given:
                parser.error(f"{flag} is not a setting of {name}")
            s = replace(s, **{f.name: f.default})
            continue
        if isinstance(value, float) and not math.isfinite(value):
            parser.error(f"{flag} must be a finite number, not {value}")
        for limit, bound in f.metadata["limits"].items():
            if value is not None and not LIMITS[limit][0](abs(value) if limit == "apart" else value, bound):
                parser.error(f"{flag} must be {LIMITS[limit][1]} {bound}, not {value}")
    if s.out is not None and s.out.resolve() == Path.cwd():
        parser.error("--out must be a directory of its own, not the working directory")
    if s.resume and s.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    return replace(s, out=s.out or Path("runs") / name)
