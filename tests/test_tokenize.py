"""Laws of tokenize_corpus: exact content, the same bytes however it runs, faults in one line."""

import contextlib
import hashlib
import json
import os
import random
import resource
import shlex
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sentencepiece = pytest.importorskip("sentencepiece")

import caseops  # noqa: E402
import documents  # noqa: E402
import encoding  # noqa: E402
import shards  # noqa: E402
import tokenize_corpus  # noqa: E402

VAL_DOCS, SHARD_TOKENS = 7, 400
WORDS = ("The quick BROWN fox jumps over lazy dogs in Z\u00fcrich, iPhone \uff21 1234 "
         "\ufb01ve").split()
UTF8_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def make_texts(count=60):
    """Return documents of many lengths; every eleventh yields no token."""
    rng = random.Random(3)
    texts = [" ".join(rng.choices(WORDS, k=rng.randrange(1, 60))) for _ in range(count)]
    return [" \t" if i % 11 == 5 else f" {t}\n" if i % 3 == 0 else t for i, t in enumerate(texts)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "words.model"
    path.write_bytes(encoding.train_tokenizer([" ".join(WORDS)] * 9, 330, caseops.OPERATORS))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "my.docs.jsonl", make_texts())


@pytest.fixture(autouse=True)
def many_batches(monkeypatch):
    monkeypatch.setattr(tokenize_corpus, "BATCH_BYTES", 600)


def run(corpus, out, *options, val_docs=VAL_DOCS, status=0):
    """Run the tool in this process; return the folder of the data set."""
    found = tokenize_corpus.main([
        str(corpus), "--out", str(out), "--name", "mine", "--val-docs", str(val_docs),
        "--shard-tokens", str(SHARD_TOKENS), *map(str, options)])
    assert found == status
    return out / "datasets/mine"


def files_of(out):
    """Return name and hash of all that lies under a folder."""
    return {p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(out.rglob("*")) if p.is_file()}


def stream_of(folder, split):
    """Return all shards of a split joined, and their lengths."""
    found = [shards.read_shard(p) for p in sorted(folder.glob(f"fineweb_{split}_[0-9]*.bin"))]
    return np.concatenate(found), [len(part) for part in found]


def documents_of(tokens):
    """Return a stream cut before each BOS, without it."""
    return [part[1:].tolist() for part in np.split(tokens, np.flatnonzero(tokens == 1)[1:])]


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(corpus, model, tmp_path_factory):
    """The files of one run without workers or accidents."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_corpus, "BATCH_BYTES", 600)
        out = tmp_path_factory.mktemp("undisturbed")
        run(corpus, out, "--tokenizer", model, "--workers", 1)
    return out


# ---- content -----------------------------------------------------------------------------------


def test_shards_are_the_documents_in_order_each_after_a_bos(undisturbed, model):
    processor, texts = encoding.load_processor(model), make_texts()
    folder = undisturbed / "datasets/mine"
    for split, part in (("val", texts[:VAL_DOCS]), ("train", texts[VAL_DOCS:])):
        expected = [t for text in part if (ids := processor.encode(text)) for t in (1, *ids)]
        found, sizes = stream_of(folder, split)
        assert found.tolist() == expected
        assert sizes == [SHARD_TOKENS] * (len(expected) // SHARD_TOKENS) + [
            len(expected) % SHARD_TOKENS]
    assert len(stream_of(folder, "train")[1]) > 3 and len(stream_of(folder, "val")[1]) > 1


def test_sidecar_holds_the_raw_bytes_of_each_token(undisturbed, model):
    processor = encoding.load_processor(model)
    expected, discarded = [], 0
    for text in make_texts()[:VAL_DOCS]:
        surface = encoding.surface_bytes(processor, text)
        if len(surface.token_ids):
            expected += [0, *surface.raw_bytes.tolist()]
            discarded += surface.discarded_edge_bytes
    folder = undisturbed / "datasets/mine"
    sidecar, sizes = stream_of(folder, "val_bytes")
    assert sidecar.tolist() == expected and sizes == stream_of(folder, "val")[1]
    counts = manifest_of(folder)["splits"]["val"]
    assert counts["surface_bytes"] == sum(expected) and counts["edge_bytes"] == discarded > 0


def test_manifest_counts_and_hashes_what_is_there(undisturbed, corpus, model):
    folder = undisturbed / "datasets/mine"
    manifest = manifest_of(folder)
    for name, entry in manifest["files"].items():
        assert shards.sha256_of(folder / name) == entry["sha256"]
        assert (folder / name).stat().st_size == entry["bytes"] == 1024 + 2 * entry["tokens"]
    assert sorted([*manifest["files"], "manifest.json"]) == sorted(os.listdir(folder))
    assert manifest["tokenizer_sha256"] == shards.sha256_of(model)
    assert (undisturbed / "tokenizers/mine.model").read_bytes() == model.read_bytes()
    assert manifest["docs_meta"]["inputs"][0]["sha256"] == shards.sha256_of(corpus)
    texts, splits = make_texts(), manifest["splits"]
    for part, chosen in (("val", texts[:VAL_DOCS]), ("train", texts[VAL_DOCS:])):
        dropped = [text for text in chosen if not text.strip()]
        assert splits[part]["documents"] == len(chosen) - len(dropped)
        assert splits[part]["dropped_documents"] == len(dropped) > 0
        total = splits[part]["bytes"] + splits[part]["dropped_bytes"]
        assert total == sum(len(text.encode()) for text in chosen)
        assert splits[part]["tokens"] == len(stream_of(folder, part)[0])
    stats = manifest["datasets"][0]["stats"]
    assert stats["docs_total"] == stats["docs_val"] + stats["docs_train"] == manifest["num_docs"]
    assert stats["files_train"] == len(list(folder.glob("fineweb_train_*.bin")))
    patterns = {key: manifest["datasets"][0][key] for key in ("val_glob", "val_bytes_glob")}
    assert len(list(undisturbed.glob(patterns["val_glob"]))) == stats["files_val"]
    assert len(list(undisturbed.glob(patterns["val_bytes_glob"]))) == stats["files_val"]


@given(texts=st.lists(UTF8_TEXT, min_size=3, max_size=8), use_caseops=st.booleans())
@settings(max_examples=20, deadline=None)
def test_any_documents_decode_to_their_normalised_text(model, tmp_path_factory, texts,
                                                       use_caseops):
    texts = ["first"] + texts + ["last"]  # each part needs one that yields tokens
    out = tmp_path_factory.mktemp("any")
    corpus = write_jsonl(out / "x.jsonl", texts)
    half = len(texts) // 2
    folder = run(corpus, out, "--tokenizer", model, *["--caseops"] * use_caseops, val_docs=half)
    processor = encoding.load_processor(model)
    seen = [caseops.to_caseops(text) for text in texts] if use_caseops else texts
    normalised = [encoding.normalised_text(processor, text) for text in seen]
    for split, part in (("val", normalised[:half]), ("train", normalised[half:])):
        decoded = processor.decode(documents_of(stream_of(folder, split)[0]))
        assert decoded == [text for text in part if text]
    counts = manifest_of(folder)["splits"]["val"]
    counted = int(stream_of(folder, "val_bytes")[0].sum(dtype=np.int64))
    raw = sum(len(text.encode()) for text in texts[:half])
    assert counted + counts["edge_bytes"] + counts.get("dropped_bytes", 0) == raw


def test_caseops_data_decodes_to_the_original_text(model, tmp_path):
    texts = ["The NASA iPhone", "in Z\u00fcrich", "The BROWN fox"]
    folder = run(write_jsonl(tmp_path / "x.jsonl", texts), tmp_path, "--tokenizer", model,
                 "--caseops", val_docs=2)
    processor = encoding.load_processor(model)
    tokens, sidecar = stream_of(folder, "val")[0], stream_of(folder, "val_bytes")[0]
    decoded = processor.decode(documents_of(tokens))
    assert [caseops.from_caseops(text) for text in decoded] == texts[:2]
    operators = [processor.piece_to_id(operator) for operator in caseops.OPERATORS]
    assert np.isin(tokens, operators).sum() == 4
    assert not sidecar[np.isin(tokens, [1, *operators])].any()
    assert sidecar.sum() == sum(len(text.encode()) for text in texts[:2])


def test_shuffling_touches_training_only_and_depends_on_the_seed_alone(
        corpus, model, undisturbed, tmp_path, monkeypatch):
    folders = {}
    for key, seed, bucket_bytes in (("a", 5, 1 << 30), ("b", 5, 999), ("c", 6, 999)):
        monkeypatch.setattr(documents, "BUCKET_BYTES", bucket_bytes)
        folders[key] = run(corpus, tmp_path / key, "--tokenizer", model, "--shuffle-seed", seed)
    plain = undisturbed / "datasets/mine"
    train = {key: stream_of(folder, "train")[0] for key, folder in folders.items()}
    assert train["a"].tolist() == train["b"].tolist() != train["c"].tolist()
    in_order = documents_of(stream_of(plain, "train")[0])
    for key in train:
        assert documents_of(train[key]) != in_order
        assert sorted(documents_of(train[key])) == sorted(in_order)
        assert stream_of(folders[key], "val")[0].tolist() == stream_of(plain, "val")[0].tolist()


def test_tokenizer_can_be_trained_here_on_training_text_alone(corpus, tmp_path):
    folder = run(corpus, tmp_path, "--train-tokenizer", "--vocab-size", 300)
    texts = [text.encode() for text in make_texts()[VAL_DOCS:]]
    given = [documents.Document(text, Path(), 1) for text in texts]
    sentences = tokenize_corpus.training_sentences(given, False, 10**9)
    expected = encoding.train_tokenizer(sentences, 300)
    assert (tmp_path / "tokenizers/mine.model").read_bytes() == expected
    assert manifest_of(folder)["datasets"][0]["vocab_size"] == 300


def test_long_documents_are_cut_for_the_trainer_and_not_lost():
    words = " ".join(f"w{i}" for i in range(5000))
    unbroken = "\u00e9" * 5000
    given = [documents.Document(text.encode(), Path(), 1) for text in (words, unbroken, "rest")]
    found = list(tokenize_corpus.training_sentences(given, False, 10**9))
    assert max(len(text.encode()) for text in found) <= tokenize_corpus.SENTENCE_BYTES
    assert "".join(found) == words + unbroken + "rest"
    assert len(list(tokenize_corpus.training_sentences(given, False, 1))) < len(found)


def test_training_script_divides_by_the_sidecar(undisturbed):
    train_gpt = pytest.importorskip("train_gpt")
    folder = undisturbed / "datasets/mine"
    config = train_gpt.load_config({
        "DATA_PATH": str(folder), "TOKENIZER_PATH": str(undisturbed / "tokenizers/mine.model"),
        "VOCAB_SIZE": "330", "EVAL_SEQ_LEN": "64", "EVAL_STRIDE": "16"})
    validation = train_gpt.load_validation(config)
    counts = manifest_of(folder)["splits"]["val"]
    assert validation.denominator == "sidecar"
    assert int(validation.target_bytes.sum(dtype=np.int64)) == counts["surface_bytes"]
    assert validation.table_bytes == counts["table_bytes"]


# ---- the same bytes however it runs ------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, 5])
def test_workers_change_nothing(corpus, model, undisturbed, tmp_path, workers):
    run(corpus, tmp_path, "--tokenizer", model, "--workers", workers)
    assert files_of(tmp_path) == files_of(undisturbed)


class Killer:
    """Ends its process by SIGKILL before the n-th file is opened for writing, renamed, removed."""

    EVENTS = "os.rename", "os.remove", "os.mkdir", "os.truncate"

    def __init__(self, countdown):
        self.countdown = countdown

    def __call__(self, event, args):
        is_write = event == "open" and isinstance(args[1], str) and args[1].strip("rbt")
        if is_write or event in self.EVENTS:
            self.countdown -= 1
            if self.countdown == 0:
                os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def child(action):
    """Run an action in a forked process, silently; yield its id, then wait for it."""
    pid = os.fork()
    if not pid:
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            os._exit(action())
        finally:
            os._exit(99)
    yield pid


def status_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def command(corpus, out, *options):
    return [str(corpus), "--out", str(out), "--name", "mine", "--val-docs", str(VAL_DOCS),
            "--shard-tokens", str(SHARD_TOKENS), *map(str, options)]


def check_final_names(out, undisturbed):
    """Whatever carries a final name, manifests of another moment aside, is complete."""
    expected = files_of(undisturbed)
    for name, digest in files_of(out).items():
        if ".part" not in name and not name.endswith("progress.json"):
            assert digest == expected[name], name


@pytest.mark.parametrize("options", [(), ("--shuffle-seed", "5")], ids=["ordered", "shuffled"])
def test_kill_before_any_file_operation_changes_nothing(model, tmp_path, options):
    options = ("--tokenizer", model, *options)
    corpus = write_jsonl(tmp_path / "x.jsonl", make_texts(24))
    assert tokenize_corpus.main(command(corpus, tmp_path / "whole", *options)) == 0
    for moment in range(1, 1000):
        out = tmp_path / f"killed{moment}"

        def action():
            sys.addaudithook(Killer(moment))  # noqa: B023
            return tokenize_corpus.main(command(corpus, out, *options))  # noqa: B023

        with child(action) as pid:
            status = status_of(pid)
        check_final_names(out, tmp_path / "whole")
        if status == 0:
            break
        assert status == -signal.SIGKILL
        assert tokenize_corpus.main(command(corpus, out, *options)) == 0
        assert files_of(out) == files_of(tmp_path / "whole"), moment
    assert moment > 30


def test_kills_at_random_times_change_nothing(corpus, model, undisturbed, tmp_path):
    rng, options = random.Random(1), ("--tokenizer", model, "--workers", 2)

    def action():
        write_shard = shards.ShardWriter.add
        # slow enough that the kill meets every stage
        shards.ShardWriter.add = lambda self, tokens: (time.sleep(0.01),
                                                       write_shard(self, tokens))
        return tokenize_corpus.main(command(corpus, tmp_path, *options))

    for kills in range(40):  # noqa: B007
        with child(action) as pid:
            time.sleep(rng.uniform(0.01, 0.2))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            status = status_of(pid)
        check_final_names(tmp_path, undisturbed)
        if status == 0:
            break
    assert kills > 1
    assert tokenize_corpus.main(command(corpus, tmp_path, *options)) == 0
    assert files_of(tmp_path) == files_of(undisturbed)


def test_finished_data_is_left_alone(corpus, model, undisturbed, capsys, monkeypatch):
    monkeypatch.setattr(tokenize_corpus, "build", lambda *_: pytest.fail("built again"))
    run(corpus, undisturbed, "--tokenizer", model)
    assert "built already" in capsys.readouterr().out


def interrupted(corpus, model, out, monkeypatch, after=4):
    """Leave a run stopped by Ctrl-C after some finished shards."""
    finish, count = tokenize_corpus.PartWriter.finish_shard, [0]

    def stop(self, offset):
        finish(self, offset)
        count[0] += 1
        if count[0] == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokenize_corpus.PartWriter, "finish_shard", stop)
        run(corpus, out, "--tokenizer", model, status=130)
    assert list((out / "datasets/mine").glob("fineweb_train_*.bin"))


CHANGES = {
    "val_docs": ["--val-docs", "8"], "shard_tokens": ["--shard-tokens", "300"],
    "shuffle_seed": ["--shuffle-seed", "1"], "caseops": ["--caseops"],
    "sidecar": ["--no-sidecar"],
}


@pytest.mark.parametrize("setting", [*CHANGES, "tokenizer", "inputs"])
@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_never_mix_with_what_is_there(corpus, model, tmp_path, monkeypatch, capsys,
                                                     setting, finished):
    out, options, given = tmp_path / "out", ["--tokenizer", model], corpus
    if finished:
        run(corpus, out, *options)
    else:
        interrupted(corpus, model, out, monkeypatch)
    before = files_of(out)
    if setting == "tokenizer":
        options = ["--train-tokenizer", "--vocab-size", 300]
    elif setting == "inputs":
        given = write_jsonl(tmp_path / corpus.name, [*make_texts()[:-1], "changed"])
    else:
        options += CHANGES[setting]
    capsys.readouterr()
    run(given, out, *options, status=1)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"({setting} was" in error and "--fresh" in error
    assert files_of(out) == before
    run(given, out, *options, "--fresh")
    run(given, tmp_path / "other", *options)
    assert files_of(out) == files_of(tmp_path / "other")


@pytest.mark.parametrize("name", ["datasets/mine/fineweb_val_000000.bin", "tokenizers/mine.model"])
@pytest.mark.parametrize("finished", [False, True])
def test_changed_or_missing_product_is_noticed(corpus, model, tmp_path, monkeypatch, capsys, name,
                                               finished):
    if finished:
        run(corpus, tmp_path, "--tokenizer", model)
    else:
        interrupted(corpus, model, tmp_path, monkeypatch)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-1])
    run(corpus, tmp_path, "--tokenizer", model, status=1)
    assert "has changed" in capsys.readouterr().err
    path.unlink()
    run(corpus, tmp_path, "--tokenizer", model, status=1)
    assert "is missing" in capsys.readouterr().err
    run(corpus, tmp_path, "--tokenizer", model, "--fresh")


@pytest.mark.parametrize("fresh", [(), ("--fresh",)])
def test_files_of_others_are_never_touched(corpus, model, tmp_path, capsys, fresh):
    folder = tmp_path / "datasets/mine"
    folder.mkdir(parents=True)
    (folder / "fineweb_train_000000.bin").write_bytes(b"precious")
    before = files_of(tmp_path)
    run(corpus, tmp_path, "--tokenizer", model, *fresh, status=1)
    assert "from elsewhere" in capsys.readouterr().err and files_of(tmp_path) == before
    (folder / "fineweb_train_000000.bin").unlink()
    (tmp_path / "tokenizers/mine.model").write_bytes(b"precious")
    before = files_of(tmp_path)
    run(corpus, tmp_path, "--tokenizer", model, *fresh, status=1)
    assert "another tokenizer" in capsys.readouterr().err and files_of(tmp_path) == before


@pytest.mark.parametrize("name", ["manifest.json", "progress.json"])
@pytest.mark.parametrize("content", [
    "3", '{"settings": 3}', '{"settings": {}}', '{"settings": {}, "files": []}',
    '{"settings": {}, "files": {"a": 3}, "tokenizer_sha256": ""}', "[" * 100_000])
def test_json_of_others_is_none_of_ours(corpus, model, undisturbed, tmp_path, capsys, name,
                                        content):
    folder = tmp_path / "datasets/mine"
    folder.mkdir(parents=True)
    (folder / name).write_text(content)
    shard = folder / "fineweb_train_000000.bin"
    shard.write_bytes(b"precious")
    run(corpus, tmp_path, "--tokenizer", model, status=1)
    assert "from elsewhere" in capsys.readouterr().err
    shard.unlink()
    run(corpus, tmp_path, "--tokenizer", model)
    assert files_of(tmp_path) == files_of(undisturbed)


def test_two_runs_do_not_write_into_one_folder(corpus, model, tmp_path, capsys):
    product = tokenize_corpus.Product(tmp_path, "mine")
    with product.locked():
        run(corpus, tmp_path, "--tokenizer", model, status=1)
    assert "another run is writing here" in capsys.readouterr().err
    run(corpus, tmp_path, "--tokenizer", model)


# ---- faults ------------------------------------------------------------------------------------


def one_line_of(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("tokenize_corpus: "), error
    return error


def test_full_disk_is_one_line_and_the_run_goes_on_later(model, tmp_path):
    def action():
        sys.stderr = open(tmp_path / "error", "w", buffering=1)
        # as a full disk: the tokenizer and the validation shard fit, the training shard does not
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(model.read_bytes()) + 10_000, -1))
        return tokenize_corpus.main(command(corpus, out, *options))

    corpus, out = write_jsonl(tmp_path / "x.jsonl", make_texts(2000)), tmp_path / "out"
    options = "--tokenizer", model, "--shard-tokens", 10**8
    assert tokenize_corpus.main(command(corpus, tmp_path / "whole", *options)) == 0
    with child(action) as pid:
        assert status_of(pid) == 1
    error = (tmp_path / "error").read_text()
    assert error.count("\n") == 1 and "File too large" in error and "goes on" in error
    assert not list(out.rglob("*.part")) and list(out.rglob("fineweb_val_000000.bin"))
    check_final_names(out, tmp_path / "whole")
    assert tokenize_corpus.main(command(corpus, out, *options)) == 0
    assert files_of(out) == files_of(tmp_path / "whole")


def test_folder_that_cannot_be_written_is_one_line(corpus, model, tmp_path, capsys):
    (tmp_path / "file").touch()
    run(corpus, tmp_path / "file", "--tokenizer", model, status=1)
    assert "--out" in one_line_of(capsys)


def test_too_few_documents_for_validation_are_told_before_any_work(corpus, model, tmp_path,
                                                                   capsys):
    run(corpus, tmp_path / "out", "--tokenizer", model, val_docs=60, status=1)
    assert "only 60 documents" in (error := one_line_of(capsys)) and "--val-docs" in error
    assert not (tmp_path / "out").exists()


def test_fault_in_the_text_names_its_line_and_leaves_nothing_half_written(model, undisturbed,
                                                                          corpus, tmp_path, capsys):
    good, out = corpus.read_bytes(), tmp_path / "out"
    bad = tmp_path / corpus.name
    bad.write_bytes(good + b'{"text": "cut')
    run(bad, out, "--tokenizer", model, status=1)
    assert f"{bad}, line 61: not a JSON object" in one_line_of(capsys)
    check_final_names(out, undisturbed)
    assert not list(out.rglob("*.part")) and not list(out.rglob("manifest.json"))
    bad.write_bytes(good)
    run(bad, out, "--tokenizer", model, "--fresh")
    assert files_of(out) == files_of(undisturbed)


def test_corpus_without_text_is_refused(model, tmp_path, capsys):
    run(write_jsonl(tmp_path / "x.jsonl", ["a", " ", "\n"]), tmp_path, "--tokenizer", model,
        val_docs=1, status=1)
    assert "no document of the train part yields a token" in one_line_of(capsys)


def test_token_longer_than_a_sidecar_can_say_is_refused(model, tmp_path, capsys):
    texts = ["good", "white" + " " * 65_537 + "space", "rest"]
    path = write_jsonl(tmp_path / "x.jsonl", texts)
    run(path, tmp_path, "--tokenizer", model, val_docs=2, status=1)
    error = one_line_of(capsys)
    assert "line 2" in error and "65535" in error and "--no-sidecar" in error
    run(path, tmp_path, "--tokenizer", model, "--no-sidecar", val_docs=2)


def test_operator_in_plain_text_of_a_caseops_tokenizer_is_refused(model, tmp_path, capsys):
    """Its sidecar could not be told from one that counts operators; CaseOps marks it."""
    path = write_jsonl(tmp_path / "x.jsonl", ["good", "an \ue002 itself", "rest"])
    for options in ((), ("--no-sidecar",)):
        run(path, tmp_path, "--tokenizer", model, *options, val_docs=2, status=1)
        assert "line 2" in (error := one_line_of(capsys)) and "--caseops" in error
    run(path, tmp_path, "--tokenizer", model, "--caseops", val_docs=2)


def test_controls_beyond_what_a_sidecar_is_believed_are_refused_here_first(model, tmp_path,
                                                                           capsys):
    texts = ["good", "dogs" + "\x01" * 3000 + "lazy", "rest"]
    path = write_jsonl(tmp_path / "x.jsonl", texts)
    run(path, tmp_path, "--tokenizer", model, val_docs=2, status=1)
    assert "line 2" in (error := one_line_of(capsys)) and "control characters" in error


# ---- advice ------------------------------------------------------------------------------------


def test_one_text_file_is_told_of_txt_lines_and_not_of_its_own_number(model, tmp_path, capsys):
    path = tmp_path / "book.txt"
    path.write_text("\n".join(text for text in make_texts() if text.strip()))
    run(path, tmp_path, "--tokenizer", model, val_docs=1, status=1)
    error = one_line_of(capsys)
    assert "only 1 document," in error and "--txt-lines" in error
    assert "say --val-docs" not in error
    run(path, tmp_path, "--tokenizer", model, "--txt-lines", val_docs=1)


@pytest.mark.parametrize("count, val_docs", [(2, 2), (60, 60), (300, 50_000)])
def test_number_that_is_advised_works(model, tmp_path, capsys, count, val_docs):
    path = write_jsonl(tmp_path / "x.jsonl", ["The quick fox"] * count)
    run(path, tmp_path, "--tokenizer", model, val_docs=val_docs, status=1)
    error = one_line_of(capsys)
    assert "--txt-lines" not in error
    advised = int(error.split("say --val-docs ")[1].split()[0])
    run(path, tmp_path, "--tokenizer", model, val_docs=advised)


def test_fewer_pieces_than_asked_for_are_said(tmp_path, capsys):
    path = write_jsonl(tmp_path / "x.jsonl", [text for text in make_texts() if text.strip()])
    run(path, tmp_path, "--train-tokenizer", "--vocab-size", 2048)
    told = capsys.readouterr().out
    pieces = manifest_of(tmp_path / "datasets/mine")["datasets"][0]["vocab_size"]
    assert pieces < 2048 and f"has {pieces} pieces, not the 2,048 of --vocab-size" in told
    run(path, tmp_path / "exact", "--train-tokenizer", "--vocab-size", 300)
    assert "of --vocab-size" not in capsys.readouterr().out


def test_text_too_small_for_a_tokenizer_is_not_told_to_train_one(tmp_path, capsys):
    run(write_jsonl(tmp_path / "x.jsonl", ["ab", "ab"]), tmp_path, "--train-tokenizer",
        "--vocab-size", 300, val_docs=1, status=1)
    error = one_line_of(capsys)
    assert "--train-tokenizer" not in error and "give more" in error


def test_backups_in_the_folder_are_left_alone(corpus, model, undisturbed, tmp_path):
    folder = run(corpus, tmp_path, "--tokenizer", model)
    backup = folder / "fineweb_val_000000_old.bin"
    backup.write_bytes(b"precious")
    run(corpus, tmp_path, "--tokenizer", model, "--fresh")
    assert backup.read_bytes() == b"precious"
    backup.unlink()
    assert files_of(tmp_path) == files_of(undisturbed)


def test_tokenizer_without_operators_cannot_write_caseops(corpus, tmp_path, capsys):
    path = tmp_path / "plain.model"
    path.write_bytes(encoding.train_tokenizer([" ".join(WORDS)] * 9, 330))
    run(corpus, tmp_path, "--tokenizer", path, "--caseops", status=1)
    assert "CaseOps operators" in one_line_of(capsys)


@pytest.mark.parametrize("options", [
    [], ["--train-tokenizer"], ["--tokenizer", "x.model", "--vocab-size", "5"],
    ["--tokenizer", "x.model", "--train-tokenizer", "--vocab-size", "999"],
    ["--tokenizer", "x.model", "--caseops", "--no-sidecar"],
    ["--tokenizer", "x.model", "--val-docs", "0"], ["--tokenizer", "x.model", "--name", "a/b"],
], ids=" ".join)
def test_contradicting_options_are_a_usage_error(corpus, capsys, options):
    with pytest.raises(SystemExit) as caught:
        tokenize_corpus.main([str(corpus), *options])
    assert caught.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_missing_package_is_one_line_with_its_remedy(corpus, monkeypatch, capsys):
    monkeypatch.setattr(tokenize_corpus, "MISSING", "sentencepiece")
    assert tokenize_corpus.main([str(corpus), "--tokenizer", "x.model"]) == 1
    assert "pip install -r data/requirements.txt" in one_line_of(capsys)


def test_last_line_is_the_training_command(corpus, model, tmp_path, capsys):
    out = tmp_path / "a folder"
    run(corpus, out, "--tokenizer", model)
    told = capsys.readouterr().out
    assert "PRESET=demo" in told
    words = shlex.split(told.splitlines()[-1])
    found = dict(word.split("=", 1) for word in words if "=" in word)
    assert words[3:] == ["python", "train_gpt.py"] and found["VOCAB_SIZE"] == "330"
    assert Path(found["DATA_PATH"], "manifest.json").is_file()
    assert Path(found["TOKENIZER_PATH"]).read_bytes() == model.read_bytes()


def test_name_defaults_to_the_first_input(corpus):
    args = tokenize_corpus.parse_args([str(corpus), "--tokenizer", "x.model"])
    assert args.name == "my.docs" and args.val_docs == 50_000 and args.shuffle_seed is None
