"""Build the demo corpus from this Python installation: no download, under a minute.

The text is the language reference that `help()` shows and the docstrings of the standard library,
read from the installation's own files without importing its modules. Modules are split by a hash
of their name into training and validation, repeated paragraphs are removed, a SentencePiece
tokenizer is trained on the training part by the published recipe, and both parts are written as
token shards in the published format. One Python version with one sentencepiece version gives the
same bytes every time.

Written under --out: datasets/demo/ with fineweb_{train,val}_000000.bin, the same texts as
train.txt and val.txt (one document per line) and manifest.json (sizes, hashes, and what xz makes
of the validation text, to compare a model with); tokenizers/demo_1024_bpe.model. A second call
checks the hashes and stops. Needs numpy and sentencepiece; then run PRESET=demo python train_gpt.py
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import lzma
import platform
import re
import sys
import sysconfig
import time
import unicodedata
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

try:
    import encoding
    import numpy as np
    import sentencepiece
    import shards
    MISSING = None
except ImportError as error:  # reported by main, so that --help works without them
    MISSING = error.name or "sentencepiece"

TOOL_VERSION = 1  # raise it whenever the same Python would give other bytes
MAX_DOC_BYTES = 4000  # near FineWeb's mean, and below the trainer's limit of 4192 for a sentence
MIN_DOC_BYTES = 200
VAL_TARGET_BYTES = 136_000  # before near-duplicates go; leaves 120 to 140 kB
VAL_MIN_BYTES = 100_000
VAL_MAX_MODULE_BYTES = 16_000  # larger modules train: none may dominate the score
SHINGLE_WORDS = 10
MAX_SHINGLE_OVERLAP = 0.3
MIN_LETTER_FRAC = 0.72  # of a paragraph's characters but spaces; below it is code or a table
MIN_COMMENT_WORDS = 20  # shorter ones are mostly notes that need the code beside them
MANIFEST = "datasets/demo/manifest.json"
VOCAB_RANGE = (512, 16_384)
TOPIC = "topic:"  # sets a topic's name apart from a module's
PIP_LINE = "python -m pip install numpy sentencepiece"


class DemoError(Exception):
    """A fault the user can act on; main prints it as one line."""


class Paragraph(NamedTuple):
    """One paragraph; `lead` (a name or signature) is printed but not compared for repeats."""

    lead: str
    body: str

    def text(self):
        return self.lead + self.body


# ---- reading the installation ----------------------------------------------------------------


def stdlib_files(root):
    """Yield (module name, path) of the standard library, sorted by name, test suites left out."""
    found = {}
    for top in sys.stdlib_module_names - {"pydoc_data"}:
        for path in [root / f"{top}.py", *sorted((root / top).rglob("*.py"))]:
            parts = path.relative_to(root).with_suffix("").parts
            is_test = any(p in ("test", "tests") or p.endswith("_test") for p in parts)
            if path.is_file() and all(p.isidentifier() for p in parts) and not is_test:
                found[".".join(p for p in parts if p != "__init__")] = path
    return sorted(found.items())


def signature(node):
    """Return what introduces a docstring: `name(arguments): ` or `class Name(Base): `."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases}): " if bases else f"class {node.name}: "
    return f"{node.name}({ast.unparse(node.args)}): "


def docstrings(name, tree):
    """Yield (line number, lead, text) of every docstring in a module's syntax tree."""
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if text := ast.get_docstring(node):
            is_module = isinstance(node, ast.Module)
            lead = f"{name}: " if is_module else " ".join(signature(node).split()) + " "
            yield (0 if is_module else node.lineno), lead, text


def comments(source, tree):
    """Yield (line number, "", text) of comment blocks, `#` signs within strings left alone."""
    lines = [line.strip() for line in source.split("\n")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.end_lineno > node.lineno:
            for i in range(node.lineno - 1, node.end_lineno):
                lines[i] = ""
    block, start = [], 0
    for number, line in enumerate([*lines, ""], 1):
        if line.startswith("#"):
            start = start if block else number
            block.append(line.lstrip("#!:"))
        elif block:
            text = "\n".join(block)
            if len(text.split()) >= MIN_COMMENT_WORDS:
                yield start, "", text
            block = []


def read_topics():
    """Return {topic: [Paragraph]} of the language reference; empty where it is not installed."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return {TOPIC + name: paragraphs("", text) for name, text in sorted(topics.items())}


def read_modules(root, counts):
    """Return {module: [Paragraph]} of the standard library's docstrings and longer comments."""
    modules = {}
    for name, path in stdlib_files(root):
        try:
            source = importlib.util.decode_source(path.read_bytes())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the library's own source, not ours
                tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            counts["modules_unreadable"] += 1
            continue
        texts = sorted([*docstrings(name, tree), *comments(source, tree)])
        modules[name] = [p for _, lead, text in texts for p in paragraphs(lead, text)]
    return modules


# ---- cleaning --------------------------------------------------------------------------------


def normalise(text):
    """Return text that SentencePiece's nmt_nfkc rule leaves as it is, byte for byte.

    NFKC first; then characters on which Unicode versions or the rule's own exceptions differ
    (controls, marks, unassigned, its space sign) become spaces; then whitespace is collapsed.
    """
    kept = (c if c.isascii() and c.isprintable() or unicodedata.category(c)[0] in "LNPS"
            and c != "\u2581" else " " for c in unicodedata.normalize("NFKC", text))
    return " ".join("".join(kept).split())


def paragraphs(lead, text):
    """Return the prose paragraphs of a text without examples, tables, underlines and licences."""
    found = []
    for block in re.split(r"\n\s*\n", text):
        prose = re.split(r"^\s*(?:>>>|\.\. )", block, maxsplit=1, flags=re.MULTILINE)[0]
        body = normalise(re.sub(r"([^\w\s])\1{3,}", " ", prose))
        letters = sum(map(str.isalpha, body))
        is_licence = re.search(r"copyright|licen[sc]ed|warranty", body, flags=re.IGNORECASE)
        if is_licence or len(body.split()) < 3:
            continue
        if letters >= MIN_LETTER_FRAC * len(body.replace(" ", "")):
            found.append(Paragraph(lead if not found else "", body))
    return found


def words_of(text):
    """Return the words of a text, lower case, letters and digits only."""
    return re.findall(r"[^\W_]+", text.lower())


def shingles(body):
    """Return the set of ten-word runs in a paragraph; a shorter one counts as a single run."""
    words = words_of(body)
    count = max(1, len(words) - SHINGLE_WORDS + 1)
    return {" ".join(words[i:i + SHINGLE_WORDS]) for i in range(count)}


def drop_repeats(modules, counts):
    """Return the modules with every paragraph kept once, compared by its letters and digits."""
    seen, kept = set(), {}
    for name, found in modules.items():
        kept[name] = []
        for paragraph in found:
            key = "".join(words_of(paragraph.body))
            counts["paragraphs_read"] += 1
            counts["paragraphs_repeated"] += key in seen
            if key not in seen:
                kept[name].append(paragraph)
            seen.add(key)
    return kept


def drop_near_repeats(modules, seen, counter, counts):
    """Return the modules without paragraphs that mostly repeat the shingles in `seen`.

    What is kept joins `seen`, so training goes first and validation is measured against it.
    """
    kept = {}
    for name, found in modules.items():
        kept[name] = []
        for paragraph in found:
            runs = shingles(paragraph.body)
            if len(runs & seen) > MAX_SHINGLE_OVERLAP * len(runs):
                counts[counter] += 1
            else:
                kept[name].append(paragraph)
                seen |= runs
    return kept


# ---- splitting and documents -----------------------------------------------------------------


def hash_order(key):
    """Return a sort key that shuffles the same way everywhere."""
    return hashlib.sha256(key.encode("utf-8")).hexdigest()


def text_bytes(texts):
    """Return the UTF-8 bytes of all texts together."""
    return sum(len(text.encode("utf-8")) for text in texts)


def choose_val(modules):
    """Return the names of the validation modules: first by hash until there is enough text.

    Topics and modules are drawn apart, each in its share, so that both parts hold both kinds.
    """
    sizes = {name: text_bytes(p.text() for p in found) for name, found in modules.items()}
    chosen = set()
    for is_topic in (False, True):
        kind = [name for name in sizes if name.startswith(TOPIC) == is_topic]
        share = sum(sizes[name] for name in kind) / max(1, sum(sizes.values()))
        wanted = share * VAL_TARGET_BYTES
        for name in sorted(kind, key=hash_order):
            if wanted > 0 and MIN_DOC_BYTES <= sizes[name] <= VAL_MAX_MODULE_BYTES:
                chosen.add(name)
                wanted -= sizes[name]
    return chosen


def pack(units):
    """Return units joined by spaces, greedily, into texts of at most MAX_DOC_BYTES."""
    packed = []
    for unit in units:
        joined = f"{packed[-1]} {unit}" if packed else unit
        if packed and len(joined.encode("utf-8")) <= MAX_DOC_BYTES:
            packed[-1] = joined
        else:
            packed.append(unit)
    return packed


def cut_long(text, separators=(r"(?<=[.!?]) ", " ")):
    """Return a text in pieces of at most MAX_DOC_BYTES, cut at sentence ends, else at words."""
    if len(text.encode("utf-8")) <= MAX_DOC_BYTES or not separators:
        return [text]
    packed = pack(re.split(separators[0], text))
    return [piece for part in packed for piece in cut_long(part, separators[1:])]


def documents(modules, counts):
    """Return the documents of some modules, shuffled by hash so that their order is fixed."""
    keyed = []
    for name, found in modules.items():
        parts = pack([piece for paragraph in found for piece in cut_long(paragraph.text())])
        for number, text in enumerate(parts):
            if len(text.encode("utf-8")) >= MIN_DOC_BYTES:
                keyed.append((hash_order(f"{name}#{number}"), text))
            else:
                counts["documents_too_short"] += 1
    return [text for _, text in sorted(keyed)]


def build_corpus(counts):
    """Return {"train": documents, "val": documents}; counts is filled with what was dropped."""
    root = Path(sysconfig.get_paths()["stdlib"])
    topics = read_topics()
    if not topics:
        say("this Python has no pydoc_data.topics; going on with the standard library alone")
    modules = read_modules(root, counts)
    counts.update(topics=len(topics), modules=len(modules))
    unique = drop_repeats({**modules, **topics}, counts)
    val_names = choose_val(unique)
    seen, split = set(), {}
    for part in ("train", "val"):
        chosen = {n: found for n, found in unique.items() if (n in val_names) == (part == "val")}
        chosen = drop_near_repeats(chosen, seen, f"paragraphs_near_repeated_{part}", counts)
        split[part] = documents(chosen, counts)
    if text_bytes(split["val"]) < VAL_MIN_BYTES:
        raise DemoError(f"the validation text is {text_bytes(split['val'])} bytes, must be at "
                        f"least {VAL_MIN_BYTES}; {root} holds too few .py files, use a full "
                        "Python installation")
    return split


# ---- tokenizer and shards --------------------------------------------------------------------


def encode(texts, processor, table):
    """Return the tokens of all documents, a BOS before each and no EOS.

    Raises DemoError when the byte table disagrees with a document: its score would be wrong.
    """
    found = encoding.encode_batch(processor, [text.encode("utf-8") for text in texts])
    for text, tokens in zip(texts, found):
        counted, expected = shards.target_bytes(tokens, table).sum(), text_bytes([text])
        if counted != expected:
            raise DemoError(f"the tokens of the document {text[:40]!r} count {counted} bytes, "
                            f"must be its {expected}; install another sentencepiece version")
    return np.concatenate(found)


def xz_bytes(text):
    """Return the size of a text, bytes, after the strongest xz."""
    return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


def yardsticks(train, val, scored_bytes):
    """Return what xz makes of the validation text, alone and after the training text.

    Bits are divided by the scored bytes: the documents' own, without the newlines between them,
    which is the divisor of a model's score too.
    """
    alone = xz_bytes(val)
    after_train = xz_bytes(train + val) - xz_bytes(train)
    return {"xz_val_bytes": alone, "xz_val_bpb": round(8 * alone / scored_bytes, 4),
            "xz_train_val_minus_train_bytes": after_train,
            "xz_train_val_minus_train_bpb": round(8 * after_train / scored_bytes, 4),
            "divisor": "UTF-8 bytes of the validation documents, newline separators excluded"}


# ---- output ----------------------------------------------------------------------------------


def recipe(vocab_size):
    """Return what decides the corpus; a product of another recipe is built again."""
    return {"tool_version": TOOL_VERSION, "python": platform.python_version(),
            "sentencepiece": sentencepiece.__version__, "vocab_size": vocab_size}


def inspect_product(out, vocab_size):
    """Return (manifest, "") of a complete product, else (None, why it must be built)."""
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        for key, value in recipe(vocab_size).items():
            if manifest["recipe"][key] != value:
                return None, f"built with {key} {manifest['recipe'][key]}, now {value}"
        for name, entry in manifest["files"].items():
            if shards.sha256_of(out / name) != entry["sha256"]:
                return None, f"{name} has changed since it was built"
        figures(manifest, out)
    except FileNotFoundError as error:
        return None, f"no {Path(error.filename).name} yet"
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return None, "its manifest is unreadable"
    return manifest, ""


def build(out, vocab_size):
    """Build everything under `out` and return the manifest, which is written last."""
    demo, tokenizers = out / "datasets/demo", out / "tokenizers"
    for folder in (demo, tokenizers):
        folder.mkdir(parents=True, exist_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)  # an interrupted build must not look finished
    counts = Counter()
    say(f"reading the texts of Python {platform.python_version()}")
    split = build_corpus(counts)
    say(f"training a tokenizer of {vocab_size} pieces")
    model = encoding.train_tokenizer(split["train"], vocab_size)
    processor = encoding.load_processor(model)
    table = shards.byte_table(processor, processor.get_piece_size())
    paths = [tokenizers / f"demo_{vocab_size}_bpe.model"]
    shards.write_atomic(paths[0], model)
    texts, sizes = {}, {}
    say("encoding and writing the shards")
    for part, found in split.items():
        tokens = encode(found, processor, table)
        texts[part] = "".join(f"{text}\n" for text in found).encode("utf-8")
        sizes[part] = {"documents": len(found), "bytes": text_bytes(found), "tokens": len(tokens)}
        paths += [demo / f"{part}.txt", demo / f"fineweb_{part}_000000.bin"]
        shards.write_atomic(paths[-2], texts[part])
        shards.write_shard(paths[-1], tokens)
    say("measuring xz on the validation text")
    files = {path.relative_to(out).as_posix(): {"bytes": path.stat().st_size,
                                                "sha256": shards.sha256_of(path)} for path in paths}
    manifest = {"recipe": recipe(vocab_size), "splits": sizes, "bos_id": encoding.BOS_ID,
                "append_eos": False, "counts": dict(sorted(counts.items())),
                "tokenizer_sha256": shards.sha256_of(paths[0]), "files": files,
                "yardsticks": yardsticks(texts["train"], texts["val"], sizes["val"]["bytes"])}
    shards.write_atomic(out / MANIFEST, json.dumps(manifest, indent=1).encode() + b"\n")
    return manifest


def say(line):
    print(f"demo: {line}", flush=True)


def figures(manifest, out):
    """Return the lines of a manifest's figures, and the next command."""
    lines = [f"{part}: {size['documents']:,} documents, {size['bytes']:,} bytes, "
             f"{size['tokens']:,} tokens ({size['bytes'] / size['tokens']:.2f} bytes each)"
             for part, size in manifest["splits"].items()]
    measured = manifest["yardsticks"]
    lines.append(f"xz on the validation text: {measured['xz_val_bpb']:.3f} bits per byte, "
                 f"{measured['xz_train_val_minus_train_bpb']:.3f} after the training text")
    return lines, run_line(manifest, out)


def summarise(manifest, out, seconds):
    """Print the manifest's figures and the next command."""
    lines, command = figures(manifest, out)
    for line in lines:
        say(line)
    say(f"ready in {seconds:.0f} s; next: {command}")


def run_line(manifest, out):
    """Return the command that trains on the demo; PRESET=demo alone reads data/, 1024 pieces."""
    vocab_size = manifest["recipe"]["vocab_size"]
    settings = dict(PRESET="demo")
    if (out.resolve(), vocab_size) != (Path("data").resolve(), 1024):
        tokenizer, = (name for name in manifest["files"] if name.endswith(".model"))
        settings.update(DATA_PATH=out / "datasets/demo", TOKENIZER_PATH=out / tokenizer,
                        VOCAB_SIZE=vocab_size)
    return shards.run_line(**settings)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent,
                        help="folder that gets datasets/demo/ and tokenizers/ (default: the "
                        "folder of this script)")
    parser.add_argument("--vocab-size", type=int, default=1024,
                        help="pieces of the tokenizer, {}..{} (default: 1024)".format(*VOCAB_RANGE))
    parser.add_argument("--force", action="store_true",
                        help="build again even if the product is there")
    args = parser.parse_args(argv)
    if not VOCAB_RANGE[0] <= args.vocab_size <= VOCAB_RANGE[1]:
        parser.error("--vocab-size is {}, must lie in {}..{}".format(args.vocab_size, *VOCAB_RANGE))
    return args


def run(args):
    """Build the demo, or say that it is there already; then print its figures."""
    start = time.perf_counter()
    manifest, reason = inspect_product(args.out, args.vocab_size)
    if manifest and not args.force:
        say(f"already built and unchanged in {args.out}; --force builds it again")
    else:
        say(f"building in {args.out} ({reason or '--force'})")
        manifest = build(args.out, args.vocab_size)
    summarise(manifest, args.out, time.perf_counter() - start)


def main(argv=None):
    """Return the exit status; faults of the user's making end in one line."""
    args = parse_args(argv)
    try:
        if sys.version_info < (3, 10):
            raise DemoError(f"Python is {platform.python_version()}, must be 3.10 or newer; "
                            "run this with a newer one")
        if MISSING:
            raise DemoError(f"the package {MISSING} is missing; install it with: {PIP_LINE}")
        run(args)
    except (DemoError, ValueError) as error:
        print(f"build_demo: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"build_demo: {error.strerror}: {error.filename}; free the folder or its disk, or "
              "choose another with --out", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("build_demo: stopped; run it again to build the demo", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
