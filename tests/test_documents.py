"""Laws of reading documents: every format gives the same texts, every fault its file and line."""

import gzip
import json
import lzma
import re
import tracemalloc
from pathlib import Path

import documents
import pytest
from documents import DataError, Document, Source, find_files, read_documents
from hypothesis import given
from hypothesis import strategies as st

TEXTS = ["plain", "two\nlines \u00e9\U0001f600", "", "\u2028 \x85 \x00 \r\n end"]
UTF8_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def jsonl(texts):
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def zstd_compress(content):
    try:
        from compression import zstd
    except ImportError:
        zstd = pytest.importorskip("backports.zstd", reason="needs backports.zstd to write .zst")
    return zstd.compress(content)


PACKERS = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress, ".zst": zstd_compress}


def texts_of(path, source=Source()):  # noqa: B008
    return [document.text.decode() for document in read_documents([path], source)]


def fault_of(path, source=Source()):  # noqa: B008
    with pytest.raises(DataError) as caught:
        texts_of(path, source)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


# ---- what is read ------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("ending", [b"\n", b"", b"\r\n", b"\n\n \n"])
def test_every_packing_gives_the_same_documents(tmp_path, packing, ending):
    path = tmp_path / f"docs.jsonl{packing}"
    path.write_bytes(PACKERS[packing](b"\xef\xbb\xbf" + jsonl(TEXTS)[:-1] + ending))
    found = list(read_documents([path], Source()))
    assert [d.text.decode() for d in found] == TEXTS
    assert [d.line for d in found] == [1, 2, 3, 4]


@pytest.mark.parametrize("packing", PACKERS)
def test_text_file_is_one_document_or_one_a_line(tmp_path, packing):
    path = tmp_path / f"book.txt{packing}"
    path.write_bytes(PACKERS[packing]("\ufeffone\r\n\n two \u00e9\n".encode()))
    assert texts_of(path) == ["one\r\n\n two \u00e9\n"]
    found = list(read_documents([path], Source(txt_lines=True)))
    assert [(d.text.decode(), d.line) for d in found] == [("one", 1), (" two \u00e9", 3)]


@given(st.lists(UTF8_TEXT, min_size=1), st.booleans())
def test_json_gives_any_text_back(tmp_path_factory, texts, ascii_only):
    path = tmp_path_factory.mktemp("json") / "docs.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=ascii_only) for text in texts]
    path.write_bytes("\n".join(lines).encode())
    assert texts_of(path) == texts


def test_parquet_column_is_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "docs.parquet"
    parquet.write_table(pyarrow.table({"body": TEXTS * 200}), path, row_group_size=300)
    assert texts_of(path, Source(text_key="body")) == TEXTS * 200
    assert "it has body" in fault_of(path)
    parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    assert "row 2" in fault_of(path)
    path.write_bytes(path.read_bytes()[:-9])
    assert "cannot be read" in fault_of(path)


def test_files_keep_the_order_given_and_folders_are_sorted(tmp_path):
    for name in ("b/2.txt", "b/1.jsonl", "b/c/0.txt.gz", "b/notes.md", "a.jsonl.xz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_files([tmp_path / "b", tmp_path / "a.jsonl.xz"])
    assert [p.relative_to(tmp_path).as_posix() for p in found] == [
        "b/1.jsonl", "b/2.txt", "b/c/0.txt.gz", "a.jsonl.xz"]


def test_what_cannot_be_read_is_refused_before_reading(tmp_path):
    (tmp_path / "x.md").touch()
    (tmp_path / "x.txt").touch()
    for inputs, message in [(["none.jsonl"], "no such"), (["x.md"], "must end in"),
                            (["x.txt", "x.txt"], "read twice"), ([".", "x.txt"], "read twice")]:
        with pytest.raises(DataError, match=message):
            find_files([tmp_path / name for name in inputs])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no file in this folder"):
        find_files([tmp_path / "empty"])


@pytest.mark.parametrize("suffix", [".py", ".md", ".html", ""])
def test_advice_for_other_names_can_be_followed(tmp_path, suffix):
    """A folder of such files, or one that is named, is told what would be read."""
    path = tmp_path / f"x{suffix}"
    path.write_text("some text")
    for named in (tmp_path, path):
        with pytest.raises(DataError) as caught:
            find_files([named])
        assert "name the files" not in str(caught.value)
        assert "names ending in .txt (x.py as x.py.txt" in str(caught.value)
    path.rename(tmp_path / f"x{suffix}.txt")
    assert texts_of(find_files([tmp_path])[0]) == ["some text"]
    (tmp_path / "all.jsonl").write_text('{"text": "..."}')
    assert texts_of(tmp_path / "all.jsonl") == ["..."]


# ---- faults ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("line", "message"), [
    (b'{"text": "cut', "not a JSON object .*cut short"),
    (b'{"text": "\xff"}', "byte 11 .*0xff, no valid UTF-8"),
    (b'{"text": "\xed\xa0\x80"}', "no valid UTF-8"),
    (b'{"text": "ab\\ud800"}', "character 3 of the text is U\\+D800"),
    (b'{"body": "x", "id": 1}', "it has body, id; name the right key with --text-key"),
    (b'{"text": 5}', "is a string"),
    (b'["text"]', "it is a list"),
    (b"[" * 100_000, "not a JSON object"),
], ids=["cut", "bytes", "surrogate bytes", "surrogate", "key", "type", "list", "deep"])
def test_fault_in_a_json_line_names_file_and_line(tmp_path, line, message):
    path = tmp_path / "docs.jsonl"
    path.write_bytes(jsonl(["good", "good"]) + line + b"\n" + jsonl(["good"]))
    assert re.search(f"line 3: .*{message}", fault_of(path))


def test_invalid_bytes_in_a_text_file_name_the_line_within(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(b"one\ntwo\nthr\xffee\n")
    assert "line 3" in fault_of(path) and "line 3" in fault_of(path, Source(txt_lines=True))


@pytest.mark.parametrize("packing", [".xz", ".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "changed", "another format"])
def test_damaged_archive_is_noticed(tmp_path, packing, damage):
    path = tmp_path / f"docs.jsonl{packing}"
    packed = bytearray(PACKERS[packing](jsonl(str(i ** 5) * 9 for i in range(3000))))
    if damage == "cut":
        del packed[len(packed) // 2:]
    elif damage == "changed":
        packed[len(packed) // 2] ^= 0xFF
    else:
        packed[:] = b"no archive at all, but long enough"
    path.write_bytes(packed)
    assert re.search("damaged|JSON|UTF-8", fault_of(path))


@pytest.mark.parametrize(("name", "source", "content", "remedy"), [
    ("a.jsonl", {}, jsonl(["x" * 1001]), "--max-document-mb"),
    ("a.jsonl", {}, b'{"text": "' + b"x" * 1_000_000, "--max-document-mb"),
    ("a.txt", {}, b"x" * 1001, "--txt-lines"),
    ("a.txt", {"txt_lines": True}, b"x" * 1001, "--max-document-mb"),
])
def test_oversized_document_is_refused(tmp_path, name, source, content, remedy):
    path = tmp_path / name
    path.write_bytes(content)
    message = fault_of(path, Source(max_document_bytes=1000, **source))
    assert "line 1" in message and "limit of 1000 bytes" in message and remedy in message


@pytest.mark.parametrize(("name", "source"), [
    ("a.jsonl", {}), ("a.txt", {}), ("a.txt", {"txt_lines": True})])
def test_document_as_large_as_the_limit_is_read(tmp_path, name, source):
    path = tmp_path / name
    path.write_bytes(jsonl(["\x01" * 1000]) if name == "a.jsonl" else b"\x01" * 1000)
    assert texts_of(path, Source(max_document_bytes=1000, **source)) == ["\x01" * 1000]


def test_hundred_megabytes_are_refused_without_reading_them(tmp_path):
    path = tmp_path / "huge.txt"
    with open(path, "wb") as file:
        file.truncate(100_000_000)
    tracemalloc.start()
    try:
        assert "larger than the limit" in fault_of(path)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


# ---- shuffling ---------------------------------------------------------------------------------


def some_documents(count):
    return [Document(f"text {i}".encode(), Path("p"), i) for i in range(count)]


@pytest.mark.parametrize("expected_bytes", [0, 5 * documents.BUCKET_BYTES, 1 << 60])
def test_shuffle_is_the_order_of_its_keys_in_any_number_of_files(tmp_path, expected_bytes):
    given = some_documents(300)
    folder = tmp_path / "shuffle.part"
    found = list(documents.shuffled(iter(given), 7, folder, expected_bytes))
    assert found == sorted(given, key=lambda d: documents.shuffle_key(7, d.line))
    assert found != given and not folder.exists()
    assert found != list(documents.shuffled(given, 8, folder, expected_bytes))


@given(st.lists(st.tuples(st.binary(max_size=40), st.sampled_from(["a", "b c/\u00e9", "\udcff"]),
                          st.integers(0, 2**40)), max_size=9), st.integers())
def test_shuffling_gives_every_document_back_as_it_was(tmp_path_factory, found, seed):
    given = [Document(text, Path(path), line) for text, path, line in found]
    folder = tmp_path_factory.mktemp("shuffle") / "shuffle.part"
    again = list(documents.shuffled(given, seed, folder, 3 * documents.BUCKET_BYTES))
    keys = [documents.shuffle_key(seed, i) for i in range(len(given))]
    assert again == [given[i] for i in sorted(range(len(given)), key=keys.__getitem__)]


def test_shuffle_left_unfinished_leaves_no_files(tmp_path):
    folder = tmp_path / "shuffle.part"
    stream = documents.shuffled(some_documents(10), 7, folder, 0)
    next(stream)
    assert folder.exists()
    stream.close()
    assert not folder.exists()
