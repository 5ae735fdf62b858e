"""A packed artifact as a model that can be asked: read with the script's own reader."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from logs import EVENTS_FILE, LogError, read_run
from product import script


class Artifact(NamedTuple):
    """What an artifact's file holds: header, stored tensors by name, and its settings."""

    path: Path
    header: dict[str, Any]
    tensors: dict[str, Any]
    config: Any

    def weights(self) -> dict[str, Any]:
        """Return its fp32 weights by parameter name."""
        return script().restore_weights(self.header, self.tensors, self.config, self.path)

    def model(self, **options: Any) -> tuple[Any, Any]:
        """Return the model on the CPU, and the layout of its layers; options: GPT's own."""
        product = script()
        phase = product.phase_of(self.header, self.config, self.path)
        layout = product.phases(self.config)[phase].layout
        model = product.GPT(self.config, **options)
        model.load_state_dict(self.weights())
        return model.eval(), layout


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def open_artifact(path: Path) -> Artifact:
    """Read an artifact; raises LogError, or the script's own error, where there is none."""
    if not path.is_file():
        raise LogError(f"{path}: no such file; give a run's {script().KINDS['artifact'][0]}")
    product = script()
    header, tensors = product.read_tensors(path, "artifact")
    config = product.adopt(product.load_config({"STAGE": "evaluate"}), header, "evaluate", path)
    return Artifact(path, header, tensors, config)


def find_tokenizer(artifact: Artifact, given: Path | None,
                   env: Mapping[str, str] = os.environ) -> Path:
    """Return the tokenizer that an artifact was trained with, by its hash.

    Looked for: as given, by TOKENIZER_PATH, where the run beside the artifact had it, where the
    script looks by default. Raises LogError where none of these files is the one.
    """
    run = logged_tokenizer(artifact.path.with_name(EVENTS_FILE))
    places = [given] if given else [
        Path(place) for place in (env.get("TOKENIZER_PATH"), run, artifact.config.tokenizer_file)
        if place]
    wanted = artifact.header["tokenizer_sha256"]
    for place in places:
        if place.is_file() and file_sha256(place) == wanted:
            return place
    tried = ", ".join(f"{place} ({'another one' if place.is_file() else 'not there'})"
                      for place in places)
    raise LogError(f"{artifact.path}: its tokenizer (sha256 {wanted[:16]}…) is none of: {tried}; "
                   "give --tokenizer FILE.model")


def logged_tokenizer(events: Path) -> str | None:
    """Return the path of the tokenizer that a run logged, or None."""
    try:
        return read_run(events).config.get("tokenizer_path") or None
    except LogError:
        return None
