"""Look into a packed artifact: where its bytes are and how close to the entropy they come.

    python records/records.py inspect runs/ID/final_model.int6.ptz

`entropy` is what an ideal coder with each tensor's own histogram would need, bits a weight; `over`
is how much more the file spends (a coder that knows more than a histogram spends less). All codes
are coded together: a tensor's bytes are its share by ideal length under the coder's histograms.
With the weights that it was made from (found beside it, or --weights) it says how far the codes
are from them: root mean square error, relative to the weights'. Reads with the script's own reader.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from artifact import Artifact, open_artifact
from logs import LogError
from product import script

BAR_CHARACTERS, HISTOGRAM_ROWS = 50, 32
SHARED = "shared"  # kind of what all codes need together
TITLES = ("tensor", "kind", "shape", "bytes", "share", "bits", "entropy", "over", "at limit",
          "error")


class Stored(NamedTuple):
    """One weight as an artifact stores it, or what all codes share (steps, tables).

    bytes: in the file. entropy_bits: per code, order 0; None where it has no codes. at_limit: share
    of codes at the end of their range. error: relative, None without the original weights.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    weights: int
    bytes: float
    entropy_bits: float | None
    at_limit: float | None
    error: float | None
    histogram: dict[int, int]

    @property
    def bits(self) -> float | None:
        return 8 * self.bytes / self.weights if self.weights else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--weights", type=Path, metavar="FILE",
                        help="final_model.weights (default: the one beside the artifact)")
    parser.add_argument("--json", action="store_true", help="all of it, with whole histograms")


def histogram(codes) -> dict[int, int]:
    """Return how often each code is there."""
    values, counts = codes.flatten().unique(return_counts=True)
    return dict(zip(values.tolist(), counts.tolist()))


def relative_error(stored, original) -> float:
    """Return the root mean square of the difference over that of the original."""
    size = original.float().norm().item()
    return (stored.float() - original.float()).norm().item() / size if size else 0.0


def read_codes(header: dict, tensors: dict, config, origin: Path) -> tuple[dict, dict]:
    """Return (weights, codes) by name.

    The script's reader hands the codes of each matrix to `dequantize`, in the order of storage;
    listening there spares a second reader of the format.
    """
    product, heard = script(), []
    original = product.dequantize

    def listen(codes, *steps):
        heard.append(codes)
        return original(codes, *steps)

    with mock.patch.object(product, "dequantize", listen):
        weights = product.restore_weights(header, tensors, config, origin)
    coded = [name for name, kind in storage_of(config).items() if kind in limits_of(config)]
    return weights, dict(zip(coded, heard, strict=True))


def storage_of(config) -> dict[str, str]:
    return {name: entry.kind for name, entry in script().inventory(config).items()}


def limits_of(config) -> dict[str, int]:
    """Return the largest code of each kind that has codes; steps by sensitivity use all of int8."""
    product = script()
    rule = product.STEP_RULES[config.rule](config)
    return {kind: rule.max_code(spec) for kind, spec in product.quant_specs(config).items()}


def ideal_bytes(codes: Mapping[str, Any]) -> dict[str, float]:
    """Return what each tensor's codes need under the histograms of the coder's classes."""
    product = script()
    counts = {name: product.class_counts(
        c, product.element_classes(*product.size_classes(c))).double()
        for name, c in codes.items()}
    total = sum(counts.values())
    bits = -(total / total.sum(-1, keepdim=True)).log2()
    return {name: float((c[c > 0] * bits[c > 0]).sum() / 8) for name, c in counts.items()}


def look(codes: Mapping[str, Any], weights: Mapping[str, Any], originals: Mapping[str, Any],
         sizes: Mapping[str, int], config) -> list[Stored]:
    """Return every stored weight, then what codes share. sizes: bytes in the file by tensor."""
    product, storage, limits, found = script(), storage_of(config), limits_of(config), []
    ideal, side = ideal_bytes(codes), {name: n for name, n in sizes.items() if name not in storage}
    parts = ("stream", "states", "codes")  # "codes.7" with a coder of files
    spent = sum(side.pop(name) for name in list(side) if name.split(".")[0] in parts)
    for name, kind in storage.items():
        weight, coded, original = weights[name], codes.get(name), originals.get(name)
        number, counts, entropy, at_limit = weight.numel(), {}, None, None
        size = float(sizes.get(name, 0))
        if coded is not None:
            counts, limit = histogram(coded), limits[kind]
            size = spent * ideal[name] / sum(ideal.values())
            entropy = 8 * product.entropy_bytes(coded) / number
            at_limit = sum(counts.get(code, 0) for code in (-limit, limit)) / number
        error = None if original is None else relative_error(weight, original)
        found.append(Stored(name, kind, tuple(weight.shape), number, size, entropy, at_limit,
                            error, counts))
    return found + [Stored(name, SHARED, (), 0, size, None, None, None, {})
                    for name, size in side.items()]


def merged(stored: Sequence[Stored], name: str) -> Stored:
    """Return several weights as one: bytes and histograms added, the rest weighted by number."""
    total, counts = sum(s.weights for s in stored), Counter[int]()
    for s in stored:
        counts.update(s.histogram)

    def mean(values):
        known = [(value, s.weights) for value, s in zip(values, stored) if value is not None]
        weight = sum(number for _, number in known)
        return sum(value * number for value, number in known) / weight if weight else None

    return Stored(name, stored[0].kind, (), total, sum(s.bytes for s in stored),
                  mean([s.entropy_bits for s in stored]), mean([s.at_limit for s in stored]),
                  None, counts)


def row(s: Stored, whole_bytes: int) -> tuple[str, ...]:
    """Return a line's cells, in the order of TITLES."""
    def percent(value):
        return "" if value is None else f"{100 * value:.2f} %"

    over = s.bits / s.entropy_bits - 1 if s.bits and s.entropy_bits else None
    bits, entropy = ("" if value is None else f"{value:.3f}" for value in (s.bits, s.entropy_bits))
    number = f"{s.weights:,}" if s.weights else ""
    return (s.name, s.kind, "x".join(map(str, s.shape)) or number, f"{s.bytes:,.0f}",
            percent(s.bytes / whole_bytes), bits, entropy, percent(over), percent(s.at_limit),
            percent(s.error))


def bars(kind: Stored) -> list[str]:
    """Return the histogram of a kind's codes: share by distance from zero, sign left out."""
    largest, total = max(map(abs, kind.histogram)), sum(kind.histogram.values())
    width = -(-(largest + 1) // HISTOGRAM_ROWS)
    shares = [sum(count for code, count in kind.histogram.items()
                  if first <= abs(code) < first + width) / total
              for first in range(0, largest + 1, width)]
    lines = [f"codes of {kind.kind}, by distance from zero:"]
    for i, share in enumerate(shares):
        first, last = i * width, min((i + 1) * width - 1, largest)
        label = f"{first}" if first == last else f"{first}-{last}"
        bar = "#" * round(BAR_CHARACTERS * share / max(shares))
        lines.append(f"  {label:>7} {100 * share:7.3f} % {bar}".rstrip())
    return lines


def report(stored: Sequence[Stored], whole_bytes: int, header: Mapping[str, Any]) -> str:
    """Return the page."""
    kinds = [merged([s for s in stored if s.kind == kind], f"all {kind}")
             for kind in dict.fromkeys(s.kind for s in stored)]
    rows = [TITLES, *(row(s, whole_bytes) for s in (*stored, *kinds))]
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(TITLES))]
    lines = ["  ".join(cell.ljust(width) if i < 2 else cell.rjust(width)
                       for i, (cell, width) in enumerate(zip(cells, widths))).rstrip()
             for cells in rows]
    number, used = sum(s.weights for s in stored), sum(s.bytes for s in stored)
    head = (f"{whole_bytes:,} bytes, {number:,} weights, {8 * whole_bytes / max(1, number):.3f} "
            f"bits a weight; {whole_bytes - used:,.0f} bytes are header and checksum; coder "
            f"{header.get('codec')}")
    if header.get("multiplier") is not None:
        head += f"; step multiplier {header['multiplier']:.6f}"
    histograms = [line for kind in kinds if kind.histogram for line in ["", *bars(kind)]]
    return "\n".join([head, "", *lines, *histograms])


def stored_in(artifact: Artifact, weights_file: Path | None = None) -> list[Stored]:
    """Return every stored weight of an artifact, compared with the weights beside it if there."""
    header, config, originals = artifact.header, artifact.config, dict[str, Any]()
    usual = script().KINDS["weights"][0]
    path = weights_file or artifact.path.with_name(usual)
    if weights_file and not path.is_file():
        raise LogError(f"--weights {path}: no such file; give a run's {usual}")
    if path.is_file():
        _, originals = script().read_tensors(path, "weights")
    weights, codes = read_codes(header, artifact.tensors, config, artifact.path)
    for name, original in originals.items():
        if name in weights and original.shape != weights[name].shape:
            raise LogError(f"{path}: weights of another model: {name} is "
                           f"{tuple(original.shape)}, in the artifact "
                           f"{tuple(weights[name].shape)}; give --weights FILE of its own run")
    return look(codes, weights, originals, {entry[0]: entry[-1] for entry in header["tensors"]},
                config)


def run(args: argparse.Namespace) -> int:
    artifact = open_artifact(args.artifact)
    stored, whole = stored_in(artifact, args.weights), args.artifact.stat().st_size
    if args.json:
        rows = [dict(s._asdict(), bits=s.bits) for s in stored]
        multiplier = artifact.header.get("multiplier")
        print(json.dumps(dict(bytes=whole, multiplier=multiplier, tensors=rows)))
    else:
        print(report(stored, whole, artifact.header))
    return 0
