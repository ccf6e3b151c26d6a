"""Train a U-Net to segment an organ in MRI: the loop that Lightning would run, written by hand.

Contract: a folder of NIfTI scans and masks in (`data.py` names the layouts), a run folder out: last.pt, best.pt (the
epoch of the highest validation Dice), log.csv, split.json, args.json, pictures; TensorBoard events under --logs.
Validation is per scan, in the scan's own space. On a CPU a run is exact: killed and resumed, or left alone, it ends
with the same weights to the last bit.

    python train.py --data phantom --width 8 --epochs 6         # synthetic scans: minutes on a laptop's CPU
    python train.py --data Task02_Heart                         # one GPU, or the CPU, whatever there is
    python train.py --data Task02_Heart --out runs/a --resume   # go on where runs/a stopped, or start it
    # the recipe that this project started from:
    python train.py --data Task02_Heart --width 64 --norm none --loss dice --lr 1e-4 --schedule constant \\
        --weight-decay 0 --clip 0 --augment seed --normalise minmax --crop 32
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
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

LOWEST = {"epochs": 1, "batch_size": 1, "width": 1, "depth": 0, "crop": 0, "clip": 0, "workers": 0, "limit_batches": 1,
          "overfit": 1}  # of the numeric arguments
LOSSES = {"dice": DiceLoss, "bce": nn.BCEWithLogitsLoss, "bce_dice": BCEDiceLoss}

# ----------------------------------------------------------------------------------------------------------- arguments


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a U-Net to segment an organ in MRI.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument_group("data").add_argument
    add("--data", required=True, metavar="DIR", help="imagesTr/ + labelsTr/, images/ + labels/, or the word phantom")
    add("--cache", default="cache", metavar="DIR", help="where preprocessed scans are kept")
    add("--label", type=int, nargs="+", metavar="N", help="label values that are foreground; None: all but 0")
    add("--axis", type=int, choices=(0, 1, 2), help="slice axis, 2: axial; None: that of the coarsest spacing")
    add("--folds", type=int, default=5, metavar="N", help="parts to split the scans into")
    add("--fold", default="0", metavar="K", help="the part to validate on, from 0; `all`: train on every scan")
    add("--normalise", default="percentile", choices=("zscore", "percentile", "minmax"), help="of each scan")
    add("--crop", type=int, default=0, metavar="N", help="pixels to cut off each border of a slice")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="training slices, padded or cropped; None: the largest")
    add("--augment", default="full", choices=("none", "seed", "full"), help="see data.py")

    add = parser.add_argument_group("network").add_argument
    add("--width", type=int, default=32, metavar="N", help="channels of the first level")
    add("--depth", type=int, default=3, metavar="N", help="poolings")
    add("--norm", default="batch", choices=("none", "batch", "instance"), help="normalisation layers")

    add = parser.add_argument_group("optimisation").add_argument
    add("--loss", default="bce_dice", choices=tuple(LOSSES), help="training loss")
    add("--epochs", type=int, default=30, metavar="N", help="passes over the training slices")
    add("--batch-size", type=int, default=16, metavar="N", help="slices per step")
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
    add("--compile", action="store_true", help="torch.compile the network")
    add("--limit-batches", type=int, metavar="N", help="at most N batches and N validation scans an epoch: a dry run")
    add("--overfit", type=int, metavar="N", help="train and validate on the same N slices: can it learn at all?")

    args = parser.parse_args(argv)
    for flag, lowest in LOWEST.items():
        value = getattr(args, flag)
        if value is not None and value < lowest:
            parser.error(f"--{flag.replace('_', '-')} {value}: expected at least {lowest}")
    if args.fold != "all" and not args.fold.isdecimal():
        parser.error(f"--fold {args.fold}: expected a number from 0, or all")
    if args.resume and not args.out:
        parser.error("--resume: say which run, with --out")
    args.out = args.out or time.strftime("runs/%Y%m%d-%H%M%S")
    args.workers = min(4, max((os.cpu_count() or 1) - 1, 1)) if args.workers is None else args.workers
    return args


# ------------------------------------------------------------------------------------------------------ pieces of a run


def lr_at(step: int, total: int, peak: float, schedule: str = "onecycle") -> float:
    """Learning rate of a step, from 0: up in a line over the first fifth of the run, then down in a cosine towards 0.

    Smith, Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates", 2018.
    """
    if schedule == "constant":
        return peak
    warmup = max(total // 5, 1)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


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
    target = [None, *((spacing[2], spacing[1]), (spacing[2], spacing[0]), (spacing[1], spacing[0]))[axis]]
    recipe = {"axis": axis, "label": args.label, "spacing": target, "crop": args.crop, "normalise": args.normalise}
    scans = {scan.name: scan for scan in data.cache_scans(pairs, recipe, cache)}
    if not any(sum(scan.foreground) for scan in scans.values()):
        raise DataError(f"{root}: no label file holds foreground (--label {args.label}); there is nothing to learn")
    train, val = ([scans[name] for name in split[part]] for part in ("train", "val"))
    if args.overfit:  # the slice with the most foreground of each of N scans
        fullest = [replace(scan, slices=(int(np.argmax(scan.foreground)),)) for scan in train]
        train = val = sorted(fullest, key=lambda scan: -max(scan.foreground))[: args.overfit]
        train = train * max(1, 32 * args.batch_size // len(train))  # so that an epoch has about 32 steps
    multiple = 2**args.depth
    shapes = np.array([np.load(scan.image, mmap_mode="r").shape[1:] for scan in train])
    size = args.size or (-(-shapes.max(axis=0) // multiple) * multiple).tolist()
    return train, val, split, recipe | {"size": size}


def evaluate(
    net: UNet, scans: Iterable[data.CachedScan], recipe: dict, precision: torch.dtype, batch_size: int
) -> list[dict]:
    """Score each scan in its own space: integer counts over the volume, divided once.

    Returns:
        One row per scan: name, dice (an empty mask predicted empty is 1), truth and prediction (foreground voxels),
        voxels, and `panel`: image, truth and probability (H, W) of the slice with the most foreground.
    """
    rows = []
    for scan in scans:
        slices = list(scan.slices)
        image, mask, truth = (np.load(path, mmap_mode="r")[slices] for path in (scan.image, scan.mask, scan.truth))
        probability = predict_volume(net, image, size=recipe["size"], precision=precision, batch_size=batch_size)
        prediction, truth = data.undo_preprocess(probability, truth.shape, recipe) > 0.5, truth.astype(bool)
        overlap, predicted, true = (int(np.count_nonzero(m)) for m in (prediction & truth, prediction, truth))
        fullest = int(mask.sum(axis=(1, 2)).argmax())
        rows.append(
            {
                "name": scan.name,
                "dice": 2 * overlap / (predicted + true) if predicted + true else 1.0,
                "truth": true,
                "prediction": predicted,
                "voxels": truth.size,
                "panel": (image[fullest].astype(np.float32), mask[fullest], probability[fullest]),
            }
        )
    return rows


def panels(rows: Sequence[dict]):
    """Scan, truth, prediction and error of the fullest slice of the first four validation scans."""
    shown = [row["panel"] for row in rows[:4]]
    size = np.max([image.shape for image, _, _ in shown], axis=0)
    images, truths, probabilities = (
        np.stack([data.fit(array, size) for array in arrays]) for arrays in zip(*shown, strict=True)
    )
    titles = [f"{row['name']}  Dice {row['dice']:.3f}" for row in rows[:4]]
    return visualize.compare(images, truths, probabilities, titles)


def write_log(log: Sequence[dict], out: Path, writer: SummaryWriter) -> None:
    """log.csv, the whole of it each epoch, so that after a resume no row stands twice; the last row to TensorBoard."""
    text = io.StringIO()
    table = csv.DictWriter(text, fieldnames=list(log[-1]))
    table.writeheader()
    table.writerows(log)
    data.write_atomically(out / "log.csv", lambda file: file.write(text.getvalue().encode()))
    for name, value in log[-1].items():
        writer.add_scalar(name, value, log[-1]["epoch"])
    writer.flush()


def write_json(content, file) -> None:
    file.write(json.dumps(content, indent=1).encode())


def bar(batches: Iterable, title: str, steps: int, batch_size: int) -> Iterable:
    """A progress bar in slices per second, quiet where the output is no terminal."""
    with tqdm(total=steps * batch_size, desc=title, unit=" slices", leave=False, disable=None) as shown:
        for batch in batches:
            yield batch
            shown.update(batch_size)


def training_summary(losses: torch.Tensor, norms: torch.Tensor) -> dict[str, float]:
    """Means over the steps of an epoch that were taken, and the number of those that were not: non-finite gradients."""
    taken = torch.isfinite(norms)
    return {
        "train_loss": losses[taken].mean().item(),
        "grad_norm": norms[taken].mean().item(),
        "skipped": int((~taken).sum()),
    }


def validation_summary(rows: Sequence[dict]) -> dict[str, float]:
    """Dice over the scans, each counting the same; the share of the voxels that is organ, and that was called organ."""
    dice = np.array([row["dice"] for row in rows] or [math.nan])
    voxels = sum(row["voxels"] for row in rows) or math.nan
    return {
        "dice_mean": float(dice.mean()),
        "dice_std": float(dice.std()),
        "dice_worst": float(dice.min()),
        "foreground_truth": sum(row["truth"] for row in rows) / voxels,
        "foreground_prediction": sum(row["prediction"] for row in rows) / voxels,
    }


def describe(row: dict[str, float], epochs: int) -> str:
    """An epoch in a line."""
    line = f"epoch {row['epoch'] + 1:3}/{epochs}  loss {row['train_loss']:.4f}"
    if not math.isnan(row["dice_mean"]):
        line += f"  Dice {row['dice_mean']:.4f} ± {row['dice_std']:.4f} worst {row['dice_worst']:.4f}"
        line += f"  foreground {row['foreground_prediction']:.2%} of {row['foreground_truth']:.2%}"
    line += f"  lr {row['lr']:.1e}  {row['seconds']:.0f} s  {row['slices_per_second']:.1f} slices/s"
    line += f"  {row['waiting']:.1%} waiting"
    return line + (f"  {row['skipped']} non-finite steps skipped" if row["skipped"] else "")


def closing(result: dict, args: argparse.Namespace) -> str:
    """What a run reached, where it lies, and the command to type next."""
    lines = [""]
    if result["scans"]:
        dice = np.sort(list(result["scans"].values()))
        lines += [f"  {name:24} {dice:.4f}" for name, dice in result["scans"].items()]
        lines += [f"Dice {dice.mean():.4f} ± {dice.std():.4f} over {len(dice)} scans, worst {dice.min():.4f}; "
                  f"last epoch (the best, chosen on these scans: {result['best']:.4f})"]
    source = str(Path(args.cache) / "phantom") if args.data == "phantom" else args.data
    command = ["python", "predict.py", source, "--checkpoint", result["checkpoint"], "--out", f"{result['out']}/masks"]
    lines += [f"{result['seconds'] / 60:.1f} minutes; weights, log.csv, curves.png, validation.png in {result['out']}",
              f"next: {shlex.join(command)}"]
    return "\n".join(lines)


# Arguments that a resumed run may change: they say where and how it runs, not what comes out.
FREE = {"out", "resume", "logs", "cache", "data", "device", "workers", "compile", "epochs"}


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


# ----------------------------------------------------------------------------------------------------------- the loop


def train(args: argparse.Namespace) -> dict:
    """Train, and say how well the network of the last epoch does.

    The comments on the right name the Lightning hook, method or argument that does the same there.

    Returns:
        dice: mean over the validation scans after the last epoch (None without validation), not the best epoch's,
            which was chosen on the very same scans;
        scans: Dice by scan name; best: the best epoch's mean; checkpoint: path of last.pt; out: the run folder;
        seconds: wall time of the call.

    Raises:
        DataError: input that cannot be trained on, in one line.
    """
    started, out = time.perf_counter(), Path(args.out)

    torch.manual_seed(args.seed)                                                        # seed_everything
    print(f"seed       {args.seed}")

    device = pick_device(args.device)                                                   # Trainer(accelerator=)
    precision = pick_precision(args.precision, device)                                  # Trainer(precision=)
    autocast = partial(torch.autocast, device.type, precision, enabled=precision != torch.float32)
    torch.backends.cudnn.benchmark = True                                               # Trainer(benchmark=)
    keep_freed_memory()
    print(f"device     {device}, {str(precision).removeprefix('torch.')}")

    saved = find_checkpoint(args, device)
    train_scans, val_scans, split, recipe = load_data(args)                             # DataModule.setup
    if saved and saved["split"] != split:
        raise DataError(f"{args.data}: holds other scans than the run in {out} was started with; choose another --out")
    val_scans = val_scans[: args.limit_batches]
    size = recipe["size"]
    train_set = data.SliceDataset(train_scans, size, augment="none" if args.overfit else args.augment, seed=args.seed)
    sampler = DistributedSampler(train_set, num_replicas=1, rank=0, seed=args.seed)     # order: (seed, epoch) alone
    loader = DataLoader(                                                                # train_dataloader
        train_set, args.batch_size, sampler=sampler, num_workers=args.workers, persistent_workers=args.workers > 0,
        pin_memory=device.type == "cuda",
    )
    print(f"data       {len(split['train'])} scans to train on, {len(val_scans)} to validate on; "
          f"{len(train_set)} slices of {size[0]} x {size[1]}, {args.workers} workers")

    network = {"in_channels": 1, "out_channels": 1, "dims": 2, "width": args.width, "depth": args.depth,
               "norm": args.norm, "attention": False}
    net = UNet(**network).to(device, memory_format=torch.channels_last)                 # configure_model
    forward = torch.compile(net) if args.compile else net  # `net` keeps the plain names for the checkpoint
    print(f"network    U-Net, width {args.width}, depth {args.depth}, norm {args.norm}: "
          f"{sum(p.numel() for p in net.parameters()):,} parameters")

    loss_function = LOSSES[args.loss]()
    # Fused: a step is one kernel, which can leave the weights alone without the host waiting for the GPU to decide.
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(net.parameters(), args.lr, weight_decay=args.weight_decay, fused=fused)
    #                                                                                   # configure_optimizers
    # float16 needs the scale. The others keep a scale of 1, for the scaler's other service: it skips non-finite steps.
    scaling = {} if precision == torch.float16 else {"init_scale": 1.0, "growth_interval": 2**31 - 1}
    scaler = torch.amp.GradScaler(device.type, enabled=fused, **scaling)
    steps = min(len(loader), args.limit_batches or len(loader))
    print(f"optimiser  AdamW, {args.schedule} to {args.lr:g}, {args.epochs} epochs of {steps} steps")

    first, log, best = 0, [], math.nan
    if saved:                                                                           # on_load_checkpoint
        net.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["rng"].cpu())
        first, log, best = saved["epoch"] + 1, saved["log"], saved["best"]
    for name, content in (("args.json", vars(args)), ("split.json", split)):
        data.write_atomically(out / name, partial(write_json, content))
    writer = SummaryWriter(Path(args.logs) / out.name, purge_step=first)                # Trainer(logger=)
    print(f"run        {out}, {f'goes on after epoch {first}' if first else 'new'}; tensorboard --logdir {args.logs}")

    for epoch in range(first, args.epochs):                                             # Trainer.fit

        # -- train ---------------------------------------------------------------------- on_train_epoch_start
        sampler.set_epoch(epoch)
        train_set.set_epoch(epoch)
        net.train()
        losses, norms, waited, begun = [], [], 0.0, time.perf_counter()
        ready = begun
        for i, (image, mask) in enumerate(bar(loader, f"epoch {epoch + 1}/{args.epochs}", steps, args.batch_size)):
            waited += time.perf_counter() - ready
            image = image.to(device, memory_format=torch.channels_last, non_blocking=True)
            mask = mask.to(device, non_blocking=True)                                   # transfer_batch_to_device
            lr = lr_at(epoch * steps + i, args.epochs * steps, args.lr, args.schedule)  # lr_scheduler_step
            for group in optimizer.param_groups:
                group["lr"] = lr
            with autocast():                                                            # training_step
                logits = forward(image)
            loss = loss_function(logits.float(), mask)  # in float32, outside autocast
            optimizer.zero_grad()                                                       # optimizer_zero_grad
            scaler.scale(loss).backward()                                               # backward
            scaler.unscale_(optimizer)                                                  # on_before_optimizer_step
            norm = nn.utils.clip_grad_norm_(net.parameters(), args.clip or math.inf)    # configure_gradient_clipping
            scaler.step(optimizer)                                                      # optimizer_step
            scaler.update()
            losses.append(loss.detach())  # stays on the device: read once an epoch     # on_train_batch_end
            norms.append(norm)
            if i + 1 == steps:
                break
            ready = time.perf_counter()
        losses, norms = torch.stack(losses).cpu(), torch.stack(norms).cpu()             # on_train_epoch_end
        seconds = time.perf_counter() - begun

        # -- evaluate ------------------------------------------------------------------- validation_step
        rows = evaluate(net, val_scans, recipe, precision, args.batch_size)

        # -- log ------------------------------------------------------------------------ log, log_dict
        log.append({"epoch": epoch, **training_summary(losses, norms), **validation_summary(rows), "lr": lr,
                    "seconds": seconds, "slices_per_second": len(losses) * args.batch_size / seconds,
                    "waiting": waited / seconds})
        write_log(log, out, writer)
        if rows:
            figure = panels(rows)
            visualize.save(figure, out / "validation.png")
            writer.add_image("validation", visualize.rgb(figure), epoch, dataformats="HWC")
        print(describe(log[-1], args.epochs), flush=True)

        # -- save ----------------------------------------------------------------------- on_save_checkpoint
        improved = not best >= log[-1]["dice_mean"]  # nan, without validation, counts as better
        best = log[-1]["dice_mean"] if improved else best
        checkpoint = {"version": VERSION, "model": net.state_dict(), "network": network, "preprocess": recipe,
                      "split": split, "epoch": epoch, "step": (epoch + 1) * steps, "best": best, "log": log,
                      "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                      "rng": torch.get_rng_state(), "args": vars(args)}
        for name in ("last.pt", "best.pt") if improved else ("last.pt",):               # ModelCheckpoint
            data.write_atomically(out / name, partial(torch.save, checkpoint))

    writer.close()                                                                      # teardown
    visualize.save(visualize.curves(log), out / "curves.png")
    if first >= args.epochs:  # resumed after its end: nothing was left but to look
        rows = evaluate(net, val_scans, recipe, precision, args.batch_size)
    result = {
        "dice": float(np.mean([row["dice"] for row in rows])) if rows else None,
        "scans": {row["name"]: row["dice"] for row in rows},
        "best": best if rows else None,
        "checkpoint": str(out / "last.pt"),
        "out": str(out),
        "seconds": time.perf_counter() - started,
    }
    print(closing(result, args))
    return result


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
    try:
        train(args)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print(f"out of GPU memory; lower --batch-size {args.batch_size} or --size", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command with --out {args.out} --resume goes on from the last epoch that "
              "was saved", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
