"""Laws of the figures: nothing overlaps, nothing is empty, the same runs give the same bytes."""

import json

import compare
import figures
import matplotlib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from published_logs import Facts, family_1471, system_1090, system_1392, write

import logs  # isort: skip  (a folder logs/, which runs leave, would change its place)


@pytest.fixture
def drawn(monkeypatch):
    """Keep the figures that are saved, besides saving them."""
    kept, save = [], figures.save
    monkeypatch.setattr(figures, "save", lambda figure, path: (kept.append(figure),
                                                              save(figure, path))[1])
    return kept


def runs_of(folder, count, form=family_1471):
    folder.mkdir(exist_ok=True)
    return [logs.read_run(write(folder / f"{form.__name__}{i}.log",
                                form(Facts(seed=i, steps=4900 + 9 * i, sliding=1.087 + i * 2e-4))))
            for i in range(count)]


def check(figure):
    """Check that texts are apart and inside the figure, and that every panel shows something."""
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    texts = [t for t in figure.findobj(matplotlib.text.Text) if t.get_visible() and t.get_text()]
    # tick labels outside a panel's limits exist, but are not drawn
    ticks = [(tick, *sorted(axis.get_view_interval())) for axes in figure.axes
             for axis in (axes.xaxis, axes.yaxis) for tick in axis.get_major_ticks()]
    hidden = {id(tick.label1) for tick, low, high in ticks if not low <= tick.get_loc() <= high}
    boxes = [(t.get_text(), matplotlib.text.Text.get_window_extent(t, renderer)) for t in texts
             if id(t) not in hidden]
    width, height = figure.canvas.get_width_height()
    for i, (text, box) in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
        for other, there in boxes[:i]:
            apart = box.x1 <= there.x0 or there.x1 <= box.x0 or box.y1 <= there.y0 \
                or there.y1 <= box.y0
            assert apart, (text, other)
    assert figure.axes
    for axes in figure.axes:
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        shown = [(x, y) for line in axes.get_lines() if line.get_transform() == axes.transData
                 for x, y in zip(line.get_xdata(), line.get_ydata())]
        assert any(left <= x <= right and low <= y <= high for x, y in shown), axes.get_title()


@pytest.mark.parametrize("count", [1, 3, 12])
def test_figures_of_one_group_are_readable(count, tmp_path, drawn):
    runs = runs_of(tmp_path, count)
    paths = figures.draw_comparison({"submission": runs}, tmp_path / "figure.png", "a title")
    assert [path.name for path in paths] == ["figure.png", "figure.svg"]
    assert len(drawn[0].axes) == 7  # loss and bpb against three quantities; the scores
    check(drawn[0])


@pytest.mark.parametrize("sizes", [(1, 1), (3, 3), (6, 6)])
def test_figures_of_two_groups_are_readable(sizes, tmp_path, drawn):
    groups = {"a deeper model of the same width": runs_of(tmp_path, sizes[0]),
              "old": runs_of(tmp_path, sizes[1], system_1392)}
    figures.draw_comparison(groups, tmp_path / "figure")
    check(drawn[0])


@pytest.mark.parametrize("form, switch", [(family_1471, 2000), (system_1392, 3000),
                                          (system_1090, None)])
def test_the_figure_of_a_run_names_what_its_log_lacks(form, switch, tmp_path, drawn):
    run = logs.read_run(write(tmp_path / "train.log", form(Facts(switch=switch))))
    figures.draw_run(run, tmp_path / "figure")
    check(drawn[0])
    footer = " ".join(text.get_text() for text in drawn[0].texts)
    assert "not in this log: matrix learning rate, gradient norm" in footer
    labels = [t.get_text() for t in drawn[0].findobj(matplotlib.text.Text)]
    assert ("recurrence from step 2,000" in labels) == (switch == 2000)


@pytest.mark.parametrize("norm", [0.01, 1, 1000])  # far below and far above where it is clipped
def test_the_figure_of_our_own_run_has_all_panels(norm, tiny_run, tmp_path, drawn):
    rows = [json.loads(line) for line in
            (tiny_run.folder / "events.jsonl").read_text().splitlines()]
    for row in rows:
        if row["event"] == "train":
            row["grad_norm"] = norm / row["step"]
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures.draw_run(logs.read_run(path), tmp_path / "figure")
    titles = [axes.get_title(loc="left") for axes in drawn[0].axes]
    assert titles == ["training loss, nats a token", "bits per byte", "matrix learning rate",
                      "gradient norm before clipping", "step time, ms"]
    check(drawn[0])


@pytest.mark.parametrize("kept", [0, 1])  # validations behind the first
def test_one_validation_is_a_row_not_an_empty_panel(kept, tmp_path, drawn):
    lines = family_1471(Facts())
    lines = [line for line in lines if " val_loss:" not in line or "post-ema" in line
             or "final_" in line or line.startswith(("0/", "4964/")[:1 + kept])]
    run = logs.read_run(write(tmp_path / "train.log", lines))
    assert len(run.validations) == 1 + kept
    figures.draw_run(run, tmp_path / "figure")
    titles = [axes.get_title(loc="left") for axes in drawn[0].axes]
    assert titles == ["training loss, nats a token", "step time, ms", "bits per byte"]
    figures.draw_comparison({"one": [run]}, tmp_path / "figure")
    assert not any("validation" in axes.get_title(loc="left") for axes in drawn[1].axes)
    for figure in drawn:
        check(figure)
        for axes in figure.axes[:-1]:  # what is drawn by step reaches over most of its panel
            low, high = axes.get_xlim()
            shown = [x for line in axes.get_lines() for x in line.get_xdata()
                     if line.get_transform() == axes.transData]
            assert max(shown) - min(shown) > 0.5 * (high - low)


def test_panels_without_numbers_are_left_out(tmp_path, drawn):
    lines = [line for line in family_1471(Facts()) if "train_batch_tokens" not in line]
    run = logs.read_run(write(tmp_path / "train.log", lines))
    figures.draw_comparison({"one": [run]}, tmp_path / "figure")  # no tokens; hardly a time
    assert "tokens" not in {axes.get_xlabel() for axes in drawn[0].axes}
    check(drawn[0])


def test_the_scores_drawn_are_those_that_were_compared(tmp_path, drawn):
    lines = [line.replace("final_int6_roundtrip", "final_storage") for line in family_1471(Facts())
             if "sliding_window val" not in line]
    runs = [logs.read_run(write(tmp_path / f"{i}.log", lines)) for i in range(2)]
    kind = compare.common_kind(runs)
    assert kind == "other"  # which no order of stages holds
    figures.draw_comparison({"one": runs}, tmp_path / "figure")
    assert figures.SCORE_NAMES[kind] in drawn[0].axes[-1].get_title(loc="left")
    check(drawn[0])


@pytest.mark.parametrize("value", ["None", "auto", "nan", "inf"])
def test_a_setting_that_is_no_number_spoils_no_figure(value, tmp_path, drawn):
    run = logs.read_run(write(tmp_path / "train.log", family_1471(Facts())))
    run.config.update(matrix_lr=value, grad_clip_norm=value)
    figures.draw_run(run, tmp_path / "figure")
    check(drawn[0])


def test_nothing_to_draw_is_an_error(tmp_path):
    run = logs.read_run(write(tmp_path / "train.log", family_1471(Facts())[:9]))
    for draw in (lambda: figures.draw_run(run, tmp_path / "f"),
                 lambda: figures.draw_comparison({"one": [run]}, tmp_path / "f")):
        with pytest.raises(logs.LogError, match="nothing to draw"):
            draw()


def test_the_same_runs_give_the_same_bytes(tmp_path):
    runs = runs_of(tmp_path, 2)
    first, second = (
        [path.read_bytes() for path in figures.draw_comparison({"x": runs}, tmp_path / name / "f")]
        for name in ("a", "b"))
    assert first == second and b"<dc:date>" not in first[1]


def luminance(colour):
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("colour", [*figures.COLOURS, figures.GREY])
def test_text_stands_out_from_its_opaque_white_ground(colour):
    assert figures.STYLE["savefig.facecolor"] == "white"
    assert 1.05 / (luminance(colour) + 0.05) >= 3


@settings(deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=12), st.floats(0.1, 8))
def test_labels_are_spread_in_order_within_their_panel(wanted, gap):
    placed = figures.spread(wanted, gap, 0, 100)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    steps = [placed[b] - placed[a] for a, b in zip(order, order[1:])]
    assert all(step >= gap - 1e-9 for step in steps)
    assert all(-1e-9 <= place <= 100 + 1e-9 for place in placed)
    if all(abs(a - b) >= gap for i, a in enumerate(wanted) for b in wanted[:i]):
        assert placed == pytest.approx(wanted)  # nothing moves without need
