"""The command `train_mnist.py`: what it writes, that a killed run resumes exactly, and how it fails."""

import json
import math
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ebflow import EBFlow, fc_flow, logit_preprocessing
from data import dequantize, mnist
from test_data import small_data_set
from train_mnist import DEFAULTS, build, evaluate, main, parse

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data_set(tmp_path_factory.mktemp("data"))


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def arguments(data, out, *extra):
    return ["--data", str(data), "--out", str(out), "--epochs", "2", "--batch-size", "50", "--device", "cpu", *extra]


def command(*args):
    return [sys.executable, str(ROOT / "train_mnist.py"), *args]


def fails(capsys, *args):
    """The one line that the command prints before it exits with a status other than zero."""
    with pytest.raises(SystemExit) as exit:
        main(args)
    assert exit.value.code not in (0, None)
    line = exit.value.code if isinstance(exit.value.code, str) else capsys.readouterr().err.strip().splitlines()[-1]
    assert "\n" not in line
    return line


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loss", DEFAULTS)
def test_a_run_of_every_objective_leaves_its_files_and_improves(data, tmp_path, loss, capsys):
    main(arguments(data, tmp_path, "--loss", loss, "--epochs", "8"))
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.pt", "config.json", "curves.png", "metrics.jsonl",
                                                    "samples.png"}
    metrics = rows(tmp_path)
    assert [row["epoch"] for row in metrics] == list(range(9)) and metrics[-1]["step"] == 8 * 5
    assert metrics[-1]["val_nll"] < metrics[0]["val_nll"]
    last = metrics[-1]
    assert last["test_bpd"] == pytest.approx(last["test_nll"] / (16 * math.log(2)))
    best = min(row["val_nll"] for row in metrics)
    assert f"{best:.2f} nats" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["loss"] == loss


@pytest.mark.parametrize("flags", [["--no-map", "--lr", "1e-5"], ["--no-ema"], ["--paper"], ["--normalize", "none"],
                                   ["--normalize", "center"], ["--no-antithetic"],
                                   ["--seed", "3"]])
def test_every_switch_runs_and_changes_the_result(data, tmp_path, flags):
    main(arguments(data, tmp_path / "a", "--epochs", "1"))
    main(arguments(data, tmp_path / "b", "--epochs", "1", *flags))
    assert rows(tmp_path / "a")[-1]["test_nll"] != rows(tmp_path / "b")[-1]["test_nll"]


def test_a_run_that_is_killed_and_resumed_ends_exactly_like_an_undisturbed_one(data, tmp_path):
    args = ["--epochs", "40", "--loss", "dsm"]
    main(arguments(data, tmp_path / "whole", *args))
    process = subprocess.Popen(command(*arguments(data, tmp_path / "killed", *args)), stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(rows(tmp_path / "killed")) < 40
    main(arguments(data, tmp_path / "killed", *args, "--resume"))

    whole, killed = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "killed"))
    compared = []
    torch.utils._pytree.tree_map(lambda a, b: compared.append(torch.equal(a, b) if torch.is_tensor(a) else a == b),
                                 whole["state"], killed["state"])
    assert len(compared) > 30 and all(compared)
    timing = ("seconds", "batches_per_second")
    for a, b in zip(rows(tmp_path / "whole"), rows(tmp_path / "killed"), strict=True):
        assert {k: v for k, v in a.items() if k not in timing} == {k: v for k, v in b.items() if k not in timing}


def test_a_run_that_is_killed_before_its_first_checkpoint_resumes_at_the_beginning(data, tmp_path, capsys):
    main(arguments(data, tmp_path / "whole"))
    main(arguments(data, tmp_path / "killed"))
    for name in ("checkpoint.pt", "metrics.jsonl"):
        (tmp_path / "killed" / name).unlink()
    main(arguments(data, tmp_path / "killed", "--resume"))
    assert rows(tmp_path / "whole")[-1]["test_nll"] == rows(tmp_path / "killed")[-1]["test_nll"]


def test_the_nll_is_that_of_the_image_by_the_brute_force_jacobian(float64):
    flow = EBFlow([*logit_preprocessing((4,), 0.5).layers, *fc_flow(4).layers], (4,))
    images = torch.randint(0, 256, (3, 4), dtype=torch.uint8)
    torch.manual_seed(0)
    x = images + torch.rand(3, 4)
    u = flow(x)
    jacobian = torch.stack([torch.func.jacrev(flow)(sample[None]).view(4, 4) for sample in x])
    nll = -(torch.distributions.Normal(0, 1).log_prob(u).sum(1) + torch.linalg.slogdet(jacobian).logabsdet).mean()
    assert evaluate(flow, images) == pytest.approx(nll.item(), rel=1e-12)


def test_the_preprocessing_whitens_and_is_no_part_of_what_is_trained(data):
    images = mnist(data)[0]
    pre, flow, image_model = build(parse(["--loss", "ssm"]), images)
    z = pre(dequantize(images.flatten(1)))
    assert (z.mean(0)).abs().max() < 0.1 and (torch.cov(z.T) - torch.eye(16)).abs().max() < 0.1
    assert sum(p.numel() for p in flow.parameters()) == sum(p.numel() for p in image_model.parameters()
                                                            if p.requires_grad) == 2 * 16 * 17
    pre = build(parse(["--loss", "ml"]), images)[0]
    assert pre(dequantize(images.flatten(1))).mean(0).abs().max() < 0.5


def test_training_never_writes_over_a_run_by_accident(data, tmp_path, capsys):
    main(arguments(data, tmp_path))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert "--resume" in fails(capsys, *arguments(data, tmp_path))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    main(arguments(data, tmp_path, "--overwrite", "--epochs", "1"))
    assert len(rows(tmp_path)) == 2


def test_a_checkpoint_of_other_settings_or_other_data_is_refused(data, tmp_path, capsys):
    main(arguments(data, tmp_path / "run"))
    line = fails(capsys, *arguments(data, tmp_path / "run", "--resume", "--lr", "0.5"))
    assert "lr is 0.0001 there" in line and "0.5 here" in line
    other = tmp_path / "other"
    other.mkdir()
    small_data_set(other, n=330)
    assert "sha256" in fails(capsys, *arguments(other, tmp_path / "run", "--resume"))


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b"", lambda b: b"not a checkpoint",
                                    lambda b: b[: len(b) // 2] + bytes([b[len(b) // 2] ^ 255]) + b[len(b) // 2 + 1:]])
def test_a_damaged_checkpoint_is_refused(data, tmp_path, capsys, damage):
    main(arguments(data, tmp_path))
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(damage(path.read_bytes()))
    assert "checkpoint.pt is damaged" in fails(capsys, *arguments(data, tmp_path, "--resume"))


def test_resuming_nothing_is_an_error(data, tmp_path, capsys):
    assert "nothing to resume" in fails(capsys, *arguments(data, tmp_path / "none", "--resume"))


@pytest.mark.parametrize("loss", ["dsm", "ml", "fdssm"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(data, tmp_path, capsys, loss):
    line = fails(capsys, *arguments(data, tmp_path, "--loss", loss, "--lr", "1e30", "--warmup", "0"))
    assert "epoch 1, step" in line and "lower --lr" in line or "singular" in line
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint_whole(data, tmp_path):
    main(arguments(data, tmp_path, "--epochs", "1"))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))  # noqa: E731
    result = subprocess.run(command(*arguments(data, tmp_path / "new", "--epochs", "1")), preexec_fn=limit,
                            capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: cannot write"), result.stderr
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"config.json"}
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_control_c_is_one_line_and_the_run_can_go_on(data, tmp_path):
    process = subprocess.Popen(command(*arguments(data, tmp_path, "--epochs", "100000")), stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, text=True)
    while not (tmp_path / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 130 and "Traceback" not in error and "--resume" in error.splitlines()[-1]


@pytest.mark.parametrize("flags, message", [
    (["--loss", "mle"], "invalid choice"), (["--sigma", "1", "--loss", "ml"], "--sigma is not a setting of ml"),
    (["--sigma", "-1"], "--sigma must be positive"), (["--ema-decay", "1"], r"must lie in [0, 1)"),
    (["--epoch", "1", "--no-such"], "unrecognized arguments: --no-such"), (["--lr", "nan"], "--lr must be a finite number"), (["--clip", "-1"], "--clip must lie in"),
    (["--seed", "-1"], "--seed must lie in"), (["--resume", "--overwrite"], "not allowed with"),
    (["--batch-size", "1000"], "do not fill a batch"), (["--data", "/nowhere"], "no train-images-idx3-ubyte.gz"),
    (["--out", "/dev/null/run"], "cannot write to"), (["--optimizer", "sgd"], "invalid choice")])
def test_bad_options_are_one_line(data, tmp_path, capsys, flags, message):
    assert message in fails(capsys, *arguments(data, tmp_path), *flags)


def test_the_defaults_of_a_flag_are_those_at_the_top_of_the_script():
    for loss, settings in DEFAULTS.items():
        a = parse(["--loss", loss])
        assert {name: getattr(a, name) for name in settings} == settings
