"""cps.py: context-aware cross pseudo supervision (CPS) for 3D medical image segmentation.

Two 3D U-Nets, A and B, of one structure but different initialisation, learn from a few labelled and
many unlabelled scans. Each sees its own patch of an unlabelled volume; where the two overlap, the
hard label of one network supervises the other. They see the same voxels in other surroundings, so
they agree only by getting them right whatever the context. Paper: P. Liu and G. Zheng, Cross Pseudo
Supervision for Semi-supervised Medical Image Segmentation, FLARE 2022; CPS: Chen et al., CVPR 2021.

    python cps.py train                     a phantom, no data needed: minutes on two CPU cores
    python cps.py train DATA --labelled 8   your scans (MSD / nnU-Net layout), 8 of them with labels
    python cps.py predict CHECKPOINT IMAGE_OR_DIR OUT_DIR
    python cps.py evaluate PREDICTIONS REFERENCES [--flare22]
    python cps.py ablate DATA               does it help? supervised, CPS, context CPS, all labels
    python cps.py info                      the paper's tables, no blanks: FLOPs, memory, hours, CO2
    python cps.py export CHECKPOINT model.onnx

    NIfTI files -> cache (memory-mapped) -> patches -> train_step -> checkpoint
                       metrics <- NIfTI files <- sliding_window <-------+

The loss of step t, with labelled patches (x, y) and two overlapping crops u1, u2 of a volume:

    L     = L_sup(A) + L_sup(B) + lam(t) * L_cps
    L_sup = Dice(N(x), y) + CE(N(x), y)                            for N = A and N = B
    L_cps = l(A(u1)|o, argmax B(u2)|o) + l(B(u2)|o, argmax A(u1)|o)
    |o      on the overlap of the crops; no gradient through argmax; l = Dice + CE, or CE alone

Shapes: B batch, C channels, K classes (0 is background), X Y Z voxels of a volume in RAS+ (x to the
right, y to the front, z to the head), P patch, x y z voxels of a patch or of an overlap.
Where the paper is silent: random overlaps on all axes; A and B swap crops each step; lam is ramped
up; two draws of He-normal (or --init-b xavier); 250 steps an epoch (fits its 96 h); nnU-Net's
augmentation, unmirrored, as kidneys have sides; validation chooses the checkpoint; A predicts.
Contents: grep '^# [0-9]' cps.py; section 2 is the method. Not for clinical use.
"""
import argparse, concurrent.futures, datetime, inspect, io, itertools, json, os  # noqa: I001
import functools, platform, re, signal, sqlite3, sys, tempfile, time, zipfile, zlib
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage, spatial, stats
from torch import distributed, inf, nan, nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

# 1. Configuration =================================================================================
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
        raise UserError(f"{path}: {problem}, {' '.join(reason.split())[:200]}; {remedy}") from error
def attempt(function, *args):
    """Call a function; print what the user can mend and return 2. A defect keeps its traceback."""
    try:
        return function(*args)
    except (UserError, OSError) as error:
        name = getattr(error, "filename", None)  # of the file that the system refuses
        sentence = f"{name}: {error.strerror}; check the path and its rights" if name else error
    except (MemoryError, RuntimeError) as error:  # torch has no type of its own for it on a CPU
        if not re.search("^$|out of memory|not enough memory|allocate", str(error)[:200]):
            raise
        sentence = "out of memory; lower --patch, --batch or --base-channels of the training"
    print(f"error: {sentence}", file=sys.stderr)
    return 2

@dataclass(frozen=True)
class Config:
    """All settings of a run; the defaults are the preset `paper`. In brackets: who says so."""
    data: str = ""  # folder in MSD / nnU-Net layout; none: a phantom is built
    preset: Literal["paper", "quick"] = "paper"  # as published; for a CPU (default without DATA)
    out: str = ""  # run folder; none: runs/DATA-METHOD
    resume: bool = False  # go on with the run in --out, or begin it
    method: Literal["supervised", "cps", "context"] = "context"  # no L_cps, equal crops, overlap
    labelled: int = 0  # training cases that keep their labels, the others lose them; 0: all
    unlabelled: tuple[str, ...] = ()  # more folders of unlabelled images
    val: float = 0.2  # share, or number if >= 1, of labelled cases to choose the checkpoint [ours]
    test: float = 0.0  # the same, for cases that choose nothing and are tested once at the end
    seed: int = 0  # of the initialisation, the split and the patches
    clip: tuple[float, ...] = (-68.0, 200.0)  # HU; auto (empty): 0.5, 99.5 percentiles [paper]
    spacing: tuple[float, ...] = ()  # x y z in mm to resample to; native (empty): as it is [ours]
    patch: tuple[int, ...] = (160, 160, 96)  # x y z in voxels [paper]
    batch: int = 2  # labelled patches a step (and process), and as many unlabelled pairs [paper]
    min_overlap: float = 0.3  # least overlap of two crops, as a share of a crop [ours]
    intensity: float = 1.0  # scales the chances of intensity augmentation; 0: none [nnU-Net]
    spatial: float = 0.2  # chance of rotation to 30 degrees and scale 0.7 to 1.4; 0: none [nnU-Net]
    mirror: str = ""  # axes to mirror, as `yz`, also for --tta; `x` swaps left and right [ours]
    base_channels: int = 32  # at the first level; doubled at each next one, at most 320 [nnU-Net]
    levels: int = 5  # of resolution; the patch must divide by 2^(levels-1) [nnU-Net]
    init_b: Literal["he", "xavier"] = "he"  # normal; A has he [paper: he for both]
    lam: float = 1.0  # weight of L_cps after the ramp-up [ours, measured]
    rampup: float = 0.6  # share of the run over which lam grows; 0: full at once [ours, measured]
    pseudo_loss: Literal["dice_ce", "ce"] = "dice_ce"  # l of L_cps [paper: Dice + CE; CPS: CE]
    epochs: int = 1000  # an epoch is a row of the log [paper]
    epoch_steps: int = 250  # optimiser steps [nnU-Net; fits the paper's 96 h]
    lr: float = 0.01  # of SGD with Nesterov momentum [paper]
    momentum: float = 0.99  # [paper]
    halve_epochs: int = 200  # lr is halved every so many epochs [paper]
    weight_decay: float = 3e-5  # [nnU-Net]
    grad_clip: float = 12.0  # largest norm of a network's gradient; 0: no limit [nnU-Net]
    validate_epochs: int = 10  # validate every so many epochs, and after the last [ours]
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: a GPU if there is one
    compile: bool = False  # torch.compile: 20 % faster steps on a CPU after a minute [measured]
    amp: bool = True  # mixed precision on a GPU: bf16, or fp16 if it has no bf16
    workers: int = 8  # loader processes for a GPU; on a CPU there are none
    cache: str = "runs/.cache"  # folder of preprocessed volumes; may be deleted
    def __post_init__(self):
        """Refuse impossible values in one sentence, before any work is done."""
        stride, gpu = 2 ** abs(self.levels - 1), "cuda" in self.device and torch.cuda.is_available()
        wanted = {name: 0 < getattr(self, name) < 1 or "between 0 and 1"
                  for name in ("momentum", "min_overlap")} | {
            "patch": len(self.patch) == 3 and all(p > 0 and p % stride == 0 for p in self.patch)
            and max(self.patch) > stride or f"3 multiples of {stride}, not all {stride}",
            "clip": not self.clip or len(self.clip) == 2
            and -inf < self.clip[0] < self.clip[1] < inf or "LOW HIGH, or auto",
            "spacing": len(self.spacing) in (0, 3) and all(0.01 <= s <= 100 for s in self.spacing)
            or "X Y Z in mm, or native", "mirror": {*self.mirror} <= {*"xyz"} or "some of x, y, z",
            "device": self.device in ("auto", "cpu") or gpu or "cpu, or a GPU that is there"}
        for name, value in vars(self).items():
            low = Config.__annotations__[name] is int and name not in "labelled, seed, workers"
            usual = type(value) not in (int, float) or low <= value < inf or f"{low:d} or more"
            holds = wanted.get(name, usual)  # True, or what it must be
            need(holds is True, f"--{name.replace('_', '-')} {value}: must be {holds}")
PRESETS = {"paper": {}, "quick": {  # momentum 0.99 wants more than some hundred steps [measured]
    "patch": (32, 48, 32), "base_channels": 8, "levels": 4, "epochs": 20, "epoch_steps": 20,
    "halve_epochs": 8, "lr": 0.2, "momentum": 0.9, "validate_epochs": 4}}  # lr: finds small organs
RANK = int(os.environ["RANK"]) if "LOCAL_RANK" in os.environ else 0  # 0: the first, or alone
MAY_CHANGE = {"resume", "out", "epochs", "device", "compile", "workers", "cache"}  # on --resume

# 2. The method: pure functions, tensors in, scalar out ============================================
def overlapping_corners(rng, shape, patch, min_overlap):
    """Draw the corners of two patches of one volume that share at least `min_overlap` of a patch.
    rng: numpy Generator; shape, patch: voxels, an entry an axis. Returns two int arrays within
    [0, shape - patch]; both are 0 on an axis where the volume is smaller: they are padded alike.
    They share r = prod(1 - |d_a| / P_a), d the offset; 1, plain CPS, only without room. [ours]"""
    patch = np.asarray(patch)
    room = np.maximum(np.asarray(shape) - patch, 0)  # for the corner, on each axis
    corner1 = rng.integers(0, room + 1)  # anywhere in the volume
    corner2, left = corner1.copy(), 1.0  # left: the overlap that the axes so far leave
    for a in rng.permutation(len(patch)):  # spends what is left; rejection hardly ever ends in 3D
        reach = int(patch[a] * (1 - min_overlap / left) + 1e-9)
        near = range(max(corner1[a] - reach, 0), min(corner1[a] + reach, room[a]) + 1)
        moved = [c for c in near if left == 1 and c != corner1[a]]  # no offset yet: leave out 0
        corner2[a] = rng.choice(moved or near)
        left *= 1 - abs(corner2[a] - corner1[a]) / patch[a]
    return corner1, corner2

def overlap_slices(corner1, corner2, patch):
    """Where the overlap of two crops lies in each: image1[slices1] is image2[slices2], exactly.
    Two tuples of slices, in voxels; ValueError if there is no overlap. Source: geometry."""
    d = np.subtract(corner2, corner1)  # in crop 1 the overlap is [max(0, d), P + min(0, d))
    if np.any(abs(d) >= patch):
        raise ValueError(f"crops at {tuple(corner1)} and {tuple(corner2)} do not overlap")
    return [tuple(map(slice, np.maximum(0, o), patch + np.minimum(0, o))) for o in (d, -d)]

def pseudo_label(logits):
    """Hard labels int64 (B, x, y, z) of logits (B, K, x, y, z): no gradient, no threshold [CPS]."""
    return logits.detach().argmax(dim=1)
def cross_pseudo_loss(logits_a, logits_b, valid=None, dice=True):
    """L_cps: each network learns the other's hard label on the voxels that both see.
    logits_a, logits_b: (B, K, x, y, z), both cut to the overlap; valid: bool (B, x, y, z), not on
    padding; dice: l is Dice + CE, else CE. Returns a scalar. Source: CPS; Dice + CE: the paper."""
    label_a, label_b = pseudo_label(logits_a), pseudo_label(logits_b)  # (B, x, y, z), no gradient
    if valid is not None:  # padding must not be learned as background
        label_a, label_b = label_a.masked_fill(~valid, -1), label_b.masked_fill(~valid, -1)
    return dice_ce_loss(logits_a, label_b, dice=dice) + dice_ce_loss(logits_b, label_a, dice=dice)

def rampup(step, length):
    """Share of lam at a step: pseudo labels are noise at first. [ours; shape of SSL4MIS]"""
    return float(np.exp(-5 * (1 - step / length) ** 2)) if step < length else 1.0

# 3. Supervised loss ===============================================================================
def dice_ce_loss(logits, target, ignore_index=-1, dice=True):
    """Soft Dice loss + cross-entropy, for true and for pseudo labels; dice=False: cross-entropy.
    logits: (B, K, x, y, z); target: int64 (B, x, y, z), 0..K-1, or `ignore_index` for voxels that
    count in neither part. Returns a scalar, 0, not NaN, where all is ignored. [paper, nnU-Net]"""
    valid = target != ignore_index  # (B, x, y, z)
    target = target.masked_fill(~valid, 0)[:, None]  # (B, 1, x, y, z)
    log_prob = logits.float().log_softmax(dim=1)  # (B, K, x, y, z); half precision would spoil it
    nll = -log_prob.gather(1, target)[:, 0] * valid  # (B, x, y, z)
    loss = nll.flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1)  # (B,)
    if dice:  # per patch and class, then a mean: what a patch adds does not hang on its batch
        prob = log_prob.exp() * valid[:, None]  # (B, K, x, y, z)
        one_hot = torch.zeros_like(prob).scatter_(1, target, valid[:, None].to(prob.dtype))
        prob, one_hot = prob[:, 1:].flatten(2), one_hot[:, 1:].flatten(2)  # (B, K-1, xyz)
        overlap, size = (prob * one_hot).sum(2), prob.sum(2) + one_hot.sum(2)  # (B, K-1)
        # 1e-5: a class in neither gives 1, not 0 / 0; in the prediction only, just CE lowers it.
        loss = loss + 1 - ((2 * overlap + 1e-5) / (size + 1e-5)).mean(1)
    return loss.mean()

# 4. The network ===================================================================================
class Block(nn.Sequential):
    """Twice 3x3x3 convolution (no bias: the norm undoes it), instance norm, LeakyReLU [nnU-Net]."""
    def __init__(self, c_in, c_out, stride=1):
        super().__init__()  # GroupNorm of single channels: InstanceNorm that keeps channels-last
        for c, s in ((c_in, stride), (c_out, 1)):
            self.extend([nn.Conv3d(c, c_out, 3, s, padding=1, bias=False),
                         nn.GroupNorm(c_out, c_out, eps=1e-5), nn.LeakyReLU(0.01, inplace=True)])
class UNet3D(nn.Module):
    """Plain 3D U-Net: (B, C, X, Y, Z), sizes divisible by 2^(levels-1), to (B, K, X, Y, Z)."""
    def __init__(self, num_classes, base_channels, levels, in_channels=1):
        super().__init__()  # Source: nnU-Net, without deep supervision
        ch = [min(base_channels * 2**i, 320) for i in range(levels)]  # 32, 64, 128, 256, 320
        steps = [*itertools.pairwise(ch)]  # (32, 64), (64, 128) ...
        self.down = nn.ModuleList([Block(in_channels, ch[0]), *(Block(a, b, 2) for a, b in steps)])
        self.up = nn.ModuleList([nn.ConvTranspose3d(b, a, 2, stride=2) for a, b in steps[::-1]])
        self.merge = nn.ModuleList([Block(2 * a, a) for a, _ in steps[::-1]])
        self.head = nn.Conv3d(ch[0], num_classes, 1)
    def forward(self, x):
        *levels, x = itertools.accumulate(self.down, lambda x, block: block(x), initial=x)  # halved
        for up, block, skipped in zip(self.up, self.merge, levels[::-1]):  # x is the deepest one
            x = block(torch.cat((up(x), skipped), dim=1))
        return self.head(x)  # (B, K, X, Y, Z)

def make_pair(config, num_classes):
    """Networks A and B: one structure, two draws of the weights, biases 0 [paper]."""
    networks, draws = [], {"he": nn.init.kaiming_normal_, "xavier": nn.init.xavier_normal_}
    with torch.random.fork_rng(devices=[]):  # leaves the caller's generator alone
        for which, scheme in enumerate(("he", config.init_b)):
            torch.manual_seed(2 * config.seed + which)  # of one seed, they would always agree
            networks.append(UNet3D(num_classes, config.base_channels, config.levels))
            for name, p in networks[-1].named_parameters():  # the norms begin as 1 and 0
                if p.ndim == 5 or name.endswith("bias"):  # LeakyReLU's slope is next to none
                    (draws[scheme] if p.ndim == 5 else nn.init.zeros_)(p)
    return networks

# 5. Data: NIfTI files in, memory-mapped arrays out ================================================
class Case(NamedTuple):
    """One scan."""
    name: str
    image: Path
    label: Path | None = None  # None where there is none, or where training must not read it
    arrays: tuple = ()  # .npy files, once prepared: image, and of a labelled case label and points
    info: tuple = ()  # once prepared: spacing x, y, z in mm, and a checksum of the image
def atomic(path, save, *args):
    """Call save(temporary, *args), a name in a folder of its own; then rename that to `path`."""
    (parent := Path(path).parent).mkdir(parents=True, exist_ok=True)
    with (blame(path, "cannot be written", "make room or change it", OSError),
          tempfile.TemporaryDirectory(prefix=".", dir=parent) as folder):
        save(temporary := Path(folder, Path(path).name), *args)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # on disk before it gets its name
        temporary.replace(path)  # a crash or a full disk leaves the old file or the new, no half
def write_text(path, text):
    """Write a text, or rows as CSV."""
    lines = [text] if type(text) is str else (",".join(map(str, row)) + "\n" for row in text)
    atomic(path, Path.write_text, "".join(lines), "utf-8")
def list_scans(*paths):
    """{case name: path} of NIfTI files or folders of them; nnU-Net's `_0000` is not in a name."""
    scans, match = {}, re.compile(r"([^.].*?)(_0000)?\.nii(\.gz)?").fullmatch  # not Path.stem
    for path in map(Path, paths):
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        found = {file: match(file.name)[1] for file in files if match(file.name)}
        need(found, f"{path}: no .nii or .nii.gz file here; give a scan or a folder of scans")
        for file, name in found.items():
            other = scans.get(name.removesuffix("_0001")) or scans.setdefault(name, file)
            need(other is file, f"{file}: of the same case as {other}; keep one image a case")
    return scans
def split_cases(config):
    """The cases of config.data: {"labelled", "unlabelled", "val", "test"}, each a list of Case."""
    labels = list_scans((root := Path(config.data)) / "labelsTr")
    images = list_scans(root / "imagesTr", *root.glob("imagesUn"), *config.unlabelled)
    need({*labels} <= {*images}, f"{root}/imagesTr: add images {sorted({*labels} - {*images})[:5]}")
    known = np.random.default_rng(0).permutation(sorted(labels)).tolist()  # all seeds: same tests
    test, val = (int(np.ceil(n if n >= 1 else n * len(known))) for n in (config.test, config.val))
    rest = np.random.default_rng((1, config.seed)).permutation(known[test:]).tolist()
    n = config.labelled or len(rest) - val  # 0: all that are left
    need(0 < n <= len(rest) - val, f"--labelled, --val, --test: want more than {len(known)} cases")
    parts = {"labelled": rest[val:val + n], "val": rest[:val], "test": known[:test],
             "unlabelled": rest[val + n:] + sorted(images.keys() - labels.keys())}  # no labels now
    need(parts["unlabelled"] or config.method == "supervised",
         f"{root}: no unlabelled image; add imagesUn, --unlabelled DIR or --labelled N")
    return {part: [Case(name, images[name], labels[name] if part != "unlabelled" else None)
                   for name in names] for part, names in parts.items()}
def read_scan(path, is_label=False, canonical=True, like=None):
    """Read a NIfTI file: volume (X, Y, Z), float32 or uint8, spacing in mm (3,), nibabel image.
    canonical: turned to RAS+; like: an image on whose grid it must lie. UserError if no scan."""
    with blame(path, "cannot be used", "replace or mend the file"):
        scan = nib.load(path)
        need(scan.get_data_dtype().kind in "iuf", f"its voxels are {scan.get_data_dtype()}")
        need(scan.ndim > 2 and {*scan.shape[3:]} <= {1}, f"its shape {scan.shape} is not 3D")
        volume = scan.get_fdata(dtype=np.float32, caching="unchanged").reshape(scan.shape[:3])
        spacing, axes = nib.affines.voxel_sizes(scan.affine), nib.io_orientation(scan.affine)
        need(all(1e-3 < s < 1e3 for s in spacing) and not np.isnan(axes).any(),
             f"its spacing {spacing.round(6).tolist()} mm is impossible")
        need(volume.size and np.isfinite(volume).all(), "it is empty, or holds NaN or infinity")
        need(like is None or scan.shape == like.shape and np.allclose(
            scan.affine, like.affine, atol=0.01), "its shape or affine is not that of the image")
        wrong = volume[abs(volume - volume.round().clip(0, 255)) > 1e-3] if is_label else ()
        need(not len(wrong), f"labels {np.unique(wrong)[:3]} are no whole numbers from 0 to 255")
    volume = volume.round().astype(np.uint8) if is_label else volume
    if canonical:  # in one memory order too: then sums, and so results, agree to the bit
        volume = np.ascontiguousarray(nib.apply_orientation(volume, axes))
        spacing = spacing[np.argsort(axes[:, 0])]
    return volume, spacing, scan
def resample(volume, shape, is_label=False):
    """Resample (X, Y, Z), edges aligned: linear; labels nearest, as 2 is not between 1 and 3."""
    grid, mode = torch.from_numpy(volume)[None, None], "nearest-exact" if is_label else "trilinear"
    return nn.functional.interpolate(grid, tuple(map(int, shape)), mode=mode)[0, 0].numpy()
def preprocess(volume, spacing, config, path):
    """Clip, resample, z-score of a volume [paper, scope ours], in place if it can: float32."""
    low, high = config.clip or np.percentile(volume, (0.5, 99.5))  # HU, or whatever unit
    np.clip(volume, low, high, out=volume)  # first: no implant spreads, or decides mean and sd
    if config.spacing:
        volume = resample(volume, np.rint(volume.shape * spacing / config.spacing).clip(1))
    std, mean = torch.std_mean(torch.from_numpy(volume))  # over all voxels, air too
    need(std > 1e-6, f"{path}: constant from {low:g} to {high:g}; set --clip or remove it")
    return torch.from_numpy(volume).sub_(mean).div_(std).numpy()
def prepare_case(case, config):
    """The case with its arrays in the cache, made only where they are missing, damaged or stale:
    image float16, label uint8, points int32 (n, 4): id, x, y, z of up to 1000 voxels a label."""
    files = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in case[1:3] if f]
    key = zlib.crc32(repr((files, config.clip, config.spacing)).encode())  # in the names
    parts = ("image", "label", "points", "info") if case.label else ("image", "info")
    paths = [f"{config.cache}/{case.name}-{key}.{part}.npy" for part in parts]
    try:
        *_, info = (np.load(path, mmap_mode="r") for path in paths)  # whole and readable?
    except (OSError, ValueError, EOFError):
        volume, spacing, scan = read_scan(case.image)
        arrays = [preprocess(volume, spacing, config, case.image).astype(np.float16)]  # to < 1 HU
        if case.label:
            label = resample(read_scan(case.label, True, like=scan)[0], arrays[0].shape, True)
            rng, ids = np.random.default_rng(0), np.unique(label[label > 0])
            points = [(i, *p) for i in ids for p in rng.permutation(np.argwhere(label == i))[:1000]]
            arrays += [label, np.array(points, np.int32).reshape(-1, 4)]  # (0, 4) of no label
        info = np.array((*(config.spacing or spacing), zlib.crc32(arrays[0])))
        for path, array in zip(paths, [*arrays, info]):
            atomic(path, np.save, array)
    return case._replace(arrays=tuple(paths[:-1]), info=tuple(info.tolist()))
def progress(what, done, total, start):
    """Redraw one line with the time left, on a terminal only."""
    if sys.stdout.isatty():
        left = datetime.timedelta(seconds=int((time.monotonic() - start) / done * (total - done)))
        print(f"{what} {done}/{total}, {left} left  ", end="\r\n"[done == total], flush=True)
def for_each(what, items, one, threads=1):
    """Call one(name, item) for all items and report bad ones: exit code 1 if some are, 2 if all."""
    bad, start = 0, time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        codes = (pool.map if threads > 1 else map)(lambda pair: attempt(one, *pair), items.items())
        for i, code in enumerate(codes, 1):
            bad += code == 2
            progress(what, i, len(items), start)
    print(f"{what}: {len(items) - bad} of {len(items)} done in {time.monotonic() - start:.1f} s")
    return 0 if not bad else 2 if bad == len(items) else 1
def prepare(split, config):
    """The split, all its cases checked and cached; the problems of all are reported in one go."""
    def one(name, case):
        done[name] = case = prepare_case(case, config)
        twin = seen.setdefault(case.info[3], case.image)  # on both sides of a split it is a leak
        need(twin == case.image, f"{case.image}: has the same voxels as {twin}; remove one of them")
        if case.label and not len(np.load(case.arrays[2])):
            print(f"warning: {case.label}: no voxel is labelled", file=sys.stderr)
    done, seen, cases = {}, {}, {case.name: case for part in split.values() for case in part}
    what = ", ".join(f"{len(part)} {name}" for name, part in split.items())
    code = for_each(f"preparing {what}", cases, one, threads=min(4, os.cpu_count() or 1))
    need(not code, f"{config.data}: some cases cannot be used, see above; mend or remove them")
    return {part: [done[case.name] for case in cases] for part, cases in split.items()}

# 6. Phantom: something to segment on any machine ==================================================
ORGANS = (("fat", (0, 0, 0), (100, 90, 400), -90), ("muscle", (0, 0, 0), (90, 80, 400), 45),
          ("spine", (0, -60, 0), (16, 18, 300), 350), ("stomach", (-30, 42, 35), (30, 28, 36), 70),
          ("liver", (42, 16, 42), (42, 50, 50), 110), ("spleen", (-58, -14, 42), (26, 34, 42), 130),
          *[("kidney", (x, -34, -50), (24, 24, 40), 170) for x in (40, -40)],  # only context tells
          ("aorta", (0, -20, 0), (14, 14, 300), 195))  # centre and radii in % of half the width, HU
def phantom_volume(rng, shape=(48, 48, 40)):
    """A body in RAS+, each another: image float (X, Y, Z) in HU and label uint8 (X, Y, Z)."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1.1, 1.1, n) for n in shape), indexing="ij"))
    for coordinate in grid:  # a smooth random displacement: no outline is an ellipsoid
        coordinate += rng.uniform(1.3, 3.7) * ndimage.gaussian_filter(rng.standard_normal(shape), 5)
    image, label, phase = np.full(shape, -1000.0), np.zeros(shape, np.uint8), rng.uniform(0.8, 1.2)
    for i, (_, centre, radii, hu) in enumerate(ORGANS, -3):  # the first four have no label
        centre = np.divide(centre, 100) + rng.uniform(-0.06, 0.06, 3) * (i > -2)
        radii = np.divide(radii, 100) * (rng.uniform(0.9, 1.1, 3) if i > -2 else 1)
        organ = sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii)) < 1  # an ellipsoid
        image[organ], label[organ] = hu * phase * rng.uniform(0.95, 1.05), max(0, i)
    image = ndimage.gaussian_filter(image, rng.uniform(0.4, 0.8)) + rng.uniform(-10, 10)  # scanner
    return image + rng.normal(0, rng.uniform(10, 30), shape), label
def make_phantom(folder):
    """Write what is missing of it: 12 labelled (Tr), 24 unlabelled (Un), 4 test cases (Ts)."""
    for group, part, count in ((0, "Tr", 12), (1, "Un", 24), (2, "Ts", 4)):
        for i, kind in itertools.product(range(count), ("labels", "images")[part == "Un":]):
            path = Path(folder) / (kind + part) / f"phantom{part}{i:02}.nii.gz"
            if not path.exists():
                array = phantom_volume(np.random.default_rng((group, i)))[kind == "labels"]
                array = array[::-1, ::-1].round().astype(np.int16)  # LPS: never RAS+ by luck
                atomic(path, nib.Nifti1Image(array, np.diag((-6, -6, 6, 1))).to_filename)

# 7. Patches: batch number i, from (seed, i) alone =================================================
def read_box(volume, corner, shape, matrix=None, outside=0):
    """Cut a box out of a volume (X, Y, Z), maybe memory-mapped: only it is read. corner: an array.
    Returns float32, 0 (the mean) outside the volume; with outside=-1, for labels: int16, -1."""
    if matrix is not None:  # (3, 3): maps offsets from the box's centre to those in the volume
        half = np.ceil(np.abs(matrix) @ (shape / 2)).astype(int) + 1  # of a box that covers it all
        wide = read_box(volume, corner + shape // 2 - half, 2 * half + 1, None, outside)
        return ndimage.affine_transform(wide, matrix, half - matrix @ (shape // 2), tuple(shape),
                                        order=1 + outside, cval=outside)  # linear or nearest
    box = np.full(shape, outside, np.int16 if outside else np.float32)  # all padding at first
    low, high = np.clip(corner, 0, volume.shape), np.clip(corner + shape, 0, volume.shape)  # inside
    box[tuple(map(slice, low - corner, high - corner))] = volume[tuple(map(slice, low, high))]
    return box
def spatial_matrix(rng, spacing):
    """Rotation to 30 degrees, scale 0.7 to 1.4 [nnU-Net]; in mm, else uneven voxels would shear."""
    turn = spatial.transform.Rotation.from_euler("xyz", rng.uniform(-30, 30, 3), degrees=True)
    scale = rng.uniform(*((0.7, 1) if rng.random() < 0.5 else (1, 1.4)))
    return scale * np.diag(1 / np.asarray(spacing)) @ turn.as_matrix() @ np.diag(spacing)
def augment(patch, rng, chance):
    """New float32 (X, Y, Z), intensities changed: nnU-Net's kinds, about its chances and ranges."""
    chances = chance * np.array((0.1, 0.1, 0.15, 0.15, 0.25, 0.3))
    noise, blur, brightness, contrast, coarse, gamma = rng.random(6) < chances
    if noise:
        patch = patch + rng.uniform(0, 0.1) * rng.standard_normal(patch.shape, np.float32)
    patch = ndimage.gaussian_filter(patch, rng.uniform(0.5, 1)) if blur else patch  # sd in voxels
    patch = patch * rng.uniform(0.75, 1.25) if brightness else patch  # around 0, the mean
    if contrast:
        mean, low, high = patch.mean(), patch.min(), patch.max()
        patch = np.clip((patch - mean) * rng.uniform(0.75, 1.25) + mean, low, high)
    if coarse:  # low resolution: every n-th voxel, then back to size
        small = [max(1, round(n * zoom)) for zoom in [rng.uniform(0.5, 1)] for n in patch.shape]
        patch = resample(resample(np.array(patch, np.float32), small, is_label=True), patch.shape)
    if gamma:
        patch = patch * (sign := -1 if rng.random() < 1 / 3 else 1)  # inverted in one of three
        low, size = patch.min(), np.ptp(patch) + 1e-6
        patch = sign * (((patch - low) / size) ** rng.uniform(0.7, 1.5) * size + low)
    return np.array(patch, dtype=np.float32)
class Patches(torch.utils.data.Dataset):
    """Item i is the batch of step i, a dict. tensors: images for A and for B, (B + n, 1, *P), first
    B labelled patches, then n crops (n = B; 0 for `supervised`); target int64 (B, *P), classes or
    -1 for padding; valid bool (n, *P), less padding. overlaps: n pairs of slices."""
    def __init__(self, config, split, ids, rank=0):
        self.config, self.patch = config, np.array(config.patch)
        self.parts = [split["labelled"], split["unlabelled"]][:1 + (config.method != "supervised")]
        self.which = range(rank * config.batch, (rank + 1) * config.batch)  # patch g over all ranks
        self.class_of = np.append(np.searchsorted([0, *ids], range(256)), -1)  # label id -> class
    def __getitem__(self, step):  # by chance of (seed, step, g) alone: resuming is exact
        labelled, pairs = [], []  # of pairs A sees the first crop, at odd steps B
        for g in self.which:
            rng = np.random.default_rng((self.config.seed, step, g))  # cases alike for all methods
            cases = [part[int(u * len(part))] for part, u in zip(self.parts, rng.random(2))]
            labelled.append([self.labelled_patch(cases[0], rng, centred=(step + g) % 2 == 1)] * 2)
            pairs += [self.unlabelled_pair(case, rng)[::1 - step % 2 * 2] for case in cases[1:]]
        images = [np.stack([pair[i][0] for pair in labelled + pairs])[:, None] for i in (0, 1)]
        target, seen = (np.stack([a[1] for a, _ in two]) for two in (labelled, pairs or labelled))
        tensors = [torch.from_numpy(array) for array in (*images, target, seen >= 0)]  # A's, B's
        return {"tensors": tensors, "overlaps": [(a[2], b[2]) for a, b in pairs]}
    def crops(self, case, rng, corners):
        """The patches at one or two corners: (image float32, classes int64 or -1 outside, overlap),
        from one box turned as a whole, so that overlaps stay boxes; intensities change apart."""
        low, high = np.min(corners, axis=0), np.max(corners, axis=0) + self.patch  # the box
        volume, *label = (np.load(path, mmap_mode="r") for path in case.arrays[:2])
        label = label[0] if label else np.broadcast_to(np.uint8(0), volume.shape)
        matrix = spatial_matrix(rng, case.info[:3]) if rng.random() < self.config.spatial else None
        axes = tuple("xyz".index(a) for a in sorted({*self.config.mirror}) if rng.random() < 0.5)
        image, label = (np.flip(read_box(array, low, high - low, matrix, outside), axes)
                        for array, outside in ((volume, 0), (label, -1)))
        boxes = [tuple(map(slice, corner - low, corner - low + self.patch)) for corner in corners]
        return [(augment(image[box], rng, self.config.intensity), self.class_of[label[box]], where)
                for box, where in zip(boxes, overlap_slices(corners[0], corners[-1], self.patch))]
    def labelled_patch(self, case, rng, centred):
        """A patch; `centred` on a voxel of a random class, as small organs need it [nnU-Net]."""
        room = np.maximum(np.load(case.arrays[0], mmap_mode="r").shape - self.patch, 0)
        corner, points = rng.integers(0, room + 1), np.load(case.arrays[2])
        if centred and len(points):  # by the label: on unlabelled cases it would be a leak
            points = points[points[:, 0] == rng.choice(np.unique(points[:, 0]))]
            corner = np.clip(points[rng.integers(len(points)), 1:] - self.patch // 2, 0, room)
        return self.crops(case, rng, [corner])[0]
    def unlabelled_pair(self, case, rng):
        """Two crops of a volume; of method `cps` they are equal, which is its only difference."""
        shape = np.load(case.arrays[0], mmap_mode="r").shape
        corners = overlapping_corners(rng, shape, self.patch, self.config.min_overlap)
        return self.crops(case, rng, corners[:1] * 2 if self.config.method == "cps" else corners)

# 8. Training: train_step is the heart, the rest is bookkeeping ====================================
def train_step(networks, optimisers, batch, lam, config, scaler, autocast):
    """The heart: one optimiser step of A and of B on a batch of `Patches`.
    Returns float (4,): loss_sup, loss_cps, and on the overlaps the share of voxels on which A and B
    agree and the share of foreground pseudo labels. All stay on the device: no wait for a GPU."""
    (*images, target, valid), overlaps = batch["tensors"], batch["overlaps"]
    with autocast:  # one forward for labelled patches and crops: instance norm keeps them apart
        logits = [network(image) for network, image in zip(networks, images)]  # (B + n, K, *P)
    sup = sum(dice_ce_loss(out[:len(target)], target) for out in logits)  # L_sup(A) + L_sup(B)
    terms = []
    for i, pair in enumerate(overlaps):
        a, b = (out[i - len(overlaps), None][(..., *where)] for out, where in zip(logits, pair))
        seen = valid[i, None][(..., *pair[0])]  # (1, x, y, z); a, b: (1, K, x, y, z)
        labels, share = torch.stack((pseudo_label(a), pseudo_label(b))), seen / seen.sum().clamp(1)
        terms.append(torch.stack((cross_pseudo_loss(a, b, seen, config.pseudo_loss == "dice_ce"),
                                  ((labels[0] == labels[1]) * share).sum(),
                                  (labels.sign() * share).sum() / 2)))  # shares without padding
    cps, agreement, foreground = torch.stack(terms).mean(0) if terms else sup.new_zeros(3)
    loss = sup + lam * cps  # L
    scaler.scale(loss).backward()  # one backward for both networks: no graph connects them
    for network, optimiser in zip(networks, optimisers):
        scaler.unscale_(optimiser)  # the norm is of true gradients
        nn.utils.clip_grad_norm_(network.parameters(), config.grad_clip or inf)
        scaler.step(optimiser)
        optimiser.zero_grad(set_to_none=True)
    scaler.update()
    return torch.stack((sup, cps, agreement, foreground)).detach()

class Run:
    """All that changes while training, which is all that a checkpoint holds."""
    def __init__(self, config, ids):
        gpu = config.device != "cpu" and torch.cuda.is_available()  # "auto" takes it
        self.device = torch.device(config.device.replace("auto", "cuda" if gpu else "cpu"))
        torch.backends.cudnn.benchmark = gpu  # one patch size: the search for kernels pays
        self.config, self.ids = config, ids
        self.networks = [n.to(self.device, memory_format=torch.channels_last_3d)
                         for n in make_pair(config, len(ids) + 1)]
        self.optimisers = [torch.optim.SGD(n.parameters(), momentum=config.momentum, nesterov=True,
                                           weight_decay=config.weight_decay) for n in self.networks]
        amp, bf16 = gpu and config.amp, gpu and torch.cuda.get_device_capability(self.device) > (8,)
        self.autocast = torch.autocast(self.device.type, [torch.float16, torch.bfloat16][bf16], amp)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp and not bf16)  # fp16 needs
        self.step, self.best, self.rows, self.sums = 0, -1.0, [], torch.zeros(4, device=self.device)
    def save(self, name):
        """Write plain values and tensors, by way of memory: torch hides that a disk is full."""
        need(self.sums.isfinite().all(), f"{self.config.out}: the loss is not finite; lower --lr")
        state = {k: getattr(self, k) for k in ("ids", "step", "best", "rows", "sums")}
        parts = [part.state_dict() for part in (*self.networks, *self.optimisers, self.scaler)]
        torch.save(state | {"config": asdict(self.config), "parts": parts}, file := io.BytesIO())
        atomic(Path(self.config.out) / name, Path.write_bytes, file.getbuffer())
    @classmethod
    def load(cls, path, **changes):
        """The run of a checkpoint, some fields of its config changed. Code in it is not run."""
        with blame(path, "cannot be loaded", "mend that, or give best.pt, last.pt or model.onnx"):
            if Path(path).suffix == ".onnx":  # by `export`, for inference only
                import onnxruntime  # optional
                onnx = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
                config, ids = json.loads(onnx.get_modelmeta().custom_metadata_map["cps"])
                run = cls(Config(**config | {"device": "cpu"}), ids)
                run.networks = [lambda x: torch.from_numpy(onnx.run(None, {"image": x.numpy()})[0])]
                return run
            need(not zipfile.ZipFile(path).testzip(), "it is damaged")  # torch skips the checksums
            state = torch.load(path, map_location="cpu", weights_only=True)  # no code of a pickle
            run = cls(Config(**state.pop("config") | changes), state["ids"])
            own = (*run.networks, *run.optimisers, run.scaler)
            for part, saved in zip(own, state.pop("parts"), strict=True):
                part.load_state_dict(saved or part.state_dict())  # a scaler that was off has none
            vars(run).update(state, sums=state["sums"].to(run.device))
            return run

LOG = ("step", "lr", "lam", "loss_sup", "loss_cps", "agreement", "foreground", "dice", "seconds")
def train(config: Config):
    """Train a pair of networks. Returns best_dice, checkpoint, steps, results and more, a dict."""
    out, last, best = Path(config.out), Path(config.out, "last.pt"), Path(config.out, "best.pt")
    need(RANK or config.resume or not last.exists(), f"{out}: holds a run; --resume or other --out")
    distributed.is_initialized() and distributed.barrier()  # the others write only after this check
    print(*(f"{key}={value}" for key, value in asdict(config).items()), flush=True)
    split = prepare(split_cases(config), config)  # all is checked before anything is trained
    points = [np.load(c.arrays[2]) for cases in split.values() for c in cases if c.label]
    ids = np.unique(np.concatenate(points)[:, 0]).tolist()
    need(ids, f"{config.data}: all labels are empty; there is nothing to learn")
    out.mkdir(parents=True, exist_ok=True)
    with blame(out, "in use by another run", "end it, or change --out"):  # on any system
        (lock := sqlite3.connect(out / f".lock{RANK}", timeout=0)).execute("BEGIN EXCLUSIVE")
    with closing(lock):  # even kill -9 ends it
        names = json.dumps({part: [c.name for c in some] for part, some in split.items()}, indent=1)
        if not last.exists():  # all processes of torchrun write the same
            write_text(out / "split.json", names)
            write_text(out / "config.json", json.dumps(asdict(config), indent=1))
            write_text(out / "cps.py", Path(__file__).read_text("utf-8"))
            Run(config, ids).save("last.pt")
        run = Run.load(last, **{key: getattr(config, key) for key in MAY_CHANGE})
        other = dict(asdict(config).items() - asdict(run.config).items())
        if (names, ids) != ((out / "split.json").read_text("utf-8", "replace"), run.ids):
            other["cases or label ids"] = ids
        need(not other, f"{last}: begun with other values than {other}; change them or --out")
        train_loop(run, Patches(config, split, ids, RANK), split["val"])
        distributed.is_initialized() and distributed.barrier()  # until best.pt is there
        images = max(Path(config.data).glob("imagesT[rs]"))  # of test cases, if there are any
        found, part = Run.load(best, device=config.device), "test" if split["test"] else "val"
        results = validate(found, split[part], tolerance=2.0)
        print(f"\n{best}: mean Dice {run.best:.4f} on the {len(split['val'])} cases that chose it",
              f"\n{len(results)} {part} cases:\n{table(results, '2 mm')}" if results else "")
        try:
            RANK or figure(run, found, split["val"][:3])
        except (ImportError, AttributeError):  # absent, or old
            print(f"no {out}/figure.png: pip install -U matplotlib")
        print(f"\nNext: python cps.py predict {best} {images} {out}/predictions")
        return {"checkpoint": str(best), "steps": run.step, "best_dice": run.best,  # of validation
                "run": found, "test": split["test"], "results": results,  # {case: {id: scores}}
                "minutes": sum(row[-1] for row in run.rows) * config.epoch_steps / 60}
def train_loop(run, patches, val):
    """From the step of `run` to the last; each epoch a row, a checkpoint and maybe validation."""
    config, sgd, gpu, stop = run.config, run.optimisers, run.device.type == "cuda", []
    steps = config.epochs * config.epoch_steps
    def note(number, frame):  # a first signal lets the step end, a second one ends the process
        stop.append(signal.signal(number, signal.SIG_DFL))  # loader workers inherit it: Ctrl-C too
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)
              if not distributed.is_initialized()}  # torchrun: one cannot stop alone
    loader = torch.utils.data.DataLoader(patches, None, sampler=range(run.step, steps),
                                         num_workers=gpu * config.workers, pin_memory=gpu)
    print(f"{run.device}, from step {run.step} on\n" + " ".join(f"{k:>9}" for k in LOG), "    left")
    networks = [torch.compile(net) if config.compile else net for net in run.networks]
    if distributed.is_initialized():  # averages the gradients of all processes
        networks = [nn.parallel.DistributedDataParallel(network) for network in networks]
    start, first = time.monotonic(), run.step
    try:
        for batch in loader:
            batch["tensors"] = [t.to(run.device, non_blocking=True) for t in batch["tensors"]]
            lam = config.lam * rampup(run.step, config.rampup * steps)
            lr = config.lr * 0.5 ** (run.step // config.epoch_steps // config.halve_epochs)
            for optimiser in sgd:
                optimiser.param_groups[0]["lr"] = lr
            run.sums += train_step(networks, sgd, batch, lam, config, run.scaler, run.autocast)
            run.step += 1  # what a checkpoint calls done
            progress("step", run.step - first, steps - first, start)
            if run.step % config.epoch_steps == 0:
                end_epoch(run, val, lr, lam, steps, start, first)
                start, first = time.monotonic(), run.step
            if stop:
                run.save("last.pt")
                raise KeyboardInterrupt(f"step {run.step} is saved; run this again with --resume")
    finally:
        list(map(signal.signal, before, before.values()))
def end_epoch(run, val, lr, lam, steps, start, first):
    """Validate if it is time, log a row, write last.pt and, if this is the best, best.pt."""
    if distributed.is_initialized():
        distributed.all_reduce(run.sums.div_(distributed.get_world_size()))  # the mean of all
    config, dice, means = run.config, nan, (run.sums / run.config.epoch_steps).tolist()  # waits
    epoch, seconds = run.step // config.epoch_steps, (time.monotonic() - start) / (run.step - first)
    if val and means[0] < inf and (epoch % config.validate_epochs == 0 or epoch == config.epochs):
        dice = float(np.mean([d for c in validate(run, val).values() for d, _ in c.values()]))
    means[1:] = means[1:] if config.method != "supervised" else [nan] * 3
    run.rows.append((run.step, lr, lam, *means, dice, seconds))
    run.sums *= 0  # what is not finite becomes NaN, which is never saved
    if RANK:
        return
    write_text(Path(config.out, "log.csv"), [LOG, *run.rows])  # anew: no gap, no double
    texts = (f"{round(v, 5):>{max(9, len(name))}}" for name, v in zip(LOG, run.rows[-1]))
    print(*texts, datetime.timedelta(seconds=int(seconds * (steps - run.step))), flush=True)
    if dice > run.best or epoch == config.epochs and not val:
        run.best = dice
        run.save("best.pt")
    run.save("last.pt")
def validate(run, cases, tolerance=None, networks="a"):
    """{case: {id: (Dice, NSD)}} of prepared cases, on the grid of the cache."""
    return {case.name: evaluate_case(
        segment(run, np.load(case.arrays[0], "r"), networks), np.load(case.arrays[1], "r"),
        case.info[:3], run.ids, tolerance) for case in cases}

# 9. Inference =====================================================================================
@torch.inference_mode()
def sliding_window(networks, volume, patch, num_classes, overlap=0.5, device="cpu", flips=((),)):
    """Classes uint8 (X, Y, Z) of a preprocessed volume of any size, float (X, Y, Z): those of the
    largest Gaussian-weighted mean softmax over all windows, networks and flips (axes of (B, C, X,
    Y, Z) to mirror). The last window, or padding, is at the end. Only a slab of the sums exists."""
    shape = np.maximum(volume.shape, patch)  # with the padding
    axis = int(np.argmin(np.asarray(patch) / shape))  # across which a slab is smallest
    starts = [[*range(0, s - p, int(p * (1 - overlap)) or 1), s - p] for s, p in zip(shape, patch)]
    firsts, starts[axis] = starts[axis], [0]  # along `axis`, corners are counted within the slab
    x, y, z = (np.exp(-0.5 * ((np.arange(p) - (p - 1) / 2) / (p / 8)) ** 2) for p in patch)  # (p,)
    weight = torch.tensor(np.einsum("x,y,z->xyz", x, y, z), device=device).float().clamp(1e-3)
    slab = torch.zeros(num_classes, *np.where(np.arange(3) == axis, patch, shape), device=device)
    result = torch.zeros(*shape, dtype=torch.uint8)  # the slab's argmax, as far as it is done
    corners, along = [*itertools.product(*starts)], np.eye(3, dtype=int)[axis]
    for first, done in zip(firsts, np.diff([*firsts, shape[axis]])):
        for pair in itertools.zip_longest(corners[::2], corners[1::2], fillvalue=corners[-1]):
            boxes = [read_box(volume, corner + along * first, patch) for corner in pair]
            windows = torch.from_numpy(np.stack(boxes)[:, None]).to(device)  # one alone: 5x slower
            for network, axes in itertools.product(networks, flips):
                logits = network(windows.flip(axes))  # (2, K, *P); an odd last window came twice
                for corner, out in dict(zip(pair, logits.flip(axes) if axes else logits)).items():
                    box = (..., *map(slice, corner, np.add(corner, patch)))
                    slab[box] += out.float().softmax(0).mul_(weight)
                del logits, out  # else they stay in memory beside those of the next windows
        result.narrow(axis, first, done).copy_(slab.narrow(axis + 1, 0, done).argmax(0))
        for layer in slab.movedim(axis + 1, 1):  # one by one: all at once would take half a slab
            layer[:-done], layer[-done:] = layer[done:].clone(), 0
    return result.numpy()[tuple(map(slice, volume.shape))]
def largest_components(labels):
    """Keep the largest component (of voxels that share a face) of each label of uint8 (X, Y, Z)."""
    kept = np.zeros_like(labels)  # uint8 (X, Y, Z)
    for label, box in [(i, b) for i, b in enumerate(ndimage.find_objects(labels), 1) if b]:
        parts, _ = ndimage.label(labels[box] == label)
        kept[box][parts == np.bincount(parts.ravel())[1:].argmax() + 1] = label
    return kept  # uint8 (X, Y, Z)
def segment(run, volume, networks="a", largest=True, flips=((),)):
    """Label ids uint8 (X, Y, Z) of a preprocessed volume: sliding window, largest components."""
    networks = run.networks[{"a": slice(1), "b": slice(1, 2), "both": slice(2)}[networks]]
    classes = run.autocast(sliding_window)(  # called within the context
        networks, volume, run.config.patch, len(run.ids) + 1, device=run.device, flips=flips)
    return np.array([0, *run.ids], np.uint8)[largest_components(classes) if largest else classes]
def write_like(labels, scan, path):
    """Write RAS+ labels uint8 (X, Y, Z) as NIfTI in shape, orientation and geometry of a scan."""
    header, (axes, sign) = scan.header.copy(), nib.io_orientation(scan.affine).T  # of each axis
    header["cal_min"] = header["cal_max"] = 0  # the scan's display window; qform, sform stay
    labels = np.flip(labels.transpose(np.int8(axes)), np.flatnonzero(sign < 0)).reshape(scan.shape)
    atomic(path, type(scan)(labels, None, header, dtype=np.uint8).to_filename)
def predict(
        checkpoint: str,  # best.pt or last.pt of a run, or model.onnx
        images: str,  # a NIfTI file or a folder of them
        out: str,  # folder for the segmentations
        networks: Literal["a", "b", "both"] = "a",  # both: mean softmax, twice the time [CPS: a]
        tta: bool = False,  # average over mirrored copies, along the axes that were trained with
        largest: bool = True,  # keep only the largest component of each label [ours]
        device: str = "auto"):  # cpu, cuda, cuda:1, ...
    """Segment a scan or the scans of a folder. Returns the exit code: 1 if some could not be."""
    run = Run.load(checkpoint, device=device)
    need(networks == "a" or run.networks[1:], f"--networks {networks}: {checkpoint} holds A alone")
    axes = [2 + "xyz".index(a) for a in sorted({*run.config.mirror})] if tta else []
    flips = [f for n in range(len(axes) + 1) for f in itertools.combinations(axes, n)]
    need(axes or not tta, "--tta: the networks were trained without --mirror; leave it out")
    def one(name, path):
        need(path.parent.resolve() != Path(out).resolve(), f"{path}: is in OUT_DIR; choose another")
        volume, spacing, scan = read_scan(path)
        ids = segment(run, preprocess(volume, spacing, run.config, path), networks, largest, flips)
        write_like(resample(ids, volume.shape, is_label=True), scan, Path(out) / f"{name}.nii.gz")
    return for_each("predicting", list_scans(images), one)

# 10. Evaluation ===================================================================================
FLARE22 = {1: 5, 2: 3, 3: 3, 4: 5, 5: 2, 6: 2, 7: 2, 8: 2, 9: 2, 10: 3, 11: 5, 12: 7, 13: 3}  # mm
# Code of a corner's 2x2x2 voxels (128 ... 1 in C order): 8 x normals of its triangles, in digits.
SURFELS = ("1:111 3:220220 6:111111 24:111111 7:400222111 15:400400 22:111111111 23:111222111222 "
           "25:022022111 27:111333022202 30:400111111222 60:220220220220 105:111111111111")
def dice(pred, ref):
    """Dice coefficient of two bool arrays: 1 if both are empty, 0 if one is [FLARE22]."""
    size = np.count_nonzero(pred) + np.count_nonzero(ref)  # voxels
    return 2 * np.count_nonzero(pred & ref) / size if size else 1.0
@functools.cache  # of one scan all labels have the same
def surfel_areas(spacing):
    """float (256,): mm2 of surface at a voxel corner, by code; spacing in mm (3,). Each code is a
    mirror, turn or complement of one of SURFELS. Source: google-deepmind/surface-distance."""
    areas, faces = np.zeros(256), np.roll(spacing, -1) * np.roll(spacing, -2)  # mm2, across an axis
    turns = itertools.product(itertools.permutations(range(3)), *[(1, -1)] * 3, SURFELS.split())
    for axes, i, j, k, surfel in turns:
        code, digits = surfel.split(":")
        twin = np.unpackbits(np.uint8(code)).reshape(2, 2, 2).transpose(axes)[::i, ::j, ::k]
        normals = np.reshape([*map(int, digits)], (-1, 3))[:, axes] / 8  # of one to four triangles
        areas[np.packbits((twin, 1 - twin))] = np.linalg.norm(normals * faces, axis=1).sum()
    return areas
def surface_dice(pred, ref, spacing, tolerance):
    """Surface Dice (NSD) of two bool arrays (X, Y, Z): the share of both surfaces' area within
    `tolerance` mm of the other one; 1 if both are empty, 0 if one is. spacing: mm, array order."""
    if not pred.any() or not ref.any():
        return float(pred.any() == ref.any())
    box = ndimage.find_objects((pred | ref).view(np.uint8))[0]  # around both: it is enough
    bits = (128 >> np.arange(8)).reshape(2, 2, 2)  # of the code of the voxels at a corner
    codes = [ndimage.correlate(np.pad(mask[box], (0, 1)).view(np.uint8), bits, mode="constant")
             for mask in (pred, ref)]  # uint8 (x+1, y+1, z+1), between 0 and 255 at the surface
    areas, near, total = surfel_areas(tuple(spacing)), 0.0, 0.0  # (256,), mm2, mm2
    for code, other in (codes, codes[::-1]):
        here = code % 255 > 0
        distance = ndimage.distance_transform_edt(other % 255 == 0, sampling=spacing)[here]  # mm
        area = areas[code[here]]  # mm2 of each surface corner
        near, total = near + area[distance <= tolerance].sum(), total + area.sum()
    return float(near / total)  # mm2 by mm2
def evaluate_case(pred, ref, spacing, labels, tolerances=None, flare22=False):
    """{label: (Dice, NSD)} of two integer arrays (X, Y, Z); spacing in mm, array order. tolerances
    in mm: one, or one a label (dict or sequence); None: NSD is NaN. flare22: challenge's rules."""
    if not isinstance(tolerances, dict):
        tolerances = dict(zip(labels, np.broadcast_to(tolerances, len(labels))))
    both, results = np.stack((pred, ref)).astype(np.uint8, copy=False), {}  # (2, X, Y, Z)
    boxes = ndimage.find_objects(both, 255)  # four slices around each label; None: not there
    for label in labels:
        p, r = both[(..., *(boxes[label - 1] or ())[1:])] == label  # in the box of both
        if flare22 and label in (5, 6, 10) and r.any():  # tubes: without the reference's last
            z = np.flatnonzero(r.any((0, 1)))  # slice, but a single slice is kept
            p, r = (mask[..., z[0]:max(z[-1], z[0] + 1)] for mask in (p, r))
        d, t = dice(p, r), tolerances[label]
        nsd = nan if t is None else 0.0 if flare22 and d < 0.2 else surface_dice(p, r, spacing, t)
        results[label] = (round(d, 4), round(nsd, 4)) if flare22 else (d, nsd)  # 4 digits
    return results
def markdown(rows):
    """Text of a Markdown table; the first row is the head."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
def table(results, tolerance):
    """Markdown table of {case: {label: (Dice, NSD)}}: mean +- sd over the cases, a row a label."""
    scores = np.array([[*c.values(), np.mean([*c.values()], axis=0)] for c in results.values()])
    rows = zip([*next(iter(results.values())), "mean"], scores.mean(0), scores.std(0))
    return markdown([("label", "Dice", f"NSD ({tolerance})"), *(
        (name, *map("{:.4f} +- {:.4f}".format, mean, sd)) for name, mean, sd in rows)])
def evaluate(
        predictions: str,  # a NIfTI file or a folder of them
        references: str,  # the same; cases of two folders go together by name
        flare22: bool = False,  # organs, tolerances and rules of the challenge
        tolerance: float = 2.0,  # of the surface Dice, in mm
        csv: str = ""):  # also write the scores of each case to this file
    """Dice and surface Dice of segmentations. Returns the exit code."""
    known, found, results = list_scans(references), list_scans(predictions), {}
    found |= {} if any(map(os.path.isdir, (predictions, references))) else {min(known): predictions}
    def one(name, path):
        ref, _, scan = read_scan(path, is_label=True, canonical=False)
        if name not in found:  # the challenge's own code would leave the case out
            print(f"warning: {name}: no prediction, counted as empty", file=sys.stderr)
        pred = read_scan(found[name], True, False, scan)[0] if name in found else np.zeros_like(ref)
        mm = FLARE22 if flare22 else {int(i): tolerance for i in np.union1d(pred, ref) if i}
        results[name] = evaluate_case(pred, ref, scan.header.get_zooms()[:3], mm, mm, flare22)
    code = for_each("evaluating", known, one)
    ids = sorted(set().union(*results.values())) or [1]  # of a label in neither file: 1, 1
    results = {c: {i: scores.get(i, (1.0, 1.0)) for i in ids} for c, scores in results.items()}
    print(table(results, "FLARE22" if flare22 else f"{tolerance:g} mm") if results else "")
    if csv:
        rows = [(case, i, *scores[i]) for case, scores in results.items() for i in ids]
        write_text(csv, [("case", "label", "dice", "nsd"), *rows])
    return code

# 11. Reports ======================================================================================
def figure(run, best, cases):
    """Write figure.png: the curves of the log, and of some cases the slice with most foreground."""
    from matplotlib.figure import Figure  # optional
    heights, log = [3, *[2.3] * len(cases)], np.array(run.rows)  # inches; (epochs, len(LOG))
    page = Figure((10, sum(heights)), dpi=150, layout="constrained")
    top, *below = page.subfigures(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    for axes, columns in zip(top.subplots(1, 3), ((3, 4), (5, 6), (7,))):
        for i, style in zip(columns, ("o-", "x--")):
            known = log[np.isfinite(log[:, i])]  # Dice is not of each epoch
            axes.plot(known[:, 0], known[:, i], style, markersize=3, label=LOG[i])
        axes.set_xlabel("step")
        axes.legend()
    for part, case in zip(below, cases):
        image, label, _ = (np.load(path, mmap_mode="r") for path in case.arrays)
        z = np.count_nonzero(label, (0, 1)).argmax()
        a, b = (segment(best, image, network) for network in "ab")
        view = {"origin": "lower", "aspect": case.info[1] / case.info[0]}  # x to the right
        titles = case.name[:20], "reference", "A", "B", "A != B"  # longer names would overlap
        for ax, name, ids in zip(part.subplots(1, 5), titles, (0 * a, label, a, b, (a != b) * 255)):
            ax.imshow(image[:, :, z].T.astype(float), "gray", **view)
            over = np.ma.masked_equal(ids[:, :, z].T, 0)
            drawn = ax.imshow(over, "viridis", vmin=0, vmax=max(run.ids), **view)
            ax.set(title=name, xticks=[], yticks=[])
        part.colorbar(drawn, ax=part.axes, ticks=run.ids, label="label")
    atomic(f"{run.config.out}/figure.png", page.savefig)
def export(
        checkpoint: str,  # best.pt or last.pt of a run
        out: str):  # the file to write, model.onnx
    """Write network A as ONNX, for batches of any size, with all that `predict` needs. Returns the
    exit code: 1 if its logits differ from PyTorch's by more than 1e-3."""
    need(Path(checkpoint).suffix != Path(out).suffix == ".onnx", f"{out}: want .pt and .onnx names")
    run = Run.load(checkpoint, device="cpu")
    image, network = torch.randn(2, 1, *run.config.patch), run.networks[0].eval()
    network.to(memory_format=torch.contiguous_format)  # there the norm is more exact on a CPU
    with blame(out, "not made", "pip install onnxscript onnxruntime", ImportError):
        import onnxruntime  # noqa: F401  # before anything is written: the check needs it
        program = torch.onnx.export(network, (image,), input_names=["image"], dynamo=True,
                                    dynamic_shapes=[{0: torch.export.Dim("batch")}], verbose=False)
    program.model.metadata_props["cps"] = json.dumps([asdict(run.config), run.ids])
    atomic(out, program.save)
    with torch.inference_mode():
        difference = abs(network(image) - Run.load(out).networks[0](image)).max()
    print(f"{out}: largest difference of the logits from PyTorch's {difference:.1e}")
    return int(difference > 1e-3)
def ablate(
        config: Config,
        labelled: tuple[int, ...] = (2,),  # numbers of labelled cases to compare at
        seeds: int = 3):  # runs of an arm, from --seed on: other weights, patches, labelled cases
    """Compare supervised, plain CPS, context CPS and an upper bound, all labels, at equal steps, in
    ablation.csv and .md: Dice of test cases, which choose nothing, mean +- sd over seeds."""
    out, config = Path(config.out), replace(config, test=config.test or config.val, resume=True)
    need(seeds > 0 < min(labelled) and config.test, "--seeds, --labelled, --test: at least 1 each")
    arms = [*itertools.product(labelled, ("supervised", "cps", "context")), (0, "supervised")]
    rows, scores = [("method", "labels", "seed", "case", "label", "dice_a", "dice_both")], {}
    split_cases(replace(config, method="cps", labelled=max(labelled)))  # enough cases for all?
    for (n, method), seed in itertools.product(arms, range(config.seed, config.seed + seeds)):
        name, folder = method if n else "upper bound", f"{method}-{n or 'all'}-{seed}"
        done = train(replace(config, method=method, labelled=n, seed=seed, out=f"{out / folder}"))
        tests = done["results"], validate(done["run"], done["test"], networks="both")
        dice = [[[d for d, _ in case.values()] for case in test.values()] for test in tests]
        scores.setdefault((name, n or "all"), []).append((dice, done["minutes"]))
        rows += [(name, n or "all", seed, case, label, a, both) for case, *pair in
                 zip(tests[0], *dice) for label, a, both in zip(done["run"].ids, *pair)]
        write_text(out / "ablation.csv", rows)
    need(len(rows) == 1 + len(arms) * seeds * len(tests[0]) * len(done["run"].ids),
         f"{out}: runs differ in their label ids; raise --labelled or leave out rare labels")
    table = [("method", "labels", "A", "A and B", *(f"A, label {i}" for i in done["run"].ids),
              "gain of A [95 %]", "minutes")]
    for (name, n), arrays in scores.items():
        dice, base = ([d for d, _ in scores.get((key, n), arrays)] for key in (name, "supervised"))
        gain = np.subtract(dice, base)[:, 0].mean(2).ravel()  # of (seeds, 2, cases, labels)
        low, high = stats.ttest_1samp(gain, 0).confidence_interval()  # paired by seed and case
        means = np.hstack((np.mean(dice, (2, 3)), np.mean(dice, 2)[:, 0]))  # (seeds, 2 + labels)
        table.append((name, n, *(f"{m.mean():.4f} +- {m.std(ddof=seeds > 1):.4f}" for m in means.T),
                      f"{gain.mean():+.4f} [{low:+.4f}, {high:+.4f}]" if gain.any() else "",
                      f"{np.mean([m for _, m in arrays]):.1f}"))
    write_text(out / "ablation.md", markdown(table) + "\n")
    print(f"\n{out}/ablation.md, {len(done['test'])} test cases:\n{markdown(table)}")
def costs(config, classes):
    """Parameters of a network, FLOPs of its forward pass and of a step, bytes that a step keeps."""
    network, kept = UNet3D(classes, config.base_channels, config.levels).to("meta"), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with FlopCounterMode(display=False) as counter, hooks:
        loss = network(torch.empty(1, 1, *config.patch, device="meta")).sum()  # nothing is run
        forward = counter.get_total_flops()  # of a patch; two for a multiply-add
        loss.backward()
    kept = {(s := t.untyped_storage())._cdata: s.nbytes() for t in kept if type(t) is torch.Tensor}
    n = 2 * config.batch * (1 + (config.method != "supervised"))  # patches of both networks
    weights = sum(p.numel() for p in network.parameters())  # fp32, as are gradients and momenta
    return weights, forward, counter.get_total_flops() * n, sum(kept.values()) * n + 24 * weights
def info(
        config: Config,
        checkpoint: str = "",  # best.pt or last.pt: tell of its training, not of the flags'
        classes: int = 14,  # with background [FLARE22]
        bench: bool = False,  # time 20 steps, not 2
        watts: float = 300.0,  # power of the machine that trains [assumed]
        carbon: float = 0.4):  # kg of CO2 eq for a kWh [assumed]
    """Print the paper's Tables 1 and 2 with the blanks filled. What is timed is timed here."""
    run = Run.load(checkpoint, device=config.device) if checkpoint else Run(
        config, range(1, classes))
    need(run.networks[1:], f"{checkpoint}: holds A alone; give best.pt or last.pt")
    c, gpu, k, n = run.config, run.device.type == "cuda", len(run.ids) + 1, run.config.batch
    limit = inf if gpu else max(2, 48 >> c.levels - 1) << c.levels - 1  # a CPU times small patches
    small = replace(c, patch=tuple(min(p, limit) for p in c.patch))
    (weights, forward, flops, memory), crops = costs(c, k), n * (c.method != "supervised")
    images = torch.randn(n + crops, 1, *small.patch, device=run.device)
    target = torch.randint(k, (n, *small.patch), device=run.device)
    overlaps = [overlap_slices((0, 0, 0), np.array(small.patch) // 8, small.patch)] * crops
    batch = {"tensors": [images, images, target, target >= 0], "overlaps": overlaps}
    parts = run.networks, run.optimisers, batch, c.lam, c, run.scaler, run.autocast
    def seconds(f, n):  # a Timer warms up and waits for a GPU
        return Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads()).timeit(n).mean
    step = seconds(lambda: train_step(*parts), 20 if bench else 2) * flops / costs(small, k)[2]  # s
    memory = torch.cuda.max_memory_allocated(run.device) if gpu else memory
    a = torch.randn([8192 if gpu else 2048] * 2, device=run.device)
    with run.autocast:
        peak = 2 * len(a)**3 / seconds(lambda: a @ a, 5)
    hours = c.epochs * c.epoch_steps * step / 3600
    print(markdown([
        ("machine", f"{platform.platform()}, {os.cpu_count()} cores, torch {torch.__version__}"),
        ("GPU", torch.cuda.get_device_name(run.device) if gpu else "none"),
        ("method", f"{c.method}; A he-normal, B {c.init_b}-normal; {c.lam:g} x {c.pseudo_loss}"),
        ("batch", f"{n} labelled patches and {crops} pairs, {c.patch}"),
        ("optimiser", f"SGD, Nesterov momentum {c.momentum:g}, weight decay {c.weight_decay:g}"),
        ("epochs", f"{c.epochs} of {c.epoch_steps} steps; lr {c.lr:g}, / 2 each {c.halve_epochs}"),
        ("parameters, FLOPs", f"{weights:,}, {forward:.4g} a patch; {flops:.4g} FLOPs a step"),
        ("memory of a step", f"{memory / 2**30:.3g} GiB, {('counted', 'measured')[gpu]}"),
        ("time of a step", f"{step:.3g} s, {2 * len(images) / step:.3g} patches a second"),
        ("share of a matrix product's speed", f"{flops / step / peak:.0%} of {peak:.3g} FLOP/s"),
        ("training time", f"{hours:.3g} h = {hours / 24:.2g} days, without validation"),
        ("energy", f"{(kwh := hours * watts / 1000):.3g} kWh: hours x {watts:g} W / 1000"),
        ("CO2 eq", f"{kwh * carbon:.3g} kg: kWh x {carbon:g} kg"),
        *[("done", f"{run.step} steps, validation Dice {run.best:.4f}")] * bool(checkpoint)]))

# 12. Command line =================================================================================
def add_flags(parser, target, skip=("config",)):
    """A flag for each parameter of a function and of its Config; the help is the comment there."""
    def number(word):  # a word instead of numbers, auto or native, is an empty tuple
        return None if word in ("auto", "native") else float(word)
    comments = dict(re.findall(r"^ +(\w+): .*?  # (.*)$", inspect.getsource(target), re.MULTILINE))
    parameters = inspect.signature(target).parameters
    if "config" in parameters:
        add_flags(parser, Config, skip=parameters)
    for p in [p for name, p in parameters.items() if name not in skip]:
        kind, items = get_origin(p.annotation) or p.annotation, get_args(p.annotation)
        options = {"action": argparse.BooleanOptionalAction} if kind is bool else {
            "choices": items} if kind is Literal else {"type": kind} if kind is not tuple else {
            "type": number if items[0] is float else items[0], "nargs": "+"}
        options |= {"nargs": "?"} if p.name == "data" else {"default": argparse.SUPPRESS}
        bare = p.name == "data" or p.default is p.empty  # without a default: positional
        name = p.name if bare else "--" + p.name.replace("_", "-")
        parser.add_argument(name, help=comments[p.name].replace("%", "%%"), **options)
def config_from(command, data=None, preset=None, **given):
    """Config of flags on top of a preset; without DATA that of the phantom."""
    given = {key: value if type(value) is not list else tuple(i for i in value if i is not None)
             for key, value in given.items()}
    preset = preset or ("paper" if data or command == "info" else "quick")  # minutes on a CPU
    if data is None and command != "info":
        make_phantom(data := "runs/phantom")
        given = {"val": 4.0} | given
    what = given.get("method", "context") if command == "train" else command
    out = f"runs/{Path(data or '').resolve().name}-{what}"
    return Config(**PRESETS[preset] | {"data": data or "", "preset": preset, "out": out} | given)
def main(argv=None):
    """Run a command. Returns its exit code: 0, 1 (some cases failed), 2 (bad input), 130."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="name")
    for function in (train, predict, evaluate, ablate, info, export):
        text = function.__doc__.split(". ")[0] + "."
        p = commands.add_parser(function.__name__, help=text, description=text, allow_abbrev=False)
        add_flags(p, function)
        p.error = parser.error = lambda text: need(False, f"{text}; see cps.py [COMMAND] --help")
    def run(name, **args):
        own = {k: args.pop(k) for k in args.keys() & inspect.signature(globals()[name]).parameters}
        result = globals()[name](*[config_from(name, **args)] if args else (), **own)
        return result if type(result) is int else 0
    nib.imageglobals.logger.setLevel("CRITICAL")  # what is wrong with a scan, an error says
    if "LOCAL_RANK" in os.environ:  # of torchrun: the first process alone speaks
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group()
        sys.stdout = io.StringIO() if RANK else sys.stdout
    try:
        return attempt(lambda: run(**vars(parser.parse_args(argv))))
    except KeyboardInterrupt as error:
        print(f"\ninterrupted: {error}", file=sys.stderr)
        return 130

if __name__ == "__main__":
    sys.exit(main())
