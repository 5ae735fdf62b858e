"""Worked examples that hold the references of plain.py to published numbers and known laws."""

import math
from itertools import pairwise

import numpy as np
import plain
import pytest
import torch
from torch.nn import functional as F

A_SIZES = {
    "num_layers": 11,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 64,
    "rope_dims": 16,
    "rope_base": 10000.0,
    "train_seq_len": 2048,
    "ve_layers": (9, 10),
    "xsa_last_n": 11,
    "lane_start": 7,
    "logit_softcap": 30.0,
    "ln_scale": True,
    "skip_gates": True,
}
VOCAB, DIM, HIDDEN, VE_DIM = 23, 16, 24, 5
A_ACTIVE = [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
C_ACTIVE = [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9, 10]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def toy_sizes(**changes):
    return A_SIZES | {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "rope_dims": 2} | changes


def toy_params(sizes):
    shapes = plain.param_shapes(sizes, VOCAB, DIM, HIDDEN, VE_DIM)
    return {name: 0.4 * torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def toy_tokens(batch=2, length=7):
    return torch.randint(VOCAB, (batch, length))


def test_virtual_order_of_published_systems():
    assert plain.virtual_order(11, [3, 4, 5], active=False) == list(range(11))
    assert plain.virtual_order(11, [], active=True) == list(range(11))
    assert plain.virtual_order(11, [3, 4, 5], active=True) == A_ACTIVE
    assert plain.virtual_order(11, [4, 5], active=True) == C_ACTIVE


@pytest.mark.parametrize(
    "order, expected",
    [
        (list(range(11)), [(5, 4), (6, 3), (7, 2), (8, 1), (9, 0)]),
        (A_ACTIVE, [(7, 6), (8, 5), (9, 4), (10, 3), (11, 2)]),
        (C_ACTIVE, [(6, 5), (7, 4), (8, 3), (9, 2), (10, 1)]),
    ],
)
def test_skip_rows_of_published_systems(order, expected):
    rows = plain.skip_map(order, 11)
    assert rows == [(row, target, source) for row, (target, source) in enumerate(expected)]
    assert rows == plain.skip_map(order, 11, num_skip_rows=5)


def test_skip_rows_name_the_published_physical_layers():
    pairs = [(A_ACTIVE[t], A_ACTIVE[s]) for _, t, s in plain.skip_map(A_ACTIVE, 11)]
    assert pairs == [(4, 3), (5, 5), (6, 4), (7, 3), (8, 2)]
    pairs = [(C_ACTIVE[t], C_ACTIVE[s]) for _, t, s in plain.skip_map(C_ACTIVE, 11)]
    assert pairs == [(4, 5), (5, 4), (6, 3), (7, 2), (8, 1)]


@pytest.mark.parametrize("vocab_size, expected", [(8192, 37_022_812), (4096, 34_401_372)])
def test_published_parameter_counts(vocab_size, expected):
    shapes = plain.param_shapes(A_SIZES, vocab_size, 512, 2048, 128)
    assert sum(math.prod(shape) for shape in shapes.values()) == expected


def test_forward_is_causal():
    sizes = toy_sizes()
    params, tokens = toy_params(sizes), toy_tokens()
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % VOCAB
    before = plain.forward(params, tokens, A_ACTIVE, sizes)
    after = plain.forward(params, changed, A_ACTIVE, sizes)
    assert before.shape == (2, 7, VOCAB)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_float32_follows_float64():
    sizes = toy_sizes()
    params, tokens = toy_params(sizes), toy_tokens()
    single = {name: p.float() for name, p in params.items()}
    exact = plain.forward(params, tokens, A_ACTIVE, sizes)
    rounded = plain.forward(single, tokens, A_ACTIVE, sizes)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lane_start", [0, 7, 11])
@pytest.mark.parametrize("gates", [True, False])
def test_silent_branches_leave_only_the_embedding(lane_start, gates):
    """With zero output projections every block is the identity, as at the start of training."""
    sizes = toy_sizes(lane_start=lane_start, skip_gates=gates)
    params, tokens = toy_params(sizes), toy_tokens()
    for name in params:
        if name.endswith(("attn.out.weight", "mlp.down.weight")):
            params[name] = torch.zeros_like(params[name])
        if name.endswith("resid_mix"):
            params[name] = torch.tensor([[1.0], [0.0]], dtype=torch.float64).expand(2, DIM)
    params["skip_weights"] = torch.ones_like(params["skip_weights"])
    assert ("lane_merge" in params) == (lane_start == 7)
    embedding = plain.rms_norm(params["tok_emb.weight"][tokens])
    raw = plain.rms_norm(embedding) @ params["tok_emb.weight"].T
    logits = plain.forward(params, tokens, A_ACTIVE, sizes)
    torch.testing.assert_close(logits, 30 * torch.tanh(raw / 30), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "order, lost", [(list(range(11)), [3, 4]), (A_ACTIVE, [4]), (C_ACTIVE, [4])]
)
def test_dead_skip_rows_have_no_gradient_unless_lanes_take_them(order, lost):
    sizes = toy_sizes()
    params, tokens = toy_params(sizes), toy_tokens(1)
    weights = params["skip_weights"].requires_grad_()
    for skip_to_lanes in (False, True):
        weights.grad = None
        plain.loss(params, tokens, tokens.roll(-1, 1), order, sizes, skip_to_lanes).backward()
        dead = [row for row in range(5) if not weights.grad[row].any()]
        assert dead == ([] if skip_to_lanes else lost)


def test_skip_gate_opens_towards_the_stream():
    x, skip = torch.ones(3, 2), torch.full((3, 2), 5.0)
    params = {"skip_weights": torch.full((1, 2), 2.0), "skip_gates": torch.tensor([[50.0, -50.0]])}
    blended = plain.blend_skip(params, 0, x, skip, {"skip_gates": True})
    assert torch.equal(blended, torch.tensor([[1.0, 10.0]] * 3))
    assert torch.equal(plain.blend_skip(params, 0, x, skip, {"skip_gates": False}), x + 10)


@pytest.mark.parametrize("merge, silent", [(1.0, "mlp"), (0.0, "attn")])
def test_lanes_do_not_read_each_other(merge, silent):
    """Merging one lane only, the other branch of every layer in the lanes has no effect."""
    sizes = toy_sizes()
    params, tokens = toy_params(sizes), toy_tokens()
    params["lane_merge"] = torch.tensor(merge, dtype=torch.float64)
    before = plain.forward(params, tokens, A_ACTIVE, sizes)
    for layer in (6, 7, 8, 9, 10):
        name = f"blocks.{layer}.{silent}_scale"
        changed = params | {name: 2 * params[name]}
        after = plain.forward(changed, tokens, A_ACTIVE, sizes)
        assert torch.equal(before, after) == (layer >= 7)


def test_neighbouring_query_heads_share_a_kv_head():
    sizes = toy_sizes(xsa_last_n=0, ve_layers=())
    params, tokens, z = toy_params(sizes), toy_tokens(1)[0], torch.randn(7, DIM).double()
    params["blocks.0.attn.out.weight"] = torch.eye(DIM, dtype=torch.float64)
    params["blocks.0.attn.v.weight"][4:] = 0  # second kv head, so query heads 2 and 3
    output = plain.attention(params, 0, z, tokens, sizes)
    assert output[:, :8].all() and not output[:, 8:].any()


def test_loss_equals_cross_entropy():
    sizes = toy_sizes(ve_layers=(), xsa_last_n=0, ln_scale=False, rope_dims=0)
    params, tokens = toy_params(sizes), toy_tokens()
    targets = tokens.roll(-1, 1)
    logits = plain.forward(params, tokens, A_ACTIVE, sizes)
    expected = F.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1))
    got = plain.loss(params, tokens, targets, A_ACTIVE, sizes)
    torch.testing.assert_close(got, expected)


def test_attention_equals_torch():
    q, k, v = torch.randn(3, 9, 4, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
    torch.testing.assert_close(plain.causal_attention(q, k, v), expected)


def test_xsa_output_is_orthogonal_to_the_value():
    o, v = torch.randn(2, 9, 8, dtype=torch.float64)
    kept = plain.exclude_self(o, v)
    assert torch.sum(kept * v, dim=-1).abs().max() < 1e-12
    torch.testing.assert_close(plain.exclude_self(kept, v), kept)
    assert torch.equal(plain.exclude_self(o, torch.zeros_like(v)), o)


def test_rope_scores_depend_on_distance_only():
    sizes = {"rope_dims": 4, "rope_base": 10000.0, "train_seq_len": 64}
    q, k = torch.randn(2, 6, dtype=torch.float64)
    q_TK = plain.rotate(q.expand(10, 6), sizes)
    scores = q_TK @ plain.rotate(k.expand(10, 6), sizes).T
    torch.testing.assert_close(scores[3:, 3:], scores[:-3, :-3])
    assert torch.equal(q_TK[:, 4:], q.expand(10, 6)[:, 4:])
    turned = plain.rotate(torch.tensor([[1.0, 0.0]] * 2), sizes | {"rope_dims": 2})
    torch.testing.assert_close(turned[1], torch.tensor([math.cos(1), -math.sin(1)]))


def test_rope_base_grows_only_beyond_the_training_length():
    assert plain.rope_base_at(2048, 16, 10000.0, 2048) == 10000.0
    assert plain.rope_base_at(2048, 16, 10000.0, 1024) == pytest.approx(22081.8, abs=0.05)


def test_newton_schulz_flattens_the_spectrum():
    for shape in ((12, 30), (30, 12)):
        g = torch.randn(shape)
        for dtype in (torch.float64, torch.bfloat16):
            x = plain.newton_schulz(g, dtype=dtype)
            assert x.dtype == dtype and x.shape == shape
            singular = torch.linalg.svdvals(x.double())
            assert singular.min() > 0.6 and singular.max() < 1.3


def test_muon_ignores_gradient_scale_and_decays_apart():
    w, g = torch.randn(2, 8, 4, dtype=torch.float64)
    zero = torch.zeros_like(w)

    def step(grad, decay):
        return plain.muon_step(w, grad, zero, 0.1, 0.9, decay, 5, torch.float64)

    small, buffer = step(g, 0.0)
    torch.testing.assert_close(buffer, g)
    torch.testing.assert_close(step(100 * g, 0.0)[0], small)
    torch.testing.assert_close(small - step(g, 0.5)[0], 0.05 * w)
    assert torch.linalg.matrix_norm(w - small, 2) < 0.1 * math.sqrt(2) * 1.3


def test_adamw_and_clip_equal_torch():
    param = torch.randn(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([param], lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    ours, m, v = param.detach().clone(), torch.zeros(6), torch.zeros(6)
    for step in range(1, 5):
        grad = torch.randn(6, dtype=torch.float64)
        param.grad = grad.clone()
        torch.nn.utils.clip_grad_norm_([param], 0.3)
        optimizer.step()
        (clipped,), norm = plain.clip([grad], 0.3)
        assert norm == pytest.approx(float(grad.norm()))
        ours, m, v = plain.adamw_step(ours, clipped, m, v, step, 0.02, weight_decay=0.1)
    torch.testing.assert_close(ours, param.detach())
    assert torch.equal(plain.clip([grad], 0)[0][0], grad)


def test_schedules_at_published_points():
    assert plain.lr_multiplier(204.6 / 590, 0.72, 0.0) == pytest.approx(0.907, abs=5e-4)
    assert plain.lr_multiplier(165.1 / 590, 0.72, 0.0) == 1.0
    assert plain.lr_multiplier(0.999, 0.72, 0.1) == 0.1
    assert plain.lr_multiplier(1.0, 0.0, 0.0) == 1.0
    assert plain.muon_momentum(0) == 0.92
    assert plain.muon_momentum(750) == pytest.approx(0.955)
    assert plain.muon_momentum(1500) == plain.muon_momentum(9000) == 0.99
    assert plain.muon_momentum(0, warmup_steps=0) == 0.99
    assert plain.ema_step(1.0, 2.0, 0.75) == 1.25


def test_row_scale_is_deviation_or_floor():
    w = torch.randn(6, 400, dtype=torch.float64)
    w = w / w.std(dim=1, keepdim=True)
    step = plain.row_scale(0.1 * w)
    torch.testing.assert_close(step, torch.full_like(step, 0.1 * 12.85 / 31), rtol=1e-3, atol=0)
    assert torch.equal(step, step.half().double())
    assert torch.equal(plain.row_scale(0.07 * w), torch.full_like(step, 1 / 31).half().double())


def hessian_of(samples, columns):
    mix = torch.randn(columns, columns, dtype=torch.float64)
    x = torch.randn(samples, columns, dtype=torch.float64) @ mix
    return x.T @ x / samples


def test_gptq_with_identity_hessian_is_rounding():
    w = 0.3 * torch.randn(5, 16, dtype=torch.float64)
    step = plain.row_scale(w)
    codes = plain.gptq_columns(w, torch.eye(16, dtype=torch.float64), step)
    assert torch.equal(codes, torch.round(w / step[:, None]).clamp(-31, 31).to(torch.int8))


def test_gptq_lowers_the_weighted_error():
    w, hessian = 0.1 * torch.randn(12, 24, dtype=torch.float64), hessian_of(200, 24)
    step = plain.row_scale(w)
    rounded = torch.round(w / step[:, None]).clamp(-31, 31) * step[:, None]
    solved = plain.gptq_columns(w, hessian, step) * step[:, None]
    ours = plain.weighted_error(w, solved, hessian)
    assert ours < 0.7 * plain.weighted_error(w, rounded, hessian)
    assert plain.weighted_error(w, solved, torch.eye(24)) == pytest.approx(
        float(torch.sum((solved - w) ** 2))
    )


def test_gptq_ignores_dead_columns_and_column_order():
    w, hessian = 0.1 * torch.randn(6, 10, dtype=torch.float64), hessian_of(50, 10)
    hessian[3], hessian[:, 3] = 0, 0
    step, shuffle = plain.row_scale(w), torch.randperm(10)
    codes = plain.gptq_columns(w, hessian, step)
    assert not codes[:, 3].any()
    moved = plain.gptq_columns(w[:, shuffle], hessian[shuffle][:, shuffle], step)
    assert torch.equal(moved, codes[:, shuffle])


def test_embedding_rounding_clips_and_stores_half_steps():
    w = 0.1 * torch.randn(4, 300)
    codes, step = plain.round_to_nearest_int8(w, k=20.0)
    assert codes.dtype == torch.int8 and step.dtype == torch.float16
    assert (codes * step.float()[:, None] - w).abs().max() < 0.51 * step.float().max() + 1e-3
    clipped, _ = plain.round_to_nearest_int8(w, k=2.0, floor=1e-4)
    assert clipped.max() == 127 and clipped.min() == -127


def test_windows_score_each_position_once():
    for num_targets in range(1, 70):
        for seq_len, stride in ((16, 4), (16, 16), (8, 3), (5, 1)):
            windows = plain.sliding_windows(num_targets, seq_len, stride)
            assert plain.count_scored(windows, num_targets) == [1] * num_targets


def test_window_rule_by_hand():
    windows = plain.sliding_windows(11, 8, 2)
    assert windows == [(0, [0, 1, 2, 3, 4, 5, 6, 7]), (2, [8, 9]), (4, [10])]


@pytest.mark.parametrize(
    "num_targets, expected",
    [(40_540_160, 633_409), (45_508_608, 711_041), (45_516_800, 711_169)],
)
def test_published_window_counts(num_targets, expected):
    assert len(plain.window_starts(num_targets, 2048, 64)) == expected


def test_bytes_of_a_short_stream():
    pieces = [("<unk>", "unknown"), ("<s>", "control"), ("<0xE2>", "byte"), ("\u2581", "normal")]
    pieces += [("\u2581caf\u00e9", "normal"), ("s", "normal")]
    table = plain.byte_table(pieces, vocab_size=8)
    assert table["bytes"].tolist() == [0, 0, 1, 0, 5, 1, 0, 0]
    stream = [1, 4, 5, 4, 3, 2, 1, 7, 4]
    costs = [plain.byte_cost(u, t, table) for u, t in pairwise(stream)]
    assert costs == [5, 1, 6, 1, 1, 0, 0, 5]


def test_entropy_of_simple_sources():
    assert plain.order0_bits(np.zeros(9, dtype=np.int8)) == 0
    assert plain.order0_bits([0, 1, 2, 3]) == pytest.approx(2.0)
    assert plain.order0_bits([[0, 0], [0, 1]]) == pytest.approx(0.8112781)
