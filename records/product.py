"""The script whose runs the record tools read: imported from one folder above, inert."""

import functools
import importlib
import sys
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "train_gpt.py"


@functools.cache
def script() -> ModuleType:
    """Return the module `train_gpt`; importing it reads no setting and starts nothing."""
    if str(REPOSITORY) not in sys.path:
        sys.path.append(str(REPOSITORY))
    return importlib.import_module("train_gpt")
