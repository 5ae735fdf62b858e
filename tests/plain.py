"""Slow, obvious references for the system of PR #1471, one sequence and one matrix at a time.

Nothing here is meant to be fast or to be imported by the training script: tests compare the
script with these functions. Arithmetic follows the dtype of the arguments, so every comparison
can be made in float64, where a real difference and a rounding difference look different.

Dimension key: B batch, T time, D model, H query heads, G KV heads, K head width, V vocab,
R x C weight rows x columns.
"""

import math

import numpy as np
import torch

RMS_EPS = 1.1920929e-7  # float32 machine epsilon; torch would pick another one for float64
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


# ---- 1. Layout ----------------------------------------------------------------------------


def virtual_order(num_layers, recur_layers, active):
    """Return the physical layer run at each virtual position, as a list of ints.

    When active, the whole of recur_layers (contiguous, ascending) is run once more after its
    last element. Source: PR #1445.
    """
    order = []
    for layer in range(num_layers):
        order.append(layer)
        if active and len(recur_layers) > 0 and layer == recur_layers[-1]:
            order.extend(recur_layers)
    return order


def skip_map(order, num_layers, num_skip_rows=None):
    """Return [(skip row, target virtual index, source virtual index)], in the order used.

    The first half of the order (rounded down) pushes its outputs on a stack; decoder step j pops
    one while rows last. Rows whose update is lost in the lanes are listed too.
    num_skip_rows: None means what physical depth gives, min(encoder, decoder). Source: PR #1471.
    """
    if num_skip_rows is None:
        num_skip_rows = min(num_layers // 2, num_layers - num_layers // 2)
    encoder_len = len(order) // 2
    stack = list(range(encoder_len))
    rows = []
    for row, target in enumerate(range(encoder_len, len(order))):
        if len(stack) > 0 and row < num_skip_rows:
            rows.append((row, target, stack.pop()))
    return rows


# ---- 1b. Packed rows ----------------------------------------------------------------------


def segment_starts(tokens, longest, bos_id=1):
    """Return where the segments of a packed row begin, a list of ints.

    tokens: ids, a list. A segment begins at 0, at every BOS, and where one has `longest` tokens.
    Source: PR #1530.
    """
    starts = []
    for t, token in enumerate(tokens):
        if t == 0 or token == bos_id or t - starts[-1] == longest:
            starts.append(t)
    return starts


def segments_of(tokens_T, sizes):
    """Return (number of its segment, place within it) of each position, both (T,).

    Without sizes["longest"] the row is one segment.
    """
    starts = [0]
    if "longest" in sizes:
        starts = segment_starts(tokens_T.tolist(), sizes["longest"])
    numbers, places = [], []
    for t in range(len(tokens_T)):
        before = [start for start in starts if start <= t]
        numbers.append(len(before) - 1)
        places.append(t - before[-1])
    return torch.tensor(numbers), torch.tensor(places)


# ---- 2. Forward pass ----------------------------------------------------------------------


def param_shapes(sizes, vocab_size, model_dim, hidden_dim, ve_dim):
    """Return {parameter name: shape} of everything forward() reads. Source: PR #1471."""
    num_layers, D = sizes["num_layers"], model_dim
    q_dim = sizes["num_heads"] * sizes["head_dim"]
    kv_dim = sizes["num_kv_heads"] * sizes["head_dim"]
    shapes = {"tok_emb.weight": (vocab_size, D)}
    if len(sizes["ve_layers"]) > 0:
        shapes["ve.table.weight"] = (vocab_size, ve_dim)
        if ve_dim != kv_dim:
            shapes["ve.proj.weight"] = (kv_dim, ve_dim)
        shapes["ve.scale"] = ()
        shapes["ve.layer_scales"] = (len(sizes["ve_layers"]),)
    for i in range(num_layers):
        shapes[f"blocks.{i}.attn.q.weight"] = (q_dim, D)
        shapes[f"blocks.{i}.attn.k.weight"] = (kv_dim, D)
        shapes[f"blocks.{i}.attn.v.weight"] = (kv_dim, D)
        shapes[f"blocks.{i}.attn.out.weight"] = (D, q_dim)
        shapes[f"blocks.{i}.attn.q_gain"] = (sizes["num_heads"],)
        shapes[f"blocks.{i}.mlp.up.weight"] = (hidden_dim, D)
        shapes[f"blocks.{i}.mlp.down.weight"] = (D, hidden_dim)
        shapes[f"blocks.{i}.attn_scale"] = (D,)
        shapes[f"blocks.{i}.mlp_scale"] = (D,)
        shapes[f"blocks.{i}.resid_mix"] = (2, D)
        if sizes.get("gate_scale") is not None:
            shapes[f"blocks.{i}.attn.gate"] = (sizes["num_heads"], sizes["gate_window"])
    if sizes.get("smear"):
        shapes["smear.weight"], shapes["smear.scale"] = (sizes["gate_window"],), ()
    skip_rows = sizes.get("skip_rows", min(num_layers // 2, num_layers - num_layers // 2))
    shapes["skip_weights"] = (skip_rows, D)
    if sizes["skip_gates"]:
        shapes["skip_gates"] = (skip_rows, D)
    if 0 < sizes["lane_start"] < num_layers:
        if sizes.get("routed"):
            shapes["lane_keep"], shapes["lane_route"] = (num_layers, 2), (num_layers, 2, 2)
        else:
            shapes["lane_merge"] = ()
    return shapes


def rms_norm(x, eps=RMS_EPS):
    """Return x / sqrt(mean of squares over the last dimension + eps), no gain."""
    return x / torch.sqrt(torch.mean(x * x, dim=-1, keepdim=True) + eps)


def rope_base_at(length, rope_dims, rope_base, train_seq_len):
    """Return the rotary base, a float: raised ("NTK") beyond the training length. PR #60."""
    if length <= train_seq_len:
        return float(rope_base)
    return rope_base * (length / train_seq_len) ** (rope_dims / (rope_dims - 2))


def rotate(x_TK, sizes, place_T=None):
    """Return x with rotary positions on its first rope_dims columns (0: all), half-split pairs.

    Tables are computed in the dtype of x. Sign as in PR #1471: a cos + b sin, -a sin + b cos.
    place_T: the positions, 0, 1, ... by default.
    """
    T, K = x_TK.shape
    rope_dims = sizes["rope_dims"] if sizes["rope_dims"] > 0 else K
    half = rope_dims // 2
    length = sizes.get("longest", T)
    base = rope_base_at(length, rope_dims, sizes["rope_base"], sizes["train_seq_len"])
    position_T = torch.arange(T, device=x_TK.device) if place_T is None else place_T
    position_T = position_T.to(x_TK.dtype)
    first, second = [], []
    for i in range(half):
        angle_T = position_T * base ** (-2.0 * i / rope_dims)
        cos_T, sin_T = torch.cos(angle_T), torch.sin(angle_T)
        a_T, b_T = x_TK[:, i], x_TK[:, i + half]
        first.append(a_T * cos_T + b_T * sin_T)
        second.append(-a_T * sin_T + b_T * cos_T)
    rotated = torch.stack(first + second, dim=1)
    return torch.cat([rotated, x_TK[:, rope_dims:]], dim=1)


def causal_attention(q_TK, k_TK, v_TK, segment_T=None):
    """Return softmax(q k' / sqrt(K), masked to s <= t) v for one head, (T, K).

    segment_T: a number for each position; those of another number are masked too.
    """
    T, K = q_TK.shape
    scores_TS = (q_TK @ k_TK.T) / math.sqrt(K)
    hidden_TS = torch.ones(T, T, dtype=torch.bool, device=q_TK.device).triu(1)
    if segment_T is not None:
        hidden_TS = hidden_TS | (segment_T[:, None] != segment_T)
    return torch.softmax(scores_TS.masked_fill(hidden_TS, -math.inf), dim=-1) @ v_TK


def exclude_self(o_TK, v_TK):
    """Return o without its component along v of the same position ("XSA"). Source: PR #1471."""
    unit_TK = v_TK / torch.clamp(torch.linalg.vector_norm(v_TK, dim=-1, keepdim=True), min=1e-12)
    return o_TK - torch.sum(o_TK * unit_TK, dim=-1, keepdim=True) * unit_TK


def value_embedding(params, tokens_T):
    """Return the shared value embedding (T, G*K), before the layer scale. Source: PR #414."""
    w = params["ve.table.weight"][tokens_T]
    if "ve.proj.weight" in params:
        w = w @ params["ve.proj.weight"].T
    return params["ve.scale"] * w


def attention(params, layer, z_TD, tokens_T, sizes):
    """Return the attention branch of one layer, (T, D), head by head. Source: PR #1471."""
    prefix, K = f"blocks.{layer}.attn.", sizes["head_dim"]
    heads_per_group = sizes["num_heads"] // sizes["num_kv_heads"]
    q = z_TD @ params[prefix + "q.weight"].T
    k = z_TD @ params[prefix + "k.weight"].T
    v = z_TD @ params[prefix + "v.weight"].T
    if layer in sizes["ve_layers"]:
        layer_scale = params["ve.layer_scales"][list(sizes["ve_layers"]).index(layer)]
        v = v + layer_scale * value_embedding(params, tokens_T)
    segment_T, place_T = segments_of(tokens_T, sizes)
    outputs = []
    for head in range(sizes["num_heads"]):
        group = head // heads_per_group
        q_TK = rotate(rms_norm(q[:, head * K : (head + 1) * K]), sizes, place_T)
        k_TK = rotate(rms_norm(k[:, group * K : (group + 1) * K]), sizes, place_T)
        v_TK = v[:, group * K : (group + 1) * K]
        q_TK = q_TK * params[prefix + "q_gain"][head]
        o_TK = causal_attention(q_TK, k_TK, v_TK, segment_T)
        if layer >= sizes["num_layers"] - sizes["xsa_last_n"]:
            o_TK = exclude_self(o_TK, v_TK)
        if prefix + "gate" in params:  # each head's output by a sigmoid of the first inputs
            row = params[prefix + "gate"][head]
            argument_T = sizes["gate_scale"] * torch.sum(z_TD[:, : len(row)] * row, dim=1)
            o_TK = o_TK / (1 + torch.exp(-argument_T))[:, None]
        outputs.append(o_TK)
    out_TD = torch.cat(outputs, dim=1) @ params[prefix + "out.weight"].T
    return out_TD + z_TD @ params["bypass.o"].T if "bypass.o" in params else out_TD


def mlp(params, layer, z_TD):
    """Return the MLP branch of one layer, (T, D): leaky ReLU of slope 0.5, squared. PR #549."""
    h = z_TD @ params[f"blocks.{layer}.mlp.up.weight"].T
    h = torch.clamp(h, min=0) + 0.5 * torch.clamp(h, max=0)
    out_TD = (h * h) @ params[f"blocks.{layer}.mlp.down.weight"].T
    return out_TD + z_TD @ params["bypass.mlp"].T if "bypass.mlp" in params else out_TD


def normed(x_TD, layer, sizes):
    """Return RMSnorm(x), times 1/sqrt(physical layer + 1) when ln_scale. Source: PR #315."""
    return rms_norm(x_TD) * (1.0 / math.sqrt(layer + 1) if sizes["ln_scale"] else 1.0)


def attention_half(params, layer, x_TD, x0_TD, tokens_T, sizes):
    """Return the stream after the residual mix and the attention branch, (T, D)."""
    mix = params[f"blocks.{layer}.resid_mix"]
    u_TD = mix[0] * x_TD + mix[1] * x0_TD
    branch = attention(params, layer, normed(u_TD, layer, sizes), tokens_T, sizes)
    return u_TD + params[f"blocks.{layer}.attn_scale"] * branch


def mlp_half(params, layer, x_TD, sizes):
    """Return the stream after the MLP branch, (T, D)."""
    return x_TD + params[f"blocks.{layer}.mlp_scale"] * mlp(
        params, layer, normed(x_TD, layer, sizes)
    )


def blend_skip(params, row, x_TD, skip_TD, sizes):
    """Return x joined with a popped encoder output: gated lerp, or plain sum without gates."""
    skip_TD = params["skip_weights"][row] * skip_TD
    if not sizes["skip_gates"]:
        return x_TD + skip_TD
    gate_D = torch.sigmoid(params["skip_gates"][row])
    return gate_D * x_TD + (1 - gate_D) * skip_TD


def smear(params, e_TD, tokens_T, starts=(), bos_id=1):
    """Return embeddings with a gated share of the one before added, none at a document's start.

    starts: of segments, which take in nothing either.

    Source: PR #1667, masked as in PR #1855.
    """
    weight, rows = params["smear.weight"], [e_TD[0]]
    for t in range(1, len(e_TD)):
        argument = torch.sum(weight * e_TD[t, : len(weight)])
        gate = params["smear.scale"] / (1 + torch.exp(-argument))
        closed = tokens_T[t] == bos_id or t in starts
        rows.append(e_TD[t] if closed else e_TD[t] + gate * e_TD[t - 1])
    return torch.stack(rows)


def at_step(params, layer, at):
    """Return params as one virtual step has them, where any "adapted.{step}.{place}" are given.

    Those are dense matrices: of q, k and v added to the layer's own, of o and mlp beside the half.
    """
    merged = dict(params)
    for place in ("q", "k", "v"):
        if f"adapted.{at}.{place}" in params:
            name = f"blocks.{layer}.attn.{place}.weight"
            merged[name] = params[name] + params[f"adapted.{at}.{place}"]
    for place in ("o", "mlp"):
        if f"adapted.{at}.{place}" in params:
            merged[f"bypass.{place}"] = params[f"adapted.{at}.{place}"]
    return merged


def encode(params, tokens_T, order, sizes):
    """Run the embedding and the first half of the order.

    Returns the stream (T, D), the normalised embedding (T, D) and the stack of outputs.
    """
    e_TD = params["tok_emb.weight"][tokens_T]
    if "smear.weight" in params:
        longest = sizes.get("longest")
        starts = segment_starts([int(t) for t in tokens_T], longest) if longest else ()
        e_TD = smear(params, e_TD, tokens_T, starts)
    x0_TD = rms_norm(e_TD)
    x_TD, stack = x0_TD, []
    for at, layer in enumerate(order[: len(order) // 2]):
        here = at_step(params, layer, at)
        x_TD = attention_half(here, layer, x_TD, x0_TD, tokens_T, sizes)
        x_TD = mlp_half(here, layer, x_TD, sizes)
        stack.append(x_TD)
    return x_TD, x0_TD, stack


def routed(params, layer, first_TD, second_TD, x0_TD, tokens_T, sizes):
    """Return both lanes after a layer whose halves feed either of them. Source: PR #1529."""
    mix, prefix = params[f"blocks.{layer}.resid_mix"], f"blocks.{layer}."
    u_TD = mix[0] * first_TD + mix[1] * x0_TD
    a_TD = attention(params, layer, normed(u_TD, layer, sizes), tokens_T, sizes)
    f_TD = mlp(params, layer, normed(second_TD, layer, sizes))
    a_TD, f_TD = params[prefix + "attn_scale"] * a_TD, params[prefix + "mlp_scale"] * f_TD
    keep, route = params["lane_keep"][layer], params["lane_route"][layer]
    return (keep[0] * first_TD + route[0, 0] * a_TD + route[0, 1] * f_TD,
            keep[1] * second_TD + route[1, 0] * a_TD + route[1, 1] * f_TD)


def decode(params, tokens_T, order, sizes, skip_to_lanes, encoded):
    """Run the second half of the order, with lanes; return the stream (T, D), lanes merged."""
    x_TD, x0_TD, stack = encoded
    lanes_on = 0 < sizes["lane_start"] < sizes["num_layers"]
    attn_lane, mlp_lane, split = None, None, False
    for row, layer in enumerate(order[len(order) // 2 :]):
        here = at_step(params, layer, len(order) // 2 + row)
        if len(stack) > 0 and row < len(params["skip_weights"]):
            skip_TD = stack.pop()
            if not split:
                x_TD = blend_skip(params, row, x_TD, skip_TD, sizes)
            elif skip_to_lanes:
                attn_lane = blend_skip(params, row, attn_lane, skip_TD, sizes)
        if lanes_on and layer >= sizes["lane_start"] and not split:
            attn_lane, mlp_lane, split = x_TD, x_TD, True
        if split and "lane_keep" in params:
            attn_lane, mlp_lane = routed(here, layer, attn_lane, mlp_lane, x0_TD, tokens_T, sizes)
        elif split:
            attn_lane = attention_half(here, layer, attn_lane, x0_TD, tokens_T, sizes)
            mlp_lane = mlp_half(here, layer, mlp_lane, sizes)
        else:
            x_TD = attention_half(here, layer, x_TD, x0_TD, tokens_T, sizes)
            x_TD = mlp_half(here, layer, x_TD, sizes)
    if split and "lane_keep" in params:
        x_TD = (attn_lane + mlp_lane) / 2
    elif split:
        merge = params["lane_merge"]
        x_TD = merge * attn_lane + (1 - merge) * mlp_lane
    return x_TD


def forward(params, tokens_BT, order, sizes, skip_to_lanes=True):
    """Return logits (B, T, V) after the softcap, one sequence at a time.

    params: {name: tensor}, names and shapes as param_shapes() lists them, all of one dtype.
    order: physical layer per virtual position (virtual_order).
    sizes: dict of num_layers, num_heads, num_kv_heads, head_dim, rope_dims (0: all), rope_base,
        train_seq_len, ve_layers, xsa_last_n, lane_start (0 or >= num_layers: no lanes),
        logit_softcap, ln_scale, skip_gates; longest, of packed rows: tokens of a segment at most.
    skip_to_lanes: skip rows that arrive after the split join the attention lane (PR #1395);
        False loses them (PR #1471).
    """
    logits = []
    for tokens_T in tokens_BT:
        encoded = encode(params, tokens_T, order, sizes)
        x_TD = decode(params, tokens_T, order, sizes, skip_to_lanes, encoded)
        head_VD = params["tok_emb.weight"] + params.get("adapted.head", 0)
        raw_TV = rms_norm(x_TD) @ head_VD.T
        logits.append(sizes["logit_softcap"] * torch.tanh(raw_TV / sizes["logit_softcap"]))
    return torch.stack(logits)


def loss(params, tokens_BT, targets_BT, order, sizes, skip_to_lanes=True):
    """Return the mean negative log-likelihood per target, in nats, a scalar tensor."""
    return torch.mean(losses(params, tokens_BT, targets_BT, order, sizes, skip_to_lanes))


def losses(params, tokens_BT, targets_BT, order, sizes, skip_to_lanes=True):
    """Return the negative log-likelihood of each target, in nats, (B, T)."""
    logits_BTV = forward(params, tokens_BT, order, sizes, skip_to_lanes)
    log_norm_BT = torch.logsumexp(logits_BTV, dim=-1)
    target_logit_BT = torch.gather(logits_BTV, 2, targets_BT[..., None])[..., 0]
    return log_norm_BT - target_logit_BT


# ---- 3. Optimizer -------------------------------------------------------------------------


def newton_schulz(g_RC, steps=5, dtype=torch.bfloat16):
    """Return g with its singular values pushed towards 1, (R, C) in dtype.

    In bfloat16 the order of operations matters: 2.0315 P is rounded before it meets P.
    Source: Muon, as in PR #1471.
    """
    a, b, c = NS_COEFFICIENTS
    x = g_RC.to(dtype)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / (torch.linalg.vector_norm(x) + 1e-7)
    for _ in range(steps):
        p = x @ x.T
        x = a * x + (b * p + (c * p) @ p) @ x
    return x.T if tall else x


def muon_step(
    weight_RC, grad_RC, buffer_RC, lr, momentum, weight_decay, steps=5, dtype=torch.bfloat16
):
    """Return (new weight, new momentum buffer) of one matrix; the arguments stay untouched.

    Nesterov direction, rows normalised ("MuonEq-R"), orthogonalised in dtype, decay decoupled.
    Source: PR #1471.
    """
    rows, columns = weight_RC.shape
    buffer_RC = momentum * buffer_RC + grad_RC
    direction = grad_RC + momentum * buffer_RC
    norm_R = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
    direction = direction / torch.clamp(norm_R, min=1e-7)
    update = newton_schulz(direction, steps, dtype) * math.sqrt(max(1.0, rows / columns))
    weight_RC = (1 - lr * weight_decay) * weight_RC - lr * update.to(weight_RC.dtype)
    return weight_RC, buffer_RC


def adamw_step(
    param, grad, exp_avg, exp_avg_sq, step, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
):
    """Return (param, first moment, second moment) after AdamW step number `step`, from 1."""
    beta1, beta2 = betas
    param = (1 - lr * weight_decay) * param
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    mean = exp_avg / (1 - beta1**step)
    variance = exp_avg_sq / (1 - beta2**step)
    return param - lr * mean / (torch.sqrt(variance) + eps), exp_avg, exp_avg_sq


def clip(grads, max_norm):
    """Return (list of scaled gradients, global L2 norm before scaling); max_norm 0: off."""
    total = math.sqrt(sum(float(torch.sum(g.double() ** 2)) for g in grads))
    factor = min(1.0, max_norm / (total + 1e-6)) if max_norm > 0 else 1.0
    return [g * factor for g in grads], total


def ema_step(shadow, weight, decay):
    """Return the moving average after one step, no bias correction."""
    return decay * shadow + (1 - decay) * weight


# ---- 4. Schedules -------------------------------------------------------------------------


def lr_multiplier(progress, warmdown_frac, min_lr=0.0):
    """Return the learning-rate multiplier: 1, then linear to 0 over the last warmdown_frac.

    progress: elapsed share of the budget, 0..1; min_lr: floor, reached only inside the warmdown.
    warmdown_frac 0: always 1. Source: PR #1471.
    """
    if warmdown_frac <= 0 or progress < 1 - warmdown_frac:
        return 1.0
    return max((1 - progress) / warmdown_frac, min_lr)


def muon_momentum(step, warmup_steps=1500, start=0.92, final=0.99):
    """Return Muon's momentum at 0-based step: linear, start to final; warmup_steps 0: final."""
    share = min(step / warmup_steps, 1.0) if warmup_steps > 0 else 1.0
    return (1 - share) * start + share * final


# ---- 5. Quantisation ----------------------------------------------------------------------


def row_scale(w_RC, k=12.85, max_code=31, floor=1 / 31):
    """Return quantization steps (R,), in the dtype of w, holding values float16 can hold.

    k: clip radius in unbiased row standard deviations; floor: least step, weight units.
    Source: PR #1471.
    """
    steps = []
    for row in w_RC:
        radius = torch.clamp(k * torch.std(row, unbiased=True), min=1e-6)
        steps.append(torch.clamp(radius / max_code, min=floor))
    return torch.stack(steps).to(torch.float16).to(w_RC.dtype)


def round_to_codes(x_R, max_code=31):
    """Return (codes, levels), one rounding at a time: levels are the codes."""
    code_R = torch.clamp(torch.round(x_R), -max_code, max_code)
    return code_R, code_R


# The registers (r1, r2, r3) of Ungerboeck's 8-state code with parity checks 13 and 04 (octal); r1
# says whether levels lie between the whole numbers, the parity of a code enters the second.
def trellis_step(registers, code):
    r1, r2, r3 = registers
    return r1 ^ r2, (code % 2) ^ r3, r1


def trellis_levels(code_R):
    """Return the levels that a column of codes stands for, a list of floats."""
    levels, registers = [], (0, 0, 0)
    for code in code_R:
        levels.append(code - 0.5 * registers[0])
        registers = trellis_step(registers, code)
    return levels


def trellis_ways(x_R, registers, cost=0.0):
    """Return end state -> (cost, codes, levels) of the least squared error from a start state.

    Each code is one of the two nearest of its parity, so no better one is left out.
    """
    ways = {registers: (cost, [], [])}
    for x in x_R.tolist():
        better = {}
        for registers, (cost, before, values) in ways.items():
            least = math.floor(x + 0.5 * registers[0]) - 1
            for code in range(least, least + 4):
                level = code - 0.5 * registers[0]
                way = (cost + (level - x) ** 2, [*before, code], [*values, level])
                following = trellis_step(registers, code)
                if following not in better or way[0] < better[following][0]:
                    better[following] = way
        ways = better
    return ways


def best_way(ways):
    """Return the (codes, levels) of the least cost, float64."""
    _, *found = min(ways.values(), key=lambda way: way[0])
    return tuple(torch.tensor(values, dtype=torch.float64) for values in found)


def trellis_column(x_R, answers=None, span=48):
    """Return (codes, levels) of one path, three rows at a time.

    A span of rows is decided once the one below is coded: it is the best path's there.
    answers: of `row_answers`; as every state's path leaves other errors, it aims at other things.
    """
    ways = {(0, 0, 0): (0.0, [], [])}
    for start in range(0, len(x_R), 3):
        better = {}
        for registers, (cost, codes, levels) in ways.items():
            aims = x_R[start:start + 3]
            if answers is not None:
                errors_above = torch.tensor(levels, dtype=x_R.dtype) - x_R[:start]
                aims = aims - answers[start // 3] @ errors_above
            for following, way in trellis_ways(aims, registers, cost).items():
                if following not in better or way[0] < better[following][0]:
                    better[following] = (way[0], codes + way[1], levels + way[2])
        ways, end = better, start + 3
        if end % span == 0:
            decided = min(ways.values(), key=lambda way: way[0])[1][:end - span]
            ways = {state: way for state, way in ways.items() if way[1][:end - span] == decided}
    return best_way(ways)


def row_answers(outputs_RR):
    """Return what three rows take off their aims, times the errors above, for each three.

    outputs_RR: damped, in steps. Given the errors above, the rows from there on aim at what makes
    errorsT outputs errors least.
    """
    return [torch.linalg.solve(outputs_RR[start:, start:], outputs_RR[start:, :start])[:3]
            for start in range(0, len(outputs_RR), 3)]


def damped(hessian_CC, damp=0.01):
    """Return the Hessian with a share of its mean diagonal added to the diagonal."""
    mean = torch.mean(torch.diagonal(hessian_CC))
    return hessian_CC + damp * mean * torch.eye(len(hessian_CC), dtype=hessian_CC.dtype)


def gptq_columns(w_RC, hessian_CC, step_R, max_code=31, damp=0.01, trellis=False, outputs_RR=None):
    """Return int8 codes (R, C) by GPTQ, one column at a time, no blocks.

    Columns are visited by descending Hessian diagonal (stable); the error of each is spread over
    the ones still to come. Columns whose diagonal is zero are dead: their codes are 0.
    damp: share of the mean diagonal (dead ones counted as 1) added to the diagonal.
    trellis: codes of dependent quantisation; with outputs_RR, mean g gT of the outputs' gradients,
    rows answer the errors of rows above.
    Raises torch.linalg.LinAlgError when the damped Hessian is not positive definite.
    Source: GPTQ (arXiv 2210.17323), as in PR #1471.
    """
    w, hessian = w_RC.clone(), hessian_CC.clone()
    columns = w.shape[1]
    for c in range(columns):
        if hessian_CC[c, c] == 0:
            hessian[c, c] = 1
            w[:, c] = 0
    hessian = damped(hessian, damp)
    visit = torch.argsort(torch.diagonal(hessian), descending=True, stable=True)
    w, hessian = w[:, visit], hessian[visit][:, visit]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    codes_RC = torch.zeros(w.shape, dtype=torch.int8, device=w.device)
    answers = None if outputs_RR is None else row_answers(
        step_R[:, None] * damped(outputs_RR, damp) * step_R)
    for j in range(columns):
        x_R = w[:, j] / step_R
        if trellis:
            code_R, level_R = trellis_column(x_R, answers)
        else:
            code_R, level_R = round_to_codes(x_R, max_code)
        error_R = (w[:, j] - level_R * step_R) / upper[j, j]
        for later in range(j + 1, columns):
            w[:, later] = w[:, later] - error_R * upper[j, later]
        codes_RC[:, visit[j]] = code_R.to(torch.int8)
    return codes_RC


def round_to_nearest_int8(w_RC, k=20.0, floor=1 / 127):
    """Return (codes int8 (R, C), stored steps float16 (R,)), for the embedding tables.

    Codes come from the float32 step, only the stored step is float16. Source: PR #1471.
    """
    w_RC = w_RC.to(torch.float32)
    codes, steps = [], []
    for row in w_RC:
        radius = torch.clamp(k * torch.std(row, unbiased=True), min=1e-6)
        step = torch.clamp(radius / 127, min=floor)
        clipped = torch.maximum(torch.minimum(row, radius), -radius)
        codes.append(torch.clamp(torch.round(clipped / step), -127, 127).to(torch.int8))
        steps.append(step.to(torch.float16))
    return torch.stack(codes), torch.stack(steps)


def weighted_error(w_RC, dequantized_RC, hessian_CC):
    """Return the sum over rows of d H d' with d the rounding error, a float."""
    total = 0.0
    for d_C in (dequantized_RC - w_RC).double():
        total += float(d_C @ hessian_CC.double() @ d_C)
    return total


def order0_bits(codes):
    """Return the order-0 entropy of an integer array (any shape), in bits per code."""
    counts = {}
    for code in np.asarray(codes).reshape(-1).tolist():
        counts[code] = counts.get(code, 0) + 1
    total = sum(counts.values())
    return -sum(n / total * math.log2(n / total) for n in counts.values())


# ---- 6. Evaluation ------------------------------------------------------------------------


def window_starts(num_targets, seq_len, stride):
    """Return the starts of all windows: 0, stride, ... while start + seq_len - stride < targets.

    Window 0 is always there, even when the stream is shorter than that. Source: PR #1471.
    """
    starts, start = [], 0
    while start == 0 or start + (seq_len - stride) < num_targets:
        starts.append(start)
        start += stride
    return starts if num_targets > 0 else []


def sliding_windows(num_targets, seq_len, stride):
    """Return [(start, [scored stream positions])]. Source: PR #1471.

    Window 0 scores all it covers; every other one what follows its first seq_len - stride.
    """
    windows = []
    for start in window_starts(num_targets, seq_len, stride):
        end = min(start + seq_len, num_targets)
        first = 0 if start == 0 else start + seq_len - stride
        windows.append((start, [p for p in range(start, end) if p >= first]))
    return windows


def document_windows(tokens, seq_len, stride, bos_id=1):
    """Return [(start, [scored stream positions])] of windows that stay within documents.

    tokens: ids, a list; all but the last are read, all but the first are targets. Each document
    is read as sliding_windows() reads a stream; a BOS is the last target of the one before it.
    """
    starts = segment_starts(tokens[:-1], math.inf, bos_id)
    windows = []
    for start, end in zip(starts, starts[1:] + [len(tokens) - 1]):
        for first, positions in sliding_windows(end - start, seq_len, stride):
            windows.append((start + first, [start + p for p in positions]))
    return windows


def count_scored(windows, num_targets):
    """Return how often each stream position is scored, a list of num_targets ints."""
    counts = [0] * num_targets
    for _, positions in windows:
        for position in positions:
            counts[position] += 1
    return counts


def byte_table(pieces, vocab_size):
    """Return {"bytes", "leadspace", "boundary"} arrays (V,) for byte_cost().

    pieces: [(text, kind)] by id, kind one of "normal", "byte", "control", "unknown", "unused".
    Ids past the last piece stay 0 bytes and a boundary. Source: challenge baseline script.
    """
    table = {
        "bytes": np.zeros(vocab_size, dtype=np.int64),
        "leadspace": np.zeros(vocab_size, dtype=bool),
        "boundary": np.ones(vocab_size, dtype=bool),
    }
    for i, (text, kind) in enumerate(pieces):
        if kind in ("control", "unknown", "unused"):
            continue
        table["boundary"][i] = False
        if kind == "byte":
            table["bytes"][i] = 1
            continue
        if text.startswith("\u2581"):
            table["leadspace"][i] = True
            text = text[1:]
        table["bytes"][i] = len(text.encode("utf-8"))
    return table


def byte_cost(prev_id, target_id, table):
    """Return the bytes target_id stands for after prev_id, an int; a space counts as one byte.

    table: {"bytes", "leadspace", "boundary"} arrays over ids. Source: challenge baseline script.
    """
    cost = int(table["bytes"][target_id])
    if bool(table["leadspace"][target_id]) and not bool(table["boundary"][prev_id]):
        cost += 1
    return cost


# ---- 7. Test-time training ----------------------------------------------------------------


def windows_of_documents(begins, num_targets, seq_len, stride):
    """Return sliding_windows() of each document, at their places in the text."""
    windows = []
    for begin, end in zip(begins, [*begins[1:], num_targets]):
        for start, positions in sliding_windows(end - begin, seq_len, stride):
            windows.append((begin + start, [begin + p for p in positions]))
    return windows


def sgd_while_scoring(params, tokens, order, sizes, windows, begins, seq_len, chunk_tokens, lr,
                      momentum, max_norm, epochs, batch_seqs, frozen_blocks=0):
    """Return (nats of each target, the weights in the end): chunks, each scored, then learned.

    tokens: (N + 1,); windows: [(start, [scored positions])]; begins: of the stretches that do not
    see each other. Every chunk but the last is learned, its whole sequences alone. Source: PR #549.
    """
    num_targets = len(tokens) - 1
    frozen = tuple(f"blocks.{i}." for i in range(frozen_blocks))
    learned = [name for name in params if not name.startswith(frozen)] if frozen else [*params]
    params = dict(params)
    buffers, nats = {}, [0.0] * num_targets
    num_chunks = math.ceil(num_targets / chunk_tokens)
    for chunk in range(num_chunks):
        for start, positions in windows:
            if positions[0] // chunk_tokens == chunk:
                end = positions[-1] + 1
                found = losses(params, tokens[None, start:end], tokens[None, start + 1:end + 1],
                               order, sizes)[0]
                for p in positions:
                    nats[p] = float(found[p - start])
        if chunk == num_chunks - 1:
            break
        rate = lr * 0.5 * (1 + math.cos(math.pi * chunk / (num_chunks - 1)))
        first, end = chunk * chunk_tokens, (chunk + 1) * chunk_tokens
        rows = [at for at in range(first, end, seq_len) if at + seq_len <= end]
        for _ in range(epochs):
            for i in range(0, len(rows), batch_seqs):
                some = rows[i:i + batch_seqs]
                leaves = {name: params[name].clone().requires_grad_() for name in learned}
                total = 0.0
                for at in some:
                    cuts = [at, *(b for b in begins if at < b < at + seq_len), at + seq_len]
                    for a, b in zip(cuts, cuts[1:]):
                        total = total + torch.sum(losses(
                            {**params, **leaves}, tokens[None, a:b], tokens[None, a + 1:b + 1],
                            order, sizes))
                total = total / (len(some) * seq_len)
                grads = torch.autograd.grad(total, [*leaves.values()], allow_unused=True)
                grads = [torch.zeros_like(params[name]) if g is None else g
                         for name, g in zip(learned, grads)]
                grads, _ = clip(grads, max_norm)
                for name, g in zip(learned, grads):
                    buffers[name] = momentum * buffers[name] + g if name in buffers else g
                    params[name] = params[name] - rate * buffers[name]
    return nats, params


def merged_adapters(halves, scale):
    """Return {"adapted...": scale * B A} of halves {place: (A (N, r, in), B (N, out, r))}."""
    merged = {}
    for place, (inner, outer) in halves.items():
        for at in range(len(inner)):
            name = "adapted.head" if place == "head" else f"adapted.{at}.{place}"
            merged[name] = scale * outer[at] @ inner[at]
    return merged


def adapt_to_document(params, tokens, order, sizes, halves, scale, chunk, seq_len, lr, betas, eps,
                      weight_decay):
    """Return (nats of each target, gradients of each step, adapters in the end) of one document.

    tokens: (n + 1,). Targets are scored `chunk` at a time, in the window of the last seq_len tokens
    up to the last of them; then one step of AdamW on their mean, but after the last chunk.
    halves: as merged_adapters takes them. Source: PR #1530.
    """
    num_targets, nats, steps = len(tokens) - 1, [], []
    moments = {place: [(torch.zeros_like(half), torch.zeros_like(half)) for half in pair]
               for place, pair in halves.items()}
    for done in range(0, num_targets, chunk):
        end = min(done + chunk, num_targets)
        start = max(0, end - seq_len)
        leaves = {place: [half.clone().requires_grad_() for half in pair]
                  for place, pair in halves.items()}
        found = losses({**params, **merged_adapters(leaves, scale)}, tokens[None, start:end],
                       tokens[None, start + 1:end + 1], order, sizes)[0, done - start:]
        nats += found.tolist()
        if end == num_targets:
            break
        flat = [half for pair in leaves.values() for half in pair]
        grads = iter(torch.autograd.grad(torch.mean(found), flat))
        steps.append({place: [next(grads), next(grads)] for place in leaves})
        for place, pair in halves.items():
            stepped = [adamw_step(half, grad, *moment, len(steps), lr, betas, eps, weight_decay)
                       for half, grad, moment in zip(pair, steps[-1][place], moments[place])]
            halves = {**halves, place: [new for new, _, _ in stepped]}
            moments[place] = [(first, second) for _, first, second in stepped]
    return nats, steps, halves
