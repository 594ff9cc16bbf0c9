"""What an architecture and an objective change of the defaults of train_mnist.py: our recipes, and the paper's."""

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


