"Data: what each source gives, that batches are a function of (seed, epoch, b), and one clear error for each bad input, on real files."
import io, os, random
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import timm.data.auto_augment as timm_ops
import torch
from PIL import Image

from m2mkd import augment, core, data, pixels, sources
from m2mkd.augment import Augment
from m2mkd.data import Batches, Data, FileSet, load, whole_split

WNIDS = tuple(f"n{k:08d}" for k in (7, 11, 23, 42, 58, 99))
REAL = Path(__file__).parents[2]/"shared"/"tiny-imagenet"
RICH = Augment(scale=(0.4, 1), randaugment="rand-m9-mstd0.5-inc1", erasing=0.25, mixup=0.8, cutmix=1, smoothing=0.1, repeats=2)


def noise(k, size=12, mode="RGB"):
    shape = (size, size, 3) if mode == "RGB" else (size, size)
    return Image.fromarray(np.random.default_rng(k).integers(0, 256, shape, dtype=np.uint8))

def jpeg(image):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()

def shard(path, rows, first=0, spoil=None):
    "A parquet file of the hub's layout; every fifth image is grey, row `spoil` is no image."
    kinds = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(WNIDS)))
    raw = [b"\xff\xd8 not an image" if r == spoil else jpeg(noise(first + r, mode="L" if r % 5 == 0 else "RGB")) for r in range(rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = [(first + r) * 5 % 6 for r in range(rows)]
    datasets.Dataset.from_dict({"image": [{"bytes": b, "path": None} for b in raw], "label": labels}, features=kinds).to_parquet(str(path))

@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("M2MKD_CACHE", str(tmp_path/"cache"))
    monkeypatch.delenv("M2MKD_DATA", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path/"tables")

@pytest.fixture
def hub_layout(tmp_path):
    "A folder like tiny-imagenet: two train shards of 30 rows and a valid shard of 12, six classes."
    root = tmp_path/"tiny"
    for k in range(2): shard(root/f"data/train-0000{k}-of-00002.parquet", 30, first=30 * k)
    shard(root/"data/valid-00000-of-00001.parquet", 12, first=100)
    return root

@pytest.fixture
def image_folder(tmp_path):
    root = tmp_path/"birds"
    for split, n in (("train", 5), ("val", 2)):
        for c, name in enumerate(("crow", "owl")):
            (root/split/name/"images").mkdir(parents=True)
            for k in range(n): noise(10 * c + k, size=16 + k).save(root/split/name/"images"/f"{k}.png")
    return root

def fails(what, *said, kind=ValueError):
    "One error of `kind`, in one line, that says all of `said`."
    with pytest.raises(kind) as e: what()
    text = str(e.value)
    assert all(s in text for s in said) and "\n" not in text, text

def no_file_written(tmp_path): return not list((tmp_path/"cache").rglob("*"))


# --- sources ---

def test_digits():
    train, test = load("digits"), load("digits", split="test")
    assert len(train) + len(test) == 1797 and train.images.dtype == torch.uint8 and train.images.max() == 255
    assert np.array_equal(train.images.permute(0, 2, 3, 1), sources.Digits("train").images[..., None].repeat(3, -1))
    assert load("digits", image_size=16).images.shape[1:] == (3, 16, 16)
    assert train.labels.dtype == train.ids.dtype == torch.int64 and test.labels.bincount().min() >= 34

def test_hub_layout(hub_layout):
    full = load("tiny-imagenet", hub_layout)
    assert full.images.shape == (60, 3, 12, 12) and full.classes == WNIDS and full.ids.tolist() == list(range(60))
    assert full.labels.tolist() == [r * 5 % 6 for r in range(60)]
    assert np.array_equal(full.images[31].permute(1, 2, 0), np.asarray(Image.open(io.BytesIO(jpeg(noise(31))))))
    assert torch.equal(full.images[30, 0], full.images[30, 1])                                # grey became RGB
    for split in ("valid", "test", "validation"): assert len(load("tiny-imagenet", hub_layout, split=split)) == 12

def test_files_pick_shards_and_ids_count_in_the_whole_split(hub_layout):
    full, second = load("tiny-imagenet", hub_layout), load("tiny-imagenet", hub_layout, files=(1,))
    assert second.ids.tolist() == list(range(30, 60)) and torch.equal(second.images, full.images[30:])

def test_subsets(hub_layout):
    full = load("tiny-imagenet", hub_layout)
    some = load("tiny-imagenet", hub_layout, every=2, per_class=(3, 8))
    assert some.classes == WNIDS[::2] and some.labels.bincount().tolist() == [5, 5, 5]
    for k in range(3): assert some.ids[some.labels == k].tolist() == full.ids[full.labels == 2 * k][3:8].tolist()
    assert torch.equal(some.images, full.images[some.ids])
    named = load("tiny-imagenet", hub_layout, classes=(WNIDS[4], WNIDS[1]))
    assert named.classes == (WNIDS[1], WNIDS[4]) and len(named) == 20
    assert load("tiny-imagenet", hub_layout, classes=2, every=3).classes == WNIDS[::3]

def test_where_data_is(hub_layout, monkeypatch):
    monkeypatch.setenv("M2MKD_DATA", str(hub_layout.parent))
    assert len(load("tiny")) == 60
    assert len(load("tiny-imagenet", hub_layout)) == 60

def test_from_the_hub(hub_layout, monkeypatch):
    asked = []
    def from_files(name, split):
        asked.append(name)
        return datasets.Dataset.from_parquet([str(f) for f in sorted(hub_layout.glob(f"data/{split}-*"))])
    builder = type("Builder", (), {"info": type("Info", (), {"splits": {"train": 0, "valid": 0}})})
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: builder)
    monkeypatch.setattr(datasets, "load_dataset", from_files)
    assert torch.equal(load("tiny-imagenet").images, load("tiny-imagenet", hub_layout).images)
    assert len(load("someone/their-set", split="test")) == 12 and asked == ["zh-plus/tiny-imagenet", "someone/their-set"]
    fails(lambda: load("cifar10", files=(0,)), "files", "root")

def test_every_row_of_a_large_split(tmp_path):
    shard(tmp_path/"large"/"train-0.parquet", 600)
    images = load("large", tmp_path/"large").images
    for r in (0, 255, 256, 257, 511, 512, 599):
        stored = Image.open(io.BytesIO(jpeg(noise(r, mode="L" if r % 5 == 0 else "RGB"))))
        assert np.array_equal(images[r].permute(1, 2, 0), np.asarray(stored.convert("RGB")))

def test_image_folder(image_folder):
    train, test = load("birds", image_folder, image_size=16), load("birds", image_folder, split="test", image_size=16)
    assert train.classes == ("crow", "owl") and len(train) == 10 and len(test) == 4 and train.images.shape[2:] == (16, 16)
    assert len(load("birds", image_folder/"train", image_size=8)) == 10                       # CLASS/IMAGE
    both = train + test
    assert len(both) == 14 and both.split == "train+val" and torch.equal(both.ids, torch.cat([train.ids, test.ids]))
    fails(lambda: train + load("birds", image_folder, image_size=8), "16 px", "8 px")

def test_eval_crop():
    large = Image.new("L", (64, 64), 7)
    large.paste(200, (0, 0, 4, 64))                                                           # a border that the crop removes
    assert pixels.fit(large, 64, 0.875).size == (64, 64) and np.asarray(pixels.fit(large, 64, 0.8)).max() < 20
    assert np.array_equal(np.asarray(pixels.fit(noise(0, 64), 64, 0.875)),
                          np.asarray(noise(0, 64).resize((73, 73), Image.Resampling.BICUBIC).crop((4, 4, 68, 68))))
    assert load("digits", eval_crop=0.875).image_size == 8

def test_cache(hub_layout, tmp_path, monkeypatch, capsys):
    first = load("tiny-imagenet", hub_layout)
    monkeypatch.setattr(data, "_decode_all", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(load("tiny-imagenet", hub_layout).images, first.images)
    monkeypatch.undo()
    monkeypatch.setenv("M2MKD_CACHE", str(tmp_path/"cache"))
    shard(hub_layout/"data/train-00000-of-00002.parquet", 30, first=500)                      # other content: not the old images
    assert not torch.equal(load("tiny-imagenet", hub_layout).images, first.images)
    cached = sorted((tmp_path/"cache").iterdir())
    assert len(cached) == 2 and all(f.suffix == ".npy" for f in cached)
    second = load("tiny-imagenet", hub_layout)
    for damage in (lambda b: b[:500], lambda b: b[:-900] + bytes(896) + b[-4:], lambda b: b""):
        for f in cached: f.write_bytes(damage(f.read_bytes()))
        assert torch.equal(load("tiny-imagenet", hub_layout).images, second.images)
        assert "is damaged" in capsys.readouterr().out
        load("tiny-imagenet", hub_layout)
        assert "damaged" not in capsys.readouterr().out                                       # it was made again

def test_a_cache_that_cannot_be_written(hub_layout, tmp_path, monkeypatch, capsys):
    (tmp_path/"file").write_text("in the way")
    monkeypatch.setenv("M2MKD_CACHE", str(tmp_path/"file"/"cache"))
    assert len(load("tiny-imagenet", hub_layout)) == 60
    said = capsys.readouterr().out
    assert "not kept" in said and str(tmp_path/"file") in said and said.count("\n") == 1
    assert said.count("cannot be written:") == said.count(str(tmp_path/"file"/"cache"/"tiny")) == 1

def test_an_exception_without_a_word_is_named_by_its_kind(hub_layout, monkeypatch):
    def silent(*_): raise ValueError
    monkeypatch.setattr(sources.pq, "ParquetFile", silent)
    with pytest.raises(ValueError, match="no parquet file of this data set: ValueError$"):
        load("tiny-imagenet", hub_layout)
    assert [sources.first_line(e) for e in (KeyError(), OSError("\na\nb"))] == ["KeyError", "a"]

def test_real_tiny_imagenet():
    if not REAL.exists() and not os.environ.get("M2MKD_REQUIRE_DATA"): pytest.skip("no ../shared/tiny-imagenet")
    train = load("tiny-imagenet", REAL, every=20, files=(3,), per_class=(0, 20))
    test = load("tiny-imagenet", REAL, every=20, split="test", image_size=48, eval_crop=0.875)
    assert len(train) == 200 and train.image_size == 64 and len(train.classes) == 10 and train.classes[0] == "n01443537"
    assert train.ids.min() >= 75_000 and train.classes == test.classes and test.images.shape == (500, 3, 48, 48)


# --- batches ---

@pytest.fixture
def digits(): return load("digits", classes=5, per_class=20)

@pytest.mark.parametrize("how", [Augment(), Augment(pad=1), Augment(mixup=0.8), RICH])
def test_a_batch_is_a_function_of_seed_epoch_and_number(digits, how):
    one, two = Batches(digits, 12, how, seed=3), Batches(digits, 12, how, seed=3)
    x, y = one.at(4, 5)
    torch.rand(3); np.random.rand(3); random.random()
    for k in (0, 7): two.at(k, k)
    assert all(torch.equal(a, b) for a, b in zip((x, y), two.at(4, 5)))
    later = list(two.epoch(4, start=5))
    assert len(later) == 3 and torch.equal(later[0][0], x) and torch.equal(later[0][1], y)
    for other in (Batches(digits, 12, how, seed=4).at(4, 5), one.at(5, 5), one.at(4, 6)): assert not torch.equal(other[0], x)
    assert x.dtype == y.dtype == torch.float32 and x.shape == (12, 3, 8, 8) and torch.allclose(y.sum(1), torch.ones(12))

def test_batches_leave_the_global_state_alone(digits):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    Batches(digits, 12, RICH).at(0, 0)
    assert torch.equal(before[0], torch.get_rng_state()) and before[2] == random.getstate()
    assert (before[1] == np.random.get_state()[1]).all()

def test_an_epoch_takes_each_image_once(digits):
    batches = Batches(digits, 32, Augment(flip=0))
    rows = torch.cat([batches.rows(0, b) for b in range(len(batches))])
    assert len(batches) == 3 and len(rows.unique()) == 96
    x, y = batches.at(0, 1)
    assert torch.equal(x, augment.normalise(digits.images[rows[32:64]].float(), 255))
    assert torch.equal(y.argmax(1), digits.labels[rows[32:64]])

def test_repeats_stand_side_by_side(digits):
    batches = Batches(digits, 12, Augment(scale=(0.3, 1), repeats=3))
    rows, (x, _) = batches.rows(0, 0), batches.at(0, 0)
    assert rows.unique_consecutive().tolist() == rows[::3].tolist() and len(rows.unique()) == 4 and not torch.equal(x[0], x[1])

@pytest.mark.parametrize("how", [Augment(mixup=0.8, smoothing=0.1), RICH])
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_ranks_parts_are_the_whole_batch(digits, how, ranks):
    whole, parts = Batches(digits, 24, how), [Batches(digits, 24, how, part=(r, ranks)) for r in range(ranks)]
    x, y = whole.at(1, 2)
    assert sorted(torch.cat([p.positions for p in parts]).tolist()) == list(range(24))
    for p in parts:
        mine = p.at(1, 2)
        assert torch.allclose(mine[0], x[p.positions], atol=1e-5) and torch.equal(mine[1], y[p.positions])

def test_whole_split(digits):
    seen = list(whole_split(digits, 32))
    assert [len(y) for _, y in seen] == [32, 32, 32, 4] and torch.equal(torch.cat([y for _, y in seen]), digits.labels)
    assert torch.equal(torch.cat([x for x, _ in seen]), augment.normalise(digits.images.float(), 255))

@pytest.mark.parametrize("layout", ["hub_layout", "image_folder"])
def test_images_in_files(layout, request):
    "What stays in its files comes in the same batches whatever the workers, and in eval as if it were in memory."
    root = request.getfixturevalue(layout)
    files = Data(name="x", root=root, image_size=12, in_memory=False, eval_crop=0.75).load()
    memory = load("x", root, image_size=12, eval_crop=0.75)
    assert isinstance(files, FileSet) and len(files) == len(memory)
    assert files.classes == memory.classes and torch.equal(files.ids, memory.ids)
    batches = Batches(files, 4, RICH, seed=1)
    files.workers = 0
    straight = list(batches.epoch(0))
    files.workers = 2
    resumed = list(batches.epoch(0, start=1))
    assert len(straight) == len(batches) == len(resumed) + 1
    for a, b in zip(straight[1:], resumed): assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert torch.equal(batches.at(0, 1)[0], straight[1][0]) and not torch.equal(batches.at(1, 1)[0], straight[1][0])
    (x, y), (u, v) = next(whole_split(files, 64)), next(whole_split(memory, 64))
    assert torch.allclose(x, u, atol=1e-5) and torch.equal(y, v)

@pytest.mark.parametrize("how", [RICH.but(mixup=0, cutmix=0), Augment(flip=0), None], ids=["rich", "crop", "eval"])
def test_eight_bits_are_finished_as_timm_does(hub_layout, how):
    "Sent as eight bits and finished afterwards an image equals, to the bit, timm's whole transform of its picture."
    files = load("x", hub_layout, image_size=20, in_memory=False, eval_crop=0.9)
    transform, rows = data.timm_transform(how, 20, 0.9), torch.arange(60)
    for workers in (0, 2):
        files.workers, before = workers, random.getstate()
        todo = [((3, b), some, torch.arange(15), 15) for b, some in enumerate(rows.split(15))]
        ours = torch.cat(list(files.batches(todo, how, seed=7)))
        assert random.getstate() == before
        for r in rows.tolist():
            picture = pixels.decode(next(iter(files.source.read([r]))), "x")
            with core.seeded(7, "sample", (3, r // 15, r % 15)): whole = transform(picture)
            assert torch.equal(ours[r], whole), (workers, r)

def test_mapped_shards_keep_their_ids(hub_layout):
    some = load("tiny-imagenet", hub_layout, files=(1,), image_size=12, in_memory=False)
    assert some.ids.tolist() == list(range(30, 60))


# --- operations ---

@pytest.mark.parametrize("name,reference,tolerance", [("AutoContrast", "autocontrast", 2), ("Equalize", "equalize", 1),
    ("Invert", "invert", 1),
    ("PosterizeIncreasing", "posterize", 1), ("SolarizeIncreasing", "solarize", 1), ("SolarizeAdd", "solarize-add", 1),
    ("ColorIncreasing", "color", 2),
    ("ContrastIncreasing", "contrast", 2), ("BrightnessIncreasing", "brightness", 2), ("SharpnessIncreasing", "sharpness", 2)])
@pytest.mark.parametrize("level", [3., 9.])
def test_operations_are_timms(name, reference, tolerance, level, monkeypatch):
    "On 8-bit images our operations give timm's (PIL's) up to rounding, for both signs."
    images = [noise(k, 16).point(lambda v: v // 2 + 40) for k in range(3)]
    x = torch.stack([torch.from_numpy(np.asarray(i).copy()).permute(2, 0, 1) for i in images]) / 255
    for sign in (1., -1.):
        monkeypatch.setattr(timm_ops, "_randomly_negate", lambda v: sign * v)
        theirs = [np.asarray(timm_ops.AugmentOp(name, prob=1., magnitude=level)(i)) for i in images]
        ours = augment.OPERATIONS[reference](x, torch.full((3,), level / 10), torch.full((3,), sign), True).clamp(0, 1)
        off = (ours * 255 - torch.from_numpy(np.stack(theirs)).permute(0, 3, 1, 2)).abs()
        assert off.max() <= tolerance, (name, sign, off.max())

@pytest.mark.parametrize("inc", [0, 1])
@pytest.mark.parametrize("strength", [0, 10, 15])
def test_every_operation_at_its_extremes(inc, strength):
    "In memory and in files each named operation gives an image, at no strength, at full, and beyond where mmax allows it."
    text = f"rand-m{strength}-n1-p1-mmax{max(strength, 10)}-inc{inc}"
    image = noise(3, 16)
    x = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].expand(2, -1, -1, -1) / 255
    for name, operation in augment.OPERATIONS.items():
        out = operation(x, torch.full((2,), strength / 10), torch.tensor([1., -1.]), bool(inc))
        assert out.shape == x.shape and out.isfinite().all(), name
    transform = data.timm_transform(Augment(randaugment=text), 16)
    ops = next(t for t in transform.transforms if isinstance(t, timm_ops.RandAugment)).ops
    assert {op.name for op in ops} == set(timm_ops._RAND_INCREASING_TRANSFORMS if inc else timm_ops._RAND_TRANSFORMS)
    for op in ops:
        assert op(image).size == (16, 16) and op.magnitude == strength, op.name

def test_posterize_keeps_a_bit_in_the_workers(hub_layout):
    "The published augmentation at full strength, on every image of an epoch, drawn in the workers of a DataLoader."
    files = load("x", hub_layout, image_size=12, in_memory=False)
    files.workers = 2
    full = Augment(randaugment="rand-m10-n4-p1-inc1")
    assert sum(len(x) for x, _ in Batches(files, 20, full).epoch(0)) == 60
    assert len(list(Batches(files, 20, Augment(randaugment="rand-m9.5-mstd0.5-mmax10.5-inc1")).epoch(0))) == 3

@pytest.mark.parametrize("name,axis", [("shear-x", 3), ("shear-y", 2), ("translate-x", 3), ("translate-y", 2)])
def test_geometry_moves_along_its_axis(name, axis):
    "An image that varies only along the other axis keeps its values where it is not uncovered."
    lines = torch.linspace(0, 1, 20).view((1, 1, 20, 1) if axis == 3 else (1, 1, 1, 20)).expand(1, 3, 20, 20).contiguous()
    moved = augment.OPERATIONS[name](lines, torch.tensor([0.3]), torch.tensor([1.]), True)
    same = (moved - lines).abs() < 1e-4
    assert 0.6 < same.float().mean() < 1

def test_flip_and_shift_move_whole_pixels(digits):
    x = digits.images.float()
    u = torch.rand(len(x), 5, generator=core.generator(0, "test"))
    flipped = augment.crop_flip(x, Augment(flip=1), u)
    assert torch.equal(flipped, x.flip(-1))
    shifted, padded = augment.crop_flip(x, Augment(pad=2, flip=0), u), torch.nn.functional.pad(x, (2, 2, 2, 2))
    for k in range(10):
        left, top = (int(v) for v in (u[k, 2:4] * 5).floor())
        assert torch.allclose(shifted[k], padded[k, :, top:top + 8, left:left + 8], atol=1e-3)

def test_mixup_pairs_the_batch_with_its_mirror(digits):
    (x, y), (u, v) = (Batches(digits, 10, Augment(flip=0, mixup=m)).at(0, 0) for m in (0, 1.))
    k = next(k for k in range(10) if y[k].argmax() != y[9 - k].argmax())
    share = v[k, y[k].argmax()]
    assert 0 < share < 1 and torch.allclose(u, share * x + (1 - share) * x.flip(0), atol=1e-5)
    assert torch.allclose(v, share * y + (1 - share) * y.flip(0))

def test_each_image_draws_its_own_operations():
    x = torch.rand(1, 3, 12, 12, generator=core.generator(0, "test")).expand(200, -1, -1, -1)
    u = augment.draws(Augment(randaugment="rand-m9-mstd0.5-inc1"), 200, 0, 0)[:, 10:]
    out = augment.rand_augment(x, "rand-m9-mstd0.5-inc1", u)
    changed = (out - x).flatten(1).abs().amax(1) > 1e-3
    assert 0.6 < changed.float().mean() < 0.85 and len({o.numpy().tobytes() for o in out[changed]}) > 110     # applied twice with p = 0.5


# --- bad input ---

def test_unknown_data_set(): fails(lambda: load("tiny-imagnet"), "unknown data set 'tiny-imagnet'", "tiny-imagenet")
def test_unknown_split(hub_layout): fails(lambda: load("tiny-imagenet", hub_layout, split="trian"), "unknown split", "'trian'", "train")
def test_unknown_setting(): fails(lambda: load("digits", image_sise=8), "image_sise", "image_size")

def test_hub_out_of_reach(monkeypatch):
    def gone(name): raise ConnectionError("no route")
    monkeypatch.setattr(datasets, "load_dataset_builder", gone)
    fails(lambda: load("cifar10"), "cifar10", "$M2MKD_DATA/cifar10", "uoft-cs/cifar10", "no route")

def test_missing_folder(tmp_path):
    fails(lambda: load("tiny-imagenet", tmp_path/"nowhere"), "missing", str(tmp_path/"nowhere"), kind=FileNotFoundError)

def test_empty_folder(tmp_path):
    (tmp_path/"empty").mkdir()
    fails(lambda: load("tiny-imagenet", tmp_path/"empty"), "empty", "expected", kind=FileNotFoundError)

def test_other_layout(tmp_path, image_folder):
    other = tmp_path/"other"
    other.mkdir(); (other/"labels.csv").write_text("a,b")
    fails(lambda: load("tiny-imagenet", other), str(other), "labels.csv", "expected parquet files")
    (other/"train"/"owl").mkdir(parents=True)
    fails(lambda: load("tiny-imagenet", other), "no folder of images for each class", "expected")
    (other/"images.zip").write_bytes(b"PK")
    fails(lambda: load("tiny-imagenet", other), str(other/"images.zip"), "unpack it")
    fails(lambda: load("tiny-imagenet", other/"images.zip"), "is a file", "unpack it")
    (image_folder/"val"/"crow").rename(image_folder/"val"/"raven")
    fails(lambda: load("birds", image_folder, split="val"), "'raven'", "no class of", "train")

def test_parquet_without_images_or_labels(tmp_path):
    path = tmp_path/"texts"/"train.parquet"
    path.parent.mkdir()
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(str(path))
    fails(lambda: load("texts", path.parent), str(path), "text, label", "expected")
    shard(tmp_path/"bare"/"test-0.parquet", 4)
    table = pq.read_table(tmp_path/"bare"/"test-0.parquet")
    pq.write_table(table.set_column(1, table.field("label"), [[-1] * 4]), tmp_path/"bare"/"test-0.parquet")
    fails(lambda: load("bare", tmp_path/"bare", split="test"), "label -1")

@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b"PAR1" + bytes(len(b) - 4)])
def test_damaged_parquet(hub_layout, tmp_path, damage):
    path = hub_layout/"data/train-00001-of-00002.parquet"
    path.write_bytes(damage(path.read_bytes()))
    fails(lambda: load("tiny-imagenet", hub_layout), str(path), "damaged")
    assert no_file_written(tmp_path)

def test_damaged_image_in_parquet(hub_layout, tmp_path):
    path = hub_layout/"data/train-00001-of-00002.parquet"
    shard(path, 30, first=30, spoil=17)
    fails(lambda: load("tiny-imagenet", hub_layout), str(path), "row 17", "damaged")
    assert no_file_written(tmp_path)
    files = load("x", hub_layout, image_size=8, in_memory=False, files=(1,))
    for workers, size in ((0, 64), (2, 8)):
        files.workers = workers
        fails(lambda: list(whole_split(files, size)), "row 17", "damaged")

@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b"<html>not found</html>"])
def test_damaged_image_file(image_folder, tmp_path, damage):
    path = image_folder/"train/owl/images/3.png"
    path.write_bytes(damage(path.read_bytes()))
    fails(lambda: load("birds", image_folder, image_size=16), str(path), "damaged")
    assert no_file_written(tmp_path)

def test_images_of_different_sizes(image_folder): fails(lambda: load("birds", image_folder), "image_size", ".png")

@pytest.mark.parametrize("wrong,said", [
    (dict(classes=(WNIDS[0], "n00000008")), "unknown class of tiny-imagenet 'n00000008'"),
    (dict(classes=(WNIDS[0], WNIDS[2], WNIDS[0])), "2 times"),
    (dict(classes=()), "no class"), (dict(classes=7), "6 classes"), (dict(classes=0), "classes = 0"),
    (dict(classes=4, every=2), "3 of them with every = 2"),
    (dict(per_class=11), "has 10 images"), (dict(per_class=(8, 12)), "has 10 images"), (dict(per_class=(5, 5)), "start < stop"),
    (dict(per_class=0), "per_class = 0"), (dict(image_size=0), "image_size = 0"), (dict(image_size=-8), "image_size = -8"),
    (dict(files=(2,)), "2 parquet files"), (dict(files=(0, 0)), "at most once"), (dict(files=()), "at least"),
    (dict(eval_crop=1.2), "eval_crop = 1.2")])
def test_wrong_choices(hub_layout, wrong, said): fails(lambda: load("tiny-imagenet", hub_layout, **wrong), said)

@pytest.mark.parametrize("wrong,said", [
    (dict(mixup=-0.1), "mixup = -0.1"), (dict(cutmix=-1), "cutmix = -1"), (dict(erasing=1.5), "erasing = 1.5"), (dict(flip=2), "flip = 2"),
    (dict(smoothing=1.), "smoothing = 1"), (dict(pad=-1), "pad = -1"), (dict(repeats=0), "repeats = 0"),
    (dict(scale=(0., 1.)), "scale = (0.0, 1.0)"),
    (dict(scale=(0.9, 0.2)), "scale"), (dict(scale=(0.5, 1.5)), "scale"), (dict(scale=(0.5, 1), pad=2), "pad = 2"),
    (dict(mixup=float("nan")), "mixup"),
    (dict(randaugment="randm9"), "rand-m9-mstd0.5-inc1"), (dict(randaugment="rand-m9-mst0.5"), "'mst0.5'"),
    (dict(randaugment="rand-m11"), "mmax"),
    (dict(randaugment="rand-n0"), "whole number"), (dict(randaugment="rand-p2"), "p at most 1"), (dict(mixupp=1), "mixup")])
def test_impossible_augmentation(wrong, said): fails(lambda: Augment(**wrong), said)

@pytest.mark.parametrize("size,how,said", [(101, Augment(), "batch_size = 101, but the training set has 100"),
    (0, Augment(), "batch_size = 0"),
    (10, Augment(repeats=3), "repeats = 3 does not divide batch_size = 10"), (11, Augment(mixup=1), "batch_size = 11 is odd")])
def test_wrong_batch_size(digits, size, how, said): fails(lambda: Batches(digits, size, how), said)

def test_wrong_part(digits): fails(lambda: Batches(digits, 10, Augment(), part=(0, 2)), "2 ranks")
def test_no_such_batch(digits): fails(lambda: Batches(digits, 10, Augment()).at(0, 10), "batch 10", kind=IndexError)
def test_files_are_not_padded(hub_layout):
    files = load("x", hub_layout, image_size=8, in_memory=False)
    fails(lambda: Batches(files, 4, Augment(pad=2)).at(0, 0), "pad = 2", "scale")
    fails(lambda: load("x", hub_layout, in_memory=False), "image_size")
