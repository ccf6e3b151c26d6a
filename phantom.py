"""A synthetic cardiac-MRI data set: torsos with a heart of four chambers and its vessels, the left atrium labelled.

It lets every command and test of the project run with no data at hand. It is no simulation of MR physics, and no score
on it says anything about patients. What it keeps of a real scan is what makes the task one of place and shape: all
blood is about equally bright, the walls between the pools are about a voxel thick, and size, pose, contrast, spacing
and stored orientation differ from scan to scan.

    Gudbjartsson, Patz, "The Rician Distribution of Noisy MRI Data", Magn. Reson. Med. 34, 1995: the noise
    Antonelli et al., "The Medical Segmentation Decathlon", Nat. Commun. 13, 2022: the layout on disk
    Quilez, "Ellipsoid SDF", iquilezles.org/articles/ellipsoids: the first-order distance to an ellipsoid

Contract: geometry in mm, patient coordinates RAS (x to the right, y to the front, z to the head, as in NIfTI), origin
in the middle of the left atrium. Arrays are (I, J, K) as stored, K the slice axis: image int16, not negative; mask
uint8, 1 = left atrium. About 115 x 95 x 28 voxels of 2.1 x 2.1 x 3.5 mm. Scan k depends on (seed, k, size) alone.

    python phantom.py phantom                          # 8 scans, 3 s on a CPU
    python phantom.py more --scans 20 --test 5         # 20 with a mask, and 5 without in more/imagesTs
    python phantom.py tiny --scans 4 --size 0.5        # an eighth of the voxels, for tests
"""

import argparse
import gzip
import itertools
import json
import os
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.spatial.transform import Rotation

# Where the stored axes point, as signs of RAS; scan k is stored as the (k mod 3)-th. Oblique is LPS, turned.
ORIENTATIONS = {"LPS": (-1, -1, 1), "RAS": (1, 1, 1), "oblique": (-1, -1, 1)}
SUBSLICES = 2  # a scanner averages over the thickness of a slice; so do we, over this many samples


class PhantomError(ValueError):
    """An argument out of range, or a folder that will not do: one line that says what was found, and expected."""


# ------------------------------------------------------------------------------------------------------------ anatomy


def ellipsoid(points: np.ndarray, centre: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Signed distance (N,) in mm of points (3, N) to an ellipsoid, negative inside; exact to first order."""
    scaled = (points - centre) / radii
    norm, slope = np.linalg.norm(scaled, axis=0), np.linalg.norm(scaled / radii, axis=0)
    return norm * (norm - 1) / (slope + 1e-6)  # at the very centre both are 0


def tube(points: np.ndarray, start: np.ndarray, end: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Signed distance (N,) in mm of points (3, N) to a round-ended, tapered tube, negative inside."""
    axis = end - start
    along = np.clip((axis * (points - start)).sum(0) / (axis * axis).sum(), 0, 1)
    return np.linalg.norm(points - start - along * axis, axis=0) - radii[0] - along * (radii[1] - radii[0])


# Painted from top to bottom, later over earlier, the left atrium last. Rows of one structure are united, then coated
# with a wall of muscle, its thickness in mm.
# Lengths and places in mm RAS; an ellipsoid has a centre and three radii, a tube two ends and the radius at each.
ANATOMY = (
    # structure          tissue    wall shape    centre | start    radii | end      radii at both ends
    ("skin and fat",     "fat",    0, ellipsoid, (5, 0, 0),        (126, 97, 600)),
    ("chest wall",       "muscle", 0, ellipsoid, (5, 1, 0),        (116, 88, 600)),
    ("right lung",       "lung",   0, ellipsoid, (62, -4, 5),      (50, 70, 130)),
    ("left lung",        "lung",   0, ellipsoid, (-54, -6, 5),     (51, 70, 130)),
    ("liver",            "liver",  0, ellipsoid, (54, 8, -96),     (60, 66, 54)),
    ("mediastinum",      "soft",   0, ellipsoid, (-2, 30, -14),    (60, 50, 68)),
    ("mediastinum",      "soft",   0, tube,      (6, 26, 0),       (6, 26, 200),    (33, 33)),
    ("mediastinum",      "soft",   0, tube,      (6, -20, -200),   (6, -20, 200),   (24, 24)),
    ("sternum",          "bone",   2, ellipsoid, (5, 81, 0),       (16, 5, 300)),
    ("vertebra",         "bone",   2, ellipsoid, (6, -47, 0),      (19, 15, 600)),
    ("spinal canal",     "canal",  2, tube,      (6, -69, -300),   (6, -69, 300),   (7, 7)),
    ("descending aorta", "blood",  1, tube,      (-20, -38, -300), (-22, -38, 300), (11, 11)),
    ("oesophagus",       "muscle", 0, tube,      (-5, -27, -300),  (0, -27, 300),   (6, 6)),
    ("right ventricle",  "blood",  3, ellipsoid, (0, 50, -28),     (44, 24, 28)),
    ("right ventricle",  "blood",  3, tube,      (-14, 56, -14),   (-18, 42, 30),   (14, 12)), # pulmonary trunk
    ("right ventricle",  "blood",  3, tube,      (-14, 28, 37),    (54, 0, 36),     (10, 7)),  # right pulmonary artery
    ("right ventricle",  "blood",  3, tube,      (-16, 32, 37),    (-54, -8, 39),   (10, 7)),  # left pulmonary artery
    ("left ventricle",   "blood",  9, tube,      (-26, 20, -22),   (-60, 44, -42),  (23, 9)),
    ("ascending aorta",  "blood",  1, tube,      (2, 34, -8),      (14, 36, 80),    (14, 14)),
    ("right atrium",     "blood",  2, ellipsoid, (46, 24, -10),    (21, 26, 29)),
    ("right atrium",     "blood",  2, tube,      (42, 20, 10),     (38, 18, 90),    (10, 9)),  # superior vena cava
    ("right atrium",     "blood",  2, tube,      (40, 8, -30),     (34, -4, -95),   (11, 12)), # inferior vena cava
    ("left atrium",      "blood",  2, ellipsoid, (0, 0, 0),        (32, 20, 24)),              # body
    ("left atrium",      "blood",  2, tube,      (-22, 6, 6),      (-44, 18, 10),   (10, 6)),  # appendage
    ("left atrium",      "blood",  2, tube,      (20, -2, 12),     (72, 4, 28),     (9, 4)),   # right superior vein
    ("left atrium",      "blood",  2, tube,      (20, -7, -8),     (68, -28, -18),  (9, 4)),   # right inferior
    ("left atrium",      "blood",  2, tube,      (-20, -4, 13),    (-68, 0, 30),    (9, 4)),   # left superior
    ("left atrium",      "blood",  2, tube,      (-20, -8, -6),    (-64, -30, -15), (8, 4)),   # left inferior
)
BRIGHTNESS = {"blood": 0.85, "fat": 0.85, "soft": 0.52, "bone": 0.46, "liver": 0.42, "muscle": 0.28, "canal": 0.12,
              "lung": 0.08}  # air is 0

# ----------------------------------------------------------------------------------------------------------- one scan


def waves(rng: np.random.Generator, points: np.ndarray, wavelength: float) -> np.ndarray:
    """A smooth random field (N,) of variance 1 at points (3, N): four plane waves, their length in mm."""
    draws = [(rng.normal(size=3), np.float32(rng.uniform(0, 2 * np.pi))) for _ in range(4)]  # direction, phase
    fields = (np.sin(np.float32(d * (2 * np.pi / wavelength / np.linalg.norm(d))) @ points + p) for d, p in draws)
    return sum(fields) / np.float32(np.sqrt(2))


def paint(rng: np.random.Generator, points: np.ndarray, edge: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw one patient's ANATOMY, every number of it varied a little, at points (3, N) in mm RAS.

    Returns the brightness (N,), 0 in air and about 0.85 in blood, and the share (N,) of each point that the left atrium
    takes. A border is a ramp of `edge` mm across the surface: the partial volume of a voxel of that width.
    """

    def vary(numbers):
        return np.float32(np.array(numbers) * rng.uniform(0.95, 1.05) + rng.uniform(-1.5, 1.5, len(numbers)))[:, None]

    def share(distance):
        return np.clip(0.5 - distance / np.float32(edge), 0, 1)

    brightness = {tissue: value * rng.uniform(0.88, 1.12) for tissue, value in BRIGHTNESS.items()}
    image = np.zeros(points.shape[1], np.float32)
    for (_, tissue, wall), rows in itertools.groupby(ANATOMY, key=lambda row: row[:3]):
        distances = [shape(points, *map(vary, numbers)) for _, _, _, shape, *numbers in rows]
        distance = np.minimum.reduce(distances)
        if wall:
            image += share(distance - wall) * (brightness["muscle"] - image)
        # Pools of blood differ a little; the bias field makes them differ more.
        image += share(distance) * (rng.uniform(0.95, 1.05) * brightness[tissue] - image)
    # The distances are now those of the left atrium: body, appendage, veins. A vein counts up to 9 mm from the body.
    return image, share(np.minimum(distances[1], np.maximum(distance, distances[0] - 9)))


def make_scan(rng: np.random.Generator, orientation: str = "LPS", size: float = 1.0) -> tuple:
    """One phantom scan; the same rng state gives the same patient, whatever the orientation and the size.

    Args:
        rng: source of all randomness.
        orientation: one of ORIENTATIONS: where the stored axes point, oblique being LPS turned 10 to 20 degrees
            about x and about z.
        size: scales the matrix along each axis, say 0.5 to 2, and leaves the field of view as it is.

    Returns:
        image (I, J, K) int16; mask (I, J, K) uint8, 1 where at least half the voxel is left atrium; spacing (I, J, K)
        in mm; affine (4, 4) float64 from voxel index to mm RAS.

    Raises:
        KeyError: another orientation.
    """
    # Where the scan samples the patient. What is random is drawn alike for every orientation and size.
    shape = np.array([rng.integers(108, 121), rng.integers(88, 101), rng.integers(25, 32)])
    in_plane, between_slices = rng.uniform((1.95, 3.2), (2.25, 3.8))
    centre = rng.uniform((-6, 0, -12), (6, 12, 0))
    tilt = Rotation.from_euler("xz", rng.uniform(10, 20, 2) * rng.choice((-1, 1), 2), degrees=True)
    field_of_view, shape = shape * (in_plane, in_plane, between_slices), np.round(shape * size).astype(int)
    spacing = field_of_view / shape
    turn = tilt.as_matrix().round(15) if orientation == "oblique" else np.eye(3)  # rounded: what should be 0, is
    axes = turn @ np.diag(ORIENTATIONS[orientation]) * spacing
    affine = nib.affines.from_matvec(axes, centre - axes @ (shape - 1) / 2)
    index = np.indices((*shape[:2], shape[2] * SUBSLICES), np.float32).reshape(3, -1)
    index[2] = (index[2] + 0.5) / SUBSLICES - 0.5
    world = np.float32(axes) @ index + np.float32(affine[:3, 3:])

    # The patient's pose and build, then a warp that leaves no surface a perfect ellipsoid.
    pose = Rotation.from_euler("xyz", rng.uniform((-5, -5, -8), (5, 5, 8)), degrees=True).as_matrix()
    points = np.float32(np.linalg.inv(pose * rng.uniform(0.92, 1.08, 3))) @ world
    points += [2 * waves(rng, points, 90) + 0.8 * waves(rng, points, 40) for _ in range(3)]

    image, atrium = paint(rng, points, edge=spacing[0])
    image *= np.exp(0.15 * waves(rng, world, 250) + 0.04 * waves(rng, world, 25))  # coil sensitivity, tissue texture
    image, atrium = (fine.reshape(*shape, SUBSLICES).mean(-1) for fine in (image, atrium))
    gain, sigma = rng.uniform(300, 900), rng.uniform(0.03, 0.06)
    image = gain * np.hypot(image + sigma * rng.normal(size=shape), sigma * rng.normal(size=shape))  # Rician
    return np.round(image).astype(np.int16), (atrium >= 0.5).astype(np.uint8), tuple(spacing.tolist()), affine


# ------------------------------------------------------------------------------------------------------- the data set


def write(path: Path, content: bytes) -> None:
    """Write a hidden file beside `path`, then rename it: another run that makes the same data set sees whole files."""
    temporary = path.with_name(f".{os.urandom(8).hex()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_bytes(content)
    temporary.replace(path)


def save(array: np.ndarray, affine: np.ndarray, path: Path) -> None:
    """Write an array (I, J, K) as NIfTI: its own dtype, slope 1, qform and sform in scanner coordinates, mm."""
    nifti = nib.Nifti1Image(array, affine)
    nifti.header["qform_code"] = nifti.header["sform_code"] = 1
    nifti.header.set_xyzt_units("mm")
    write(path, gzip.compress(nifti.to_bytes(), 1, mtime=0))  # without the time: same arguments, same bytes


def write_dataset(out: str | Path, scans: int = 8, seed: int = 0, size: float = 1.0, test: int = 0) -> Path:
    """Write a data set in the Decathlon layout, and return its folder.

    out/imagesTr/la_000.nii.gz ..., out/labelsTr/la_000.nii.gz ..., out/dataset.json; `test` further scans, without
    masks, follow in out/imagesTs and go on with the numbers. The same arguments give the same bytes; what is already
    there stays, so that an interrupted call goes on where it was.

    Raises:
        PhantomError: scans, seed, size or test out of range; a folder that holds anything but this very data set
            (hidden files aside).
        OSError: a folder that cannot be written.
    """
    if not (scans >= 1 and test >= 0 and scans + test <= 1000 and seed >= 0 and 0.5 <= size <= 2):
        raise PhantomError(f"{scans=}, {test=}, {seed=}, {size=}; expected >= 1, >= 0 (1000 in all), >= 0, 0.5 to 2")
    out = Path(out)
    pairs = [{"image": f"./imagesTr/la_{k:03d}.nii.gz", "label": f"./labelsTr/la_{k:03d}.nii.gz"} for k in range(scans)]
    unlabelled = [f"./imagesTs/la_{k:03d}.nii.gz" for k in range(scans, scans + test)]
    text = json.dumps({
        "name": "LeftAtriumPhantom",
        "description": "Synthetic left atrium phantom written by phantom.py; no patient data",
        "modality": {"0": "MRI"}, "labels": {"0": "background", "1": "left atrium"}, "numTraining": scans,
        "training": pairs, "test": unlabelled, "phantom": {"scans": scans, "seed": seed, "size": float(size)},
    }, indent=2).encode() + b"\n"
    # The index comes first: a folder that holds it is ours, and what it lacks is what an interrupted run did not reach.
    index = out / "dataset.json"
    if any(out.glob("[!.]*")) and not (index.is_file() and index.read_bytes() == text):
        raise PhantomError(f"{out} holds something else than these scans of seed {seed}; name an empty folder")
    write(index, text)
    for k, files in enumerate([*(pair.values() for pair in pairs), *([file] for file in unlabelled)]):
        if not all((out / file).is_file() for file in files):
            image, mask, _, affine = make_scan(np.random.default_rng([seed, k]), list(ORIENTATIONS)[k % 3], size)
            for array, file in zip((image, mask), files, strict=False):  # no file, no mask
                save(array, affine, out / file)
    return out


def main(argv: list[str] | None = None) -> None:
    """The command line: write a data set, say where. Arguments that do not work end it with code 2 and one line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", help="folder to write: empty, not there yet, or this very data set")
    parser.add_argument("--scans", type=int, default=8, help="scans with a mask (default: %(default)s)")
    parser.add_argument("--test", type=int, default=0, help="further scans, without one (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds, other patients (default: %(default)s)")
    parser.add_argument("--size", type=float, default=1.0, help="factor on the matrix size (default: %(default)s)")
    if hasattr(sys.stdout, "reconfigure"):  # a name that the terminal cannot print ends nothing
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print("data set in", write_dataset(**vars(parser.parse_args(argv))))
    except (PhantomError, OSError) as error:  # OSError: disk full, no permission
        parser.exit(2, f"phantom.py: {error}\n")


if __name__ == "__main__":
    main()
