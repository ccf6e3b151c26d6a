"""What the tests share: a small phantom data set, a writer of NIfTI files, and the marks that skip."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # networks of a few thousand parameters: more threads only get in their own way

import nibabel as nib  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import phantom  # noqa: E402


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
def write_nifti():
    def write(path, array, affine=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(np.asarray(array), np.eye(4) if affine is None else affine), path)
        return path

    return write


@pytest.fixture
def run_args(phantoms, tmp_path):
    """Arguments of a tiny run: seconds on one core."""
    folders = ["--cache", str(tmp_path / "cache"), "--logs", str(tmp_path / "logs"), "--out", str(tmp_path / "run")]
    tiny = ["--width", "4", "--depth", "2", "--epochs", "2", "--batch-size", "8", "--folds", "3", "--precision", "fp32"]
    return ["--data", str(phantoms), *folders, *tiny, "--workers", "0", "--device", "cpu"]
