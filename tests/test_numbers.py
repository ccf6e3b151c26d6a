"""Numbers that are not finite: the step is left out and counted, training goes on; a hopeless run ends unsaved."""

import math

import pytest
import torch
from test_twins import ENGINES, differ, for_each_engine, run

import data
import predict
import train

# 14 steps of 4 slices an epoch, in the order of seed 0; instance norm keeps no statistics.
RUN = ["--steps", "14", "--batch-size", "4", "--epochs", "2", "--augment", "none", "--norm", "instance"]
pytestmark = pytest.mark.filterwarnings("ignore")


def poison(monkeypatch, value, bad):
    """The slices of which `bad(index, epoch)` is true hold a voxel of this value."""

    class Poisoned(data.SliceDataset):
        def __getitem__(self, index):
            image, mask = super().__getitem__(index)
            if bad(index, int(self.epoch)):
                image[0, 5, 5] = value
            return image, mask

    monkeypatch.setattr(data, "SliceDataset", Poisoned)


def is_finite(state):
    return all(torch.isfinite(value).all() for value in state.values())


@pytest.mark.parametrize(("fused", "value", "precision"), [
    (True, math.nan, "fp32"), (False, math.nan, "fp32"), (True, math.inf, "bf16"),
])
def test_a_bad_batch_is_left_out_and_counted_by_both_engines(quick, tmp_path, monkeypatch, fused, value, precision):
    """Also by an optimiser that is not fused, as on a Mac's GPU. Of the moments' steps, too, none is of a bad batch.

    Outside float16 the loss has no scale; each step left out used to halve it, until gradients vanished."""
    def bad(index, _=None):
        return index % 16 == 3

    poison(monkeypatch, value, bad)
    plain = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *parts, **how: plain(*parts, **how | {"fused": fused}))
    job, skipped = [*quick, *RUN, "--precision", precision], []
    prepared = train.prepare(train.parse_args([*job, "--out", str(tmp_path / "prepared")]))
    assert bool(prepared.optimizer.defaults["fused"]) == fused
    for epoch in (0, 1):
        prepared.loader.sampler.set_epoch(epoch)
        skipped.append(sum(any(map(bad, batch)) for batch in list(prepared.loader.batch_sampler)[:14]))
    assert 0 < skipped[0] < 7

    loop, twin = (run(*job) for job in for_each_engine(job, tmp_path))
    assert not differ(tmp_path / "loop", tmp_path / "lightning")
    assert [row["train/skipped"] for row in loop["log"]] == skipped
    assert is_finite(loop["model"]) and all(math.isfinite(row["train/grad_norm"]) for row in loop["log"])
    assert loop["log"][1]["train/loss"] < loop["log"][0]["train/loss"] < 2
    for optimizer in (loop["optimizer"], twin["optimizer_states"][0]):
        assert {float(state["step"]) for state in optimizer["state"].values()} == {28 - sum(skipped)}
    assert loop["scaler"].get("scale") == (1.0 if fused else None)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("norm", "share"), [("instance", 1), ("batch", 16)])
def test_a_hopeless_run_ends_in_one_line_and_saves_nothing(quick, tmp_path, monkeypatch, capsys, engine, norm, share):
    """Most steps of the second epoch skipped, or one bad batch in the statistics of batch norm: the first is kept."""
    poison(monkeypatch, math.nan, lambda index, epoch: epoch == 1 and index % share == 0)
    assert train.main([*quick, *RUN, "--norm", norm, "--engine", engine]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("train.py: epoch 2: ") and "--lr" in error and "--precision fp32" in error
    for name in ("last.pt", "best.pt"):
        checkpoint = predict.load_checkpoint(tmp_path / "run" / name)
        assert len(checkpoint["log"]) == 1 and is_finite(checkpoint["model"])
    assert (tmp_path / "run" / "log.csv").read_text().count("\n") == 2
