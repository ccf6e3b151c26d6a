"""Time of each stage against what a user would pick instead: the plain form, MONAI, Lightning, one core.

    python benchmarks/speed.py [--rows step data] [--device cuda]     # results/speed/speed_cpu.json; --help: the rows

The plain form is what tutorials write: float32, NCHW, Adam, the loss read in every step, imgaug by its own wrappers.
The sides of a comparison take turns, A B, B A, ..., after a warm-up of each; a ratio is of neighbours in time, so that
a machine that is shared slows both; the median is held against the goal. The JSON is written after each row.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from record import RESULTS, ROOT, provenance, write
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import data
import phantom
import predict
from losses import DiceLoss
from unet import UNet

SCRATCH = ROOT / "cache" / "speed"  # synthetic scans and their cache, kept from call to call
# Few batches of small slices or patches, so that all trainings of the row `engines` take about ten minutes.
FULL = {"size": (192, 160), "batch": 8, "volume": (110, 320, 320), "scans": 20,
        "first recipe": {"width": 64, "norm": "none"},
        "default": {"width": 16, "depth": 3, "stem": 4},  # of slices below 0.9 mm
        "trainings": {"width 8": "--dims 2 --width 8 --size 128 96 --limit-batches 30 --epochs 3 --workers 1",
                      "width 64": "--dims 2 --width 64 --size 64 64 --limit-batches 5 --epochs 3 --workers 1",
                      "default": "--dims 3 --stem 4 --size 80 128 128 --limit-batches 60 --epochs 3"}}
TINY = "--dims 2 --width 2 --depth 1 --size 16 16 --limit-batches 2 --epochs 2 --workers 0"
QUICK = {"size": (32, 32), "batch": 2, "volume": (4, 32, 32), "scans": 2, "first recipe": {"width": 2},
         "default": {"width": 2}, "trainings": {"width 8": TINY, "default": TINY}}  # for a test to run every row


def take_turns(sides: dict[str, Callable], repeats: int) -> dict[str, np.ndarray]:
    """Seconds of each side, A B, B A, ..., after a warm-up if rounds are several; or what a side measured."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for n in range(-1 if repeats > 1 else 0, repeats):
        for name in list(sides)[:: -1 if n % 2 else 1]:
            begun = time.perf_counter()
            measured = sides[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if n >= 0:
                seconds[name].append(measured if isinstance(measured, float) else time.perf_counter() - begun)
    return {name: np.array(values) for name, values in seconds.items()}


def check(what: str, values: Sequence[float], goal: str = "", unit: str = "") -> dict:
    """A line of the table: the median of the values, held against "at most N" or "at least N"."""
    median, limit = float(np.median(values)), float(goal.split()[-1]) if goal else None
    met = {} if not goal else {"met": median <= limit if goal.startswith("at most") else median >= limit}
    return {"what": what, "median": median, "unit": unit, "goal": goal, "values": [float(v) for v in values], **met}


def training_step(net: nn.Module, image: Tensor, mask: Tensor, plain: bool = False, compiled: bool = False) -> Callable:
    """A training step as in train.py, or in the plain form, which is that of MONAI's tutorials, too."""
    device, precision = image.device, torch.float32 if plain else predict.pick_precision("auto", image.device)
    layout = torch.contiguous_format if plain else net.memory_format
    net, image = net.to(device, memory_format=layout), image.to(memory_format=layout)
    optimizer = torch.optim.Adam(net.parameters()) if plain else torch.optim.AdamW(net.parameters(), fused=True)
    scaler = torch.amp.GradScaler(device.type, 1.0, enabled=not plain)
    forward, loss_function = torch.compile(net) if compiled else net, DiceLoss()

    def step() -> None:
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = forward(image)
        loss = loss_function(logits.float(), mask)
        scaler.scale(loss).backward()
        if plain:
            loss.item()
        else:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def plain_augment() -> Callable:
    """What `--augment geometry` does, as imgaug's manual has it."""
    iaa = data.import_imgaug()
    from imgaug.augmentables.segmaps import SegmentationMapsOnImage as Mask

    augment = iaa.Sequential([iaa.Affine(scale=(0.85, 1.15), rotate=(-45, 45)),
                              iaa.ElasticTransformation(alpha=(0, 40), sigma=(4, 8))])

    def sample(image: np.ndarray, mask: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        augment.seed_(seed)
        image, mask = augment(image=image[0], segmentation_maps=Mask(mask[0], mask[0].shape))
        return image[None], mask.get_arr()[None]

    return sample


def monai_augment() -> Callable:
    """What `--augment full` does, as often and as strongly, by MONAI; rotation, scale and elastic in one."""
    from monai import transforms as t

    augment = t.Compose([
        t.Rand2DElasticd(["image", "mask"], (20, 20), (0, 3), prob=1, rotate_range=np.pi / 4, scale_range=0.15,
                         mode=["bilinear", "nearest"], padding_mode="zeros"),
        t.RandScaleIntensityd("image", 0.4, prob=1), t.RandShiftIntensityd("image", 0.7, prob=1),
        t.RandGaussianNoised("image", prob=0.1, std=0.2), t.RandGaussianSmoothd("image", (0, 1), (0, 1), prob=0.25),
        t.ToNumpyd(["image", "mask"])])
    return lambda image, mask, seed: augment({"image": image, "mask": mask}).values()


def epoch_seconds(launcher: Sequence[str], words: Sequence[str]) -> float:
    """Median seconds that an epoch of train.py trained, in a process of its own, but for the first, which warms up."""
    with tempfile.TemporaryDirectory() as out:
        command = [*launcher, str(ROOT / "train.py"), *words, "--out", out, "--tensorboard", out]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(run.stderr)
        log = predict.load_checkpoint(Path(out, "last.pt"))["log"]
    return float(np.median([row["system/seconds"] for row in log[1:]]))


def step(s: dict, device: torch.device) -> list[dict]:
    """Training step: ours, the plain form, MONAI's as in its 2D tutorials; share of what the device can do."""
    from monai.networks import nets

    image = torch.randn(s["batch"], 1, *s["size"], generator=torch.Generator().manual_seed(0)).to(device)
    mask, levels = (image > 0.5).float(), {"channels": (16, 32, 64, 128, 256), "strides": (2, 2, 2, 2)}
    ours = {name: UNet(**s[name]) for name in ("first recipe", "default")}
    theirs = {"BasicUNet": nets.BasicUNet(2, 1, 1), "UNet": nets.UNet(2, 1, 1, **levels, num_res_units=2),
              "AttentionUnet": nets.AttentionUnet(2, 1, 1, **levels)}
    sides, operations = {}, {}
    for name, net in (ours | {"plain form": UNet(**s["first recipe"])} | theirs).items():
        sides[name] = training_step(net, image, mask, plain=name not in ours)
        with FlopCounterMode(display=False) as counter:
            sides[name]()
        operations[name] = counter.get_total_flops()
        if name in ours and device.type == "cuda":  # on a CPU torch.compile needs a C++ compiler
            sides[f"{name}, compiled"] = training_step(net, image, mask, compiled=True)
            operations[f"{name}, compiled"] = operations[name]
    n = 8192 if device.type == "cuda" else 1024  # what the device can do: the product of two large matrices
    matrix = torch.randn(n, n, device=device, dtype=predict.pick_precision("auto", device))
    seconds = take_turns(sides | {"matrices": partial(torch.mm, matrix, matrix)}, s["repeats"])
    rate = {name: count / seconds[name] for name, count in (operations | {"matrices": 2 * n**3}).items()}
    lines = [check("time / plain form, same network", seconds["first recipe"] / seconds["plain form"], "at most 0.40")]
    lines += [check(f"default: time per multiply-add / {name}", rate[name] / rate["default"], "at most 0.60")
              for name in theirs]
    for name in sides:
        lines += [check(f"{name}, slices/s", s["batch"] / seconds[name]),
                  check(f"{name}, share of what the device can do", rate[name] / rate["matrices"])]
    return lines


def data_path(s: dict, device: torch.device) -> list[dict]:
    """Slices/s of one worker with the same transforms, over imgaug's own wrappers and over MONAI."""
    how = {"axis": 2, "label": None, "spacing": [None] * 3, "crop": 0, "normalise": "percentile", "size": s["size"]}
    scans = data.cache_scans(data.find_pairs(s["data"]), how, SCRATCH / "cache")[:2]
    sets = {kind: data.SliceDataset(scans, s["size"], augment=kind) for kind in ("geometry", "full")}
    for name, augment in {"plain form": plain_augment(), "MONAI": monai_augment()}.items():
        sets[name] = data.SliceDataset(scans, s["size"])
        sets[name].augment = augment
    how = {"batch_size": s["batch"], "num_workers": 1, "persistent_workers": True, "multiprocessing_context": "fork"}
    seconds = take_turns({name: partial(list, DataLoader(one, **how)) for name, one in sets.items()}, s["repeats"])
    lines = [check("geometry: slices/s / plain form's", seconds["plain form"] / seconds["geometry"], "at least 1.1"),
             check("full: slices/s / MONAI's", seconds["MONAI"] / seconds["full"], "at least 1.5")]
    return lines + [check(f"slices/s of a worker, {name}", len(sets[name]) / seconds[name]) for name in sets]


def prediction(s: dict, device: torch.device) -> list[dict]:
    """Prediction of a scan of 320 x 320 x 110 by the network of --dims 2, over a plain loop over its slices."""
    volume = np.random.default_rng(0).normal(size=s["volume"]).astype(np.float16)
    plain, net = (UNet(**s["default"]).to(device).eval() for _ in range(2))
    net = net.to(memory_format=net.memory_format)

    @torch.no_grad()
    def slice_loop() -> None:
        for image in volume.astype(np.float32):
            (torch.sigmoid(plain(torch.from_numpy(image)[None, None].to(device)))[0, 0] > 0.5).cpu().numpy()

    ours = partial(predict.predict_volume, net, volume, precision=predict.pick_precision("auto", device))
    seconds = take_turns({"slice loop": slice_loop, "ours": ours}, s["repeats"])
    return [check("slice loop / ours", seconds["slice loop"] / seconds["ours"], "at least 3"),
            check("ours", seconds["ours"], unit="s")]


def engines(s: dict, device: torch.device) -> list[dict]:
    """Seconds of an epoch: the loop over Lightning, and on a CPU two cores over one."""
    python, lines, cores = [sys.executable], [], sorted(os.sched_getaffinity(0))[:2]
    for name, more in s["trainings"].items():
        words = ["--data", str(s["data"]), "--cache", str(SCRATCH / "cache"), "--fold", "all", "--device", device.type,
                 *more.split()]
        sides = "loop / Lightning", "at most 1.00", (python, words), (python, [*words, "--engine", "lightning"])
        if device.type == "cpu" and name == "default":
            both, one = (["taskset", "-c", ",".join(map(str, some)), *python] for some in (cores, cores[:1]))
            sides = "2 cores / 1", "at most 0.60", (both, words), (one, words)
        what, goal, *commands = sides
        seconds = take_turns({n: partial(epoch_seconds, *command) for n, command in enumerate(commands)}, s["repeats"])
        lines.append(check(f"{what}, {name}", seconds[0] / seconds[1], goal))
    return lines


ROWS = {"step": step, "data": data_path, "prediction": prediction, "engines": engines}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, told = parser.add_argument, ". ".join(f"{name}: {row.__doc__}" for name, row in ROWS.items())
    add("--rows", nargs="+", choices=ROWS, metavar="ROW", default=list(ROWS), help=told)
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--repeats", type=int, default=5, metavar="N", help="rounds of each comparison (default 5)")
    add("--quick", action="store_true", help="tiny sizes, one round: does it run at all?")
    add("--results", type=Path, default=RESULTS / "speed", metavar="DIR")
    args = parser.parse_args(argv)
    predict.keep_freed_memory()
    path = args.results / f"{'quick' if args.quick else 'speed'}_{args.device}.json"
    record, s = json.loads(path.read_text()) if path.exists() else {"rows": {}}, QUICK if args.quick else FULL
    s = s | {"repeats": 1 if args.quick else args.repeats, "data": SCRATCH / f"{s['scans']}-scans"}
    phantom.write_dataset(s["data"], scans=s["scans"], size=0.5 if args.quick else 1)
    for name in args.rows:
        command = f"python benchmarks/speed.py --rows {name} --device {args.device}{' --quick' * args.quick}"
        row = provenance(command, args.device) | {"checks": ROWS[name](s, predict.pick_device(args.device))}
        record["rows"][name] = row
        write(path, record)
        for line in row["checks"]:
            met = {True: "met", False: "MISSED", None: ""}[line.get("met")]
            print(f"{name:10} {line['what']:45} {line['median']:9.3g} {line['unit']:2} {line['goal']:14} {met}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
