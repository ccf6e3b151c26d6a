"""What one would pick instead: the plain form of a data set and a step, and MONAI's training, raced to a Dice of 0.90.

    python benchmarks/speed.py --rows minutes --data DIR [--minutes 60]

The plain form is what this project began as, and what tutorials write: float32, NCHW, Adam, the loss read in every
step, one file for each slice. In the race both sides train on the same scans of fold 0, on the same cores, with as many
workers, one after the other. Minutes begin with the reading of the scans; those spent on validation are not counted, so
that it is in the precision that is fastest here on either side.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import accuracy
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import data
import metrics
import predict
import train

GOAL = 0.90
MONAI_2D = {"spatial_dims": 2, "in_channels": 1, "out_channels": 1}  # its networks, as its 2D tutorials have them
MONAI_LEVELS = MONAI_2D | {"channels": (16, 32, 64, 128, 256), "strides": (2, 2, 2, 2)}
PRECISION = predict.pick_precision("auto", torch.device("cpu"))  # of MONAI's validation
Side = Iterator[tuple[int, Callable[[], float]]]  # after each step: how many slices it saw, and how to validate


class PlainSlices(Dataset):
    """The data set of the plain form: one .npy of float64 for each slice; imgaug seeded and fed by its own wrapper."""

    def __init__(self, folder: Path, scans: Sequence[data.CachedScan], size: Sequence[int]):
        iaa = data.import_imgaug()
        self.augment = iaa.Sequential([iaa.Affine(scale=(0.85, 1.15), rotate=(-45, 45)), iaa.ElasticTransformation()])
        self.files = []
        for scan in scans:
            image, mask = (data.crop_or_pad(scan.open(kind), size) for kind in ("image", "mask"))
            for d in range(len(image)):
                self.files.append(folder / f"{scan.name}-{d}.npy")
                np.save(self.files[-1], image[d].astype(np.float64))
                np.save(folder / f"{scan.name}-{d}-mask.npy", mask[d])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        import imgaug
        from imgaug.augmentables.segmaps import SegmentationMapsOnImage

        path = self.files[index]
        image, mask = np.load(path).astype(np.float32), np.load(path.with_name(f"{path.stem}-mask.npy"))
        imgaug.seed(torch.randint(0, 1_000_000, (1,)).item())
        image, mask = self.augment(image=image, segmentation_maps=SegmentationMapsOnImage(mask, mask.shape))
        return image[None], mask.get_arr()[None].astype(np.float32)


def plain_step(net: nn.Module, loss_function: nn.Module, lr: float = 1e-4) -> Callable[[Tensor, Tensor], float]:
    """A training step of the plain form, and of MONAI's tutorials."""
    optimizer = torch.optim.Adam(net.parameters(), lr)

    def step(image: Tensor, mask: Tensor) -> float:
        optimizer.zero_grad()
        loss = loss_function(net(image), mask)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def monai_side(s: dict) -> Side:
    """MONAI as its 2D tutorial has it (unet_training_dict.py: 8 crops of 96 x 96 a batch, about organ and background
    by turns; quarter turns; UNet; Adam at 1e-3; a sliding window), but with CacheDataset, which is faster, and with
    DiceCELoss."""
    from monai import data as monai_data
    from monai import transforms as t
    from monai.inferers import SliceInferer
    from monai.losses import DiceCELoss
    from monai.networks.nets import UNet

    pairs, keys = data.find_pairs(s["data"]), ["image", "label"]
    split = data.split_scans([pair.name for pair in pairs], 5, 0)
    files = {part: [{"image": str(pair.image), "label": str(pair.label)} for pair in pairs if pair.name in split[part]]
             for part in split}
    read = [t.LoadImaged(keys), t.EnsureChannelFirstd(keys), t.Orientationd(keys, axcodes="RAS"),
            t.ScaleIntensityd(keys)]
    crop = [t.RandCropByPosNegLabeld(keys, label_key="label", spatial_size=(*s["crop"], 1), pos=1, neg=1,
                                     num_samples=4),
            t.RandRotate90d(keys, prob=0.5, spatial_axes=(0, 1)), t.SqueezeDimd(keys, dim=-1)]
    train_set = monai_data.CacheDataset(files["train"], t.Compose(read + crop), num_workers=4, progress=False)
    val_set = monai_data.CacheDataset(files["val"], t.Compose(read), num_workers=4, progress=False)
    workers = train.parse_args(["--data", ""]).workers
    loader = monai_data.DataLoader(train_set, batch_size=2, shuffle=True, num_workers=workers,  # 4 crops of each scan
                                   persistent_workers=workers > 0)
    net = UNet(**MONAI_LEVELS, num_res_units=2)
    step = plain_step(net, DiceCELoss(sigmoid=True), 1e-3)
    window = SliceInferer(spatial_dim=2, roi_size=s["crop"], sw_batch_size=64)

    @torch.no_grad()
    @torch.autocast("cpu", PRECISION, enabled=PRECISION is not torch.float32)
    def validate() -> float:
        net.eval()
        scores = [metrics.dice((window(scan["image"][None], net)[0] > 0).numpy(), (scan["label"] > 0).numpy())
                  for scan in val_set]
        net.train()
        return float(np.mean(scores))

    while True:
        for batch in loader:
            step(batch["image"].as_tensor(), batch["label"].as_tensor())
            yield len(batch["image"]), validate


def curve(side: Side, every: int, cap: float) -> list[tuple[float, float]]:
    """(minutes, Dice) each time that `every` slices have been seen, until the goal is reached or `cap` minutes are."""
    points, seconds, seen, begun = [], 0.0, 0, time.perf_counter()
    for count, validate in side:
        seconds, seen = seconds + time.perf_counter() - begun, seen + count
        late = seconds > 60 * cap
        if late or seen >= every * (len(points) + 1):
            points.append((seconds / 60, validate()))
            print(f"   {points[-1][0]:6.1f} minutes, Dice {points[-1][1]:.4f}", flush=True)
            if late or points[-1][1] >= GOAL:
                break
        begun = time.perf_counter()
    return points


def our_curve(s: dict, folder: str) -> list[tuple[float, float]]:
    """(minutes, Dice) of each epoch of the short command."""
    begun = time.perf_counter()
    words = [*accuracy.flags(accuracy.arguments("short")), *s["ours"]]
    log = train.train(train.parse_args(["--data", str(s["data"]), "--cache", f"{folder}/arrays", "--out",
                                        f"{folder}/run", "--tensorboard", folder, "--device", "cpu", *words]))["log"]
    epochs = [row["system/seconds"] for row in log]
    # What is neither training nor validation, such as the reading, counts before the first epoch.
    rest = time.perf_counter() - begun - sum(epochs) - sum(row["system/validation_seconds"] for row in log)
    trained = list(itertools.accumulate(epochs, initial=rest))[1:]
    return [(seconds / 60, row["val/dice"]) for seconds, row in zip(trained, log, strict=True)]


def race(s: dict) -> dict[str, list[tuple[float, float]]]:
    """The curves of this project and of MONAI, one after the other, on the CPU. `s`: see speed.py."""
    with tempfile.TemporaryDirectory() as folder:
        ours = our_curve(s, folder)
    return {"ours": ours, "MONAI": curve(monai_side(s), s["every"], s["cap"])}
