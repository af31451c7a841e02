"""The package's layers import to the left only, and its files and functions stay small."""

import ast
import re
import sys
from pathlib import Path

import pytest

import mmicl_kernels

PACKAGE = Path(mmicl_kernels.__file__).parent
LAYERS = ("ops", "data", "modules", "methods", "store", "models", "patch", "training", "evaluation", "cli")
# Modules beside the layers. The package itself names what is public, lazily, as strings.
LEFT_OF_ALL = ("_extension", "_build_info", "durable")
TORCH_ALONE = ("ops", "modules")
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_FILES = 450, 60, 15

FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """``ops.shifted_attention.api`` of its file."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, module: str, is_package: bool) -> set[str]:
    """Absolute names of all that is imported anywhere in a file, functions and strings included."""
    package = f"mmicl_kernels.{module}".rstrip(".").split(".")
    package = package if is_package else package[:-1]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # `from mmicl_kernels import ops` imports a module, `from torch import Tensor` a name.
            found |= {f"{source}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {x.value for x in node.args if isinstance(x, ast.Constant)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "kernels_of":  # which imports it
            found.add(f"{'.'.join(package)}._triton")
    return found


def is_triton(path: Path) -> bool:
    """A file of Triton kernels: ``_triton.py``, or one of a package of that name."""
    return any(part.startswith("_triton") for part in path.relative_to(PACKAGE).with_suffix("").parts)


def parsed(path: Path) -> set[str]:
    return imports(ast.parse(path.read_text()), name_of(path), path.name == "__init__.py")


def layer_of(name: str) -> str:
    return name.removeprefix("mmicl_kernels").removeprefix(".").split(".")[0]


def inside(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == "mmicl_kernels"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_left(path):
    layer = layer_of(name_of(path))
    targets = {layer_of(name) for name in inside(parsed(path))} - {layer}
    if layer == "testing":
        return
    left = LAYERS[: LAYERS.index(layer)] if layer in LAYERS else ()
    allowed = {*left, *LEFT_OF_ALL}
    assert targets <= allowed, f"{name_of(path)} imports {sorted(targets - allowed)}"


def test_every_folder_is_a_layer():
    folders = {path.relative_to(PACKAGE).parts[0] for path in FILES if path.parent != PACKAGE}
    assert folders == {*LAYERS, "testing"}
    assert {path.stem for path in PACKAGE.glob("*.py")} <= {"__init__", *LEFT_OF_ALL}


@pytest.mark.parametrize("path", [x for x in FILES if layer_of(name_of(x)) in TORCH_ALONE], ids=name_of)
def test_ops_and_modules_need_torch_alone(path):
    outside = {name.split(".")[0] for name in parsed(path)} - {"mmicl_kernels"}
    foreign = outside - {"torch", *sys.stdlib_module_names}
    allowed = {"triton"} if is_triton(path) else set()
    assert foreign <= allowed, f"{name_of(path)} imports {sorted(foreign - allowed)}"


@pytest.mark.parametrize("path", [x for x in FILES if layer_of(name_of(x)) in TORCH_ALONE], ids=name_of)
def test_triton_files_are_imported_inside_functions(path):
    """Importing an op must not import Triton."""
    if is_triton(path):
        return
    tree = ast.parse(path.read_text())
    top_level = ast.Module([x for x in tree.body if isinstance(x, ast.Import | ast.ImportFrom)], [])
    names = imports(top_level, name_of(path), path.name == "__init__.py")
    assert not [name for name in names if "_triton" in name.split(".")]


MODULES = {f"mmicl_kernels.{name_of(path)}".rstrip("."): path for path in FILES}
OPS = {module: path for module, path in MODULES.items() if layer_of(module) == "ops"}


@pytest.mark.parametrize("module", OPS)
def test_no_op_imports_what_is_private_to_another(module):
    """What ops share is in `_core`, which knows none of them."""
    own = module.split(".")[2:3]
    for name in inside(parsed(OPS[module])):
        other = name.split(".")[2:]
        if layer_of(name) == "ops" and other[:1] not in (own, ["_core"]):
            assert own != ["_core"], f"{module} imports {name}"
            assert not any(part.startswith("_") for part in other), f"{module} imports {name}"


def packages(module: str) -> set[str]:
    parts = module.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))}


def dependencies(modules: dict[str, Path]) -> dict[str, set[str]]:
    """What each module imports of them, with the packages that run before it, but for its own."""
    found = {}
    for module, path in modules.items():
        names = parsed(path)
        targets = {name if name in modules else name.rpartition(".")[0] for name in names} & modules.keys()
        around = set().union(*map(packages, targets)) & modules.keys() - packages(module)
        found[module] = (targets | around) - {module}
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A way from a module back to it; empty if there is none."""
    done = set()

    def walk(module, way):
        if module in way:
            return [*way[way.index(module) :], module]
        ways = () if module in done else (walk(x, [*way, module]) for x in sorted(graph[module]))
        found = next(filter(None, ways), [])
        done.add(module)
        return found

    return next(filter(None, (walk(module, []) for module in graph)), [])


def test_nothing_is_imported_in_a_circle():
    """Not inside functions either, nor for annotations alone."""
    found = circle(dependencies(MODULES))
    assert not found, " -> ".join(found)


def test_circles_are_found():
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_layers_that_hold_models_name_no_foreign_package_but_theirs():
    allowed = {
        "data": {"PIL", "numpy", "sklearn", "transformers"},
        "methods": {"safetensors", "transformers"},
        "store": {"safetensors", "huggingface_hub", "numpy"},
        "models": {"transformers"},
        "patch": {"transformers", "tqdm"},
        "training": {"numpy", "tqdm", "transformers", "accelerate", "matplotlib"},
        "evaluation": {
            "numpy",
            "nltk",
            "inflection",
            "safetensors",
            "transformers",
            "tqdm",
            "matplotlib",
            "lmms_eval",
        },
    }
    for path in FILES:
        layer = layer_of(name_of(path))
        if layer in allowed:
            outside = {name.split(".")[0] for name in parsed(path)}
            foreign = outside - {"mmicl_kernels", "torch", *sys.stdlib_module_names} - allowed[layer]
            assert not foreign, f"{name_of(path)} imports {sorted(foreign)}"


def test_the_walk_sees_every_kind_of_import():
    source = """
import a.b
from c import d
def f():
    from . import e
    from ..g import h
    importlib.import_module("i.j")
"""
    assert imports(ast.parse(source), "ops.x.api", False) == {
        "a.b", "c.d", "mmicl_kernels.ops.x.e", "mmicl_kernels.ops.g.h", "i.j",
    }  # fmt: skip
    assert imports(ast.parse("from . import e"), "ops.x", True) == {"mmicl_kernels.ops.x.e"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_sizes(path):
    """Docstrings do not count against a function: public ones are long on purpose."""
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                length -= node.body[0].end_lineno - node.body[0].lineno + 1
            kernel = is_triton(path) and node.name.endswith("_kernel")
            assert length < (150 if kernel else MAX_FUNCTION_LINES), f"{node.name} has {length} lines"


def test_folders_are_small():
    for folder in {path.parent for path in FILES}:
        files = [x.name for x in folder.iterdir() if x.is_file() and x.suffix != ".so"]
        assert len(files) <= MAX_FILES, f"{folder} has {sorted(files)}"
    handle = PACKAGE / "patch" / "handle.py"
    assert len(handle.read_text().splitlines()) < 250


@pytest.mark.parametrize(
    "path", [x for x in FILES if layer_of(name_of(x)) not in ("methods", "")], ids=name_of
)
def test_no_method_is_named_outside_of_methods(path):
    """Others know where a method acts, not which it is. Lazy names are strings."""
    names = re.compile(r"(MimIC|AIM|LIVE|M2IV|HiFICL|PromptTuning|STAVE)(Adapter|Config|Objective)")
    tree = ast.parse(path.read_text())
    found = {ast.unparse(x) for x in ast.walk(tree) if isinstance(x, ast.Name | ast.Attribute | ast.alias)}
    assert not [x for x in found if names.search(x)]
