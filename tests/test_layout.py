"""The order of the folders: imports go downward only, and nothing imports a script."""

import ast
import re

from conftest import ROOT

# from the bottom up; a module may import from its own row and from the rows before it
LEVELS = [
    {"common"},
    {"kernels"},
    {"data.records", "data.scenes", "data.brackets", "data.prompts", "data.chats", "data.packing"}
    | {"data.cards"},
    {"model", "tokenizer", "text"},
    {"data.channels", "data.general", "data.store", "data.stream", "checkpoint"},
    {"engine", "training"},
    {"llm"},
    {"play"},
    {"evals"},
    {"serving"},
    {"generate", "simulate", "judge", "train", "serve", "bench", "benchmark"}
    | {"data.show", "data.cards.__main__", "data.curate", "checkpoint.__main__"},
]
SCRIPTS = LEVELS[-1]


def modules():
    """{dotted name: path} of every Python file of the product."""
    paths = [
        path
        for path in ROOT.rglob("*.py")
        if not path.relative_to(ROOT).parts[0].startswith((".", "tests", "out"))
        and path != ROOT / "bench" / "__init__.py"  # shares its name with the script
    ]
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in paths
    }
    return {name: path for name, path in names.items() if name != "setup"}


def level(name):
    """The row of the longest known prefix of a dotted name; None for what is not ours."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        for row, names in enumerate(LEVELS):
            if ".".join(parts[:n]) in names:
                return row
    return None


def imports(path, known):
    """Dotted names of our modules that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module


def test_imports_go_downward_and_nothing_imports_a_script():
    known, wrong = modules(), []
    assert {"model", "engine.engine", "data.scenes", "simulate"} <= known.keys()
    for name, path in known.items():
        row = level(name)
        if name == "data":  # an empty package
            continue
        assert row is not None, f"{name} stands in no row of LEVELS"
        for imported in imports(path, known):
            other = level(imported)
            if other is None or imported == name:
                continue
            same = imported.split(".")[0] == name.split(".")[0] != "data"
            if other > row or (imported in SCRIPTS and not same):
                wrong.append(f"{name} imports {imported}")
    assert not wrong, "\n".join(wrong)


def place_of(name):
    """The folder or top-level script of a module. data.curate, which is above most, is a place of its own."""
    return "data.curate" if name.startswith("data.curate") else name.split(".")[0]


def places():
    """{place: the places it imports}."""
    known, found = modules(), {}
    tops = {place_of(name) for name in known}
    for name, path in known.items():
        place = place_of(name)
        found.setdefault(place, set()).update(
            top for imported in imports(path, known) if (top := place_of(imported)) in tops - {place}
        )
    return found


def drawing():
    """The table of docs/reading.md: every place after those that it imports."""
    found, lines = places(), ["| place | imports |", "|---|---|"]
    order = {place_of(name): row for row, names in reversed(list(enumerate(LEVELS))) for name in names}
    for place in sorted(found, key=lambda place: (order[place], place)):
        lines.append(f"| `{place}` | {', '.join(sorted(found[place], key=lambda p: (order[p], p))) or '-'} |")
    return "\n".join(lines)


def test_the_reading_guide_is_true():
    """Its table is that of the imports, and each line of code that it shows stands in the file it names."""
    text = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    assert drawing() in text
    blocks = re.findall(r"^```python (\S+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 5
    for name, code in blocks:
        source = (ROOT / name).read_text(encoding="utf-8").splitlines()
        missing = [line for line in code.splitlines() if line not in source]
        assert not missing, (name, missing)
