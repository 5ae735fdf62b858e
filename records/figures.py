"""Figures of runs: how one run went, and how groups of runs compare.

PNG and SVG, dark on white (opaque, so that a dark page shows them too), in colours that all kinds
of colour vision tell apart; curves carry their names beside them instead of in a legend. The same
runs give the same bytes.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from compare import common_kind
from logs import LogError, Run
from summary import EARLY, name_of, names_of, setting, time_points

# After Okabe and Ito, each dark enough for text on white; yellow and sky blue are not.
COLOURS = ("#0072B2", "#D55E00", "#007F5F", "#B0518E", "#000000", "#8A5A00", "#7A7A7A")
GREY, RULE = "#555555", "#999999"
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 9, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.labelcolor": GREY,
    "xtick.color": GREY, "ytick.color": GREY, "axes.edgecolor": RULE, "figure.facecolor": "white",
    "savefig.facecolor": "white", "font.family": "DejaVu Sans", "svg.fonttype": "path",
    "svg.hashsalt": "records", "lines.linewidth": 1.3, "axes.formatter.useoffset": False}
DPI, LABEL_POINTS, LONGEST_NAME = 160, 8.0, 26
PANEL_INCHES = (3.6, 1.75)  # width, height of the framed area
HEAD, LEFT, ABOVE, BELOW = 0.36, 0.62, 0.36, 0.46  # room on top; around each panel, inches
MOST_POINTS = 300  # a longer curve is drawn as means of equal stretches
MOST_NAMED = 7  # so many runs can be told apart by colour
SCORE_NAMES = {"prequant": "EMA", "roundtrip": "packed", "prequant_sliding": "EMA, sliding",
               "sliding": "packed, sliding", "ttt": "test-time training", "slot": "slot",
               "ngram": "n-gram", "stream": "packed, stream", "other": "final"}


class Curve(NamedTuple):
    """One line of a panel: name, colour, points (x, y) in order, whether to mark each point."""

    name: str
    colour: str
    points: list[tuple[float, float]]
    marked: bool = False


class Panel(NamedTuple):
    """One framed picture. `marks`: (x, text) of vertical lines; text may be empty."""

    title: str
    x_label: str
    curves: list[Curve]
    labels: list[Curve]  # whose ends are named
    marks: Sequence[tuple[float, str]] = ()
    level: tuple[float, str] | None = None  # a horizontal line
    stepped: bool = False  # a point stands for the stretch since the one before


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return positions at least `gap` apart, in the same order, moved as little as may be.

    They stay within [low, high] as long as they fit there. Neighbours that would be too close
    share out their room around their common centre.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[tuple[float, list[int]]] = []  # (centre, members from below)

    def inside(centre: float, count: int) -> float:
        half = gap * (count - 1) / 2
        return max(low + half, min(high - half, centre))

    for i in order:
        centre, members = inside(wanted[i], 1), [i]
        while groups and centre - groups[-1][0] < gap * (len(members) + len(groups[-1][1])) / 2:
            other, more = groups.pop()
            centre = (centre * len(members) + other * len(more)) / (len(members) + len(more))
            members = more + members
            centre = inside(centre, len(members))
        groups.append((centre, members))
    placed = [0.0] * len(wanted)
    for centre, members in groups:
        for rank, i in enumerate(members):
            placed[i] = centre + gap * (rank - (len(members) - 1) / 2)
    return placed


def thinned(points: Sequence[tuple]) -> list[tuple]:
    """Return at most MOST_POINTS points: means of equally many neighbours, None where one is."""
    size = -(-len(points) // MOST_POINTS)
    parts = [points[i:i + size] for i in range(0, len(points), max(size, 1))]
    return [tuple(None if None in values else statistics.fmean(values) for values in zip(*part))
            for part in parts]


def label_ends(axes: Axes, curves: Sequence[Curve]) -> None:
    """Write each curve's name right of the panel at the height where it ends, none over another."""
    pixel, to_pixels = axes.figure.dpi / 72, axes.transData.transform
    (left, low), (right, high) = axes.transAxes.transform([(0, 0), (1, 1)])
    heights = [min(max(to_pixels(curve.points[-1])[1], low), high) for curve in curves]
    placed = spread(heights, 1.35 * LABEL_POINTS * pixel, low, high)
    for curve, height in zip(curves, placed):
        end = curve.points[-1]
        x, y = to_pixels(end)
        axes.annotate(
            curve.name[:LONGEST_NAME], end, ((right - x) / pixel + 12, (height - y) / pixel),
            textcoords="offset points", color=curve.colour, fontsize=LABEL_POINTS, va="center",
            ha="left", annotation_clip=False,
            arrowprops=dict(arrowstyle="-", color=curve.colour, lw=0.6, alpha=0.6,
                            shrinkA=1, shrinkB=2, relpos=(0, 0.5)))


def settled(curves: Sequence[Curve]) -> tuple[list[Curve], tuple[float, float]]:
    """Return curves and limits (bottom, top) without the fall in the run's first twentieth.

    Everything is kept where a line would be left with one point, or marks with none.
    """
    begin = EARLY * max(curve.points[-1][0] for curve in curves)
    later = [[(x, y) for x, y in curve.points if x >= begin] for curve in curves]
    if any(len(points) < (1 if curve.marked else min(2, len(curve.points)))
           for points, curve in zip(later, curves)):
        later = [curve.points for curve in curves]
    values = [y for points in later for _, y in points]
    low, high = min(values), max(values)
    room = max(0.08 * (high - low), 0.005 * abs(high))  # a flat curve is not blown up
    # marks far apart are joined by a line: it would enter steeply from nowhere
    shown = [curve._replace(points=points) if curve.marked else curve
             for curve, points in zip(curves, later)]
    return shown, (low - room, high + room)


def is_curve(curve: Curve) -> bool:
    """Return whether points show a course: one validation behind the first fall is none."""
    last = max((x for x, _ in curve.points), default=0)
    return sum(x >= EARLY * last for x, _ in curve.points) > 1


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Draw curves, lines and names into a placed panel."""
    curves, (low, high) = settled(panel.curves)
    if panel.level:
        low, high = (min(low, panel.level[0] - 0.05 * (high - panel.level[0])),
                     max(high, panel.level[0] + 0.15 * (panel.level[0] - low)))
    for curve in curves:
        few = len(curve.points) < 4
        axes.plot(*zip(*curve.points), color=curve.colour, markersize=3.5,
                  marker="o" if curve.marked or few else None, linestyle=":" if few else "-",
                  drawstyle="steps-pre" if panel.stepped else "default")
    ends = [x for curve in panel.curves for x, _ in curve.points]
    margin = 0.02 * (max(ends) - min(ends)) or 0.5
    axes.set(xlim=(min(ends) - margin, max(ends) + margin), ylim=(low, high))
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x_label)
    if panel.level:
        axes.axhline(panel.level[0], color=RULE, lw=0.8, ls=":")
        axes.annotate(panel.level[1], (0.99, panel.level[0]), (0, 2), fontsize=LABEL_POINTS,
                      xycoords=axes.get_yaxis_transform(), textcoords="offset points",
                      color=GREY, ha="right", va="bottom")
    for step, text in panel.marks:
        axes.axvline(step, color=RULE, lw=0.8, ls="--", zorder=0)
        left = step < sum(axes.get_xlim()) / 2
        axes.annotate(text, (step, 1), (3 if left else -3, -1), textcoords="offset points",
                      xycoords=axes.get_xaxis_transform(), fontsize=LABEL_POINTS, color=GREY,
                      ha="left" if left else "right", va="top")
    counted = panel.x_label in ("step", "tokens")
    axes.xaxis.set_major_locator(MaxNLocator(5, min_n_ticks=2, integer=counted))
    if counted:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(4, min_n_ticks=2))
    label_ends(axes, panel.labels)


def label_room(panels: Sequence[Panel], least: int) -> float:
    """Return the inches that the longest name, or so many digits, need beside panels."""
    names = [curve.name[:LONGEST_NAME] for panel in panels for curve in panel.labels]
    return 0.35 + 0.62 * LABEL_POINTS / 72 * max([least, *map(len, names)])


def draw_grid(panels: Sequence[Panel], title: str, footer: str = "",
              strip_inches: float = 0.0) -> tuple[Figure, Axes | None]:
    """Return a figure of panels in two columns; a last odd one is as wide as both.

    strip_inches: height of one more, wide panel below, which is returned empty.
    """
    (width, height), columns = PANEL_INCHES, min(2, len(panels) or 2)
    digits = 7 if strip_inches else 0
    cells = [LEFT + width + label_room(panels[i::2], digits) for i in range(columns)]
    wide_inches = sum(cells) - cells[-1] + width
    heights = [height] * -(-len(panels) // 2) + [strip_inches] * bool(strip_inches)
    foot = 0.2 if footer else 0.0
    whole = (sum(cells), HEAD + sum(tall + ABOVE + BELOW for tall in heights) + foot)
    figure = Figure(figsize=whole, dpi=DPI)
    FigureCanvasAgg(figure)

    def place(column: int, row: int, wide: bool) -> Axes:
        used = HEAD + sum(tall + ABOVE + BELOW for tall in heights[:row + 1]) - BELOW
        left, size = LEFT + sum(cells[:column]), wide_inches if wide else width
        return figure.add_axes((left / whole[0], 1 - used / whole[1], size / whole[0],
                                heights[row] / whole[1]))

    for i, panel in enumerate(panels):
        draw_panel(place(i % 2, i // 2, i % 2 == 0 and i == len(panels) - 1), panel)
    figure.text(LEFT / whole[0], 1 - 0.14 / whole[1], title, va="top", fontsize=11, weight="bold")
    figure.text(LEFT / whole[0], 0.1 / whole[1], footer, va="bottom", fontsize=LABEL_POINTS,
                color=GREY)
    return figure, place(0, len(heights) - 1, True) if strip_inches else None


def save(figure: Figure, path: Path) -> list[Path]:
    """Write PATH.png and PATH.svg (a suffix of either kind is dropped) and return both."""
    base = path.with_suffix("") if path.suffix in (".png", ".svg") else path
    base.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        written.append(base.with_name(base.name + suffix))
        figure.savefig(written[-1], metadata=metadata)
    return written


# What runs are drawn against: title, and the value of a train or validation point.
X_AXES = {"step": lambda point: point.step, "tokens": lambda point: point.tokens,
          "training time, s": lambda point: None if point.train_ms is None
          else point.train_ms / 1000}
# What is drawn: title, the run's series, its value, whether its points are marked.
Y_AXES = {"training loss, nats a token": (lambda run: run.train, "train_loss", False),
          "validation, bits per byte": (lambda run: run.validations, "val_bpb", True)}


def series(run: Run, x_name: str, y_name: str) -> list[tuple[float, float]]:
    """Return a run's points of one quantity against another; unknown ones are left out."""
    points_of, field, _ = Y_AXES[y_name]
    pairs = [(X_AXES[x_name](point), getattr(point, field)) for point in points_of(run)]
    return thinned([(x, y) for x, y in pairs if x is not None and y is not None])


def coloured(groups: Mapping[str, Sequence[Run]]) -> list[tuple[Run, str, str]]:
    """Return (run, colour, label) of all runs.

    A few runs of one group get a colour and a label each; otherwise a group shares a colour, and
    its first run carries the group's label.
    """
    (first, runs), *others = groups.items()
    if not others and len(runs) <= MOST_NAMED:
        return [(run, colour, name) for run, colour, name in zip(runs, COLOURS, names_of(runs))]
    found = []
    for (group, members), colour in zip(groups.items(), COLOURS):
        label = f"{group} ({len(members)} run{'s' * (len(members) > 1)})"
        found += [(run, colour, label if i == 0 else "") for i, run in enumerate(members)]
    return found


def draw_rows(axes: Axes, rows: Sequence[tuple[str, float, str]]) -> None:
    """Draw one row per (name, score, colour): the name, a dot at the score, its digits."""
    for i, (_, score, colour) in enumerate(rows):
        axes.plot([score], [-i], "o", color=colour, markersize=5, clip_on=False)
        axes.annotate(f"{score:.5f}", (1.01, -i), xycoords=axes.get_yaxis_transform(),
                      va="center", fontsize=LABEL_POINTS, color=colour)
    # names stand inside the panel's left edge, so that long ones need no room beside it
    low, high = min(score for _, score, _ in rows), max(score for _, score, _ in rows)
    axes.set_xlim(low - 0.35 * (high - low or 1e-3), high + 0.03 * (high - low or 1e-3))
    axes.set_yticks([])
    for i, (name, _, colour) in enumerate(rows):
        axes.annotate(name[:LONGEST_NAME], (0.005, -i), xycoords=axes.get_yaxis_transform(),
                      va="center", fontsize=LABEL_POINTS, color=colour,
                      bbox=dict(facecolor="white", edgecolor="none", pad=1))
        axes.axhline(-i, color="#DDDDDD", lw=0.6, zorder=0)
    axes.set_ylim(0.4 - len(rows), 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(6, min_n_ticks=2))


def draw_scores(axes: Axes, groups: Mapping[str, Sequence[Run]], colours: Sequence[str],
                kind: str) -> None:
    """Draw one row per run, and a line at a group's mean."""
    names = [f"{group} {name}" if len(groups) > 1 else name
             for group, runs in groups.items() for name in names_of(runs)]
    scores = [run.bpb(kind) or 0.0 for runs in groups.values() for run in runs]
    draw_rows(axes, list(zip(names, scores, colours)))
    first = 0
    for runs in groups.values():
        end = first + len(runs)
        if len(runs) > 1:
            mean = statistics.fmean(scores[first:end])
            axes.plot([mean, mean], [0.4 - first, 0.6 - end], lw=1, zorder=0,
                      color=colours[first] if len(groups) > 1 else RULE)
        first = end
    remark = "; line: mean" if len(scores) > len(groups) else ""
    axes.set_title(f"final score of each run ({SCORE_NAMES[kind]}), bits per byte{remark}")


def draw_comparison(groups: Mapping[str, Sequence[Run]], path: Path,
                    title: str = "") -> list[Path]:
    """Draw loss and bpb of groups of runs against steps, tokens and seconds; and final scores.

    Panels that no log has numbers for are left out. Returns the files written.
    Raises LogError when the logs hold nothing to draw.
    """
    with matplotlib.rc_context(STYLE):
        runs = coloured(groups)
        panels = []
        for x_name in X_AXES:
            for y_name, (_, _, marked) in Y_AXES.items():
                curves = [Curve(label, colour, points, marked) for run, colour, label in runs
                          if (points := series(run, x_name, y_name))]
                if any(is_curve(curve) for curve in curves):
                    named = [curve for curve in curves if curve.name]
                    panels.append(Panel(y_name, x_name, curves, named))
        try:
            kind = common_kind([run for run, _, _ in runs])
        except LogError:
            kind = None
        if not panels and kind is None:
            raise LogError(f"{runs[0][0].path}: nothing to draw: no losses by step, no scores")
        heading = title or " against ".join(groups)
        rows = 0.2 + 0.19 * len(runs) if kind else 0.0
        figure, strip = draw_grid(panels, heading, strip_inches=rows)
        if strip and kind:
            draw_scores(strip, groups, [colour for _, colour, _ in runs], kind)
        return save(figure, path)


def paces(run: Run) -> list[tuple[float, float]]:
    """Return (step, ms a step since the point before) of the training clock."""
    points = time_points(run)
    found = [(right, (right_ms - left_ms) / (right - left))
             for (left, left_ms), (right, right_ms) in zip(points, points[1:])]
    return thinned(found)


def score_curves(run: Run) -> list[Curve]:
    """Return validations by step, and the final scores where training ended."""
    points = series(run, "step", "validation, bits per byte")
    if points and points[-1][0] < EARLY * (run.steps or 0):
        points = []  # of a model that has not learnt yet
    curves = [Curve(f"live weights {points[-1][1]:.5f}", COLOURS[0], points, True)] if points \
        else []
    end = run.steps or (points[-1][0] if points else 0)
    for kind, colour in zip(SCORE_NAMES, itertools.cycle(COLOURS[1:])):
        if (bpb := run.bpb(kind)) is not None:
            curves.append(Curve(f"{SCORE_NAMES[kind]} {bpb:.5f}", colour, [(end, bpb)], True))
    return curves


def run_panels(run: Run) -> tuple[list[Panel], list[str]]:
    """Return the panels that a run's log has numbers for, and the names of those it lacks."""
    switch = run.recurrence_step
    blank = [(float(switch), "")] if switch is not None else []
    marks = [(step, f"recurrence from step {switch:,}") for step, _ in blank]
    if (started := run.events.get("averaging", {}).get("step")) is not None:
        marks.append((started, "SWA from here"))
    rate = setting(run, "matrix_lr", 1.0)
    of_train = {
        "training loss, nats a token": [(p.step, p.train_loss) for p in run.train],
        "matrix learning rate": [(p.step, None if p.lr_multiplier is None
                                  else rate * p.lr_multiplier) for p in run.train],
        "gradient norm before clipping": [(p.step, p.grad_norm) for p in run.train]}
    known = {title: thinned([(float(x), y) for x, y in points if y is not None])
             for title, points in of_train.items()}
    known["step time, ms"] = paces(run)
    panels, lacking = list[Panel](), list[str]()
    clip = setting(run, "grad_clip_norm")
    for title, points in known.items():
        level = (clip, f"clipped at {clip:g}") if "norm" in title and clip else None
        if len(points) > 1:
            panels.append(Panel(title, "step", [Curve("", COLOURS[0], points)], [],
                                blank if panels else marks, level, "time" in title))
        else:
            lacking.append(title.split(",")[0])
    scores = score_curves(run)
    if any(map(is_curve, scores)):
        panels.insert(1, Panel("bits per byte", "step", scores, scores, blank))
    return panels, lacking + ["scores"] * (not scores)


def draw_run(run: Run, path: Path) -> list[Path]:
    """Draw a run's training and scores by step; returns the files written.

    Raises LogError when the log holds nothing to draw.
    """
    panels, lacking = run_panels(run)
    scores = [] if any("bits" in panel.title for panel in panels) else score_curves(run)
    if not panels and not scores:
        raise LogError(f"{run.path}: nothing to draw: no losses by step, no scores")
    footer = f"not in this log: {', '.join(lacking)}" if lacking else ""
    parts = [name_of(run), run.run_id or run.path.stem,
             f"{run.parameters:,} parameters" if run.parameters else "",
             f"{run.steps:,} steps" if run.steps else "", "" if run.complete else "INCOMPLETE LOG"]
    with matplotlib.rc_context(STYLE):
        rows = 0.2 + 0.19 * len(scores) if scores else 0.0
        figure, strip = draw_grid(panels, " · ".join(filter(None, parts)), footer, rows)
        if strip:  # no course to draw: the scores as rows, not as dots in an empty panel
            draw_rows(strip, [(curve.name.rpartition(" ")[0], curve.points[-1][1], curve.colour)
                              for curve in scores])
            strip.set_title("bits per byte")
        return save(figure, path)
