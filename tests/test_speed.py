"""The benchmarks' notebooks, without torch: goals are computed from what was measured, and the
committed runs have the numbers that they had before."""
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from m2mkd.core import read_json
from m2mkd.pages import page
from m2mkd.results import BOUNDS, Results

root = Path(__file__).resolve().parents[1]
frozen = root/"tests/frozen/speed"
SPEED = "speed_nac", "speed_vmoe", "speed_products"

def shared(experiment):
    "What the cells define that are neither `make` nor `read`, less the parameters."
    cells = nbformat.read(root/f"nbs/experiments/{experiment}.ipynb", as_version=4).cells
    names = {}
    for cell in cells:
        if cell.cell_type != "code" or cell.metadata.get("tags"): continue
        if "parameters()" not in cell.source and "P." not in cell.source: exec(cell.source, names)
    return names


@pytest.fixture(scope="module", params=SPEED)
def run(request): return Results.read(root/"runs"/request.param/"cpu")


def close(a, b): return a == pytest.approx(b, rel=1e-12, abs=1e-12)


def reached(run, measured): return shared(run.experiment)["reached"](measured)


def test_goals_are_computed_from_what_was_measured(run):
    "The stored table is what the notebook makes of the stored measurements."
    table = reached(run, run["measured"])
    pd.testing.assert_frame_equal(table, run["goals"])
    assert list(table) == ["goal", "measured", "bound", "limit", "reached"] and len(table) > 1
    for _, row in table.iterrows():
        assert row.reached == ("yes" if BOUNDS[row.bound](row.measured, row.limit) else "no")


def test_no_goal_has_a_number_typed_in(run):
    "If ours took and kept twice as much, so would each row say; a limit is no measurement."
    measured, before = run["measured"], run["goals"]
    (arm,) = {"arm", "path"} & set(measured)
    ours = measured[arm] == "ours"
    slow = measured.copy()
    for name in {"forward", "step", "both", "seconds", "read_in"} & set(slow):
        slow[name] = slow[name] * (1 + ours)
    after = reached(run, slow)
    factor = after.measured / before.measured
    expected = before.bound.map({"at most": 2.0, "at least": 0.5})
    assert all(map(close, factor, expected)), after
    assert list(after.limit) == list(before.limit) and "no" in set(after.reached)


def test_the_committed_runs_have_the_numbers_of_before(run):
    old = read_json(frozen/f"{run.experiment}.json")["tables"]
    new = read_json(run.folder/"results.json")["tables"]
    for name in old.keys() - {"goals", "setup"}: assert new[name] == old[name]
    for row, now in zip(old.get("goals", []), new["goals"], strict="goals" in old):
        assert close(now["measured"], row.get("measured", row.get("measured, worst")))
        assert now["limit"] == row["at most"] and now["bound"] == "at most"


def test_the_main_number_is_a_measured_one_and_names_the_machine(run):
    old = read_json(frozen/f"{run.experiment}.json")["main"]
    assert run.main.startswith(old + " (") and "AVX-512" in run.main and "thread" in run.main
    assert run.main.split(" (")[1].split(" with ")[0] == run.environment["processor"]


def test_notebooks_say_machine_and_turns_beside_every_table_and_figure(run):
    "A figure's words and a table's line are made of what the record says."
    cells = nbformat.read(root/f"nbs/experiments/{run.experiment}.ipynb", as_version=4).cells
    read = [c.source for c in cells if c.metadata.get("tags") == ["read"]]
    shows = [s for s in read if "shown(" in s and "machine_table(" not in s]
    draws = [s for s in read if "save(figure" in s]
    assert len(shows) > 1 and draws
    for source in shows: assert source.count("print(said)") == source.count("shown("), source
    for source in draws:
        assert "{said}" in source or "{run.machine}" in source and "about=" in source, source
        assert "alt=alt" in source and "title=" in source


def test_the_page_names_columns_as_the_record_does(run):
    "Words of studies are not for them: `step` is none of fine-tuning, `arm` no pattern."
    said = page(run)
    assert run.main in said and "{}" not in said and "fine-tuning" not in said
    for name in run["measured"]: assert f" {name} " in said


# --- speed_distill: a case a row, an arm a column ---

def pairs_measured(**seconds):
    """What speed_distill would record where an arm takes so many `seconds` (else 1) and needs so
    many bytes at its peak."""
    cases = {"epoch": (("V-MoE, 48 px", 4), ("NAC, 48 px", 4), ("NAC, 48 px", 10)),
             "step": (("V-MoE", 2), ("V-MoE", 10), ("NAC", 10)), "stages": (("V-MoE", 3),)}
    arms = {"epoch": ("joint", "loop"), "step": ("joint", "one graph", "one pair"),
            "stages": ("one thread", "all threads", "processes")}
    recipes = {"epoch": ("light", "rich")}
    def row(what, model, modules, arm, recipe):
        took = seconds.get(arm.replace(" ", "_"), 1.0)
        return dict(what=what, model=model, modules=modules, classes=10, recipe=recipe, arm=arm,
                    seconds=took, peak=took if what == "step" else None)
    return pd.DataFrame([row(what, *case, arm, recipe) for what in cases for case in cases[what]
                         for arm in arms[what] for recipe in recipes.get(what, ["none"])])


def pairs_reached(measured): return shared("speed_distill")["reached"](measured)


def test_goals_of_distillation_are_ratios_of_what_was_measured():
    table = pairs_reached(pairs_measured(joint=2.0, one_graph=4.0, loop=3.0, all_threads=0.5,
                                         processes=0.25))
    assert list(table.measured) == [2.0, 0.5, 1.5, 1.5, 1.5, 1.5, 2.0]
    assert list(table.limit) == [1.5, 1.05, 1.8, 1.8, 1.5, 1.5, 1.6]
    assert list(table.reached) == ["no", "yes", "no", "no", "yes", "yes", "yes"]


def test_goals_of_distillation_take_the_worst_case_of_the_longest_chains():
    measured = pairs_measured(loop=2.0, processes=0.5)
    joint = (measured["what"] == "step") & (measured.arm == "joint")
    measured.loc[joint & (measured.modules == 2), ["seconds", "peak"]] = 9.0  # no goal for it
    assert list(pairs_reached(measured).measured) == [1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    measured.loc[joint & (measured.model == "NAC"), ["seconds", "peak"]] = 1.2
    assert list(pairs_reached(measured).measured[:2]) == [1.2, 1.2]


def test_speed_distill_says_machine_and_turns_beside_every_table_and_figure():
    cells = nbformat.read(root/"nbs/experiments/speed_distill.ipynb", as_version=4).cells
    read = [c.source for c in cells if c.metadata.get("tags") == ["read"]]
    shows = [s for s in read if "shown(" in s and "machine_table(" not in s]
    assert len(shows) == 7 and all(s.count("print(said)") == s.count("shown(") for s in shows)
    draws = [s for s in read if "save(figure" in s]
    assert len(draws) == 4 and all("{said}" in s and "alt=" in s for s in draws)
