"""Write a packed model's weights as a safetensors file, for other tools.

    python records/records.py export runs/ID/final_model.int6.ptz --to model.safetensors

Names are the model's own, values fp32 as the artifact stands for them. The metadata holds what is
needed to run it: settings, order of layers, tokenizer (path and sha256), and where it came from.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from pathlib import Path

from artifact import Artifact, file_sha256, find_tokenizer, open_artifact
from logs import LogError
from product import SCRIPT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--to", type=Path, required=True, metavar="FILE",
                        help="FILE.safetensors; an existing file is not overwritten")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE",
                        help="default: TOKENIZER_PATH, or the one that the run used")


def metadata(artifact: Artifact, tokenizer: Path | None) -> dict[str, str]:
    """Return what a safetensors header holds beside the tensors: text by name."""
    header = artifact.header
    return {"format": "pt", "config": json.dumps(header["config"], sort_keys=True),
            "layer_order": json.dumps(header["order"]),
            "tokenizer": str(tokenizer) if tokenizer else "",
            "tokenizer_sha256": header["tokenizer_sha256"],
            "artifact_sha256": file_sha256(artifact.path),
            "script_sha256": file_sha256(SCRIPT)}


def run(args: argparse.Namespace) -> int:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise LogError("safetensors is not installed: pip install -r records/requirements.txt") \
            from None
    if args.to.suffix != ".safetensors":
        raise LogError(f"--to {args.to}: must end in .safetensors")
    if args.to.exists():
        raise LogError(f"--to {args.to}: exists; choose another name or remove it")
    artifact = open_artifact(args.artifact)
    try:
        tokenizer: Path | None = find_tokenizer(artifact, args.tokenizer)
    except LogError as error:
        if args.tokenizer:
            raise
        tokenizer = None
        print(f"note: {error}")
    weights = {name: w.contiguous() for name, w in artifact.weights().items()}
    part = args.to.with_name(args.to.name + ".part")
    try:
        args.to.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, part, metadata(artifact, tokenizer))
        os.replace(part, args.to)
    except (OSError, SafetensorError) as error:
        raise LogError(f"--to {args.to}: cannot be written ({error})") from error
    finally:  # whatever ended it, half a file is no use
        with contextlib.suppress(OSError):
            part.unlink()
    number = sum(w.numel() for w in weights.values())
    print(f"{args.to}: {len(weights)} tensors, {number:,} weights, {args.to.stat().st_size:,} "
          f"bytes; tokenizer {tokenizer or 'unknown'}")
    return 0
