"""Watches what the compiler is given: in a run of the script `install` it there.

No code is generated: a captured graph runs as it was written, which takes a tenth of the time.
"""

import contextlib
import functools
import json

import torch

OUT = "graphs.jsonl"


def names_of(graph) -> list[str]:
    """Return the names of all that a graph calls, once each."""
    called = {node.target for node in graph.nodes if node.op.startswith("call_")}
    return sorted({getattr(target, "__name__", str(target)) for target in called})


class Watch:
    """Notes each graph compiled: which function's, within which span of the run's clock."""

    def __init__(self):
        self.span, self.compile = "none", torch.compile
        self.backends = {}  # a graph serves another model of its sizes for the same backend alone

    def capture(self, function, module, inputs):
        sizes = [list(x.shape) for x in inputs if x.dtype == torch.int64]
        row = dict(function=function, span=self.span, calls=names_of(module.graph), sizes=sizes,
                   breaks=dict(torch._dynamo.utils.counters["graph_break"]))
        with open(OUT, "a", encoding="utf-8") as file:  # at once: runs end by os._exit
            file.write(json.dumps(row) + "\n")
        return module.forward

    def rows(self) -> list[dict]:
        with open(OUT, encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def compiled(self, function, **options):
        """Stand in for torch.compile."""
        assert options == dict(dynamic=False, fullgraph=True), options
        name = function.__name__
        backend = self.backends.setdefault(name, functools.partial(self.capture, name))
        return self.compile(function, **options, backend=backend)

    def spans(self, span):
        """Return Clock.span that tells this what it enters."""
        @contextlib.contextmanager
        def watched(clock, name):
            outer, self.span = self.span, name
            try:
                with span(clock, name):
                    yield
            finally:
                self.span = outer
        return watched


def switches_as_on_cuda(switches):
    """Return Runtime.switches that sets what it would on a GPU."""
    @contextlib.contextmanager
    def on_cuda(runtime, *args, **options):
        at_home = runtime.device
        with contextlib.ExitStack() as held:
            runtime.device = torch.device("cuda:0")
            held.enter_context(switches(runtime, *args, **options))
            runtime.device = at_home
            yield
    return on_cuda


def install(module):
    """Watch a run of a module that is train_gpt's."""
    watch = Watch()
    torch.compile = watch.compiled
    module.Clock.span = watch.spans(module.Clock.span)
    module.Runtime.switches = switches_as_on_cuda(module.Runtime.switches)
