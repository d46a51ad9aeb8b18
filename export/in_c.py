"""Operations of ours that are C in a compiled library, as torch's compiler wants to be told."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def shims(source: Path, *operations: Any) -> dict[Any, list[str]]:
    """`source` defines `aoti_torch_cpu_<name>` for each operation.

    The compiler writes `extern` before a text and `;` behind it, inside `extern "C"`, and calls what that declares.
    """
    text = f'int nightjar_{source.stem}_follows(void);\n#include "{source}"\n'
    return {operation: [text] if operation is operations[0] else [] for operation in operations}
