"""Laws of the settings: names, values, what is refused, presets, and what a file's settings do."""

import contextlib
import json
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import KNOBS, PRESETS, Config, ConfigError, load_config

# What PR #1471 reads, by topic of its own list: name -> (value of its published runs, another).
PUBLISHED = dict(
    DATA_DIR=("./data/", "/elsewhere"), DATA_PATH=("", "/shards"), TOKENIZER_PATH=("", "/t.model"),
    SEED=(1337, 42), RUN_ID=("", "mine"), ITERATIONS=(20_000, 5), WARMDOWN_FRAC=(0.72, 0.667),
    MIN_LR=(0.0, 0.1), WARMUP_STEPS=(20, 0), TRAIN_BATCH_TOKENS=(786_432, 524_288),
    TRAIN_SEQ_LEN=(2048, 1024), EVAL_SEQ_LEN=(2048, 1024), MAX_WALLCLOCK_SECONDS=(600.0, 60.0),
    TRAIN_LOG_EVERY=(500, 10), VAL_LOSS_EVERY=(4000, 0), VAL_BATCH_TOKENS=(524_288, 65_536),
    SLIDING_WINDOW_ENABLED=(True, False), EVAL_STRIDE=(64, 32), VOCAB_SIZE=(8192, 1024),
    NUM_LAYERS=(11, 12), MODEL_DIM=(512, 256), NUM_HEADS=(8, 16), NUM_KV_HEADS=(4, 2),
    MLP_MULT=(4.0, 3.0), XSA_LAST_N=(11, 4), SKIP_GATES_ENABLED=(True, False),
    LN_SCALE=(True, False), VE_ENABLED=(True, False), VE_DIM=(128, 64), VE_LAYERS=((9, 10), (8,)),
    LOGIT_SOFTCAP=(30.0, 15.0), QK_GAIN_INIT=(5.0, 1.5), ROPE_BASE=(10_000.0, 5000.0),
    ROPE_DIMS=(16, 0), TIED_EMBED_LR=(0.03, 0.05), TIED_EMBED_INIT_STD=(0.005, 0.02),
    MATRIX_LR=(0.022, 0.02), SCALAR_LR=(0.02, 0.04), MUON_MOMENTUM=(0.99, 0.95),
    MUON_MOMENTUM_WARMUP_START=(0.92, 0.85), MUON_MOMENTUM_WARMUP_STEPS=(1500, 500),
    MUON_BACKEND_STEPS=(5, 3), BETA1=(0.9, 0.8), BETA2=(0.95, 0.99), ADAM_EPS=(1e-8, 1e-10),
    GRAD_CLIP_NORM=(0.3, 0.0), MUON_WD=(0.095, 0.09), EMBED_WD=(0.095, 0.0), ADAM_WD=(0.02, 0.0),
    EMA_DECAY=(0.9965, 0.997), RECUR_LAYERS=((3, 4, 5), (4, 5)), RECUR_START_STEP=(2000, 3000),
    PARALLEL_START_LAYER=(7, 0), COMPRESSOR=("brotli", "lzma"), GPTQ_ENABLED=(True, False),
    GPTQ_CALIBRATION_BATCHES=(64, 8), GPTQ_RESERVE_SECONDS=(10.0, 5.0), SDCLIP_K=(12.85, 10.0),
    SDCLIP_K_EMBED=(20.0, 15.0))
# Where the defaults repair PR #1471: the reserve is measured and the clip radii fill the budget.
REPAIRED = {"COMPRESSOR": "rans", "GPTQ_RESERVE_SECONDS": 0.0, "SDCLIP_K": None,
            "SDCLIP_K_EMBED": None}
READ_WITHOUT_EFFECT = dict(MUON_BETA2="0.95", ROPE_TRAIN_SEQ_LEN="2048", EMBED_LR="0.6",
                           HEAD_LR="0.008")
# Modes PR #1471 and its sibling #1395 have switched off, at the values of their published runs.
SWITCHED_OFF = dict(
    TIE_EMBEDDINGS="1", LR_FLOOR="0.0", TTT_POLYAK_DECAY="0.998", PREQUANT_TTT_ENABLED="0",
    SLOT_ENABLED="0", SLOT_LR=".005", SLOT_STEPS="8", HEDGE_ENABLED="0", G1_GATING="0",
    LAWA_ENABLED="0", LAWA_K="5", LAWA_FREQ="50")
# What a shell, a CI job, CUDA, torchrun and a cluster put into every process's environment.
USUAL_ENVIRONMENT = """
    PATH HOME USER LOGNAME SHELL PWD OLDPWD LANG LC_ALL TERM TMPDIR HOSTNAME EDITOR PAGER
    DISPLAY LS_COLORS SHLVL MAIL TZ _ CI VIRTUAL_ENV CONDA_PREFIX CONDA_DEFAULT_ENV PYTHONPATH
    PYTHONHASHSEED RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE
    ROLE_RANK ROLE_NAME ROLE_WORLD_SIZE MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID
    TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_RESTART_COUNT TORCH_NCCL_ASYNC_ERROR_HANDLING
    TORCHINDUCTOR_CACHE_DIR OMP_NUM_THREADS MKL_NUM_THREADS CUDA_VISIBLE_DEVICES CUDA_HOME
    CUDA_VERSION LD_LIBRARY_PATH NCCL_DEBUG NCCL_VERSION NVIDIA_VISIBLE_DEVICES HF_HOME HF_TOKEN
    WANDB_MODE SSH_CONNECTION XDG_RUNTIME_DIR SLURM_JOB_ID http_proxy no_proxy
    MATCHED_FINEWEB_REPO_ID MATCHED_FINEWEB_REMOTE_ROOT_PREFIX""".split()


def text_of(value) -> str:
    """Return a setting as one types it; independent of the script's own printing."""
    if isinstance(value, bool):
        return "01"[value]
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def faults_of(env) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(env)
    assert str(caught.value) == "\n".join(caught.value.faults)
    return caught.value.faults


def fault_of(env) -> str:
    (fault,) = faults_of(env)
    return fault


def layers_of_rows(layout):
    """Return {skip row: physical layer it reaches}."""
    return {step.skip: step.layer for step in layout.steps if step.skip is not None}


ALL_LAYERS = tuple(range(11))


# ---- published names ---------------------------------------------------------------------------


def test_defaults_are_the_published_runs_except_where_repaired():
    config = load_config({})
    expected = {name: values[0] for name, values in PUBLISHED.items()} | REPAIRED
    assert {name: getattr(config, name.lower()) for name in PUBLISHED} == expected
    assert not config.explicit


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_published_name_sets_its_own_knob_and_no_other(name):
    before, value = load_config({}).public(), PUBLISHED[name][1]
    config = load_config({name: f" {text_of(value)} "})  # as copied, with spaces
    after = config.public()
    assert {n: v for n, v in after.items() if v != before[n]} == {name.lower(): value}
    assert type(after[name.lower()]) is type(value) and config.explicit == {name.lower()}


def test_every_knob_is_set_by_its_name():
    values = {"str": "x", "int": "3", "float": "0.5", "bool": "1", "tuple[str, ...]": "A, B",
              "tuple[int, ...]": "1,2"}
    for name, field in KNOBS.items():
        kind = field.type.removesuffix(" | None")
        assert kind in values, f"{name}: untested type {field.type}"
        assert train_gpt.parse_setting(values[kind], field.type) is not None


def test_published_environment_as_a_whole_is_accepted_and_is_the_preset():
    env = {name: text_of(values[0]) for name, values in PUBLISHED.items()}
    env |= READ_WITHOUT_EFFECT | SWITCHED_OFF | {"EMBEDDING_DIM": "512"}
    plain = load_config({"PRESET": "pr1471"}).public()
    assert load_config(env | {"PRESET": "pr1471"}).public() == plain


def test_embedding_dim_other_than_model_dim_is_refused():
    assert fault_of({"EMBEDDING_DIM": "256"}).startswith("EMBEDDING_DIM=256: ")


@pytest.mark.parametrize("name", train_gpt.WITHOUT_EFFECT)
def test_name_without_effect_changes_nothing_and_is_said_aloud(name):
    env = {name: READ_WITHOUT_EFFECT.get(name, "whatever")}
    config = load_config(env)
    assert config == load_config({})
    (line,) = train_gpt.notices(config, env)
    assert line.startswith(name) and "without effect" in line


def test_lists_of_foreign_names_hold_the_published_ones():
    assert set(READ_WITHOUT_EFFECT) <= set(train_gpt.WITHOUT_EFFECT)
    assert set(SWITCHED_OFF) <= set(train_gpt.NEUTRAL)
    foreign = [*train_gpt.WITHOUT_EFFECT, *train_gpt.NEUTRAL]
    assert not {name.lower() for name in foreign} & set(KNOBS)


@pytest.mark.parametrize("name", train_gpt.NEUTRAL)
def test_mode_not_built_is_accepted_at_its_neutral_value_alone(name):
    neutral = train_gpt.NEUTRAL[name].replace("MODEL_DIM", "512")
    same = {"0": ["0.0", " 0", "false", "False", "-0"], "1": ["1.0", "true", "TRUE"]}
    for text in [neutral, "", *same.get(neutral, [])]:
        assert load_config({name: text}) == load_config({}), text
    for text in ["7.5", "-1", "yes", "nan", *(["1"] if neutral == "0" else ["0"])]:
        fault = fault_of({name: text})
        assert fault.startswith(f"{name}={text}: ")
        assert not neutral or f"{name}={neutral}" in fault


# ---- misspelt names ----------------------------------------------------------------------------


def known_names():
    return [*(name.upper() for name in KNOBS), *train_gpt.WITHOUT_EFFECT, *train_gpt.NEUTRAL]


def slips_of(name, rng):
    """Return one dropped, doubled, replaced and swapped letter each, at random places."""
    i, j = rng.randrange(len(name)), rng.randrange(len(name) - 1)
    return [name[:i] + name[i + 1:], name[:i] + name[i] + name[i:], name[:i] + "Q" + name[i + 1:],
            name[:j] + name[j + 1] + name[j] + name[j + 2:]]


def test_every_slip_of_a_name_is_refused_naming_a_nearest_one():
    rng, known = random.Random(0), known_names()
    for name in known:
        for slip in slips_of(name, rng):
            if slip in known:
                continue
            named = train_gpt.misspelt(slip, known)
            assert named and train_gpt.slips(slip, named) <= 1, (slip, name, named)


@pytest.mark.parametrize("slip, right", [
    ("ITERATION", "ITERATIONS"), ("EMA_DECY", "EMA_DECAY"), ("MATRIX_RL", "MATRIX_LR"),
    ("seed", "SEED"), ("WARMDOWN-FRAC", "WARMDOWN_FRAC"), ("WARM_DOWN_FRAC", "WARMDOWN_FRAC"),
    ("MAXWALLCLOCKSECONDS", "MAX_WALLCLOCK_SECONDS"), ("TTT_ENABLE", "TTT_ENABLED"),
    ("TRAIN_BACH_TOKEN", "TRAIN_BATCH_TOKENS"), ("SDCLIP_K_EMBD", "SDCLIP_K_EMBED")])
def test_misspelt_name_is_refused_naming_the_right_one_unless_allowed(slip, right):
    fault = fault_of({slip: "3"})
    assert fault.startswith(f"{slip}=3: ") and f"ALLOW_ENV={slip}" in fault
    assert right in fault.replace("?", "").split()
    config = load_config({slip: "3", "ALLOW_ENV": f"OTHER, {slip}"})
    assert config.allow_env == ("OTHER", slip) and config.explicit == {"allow_env"}


def test_usual_environment_is_left_alone():
    assert load_config(dict.fromkeys(USUAL_ENVIRONMENT, "1")) == load_config({})


# ---- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, text, expected", [
    ("SEED", "1.5", "a whole number"), ("SEED", "", "a whole number"),
    ("SEED", "-1", "0"), ("MATRIX_LR", "fast", "a finite number"),
    ("MATRIX_LR", "nan", "a finite number"), ("MATRIX_LR", "inf", "a finite number"),
    ("BETA2", "1.0", "0.9999999"), ("LN_SCALE", "yes", "0 or 1"),
    ("VE_LAYERS", "9;10", "whole numbers with commas"), ("VE_LAYERS", "9.5", "whole numbers"),
    ("COMPRESSOR", "zip", "one of rans, brotli, lzma"),
    ("STAGE", "test", "one of all, train, quantize"),
    ("VOCAB_SIZE", "65537", "65536"), ("WARMDOWN_FRAC", "72.0", "1"),
    ("RECUR_START_FRAC", "half", "a finite number"), ("MODEL_DIM", "9" * 5000, "a whole number")])
def test_bad_value_is_refused_naming_setting_value_and_rule(name, text, expected):
    fault = fault_of({name: text})
    assert fault.startswith(f"{name}={text}: ") and expected in fault.split(": ")[1]


@pytest.mark.parametrize("name", ["RECUR_START_FRAC", "SDCLIP_K", "COMPILE_ENABLED"])
@pytest.mark.parametrize("text", ["", "auto", "AUTO"])
def test_auto_and_empty_stand_for_undecided(name, text):
    assert getattr(load_config({name: text}), name.lower()) is None


@pytest.mark.parametrize("env, setting, other", [
    (dict(MODEL_DIM=500, ROPE_DIMS=2), "MODEL_DIM=500", "NUM_HEADS"),
    (dict(NUM_HEADS=2, NUM_KV_HEADS=4), "NUM_HEADS=2", "NUM_KV_HEADS"),
    (dict(MODEL_DIM=24, ROPE_DIMS=0), "", "even"), (dict(ROPE_DIMS=15), "ROPE_DIMS=15", "even"),
    (dict(ROPE_DIMS=66), "ROPE_DIMS=66", "head width"),
    (dict(EVAL_SEQ_LEN=4096, ROPE_DIMS=2), "EVAL_SEQ_LEN=4096", "ROPE_DIMS"),
    (dict(MLP_MULT=0.01, MODEL_DIM=64, ROPE_DIMS=0), "MLP_MULT=0.01", "MODEL_DIM"),
    (dict(TRAIN_BATCH_TOKENS=5000), "TRAIN_BATCH_TOKENS=5000", "TRAIN_SEQ_LEN"),
    (dict(MICRO_BATCH_TOKENS=2047), "MICRO_BATCH_TOKENS=2047", "TRAIN_SEQ_LEN"),
    (dict(EVAL_STRIDE=2049), "EVAL_STRIDE=2049", "EVAL_SEQ_LEN"),
    (dict(RECUR_LAYERS="3,5"), "RECUR_LAYERS=3,5", "VIRTUAL_ORDER"),
    (dict(RECUR_LAYERS="5,4"), "RECUR_LAYERS=5,4", "VIRTUAL_ORDER"),
    (dict(RECUR_LAYERS="10,11"), "RECUR_LAYERS=10,11", "NUM_LAYERS"),
    (dict(RECUR_LAYERS="6,7,8"), "PARALLEL_START_LAYER=7", "lanes"),
    (dict(VIRTUAL_ORDER="0,1"), "VIRTUAL_ORDER=0,1", "NUM_LAYERS"),
    (dict(VE_LAYERS="9,9"), "VE_LAYERS=9,9", "different"),
    (dict(VE_LAYERS="11"), "VE_LAYERS=11", "NUM_LAYERS"),
    (dict(GPTQ_RESERVE_SECONDS=600), "GPTQ_RESERVE_SECONDS=600.0", "MAX_WALLCLOCK_SECONDS"),
    (dict(INPUT_PATH="x"), "INPUT_PATH=x", "STAGE"),
    (dict(RUN_ID="../y"), "RUN_ID=../y", "folder")])
def test_impossible_combination_is_refused_naming_what_it_clashes_with(env, setting, other):
    found = [fault for fault in faults_of({name: str(value) for name, value in env.items()})
             if fault.startswith(setting)]
    assert len(found) == 1 and other in found[0]


@pytest.mark.parametrize("env", [
    dict(VE_LAYERS="20", VE_ENABLED="0"), dict(PARALLEL_START_LAYER="99"), dict(RECUR_LAYERS=""),
    dict(GPTQ_RESERVE_SECONDS="600", MAX_WALLCLOCK_SECONDS="0"), dict(RUN_ID="a.b-C_9"),
    dict(RECUR_LAYERS="7,8", PARALLEL_START_LAYER="0"), dict(INPUT_PATH="x", STAGE="evaluate")])
def test_combination_that_can_work_is_accepted(env):
    load_config(env)


def test_one_error_lists_every_fault_of_names_types_and_ranges():
    env = dict(PRESET="best", ITERATION="5", SLOT_ENABLED="1", SEED="x", BETA1="2", STAGE="test")
    found = {fault.split("=")[0] for fault in faults_of(env)}
    assert found == set(env)


def test_one_error_lists_every_impossible_combination():
    env = dict(TRAIN_BATCH_TOKENS="5000", EVAL_STRIDE="4096", VE_LAYERS="11", SEED="x")
    assert {fault.split("=")[0] for fault in faults_of(env)} == set(env)


def test_one_error_lists_ranges_and_combinations_together():
    env = dict(BETA1="2", EVAL_STRIDE="4096")
    assert {fault.split("=")[0] for fault in faults_of(env)} == set(env)


@contextlib.contextmanager
def memory_limit(more_bytes):
    """Let this process grow by so many bytes at most; asking for more raises MemoryError."""
    resource = pytest.importorskip("resource")
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux to bound memory")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + more_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("env", [
    dict(NUM_LAYERS="9" * 12), dict(RECUR_LAYERS="0,999999999"), dict(VIRTUAL_ORDER="999999999"),
    dict(RECUR_LAYERS="0," + "9" * 30), dict(MODEL_DIM="8" + "0" * 400, ROPE_DIMS="2"),
    dict(TRAIN_BATCH_TOKENS="9" * 400), dict(MAX_WALLCLOCK_SECONDS="-1", NUM_HEADS="0")],
    ids=lambda env: "+".join(env))
def test_absurd_size_is_refused_in_little_memory(env):
    with memory_limit(256 << 20):
        assert faults_of(env)


NUMBERS = st.text("0123456789.,-+ e_", max_size=6)
WORDS = st.sampled_from(["", "auto", "true", "nan", "1e999", "-inf", "٣", "1,,2", "0x10", "\x00"])


@given(st.dictionaries(st.sampled_from(known_names()) | st.text("ABDEILMNORSTU_", max_size=9),
                       NUMBERS | WORDS | st.text(max_size=8), max_size=6))
@settings(max_examples=250, deadline=None, database=None, derandomize=True)
def test_any_environment_gives_a_valid_config_or_one_config_error(env):
    try:
        config = load_config(env)
    except ConfigError as error:
        assert error.faults
    else:
        assert not train_gpt.config_faults(config) and config.explicit <= set(KNOBS)


@given(st.text(max_size=12) | NUMBERS | WORDS, st.sampled_from([f.type for f in KNOBS.values()]))
@settings(max_examples=250, deadline=None, database=None, derandomize=True)
def test_parsed_value_prints_and_parses_to_itself(text, kind):
    try:
        value = train_gpt.parse_setting(text, kind)
    except ValueError as error:
        assert str(error)  # says what was expected
    else:
        assert train_gpt.parse_setting(train_gpt.show_value(value), kind) == value


# ---- presets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_builds_and_yields_to_the_environment(name):
    config = load_config({"PRESET": name})
    settings = dict(pair.split("=") for pair in PRESETS[name].split())
    assert config.preset == name and config.typed == {"preset"}
    assert config.explicit == {"preset", *map(str.lower, settings)}
    assert all(train_gpt.plain_value(train_gpt.show_value(getattr(config, key.lower())))
               == train_gpt.plain_value(value) for key, value in settings.items())
    assert train_gpt.count_parameters(config) > 0
    key = next(key.lower() for key in settings if KNOBS[key.lower()].type == "float")
    beaten = load_config({"PRESET": name, key.upper(): "0.125"})
    assert beaten.public() == config.public() | {key: 0.125}


def test_unknown_preset_is_refused_listing_the_known_ones():
    assert ", ".join(PRESETS) in fault_of({"PRESET": "sp9000"})


def test_presets_join_and_the_later_one_beats(tmp_path):
    both = load_config({"PRESET": "demo,one_gpu"})
    assert (both.num_layers, both.ema_decay, both.train_log_every) == (6, 0.9725, 50)
    assert load_config({"PRESET": "one_gpu, demo"}).ema_decay == 0.95
    file = tmp_path / "mine.env"
    file.write_text("# of mine\nNUM_LAYERS=8  # deeper\n\n RECUR_LAYERS = 3,4 \nTTT_ENABLED=0\n")
    mine = load_config({"PRESET": f"demo,{file}", "EMA_DECAY": "0.5"})
    assert (mine.num_layers, mine.recur_layers, mine.ema_decay) == (8, (3, 4), 0.5)
    assert mine.explicit > mine.typed == {"preset", "ema_decay"}


def test_a_preset_file_may_begin_with_a_mark_and_hold_a_hash(tmp_path):
    file = tmp_path / "mine.env"
    file.write_bytes("\ufeffSEED=3\nDATA_PATH=/data/a#b # mine\n#SEED=4\n".encode())
    config = load_config({"PRESET": str(file)})
    assert (config.seed, config.data_path) == (3, "/data/a#b")
    file.write_bytes(b"\xfc\xff\x00")
    assert "NAME=VALUE" in fault_of({"PRESET": str(file)})


@pytest.mark.parametrize("env, told", [
    (dict(EVAL_STRIDE="4096"), "EVAL_STRIDE=4096: must be at most EVAL_SEQ_LEN=2048"),
    (dict(NUM_KV_HEADS="3"), "NUM_HEADS=8: must be a multiple of NUM_KV_HEADS=3"),
    (dict(STEP_RULE="fisher", SDCLIP_K="3"), "needs GPTQ_ENABLED=1, and no SDCLIP_K=3.0 or")])
def test_a_rule_of_two_settings_shows_both_values(env, told):
    assert told in fault_of(env)


@pytest.mark.parametrize("env", [
    dict(ITERATIONS="1_0"), dict(ITERATIONS="\u0663"), dict(MATRIX_LR="1_0.5"),
    dict(VE_LAYERS="1_0,2"), dict(RUN_ID="\u00e9"), dict(RUN_ID="-x"), dict(RUN_ID="a\nb"),
    dict(RUN_ID="x" * 201)])
def test_only_plain_numbers_and_names_of_files_are_taken(env):
    assert next(iter(env)) in fault_of(env)
    assert load_config(dict(RUN_ID="x" * 200, ALLOW_ENV="MUON_LR_2")).run_id


@pytest.mark.parametrize("text, word", [
    ("NUM_LAYER=8", "did you mean NUM_LAYERS"), ("NUM_LAYERS=x", "whole number"),
    ("SLOT_ENABLED=1", "not built"), ("NUM_LAYERS", "NAME=VALUE"), ("", "NAME=VALUE"),
    ("# nothing", "NAME=VALUE"), ("SEED=1\nhello\nNUM_LAYERS=8", "not 'hello'"),
    ("SEED=1\nNUM_LAYERS=8\nSEED=2", "not 'SEED=1'"), ("PRESET=demo", "not 'PRESET=demo'"),
    ("export SEED=1", "not 'export SEED=1'"), ("=3", "not '=3'"),
    ("FOO_BAR=3", "FOO_BAR=3: no such setting"), ("\ufffd\x00\x07", "NAME=VALUE")])
def test_a_preset_file_is_checked_like_the_environment(tmp_path, text, word):
    file = tmp_path / "mine.env"
    file.write_text(text)
    assert word in fault_of({"PRESET": str(file)})
    assert "NAME=VALUE" in fault_of({"PRESET": str(tmp_path)})


def test_published_preset_has_the_published_quirks():
    config = load_config({"PRESET": "pr1471"})
    assert (config.scale_floor, config.scale_floor_embed) == (1 / 31, 1 / 127)
    assert (config.sdclip_k, config.sdclip_k_embed, config.search_k) == (12.85, 20.0, False)
    assert not config.embed_gptq and not config.score_tail and config.hessian_ranks == "first"
    assert config.control_dtype == "float16" and config.gptq_reserve_seconds == 10
    assert train_gpt.count_parameters(config) == 37_022_812  # as its logs say


def test_published_preset_loses_the_skips_behind_the_lanes_and_the_default_keeps_them():
    before, after = (p.layout for p in train_gpt.phases(load_config({"PRESET": "pr1471"})))
    assert layers_of_rows(before) == {0: 5, 1: 6, 2: 7}
    assert layers_of_rows(after) == {0: 4, 1: 5, 2: 6, 3: 7}
    before, after = (p.layout for p in train_gpt.phases(load_config({})))
    assert layers_of_rows(before) == {0: 5, 1: 6, 2: 7, 3: 8, 4: 9}
    assert layers_of_rows(after) == {0: 4, 1: 5, 2: 6, 3: 7, 4: 8}


# ---- settings that beat others -----------------------------------------------------------------


def test_explicit_paths_beat_the_data_folder():
    config = load_config(dict(DATA_DIR="/d", VOCAB_SIZE="1024"))
    assert config.shard_dir == Path("/d/datasets/fineweb10B_sp1024")
    assert config.tokenizer_file == Path("/d/tokenizers/fineweb_1024_bpe.model")
    config = load_config(dict(DATA_DIR="/d", DATA_PATH="/s", TOKENIZER_PATH="/t.model"))
    assert (config.shard_dir, config.tokenizer_file) == (Path("/s"), Path("/t.model"))


def test_virtual_order_beats_recur_layers():
    order = (*ALL_LAYERS, 10)
    env = dict(VIRTUAL_ORDER=text_of(order), RECUR_LAYERS="4,5")
    assert load_config(dict(RECUR_LAYERS="4,5")).recurrent_order == (*range(6), 4, 5, *range(6, 11))
    assert load_config(env).recurrent_order == order
    assert load_config(env | dict(RECUR_LAYERS="5,99")).recurrent_order == order
    assert load_config(dict(RECUR_LAYERS="")).recurrent_order == ALL_LAYERS


def test_recurrence_starts_at_its_step_or_by_its_share_of_the_run():
    def starts(env):
        config = load_config(env)
        return [train_gpt.phases(config)[1].start.done(step, progress) == 1.0
                for step, progress in ((9, 0.9), (10, 0.1), (10, 0.5))]

    assert starts(dict(RECUR_START_STEP="10")) == [False, True, True]
    assert starts(dict(RECUR_START_STEP="10", RECUR_START_FRAC="0.5")) == [True, False, True]


@pytest.mark.parametrize("env, setting, why", [
    (dict(STAGE="evaluate", ITERATIONS="5"), "ITERATIONS", "without effect in STAGE=evaluate"),
    (dict(STAGE="train", EVAL_STRIDE="32"), "EVAL_STRIDE", "acts in STAGE=evaluate"),
    (dict(RECUR_START_FRAC="0.3", RECUR_START_STEP="9"), "RECUR_START_STEP", "RECUR_START_FRAC"),
    (dict(VIRTUAL_ORDER=text_of(ALL_LAYERS), RECUR_LAYERS="3"), "RECUR_LAYERS", "VIRTUAL_ORDER")])
def test_setting_that_cannot_act_is_said_aloud(env, setting, why):
    (line,) = train_gpt.notices(load_config(env), env)
    assert line.startswith(setting) and why in line


@pytest.mark.parametrize("env", [dict(ITERATIONS="5", EVAL_STRIDE="32"), dict(PRESET="one_gpu"),
                                 dict(STAGE="quantize", SDCLIP_K="12")])
def test_settings_that_act_are_not_remarked_on(env):
    assert not train_gpt.notices(load_config(env), env)


# ---- a later stage takes over what its input was made with -------------------------------------


def header_of(**env):
    """Return a file's header, through JSON, as a run with these settings writes it."""
    return json.loads(json.dumps({"config": train_gpt.artifact_config(load_config(env))}))


ORIGIN = Path("runs/old/final_model.weights")


@pytest.mark.parametrize("preset", ["", *PRESETS])
@pytest.mark.parametrize("stage", ["quantize", "evaluate"])
def test_stored_settings_win_over_defaults(preset, stage):
    made = load_config(dict(PRESET=preset))
    adopted = train_gpt.adopt(load_config({}), header_of(PRESET=preset), stage, ORIGIN)
    assert train_gpt.artifact_config(adopted) == train_gpt.artifact_config(made)
    assert adopted.iterations == Config().iterations  # what the artifact does not hold stays


def test_explicit_setting_of_this_stage_or_a_later_one_wins():
    env = dict(SDCLIP_K="11", EVAL_STRIDE="32", VOCAB_SIZE="1024")
    header = header_of(VOCAB_SIZE="1024", SDCLIP_K="12", EVAL_STRIDE="16", EVAL_SEQ_LEN="1024")
    adopted = train_gpt.adopt(load_config(env), header, "quantize", ORIGIN)
    assert (adopted.sdclip_k, adopted.eval_stride, adopted.vocab_size) == (11.0, 32, 1024)
    assert adopted.eval_seq_len == 1024


def test_differing_explicit_setting_of_an_earlier_stage_is_an_error_naming_setting_and_file():
    config = load_config(dict(VOCAB_SIZE="1024", SDCLIP_K="11", EVAL_STRIDE="32", SEED="1337"))
    with pytest.raises(ConfigError) as caught:
        train_gpt.adopt(config, header_of(), "evaluate", ORIGIN)
    found = {fault.split(":")[0]: fault for fault in caught.value.faults}
    assert set(found) == {"VOCAB_SIZE=1024", "SDCLIP_K=11.0"}
    assert all(str(ORIGIN) in fault for fault in found.values())
    assert "8192" in found["VOCAB_SIZE=1024"]


def test_a_file_without_a_setting_its_stage_consumed_is_refused():
    """An artifact of a script that did not know TRELLIS must not be read as if it had used it."""
    header = header_of()
    del header["config"]["trellis"]
    with pytest.raises(ConfigError, match="lacks trellis; use the train_gpt.py that wrote it"):
        train_gpt.adopt(load_config({}), header, "evaluate", ORIGIN)
    assert train_gpt.adopt(load_config({}), header, "quantize", ORIGIN).trellis


def test_adopting_twice_changes_nothing_more():
    header = header_of(PRESET="demo")
    once = train_gpt.adopt(load_config(dict(EVAL_STRIDE="32")), header, "evaluate", ORIGIN)
    assert train_gpt.adopt(once, header, "evaluate", ORIGIN) == once


@pytest.mark.parametrize("stored", [
    {"no_such_knob": 1}, {"num_layers": "11"}, {"num_layers": None}, {"num_layers": 0},
    {"num_layers": 10**12}, {"rope_base": [1]}, {"ve_layers": [[9]]}, {"ve_layers": 9},
    {"run_id": "x"}, {"score_tail": "no"}], ids=str)
def test_hostile_stored_settings_are_one_config_error_naming_the_file(stored):
    with memory_limit(256 << 20), pytest.raises(ConfigError, match=ORIGIN.name):
        train_gpt.adopt(load_config({}), {"config": stored}, "evaluate", ORIGIN)


def test_what_travels_in_the_artifact_names_no_host_path_or_time():
    stored = set(train_gpt.artifact_config(load_config({})))
    assert {"vocab_size", "sdclip_k", "eval_stride"} <= stored
    assert not stored & {"run_id", "data_path", "data_dir", "tokenizer_path", "input_path",
                         "device", "max_wallclock_seconds", "iterations", "preset", "stage"}


# ---- help --------------------------------------------------------------------------------------


def test_help_names_every_setting_with_its_default_and_meaning():
    text = train_gpt.help_text()
    for name, field in KNOBS.items():
        assert f"\n  {name.upper()} = {train_gpt.show_value(field.default)}" in text, name
        assert field.metadata["note"] in text, name
    for name in [*train_gpt.WITHOUT_EFFECT, *train_gpt.NEUTRAL, *PRESETS]:
        assert name in text, name


def test_a_pager_that_is_left_early_ends_help_without_a_word(monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    closed = open(writing, "w", buffering=1, encoding="utf-8")
    monkeypatch.setattr("sys.stdout", closed)
    assert train_gpt.main(["--help"], {}) == 0
    monkeypatch.undo()
    with contextlib.suppress(BrokenPipeError):
        closed.close()
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name, meant", [("WARMDOWN_FRACTION", "WARMDOWN_FRAC"),
                                         ("TRAIN_BATCH", "TRAIN_BATCH_TOKENS"),
                                         ("MUON_LR", "MUON_WD"), ("RECUR_START", "RECUR_START_")])
def test_other_forms_of_a_setting_are_refused(name, meant):
    assert f"did you mean {meant}" in fault_of({name: "1"})


@pytest.mark.parametrize("name", ["TRAINER", "MODEL_HOME", "DATA", "NUM_PROC", "VE", "GPTQ"])
def test_names_of_other_programs_pass(name):
    load_config({name: "1"})


def test_a_presets_own_value_yields_to_the_files():
    """PRESET=demo STAGE=evaluate on an artifact with another cap: nobody typed the preset's."""
    env = {"PRESET": "demo", "ARTIFACT_MAX_BYTES": "700000"}
    made = train_gpt.artifact_config(load_config(env))
    asked = load_config({"PRESET": "demo", "STAGE": "evaluate"})
    found = train_gpt.adopt(asked, {"config": made}, "evaluate", Path("file"))
    assert found.artifact_max_bytes == 700_000
    typed = load_config({"PRESET": "demo", "STAGE": "evaluate", "ARTIFACT_MAX_BYTES": "785000"})
    with pytest.raises(ConfigError, match="ARTIFACT_MAX_BYTES=785000: file was made with 700000"):
        train_gpt.adopt(typed, {"config": made}, "evaluate", Path("file"))


def test_a_preset_of_the_stage_itself_beats_the_file():
    made = train_gpt.artifact_config(load_config({}))
    asked = load_config({"PRESET": "pr1471", "STAGE": "quantize"})
    found = train_gpt.adopt(asked, {"config": made}, "quantize", Path("file"))
    assert (found.sdclip_k, found.rule, found.skip_to_lanes) == (12.85, "sdclip", True)


@pytest.mark.parametrize("env, fits", [
    ({"EMBEDDING_DIM": "512"}, True), ({"EMBEDDING_DIM": "128"}, False),
    ({"EMBEDDING_DIM": "128", "MODEL_DIM": "128"}, True),
    ({"EMBEDDING_DIM": "512", "MODEL_DIM": "128"}, False),
    ({"EMBEDDING_DIM": "128", "PRESET": "demo"}, True),
    ({"EMBEDDING_DIM": "512", "PRESET": "demo"}, False)])
def test_embedding_dim_means_the_models_width_or_is_not_built(env, fits):
    if fits:
        load_config(env)
    else:
        assert "EMBEDDING_DIM" in fault_of(env)


def test_a_preset_that_yields_is_told():
    made = train_gpt.artifact_config(load_config({"PRESET": "demo", "NUM_LAYERS": "8"}))
    env = {"PRESET": "demo", "STAGE": "quantize", "EMA_DECAY": "0.5"}
    found = train_gpt.adopt(load_config(env), {"config": made}, "quantize", Path("file"))
    (line,) = [line for line in train_gpt.notices(found, env) if line.startswith("PRESET=demo")]
    assert line.startswith("PRESET=demo: NUM_LAYERS not as it says")
    assert not any("PRESET" in line for line in train_gpt.notices(load_config({"PRESET": "demo"}),
                                                                  {"PRESET": "demo"}))


def test_a_bad_value_leaves_the_presets_so_that_no_other_rule_complains():
    (fault,) = faults_of({"PRESET": "demo", "VE_LAYERS": "x"})
    assert fault.startswith("VE_LAYERS=x: must be whole numbers")
