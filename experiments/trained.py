"""The models of finished runs, with the weights of the best epoch."""

from ebflow import EBFlow, toy_flow
from support import settings
from support.run import RunError, read_checkpoint
from train_mnist import build


def load_mnist(directory, images):
    """A run on images of this size.   -> settings, pre-processing, flow of z, and flow of x, with its best weights

    Raises RunError where there is no whole checkpoint, or one that does not fit.
    """
    checkpoint = read_checkpoint(directory / "checkpoint.pt")
    config = checkpoint["config"]
    try:
        if config.pop("images")[1:] != list(images.shape[1:]) or config.pop("sha256") is None:
            raise RuntimeError  # as load_state_dict would
        s = settings.Mnist(**config)
        pre, flow = build(s, images)
        model = EBFlow([*pre.layers, *flow.layers], pre.shape)
        model.load_state_dict(checkpoint["state"]["best"]["model"])
    except (TypeError, KeyError, RuntimeError):
        raise RunError(f"{directory} is not trained yet, on images of another size, or of another version of this "
                       "code") from None
    return s, pre, flow, model


def load_toy(directory):
    """The flow of a run with its best weights. Raises RunError where there is no whole checkpoint that fits."""
    checkpoint = read_checkpoint(directory / "checkpoint.pt")
    config = checkpoint["config"]
    try:
        flow = toy_flow(blocks=config["blocks"], width=config["width"])
        flow.load_state_dict(checkpoint["state"]["best"]["model"])
    except (KeyError, TypeError, RuntimeError):
        raise RunError(f"{directory} is no run of train_toy.py, or one of another version of this code") from None
    return flow
