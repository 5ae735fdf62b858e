"""Download published shards, their tokenizer and, if wanted, the documents behind them.

Files land where train_gpt.py looks by default: data/datasets/fineweb10B_<variant>/ and
data/tokenizers/. Each is fetched as <name>.part, compared with the size and hash the hub gives,
and only then renamed; run the same line again after any interruption and it goes on where it
stopped. A file that is here and was checked before is not fetched again. Nothing is kept in the
hub client's cache.

Environment: HF_ENDPOINT (another hub), HF_HUB_OFFLINE=1 (check what is here, fetch nothing),
HF_TOKEN, MATCHED_FINEWEB_REPO_ID (a repository in place of the catalogue's),
MATCHED_FINEWEB_REMOTE_ROOT_PREFIX (its top folder; default datasets), DATA_DIR.
"""

import argparse
import errno
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import catalogue
from hub import DownloadError, Hub, Remote, WrongAnswer

try:
    import integrity
    import shards
    MISSING = ""
except ImportError as error:  # reported by main, so that --help works without numpy
    MISSING = error.name or "numpy"
try:
    import fcntl
except ImportError:  # Windows: no lock, and no two downloads at once there
    fcntl = None  # type: ignore[assignment]

PIP_LINE = "python -m pip install -r data/requirements.txt"
FRUITLESS_TRIES = 5  # attempts in a row that bring less than this:
FRUIT_BYTES = 1 << 16
SLOW_SECONDS = 120.0  # in which an attempt must bring that much, or is broken off
SPARE_BYTES = 64 << 20  # left free on the disk
PROGRESS_SECONDS = 0.5


class Stopped(BaseException):
    """Another file failed, or the user stopped: this one waits in its .part."""


class Wanted(NamedTuple):
    """One file to have: its path below the data folder, and where it comes from."""

    key: str
    remote: Remote


# ---- what is wanted ----------------------------------------------------------------------------


def published_entry(hub: Hub, variant: catalogue.Variant) -> dict:
    """Return what the repository's manifest says of a variant: {} or its dataset's entry.

    A key "model_path" is added from the entry of its tokenizer.
    """
    listed = hub.files(catalogue.MANIFEST_NAME)
    if not listed:
        return {}
    try:
        manifest = json.loads(hub.read(listed[catalogue.MANIFEST_NAME]))
        folder = Path(variant.folder).name
        entry = next((dict(entry) for entry in manifest["datasets"]
                      if folder in (entry.get("name"), Path(entry.get("path", "")).name)), {})
        for tokenizer in manifest.get("tokenizers", []):
            if entry and tokenizer["name"] == entry.get("tokenizer_name"):
                entry["model_path"] = tokenizer.get("model_path") or tokenizer.get("path")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DownloadError(f"{hub.repository}: its manifest.json cannot be read ({error}); "
                            "--skip-manifest goes on without it") from None
    return entry


def not_hosted(hub: Hub, variant: catalogue.Variant, what: str, listed: bool) -> DownloadError:
    """Return the error for a file that a repository does not hold."""
    text = f"{variant.name}: {hub.repository} holds no {what} below {hub.path(variant.folder)}"
    if listed:
        text += ", though its manifest.json lists the variant"
    if hub.repository != variant.repository:
        return DownloadError(f"{text}; unset MATCHED_FINEWEB_REPO_ID: the catalogue has it in "
                             f"{variant.repository}")
    return DownloadError(f"{text}; set MATCHED_FINEWEB_REPO_ID to a repository that does, or "
                         "build it with data/tokenize_corpus.py")


def choose_shards(hub: Hub, variant: catalogue.Variant, train_shards: int | None,
                  listed: bool) -> list[Wanted]:
    """Return the shards to have: all of validation with sidecars, the first train_shards."""
    hosted = hub.folder(variant.folder)
    splits: dict[str, list[Wanted]] = {"train": [], "val": [], "val_bytes": []}
    for name in sorted(hosted):
        if match := shards.SHARD_NAME.fullmatch(name):
            splits[match[1]].append(Wanted(f"{variant.folder}/{name}", hosted[name]))
    train = splits["train"]
    if not splits["val"]:
        raise not_hosted(hub, variant, "validation shard", listed)
    if variant.has_sidecar and not splits["val_bytes"]:
        raise not_hosted(hub, variant, "byte sidecar (fineweb_val_bytes_*.bin)", listed)
    if not train and train_shards != 0:
        raise not_hosted(hub, variant, "training shard", listed)
    if train_shards is not None and train_shards > len(train):
        raise DownloadError(f"--train-shards {train_shards}: {hub.repository} holds {len(train)} "
                            f"of {variant.name}; ask for at most {len(train)}")
    return [*splits["val"], *splits["val_bytes"], *train[:train_shards]]


def choose_tokenizer(hub: Hub, variant: catalogue.Variant, entry: dict) -> Wanted:
    """Return the tokenizer, at the manifest's path or else the catalogue's."""
    told = entry.get("model_path")
    places = dict.fromkeys([*([told] if told and isinstance(told, str) else []),
                            variant.tokenizer])
    found = hub.files(*places)
    if not found:
        raise not_hosted(hub, variant, f"tokenizer ({', '.join(places)})", bool(entry))
    return Wanted(variant.tokenizer, next(iter(found.values())))


def choose_documents(hub: Hub) -> list[Wanted]:
    """Return the document list and its note of origin, from wherever they are hosted."""
    known = catalogue.DOCUMENTS
    found = hub.files(known.path, known.source_manifest)
    if known.path not in found and hub.repository != known.repository:
        say(f"{known.path} is not in {hub.repository}; taking it from {known.repository}")
        hub = Hub(known.repository)
        found = hub.files(known.path, known.source_manifest)
    if known.path not in found:
        raise DownloadError(f"--with-docs: {hub.repository} holds no {hub.path(known.path)}; "
                            "leave --with-docs away")
    if found[known.path].announced != f"sha256:{known.sha256}":
        say(f"note: {known.path} of {hub.repository} is another list than the known one "
            f"(sha256 {known.sha256[:12]}…)")
    return [Wanted(name, remote) for name, remote in found.items()]


# ---- what is here ------------------------------------------------------------------------------


class Record:
    """The files of one variant that were compared with the hub, in <variant>/download.json."""

    def __init__(self, root: Path, variant: catalogue.Variant):
        self.root, self.path = root, root / variant.folder / integrity.RECORD_NAME
        self.lock, self.content = threading.Lock(), integrity.read_json(self.path)
        self.content["files"] = integrity.file_entries(self.content, "bytes", "mtime_ns",
                                                       "announced")

    def begin(self, variant: catalogue.Variant, hub: Hub, entry: dict) -> None:
        """Note where the files come from; the list of checked ones stays."""
        self.content.update(variant=variant.name, repository=hub.repository,
                            revision=hub.revision, published=entry)

    def entry_of(self, hub: Hub) -> dict | None:
        """Return the manifest's entry noted at the same commit, None where there is none."""
        same = [self.content.get(key) for key in ("repository", "revision")]
        entry = self.content.get("published") if same == [hub.repository, hub.revision] else None
        return entry if isinstance(entry, dict) else None

    def add(self, wanted: Wanted) -> None:
        """Note a file that was just compared with the hub, and save the list."""
        path, kind = self.root / wanted.key, wanted.remote.announced.partition(":")
        found = path.stat()
        entry = dict(bytes=found.st_size, mtime_ns=found.st_mtime_ns,
                     announced=wanted.remote.announced,
                     sha256=kind[2] if kind[0] == "sha256" else shards.sha256_of(path))
        with self.lock:
            self.content["files"][wanted.key] = entry
            shards.write_atomic(self.path, json.dumps(self.content, indent=1).encode())

    def holds(self, key: str, announced: str | None = None) -> bool:
        """Return whether a file is as it was when it was compared (with this hash, if given)."""
        entry, path = self.content["files"].get(key), self.root / key
        if entry is None or not path.is_file() or announced not in (None, entry["announced"]):
            return False
        found = path.stat()
        return [found.st_size, found.st_mtime_ns] == [entry["bytes"], entry["mtime_ns"]]


def difference(path: Path, remote: Remote) -> str:
    """Return in what a file differs from the hub's, "" when it is the same."""
    size_bytes = path.stat().st_size
    if size_bytes != remote.size_bytes:
        return f"has {size_bytes} bytes, the hub's has {remote.size_bytes}"
    kind, _, known = remote.announced.partition(":")
    found = shards.sha256_of(path) if kind == "sha256" else integrity.git_blob_of(path)
    return "" if found == known else f"has the {kind} hash {found}, the hub's is {known}"


def header_fault(path: Path) -> str:
    """Return what is wrong with a shard's header ("" for other files and whole shards)."""
    if shards.SHARD_NAME.fullmatch(path.name.removesuffix(".part")):
        try:
            integrity.shard_tokens(path)
        except ValueError as error:
            return str(error).partition(": ")[2].partition(";")[0]
    return ""


def part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def sort_out(wanted: list[Wanted], record: Record, rehash: bool, jobs: int) -> list[Wanted]:
    """Return the files that must be fetched; what is here already is compared and noted."""
    here = [item for item in wanted if (record.root / item.key).is_file()]
    unsure = {item for item in here if rehash or not record.holds(item.key, item.remote.announced)}
    if unsure:
        size_bytes = sum((record.root / item.key).stat().st_size for item in unsure)
        say(f"hashing {len(unsure)} files that are here, {gigabytes(size_bytes)}")

    def is_right(item: Wanted) -> bool:
        path = record.root / item.key
        if item in unsure:
            if fault := difference(path, item.remote):
                say(f"{path}: {fault}; it will be replaced")
                return False
            record.add(item)
        if fault := header_fault(path):
            raise DownloadError(f"{path}: {fault}; the hub's copy is broken too")
        return True

    with ThreadPoolExecutor(jobs) as pool:
        right = {item for item, is_kept in zip(here, pool.map(is_right, here)) if is_kept}
    return [item for item in wanted if item not in right]


def check_disk(missing: list[Wanted], root: Path) -> int:
    """Return the bytes still to come; DownloadError when they do not fit on the disk."""
    come = 0
    for item in missing:
        part = part_of(root / item.key)
        come += item.remote.size_bytes - (part.stat().st_size if part.is_file() else 0)
    free = shutil.disk_usage(root).free
    if missing and come + SPARE_BYTES > free:
        train = [item.remote.size_bytes for item in missing if "_train_" in item.key]
        room = free - SPARE_BYTES - (come - sum(train))
        hint = (f" (about {room // max(train)} more training shards fit: lower --train-shards)"
                if train and room > max(train) else "")
        raise DownloadError(f"{root}: need {gigabytes(come + SPARE_BYTES)}, have "
                            f"{gigabytes(free)} free{hint}; free some space, or give --data-dir")
    return come


# ---- fetching ----------------------------------------------------------------------------------


class Fetcher:
    """Brings files in parallel, each through its .part."""

    def __init__(self, hub: Hub, record: Record, jobs: int):
        self.hub, self.record, self.jobs = hub, record, jobs
        self.stop = threading.Event()

    def fetch_all(self, missing: list[Wanted]) -> None:
        """Fetch every file; the first fault stops the others and is raised."""
        pool = ThreadPoolExecutor(self.jobs)
        futures = [pool.submit(self.fetch, item) for item in missing]
        try:
            with show_progress(missing, self.record.root):
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            self.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
        faults = [fault for future in done if (fault := future.exception())]
        for fault in sorted(faults, key=lambda fault: isinstance(fault, Stopped)):
            raise fault

    def fetch(self, item: Wanted) -> None:
        """Bring one file: its .part, compared with the hub's size and hash, takes its name.

        Content that arrived wrong is fetched once more from the start.
        """
        path = self.record.root / item.key
        part = part_of(path)
        for is_last in (False, True):
            self.pull(item, part)
            fault = difference(part, item.remote)
            if not fault:
                break
            part.unlink()
            if is_last:
                raise DownloadError(f"{path}: what arrives {fault}, twice; try again later or "
                                    "another HF_ENDPOINT")
        if fault := header_fault(part):
            part.unlink()
            raise DownloadError(f"{path}: {fault}: the copy on the hub itself is broken")
        with open(part, "rb+") as file:
            os.fsync(file.fileno())  # on the disk before it has the name, should the power fail
        os.replace(part, path)
        self.record.add(item)

    def pull(self, item: Wanted, part: Path) -> None:
        """Append to `part` until it has the announced size, resuming broken connections.

        What came stays, whatever the server does next; after FRUITLESS_TRIES that bring next to
        nothing it is given up.
        """
        part.parent.mkdir(parents=True, exist_ok=True)
        fruitless, size_bytes = 0, item.remote.size_bytes
        while True:
            with open(part, "ab") as file:
                take_lock(file, part)
                if file.tell() > size_bytes:
                    file.truncate(0)
                before = file.tell()
                try:
                    if before < size_bytes:
                        self.append(self.hub.stream(item.remote, before), file)
                    return
                except Exception as error:
                    self.judge(error, item)
                    fruitless = 0 if file.tell() >= before + FRUIT_BYTES else fruitless + 1
                    if fruitless >= FRUITLESS_TRIES:
                        raise DownloadError(f"{item.key}: {self.hub.explain(error)}") from error
                    seconds = self.hub.pause(error, fruitless)
            if self.stop.wait(seconds):
                raise Stopped

    def append(self, pieces: Iterator[bytes], file: BinaryIO) -> None:
        """Write pieces as they come; WrongAnswer where they come too slowly to ever end."""
        since, held = time.monotonic(), file.tell()
        for piece in pieces:
            if self.stop.is_set():
                raise Stopped
            file.write(piece)
            if file.tell() >= held + FRUIT_BYTES:
                since, held = time.monotonic(), file.tell()
            elif time.monotonic() > since + SLOW_SECONDS:
                raise WrongAnswer(f"the answer brought less than {FRUIT_BYTES} bytes in "
                                  f"{SLOW_SECONDS:.0f} s")

    def judge(self, error: Exception, item: Wanted) -> None:
        """Raise what no further attempt can mend; return for anything that may pass."""
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise DownloadError(f"{item.key}: {error.strerror}; free some space and run the same "
                                "line again: what is here stays") from error
        if isinstance(error, (self.hub.utils.EntryNotFoundError,
                              self.hub.utils.RepositoryNotFoundError)):
            raise DownloadError(f"{item.key}: {self.hub.explain(error)}") from error


def take_lock(file: BinaryIO, part: Path) -> None:
    """Keep a second download away from a .part; the lock goes when the file is closed."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DownloadError(f"{part}: another download is writing it; wait for that one") from None
    except OSError:
        pass  # a file system without locks


# ---- telling -----------------------------------------------------------------------------------


def say(line: str) -> None:
    print(f"download: {line}", flush=True)


def gigabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e7 else f"{size_bytes / 1e3:.1f} kB"


def progress_line(done_bytes: int, total_bytes: int, first_bytes: int, seconds: float) -> str:
    """Return how far it is; first_bytes were here when `seconds` began to run."""
    rate = (done_bytes - first_bytes) / max(seconds, 1e-9)
    left = f"{(total_bytes - done_bytes) / rate:.0f} s left" if rate > 0 else "waiting"
    return (f"{gigabytes(done_bytes)} of {gigabytes(total_bytes)}, "
            f"{100 * done_bytes / max(1, total_bytes):.0f} %, {rate / 1e6:.1f} MB/s, {left}")


@contextmanager
def show_progress(missing: list[Wanted], root: Path):
    """Rewrite one line on a terminal while the body runs; silent elsewhere."""
    if not sys.stderr.isatty():
        yield
        return
    total, over = sum(item.remote.size_bytes for item in missing), threading.Event()

    def here() -> int:
        found = 0
        for item in missing:
            for path in (root / item.key, part_of(root / item.key)):
                try:
                    found += path.stat().st_size
                except FileNotFoundError:
                    continue
        return min(found, total)

    def tell() -> None:
        first, start = here(), time.monotonic()
        while not over.wait(PROGRESS_SECONDS):
            line = progress_line(here(), total, first, time.monotonic() - start)
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        print("\r\033[K", end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def run_line(root: Path, variant: catalogue.Variant) -> str:
    """Return the shell line that trains on a variant."""
    settings: dict[str, object] = {}
    if Path(variant.folder).name == f"fineweb10B_sp{variant.vocab_size}":
        if root != Path("data").resolve():
            settings["DATA_DIR"] = root
    else:
        settings.update(DATA_PATH=root / variant.folder, TOKENIZER_PATH=root / variant.tokenizer)
    if variant.vocab_size != catalogue.VARIANTS[catalogue.DEFAULT_VARIANT].vocab_size:
        settings["VOCAB_SIZE"] = variant.vocab_size
    return shards.run_line(**settings)


def catalogue_text() -> str:
    rows = [f"{v.name:42} {v.repository:34} {v.train_shards:4} train shards"
            for v in catalogue.VARIANTS.values()]
    aliases = ", ".join(f"{short} = {name}" for short, name in catalogue.ALIASES.items())
    return "\n".join([*rows, f"short names: {aliases}"])


# ---- the command -------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="variants:\n" + catalogue_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("short", nargs="?", metavar="N|VARIANT",
                        help="a number for --train-shards or a name for --variant")
    parser.add_argument("--variant", help=f"which tokenisation ({catalogue.DEFAULT_VARIANT})")
    parser.add_argument("--train-shards", type=int, metavar="N",
                        help="only the first N training shards, 200 MB each (all); 0: validation "
                        "alone")
    parser.add_argument("--with-docs", action="store_true",
                        help="also the documents as text, "
                        f"{catalogue.DOCUMENTS.size_bytes / 1e9:.0f} GB")
    parser.add_argument("--skip-manifest", action="store_true",
                        help="do not read the repository's manifest.json; paths come from the "
                        "catalogue")
    parser.add_argument("--rehash", action="store_true",
                        help="hash every file again, also those checked before")
    parser.add_argument("--jobs", type=int, default=8, help="files at once (8)")
    parser.add_argument("--data-dir", type=Path, metavar="DIR",
                        default=os.environ.get("DATA_DIR") or Path(__file__).parent,
                        help="where datasets/ and tokenizers/ go (DATA_DIR, else this folder)")
    args = parser.parse_args(argv)
    if args.short and args.short.isdigit():
        args.train_shards = int(args.short) if args.train_shards is None else args.train_shards
    elif args.short:
        args.variant = args.variant or args.short
    args.variant = args.variant or catalogue.DEFAULT_VARIANT
    for name, least in (("train_shards", 0), ("jobs", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    return args


def check_offline(record: Record, variant: catalogue.Variant, args: argparse.Namespace) -> None:
    """Say whether all that is wanted is here, by the record alone; DownloadError when not."""
    known = sorted(record.content["files"])
    train = [key for key in known if "_train_" in key]
    wanted = [key for key in known if "_train_" not in key] + train[:args.train_shards]
    names = [key for key in wanted if not record.holds(key)]
    names += [key for key in wanted if key not in names and header_fault(record.root / key)]
    if args.with_docs and catalogue.DOCUMENTS.path not in known:
        names.append(catalogue.DOCUMENTS.path)
    if not any("_val_" in key for key in known):
        names.append(f"{variant.folder}/ (never fetched by this tool)")
    if args.train_shards is not None and len(train) < args.train_shards:
        names.append(f"{args.train_shards - len(train)} training shards")
    if names:
        raise DownloadError(f"HF_HUB_OFFLINE=1, and missing or changed: {', '.join(names[:5])}"
                            f"{' …' if len(names) > 5 else ''}; unset it to fetch them")
    say(f"offline: {len(wanted)} files of {variant.name} are as they were when fetched from "
        f"{record.content.get('repository')}")


def stale_manifest_note(root: Path, variant: catalogue.Variant) -> str:
    """Return a note when an old local manifest.json would hide the variant from other tools."""
    path = root / catalogue.MANIFEST_NAME
    if not path.is_file() or Path(variant.folder).name in path.read_text(errors="replace"):
        return ""
    return (f"note: {path} does not list {variant.name}: it is another repository's, and not "
            "read here; delete it if another tool stumbles over it")


def run(args: argparse.Namespace) -> None:
    """Bring everything that is wanted and not here."""
    variant, root = catalogue.find_variant(args.variant), Path(args.data_dir).resolve()
    for folder in (variant.folder, "tokenizers"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    record = Record(root, variant)
    from huggingface_hub import constants, utils
    if constants.HF_HUB_OFFLINE:
        return check_offline(record, variant, args)
    utils.disable_progress_bars()  # one line for all files instead
    utils.logging.set_verbosity_error()
    hub = Hub(os.environ.get("MATCHED_FINEWEB_REPO_ID") or variant.repository)
    entry = {} if args.skip_manifest else record.entry_of(hub)
    if entry is None:
        entry = published_entry(hub, variant)
    if note := stale_manifest_note(root, variant):
        say(note)
    wanted = choose_shards(hub, variant, args.train_shards, bool(entry))
    num_shards = len(wanted)
    wanted.append(choose_tokenizer(hub, variant, entry))
    if args.with_docs:
        wanted += choose_documents(hub)
    record.begin(variant, hub, entry)
    total = sum(item.remote.size_bytes for item in wanted)
    say(f"{variant.name} from {hub.repository} at {hub.revision[:8]}: {num_shards} shards, "
        f"{len(wanted) - num_shards} other files, {gigabytes(total)}")
    missing = sort_out(wanted, record, args.rehash, args.jobs)
    if missing:
        say(f"{gigabytes(check_disk(missing, root))} to fetch into {root}")
        Fetcher(hub, record, args.jobs).fetch_all(missing)
    say(f"complete: {len(missing)} files fetched, {len(wanted) - len(missing)} were here; all "
        "as the hub announces them")
    say(f"train with: {run_line(root, variant)}")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if MISSING:
            raise ModuleNotFoundError(name=MISSING)
        run(args)
    except ModuleNotFoundError as error:
        print(f"download: {error.name} is not installed; {PIP_LINE}", file=sys.stderr)
        return 1
    except (DownloadError, ValueError) as error:
        print(f"download: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"download: {error.filename or args.data_dir}: {error.strerror or error}; free it or "
              "its disk, or give --data-dir", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("download: stopped; run the same line again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # not waiting for transfers that were told to stop
