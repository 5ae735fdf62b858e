"""Make the submission form of the training script: small, self-extracting, the same program.

    python records/records.py script        # train_gpt.py -> runs/submission/train_gpt.py

Comments, docstrings and annotations that nothing reads go; names stay, so the text that a log
shows is still readable and equals the source as a syntax tree. What is left is compressed and put
into a string of a short loader.

The loader writes the text beside other temporary files, under a name made of its hash, and runs it
in its own module: `__file__` stays the file that was shipped, whose bytes count, while functions
come from the written file, so tracebacks, `inspect` and Triton find their source. A worker process
that imports the main module again goes the same way.

The alternatives were measured on a script of 160 kB, stripped to 104 kB: brotli 30.9 kB, raw LZMA
31.9 kB, bz2 31.8 kB; with the commonest words as single bytes first, brotli 29.7 kB. On one of 218
kB, stripped to 137 kB, that was 39.1 kB, and a context-mixing coder (14 contexts over 1,141 word
pieces, its decoder in the loader) would have made 33.8 kB, for 10 s of decoding at every start.
brotli is a requirement of the script in any case. As a latin-1 string its bytes grow by 1.2 %, in
base85 by 25 %; a zip archive behind the loader would not grow but can be neither compiled nor
imported.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import re
from collections import Counter
from pathlib import Path

from imports import python_faults
from product import REPOSITORY, SCRIPT

PACKED = REPOSITORY / "runs" / "submission" / "train_gpt.py"
MARK = b"#coding:l1\n"  # the first line of a packed script; each byte is one character
CODES = range(128, 256)  # bytes that ASCII leaves free stand for the commonest words
# mkstemp and replace: several ranks may start at once, and a file is there whole or not at all.
# The owner's id is in the name because nobody may replace another user's temporary file.
# `linecache` answers for classes, whose source Python looks for in the module's __file__.
LOADER = """\
import hashlib,linecache,os,tempfile
try:import brotli
except ImportError:raise SystemExit('error: brotli is not installed: pip install "brotli>=1.2"')
*w,s=brotli.decompress('''PAYLOAD'''.encode('l1')).decode('l1').split('\\0')
for i,x in enumerate(w,128):s=s.replace(chr(i),x)
s=s.encode('l1')
try:
 d=tempfile.gettempdir()
 f,t=tempfile.mkstemp(dir=d)
 with open(f,'wb')as f:f.write(s)
except OSError as e:raise SystemExit(f'error: temporary folder: {e}; set TMPDIR to one with room')
p=os.path.join(d,f'train_gpt_{hashlib.sha256(s).hexdigest()[:16]}_{os.stat(t).st_uid}.py')
os.replace(t,p)
linecache.cache[__file__]=len(s),None,s.decode().splitlines(True),p
exec(compile(s,p,'exec'))
"""
# Decorators that do not look at annotations; any other might (custom_op, triton.jit, dataclass …).
BLIND_DECORATORS = {"property", "staticmethod", "classmethod", "contextmanager", "cache",
                    "lru_cache", "cached_property", "no_grad", "inference_mode"}
Function = (ast.FunctionDef, ast.AsyncFunctionDef)


class ScriptError(ValueError):
    """A script cannot be packed or unpacked; the message says why and what to do."""


def decorator_name(node: ast.expr) -> str:
    """Return the last name of a decorator: `no_grad` of `@torch.no_grad()`."""
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


class Stripper(ast.NodeTransformer):
    """Removes docstrings and the annotations that nothing reads.

    Kept: every annotation in a class body (fields of dataclasses), all of a function whose
    decorators may read them (schemas of custom operators, Triton's constexpr), a local that is
    declared without a value, and the module's docstring where `__doc__` is used.
    """

    def __init__(self, keep_module_docstring: bool):
        self.keep_module_docstring = keep_module_docstring

    def visit_Module(self, node):
        return self.generic_visit(node if self.keep_module_docstring else undocumented(node))

    def visit_ClassDef(self, node):
        undocumented(node)
        node.body = [statement if isinstance(statement, ast.AnnAssign) else self.visit(statement)
                     for statement in node.body]
        return node

    def visit_FunctionDef(self, node):
        undocumented(node)
        if all(decorator_name(d) in BLIND_DECORATORS for d in node.decorator_list):
            node.returns = None
            for argument in ast.walk(node.args):
                if isinstance(argument, ast.arg):
                    argument.annotation = None
        return self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_AnnAssign(self, node):
        if node.value is None:
            return node
        return ast.copy_location(ast.Assign([node.target], node.value), node)


def undocumented(node):
    """Remove the docstring of a module, class or function in place; a body is never left empty."""
    if ast.get_docstring(node, clean=False) is not None:
        node.body = node.body[1:]
        if not node.body and not isinstance(node, ast.Module):
            node.body = [ast.Expr(ast.Constant(0))]
    return node


def strip_source(source: str) -> str:
    """Return the same program in as few characters as keep every name.

    Raises ScriptError where the source does not parse or reads docstrings other than its own.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise ScriptError(f"line {error.lineno}: {error.msg}: no Python program") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "__doc__":
            raise ScriptError(f"line {node.lineno}: reads a docstring, which the submission form "
                              "drops: give that text a name of its own")
    own = any(isinstance(node, ast.Name) and node.id == "__doc__" for node in ast.walk(tree))
    stripped = ast.fix_missing_locations(Stripper(own).visit(tree))
    text = print_tree(stripped)
    if python_faults(text.encode(), "it") or ast.dump(ast.parse(text)) != ast.dump(stripped):
        raise ScriptError("python-minifier printed another program; make the script with the "
                          "version in records/requirements.txt")
    return text


def print_tree(tree: ast.Module) -> str:
    """Return a syntax tree as short text that Python 3.10 reads, whatever Python runs this."""
    try:
        from python_minifier.f_string import OuterFString
        from python_minifier.module_printer import ModulePrinter
    except ImportError:
        raise ScriptError("python-minifier is not installed: "
                          "pip install -r records/requirements.txt") from None

    class Printer(ModulePrinter):
        def visit_JoinedStr(self, node):  # by itself it nests like quotes from Python 3.12 on
            self.printer.fstring(str(OuterFString(node, pep701=False)))

    printer = Printer()
    printer(tree)
    return printer.code


def string_body(data: bytes) -> bytes:
    """Return `data` as the body of a '''…''' literal in a latin-1 file, one byte a character.

    Only what the tokenizer would change or end at is escaped: backslash, carriage return, NUL, a
    third quote in a row and one at the end.
    """
    data = data.replace(b"\\", b"\\\\").replace(b"\r", b"\\r")
    data = re.sub(rb"\0(?=[0-7])", rb"\\x00", data).replace(b"\0", b"\\0")
    return re.sub(rb"(?<='')'|'\Z", rb"\\'", data)


def fold_words(text: str) -> str:
    """Return words and the text with each of them as one character 0..255, separated by NULs.

    Bytes of characters beyond ASCII stay: in the list of words they stand for themselves.
    """
    view = text.encode().decode("latin-1")  # a character a byte
    counts = Counter(re.findall(r"[A-Za-z_][A-Za-z_0-9]+", view))
    free = [chr(code) for code in CODES if chr(code) not in view]
    ranked = sorted(counts, key=lambda word: (-counts[word] * len(word), word))
    codes = dict(zip(sorted(ranked[:len(free)]), free))
    folded = re.sub(r"[A-Za-z_][A-Za-z_0-9]+", lambda m: codes.get(m[0], m[0]), view)
    words = {code: word for word, code in codes.items()}
    return "\0".join([*(words.get(chr(code), chr(code)) for code in CODES), folded])


def unfold_words(folded: str) -> str:
    """Return the text that `fold_words` was given, as the loader does."""
    *words, text = folded.split("\0")
    for code, word in zip(CODES, words):
        text = text.replace(chr(code), word)
    return text.encode("latin-1").decode()


def pack_text(text: str) -> bytes:
    """Return a self-extracting script that runs `text`; equal texts give equal bytes."""
    import brotli  # type: ignore[import-untyped]
    payload = brotli.compress(fold_words(text).encode("latin-1"), quality=11, lgwin=18)
    head, tail = LOADER.encode().split(b"PAYLOAD")
    packed = MARK + head + string_body(payload) + tail
    if unpack_script(packed) != text:
        raise ScriptError("the packed script does not give its text back: report this as a bug")
    return packed


def unpack_script(data: bytes) -> str:
    """Return the text that a script file runs: unpacked, or as it is where it is readable.

    Runs nothing of it. Raises ScriptError on a file that is neither.
    """
    try:
        if not data.startswith(MARK):
            return data.decode("utf-8")
        import brotli  # type: ignore[import-untyped]
        payload = next(str(node.value.value) for node in ast.walk(ast.parse(data))
                       if isinstance(node, ast.Attribute) and node.attr == "encode"
                       and isinstance(node.value, ast.Constant))  # '…'.encode('l1')
        return unfold_words(brotli.decompress(payload.encode("latin-1")).decode("latin-1"))
    except ImportError:
        raise ScriptError("brotli is not installed: pip install 'brotli>=1.2'") from None
    except Exception as error:  # brotli, ast and the decoders each raise their own
        raise ScriptError(f"neither a readable nor a packed script ({error}): make it again with "
                          "records.py script") from None


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--source", type=Path, default=SCRIPT,
                        help="the readable script (default: train_gpt.py of this repository)")
    parser.add_argument("--out", type=Path, default=PACKED,
                        help="where the small one goes (default: runs/submission/train_gpt.py)")


def run(args: argparse.Namespace) -> int:
    """Write the submission form and say what it measures."""
    source = args.source.read_bytes()
    if args.out.resolve() == args.source.resolve():
        raise ScriptError(f"--out {args.out}: is the source itself; choose another file")
    text = strip_source(unpack_script(source))
    packed = pack_text(text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    part = args.out.with_name(args.out.name + ".part")
    part.write_bytes(packed)
    os.replace(part, args.out)
    print(f"{args.out}: {len(packed)} bytes (source {len(source)}, stripped {len(text.encode())})")
    print(f"sha256 {hashlib.sha256(packed).hexdigest()}")
    print(f"run the record's seeds with it: SEED=1337 python {args.out}")
    return 0
