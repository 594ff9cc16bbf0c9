"""What an architecture and an objective change of the defaults of train_mnist.py: our recipes, and the paper's."""

import math

FC = dict(epochs=8, lr=3e-3, normalize="whiten", diagonal=4.0, ratio=6.0, actnorm="moments", sigma=0.35, sml_steps=100,
          model_samples=200)
CNN_ML = dict(epochs=5, lr=1e-2, normalize="whiten", diagonal=0.6, bend=1.0)
CNN = dict(epochs=9, lr=5e-4, clip=500.0, normalize="whiten", diagonal=-0.6, actnorm="moments", sigma=0.35,
           sml_steps=100, sml_lr=3e-4, model_samples=200)
GLOW_ML = dict(epochs=5, lr=1e-3, clip=500.0, actnorm="trained")
GLOW = dict(epochs=5, lr=2e-3, clip=500.0, normalize="whiten", floor=0.5, actnorm="moments", sigma=0.3, sml_steps=100,
            sml_lr=3e-4, model_samples=200)
RECIPES = {  # ours
    "fc ml":      dict(epochs=40, batch_size=200, lr=6e-3),
    "fc sml":     dict(epochs=25, batch_size=200, lr=3e-3, model_samples=400),
    "fc ssm":     FC | dict(lr=2e-3),
    "fc dsm":     FC,
    "fc fdssm":   FC | dict(epochs=16, batch_size=500, lr=1e-4, diagonal=2.0, ratio=1.0, sigma=0.7),
    "cnn ml":     CNN_ML,
    "cnn sml":    CNN_ML,
    "cnn ssm":    CNN,
    "cnn dsm":    CNN,
    "cnn fdssm":  CNN | dict(epochs=30, batch_size=1000, lr=1e-3, clip=0.0, sigma=0.4, xi=0.5, sml_steps=0),
    "glow ml":    GLOW_ML,
    "glow sml":   GLOW_ML | dict(lr=3e-4, floor=0.5),
    "glow ssm":   GLOW | dict(lr=1e-3, clip=100.0, sigma=0.4, sml_steps=0),
    "glow dsm":   GLOW,
    "glow fdssm": GLOW | dict(lr=1e-3, clip=0.0, sigma=0.4, sml_steps=0),
}


def paper(image):
    """The published recipes, for images (C, H, W): of CIFAR-10 if they are 3 × 32 × 32, else of MNIST.

    The authors divide ssm, dsm and fdssm by D and sml by 2: clips, penalties and λ are on our scale here.
    """
    D = math.prod(image)
    fc = dict(epochs=10_000, optimizer="rmsprop", schedule="steps", s=0.5, normalize="none", diagonal=-1.0, bias=1.0,
              bend=None)
    cnn = fc | dict(epochs=1000, s=0.75, bias=0.01)
    if tuple(image) == (3, 32, 32):
        fc, cnn = fc | dict(augment=True), cnn | dict(augment=True, epochs=10_000)
        noise, few = dict(sigma=0.0, energy_weight=1.024), dict(decay=0.7, decays=19)
        return {
            "fc ml":     fc | few,
            "fc sml":    fc | few,
            "fc ssm":    fc | noise | dict(decay=0.85, decays=29),
            "fc dsm":    fc | noise | dict(decay=0.85, decays=29, sigma=0.1),
            "fc fdssm":  fc | few | dict(sigma=0.0, xi=0.1, energy_weight=307.2),
            "cnn ml":    cnn | dict(decay=0.8, decays=19, spectral=True),
            "cnn sml":   cnn | dict(decay=0.8, decays=19),
            "cnn ssm":   cnn | noise | dict(decay=0.9, decays=19, spectral=True),
            "cnn dsm":   cnn | noise | dict(decay=0.8, decays=19, spectral=True, sigma=0.1),
            "cnn fdssm": cnn | dict(decay=0.85, decays=49, sigma=0.0, xi=0.1, energy_weight=307.2),
        }
    glow = dict(epochs=80, lr=1e-5, schedule="steps", decay=1.0, clip=500.0 * D, normalize="none", actnorm="held",
                coupling="tanh", width=512, depth=16)
    return {
        "fc ml":      fc,
        "fc sml":     fc,
        "fc ssm":     fc | dict(sigma=0.0),
        "fc dsm":     fc | dict(sigma=1.0),
        "fc fdssm":   fc | dict(sigma=0.0, clip=5.0 * D),
        "cnn ml":     cnn | dict(decay=0.925, weight_decay=1e-5),
        "cnn sml":    cnn | dict(decay=0.925, weight_decay=1e-5 * 2),
        "cnn ssm":    cnn | dict(sigma=0.0),
        "cnn dsm":    cnn | dict(sigma=0.1, weight_decay=1e-5 * D),
        "cnn fdssm":  cnn | dict(sigma=0.0, xi=0.1, clip=5.0 * D),
        "glow ml":    glow,  # for Glow the authors publish ssm and dsm alone
        "glow sml":   glow,
        "glow ssm":   glow | dict(sigma=0.0, energy_weight=0.1 * D),
        "glow dsm":   glow | dict(sigma=0.1, energy_weight=0.1 * D),
        "glow fdssm": glow | dict(sigma=0.0, xi=0.1, energy_weight=0.1 * D),
    }
