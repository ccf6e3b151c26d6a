"""The hand-written loop beside Lightning, and one process beside two: the same losses, the same weights."""

import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import same, weights, without_pictures

import predict
import train

ENGINES = ("loop", "lightning")
VOLUME = ["--dims", "3", "--size", "8", "24", "24", "--batch-size", "2", "--spacing", "6"]
# Three epochs with augmentation, schedule, clipping, validation and 2 workers.
TWIN = ["--epochs", "3", "--augment", "full", "--clip", "0.05", "--workers", "2", "--steps", "5"]
pytestmark = pytest.mark.filterwarnings("ignore")
# A server that has imported train.py and forks: a process starts in milliseconds.
server = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
server.set_forkserver_preload(["train", "lightning", "torch._dynamo"])


def run(*argv):
    return train.train(train.parse_args([*map(str, argv)]))


def for_each_engine(job, folder):
    """A job for the loop and one for Lightning, in run folders of these names."""
    return [[*job, "--engine", engine, "--out", str(folder / engine)] for engine in ENGINES]


def differ(one, other, names=("train/loss", "train/skipped", "train/grad_norm", "train/lr", "val/dice")):
    """What of the weights, the optimiser and the numbers of every epoch two runs do not share, to the bit."""
    ends = one, other = [predict.load_checkpoint(out / "last.pt") for out in (one, other)]
    moments = [(end.get("optimizer") or end["optimizer_states"][0])["state"] for end in ends]
    rows = [name for name in names if [row[name] for row in one["log"]] != [row[name] for row in other["log"]]]
    equal = moments[0] and all(same(state, moments[1][key]) for key, state in moments[0].items())
    return rows + ["weights"] * (not same(one["model"], other["model"])) + ["optimiser"] * (not equal)


def check_validation(out, data, folder):
    """From the files predict.py finds the validation Dice of a run again."""
    job = [data, "--checkpoint", out / "last.pt", "--out", folder, "--labels", data / "labelsTr", "--held-out"]
    rows = predict.predict(predict.parse_args([*map(str, job), "--precision", "fp32", "--device", "cpu"]))
    scans = predict.load_checkpoint(out / "last.pt")["scans"]
    assert {row["name"]: row["dice"] for row in rows} == scans and max(scans.values()) > 0


def rank(number, ports, jobs, shown):
    """Run the jobs one after the other as one process of two, with torchrun's variables."""
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                      MASTER_ADDR="localhost", TORCHELASTIC_RUN_ID="test", TORCHELASTIC_USE_AGENT_STORE="True")
    for stream in (1, 2):
        os.dup2(os.open(shown, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    without_pictures()
    codes = []
    for port, job in zip(ports, jobs, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        codes.append(train.main(job))
    sys.exit(max(codes))


def two_processes(jobs, folder):
    """Two processes share the jobs: the exit code of each, and what it printed.

    They meet at a store that is kept here, as by torchrun, one for each job. Where the first process kept it, the
    second could begin a job at the store of the one before, which then was closed; a free port could become another's.
    """
    stores = [dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) for _ in jobs]
    ports, shown = [store.port for store in stores], [folder / "shown0", folder / "shown1"]
    ranks = [server.Process(target=rank, args=(number, ports, jobs, shown[number])) for number in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
    return [process.exitcode for process in ranks], [path.read_text() for path in shown]


@pytest.mark.parametrize("more", ["", "--norm instance --loss dice --attention", " ".join(VOLUME)])
def test_loop_and_lightning_are_twins_to_the_bit(quick, tmp_path, more):
    for job in for_each_engine([*quick, *TWIN, *more.split()], tmp_path):
        assert len(run(*job)["log"]) == 3
    loop, twin = tmp_path / "loop", tmp_path / "lightning"
    assert not differ(loop, twin) and same(weights(loop / "best.pt"), weights(twin / "best.pt"))
    assert sorted(os.listdir(loop)) == sorted(os.listdir(twin))
    if not more:  # Can this test fail?
        run(*quick, *TWIN, "--clip", 0, "--out", tmp_path / "other")
        assert {"train/loss", "weights"} <= set(differ(loop, tmp_path / "other"))


def test_without_lightning_one_line_says_how_to_install_it(quick, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lightning", None)
    assert train.main([*quick, "--engine", "lightning"]) == 2
    assert "pip install lightning" in capsys.readouterr().err


def test_two_processes_equal_one_and_their_engines_are_twins(quick, tmp_path):
    """The same batch, shared by two: same samples, same Dice over the batch, same logged loss, same weights."""
    common = [*quick, "--norm", "instance", "--steps", "5"]
    one = run(*common, "--out", tmp_path / "one")
    codes, shown = two_processes(for_each_engine(common, tmp_path), tmp_path)
    assert codes == [0, 0] and "epoch" not in shown[1], shown[1]  # the first process speaks for both
    assert not differ(tmp_path / "loop", tmp_path / "lightning")
    two = predict.load_checkpoint(tmp_path / "loop" / "last.pt")
    for a, b in zip(one["log"], two["log"], strict=True):
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-3)
        assert b["train/grad_norm"] == pytest.approx(a["train/grad_norm"], rel=1e-2)
        assert b["val/foreground_truth"] == a["val/foreground_truth"]
    # Adam divides by the gradient's size: where that is near 0, rounding grows to a share of the learning rate, 4e-3.
    apart = torch.cat([(one["model"][name] - two["model"][name]).abs().flatten() for name in one["model"]])
    assert apart.mean() < 5e-4 and apart.quantile(0.99) < 2e-3


def test_torchrun_runs_the_real_command(quick, tmp_path):
    """A run of one epoch: the second process is done while the first still writes the checkpoint."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", train.__file__]
    job = subprocess.run([*command, *quick, "--norm", "instance", "--epochs", "1"], capture_output=True, text=True,
                         timeout=300)
    assert job.returncode == 0 and job.stdout.count("epoch  1/1") == 1, job.stderr
    assert len(predict.load_checkpoint(tmp_path / "run" / "last.pt")["scans"]) == 2


@pytest.mark.parametrize("more", [
    "--epochs 4 --lr 2e-2",  # batch norm's running means differ from process to process; those of the first are saved
    "--epochs 1 --lr 2e-2 --folds 6",  # the second has no scan, and used to wait for ever for buffers
])
def test_two_processes_validate_the_network_that_is_saved(quick, phantoms, tmp_path, more):
    codes, shown = two_processes(for_each_engine([*quick, *more.split()], tmp_path), tmp_path)
    assert codes == [0, 0], shown[1]
    assert not differ(tmp_path / "loop", tmp_path / "lightning")
    for engine in ENGINES:
        check_validation(tmp_path / engine, phantoms, tmp_path / "masks")


def test_a_batch_that_cannot_be_shared_is_refused(quick, tmp_path):
    codes, shown = two_processes([[*quick, "--batch-size", "3"]], tmp_path)
    assert codes == [2, 2] and "--batch-size 3" in shown[0] and "Traceback" not in shown[1]
