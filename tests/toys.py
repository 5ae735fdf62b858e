"""Small models and pretended ranks that the tests of train_gpt.py share."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import settings

import train_gpt

settings.register_profile("toys", deadline=None, derandomize=True)  # no luck, no stopwatch
settings.load_profile("toys")


@pytest.fixture(autouse=True)
def steady():
    """Seed torch and keep it to one thread: toys need no more, and a busy machine loses by more."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

# Every part of the record's model at sizes where the slow references take milliseconds.
TOY = dict(device="cpu", vocab_size=29, train_seq_len=8, eval_seq_len=8, eval_stride=2,
           train_batch_tokens=64, micro_batch_tokens=64, val_batch_tokens=256, model_dim=16,
           num_heads=4, num_kv_heads=2, mlp_mult=1.5, rope_dims=2, ve_dim=5, fp16_max_numel=0,
           max_wallclock_seconds=0.0, gptq_calibration_batches=4)


def toy_config(**changes):
    return train_gpt.Config(**(TOY | changes))


def sizes_of(config):
    """Return the sizes that the functions of plain.py take."""
    names = ("num_layers num_heads num_kv_heads head_dim rope_dims rope_base train_seq_len "
             "xsa_last_n logit_softcap ln_scale")
    return {name: getattr(config, name) for name in names.split()} | {
        "ve_layers": config.ve_layers if config.ve_enabled else (),
        "gate_scale": config.attn_gate_scale if config.attn_gate != "none" else None,
        "gate_window": config.gate_window, "smear": config.smear_gate,
        "routed": config.lane_routing == "learned",
        **({"skip_rows": max(min(len(order) // 2, len(order) - len(order) // 2)
                             for order in (config.base_order, config.recurrent_order))}
           if config.skip_rows == "orders" else {}),
        "lane_start": config.parallel_start_layer, "skip_gates": config.skip_gates_enabled}


def random_model(config, seed=0, dtype=torch.float32, attend=train_gpt.attention_sdpa,
                 train_len=None):
    """Return a model whose every parameter, zero-start ones included, is random."""
    model = train_gpt.GPT(config, attend, dtype, train_len)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator))
    return model


def random_tokens(config, batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


def asked(tokens, tail=None, targets=None):
    """Return the Batch that asks for rows' last `tail` positions, all by default."""
    if targets is None:
        targets = tokens
    return train_gpt.Batch(tokens, targets[:, -(tail or tokens.shape[1]):])


def layouts_of(config):
    """Return the layouts before and after recurrence starts (equal where there is none)."""
    return [train_gpt.plan_layout(order, config)
            for order in (config.base_order, config.recurrent_order)]


def meta_model(config):
    """Return the model without memory for its parameters: names, shapes and roles only."""
    with torch.device("meta"):
        return train_gpt.GPT(config)


def statistics(hessians, fisher=(), outputs=()):
    """Return statistics of weights by the names they have in files; each by weight."""
    kinds = {"inputs.": hessians, "fisher.": dict(fisher), "outputs.": dict(outputs)}
    return {kind + name: value for kind, found in kinds.items() for name, value in found.items()}


def kinds_of(config):
    """Return how each parameter is stored, by name."""
    return {name: entry.kind for name, entry in train_gpt.inventory(config).items()}


class Rank(train_gpt.Runtime):
    """One of several pretended ranks on the CPU: collectives pass values between threads."""

    def __init__(self, rank=0, world_size=1, exchange=None, dtype=torch.float32):
        self.rank, self.world_size, self.exchange = rank, world_size, exchange
        self.device, self.compute_dtype = torch.device("cpu"), dtype
        self.compiles, self.is_main, self.signals = False, rank == 0, train_gpt.Signals()

    def sum_(self, tensor):
        return tensor.copy_(torch.stack(self.gather(tensor)).sum(0))

    def scatter_sum(self, rows):
        whole, share = torch.stack(self.gather(rows)).sum(0), len(rows) // self.world_size
        return lambda: whole[self.rank * share:][:share].clone()

    def gather_rows(self, mine):
        whole = torch.cat(self.gather(mine))
        return lambda: whole

    def agree(self, *values):
        largest = [max(column) for column in zip(*self.gather(values), strict=True)]
        return largest if len(values) > 1 else largest[0]

    def share(self, value):
        return self.gather(value)[0]

    def gather(self, value):
        return [value] if self.world_size == 1 else self.exchange(self.rank, value)


def on_ranks(world_size, work):
    """Return [work(rank 0's runtime), work(rank 1's), ...], run at once, one thread each."""
    slots, barrier = [None] * world_size, threading.Barrier(world_size, timeout=30)

    def exchange(rank, value):
        slots[rank] = value.clone() if isinstance(value, torch.Tensor) else value
        barrier.wait()
        found = list(slots)
        barrier.wait()
        return found

    def task(rank):
        try:
            return work(Rank(rank, world_size, exchange))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(task, range(world_size)))
