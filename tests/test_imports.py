"""Where heavy libraries may be imported. The direction between our own packages is import-linter's, in `make lint`."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

from pictures import write_folder

ROOT = Path(__file__).resolve().parents[1]
TORCH = {"engines/aoti_gpu.py"}  # a CUDA package runs in torch alone; everything else does without
GPU_LIBRARIES = {"cvcuda", "nvidia", "tensorrt", "tensorrt_rtx", "cuda", "cupy", "pycuda"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def by_file() -> dict[str, set[str]]:
    paths = [path for package in ("export", "engines", "pipeline") for path in (ROOT / package).rglob("*.py")]
    return {str(path.relative_to(ROOT)): imports(path) for path in paths}


def test_torch_and_transformers_stay_where_they_belong() -> None:
    files = {file: names for file, names in by_file().items() if not file.startswith("export/")}
    assert {file for file, names in files.items() if "torch" in names} <= TORCH
    assert not {file for file, names in files.items() if "transformers" in names}


def test_gpu_libraries_are_imported_in_gpu_files_alone() -> None:
    wrong = {file for file, names in by_file().items() if names & GPU_LIBRARIES and not file.endswith("_gpu.py")}
    assert not wrong


def test_batch_imports_nothing_of_ours() -> None:
    assert not imports(ROOT / "pipeline/batch.py") & {"export", "engines", "pipeline"}


def test_the_coordinator_loads_no_torch() -> None:
    """A nightly run with nothing to do must not pay for it."""
    code = "import sys, pipeline.index; sys.exit('torch' in sys.modules or 'onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_running_coordinator_loads_no_torch(tiny_model: Path, tmp_path: Path) -> None:
    """Lanes do the work; the process that holds the store stays light for 100 million pictures."""
    write_folder(tmp_path / "photos", 3)
    code = (
        "import sys; from pipeline.index import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'onnxruntime', 'transformers'} & set(sys.modules); sys.exit(str(heavy) if heavy else code)"
    )
    options = ["--source", "folder", "--root", tmp_path / "photos", "--out", tmp_path / "index", "--model", tiny_model]
    ran = subprocess.run([sys.executable, "-c", code, *map(str, options)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.strip().splitlines()[-1])["embedded"] == 3
