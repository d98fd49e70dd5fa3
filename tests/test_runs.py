"The committed runs: one layout, with the numbers that they had before they were moved into it."
import importlib, json, re, shutil, sys
from pathlib import Path

import numpy as np
import pytest

from m2mkd.core import read_json, sha256, write_json
from m2mkd.folder import Folder
from m2mkd.lock import owned
from m2mkd.stage import stages_in
from m2mkd.study import Study

root = Path(__file__).resolve().parents[1]
runs, frozen = root/"runs", root/"tests/frozen"
MICRO = runs/"nac_tiny_imagenet/micro"

sys.path.insert(0, str(root/"tools"))
move, facts = (importlib.import_module(name) for name in ("move", "facts"))


def stages(folder): return sorted(p.parent for p in Path(folder).rglob("stages/*/settings.json"))


# --- the layout ---

def test_every_run_is_an_experiment_and_a_study():
    studies = sorted(p.relative_to(runs) for p in runs.glob("*/*") if p.is_dir())
    assert len(studies) == 7 and all((runs/s/"notebook.ipynb").exists() for s in studies)
    for file in runs.rglob("done.json"):
        experiment, study, kind, name, _ = file.relative_to(runs).parts
        assert kind == "stages" and Path(experiment, study) in studies
        done = read_json(file)
        assert name == f"{done['name']}-s{done['seed']}-{done['hash']}"
        assert type(done["seed"]) is int


def test_a_second_move_changes_nothing(): assert move.plan(runs)[0] == []


def test_names_and_hashes_are_those_of_before():
    "tests/frozen/stages.json named them `<name>-<hash>` until the move; the seed came between."
    kept = json.loads((frozen/"stages.json").read_text())
    assert sorted(kept) == sorted(p.name for p in stages(runs)) and len(kept) == 290
    for path in stages(runs):
        name, seed, digest = re.fullmatch(r"(.+)-s(\d+)-([0-9a-f]{12})", path.name).groups()
        done, record = read_json(path/"done.json"), read_json(path/"settings.json")
        assert (name, int(seed), digest) == (done["name"], done["seed"], done["hash"])
        if "module" in record: assert record["seed"] == done["seed"]


def test_no_file_of_a_stage_has_changed():
    for path in stages(runs):
        done = Folder(path).mark()
        for name, wanted in done["sums"].items():
            if name in ("model.safetensors", "done.json"): continue
            assert sha256(path/name) == wanted, path


def test_health_tables_say_whose_they_are():
    "The roles stand in the order of the record's inputs; the seed is that of the last model."
    found = {p.name.rpartition("-")[2]: p for p in stages(runs)}
    tables = [p for p in stages(runs) if p.name.startswith("hybrids-")]
    for path in tables:
        done, inputs = read_json(path/"done.json"), read_json(path/"settings.json")["inputs"]
        names = [read_json(found[h]/"settings.json")["name"] for h in inputs]
        roles = [done["of"][role] for role in ("meta", "teacher", "students")]
        assert list(dict.fromkeys(names)) == [r for r in roles if r], path
        assert done["seed"] == read_json(found[inputs[-1]]/"settings.json")["seed"]
        assert ("student" in done["results"]["hybrids"][0]) == (roles[2] is not None)
    assert len(tables) == 37


# --- the numbers ---

STUDIES = sorted(p.stem for p in (frozen/"results").glob("*.json"))


@pytest.fixture(scope="module", params=STUDIES)
def both(request):
    "A study as it is read today, and the content of its results.json before the move."
    experiment, name = next(p.parts[-2:] for p in runs.glob("*/*")
                            if "_".join(p.parts[-2:]) == request.param)
    return Study.read(runs/experiment/name), read_json(frozen/f"results/{request.param}.json")


def close(a, b): return a == pytest.approx(b, rel=1e-12, abs=1e-12)


def rows(table, **where):
    for key, value in where.items(): table = table[table[key] == value]
    return table.to_dict("records")


def test_each_arm_and_seed_has_the_numbers_of_before(both):
    study, before = both
    table = study.per_seed().assign(tflop=lambda t: t.trained / 1e12)
    keys = [*study.factors, "arm", "seed"]
    found = rows(table)
    assert [{k: r[k] for k in keys} for r in before["arms"]] == [
        {k: r[k] for k in keys} for r in found[:len(before["arms"])]]
    for row, now in zip(before["arms"], found):
        for key in row.keys() - {*keys}: assert close(now[key], row[key]), (row, now)
    control = [("E2E, equal compute", 0)] if study.experiment == "nac_tiny_imagenet" else []
    assert [(r["arm"], r["seed"]) for r in found[len(before["arms"]):]] == control


def test_means_are_those_of_before(both):
    study, before = both
    for row in rows(study.table()):
        its = {k: row[k] for k in (*study.factors, "arm")}
        old = [r for r in before["arms"] if its.items() <= r.items()]
        if not old: continue
        assert row["n"] == len(old) == 3
        for now, then in (("mean", "top1"), ("start", "start"), ("epochs", "epochs"),
                          ("trained", "tflop"), ("seconds", "seconds")):
            if then in old[0]: assert close(row[now], np.mean([r[then] for r in old]))
        assert close(row["sd"], np.std([r["top1"] for r in old], ddof=1))


def compared(study):
    "Rows of differences, each with the names that the old file gave it."
    if study.experiment == "vmoe_tiny_imagenet": return rows(study.differences())
    if study.experiment == "nac_tiny_imagenet":
        return rows(study.differences(only=["m2mKD"], mean_over="prior"))
    def named(row, **of): return {k: f"{r['routing']} {r['arm']}" for k, r in
                                  (("model", row), ("against", row | of))} | row_of(row)
    def row_of(row): return {k: v for k, v in row.items() if k != "against"}
    arms = rows(study.differences(along="routing", baseline="plain"))
    return ([named(r, routing="plain") for r in arms]
            + [named(r, arm="E2E") for r in rows(study.differences())])


def test_differences_and_intervals_are_those_of_before(both):
    "Means, t-intervals over seeds, bootstrap intervals over images, in the order of before or not."
    study, before = both
    now = compared(study)
    names = before["differences"][0].keys() - {"difference", "t_low", "t_high", "bootstrap_low",
                                               "bootstrap_high"}
    for row in before["differences"]:
        (found,) = [r for r in now if all(r[k] == row[k] for k in names)]
        for key in row.keys() - names: assert close(found[key], row[key]), (key, row, found)
    assert len(now) == len(before["differences"])


def test_tables_beside_the_arms_are_those_of_before(both):
    study, before = both
    for name in before.keys() - {"arms", "differences", "hybrids"}:
        for row, now in zip(before[name], rows(study[name]), strict=True):
            for key, value in row.items():
                assert now[key] == value or close(now[key], value) or value != value != now[key]
    for seed, table in before.get("hybrids", {}).items():
        for row, now in zip(table, rows(study["hybrids"], seed=int(seed)), strict=True):
            assert {k: now[k] for k in row} == row
            held = rows(study.health(), seed=int(seed), module=row["module"], stage="distill")
            assert [{k: r[k] for k in row} for r in held] == [row]


# --- what was added ---

def test_teachers_passes_are_a_part_of_every_module_that_had_one():
    n = 0
    for folder in sorted(p.parent for p in runs.rglob("stages")):
        for s in stages_in(folder).values():
            assert ("teacher_flops" in s.done) == (s.teacher is not None), s.path
            if s.teacher is None: continue
            assert 0 < s.teacher_flops < s.flops and "teacher_flops" in s.done["added"]
            n += 1
    assert n == 100


@pytest.mark.parametrize("study, name, index", [
    ("nac_tiny_imagenet/micro", "distill-0-s0", 0), ("vmoe_tiny_imagenet/transfer", "fit-0-s0", 0)])
def test_teachers_passes_are_what_is_counted(study, name, index):
    "For NAC the code of its time (commit bd510c6) counts the same 150,716,448,768."
    (path,) = (runs/study/"stages").glob(f"{name}-*")
    by_module = {s.settings["module"]: s for s in stages_in(runs/study).values()
                 if {**s.settings, "module": 0} == read_json(path/"settings.json")}
    its, both = facts.teacher_flops([by_module[i] for i in sorted(by_module)])
    assert its == by_module[0].teacher_flops
    if name.startswith("fit"): assert both == by_module[0].flops


def test_predictions_and_labels_give_the_recorded_accuracy():
    "Each set of labels has as many images of every class in a split."
    n = 0
    for folder in sorted(p.parent for p in runs.rglob("stages")):
        for s in stages_in(folder).values():
            if not (s.path/"predictions.json").exists(): continue
            assert abs(s.correct().mean() - s.results["top1"]) < 1e-6
            assert len(set(np.bincount(s.labels()))) == 1 and len(s.labels()) == s.results["images"]
            n += 1
    assert n == 114


def test_settings_name_question_parameters_and_origin():
    for folder in runs.glob("*/*"):
        said = read_json(folder/"settings.json")
        assert [said["experiment"], said["study"]] == [*folder.parts[-2:]]
        assert said["question"] and len(said["commit"]) == 40 and said["environment"]
        assert said["parameters"]["smoke"] is False
        notebook = (folder/"notebook.ipynb").read_text()
        assert said["question"][:40] in notebook and "injected-parameters" in notebook
        tables = read_json(folder/"results.json")["tables"]
        assert read_json(folder/"results.json")["main"] and isinstance(tables, dict)
    transfer = read_json(runs/"vmoe_tiny_imagenet/transfer/settings.json")["parameters"]
    assert transfer["epochs_finetune"] == [24, 6] and transfer["top_k"] == 2


def test_graphs_have_the_links_of_their_titles():
    "The numbers in the titles of the figure that they were read back from."
    counts = {"scale-free": [60, 57, 57], "planted-partition": [169, 112, 112],
              "ring-of-cliques": [116, 113, 109], "erdos-renyi": [53, 51, 53]}
    found = read_json(MICRO/"graphs.json")
    assert found["nodes"] == 32 and "60d1452" in found["source"]
    for prior, wanted in counts.items():
        its = [g for g in found["graphs"] if g["prior"] == prior]
        assert [g["when"] for g in its] == ["before", "E2E", "m2mKD"]
        assert [len(g["links"]) for g in its] == wanted
        assert all(0 <= a < b < 32 and 0.39 < p < 1 for g in its for a, b, p in g["links"])


# --- the script, on a folder of the time before ---

def before(place, study=MICRO):
    "The study's stages flat in `place`, with the names of before; health tables without a seed."
    for path in stages(study):
        record, done = read_json(path/"settings.json"), read_json(path/"done.json")
        to = place/f"{done['name']}-{done['hash']}"
        shutil.copytree(path, to)
        if "module" not in record:
            done["seed"] = None
            write_json(to/"done.json", {k: v for k, v in done.items() if k != "of"})
    return place


def moved(folder): return move.apply(*move.plan(folder))


def told(folder, *parts, kind=ValueError):
    "The one sentence of a folder that is not moved, and that nothing moved."
    was = sorted(map(str, Path(folder).rglob("*")))
    with pytest.raises(kind) as e: move.plan(folder)
    assert all(p in str(e.value) for p in parts) and "\n" not in str(e.value), e.value
    assert was == sorted(map(str, Path(folder).rglob("*")))


def test_an_old_runs_folder_becomes_the_new_one(tmp_path):
    "Of the project's own experiments and of others; stopped stages go along with their checkpoint."
    before(tmp_path/"nac_tiny_imagenet/micro")
    for name in ("micro.ipynb", "control.ipynb"): write_json(tmp_path/"nac_tiny_imagenet"/name, {})
    before(tmp_path/"vmoe_routing", runs/"vmoe_routing/three_routings")
    write_json(tmp_path/"vmoe_routing/results.json", {})
    before(tmp_path/"mine", MICRO)        # not in ours: it stays where it is
    stopped = next((tmp_path/"mine").glob("E2E_long*"))
    (stopped/"done.json").unlink(), (stopped/"checkpoint.pt").write_text("")
    assert moved(tmp_path) == 5 + 11 + 5 and move.plan(tmp_path)[0] == []
    for folder, study in (("nac_tiny_imagenet/micro", MICRO), ("mine", MICRO),
                          ("vmoe_routing/three_routings", runs/"vmoe_routing/three_routings")):
        assert [p.name for p in stages(tmp_path/folder)] == [p.name for p in stages(study)]
    assert sorted(p.name for p in (tmp_path/"nac_tiny_imagenet").iterdir()) == ["micro"]
    assert sorted(p.name for p in (tmp_path/"vmoe_routing").iterdir()) == ["three_routings"]
    assert len(list(tmp_path.glob("mine/stages/E2E_long*-s0-*/checkpoint.pt"))) == 1
    for path in stages(tmp_path/"nac_tiny_imagenet"):
        there, here = read_json(MICRO/"stages"/path.name/"done.json"), read_json(path/"done.json")
        assert here.items() <= there.items()


def test_a_sum_of_done_json_stays_its_own(tmp_path):
    before(tmp_path)
    path = next(tmp_path.glob("hybrids-*"))
    Folder(path).finish(results=read_json(path/"done.json")["results"])
    moved(tmp_path)
    (path,) = tmp_path.glob(f"stages/hybrids-s*-{path.name.rpartition('-')[2]}")
    done = Folder(path).mark()
    assert done["of"]["meta"] == "meta" and "done.json" in done["sums"]


def test_what_is_not_understood_is_named_and_nothing_moves(tmp_path):
    told(tmp_path/"nowhere", "there is no folder", kind=FileNotFoundError)
    study = before(tmp_path/"study")
    (study/"notes").mkdir()
    told(tmp_path, "notes", "neither a stage nor")
    (study/"notes").rmdir()
    write_json(study/"other/settings.json", {"training": {}})
    told(tmp_path, "other is no stage of a Lab")
    shutil.rmtree(study/"other")
    teacher = next(study.glob("teacher-*"))
    teacher.rename(study/"teacher-000000000000")
    told(tmp_path, "teacher-000000000000", "should be called teacher-")
    (study/"teacher-000000000000").rename(teacher)
    shutil.copytree(teacher, study/"stages"/teacher.name)
    told(tmp_path, "more than one thing would be")
    shutil.rmtree(study/"stages")
    with owned(teacher): told(tmp_path, teacher.name, "is in the making: process")
    shutil.rmtree(teacher)
    told(tmp_path, "hybrids-", "was built from", teacher.name[-12:], "which is not below")


# --- the script that adds facts, on a study that has none ---

def test_old_results_become_the_committed_ones(tmp_path):
    "The stage of each arm and seed is found by the records; once done, nothing more is."
    folder = tmp_path/"nac_tiny_imagenet/micro"
    shutil.copytree(MICRO, folder)
    (folder/"settings.json").unlink()
    shutil.copy(frozen/"results/nac_tiny_imagenet_micro.json", folder/"results.json")
    assert facts.add_results(folder, list(stages_in(folder).values()))
    for name in ("settings.json", "results.json"):
        assert read_json(folder/name) == read_json(MICRO/name)
    stages = list(stages_in(folder).values())
    assert not facts.add_results(folder, stages) and not facts.add_teacher_flops(stages)
    assert facts.add_labels(folder, stages) == 0


def test_numbers_that_are_not_the_recorded_ones_are_named(tmp_path):
    folder = tmp_path/"nac_tiny_imagenet/micro"
    shutil.copytree(MICRO, folder)
    stages = list(stages_in(folder).values())
    old = read_json(frozen/"results/nac_tiny_imagenet_micro.json")
    old["arms"][3]["top1"] += 1e-9
    write_json(folder/"results.json", old)
    with pytest.raises(ValueError, match="says top1 = .* of m2mKD_scale-free-s1-"):
        facts.add_results(folder, stages)
    (labels,) = (folder/"labels").iterdir()
    write_json(labels, read_json(labels)[::-1])
    with pytest.raises(ValueError, match="of its predictions are right by"):
        facts.add_labels(folder, stages)
    assert facts.cells_of(facts.nac, stages).keys() == {
        (("arm", r["arm"]), ("prior", r["prior"]), ("seed", r["seed"]))
        for r in read_json(MICRO/"results.json")["arms"]}
