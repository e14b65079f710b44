"""Tests of cps.py: every formula against a plain second implementation, the fifteen traps into which
a toy version of this method falls (`test_trap_01_...`), whole runs and bad input.

    python -m pytest -q test_cps.py
"""
import csv
import functools
import itertools
import os
import pickle
import signal
from contextlib import nullcontext

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import cps

torch.set_num_threads(2)
IDS = [1, 5]  # label ids of the test data: not 1, 2, so that a class taken for an id shows
SHAPE, PATCH, MM = (16, 14, 10), (8, 8, 8), (1.0, 2.0, 3.0)
TINY = {"patch": PATCH, "levels": 2, "base_channels": 4, "epochs": 2, "epoch_steps": 3, "lr": 0.05,
        "momentum": 0.9, "validate_epochs": 1, "val": 2.0, "labelled": 2, "device": "cpu",
        "data": "data", "out": "run", "cache": "cache"}

# Helpers ------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Work in an empty folder; `train` takes over the signals: give them back."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)

def write(path, array, affine=None):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag((*MM, 1)) if affine is None else affine), path)

def phantom(seed, shape=SHAPE):
    """Noise with a bright box of label 1 at the left and a brighter one of label 5 at the right."""
    rng, label = np.random.default_rng(seed), np.zeros(shape, np.uint8)
    x, y, z = rng.integers(1, 4, 3)
    label[x:x + 5, y:y + 8, z:z + 5], label[x + 6:x + 11, y:y + 8, z:z + 5] = 1, 5
    hu = np.array([0, 80, 0, 0, 0, 160])[label] + rng.normal(0, 15, shape)
    return hu.round().astype(np.int16), label

def make_data(root="data", labelled=6, unlabelled=2, shape=SHAPE):
    """A data set in the layout of MSD: c0, c1 ... with labels, u0, u1 ... without."""
    for i in range(labelled + unlabelled):
        image, label = phantom(i, shape)
        name = f"c{i}" if i < labelled else f"u{i}"
        write(f"{root}/images{'Tr' if i < labelled else 'Un'}/{name}.nii.gz", image)
        if i < labelled:
            write(f"{root}/labelsTr/{name}.nii.gz", label)

def words(**flags):
    """The command line of some Config fields."""
    return [word for key, value in flags.items() for word in (
        f"--{key.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,)))]

def run(*arguments, **flags):
    """main(["train", ...]) of a tiny network; returns the exit code."""
    flags = TINY | flags
    return cps.main(["train", flags.pop("data"), *arguments, *words(**flags)])

def patches(rank=0, **changes):
    config = cps.Config(**TINY | changes)
    return cps.Patches(config, cps.prepare(cps.split_cases(config), config), IDS, rank)

def tensors(content):
    """All tensors of a nested checkpoint, in order: the weights, the state of the optimisers."""
    if isinstance(content, torch.Tensor):
        return [content]
    items = content.values() if isinstance(content, dict) else content
    items = items if isinstance(content, (dict, list, tuple)) else ()
    return [tensor for item in items for tensor in tensors(item)]

def same_weights(path1, path2):
    one, two = (tensors(torch.load(path, weights_only=True)) for path in (path1, path2))
    assert len(one) == len(two) > 10
    return all(map(torch.equal, one, two))

def table_of(path):
    """Rows of a CSV file; without the seconds, which differ from run to run."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(open(path))]

def spy(monkeypatch, before=lambda i, batch: None):
    """Record the batches of all training steps; before(i, batch) may act, or raise, at step i."""
    batches, step = [], cps.train_step

    def watched(networks, optimisers, batch, *rest):
        before(len(batches), batch)
        batches.append(batch)
        return step(networks, optimisers, batch, *rest)
    monkeypatch.setattr(cps, "train_step", watched)
    return batches

def logits(*shape, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).requires_grad_()

def networks(count=2, classes=3, seed=0):
    torch.manual_seed(seed)
    return [cps.UNet3D(classes, 2, 2) for _ in range(count)]

def step(nets, batch, config, lam=1.0, momentum=0.9, lr=0.05):
    """One step of cps.train_step on a CPU, with new optimisers."""
    optimisers = [torch.optim.SGD(n.parameters(), lr, momentum, nesterov=True) for n in nets]
    return lambda: cps.train_step(nets, optimisers, batch, lam, config, torch.amp.GradScaler(
        "cpu", enabled=False), nullcontext()).tolist()

# Oracles: the same thing, as plainly as possible --------------------------------------------------
def plain_loss(scores, target, dice=True):
    """Dice + CE, sample by sample and class by class; voxels with target -1 count nowhere."""
    losses = []
    for out, true in zip(scores, target):
        out, true = out[:, true >= 0], true[true >= 0]  # (K, n), (n,)
        if not len(true):
            losses.append(out.sum() + float(dice) * 0)
            continue
        losses.append(F.cross_entropy(out.T, true))
        for k in range(1, len(out)) if dice else ():
            p, t = out.softmax(0)[k], (true == k).float()
            losses[-1] = losses[-1] + (
                1 - (2 * (p * t).sum() + 1e-5) / (p.sum() + t.sum() + 1e-5)) / (len(out) - 1)
    return sum(losses) / len(losses)

def plain_cross_entropies(a, b, valid):
    """L_cps of CE alone in a loop of six lines: each network against the other's argmax."""
    total = 0.0
    for i, x, y, z in itertools.product(*map(range, valid.shape)):
        for student, teacher in ((a[i, :, x, y, z], b[i, :, x, y, z]),
                                 (b[i, :, x, y, z], a[i, :, x, y, z])):
            nll = np.log(np.exp(student).sum()) - student[teacher.argmax()]
            total += nll * valid[i, x, y, z] / valid[i].sum() / len(valid)
    return total

def plain_windows(nets, volume, patch, num_classes, overlap, flips):
    """Sliding window with all sums of the whole volume in memory: float64 (K, X, Y, Z)."""
    shape = np.maximum(volume.shape, patch)
    padded = np.pad(volume, [(0, s - n) for s, n in zip(shape, volume.shape)])
    total = torch.zeros(num_classes, *shape, dtype=torch.float64)
    axes = [(torch.arange(p) - (p - 1) / 2) / (p / 8) for p in patch]
    weight = torch.exp(-sum(g ** 2 for g in torch.meshgrid(*axes, indexing="ij")) / 2)
    starts = []
    for s, p in zip(shape, patch):
        n = 1
        while n == 1 and s > p or n > 1 and (s - p) / (n - 1) > p * (1 - overlap):
            n += 1
        starts.append(np.linspace(0, s - p, n).round().astype(int))
    for corner in itertools.product(*starts):
        box = tuple(slice(c, c + p) for c, p in zip(corner, patch))
        for net, flip in itertools.product(nets, flips):
            out = net(torch.tensor(padded[box])[None, None].flip(flip)).softmax(1).flip(flip)
            total[(slice(None), *box)] += out[0].double() * weight
    return total[(slice(None), *map(slice, volume.shape))]

# The surface at a voxel corner: code of the 8 voxels -> |normals| of the triangles, in eighths
ROWS = {1: [111], 3: [220] * 2, 6: [111] * 2, 24: [111] * 2, 7: [400, 222, 111], 22: [111] * 3,
        105: [111] * 4, 25: [22, 22, 111], 15: [400] * 2, 23: [111, 111, 222, 222],
        27: [111, 333, 22, 202], 30: [400, 111, 111, 222], 60: [220] * 4}
CUBE = list(itertools.product((0, 1), repeat=3))

def cells(code):
    return frozenset(cell for i, cell in enumerate(CUBE) if code & (128 >> i))

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
    a, b = cps.make_pair(cps.Config(**TINY, init_b=init_b), 3)
    again = cps.make_pair(cps.Config(**TINY, init_b=init_b), 3)
    other = cps.make_pair(cps.Config(**TINY, init_b=init_b, seed=1), 3)
    for p, q, p1, q1, p2, q2 in zip(*(n.parameters() for n in (a, b, *again, *other))):
        assert torch.equal(p, p1) and torch.equal(q, q1)
        if p.ndim == 5:  # a convolution; the norms begin as 1 and 0 in both
            assert not any(torch.equal(s, t) for s, t in itertools.combinations((p, q, p2, q2), 2))
    x = logits(1, 1, 8, 8, 8)
    agree = (cps.pseudo_label(a(x)) == cps.pseudo_label(b(x))).float().mean()
    assert agree < 0.9

def test_trap_02_no_gradient_through_the_target():
    a, b = logits(2, 3, 4, 5, 6), logits(2, 3, 4, 5, 6, seed=1)
    label = cps.pseudo_label(b)
    assert label.dtype == torch.int64 and not label.requires_grad
    assert torch.equal(label, b.argmax(1))
    got = torch.autograd.grad(cps.cross_pseudo_loss(a, b), (a, b))
    want = [torch.autograd.grad(cps.dice_ce_loss(x, y.argmax(1)), x)[0] for x, y in ((a, b), (b, a))]
    assert all(map(torch.equal, got, want))  # to the bit: the other term adds exactly zero

@pytest.mark.parametrize("batch", [1, 2])
def test_trap_04_cross_pseudo_loss_is_the_loop_over_voxels(batch):
    a, b = logits(batch, 3, 4, 3, 5), logits(batch, 3, 4, 3, 5, seed=1)
    valid = torch.rand(batch, 4, 3, 5, generator=torch.Generator().manual_seed(2)) < 0.7
    for mask in (valid, torch.ones_like(valid)):
        arrays = [t.detach().double().numpy() for t in (a, b)]
        want = plain_cross_entropies(*arrays, mask.numpy())
        got = cps.cross_pseudo_loss(a, b, mask, dice=False)
        assert got.item() == pytest.approx(want, rel=1e-5)
        labels = [t.argmax(1).masked_fill(~mask, -1) for t in (b, a)]
        want = plain_loss(a, labels[0]) + plain_loss(b, labels[1])
        assert cps.cross_pseudo_loss(a, b, mask).item() == pytest.approx(want.item(), rel=1e-5)
    assert torch.equal(got, cps.cross_pseudo_loss(a, b, dice=False))  # valid=None: all

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
    loss = cps.dice_ce_loss(out, torch.full((2, 4, 4, 4), -1), dice=dice)
    loss.backward()
    assert loss.item() == 0 and (out.grad == 0).all()
    none = torch.zeros(2, 4, 4, 4, dtype=torch.bool)
    assert cps.cross_pseudo_loss(out, out, none, dice=dice).item() == 0

def test_trap_07_rampup_starts_near_zero_and_gets_large():
    config = cps.Config()
    ramp = [cps.rampup(i, config.rampup * 1000) for i in range(1000)]
    assert ramp[0] < 0.01 and ramp == sorted(ramp) and np.mean(ramp) > 0.5
    assert ramp[-1] == cps.rampup(300, 300) == cps.rampup(0, 0) == 1 and config.lam > 0
    assert cps.rampup(50, 100) == pytest.approx(np.exp(-5 / 4))

def test_trap_07_weight_and_rate_of_each_step_are_in_the_log(capsys):
    make_data()
    assert run(lam=2.0, rampup=0.6, epochs=5, epoch_steps=1, halve_epochs=2, validate_epochs=9) == 0
    rows = table_of("run/log.csv")
    assert [float(r["lam"]) for r in rows] == pytest.approx(
        [2 * cps.rampup(i, 3) for i in range(5)], rel=1e-4)
    assert [float(r["lr"]) for r in rows] == pytest.approx([.05, .05, .025, .025, .0125], rel=1e-4)
    for row in rows:  # these two show a collapse to background
        assert 0 <= float(row["agreement"]) <= 1 and 0 <= float(row["foreground"]) <= 1
    printed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert {"1", "5", "mean"} <= {*printed}  # Dice for each label, not only the mean

def test_trap_03_both_crops_agree_on_the_overlap():
    rng, moved = np.random.default_rng(0), np.zeros(3)
    for _ in range(500):
        patch, shape = rng.integers(1, 12, 3), rng.integers(1, 24, 3)
        least = rng.uniform(0.05, 0.95)
        corners = cps.overlapping_corners(rng, shape, patch, least)
        room = np.maximum(shape - patch, 0)
        assert all((0 <= c).all() and (c <= room).all() for c in corners)
        share = np.prod(1 - abs(corners[1] - corners[0]) / patch)
        can_shift = ((room > 0) & (1 - 1 / patch >= least)).any()
        assert least - 1e-9 <= share <= 1 and (share < 1) == can_shift
        moved += corners[1] != corners[0]
        volume = np.pad(np.arange(np.prod(shape)).reshape(shape),  # its values are coordinates
                        [(0, p) for p in patch], constant_values=-1)
        crops = [volume[tuple(map(slice, c, c + patch))] for c in corners]
        one, two = (crop[s] for crop, s in zip(crops, cps.overlap_slices(*corners, patch)))
        assert np.array_equal(one, two) and one.size == round(share * np.prod(patch))
    assert (moved > 100).all()  # on all axes

def test_overlap_slices_refuse_crops_that_do_not_meet():
    with pytest.raises(ValueError):
        cps.overlap_slices((0, 0, 0), (8, 0, 0), (8, 8, 8))

def test_dice_of_a_class_that_is_nowhere_and_of_a_perfect_output():
    target = torch.zeros(1, 4, 4, 4, dtype=torch.int64)
    target[:, 2:] = 1
    perfect = F.one_hot(target, 3).movedim(-1, 1) * 60.0
    assert cps.dice_ce_loss(perfect, target).item() < 1e-4

def test_trap_14_half_precision_does_not_overflow():
    out = logits(1, 2, 48, 48, 48, scale=100.0).detach()  # 110592 voxels: more than fp16 can count
    target = (out[:, 0] > 50).long()
    want = cps.dice_ce_loss(out.half().float(), target).item()
    assert cps.dice_ce_loss(out.half(), target).item() == pytest.approx(want, rel=1e-5)

# The network --------------------------------------------------------------------------------------
def test_unet_shapes_and_parameter_count():
    for classes, base, levels, channels in ((3, 2, 2, 1), (5, 4, 3, 2)):
        net, size = cps.UNet3D(classes, base, levels, channels), (8, 4, 12)
        assert net(torch.zeros(2, channels, *size)).shape == (2, classes, *size)
    # 3x3x3 kernels 1>2>2 | 2>4>4 | transposed 2x2x2 4>2 + bias | 4>2>2 | head 2>3 + bias; 2 norms each
    count = 27 * (2 + 4) + 8 + 27 * (8 + 16) + 16 + (8 * 8 + 2) + 27 * (8 + 4) + 8 + (6 + 3)
    assert sum(p.numel() for p in cps.UNet3D(3, 2, 2).parameters()) == count
    widest = max(p.shape[0] for p in cps.UNet3D(2, 32, 5).parameters())
    assert widest == 320

def test_unet_norm_is_instance_norm():
    net, = networks(1)
    for p in net.parameters():
        nn.init.normal_(p)
    x = logits(2, 1, 8, 8, 8).detach()
    want = net(x)
    assert torch.allclose(net(x[:1]), want[:1], atol=1e-4)  # no sample has a part in another's norm
    for module in [m for m in net.modules() if isinstance(m, nn.Sequential)]:
        for i, norm in enumerate(module):
            if isinstance(norm, nn.GroupNorm):
                module[i] = nn.InstanceNorm3d(norm.num_channels, eps=1e-5, affine=True)
                module[i].load_state_dict(norm.state_dict())
    assert any(isinstance(m, nn.InstanceNorm3d) for m in net.modules())
    assert torch.allclose(net(x), want, rtol=1e-3, atol=1e-3 * want.abs().max().item())

# Data and patches ---------------------------------------------------------------------------------
def names(split, part):
    return {case.name for case in split[part]}

def test_trap_10_split_is_disjoint_and_test_cases_do_not_depend_on_the_seed():
    make_data(labelled=12)
    splits = [cps.split_cases(cps.Config(**TINY | {"test": 3.0, "seed": s})) for s in range(6)]
    for split in splits:
        parts = [names(split, p) for p in ("labelled", "unlabelled", "val", "test")]
        assert [len(p) for p in parts] == [2, 12 - 3 - 2 - 2 + 2, 2, 3]
        assert len(set.union(*parts)) == sum(map(len, parts)) == 14
        assert names(split, "test") == names(splits[0], "test")
    assert len({frozenset(names(split, "val")) for split in splits}) > 1

def test_trap_10_checkpoint_is_chosen_on_validation_cases_only():
    """Other labels of the test cases change their scores and nothing else."""
    make_data(labelled=8)
    assert run(out="one", test=2.0) == 0
    for case in cps.split_cases(cps.Config(**TINY | {"test": 2.0}))["test"]:
        write(str(case.label), np.roll(phantom(int(case.name[1:]))[1], 5, axis=0))
    config = cps.Config(**TINY | {"out": "two", "test": 2.0})
    result = cps.train(config)
    assert same_weights("one/best.pt", "two/best.pt")
    assert table_of("one/log.csv") == table_of("two/log.csv")
    dices = [float(row["dice"]) for row in table_of("two/log.csv")]
    assert result["best_dice"] == pytest.approx(max(dices), rel=1e-4) and result["steps"] == 6
    assert {*result["results"]} == names(cps.split_cases(config), "test")
    assert os.path.samefile(result["checkpoint"], "two/best.pt")

def test_trap_08_labels_of_unlabelled_cases_are_never_read():
    make_data()
    assert run(out="one", cache="cache1") == 0
    lost = names(cps.split_cases(cps.Config(**TINY)), "unlabelled") - {"u6", "u7"}
    assert len(lost) == 2
    for name in lost:
        with open(f"data/labelsTr/{name}.nii.gz", "wb") as file:
            file.write(b"garbage")
    assert run(out="two", cache="cache2") == 0
    assert same_weights("one/last.pt", "two/last.pt") and same_weights("one/best.pt", "two/best.pt")
    assert run(out="three", seed=1, labelled=2, unlabelled=()) in (0, 2)  # other cases are lost

def test_trap_09_methods_differ_in_nothing_but_the_unlabelled_part(monkeypatch):
    make_data()
    steps, windows, sliding = [], [], cps.sliding_window
    handle = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    monkeypatch.setattr(cps, "sliding_window", lambda nets, *rest, **more: windows.append(
        len(nets)) or sliding(nets, *rest, **more))
    seen = {}
    for method in ("supervised", "cps", "context"):
        with monkeypatch.context() as patch:
            batches = spy(patch)
            steps.clear()
            assert run(method=method, out=method) == 0
        assert len(batches) == 6 and len(steps) == 12  # two networks, also when supervised
        seen[method] = [(b["tensors"][0][:2], b["tensors"][1][:2], b["tensors"][2]) for b in batches]
        crops = [b["tensors"][0][2:] for b in batches]
        assert all(len(crop) == 2 * (method != "supervised") for crop in crops)
        whole = [tuple(s) == (slice(0, 8),) * 3 for b in batches for pair in b["overlaps"] for s in pair]
        assert all(whole) if method != "context" else not any(whole)  # cps: equal crops
    handle.remove()
    assert {*windows} == {2}  # and the ensemble of both is what is judged, always
    for one, two, three in zip(*seen.values()):
        assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(one, two, three))
        assert torch.equal(one[0], one[1])  # A and B see the same labelled patches

def test_trap_11_clip_comes_before_the_z_score():
    make_data(shape=PATCH)
    for i in range(6):  # an implant
        image, _ = phantom(i, PATCH)
        image[0, 0, 0], image[1, 1, 1] = 30000, -30000
        write(f"data/imagesTr/c{i}.nii.gz", image)
    data = patches(intensity=0.0, spatial=0.0)
    for step_ in range(4):
        batch = data[step_]
        for name, got in zip(batch["names"][::2], batch["tensors"][0]):
            image = np.clip(np.float64(nib.load(f"data/imagesTr/{name}.nii.gz").dataobj), -68, 200)
            want = (image - image.mean()) / image.std()
            assert np.allclose(got[0], want, atol=5e-3)  # the cache is float16

def test_trap_11_label_ids_are_never_averaged():
    """1 and 5 side by side: linear interpolation would make 2, 3 and 4 between them."""
    make_data()
    for i in range(6):
        label = np.ones(SHAPE, np.uint8)
        label[7:] = 5
        write(f"data/labelsTr/c{i}.nii.gz", label)
    data = patches(spacing=(0.7, 1.3, 2.1), spatial=1.0)
    found = torch.cat([data[i]["tensors"][2].flatten() for i in range(8)]).unique()
    assert {*found.tolist()} in ({1, 2}, {-1, 1, 2})

@pytest.mark.parametrize("spatial", [0.0, 1.0])
def test_trap_13_no_left_right_mirroring_unless_asked_for(spatial):
    make_data()
    for i, kind in enumerate("cccccc" "uu"):  # brighter and brighter to the right
        ramp = np.broadcast_to(np.arange(16, dtype=np.int16)[:, None, None] * 10, SHAPE)
        write(f"data/images{'Tr' if kind == 'c' else 'Un'}/{kind}{i}.nii.gz", ramp)
    assert cps.Config().mirror == ""
    rising = {}
    for mirror in ("", "yz", "x"):
        data = patches(mirror=mirror, intensity=0.0, spatial=spatial)
        images = torch.cat([data[i]["tensors"][k] for i in range(6) for k in (0, 1)])[:, 0]
        inner = images[:, 2:6, 2:6, 2:6].diff(dim=1).mean((1, 2, 3))
        rising[mirror] = (inner > 0).float().mean().item()
    assert rising[""] == rising["yz"] == 1 and 0.2 < rising["x"] < 0.8

@pytest.mark.parametrize("shape", [SHAPE, (16, 6, 5)])
def test_trap_03_and_05_pairs_are_cut_after_mirroring_and_padding_is_never_valid(shape):
    make_data(shape=shape)
    data, moved = patches(intensity=0.0, spatial=0.5, mirror="xyz"), 0
    for i in range(12):
        batch = data[i]
        a, b, target, valid = batch["tensors"]
        assert a.shape == b.shape == (4, 1, *PATCH) and a.dtype == b.dtype == torch.float32
        assert target.shape == valid.shape == (2, *PATCH)
        assert target.dtype == torch.int64 and valid.dtype == torch.bool
        for k, (one, two) in enumerate(batch["overlaps"], 2):
            assert torch.equal(a[k, 0][one], b[k, 0][two])
            assert (a[k, 0][valid[k - 2]] != 0).float().mean() > 0.99  # outside there is only 0
            moved += one != two
        for image, inside in ((a[:2, 0], target >= 0), (a[2:, 0], valid)):
            assert (image[inside] != 0).float().mean() > 0.99
            if shape != SHAPE:
                assert not inside.all()
    assert moved > 12
    plain = patches(intensity=0.0, spatial=0.0)[1]["tensors"]
    inside = np.prod(np.minimum(shape, PATCH))
    assert all((t >= 0).sum() == inside for t in plain[2])
    assert all(v.sum() == inside for v in plain[3])

def test_any_step_can_be_rebuilt_and_ranks_share_a_batch():
    make_data()
    flags = {"spatial": 0.5, "mirror": "yz"}
    whole, again = patches(**flags), patches(**flags)
    ranks = [patches(rank, batch=1, **flags) for rank in (0, 1)]
    different = set()
    for i in (5, 0, 3):
        one, two = whole[i], again[i]
        assert all(map(torch.equal, one["tensors"], two["tensors"]))
        assert one["overlaps"] == two["overlaps"] and one["names"] == two["names"]
        parts = [rank[i] for rank in ranks]
        assert one["overlaps"] == parts[0]["overlaps"] + parts[1]["overlaps"]
        for k in (0, 1):  # labelled patches first, then crops
            order = [p["tensors"][k][j] for j in (0, 1) for p in parts]
            assert torch.equal(one["tensors"][k], torch.stack(order))
        for k in (2, 3):
            assert torch.equal(one["tensors"][k], torch.cat([p["tensors"][k] for p in parts]))
        different.add(one["tensors"][0].sum().item())
    assert len(different) == 3

def test_augment_changes_the_look_only_and_chance_0_nothing():
    rng = np.random.default_rng(0)
    patch = rng.standard_normal(PATCH).astype(np.float32)
    before, changed = patch.copy(), 0
    for _ in range(30):
        new = cps.augment(patch, rng, 1.0)
        assert new.shape == PATCH and new.dtype == np.float32 and np.isfinite(new).all()
        assert np.corrcoef(new.ravel(), patch.ravel())[0, 1] > 0.2
        changed += not np.array_equal(new, patch)
        assert np.array_equal(cps.augment(patch, rng, 0.0), patch)
    assert np.array_equal(patch, before) and 10 < changed < 30

# Training -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("i, pseudo_loss", [(2, "dice_ce"), (3, "ce")])
def test_train_step_is_the_formula(i, pseudo_loss):
    """On padded volumes, in both roles (even and odd steps): losses, agreement and new weights."""
    make_data(shape=(16, 6, 14))
    data = patches(pseudo_loss=pseudo_loss, grad_clip=0.3, intensity=0.0)
    batch, nets, plain = data[i], networks(), networks()
    got = step(nets, batch, data.config, lam=0.7)()
    (*images, target, valid), sup, cross, agree = batch["tensors"], 0, 0, 0
    outs = [net(image) for net, image in zip(plain, images)]
    for k, slices in enumerate(batch["overlaps"]):
        a, b = (out[2 + k][(slice(None), *s)][None] for out, s in zip(outs, slices))
        seen, la, lb = valid[k][slices[0]][None], a.argmax(1), b.argmax(1)
        for out, label in ((a, lb), (b, la)):
            label = label.masked_fill(~seen, -1)
            cross = cross + plain_loss(out, label, pseudo_loss == "dice_ce") / 2
        agree += (la == lb).float().mean().item() / 2
    sup = sum(plain_loss(out[:2], target) for out in outs)
    assert got[:2] == pytest.approx([sup.item(), cross.item()], rel=1e-4)
    assert 0 < got[2] < 1 and 0 <= got[3] <= 1
    (sup + 0.7 * cross).backward()
    for net, learned in zip(plain, nets):
        nn.utils.clip_grad_norm_(net.parameters(), 0.3)
        torch.optim.SGD(net.parameters(), 0.05, 0.9, nesterov=True).step()
        for p, q in zip(net.parameters(), learned.parameters()):
            assert torch.allclose(p, q, atol=1e-5)

def test_trap_03_networks_that_see_single_voxels_agree_fully_on_the_overlap():
    make_data()
    data, net = patches(intensity=0.0, spatial=0.5, mirror="xyz"), nn.Conv3d(1, 3, 1)
    for i in range(4):
        assert step([net, net], data[i], data.config)()[2] == 1

def test_one_batch_can_be_learned_by_heart():
    make_data()
    data, nets = patches(method="supervised", intensity=0.0, spatial=0.0), networks()
    one = step(nets, data[1], data.config)
    losses = [one()[0] for _ in range(60)]
    assert losses[-1] < 0.2 * losses[0]
    images, _, target, _ = data[1]["tensors"]
    for net in nets:
        assert (cps.pseudo_label(net(images)) == target).float().mean() > 0.95

def test_same_seed_same_weights():
    make_data()
    assert run(out="one") == run(out="two") == run(out="three", seed=1) == 0
    assert same_weights("one/last.pt", "two/last.pt")
    assert not same_weights("one/last.pt", "three/last.pt")

@pytest.mark.parametrize("how", ["interrupt", "crash"])
def test_resumed_run_is_the_uninterrupted_one(how, monkeypatch, capsys):
    """Ctrl-C saves the step; after a crash the checkpoint of the last epoch is where it goes on."""
    make_data()
    assert run(out="whole", epochs=3) == 0

    def stop(i, batch):
        if i == 4:
            if how == "crash":
                raise RuntimeError("power cut")
            os.kill(os.getpid(), signal.SIGINT)
    with monkeypatch.context() as patch:
        spy(patch, stop)
        if how == "crash":
            with pytest.raises(RuntimeError, match="power cut"):
                run(epochs=3)
        else:
            assert run(epochs=3) == 130
    capsys.readouterr()
    assert run(epochs=3) == 2 and "--resume" in capsys.readouterr().err  # the folder is in use
    batches = spy(monkeypatch)
    assert run("--resume", epochs=3) == 0
    assert len(batches) == 9 - (5 if how == "interrupt" else 3)
    for name in ("last.pt", "best.pt"):
        assert same_weights(f"whole/{name}", f"run/{name}")
    assert table_of("whole/log.csv") == table_of("run/log.csv")
    assert run("--resume", epochs=3, lr=0.01) == 2  # not the run that was begun
    assert "0.01" in capsys.readouterr().err

def test_paper_preset_is_the_paper(monkeypatch, capsys):
    want = {"patch": (160, 160, 96), "clip": (-68, 200), "batch": 2, "momentum": 0.99, "lr": 0.01,
            "halve_epochs": 200, "epochs": 1000, "epoch_steps": 250, "init_b": "he",
            "pseudo_loss": "dice_ce", "method": "context", "mirror": ""}
    make_data()

    def stop(*_):
        raise cps.UserError("built no network")
    monkeypatch.setattr(cps, "make_pair", stop)
    assert cps.main(["train", "data", "--device", "cpu"]) == 2
    printed = capsys.readouterr().out
    for key, value in want.items():
        assert vars(cps.Config())[key] == value
        assert f"{key}={vars(cps.Config())[key]}" in printed

# Whole runs ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data and two trained runs: `native`, and `fine` with resampled slices."""
    root = tmp_path_factory.mktemp("trained")
    make_data(f"{root}/data")
    flags = {"data": f"{root}/data", "cache": f"{root}/cache", "epochs": 4, "epoch_steps": 15,
             "batch": 2, "lam": 0.5, "base_channels": 6, "val": 2.0, "test": 1.0}
    assert run(out=f"{root}/native", **flags) == 0
    assert run(out=f"{root}/fine", spacing=(1.0, 2.0, 2.0), **flags) == 0
    return root

def test_trap_15_train_predict_evaluate_give_one_dice_of_whole_volumes(trained, capsys):
    native = f"{trained}/native"
    assert {"best.pt", "last.pt", "config.json", "split.json", "log.csv", "cps.py"} <= {
        *os.listdir(native)}
    best = max(float(row["dice"]) for row in table_of(f"{native}/log.csv"))
    assert best > 0.6
    assert cps.main(["predict", f"{native}/best.pt", f"{trained}/data/imagesTr", "out"]) == 0
    assert cps.main(["evaluate", "out", f"{trained}/data/labelsTr", "--csv", "scores.csv"]) == 0
    assert "mean" in capsys.readouterr().out
    scores = {(row["case"], int(row["label"])): float(row["dice"]) for row in table_of("scores.csv")}
    assert len(scores) == 6 * 2
    state = torch.load(f"{native}/last.pt", weights_only=True)  # resumed at its end: only reports
    result = cps.train(cps.Config(**state["config"] | {"resume": True}))
    (case, found), = result["results"].items()
    assert {label: pytest.approx(scores[case, label], abs=1e-3) for label in IDS} == {
        label: dice for label, (dice, _) in found.items()}

def turned(volume, axes, affine):
    """A NIfTI image of a RAS+ volume, stored along other axes; with codes of its own."""
    to = nib.orientations.axcodes2ornt(axes)
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), to)
    scan = nib.Nifti1Image(volume, affine).as_reoriented(turn)
    scan.set_qform(scan.affine, 1)
    scan.set_sform(scan.affine, 2)
    scan.header.set_xyzt_units("mm", "sec")
    return scan

@pytest.mark.parametrize("which", ["native", "fine"])
def test_trap_12_orientation_does_not_matter_and_geometry_is_kept(trained, which):
    (image, label), turns = phantom(50), []
    sine, cosine = np.sin(0.1), np.cos(0.1)  # an oblique scan
    affine = np.diag((0.0, 0.0, 0.0, 1.0))
    affine[:3, :3] = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]]) * MM
    affine[:3, 3] = (-20, 30, 7)
    os.makedirs("scans")
    for axes in ("RAS", "LPS", "PIR"):
        nib.save(turned(image, axes, affine), f"scans/{axes}.nii.gz")
    assert cps.main(["predict", f"{trained}/{which}/best.pt", "scans", "out"]) == 0
    for axes in ("RAS", "LPS", "PIR"):
        scan, found = nib.load(f"scans/{axes}.nii.gz"), nib.load(f"out/{axes}.nii.gz")
        assert found.shape == scan.shape and np.array_equal(found.affine, scan.affine)
        for field in ("pixdim", "qform_code", "sform_code", "xyzt_units", "srow_x", "quatern_b"):
            assert np.array_equal(found.header[field], scan.header[field])
        assert found.get_data_dtype() == np.uint8
        turns.append(np.asarray(nib.as_closest_canonical(found).dataobj))
    assert np.array_equal(turns[0], turns[1]) and np.array_equal(turns[0], turns[2])
    for i in IDS:  # and the left one is at the left
        assert cps.dice(turns[0] == i, label == i) > 0.5

def test_trap_12_scores_do_not_depend_on_how_scans_are_stored():
    ref = phantom(0)[1]
    pred = np.roll(ref, (1, 1, 1), (0, 1, 2))
    for axes in ("RAS", "PIR"):
        for folder, volume in (("ref", ref), ("pred", pred)):
            os.makedirs(f"{folder}{axes}")
            nib.save(turned(volume, axes, np.diag((*MM, 1))), f"{folder}{axes}/c.nii.gz")
        assert cps.main(["evaluate", f"pred{axes}", f"ref{axes}", "--csv", f"{axes}.csv"]) == 0
    got, again = table_of("RAS.csv"), table_of("PIR.csv")
    assert [row["label"] for row in got] == ["1", "5"]
    for row, other in zip(got, again):
        i = int(row["label"])
        want = [cps.dice(pred == i, ref == i), plain_surface_dice(pred == i, ref == i, MM, 2.0)]
        assert 0 < want[1] < 1
        for scores in (row, other):
            assert [float(scores["dice"]), float(scores["nsd"])] == pytest.approx(want)

def test_trap_11_metal_has_no_say_in_a_prediction(trained):
    """All values above the clip are one and the same, however large."""
    for name, hu in (("bone", 300), ("metal", 30000)):
        image, _ = phantom(51)
        image[3:5, 3:5, 3:5] = hu
        write(f"scans/{name}.nii.gz", image)
    assert cps.main(["predict", f"{trained}/native/best.pt", "scans", "out"]) == 0
    bone, metal = (np.asarray(nib.load(f"out/{n}.nii.gz").dataobj) for n in ("bone", "metal"))
    assert np.array_equal(bone, metal) and bone.any()

def test_predict_does_the_others_when_one_is_bad(trained, capsys):
    write("scans/good_0000.nii.gz", phantom(1)[0])
    write("scans/bad.nii.gz", np.full(SHAPE, np.nan, np.float32))
    assert cps.main(["predict", f"{trained}/native/best.pt", "scans", "out"]) == 1
    assert os.listdir("out") == ["good.nii.gz"]
    assert "bad.nii.gz" in capsys.readouterr().err

def test_a_missing_prediction_counts_as_empty(capsys):
    for i in range(2):
        write(f"ref/c{i}.nii.gz", phantom(i)[1])
    write("pred/c0.nii.gz", phantom(0)[1])
    assert cps.main(["evaluate", "pred", "ref", "--csv", "scores.csv"]) == 0
    assert [float(row["dice"]) for row in table_of("scores.csv")] == [1, 1, 0, 0]
    assert "c1" in capsys.readouterr().err

def test_default_command_needs_no_data(capsys):
    assert cps.main(["train", *words(
        out="run", base_channels=2, levels=2, epochs=1, epoch_steps=1, val=1.0, patch=PATCH)]) == 0
    assert cps.main(["predict", "run/best.pt", "runs/phantom/imagesTs", "out"]) == 0
    assert cps.main(["evaluate", "out", "runs/phantom/labelsTs"]) == 0

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
def test_trap_14_training_on_a_gpu_with_mixed_precision(amp):
    make_data()
    assert run(device="cuda", amp=amp, workers=1) == 0
    rows = table_of("run/log.csv")
    assert len(rows) == 2 and all(np.isfinite(float(row["loss_cps"])) for row in rows)

# Inference ----------------------------------------------------------------------------------------
WINDOWS = [((20, 9, 10), (8, 8, 8), 0.5, ((),)), ((9, 21, 8), (8, 8, 8), 0.25, ((), (2,), (3, 4))),
           ((9, 6, 20), (8, 4, 8), 0.0, ((),)), ((5, 12, 3), (8, 8, 4), 0.5, ((), (4,))),
           ((13, 11, 17), (4, 6, 8), 0.7, ((),)), ((8, 8, 8), (8, 8, 8), 0.5, ((),)),
           ((3, 2, 4), (8, 8, 8), 0.5, ((),)), ((10, 19, 23), (8, 4, 4), 0.6, ((),))]

@pytest.mark.parametrize("shape, patch, overlap, flips", WINDOWS)
def test_trap_14_sliding_window_is_the_plain_one(shape, patch, overlap, flips):
    nets = networks(2, 4, seed=1)
    volume = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    with torch.no_grad():
        total = plain_windows(nets, volume.astype(np.float32), patch, 4, overlap, flips)
    best = (total / total.sum(0)).topk(2, dim=0).values
    clear = (best[0] - best[1] > 1e-5).numpy()  # where rounding does not decide
    got = cps.sliding_window(nets, volume, patch, 4, overlap=overlap, flips=flips)
    assert got.dtype == np.uint8 and got.shape == shape and clear.mean() > 0.95
    assert np.array_equal(got[clear], total.argmax(0).numpy()[clear])

@pytest.mark.parametrize("shape, patch, overlap, flips", WINDOWS)
def test_trap_14_sliding_window_of_the_identity_is_the_volume(shape, patch, overlap, flips):
    def identity(x):  # of half precision, as under autocast
        return -30 * (x - torch.arange(5).view(1, 5, 1, 1, 1)).abs().half()
    volume = np.random.default_rng(0).integers(0, 5, shape)
    got = cps.sliding_window([identity], volume.astype(np.float32), patch, 5, overlap, flips=flips)
    assert np.array_equal(got, volume)

def test_largest_components_are_those_of_the_whole_volume():
    labels = np.random.default_rng(0).integers(0, 4, (12, 11, 10)).astype(np.uint8)
    want = np.zeros_like(labels)
    for i in (1, 2, 3):
        parts, n = ndimage.label(labels == i)
        sizes = [(parts == k).sum() for k in range(1, n + 1)]
        assert n > 1
        want[parts == 1 + np.argmax(sizes)] = i
    assert np.array_equal(cps.largest_components(labels), want)
    assert not cps.largest_components(np.zeros_like(labels)).any()

# Evaluation ---------------------------------------------------------------------------------------
def test_table_of_areas_has_the_closed_forms():
    s = np.array((0.7, 1.3, 2.9))
    assert plain_area(15, s) == pytest.approx(s[1] * s[2])  # a face across the first axis
    assert plain_area(51, s) == pytest.approx(s[0] * s[2])
    assert plain_area(85, s) == pytest.approx(s[0] * s[1])
    assert plain_area(3, s) == pytest.approx(s[2] * np.hypot(s[0], s[1]) / 2)  # an edge, cut off
    assert plain_area(60, s) == pytest.approx(s[2] * np.hypot(s[0], s[1]))  # two such edges
    sides = np.diag(s / 2)  # a corner, cut off: the triangle of the middles of three edges
    triangle = np.linalg.norm(np.cross(sides[1] - sides[0], sides[2] - sides[0])) / 2
    assert plain_area(1, s) == pytest.approx(triangle)
    areas = [plain_area(code, s) for code in range(256)]
    assert areas == pytest.approx(areas[::-1]) and min(areas[1:-1]) > 0 == areas[0]

def test_trap_15_surface_dice_is_that_of_all_points_and_all_distances():
    rng, values = np.random.default_rng(0), set()
    for i in range(24):
        shape = rng.integers(2, 7, 3)
        smooth = [ndimage.gaussian_filter(rng.standard_normal(shape), i % 3 * 0.4) for _ in "pr"]
        pred, ref = (s > np.quantile(s, 0.6) for s in smooth)
        spacing, tolerance = tuple(rng.uniform(0.5, 4, 3)), rng.uniform(0.1, 4)
        got = cps.surface_dice(pred, ref, spacing, tolerance)
        assert abs(got - plain_surface_dice(pred, ref, spacing, tolerance)) < 1e-9
        assert cps.surface_dice(ref, pred, spacing, tolerance) == pytest.approx(got)
        wide = [np.pad(m, 3) for m in (pred, ref)]
        assert cps.surface_dice(*wide, spacing, tolerance) == pytest.approx(got, abs=1e-12)
        values.add(round(got, 6))
    assert len(values) > 12

def test_surface_dice_of_all_codes():
    """Each of the 254 codes takes part: a mask of one 2x2x2 cube against a far voxel."""
    spacing = (0.7, 1.3, 2.9)
    for code in range(1, 256):
        pred, ref = np.zeros((2, 2, 9), bool), np.zeros((2, 2, 9), bool)
        pred[:, :, :2].flat = [(0 < code & (128 >> i)) for i in range(8)]
        ref[0, 0, 8] = ref[0, 0, 0] = True
        got = cps.surface_dice(pred, ref, spacing, 1.0)
        assert abs(got - plain_surface_dice(pred, ref, spacing, 1.0)) < 1e-9

def test_trap_15_empty_masks_and_hand_made_cubes():
    none, cube = np.zeros((9, 9, 9), bool), np.zeros((9, 9, 9), bool)
    cube[2:6, 2:6, 2:6] = True
    moved = np.roll(cube, 1, axis=2)
    assert cps.dice(none, none) == 1 and cps.dice(none, cube) == cps.dice(cube, none) == 0
    assert cps.dice(cube, cube) == 1 and cps.dice(cube, moved) == 0.75
    for flare22 in (False, True):
        both = [cps.evaluate_case(1 * a, 1 * b, MM, [1], [2.0], flare22)[1]
                for a, b in ((none, none), (none, cube), (cube, none), (cube, cube))]
        assert both == [(1, 1), (0, 0), (0, 0), (1, 1)]
    assert cps.surface_dice(none, none, MM, 1) == 1
    assert cps.surface_dice(none, cube, MM, 1) == cps.surface_dice(cube, none, MM, 1) == 0
    assert cps.surface_dice(cube, moved, MM, 3.0) == 1 > cps.surface_dice(cube, moved, MM, 2.9) > 0

def test_trap_15_dice_has_no_part_for_the_background():
    ref = np.zeros(SHAPE, np.uint8)
    ref[:2] = 1
    found = cps.evaluate_case(np.roll(ref, 2, 0), ref, MM, [1], [1.0])
    assert found == {1: (0.0, pytest.approx(0, abs=0.9))}

def flare(pred, ref, label, flare22=True, tolerance=1.0):
    return cps.evaluate_case(np.int64(pred) * label, np.int64(ref) * label, MM, [label],
                             {label: tolerance}, flare22)[label]

def test_flare22_rules():
    ref = np.zeros((12, 12, 12), bool)
    ref[3:9, 3:9, 2:7] = True
    long, slid = ref.copy(), np.roll(ref, 5, axis=0)
    long[3:9, 3:9, :] = True
    long[3:9, 3:9, 6] = False  # wrong above, below and on the reference's last slice
    for label in (5, 6, 10):
        assert flare(long, ref, label) == (1, 1) > flare(long, ref, label, flare22=False)
        cut = [m[:, :, 2:6] for m in (np.roll(ref, 1, axis=0), ref)]  # cut faces are surface
        want = [cps.dice(*cut), cps.surface_dice(*cut, MM, 0.5)]
        got = flare(np.roll(ref, 1, axis=0), ref, label, tolerance=0.5)
        assert got == tuple(round(w, 4) for w in want) and got[1] != round(
            cps.surface_dice(np.roll(ref, 1, axis=0), ref, MM, 0.5), 4)
        one = ref & (np.arange(12) == 4)  # official code: crash; that slice counts
        assert flare(one, one, label) == flare(ref, one, label) == (1, 1)
        assert flare(np.roll(ref, 5, axis=2) & ~ref, ref, label) == (0, 0)  # none where it counts
    assert flare(long, ref, 1)[0] == round(cps.dice(long, ref), 4) != 1
    assert cps.dice(slid, ref) < 0.2 and flare(slid, ref, 1)[1] == 0 < flare(slid, ref, 1, False)[1]
    assert flare(np.roll(ref, 1, axis=0), ref, 1)[0] == 0.8333

def test_flare22_tolerances():
    """13 bars, found too far along x by the tolerance (all is near) or by 1 mm more (not all)."""
    table = dict(zip(range(1, 14), (5, 3, 3, 5, 2, 2, 2, 2, 2, 3, 5, 7, 3)))
    for name, more in (("ref", None), ("near", 0), ("far", 1)):
        volume = np.zeros((36, 52, 4), np.uint8)
        for i, tolerance in table.items():
            x = 0 if more is None else tolerance + more
            volume[x:x + 24, 4 * i - 4:4 * i - 1, :] = i
        write(f"{name}/c.nii.gz", volume, np.eye(4))
    for name in ("near", "far"):
        assert cps.main(["evaluate", name, "ref", "--flare22", "--csv", f"{name}.csv"]) == 0
        nsd = [float(row["nsd"]) for row in table_of(f"{name}.csv")]
        assert len(nsd) == 13 and all((s == 1) == (name == "near") and s > 0.5 for s in nsd)

# Bad input ----------------------------------------------------------------------------------------
class Evil:
    """Unpickled, it makes a folder."""
    def __reduce__(self):
        return os.mkdir, ("owned",)

def make_bad_files():
    image, label = phantom(0)
    os.makedirs("bad")
    for name, content in (("text.nii.gz", b"no scan"), ("empty.nii", b""), ("model.pt", b"none"),
                          ("evil.pt", pickle.dumps(Evil()))):
        with open(f"bad/{name}", "wb") as file:
            file.write(content)
    torch.save({"config": Evil()}, "bad/evil2.pt")
    write("bad/cut.nii.gz", image)
    os.truncate("bad/cut.nii.gz", 1000)
    broken = image.astype(np.float32)
    broken[1, 2, 3] = np.nan
    for name, array in (("nan", broken), ("4d", np.stack([image] * 2, 3)), ("2d", image[0]),
                        ("flat", image * 0), ("small", label[1:]), ("half", label * np.float32(.5)),
                        ("minus", -label.astype(np.int16)), ("label", label)):
        write(f"bad/{name}.nii.gz", array)

def predict(name, *more):
    return ["predict", "CHECKPOINT", f"bad/{name}", "out", *more]

BAD = {"command": ([], "COMMAND"), "unknown command": (["dance"], "dance"),
       "train nowhere": (["train", "nowhere"], "nowhere"), "predict nowhere": (predict("x"), "bad/x"),
       "no checkpoint": (["predict", "no.pt", "bad/4d.nii.gz", "out"], "no.pt"),
       "tta": (predict("label.nii.gz", "--tta"), "--tta"),
       "evaluate nothing": (["evaluate", "bad/label.nii.gz", "nowhere"], "nowhere")}
BAD |= {flags: (["train", "data", *flags.split()], flags.split()[0]) for flags in (
    "--nonsense 1", "--batch two", "--batch 0", "--batch -1", "--patch 7 8 8", "--patch 8 8",
    "--patch 0 8 8", "--patch 8 8 8.5", "--clip 200 -68", "--clip 5", "--clip nan 5", "--lr -1",
    "--lr nan", "--lr inf", "--momentum 1.5", "--min-overlap 1", "--method best", "--labelled 99",
    "--mirror q", "--device tpu", "--spacing 1 1 0", "--epochs 0", "--levels 0", "--intensity -1",
    "--base-channels 0", "--unlabelled nowhere")}
BAD |= {name: (predict(name), name) for name in (
    "text.nii.gz", "empty.nii", "cut.nii.gz", "nan.nii.gz", "4d.nii.gz", "2d.nii.gz",
    "flat.nii.gz")}
BAD |= {name: (["predict", f"bad/{name}", "bad/label.nii.gz", "out"], name) for name in (
    "model.pt", "evil.pt", "evil2.pt", "cut.nii.gz")}
BAD |= {f"evaluate {name}": (["evaluate", f"bad/{name}.nii.gz", "bad/label.nii.gz"], name)
        for name in ("small", "half", "minus", "text", "nan")}

@pytest.mark.parametrize("arguments, word", BAD.values(), ids=BAD)
def test_bad_input_gets_one_line_and_exit_code_2(arguments, word, trained, capsys):
    make_bad_files()
    if arguments[:1] == ["train"]:
        make_data()
        arguments = arguments + words(**{k: v for k, v in TINY.items() if k != "data" and
                                         f"--{k.replace('_', '-')}" not in arguments})
    arguments = [a.replace("CHECKPOINT", f"{trained}/native/best.pt") for a in arguments]
    assert cps.main(arguments) == 2
    error, = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and word.strip("-") in error
    assert not os.path.exists("owned") and not os.path.exists("out") and not os.path.exists("run")

@pytest.mark.parametrize("name, part", [("small", "labels"), ("half", "labels"), ("minus", "labels"),
                                        ("nan", "images"), ("4d", "images"), ("text", "images")])
def test_bad_training_case_is_named(name, part, capsys):
    make_data(labelled=3)
    make_bad_files()
    os.replace(f"bad/{name}.nii.gz", f"data/{part}Tr/c1.nii.gz")
    assert run(val=1.0, labelled=2) == 2
    errors = capsys.readouterr().err.splitlines()  # a line for each bad case, and the remedy
    assert f"{part}Tr/c1.nii.gz" in errors[0] and len(errors) == 2
    assert all(line.startswith("error: ") for line in errors) and not os.path.exists("run")
