"""Laws of the demo corpus and of the shard module in data/."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sentencepiece = pytest.importorskip("sentencepiece")

import build_demo  # noqa: E402
import shards  # noqa: E402

DATA = Path(__file__).resolve().parents[1] / "data"


@pytest.fixture(scope="session")
def demo(shared):
    """Folder of one finished build."""
    def make(out):
        assert build_demo.main(["--out", str(out)]) == 0
        return out
    return shared("demo_data", make)


@pytest.fixture(scope="session")
def processor(demo):
    return sentencepiece.SentencePieceProcessor(
        model_file=str(demo / "tokenizers/demo_1024_bpe.model"))


@pytest.fixture(scope="session")
def manifest(demo):
    return json.loads((demo / build_demo.MANIFEST).read_text())


def texts_of(demo, part):
    return (demo / f"datasets/demo/{part}.txt").read_text(encoding="utf-8").splitlines()


def tokens_of(demo, part):
    return shards.read_shard(demo / f"datasets/demo/fineweb_{part}_000000.bin")


def file_hashes(out):
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(out.rglob("*")) if path.is_file()}


def test_printed_command_names_what_the_preset_does_not_read(tmp_path, manifest):
    assert build_demo.run_line(manifest, Path("data")) == "PRESET=demo python train_gpt.py"
    words = shlex.split(build_demo.run_line(manifest, tmp_path / "a folder"))
    found = dict(word.split("=", 1) for word in words if "=" in word)
    assert found == dict(PRESET="demo", VOCAB_SIZE="1024",
                         DATA_PATH=str(tmp_path / "a folder/datasets/demo"),
                         TOKENIZER_PATH=str(tmp_path / "a folder/tokenizers/demo_1024_bpe.model"))
    other = {**manifest, "recipe": {**manifest["recipe"], "vocab_size": 2048}}
    assert "VOCAB_SIZE=2048" in build_demo.run_line(other, Path("data"))


# ---- the corpus --------------------------------------------------------------------------------


def test_both_parts_are_large_enough(demo):
    sizes = {part: build_demo.text_bytes(texts_of(demo, part)) for part in ("train", "val")}
    assert sizes["val"] >= 100_000
    assert sizes["train"] >= 10 * sizes["val"]


def test_documents_are_unique_and_of_sensible_size(demo):
    found = texts_of(demo, "train") + texts_of(demo, "val")
    assert len(set(found)) == len(found)
    sizes = [len(text.encode("utf-8")) for text in found]
    assert min(sizes) >= build_demo.MIN_DOC_BYTES and max(sizes) <= build_demo.MAX_DOC_BYTES


def test_validation_hardly_shares_ten_word_runs_with_training(demo):
    seen = set().union(*(build_demo.shingles(text) for text in texts_of(demo, "train")))
    runs = set().union(*(build_demo.shingles(text) for text in texts_of(demo, "val")))
    assert len(runs & seen) < 0.01 * len(runs)


def test_validation_holds_topics_and_modules():
    sizes = {**{f"m{i}": 3000 for i in range(400)}, **{f"topic:{i}": 3000 for i in range(100)}}
    modules = {n: [build_demo.Paragraph("", "x" * size)] for n, size in sizes.items()}
    kinds = Counter(name.startswith("topic:") for name in build_demo.choose_val(modules))
    assert kinds[False] == pytest.approx(4 * kinds[True], abs=4) and kinds[True] > 0


def test_choice_of_validation_does_not_depend_on_the_order_of_modules():
    modules = {f"m{i}": [build_demo.Paragraph("", "x" * 900)] for i in range(500)}
    backwards = dict(reversed(modules.items()))
    assert build_demo.choose_val(modules) == build_demo.choose_val(backwards)


def test_near_repeats_are_dropped_and_fresh_text_is_kept():
    words = [f"w{i}" for i in range(40)]
    train = {"a": [build_demo.Paragraph("f(): ", " ".join(words))]}
    val = {"b": [build_demo.Paragraph("g(): ", "Other " + " ".join(words[3:]) + " end."),
                 build_demo.Paragraph("", " ".join(reversed(words)))]}
    seen, counts = set(), Counter()
    assert build_demo.drop_near_repeats(train, seen, "train", counts) == train
    kept = build_demo.drop_near_repeats(val, seen, "val", counts)
    assert kept == {"b": val["b"][1:]} and counts == {"val": 1}


def test_repeats_are_found_by_letters_and_digits():
    bodies = "Return the 2 names.", "return THE (2) names"
    same = [build_demo.Paragraph("", body) for body in bodies]
    counts = Counter()
    kept = build_demo.drop_repeats({"a": same[:1], "b": same[1:]}, counts)
    assert kept == {"a": same[:1], "b": []} and counts["paragraphs_repeated"] == 1


def test_long_text_is_cut_at_sentence_ends_and_nothing_is_lost():
    text = " ".join(f"Sentence number {i} ends here." for i in range(1000))
    pieces = build_demo.cut_long(text)
    assert " ".join(pieces) == text and len(pieces) > 1
    assert all(len(p) <= build_demo.MAX_DOC_BYTES and p.endswith(".") for p in pieces)
    unbroken = "word " * 3000 + "end"
    assert " ".join(build_demo.cut_long(unbroken)) == unbroken


def test_docstrings_and_comments_are_read_without_import(tmp_path):
    path = tmp_path / "abc.py"
    words = " ".join(f"word{'abcdefgh'[i % 8]}" for i in range(30))
    path.write_text(f'"""Module text stands here.\n\n>>> code()\n"""\n# {words}\nraise SystemExit\n'
                    f'text = """\n# within a string {words}\n"""\n'
                    'def f(a, b=1):\n    """Return the sum\n    of both."""\n')
    counts = Counter()
    found = build_demo.read_modules(tmp_path, counts)
    assert [p.text() for p in found["abc"]] == [
        "abc: Module text stands here.", words, "f(a, b=1): Return the sum of both."]


# ---- determinism and completeness --------------------------------------------------------------


def test_second_build_gives_the_same_bytes(demo, tmp_path):
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, str(DATA / "build_demo.py"), "--out", str(tmp_path)],
                   check=True, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL)
    assert file_hashes(tmp_path) == file_hashes(demo)


def test_finished_build_is_left_alone(demo, capsys, monkeypatch):
    monkeypatch.setattr(build_demo, "build", lambda *_: pytest.fail("built again"))
    assert build_demo.main(["--out", str(demo)]) == 0
    assert "already built" in capsys.readouterr().out


def copy_of(demo, out):
    for path in demo.rglob("*"):
        if path.is_file():
            target = out / path.relative_to(demo)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return out


def test_changed_or_missing_file_is_noticed(demo, tmp_path, manifest):
    out = copy_of(demo, tmp_path)
    assert build_demo.inspect_product(out, 1024) == (manifest, "")
    for name in manifest["files"]:
        path = out / name
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        assert name in build_demo.inspect_product(out, 1024)[1]
        path.unlink()
        assert path.name in build_demo.inspect_product(out, 1024)[1]
        path.write_bytes(content)


@pytest.mark.parametrize("change", [
    dict(files={}), dict(files=[]), dict(splits=3), dict(splits={"val": {}}), dict(yardsticks={})],
    ids=str)
def test_manifest_of_another_form_is_noticed(demo, tmp_path, manifest, change):
    out = copy_of(demo, tmp_path)
    (out / build_demo.MANIFEST).write_text(json.dumps({**manifest, **change}))
    assert build_demo.inspect_product(out, 1024) == (None, "its manifest is unreadable")


@pytest.mark.parametrize("key", ["tool_version", "python", "sentencepiece", "vocab_size"])
def test_other_recipe_is_noticed(demo, tmp_path, manifest, key):
    out = copy_of(demo, tmp_path)
    changed = {**manifest, "recipe": {**manifest["recipe"], key: "other"}}
    (out / build_demo.MANIFEST).write_text(json.dumps(changed))
    assert key in build_demo.inspect_product(out, 1024)[1]


@pytest.mark.parametrize(("module", "step"), [
    (build_demo, "build_corpus"), (build_demo.encoding, "train_tokenizer"), (build_demo, "encode"),
    (build_demo, "yardsticks")], ids=lambda value: value if isinstance(value, str) else "")
def test_interrupted_build_does_not_look_finished(demo, tmp_path, monkeypatch, capsys, module,
                                                  step):
    def interrupt(*_):
        raise KeyboardInterrupt

    out = copy_of(demo, tmp_path)
    split = {part: texts_of(demo, part)[:3] for part in ("train", "val")}
    model = (demo / "tokenizers/demo_1024_bpe.model").read_bytes()
    monkeypatch.setattr(build_demo, "build_corpus", lambda *_: split)
    monkeypatch.setattr(build_demo.encoding, "train_tokenizer", lambda *_: model)
    monkeypatch.setattr(module, step, interrupt)
    assert build_demo.main(["--out", str(out), "--force"]) == 130
    assert build_demo.inspect_product(out, 1024)[0] is None
    assert "Traceback" not in capsys.readouterr().err


def test_manifest_agrees_with_the_files(demo, manifest):
    for part, size in manifest["splits"].items():
        found = texts_of(demo, part)
        assert size == {"documents": len(found), "bytes": build_demo.text_bytes(found),
                        "tokens": len(tokens_of(demo, part))}
    hashes = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    assert {**hashes, build_demo.MANIFEST: None}.keys() == file_hashes(demo).keys()
    assert manifest["tokenizer_sha256"] == hashes["tokenizers/demo_1024_bpe.model"]
    measured = manifest["yardsticks"]
    assert measured["xz_val_bpb"] > measured["xz_train_val_minus_train_bpb"] > 1


def test_products_name_no_folder(demo):
    for name in (build_demo.MANIFEST, "tokenizers/demo_1024_bpe.model"):
        content = (demo / name).read_bytes()
        assert str(demo).encode() not in content and str(DATA).encode() not in content, name


# ---- tokenizer and byte table ------------------------------------------------------------------


def test_tokenizer_follows_the_published_recipe(processor):
    assert processor.get_piece_size() == 1024
    ids = processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id()
    assert ids == (0, 1, 2, 3)
    assert [t for t in range(1024) if processor.is_byte(t)] == list(range(4, 260))
    assert processor.piece_to_id(shards.SPACE) > 259
    assert not processor.id_to_piece(processor.encode("name")[0]).startswith(shards.SPACE)
    assert processor.decode(processor.encode("a\u3042 1234")) == "a\u3042 1234"
    assert len(processor.encode("1234")) == 4


@pytest.mark.parametrize("part", ["train", "val"])
def test_tokens_are_the_documents_each_after_a_bos(demo, processor, part):
    tokens = tokens_of(demo, part)
    starts = np.flatnonzero(tokens == build_demo.encoding.BOS_ID)
    assert starts[0] == 0 and processor.eos_id() not in tokens
    pieces = [piece[1:].tolist() for piece in np.split(tokens, starts[1:])]
    assert processor.decode(pieces) == texts_of(demo, part)


@pytest.mark.parametrize("part", ["train", "val"])
def test_byte_table_counts_the_bytes_of_the_text(demo, processor, part):
    counted = shards.target_bytes(tokens_of(demo, part), shards.byte_table(processor, 1024))
    assert counted.sum() == build_demo.text_bytes(texts_of(demo, part))


def test_byte_table_worked_example(processor):
    table = shards.byte_table(processor, 1030)
    space, byte = processor.piece_to_id(shards.SPACE), processor.piece_to_id("<0xE3>")
    the = processor.piece_to_id(f"{shards.SPACE}the")
    rows = [tuple(column[token].item() for column in table) for token in (1, 3, byte, space, the)]
    assert rows == [(0, False, True), (0, False, True), (1, False, False), (0, True, False),
                    (3, True, False)]
    assert table.is_boundary[1024:].all() and not table.piece_bytes[1024:].any()
    # a leading space counts, but not at the start of a document; a BOS target is free
    assert shards.target_bytes([1, the, the, 1, space, byte], table).tolist() == [3, 4, 0, 0, 1]


def test_byte_table_refuses_what_it_cannot_count(processor):
    with pytest.raises(ValueError, match="vocab_size is 1000.*1024"):
        shards.byte_table(processor, 1000)

    class WithoutSpace:
        get_piece_size = processor.get_piece_size
        unk_id = processor.unk_id

        def piece_to_id(self, piece):
            return self.unk_id()

    with pytest.raises(ValueError, match="bare space"):
        shards.byte_table(WithoutSpace(), 1024)


# ---- shards ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [[], [0], [1, 65_535, 7], list(range(5000))])
def test_shard_round_trip(tmp_path, tokens):
    path = tmp_path / "shard.bin"
    shards.write_shard(path, tokens)
    assert path.stat().st_size == 1024 + 2 * len(tokens)
    assert np.fromfile(path, "<i4", 4).tolist() == [20240520, 1, len(tokens), 0]
    found = shards.read_shard(path)
    assert found.dtype == np.uint16 and found.tolist() == tokens
    assert [p.name for p in tmp_path.iterdir()] == ["shard.bin"]


@pytest.mark.parametrize(("change", "message"), [
    (lambda b: b[:-2], "size is 1028 bytes, must be 1030"),
    (lambda b: b + b"\0\0", "size is 1032 bytes, must be 1030"),
    (lambda b: b[:500], "size is 500 bytes"),
    (lambda b: b"\1" + b[1:], "magic is .* must be 20240520"),
    (lambda b: b[:4] + b"\2" + b[5:], "version is 2, must be 1"),
], ids=["truncated", "too long", "no header", "magic", "version"])
def test_damaged_shard_is_refused(tmp_path, change, message):
    path = tmp_path / "shard.bin"
    shards.write_shard(path, [1, 2, 3])
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        shards.read_shard(path)


def test_interrupted_write_leaves_the_old_shard(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    path = tmp_path / "shard.bin"
    shards.write_shard(path, [1, 2, 3])
    monkeypatch.setattr(shards.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        shards.write_shard(path, [4])
    assert shards.read_shard(path).tolist() == [1, 2, 3]


@pytest.mark.parametrize("tokens", [[-1], [65_536], [0.5], [[1, 2]]])
def test_tokens_that_do_not_fit_are_refused(tmp_path, tokens):
    with pytest.raises(ValueError, match="must"):
        shards.write_shard(tmp_path / "shard.bin", tokens)
    assert not list(tmp_path.iterdir())


# ---- the user's mistakes -----------------------------------------------------------------------


def test_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert build_demo.main(["--out", str(blocked)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "--out" in lines[0]


def test_missing_package_is_one_line_with_its_remedy(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(build_demo, "MISSING", "sentencepiece")
    assert build_demo.main(["--out", str(tmp_path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "pip install numpy sentencepiece" in lines[0]


def test_installation_without_sources_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(build_demo, "read_topics", dict)
    monkeypatch.setattr(build_demo.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert build_demo.main(["--out", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert "full Python installation" in captured.err and "going on" in captured.out
