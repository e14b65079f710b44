"""Tests of cps.py: each formula against a plain second implementation, whole runs, bad input, and
the fifteen traps that a toy version of this method falls into (`test_trap_01_...` to 15).

    python -m pytest -q test_cps.py
"""
import csv
import dataclasses
import functools
import gzip
import io
import itertools
import os
import pathlib
import pickle
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing, nullcontext, suppress

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_leaves

import cps

torch.set_num_threads(1)  # networks this small gain nothing from two, and wait long on a busy CPU
IDS = [1, 5]  # label ids of the test data: not 1, 2, so that a class taken for an id shows
SHAPE, PATCH, MM = (16, 14, 10), (8, 8, 8), (1.0, 2.0, 3.0)
TINY = {"patch": PATCH, "levels": 2, "base_channels": 4, "epochs": 2, "epoch_steps": 3, "lr": 0.05,
        "momentum": 0.9, "validate_epochs": 1, "val": 2.0, "labelled": 2, "device": "cpu",
        "data": "data", "out": "run", "cache": "cache"}
STILL = {"intensity": 0.0, "spatial": 0.0}  # no augmentation

# Helpers ------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Work in an empty folder, draw no figures, give back the signals that `train` takes over."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if not installed: saves time
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    list(itertools.starmap(signal.signal, handlers))

def write(path, array, affine=None):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag((*MM, 1)) if affine is None else affine), path)

def phantom(seed, shape=SHAPE):
    """Noise with a bright box of label 1 at the left and a brighter one of label 5 at the right."""
    rng, label = np.random.default_rng(seed), np.zeros(shape, np.uint8)
    x, y, z = rng.integers(1, 4, 3)
    label[x:x + 5, y:y + 8, z:z + 5], label[x + 6:x + 11, y:y + 8, z:z + 5] = 1, 5
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
    return [word for key, value in flags.items() for word in (
        f"--{key.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,)))]

def train(*more, **flags):
    """main(["train", ...]) of tiny networks; returns the exit code."""
    flags = TINY | flags
    return cps.main(["train", flags.pop("data"), *more, *words(flags)])

def patches(rank=0, **changes):
    config = cps.Config(**TINY | changes)
    return cps.Patches(config, cps.prepare(cps.split_cases(config), config), IDS, rank)

def names(config, part):
    return {case.name for case in cps.split_cases(config)[part]}

def same_weights(*paths):
    """Whether all tensors of two checkpoints, of networks and optimisers, are equal to the bit."""
    one, two = ([leaf for leaf in tree_leaves(torch.load(path, weights_only=True))
                 if isinstance(leaf, torch.Tensor)] for path in paths)
    assert len(one) == len(two) > 50
    return all(map(torch.equal, one, two))

def table_of(path, but=("seconds",)):
    """Rows of a CSV file; without the seconds, which differ from run to run."""
    with open(path) as file:
        return [{k: v for k, v in row.items() if k not in but} for row in csv.DictReader(file)]

def spy(patch, before=lambda step: None):
    """Record the batches of all training steps; before(step) may act, or raise."""
    batches, one = [], cps.train_step
    def watched(nets, optimisers, batch, *rest):
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
    """A function that does cps.train_step on a batch: loss_sup, loss_cps, agreement, foreground."""
    sgd = [torch.optim.SGD(net.parameters(), lr, 0.9, nesterov=True) for net in nets]
    rest = 0.7, config, torch.amp.GradScaler("cpu", enabled=False), nullcontext()
    return lambda batch: cps.train_step(nets, sgd, batch, *rest).tolist()

# Oracles: the same thing, as plainly as possible --------------------------------------------------
def plain_loss(scores, target, dice=True):
    """Dice + CE, sample by sample and class by class; voxels with target -1 count nowhere."""
    losses = []
    for out, true in zip(scores, target):
        out, true = out[:, true >= 0], true[true >= 0]  # (K, n), (n,)
        losses.append(F.cross_entropy(out.T, true))
        for k in range(1, len(out)) if dice else ():
            p, t = out.softmax(0)[k], (true == k).float()
            part = 1 - (2 * (p * t).sum() + 1e-5) / (p.sum() + t.sum() + 1e-5)
            losses[-1] = losses[-1] + part / (len(out) - 1)
    return sum(losses) / len(losses)

def plain_cross_entropies(a, b, valid):
    """L_cps of cross-entropy alone, voxel by voxel: each network against the other's argmax."""
    total = 0.0
    for i, *xyz in np.ndindex(valid.shape):
        one, two = a[(i, slice(None), *xyz)], b[(i, slice(None), *xyz)]
        for student, teacher in ((one, two), (two, one)):
            nll = np.log(np.exp(student).sum()) - student[teacher.argmax()]
            total += nll * valid[(i, *xyz)] / valid[i].sum() / len(valid)
    return total

def plain_windows(nets, volume, patch, num_classes, overlap, flips):
    """Sliding window with all sums of the whole volume in memory: float64 (K, X, Y, Z)."""
    shape, starts = np.maximum(volume.shape, patch), []
    padded = np.pad(volume, [(0, s - n) for s, n in zip(shape, volume.shape)])
    total = torch.zeros(num_classes, *shape, dtype=torch.float64)
    axes = [(torch.arange(p) - (p - 1) / 2) / (p / 8) for p in patch]
    weight = torch.exp(-sum(g ** 2 for g in torch.meshgrid(*axes, indexing="ij")) / 2).clamp(1e-3)
    for s, p in zip(shape, patch):
        firsts = [0]
        while firsts[-1] + p < s:
            firsts.append(min(firsts[-1] + max(1, int(p * (1 - overlap))), s - p))
        starts.append(firsts)
    for corner in itertools.product(*starts):
        box = tuple(slice(c, c + p) for c, p in zip(corner, patch))
        for net, flip in itertools.product(nets, flips):
            out = net(torch.tensor(padded[box])[None, None].flip(flip)).softmax(1).flip(flip)
            total[(slice(None), *box)] += out[0].double() * weight
    return total[(slice(None), *map(slice, volume.shape))]

# The surface at a voxel corner: code of the 8 voxels -> |normals| of the triangles, in eighths.
ROWS = {1: [111], 3: [220] * 2, 6: [111] * 2, 24: [111] * 2, 7: [400, 222, 111], 22: [111] * 3,
        105: [111] * 4, 25: [22, 22, 111], 15: [400] * 2, 23: [111, 111, 222, 222],
        27: [111, 333, 22, 202], 30: [400, 111, 111, 222], 60: [220] * 4}
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

# The method ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("init_b", ["he", "xavier"])
def test_trap_01_networks_start_different(init_b):
    nets = [net for seed in (0, 0, 1)
            for net in cps.make_pair(cps.Config(**TINY, init_b=init_b, seed=seed), 3)]
    for a, b, a0, b0, a1, b1 in zip(*(net.parameters() for net in nets)):
        assert torch.equal(a, a0) and torch.equal(b, b0)
        if a.ndim == 5:  # a convolution; the norms begin as 1 and 0 in all networks
            assert not any(torch.equal(*two) for two in itertools.combinations((a, b, a1, b1), 2))
    a, b = (cps.pseudo_label(net(logits(1, 1, 8, 8, 8))) for net in nets[:2])
    assert (a == b).float().mean() < 0.9

def test_trap_02_no_gradient_through_the_target():
    a, b = logits(2, 3, 4, 5, 6), logits(2, 3, 4, 5, 6, seed=1)
    label = cps.pseudo_label(b)
    assert label.dtype == torch.int64 and not label.requires_grad
    assert torch.equal(label, b.argmax(1))
    got = torch.autograd.grad(cps.cross_pseudo_loss(a, b), (a, b))
    for gradient, student, teacher in zip(got, (a, b), (b, a)):
        loss = cps.dice_ce_loss(student, teacher.argmax(1))  # alone: the other term adds exactly 0
        assert torch.equal(gradient, torch.autograd.grad(loss, student)[0])

def test_trap_03_both_crops_agree_on_the_overlap():
    rng, moved = np.random.default_rng(0), np.zeros(3)
    for _ in range(500):
        patch, shape = rng.integers(1, 12, 3), rng.integers(1, 24, 3)
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

@pytest.mark.parametrize("batch", [1, 2])
def test_trap_04_cross_pseudo_loss_is_the_loop_over_voxels(batch):
    a, b = logits(batch, 3, 4, 3, 5), logits(batch, 3, 4, 3, 5, seed=1)
    for valid in (logits(batch, 4, 3, 5) > -1, torch.ones(batch, 4, 3, 5, dtype=torch.bool)):
        arrays = [t.detach().double().numpy() for t in (a, b, valid)]
        plain_ce = cps.cross_pseudo_loss(a, b, valid, dice=False)
        assert plain_ce.item() == pytest.approx(plain_cross_entropies(*arrays), rel=1e-5)
        label_a, label_b = (t.argmax(1).masked_fill(~valid, -1) for t in (a, b))
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
    out, none = logits(2, 3, 4, 4, 4), torch.zeros(2, 4, 4, 4, dtype=torch.bool)
    loss = cps.dice_ce_loss(out, none.long() - 1, dice=dice)
    loss.backward()
    assert loss.item() == 0 and (out.grad == 0).all()
    assert cps.cross_pseudo_loss(out, out, none, dice=dice).item() == 0

def test_trap_07_rampup_starts_near_zero_and_gets_large(capsys):
    config, steps = cps.Config(), range(1000)
    ramp = [cps.rampup(i, config.rampup * len(steps)) for i in steps]
    assert ramp[0] < 0.01 and ramp == sorted(ramp) and np.mean(ramp) > 0.5 and config.lam > 0
    assert cps.rampup(50, 100) == pytest.approx(np.exp(-5 / 4))
    assert ramp[-1] == cps.rampup(300, 300) == cps.rampup(0, 0) == 1
    make_data()  # and the log tells weight, rate and the signs of a collapse to background
    assert train(lam=2.0, rampup=0.6, epochs=5, epoch_steps=1, halve_epochs=2) == 0
    rows = [{k: float(v) for k, v in row.items()} for row in table_of("run/log.csv")]
    assert [r["lam"] for r in rows] == pytest.approx([2 * cps.rampup(i, 3) for i in range(5)], 1e-4)
    assert [r["lr"] for r in rows] == pytest.approx([0.05, 0.05, 0.025, 0.025, 0.0125], 1e-4)
    assert all(0 <= row[k] <= 1 for row in rows for k in ("agreement", "foreground"))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {"1", "5", "mean"} <= {words[1] for words in lines if words[:1] == ["|"]}  # each label
    printed = [[float(word) for word in words[:-1]] for words in lines
               if len(words) == 10 and words[0].isdecimal()]
    want = [[*map(float, row.values())] for row in table_of("run/log.csv", but=())]
    assert np.shape(printed) == (5, 9) and np.allclose(printed, want, rtol=0, atol=1e-5)

def test_trap_14_half_precision_does_not_overflow():
    out = logits(1, 2, 48, 48, 48, scale=100.0).detach().half()  # more voxels than fp16 can count
    target = (out[:, 0] > 50).long()
    want = cps.dice_ce_loss(out.float(), target).item()
    assert cps.dice_ce_loss(out, target).item() == pytest.approx(want, rel=1e-5)

# The network --------------------------------------------------------------------------------------
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
    assert len(norms) == 6
    for norm in norms:
        n = len(norm.weight)
        same = nn.InstanceNorm3d(n, affine=True)
        x = logits(2, n, 4, 4, 4, scale=0.03)  # small: eps has a part
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
        same.load_state_dict(norm.state_dict())
        assert torch.allclose(norm(x), same(x), atol=1e-5)

# Data and patches ---------------------------------------------------------------------------------
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
    steps, judged, seen, sliding = [], set(), [], cps.sliding_window
    handle = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    def watched(nets, *rest, **more):
        judged.add(len(nets))
        return sliding(nets, *rest, **more)
    monkeypatch.setattr(cps, "sliding_window", watched)
    for method in ("supervised", "cps", "context"):
        with monkeypatch.context() as patch:
            batches = spy(patch)
            assert train(method=method, out=method) == 0
        assert len(batches) == 6
        for batch in batches:
            a, b, target, _ = batch["tensors"]
            assert torch.equal(a[:2], b[:2])  # both networks see the same labelled patches
            assert len(a) == len(b) == (2 if method == "supervised" else 4)
            whole = [slice(0, 8)] * 3  # equal crops: in `cps` only
            assert all(([*s] == whole) == (method == "cps") for p in batch["overlaps"] for s in p)
            seen.append(torch.stack([a[:2, 0], target.float()]))
    handle.remove()
    assert len(steps) == 3 * 6 * 2  # of two networks, also where it is supervised
    assert len(judged) == 1  # no ensemble against one network
    assert all(torch.equal(one, two) for one, two in zip(seen * 2, seen[6:] + seen))

def test_trap_10_split_is_disjoint_and_test_cases_do_not_depend_on_the_seed():
    make_data(labelled=12)
    parts = ("labelled", "unlabelled", "val", "test")
    splits = [[names(cps.Config(**TINY | {"test": 3.0, "seed": seed}), part) for part in parts]
              for seed in range(6)]
    for split in splits:
        assert [*map(len, split)] == [2, 12 - 2 - 2 - 3 + 2, 2, 3]
        assert len(set().union(*split)) == 12 + 2
        assert split[3] == splits[0][3]
    assert len({frozenset(split[2]) for split in splits}) > 1

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
    image[0, 0, 0], image[1, 1, 1] = 30000, -30000  # an implant, and a hole
    make_data(image=image, label=label)
    image = np.clip(image.astype(float), -68, 200)
    want = (image - image.mean()) / image.std(ddof=1)
    for got in patches(**STILL)[0]["tensors"][0][:, 0]:  # the cache is float16
        assert np.allclose(got.flatten()[:-1], want.flatten()[:-1], rtol=2e-3, atol=2e-3)

def test_trap_11_label_ids_are_never_averaged():
    """1 and 5 side by side: linear interpolation would make 2, 3 and 4 between them."""
    make_data(label=np.repeat(np.uint8(IDS), (7, 9)).reshape(-1, 1, 1) * np.ones(SHAPE, np.uint8))
    data = patches(spacing=(0.7, 1.3, 2.1), spatial=1.0)
    found = torch.cat([data[i]["tensors"][2] for i in range(8)]).unique().tolist()
    assert found in ([1, 2], [-1, 1, 2])

@pytest.mark.parametrize("spatial", [0.0, 1.0])
def test_trap_13_no_left_right_mirroring_unless_asked_for(spatial):
    make_data(image=np.int16(np.indices(SHAPE)[0] * 10))  # brighter and brighter to the right
    assert cps.Config().mirror == ""
    rising = {}
    for mirror in ("", "yz", "x"):
        data = patches(mirror=mirror, intensity=0.0, spatial=spatial)
        images = torch.cat([data[i]["tensors"][k] for i in range(6) for k in (0, 1)])[:, 0]
        slope = images[:, 2:6, 2:6, 2:6].diff(dim=1).mean((1, 2, 3))
        rising[mirror] = (slope > 0).float().mean().item()
    assert rising[""] == rising["yz"] == 1 and 0.2 < rising["x"] < 0.8

@pytest.mark.parametrize("shape", [SHAPE, (16, 6, 5)])
def test_traps_03_05_pairs_are_cut_after_mirroring_and_padding_is_never_valid(shape):
    make_data(shape=shape)
    data, moved, types = patches(intensity=0.0, spatial=0.5, mirror="xyz"), 0, []
    for batch in map(data.__getitem__, range(12)):
        a, b, target, valid = batch["tensors"]
        types.append([(*t.shape, t.dtype) for t in batch["tensors"]])
        for k, (one, two) in enumerate(batch["overlaps"], 2):
            assert torch.equal(a[k, 0][one], b[k, 0][two])
            moved += one != two
        for image, inside in ((a[:2, 0], target >= 0), (a[2:, 0], valid)):
            assert (image[inside] != 0).float().mean() > 0.99  # outside there is only 0
            assert shape == SHAPE or not inside.all()
    assert moved > 12 and all(t == [(4, 1, *PATCH, torch.float32)] * 2 + [
        (2, *PATCH, torch.int64), (2, *PATCH, torch.bool)] for t in types)
    inside = np.prod(np.minimum(shape, PATCH))
    for batch in map(patches(**STILL).__getitem__, range(4)):
        assert all((part > -1).sum() == inside for part in batch["tensors"][2])
        assert all(part.sum() == inside for part in batch["tensors"][3])

def test_any_step_can_be_rebuilt_and_ranks_share_a_batch():
    make_data()
    flags = {"spatial": 0.5, "mirror": "yz"}
    whole, again = patches(**flags), patches(**flags)
    ranks = [patches(rank, batch=1, **flags) for rank in (0, 1)]
    for i in (5, 0, 3):
        one, two, parts = whole[i], again[i], [rank[i] for rank in ranks]
        assert all(map(torch.equal, one["tensors"], two["tensors"]))
        assert one["overlaps"] == two["overlaps"] == parts[0]["overlaps"] + parts[1]["overlaps"]
        for k in (0, 1):  # labelled patches first, then crops
            mine = [part["tensors"][k][j] for j in (0, 1) for part in parts]
            assert torch.equal(one["tensors"][k], torch.stack(mine))
        for k in (2, 3):
            assert torch.equal(one["tensors"][k], torch.cat([p["tensors"][k] for p in parts]))
    assert not torch.equal(whole[0]["tensors"][0], whole[2]["tensors"][0])

def test_augment_changes_the_look_and_at_chance_0_nothing():
    rng, patch = np.random.default_rng(0), np.indices(PATCH, dtype=np.float32).sum(0)
    new = [cps.augment(patch, rng, 1.0) for _ in range(40)]
    assert all(n.shape == PATCH and n.dtype == np.float32 and np.isfinite(n).all() for n in new)
    assert 10 < sum(not np.array_equal(n, patch) for n in new) < 40
    assert np.array_equal(cps.augment(patch, rng, 0.0), np.indices(PATCH).sum(0))

# Training -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("i, pseudo_loss", [(2, "dice_ce"), (3, "ce")])
def test_train_step_is_the_formula(i, pseudo_loss):
    """On padded volumes, in both roles (even and odd steps): losses, agreement and new weights."""
    make_data(shape=(16, 6, 14))
    data = patches(pseudo_loss=pseudo_loss, grad_clip=0.3, intensity=0.0)
    batch, nets, plain, cross, agree, found = data[i], networks(), networks(), 0, 0, 0
    got = stepper(nets, data.config)(batch)
    *images, target, valid = batch["tensors"]
    outs = [net(image) for net, image in zip(plain, images)]
    for k, slices in enumerate(batch["overlaps"]):
        a, b = (out[2 + k][(slice(None), *s)][None] for out, s in zip(outs, slices))
        unseen = ~valid[k][slices[0]][None]
        for out, label in ((a, b.argmax(1)), (b, a.argmax(1))):
            label = label.masked_fill(unseen, -1)
            cross = cross + plain_loss(out, label, pseudo_loss == "dice_ce") / 2
        a, b = a.argmax(1)[~unseen], b.argmax(1)[~unseen]  # padding is in no share
        agree, found = agree + (a == b).float().mean() / 2, found + (
            (a > 0).float().mean() + (b > 0).float().mean()) / 4
    sup = sum(plain_loss(out[:2], target) for out in outs)
    expected = [sup.item(), cross.item(), agree.item(), found.item()]
    assert got == pytest.approx(expected, rel=1e-4)
    (sup + 0.7 * cross).backward()
    for net, learned in zip(plain, nets):
        nn.utils.clip_grad_norm_(net.parameters(), 0.3)
        torch.optim.SGD(net.parameters(), 0.05, 0.9, nesterov=True).step()
        assert all(torch.allclose(p, q, atol=1e-5)
                   for p, q in zip(net.parameters(), learned.parameters()))

def instance_norms(net):
    """The network in contiguous memory, with PyTorch's InstanceNorm3d for each GroupNorm."""
    for name, child in [*net.named_children()]:
        if isinstance(child, nn.GroupNorm):
            norm = nn.InstanceNorm3d(child.num_channels, child.eps, affine=True)
            norm.load_state_dict(child.state_dict())
            setattr(net, name, norm)
        instance_norms(child)
    return net.to(memory_format=torch.contiguous_format)

def test_what_makes_a_step_fast_changes_no_loss_of_20_steps():
    """Channels-last, GroupNorm, one forward for all patches, an optimiser over all tensors at once,
    against contiguous memory, InstanceNorm, a forward for each patch, tensor after tensor."""
    make_data()
    data, plain = patches(epochs=10), [instance_norms(net) for net in networks()]
    nets = [net.to(memory_format=torch.channels_last_3d) for net in networks()]
    step = stepper(nets, data.config, lr=0.01)
    optimisers = [torch.optim.SGD(net.parameters(), 0.01, 0.9, nesterov=True, foreach=False)
                  for net in plain]
    for i in range(20):
        *images, target, valid = data[i]["tensors"]
        outs = [[net(one[None]) for one in image] for net, image in zip(plain, images)]
        sup = sum(plain_loss(torch.cat(out[:2]), target) for out in outs)
        cross = 0
        for k, slices in enumerate(data[i]["overlaps"]):
            a, b = (out[2 + k][(..., *s)] for out, s in zip(outs, slices))
            seen = valid[k][slices[0]][None]
            for out, label in ((a, b.argmax(1)), (b, a.argmax(1))):
                cross = cross + plain_loss(out, label.masked_fill(~seen, -1)) / 2
        for optimiser in optimisers:
            optimiser.zero_grad()
        (sup + 0.7 * cross).backward()
        for net, optimiser in zip(plain, optimisers):
            nn.utils.clip_grad_norm_(net.parameters(), data.config.grad_clip)
            optimiser.step()
        assert step(data[i])[:2] == pytest.approx([sup.item(), cross.item()], abs=1e-5)

def test_signals_are_given_back_after_an_interrupt(monkeypatch):
    make_data()
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    spy(monkeypatch, lambda step: step == 1 and os.kill(os.getpid(), signal.SIGINT))
    assert train() == 130
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before

def test_a_whole_number_will_do_for_a_float():
    config = cps.Config(intensity=0, val=0, lam=0)
    assert config == cps.Config(intensity=0.0, val=0.0, lam=0.0)

def test_trap_03_networks_that_see_single_voxels_agree_on_all_of_the_overlap():
    make_data()
    data, net = patches(intensity=0.0, spatial=0.5, mirror="xyz"), nn.Conv3d(1, 3, 1)
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
    data, nets = patches(method="supervised", **STILL), networks(base=4)
    one, batch = stepper(nets, data.config), next(  # with all classes in both patches
        b for b in map(data.__getitem__, range(9))
        if all(len(target.unique()) == 3 for target in b["tensors"][2]))
    losses = [one(batch)[0] for _ in range(60)]
    assert losses[-1] < 0.2 * losses[0]
    for net in nets:
        found = cps.pseudo_label(net(batch["tensors"][0]))
        assert (found == batch["tensors"][2]).float().mean() > 0.95

def test_same_seed_same_weights():
    make_data()
    assert train(out="one") == train(out="two") == train(out="other", seed=1) == 0
    assert same_weights("one/last.pt", "two/last.pt")
    assert not same_weights("one/last.pt", "other/last.pt")

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
    assert train("--resume", epochs=3, lr=0.01) == 2  # not the run that was begun
    assert "0.01" in capsys.readouterr().err

def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(monkeypatch, capsys):
    make_data()
    one, seen = cps.train_step, []
    def step(*args):
        seen.append(one(*args) * (np.nan if len(seen) == 3 else 1))  # the first of epoch 2
        return seen[-1]
    monkeypatch.setattr(cps, "train_step", step)
    assert train(epochs=3) == 2 and len(seen) == 6
    error, = capsys.readouterr().err.splitlines()
    assert error.startswith("error: run") and "not finite" in error and "--lr" in error
    assert torch.load("run/last.pt", weights_only=True)["step"] == 3

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
    assert same_weights(f"{one}/last.pt", f"{two}/last.pt")
    assert same_weights(f"{one}/best.pt", f"{two}/best.pt")
    assert table_of(f"{one}/log.csv") == table_of(f"{two}/log.csv")
    states = [torch.load(f"{run}/last.pt", weights_only=True)["parts"] for run in (one, two)]
    leaves = [tree_leaves(state) for state in states]  # momentum too
    assert all(map(torch.equal, *([x for x in ls if isinstance(x, torch.Tensor)] for ls in leaves)))

def test_killed_at_any_moment_a_run_can_be_resumed_and_ends_the_same():
    make_data()
    assert train(out="whole") == 0  # in this process, for what torch does only the first time
    code, calls = in_a_child(*line(out="other", cache="c"))
    assert code == 0 and calls > 5000
    rng, plan = np.random.default_rng(0), []
    for i in range(20):
        plan.append((f"run{i}", [int(rng.integers(1, 0.98 * calls))]))
    plan.append(("thrice", [calls // 2, calls // 4, calls // 4]))  # and while it is resumed
    for out, events in plan:
        for n, event in enumerate(events):
            code, _ = in_a_child(*line("--resume", out=out, cache=f"cache-{out}"), event=event)
            assert code == -signal.SIGKILL or n  # what is left may be shorter
        assert train("--resume", out=out, cache=f"cache-{out}") == 0
        same_run("whole", out)

@pytest.mark.parametrize("moment", ["write_bytes", "fsync", "replace"])
@pytest.mark.parametrize("name", ["last.pt", "best.pt", "log.csv"])
def test_killed_while_it_writes_a_run_can_be_resumed(moment, name, monkeypatch):
    """At each stage of `atomic`, half of the bytes are written."""
    make_data()
    assert train(out="whole") == 0
    def die(path, *_):
        path = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else str(path)
        if path.endswith(name):
            seen.append(path)
            if len(seen) == (1 if name == "best.pt" else 2):
                if moment == "write_bytes":
                    with open(path, "wb") as file:
                        file.write(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
    seen, where = [], os if moment == "fsync" else pathlib.Path
    real = getattr(where, moment)
    with monkeypatch.context() as patch:
        patch.setattr(where, moment, lambda path, *more: die(path) or real(path, *more))
        code, _ = in_a_child(*line())
    assert code == (0 if (name, moment) == ("log.csv", "write_bytes") else -signal.SIGKILL)
    assert train("--resume") == 0
    same_run("whole", "run")

def test_a_full_disk_loses_no_earlier_checkpoint(capfd):
    make_data()
    assert train(out="whole") == 0 == train(out="run", epochs=1)
    with open("run/last.pt", "rb") as file:
        before = file.read()
    capfd.readouterr()
    code, _ = in_a_child(*line("--resume"), limit=len(before) // 2)
    error, = capfd.readouterr().err.splitlines()
    assert code == 2 and "last.pt" in error
    assert {*os.listdir("run")} == {"best.pt", "last.pt", "log.csv", "split.json", "config.json",
                                    "cps.py", ".lock0"}  # no temporary folder is left
    with open("run/last.pt", "rb") as file:
        assert file.read() == before
    assert train("--resume") == 0
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

def test_other_cases_than_those_of_the_run_are_refused(capsys):
    """A new case would move others from training to validation."""
    make_data()
    assert train(epochs=1) == 0
    image, label = phantom(99)
    write("data/imagesTr/a.nii.gz", image)
    write("data/labelsTr/a.nii.gz", label)
    assert train("--resume") == 2 and "cases or label ids" in capsys.readouterr().err
    for spoil in (lambda file: file.write_bytes(b"\xff{"), pathlib.Path.unlink):
        spoil(pathlib.Path("run/split.json"))
        assert train("--resume") == 2 and capsys.readouterr().err.count("\n") == 1

def test_predict_never_writes_over_a_scan(trained, capsys):
    write("scans/x.nii.gz", SCAN)
    before = nib.load("scans/x.nii.gz").get_fdata()
    assert cps.main(["predict", f"{trained}/native/best.pt", "scans", "scans/../scans"]) == 2
    assert "OUT_DIR" in capsys.readouterr().err
    assert np.array_equal(nib.load("scans/x.nii.gz").get_fdata(), before)

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

def test_other_labels_than_those_of_the_run_are_refused(capsys):
    make_data()
    assert train(epochs=1) == 0
    for i in range(6):
        label = phantom(i)[1]
        write(f"data/labelsTr/c{i}.nii.gz", np.where(label == 5, 9, label).astype(np.uint8))
    assert train("--resume") == 2 and "[1, 9]" in capsys.readouterr().err

def test_resampling_to_a_spacing_keeps_size_and_place():
    volume = np.repeat(np.arange(12.0, dtype=np.float32), 10 * 8).reshape(12, 10, 8)
    config = cps.Config(**TINY | {"spacing": (2.0, 1.0, 3.0), "clip": (0.0, 11.0)})
    got = cps.preprocess(volume.copy(), np.array(MM), config, "a")  # from 1 x 2 x 3 mm
    assert got.shape == (6, 20, 8)
    want = volume.reshape(6, 2, 10, 8).mean(1).repeat(2, axis=1)  # centres lie between two voxels
    assert np.allclose(got, (want - want.mean()) / want.std(ddof=1), atol=1e-5)

def test_the_same_scan_in_two_places_is_a_leak(capsys):
    make_data()
    shutil.copy("data/imagesTr/c1.nii.gz", "data/imagesUn/again.nii.gz")
    assert train() == 2
    error = capsys.readouterr().err
    assert "again.nii.gz" in error and "c1.nii.gz" in error and not os.path.exists("run")

def test_lack_of_memory_is_one_sentence_and_a_defect_is_a_traceback(monkeypatch, capsys):
    make_data()
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")):
        def fail(*_, error=error):
            raise error
        monkeypatch.setattr(cps, "train_step", fail)
        assert train("--resume") == 2
        error, = capsys.readouterr().err.splitlines()
        assert "--patch" in error and "--batch" in error and "--base-channels" in error
    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(cps, "train_step", fail)
    with pytest.raises(RuntimeError):
        train("--resume")

def test_paper_preset_is_the_paper(monkeypatch, capsys):
    want = {"patch": (160, 160, 96), "clip": (-68.0, 200.0), "batch": 2, "momentum": 0.99,
            "lr": 0.01, "halve_epochs": 200, "epochs": 1000, "epoch_steps": 250, "init_b": "he",
            "pseudo_loss": "dice_ce", "method": "context", "mirror": ""}
    make_data()
    def stop(*_):
        raise cps.UserError("no network today")
    monkeypatch.setattr(cps, "make_pair", stop)
    assert cps.main(["train", "data", "--device", "cpu"]) == 2
    printed = capsys.readouterr().out
    for key, value in want.items():
        assert getattr(cps.Config(), key) == value and f"{key}={value}" in printed

# Reports ------------------------------------------------------------------------------------------
def test_costs_are_those_of_a_hand_count():
    """One level: 3x3x3 convolutions 1>4 and 4>4, a head 4>3; the image wants no gradient."""
    config = cps.Config(patch=(6, 5, 4), levels=1, base_channels=4, batch=3)
    first, second, head, voxels = 27 * 4, 27 * 4 * 4, 4 * 3, 6 * 5 * 4
    weights, forward, step, kept = cps.costs(config, 3)
    assert weights == first + second + head + 2 * 2 * 4 + 3
    assert weights == sum(p.numel() for p in cps.UNet3D(3, 4, 1).parameters())
    assert forward == 2 * voxels * (first + second + head)
    assert step == 2 * voxels * (2 * first + 3 * second + 3 * head) * 2 * (3 + 3)  # A, B; x, u
    # The image, and after each convolution its output and that of the norm; 2 numbers a channel.
    assert kept == 12 * 4 * (voxels * (1 + 4 * 4) + 2 * 2 * 4) + 2 * 3 * 4 * weights
    assert cps.costs(cps.Config(), 14)[0] == sum(
        p.numel() for p in cps.UNet3D(14, 32, 5).parameters()) == 16_544_526
    supervised = cps.costs(dataclasses.replace(config, method="supervised"), 3)
    assert supervised[:2] == (weights, forward) and supervised[2] == step / 2

def rows_of(markdown):
    """The rows of a Markdown table, each a list of its cells; the line under the head checked."""
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in markdown.splitlines()]
    assert all(set(cell) == {"-"} for cell in rows.pop(1)) and len({*map(len, rows)}) == 1
    return rows

def test_info_fills_every_blank_and_describes_a_checkpoint(trained, monkeypatch, capsys):
    monkeypatch.setattr(cps, "make_phantom", None)  # not built for this
    for which, words in (
            (["--base-channels", "1"], ["(160, 160, 96)", "lr 0.01, / 2 each 200"]),
            (["--checkpoint", f"{trained}/native/last.pt"], ["(8, 8, 8)", "120 steps", "0.05"])):
        assert cps.main(["info", *which, "--device", "cpu", "--watts", "100", "--carbon", "2"]) == 0
        rows = dict(rows_of(capsys.readouterr().out.strip()))
        assert all(rows.values()) and all(word in " ".join(rows.values()) for word in words)
        hours, kwh, kg = (float(rows[name].split()[0]) for name in ("training time", "energy",
                                                                    "CO2 eq"))
        assert kwh == pytest.approx(hours / 10, 0.02) and kg == pytest.approx(kwh * 2, 0.02)

def test_ablate_compares_arms_of_equal_steps_on_cases_that_choose_nothing(monkeypatch, capsys):
    make_data(labelled=8)
    flags = {k: v for k, v in TINY.items() if k not in ("data", "labelled", "val")}
    argv = ["ablate", "data", "--labelled", "1", "2", "--seeds", "2", "--seed", "3", "--val", "2",
            "--test", "3", *words(flags)]
    steps = spy(monkeypatch)
    assert cps.main(argv) == 0
    table = rows_of(pathlib.Path("run/ablation.md").read_text())
    assert "\n".join(capsys.readouterr().out.splitlines()[-len(table) - 1:]) in (
        pathlib.Path("run/ablation.md").read_text())
    arms = [*itertools.product(("supervised", "cps", "context"), "12"), ("upper bound", "all")]
    arms.sort(key=lambda arm: arm[1])
    assert [tuple(row[:2]) for row in table[1:]] == arms and len(steps) == 6 * len(arms) * 2
    rows, tests = table_of("run/ablation.csv"), names(cps.Config(**TINY | {"test": 3.0}), "test")
    assert {row["case"] for row in rows} == tests and len(rows) == len(arms) * 2 * 3 * len(IDS)
    def dice(which, **wanted):  # (seeds, cases, labels)
        return np.reshape([float(row[which]) for row in rows
                           if all(row[k] == v for k, v in wanted.items())], (2, 3, -1))
    for (method, n), row in zip(arms, table[1:]):
        a, both = (dice(which, method=method, labels=n) for which in ("dice_a", "dice_both"))
        shown = [a.mean((1, 2)), both.mean((1, 2)), *a.mean(1).T]  # a mean for each seed
        assert row[2:6] == [f"{x.mean():.4f} +- {x.std(ddof=1):.4f}" for x in shown]
        if method in ("cps", "context"):
            gain = (a - dice("dice_a", method="supervised", labels=n)).mean(2).ravel()
            half = 2.5706 * gain.std(ddof=1) / 6 ** 0.5  # Student's t of 5 degrees, 97.5 %
            got = [float(word.strip("[],")) for word in row[6].split()]
            assert got == pytest.approx([gain.mean(), gain.mean() - half, gain.mean() + half],
                                        abs=1e-4)
        else:
            assert row[6] == ""
    for method, n, seed in (("context", "2", 4), ("supervised", "all", 3)):
        run = cps.Run.load(f"run/{method}-{n}-{seed}/best.pt")
        key = "upper bound" if n == "all" else method
        assert (run.config.seed, run.config.method) == (seed, method)
        case = cps.prepare(cps.split_cases(run.config), run.config)["test"][0]
        scores = cps.validate(run, [case], networks="both")[case.name]
        assert [f"{scores[i][0]}" for i in IDS] == [
            r["dice_both"] for r in rows if (r["method"], r["labels"], r["seed"], r["case"]) == (
                key, n, f"{seed}", case.name)]
    before = pathlib.Path("run/ablation.csv").read_bytes()
    assert cps.main(argv) == 0 and len(steps) == 6 * len(arms) * 2  # finished arms are kept
    assert pathlib.Path("run/ablation.csv").read_bytes() == before
    assert cps.main(["ablate", "data", "--seeds", "0"]) == 2

# Whole runs ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data and two trained runs: `native`, and `fine` with resampled slices."""
    root = tmp_path_factory.mktemp("trained")
    make_data(f"{root}/data")
    flags = {"data": f"{root}/data", "cache": f"{root}/cache", "epochs": 6, "epoch_steps": 20,
             "halve_epochs": 3, "lam": 0.5, "base_channels": 6, "test": 1.0}
    assert train(out=f"{root}/native", **flags) == 0
    assert train(out=f"{root}/fine", spacing=(1.0, 2.0, 2.0), **flags) == 0
    return root

def test_trap_15_train_predict_and_evaluate_give_one_dice_of_whole_volumes(trained):
    run = f"{trained}/native"
    assert {"best.pt", "last.pt", "config.json", "split.json", "log.csv", "cps.py"} <= {
        *os.listdir(run)}
    assert max(float(row["dice"]) for row in table_of(f"{run}/log.csv")) > 0.5
    assert cps.main(["predict", f"{run}/best.pt", f"{trained}/data/imagesTr", "out"]) == 0
    os.remove("out/c0.nii.gz")  # a missing prediction counts as empty
    assert cps.main(["evaluate", "out", f"{trained}/data/labelsTr", "--csv", "scores.csv"]) == 0
    scores = {(row["case"], int(row["label"])): [float(row["dice"]), float(row["nsd"])]
              for row in table_of("scores.csv")}
    assert len(scores) == 6 * 2 and scores["c0", 1] == scores["c0", 5] == [0, 0]
    state = torch.load(f"{run}/last.pt", weights_only=True)  # resumed at its end, it only reports
    (case, found), = cps.train(cps.Config(**state["config"] | {"resume": True}))["results"].items()
    assert case != "c0"
    for label in IDS:  # in the cache the image is float16: a voxel may differ
        assert found[label] == pytest.approx(scores[case, label], abs=5e-3)
        assert found[label][1] < 1  # mm tell: 2 mm are two voxels, one, or less than one

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
    (image, label), found = phantom(50), []
    sine, cosine = np.sin(0.1), np.cos(0.1)  # an oblique scan
    affine = np.array([[cosine, -sine, 0, -20], [sine, cosine, 0, 30], [0, 0, 1, 7], [0, 0, 0, 1]])
    affine[:3, :3] *= MM
    os.mkdir("scans")
    for axes in ("RAS", "LPS", "PIR"):
        scan = turned(image, axes, affine)
        scan.header["cal_max"] = 400  # a window that would hide the labels
        nib.save(scan, f"scans/{axes}.nii.gz")
    assert cps.main(["predict", f"{trained}/{which}/best.pt", "scans", "out"]) == 0
    for axes in ("RAS", "LPS", "PIR"):
        scan, out = nib.load(f"scans/{axes}.nii.gz"), nib.load(f"out/{axes}.nii.gz")
        assert out.shape == scan.shape and np.array_equal(out.affine, scan.affine)
        for field in ("pixdim", "qform_code", "sform_code", "srow_x", "quatern_b", "qoffset_x"):
            assert np.array_equal(out.header[field], scan.header[field])
        assert out.get_data_dtype() == np.uint8 and out.header["cal_max"] == 0
        found.append(np.asarray(nib.as_closest_canonical(out).dataobj))
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])
    assert all(cps.dice(found[0] == i, label == i) > 0.4 for i in IDS)  # left is left

def test_trap_12_scores_do_not_depend_on_how_scans_are_stored():
    ref = phantom(0)[1]
    pred = np.roll(ref, (1, 1, 1), (0, 1, 2))
    for axes in ("RAS", "PIR"):
        for name, volume in (("ref", ref), ("pred", pred)):
            nib.save(turned(volume, axes, np.diag((*MM, 1))), f"{name}{axes}.nii")
        assert cps.main(["evaluate", f"pred{axes}.nii", f"ref{axes}.nii", "--csv", "s.csv"]) == 0
        for i, row in zip(IDS, table_of("s.csv"), strict=True):
            p, r = pred == i, ref == i
            want = [cps.dice(p, r), plain_surface_dice(p, r, MM, 2.0)]
            assert [float(row["dice"]), float(row["nsd"])] == pytest.approx(want) and want[1] < 1

def test_predict_does_the_others_when_one_is_bad(trained, capsys):
    write("scans/good_0000.nii.gz", phantom(1)[0])
    write("scans/bad.nii.gz", np.full(SHAPE, np.nan, np.float32))
    assert cps.main(["predict", f"{trained}/native/best.pt", "scans", "out"]) == 1
    assert os.listdir("out") == ["good.nii.gz"] and "bad.nii.gz" in capsys.readouterr().err

def test_default_command_needs_no_data():
    tiny = {"out": "run", "base_channels": 2, "levels": 2, "epochs": 1, "epoch_steps": 1, "val": 1}
    assert cps.main(["train", *words(tiny)]) == 0
    assert cps.main(["predict", "run/best.pt", "runs/phantom/imagesTs", "out"]) == 0
    assert cps.main(["evaluate", "out", "runs/phantom/labelsTs"]) == 0

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", [True, False])
def test_trap_14_training_on_a_gpu_with_mixed_precision(amp):
    make_data()
    assert train("--amp" if amp else "--no-amp", device="cuda", workers=1) == 0
    rows = table_of("run/log.csv")
    assert len(rows) == 2 and all(np.isfinite(float(row["loss_cps"])) for row in rows)

# Inference ----------------------------------------------------------------------------------------
WINDOWS = [((20, 9, 10), (8, 8, 8), 0.5, ((),)), ((9, 21, 8), (8, 8, 8), 0.25, ((), (2,), (3, 4))),
           ((17, 4, 20), (8, 4, 8), 0.0, ((),)), ((5, 12, 3), (8, 8, 4), 0.5, ((), (4,))),
           ((13, 11, 17), (4, 6, 8), 0.7, ((),)), ((8, 8, 8), (8, 8, 8), 0.5, ((),)),
           ((3, 2, 4), (8, 8, 8), 0.5, ((),)), ((10, 11, 23), (8, 4, 4), 0.6, ((),))]

@pytest.mark.parametrize("shape, patch, overlap, flips", WINDOWS)
def test_trap_14_sliding_window_is_the_plain_one(shape, patch, overlap, flips):
    nets, volume = networks(4), np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    with torch.no_grad():
        total = plain_windows(nets, volume, patch, 4, overlap, flips)
    best = (total / total.sum(0)).topk(2, dim=0).values
    clear = (best[0] - best[1] > 1e-5).numpy()  # where rounding does not decide
    got = cps.sliding_window(nets, volume, patch, 4, overlap=overlap, flips=flips)
    assert got.dtype == np.uint8 and got.shape == shape and clear.mean() > 0.95
    assert np.array_equal(got[clear], total.argmax(0).numpy()[clear])

@pytest.mark.parametrize("shape, patch, overlap, flips", WINDOWS)
def test_trap_14_sliding_window_of_the_identity_is_the_volume(shape, patch, overlap, flips):
    def identity(x):  # in half precision, as under autocast
        return -30 * (x - torch.arange(5).view(1, 5, 1, 1, 1)).abs().half()
    volume = np.random.default_rng(0).integers(0, 5, shape).astype(np.float16)
    got = cps.sliding_window([identity], volume, patch, 5, overlap=overlap, flips=flips)
    assert np.array_equal(got, volume)

def test_largest_components_are_those_of_the_whole_volume():
    labels = np.random.default_rng(0).integers(0, 4, (12, 11, 10)).astype(np.uint8)
    want = np.zeros_like(labels)
    for i in (1, 2, 3):
        parts, n = ndimage.label(labels == i)
        want[parts == 1 + np.argmax([(parts == k + 1).sum() for k in range(n)])] = i
    assert np.array_equal(cps.largest_components(labels), want) and want.any()
    assert not cps.largest_components(np.zeros_like(labels)).any()

# Evaluation ---------------------------------------------------------------------------------------
def test_table_of_areas_has_the_closed_forms():
    s = np.array((0.7, 1.3, 2.9))
    for face, code in zip(np.prod(s) / s, (15, 51, 85)):  # a plane across each axis
        assert plain_area(code, s) == pytest.approx(face)
    edge = s[2] * np.hypot(s[0], s[1])  # the diagonal plane, and an edge cut off
    assert [plain_area(60, s), plain_area(3, s)] == pytest.approx([edge, edge / 2])
    a, b, c = np.diag(s / 2)  # a corner cut off: the triangle of the middles of three edges
    assert plain_area(1, s) == pytest.approx(np.linalg.norm(np.cross(b - a, c - a)) / 2)
    areas = [plain_area(code, s) for code in range(256)]
    assert areas == areas[::-1] and min(areas[1:-1]) > 0 == areas[0]  # inside out: the same

def test_trap_15_surface_dice_is_that_of_all_points_and_all_distances():
    rng, values = np.random.default_rng(0), set()
    for i in range(24):
        noise = rng.standard_normal((2, *rng.integers(2, 7, 3)))
        smooth = ndimage.gaussian_filter(noise, i % 3 / 2)
        pred, ref = smooth > np.quantile(smooth, 0.6)
        spacing, tolerance = rng.uniform(0.5, 4, 3), rng.uniform(0.1, 4)
        got = cps.surface_dice(pred, ref, spacing, tolerance)
        want = plain_surface_dice(pred, ref, spacing, tolerance) if pred.any() and ref.any() else 0
        assert abs(got - want) < 1e-9
        again = cps.surface_dice(np.pad(ref, 3), np.pad(pred, 3), spacing, tolerance)
        assert abs(again - got) < 1e-9
        values.add(round(got, 6))
    assert len(values) > 12
    for code in range(1, 256):  # every code, against a voxel of which only a part is near
        pred, ref = np.zeros((2, 2, 6), bool), np.zeros((2, 2, 6), bool)
        pred[:, :, :2].flat, ref[0, 0, ::5] = [code & (128 >> i) for i in range(8)], True
        got, want = (f(pred, ref, MM, 1.0) for f in (cps.surface_dice, plain_surface_dice))
        assert abs(got - want) < 1e-9

@pytest.mark.parametrize("flare22", [False, True])
def test_trap_15_empty_masks_and_hand_made_cubes(flare22):
    none, cube = np.zeros((9, 9, 9), bool), np.zeros((9, 9, 9), bool)
    cube[2:6, 2:6, 2:6] = True
    moved = np.roll(cube, 1, axis=2)
    for pred, ref, score in ((none, none, 1), (none, cube, 0), (cube, none, 0), (cube, cube, 1)):
        assert cps.dice(pred, ref) == cps.surface_dice(pred, ref, MM, 1) == score
        assert cps.evaluate_case(1 * pred, 1 * ref, MM, [1], {1: 2}, flare22) == {1: (score, score)}
    assert cps.dice(cube, moved) == 0.75
    assert cps.surface_dice(cube, moved, MM, 3.0) == 1 > cps.surface_dice(cube, moved, MM, 2.9) > 0

def test_flare22_rules():
    def score(pred, ref, label, flare22=True):
        return cps.evaluate_case(label * pred.astype(int), label * ref.astype(int), MM, [label],
                                 {label: 0.5}, flare22)[label]
    ref = np.zeros((12, 12, 12), bool)
    ref[3:9, 3:9, 2:7] = True
    one_slice, long, moved = ref & (np.arange(12) == 4), ref.copy(), np.roll(ref, 1, axis=0)
    long[3:9, 3:9] = np.arange(12) != 6  # right but on the reference's last slice and outside
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

def test_flare22_tolerances():
    """13 bars, found too far along x by the tolerance (all is near) or by 1 mm more (not all)."""
    table = dict(zip(range(1, 14), (5, 3, 3, 5, 2, 2, 2, 2, 2, 3, 5, 7, 3)))
    for name, factor, more in (("ref", 0, 0), ("near", 1, 0), ("far", 1, 1)):
        volume = np.zeros((36, 52, 4), np.uint8)
        for i, tolerance in table.items():
            x = factor * tolerance + more
            volume[x:x + 24, 4 * i - 4:4 * i - 1] = i
        write(f"{name}/c.nii.gz", volume, np.eye(4))
    for name in ("near", "far"):
        assert cps.main(["evaluate", name, "ref", "--flare22", "--csv", "s.csv"]) == 0
        nsd = [float(row["nsd"]) for row in table_of("s.csv")]
        assert len(nsd) == 13 and all((s == 1) == (name == "near") and s > 0.5 for s in nsd)

def test_tolerances_are_one_or_one_a_label_and_a_tube_found_in_vain_is_0():
    pred, ref = np.zeros((2, 20, 8, 8), np.int16)
    pred[3:9, 2:6, 2:6], ref[1:7, 2:6, 2:6] = 1, 1
    pred[12:16, 2:6, 2:6], ref[14:18, 2:6, 2:6] = 2, 2
    def nsd(tolerances, labels=(1, 2)):
        scores = cps.evaluate_case(pred, ref, (1, 1, 1), labels, tolerances)
        return [scores[i][1] for i in labels]
    strict, loose = nsd(0.5), nsd(2.0)
    assert loose == [1, 1] and max(strict) < 1
    assert nsd([2.0, 0.5]) == nsd({1: 2.0, 2: 0.5}) == nsd(np.array([2.0, 0.5])) == [1, strict[1]]
    assert np.isnan(nsd(None)).all()
    pred[0, :, 0], ref[0, :, 7] = 5, 6  # a tube in one of the files only
    assert cps.evaluate_case(pred, ref, (1, 1, 1), [5, 6], 2.0, flare22=True) == {
        5: (0, 0), 6: (0, 0)}

# Bad input ----------------------------------------------------------------------------------------
class Evil:
    """Unpickled, it makes a folder."""
    def __reduce__(self):
        return os.mkdir, ("owned",)

def make_bad_files():
    image, label = phantom(0)
    holes = [np.where(np.arange(10) == 3, np.nan, a).astype(np.float32) for a in (image, label)]
    for name, array in (("nan", holes[0]), ("hole", holes[1]), ("2d", image[0]),
                        ("4d", np.stack([image] * 2, 3)), ("flat", image * 0), ("cut", image),
                        ("small", label[1:]), ("half", label.astype(np.float32) / 2),
                        ("minus", -label.astype(np.int16)), ("label", label)):
        write(f"bad/{name}.nii.gz", array)
    os.truncate("bad/cut.nii.gz", 1000)
    for name, content in (("text.nii.gz", b"no scan"), ("empty.nii", b""), ("text.pt", b"no model"),
                          ("evil.pt", pickle.dumps(Evil(), protocol=2))):
        with open(f"bad/{name}", "wb") as file:
            file.write(content)
    torch.save({"config": Evil()}, "bad/evil2.pt")

BAD = [([], "COMMAND"), (["dance"], "dance"), (["train", "nowhere"], "nowhere"),
       (["predict", "CHECKPOINT", "bad/no", "out"], "bad/no"),
       (["predict", "no.pt", "bad/label.nii.gz", "out"], "no.pt"),
       (["predict", "CHECKPOINT", "bad/label.nii.gz", "out", "--tta"], "--tta"),
       (["evaluate", "bad/label.nii.gz", "nowhere"], "nowhere"),
       (["evaluate", "bad/label.nii.gz", "bad/label.nii.gz", "--csv", "."], "."),
       (["train", "data", "--unlabelled", "nowhere"], "nowhere")]
BAD += [(["train", "data", *flags.split()], flags.split()[0]) for flags in (
    "--nonsense 1", "--batch two", "--batch 0", "--batch -1", "--patch 7 8 8", "--patch 8 8",
    "--patch 0 8 8", "--patch 8 8 8.5", "--clip 200 -68", "--clip 5", "--clip nan 5", "--lr -1",
    "--lr nan", "--lr inf", "--momentum 1.5", "--min-overlap 1", "--method best", "--labelled 99",
    "--mirror q", "--device tpu", "--spacing 1 1 0", "--epochs 0", "--levels 0", "--intensity -1")]
BAD += [(["predict", "CHECKPOINT", f"bad/{name}", "out"], name) for name in (
    "text.nii.gz", "empty.nii", "cut.nii.gz", "nan.nii.gz", "4d.nii.gz", "2d.nii.gz",
    "flat.nii.gz")]
BAD += [(["predict", f"bad/{name}", "bad/label.nii.gz", "out"], name) for name in (
    "text.pt", "evil.pt", "evil2.pt", "cut.nii.gz")]
BAD += [(["evaluate", f"bad/{name}.nii.gz", "bad/label.nii.gz"], name) for name in (
    "small", "half", "minus", "text", "hole")]

@pytest.mark.parametrize("line, word", BAD, ids=[" ".join(line) for line, _ in BAD])
def test_bad_input_gets_one_line_and_exit_code_2(line, word, trained, capsys):
    make_bad_files()
    make_data(labelled=3)
    if line[:1] == ["train"]:
        line = line + words({k: v for k, v in TINY.items() if f"--{k}" not in line and k != "data"})
    assert cps.main([w.replace("CHECKPOINT", f"{trained}/native/best.pt") for w in line]) == 2
    error, = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and word.strip("-") in error
    assert not {"owned", "out", "run"} & {*os.listdir()}  # nothing was run or begun

def nifti(array, affine=None, kind=nib.Nifti1Image, **header):
    """Bytes of a NIfTI file, fields of its header set as nibabel would never do by itself."""
    image = kind(array, np.diag((*MM, 1)) if affine is None else affine, dtype=array.dtype)
    head, data = image.header, array.astype(array.dtype, order="F").tobytes("F")
    head["vox_offset"] = head.single_vox_offset
    for key, value in header.items():
        head[key] = value
    gap = bytes(int(head.single_vox_offset) - len(head.binaryblock))
    return head.binaryblock + gap + data

def dims(*numbers):
    return {"dim": [*numbers, *[1] * (8 - len(numbers))]}

SCAN, TILT = phantom(0)[0], np.diag((*MM, 1)) + 0.02 * np.eye(4, k=1)
FLAT = {"sform_code": 0, "qform_code": 0}  # the spacing is that of pixdim alone
RGB = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
FINE = {  # name: bytes that must simply work
    **{f"{np.dtype(kind)}.nii": nifti(SCAN.astype(kind)) for kind in (
        "u2", "i4", "f4", "f8", "u1", "i8", "u8")},
    "big endian.nii": nib.Nifti1Image(SCAN, np.eye(4)).header.as_byteswapped(">").binaryblock
    + bytes(4) + SCAN.astype(">i2").tobytes("F"),
    "slope.nii": nifti(SCAN, scl_slope=2, scl_inter=-100), "slope0.nii": nifti(SCAN, scl_slope=0),
    "slope nan.nii": nifti(SCAN, scl_slope=np.nan, scl_inter=np.nan),
    "two forms.nii": nifti(SCAN, qform_code=1, sform_code=2, qoffset_x=99, quatern_b=0.3),
    "sheared.nii": nifti(SCAN, TILT), "no form.nii": nifti(SCAN, **FLAT),
    "nifti2.nii": nifti(SCAN, kind=nib.Nifti2Image), "Ä space (1) 心.nii": nifti(SCAN),
    "4d of one.nii": nifti(SCAN[..., None]), "zipped.nii.gz": gzip.compress(nifti(SCAN)),
    "less than the patch.nii": nifti(SCAN[:3, :5, :2]), "one voxel thick.nii": nifti(SCAN[:, :1]),
    "two voxels.nii": nifti(SCAN[8:10, 7:8, 5:6]), "trailing.nii": nifti(SCAN) + b"more",
    "thin.nii": nifti(SCAN, **FLAT, pixdim=[1] + [0] * 7),  # nibabel takes it for 1 mm
    "sum.nii.gz": gzip.compress(nifti(SCAN))[:-8] + bytes(8),  # nor does it read the checksum
    "unit.nii": nifti(SCAN, xyzt_units=1), "window.nii": nifti(SCAN, cal_min=1, cal_max=0)}
BROKEN = {  # name: bytes that must be refused in one sentence
    "zero.nii": nifti(SCAN, **dims(3, 0, 14, 10)), "minus.nii": nifti(SCAN, **dims(3, -4, 14, 10)),
    "vast.nii": nifti(SCAN, **dims(3, 32767, 32767, 32767)), "rank.nii": nifti(SCAN, **dims(9, 4)),
    "vast.nii.gz": gzip.compress(nifti(SCAN, **dims(7, *[32767] * 7))),
    "magic.nii": nifti(SCAN, magic=b"no!"), "kind.nii": nifti(SCAN, datatype=7),
    "complex.nii": nifti(SCAN.astype("c8")), "rgb.nii": nifti(RGB), "cut.nii": nifti(SCAN)[:999],
    "head.nii": nifti(SCAN)[:100], "0.nii": b"", "0.nii.gz": b"", "text.nii": b"a scan" * 99,
    "no gzip.nii.gz": nifti(SCAN)[3:], "cut.nii.gz": gzip.compress(nifti(SCAN))[:500],
    "2d.nii": nifti(SCAN[0]), "4d.nii": nifti(np.stack([SCAN] * 2, 3)),
    "void.nii": nifti(SCAN, vox_offset=1e9),
    "wide.nii": nifti(SCAN, **FLAT, pixdim=[1, 1e9, 1, 1, 0, 0, 0, 0]),
    "plane.nii": nifti(SCAN, srow_y=[0] * 4), "flat.nii": nifti(SCAN * 0),
    "nowhere.nii": nifti(SCAN, srow_x=[np.nan] * 4), "air.nii": nifti(SCAN - 30000),
    "slope inf.nii": nifti(SCAN, scl_slope=1e38, scl_inter=3e38),
    "nan.nii": nifti(np.where(SCAN > 90, np.nan, SCAN).astype("f4")),
    "inf.nii": nifti(np.where(SCAN > 90, np.inf, SCAN).astype("f8"))}
PATHS = {  # name: what makes it
    "loop.nii": lambda p: os.symlink(p, p), "gone.nii": lambda p: os.symlink("nobody", p),
    "folder.nii.gz": os.mkdir, "pipe.nii": os.mkfifo}

@pytest.mark.parametrize("name", [*FINE, *BROKEN, *PATHS])
def test_predict_answers_any_file_with_a_segmentation_or_one_sentence(name, trained, capfd):
    with suppress(KeyError), open(name, "wb") as file:
        file.write((FINE | BROKEN)[name])
    if name in PATHS:
        with suppress(FileNotFoundError):
            os.remove(name)
        PATHS[name](name)
    code = cps.main(["predict", f"{trained}/native/best.pt", name, "out"])
    errors = capfd.readouterr().err.splitlines()
    if name in FINE:
        assert code == 0 and not errors
        scan, out = nib.load(name), nib.load(f"out/{name.split('.nii')[0]}.nii.gz")
        assert out.shape == scan.shape and np.array_equal(out.affine, scan.affine)
        assert np.asarray(out.dataobj).max() <= IDS[-1]
    else:
        assert code == 2 and len(errors) == 1 and errors[0].startswith(f"error: {name}")
        assert not os.path.exists("out") or not os.listdir("out")

def test_predict_answers_a_file_that_nobody_may_read(trained, capsys, monkeypatch):
    write("in/secret.nii", SCAN)
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "in/secret.nii")
    monkeypatch.setattr(nib, "load", refuse)  # the tests may run as root
    assert cps.main(["predict", f"{trained}/native/best.pt", "in/secret.nii", "out"]) == 2
    error, = capsys.readouterr().err.splitlines()
    assert "in/secret.nii" in error and "Permission denied" in error

LABELS = [("i2", 65535 - 2**16, 2), ("u2", 65535, 2), ("u2", 256, 2), ("f4", 0.9999, 0),
          ("f4", 1.5, 2), ("f4", np.nan, 2), ("i4", -1, 2), ("f8", 255.0, 0), ("u1", 0, 0)]

@pytest.mark.parametrize("kind, value, code", LABELS)
def test_labels_are_whole_numbers_from_0_to_255(kind, value, code, capsys):
    label = np.ones(SHAPE, kind)
    label[5:9, 5:9] = value
    write("in/label.nii", label)
    assert cps.main(["evaluate", "in/label.nii", "in/label.nii"]) == code
    assert len(capsys.readouterr().err.splitlines()) == (code > 0)

def mangled(content, rng):
    """A checkpoint cut at a random byte, and one in which random bytes are other ones."""
    spoiled = bytearray(content)
    for place in rng.integers(0, len(content), 20):
        spoiled[place] ^= rng.integers(1, 256)
    return content[:rng.integers(len(content))], bytes(spoiled)

def test_damaged_checkpoints_are_refused(trained, capsys):
    write("in/scan.nii", SCAN)
    with open(f"{trained}/native/best.pt", "rb") as file:
        content, rng = file.read(), np.random.default_rng(0)
    state = torch.load(f"{trained}/native/best.pt", weights_only=True)
    cases = [part for _ in range(15) for part in mangled(content, rng)]
    for change in ({"config": {"colour": 1}}, {"parts": []}, {"ids": [1, 2, 3]}, {"ids": None},
                   {"config": state["config"] | {"levels": 3}}, {"config": None}, {"step": 1}):
        torch.save(state | change, file := io.BytesIO())
        cases.append(file.getvalue())
    for case in cases[:-1]:
        with open("bad.pt", "wb") as file:
            file.write(case)
        assert cps.main(["predict", "bad.pt", "in/scan.nii", "out"]) == 2
        error, = capsys.readouterr().err.splitlines()
        assert error.startswith("error: bad.pt: ")
    os.mkdir("empty")
    for path in ("empty", "nowhere.pt"):
        assert cps.main(["predict", path, "in/scan.nii", "out"]) == 2
        assert capsys.readouterr().err.startswith(f"error: {path}")
    with open("bad.pt", "wb") as file:  # the last one is whole
        file.write(cases[-1])
    assert cps.main(["predict", "bad.pt", "in/scan.nii", "out"]) == 0

def test_a_label_without_an_image_is_named(capsys):
    make_data()
    write("data/labelsTr/lost.nii.gz", phantom(9)[1])
    assert train() == 2 and not os.path.exists("run")
    error, = capsys.readouterr().err.splitlines()
    assert "data/imagesTr" in error and "'lost'" in error and "c0" not in error

@pytest.mark.parametrize("bad, part", [("small", "labels"), ("half", "labels"), ("minus", "labels"),
                                       ("nan", "images"), ("4d", "images"), ("text", "images")])
def test_bad_training_case_is_named(bad, part, capsys):
    make_data(labelled=3)
    make_bad_files()
    os.replace(f"bad/{bad}.nii.gz", f"data/{part}Tr/c1.nii.gz")
    assert train(val=1.0) == 2
    named, summary = capsys.readouterr().err.splitlines()  # a line for each bad case, then one
    assert named.startswith("error: ") and f"{part}Tr/c1.nii.gz" in named
    assert summary.startswith("error: ") and not os.path.exists("run")

# Export, figure, several processes ----------------------------------------------------------------
def test_onnx_gives_the_logits_and_the_segmentations_of_the_checkpoint(trained, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    best, folder = f"{trained}/fine/best.pt", f"{trained}/data/imagesTr"
    assert cps.main(["export", best, "a.onnx"]) == 0
    said = float(capsys.readouterr().out.split()[-1])
    network = cps.Run.load(best).networks[0].eval()
    session = onnxruntime.InferenceSession("a.onnx")
    for batch in (1, 2, 5):  # a batch of any size
        x = torch.randn(batch, 1, *PATCH, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            want = network(x).numpy()
        got, = session.run(None, {"image": x.numpy()})
        assert got.shape == want.shape and abs(got - want).max() < 1e-3 > said > 0
    for model, out in ((best, "torch"), ("a.onnx", "onnx")):  # with clip, spacing, patch, label ids
        assert cps.main(["predict", model, folder, out]) == 0
    pairs = [[np.asarray(nib.load(f"{out}/{name}").dataobj) for out in ("torch", "onnx")]
             for name in os.listdir("torch")]
    assert len(pairs) == 6 and {*np.unique(pairs)} == {0, *IDS}
    assert np.mean([one == two for one, two in pairs]) > 0.9999
    before = pathlib.Path("a.onnx").read_bytes()
    for argv in (["predict", "a.onnx", folder, "out", "--networks", "b"],  # it holds A alone
                 ["predict", "a.onnx", folder, "out", "--networks", "both"],
                 ["export", best, "model.pt"], ["export", "a.onnx", "b.onnx"],
                 ["info", "--checkpoint", "a.onnx"], ["export", "nowhere.pt", "b.onnx"]):
        assert cps.main(argv) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert not {"out", "b.onnx"} & {*os.listdir()} and (
        pathlib.Path("a.onnx").read_bytes() == before)

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

@pytest.mark.parametrize("content", [b"", b"no model", b"\x08\x09"])
def test_a_broken_onnx_file_is_refused(content, capsys):
    pytest.importorskip("onnxruntime")
    write("in/scan.nii", SCAN)
    pathlib.Path("a.onnx").write_bytes(content)
    assert cps.main(["predict", "a.onnx", "in/scan.nii", "out"]) == 2
    assert capsys.readouterr().err.startswith("error: a.onnx: ")

def test_absent_optional_packages_are_named(trained, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if not installed
    make_data()
    assert cps.main(["export", f"{trained}/native/best.pt", "a.onnx"]) == 2
    assert "pip install onnx" in capsys.readouterr().err and not os.path.exists("a.onnx")
    assert train() == 0  # the run is done, only its figure is missing
    out = capsys.readouterr()
    assert "pip install -U matplotlib" in out.out and not out.err and "Next: " in out.out
    assert os.path.exists("run/best.pt") and not os.path.exists("run/figure.png")

def test_figure_shows_the_log_and_what_the_networks_say(monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    figure = pytest.importorskip("matplotlib.figure")
    def segment(run, volume, networks="a", *_):  # A and B say something, and not the same
        return np.roll(np.where(volume > 1, IDS[networks == "b"], 0), "ab".find(networks), 0)
    monkeypatch.setattr(cps, "segment", segment)
    pages, save = [], figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda page, *args, **options: (
        pages.append(page), save(page, *args, **options)))
    make_data()
    assert train(method="context", validate_epochs=2, epochs=3, val=1.0) == 0
    assert pathlib.Path("run/figure.png").read_bytes()[:4] == b"\x89PNG"
    rows, lines = table_of("run/log.csv"), {}
    for axes in pages[0].axes[:3]:
        assert axes.get_xlabel() == "step" and axes.get_legend()
        lines |= {line.get_label(): line.get_xydata() for line in axes.lines}
    assert {*lines} == {"loss_sup", "loss_cps", "agreement", "foreground", "dice"}
    for name, points in lines.items():
        want = [(int(row["step"]), float(row[name])) for row in rows if row[name] != "nan"]
        assert points == pytest.approx(np.array(want)), name
    assert len(lines["dice"]) == 2
    run = cps.Run.load("run/best.pt")
    case = cps.prepare(cps.split_cases(run.config), run.config)["val"][0]
    image, label = map(np.load, case.arrays[:2])
    a, b = (cps.segment(run, image, which) for which in "ab")
    z = int(np.argmax([(label[..., z] > 0).sum() for z in range(label.shape[2])]))
    shown = {axes.get_title(): axes.images for axes in pages[0].axes if axes.images}
    assert [*shown][:5] == [case.name, "reference", "A", "B", "A != B"]
    for name, volume in (("reference", label), ("A", a), ("B", b), ("A != B", a != b)):
        under, over = (layer.get_array() for layer in shown[name][:2])
        assert np.array_equal(under, image[..., z].T)
        assert np.array_equal(over.filled(0) > 0, volume[..., z].T > 0)
        if name != "A != B":
            assert np.array_equal(over.filled(0), volume[..., z].T)

def torchrun(script, *argv):
    """Two processes on this machine; returns the exit code and what they print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, script, *argv], capture_output=True, text=True, timeout=150,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    return done.returncode, done.stdout + done.stderr

def test_two_processes_train_one_pair_of_networks():
    make_data()
    flags = TINY | {"epochs": 2, "epoch_steps": 3, "lr": 0.001, "validate_epochs": 2}
    argv = ["train", "data", *words({k: v for k, v in flags.items() if k != "data"} | {"batch": 1})]
    pathlib.Path("falls.py").write_text(  # its second process is quicker, and fails in epoch 2
        "import os, sys, time, cps\none, seen, make = cps.train_step, [], cps.config_from\n"
        "def late(*args, **flags):\n    time.sleep(3 * (os.environ['RANK'] == '0'))\n"
        "    return make(*args, **flags)\ncps.config_from = late\n"
        "def step(*args):\n    seen.append(1)\n"
        "    cps.need(len(seen) < 5 or os.environ['RANK'] == '0', 'rank 1 falls')\n"
        "    return one(*args)\ncps.train_step = step\nsys.exit(cps.main())\n")
    os.environ["PYTHONPATH"] = os.path.dirname(cps.__file__)
    code, text = torchrun("falls.py", *argv)
    assert code != 0 and "rank 1 falls" in text and "holds a run" not in text
    assert torch.load("run/last.pt", weights_only=True)["step"] == 3
    code, text = torchrun(cps.__file__, *argv, "--resume")
    assert code == 0 and text.count("Next: ") == 1 and len(table_of("run/log.csv")) == 2, text
    assert train(**flags | {"batch": 2, "out": "alone"}) == 0
    one, two, start = (torch.load(path, weights_only=True) for path in (
        "run/last.pt", "alone/last.pt", "alone/last.pt"))
    config = cps.Config(**start["config"])
    for a, b, fresh in zip(one["parts"], two["parts"], cps.make_pair(config, len(IDS) + 1)):
        moved = [abs(p - b[name]).max() for name, p in fresh.state_dict().items()]
        assert max(moved) > 3e-4  # what they learn is far more than what they differ by
        assert all(torch.allclose(a[name], b[name], rtol=0, atol=1e-5) for name in a)
    for mine, plain in zip(one["rows"], two["rows"]):  # the log is of all patches
        assert mine[:-1] == pytest.approx(plain[:-1], abs=1e-3, nan_ok=True)
