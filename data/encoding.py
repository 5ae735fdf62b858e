"""Documents to tokens, and to the exact raw bytes that each token stands for; without torch.

Two byte counts exist for one document. SentencePiece first normalises (NFKC, white space collapsed
and trimmed): the byte table (shards.byte_table) counts that normalised text. The surface of a
piece is the part of the *raw* text it came from: pieces tile the raw text without gaps or
overlap, except for what normalisation discards at the document's two edges.
"""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
                         "give a .model file, or --train-tokenizer") from None


def check_tokenizer(processor: sentencepiece.SentencePieceProcessor, name: object) -> None:
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
        raise ValueError(f"{name}: {fault}; use one of the published tokenizers, or "
                         "--train-tokenizer")


def train_tokenizer(texts: Iterable[str], vocab_size: int,
                    operators: Sequence[str] = ()) -> bytes:
    """Return a SentencePiece model trained on texts by the published recipe.

    operators: pieces of their own right after the control pieces, as CaseOps needs them. Reading
    from and writing to memory keeps paths out of the model; one thread keeps it the same
    everywhere. Raises ValueError when SentencePiece cannot train that many pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size,
            user_defined_symbols=list(operators), num_threads=1, minloglevel=2, **RECIPE)
    except RuntimeError as error:
        raise ValueError(f"SentencePiece could not train {vocab_size} pieces: "
                         f"{' '.join(str(error).split())}; choose another --vocab-size") from None
    return model.getvalue()


# ---- encoding --------------------------------------------------------------------------------


def normalised_text(processor: sentencepiece.SentencePieceProcessor, text: str) -> str:
    """Return what decoding a text's tokens gives back, and what the byte table counts."""
    return processor.normalize(text).replace(shards.SPACE, " ")


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
