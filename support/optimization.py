"""What every training loop does to its parameters beside the optimiser's step: learning rate and moving average."""

import math

from torch.optim.swa_utils import get_ema_multi_avg_fn


def trainable(model):
    """The parameters that are trained.   -> list"""
    return [p for p in model.parameters() if p.requires_grad]


def cosine(progress, plateau=0.0):
    """The learning rate as a fraction of its peak. `progress` is the fraction of the run that is over.

    It rises linearly from 0 over the first 5 %. From `plateau` on it falls to 0 along half a cosine.
    """
    fall = max(0.0, (progress - plateau) / (1 - plateau))
    return min(1.0, progress / 0.05) * 0.5 * (1 + math.cos(math.pi * fall))


def update_average(averages, parameters, n, m=0.999):
    """EMA after step n = 0, 1, …: θ̃ ← mθ̃ + (1-m)θ (poster, Eq. (11)), in place, of two lists of tensors.

    As in the authors' code, m is at most (1+n)/(10+n), so that θ̃ soon forgets where it began. ours: m = 0 at n = 0,
    so θ̃ starts at the weights after the first step. The loop tells n: a count on a GPU would have to be waited for.
    """
    m = min(m, (1 + n) / (10 + n)) if n else 0.0
    get_ema_multi_avg_fn(m)(averages, parameters, n)
