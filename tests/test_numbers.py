"""Numbers that are not finite: the step is left out and counted, training goes on; a hopeless run ends unsaved."""

import math
import warnings

import pytest
import torch

import data
import predict
import train

LIGHTNING = pytest.param("lightning", marks=pytest.mark.filterwarnings("ignore"))
# 14 steps of 4 slices an epoch, in the order of seed 0; instance norm keeps no statistics.
RUN = ["--steps", "14", "--batch-size", "4", "--epochs", "2", "--augment", "none", "--norm", "instance"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # which `main` sets


def poison(monkeypatch, value, bad):
    """The slices of which `bad(index, epoch)` is true hold a voxel of this value."""

    class Poisoned(data.SliceDataset):
        def __getitem__(self, index):
            image, mask = super().__getitem__(index)
            if bad(index, int(self.epoch)):
                image[0, 5, 5] = value
            return image, mask

    monkeypatch.setattr(data, "SliceDataset", Poisoned)


def bad_batches(run, bad, epoch):
    """How many batches of an epoch hold a bad slice."""
    run.loader.sampler.set_epoch(epoch)
    batches = list(run.loader.batch_sampler)[: run.args.steps]
    return sum(any(bad(index, epoch) for index in batch) for batch in batches), len(batches)


def is_finite(state):
    return all(torch.isfinite(value).all() for value in state.values())


@pytest.mark.parametrize("engine", ["loop", LIGHTNING])
@pytest.mark.parametrize(("fused", "value", "precision"), [
    (True, math.nan, "fp32"), (False, math.nan, "fp32"), (True, math.inf, "bf16"),
])
def test_a_bad_batch_is_left_out_and_counted(quick, tmp_path, monkeypatch, engine, fused, value, precision):
    """Also by an optimiser that is not fused, as on a Mac's GPU. Of the moments' steps, too, none is of a bad batch."""
    if engine == "lightning":
        pytest.importorskip("lightning")

    def bad(index, _):
        return index % 16 == 3

    poison(monkeypatch, value, bad)
    monkeypatch.setattr(train, "has_fused", lambda device: fused)
    arguments = [*quick, *RUN, "--engine", engine, "--precision", precision]
    prepared = train.prepare(train.parse_args([*arguments, "--out", str(tmp_path / "prepared")]))
    assert bool(prepared.optimizer.defaults["fused"]) == fused
    end = train.train(train.parse_args(arguments))
    counted = [bad_batches(prepared, bad, epoch) for epoch in (0, 1)]
    assert [row["train/skipped"] for row in end["log"]] == [skipped for skipped, _ in counted] and 0 < counted[0][0] < 7
    assert is_finite(end["model"]) and all(math.isfinite(row["train/grad_norm"]) for row in end["log"])
    assert end["log"][1]["train/loss"] < end["log"][0]["train/loss"] < 2
    optimizer = end["optimizer"] if engine == "loop" else end["optimizer_states"][0]
    taken = sum(batches - skipped for skipped, batches in counted)
    assert {float(state["step"]) for state in optimizer["state"].values()} == {taken}


@pytest.mark.filterwarnings("ignore")
def test_the_engines_stay_twins_over_bad_batches(quick, tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    poison(monkeypatch, math.nan, lambda index, _: index % 16 == 3)
    ends = [train.train(train.parse_args([*quick, *RUN, "--engine", engine, "--out", str(tmp_path / engine)]))
            for engine in ("loop", "lightning")]
    for name in ("train/loss", "train/skipped", "train/grad_norm", "val/dice"):
        assert [row[name] for row in ends[0]["log"]] == [row[name] for row in ends[1]["log"]]
    assert all(torch.equal(ends[0]["model"][key], ends[1]["model"][key]) for key in ends[0]["model"])
    assert ends[0]["log"][0]["train/skipped"] > 0


@pytest.mark.parametrize("engine", ["loop", LIGHTNING])
@pytest.mark.parametrize(("norm", "share"), [("instance", 1), ("batch", 16)])
def test_a_hopeless_run_ends_in_one_line_and_saves_nothing(quick, tmp_path, monkeypatch, capsys, engine, norm, share):
    """Most steps of the second epoch skipped, or one bad batch in the statistics of batch norm: the first is kept."""
    if engine == "lightning":
        pytest.importorskip("lightning")
    poison(monkeypatch, math.nan, lambda index, epoch: epoch == 1 and index % share == 0)
    assert train.main([*quick, *RUN, "--norm", norm, "--engine", engine]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("train.py: epoch 2: ") and "--lr" in error and "--precision fp32" in error
    for name in ("last.pt", "best.pt"):
        checkpoint = predict.load_checkpoint(tmp_path / "run" / name)
        assert len(checkpoint["log"]) == 1 and is_finite(checkpoint["model"])
    assert (tmp_path / "run" / "log.csv").read_text().count("\n") == 2


def test_a_run_that_diverges_ends_in_one_line(quick, tmp_path, capsys):
    job = [*quick, "--lr", "1e6", "--norm", "none", "--clip", "0", "--schedule", "constant"]
    assert train.main(job) == 2 and "epoch 1: " in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*.pt"))
