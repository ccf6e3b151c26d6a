"""The same promises on a CUDA device; `pytest -rP` shows what they measured. Short: benchmarks/gpu.sh has a minute."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from test_twins import run
from torch import nn

import data
import losses
import predict
import train
import unet
from metrics import dice

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
# Twelve steps an epoch or so, on four scans.
STEPS = ["--device", "cuda", "--limit-batches", "12", "--batch-size", "4", "--lr", "1e-2"]
# The slices of two scans again and again, without augmentation: thirty epochs are enough to know them.
LEARN = [*STEPS, "--overfit", "2", "--width", "8", "--epochs", "30"]


def difference(one, other):
    """The largest absolute difference between two state dicts."""
    return max((one[name].double().cpu() - other[name].double().cpu()).abs().max().item() for name in one)


@pytest.mark.parametrize("precision, engine", [("bf16", "loop"), ("fp16", "loop"), ("fp32", "loop"),
                                               ("bf16", "lightning"), ("fp32", "lightning"), ("fp16", "lightning")])
def test_it_learns(quick, precision, engine):
    log = run(*quick, *LEARN, "--precision", precision, "--engine", engine)["log"]
    assert log[-1]["val/dice"] > 0.7 and log[-1]["train/loss"] < log[0]["train/loss"] / 2
    assert log[-1]["system/gpu_memory_gb"] > 0


def test_a_resumed_run_is_as_near_to_one_left_alone_as_another_of_its_kind(quick, tmp_path):
    """On a CPU it is the same to the bit. Here some sums are made in any order, so the difference is said."""
    job = [*quick, *STEPS, "--precision", "fp32", "--schedule", "constant"]
    alone, again = (run(*job, "--epochs", 4, "--out", tmp_path / name)["model"] for name in ("alone", "again"))
    run(*job, "--epochs", 2, "--out", tmp_path / "parts")
    resumed = run(*job, "--epochs", 4, "--out", tmp_path / "parts", "--resume")["model"]
    noise, found = difference(alone, again), difference(alone, resumed)
    print(f"weights after 4 epochs: two runs differ by {noise:.3g}, a resumed one by {found:.3g}")
    assert found <= 10 * noise + 1e-6


def test_a_step_that_overflows_in_fp16_is_left_out_and_counted(quick, monkeypatch):
    plain = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, *_, **__: plain(device, 2.0**22))
    result = run(*quick, *STEPS, "--precision", "fp16", "--epochs", 2)
    skipped = [row["train/skipped"] for row in result["log"]]
    print(f"skipped: {skipped}; the scale went from 2^22 to {result['scaler']['scale']:g}")
    assert skipped[0] > 0 and skipped[1] == 0 and result["scaler"]["scale"] < 2**22
    assert all(tensor.isfinite().all() for tensor in result["model"].values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loop_and_lightning_are_twins(quick, tmp_path, precision):
    job = [*quick, *STEPS, "--precision", precision]
    loop, twin = (run(*job, "--engine", name, "--out", tmp_path / name) for name in ("loop", "lightning"))
    print(f"weights of the two engines in {precision} differ by {difference(loop['model'], twin['model']):.3g}")
    for one, other in zip(loop["log"], twin["log"], strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], abs=1e-3 if precision == "fp32" else 1e-2)
        assert one["train/lr"] == other["train/lr"]


def test_distributed_and_synchronised_batch_norm_equal_the_plain_network():
    """Of one process, by NCCL: what train.py wraps around the network must not change a gradient."""
    torch.manual_seed(0)
    image = torch.randn(4, 1, 64, 64, device="cuda")
    mask = (image > 0.5).float()
    plain = unet.UNet(width=8, depth=2).cuda()
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = unet.UNet(width=8, depth=2).cuda()
        wrapped.load_state_dict(plain.state_dict())
        wrapped = nn.SyncBatchNorm.convert_sync_batchnorm(wrapped)
        wrapped = nn.parallel.DistributedDataParallel(wrapped, broadcast_buffers=False)
        for net, loss in ((plain, losses.DiceLoss()), (wrapped, losses.DiceLoss(reduce=train.sum_over_processes))):
            loss(net(image), mask).backward()
    finally:
        dist.destroy_process_group()
    for one, other in zip(plain.parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("engine", ["loop", "lightning"])
def test_torchrun_of_one_process(quick, tmp_path, engine):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", train.__file__]
    job = [*quick, *STEPS, "--precision", "bf16", "--engine", engine]
    shown = subprocess.run([*command, *job], capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stderr
    assert len(predict.load_checkpoint(tmp_path / "run" / "last.pt")["log"]) == 2


def test_batches_come_in_pinned_memory(quick):
    prepared = train.prepare(train.parse_args([*quick, "--device", "cuda", "--workers", "1"]))
    images, masks = next(iter(prepared.loader))
    assert images.is_pinned() and masks.is_pinned()


def test_out_of_memory_names_the_flag_to_lower(quick, capsys):
    """On a card of 32 MB."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(32e6 / torch.cuda.get_device_properties(0).total_memory)
    try:
        assert train.main([*quick, "--device", "cuda", "--width", "64", "--stem", "1"]) == 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    told = capsys.readouterr().err
    assert "out of GPU memory" in told and "--batch-size" in told and "Traceback" not in told


def test_the_card_predicts_what_the_cpu_predicts(quick, phantoms):
    """In bfloat16, beside the CPU's float32: the masks differ by less than two seeds do."""
    checkpoint = run(*quick, *LEARN)
    pair = next(pair for pair in data.find_pairs(phantoms) if pair.name in checkpoint["scans"])
    masks = []
    for device, precision in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        net = predict.load_network(checkpoint, torch.device(device))
        _, probability = predict.predict_scan(pair.image, net, checkpoint["preprocess"], precision, 16)[:2]
        masks.append(probability > 0.5)
    print(f"Dice of the card's mask and the CPU's: {dice(*masks):.5f}")
    assert masks[1].any() and dice(*masks) > 0.98


def test_compiled_network_learns_and_saves_plain_names(quick, tmp_path):
    job = [*quick, *STEPS, "--precision", "fp32"]
    plain, compiled = run(*job, "--out", tmp_path / "a"), run(*job, "--compile", "--out", tmp_path / "b")
    assert compiled["model"].keys() == plain["model"].keys()
    assert compiled["log"][0]["train/loss"] == pytest.approx(plain["log"][0]["train/loss"], abs=1e-2)
