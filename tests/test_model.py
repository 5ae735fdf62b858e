"""The model against its slow reference, and the laws of its layouts, start and number formats."""

import functools
import math

import plain
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import (
    asked,
    kinds_of,
    layouts_of,
    meta_model,
    random_model,
    random_tokens,
    sizes_of,
    steady,  # noqa: F401
    toy_config,
)

import train_gpt
from train_gpt import (
    GPT,
    Batch,
    Role,
    attention_math,
    attention_sdpa,
    exclude_self,
    inventory,
    load_config,
    partition,
    plan_layout,
    rotary_tables,
    rotate,
    skip_rows,
    softcap_cross_entropy,
    softcap_logits,
)

FRONTIER = dict(
    ve_enabled=False, virtual_order=(0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10),
    parallel_start_layer=8, lane_routing="learned", skip_rows="orders", attn_gate="sparse",
    smear_gate=True)
VARIANTS = {
    "record": {},
    "PR 1471's lost skips": dict(skip_to_lanes=False),
    "no gates": dict(skip_gates_enabled=False),
    "no value embedding": dict(ve_enabled=False),
    "value embedding as wide as the values": dict(ve_dim=8, ve_layers=(0, 10, 4)),
    "XSA on the last layers": dict(xsa_last_n=4),
    "no XSA": dict(xsa_last_n=0),
    "no lanes": dict(parallel_start_layer=0),
    "no lanes, start past the end": dict(parallel_start_layer=11),
    "every dimension rotated": dict(rope_dims=0),
    "longer than in training": dict(rope_dims=4, train_seq_len=4, rope_base=100.0),
    "no layer scale": dict(ln_scale=False),
    "one query head per key head": dict(num_kv_heads=4),
    "four query heads per key head": dict(num_kv_heads=1),
    "two layers repeated": dict(recur_layers=(4, 5), logit_softcap=2.0),
    "order of one's own": dict(virtual_order=(0, 1, 0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10)),
    "even depth": dict(num_layers=6, recur_layers=(2,), parallel_start_layer=4, ve_layers=(5,)),
    "gated heads": dict(attn_gate="sparse", gate_window=5),
    "dense gates of their own scale": dict(attn_gate="sparse", gate_window=16, attn_gate_scale=2.0),
    "smeared embeddings": dict(smear_gate=True, gate_window=7),
    "routed lanes": dict(lane_routing="learned"),
    "routed lanes without skips": dict(lane_routing="learned", skip_to_lanes=False),
    "the frontier's 17": FRONTIER,
    "one layer": dict(num_layers=1, recur_layers=(), parallel_start_layer=0, ve_layers=(0,)),
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
depths = pytest.mark.parametrize("depth", (0, 1), ids=("plain", "recurrent"))


@pytest.fixture
def exact(monkeypatch):
    """Widen what the model fixes to fp32 to float64, so that only real differences are left."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)


def doubles(model):
    return {name: p.detach().double() for name, p in model.named_parameters()}


def reference_logits(config, model, tokens, depth):
    order = (config.base_order, config.recurrent_order)[depth]
    return plain.forward(doubles(model), tokens, order, sizes_of(config), config.skip_to_lanes)


# ---- parameters ----------------------------------------------------------------------------


def test_parameters_are_those_of_the_published_model():
    config = load_config({"PRESET": "pr1471"})
    model = meta_model(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == plain.param_shapes(sizes_of(config), 8192, 512, 2048, 128)
    assert sum(p.numel() for p in model.parameters()) == 37_022_812
    counts = {role: len(group) for role, group in partition(model).items()}
    # published: 50 control tensors, the value embedding's two layer scales being one each
    assert counts == {Role.MATRIX: 67, Role.EMBED: 2, Role.CONTROL: 49}
    assert all(p.is_meta for p in model.parameters())


def test_a_smaller_vocabulary_has_the_published_size():
    model = meta_model(load_config({"PRESET": "pr1471", "VOCAB_SIZE": "4096"}))
    assert sum(p.numel() for p in model.parameters()) == 34_401_372


@variants
def test_names_and_shapes_equal_the_reference(changes):
    config = toy_config(**changes)
    expected = plain.param_shapes(sizes_of(config), config.vocab_size, 16, 24, config.ve_dim)
    found = {name: tuple(p.shape) for name, p in meta_model(config).named_parameters()}
    assert found == expected


def test_roles_follow_from_shapes():
    """Tables by vocabulary, every other two-dimensional weight a matrix, the rest control."""
    config = toy_config(attn_gate="sparse", smear_gate=True, lane_routing="learned")
    for name, p in meta_model(config).named_parameters():
        two = p.ndim == 2 and name not in ("skip_weights", "skip_gates", "lane_keep")
        two = two and not name.endswith(("resid_mix", "attn.gate"))
        expected = Role.EMBED if p.shape[:1] == (29,) else Role.MATRIX if two else Role.CONTROL
        assert p.role is expected, name


# ---- layouts -------------------------------------------------------------------------------


def skips_of(layout):
    """Return (row, target step, source step) of every skip that acts."""
    waiting, found = [], []
    for at, step in enumerate(layout.steps):
        if step.skip is not None:
            found.append((step.skip, at, waiting.pop()))
        if step.saves:
            waiting.append(at)
    return found


def split_of(layout):
    """Return the step at which the lanes split, or the number of steps."""
    return next((at for at, step in enumerate(layout.steps) if step.splits), len(layout.steps))


@pytest.mark.parametrize("env, order, skips", [
    ({}, (0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10),
     [(4, 3), (5, 5), (6, 4), (7, 3), (8, 2)]),
    ({"RECUR_LAYERS": "4,5"}, (0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9, 10),
     [(4, 5), (5, 4), (6, 3), (7, 2), (8, 1)]),
    ({"RECUR_LAYERS": ""}, tuple(range(11)), [(5, 4), (6, 3), (7, 2), (8, 1), (9, 0)]),
])
def test_published_orders_and_skips(env, order, skips):
    before, after = layouts_of(load_config(env))
    assert before.order == tuple(range(11)) and after.order == order
    found = [(order[target], order[source]) for _, target, source in skips_of(after)]
    assert found == skips and len(skips_of(before)) == 5
    assert order[split_of(after)] == 7 and before.order[split_of(before)] == 7


def test_the_frontiers_order_has_the_published_skips_and_lanes():
    """Eight rows for both orders; the first looped skip is the last encoder output itself."""
    config = load_config({name.upper(): train_gpt.show_value(value)
                          for name, value in FRONTIER.items()})
    before, after = layouts_of(config)
    assert (len(before.steps), len(after.steps), skip_rows(config)) == (11, 17, 8)
    order = after.order
    assert [(row, order[target], source) for row, target, source in skips_of(after)] == [
        (0, 5, 7), (1, 3, 6), (2, 4, 5), (3, 5, 4), (4, 6, 3), (5, 7, 2), (6, 8, 1), (7, 9, 0)]
    assert [(row, before.order[target], source) for row, target, source in skips_of(before)] == [
        (0, 5, 4), (1, 6, 3), (2, 7, 2), (3, 8, 1), (4, 9, 0)]
    for layout in (before, after):
        assert [layout.order[at] for at in range(split_of(layout), len(layout.steps))] == [8, 9, 10]


def test_the_frontier_has_the_published_number_of_parameters():
    config = load_config({name.upper(): train_gpt.show_value(value)
                          for name, value in FRONTIER.items()})
    assert train_gpt.count_parameters(config) == 35_945_671
    plainer = load_config({"VE_ENABLED": "0", "SKIP_ROWS": "orders", "VIRTUAL_ORDER":
                           train_gpt.show_value(FRONTIER["virtual_order"]),
                           "PARALLEL_START_LAYER": "0"})
    assert train_gpt.count_parameters(plainer) == 35_944_536


@pytest.mark.parametrize("attend", (attention_sdpa, attention_math))
def test_gradients_of_gates_smear_and_routes_equal_the_reference(exact, attend):
    config = toy_config(**FRONTIER)
    model = random_model(config, dtype=torch.float64, attend=attend).double()
    windows = random_tokens(config, 2, 9)
    windows[0, 4] = windows[1, 0] = 1  # a document starts
    params = {name: p.requires_grad_() for name, p in doubles(model).items()}
    expected = plain.loss(params, windows[:, :-1], windows[:, 1:], config.recurrent_order,
                          sizes_of(config))
    expected.backward()
    loss = model.mean_loss(Batch.of_windows(windows), layouts_of(config)[1])
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for name, p in model.named_parameters():
        reference = params[name].grad
        if reference is None or not reference.any():
            assert p.grad is None or not p.grad.any(), name
        else:
            torch.testing.assert_close(p.grad, reference, rtol=1e-8, atol=1e-10)


def test_embeddings_are_not_smeared_across_documents(exact):
    config = toy_config(smear_gate=True)
    model, tokens = random_model(config, dtype=torch.float64), random_tokens(config, 1, 8)
    tokens[0, 4] = 1
    x = model.tok_emb(tokens)
    changed = x.clone()
    changed[0, 3] += 1.0
    before, after = model.smear(x, tokens == 1), model.smear(changed, tokens == 1)
    assert torch.equal(before[0, 4:], after[0, 4:]) and not torch.equal(before[0, 3], after[0, 3])
    tokens[0, 4] = 2
    nowhere = tokens == 1
    assert not torch.equal(model.smear(x, nowhere)[0, 4], model.smear(changed, nowhere)[0, 4])


def test_published_skips_into_the_lanes_are_lost():
    """Rows 3 and 4 before recurrence, row 4 after it."""
    before, after = layouts_of(load_config({"PRESET": "pr1471"}))
    assert (len(skips_of(before)), len(skips_of(after))) == (3, 4)


@st.composite
def depths_and_loops(draw):
    num_layers = draw(st.integers(1, 16))
    first = draw(st.integers(0, num_layers - 1))
    last = draw(st.integers(first, num_layers - 1))
    loop = tuple(range(first, last + 1)) if draw(st.booleans()) else ()
    return num_layers, loop, draw(st.integers(0, num_layers + 1))


@given(depths_and_loops(), st.booleans())
def test_layouts_equal_the_reference(case, to_lanes):
    num_layers, loop, lane_start = case
    order = plain.virtual_order(num_layers, loop, active=True)
    config = toy_config(num_layers=num_layers, parallel_start_layer=lane_start,
                        skip_to_lanes=to_lanes)
    found = plan_layout(tuple(order), config)
    lanes = len(order)
    for step in reversed(range(len(order) // 2, len(order))):
        if 0 < lane_start < num_layers and order[step] >= lane_start:
            lanes = step
    rows = plain.skip_map(order, num_layers)
    acting = [(row, target, source) for row, target, source in rows if to_lanes or target <= lanes]
    assert found.order == tuple(order) and split_of(found) == lanes
    assert [step.saves for step in found.steps].index(False) == len(order) // 2
    assert [step.last for step in found.steps].index(True) == len(order) - 1
    assert skips_of(found) == acting
    assert len(rows) <= skip_rows(config)


@given(depths_and_loops())
def test_the_recurrent_order_repeats_the_loop_once(case):
    num_layers, loop, _ = case
    config = toy_config(num_layers=num_layers, recur_layers=loop, parallel_start_layer=0,
                        ve_enabled=False)
    assert list(config.recurrent_order) == plain.virtual_order(num_layers, loop, active=True)


# ---- forward pass --------------------------------------------------------------------------


@variants
@depths
def test_forward_equals_the_reference(exact, changes, depth):
    config = toy_config(**changes)
    model, tokens = random_model(config, dtype=torch.float64).double(), random_tokens(config, 2, 8)
    with torch.no_grad():
        logits = model.logits(asked(tokens), layouts_of(config)[depth])
    expected = reference_logits(config, model, tokens, depth)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


@variants
def test_forward_in_fp32_stays_near_the_reference(changes):
    config = toy_config(**changes)
    model, tokens = random_model(config), random_tokens(config, 2, 8)
    with torch.no_grad():
        logits = model.logits(asked(tokens), layouts_of(config)[1])
    assert logits.dtype == torch.float32
    expected = reference_logits(config, model, tokens, 1)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attend", (attention_sdpa, attention_math))
@depths
def test_gradients_equal_the_reference(exact, attend, depth):
    config = toy_config()
    model = random_model(config, dtype=torch.float64, attend=attend).double()
    windows = random_tokens(config, 2, 9)
    tokens, targets = windows[:, :-1], windows[:, 1:]
    params = {name: p.requires_grad_() for name, p in doubles(model).items()}
    order = (config.base_order, config.recurrent_order)[depth]
    expected = plain.loss(params, tokens, targets, order, sizes_of(config))
    expected.backward()
    loss = model.mean_loss(asked(tokens, targets=targets), layouts_of(config)[depth])
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for name, p in model.named_parameters():
        assert params[name].grad.any(), name
        torch.testing.assert_close(p.grad, params[name].grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("changes", ({}, dict(parallel_start_layer=0, rope_dims=0)))
@pytest.mark.parametrize("attend", (attention_sdpa, attention_math))
@depths
def test_no_logit_sees_a_later_token(exact, attend, changes, depth):
    config = toy_config(**changes)
    model = random_model(config, dtype=torch.float64, attend=attend)
    layout, tokens = layouts_of(config)[depth], random_tokens(config, 1, 8)
    with torch.no_grad():
        before = model.logits(asked(tokens), layout)
        for t in range(7):
            changed = tokens.clone()
            changed[:, t + 1] = (changed[:, t + 1] + 1) % config.vocab_size
            moved = (model.logits(asked(changed), layout) - before).abs().amax((0, 2))
            assert moved[:t + 1].max() <= 1e-12
            assert moved[t + 1:].min() > 1e-6


@variants
@depths
def test_tail_is_the_end_of_the_whole(exact, changes, depth):
    config = toy_config(**changes)
    model, tokens = random_model(config, dtype=torch.float64), random_tokens(config, 2, 8)
    layout = layouts_of(config)[depth]
    with torch.no_grad():
        whole = model(asked(tokens), layout)
        for tail in (1, 3, 8):
            part = model(asked(tokens, tail), layout)
            torch.testing.assert_close(part, whole[:, -tail:], rtol=1e-12, atol=1e-12)


def test_losses_are_those_of_the_last_positions(exact):
    config = toy_config(skip_to_lanes=False)
    model = random_model(config, dtype=torch.float64)
    windows = random_tokens(config, 3, 9)
    tokens, targets, layout = windows[:, :-1], windows[:, 1:], layouts_of(config)[1]
    with torch.no_grad():
        log_odds = model.logits(asked(tokens), layout).log_softmax(-1)
        expected = -log_odds.gather(2, targets[..., None])[..., 0]
        for tail in (2, 8):
            losses = model.token_losses(asked(tokens, tail, targets), layout)
            torch.testing.assert_close(losses, expected[:, -tail:], rtol=1e-9, atol=1e-9)
        mean = model.mean_loss(asked(tokens, targets=targets), layout)
        torch.testing.assert_close(mean, expected.mean(), rtol=1e-9, atol=1e-9)


def test_sequences_of_a_batch_do_not_mix(exact):
    config = toy_config()
    model, tokens = random_model(config, dtype=torch.float64), random_tokens(config, 3, 8)
    layout = layouts_of(config)[1]
    with torch.no_grad():
        together = model(asked(tokens), layout)
        for i in range(3):
            alone = model(asked(tokens[i:i + 1]), layout)
            torch.testing.assert_close(alone[0], together[i], rtol=1e-12, atol=1e-12)


# ---- start ---------------------------------------------------------------------------------


@functools.cache
def record():
    config = load_config({"PRESET": "pr1471"})
    model = GPT(config)
    model.init_weights(config.seed)
    return config, model


def test_training_starts_at_the_loss_of_an_even_guess():
    config, model = record()
    windows = random_tokens(config, 1, 97)
    with torch.no_grad():
        for layout in layouts_of(config):
            loss = model.mean_loss(Batch.of_windows(windows), layout).item()
            assert loss == pytest.approx(math.log(8192), abs=0.05)


def test_matrices_start_orthogonal_or_at_zero():
    _, model = record()
    for name, p in model.named_parameters():
        if p.role is not Role.MATRIX:
            continue
        if name.endswith(("attn.out.weight", "mlp.down.weight")):
            assert not p.any(), name
        elif name.startswith(("blocks.0.", "ve.")):
            short = p if p.shape[0] <= p.shape[1] else p.T
            identity = torch.eye(len(short))
            torch.testing.assert_close(short @ short.T, identity, rtol=0, atol=1e-4)


def test_other_parameters_start_as_published():
    config, model = record()
    p = {name: value.detach() for name, value in model.named_parameters()}
    assert p["tok_emb.weight"].std().item() == pytest.approx(0.005, rel=0.01)
    assert p["ve.table.weight"].std().item() == pytest.approx(0.01, rel=0.01)
    assert abs(p["tok_emb.weight"].mean().item()) < 1e-5
    assert p["ve.scale"].item() == pytest.approx(0.1) and p["ve.layer_scales"].tolist() == [1, 1]
    assert (p["skip_weights"] == 1).all() and (p["skip_gates"] == 0).all()
    assert p["lane_merge"].item() == 0.5
    for i in range(config.num_layers):
        assert (p[f"blocks.{i}.attn.q_gain"] == 5).all()
        assert (p[f"blocks.{i}.attn_scale"] == 1).all() and (p[f"blocks.{i}.mlp_scale"] == 1).all()
        assert (p[f"blocks.{i}.resid_mix"][0] == 1).all()
        assert (p[f"blocks.{i}.resid_mix"][1] == 0).all()


@variants
@depths
def test_untrained_blocks_pass_the_embedding_on(exact, changes, depth):
    config = toy_config(**changes, tied_embed_init_std=1.0)
    model, tokens = GPT(config, dtype=torch.float64), random_tokens(config, 2, 8)
    model.init_weights(0)
    embedded = plain.rms_norm(model.tok_emb.weight[tokens])
    hidden = model(asked(tokens), layouts_of(config)[depth])
    torch.testing.assert_close(hidden, embedded, rtol=1e-5, atol=1e-6)


def test_start_depends_on_the_seed_alone():
    def start(seed, global_seed):
        torch.manual_seed(global_seed)
        model = GPT(toy_config())
        before = torch.get_rng_state()
        model.init_weights(seed)
        assert torch.equal(before, torch.get_rng_state())
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(start(1, 5), start(1, 6))
    assert not torch.equal(start(1, 5), start(2, 5))


# ---- kernels -------------------------------------------------------------------------------


@pytest.mark.parametrize("attend", (attention_sdpa, attention_math))
@pytest.mark.parametrize("kv_heads", (1, 2, 4))
def test_attention_equals_the_reference_head_by_head(attend, kv_heads):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 9, 4, 6, generator=generator)
    k, v = torch.randn(2, 2, 9, kv_heads, 6, generator=generator)
    found = attend(q, k, v)
    for b in range(2):
        for head in range(4):
            group = head // (4 // kv_heads)
            expected = plain.causal_attention(q[b, :, head], k[b, :, group], v[b, :, group])
            torch.testing.assert_close(found[b, :, head], expected, rtol=1e-5, atol=1e-6)
    for tail in (1, 4):
        alone = attend(q[:, -tail:], k, v)
        torch.testing.assert_close(alone, found[:, -tail:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kv_heads", (1, 2, 4))
def test_exclude_self_equals_the_reference_head_by_head(kv_heads):
    out, v = torch.randn(2, 5, 4, 6), torch.randn(2, 5, kv_heads, 6)
    v[0, 2, 0] = 0  # no direction to exclude
    found = exclude_self(out, v)
    for head in range(4):
        for b in range(2):
            expected = plain.exclude_self(out[b, :, head], v[b, :, head // (4 // kv_heads)])
            torch.testing.assert_close(found[b, :, head], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[0, 2, 0], out[0, 2, 0])


@pytest.mark.parametrize("length, rope_dims", [(32, 0), (32, 8), (80, 8)])
def test_rotation_equals_the_reference(length, rope_dims):
    x = torch.randn(1, length, 1, 16)
    sizes = dict(rope_dims=rope_dims, rope_base=10_000.0, train_seq_len=32)
    tables = rotary_tables(length, rope_dims or 16, 10_000.0, 32, x)
    expected = plain.rotate(x[0, :, 0].double(), sizes)
    found = rotate(x, *tables)
    torch.testing.assert_close(found[0, :, 0].double(), expected, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1))


@given(st.floats(0.1, 50), st.floats(0, 1e4))
def test_softcap_bounds_logits(cap, scale):
    hidden, head = scale * torch.eye(3, 4), torch.eye(5, 4)
    logits = softcap_logits(hidden, head, cap)
    assert logits.abs().max() <= cap * (1 + 1e-6)
    torch.testing.assert_close(logits, cap * torch.tanh(hidden @ head.T / cap))


def test_cross_entropy_is_that_of_softcapped_logits():
    hidden, head, targets = torch.randn(6, 4), torch.randn(5, 4), torch.tensor([0, 4, 2, 2, 1, 3])
    odds = (2 * torch.tanh(hidden @ head.T / 2)).softmax(-1)
    losses = softcap_cross_entropy(hidden, head, targets, 2.0)
    torch.testing.assert_close(losses, -odds[torch.arange(6), targets].log())


# ---- what the other rooms rely on ----------------------------------------------------------


@variants
def test_the_inventory_is_the_model(changes):
    config = toy_config(**changes)
    found = [(name, entry.shape, entry.role) for name, entry in inventory(config).items()]
    assert found == [(name, tuple(p.shape), p.role)
                     for name, p in random_model(config).named_parameters()]


def test_the_record_has_66_matrices_of_six_bits():
    kinds = list(kinds_of(load_config({"PRESET": "pr1471"})).values())
    assert kinds.count("int6") == 66 and kinds.count("int8") == 2


def test_bf16_runs_without_autocast():
    config = toy_config(tied_embed_init_std=1.0)
    model = random_model(config, dtype=torch.bfloat16)
    tables = [model.tok_emb.weight, model.ve.table.weight]
    assert {p.dtype for p in tables} == {torch.bfloat16}
    narrow = {id(p) for p in tables}
    assert all(p.dtype == torch.float32 for p in model.parameters() if id(p) not in narrow)
    tokens, layout = random_tokens(config, 2, 8), layouts_of(config)[1]
    hidden, logits = model(asked(tokens), layout), model.logits(asked(tokens), layout)
    assert hidden.dtype == torch.bfloat16 and logits.dtype == torch.float32
    model.mean_loss(asked(tokens), layout).backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters())
    expected = reference_logits(config, model, tokens, 1)
    assert (logits - expected).square().mean() < 0.02 * expected.square().mean()
