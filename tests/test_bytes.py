"""The denominator cannot be wrong: what the script's checks call well divides by true bytes.

Every kind of fault is planted in real text: tokenizers whose table is not what they decode,
sidecars of other tokens, shards of another build, files that are no shards.
"""

import functools

import encoding
import numpy as np
import pytest
import sentencepiece
import shards
from conftest import BOS_ID, train_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import count_bytes, load_config, load_validation, read_pieces, take_inputs


@pytest.fixture(scope="module")
def documents(tiny_documents):
    """Return some 250 documents, a few with capitals, digits and other scripts."""
    more = ["Größe 1 234,5 µm ＦＵＬＬ width", "日本語のテキスト と english",
            "émigré naïve ½ cup ﬁne", "1234567890 42 007", "don't  stop   here\tnow",
            "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 letters", "🙂🙃 emoji 🇨🇭"]
    return (tiny_documents[:240] + more) * 2


class Corpus:
    """A folder of shards by one tokenizer, and the raw bytes of each token."""

    def __init__(self, folder, model, texts):
        self.folder, self.model, self.texts = folder, model, texts
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        self.tokens = np.array([t for text in texts for t in (
            BOS_ID, *self.processor.encode(text))], np.uint16)
        self.write("train", self.tokens)
        self.write("val", self.tokens)

    def write(self, split, tokens, number=0):
        self.folder.mkdir(exist_ok=True, parents=True)
        shards.write_shard(self.folder / f"fineweb_{split}_{number:06d}.bin", tokens)

    def config(self, **changes):
        env = dict(DATA_PATH=self.folder, TOKENIZER_PATH=self.model, TRAIN_SEQ_LEN=16,
                   EVAL_SEQ_LEN=16, EVAL_STRIDE=8, TRAIN_BATCH_TOKENS=64, MICRO_BATCH_TOKENS=64,
                   VOCAB_SIZE=self.processor.vocab_size())
        return load_config({name: str(value) for name, value in (env | changes).items()})

    def faults(self, **changes):
        return take_inputs(self.config(**changes))[1]

    def decoded_bytes(self):
        """Return the UTF-8 length of what the documents' tokens decode to, one by one."""
        cuts = np.flatnonzero(self.tokens == BOS_ID)
        parts = np.split(self.tokens, cuts)[1:]
        return sum(len(self.processor.decode(part[1:].tolist()).encode()) for part in parts)


def model_of(documents, folder, **options):
    path = folder / "model.model"
    folder.mkdir(exist_ok=True, parents=True)
    train_tokenizer([text for text in documents if len(text) > 30], path, **options)
    return path


@pytest.fixture(scope="module")
def model(documents, tmp_path_factory):
    return model_of(documents, tmp_path_factory.mktemp("usual"))


@pytest.fixture
def corpus(documents, model, tmp_path):
    return Corpus(tmp_path / "text", model, documents)


# ---- the table against the decoder ---------------------------------------------------------

USUAL = {"published recipe": {}, "dummy prefix": dict(add_dummy_prefix=True),
         "unigram": dict(model_type="unigram", vocab_size=400),
         "identity normalisation": dict(normalization_rule_name="identity"),
         "folded case": dict(normalization_rule_name="nmt_nfkc_cf")}
ODD = {"white space only": dict(allow_whitespace_only_pieces=True, remove_extra_whitespaces=False,
                                normalization_rule_name="identity"),
       "white space as suffix": dict(treat_whitespace_as_suffix=True),
       "pieces over words": dict(split_by_whitespace=False)}


@pytest.mark.parametrize("options", USUAL.values(), ids=USUAL)
def test_tokenizers_whose_table_is_what_they_decode_pass(documents, tmp_path, options):
    corpus = Corpus(tmp_path / "text", model_of(documents, tmp_path, **options), documents)
    assert corpus.faults() == []
    text = load_validation(corpus.config())
    assert text.target_bytes.sum() == corpus.decoded_bytes()


@pytest.mark.parametrize("options", ODD.values(), ids=ODD)
def test_tokenizers_whose_table_counts_other_bytes_are_refused_with_both_numbers(
        documents, tmp_path, options):
    texts = [f"{text}\n\n    indented   text  {text}" for text in documents]
    corpus = Corpus(tmp_path / "text", model_of(texts, tmp_path, **options), texts)
    pieces = read_pieces(corpus.processor)
    by_table, decoded, _ = count_bytes(corpus.tokens, pieces)
    assert (by_table != decoded).any(), "the options are odd"
    (fault,) = corpus.faults()
    assert f"counts {by_table[1:].sum()} bytes, the tokens decode to {decoded[1:].sum()}" in fault


def test_unknown_tokens_are_refused(documents, tmp_path):
    model = model_of(documents, tmp_path, byte_fallback=False)
    corpus = Corpus(tmp_path / "text", model, documents)
    place = int(np.flatnonzero(corpus.tokens == corpus.processor.unk_id())[0])
    (fault,) = corpus.faults()
    assert f"token {place} is the unknown one" in fault


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.fixed_dictionaries(dict(
    add_dummy_prefix=st.booleans(), split_by_whitespace=st.booleans(),
    treat_whitespace_as_suffix=st.booleans(), split_digits=st.booleans(),
    byte_fallback=st.booleans(), split_by_unicode_script=st.booleans(),
    remove_extra_whitespaces=st.booleans(), allow_whitespace_only_pieces=st.booleans(),
    normalization_rule_name=st.sampled_from(("nmt_nfkc", "identity", "nfkc_cf")),
    vocab_size=st.integers(300, 600))))
def test_no_tokenizer_passes_with_other_bytes_than_its_text_has(documents, tmp_path_factory,
                                                                options):
    folder = tmp_path_factory.mktemp("any")
    try:
        model = model_of(documents[:200], folder, hard_vocab_limit=False, **options)
    except ValueError:
        return  # SentencePiece itself can't
    corpus = Corpus(folder / "text", model, documents)
    if not corpus.faults():
        assert load_validation(corpus.config()).target_bytes.sum() == corpus.decoded_bytes()


# ---- sidecars --------------------------------------------------------------------------------


def honest(corpus):
    return count_bytes(corpus.tokens, read_pieces(corpus.processor))[2].astype(np.int64)


def test_sidecars_of_other_tokens_are_refused_with_their_folder(corpus):
    """Of one kind; test_encoding.py has them all."""
    corpus.write("val_bytes", honest(corpus))
    assert corpus.faults() == []
    corpus.write("val_bytes", np.roll(honest(corpus), 1))
    (fault,) = corpus.faults()
    assert "sidecar" in fault and str(corpus.folder) in fault


@pytest.mark.parametrize("factor, warns", [(1.0, False), (1.01, True), (1.5, True), (0.97, True)])
def test_bytes_that_tokens_cannot_give_back_are_told(corpus, factor, warns):
    """As of Python sources, whose white space normalisation drops: right, but worth a word."""
    side = honest(corpus)
    wanted, text = round(factor * side.sum()), np.flatnonzero(side > 1)
    more = np.linspace(0, len(text) - 1, abs(wanted - side.sum())).astype(int)
    np.add.at(side, text[more], np.sign(wanted - side.sum()))
    corpus.write("val_bytes", side)
    assert corpus.faults() == []
    found = load_validation(corpus.config())
    assert bool(found.warnings) == warns and found.denominator == "sidecar"
    if warns:
        assert f"divides by {side[1:].sum()} bytes" in found.warnings[0]


def test_casefolded_text_with_a_sidecar_of_its_raw_bytes_passes(documents, tmp_path):
    texts = [*documents, "STRASSE, Ⱥ and Ⱦ"]  # lower case takes another number of bytes
    model = model_of(texts, tmp_path, normalization_rule_name="nmt_nfkc_cf")
    corpus = Corpus(tmp_path / "text", model, texts)
    decoded = corpus.processor.decode(corpus.processor.encode("STRASSE, Ⱥ and Ⱦ"))
    assert decoded == "strasse, ⱥ and ⱦ"
    side = np.concatenate([[0, *np.diff(encoding.spans_batch(corpus.processor, [text.encode()])[
        0].edges)] for text in texts])
    last = int(np.flatnonzero(corpus.tokens == BOS_ID)[-1])
    assert side[last:].sum() == len(texts[-1].encode()) != honest(corpus)[last:].sum()
    corpus.write("val_bytes", side)
    assert corpus.faults() == []


def caseops_corpus(documents, tmp_path):
    operators = list(train_gpt.OPERATORS)
    model = model_of([text.lower() for text in documents], tmp_path,
                     user_defined_symbols=operators)
    title, _, _, escape = operators
    texts = [title + text.lower() for text in documents[:60]]
    texts[7] += f" {escape}{title} literal {escape}{escape}{escape}{title} end"
    return Corpus(tmp_path / "text", model, texts)


def test_caseops_needs_its_sidecar(documents, tmp_path):
    corpus = caseops_corpus(documents, tmp_path)
    (fault,) = corpus.faults()
    assert "byte sidecar" in fault and "CaseOps" in fault
    raw = sum(len(text.replace("\ue004\ue001", "xxx").replace("\ue004\ue004", "yyy").replace(
        "\ue001", "").encode()) for text in corpus.texts)
    side = honest(corpus)
    assert side.sum() <= raw and side[corpus.tokens == BOS_ID].sum() == 0
    corpus.write("val_bytes", side)
    assert corpus.faults() == []


def test_operators_with_a_length_are_refused(documents, tmp_path):
    """As a published preparation script writes them: 9.3 % too many bytes."""
    corpus = caseops_corpus(documents, tmp_path)
    pieces = read_pieces(corpus.processor)
    corpus.write("val_bytes", count_bytes(corpus.tokens, pieces)[1] * (corpus.tokens != BOS_ID))
    (fault,) = corpus.faults()
    assert "token 1 has 3 bytes in the byte sidecar and is a control or an operator" in fault


# ---- other builds, other files ---------------------------------------------------------------


@pytest.fixture(scope="module")
def other_model(documents, tmp_path_factory):
    return model_of([text[::-1] for text in documents], tmp_path_factory.mktemp("other"))


@functools.cache
def processor_of(model):
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


def tokens_of(model, texts):
    processor = processor_of(model)
    return [t for text in texts for t in (BOS_ID, *processor.encode(text))]


@pytest.mark.parametrize("lead", [[], ["1234567890 " * 30] * 40, ["日本語" * 50] * 20],
                         ids=["plain", "digits first", "Chinese first"])
def test_a_second_shard_by_another_build_is_found(corpus, other_model, documents, lead):
    corpus.write("val", tokens_of(corpus.model, lead + documents))
    corpus.write("val", tokens_of(other_model, documents[:60]), 1)
    (fault,) = corpus.faults(STAGE="evaluate")
    assert "another tokenizer wrote it" in fault


def test_an_empty_first_shard_hides_nothing_and_is_told(corpus, other_model, documents):
    corpus.write("val", [])
    corpus.write("val", corpus.tokens, 1)
    assert corpus.faults() == []
    assert load_validation(corpus.config()).warnings == ("fineweb_val_000000.bin: holds 0 tokens",)
    corpus.write("val", tokens_of(other_model, documents), 1)
    assert corpus.faults(STAGE="evaluate")


def test_training_shards_by_another_tokenizer_are_found(corpus, other_model, documents):
    corpus.write("train", tokens_of(other_model, documents), 1)
    (fault,) = corpus.faults()
    assert "fineweb_train_000001.bin: another tokenizer" in fault
    assert corpus.faults(STAGE="evaluate") == []


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10 ** 6), st.sampled_from(("foreign", "bytes")))
def test_faults_in_one_document_of_200_are_found(documents, model, other_model, tmp_path_factory,
                                                 seed, kind):
    """Of 1,000 documents five are of another build, or hold byte pieces that are no UTF-8."""
    rng = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("one")
    corpus = Corpus(folder / "text", model, documents[:60])
    chosen = rng.choice(1000, 5, replace=False)
    first_byte = corpus.processor.piece_to_id("<0x00>")
    texts = [documents[i % 40] for i in range(1000)]
    parts = [tokens_of(model, [text]) for text in texts]
    for i in chosen:
        if kind == "foreign":
            parts[i] = tokens_of(other_model, [texts[i]])
        else:
            parts[i][5:5] = [first_byte + 0xE6, first_byte + 0x97]
    corpus.write("val", [t for part in parts for t in part])
    assert corpus.faults(STAGE="evaluate")


@pytest.mark.parametrize("name", ["fineweb_val_000000_old.bin", "fineweb_val_backup.bin",
                                  "fineweb_val_1e5.bin", "fineweb_val_000001.bin.bin",
                                  "fineweb_val_\u0661.bin"])
def test_files_that_are_not_numbered_are_no_shards_and_are_mentioned(corpus, name):
    (corpus.folder / name).write_bytes((corpus.folder / "fineweb_val_000000.bin").read_bytes())
    inputs, faults = take_inputs(corpus.config())
    assert faults == [] and len(inputs.text.tokens) == len(corpus.tokens)
    assert any(name in line for line in inputs.warnings)


def test_one_process_of_a_machine_judges_and_all_read_the_same(corpus, monkeypatch):
    config, judged = corpus.config(), []
    monkeypatch.setattr(train_gpt, "judge_bytes", lambda *args: judged.append(args) or [])
    texts = [take_inputs(config, judged=alone)[0].text for alone in (True, False)]
    assert len(judged) == 1 and len({text.sha256 for text in texts}) == 1
    assert len({text.target_bytes.tobytes() for text in texts}) == 1
    monkeypatch.undo()
    corpus.write("val", np.append(corpus.tokens, 3).astype(np.uint16))  # the unknown token
    runtime = train_gpt.Runtime({}, config)
    assert runtime.leads_machine
    (fault,) = train_gpt.preflight(config, runtime, train_gpt.RunFiles("x"))[1]
    assert "is the unknown one" in fault


def test_a_sidecar_that_changed_alone_is_another_text(corpus):
    """Its tokens are the same, and so is what the shards hash to; the denominator is not."""
    side = honest(corpus)
    corpus.write("val_bytes", side)
    config = corpus.config()
    before = train_gpt.identity(config, take_inputs(config)[0])
    side[np.flatnonzero(side > 2)[-1]] += 1
    corpus.write("val_bytes", side)
    after = train_gpt.identity(config, take_inputs(config)[0])
    assert {name for name in after if after[name] != before[name]} == {"bytes scored"}
