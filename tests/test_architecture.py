"""The rooms of docs/architecture.md: who may import whom, read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import meshlm

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "config": set[str](),
    "policies": {"config"},
    "mesh": {"config"},
    "kernels": {"config"},
    "shardformer": {"config", "policies", "mesh", "kernels"},
    "engine": {"config", "policies", "mesh", "kernels", "shardformer"},
    "serving": {"config", "policies", "mesh", "kernels", "shardformer", "engine"},
}
MODULES = {
    ".".join(("meshlm", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): file
    for room in MAY_IMPORT
    for file in (ROOT / room).rglob("*.py")
}


def imports(module: str, at_module_level: bool = False) -> Iterator[str]:
    """Full names of the modules that one imports; relative imports resolved, `from package import module` too."""
    file = MODULES[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(file.read_text())
    nodes = list(_module_level(tree)) if at_module_level else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            names = [f"{base}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else base for name in names)


def _module_level(node: ast.AST) -> Iterator[ast.AST]:
    """Statements that run when the module is imported; `if TYPE_CHECKING` does not."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for other in child.orelse:
                yield other
                yield from _module_level(other)
            continue
        yield child
        yield from _module_level(child)


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "meshlm" and len(parts) > 1 else None


def test_the_rooms_are_these() -> None:
    packages = {file.parent.name for file in ROOT.glob("*/__init__.py")} - {"meshlm", "build"}
    assert packages == set(MAY_IMPORT), "a new room must be given its place here and in docs/architecture.md"
    assert len(MODULES) > 30


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    room = room_of(module)
    assert room is not None
    for imported in imports(module):
        if imported.split(".")[0] != "meshlm":
            continue
        assert room_of(imported) is not None, f"{module} imports the package's top, which imports everything"
        assert room_of(imported) in MAY_IMPORT[room] | {room}, f"{module} must not import {imported}"


def test_nothing_imports_itself_in_a_circle() -> None:
    edges = {
        module: {name for name in imports(module, at_module_level=True) if name in MODULES and name != module}
        for module in MODULES
    }
    state: dict[str, str] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert state.get(module) != "open", f"circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module in state:
            return
        state[module] = "open"
        for other in sorted(edges[module]):
            visit(other, (*path, module))
        state[module] = "done"

    for module in MODULES:
        visit(module, ())


def reached(module: str, seen: set[str]) -> set[str]:
    """Everything that importing a module's own file, and what that imports, brings in; packages' own files aside."""
    if module in seen:
        return seen
    seen.add(module)
    if module in MODULES:
        for name in imports(module, at_module_level=True):
            reached(name, seen)
    return seen


@pytest.mark.parametrize("name", ["sequence", "block_manager", "scheduler", "step", "speculation"])
def test_bookkeeping_knows_no_torch(name: str) -> None:
    outside = {n.split(".")[0] for n in reached(f"meshlm.engine.{name}", set()) if not n.startswith("meshlm")}
    assert outside <= sys.stdlib_module_names


def test_policies_are_data() -> None:
    for module in MODULES:
        if room_of(module) == "policies":
            outside = {n.split(".")[0] for n in imports(module) if not n.startswith("meshlm")}
            assert outside <= sys.stdlib_module_names, f"{module} imports {outside - sys.stdlib_module_names}"


@pytest.mark.parametrize("module", MODULES)
def test_optional_packages_are_not_needed_to_import(module: str) -> None:
    """Files of Triton kernels need triton; no other brings one in but the table of them, which `ops` imports late."""
    found = {name.split(".")[0] for name in imports(module, at_module_level=True)}
    assert "flash_attn" not in found
    if room_of(module) == "kernels" and ("triton" in found or module == "meshlm.kernels.triton_ops"):
        return
    assert "triton" not in {name.split(".")[0] for name in reached(module, set())}


def test_importing_the_package_does_not_import_torch() -> None:
    program = "import sys, meshlm; meshlm.SamplingParams; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", program], check=True, cwd=ROOT.parent)


def test_importing_the_engine_imports_nothing_heavy_but_torch() -> None:
    """What is here takes from a tenth of a second to several; it is imported when something asks for it, if at all."""
    heavy = (
        "transformers tokenizers huggingface_hub triton fastapi uvicorn sympy torch._dynamo torch.distributed.tensor"
    )
    program = f"import sys, meshlm; meshlm.AsyncInferenceEngine; print(*set('{heavy}'.split()) & set(sys.modules))"
    run = subprocess.run([sys.executable, "-P", "-c", program], check=True, cwd=ROOT.parent, capture_output=True)
    assert run.stdout.split() == []


def test_a_program_started_in_this_folder_can_use_transformers() -> None:
    """There `import kernels`, which transformers tries, finds our folder: it must do no harm, and so imports no other
    room before something is called."""
    program = "import kernels; from transformers import LlamaConfig; LlamaConfig()"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_every_public_name_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [name for name in meshlm.__all__ if f"`{name}`" not in readme] == []
