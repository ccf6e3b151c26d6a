"""Train a U-Net to segment an organ in MRI: the loop that Lightning would run, written by hand.

Contract: a folder of NIfTI scans and masks in (`data.py` names the layouts), a run folder out: last.pt, best.pt (the
epoch of the highest validation Dice), log.csv, split.json, args.json, pictures; TensorBoard events under --logs.
Validation is per scan, in the scan's own space. On a CPU a run is exact: killed and resumed, or left alone, it ends
with the same weights to the last bit. Ctrl-C and SIGTERM finish the step and save it (Lightning's engine goes on from
its last epoch instead); exit code 130 or 143. With 64 scans of the left atrium, an hour on two CPU cores (`--width 16
--epochs 12`) gives a Dice of about 0.915 on others: see the README.

    python train.py --data phantom --width 8                     # synthetic scans: minutes on a CPU
    python train.py --data Task02_Heart                         # one GPU, or the CPU, whatever there is
    python train.py --data Task02_Heart --out runs/a --resume   # go on where runs/a stopped, or start it
    python train.py --data Task02_Heart --dims 3                # patches of volumes instead of slices
    torchrun --nproc-per-node 4 train.py --data Task02_Heart    # four GPUs of one machine
    python train.py --data Task02_Heart --engine lightning      # the same run by lightning.Trainer; both: compare
    # the recipe that this project started from:
    python train.py --data Task02_Heart --width 64 --depth 3 --norm none --loss dice --lr 1e-4 \\
        --schedule constant --weight-decay 0 --clip 0 --augment seed --normalise minmax --crop 32
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import data
import visualize
from data import DataError
from losses import BCEDiceLoss, DiceLoss
from predict import VERSION, keep_freed_memory, load_checkpoint, pick_device, pick_precision, predict_volume
from unet import UNet

try:
    import resource  # peak memory
except ImportError:  # Windows
    resource = None

LOWEST = {"epochs": 1, "batch_size": 1, "accumulate": 1, "width": 1, "depth": 0, "crop": 0, "clip": 0, "workers": 0,
          "devices": 1, "num_nodes": 1, "limit_batches": 1, "overfit": 1, "lr": 0, "weight_decay": 0, "seed": 0,
          "max_gb": 0, "neighbours": 0}  # of the numeric arguments
LOSSES = {"dice": DiceLoss, "bce": nn.BCEWithLogitsLoss, "bce_dice": BCEDiceLoss}

# ----------------------------------------------------------------------------------------------------------- arguments


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a U-Net to segment an organ in MRI.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument_group("data").add_argument
    add("--data", required=True, metavar="DIR", help="imagesTr/ + labelsTr/, images/ + labels/, or the word phantom")
    add("--cache", default="cache", metavar="DIR", help="where preprocessed scans are kept")
    add("--max-gb", type=float, default=data.MAX_GB, metavar="GB", help="memory for one scan, half of the machine's")
    add("--label", type=int, nargs="+", metavar="N", help="label values that are foreground; None: all but 0")
    add("--axis", type=int, choices=(0, 1, 2), help="slice axis, 2: axial; None: that of the coarsest spacing")
    add("--folds", type=int, default=5, metavar="N", help="parts to split the scans into")
    add("--fold", default="0", metavar="K", help="the part to validate on, from 0; `all`: train on every scan")
    add("--normalise", default="percentile", choices=("zscore", "percentile", "minmax"), help="of each scan")
    add("--crop", type=int, default=0, metavar="N", help="pixels to cut off each border of a slice")
    add("--spacing", type=float, metavar="MM", help="resample pixels, in 3D voxels; None: the median, where far off")
    add("--size", "--patch", type=int, nargs="+", metavar="N", help="H W of training slices, D H W of patches; None: "
        "the median of the scans, in 3D at most 80 128 128")
    add("--neighbours", type=int, default=0, metavar="N", help="slices on either side seen as channels, in 2D")
    add("--augment", default="full", choices=("none", "seed", "full"), help="see data.py")

    add = parser.add_argument_group("network").add_argument
    add("--dims", type=int, default=2, choices=(2, 3), help="2: slices, 3: patches")
    add("--width", type=int, default=32, metavar="N", help="channels of the first level")
    add("--depth", type=int, default=4, metavar="N", help="poolings")
    add("--norm", default="batch", choices=("none", "batch", "instance"), help="normalisation layers")
    add("--attention", action="store_true", help="attention gates on the skips")

    add = parser.add_argument_group("optimisation").add_argument
    add("--loss", default="bce_dice", choices=tuple(LOSSES), help="training loss")
    add("--epochs", type=int, default=30, metavar="N", help="passes over the training slices")
    add("--batch-size", type=int, metavar="N", help="of all processes together; None: 16 slices, or 2 patches")
    add("--accumulate", type=int, default=1, metavar="N", help="batches per step: N times the batch, not the memory")
    add("--lr", type=float, default=4e-3, help="highest learning rate of AdamW")
    add("--schedule", default="onecycle", choices=("onecycle", "constant"), help="learning rate over the steps")
    add("--weight-decay", type=float, default=1e-2, help="of AdamW; with 0 it is Adam")
    add("--clip", type=float, default=1.0, metavar="NORM", help="largest norm of the gradient; 0: no limit")
    add("--seed", type=int, default=0, metavar="N", help="of the weights, the order and the augmentation")

    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="DIR", help="run folder; None: runs/<date and time>")
    add("--resume", action="store_true", help="go on from OUT/last.pt, where there is one")
    add("--logs", default="./logs", metavar="DIR", help="TensorBoard events")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="of the network's arithmetic")
    add("--workers", type=int, metavar="N", help="processes that load data; None: all cores but one, 4 at most")
    add("--engine", default="loop", choices=("loop", "lightning", "both"), help="whose loop; both: compare them")
    add("--devices", type=int, default=1, metavar="N", help="processes per node with Lightning (the loop: torchrun)")
    add("--num-nodes", type=int, default=1, metavar="N", help="nodes with Lightning")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--limit-batches", type=int, metavar="N", help="at most N batches and N validation scans an epoch: a dry run")
    add("--overfit", type=int, metavar="N", help="train and validate on the same N slices: can it learn at all?")

    parser.print_usage = lambda _: None  # an error is one line
    args = parser.parse_args(argv)
    for flag, lowest in LOWEST.items():
        value = getattr(args, flag)
        if value is not None and not value >= lowest:
            parser.error(f"--{flag.replace('_', '-')} {value}: expected at least {lowest}")
    if args.fold != "all" and not args.fold.isdecimal():
        parser.error(f"--fold {args.fold}: expected a number from 0, or all")
    if args.resume and not args.out:
        parser.error("--resume: say which run, with --out")
    if args.size and len(args.size) != args.dims:
        parser.error(f"--size {' '.join(map(str, args.size))}: expected {args.dims} numbers with --dims {args.dims}")
    if args.size and min(args.size[-2:]) < 2**args.depth:  # of a patch, H and W
        parser.error(f"--size {' '.join(map(str, args.size))}: smaller than one pixel of the lowest level; expected at "
                     f"least {2**args.depth}, or a lower --depth")
    if args.neighbours and args.dims == 3:
        parser.error(f"--neighbours {args.neighbours}: a patch holds its neighbours; leave it out with --dims 3")
    args.batch_size = args.batch_size or {2: 16, 3: 2}[args.dims]
    args.out = args.out or time.strftime("runs/%Y%m%d-%H%M%S")
    args.workers = min(4, max((os.cpu_count() or 1) - 1, 1)) if args.workers is None else args.workers
    return args


# ------------------------------------------------------------------------------------------------------ pieces of a run


def lr_at(step: int, total: int, schedule: str = "onecycle") -> float:
    """Learning rate of a step (from 0 to total - 1) as a share of the highest, 0 to 1.

    onecycle: up in a line over the first fifth of the run, then down in a cosine towards 0 (after Smith, Topin,
    "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates", 2018).
    """
    if schedule == "constant":
        return 1.0
    warmup = max(total // 5, 1)
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1))) / 2


def load_data(args: argparse.Namespace) -> tuple[list, list, dict, dict]:
    """Training and validation scans (`data.CachedScan`), split and preprocessing recipe of a run."""
    cache = Path(args.cache)
    if args.data == "phantom":
        import phantom

        root = phantom.write_dataset(cache / "phantom", scans=15, seed=0)
    else:
        root = Path(args.data)
    pairs = data.find_pairs(root)
    split = data.split_scans([pair.name for pair in pairs], args.folds, args.fold)
    spacing = data.survey(pairs, cache)
    axis = data.slice_axis(spacing) if args.axis is None else args.axis
    # The order of the upright axes for each slice axis (data.PLANES); the slice axis itself is not resampled in 2D.
    target = [args.spacing or spacing[i] for i in ((0, 2, 1), (1, 2, 0), (2, 1, 0))[axis]]
    target[0] = target[0] if args.dims == 3 else None
    recipe = {"axis": axis, "label": args.label, "spacing": target, "crop": args.crop, "normalise": args.normalise}
    scans = {scan.name: scan for scan in data.cache_scans(pairs, recipe, cache)}
    if not any(sum(scan.foreground) for scan in scans.values()):
        raise DataError(f"{root}: no label file holds foreground (--label {args.label}); there is nothing to learn")
    train, val = ([scans[name] for name in split[part]] for part in ("train", "val"))
    if args.overfit:  # of N scans; in 2D the slice with the most foreground of each
        fullest = train if args.dims == 3 else [replace(s, slices=(int(np.argmax(s.foreground)),)) for s in train]
        train = val = sorted(fullest, key=lambda scan: -max(scan.foreground))[: args.overfit]
        train = train * max(1, 32 * args.batch_size // len(train))  # so that an epoch has about 32 steps
    multiple, largest = 2**args.depth, (math.inf, math.inf) if args.dims == 2 else (80, 128, 128)
    shapes = np.array([np.load(scan.image, mmap_mode="r").shape[-args.dims :] for scan in train])
    # Larger slices are cropped, for training only: prediction takes them whole. The network pads up to a multiple.
    median = np.minimum(np.median(shapes, axis=0), largest).astype(int)
    size = args.size or (-(-median // multiple) * multiple).tolist()
    return train, val, split, recipe | {"size": size}


def evaluate(
    net: UNet, scans: Iterable[data.CachedScan], recipe: dict, precision: torch.dtype, batch_size: int
) -> list[dict]:
    """Score each scan in its own space: integer counts over the volume, divided once.

    Returns:
        One row per scan: name, dice (an empty mask predicted empty is 1), truth and prediction (foreground voxels),
        voxels, and image, truth and probability (H, W) of two slices: `panel`, the one with the most foreground, and
        `worst`, the one with the most wrong pixels.
    """
    rows = []
    for scan in scans:
        image, mask, truth = (np.load(path, mmap_mode="r") for path in (scan.image, scan.mask, scan.truth))
        if len(scan.slices) < len(image):  # --overfit
            image, mask, truth = (array[list(scan.slices)] for array in (image, mask, truth))
        probability = predict_volume(net, image, size=recipe["size"], precision=precision, batch_size=batch_size)
        prediction, truth = data.undo_preprocess(probability, truth.shape, recipe) > 0.5, truth.astype(bool)
        overlap, predicted, true = (int(np.count_nonzero(m)) for m in (prediction & truth, prediction, truth))
        fullest, wrong = (int(m.sum(axis=(1, 2)).argmax()) for m in (mask, (probability > 0.5) != mask))
        rows.append(
            {
                "name": scan.name,
                "dice": 2 * overlap / (predicted + true) if predicted + true else 1.0,
                "truth": true,
                "prediction": predicted,
                "voxels": truth.size,
                "panel": (image[fullest].astype(np.float32), mask[fullest], probability[fullest]),
                "worst": (image[wrong].astype(np.float32), mask[wrong], probability[wrong]),
            }
        )
    return rows


def panels(rows: Sequence[dict], which: str = "panel"):
    """Scan, truth, probability, prediction and error of a slice (`panel` or `worst`) of each validation scan."""
    shown = [row[which] for row in rows]
    size = np.max([image.shape for image, _, _ in shown], axis=0)
    images, truths, probabilities = (
        np.stack([data.fit(array, size) for array in arrays]) for arrays in zip(*shown, strict=True)
    )
    titles = [f"{row['name']}  Dice {row['dice']:.3f}" for row in rows]
    return visualize.compare(images, truths, probabilities, titles)


def clip_gradient(net: nn.Module, optimizer: torch.optim.Optimizer, limit: float) -> torch.Tensor:
    """Scale the gradient down to a norm of `limit` (0: leave it), and return the norm that it had.

    Where that is not finite, the optimiser will not take the step.
    """
    norm = nn.utils.clip_grad_norm_(net.parameters(), limit or math.inf)
    # As GradScaler says it to a fused optimiser: the kernel itself decides, the host does not wait for the GPU.
    optimizer.found_inf = 1 - norm.isfinite().float()
    return norm


def statistics(net: nn.Module) -> torch.Tensor | None:
    """What batch norm has gathered so far, all layers in one vector: a kernel, not one for each layer."""
    gathered = [buffer for buffer in net.buffers() if buffer.is_floating_point()]
    return torch.cat(gathered) if gathered else None


def keep_statistics(net: nn.Module, before: torch.Tensor | None, norm: torch.Tensor) -> None:
    """Undo what batch norm has gathered from the batches of a step that was not taken; the host decides nothing.

    A variance may overflow although the gradient is finite, since x / inf is 0: that is undone, too.
    """
    if before is not None:
        now = statistics(net)
        kept = torch.where(norm.isfinite() & now.isfinite(), now, before)
        gathered = [buffer for buffer in net.buffers() if buffer.is_floating_point()]
        torch._foreach_copy_(gathered, kept.split([len(buffer) for buffer in gathered]))


def check_steps(args: argparse.Namespace, run: Run, epoch: int, norms: torch.Tensor) -> None:
    """Raise DataError where ten steps in a row, of this epoch or begun in the one before, were not finite."""
    run.norms = torch.cat([run.norms[-9:], norms.float()])
    if (~run.norms.isfinite()).unfold(0, 10, 1).all(dim=1).any():
        raise DataError(f"epoch {epoch + 1}: the gradient was not finite in ten steps in a row; lower --lr "
                        f"{args.lr:g}, or use --precision fp32, or look for broken scans: python data.py {args.data}")


def gather(rows: list[dict]) -> list[dict]:
    """The validation rows of all processes, by name: scores are of whole scans, so they are exact however shared."""
    if dist.is_initialized():
        parts: list = [None] * dist.get_world_size()
        dist.all_gather_object(parts, rows)
        rows = [row for part in parts for row in part]
    return sorted(rows, key=lambda row: row["name"])


def log_row(
    args: argparse.Namespace, run: Run, epoch: int, losses: torch.Tensor, norms: torch.Tensor, rows: Sequence[dict],
    lr: float, begun: float, seconds: float, waited: float,
) -> dict[str, float]:
    """An epoch as a row of log.csv: losses of its batches, gradient norms of its steps, validation rows, timing in s.

    It began at `begun` and trained for `seconds`; what has passed since then is validation.
    A step with a non-finite gradient was not taken; it is counted, and left out of the means. Each scan counts the same
    in the Dice. The foreground is the share of the voxels that is organ, and that was called organ.
    """
    dice = np.array([row["dice"] for row in rows] or [math.nan])
    voxels = sum(row["voxels"] for row in rows) or math.nan
    if run.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(run.device)
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if resource else math.nan
    return {
        "epoch": epoch,
        "train_loss": losses[losses.isfinite()].mean().item(),
        "grad_norm": norms[norms.isfinite()].mean().item(),
        "skipped": int((~norms.isfinite()).sum()),
        "dice_mean": float(dice.mean()),
        "dice_std": float(dice.std()),
        "dice_worst": float(dice.min()),
        "foreground_truth": sum(row["truth"] for row in rows) / voxels,
        "foreground_prediction": sum(row["prediction"] for row in rows) / voxels,
        "lr": lr,
        "seconds": seconds,
        "validation_seconds": time.perf_counter() - begun - seconds,
        "slices_per_second": run.batches * args.batch_size * math.prod(run.recipe["size"][:-2]) / seconds,
        "waiting": waited / seconds,
        "peak_memory_gb": memory / 1e9,
    }


def write_log(args: argparse.Namespace, run: Run, log: Sequence[dict], rows: Sequence[dict], writer) -> None:
    """The last epoch to log.csv (written anew, so that after a resume no row stands twice), TensorBoard and screen."""
    text = io.StringIO()
    table = csv.DictWriter(text, fieldnames=list(log[-1]))
    table.writeheader()
    table.writerows(log)
    data.write_atomically(run.out / "log.csv", lambda file: file.write(text.getvalue().encode()))
    figure = panels(rows[:4]) if rows else None
    if rows:
        visualize.save(figure, run.out / "validation.png")
    try:
        for name, value in list(log[-1].items())[1:]:  # the first is the epoch
            # dice_mean becomes dice/mean: TensorBoard draws what has the same first part side by side.
            writer.add_scalar(name.replace("_", "/", 1), value, log[-1]["epoch"])
        if rows:
            writer.add_image("validation", visualize.rgb(figure), log[-1]["epoch"], dataformats="HWC")
        writer.flush()
    except OSError as error:  # a full disk, say: log.csv has the numbers, so the run goes on
        print(f"note: {writer.log_dir}: {error.strerror}; TensorBoard does not see this epoch", file=sys.stderr)
    print(describe(log[-1], args.epochs), flush=True)


def write_json(content, file) -> None:
    file.write(json.dumps(content, indent=1).encode())


def bar(args: argparse.Namespace, run: Run, epoch: int, log: Sequence[dict], done: int) -> Iterator:
    """An epoch's batches after the first `done`, under a progress bar: slices per second, loss of the epoch before."""
    title = f"epoch {epoch + 1}/{args.epochs}" + (f", loss {log[-1]['train_loss']:.3f}" if log else "")
    hidden = True if run.rank > 0 else None  # None: quiet where there is no terminal
    unit = {2: " slices", 3: " patches"}[args.dims]
    total, before = run.batches * args.batch_size, done * args.batch_size
    with tqdm(total=total, initial=before, desc=title, unit=unit, leave=False, disable=hidden) as shown:
        for batch in islice(run.loader, run.batches - done):
            yield batch
            shown.update(args.batch_size)


def describe(row: dict[str, float], epochs: int) -> str:
    """An epoch in a line."""
    line = f"epoch {row['epoch'] + 1:3}/{epochs}  loss {row['train_loss']:.4f}"
    if not math.isnan(row["dice_mean"]):
        line += f"  Dice {row['dice_mean']:.4f} ± {row['dice_std']:.4f} worst {row['dice_worst']:.4f}"
        line += f"  foreground {row['foreground_prediction']:.2%} of {row['foreground_truth']:.2%}"
    line += f"  lr {row['lr']:.1e}  {row['seconds']:.0f} s  {row['slices_per_second']:.1f} slices/s"
    line += "" if math.isnan(row["waiting"]) else f"  {row['waiting']:.1%} waiting"
    return line + (f"  {row['skipped']} non-finite steps skipped" if row["skipped"] else "")


def closing(result: dict, args: argparse.Namespace) -> str:
    """What a run reached, where it lies, and the command to type next."""
    lines = [""]
    if result["scans"]:
        dice, wide = np.sort(list(result["scans"].values())), max(4, *(len(name) for name in result["scans"]))
        ranked = sorted(result["scans"].items(), key=lambda item: item[1])
        lines += [f"  {'scan':{wide}}    Dice", *(f"  {name:{wide}}  {value:.4f}" for name, value in ranked)]
        lines += [f"Dice {dice.mean():.4f} ± {dice.std():.4f} over {len(dice)} scans, worst {dice.min():.4f}; "
                  f"last epoch (the best, chosen on these scans: {result['best']:.4f})"]
    source = str(Path(args.cache) / "phantom") if args.data == "phantom" else args.data
    command = ["python", "predict.py", source, "--checkpoint", result["checkpoint"], "--out", f"{result['out']}/masks"]
    lines += [f"{result['seconds'] / 60:.1f} minutes; weights, log.csv, curves.png, worst.png in {result['out']}",
              f"next: {shlex.join(command)}"]
    return "\n".join(lines)


# Arguments that a resumed run may change: they say where and how it runs, not what comes out.
FREE = {"out", "resume", "logs", "cache", "data", "device", "devices", "num_nodes", "workers", "compile", "epochs",
        "max_gb"}


def find_checkpoint(args: argparse.Namespace, device: torch.device) -> dict | None:
    """The checkpoint to go on from, or None for a new run. Raises DataError where the two do not belong together."""
    last = Path(args.out) / "last.pt"
    if not last.exists():
        return None
    if not args.resume:
        raise DataError(f"{last}: this folder holds a run; add --resume to go on with it, or choose another --out")
    checkpoint = load_checkpoint(last, device)
    for flag, value in checkpoint["args"].items():
        if flag not in FREE and getattr(args, flag) != value:
            raise DataError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: {last} was trained with {value}; "
                            "repeat its arguments, or choose another --out")
    if args.epochs != checkpoint["args"]["epochs"] and args.schedule != "constant":
        print(f"note: the schedule was laid out for {checkpoint['args']['epochs']} epochs; from here on it is that of "
              f"{args.epochs}, so the result is not that of a run of {args.epochs}", file=sys.stderr)
    return checkpoint


# ---------------------------------------------------------------------------------------------------- before the loop


@dataclass
class Run:
    """What both engines start from: the same objects, made in the same order from the same seed."""

    out: Path
    rank: int
    world: int  # number of processes
    device: torch.device
    precision: torch.dtype
    saved: dict | None  # the checkpoint to go on from
    recipe: dict
    split: dict
    val_scans: list[data.CachedScan]
    train_set: data.SliceDataset
    sampler: Order
    loader: DataLoader
    batches: int  # an epoch's, in each process
    steps: int  # an epoch's steps of the optimiser
    network: dict  # arguments of UNet
    net: UNet
    loss_function: nn.Module
    stop: int = 0  # the signal that asked to stop
    stop_time: float = 0.0
    norms: torch.Tensor = field(default_factory=lambda: torch.zeros(9))  # of the gradients of the last steps

    @property
    def first(self) -> int:
        """The epoch to start with."""
        return self.saved["epoch"] + 1 if self.saved else 0

    @property
    def log(self) -> list[dict]:
        """The rows of the epochs before."""
        return list(self.saved["log"]) if self.saved else []


def prepare(args: argparse.Namespace) -> Run:
    """Seed, device, data, network, optimisation, resume: a line is printed for each."""
    torch.manual_seed(args.seed)                                                        # seed_everything
    out, (rank, world) = Path(args.out), processes(args)
    say = print if rank == 0 else lambda *_, **__: None
    say(f"seed       {args.seed}")

    device = pick_device(args.device)                                                   # Trainer(accelerator=)
    if device.type == "cuda" and world > 1:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1 and args.engine == "loop":                                             # Trainer(strategy="ddp")
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    precision = pick_precision(args.precision, device)                                  # Trainer(precision=)
    torch.backends.cudnn.benchmark = True                                               # Trainer(benchmark=)
    keep_freed_memory()
    say(f"device     {device}, {str(precision).removeprefix('torch.')}, {world} process{'es' * (world > 1)}")

    saved = find_checkpoint(args, device)
    if dist.is_initialized() and rank > 0:
        dist.barrier()  # until rank 0 has filled the cache
    train_scans, val_scans, split, recipe = load_data(args)                             # DataModule.setup
    if dist.is_initialized() and rank == 0:
        dist.barrier()
    if saved and saved["split"] != split:
        raise DataError(f"{args.data}: holds other scans than the run in {out} was started with; choose another --out")
    val_scans = val_scans[: args.limit_batches]
    size = recipe["size"]
    options = {"augment": "none" if args.overfit else args.augment, "seed": args.seed}
    if args.dims == 3:
        train_set = data.PatchDataset(train_scans, size, **options)
    else:
        train_set = data.SliceDataset(train_scans, size, neighbours=args.neighbours, **options)
    # The order depends on (seed, epoch) alone; of each batch, every process takes its share.
    sampler = Order(train_set, num_replicas=world, rank=rank, seed=args.seed)
    if args.batch_size % world:
        raise DataError(f"--batch-size {args.batch_size}: {world} processes share it; choose a multiple of {world}")
    loader = DataLoader(                                                                # train_dataloader
        train_set, args.batch_size // world, sampler=sampler, drop_last=len(train_set) >= args.batch_size,
        num_workers=args.workers, persistent_workers=args.workers > 0, pin_memory=device.type == "cuda",
        worker_init_fn=outlive_signals, generator=torch.Generator(),  # its own: an epoch begun twice draws twice
    )
    batches = min(len(loader), args.limit_batches or len(loader))
    steps = math.ceil(batches / args.accumulate)
    say(f"data       {len(split['train'])} scans to train on, {len(val_scans)} to validate on; "
        f"{len(train_set)} {'slices' if args.dims == 2 else 'patches'} of {' x '.join(map(str, size))}, "
        f"{args.workers} workers")

    network = {"in_channels": 1 + 2 * args.neighbours, "out_channels": 1, "dims": args.dims, "width": args.width,
               "depth": args.depth, "norm": args.norm, "attention": args.attention}
    net = UNet(**network)                                                               # configure_model
    if world > 1 and device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)                              # Trainer(sync_batchnorm=)
    net = net.to(device, memory_format=net.memory_format)
    say(f"network    {args.dims}D U-Net, width {args.width}, depth {args.depth}, norm {args.norm}"
        f"{', attention' * args.attention}: {sum(p.numel() for p in net.parameters()):,} parameters")

    # Dice of the batch of all processes together, not the mean of one Dice for each.
    together = {"reduce": all_reduce} if world > 1 and args.loss != "bce" else {}
    loss_function = LOSSES[args.loss](**together)
    say(f"optimiser  AdamW, {args.schedule} to {args.lr:g}, {args.epochs} epochs of {steps} steps")

    if rank == 0:
        data.remove_leftovers(out, seconds=0)
        for name, content in (("args.json", vars(args)), ("split.json", split)):
            data.write_atomically(out / name, partial(write_json, content))
    say(f"run        {out}, {args.engine}, {'goes on' if saved else 'new'}; tensorboard --logdir {args.logs}")
    return Run(out, rank, world, device, precision, saved, recipe, split, val_scans, train_set, sampler, loader,
               batches, steps, network, net, loss_function)


def processes(args: argparse.Namespace) -> tuple[int, int]:
    """Rank of this process and number of all: torchrun tells by its environment, Lightning by --devices and its own."""
    if args.engine == "loop":
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("NODE_RANK", 0)) * args.devices + int(os.environ.get("LOCAL_RANK", 0))
    return rank, args.devices * args.num_nodes


class Order(DistributedSampler):
    """The order of the samples; `start` leaves out those that a resumed run has had in its first epoch."""

    start = 0

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.start, None)


def outlive_signals(_) -> None:
    """In a worker: Ctrl-C reaches the whole process group, but the main process still needs its next batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # SIGTERM may as well be the main process's own, so it is only put off
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


def interrupt(number: int, _) -> None:
    """SIGTERM or SIGINT while nothing is trained: end at once."""
    raise SystemExit(128 + number)


def note(run: Run, number: int, _=None) -> None:
    """SIGTERM or SIGINT in training: the loop stops after its step. A second one ends the process where it stands.

    Within a second it counts as the same one: `timeout`, for example, sends its signal twice.
    """
    if run.stop and time.monotonic() - run.stop_time > 1:
        os._exit(128 + number)
    if not run.stop:
        run.stop, run.stop_time = int(number), time.monotonic()


def asked_to_stop(run: Run) -> bool:
    """Whether a signal came, to any process: all stop after the same step, or the others would wait for it for ever."""
    if not dist.is_initialized():
        return run.stop > 0
    heard = torch.tensor(run.stop)  # on the CPU, so by gloo: hosts wait for each other here, but not for their GPUs
    dist.all_reduce(heard, dist.ReduceOp.MAX)
    if heard and not run.stop:
        note(run, int(heard))
    return heard.item() > 0


def make_optimizer(args: argparse.Namespace, run: Run, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(run.net.parameters(), args.lr, weight_decay=args.weight_decay, fused=fused)


def checkpoint_of(args: argparse.Namespace, run: Run, epoch: int, best: float, log: list[dict]) -> dict:
    """The recipe and its result, of either engine: all that predict.py needs."""
    return {"version": VERSION, "model": run.net.state_dict(), "network": run.network, "preprocess": run.recipe,
            "split": run.split, "epoch": epoch, "step": (epoch + 1) * run.steps, "best": best, "log": log,
            "args": vars(args)}


# ------------------------------------------------------------------------------------------------------------ the loop


def fit_loop(args: argparse.Namespace, run: Run) -> tuple[list[float], list[dict]]:
    """Train with the hand-written loop: the loss of every batch, and the validation rows of the last epoch.

    The comments on the right name the Lightning hook, method or argument that does the same there.
    """
    net, device, first, log = run.net, run.device, run.first, run.log
    forward = torch.compile(net) if args.compile else net  # `net` keeps the plain names for the checkpoint
    if run.world > 1:
        forward = nn.parallel.DistributedDataParallel(forward)                          # Trainer(strategy="ddp")
    autocast = partial(torch.autocast, device.type, run.precision, enabled=run.precision != torch.float32)
    # Fused: a step is one kernel, which can also leave the weights alone: see clip_gradient.
    fused = device.type in ("cpu", "cuda")
    optimizer = make_optimizer(args, run, fused)                                        # configure_optimizers
    scaler = torch.amp.GradScaler(device.type, enabled=fused and run.precision == torch.float16)
    best, history, rows = math.nan, [], []
    if run.saved:                                                                       # on_load_checkpoint
        net.load_state_dict(run.saved["model"])
        optimizer.load_state_dict(run.saved["optimizer"])
        scaler.load_state_dict(run.saved["scaler"])
        torch.set_rng_state(run.saved["rng"].cpu())
        best = run.saved["best"]
    try:
        writer = SummaryWriter(Path(args.logs) / run.out.name, purge_step=first) if run.rank == 0 else None
    except OSError as error:
        raise DataError(f"--logs {args.logs}: {error.strerror}; name another folder for TensorBoard") from None

    def save(name: str, epoch: int, **part) -> None:                                    # on_save_checkpoint
        """With all that is needed to go on after `epoch`; `part` is what is known of the next, if it has begun."""
        checkpoint = checkpoint_of(args, run, epoch, best, log) | {"part": part, "rng": torch.get_rng_state()}
        checkpoint |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        checkpoint["step"] += len(part.get("norms", ()))
        data.write_atomically(run.out / name, partial(torch.save, checkpoint))

    for epoch in range(first, args.epochs):                                             # Trainer.fit

        # -- train ---------------------------------------------------------------------- on_train_epoch_start
        run.sampler.set_epoch(epoch)
        run.train_set.set_epoch(epoch)
        net.train()
        losses, norms, waited, begun = [], [], 0.0, time.perf_counter()
        part = run.saved.get("part") if run.saved and epoch == first else None
        if part:  # this epoch was stopped half-way
            losses, norms, waited = list(part["losses"]), list(part["norms"]), part["waited"]
            begun -= part["seconds"]
        run.sampler.start = len(losses) * args.batch_size // run.world
        ready = time.perf_counter()
        for i, (image, mask) in enumerate(bar(args, run, epoch, log, len(losses)), len(losses)):
            waited += time.perf_counter() - ready
            image = image.to(device, memory_format=net.memory_format, non_blocking=True)
            mask = mask.to(device, non_blocking=True)                                   # transfer_batch_to_device
            if i % args.accumulate == 0:
                before = statistics(net)                                                # on_train_batch_start
            with autocast():                                                            # training_step
                logits = forward(image)
            loss = run.loss_function(logits.float(), mask)  # in float32, outside autocast
            losses.append(loss.detach())  # stays on the device: read once an epoch
            if i % args.accumulate == 0:
                optimizer.zero_grad()                                                   # optimizer_zero_grad
            scaler.scale(loss / args.accumulate).backward()                             # backward
            if (i + 1) % args.accumulate == 0 or i + 1 == run.batches:
                step = epoch * run.steps + i // args.accumulate
                for group in optimizer.param_groups:                                    # lr_scheduler_step
                    group["lr"] = args.lr * lr_at(step, args.epochs * run.steps, args.schedule)
                scaler.unscale_(optimizer)                                              # on_before_optimizer_step
                norms.append(clip_gradient(net, optimizer, args.clip))                  # configure_gradient_clipping
                scaler.step(optimizer)                                                  # optimizer_step
                scaler.update()
                keep_statistics(net, before, norms[-1])
                if asked_to_stop(run):                                                  # Trainer.should_stop
                    break
            ready = time.perf_counter()                                                 # on_train_batch_end
        losses, norms = torch.stack(losses).cpu(), torch.stack(norms).cpu()             # on_train_epoch_end
        seconds = time.perf_counter() - begun
        check_steps(args, run, epoch, norms)

        # -- evaluate ------------------------------------------------------------------- validation_step
        scans = run.val_scans[run.rank :: run.world]
        scans = tqdm(scans, "validation", unit=" scans", leave=False, disable=run.rank > 0 or None)
        scans = takewhile(lambda _: not run.stop, scans)  # noqa: B023, used up in the next line
        rows = gather(evaluate(net, scans, run.recipe, run.precision, args.batch_size))

        if asked_to_stop(run):  # in training or validation; what was trained is saved, validation is done anew
            if run.rank == 0:
                save("last.pt", epoch - 1, losses=losses, norms=norms, waited=waited, seconds=seconds)
            if dist.is_initialized():
                dist.barrier()  # torchrun ends all processes as soon as one has left
            raise SystemExit(128 + run.stop)

        # -- log ------------------------------------------------------------------------ log_dict
        lr = optimizer.param_groups[0]["lr"]
        log.append(log_row(args, run, epoch, losses, norms, rows, lr, begun, seconds, waited))
        history += losses.tolist()
        if run.rank > 0:
            continue
        write_log(args, run, log, rows, writer)

        # -- save ----------------------------------------------------------------------- ModelCheckpoint
        improved = not best >= log[-1]["dice_mean"]  # nan, without validation, counts as better
        best = log[-1]["dice_mean"] if improved else best
        for name in ("best.pt", "last.pt") if improved else ("last.pt",):  # resume trusts last.pt, so it comes last
            save(name, epoch)

    if writer:
        with contextlib.suppress(OSError):  # told by write_log
            writer.close()                                                              # teardown
    return history, rows


# --------------------------------------------------------------------------------------------------- its Lightning twin


def fit_lightning(args: argparse.Namespace, run: Run) -> tuple[list[float], list[dict]]:
    """Train with lightning.Trainer on the same objects: what `fit_loop` does by hand, and returns the same."""
    try:
        import lightning
        from lightning.pytorch.callbacks import ModelCheckpoint
        from lightning.pytorch.loggers import TensorBoardLogger
    except ImportError as error:
        raise DataError(f"--engine {args.engine}: {error}; pip install lightning, or use --engine loop") from None

    class Twin(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.log_rows, self.history, self.rows = run.net, run.log, [], []
            self.forward_net = torch.compile(run.net) if args.compile else run.net

        def configure_optimizers(self):
            # Under float16, Lightning lets no fused optimiser clip its gradients.
            fused = run.device.type in ("cpu", "cuda") and run.precision != torch.float16
            optimizer = make_optimizer(args, run, fused)
            factor = partial(lr_at, total=args.epochs * run.steps, schedule=args.schedule)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        def on_train_epoch_start(self):
            run.train_set.set_epoch(self.current_epoch)  # the sampler's is set by Lightning
            self.losses, self.norms, self.rows, self.begun = [], [], [], time.perf_counter()

        def on_train_batch_start(self, _, i):
            if i % args.accumulate == 0:
                self.before = statistics(run.net)

        def training_step(self, batch, _):
            image, mask = batch  # moved to the device by transfer_batch_to_device
            logits = self.forward_net(image.contiguous(memory_format=run.net.memory_format))
            with torch.autocast(self.device.type, enabled=False):
                loss = run.loss_function(logits.float(), mask)
            self.losses.append(loss.detach())
            return loss

        def configure_gradient_clipping(self, optimizer, *_, **__):
            self.norms.append(clip_gradient(run.net, optimizer, args.clip))

        def optimizer_step(self, epoch, batch, optimizer, closure):
            self.lr = optimizer.param_groups[0]["lr"]
            super().optimizer_step(epoch, batch, optimizer, closure)
            keep_statistics(run.net, self.before, self.norms[-1])

        def on_train_batch_end(self, *_):
            if run.stop:  # Lightning saves no part of an epoch here: the resumed run does all of it again
                raise SystemExit(128 + run.stop)

        def on_validation_epoch_start(self):
            self.seconds = time.perf_counter() - self.begun

        def validation_step(self, i, _):
            self.rows += evaluate(run.net, [run.val_scans[i]], run.recipe, run.precision, args.batch_size)

        def on_train_epoch_end(self):
            losses, norms = torch.stack(self.losses).cpu(), torch.stack(self.norms).cpu()
            check_steps(args, run, self.current_epoch, norms)
            seconds, self.rows = getattr(self, "seconds", time.perf_counter() - self.begun), gather(self.rows)
            row = log_row(args, run, self.current_epoch, losses, norms, self.rows, self.lr, self.begun, seconds,
                          math.nan)
            self.log_rows.append(row)
            self.history += losses.tolist()
            self.log("dice", row["dice_mean"] if self.rows else self.current_epoch)  # what ModelCheckpoint monitors
            if run.rank == 0:
                write_log(args, run, self.log_rows, self.rows, self.logger.experiment)

        def on_save_checkpoint(self, checkpoint):
            best = max(row["dice_mean"] for row in self.log_rows)
            checkpoint |= checkpoint_of(args, run, self.current_epoch, best, self.log_rows)

    twin = Twin()
    often = {"dirpath": run.out, "save_on_train_epoch_end": True, "enable_version_counter": False}
    savers = [ModelCheckpoint(filename="best", monitor="dice", mode="max", **often),
              ModelCheckpoint(filename="last", **often)]
    for saver in savers:
        saver.FILE_EXTENSION = ".pt"
    # Lightning fills its first batches before any hook runs; a resumed run must not fill them from epoch 0.
    run.sampler.set_epoch(run.first)
    run.train_set.set_epoch(run.first)
    scans = DataLoader(range(len(run.val_scans))[run.rank :: run.world], batch_size=None)
    precision = {torch.float32: "32-true", torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}[run.precision]
    trainer = lightning.Trainer(
        accelerator=run.device.type, devices=args.devices, num_nodes=args.num_nodes, max_epochs=args.epochs,
        strategy="ddp" if run.world > 1 else "auto", precision=precision, accumulate_grad_batches=args.accumulate,
        limit_train_batches=run.batches, logger=TensorBoardLogger(args.logs, run.out.name, ""), callbacks=savers,
        num_sanity_val_steps=0, use_distributed_sampler=False, benchmark=True, enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
    )
    last = str(run.out / "last.pt") if run.saved else None
    trainer.fit(twin, run.loader, scans if run.val_scans else None, ckpt_path=last)
    return twin.history, twin.rows


# ------------------------------------------------------------------------------------------------------------- a run


def train(args: argparse.Namespace) -> dict:
    """Train, and say how well the network of the last epoch does.

    Returns:
        dice: mean over the validation scans after the last epoch (None without validation), not the best epoch's,
            which was chosen on the very same scans;
        scans: Dice by scan name; best: the best epoch's mean; losses: of every batch of this call; checkpoint: path of
        last.pt; out: the run folder; seconds: wall time of the call.

    Raises:
        DataError: input that cannot be trained on, in one line.
    """
    started = time.perf_counter()
    run = prepare(args)
    before = {number: signal.signal(number, partial(note, run)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        losses, rows = {"loop": fit_loop, "lightning": fit_lightning}[args.engine](args, run)
        checkpoint = load_checkpoint(run.out / "last.pt") if run.rank == 0 else {"log": run.log, "best": math.nan}
        if not losses:  # resumed after its end: nothing was left but to look
            run.net.load_state_dict(run.saved["model"])
            own = run.val_scans[run.rank :: run.world]
            rows = gather(evaluate(run.net, own, run.recipe, run.precision, args.batch_size))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()
    result = {
        "dice": float(np.mean([row["dice"] for row in rows])) if rows else None,
        "scans": {row["name"]: row["dice"] for row in rows},
        "best": checkpoint["best"] if rows else None,
        "losses": losses,
        "checkpoint": str(run.out / "last.pt"),
        "out": str(run.out),
        "seconds": time.perf_counter() - started,
    }
    if run.rank == 0:
        visualize.save(visualize.curves(checkpoint["log"]), run.out / "curves.png")
        if rows:
            visualize.save(panels(sorted(rows, key=lambda row: row["dice"])[:3], "worst"), run.out / "worst.png")
        print(closing(result, args))
    return result


def compare_engines(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Run both engines from the same seed, each in a process of its own, and print and save how they differ."""
    out, ends = Path(args.out), {}
    for engine in ("loop", "lightning"):
        # The last of an argument that is given twice counts.
        command = [sys.executable, __file__, *argv, "--engine", engine, "--out", str(out / engine)]
        if subprocess.run(command).returncode:
            raise DataError(f"--engine both: {engine} failed; its message stands above")
        ends[engine] = load_checkpoint(out / engine / "last.pt")
    weights = [end["model"] for end in ends.values()]
    difference = max((weights[0][name].float() - weights[1][name].float()).abs().max().item() for name in weights[0])
    lines = [f"{'epoch':>5}  {'engine':9}  {'train loss':>10}  {'Dice':>6}  {'seconds':>7}  {'peak GB':>7}"]
    for epoch in range(args.epochs):
        for engine, end in ends.items():
            row = end["log"][epoch]
            lines += [f"{epoch + 1:5}  {engine:9}  {row['train_loss']:10.6f}  {row['dice_mean']:6.4f}  "
                      f"{row['seconds']:7.1f}  {row['peak_memory_gb']:7.2f}"]
    lines += [f"largest difference between the weights: {difference:.3g}"]
    print("\n" + "\n".join(lines))
    data.write_atomically(out / "engines.txt", lambda file: file.write("\n".join([*lines, ""]).encode()))
    logs = [end["log"] for end in ends.values()]
    visualize.save(visualize.curves(*logs, names=list(ends)), out / "engines.png")
    print(out / "engines.png")


def resume_command(args: argparse.Namespace, argv: Sequence[str]) -> str:
    processes = os.environ.get("LOCAL_WORLD_SIZE")  # set by torchrun; on several nodes it needs its other flags, too
    command = ["torchrun", "--nproc-per-node", processes, "--"] if processes else ["python"]
    added = [flag for flag in ("--out", args.out, "--resume") if flag not in argv]
    return shlex.join([*command, *argv, *added])


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    data.MAX_GB = args.max_gb
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt)
    warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
    threading.excepthook = lambda _: None  # TensorBoard's thread raises here what write_log gets, and tells, anyway
    try:
        if args.engine == "both":
            compare_engines(args, sys.argv[1:] if argv is None else argv)
        else:
            train(args)
    except (DataError, OSError) as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(error, file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print(f"out of GPU memory; lower --batch-size {args.batch_size} or --size", file=sys.stderr)
        return 2
    except SystemExit as stop:
        code = stop.code or 128 + signal.SIGTERM  # Lightning ends validation by itself, without a code
        if int(os.environ.get("RANK", 0)) == 0:
            command = resume_command(args, sys.argv if argv is None else ["train.py", *argv])
            print(f"\nstopped by {signal.Signals(code - 128).name}; to go on: {command}", file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
