"""Numbers that are not finite: the step is skipped, counted and told, training goes on, ten in a row end it."""

import importlib.util
import math

import pytest
import torch

import data
import predict
import train

needs_lightning = pytest.mark.skipif(
    not importlib.util.find_spec("lightning"), reason="pip install -r requirements-dev.txt"
)
# 14 steps of 4 slices, in the order of seed 0
RUN = ["--batch-size", "4", "--epochs", "1", "--augment", "none"]


def poison(monkeypatch, value, bad):
    """The slices of which `bad(index)` is true hold a voxel of this value, or are all scaled by it if it is finite."""

    class Poisoned(data.SliceDataset):
        def __getitem__(self, index):
            image, mask = super().__getitem__(index)
            if bad(index):
                image = image * value if math.isfinite(value) else image.index_fill(1, torch.tensor([0]), value)
            return image, mask

    monkeypatch.setattr(data, "SliceDataset", Poisoned)


def is_finite(state):
    return all(torch.isfinite(value).all() for value in state.values() if torch.is_tensor(value))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ["loop", pytest.param("lightning", marks=needs_lightning)])
@pytest.mark.parametrize(
    ("value", "precision"), [(math.inf, "fp32"), (math.nan, "bf16"), (math.nan, "fp16"), (1e30, "fp16")]
)
def test_a_bad_batch_is_skipped_and_leaves_nothing_behind(
    run_args, tmp_path, monkeypatch, capsys, engine, value, precision
):
    """Batch norm, too: its running statistics were once spoilt by the batch whose step was skipped.

    1e30 is no infinity, but it is one in float16.
    """
    if engine == "lightning" and precision == "fp16":
        pytest.skip("Lightning scales float16 on CUDA only")
    poison(monkeypatch, value, lambda index: index % 8 == 0)
    result = train.train(train.parse_args([*run_args, *RUN, "--engine", engine, "--precision", precision]))
    checkpoint = predict.load_checkpoint(tmp_path / "run" / "last.pt")
    row = checkpoint["log"][0]
    assert 0 < row["skipped"] < 14 and math.isfinite(row["train_loss"]) and math.isfinite(row["grad_norm"])
    assert f"{row['skipped']} non-finite steps skipped" in capsys.readouterr().out
    assert is_finite(checkpoint["model"]) and 0 <= result["dice"] <= 1


def test_a_variance_that_overflows_is_not_kept(run_args, tmp_path, monkeypatch):
    """1e30 squared is inf in float32; divided by it all is 0, so the gradient is finite, and the step is taken."""
    poison(monkeypatch, 1e30, lambda index: index % 8 == 0)
    train.train(train.parse_args([*run_args, *RUN]))
    assert is_finite(predict.load_checkpoint(tmp_path / "run" / "last.pt")["model"])


@needs_lightning
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", ["1", "2"])
def test_the_engines_stay_twins_over_bad_batches(run_args, tmp_path, monkeypatch, accumulate):
    poison(monkeypatch, math.nan, lambda index: index % 8 == 0)
    ends = []
    for engine in ("loop", "lightning"):
        run = [*run_args, *RUN, "--accumulate", accumulate, "--engine", engine, "--out", str(tmp_path / engine)]
        train.train(train.parse_args(run))
        ends.append(predict.load_checkpoint(tmp_path / engine / "last.pt"))
    assert ends[0]["log"][0]["skipped"] == ends[1]["log"][0]["skipped"] > 0
    assert all(torch.equal(ends[0]["model"][key], ends[1]["model"][key]) for key in ends[0]["model"])


def test_a_skipped_step_is_as_if_it_had_never_been(run_args, monkeypatch):
    """Weights, moments, running statistics: the state before the bad batch, to the bit."""
    run = train.prepare(train.parse_args([*run_args, *RUN]))
    optimizer = train.make_optimizer(train.parse_args(run_args), run, fused=True)
    for value in (1, math.nan):
        before = {key: tensor.clone() for key, tensor in run.net.state_dict().items()}
        moments = [{key: tensor.clone() for key, tensor in s.items()} for s in optimizer.state_dict()["state"].values()]
        kept = train.statistics(run.net)
        optimizer.zero_grad()
        (run.net(torch.randn(4, 1, 16, 16)).mean() * value).backward()  # a finite input: only the gradient is bad
        norm = train.clip_gradient(run.net, optimizer, 1)
        optimizer.step()
        train.keep_statistics(run.net, kept, norm)
    assert moments and all(torch.equal(before[key], tensor) for key, tensor in run.net.state_dict().items()
                           if "num_batches" not in key)  # a count that nothing uses
    for old, new in zip(moments, optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ["loop", pytest.param("lightning", marks=needs_lightning)])
def test_ten_bad_steps_in_a_row_end_the_run_with_advice(run_args, tmp_path, monkeypatch, capsys, engine):
    """Epochs of 4 steps: the ten are counted across them. What was saved before is still there."""
    poison(monkeypatch, math.nan, lambda index: True)
    code = train.main([*run_args, *RUN, "--epochs", "9", "--limit-batches", "4", "--engine", engine])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and error.startswith("epoch 3: the gradient was not finite in ten steps in a row")
    assert "lower --lr 0.004" in error and "--precision fp32" in error and "python data.py" in error
    checkpoint = predict.load_checkpoint(tmp_path / "run" / "last.pt")
    assert checkpoint["epoch"] == 1 and is_finite(checkpoint["model"])


def test_nine_in_a_row_do_not(run_args):
    run = train.prepare(train.parse_args(run_args))
    bad, good = torch.full((9,), math.inf), torch.ones(1)
    for norms in (bad, good, bad, good, bad):
        train.check_steps(None, run, 0, norms)
    with pytest.raises(data.DataError, match="ten steps"):
        train.check_steps(train.parse_args(run_args), run, 0, bad[:1])
