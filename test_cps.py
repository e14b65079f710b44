"""Tests of cps.py, section by section: each formula beside a plain second implementation, and
promises to users on small real runs. Whoever reads this learns the method a second time."""

import csv
import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from unittest.mock import Mock

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage, spatial
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, default_collate

import cps

torch.set_num_threads(1)  # networks this small gain nothing from two threads
IDS = [1, 5]  # label ids of the test data: not 1 and 2, so that a class taken for an id shows
SHAPE = (16, 14, 10)
PATCH = (8, 8, 8)
MM = (1.0, 2.0, 3.0)  # size of a voxel
TINY = {"data": "data", "out": "run", "cache": "cache", "device": "cpu", "labelled": 2, "val": 2.0}
TINY |= {"patch": PATCH, "spacing": MM, "levels": 2, "base_channels": 4, "validate_epochs": 1}
TINY |= {"epochs": 2, "epoch_steps": 3, "lr": 0.05, "momentum": 0.9}


# Helpers
@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Work in an empty folder, without the optional packages, whose import takes seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "monai.metrics", None)


@pytest.fixture
def data(in_tmp_path):
    """A small data set in ./data: c0 to c5 with labels, c6 and c7 without."""
    make_data()


def write(path, array, affine=None):
    affine = np.diag((*MM, 1)) if affine is None else affine
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def make_scan(seed, shape=SHAPE):
    """Image int16 in HU, label uint8: a box of label 1 on the left, a brighter one of label 5."""
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    x, y, z = rng.integers(1, 4, 3)
    label[x : x + 5, y : y + 8, z : z + 5] = 1
    label[x + 6 : x + 11, y : y + 8, z : z + 5] = 5
    hu = np.array([0, 80, 0, 0, 0, 160])[label] + rng.normal(0, 15, shape)
    hu[0, 0, 0] = -1000  # air
    return hu.round().astype(np.int16), label


IMAGE, LABEL = make_scan(0)


def make_data(root="data", shape=SHAPE, labelled=6, image=None, label=None):
    """A data set in the layout of MSD. image, label: the same arrays for all cases."""
    for number in range(labelled + 2):
        scan, truth = make_scan(number, shape)
        part = "Tr" if number < labelled else "Un"
        write(f"{root}/images{part}/c{number}.nii.gz", scan if image is None else image)
        if part == "Tr":
            write(f"{root}/labelsTr/c{number}.nii.gz", truth if label is None else label)


def config(**changes):
    return cps.Config(**TINY | {"data": os.path.abspath("data")} | changes)


def prepared(settings):
    split = cps.split_cases(settings)
    cps.prepare(split, settings)
    return split


def patches(**changes):
    settings = config(**changes)
    return cps.Patches(settings, prepared(settings), IDS)


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def random_logits(*shape, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).requires_grad_()


def plain_loss(logits, target):
    """Oracle of dice_ce_loss: sample by sample and class by class, the valid voxels only."""
    losses = []
    for scores, truth in zip(logits, target):
        scores = scores[:, truth != 255]  # (K, voxels)
        truth = truth[truth != 255]
        loss = torch.nn.functional.cross_entropy(scores.T, truth)
        foreground = range(1, len(scores))
        for k in foreground:
            p = scores.softmax(0)[k]
            t = (truth == k).float()
            dice = (2 * (p * t).sum() + 1e-5) / (p.sum() + t.sum() + 1e-5)
            loss = loss + (1 - dice) / len(foreground)
        losses.append(loss)
    return sum(losses) / len(losses)


# 2. Losses
def test_cross_pseudo_loss_is_that_of_fixed_labels_on_valid_voxels():
    a = random_logits(2, 3, 4, 3, 5)
    b = random_logits(2, 3, 4, 3, 5, seed=1)
    valid = random_logits(2, 4, 3, 5, seed=2) > -1
    label_a = torch.where(valid, a.argmax(1), cps.IGNORE)
    label_b = torch.where(valid, b.argmax(1), cps.IGNORE)
    assert torch.equal(cps.pseudo_label(a, valid), label_a)
    want = plain_loss(a, label_b) + plain_loss(b, label_a)
    got = cps.cross_pseudo_loss(a, b, valid)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    for one, two in zip(torch.autograd.grad(got, (a, b)), torch.autograd.grad(want, (a, b))):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-7)


def test_dice_loss_is_the_mean_over_patches_and_foreground_classes():
    """Two patches of two voxels, whose probabilities are counted by hand."""
    one = [[0.5, 0.25], [0.25, 0.5], [0.25, 0.25]]  # rows are classes, columns are voxels
    two = [[0.8, 0.2], [0.1, 0.7], [0.1, 0.1]]
    target = torch.tensor([[0, 1], [2, 1]])
    cross_entropy = -np.log([0.5 * 0.5, 0.1 * 0.7]).mean() / 2
    dice = np.mean([[2 * 0.5 / 1.75, 0], [2 * 0.7 / 1.8, 2 * 0.1 / 1.2]])
    got = cps.dice_ce_loss(torch.tensor([one, two]).log()[..., None, None], target[..., None, None])
    assert got.item() == pytest.approx(cross_entropy + 1 - dice, abs=1e-4)  # without smoothing


def test_ignored_voxels_change_nothing():
    logits = random_logits(2, 4, 5, 4, 6)
    target = torch.randint(0, 4, (2, 5, 4, 6), generator=torch.Generator().manual_seed(1))
    target[random_logits(2, 5, 4, 6, seed=2) > 1] = cps.IGNORE
    loss = cps.dice_ce_loss(logits, target)
    assert loss.item() == pytest.approx(plain_loss(logits, target).item(), rel=1e-5)
    gradient = torch.autograd.grad(loss, logits)[0].movedim(1, -1)
    assert torch.equal((gradient == 0).all(-1), target == cps.IGNORE)
    nothing = cps.cross_pseudo_loss(logits, logits, torch.zeros(target.shape, dtype=torch.bool))
    assert nothing.item() == 0
    assert (torch.autograd.grad(nothing, logits)[0] == 0).all()


def test_loss_is_finite_in_half_precision():
    logits = random_logits(1, 2, 48, 48, 48, scale=100).detach().half()  # fp16 ends at 65504
    target = (logits[:, 0] > 50).long()
    want = cps.dice_ce_loss(logits.float(), target).item()
    assert cps.dice_ce_loss(logits, target).item() == pytest.approx(want, rel=1e-6)


def test_weight_of_the_pseudo_labels_grows_from_almost_0_to_1():
    shares = [cps.ramp_up(progress) for progress in np.linspace(0, 2, 201)]
    assert shares == sorted(shares) and set(shares[100:]) == {1}
    assert shares[0:100:50] == pytest.approx([math.exp(-5), math.exp(-5 / 4)])


# 3. Overlapping patches
def test_both_crops_hold_the_same_voxels_on_the_overlap():
    """Cut out of volumes whose values tell where a voxel lies, padded if they are small."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        shape = rng.integers(1, 24, 3)
        patch = rng.integers(1, 12, 3)
        least = rng.uniform(0.05, 0.95)
        corners = cps.overlapping_corners(rng, shape, patch, least)
        room = np.maximum(shape - patch, 0)
        assert np.min(corners) >= 0 and np.all(corners <= room)
        volume = np.arange(np.prod(shape)).reshape(shape)
        crop_a, crop_b = [cps.cut_box(volume, corner, patch, -1) for corner in corners]
        slices_a, slices_b = cps.overlap_slices(*corners, patch)
        assert np.array_equal(crop_a[slices_a], crop_b[slices_b])
        share = crop_a[slices_a].size / np.prod(patch)
        assert share >= least
        assert (share < 1) == np.any((room > 0) & (1 - 1 / patch >= least))  # differ if they can


def test_all_pairs_of_corners_are_equally_likely():
    """So A's and B's crops are distributed alike: neither network sees more of the border."""
    corners = list(itertools.product(range(4), range(2), range(1)))
    counts = {}
    for pair in itertools.product(corners, corners):
        share = np.prod(1 - abs(np.subtract(*pair)) / 8)
        if 0.75 <= share < 1:
            counts[pair] = 0
    rng = np.random.default_rng(0)
    for _ in range(100 * len(counts)):
        corner_a, corner_b = cps.overlapping_corners(rng, (11, 9, 8), PATCH, 0.75)
        counts[tuple(corner_a), tuple(corner_b)] += 1
    assert all(50 < count < 150 for count in counts.values())  # 100 expected, sd 10


def test_patches_are_cut_at_their_corners_and_padding_is_never_valid():
    """On volumes that are smaller than a patch on two axes."""
    make_data(shape=(16, 6, 5))
    settings = config(augment=False)
    split = prepared(settings)
    boxes = {}
    for case in split["labelled"] + split["unlabelled"]:
        padded = np.pad(case.load()["image"], ((0, 0), (0, 2), (0, 3)))
        boxes |= {(case.name, x): padded[x : x + 8] for x in range(9)}
    inside = np.pad(np.full((8, 6, 5), True), ((0, 0), (0, 2), (0, 3)))
    seen = set()
    for n in range(30):
        item = cps.Patches(settings, split, IDS)[n]
        assert np.array_equal(item["valid"], inside)
        assert np.array_equal(item["target"] != cps.IGNORE, inside)
        found = []
        for crop in ("image", "crop_a", "crop_b"):
            found += [place for place, box in boxes.items() if np.array_equal(item[crop][0], box)]
        (labelled, _), (name_a, x_a), (name_b, x_b) = found
        assert (name_a, x_a, x_b) == (name_b, item["corner_a"][0], item["corner_b"][0])
        seen |= {labelled, name_a}
    assert len(seen) == 6  # all cases


@pytest.fixture
def no_intensities(monkeypatch):
    """Rotation and scale only, so that voxels can be compared."""
    monkeypatch.setattr(cps, "change_intensities", lambda patch, rng: patch)


def test_rotation_and_scale_are_shared_by_a_pair(no_intensities):
    make_data(shape=(16, 6, 9))
    items = patches()
    plain = patches(augment=False)
    changed = 0
    for n in range(40):
        item = items[n]
        slices_a, slices_b = cps.overlap_slices(item["corner_a"], item["corner_b"], PATCH)
        assert np.array_equal(item["crop_a"][0][slices_a], item["crop_b"][0][slices_b])
        assert (item["crop_a"][0][item["valid"]] != 0).all()  # padding is never valid here either
        changed += not np.array_equal(item["crop_a"], plain[n]["crop_a"])
    assert changed > 5  # 14 of 40 are expected


def test_labels_stay_on_their_image_and_nothing_is_mirrored(no_intensities):
    """The image is a slope, with label 5 where it is above its mean, which becomes 0, else 1."""
    slope = np.tensordot((20, 13, 9), np.indices(SHAPE), 1).astype(np.int16)
    make_data(image=slope, label=np.where(slope > slope.mean(), 5, 1).astype(np.uint8))
    settings = config(clip=())
    items = cps.Patches(settings, prepared(settings), [1, 3, 5])
    for n in range(24):
        item = items[n]
        image = item["image"][0]
        target = item["target"]
        clear = (target != cps.IGNORE) & (abs(image) > (20 + 13 + 9) / 2 / slope.std())
        assert clear.any()  # voxels more than half a voxel away from the mean
        assert np.array_equal(target[clear], np.where(image[clear] > 0, 3, 1))
        assert 2 not in target  # the class of label 3: ids are never averaged
        for crop in ("image", "crop_a", "crop_b"):
            left, *_, right = item[crop][0, 1:7, 1:7, 1:7].mean((1, 2))
            assert left < right


def test_labels_of_unlabelled_cases_are_never_read(data):
    before = patches()
    for case in cps.split_cases(config())["unlabelled"]:
        path = Path(f"data/labelsTr/{case.name}.nii.gz")
        if path.exists():
            path.write_bytes(b"garbage")
    after = patches(cache="another")
    for n in range(4):
        assert all(np.array_equal(before[n][key], after[n][key]) for key in before[n])


def test_methods_differ_in_the_unlabelled_crops_only(data):
    equal = 0
    items = [patches(method=method) for method in ("supervised", "cps", "context")]
    for n in range(6):
        only, plain, context = [one[n] for one in items]
        assert list(only) == ["image", "target"]
        for key in only:
            assert np.array_equal(only[key], plain[key]) and np.array_equal(only[key], context[key])
        assert np.array_equal(plain["corner_a"], plain["corner_b"])
        assert not np.array_equal(context["corner_a"], context["corner_b"])
        equal += np.array_equal(plain["crop_a"], plain["crop_b"])
    assert 0 < equal < 6  # each crop of plain CPS, too, has intensities of its own


def test_any_patch_can_be_made_again_alone_and_by_any_worker(data):
    one = patches()
    two = patches()
    loader = DataLoader(two, batch_size=1, sampler=[5, 0, 3], num_workers=2)
    for n, batch in zip((5, 0, 3), loader):
        item = one[n]
        assert all(np.array_equal(item[key], two[n][key]) for key in item)
        assert all(np.array_equal(item[key], batch[key][0]) for key in item)
    for other in (one[1], patches(seed=1)[0]):
        assert not np.array_equal(one[0]["image"], other["image"])
        assert not np.array_equal(one[0]["crop_a"], other["crop_a"])


def test_every_second_patch_is_centred_on_a_label_however_rare(no_intensities):
    """Label 5 is a single voxel, so far inside that no rotated patch around it is padded."""
    label = np.zeros((48, 36, 30), np.uint8)
    label[6:11, 6:11, 6:18] = 1
    label[24, 18, 15] = 5
    make_data(shape=label.shape, label=label)
    items = patches(method="supervised")
    targets = [items[n]["target"] for n in range(80)]
    centres = [target[4, 4, 4] for target in targets]
    assert 0 not in centres[1::2]
    assert 8 < centres[1::2].count(2) < 32  # half of 40 is expected, sd 3.2
    assert centres[0::2].count(0) > 35  # the others are anywhere
    assert not any(cps.IGNORE in target for target in targets if target[4, 4, 4] == 2)


# 4. Networks
def test_networks_differ_from_each_other_and_from_seed_to_seed():
    networks = cps.make_pair(config(), 3) + cps.make_pair(config(seed=1), 3)
    for one, two in itertools.combinations(networks, 2):
        assert not torch.equal(weights(one), weights(two))


def test_initial_weights_have_the_variance_of_he_and_of_xavier():
    _, xavier = cps.make_pair(config(base_channels=32, init_b="xavier"), 3)
    for he in cps.make_pair(config(base_channels=32), 3):
        for p, q in zip(he.parameters(), xavier.parameters()):
            if p.numel() > 10_000:  # its sd is known to 0.7 %
                fan_in = p[0].numel()
                fan_out = p[:, 0].numel()
                assert p.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.03)
                assert q.std().item() == pytest.approx(math.sqrt(2 / (fan_in + fan_out)), rel=0.03)
        assert all((p == 0).all() for name, p in he.named_parameters() if name.endswith("bias"))


def test_unet_has_the_right_shapes_and_number_of_parameters():
    network = cps.UNet3D(5, 4, 3, in_channels=2)
    assert network(torch.zeros(2, 2, 8, 4, 12)).shape == (2, 5, 8, 4, 12)
    assert max(p.shape[0] for p in cps.UNet3D(2, 32, 5).parameters()) == 320
    down = 27 * (1 * 2 + 2 * 2) + 8 + 27 * (2 * 4 + 4 * 4) + 16  # channels 1, 2, 2 and 2, 4, 4
    up = 8 * 4 * 2 + 2 + 27 * (4 * 2 + 2 * 2) + 8  # 4 to 2, then with the skip 4, 2, 2
    assert weights(cps.UNet3D(3, 2, 2)).numel() == down + up + 2 * 3 + 3


# 5. Training
def batch_of(items, step):
    return default_collate([items[2 * step], items[2 * step + 1]])


def plain_step(networks, velocities, batch, lam, settings):
    """Oracle of train_step: the loss in the docstring of cps.py, and SGD written out."""
    a, b = networks
    # L_sup: both networks learn from the labels.
    loss_sup = sum(plain_loss(n(batch["image"]), batch["target"]) for n in networks)

    # L_cps: the overlap of a pair is the box of voxels that lie in both crops.
    rows = []
    for i in range(2):
        corner_a = batch["corner_a"][i].numpy()
        corner_b = batch["corner_b"][i].numpy()
        low = np.maximum(corner_a, corner_b)
        high = np.minimum(corner_a, corner_b) + PATCH
        box_a = tuple(map(slice, low - corner_a, high - corner_a))
        box_b = tuple(map(slice, low - corner_b, high - corner_b))
        logits_a = a(batch["crop_a"][i : i + 1])[(..., *box_a)]
        logits_b = b(batch["crop_b"][i : i + 1])[(..., *box_b)]
        label_a = logits_a.argmax(1)
        label_b = logits_b.argmax(1)
        valid = batch["valid"][i][box_a][None]  # nobody learns what padding is
        loss_a = plain_loss(logits_a, torch.where(valid, label_b, 255))
        loss_b = plain_loss(logits_b, torch.where(valid, label_a, 255))
        agreement = (label_a == label_b)[valid].float().mean()
        foreground = (label_a > 0)[valid].float().mean()
        share = torch.tensor(np.prod(high - low) / np.prod(PATCH))
        rows.append(torch.stack((loss_a + loss_b, agreement, foreground, share)))
    loss_cps, *signs = torch.stack(rows).mean(0)
    loss = loss_sup + lam * loss_cps
    # SGD with Nesterov momentum: clip the gradient, add weight decay, update the velocity, step.
    gradients = [torch.autograd.grad(loss, [*n.parameters()], retain_graph=True) for n in networks]
    for network, velocity, gradient in zip(networks, velocities, gradients):
        norm = torch.cat([g.flatten() for g in gradient]).norm()
        assert norm > settings.grad_clip  # otherwise the clipping would not be tested
        for p, v, g in zip(network.parameters(), velocity, gradient):
            g = g * settings.grad_clip / norm + settings.weight_decay * p
            v.mul_(settings.momentum).add_(g)
            p.data -= settings.lr * (g + settings.momentum * v)
    return [value.item() for value in (loss_sup, loss_cps, *signs)]


def test_train_step_is_the_formula():
    """Three steps on padded volumes with ignored labels, against the plain oracle."""
    make_data(shape=(16, 6, 14))
    settings = config(grad_clip=0.3, weight_decay=0.02)
    run = cps.Run(settings, IDS)
    networks = cps.make_pair(settings, 3)
    for network in run.networks + networks:
        network.double()  # so that rounding has no say
    velocities = [[torch.zeros_like(p) for p in network.parameters()] for network in networks]
    items = patches()
    for step, lam in enumerate((0.3, 0.7, 1.0)):
        batch = batch_of(items, step)
        batch["target"][1, :3] = cps.IGNORE
        for name in ("image", "crop_a", "crop_b"):
            batch[name] = batch[name].double()
        got = cps.train_step(run, batch, lam)
        want = plain_step(networks, velocities, batch, lam, settings)
        assert [value.item() for value in got.values()] == pytest.approx(want, rel=1e-5)
        for network, plain in zip(run.networks, networks):
            assert torch.allclose(weights(network), weights(plain), rtol=0, atol=1e-6)


def test_train_is_a_loop_of_steps_with_a_schedule(data):
    """A second loop, with the numbers of the schedule, gets the same weights to the bit."""
    settings = config(lam=2.0, rampup=0.5, epochs=4, halve_epochs=2, validate_epochs=3)
    cps.train(settings)
    trained = cps.Run.load("run/last.pt")
    run = cps.Run(settings, IDS)
    items = patches()
    losses = []
    for step in range(12):
        lam = 2 * math.exp(-5 * (1 - min(step / 6, 1)) ** 2)
        lr = 0.05 if step < 6 else 0.025
        for optimiser in run.optimisers:
            optimiser.param_groups[0]["lr"] = lr
        losses.append(cps.train_step(run, batch_of(items, step), lam))
        if step % 3 == 2:  # the end of an epoch
            row = trained.rows[step // 3]
            assert (row["step"], row["lam"], row["lr"]) == pytest.approx((step + 1, lam, lr))
            assert math.isnan(row["dice"]) == (step < 8)  # validated after 3 epochs, and at the end
            for name in losses[0]:
                assert row[name] == pytest.approx(np.mean([loss[name] for loss in losses[-3:]]))
    for network, plain in zip(trained.networks, run.networks):
        assert torch.equal(weights(network), weights(plain))


def test_lam_0_is_supervised_training(data):
    for method, lam in (("context", 0.0), ("supervised", 1.0)):
        cps.train(config(method=method, lam=lam, out=method))
    pairs = [cps.Run.load(f"{out}/last.pt").networks for out in ("context", "supervised")]
    for one, two in zip(*pairs):
        assert torch.allclose(weights(one), weights(two), rtol=0, atol=1e-3)  # rounding


def test_one_batch_can_be_learned_by_heart(data):
    batch = batch_of(patches(method="supervised", augment=False), 0)
    assert set(batch["target"].flatten().tolist()) == {0, 1, 2}
    run = cps.Run(config(), IDS)
    for _ in range(60):
        cps.train_step(run, batch, 1.0)
    for network in run.networks:
        found = cps.pseudo_label(network(batch["image"]))
        assert (found == batch["target"]).float().mean() > 0.95


def test_networks_come_to_agree_and_not_on_background(data):
    cps.train(config(epochs=4, epoch_steps=10, rampup=0.2, validate_epochs=4))
    first, *_, last = cps.Run.load("run/last.pt").rows
    assert last["loss_cps"] < 0.8 * first["loss_cps"]
    assert last["agreement"] > first["agreement"] and last["foreground"] > 0.02


def test_best_checkpoint_is_chosen_by_validation_cases_only(data, monkeypatch):
    dices = iter((0.3, 0.6, 0.6, 0.5))
    seen = []

    def validate(run, cases):  # stands for the real one
        seen.append([case.name for case in cases])
        return np.full((2, 2), next(dices))

    monkeypatch.setattr(cps, "validate", validate)
    settings = config(epochs=4, epoch_steps=1, test=1.0)
    best = cps.train(settings)["run"]
    assert (best.best, best.step) == (0.6, 2)  # the first of the best
    assert seen == [[case.name for case in cps.split_cases(settings)["val"]]] * 4


# 6. Inference
def plain_windows(networks, volume, patch, num_classes, overlap):
    """Oracle of sliding_window: the sums of all classes of the whole volume, (K, X, Y, Z)."""
    shape = np.maximum(volume.shape, patch)
    padded = np.pad(volume, [(0, s - n) for s, n in zip(shape, volume.shape)])
    starts = []
    for s, p in zip(shape, patch):
        step = max(1, int(p * (1 - overlap)))
        starts.append([*range(0, s - p, step), s - p])
    total = np.zeros((num_classes, *shape))
    for corner in itertools.product(*starts):
        box = tuple(slice(c, c + p) for c, p in zip(corner, patch))
        for network in networks:
            prob = network(torch.tensor(padded[box])[None, None]).float().softmax(1)[0]
            total[(slice(None), *box)] += (prob * cps.gaussian(patch)).detach().numpy()
    return total[(slice(None), *map(slice, volume.shape))]


@pytest.mark.parametrize(
    "shape, overlap",
    [((20, 9, 10), 0.5), ((17, 4, 20), 0.0), ((9, 11, 8), 0.7), ((3, 2, 21), 0.5)],
)
def test_sliding_window_is_the_plain_one(shape, overlap):
    patch = (8, 4, 6)
    volume = np.random.default_rng(0).integers(0, 4, shape).astype(np.float32)
    values = torch.arange(4).view(1, 4, 1, 1, 1)
    identity = [lambda x: -30 * (x - values).abs().half()]
    got = cps.sliding_window(identity, volume, patch, 4, overlap)
    assert got.dtype == np.uint8 and np.array_equal(got, volume)
    networks = cps.make_pair(config(), 4)
    total = plain_windows(networks, volume, patch, 4, overlap)
    second, first = np.sort(total, axis=0)[-2:]
    clear = first - second > 1e-5 * first  # elsewhere rounding decides
    assert clear.mean() > 0.99
    got = cps.sliding_window(networks, volume, patch, 4, overlap)
    assert np.array_equal(got[clear], total.argmax(0)[clear])


def test_no_volume_of_all_classes_is_ever_in_memory():
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.append(getattr(result, "nbytes", 0))
            return result

    volume = np.zeros((16, 16, 80), np.float32)
    with Watch():
        cps.sliding_window([lambda x: x.repeat(1, 6, 1, 1, 1)], volume, PATCH, 6)
    assert max(sizes) == volume.nbytes  # the sums of six classes would be six times as large


def test_gaussian_is_1_at_the_centre_and_never_0():
    x, y, z = np.meshgrid(np.arange(9) - 4, np.arange(8) - 3.5, np.arange(16) - 7.5, indexing="ij")
    formula = np.exp(-((x / 9) ** 2 + (y / 8) ** 2 + (z / 16) ** 2) * 8**2 / 2)
    assert np.allclose(cps.gaussian((9, 8, 16)), np.maximum(formula, 0.001), rtol=1e-4, atol=0)
    assert cps.gaussian((9, 9, 9))[4, 4, 4] == 1


def constant_run():
    """A run whose networks say the same everywhere: A rather class 1, B surely class 2."""
    run = cps.Run(config(), IDS)
    for network, probs in zip(run.networks, ((0.1, 0.6, 0.3), (0.1, 0.1, 0.8))):
        network.head.weight.data.zero_()
        network.head.bias.data = torch.tensor(probs).log()
    return run


def test_a_predicts_and_b_on_request_in_label_ids():
    run = constant_run()
    volume = np.zeros((9, 8, 10), np.float32)
    for networks, label in (((), 1), (("a",), 1), (("b",), 5), (("ab",), 5)):
        got = cps.segment(run, volume, (9, 16, 10), *networks)
        assert np.array_equal(got, np.full((9, 16, 10), label))


def test_only_the_largest_component_of_chosen_labels_is_kept():
    labels = np.random.default_rng(0).choice([0, 1, 5], (12, 11, 10)).astype(np.uint8)
    run = cps.Run(config(largest=(5, 7)), IDS)
    run.networks = [lambda x: torch.cat([x == 0, x == 1, x == 5], dim=1) * 10.0]
    components, count = ndimage.label(labels == 5)
    sizes = [np.sum(components == i + 1) for i in range(count)]
    want = np.where((labels == 5) & (components != 1 + np.argmax(sizes)), 0, labels)
    assert np.array_equal(cps.segment(run, labels.astype(np.float32), labels.shape), want)


# 7. Dice
def test_dice_by_hand():
    one = np.array([True, True, True, False, False])
    two = np.array([False, True, True, True, True])
    nothing = one & ~one
    pairs = ((one, two), (one, nothing), (nothing, one), (nothing, nothing))
    assert [cps.dice(*pair) for pair in pairs] == [4 / 7, 0, 0, 1]


def test_checkpoint_is_not_chosen_for_what_it_misses():
    """A says label 1 everywhere. Label 5 is 0 where it is held, and no score where it is not."""
    _, label = make_scan(0)
    make_data(label=label)
    other = np.where(label == 5, 0, label).astype(np.uint8)
    other[:, :, -2:] = cps.IGNORE
    write("data/labelsTr/c0.nii.gz", other)
    cases = {case.name: case for case in prepared(config(val=0.0, labelled=6))["labelled"]}
    table = cps.validate(constant_run(), [cases["c0"], cases["c1"]])
    dices = []
    for ref in (other, label):
        held = np.count_nonzero(ref == 1)
        dices.append(2 * held / (held + np.count_nonzero(ref != cps.IGNORE)))
    assert np.allclose(table, [[dices[0], np.nan], [dices[1], 0]], equal_nan=True)


def test_mean_dice_is_over_cases_that_hold_a_label_then_over_labels():
    nan = np.nan
    table = np.array([[0.9, nan, 0.1, nan], [0.7, 0.5, 0.2, nan], [0.2, nan, 0.3, nan]])
    assert np.allclose(cps.label_means(table), [0.6, 0.5, 0.2, nan], equal_nan=True)
    assert cps.mean_dice(table) == pytest.approx((0.6 + 0.5 + 0.2) / 3)
    assert np.isnan([cps.mean_dice(table[:, 3:]), cps.mean_dice(table[:0])]).all()


# 9. Augmentation
def test_rotation_and_scale_are_made_in_mm():
    rows = []
    for seed in range(1500):
        matrix = cps.random_rotation_and_scale(np.random.default_rng(seed), np.array(MM))
        matrix = np.eye(3) if matrix is None else matrix
        in_mm = np.diag(MM) @ matrix @ np.diag(np.divide(1, MM))
        scale = np.linalg.det(in_mm) ** (1 / 3)
        turn = in_mm / scale
        assert np.allclose(turn @ turn.T, np.eye(3))  # a rotation does not shear
        angles = spatial.transform.Rotation.from_matrix(turn).as_euler("xyz", degrees=True)
        rows.append((abs(angles).max(), math.log2(scale)))
    angles, scales = abs(np.array(rows)).T
    assert 29 < angles.max() < 30.001 and 0.48 < scales.max() <= 0.5
    shares = np.mean((angles > 1e-3, scales > 1e-6, angles * scales > 1e-9), axis=1)
    assert shares == pytest.approx((0.2, 0.2, 0.04), abs=0.04)  # 4 sd


def test_gamma_keeps_mean_sd_and_order():
    ramp = np.linspace(-1, 5, 1001, dtype=np.float32)
    curves = [cps.change_gamma(ramp, np.random.default_rng(seed)) for seed in range(100)]
    assert np.allclose(np.mean(curves, axis=1), ramp.mean(), atol=1e-3)
    assert np.allclose(np.std(curves, axis=1), ramp.std(), atol=1e-3)
    assert (np.diff(curves) > 0).all()
    assert np.ptp(np.median(curves, axis=1)) > 0.3  # powers below and above 1


# 8. Scans
# One grid, turned by 135 degrees, where nibabel takes x for y after the rounding of a header.
TURN = spatial.transform.Rotation.from_euler("z", 135, degrees=True).as_matrix()
OBLIQUE = nib.affines.from_matvec(TURN @ np.diag(MM), (-10, 20, 5))


def write_form(path, array, form, affine=OBLIQUE):
    """Write an array with an affine as sform, beside a wrong pixdim, or as qform."""
    image = nib.Nifti1Image(array, None)
    image.set_sform(affine, int(form == "sform"))
    image.set_qform(affine, int(form == "qform"))
    if form == "sform":
        image.header["pixdim"][1:4] = 9
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


def warnings_of(capsys):
    """The warnings that were printed since the last look."""
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if line.startswith("warning: ")]


def names_of(split):
    return {part: [case.name for case in cases] for part, cases in split.items()}


@pytest.mark.parametrize("clip", [(-68.0, 200.0), ()])
def test_values_are_clipped_before_the_z_score(clip):
    volume = np.random.default_rng(0).normal(50, 100, SHAPE).astype(np.float32)
    volume[0] = 3000  # metal
    clipped = np.clip(volume, *(clip or np.percentile(volume, (0.5, 99.5))))
    expected = (clipped - clipped.mean()) / clipped.std()
    found = cps.preprocess(volume, np.array(MM), config(clip=clip))
    assert np.allclose(found, expected, atol=2e-3)  # the sd of a sample is 1 / 4480 larger


@pytest.mark.parametrize("mm", [(2.0, 2.0, 3.0), (0.7, 1.0, 7.0)])
def test_resampling_keeps_the_place(mm):
    """A volume whose values are places, in mm, still holds the places of its voxels."""
    empty = np.zeros(SHAPE, np.float32)
    shape = cps.preprocess(empty, np.array(MM), config(spacing=mm)).shape
    assert shape == tuple(np.rint(np.multiply(SHAPE, MM) / mm))
    for axis in range(3):
        old = (np.arange(SHAPE[axis]) + 0.5) * MM[axis]
        new = (np.arange(shape[axis]) + 0.5) * MM[axis] * SHAPE[axis] / shape[axis]
        volume = np.moveaxis(np.zeros(SHAPE, np.float32), axis, -1) + old.astype(np.float32)
        found = cps.resample(np.moveaxis(volume, -1, axis), shape)
        expected = np.clip(new, old[0], old[-1])  # constant beyond the outer centres
        assert np.allclose(np.moveaxis(found, axis, -1), expected, atol=1e-4)


@pytest.mark.parametrize("shape", [(32, 28, 20), (9, 14, 13), (5, 6, 7)])
def test_labels_are_resampled_by_the_largest_share(shape):
    ids = np.array([0, 1, 5, 255], np.uint8)
    labels = np.kron(np.random.default_rng(0).choice(ids, (5, 5, 4)), np.ones((3, 3, 3), np.uint8))
    grid = np.meshgrid(*map(np.arange, shape), indexing="ij")
    points = [(g + 0.5) * n / m - 0.5 for g, n, m in zip(grid, labels.shape, shape)]
    shares = []
    for label in ids:
        mask = (labels == label).astype(float)
        shares.append(ndimage.map_coordinates(mask, points, order=1, mode="nearest"))
    second, first = np.sort(shares, axis=0)[-2:]
    clear = first - second > 1e-4  # elsewhere, rounding may decide
    found = cps.resample_labels(labels, shape)
    assert set(np.unique(found)) <= set(ids)  # 3, the mean of 1 and 5, never appears
    assert clear.mean() > 0.7
    assert np.array_equal(found[clear], ids[np.argmax(shares, axis=0)][clear])


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "oblique"])
def test_orientation_round_trip_is_exact(axes):
    """Scans are turned to RAS+ as nibabel does it, and what is written lies on the image again. The
    affine is the one source of spacing."""
    array = np.random.default_rng(0).integers(0, 255, SHAPE).astype(np.uint8)
    affine = OBLIQUE
    if axes != "oblique":
        turn = nib.orientations.axcodes2ornt(axes)
        affine = np.diag((*MM, 1)) @ nib.orientations.inv_ornt_aff(turn, SHAPE)
    write_form("scan.nii.gz", array, "sform", affine)
    volume, spacing, nifti = cps.read_scan("scan.nii.gz", is_label=True)
    old = nib.load("scan.nii.gz")
    canonical = nib.as_closest_canonical(old)
    assert np.array_equal(volume, canonical.get_fdata())
    assert spacing == pytest.approx(nib.affines.voxel_sizes(canonical.affine))
    cps.write_like(volume, nifti, "copy.nii.gz")
    new = nib.load("copy.nii.gz")
    assert np.array_equal(old.get_fdata(), new.get_fdata())
    assert np.array_equal(old.affine, new.affine)
    assert new.get_data_dtype() == np.uint8


def test_a_label_whose_affine_differs_by_rounding_is_turned_with_its_image():
    _, label = make_scan(0)
    write_form("image.nii", label.astype(np.int16) * 30, "sform")
    write_form("label.nii", label, "qform")
    affines = [nib.load(name).affine for name in ("image.nii", "label.nii")]
    assert abs(affines[0] - affines[1]).max() < 1e-6
    assert not np.array_equal(*map(nib.io_orientation, affines))
    case = cps.Case("c", Path("image.nii"), Path("label.nii"))
    cps.prepare_case(case, config(clip=(0, 150)))
    arrays = case.load()
    for i in (0, *IDS):  # as many values as labels
        assert np.ptp(arrays["image"][arrays["label"] == i]) == 0
    for i, *xyz in arrays["points"]:
        assert arrays["label"][tuple(xyz)] == i
    write_form("copy.nii", label, "sform")
    assert cps.main(["evaluate", "label.nii", "copy.nii", "--csv", "scores.csv"]) == 0
    assert [float(row["dice"]) for row in rows_of("scores.csv")] == [1, 1]


def test_each_spacing_has_its_own_preprocessed_scans(data):
    for mm in (MM, (2.0, 4.0, 6.0)):
        image = prepared(config(spacing=mm))["labelled"][0].load()["image"]
        assert image.shape == tuple(np.rint(np.multiply(SHAPE, MM) / mm))


NAMES = {
    "labelsTr/lost.nii": "no image for ['lost']",
    "imagesTr/c0.nii": "a second file of this case",
    "more/imagesUn/c6.nii": "imagesUn/c6 is there twice; rename the folder",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_do_not_go_together_are_refused(name, data):
    write("data/more/imagesUn/c8.nii", IMAGE)
    write(f"data/{name}", IMAGE)
    with pytest.raises(cps.UserError) as error:
        cps.split_cases(config(unlabelled=("data/more/imagesUn",)))
    assert NAMES[name] in str(error.value)


def test_split_is_disjoint_and_test_cases_do_not_depend_on_the_seed(data):
    splits = [cps.split_cases(config(seed=seed, test=0.2, val=1.0)) for seed in range(5)]
    for split in splits:
        assert [len(split[part]) for part in cps.PARTS] == [2, 3, 1, 2]  # 0.2 of 6 is rounded up
        assert len(set(itertools.chain(*names_of(split).values()))) == 8
        assert all(case.label is None for case in split["unlabelled"])  # also if it had one
    tests, vals = [{str(names_of(split)[part]) for split in splits} for part in ("test", "val")]
    assert len(tests) == 1 < len(vals)


def test_a_split_file_names_all_cases_that_are_used(data):
    for kind, array in (("images", IMAGE), ("labels", LABEL)):
        write(f"data/{kind}Ts/c9.nii", array)
    parts = {"labelled": ["c3", "c1", "c0"], "unlabelled": ["imagesUn/c7"], "val": ["c2"]}
    Path("split.json").write_text(json.dumps(parts))
    parts |= {"labelled": ["c3", "c1"], "unlabelled": ["c0", "imagesUn/c7"], "test": []}
    assert names_of(cps.split_cases(config(split="split.json", labelled=2))) == parts


def test_empty_folders_count_as_absent_and_further_ones_are_added(data):
    for name in ("imagesTs", "labelsTs"):
        Path("data", name).mkdir()
    for file in Path("data").glob("imagesUn/*"):
        file.unlink()
    write("more/imagesTs/c6.nii", make_scan(50)[0])  # without labels, these are no test cases
    split = names_of(cps.split_cases(config(unlabelled=("more/imagesTs",), labelled=0)))
    assert split["unlabelled"] == ["imagesTs/c6"] and split["test"] == []


def test_images_that_are_there_twice_get_one_warning_that_names_val_first(data, capsys):
    shutil.copy("data/imagesTr/c4.nii.gz", "data/imagesUn/c6.nii.gz")
    shutil.copy("data/imagesTr/c1.nii.gz", "data/imagesUn/c7.nii.gz")
    parts = {"labelled": ["c1", "c2"], "unlabelled": ["imagesUn/c6", "imagesUn/c7"]}
    twins = {"c4": "1 val or test images", "c5": "1 images are there twice, such as ['c1',"}
    for val, words in twins.items():
        Path("split.json").write_text(json.dumps(parts | {"val": [val]}))
        prepared(config(split="split.json"))
        [warning] = warnings_of(capsys)
        assert words in warning


def test_equal_crops_get_one_warning_in_each_command(data, capsys):
    prepared(config(patch=(16, 14, 8)))  # the scans are larger on one axis
    assert warnings_of(capsys) == []
    for number in range(2):
        flags = train_flags(patch=(16, 16, 16), epochs=1, epoch_steps=1, out=f"run{number}")
        assert cps.main(flags) == 0
        [warning] = warnings_of(capsys)
        assert "no scan is larger than --patch" in warning


def test_a_ct_with_an_offset_gets_one_warning(data, capsys):
    body, _ = cps.phantom_volume(np.random.default_rng(0))
    assert not cps.is_outside(body, -68, 200)  # a third of it is air
    assert cps.is_outside(body + 1024, -68, 200)
    assert cps.is_outside((body - body.mean()) / body.std(), -68, 200)  # not in HU
    for file in Path("data").glob("images*/*"):
        write(file, nib.load(file).get_fdata() + 1024)
    prepared(config())
    [warning] = warnings_of(capsys)
    assert "8 scans" in warning and "--clip" in warning
    prepared(config(clip=()))
    assert warnings_of(capsys) == []


def test_the_header_counts_the_cases_that_hold_a_label(data, capsys):
    path = cps.split_cases(config())["labelled"][0].label
    label = nib.load(path).get_fdata().astype(np.uint8)
    label[label == 5] = 255
    label[0, 0, 0] = 7  # vanishes on the coarse grid, and will be counted as missed
    write(path, label)
    assert cps.label_ids(prepared(config(spacing=(3, 6, 9)))) == [1, 5, 7]
    held = "label 1 in 2, label 5 in 1, label 7 in 1"
    assert f"labelled   2 cases  {held}\n" in capsys.readouterr().out


# 10. Scores
@pytest.mark.parametrize("axis", range(3))
def test_surface_scores_of_a_shifted_cube_have_a_closed_form(axis, monkeypatch):
    """A cube of n^3 voxels is shifted by one voxel. The surface consists of faces, edges cut to the
    hypotenuse, and cut corners. If the tolerance is smaller than a voxel, one plane with its edges
    and the inside of the other one are too far away."""
    monkeypatch.delitem(sys.modules, "monai.metrics")  # MONAI is visible
    pytest.importorskip("monai")
    n = 6
    ref = np.zeros((12, 12, 12), np.uint8)
    ref[2:8, 2:8, 2:8] = 5
    pred = np.roll(ref, 1, axis)
    x, y, z = np.roll(np.prod(MM) / MM, -axis)  # area of a face of a voxel, x: across the shift
    corner = math.hypot(x, y, z) / 8
    edges = [(n - 1) * math.hypot(*pair) / 2 for pair in ((x, y), (x, z), (y, z))]
    total = 2 * (n - 1) ** 2 * (x + y + z) + 4 * sum(edges) + 8 * corner
    far = 2 * (n - 1) ** 2 * x + 2 * (edges[0] + edges[1]) + 4 * corner
    scores = cps.evaluate_case(pred, ref, np.array(MM), [5], tolerance=0.9)[5]
    assert scores.nsd == pytest.approx(1 - far / total, abs=1e-5)
    assert scores.hd95 == pytest.approx(MM[axis])
    assert scores.dice == pytest.approx(5 / 6)
    assert cps.evaluate_case(pred, ref, np.array(MM), [5], tolerance=MM[axis])[5].nsd == 1
    write("pred.nii", pred)
    write("ref.nii", ref)
    flags = ["--tolerance", "0.9", "--csv", "scores.csv"]
    assert cps.main(["evaluate", "pred.nii", "ref.nii", *flags]) == 0
    assert float(rows_of("scores.csv")[0]["nsd"]) == pytest.approx(scores.nsd)


def test_missed_and_invented_labels_score_0_and_ignored_voxels_do_not_count(monkeypatch):
    monkeypatch.delitem(sys.modules, "monai.metrics")  # MONAI is visible
    pytest.importorskip("monai")
    ref = np.zeros(SHAPE, np.uint8)
    ref[2:5, 2:5, 2:5] = 1
    pred = ref * 2
    ref[8:] = 255
    pred[8:] = 3
    scores = cps.evaluate_case(pred, ref, np.array(MM), [1, 2, 3])
    assert [scores[i][:2] for i in (1, 2, 3)] == [(0, 0), (0, 0), (1, 1)]
    assert np.isnan([scores[i].hd95 for i in (1, 2, 3)]).all()
    assert [scores[i][3:] for i in (1, 2, 3)] == [(True, False), (False, True), (False, False)]


def test_the_table_has_means_over_the_cases_that_hold_a_label():
    """Dice of label 1: 0.5, 0.7 and once invented; of label 2: missed. Mean: (0.6 + 0) / 2."""
    held = {"held": True, "found": True}
    results = {
        "a": {1: cps.Scores(0.5, 0.6, 3.0, **held), 2: cps.Scores(0.0, 0.0, held=True)},
        "b": {1: cps.Scores(0.7, 0.8, 5.0, **held), 2: cps.Scores()},
        "c": {1: cps.Scores(0.0, 0.0, found=True), 2: cps.Scores()},
    }
    lines = cps.score_table(results).splitlines()
    assert lines[0] == "| label | cases | Dice | NSD | HD95 mm | missed | invented |"
    assert lines[2] == "| 1 | 2 | 0.6000 +- 0.1414 | 0.7000 +- 0.1414 | 4.00 +- 1.41 | 0 | 1 |"
    assert lines[3] == "| 2 | 1 | 0.0000 | 0.0000 | - | 1 | 0 |"
    assert lines[4] == "| mean |  | 0.3000 |  |  |  |  |"
    healthy = cps.score_table({"d": {1: cps.Scores(0.0, 0.0, found=True)}})
    assert healthy.splitlines()[2] == "| 1 | 0 | - | - | - | 0 | 1 |"


# 11. Phantom
def test_default_command_trains_on_phantoms_whose_right_organs_lie_right(monkeypatch):
    """Told by the files and their affines: x of RAS+ grows to the patient's right."""
    whole = cps.phantom_volume
    monkeypatch.setattr(cps, "phantom_volume", lambda rng: whole(rng, (22, 20, 20)))
    smaller = {"patch": PATCH, "levels": 2, "base_channels": 4, "epochs": 1, "epoch_steps": 1}
    monkeypatch.setitem(cps.PRESETS, "quick", cps.PRESETS["quick"] | smaller)
    assert cps.main(["train", "--device", "cpu", "--momentum", "0.8", "--clip", "auto"]) == 0
    settings = json.loads(Path("runs/phantom-context/config.json").read_text())
    assert settings["preset"] == "quick"  # on a CPU; its lr is 0.2
    assert [settings[name] for name in ("lr", "momentum", "clip", "batch")] == [0.2, 0.8, [], 2]
    for file in Path("runs/phantom/labelsTr").iterdir():
        nifti = nib.load(file)
        voxels = [np.argwhere(np.asarray(nifti.dataobj) == label).mean(0) for label in (1, 2, 3, 4)]
        liver, spleen, right, left = nib.affines.apply_affine(nifti.affine, voxels)
        assert liver[0] > spleen[0]
        assert right[0] > left[0]  # the kidneys
        assert liver[2] > right[2]  # z grows to the head


# 12. Runs
def train_flags(**changes):
    settings = TINY | {"preset": "paper"} | changes
    flags = ["train", settings.pop("data")]
    for name, value in settings.items():
        values = value if isinstance(value, tuple) else (value,)
        flags += [f"--{name.replace('_', '-')}", *map(str, values)]
    return flags


def refusal(capsys, *argv):
    """The errors of bad input: exit code 2, one line for each, no traceback."""
    capsys.readouterr()
    assert cps.main([str(word) for word in argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith(("error: ", "warning: ")) for line in lines)
    return "\n".join(line for line in lines if line.startswith("error: "))


def state_of(path):
    """What a checkpoint holds: networks, optimisers and the log, without its seconds."""
    state = torch.load(path, weights_only=True)
    parts = [part.get("state", part) for part in state["parts"]]
    rows = [{name: row[name] for name in row if name != "seconds"} for row in state["rows"]]
    return parts, rows, state["best"]


def rows_of(path):
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training of 2 epochs x 10 steps. One scan is finer, one of the two test cases oblique."""
    root = tmp_path_factory.mktemp("trained")
    make_data(root / "data")
    for number, form in enumerate(("sform", "qform")):
        folder = root / "data" / ("imagesTs", "labelsTs")[number]
        write(folder / "t0.nii.gz", make_scan(20)[number])
        write_form(folder / "t1.nii.gz", make_scan(21)[number], form)
    fine = np.kron(make_scan(30)[0], np.ones((2, 2, 2), np.int16))
    write(root / "data/imagesUn/fine.nii.gz", fine, np.diag((*np.divide(MM, 2), 1)))
    folders = {name: str(root / name) for name in ("data", "out", "cache")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        patch.setitem(sys.modules, "monai.metrics", None)
        return cps.train(config(spacing=(), epoch_steps=10, batch=4, lr=0.2, **folders))


def spoil_step(patch, step, spoil):
    """After one of the training steps, call spoil(run, values of the log)."""
    one_step = cps.train_step

    def spoiled(run, batch, lam):
        values = one_step(run, batch, lam)
        if run.step == step:
            spoil(run, values)
        return values

    patch.setattr(cps, "train_step", spoiled)


def test_resume_after_crash_is_exact(trained, monkeypatch):
    """A run that breaks off in the middle of epoch 2 and goes on ends with the same networks,
    optimisers and log."""
    whole = trained["run"].config
    broken = dataclasses.replace(whole, out="broken", spacing=(), resume=True)
    with monkeypatch.context() as patch:
        spoil_step(patch, 15, Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            cps.train(broken)
    assert len(rows_of("broken/log.csv")) == 1
    cps.train(broken)
    for file in ("last.pt", "best.pt"):
        one, two = state_of(f"{whole.out}/{file}"), state_of(f"broken/{file}")
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


def test_the_log_has_a_column_for_the_dice_of_each_label(trained):
    rows = rows_of(f"{trained['run'].config.out}/log.csv")
    assert list(rows[0]) == [*cps.LOG, "dice_1", "dice_5"]
    assert [int(row["step"]) for row in rows] == [10, 20]
    for row in rows:
        mean = (float(row["dice_1"]) + float(row["dice_5"])) / 2
        assert float(row["dice"]) == pytest.approx(mean) != 0
    assert trained["run"].best == max(float(row["dice"]) for row in rows)


def test_without_validation_cases_best_is_the_latest(data):
    cps.train(config(val=0.0))
    torch.testing.assert_close(state_of("run/best.pt")[0], state_of("run/last.pt")[0])


POISONS = {
    "loss": lambda run, values: values["loss_sup"].fill_(math.nan),
    "weights": lambda run, values: next(run.networks[1].parameters()).data.fill_(math.inf),
}


@pytest.mark.parametrize("kind", POISONS)
def test_a_loss_that_is_not_finite_keeps_the_checkpoint(kind, data, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        spoil_step(patch, 5, POISONS[kind])  # the last step, after a whole epoch
        assert "the loss is not finite" in refusal(capsys, *train_flags())
    parts, rows, _ = state_of("run/last.pt")
    assert len(rows) == 1
    assert all(tensor.isfinite().all() for part in parts[:2] for tensor in part.values())
    assert cps.main([*train_flags(), "--resume", "--no-amp"]) == 0  # the remedy that it names


def test_what_may_change_when_a_run_is_resumed(data, capsys):
    cps.train(config())
    before = Path("run/last.pt").read_bytes()
    assert "add --resume" in refusal(capsys, *train_flags())
    assert "trained with epochs 2" in refusal(capsys, *train_flags(epochs=3), "--resume")
    assert "trained with data /" in refusal(capsys, *train_flags(data="other"), "--resume")
    assert Path("run/last.pt").read_bytes() == before
    write("data/imagesUn/new.nii", make_scan(99)[0])
    assert cps.train(config(resume=True, largest=(1,)))["run"].config.largest == (1,)
    _, split = cps.open_run(config(resume=True))
    assert "imagesUn/new" not in names_of(split)["unlabelled"]  # the cases stay the same
    write(split["val"][0].label, make_scan(5)[1] * 3)
    assert "the labels are now [1, 3, 5, 15]" in refusal(capsys, *train_flags(), "--resume")


def test_two_processes_see_other_patches_and_train_one_pair_of_networks(data):
    """With one pair of patches each, they do what one process does with two pairs."""
    flags = {"epochs": 1, "epoch_steps": 4, "lr": 0.001}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, cps.__file__, *train_flags(batch=1, out="two", **flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next ") == 1  # the first process speaks
    cps.train(config(batch=2, out="one", **flags))
    before = cps.make_pair(config(**flags), 3)
    one, two = [cps.Run.load(f"{out}/last.pt").networks for out in ("one", "two")]
    before, one, two = [torch.cat([*map(weights, pair)]) for pair in (before, one, two)]
    assert abs(one - before).max() > 1e-3  # what they learn is far more than they differ by
    assert abs(one - two).max() < 1e-5


# 13. Commands
def predict(trained, images, *more):
    return cps.main(["predict", f"{trained['run'].config.out}/best.pt", images, "out", *more])


def test_the_test_of_train_is_predict_and_evaluate(trained):
    """Also for an oblique scan, whose label has another affine after rounding."""
    data = trained["run"].config.data
    assert predict(trained, f"{data}/imagesTs") == 0
    assert cps.main(["evaluate", "out", f"{data}/labelsTs", "--csv", "scores.csv"]) == 0
    dices = {}
    for row in rows_of("scores.csv"):
        dices[f"imagesTs/{row['case']}", int(row["label"])] = float(row["dice"])
    expected = {(c, i): s.dice for c, case in trained["scores"].items() for i, s in case.items()}
    assert dices == pytest.approx(expected, abs=1e-12)
    assert min(dices.values()) > 0
    image = nib.load(f"{data}/imagesTs/t1.nii.gz")
    found = nib.load("out/t1.nii.gz")
    assert np.array_equal(found.affine, image.affine)
    assert set(np.unique(found.dataobj)) == {0, *IDS}


def test_a_scan_of_another_spacing_is_predicted_on_the_grid_of_the_training(trained):
    """One training scan was finer: the median is kept in the checkpoint."""
    assert trained["run"].config.spacing == MM
    image, _ = make_scan(20)
    block = np.ones((3, 2, 1), np.uint8)
    write("in/fine.nii", np.kron(image, block), np.diag((*np.divide(MM, block.shape), 1)))
    write("in/same.nii", image)
    assert predict(trained, "in") == 0
    found = nib.load("out/fine.nii.gz").get_fdata()
    expected = np.kron(nib.load("out/same.nii.gz").get_fdata(), block)
    assert min(cps.dice(found == i, expected == i) for i in IDS) > 0.9


def test_predict_leaves_existing_files_alone_and_does_the_rest(trained, capsys):
    for number in range(3):
        write(f"in/s{number}_0000.nii.gz", make_scan(number)[0] + 1024 * (number == 2))
    Path("in/bad_0000.nii").write_text("no scan")
    write("out/s1.nii.gz", np.zeros(SHAPE, np.uint8))  # corrected by hand
    before = Path("out/s1.nii.gz").read_bytes()
    assert predict(trained, "in") == 1
    errors = capsys.readouterr().err
    assert "out: 1 of 4 exist" in errors
    assert "error: in/bad_0000.nii: " in errors
    assert "in/s2_0000.nii.gz: is not in HU" in errors
    assert Path("out/s1.nii.gz").read_bytes() == before
    assert sorted(os.listdir("out")) == ["s0.nii.gz", "s1.nii.gz", "s2.nii.gz"]


def test_predict_can_be_interrupted_and_continued(trained, monkeypatch, capsys):
    for number in range(3):
        write(f"in/s{number}.nii", make_scan(number)[0])
    answers = [np.ones(SHAPE, np.uint8), KeyboardInterrupt]
    with monkeypatch.context() as patch:
        patch.setattr(cps, "segment", Mock(side_effect=answers))
        assert predict(trained, "in") == 130
    output = capsys.readouterr()
    assert "predicting 1/3" in output.out
    assert "interrupted" in output.err
    [name] = os.listdir("out")
    assert np.all(nib.load(f"out/{name}").get_fdata() == 1)
    assert predict(trained, "in") == 0
    assert len(os.listdir("out")) == 3
    assert np.all(nib.load(f"out/{name}").get_fdata() == 1)


def test_evaluate_counts_broken_and_missing_predictions_as_empty_and_invented_labels(capsys):
    _, label = make_scan(0)
    for name in ("whole", "cut", "missing"):
        write(f"refs/{name}.nii", label)
        write(f"preds/{name}.nii", np.where(label == 5, 7, label).astype(np.uint8))
    truncate("preds/cut.nii")
    os.remove("preds/missing.nii")
    assert cps.main(["evaluate", "preds", "refs"]) == 1
    output = capsys.readouterr()
    assert "1 of 3 cases have no prediction: ['missing']" in output.err
    assert "error: preds/cut.nii: " in output.err
    rows = [line for line in output.out.splitlines() if line.startswith("|")]
    assert rows[2] == "| 1 | 3 | 0.3333 +- 0.5774 | - | - | 2 | 0 |"
    assert rows[3] == "| 5 | 3 | 0.0000 +- 0.0000 | - | - | 3 | 0 |"
    assert rows[4] == "| 7 | 0 | - | - | - | 0 | 1 |"
    write("preds/whole.nii", label * 51)  # 1 and 5 become 51 and 255, as in a mask for a screen
    assert cps.main(["evaluate", "preds", "refs"]) == 1
    assert "preds/whole.nii: 255 is no label" in capsys.readouterr().err


def test_ablate_compares_at_equal_labels_and_steps(data, monkeypatch):
    monkeypatch.setattr(cps, "interval", lambda gains: f"{gains.mean():+.4f}")
    flags = {"labelled": 1, "val": 1.0, "test": 2.0, "epochs": 1, "largest": (1, 5)}
    cps.train(config(method="cps", out="run/cps-1-0", **flags))
    finished = Path("run/cps-1-0/last.pt").stat().st_mtime_ns
    assert cps.main(["ablate", *train_flags(**flags)[1:], "--seeds", "2"]) == 0
    assert Path("run/cps-1-0/last.pt").stat().st_mtime_ns == finished  # is not trained again
    states = [torch.load(path) for path in Path("run").glob("*/last.pt")]
    same = [(state["step"], state["config"]["largest"]) for state in states]
    assert same == [(3, (1, 5))] * 8

    dices, missed = defaultdict(list), Counter()
    for row in rows_of("run/ablation.csv"):  # 2 seeds, 2 cases, 2 labels
        dices[row["method"], row["labels"]].append(float(row["dice"]))
        missed[row["method"], row["labels"]] += row["found"] == "False"
    lines = ["| method | labels | Dice | NSD | missed | gain in Dice [95 %] |", "|---" * 6 + "|"]
    for arm in (("supervised", "1"), ("cps", "1"), ("context", "1"), ("supervised", "all")):
        mean = cps.spread(np.reshape(dices[arm], (2, 4)).mean(1))
        gain = f"{np.mean(dices[arm]) - np.mean(dices['supervised', '1']):+.4f}"
        gain = "" if arm[0] == "supervised" else gain
        lines.append(f"| {' | '.join(arm)} | {mean} | - | {missed[arm]} of 8 | {gain} |")
    assert Path("run/ablation.md").read_text().splitlines() == lines


@pytest.mark.parametrize("shape", [(20, 1, 1), (1, 20, 1)])
def test_interval_of_gains_draws_seeds_and_cases_anew(shape):
    """Half of 20 gains are 1: the bootstrap is binomial, whose 2.5 % quantile is 6 of 20."""
    gains = (np.arange(20) % 2.0).reshape(shape)
    assert cps.interval(gains) == "+0.5000 [+0.3000, +0.7000]"


def test_the_figure_is_drawn(trained, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.figure")  # it is visible
    pytest.importorskip("matplotlib")
    figure = Path(trained["run"].config.out, "figure.png")
    cps.figure(trained["run"], prepared(trained["run"].config), figure)
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert figure.stat().st_size > 10_000  # an empty page has less


# 14. Command line
def truncate(path):
    os.truncate(path, os.path.getsize(path) // 2)


def test_help_names_all_commands_and_comes_from_the_comments(capsys):
    for argv in ([], ["train", "--help"]):
        with pytest.raises(SystemExit, match="^0$"):
            cps.main(argv)
    text = " ".join(capsys.readouterr().out.split())
    assert "{train,predict,evaluate,ablate}" in text
    assert "SGD with Nesterov momentum [paper] (default: 0.01) (quick: 0.2)" in text


def test_atomic_keeps_the_old_file_if_the_write_fails():
    def half(path):
        path.write_text("ne")
        raise OSError("disk full")

    cps.write_text("folder/file", "old")
    with pytest.raises(cps.UserError, match="folder/file: disk full"):
        cps.atomic("folder/file", half)
    assert Path("folder/file").read_text() == "old"
    assert len(list(Path("folder").iterdir())) == 1  # no temporary file is left


SPLITS = {
    "twice": '{"labelled": ["c0"], "val": ["c0"]}',
    "unlabelled": '{"labelled": ["imagesUn/c6"]}',
}
SETTINGS = [
    ({"patch": (9, 8, 8)}, "--patch"),
    ({"patch": (2, 2, 2)}, "--patch"),
    ({"clip": (200, -68)}, "--clip"),
    ({"spacing": (0, 1, 1)}, "--spacing"),
    ({"momentum": 1.0}, "--momentum"),
    ({"lam": -1.0}, "--lam"),
    ({"batch": 0}, "--batch"),
    ({"lr": "nan"}, "--lr: must be"),
    ({"device": "abacus"}, "--device abacus"),
    ({"data": "nowhere"}, "nowhere/imagesTr"),
    ({"labelled": 5}, "lower --labelled, or give --val 0"),
    ({"out": "data/imagesTr/c0.nii.gz/run"}, "data/imagesTr/c0.nii.gz"),
    ({"split": "twice"}, "['c0'] are not in the data, or named twice"),
    ({"split": "unlabelled"}, "['imagesUn/c6'] have no label"),
    ({"split": "data/imagesTr/c0.nii.gz"}, "c0.nii.gz: "),
]


@pytest.mark.parametrize("changes, words", SETTINGS)
def test_impossible_settings_get_one_sentence(changes, words, data, capsys):
    for name, text in SPLITS.items():
        Path(name).write_text(text)
    [error] = refusal(capsys, *train_flags(**changes)).splitlines()
    assert words in error


def grid(x=0.0, tilt=0.0):
    return np.array([[1, 0, 0, x], [tilt, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]])


BROKEN = {
    "empty": ("images", lambda path: path.write_bytes(b""), ""),
    "cut": ("images", truncate, ""),
    "2D": ("images", lambda path: write(path, IMAGE[0]), "is not 3D"),
    "two volumes": ("images", lambda path: write(path, np.stack([IMAGE] * 2, 3)), "is not 3D"),
    "NaN": ("images", lambda path: write(path, IMAGE * np.nan), "NaN"),
    "spacing": ("images", lambda path: write(path, IMAGE, np.eye(4) * 1e-4), "spacing"),
    "half": ("labels", lambda path: write(path, LABEL / 2), "whole numbers from 0 to 255"),
    "negative": ("labels", lambda path: write(path, LABEL * -1.0), "whole numbers from 0 to 255"),
    "shape": ("labels", lambda path: write(path, LABEL[1:]), "shape"),
    "shift": ("labels", lambda path: write(path, LABEL, grid(x=0.2)), "0.2 voxels off"),
    "tilt": ("labels", lambda path: write(path, LABEL, grid(tilt=0.02)), "0.16 voxels off"),
    "flat": ("images", lambda path: write(path, IMAGE * 0), "all voxels are equal"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_named_all_at_once(kind, data, capsys):
    folder, spoil, words = BROKEN[kind]
    path = Path(f"data/{folder}Tr/c3.nii.gz").absolute()
    spoil(path)
    Path("data/imagesUn/c7.nii.gz").write_text("no scan")
    errors = refusal(capsys, *train_flags(labelled=0, val=0.0)).splitlines()
    [error] = [line for line in errors if line.startswith(f"error: {path}: ")]
    assert words in error
    assert any("c7.nii.gz: " in line for line in errors)
    assert "2 cases cannot be used" in errors[-1]
    assert not Path("run").exists()


class Evil:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("kind", ["code", "cut", "foreign"])
def test_a_checkpoint_that_is_none_is_refused_and_its_code_not_run(kind, trained, capsys):
    if kind == "cut":
        shutil.copy(f"{trained['run'].config.out}/best.pt", "bad.pt")
        truncate("bad.pt")
    else:
        torch.save(Evil() if kind == "code" else {"state_dict": {"w": torch.zeros(3)}}, "bad.pt")
    error = refusal(capsys, "predict", "bad.pt", ".", "out")
    assert error.startswith("error: bad.pt: cannot be loaded as a checkpoint: ")
    assert error.count("\n") == 0
    assert not Path("owned").exists()
