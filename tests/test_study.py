"""What a study promises: it is read off folders, every total of compute, every interval, and one clear
sentence for what does not fit. The folders are written by hand, with known numbers."""
import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from m2mkd import pages
from m2mkd.core import hash_of, sha256, write_json
from m2mkd.folder import Folder
from m2mkd.results import Results
from m2mkd.stage import Stage, stages_in
from m2mkd.study import Study, alike, in_words, one_decay
from refusing import refusing

IMAGES = 1000
LABELS = [0] * IMAGES
nan = float("nan")


def seal(folder):
    "Take the sums of a hand-written stage anew."
    done = json.loads((folder/"done.json").read_text())
    done["sums"] = {n: sha256(folder/n) for n in Folder.summed if (folder/n).exists()}
    write_json(folder/"done.json", done)


class Made:
    "A study's folder, written by hand."
    def __init__(self, root):
        self.root = root
        write_json(root/"labels"/"few.json", LABELS)

    def stage(self, name, seed, flops, right=None, inputs=(), module=None, alpha=0.5, decay="matrices",
              images="few", start=100, steps=10, epochs=2, seconds=1.0, teacher_flops=0, results=None):
        "The hash of a stage that is right on `right` (a number: the first, or indices) of the images."
        record = dict(name=name, model={}, module=module, images=images, seed=seed,
                      training={"decay": decay} if flops else None, inputs=list(inputs),
                      distillation={"alpha": alpha} if module is not None else None)
        record |= {"tag": right if isinstance(right, int) else None}
        shown = name if module is None else f"{name}-{module}"
        folder = self.root/"stages"/f"{shown}-s{seed}-{hash_of(record)}"
        folder.mkdir(parents=True)
        write_json(folder/"settings.json", record)
        results = dict(results or {})
        if right is not None:
            hit = np.isin(np.arange(IMAGES), range(right) if isinstance(right, int) else right)
            write_json(folder/"predictions.json", [0 if h else 1 for h in hit])
            results = {"top1": hit.mean().item(), "images": IMAGES} | results
        lines = [{"step": 0, "epoch": 0, "top1": start / IMAGES, "images": IMAGES},
                 {"step": steps // 2, "epoch": epochs / 2, "loss": 1.0},
                 {"step": steps, "epoch": epochs, "top1": results.get("top1"), "images": IMAGES}]
        (folder/"metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
        write_json(folder/"done.json", dict(
            name=shown, seed=seed, seconds=seconds, flops=flops, teacher_flops=teacher_flops, steps=steps,
            epochs=epochs, results=results, sums={}))
        seal(folder)
        return folder.name.rpartition("-")[2]

    def stages(self): return stages_in(self.root)

    def made(self, *args, **more):
        "The Stage of a folder written by `stage`."
        digest = self.stage(*args, **more)
        return self.stages()[digest]

    def study(self, cells, **said):
        "A Study of {(arm, seed, further factors as pairs): hash}."
        study, stages = Study(self.root, "E2E", **said), self.stages()
        for (arm, seed, *by), digest in cells.items(): study.add(arm, seed, stages[digest], **dict(by))
        return study


@pytest.fixture
def made(tmp_path): return Made(tmp_path/"made_up"/"two_arms")

def two_arms(made, seeds=(0, 1, 2), rights=((500, 510, 505), (530, 550, 535))):
    "E2E, and m2mKD of two modules a seed, that share meta model and teacher; the meta model's module was incubated."
    meta, teacher = made.stage("meta", 0, 100, 300), made.stage("teacher", 0, 1000, 700)
    cells = {}
    for seed, e2e, ours in zip(seeds, *rights):
        parts = [made.stage("distill", seed, 50, inputs=[meta, teacher], module=i, teacher_flops=20) for i in (0, 1)]
        cells["E2E", seed] = made.stage("e2e", seed, 10, e2e)
        cells["m2mKD", seed] = made.stage("m2mKD", seed, 10, ours, parts)
    return cells


def test_three_totals_count_a_shared_stage_once(made):
    study = made.study(two_arms(made))
    assert study.compute("E2E", 1) == (10, 10, 10)
    assert study.compute("m2mKD", 1) == (2 * 30 + 10, 100 + 2 * 50 + 10, 100 + 1000 + 2 * 50 + 10)
    cost = study.cost().set_index("what")
    assert cost.loc["arms", ["student", "given", "trained"]].tolist() == pytest.approx(
        [3 * 80e-12, (100 + 3 * 120) * 1e-12, (1100 + 3 * 120) * 1e-12])
    assert cost.loc["arms", "seconds"] == 2 + 3 * 4 and not cost.loc["tuning"].any()
    table = study.table().set_index("arm")
    assert table.loc["m2mKD", "trained"] == pytest.approx(1210e-12) and table.loc["m2mKD", "seconds"] == 5
    assert table.loc["m2mKD", "n"] == 3 and table.loc["m2mKD", "mean"] == pytest.approx(1.615 / 3)
    assert table.loc["m2mKD", "sd"] == pytest.approx(np.std([0.53, 0.55, 0.535], ddof=1))
    assert table.loc["m2mKD", "start"] == pytest.approx(0.1) and table.loc["m2mKD", "epochs"] == 2


def test_a_meta_model_fitted_in_a_teacher_and_an_incubated_one(made):
    "Given teacher: what was fitted in it counts, its own training does not; an incubated module has no teacher."
    teacher = made.stage("teacher", 0, 1000, 700)
    fitted = made.stage("fit", 0, 60, inputs=[teacher], module=0, alpha=1, teacher_flops=25)
    meta = made.stage("meta", 0, 100, 300, [fitted])
    part = made.stage("distill", 0, 50, inputs=[meta, teacher], module=0, teacher_flops=20)
    alone = made.stage("incubated", 0, 40, inputs=[meta], module=0, alpha=0)
    study = made.study({("E2E", 0): made.stage("e2e", 0, 10, 500), ("m2mKD", 0): made.stage("m2mKD", 0, 10, 520, [part]),
                        ("incubated", 0): made.stage("incubated", 0, 10, 510, [alone])})
    assert study.compute("m2mKD", 0) == (30 + 10, 10 + 50 + 100 + 60, 10 + 50 + 100 + 60 + 1000)
    assert study.compute("incubated", 0) == (40 + 10, 10 + 40 + 100 + 60, 10 + 40 + 100 + 60 + 1000)


def test_tuning_is_counted_apart(made):
    study = made.study(two_arms(made))
    tried = made.made("tried", 0, 7, 400)
    study.tuned(tried, study.stage("E2E", 0))                       # the latter is an arm's: counted there
    assert study.cost().set_index("what").loc["tuning", ["trained", "seconds"]].tolist() == pytest.approx([7e-12, 1])
    again = Study.read(study.save().folder)
    pd.testing.assert_frame_equal(again.cost(), study.cost())


def test_longer_spends_the_same_in_all(made):
    study = made.study(two_arms(made))
    assert study.longer("E2E", 0, study.compute("m2mKD", 0).trained) == 242        # 1210 / (10 / 2)
    assert study.longer("m2mKD", 0, 1210 + 5) == 3 and study.longer("m2mKD", 0, 1) == 2
    assert study.longer("E2E", 0, 22.6) == 5 and study.longer("E2E", 0, 0) == 2
    free = made.stage("given", 0, 0, 500, steps=0, epochs=0)
    study.add("given", 0, made.stages()[free])
    with pytest.raises(ValueError, match="given-s0-.* was not trained"): study.longer("given", 0, 100)


def test_golden_differences(made):
    "3, 4, 3 points: mean 10/3, sd 1/sqrt(3), so t = 10; t(2) = 4.30265, and with 2 degrees p = 1 - t / sqrt(2 + t^2)."
    table = made.study(two_arms(made)).differences()
    row = table.iloc[0]
    assert (len(table), row.arm, row.against, row.n) == (1, "m2mKD", "E2E", 3)
    half = 4.30265 * 0.0057735 / 3**0.5
    assert row[["difference", "t_low", "t_high"]].tolist() == pytest.approx([0.1 / 3, 0.1 / 3 - half, 0.1 / 3 + half], abs=1e-6)
    assert row.p == pytest.approx(1 - 10 / 102**0.5, abs=1e-9) == row.holm and np.isnan(row["rank"])
    assert row.bootstrap_low == pytest.approx(1 / 30 - 1.96 * 0.15986 / 1000**0.5, abs=0.0015)     # sd of the images' differences
    assert in_words(row).startswith("+3.3 points (95 % over 3 seeds: +1.9 to +4.8; 95 % over test images, of these models: +2.")


def test_images_are_paired(made):
    "500 of 1000 images differ: Binomial(1000, 1/2), 469 to 531; two seeds that agree tell as much as one."
    cells = {(arm, seed): made.stage(arm.lower(), seed, 10, list(range(n))) for seed in (0, 1) for arm, n in (("E2E", 0), ("ours", 500))}
    row = made.study(cells).differences().iloc[0]
    assert (row.bootstrap_low, row.bootstrap_high) == pytest.approx((0.469, 0.531), abs=0.0015)


def test_six_seeds_have_ranks_and_holm_counts_the_rows(made):
    cells = {}
    for seed in range(6):
        for arm, right in (("E2E", 500), ("up", 520 + seed), ("noise", 500 + (-1)**seed * (3 + seed))):
            cells[arm, seed] = made.stage(arm.lower(), seed, 10, right)
    table = made.study(cells).differences().set_index("arm")
    assert table["rank"]["up"] == 2 / 64 and table["rank"]["noise"] > 0.5
    assert table.holm["up"] == pytest.approx(2 * table.p["up"]) and table.holm["noise"] == pytest.approx(table.p["noise"])
    alone = made.study(cells).differences(only=["up"])
    assert len(alone) == 1 and alone.holm[0] == alone.p[0]


def test_one_seed_has_no_interval_over_seeds(made):
    study = made.study(two_arms(made, (0,)), primary="m2mKD")
    row = study.differences().iloc[0]
    assert row.n == 1 and row.difference == pytest.approx(0.03)
    assert row[["t_low", "t_high", "p", "holm", "rank"]].isna().all() and row.bootstrap_low < 0.03 < row.bootstrap_high
    assert np.isnan(study.table().sd).all() and study.main == "m2mKD less E2E: +3.0 points (one seed)"


def test_unequal_seeds_pair_what_both_have(made):
    cells = two_arms(made)
    cells["m2mKD", 7] = made.stage("m2mKD", 7, 10, 900)
    cells["alone", 8] = made.stage("alone", 8, 10, 900)
    del cells["E2E", 2]
    table = made.study(cells).differences().set_index("arm")
    assert table.n.to_dict() == {"m2mKD": 2, "alone": 0} and table.difference["m2mKD"] == pytest.approx(0.035)
    assert np.isnan(table.difference["alone"]) and in_words(table.loc["alone"]) == "no seed in common"


def by_prior(made, seeds=(0, 1)):
    cells = {}
    for p, prior in enumerate(("ring", "free")):
        for seed in seeds:
            for arm, right in (("E2E", 500), ("m2mKD", 520 + 10 * p + 4 * seed)):
                cells[arm, seed, ("prior", prior)] = made.stage(f"{arm}_{prior}", seed, 10, right)
    return cells


def test_mean_over_a_factor_averages_each_seed_first(made):
    "Gains 2.0, 2.4 and 3.0, 3.4 points: by seed 2.5 and 2.9, whose sd is 0.2828; t(1) = 12.7062."
    study = made.study(by_prior(made))
    table = study.differences(mean_over="prior")
    assert table.prior.tolist() == ["ring", "free", "mean of all"] and table.n.tolist() == [2, 2, 2]
    row = table.iloc[2]
    assert row[["difference", "t_low", "t_high"]].tolist() == pytest.approx([0.027, 0.027 - 12.7062 * 0.002, 0.027 + 12.7062 * 0.002], abs=1e-6)
    assert row.bootstrap_low > min(table.bootstrap_low[:2]) and row.bootstrap_high < max(table.bootstrap_high[:2])
    cells = {k: v for k, v in by_prior(Made(made.root.parent/"other")).items() if k != ("m2mKD", 0, ("prior", "free"))}
    other = Made(made.root.parent/"other").study(cells)
    assert other.differences(mean_over="prior").n.tolist() == [2, 1, 1]
    one = other.differences(only=["m2mKD"], baseline="E2E", mean_over=None)
    assert one.prior.tolist() == ["ring", "free"]


def test_a_level_that_lacks_the_arm_has_no_mean_of_all(made):
    cells = {k: v for k, v in by_prior(made).items() if k[0] == "E2E" or k[2] == ("prior", "ring")}
    assert made.study(cells).differences(mean_over="prior").prior.tolist() == ["ring"]


def test_differences_along_another_factor(made):
    study = made.study(by_prior(made))
    table = study.differences(along="prior", baseline="ring")
    assert table[["prior", "arm", "against", "n"]].values.tolist() == [["free", "E2E", "ring", 2], ["free", "m2mKD", "ring", 2]]
    assert table.difference.tolist() == pytest.approx([0, 0.01])
    for asked, said in ((dict(along="prior"), "along prior need a baseline, one of"), (dict(along="priors", baseline="ring"), "unknown factor.*prior"),
                        (dict(along="prior", baseline="rung"), "unknown prior 'rung'.*'ring', 'free'"), (dict(only=["m2mkd"]), "unknown arm 'm2mkd'"),
                        (dict(along="seed"), "unknown factor"), (dict(mean_over="arm"), "no mean over arm"), (dict(mean_over="priors"), "unknown factor"),
                        (dict(baseline="E3E"), "unknown arm 'E3E'")):
        with pytest.raises(ValueError, match=said): study.differences(**asked)


def test_curves_lie_over_all_that_was_paid(made):
    study = made.study(two_arms(made, (0,)))
    table = study.curves()
    ours = table[table.arm == "m2mKD"]
    assert (ours.tflop * 1e12).tolist() == pytest.approx([1200, 1205, 1210]) and ours.step.tolist() == [0, 5, 10]
    assert ours.top1.dropna().tolist() == [0.1, 0.53] and ours.loss.dropna().tolist() == [1.0]
    assert list(table.columns[:5]) == ["arm", "seed", "epoch", "step", "tflop"]


def test_a_factor_may_be_called_as_a_number_of_the_metrics(made):
    cells = {("E2E", 0, ("images", n)): made.stage(f"e2e{n}", 0, 10, 500 + n) for n in (50, 400)}
    study = made.study(cells)
    assert study.curves().images.unique().tolist() == [50, 400] and study.levels("images") == [50, 400]
    assert study.stage("E2E", np.int64(0), images=50.0).name == "e2e50" and study.compute("E2E", 0, images=400).trained == 10
    assert [*study.per_seed().columns[:3]] == ["images", "arm", "seed"]


def test_read_gives_back_what_was_saved(made):
    study = made.study(by_prior(made), question="Which?", parameters={"seeds": [0, 1]}, data="made up", primary="m2mKD",
                       contrasts=[{}, dict(along="prior", baseline="ring")])
    study["sparse"] = pd.DataFrame(dict(keep=[1.0, 0.5], top1=[0.5, nan])).set_index("keep")
    study.save()
    again = Study.read(study.folder)
    for name in ("per_seed", "table", "differences", "curves", "cost"): pd.testing.assert_frame_equal(getattr(again, name)(), getattr(study, name)())
    for name in ("question", "parameters", "data", "primary", "baseline", "factors", "arms", "seeds", "main", "environment", "contrasts"):
        assert getattr(again, name) == getattr(study, name), name
    assert again["sparse"].keep.tolist() == [1, 0.5] and np.isnan(again["sparse"].top1[1])
    assert Results.read(study.folder).main == study.main and "NaN" not in (study.folder/"results.json").read_text()
    before = {f.name: f.read_bytes() for f in study.folder.iterdir() if f.is_file()}
    again.save()
    assert {f.name: f.read_bytes() for f in study.folder.iterdir() if f.is_file()} == before
    more = made.made("m2mKD_free", 2, 10, 900)
    again.add("m2mKD", 2, more, prior="free"), again.add("E2E", 2, made.made("E2E_free", 2, 10, 500), prior="free")
    assert "over 3 seeds" in again.main                              # a computed sentence is computed again
    again.main = "It works."
    assert Study.read(again.save().folder).main == "It works."


def test_in_flight_each_whole_model_that_no_other_needs_is_a_cell(made):
    two_arms(made)
    study = Study.read(made.root)
    assert study.arms == ["e2e", "m2mKD"] and study.seeds == [0, 1, 2] and study.main == ""
    assert len(study.differences(baseline="e2e")) == 1
    made.stage("e2e", 0, 12, 400)
    with pytest.raises(ValueError, match="arm e2e, seed 0 is stage e2e-s0-.* already, and cannot be e2e-s0-.*as a factor"): Study.read(made.root)


def test_health_tables_have_stage_and_seed(made):
    rows = [dict(module=i, meta=0.5, teacher=0.4, student=0.3, kl=0.1) for i in (0, 1)]
    for seed in (0, 1):
        folder = made.made("hybrids", seed, 0, results={"hybrids": rows}).path
        done = json.loads((folder/"done.json").read_text())
        write_json(folder/"done.json", done | {"of": {"meta": "meta", "teacher": "teacher", "students": "distill"}})
    table = made.study({}).health()
    assert table[["stage", "seed", "module"]].values.tolist() == [["distill", s, i] for s in (0, 1) for i in (0, 1)]
    assert table.index.is_unique


def test_health_tables_name_the_factor_that_their_modules_alone_are_for(made):
    """Modules of one routing, from which arms of both data sizes start; the teacher is all's."""
    rows, cells = [dict(module=0, meta=0.5, teacher=0.4)], {}
    teacher = made.stage("teacher", 0, 9, 300)
    made.stage("hybrids", 0, 0, inputs=[teacher], results={"hybrids": rows})
    for routing, right in (("plain", 400), ("limited", 410)):
        part = made.stage("distill", 0, 10, right, [teacher], module=0)
        made.stage("hybrids", 0, 0, inputs=[teacher, part], results={"hybrids": rows})
        for n in (50, 400):
            arm = made.stage("m2mKD", 0, 10, right + n, [part])
            cells["m2mKD", 0, ("routing", routing), ("images", n), ("data", "digits")] = arm
    table = made.study(cells).health()
    assert sorted(table.routing.fillna("")) == ["", "limited", "plain"]
    assert not {"images", "data"} & {*table}


MAKERS = "torch", "safetensors", "torchmetrics", "timm", "datasets", "kornia", "sklearn"
READ = refusing(MAKERS) + """
from m2mkd.study import Study
study = Study.read(sys.argv[1])
study.table(), study.curves(), study.cost(), study.health(), study.save()
print(study.main, float(study.differences()['rank'].iloc[0]))
"""

def test_a_study_is_read_where_torch_cannot_be_imported(made):
    made.study(two_arms(made, range(6), ([500] * 6, (510, 511, 512, 513, 514, 516))), primary="m2mKD").save()
    run = subprocess.run([sys.executable, "-c", READ, made.root], capture_output=True, text=True)
    assert run.stdout == "m2mKD less E2E: +1.3 points (95 % over 6 seeds: +1.0 to +1.5) 0.03125\n", run.stderr


def spoil(made, study, how):
    e2e = study.stage("E2E", 0).path
    def edit(file, **new): write_json(file, json.loads(file.read_text()) | new)
    return {
        "no stage": lambda: shutil.rmtree(e2e), "not done": lambda: (e2e/"done.json").unlink(),
        "no predictions": lambda: (e2e/"predictions.json").unlink(), "metrics": lambda: (e2e/"metrics.jsonl").write_text(""),
        "no metrics": lambda: (e2e/"metrics.jsonl").unlink(), "done": lambda: (e2e/"done.json").write_text("{"),
        "labels": lambda: (made.root/"labels/few.json").unlink(), "wrong labels": lambda: write_json(made.root/"labels/few.json", [1] * IMAGES),
        "results": lambda: (made.root/"results.json").write_text("[1]"), "old results": lambda: write_json(made.root/"results.json", {"arms": []}),
        "settings": lambda: (made.root/"settings.json").unlink(), "top1": lambda: edit(made.root/"results.json", arms=[
            r | {"top1": 0.9} for r in json.loads((made.root/"results.json").read_text())["arms"]]),
        "input": lambda: shutil.rmtree(next((made.root/"stages").glob("meta-*"))), "folder": lambda: shutil.rmtree(made.root)}[how]()


@pytest.mark.parametrize("how, error, said", [
    ("no stage", ValueError, "results.json names the stage e2e-s0-.*not among the finished"), ("not done", ValueError, "names the stage e2e-s0-.*not among"),
    ("no predictions", ValueError, "predictions.json is missing"), ("metrics", ValueError, "metrics.jsonl has changed"),
    ("no metrics", ValueError, "metrics.jsonl is missing"), ("done", ValueError, "done.json is damaged"),
    ("labels", FileNotFoundError, "few.json is missing"), ("wrong labels", ValueError, "predictions and labels say a top-1 of 0.4.*, done.json 0.5"),
    ("results", ValueError, "results.json is damaged: it holds no object"), ("old results", ValueError, "older than `Results`: its tables is None"),
    ("settings", FileNotFoundError, "settings.json is missing"), ("top1", ValueError, "says a top-1 of 0.9 of the stage e2e-s0-.*own is 0.5"),
    ("input", ValueError, "distill-0-s0-.* was built from the stage .*, which is not in"), ("folder", FileNotFoundError, "is missing")])
def test_what_is_missing_or_damaged_is_named(made, how, error, said):
    study = made.study(two_arms(made)).save()
    spoil(made, study, how)
    with pytest.raises(error, match=said): Study.read(made.root).differences()


def test_what_does_not_fit_is_refused_when_it_is_added(made, tmp_path):
    cells = two_arms(made)
    study = made.study(cells)
    one, other = study.stage("E2E", 0), study.stage("E2E", 1)
    elsewhere = Made(tmp_path/"made_up"/"elsewhere")
    far = elsewhere.made("e2e", 0, 10, 500)
    assert study.add("E2E", 0, one) is one                            # twice the same is the same
    for arm, seed, stage, by, error, said in (
            ("E2E", 0, study.stage("m2mKD", 0), {}, ValueError, "arm E2E, seed 0 is stage e2e-s0-.* and cannot be m2mKD-s0-"),
            ("E2E", 0, other, {}, ValueError, "seed 0 was given stage e2e-s1-.*whose seed is 1"),
            ("new", 0, far, {}, ValueError, "not in the study's folder"),
            ("new", 0, one, {"images": 50}, ValueError, "given with images, but the cells of this study have none"),
            ("new", 0, [one], {}, TypeError, "given a list: expected a Stage"), ("", 0, one, {}, TypeError, "should be a name"),
            ("new", "0", one, {}, ValueError, "whose seed is 0"), ("new", True, other, {}, ValueError, "seed True"),
            ("new", 0, one, {"epochs": 3}, ValueError, "cannot be called epochs"), ("new", 0, one, {"prior": None}, TypeError, "prior = None"),
            ("new", 0, one, {"prior": nan}, TypeError, "prior = nan")):
        with pytest.raises(error, match=said): study.add(arm, seed, stage, **by)
    assert study.arms == ["E2E", "m2mKD"] and len(study.rows) == len(study.cells) == 6
    for asked, said in ((("e2e", 0), "unknown arm 'e2e'"), (("E2E", 9), "unknown seed 9.*0, 1, 2")):
        for call in (study.stage, study.compute): pytest.raises(ValueError, call, *asked).match(said)
        pytest.raises(ValueError, study.longer, *asked, 100).match(said)
    with pytest.raises(ValueError, match="no stages yet"): Study(made.root, "E2E").table()


@pytest.mark.parametrize("top1", [nan, None, 45.0, "0.5"])
def test_an_accuracy_that_is_none_is_refused(made, top1):
    digest = made.stage("e2e", 0, 10, 500, results={"top1": top1})
    with pytest.raises(ValueError, match="top-1 accuracy of stage e2e-s0-.* should be a share"): made.study({("E2E", 0): digest})


def test_mixed_decay_is_refused(made):
    cells = {("E2E", 0): made.stage("e2e", 0, 10, 500), ("old", 0): made.stage("old", 0, 10, 500, decay=None)}
    with pytest.raises(ValueError, match="weight decay differs .*all and matrices"): made.study(cells)
    with pytest.raises(ValueError, match="all and matrices"): alike(made.stages().values())
    one_decay(["all", None, "all"])


def test_other_images_are_not_paired(made):
    write_json(made.root/"labels"/"others.json", [0] * (IMAGES - 1) + [2])      # both are wrong there
    cells = {("E2E", 0): made.stage("e2e", 0, 10, 500), ("new", 0): made.stage("new", 0, 10, 510, images="others")}
    with pytest.raises(ValueError, match="new-s0-.* and e2e-s0-.*were tested on other images"): made.study(cells).differences()


def test_a_stage_without_predictions_has_no_interval_over_images(made):
    cells = {("E2E", 0): made.stage("e2e", 0, 10, 500), ("given", 0): made.stage("given", 0, 0, results={"top1": 0.6}, steps=0, epochs=0)}
    row = made.study(cells).differences().iloc[0]
    assert row.difference == pytest.approx(0.1) and np.isnan(row.bootstrap_low)


def test_results_of_a_benchmark(tmp_path):
    run = Results(tmp_path/"speed"/"cpu", "Fast?")
    run["rates"] = [dict(path="a|b", rate=1.5, none=None), dict(path="c", rate=nan, none=None)]
    run.main, run.environment = "a is fast", dict(commit="0123456789abcdef", device="cpu")
    again = Results.read(run.save().folder)
    pd.testing.assert_frame_equal(again["rates"], run["rates"])
    with pytest.raises(ValueError, match="unknown table of the run 'rate'; there are: rates"): again["rate"]
    assert "a is fast" in pages.page(again) and "a\\|b" in pages.page(again)


def test_pages_lead_to_a_seeds_metrics(made):
    study = made.study(two_arms(made), question="Help?", data="made up", primary="m2mKD").save()
    (made.root/"notebook.ipynb").write_text("{}")
    text = pages.page(Study.read(made.root), {made.root.parent.parent/"figures"/"a.svg": "Points: m2mKD is above."})
    for said in ("Help?", "Data: made up.", "+1.9 to +4.8", "Seeds: 0, 1, 2", "![Points: m2mKD is above.](../../figures/a.svg)", "[the executed notebook](notebook.ipynb)",
                 "- m2mKD less E2E: **+3.3** (+1.9 to +4.8), n = 3\n", "53.8 ± 1.0"):
        assert said in text, said
    link = f"[53.0](stages/{study.stage('m2mKD', 0).path.name}/metrics.jsonl)"
    assert link in text and (made.root/link[7:-1]).exists()
    listed = pages.index(made.root.parent.parent, {("made_up", "two_arms"): [made.root/"a.svg"]})
    assert "[made_up, two_arms](made_up/two_arms/README.md)" in listed and "[figure](made_up/two_arms/a.svg)" in listed and "E2E; m2mKD" in listed
    assert listed == pages.index(made.root.parent.parent, {("made_up", "two_arms"): [made.root/"a.svg"]})
    with pytest.raises(FileNotFoundError, match="there is no run below"): pages.index(made.root)
