"""What is published for the challenge: one table of variants, and the names of known data.

Every fact was read in the public challenge repository and its pull requests (numbers in brackets);
nothing here was measured on the files themselves. A fingerprint is what several logs agree on:
the targets a script scores when it drops the tail below one window of 2,048, and the bytes that
the SentencePiece byte table gives them.
"""

from typing import NamedTuple

WINDOW_TOKENS = 2048  # published scripts score whole windows of this length
DEFAULT_VARIANT = "sp8192"
REMOTE_PREFIX = "datasets"  # folder of a repository that holds everything below
MANIFEST_NAME = "manifest.json"  # beside the folders datasets/ and tokenizers/ of a repository
UNKNOWN = "UNKNOWN"
# Every variant is of one validation text: where the logs say no bytes, the divisor is near its own
VAL_TEXT_BYTES = 151_080_891
NEAR_FRAC = 2e-4  # known counts differ from it by 0.45e-4 at most


class Fingerprint(NamedTuple):
    """One known validation set; None where the logs do not say."""

    label: str
    targets: int
    target_bytes: int | None = None
    tokens: int | None = None  # with every BOS and the tail


class Variant(NamedTuple):
    """One published tokenisation; paths are below REMOTE_PREFIX there and below data/ here."""

    name: str
    repository: str
    folder: str
    tokenizer: str
    vocab_size: int
    train_shards: int
    has_sidecar: bool
    fingerprints: tuple[Fingerprint, ...]


class DocumentList(NamedTuple):
    """The text behind every variant, one JSON object with "text" a line."""

    repository: str
    path: str
    source_manifest: str
    size_bytes: int
    sha256: str


CASEOPS = "sp8192_lossless_caps_caseops_v1_reserved"
ALIASES = {"caseops": CASEOPS, "sp8192_caseops": CASEOPS}
VARIANTS = {variant.name: variant for variant in (
    Variant("sp1024", "willdepueoai/parameter-golf", "datasets/fineweb10B_sp1024",
            "tokenizers/fineweb_1024_bpe.model", 1024, 195, False,
            (Fingerprint("canonical sp1024", 62_021_632, 151_080_362, 62_021_846),)),
    Variant("sp4096", "kevclark/parameter-golf", "datasets/fineweb10B_sp4096",
            "tokenizers/fineweb_4096_bpe.model", 4096, 143, False,
            (Fingerprint("canonical sp4096", 45_508_608, 151_074_053),
             Fingerprint("sp4096, the export of #1395", 45_516_800, 151_077_493))),
    Variant("sp8192", "kevclark/parameter-golf", "datasets/fineweb10B_sp8192",
            "tokenizers/fineweb_8192_bpe.model", 8192, 128, False,
            (Fingerprint("canonical sp8192", 40_540_160, 151_078_222, 40_540_803),
             Fingerprint("another tokenizer's sp8192", 40_546_304),
             Fingerprint("another tokenizer's sp8192", 40_548_352))),
    Variant(CASEOPS, "romeerp/parameter-golf-caseops-v1", f"datasets/fineweb10B_{CASEOPS}",
            "tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model", 8192, 80, True,
            (Fingerprint("canonical sp8192 CaseOps", 47_851_520, None, 47_853_344),)),
)}
DOCUMENTS = DocumentList(
    "willdepueoai/parameter-golf", "docs_selected.jsonl", "docs_selected.source_manifest.json",
    48_166_275_520, "84386dfa7b339a5d4831d5273c4a2028b78b60670d3a235633a8520545d19bc7")


def find_variant(name: str) -> Variant:
    """Return the variant of that name or alias; ValueError lists the names there are."""
    try:
        return VARIANTS[ALIASES.get(name, name)]
    except KeyError:
        known = ", ".join([*VARIANTS, *ALIASES])
        raise ValueError(f"variant {name!r}: not in the catalogue; choose one of {known}") from None


def whole_targets(num_tokens: int) -> int:
    """Return how many of num_tokens - 1 targets lie in whole windows: what fingerprints count."""
    return max(0, num_tokens - 1) // WINDOW_TOKENS * WINDOW_TOKENS


def name_validation(num_tokens: int, target_bytes: int) -> str:
    """Return the name of a validation set, or UNKNOWN.

    num_tokens counts every token of the shards; target_bytes is what a score divides by, over the
    first whole_targets(num_tokens) targets.
    """
    targets = whole_targets(num_tokens)
    is_near = abs(target_bytes - VAL_TEXT_BYTES) <= NEAR_FRAC * VAL_TEXT_BYTES
    for variant in VARIANTS.values():
        for known in variant.fingerprints:
            is_size = known.targets == targets and known.tokens in (None, num_tokens)
            if is_size and (is_near if known.target_bytes is None
                            else known.target_bytes == target_bytes):
                return known.label
    return UNKNOWN


def nearest_note(num_tokens: int, target_bytes: int) -> str:
    """Return in which count a validation set departs from a known one, or ""."""
    targets = whole_targets(num_tokens)
    for variant in VARIANTS.values():
        for known in variant.fingerprints:
            if known.targets == targets and known.target_bytes is not None:
                return (f"as many targets as {known.label}, but {target_bytes} bytes instead of "
                        f"{known.target_bytes}: another tokenizer file")
            if known.target_bytes == target_bytes and target_bytes:
                return (f"as many bytes as {known.label}, but {targets} targets instead of "
                        f"{known.targets}: other tokens")
    return ""
