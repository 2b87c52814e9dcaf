"""The import table of the design, enforced: who may import what, and what must import on a bare GPU machine."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STDLIB = set(sys.stdlib_module_names)
BASE = {"tasks.records", "tasks.errors"}

# One library (a family counts as one) that each backend wraps; a module not listed here wraps the standard library only.
WRAPPED: dict[str, set[str]] = {
    "allocator": {"torch"},
    "changed_listing": set(),
    "chunker": {"llama_index"},
    "device_memory": {"torch", "psutil"},
    "encoder": set(),
    "fake_encoder": set(),
    "host_sampler": {"psutil"},
    "memory_store": set(),
    "model_files": {"huggingface_hub"},
    "nvml": {"pynvml"},
    "process_encoder": {"transformers"},
    "processes": set(),
    "fake_qdrant_grpc": {"qdrant_client", "grpc"},
    "fake_qdrant_server": {"qdrant_client"},
    "filesystem": {"fsspec"},
    "grpc_points": {"qdrant_client"},
    "listing": {"fsspec"},
    "pieces": set(),
    "points": {"qdrant_client"},
    "qdrant": {"qdrant_client"},
    "qdrant_batches": set(),
    "qdrant_calls": {"qdrant_client", "tenacity"},
    "qdrant_catalog": {"qdrant_client"},
    "qdrant_collections": {"qdrant_client"},
    "qdrant_connection": {"qdrant_client", "portalocker"},
    "qdrant_documents": {"qdrant_client"},
    "qdrant_faults": {"qdrant_client", "grpc"},
    "qdrant_ledger": {"qdrant_client"},
    "qdrant_pages": {"qdrant_client"},
    "readers": {"bs4", "docx2txt", "fsspec", "markdownify", "pypdf", "yaml"},
    "sampler": set(),
    "sources": set(),
    "spool": {"pyarrow", "fsspec", "portalocker"},
    "spool_reports": {"pydantic"},
    "tables": {"pyarrow", "fsspec"},
    "tcp_relay": set(),
    "texts": set(),
    "tokenizer": {"tokenizers", "transformers"},
    "torch_encoder": {"torch"},
    "torch_model": {"torch", "sentence_transformers", "transformers"},
}
# Libraries that must not load when a module is imported, only when it is used.
HEAVY = {
    "torch",
    "transformers",
    "sentence_transformers",
    "llama_index",
    "qdrant_client",
    "pyarrow",
    "pynvml",
    "prefect",
}


def modules(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Each imported module and whether importing `path` loads it (a type-checking block does not)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node, at_import in walk(tree, at_import=True):
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from (
                (f"{node.module}.{alias.name}" if node.module in ("tasks", "flows") else node.module, at_import)
                for alias in node.names
            )


def walk(node: ast.AST, *, at_import: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        is_typing_block = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        is_lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        inside = at_import and not is_typing_block and not is_lazy
        yield child, inside
        yield from walk(child, at_import=inside)


def is_allowed(name: str, prefixes: set[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def allowed_for(path: Path) -> set[str]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    match parts:
        case ("tasks", "records" | "errors"):
            return STDLIB | {"numpy", "tasks.errors"}
        case ("tasks", "url_secrets"):
            return STDLIB
        case ("tasks", "config"):
            return STDLIB | {"numpy", "pydantic", "tasks.url_secrets"} | BASE
        case ("tasks", "observe"):
            return STDLIB | BASE
        case ("tasks", "policy", _):
            # Pure: no clock, no environment, no I/O. The standard library's doors to them are closed below.
            return (
                (STDLIB - {"os", "time", "random", "io", "subprocess", "socket", "threading"})
                | {"numpy", "tasks.policy"}
                | BASE
            )
        case ("tasks", "backends", name):
            return STDLIB | {"numpy", "tasks.backends", "tasks.config", "tasks.url_secrets"} | BASE | WRAPPED[name]
        case ("tasks", "engine", "llama_index_embedding"):
            # LlamaIndex's own class over our encoder: it wires, as the rest of the engine does.
            return (
                STDLIB
                | {"numpy", "torch", "llama_index", "tqdm"}
                | {"tasks.policy", "tasks.backends", "tasks.engine", "tasks.config"}
                | BASE
            )
        case ("tasks", "engine", _):
            return (
                STDLIB
                | {
                    "numpy",
                    "tenacity",
                    "tasks.policy",
                    "tasks.backends",
                    "tasks.engine",
                    "tasks.config",
                    "tasks.observe",
                }
                | BASE
            )
        case ("tasks", "exclusive"):
            return STDLIB | {"prefect", "httpx", "tasks"}
        case ("tasks", "server_calls"):
            return STDLIB | {"prefect", "httpx", "tenacity"} | BASE
        case ("tasks", "picture"):
            return STDLIB | {"numpy", "matplotlib", "PIL", "tasks.tables"} | BASE
        case ("tasks", "metrics"):
            return STDLIB | {"prometheus_client", "tasks.observe"} | BASE
        case ("tasks", _):
            return STDLIB | {"numpy", "prefect", "pydantic", "tasks"}
        case ("flows", "cli" | "cli_exit" | "cli_options" | "cli_state" | "progress" | "terminal"):
            return STDLIB | {"typer", "rich", "click", "pydantic", "prefect", "flows", "tasks"}
        case ("flows", "cli_deploy"):
            return STDLIB | {"typer", "flows", "tasks", "deployments.receiver"}
        case ("flows", name) if name.startswith("setup_"):
            return STDLIB | {"prefect", "pydantic", "yaml", "httpx", "apprise", "flows", "tasks"}
        case ("flows", _):
            return STDLIB | {"prefect", "flows", "tasks", "uvicorn", "httpx"}
        case ("deployments", "receiver", _):
            return STDLIB | {"prefect", "fastapi", "starlette", "uvicorn", "httpx", "pydantic", "deployments", "tasks"}
    raise AssertionError(f"{path}: where does this module belong?")


@pytest.mark.parametrize(
    "path",
    modules("tasks") + modules("flows") + modules("deployments"),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_imports_follow_the_table(path: Path) -> None:
    allowed = allowed_for(path)
    offending = sorted({name for name, _ in imports(path) if not is_allowed(name, allowed)})
    assert not offending, f"{path.relative_to(ROOT)} imports {offending}"


@pytest.mark.parametrize(
    "path", modules("tasks/backends") + modules("tasks/engine") + modules("tasks/policy"), ids=lambda path: path.stem
)
def test_heavy_libraries_load_lazily(path: Path) -> None:
    heavy = sorted({name for name, at_import in imports(path) if at_import and name.split(".")[0] in HEAVY})
    # A subclass needs its base class when it is defined: this module exists to be imported by LlamaIndex programs.
    if path.stem != "llama_index_embedding":
        assert not heavy, f"{path.relative_to(ROOT)} loads {heavy} at import"


def test_policy_reads_no_environment_and_no_clock() -> None:
    for path in modules("tasks/policy"):
        source = path.read_text(encoding="utf-8")
        assert "environ" not in source, path
        assert "datetime.now" not in source, path


def test_gpu_machine_needs_no_orchestration_packages() -> None:
    """The encoder, the memory model, the planner and the ladder import where there is only torch and numpy."""
    blocked = [
        "prefect",
        "llama_index",
        "qdrant_client",
        "pydantic",
        "pyarrow",
        "fsspec",
        "psutil",
        "pynvml",
        "rich",
        "typer",
    ]
    names = [
        "tasks.backends.torch_encoder",
        "tasks.backends.process_encoder",
        "tasks.engine.cpu_pool",
        "tasks.backends.fake_encoder",
    ]
    names += ["tasks.policy." + path.stem for path in modules("tasks/policy")]
    names += ["tasks.engine.embed_nodes", "tasks.engine.calibrate", "tasks.observe"]
    script = (
        f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
        f"import importlib\nfor name in {names}: importlib.import_module(name)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
