"""Tests of cps.py: each formula against a plain second implementation, whole runs, bad input, and
the fifteen traps that a toy version of this method falls into (`test_trap_01_...` to 15).

The banners are those of cps.py: grep -n '^# [0-9]' test_cps.py

    python -m pytest -q test_cps.py
"""

import csv
import dataclasses
import functools
import gzip
import io
import itertools
import json
import math
import os
import pathlib
import pickle
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import types
from contextlib import closing, nullcontext, suppress

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage, spatial
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_leaves

import cps

torch.set_num_threads(1)  # networks this small gain nothing from two, and wait long on a busy CPU
IDS = [1, 5]  # label ids of the test data: not 1, 2, so that a class taken for an id shows
SHAPE = (16, 14, 10)
PATCH = (8, 8, 8)
MM = (1.0, 2.0, 3.0)
TINY = {
    "patch": PATCH,
    "levels": 2,
    "base_channels": 4,
    "epochs": 2,
    "epoch_steps": 3,
    "lr": 0.05,
    "momentum": 0.9,
    "validate_epochs": 1,
    "val": 2.0,
    "labelled": 2,
    "device": "cpu",
    "data": "data",
    "out": "run",
    "cache": "cache",
}
STILL = {"intensity": 0.0, "spatial": 0.0}  # no augmentation


# Helpers
# --------------------------------------------------------------------------------------------------
COSTS = functools.cache(cps.costs)
PARSER = functools.cache(cps.build_parser)  # reads the source: 0.2 s for each call of `main`


def costs_once(config, classes, gpu=False):
    """cps.costs, asked once for each network and batch: it would take a third of the suite."""
    names = ("patch", "batch", "method", "pseudo_loss", "base_channels", "levels", "amp")
    return COSTS(cps.Config(**{name: getattr(config, name) for name in names}), classes, gpu)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Work in an empty folder, draw no figures, warn anew, give back the signals of `train`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if not installed: saves time
    monkeypatch.setattr(cps, "costs", costs_once)
    monkeypatch.setattr(cps, "build_parser", PARSER)
    cps.warn.cache_clear()  # it prints each sentence once
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def uncounted(monkeypatch):
    """No costs are counted: nothing is written meanwhile, and it takes most of a tiny run."""
    monkeypatch.setattr(cps, "costs", lambda *_: (1, 1, 1, 1))


def write(path, array, affine=None):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag((*MM, 1)) if affine is None else affine), path)


def phantom(seed, shape=SHAPE):
    """Noise with a bright box of label 1 at the left and a brighter one of label 5 at the right."""
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    x, y, z = rng.integers(1, 4, 3)
    label[x : x + 5, y : y + 8, z : z + 5] = 1
    label[x + 6 : x + 11, y : y + 8, z : z + 5] = 5
    hu = np.array([0, 80, 0, 0, 0, 160])[label] + rng.normal(0, 15, shape)
    return hu.round().astype(np.int16), label


def make_data(root="data", labelled=6, shape=SHAPE, image=None, label=None):
    """A data set in the layout of MSD: c0, c1 ... with labels, two u... without."""
    for i in range(labelled + 2):
        part, name = ("Tr", f"c{i}.nii.gz") if i < labelled else ("Un", f"u{i}.nii")
        arrays = phantom(i, shape)
        scan = arrays[0] if image is None else image.copy()
        scan[-1, -1, -1] += i  # no case is a copy of another
        write(f"{root}/images{part}/{name}", scan)
        if part == "Tr":
            write(f"{root}/labelsTr/{name}", arrays[1] if label is None else label)


def words(flags):
    """The command line of some Config fields."""
    found = []
    for key, value in flags.items():
        values = value if isinstance(value, tuple) else (value,)
        found += [f"--{key.replace('_', '-')}", *map(str, values)]
    return found


def train(*more, **flags):
    """main(["train", ...]) of tiny networks; returns the exit code."""
    flags = TINY | flags
    return cps.main(["train", flags.pop("data"), *more, *words(flags)])


def patches(rank=0, **changes):
    config = cps.Config(**TINY | changes)
    return cps.Patches(config, cps.prepare(cps.split_cases(config), config), IDS, rank)


def names(config, part):
    return {case.name for case in cps.split_cases(config)[part]}


def tensors_of(path):
    leaves = tree_leaves(torch.load(path, weights_only=True))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def same_weights(*paths):
    """Whether all tensors of two checkpoints, of networks and optimisers, are equal to the bit."""
    one, two = map(tensors_of, paths)
    assert len(one) == len(two) > 50
    return all(map(torch.equal, one, two))


def table_of(path, but=("seconds",)):
    """Rows of a CSV file; without the seconds, which differ from run to run."""
    with open(path) as file:
        return [{k: v for k, v in row.items() if k not in but} for row in csv.DictReader(file)]


def spy(patch, before=lambda step: None):
    """Record the batches of all training steps; before(step) may act, or raise."""
    batches = []
    one = cps.train_step

    def watched(nets, optimisers, batch, *rest):
        if not optimisers:  # the costs are counted
            return one(nets, optimisers, batch, *rest)
        before(len(batches))
        batches.append(batch)
        return one(nets, optimisers, batch, *rest)

    patch.setattr(cps, "train_step", watched)
    return batches


def logits(*shape, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).requires_grad_()


def networks(classes=3, base=2):
    torch.manual_seed(0)
    return [cps.UNet3D(classes, base, 2) for _ in "AB"]


def stepper(nets, config, lr=0.05):
    """A function that does cps.train_step on a batch and returns its 6 numbers: loss_sup, loss_cps,
    agreement, foreground, overlap, 1."""
    sgd = [torch.optim.SGD(net.parameters(), lr, 0.9, nesterov=True) for net in nets]
    rest = (0.7, config, torch.amp.GradScaler("cpu", enabled=False), nullcontext())
    return lambda batch: cps.train_step(nets, sgd, batch, *rest).tolist()


# Oracles: the same thing, as plainly as possible
# --------------------------------------------------------------------------------------------------
def plain_loss(scores, target, dice=True):
    """Dice + CE, sample by sample and class by class; voxels with target -1 count nowhere."""
    losses = []
    for out, true in zip(scores, target):
        out = out[:, true >= 0]  # (K, n)
        true = true[true >= 0].long()  # (n,)
        losses.append(F.cross_entropy(out.T, true))
        for k in range(1, len(out)) if dice else ():
            p = out.softmax(0)[k]
            t = (true == k).float()
            part = 1 - (2 * (p * t).sum() + 1e-5) / (p.sum() + t.sum() + 1e-5)
            losses[-1] = losses[-1] + part / (len(out) - 1)
    return sum(losses) / len(losses)


def plain_cross_entropies(a, b, valid):
    """L_cps of cross-entropy alone, voxel by voxel: each network against the other's argmax."""
    total = 0.0
    for i, *xyz in np.ndindex(valid.shape):
        one = a[(i, slice(None), *xyz)]
        two = b[(i, slice(None), *xyz)]
        for student, teacher in ((one, two), (two, one)):
            nll = np.log(np.exp(student).sum()) - student[teacher.argmax()]
            total += nll * valid[(i, *xyz)] / valid[i].sum() / len(valid)
    return total


def plain_windows(nets, volume, patch, num_classes, overlap):
    """Sliding window with all sums of the whole volume in memory: float64 (K, X, Y, Z)."""
    shape = np.maximum(volume.shape, patch)
    padded = np.pad(volume, [(0, s - n) for s, n in zip(shape, volume.shape)])
    total = torch.zeros(num_classes, *shape, dtype=torch.float64)
    axes = [(torch.arange(p) - (p - 1) / 2) / (p / 8) for p in patch]
    weight = torch.exp(-sum(g**2 for g in torch.meshgrid(*axes, indexing="ij")) / 2).clamp(1e-3)
    starts = []
    for s, p in zip(shape, patch):
        firsts = [0]
        while firsts[-1] + p < s:
            firsts.append(min(firsts[-1] + max(1, int(p * (1 - overlap))), s - p))
        starts.append(firsts)
    for corner in itertools.product(*starts):
        box = tuple(slice(c, c + p) for c, p in zip(corner, patch))
        for net in nets:
            out = net(torch.tensor(padded[box])[None, None]).softmax(1)
            total[(slice(None), *box)] += out[0].double() * weight
    return total[(slice(None), *map(slice, volume.shape))]


# The surface at a voxel corner: code of the 8 voxels -> |normals| of the triangles, in eighths.
ROWS = {
    1: [111],
    3: [220] * 2,
    6: [111] * 2,
    24: [111] * 2,
    7: [400, 222, 111],
    22: [111] * 3,
    105: [111] * 4,
    25: [22, 22, 111],
    15: [400] * 2,
    23: [111, 111, 222, 222],
    27: [111, 333, 22, 202],
    30: [400, 111, 111, 222],
    60: [220] * 4,
}
CUBE = list(itertools.product((0, 1), repeat=3))


def cells(code):
    return {cell for i, cell in enumerate(CUBE) if code & (128 >> i)}


@functools.cache
def normals(code):
    """Turn and mirror the cube, and swap inside and outside, until a known row is met."""
    for order, flip in itertools.product(itertools.permutations(range(3)), CUBE):
        twin = {tuple(cell[a] ^ f for a, f in zip(order, flip)) for cell in cells(code)}
        for row, found in ROWS.items():
            if cells(row) in (twin, set(CUBE) - twin):  # its axis k is axis order[k] of the code
                digits = np.array([(n // 100, n // 10 % 10, n % 10) for n in found])
                return digits[:, np.argsort(order)] / 8
    return np.zeros((0, 3))


def plain_area(code, spacing):
    return np.linalg.norm(normals(code) * np.prod(spacing) / spacing, axis=1).sum()


def plain_surface(mask, spacing):
    """Points in mm (n, 3) and areas (n,) of the surface of a mask, corner by corner."""
    mask, points, areas = np.pad(mask, 1), [], []
    for corner in np.ndindex(*np.array(mask.shape) - 1):
        code = sum(128 >> i for i, o in enumerate(CUBE) if mask[tuple(np.add(corner, o))])
        if 0 < code < 255:
            points.append(np.multiply(corner, spacing))
            areas.append(plain_area(code, spacing))
    return np.array(points), np.array(areas)


def plain_surface_dice(pred, ref, spacing, tolerance):
    (p, p_area), (r, r_area) = (plain_surface(mask, np.array(spacing)) for mask in (pred, ref))
    distance = np.linalg.norm(p[:, None] - r, axis=2)  # of all points to all points
    near = p_area[distance.min(1) <= tolerance].sum() + r_area[distance.min(0) <= tolerance].sum()
    return near / (p_area.sum() + r_area.sum())


# Whole runs
# --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data and two trained runs: `native`, and `fine` with resampled slices."""
    root = tmp_path_factory.mktemp("trained")
    make_data(f"{root}/data")
    flags = {
        "data": f"{root}/data",
        "cache": f"{root}/cache",
        "epochs": 6,
        "epoch_steps": 20,
        "halve_epochs": 3,
        "lam": 0.5,
        "base_channels": 6,
        "test": 1.0,
    }
    assert train(out=f"{root}/native", **flags) == 0
    assert train(out=f"{root}/fine", spacing=(1.0, 2.0, 2.0), **flags) == 0
    return root


def errors_of(capture, kind="error"):
    """The lines `error: ...` (or `warning: ...`) on stderr, where no other line may be."""
    lines = capture.readouterr().err.splitlines()
    assert all(line.startswith(("error: ", "warning: ")) for line in lines), lines
    return [line.removeprefix(f"{kind}: ") for line in lines if line.startswith(f"{kind}: ")]


@pytest.mark.parametrize("which", ["native", "fine"])
def test_trap_15_train_predict_and_evaluate_give_one_dice_of_whole_volumes(trained, which):
    run = f"{trained}/{which}"
    files = {"best.pt", "last.pt", "config.json", "split.json", "log.csv", "cps.py"}
    assert files <= {*os.listdir(run)}
    assert max(float(row["dice"]) for row in table_of(f"{run}/log.csv")) > 0.5
    assert cps.main(["predict", f"{run}/best.pt", f"{trained}/data/imagesTr", "out"]) == 0
    os.remove("out/c0.nii.gz")  # a missing prediction counts as empty
    assert cps.main(["evaluate", "out", f"{trained}/data/labelsTr", "--csv", "scores.csv"]) == 0
    scores = {}
    for row in table_of("scores.csv"):
        numbers = [float(row[key]) for key in ("dice", "nsd", "hd95")]
        scores[row["case"], int(row["label"])] = numbers
    assert len(scores) == 6 * 2
    for label in IDS:
        assert scores["c0", label][:2] == [0, 0]
        assert math.isnan(scores["c0", label][2])

    # Resumed at its end, it only reports: on the scan's own grid, so `fine` agrees as well.
    state = torch.load(f"{run}/last.pt", weights_only=True)
    result = cps.train(cps.Config(**state["config"] | {"resume": True}))
    ((case, found),) = result["results"].items()
    assert case != "c0"
    for label in IDS:  # in the cache the image is float16: a voxel may differ
        assert found[label][:3] == pytest.approx(scores[case, label], abs=5e-3)
        assert found[label].held
    assert max(scores.hd95 for scores in found.values()) > 0  # in mm: a wrong spacing would differ


def turned(volume, axes, affine):
    """A NIfTI image of a RAS+ volume, stored along other axes; with codes of its own."""
    ras, to = map(nib.orientations.axcodes2ornt, ("RAS", axes))
    scan = nib.Nifti1Image(volume, affine)
    scan = scan.as_reoriented(nib.orientations.ornt_transform(ras, to))
    scan.set_qform(scan.affine, 1)
    scan.set_sform(scan.affine, 2)
    return scan


@pytest.mark.parametrize("which", ["native", "fine"])
def test_trap_12_orientation_does_not_matter_and_geometry_is_kept(trained, which):
    image, label = phantom(50)
    found = []
    sine = np.sin(0.1)  # an oblique scan
    cosine = np.cos(0.1)
    affine = np.array([[cosine, -sine, 0, -20], [sine, cosine, 0, 30], [0, 0, 1, 7], [0, 0, 0, 1]])
    affine[:3, :3] *= MM
    os.mkdir("scans")
    for axes in ("RAS", "LPS", "PIR"):
        scan = turned(image, axes, affine)
        scan.header["cal_max"] = 400  # a window that would hide the labels
        nib.save(scan, f"scans/{axes}.nii.gz")
    assert cps.main(["predict", f"{trained}/{which}/best.pt", "scans", "out"]) == 0
    for axes in ("RAS", "LPS", "PIR"):
        scan = nib.load(f"scans/{axes}.nii.gz")
        out = nib.load(f"out/{axes}.nii.gz")
        assert out.shape == scan.shape
        assert np.array_equal(out.affine, scan.affine)
        for field in ("pixdim", "qform_code", "sform_code", "srow_x", "quatern_b", "qoffset_x"):
            assert np.array_equal(out.header[field], scan.header[field])
        assert out.get_data_dtype() == np.uint8
        assert out.header["cal_max"] == 0
        found.append(np.asarray(nib.as_closest_canonical(out).dataobj))
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])
    assert all(cps.dice(found[0] == i, label == i) > 0.4 for i in IDS)  # left is left


def test_trap_12_scores_do_not_depend_on_how_scans_are_stored():
    ref = phantom(0)[1]
    pred = np.roll(ref, (1, 1, 1), (0, 1, 2))
    for axes in ("RAS", "PIR"):
        for name, volume in (("ref", ref), ("pred", pred)):
            nib.save(turned(volume, axes, np.diag((*MM, 1))), f"{name}{axes}.nii")
        assert cps.main(["evaluate", f"pred{axes}.nii", f"ref{axes}.nii", "--csv", "s.csv"]) == 0
        for i, row in zip(IDS, table_of("s.csv"), strict=True):
            p = pred == i
            r = ref == i
            want = [cps.dice(p, r), plain_surface_dice(p, r, MM, 2.0), plain_hd95(p, r, MM)]
            assert [float(row[key]) for key in ("dice", "nsd", "hd95")] == pytest.approx(want)
            assert want[1] < 1


def test_predict_does_the_others_when_one_is_bad(trained, capsys):
    write("scans/good_0000.nii.gz", phantom(1)[0])
    write("scans/bad_0000.nii.gz", np.full(SHAPE, np.nan, np.float32))
    assert cps.main(["predict", f"{trained}/native/best.pt", "scans", "out"]) == 1
    assert os.listdir("out") == ["good.nii.gz"] and "bad_0000.nii.gz" in capsys.readouterr().err


def test_default_command_needs_no_data():
    tiny = {"out": "run", "base_channels": 2, "levels": 2, "epochs": 1, "epoch_steps": 1, "val": 1}
    assert cps.main(["train", *words(tiny)]) == 0
    assert cps.main(["predict", "run/best.pt", "runs/phantom/imagesTs", "out"]) == 0
    assert cps.main(["evaluate", "out", "runs/phantom/labelsTs"]) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", [True, False])
def test_trap_14_training_on_a_gpu_with_mixed_precision(amp, capsys):
    make_data()
    assert train("--amp" if amp else "--no-amp", device="cuda", workers=1) == 0
    assert "GiB at most on the GPU" in capsys.readouterr().out
    rows = table_of("run/log.csv")
    assert len(rows) == 2
    assert all(np.isfinite(float(row["loss_cps"])) for row in rows)


# 1. Configuration
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["method", "preset", "pseudo_loss", "init_b"])
def test_a_word_that_is_no_choice_is_refused_from_python_too(name):
    with pytest.raises(cps.UserError, match=f"--{cps.flag(name)} supervized: must be one of"):
        cps.Config(**{name: "supervized"})


def test_a_whole_number_will_do_for_a_float():
    config = cps.Config(intensity=0, val=0, lam=0)
    assert config == cps.Config(intensity=0.0, val=0.0, lam=0.0)


def test_paper_preset_is_the_paper(capsys):
    want = {
        "patch": (160, 160, 96),
        "clip": (-68.0, 200.0),
        "batch": 2,
        "momentum": 0.99,
        "lr": 0.01,
        "halve_epochs": 200,
        "epochs": 1000,
        "epoch_steps": 250,
        "init_b": "he",
        "pseudo_loss": "dice_ce",
        "method": "context",
        "mirror": "",
    }
    for name, value in want.items():
        assert getattr(cps.Config(), name) == value
    default = cps.Config(data="data", out="runs/data-context")  # of a command with DATA alone
    assert cps.config_from("train", data="data") == default

    assert cps.main(["info"]) == 0
    printed = capsys.readouterr().out
    for name in (*want, "weight_decay", "lam", "rampup"):
        assert f"{name:<16} {getattr(cps.Config(), name)}\n" in printed
    assert "250,000 steps" in printed and "halved every 200 epochs" in printed


# 2. The losses
# --------------------------------------------------------------------------------------------------
def test_trap_02_no_gradient_through_the_target():
    a = logits(2, 3, 4, 5, 6)
    b = logits(2, 3, 4, 5, 6, seed=1)
    label = cps.pseudo_label(b)
    assert label.dtype == torch.int64 and not label.requires_grad
    assert torch.equal(label, b.argmax(1))
    got = torch.autograd.grad(cps.cross_pseudo_loss(a, b), (a, b))
    for gradient, student, teacher in zip(got, (a, b), (b, a)):
        loss = cps.dice_ce_loss(student, teacher.argmax(1))  # alone: the other term adds exactly 0
        assert torch.equal(gradient, torch.autograd.grad(loss, student)[0])


@pytest.mark.parametrize("batch", [1, 2])
def test_trap_04_cross_pseudo_loss_is_the_loop_over_voxels(batch):
    a = logits(batch, 3, 4, 3, 5)
    b = logits(batch, 3, 4, 3, 5, seed=1)
    for valid in (logits(batch, 4, 3, 5) > -1, torch.ones(batch, 4, 3, 5, dtype=torch.bool)):
        arrays = [t.detach().double().numpy() for t in (a, b, valid)]
        plain_ce = cps.cross_pseudo_loss(a, b, valid, dice=False)
        assert plain_ce.item() == pytest.approx(plain_cross_entropies(*arrays), rel=1e-5)
        label_a = a.argmax(1).masked_fill(~valid, -1)
        label_b = b.argmax(1).masked_fill(~valid, -1)
        want = plain_loss(a, label_b) + plain_loss(b, label_a)
        assert cps.cross_pseudo_loss(a, b, valid).item() == pytest.approx(want.item(), rel=1e-5)
    assert torch.equal(plain_ce, cps.cross_pseudo_loss(a, b, dice=False))  # valid=None: all


@pytest.mark.parametrize("dice", [True, False])
def test_trap_05_ignored_voxels_have_no_part_in_the_loss(dice):
    out = logits(2, 4, 5, 4, 6)
    target = torch.randint(-1, 4, (2, 5, 4, 6), generator=torch.Generator().manual_seed(1))
    loss = cps.dice_ce_loss(out, target, dice=dice)
    assert loss.item() == pytest.approx(plain_loss(out, target, dice).item(), rel=1e-5)
    gradient = torch.autograd.grad(loss, out)[0].movedim(1, -1)
    assert (gradient[target < 0] == 0).all() and (gradient[target >= 0] != 0).all()
    assert torch.equal(cps.dice_ce_loss(out, target.masked_fill(target < 0, 99), 99, dice), loss)


@pytest.mark.parametrize("dice", [True, False])
def test_trap_06_all_ignored_is_zero_and_finite(dice):
    out = logits(2, 3, 4, 4, 4)
    none = torch.zeros(2, 4, 4, 4, dtype=torch.bool)
    loss = cps.dice_ce_loss(out, none.long() - 1, dice=dice)
    loss.backward()
    assert loss.item() == 0 and (out.grad == 0).all()
    assert cps.cross_pseudo_loss(out, out, none, dice=dice).item() == 0


def test_trap_07_rampup_starts_near_zero_and_gets_large(capsys):
    config = cps.Config()
    ramp = [cps.rampup(i, config.rampup * 1000) for i in range(1000)]
    assert ramp[0] < 0.01 and ramp == sorted(ramp) and np.mean(ramp) > 0.5 and config.lam > 0
    assert cps.rampup(50, 100) == pytest.approx(np.exp(-5 / 4))
    assert ramp[-1] == cps.rampup(300, 300) == cps.rampup(0, 0) == 1

    make_data()  # and the log tells weight, rate and the signs of a collapse to background
    assert train(lam=2.0, rampup=0.6, epochs=5, epoch_steps=1, halve_epochs=2) == 0
    texts = table_of("run/log.csv", but=())
    rows = [{key: float(value) for key, value in row.items()} for row in texts]
    assert [r["lam"] for r in rows] == pytest.approx([2 * cps.rampup(i, 3) for i in range(5)], 1e-4)
    assert [r["lr"] for r in rows] == pytest.approx([0.05, 0.05, 0.025, 0.025, 0.0125], 1e-4)
    assert all(0 <= row[k] <= 1 for row in rows for k in ("agreement", "foreground"))
    assert all(0.3 <= row["overlap"] < 1 for row in rows)

    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {"1", "5", "mean"} <= {words[1] for words in lines if words[:1] == ["|"]}  # each label
    first = lines.index([*rows[0], "left"])  # the head of the log
    for row, printed in zip(rows, lines[first + 1 :]):
        assert printed[:-1] == [f"{value:.4g}" for value in row.values()]


def test_trap_14_half_precision_does_not_overflow():
    out = logits(1, 2, 48, 48, 48, scale=100.0).detach().half()  # more voxels than fp16 can count
    target = (out[:, 0] > 50).long()
    want = cps.dice_ce_loss(out.float(), target).item()
    assert cps.dice_ce_loss(out, target).item() == pytest.approx(want, rel=1e-5)


# 3. Overlapping patches
# --------------------------------------------------------------------------------------------------
def test_trap_03_both_crops_agree_on_the_overlap():
    rng = np.random.default_rng(0)
    moved = np.zeros(3)
    for _ in range(500):
        patch = rng.integers(1, 12, 3)
        shape = rng.integers(1, 24, 3)
        least = rng.uniform(0.05, 0.95)
        corners = cps.overlapping_corners(rng, shape, patch, least)
        room = np.maximum(shape - patch, 0)
        assert all((c >= 0).all() and (c <= room).all() for c in corners)
        share = np.prod(1 - abs(corners[1] - corners[0]) / patch)
        can_shift = ((room > 0) & (1 - 1 / patch >= least)).any()
        assert least - 1e-9 <= share <= 1 and (share < 1) == can_shift
        moved += corners[1] != corners[0]
        volume = np.arange(np.prod(shape)).reshape(shape)  # its values tell the coordinates
        volume = np.pad(volume, [(0, p) for p in patch], constant_values=-1)
        crops = [volume[tuple(map(slice, c, c + patch))] for c in corners]
        one, two = (crop[s] for crop, s in zip(crops, cps.overlap_slices(*corners, patch)))
        assert np.array_equal(one, two) and one.size == round(share * np.prod(patch))
    assert (moved > 100).all()  # on all axes


def test_one_axis_must_move_and_the_others_may_stay():
    rng = np.random.default_rng(0)
    moved = []
    for _ in range(300):
        corner1, corner2 = cps.overlapping_corners(rng, (40, 40, 40), (8, 8, 8), 0.3)
        moved.append(np.count_nonzero(corner1 != corner2))
    assert set(moved) == {1, 2, 3}


def test_patches_apart_have_no_overlap():
    with pytest.raises(ValueError, match="do not overlap"):
        cps.overlap_slices((0, 0, 0), (3, 0, 8), np.array(PATCH))


def test_trap_08_labels_of_unlabelled_cases_are_never_read():
    make_data()
    assert train(out="one", cache="cache1") == 0
    lost = names(cps.Config(**TINY), "unlabelled") - {"u6", "u7"}
    assert len(lost) == 2
    for name in lost:
        with open(f"data/labelsTr/{name}.nii.gz", "wb") as file:
            file.write(b"garbage")
    assert train(out="two", cache="cache2") == 0
    assert same_weights("one/last.pt", "two/last.pt") and same_weights("one/best.pt", "two/best.pt")


def test_trap_09_methods_differ_in_nothing_but_the_unlabelled_part(monkeypatch):
    make_data()
    steps = []
    judged = set()
    sliding = cps.sliding_window
    handle = register_optimizer_step_post_hook(lambda *_: steps.append(1))

    def watched(nets, *rest, **more):
        judged.add(len(nets))
        return sliding(nets, *rest, **more)

    monkeypatch.setattr(cps, "sliding_window", watched)
    seen = {}
    for method in ("supervised", "cps", "context"):
        with monkeypatch.context() as patch:
            batches = spy(patch)
            assert train(method=method, out=method) == 0
        assert len(batches) == 6
        pairs = 0 if method == "supervised" else 2
        for batch in batches:
            assert len(batch["crops_a"]) == len(batch["crops_b"]) == len(batch["valid"]) == pairs
            assert len(batch["overlaps"]) == pairs
            whole = [slice(0, 8)] * 3  # equal crops: in `cps` only
            assert all(([*s] == whole) == (method == "cps") for p in batch["overlaps"] for s in p)
        seen[method] = [torch.stack([b["labelled"][:, 0], b["target"].float()]) for b in batches]

        row = table_of(f"{method}/log.csv")[0]
        absent = {name for name in row if row[name] == "nan"}
        parts = {"loss_cps", "agreement", "foreground", "overlap"}
        assert absent == (parts if method == "supervised" else set())
        assert (row["overlap"] == "1.0") == (method == "cps")
    handle.remove()
    assert len(steps) == 3 * 6 * 2  # of two networks, also where it is supervised
    assert len(judged) == 1  # no ensemble against one network
    for method in ("cps", "context"):
        assert all(map(torch.equal, seen["supervised"], seen[method]))


def test_networks_swap_crops_each_step(monkeypatch):
    """A sees the first crop in even steps, the second one in odd steps."""
    make_data()
    corners = (np.array([0, 0, 0]), np.array([4, 3, 2]))
    monkeypatch.setattr(cps, "overlapping_corners", lambda *_: corners)
    data = patches(**STILL)
    for step in range(4):
        for slices_a, slices_b in data[step]["overlaps"]:
            first, second = (slices_a, slices_b) if step % 2 == 0 else (slices_b, slices_a)
            assert [piece.start for piece in first] == [4, 3, 2]
            assert [piece.start for piece in second] == [0, 0, 0]


def test_centred_patches_alternate_within_a_batch_and_from_step_to_step(monkeypatch):
    """Of a batch of one, too, every other patch is centred on foreground."""
    make_data()
    seen = []
    monkeypatch.setattr(
        cps.Patches,
        "labelled_corner",
        lambda self, case, rng, centred: seen.append(centred) or np.zeros(3, int),
    )
    for batch in (1, 2):
        data = patches(batch=batch, method="supervised")
        for step in range(4):
            data[step]
    assert seen == [False, True, False, True, False, True, True, False, False, True, True, False]


def test_validation_comes_every_so_many_epochs_and_after_the_last():
    make_data()
    assert train(epochs=5, validate_epochs=2) == 0
    assert [row["dice"] != "nan" for row in table_of("run/log.csv")] == [0, 1, 0, 1, 1]


def test_crops_of_plain_cps_differ_in_intensity_alone():
    make_data()
    still = patches(method="cps", **STILL)[0]
    assert torch.equal(still["crops_a"], still["crops_b"])
    data = patches(method="cps", spatial=0.5, mirror="xyz")
    same = [
        torch.equal(batch["crops_a"], batch["crops_b"]) for batch in map(data.__getitem__, range(8))
    ]
    assert not all(same)


@pytest.mark.parametrize("spatial", [0.0, 1.0])
def test_trap_13_no_left_right_mirroring_unless_asked_for(spatial):
    make_data(image=np.int16(np.indices(SHAPE)[0] * 10))  # brighter and brighter to the right
    assert cps.Config().mirror == ""
    rising = {}
    for mirror in ("", "yz", "x"):
        data = patches(mirror=mirror, intensity=0.0, spatial=spatial)
        batches = [data[i] for i in range(6)]
        keys = ("labelled", "crops_a", "crops_b")
        images = torch.cat([batch[key] for batch in batches for key in keys])[:, 0]
        slope = images[:, 2:6, 2:6, 2:6].diff(dim=1).mean((1, 2, 3))
        rising[mirror] = (slope > 0).float().mean().item()
    assert rising[""] == rising["yz"] == 1 and 0.2 < rising["x"] < 0.8


@pytest.mark.parametrize("shape", [SHAPE, (16, 6, 5)])
def test_traps_03_05_pairs_are_cut_after_mirroring_and_padding_is_never_valid(shape):
    make_data(shape=shape)
    data = patches(intensity=0.0, spatial=0.5, mirror="xyz")
    moved = 0
    image = ((2, 1, *PATCH), torch.float32)
    types = {
        "labelled": image,
        "target": ((2, *PATCH), torch.int16),
        "crops_a": image,
        "crops_b": image,
        "valid": ((2, *PATCH), torch.bool),
    }
    for batch in map(data.__getitem__, range(12)):
        overlaps = batch["overlaps"]
        assert {key: (tuple(batch[key].shape), batch[key].dtype) for key in types} == types
        assert len(batch) == 6 and len(overlaps) == 2
        for a, b, (one, two) in zip(batch["crops_a"], batch["crops_b"], overlaps):
            assert torch.equal(a[0][one], b[0][two])
            moved += one != two
        pairs = ((batch["labelled"], batch["target"] >= 0), (batch["crops_a"], batch["valid"]))
        for image, inside in pairs:
            assert (image[:, 0][inside] != 0).float().mean() > 0.99  # outside there is only 0
            assert shape == SHAPE or not inside.all()
    assert moved > 12
    inside = np.prod(np.minimum(shape, PATCH))
    for batch in map(patches(**STILL).__getitem__, range(4)):
        assert all((part > -1).sum() == inside for part in batch["target"])
        assert all(part.sum() == inside for part in batch["valid"])


def test_batches_of_supervised_hold_no_pairs():
    make_data()
    batch = patches(method="supervised")[0]
    assert batch["labelled"].shape == (2, 1, *PATCH)
    assert batch["crops_a"].shape == batch["crops_b"].shape == (0, 1, *PATCH)
    assert batch["valid"].shape == (0, *PATCH) and batch["valid"].dtype == torch.bool
    assert batch["overlaps"] == []


def test_any_step_can_be_rebuilt_and_ranks_share_a_batch():
    make_data()
    flags = {"spatial": 0.5, "mirror": "yz"}
    whole = patches(**flags)
    again = patches(**flags)
    ranks = [patches(rank, batch=1, **flags) for rank in (0, 1)]
    for i in (5, 0, 3):
        one = whole[i]
        two = again[i]
        parts = [rank[i] for rank in ranks]
        for key in ("labelled", "target", "crops_a", "crops_b", "valid"):
            assert torch.equal(one[key], two[key])
            assert torch.equal(one[key], torch.cat([part[key] for part in parts]))
        assert one["overlaps"] == two["overlaps"] == parts[0]["overlaps"] + parts[1]["overlaps"]
    assert not torch.equal(whole[0]["labelled"], whole[2]["labelled"])


# 4. The networks
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("init_b", ["he", "xavier"])
def test_trap_01_networks_start_different(init_b):
    nets = []
    for seed in (0, 0, 1):
        nets += cps.make_pair(cps.Config(**TINY, init_b=init_b, seed=seed), 3)
    for a, b, a0, b0, a1, b1 in zip(*(net.parameters() for net in nets)):
        assert torch.equal(a, a0) and torch.equal(b, b0)
        if a.ndim == 5:  # a convolution; the norms begin as 1 and 0 in all networks
            assert not any(torch.equal(*two) for two in itertools.combinations((a, b, a1, b1), 2))
    a, b = (cps.pseudo_label(net(logits(1, 1, 8, 8, 8))) for net in nets[:2])
    assert (a == b).float().mean() < 0.9


def test_initial_weights_are_normal_of_he_and_xavier():
    config = cps.Config(levels=2, base_channels=32, patch=PATCH, init_b="xavier")
    state = torch.random.get_rng_state()
    a, b = cps.make_pair(config, 3)
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's generator
    for he, xavier in zip(a.parameters(), b.parameters()):
        if he.ndim == 5 and he.numel() > 20_000:
            fan_in = he[0].numel()  # of rows of the weight, as torch counts, also when transposed
            fan_out = he[:, 0].numel()
            assert he.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.03)
            assert xavier.std().item() == pytest.approx((2 / (fan_in + fan_out)) ** 0.5, rel=0.03)


def test_unet_shapes_and_parameter_count():
    net = cps.UNet3D(5, 4, 3, 2)
    assert net(torch.zeros(2, 2, 8, 4, 12)).shape == (2, 5, 8, 4, 12)
    assert max(p.shape[0] for p in cps.UNet3D(2, 32, 5).parameters()) == 320
    # 3x3x3 kernels and two norms: 1>2>2, 2>4>4; transposed 2x2x2 4>2 + bias; 4>2>2; head 2>3 + bias
    count = 27 * (2 + 4) + 8 + 27 * (8 + 16) + 16 + (8 * 8 + 2) + 27 * (8 + 4) + 8 + (6 + 3)
    assert sum(p.numel() for p in cps.UNet3D(3, 2, 2).parameters()) == count


def test_unet_norm_is_instance_norm():
    layers = [m for m in networks()[0].modules() if not [*m.children()]]
    norms = [m for m in layers if m.state_dict() and next(m.parameters()).ndim == 1]
    assert len(norms) == 6 and all(isinstance(norm, cps.Norm) for norm in norms)
    for norm in norms:
        n = len(norm.weight)
        same = nn.InstanceNorm3d(n, affine=True)
        x = logits(2, n, 4, 4, 4, scale=0.03)  # small: eps has a part
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        same.load_state_dict(norm.state_dict())
        assert torch.allclose(norm(x), same(x), atol=1e-5)


class OnCard(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


def test_the_norm_of_a_gpu_is_that_of_a_cpu(monkeypatch):
    calls = []
    real = F.instance_norm

    def watched(*args, **more):
        calls.append(1)
        return real(*args, **more)

    monkeypatch.setattr(F, "instance_norm", watched)
    norm = cps.Norm(3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    for scale in (0.003, 1.0):
        x = logits(2, 3, 6, 5, 4, scale=scale)
        on_cpu = norm(x)
        assert not calls
        on_gpu = norm(x.as_subclass(OnCard))
        assert calls and torch.allclose(on_gpu.as_subclass(torch.Tensor), on_cpu, 0, 2e-6)
        calls.clear()


# 5. Training
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("i, pseudo_loss", [(2, "dice_ce"), (3, "ce")])
def test_train_step_is_the_formula(i, pseudo_loss):
    """On padded volumes, in both roles (even and odd steps): the six numbers and new weights."""
    make_data(shape=(16, 6, 14))
    data = patches(pseudo_loss=pseudo_loss, grad_clip=0.3, intensity=0.0)
    batch = data[i]
    nets = networks()
    plain = networks()
    got = stepper(nets, data.config)(batch)

    target = batch["target"]
    sup = 0
    for net in plain:
        sup = sup + plain_loss(net(batch["labelled"]), target)
    outs_a = plain[0](batch["crops_a"])
    outs_b = plain[1](batch["crops_b"])
    cross = agree = found = shared = 0
    for k, (slices_a, slices_b) in enumerate(batch["overlaps"]):
        a = outs_a[k][(slice(None), *slices_a)][None]
        b = outs_b[k][(slice(None), *slices_b)][None]
        unseen = ~batch["valid"][k][slices_a][None]
        for out, label in ((a, b.argmax(1)), (b, a.argmax(1))):
            label = label.masked_fill(unseen, -1)
            cross = cross + plain_loss(out, label, pseudo_loss == "dice_ce") / 2
        label_a = a.argmax(1)[~unseen]  # padding is in no share
        label_b = b.argmax(1)[~unseen]
        agree += (label_a == label_b).float().mean() / 2
        found += ((label_a > 0).float().mean() + (label_b > 0).float().mean()) / 4
        shared += a[0, 0].numel() / np.prod(PATCH) / 2
    expected = [sup.item(), cross.item(), agree.item(), found.item(), shared, 1]
    assert got == pytest.approx(expected, rel=1e-4)

    (sup + 0.7 * cross).backward()
    for net, learned in zip(plain, nets):
        nn.utils.clip_grad_norm_(net.parameters(), 0.3)
        torch.optim.SGD(net.parameters(), 0.05, 0.9, nesterov=True).step()
        pairs = zip(net.parameters(), learned.parameters())
        assert all(torch.allclose(p, q, atol=1e-5) for p, q in pairs)


def instance_norms(net):
    """The network in contiguous memory, with PyTorch's InstanceNorm3d for each Norm."""
    for name, child in [*net.named_children()]:
        if isinstance(child, cps.Norm):
            norm = nn.InstanceNorm3d(len(child.weight), affine=True)
            norm.load_state_dict(child.state_dict())
            setattr(net, name, norm)
        instance_norms(child)
    return net.to(memory_format=torch.contiguous_format)


def test_what_makes_a_step_fast_changes_no_loss_of_20_steps():
    """Channels-last, GroupNorm, one forward for all patches, an optimiser over all tensors at once,
    against contiguous memory, InstanceNorm, a forward for each patch, tensor after tensor."""
    make_data()
    data = patches(epochs=10)
    plain = [instance_norms(net) for net in networks()]
    nets = [net.to(memory_format=torch.channels_last_3d) for net in networks()]
    step = stepper(nets, data.config, lr=0.01)
    optimisers = []
    for net in plain:
        sgd = torch.optim.SGD(net.parameters(), 0.01, 0.9, nesterov=True, foreach=False)
        optimisers.append(sgd)
    for i in range(20):
        batch = data[i]
        sup = cross = 0
        for net in plain:
            outs = torch.cat([net(image[None]) for image in batch["labelled"]])
            sup = sup + plain_loss(outs, batch["target"])
        for k, (slices_a, slices_b) in enumerate(batch["overlaps"]):
            a = plain[0](batch["crops_a"][k, None])[(..., *slices_a)]
            b = plain[1](batch["crops_b"][k, None])[(..., *slices_b)]
            seen = batch["valid"][k][slices_a][None]
            for out, label in ((a, b.argmax(1)), (b, a.argmax(1))):
                cross = cross + plain_loss(out, label.masked_fill(~seen, -1)) / 2
        for optimiser in optimisers:
            optimiser.zero_grad()
        (sup + 0.7 * cross).backward()
        for net, optimiser in zip(plain, optimisers):
            nn.utils.clip_grad_norm_(net.parameters(), data.config.grad_clip)
            optimiser.step()
        assert step(batch)[:2] == pytest.approx([sup.item(), cross.item()], abs=1e-5)


def test_train_step_in_bf16_is_close():
    make_data()
    data = patches(spatial=0.0)
    rows = {}
    for enabled in (False, True):
        nets = networks(base=4)
        sgd = [torch.optim.SGD(net.parameters(), 0.01, 0.9, nesterov=True) for net in nets]
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=enabled)
        step = functools.partial(cps.train_step, nets, sgd)
        rows[enabled] = [step(data[i], 0.7, data.config, scaler, autocast) for i in range(4)]
        assert all(p.dtype == torch.float32 for net in nets for p in net.parameters())
    exact = torch.stack(rows[False])
    half = torch.stack(rows[True])
    assert half.dtype == torch.float32 and not torch.equal(exact, half)
    assert torch.allclose(exact, half, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_step_that_overflows_under_a_scaler_is_skipped_and_left_out(bad):
    make_data()
    data = patches()
    nets = networks()
    sgd = [torch.optim.SGD(net.parameters(), 0.01, 0.9, nesterov=True) for net in nets]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = [p.clone() for net in nets for p in net.parameters()]

    def step(batch, scaler):
        row = cps.train_step(nets, sgd, batch, 0.7, data.config, scaler, nullcontext())
        return row, [p for net in nets for p in net.parameters()]

    spoilt = data[0] | {"labelled": torch.full((2, 1, *PATCH), bad)}
    row, after = step(spoilt, scaler)
    assert row.tolist() == [0] * 6
    assert all(map(torch.equal, before, after)) and scaler.get_scale() == 4
    row, after = step(data[0], scaler)
    assert row[-1] == 1 and row[0] > 0 and not all(map(torch.equal, before, after))
    off = torch.amp.GradScaler("cpu", enabled=False)
    row, _ = step(spoilt, off)  # without a scaler it is not hidden: it ends the run
    assert not row.isfinite().all()


def test_a_step_whose_gradients_alone_overflow_is_left_out():
    make_data()
    data = patches()
    nets = networks()
    sgd = [torch.optim.SGD(net.parameters(), 0.01, 0.9, nesterov=True) for net in nets]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = [p.clone() for net in nets for p in net.parameters()]
    row = cps.train_step(nets, sgd, data[0], 1e6, data.config, scaler, nullcontext())
    assert row.tolist() == [0] * 6
    assert all(map(torch.equal, before, [p for net in nets for p in net.parameters()]))


def test_the_log_is_a_mean_over_the_steps_that_count(monkeypatch, uncounted, capsys):
    make_data()
    one = cps.train_step
    seen = []

    def step(*args):
        row = one(*args)
        seen.append(row * (len(seen) != 1))  # the second is skipped
        return seen[-1]

    monkeypatch.setattr(cps, "train_step", step)
    assert train(epochs=1) == 0
    want = torch.stack([seen[0], seen[2]]).mean(0).tolist()
    (row,) = table_of("run/log.csv")
    got = [float(row[k]) for k in ("loss_sup", "loss_cps", "agreement", "foreground", "overlap")]
    assert got == pytest.approx(want[:5], rel=1e-5)
    assert "1 steps overflowed" in capsys.readouterr().out


def test_a_step_that_two_processes_skip_is_one_step(monkeypatch, capsys):
    monkeypatch.setattr(cps, "PROCESSES", 2)
    run = cps.Run(cps.Config(**TINY), IDS, [])
    run.row_step = run.row_start = 0.0
    run.step = run.config.epoch_steps
    run.sums[:] = 2 * (run.step - 1)  # all but one, in both processes
    run.log(0.1, 1.0, 0.5)
    assert "\n1 steps overflowed" in capsys.readouterr().out


def test_the_seconds_of_a_row_are_those_of_the_steps_made_here(monkeypatch):
    run = cps.Run(cps.Config(**TINY), IDS, [])
    run.row_step = 8  # resumed there, in mid-epoch
    run.row_start = 100.0
    for run.step, now in ((10, 106.0), (20, 126.0)):
        monkeypatch.setattr(cps.time, "monotonic", lambda now=now: now)
        run.sums += 1
        run.log(0.1, 1.0, 0.5)
    assert [row[-1] for row in run.rows] == [3.0, 2.0]


def test_the_log_prints_large_steps_whole(capsys):
    run = cps.Run(cps.Config(**TINY), IDS, [])
    run.row_step = run.row_start = 0.0
    run.step = 249_750
    run.sums += 1
    run.log(0.1, 1.0, 0.5)
    assert capsys.readouterr().out.split()[:3] == ["249750", "0.1", "1"]


def test_the_test_at_the_end_can_be_interrupted(monkeypatch):
    make_data()
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    seen = []

    def report(run):
        seen.extend(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cps, "report", report)
        assert train() == 130
    assert seen == before
    assert train("--resume") == 0  # it is made up for


def test_signals_are_given_back_after_an_interrupt(monkeypatch):
    make_data()
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    spy(monkeypatch, lambda step: step == 1 and os.kill(os.getpid(), signal.SIGINT))
    assert train() == 130
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_trap_03_networks_that_see_single_voxels_agree_on_all_of_the_overlap():
    make_data()
    data = patches(intensity=0.0, spatial=0.5, mirror="xyz")
    net = nn.Conv3d(1, 3, 1)
    one = stepper([net, net], data.config)
    assert all(one(data[i])[2] == pytest.approx(1, abs=1e-5) for i in range(4))


def test_compiled_networks_are_those_that_are_trained_and_saved(monkeypatch):
    make_data()
    compiled = []

    def compile(net):  # as torch.compile: another module that shares the weights
        compiled.append(net)
        return nn.Sequential(net)

    monkeypatch.setattr(torch, "compile", compile)
    assert train(out="plain") == 0 and not compiled
    assert train("--compile", out="run") == 0 and len(compiled) == 2
    assert same_weights("plain/last.pt", "run/last.pt")


def test_one_batch_can_be_learned_by_heart():
    make_data()
    data = patches(method="supervised", **STILL)
    nets = networks(base=4)
    one = stepper(nets, data.config)
    for batch in map(data.__getitem__, range(9)):
        if all(len(target.unique()) == 3 for target in batch["target"]):
            break  # all classes are in both patches
    losses = [one(batch)[0] for _ in range(60)]
    assert losses[-1] < 0.2 * losses[0]
    for net in nets:
        found = cps.pseudo_label(net(batch["labelled"]))
        assert (found == batch["target"]).float().mean() > 0.95


def test_same_seed_same_weights():
    make_data()
    assert train(out="one") == train(out="two") == train(out="other", seed=1) == 0
    assert same_weights("one/last.pt", "two/last.pt")
    assert not same_weights("one/last.pt", "other/last.pt")


# 6. Inference
# --------------------------------------------------------------------------------------------------
WINDOWS = [  # volume, patch, overlap, another grid
    ((20, 9, 10), (8, 8, 8), 0.5, (25, 13, 10)),
    ((9, 21, 8), (8, 8, 8), 0.25, (18, 29, 5)),
    ((17, 4, 20), (8, 4, 8), 0.0, (9, 8, 33)),
    ((5, 12, 3), (8, 8, 4), 0.5, (5, 12, 12)),
    ((13, 11, 17), (4, 6, 8), 0.7, (6, 5, 7)),
    ((8, 8, 8), (8, 8, 8), 0.5, (8, 9, 31)),
    ((3, 2, 4), (8, 8, 8), 0.5, (1, 1, 9)),
    ((10, 11, 23), (8, 4, 4), 0.6, (40, 11, 2)),
    ((1, 9, 16), (8, 8, 8), 0.5, (4, 1, 17)),
]


@pytest.mark.parametrize("shape, patch, overlap, other", WINDOWS)
def test_trap_14_sliding_window_is_the_plain_one(shape, patch, overlap, other):
    nets = networks(4)
    volume = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    with torch.no_grad():
        total = plain_windows(nets, volume, patch, 4, overlap)
    prob = total / total.sum(0)
    for size in (None, shape, other):
        want = prob
        if size == other:
            want = F.interpolate(prob[None], other, mode="trilinear", align_corners=False)[0]
        best = want.topk(2, dim=0).values
        clear = (best[0] - best[1] > 1e-5).numpy()  # where rounding does not decide
        got = cps.sliding_window(nets, volume, patch, 4, overlap=overlap, shape=size)
        assert got.dtype == np.uint8
        assert got.shape == (size or shape)
        assert clear.mean() > 0.95
        assert np.array_equal(got[clear], want.argmax(0).numpy()[clear])


@pytest.mark.parametrize("shape, patch, overlap, other", WINDOWS)
def test_trap_14_sums_of_the_windows_come_slice_by_slice_without_padding(
    shape, patch, overlap, other
):
    nets = networks(4)
    volume = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    with torch.no_grad():
        want = plain_windows(nets, volume, patch, 4, overlap)
        planes = cps.window_sums(nets, volume, np.array(patch), 4, overlap, "cpu", 2**29)
        got = torch.stack(list(planes), dim=3)  # all kept: none may be a view of the slab
    assert got.shape == (4, *shape)
    assert torch.allclose(got, want.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape, patch, overlap, other", WINDOWS)
def test_trap_14_sliding_window_of_the_identity_is_the_volume(shape, patch, overlap, other):
    def identity(x):  # in half precision, as under autocast
        return -30 * (x - torch.arange(5).view(1, 5, 1, 1, 1)).abs().half()

    volume = np.random.default_rng(0).integers(0, 5, shape).astype(np.float16)
    got = cps.sliding_window([identity], volume, patch, 5, overlap=overlap)
    assert np.array_equal(got, volume)
    again = cps.sliding_window([identity], volume, patch, 5, overlap=overlap, slab_bytes=0)
    assert np.array_equal(again, volume)


def shares_of_ball(shape, centre, radius, factor):
    """Share of each voxel of a grid, `factor` as fine as the working one, that lies in a ball."""
    parts = 4  # points of a voxel, on each axis
    axes = []
    for size, middle in zip(shape, centre):
        points = (np.arange(size * parts) + 0.5) / parts / factor
        axes.append((points - middle) ** 2)
    inside = axes[0][:, None, None] + axes[1][:, None] + axes[2] < radius**2
    return inside.reshape(shape[0], parts, shape[1], parts, shape[2], parts).mean((1, 3, 5))


@pytest.mark.parametrize("factor", [1.25, 1.5, 2, 4])
def test_probabilities_are_resampled_not_labels(factor):
    """A network that knows the share of an organ in a voxel, on scans that are finer by a factor.

    Labels enlarged by nearest neighbours reach about 0.92, interpolated probabilities 0.98.
    """

    def oracle(x):
        share = x.clamp(1e-6, 1 - 1e-6)
        return torch.cat((1 - share, share), dim=1).log()

    rng = np.random.default_rng(0)
    shape = (20, 20, 20)
    finer = tuple(int(size * factor) for size in shape)
    linear = []
    nearest = []
    for radius in (3, 4, 5, 6):
        centre = rng.uniform(8, 12, 3)
        share = shares_of_ball(shape, centre, radius, 1).astype(np.float32)
        ref = shares_of_ball(finer, centre, radius, factor) > 0.5
        got = cps.sliding_window([oracle], share, PATCH, 2, shape=finer)
        linear.append(cps.dice(got > 0, ref))
        coarse = torch.from_numpy(share > 0.5).float()[None, None]
        enlarged = F.interpolate(coarse, finer, mode="nearest-exact")[0, 0].numpy() > 0
        nearest.append(cps.dice(enlarged, ref))
    assert np.mean(nearest) < 0.95  # there is something to gain
    assert np.mean(linear) >= 0.97
    assert min(linear) > 0.95


def test_largest_components_are_those_of_the_whole_volume():
    labels = np.random.default_rng(0).integers(0, 4, (12, 11, 10)).astype(np.uint8)
    before = labels.copy()
    for ids in ([1, 2, 3], [2], []):
        want = np.zeros_like(labels)
        for i in (1, 2, 3):
            parts, n = ndimage.label(labels == i)
            largest = 1 + np.argmax([(parts == k + 1).sum() for k in range(n)])
            want[parts == largest if i in ids else parts > 0] = i
        assert np.array_equal(cps.largest_components(labels, ids), want)
        assert want.any()
        assert np.array_equal(labels, before)
    assert not cps.largest_components(np.zeros_like(labels), [1, 2]).any()


def kidneys():
    """Image and label of two boxes of label 1 and, between them, one of label 5."""
    label = np.zeros(SHAPE, np.uint8)
    label[1:5, 3:8, 2:7] = 1
    label[10:15, 3:8, 2:7] = 1
    label[6:9, 3:8, 2:7] = 5
    return (30 * label.astype(np.int16)), label


def test_labels_of_two_pieces_keep_them(capsys):
    """Both kidneys as one label: a perfect segmentation scores 1, a second spleen goes."""
    image, label = kidneys()
    make_data(image=image, label=label)
    config = cps.Config(**TINY)
    split = cps.prepare(cps.split_cases(config), config)
    run = cps.Run(config, IDS, cps.one_piece(split["labelled"], IDS))
    assert run.one_piece == [5]

    def oracle(x):  # the 3 values of the image, z-scored
        values = torch.tensor(known, dtype=torch.float32).view(1, 3, 1, 1, 1)
        return -50 * (x.float() - values).abs()

    volume = split["val"][0].array("image").astype(np.float32)
    known = [np.median(volume[label == i]) for i in (0, 1, 5)]
    run.networks = [oracle, oracle]
    found = cps.segment(run, volume)
    assert np.array_equal(found[:-1], label[:-1])
    assert cps.validate(run, split["val"]) == pytest.approx(1.0)
    spots = volume.copy()
    spots[2, 11, 8] = known[2]  # far from the rest of label 5
    assert np.array_equal(cps.segment(run, spots)[:-1], label[:-1])
    assert cps.segment(run, spots, largest=False)[2, 11, 8] == 5


def test_a_label_is_in_one_piece_if_99_percent_of_each_case_are():
    def case(**labels):
        facts = {"labels": {name[1:]: share for name, share in labels.items()}}
        return cps.Case("c", pathlib.Path("c"), facts=facts)

    cases = [case(_1=1.0, _2=0.5, _3=0.99, _4=0.9899), case(_1=1.0, _2=1.0, _3=1.0, _4=1.0)]
    assert cps.one_piece(cases, [1, 2, 3, 4]) == [1, 3]
    labels = np.zeros((30, 10, 10), np.uint8)
    labels[:9, :, :] = 7  # 900 voxels
    labels[20, :, 0] = 7  # and 10
    assert cps.label_points(labels)[1] == {"7": pytest.approx(900 / 910)}


def test_predict_keeps_one_component_only_of_labels_in_one_piece(trained, monkeypatch, capsys):
    """Both labels of the trained run are in one piece; --no-largest keeps all."""
    image, label = kidneys()
    write("in/scan.nii.gz", image)
    classes = np.searchsorted([0, *IDS], label).astype(np.uint8)
    monkeypatch.setattr(cps, "sliding_window", lambda *_, **__: classes)
    best = f"{trained}/native/best.pt"
    assert cps.main(["predict", best, "in", "cut"]) == 0
    assert cps.main(["predict", best, "in", "whole", "--no-largest"]) == 0
    state = torch.load(best, weights_only=True)
    assert state["one_piece"] == IDS
    torch.save(state | {"one_piece": [5]}, "kidneys.pt")
    assert cps.main(["predict", "kidneys.pt", "in", "kept"]) == 0
    found = {
        out: np.asarray(nib.load(f"{out}/scan.nii.gz").dataobj) for out in ("cut", "whole", "kept")
    }
    assert np.array_equal(found["whole"], label)
    assert np.array_equal(found["kept"], label)
    label[1:5] = 0  # the smaller kidney
    assert np.array_equal(found["cut"], label)


# 7. Dice
# --------------------------------------------------------------------------------------------------
def test_trap_10_the_checkpoint_is_not_chosen_for_what_it_does_not_find(monkeypatch):
    """A label counts in the cases that hold it: mean over these cases, then over the labels."""
    make_data()
    config = cps.Config(**TINY | {"val": 3.0})
    _, label = phantom(0)
    absent = np.where(label == 5, 0, label).astype(np.uint8)
    for name, array in zip(sorted(names(config, "val")), (label, absent, absent)):
        write(f"data/labelsTr/{name}.nii.gz", array)
    cases = cps.prepare(cps.split_cases(config), config)["val"]
    cases.sort(key=lambda case: case.name)
    run = cps.Run(config, IDS, IDS)

    def judge(segment):
        with monkeypatch.context() as patch:
            patch.setattr(cps, "segment", segment)
            return cps.validate(run, cases)

    answers = iter((label, absent, absent))
    table = judge(lambda *_, **__: next(answers))
    assert np.array_equal(table, [[1, 1], [1, np.nan], [1, np.nan]], equal_nan=True)
    forgotten = judge(lambda *_, **__: absent)
    assert np.array_equal(forgotten, [[1, 0], [1, np.nan], [1, np.nan]], equal_nan=True)
    assert cps.mean_dice(table) == 1 and cps.mean_dice(forgotten) == 0.5
    answers = iter((label, label, absent))  # found in vain: no say, as it is not in the case
    assert cps.mean_dice(judge(lambda *_, **__: next(answers))) == 1


def test_mean_dice_is_a_mean_over_cases_then_over_labels():
    nan = np.nan
    table = np.array([[0.9, nan, 0.1, nan], [0.7, 0.5, 0.2, nan], [0.2, nan, 0.3, nan]])
    assert cps.mean_dice(table) == pytest.approx((0.6 + 0.5 + 0.2) / 3)
    assert math.isnan(cps.mean_dice(np.zeros((0, 4)))) and math.isnan(cps.mean_dice(table[:, 3:]))


# 8. Scans
# --------------------------------------------------------------------------------------------------
def test_trap_10_split_is_disjoint_and_test_cases_do_not_depend_on_the_seed():
    make_data(labelled=12)
    parts = ("labelled", "unlabelled", "val", "test")
    splits = []
    for seed in range(6):
        config = cps.Config(**TINY | {"test": 3.0, "seed": seed})
        splits.append([names(config, part) for part in parts])
        assert splits[-1] == [names(config, part) for part in parts]  # of one seed: equal
    for split in splits:
        assert [*map(len, split)] == [2, 12 - 2 - 2 - 3 + 2, 2, 3]
        assert len(set().union(*split)) == 12 + 2
        assert split[3] == splits[0][3]
    assert len({frozenset(split[2]) for split in splits}) > 1


def test_draws_of_the_split_stay_those_of_earlier_versions():
    config = cps.Config(labelled=3, val=2.0, test=0.2, seed=4)
    for cases in (range(10), reversed(range(10))):  # in whatever order they are listed
        assert cps.draw_split(config, [f"c{i}" for i in cases]) == {
            "labelled": ["c9", "c1", "c5"],
            "unlabelled": ["c7", "c0", "c8"],
            "val": ["c3", "c2"],
            "test": ["c4", "c6"],
        }


def test_cases_of_imagests_with_labels_are_the_test_cases():
    make_data()
    for i, name in enumerate(("t0", "t1", "t2")):
        image, label = phantom(20 + i)
        write(f"data/imagesTs/{name}_0000.nii.gz", image)
        if name != "t2":
            write(f"data/labelsTs/{name}.nii.gz", label)
    assert names(cps.Config(**TINY), "test") == {"t0", "t1"}
    drawn = names(cps.Config(**TINY | {"test": 1.0}), "test")
    assert len(drawn) == 1 and drawn <= {f"c{i}" for i in range(6)}
    result = cps.train(cps.Config(**TINY | {"epochs": 1}))
    assert {*result["results"]} == {"t0", "t1"}

    split = json.loads(pathlib.Path("run/split.json").read_text())  # a run's own, for another run
    config = cps.Config(**TINY | {"split": "run/split.json", "seed": 7, "labelled": 0})
    assert {
        part: [case.name for case in cases] for part, cases in cps.split_cases(config).items()
    } == split


def test_trap_10_checkpoint_is_chosen_on_validation_cases_only():
    """Other labels of the test cases change their scores and nothing else."""
    make_data(labelled=8)
    assert train(out="one", test=2.0) == 0
    config = cps.Config(**TINY | {"out": "two", "test": 2.0})
    tests = names(config, "test")
    for name in tests:
        write(f"data/labelsTr/{name}.nii.gz", np.roll(phantom(int(name[1:]))[1], 5, axis=0))
    result = cps.train(config)
    assert same_weights("one/best.pt", "two/best.pt")
    assert table_of("one/log.csv") == table_of("two/log.csv")
    best = max(float(row["dice"]) for row in table_of("two/log.csv"))
    assert result["best_dice"] == pytest.approx(best, rel=1e-4) and result["steps"] == 6
    assert {*result["results"]} == tests and os.path.samefile(result["checkpoint"], "two/best.pt")


def test_trap_11_clip_comes_before_the_z_score():
    image, label = phantom(0, PATCH)
    image[0, 0, 0] = 30000  # an implant
    image[1, 1, 1] = -30000  # and a hole
    make_data(image=image, label=label)
    image = np.clip(image.astype(float), -68, 200)
    want = (image - image.mean()) / image.std(ddof=1)
    for got in patches(**STILL)[0]["labelled"][:, 0]:  # the cache is float16
        assert np.allclose(got.flatten()[:-1], want.flatten()[:-1], rtol=2e-3, atol=2e-3)


def test_trap_11_label_ids_are_never_averaged():
    """1 and 5 side by side: linear interpolation would make 2, 3 and 4 between them."""
    make_data(label=np.repeat(np.uint8(IDS), (7, 9)).reshape(-1, 1, 1) * np.ones(SHAPE, np.uint8))
    data = patches(spacing=(0.7, 1.3, 2.1), spatial=1.0)
    found = torch.cat([data[i]["target"] for i in range(8)]).unique().tolist()
    assert found in ([1, 2], [-1, 1, 2])


def test_resampling_to_a_spacing_keeps_size_and_place():
    volume = np.repeat(np.arange(12.0, dtype=np.float32), 10 * 8).reshape(12, 10, 8)
    config = cps.Config(**TINY | {"spacing": (2.0, 1.0, 3.0), "clip": (0.0, 11.0)})
    got = cps.preprocess(volume.copy(), np.array(MM), config, "a")  # from 1 x 2 x 3 mm
    assert got.shape == (6, 20, 8)
    want = volume.reshape(6, 2, 10, 8).mean(1).repeat(2, axis=1)  # centres lie between two voxels
    assert np.allclose(got, (want - want.mean()) / want.std(ddof=1), atol=1e-5)


@pytest.mark.parametrize("shape", [(7, 9, 11), (20, 15, 12), (12, 10, 30)])
def test_resampled_labels_are_those_of_the_largest_share(shape):
    """The largest of the linearly interpolated shares wins."""
    noise = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((12, 11, 10)), 1)
    labels = np.uint8([0, 3, 200])[np.digitize(noise, np.quantile(noise, (0.5, 0.75)))]
    centres = []
    for new, old in zip(shape, labels.shape):
        centres.append(np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1))
    places = np.meshgrid(*centres, indexing="ij")
    shares = []
    for label in (0, 3, 200):
        shares.append(ndimage.map_coordinates((labels == label).astype(float), places, order=1))
    least, most = np.sort(shares, axis=0)[1:]
    clear = most - least > 1e-5  # where rounding does not decide
    got = cps.resample_labels(labels, shape)
    assert got.dtype == np.uint8 and got.shape == shape and clear.mean() > 0.9
    assert np.array_equal(got[clear], np.uint8([0, 3, 200])[np.argmax(shares, axis=0)][clear])
    assert np.array_equal(cps.resample_labels(labels, labels.shape), labels)


@pytest.mark.parametrize("part", ["labelled", "val"])
def test_a_scan_on_both_sides_of_a_split_is_a_leak(part, capsys):
    make_data()
    name = min(names(cps.Config(**TINY), part))
    shutil.copy(f"data/imagesTr/{name}.nii.gz", "data/imagesUn/again.nii.gz")
    assert train() == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "again.nii.gz" in error and f"{name}.nii.gz" in error and not os.path.exists("run")


def test_a_scan_that_is_unlabelled_twice_is_a_warning(capsys):
    make_data()
    shutil.copy("data/imagesUn/u6.nii", "data/imagesUn/again.nii")
    assert train(epochs=1) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ") and "again.nii" in warning and "u6.nii" in warning


def test_what_memory_or_disk_cannot_hold_is_refused_before_it_is_prepared(monkeypatch, capsys):
    make_data()
    with monkeypatch.context() as patch:
        free = shutil.disk_usage(".")._replace(free=10_000)
        patch.setattr(shutil, "disk_usage", lambda path: free)
        assert train() == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert "--cache cache" in error and "--no-check" in error
        assert not os.listdir("cache") and not os.path.exists("run")
        assert train("--no-check", epochs=1, out="other") == 0
    shutil.rmtree("cache")

    monkeypatch.setattr(cps, "memory_bytes", lambda: 900_000)  # a step takes 1.08 MB
    assert train() == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "--preset quick" in error and "--batch" in error and "--no-check" in error
    assert not os.path.exists("run/last.pt")
    assert not os.path.exists("cache") or not os.listdir("cache")


GRIDS = [  # mm of a voxel of the image, of the label; mm it is shifted by; shape; whether it fits
    (0.02, 0.029, 0, (16, 14, 10), False),
    (1.0, 1.0 + 4.9 / 512, 0, (512, 4, 4), False),
    (2.0, 2.0, 0.02, (16, 14, 10), True),
    (2.0, 2.0, 0.19, (16, 14, 10), True),
    (2.0, 2.0, 0.21, (16, 14, 10), False),
    (5.0, 5.0, 0.4, (16, 14, 10), True),
    (0.5, 0.5, 0.06, (16, 14, 10), False),
    (1.0, 1.0 + 0.09 / 512, 0, (512, 1, 1), True),
]


@pytest.mark.parametrize("mm, label_mm, shift, shape, fits", GRIDS)
def test_grids_are_compared_by_their_corners(mm, label_mm, shift, shape, fits, capsys):
    image = np.random.default_rng(0).integers(0, 2, shape).astype(np.uint8)
    moved = np.diag((label_mm, label_mm, label_mm, 1))
    moved[0, 3] = shift
    write("in/ref.nii", image, np.diag((mm, mm, mm, 1)))
    write("in/pred.nii", image, moved)
    assert cps.main(["evaluate", "in/pred.nii", "in/ref.nii"]) == (0 if fits else 2)
    if not fits:
        (error,) = errors_of(capsys)
        assert error.startswith("in/pred.nii")
        assert "that of in/ref.nii" in error
        found = re.search(r"([\d.e-]+) voxels\D+([\d.e-]+) mm", error)
        ends = [max(0.5, size - 0.5) * (label_mm - mm) for size in shape]
        apart = np.linalg.norm([ends[0] + shift, *ends[1:]])
        want = [apart / mm, apart]
        assert [float(number) for number in found.groups()] == pytest.approx(want, rel=0.01)


def test_a_tilt_is_seen_at_the_corners():
    scan = nib.Nifti1Image(np.zeros((200, 200, 4), np.uint8), np.eye(4))
    for angle, fits in ((0.0002, True), (0.002, False)):
        turn = np.eye(4)
        turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        other = nib.Nifti1Image(np.zeros((200, 200, 4), np.uint8), turn)
        with nullcontext() if fits else pytest.raises(cps.UserError):
            cps.check_grid(other, scan)


def test_the_affine_is_the_one_source_of_spacing():
    """pixdim says 9 mm, sform says MM."""
    ref = phantom(0)[1]
    pred = np.roll(ref, 1, axis=2)
    pixdim = [1, 9, 9, 9, 0, 0, 0, 0]
    for name, volume in (("ref", ref), ("pred", pred)):
        pathlib.Path(f"{name}.nii").write_bytes(nifti(volume, pixdim=pixdim))
    assert cps.main(["evaluate", "pred.nii", "ref.nii", "--csv", "s.csv"]) == 0
    for i, row in zip(IDS, table_of("s.csv"), strict=True):
        want = [
            f(pred == i, ref == i, MM, *more)
            for f, *more in ((plain_surface_dice, 2.0), (plain_hd95,))
        ]
        assert [float(row["nsd"]), float(row["hd95"])] == pytest.approx(want)
    make_data()
    for path in sorted(pathlib.Path("data").glob("*Tr/*")):
        scan = nib.load(path)
        content = nifti(np.asarray(scan.dataobj), pixdim=pixdim)
        path.write_bytes(gzip.compress(content))
    config = cps.Config(**TINY)
    for case in cps.prepare(cps.split_cases(config), config)["labelled"]:
        assert case.spacing == MM


NAMES = [  # images, labels, the cases and whether they have labels
    ("a.NII.GZ b.Nii", "a.nii b.NII.gz", {"a": True, "b": True}),
    ("c_0000_0000.nii c_0001_0000.nii", "c_0000.nii c_0001.nii", {"c_0000": True, "c_0001": True}),
    ("c_0000.nii c_0001.nii", "c_0000.nii c_0001.nii", {"c_0000": True, "c_0001": True}),
    ("c_0000.nii c_0001.nii", "c_0000.nii", {"c_0000": True, "c_0001": False}),
    ("X_0000.nii Y_0000.nii", "X_0000.nii Y.nii", {"X_0000": True, "Y": True}),
    ("X_0000.nii", "X_0000.nii", {"X_0000": True}),
    ("X_0000.nii", "X.nii", {"X": True}),
    ("s_0000.nii s_0002.nii", "", {"s_0000": False, "s_0002": False}),
    ("s_0000.nii s_0001.nii s_0002.nii", "", {"s_0000": False, "s_0001": False, "s_0002": False}),
    ("a_0000.nii.gz b_0000.nii", "", {"a": False, "b": False}),
    ("a_0000.nii b.nii", "", {"a_0000": False, "b": False}),
    ("a.b.nii.gz a.nii", "a.b.nii", {"a.b": True, "a": False}),
    # Two patients with two scans each, of which the first has a label.
    (
        "p_0000.nii p_0001.nii q_0000.nii q_0001.nii",
        "p_0000.nii q_0000.nii",
        {"p_0000": True, "p_0001": False, "q_0000": True, "q_0001": False},
    ),
]


def make_names(images, labels):
    for folder, files in (("images", images), ("labels", labels)):
        os.mkdir(folder)
        for file in files.split():
            pathlib.Path(folder, file).touch()
    return ("images", "labels" if labels else None)


@pytest.mark.parametrize("images, labels, cases", NAMES)
def test_names_of_cases(images, labels, cases):
    found = cps.list_cases(*make_names(images, labels))
    assert {case.name: case.label is not None for case in found} == cases
    assert len(found) == len(cases)
    for case in found:
        assert case.image.name.startswith(case.name)
        assert case.label is None or case.label.name.startswith(case.name)


@pytest.mark.parametrize(
    "images, labels, word",
    [
        ("a_0000.nii a_0001.nii", "a.nii", "have channels"),
        ("a_0000.nii a_0001.nii b_0000.nii b_0001.nii", "", "channel"),
        ("a.nii a.nii.gz", "", "a.nii"),  # two files of a case
        ("a.nii.gz a.NII.GZ", "", "a."),
        ("a.nii", "a.nii a.nii.gz", "a.nii"),
        ("a_0000.nii a_0000.nii.gz", "a.nii", "a_0000"),
        ("a.nii", "a_0000.nii", "a_0000"),  # a label without an image
        ("a.mha .b.nii", "", "images"),
    ],
)
def test_names_that_are_refused(images, labels, word):
    with pytest.raises(cps.UserError, match=re.escape(word)):
        cps.list_cases(*make_names(images, labels))


def test_a_name_of_two_lines_is_a_name(tmp_path):
    path = tmp_path / "a\nb.nii"
    path.touch()
    assert cps.list_scans(tmp_path) == {"a\nb": path}


def test_predict_and_evaluate_keep_ids_that_end_like_channels(trained):
    for name in ("scan_0000", "scan_0002"):
        write(f"scans/{name}.nii.gz", phantom(7 + len(os.listdir(".")))[0])
    assert cps.main(["predict", f"{trained}/native/best.pt", "scans", "out"]) == 0
    assert {*os.listdir("out")} == {"scan_0000.nii.gz", "scan_0002.nii.gz"}
    names = {"scan_0000", "scan_0001", "t_0000", "t_0001"}  # four cases, no channels
    for name in names:
        write(f"p/{name}.nii", phantom(0)[1])
        write(f"r/{name}.NII.GZ", phantom(0)[1])
    assert cps.main(["evaluate", "p", "r", "--csv", "s.csv"]) == 0
    assert {row["case"] for row in table_of("s.csv")} == names
    assert {row["dice"] for row in table_of("s.csv")} == {"1.0"}


def test_files_with_capital_endings_are_trained_on():
    make_data()
    for path in pathlib.Path("data").glob("*/*"):
        path.rename(str(path).replace(".nii", ".NII").replace(".gz", ".GZ"))
    assert train() == 0
    assert cps.main(["predict", "run/best.pt", "data/imagesUn", "out"]) == 0
    assert len(os.listdir("out")) == 2


@pytest.mark.parametrize("shape", [(6, 20, 13), (31, 9, 30), (16, 14, 5), (1, 1, 1)])
def test_labels_are_resampled_class_by_class(shape):
    smooth = ndimage.gaussian_filter(
        np.random.default_rng(0).standard_normal((4, *SHAPE)), (0, 1, 1, 1)
    )
    labels = np.array([0, 1, 5, 255], np.uint8)[smooth.argmax(0)]
    one_hot = torch.from_numpy(np.stack([labels == i for i in range(256)])).float()
    want = F.interpolate(one_hot[None], shape, mode="trilinear", align_corners=False)[0]
    best = want.topk(2, dim=0).values
    clear = (best[0] - best[1] > 1e-6).numpy()  # where rounding does not decide
    got = cps.resample_labels(labels, shape)
    assert got.dtype == np.uint8
    assert got.shape == shape
    assert clear.mean() > 0.5 or shape == (1, 1, 1)
    assert np.array_equal(got[clear], want.argmax(0).numpy()[clear])
    assert np.array_equal(cps.resample_labels(labels, SHAPE), labels)


def test_prepared_points_are_a_permutation_of_all():
    labels = phantom(0, (40, 30, 20))[1]
    labels[20:, 15:] = 9
    points, _ = cps.label_points(labels)
    rng = np.random.default_rng(0)
    want = []
    for label in np.unique(labels[labels > 0]):
        some = rng.permutation(np.argwhere(labels == label))[:1000]
        want.append(np.insert(some, 0, label, axis=1))
    assert points.dtype == np.int32
    assert np.array_equal(points, np.concatenate(want))
    assert cps.label_points(labels * 0)[0].shape == (0, 4)


def body(kind):
    """A phantom in a body with air around it: ct, shifted (ct + 1024), mr, chest (much air)."""
    hu, label = phantom(0)
    image = np.full((32, 28, 20), -1000, np.int16)
    inside = (slice(8, 24), slice(7, 21), slice(5, 15))
    image[inside] = hu + 40
    labels = np.zeros(image.shape, np.uint8)
    labels[inside] = label
    if kind == "shifted":
        image += 1024
    if kind == "mr":
        image = np.where(image == -1000, 5, image * 3 + 300).astype(np.int16)
    if kind == "chest":
        image[10:22, 9:12] = -850
    return image, labels


@pytest.mark.parametrize(
    "kind, clip, warned",
    [
        ("ct", "-68 200", False),
        ("chest", "-68 200", False),
        ("shifted", "-68 200", True),
        ("mr", "-68 200", True),
        ("mr", "auto", False),
        ("shifted", "auto", False),
        ("shifted", "956 1224", False),
    ],
)
def test_intensities_that_do_not_fit_the_window_are_warned_of(kind, clip, warned, capsys):
    image, label = body(kind)
    image[-1, -1, -1] = np.median(image[label > 0])  # make_data adds to it: no case is a copy
    make_data(image=image, label=label, labelled=4)
    assert train("--clip", *clip.split(), epochs=1, epoch_steps=1) == 0
    sentences = errors_of(capsys, "warning")
    assert len(sentences) == warned
    if warned:
        assert "--clip auto" in sentences[0]
        assert "6 in all" in sentences[0]  # one line for all the cases


@pytest.mark.parametrize(
    "factor, spacing, warned", [(1.9, (), 0), (2.1, (), 1), (2.1, (1.0, 2.0, 3.0), 0)]
)
def test_spacings_that_vary_are_warned_of(factor, spacing, warned, capsys):
    make_data()
    write("data/imagesUn/u6.nii", phantom(6)[0], np.diag((1, 2, 3 * factor, 1)))
    more = {"spacing": spacing} if spacing else {}
    assert train(epochs=1, epoch_steps=1, **more) == 0
    sentences = errors_of(capsys, "warning")
    assert len(sentences) == warned
    assert all("--spacing" in sentence and "6.3" in sentence for sentence in sentences)


def forms(qform, sform):
    """Bytes of a scan with these diagonals as qform and sform; None: its code is 0."""
    scan = nib.Nifti1Image(phantom(6)[0], None)
    scan.set_qform(np.diag((*(qform or MM), 1)), 1 if qform else 0)
    scan.set_sform(np.diag((*(sform or MM), 1)), 1 if sform else 0)
    return scan.to_bytes()


@pytest.mark.parametrize(
    "qform, sform, warned",
    [
        (None, None, True),
        ((1, 2, 3), None, False),
        (None, (1, 2, 3), False),
        ((1, 2, 3), (1, 2, 3), False),
        ((-1, -2, 3), (-1, -2, 3), False),
        ((-1, 2, 3), (1, 2, 3), True),
        ((1, 2, 3), (-1, 2, 3), True),
        ((-1, -2, 3), (1, 2, 3), True),  # LPS and RAS, the mistake that is common
    ],
)
def test_forms_that_may_swap_the_sides_are_warned_of(qform, sform, warned, capsys):
    make_data()
    pathlib.Path("data/imagesUn/u6.nii").write_bytes(forms(qform, sform))
    assert train(epochs=1, epoch_steps=1) == 0
    sentences = errors_of(capsys, "warning")
    assert len(sentences) == warned
    assert all("u6" in sentence for sentence in sentences)


@pytest.mark.parametrize("highest, warned", [(255, True), (254, False), (6, False)])
def test_an_ignore_label_is_warned_of(highest, warned, capsys):
    label = phantom(0)[1]
    label[0] = highest
    make_data(label=label)
    assert train(epochs=1, epoch_steps=1) == 0
    sentences = errors_of(capsys, "warning")
    assert len(sentences) == warned
    assert all("255" in sentence for sentence in sentences)


def test_labels_that_vanish_or_lack_an_example_are_warned_of(capsys):
    make_data()
    parts = {part: sorted(names(cps.Config(**TINY), part)) for part in ("labelled", "val")}
    for part, extra in (("labelled", 7), ("val", 8)):
        label = phantom(int(parts[part][0][1:]))[1]
        label[0, 0, 0] = 9  # a voxel
        label[:, 12:] = extra
        write(f"data/labelsTr/{parts[part][0]}.nii.gz", label)
    assert train(spacing=(4.0, 4.0, 6.0), epochs=1, epoch_steps=1) == 0
    sentences = errors_of(capsys, "warning")
    assert any("[9]" in s and "vanish" in s and parts["labelled"][0] in s for s in sentences)
    assert any("labelled" in s and "[8]" in s for s in sentences)
    assert any("val" in s and "[7]" in s for s in sentences)
    assert len(sentences) == 3


def test_an_empty_label_is_a_warning(capsys):
    make_data()
    case = sorted(names(cps.Config(**TINY), "labelled"))[0]
    write(f"data/labelsTr/{case}.nii.gz", np.zeros(SHAPE, np.uint8))
    assert train(epochs=1, epoch_steps=1) == 0
    (sentence,) = errors_of(capsys, "warning")
    assert case in sentence


SPLIT = {"labelled": ["c0", "c1"], "unlabelled": ["c4", "u6"], "val": ["c2"], "test": ["c3"]}


def test_shares_of_cases_are_rounded_up():
    names = [f"c{i}" for i in range(7)]
    split = cps.draw_split(cps.Config(**TINY | {"val": 0.2, "test": 0.3, "labelled": 1}), names)
    assert [len(split[part]) for part in cps.PARTS] == [1, 1, 2, 3]


def test_two_unlabelled_folders_that_cannot_be_told_apart(capsys):
    make_data()
    for place in ("one", "two"):
        write(f"{place}/a/b/ct_0.nii", phantom(len(place) + ord(place[0]))[0])
    assert train(unlabelled=("one/a/b", "two/a/b")) == 2
    (error,) = errors_of(capsys)
    assert "two/a/b/ct_0.nii" in error and "rename" in error


def test_a_split_with_fewer_labels_than_asked_for_is_refused(capsys):
    make_data()
    parts = {"labelled": ["c1", "c2"], "unlabelled": ["c3"], "val": ["c4"], "test": []}
    pathlib.Path("split.json").write_text(json.dumps(parts))
    assert train(split="split.json", labelled=3) == 2
    assert "--labelled 3" in errors_of(capsys)[0]
    assert train(split="split.json", labelled=2) == 0


def test_no_dice_is_told_of_val_cases_that_hold_no_label(capsys):
    make_data()
    write("data/labelsTr/c4.nii.gz", np.zeros(SHAPE, np.uint8))
    parts = {"labelled": ["c1", "c2"], "unlabelled": ["c3"], "val": ["c4"], "test": ["c5"]}
    pathlib.Path("split.json").write_text(json.dumps(parts))
    assert train(split="split.json", labelled=0) == 0
    assert "that chose it" not in capsys.readouterr().out
    parts["val"] = ["c0"]
    pathlib.Path("split.json").write_text(json.dumps(parts))
    assert train(split="split.json", labelled=0, out="two") == 0
    assert "on the 1 cases that chose it" in capsys.readouterr().out


def test_a_flag_without_text_is_a_flag_that_is_not_given():
    given = cps.config_from("train", data="data", out="", cache="", split="")
    assert given == cps.config_from("train", data="data")


def test_a_split_of_a_file():
    make_data()
    pathlib.Path("mine.json").write_text(json.dumps(SPLIT))
    config = cps.Config(**TINY | {"split": "mine.json"})
    for part, cases in SPLIT.items():
        assert names(config, part) == {*cases}
    assert all(case.label is None for case in cps.split_cases(config)["unlabelled"])
    assert train(split="mine.json", out="one") == 0
    assert json.loads(pathlib.Path("one/split.json").read_text()) == SPLIT
    assert train(split="one/split.json", out="two") == 0  # a run's own
    assert same_weights("one/last.pt", "two/last.pt")


@pytest.mark.parametrize(
    "text, word",
    [
        ("{", "mine.json"),
        ("[1, 2]", "mine.json"),
        ('{"labelled": 3}', "mine.json"),
        ('{"labelled": [["c0"]]}', "mine.json"),
        ("{}", "mine.json"),
        (json.dumps(SPLIT | {"labelled": ["c0", "nobody"]}), "nobody"),
        (json.dumps(SPLIT | {"val": ["u7"]}), "u7"),  # without a label
        (json.dumps(SPLIT | {"val": ["c0"]}), "c0"),  # a leak
        (json.dumps(SPLIT | {"labelled": ["c0", "c0"]}), "more than once"),
        (json.dumps(SPLIT | {"unlabelled": ["c3"]}), "c3"),
        (json.dumps(SPLIT | {"unlabelled": []}), "unlabelled"),
        (json.dumps(SPLIT | {"validation": ["c1"]}), "validation"),
    ],
)
def test_a_split_that_cannot_be(text, word, capsys):
    make_data()
    pathlib.Path("mine.json").write_text(text)
    assert train(split="mine.json") == 2
    (error,) = errors_of(capsys)
    assert word in error
    assert not os.path.exists("run")


@pytest.mark.parametrize("images", ["imagesTr", "imagesTs"])
def test_the_next_command_that_train_prints_works(images, capsys):
    make_data()
    if images == "imagesTs":
        write("data/imagesTs/t0.nii.gz", phantom(20)[0])
    assert train(epochs=1) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next")]
    _, python, script, *argv = line.split()
    assert (python, script) == ("python", "cps.py")
    assert argv[2] == f"data/{images}"
    assert cps.main(argv) == 0
    assert len(os.listdir("run/predictions")) == len(os.listdir(f"data/{images}"))


def test_labelled_imagesTs_are_the_test_cases():
    make_data()
    for i in (20, 21, 22):
        image, label = phantom(i)
        write(f"data/imagesTs/t{i}.nii.gz", image)
        if i < 22:
            write(f"data/labelsTs/t{i}.nii.gz", label)
    config = cps.Config(**TINY)
    assert names(config, "test") == {"t20", "t21"}
    everyone = set().union(*(names(config, part) for part in cps.PARTS))
    assert "t22" not in everyone  # a test image is no training image
    drawn = names(dataclasses.replace(config, test=1.0), "test")
    assert len(drawn) == 1
    assert drawn < {f"c{i}" for i in range(6)}
    assert {*cps.train(config)["results"]} == {"t20", "t21"}
    shutil.rmtree("data/labelsTs")
    assert not names(config, "test")


def test_images_of_one_volume_in_4d_go_with_labels_in_3d(capsys):
    make_data()
    for i in range(6):
        write(f"data/imagesTr/c{i}.nii.gz", phantom(i)[0][..., None])
    assert train() == 0
    assert not errors_of(capsys)
    assert cps.main(["predict", "run/best.pt", "data/imagesTr", "out"]) == 0
    assert nib.load("out/c0.nii.gz").shape == (*SHAPE, 1)
    assert cps.main(["evaluate", "out", "data/labelsTr"]) == 0


def test_equal_names_of_two_hospitals_are_two_cases():
    make_data()
    for seed, folder in enumerate("AB", start=30):
        write(f"{folder}/ct_0.nii.gz", phantom(seed)[0])
    assert train(unlabelled=("A", "B")) == 0
    split = json.loads(pathlib.Path("run/split.json").read_text())
    found = [name for name in split["unlabelled"] if "ct_0" in name]
    assert len(found) == 2
    assert [any(folder in re.split("[^A-Z]", name) for name in found) for folder in "AB"] == [
        True
    ] * 2


def test_unlabelled_that_took_the_data_says_so(capsys):
    make_data()
    assert cps.main(["train", "--unlabelled", "data/imagesUn", "data"]) == 2
    (error,) = errors_of(capsys)
    assert "--unlabelled" in error
    assert "DATA" in error
    assert not os.path.exists("runs")


def test_the_same_scan_twice(capsys):
    make_data()
    shutil.copy("data/imagesUn/u6.nii", "data/imagesUn/again.nii")
    assert train() == 0
    (sentence,) = errors_of(capsys, "warning")
    assert "again.nii" in sentence
    assert "u6.nii" in sentence
    write("data/imagesTs/t.nii", phantom(1)[0])
    write("data/labelsTs/t.nii", phantom(1)[1])
    scan = phantom(1)[0]
    scan[-1, -1, -1] += 1  # as make_data does
    write("data/imagesTs/t.nii", scan)
    assert train(out="two") == 2
    assert "t.nii" in "".join(errors_of(capsys))
    assert not os.path.exists("two")


def test_an_absurd_spacing_is_named(capsys):
    make_data()
    assert train(spacing=(0.01, 0.01, 0.01)) == 2
    *each, summary = errors_of(capsys)
    assert len(each) == 8
    assert all("--spacing" in error and "1600" in error and "2800" in error for error in each)
    assert any("c0.nii.gz" in error for error in each)
    assert "data" in summary
    assert not os.path.exists("run")


def test_a_cache_that_cannot_be_written_is_named(capsys):
    make_data()
    assert train(cache="data/imagesTr/c0.nii.gz/cache") == 2
    (error,) = errors_of(capsys)
    assert error.startswith("--cache data/imagesTr/c0.nii.gz/cache")
    assert not os.path.exists("run")


def test_a_cache_without_a_name_lies_in_this_folder():
    """With `--cache ''`, of a variable that is not set, not in the root of the disk."""
    write("in/c.nii", SCAN)
    case = cps.Case("c", pathlib.Path("in/c.nii"))
    with suppress(cps.UserError):
        assert not cps.cache_prefix(case, cps.Config(cache="")).startswith("/")


def test_files_in_memory_make_room_in_a_container(monkeypatch, tmp_path):
    texts = {
        "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n",
        "sys/fs/cgroup/memory.max": "5000000\n",
        "sys/fs/cgroup/memory.current": "4900000\n",
        "sys/fs/cgroup/memory.stat": "anon 7\ninactive_file 3000000\nactive_file 5\n",
    }
    for name, text in texts.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(cps, "Path", lambda name: tmp_path / name.strip("/"))
    assert cps.memory_bytes() == 3_100_000
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert cps.memory_bytes() == 8000 * 1024
    (tmp_path / "proc/meminfo").unlink()
    assert cps.memory_bytes() == np.inf


def test_cases_are_prepared_by_all_cores_where_the_memory_is_unknown(monkeypatch):
    make_data()
    counts = []
    one = cps.for_each

    def for_each(what, items, function, threads=1):
        counts.append(threads)
        return one(what, items, function, threads)

    monkeypatch.setattr(cps, "for_each", for_each)
    monkeypatch.setattr(cps, "memory_bytes", lambda: np.inf)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert train(epochs=1) == 0
    assert counts == [7]


def test_a_full_disk_with_a_full_cache_will_do(monkeypatch):
    make_data()
    assert train(epochs=1, out="one") == 0
    usage = shutil.disk_usage(".")._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert train(epochs=1, out="two") == 0


def test_a_full_disk_is_foreseen(monkeypatch, capsys):
    make_data()
    usage = shutil.disk_usage(".")._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert train() == 2
    (error,) = errors_of(capsys)
    assert error.startswith("--cache cache")
    assert "GB" in error
    assert "--no-check" in error
    assert not os.path.exists("run")
    assert train("--no-check") == 0


def test_a_step_that_memory_cannot_hold_is_refused(monkeypatch, capsys):
    make_data()
    huge = {"patch": (512, 512, 512), "base_channels": 32}
    assert train(**huge) == 2
    (error,) = errors_of(capsys)
    need, free = (float(number) for number in re.findall(r"([\d.]+)(?= GiB| are free)", error))
    assert need > 200 > free > 0
    assert all(word in error for word in ("--patch", "--batch", "--preset quick", "--no-check"))
    assert train(epochs=1) == 0  # nothing was begun in its folder

    monkeypatch.setattr(cps, "memory_bytes", lambda: 200_000)
    assert train(out="two") == 2
    assert "--no-check" in errors_of(capsys)[0]
    assert train("--no-check", out="two") == 0


def test_memory_is_compared_with_all_classes(monkeypatch, capsys):
    label = np.random.default_rng(0).integers(0, 101, SHAPE).astype(np.uint8)
    make_data(label=label)
    config = cps.Config(**TINY)
    monkeypatch.setattr(cps, "memory_bytes", lambda: 2 * cps.costs(config, 2)[3])
    assert cps.costs(config, 101)[3] > cps.memory_bytes()
    assert train() == 2
    assert errors_of(capsys)[0].startswith("--patch")
    assert not os.path.exists("run")


def test_ablate_compares_memory_for_all_its_arms_first(monkeypatch, capsys):
    make_data()
    config = cps.Config(**TINY)
    arms = [dataclasses.replace(config, method=method) for method in ("supervised", "context")]
    tiny = TINY.copy()
    del tiny["data"]
    few, many = (cps.costs(arm, 2)[3] for arm in arms)
    monkeypatch.setattr(cps, "memory_bytes", lambda: (few + many) // 2)
    assert cps.main(["ablate", "data", *words(tiny)]) == 2
    assert errors_of(capsys)[0].startswith("--patch")
    assert not os.path.exists("run")
    assert not os.path.exists("cache")


def test_memory_is_compared_before_anything_is_prepared(monkeypatch):
    """Before hours of preparing."""
    make_data()
    monkeypatch.setattr(cps, "memory_bytes", lambda: 200_000)
    assert train() == 2
    assert not pathlib.Path("cache").exists() or not os.listdir("cache")


# 9. Augmentation
# --------------------------------------------------------------------------------------------------
def test_augment_changes_the_look_and_at_chance_0_nothing():
    rng = np.random.default_rng(0)
    patch = np.indices(PATCH, dtype=np.float32).sum(0)
    new = [cps.augment(patch, rng, 1.0) for _ in range(40)]
    assert all(n.shape == PATCH and n.dtype == np.float32 and np.isfinite(n).all() for n in new)
    assert 10 < sum(not np.array_equal(n, patch) for n in new) < 40
    assert np.array_equal(cps.augment(patch, rng, 0.0), np.indices(PATCH).sum(0))


def test_chances_of_augment_are_those_of_nnunet(monkeypatch):
    patch = np.linspace(1, 2, 27, dtype=np.float32).reshape(3, 3, 3)  # above 0: the sign tells
    calls = []

    def unchanged(name):
        def one(image, *_, **__):
            calls.append(name if image.mean() > 0 else f"{name} of the negative")
            return image

        return one

    monkeypatch.setattr(cps, "gamma_curve", unchanged("gamma"))
    monkeypatch.setattr(cps, "resample", unchanged("resample"))
    monkeypatch.setattr(ndimage, "gaussian_filter", unchanged("blur"))
    for chance in (1.0, 0.5):
        calls.clear()
        rng = np.random.default_rng(0)
        n = 4000
        changed = sum(not np.array_equal(cps.augment(patch, rng, chance), patch) for _ in range(n))
        want = {
            "blur": 0.1,
            "resample": 2 * 0.125,  # down and up
            "gamma": 0.3,
            "gamma of the negative": 0.1,
        }
        assert {*calls} == {*want}
        for name, share in want.items():
            assert calls.count(name) / n == pytest.approx(chance * share, abs=0.03)
        alike = (1 - chance * 0.1) * (1 - chance * 0.15) ** 2  # no noise, brightness, contrast
        assert changed / n == pytest.approx(1 - alike, abs=0.03)


def test_gamma_keeps_mean_and_sd_and_is_below_1_in_half_of_the_cases():
    ramp = np.linspace(0, 1, 1001, dtype=np.float32)

    def middle(power):  # of the curved ramp, in sd from its mean: falls with the power
        curved = np.linspace(0, 1, 1001) ** power
        return (np.median(curved) - curved.mean()) / curved.std()

    found = []
    for seed in range(1000):
        patch = (ramp - ramp.mean()) / ramp.std()
        got = cps.gamma_curve(3 + 2 * patch, np.random.default_rng(seed))
        assert got.mean() == pytest.approx(3, abs=2e-4) and got.std() == pytest.approx(2, abs=2e-4)
        assert (np.diff(got) > 0).all()
        found.append((np.median(got) - 3) / 2)
    assert min(found) >= middle(1.5) - 1e-3 and max(found) <= middle(0.7) + 1e-3
    assert min(found) < middle(1.45) and max(found) > middle(0.72)
    assert np.mean(np.array(found) > middle(1)) == pytest.approx(0.5, abs=0.05)

    patch = np.random.default_rng(0).gamma(2, size=(16, 16, 16)).astype(np.float32)  # skewed
    patch = (patch - patch.mean()) / patch.std()
    only_gamma = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        drawn = rng.random(7) < [0.1, 0.1, 0.15, 0.15, 0.125, 0.1, 0.3]
        if drawn[5:].any() and not drawn[:5].any():
            got = cps.augment(patch, np.random.default_rng(seed), 1.0)
            assert not np.array_equal(got, patch)
            only_gamma.append((got.mean(), got.std()))
    assert len(only_gamma) > 20 and np.allclose(only_gamma, (0, 1), atol=1e-3)


def test_rotation_and_scale_are_drawn_apart():
    spacing = np.array(MM)
    turned = []
    scaled = []
    angles = []
    scales = []
    n = 4000
    for seed in range(n):
        matrix = cps.spatial_matrix(np.random.default_rng(seed), spacing, 0.2)
        if matrix is None:
            matrix = np.eye(3)
        in_mm = np.diag(spacing) @ matrix @ np.diag(1 / spacing)
        scale = np.linalg.det(in_mm) ** (1 / 3)
        turn = in_mm / scale
        assert np.allclose(turn @ turn.T, np.eye(3))  # a turn in mm, no shear
        turned.append(not np.allclose(turn, np.eye(3)))
        scaled.append(abs(scale - 1) > 1e-9)
        if turned[-1]:
            euler = spatial.transform.Rotation.from_matrix(turn).as_euler("xyz", degrees=True)
            angles.append(euler)
        if scaled[-1]:
            scales.append(scale)
    turned = np.array(turned)
    scaled = np.array(scaled)
    assert turned.mean() == pytest.approx(0.2, abs=0.025)
    assert scaled.mean() == pytest.approx(0.2, abs=0.025)
    assert (turned & scaled).mean() == pytest.approx(0.04, abs=0.012)
    assert 28 < np.abs(angles).max() <= 30 and (np.abs(angles).max(0) > 28).all()
    assert 0.7 <= min(scales) < 0.72 and 1.37 < max(scales) <= 1.4
    assert np.mean(np.array(scales) < 1) == pytest.approx(0.5, abs=0.06)
    assert cps.spatial_matrix(np.random.default_rng(0), spacing, 0.0) is None


# 10. Surfaces
# --------------------------------------------------------------------------------------------------
def plain_hd95(pred, ref, spacing):
    """The least distance within which 95 % of a surface's area lies, the larger of two."""
    (p, p_area), (r, r_area) = (plain_surface(mask, np.array(spacing)) for mask in (pred, ref))
    distance = np.linalg.norm(p[:, None] - r, axis=2)  # of all points to all points
    found = []
    for nearest, area in ((distance.min(1), p_area), (distance.min(0), r_area)):
        enough = [d for d in nearest if area[nearest <= d].sum() >= 0.95 * area.sum()]
        found.append(min(enough))
    return max(found)


def test_table_of_areas_has_the_closed_forms():
    s = np.array((0.7, 1.3, 2.9))
    for face, code in zip(np.prod(s) / s, (15, 51, 85)):  # a plane across each axis
        assert plain_area(code, s) == pytest.approx(face)
    edge = s[2] * np.hypot(s[0], s[1])  # the diagonal plane, and an edge cut off
    assert [plain_area(60, s), plain_area(3, s)] == pytest.approx([edge, edge / 2])
    a, b, c = np.diag(s / 2)  # a corner cut off: the triangle of the middles of three edges
    assert plain_area(1, s) == pytest.approx(np.linalg.norm(np.cross(b - a, c - a)) / 2)
    areas = [plain_area(code, s) for code in range(256)]
    assert areas == areas[::-1]  # inside out: the same
    assert min(areas[1:-1]) > 0 == areas[0]
    assert cps.surfel_areas(tuple(s)) == pytest.approx(areas)


def test_trap_15_surface_scores_are_those_of_all_points_and_all_distances():
    rng = np.random.default_rng(0)
    values = set()
    for i in range(24):
        noise = rng.standard_normal((2, *rng.integers(2, 7, 3)))
        smooth = ndimage.gaussian_filter(noise, i % 3 / 2)
        pred, ref = smooth > np.quantile(smooth, 0.6)
        spacing = rng.uniform(0.5, 4, 3)
        tolerance = rng.uniform(0.1, 4)
        want = 0
        distance = np.nan
        if pred.any() and ref.any():
            want = plain_surface_dice(pred, ref, spacing, tolerance)
            distance = plain_hd95(pred, ref, spacing)
        for one, two in ((pred, ref), (np.pad(ref, 3), np.pad(pred, 3))):
            assert abs(cps.surface_dice(one, two, spacing, tolerance) - want) < 1e-9
            got = cps.hausdorff95(one, two, spacing)
            assert got == pytest.approx(distance, rel=0, abs=1e-9, nan_ok=True)
        values |= {round(want, 6), round(distance, 6)}
    assert len(values) > 24
    for code in range(1, 256):  # every code, against a voxel of which only a part is near
        pred = np.zeros((2, 2, 6), bool)
        ref = np.zeros((2, 2, 6), bool)
        pred[:, :, :2].flat = [code & (128 >> i) for i in range(8)]
        ref[0, 0, ::5] = True
        want = plain_surface_dice(pred, ref, MM, 1.0)
        assert abs(cps.surface_dice(pred, ref, MM, 1.0) - want) < 1e-9
        assert abs(cps.hausdorff95(pred, ref, MM) - plain_hd95(pred, ref, MM)) < 1e-9


def test_hd95_by_hand():
    """A bar of 1 x 1 x 100 voxels, found without its last ones: HD95 forgives up to 5 %."""
    ref = np.zeros((3, 3, 110), bool)
    ref[1, 1, 2:102] = True
    for lost, want in ((3, 0), (20, 3 * 15)):
        pred = ref.copy()
        pred[:, :, 102 - lost :] = False
        got = cps.hausdorff95(pred, ref, (1, 1, 3))
        assert got == cps.hausdorff95(ref, pred, (1, 1, 3)) == pytest.approx(want, abs=3.1)
    cube = np.zeros((12, 12, 12), bool)
    cube[2:6, 2:6, 2:6] = True
    moved = np.roll(cube, 3, axis=2)
    assert cps.hausdorff95(cube, moved, MM) == 9  # the far faces are more than 5 %
    assert cps.hausdorff95(cube, cube, MM) == 0
    for empty in ((cube, 0 * cube), (0 * cube, cube), (0 * cube, 0 * cube)):
        assert math.isnan(cps.hausdorff95(*(mask > 0 for mask in empty), MM))


@pytest.mark.parametrize("flare22", [False, True])
def test_trap_15_empty_masks_and_hand_made_cubes(flare22):
    none = np.zeros((9, 9, 9), bool)
    cube = none.copy()
    cube[2:6, 2:6, 2:6] = True
    moved = np.roll(cube, 1, axis=2)
    for pred, ref, score in ((none, none, 1), (none, cube, 0), (cube, none, 0), (cube, cube, 1)):
        assert cps.dice(pred, ref) == cps.surface_dice(pred, ref, MM, 1) == score
        got = cps.evaluate_case(1 * pred, 1 * ref, MM, [1], {1: 2}, flare22)
        assert [*got] == [1]
        assert got[1][:2] == (score, score)
        assert got[1].hd95 == 0 if pred.any() and ref.any() else math.isnan(got[1].hd95)
        assert got[1].held is bool(ref.any())
    assert cps.dice(cube, moved) == 0.75
    assert cps.surface_dice(cube, moved, MM, 3.0) == 1 > cps.surface_dice(cube, moved, MM, 2.9) > 0


def test_flare22_rules():
    def score(pred, ref, label, flare22=True):
        volumes = (label * pred.astype(int), label * ref.astype(int))
        return cps.evaluate_case(*volumes, MM, [label], {label: 0.5}, flare22)[label][:2]

    ref = np.zeros((12, 12, 12), bool)
    ref[3:9, 3:9, 2:7] = True
    one_slice = ref & (np.arange(12) == 4)
    long = ref.copy()
    long[3:9, 3:9] = np.arange(12) != 6  # right but on the reference's last slice and outside
    moved = np.roll(ref, 1, axis=0)
    for label in (5, 6, 10):
        assert score(long, ref, label) == (1, 1) > score(long, ref, label, flare22=False)
        cut = moved[:, :, 2:6], ref[:, :, 2:6]  # the cut faces are surface
        want = round(cps.dice(*cut), 4), round(cps.surface_dice(*cut, MM, 0.5), 4)
        assert score(moved, ref, label) == want != score(moved, ref, 1)
        assert score(ref, one_slice, label) == (1, 1)  # that slice counts
        assert score(moved, one_slice, label)[0] == 0.8333
        assert score(np.roll(ref, 5, axis=2), ref, label) == (0, 0)
    assert score(long, ref, 1)[0] == round(cps.dice(long, ref), 4) < 1
    assert score(moved, ref, 1)[0] == 0.8333  # 4 digits
    slid = np.roll(ref, 5, axis=0)  # Dice below 0.2
    assert score(slid, ref, 1)[1] == 0 < score(slid, ref, 1, flare22=False)[1]


def test_flare22_rounds_as_numpy_does():
    """Dice of k / 20000 for odd k are ties, which Python and numpy round differently."""
    ties = [k for k in range(1, 20_000, 2) if round(k / 20_000, 4) != np.round(k / 20_000, 4)]
    assert len(ties) > 10
    for k in ties[:: len(ties) // 5]:
        pred = np.zeros(40_000, np.uint8)
        ref = pred.copy()
        pred[:20_000] = 1
        ref[20_000 - k : 40_000 - k] = 1
        volumes = [volume.reshape(100, 200, 2) for volume in (pred, ref)]
        got = cps.evaluate_case(*volumes, MM, [1], 2.0, flare22=True)[1]
        assert got.dice == np.round(k / 20_000, 4)


def test_flare22_tolerances():
    """13 bars, found too far along x by the tolerance (all is near) or by 1 mm more (not all)."""
    table = dict(zip(range(1, 14), (5, 3, 3, 5, 2, 2, 2, 2, 2, 3, 5, 7, 3)))
    for name, factor, more in (("ref", 0, 0), ("near", 1, 0), ("far", 1, 1)):
        volume = np.zeros((36, 52, 4), np.uint8)
        for i, tolerance in table.items():
            x = factor * tolerance + more
            volume[x : x + 24, 4 * i - 4 : 4 * i - 1] = i
        write(f"{name}/c.nii.gz", volume, np.eye(4))
    for name in ("near", "far"):
        assert cps.main(["evaluate", name, "ref", "--flare22", "--csv", "s.csv"]) == 0
        nsd = [float(row["nsd"]) for row in table_of("s.csv")]
        assert len(nsd) == 13
        assert all((s == 1) == (name == "near") and s > 0.5 for s in nsd)


def test_tolerances_are_one_or_one_a_label_and_a_tube_found_in_vain_is_0():
    pred = np.zeros((20, 8, 8), np.int16)
    ref = pred.copy()
    pred[3:9, 2:6, 2:6] = 1
    ref[1:7, 2:6, 2:6] = 1
    pred[12:16, 2:6, 2:6] = 2
    ref[14:18, 2:6, 2:6] = 2

    def nsd(tolerances, labels=(1, 2)):
        scores = cps.evaluate_case(pred, ref, (1, 1, 1), labels, tolerances)
        return [scores[i].nsd for i in labels]

    strict = nsd(0.5)
    assert nsd(2.0) == [1, 1]
    assert max(strict) < 1
    assert nsd([2.0, 0.5]) == nsd({1: 2.0, 2: 0.5}) == nsd(np.array([2.0, 0.5])) == [1, strict[1]]
    pred[0, :, 0] = 5  # a tube in one of the files only
    ref[0, :, 7] = 6
    found = cps.evaluate_case(pred, ref, (1, 1, 1), [5, 6], 2.0, flare22=True)
    assert [scores[:2] for scores in found.values()] == [(0, 0), (0, 0)]


def test_tables_count_the_cases_that_hold_a_label(capsys):
    """c0 holds 1 and 5, c1 holds 1 alone, c2 holds 1 but its prediction is empty."""
    label = phantom(0)[1]
    alone = label * (label == 1)
    for name, pred, ref in (("c0", label, label), ("c1", alone, alone), ("c2", 0 * alone, alone)):
        write(f"p/{name}.nii", pred)
        write(f"r/{name}.nii", ref)
    assert cps.main(["evaluate", "p", "r", "--csv", "s.csv"]) == 0
    rows = {(row["case"], row["label"]): row for row in table_of("s.csv")}
    assert {key for key, row in rows.items() if row["held"] == "0"} == {("c1", "5"), ("c2", "5")}
    found = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            found[cells[0]] = cells[1:]
    assert [found["label"][i].split()[0] for i in (0, 1, 2, 3)] == ["n", "Dice", "NSD", "HD95"]
    assert "mm" in found["label"][3]
    assert found["1"] == ["3", "0.6667 +- 0.5774", "0.6667 +- 0.5774", "0.00 +- 0.00 (n = 2)"]
    assert found["5"] == ["1", "1.0000", "1.0000", "0.00"]
    assert found["mean"][1:3] == ["0.8333", "0.8333"]  # of 2 / 3 and 1
    scores = cps.evaluate_case(alone, alone, MM, [1, 5], 2.0)
    assert scores[1] == (1, 1, 0, True)
    assert scores[5][:2] == (1, 1)
    assert scores[5].held is False
    assert math.isnan(scores[5].hd95)


# 11. Phantom
# --------------------------------------------------------------------------------------------------
def test_a_phantom_that_is_there_is_not_built_again(monkeypatch, tmp_path):
    monkeypatch.setattr(cps, "phantom_volume", lambda rng: (np.ones((2, 2, 2)),) * 2)
    cps.make_phantom(tmp_path)
    assert len(list(tmp_path.rglob("*.nii.gz"))) == 2 * 12 + 24 + 2 * 8
    lost = tmp_path / "labelsTr" / "phantomTr03.nii.gz"
    lost.unlink()
    cps.make_phantom(tmp_path)
    assert lost.exists()
    monkeypatch.setattr(cps, "phantom_volume", None)
    cps.make_phantom(tmp_path)


def test_the_phantom_is_built_after_the_settings_are_checked_and_once(monkeypatch):
    assert cps.main(["train", "--lr", "-1"]) == 2
    assert not os.listdir(".")
    monkeypatch.setattr(cps, "RANK", 1)  # of torchrun: another process builds it
    assert cps.config_from("train").data == "runs/phantom"
    assert not os.listdir(".")
    monkeypatch.setattr(cps, "RANK", 0)
    monkeypatch.setattr(cps, "phantom_volume", lambda rng: (np.ones((2, 2, 2)),) * 2)
    cps.config_from("train")
    assert len(list(pathlib.Path("runs/phantom").rglob("*.nii.gz"))) == 2 * 12 + 24 + 2 * 8


# 12. Runs
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["interrupt", "crash"])
def test_resumed_run_is_the_uninterrupted_one(how, monkeypatch, capsys):
    """Ctrl-C saves the step; after a crash it goes on from the last epoch's checkpoint."""
    make_data()
    assert train(out="whole", epochs=3) == 0

    def stop(step):
        if step == 4:
            assert how == "interrupt", "power cut"
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        spy(patch, stop)
        with pytest.raises(AssertionError) if how == "crash" else nullcontext():
            assert train(epochs=3) == 130
    capsys.readouterr()
    assert train(epochs=3) == 2 and "--resume" in capsys.readouterr().err  # the folder is in use
    batches = spy(monkeypatch)
    assert train("--resume", epochs=3) == 0
    assert len(batches) == 9 - (3 if how == "crash" else 5)
    assert same_weights("whole/last.pt", "run/last.pt")
    assert same_weights("whole/best.pt", "run/best.pt")
    assert table_of("whole/log.csv") == table_of("run/log.csv")


@pytest.mark.parametrize(
    "name, value",
    [("base_channels", 6), ("seed", 1), ("method", "cps"), ("momentum", 0.8), ("rampup", 0.5)],
)
def test_another_run_than_the_one_that_was_begun_is_refused(name, value, capsys):
    make_data()
    assert train(epochs=1) == 0
    before = pathlib.Path("run/last.pt").read_bytes()
    capsys.readouterr()
    assert train("--resume", epochs=2, **{name: value}) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"--{name.replace('_', '-')}" in error and str(value) in error and "--out" in error
    assert pathlib.Path("run/last.pt").read_bytes() == before


def test_a_run_is_resumed_where_its_data_lie_now(capsys):
    """Another spelling of the folder, a link to it, another place; no label is read anew."""
    make_data()
    flags = {"rampup": 0.0}  # so that the epochs to come do not change lam
    assert train(out="whole", **flags) == 0
    assert train(epochs=1, **flags) == 0
    os.symlink("data", "link")
    for data in ("data/", "./data", os.path.abspath("data"), "link"):
        assert train("--resume", data=data, epochs=1, **flags) == 0
    os.mkdir("disk")
    shutil.move("data", "disk/moved")
    assert train("--resume", data="disk/moved", cache="disk/cache", **flags) == 0
    same_run("whole", "run")


def test_equal_names_of_two_hospitals_are_two_cases_also_where_the_data_were_moved():
    make_data()
    for i, hospital in enumerate(("one", "two")):
        write(f"more/{hospital}/images/ct_0.nii", phantom(60 + i)[0])
    config = cps.Config(**TINY | {"unlabelled": ("more/one/images", "more/two/images")})
    some = names(config, "unlabelled")
    assert {"one-images-ct_0", "two-images-ct_0"} <= some and len(some) == 2 + 2 + 2
    write("data/imagesUn/c0.nii", phantom(70)[0])  # and one with the name of a labelled case
    config = cps.Config(**TINY | {"epochs": 1})
    cps.train(config)
    os.rename("data", "moved")

    assert train("--resume", data="moved", epochs=1) == 0


def test_a_resumed_run_may_have_another_lr_and_clip(capsys):
    make_data()
    assert train(epochs=1) == 0
    assert train("--resume", lr=0.01, grad_clip=1.0) == 0
    assert [float(row["lr"]) for row in table_of("run/log.csv")] == [0.05, 0.01]
    assert torch.load("run/last.pt", weights_only=True)["config"]["grad_clip"] == 1


def test_the_product_of_batch_and_processes_must_stay(monkeypatch, capsys):
    make_data()
    assert train(epochs=1) == 0
    state = torch.load("run/last.pt", weights_only=True)
    assert state["patches"] == 2
    assert train("--resume", batch=1) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "2 labelled patches a step, and 1 processes with --batch 1 have 1" in error
    monkeypatch.setattr(cps, "PROCESSES", 2)
    assert train("--resume") == 2
    assert "2 processes with --batch 2 have 4" in capsys.readouterr().err

    config = cps.Config(**TINY | {"batch": 1, "resume": True})
    split = cps.prepare(cps.split_cases(config), config)
    run = cps.resumed(pathlib.Path("run/last.pt"), config, split)
    assert (run.config.batch, run.patches, run.step) == (1, 2, 3)


@pytest.mark.parametrize("kept", [True, False])
def test_a_run_may_be_finished_early(kept, monkeypatch, capsys):
    """--resume with as many epochs as are done, or fewer: validate, write best.pt, report."""
    make_data()
    spy(monkeypatch, lambda step: step == 7 and os.kill(os.getpid(), signal.SIGTERM))
    assert train(epochs=4, validate_epochs=1 if kept else 4) == 130
    assert os.path.exists("run/best.pt") == kept
    before = tensors_of("run/last.pt")
    for epochs in (2, 1):
        config = cps.Config(
            **TINY | {"resume": True, "epochs": epochs, "validate_epochs": 1 if kept else 4}
        )
        result = cps.train(config)
        assert result["steps"] == 8 and len(result["results"]) == 2
        table = cps.validate(result["run"], cps.prepare(cps.split_cases(config), config)["val"])
        assert result["best_dice"] == pytest.approx(cps.mean_dice(table))
    assert all(map(torch.equal, before, tensors_of("run/last.pt")))
    if not kept:
        assert same_weights("run/best.pt", "run/last.pt")


def test_without_validation_cases_the_last_weights_are_the_best(capsys):
    make_data()
    assert train(val=0.0, epochs=1) == 0
    assert same_weights("run/best.pt", "run/last.pt")
    assert "Dice nan" not in capsys.readouterr().out
    assert train("--resume", val=0.0, epochs=2) == 0

    assert same_weights("run/best.pt", "run/last.pt")


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(
    monkeypatch, uncounted, capsys
):
    make_data()
    one = cps.train_step
    seen = []

    def step(*args):
        seen.append(one(*args) * (np.nan if len(seen) == 3 else 1))  # the first of epoch 2
        return seen[-1]

    monkeypatch.setattr(cps, "train_step", step)
    assert train(epochs=3) == 2 and len(seen) == 6
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: run") and "not finite" in error and "--lr" in error
    assert torch.load("run/last.pt", weights_only=True)["step"] == 3
    assert train("--resume", epochs=3, lr=0.01) == 0  # the remedy it names


def in_a_child(*argv, event=None, limit=None):
    """Run a command in a process of its own, killed -9 at one of the calls of a function, of
    Python or C, that it makes, or with a limit to the size of its files. Returns (exit code or
    -signal, calls)."""
    read, write_end = os.pipe()
    child = os.fork()  # a fork, as to import torch anew takes seconds
    if not child:
        count = 0

        def profile(frame, what, arg):
            nonlocal count
            count += what in ("call", "c_call")
            if count == event:
                os.kill(os.getpid(), signal.SIGKILL)

        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        sys.setprofile(profile)
        code = 99  # of a traceback
        try:
            code = cps.main([*argv])
        finally:
            sys.setprofile(None)
            os.write(write_end, str(count).encode())
            os._exit(code)
    os.close(write_end)
    with open(read) as pipe:
        calls = int(pipe.read() or 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), calls


def line(*more, **flags):
    flags = TINY | flags
    return ["train", flags.pop("data"), *more, *words(flags)]


def same_run(one, two):
    assert same_weights(f"{one}/last.pt", f"{two}/last.pt")  # momentum too
    assert same_weights(f"{one}/best.pt", f"{two}/best.pt")
    assert table_of(f"{one}/log.csv") == table_of(f"{two}/log.csv")


def test_killed_at_any_moment_a_run_can_be_resumed_and_ends_the_same(uncounted):
    make_data()
    assert train(out="whole") == 0  # in this process, for what torch does only the first time
    code, calls = in_a_child(*line(out="other", cache="c"))
    assert code == 0 and calls > 5000
    rng = np.random.default_rng(0)
    plan = []
    for i in range(14):
        plan.append((f"run{i}", [int(rng.integers(1, 0.98 * calls))]))
    plan.append(("thrice", [calls // 2, calls // 4, calls // 4]))  # and while it is resumed
    for out, events in plan:
        for n, event in enumerate(events):
            code, _ = in_a_child(*line("--resume", out=out, cache=f"cache-{out}"), event=event)
            assert code == -signal.SIGKILL or n  # what is left may be shorter
        assert train("--resume", out=out, cache=f"cache-{out}") == 0
        same_run("whole", out)


def killed_while_it_writes(monkeypatch, name, moment):
    """Exit code of a training that is killed at a stage of `atomic`: half of a file is written."""
    seen = []
    where = os if moment == "fsync" else pathlib.Path
    real = getattr(where, moment)

    def die(path, *more, **most):
        text = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else str(path)
        if text.endswith(name):
            seen.append(text)
            if len(seen) == (2 if name in ("last.pt", "log.csv") else 1):
                if moment.startswith("write"):
                    with open(text, "wb") as file:
                        file.write(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
        return real(path, *more, **most)

    with monkeypatch.context() as patch:
        patch.setattr(where, moment, die)
        return in_a_child(*line())[0]


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
@pytest.mark.parametrize("name", ["last.pt", "best.pt", "log.csv"])
def test_killed_while_it_writes_a_run_can_be_resumed(moment, name, monkeypatch, uncounted):
    """At each stage of `atomic`, half of the bytes are written."""
    make_data()
    assert train(out="whole") == 0
    if moment == "write":
        moment = "write_text" if name == "log.csv" else "write_bytes"
    assert killed_while_it_writes(monkeypatch, name, moment) == -signal.SIGKILL
    assert train("--resume") == 0
    same_run("whole", "run")


@pytest.mark.parametrize("name", ["split.json", "config.json", "cps.py"])
def test_killed_while_a_run_begins_it_still_gets_all_its_files(name, monkeypatch, uncounted):
    make_data()
    assert killed_while_it_writes(monkeypatch, name, "replace") == -signal.SIGKILL
    assert train("--resume") == 0
    files = {"best.pt", "last.pt", "log.csv", "split.json", "config.json", "cps.py"}
    assert files <= {*os.listdir("run")}


def test_a_full_disk_loses_no_earlier_checkpoint(capfd):
    make_data()
    assert train(out="whole", rampup=0.0) == 0 == train(out="run", rampup=0.0, epochs=1)
    with open("run/last.pt", "rb") as file:
        before = file.read()
    capfd.readouterr()
    code, _ = in_a_child(*line("--resume", rampup=0.0), limit=len(before) // 2)
    (error,) = capfd.readouterr().err.splitlines()
    assert code == 2 and "last.pt" in error
    files = {"best.pt", "last.pt", "log.csv", "split.json", "config.json", "cps.py", ".lock0"}
    assert {*os.listdir("run")} == files  # no temporary folder is left
    with open("run/last.pt", "rb") as file:
        assert file.read() == before
    assert train("--resume", rampup=0.0) == 0
    same_run("whole", "run")
    write("in/c0.nii", np.random.default_rng(0).integers(-90, 200, (64, 64, 64), np.int16))
    code, _ = in_a_child("predict", "run/best.pt", "in", "out", limit=2000)
    assert code == 2 and not os.listdir("out")
    assert "error: out/c0.nii.gz: " in capfd.readouterr().err


def test_a_run_folder_has_one_user(capsys):
    make_data()
    os.mkdir("run")
    with closing(sqlite3.connect("run/.lock0", timeout=0)) as lock:  # as another process would
        lock.execute("BEGIN EXCLUSIVE")
        assert train() == 2 and "run: in use" in capsys.readouterr().err
    assert train() == 0
    assert train("--resume") == 0


def test_a_file_system_without_locks_is_a_warning(monkeypatch, capsys):
    make_data()

    def no_locks(*_, **__):
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(sqlite3, "connect", no_locks)
    assert train(epochs=1) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: run: ") and "lock" in warning
    assert ".lock0" not in os.listdir("run") and not any("tmp" in f for f in os.listdir("run"))


@pytest.mark.parametrize("which", ["BEGIN", "the file"])
def test_locks_that_fail_in_any_way_are_a_warning(which, monkeypatch, capsys):
    """As on a network folder: the file can be made, but not locked."""

    class Connection(sqlite3.Connection):
        def execute(self, *_):
            raise sqlite3.OperationalError("locking protocol")

    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **more: real(path, factory=Connection))
    with cps.locked(pathlib.Path("run")):
        assert "cannot be locked" in capsys.readouterr().err


def test_loader_workers_leave_signals_to_the_parent(monkeypatch):
    child = os.fork()
    if not child:
        cps.leave_signals_to_the_parent(0)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

    make_data()
    given = {}
    real = cps.DataLoader

    def loader(*args, **more):
        given.update(more)
        return real(*args, **more)

    monkeypatch.setattr(cps, "DataLoader", loader)
    assert train(epochs=1, workers=3) == 0
    assert given["worker_init_fn"] is cps.leave_signals_to_the_parent
    assert given["num_workers"] == given["timeout"] == 0  # on a CPU


class Card(str):
    """A name of the CPU that says it is a GPU."""

    type = "cuda"


@pytest.mark.filterwarnings("ignore:.*pin_memory")  # there is no GPU to pin for
@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_of_a_gpu_brings_the_batches_in_order(workers, monkeypatch):
    make_data()
    data = patches(workers=workers)
    run = cps.Run(data.config, IDS, [])
    run.split = data.split
    run.step = 2
    run.device = Card("cpu")
    resets = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    seen = []
    for batch in run.batches():
        seen.append(batch)
        run.step += 1
    assert len(seen) == run.steps - 2
    for step, batch in enumerate(seen, start=2):
        want = data[step]
        assert batch.keys() == want.keys()
        assert tree_leaves(batch.pop("overlaps")) == tree_leaves(want["overlaps"])
        for key, value in batch.items():
            assert torch.equal(value, want[key]), (step, key)
    assert resets == [run.device]  # once, after the first step


def test_a_batch_that_never_comes_is_a_sentence(capsys):
    """Where shared memory is full, torch loses it and waits for ever."""
    stuck = Dying(wait=60)
    assert cps.attempt(lambda: next(iter(cps.DataLoader(stuck, num_workers=1, timeout=1)))) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "--workers" in error and "shared memory" in error


class Dying(torch.utils.data.Dataset):
    """Its first item ends the worker that makes it, or raises an error there."""

    def __init__(self, error=None, wait=0):
        self.error = error
        self.wait = wait

    def __len__(self):
        return 1

    def __getitem__(self, i):
        time.sleep(self.wait)
        if self.error:
            raise self.error
        os._exit(1)


def first_batch(data):
    return next(iter(cps.DataLoader(data, batch_size=None, num_workers=1)))


def test_a_loader_worker_that_dies_is_a_sentence(capsys):
    assert cps.attempt(first_batch, Dying()) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "--workers" in error and "shared memory" in error and "--shm-size" in error


def test_a_defect_in_a_loader_worker_keeps_its_traceback(capsys):
    with pytest.raises(ZeroDivisionError):
        cps.attempt(first_batch, Dying(ZeroDivisionError("division by zero")))
    with pytest.raises(RuntimeError):
        cps.attempt(first_batch, Dying(RuntimeError("expected scalar type Float")))


def test_other_cases_than_those_of_the_run_are_refused(capsys):
    """A new case would move others from training to validation."""
    make_data()
    assert train(epochs=1) == 0
    image, label = phantom(99)
    write("data/imagesTr/a.nii.gz", image)
    write("data/labelsTr/a.nii.gz", label)
    capsys.readouterr()
    assert train("--resume") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "other labelled cases" in error and "--out" in error
    assert set(re.findall(r"'(\w+)'", error)) <= {"a", *(f"c{i}" for i in range(6))}


def test_other_labels_or_voxels_than_those_of_the_run_are_refused(capsys):
    make_data()
    assert train(epochs=1) == 0
    split = json.loads(pathlib.Path("run/split.json").read_text())
    for part, name in (("val", split["val"][1]), ("labelled", split["labelled"][0])):
        kept = pathlib.Path(f"data/labelsTr/{name}.nii.gz").read_bytes()
        label = phantom(int(name[1:]))[1]
        write(f"data/labelsTr/{name}.nii.gz", np.where(label == 5, 9, label).astype(np.uint8))
        capsys.readouterr()
        assert train("--resume") == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"other {part} cases" in error and f"['{name}']" in error
        pathlib.Path(f"data/labelsTr/{name}.nii.gz").write_bytes(kept)
    write("data/imagesUn/u7.nii", phantom(70)[0])
    assert train("--resume") == 2
    assert "other unlabelled cases" in capsys.readouterr().err


def test_labels_in_one_piece_are_told_from_training_labels(capsys):
    """99 % of the voxels of each labelled case in one component: a few stray ones do not matter."""
    label = np.zeros(SHAPE, np.uint8)
    label[1:7, 1:8, 1:9] = 1  # 336 voxels
    label[8:10, :5, :5] = 5  # 50 voxels
    label[12:14, :5, :5] = 5  # and as many again: two kidneys
    label[12, 10, 8] = 1  # a stray one
    config = cps.Config(**TINY | {"epochs": 1})
    make_data(label=label)
    result = cps.train(config)
    assert result["run"].one_piece == [1]
    assert torch.load("run/last.pt", weights_only=True)["one_piece"] == [1]
    assert "[1, 5]; of [1] one component" in capsys.readouterr().out
    labels = cps.segment(result["run"], np.zeros(SHAPE, np.float32), largest=True)
    assert labels.shape == SHAPE

    def pieces(*shares):
        cases = [cps.Case(str(i), None, facts={"labels": facts}) for i, facts in enumerate(shares)]
        return cps.one_piece(cases, [1, 5, 7])

    assert pieces({"1": 0.99, "5": 0.9899, "7": 1.0}, {"1": 1.0}) == [1, 7]
    assert pieces({"5": 1.0}, {"5": 1.0, "7": 0.5}) == [5]  # 1 is shown by none of them


def test_pieces_are_counted_on_the_grid_of_the_scan():
    """At a coarse --spacing two kidneys may grow together, and must not be cut to one for that."""
    label = np.zeros((24, 12, 12), np.uint8)
    label[1:11, 2:10, 2:10] = 1
    label[12:22, 2:10, 2:10] = 1  # a gap of one voxel
    write("data/imagesTr/c0.nii.gz", 100.0 * label, np.eye(4))
    write("data/labelsTr/c0.nii.gz", label, np.eye(4))
    paths = [pathlib.Path(f"data/{part}Tr/c0.nii.gz") for part in ("images", "labels")]
    for spacing in ((), (3.0, 3.0, 3.0)):
        config = cps.Config(**TINY | {"spacing": spacing})
        case = cps.prepare_case(cps.Case("c0", *paths), config)
        assert case.facts["labels"] == {"1": 0.5}
        assert ndimage.label(case.array("label"))[1] == (1 if spacing else 2)


def test_only_labels_in_one_piece_are_cut_to_it(monkeypatch):
    classes = np.zeros((6, 3, 3), np.uint8)
    for label in (1, 2):
        classes[:2, label] = label
        classes[4, label] = label
    monkeypatch.setattr(cps, "sliding_window", lambda *_, **__: classes)
    run = cps.Run(cps.Config(**TINY), IDS, [5])
    got = cps.segment(run, classes)
    want = np.uint8([0, 1, 5])[classes]
    want[4, 2] = 0
    assert np.array_equal(got, want)
    assert np.array_equal(cps.segment(run, classes, largest=False), np.uint8([0, 1, 5])[classes])


def test_the_settings_that_are_printed_are_flags(capsys):
    """What differs from the preset, and nothing else: a command line that gives the same run."""
    for config in (
        cps.Config(**TINY),
        cps.Config(data="d", spacing=(1.0, 1.0, 2.0), clip=(), mirror="yz"),
        cps.Config(data="d", amp=False, compile=True),
    ):
        flags = cps.settings(config).split()
        given = vars(cps.build_parser().parse_args(["train", "data", *flags]))
        assert given.pop("command") == "train"
        again = dataclasses.replace(
            cps.config_from("train", **given), data=config.data, out=config.out
        )
        assert again == config
    assert "--lr" not in cps.settings(cps.Config(data="d"))


def test_lack_of_memory_is_one_sentence_and_a_defect_is_a_traceback(monkeypatch, capsys):
    make_data()
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
    ):

        def fail(*_, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(cps.Run, "batches", fail)
            assert train("--resume") == 2
        (message,) = capsys.readouterr().err.splitlines()
        assert "--patch" in message and "--batch" in message and "--base-channels" in message

    def defect(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(cps.Run, "batches", defect)
    with pytest.raises(RuntimeError):
        train("--resume")


def test_costs_are_those_of_a_hand_count():
    """One level: 3x3x3 convolutions 1>4 and 4>4, a head 4>3; the image wants no gradient."""
    config = cps.Config(patch=(6, 5, 4), levels=1, base_channels=4, batch=3)
    first = 27 * 4
    second = 27 * 4 * 4
    head = 4 * 3
    voxels = 6 * 5 * 4
    weights, forward, step, _ = cps.costs(config, 3)
    assert weights == first + second + head + 2 * 2 * 4 + 3
    assert weights == sum(p.numel() for p in cps.UNet3D(3, 4, 1).parameters())
    assert forward == 2 * voxels * (first + second + head)
    assert step == 2 * voxels * (2 * first + 3 * second + 3 * head) * 2 * (3 + 3)  # A, B; x, u
    paper = sum(p.numel() for p in cps.UNet3D(14, 32, 5).parameters())
    assert cps.costs(cps.Config(), 14)[0] == paper == 16_544_526
    supervised = cps.costs(dataclasses.replace(config, method="supervised"), 3)
    assert supervised[:2] == (weights, forward) and supervised[2] == step / 2


def allocated_in_a_step(config, classes):
    """Most bytes that PyTorch's allocator has given out at once in a real step, and the weights."""
    nets = [cps.UNet3D(classes, config.base_channels, config.levels) for _ in "AB"]
    sgd = [torch.optim.SGD(net.parameters(), 0.1, 0.9) for net in nets]
    n = 0 if config.method == "supervised" else config.batch
    images = torch.randn(config.batch, 1, *config.patch)
    target = torch.randint(0, classes, (config.batch, *config.patch), dtype=torch.int16)
    whole = [slice(0, size) for size in config.patch]
    batch = {
        "labelled": images,
        "target": target,
        "crops_a": images[:n],
        "crops_b": images[:n],
        "valid": target[:n] >= 0,
        "overlaps": [(whole, whole)] * n,
    }
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        cps.train_step(nets, sgd, batch, 1.0, config, scaler, nullcontext())
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in events]  # given out, or taken back
    return np.cumsum(changes).max() + 4 * sum(p.numel() for net in nets for p in net.parameters())


@pytest.mark.parametrize("method, batch, classes", [("context", 1, 14), ("supervised", 2, 3)])
def test_memory_of_a_step_is_what_the_allocator_gives_out(method, batch, classes):
    config = cps.Config(patch=(32, 32, 16), levels=3, base_channels=8, method=method, batch=batch)
    counted = cps.costs(config, classes)[3]
    assert counted == pytest.approx(allocated_in_a_step(config, classes), rel=0.1)
    mixed = cps.costs(config, classes, gpu=True)[3]
    assert 0.4 * counted < mixed < 0.9 * counted
    assert cps.costs(dataclasses.replace(config, amp=False), classes, gpu=True)[3] == counted


def test_costs_count_the_memory_of_weights_gradients_and_momenta():
    config = cps.Config(patch=(4, 4, 4), levels=2, base_channels=64, batch=1)  # hardly a voxel
    parameters, _, _, step_bytes = cps.costs(config, 2)
    assert step_bytes == pytest.approx(2 * parameters * 4 * 3, rel=0.1)  # of two networks


def test_strange_names_of_cases_pass_through_all_files(monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    pytest.importorskip("matplotlib.figure")
    make_data()
    for i, name in enumerate(("$a$b", "c,d", "$x_{", "e f", '"g"', "%d{h}")):
        for folder in ("imagesTr", "labelsTr"):
            os.rename(f"data/{folder}/c{i}.nii.gz", f"data/{folder}/{name}.nii.gz")
    assert train(val=4.0, labelled=2, epochs=1, epoch_steps=1) == 0
    assert pathlib.Path("run/figure.png").stat().st_size > 1000
    assert cps.main(["predict", "run/best.pt", "data/imagesTr", "out"]) == 0
    assert cps.main(["evaluate", "out", "data/labelsTr", "--csv", "s.csv"]) == 0
    cases = {row["case"] for row in table_of("s.csv")}
    assert cases == {"$a$b", "c,d", "$x_{", "e f", '"g"', "%d{h}"}


def test_a_terminal_that_knows_few_letters(trained, monkeypatch):
    """cp1252, as where Windows writes to a file."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), "cp1252"))
    write("心/心.nii", SCAN)
    write("心/bad.nii", SCAN * 0)
    make_data("Ł")
    assert cps.main(["predict", f"{trained}/native/best.pt", "心", "出"]) == 1
    assert os.listdir("出") == ["心.nii.gz"]
    assert cps.main(["evaluate", "出", "心/心.nii"]) in (0, 1, 2)
    assert train(data="Ł", out="心/run", epochs=1, epoch_steps=1) == 0
    sys.stderr.flush()
    assert b"bad.nii" in sys.stderr.buffer.getvalue()


@pytest.mark.parametrize("val", [0.0, 2.0])
def test_a_run_without_validation_has_no_nan_in_its_sentences(val, capsys):
    make_data()
    assert train(val=val, epochs=1) == 0
    out = capsys.readouterr().out
    assert "nan on" not in out
    assert ("mean Dice" in out) == (val > 0)
    assert os.path.exists("run/best.pt")


# 13. Commands
# --------------------------------------------------------------------------------------------------
def test_predict_never_writes_over_a_scan(capsys):
    make_data()
    assert train(epochs=1, epoch_steps=1) == 0
    scan = phantom(50)[0]
    write("scans/x.nii.gz", scan)
    before = pathlib.Path("scans/x.nii.gz").read_bytes()
    capsys.readouterr()
    write("scans/y.nii.gz", scan)  # predict best.pt scans/*.nii.gz
    for out, word in (
        ("scans/../scans", "OUT_DIR"),
        ("scans/x.nii.gz", "exists"),
        ("scans/y.nii.gz", "exists"),
        ("data/labelsTr", "references"),
    ):
        assert cps.main(["predict", "run/best.pt", "scans/x.nii.gz", out]) == 2
        assert word in capsys.readouterr().err
    assert cps.main(["predict", "run/best.pt", "scans", "scans"]) == 2
    (error,) = errors_of(capsys)  # one for all scans
    assert "OUT_DIR" in error
    for name in "xy":
        assert pathlib.Path(f"scans/{name}.nii.gz").read_bytes() == before
    assert not os.path.exists("data/labelsTr/x.nii.gz")


def test_predict_tells_what_train_would(capsys):
    image, label = body("ct")
    image[-1, -1, -1] = np.median(image[label > 0])  # make_data adds to it
    make_data(image=image, label=label, labelled=4)
    assert train(clip=(-68, 200), epochs=1, epoch_steps=1) == 0
    write("scans/x.nii.gz", image)
    write("scans/y.nii.gz", image + 1024)
    capsys.readouterr()
    assert cps.main(["predict", "run/best.pt", "scans", "out"]) == 0
    (sentence,) = errors_of(capsys, "warning")
    assert "y.nii.gz" in sentence and "--clip" in sentence


def test_evaluate_pairs_a_folder_and_a_file_by_name():
    for i in range(2):
        write(f"p/c{i}.nii.gz", phantom(i)[1])
    write("r/c1.nii.gz", phantom(1)[1])
    write("r1/x.nii.gz", phantom(1)[1])
    for one, two in (("p", "r/c1.nii.gz"), ("p/c1.nii.gz", "r"), ("p/c1.nii.gz", "r1/x.nii.gz")):
        assert cps.main(["evaluate", one, two, "--csv", "s.csv"]) == 0
        assert [float(row["dice"]) for row in table_of("s.csv")] == [1, 1]


def test_a_case_empty_in_both_files_adds_no_label():
    for i, label in enumerate((phantom(0)[1] // 5 * 2, np.zeros(SHAPE, np.uint8))):
        write(f"p/c{i}.nii.gz", label)
    assert cps.main(["evaluate", "p", "p", "--csv", "s.csv"]) == 0
    assert {row["label"] for row in table_of("s.csv")} == {"2"}


def test_where_no_label_occurs_there_is_no_row():
    write("p/c.nii.gz", np.zeros(SHAPE, np.uint8))
    assert cps.main(["evaluate", "p", "p", "--csv", "s.csv"]) == 0
    assert table_of("s.csv") == []


def test_info_prints_what_the_tables_of_papers_ask_for(monkeypatch, capsys):
    monkeypatch.setattr(cps, "make_phantom", None)  # not built for this
    tiny = ["--patch", "16", "16", "8", "--levels", "2", "--base-channels", "4", "--epochs", "3"]
    assert cps.main(["info", *tiny, "--classes", "3", "--device", "cpu", "--lr", "0.5"]) == 0
    printed = capsys.readouterr().out
    config = cps.Config(patch=(16, 16, 8), levels=2, base_channels=4)
    parameters, forward, step, step_bytes = cps.costs(config, 3)
    for word in (
        "(16, 16, 8)",
        "epochs           3\n",
        "750 steps",
        "lr               0.5\n",
        f"{parameters:,} parameters",
        f"{forward:.3g} FLOPs for a patch",
        f"{step:.3g} FLOPs, {step_bytes / 2**30:.2g} GiB",
    ):
        assert word in printed
    assert not os.listdir(".")


def rows_of(markdown):
    """The rows of a Markdown table, each a list of its cells; the line under the head checked."""
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in markdown.splitlines()]
    assert all(set(cell) == {"-"} for cell in rows.pop(1)) and len({*map(len, rows)}) == 1
    return rows


def plain_mean(gain):
    """Of (seeds, cases, labels): over seeds and the cases that hold a label, then over labels."""
    means = []
    for label in np.moveaxis(gain, 2, 0):
        known = label[~np.isnan(label)]
        if known.size:
            means.append(known.mean())
    return np.mean(means)


def plain_interval(gain, draws=4000):
    """Two-way bootstrap: seeds and cases drawn anew with replacement, each apart."""
    rng = np.random.default_rng(1)
    seeds, cases, _ = gain.shape
    means = []
    for _ in range(draws):
        some = gain[rng.integers(seeds, size=seeds)][:, rng.integers(cases, size=cases)]
        means.append(plain_mean(some))
    return np.percentile(means, (2.5, 97.5))


def numbers(text):
    return [float(word) for word in re.findall(r"[-+]\d+\.\d+", text)]


def test_gain_of_ablate_has_a_two_way_bootstrap_interval():
    rng = np.random.default_rng(0)
    gain = rng.normal(0.05, 0.1, (5, 7, 2)) + rng.normal(0, 0.1, (5, 1, 1))
    gain += rng.normal(0, 0.1, (1, 7, 1))
    gain[:, :3, 1] = np.nan  # cases that do not hold label 2
    mean, low, high = numbers(cps.gain_text(gain))
    assert mean == pytest.approx(plain_mean(gain), abs=1e-4)
    width = high - low
    assert [low, high] == pytest.approx(plain_interval(gain), abs=0.05 * width)
    assert width > 1.2 * np.diff(plain_interval(gain.mean(0, keepdims=True)))  # seeds count
    for one in (gain[:1], gain[:, 3:4]):  # one seed or case: no interval
        assert numbers(cps.gain_text(one)) == pytest.approx([plain_mean(one)], abs=1e-4)
        assert "nan" not in cps.gain_text(one) and "[" not in cps.gain_text(one)


def test_ablate_compares_arms_of_equal_steps_on_cases_that_choose_nothing(monkeypatch, capsys):
    make_data(labelled=8)
    flags = {k: v for k, v in TINY.items() if k not in ("data", "labelled", "val")}
    argv = ["ablate", "data", "--labelled", "2", "1", "--seeds", "2", "--seed", "3", "--val", "2"]
    argv += ["--test", "3", *words(flags | {"epochs": 1})]
    steps = spy(monkeypatch)
    assert cps.main(argv) == 0
    text = pathlib.Path("run/ablation.md").read_text()
    assert capsys.readouterr().out.endswith(text)
    table = rows_of(text)
    arms = [*itertools.product("12", ("supervised", "cps", "context")), ("all", "supervised")]
    assert [(row[1], row[0]) for row in table[1:]] == arms and len(steps) == 3 * len(arms) * 2

    rows = table_of("run/ablation.csv")
    tests = names(cps.Config(**TINY | {"test": 3.0}), "test")
    assert {row["case"] for row in rows} == tests
    assert len(rows) == len(arms) * 2 * 2 * 3 * len(IDS) and {row["held"] for row in rows} == {"1"}

    def scores(column, networks, method, n):  # (seeds, cases, labels)
        wanted = {"networks": networks, "method": method, "labels": n}
        found = [float(r[column]) for r in rows if all(r[k] == v for k, v in wanted.items())]
        return np.reshape(found, (2, 3, len(IDS)))

    for (n, method), row in zip(arms, table[1:]):
        a = scores("dice", "a", method, n)
        both = scores("dice", "both", method, n)
        hd95 = scores("hd95", "a", method, n)
        shown = [plain_mean(x[None]) for x in hd95 if not np.isnan(x).all()]
        assert row[2] == "2"
        if len(shown) == 2:
            assert row[4] == f"{np.mean(shown):.2f} +- {np.std(shown, ddof=1):.2f}"
        means = [a.mean((1, 2)), both.mean((1, 2))]  # a mean for each seed
        cells = [row[3], row[5]]
        assert cells == [f"{x.mean():.4f} +- {x.std(ddof=1):.4f}" for x in means]
        if method in ("cps", "context"):
            gain = a - scores("dice", "a", "supervised", n)
            mean, low, high = numbers(row[6])
            assert mean == pytest.approx(gain.mean(), abs=1e-4)
            wide = 0.08 * (high - low) + 2e-4
            assert [low, high] == pytest.approx(plain_interval(gain), abs=wide)
        else:
            assert row[6] == ""

    for method, n, seed in (("context", "2", 4), ("supervised", "all", 3)):
        run = cps.Run.load(f"run/{method}-{n}-{seed}/best.pt")
        assert (run.config.seed, run.config.method) == (seed, method)
        key = (method, n, f"{seed}", "both")
        case = cps.prepare(cps.split_cases(run.config), run.config)["test"][0]
        found = cps.test_scores(run, [case], networks="both")[case.name]
        mine = [r for r in rows if (r["method"], r["labels"], r["seed"], r["networks"]) == key]
        got = [float(r["dice"]) for r in mine if r["case"] == case.name]
        assert got == pytest.approx([found[i].dice for i in IDS])

    before = pathlib.Path("run/ablation.csv").read_bytes()
    assert cps.main(argv) == 0 and len(steps) == 3 * len(arms) * 2  # finished arms are kept
    assert pathlib.Path("run/ablation.csv").read_bytes() == before
    for flags in (["--seeds", "0"], ["--labelled", "2", "0"]):
        assert cps.main(["ablate", "data", *flags]) == 2


def test_ablate_counts_a_label_in_the_cases_that_hold_it():
    make_data(labelled=8)
    flags = {k: v for k, v in TINY.items() if k not in ("data", "labelled", "val", "out")}
    config = cps.Config(**TINY | {"test": 3.0, "val": 1.0})
    first, *_ = sorted(names(config, "test"))
    label = phantom(int(first[1:]))[1]
    write(f"data/labelsTr/{first}.nii.gz", np.where(label == 5, 0, label).astype(np.uint8))
    argv = ["ablate", "data", "--seeds", "1", "--val", "1", "--test", "3", "--out", "run"]
    assert cps.main([*argv, *words(flags | {"epochs": 1})]) == 0
    for row in rows_of(pathlib.Path("run/ablation.md").read_text())[1:]:
        wanted = {"method": row[0], "labels": row[1], "networks": "a", "held": "1"}
        cells = table_of("run/ablation.csv")
        cells = [cell for cell in cells if all(cell[k] == v for k, v in wanted.items())]
        assert len(cells) == 2 * 3 - 1
        means = [np.mean([float(c["dice"]) for c in cells if c["label"] == i]) for i in "15"]
        assert float(row[3]) == pytest.approx(np.mean(means), abs=1e-4)


def test_ablate_compares_the_labels_of_all_seeds_before_the_first_run(monkeypatch, capsys):
    make_data(labelled=8)
    write("data/labelsTr/c3.nii.gz", phantom(3)[1])
    for i in range(8):
        label = phantom(i)[1]
        if i != 3:  # label 5 is in one case alone: some seeds do not have it
            write(f"data/labelsTr/c{i}.nii.gz", np.where(label == 5, 0, label).astype(np.uint8))
    steps = spy(monkeypatch)
    flags = {k: v for k, v in TINY.items() if k not in ("data", "labelled", "val")}
    argv = ["ablate", "data", "--labelled", "1", "--seeds", "6", "--val", "1", "--test", "1"]
    assert cps.main([*argv, *words(flags)]) == 2 and not steps
    error = capsys.readouterr().err.splitlines()[-1]
    assert "seed" in error and "labels" in error and not os.path.exists("run")


@pytest.mark.parametrize("name", ["seg.nii.gz", "new/seg.nii", "SEG.NII.GZ"])
def test_predict_writes_the_file_that_it_is_told(name, trained, capsys):
    write("in/scan_0000.nii.gz", SCAN)
    best = f"{trained}/native/best.pt"
    assert cps.main(["predict", best, "in/scan_0000.nii.gz", name]) == 0
    assert os.path.isfile(name)
    assert cps.main(["predict", best, "in/scan_0000.nii.gz", "out"]) == 0
    assert os.listdir("out") == ["scan.nii.gz"]
    found = [np.asarray(nib.load(path).dataobj) for path in (name, "out/scan.nii.gz")]
    assert np.array_equal(*found)
    before = pathlib.Path("in/scan_0000.nii.gz").read_bytes()
    capsys.readouterr()
    for target in ("in/scan_0000.nii.gz", "in/../in/scan_0000.nii.gz", "in"):  # never the scan
        assert cps.main(["predict", best, "in/scan_0000.nii.gz", target]) == 2
        assert "in/scan_0000.nii.gz" in errors_of(capsys)[0]
    assert pathlib.Path("in/scan_0000.nii.gz").read_bytes() == before
    assert os.listdir("in") == ["scan_0000.nii.gz"]


def test_evaluate_scores_a_label_that_the_prediction_alone_has():
    ref = phantom(0)[1]
    pred = ref.copy()
    pred[0, 0, 0] = 9
    write("p/a.nii", pred)
    write("r/a.nii", ref)
    assert cps.main(["evaluate", "p", "r", "--csv", "s.csv"]) == 0
    scores = {row["label"]: float(row["dice"]) for row in table_of("s.csv")}
    assert scores == {"1": 1, "5": 1, "9": 0}


def test_evaluate_says_what_does_not_pair(capsys):
    for name in ("a", "b", "x"):
        write(f"p/{name}.nii", phantom(0)[1])
    for name in ("a", "b", "c"):
        write(f"r/{name}.nii.gz", phantom(0)[1])
    assert cps.main(["evaluate", "p", "r"]) == 0
    (sentence,) = errors_of(capsys, "warning")
    assert sentence.startswith("p: ")
    assert "1 count as empty: ['c']" in sentence
    assert "1 have no reference: ['x']" in sentence
    os.mkdir("q")
    for name in ("a_0000", "ab", "A"):  # whole names
        shutil.copy("p/a.nii", f"q/{name}.nii")
    assert cps.main(["evaluate", "q", "r", "--csv", "s.csv"]) == 2
    (error,) = errors_of(capsys)
    assert error.startswith("q")
    assert "a_0000" in error
    assert not os.path.exists("s.csv")


def test_a_refused_prediction_counts_as_empty(capsys):
    for name in ("a", "b", "c"):
        write(f"p/{name}.nii", phantom(0)[1])
        write(f"r/{name}.nii", phantom(0)[1])
    pathlib.Path("p/b.nii").write_bytes(b"no scan")
    os.remove("p/c.nii")
    assert cps.main(["evaluate", "p", "r", "--csv", "s.csv"]) == 1
    shown = capsys.readouterr()
    errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "p/b.nii" in errors[0]
    assert "2 of 3" in shown.out.splitlines()[-1]
    assert "empty" in shown.out.splitlines()[-1]
    scores = {(row["case"], row["label"]): float(row["dice"]) for row in table_of("s.csv")}
    assert scores == {(case, label): case == "a" for case in "abc" for label in "15"}
    (mean,) = [line for line in shown.out.splitlines() if line.startswith("| mean")]
    assert "0.3333" in mean


def test_onnx_gives_the_logits_of_the_checkpoint(trained, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    best = f"{trained}/fine/best.pt"
    assert cps.main(["export", best, "a.onnx"]) == 0
    said = float(capsys.readouterr().out.split()[-1])
    run = cps.Run.load(best)
    network = run.networks[0].eval()
    session = onnxruntime.InferenceSession("a.onnx")
    for batch in (1, 2, 5):  # a batch of any size
        x = torch.randn(batch, 1, *PATCH, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            want = network(x).numpy()
        (got,) = session.run(None, {"image": x.numpy()})
        assert got.shape == want.shape
        assert abs(got - want).max() < 1e-3 > said > 0
    held = json.loads(session.get_modelmeta().custom_metadata_map["cps"])
    wanted = {"clip": [-68, 200], "spacing": [1, 2, 2], "patch": [*PATCH], "ids": IDS}
    assert held | wanted | {"one_piece": run.one_piece} == held
    before = pathlib.Path("a.onnx").read_bytes()
    for argv in (
        ["predict", "a.onnx", f"{trained}/data/imagesTr", "out"],
        ["export", best, "model.pt"],
        ["export", "a.onnx", "b.onnx"],
        ["export", "nowhere.pt", "b.onnx"],
    ):
        assert cps.main(argv) == 2
        (error,) = errors_of(capsys)
        assert "a.onnx" in error or "model.pt" in error or "nowhere.pt" in error
    assert not {"out", "b.onnx", "model.pt"} & {*os.listdir()}
    assert pathlib.Path("a.onnx").read_bytes() == before


def test_export_fails_where_the_file_computes_something_else(trained, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export = torch.onnx.export

    def other(network, *args, **options):
        wrong = cps.UNet3D(len(IDS) + 1, 6, 2)
        return export(wrong, *args, **options)

    monkeypatch.setattr(torch.onnx, "export", other)
    assert cps.main(["export", f"{trained}/native/best.pt", "a.onnx"]) == 1
    assert "difference" in capsys.readouterr().out


def test_absent_optional_packages_are_named(trained, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if not installed
    make_data()
    assert cps.main(["export", f"{trained}/native/best.pt", "a.onnx"]) == 2
    assert "pip install onnx" in capsys.readouterr().err
    assert not os.path.exists("a.onnx")
    assert train() == 0  # the run is done, only its figure is missing
    out = capsys.readouterr()
    assert "pip install -U matplotlib" in out.out
    assert not out.err
    assert out.out.splitlines()[-1].startswith("next ")
    assert os.path.exists("run/best.pt")
    assert not os.path.exists("run/figure.png")


@pytest.fixture
def page(monkeypatch):
    """The figure of a short run, in which A and B say something, and not the same."""
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    figure = pytest.importorskip("matplotlib.figure")

    def segment(run, volume, shape=None, networks="a", largest=True):
        return np.roll(np.where(volume > 1, IDS[networks == "b"], 0), "ab".find(networks), 0)

    pages = []
    save = figure.Figure.savefig

    def watched(page, *args, **options):
        pages.append(page)
        return save(page, *args, **options)

    monkeypatch.setattr(cps, "segment", segment)
    monkeypatch.setattr(figure.Figure, "savefig", watched)
    make_data()
    assert train(method="context", validate_epochs=2, epochs=3, val=1.0) == 0
    assert pathlib.Path("run/figure.png").read_bytes()[:4] == b"\x89PNG"
    return pages[0]


def colours(ax):
    """The overlay of an axis as an array (x, y) of colours, as text; "" where there is none."""
    from matplotlib.colors import to_hex

    overlay = ax.images[1].get_array()  # (y, x, 4)
    text = [[to_hex(rgba[:3]) if rgba[3] else "" for rgba in row] for row in overlay]
    return np.array(text).T


def test_figure_shows_the_log_and_what_the_networks_say(page):
    rows = table_of("run/log.csv")
    lines = {}
    for axes in page.axes:
        if axes.lines:
            assert axes.get_xlabel() == "step"
            lines[axes.get_title()] = axes.lines[0].get_xydata()
    wanted = {"loss_sup", "loss_cps", "agreement", "foreground", "overlap", "dice"}
    assert {*lines} == wanted
    for name, points in lines.items():
        want = [(int(row["step"]), float(row[name])) for row in rows]
        assert points == pytest.approx(np.array(want), nan_ok=True), name
    assert np.isfinite(lines["dice"]).sum() == 3 + 2

    run = cps.Run.load("run/best.pt")
    case = cps.prepare(cps.split_cases(run.config), run.config)["val"][0]
    image = case.array("image")
    label = case.array("label")
    a, b = (cps.segment(run, image, networks=which) for which in "ab")
    z = int(np.argmax([(label[..., z] > 0).sum() for z in range(label.shape[2])]))
    shown = {axes.get_title(): axes for axes in page.axes if axes.images}
    assert [*shown][-5:] == [case.name, "reference", "A", "B", "A != B"]
    colour_of = {}
    for name, volume in (("reference", label), ("A", a), ("B", b), ("A != B", a != b)):
        axes = shown[name]
        assert np.array_equal(axes.images[0].get_array().T, image[..., z])
        found = colours(axes)
        plane = volume[..., z]
        assert np.array_equal(found != "", plane > 0)
        for value in np.unique(plane[plane > 0]):
            (colour,) = np.unique(found[plane == value])
            key = "differ" if name == "A != B" else value
            assert colour_of.setdefault(key, colour) == colour
    assert len({*colour_of.values()}) == 3
    assert not (colours(shown[case.name]) != "").any()


def test_figure_is_seen_as_radiologists_do(page):
    shown = [axes for axes in page.axes if axes.images]
    assert len(shown) == 4 + 5
    for axes in shown:
        assert axes.xaxis_inverted()  # x is to the patient's right in RAS+... and R is at the left
        assert not axes.yaxis_inverted()
        places = {text.get_text(): x for text, x in zip(axes.get_xticklabels(), axes.get_xticks())}
        assert places == {"L": 0, "R": axes.images[0].get_array().shape[1] - 1}
        assert float(axes.get_aspect()) == MM[1] / MM[0]


def test_figure_explains_the_method(page):
    """From the picture alone: crops are cut at their frames, the overlap compares both answers."""
    whole, crop_a, crop_b, overlap = page.axes[:4]
    image = whole.images[0].get_array().T
    seen = []
    for i, axes in enumerate((crop_a, crop_b)):
        assert "AB"[i] in axes.get_title()
        assert np.array_equal(axes.images[0].get_array().T, image)
        mask = np.zeros(image.shape, bool)
        frame = axes.patches[i]
        assert frame.get_label() == "AB"[i]
        corner = np.array(frame.get_xy()) + 0.5
        assert np.allclose(corner, corner.round())
        x, y = corner.round().astype(int)
        width, height = int(frame.get_width()), int(frame.get_height())
        assert (width, height) == PATCH[:2]
        mask[x : x + width, y : y + height] = True
        found = colours(axes)
        assert (found[mask] != "").any()
        assert not (found[~mask] != "").any()  # a network says nothing outside its crop
        seen.append(mask)

    shared = seen[0] & seen[1]
    assert 0 < shared.sum() < seen[0].sum()
    a, b, found = (colours(axes) for axes in (crop_a, crop_b, overlap))
    agree = shared & (a == b)
    differ = shared & (a != b)
    assert np.array_equal(found[agree], a[agree])
    assert not (found[~shared] != "").any()
    (colour,) = np.unique(found[differ])
    assert colour not in (*np.unique(a), *np.unique(b))  # a colour of its own
    assert not (colours(whole) != "").any()
    assert [frame.get_label() for frame in whole.patches] == ["A", "B"]
    (legend,) = page.subfigs[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["differ", *map(str, IDS), "A", "B"]


def test_thirteen_organs_have_colours_of_their_own():
    assert len({cps.DIFFER, *cps.LABEL_COLOURS}) == 1 + 18


def test_the_method_is_drawn_where_the_crops_overlap(monkeypatch):
    """Also where no network finds anything: not on a slice outside of both crops."""
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    figure = pytest.importorskip("matplotlib.figure")
    seen = []
    monkeypatch.setattr(cps, "segment", lambda run, volume, **_: np.zeros(volume.shape, np.uint8))
    draw = cps.draw
    monkeypatch.setattr(cps, "draw", lambda *args: [seen.append(args[3]), draw(*args)][1])
    run = cps.Run(cps.Config(**TINY), IDS, [])
    image = np.zeros((PATCH[0] + 4, PATCH[1] + 4, 3 * PATCH[2]), np.float32)
    case = types.SimpleNamespace(name="c", spacing=MM, array=lambda part: image)
    cps.draw_method(figure.Figure(), run, case)
    rng = np.random.default_rng(0)
    corners = cps.overlapping_corners(rng, image.shape, PATCH, run.config.min_overlap)
    low = max(corner[2] for corner in corners)
    high = min(corner[2] for corner in corners) + PATCH[2]
    assert low > 0  # else slice 0 would do
    assert low <= seen[0] < high


def torchrun(script, *argv):
    """Two processes on this machine; returns the exit code and what they print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    folder = os.path.dirname(cps.__file__)
    done = subprocess.run(
        [*command, script, *argv],
        capture_output=True,
        text=True,
        timeout=150,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": folder},
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


FALLS = """
import os, sys, time
import cps

second = os.environ["RANK"] == "1"
steps = []
config_from = cps.config_from
train_step = cps.train_step


def late(*args, **flags):  # the second process is quicker
    time.sleep(0 if second else 3)
    return config_from(*args, **flags)


def step(*args):  # and fails in epoch 2
    steps.extend(args[1])  # optimisers: none where costs are counted
    cps.need(len(steps) < 10 or not second, "rank 1 falls")
    return train_step(*args)


cps.config_from = late
cps.train_step = step
sys.exit(cps.main())
"""


def test_two_processes_train_one_pair_of_networks():
    make_data()
    flags = TINY | {"epochs": 2, "epoch_steps": 3, "lr": 0.001, "validate_epochs": 2}
    own = {key: value for key, value in flags.items() if key != "data"} | {"batch": 1}
    argv = ["train", "data", *words(own)]
    pathlib.Path("falls.py").write_text(FALLS)
    code, text = torchrun("falls.py", *argv)
    assert code != 0
    assert "rank 1 falls" in text
    assert "holds a run" not in text
    assert text.count("preparing 2 labelled") == 1  # the first process prepares, and speaks
    assert torch.load("run/last.pt", weights_only=True)["step"] == 3
    code, text = torchrun(cps.__file__, *argv, "--resume")
    assert code == 0, text
    assert text.count("\nnext ") == 1
    assert len(table_of("run/log.csv")) == 2
    assert train(**flags | {"batch": 2, "out": "alone"}) == 0
    one = torch.load("run/last.pt", weights_only=True)
    two = torch.load("alone/last.pt", weights_only=True)
    config = cps.Config(**two["config"])
    for a, b, fresh in zip(one["parts"], two["parts"], cps.make_pair(config, len(IDS) + 1)):
        moved = [abs(p - b[name]).max() for name, p in fresh.state_dict().items()]
        assert max(moved) > 3e-4  # what they learn is far more than what they differ by
        assert all(torch.allclose(a[name], b[name], rtol=0, atol=1e-5) for name in a)
    for mine, plain in zip(one["rows"], two["rows"]):  # the log is of all patches
        assert mine[:-1] == pytest.approx(plain[:-1], abs=1e-3, nan_ok=True)


# 14. Command line
# --------------------------------------------------------------------------------------------------
class Evil:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


def make_bad_files():
    image, label = phantom(0)
    hole = np.arange(SHAPE[2]) == 3
    arrays = {
        "nan": np.where(hole, np.nan, image).astype(np.float32),
        "hole": np.where(hole, np.nan, label).astype(np.float32),
        "2d": image[0],
        "4d": np.stack([image] * 2, 3),
        "flat": image * 0,
        "cut": image,
        "small": label[1:],
        "half": label.astype(np.float32) / 2,
        "minus": -label.astype(np.int16),
        "label": label,
    }
    for name, array in arrays.items():
        write(f"bad/{name}.nii.gz", array)
    os.truncate("bad/cut.nii.gz", 1000)
    contents = {
        "text.nii.gz": b"no scan",
        "empty.nii": b"",
        "text.pt": b"no model",
        "text.onnx": b"no model",
        "evil.pt": pickle.dumps(Evil(), protocol=2),
    }
    for name, content in contents.items():
        pathlib.Path("bad", name).write_bytes(content)
    torch.save({"config": Evil()}, "bad/evil2.pt")
    torch.save({"model": {"weight": torch.zeros(3)}}, "bad/other.pt")
    torch.save(torch.zeros(3), "bad/tensor.pt")


BAD = [  # the command line, and a word of its error
    ("", "COMMAND"),
    ("dance", "dance"),
    ("train nowhere", "nowhere"),
    ("train bad/label.nii.gz", "bad/label.nii.gz"),
    ("predict CHECKPOINT bad/no out", "bad/no"),
    ("predict no.pt bad/label.nii.gz out", "no.pt"),
    ("predict CHECKPOINT bad/label.nii.gz", "out"),
    ("predict CHECKPOINT bad out.nii.gz", "out.nii.gz"),
    ("predict CHECKPOINT bad/label.nii.gz out --tta", "--tta"),
    ("predict CHECKPOINT bad/label.nii.gz out --networks c", "--networks"),
    ("evaluate bad/label.nii.gz nowhere", "nowhere"),
    ("evaluate nowhere bad/label.nii.gz", "nowhere"),
    ("evaluate bad/label.nii.gz bad/label.nii.gz --csv .", "."),
    ("evaluate bad/label.nii.gz data/labelsTr", "label"),  # no name in common
    ("train data --unlabelled nowhere", "nowhere"),
    ("train data --unlabelled data/imagesUn", "imagesUn"),  # each twice
    ("train data --unlabelled data/imagesTr", "name it once"),
    ("train --clip auto data", "paths come before"),
    ("train data --split nowhere.json", "nowhere.json"),
    ("train data --out data/imagesTr/c0.nii.gz", "data/imagesTr/c0.nii.gz"),
    ("train data --out data/imagesTr/c0.nii.gz/x", "data/imagesTr/c0.nii.gz"),
    ("info --classes 0", "--classes"),
    ("info --checkpoint CHECKPOINT", "--checkpoint"),
    ("export CHECKPOINT model.pt", "model.pt"),
    ("export bad/text.pt a.onnx", "bad/text.pt"),
]
FLAGS = """
--nonsense 1; --batch two; --batch 0; --batch -1; --batch 1e3; --patch 7 8 8; --patch 8 8
--patch 0 8 8; --patch 8 8 8.5; --patch -8 8 8; --clip 200 -68; --clip 5; --clip nan 5; --clip inf 5
--clip auto 5; --clip 5 5; --lr -1; --lr nan; --lr inf; --lr 0; --momentum 1.5; --momentum nan
--min-overlap 1; --min-overlap 0; --method best; --preset slow; --labelled 99; --labelled -1
--val 99; --val nan; --val inf; --val -1; --test 99; --test nan; --mirror q; --device tpu
--device cuda:9; --device cuda:x; --spacing 1 1 0; --spacing 1 1; --spacing 1 1 nan
--spacing 1 1 1e9
--epochs 0; --levels 0; --levels 20000; --intensity -1; --intensity nan; --seed -1; --workers -1
--lam nan; --lam -1; --rampup inf; --halve-epochs 0; --validate-epochs 0; --epoch-steps 0
--base-channels 0; --weight-decay nan; --grad-clip nan; --grad-clip -1; --spatial inf
--seed 36893488147419103232; --patch 1048576 1048576 1048576; --epochs 1000000000000000000000
--batch 1000000000000; --batch 1025; --val 1.5; --test 2.5; --spatial 7"""
for flags in re.split("[;\n]+", FLAGS.strip()):
    BAD.append((f"train data {flags}", flags.split()[0]))
for tolerance in ("nan", "0", "-1", "inf", "two"):
    BAD.append(
        (f"evaluate bad/label.nii.gz bad/label.nii.gz --tolerance {tolerance}", "--tolerance")
    )
for name in (
    "text.nii.gz",
    "empty.nii",
    "cut.nii.gz",
    "nan.nii.gz",
    "4d.nii.gz",
    "2d.nii.gz",
    "flat.nii.gz",
):
    BAD.append((f"predict CHECKPOINT bad/{name} out", name))
for name in ("text.pt", "evil.pt", "evil2.pt", "other.pt", "tensor.pt", "text.onnx", "cut.nii.gz"):
    BAD.append((f"predict bad/{name} bad/label.nii.gz out", f"bad/{name}: cannot be loaded"))
for name in ("small", "half", "minus", "text", "hole"):
    BAD.append((f"evaluate bad/{name}.nii.gz bad/label.nii.gz", name))


@pytest.mark.parametrize("line, word", BAD, ids=[line for line, _ in BAD])
def test_bad_input_gets_one_line_and_exit_code_2(line, word, trained, capsys):
    make_bad_files()
    make_data(labelled=4)
    argv = line.replace("CHECKPOINT", f"{trained}/native/best.pt").split()
    if argv[:1] == ["train"]:
        others = {f"--{key.replace('_', '-')}" for key in TINY} & {*argv}
        more = {k: v for k, v in TINY.items() if f"--{k.replace('_', '-')}" not in others}
        more.pop("data")
        argv += words(more)
    assert cps.main(argv) == 2
    (error,) = errors_of(capsys)
    assert word.strip("-") in error
    assert "Error" not in error
    assert not {"owned", "out", "run", "out.nii.gz", "runs"} & {*os.listdir()}  # nothing was begun


def test_a_device_that_is_not_there_is_not_blamed_on_the_checkpoint(trained, capsys):
    """Not `best.pt: cannot be loaded, --device cuda:9 ...`."""
    write("in/scan.nii", SCAN)
    argv = ["predict", f"{trained}/native/best.pt", "in/scan.nii", "out", "--device", "cuda:9"]
    assert cps.main(argv) == 2
    (error,) = errors_of(capsys)
    assert error.startswith("--device cuda:9")


def nifti(array, affine=None, kind=nib.Nifti1Image, **header):
    """Bytes of a NIfTI file, fields of its header set as nibabel would never do by itself."""
    image = kind(array, np.diag((*MM, 1)) if affine is None else affine, dtype=array.dtype)
    head = image.header
    data = array.astype(array.dtype, order="F").tobytes("F")
    head["vox_offset"] = head.single_vox_offset
    for key, value in header.items():
        head[key] = value
    gap = bytes(int(head.single_vox_offset) - len(head.binaryblock))
    return head.binaryblock + gap + data


def dims(*numbers):
    return {"dim": [*numbers, *[1] * (8 - len(numbers))]}


SCAN = phantom(0)[0]
TILT = np.diag((*MM, 1)) + 0.02 * np.eye(4, k=1)
FLAT = {"sform_code": 0, "qform_code": 0}  # the spacing is that of pixdim alone
RGB = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])

FINE = {  # name: bytes that must simply work
    **{
        f"{np.dtype(kind)}.nii": nifti(SCAN.astype(kind))
        for kind in ("u2", "i4", "f4", "f8", "u1", "i8", "u8")
    },
    "big endian.nii": nib.Nifti1Image(SCAN, np.eye(4)).header.as_byteswapped(">").binaryblock
    + bytes(4)
    + SCAN.astype(">i2").tobytes("F"),
    "slope.nii": nifti(SCAN, scl_slope=2, scl_inter=-100),
    "slope inf.nii.gz": gzip.compress(nifti(SCAN, scl_slope=np.inf, scl_inter=1)),
    "slope0.nii": nifti(SCAN, scl_slope=0),
    "slope nan.nii": nifti(SCAN, scl_slope=np.nan, scl_inter=np.nan),
    "two forms.nii": nifti(SCAN, qform_code=1, sform_code=2, qoffset_x=99, quatern_b=0.3),
    "sheared.nii": nifti(SCAN, TILT),
    "no form.nii": nifti(SCAN, **FLAT),
    "nifti2.nii": nifti(SCAN, kind=nib.Nifti2Image),
    "Ä space (1) 心.nii": nifti(SCAN),
    "4d of one.nii": nifti(SCAN[..., None]),
    "zipped.nii.gz": gzip.compress(nifti(SCAN)),
    "less than the patch.nii": nifti(SCAN[:3, :5, :2]),
    "one voxel thick.nii": nifti(SCAN[:, :1]),
    "two voxels.nii": nifti(SCAN[8:10, 7:8, 5:6]),
    "trailing.nii": nifti(SCAN) + b"more",
    "thin.nii": nifti(SCAN, **FLAT, pixdim=[1] + [0] * 7),  # nibabel takes it for 1 mm
    "sum.nii.gz": gzip.compress(nifti(SCAN))[:-8] + bytes(8),  # nor does it read the checksum
    "unit.nii": nifti(SCAN, xyzt_units=1),
    "window.nii": nifti(SCAN, cal_min=1, cal_max=0),
    "pixdim nan.nii": nifti(SCAN, pixdim=[np.nan] * 8),  # the affine says it
    "five.nii": nifti(SCAN[..., None, None]),
    "large.nii": nifti(SCAN.astype("i8") * 2**40 + 2**30),
    "intent.nii": nifti(SCAN, intent_code=1007, slice_code=99, descrip=b"\xff\xfe"),
    "far.nii": nifti(SCAN, srow_x=[1, 0, 0, 1e9]),
}
BROKEN = {  # name: bytes that must be refused in one sentence
    "zero.nii": nifti(SCAN, **dims(3, 0, 14, 10)),
    "minus.nii": nifti(SCAN, **dims(3, -4, 14, 10)),
    "vast.nii": nifti(SCAN, **dims(3, 32767, 32767, 32767)),
    "rank.nii": nifti(SCAN, **dims(9, 4)),
    "vast.nii.gz": gzip.compress(nifti(SCAN, **dims(7, *[32767] * 7))),
    "magic.nii": nifti(SCAN, magic=b"no!"),
    "kind.nii": nifti(SCAN, datatype=7),
    "complex.nii": nifti(SCAN.astype("c8")),
    "rgb.nii": nifti(RGB),
    "cut.nii": nifti(SCAN)[:999],
    "head.nii": nifti(SCAN)[:100],
    "0.nii": b"",
    "0.nii.gz": b"",
    "text.nii": b"a scan" * 99,
    "no gzip.nii.gz": nifti(SCAN)[3:],
    "cut.nii.gz": gzip.compress(nifti(SCAN))[:500],
    "2d.nii": nifti(SCAN[0]),
    "4d.nii": nifti(np.stack([SCAN] * 2, 3)),
    "void.nii": nifti(SCAN, vox_offset=1e9),
    "wide.nii": nifti(SCAN, **FLAT, pixdim=[1, 1e9, 1, 1, 0, 0, 0, 0]),
    "plane.nii": nifti(SCAN, srow_y=[0] * 4),
    "flat.nii": nifti(SCAN * 0),
    "nowhere.nii": nifti(SCAN, srow_x=[np.nan] * 4),
    "air.nii": nifti(SCAN - 30000),
    "slope inf.nii": nifti(SCAN, scl_slope=1e38, scl_inter=3e38),
    "nan.nii": nifti(np.where(SCAN > 90, np.nan, SCAN).astype("f4")),
    "inf.nii": nifti(np.where(SCAN > 90, np.inf, SCAN).astype("f8")),
    "twice.nii.gz": gzip.compress(gzip.compress(nifti(SCAN))),
    "gzip.nii": gzip.compress(nifti(SCAN)),
    "scan.png.nii": b"\x89PNG\r\n\x1a\n" + bytes(999),
    "quatern.nii": nifti(SCAN, sform_code=0, qform_code=1, quatern_b=np.nan),
    "vast mm.nii": nifti(SCAN, srow_x=[1e30, 0, 0, 0]),
    "thin mm.nii": nifti(SCAN, srow_x=[1e-6, 0, 0, 0]),
    "twin axes.nii": nifti(SCAN, srow_y=[1, 0, 0, 0]),
    "inf form.nii": nifti(SCAN, srow_z=[0, 0, np.inf, 0]),
    "offset.nii": nifti(SCAN, vox_offset=-1e9),
    "bits.nii": nifti(SCAN, datatype=1, bitpix=1),
    "rank 0.nii": nifti(SCAN, **dims(0)),
    "complex64.nii.gz": gzip.compress(nifti(SCAN.astype("c16"))),
}
PATHS = {  # name: what makes it
    "loop.nii": lambda p: os.symlink(p, p),
    "gone.nii": lambda p: os.symlink("nobody", p),
    "folder.nii.gz": os.mkdir,
    "pipe.nii": os.mkfifo,
}


@pytest.mark.parametrize("name", [*FINE, *BROKEN, *PATHS])
def test_predict_answers_any_file_with_a_segmentation_or_one_sentence(name, trained, capfd):
    with suppress(KeyError), open(name, "wb") as file:
        file.write((FINE | BROKEN)[name])
    if name in PATHS:
        with suppress(FileNotFoundError):
            os.remove(name)
        PATHS[name](name)
    code = cps.main(["predict", f"{trained}/native/best.pt", name, "out"])
    errors = errors_of(capfd)
    if name in FINE:
        assert code == 0
        assert not errors
        scan = nib.load(name)
        out = nib.load(f"out/{name.split('.nii')[0]}.nii.gz")
        assert out.shape == scan.shape
        assert np.array_equal(out.affine, scan.affine)
        assert np.asarray(out.dataobj).max() <= IDS[-1]
    else:
        assert code == 2
        assert len(errors) == 1
        assert errors[0].startswith(name)
        assert not os.path.exists("out") or not os.listdir("out")


def test_predict_answers_a_file_that_nobody_may_read(trained, capsys, monkeypatch):
    write("in/secret.nii", SCAN)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "in/secret.nii")

    monkeypatch.setattr(nib, "load", refuse)  # the tests may run as root
    assert cps.main(["predict", f"{trained}/native/best.pt", "in/secret.nii", "out"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "in/secret.nii" in error and "Permission denied" in error


LABELS = [
    ("i2", 65535 - 2**16, 2),
    ("u2", 65535, 2),
    ("u2", 256, 2),
    ("f4", 0.9999, 0),
    ("f4", 1.5, 2),
    ("f4", np.nan, 2),
    ("i4", -1, 2),
    ("f8", 255.0, 0),
    ("u1", 0, 0),
    ("i8", 2**32 + 1, 2),
    ("u4", 2**32 - 1, 2),
    ("f4", 1e30, 2),
    ("f8", -0.4, 2),
]


@pytest.mark.parametrize("kind, value, code", LABELS)
def test_labels_are_whole_numbers_from_0_to_255(kind, value, code, capsys):
    label = np.ones(SHAPE, kind)
    label[5:9, 5:9] = value
    pathlib.Path("label.nii").write_bytes(nifti(label))
    assert cps.main(["evaluate", "label.nii", "label.nii"]) == code
    assert len(errors_of(capsys)) == (code > 0)


def mangled(content, rng):
    """A checkpoint cut at a random byte, and one in which random bytes are other ones."""
    spoiled = bytearray(content)
    for place in rng.integers(0, len(content), 20):
        spoiled[place] ^= rng.integers(1, 256)
    return content[: rng.integers(len(content))], bytes(spoiled)


def test_damaged_checkpoints_are_refused(trained, capsys):
    write("in/scan.nii", SCAN)
    content = pathlib.Path(f"{trained}/native/best.pt").read_bytes()
    rng = np.random.default_rng(0)
    state = torch.load(f"{trained}/native/best.pt", weights_only=True)
    cases = [part for _ in range(15) for part in mangled(content, rng)]
    for change in (
        {"config": {"colour": 1}},
        {"parts": []},
        {"ids": [1, 2, 3]},
        {"ids": None},
        {"config": state["config"] | {"levels": 3}},
        {"config": state["config"] | {"patch": (7, 7, 7)}},
        {"config": None},
        {"version": 1},
        {"version": None},
        {"one_piece": None},
        {"step": 1},
    ):
        torch.save(state | change, file := io.BytesIO())
        cases.append(file.getvalue())
    for case in cases[:-1]:
        pathlib.Path("bad.pt").write_bytes(case)
        assert cps.main(["predict", "bad.pt", "in/scan.nii", "out"]) == 2
        (error,) = errors_of(capsys)
        assert error.startswith("bad.pt: ")
    os.mkdir("empty")
    for path in ("empty", "nowhere.pt"):
        assert cps.main(["predict", path, "in/scan.nii", "out"]) == 2
        assert errors_of(capsys)[0].startswith(path)
    pathlib.Path("bad.pt").write_bytes(cases[-1])  # the last one is whole
    assert cps.main(["predict", "bad.pt", "in/scan.nii", "out"]) == 0


def test_checkpoints_of_another_version_or_program_get_a_sentence(trained, capsys):
    state = torch.load(f"{trained}/native/best.pt", weights_only=True)
    write("in/scan.nii", SCAN)
    for content in (state | {"version": 1}, {"model": {}, "epoch": 3}, [1, 2], None):
        torch.save(content, "other.pt")
        assert cps.main(["predict", "other.pt", "in/scan.nii", "out"]) == 2
        (error,) = errors_of(capsys)
        assert "version" in error


def test_a_label_without_an_image_is_named(capsys):
    make_data()
    write("data/labelsTr/lost.nii.gz", phantom(9)[1])
    assert train() == 2
    assert not os.path.exists("run")
    (error,) = errors_of(capsys)
    assert "data/imagesTr" in error
    assert "'lost'" in error
    assert "c0" not in error


@pytest.mark.parametrize(
    "bad, part",
    [
        ("small", "labels"),
        ("half", "labels"),
        ("minus", "labels"),
        ("nan", "images"),
        ("4d", "images"),
        ("text", "images"),
        ("flat", "images"),
    ],
)
def test_bad_training_case_is_named(bad, part, capsys):
    make_data(labelled=3)
    make_bad_files()
    os.replace(f"bad/{bad}.nii.gz", f"data/{part}Tr/c1.nii.gz")
    assert train(val=1.0) == 2
    named, summary = errors_of(capsys)  # a line for each bad case, then one
    assert f"{part}Tr/c1.nii.gz" in named
    assert not os.path.exists("run")


@pytest.mark.parametrize(
    "spoil, word",
    [
        (lambda: shutil.rmtree("data/labelsTr"), "labelsTr"),
        (lambda: shutil.rmtree("data/imagesTr"), "imagesTr"),
        (lambda: [path.unlink() for path in pathlib.Path("data/imagesUn").iterdir()], "imagesUn"),
        (lambda: [write(f"data/labelsTr/c{i}.nii.gz", SCAN * 0) for i in range(6)], "empty"),
        (lambda: shutil.copy("data/imagesTr/c1.nii.gz", "data/imagesTr/c2.nii.gz"), "c1.nii.gz"),
        (lambda: os.symlink("nobody", "data/imagesTr/c9.nii"), "c9.nii"),
        (lambda: os.mkdir("data/imagesUn/folder.nii"), "folder.nii"),
    ],
)
def test_data_folders_that_cannot_be_used(spoil, word, capsys):
    make_data()
    spoil()
    assert train() == 2
    assert any(word in error for error in errors_of(capsys))
    assert not os.path.exists("run")
