r"""Train a U-Net to segment an organ in MRI: the loop that Lightning would run, written by hand.

`fit_loop`, right below, is the training: four stations an epoch, train, evaluate, save, log. `fit_lightning` is the
same by lightning.Trainer. Then come the pieces that they call; `prepare`, which makes a run; and the command line.

Contract: a folder of NIfTI scans and masks in (`data.py` names the layouts), a run folder out: last.pt, best.pt (the
epoch of the highest validation Dice), log.csv, split.json, args.json, pictures; TensorBoard events under --tensorboard.
An epoch is a number of steps, not a pass over the scans, so that a run takes as long on 15 scans as on 300. Validation
is per scan, in the scan's own space. A checkpoint is written after every epoch. On a CPU a run is exact: one that was
killed and resumed ends with the same weights, to the last bit, as one that was left alone, if it gets as many threads.
What the default reaches, on what data and in how many minutes: see the README.

    # what phantom.py writes, by slices: a minute on two cores
    python train.py --data phantom --width 8 --batch-size 4 --steps 84 --epochs 12
    python train.py --data Task02_Heart                         # one GPU, or the CPU, whatever there is
    python train.py --data Task02_Heart --out runs/a --resume   # go on where runs/a stopped, or start it
    python train.py --data Task02_Heart --dims 2                # slices instead of patches of volumes
    python train.py --data Task02_Heart --engine lightning      # the same run by lightning.Trainer
    torchrun --nproc-per-node 4 train.py --data Task02_Heart    # four GPUs of one machine
    # the recipe that this project started from:
    python train.py --data Task02_Heart --dims 2 --width 64 --depth 3 --stem 1 --norm none --loss dice --lr 1e-4 \
        --schedule constant --weight-decay 0 --clip 0 --augment geometry --normalise minmax --crop 32
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import data
import predict
import visualize
from data import DataError, listed, note, require
from losses import BCEDiceLoss, DiceLoss
from metrics import dice
from unet import UNet


@dataclass
class Run:
    """What both engines start from: the same objects, made in the same order from the same seed."""

    args: argparse.Namespace
    out: Path
    rank: int
    world_size: int  # number of processes
    device: torch.device
    precision: torch.dtype
    recipe: dict  # what a checkpoint says of the run: version, network, preprocess, split, files, machine, args
    val_scans: list[data.CachedScan]  # this process's share
    loader: DataLoader  # batches of data.SliceDataset or PatchDataset; it may be longer than an epoch
    net: UNet
    optimizer: torch.optim.Optimizer
    loss_function: nn.Module
    saved: dict | None  # the checkpoint to go on from, which the engine loads


# ------------------------------------------------------------------------------------------------------------ the loop


def fit_loop(run: Run) -> None:
    """Train by hand: four stations an epoch. The margin names the Lightning hook or argument that does the same.

    (There, `optimizer_step` is given the work from `training_step` to the clipping as a function, and calls it.)
    """
    args, net, device, optimizer, log = run.args, run.net, run.device, run.optimizer, []
    autocast = partial(torch.autocast, device.type, run.precision, enabled=run.precision != torch.float32)
    # A scaler leaves out a step whose gradient is inf or NaN; a fused optimiser does it without making the host wait.
    # In float16 it scales the loss, too, so that small gradients do not become 0.
    scale = 2.0**16 if run.precision == torch.float16 else 1.0                          # Trainer(precision=)
    scaler = torch.amp.GradScaler(device.type, scale, enabled=optimizer.defaults["fused"])
    if run.saved:                                                                       # Trainer.fit(ckpt_path=)
        log = list(run.saved["log"])  # a copy, since this one grows
        net.load_state_dict(run.saved["model"])
        optimizer.load_state_dict(run.saved["optimizer"])
        scaler.load_state_dict(run.saved["scaler"])
    forward = torch.compile(net) if args.compile else net  # `net` keeps the plain names for the checkpoint
    if run.world_size > 1:
        # `broadcast_buffers` would send batch norm's means at every forward pass, also in Lightning's validation, where
        # a process that has more scans than another would wait for ever. `share_buffers` sends them once an epoch.
        forward = nn.parallel.DistributedDataParallel(forward, broadcast_buffers=False) # Trainer(strategy="ddp")
    if run.rank == 0:                                                                   # Trainer(logger=)
        writer = SummaryWriter(tensorboard_folder(run), purge_step=len(log) + 1)

    for epoch in range(len(log), args.epochs):                                          # Trainer(max_epochs=)
        # -- train ---------------------------------------------------------------------- on_train_epoch_start
        run.loader.sampler.set_epoch(epoch)
        run.loader.dataset.set_epoch(epoch)
        net.train()
        losses, norms, started = [], [], time.perf_counter()
        for i, (image, mask) in enumerate(progress(run, epoch, losses)):                # limit_train_batches=
            image = image.to(device, memory_format=net.memory_format, non_blocking=True)  # transfer_batch_to_device
            mask = mask.to(device, non_blocking=True)
            with autocast():                                                            # training_step
                logits = forward(image)
            loss = run.loss_function(logits.float(), mask)  # in float32, outside autocast
            losses.append(loss.detach())  # stays on the device: to read it in each step would make the host wait
            optimizer.zero_grad()                                                       # optimizer_zero_grad
            scaler.scale(loss).backward()                                               # backward
            # The rate of this step; Lightning sets it at the end of the step before.
            for group in optimizer.param_groups:                                        # lr_scheduler_step
                group["lr"] = args.lr * lr_at(epoch * args.steps + i, args.epochs * args.steps, args.schedule)
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(net.parameters(), args.clip or math.inf)    # configure_gradient_clipping
            norms.append(norm)
            # Without a scaler, on Apple's GPU, the host itself looks whether the gradient is finite.
            if scaler.is_enabled() or norm.isfinite():                                  # optimizer_step
                scaler.step(optimizer)
            scaler.update(None if run.precision == torch.float16 else 1.0)  # 1: left to itself, it would double in time
        share_buffers(run)                                                              # on_train_batch_end, the last
        check_finite(run, epoch, torch.stack(norms))  # waits for the GPU, so that the next line tells the time
        trained = time.perf_counter()

        # -- evaluate ------------------------------------------------------------------- validation_step
        rows = evaluate(run, run.val_scans)
        rows = gather_rows(rows)                                                        # on_train_epoch_end
        log.append(log_row(run, epoch, losses, norms, rows, started, trained))
        if run.rank > 0:
            continue

        # -- save ----------------------------------------------------------------------- ModelCheckpoint
        # No random state and no scheduler: samples depend on (seed, epoch, index), the learning rate on the step. And
        # the epoch is len(log).
        content = run.recipe | scores_to_keep(rows) | {"model": net.state_dict(), "optimizer": optimizer.state_dict(),
                                                   "scaler": scaler.state_dict(), "log": log}
        torch.save(content, buffer := io.BytesIO())
        if is_best(log):
            data.write_atomically(run.out / "best.pt", buffer.getbuffer())
        data.write_atomically(run.out / "last.pt", buffer.getbuffer())  # which --resume reads, so it comes last

        # -- log ------------------------------------------------------------------------ on_train_epoch_end
        write_log(run, log, rows, writer)
    if run.rank == 0:
        with only_warn():
            writer.close()                                                              # teardown


# --------------------------------------------------------------------------------------------------- its Lightning twin


def fit_lightning(run: Run) -> None:
    """The same by lightning.Trainer, with the same objects; only, it logs before it saves, computes the loss under
    autocast, and lets go of a bad gradient instead of scaling. For comparison only."""
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
            factor = partial(lr_at, total=args.epochs * args.steps, schedule=args.schedule)
            schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, factor)
            return [run.optimizer], [{"scheduler": schedule, "interval": "step"}]

        def on_train_epoch_start(self):
            run.loader.dataset.set_epoch(self.current_epoch)  # the sampler's epoch is set by Lightning
            self.losses, self.norms, self.rows, self.started = [], [], [], time.perf_counter()

        def training_step(self, batch, _):
            image, mask = batch
            logits = self.compiled(image.contiguous(memory_format=net.memory_format))
            loss = run.loss_function(logits.float(), mask)  # the losses stay in float32 under autocast
            self.losses.append(loss.detach())
            self.log("loss", loss, prog_bar=True, logger=False)
            return loss

        def configure_gradient_clipping(self, optimizer, *_, **__):
            self.norms.append(nn.utils.clip_grad_norm_(net.parameters(), args.clip or math.inf))
            if not self.norms[-1].isfinite():
                optimizer.zero_grad()  # without gradients AdamW leaves the weights alone: what the loop's scaler does

        def on_train_batch_end(self, _, batch, i):
            if i + 1 == args.steps:
                share_buffers(run)
                check_finite(run, self.current_epoch, torch.stack(self.norms))
                self.trained = time.perf_counter()

        def validation_step(self, i, _):
            self.rows += evaluate(run, [run.val_scans[i]])

        def on_train_epoch_end(self):  # which Lightning calls after the validation
            self.rows = gather_rows(self.rows)
            log.append(log_row(run, self.current_epoch, self.losses, self.norms, self.rows, self.started, self.trained))
            # What ModelCheckpoint monitors.
            self.log("dice", log[-1]["val/dice"] if self.rows else float(len(log)), logger=False)
            if run.rank == 0:
                write_log(run, log, self.rows, self.logger.experiment)

        def on_save_checkpoint(self, checkpoint):
            checkpoint |= run.recipe | scores_to_keep(self.rows) | {"model": net.state_dict(), "log": log}

    often = {"save_on_train_epoch_end": True, "enable_version_counter": False}
    best = pl.callbacks.ModelCheckpoint(run.out, "best", monitor="dice", mode="max", **often)
    last = pl.callbacks.ModelCheckpoint(run.out, "last", **often)  # `save_last=True` would save only where "best" does
    best.FILE_EXTENSION = last.FILE_EXTENSION = ".pt"
    run.loader.sampler.set_epoch(len(log))  # Lightning fetches its first batches before any hook runs
    run.loader.dataset.set_epoch(len(log))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # Lightning finds torchrun's processes by itself
    trainer = pl.Trainer(
        accelerator=run.device.type, devices=local, num_nodes=run.world_size // local, max_epochs=args.epochs,
        strategy=pl.strategies.DDPStrategy(broadcast_buffers=False) if run.world_size > 1 else "auto", benchmark=True,
        precision={torch.float32: "32-true", torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}[run.precision],
        logger=pl.loggers.TensorBoardLogger(tensorboard_folder(run), "", ""), callbacks=[best, last],
        limit_train_batches=args.steps, use_distributed_sampler=False, num_sanity_val_steps=0,
        enable_model_summary=False, enable_progress_bar=sys.stderr.isatty())
    scans = DataLoader(range(len(run.val_scans)), batch_size=None)
    trainer.fit(Twin(), run.loader, scans, ckpt_path=run.out / "last.pt" if run.saved else None, weights_only=True)


# ------------------------------------------------------------------------------------------------- pieces of the loop


def lr_at(step: int, total: int, schedule: str = "onecycle") -> float:
    """Learning rate of a step (from 0 to total - 1) as a share of the highest, 0 to 1.

    onecycle: up in a line over the first fifth of the run, then down in a cosine towards 0 (after Smith, Topin,
    "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates", 2018).
    """
    if schedule == "constant":
        return 1.0
    if schedule != "onecycle":
        raise ValueError(f"schedule is {schedule!r}; choose from onecycle, constant")
    warmup = max(total // 5, 1)
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1))) / 2


def progress(run: Run, epoch: int, losses: list[Tensor]) -> Iterator[list[Tensor]]:
    """The batches of an epoch, on a terminal with a bar that shows the last of `losses`, a list that the loop fills.

    `losses` is for the bar alone. After 20 steps of a run it says how long the rest will take.
    """
    steps, hidden = run.args.steps, None if run.rank == 0 else True  # None: where there is no terminal
    bar = tqdm(islice(run.loader, steps), f"epoch {epoch + 1}", steps, leave=False, disable=hidden)
    for i, batch in enumerate(bar):
        if i == 1:  # the first step starts workers, and on a GPU the search for the fastest convolutions
            started = time.perf_counter()
        if i % 20 == 1 and not bar.disable:
            bar.set_postfix(loss=f"{losses[-1].item():.4f}")  # waits for the GPU, so not at every step
        if i == 20 and epoch == (len(run.saved["log"]) if run.saved else 0):
            steps_left = (run.args.epochs - epoch) * steps - i
            say(f"training   {time_left((time.perf_counter() - started) / (i - 1) * steps_left)}, besides validation")
        yield batch


def time_left(seconds: float) -> str:
    """How long the rest of the run takes, in words."""
    clock = time.strftime("%H:%M", time.localtime(time.time() + seconds))
    return f"about {math.ceil(seconds / 60)} min left, until {clock}"


def evaluate(run: Run, scans: Sequence[data.CachedScan]) -> list[dict]:
    """Score each scan in its own space. (`UNet.predict` sees to evaluation mode, and that there are no gradients.)

    Returns:
        One row per scan: name, dice, confidence, truth and prediction (foreground voxels), voxels; of the slice that
        holds most of the organ `slice` (from 1), `slices` (of how many), `slice_dice`, and `panel`: image, truth,
        probability (H, W).
    """
    how, rows = run.recipe["preprocess"], []
    hidden = None if run.rank == 0 and len(scans) > 1 else True
    for scan in tqdm(scans, "validation", unit=" scans", leave=False, disable=hidden):
        image, mask, truth = scan.open("image"), scan.open("mask"), scan.open("truth")
        probability = predict.predict_volume(run.net, image, size=how["size"], precision=run.precision,
                                             smooth=how["smooth"] / scan.open("spacing")[0],
                                             batch_size=run.args.batch_size)
        answer = data.undo_preprocess(probability, truth.shape, how)
        prediction = answer > 0.5
        fullest = int(mask.sum(axis=(1, 2)).argmax())
        whole, here = dice(prediction, truth > 0), dice(probability[fullest] > 0.5, mask[fullest] > 0)
        rows.append({"name": scan.name, "dice": whole,
                     "confidence": predict.confidence(answer), "truth": int(np.count_nonzero(truth)),
                     "prediction": int(np.count_nonzero(prediction)), "voxels": truth.size,
                     "slice": fullest + 1, "slices": len(mask), "slice_dice": here,
                     "panel": [np.float32(array[fullest]) for array in (image, mask, probability)]})
    return rows


def gather_rows(rows: list[dict]) -> list[dict]:
    """The validation rows of all processes, by name."""
    if dist.is_initialized():
        parts: list = [None] * dist.get_world_size()
        dist.all_gather_object(parts, rows)
        rows = [row for part in parts for row in part]
    return sorted(rows, key=lambda row: row["name"])


def scores_to_keep(rows: list[dict]) -> dict:
    """What a checkpoint keeps of its validation: the Dice of each scan, and the confidence below which predict.py calls
    a mask doubtful: two standard deviations under the mean of the scans in which something was found. Of fewer than
    three such scans it is NaN, and no mask is called so."""
    values = [row["confidence"] for row in rows if row["confidence"]]
    values = values if len(values) >= 3 else [math.nan]
    return {"scans": {row["name"]: row["dice"] for row in rows},
            "doubt_below": float(np.mean(values) - 2 * np.std(values))}


def share_buffers(run: Run) -> None:
    """Give all processes the running means of the first, which it saves, so that all validate the same network."""
    if run.world_size > 1:
        for buffer in run.net.buffers():
            dist.broadcast(buffer, 0)


def check_finite(run: Run, epoch: int, norms: Tensor) -> None:
    """End a hopeless run before it is saved: most steps were skipped, or the network holds inf or NaN."""
    skipped = int((~norms.isfinite()).sum())
    finite = all(tensor.isfinite().all() for tensor in run.net.state_dict().values())
    require(finite and 2 * skipped <= len(norms), f"epoch {epoch + 1}: {skipped} of {len(norms)} gradients, or the "
            "weights, are not finite; lower --lr, use --precision fp32, or look at the data")


def is_best(log: list[dict]) -> bool:
    """Whether the last epoch has the highest Dice so far. Without validation scans the last is the best."""
    *before, last = [row["val/dice"] for row in log]
    return math.isnan(last) or last > max(before, default=-1)


def log_row(run: Run, epoch: int, losses: list, norms: list, rows: list[dict], started: float, trained: float) -> dict:
    """An epoch as a row of log.csv and of TensorBoard; `started` and `trained` are times, in s.

    A step with a non-finite gradient was not taken; it is counted, and left out of the means. Each scan counts the same
    in the Dice. The foreground is the share of the voxels that is organ, and that was called organ. `losses` and
    `norms` are this process's share, `rows` those of all. What the row holds are Python's own numbers, or no checkpoint
    with it could be loaded.
    """
    args, losses, norms = run.args, torch.stack(losses), torch.stack(norms)
    loss = losses[losses.isfinite()].mean()
    if dist.is_initialized():
        dist.all_reduce(loss)  # of each process's share of the batches
    scores = np.array([row["dice"] for row in rows] or [math.nan])
    voxels = sum(row["voxels"] for row in rows) or math.nan
    slices = args.steps * args.batch_size * math.prod(run.recipe["preprocess"]["size"][:-2])
    row = {
        "train/loss": loss / run.world_size,
        "train/grad_norm": norms[norms.isfinite()].mean(),
        "train/skipped": int((~norms.isfinite()).sum()),
        "train/lr": args.lr * lr_at((epoch + 1) * args.steps - 1, args.epochs * args.steps, args.schedule),
        "val/dice": scores.mean(),
        "val/dice_std": scores.std(),
        "val/dice_worst": scores.min(),
        "val/foreground_truth": sum(row["truth"] for row in rows) / voxels,
        "val/foreground_prediction": sum(row["prediction"] for row in rows) / voxels,
        "system/seconds": trained - started,
        "system/validation_seconds": time.perf_counter() - trained,
        "system/slices_per_second": slices / (trained - started),
        "system/gpu_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if run.device.type == "cuda" else math.nan,
    }
    return {name: value if isinstance(value, int) else float(value) for name, value in row.items()}


@contextlib.contextmanager
def only_warn() -> Iterator[None]:
    """Let the training go on where a picture or a log cannot be written; in `fit_loop` the weights are safe already."""
    try:
        yield
    except (OSError, DataError) as error:
        warnings.warn(f"log or picture: {error}; the training goes on", stacklevel=3)


def write_log(run: Run, log: list[dict], rows: list[dict], writer: SummaryWriter) -> None:
    """The last epoch to screen, log.csv, pictures and TensorBoard."""
    epoch, row = len(log), log[-1]
    parts = [f"epoch {epoch:2}/{run.args.epochs}", f"loss {row['train/loss']:.4f}"]
    if rows:
        parts += [f"Dice {row['val/dice']:.4f} (SD {row['val/dice_std']:.4f}, worst {row['val/dice_worst']:.4f})",
                  f"called organ {100 * row['val/foreground_prediction']:.2f} % of the voxels "
                  f"(truth {100 * row['val/foreground_truth']:.2f} %)"]
    seconds = row["system/seconds"] + row["system/validation_seconds"]
    parts.append(f"{row['system/seconds']:.0f} s, validation {row['system/validation_seconds']:.0f} s")
    if epoch < run.args.epochs:
        parts.append(time_left((run.args.epochs - epoch) * seconds))
    say("  ".join(parts))
    with only_warn():
        data.write_csv(run.out / "log.csv", [{"epoch": n, **row} for n, row in enumerate(log, start=1)])
        for name, value in row.items():
            writer.add_scalar(name, value, epoch)
        if rows:
            figure = draw_panels(rows[:4], run.recipe["preprocess"]["axis"])
            writer.add_image("validation", visualize.rgb(figure), epoch, dataformats="HWC")
            visualize.save(figure, run.out / "validation.png")
        writer.flush()


def draw_panels(rows: Sequence[dict], axis: int = 2):
    """Scan, truth, probability, prediction and error of a slice of each validation scan, as a figure."""
    size = np.max([row["panel"][0].shape for row in rows], axis=0)
    stacks = [np.stack([data.crop_or_pad(row["panel"][i], size) for row in rows]) for i in range(3)]
    titles = [f"{row['name']}: Dice {row['dice']:.3f};  slice {row['slice']} of {row['slices']}: Dice "
              f"{row['slice_dice']:.3f}" for row in rows]
    return visualize.compare(*stacks, titles, axis)


# ---------------------------------------------------------------------------------------------------- before the loop

# One more without a Dice in it goes into `make_loss`, and is left out of test_it_learns_the_phantom, as "bce" is.
LOSSES = {"dice": DiceLoss, "bce": nn.BCEWithLogitsLoss, "bce_dice": BCEDiceLoss}
# For slices and for patches: the ladder in benchmarks/README.md measured them.
DEPTH, EPOCHS = {2: 3, 3: 2}, {2: 22, 3: 12}
SMOOTH = 1.5  # mm, deviation of the Gaussian that averages slices at prediction, in 2D
VALIDATED = 500_000_000  # voxels, as the network sees them, that are scored after an epoch: a minute on two cores
LARGEST_PATCH = (20, 32, 32)  # times the stem, at least times 2: 50 x 80 x 80 mm at 0.625 and at 1.25 mm
# What a resumed run may change: where and how it runs; and --epochs, which moves the learning rate: `compare` says so.
MAY_CHANGE = {"data", "cache", "out", "resume", "tensorboard", "device", "workers", "compile", "epochs"}


def say(text: str) -> None:
    """Print lines, of several processes only in the first."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*map(data.printable, text.splitlines()), sep="\n", flush=True)


def prepare(args: argparse.Namespace) -> Run:
    """Seed, device, data, network, optimisation, run folder: lines are printed for each. The weights of a checkpoint to
    go on from are loaded by the engine. The margin says where Lightning's users do the same; `fit_lightning` gets what
    is made here."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    if rank > 0:
        warnings.simplefilter("ignore")  # the first process says what there is to say
    torch.manual_seed(args.seed)                                                        # seed_everything
    say(f"seed       {args.seed}")

    device = predict.pick_device(args.device)                                           # Trainer(accelerator=)
    if world_size > 1:                                                                  # Trainer(strategy="ddp")
        if device.type == "cuda":
            torch.cuda.set_device(device := torch.device("cuda", int(os.environ["LOCAL_RANK"])))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    precision = predict.pick_precision(args.precision, device)                          # Trainer(precision=)
    predict.keep_freed_memory()
    workers = share_cores(args, device)
    machine = describe(device, workers, world_size)
    say("\n".join(f"{name:10} {value}" for name, value in machine.items()))

    last = Path(args.out or "", "last.pt")                                              # Trainer.fit(ckpt_path=)
    saved = predict.load_checkpoint(last) if args.resume and last.exists() else None
    train_scans, val_scans, kept = load_data(args, saved)                               # DataModule.setup
    size = kept["preprocess"]["size"]
    lowest = math.ceil(size[0] / (args.stem * 2**args.depth))  # slices of the lowest maps; above 1 are 2
    if args.dims == 3 and device.type == "cpu" and (lowest == 2 or lowest == 1 and args.depth > 0):
        precision = torch.float32  # of maps of 2 slices PyTorch's bfloat16 gradients are wrong there: see the README
    # What "auto" became: on another machine it may become another, and then `compare` refuses to go on.
    args.precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[precision]
    dataset = data.SliceDataset if args.dims == 2 else data.PatchDataset
    train_set = dataset(train_scans, size, augment="none" if args.overfit else args.augment, seed=args.seed,
                        samples=args.steps * args.batch_size)
    shared = args.batch_size % world_size == 0
    require(shared, f"--batch-size {args.batch_size}: {world_size} processes share it; choose a multiple")
    loader = DataLoader(                                                                # train_dataloader
        train_set, args.batch_size // world_size, num_workers=workers, persistent_workers=workers > 0,
        # The order depends on (seed, epoch) alone; of each batch, every process takes its share.
        sampler=DistributedSampler(train_set, world_size, rank, seed=args.seed, drop_last=True), drop_last=True,
        pin_memory=device.type == "cuda", worker_init_fn=partial(start_worker, device.type == "cpu"))
    say(f"data       {len(train_scans)} scans to train on, {len(val_scans)} to validate on; batches of "
        f"{args.batch_size} {'slices' if args.dims == 2 else 'patches'} of {' x '.join(map(str, size))}")

    # One channel and one mask, as in predict_volume.
    network = {name: vars(args)[name] for name in ("dims", "width", "depth", "norm", "attention", "stem")}
    net = UNet(**network)                                                               # configure_model
    if world_size > 1 and device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)                              # Trainer(sync_batchnorm=)
    net = net.to(device, memory_format=net.memory_format)
    say(f"network    {network}: {sum(p.numel() for p in net.parameters()):,} parameters, "
        f"{str(precision).removeprefix('torch.')}")

    # In one kernel; but in float16 Lightning lets no fused optimiser clip its gradients.
    fused = device.type in ("cpu", "cuda") and (args.engine == "loop" or precision != torch.float16)
    optimizer = torch.optim.AdamW(                                                      # configure_optimizers
        net.parameters(), args.lr, weight_decay=args.weight_decay, fused=fused)
    loss_function = make_loss(args.loss, world_size)
    recipe = {"version": predict.VERSION, "network": network, **kept, "machine": machine, "args": vars(args)}
    if saved:
        compare(saved, recipe, last)
    out = [claim_folder(args, machine) if rank == 0 else None]
    if world_size > 1:
        dist.broadcast_object_list(out)
    (out,) = out
    if rank == 0:
        data.write_atomically(out / "split.json", json.dumps(kept["split"], indent=1).encode())
    say(f"optimiser  AdamW, {args.schedule} to {args.lr:g}, {args.epochs} epochs of {args.steps} steps\n"
        f"run        {out}, {args.engine}, {'goes on' if saved else 'new'}; TensorBoard: {args.tensorboard}")
    return Run(args, out, rank, world_size, device, precision, recipe, val_scans[rank::world_size], loader, net,
               optimizer, loss_function, saved)


def make_loss(name: str, world_size: int) -> nn.Module:
    """The loss of a name. Dice is that of the batch of all processes together, not the mean of one Dice for each."""
    # A mean over voxels, like "bce", DDP averages by itself.
    shared = {"reduce": sum_over_processes} if world_size > 1 and name != "bce" else {}
    return LOSSES[name](**shared)


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of all processes' x. In the backward pass each takes the gradient of its own x, times their number: DDP
    will average over them."""
    total = x.detach().clone()
    dist.all_reduce(total)
    return total + dist.get_world_size() * (x - x.detach())  # which is 0, and carries the gradient


def share_cores(args: argparse.Namespace, device: torch.device) -> int:
    """Divide the cores between the threads of PyTorch and the workers, whose number is returned.

    On a CPU the threads take all cores, unless OMP_NUM_THREADS says how many; as many workers, at most 8, take the
    moments when a step does not need them (see `start_worker`): where workers do not give way, threads wait for the one
    that was pushed from its core. A step of the default took 145 ms on two cores, 162 where workers did not give way,
    127 at nice 19, and 200 on one core; but where other programs kept both cores busy, workers of nice 19 starved, and
    a step took longer than 2 s instead of 1. A GPU needs no threads, and as many workers as can be had: a core makes
    about 400 slices a second.
    """
    cores = max(data.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
    if device.type == "cpu":
        workers, threads = min(cores, 8) if cores > 1 else 0, cores
    else:
        workers, threads = min(cores - 1, 32), 1
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    return workers if args.workers is None else args.workers


def start_worker(polite: bool, _: int) -> None:
    """In a worker: Ctrl-C is for the main process, which ends its workers; if polite, give way to its threads."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if polite and hasattr(os, "nice"):  # not on Windows
        os.nice(10)


def describe(device: torch.device, workers: int, world_size: int) -> dict[str, str]:
    """What a pasted log must say, so that somebody else can help: code, versions, hardware, how it is shared out."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    found = subprocess.run(git, capture_output=True, text=True) if shutil.which("git") else None
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        name, memory = gpu.name, gpu.total_memory
    else:
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        model = info.partition("model name\t: ")[2].partition("\n")[0] or platform.processor() or platform.machine()
        name = f"{data.cpu_count()} cores, {model}, {torch.backends.cpu.get_cpu_capability()}"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.nan
    # Git knows no two edits of one commit apart, so what was edited is summed up beside it.
    names = ("data", "losses", "metrics", "predict", "train", "unet")
    edited = zlib.crc32(b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in names))
    return {
        "code": f"{found.stdout.strip() if found and found.stdout else 'no git checkout'}, {edited:08x}",
        "versions": f"PyTorch {torch.__version__}, Python {platform.python_version()}, {platform.system()}",
        "device": f"{device}, {name}, {memory / 2**30:.0f} GB",
        "shared": f"{torch.get_num_threads()} threads, {workers} workers, {world_size} processes",
    }


def tensorboard_folder(run: Run) -> Path:
    """Where the events of a run go: of each run folder on disk into one of its own, the same when it goes on."""
    out = run.out.resolve()
    return Path(run.args.tensorboard, f"{out.name}-{zlib.crc32(str(out).encode()):08x}")


def load_data(args: argparse.Namespace, saved: dict | None = None) -> tuple[list, list, dict]:
    """Training and validation scans (`data.CachedScan`), and what a checkpoint keeps of the data.

    Fills in the arguments that depend on the scans. A run that goes on keeps its split.

    Returns:
        train, val, and a dict: split, files (checksums), preprocess (see `data.preprocess`; `size` is of a sample).
    """
    pairs = data.find_pairs(args.data)
    for folder in (Path(args.out or "runs"), Path(args.tensorboard)):  # now, and not after minutes of reading
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        writable = there.is_dir() and os.access(there, os.W_OK)
        require(writable, f"{folder}: {there} is no folder that can be written to; choose another")
    split = saved["split"] if saved else data.split_scans([pair.name for pair in pairs], args.folds, args.fold)
    if args.overfit:  # of the other scans nothing is read
        split = {"train": split["train"][: args.overfit], "val": []}
        pairs = [pair for pair in pairs if pair.name in split["train"]]
    if saved:
        pairs = keep_split(pairs, split, args.data)
        args.batch_size = args.batch_size or saved["args"]["batch_size"]  # however many processes there are now
    how = choose_preprocessing(args, pairs)
    scans = {scan.name: scan for scan in data.cache_scans(pairs, how, args.cache)}
    train = [scans[name] for name in split["train"]]
    val = train if args.overfit else [scans[name] for name in split["val"]]
    organ = any(scan.open("mask").any() for scan in train)
    require(organ, f"{args.data}: no voxel of a label is foreground, with --label {args.label} and --crop {args.crop}; "
            "there is nothing to learn")
    # Validation, like an epoch, takes a bounded time: of many large scans every second, or third, and so on.
    every = max(math.ceil(sum(scan.open("mask").size for scan in val) / VALIDATED), 1)
    note(every > 1, f"validation takes one scan in {every} of {len(val)}, to save time; predict.py --held-out scores "
         "them all")
    return train, val[::every], {"split": split, "preprocess": how | {"size": choose_size(args, train, how)},
                                 "files": data.checksums(pairs)}


def choose_preprocessing(args: argparse.Namespace, pairs: Sequence[data.Pair]) -> dict:
    """How scans are read and preprocessed (see `data.preprocess`), by their spacing, of which the headers tell.

    Fills in the arguments that follow from it: dims, and with them depth and epochs.
    """
    median, thinnest = data.survey(pairs)
    axis = data.slice_axis(median) if args.axis is None else args.axis
    spacing = [args.spacing or median[i] for i in data.PATIENT_AXES[axis]]
    if args.size:
        args.dims = args.dims or len(args.size)
        require(len(args.size) == args.dims > 1, "--size: expected two numbers, H W, or in 3D three, D H W")
    # The stem's blocks and the kernels are cubes of voxels, and should be about cubes of the patient.
    args.dims = args.dims or (3 if max(median) <= 1.5 * min(median) and thinnest >= 16 else 2)
    args.depth = DEPTH[args.dims] if args.depth is None else args.depth
    args.epochs = args.epochs or EPOCHS[args.dims]
    return {"axis": axis, "label": args.label, "spacing": [None, *spacing[1:]] if args.dims == 2 else spacing,
            "crop": args.crop, "normalise": args.normalise, "smooth": SMOOTH if args.dims == 2 else 0.0}


def choose_size(args: argparse.Namespace, train: Sequence[data.CachedScan], how: dict) -> list[int]:
    """The size of a sample, (H, W) or (D, H, W), by that of the preprocessed scans.

    Fills in the arguments that go with it: stem and batch_size.
    """
    median_shape = np.median([scan.open("mask").shape[-args.dims :] for scan in train], axis=0)
    slices = listed(median_shape[-2:], " x ")
    require(min(median_shape[-2:]) > 1, f"{args.data}: slices are {slices} voxels; choose how to cut them by --axis")
    small, fine = max(median_shape) < 64, max(how["spacing"][-args.dims :]) < 0.9  # of a small organ every voxel counts
    args.stem = args.stem or (1 if small else 4 if fine else 2)
    # Larger slices are cropped, for training only: prediction moves a window over them. The network pads up to
    # `multiple`; to save a fifth of the work, up to 5 % of the median length is cut instead.
    multiple = args.stem * 2**args.depth
    if args.dims == 3:
        median_shape = np.minimum(median_shape, np.multiply(LARGEST_PATCH, max(args.stem, 2)))
    size = args.size or [math.ceil(0.95 * length / multiple) * multiple for length in median_shape]
    enough = max(size) > multiple and min(size[-2:]) >= multiple
    require(enough, f"--size {size}: too small for its lowest level; lower --depth, or take {multiple} a side and on "
            "one side more")
    # As many samples as a step of bounded time can hold: the fewest, and the points of their first level's maps.
    least, points = (4, 100_000) if args.dims == 2 else (2, 2 * math.prod(LARGEST_PATCH))
    samples = max(least, min(points // math.ceil(math.prod(size) / args.stem**args.dims), 16))
    world_size = int(os.environ.get("WORLD_SIZE", 1))  # each process takes the same share
    args.batch_size = args.batch_size or math.ceil(samples / world_size) * world_size
    return size


def keep_split(pairs: Sequence[data.Pair], split: dict[str, list[str]], root: str) -> list[data.Pair]:
    """The pairs that a run began with. One that is gone since is an error, one that was added is left out."""
    known = {*split["train"], *split["val"]}
    gone = known - {pair.name for pair in pairs}
    require(not gone, f"{root}: the run began with {listed(sorted(gone))}: put it back, or choose another --out")
    added = [pair.name for pair in pairs if pair.name not in known]
    note(added, f"{root}: added since the run began, left out: {listed(added)}")
    return [pair for pair in pairs if pair.name in known]


def compare(saved: dict, recipe: dict, last: Path) -> None:
    """Refuse to go on with another recipe; say what is allowed to differ, and what that does."""
    old, new = {**saved, **saved["args"]}, {**recipe, **recipe["args"]}
    for name in ["dims", *sorted(new.keys() - MAY_CHANGE - {"args", "files", "machine"})]:  # others follow from dims
        require(old.get(name) == new[name], f"{last}: was trained with {name} {old.get(name)}, not {new[name]}; repeat "
                "that, or choose another --out")
    changed = [name for name, sums in new["files"].items() if sums != old["files"][name]]
    note(changed, f"changed since the run began, which goes on with what is there: {listed(changed)}")
    for part, what in (("code", "what changed since may change its course"), ("shared", "the last bits may differ")):
        before, here = old["machine"][part], new["machine"][part]
        note(before != here, f"the run began with {part} {before}, and goes on with {here}: {what}")
    done, epochs = len(saved["log"]), new["epochs"]
    was = new["lr"] * lr_at(done * new["steps"], old["epochs"] * new["steps"], new["schedule"])
    now = new["lr"] * lr_at(done * new["steps"], epochs * new["steps"], new["schedule"])
    note(done >= epochs, f"{last}: has {done} epochs, --epochs is {epochs}: nothing is left to do")
    longer = done < epochs and epochs != old["epochs"]
    note(longer, f"--epochs was {old['epochs']}, is {epochs}: the learning rate goes on at {now:.2g}, not {was:.2g}")


def claim_folder(args: argparse.Namespace, machine: dict) -> Path:
    """Make the run folder, with the arguments of this start: args.json; when a run goes on, args-2.json and so on.

    Of two new runs at once, one gets the folder and the other is refused, even in the same moment: "x" makes a file
    only where there is none.
    """
    out = Path(args.out or time.strftime(f"runs/%Y%m%d-%H%M%S-{os.getpid()}"))
    out.mkdir(parents=True, exist_ok=True)
    starts = len(list(out.glob("args*.json")))
    there = any(path for name in ("args*.json", "*.pt", "log.csv", "split.json") for path in out.glob(name))
    require(args.resume or not there, f"{out}: holds a run; add --resume to go on, or choose another --out")
    lost = there and not (out / "last.pt").exists()
    note(lost, f"{out}: holds no last.pt to go on from; the run begins anew")
    with open(out / (f"args-{starts + 1}.json" if starts else "args.json"), "x") as file:
        json.dump(vars(args) | {"machine": machine}, file, indent=1)
    return out


# --------------------------------------------------------------------------------------------------------- the command


def number(low: float, high: float = 1e6, kind: type = int) -> Callable[[str], float]:
    """A type for argparse: an int or float from `low` to `high`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}: expected a number from {low} to {high}")
        return value

    parse.__name__ = kind.__name__  # which argparse names where `text` is no number
    return parse


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints a default behind the help of its option, where there is one to print; the epilog stays as it is."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return super()._get_help_string(action) if action.default else action.help


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `train.train(train.parse_args(["--data", "phantom"]))` runs it from Python."""
    *told, commands = __doc__.split("\n\n")  # the first line and the last paragraph of this file's docstring
    parser = argparse.ArgumentParser(description=told[0], epilog=f"examples:\n{commands}", formatter_class=Help)
    positive, share = number(1), partial(number, kind=float)
    add = parser.add_argument_group("data").add_argument
    add("--data", required=True, metavar="DIR", help="imagesTr/ + labelsTr/, or images/ + labels/")
    add("--cache", default="cache", metavar="DIR", help="where preprocessed scans are kept")
    add("--label", type=number(1, 2**53), nargs="+", metavar="N", help="label values of the organ (default: all but 0)")
    add("--axis", type=int, choices=(0, 1, 2), help="slice axis, 2: axial (default: that of the coarsest spacing)")
    add("--folds", type=positive, default=5, metavar="N", help="parts to split the scans into")
    add("--fold", default="0", metavar="K", help="the part to validate on, from 0; `all`: train on every scan")
    add("--normalise", default="percentile", choices=("zscore", "percentile", "minmax"), help="of each scan")
    add("--crop", type=number(0), default=0, metavar="N", help="pixels to cut off each border of a slice (default: 0)")
    add("--spacing", type=share(0.05, 20), metavar="MM", help="resample pixels, in 3D voxels, of scans that are more "
        "than 15 %% off (default: the median)")
    add("--size", "--patch", type=positive, nargs="+", metavar="N", help="H W of training slices, D H W of patches "
        f"(default: the median of the scans, in 3D at most {LARGEST_PATCH} times the stem, at least times 2)")
    add("--augment", default="full", choices=("none", "geometry", "full"), help="see data.py")

    add = parser.add_argument_group("network").add_argument
    add("--dims", type=int, choices=(2, 3), help="2: slices, 3: patches (default: 3, but 2 of voxels more than 1.5 "
        "times as long as they are wide, or of fewer than 16 slices)")
    add("--width", type=positive, default=16, metavar="N", help="channels of the first level")
    add("--depth", type=number(0, 8), metavar="N", help=f"poolings (default: {DEPTH[2]}, in 3D {DEPTH[3]})")
    add("--stem", type=number(1, 8), metavar="N", help="voxels a side that enter as channels, 1: classical "
        "(default: 2; 4 of voxels below 0.9 mm; 1 of slices, in 3D scans, below 64 voxels a side)")
    add("--norm", default="batch", choices=("none", "batch", "instance"), help="normalisation layers")
    add("--attention", action="store_true", help="attention gates on the skips")

    add = parser.add_argument_group("optimisation").add_argument
    add("--loss", default="bce_dice", choices=tuple(LOSSES), help="training loss")
    add("--epochs", type=positive, metavar="N", help=f"how often to validate (default: {EPOCHS[2]}, in 3D {EPOCHS[3]})")
    add("--steps", "--limit-batches", type=positive, default=250, metavar="N", help="batches an epoch")
    add("--batch-size", type=positive, metavar="N", help="of all processes together (default: as many as keep a step "
        "short, 4 to 16 slices, 2 to 16 patches, a multiple of the processes)")
    add("--lr", type=share(0), default=4e-3, help="highest learning rate of AdamW")
    add("--schedule", default="onecycle", choices=("onecycle", "constant"), help="learning rate over the steps")
    add("--weight-decay", type=share(0), default=1e-2, help="of AdamW; with 0 it is Adam")
    add("--clip", type=share(0), default=1.0, metavar="NORM", help="largest norm of the gradient; 0: no limit")
    add("--seed", type=number(0, 2**32 - 1), default=0, metavar="N", help="of all that is random (default: 0)")

    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="DIR", help="run folder (default: runs/<date and time>)")
    add("--resume", action="store_true", help="go on from OUT/last.pt, where there is one")
    add("--tensorboard", default="./logs", metavar="DIR", help="TensorBoard events")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="of the network's arithmetic")
    add("--workers", type=number(0), metavar="N", help="processes that load data (default: by the cores)")
    add("--engine", default="loop", choices=("loop", "lightning"), help="whose loop: the hand-written, or Lightning's")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--overfit", type=positive, metavar="N", help="train and validate on the same N scans: can it learn at all?")

    args = parser.parse_args(argv)
    if args.resume and not args.out:
        parser.error("argument --resume: say which run, with --out")
    return args


def train(args: argparse.Namespace) -> dict:
    """Train, and say how well the network of the last epoch does.

    Returns:
        The checkpoint last.pt (see `Run.recipe`; `log` has a row for each epoch, `scans` the Dice of each validation
        scan after the last) and `out`, the run folder. Of several processes, the first returns it, the others {}.

    Raises:
        DataError: input that cannot be trained on, or a disk that is full, in one line.
    """
    started, args = time.perf_counter(), argparse.Namespace(**vars(args))  # a copy: what is filled in is of these data
    engine = fit_loop if args.engine == "loop" else fit_lightning
    try:
        # As by Trainer(benchmark=); and a disk that is full is told in one line.
        with torch.backends.cudnn.flags(enabled=True, benchmark=True), data.one_line(args.out or "runs"):
            run = prepare(args)
            pairs = {pair.name: pair for pair in data.find_pairs(args.data)}  # now: a file may be gone in the end
            if not run.saved or len(run.saved["log"]) < args.epochs:
                engine(run)
        if run.world_size > 1:
            dist.barrier()  # until the first process has saved
    except torch.cuda.OutOfMemoryError:
        raise DataError(f"out of GPU memory; lower --batch-size {args.batch_size} or --size") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if run.rank > 0:
        return {}
    result = predict.load_checkpoint(run.out / "last.pt") | {"out": str(run.out)}
    with only_warn():
        visualize.save(visualize.curves(result["log"]), run.out / "curves.png")
    say(closing(args, pairs, result, time.perf_counter() - started))
    return result


def closing(args: argparse.Namespace, pairs: dict[str, data.Pair], result: dict, seconds: float) -> str:
    """The last lines of a run: what it reached, where it lies, and the commands to go on with."""
    out, scans, dices = result["out"], result["scans"], [row["val/dice"] for row in result["log"]]
    lines = [f"{seconds / 60:.1f} minutes; checkpoints, log.csv, validation.png and curves.png in {out}", "next:"]
    if scans:
        best = f"best.pt: {max(dices):.4f} after epoch {dices.index(max(dices)) + 1}"
        best = best if Path(out, "best.pt").exists() else "best.pt is gone"
        lines = [predict.summarise([{"name": name, "dice": value} for name, value in scans.items()]),
                 f"last.pt: Dice {dices[-1]:.4f} after the last epoch; {best}", *lines]
    name = min(scans, key=scans.get) if scans else result["split"]["train"][0]  # the worst says the most
    pair, mask = pairs[name], Path(out, "masks", f"{name}.nii.gz")
    commands = [
        ["predict.py", args.data, "--checkpoint", f"{out}/last.pt", "--out", mask.parent,
         "--labels", pair.label.parent],
        ["visualize.py", "movie", pair.image, mask, pair.label, "--out", f"{out}/{name}.html"]]
    commands[0] += ["--held-out"] if name in result["split"]["val"] else []
    commands[1] += ["--label", *args.label] if args.label else []
    return "\n".join(lines + ["  python " + shlex.join(map(str, command)) for command in commands])


def main(argv: Sequence[str] | None = None) -> int:
    again = "stopped; to go on from the last finished epoch, repeat the command with --out and --resume"
    return data.run_command(train, parse_args(argv), stopped=again)


if __name__ == "__main__":
    sys.exit(main())
