"""What a script needs to run: a Python version it compiles on, modules that it imports."""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

OLDEST = (3, 10)
# How files are named, or begin, that Python, a shell or the system's loader runs.
CODE_SUFFIXES = {".py", ".pyw", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".pth", ".egg", ".whl",
                 ".zip", ".sh", ".exe", ".bat", ".cu", ".ptx", ".cubin"}
CODE_HEADS = (b"#!", b"\x7fELF", b"MZ", b"PK\3\4", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe")
# Requirement -> modules of another name.
MODULES = {"pyyaml": {"yaml"}, "scikit-learn": {"sklearn"}, "pillow": {"PIL"},
           "flash-attn-3": {"flash_attn_interface"}}


def python_faults(data: bytes, what: str) -> list[str]:
    """Return why a program does not compile on the oldest Python supported."""
    try:
        ast.parse(data, feature_version=OLDEST)
        compile(data, what, "exec", dont_inherit=True)
        return [f"{what}: {fault}" for fault in fstring_faults(data)]
    except (SyntaxError, ValueError) as error:  # ValueError: NUL bytes
        line = getattr(error, "lineno", None)
        return [f"{what}{f' line {line}' if line else ''}: {getattr(error, 'msg', error)}"]


def fstring_faults(data: bytes) -> list[str]:
    """Return f-strings that need Python 3.12: like quotes nested, a backslash in an expression.

    Older Pythons refuse them when compiling; newer ones split f-strings into tokens.
    """
    if sys.version_info < (3, 12):
        return []
    faults, open_quotes = [], []
    for token in tokenize.tokenize(io.BytesIO(data).readline):
        kind = tokenize.tok_name[token.type]
        quote = token.string.lstrip("rRbBfFuU")
        quote = quote[:3] if quote[:3] in ("'''", '\"\"\"') else quote[:1]
        if open_quotes and kind in ("FSTRING_START", "STRING") and (
                quote in open_quotes or kind == "STRING" and "\\" in token.string):
            faults.append(f"line {token.start[0]}: an f-string only Python 3.12 reads")
        if kind == "FSTRING_START":
            open_quotes.append(quote)
        elif kind == "FSTRING_END":
            open_quotes.pop()
    return faults


def modules_of(requirements: str) -> set[str]:
    """Return the modules that a requirements.txt brings, by the usual rule of names."""
    names = {match[0].lower() for line in requirements.splitlines()
             if (match := re.match(r"[A-Za-z0-9][\w.-]*", line.strip()))}
    return {module for name in names
            for module in MODULES.get(name.replace("_", "-"), {name.replace("-", "_")})}


def imported(tree: ast.Module) -> list[tuple[str, int, bool]]:
    """Return (top-level module, line, whether its absence is provided for) of every import."""
    guarded = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Try)
               and any(catches_import_error(handler) for handler in node.handlers)
               for statement in node.body for inner in ast.walk(statement)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name.split(".")[0], node.lineno, id(node) in guarded)
                      for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "").split(".")[0]
            found.append((name, node.lineno, id(node) in guarded))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant) \
                and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            found.append((str(node.args[0].value).split(".")[0], node.lineno, id(node) in guarded))
    return found


def named_files(text: str) -> str:
    """Return every text that a program may use as a file's name, a line each: no docstrings."""
    tree = ast.parse(text)
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return "\n".join(node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)
                     and isinstance(node.value, str) and id(node) not in alone)


def runnable(folder: Path) -> list[Path]:
    """Return the files in a folder that could be run or imported, by their name or first bytes."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                head = file.read(4)
            if path.suffix.lower() in CODE_SUFFIXES or head.startswith(CODE_HEADS):
                found.append(path)
    return found


def catches_import_error(handler: ast.ExceptHandler) -> bool:
    names = {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)} \
        if handler.type else {"Exception"}
    return bool(names & {"ImportError", "ModuleNotFoundError", "Exception", "BaseException"})


def import_faults(data: bytes, requirements: str, beside: set[str]) -> list[str]:
    """Return imports that need a file beside the script, or a package that is not listed.

    A package may be unlisted where an ImportError is caught; a sibling never may.
    """
    listed = set(sys.stdlib_module_names) | modules_of(requirements)
    faults = []
    for name, line, guarded in imported(ast.parse(data)):
        if name.startswith("."):
            faults.append(f"line {line}: imports {name}, a file beside the script")
        elif name in beside:
            faults.append(f"line {line}: imports {name}, which lies beside the script")
        elif name not in listed and not guarded:
            faults.append(f"line {line}: imports {name}, neither standard library nor in "
                          "requirements.txt")
    return faults
