"""Laws of the page: it says what `read` says, needs no network, and works in a browser."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import read
import report
from published_logs import Facts, family_1471, phased_ttt, write

import records

import logs  # isort: skip  (a folder logs/, which runs leave, would change its place)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
         "--disable-background-networking --disable-component-update --hide-scrollbars").split()


class Page(HTMLParser):
    """The text of a page's cells and the addresses that it names."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.addresses, self.inside = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.inside = tag
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action")]
        self.cells += [""] * (tag in ("td", "th"))

    def handle_data(self, data):
        if self.inside in ("td", "th"):
            self.cells[-1] += data.strip()


def logs_of(folder, count, form=family_1471):
    folder.mkdir(parents=True, exist_ok=True)
    return [write(folder / f"{form.__name__}{i}.log",
                  form(Facts(seed=i, steps=4900 + 9 * i, sliding=round(1.087 + i * 2e-4, 8))))
            for i in range(count)]


def page_of(tmp_path, capsys, *argv):
    out = tmp_path / "page.html"
    code = records.main(["report", *map(str, argv), "--out", str(out)])
    said = capsys.readouterr()
    assert code == 0, said.err
    return out.read_text(encoding="utf-8")


@pytest.mark.parametrize("count", [1, 3, 12])
def test_the_page_has_every_number_and_verdict_of_the_table(count, tmp_path, capsys):
    paths = logs_of(tmp_path / "a", count)
    text = page_of(tmp_path, capsys, *paths)
    page, runs = Page(text), [logs.read_run(path) for path in paths]
    _, columns = read.columns_of(runs, read.rows_of(runs))
    wanted = [cell for column in columns for cell in column if cell]
    assert sorted(set(wanted)) == sorted(set(wanted) & set(page.cells))
    assert all(v["reason"].replace("<", "&lt;").replace(">", "&gt;") in text
               for v in read.as_json(runs)["verdicts"])
    assert page.addresses == [] and len(text) < 2_000_000  # one file, no network
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\((?!#)", text)
    assert str(tmp_path) not in text  # nor its owner's folders


def test_two_groups_are_compared_and_their_settings_told(tmp_path, capsys):
    new, old = logs_of(tmp_path / "a", 3), logs_of(tmp_path / "b", 3, phased_ttt)
    text = page_of(tmp_path, capsys, *new, "--", *old, "--names", "deep", "wide")
    assert "deep against wide" in text and "deep minus wide, mean roundtrip" in text
    assert "some end in sliding, ttt" in text and "sliding_window_enabled" in Page(text).cells
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    curves = data["charts"][0]["curves"]
    assert [c["name"] for c in curves[:4]] == ["deep: seed 0", "deep: seed 1", "deep: seed 2",
                                               "wide: seed 0"]
    assert {c["colour"] for c in curves[:3]} == {0} and curves[3]["colour"] == 1


def test_what_logs_say_cannot_act(tmp_path, capsys):
    (path,) = logs_of(tmp_path / "</script><b>", 1)
    lines = path.read_text().replace("warmdown_frac: 0.72", "warmdown_frac: <script>x()</script>")
    path.write_text(lines)
    text = page_of(tmp_path, capsys, path, "--", *logs_of(tmp_path / "b", 1, phased_ttt),
                   "--names", "</script><i>", "old")
    assert "<script>x()" not in text and "<b>" not in text.split("</style>")[1].split("<main>")[0]
    assert text.count("</script>") == 2 and "&lt;script&gt;x()" in text


def test_our_own_run_shows_time_bytes_texts_and_command(tiny_run, tmp_path, capsys):
    text = page_of(tmp_path, capsys, tiny_run.folder)
    for part in ("time", "bytes", "samples", "settings", "curves", "runs"):
        assert f'<section id="{part}">' in text
    assert "quantize" in text and "tok_emb.weight" in Page(text).cells
    assert "SEED=1337 python train_gpt.py" in text
    bare = page_of(tmp_path, capsys, tiny_run.folder, "--no-samples")
    assert 'id="samples"' not in bare


def test_an_artifact_that_cannot_be_read_is_a_note(tmp_path, capsys):
    (path,) = logs_of(tmp_path / "a", 1)
    (path.parent / "final_model.int6.ptz").write_bytes(b"junk")
    text = page_of(tmp_path, capsys, path)
    assert "note: " in text and 'id="bytes"' not in text


@pytest.fixture
def placed(tiny_run, tmp_path):
    """A copy of a run below a folder whose name must not leave the machine."""
    folder = tmp_path / "my own place" / "runs" / "tiny"
    shutil.copytree(tiny_run.folder, folder)
    return folder


def test_the_page_names_no_place_whatever_went_wrong(placed, tmp_path, capsys):
    twin = tmp_path / "my own place" / "again" / "tiny"
    shutil.copytree(placed, twin)
    packed = placed / "final_model.int6.ptz"
    packed.write_bytes(packed.read_bytes()[:-9])
    text = page_of(tmp_path, capsys, placed, twin)
    assert text.count("truncated or damaged") == 1  # one fault, one note
    assert "note: tiny/events.jsonl: the same run as" in text
    assert "my own place" not in text and tmp_path.name not in text
    text = page_of(tmp_path, capsys, placed, "--", twin)
    assert "of the other group" in text and "my own place" not in text


def test_a_tokenizer_and_data_elsewhere_leave_no_place_either(placed, tmp_path, capsys):
    far = f"{tmp_path}/my own place/x/y"
    rows = [json.loads(line) for line in (placed / "events.jsonl").read_text().splitlines()]
    for row in rows:
        if row["event"] == "config":
            row.update(data_path=f"{far}/data", tokenizer_path=f"{far}/t.model",
                       input_path=f"{far}/weights")
    rows.append(dict(event="failed", error=f"FileNotFoundError: '{far}/my file' of {far}/z"))
    (placed / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = page_of(tmp_path, capsys, placed)
    assert "is none of: y/t.model" in text and "y/my file" in html.unescape(text)
    assert "INPUT_PATH=path/to/weights" in text
    assert "my own place" not in text and tmp_path.name not in text
    other = shutil.copytree(placed, tmp_path / "my own place" / "runs" / "b")
    edited = (other / "events.jsonl").read_text().replace(f"{far}/data", "/elsewhere/y/other")
    (other / "events.jsonl").write_text(edited)
    text = page_of(tmp_path, capsys, placed, "--", other, "--no-samples")
    assert "path/to/other" in Page(text).cells and "elsewhere" not in text
    assert "my own place" not in text and tmp_path.name not in text


@pytest.mark.parametrize("text, shown", [
    ("a/b: /x/y/z/w.txt: cut", "a/b: z/w.txt: cut"), ("8 tok/s, 1/20 of 3 / 4", None),
    ("[Errno 2] No such file: '/x/y z/u v/w'", "[Errno 2] No such file: 'u v/w'"),
    ("/one two/three/four.log.", "three/four.log."), ("(/one two/three/more/x)", "(more/x)"),
    ("/one twofold/three/x", "one twofold/three/x"), ("at /x", "at x")])
def test_of_each_path_in_a_text_two_names_are_left(text, shown, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    plain = report.without_places([], [report.Path("/one two/three/four.log")])
    assert plain(text) == (text if shown is None else shown)


def test_a_preset_that_is_gone_costs_the_command_alone(placed, tmp_path, capsys):
    text = (placed / "events.jsonl").read_text()
    assert '"preset": ""' in text
    (placed / "events.jsonl").write_text(
        text.replace('"preset": ""', f'"preset": "{tmp_path}/my own place/x/gone.env"'))
    text = page_of(tmp_path, capsys, placed, "--no-samples")
    assert "note: no command: PRESET=" in text and "gone.env" in text and 'id="bytes"' in text
    assert "my own place" not in text


@pytest.mark.parametrize("more, said", [
    (["--artifact", "none"], "--artifact none: no such file"),
    (["--artifact", "."], "--artifact .: no such file"),
    (["--out", "."], "--out .: is a folder; give a file, such as report.html"),
    (["--names", "x", "x"], "--names x x: give two different names")])
def test_mistakes_are_one_line(more, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [str(path) for path in logs_of(tmp_path / "a", 2)]
    assert records.main(["report", paths[0], *more, "--", paths[1]]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not (tmp_path / "report.html").exists()


# -- in a browser ----------------------------------------------------------------------------------

PROBE = """<script>
const found = {errors: errors, curves: document.querySelectorAll("path.curve").length};
const svg = document.querySelector("svg"), box = svg.getBoundingClientRect();
const key = name => svg.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true}));
const mouse = (kind, share, buttons) => svg.dispatchEvent(new PointerEvent(kind,
  {clientX: box.left + 58 + share * (box.width - 72), clientY: box.top + 50, buttons: buttons}));
const ticks = () => [...svg.querySelectorAll("text[text-anchor=middle]")].map(t => t.textContent);
const readout = () => document.querySelector(".readout").textContent;
found.width = innerWidth; found.scroll = document.documentElement.scrollWidth;
found.all = ticks();
mouse("pointermove", .5, 0); found.hover = readout();
mouse("pointerdown", .5, 1); mouse("pointermove", .8, 1); mouse("pointerup", .8, 0);
found.dragged = ticks();
key("Escape"); found.escaped = ticks();
key("End"); const end = readout(); key("ArrowLeft"); found.moved = end !== readout();
key("+"); found.zoomed = ticks(); key("0"); found.reset = ticks();
const first = document.querySelector(".legend button");
first.click(); found.hidden = document.querySelectorAll("path.curve").length; first.click();
document.querySelectorAll("#axes button")[2].click(); found.seconds = ticks();
found.ground = getComputedStyle(document.body).backgroundColor;
top.document.documentElement.dataset.found = JSON.stringify(found);
</script></body>"""
CATCH = "<head><script>const errors = []; onerror = (m, s, l) => { errors.push(m + l); };</script>"


def browse(text, tmp_path, width, dark):
    """Open a page with a probe in it; return what that found, and the console's messages.

    In a frame of the wanted width: a window has a least width.
    """
    path, probed = tmp_path / "probed.html", text.replace("<head>", CATCH, 1)
    probed = html.escape(probed.replace("</body>", PROBE))
    path.write_text(f'<!doctype html><meta charset="utf-8"><iframe width="{width}" height="900" '
                    f'style="border:0" srcdoc="{probed}"></iframe>', encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1700,1000",
         f"--blink-settings=preferredColorScheme={int(not dark)}", "--enable-logging=stderr",
         "--virtual-time-budget=2000", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120)
    match = re.search(r'data-found="([^"]*)"', done.stdout)
    assert match, done.stderr[-2000:]
    found = json.loads(html.unescape(match[1]))
    return found, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here: apt-get install chromium")
@pytest.mark.parametrize("count, width, dark", [(3, 400, True), (12, 1600, False)])
def test_curves_are_drawn_hovered_zoomed_and_hidden(count, width, dark, tmp_path, capsys):
    text = page_of(tmp_path, capsys, *logs_of(tmp_path / "a", count))
    found, console = browse(text, tmp_path, width, dark)
    assert found["errors"] == [] and console == []
    assert found["curves"] == 2 * count and found["hidden"] == 2 * (count - 1)
    assert found["width"] == width and found["scroll"] <= width  # nothing beside the screen
    assert found["hover"].startswith("step 2,") and f"seed {count - 1} 2.9" in found["hover"]
    assert found["dragged"] != found["all"] == found["escaped"] == found["reset"]
    assert found["zoomed"] != found["all"] and found["moved"]
    assert found["seconds"][-1] == "training time, s"
    assert (found["ground"] == "rgb(22, 24, 27)") is dark
