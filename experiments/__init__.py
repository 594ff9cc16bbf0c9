import platform

import torch


def machine():
    """What the figures of an experiment were measured on, in words."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
