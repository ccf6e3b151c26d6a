"""Time of each stage against what a user would pick instead: MONAI, and the plain form that this project began as.

    python benchmarks/speed.py [--rows 1 2 5] [--device cuda]     # benchmarks/results/speed/speed_cpu.json
    python benchmarks/speed.py --help                             # a line for each row
    python benchmarks/table.py --write                            # the table in the README

The sides of a comparison take turns, A B, B A, ..., after a warm-up of each; a ratio is of neighbours in time, so that
a machine that is shared slows both, and the median of the ratios is held against the goal. The JSON is written after
each row: without --rows, a run that was stopped goes on with the rows that are not in it. All scans are synthetic.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib import metadata
from itertools import islice
from pathlib import Path

from record import ROOT, commit, hardware

sys.path.insert(0, str(ROOT))

import nibabel as nib  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import data  # noqa: E402
import phantom  # noqa: E402
import train  # noqa: E402
import visualize  # noqa: E402
from losses import BCEDiceLoss, DiceLoss  # noqa: E402
from predict import (  # noqa: E402
    keep_freed_memory,
    load_checkpoint,
    pick_device,
    pick_precision,
    predict_volume,
    write_like,
)
from unet import UNet  # noqa: E402

SCRATCH = ROOT / "cache" / "speed"  # phantom scans and their cache, kept from call to call
SEED_NETWORK = {"width": 64, "depth": 3, "norm": "none"}

# What --quick shrinks, so that a test can run every row in seconds.
FULL = {"repeats": 5, "short_repeats": 15, "width": 64, "size": (192, 160), "batch": 8, "load_slices": 160, "scans": 80,
        "memory_scans": 100, "steps": 8, "volume": (110, 320, 320), "predicted": 8, "growth_scans": (4, 16, 64),
        "growth_widths": (4, 8, 16, 32, 64), "growth_sizes": (64, 128, 256)}
QUICK = {"repeats": 1, "short_repeats": 1, "width": 4, "size": (32, 32), "batch": 2, "load_slices": 8, "scans": 3,
         "memory_scans": 3, "steps": 2, "volume": (4, 32, 32), "predicted": 2, "growth_scans": (1, 2),
         "growth_widths": (2, 4), "growth_sizes": (16, 32)}


# ------------------------------------------------------------------------------------------------------------ measuring


def take_turns(sides: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side, A B, B A, ..., after a warm-up (not for one repetition, which is no measurement anyway).

    A side that returns a float has timed itself.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for n in range(-1 if repeats > 1 else 0, repeats):
        for name in list(sides)[:: -1 if n % 2 else 1]:
            begun = time.perf_counter()
            own = sides[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if n >= 0:
                seconds[name].append(own if isinstance(own, float) else time.perf_counter() - begun)
    return seconds


def over(a: list[float], b: list[float]) -> list[float]:
    """The ratio of each pair of neighbours."""
    return [x / y for x, y in zip(a, b, strict=True)]


def check(what: str, values: list[float], goal: str = "", unit: str = "") -> dict:
    """A line of the table: the median of the values, held against "at most N" or "at least N"."""
    median = statistics.median(values)
    line = {"what": what, "median": median, "unit": unit, "goal": goal, "values": values}
    if goal:
        limit = float(goal.split()[-1])
        line["met"] = median <= limit if goal.startswith("at most") else median >= limit
    return line


def steps_per_call(step: Callable, count: int) -> None:
    for _ in range(count):
        step()


def our_step(net: nn.Module, image: Tensor, mask: Tensor, loss_function: nn.Module) -> Callable:
    """A training step as in train.py: its precision, memory format and fused optimiser; no wait for the loss."""
    device = image.device
    precision = pick_precision("auto", device)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, weight_decay=0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    image = image.to(memory_format=torch.channels_last)

    def step() -> Tensor:
        before = train.statistics(net)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = net(image)
        loss = loss_function(logits.float(), mask)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = train.clip_gradient(net, optimizer, 1.0)
        scaler.step(optimizer)
        scaler.update()
        train.keep_statistics(net, before, norm)
        return loss.detach()

    return step


def plain_step(net: nn.Module, image: Tensor, mask: Tensor, loss_function: nn.Module) -> Callable:
    """A training step as tutorials write it: float32, NCHW, Adam, the loss read in every step."""
    optimizer = torch.optim.Adam(net.parameters(), 1e-4)

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_function(net(image), mask)
        loss.backward()
        optimizer.step()
        return loss.item()

    return lambda: step() and None  # take_turns must not take the loss for seconds


def our_network(device: torch.device, **arguments) -> UNet:
    return UNet(**arguments).to(device, memory_format=torch.channels_last)


def samples(s: dict, device: torch.device) -> tuple[Tensor, Tensor]:
    """A batch of noise and blobs: the time of a step does not depend on what is in it."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(s["batch"], 1, *s["size"], generator=generator)
    return image.to(device), (nn.functional.avg_pool2d(image, 9, 1, 4) > 0.1).float().to(device)


def operations(step: Callable) -> int:
    """Floating-point operations of a step, 2 for each multiply-add of its convolutions, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def peak_flops(s: dict, device: torch.device) -> Callable[[], float]:
    """The most operations per second that this machine does in bfloat16: the best of the network's own convolutions
    alone on a CPU, a large product of matrices on a GPU. Returns seconds for 10^12 of them."""
    jobs = []
    with torch.no_grad():
        if device.type == "cuda":
            a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
            jobs.append((2 * 8192**3, lambda: a @ a))
        for level in range(4) if device.type == "cpu" else ():
            channels, size = s["width"] * 2**level, [max(n // 2**level, 1) for n in s["size"]]
            x = torch.randn(s["batch"], channels, *size).bfloat16().to(memory_format=torch.channels_last)
            conv = nn.Conv2d(channels, channels, 3, padding=1).bfloat16().to(memory_format=torch.channels_last)
            jobs.append((2 * 9 * channels**2 * x[:, 0].numel(), partial(torch.no_grad()(conv), x)))

    def best() -> float:
        seconds = []
        for count, job in jobs:
            for _ in range(3):
                begun = time.perf_counter()
                job()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append((time.perf_counter() - begun) / count * 1e12)
        return min(seconds)

    return best


def scans(count: int) -> Path:
    """A folder of small synthetic scans, made once."""
    return phantom.write_dataset(SCRATCH / f"phantom-{count}", scans=count, seed=0, size=0.5)


def train_args(source: Path, folder: str | Path, **flags) -> argparse.Namespace:
    """Arguments of a run in `folder`, on every scan, without validation; flags as in train.py."""
    flags = {"data": source, "cache": SCRATCH / "arrays", "out": Path(folder, "run"), "logs": Path(folder, "logs"),
             "fold": "all", **flags}
    argv = []
    for name, value in flags.items():
        argv += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    return train.parse_args(argv)


def quietly(function: Callable, *arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)


def in_new_process(code: str, *arguments) -> dict:
    """The JSON in the last line that `code` prints in a Python of its own. Arguments are its sys.argv[1:]."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


# ----------------------------------------------------------------------------------------------------------------- rows
# The first line of each docstring is the row's line of --help.


def training_step(s: dict, device: torch.device) -> dict:
    """Training step of the seed network (width 64, 8 slices of 192 x 160) over the plain form's; share of the machine.

    The plain form runs with the allocator's settings of this project, which only makes it faster.
    """
    image, mask = samples(s, device)
    network = SEED_NETWORK | {"width": s["width"]}
    net = our_network(device, **network)
    ours = our_step(net, image, mask, DiceLoss())
    sides = {"plain": plain_step(UNet(**network).to(device), image, mask, DiceLoss()), "ours": ours,
             "10^12 operations": peak_flops(s, device)}
    if device.type == "cuda":
        sides["compiled"] = our_step(torch.compile(our_network(device, **network)), image, mask, DiceLoss())
    count = operations(ours)
    seconds = take_turns(sides, s["repeats"])
    floor = [count / 1e12 * ratio for ratio in over(seconds["10^12 operations"], seconds["plain"])]
    checks = [check("time / plain form", over(seconds["ours"], seconds["plain"]), "at most 0.30"),
              check("the same at the machine's full bf16 rate", floor)]
    for name in ("ours", "compiled") if device.type == "cuda" else ("ours",):
        share = [count / 1e12 * ratio for ratio in over(seconds["10^12 operations"], seconds[name])]
        checks += [check(f"share of the machine's bf16 rate, {name}", share, "at least 0.70"),
                   check(f"slices/s, {name}", [s["batch"] / own for own in seconds[name]])]
    return {"checks": checks, "seconds": seconds, "operations": count}


def monai_networks() -> dict[str, nn.Module]:
    """MONAI's U-Nets with the channels of its 2D tutorials."""
    from monai.networks.nets import AttentionUnet, BasicUNet
    from monai.networks.nets import UNet as MonaiUNet

    levels = {"spatial_dims": 2, "in_channels": 1, "out_channels": 1}
    wide = {"channels": (16, 32, 64, 128, 256), "strides": (2, 2, 2, 2)}
    return {"BasicUNet": BasicUNet(**levels), "UNet": MonaiUNet(**levels, **wide, num_res_units=2),
            "AttentionUnet": AttentionUnet(**levels, **wide)}


def multiply_adds(s: dict, device: torch.device) -> dict:
    """Training step over MONAI's BasicUNet, UNet, AttentionUnet of their tutorials, per multiply-add, at equal count.

    Ours is the default network (batch norm; gates against AttentionUnet) with the width, of 8, 16, 24 and 32, that
    comes closest in multiply-adds, and with width 32, where it has more of them; depth 4 as theirs. Theirs: float32,
    NCHW, Adam, DiceLoss(sigmoid=True), loss.item().
    """
    from monai.losses import DiceLoss as MonaiDice

    image, mask = samples(s, device)
    checks, every = [], {}
    for name, theirs in monai_networks().items():
        their_step = plain_step(theirs.to(device), image, mask, MonaiDice(sigmoid=True))
        their_count = operations(their_step)
        make = partial(our_network, device, depth=4, norm="batch", attention=name == "AttentionUnet")
        steps = {width: our_step(make(width=width), image, mask, DiceLoss()) for width in (8, 16, 24, 32)}
        counts = {width: operations(step) for width, step in steps.items()}
        width = min(counts, key=lambda w, counts=counts, theirs=their_count: abs(counts[w] / theirs - 1))
        sides = {width: "at most 0.50"} | ({} if width == 32 else {32: ""})  # 32: how much of it is the narrowness
        seconds = take_turns({"theirs": their_step} | {f"ours, {w}": steps[w] for w in sides}, s["short_repeats"])
        for w, goal in sides.items():
            ratios = [ratio * their_count / counts[w] for ratio in over(seconds[f"ours, {w}"], seconds["theirs"])]
            checks.append(check(f"time per multiply-add / MONAI {name} (ours: width {w})", ratios, goal))
        every |= {f"{name}, {side}": values for side, values in seconds.items()}
        every |= {f"{name}, operations": [their_count, *(counts[w] for w in sides)]}
    return {"checks": checks, "seconds": every}


class PlainSlices(Dataset):
    """The data set of the plain form: one .npy of float64 per slice; imgaug seeded and fed by its own wrapper."""

    def __init__(self, folder: Path, volumes: list[tuple[np.ndarray, np.ndarray]]):
        from imgaug import augmenters as iaa

        self.files = []
        for i, (image, mask) in enumerate(volumes):
            for d in range(len(image)):
                path = folder / f"{i}-{d}.npy"
                np.save(path, image[d].astype(np.float64))
                np.save(folder / f"{i}-{d}-mask.npy", mask[d])
                self.files.append(path)
        self.augment = iaa.Sequential([iaa.Affine(scale=(0.85, 1.15), rotate=(-45, 45)), iaa.ElasticTransformation()])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        import imgaug
        from imgaug.augmentables.segmaps import SegmentationMapsOnImage

        path = self.files[index]
        image, mask = np.load(path).astype(np.float32), np.load(path.with_name(f"{path.stem}-mask.npy"))
        imgaug.seed(torch.randint(0, 1_000_000, (1,)).item())
        image, mask = self.augment(image=image, segmentation_maps=SegmentationMapsOnImage(mask, mask.shape))
        return image[None], mask.get_arr()[None]


def data_path(s: dict, device: torch.device) -> dict:
    """Slices per second of one worker with the seed's augmentation over the plain form's; imgaug's share; workers."""
    with tempfile.TemporaryDirectory() as folder:
        # Slices of the training size in the cache, the same for both.
        rng, depth = np.random.default_rng(0), 16
        volumes, cached = [], []
        for i in range(-(-s["load_slices"] // depth)):
            image = rng.normal(size=(depth, *s["size"])).astype(np.float16)
            mask = np.zeros(image.shape, np.uint8)
            mask[:, s["size"][0] // 4 : s["size"][0] // 2, s["size"][1] // 4 : s["size"][1] // 2] = 1
            paths = [Path(folder, f"scan-{i}.{kind}.npy") for kind in ("image", "mask")]
            np.save(paths[0], image)
            np.save(paths[1], mask)
            volumes.append((image, mask))
            cached.append(data.CachedScan(str(i), *paths, paths[1], (1, 1, 1), tuple(range(depth)), (1,) * depth))
        ours = data.SliceDataset(cached, s["size"], augment="seed")  # first: it makes imgaug import on NumPy 2
        loaders = {name: DataLoader(dataset, s["batch"], shuffle=True, num_workers=1, persistent_workers=True)
                   for name, dataset in (("plain", PlainSlices(Path(folder), volumes)), ("ours", ours))}
        batches = s["load_slices"] // s["batch"]
        sides = {name: partial(lambda loader: sum(1 for _ in islice(loader, batches)) and None, loader)
                 for name, loader in loaders.items()}
        image, mask = volumes[0][0][0].astype(np.float32), volumes[0][1][0]

        def imgaug_alone() -> None:  # in this process, on one slice: the augmenters and their seeding
            for k in range(s["load_slices"]):
                data.augment("seed", image, mask, k)

        seconds = take_turns(sides | {"imgaug alone": imgaug_alone}, s["short_repeats"])
    count = batches * s["batch"]
    rate = [count / t for t in seconds["ours"]]
    per_slice = [1000 * t / s["load_slices"] for t in seconds["imgaug alone"]]
    checks = [
        check("slices/s / plain form's", over(seconds["plain"], seconds["ours"]), "at least 1.1"),
        check("slices/s of a worker", rate),
        check("imgaug's own augmenters", per_slice, unit="ms a slice"),
        check("the whole path", [1000 / r for r in rate], unit="ms a slice"),
        check("workers for a GPU that trains on 1000 slices/s", [math.ceil(1000 / r) for r in rate]),
    ]
    return {"checks": checks, "seconds": seconds}


FIRST_BATCH = """
import json, os, sys, time
import data, nibabel, train
read, opened = nibabel.load, []
nibabel.load = lambda *a, **k: (opened.append(a), read(*a, **k))[1]
args = train.parse_args(sys.argv[1:])
begun, cpu = time.perf_counter(), os.times()
run = train.prepare(args)
prepared, used = time.perf_counter(), os.times()
next(iter(run.loader))
print(json.dumps({"seconds": time.perf_counter() - begun, "files": len(opened),
                  "cores": (used.user + used.system - cpu.user - cpu.system) / (prepared - begun)}))
os._exit(0)  # the workers need not be asked
"""


def second_start(s: dict, device: torch.device) -> dict:
    """Second start of training on 80 scans: seconds from the imports to the first batch, no NIfTI read; the first."""
    source, seconds = scans(s["scans"]), {"first": [], "second": []}
    for _ in range(s["repeats"]):
        with tempfile.TemporaryDirectory() as folder:
            argv = ["--data", source, "--cache", f"{folder}/arrays", "--logs", f"{folder}/logs", "--fold", "all",
                    "--device", device.type]
            first = in_new_process(FIRST_BATCH, *argv, "--out", f"{folder}/a")
            second = in_new_process(FIRST_BATCH, *argv, "--out", f"{folder}/b")
        for name, start in (("first", first), ("second", second)):
            seconds[name].append(start["seconds"])
    cores = os.cpu_count() or 1
    checks = [
        check(f"second start on {s['scans']} scans", seconds["second"], "at most 2", "s"),
        check("NIfTI files read at the second start", [second["files"]], "at most 0"),
        check("first start", seconds["first"], unit="s"),
        check(f"cores of {cores} at work in the first start", [first["cores"]]),
    ]
    return {"checks": checks, "seconds": seconds}


def epoch_overhead(s: dict, device: torch.device) -> dict:
    """Training time of an epoch over (steps x a bare step on ready tensors), workers on; share of it spent waiting."""
    width, goal = (64, "at most 1.05") if device.type == "cuda" else (32, "at most 1.10")
    with tempfile.TemporaryDirectory() as folder:
        args = train_args(scans(s["scans"]), folder, epochs=1, width=min(width, s["width"]), device=device.type,
                          size=s["size"], batch_size=s["batch"], limit_batches=s["steps"], workers=1)
        run = quietly(train.prepare, args)
        bare = our_step(run.net, *samples(s, device), BCEDiceLoss())
        waiting = []

        def epoch() -> float:
            quietly(train.fit_loop, args, run)
            row = load_checkpoint(run.out / "last.pt")["log"][-1]
            waiting.append(row["waiting"])
            return row["seconds"]

        def bare_steps() -> None:
            run.net.train()
            steps_per_call(bare, run.batches)

        seconds = take_turns({"bare": bare_steps, "epoch": epoch}, s["repeats"])
    checks = [check(f"epoch / bare steps, width {args.width}, 1 worker", over(seconds["epoch"], seconds["bare"]), goal),
              check("share of the epoch spent waiting for data", waiting[-s["repeats"] :])]
    return {"checks": checks, "seconds": seconds, "steps": s["steps"]}


def prediction(s: dict, device: torch.device) -> dict:
    """Prediction of a scan of 320 x 320 x 110, width 64: over the slice loop, over MONAI's sliding window; files apart.

    On a CPU only some of the slices are predicted, since each takes the same time. MONAI's window runs the same network
    in the same precision and memory format, with windows of 192 x 160 and its default overlap.
    """
    from monai.inferers import sliding_window_inference

    depth = s["volume"][0] if device.type == "cuda" else s["predicted"]
    volume = np.random.default_rng(0).normal(size=(depth, *s["volume"][1:])).astype(np.float16)
    network = SEED_NETWORK | {"width": s["width"]}
    plain, net = UNet(**network).to(device).eval(), our_network(device, **network).eval()
    precision = pick_precision("auto", device)

    @torch.no_grad()
    def slice_loop() -> None:
        masks = []
        for image in volume.astype(np.float32):
            logits = plain(torch.from_numpy(image)[None, None].to(device))
            masks.append((torch.sigmoid(logits)[0, 0] > 0.5).cpu().numpy())
        np.stack(masks)

    @torch.inference_mode()
    def windows() -> None:
        image = torch.from_numpy(volume.astype(np.float32))[:, None].to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            torch.sigmoid(sliding_window_inference(image, s["size"], 16, net).float()).cpu().numpy()

    seconds = take_turns({"slice loop": slice_loop, "MONAI": windows,
                          "ours": lambda: predict_volume(net, volume, precision=precision) is None or None},
                         s["repeats"])
    with tempfile.TemporaryDirectory() as folder:
        # Rounded noise: gzip finds as little in it as in a scan.
        voxels = np.random.default_rng(0).normal(300, 60, s["volume"][::-1]).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.diag([0.625, 0.625, 1.25, 1])), Path(folder, "scan.nii.gz"))
        scan = data.read_scan(Path(folder, "scan.nii.gz"))
        recipe = {"spacing": [None] * 3, "crop": 0, "normalise": "percentile"}
        mask = np.zeros(scan.array.shape, np.uint8)
        mask[:, : s["volume"][1] // 4, : s["volume"][2] // 4] = 1
        files = take_turns({
            "read": lambda: data.read_scan(Path(folder, "scan.nii.gz")) is None or None,
            "preprocess": lambda: data.preprocess(scan.array, scan.spacing, recipe) is None or None,
            "write": partial(write_like, Path(folder, "mask.nii.gz"), mask, scan),
        }, s["repeats"])
    whole = [t * s["volume"][0] / depth for t in seconds["ours"]]
    checks = [
        check("slice loop / ours", over(seconds["slice loop"], seconds["ours"]), "at least 3"),
        check("MONAI sliding window / ours", over(seconds["MONAI"], seconds["ours"]), "at least 1"),
        check(f"{s['volume'][0]} slices, from the {depth} timed", whole, unit="s"),
        *(check(f"{name}, whole scan", values, unit="s") for name, values in files.items()),
    ]
    return {"checks": checks, "seconds": seconds | files}


RESIDENT = """
import json, multiprocessing, re, sys
from pathlib import Path
import train
multiprocessing.set_start_method(sys.argv[1])
if __name__ == "__main__":
    args = train.parse_args(sys.argv[2:])
    run = train.prepare(args)
    train.fit_loop(args, run)
    pids = ["self", *(child.pid for child in multiprocessing.active_children())]
    status = [Path(f"/proc/{pid}/status").read_text() for pid in pids]
    print(json.dumps({"peak": [int(re.search(r"VmHWM:\\\\s*(\\\\d+)", text)[1]) / 1e3 for text in status]}))
""".replace("\\\\", "\\")


def memory(s: dict, device: torch.device) -> dict:
    """Resident memory of training on 100 scans over that on 10, workers included, started by fork and by spawn.

    The peak of each process, summed, after the same number of steps (1 epoch of 100 scans, 10 of 10), width 4.
    """
    many, few = s["memory_scans"], max(s["memory_scans"] // 10, 1)
    checks, every = [], {}
    for method in ("fork", "spawn"):
        def resident(count: int, method: str = method) -> float:
            with tempfile.TemporaryDirectory() as folder:
                argv = ["--data", scans(count), "--cache", SCRATCH / "arrays", "--out", f"{folder}/a", "--logs", folder,
                        "--fold", "all", "--width", "4", "--depth", "2", "--size", "64", "64", "--augment", "none",
                        "--epochs", many // count, "--workers", "2", "--device", device.type]
                return float(sum(in_new_process(RESIDENT, method, *argv)["peak"]))

        sides = {f"{count} scans": partial(resident, count) for count in (few, many)}
        peak = take_turns(sides, s["repeats"])
        ratios = over(peak[f"{many} scans"], peak[f"{few} scans"])
        checks.append(check(f"memory with {many} scans / {few}, {method}", ratios, "at most 1.10"))
        every |= {f"{method}, {name}, MB": values for name, values in peak.items()}
    return {"checks": checks, "seconds": every}


def slope(x: list[float], seconds: list[float]) -> float:
    """Exponent k of seconds ~ x**k, by least squares on the logarithms."""
    return float(np.polyfit(np.log(x), np.log(seconds), 1)[0])


def growth(s: dict, device: torch.device) -> dict:
    """Seconds of an epoch against 1x, 4x, 16x scans; against width; against slice size: slopes, and docs/growth.png."""
    few, batches = s["growth_scans"][0], {"limit_batches": s["steps"] // 3 or 1}
    settings = {
        "scans": [(n, {"width": 4, "size": (64, 64), "augment": "none"}) for n in s["growth_scans"]],
        "width": [(w, {"width": w, "size": (64, 64), **batches}) for w in s["growth_widths"]],
        "slice height": [(n, {"width": 8, "size": (n, n), **batches}) for n in s["growth_sizes"]],
    }
    checks, every = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, points in settings.items():
            sides = {}
            for value, flags in points:
                source = scans(value if kind == "scans" else few)
                args = train_args(source, Path(folder, f"{kind}-{value}"), epochs=1, batch_size=s["batch"], workers=1,
                                  device=device.type, **flags)
                run = quietly(train.prepare, args)

                def epoch(args=args, run=run) -> float:
                    quietly(train.fit_loop, args, run)
                    return load_checkpoint(run.out / "last.pt")["log"][-1]["seconds"]

                sides[str(value)] = epoch
            seconds = take_turns(sides, s["repeats"])
            x = [value for value, _ in points]
            slopes = [slope(x, list(row)) for row in zip(*seconds.values(), strict=True)]
            checks.append(check(f"exponent of {kind} in the seconds of an epoch", slopes))
            every[kind] = seconds
    return {"checks": checks, "seconds": every}


def plot(record: dict, path: Path) -> None:
    """Seconds an epoch against scans, width and slice size, on axes where a power is a line."""
    from matplotlib.figure import Figure

    row = record["rows"]["8"]
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    titles = {"scans": "scans", "width": "channels of the first level", "slice height": "height and width of a slice"}
    for axes, (kind, title), line in zip(figure.subplots(1, 3), titles.items(), row["checks"], strict=True):
        points = row["seconds"][kind]
        x, every = [int(value) for value in points], list(points.values())
        for column, values in zip(x, every, strict=True):
            axes.plot([column] * len(values), values, ".", color="0.6")
        axes.plot(x, [statistics.median(values) for values in every], "o-", color="#0072B2")
        axes.set(xscale="log", yscale="log", xlabel=title, title=f"slope {line['median']:.2f}")
        axes.set_xticks(x, [str(value) for value in x])
        axes.minorticks_off()
        seconds = [n for n in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if min(map(min, every)) <= n <= max(map(max, every))]
        axes.set_yticks(seconds, [f"{n:g}" for n in seconds])
    figure.axes[0].set_ylabel("seconds of an epoch")
    visualize.save(figure, path)


ROWS = {1: training_step, 2: multiply_adds, 3: data_path, 4: second_start, 5: epoch_overhead, 6: prediction, 7: memory,
        8: growth}

# -------------------------------------------------------------------------------------------------------------- the run


def main(argv: list[str] | None = None) -> int:
    lines = [f"  {number}  {row.__doc__.splitlines()[0]}" for number, row in ROWS.items()]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="rows:\n" + "\n".join(lines),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", choices=tuple(ROWS), metavar="N",
                        help="rows to measure anew (default: those that the JSON does not hold yet)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one repetition: does it run at all?")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "speed", metavar="DIR")
    args = parser.parse_args(argv)
    sizes, device = QUICK if args.quick else FULL, pick_device(args.device)
    path = args.results / (f"quick_{args.device}.json" if args.quick else f"speed_{args.device}.json")
    version = commit()  # of the code that runs, whatever is edited meanwhile
    versions = {name: metadata.version(name) for name in ("torch", "numpy", "monai", "imgaug", "opencv-python")}
    versions["python"] = platform.python_version()
    record = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    warnings.filterwarnings("ignore")
    keep_freed_memory()
    for number in args.rows or [n for n in ROWS if str(n) not in record["rows"]]:
        begun = time.perf_counter()
        row = ROWS[number](sizes, device)
        shown = shlex.join(["--rows", str(number), "--device", args.device] + ["--quick"] * args.quick)
        record["rows"][str(number)] = {
            "name": ROWS[number].__name__, "command": f"python benchmarks/speed.py {shown}", "commit": version,
            "date": datetime.date.today().isoformat(), "minutes": (time.perf_counter() - begun) / 60, **row,
        }
        record["rows"] = dict(sorted(record["rows"].items()))
        record |= {"hardware": hardware(), "threads": torch.get_num_threads(), "sizes": sizes,
                   "versions": versions}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
        if number == 8 and not args.quick:
            plot(record, ROOT / "docs" / "growth.png")
        for line in row["checks"]:
            met = {True: "met", False: "MISSED", None: ""}[line.get("met")]
            spread = f"({min(line['values']):.3g} to {max(line['values']):.3g})"
            print(f"{number}  {line['what']:66} {line['median']:8.3g} {line['unit']:10} {spread:20} {line['goal']:14} "
                  f"{met}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
