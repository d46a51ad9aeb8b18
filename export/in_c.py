"""Operations of ours that are C in a compiled library, as torch's compiler wants to be told."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def shims(source: Path, operation: Any) -> dict[Any, list[str]]:
    """`source` defines `aoti_torch_cpu_<name of operation>`.

    The compiler writes `extern` before the text and `;` behind it, inside `extern "C"`, and calls what that declares.
    """
    return {operation: [f'int nightjar_{source.stem}_follows(void);\n#include "{source}"\n']}
