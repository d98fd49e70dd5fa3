"The committed runs: one layout, with the numbers that they had before they were moved into it."
import importlib, json, re, shutil, sys
from pathlib import Path

import pytest

from m2mkd.core import read_json, sha256, write_json
from m2mkd.folder import Folder
from m2mkd.lock import owned

root = Path(__file__).resolve().parents[1]
runs, frozen = root/"runs", root/"tests/frozen"
MICRO = runs/"nac_tiny_imagenet/micro"

sys.path.insert(0, str(root/"tools"))
move = importlib.import_module("move")


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
