"""Cached teachers: views that depend on the image alone, passes that stop and go on, caches that are refused,
targets equal to the live teacher's."""
import json, os, re, resource, shutil, signal
from pathlib import Path

import numpy as np
import pytest
import torch

from m2mkd import cached as module
from m2mkd.cached import (Answers, Cache, Views, cached, flows_of, hybrids_of, logits_of, matched, pooled, taught,
    viewed, weights_sum)
from m2mkd.chain import freeze
from m2mkd.core import seeded
from m2mkd.data import Augment, ImageSet, load
from m2mkd.distill import Distillation, hybrids, match_modules, paired, prefix
from m2mkd.folder import Folder
from m2mkd.measure import flop_counter
from m2mkd.stage import Stage, compute
from m2mkd.stop import Stopped
from m2mkd.train import Runtime, Training, train
from m2mkd.vit import Meta, ViT

RICH = Augment(scale=(0.5, 1), randaugment="rand-m9-mstd0.5-inc1", erasing=0.5)
SPEC = ViT(depths=(1, 1), options=dict(embed_dim=8, num_heads=2, patch_size=4))
CPU = Runtime(device="cpu")


@pytest.fixture(scope="module")
def digits(): return load("digits", classes=3, per_class=16)


def chain(seed=0, dtype=torch.float32, spec=SPEC):
    with seeded(seed, "chain"): model = spec.build(3, 8)
    freeze(model.to(dtype))
    return model


@pytest.fixture
def views(digits): return Views(digits, 12, Augment(pad=1), seed=5, views=3)


@pytest.fixture
def files(tmp_path):
    from PIL import Image
    for split in ("train", "val"):
        for c in "ab":
            (tmp_path/"set"/split/c).mkdir(parents=True)
            for i in range(6):
                pixels = np.random.default_rng(ord(c) + i).integers(0, 255, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path/f"set/{split}/{c}/{i}.png")
    return tmp_path/"set"


def by_id(batches, epoch):
    "{id: image} of an epoch."
    rows = torch.cat([batches.rows(epoch, b) for b in range(len(batches))])
    return dict(zip(batches.images.ids[rows].tolist(), torch.cat([x for x, _ in batches.epoch(epoch)])))


def test_a_view_is_a_function_of_seed_image_and_view(digits):
    "Not of the batch, its size, the order, the epoch, the number of views, or the part of the set."
    few = load("digits", classes=3, per_class=(4, 12))
    first = by_id(Views(digits, 12, RICH, seed=5, views=3), 1)
    others = [by_id(Views(digits, 16, RICH, seed=6, views=2), 3), by_id(Views(digits, 48, RICH, views=3), 4),
              by_id(Views(few, 8, RICH, views=2), 1)]
    for other in others:
        assert len(other) >= 24 and all(torch.allclose(x, first[i], atol=1e-5) for i, x in other.items())
    for other in (by_id(Views(digits, 12, RICH, views=3), 2), by_id(Views(digits, 12, RICH, views=3, view_seed=1), 1)):
        assert sum(torch.allclose(x, first[i], atol=1e-2) for i, x in other.items()) <= 5


def test_images_in_files_have_views_too(files, tmp_path):
    some = load(files, image_size=8, in_memory=False)
    some.workers = 0
    how = Augment(scale=(0.5, 1), erasing=0.5)
    first, other = by_id(Views(some, 4, how, seed=1, views=2), 1), by_id(Views(some, 6, how, seed=2, views=2), 3)
    assert len(first) == 12 and all(torch.equal(first[i], other[i]) for i in first)
    assert not any(torch.equal(first[i], x) for i, x in by_id(Views(some, 4, how, views=2), 0).items())
    views, teacher = Views(some, 4, how, seed=1, views=2), ViT.build(SPEC, 2, 8)
    freeze(teacher.double())
    kept = cached(tmp_path, logits_of(teacher), views).on(views)
    for step, (x, _) in enumerate(views.epoch(1), start=3):
        assert torch.equal(kept(x, step)["logits"].half(), logits_of(teacher)(x)["logits"].half())


@pytest.mark.parametrize("wrong,said", [
    (dict(augment=Augment(mixup=0.8)), "mixup = 0.8"), (dict(augment=Augment(cutmix=1)), "cutmix = 1.0"),
    (dict(augment=Augment(repeats=3)), "repeats = 3"), (dict(views=0), "views = 0"), (dict(views=1.5), "views = 1.5"),
    (dict(views=True), "views = True")])
def test_what_has_no_views(digits, wrong, said):
    with pytest.raises(ValueError, match=re.escape(said)) as e: Views(digits, 12, **wrong)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("make", [
    lambda t, m: logits_of(t), lambda t, m: hybrids_of(m, dict(enumerate(t))), lambda t, m: flows_of(t)])
def test_cached_and_live_targets_are_equal_on_equal_views(views, tmp_path, make):
    "In another order, in batches of another size and in parts; to the bit, rounded to float16."
    answers = make(chain(1, torch.float64), chain(2, torch.float64))
    cached(tmp_path, answers, Views(views.images, 7, views.augment, views=3))
    for accumulate in (1, 2):
        kept = cached(tmp_path, answers, views).on(views, accumulate)
        for step in range(2 * len(views)):
            x, _ = views.at(step // len(views), step % len(views))
            for part, xs in enumerate(x.chunk(accumulate)):
                live, found = answers(xs), kept(xs, step * accumulate + part)
                assert live.keys() == found.keys()
                for k, z in live.items():
                    assert found[k].dtype == torch.float32 and torch.equal(found[k].half(), z.half())
                    assert torch.equal(found[k].double(), answers.rounded()(xs)[k])
    assert len(list(tmp_path.iterdir())) == 1


def test_images_are_ordered_as_in_training(views, tmp_path):
    "What `drawn` says is what `epoch` gives, also from its middle on, and on each of two ranks."
    for part in ((0, 2), (1, 2)):
        mine = Views(views.images, 12, views.augment, seed=5, part=part, views=3)
        for b, (x, _) in enumerate(mine.epoch(4, 2), start=2):
            rows, view = mine.drawn(4 * len(mine) + b)
            assert view == 1 and torch.equal(x, next(mine.seen(1, [rows]))) and len(rows) == 6


def trained(folder, phase, batches, accumulate=1):
    settings = Training(epochs=4, batch_size=12, accumulate=accumulate, lr=0.05)
    done = train(phase, batches, settings, {n: folder/n for n in phase.trains}, runtime=CPU)
    return done, {n: Folder(folder/n).weights() for n in phase.trains}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_students_learn_the_same_from_a_cache(views, tmp_path, accumulate):
    "Knowledge distillation and m2mKD against the live teacher, rounded; the teacher's FLOPs fall away."
    meta, inside = chain(2, torch.float64), dict(enumerate(chain(1, torch.float64)))
    how = Distillation(alpha=0.7, tau=2)
    def phases(targets):
        def single(x, step): return {k: z.float() for k, z in targets(x, step).items()}
        yield taught(chain(3).requires_grad_().train(), single, how, 0)
    def pairs(targets):
        host, students = chain(2), dict(enumerate(chain(4).requires_grad_().train()))
        def single(x, step): return {k: z.float() for k, z in targets(x, step).items()}
        yield matched(host, students, single, how, 0)
    for name, answers, make in (("kd", logits_of(chain(1, torch.float64)), phases),
                                ("m2mkd", hybrids_of(meta, inside), pairs)):
        cache = cached(tmp_path, answers, views)
        live, kept = (trained(tmp_path/name/kind, next(make(targets)), views, accumulate) for kind, targets in
                      dict(live=answers.rounded(), kept=cache.on(views, accumulate)).items())
        for n in live[1]:
            assert all(torch.equal(z, kept[1][n][k]) for k, z in live[1][n].items())
        a, b = (sum(d["flops"] for d in x[0].values()) for x in (live, kept))
        teacher = sum(d["teacher_flops"] for d in live[0].values())
        assert b == pytest.approx(a - teacher) and sum(d["teacher_flops"] for d in kept[0].values()) == 0
        assert cache.facts["flops"] == pytest.approx(teacher * 3 / 4)       # three views, four epochs


def test_a_cache_on_another_accumulate_is_an_error(views, tmp_path):
    targets = cached(tmp_path, logits_of(chain()), views).on(views)
    with pytest.raises(ValueError, match="accumulate = 1 or the batches"):
        trained(tmp_path/"x", taught(chain(3).requires_grad_(), targets, Distillation(), 0), views, 2)
    with pytest.raises(ValueError, match="unknown answer of the teacher 'hybrid-0'; there are: logits"):
        trained(tmp_path/"y", matched(chain(2), {0: chain(4).requires_grad_()[0]}, targets, Distillation(), 0), views)


def test_flows_from_a_cache_make_the_same_hybrids(views, tmp_path):
    host, modules = chain(2), dict(enumerate(chain(1)))
    found = cached(tmp_path, flows_of(host), views).on(views)
    x, _ = views.at(1, 2)
    flows = found(x, len(views) + 2)
    ours = hybrids(host, modules, [x, flows["flow-1"], flows["logits"]])
    for i, z in hybrids(host, modules, prefix(host, x)).items(): assert torch.allclose(z, ours[i], atol=5e-3)


def test_matched_is_paired(views):
    "With the live teacher's answers: the same terms."
    meta, teacher, students = chain(2), dict(enumerate(chain(1))), dict(enumerate(chain(4).requires_grad_()))
    a = paired(meta, students, Distillation(), 7, match_modules(meta, teacher))
    b = matched(meta, students, hybrids_of(meta, teacher), Distillation(), 7)
    x, y = views.at(0, 0)
    for n, terms in a.loss(a.trains, x, y, 0).items():
        for k, z in b.loss(b.trains, x, y, 0)[n].items(): assert torch.allclose(z, terms[k], atol=1e-6)


def stopping_after(n, answers, error):
    "The same answers, which raise the error when they are asked for the n-th time."
    asked = []
    def ask(x):
        asked.append(1)
        if len(asked) == n: raise error
        return answers.ask(x)
    return Answers(answers.what, answers.modules, ask, answers.grid), asked


def test_a_pass_goes_on_with_the_view_it_was_at(views, tmp_path, capsys):
    "4 batches a view, and 3 before, of which the first two views and half the third are done."
    straight = cached(tmp_path/"a", logits_of(chain()), views)
    halted, _ = stopping_after(3 + 4 + 4 + 2, logits_of(chain()), KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt): cached(tmp_path/"b", halted, views)
    path, = (tmp_path/"b").iterdir()
    assert {p.name for p in path.glob("*.npy")} == {"view-0.npy", "view-1.npy"} and not list(path.glob("*.partial"))
    with pytest.raises(ValueError, match="not all of its views"): Cache(path)
    with open(path/"metrics.jsonl", "a") as f: f.write('{"step": 3, "vi')                 # a line cut off
    before = (path/"view-0.npy").stat().st_mtime_ns
    shutil.copy(path/"view-0.npy", path/"view-1.npy")                                      # and a file spoiled
    capsys.readouterr()
    goes_on, asked = stopping_after(-1, logits_of(chain()), None)
    cache = cached(tmp_path/"b", goes_on, views)
    assert "2 views to do" in capsys.readouterr().out and len(asked) == 3 + 4 + 4 + 1
    assert (path/"view-0.npy").stat().st_mtime_ns == before
    assert all(np.array_equal(a, b) for a, b in zip(cache.tables, straight.tables))
    for k in ("flops", "teacher_flops", "bytes"): assert cache.facts[k] == straight.facts[k]
    assert cached(tmp_path/"b", logits_of(chain()), views).folder.path == path
    assert capsys.readouterr().out == ""


def test_a_signal_ends_a_pass_between_views(views, tmp_path, capsys):
    asked, teacher = [], logits_of(chain())
    def ask(x):
        asked.append(1)
        if len(asked) == 3 + 4 + 1: signal.raise_signal(signal.SIGUSR1)
        return teacher.ask(x)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with pytest.raises(Stopped): cached(tmp_path, Answers("logits", teacher.modules, ask), views)
    finally: signal.signal(signal.SIGUSR1, before)
    assert "1 of 3 views are kept, the next run goes on there" in capsys.readouterr().out
    assert len(cached(tmp_path, teacher, views).tables) == 3


def spoil(path, name="view-1.npy"):
    data = bytearray((path/name).read_bytes())
    data[-3] ^= 1
    (path/name).write_bytes(data)

def shorten(path): os.truncate(path/"view-2.npy", 200)
def lose(path): (path/"view-0.npy").unlink()
def swap(path): shutil.copy(path/"view-0.npy", path/"view-1.npy")
def edit(path):
    settings = json.loads((path/"settings.json").read_text())
    (path/"settings.json").write_text(json.dumps(settings | {"views": 2}))


@pytest.mark.parametrize("damage", [spoil, shorten, lose, swap, edit, lambda p: spoil(p, "metrics.jsonl"),
                                    lambda p: spoil(p, "done.json")])
def test_a_damaged_cache_is_refused(views, tmp_path, damage):
    cache = cached(tmp_path, logits_of(chain()), views)
    damage(cache.folder.path)
    with pytest.raises((ValueError, FileNotFoundError)) as e: cached(tmp_path, logits_of(chain()), views)
    with pytest.raises((ValueError, FileNotFoundError)): Cache(cache.folder.path)
    assert str(cache.folder.path) in str(e.value) and "\n" not in str(e.value)


def other_sets(digits):
    brighter = digits.images.clone()
    brighter[5, 0, 0, 0] ^= 1
    larger = digits.images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return {"images": ImageSet(brighter, digits.labels, digits.classes, digits.ids, digits.split),
            "count": load("digits", classes=3, per_class=15),
            "image_size": ImageSet(larger, digits.labels, digits.classes, digits.ids, digits.split)}


def test_a_cache_of_something_else_is_refused(views, digits, tmp_path):
    cache = cached(tmp_path, logits_of(chain()), views)
    for name, images in other_sets(digits).items():
        with pytest.raises(ValueError, match=f"made with other settings: (images|{name}) is") as e:
            cache.on(Views(images, 12, Augment(pad=1), views=3))
        assert "\n" not in str(e.value)
    for name, other in dict(views=Views(digits, 12, Augment(pad=1), views=4), augment=Views(digits, 12, views=3),
                            seed=Views(digits, 12, Augment(pad=1), views=3, view_seed=9)).items():
        with pytest.raises(ValueError, match=f"other settings: {name}.* is .* there, .* here"): cache.on(other)
    cache.on(Views(digits, 16, Augment(pad=1, smoothing=0.1), seed=8, views=3))            # of labels, not of images
    assert cache.check(**logits_of(chain()).record()) is cache
    for other in (logits_of(chain(9)), flows_of(chain()), hybrids_of(chain(), {0: chain()[0]})):
        with pytest.raises(ValueError, match="other settings: (weights|what) is"): cache.check(**other.record())


def test_all_that_answers_depend_on_is_in_the_name(views, digits, tmp_path):
    teacher, n = chain(), 0
    def folders(): return len(list(tmp_path.iterdir()))
    for answers, batches in ((logits_of(teacher), views), (logits_of(chain(9)), views),
            *((logits_of(teacher), Views(x, 12, Augment(pad=1), views=3)) for k, x in other_sets(digits).items() if k != "image_size"),
            (logits_of(teacher), Views(digits, 12, Augment(pad=1), views=2)), (flows_of(teacher), views),
            (logits_of(teacher), Views(digits, 12, Augment(pad=1), views=3, view_seed=1)),
            (logits_of(teacher), Views(digits, 12, Augment(pad=2), views=3))):
        cached(tmp_path, answers, batches)
        assert folders() == (n := n + 1)
    cached(tmp_path, logits_of(teacher), Views(digits, 48, Augment(pad=1, smoothing=0.1), seed=3, views=3))
    assert folders() == n


def test_equal_weights_that_answer_otherwise(views, tmp_path):
    cached(tmp_path, logits_of(chain()), views)
    other = chain(spec=SPEC.but(options=SPEC.options | dict(global_pool="avg", fc_norm=False)))
    other.load_state_dict(chain().state_dict())
    with pytest.raises(ValueError, match="logits of the first images are not what this teacher") as e:
        cached(tmp_path, logits_of(other), views)
    assert "\n" not in str(e.value)


def test_whole_features_of_many_images_are_refused(views, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FEATURES", 48 * 3 - 1)
    teacher = chain(spec=SPEC.but(options=SPEC.options | dict(class_token=False, global_pool="avg")))
    with pytest.raises(ValueError, match=r"flows of 48 images x 3 views take 10\.1 kB in float16: features"):
        cached(tmp_path, flows_of(teacher), views)
    assert not list(tmp_path.rglob("*.npy")) and not list(tmp_path.rglob("*.partial"))
    cached(tmp_path, flows_of(teacher, grid=(1, 1)), views)
    cached(tmp_path, logits_of(teacher), views)
    monkeypatch.setattr(module, "FEATURES", 48 * 3)
    cached(tmp_path, flows_of(teacher), views)


def test_the_size_of_all_of_tiny_imagenet(tmp_path):
    "53 KB a view in 12 views of 100,000 images: 64 GB. Pooled, it depends on the disk."
    class Many:
        views = 12
        images = range(100_000)
    row = np.dtype([("flow-1", "<f2", (40, 12, 55)), ("logits", "<f2", (200,))])
    with pytest.raises(ValueError, match=r"of 100,000 images x 12 views take 63\.8 GB in float16: features are kept "
                       "of at most 8,000 images x 4 views"):
        module._check_size(tmp_path/"x", flows_of(chain()), row, Many)
    Many.images = range(10**9)
    with pytest.raises(ValueError, match="GB in float16, but .* has room for"):
        module._check_size(tmp_path/"x"/"y", flows_of(chain(), grid=(40, 12)), row, Many)


def test_what_does_not_fit_into_float16(views, tmp_path):
    teacher = chain()
    for value, factor in (("nan", float("nan")), ("large", 1e9)):
        loud = Answers(value, {"teacher": teacher}, lambda x: {"logits": teacher(x) * factor})
        with pytest.raises(FloatingPointError, match="logits of row 0 in view 0 is not finite in float16"):
            cached(tmp_path, loud, views)
    for wrong in (lambda x: {"logits": teacher(x)[:3]}, lambda x: {"logits": teacher(x).argmax(1)}, lambda x: {"logits": 3}):
        with pytest.raises(TypeError, match=r"logits of 12 images is .* should be a tensor of floats \(12, ...\)"):
            cached(tmp_path, Answers("wrong", {"teacher": teacher}, wrong), views)
    assert not list(tmp_path.rglob("*.npy"))


def test_a_disk_that_is_full(views, tmp_path):
    "Which is only known while the file is written: here for a limit on the size of files."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(OSError, match="view-0.npy cannot be written: File too large"):
            cached(tmp_path, flows_of(chain()), views)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.rglob("*.npy")) and not list(tmp_path.rglob("*.partial"))
    assert len(cached(tmp_path, flows_of(chain()), views).tables) == 3


def test_a_teacher_that_is_random_is_found_out(views, tmp_path):
    teacher = chain()
    with pytest.raises(ValueError, match="are not what this teacher"):
        cached(tmp_path, Answers("random", {"teacher": teacher}, lambda x: {"logits": torch.randn(len(x), 3)}), views)


def test_pooling(views):
    tokens, maps = torch.randn(2, 16, 5), torch.randn(2, 5, 6, 4)
    means = tokens.view(2, 2, 2, 2, 2, 5).mean((2, 4)).view(2, 4, 5)
    assert torch.allclose(pooled(tokens, (2, 2)), means, atol=1e-6)
    assert torch.allclose(pooled(maps, (2, 2)), maps.view(2, 5, 2, 3, 2, 2).mean((3, 5)), atol=1e-6)
    assert pooled(maps, (9, 2)).shape == (2, 5, 6, 2) and torch.equal(pooled(maps, (6, 4)), maps)
    with pytest.raises(ValueError, match="17 tokens are no square grid"): pooled(torch.randn(2, 17, 5), (2, 2))


def test_the_sum_of_weights():
    sums = {weights_sum({"teacher": m}) for m in (chain(), chain(1), chain().double(), chain().bfloat16())}
    assert len(sums) == 4 and weights_sum({"teacher": chain()}) in sums and weights_sum({"x": chain()}) not in sums
    changed = chain()
    with torch.no_grad(): list(changed.parameters())[-1].view(-1)[0] += 1e-7
    assert weights_sum({"teacher": changed}) not in sums


def test_modes_and_gradients_are_left_as_they_were(views, tmp_path):
    teacher = chain(spec=SPEC.but(options=SPEC.options | dict(drop_path_rate=0.5))).train().requires_grad_()
    cache = cached(tmp_path, logits_of(teacher), views)
    assert teacher.training and all(m.training for m in teacher.modules())
    rows = torch.arange(12)
    teacher.eval()
    assert torch.equal(teacher(next(views.seen(0, [rows]))).detach().half(), cache.at(rows, 0)["logits"].half())


def ended(path, flops, inputs):
    "A stage of a whole model, by its facts."
    name, seed, _ = path.name.split("-")
    stage = Folder(path).begin(dict(name=name, seed=int(seed[1:]), model={}, module=None, inputs=inputs))
    stage.log(step=1)
    stage.finish(flops=flops, teacher_flops=0, seconds=1, results={})


def test_its_cost_is_a_stage_s(views, tmp_path):
    "FLOPs of the pass by hand; all of them the teacher's; as an input it is in the totals, once."
    teacher = chain()
    with flop_counter() as counter: teacher(torch.zeros(1, 3, 8, 8))
    ended(tmp_path/"teacher-s0-t", flops=1000, inputs=[])
    source = Stage.of(tmp_path/"teacher-s0-t")
    with flop_counter() as around: cache = cached(tmp_path, logits_of(teacher), views, "answers", [source])
    flops = counter.get_total_flops() * 48 * 3
    assert cache.facts["flops"] == cache.facts["teacher_flops"] == flops and cache.facts["bytes"] == 48 * 3 * 6
    assert around.tallies["teacher"] == around.get_total_flops() > flops            # and the trial
    stage = Stage.of(cache.folder.path)
    assert compute(stage) == (0, flops, flops + 1000) and (stage.name, stage.seed) == ("answers", 0)
    for arm in ("a", "b"): ended(tmp_path/f"{arm}-s1-{arm}", flops=10, inputs=[stage.hash])
    arms = [Stage.of(tmp_path/f"{arm}-s1-{arm}") for arm in ("a", "b")]
    assert compute(arms[0]) == (10, flops + 10, flops + 1010)
    assert compute(*arms) == (20, flops + 20, flops + 1020)


def test_the_memory_is_mapped(views, tmp_path):
    cache = cached(tmp_path, logits_of(chain()), views)
    assert all(isinstance(t, np.memmap) and t.dtype["logits"].base == np.float16 and not t.flags.writeable for t in cache.tables)
