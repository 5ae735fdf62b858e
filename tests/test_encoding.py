"""Laws of tokens and bytes: decode gives the normalised text, every raw byte is counted once.

They are held on a tokenizer trained here by the published recipe and, where the published ones
lie beside the checkout, on all four of them.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sentencepiece = pytest.importorskip("sentencepiece")

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "data"))
import caseops  # noqa: E402
import documents  # noqa: E402
import encoding  # noqa: E402
import shards  # noqa: E402

SHARED = REPO.parent / "shared"
PUBLISHED = [f"fineweb_{name}.model" for name in (
    "1024_bpe", "4096_bpe", "8192_bpe", "8192_bpe_lossless_caps_caseops_v1_reserved")]

# White space, controls and zero widths that normalisation drops or collapses; characters that it
# expands, composes or maps; SentencePiece's own space sign; the CaseOps operators.
TRICKY = ("  \t\n\r\x00\x01\x1f\x7f\x85\xa0\xad\u1680\u200b\u200d\u2028\u2581\u3000\ufeff\ufffd"
          "\ufb01\ufdfa\u0301e\u1100\u1161\uff76\uff9e\uff21\u2460\U0001f600\U0010ffffabAB1.")
TEXTS = st.one_of(st.text(), st.text(alphabet=TRICKY + "".join(caseops.OPERATORS)))
SENTENCES = ["The quick brown fox jumps over the lazy dog, and 1234 more.",
             "Caf\u00e9s in Z\u00fcrich cost \u20ac5; don't ask why."] * 30


@pytest.fixture(scope="module")
def trained():
    model = encoding.train_tokenizer(SENTENCES, 320, caseops.OPERATORS)
    return encoding.load_processor(model)


@pytest.fixture(scope="module", params=["trained", *PUBLISHED])
def processor(request, trained):
    """The tokenizer trained here, and each published one that is there."""
    if request.param == "trained":
        return trained
    path = SHARED / "tokenizers" / request.param
    if not path.is_file():
        pytest.skip(f"no {path}: the published tokenizers are not part of this repository")
    return encoding.load_processor(path)


# ---- the laws ----------------------------------------------------------------------------------


def check_laws(processor, table, text):
    raw = text.encode("utf-8")
    surface = encoding.surface_bytes(processor, text)
    normalised = encoding.normalised_text(processor, text)
    tokens = encoding.encode_batch(processor, [raw])[0]
    assert tokens.tolist() == [1, *surface.token_ids.tolist()]
    assert processor.decode(surface.token_ids.tolist()) == normalised
    assert shards.target_bytes(tokens, table).sum() == len(normalised.encode("utf-8"))
    assert len(surface.raw_bytes) == len(surface.token_ids) and (surface.raw_bytes >= 0).all()
    assert surface.raw_bytes.sum() + surface.discarded_edge_bytes == len(raw)


@given(text=TEXTS)
@settings(max_examples=60)
def test_decode_gives_the_normalised_text_and_all_bytes_are_counted(processor, text):
    table = shards.byte_table(processor, processor.get_piece_size())
    check_laws(processor, table, text)


@given(texts=st.lists(TEXTS, max_size=6), workers=st.integers(1, 3))
@settings(max_examples=20)
def test_batches_and_threads_change_nothing(processor, texts, workers):
    raws = [text.encode() for text in texts]
    alone = [encoding.surface_bytes(processor, text) for text in texts]
    tokens = encoding.encode_batch(processor, raws, workers)
    spans = encoding.spans_batch(processor, raws, workers)
    assert [t.tolist() for t in tokens] == [[1, *one.token_ids.tolist()] for one in alone]
    assert [np.diff(s.edges).tolist() for s in spans] == [o.raw_bytes.tolist() for o in alone]


def original_bytes(encoded):
    """Return the original bytes of CaseOps text character by character, from the rule alone."""
    sizes, escaped = [], False
    for c in encoded:
        is_operator = c in caseops.OPERATORS and not escaped
        escaped = is_operator and c == caseops.ESC
        sizes.append(0 if is_operator else len(c.encode()))
    return sizes


@given(text=TEXTS)
@settings(max_examples=60)
def test_caseops_pieces_share_the_original_bytes(trained, text):
    encoded = caseops.to_caseops(text)
    raw = encoded.encode()
    spans = encoding.spans_batch(trained, [raw])[0]
    found = np.diff(caseops.original_offsets(raw)[spans.edges])
    # cut only where a character ends: of one in several tokens the last carries all
    characters = [len(raw[:edge].decode()) for edge in spans.edges.tolist()]
    sizes = original_bytes(encoded)
    assert found.tolist() == [sum(sizes[i:j]) for i, j in zip(characters, characters[1:])]


@given(text=st.text(alphabet="ab AB1\u00e9"))
@settings(max_examples=60)
def test_caseops_operators_stand_for_no_bytes(trained, text):
    raw = caseops.to_caseops(text).encode()
    spans = encoding.spans_batch(trained, [raw])[0]
    found = np.diff(caseops.original_offsets(raw)[spans.edges])
    operators = {trained.piece_to_id(operator) for operator in caseops.OPERATORS}
    is_operator = np.isin(spans.token_ids, list(operators))
    assert not found[is_operator].any()
    assert is_operator.sum() <= sum(c in "AB" for c in text)


@pytest.mark.parametrize(("text", "counted", "discarded"), [
    ("", 0, 0), (" \t\x01", 0, 3), ("  x \n", 1, 4), ("x \u3000  x", 8, 0), ("\ufdfa", 3, 0),
    ("\u200b\u2028x\x7f", 2, 6)])
def test_edges_are_counted_apart(trained, text, counted, discarded):
    surface = encoding.surface_bytes(trained, text)
    assert (surface.raw_bytes.sum(), surface.discarded_edge_bytes) == (counted, discarded)


@pytest.mark.parametrize("text", ["\U0001f600", "\ufdfa"])
def test_character_in_several_tokens_is_counted_on_its_last(trained, text):
    raw_bytes = encoding.surface_bytes(trained, text).raw_bytes.tolist()
    assert len(raw_bytes) > 1 and raw_bytes == [0] * (len(raw_bytes) - 1) + [len(text.encode())]


@pytest.mark.parametrize("name", PUBLISHED)
def test_laws_hold_on_real_documents(name):
    model, corpus = SHARED / "tokenizers" / name, SHARED / "corpus/fineweb_docs.jsonl"
    if not (model.is_file() and corpus.is_file()):
        pytest.skip(f"needs {model} and {corpus}, which are not part of this repository")
    processor = encoding.load_processor(model)
    table = shards.byte_table(processor, processor.get_piece_size())
    texts = [d.text.decode() for d in documents.read_documents([corpus], documents.Source())]
    assert len(texts) == 200
    for text in texts:
        check_laws(processor, table, text)
        if "caseops" in name:
            check_laws(processor, table, caseops.to_caseops(text))
    if name == "fineweb_8192_bpe.model":  # as published: 97 bytes, on 33 documents
        sizes = [(len(t.encode()), len(encoding.normalised_text(processor, t).encode()))
                 for t in texts]
        assert sum(raw != counted for raw, counted in sizes) == 33
        assert sum(raw for raw, _ in sizes) == 1_489_515
        assert abs(sum(counted - raw for raw, counted in sizes)) == 97


# ---- tokenizers --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_is_what_the_published_models_store(name):
    pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2", reason="needs protobuf",
                              exc_type=ImportError)
    path = SHARED / "tokenizers" / name
    if not path.is_file():
        pytest.skip(f"no {path}: the published tokenizers are not part of this repository")
    published, ours = pb2.ModelProto(), pb2.ModelProto()
    published.ParseFromString(path.read_bytes())
    operators = caseops.OPERATORS if "caseops" in name else ()
    ours.ParseFromString(encoding.train_tokenizer(SENTENCES, 320, operators))
    # where the text came from and how it was run through; none decides a piece
    ignored = {"input", "model_prefix", "vocab_size", "num_threads", "input_sentence_size",
               "shuffle_input_sentence"}
    for spec in ("trainer_spec", "normalizer_spec"):
        theirs, made = getattr(published, spec), getattr(ours, spec)
        for field in theirs.DESCRIPTOR.fields:
            if field.name not in ignored | {"precompiled_charsmap"}:
                mine, other = getattr(made, field.name), getattr(theirs, field.name)
                if field.name == "character_coverage":
                    mine, other = round(mine, 6), round(other, 6)
                assert mine == other, field.name
    assert [p.piece for p in ours.pieces[:10]] == [p.piece for p in published.pieces[:10]]


def test_trained_tokenizer_passes_its_own_check_and_training_repeats(trained):
    encoding.check_tokenizer(trained, "trained")
    again = encoding.train_tokenizer(SENTENCES, 320, caseops.OPERATORS)
    assert again == trained.serialized_model_proto()
    assert [trained.piece_to_id(op) for op in caseops.OPERATORS] == [4, 5, 6, 7]


@pytest.mark.parametrize(("change", "message"), [
    ({"byte_fallback": False}, "no byte fallback"),
    ({"bos_id": -1}, "its BOS id is -1"),
])
def test_tokenizer_that_cannot_count_is_refused(monkeypatch, change, message):
    monkeypatch.setattr(encoding, "RECIPE", {**encoding.RECIPE, **change})
    processor = encoding.load_processor(encoding.train_tokenizer(SENTENCES, 320))
    with pytest.raises(ValueError, match=f"my.model: .*{message}.*--train-tokenizer"):
        encoding.check_tokenizer(processor, "my.model")


def test_file_that_is_no_model_is_refused(tmp_path):
    path = tmp_path / "not.model"
    for make in (lambda: None, lambda: path.write_bytes(b"nothing of the kind")):
        make()
        with pytest.raises(ValueError, match="not.model: not a SentencePiece model"):
            encoding.load_processor(path)


def test_more_pieces_than_the_text_holds_is_one_line():
    with pytest.raises(ValueError, match="could not train 100.*--vocab-size") as caught:
        encoding.train_tokenizer(SENTENCES, 100)
    assert "\n" not in str(caught.value)
