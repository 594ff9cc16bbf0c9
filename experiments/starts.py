"""Where the nats come from: dsm on FC from four starts, beside one Gaussian.

    python -m experiments.starts

No run has steps of sml. In the last column of the table the last actnorm is as training left it, at the moments of
noisy images, and not set to those of clean ones. ours.

Time: a quarter of an hour on one core.
"""

import train_mnist
from data import MNIST, DataError, load_images
from experiments import command_line, machine, panels, record, trained
from experiments.tables import PUBLISHED
from support import plots
from support.run import one_line_errors, read_checkpoint

GAUSSIAN = "--bend 300 --diagonal 1 --ratio 1 --actnorm none --epochs 1 --lr 1e-9".split()
CELLS = {"one Gaussian": GAUSSIAN, "published": ["--paper"],
         "centred pixels, I": "--normalize center --diagonal 1 --ratio 1 --lr 1e-3 --sigma 0.7".split(),
         "whitened pixels, I / 10": "--diagonal 0.1 --ratio 1 --lr 3e-5".split(), "ours": []}
PAPER = PUBLISHED["fc"]["dsm"]  # after 10,000 epochs, on the test split


def rows(table):
    """The table of docs/results.md."""
    return [f"| {cell} | " + " | ".join(f"{nll:,.1f}" for nll in (row["nll"][0], row["nll"][-1], row["test_nll"],
                                                                   row["unrefitted"])) + " |"
            for cell, row in table.items()]


def picture(table):
    """Validation NLL against epochs; the legend has the values that lie above the axis."""
    figure, [[axes]] = panels(1, 1, 7, 3.6)
    for cell, row in table.items():
        if cell == "one Gaussian":
            axes.axhline(row["test_nll"], color="k", lw=0.8, ls="--", label=f"one Gaussian, {row['test_nll']:.1f}")
        else:
            axes.plot(row["nll"], marker=".", label=f"{cell}: {row['nll'][0]:,.0f} to {row['nll'][-1]:,.1f}")
    axes.axhline(PAPER, color="k", lw=0.8, ls=":", label=f"the paper after 10,000 epochs, {PAPER}")
    axes.set(xlabel="epochs", ylabel="validation NLL (nats)", ylim=(980, 1380), title="dsm on FC from four starts")
    axes.legend(fontsize="small")
    return figure


def main(argv=None):
    a, flags = command_line(__doc__, "--runs", "--results", passes="train_mnist.py").parse_known_args(argv)
    with one_line_errors(DataError):
        table, images = {}, load_images(MNIST)[2]
        for cell, own in CELLS.items():
            own = [*own, *["--epochs", "8"] * ("--epochs" not in own), "--sml-steps", "0"]
            out = a.runs / "starts" / cell.replace(" ", "-").replace("/", "by")
            s, metrics = trained(train_mnist, own, out, flags)
            flow, state = train_mnist.load(out).flow, read_checkpoint(out / "checkpoint.pt")["state"]
            held = f"layers.{len(flow.layers) - 1}." if s.actnorm == "moments" else "none"  # it has no average
            flow.load_state_dict({name: state["model" if name.startswith(held) else "averaged"][name]
                                  for name in state["model"]})
            table[cell] = {"nll": [row["val_nll"] for row in metrics], "test_nll": metrics[-1]["test_nll"],
                           "unrefitted": train_mnist.evaluate("test", flow, images)["test_nll"],
                           "command": " ".join(["python train_mnist.py", *own, *flags])}
        plots.save(a.results / "starts.png", picture(table))
        result = {"command": "python -m experiments.starts", "machine": machine(), "runs": table}
        record(a.results / "starts.json", result)
        print(*rows(table), sep="\n")


if __name__ == "__main__":
    main()
