"RandAugment in groups against one operation after the other by kornia, as recorded runs had it."
import math

import kornia.enhance as ke
import kornia.geometry.transform as kt
import pytest
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup

from m2mkd import augment
from m2mkd.augment import Augment, rand_augment, rand_augment_, rand_numbers
from m2mkd.core import generator, seeded

TEXTS = ("rand-m9-mstd0.5-inc1", "rand-m5-mstd3", "rand-m9-mstd3-n3-p1-inc1", "rand-m10-p0")
RICH = Augment(scale=(0.08, 1), randaugment=TEXTS[0], erasing=0.25)
GREY = 128 / 255


# --- the former form: one operation after the other, each by kornia ---

def factor(m, sign, inc): return (1 + sign * 0.9 * m).clamp(min=0.1) if inc else 0.1 + 1.8 * m
def bits(m, inc): return (4 - (m * 4).long() if inc else (m * 4).long()).clamp(0, 8)
def threshold(m, inc):
    steps = 256 - (m * 256).floor() if inc else (m * 256).floor()
    return (steps.clamp(0, 256) / 255).view(-1, 1, 1, 1)
def added(m): return ((m * 110).floor().clamp(max=128) / 255).view(-1, 1, 1, 1)
def levels(x): return (x * 255).round_().clamp_(0, 255).add_(0.01).div_(255).clamp_(max=1)
def share(m, x): return 0.45 * m * x.shape[-1]
def pair(v, axis): return torch.stack([v, 0 * v] if axis == "x" else [0 * v, v], 1)
def on_grey(x, what, *at): return what(x - GREY, *at) + GREY

def stretch(x):
    lo, hi = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(hi > lo, (x - lo) / (hi - lo).clamp(min=1e-6), x)

FORMER = {
    "autocontrast": lambda x, m, s, inc: stretch(x),
    "equalize": lambda x, m, s, inc: ke.equalize(levels(x)),
    "invert": lambda x, m, s, inc: ke.invert(x),
    "rotate": lambda x, m, s, inc: on_grey(x, kt.rotate, s * 30 * m),
    "posterize": lambda x, m, s, inc: ke.posterize(levels(x), bits(m, inc)),
    "solarize": lambda x, m, s, inc: torch.where(x < threshold(m, inc), x, 1 - x),
    "solarize-add": lambda x, m, s, inc: torch.where(x < GREY, (x + added(m)).clamp(max=1), x),
    "color": lambda x, m, s, inc: ke.adjust_saturation_with_gray_subtraction(x, factor(m, s, inc)),
    "contrast": lambda x, m, s, inc: ke.adjust_contrast_with_mean_subtraction(x, factor(m, s, inc)),
    "brightness": lambda x, m, s, inc: ke.adjust_brightness_accumulative(x, factor(m, s, inc)),
    "sharpness": lambda x, m, s, inc: ke.sharpness(x, factor(m, s, inc)),
    "shear-x": lambda x, m, s, inc: on_grey(x, kt.shear, pair(s * 0.3 * m, "x")),
    "shear-y": lambda x, m, s, inc: on_grey(x, kt.shear, pair(s * 0.3 * m, "y")),
    "translate-x": lambda x, m, s, inc: on_grey(x, kt.translate, pair(s * share(m, x), "x")),
    "translate-y": lambda x, m, s, inc: on_grey(x, kt.translate, pair(s * share(m, x), "y")),
}

def former(x, text, u):
    numbers, x = rand_numbers(text), x.clone()
    for choice, applied, strength, sign in u.reshape(len(u), -1, 4).permute(1, 2, 0):
        away = torch.special.ndtri(strength.double().clamp(1e-6, 1 - 1e-6)).float()
        m = (numbers["m"] + numbers["mstd"] * away).clamp(0, numbers["mmax"]) / 10
        sign = torch.where(sign < 0.5, -1., 1.)
        drawn = torch.where(applied < numbers["p"], (choice * len(FORMER)).long(), -1)
        for k, operation in enumerate(FORMER.values()):
            rows = (drawn == k).nonzero().flatten()
            if not len(rows): continue
            at = m[rows].to(x), sign[rows].to(x), bool(numbers["inc"])
            x[rows] = operation(x[rows], *at).clamp_(0, 1)
    return x

def former_normalise(x, high):
    both = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in both)
    return torch.addcmul(-mean / std, x, 1 / (std * high))

def former_augmented(images, how, seed, step):
    u = augment.draws(how, len(images), seed, step)
    x = augment.crop_flip(images.float(), how, u[:, :5])
    x = former_normalise(former(x / 255, how.randaugment, u[:, 10:]), 1)
    hit = (u[:, 5] < how.erasing).nonzero().flatten()
    noise = torch.randn(len(hit), *x.shape[1:], generator=generator(seed, "erasing", step))
    x[hit] = augment.erase(x[hit], u[hit, 6:10], noise)
    return x


# --- today's ---

def pictures(n, size, dtype=torch.float64):
    "Noise, noise of whole levels, a ramp, one value, black, white."
    x = torch.rand(n, 3, size, size, generator=generator(size, "pictures"), dtype=dtype)
    x[1::2] = (x[1::2] * 255).round() / 255
    x[4] = torch.linspace(0, 1, size, dtype=dtype)
    x[5:8] = torch.tensor([0.5, 0, 1], dtype=dtype).view(3, 1, 1, 1)
    return x

@pytest.mark.parametrize("inc", [False, True])
@pytest.mark.parametrize("name", list(FORMER))
def test_each_operation_is_the_former(name, inc):
    for size in (3, 12):
        x = pictures(40, size)
        m = torch.rand(40, generator=generator(1, "m"), dtype=torch.float64)
        m[:8] = torch.tensor([0, 1, 0.5, 1, 0.9, 0.25, 0.9, 0.9])
        sign = torch.where(torch.arange(40) % 3 > 0, 1., -1.).double()
        kept = x.clone()
        both = (augment.OPERATIONS, FORMER)
        ours, theirs = (ops[name](x, m, sign, inc).clamp(0, 1) for ops in both)
        assert (ours - theirs).abs().max() < 1e-10 and ours.dtype == x.dtype
        assert torch.equal(x, kept)

@pytest.mark.parametrize("text", TEXTS)
def test_groups_are_one_after_the_other(text):
    x = torch.rand(200, 3, 12, 12, generator=generator(0, "noise"), dtype=torch.float64)
    u = augment.draws(Augment(randaugment=text), 200, 3, (0, 1))[:, 10:]
    kept, ours = x.clone(), rand_augment(x, text, u)
    assert (ours - former(x, text, u)).abs().max() < 1e-10 and torch.equal(x, kept)
    assert torch.equal(x, ours) == ("p0" in text)
    assert rand_augment_(x, text, u) is x and torch.equal(x, ours)

def test_batches_are_the_former():
    "In 32 bits equal up to rounding, which may put a few pixels one level up or down."
    images = torch.randint(0, 256, (300, 3, 16, 16), dtype=torch.uint8, generator=generator(0, "x"))
    for step in ((0, 0), (2, 5)):
        x = augment.augmented(images, RICH, 4, step, torch.arange(300), 300)
        off = (x - former_augmented(images, RICH, 4, step)).abs().flatten(1).amax(1)
        assert (off < 1e-5).float().mean() > 0.98 and x.dtype == torch.float32

def test_a_part_of_the_batch_is_the_batch_there():
    "Also the parts in which no image, or one, draws an operation."
    images = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8, generator=generator(0, "x"))
    whole = augment.augmented(images, RICH, 0, (0, 0), torch.arange(24), 24)
    for rows in (torch.arange(24).flip(0), *torch.arange(24).split(1)):
        part = augment.augmented(images[rows], RICH, 0, (0, 0), rows, 24)
        assert torch.allclose(part, whole[rows], atol=1e-5)

@pytest.mark.parametrize("size", [1, 2])
def test_pictures_too_small_for_nine_neighbours(size):
    x = pictures(40, size, torch.float32)
    sharp = augment.OPERATIONS["sharpness"](x, torch.ones(40), torch.ones(40), True)
    assert torch.equal(sharp, x)
    text = "rand-m9-mstd0.5-n4-p1-inc1"
    y = rand_augment(x, text, torch.rand(40, 16, generator=generator(0, "u")))
    assert y.shape == x.shape and 0 <= y.min() and y.max() <= 1

def test_normalised_into_what_is_given():
    x = pictures(20, 5, torch.float32) * 255
    y = augment.normalise(x, 255)
    assert torch.allclose(y, former_normalise(x, 255), atol=1e-6) and x.max() == 255
    assert augment.normalise(x, 255, out=x) is x and torch.equal(x, y)

def test_erased_where_the_former_mask_was():
    "A rectangle of whole pixels: those that the comparison with its bounds takes in."
    u, size = torch.rand(300, 4, generator=generator(5, "u")), 17
    u[:3] = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [1, 0.5, 0, 1]]) * (1 - 1e-6)
    area, ratio = 0.02 + (1 / 3 - 0.02) * u[:, 0], torch.exp((u[:, 1] * 2 - 1) * math.log(10 / 3))
    wide, high = ((area * r).sqrt().clamp(max=1) for r in (1 / ratio, ratio))
    at = torch.arange(size)
    def inside(start, length):
        return (start[:, None] <= at) & (at < (start + length * size)[:, None])
    rows = inside(u[:, 3] * (1 - high) * size, high)
    mask = rows[:, :, None] & inside(u[:, 2] * (1 - wide) * size, wide)[:, None, :]
    erased = augment.erase(torch.zeros(300, 3, size, size), u, torch.ones(1))
    assert torch.equal(erased, mask[:, None].expand(-1, 3, -1, -1).float())

@pytest.mark.parametrize("how", [dict(mixup=0.8), dict(cutmix=1.), dict(mixup=0.8, cutmix=1., smoothing=0.1)])
@pytest.mark.parametrize("n,size", [(2, 5), (10, 16), (50, 64)])
def test_mixed_as_timm_mixes(how, n, size):
    "To the bit, images and targets; also where the pairs are no whole number of parts."
    labels, seen = torch.arange(n) % 7, set()
    labels[0] = 6
    for step in range(8):
        x = torch.randn(n, 3, size, size, generator=generator(step, "x"))
        numbers = how.get("mixup", 0.), how.get("cutmix", 0.)
        smooth = how.get("smoothing", 0.)
        theirs = Mixup(*numbers, label_smoothing=smooth, num_classes=7)
        with seeded(0, "mixup", step): images, targets = theirs(x.clone(), labels)
        ours = augment.mixed(x, labels, 7, Augment(**how), 0, step)
        assert torch.equal(ours[0], images) and torch.equal(ours[1], targets) and ours[0] is x
        seen.add(float(targets[0].max()))
    assert len(seen) > 3
