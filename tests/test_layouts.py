"What lies on a stranger's disk or in a stranger's hands: it is read rightly, or one sentence says why not."
import io, os, re
from pathlib import Path

import datasets
import nbformat
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset, TensorDataset

from m2mkd import pipeline, pixels
from m2mkd.augment import Augment, normalise
from m2mkd.core import from_plain, seeded, to_plain
from m2mkd.data import Batches, Data, FileSet, Given, load, whole_split
from m2mkd.pipeline import Task
from m2mkd.train import Runtime, Training, end_to_end, train


def picture(k, size=6): return Image.fromarray(np.random.default_rng(k).integers(0, 256, (size, size, 3), dtype=np.uint8))

def put(folder, *files):
    "A different picture in each of `files`."
    for k, f in enumerate(files):
        (folder/f).parent.mkdir(parents=True, exist_ok=True)
        picture(k).save(folder/f)
    return folder

def png(k):
    buffer = io.BytesIO()
    picture(k).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}

def table(path, n=4, features=None, **more):
    "A parquet file of n pictures and the given columns."
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {"image": datasets.Image()} | {k: datasets.Dataset.from_dict({k: v}).features[k] for k, v in more.items()} | (features or {})
    rows = {"image": [png(k) for k in range(n)], **more}
    pq.write_table(datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).data.table, path)

@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("M2MKD_CACHE", str(tmp_path/"cache"))
    monkeypatch.delenv("M2MKD_DATA", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path/"tables")

def fails(what, *said, kind=ValueError):
    with pytest.raises(kind) as e: what()
    text = str(e.value)
    assert all(s in text for s in said) and "\n" not in text, text


# --- splits ---

SPLITS = {"train": "train training", "val": "val valid validation dev", "test": "test testing"}

@pytest.mark.parametrize("there", [("train", "val", "test"), ("Training", "Validation", "Testing"), ("TRAIN", "dev", "TEST"),
                                   ("training_set", "valid", "test_set"), ("train2017", "val2017", "test2017")])
def test_a_split_is_the_one_that_was_asked_for(tmp_path, there):
    for count, split in enumerate(there, 2): put(tmp_path/"d", *(f"{split}/{c}/{k}.png" for c in "ab" for k in range(count)))
    for count, (kind, names) in enumerate(SPLITS.items(), 2):
        for name in names.split():
            found = load("d", tmp_path/"d", split=name)
            assert (found.split, len(found), found.classes) == (there[count - 2], 2 * count, ("a", "b")), name

def test_validation_images_are_never_the_test_images(tmp_path):
    put(tmp_path/"d", "train/a/0.png", "train/b/0.png", "test/a/0.png", "test/b/0.png")
    for name in SPLITS["val"].split(): fails(lambda: load("d", tmp_path/"d", split=name), "unknown split", name, "there are: test, train")
    fails(lambda: load("digits", split="val"), "unknown split of digits 'val'", "test")

def test_one_validation_split_stands_for_a_missing_test_split(tmp_path, capsys):
    put(tmp_path/"d", "train/a/0.png", "train/b/0.png", "val/a/0.png", "val/b/0.png")
    assert load("d", tmp_path/"d", split="test").split == "val"
    assert "no split 'test' with labels: its split 'val' is taken" in capsys.readouterr().out
    put(tmp_path/"d", "dev/a/0.png", "dev/b/0.png")
    fails(lambda: load("d", tmp_path/"d", split="test"), "'dev' and 'val'", "by its name")
    fails(lambda: load("d", tmp_path/"d", split="valid"), "'dev' and 'val'", "by its name")
    assert load("d", tmp_path/"d", split="dev").split == "dev"

def test_a_test_split_whose_labels_are_kept_back(tmp_path, capsys):
    for split, label in (("train", [0, 1, 0, 1]), ("validation", [1, 0, 1, 0]), ("test", [-1] * 4)):
        table(tmp_path/"d"/f"{split}-00000-of-00001.parquet", label=label)
    found = load("d", tmp_path/"d", split="test")
    assert found.split == "validation" and found.labels.tolist() == [1, 0, 1, 0] and "'validation' is taken" in capsys.readouterr().out
    (tmp_path/"d"/"validation-00000-of-00001.parquet").unlink()
    fails(lambda: load("d", tmp_path/"d", split="test"), "no labels", "-1")

def test_splits_that_differ_in_case_only_or_are_one_by_a_link(tmp_path):
    put(tmp_path/"d", "train/a/0.png", "train/b/0.png", "Train/a/0.png", "Train/b/0.png")
    fails(lambda: load("d", tmp_path/"d"), "'Train' and 'train'", "case")
    put(tmp_path/"e", "train/a/0.png", "train/b/0.png")
    os.symlink(tmp_path/"e/train", tmp_path/"e/val")
    fails(lambda: load("e", tmp_path/"e", split="val"), "train", "val", "one folder, by a link")


# --- folders ---

def test_the_archive_of_tiny_imagenet(tmp_path, capsys):
    wnids, root = ["n09", "n03", "n05"], tmp_path/"zip"/"tiny-imagenet-200"
    put(root, *(f"train/{w}/images/{w}_{k}.JPEG" for w in wnids for k in range(2)), *(f"val/images/val_{k}.JPEG" for k in range(6)),
        *(f"test/images/test_{k}.JPEG" for k in range(6)))
    for w in wnids: (root/"train"/w/f"{w}_boxes.txt").write_text("x")
    (root/"val/val_annotations.txt").write_text("".join(f"val_{k}.JPEG\t{wnids[k % 3]}\t0\t0\t5\t5\n" for k in reversed(range(6))))
    (root/"wnids.txt").write_text("\n".join(wnids))
    for folder in (root, root.parent):                                                        # also one folder too high
        train, val = load("tiny-imagenet", folder), load("tiny-imagenet", folder, split="valid")
        assert train.classes == val.classes == ("n03", "n05", "n09") and train.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert val.labels.tolist() == [2, 0, 1] * 2 and val.split == "val"
    assert not capsys.readouterr().out
    assert load("tiny-imagenet", root, split="test").split == "val" and "is taken" in capsys.readouterr().out
    lines = (root/"val/val_annotations.txt").read_text()
    for damage, said in ((lines.replace("val_3", "val_9"), "val_3.JPEG"), (lines + "val_1.JPEG\tn03\n", "val_1.JPEG"),
                         (lines.replace("val_2.JPEG\tn05", "val_2.JPEG\tn77"), "n77"), (lines.replace("\t", " "), "no line of image TAB class")):
        (root/"val/val_annotations.txt").write_text(damage)
        fails(lambda: load("tiny-imagenet", root, split="val"), said)
    (root/"val/val_annotations.txt").unlink()
    fails(lambda: load("tiny-imagenet", root, split="val"), str(root/"val"), "no subfolder for each class")

def test_what_systems_leave_is_no_class(tmp_path, capsys):
    left = ("__MACOSX", ".ipynb_checkpoints", "@eaDir", "$RECYCLE.BIN", "lost+found", "System Volume Information", ".git", "__pycache__")
    put(tmp_path/"d", "a/0.png", "b/0.png", *(f"{s}/a/0.png" for s in left), *(f"a/{s}/x.png" for s in left))
    for name in ("a/._0.png", "a/.DS_Store", "Thumbs.db", "a/Thumbs.db", "desktop.ini"): (tmp_path/"d"/name).write_bytes(b"x")
    assert (load("d", tmp_path/"d").classes, len(load("d", tmp_path/"d"))) == (("a", "b"), 2) and not capsys.readouterr().out

def test_a_folder_without_images_is_no_class_and_is_said(tmp_path, capsys):
    put(tmp_path/"d", "train/a/0.png", "train/b/0.png", "val/a/0.png")
    (tmp_path/"d/train/docs").mkdir()
    (tmp_path/"d/train/docs/readme.txt").write_text("x")
    (tmp_path/"d/train/a/raw.heic").write_text("x")
    assert load("d", tmp_path/"d").classes == ("a", "b")
    said = capsys.readouterr().out
    assert "no image is in it: docs" in said and "raw.heic" in said
    assert load("d", tmp_path/"d", split="val").classes == ("a", "b") and "no image of the classes: b" in capsys.readouterr().out
    put(tmp_path/"d", "val/c/0.png")
    fails(lambda: load("d", tmp_path/"d", split="val"), "'c'", "no class of", str(tmp_path/"d/train"))

@pytest.mark.parametrize("files,said", [
    (("images/0.png", "images/1.png"), "no subfolder for each class"), (("0.png", "1.png"), "no folder of images"),
    (("train/0.png", "val/0.png"), "no subfolder for each class"), (("a/0.png", "b/0.png", "0.png"), "beside the class folders"),
    (("Cat/0.png", "cat/0.png"), "differ in case only"), (("one/a/0.png", "one/b/0.png", "two/a/0.png", "two/b/0.png"), "is one a class"),
    (("seg_a/seg_a/x/0.png", "seg_a/seg_a/y/0.png", "seg_b/seg_b/x/0.png", "seg_b/seg_b/y/0.png"), "is seg_a a class"),
    (("train/pets/cat/0.png", "train/pets/dog/0.png", "train/birds/owl/0.png", "train/birds/tit/0.png"), "is birds a class")])
def test_what_has_two_readings_or_none(tmp_path, files, said):
    fails(lambda: load("d", put(tmp_path/"d", *files)), said, str(tmp_path/"d"))

def test_what_has_one_reading(tmp_path):
    assert load("d", put(tmp_path/"a", "deep/set/train/x/0.png", "deep/set/train/y/0.png")).classes == ("x", "y")
    assert load("d", put(tmp_path/"b", "flowers/x/0.png", "flowers/y/more/0.png")).classes == ("x", "y")
    assert load("d", put(tmp_path/"c", "train/train/x/0.png", "train/train/y/0.png")).classes == ("x", "y")
    assert load("d", put(tmp_path/"e", "train/0.png", "bus/0.png", "car/0.png")).classes == ("bus", "car", "train")
    val = put(tmp_path/"f", "val/x/0.png", "val/y/0.png", "train/x/0.png", "train/y/0.png")/"val"
    assert load("d", val, split="valid").split == "val"                                       # the folder's own name says it
    fails(lambda: load("d", val), "unknown split", "'train'", "val")

def test_links(tmp_path):
    put(tmp_path/"store", "0.png", "1.png")
    root = put(tmp_path/"d", "a/0.png")
    os.symlink(tmp_path/"store", root/"b")                                                    # a class elsewhere
    os.symlink(root, root/"a"/"circle")
    assert load("d", root).labels.tolist() == [0, 1, 1]
    os.symlink(tmp_path/"nowhere.png", root/"a"/"9.png")
    fails(lambda: load("d", root), str(root/"a/9.png"), "cannot be read")

def test_names_that_are_folders(tmp_path, monkeypatch):
    root = put(tmp_path/"d", "a/0.png", "b/0.png")
    fails(lambda: load(str(root)), "is a path", "root")
    assert load(root).classes == ("a", "b") and load(Path(root), per_class=1).labels.tolist() == [0, 1]
    fails(lambda: load("digits", root), "embedded")
    for wrong in (dict(files=(0,)), dict(label="y"), dict(split="dev")): fails(lambda: load("digits", **wrong), "digits")
    fails(lambda: load("d", root, label="y"), "column of a table", "image files")
    (root/"x.parquet").write_bytes(b"")
    fails(lambda: load("d", root), "parquet files and images")


# --- tables ---

def test_the_label_is_the_column_of_that_name(tmp_path):
    y = [1, 0, 1, 0]
    for k, (more, choice) in enumerate([
            (dict(image_id=[7, 8, 9, 10], category=y), {}), (dict(width=[8] * 4, height=[8] * 4, Label=y), {}),
            (dict(index=[0, 1, 2, 3], breed=y), {}), (dict(year=[1, 2, 3, 3], breed=y), dict(label="breed")),
            (dict(label=[3, 3, 3, 3], fine=y), dict(label="fine"))]):
        table(tmp_path/f"{k}"/"train-0.parquet", **more)
        assert load("d", tmp_path/f"{k}", **choice).labels.tolist() == y, more
    fails(lambda: load("d", tmp_path/"3"), "year, breed", "label=")
    fails(lambda: load("d", tmp_path/"3", label="bread"), "'bread'", "breed")
    table(tmp_path/"ids"/"train-0.parquet", image_id=[7, 8, 9, 10])
    fails(lambda: load("d", tmp_path/"ids"), "no label", "image_id", "label=")
    table(tmp_path/"float"/"train-0.parquet", label=[0.5, 1., 2., 3.], year=y)
    fails(lambda: load("d", tmp_path/"float"), "label is of", "no class")
    table(tmp_path/"both"/"train-0.parquet", label=y, target=y)
    fails(lambda: load("d", tmp_path/"both"), "label, target", "label=")

def test_several_columns_of_images(tmp_path):
    more = dict(left=[png(9)] * 4, right=[png(8)] * 4)
    table(tmp_path/"d"/"train-0.parquet", label=[0, 1, 0, 1], features=dict.fromkeys(more, datasets.Image()), **more)
    assert not torch.equal(load("d", tmp_path/"d").images, load("d", tmp_path/"d", image="left").images)
    pq.write_table(pq.read_table(tmp_path/"d"/"train-0.parquet").drop_columns("image"), tmp_path/"d"/"train-0.parquet")
    fails(lambda: load("d", tmp_path/"d"), "left, right", "image=")
    assert load("d", tmp_path/"d", image="right").images.shape[0] == 4

def test_what_labels_make_classes(tmp_path):
    for k, (values, names, labels) in enumerate([([1, 2, 2, 1], ("1", "2"), [0, 1, 1, 0]), (["owl", "crow", "owl", "crow"], ("crow", "owl"), [1, 0, 1, 0]),
            ([True, False, True, False], ("False", "True"), [1, 0, 1, 0]), ([0, 2, 0, 2], ("0", "2"), [0, 1, 0, 1])]):
        table(tmp_path/f"{k}"/"train-0.parquet", label=values)
        found = load("d", tmp_path/f"{k}")
        assert (found.classes, found.labels.tolist()) == (names, labels)
    for k, (values, said) in enumerate([([0, 1, 0, 10**9], "would make 1000000001 classes of 4 rows"), ([0, -2, 1, 1], "negative"), ([0, None, 1, 1], "row 1"),
                                        ([0, -1, 1, 1], "label -1")]):
        table(tmp_path/f"bad{k}"/"train-0.parquet", label=values)
        fails(lambda: load("d", tmp_path/f"bad{k}"), said)

def test_the_classes_are_those_of_the_training_split(tmp_path):
    table(tmp_path/"d"/"train-0.parquet", label=[1, 2, 3, 3])
    table(tmp_path/"d"/"test-0.parquet", n=2, label=[3, 1])
    test = load("d", tmp_path/"d", split="test")
    assert test.classes == ("1", "2", "3") and test.labels.tolist() == [2, 0]
    table(tmp_path/"d"/"test-0.parquet", n=2, label=[3, 4])
    fails(lambda: load("d", tmp_path/"d", split="test"), "row 1", "none of the 3 classes")

def test_every_shard_has_the_same_columns_and_classes(tmp_path):
    named = lambda *names: dict(label=datasets.ClassLabel(names=list(names)))
    first, second = (tmp_path/"d"/f"train-0000{k}-of-00002.parquet" for k in range(2))
    table(first, label=[0, 1, 0, 1], features=named("a", "b"))
    table(second, label=[0, 1, 0, 1], features=named("b", "a"))
    fails(lambda: load("d", tmp_path/"d"), str(second), "other columns or classes")
    table(second, target=[0, 1, 0, 1])
    fails(lambda: load("d", tmp_path/"d"), str(second), "target")
    for more in (dict(label=["a", "b", "a", "b"]), dict(label=[0, 1, 0, 1], year=[1, 2, 3, 4])):
        table(first, label=[0, 1, 0, 1])
        table(second, **more)
        fails(lambda: load("d", tmp_path/"d"), str(second), "other columns or classes")
    second.unlink()
    fails(lambda: load("d", tmp_path/"d"), "1 of the 2 files", "missing", "number 1")

def test_configurations_are_not_put_together(tmp_path):
    for place in ("plain", "grey"): table(tmp_path/"d"/place/"train-00000-of-00001.parquet", label=[0, 1, 0, 1])
    fails(lambda: load("d", tmp_path/"d"), str(tmp_path/"d/plain"), str(tmp_path/"d/grey"), "root")
    assert len(load("d", tmp_path/"d"/"plain")) == 4
    table(tmp_path/"e"/"train.parquet", label=[0, 1, 0, 1])
    table(tmp_path/"e"/"train-0.parquet", label=[0, 1, 0, 1])
    fails(lambda: load("e", tmp_path/"e"), "two copies")


# --- pixels ---

def one(tmp_path, image, name="0.png", **save):
    (tmp_path/"p"/"a").mkdir(parents=True, exist_ok=True)
    image.save(tmp_path/"p"/"a"/name, **save)
    return load("p", tmp_path/"p").images[0]

@pytest.mark.parametrize("name", ["0.png", "0.tif", "0.pgm"])
def test_gray_of_16_bits(tmp_path, name):
    ramp = np.arange(256).reshape(16, 16)
    assert (one(tmp_path, Image.fromarray((ramp * 257).astype(np.uint16)), name).numpy() == ramp).all()

def test_modes(tmp_path):
    for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV"):
        image = picture(0).convert(mode) if mode != "LAB" else Image.new("LAB", (6, 6), (90, 9, 9))
        assert np.array_equal(pixels.to_rgb(image), image.convert("RGB")), mode
    for mode in ("F", "I"): fails(lambda: one(tmp_path, Image.new(mode, (4, 4)), "0.tif"), str(tmp_path/"p/a/0.tif"), f"mode {mode} ")

def test_alpha_lies_on_white(tmp_path):
    half = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    half.putpixel((1, 0), (10, 20, 30, 255))
    for image in (half, half.convert("LA"), half.quantize(4)):
        rgb = pixels.to_rgb(image)
        assert rgb.getpixel((0, 0)) == (255, 255, 255) and rgb.getpixel((1, 0))[0] < 40, image.mode
    marked = Image.new("P", (2, 2), 1)
    marked.putpalette([0, 0, 0, 9, 9, 9])
    marked.info["transparency"] = 1
    assert pixels.to_rgb(marked).getpixel((0, 0)) == (255, 255, 255)

def test_orientation_and_frames(tmp_path):
    tall, exif = Image.new("RGB", (6, 6)), Image.Exif()
    tall.paste((255, 0, 0), (0, 0, 6, 2))
    exif[0x0112] = 6                                                                          # turned: the top is at the right
    assert one(tmp_path, tall, exif=exif)[0, 3].tolist() == [0] * 4 + [255] * 2
    frames = [Image.new("RGB", (6, 6), c) for c in ("red", "blue")]
    assert one(tmp_path, frames[0], "1.gif", save_all=True, append_images=frames[1:]) is not None
    assert load("p", tmp_path/"p").images[1, :, 0, 0].tolist() == [255, 0, 0]

def test_a_picture_beyond_the_limit_of_pillow(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    fails(lambda: one(tmp_path, picture(0)), str(tmp_path/"p/a/0.png"), "limit", "MAX_IMAGE_PIXELS")


# --- sets and batches that are objects ---

class Torch(torch.utils.data.Dataset):
    "Pictures (or what `give` makes of them) with their class."
    classes = ["crow", "owl"]
    def __init__(self, n=8, give=lambda image: image, first=0): self.n, self.give, self.first = n, give, first
    def __len__(self): return self.n
    def __getitem__(self, k):
        if k >= self.n: raise IndexError
        return self.give(picture(self.first + k)), k % 2

def test_a_set_of_the_datasets_library(tmp_path):
    kinds = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["crow", "owl"]))
    made = datasets.Dataset.from_dict({"image": [picture(k) for k in range(6)], "label": [0, 1] * 3}, features=kinds)
    found = load(made)
    assert found.classes == ("crow", "owl") and np.array_equal(found.images[3].permute(1, 2, 0), picture(3))
    both = datasets.DatasetDict(train=made, test=made.select([0, 1]))
    assert len(load(both)) == 6 and len(load(both, split="test")) == 2 and load(made, per_class=1).ids.tolist() == [0, 1]
    made.save_to_disk(tmp_path/"one")
    both.save_to_disk(tmp_path/"two")
    for folder in (tmp_path/"one", tmp_path/"two"): assert torch.equal(load(folder).images, found.images)
    assert len(load("pets", tmp_path/"two", split="testing")) == 2
    assert isinstance(load(tmp_path/"one", image_size=6, in_memory=False), FileSet)
    (tmp_path/"one"/"state.json").write_text("[]")
    fails(lambda: load(tmp_path/"one"), str(tmp_path/"one"), "save_to_disk")
    fails(lambda: load(made.with_transform(lambda rows: rows)), "set_transform")
    fails(lambda: load(made.to_iterable_dataset()), "no length", kind=TypeError)

def test_a_torch_dataset():
    found = load(Torch())
    assert found.classes == ("crow", "owl") and found.labels.tolist() == [0, 1] * 4
    first = lambda image: torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    for give in (np.asarray, first): assert torch.equal(load(Torch(give=give)).images, found.images)
    assert load(Subset(Torch(), [1, 2, 3])).classes == ("crow", "owl") and load([Torch()[k] for k in range(4)]).classes == ("0", "1")
    assert load(Torch(), classes=("owl",), image_size=4).images.shape == (4, 3, 4, 4)
    fails(lambda: load(Torch(give=lambda image: first(image) / 255)), "row 0", "float32", "uint8")
    fails(lambda: load(TensorDataset(torch.zeros(4, 3, 6, 6, dtype=torch.uint8), torch.rand(4))), "no whole number")
    fails(lambda: load(TensorDataset(torch.zeros(4, 3, 6, 6, dtype=torch.uint8))), "expected (image, label)")
    fails(lambda: load(Torch(give=lambda image: np.random.default_rng().integers(0, 256, (6, 6, 3), np.uint8))), "another image each time")

@pytest.mark.parametrize("wrong", [None, 3, torch.zeros(2, 3, 4, 4), torch.nn.Linear(1, 1), {"a": 1}, DataLoader([1])])
def test_what_is_no_set(wrong): fails(lambda: load(wrong), type(wrong).__name__, kind=TypeError)

def test_a_task_of_given_sets():
    train, test = Torch(), Torch(4, first=50)
    task = Task(train=train, test=test)
    assert task == Task(train=load(train), test=(test,)) and hash(task) == hash(Task(train=train, test=[test]))
    assert [len(s) for s in task.load()] == [8, 4] and task != Task(train=train, test=Torch(4, first=60))
    again = from_plain(to_plain(task))
    assert again == task
    fails(again.load, "8 of 2 classes", "not in the record", "give it again")
    digits = Data(name="digits", per_class=5)
    mixed = Task(train=digits, test=load("digits", split="test"))
    assert mixed.train is digits and [len(s) for s in mixed.load()] == [50, 355]
    plain = to_plain(Task(train=digits, test=(digits.but(split="test"),)))
    assert plain["train"] == to_plain(digits)                                                 # a record of Data is what it was

def test_a_task_that_cannot_be():
    overlap = Task(train=load("digits", per_class=(0, 20)), test=load("digits", per_class=(15, 30)))
    fails(overlap.load, "training images")
    fails(Task(train=Torch(), test=Torch()).load, "8 of 8 images")
    fails(Task(train=Data(name="digits", image_size=16), test=(Data(name="digits", split="test"),)).load, "8 px", "16 px")
    fails(lambda: Task(train="digits", test=Torch()), "Data(name=", kind=TypeError)
    fails(lambda: Task(train=torch.nn.Linear(1, 1), test=Torch()), "Linear", kind=TypeError)
    fails(lambda: Task(train=Torch(), test=()), "test is empty")

def test_batches_of_given_sets():
    assert torch.equal(Batches(Torch(), 4, seed=1).at(0, 0)[0], Batches(load(Torch()), 4, seed=1).at(0, 0)[0])
    assert sum(len(y) for _, y in whole_split(Torch(), 3)) == 8
    assert isinstance(Given.of(Torch()).load().images, torch.Tensor)


# --- batches of one's own ---

class Net(torch.nn.Sequential):
    def __init__(self, classes=2): super().__init__(torch.nn.Flatten(), torch.nn.Linear(108, classes))

def trained(folder, batches, seed=0, **more):
    "The weights after two epochs on the batches."
    with seeded(seed, "net"): net = Net()
    settings = Training(**dict(epochs=2, batch_size=4, lr=0.1) | more)
    train(end_to_end(net, 0), batches, settings, {"model": folder}, runtime=Runtime(device="cpu"))
    return net[1].weight.detach()

def tensors(n=8):
    return TensorDataset(load(Torch(n)).images, load(Torch(n)).labels)

def test_train_takes_any_batches_with_a_length(tmp_path, capsys):
    by_loader = trained(tmp_path/"a", DataLoader(tensors(), batch_size=4))
    assert capsys.readouterr().out.count("not equal to the bit") == 1
    x, y = tensors().tensors
    plain = [(normalise(x[k:k + 4].float(), 255), torch.eye(2)[y[k:k + 4]]) for k in (0, 4)]      # the same, as a list, with soft targets
    assert torch.allclose(by_loader, trained(tmp_path/"b", plain), atol=1e-6)
    assert len(trained(tmp_path/"c", DataLoader(tensors(7), batch_size=4))) == 2              # a smaller last batch

@pytest.mark.parametrize("batches,said,kind", [
    (lambda: (b for b in ()), "generator", TypeError), (lambda: [], "length is 0", ValueError), (lambda: Net(), "Net", TypeError),
    (lambda: DataLoader(tensors(), batch_size=2), "batch_size = 4", ValueError), (lambda: tensors(), "expected (B, 3, H, W)", ValueError),
    (lambda: [(torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 2, 0]))], "2 logits", ValueError),
    (lambda: [(torch.rand(4, 1, 6, 6), torch.zeros(4).long())], "(4, 1, 6, 6)", ValueError), (lambda: [dict(x=1)], "dict", ValueError)])
def test_what_are_no_batches(tmp_path, batches, said, kind): fails(lambda: trained(tmp_path/"a", batches()), said, kind=kind)

def test_augment_does_not_reach_foreign_batches(tmp_path):
    fails(lambda: trained(tmp_path/"a", DataLoader(tensors(), batch_size=4), augment=Augment(flip=0.2)), "augment")

def test_the_ways_to_give_a_set_that_own_models_shows(tmp_path):
    "The three blocks of the notebook's text run as they stand, on small sets."
    cells = nbformat.read(Path(__file__).parents[1]/"nbs/experiments/own_models.ipynb", 4).cells
    text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    table_of, pairs, loader = (next(b for b in blocks if word in b) for word in ("imagefolder", "FakeData", "DataLoader"))
    put(tmp_path/"pets", *(f"{s}/{c}/{k}.png" for s in ("train", "test") for c in "ab" for k in range(2)))
    for k, f in enumerate(sorted((tmp_path/"pets").rglob("*.png"))): picture(k).save(f)
    for block, sizes in ((table_of.replace("/data/pets", str(tmp_path/"pets")), [4, 4]), (pairs, [200, 60])):
        names = {"pipeline": pipeline, "load": load}
        exec(block, names)
        assert [len(s) for s in names["task"].load()] == sizes
    exec(loader.replace("64", "4"), dict(torch=torch, your_set=tensors(), train=train, end_to_end=end_to_end, Training=Training,
         bare_meta=Net(), P=type("P", (), {"seed": 0}), folder=tmp_path))
    assert (tmp_path/"own"/"done.json").exists()


# --- what is no class, and what may be two things ---

@pytest.mark.parametrize("files, plain", [
    (("images/0.png", "annotations/trimaps/0.png"), "annotations"),
    (("Images/0.png", "Masks/0.png"), "Images"),
    (("VOC/JPEGImages/0.png", "VOC/SegmentationClass/0.png"), "JPEGImages"),
    (("images/0.png", "crow/0.png", "owl/0.png"), "images"),
    (("train/images/0.png", "train/labels/0.png", "val/images/0.png"), "images")])
def test_folders_of_pictures_and_masks_are_no_classes(tmp_path, files, plain):
    put(tmp_path/"d", *files)
    fails(lambda: load("d", tmp_path/"d"), plain, "no name of a class", "each class into a folder")

def test_a_list_of_classes_goes_with_images_in_any_case(tmp_path):
    put(tmp_path/"d", "train/a/0.png", "train/b/0.png", "val/Images/0.png", "val/Images/1.png")
    (tmp_path/"d"/"val"/"val_annotations.txt").write_text("0.png\ta\n1.png\tb\n")
    assert load("d", tmp_path/"d", split="val").labels.tolist() == [0, 1]

@pytest.mark.parametrize("files", [
    ("train/0.png", "holdout/0.png"), ("train/0.png", "eval/0.png"),
    ("set/train/0.png", "set/eval/0.png"), ("train/0.png", "holdout/0.png", "more/0.png")])
def test_a_flat_split_beside_another_flat_folder_may_be_two_things(tmp_path, files):
    put(tmp_path/"d", *files)
    fails(lambda: load("d", tmp_path/"d"), "train and " + files[1].split("/")[-2], "or splits")


# --- objects ---

def test_a_loaded_set_is_one_split_and_has_its_name():
    digits = load("digits", classes=2, per_class=4)
    fails(lambda: load(digits, split="test"), "split = 'test'", "'train' already")
    assert len(load(digits, split="train", per_class=2)) == 4
    for what in (digits, Path("d"), [(picture(0), 0)], "digits"):
        fails(lambda: load(what, name="x"), "name = 'x'")

def test_a_picture_of_a_given_set_is_upright():
    notes, wide, buffer = Image.Exif(), picture(0, 8), io.BytesIO()
    notes[0x0112] = 3
    wide.save(buffer, "PNG", exif=notes)
    turned = load([(Image.open(buffer), 0), (wide, 1)], image_size=8)
    assert torch.equal(turned.images[0], turned.images[1].flip(1, 2))

def test_batches_of_another_size_and_loaders_with_an_epoch_of_their_own():
    from m2mkd.given import Stream, own_batches
    batches = Batches(load("digits", per_class=4), 8)
    settings = Training(epochs=1, batch_size=16, lr=1e-3)
    fails(lambda: own_batches(batches, settings, "cpu"), "of 8 images", "batch_size = 16")
    assert own_batches(batches, settings.but(batch_size=8), "cpu") is batches
    pairs = TensorDataset(torch.zeros(32, 3, 8, 8), torch.zeros(32, dtype=torch.long))
    loader = DataLoader(pairs, 16)
    loader.epoch = 0
    assert isinstance(own_batches(loader, settings, "cpu"), Stream)

def test_a_transparent_gray_of_sixteen_bits_is_white():
    gray, buffer = Image.fromarray(np.array([[257, 514], [257, 65535]], np.uint16)), io.BytesIO()
    gray.save(buffer, "PNG", transparency=257)
    found = np.asarray(pixels.decode(buffer.getvalue(), "x"))[..., 0]
    assert found.tolist() == [[255, 2], [255, 255]]
