"""Time and memory of each stage against what a user would pick instead: MONAI, and the plain form (minutes.py).

    python benchmarks/speed.py [--rows step data] [--device cuda]     # benchmarks/results/speed/speed_cpu.json
    python benchmarks/speed.py --rows minutes --data DIR              # trains on real scans: an hour or more
    python benchmarks/speed.py --help                                 # a line for each row

The sides of a comparison take turns, A B, B A, ..., after a warm-up of each; a ratio is of neighbours in time, so that
a machine that is shared slows both, and the median of the ratios is held against the goal. All sides run with the
allocator settings of this project, which make the others faster, too. The JSON is written after each row: without
--rows, a run that was stopped goes on with the rows that are not in it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import multiprocessing
import platform
import re
import shlex
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from minutes import GOAL, MONAI_2D, MONAI_LEVELS, PlainSlices, plain_step, race
from record import RESULTS, ROOT, commit, hardware
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import data
import predict
import train
from losses import DiceLoss
from unet import UNet

SCRATCH = ROOT / "cache" / "speed"  # synthetic scans, and their cache, kept from call to call
HOW = {"axis": 2, "label": None, "spacing": [None] * 3, "crop": 0, "normalise": "percentile", "size": (1, 1)}
DEFAULT = {name: train.DEFAULTS[2][name] for name in ("width", "depth")} | {"stem": 4}  # for voxels below 0.9 mm
# `networks`: the first recipe's, the default, the classical one. --quick shrinks all, for a test to run every row.
FULL = {"repeats": 5, "size": (192, 160), "batch": 8, "slices": 160, "volume": (110, 320, 320), "scans": (10, 100),
        "shape": (64, 128, 128), "crop": (96, 96), "every": 5632, "ours": [],
        "networks": ({"width": 64, "norm": "none"}, DEFAULT, {"width": 16, "depth": 4})}
QUICK = {"repeats": 1, "size": (32, 32), "batch": 2, "slices": 8, "volume": (4, 32, 32), "scans": (1, 2),
         "shape": (8, 32, 32), "crop": (32, 32), "every": 8,
         "ours": ["--epochs", "1", "--limit-batches", "2", "--width", "4"],
         "networks": ({"width": 4, "depth": 1}, {"width": 4, "depth": 1, "stem": 2}, {"width": 2, "depth": 2})}

# ------------------------------------------------------------------------------------------------------------ measuring


def take_turns(sides: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side, A B, B A, ..., after a warm-up (not for one repetition, which is no measurement anyway)."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for n in range(-1 if repeats > 1 else 0, repeats):
        for name in list(sides)[:: -1 if n % 2 else 1]:
            begun = time.perf_counter()
            sides[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if n >= 0:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def over(a: Sequence[float], b: Sequence[float]) -> list[float]:
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


def begin(method: str, function: Callable, *arguments) -> None:
    warnings.simplefilter("ignore")
    multiprocessing.set_start_method(method, force=True)  # of the workers that the function starts
    with contextlib.redirect_stdout(io.StringIO()):
        function(*arguments)


def peak_memory(function: Callable, *arguments, method: str = "fork") -> float:
    """MB that a process of its own which calls `function`, and its workers, hold at most, in memory that belongs to no
    file: pages of mapped files, which the system takes back when it needs them, are not counted."""
    child = multiprocessing.get_context("spawn").Process(target=begin, args=(method, function, *arguments))
    child.start()
    peak, family = 0, re.compile(rf"^P?Pid:\s*{child.pid}$", re.M)
    while child.is_alive():
        held = 0
        for path in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):  # it has ended
                text = path.read_text()
                found = family.search(text) and re.search(r"RssAnon:\s*(\d+)", text)
                held += int(found[1]) if found else 0
        peak = max(peak, held)
        time.sleep(0.02)
    if child.exitcode:
        raise RuntimeError(f"{function.__name__}: ended with {child.exitcode}; its traceback is above")
    return peak / 1e3


def scans(count: int, shape: Sequence[int]) -> Path:
    """A data set of noise (D, H, W) with a bright block as its organ, made once."""
    root = SCRATCH / f"{count}-scans-{'x'.join(map(str, shape))}"
    rng, block = np.random.default_rng(0), tuple(slice(n // 4, n // 2) for n in reversed(shape))
    for path in [root / "images" / f"{n:03}.nii.gz" for n in range(count)]:
        label = root / "labels" / path.name
        if not label.exists():
            for folder in (path.parent, label.parent):
                folder.mkdir(parents=True, exist_ok=True)
            image, mask = rng.normal(300, 60, shape[::-1]).astype(np.int16), np.zeros(shape[::-1], np.uint8)
            mask[block], image[block] = 1, image[block] + 200
            for array, file in ((image, path), (mask, label)):
                nib.save(nib.Nifti1Image(array, np.diag([0.625, 0.625, 1.25, 1])), file)
    return root


def our_step(image: Tensor, mask: Tensor, **network) -> Callable:
    """A training step as in train.py: its precision, memory format and fused optimiser; no wait for the loss."""
    net, device = UNet(**network), image.device
    net = net.to(device, memory_format=net.memory_format)
    precision, loss_function = predict.pick_precision("auto", device), DiceLoss()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, weight_decay=0, fused=train.has_fused(device))
    scaler = torch.amp.GradScaler(device.type, 2.0**16 if precision == torch.float16 else 1.0)
    image = image.to(memory_format=net.memory_format)

    def step() -> None:
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = net(image)
        scaler.scale(loss_function(logits.float(), mask)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def samples(s: dict, device: torch.device) -> tuple[Tensor, Tensor]:
    """A batch of noise and blobs: the time of a step does not depend on what is in it."""
    image = torch.randn(s["batch"], 1, *s["size"], generator=torch.Generator().manual_seed(0))
    return image.to(device), (nn.functional.avg_pool2d(image, 9, 1, 4) > 0.1).float().to(device)


# ----------------------------------------------------------------------------------------------------------------- rows
# The first line of each docstring is the row's line of --help.


def step(s: dict, device: torch.device) -> dict:
    """Training step of the first recipe's network (width 64, 8 slices of 192 x 160), and the default's, over plain."""
    image, mask = samples(s, device)
    first, default, _ = s["networks"]
    plain = plain_step(UNet(**first).to(device), DiceLoss())
    seconds = take_turns({"plain": partial(plain, image, mask), "ours": our_step(image, mask, **first),
                          "default": our_step(image, mask, **default)}, s["repeats"])
    checks = [check("time / plain form, same network", over(seconds["ours"], seconds["plain"]), "at most 0.30"),
              check("time of the default network / plain form", over(seconds["default"], seconds["plain"]))]
    checks += [check(f"{name}, slices/s", [s["batch"] / t for t in values]) for name, values in seconds.items()]
    return {"checks": checks, "raw": seconds}


def monai(s: dict, device: torch.device) -> dict:
    """Training step over MONAI's BasicUNet, UNet, AttentionUnet: time per multiply-add, and slices per second.

    Theirs as its 2D tutorials have them: float32, NCHW, Adam, DiceLoss(sigmoid=True), the loss read in every step.
    Ours: the default network, and the classical one, of as many levels as theirs; with gates against AttentionUnet.
    """
    from monai.losses import DiceLoss as MonaiDice
    from monai.networks import nets

    (image, mask), (_, *networks) = samples(s, device), s["networks"]
    checks, raw = [], {}
    for theirs in (nets.BasicUNet(**MONAI_2D), nets.UNet(**MONAI_LEVELS, num_res_units=2),
                   nets.AttentionUnet(**MONAI_LEVELS)):
        name = type(theirs).__name__
        sides = {"theirs": partial(plain_step(theirs.to(device), MonaiDice(sigmoid=True)), image, mask)}
        for ours, network in zip(("default", "classical"), networks, strict=True):
            sides[ours] = our_step(image, mask, **network, attention=name == "AttentionUnet")
        count = {}
        for side, one_step in sides.items():
            with FlopCounterMode(display=False) as counter:
                one_step()
            count[side] = counter.get_total_flops()  # 2 for each multiply-add, forward and backward
        seconds = take_turns(sides, s["repeats"])
        for ours in ("default", "classical"):
            ratios, share = over(seconds[ours], seconds["theirs"]), count["theirs"] / count[ours]
            checks += [check(f"{ours}: time per multiply-add / {name}", [r * share for r in ratios], "at most 0.50"),
                       check(f"{ours}: slices/s / {name}", [1 / r for r in ratios])]
        raw |= {f"{name}, {side}": values for side, values in seconds.items()} | {f"{name}, operations": count}
    return {"checks": checks, "raw": raw}


def data_path(s: dict, device: torch.device) -> dict:
    """Slices per second of one worker: with the first augmentation over the plain form's, and with the default's."""
    cached = data.cache_scans(data.find_pairs(scans(1, (s["slices"], *s["size"]))), HOW, SCRATCH / "arrays")
    with tempfile.TemporaryDirectory() as folder:
        sets = {"plain": PlainSlices(Path(folder), cached, s["size"])}
        sets |= {kind: data.SliceDataset(cached, s["size"], augment=kind) for kind in ("geometry", "full")}
        loaders = {name: DataLoader(dataset, s["batch"], shuffle=True, num_workers=1, persistent_workers=True)
                   for name, dataset in sets.items()}
        seconds = take_turns({name: partial(list, loader) for name, loader in loaders.items()}, s["repeats"])
    checks = [check("slices/s / plain form's", over(seconds["plain"], seconds["geometry"]), "at least 1.1")]
    checks += [check(f"slices/s of a worker, {kind}", [s["slices"] / t for t in seconds[kind]])
               for kind in ("geometry", "full")]
    return {"checks": checks, "raw": seconds}


def prediction(s: dict, device: torch.device) -> dict:
    """Prediction of a scan of 320 x 320 x 110 with the default network: over a slice loop, over MONAI's window.

    The slice loop is the plain form's. MONAI's sliding window runs the network in the same precision and memory format
    as ours, in windows of 192 x 160 with its default overlap.
    """
    from monai.inferers import sliding_window_inference

    volume = np.random.default_rng(0).normal(size=s["volume"]).astype(np.float16)
    precision = predict.pick_precision("auto", device)
    plain, net = (UNet(**s["networks"][1]).to(device).eval() for _ in range(2))
    net = net.to(memory_format=net.memory_format)

    @torch.no_grad()
    def slice_loop() -> None:
        for image in volume.astype(np.float32):
            (torch.sigmoid(plain(torch.from_numpy(image)[None, None].to(device)))[0, 0] > 0.5).cpu().numpy()

    @torch.inference_mode()
    def windows() -> None:
        image = torch.from_numpy(volume.astype(np.float32))[:, None].to(device, memory_format=net.memory_format)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            torch.sigmoid(sliding_window_inference(image, s["size"], 16, net).float()).cpu().numpy()

    seconds = take_turns({"slice loop": slice_loop, "MONAI": windows,
                          "ours": partial(predict.predict_volume, net, volume, precision=precision)}, s["repeats"])
    checks = [check("slice loop / ours", over(seconds["slice loop"], seconds["ours"]), "at least 3"),
              check("MONAI sliding window / ours", over(seconds["MONAI"], seconds["ours"]), "at least 1"),
              check("ours", seconds["ours"], unit="s")]
    return {"checks": checks, "raw": seconds}


def brief(source: Path, folder: str, epochs: int = 1, device: str = "cpu") -> argparse.Namespace:
    """Arguments of a small training on every scan."""
    words = f"--fold all --width 4 --depth 2 --size 64 64 --augment none --workers 2 --epochs {epochs}".split()
    return train.parse_args([*words, "--data", str(source), "--cache", str(SCRATCH / "arrays"), "--out", folder,
                             "--tensorboard", folder, "--device", device])


def train_briefly(source: Path, epochs: int, device: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        train.fit_loop(train.prepare(brief(source, folder, epochs, device)))


def memory(s: dict, device: torch.device) -> dict:
    """Memory (of no file) of training on 100 scans over that on 10, 2 workers included, started by fork and by spawn.

    The peak over all processes, with the same number of steps: 1 epoch of 100 scans, 10 of 10.
    """
    few, many = s["scans"]
    sources = {count: scans(count, s["shape"]) for count in s["scans"]}
    for source in sources.values():
        train.load_data(brief(source, ""))  # into the cache, whose filling is not measured
    checks, raw = [], {}
    for method in ("fork", "spawn"):
        peaks = {count: [peak_memory(train_briefly, source, many // count, device.type, method=method)
                         for _ in range(min(s["repeats"], 3))] for count, source in sources.items()}
        more = [(b - a) / (many - few) for a, b in zip(peaks[few], peaks[many], strict=True)]
        checks += [check(f"memory with {many} scans / {few}, {method}", over(peaks[many], peaks[few]), "at most 1.10"),
                   check(f"memory of each further scan, {method}", more, unit="MB")]
        raw |= {f"{method}, {count} scans, MB": values for count, values in peaks.items()}
    return {"checks": checks, "raw": raw}


def minutes(s: dict, device: torch.device) -> dict:
    """Minutes of training to a validation Dice of 0.90: the short command, and MONAI (--data DIR, on a CPU).

    A side that does not get there within --minutes counts with those: the ratio is then a lower bound.
    """
    curves, reached, checks = race(s), {}, []
    for name, points in curves.items():
        there = [point for point in points if point[1] >= GOAL]
        reached[name] = (there or points[-1:])[0][0]
        told = "" if there else f" (not reached: {points[-1][1]:.3f})"
        checks.append(check(f"minutes to a Dice of {GOAL:.2f}, {name}{told}", [reached[name]]))
    checks.append(check("MONAI / ours", [reached["MONAI"] / reached["ours"]], "at least 5"))
    return {"checks": checks, "raw": curves}


ROWS = {"step": step, "monai": monai, "data": data_path, "prediction": prediction, "memory": memory, "minutes": minutes}

# -------------------------------------------------------------------------------------------------------------- the run


def main(argv: Sequence[str] | None = None) -> int:
    lines = [f"  {name:10}  {row.__doc__.splitlines()[0]}" for name, row in ROWS.items()]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="rows:\n" + "\n".join(lines),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", nargs="+", choices=ROWS, metavar="ROW", help="rows to measure anew (default: those without a result)")
    add("--data", metavar="DIR", help="the scans of the row `minutes`, as in train.py")
    add("--minutes", dest="cap", type=float, default=60, help="of MONAI's training, at most (60)")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--quick", action="store_true", help="tiny sizes, one repetition: does it run at all?")
    add("--results", type=Path, default=RESULTS / "speed", metavar="DIR")
    args = parser.parse_args(argv)
    if "minutes" in (args.rows or []) and not args.data:
        parser.error("the row `minutes` trains on real scans: give --data")
    path = args.results / f"{'quick' if args.quick else 'speed'}_{args.device}.json"
    record = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    version, s = commit(), (QUICK if args.quick else FULL) | {"data": args.data, "cap": args.cap}
    warnings.filterwarnings("ignore")
    predict.keep_freed_memory()
    missing = ROWS.keys() - record["rows"].keys() - (set() if args.data else {"minutes"})
    for name in args.rows or [name for name in ROWS if name in missing]:
        begun = time.perf_counter()
        row = ROWS[name](s, predict.pick_device(args.device))
        words = ["--rows", name, "--device", args.device] + ["--quick"] * args.quick
        words += ["--data", Path(args.data).name, "--minutes", f"{args.cap:g}"] if name == "minutes" else []
        record["rows"][name] = {
            "command": f"python benchmarks/speed.py {shlex.join(words)}", "commit": version,
            "hardware": hardware(args.device), "date": datetime.date.today().isoformat(),
            "threads": torch.get_num_threads(), "versions": {"python": platform.python_version()} | {
                lib: metadata.version(lib) for lib in ("torch", "numpy", "monai", "imgaug", "opencv-python")},
            "took_minutes": (time.perf_counter() - begun) / 60, **row}
        args.results.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
        for line in row["checks"]:
            spread = f"({min(line['values']):.3g} to {max(line['values']):.3g})"
            print(f"{name:10} {line['what']:60} {line['median']:8.3g} {line['unit']:3} {spread:20} {line['goal']:14} "
                  f"{ {True: 'met', False: 'MISSED', None: ''}[line.get('met')]}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
