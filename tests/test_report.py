"What a figure shows and says: the numbers of the study, units, seeds, data; and nothing over data."
import re
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from m2mkd import report
from m2mkd.report import alt_of, curves, intervals, lines, points, save, shown
from m2mkd.study import Study

root = Path(__file__).resolve().parents[1]
COMMITTED = ("vmoe_tiny_imagenet/transfer", "vmoe_tiny_imagenet/one_set", "nac_tiny_imagenet/micro",
             "vmoe_routing/three_routings")


@pytest.fixture(scope="module", params=COMMITTED)
def study(request): return Study.read(root/"runs"/request.param)


def made_up(ends, epochs=4, before=2.0, **more):
    "A study of {arm: top-1 by seed}; the first arm is the baseline, the others paid `before` TFLOP."
    arms, several = list(ends), isinstance(epochs, dict)
    of = epochs if several else dict.fromkeys(arms, epochs)
    paid = {arm: 0 if arm == arms[0] else before for arm in arms}
    rows = [dict(arm=arm, seed=seed, epoch=e, tflop=paid[arm] + e, top1=0.1 + (top1 - 0.1) * e / of[arm])
            for arm, tops in ends.items() for seed, top1 in enumerate(tops) for e in range(of[arm] + 1)]
    curve = pd.DataFrame(rows)
    last = curve.groupby(["arm", "seed"], sort=False).last().reset_index()
    return SimpleNamespace(name="made_up", data="toys", baseline=arms[0], arms=arms, keys=("arm", "seed"),
                           curves=lambda: curve, per_seed=lambda: last.assign(trained=last.tflop * 1e12),
                           **more)


def texts(fig): return [t.get_text() for t in fig.findobj(plt.Text) if t.get_text() and t.get_visible()]

def said(fig): return "\n".join(texts(fig))

def line_of(ax, style):
    "The points of the line in a panel that is drawn in a style."
    mine = [line for line in ax.lines if line.get_color() == style["color"] and len(line.get_xdata()) > 1
            and line.get_marker() == style["marker"]]
    return mine[0].get_xdata(), mine[0].get_ydata()

def boxes(artists): return [a.get_window_extent() for a in artists]

def clash(a, b): return min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1


# --- numbers ---

def test_the_whisker_is_students_and_percent():
    "20, 22, 24 %: mean 22, sd 2, and t(2, 0.975) = 4.302653 by any table."
    ax = intervals(made_up({"E2E": [0.20, 0.22, 0.24], "ours": [0.3, 0.3, 0.3]})).axes[0]
    ends = sorted(ax.collections[0].get_segments()[0][:, 0])
    np.testing.assert_allclose(ends, 22 + np.array([-1, 1]) * 4.302653 * 2 / 3**0.5, rtol=1e-6)
    dots = [line for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata()) == 3]
    np.testing.assert_allclose(dots[0].get_xdata(), [20, 22, 24])

def test_the_band_is_students():
    fig = curves(made_up({"E2E": [0.1] * 3, "ours": [0.20, 0.22, 0.24]}))
    band = [c for c in fig.axes[0].collections if hasattr(c, "get_paths") and len(c.get_paths()[0]) > 6][-1]
    ys = band.get_paths()[0].vertices
    last = sorted(set(ys[np.isclose(ys[:, 0], 6), 1].round(4)))
    np.testing.assert_allclose(last, [22 - 4.9683, 22 + 4.9683], atol=2e-4)

def test_curves_end_where_the_study_says(study):
    "Over total compute: an arm's last point is what it cost in all, and its accuracy in percent."
    arm = study.arms[1]
    fig, table = curves(study, arms=[arm]), study.table()
    table = table[table.arm == arm].reset_index()
    assert len(fig.axes) == len(table)
    for ax, row in zip(fig.axes, table.to_dict("records")):
        x, y = line_of(ax, report.ARM)
        assert x[-1] == pytest.approx(row["trained"], rel=1e-9) and y[-1] == pytest.approx(100 * row["mean"])
        assert ax.get_xscale() == "log" and ax.get_xlim()[1] > row["trained"]

def test_an_arm_begins_where_it_has_paid():
    fig = curves(made_up({"E2E": [0.2], "ours": [0.3]}))
    (x, _), (base, _) = (line_of(fig.axes[0], s) for s in (report.ARM, report.BASES[0]))
    assert list(x) == [2, 3, 4, 5, 6] and list(base) == [1, 2, 3, 4]       # 0 TFLOP has no logarithm
    dotted = [line for line in fig.axes[0].lines if line.get_linestyle() == ":" and len(line.get_xdata()) == 2]
    assert [list(line.get_xdata()) for line in dotted] == [[1, 2]]

def test_only_epochs_that_all_seeds_have_are_averaged():
    made = made_up({"E2E": [0.2, 0.2], "ours": [0.3, 0.5]})
    cut = made.curves().query("not (arm == 'ours' and seed == 1 and epoch > 2)")
    made.curves = lambda: cut
    x, y = line_of(curves(made).axes[0], report.ARM)
    assert list(x) == [2, 3, 4] and y[-1] == pytest.approx(25)


# --- words ---

def test_a_figure_says_units_seeds_data_and_what_the_band_is(study):
    for fig in (curves(study, arms=study.arms[1:2]), intervals(study)):
        words = said(fig)
        assert "3 seeds" in words and study.data[1:] in words and "95 % t-interval over seeds" in words
        assert "top-1 accuracy (%)" in words and "TFLOP" in words
        assert not [t for t in texts(fig) if re.fullmatch(r"[a-z]+\d|[a-z]+(_[a-z0-9]+)+|tflop", t)]

def nac_without(nac, prior):
    "The study with one seed of m2mKD at one prior."
    rows = nac.per_seed()
    rows = rows[~((rows.prior == prior) & (rows.arm == "m2mKD") & (rows.seed > 0))]
    return SimpleNamespace(keys=nac.keys, baseline=nac.baseline, data=nac.data, per_seed=lambda: rows)

def test_fewer_seeds_of_an_arm_are_said():
    nac = Study.read(root/"runs/nac_tiny_imagenet/micro")
    assert "3 seeds (E2E, equal compute: 1)" in said(intervals(nac))
    assert "3 seeds (m2mKD: 1 to 3)" in said(intervals(nac_without(nac, "ring-of-cliques"), arms=["m2mKD"]))
    assert "1 seed; no interval" in said(curves(made_up({"E2E": [0.2], "ours": [0.3]})))

def test_a_level_that_is_the_only_one_is_said_once():
    transfer = Study.read(root/"runs/vmoe_tiny_imagenet/transfer")
    assert "50 images a class; 3 seeds" in said(intervals(transfer, arms=["m2mKD"], images=50))
    one = Study.read(root/"runs/vmoe_tiny_imagenet/one_set")
    assert said(curves(one, arms=["m2mKD"])).count("400 images a class") == 1

def test_nothing_covers_anything(study):
    "Legend, head, titles and numbers lie beside the panels, beside each other, and inside the figure."
    for fig in (curves(study), intervals(study)):
        FigureCanvasAgg(fig).draw()
        panels = boxes([ax.patch for ax in fig.axes])
        beside = boxes([*fig.legends, *fig.texts, *(ax._left_title for ax in fig.axes),
                        *(t for ax in fig.axes for t in ax.texts)])
        beside = [b for b in beside if b.width > 1]
        assert not [1 for a in beside for b in panels if clash(a, b)]
        assert not [1 for i, a in enumerate(beside) for b in beside[:i] if clash(a, b)]
        assert all(b.x0 >= 0 and b.x1 <= fig.bbox.x1 + 1 and b.y1 <= fig.bbox.y1 for b in beside)
        assert fig.get_figwidth() * 96 < 850

def test_gray_is_enough(): assert len({(s["marker"], str(s["linestyle"])) for s in report.STYLES}) == 8


# --- what is asked ---

@pytest.mark.parametrize("asked,message", [
    (dict(x="epoch"), "arms differ in epochs \\(E2E 2, ours 4, third 4\\)"), (dict(arms=["mine"]), "unknown arm 'mine'"),
    (dict(against="mine"), "unknown arm 'mine'"), (dict(against=["E2E", "ours", "third"]), "against 3 arms"),
    (dict(y="top2"), "unknown column 'top2'"), (dict(prior="ring"), "unknown factor of this study 'prior'"),
    (dict(arms=["E2E"]), "no arm besides E2E")])
def test_what_cannot_be_drawn_is_said(asked, message):
    made = made_up({"E2E": [0.2], "ours": [0.3], "third": [0.3]}, epochs={"E2E": 2, "ours": 4, "third": 4})
    with pytest.raises(ValueError, match=message): curves(made, **asked)

def test_levels_are_never_averaged():
    transfer = Study.read(root/"runs/vmoe_tiny_imagenet/transfer")
    for draw in (curves, intervals):
        with pytest.raises(ValueError, match="images has the levels 50, 400"): draw(transfer, panels=[])
        with pytest.raises(ValueError, match="unknown images '60'"): draw(transfer, images=60)
    assert len(intervals(transfer, panels=[], images=400).axes) == 1

def test_epochs_where_all_arms_have_equal_ones():
    routing = Study.read(root/"runs/vmoe_routing/three_routings")
    fig = curves(routing, x="epoch", routing="plain")
    assert fig.axes[0].get_xscale() == "linear" and "epoch of fine-tuning" in said(fig)

def test_two_arms_in_every_panel():
    transfer = Study.read(root/"runs/vmoe_tiny_imagenet/transfer")
    fig = curves(transfer, arms=["m2mKD"], against=["E2E", "E2E, equal compute"])
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["m2mKD", "E2E", "E2E, equal compute"]
    assert [ax.get_title("left") for ax in fig.axes] == ["50 images a class", "400 images a class"]


# --- any table ---

TABLE = pd.DataFrame([dict(work=w, path=p, threads=t, ratio=r + t / 10, size=s)
                      for w in ("step", "layer") for p, r in (("ours", 0.8), ("plain", 1.0))
                      for t in (1, 2) for s in (1, 100)])

def test_lines_and_points_of_a_table():
    fig = lines(TABLE, "size", "ratio", hue="path", panel=["work", "threads"], log="x", mark=1,
                labels={"ratio": "times torch's", "threads": "{} threads", "work": "{}"})
    assert len(fig.axes) == 4 and fig.axes[0].get_title("left") == "step, 1 threads"
    assert fig.axes[0].get_xscale() == "log" and fig.axes[0].get_ylabel() == "times torch's"
    fig = points(TABLE, "ratio", "work", hue="path", panel="threads", share=False)
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["step", "layer"]
    with pytest.raises(ValueError, match="unknown column 'route'"): lines(TABLE, "size", "ratio", hue="route")
    with pytest.raises(ValueError, match="no row has a number for size and ratio"):
        lines(TABLE.assign(ratio=float("nan")), "size", "ratio")

def test_a_legend_of_many_stays_inside():
    many = pd.DataFrame([dict(x=x, y=x + i, path=f"a path of some length, {i}") for x in (1, 2) for i in range(9)])
    fig = lines(many[many.path != "a path of some length, 8"], "x", "y", hue="path")
    FigureCanvasAgg(fig).draw()
    legend, panel = boxes([fig.legends[0], fig.axes[0].patch])
    assert legend.x1 < fig.bbox.x1 and not clash(legend, panel) and not clash(legend, boxes(fig.texts)[0])
    with pytest.raises(ValueError, match="path has 9 levels, and 8 can be told apart"):
        lines(many, "x", "y", hue="path")

def test_a_table_is_shown():
    table = shown(pd.DataFrame({"p": [0.12345, None], "a": ["<i>", "[x](y/z.md)"]}, index=pd.Index([1, 2], name="k")), 2)
    assert table.markdown.splitlines()[2:] == ["|   1 | 0.12 | <i>         |", "|   2 |      | [x](y/z.md) |"]
    html = table._repr_html_()
    assert "&lt;i&gt;" in html and '<a href="y/z.md">x</a>' in html and "nan" not in html.lower()
    assert html.count("text-align: right") == 6 and str(table) == table._repr_markdown_() == table.markdown


# --- files ---

def test_a_saved_figure_is_the_same_anywhere(tmp_path):
    made, alt = made_up({"E2E": [0.2, 0.21], "ours": [0.3, 0.33]}), 'ours < E2E & "both"\n rise'
    one = save(curves(made), tmp_path/"figures"/"a.svg", alt=alt).read_bytes()
    with plt.rc_context({"font.family": "serif", "font.size": 20, "axes.grid": False, "savefig.dpi": 30}):
        assert save(curves(made), tmp_path/"b.svg", alt=alt).read_bytes() == one
        png = save(curves(made), tmp_path/"b.png").read_bytes()
    assert save(curves(made), tmp_path/"a.png").read_bytes() == png
    assert alt_of(tmp_path/"b.svg") == 'ours < E2E & "both" rise'
    assert not plt.get_fignums(), "pyplot would show it twice"

def test_a_picture_without_words(tmp_path):
    fig = intervals(made_up({"E2E": [0.2], "ours": [0.3]}))
    with pytest.raises(ValueError, match="a.svg has no alternative text"): save(fig, tmp_path/"figures"/"a.svg", alt=" ")
    assert not list(tmp_path.rglob("*.svg"))
    with pytest.raises(ValueError, match="has no alternative text"): alt_of(save(fig, tmp_path/"a.svg"))
    with pytest.raises(FileNotFoundError): alt_of(tmp_path/"b.svg")
