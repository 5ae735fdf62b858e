"""Documents to tokens, and to the exact raw bytes that each token stands for; without torch.

Two byte counts exist for one document. SentencePiece first normalises (NFKC, white space collapsed
and trimmed): the byte table (shards.byte_table) counts that normalised text. The surface of a
piece is the part of the *raw* text it came from: pieces tile the raw text without gaps or
overlap, except for what normalisation discards at the document's two edges.

A score divides by bytes, so the account of bytes below holds three counts of one stream against
each other: the byte table's, the text that the tokens decode to (by the decoder itself, id by id),
and a sidecar's. train_gpt.py has its own short copy of that rule; a test holds both to each other.
"""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import caseops
import numpy as np
import sentencepiece
import shards

BOS_ID = 1
VOCAB_RANGE = (300, shards.MAX_TOKEN + 1)  # below: no room beside 256 bytes and four controls

# The recipe that the published fineweb_*_bpe.model files store about themselves, as far as it
# departs from SentencePiece's defaults. One thread: more may break ties differently.
RECIPE: dict[str, Any] = dict(
    model_type="bpe", character_coverage=0.999, byte_fallback=True, split_digits=True,
    normalization_rule_name="nmt_nfkc", add_dummy_prefix=False, pad_id=0, bos_id=BOS_ID, eos_id=2,
    unk_id=3, hard_vocab_limit=False)


class Surface(NamedTuple):
    """One document as tokens; N of them, no BOS among them."""

    token_ids: np.ndarray  # (N,) uint16
    raw_bytes: np.ndarray  # (N,) int64, UTF-8 bytes of the raw text under each token
    discarded_edge_bytes: int  # raw bytes before the first and after the last token


class Spans(NamedTuple):
    """One document's N tokens and where they begin in its UTF-8 bytes."""

    token_ids: np.ndarray  # (N,) uint16
    edges: np.ndarray  # (N + 1,) int64; token i came from bytes edges[i]:edges[i + 1]. N = 0: [0]


# ---- tokenizers ------------------------------------------------------------------------------


def load_processor(model: Path | bytes) -> sentencepiece.SentencePieceProcessor:
    """Return the processor of a model file, or of its content; ValueError when it is none."""
    try:
        if isinstance(model, bytes):
            return sentencepiece.SentencePieceProcessor(model_proto=model)
        return sentencepiece.SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError) as error:
        name = "the tokenizer" if isinstance(model, bytes) else model
        raise ValueError(f"{name}: not a SentencePiece model ({' '.join(str(error).split())}); "
                         "give its .model file") from None


def check_tokenizer(processor: sentencepiece.SentencePieceProcessor, name: object,
                    remedy: str = "use one of the published tokenizers, or --train-tokenizer"
                    ) -> None:
    """Raise ValueError for a tokenizer whose tokens cannot be scored byte for byte.

    It needs a BOS, at most 65,536 pieces, a piece for each of the 256 bytes (else some text
    becomes the unknown token) and one for the bare space.
    """
    num_pieces = processor.get_piece_size()
    fault = ""
    if processor.bos_id() != BOS_ID:
        fault = f"its BOS id is {processor.bos_id()}, must be {BOS_ID}"
    elif num_pieces > VOCAB_RANGE[1]:
        fault = f"it has {num_pieces} pieces, a shard's 16 bits hold {VOCAB_RANGE[1]}"
    elif sum(processor.is_byte(token) for token in range(num_pieces)) < 256:
        fault = "it has no byte fallback, so some text would become the unknown token"
    elif processor.piece_to_id(shards.SPACE) == processor.unk_id():
        fault = f"it has no piece for a bare space ({shards.SPACE!r}), which would count 3 bytes"
    if fault:
        raise ValueError(f"{name}: {fault}; {remedy}")


def train_tokenizer(texts: Iterable[str], vocab_size: int,
                    operators: Sequence[str] = (), **changes: Any) -> bytes:
    """Return a SentencePiece model trained on texts by the published recipe, but for `changes`.

    operators: pieces of their own right after the control pieces, as CaseOps needs them. Reading
    from and writing to memory keeps paths out of the model; one thread keeps it the same
    everywhere. Raises ValueError when SentencePiece cannot train that many pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size,
            num_threads=1, minloglevel=2,
            **{**RECIPE, "user_defined_symbols": list(operators), **changes})
    except RuntimeError as error:
        raise ValueError(f"SentencePiece could not train {vocab_size} pieces: "
                         f"{' '.join(str(error).split())}; choose another --vocab-size") from None
    return model.getvalue()


# ---- encoding --------------------------------------------------------------------------------


def normalised_text(processor: sentencepiece.SentencePieceProcessor, text: str) -> str:
    """Return what decoding a text's tokens gives back, and what the byte table counts.

    SentencePiece's own `normalize` also shows a dummy prefix, which decoding takes off again.
    """
    return processor.decode(processor.encode(text))


def encode_batch(processor: sentencepiece.SentencePieceProcessor, texts: list[bytes],
                 num_threads: int = 1) -> list[np.ndarray]:
    """Return the tokens of each UTF-8 text, (N,) uint16, a BOS before them."""
    # Before 0.2.2 there is no numpy output, only lists of int
    kind: Any = "numpy" if hasattr(processor, "EncodeAsNumpy") else int
    found = processor.encode(texts, out_type=kind, add_bos=True, num_threads=num_threads)
    return [np.asarray(tokens, dtype=np.uint16) for tokens in found]


def spans_batch(processor: sentencepiece.SentencePieceProcessor, texts: list[bytes],
                num_threads: int = 1) -> list[Spans]:
    """Return the Spans of each UTF-8 text, from SentencePiece's surfaces."""
    if hasattr(processor, "EncodeAsOffsetMapping"):  # from 0.2.2 on
        mapped = processor.encode(texts, out_type="offset_mapping", num_threads=num_threads)
        return [_spans_of_offsets(found["ids"], found["offsets"]) for found in mapped]
    kind: Any = "immutable_proto"
    protos = processor.encode(texts, out_type=kind, num_threads=num_threads)
    return [_spans_of_proto(proto) for proto in protos]


def _spans_of_offsets(ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> Spans:
    """Return the Spans of tokens with their (begin, end), in bytes."""
    return _tile(ids, np.array([begin for begin, _ in offsets] + [offsets[-1][1] if ids else 0]))


def _spans_of_proto(proto) -> Spans:
    """Return the Spans of an ImmutableSentencePieceText, whose offsets count characters."""
    pieces = list(proto.pieces)
    if not pieces:
        return _tile([], np.zeros(1, np.int64))
    lead = len(proto.text[:pieces[0].begin].encode("utf-8"))
    lengths = [len(piece.surface.encode("utf-8")) for piece in pieces]
    return _tile([piece.id for piece in pieces], lead + np.cumsum([0, *lengths]))


def _tile(ids: Sequence[int], edges: np.ndarray) -> Spans:
    """Return Spans; an AssertionError where edges run backwards: the bytes would be wrong."""
    assert len(edges) == len(ids) + 1 and (np.diff(edges) >= 0).all(), "surfaces do not tile"
    return Spans(np.array(ids, dtype=np.uint16), edges.astype(np.int64))


def surface_bytes(processor: sentencepiece.SentencePieceProcessor, text: str) -> Surface:
    """Return a document's tokens with the raw bytes each stands for.

    raw_bytes.sum() + discarded_edge_bytes is the text's UTF-8 length. Of a character spread over
    several tokens (byte fallback, or one that normalisation expands) the last carries the bytes.
    """
    raw = text.encode("utf-8")
    token_ids, edges = spans_batch(processor, [raw])[0]
    return Surface(token_ids, np.diff(edges), len(raw) - int(edges[-1] - edges[0]))


# ---- the account of bytes --------------------------------------------------------------------


CHUNK_TOKENS = 1 << 22  # counted at once: bounds memory on 40 million tokens
# Raw bytes behind a byte of decoded text are at least so many twentieths. Nothing that NFKC maps
# to ASCII grows to more than twice its bytes (U+33AF: 3 bytes, "rad\u2215s2": 8), nothing at all to
# more than 11 times (U+FDFA: 3 bytes, 33).
TWENTIETHS_ASCII, TWENTIETHS_OTHER = 10, 1
# At most: a mathematical letter is 4 bytes and becomes 1; of control characters, which vanish,
# the slack is a run behind one token. White space collapses without limit.
MOST_TIMES, MOST_SLACK = 4, 256
MAX_UNSTEADY_FRAC, MIN_STEADY_TOKENS = 0.2, 500  # of pieces without a space; fewer tell nothing
QUIET_DRIFT_FRAC, WARN_DRIFT_FRAC = 1e-4, 1e-3  # of the decoded text; FineWeb has 0.65e-4


class Rules(NamedTuple):
    """What each id of a tokenizer stands for, arrays (V,); lengths are bytes of UTF-8."""

    table: shards.ByteTable
    inside: np.ndarray  # uint16, decoded behind other text
    first: np.ndarray  # uint16, decoded as the first of a document
    least: np.ndarray  # uint32, raw bytes in twentieths, however normalisation expanded them
    most: np.ndarray  # int32, raw bytes, however normalisation shrank them
    is_unknown: np.ndarray  # bool
    is_operator: np.ndarray  # bool, of CaseOps
    is_steady: np.ndarray  # bool, pieces of text without a space, no bytes
    byte_values: np.ndarray  # int16, -1 where an id is no byte piece
    bos_id: int
    escape_id: int  # of CaseOps, -1 without


class Counts(NamedTuple):
    """A stream of N tokens counted, arrays (N,) in bytes; a document's BOS has none."""

    table: np.ndarray  # uint16, by the byte table
    decoded: np.ndarray  # uint16, what decoding gives
    text: np.ndarray  # uint16, what decoding and undoing CaseOps gives


class Fault(NamedTuple):
    """Why a stream's bytes cannot be believed."""

    check: str  # "ids", "bytes" or "sidecar"
    position: int  # of the first bad token
    text: str
    remedy: str


def operator_ids(processor: sentencepiece.SentencePieceProcessor) -> list[int]:
    """Return the ids of the four CaseOps operators, [] where they are no pieces of their own."""
    found = [processor.piece_to_id(mark) for mark in caseops.OPERATORS]
    return [] if processor.unk_id() in found else found


def byte_rules(processor: sentencepiece.SentencePieceProcessor) -> Rules:
    """Return the Rules of a tokenizer; ValueError where it has no byte table.

    Lengths come from decoding each id alone and behind a visible piece, not from how it is
    spelt: that is what the byte table is compared with.
    """
    num_pieces = processor.get_piece_size()
    table = shards.byte_table(processor, num_pieces)
    ids = range(num_pieces)
    byte_values = np.array([int(processor.id_to_piece(i)[1:-1], 16) if processor.is_byte(i) else -1
                            for i in ids], np.int16)  # "<0xE2>"
    is_byte = byte_values >= 0
    visible = np.flatnonzero(~table.is_boundary & ~table.leading_space & ~is_byte)
    anchor = int(visible[0]) if len(visible) else int(np.argmax(byte_values == ord("a")))
    lead = len(processor.decode([anchor]))
    texts = [text[lead:].encode() for text in processor.decode([[anchor, i] for i in ids])]
    inside = np.where(is_byte, 1, [len(text) for text in texts])
    first = np.where(is_byte, 1, [len(t.encode()) for t in processor.decode([[i] for i in ids])])
    ascii_bytes = np.where(is_byte, byte_values < 128, [sum(c < 128 for c in t) for t in texts])
    least = TWENTIETHS_ASCII * ascii_bytes + TWENTIETHS_OTHER * (inside - ascii_bytes)
    has_space = np.array([b" " in text for text in texts])
    most = np.where(has_space, shards.MAX_TOKEN, MOST_TIMES * inside + MOST_SLACK)
    operators = operator_ids(processor)
    is_operator = np.isin(ids, operators)
    return Rules(
        table, inside.astype(np.uint16), first.astype(np.uint16), least.astype(np.uint32),
        most.astype(np.int32), np.array([processor.is_unknown(i) for i in ids]),
        is_operator, ~has_space & ~is_byte & (inside > 0) & ~is_operator, byte_values,
        processor.bos_id(),
        operators[caseops.OPERATORS.index(caseops.ESC)] if operators else -1)


def literal_operators(tokens: np.ndarray, rules: Rules) -> np.ndarray:
    """Return where operators stand that the text itself holds: each behind an ESC that acts.

    Of a run of ESC every other one acts, from the first on.
    """
    places = np.flatnonzero(tokens == rules.escape_id)
    number = np.arange(len(places))
    run_start = np.maximum.accumulate(np.where(np.diff(places, prepend=-2) != 1, number, 0))
    behind = places[(number - run_start) % 2 == 0] + 1
    behind = behind[behind < len(tokens)]
    return behind[rules.is_operator[tokens[behind]]]


def count_bytes(tokens: np.ndarray, rules: Rules) -> Counts:
    """Return the Counts of a stream (N,) uint16 whose documents begin with BOS."""
    table = np.zeros(len(tokens), np.uint16)
    for start in range(1, len(tokens), CHUNK_TOKENS):
        stop = min(start + CHUNK_TOKENS, len(tokens))
        table[start:stop] = shards.target_bytes(tokens[start - 1:stop], rules.table)
    decoded = rules.inside[tokens]
    behind_bos = np.flatnonzero(tokens[:-1] == rules.bos_id) + 1
    decoded[behind_bos] = rules.first[tokens[behind_bos]]
    text = decoded
    if rules.escape_id >= 0:
        text = decoded.copy()
        literal = literal_operators(tokens, rules)
        text[rules.is_operator[tokens]] = 0
        text[literal] = decoded[literal]
    return Counts(table, decoded, text)


def byte_faults(tokens: np.ndarray, rules: Rules, counts: Counts,
                sidecar: np.ndarray | None) -> list[Fault]:
    """Return why the bytes of a stream (N,), or its sidecar (N,), cannot be believed; [] if none.

    Without a sidecar a score divides by the byte table, which must then count what the tokens
    decode to, token by token; with one the table only stands beside it.
    """
    faults = []
    if len(lost := np.flatnonzero(rules.is_unknown[tokens])):
        faults.append(Fault("ids", int(lost[0]), f"{len(lost)} unknown tokens: text was lost, and "
                            "its bytes are not counted", "use a tokenizer with byte fallback"))
    if (place := broken_bytes(tokens, rules.byte_values)) is not None:
        faults.append(Fault("bytes", place, "byte pieces are no UTF-8, so they decode to other "
                            "bytes than they count", "build the shards again"))
    if sidecar is not None:
        return faults + sidecar_faults(tokens, rules, counts, sidecar)
    if len(marks := np.flatnonzero(rules.is_operator[tokens])):
        faults.append(Fault("sidecar", int(marks[0]), f"there is none, and {len(marks)} CaseOps "
                            "operators would count as text",
                            "fetch or build fineweb_val_bytes_*.bin"))
    elif not np.array_equal(counts.table, counts.decoded):
        off = np.flatnonzero(counts.table != counts.decoded)
        table, decoded = (int(c.sum(dtype=np.int64)) for c in (counts.table, counts.decoded))
        faults.append(Fault("bytes", int(off[0]), f"the byte table counts {table:,} bytes, the "
                            f"tokens decode to {decoded:,} ({percent(table, decoded)}): it is off "
                            f"at {len(off):,} tokens", "build the shards with a byte sidecar, or "
                            "with another tokenizer"))
    return faults


def sidecar_faults(tokens: np.ndarray, rules: Rules, counts: Counts,
                   sidecar: np.ndarray) -> list[Fault]:
    """Return why a sidecar (N,) cannot belong to its tokens (N,)."""
    again = "fetch or build it again"
    if len(sidecar) != len(tokens):
        return [Fault("sidecar", min(len(sidecar), len(tokens)),
                      f"{len(sidecar)} entries for {len(tokens)} tokens", again)]
    faults = []
    silent = (rules.table.is_boundary | rules.is_operator)[tokens]
    silent[literal_operators(tokens, rules)] = False
    if len(loud := np.flatnonzero(silent & (sidecar > 0))):
        faults.append(Fault("sidecar", int(loud[0]), f"{len(loud)} control or operator tokens have "
                            f"bytes and must have 0, the first has {sidecar[loud[0]]}", again))
    if len(large := np.flatnonzero(sidecar > rules.most[tokens])):
        at = int(large[0])
        faults.append(Fault("sidecar", at, f"{len(large)} entries are more than a piece can stand "
                            f"for, the first is {sidecar[at]} bytes where the token decodes to "
                            f"{counts.text[at]} and may have {rules.most[tokens[at]]}", again))
    return faults


def foreign_sidecar(tokens: np.ndarray, rules: Rules, counts: Counts,
                    sidecar: np.ndarray) -> list[Fault]:
    """Return why a sidecar (N,) without a fault of its own still belongs to other tokens (N,).

    A document's sum is no less than any text of its tokens has. And where pieces without a space
    have other bytes than they decode to, as full-width or decomposed text gives them, one piece
    has the same ones most times: a sidecar of other tokens has all kinds.
    """
    again = "fetch or build it again"
    starts, faults = np.flatnonzero(tokens == rules.bos_id), []
    if len(starts):
        found, size, least = (np.add.reduceat(column, starts, dtype=np.int64) for column in (
            sidecar, counts.text, np.where(counts.text > 0, rules.least[tokens], 0)))
        # a space that the tokenizer puts before or after a document has no bytes
        few = np.flatnonzero(20 * found < least - TWENTIETHS_ASCII)
        if len(few):
            faults.append(Fault("sidecar", int(starts[few[0]]), f"{len(few)} documents have fewer "
                                f"bytes than any text of theirs, the first {found[few[0]]} where "
                                f"its tokens decode to {size[few[0]]}", again))
    places = np.flatnonzero(rules.is_steady[tokens])
    off = places[sidecar[places] != counts.decoded[places]]
    if len(places) >= MIN_STEADY_TOKENS and len(off) > MAX_UNSTEADY_FRAC * len(places):
        pairs, count = np.unique(tokens[off].astype(np.int64) << 16 | sidecar[off],
                                 return_counts=True)
        ids = np.flatnonzero(np.diff(pairs >> 16, prepend=-1))
        unsteady = len(off) - int(np.maximum.reduceat(count, ids).sum())
        if unsteady > MAX_UNSTEADY_FRAC * len(places):
            faults.append(Fault("sidecar", int(off[0]), f"{unsteady:,} of {len(places):,} pieces "
                                "without a space have neither the bytes they decode to nor always "
                                "the same others: it belongs to other tokens", again))
    return faults


def broken_bytes(tokens: np.ndarray, byte_values: np.ndarray) -> int | None:
    """Return the position of a byte piece whose run is no UTF-8, None when all are."""
    found = byte_values[tokens]
    places = np.flatnonzero(found >= 0)
    new_run = np.flatnonzero(np.diff(places, prepend=-2) != 1)
    # A space between runs: two broken ones must not mend each other
    content = np.insert(found[places].astype(np.uint8), new_run, ord(" ")).tobytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        spaces = new_run + np.arange(len(new_run))
        return int(places[error.start - np.searchsorted(spaces, error.start)])
    return None


def percent(counted: int, true: int) -> str:
    """Return by how much a count departs from the true one, signed."""
    return f"{100 * (counted - true) / max(1, true):+.4f} %"
