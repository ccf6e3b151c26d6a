"""Damaged files: whatever a byte or a field of a header becomes, a file is read whole or refused by a DataError."""

import gzip

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import TINY, checkpoint

import data
import predict

# The largest int16, int32 and int64, the smallest int16; float32 infinity, NaN and the largest; 0.
EXTREME = [bytes.fromhex(digits) for digits in ("ff7f", "ffffff7f", "ffffffffffffff7f", "0080", "0000807f", "0000c07f",
                                                "ffff7f7f", "00000000")]
pytestmark = pytest.mark.filterwarnings("ignore")


def mutate(rng, content, head):
    """One to three changes, most of them in the first `head` bytes: a bit, a cut, an insertion, noise, a number."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        way, end = rng.integers(5), max(len(content), 1)
        where = int(rng.integers(min(end, head) if rng.random() < 0.7 else end))
        if way == 0 and content:
            content[where] ^= 1 << int(rng.integers(8))
        elif way == 1:
            del content[where:]
        elif way < 4:
            content[where : where + 8 * (way - 2)] = rng.bytes(8)
        else:
            number, where = EXTREME[rng.integers(len(EXTREME))], where // 2 * 2
            content[where : where + len(number)] = number
    return bytes(content)


def test_a_damaged_scan_or_label_is_read_whole_or_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(nib.imageglobals.logger, "level", 50)  # it tells of every field that it corrects
    rng, voxels = np.random.default_rng(0), np.random.default_rng(0).integers(0, 2, (5, 4, 3))
    valid = [kind(voxels.astype(dtype), np.diag([1, 2, 3, 1])).to_bytes() for kind in (nib.Nifti1Image, nib.Nifti2Image)
             for dtype in (np.uint8, np.int16, np.float32, np.float64)]
    refused, how = 0, {"spacing": [None, 1, 1], "crop": 0}
    for i in range(900):
        content = mutate(rng, valid[i % 8], 600)
        path = tmp_path / ("a.nii", "a.nii.gz", "b.nii.gz")[i % 3]
        path.write_bytes((content, gzip.compress(content, 1), mutate(rng, gzip.compress(valid[i % 8], 1), 30))[i % 3])
        try:
            scan = data.read_scan(path, i % 3)
            assert np.isfinite(scan.array).all() and scan.restore(scan.array).shape == scan.source.shape
            assert np.isin(data.read_mask(path, scan), (0, 1)).all()
            for kind in ("zscore", "percentile", "minmax"):
                assert np.isfinite(data.preprocess(scan.array, scan.spacing, how | {"normalise": kind})).all()
        except data.DataError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 200 < refused < 800


def test_a_damaged_checkpoint_is_loaded_whole_or_refused(tmp_path):
    """Of 8,000 changed files, 180 ended in an IndexError, TypeError, AttributeError or struct.error."""
    torch.save(checkpoint(TINY | {"norm": "batch"}), path := tmp_path / "last.pt")
    content, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(300):
        path.write_bytes(mutate(rng, content, 3000))  # the pickle comes first
        try:
            predict.load_network(predict.load_checkpoint(path))
        except data.DataError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 75 < refused < 300
