"""Laws of the download tool, with the real huggingface_hub client against a local hub."""

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import hub_server
import numpy as np
import pytest

pytest.importorskip("huggingface_hub")

import cached_challenge_fineweb as download  # noqa: E402
import catalogue  # noqa: E402
import hub as hub_module  # noqa: E402
import integrity  # noqa: E402
import shards  # noqa: E402

DATA = Path(__file__).resolve().parents[1] / "data"
VARIANT = catalogue.VARIANTS["sp8192"]
CASEOPS = catalogue.VARIANTS[catalogue.CASEOPS]
FOLDER = f"datasets/{VARIANT.folder}"
VAL = f"{VARIANT.folder}/fineweb_val_000000.bin"
SHARD_BYTES = 1024 + 2 * 30_000


def shard(num_tokens=30_000, seed=0):
    header = np.zeros(256, "<i4")
    header[:3] = shards.MAGIC, shards.VERSION, num_tokens
    tokens = np.random.default_rng(seed).integers(4, 8192, num_tokens, dtype=np.uint16)
    return header.tobytes() + tokens.astype("<u2").tobytes()


def manifest_of(*variants, model_path=None):
    entries = [dict(name=Path(v.folder).name, tokenizer_name=f"tok_{v.name}", path=v.folder)
               for v in variants]
    tokenizers = [dict(name=f"tok_{v.name}", model_path=model_path or v.tokenizer)
                  for v in variants]
    return json.dumps(dict(version=1, datasets=entries, tokenizers=tokenizers)).encode()


def repository(variant, num_train=5, **changes):
    """Return the files of a repository that hosts one variant; a change of None removes one."""
    names = ["val_000000", *(f"train_{i:06d}" for i in range(num_train))]
    names += ["val_bytes_000000"] if variant.has_sidecar else []
    files = {f"datasets/{variant.folder}/fineweb_{name}.bin": hub_server.stored(shard(seed=i))
             for i, name in enumerate(names)}
    files[f"datasets/{variant.tokenizer}"] = hub_server.stored(b"a tokenizer", is_lfs=False)
    files["datasets/manifest.json"] = hub_server.stored(manifest_of(variant), is_lfs=False)
    files["README.md"] = hub_server.stored(b"hello", is_lfs=False)
    return files


@pytest.fixture
def hub(monkeypatch):
    """A running hub that hosts sp8192 in the catalogue's repository."""
    state = hub_server.Hub({VARIANT.repository: repository(VARIANT)})
    server = hub_server.start(state)
    monkeypatch.setenv("HF_ENDPOINT", state.url)
    monkeypatch.setattr("hub.RETRY_SECONDS", 0.001)
    for name in ("MATCHED_FINEWEB_REPO_ID", "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "DATA_DIR",
                 "HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetch(tmp_path, capsys):
    """Return a function that runs the tool into tmp_path and gives (exit code, its lines)."""
    def call(*options):
        code = download.main(["--data-dir", str(tmp_path), *map(str, options)])
        told = capsys.readouterr()
        return code, told.out + told.err
    return call


def tool(root, *options, **environment):
    """Start the tool as users do, in a process of its own with an empty home."""
    env = {**os.environ, "HF_HOME": str(root / "home"), **environment}
    return subprocess.Popen([sys.executable, str(DATA / "cached_challenge_fineweb.py"),
                             "--data-dir", str(root / "data"), *options], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def files_of(root):
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def put(hub, path, file, repo=VARIANT.repository):
    hub.repositories[repo][path] = file


# ---- what arrives ------------------------------------------------------------------------------


def test_files_land_where_train_gpt_looks_and_equal_the_hubs(hub, fetch, tmp_path):
    code, told = fetch("--variant", "sp8192", "--train-shards", 3)
    assert code == 0, told
    expected = {VAL, VARIANT.tokenizer, f"{VARIANT.folder}/{integrity.RECORD_NAME}",
                *(f"{VARIANT.folder}/fineweb_train_{i:06d}.bin" for i in range(3))}
    assert files_of(tmp_path) == expected
    import train_gpt
    config = train_gpt.load_config({"DATA_DIR": str(tmp_path)})
    assert config.shard_dir == tmp_path / VARIANT.folder
    assert config.tokenizer_file == tmp_path / VARIANT.tokenizer
    for key in expected - {f"{VARIANT.folder}/{integrity.RECORD_NAME}"}:
        hosted = hub.repositories[VARIANT.repository][f"datasets/{key}"]
        assert (tmp_path / key).read_bytes() == hosted.content


def test_all_shards_come_over_several_pages_when_no_number_is_given(hub, fetch, tmp_path):
    assert fetch()[0] == 0
    assert len(list(tmp_path.rglob("fineweb_train_*.bin"))) == 5 > hub_server.PAGE_ENTRIES


@pytest.mark.parametrize("options", [("3",), ("--train-shards", "3"), ("sp8192", "--train-shards",
                                                                      "3")])
def test_published_ways_to_ask_for_shards_are_understood(hub, fetch, tmp_path, options):
    assert fetch(*options)[0] == 0
    assert len(list(tmp_path.rglob("fineweb_train_*.bin"))) == 3


def test_second_run_downloads_nothing(hub, fetch):
    assert fetch()[0] == 0
    before = len(hub.downloads())
    code, told = fetch()
    assert code == 0 and len(hub.downloads()) == before and "0 files fetched" in told


def test_more_shards_later_fetch_only_those(hub, fetch):
    assert fetch("--train-shards", 2)[0] == 0
    before = hub.sent_bytes
    assert fetch("--train-shards", 4)[0] == 0
    assert hub.sent_bytes - before == 2 * SHARD_BYTES


def test_files_of_another_tool_are_hashed_and_kept_when_right(hub, fetch, tmp_path):
    path = tmp_path / VAL
    path.parent.mkdir(parents=True)
    path.write_bytes(hub.repositories[VARIANT.repository][f"datasets/{VAL}"].content)
    assert fetch("--train-shards", 0)[0] == 0 and hub.sent_bytes == 0


@pytest.mark.parametrize("changes", [
    dict(files={VAL: {}}), dict(files={VAL: 3}), dict(files=[]), dict(files=None),
    dict(published=3), dict(published=dict(model_path=["x"])), dict(published=dict(model_path=3))],
    ids=str)
def test_another_tools_record_is_not_believed(hub, fetch, tmp_path, changes):
    assert fetch("--train-shards", 0)[0] == 0
    path = tmp_path / VARIANT.folder / integrity.RECORD_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    code, told = fetch("--train-shards", 0)
    assert code == 0 and "0 files fetched" in told
    assert ("hashing" in told) == ("files" in changes)


def test_a_hubs_manifest_of_another_form_leaves_the_catalogues_tokenizer(hub, fetch):
    put(hub, "datasets/manifest.json", hub_server.stored(
        manifest_of(VARIANT, model_path=["x"]), is_lfs=False))
    assert fetch("--train-shards", 0)[0] == 0


def test_a_changed_file_is_named_and_replaced(hub, fetch, tmp_path):
    assert fetch("--train-shards", 0)[0] == 0
    path = tmp_path / VAL
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    code, told = fetch("--train-shards", 0)
    assert code == 0 and path.read_bytes() == content
    assert f"{path}: has {len(content) - 2} bytes" in told


def test_rehash_finds_what_size_and_time_do_not_show(hub, fetch, tmp_path):
    assert fetch("--train-shards", 0)[0] == 0
    path = tmp_path / VAL
    content, times = path.read_bytes(), path.stat()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "0 files fetched" in fetch("--train-shards", 0)[1]
    assert "sha256" in fetch("--train-shards", 0, "--rehash")[1]
    assert path.read_bytes() == content


def test_caseops_brings_its_sidecar_and_says_how_to_train(hub, fetch, tmp_path):
    hub.repositories[CASEOPS.repository] = repository(CASEOPS)
    code, told = fetch("--variant", "caseops", "--train-shards", 1)
    assert code == 0
    assert (tmp_path / CASEOPS.folder / "fineweb_val_bytes_000000.bin").is_file()
    assert f"TOKENIZER_PATH={tmp_path / CASEOPS.tokenizer}" in told


@pytest.mark.parametrize("variant", ["sp8192", "sp4096", "caseops"])
def test_printed_command_holds_paths_with_spaces_together(variant, tmp_path):
    chosen, root = catalogue.find_variant(variant), tmp_path / "a folder"
    words = shlex.split(download.run_line(root, chosen))
    assert words[-2:] == ["python", "train_gpt.py"]
    paths = [word.split("=", 1)[1] for word in words[:-2] if not word.startswith("VOCAB_SIZE=")]
    assert paths and all(Path(path).is_relative_to(root) for path in paths)


def test_documents_come_from_their_own_repository(hub, fetch, tmp_path):
    hub.repositories[catalogue.DOCUMENTS.repository] = {
        "datasets/docs_selected.jsonl": hub_server.stored(b'{"text": "a"}\n'),
        "datasets/docs_selected.source_manifest.json": hub_server.stored(b"{}", is_lfs=False)}
    code, told = fetch("--train-shards", 0, "--with-docs")
    assert code == 0 and (tmp_path / "docs_selected.jsonl").read_bytes() == b'{"text": "a"}\n'
    assert "taking it from" in told and "another list than the known one" in told


def test_tokenizer_path_of_the_manifest_beats_the_catalogues(hub, fetch, tmp_path):
    put(hub, "datasets/manifest.json",
        hub_server.stored(manifest_of(VARIANT, model_path="tokenizers/newer.model"), is_lfs=False))
    put(hub, "datasets/tokenizers/newer.model", hub_server.stored(b"newer", is_lfs=False))
    assert fetch("--train-shards", 0)[0] == 0
    assert (tmp_path / VARIANT.tokenizer).read_bytes() == b"newer"
    assert fetch("--train-shards", 0, "--skip-manifest")[0] == 0
    assert (tmp_path / VARIANT.tokenizer).read_bytes() == b"a tokenizer"


def test_environment_chooses_repository_and_prefix(hub, fetch, monkeypatch):
    moved = {path.replace("datasets/", "mine/", 1): file
             for path, file in repository(VARIANT).items()}
    hub.repositories = {"some/where": moved}
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "some/where")
    monkeypatch.setenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "mine")
    code, told = fetch("--train-shards", 1)
    assert code == 0, told


def test_the_token_is_not_shown_to_the_storage_host(hub, fetch, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert fetch("--train-shards", 0)[0] == 0
    asked = {r.path.startswith("/storage/"): r.authorization for r in hub.requests}
    assert asked == {False: "Bearer hf_secret", True: ""}


# ---- interruptions -----------------------------------------------------------------------------


def test_a_dropped_connection_is_resumed_where_it_broke(hub, fetch, tmp_path, monkeypatch):
    hub.drop_after_bytes = [20_000]
    assert fetch("--train-shards", 0)[0] == 0
    ranges = [r.range for r in hub.downloads() if "/storage/" in r.path]
    assert ranges == ["", "bytes=20000-"] and hub.sent_bytes == SHARD_BYTES
    assert (tmp_path / VAL).read_bytes() == shard(seed=0)


def test_busy_answers_are_waited_out(hub, fetch):
    hub.planted = [hub_server.Planted(status) for status in (503, 503, 500)]
    assert fetch("--train-shards", 0)[0] == 0


def test_a_server_that_never_answers_right_is_given_up(hub, fetch, tmp_path):
    hub.planted = [hub_server.Planted(500)] * 100
    code, told = fetch("--train-shards", 0)
    assert code == 1 and "500" in told and "Traceback" not in told
    assert not (tmp_path / VAL).exists()


def test_a_range_that_is_ignored_does_not_corrupt(hub, fetch, tmp_path):
    hub.drop_after_bytes, hub.ignores_ranges = [20_000], True
    assert fetch("--train-shards", 0)[0] == 0
    assert integrity.shard_tokens(tmp_path / VAL) == 30_000


def test_a_connection_that_breaks_all_the_time_loses_nothing(hub, fetch, tmp_path):
    """Below the size of the client's own pieces, too, which are 10 MB."""
    content = shard(num_tokens=1_500_000)
    put(hub, f"datasets/{VAL}", hub_server.stored(content))
    hub.drop_every = 200_000
    code, told = fetch("--train-shards", 0)
    assert code == 0, told
    assert (tmp_path / VAL).read_bytes() == content and hub.sent_bytes == len(content)


def test_a_connection_that_brings_next_to_nothing_each_time_is_given_up(hub, fetch, tmp_path):
    hub.drop_every = 1_000
    code, told = fetch("--train-shards", 0)
    assert code == 1 and "what is here stays" in told
    assert (tmp_path / (VAL + ".part")).read_bytes() == shard(seed=0)[:5_000]
    hub.drop_every = None
    assert fetch("--train-shards", 0)[0] == 0 and hub.sent_bytes == SHARD_BYTES


PAGE = b"<html>log in first</html>"
HTML = {"Content_Type": "text/html"}
RANGED = {"Content_Range": "bytes 5-24/25"}
WRONG_ANSWERS = {
    "page": lambda i: hub_server.Planted(200, PAGE, HTML),
    "growing page": lambda i: hub_server.Planted(200, PAGE * (i + 1), HTML),
    "page larger than the file": lambda i: hub_server.Planted(200, PAGE * 5_000, HTML),
    "page of no length": lambda i: hub_server.Planted(200, PAGE, {**HTML, "Content_Length": None}),
    "stream of no length": lambda i: hub_server.Planted(200, b"", {"Content_Length": None}),
    "other place": lambda i: hub_server.Planted(206, PAGE, RANGED),
    "other place of the file": lambda i: hub_server.Planted(
        206, PAGE, {"Content_Range": f"bytes 5-{4 + len(PAGE)}/{SHARD_BYTES}"}),
    "no place": lambda i: hub_server.Planted(206, PAGE),
    "nothing": lambda i: hub_server.Planted(200),
    "no content": lambda i: hub_server.Planted(204),
    "compressed": lambda i: hub_server.Planted(200, PAGE, {"Content_Encoding": "gzip"}),
    "forbidden": lambda i: hub_server.Planted(403, PAGE, HTML),
    "range refused": lambda i: hub_server.Planted(416, b"", {"Content_Range": "bytes */9"}),
    "server error": lambda i: hub_server.Planted(500 + i % 5, PAGE * i, HTML),
    "redirected in a circle": lambda i: hub_server.Planted(302, b"", {"Location": "?"}),
    "redirected nowhere": lambda i: hub_server.Planted(
        302, b"", {"Location": "http://127.0.0.1:9/storage"}),
}


@pytest.mark.parametrize("kind", WRONG_ANSWERS)
def test_wrong_answers_take_nothing_away_and_end(hub, fetch, tmp_path, kind):
    part, content = tmp_path / (VAL + ".part"), shard(seed=0)
    part.parent.mkdir(parents=True)
    part.write_bytes(content[:40_000])
    hub.planted = [WRONG_ANSWERS[kind](i) for i in range(1_000)]
    code, told = fetch("--train-shards", 0)
    assert code == 1 and "what is here stays" in told and len(told.splitlines()) < 5
    assert len(hub.planted) > 500, "goes on and on"
    assert part.read_bytes() == content[:40_000]
    hub.planted = hub.planted[:2]  # what passes is sat out
    assert fetch("--train-shards", 0)[0] == 0
    assert (tmp_path / VAL).read_bytes() == content and hub.sent_bytes == len(content) - 40_000


def test_a_wrong_answer_is_told_with_its_kind_and_length(hub, fetch):
    hub.planted = [WRONG_ANSWERS["page"](0)] * 9
    told = fetch("--train-shards", 0)[1]
    assert f"status 200, text/html) has {len(PAGE)} bytes, must have {SHARD_BYTES}" in told


def test_a_server_that_cannot_begin_inside_a_file_is_read_past_what_is_here(hub, fetch, tmp_path):
    part = tmp_path / (VAL + ".part")
    part.parent.mkdir(parents=True)
    part.write_bytes(shard(seed=0)[:40_000])
    hub.ignores_ranges, hub.drop_after_bytes = True, [30_000, 45_000]
    assert fetch("--train-shards", 0)[0] == 0
    assert (tmp_path / VAL).read_bytes() == shard(seed=0)


def test_an_answer_that_trickles_is_broken_off(hub, fetch, monkeypatch):
    monkeypatch.setattr(download, "SLOW_SECONDS", 0.05)
    hub.pause_seconds = 0.02
    code, told = fetch("--train-shards", 0)
    assert code == 1 and "brought less than" in told


@pytest.mark.parametrize("place", ["planted", "planted_api"])
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_waited_for(hub, fetch, place, status):
    setattr(hub, place, [hub_server.Planted(status, b"", {"Retry_After": "1"})])
    start = time.monotonic()
    code, told = fetch("--train-shards", 0)
    assert code == 0 and time.monotonic() - start >= 1, told


@pytest.mark.parametrize("place", ["planted", "planted_api"])
def test_retry_after_beyond_the_limit_is_told_at_once(hub, fetch, place, monkeypatch):
    # older and newer clients sleep on their own, too: that is not what is tested here
    monkeypatch.setattr("hub.MAX_WAIT_SECONDS", 0.5)
    setattr(hub, place, [hub_server.Planted(429, b"", {"Retry_After": "2"})] * 50)
    code, told = fetch("--train-shards", 0)
    assert code == 1 and "asks to wait 2 s, more than the limit" in told


@pytest.mark.parametrize("told, seconds", [
    ("7", 7), (" 7 ", 7), ("", 0), ("soon", 0), ("-3", 0), ("1.5", 0), ("9" * 40, 0),
    ("Thu, 01 Jan 1970 00:02:00 GMT", 20), ("Thu, 01 Jan 1970 00:00:00 GMT", 0)])
def test_retry_after_is_seconds_or_a_date(told, seconds):
    assert hub_module.retry_after(told, 100.0) == seconds


def test_busy_and_broken_questions_are_asked_again(hub, fetch):
    hub.planted_api = [hub_server.Planted(status) for status in (503, 500, 429, 502)]
    assert fetch("--train-shards", 0)[0] == 0


def test_a_refused_proxy_is_named_instead_of_the_hub(hub, tmp_path):
    done = tool(tmp_path, HF_ENDPOINT="http://hub.test", NO_PROXY="", no_proxy="",
                HTTP_PROXY="http://me:secret@127.0.0.1:9", http_proxy="http://me:secret@127.0.0.1:9")
    told = done.communicate(timeout=60)[1]
    assert done.returncode == 1 and "through the proxy http://127.0.0.1:9" in told
    assert "secret" not in told and "check the network or HF_ENDPOINT" not in told


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_after_kill_the_next_run_goes_on_inside_the_file(hub, tmp_path):
    hub.gate = hub_server.threading.Event()
    first = tool(tmp_path, "--train-shards", "0", HF_ENDPOINT=hub.url)
    part = tmp_path / "data" / (VAL + ".part")
    deadline = time.monotonic() + 30
    while not (part.is_file() and hub.sent_bytes) and time.monotonic() < deadline:
        time.sleep(0.02)
    first.kill()
    first.communicate()
    hub.gate.set()
    hub.gate = None
    assert not (tmp_path / "data" / VAL).exists()
    part.write_bytes(shard(seed=0)[:40_000])  # what the client had put on the disk
    second = tool(tmp_path, "--train-shards", "0", HF_ENDPOINT=hub.url)
    told, faults = second.communicate(timeout=60)
    assert second.returncode == 0, faults
    assert hub.downloads()[-1].range == "bytes=40000-"
    assert not part.exists() and "complete" in told
    kept = {name for name in files_of(tmp_path / "home") if "fineweb" in name}
    assert not kept, "a second copy in the client's cache"


def test_two_downloads_do_not_write_one_part(hub, fetch, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    part = tmp_path / (VAL + ".part")
    part.parent.mkdir(parents=True)
    with open(part, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, told = fetch("--train-shards", 0)
    assert code == 1 and "another download" in told


# ---- faults ------------------------------------------------------------------------------------


def test_wrong_content_is_fetched_again_and_never_named(hub, fetch, tmp_path):
    true = shard(seed=0)
    put(hub, f"datasets/{VAL}", hub_server.stored(shard(seed=9), sha256="0" * 64))
    code, told = fetch("--train-shards", 0)
    assert code == 1 and "sha256" in told and "twice" in told
    assert not (tmp_path / VAL).exists() and not (tmp_path / (VAL + ".part")).exists()
    put(hub, f"datasets/{VAL}", hub_server.stored(true))
    assert fetch("--train-shards", 0)[0] == 0


def test_a_stale_part_of_other_content_is_dropped_by_its_hash(hub, fetch, tmp_path):
    part = tmp_path / (VAL + ".part")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 5_000)
    assert fetch("--train-shards", 0)[0] == 0
    assert (tmp_path / VAL).read_bytes() == shard(seed=0)


@pytest.mark.parametrize("change", [-500, 500])
def test_another_size_than_announced_is_refused(hub, fetch, tmp_path, change):
    content = shard(seed=0)
    put(hub, f"datasets/{VAL}", hub_server.stored(content, size_bytes=len(content) + change))
    code, told = fetch("--train-shards", 0)
    assert code == 1 and "fineweb_val_000000.bin" in told and "Traceback" not in told
    assert not (tmp_path / VAL).exists()


def test_a_shard_that_is_short_on_the_hub_itself_is_refused(hub, fetch, tmp_path):
    put(hub, f"datasets/{VAL}", hub_server.stored(shard(seed=0)[:-100]))
    code, told = fetch("--train-shards", 0)
    assert code == 1 and "the copy on the hub itself is broken" in told
    assert not (tmp_path / VAL).exists()


def test_a_small_file_is_compared_with_its_git_hash(hub, fetch, tmp_path):
    assert fetch("--train-shards", 0)[0] == 0
    (tmp_path / VARIANT.tokenizer).write_bytes(b"a tokenizeR")
    code, told = fetch("--train-shards", 0)
    assert code == 0 and "the git hash" in told
    assert (tmp_path / VARIANT.tokenizer).read_bytes() == b"a tokenizer"


def test_too_small_a_disk_is_told_before_anything_is_fetched(hub, fetch):
    train = f"{FOLDER}/fineweb_train_000002.bin"
    put(hub, train, hub_server.stored(shard(seed=1), size_bytes=10**17))
    code, told = fetch()
    assert code == 1 and re.search(r"need 100000000\.\d+ GB, have [\d.]+ GB free", told)
    assert not [r for r in hub.downloads() if r.path.startswith("/storage/")]


def test_a_disk_that_fills_up_is_told_and_what_came_stays(hub, fetch, tmp_path, monkeypatch):
    stream = hub_module.Hub.stream

    def full(self, remote, start):
        if not remote.url.endswith(VAL):  # of two that fail the first stops the other, maybe early
            yield from stream(self, remote, start)
            return
        yield shard(seed=0)[:20_000]
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("hub.Hub.stream", full)
        code, told = fetch("--train-shards", 0, "--skip-manifest")
    assert code == 1 and os.strerror(errno.ENOSPC) in told and "Traceback" not in told
    assert (tmp_path / (VAL + ".part")).stat().st_size == 20_000
    assert fetch("--train-shards", 0)[0] == 0
    assert "bytes=20000-" in [request.range for request in hub.downloads()]


def test_a_folder_that_cannot_be_made_is_one_clear_line(hub, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert download.main(["--data-dir", str(tmp_path / "file")]) == 1
    told = capsys.readouterr().err
    assert str(tmp_path / "file") in told and len(told.splitlines()) == 1


def test_what_is_listed_but_not_hosted_is_said(hub, fetch, monkeypatch):
    other = {"datasets/manifest.json": hub_server.stored(manifest_of(VARIANT), is_lfs=False)}
    hub.repositories["some/where"] = other
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "some/where")
    code, told = fetch()
    assert code == 1 and "though its manifest.json lists the variant" in told
    assert f"the catalogue has it in {VARIANT.repository}" in told


def test_a_stale_local_manifest_hides_nothing_and_is_named(hub, fetch, tmp_path):
    (tmp_path / "manifest.json").write_bytes(manifest_of(catalogue.VARIANTS["sp1024"]))
    code, told = fetch("--train-shards", 0)
    assert code == 0 and f"{tmp_path / 'manifest.json'} does not list sp8192" in told


@pytest.mark.parametrize("options, named", [
    (("--variant", "sp9999"), "sp9999"), (("--train-shards", "6"), "holds 5"),
    (("--variant", "sp1024"), "no such dataset repository")])
def test_impossible_wishes_are_one_clear_line(hub, fetch, options, named):
    code, told = fetch(*options)
    assert code == 1 and named in told and len(told.splitlines()) == 1


def test_a_hub_out_of_reach_is_one_clear_line(hub, fetch, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, told = fetch()
    assert code == 1 and "127.0.0.1:9" in told and "HF_ENDPOINT" in told


def test_offline_checks_what_is_here(hub, fetch, tmp_path):
    offline = dict(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    empty = tool(tmp_path, **offline)
    assert "never fetched" in empty.communicate(timeout=60)[1] and empty.returncode == 1
    assert download.main(["--data-dir", str(tmp_path / "data"), "--train-shards", "2"]) == 0
    before = len(hub.requests)
    whole = tool(tmp_path, **offline)
    assert "offline: 4 files" in whole.communicate(timeout=60)[0] and whole.returncode == 0
    (tmp_path / "data" / VAL).unlink()
    broken = tool(tmp_path, **offline)
    assert VAL in broken.communicate(timeout=60)[1] and broken.returncode == 1
    assert len(hub.requests) == before


def test_help_works_without_any_package():
    code = "import sys; sys.modules.update(numpy=None, huggingface_hub=None, shards=None)\n" \
           "import runpy; sys.argv = ['x', sys.argv[2]]\n" \
           f"sys.path.insert(0, {str(DATA)!r})\n" \
           f"runpy.run_path({str(DATA / 'cached_challenge_fineweb.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, "-", "--help"], text=True,
                          capture_output=True)
    assert done.returncode == 0 and "--train-shards" in done.stdout
    done = subprocess.run([sys.executable, "-c", code, "-", "--skip-manifest"], text=True,
                          capture_output=True)
    assert done.returncode == 1 and "pip install" in done.stderr


def test_progress_names_share_rate_and_time_left():
    assert download.progress_line(30_000_000, 100_000_000, 10_000_000, 2.0) == (
        "0.03 GB of 0.10 GB, 30 %, 10.0 MB/s, 7 s left")


# ---- the catalogue -----------------------------------------------------------------------------


def test_every_known_validation_set_is_recognised_by_its_counts():
    for variant in catalogue.VARIANTS.values():
        for known in variant.fingerprints:
            assert known.targets % catalogue.WINDOW_TOKENS == 0
            tokens = known.tokens or known.targets + 1
            assert catalogue.whole_targets(tokens) == known.targets
            num_bytes = known.target_bytes or catalogue.VAL_TEXT_BYTES
            assert catalogue.name_validation(tokens, num_bytes) == known.label
            assert catalogue.name_validation(tokens + 20_480, num_bytes) == "UNKNOWN"
            # as many tokens, but operators counted as text
            assert catalogue.name_validation(tokens, int(1.083 * num_bytes)) == "UNKNOWN"
            assert catalogue.name_validation(tokens, 0) == "UNKNOWN"
            if known.target_bytes:
                assert catalogue.name_validation(tokens, known.target_bytes + 1) == "UNKNOWN"
                assert known.label in catalogue.nearest_note(tokens, known.target_bytes + 1)
