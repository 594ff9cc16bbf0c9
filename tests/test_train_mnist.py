"""The command `train_mnist.py`: what it writes, that a killed run resumes exactly, and how it fails."""

import copy
import io
import itertools
import json
import math
import re
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from conftest import failing
from ebflow import EBFlow, fc_flow, logit_preprocessing
from data import dequantize, mnist
from layers import ActNorm, AffineCoupling, LinearLayer, Squeeze
from training import MovingAverage, learning_rate, make_optimizer, train_step
from run import RunError
from run import read_metrics as rows
from test_data import small_data_set
import losses
import training
from train_mnist import DEFAULTS, LOSSES, build, evaluate, following, load, main, minibatch, minibatches, parse

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data_set(tmp_path_factory.mktemp("data"))


def arguments(data, out, *extra):
    return ["--data", str(data), "--out", str(out), "--epochs", "2", "--batch-size", "50", "--device", "cpu", *extra]


def command(*args):
    return [sys.executable, str(ROOT / "train_mnist.py"), *args]


fails = failing(main)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_of_every_objective_leaves_its_files_and_improves(data, tmp_path, loss, capsys):
    main(arguments(data, tmp_path, "--loss", loss, "--epochs", "8"))
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.pt", "config.json", "curves.png", "metrics.jsonl",
                                                    "samples.png"}
    metrics = rows(tmp_path)
    assert [row["epoch"] for row in metrics] == list(range(9)) and metrics[-1]["step"] == 8 * 5
    assert metrics[-1]["val_nll"] < metrics[0]["val_nll"]
    last = metrics[-1]
    assert last["test_bpd"] == pytest.approx(last["test_nll"] / (16 * math.log(2)))
    best = min(metrics[1:], key=lambda row: row["val_nll"])
    assert last["best_epoch"] == best["epoch"] and f"{best['val_nll']:.2f} nats, epoch" in capsys.readouterr().out
    splits = mnist(data)
    model = build(parse(["--loss", loss]), splits[0])[2]  # the test split is read with the weights of the best epoch
    model.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["state"]["best"]["model"])
    assert evaluate(model, splits[1].flatten(1)) == pytest.approx(best["val_nll"])
    assert evaluate(model, splits[2].flatten(1)) == pytest.approx(last["test_nll"])
    assert json.loads((tmp_path / "config.json").read_text())["loss"] == loss


@pytest.mark.parametrize("arch, loss", [(arch, loss) for arch in ("cnn", "glow") for loss in LOSSES])
def test_a_run_of_every_other_architecture_and_objective_leaves_its_files_and_improves(data, tmp_path, arch, loss):
    small = ["--width", "4", "--depth", "2", "--normalize", "center"] if arch == "glow" else ["--normalize", "black"]  # whitened, there is little to improve
    main(arguments(data, tmp_path, "--arch", arch, "--loss", loss, "--epochs", "4", "--lr", "1e-3", *small))
    metrics = rows(tmp_path)
    assert len(metrics) == 5 and (tmp_path / "samples.png").exists()
    assert min(row["val_nll"] for row in metrics[1:]) < metrics[0]["val_nll"]
    _, pre, flow, image_model = load(tmp_path, mnist(data)[0])  # what the experiments start from
    assert evaluate(image_model, mnist(data)[2]) == pytest.approx(metrics[-1]["test_nll"])
    assert torch.equal(flow(pre(torch.full((1, 1, 4, 4), 9.0))), image_model(torch.full((1, 1, 4, 4), 9.0)))


def test_an_image_that_does_not_squeeze_is_one_line(tmp_path, capsys):
    small_data_set(tmp_path, size=6)
    assert "--arch cnn cannot take images of 6×6: cannot squeeze" in fails(capsys, *arguments(tmp_path, tmp_path / "run", "--arch", "cnn"))


@pytest.mark.parametrize("flags", [["--no-map"], ["--no-ema"], ["--paper"], ["--normalize", "none"],
                                   ["--normalize", "whiten"], ["--clip", "1"],
                                   ["--seed", "3"]])
def test_every_switch_runs_and_changes_the_result(data, tmp_path, flags):
    main(arguments(data, tmp_path / "a", "--lr", "1e-3"))
    main(arguments(data, tmp_path / "b", "--lr", "1e-3", *flags))
    assert rows(tmp_path / "a")[-1]["test_nll"] != rows(tmp_path / "b")[-1]["test_nll"]


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    main(arguments(data, out, "--epochs", "40"))
    return out


@pytest.mark.parametrize("moment", ["before the first checkpoint", "after 1 epoch", "after 20 epochs", "while it writes"])
def test_a_run_that_is_killed_and_resumed_ends_exactly_like_an_undisturbed_one(data, undisturbed, tmp_path, moment):
    def reached():
        if moment == "before the first checkpoint":
            return (tmp_path / "config.json").exists()
        if moment == "while it writes":
            return (tmp_path / "metrics.jsonl").exists() and (tmp_path / ".checkpoint.pt.part").exists()
        epochs = int(moment.split()[1])
        return (tmp_path / "metrics.jsonl").exists() and len(rows(tmp_path)) > epochs

    process = subprocess.Popen(command(*arguments(data, tmp_path, "--epochs", "40")), stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)
    while not reached():
        assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(rows(tmp_path)) - 1 if (tmp_path / "metrics.jsonl").exists() else 0
    assert done < 40
    main(arguments(data, tmp_path, "--epochs", "40", "--resume"))

    whole, killed = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (undisturbed, tmp_path))
    compared = []
    torch.utils._pytree.tree_map(lambda a, b: compared.append(torch.equal(a, b) if torch.is_tensor(a) else a == b),
                                 whole["state"], killed["state"])
    assert len(compared) > 30 and all(compared)
    timing = ("seconds", "batches_per_second")
    for a, b in zip(rows(undisturbed), rows(tmp_path), strict=True):
        assert {k: v for k, v in a.items() if k not in timing} == {k: v for k, v in b.items() if k not in timing}
    assert not list(tmp_path.glob(".*"))


def test_the_nll_is_that_of_the_image_by_the_brute_force_jacobian(float64):
    flow = EBFlow([*logit_preprocessing((4,), 0.5).layers, *fc_flow(4).layers], (4,))
    images = torch.randint(0, 256, (3, 4), dtype=torch.uint8)
    torch.manual_seed(0)
    x = images + torch.rand(3, 4)
    u = flow(x)
    jacobian = torch.stack([torch.func.jacrev(flow)(sample[None]).view(4, 4) for sample in x])
    nll = -(torch.distributions.Normal(0, 1).log_prob(u).sum(1) + torch.linalg.slogdet(jacobian).logabsdet).mean()
    assert evaluate(flow, images) == pytest.approx(nll.item(), rel=1e-12)


@pytest.mark.parametrize("arch", ["fc", "cnn", "glow"])
def test_the_preprocessing_whitens_and_is_no_part_of_what_is_trained(data, arch):
    images = mnist(data)[0]
    args = parse(["--arch", arch, "--loss", "fdssm", "--normalize", "whiten"])
    pre, flow, image_model = build(args, images)
    x = dequantize(images).view(len(images), *flow.shape)
    z = pre(x).flatten(1)
    assert z.mean(0).abs().max() < 0.1 and (torch.cov(z.T) - torch.eye(16)).abs().max() < 0.1
    trained = sum(p.numel() for p in image_model.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in flow.parameters() if p.requires_grad)
    assert arch != "fc" or trained == 2 * 16 * 17
    torch.testing.assert_close(pre.inverse(pre(x)), x, rtol=1e-3, atol=0.1)


def test_centred_pixels_have_mean_0(data):
    images = mnist(data)[0]
    pre = build(parse(["--loss", "ml"]), images)[0]
    assert pre(dequantize(images.flatten(1))).mean(0).abs().max() < 0.5


def test_an_epoch_sees_every_image_once_but_those_that_do_not_fill_a_batch():
    images = torch.arange(250, dtype=torch.uint8)[:, None].expand(250, 16)  # told apart by their shade
    args = parse(["--loss", "ssm", "--no-map", "--batch-size", "60"])
    batches = [batch[:, 0].floor().int() for batch in minibatches(args, None, images)]
    assert [len(batch) for batch in batches] == [60] * 4
    assert len(set(torch.cat(batches).tolist())) == 240 and not torch.equal(batches[0], batches[0].sort().values)


def test_the_sliced_objectives_see_their_points_under_noise(data):
    images = mnist(data)[0]
    seen = []
    for noise in ("0", "2"):
        args = parse(["--loss", "ssm", "--normalize", "center", "--noise", noise])
        seen.append(minibatch(args, build(args, images)[0], images.flatten(1)))
    assert (seen[1].var() - seen[0].var() - 4).abs() < 0.3


def test_scaled_pixels_have_mean_0_and_variance_1(data):
    images = mnist(data)[0]
    pre, _, _ = build(parse(["--arch", "cnn", "--normalize", "scale"]), images)
    z = pre(dequantize(images))
    assert z.mean(0).abs().max() < 0.05 and (z.std(0) - 1).abs().max() < 0.05
    black = build(parse(["--arch", "cnn", "--normalize", "black"]), images)[0](dequantize(torch.zeros(2000, 1, 4, 4)))
    assert black.mean().abs() < 0.05 and (black.std() - 1).abs() < 0.05  # log of a uniform number


def actnorm_outputs(flow, x):
    """What each actnorm makes of a batch.   -> a list of (C, n)"""
    outputs = []
    for layer in flow.layers:
        x = layer(x) if isinstance(layer, LinearLayer) else layer(x)[0]
        if isinstance(layer, ActNorm) or isinstance(getattr(layer, "layer", None), ActNorm):
            outputs.append(x[:, :getattr(layer, "channels", x.shape[1])].detach().transpose(0, 1).flatten(1))
    return outputs


def off(outputs):
    """How far the worst channel is from mean 0 and standard deviation 1."""
    return max(max(y.mean(1).abs().max().item(), (y.std(1) - 1).abs().max().item()) for y in outputs)


def test_a_glow_starts_with_every_actnorm_giving_mean_0_and_variance_1(data):
    images = mnist(data)[0]
    pre, flow, _ = build(parse(["--arch", "glow", "--loss", "ml", "--width", "4", "--depth", "2"]), images)
    outputs = actnorm_outputs(flow, pre(dequantize(images)))
    assert len(outputs) == 5 and off(outputs) < 0.1


def test_the_couplings_of_a_glow_have_the_floor_of_its_settings(data):
    for flags, floor in ((["--loss", "ml"], 0.0), (["--loss", "dsm"], 0.5), (["--loss", "ml", "--floor", "0.3"], 0.3)):
        flow = build(parse(["--arch", "glow", "--width", "4", "--depth", "2", *flags]), mnist(data)[0])[1]
        assert [m.floor for m in flow.modules() if isinstance(m, AffineCoupling)] == 4 * [floor]


@pytest.mark.parametrize("actnorm", ["moments", "trained"])
def test_a_glow_s_last_actnorm_goes_to_the_moments_as_batches_pass_where_it_is_held_and_no_other_does(data, actnorm):
    images = mnist(data)[0]
    args = parse(["--arch", "glow", "--loss", "dsm", "--sigma", "2", "--width", "4", "--depth", "2", "--actnorm", actnorm, "--batch-size", "10"])
    pre, flow, _ = build(args, images)
    *others, last = (m for m in flow.modules() if isinstance(m, ActNorm))
    assert last.log_scale.requires_grad == last.bias.requires_grad == (actnorm == "trained")
    assert len(others) == 4 and all(p.requires_grad for m in others for p in m.parameters())
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p))
    z = pre(dequantize(images[:1000]))
    apart = lambda noise: off(actnorm_outputs(flow, z + noise * torch.randn_like(z))[-1:])
    before, state = apart(2), copy.deepcopy(others)
    for _ in range(8):
        list(following(args, flow, minibatches(args, pre, images)))
    assert (apart(2) < 0.3 * before and apart(2) < apart(0)) if actnorm == "moments" else apart(2) == pytest.approx(before, rel=0.3)
    assert all(torch.equal(a.log_scale, b.log_scale) and torch.equal(a.bias, b.bias) for a, b in zip(others, state))


@pytest.mark.parametrize("arch", ["fc", "cnn"])
def test_a_last_actnorm_follows_the_flow_s_output_and_is_the_only_one(data, arch):
    images = mnist(data)[0]
    args = parse(["--arch", arch, "--loss", "dsm", "--actnorm", "moments", "--batch-size", "100"])
    pre, flow, image_model = build(args, images)
    assert [type(layer) for layer in image_model.layers].count(ActNorm) == 1 and type(flow.layers[-1]) is ActNorm
    assert not any(p.requires_grad for p in flow.layers[-1].parameters()) and flow.layers[-2].weight.requires_grad
    x = pre(dequantize(images.view(-1, *flow.shape)))
    apart = lambda: off([flow(x + args.sigma * torch.randn_like(x)).transpose(0, 1).flatten(1).detach()])
    start = off([flow(x).transpose(0, 1).flatten(1).detach()])
    with torch.no_grad():
        flow.layers[-2].weight.mul_(6)
    far = apart()
    list(following(args, flow, (x for _ in range(600))))
    assert start < 0.15 and apart() < 0.3 < 1 < far
    assert not any(isinstance(layer, ActNorm) for layer in build(parse(["--arch", arch, "--loss", "ml"]), images)[1].layers)


@pytest.mark.parametrize("loss, amx, inside", [("dsm", True, ["tf32", "tf32", "bf16"]), ("fdssm", True, ["ieee", "ieee", "ieee"]),
                                               ("fdssm", False, ["ieee", "ieee", "bf16"])])
def test_fast_products_are_for_training_only_and_short_ones_not_for_fdssm(monkeypatch, loss, amx, inside):
    """TF32 on a GPU and bfloat16 on a CPU inside (without AMX: oneDNN in float32), and what was there before outside, after an error, too."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
    products = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul
    before = [kind.fp32_precision for kind in products]
    with pytest.raises(KeyError), training.fast_matmul(loss):
        assert [kind.fp32_precision for kind in products] == inside != before
        raise KeyError
    assert [kind.fp32_precision for kind in products] == before


def test_a_glow_without_actnorms_is_one_line(data, tmp_path, capsys):
    assert "--actnorm is trained or moments" in fails(capsys, *arguments(data, tmp_path, "--arch", "glow", "--actnorm", "none"))


def test_one_batch_in_ten_moves_the_last_actnorm(data, monkeypatch):
    momenta = []
    monkeypatch.setattr(ActNorm, "initialize", lambda layer, x, momentum: momenta.append((layer, momentum)))
    args, flow = parse(["--arch", "glow", "--loss", "ssm"]), EBFlow([ActNorm(1), Squeeze(), ActNorm(4)], (1, 2, 2))
    assert len(list(following(args, flow, torch.ones(25, 2, 1, 2, 2)))) == 25
    assert momenta == 3 * [(flow.layers[-1], 0.1)]


def test_the_averaged_weights_have_a_last_actnorm_at_their_own_moments(data, tmp_path):
    images, worst = mnist(data)[0], {}
    for actnorm in ("moments", "trained"):
        main(arguments(data, tmp_path / actnorm, "--arch", "glow", "--width", "4", "--depth", "2", "--lr", "1e-2", "--epochs", "8",
                       "--normalize", "center", "--actnorm", actnorm))
        _, pre, flow, _ = load(tmp_path / actnorm, images)
        worst[actnorm] = off(actnorm_outputs(flow, pre(dequantize(images[:1000])))[-1:])
    assert worst["moments"] < 0.1 < 0.3 < worst["trained"]


def test_a_batch_without_moments_and_a_run_of_other_images_are_one_line(data, tmp_path, capsys):
    small = ["--arch", "glow", "--width", "4", "--depth", "1", "--epochs", "1"]
    assert "constant channel" in fails(capsys, *arguments(data, tmp_path / "one", *small, "--batch-size", "1"))
    main(arguments(data, tmp_path / "run", *small))
    with pytest.raises(RunError, match="images of another size"):
        load(tmp_path / "run", torch.zeros(10, 1, 8, 8, dtype=torch.uint8))


def test_a_glow_with_its_last_actnorm_at_the_moments_resumes_exactly(data, tmp_path, monkeypatch):
    flags = ["--arch", "glow", "--width", "4", "--depth", "2", "--epochs", "4", "--actnorm", "moments"]
    main(arguments(data, tmp_path / "whole", *flags))
    with monkeypatch.context() as patched:
        patched.setattr(training, "train_epoch", stopped_at(3, training.train_epoch))
        with pytest.raises(SystemExit):
            main(arguments(data, tmp_path / "stopped", *flags))
    main(arguments(data, tmp_path / "stopped", *flags, "--resume"))
    whole, stopped = (load(tmp_path / name, mnist(data)[0])[-1].state_dict() for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert rows(tmp_path / "whole")[-1]["test_nll"] == rows(tmp_path / "stopped")[-1]["test_nll"]


def stopped_at(last, train_epoch):
    def train(args, epoch, *rest):
        if epoch == last:
            raise KeyboardInterrupt
        return train_epoch(args, epoch, *rest)
    return train


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


def one_byte_changed(checkpoint):
    """In the middle of its largest tensor: those between the tensors mean nothing."""
    with zipfile.ZipFile(io.BytesIO(checkpoint)) as archive:
        tensor = archive.read(max(archive.infolist(), key=lambda record: record.file_size))
    i = checkpoint.index(tensor) + len(tensor) // 2
    return checkpoint[:i] + bytes([checkpoint[i] ^ 255]) + checkpoint[i + 1:]


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b"", lambda b: b"not a checkpoint", one_byte_changed])
def test_a_damaged_checkpoint_is_refused(data, tmp_path, capsys, damage):
    main(arguments(data, tmp_path))
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(damage(path.read_bytes()))
    assert "checkpoint.pt is damaged" in fails(capsys, *arguments(data, tmp_path, "--resume"))


def test_resuming_nothing_is_an_error(data, tmp_path, capsys):
    assert "nothing to resume" in fails(capsys, *arguments(data, tmp_path / "none", "--resume"))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_that_diverges_names_the_step_and_says_what_to_lower(data, tmp_path, capsys, loss):
    line = fails(capsys, *arguments(data, tmp_path, "--loss", loss, "--lr", "1e30", "--warmup", "0"))
    assert "epoch 1, step" in line and "lower --lr (it is 1e+30), set --clip" in line
    assert ("raise --sigma" in line, "raise --xi" in line) == (loss == "dsm", loss == "fdssm")
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(data, tmp_path, capsys,
                                                                                       monkeypatch):
    calls = itertools.count(1)

    def objective(a, model, x):  # the loss is finite; at step 2 of epoch 2 its gradient is not
        loss = losses.ssm(model.energy, x)
        return loss + (loss * 0).sqrt() if next(calls) == 7 else loss

    monkeypatch.setattr(training, "objective", objective)
    line = fails(capsys, *arguments(data, tmp_path, "--loss", "ssm"))
    assert "gradient nan at epoch 2, step 2" in line
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert checkpoint["state"]["epoch"] == 1 and len(rows(tmp_path)) == 2
    assert all(v.isfinite().all() for v in checkpoint["state"]["model"].values())


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint_whole(data, tmp_path):
    args = arguments(data, tmp_path, "--epochs", "100000")
    process = subprocess.Popen(command(*args), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (tmp_path / "checkpoint.pt").exists():
        assert process.poll() is None
    process.kill()
    process.wait()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2,) * 2)  # noqa: E731
    result = subprocess.run(command(*args, "--resume"), preexec_fn=limit, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: cannot write") and "Traceback" not in result.stderr
    assert (tmp_path / "checkpoint.pt").read_bytes() == before and not (tmp_path / ".checkpoint.pt.part").exists()


def test_training_on_mnist_stays_under_one_and_a_half_gibibytes(tmp_path):
    args = ["--epochs", "1", "--batch-size", "2500", "--out", str(tmp_path), "--device", "cpu"]
    # VmHWM, not ru_maxrss: that one a child takes over from its parent, which holds what the other tests left.
    code = "import train_mnist, sys; train_mnist.main(sys.argv[1:]); print(open('/proc/self/status').read())"
    result = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(re.search(r"VmHWM:\s*(\d+) kB", result.stdout).group(1)) < 1.5 * 2**20


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
    (["--loss", "mle"], "invalid choice"), (["--sigma", "1", "--loss", "ml"], "--sigma is not a setting of fc ml"),
    (["--sigma", "-1"], "--sigma must be positive"), (["--ema-decay", "1"], r"must lie in [0, 1)"),
    (["--epoch", "1", "--no-such"], "unrecognized arguments: --no-such"), (["--lr", "nan"], "--lr must be a finite number"), (["--clip", "-1"], "--clip must lie in"),
    (["--seed", "-1"], "--seed must lie in"), (["--arch", "glow", "--floor", "1"], "--floor must be 0 or lie in"), (["--resume", "--overwrite"], "not allowed with"),
    (["--batch-size", "1000"], "do not fill a batch"), (["--data", "/nowhere"], "no train-images-idx3-ubyte.gz"),
    (["--out", "/dev/null/run"], "cannot write to"), (["--optimizer", "sgd"], "invalid choice")])
def test_bad_options_are_one_line(data, tmp_path, capsys, flags, message):
    assert message in fails(capsys, *arguments(data, tmp_path), *flags)


def test_the_moving_average_is_the_recursion_of_the_paper_after_its_first_steps():
    model = torch.nn.Linear(2, 1)
    average = MovingAverage(model, 0.9)
    expected = None
    for n in range(200):
        with torch.no_grad():
            model.weight.copy_(torch.randn(1, 2))
        average.update()
        m = min(0.9, (1 + n) / (10 + n)) if n else 0.0
        expected = model.weight.detach().clone() if n == 0 else m * expected + (1 - m) * model.weight.detach()
    torch.testing.assert_close(average.model.weight.detach(), expected)


def test_the_schedules():
    a = parse(["--loss", "dsm", "--lr", "1", "--warmup", "0.5", "--epochs", "100"])
    assert [round(learning_rate(a, 1, t), 6) for t in (0, 0.25, 0.5, 1)] == [0, 0.426777, 0.5, 0]
    a = parse(["--loss", "dsm", "--lr", "1", "--warmup", "0.1", "--hold", "0.6", "--epochs", "100"])
    assert [round(learning_rate(a, 1, t), 6) for t in (0.05, 0.3, 0.6, 0.8, 1)] == [0.5, 1, 1, 0.5, 0]
    paper = parse(["--loss", "dsm", "--paper"])
    rates = [learning_rate(paper, epoch, 0.0) for epoch in (1, 2, 50, 60)]
    assert rates == pytest.approx([1e-4, 0.95e-4, 1e-4 * 0.95**49, 1e-4 * 0.95**49])


def test_the_defaults_of_a_flag_are_those_at_the_top_of_the_script():
    for loss, settings in DEFAULTS["fc"].items():
        a = parse(["--loss", loss])
        assert {name: getattr(a, name) for name in settings} == settings


def test_the_glow_of_the_published_size_takes_a_step():
    args = parse(["--arch", "glow", "--paper", "--loss", "ssm"])
    images = torch.randint(0, 256, (20, 1, 28, 28), dtype=torch.uint8)
    pre, flow, _ = build(args, images)
    assert len(flow.layers) == 2 + 2 * 16 * 3 + 1 and sum(p.numel() for p in flow.parameters()) == 9_750_368
    before = [p.clone() for p in flow.parameters()]
    trace = train_step(args, flow, minibatch(args, pre, images[:2]), make_optimizer(args, flow))
    assert trace.isfinite().all()
    assert sum(not torch.equal(p, q) for p, q in zip(before, flow.parameters())) > 0.9 * len(before)
