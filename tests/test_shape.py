"""Laws of the form of train_gpt.py: who uses whom, what has one home, how large things are.

The script is one file with rooms between `# == N Name` banners. These tests read it as text and
as a syntax tree, so that a wrong arrow or a second home shows when it is made.
"""

import ast
import functools
import io
import re
import tokenize
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "train_gpt.py"
SOURCE = SCRIPT.read_text(encoding="utf-8")
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)

ROOMS = ["Imports", "Config", "Settings", "Runtime", "Files", "Data", "Kernels", "Model",
         "Optimizer", "Quantize", "Coder", "Artifact", "Evaluate", "Adapt", "Train", "Calibrate",
         "Preflight", "Report", "Stages"]
# Room -> rooms whose names it may use. Single names let through are in ONLY.
MAY_USE = {
    "Config": {},
    "Settings": {"Config"},
    "Runtime": {"Config"},
    "Files": {},
    "Data": {"Config", "Runtime"},
    "Kernels": {"Config", "Runtime"},
    "Model": {"Config", "Kernels"},
    "Optimizer": {"Config", "Runtime"},
    "Quantize": {},
    "Coder": {},
    "Artifact": {"Config", "Files", "Model", "Quantize", "Coder"},
    "Evaluate": {"Config", "Runtime", "Data", "Kernels", "Model"},
    "Adapt": {"Config", "Runtime", "Data", "Model", "Evaluate"},
    "Train": {"Config", "Runtime", "Files", "Data", "Kernels", "Model", "Optimizer", "Evaluate"},
    "Calibrate": {"Config", "Runtime", "Data", "Model"},
    "Preflight": {"Config", "Runtime", "Files", "Data", "Model", "Artifact", "Train"},
    "Report": {"Config", "Settings", "Runtime", "Data", "Model", "Artifact", "Quantize", "Evaluate",
               "Train", "Preflight"},
    "Stages": set(ROOMS),
}
# A forward takes a batch; the optimizer sees roles, not the model; calibration asks the step rule
# what it needs; the preflight shows settings that differ.
ONLY = {"Model": {"BOS_ID", "Batch"}, "Optimizer": {"Role"}, "Calibrate": {"STEP_RULES"},
        "Report": {"attention_sdpa", "windowed_form"}, "Preflight": {"show_value"}}
# Room -> imported names it must not touch.
FORBIDDEN_IMPORTS = {
    "Config": {"torch", "dist", "F", "nn", "Tensor", "np", "os"},
    "Settings": {"torch", "dist", "F", "nn", "Tensor", "np", "os"},
    "Runtime": {"nn", "F"},
    "Files": {"nn", "F", "dist", "sys"},
    "Data": {"nn", "F", "dist", "os"},
    "Kernels": {"nn", "dist", "os", "Path"},
    "Model": {"os", "sys", "dist", "Path", "json", "subprocess", "np", "time"},
    "Optimizer": {"os", "sys", "Path", "F"},
    "Quantize": {"os", "sys", "Path", "dist", "nn"},
    "Coder": {"dist", "F", "os", "nn", "Path"},
    "Artifact": {"dist", "F", "os"},
    "Evaluate": {"dist", "os"},
    "Adapt": {"dist", "os"},
    "Train": {"dist", "os"},
    "Calibrate": {"dist", "os", "np"},
    "Preflight": {"dist", "F", "nn"},
    "Report": {"dist", "F", "np", "math"},
    "Stages": {"dist", "F", "np", "math", "nn"},  # no arithmetic
}
MAX_LINE, MAX_FUNCTION_LINES, AIM_FUNCTION_LINES = 100, 48, 40
MAX_PARAMETERS, MAX_NESTING = 6, 4
MAX_ROOM_LINES, MAX_TOTAL_LINES = 420, 3974

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try)


# ---- reading the script --------------------------------------------------------------------


@functools.cache
def banners():
    """Return [(line number, room name)] in order."""
    found = [(i, re.match(r"# == \d+[bc]? (\w+)", line)) for i, line in enumerate(LINES, 1)]
    return [(i, match[1]) for i, match in found if match]


@functools.cache
def room_of(line):
    """Return the room that a line number lies in."""
    return next((name for at, name in reversed(banners()) if at <= line), "Imports")


def defined_names(node):
    """Return the names a top-level statement defines."""
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return [node.name]
    targets = getattr(node, "targets", [node.target] if isinstance(node, ast.AnnAssign) else [])
    return [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]


def bound_names(scope):
    """Return parameters and names assigned anywhere in a function, lambda or comprehension."""
    names = {n.arg for n in ast.walk(scope) if isinstance(n, ast.arg)}
    names |= {n.id for n in ast.walk(scope) if isinstance(n, ast.Name)
              and isinstance(n.ctx, ast.Store)}
    return names | {n.name for n in ast.walk(scope) if isinstance(n, FUNCTIONS) and n is not scope}


def module_names(node, bound=frozenset()):
    """Yield (name, line) of every use of a module-level name in a statement or annotation."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in bound:
        yield node.id, node.lineno
    if isinstance(node, (*FUNCTIONS, ast.Lambda, ast.GeneratorExp, ast.ListComp, ast.DictComp,
                         ast.SetComp)):
        bound = bound | bound_names(node)
    for child in ast.iter_child_nodes(node):
        yield from module_names(child, bound)


@functools.cache
def functions():
    """Return [(qualified name, node)] of every function, methods and nested ones included."""
    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (*FUNCTIONS, ast.ClassDef)):
                name = f"{prefix}{child.name}"
                if isinstance(child, FUNCTIONS):
                    yield name, child
                yield from visit(child, f"{name}.")
            else:
                yield from visit(child, prefix)
    return list(visit(TREE, ""))


@functools.cache
def owner(line):
    """Return the qualified name of the outermost function (or method) around a line, or ''."""
    around = [(node.lineno, name) for name, node in functions()
              if node.lineno <= line <= node.end_lineno]
    return min(around)[1] if around else ""


def dotted(node):
    """Return `a.b.c` for nested attributes of a name, '' for anything else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts, node = [node.attr, *parts], node.value
    return ".".join([node.id, *parts]) if isinstance(node, ast.Name) else ""


@functools.cache
def everything(within):
    return list(ast.walk(within))


def nodes(kind, within=TREE):
    return [n for n in everything(within) if isinstance(n, kind)]


def calls(name):
    """Return the calls of a function by its dotted name."""
    return [n for n in nodes(ast.Call) if dotted(n.func) == name]


def code_lines():
    """Return how many lines hold code (no blank, comment or docstring line), by room."""
    doc_lines = set()
    for node in nodes((*FUNCTIONS, ast.ClassDef, ast.Module)):
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            doc_lines |= set(range(first.lineno, first.end_lineno + 1))
    quiet = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
             tokenize.ENDMARKER)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(SOURCE).readline):
        if token.type not in quiet:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return Counter(room_of(line) for line in lines - doc_lines)


def strings(node):
    return {n.value for n in nodes(ast.Constant, node) if isinstance(n.value, str)}


# ---- rooms ---------------------------------------------------------------------------------


def test_rooms_stand_in_the_declared_order():
    assert ["Imports", *(name for _, name in banners())] == ROOMS


def test_top_level_names_are_defined_once():
    defined = Counter(name for node in TREE.body for name in defined_names(node))
    assert [name for name, count in defined.items() if count > 1] == []


def test_every_top_level_name_is_used():
    used = Counter(name for node in TREE.body for name, _ in module_names(node)
                   if name not in defined_names(node))
    assert [name for node in TREE.body for name in defined_names(node) if not used[name]] == []


def test_every_method_is_used():
    """A method nobody reads is dead, but for what torch calls and what tools compare."""
    read = {n.attr for n in nodes(ast.Attribute) if isinstance(n.ctx, ast.Load)} | strings(TREE)
    methods = {name for name, _ in functions() if "." in name and name[0].isupper()}
    called = {"forward", "logits"}
    assert sorted(m for m in methods if m.count(".") == 1 and not m.split(".")[1].startswith("__")
                  and m.split(".")[1] not in read | called) == []


def test_arrows_between_rooms_obey_the_table():
    home = {name: room_of(node.lineno) for node in TREE.body for name in defined_names(node)}
    wrong = set()
    for node in TREE.body:
        here = room_of(node.lineno)
        for name, line in module_names(node):
            there = home.get(name, here)
            allowed = there == here or there in MAY_USE[here] or name in ONLY.get(here, ())
            below = ROOMS.index(there) > ROOMS.index(here)
            if not allowed or below:
                wrong.add(f"line {line}: {here} uses {name} of {there}")
    assert sorted(wrong) == []


def test_rooms_keep_away_from_imports_not_theirs():
    wrong = [f"line {line}: {room_of(node.lineno)} uses {name}"
             for node in TREE.body[:-1] for name, line in module_names(node)
             if name in FORBIDDEN_IMPORTS.get(room_of(node.lineno), ())]
    assert wrong == []


def test_stages_do_no_arithmetic_on_tensors():
    wrong = [node.lineno for node in nodes(ast.BinOp) if isinstance(node.op, ast.MatMult)
             and room_of(node.lineno) == "Stages"]
    assert wrong == [], "a matrix product belongs to a room above"


def test_model_knows_no_ranks():
    wrong = [f"line {n.lineno}: .{n.attr}" for n in nodes(ast.Attribute)
             if room_of(n.lineno) == "Model" and n.attr in ("rank", "world_size", "is_main")]
    assert wrong == []


def test_optimizer_decides_by_role_never_by_name():
    wrong = [f"line {n.lineno}: {n.attr}" for n in nodes(ast.Attribute)
             if room_of(n.lineno) == "Optimizer"
             and n.attr in ("named_parameters", "named_modules", "state_dict")]
    assert wrong == []


def test_importing_only_defines():
    """Top level holds imports, definitions and tables; one guarded call of main at the end."""
    *body, last = TREE.body
    kinds = (ast.Import, ast.ImportFrom, ast.Try, ast.Assign, ast.AnnAssign, *FUNCTIONS,
             ast.ClassDef)
    odd = [n.lineno for n in body if not isinstance(n, kinds)
           and not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
    assert odd == []
    for tried in (n for n in body if isinstance(n, ast.Try)):
        assert all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in tried.body)
    assert isinstance(last, ast.If) and "__main__" in ast.unparse(last.test)


# ---- one home for each rule ----------------------------------------------------------------


def test_environment_is_taken_in_one_place():
    places = [n for n in nodes(ast.Attribute) if dotted(n) in ("os.environ", "os.environb")]
    assert len(places) == 1 and places[0] in everything(TREE.body[-1]), "in the guard at the bottom"
    assert calls("os.getenv") == []


def test_only_the_runtime_reads_torchruns_variables():
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    found = {(room_of(n.lineno), n.lineno) for n in nodes(ast.Constant) if n.value in names}
    assert [place for place in sorted(found) if place[0] != "Runtime"] == []


def test_compilation_has_one_place():
    assert {owner(n.lineno) for n in calls("torch.compile")} == {"Runtime.compile"}
    assert len(calls("torch.compile")) == 1


def test_files_are_opened_for_writing_in_one_place_per_purpose():
    writers = {"write_text", "write_bytes", "savez", "save", "tofile", "dump"}
    places = {owner(n.lineno) for n in nodes(ast.Call)
              if isinstance(n.func, ast.Attribute) and n.func.attr in writers}
    for call in calls("open") + calls("os.open") + calls("io.open"):
        mode = next((k.value for k in call.keywords if k.arg == "mode"), None)
        mode = mode or (call.args[1] if len(call.args) > 1 else ast.Constant("r"))
        if not isinstance(mode, ast.Constant) or set(mode.value) & set("wax+"):
            places.add(owner(call.lineno))
    assert places == {"write_file", "Log.__init__", "Journal.__setitem__", "claimed"}


def test_ranks_talk_only_in_runtime_and_optimizer():
    uses = {room_of(n.lineno) for n in nodes(ast.Name) if n.id == "dist"}
    uses |= {room_of(n.lineno) for n in nodes(ast.Attribute)
             if dotted(n).startswith("torch.distributed")}
    assert uses <= {"Runtime", "Optimizer"}


def test_stride_arithmetic_lives_in_plan_windows():
    def about_stride(node):
        if isinstance(node, ast.Call) and dotted(node.func) == "plan_windows":
            return False
        name = getattr(node, "id", getattr(node, "attr", ""))
        return (name in ("stride", "eval_stride")
                or any(about_stride(child) for child in ast.iter_child_nodes(node)))
    sums = [n for n in nodes((ast.BinOp, ast.AugAssign)) if about_stride(n)]
    steps = [n for n in nodes(ast.Call) if dotted(n.func) in ("range", "np.arange")
             and about_stride(n)]
    assert {owner(n.lineno) for n in sums + steps} == {"plan_windows"}


def test_storage_kinds_and_step_rules_are_named_in_their_tables_alone():
    """Whoever needs one asks `inventory` or STEP_RULES, so that another is one row."""
    homes = {name: {n.lineno for node in TREE.body if name in defined_names(node)
                    for n in ast.walk(node) if hasattr(n, "lineno")}
             for name in ("INT6", "INT8", "STEP_RULES")}
    kinds = [n.lineno for n in nodes(ast.Constant) if n.value in ("int6", "int8")
             and n.lineno not in homes["INT6"] | homes["INT8"]
             and owner(n.lineno) != "" and room_of(n.lineno) != "Config"]
    rules = [n.lineno for n in nodes(ast.Constant) if n.value in ("fisher", "sdclip")
             and n.lineno not in homes["STEP_RULES"]
             and room_of(n.lineno) not in ("Config", "Settings")]
    assert (kinds, rules) == ([], [])


def test_the_step_rule_of_a_configuration_is_looked_up_never_compared():
    uses = [n for n in nodes(ast.Attribute) if n.attr == "rule" and dotted(n.value) != "self"
            and dotted(n.value).split(".")[-1] in ("config", "c")
            and room_of(n.lineno) not in ("Config", "Settings")]
    looked_up = [n for sub in nodes(ast.Subscript) if dotted(sub.value) == "STEP_RULES"
                 for n in nodes(ast.Attribute, sub)]
    compared = [n.lineno for test in nodes((ast.If, ast.IfExp, ast.Compare))
                for n in nodes(ast.Attribute, getattr(test, "test", test))
                if n in uses and n not in looked_up]
    assert len(looked_up) >= 4 and compared == []


def test_what_a_run_reads_is_taken_once():
    for name, homes in dict(load_validation={"take_inputs"}, fingerprint={"take_inputs"},
                            ShardSet={"take_inputs"}).items():
        assert {owner(n.lineno) for n in calls(name)} <= homes, name
    own = {owner(n.lineno) for n in nodes(ast.Name) if n.id == "__file__"}
    assert own == {"take_inputs"}, "the script reads itself in one place"


def test_switches_of_torch_are_scoped():
    """Set in a context manager that puts back what was there."""
    places = {owner(n.lineno) for n in nodes(ast.Attribute)
              if dotted(n) == "torch.set_float32_matmul_precision"}
    assert places == {"Runtime.switches"}
    stored = [n.lineno for n in nodes(ast.Attribute) if isinstance(n.ctx, ast.Store)
              and dotted(n).startswith(("torch.", "dist."))]
    assert stored == [], "a global switch set for good"


def test_models_are_built_in_three_places():
    assert {owner(n.lineno) for n in calls("GPT")} == {
        "inventory", "Session.build_model", "saved_activation_bytes"}


def test_the_index_at_the_top_names_every_room_in_order():
    doc = ast.get_docstring(TREE)
    listed = re.findall(r"^ +(\d+[bc]?) (\w+) ", doc, re.M)
    assert listed == [re.match(r"# == (\d+[bc]?) (\w+)", LINES[i - 1]).groups()
                      for i, _ in banners()]


def test_faults_become_one_line_only_in_main():
    prints = [owner(n.lineno) for n in calls("print")
              if any(k.arg == "file" and dotted(k.value) == "sys.stderr" for k in n.keywords)]
    assert set(prints) == {"main"}
    written = {owner(n.lineno) for n in calls("sys.stderr.write")}
    assert written <= {"Log.progress", "Log.clear"}, "the terminal's progress line alone"
    exits = [owner(n.lineno) for n in calls("sys.exit") + calls("exit") + calls("os._exit")]
    assert set(exits) == {"", "Signals.handle"}, "the guard at the bottom, and a second signal"


def test_every_knob_is_read_outside_config():
    """Reading `config.name` in another room counts, or a Config property that reads it."""
    knobs, properties = {}, {}
    config = next(n for n in TREE.body if isinstance(n, ast.ClassDef) and n.name == "Config")
    for node in config.body:
        if isinstance(node, ast.AnnAssign) and dotted(getattr(node.value, "func", None)) == "knob":
            knobs[node.target.id] = node.lineno
        elif isinstance(node, (*FUNCTIONS, ast.Assign)):  # also name = property(lambda self: …)
            names = [node.name] if isinstance(node, FUNCTIONS) else defined_names(node)
            properties.update(dict.fromkeys(names, {n.attr for n in nodes(ast.Attribute, node)}))
    read = {n.attr for n in nodes(ast.Attribute)
            if room_of(n.lineno) not in ("Config", "Settings")
            and dotted(n.value).split(".")[-1] in ("config", "c")}
    for _ in properties:  # properties may read properties
        read |= {name for prop in read & set(properties) for name in properties[prop]}
    read.add("allow_env")  # acts on the reading of the others, before there is a Config
    read |= strings(next(n for n in TREE.body if "RATES" in defined_names(n)))  # by role
    assert sorted(set(knobs) - read) == []


def test_presets_are_known_to_config_alone():
    names = {"pr1471", "one_gpu", "demo"}
    places = [n.lineno for n in nodes(ast.Constant) if n.value in names
              and room_of(n.lineno) not in ("Config", "Settings")]
    assert places == []


# ---- events --------------------------------------------------------------------------------


def event_table():
    table = next(n.value for n in TREE.body if "EVENTS" in defined_names(n))
    return {key.value: value for key, value in zip(table.keys, table.values, strict=True)}


def possible_kinds(kind, within):
    """Return the strings that the expression of an event's kind can be.

    A name is followed to the loop that sets it and to what the loop runs over, or, where it is a
    parameter, to the callers.
    """
    if isinstance(kind, ast.Constant):
        return {kind.value}
    assert isinstance(kind, ast.Name), f"line {kind.lineno}: an event kind that nobody can count"
    loops = [n for n in nodes(ast.For, within) if kind.id in bound_names(n.target)]
    if loops:
        sources = {n.id for loop in loops for n in nodes(ast.Name, loop.iter)}
        makers = [n for n in nodes((ast.Assign, ast.Expr), within)
                  if sources & {name.id for name in nodes(ast.Name, n)} - {"config"}]
        return {text for n in (*makers, *(loop.iter for loop in loops)) for text in strings(n)}
    position = [a.arg for a in within.args.args].index(kind.id)
    found = set()
    for name, node in functions():
        for other in (n for n in nodes(ast.Call, node) if dotted(n.func) == within.name):
            if owner(other.lineno) == name:
                found |= possible_kinds(other.args[position], node)
    return found


def emitted_kinds():
    kinds = set()
    for name, node in functions():
        for call in nodes(ast.Call, node):
            if isinstance(call.func, ast.Attribute) and call.func.attr == "event":
                if owner(call.lineno) == name:
                    kinds |= possible_kinds(call.args[0], node)
    return kinds


def test_every_declared_event_is_emitted():
    assert sorted(set(event_table()) - emitted_kinds()) == []


def test_every_emitted_event_is_declared():
    assert sorted(emitted_kinds() - set(event_table())) == []


# ---- functions, state, size ----------------------------------------------------------------


def test_functions_stay_short(say):
    sizes = {name: node.end_lineno - node.lineno + 1 for name, node in functions()}
    over_aim = {name: size for name, size in sizes.items() if size > AIM_FUNCTION_LINES}
    say(f"functions over {AIM_FUNCTION_LINES} lines: "
        + (", ".join(f"{name} {size}" for name, size in over_aim.items()) or "none"))
    assert {name: n for name, n in over_aim.items() if n > MAX_FUNCTION_LINES} == {}


def test_functions_take_few_parameters():
    def count(arguments):
        names = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        rest = [a for a in (arguments.vararg, arguments.kwarg) if a]
        return len([a for a in names if a.arg not in ("self", "cls")]) + len(rest)
    found = {name: count(node.args) for name, node in functions()}
    assert {name: n for name, n in found.items() if n > MAX_PARAMETERS} == {}


def nesting(node):
    """Return how deep compound statements lie in a statement; `elif` adds nothing."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        depth = nesting(child)
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, depth + (isinstance(child, BLOCKS) and not is_elif))
    return deepest


def test_blocks_nest_at_most_four_deep():
    deep = {name: nesting(node) for name, node in functions()}
    assert {name: n for name, n in deep.items() if n > MAX_NESTING} == {}


def test_lines_fit_the_page():
    assert [i for i, line in enumerate(LINES, 1) if len(line) > MAX_LINE] == []


def test_no_global_is_ever_changed():
    """No `global` statement; no function writes into, or appends to, a name of module level."""
    assert nodes(ast.Global) == []
    home = {name for node in TREE.body for name in defined_names(node)}
    changers = {"append", "extend", "add", "update", "pop", "clear", "setdefault", "insert",
                "remove", "popitem", "discard"}
    wrong = []
    for name, node in functions():
        free = home - bound_names(node)
        for n in nodes((ast.Subscript, ast.Attribute), node):
            stored = isinstance(n.ctx, (ast.Store, ast.Del))
            changed = isinstance(n, ast.Attribute) and n.attr in changers
            if (stored or changed) and isinstance(n.value, ast.Name) and n.value.id in free:
                wrong.append(f"line {n.lineno}: {name} changes {n.value.id}")
    assert wrong == []


def test_variants_are_chosen_at_construction():
    """No setting is consulted in a forward or a step: what can differ is built in before."""
    wrong = []
    for name, node in functions():
        room, method = room_of(node.lineno), name.split(".")[-1]
        if room == "Model" and "." in name and method not in ("__init__", "init_weights"):
            wrong += [f"line {n.lineno}: {name} reads a setting" for n in nodes(ast.Attribute, node)
                      if "config" in dotted(n).split(".")]
        if room == "Optimizer" and "." in name and method != "__init__":
            tests = [n.test for n in nodes((ast.If, ast.IfExp), node)]
            wrong += [f"line {test.lineno}: {name} decides by a setting" for test in tests
                      if any("config" in dotted(n).split(".") for n in nodes(ast.Attribute, test))]
    assert sorted(wrong) == []


def test_code_lines_per_room(say):
    counts = code_lines()
    say("code lines: " + ", ".join(f"{room} {counts[room]}" for room in ROOMS)
        + f"; total {sum(counts.values())}")
    assert {room: n for room, n in counts.items() if n > MAX_ROOM_LINES} == {}
    assert sum(counts.values()) <= MAX_TOTAL_LINES


@pytest.mark.parametrize("folder", ["tests", "data", "."])
def test_nothing_is_imported_from_outside_the_repository(folder):
    """The script stands alone: it imports no file of this repository."""
    local = {path.stem for path in (SCRIPT.parent / folder).glob("*.py")} - {"train_gpt"}
    imported = {alias.name.split(".")[0] for n in nodes(ast.Import) for alias in n.names}
    imported |= {(n.module or "").split(".")[0] for n in nodes(ast.ImportFrom)}
    assert imported & local == set()
