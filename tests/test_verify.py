"""Laws of data/verify.py: sound shards pass, and each kind of damage is named."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sentencepiece = pytest.importorskip("sentencepiece")

import caseops  # noqa: E402
import catalogue  # noqa: E402
import encoding  # noqa: E402
import integrity  # noqa: E402
import shards  # noqa: E402
import verify  # noqa: E402
from conftest import REPO, train_tokenizer  # noqa: E402

SHARED = REPO.parent / "shared"
NUM_VAL, SHARD_TOKENS = 30, 1_500
# Of these normalisation changes the last two, by 1 - 3 (a ligature's "fi", 2) and -2 bytes.
CURIOUS = ["naïve café 日本 🙂", "a \ufb01ne line", "two  spaces   here"]


@pytest.fixture(scope="module")
def texts(tiny_documents):
    return [*CURIOUS, *tiny_documents[:150]]


@pytest.fixture(scope="module")
def models(tmp_path_factory, texts):
    """Two tokenizers of one size, of different text."""
    folder = tmp_path_factory.mktemp("models")
    train_tokenizer(texts, folder / "own.model")
    train_tokenizer([text[::-1] for text in texts], folder / "other.model")
    return folder


class Corpus:
    """A folder of shards that a test may damage, and the text behind it."""

    def __init__(self, root, model, texts):
        self.folder, self.model, self.texts = root / "datasets" / "mine", model, texts
        self.processor = encoding.load_processor(model)
        self.folder.mkdir(parents=True)
        self.docs = root / "docs.jsonl"
        self.docs.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        documents = encoding.encode_batch(self.processor, [text.encode() for text in texts])
        self.val, self.train = documents[:NUM_VAL], documents[NUM_VAL:]
        self.write()

    def write(self, sidecar=True):
        """Write the shards and their manifest anew; training runs on over several shards."""
        for path in self.folder.glob("*"):
            path.unlink()
        shards.write_shard(self.val_path, np.concatenate(self.val))
        stream = np.concatenate(self.train)
        for i, start in enumerate(range(0, len(stream), SHARD_TOKENS)):
            shards.write_shard(self.folder / f"fineweb_train_{i:06d}.bin",
                               stream[start:start + SHARD_TOKENS])
        if sidecar:
            found = [encoding.surface_bytes(self.processor, text).raw_bytes
                     for text in self.texts[:NUM_VAL]]
            self.write_sidecar(np.concatenate([[0, *counts] for counts in found]))
        self.promise()

    def write_sidecar(self, values):
        shards.write_shard(self.sidecar_path, np.asarray(values))

    def promise(self):
        files = {path.name: {"sha256": shards.sha256_of(path)}
                 for path in self.folder.glob("*.bin")}
        self.manifest = {"files": files, "tokenizer_sha256": shards.sha256_of(self.model)}
        (self.folder / "manifest.json").write_text(json.dumps(self.manifest))

    val_path = property(lambda self: self.folder / "fineweb_val_000000.bin")
    sidecar_path = property(lambda self: self.folder / "fineweb_val_bytes_000000.bin")

    def train_path(self, index):
        return self.folder / f"fineweb_train_{index:06d}.bin"


@pytest.fixture
def corpus(tmp_path, models, texts):
    return Corpus(tmp_path, models / "own.model", texts)


@pytest.fixture
def check(corpus, capsys):
    """Return a function that runs the tool: (exit code, {(level, check): text}, all it printed)."""
    def call(*options, model=corpus.model):
        code = verify.main([str(corpus.folder), "--tokenizer", str(model), "--jobs", "1",
                            *map(str, options)])
        told = capsys.readouterr()
        found = {tuple(line.split(":")[0].split()): line.partition(": ")[2]
                 for line in told.out.splitlines() if not line.startswith("verify")}
        return code, found, told.out + told.err
    return call


def faults(found):
    return {check for level, check in found if level == "FAULT"}


# ---- what passes -------------------------------------------------------------------------------


def test_sound_shards_pass_every_check(corpus, check):
    assert len(list(corpus.folder.glob("fineweb_train_*.bin"))) > 3
    code, found, told = check("--docs", corpus.docs)
    assert code == 0 and not faults(found), told
    assert {check for level, check in found if level == "ok"} >= {
        "headers", "hashes", "tokenizer", "bytes", "decoded", "tokens", "docs", "training",
        "disjoint"}
    assert ("note", "sidecar") in found  # of CURIOUS, which normalisation changes


FOREIGN = ['{"files": []}', '{"files": null}', '{"files": {"fineweb_val_000000.bin": 3}}',
           '{"files": {"fineweb_val_000000.bin": {}}}', '{"settings": 3}']


@pytest.mark.parametrize("name", ["manifest.json", "download.json"])
@pytest.mark.parametrize("content", FOREIGN)
def test_another_tools_json_promises_nothing(corpus, check, name, content):
    (corpus.folder / "manifest.json").unlink()
    (corpus.folder / name).write_text(content)
    code, found, told = check("--quick")
    assert code == 0 and not faults(found), told
    code, found, told = check()
    assert code == 0 and ("skip", "hashes") in found, told


def test_json_too_deep_to_read_is_one_line(corpus, check):
    (corpus.folder / "manifest.json").write_text("[" * 100_000)
    code, _, told = check()
    assert code == 1 and "manifest.json: not JSON" in told


def test_processes_find_what_one_finds(corpus, check):
    assert check("--jobs", 2)[1] == check()[1]


def test_quick_reads_neither_training_nor_hashes(corpus, check):
    content = bytearray(corpus.train_path(0).read_bytes())
    content[2_000] ^= 1
    corpus.train_path(0).write_bytes(content)
    code, found, told = check("--quick")
    assert code == 0 and ("skip", "hashes") in found and ("skip", "training") in found
    assert check()[0] == 1


def test_the_distance_to_raw_bytes_is_told(corpus, check):
    raw = [text.encode() for text in corpus.texts[:NUM_VAL]]
    clean = [encoding.normalised_text(corpus.processor, text.decode()).encode() for text in raw]
    changed = sum(a != b for a, b in zip(raw, clean))
    resized = sum(len(a) != len(b) for a, b in zip(raw, clean))
    off = sum(map(len, clean)) - sum(map(len, raw))
    told = check("--docs", corpus.docs)[2]
    assert changed >= resized >= 2 and off < 0
    assert (f"normalisation changes {changed} of {NUM_VAL} documents, {resized} in length; the "
            f"table counts {off} of") in told
    assert "the sidecar counts +0 of" in told


def test_a_known_validation_set_is_named(corpus, check, monkeypatch):
    tokens = np.concatenate(corpus.val)
    targets = catalogue.whole_targets(len(tokens))
    table = shards.byte_table(corpus.processor, 512)
    known = catalogue.Fingerprint("canonical tiny", targets, int(
        shards.target_bytes(tokens, table)[:targets].sum()), len(tokens))
    assert targets and "UNKNOWN" in check("--quick")[1]["note", "val"]
    variant = catalogue.VARIANTS["sp1024"]._replace(fingerprints=(known,))
    monkeypatch.setattr(catalogue, "VARIANTS", {"tiny": variant})
    assert check("--quick")[1]["ok", "val"].startswith("canonical tiny")


# ---- damage ------------------------------------------------------------------------------------


def test_a_truncated_shard_is_a_fault(corpus, check):
    path = corpus.train_path(1)
    path.write_bytes(path.read_bytes()[:-10])
    code, found, told = check()
    assert code == 1 and "headers" in faults(found) and str(path) in told
    assert ("skip", "content") in found


def test_a_changed_token_is_a_fault_of_the_hash(corpus, check):
    tokens = shards.read_shard(corpus.train_path(2))
    tokens[700] = 400 if tokens[700] != 400 else 401
    shards.write_shard(corpus.train_path(2), tokens)
    assert faults(check()[1]) == {"hashes"}


def test_a_promised_shard_that_is_gone_is_a_fault(corpus, check):
    corpus.train_path(1).unlink()
    assert "hashes" in faults(check()[1])


def test_a_download_record_promises_as_a_manifest_does(corpus, check):
    (corpus.folder / "manifest.json").unlink()
    assert ("skip", "hashes") in check()[1]
    files = {f"datasets/mine/{name}": entry for name, entry in corpus.manifest["files"].items()}
    files["datasets/mine/fineweb_val_000000.bin"] = {"sha256": "0" * 64}
    (corpus.folder / integrity.RECORD_NAME).write_text(json.dumps({"files": files}))
    assert faults(check()[1]) == {"hashes"}


def test_another_tokenizer_of_the_same_size_is_a_fault(corpus, check, models):
    assert {"tokenizer", "tokens"} <= faults(check(model=models / "other.model")[1])


@pytest.mark.parametrize("split", ["val", "train"])
def test_an_id_beyond_the_vocabulary_is_a_fault(corpus, check, split):
    part = getattr(corpus, split)
    part[3] = np.append(part[3], np.uint16(512))
    corpus.write(sidecar=False)
    code, _, told = check()
    assert code == 1 and "token 512 is beyond" in told and "Traceback" not in told


def test_bytes_that_are_no_text_are_a_fault(corpus, check):
    lone = np.array([corpus.processor.piece_to_id("<0x80>")], np.uint16)
    corpus.val[3] = np.append(corpus.val[3], lone)
    corpus.train[3] = np.append(corpus.train[3], lone)
    corpus.write(sidecar=False)
    assert {"bytes", "training"} <= faults(check()[1])


def test_unknown_tokens_are_a_fault(corpus, check):
    corpus.val[3] = np.append(corpus.val[3], np.uint16(corpus.processor.unk_id()))
    corpus.write(sidecar=False)
    assert {"ids", "bytes"} <= faults(check()[1])


@pytest.mark.parametrize("split", ["val", "train"])
def test_a_start_without_bos_is_a_fault(corpus, check, split):
    part = getattr(corpus, split)
    part[0] = part[0][1:]
    corpus.write(sidecar=False)
    assert "does not begin with BOS" in check()[2]


def test_validation_text_in_training_is_a_fault(corpus, check):
    corpus.train[4:4] = [corpus.val[7], corpus.val[9]]
    corpus.write()
    code, found, _ = check()
    assert code == 1 and faults(found) == {"disjoint"}
    assert found["FAULT", "disjoint"].startswith("2 of 30") and found[
        "FAULT", "disjoint"].endswith(": 7, 9")
    assert check("--max-shared", 2)[0] == 0


def test_other_documents_are_a_fault(corpus, check):
    lines = corpus.docs.read_text().splitlines(keepends=True)
    corpus.docs.write_text("".join([*lines[1:], lines[0]]))
    assert "docs" in faults(check("--docs", corpus.docs)[1])
    corpus.docs.write_text("".join(lines[:10]))
    assert "only 10 documents" in check("--docs", corpus.docs)[2]


@pytest.mark.parametrize("damage", ["short", "loud", "shifted"])
def test_a_sidecar_of_other_tokens_is_a_fault(corpus, check, damage):
    values = shards.read_shard(corpus.sidecar_path)
    if damage == "short":
        values = values[:-1]
    elif damage == "loud":
        values[0] = 3  # at a BOS
    else:
        values = np.where(values > 0, np.roll(values[values > 0].repeat(2), 900)[:len(values)], 0)
    corpus.write_sidecar(values)
    corpus.promise()
    assert faults(check()[1]) == {"sidecar"}


@pytest.mark.parametrize("text, named", [("", "no fineweb_val"), ("tokenizer", "--tokenizer")])
def test_missing_files_are_one_clear_line(corpus, tmp_path, capsys, text, named):
    folder = corpus.folder if text else tmp_path
    assert verify.main([str(folder)]) == 1
    told = capsys.readouterr()
    assert named in told.err and len(told.err.splitlines()) == 1


def test_help_works_without_any_package():
    code = "import sys; sys.modules.update(numpy=None, sentencepiece=None)\n" \
           f"import runpy; sys.path.insert(0, {str(REPO / 'data')!r})\n" \
           f"runpy.run_path({str(REPO / 'data' / 'verify.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, "--help"], text=True, capture_output=True)
    assert done.returncode == 0 and "--max-shared" in done.stdout
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode == 1 and "pip install" in done.stderr


# ---- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "fineweb_val_000000_old.bin", "fineweb_val_bytes_old_000000.bin",
    "fineweb_train_000000.bin.part", "fineweb_val_\u0661.bin", "fineweb_val_-1.bin",
    "copy of fineweb_val_000000.bin", "backup"])
def test_what_is_no_shard_is_mentioned_and_never_counted(corpus, check, name):
    before = check()[1]
    (corpus.folder / name).write_bytes(corpus.val_path.read_bytes())
    code, found, told = check()
    assert code == 0 and name in found.pop(("note", "names")) and found == before, told


def test_missing_and_repeated_numbers_are_mentioned(corpus, check):
    assert ("note", "names") not in check()[1]
    corpus.train_path(1).rename(corpus.train_path(50))
    assert "train shards" in check("--quick")[1]["note", "names"]


# ---- the account of bytes ----------------------------------------------------------------------


def source_texts():
    """Return Python sources of this installation: normalisation drops their indentation."""
    import inspect
    modules = [json, subprocess, inspect, __import__("argparse"), __import__("ast")]
    return [inspect.getsource(module)[:20_000] for module in modules]


def tokenised(tmp_path, texts, *options, vocab_size=400):
    """Tokenise texts with the tool, half of them validation; return folder and tokenizer."""
    import tokenize_corpus
    path = tmp_path / "docs.jsonl"
    tmp_path.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    if "--tokenizer" not in options:
        options += ("--train-tokenizer", "--vocab-size", vocab_size)
    assert tokenize_corpus.main([str(path), "--val-docs", str(len(texts) // 2), "--out",
                                 str(tmp_path), "--name", "own", *map(str, options)]) == 0
    return tmp_path / "datasets" / "own", tmp_path / "tokenizers" / "own.model"


def verify_lines(folder, model, capsys, *options):
    capsys.readouterr()
    code = verify.main([str(folder), "--tokenizer", str(model), *map(str, options)])
    return code, capsys.readouterr().out


def test_text_that_normalisation_shrinks_is_no_fault_but_warned_of(tmp_path, capsys):
    folder, model = tokenised(tmp_path, source_texts() * 3)
    assert "WARNING: a score will divide by" in capsys.readouterr().out
    for options in ((), ("--quick",), ("--docs", tmp_path / "docs.jsonl")):
        code, told = verify_lines(folder, model, capsys, "--max-shared", 99, *options)
        counted, text = (int(found.replace(",", "")) for found in re.search(
            r"WARN  sidecar: ([\d,]+) bytes, the tokens decode to ([\d,]+)", told).groups())
        assert code == 0 and counted > 1.1 * text
    assert "0 of 7 documents differ from the text under their tokens" in told


def test_without_its_sidecar_such_text_is_not_warned_of(tmp_path, capsys):
    folder, model = tokenised(tmp_path, source_texts() * 3, "--no-sidecar")
    assert "WARNING" not in capsys.readouterr().out
    code, told = verify_lines(folder, model, capsys, "--max-shared", 99)
    assert code == 0 and "WARN" not in told


def test_plain_text_of_a_caseops_tokenizer_is_compared_as_plain(tmp_path, texts, capsys):
    """That the tokenizer has the operators does not make the shards CaseOps."""
    texts = [text.title() for text in texts]
    model = tmp_path / "caseops.model"
    model.write_bytes(encoding.train_tokenizer(map(caseops.to_caseops, texts), 512,
                                               caseops.OPERATORS))
    for options in ((), ("--caseops",), ("--no-sidecar",)):
        out = tmp_path / "".join(("x", *options))
        folder, own = tokenised(out, texts, "--tokenizer", model, *options)
        code, told = verify_lines(folder, own, capsys, "--docs", out / "docs.jsonl")
        assert code == 0 and "documents are the shards', token by token" in told, told
        (folder / "fineweb_val_bytes_000000.bin").unlink(missing_ok=True)
        (folder / "manifest.json").unlink()
        code, told = verify_lines(folder, own, capsys)
        assert code == ("--caseops" in options) and ("there is none" in told) == code, told


@pytest.mark.parametrize("quick", [(), ("--quick",)])
def test_a_table_that_counts_other_bytes_is_refused_over_the_whole_text(corpus, tmp_path, quick,
                                                                       capsys):
    """Wherever the only piece stands that it counts wrongly, with --quick too."""
    model = tmp_path / "phrases.model"
    train_tokenizer(corpus.texts, model, user_defined_symbols=["very\u2581rare"])
    processor = encoding.load_processor(model)
    texts = [*corpus.texts] * 3
    texts[291] += " a very rare one"
    tokens = np.concatenate(encoding.encode_batch(processor, [text.encode() for text in texts]))
    shards.write_shard(tmp_path / "fineweb_val_000000.bin", tokens)
    code, told = verify_lines(tmp_path, model, capsys, *quick)
    true = sum(len(processor.decode(processor.encode(text)).encode()) for text in texts)
    place = int(np.flatnonzero(tokens == processor.piece_to_id("very\u2581rare"))[0])
    assert code == 1 and f"counts {true + 2:,} bytes, the tokens decode to {true:,}" in told
    assert f"first at token {place}, in document 291" in told


def test_a_dummy_prefix_is_right(tmp_path, texts, capsys):
    model = tmp_path / "prefix.model"
    train_tokenizer(texts, model, add_dummy_prefix=True)
    for options in ((), ("--no-sidecar",)):
        folder, own = tokenised(tmp_path / "".join(("x", *options)), texts, "--tokenizer", model,
                                *options)
        assert verify_lines(folder, own, capsys)[0] == 0


def test_white_space_kept_counts_exactly_by_its_sidecar(tmp_path, capsys):
    """The byte table is wrong on pieces of spaces; a score divides by the sidecar."""
    model = tmp_path / "spaces.model"
    sentences = [text[i:i + 3000] for text in source_texts() for i in range(0, len(text), 3000)]
    train_tokenizer(sentences, model, allow_whitespace_only_pieces=True,
                    remove_extra_whitespaces=False, normalization_rule_name="identity")
    folder, own = tokenised(tmp_path, source_texts() * 2, "--tokenizer", model)
    code, told = verify_lines(folder, own, capsys, "--max-shared", 9)
    assert code == 0 and "keep the sidecar" in told and "(+0, +0.0000 %)" in told
    import tokenize_corpus
    assert tokenize_corpus.main([
        str(tmp_path / "docs.jsonl"), "--tokenizer", str(model), "--no-sidecar", "--val-docs", "3",
        "--out", str(tmp_path / "bare")]) == 1
    assert "leave --no-sidecar away" in capsys.readouterr().err


def test_empty_shards_are_said_and_not_blamed_for_a_missing_bos(corpus, check):
    stream = np.concatenate([shards.read_shard(corpus.train_path(i)) for i in range(2)])
    shards.write_shard(corpus.train_path(0), [])
    shards.write_shard(corpus.train_path(1), stream)
    corpus.promise()
    code, found, told = check()
    assert code == 0 and "does not begin" not in told
    assert f"{corpus.train_path(0)}: is empty" in found["note", "headers"]
    for path in corpus.folder.glob("fineweb_train_*.bin"):
        shards.write_shard(path, [])
    corpus.promise()
    assert "no training shard holds a token" in check()[2]
    shards.write_shard(corpus.val_path, [])
    assert "holds no token" in check("--quick")[2]


def test_a_training_shard_of_another_tokenizer_is_a_fault(corpus, check, models):
    other = encoding.load_processor(models / "other.model")
    for path in list(corpus.folder.glob("fineweb_train_*.bin"))[1:]:
        path.unlink()
    texts = [text.encode() for text in corpus.texts[NUM_VAL:]]
    shards.write_shard(corpus.train_path(1), np.concatenate(encoding.encode_batch(other, texts)))
    corpus.promise()
    code, found, _ = check()
    assert code == 1 and faults(found) == {"training"}
    assert "another tokenizer wrote it" in found["FAULT", "training"]


# ---- the quick ways against the obvious ones ---------------------------------------------------

streams = st.lists(st.lists(st.integers(2, 4), max_size=3), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(val=streams, train=streams, cut=st.integers(1, 9))
def test_shared_documents_are_found_however_shards_are_cut(tmp_path_factory, val, train, cut):
    folder = tmp_path_factory.mktemp("cut")
    stream = np.array([i for document in train for i in [1, *document]], np.uint16)
    paths = []
    for start in range(0, len(stream), cut):
        paths.append(folder / f"fineweb_train_{len(paths):06d}.bin")
        shards.write_shard(paths[-1], stream[start:start + cut])
    tokens = np.array([i for document in val for i in [1, *document]], np.uint16)
    starts, ends = verify.document_bounds(tokens, 1)
    known = verify.Known(1, np.full(1 << 16, -1, np.int16),
                         np.unique(verify.document_keys(tokens, starts, ends)),
                         {verify.digest_of(tokens[a:b]): i
                          for i, (a, b) in enumerate(zip(starts, ends))})
    reports = [verify.scan_shard(paths, known, i) for i in range(len(paths))]
    shared = {tuple(val[i]) for report in reports for i in report.shared}
    assert shared == set(map(tuple, val)) & set(map(tuple, train))
    assert sum(report.num_documents for report in reports) == len(train)


def is_utf8(content):
    try:
        return bool(content.decode("utf-8") or True)
    except UnicodeDecodeError:
        return False


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([65, 0x80, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 300]), max_size=12))
def test_broken_byte_runs_are_found_as_by_decoding_each(tokens):
    values = np.full(1 << 16, -1, np.int16)
    values[:256] = np.arange(256)
    runs = bytes(t if t < 256 else 255 for t in tokens).split(b"\xff")
    place = encoding.broken_bytes(np.array(tokens, np.uint16), values)
    assert (place is None) == all(map(is_utf8, runs))
    assert place is None or tokens[place] < 256


# ---- the published tokenizers on real text -----------------------------------------------------

TOKENIZERS = [Path(v.tokenizer).name for v in catalogue.VARIANTS.values()]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_law_of_bytes_holds_for_published_tokenizers(name, tmp_path, capsys):
    model, docs = SHARED / "tokenizers" / name, SHARED / "corpus" / "fineweb_docs.jsonl"
    if not (model.is_file() and docs.is_file()):
        pytest.skip("the published tokenizers and FineWeb documents are not beside the checkout")
    processor = encoding.load_processor(model)
    tokens, sidecar = [], []
    for line in docs.open(encoding="utf-8"):
        text = json.loads(line)["text"]
        if encoding.operator_ids(processor):
            encoded = text.encode()
            spans = encoding.spans_batch(processor, [caseops.encode_utf8(encoded)])[0]
            offsets = caseops.original_offsets(caseops.encode_utf8(encoded))
            ids, counts = spans.token_ids, np.diff(offsets[spans.edges])
        else:
            ids, counts, _ = encoding.surface_bytes(processor, text)
        tokens += [1, *ids]
        sidecar += [0, *counts]
    shards.write_shard(tmp_path / "fineweb_val_000000.bin", np.array(tokens))
    shards.write_shard(tmp_path / "fineweb_val_bytes_000000.bin", np.array(sidecar))
    code = verify.main([str(tmp_path), "--tokenizer", str(model), "--docs", str(docs)])
    told = capsys.readouterr().out
    assert code == 0, told
    assert "the sidecar counts +0 of 1,489,515 raw bytes; 0 of 200 documents differ" in told
    if not encoding.operator_ids(processor):
        assert "33 in length; the table counts -97 of 1,489,515 raw bytes (0.0065 %)" in told


def test_operators_that_the_text_itself_holds_count_their_bytes(tmp_path, capsys):
    """They follow ESC: not control tokens, and the raw sum needs them."""
    from pydoc_data.topics import topics

    import tokenize_corpus
    texts = [" ".join(text.split())[:3000] for text in topics.values()]
    texts[0] += " a literal \ue001 here and \ue004\ue002 THERE"
    (tmp_path / "docs.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    arguments = [str(tmp_path / "docs.jsonl"), "--caseops", "--train-tokenizer", "--vocab-size",
                 "700", "--val-docs", "10", "--out", str(tmp_path), "--name", "literal"]
    assert tokenize_corpus.main(arguments) == 0
    capsys.readouterr()
    folder, model = tmp_path / "datasets" / "literal", tmp_path / "tokenizers" / "literal.model"
    assert verify.main([str(folder), "--tokenizer", str(model)]) == 0
    assert "FAULT" not in capsys.readouterr().out
