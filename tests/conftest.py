"""What the tests share: a small phantom data set, a writer of NIfTI files, and the marks that skip."""

import os
import tracemalloc

os.environ["OMP_NUM_THREADS"] = "1"  # networks of a few thousand parameters: more threads only get in their own way

import nibabel as nib  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import phantom  # noqa: E402
import predict  # noqa: E402
from unet import UNet  # noqa: E402

TINY = {"dims": 2, "width": 2, "depth": 1, "norm": "none", "attention": False, "stem": 1}
HOW = {"axis": 2, "label": None, "spacing": [None, 1.0, 1.0], "crop": 0, "normalise": "zscore", "smooth": 0.0,
       "size": [16, 16]}


def checkpoint(network=TINY, how=HOW, **changes):
    """What train.py keeps of a run."""
    return {"version": predict.VERSION, "model": UNet(**network).state_dict(), "network": network, "preprocess": how,
            "split": {"train": [], "val": []}, "files": {}, "doubt_below": 0.0} | changes


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; pytest --slow runs it"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """Six synthetic scans at half size: a Decathlon folder."""
    return phantom.write_dataset(tmp_path_factory.mktemp("phantoms") / "data", scans=6, seed=1, size=0.5)


@pytest.fixture
def traced():
    """Counts memory from now on; called, it gives the most that was held at once, in bytes."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


@pytest.fixture
def write_nifti():
    def write(path, array, affine=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(np.asarray(array), np.eye(4) if affine is None else affine), path)
        return path

    return write


@pytest.fixture
def run_args(phantoms, tmp_path):
    """Arguments of a tiny run: seconds on one core."""
    folders = ["--cache", str(tmp_path / "cache"), "--tensorboard", str(tmp_path / "logs")]
    folders += ["--out", str(tmp_path / "run")]
    tiny = ["--width", "4", "--depth", "2", "--epochs", "2", "--steps", "7", "--batch-size", "8", "--folds", "3"]
    tiny += ["--dims", "2", "--stem", "2", "--precision", "fp32"]
    return ["--data", str(phantoms), *folders, *tiny, "--workers", "0", "--device", "cpu"]


def weights(path):
    """The network's tensors in a checkpoint."""
    return torch.load(path, weights_only=True)["model"]


def same(one, other):
    """Two state dicts are equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def without_pictures(set_attribute=setattr):
    """Pictures take a second an epoch; only the test that looks for them draws them."""
    import train
    import visualize

    pixels = np.zeros((2, 2, 3), np.uint8)
    for module, name in ((train, "draw_panels"), (visualize, "curves"), (visualize, "save"), (visualize, "rgb")):
        set_attribute(module, name, lambda *_: pixels)


@pytest.fixture
def quick(run_args, phantoms, monkeypatch):
    """Arguments of a run of two epochs of four steps, with a common cache and without pictures: half a second."""
    without_pictures(monkeypatch.setattr)
    return [*run_args, "--cache", str(phantoms.parent / "cache"), "--steps", "4"]
