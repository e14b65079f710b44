"""cps.py: context-aware cross pseudo supervision (CPS) for 3D medical image segmentation.

Two 3D U-Nets, A and B, of one structure but different initialisation, learn from a few labelled and
many unlabelled scans. Each sees its own patch of an unlabelled volume; where the two overlap, the
hard label of one network supervises the other. Both see the same voxels in different surroundings,
so an answer that comes from the surroundings alone is contradicted by the other network.
Paper: P. Liu and G. Zheng, Cross Pseudo Supervision for Semi-supervised Medical Image Segmentation,
FLARE 2022. CPS: X. Chen et al., CVPR 2021. Overlapping crops: X. Lai et al., CVPR 2021.

    python cps.py train                     a phantom, no data needed: minutes on two CPU cores
    python cps.py train DATA --labelled 8   your scans (MSD / nnU-Net layout), 8 of them with labels
    python cps.py predict CHECKPOINT IMAGE_OR_DIR OUT_DIR
    python cps.py evaluate PREDICTIONS REFERENCES
    python cps.py ablate DATA               does it help? supervised, CPS, context CPS, all labels

The loss of step t, with labelled patches (x, y) and two overlapping crops u1, u2 of a volume:

    L     = L_sup(A) + L_sup(B) + lam(t) * L_cps
    L_sup = Dice(N(x), y) + CE(N(x), y)                            for N = A and N = B
    L_cps = l(A(u1)|o, argmax B(u2)|o) + l(B(u2)|o, argmax A(u1)|o)
    |o      on the overlap of the crops; no gradient through argmax; l = Dice + CE, or CE alone

Shapes: B batch, C channels, K classes (0 is background), X Y Z voxels of a volume in RAS+ (x to the
right, y to the front, z to the head), P patch, x y z voxels of a patch or of an overlap.

Where the paper is silent: the overlap is drawn at random on each axis that has room; A and B swap
crops each step; lam is ramped up; A and B are two draws of He-normal; an epoch has 250 steps;
the network and the augmentation are nnU-Net's, without mirroring, as kidneys have sides;
validation cases choose the checkpoint; A alone predicts. Not for clinical use.

Part one, to be read: 1 Configuration, 2 The losses, 3 Overlapping patches, 4 The networks,
5 Training, 6 Inference, 7 Dice. Part two, to be used: 8 Scans, 9 Augmentation, 10 Surfaces,
11 Phantom, 12 Runs, 13 Commands, 14 Command line. The map: grep -n '^# [0-9P]' cps.py
"""

# SPDX-License-Identifier: MIT
import argparse
import concurrent.futures
import csv
import dataclasses
import functools
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
import warnings
import weakref
import zipfile
import zlib
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage, spatial
from torch import distributed, inf, nan, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

# Part one: the method
# ==================================================================================================


# 1. Configuration
# --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    """All settings of a run, each of them a flag; the defaults are the preset `paper`.

    In brackets: who says so. [ours] is a choice where the paper is silent.
    """

    # data
    data: str = ""  # folder in MSD / nnU-Net layout; none: a phantom is built
    unlabelled: tuple[str, ...] = ()  # more folders of unlabelled images
    labelled: int = 0  # training cases that keep their labels, the others lose them; 0: all
    val: float = 0.2  # share, or number if >= 1, of cases that choose the checkpoint [ours]
    test: float = 0.0  # share or number of cases to be tested at the end; 0: imagesTs, if any
    split: str = ""  # a split.json, as in run folders: who is labelled, unlabelled, val, test
    clip: tuple[float, ...] = (-68.0, 200.0)  # HU; auto (empty): 0.5, 99.5 percentiles [paper]
    spacing: tuple[float, ...] = ()  # x y z in mm to resample to; native (empty): as it is [ours]
    cache: str = "runs/.cache"  # folder of preprocessed volumes; may be deleted

    # method
    preset: Literal["paper", "quick"] = "paper"  # quick: for a CPU, the default without DATA
    method: Literal["supervised", "cps", "context"] = "context"  # no CPS; plain; context-aware
    lam: float = 1.0  # weight of L_cps after the ramp-up [ours, measured]
    rampup: float = 0.6  # share of the run over which lam grows; 0: full at once [ours, measured]
    pseudo_loss: Literal["dice_ce", "ce"] = "dice_ce"  # l of L_cps [paper: Dice + CE; CPS: CE]
    seed: int = 0  # of the initialisation, the split and the patches

    # patches
    patch: tuple[int, ...] = (160, 160, 96)  # x y z in voxels [paper]
    batch: int = 2  # labelled patches a step (and process), and as many unlabelled pairs [paper]
    min_overlap: float = 0.3  # least overlap of two crops, as a share of a crop [ours]
    intensity: float = 1.0  # scales the chances of intensity augmentation; 0: none [nnU-Net]
    spatial: float = 0.2  # chance of rotation to 30 degrees, and of scale 0.7 to 1.4 [nnU-Net]
    mirror: str = ""  # axes to mirror, as `yz`; `x` would swap left and right [ours]

    # network
    base_channels: int = 32  # at the first level; doubled at each next one, at most 320 [nnU-Net]
    levels: int = 5  # of resolution; the patch must divide by 2^(levels-1) [ours; nnU-Net: 6]
    init_b: Literal["he", "xavier"] = "he"  # of B, normal; A always has he [paper]

    # schedule
    epochs: int = 1000  # an epoch is a row of the log [paper]
    epoch_steps: int = 250  # optimiser steps [nnU-Net; fits the paper's 96 h]
    lr: float = 0.01  # of SGD with Nesterov momentum [paper]
    momentum: float = 0.99  # [paper]
    halve_epochs: int = 200  # lr is halved every so many epochs [paper]
    weight_decay: float = 3e-5  # [nnU-Net]
    grad_clip: float = 12.0  # largest norm of a network's gradient; 0: no limit [nnU-Net]
    validate_epochs: int = 10  # validate every so many epochs, and after the last [ours]

    # machine
    out: str = ""  # run folder; none: runs/DATA-METHOD, or runs/DATA-ablate
    resume: bool = False  # go on with the run in --out, or begin it
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: a GPU if there is one
    amp: bool = True  # mixed precision on a GPU: bf16, or fp16 if it has no bf16
    compile: bool = False  # torch.compile: after a minute, 10 to 20 % faster on a CPU [measured]
    workers: int = 8  # loader processes for a GPU; on a CPU there are none
    check: bool = True  # refuse a run that memory or disk cannot hold, before it begins

    def __post_init__(self):
        check_config(self)  # one sentence for each impossible value, in section 14


PRESETS = {
    "paper": {},
    "quick": {  # minutes on a CPU; momentum 0.99 wants more than some hundred steps [measured]
        "patch": (32, 32, 32),
        "base_channels": 8,
        "levels": 4,
        "epochs": 30,
        "epoch_steps": 20,
        "halve_epochs": 12,
        "lr": 0.2,  # a smaller one misses small organs [measured]
        "momentum": 0.9,
        "validate_epochs": 6,
    },
}


# 2. The losses
# --------------------------------------------------------------------------------------------------
def dice_ce_loss(logits, target, ignore_index=-1, dice=True):
    """Soft Dice loss + cross-entropy, for true labels and for pseudo labels [paper, nnU-Net].

    logits: (B, K, x, y, z). target: int64 (B, x, y, z), a class 0..K-1, or `ignore_index` for
    voxels that count in neither part. dice=False: cross-entropy alone. Returns a scalar; 0, and
    not NaN, where all voxels are ignored.
    """
    target = target.flatten(1)[:, None]  # (B, 1, V), V voxels of a patch
    valid = target != ignore_index  # (B, 1, V)
    target = target.masked_fill(~valid, 0)  # background, which counts in no Dice
    log_prob = logits.flatten(2).float().log_softmax(1)  # (B, K, V), never in half precision

    # Cross-entropy: the mean over the voxels of a patch that are not ignored.
    nll = -log_prob.gather(1, target) * valid  # (B, 1, V)
    cross_entropy = nll.sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)  # (B,)
    if not dice:
        return cross_entropy.mean()

    # Soft Dice: for each patch and class apart, so that no patch depends on its neighbours.
    prob = log_prob.exp() * valid  # (B, K, V)
    one_hot = torch.zeros_like(prob)
    one_hot.scatter_(1, target, 1.0)
    prob = prob[:, 1:]  # (B, K-1, V), without background
    one_hot = one_hot[:, 1:]
    overlap = (prob * one_hot).sum(2)  # (B, K-1)
    size = prob.sum(2) + one_hot.sum(2)
    # 1e-5: a class that is in neither scores 1 instead of 0 / 0.
    soft_dice = (2 * overlap + 1e-5) / (size + 1e-5)
    return (cross_entropy + 1 - soft_dice.mean(1)).mean()


def pseudo_label(logits):
    """Hard labels int64 (B, x, y, z) of logits (B, K, x, y, z): no gradient, no threshold [CPS]."""
    return logits.detach().argmax(dim=1)


def cross_pseudo_loss(logits_a, logits_b, valid=None, dice=True):
    """L_cps: each network learns the other's hard label on the voxels that both see.

    logits_a, logits_b: (B, K, x, y, z), both cut to the overlap. valid: bool (B, x, y, z), False
    on padding. dice: l is Dice + CE [paper], else CE alone [CPS]. Returns a scalar.
    """
    label_a = pseudo_label(logits_a)  # (B, x, y, z)
    label_b = pseudo_label(logits_b)
    if valid is not None:  # padding must not be learned as background
        label_a = label_a.masked_fill(~valid, -1)
        label_b = label_b.masked_fill(~valid, -1)
    loss_a = dice_ce_loss(logits_a, label_b, dice=dice)
    loss_b = dice_ce_loss(logits_b, label_a, dice=dice)
    return loss_a + loss_b


def rampup(step, length):
    """Share of lam at a step: pseudo labels are noise at first [ours; SSL4MIS's curve]."""
    if step >= length:
        return 1.0
    return float(np.exp(-5 * (1 - step / length) ** 2))


# 3. Overlapping patches
# --------------------------------------------------------------------------------------------------
def overlapping_corners(rng, shape, patch, min_overlap):
    """Draw the corners of two patches of one volume that share at least `min_overlap` of a patch.

    rng: numpy Generator. shape, patch: voxels of each axis. Returns two int arrays within
    [0, shape - patch], 0 on an axis where the volume is smaller: both are padded alike there. They
    share the product, over the axes, of 1 - |d| / P, with offset d = corner2 - corner1. They are
    equal only where the volume, or a min_overlap close to 1, leaves no choice. [ours: d is bounded
    axis by axis, as drawing anew until a pair fits takes long]
    """
    patch = np.asarray(patch)
    room = np.maximum(np.asarray(shape) - patch, 0)  # for a corner, on each axis
    corner1 = rng.integers(0, room + 1)  # anywhere in the volume
    corner2 = corner1.copy()

    overlap = 1.0  # what the two share, if the axes that are still to come have no offset
    for axis in rng.permutation(len(patch)):  # in any order: the first one may move farthest
        least = min_overlap / overlap  # so much this axis must keep: 1 - |d| / P >= least
        reach = int(patch[axis] * (1 - least) + 1e-9)  # largest |d|; 1e-9: against rounding
        start = corner1[axis]
        choices = np.arange(max(0, start - reach), min(room[axis], start + reach) + 1)
        moved = choices[choices != start]
        if overlap == 1 and len(moved):  # not moved yet; equal crops would be plain CPS
            choices = moved
        corner2[axis] = rng.choice(choices)
        overlap *= 1 - abs(corner2[axis] - start) / patch[axis]
    return corner1, corner2


def overlap_slices(corner1, corner2, patch):
    """Where the overlap of two patches lies in each: image1[slices1] is image2[slices2], exactly.
    Returns two tuples of slices, in voxels of a patch. ValueError if there is no overlap."""
    offset = np.subtract(corner2, corner1)  # d
    size = patch - abs(offset)
    if np.any(size <= 0):
        raise ValueError(f"patches at {corner1} and {corner2} do not overlap")
    slices1 = box_at(np.maximum(offset, 0), size)  # begins at d, where d is positive
    slices2 = box_at(np.maximum(-offset, 0), size)  # begins at -d, where d is negative
    return slices1, slices2


def box_at(corner, shape):
    """Slices that cut a box of a shape out of an array."""
    return tuple(slice(low, low + size) for low, size in zip(corner, shape))


def cut_box(volume, corner, shape, outside):
    """Cut a box out of a volume (X, Y, Z), maybe memory-mapped: only the box is read. It may reach
    beyond the volume, at a negative corner too: `outside` is filled in there."""
    result = np.full(shape, outside)  # the type of `outside` is that of the box
    low = np.clip(corner, 0, volume.shape)  # of what lies inside the volume
    high = np.clip(corner + shape, 0, volume.shape)
    size = high - low
    result[box_at(low - corner, size)] = volume[box_at(low, size)]
    return result


class Patches(Dataset):
    """The batches of a training: item i is the batch of step i, a dict.

    labelled: float32 (B, 1, *P); target: int16 (B, *P), a class or -1 on padding. Of the n
    unlabelled pairs (n = B, or 0 for `supervised`): crops_a and crops_b, float32 (n, 1, *P);
    valid: bool (n, *P), False where A's crop is padding; overlaps: n pairs of slices, A's and B's.
    """

    def __init__(self, config, split, ids, rank=0):
        self.config = config
        self.patch = np.array(config.patch)
        self.split = split  # {"labelled": cases, "unlabelled": cases, ...} of section 8
        # Of a label id, 0 to 255. Padding is -1: its entry, [-1], is the last one, and stays -1.
        self.class_of = np.full(257, -1, np.int16)
        for number, label in enumerate((0, *ids)):
            self.class_of[label] = number
        self.rank = rank  # number of this process

    def __getitem__(self, step):
        config = self.config
        pairs = 0 if config.method == "supervised" else config.batch
        batch = {
            "labelled": torch.zeros(config.batch, 1, *config.patch),
            "target": torch.zeros(config.batch, *config.patch, dtype=torch.int16),
            "crops_a": torch.zeros(pairs, 1, *config.patch),
            "crops_b": torch.zeros(pairs, 1, *config.patch),
            "valid": torch.zeros(pairs, *config.patch, dtype=torch.bool),
            "overlaps": [],
        }
        for i in range(config.batch):
            # All chance comes from (seed, step, number): any step can be made again, alone.
            number = self.rank * config.batch + i  # of the patch, over all processes
            rng = np.random.default_rng((config.seed, step, number))
            # Both first: which unlabelled case it is must not depend on the labelled one.
            which, which_unlabelled = rng.random(2)

            cases = self.split["labelled"]
            case = cases[int(which * len(cases))]
            centred = (step + number) % 2 == 1  # every other patch
            corner = self.labelled_corner(case, rng, centred)
            images, targets = self.crops(case, rng, [corner])
            batch["labelled"][i, 0] = images[0]
            batch["target"][i] = targets[0]
            if not pairs:
                continue

            cases = self.split["unlabelled"]
            case = cases[int(which_unlabelled * len(cases))]
            shape = case.array("image").shape
            corners = overlapping_corners(rng, shape, self.patch, config.min_overlap)
            if config.method == "cps":  # equal crops; their intensities still differ
                corners = (corners[0], corners[0])
            images, targets = self.crops(case, rng, corners)
            slices = overlap_slices(*corners, self.patch)

            a = step % 2  # A sees the first crop in even steps, the second one in odd steps
            b = 1 - a
            batch["crops_a"][i, 0] = images[a]
            batch["crops_b"][i, 0] = images[b]
            batch["valid"][i] = targets[a] >= 0  # -1 on padding; on the overlap, b's is the same
            batch["overlaps"].append((slices[a], slices[b]))
        return batch

    def labelled_corner(self, case, rng, centred):
        """A patch anywhere, or `centred` on a voxel of a random class, for small organs [nnU-Net].
        Where a label lies is asked of labelled cases only: of others it would be a leak."""
        room = np.maximum(case.array("image").shape - self.patch, 0)
        corner = rng.integers(0, room + 1)
        points = case.array("points")  # int32 (n, 4): label id, x, y, z
        if centred and len(points):
            label = rng.choice(np.unique(points[:, 0]))
            points = points[points[:, 0] == label]
            centre = points[rng.integers(len(points)), 1:]
            corner = np.clip(centre - self.patch // 2, 0, room)
        return corner

    def crops(self, case, rng, corners):
        """Images float32 and targets int16, a tensor (x, y, z) for each of one or two corners.

        They are cut out of one box that is turned and mirrored as a whole, so that their overlap
        stays a box. Intensities are changed apart. Targets: class, -1 on padding; unlabelled: 0.
        """
        low = np.min(corners, axis=0)  # of the box around them
        size = np.max(corners, axis=0) + self.patch - low
        image = case.array("image")
        label = np.broadcast_to(np.uint8(0), image.shape)  # zeros, without memory
        if case.label:
            label = case.array("label")

        matrix = spatial_matrix(rng, case.spacing, self.config.spatial)
        image = warped_box(image, low, size, matrix, outside=np.float32(0))  # 0 is the mean
        label = warped_box(label, low, size, matrix, outside=np.int16(-1))  # on padding
        for axis, name in enumerate("xyz"):
            if name in self.config.mirror and rng.random() < 0.5:
                image = np.flip(image, axis)
                label = np.flip(label, axis)

        images = []
        targets = []
        for corner in corners:
            inside = box_at(corner - low, self.patch)
            changed = augment(image[inside], rng, self.config.intensity)
            images.append(torch.from_numpy(changed))
            targets.append(torch.from_numpy(self.class_of[label[inside]]))
        return images, targets


# 4. The networks
# --------------------------------------------------------------------------------------------------
class Norm(nn.GroupNorm):
    """Instance norm with a weight and a bias for each channel [nnU-Net]. A group norm of groups of
    one channel is the same, and faster on a CPU; on a GPU autocast would run it in fp32."""

    def __init__(self, channels):
        super().__init__(channels, channels)

    def forward(self, x):
        if x.is_cuda:
            return F.instance_norm(x, weight=self.weight, bias=self.bias)
        return super().forward(x)


class Block(nn.Sequential):
    """Twice convolution, norm, LeakyReLU [nnU-Net]. No bias: the norm would undo it."""

    def __init__(self, c_in, c_out, stride=1):
        super().__init__(
            nn.Conv3d(c_in, c_out, 3, stride, padding=1, bias=False),
            Norm(c_out),
            nn.LeakyReLU(0.01, inplace=True),
            nn.Conv3d(c_out, c_out, 3, padding=1, bias=False),
            Norm(c_out),
            nn.LeakyReLU(0.01, inplace=True),
        )


class UNet3D(nn.Module):
    """Plain 3D U-Net: (B, C, X, Y, Z), sizes divisible by 2^(levels-1), to logits (B, K, X, Y, Z).
    [nnU-Net, without deep supervision]"""

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

        skips.pop()  # of the coarsest level: that is x
        for up, merge in zip(self.up, self.merge):
            x = up(x)
            x = torch.cat((x, skips.pop()), dim=1)
            x = merge(x)

        return self.head(x)


def make_pair(config, num_classes):
    """Networks A and B: one structure [paper], two random draws of the weights, biases 0 [ours]."""
    draws = {"he": nn.init.kaiming_normal_, "xavier": nn.init.xavier_normal_}
    networks = []
    for number, init in enumerate(("he", config.init_b)):
        with torch.random.fork_rng(devices=[]):  # leaves the caller's generator alone
            # Of one seed, A and B would begin as one network: only their crops would differ.
            torch.manual_seed(2 * config.seed + number)
            network = UNet3D(num_classes, config.base_channels, config.levels)
            for name, parameter in network.named_parameters():
                if parameter.ndim == 5:  # a convolution; the norms begin as 1 and 0
                    draws[init](parameter)
                elif name.endswith("bias"):
                    nn.init.zeros_(parameter)
        networks.append(network)
    return networks


# 5. Training
# --------------------------------------------------------------------------------------------------
def train_step(networks, optimisers, batch, lam, config, scaler, autocast):
    """The heart: one optimiser step of A and of B on a batch of `Patches`.

    Returns float (6,), on the device, as to read it would wait for a GPU: L_sup(A) + L_sup(B),
    L_cps, the two of `agreement`, the mean overlap as a share of a crop, and 1 for a step that
    counts.
    """
    network_a, network_b = networks
    target = batch["target"].long()  # (B, x, y, z)
    sizes = (len(target), len(batch["crops_a"]))  # B and n

    # One forward for labelled patches and crops: instance norm keeps them apart.
    with autocast:
        logits_a = network_a(torch.cat((batch["labelled"], batch["crops_a"])))  # (B + n, K, *P)
        logits_b = network_b(torch.cat((batch["labelled"], batch["crops_b"])))
    labelled_a, crops_a = logits_a.split(sizes)  # (B, K, *P), (n, K, *P)
    labelled_b, crops_b = logits_b.split(sizes)

    # Both networks learn the true labels.
    sup = dice_ce_loss(labelled_a, target) + dice_ce_loss(labelled_b, target)

    # On the overlap of its crops, a pair learns from each other. Means over the pairs.
    cps = sup.new_zeros(())  # L_cps; stays 0 for `supervised`
    watched = sup.new_zeros(3)  # the two of `agreement`, and the overlap as a share of a crop
    with_dice = config.pseudo_loss == "dice_ce"
    for i, (slices_a, slices_b) in enumerate(batch["overlaps"]):
        overlap_a = crops_a[i : i + 1][(..., *slices_a)]  # (1, K, x, y, z)
        overlap_b = crops_b[i : i + 1][(..., *slices_b)]  # the same voxels
        valid = batch["valid"][i : i + 1][(..., *slices_a)]  # (1, x, y, z)
        cps = cps + cross_pseudo_loss(overlap_a, overlap_b, valid, with_dice) / len(crops_a)

        equal, foreground = agreement(overlap_a, overlap_b, valid)
        share = sup.new_tensor(valid.numel() / math.prod(config.patch))
        watched = watched + torch.stack((equal, foreground, share)) / len(crops_a)

    loss = sup + lam * cps  # L
    scale = scaler.get_scale()  # of fp16 gradients, where a step waits for the GPU; 1 elsewhere
    scaler.scale(loss).backward()  # one backward for both networks: no graph connects them
    for network, optimiser in zip(networks, optimisers):
        scaler.unscale_(optimiser)  # the norm is of true gradients
        nn.utils.clip_grad_norm_(network.parameters(), config.grad_clip or inf)
        scaler.step(optimiser)
        optimiser.zero_grad(set_to_none=True)
    scaler.update()

    row = torch.stack((sup, cps, *watched, torch.ones_like(sup))).detach()
    if scaler.get_scale() < scale:  # fp16 overflowed, so that A or B made no step: not counted
        row = torch.zeros_like(row)
    return row


def agreement(overlap_a, overlap_b, valid):
    """Signs of collapse, on an overlap without its padding: the share of voxels on which A and B
    agree, and the share of foreground in their pseudo labels. Logits (1, K, x, y, z); scalars."""
    label_a = pseudo_label(overlap_a)  # (1, x, y, z)
    label_b = pseudo_label(overlap_b)
    count = valid.sum().clamp(min=1)  # voxels
    equal = ((label_a == label_b) & valid).sum() / count
    foreground_a = ((label_a > 0) & valid).sum() / count
    foreground_b = ((label_b > 0) & valid).sum() / count
    return equal, (foreground_a + foreground_b) / 2


def train(config):
    """Train a pair of networks: a new run, or one that goes on where it stopped.

    Returns a dict: best_dice (of validation), checkpoint (a path), steps, results of the test (or
    validation) cases, and more. Raises KeyboardInterrupt when a signal stopped it, once saved.
    """
    with open_run(config) as run:  # data, networks, optimisers: section 12
        for batch in run.batches():
            # Schedule
            epoch = run.step // config.epoch_steps
            lr = config.lr * 0.5 ** (epoch // config.halve_epochs)
            for optimiser in run.optimisers:
                optimiser.param_groups[0]["lr"] = lr
            lam = config.lam * rampup(run.step, config.rampup * run.steps)

            # Step. run.trained: A and B, as --compile or torchrun wrap them
            run.sums += train_step(
                run.trained, run.optimisers, batch, lam, config, run.scaler, run.autocast
            )
            run.step += 1

            # Evaluate, log, save
            if run.step % config.epoch_steps == 0:
                done = epoch + 1  # epochs
                score = nan
                if done % config.validate_epochs == 0 or done == config.epochs:
                    score = mean_dice(validate(run, run.split["val"]))
                run.log(lr, lam, score)
                if score > run.best:
                    run.best = score
                    run.save("best.pt")
                run.save("last.pt")

            if run.asked_to_stop():
                run.save("last.pt")
                raise KeyboardInterrupt(f"step {run.step} is saved; run this again with --resume")

        # If no case chose a checkpoint, or no step was left that could have: the last one.
        if not run.split["val"] or not run.path("best.pt").exists():
            run.best = mean_dice(validate(run, run.split["val"]))
            run.save("best.pt")
    return report(run)


# 6. Inference
# --------------------------------------------------------------------------------------------------
@torch.inference_mode()
def sliding_window(
    networks, volume, patch, num_classes, overlap=0.5, device="cpu", shape=None, slab_bytes=2**29
):
    """Segment a preprocessed volume, float (X, Y, Z), of any size: classes, uint8 (X, Y, Z).

    A voxel gets the class of the largest mean softmax, over the windows around it (weighted by a
    Gaussian) and the networks. shape: size of the result, where it differs: probabilities are
    interpolated to it, and the outer edges of both grids coincide. Of the (K, X, Y, Z) sums only a
    slab exists, so that they do not grow with the length of the scan; one larger than `slab_bytes`
    lies on the host [ours: FLARE allows a card 2048 MiB].
    """
    patch = np.asarray(patch)
    result = np.zeros(shape or volume.shape, np.uint8)
    # Where the slices of the result lie among those of the volume: 2.5 is midway from 2 to 3.
    depth = volume.shape[2]
    position = (np.arange(result.shape[2]) + 0.5) * depth / result.shape[2] - 0.5
    position = position.clip(0, depth - 1)

    sums = window_sums(networks, volume, patch, num_classes, overlap, device, slab_bytes)
    for z, plane in enumerate(sums):  # (K, X, Y)
        # The argmax needs no division by the sum of the weights: all classes of a voxel share it.
        # Interpolation does, as neighbours have different sums. Each softmax sums to 1, so all
        # classes together, plane.sum(0), are the sum of the weights, for each network.
        if result.shape != volume.shape:
            plane = plane / plane.sum(0)
            plane = F.interpolate(plane[None], result.shape[:2], mode="bilinear")[0]
        if z == 0:
            before = plane
        for i, place in enumerate(position):
            if z - 1 < place <= z:  # after the plane before; at this one, if the grids are equal
                mixed = torch.lerp(before, plane, float(place) - (z - 1))
                result[:, :, i] = mixed.argmax(0).byte().cpu()
        before = plane
    return result


def window_sums(networks, volume, patch, num_classes, overlap, device, slab_bytes):
    """Yield, slice by slice along z, the sums of softmax x Gaussian over all windows: float32
    (K, X, Y).

    Windows that begin in the same slice are visited together. Then all slices are finished that
    lie before the next windows: they are given away, and never exist all at once.
    """
    size_x, size_y, size_z = volume.shape
    missing = np.maximum(patch - volume.shape, 0)
    if missing.any():  # a smaller volume is padded at its end
        volume = np.pad(volume, [(0, size) for size in missing])
    scan = torch.from_numpy(volume).to(device)  # once; windows are cut out there
    if scan.is_cuda:
        scan = scan.half()  # float16, as in the cache of the training

    starts = []  # of windows on each axis: after (1 - overlap) of a patch, the last at the end
    for size, width in zip(volume.shape, patch):
        step = max(1, int(width * (1 - overlap)))
        starts.append([*range(0, size - width, step), size - width])
    starts_x, starts_y, starts_z = starts
    # Where the windows lie in a slab.
    boxes = [box_at((x, y, 0), patch) for x, y in itertools.product(starts_x, starts_y)]

    shape = (num_classes, *volume.shape[:2], patch[2])
    large = 4 * math.prod(shape) > slab_bytes  # float32
    slab = torch.zeros(shape, device="cpu" if large else device)  # (K, X, Y, z)
    weight = gaussian(patch).to(device)
    at_once = 1 if scan.is_cuda else 2  # on a CPU, one small one takes 6 times as long [measured]

    for z, next_z in itertools.pairwise([*starts_z, volume.shape[2]]):
        ahead = scan[:, :, z:]  # boxes count from here, as the slab does
        for i in range(0, len(boxes), at_once):
            some = boxes[i : i + at_once]
            windows = torch.stack([ahead[box] for box in some])[:, None].float()
            windows = windows.expand(at_once, 1, *patch)  # an odd last one twice; zip drops it
            add_windows(slab, some, networks, windows, weight)

        done = next_z - z
        for i in range(min(done, size_z - z)):  # without padding
            yield slab[:, :size_x, :size_y, i].clone()
        left = patch[2] - done
        for sums in slab:  # moves on; class by class, as a copy of all is large
            sums[..., :left] = sums[..., done:].clone()
            sums[..., left:] = 0


def add_windows(slab, boxes, networks, windows, weight):
    """Add softmax x weight of the windows at some boxes to a slab. (In a function of its own: when
    it returns, the logits are freed, and the next ones have room.)"""
    for network in networks:
        for box, logits in zip(boxes, network(windows)):  # (K, *P)
            prob = logits.float().softmax(0).mul_(weight)
            slab[(..., *box)] += prob.to(slab.device)


def gaussian(patch):
    """Weights (x, y, z) of the voxels of a window: a Gaussian, about 1 at the centre, which sees
    most of its surroundings; its sd is an eighth of the patch; never below 0.001 [nnU-Net]."""
    curves = []
    for size in patch:
        offset = (np.arange(size) - (size - 1) / 2) / (size / 8)  # in standard deviations
        curves.append(np.exp(-0.5 * offset**2))
    x, y, z = curves
    weight = x[:, None, None] * y[:, None] * z
    return torch.tensor(weight).float().clamp(min=1e-3)


def largest_components(labels, ids):
    """Keep only the largest component (of voxels that share a face) of the labels in `ids`; others
    stay as they are. labels: uint8 (X, Y, Z). Returns a new array."""
    kept = labels.copy()
    for label, place in label_boxes(labels).items():
        if label in ids:
            components, _ = ndimage.label(labels[place] == label)  # 0 where the label is not
            sizes = np.bincount(components.ravel())
            largest = sizes[1:].argmax() + 1
            others = (components > 0) & (components != largest)
            kept[place][others] = 0  # kept[place] is a view
    return kept


def segment(run, volume, shape=None, networks="a", largest=True):
    """Label ids uint8 of a preprocessed volume (X, Y, Z), on its grid or interpolated to `shape`.
    networks: a [CPS], b, or both: the mean of their softmax. largest: keep one component of the
    labels that are in one piece in the training labels [ours]."""
    chosen = {"a": run.networks[:1], "b": run.networks[1:], "both": run.networks}[networks]
    ids = np.array([0, *run.ids], np.uint8)  # of the classes
    patch = run.config.patch
    with run.autocast:
        classes = sliding_window(chosen, volume, patch, len(ids), device=run.device, shape=shape)
    labels = ids[classes]
    if largest:
        labels = largest_components(labels, run.one_piece)
    return labels


# 7. Dice
# --------------------------------------------------------------------------------------------------
def dice(pred, ref):
    """Dice coefficient of two bool arrays: 1 if both are empty, 0 if one is [FLARE22]."""
    size = np.count_nonzero(pred) + np.count_nonzero(ref)  # voxels
    if size == 0:
        return 1.0
    return 2 * np.count_nonzero(pred & ref) / size


def validate(run, cases):
    """Dice of network A: a table float (cases, labels), NaN where a case does not hold the label.
    To count 1 there would reward a network that never finds a rare organ."""
    table = np.full((len(cases), len(run.ids)), nan)
    for row, case in zip(table, cases):  # a row is a view
        ref = case.array("label")
        pred = segment(run, case.array("image"))
        for i, label in enumerate(run.ids):
            if np.any(ref == label):
                row[i] = dice(pred == label, ref == label)
    return table


def mean_dice(table):
    """What chooses the checkpoint: a mean over the cases that hold a label, then over the labels;
    NaN if there is no case. [ours]"""
    means = []
    for column in table.T:
        known = column[~np.isnan(column)]
        if len(known):
            means.append(known.mean())
    return float(np.mean(means)) if means else nan


# Part two: the workshop
# ==================================================================================================


# 8. Scans
# --------------------------------------------------------------------------------------------------
CACHE_VERSION = 4  # of what the files of the cache hold
PARTS = ("labelled", "unlabelled", "val", "test")


@dataclass
class Case:
    """One scan."""

    name: str
    image: Path
    label: Path | None = None  # None where there is none, or where training must not read it
    prepared: str = ""  # once prepared: its files in the cache begin with this
    spacing: tuple = ()  # mm of x, y, z on the prepared grid
    facts: dict | None = None  # see `fill_cache`

    def array(self, part):
        """Memory-mapped: image float16 (X, Y, Z); of a labelled case also label uint8 (X, Y, Z)
        and points int32 (n, 4), of which a row is a label id and the x, y, z of a voxel of it."""
        path = f"{self.prepared}.{part}.npy"
        return np.load(path, mmap_mode="c")  # private copy: torch wants to write


def atomic(path, save, *args):
    """Call save(temporary, *args), a name in a folder of its own; then rename that to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with blame(path, "cannot be written", "make room or change it", OSError):
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
            temporary = Path(folder, path.name)
            save(temporary, *args)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())  # on disk before it gets its name
            temporary.replace(path)  # a crash leaves the old file or the new one, no half


def list_scans(path, images=False, ids=()):
    """{case name: path} of a NIfTI file or of a folder of them.

    images: nnU-Net's channel `_0000` is not in a name, if all images of the folder end in it and
    the whole stem is no name of a label (`ids`).
    """
    path = Path(path)
    need(path.exists(), f"{path}: does not exist; check the path")
    files = {}
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        match = re.fullmatch(r"(?is)([^.].*?)\.nii(\.gz)?", file.name)
        if match:
            files[file] = match[1]
    need(files, f"{path}: no .nii or .nii.gz file here; give a scan or a folder of scans")
    stems = set(files.values())

    # Two channels of a case are refused. (One such pair alone may be two cases.)
    others = stems - set(ids)
    seconds = [stem[:-5] for stem in sorted(others) if stem.endswith("_0001")]
    pairs = [name for name in seconds if f"{name}_0000" in others]
    several = images and (len(pairs) > 1 or not set(ids).isdisjoint(pairs))
    need(not several, f"{path}: {pairs[:3]} have channels _0000, _0001; keep one channel a case")

    strip = images and all(stem.endswith("_0000") for stem in stems)
    scans = {}
    for file, name in files.items():
        if strip and name not in ids:
            name = name.removesuffix("_0000")
        need(name not in scans, f"{file}: of the same case as {scans.get(name)}; keep one of them")
        scans[name] = file
    return scans


def list_cases(images, labels=None):
    """The cases of a folder of images, and of the folder of their labels if there is one."""
    label_files = {}
    if labels:
        label_files = list_scans(labels)
    image_files = list_scans(images, images=True, ids=label_files)
    lost = sorted(label_files.keys() - image_files.keys())
    need(not lost, f"{images}: add images {lost[:5]}, which have a label, or mend their names")
    return [Case(name, file, label_files.get(name)) for name, file in image_files.items()]


def split_cases(config):
    """The cases of config.data: {"labelled", "unlabelled", "val", "test"}, each a list of Case."""
    root = Path(config.data)
    training = list_cases(root / "imagesTr", root / "labelsTr")
    others = []
    for folder in (*root.glob("imagesUn"), *config.unlabelled):
        others += list_cases(folder)
    tests = []
    if (root / "imagesTs").exists() and (root / "labelsTs").exists():
        tests = [case for case in list_cases(root / "imagesTs", root / "labelsTs") if case.label]

    # Two hospitals may both have a ct_0: then the folder becomes part of the name.
    count = Counter(case.name for case in training + others + tests)
    cases = {case.name: case for case in training}
    for case in others + tests:
        if count[case.name] > 1:
            folder = case.image.parent
            if folder.is_relative_to(root):  # DATA may move
                folder = folder.relative_to(root)
            else:
                folder = folder.resolve()
            case.name = "-".join((*folder.parts[-2:], case.name))
        twin = cases.setdefault(case.name, case)
        remedy = "rename its folder, or name it once"
        need(twin is case, f"{case.image}: of the same name as {twin.image}; {remedy}")

    if config.split:
        parts = read_split(config.split, cases)
        if config.labelled:  # the first ones keep their labels
            given = len(parts["labelled"])
            few = f"--labelled {config.labelled}: {config.split} has {given}; give fewer"
            need(config.labelled <= given, few)
            parts["unlabelled"] += parts["labelled"][config.labelled :]
            parts["labelled"] = parts["labelled"][: config.labelled]
    else:
        parts = draw_split(config, [case.name for case in training if case.label])
        parts["unlabelled"] += sorted(case.name for case in training + others if not case.label)
    if not parts["test"]:
        parts["test"] = [case.name for case in tests]
    need(parts["labelled"], f"{config.split}: names no labelled case")
    enough = parts["unlabelled"] or config.method == "supervised"
    need(enough, f"{root}: no unlabelled image; add imagesUn, --unlabelled DIR or --labelled N")

    split = {part: [cases[name] for name in parts[part]] for part in PARTS}
    for case in split["unlabelled"]:
        case.label = None
    return split


def draw_split(config, names):
    """Names of labelled cases by part, drawn at random; the test cases are those of any seed."""
    known = np.random.default_rng(0).permutation(sorted(names)).tolist()
    counts = []
    for value in (config.test, config.val):  # below 1, a share
        counts.append(math.ceil(value if value >= 1 else value * len(known)))
    test, val = counts
    rest = np.random.default_rng((1, config.seed)).permutation(known[test:]).tolist()
    training = rest[val:]
    count = config.labelled or len(training)  # 0: all that are left
    enough = 0 < count <= len(training)
    need(enough, f"--labelled, --val, --test: want more than {len(known)} cases")
    return {
        "labelled": training[:count],
        "unlabelled": training[count:],  # they lose their labels
        "val": rest[:val],
        "test": known[:test],
    }


def read_split(path, cases):
    """Names by part of a split.json; UserError for one that is no case, or has no label to give."""
    with blame(path, "is no split", "give a split.json of a run"):
        found = json.loads(Path(path).read_text("utf-8"))
        parts = {part: list(found.get(part, [])) for part in PARTS}
        need(parts.keys() >= found.keys(), f"its parts are {[*found]}, known are {PARTS}")
        for part, names in parts.items():
            known = [name for name in cases if part == "unlabelled" or cases[name].label]
            unknown = sorted(set(names) - set(known))
            need(not unknown, f"its {part} cases {unknown[:5]} are not in DATA, or without a label")
        count = Counter(itertools.chain(*parts.values()))
        twice = [name for name in count if count[name] > 1]
        need(not twice, f"it names {twice[:5]} more than once")
    return parts


def geometry(scan):
    """Axes as of nibabel.io_orientation and mm (3,) of a nibabel image; UserError if impossible."""
    need(scan.get_data_dtype().kind in "iuf", f"its voxels are {scan.get_data_dtype()}")
    need(scan.ndim > 2 and {*scan.shape[3:]} <= {1}, f"its shape {scan.shape} is not 3D")
    spacing = nib.affines.voxel_sizes(scan.affine)  # never pixdim: there is one source
    axes = nib.io_orientation(scan.affine)
    possible = all(1e-3 < mm < 1e3 for mm in spacing) and not np.isnan(axes).any()
    need(possible, f"its spacing {spacing.round(6).tolist()} mm is impossible")
    return axes, spacing


def read_scan(path, is_label=False, canonical=True, like=None):
    """Read a NIfTI file: volume (X, Y, Z), float32 or uint8, spacing in mm (3,), nibabel image.

    canonical: turned to RAS+; else as in the file, for labels. like: an image on whose grid it
    must lie. UserError if it is no scan.
    """
    with blame(path, "cannot be used", "replace or mend the file"):
        scan = nib.load(path)
        axes, spacing = geometry(scan)
        if like is not None:
            check_grid(scan, like)
        volume = scan.dataobj
        scaled = (volume.slope, volume.inter) != (1, 0)
        if scaled or scan.get_data_dtype().kind == "f":
            volume = scan.get_fdata(dtype=np.float32, caching="unchanged")
        volume = np.asarray(volume).reshape(scan.shape[:3])  # whole numbers as they are
        finite = volume.size and np.isfinite([volume.min(), volume.max()]).all()
        need(finite, "it is empty, or holds NaN or infinity")
        if is_label:
            volume = to_labels(volume)
    if not canonical:
        return volume, spacing, scan

    # To RAS+, in one memory order: then sums, and so results, agree to the bit. Plane by plane, as
    # the processor's cache holds a plane: several times as fast as at once.
    volume = nib.apply_orientation(volume, axes)
    turned = np.empty(volume.shape, np.uint8 if is_label else np.float32)
    for y in range(volume.shape[1]):
        turned[:, y] = volume[:, y]
    return turned, spacing[np.argsort(axes[:, 0])], scan


def to_labels(volume):
    """Labels as uint8; UserError if they are no whole numbers from 0 to 255."""
    if volume.dtype.kind == "f":
        labels = volume.round().clip(0, 255).astype(np.uint8)
        wrong = volume[abs(volume - labels) > 1e-3]
    else:
        labels = volume.astype(np.uint8)
        wrong = volume[labels != volume]
    need(not wrong.size, f"labels {np.unique(wrong)[:3]} are no whole numbers from 0 to 255")
    return labels


def check_grid(scan, like):
    """Refuse a scan of which a corner lies over 0.1 voxels from that of the scan `like`."""
    shape = like.shape[:3]
    other = like.get_filename()
    need(scan.shape[:3] == shape, f"its shape is {scan.shape[:3]}, that of {other} is {shape}")
    ends = [(-0.5, size - 0.5) for size in shape]
    corners = np.array(list(itertools.product(*ends, [1])))  # (8, 4), homogeneous
    apart = corners @ (scan.affine - like.affine).T  # mm
    voxels = np.linalg.norm(apart @ np.linalg.inv(like.affine).T, axis=1)
    mm = np.linalg.norm(apart, axis=1)
    far = f"its grid is {voxels.max():.3g} voxels ({mm.max():.3g} mm) off that of {other}"
    need(voxels.max() <= 0.1, far)


def write_like(labels, scan, path):
    """Write RAS+ labels uint8 (X, Y, Z) as NIfTI in shape, orientation and geometry of a scan."""
    header = scan.header.copy()  # with its qform and sform
    header["cal_min"] = header["cal_max"] = 0  # the display window of the scan
    axes, sign = nib.io_orientation(scan.affine).T  # for each axis of the file
    labels = labels.transpose(axes.astype(int))
    labels = np.flip(labels, np.flatnonzero(sign < 0)).reshape(scan.shape)
    atomic(path, type(scan)(labels, None, header, dtype=np.uint8).to_filename)


def resample(volume, shape, mode="trilinear"):
    """Resample float32 (X, Y, Z) to a shape, edges aligned."""
    grid = torch.from_numpy(volume)[None, None]
    return F.interpolate(grid, tuple(shape), mode=mode)[0, 0].numpy()


def label_boxes(labels):
    """{label id: slices of the box around it} of the labels that there are, in their order."""
    boxes = enumerate(ndimage.find_objects(labels), start=1)
    return {label: box for label, box in boxes if box}


def resample_labels(labels, shape):
    """Resample label ids uint8 (X, Y, Z): each id's share linearly; the largest share wins.

    Nearest neighbours would cost a kidney-sized organ 0.02 Dice at 1.6 x 1.6 x 2.5 mm [measured].
    """
    if labels.shape == tuple(shape):
        return labels
    result = np.zeros(shape, np.uint8)
    most = resample((labels == 0).astype(np.float32), shape)
    for label in label_boxes(labels):
        share = resample((labels == label).astype(np.float32), shape)
        result[share > most] = label
        np.maximum(most, share, out=most)
    return result


def working_shape(shape, spacing, config, path):
    """Shape of a volume (X, Y, Z) at config.spacing; UserError if memory cannot hold it."""
    size = np.array(shape)
    if config.spacing:
        size = np.rint(shape * spacing / config.spacing).clip(1)
    size = tuple(int(n) for n in size)
    what = f"{shape} voxels of {spacing.round(4).tolist()} mm, {size} in --spacing {config.spacing}"
    fits = 16 * math.prod(size) < memory_bytes() or not config.check
    need(fits, f"{path}: has {what}: too many for the memory; change --spacing or the file")
    return size


def preprocess(volume, spacing, config, path):
    """Clip, resample, z-score of a volume [paper, scope ours], in place if it can: float32."""
    shape = working_shape(volume.shape, spacing, config, path)
    low, high = config.clip or np.percentile(volume, (0.5, 99.5))  # HU, or whatever unit
    np.clip(volume, low, high, out=volume)  # first: no implant spreads, or decides mean and sd
    if config.spacing:
        volume = resample(volume, shape)
    volume = torch.from_numpy(volume)
    std, mean = torch.std_mean(volume)  # over all voxels, air too
    need(std > 1e-6, f"{path}: constant from {low:g} to {high:g}; set --clip or remove it")
    return volume.sub_(mean).div_(std).numpy()


def doubts(volume, scan, config):
    """Sentences on what may be wrong with a scan that can be read."""
    found = []
    qform, _ = scan.get_qform(coded=True)  # None where its code is 0
    sform, _ = scan.get_sform(coded=True)
    if qform is None and sform is None:
        found.append("neither qform nor sform is set: left and right may be swapped")
    both = qform is not None and sform is not None
    if both and nib.aff2axcodes(qform) != nib.aff2axcodes(sform):
        found.append("qform and sform disagree: left and right may be swapped")

    if config.clip:
        low, high = config.clip
        some = volume.ravel()[::7]
        bright = some[some > some.mean()]  # not the air: of a CT + 1024 it lies in the window
        inside = np.count_nonzero((bright >= low) & (bright <= high))
        if inside < 0.1 * len(bright):
            what = f"hardly any tissue lies in --clip {low:g} {high:g}"
            found.append(f"{what}: use --clip auto, or undo an offset of the file")
    return found


def cache_prefix(case, config):
    """How the files of a case in the cache begin: other sources or settings, another name."""
    sources = []
    for path in (case.image, case.label):
        if path:
            stat = path.stat()
            sources.append((str(path.resolve()), stat.st_size, stat.st_mtime_ns))
    key = zlib.crc32(repr((sources, config.clip, config.spacing, CACHE_VERSION)).encode())
    return str(Path(config.cache) / f"{case.name}-{key}")


def prepare_case(case, config):
    """The case with its arrays in the cache, made only where they are missing, cut or stale."""
    case = dataclasses.replace(case, prepared=cache_prefix(case, config))
    try:
        case.facts = json.loads(Path(f"{case.prepared}.facts.json").read_text("utf-8"))
        for part in ("image", "label", "points") if case.label else ("image",):
            case.array(part)
    except (OSError, ValueError, EOFError):
        case.facts = fill_cache(case, config)
    case.spacing = tuple(case.facts["spacing"])
    return case


def fill_cache(case, config):
    """Write the arrays of a case; returns its facts, which are written last.

    spacing: mm (3,) of the arrays; native, shape: mm and voxels of the file, in RAS+; checksum,
    label_checksum; labels: {id: share of its voxels in its largest component}; warnings.
    """
    volume, spacing, scan = read_scan(case.image)
    facts = {
        "spacing": list(config.spacing or spacing),
        "native": list(spacing),
        "shape": list(volume.shape),
        "checksum": zlib.crc32(volume),
        "warnings": doubts(volume, scan, config),
    }
    image = preprocess(volume, spacing, config, case.image).astype(np.float16)  # to < 1 HU
    del volume
    atomic(f"{case.prepared}.image.npy", np.save, image)
    shape = image.shape
    del image

    if case.label:
        native = read_scan(case.label, is_label=True, like=scan)[0]
        labels = resample_labels(native, shape)
        points, facts["labels"] = label_points(labels)
        if labels is not native:  # on a coarse grid, neighbours grow together
            whole = label_points(native)[1]
            facts["labels"] = {label: whole[label] for label in facts["labels"]}
        facts["label_checksum"] = zlib.crc32(labels)
        lost = [label for label in label_boxes(native) if str(label) not in facts["labels"]]
        if lost:
            facts["warnings"].append(f"labels {lost} vanish at this --spacing; use a finer one")
        elif not facts["labels"]:
            facts["warnings"].append("no voxel is labelled")
        atomic(f"{case.prepared}.label.npy", np.save, labels)
        atomic(f"{case.prepared}.points.npy", np.save, points)
    atomic(f"{case.prepared}.facts.json", Path.write_text, json.dumps(facts), "utf-8")
    return facts


def label_points(labels):
    """Of each label up to 1000 voxels, int32 (n, 4): id, x, y, z; and the share of its voxels that
    lie in its largest component, {id as text: share}."""
    rng = np.random.default_rng(0)
    points = [np.zeros((0, 4), int)]
    shares = {}
    for label, box in label_boxes(labels).items():
        mask = labels[box] == label
        places = np.flatnonzero(mask)
        components, _ = ndimage.label(mask)
        sizes = np.bincount(components.ravel()[places])
        shares[str(label)] = sizes.max() / len(places)

        chosen = places[rng.permutation(len(places))[:1000]]
        xyz = np.transpose(np.unravel_index(chosen, mask.shape)) + [side.start for side in box]
        points.append(np.insert(xyz, 0, label, axis=1))
    return np.concatenate(points).astype(np.int32), shares


def cache_bytes(split, config):
    """Bytes of the cache: all, and those that are missing; and voxels of the largest scan.

    From the headers alone. A file that is broken counts nothing: it is named when it is read.
    """
    total = missing = largest = 0
    for case in itertools.chain(*split.values()):
        try:
            scan = nib.load(case.image)
            _, spacing = geometry(scan)
            shape = working_shape(scan.shape[:3], spacing, config, case.image)
            ready = Path(f"{cache_prefix(case, config)}.facts.json").exists()
        except Exception:
            continue
        voxels = math.prod(shape)
        size = voxels * (3 if case.label else 2)
        total += size
        if not ready:
            missing += size
        largest = max(largest, voxels, math.prod(scan.shape))
    return total, missing, largest


def prepare(split, config):
    """The split, all its cases checked and cached; the problems of all are reported in one go."""
    if RANK:
        barrier()  # the first process fills the cache, the others find it full
    with blame(f"--cache {config.cache}", "cannot be written", "choose another", OSError):
        Path(config.cache).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=config.cache).close()
    total, missing, largest = cache_bytes(split, config)
    free = shutil.disk_usage(config.cache).free
    sizes = f"{missing / 1e9:.3g} GB are to be written and {free / 1e9:.3g} GB are free"
    fits = missing <= free or not config.check
    need(fits, f"--cache {config.cache}: {sizes}; choose another disk, or --no-check")
    print(f"cache      {config.cache}, {total / 1e9:.3g} GB; {sizes}")
    volumes = memory_bytes() / (5 * 4 * max(largest, 1))  # that fit, 5 at float32 for a thread
    threads = int(max(1, min(volumes, os.cpu_count() or 1)))

    done = {}

    def one(name, case):
        done[name] = prepare_case(case, config)

    what = ", ".join(f"{len(cases)} {part}" for part, cases in split.items())
    cases = {case.name: case for case in itertools.chain(*split.values())}
    code = for_each(f"preparing {what}", cases, one, threads)
    need(not code, f"{config.data}: some cases cannot be used, see above; mend or remove them")
    if RANK == 0:
        barrier()
    prepared = {part: [done[case.name] for case in cases] for part, cases in split.items()}
    refuse_twins(prepared)
    warn_of(done.values(), config)
    return prepared


def refuse_twins(split):
    """Refuse a scan that is there twice: on both sides of a split it would be a leak. Of two
    unlabelled ones, only warn."""
    seen = {}
    for part, cases in split.items():
        for case in cases:
            voxels = (case.facts["checksum"], *case.facts["shape"])
            twin_part, twin = seen.setdefault(voxels, (part, case))
            if twin is not case or part != twin_part:
                sentence = f"{case.image}: has the same voxels as {twin.image}; remove one of them"
                if case.image.samefile(twin.image):
                    sentence = f"{case.image}: is named as {twin_part} and as {part}; name it once"
                need(part == twin_part == "unlabelled", sentence)
                warn(sentence)


def warn_of(cases, config):
    """Print what is odd about prepared cases, once for all that share it."""
    names = {}
    for case in cases:
        for sentence in case.facts["warnings"]:
            names.setdefault(sentence, []).append(case.name)
    for sentence, some in names.items():
        warn(f"{', '.join(some[:3])} ({len(some)} in all): {sentence}")

    native = np.array([case.facts["native"] for case in cases])  # (cases, 3), mm
    low, high = native.min(0), native.max(0)
    if not config.spacing and np.any(high > 2 * low):
        warn(f"voxels measure {low.round(2)} to {high.round(2)} mm; --spacing makes them equal")


# 9. Augmentation
# --------------------------------------------------------------------------------------------------
def spatial_matrix(rng, spacing, chance):
    """Rotation to 30 degrees and scale 0.7 to 1.4, each with this chance [nnU-Net]; None: neither.

    Returns (3, 3): offsets in voxels from the centre of a patch to those in the volume. The turn
    is made in mm, as uneven voxels would be sheared otherwise.
    """
    turned, scaled = rng.random(2) < chance
    if not turned and not scaled:
        return None
    matrix = np.eye(3)
    if turned:
        angles = rng.uniform(-30, 30, 3)
        matrix = spatial.transform.Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    if scaled:
        matrix = matrix * below_or_above_one(rng, 0.7, 1.4)
    return np.diag(1 / np.asarray(spacing)) @ matrix @ np.diag(spacing)


def below_or_above_one(rng, low, high):
    """A random number from low to high, below 1 in half of the cases [nnU-Net]."""
    if rng.random() < 0.5:
        return rng.uniform(low, 1)
    return rng.uniform(1, high)


def warped_box(volume, corner, shape, matrix, outside):
    """Cut a box out of a volume (X, Y, Z), turned by `spatial_matrix` around the box's centre.

    Images (float) are interpolated linearly, labels (whole numbers) by nearest neighbour.
    """
    if matrix is None:
        return cut_box(volume, corner, shape, outside)
    centre = shape // 2
    half = np.ceil(np.abs(matrix) @ (shape / 2)).astype(int) + 1  # of a box that covers it all
    wide = cut_box(volume, corner + centre - half, 2 * half + 1, outside)
    order = 1 if wide.dtype.kind == "f" else 0
    offset = half - matrix @ centre
    return ndimage.affine_transform(wide, matrix, offset, tuple(shape), order=order, cval=outside)


def augment(patch, rng, chance):
    """New float32 (x, y, z), intensities changed: kinds, chances and ranges of nnU-Net.

    patch: z-scored. chance: what the chance of each kind is multiplied by.
    """
    chances = np.array([0.1, 0.1, 0.15, 0.15, 0.125, 0.1, 0.3])
    drawn = rng.random(7) < chance * chances
    noise, blur, brightness, contrast, coarse, inverted, gamma = drawn
    if noise:
        patch = patch + rng.uniform(0, 0.1) * rng.standard_normal(patch.shape, np.float32)
    if blur:
        patch = ndimage.gaussian_filter(patch, rng.uniform(0.5, 1))  # sd in voxels
    if brightness:
        patch = patch * rng.uniform(0.75, 1.25)  # around 0, the mean
    if contrast:
        mean = patch.mean()
        changed = (patch - mean) * rng.uniform(0.75, 1.25) + mean
        patch = np.clip(changed, patch.min(), patch.max())
    if coarse:  # every n-th voxel, then back to size
        zoom = rng.uniform(0.5, 1)
        small = [max(1, round(size * zoom)) for size in patch.shape]
        patch = np.array(patch, np.float32)
        patch = resample(resample(patch, small, "nearest-exact"), patch.shape)
    if inverted:
        patch = -gamma_curve(-patch, rng)
    if gamma:
        patch = gamma_curve(patch, rng)
    return np.array(patch, np.float32)


def gamma_curve(patch, rng):
    """Raise the intensities, scaled to 0 to 1, to a random power; mean and sd are given back."""
    power = below_or_above_one(rng, 0.7, 1.5)
    low = patch.min()
    size = np.ptp(patch) + 1e-6
    curved = ((patch - low) / size) ** power
    return (curved - curved.mean()) / (curved.std() + 1e-6) * patch.std() + patch.mean()


# 10. Surfaces
# --------------------------------------------------------------------------------------------------
FLARE22 = {  # label: tolerance in mm [FLARE22]
    1: 5,  # liver
    2: 3,  # right kidney
    3: 3,  # spleen
    4: 5,  # pancreas
    5: 2,  # aorta
    6: 2,  # inferior vena cava
    7: 2,  # right adrenal gland
    8: 2,  # left adrenal gland
    9: 2,  # gallbladder
    10: 3,  # esophagus
    11: 5,  # stomach
    12: 7,  # duodenum
    13: 3,  # left kidney
}
FLARE22_TUBES = (5, 6, 10)
# Code of the 2x2x2 voxels at a corner: the normals of its triangles, times 8, a digit an axis.
SURFELS = {
    1: "111",
    3: "220 220",
    6: "111 111",
    7: "400 222 111",
    15: "400 400",
    22: "111 111 111",
    23: "111 222 111 222",
    24: "111 111",
    25: "022 022 111",
    27: "111 333 022 202",
    30: "400 111 111 222",
    60: "220 220 220 220",
    105: "111 111 111 111",
}


class Scores(NamedTuple):
    """Of one label in one case."""

    dice: float
    nsd: float  # surface Dice
    hd95: float  # mm; NaN where prediction or reference is empty
    held: bool  # the reference holds the label


@functools.cache  # all labels of a scan have the same
def surfel_areas(spacing):
    """float (256,): mm2 of surface at a voxel corner, by its code. spacing: a tuple, mm.

    Each code is a mirror, turn or complement of one of SURFELS. [google-deepmind/surface-distance]
    """
    areas = np.zeros(256)
    faces = np.prod(spacing) / np.array(spacing)  # mm2 of a voxel's face, across each axis
    turns = itertools.permutations(range(3))
    mirrors = itertools.product((1, -1), repeat=3)
    for axes, (i, j, k) in itertools.product(turns, mirrors):
        for code, triangles in SURFELS.items():
            normals = np.array([list(digits) for digits in triangles.split()], float) / 8
            area = np.linalg.norm(normals[:, axes] * faces, axis=1).sum()
            voxels = np.unpackbits(np.uint8(code)).reshape(2, 2, 2)
            twin = voxels.transpose(axes)[::i, ::j, ::k]
            areas[np.packbits(twin)] = area
            areas[np.packbits(1 - twin)] = area
    return areas


def corner_codes(mask):
    """Code uint8 (X+1, Y+1, Z+1) of each voxel corner: 128 to 1, in C order, for its 2x2x2 voxels.

    Between 0 and 255 on the surface of a bool mask (X, Y, Z).
    """
    code = np.pad(mask, 1).view(np.uint8)
    code = code[:, :, :-1] << 1 | code[:, :, 1:]
    code = code[:, :-1] << 2 | code[:, 1:]
    return code[:-1] << 4 | code[1:]


def surface_distances(pred, ref, spacing):
    """Distances between the surfaces of two bool arrays (X, Y, Z), neither empty.

    Returns two pairs, for the surface corners of pred and for those of ref: float (n,), mm to the
    nearest corner of the other surface, and float (n,), mm2 of surface at the corner.
    """
    box = ndimage.find_objects((pred | ref).view(np.uint8))[0]  # around both: it is enough
    codes = [corner_codes(pred[box]), corner_codes(ref[box])]
    on_surface = [code % 255 > 0 for code in codes]
    areas = surfel_areas(tuple(spacing))

    pairs = []
    for code, here, there in zip(codes, on_surface, on_surface[::-1]):
        distances = np.zeros(code.shape)
        alone = np.argwhere(here & ~there)  # all others are at a distance of 0
        corners = np.argwhere(there)
        tree = spatial.cKDTree(corners * spacing, leafsize=32, balanced_tree=False)
        nearest = tree.query(alone * spacing, workers=-1)[1]
        # Anew from whole numbers, so that a distance at the tolerance is not rounded beyond it.
        offsets = (alone - corners[nearest]) * spacing
        distances[here & ~there] = np.sqrt((offsets**2).sum(1))
        pairs.append((distances[here], areas[code[here]]))
    return pairs


def surface_scores(pred, ref, spacing, tolerance):
    """Surface Dice and 95 % Hausdorff distance of two bool arrays, from the same distances."""
    if not pred.any() or not ref.any():
        return float(pred.any() == ref.any()), nan
    near = 0.0  # mm2 of both surfaces
    total = 0.0
    hd95 = 0.0  # the larger of the two directions
    for distances, areas in surface_distances(pred, ref, spacing):
        near += areas[distances <= tolerance].sum()
        total += areas.sum()
        order = distances.argsort()
        share = areas[order].cumsum() / areas.sum()
        index = min(np.searchsorted(share, 0.95), len(order) - 1)
        hd95 = max(hd95, distances[order[index]])
    return float(near / total), float(hd95)


def surface_dice(pred, ref, spacing, tolerance):
    """Surface Dice (NSD) of two bool arrays (X, Y, Z): 1 if both are empty, 0 if one is.

    The share of the area of both surfaces that is within `tolerance` mm of the other one. spacing:
    mm, in array order. [google-deepmind/surface-distance, FLARE22]
    """
    return surface_scores(pred, ref, spacing, tolerance)[0]


def hausdorff95(pred, ref, spacing):
    """95 % Hausdorff distance in mm of two bool arrays (X, Y, Z): NaN if one is empty.

    Within it is 95 % of a surface's area. spacing: mm. [google-deepmind/surface-distance]
    """
    return surface_scores(pred, ref, spacing, 0)[1]


def evaluate_case(pred, ref, spacing, labels, tolerances, flare22=False):
    """{label: Scores} of two integer arrays (X, Y, Z), 0 to 255. spacing: mm, in array order.

    tolerances: mm, one for all, one for each, or {label: mm}. flare22: the rules of the challenge,
    but a tube on one slice is scored, no crash.
    """
    if not isinstance(tolerances, dict):
        tolerances = dict(zip(labels, np.broadcast_to(tolerances, len(labels))))
    both = np.stack((pred, ref))  # (2, X, Y, Z)
    boxes = ndimage.find_objects(both, 255)  # around a label in both; None: it is in neither
    results = {}
    for label in labels:
        box = boxes[label - 1] or np.s_[:, :0]  # in neither: no voxel
        p, r = both[(..., *box[1:])] == label  # bool, cut to the box
        if flare22 and label in FLARE22_TUBES and r.any():
            z = np.flatnonzero(r.any((0, 1)))
            slices = slice(z[0], max(z[-1], z[0] + 1))  # the challenge drops the last slice
            p = p[:, :, slices]
            r = r[:, :, slices]
        overlap = dice(p, r)
        nsd, hd95 = surface_scores(p, r, spacing, tolerances[label])
        if flare22:
            nsd = float(np.round(nsd * (overlap >= 0.2), 4))
            overlap = float(np.round(overlap, 4))
        results[label] = Scores(overlap, nsd, hd95, bool(r.any()))
    return results


def score_array(results):
    """float (cases, labels, 4) of {case: {label: Scores}}."""
    return np.array([list(scores.values()) for scores in results.values()], float)


def markdown(rows):
    """Text of a Markdown table; the first row is the head."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines)


def spread(values, digits=4):
    """Text of mean +- sd of some numbers, NaN left out."""
    known = np.array(values)[np.isfinite(values)]
    if len(known) == 0:
        return "-"
    text = f"{known.mean():.{digits}f}"
    if len(known) > 1:
        text += f" +- {known.std(ddof=1):.{digits}f}"
    return text


def table(results, head="2 mm", flare22=False):
    """Markdown of {case: {label: Scores}}: a row a label, over the n cases that hold the label.

    head: of the NSD. flare22: Dice and NSD over all cases, as in the challenge. The last row is the
    mean over the labels.
    """
    scores = score_array(results)
    held = scores[:, :, 3] > 0
    if not flare22:
        scores[~held] = nan

    rows = [("label", "n", "Dice", f"NSD ({head})", "HD95 mm")]
    for i, label in enumerate(next(iter(results.values()))):
        dices, nsds, distances, _ = scores[:, i].T
        n = np.count_nonzero(held[:, i])
        defined = np.count_nonzero(np.isfinite(distances))
        text = spread(distances, 2)
        if 0 < defined < n:
            text += f" (n = {defined})"
        rows.append((label, n, spread(dices), spread(nsds), text))
    means = [mean_dice(scores[:, :, column]) for column in range(3)]
    rows.append(("mean", "", f"{means[0]:.4f}", f"{means[1]:.4f}", f"{means[2]:.2f}"))
    return markdown(rows)


# 11. Phantom
# --------------------------------------------------------------------------------------------------
BODY = (  # no label; centre and radii in % of half the width, HU
    ((0, 0, 0), (100, 90, 400), -90),  # fat
    ((0, 0, 0), (90, 80, 400), 45),  # muscle
    ((0, -60, 0), (16, 18, 300), 350),  # spine
    ((-30, 42, 35), (30, 28, 36), 70),  # stomach
)
ORGANS = (  # labels 1 to 5
    ((42, 16, 42), (42, 50, 50), 110),  # liver
    ((-58, -14, 42), (26, 34, 42), 130),  # spleen
    ((40, -34, -50), (24, 24, 40), 170),  # right kidney: only its place tells which one it is
    ((-40, -34, -50), (24, 24, 40), 170),  # left kidney
    ((0, -20, 0), (14, 14, 300), 195),  # aorta
)


def phantom_volume(rng, shape=(56, 48, 48)):
    """A body in RAS+, each another: image float (X, Y, Z) in HU and label uint8 (X, Y, Z)."""
    axes = [np.linspace(-1.1, 1.1, n) for n in shape]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))  # (3, X, Y, Z)
    for coordinate in grid:  # a smooth random displacement: no outline is an ellipsoid
        size = rng.uniform(1.3, 3.7)
        coordinate += size * ndimage.gaussian_filter(rng.standard_normal(shape), 5)

    image = np.full(shape, -1000.0)  # air
    label = np.zeros(shape, np.uint8)
    phase = rng.uniform(0.7, 1.3)  # of the contrast agent
    for number, (centre, radii, hu) in enumerate(BODY + ORGANS, start=-3):
        shift = rng.uniform(-0.1, 0.1, 3)
        centre = np.divide(centre, 100)
        radii = np.divide(radii, 100)
        if number > -2:  # neither fat nor muscle
            centre += shift
            radii *= rng.uniform(0.75, 1.25, 3)
        x, y, z = [(g - c) / r for g, c, r in zip(grid, centre, radii)]
        inside = x**2 + y**2 + z**2 < 1  # of an ellipsoid
        image[inside] = hu * phase * rng.uniform(0.85, 1.15)
        label[inside] = max(0, number)

    image = ndimage.gaussian_filter(image, rng.uniform(0.4, 0.8))  # the scanner
    image += rng.uniform(-10, 10)
    noise = rng.uniform(20, 50)
    return image + rng.normal(0, noise, shape), label


def make_phantom(folder):
    """Write what is missing of it: 12 labelled (Tr), 24 unlabelled (Un), 8 test cases (Ts)."""
    for group, part, count in ((0, "Tr", 12), (1, "Un", 24), (2, "Ts", 8)):
        kinds = ("images",) if part == "Un" else ("images", "labels")
        for number in range(count):
            paths = [
                Path(folder, kind + part, f"phantom{part}{number:02}.nii.gz") for kind in kinds
            ]
            if all(path.exists() for path in paths):
                continue
            volumes = phantom_volume(np.random.default_rng((group, number)))
            for path, volume in zip(paths, volumes):
                volume = volume[::-1, ::-1].round().astype(np.int16)  # LPS: never RAS+ by luck
                scan = nib.Nifti1Image(volume, np.diag((-6, -6, 6, 1)))
                atomic(path, scan.to_filename)


# 12. Runs
# --------------------------------------------------------------------------------------------------
# Columns of the log: dice is that of a validation, seconds those of a step, validation included.
LOG = "step lr lam loss_sup loss_cps agreement foreground overlap dice seconds".split()
VERSION = 2  # of checkpoints
STATE = "ids one_piece step best rows sums cases patches".split()  # of a run, beside its parts
# Settings that may change on --resume; a loss that is not finite may want another lr.
MAY_CHANGE = "data unlabelled split cache preset batch epochs lr grad_clip".split()
MAY_CHANGE += "out resume device amp compile workers check".split()
WATTS = {"cpu": 100, "cuda": 400}  # of the machine that trains [assumed]
CARBON = 0.4  # kg of CO2 eq for a kWh [assumed]
RANK = int(os.environ["RANK"]) if "LOCAL_RANK" in os.environ else 0  # of torchrun; 0: the first
PROCESSES = int(os.environ["WORLD_SIZE"]) if "LOCAL_RANK" in os.environ else 1


class Run:
    """A training: all that changes in it, and what a checkpoint holds."""

    def __init__(self, config, ids, one_piece):
        self.config = config
        self.ids = list(ids)  # label id of class 1, 2, ...
        self.one_piece = list(one_piece)  # those of which `segment` keeps one component
        self.split = {}
        self.steps = config.epochs * config.epoch_steps
        self.stop = False  # a signal came

        self.device = device_of(config)
        gpu = self.device.type == "cuda"
        torch.backends.cudnn.benchmark = gpu  # one patch size: the search for kernels pays
        self.networks = make_pair(config, len(self.ids) + 1)
        for network in self.networks:
            network.to(self.device)
            if not gpu:  # 1.4 times as fast; on a GPU the norm would transpose twice
                network.to(memory_format=torch.channels_last_3d)
        self.trained = self.networks  # or what --compile and torchrun make of them
        rule = {"momentum": config.momentum, "weight_decay": config.weight_decay, "nesterov": True}
        self.optimisers = [torch.optim.SGD(n.parameters(), **rule) for n in self.networks]

        amp = gpu and config.amp
        bf16 = amp and torch.cuda.get_device_capability(self.device) >= (8, 0)
        half = torch.bfloat16 if bf16 else torch.float16
        self.autocast = torch.autocast(self.device.type, half, enabled=amp)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp and not bf16)

        self.step = 0
        self.best = -1.0  # Dice of validation in best.pt
        self.rows = []  # of the log
        self.sums = torch.zeros(6, device=self.device)  # of the rows of train_step in this epoch
        self.cases = {}  # part: name: checksums
        self.patches = config.batch * PROCESSES  # labelled ones of a step

    def path(self, name):
        """Path of a file in the run folder."""
        return Path(self.config.out) / name

    def parts(self):
        """What has a state of its own."""
        return [*self.networks, *self.optimisers, self.scaler]

    def save(self, name):
        """Write a checkpoint: plain values and tensors, no code."""
        self.need_finite()
        if RANK:
            return
        state = {key: getattr(self, key) for key in STATE}
        state["version"] = VERSION
        state["config"] = dataclasses.asdict(self.config)
        state["parts"] = [part.state_dict() for part in self.parts()]
        file = io.BytesIO()  # by way of memory: torch hides that a disk is full
        torch.save(state, file)
        atomic(self.path(name), Path.write_bytes, file.getbuffer())

    @classmethod
    def load(cls, path, **changes):
        """The run of a checkpoint, some fields of its config changed. Code in it is not run."""
        Config(**changes)  # an impossible flag is not the fault of the checkpoint
        with blame(path, "cannot be loaded", "give best.pt or last.pt of a run"):
            need(not zipfile.ZipFile(path).testzip(), "it is damaged")  # torch would not notice
            state = torch.load(path, map_location="cpu", weights_only=True)
            version = isinstance(state, dict) and state.get("version")
            need(version == VERSION, "it is not from this version of cps.py")
            config = Config(**state.pop("config") | changes)
            run = cls(config, state["ids"], state["one_piece"])
            for part, saved in zip(run.parts(), state.pop("parts"), strict=True):
                if saved:  # a scaler that was off has none
                    part.load_state_dict(saved)
            state["sums"] = state["sums"].to(run.device)
            for key in STATE:
                setattr(run, key, state[key])
        return run

    def batches(self):
        """The batches of the steps that are left, on the device."""
        gpu = self.device.type == "cuda"
        workers = self.config.workers if gpu else 0
        loader = DataLoader(
            Patches(self.config, self.split, self.ids, RANK),
            batch_size=None,
            sampler=range(self.step, self.steps),
            num_workers=workers,
            worker_init_fn=leave_signals_to_the_parent,
            pin_memory=gpu,
            timeout=600 if workers else 0,  # s; where shared memory is full, a batch never comes
        )
        first = self.step
        start = time.monotonic()
        self.row_step = first  # where the next row of the log begins: in mid-epoch, if resumed
        self.row_start = start
        for batch in loader:
            for key, value in batch.items():
                if key != "overlaps":
                    batch[key] = value.to(self.device, non_blocking=True)
            yield batch
            progress("step", self.step - first, self.steps - first, start)
            if gpu and self.step == first + 1:  # the first step tries kernels
                torch.cuda.reset_peak_memory_stats(self.device)

    def need_finite(self):
        """A loss that is not finite ends the run; the last checkpoint stays."""
        remedy = "go on from the last checkpoint with --resume and a lower --lr, or --no-amp"
        need(self.sums.isfinite().all(), f"{self.config.out}: the loss is not finite; {remedy}")

    def log(self, lr, lam, score):
        """Add the row of an epoch to log.csv, and print it."""
        if distributed.is_initialized():
            distributed.all_reduce(self.sums)
        self.need_finite()
        *sums, count = self.sums.tolist()  # waits for a GPU
        need(count, f"{self.config.out}: no step of this epoch had a finite loss; use --no-amp")
        skipped = self.config.epoch_steps - count / PROCESSES  # the gradients of all are one
        means = [value / count for value in sums]
        if self.config.method == "supervised":
            means[1:] = [nan] * (len(means) - 1)
        now = time.monotonic()
        seconds = (now - self.row_start) / (self.step - self.row_step)
        self.row_step = self.step
        self.row_start = now
        self.rows.append((self.step, lr, lam, *means, score, seconds))
        self.sums.zero_()
        if RANK:
            return
        write_csv(self.path("log.csv"), [LOG, *self.rows])
        left = timedelta(seconds=int(seconds * (self.steps - self.step)))
        numbers = [f"{value:10.4g}" for value in self.rows[-1][1:]]
        print(f"{self.step:10}", *numbers, left, flush=True)
        if skipped:
            print(f"{skipped:.0f} steps overflowed in fp16 and were skipped")

    def asked_to_stop(self):
        """Whether a signal came; the processes of torchrun agree on it, each tenth step."""
        if not distributed.is_initialized():
            return self.stop
        if self.step % 10:
            return False
        stop = torch.tensor(float(self.stop), device=self.device)
        distributed.all_reduce(stop, distributed.ReduceOp.MAX)
        return bool(stop)


@contextmanager
def open_run(config):
    """The run of a config, new or resumed, with its data; its folder locked, signals noted."""
    last = Path(config.out) / "last.pt"
    fresh = not last.exists()
    need(RANK or config.resume or fresh, f"{config.out}: holds a run; --resume or other --out")
    check_memory(config, 2)  # or more classes: they are not known yet
    barrier()  # the others write only after these checks
    split = prepare(split_cases(config), config)  # all is checked before anything is trained
    ids = label_ids(split)
    need(ids, f"{config.data}: all labels are empty; there is nothing to learn")
    counted = check_memory(config, len(ids) + 1)

    with locked(Path(config.out)):
        if fresh:
            run = Run(config, ids, one_piece(split["labelled"], ids))
            run.cases = fingerprint(split)
        else:
            run = resumed(last, config, split)
        run.split = split
        header(run, counted)
        if fresh and RANK == 0:
            names = {part: list(cases) for part, cases in run.cases.items()}
            texts = {
                "split.json": json.dumps(names, indent=1),
                "config.json": json.dumps(dataclasses.asdict(config), indent=1),
                "cps.py": Path(__file__).read_text("utf-8"),
            }
            for name, text in texts.items():
                atomic(run.path(name), Path.write_text, text, "utf-8")
            run.save("last.pt")  # the last one: with it, the run has begun

        if config.compile:
            run.trained = [torch.compile(network) for network in run.trained]
        if distributed.is_initialized():  # averages the gradients of all processes
            warnings.filterwarnings("ignore", "Grad strides")  # of a 1x1x1 kernel: no matter
            ddp = nn.parallel.DistributedDataParallel
            run.trained = [ddp(network) for network in run.trained]
        with signals_noted(run):
            yield run


def label_ids(split):
    """Ids of all labels of the cases with labels; warns of those that cannot be learned or seen."""
    found = {part: set() for part in split}
    for part, cases in split.items():
        for case in cases:
            found[part].update(int(label) for label in case.facts.get("labels", {}))
    ids = sorted(set().union(*found.values()))
    for part, why in (("labelled", "cannot be learned"), ("val", "has no say in the checkpoint")):
        missing = sorted(set(ids) - found[part])
        if missing and split[part]:
            warn(f"no {part} case holds label {missing}: it {why}; see --seed, --{part}, --split")
    if 255 in ids and 254 not in ids:
        warn("label 255 is learned like any other: an ignore label is not supported")
    return ids


def one_piece(cases, ids):
    """The labels that the cases show in one piece: 99 % of the voxels in the largest component."""
    shares = {label: [] for label in ids}
    for case in cases:
        for label, share in case.facts["labels"].items():
            shares[int(label)].append(share)
    return [label for label in ids if min(shares[label], default=0) >= 0.99]


def fingerprint(split):
    """What the cases are, wherever they lie: {part: {name: checksums of image and label}}."""

    def sums(case):
        return [case.facts["checksum"], case.facts.get("label_checksum", 0)]

    return {part: {case.name: sums(case) for case in cases} for part, cases in split.items()}


def resumed(last, config, split):
    """The run of last.pt, if it is the one that the config describes; UserError otherwise."""
    run = Run.load(last, **{name: getattr(config, name) for name in MAY_CHANGE})
    patches = config.batch * PROCESSES
    was = f"{last}: was begun with {run.patches} labelled patches a step"
    now = f"{PROCESSES} processes with --batch {config.batch} have {patches}"
    need(run.patches == patches, f"{was}, and {now}; change one of them")
    for name, value in vars(run.config).items():
        now = getattr(config, name)
        was = f"{last}: was begun with --{flag(name)} {value}, not {now}"
        need(value == now, f"{was}; use another --out")
    for part, cases in fingerprint(split).items():
        before = run.cases[part]
        changed = [name for name in before | cases if before.get(name) != cases.get(name)]
        was = f"{last}: was begun with other {part} cases, see {changed[:5]}"
        need(not changed, f"{was}; use another --out")
    return run


def try_lock(path):
    """A connection to a database that nobody else has open; None if it cannot be had."""
    try:
        connection = sqlite3.connect(path, timeout=0)
        connection.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error:
        return None
    return connection


@contextmanager
def locked(folder):
    """Turn away a second run in a folder, on any system; even kill -9 ends the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = try_lock(folder / f".lock{RANK}")
    if not lock:  # can a new file be locked? Not on a file system without locks
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as other:
            probe = try_lock(Path(other) / "lock")
            if probe:
                probe.close()
        need(not probe, f"{folder}: in use by another run; end it or change --out")
        warn(f"{folder}: cannot be locked here; see that no second run uses it")
    try:
        yield
    finally:
        if lock:
            lock.close()


@contextmanager
def signals_noted(run):
    """SIGINT and SIGTERM let the step end and the run save; afterwards they are given back."""

    def note(number, frame):
        run.stop = True
        if not distributed.is_initialized():  # torchrun may send it twice
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends at once

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals_to_the_parent(worker):
    """A scheduler signals the whole group: loader workers must outlive the last step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def barrier():
    """Wait for the other processes of torchrun, if there are any."""
    if distributed.is_initialized():
        distributed.barrier()


def header(run, counted):
    """Print what a person wants to know before a long run. counted: its `costs`."""
    config = run.config
    counts = ", ".join(f"{len(cases)} {part}" for part, cases in run.split.items())
    print("cases     ", counts)
    print(f"labels     {run.ids}; of {run.one_piece} one component is kept")
    print("settings  ", settings(config))
    protocol(*counted)
    print(f"run        {config.out} on {run.device}, step {run.step} of {run.steps}")
    print(" ".join(f"{name:>10}" for name in LOG), "left", flush=True)


def check_memory(config, classes):
    """Refuse a training of which a step cannot fit; returns what was counted, its `costs`."""
    device = device_of(config)
    gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if gpu else memory_bytes()
    counted = costs(config, classes, gpu)
    size = counted[3]
    sizes = f"a step takes {size / 2**30:.1f} GiB or more, and {free / 2**30:.1f} are free"
    fits = size < free or not config.check
    need(fits, f"--patch: {sizes}; use --preset quick, a smaller --patch or --batch, or --no-check")
    return counted


def device_of(config):
    """The device of a run: `auto` takes a GPU if there is one."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def settings(config):
    """The settings that differ from the preset, as flags."""
    preset = Config(**PRESETS[config.preset])
    changed = [f"--preset {config.preset}"]
    for name, value in vars(config).items():
        if value != getattr(preset, name) and name not in ("data", "out", "preset", "resume"):
            if isinstance(value, tuple):
                value = " ".join(map(str, value)) or "auto"
            if isinstance(value, bool):
                changed.append(f"--{'' if value else 'no-'}{flag(name)}")
            else:
                changed.append(f"--{flag(name)} {value}")
    return " ".join(changed)


def protocol(parameters, patch_flops, step_flops, step_bytes):
    """Print the `costs` of a training."""
    print(
        f"network    {parameters:,} parameters, {patch_flops:.3g} FLOPs for a patch; there are two"
    )
    print(f"step       {step_flops:.3g} FLOPs, {step_bytes / 2**30:.2g} GiB, counted")


class LiveBytes(TorchDispatchMode):
    """Counts the most bytes of tensors that are made, and alive at once, while it is on."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self.alive = weakref.WeakSet()  # storages; those that are freed leave by themselves

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.alive.add(tensor.untyped_storage())
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.alive))
        return result


def costs(config, classes, gpu=False):
    """Parameters of a network, FLOPs of its forward pass for a patch, FLOPs and bytes of a step.

    Nothing is computed: a step is taken on the `meta` device, where tensors have no values. gpu:
    with mixed precision. Counted are weights, gradients, momenta, activations and losses.
    """
    with torch.device("meta"):
        networks = [UNet3D(classes, config.base_channels, config.levels) for _ in "AB"]
        image = torch.empty(1, 1, *config.patch)
        labelled = torch.empty(config.batch, 1, *config.patch)
        target = torch.empty(config.batch, *config.patch, dtype=torch.int16)
    crops = 0 if config.method == "supervised" else config.batch
    whole = [slice(0, size) for size in config.patch]
    batch = {
        "labelled": labelled,
        "target": target,
        "crops_a": labelled[:crops],
        "crops_b": labelled[:crops],
        "valid": target[:crops] >= 0,
        "overlaps": [(whole, whole)] * crops,
    }
    parameters = sum(parameter.numel() for parameter in networks[0].parameters())
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        networks[0](image)

    # Mixed precision on a GPU: activations have 2 bytes, and a copy of the weights as well.
    mixed = gpu and config.amp
    if mixed:
        for network in networks:
            network.to(torch.bfloat16)
        for key in ("labelled", "crops_a", "crops_b"):
            batch[key] = batch[key].to(torch.bfloat16)
    with LiveBytes() as live, FlopCounterMode(display=False) as step:
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        train_step(networks, [], batch, 1.0, config, scaler, nullcontext())
    # Beside what the step makes: weights and momenta in fp32, and with mixed precision the copies.
    step_bytes = live.peak + 2 * parameters * (10 if mixed else 8)
    return parameters, forward.get_total_flops(), step.get_total_flops(), step_bytes


def report(run):
    """Test the best checkpoint, print scores and what the run cost; returns the dict of `train`."""
    barrier()  # until best.pt is there
    config = run.config
    path = run.path("best.pt")
    best = Run.load(path, device=config.device)
    val = run.split["val"]
    part = "test" if run.split["test"] else "val"
    results = test_scores(best, run.split[part])
    if np.isfinite(best.best):
        print(f"\nbest.pt    mean Dice {best.best:.4f} on the {len(val)} cases that chose it")
    if results:
        print(f"\n{len(results)} {part} cases\n{table(results)}\n")
    try:
        if RANK == 0:
            figure(run, best, val[:3])
    except ImportError:
        print(f"no {config.out}/figure.png: pip install -U matplotlib")

    hours = sum(row[-1] for row in run.rows) * config.epoch_steps / 3600
    watts = WATTS[run.device.type]
    kwh = hours * watts / 1000
    cost = f"{kwh:.2g} kWh (time x {watts} W), {kwh * CARBON:.2g} kg CO2 eq (kWh x {CARBON})"
    print(f"cost       {hours * 60:.1f} minutes, {cost}")
    if run.device.type == "cuda":
        gib = torch.cuda.max_memory_allocated(run.device) / 2**30  # after the first step
        print(f"memory     {gib:.2f} GiB at most on the GPU, the test included")
    images = Path(config.data) / "imagesTs"
    if not images.exists():
        images = Path(config.data) / "imagesTr"
    print(f"next       python cps.py predict {path} {images} {config.out}/predictions")
    return {
        "best_dice": best.best,
        "checkpoint": str(path),
        "steps": run.step,
        "results": results,  # {case: {label id: Scores}}
        "minutes": hours * 60,
        "run": best,
        "test": run.split["test"],
    }


# 13. Commands
# --------------------------------------------------------------------------------------------------
def predict(
    checkpoint: str,  # best.pt or last.pt of a run
    images: str,  # a NIfTI file or a folder of them
    out: str,  # folder for the segmentations, or the file for one
    networks: Literal["a", "b", "both"] = "a",  # both: mean of their softmax, twice the time
    largest: bool = True,  # one component of each label that was in one piece in training
    device: str = "auto",  # cpu, cuda, cuda:1, ...
):
    """Segment a scan, or the scans of a folder.

    Returns the exit code: 1 if some could not be, 2 if none could.
    """
    run = Run.load(checkpoint, device=device)
    scans = list_scans(images, images=True)
    out = Path(out)
    to_file = out.name.lower().endswith((".nii", ".nii.gz")) and not out.is_dir()
    need(not to_file or Path(images).is_file(), f"{out}: several scans want a folder, not a file")
    need(not to_file or not out.exists(), f"{out}: exists; choose another file, or a folder")
    references = out.name in ("labelsTr", "labelsTs")
    need(not references, f"{out}: is for references, which would be lost; choose another folder")
    folders = {path.parent.resolve() for path in scans.values()}
    need(out.resolve() not in folders, f"{images}: is in OUT_DIR; choose another")

    def one(name, path):
        target = out if to_file else out / f"{name}.nii.gz"
        volume, spacing, scan = read_scan(path)
        for sentence in doubts(volume, scan, run.config):
            warn(f"{path}: {sentence}")
        image = preprocess(volume, spacing, run.config, path)
        write_like(segment(run, image, volume.shape, networks, largest), scan, target)

    return for_each("predicting", scans, one)


def export(
    checkpoint: str,  # best.pt or last.pt of a run
    out: str,  # the file to write, model.onnx
):
    """Write network A as ONNX, for batches of any size, and check it against PyTorch.

    Returns the exit code: 1 if a logit differs by more than 1e-3. The settings that it needs (clip,
    spacing, patch, label ids) are in the file's metadata as JSON, under `cps`.
    """
    need(Path(out).suffix == ".onnx", f"{out}: the name must end in .onnx")
    run = Run.load(checkpoint, device="cpu")
    network = run.networks[0].eval()
    network.to(memory_format=torch.contiguous_format)  # there the norm is more exact on a CPU
    image = torch.randn(2, 1, *run.config.patch)
    batch = torch.export.Dim("batch")
    with blame(out, "not made", "pip install onnxscript onnxruntime", ImportError):
        import onnxruntime  # the check needs it: before anything is written

        program = torch.onnx.export(
            network,
            (image,),
            input_names=["image"],
            dynamo=True,
            dynamic_shapes=[{0: batch}],
            verbose=False,
        )
    metadata = dataclasses.asdict(run.config) | {"ids": run.ids, "one_piece": run.one_piece}
    program.model.metadata_props["cps"] = json.dumps(metadata)
    atomic(out, program.save)

    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": image.numpy()})
    with torch.inference_mode():
        difference = np.abs(network(image).numpy() - logits).max()
    print(f"{out}: largest difference of the logits from PyTorch's {difference:.1e}")
    return int(difference > 1e-3)


def info(
    config: Config,
    classes: int = 14,  # with background; 14 are FLARE22's
):
    """Print what the paper's tables ask for: protocol, parameters, FLOPs, memory of a step.

    All is counted, nothing timed; memory is that of a GPU with mixed precision, unless
    --no-amp or --device cpu.
    """
    need(2 <= classes <= 256, f"--classes {classes}: must be 2 to 256, with background")
    for name, value in vars(config).items():
        print(f"{name:<16} {value}")
    steps = config.epochs * config.epoch_steps
    print(f"{steps:,} steps, lr halved every {config.halve_epochs} epochs")
    protocol(*costs(config, classes, gpu=config.device != "cpu"))


def evaluate(
    predictions: str,  # a NIfTI file or a folder of them
    references: str,  # the same; cases of two folders go together by name
    flare22: bool = False,  # organs, tolerances and rules of the challenge
    tolerance: float = 2.0,  # of the surface Dice, in mm
    csv: str = "",  # file for the scores of each case and label
):
    """Dice, surface Dice and HD95 of segmentations.

    A prediction that is missing or refused counts as empty: the challenge's code leaves it out.
    Returns the exit code.
    """
    need(0 < tolerance < inf, f"--tolerance {tolerance}: must be a number of mm above 0")
    known = list_scans(references)
    found = list_scans(predictions)
    if Path(predictions).is_file() and Path(references).is_file():
        found = dict(zip(known, found.values()))  # two files always go together

    missing = sorted(known.keys() - found.keys())
    surplus = sorted(found.keys() - known.keys())
    paired = len(missing) < len(known)
    need(paired, f"{predictions}: {surplus[:3]} pair with none of {missing[:3]}; rename them")
    if missing or surplus:
        counts = f"{len(missing)} count as empty: {missing[:5]}"
        warn(f"{predictions}: {counts}; {len(surplus)} have no reference: {surplus[:5]}")

    tolerances = dict.fromkeys(range(1, 256), tolerance)  # mm for each label
    head = f"{tolerance:g} mm"
    if flare22:
        tolerances = FLARE22
        head = "FLARE22"
    results = {}
    used = set()  # labels that there are
    empty = set(known)  # cases without a prediction that can be read

    def one(name, path):
        ref, spacing, scan = read_scan(path, is_label=True, canonical=False)
        pred = np.zeros_like(ref)
        try:
            if name in found:
                pred = read_scan(found[name], is_label=True, canonical=False, like=scan)[0]
                empty.discard(name)
        finally:  # a refused one is an error, but has its row
            results[name] = evaluate_case(pred, ref, spacing, tolerances, tolerances, flare22)
            used.update(label_boxes(ref), label_boxes(pred))

    code = for_each("evaluating", known, one)
    ids = FLARE22 if flare22 else sorted(used)
    for name, scores in results.items():
        results[name] = {label: scores[label] for label in ids}
    if results and ids:
        print(table(results, head, flare22))
        empty &= results.keys()
        if empty:
            print(f"{len(empty)} of {len(results)} predictions missing or refused: empty")
    if csv:
        write_csv(csv, [("case", "label", *Scores._fields), *score_rows(results)])
    return code


def score_rows(results, *first):
    """Rows (*first, case, label, dice, nsd, hd95, held) of {case: {label: Scores}}."""
    rows = []
    for name, scores in results.items():
        for label, numbers in scores.items():
            rows.append((*first, name, label, *numbers[:3], int(numbers.held)))
    return rows


def write_csv(path, rows):
    """Write rows, the first one the head, as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    atomic(path, Path.write_text, text.getvalue(), "utf-8")


def test_scores(run, cases, networks="a"):
    """{case name: {id: Scores}}, on the grids of the scans, against the label files themselves."""
    results = {}
    for case in cases:
        ref, spacing, _ = read_scan(case.label, is_label=True)
        pred = segment(run, case.array("image"), ref.shape, networks)
        results[case.name] = evaluate_case(pred, ref, spacing, run.ids, tolerances=2.0)
    return results


def ablate(
    config: Config,
    labelled: tuple[int, ...] = (2,),  # numbers of labelled cases to compare at
    seeds: int = 3,  # runs of an arm, from --seed on; with --split, of the same cases
):
    """Compare supervised, plain CPS, context CPS and an upper bound, all labels, at equal steps.

    Writes ablation.csv and ablation.md into --out. What is trained is not trained again.
    """
    need(min(seeds, *labelled) > 0, "--seeds, --labelled: must be 1 or more")
    need(config.method == "context", "--method: ablate compares all of them; leave it out")
    arms = list(itertools.product(sorted(set(labelled)), ("supervised", "cps", "context")))
    arms.append((0, "supervised"))  # all labels
    config = dataclasses.replace(config, resume=True)
    check_memory(config, 2)  # context-aware CPS takes the most
    if not split_cases(dataclasses.replace(config, method="supervised"))["test"]:
        config = dataclasses.replace(config, test=config.val)

    # All splits are prepared and compared before the first run.
    runs = {arm: [] for arm in arms}  # configs, one a seed
    known = set()
    for (number, method), i in itertools.product(arms, range(seeds)):
        seed = config.seed + i
        out = f"{config.out}/{method}-{number or 'all'}-{seed}"
        own = dataclasses.replace(config, method=method, labelled=number, seed=seed, out=out)
        runs[number, method].append(own)
        split = prepare(split_cases(own), own)
        need(split["test"], "--test 0: ablate scores test cases, and there are none; give a number")
        known.add(tuple(label_ids(split)))
        need(len(known) == 1, f"--labelled: seed {seed} has other labels; raise it or drop some")

    rows = [("method", "labels", "seed", "networks", "case", "label", *Scores._fields)]
    columns = ("method", "labels", "runs", "Dice of A", "HD95 of A, mm", "Dice of A and B")
    summary = [(*columns, "gain of A [95 %]", "minutes")]
    for (number, method), configs in runs.items():
        labels = number or "all"
        scores = []
        minutes = []
        for own in configs:
            done = train(own)
            both = test_scores(done["run"], done["test"], "both")
            scores.append((score_array(done["results"]), score_array(both)))
            minutes.append(done["minutes"])
            rows += score_rows(done["results"], method, labels, own.seed, "a")
            rows += score_rows(both, method, labels, own.seed, "both")

        scores = np.array(scores)  # (seeds, A or both, cases, labels, 4)
        scores[scores[..., 3] == 0] = nan  # the case does not hold the label
        dices = scores[:, 0, :, :, 0]  # of A: (seeds, cases, labels)
        if method == "supervised":
            base = dices  # of the arms that follow
            gain = ""
        else:
            gain = gain_text(dices - base)
        row = [method, labels, seeds, over_seeds(dices)]
        row += [over_seeds(scores[:, 0, :, :, 2], digits=2)]
        row += [over_seeds(scores[:, 1, :, :, 0]), gain, f"{np.mean(minutes):.1f}"]
        summary.append(row)

    text = markdown(summary)
    write_csv(Path(config.out) / "ablation.csv", rows)
    atomic(Path(config.out) / "ablation.md", Path.write_text, text + "\n", "utf-8")
    print(f"\n{config.out}/ablation.md, {len(done['results'])} test cases:\n{text}")


def over_seeds(tables, digits=4):
    """Text of mean +- sd over the seeds of scores (seeds, cases, labels)."""
    return spread([mean_dice(table) for table in tables], digits)


def gain_text(gain):
    """Mean of paired gains (seeds, cases, labels), and its 95 % interval, by a two-way bootstrap.

    Seeds and cases are both drawn anew, 10 000 times; not where there is one of either.
    """
    text = f"{mean_dice(gain.mean(0)):+.4f}"
    seeds, cases, _ = gain.shape
    if min(seeds, cases) == 1:
        return text
    rng = np.random.default_rng(0)
    means = []
    for _ in range(10_000):
        some_seeds = rng.integers(seeds, size=seeds)
        some_cases = rng.integers(cases, size=cases)
        drawn = gain[some_seeds].mean(0)[some_cases]  # (cases, labels)
        means.append(mean_dice(drawn))
    low, high = np.nanpercentile(means, (2.5, 97.5))
    return f"{text} [{low:+.4f}, {high:+.4f}]"


# The first six are Okabe and Ito's, which the colour-blind tell apart; then their shades.
LABEL_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#CC79A7")
LABEL_COLOURS += ("#734F00", "#2B5A74", "#004F39", "#787221", "#003959", "#663C53")  # darker
LABEL_COLOURS += ("#F3CF80", "#ABDAF4", "#80CFB9", "#F8F2A1", "#80B9D9", "#E6BCD3")  # lighter
DIFFER = "#D55E00"  # where A and B do


def figure(run, best, cases):
    """Write figure.png: the method on one volume, the curves of the log, some cases."""
    from matplotlib.figure import Figure  # optional

    count = 2 + len(cases)
    page = Figure((13, 3 * count), dpi=150, layout="constrained")
    rows = page.subfigures(count)
    examples = run.split["unlabelled"] + run.split["labelled"]
    draw_method(rows[0], best, examples[0])
    draw_log(rows[1], run.rows)
    for row, case in zip(rows[2:], cases):
        draw_case(row, best, case)
    atomic(run.path("figure.png"), page.savefig)


def draw_method(row, run, case):
    """Both crops of a volume, what A says on the one, B on the other, and both on the overlap."""
    from matplotlib.patches import Rectangle

    image = case.array("image")
    patch = np.array(run.config.patch)
    rng = np.random.default_rng(0)
    corners = overlapping_corners(rng, image.shape, patch, run.config.min_overlap)
    says = np.full((2, *image.shape), -2, np.int16)  # of A and of B; -2: not in its crop
    for i, corner in enumerate(corners):
        box = box_at(corner, patch)
        says[i][box] = segment(run, image[box], networks="ab"[i], largest=False)
    both = np.where(says[0] == says[1], says[0], -1)
    overlap = says.min(0) > -2
    both[~overlap] = 0
    foreground = np.count_nonzero(both, (0, 1))
    z = (foreground + overlap.any((0, 1))).argmax()  # of most foreground, or any of the overlap

    titles = (f"crops, {case.name[:12]}", "A on its crop", "B on its crop", "agree, differ")
    axes = draw(row, run, case, z, titles, (0 * both, *says, both))
    for ax in axes:
        for name, corner, colour in zip("AB", corners, ("cyan", "yellow")):
            frame = Rectangle(corner[:2] - 0.5, *patch[:2], fill=False, ec=colour, label=name)
            frame.set(clip_on=False, zorder=3)  # a crop may end where the panel does
            ax.add_patch(frame)
    handles, names = axes[0].get_legend_handles_labels()
    columns = math.ceil(len(names) / 10)
    row.legend(handles, names, loc="outside right center", ncols=columns)


def draw_log(row, rows):
    """The curves of the log: the losses, the signs of collapse, Dice."""
    log = dict(zip(LOG, np.array(rows).T))
    names = ("loss_sup", "loss_cps", "agreement", "foreground", "overlap", "dice")
    for ax, name in zip(row.subplots(1, 6), names):
        ax.plot(log["step"], log[name], ".-")
        ax.set(title=name, xlabel="step")


def draw_case(row, run, case):
    """Of a validation case the slice with most foreground: image, reference, A, B, A != B."""
    ref = case.array("label")
    label_a = segment(run, case.array("image"), networks="a")
    label_b = segment(run, case.array("image"), networks="b")
    differ = np.where(label_a == label_b, 0, -1)
    z = np.count_nonzero(ref, (0, 1)).argmax()
    titles = (case.name[:18], "reference", "A", "B", "A != B")  # longer names would overlap
    draw(row, run, case, z, titles, (0 * ref, ref, label_a, label_b, differ))


def draw(row, run, case, z, titles, volumes):
    """Slice z of a case with labels (X, Y, Z), -1 where A and B differ; a panel for each volume.

    As radiologists see it: the patient's right at the left, the front above. Returns the axes.
    """
    from matplotlib.colors import to_rgba

    colours = {-1: DIFFER} | dict(zip(run.ids, itertools.cycle(LABEL_COLOURS)))
    image = case.array("image")[:, :, z].T.astype(float)  # (y, x)
    aspect = case.spacing[1] / case.spacing[0]
    axes = row.subplots(1, len(volumes))
    for ax, title, volume in zip(axes, titles, volumes):
        labels = volume[:, :, z].T
        overlay = np.zeros((*image.shape, 4))
        for label, colour in colours.items():
            overlay[labels == label] = to_rgba(colour, 0.85)
            name = "differ" if label == -1 else label
            ax.scatter([], [], color=colour, label=name)  # for the legend
        ax.imshow(image, "gray", aspect=aspect)
        ax.imshow(overlay, aspect=aspect)
        ax.invert_xaxis()
        ax.invert_yaxis()
        ax.set(xticks=(0, image.shape[1] - 1), xticklabels=("L", "R"), yticks=())
        ax.set_title(title, parse_math=False)  # a $ in a name is a $
    return axes


# 14. Command line
# --------------------------------------------------------------------------------------------------
class UserError(Exception):
    """Something the user can mend: one sentence that names the file or flag and the remedy."""


def need(holds, sentence):
    """Raise UserError with the sentence unless something holds."""
    if not holds:
        raise UserError(sentence)


@contextmanager
def blame(path, problem, remedy, kinds=Exception):
    """Turn errors of the `with` block into a UserError: path, problem, what was raised, remedy."""
    try:
        yield
    except kinds as error:  # broken files make nibabel, zipfile, pickle ... raise a dozen types
        reason = getattr(error, "strerror", "") or str(error) or type(error).__name__
        reason = " ".join(reason.split())[:200]
        raise UserError(f"{path}: {problem}, {reason}; {remedy}") from error


def attempt(function, *args):
    """Call a function; print what the user can mend and return 2. A defect keeps its traceback."""
    try:
        return function(*args)
    except UserError as error:
        sentence = str(error)
    except OSError as error:
        sentence = str(error)
        if error.filename:
            sentence = f"{error.filename}: {error.strerror}; check the path and its rights"
    except (MemoryError, RuntimeError) as error:  # torch has no type of its own for these
        text = str(error)[:300]
        if re.search(r"DataLoader (worker \(pid|timed out)|shared memory|shm", text):
            sentence = (
                "--workers: a loader process died or stalled, or shared memory ran out; lower "
                "--workers, or raise the container's shared memory (docker run --shm-size 2g)"
            )
        elif re.search("^$|out of memory|not enough memory|allocate", text):
            sentence = "out of memory; lower --patch, --batch or --base-channels of the training"
        else:
            raise
    sys.stderr.write(f"error: {sentence}\n")  # print would let threads in before the line's end
    return 2


@functools.cache  # each sentence once
def warn(sentence):
    """Print a warning: something that is not refused, but may be a mistake."""
    if RANK == 0:
        print(f"warning: {sentence}", file=sys.stderr)


def progress(what, done, total, start):
    """Redraw one line with the time left, on a terminal only."""
    if sys.stdout.isatty():
        seconds = (time.monotonic() - start) / done * (total - done)
        end = "\n" if done == total else "\r"
        print(f"{what} {done}/{total}, {timedelta(seconds=int(seconds))} left  ", end=end)
        sys.stdout.flush()


def for_each(what, items, one, threads=1):
    """Call one(name, item) for all items and report bad ones: exit code 1 if some are, 2 if all."""
    bad = 0
    start = shown = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        codes = pool.map(functools.partial(attempt, one), items.keys(), items.values())
        for done, code in enumerate(codes, start=1):
            bad += code == 2
            progress(what, done, len(items), start)
            if not sys.stdout.isatty() and time.monotonic() - shown > 30:
                shown = time.monotonic()
                print(f"{what}: {done} of {len(items)}", flush=True)
    seconds = time.monotonic() - start
    print(f"{what}: {len(items) - bad} of {len(items)} done in {seconds:.1f} s", flush=True)
    if bad == len(items):
        return 2
    return int(bad > 0)


def memory_bytes():
    """Bytes that this machine, or its container, may still use; infinite where it does not say."""
    free = inf
    if Path("/proc/meminfo").exists():
        kib = re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())
        free = int(kib[1]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    used = Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and limit.read_text().strip() != "max":
        cached = re.search(r"inactive_file (\d+)", limit.with_name("memory.stat").read_text())
        used_up = int(used.read_text()) - int(cached[1])  # files in memory make room
        free = min(free, int(limit.read_text()) - used_up)
    return free


def flag(name):
    """The flag of a field of Config, without its dashes."""
    return name.replace("_", "-")


def check_config(config):
    """Refuse impossible values in one sentence, before any work is done."""

    def must(name, holds, wanted):
        need(holds, f"--{flag(name)} {getattr(config, name)}: must be {wanted}")

    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if type(value) in (int, float):
            must(field.name, 0 <= value < 2**31, "0 or more, and less than 2^31")
        if get_origin(field.type) is Literal:
            must(field.name, value in get_args(field.type), f"one of {get_args(field.type)}")
    counts = ("batch", "base_channels", "epochs", "epoch_steps", "halve_epochs", "validate_epochs")
    for name in counts:
        must(name, getattr(config, name) >= 1, "1 or more")
    for name in ("momentum", "min_overlap"):
        must(name, 0 < getattr(config, name) < 1, "between 0 and 1")
    for name in ("val", "test"):
        value = getattr(config, name)
        must(name, value < 1 or value == int(value), "a share below 1, or a whole number")
    must("spatial", config.spatial <= 1, "at most 1")
    must("batch", config.batch <= 1024, "at most 1024")
    must("lr", config.lr > 0, "more than 0")
    must("levels", 1 <= config.levels <= 10, "1 to 10")

    stride = 2 ** (config.levels - 1)
    fits = [0 < size <= 4096 and size % stride == 0 for size in config.patch]
    wanted = f"3 multiples of {stride} up to 4096, not all {stride}"
    must("patch", len(fits) == 3 and all(fits) and max(config.patch) > stride, wanted)
    if config.clip:
        ordered = len(config.clip) == 2 and -inf < config.clip[0] < config.clip[1] < inf
        must("clip", ordered, "LOW HIGH, or auto")
    if config.spacing:
        possible = len(config.spacing) == 3 and all(0.01 <= mm <= 100 for mm in config.spacing)
        must("spacing", possible, "X Y Z in mm, or native")
    must("mirror", set(config.mirror) <= set("xyz"), "some of x, y, z")
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    known = config.device in ("auto", "cpu", *gpus) or (config.device == "cuda" and gpus)
    must("device", known, "cpu, or a GPU that is there")


class Parser(argparse.ArgumentParser):
    """Its errors are sentences like all others."""

    def error(self, message):
        raise UserError(f"{message}; paths come before flags; see cps.py [COMMAND] --help")


def numeric(text):
    """A number; None for the words that stand for an empty tuple."""
    if text in ("auto", "native"):
        return None
    return float(text)


read_source = functools.cache(inspect.getsource)  # three commands have the flags of Config


def add_flags(parser, source, but=()):
    """A flag for each line `name: type = default,  # help` of a class or a function's head; what
    has no default is an argument. A comment of one word, on a line of its own, begins a group."""
    group = parser
    parameters = inspect.signature(source).parameters
    for line in read_source(source).splitlines():
        heading = re.fullmatch(r" +# (\w+)", line)
        comment = re.fullmatch(r" +(\w+): .*?  # (.*)", line)
        if heading:
            group = parser.add_argument_group(heading[1])
        if comment and comment[1] in parameters and comment[1] not in but:
            add_flag(group, parameters[comment[1]], comment[2].replace("%", "%%"))


def add_flag(group, parameter, text):
    """One flag; if it is not given it is left out, so that presets and defaults fill it in."""
    default = parameter.default
    kind = parameter.annotation
    if default is parameter.empty:
        group.add_argument(parameter.name, help=text)
        return
    if parameter.name == "data":
        group.add_argument("data", nargs="?", help=text)
        return
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    if default == "":
        default = "none"
    options = {"default": argparse.SUPPRESS, "help": f"{text} (default: {default})"}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif get_origin(kind) is Literal:
        options["choices"] = get_args(kind)
    elif get_origin(kind) is tuple:
        options["nargs"] = "+"
        options["type"] = get_args(kind)[0]
        if options["type"] is float:
            options["type"] = numeric
    else:
        options["type"] = kind
    group.add_argument(f"--{flag(parameter.name)}", **options)


COMMANDS = {f.__name__: f for f in (train, predict, evaluate, ablate, info, export)}


def build_parser():
    """The command line: each command with the parameters of its function, and those of Config."""
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, function in COMMANDS.items():
        text = function.__doc__.split("\n\n")[0]
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        add_flags(command, function)
        own = inspect.signature(function).parameters
        if "config" in own:
            add_flags(command, Config, but=own)
    return parser


def config_from(command, data=None, preset=None, **given):
    """Config of flags on top of a preset; without DATA that of the phantom."""
    # An empty text, as of a variable that is not set, is a flag that is not given.
    given = {name: value for name, value in given.items() if value != ""}
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = tuple(item for item in value if item is not None)
    need(data or not given.get("unlabelled"), "--unlabelled: took all folders; put DATA before it")
    if preset is None:
        preset = "paper" if data or command == "info" else "quick"
    phantom = data is None and command != "info"
    if phantom:
        data = "runs/phantom"
        given = {"val": 4.0} | given
    what = given.get("method", "context") if command == "train" else command
    out = f"runs/{Path(data or '').resolve().name}-{what}"
    config = Config(**PRESETS[preset] | {"data": data or "", "preset": preset, "out": out} | given)
    if phantom and RANK == 0:
        make_phantom(data)
    barrier()
    return config


def run_command(argv):
    """Read the command line, do what it says; returns the exit code."""
    given = vars(build_parser().parse_args(argv))
    command = given.pop("command")
    function = COMMANDS[command]
    own = inspect.signature(function).parameters
    arguments = {name: given.pop(name) for name in own if name in given}
    if "config" in own:
        arguments["config"] = config_from(command, **given)
    code = function(**arguments)
    return code if isinstance(code, int) else 0  # train returns its results


def main(argv=None):
    """Run a command. Returns its exit code: 0, 1 (some cases failed), 2 (bad input), 130."""
    nib.imageglobals.logger.setLevel("CRITICAL")  # what is wrong with a scan, an error says
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # names of files, on any terminal
    if "LOCAL_RANK" in os.environ:  # torchrun: the first process speaks; of errors, each
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group(timeout=timedelta(days=1))  # the first one prepares
        if RANK:
            sys.stdout = io.StringIO()
    try:
        return attempt(run_command, argv)
    except KeyboardInterrupt as error:
        print(f"\ninterrupted: {error}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
