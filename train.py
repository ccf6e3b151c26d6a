"""Train a U-Net to segment an organ in MRI: the loop that Lightning would run, written by hand.

Contract: a folder of NIfTI scans and masks in (`data.py` names the layouts), a run folder out: last.pt, best.pt (the
epoch of the highest validation Dice), log.csv, split.json, args.json, pictures; TensorBoard events under --tensorboard.
Validation is per scan, in the scan's own space. A checkpoint is written after every epoch. On a CPU a run is exact: one
that was killed and resumed ends with the same weights, to the last bit, as one that was left alone. The default reaches
a Dice of about 0.91 on left atria that it was not trained on, without a GPU in less than an hour: see the README.

    python train.py --data phantom --width 8 --batch-size 4     # what phantom.py writes: a minute on a CPU
    python train.py --data Task02_Heart                         # one GPU, or the CPU, whatever there is
    python train.py --data Task02_Heart --out runs/a --resume   # go on where runs/a stopped, or start it
    python train.py --data Task02_Heart --dims 3                # patches of volumes instead of slices
    python train.py --data Task02_Heart --engine lightning      # the same run by lightning.Trainer
    torchrun --nproc-per-node 4 train.py --data Task02_Heart    # four GPUs of one machine
    # the recipe that this project started from:
    python train.py --data Task02_Heart --width 64 --depth 3 --stem 1 --norm none --loss dice --lr 1e-4 \\
        --schedule constant --weight-decay 0 --clip 0 --augment geometry --normalise minmax --crop 32
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

# On a CPU: threads of PyTorch that wait for each other sleep, and leave the core to the workers. Read when it loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import data
import predict
import visualize
from data import DataError, require
from losses import BCEDiceLoss, DiceLoss
from metrics import dice
from unet import UNet

LOSSES = {"dice": DiceLoss, "bce": nn.BCEWithLogitsLoss, "bce_dice": BCEDiceLoss}
# Unless told otherwise, for slices and for patches: the ladder in benchmarks/README.md measured them.
DEFAULTS = {2: {"width": 16, "depth": 3, "epochs": 20, "batch_size": 16},
            3: {"width": 32, "depth": 2, "epochs": 64, "batch_size": 2}}
# What a resumed run may change: where and how it runs, not what comes out.
MAY_CHANGE = {"data", "cache", "out", "resume", "tensorboard", "device", "workers", "compile", "epochs"}

# ----------------------------------------------------------------------------------------------------------- arguments


def number(low: float, high: float = 1e6, kind: type = int) -> Callable[[str], float]:
    """A type for argparse: an int or float from `low` to `high`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}: expected a number from {low} to {high}")
        return value

    parse.__name__ = kind.__name__  # which argparse names where `text` is no number
    return parse


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `train.train(train.parse_args(["--data", "phantom"]))` runs it from Python."""
    parser = argparse.ArgumentParser(description="Train a U-Net to segment an organ in MRI.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    positive, share = number(1), partial(number, kind=float)
    add = parser.add_argument_group("data").add_argument
    add("--data", required=True, metavar="DIR", help="imagesTr/ + labelsTr/, or images/ + labels/")
    add("--cache", default="cache", metavar="DIR", help="where preprocessed scans are kept")
    add("--label", type=int, nargs="+", metavar="N", help="label values that are foreground; None: all but 0")
    add("--axis", type=int, choices=(0, 1, 2), help="slice axis, 2: axial; None: that of the coarsest spacing")
    add("--folds", type=positive, default=5, metavar="N", help="parts to split the scans into")
    add("--fold", default="0", metavar="K", help="the part to validate on, from 0; `all`: train on every scan")
    add("--normalise", default="percentile", choices=("zscore", "percentile", "minmax"), help="of each scan")
    add("--crop", type=number(0), default=0, metavar="N", help="pixels to cut off each border of a slice")
    add("--spacing", type=share(0.05, 20), metavar="MM", help="resample pixels, in 3D voxels, of scans that are more "
        "than 15 %% off; None: the median")
    add("--size", "--patch", type=positive, nargs="+", metavar="N", help="H W of training slices, D H W of patches; "
        "None: the median of the scans, in 3D at most 80 128 128")
    add("--augment", default="full", choices=("none", "geometry", "full"), help="see data.py")

    add = parser.add_argument_group("network").add_argument
    add("--dims", type=int, default=2, choices=(2, 3), help="2: slices, 3: patches")
    add("--width", type=positive, metavar="N", help="channels of the first level; None: 16, in 3D 32")
    add("--depth", type=number(0, 8), metavar="N", help="poolings; None: 3, in 3D 2")
    add("--stem", type=number(1, 8), metavar="N", help="voxels a side that enter as channels, 1: classical; None: 2, "
        "or 4 of voxels below 0.9 mm")
    add("--norm", default="batch", choices=("none", "batch", "instance"), help="normalisation layers")
    add("--attention", action="store_true", help="attention gates on the skips")

    add = parser.add_argument_group("optimisation").add_argument
    add("--loss", default="bce_dice", choices=tuple(LOSSES), help="training loss")
    add("--epochs", type=positive, metavar="N", help="passes over the training scans; None: 20, in 3D 64")
    add("--batch-size", type=positive, metavar="N", help="of all processes together; None: 16 slices, or 2 patches")
    add("--accumulate", type=positive, default=1, metavar="N", help="batches per step: a larger batch, no more memory")
    add("--lr", type=share(0), default=4e-3, help="highest learning rate of AdamW")
    add("--schedule", default="onecycle", choices=("onecycle", "constant"), help="learning rate over the steps")
    add("--weight-decay", type=share(0), default=1e-2, help="of AdamW; with 0 it is Adam")
    add("--clip", type=share(0), default=1.0, metavar="NORM", help="largest norm of the gradient; 0: no limit")
    add("--seed", type=number(0, 2**32 - 1), default=0, metavar="N", help="of weights, order and augmentation")

    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="DIR", help="run folder; None: runs/<date and time>")
    add("--resume", action="store_true", help="go on from OUT/last.pt, where there is one")
    add("--tensorboard", default="./logs", metavar="DIR", help="TensorBoard events")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="of the network's arithmetic")
    add("--workers", type=number(0), metavar="N", help="processes that load data; None: all cores but one, 4 at most")
    add("--engine", default="loop", choices=("loop", "lightning"), help="whose loop: the one below, or Lightning's")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--limit-batches", type=positive, metavar="N", help="at most N batches and N validation scans an epoch")
    add("--overfit", type=positive, metavar="N", help="train and validate on the same N scans: can it learn at all?")

    args = parser.parse_args(argv)
    if args.resume and not args.out:
        parser.error("argument --resume: say which run, with --out")
    if args.size and len(args.size) != args.dims:
        parser.error(f"argument --size: expected {args.dims} numbers with --dims {args.dims}")
    for name, value in DEFAULTS[args.dims].items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
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
    """Training and validation scans (`data.CachedScan`), split, and preprocessing with the size of a sample."""
    pairs = data.find_pairs(args.data)
    split = data.split_scans([pair.name for pair in pairs], args.folds, args.fold)
    median = data.survey(pairs)
    axis = data.slice_axis(median) if args.axis is None else args.axis
    spacing = [args.spacing or median[i] for i in data.PATIENT_AXES[axis]]
    how = {"axis": axis, "label": args.label, "spacing": [None, *spacing[1:]] if args.dims == 2 else spacing,
           "crop": args.crop, "normalise": args.normalise}
    scans = {scan.name: scan for scan in data.cache_scans(pairs, how, args.cache)}
    train, val = ([scans[name] for name in split[part]] for part in ("train", "val"))
    if args.overfit:
        train = val = train[: args.overfit]
    organ = any(scan.open("mask").any() for scan in train)
    require(organ, f"{args.data}: no voxel of a label is foreground (--label {args.label}); there is nothing to learn")
    args.stem = args.stem or (4 if max(spacing[-args.dims :]) < 0.9 else 2)
    # Larger slices are cropped, for training only: prediction takes them whole. The network pads up to `multiple`.
    multiple, largest = args.stem * 2**args.depth, (math.inf, math.inf) if args.dims == 2 else (80, 128, 128)
    shapes = [scan.open("mask").shape[-args.dims :] for scan in train]
    size = args.size or [math.ceil(n / multiple) * multiple for n in np.minimum(np.median(shapes, axis=0), largest)]
    enough = max(size) > multiple and min(size[-2:]) >= multiple
    require(enough, f"--size {size}: one voxel is left on the lowest level; lower --depth, or take above {multiple}")
    return train, val, split, how | {"size": size}


def evaluate(net: UNet, scans: Iterable[data.CachedScan], how: dict, precision: torch.dtype,
             batch_size: int) -> list[dict]:
    """Score each scan in its own space.

    Returns:
        One row per scan: name, dice, truth and prediction (foreground voxels), voxels, and `panel`: image, truth and
        probability (H, W) of the slice that holds most of the organ.
    """
    rows = []
    for scan in scans:
        image, mask, truth = (scan.open(kind) for kind in ("image", "mask", "truth"))
        probability = predict.predict_volume(net, image, size=how["size"], precision=precision, batch_size=batch_size)
        prediction = data.undo_preprocess(probability, truth.shape, how) > 0.5
        fullest = int(mask.sum(axis=(1, 2)).argmax())
        rows.append({"name": scan.name, "dice": dice(prediction, truth > 0), "truth": int(np.count_nonzero(truth)),
                     "prediction": int(np.count_nonzero(prediction)), "voxels": truth.size,
                     "panel": [np.float32(array[fullest]) for array in (image, mask, probability)]})
    return rows


def gather_rows(rows: list[dict]) -> list[dict]:
    """The validation rows of all processes, by name."""
    if dist.is_initialized():
        parts: list = [None] * dist.get_world_size()
        dist.all_gather_object(parts, rows)
        rows = [row for part in parts for row in part]
    return sorted(rows, key=lambda row: row["name"])


def check_finite(run: Run, epoch: int, norms: Tensor) -> None:
    """End a hopeless run before it is saved: most steps were skipped, or the network holds inf or NaN."""
    skipped = int((~norms.isfinite()).sum())
    finite = all(tensor.isfinite().all() for tensor in run.net.state_dict().values())
    told = f"epoch {epoch + 1}: {skipped} of {len(norms)} gradients, or the weights, are not finite; "
    require(finite and 2 * skipped <= len(norms), told + "lower --lr, use --precision fp32, or look at the data")


def share_buffers(run: Run) -> None:
    """Give all processes the running means of the first, which it saves, so that all validate the same network."""
    for buffer in run.net.buffers() if run.world_size > 1 else ():
        dist.broadcast(buffer, 0)


def log_row(run: Run, epoch: int, losses: list, norms: list, rows: list[dict], started: float,
            trained: float) -> dict[str, float]:
    """An epoch as a row of log.csv and of TensorBoard; `started` and `trained` are times, in s.

    A step with a non-finite gradient was not taken; it is counted, and left out of the means. Each scan counts the same
    in the Dice. The foreground is the share of the voxels that is organ, and that was called organ.
    """
    args, losses, norms = run.args, torch.stack(losses), torch.stack(norms)
    loss = losses[losses.isfinite()].mean()
    if dist.is_initialized():
        dist.all_reduce(loss)  # of each process's share of the batches
    scores = np.array([row["dice"] for row in rows] or [math.nan])
    voxels = sum(row["voxels"] for row in rows) or math.nan
    seen = min(run.batches * args.batch_size, len(run.train_set)) * math.prod(run.recipe["preprocess"]["size"][:-2])
    return {
        "train/loss": loss.item() / run.world_size,
        "train/grad_norm": norms[norms.isfinite()].mean().item(),
        "train/skipped": int((~norms.isfinite()).sum()),
        "train/lr": args.lr * lr_at((epoch + 1) * run.steps - 1, args.epochs * run.steps, args.schedule),
        "val/dice": float(scores.mean()),
        "val/dice_std": float(scores.std()),
        "val/dice_worst": float(scores.min()),
        "val/foreground_truth": sum(row["truth"] for row in rows) / voxels,
        "val/foreground_prediction": sum(row["prediction"] for row in rows) / voxels,
        "system/seconds": trained - started,
        "system/validation_seconds": time.perf_counter() - trained,
        "system/slices_per_second": seen / (trained - started),
        "system/gpu_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if run.device.type == "cuda" else math.nan,
    }


def draw_panels(rows: Sequence[dict]):
    """Scan, truth, probability, prediction and error of a slice of each validation scan, as a figure."""
    size = np.max([row["panel"][0].shape for row in rows], axis=0)
    stacks = (np.stack([data.crop_or_pad(row["panel"][i], size) for row in rows]) for i in range(3))
    return visualize.compare(*stacks, [f"{row['name']}  Dice {row['dice']:.3f}" for row in rows])


def write_log(run: Run, log: list[dict], rows: list[dict], writer: SummaryWriter) -> None:
    """The last epoch to log.csv, TensorBoard, pictures and screen."""
    row, line = log[-1], "epoch {:2}/{}  loss {train/loss:.4f}"
    data.write_csv(run.out / "log.csv", [{"epoch": n, **row} for n, row in enumerate(log, start=1)])
    for name, value in row.items():
        writer.add_scalar(name, value, len(log))
    if rows:
        visualize.save(figure := draw_panels(rows[:4]), run.out / "validation.png")
        writer.add_image("validation", visualize.rgb(figure), len(log), dataformats="HWC")
        line += "  Dice {val/dice:.4f} (SD {val/dice_std:.4f}, worst {val/dice_worst:.4f})"
        line += "  organ {val/foreground_prediction:.2%} of {val/foreground_truth:.2%}"
    writer.flush()
    line += "  {system/seconds:.0f} + {system/validation_seconds:.0f} s"
    print(line.format(len(log), run.args.epochs, **row), flush=True)


def claim_folder(args: argparse.Namespace) -> Path:
    """Make the run folder, and args.json in it: of two runs at once, one gets it and the other is refused."""
    out = Path(args.out or time.strftime(f"runs/%Y%m%d-%H%M%S-{os.getpid()}"))
    with data.one_line(out):
        out.mkdir(parents=True, exist_ok=True)
        try:
            if not args.resume and any(out.glob("*.pt")):
                raise FileExistsError
            with open(out / "args.json", "w" if args.resume else "x") as file:
                json.dump(vars(args), file, indent=1)
        except FileExistsError:
            raise DataError(f"{out}: holds a run; add --resume to go on with it, or choose another --out") from None
    return out


def find_checkpoint(args: argparse.Namespace, recipe: dict, device: torch.device) -> dict | None:
    """The checkpoint to go on from, or None for a new run. Raises DataError where the two do not belong together."""
    if not args.resume or not (last := Path(args.out, "last.pt")).exists():
        return None
    saved = predict.load_checkpoint(last, device)
    old, new = ({**r, **r["args"]} for r in (saved, recipe))
    for name in sorted(new.keys() - MAY_CHANGE - {"args"}):
        told = f"{last}: was trained with {name} {old.get(name)}, not {new[name]}; repeat that, or choose another --out"
        require(old.get(name) == new[name], told)
    return saved


def ignore_interrupt(_: int) -> None:
    """In a worker: Ctrl-C is for the main process, which ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------------- before the loop


@dataclass
class Run:
    """What both engines start from: the same objects, made in the same order from the same seed."""

    args: argparse.Namespace
    out: Path
    rank: int
    world_size: int  # number of processes
    device: torch.device
    precision: torch.dtype
    recipe: dict  # all of a checkpoint but the state: version, network, preprocess, split, args
    val_scans: list[data.CachedScan]  # this process's share
    train_set: data.SliceDataset
    loader: DataLoader
    batches: int  # of an epoch, in each process
    steps: int  # of the optimiser in an epoch
    net: UNet
    optimizer: torch.optim.Optimizer
    loss_function: nn.Module
    saved: dict | None  # the checkpoint to go on from


def has_fused(device: torch.device) -> bool:
    """Whether AdamW can be one kernel here, which skips a step by itself where GradScaler says so."""
    return device.type in ("cpu", "cuda")


def prepare(args: argparse.Namespace) -> Run:
    """Seed, device, data, network, optimisation, resume: a line is printed for each."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    print0 = print if rank == 0 else lambda *_: None
    torch.manual_seed(args.seed)                                                        # seed_everything
    print0(f"seed       {args.seed}")

    device = predict.pick_device(args.device)                                           # Trainer(accelerator=)
    if world_size > 1:                                                                  # Trainer(strategy="ddp")
        if device.type == "cuda":
            torch.cuda.set_device(device := torch.device("cuda", int(os.environ["LOCAL_RANK"])))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    precision = predict.pick_precision(args.precision, device)                          # Trainer(precision=)
    predict.keep_freed_memory()

    train_scans, val_scans, split, how = load_data(args)                                # DataModule.setup
    val_scans, size = val_scans[: args.limit_batches], how["size"]
    lowest = math.ceil(size[0] / (args.stem * 2**args.depth))  # depth of the maps there, of a padded patch
    if args.dims == 3 and device.type == "cpu" and (lowest == 2 or lowest == 1 and args.depth > 0):
        precision = torch.float32  # PyTorch's bfloat16 gradients are wrong at a depth of 2 there: see the README
    name = str(precision).removeprefix("torch.")
    print0(f"device     {device}, {name}, {world_size} process{'es' * (world_size > 1)}")
    options = {"augment": "none" if args.overfit else args.augment, "seed": args.seed}
    train_set = {2: data.SliceDataset, 3: data.PatchDataset}[args.dims](train_scans, size, **options)
    shared = args.batch_size % world_size == 0
    require(shared, f"--batch-size {args.batch_size}: {world_size} processes share it; choose a multiple")
    whole = len(train_set) >= args.batch_size  # all batches are: the rest of the order is left out
    loader = DataLoader(                                                                # train_dataloader
        train_set, args.batch_size // world_size, num_workers=args.workers, persistent_workers=args.workers > 0,
        # The order depends on (seed, epoch) alone; of each batch, every process takes its share.
        sampler=DistributedSampler(train_set, world_size, rank, seed=args.seed, drop_last=whole), drop_last=whole,
        pin_memory=device.type == "cuda", worker_init_fn=ignore_interrupt)
    print0(f"data       {len(train_scans)} scans to train on, {len(val_scans)} to validate on; {len(train_set)} "
           f"{'slices' if args.dims == 2 else 'patches'} of {' x '.join(map(str, size))}, {args.workers} workers")

    network = {name: getattr(args, name) for name in ("dims", "width", "depth", "norm", "attention", "stem")}
    net = UNet(**network)                                                               # configure_model
    if world_size > 1 and device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)                              # Trainer(sync_batchnorm=)
    net = net.to(device, memory_format=net.memory_format)
    print0(f"network    {network}: {sum(p.numel() for p in net.parameters()):,} parameters")

    fused = has_fused(device) and not (args.engine == "lightning" and precision == torch.float16)  # it refuses that
    optimizer = torch.optim.AdamW(                                                      # configure_optimizers
        net.parameters(), args.lr, weight_decay=args.weight_decay, fused=fused)
    # Dice of the batch of all processes together, not the mean of one Dice for each.
    loss_function = LOSSES[args.loss](**{"reduce": all_reduce} if world_size > 1 and args.loss != "bce" else {})
    recipe = {"version": predict.VERSION, "network": network, "preprocess": how, "split": split, "args": vars(args)}
    saved = find_checkpoint(args, recipe, device)                                       # Trainer.fit(ckpt_path=)
    require(not Path(args.tensorboard).is_file(), f"--tensorboard {args.tensorboard}: is a file; name a folder")
    out = [claim_folder(args) if rank == 0 else None]
    if world_size > 1:
        dist.broadcast_object_list(out)
    if rank == 0:
        data.write_atomically(out[0] / "split.json", json.dumps(split, indent=1).encode())
    batches = min(len(loader), args.limit_batches or len(loader))
    steps = math.ceil(batches / args.accumulate)
    print0(f"optimiser  AdamW, {args.schedule} to {args.lr:g}, {args.epochs} epochs of {steps} steps")
    print0(f"run        {out[0]}, {args.engine}, {'goes on' if saved else 'new'}; TensorBoard: {args.tensorboard}")
    return Run(args, out[0], rank, world_size, device, precision, recipe, val_scans[rank::world_size], train_set,
               loader, batches, steps, net, optimizer, loss_function, saved)


# ------------------------------------------------------------------------------------------------------------ the loop


def fit_loop(run: Run) -> None:
    """Train by hand: four stations an epoch. The margin names the Lightning hook or argument that does the same."""
    args, net, device, optimizer, log = run.args, run.net, run.device, run.optimizer, []
    autocast = partial(torch.autocast, device.type, run.precision, enabled=run.precision != torch.float32)
    # GradScaler leaves out a step whose gradient is inf or NaN. So it is used in float32, too, where its scale stays 1.
    half = run.precision == torch.float16
    scaler = torch.amp.GradScaler(device.type, 2.0**16 if half else 1.0, enabled=has_fused(device))
    if run.saved:                                                                       # Trainer.fit(ckpt_path=)
        log = run.saved["log"]
        for name, part in {"model": net, "optimizer": optimizer, "scaler": scaler}.items():
            part.load_state_dict(run.saved[name])
    forward = torch.compile(net) if args.compile else net  # `net` keeps the plain names for the checkpoint
    if run.world_size > 1:
        # Buffers stay each process's own while it trains: Lightning validates through this, with uneven shares.
        forward = nn.parallel.DistributedDataParallel(forward, broadcast_buffers=False) # Trainer(strategy="ddp")
    if run.rank == 0:                                                                   # Trainer(logger=)
        writer = SummaryWriter(Path(args.tensorboard, run.out.name), purge_step=len(log) + 1)

    for epoch in range(len(log), args.epochs):                                          # Trainer(max_epochs=)
        # -- train ---------------------------------------------------------------------- on_train_epoch_start
        run.loader.sampler.set_epoch(epoch)
        run.train_set.set_epoch(epoch)
        net.train()
        losses, norms, started, hidden = [], [], time.perf_counter(), run.rank > 0 or None
        batches = islice(run.loader, run.batches)                                       # limit_train_batches=
        batches = tqdm(batches, f"epoch {epoch + 1}/{args.epochs}", run.batches, leave=False, disable=hidden)
        for i, (image, mask) in enumerate(batches, start=1):                            # transfer_batch_to_device
            image = image.to(device, memory_format=net.memory_format, non_blocking=True)
            mask = mask.to(device, non_blocking=True)
            with autocast():                                                            # training_step
                logits = forward(image)
            loss = run.loss_function(logits.float(), mask)  # in float32, outside autocast
            losses.append(loss.detach())  # stays on the device: the host reads it once an epoch
            scaler.scale(loss / args.accumulate).backward()                             # backward
            if i % args.accumulate and i < run.batches:                                 # accumulate_grad_batches=
                continue
            step = epoch * run.steps + (i - 1) // args.accumulate
            for group in optimizer.param_groups:                                        # lr_scheduler_step
                group["lr"] = args.lr * lr_at(step, args.epochs * run.steps, args.schedule)
            scaler.unscale_(optimizer)                                                  # configure_gradient_clipping
            norms.append(nn.utils.clip_grad_norm_(net.parameters(), args.clip or math.inf))
            # Without a scaler, on Apple's GPU, the host itself looks whether the gradient is finite.
            if scaler.is_enabled() or norms[-1].isfinite():                             # optimizer_step
                scaler.step(optimizer)
            scaler.update(None if half else 1.0)
            optimizer.zero_grad()                                                       # optimizer_zero_grad
        share_buffers(run)
        check_finite(run, epoch, torch.stack(norms))  # waits for the GPU, so that the next line tells the time
        trained = time.perf_counter()

        # -- evaluate ------------------------------------------------------------------- validation_step
        scans = tqdm(run.val_scans, "validation", unit=" scans", leave=False, disable=hidden)
        rows = gather_rows(evaluate(net, scans, run.recipe["preprocess"], run.precision, args.batch_size))

        # -- log ------------------------------------------------------------------------ on_train_epoch_end
        log.append(log_row(run, epoch, losses, norms, rows, started, trained))
        if run.rank > 0:
            continue
        write_log(run, log, rows, writer)

        # -- save ----------------------------------------------------------------------- ModelCheckpoint
        content = run.recipe | {"model": net.state_dict(), "optimizer": optimizer.state_dict(),
                                "scaler": scaler.state_dict(), "log": log,
                                "scans": {row["name"]: row["dice"] for row in rows}}
        torch.save(content, buffer := io.BytesIO())
        best = not rows or log[-1]["val/dice"] > max((row["val/dice"] for row in log[:-1]), default=-1)
        for name in ["best.pt"] * best + ["last.pt"]:  # --resume reads last.pt, so it comes last
            data.write_atomically(run.out / name, buffer.getbuffer())
    if run.rank == 0:
        writer.close()                                                                  # teardown


# --------------------------------------------------------------------------------------------------- its Lightning twin


def fit_lightning(run: Run) -> None:
    """The same by lightning.Trainer: the same objects, the stations in the same order. For comparison only."""
    try:
        from lightning import pytorch as pl
    except ImportError as error:
        raise DataError(f"--engine lightning: {error}; pip install lightning, or use --engine loop") from None
    args, net, log = run.args, run.net, run.saved["log"] if run.saved else []

    class Twin(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.compiled = net, torch.compile(net) if args.compile else net
            self.allow_zero_length_dataloader_with_multiple_devices = True  # more processes than validation scans

        def configure_optimizers(self):
            factor = partial(lr_at, total=args.epochs * run.steps, schedule=args.schedule)
            schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, factor)
            return [run.optimizer], [{"scheduler": schedule, "interval": "step"}]

        def on_train_epoch_start(self):
            run.train_set.set_epoch(self.current_epoch)  # the sampler's epoch is set by Lightning
            self.losses, self.norms, self.rows, self.started = [], [], [], time.perf_counter()

        def training_step(self, batch, _):
            image, mask = batch
            logits = self.compiled(image.contiguous(memory_format=net.memory_format))
            loss = run.loss_function(logits.float(), mask)  # the losses stay in float32 under autocast
            self.losses.append(loss.detach())
            return loss

        def configure_gradient_clipping(self, optimizer, *_, **__):
            self.norms.append(nn.utils.clip_grad_norm_(net.parameters(), args.clip or math.inf))
            if not self.norms[-1].isfinite():
                optimizer.zero_grad()  # without gradients AdamW leaves the weights alone

        def on_train_batch_end(self, _, batch, i):
            self.trained = time.perf_counter()
            if i + 1 == run.batches:
                share_buffers(run)

        def validation_step(self, i, _):
            self.rows += evaluate(net, [run.val_scans[i]], run.recipe["preprocess"], run.precision, args.batch_size)

        def on_train_epoch_end(self):  # which Lightning calls after the validation
            epoch, self.rows = self.current_epoch, gather_rows(self.rows)
            check_finite(run, epoch, torch.stack(self.norms))
            log.append(log_row(run, epoch, self.losses, self.norms, self.rows, self.started, self.trained))
            # What ModelCheckpoint monitors.
            self.log("dice", log[-1]["val/dice"] if self.rows else float(len(log)), logger=False)
            if run.rank == 0:
                write_log(run, log, self.rows, self.logger.experiment)

        def on_save_checkpoint(self, checkpoint):
            checkpoint |= run.recipe | {"model": net.state_dict(), "log": log,
                                        "scans": {row["name"]: row["dice"] for row in self.rows}}

    often = {"save_on_train_epoch_end": True, "enable_version_counter": False}
    best = pl.callbacks.ModelCheckpoint(run.out, "best", monitor="dice", mode="max", **often)
    last = pl.callbacks.ModelCheckpoint(run.out, "last", **often)  # `save_last=True` would save only where "best" does
    best.FILE_EXTENSION = last.FILE_EXTENSION = ".pt"
    run.loader.sampler.set_epoch(len(log))  # Lightning fetches its first batches before any hook runs
    run.train_set.set_epoch(len(log))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # Lightning finds torchrun's processes by itself
    trainer = pl.Trainer(
        accelerator=run.device.type, devices=local, num_nodes=run.world_size // local, max_epochs=args.epochs,
        strategy=pl.strategies.DDPStrategy(broadcast_buffers=False) if run.world_size > 1 else "auto", benchmark=True,
        precision={torch.float32: "32-true", torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}[run.precision],
        logger=pl.loggers.TensorBoardLogger(args.tensorboard, run.out.name, ""), callbacks=[best, last],
        limit_train_batches=run.batches, accumulate_grad_batches=args.accumulate, use_distributed_sampler=False,
        num_sanity_val_steps=0, enable_model_summary=False, enable_progress_bar=sys.stderr.isatty())
    scans = DataLoader(range(len(run.val_scans)), batch_size=None)
    trainer.fit(Twin(), run.loader, scans, ckpt_path=run.out / "last.pt" if run.saved else None, weights_only=True)


# --------------------------------------------------------------------------------------------------------- the command


def train(args: argparse.Namespace) -> dict:
    """Train, and say how well the network of the last epoch does.

    Returns:
        The checkpoint last.pt (see `Run.recipe`; `log` has a row for each epoch, `scans` the Dice of each validation
        scan after the last) and `out`, the run folder. Of several processes, the first returns it, the others {}.

    Raises:
        DataError: input that cannot be trained on, in one line.
    """
    started = time.perf_counter()
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):                  # Trainer(benchmark=)
            run = prepare(args)
            if not run.saved or len(run.saved["log"]) < args.epochs:
                {"loop": fit_loop, "lightning": fit_lightning}[args.engine](run)
        if run.world_size > 1:
            dist.barrier()  # until the first process has saved
    except torch.cuda.OutOfMemoryError:
        raise DataError(f"out of GPU memory; lower --batch-size {args.batch_size} or --size") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if run.rank > 0:
        return {}
    last = run.out / "last.pt"
    result = predict.load_checkpoint(last) | {"out": str(run.out)}
    visualize.save(visualize.curves(result["log"]), run.out / "curves.png")
    if result["scans"]:
        print(predict.summarise([{"name": name, "dice": value} for name, value in result["scans"].items()]))
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes; weights, log.csv and pictures in {run.out}\n"
          f"next: python predict.py SCANS --checkpoint {last} --out masks")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    again = "stopped; to go on from the last finished epoch, repeat the command with --out and --resume"
    return data.run_command(train, parse_args(argv), stopped=again)


if __name__ == "__main__":
    sys.exit(main())
