"""Context-aware cross pseudo supervision (CPS) for semi-supervised 3D medical image segmentation.

Two 3D U-Nets, A and B, have the same structure and different initial weights. They learn from a few
labelled scans and from many without labels. Two overlapping crops are cut out of each unlabelled
volume: A sees one, B sees the other. On the overlap, the prediction of each network becomes the
label (the "pseudo label") from which the other one learns. Both see the same voxels in different
surroundings, so what one network says because of its surroundings alone, the other contradicts.

Paper: P. Liu and G. Zheng, Cross Pseudo Supervision for Semi-supervised Medical Image Segmentation,
FLARE 2022. Plain CPS: X. Chen et al., CVPR 2021. Overlapping crops: X. Lai et al., CVPR 2021.

    python cps.py train                      on synthetic scans, a few minutes on two CPU cores
    python cps.py train DATA --labelled 8    on your own scans, 8 of them with labels
    python cps.py predict CHECKPOINT IMAGES OUT
    python cps.py evaluate PREDICTIONS REFERENCES
    python cps.py ablate DATA                does it help? supervised, plain CPS, context-aware CPS

The loss for labelled patches p with labels t, and for overlapping crops u_a and u_b of a volume:

    L        = L_sup(A) + L_sup(B) + lam * L_cps
    L_sup(A) = l(A(p), t), and L_sup(B) = l(B(p), t)
    L_cps    = l(A(u_a)[o], argmax B(u_b)[o]) + l(B(u_b)[o], argmax A(u_a)[o])

l is the sum of Dice loss and cross-entropy. Dice is 2 |P and Q| / (|P| + |Q|): how well two sets of
voxels agree. [o] crops to the overlap of u_a and u_b. No gradient passes through argmax. The
weight lam grows from almost 0 to 1.

Where the paper is silent, we chose: crops with a random offset on all axes; lam grows over the
first 60 % of the training; A and B are two random draws of the paper's He initialisation; network,
sampling and augmentation follow nnU-Net, without mirroring, because left and right kidney are
different labels; the checkpoint with the best Dice on the validation cases is kept; A predicts.

Shapes: N patches of a batch, K classes (0 is background), X Y Z voxels of a volume, x y z voxels of
a patch or an overlap. Volumes are in RAS+ orientation: x to the right, y to the front, z to the
head. Sources stand in brackets: [paper], [CPS] is Chen et al., [ours]. Sections 1 to 7 are the
method, 8 to 14 make it practical; grep -n '^# [0-9]' cps.py lists them.
"""

# SPDX-License-Identifier: MIT
import argparse
import copy
import csv
import dataclasses
import inspect
import io
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage, spatial
from torch import distributed, nan, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

IGNORE = 255  # label of voxels that are left out of every loss and every score


# 1. Configuration
# --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    """All settings. Each is a flag of the command line, and its comment is the help of the flag."""

    # `supervised` uses no unlabelled scans, `cps` shows A and B one place, `context` two crops.
    method: Literal["supervised", "cps", "context"] = "context"  # how unlabelled scans are used
    lam: float = 1.0  # weight of L_cps after its ramp-up [ours, measured]
    rampup: float = 0.6  # share of the training during which the weight grows [ours, measured]
    init_b: Literal["he", "xavier"] = "he"  # initialisation of B; that of A is always he [paper]
    seed: int = 0  # seed of initial weights, split and patches

    # patches
    patch: tuple[int, ...] = (160, 160, 96)  # x y z in voxels [paper]
    batch: int = 2  # labelled patches in a step, and as many pairs of crops [paper]
    min_overlap: float = 0.3  # smallest overlap of a pair, as a share of a crop [ours, measured]
    augment: bool = True  # random intensities, rotation and scale [nnU-Net]

    # network
    base_channels: int = 32  # at full resolution, doubled at each lower one, at most 320 [nnU-Net]
    levels: int = 5  # number of resolutions; 2^(levels - 1) must divide the patch [ours]

    # schedule
    epochs: int = 1000  # number of epochs; each is a row of the log [paper]
    epoch_steps: int = 250  # optimiser steps in an epoch [nnU-Net; fits the paper's training time]
    lr: float = 0.01  # learning rate of SGD with Nesterov momentum [paper]
    momentum: float = 0.99  # momentum of SGD [paper]
    halve_epochs: int = 200  # the learning rate is halved every so many epochs [paper]
    weight_decay: float = 3e-5  # weight decay of SGD [nnU-Net]
    grad_clip: float = 12.0  # largest gradient norm of each network; inf: no limit [nnU-Net]
    validate_epochs: int = 10  # epochs from one validation to the next [ours]

    # data
    data: str = ""  # folder with imagesTr, labelsTr, ... (see README); without it: synthetic scans
    unlabelled: tuple[str, ...] = ()  # further folders of unlabelled images
    labelled: int = 0  # number of training cases that keep their labels; 0: all
    val: float = 0.2  # cases that choose the checkpoint: a share if below 1, else a number [ours]
    test: float = 0.0  # cases for the test, likewise; 0: those of imagesTs and labelsTs
    split: str = ""  # JSON file that names all cases of each part, like split.json of a run
    clip: tuple[float, ...] = (-68.0, 200.0)  # limits in HU [paper]; auto: percentiles 0.5, 99.5
    spacing: tuple[float, ...] = ()  # x y z in mm to resample to; (), auto: median [nnU-Net]
    largest: tuple[int, ...] = ()  # labels of which predictions keep the largest component

    # machine
    preset: Literal["paper", "quick"] = "paper"  # without it: paper for data on a GPU, else quick
    out: str = ""  # folder of the run; default: runs/DATA-METHOD
    cache: str = "runs/.cache"  # folder of the preprocessed scans; may be deleted between runs
    resume: bool = False  # continue the run in --out after its last whole epoch
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: a GPU if there is one
    amp: bool = True  # mixed precision on a GPU
    workers: int = 8  # processes that load patches for a GPU


PRESETS = {
    "paper": {},  # the defaults above
    "quick": {  # a few minutes on a CPU [measured]
        "patch": (32, 32, 32),
        "base_channels": 8,
        "levels": 4,
        "epochs": 30,
        "epoch_steps": 20,
        "halve_epochs": 12,
        "lr": 0.2,
        "momentum": 0.9,
        "validate_epochs": 6,
    },
}


# 2. Losses
# --------------------------------------------------------------------------------------------------
def dice_ce_loss(logits, target):
    """Sum of soft Dice loss and cross-entropy, for labels and pseudo labels alike [paper, nnU-Net].

    logits: (N, K, x, y, z). target: int64 (N, x, y, z), classes 0 to K-1 or IGNORE. Returns a
    scalar, 0 if all voxels are ignored.
    """
    target = target.flatten(1)[:, None]  # (N, 1, V), V voxels of a patch
    valid = target != IGNORE  # (N, 1, V)
    # Ignored voxels become background: `valid` masks them below, and Dice leaves background out.
    target = target.masked_fill(~valid, 0)
    log_prob = logits.flatten(2).float().log_softmax(1)  # (N, K, V), never in half precision

    # Cross-entropy: the mean over the valid voxels of each patch.
    nll = -log_prob.gather(1, target) * valid  # (N, 1, V)
    cross_entropy = nll.sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)  # (N,)

    # Soft Dice: for each patch and each class except background.
    prob = log_prob.exp() * valid  # (N, K, V)
    one_hot = torch.zeros_like(prob).scatter_(1, target, 1.0)
    prob = prob[:, 1:]  # (N, K-1, V)
    one_hot = one_hot[:, 1:]
    common = (prob * one_hot).sum(2)  # (N, K-1)
    size = prob.sum(2) + one_hot.sum(2)
    dice = (2 * common + 1e-5) / (size + 1e-5)  # 1, not 0 / 0, if both are empty
    dice_loss = 1 - dice.mean(1)  # (N,)

    return (dice_loss + cross_entropy).mean()


def pseudo_label(logits, valid=None):
    """The predicted classes, int64 (N, x, y, z), of logits (N, K, x, y, z), without gradient.

    They are hard labels without a threshold [CPS]. valid: bool (N, x, y, z), False on voxels beyond
    the volume (padding), which become IGNORE: nobody should learn that padding is background.
    """
    label = logits.detach().argmax(dim=1)
    if valid is not None:
        label = label.masked_fill(~valid, IGNORE)
    return label


def cross_pseudo_loss(logits_a, logits_b, valid=None):
    """L_cps: each network learns the pseudo labels of the other, on the voxels that both see.

    logits_a, logits_b: (N, K, x, y, z), cut to the overlap. valid: see `pseudo_label`.
    """
    label_a = pseudo_label(logits_a, valid)
    label_b = pseudo_label(logits_b, valid)
    return dice_ce_loss(logits_a, label_b) + dice_ce_loss(logits_b, label_a)


def ramp_up(progress):
    """A factor of lam that grows from 0.007 to 1 as progress goes from 0 to 1: pseudo labels are
    noise at first, so they must not count much [the usual curve, as in HiLab-git/SSL4MIS]."""
    return math.exp(-5 * (1 - min(progress, 1)) ** 2)


# 3. Overlapping patches
# --------------------------------------------------------------------------------------------------
def overlapping_corners(rng, shape, patch, min_overlap):
    """Draw the corners of two different patches that share at least `min_overlap` of their voxels.

    rng: numpy Generator. shape, patch: voxels on each axis. Returns two int arrays (3,). They are
    equal only if no offset is possible. On an axis where the volume is smaller than the patch, both
    corners are 0, and both patches are padded at the end.
    """
    patch = np.asarray(patch)
    room = np.maximum(shape - patch, 0)  # the largest possible corner
    # The largest offset on each axis: a larger one alone would leave too small an overlap.
    reach = np.minimum(room, patch * (1 - min_overlap)).astype(int)

    # Draw until a pair fits, because the shares of the three axes multiply. This takes about ten
    # draws, and it ends: if reach is above 0 on an axis, an offset of one voxel on this axis alone
    # fits; if it is 0 on all axes, equal corners fit.
    while True:
        corner_a = rng.integers(0, room + 1)
        corner_b = corner_a + rng.integers(-reach, reach + 1)
        inside = np.all((corner_b >= 0) & (corner_b <= room))
        overlap = np.prod(1 - abs(corner_b - corner_a) / patch)
        differ_if_possible = np.any(corner_a != corner_b) or not np.any(reach)
        if inside and differ_if_possible and overlap >= min_overlap:
            return corner_a, corner_b


def overlap_slices(corner_a, corner_b, patch):
    """Slices of the overlap within each patch: both cut out the same voxels of the volume. On one
    axis, with corners 0 and 3 and patches of 10 voxels: 3 to 10 of A, 0 to 7 of B."""
    offset = np.subtract(corner_b, corner_a)
    size = patch - abs(offset)
    slices_a = box_at(np.maximum(offset, 0), size)
    slices_b = box_at(np.maximum(-offset, 0), size)
    return slices_a, slices_b


def box_at(corner, shape):
    """Slices that cut a box out of an array."""
    return tuple(slice(low, low + size) for low, size in zip(corner, shape, strict=True))


class Patches(Dataset):
    """Item n: a labelled patch and, unless the method is `supervised`, a pair of unlabelled crops.

    image: float32 (1, x, y, z). target: int64 (x, y, z), classes or IGNORE. crop_a, crop_b: like
    image. valid: bool (x, y, z), False where crop_a is padded; on the overlap, crop_b is padded at
    the same voxels. corner_a, corner_b: int (3,).

    All randomness of item n comes from (seed, n), and each step has its own items (see `batches`).
    So a resumed run sees the patches that it would have seen without interruption.
    """

    def __init__(self, config, split, ids):
        self.config = config
        self.patch = np.array(config.patch)
        self.split = split  # {"labelled": list of Case, "unlabelled": ...}, see section 8
        # A table from label ids, the numbers in the files, to classes 0, 1, 2, ...
        self.class_of = np.full(256, IGNORE)
        self.class_of[[0, *ids]] = np.arange(len(ids) + 1)

    def __getitem__(self, n):
        rng = np.random.default_rng((self.config.seed, n, 0))
        cases = self.split["labelled"]
        arrays = cases[rng.integers(len(cases))].load()
        corner = self.labelled_corner(arrays, rng, centred=n % 2 == 1)  # every other patch
        [(image, label)] = self.crops(arrays, rng, [corner])
        item = {"image": image[None], "target": self.class_of[label]}
        if self.config.method == "supervised":
            return item

        # The pair has its own generator, so that all methods see the same labelled patches.
        rng = np.random.default_rng((self.config.seed, n, 1))
        cases = self.split["unlabelled"]
        arrays = cases[rng.integers(len(cases))].load()
        shape = arrays["image"].shape
        corner_a, corner_b = overlapping_corners(rng, shape, self.patch, self.config.min_overlap)
        if self.config.method == "cps":
            corner_b = corner_a  # plain CPS: one place for both; only their intensities differ
        # Here, the labels are 0, and IGNORE on padding.
        (crop_a, label_a), (crop_b, _) = self.crops(arrays, rng, [corner_a, corner_b])
        item |= {"crop_a": crop_a[None], "crop_b": crop_b[None], "valid": label_a != IGNORE}
        item |= {"corner_a": corner_a, "corner_b": corner_b}
        return item

    def labelled_corner(self, arrays, rng, centred):
        """Corner of a patch: anywhere, or centred on a voxel of a random label, so that small
        organs are seen often enough [nnU-Net]."""
        room = np.maximum(arrays["image"].shape - self.patch, 0)
        points = arrays["points"]  # random voxels of each label, rows of label id, x, y, z
        if not centred or len(points) == 0:
            return rng.integers(0, room + 1)
        points = points[points[:, 0] == rng.choice(np.unique(points[:, 0]))]
        centre = rng.choice(points)[1:]
        return np.clip(centre - self.patch // 2, 0, room)

    def crops(self, arrays, rng, corners):
        """Cut a patch at each corner. Returns pairs of image float32 and label uint8 (x, y, z).

        The box around all of them is rotated and scaled as a whole. If each crop were turned by
        itself, their overlap would no longer be a box. Intensities do not move voxels, so they are
        changed for each crop separately: A and B shall not agree because of equal noise.

        Images are padded with 0, which is the mean of a volume, and labels with IGNORE.
        """
        low = np.min(corners, axis=0)
        size = np.max(corners, axis=0) + self.patch - low
        image = arrays["image"]
        # An unlabelled volume gets label 0 everywhere: after the cut, IGNORE marks its padding.
        label = arrays.get("label", np.broadcast_to(np.uint8(0), image.shape))
        matrix = None
        if self.config.augment:
            matrix = random_rotation_and_scale(rng, arrays["spacing"])
        image = warp_box(image, low, size, matrix, order=1, padding=0)  # linear interpolation
        label = warp_box(label, low, size, matrix, order=0, padding=IGNORE)  # nearest neighbour

        pairs = []
        for corner in corners:
            box = box_at(corner - low, self.patch)
            patch = image[box].astype(np.float32)
            if self.config.augment:
                patch = change_intensities(patch, rng)
            pairs.append((patch, label[box]))
        return pairs


# 4. Networks
# --------------------------------------------------------------------------------------------------
class Block(nn.Sequential):
    """Twice convolution, instance norm, LeakyReLU [nnU-Net]. The norm makes a bias redundant, and
    does the same in training and inference."""

    def __init__(self, c_in, c_out, stride=1):
        super().__init__(
            nn.Conv3d(c_in, c_out, 3, stride, padding=1, bias=False),
            nn.InstanceNorm3d(c_out, affine=True),
            nn.LeakyReLU(0.01, inplace=True),
            nn.Conv3d(c_out, c_out, 3, padding=1, bias=False),
            nn.InstanceNorm3d(c_out, affine=True),
            nn.LeakyReLU(0.01, inplace=True),
        )


class UNet3D(nn.Module):
    """3D U-Net with the blocks of nnU-Net: (N, 1, x, y, z) to logits (N, K, x, y, z), with x, y, z
    divisible by 2^(levels - 1)."""

    def __init__(self, num_classes, base_channels, levels, in_channels=1):
        super().__init__()
        channels = [min(base_channels * 2**level, 320) for level in range(levels)]

        self.down = nn.ModuleList([Block(in_channels, channels[0])])
        for finer, coarser in itertools.pairwise(channels):
            self.down.append(Block(finer, coarser, stride=2))

        self.up = nn.ModuleList()
        self.merge = nn.ModuleList()
        for coarser, finer in itertools.pairwise(reversed(channels)):
            self.up.append(nn.ConvTranspose3d(coarser, finer, 2, stride=2))
            self.merge.append(Block(2 * finer, finer))

        self.head = nn.Conv3d(channels[0], num_classes, 1)

    def forward(self, x):
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)

        skips.pop()  # the coarsest level is x itself
        for up, merge in zip(self.up, self.merge):
            x = up(x)
            x = torch.cat((x, skips.pop()), dim=1)
            x = merge(x)

        return self.head(x)


def make_pair(config, num_classes):
    """Networks A and B. Equal ones would make, and confirm, the same mistakes."""
    draws = {"he": nn.init.kaiming_normal_, "xavier": nn.init.xavier_normal_}
    networks = []
    for number, init in enumerate(("he", config.init_b)):
        torch.manual_seed(2 * config.seed + number)  # networks of other runs have other seeds, too
        network = UNet3D(num_classes, config.base_channels, config.levels)
        for name, parameter in network.named_parameters():
            if parameter.ndim == 5:  # the kernel of a convolution
                draws[init](parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        networks.append(network)
    return networks


# 5. Training
# --------------------------------------------------------------------------------------------------
def train_step(run, batch, lam):
    """One optimiser step of A and B. run: networks, optimisers, settings; see section 12. batch: of
    `Patches`. Returns {name: scalar} for the log."""
    network_a, network_b = run.networks
    images_a = images_b = batch["image"]  # (N, 1, x, y, z)
    has_pairs = "crop_a" in batch
    if has_pairs:  # one forward pass for all, because the instance norm treats each image by itself
        images_a = torch.cat((images_a, batch["crop_a"]))  # (2N, 1, x, y, z)
        images_b = torch.cat((images_b, batch["crop_b"]))
    with run.autocast:
        logits_a = network_a(images_a)  # (2N, K, x, y, z), or (N, ...) without pairs
        logits_b = network_b(images_b)

    # Both networks learn from the labels.
    target = batch["target"]  # (N, x, y, z)
    n = len(target)
    loss_sup = dice_ce_loss(logits_a[:n], target) + dice_ce_loss(logits_b[:n], target)
    loss = loss_sup
    values = {"loss_sup": loss_sup}

    # Each network learns from the other on the overlap of their crops.
    if has_pairs:
        values |= overlap_losses(logits_a[n:], logits_b[n:], batch, run.config)
        loss = loss_sup + lam * values["loss_cps"]

    # One backward pass serves both: pseudo labels carry no gradient from one network to the other.
    run.scaler.scale(loss).backward()
    for network, optimiser in zip(run.networks, run.optimisers):
        average_gradients(network)  # over the processes of torchrun, if there are several
        run.scaler.unscale_(optimiser)
        nn.utils.clip_grad_norm_(network.parameters(), run.config.grad_clip)
        run.scaler.step(optimiser)
        optimiser.zero_grad()
    run.scaler.update()
    return {name: value.detach() for name, value in values.items()}


def overlap_losses(logits_a, logits_b, batch, config):
    """L_cps of the pairs of a batch, logits (N, K, x, y, z), and signs of collapse for the log.

    Collapse means that both networks call everything background. L_cps would not bring them back:
    they agree, so it only makes them surer. The labels prevent it, and lam, which starts near 0. If
    it happens, the log shows an agreement of 1 and a foreground of 0.
    """
    rows = []
    for i in range(len(logits_a)):  # one by one, because the overlaps differ in size
        corner_a = batch["corner_a"][i].numpy()
        corner_b = batch["corner_b"][i].numpy()
        slices_a, slices_b = overlap_slices(corner_a, corner_b, config.patch)
        overlap_a = logits_a[i, :, *slices_a][None]  # (1, K, x, y, z)
        overlap_b = logits_b[i, :, *slices_b][None]  # the same voxels
        valid = batch["valid"][i, *slices_a][None]  # (1, x, y, z), for both
        row = {"loss_cps": cross_pseudo_loss(overlap_a, overlap_b, valid)}

        label_a = pseudo_label(overlap_a)
        label_b = pseudo_label(overlap_b)
        count = valid.sum().clamp(min=1)
        row["agreement"] = ((label_a == label_b) & valid).sum() / count
        row["foreground"] = ((label_a > 0) & valid).sum() / count
        row["overlap"] = torch.tensor(valid.numel() / math.prod(config.patch))  # share of a crop
        rows.append(row)
    return {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}


def train(config: Config):
    """Train a pair of networks, or continue a training."""
    run, split = open_run(config)  # networks, optimisers and cases, see section 12
    config = run.config
    sums = defaultdict(float)
    for batch in batches(run, split):
        # Schedule
        epoch = run.step // config.epoch_steps
        lr = config.lr * 0.5 ** (epoch // config.halve_epochs)
        for optimiser in run.optimisers:
            optimiser.param_groups[0]["lr"] = lr
        share_done = run.step / run.total_steps
        lam = config.lam * ramp_up(share_done / config.rampup)

        # Step
        for name, value in train_step(run, batch, lam).items():
            sums[name] += value
        run.step += 1
        if run.step % config.epoch_steps > 0:
            continue

        # At the end of an epoch: evaluate, log, save
        epochs_done = epoch + 1
        means = {name: float(value) / config.epoch_steps for name, value in sums.items()}
        sums.clear()
        due = epochs_done % config.validate_epochs == 0 or epochs_done == config.epochs
        scores = validate(run, split["val"] if due else [])  # (cases, labels)
        run.log({"step": run.step, "lr": lr, "lam": lam, **means}, scores)
        score = mean_dice(scores)  # NaN without cases, and NaN is never larger
        if score > run.best or not split["val"]:  # if no case can choose, keep the latest
            run.best = score
            run.save("best.pt")
        run.save("last.pt")
    return report(run, split)


# 6. Inference
# --------------------------------------------------------------------------------------------------
@torch.inference_mode()
def sliding_window(networks, volume, patch, num_classes, overlap=0.5, device="cpu"):
    """Segment a preprocessed volume, float (X, Y, Z) of any size: classes, uint8 (X, Y, Z).

    Each voxel gets the class of the highest probability, summed over the networks and over all
    windows that cover the voxel, weighted by a Gaussian [nnU-Net]. Sums of K classes for the whole
    volume would take K times its memory. So windows move along z, and only a slab of sums is kept,
    as thick as a window; slices that no later window reaches get their class and leave the slab.
    """
    device = torch.device(device)
    shape = np.maximum(volume.shape, patch)  # a smaller volume is padded at its end
    scan = torch.from_numpy(cut_box(volume, np.zeros(3, int), shape, padding=0))
    starts = []  # where windows begin on each axis; the last window ends where the volume ends
    for size, width in zip(shape.tolist(), patch):
        step = max(1, int(width * (1 - overlap)))
        starts.append([*range(0, size - width, step), size - width])
    starts_x, starts_y, starts_z = starts
    # Boxes of the windows that begin at z, relative to z: they fit both slab and scan[:, :, z:].
    boxes = [box_at((x, y, 0), patch) for x, y in itertools.product(starts_x, starts_y)]

    classes = torch.zeros(scan.shape, dtype=torch.uint8)
    slab = torch.zeros(num_classes, *scan.shape[:2], patch[2])  # (K, X, Y, z)
    if slab.nbytes < 2**29:  # a larger one stays in main memory: FLARE allows 2 GiB of a GPU
        slab = slab.to(device)
    weight = gaussian(patch).to(device)
    small = device.type == "cpu" and weight.numel() < 2**19
    at_once = 2 if small else 1  # a CPU is slow with one small window, or two large ones
    for z, next_z in itertools.pairwise([*starts_z, scan.shape[2]]):
        for i in range(0, len(boxes), at_once):
            some = boxes[i : i + at_once]
            windows = torch.stack([scan[:, :, z:][box] for box in some])  # (1 or 2, x, y, z)
            windows = windows[:, None].to(device).float()
            for network in networks:
                probs = network(windows).float().softmax(1) * weight  # (1 or 2, K, x, y, z)
                for box, prob in zip(some, probs):
                    slab[(..., *box)] += prob.to(slab.device)

        # The slices before next_z are finished. The argmax needs no division by the sum of the
        # weights, which is the same for all classes of a voxel.
        done = next_z - z
        classes[:, :, z:next_z] = slab[..., :done].argmax(0)
        for sums in slab:  # move on by `done`, one class at a time, to save memory
            sums.copy_(F.pad(sums[..., done:], (0, done)))
    return classes[box_at((0, 0, 0), volume.shape)].numpy()


def gaussian(patch):
    """Weights float32 (x, y, z) of the voxels of a window [nnU-Net]: largest at the centre, where
    most of the surroundings are seen; standard deviation an eighth of the patch; at least 0.001."""
    curves = []
    for size in patch:
        offset = (np.arange(size) - (size - 1) / 2) / (size / 8)  # in standard deviations
        curves.append(np.exp(-0.5 * offset**2))
    return torch.tensor(np.einsum("x,y,z->xyz", *curves)).float().clamp(min=1e-3)


def segment(run, volume, shape, which="a"):
    """Label ids uint8 of a preprocessed volume (X, Y, Z), resampled to `shape`. which: a [CPS], b,
    or ab: the mean of their probabilities."""
    chosen = [network for name, network in zip("ab", run.networks) if name in which]
    ids = np.array([0, *run.ids], np.uint8)
    with run.autocast:
        classes = sliding_window(chosen, volume, run.config.patch, len(ids), device=run.device)
    labels = largest_components(ids[classes], run.config.largest)
    return resample_labels(labels, shape)


def largest_components(labels, chosen):
    """Keep the largest component of each chosen label id, in place; faces connect voxels."""
    for label, box in label_boxes(labels).items():
        if label in chosen:
            components, _ = ndimage.label(labels[box] == label)
            largest = np.bincount(components.ravel())[1:].argmax() + 1
            labels[box][(components > 0) & (components != largest)] = 0  # labels[box] is a view
    return labels


# 7. Dice
# --------------------------------------------------------------------------------------------------
def dice(pred, ref):
    """Dice coefficient of two bool arrays: 1 if both are empty, 0 if only one is [FLARE22]."""
    size = np.count_nonzero(pred) + np.count_nonzero(ref)
    if size == 0:
        return 1.0
    return 2 * np.count_nonzero(pred & ref) / size


def validate(run, cases):
    """Dice of network A, float (cases, labels); NaN where the reference does not hold the label. To
    count 1 there would reward a network that never finds a rare organ."""
    table = np.full((len(cases), len(run.ids)), nan)
    for row, case in zip(table, cases):  # a row is a view: filling it fills the table
        arrays = case.load()
        ref = arrays["label"]
        pred = segment(run, arrays["image"], ref.shape)
        for i, label in enumerate(run.ids):
            if np.any(ref == label):
                row[i] = dice((pred == label) & (ref != IGNORE), ref == label)
    return table


def mean_dice(table):
    """Mean over the cases that hold a label, then over the labels; NaN if there is none."""
    means = label_means(table)
    means = means[~np.isnan(means)]
    return float(means.mean()) if len(means) else nan


# 8. Scans
# --------------------------------------------------------------------------------------------------
PARTS = ("labelled", "unlabelled", "val", "test")


@dataclass
class Case:
    """A scan, and the file of its preprocessed arrays."""

    name: str
    image: Path
    label: Path | None = None  # None: there is none, or training must not see it
    cached: Path | None = None  # see `prepare_case`

    def load(self):
        """The preprocessed arrays, memory-mapped: "image", float16 (X, Y, Z), "spacing" in mm, and
        for a labelled case "label", uint8 (X, Y, Z), and "points", int32 (n, 4): rows of a label id
        and the x, y, z of one of its voxels. "ids", "checksum", "is_outside" are for checks."""
        arrays = torch.load(self.cached, mmap=True, weights_only=True)
        return {name: array.numpy() for name, array in arrays.items()}


def list_scans(path, images=False, optional=False):
    """{case name: path} of a NIfTI file or of a folder of them. images: nnU-Net's channel `_0000`
    is no part of a name, if all files have it. optional: the folder may be missing or empty."""
    path = Path(path)
    need(optional or path.exists(), f"{path}: does not exist; check the path")
    files = [path] if path.is_file() else sorted(path.glob("*"))
    scans = {}
    for file in files:
        match = re.fullmatch(r"([^.].*?)\.nii(\.gz)?", file.name, re.IGNORECASE)
        if match:
            need(match[1] not in scans, f"{file}: a second file of this case; remove one")
            scans[match[1]] = file
    need(optional or scans, f"{path}: holds no .nii or .nii.gz file; check the path")
    if images and all(name.endswith("_0000") for name in scans):
        scans = {name.removesuffix("_0000"): file for name, file in scans.items()}
    return scans


def find_cases(config):
    """{name: Case} of all scans. The names of test cases begin with imagesTs/, and those of the
    folders of unlabelled images with the name of their folder."""
    root = Path(config.data)
    cases = {}
    for part, prefix in (("Tr", ""), ("Ts", "imagesTs/")):
        labels = list_scans(root / f"labels{part}", optional=True)
        images = list_scans(root / f"images{part}", images=True, optional=part == "Ts")
        lost = sorted(labels.keys() - images.keys())
        need(not lost, f"{root}/labels{part}: no image for {lost[:5]}; name all of them alike")
        for name, file in images.items():
            if part == "Tr" or name in labels:  # test images without a label are not used
                cases[prefix + name] = Case(prefix + name, file, labels.get(name))
    for folder in (root / "imagesUn", *map(Path, config.unlabelled)):
        scans = list_scans(folder, images=True, optional=folder == root / "imagesUn")
        for name, file in scans.items():
            name = f"{folder.resolve().name}/{name}"  # two folders may hold scans of one name
            need(name not in cases, f"{folder}: {name} is there twice; rename the folder")
            cases[name] = Case(name, file)
    return cases


def split_cases(config):
    """The cases of a training: {"labelled", "unlabelled", "val", "test"}: each a list of Case."""
    cases = find_cases(config)
    if config.split:  # it names all cases that are used
        parts = read_split(config.split, cases)
    else:
        labelled = [name for name, case in cases.items() if case.label]
        tests = [name for name in labelled if name.startswith("imagesTs/")]
        parts = draw_split(config, sorted(set(labelled) - set(tests)))
        parts["unlabelled"] = [name for name, case in cases.items() if not case.label]
        parts["test"] = parts["test"] or tests
    if config.labelled:  # the others lose their labels
        parts["unlabelled"] = parts["labelled"][config.labelled :] + parts["unlabelled"]
        parts["labelled"] = parts["labelled"][: config.labelled]

    enough = len(parts["labelled"]) >= max(config.labelled, 1)
    need(enough, f"{config.data}: too few labelled cases; lower --labelled, or give --val 0")
    enough = parts["unlabelled"] or config.method == "supervised"
    need(enough, f"{config.data}: no unlabelled image; add imagesUn, --labelled or --split")
    split = {part: [cases[name] for name in parts[part]] for part in PARTS}
    for case in split["unlabelled"]:
        case.label = None
    return split


def read_split(path, cases):
    """The names of the cases by part in a JSON file."""
    with blame(path):
        found = json.loads(Path(path).read_text("utf-8"))
        parts = {part: list(found.get(part, [])) for part in PARTS}
        count = Counter(itertools.chain(*parts.values()))
        wrong = [name for name in count if name not in cases or count[name] > 1]
        need(not wrong, f"{wrong[:5]} are not in the data, or named twice")
        for part in ("labelled", "val", "test"):
            wrong = [name for name in parts[part] if not cases[name].label]
            need(not wrong, f"{wrong[:5]} have no label")
    return parts


def draw_split(config, names):
    """Names of labelled cases by part, drawn at random; all seeds have the same test cases."""
    names = np.random.default_rng(0).permutation(names).tolist()
    shares = (config.test, config.val)  # or numbers, from 1 on
    test, val = [int(n) if n >= 1 else math.ceil(n * len(names)) for n in shares]
    rest = np.random.default_rng((1, config.seed)).permutation(names[test:]).tolist()
    return {"labelled": rest[val:], "val": rest[:val], "test": names[:test]}


def read_header(path):
    """The nibabel image of a file and the mm (3,) of its voxels in RAS+; no voxels are read."""
    with blame(path):
        nifti = nib.load(path)
        shape = nifti.shape
        need(len(shape) >= 3 and set(shape[3:]) <= {1}, f"shape {shape} is not 3D")
        spacing = nib.affines.voxel_sizes(nifti.affine)
        need(all((spacing > 1e-3) & (spacing < 1e3)), f"spacing {spacing} mm is impossible")
        return nifti, spacing[np.argsort(nib.io_orientation(nifti.affine)[:, 0])]


def read_scan(path, is_label=False, like=None):
    """Read a NIfTI file: volume (X, Y, Z) in RAS+, float32, or uint8 for labels; mm (3,) of its
    voxels; its nibabel image. like: an image on whose grid it must lie."""
    nifti, spacing = read_header(path)
    with blame(path):
        # Near 45 degrees, rounding can turn two affines of one grid to different axes.
        grid = nifti if like is None else like
        check_grid(nifti, grid)
        volume = np.asanyarray(nifti.dataobj).reshape(nifti.shape[:3])
        low, high = volume.min(), volume.max()
        need(np.isfinite([low, high]).all(), "holds NaN or infinity")
        need(is_label or low < high, "all voxels are equal")
        if is_label:
            labels = volume.round().astype(np.uint8)
            wrong = abs(labels - volume).max() > 1e-3
            need(not wrong, "labels must be whole numbers from 0 to 255")
            volume = labels
        volume = nib.apply_orientation(volume, nib.io_orientation(grid.affine))
        turned = np.empty(volume.shape, np.uint8 if is_label else np.float32)
        for y in range(volume.shape[1]):  # several times as fast as all at once
            turned[:, y] = volume[:, y]
    return turned, spacing, nifti


def check_grid(nifti, like):
    """Refuse an image whose corners lie more than a tenth of a voxel from those of another one."""
    shape = like.shape[:3]
    need(nifti.shape[:3] == shape, f"shape {nifti.shape} is not that of its image, {shape}")
    corners = np.indices((2, 2, 2)).reshape(3, 8).T * shape  # in voxels
    mm = nib.affines.apply_affine(nifti.affine, corners)
    shift = nib.affines.apply_affine(np.linalg.inv(like.affine), mm) - corners
    need(abs(shift).max() < 0.1, f"its grid is {abs(shift).max():.3g} voxels off its image's")


def write_like(labels, nifti, path):
    """Write labels uint8 (X, Y, Z) in RAS+ as NIfTI, in the orientation and header of an image."""
    ras = nib.orientations.axcodes2ornt("RAS")
    turn = nib.orientations.ornt_transform(ras, nib.io_orientation(nifti.affine))
    labels = nib.apply_orientation(labels, turn).reshape(nifti.shape)
    atomic(path, type(nifti)(labels, None, nifti.header, dtype=np.uint8).to_filename)


def is_outside(volume, low, high):
    """Whether a volume seems not to be in HU: nothing lies below `low`, as air would, or hardly any
    tissue lies between `low` and `high`, as in a CT that is stored with an offset."""
    some = volume.ravel()[::7]  # enough, and faster
    bright = some[some > some.mean()]  # tissue rather than air
    return some.min() > low or np.mean((bright > low) & (bright < high)) < 0.1


def preprocess(volume, spacing, config):
    """Clip, resample and z-score a volume (X, Y, Z), float32 [paper; scope of the z-score ours].
    spacing: mm of its voxels. The volume is overwritten."""
    low, high = config.clip or np.percentile(volume, (0.5, 99.5))
    np.clip(volume, low, high, out=volume)  # first: metal must not shift the mean
    shape = np.rint(volume.shape * spacing / config.spacing).astype(int).clip(1)
    volume = torch.from_numpy(resample(volume, shape))  # faster than NumPy from here
    std, mean = torch.std_mean(volume)
    return volume.sub_(mean).div_(std.clamp(min=1e-6)).numpy()


def read_image(path, config):
    """Read and preprocess an image. Returns its arrays, of which "image" is float32 (X, Y, Z), the
    shape (3,) that it had in RAS+, and its nibabel image."""
    volume, spacing, nifti = read_scan(path)
    arrays = {"checksum": zlib.crc32(volume)}
    arrays["is_outside"] = bool(config.clip) and is_outside(volume, *config.clip)
    arrays["image"] = preprocess(volume, spacing, config)
    return arrays, volume.shape, nifti


def resample(volume, shape):
    """Resample a volume (X, Y, Z) linearly to a shape; the outer edges of both grids coincide."""
    if volume.shape == tuple(shape):
        return volume
    volume = torch.from_numpy(volume)[None, None]
    return F.interpolate(volume, tuple(shape), mode="trilinear")[0, 0].numpy()


def resample_labels(labels, shape):
    """Resample label ids, uint8 (X, Y, Z). The share of each label is resampled linearly and the
    largest share wins; nearest neighbours would lose up to 0.02 Dice [measured]."""
    if labels.shape == tuple(shape):
        return labels
    result = np.zeros(shape, np.uint8)
    largest = np.zeros(shape, np.float32)
    for label in (0, *label_boxes(labels)):
        share = resample((labels == label).astype(np.float32), shape)
        result[share > largest] = label
        np.maximum(largest, share, out=largest)
    return result


def label_boxes(labels):
    """{label id: slices of the smallest box around it} of the labels that there are."""
    boxes = enumerate(ndimage.find_objects(labels), start=1)
    return {label: box for label, box in boxes if box}


def prepare_case(case, config):
    """Write the preprocessed arrays of a case into the cache, unless they are there."""
    functions = (read_scan, read_image, is_outside, preprocess, resample)
    functions += (resample_labels, label_boxes, label_points)
    code = [inspect.getsource(function) for function in functions]  # new code makes new arrays
    files = [(str(path.resolve()), path.stat()) for path in (case.image, case.label) if path]
    files = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in files]
    key = zlib.crc32(repr((files, code, config.clip, config.spacing)).encode())
    case.cached = Path(config.cache, f"{Path(case.name).name}-{key:08x}.pt")
    if case.cached.exists():
        return

    arrays, _, nifti = read_image(case.image, config)
    arrays["image"] = arrays["image"].astype(np.float16)
    arrays["spacing"] = config.spacing
    if case.label:
        labels, _, _ = read_scan(case.label, is_label=True, like=nifti)
        arrays["label"] = resample_labels(labels, arrays["image"].shape)
        arrays["points"] = label_points(arrays["label"])
        arrays["ids"] = sorted(label_boxes(labels).keys() - {IGNORE})  # some may vanish in "label"
    tensors = {name: torch.as_tensor(array) for name, array in arrays.items()}
    atomic(case.cached, lambda path: torch.save(tensors, path))


def label_points(labels):
    """Up to 1000 random voxels of each label: int32 (n, 4), rows of label id, x, y, z."""
    rng = np.random.default_rng(0)
    points = [np.zeros((0, 4), int)]
    for label, box in label_boxes(labels).items():
        if label != IGNORE:
            xyz = np.argwhere(labels[box] == label) + [side.start for side in box]
            xyz = rng.choice(xyz, min(1000, len(xyz)), replace=False)
            points.append(np.insert(xyz, 0, label, axis=1))
    return np.concatenate(points).astype(np.int32)


def prepare(split, config):
    """Check and preprocess all cases. If some are bad, all are reported, then UserError raised."""
    cases = {case.name: case for case in itertools.chain(*split.values())}
    bad = for_each("preparing", cases, lambda name, case: prepare_case(case, config), threads=4)
    need(not bad, f"{config.data}: {bad} cases cannot be used, see above; mend or remove them")
    twins = defaultdict(dict)  # {checksum: {name: part}}
    outside = []
    for part, cases in split.items():
        for case in cases:
            arrays = case.load()
            twins[int(arrays["checksum"])][case.name] = part
            if arrays["is_outside"]:
                outside.append(case.name)
    twins = [parts for parts in twins.values() if len(parts) > 1]
    leaks = [list(parts) for parts in twins if {"val", "test"} & set(parts.values())]
    if leaks:
        warn(f"{len(leaks)} val or test images are there twice, so scores mislead: {leaks[:3]}")
    elif twins:
        warn(f"{len(twins)} images are there twice, such as {list(twins[0])}")
    if outside:
        what = f"{len(outside)} scans, such as {outside[0]}, are not in HU"
        warn(f"{what}: use --clip auto, or undo an offset")
    shapes = [case.load()["image"].shape for case in split["unlabelled"]]
    if shapes and np.all(np.array(shapes) <= config.patch):
        warn("no scan is larger than --patch, so both crops are equal, as in plain CPS")


def label_ids(split):
    """All label ids of the cases. Prints how many cases hold each."""
    counts = {part: Counter() for part in PARTS}
    for part, cases in split.items():
        for case in cases:
            if case.label:
                counts[part].update(case.load()["ids"].tolist())
    ids = sorted(set().union(*counts.values()))
    for part, count in counts.items():
        held = ", ".join(f"label {label} in {count[label]}" for label in ids if count)
        print(f"{part:10} {len(split[part])} cases  {held}")
    need(counts["labelled"], "no labelled case holds a label (255 is ignored); add others")
    need(counts["val"] or not split["val"], "no validation case holds a label; see --val, --seed")
    return ids


# 9. Augmentation
# --------------------------------------------------------------------------------------------------
def random_rotation_and_scale(rng, spacing):
    """Rotation by up to 30 degrees on each axis and scale 0.7 to 1.4, each for a fifth of the items
    [nnU-Net]: a matrix (3, 3) from offsets in voxels of a patch to those of a volume, or None."""
    rotated, scaled = rng.random(2) < 0.2
    if not rotated and not scaled:
        return None
    matrix = np.eye(3)
    if rotated:
        angles = rng.uniform(-30, 30, 3)
        matrix = spatial.transform.Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    if scaled:
        matrix = matrix * 2 ** rng.uniform(-0.5, 0.5)
    # The rotation is made in mm: in voxels of uneven size, it would also shear.
    return np.diag(1 / spacing) @ matrix @ np.diag(spacing)


def cut_box(volume, corner, shape, padding):
    """Cut a box out of a volume (X, Y, Z). Its corner may be negative, and it may reach beyond the
    volume: there it is filled with padding."""
    box = np.full(shape, padding, volume.dtype)
    low = np.clip(corner, 0, volume.shape)
    high = np.clip(corner + shape, 0, volume.shape)
    box[box_at(low - corner, high - low)] = volume[box_at(low, high - low)]
    return box


def warp_box(volume, corner, shape, matrix, order, padding):
    """Cut a box out of a volume (X, Y, Z), rotated and scaled around its centre by a matrix.
    order: of the interpolation, 1 linear, 0 nearest neighbour, for labels."""
    if matrix is None:
        return cut_box(volume, corner, shape, padding)
    centre = shape // 2
    half = np.ceil(abs(matrix) @ (shape / 2)).astype(int) + 1  # half of a wider box
    wide = cut_box(volume, corner + centre - half, 2 * half + 1, padding).astype(np.float32)
    offset = half - matrix @ centre
    warped = ndimage.affine_transform(wide, matrix, offset, tuple(shape), order=order, cval=padding)
    return warped.astype(volume.dtype)


def change_intensities(patch, rng):
    """A patch, float32 (x, y, z) and z-scored, with other intensities [nnU-Net]."""
    noise, blur, brightness, contrast, gamma = rng.random(5) < (0.1, 0.1, 0.15, 0.15, 0.3)
    if noise:
        patch = patch + rng.uniform(0, 0.1) * rng.standard_normal(patch.shape, np.float32)
    if blur:
        patch = ndimage.gaussian_filter(patch, rng.uniform(0.5, 1))
    if brightness:
        patch = patch * rng.uniform(0.75, 1.25)
    if contrast:
        changed = (patch - patch.mean()) * rng.uniform(0.75, 1.25) + patch.mean()
        patch = changed.clip(patch.min(), patch.max())
    if gamma:
        patch = change_gamma(patch, rng)
    return patch.astype(np.float32)


def change_gamma(patch, rng):
    """Raise intensities, scaled to 0..1, to a random power; mean and sd stay as they were."""
    power = 2 ** rng.uniform(-0.5, 0.6)
    curved = ((patch - patch.min()) / (np.ptp(patch) + 1e-6)) ** power
    return (curved - curved.mean()) / (curved.std() + 1e-6) * patch.std() + patch.mean()


# 10. Scores
# --------------------------------------------------------------------------------------------------
class Scores(NamedTuple):
    """The scores of one label in one case; the defaults are those of a label that neither holds."""

    dice: float = 1.0
    nsd: float = 1.0  # surface Dice; NaN without MONAI
    hd95: float = nan  # 95 % Hausdorff distance in mm; NaN without MONAI, or if a mask is empty
    held: bool = False  # the reference holds the label
    found: bool = False  # the prediction holds it


def evaluate_case(pred, ref, spacing, labels, tolerance=2.0):
    """{label: Scores} of two label arrays (X, Y, Z). spacing: mm, in the order of the axes.
    tolerance: mm, of the surface Dice. Voxels that are IGNORE in ref do not count."""
    both = np.stack((np.where(ref == IGNORE, 0, pred), ref))  # (2, X, Y, Z)
    boxes = label_boxes(both)
    results = {}
    for label in labels:
        results[label] = Scores()
        if label in boxes:
            _, *box = boxes[label]
            p, r = both[(..., *box)] == label
            nsd, hd95 = surface_scores(p, r, spacing, tolerance)
            results[label] = Scores(dice(p, r), nsd, hd95, bool(r.any()), bool(p.any()))
    return results


def surface_scores(pred, ref, spacing, tolerance):
    """NSD and HD95 in mm of two bool arrays, by MONAI, whose NSD has the formula of FLARE."""
    try:
        from monai.metrics import compute_hausdorff_distance, compute_surface_dice
    except ImportError:
        return nan, nan
    if not pred.any() or not ref.any():
        return 0.0, nan
    pair = [torch.from_numpy(mask)[None, None] for mask in (pred, ref)]
    options = {"include_background": True, "spacing": tuple(spacing)}
    warnings.filterwarnings("ignore", category=FutureWarning, module="monai")
    nsd = compute_surface_dice(*pair, [tolerance], use_subvoxels=True, **options)
    hd95 = compute_hausdorff_distance(*pair, percentile=95, **options)
    return nsd.item(), hd95.item()


def label_means(table):
    """Mean of each label over the cases that hold it: float (labels,), NaN where there is none."""
    return np.ma.masked_invalid(table).mean(axis=0).filled(nan)


def score_array(results):
    """Scores, float (cases, labels, 5), of labels that any case holds; NaN where one does not."""
    labels = sorted({i for case in results.values() for i, scores in case.items() if scores.held})
    scores = np.array([[case[label] for label in labels] for case in results.values()], float)
    scores = scores.reshape(len(results), len(labels), 5)  # also where there is no label
    scores[scores[..., 3] == 0] = nan
    return scores


def score_table(results):
    """Markdown table of {case: {label: Scores}}: mean +- sd over the cases that hold a label, and
    how often the label was missed, or invented where the reference does not hold it."""
    rows = [("label", "cases", "Dice", "NSD", "HD95 mm", "missed", "invented")]
    for label in next(iter(results.values())):
        scores = np.array([case[label] for case in results.values()], float)  # (cases, 5)
        held = scores[:, 3] == 1
        dices, nsds, distances, _, found = scores[held].T
        counts = (np.sum(found == 0), np.sum(scores[~held, 4] == 1))
        rows.append((label, len(dices), spread(dices), spread(nsds), spread(distances, 2), *counts))
    mean = f"{mean_dice(score_array(results)[..., 0]):.4f}"
    return markdown([*rows, ("mean", "", mean, "", "", "", "")])


def markdown(rows):
    """Text of a Markdown table. The first row is its head."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines)


def spread(values, digits=4):
    """Text of mean +- sd of some numbers; NaN does not count."""
    known = np.array(values)[np.isfinite(values)]
    if len(known) == 0:
        return "-"
    sd = f" +- {known.std(ddof=1):.{digits}f}" if len(known) > 1 else ""
    return f"{known.mean():.{digits}f}{sd}"


# 11. Phantom
# --------------------------------------------------------------------------------------------------
# Ellipsoids in the order in which they are drawn: label, centre x y z, radii x y z, HU. The volume
# reaches from -1.1 to 1.1 on each axis. Only the place tells the right kidney from the left one.
PHANTOM = """
0   0     0     0      1     0.9   4     -90  fat
0   0     0     0      0.9   0.8   4      45  muscle
0   0    -0.6   0      0.16  0.18  3     350  spine
0  -0.3   0.42  0.35   0.3   0.28  0.36   70  stomach
1   0.42  0.16  0.42   0.42  0.5   0.5   110  liver
2  -0.58 -0.14  0.42   0.26  0.34  0.42  130  spleen
3   0.4  -0.34 -0.5    0.24  0.24  0.4   170  right kidney
4  -0.4  -0.34 -0.5    0.24  0.24  0.4   170  left kidney
5   0    -0.2   0      0.14  0.14  3     195  aorta
"""


def phantom_volume(rng, shape=(56, 48, 48)):
    """A random body, in RAS+: image float (X, Y, Z) in HU, label uint8 (X, Y, Z)."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1.1, 1.1, n) for n in shape], indexing="ij"))
    for coordinate in grid:  # bend space, so that no organ is an ellipsoid
        bend = ndimage.gaussian_filter(rng.standard_normal(shape), 5)
        coordinate += rng.uniform(1.3, 3.7) * bend

    image = np.full(shape, -1000.0)  # air
    label = np.zeros(shape, np.uint8)
    phase = rng.uniform(0.7, 1.3)  # how strong the contrast is
    for row in np.loadtxt(io.StringIO(PHANTOM), usecols=range(8)):
        centre = row[1:4]
        radii = row[4:7]
        if radii[0] < 0.9:  # fat and muscle stay where they are
            centre = centre + rng.uniform(-0.1, 0.1, 3)
            radii = radii * rng.uniform(0.75, 1.25, 3)
        x, y, z = [(g - c) / r for g, c, r in zip(grid, centre, radii)]
        inside = x**2 + y**2 + z**2 < 1
        image[inside] = row[7] * phase * rng.uniform(0.85, 1.15)
        label[inside] = row[0]

    image = ndimage.gaussian_filter(image, rng.uniform(0.4, 0.8)) + rng.uniform(-10, 10)
    return image + rng.normal(0, rng.uniform(20, 50), shape), label


def make_phantom(folder):
    """Write 12 labelled (Tr), 24 unlabelled (Un) and 8 test scans (Ts), unless they are there."""
    for seed, (part, count) in enumerate({"Tr": 12, "Un": 24, "Ts": 8}.items()):
        for number in range(count):
            volumes = phantom_volume(np.random.default_rng((seed, number)))
            for kind, volume in zip(("images", "labels"), volumes):
                path = Path(f"{folder}/{kind}{part}/phantom{part}{number:02}.nii.gz")
                if path.exists() or (kind, part) == ("labels", "Un"):
                    continue
                volume = volume[::-1, ::-1].round().astype(np.int16)  # LPS, as most scanners write
                atomic(path, nib.Nifti1Image(volume, np.diag((-6, -6, 6, 1))).to_filename)


# 12. Runs
# --------------------------------------------------------------------------------------------------
# torchrun starts a process for each GPU: the number of this one, and how many there are.
RANK = int(os.environ.get("RANK", 0))
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
# Settings that may differ when a run is resumed; its split is always that of its own split.json.
MAY_CHANGE = "split cache largest out resume device amp workers".split()
LOG = "step lr lam loss_sup loss_cps agreement foreground overlap dice seconds".split()
STATE = "ids step best rows".split()  # what a checkpoint holds beside config and parts


class Run:
    """The state of a training, as checkpoints hold it."""

    def __init__(self, config, ids):
        self.config = config
        self.ids = ids  # label ids of the classes 1, 2, ...
        self.total_steps = config.epochs * config.epoch_steps
        self.step = 0
        self.best = -1.0  # Dice of the validation that chose best.pt
        self.rows = []  # rows of the log
        self.device = torch.device(config.device)
        gpu = self.device.type == "cuda"
        torch.backends.cudnn.benchmark = gpu  # all patches have one size
        layout = torch.contiguous_format if gpu else torch.channels_last_3d  # faster on a CPU
        self.networks = make_pair(config, len(ids) + 1)  # the same in all processes
        options = {"momentum": config.momentum, "weight_decay": config.weight_decay}
        self.optimisers = []
        for network in self.networks:
            network.to(self.device, memory_format=layout)
            sgd = torch.optim.SGD(network.parameters(), config.lr, nesterov=True, **options)
            self.optimisers.append(sgd)
        # bf16 on a GPU that has it; else fp16, whose small gradients need to be scaled.
        amp = gpu and config.amp
        bf16 = amp and torch.cuda.get_device_capability(self.device) >= (8, 0)
        half = torch.bfloat16 if bf16 else torch.float16
        self.autocast = torch.autocast(self.device.type, half, enabled=amp)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp and not bf16)
        self.parts = [*self.networks, *self.optimisers, self.scaler]  # what has its own state

    def save(self, name):
        """Write a checkpoint. The file holds values and tensors, no code."""
        state = {key: getattr(self, key) for key in STATE}
        state["config"] = vars(self.config)
        state["parts"] = [part.state_dict() for part in self.parts]
        if RANK == 0:
            atomic(f"{self.config.out}/{name}", lambda path: torch.save(state, path))

    @classmethod
    def load(cls, path, **changes):
        """The run of a checkpoint, with changed settings. Code in the file is not executed."""
        with blame(path, "cannot be loaded as a checkpoint: "):
            state = torch.load(path, map_location="cpu", weights_only=True)
            run = cls(Config(**state["config"] | changes), state["ids"])
            for part, saved in zip(run.parts, state["parts"]):
                if saved:  # a scaler that was off has no state
                    part.load_state_dict(saved)
            for key in STATE:
                setattr(run, key, state[key])
        return run

    def log(self, row, scores):
        """Add an epoch to log.csv, with the Dice of each label, and print it."""
        weights = [weight for network in self.networks for weight in network.parameters()]
        finite = math.isfinite(row["loss_sup"]) and all(w.isfinite().all() for w in weights)
        need(finite, f"{self.config.out}: the loss is not finite; --resume --no-amp, or lower --lr")
        now = time.monotonic()
        row["dice"] = mean_dice(scores)
        row["seconds"] = (now - self.row_start) / self.config.epoch_steps  # for a step
        self.row_start = now
        row = {name: row.get(name, nan) for name in LOG}  # `supervised` has no pairs
        left = timedelta(seconds=int(row["seconds"] * (self.total_steps - self.step)))
        print(" ".join(f"{value:10.4g}" for value in row.values()), f"{left!s:>10}", flush=True)
        dices = {f"dice_{i}": float(dice) for i, dice in zip(self.ids, label_means(scores))}
        self.rows.append(row | dices)
        if RANK == 0:
            write_csv(f"{self.config.out}/log.csv", self.rows)


def open_run(config):
    """A new run, or the one that is resumed, and its cases: {part: list of Case}."""
    last = Path(config.out, "last.pt")
    run = None
    if last.exists():
        need(config.resume, f"{config.out}: holds a run; add --resume, or give another --out")
        config = dataclasses.replace(config, split=f"{config.out}/split.json")
        run = Run.load(last, **{name: getattr(config, name) for name in MAY_CHANGE})
        config = dataclasses.replace(config, spacing=config.spacing or run.config.spacing)
        for name, value in vars(run.config).items():
            sentence = f"{config.out}: was trained with {name} {value}; give that, or another --out"
            need(value == getattr(config, name), sentence)
    with first_process_first():
        split = split_cases(config)
        if not config.spacing:  # the same for all methods; test cases do not count
            cases = split["labelled"] + split["unlabelled"] + split["val"]
            spacing = np.median([read_header(case.image)[1] for case in cases], axis=0)
            config = dataclasses.replace(config, spacing=tuple(spacing.tolist()))
        if config.method == "supervised":
            split["unlabelled"] = []
        prepare(split, config)
    print(f"settings   preset {config.preset}; patch {config.patch}, voxels of {config.spacing} mm")
    ids = label_ids(split)
    need(not run or run.ids == ids, f"{config.out}: the labels are now {ids}; give another --out")
    if not run:
        run = Run(config, ids)
        names = {part: [case.name for case in cases] for part, cases in split.items()}
        for name, value in (("split", names), ("config", vars(config))):
            write_text(f"{config.out}/{name}.json", json.dumps(value, indent=1))
        write_text(f"{config.out}/cps.py", Path(__file__).read_text("utf-8"))

    network = copy.deepcopy(run.networks[0]).to("meta")  # there, nothing is computed
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 1, *config.patch, device="meta"))
    flops = counter.get_total_flops()
    size = sum(parameter.numel() for parameter in network.parameters())
    print(f"networks   two of {size:,} parameters, {flops:.3g} FLOPs for a patch")
    print(f"run        {config.out} on {run.device}, step {run.step} of {run.total_steps}")
    print(" ".join(f"{name:>10}" for name in LOG), " time left", flush=True)
    return run, split


def batches(run, split):
    """The batches of the steps that are left, on the device."""
    config = run.config
    gpu = run.device.type == "cuda"
    # The patches of all processes are numbered by step, then process, then place in the batch.
    first = np.arange(run.step, run.total_steps) * PROCESSES + RANK
    numbers = first[:, None] * config.batch + np.arange(config.batch)
    loader = DataLoader(
        Patches(config, split, run.ids),
        batch_sampler=numbers.tolist(),
        num_workers=config.workers if gpu else 0,
        pin_memory=gpu,
    )
    run.row_start = time.monotonic()
    for batch in loader:
        for name in batch.keys() - {"corner_a", "corner_b"}:  # to read those would wait for the GPU
            batch[name] = batch[name].to(run.device, non_blocking=True)
        yield batch


def average_gradients(network):
    """Replace the gradients of a network by their mean over all processes of torchrun."""
    if PROCESSES > 1:
        for parameter in network.parameters():
            distributed.all_reduce(parameter.grad)
            parameter.grad /= PROCESSES


@contextmanager
def first_process_first():
    """Let the first process of torchrun do something, then the others: they find files made."""
    if RANK > 0:
        distributed.barrier()
    yield
    if RANK == 0 and PROCESSES > 1:
        distributed.barrier()


def report(run, split):
    """Test the best checkpoint, draw the figure; returns {"run": best, "scores": of the test}."""
    config = run.config
    with first_process_first():  # the others wait until best.pt is there
        best = Run.load(f"{config.out}/best.pt", largest=config.largest, device=config.device)
    part = "test" if split["test"] else "val"
    results = {}
    for case in split[part]:  # on the grids of the scans, not on those of the cache
        nifti, spacing = read_header(case.image)
        ref, _, _ = read_scan(case.label, is_label=True, like=nifti)
        pred = segment(best, case.load()["image"], ref.shape)
        results[case.name] = evaluate_case(pred, ref, spacing, run.ids)
    print(f"\nbest.pt    mean Dice {best.best:.4f} on the {len(split['val'])} validation cases\n")
    if results:
        print(f"{len(results)} {part} cases\n{score_table(results)}\n")
    try:
        if RANK == 0:
            figure(best, split, f"{config.out}/figure.png")
    except ImportError:
        print(f"no {config.out}/figure.png: pip install matplotlib")
    minutes = sum(row["seconds"] for row in run.rows) * config.epoch_steps / 60
    print(f"time       {minutes:.1f} minutes of training")
    print(f"next       python cps.py predict {config.out}/best.pt IMAGES OUT")
    return {"run": best, "scores": results}


# 13. Commands
# --------------------------------------------------------------------------------------------------
def predict(
    checkpoint: str,  # best.pt or last.pt of a run
    images: str,  # a NIfTI file or a folder of them
    out: str,  # folder for the segmentations
    networks: Literal["a", "b", "ab"] = "a",  # ab: average the probabilities of both
    device: str = "auto",  # cpu, cuda, cuda:1, ...
):
    """Segment scans. Returns the exit code: 1 if some could not be segmented."""
    run = Run.load(checkpoint, device=choose_device(device))
    scans = list_scans(images, images=True)
    done = scans.keys() & list_scans(out, optional=True).keys()
    if done:  # perhaps corrected by hand, or of a run that was interrupted
        warn(f"{out}: {len(done)} of {len(scans)} exist and stay; give another OUT for new ones")

    def one(name, file):
        arrays, shape, nifti = read_image(file, run.config)
        if arrays["is_outside"]:
            warn(f"{file}: is not in HU, as the training was, or has an offset; undo that")
        labels = segment(run, arrays["image"], shape, networks)
        write_like(labels, nifti, f"{out}/{name}.nii.gz")

    bad = for_each("predicting", {name: scans[name] for name in scans if name not in done}, one)
    if run.device.type == "cuda":
        print(f"{torch.cuda.max_memory_allocated(run.device) >> 20} MiB of GPU memory at most")
    return int(bad > 0)


def evaluate(
    predictions: str,  # a NIfTI file or a folder of them
    references: str,  # the same; cases of two folders go together by name
    tolerance: float = 2.0,  # tolerance of the surface Dice, in mm
    csv: str = "",  # file for the scores of each case and label
):
    """Dice, surface Dice (NSD) and HD95 of segmentations. A prediction that is missing or broken
    counts as empty. Returns the exit code: 1 if some files were broken."""
    known = list_scans(references)
    found = list_scans(predictions)
    if Path(predictions).is_file() and Path(references).is_file():  # whatever their names
        found = dict(zip(known, found.values()))
    missing = sorted(known.keys() - found.keys())
    need(len(missing) < len(known), f"{predictions}: no file has the name of one in {references}")
    if missing:
        warn(f"{len(missing)} of {len(known)} cases have no prediction: {missing[:5]}")
    results = {}

    def one(name, file):
        ref, spacing, nifti = read_scan(file, is_label=True)
        pred = np.zeros_like(ref)
        try:
            if name in found:
                volume, _, _ = read_scan(found[name], is_label=True, like=nifti)
                need(volume.max() < IGNORE, f"{found[name]}: {IGNORE} is no label; change it")
                pred = volume
        finally:  # a broken one has its row, and is an error
            results[name] = evaluate_case(pred, ref, spacing, range(1, IGNORE), tolerance)

    bad = for_each("evaluating", known, one)
    labels = [i for i in range(1, IGNORE) if any(case[i] != Scores() for case in results.values())]
    need(labels, f"{references}: no case holds a label")
    results = {name: {i: case[i] for i in labels} for name, case in results.items()}
    print(score_table(results))
    if not find_spec("monai"):
        print("for NSD and HD95: pip install monai")
    if csv:
        write_csv(csv, score_rows(results))
    return int(bad > 0)


def score_rows(results, **more):
    """Rows for a CSV file of {case: {label: Scores}}."""
    rows = []
    for case, scores in results.items():
        for label, numbers in scores.items():
            rows.append({**more, "case": case, "label": label, **numbers._asdict()})
    return rows


def ablate(
    config: Config,
    seeds: int = 3,  # runs of each method
):
    """Compare supervised, plain CPS and context-aware CPS, at equal labels and steps, and
    supervised training with all labels. Runs that are finished are not trained again."""
    need(config.method == Config.method, "--method: ablate compares all methods; leave it out")
    tests = split_cases(config)["test"]
    need(tests, f"{config.data}: no test cases; give --test 0.2, imagesTs and labelsTs, or --split")
    methods = get_args(Config.__annotations__["method"])  # the first is the baseline
    arms = [(method, config.labelled) for method in methods]
    if config.labelled:
        arms.append(("supervised", 0))
    rows = []
    table = [("method", "labels", "Dice", "NSD", "missed", "gain in Dice [95 %]")]
    baseline = None
    for method, labelled in arms:
        scores = []  # an array for each seed
        for seed in range(config.seed, config.seed + seeds):
            labels = labelled or "all"
            out = f"{config.out}/{method}-{labels}-{seed}"
            changes = {"method": method, "labelled": labelled, "seed": seed, "out": out}
            results = train(dataclasses.replace(config, resume=True, **changes))["scores"]
            rows += score_rows(results, method=method, labels=labels, seed=seed)
            scores.append(score_array(results))
        dices, nsds, _, _, found = np.moveaxis(scores, -1, 0)  # each (seeds, cases, labels)
        if baseline is None:
            baseline = dices
        gain = interval(dices - baseline) if method != "supervised" else ""
        means = [spread([mean_dice(of_seed) for of_seed in kind]) for kind in (dices, nsds)]
        missed = f"{np.sum(found == 0)} of {np.sum(found >= 0)}"
        table.append((method, labels, *means, missed, gain))
    write_csv(f"{config.out}/ablation.csv", rows)
    write_text(f"{config.out}/ablation.md", markdown(table))
    print(f"\n{config.out}/ablation.md: {seeds} seeds, {len(tests)} test cases\n{markdown(table)}")


def interval(gains):
    """Mean of gains (seeds, cases, labels) and 95 % interval: a bootstrap of seeds and cases."""
    rng = np.random.default_rng(0)
    seeds, cases, _ = gains.shape
    means = []
    for _ in range(10_000):
        drawn = gains[rng.integers(seeds, size=seeds)].mean(0)
        means.append(mean_dice(drawn[rng.integers(cases, size=cases)]))
    low, high = np.nanpercentile(means, (2.5, 97.5))
    return f"{mean_dice(gains.mean(0)):+.4f} [{low:+.4f}, {high:+.4f}]"


# Colours that the colour-blind tell apart, by Okabe and Ito, then darker ones.
PALETTE = "#E69F00 #56B4E9 #009E73 #F0E442 #0072B2 #CC79A7".split()
PALETTE += "#734F00 #2B5A74 #004F39 #787221 #003959 #663C53".split()
DIFFER = "#D55E00"  # where A and B differ


def figure(run, split, path):
    """Draw one figure for a case: the reference with the crops of A and B (dashed), what each
    network says on its own crop, and where they differ on the overlap. The patient's right is on
    the left, as radiologists see it."""
    from matplotlib.colors import to_rgba_array
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    case = (split["val"] or split["unlabelled"] or split["labelled"])[0]
    arrays = case.load()
    image = arrays["image"]
    ref = arrays.get("label", np.zeros(image.shape, np.uint8)) % IGNORE  # not 255
    patch = np.minimum(run.config.patch, image.shape)
    rng = np.random.default_rng(0)
    corners = overlapping_corners(rng, image.shape, patch, run.config.min_overlap)
    slices_a, slices_b = overlap_slices(*corners, patch)
    crop_a, crop_b = [image[box_at(corner, patch)] for corner in corners]
    label_a = segment(run, crop_a, patch, "a")
    label_b = segment(run, crop_b, patch, "b")
    differ = np.where(label_a[slices_a] == label_b[slices_b], 0, IGNORE)

    # The slice of the overlap in which A finds most; z counts from where the overlap begins.
    z = np.count_nonzero(label_a[slices_a], (0, 1)).argmax()
    panels = {
        "reference, A's crop, B's (dashed)": (image, ref, z + max(corner[2] for corner in corners)),
        "A on its crop": (crop_a, label_a, z + slices_a[2].start),
        "B on its crop": (crop_b, label_b, z + slices_b[2].start),
        "they differ on the overlap": (crop_a[slices_a], differ, z),
    }
    page = Figure((13, 3.5), layout="constrained")
    colours = dict(zip(run.ids, itertools.cycle(PALETTE))) | {IGNORE: DIFFER}
    rgba = np.zeros((256, 4))  # a table from label ids to colours
    rgba[list(colours)] = to_rgba_array(list(colours.values()), 0.8)
    handles = [Patch(color=colour, label=label) for label, colour in colours.items()]
    handles[-1].set_label("differ")
    page.legend(handles=handles, loc="outside right")
    axes = page.subplots(1, 4)
    for ax, (title, (volume, labels, z)) in zip(axes, panels.items()):
        ax.imshow(volume[:, :, z].T.astype(float), "gray", origin="lower")
        ax.imshow(rgba[labels[:, :, z].T], origin="lower")
        ax.set(title=title, aspect=arrays["spacing"][1] / arrays["spacing"][0])
        ax.set_axis_off()
        ax.invert_xaxis()
    for corner, style in zip(corners, ("-", "--")):
        frame = Rectangle(corner[:2] - 0.5, *patch[:2], fill=False, ec="white", ls=style)
        axes[0].add_patch(frame).set_clip_on(False)
    atomic(path, page.savefig)


# 14. Errors, files, command line
# --------------------------------------------------------------------------------------------------
class UserError(Exception):
    """What the user can mend: a sentence that names the file or flag, and the remedy."""


def need(condition, sentence):
    """Raise UserError unless a condition holds."""
    if not condition:
        raise UserError(sentence)


def warn(sentence):
    """Print what is allowed, but may be a mistake."""
    if RANK == 0:
        print(f"warning: {sentence}", file=sys.stderr)


@contextmanager
def blame(path, reason=""):
    """Turn any error into a UserError about a file: broken files make a dozen types of errors."""
    try:
        yield
    except Exception as error:
        reason += " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: {reason}; check it") from error


def atomic(path, write):
    """Call write(temporary), then give the file its name: a crash leaves no half of a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with blame(path), tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
        temporary = Path(folder, path.name)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)


def write_text(path, text):
    """Write a text file."""
    atomic(path, lambda file: file.write_text(text, "utf-8"))


def write_csv(path, rows):
    """Write rows, dicts of equal keys, as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def for_each(what, items, one, threads=1):
    """Call one(name, item) for all items; report errors and go on. Returns the number of errors."""
    bad = 0
    done = 0

    def attempt(name, item):
        try:
            one(name, item)
        except (UserError, OSError) as error:
            return f"error: {error}"

    start = time.monotonic()
    pool = ThreadPoolExecutor(threads)
    mapper = map if threads == 1 else pool.map  # `map` ends at once at Ctrl-C
    try:
        for error in mapper(attempt, items.keys(), items.values()):
            done += 1
            if error:
                bad += 1
                print(error, file=sys.stderr)
            if sys.stdout.isatty():
                print(f"{what} {done}/{len(items)}", end="\r", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
        seconds = time.monotonic() - start
        print(f"{what} {done}/{len(items)}, {seconds:.1f} s", flush=True)
    return bad


def choose_device(name):
    """Name of a device; `auto` is a GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with blame(f"--device {name}"):
        torch.empty(0, device=name)
    return name


def check_config(config):
    """Refuse values that cannot work, before any work is done."""
    stride = 2 ** (config.levels - 1)
    fits = all(size > 0 and size % stride == 0 for size in config.patch)
    fits = fits and len(config.patch) == 3 and max(config.patch) > stride  # no norm of one voxel
    need(fits, f"--patch: must be three multiples of {stride}, and not all {stride}")
    ordered = len(config.clip) == 2 and config.clip[0] < config.clip[1]
    need(ordered or not config.clip, "--clip: must be LOW HIGH, or auto")
    positive = len(config.spacing) in (0, 3) and min((1, *config.spacing)) > 0
    need(positive, "--spacing: must be X Y Z in mm, or auto")
    for name in ("momentum", "min_overlap"):
        need(0 < getattr(config, name) < 1, f"--{name.replace('_', '-')}: must be above 0, below 1")
    for name in "val test labelled seed lam weight_decay workers".split():
        need(getattr(config, name) >= 0, f"--{name.replace('_', '-')}: must be 0 or more")
    names = "batch levels base_channels epochs epoch_steps halve_epochs validate_epochs"
    for name in f"{names} lr rampup grad_clip".split():
        need(getattr(config, name) > 0, f"--{name.replace('_', '-')}: must be more than 0")


def add_flags(parser, source):
    """Add a flag for each parameter of a class or function; the comment on its line is the help
    text. What has no default, and the data, is an argument without dashes."""
    comments = dict(re.findall(r"(?m)^ +(\w+): [^#:]*  # (.*)", inspect.getsource(source)))
    for name, parameter in inspect.signature(source).parameters.items():
        text = comments.get(name, "").replace("%", "%%")
        kind = parameter.annotation
        if kind is Config:
            add_flags(parser, Config)
            continue
        if name == "data" or parameter.default is parameter.empty:
            parser.add_argument(name, nargs="?" if name == "data" else None, help=text)
            continue
        options = {"default": argparse.SUPPRESS}  # presets and defaults fill in what is not given
        options["help"] = f"{text} (default: {parameter.default})"
        if name in PRESETS["quick"]:
            options["help"] += f" (quick: {PRESETS['quick'][name]})"
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        elif get_origin(kind) is tuple:
            options |= {"nargs": "+", "type": or_auto(get_args(kind)[0])}
        else:
            options["type"] = kind
        parser.add_argument(f"--{name.replace('_', '-')}", **options)


def or_auto(kind):
    """Read a number on the command line, or `auto`, an empty tuple, as None."""

    def number(text):
        return None if text == "auto" else kind(text)

    return number


def make_config(command, data=None, **given):
    """Config of the flags that were given, on top of a preset. Without data: of a phantom."""
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = tuple(item for item in value if item is not None)
    device = choose_device(given.pop("device", "auto"))
    preset = given.get("preset", "paper" if data and device != "cpu" else "quick")
    what = given.get("method", "context") if command == "train" else command
    data = data and os.path.abspath(data)  # a run knows its data again from any folder
    name = Path(data or "phantom").name
    settings = {"data": data, "preset": preset, "device": device, "out": f"runs/{name}-{what}"}
    if not data:
        settings |= {"data": "runs/phantom", "val": 4.0, "largest": tuple(range(1, 6))}
        settings["labelled"] = 2 if command == "ablate" else 0
    config = Config(**PRESETS[preset] | settings | given)
    check_config(config)
    if not data:
        with first_process_first():
            make_phantom(config.data)
    return config


def run_command(argv):
    """Read the command line and do what it says. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", required=True)
    commands = {function.__name__: function for function in (train, predict, evaluate, ablate)}
    for name, function in commands.items():
        command = subparsers.add_parser(name, help=function.__doc__, description=function.__doc__)
        add_flags(command, function)
    given = vars(parser.parse_args(argv or ["--help"]))
    function = commands[given.pop("command")]
    parameters = inspect.signature(function).parameters
    arguments = {name: given.pop(name) for name in parameters if name in given}
    if "config" in parameters:
        arguments["config"] = make_config(function.__name__, **given)
    return function(**arguments)


def main(argv):
    """Run a command. Returns its exit code: 0, 1 (some scans failed), 2 (bad input), 130."""
    if PROCESSES > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group(timeout=timedelta(days=1))  # the first one prepares alone
        if RANK:
            sys.stdout = io.StringIO()  # the first process speaks
    try:
        result = run_command(argv)
        if PROCESSES > 1:  # after an error, torchrun ends the others
            distributed.destroy_process_group()
        return result if isinstance(result, int) else 0  # `train` returns more than a code
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.cuda.OutOfMemoryError:
        print("error: out of GPU memory; train with a smaller --patch or --batch", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        remedy = "train goes on with --resume after the last epoch, predict with the same command"
        print(f"\ninterrupted; {remedy}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
