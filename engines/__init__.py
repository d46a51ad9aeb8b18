"""Graph in, compiled engine out; engine in, vectors out.

`open_engine(artifact, "vision")` gives the fastest engine built for this host; naming a runtime that cannot be had is
an error with the reason and the command that fixes it.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from engines.spec import EngineCard


class Engine(Protocol):
    """Fixed batch shape, `slots` rotating input buffers. `b` is `card.batch`."""

    card: EngineCard
    slots: int

    def input(self, slot: int) -> npt.NDArray[Any]:
        """The buffer the stage before writes into: (b, 3, s, s) float32 for vision, (b, context) int32 for text."""
        ...

    def launch(self, slot: int, n: int) -> None:
        """Start the forward pass of rows [0, n) of `slot`; asynchronous where the device is."""
        ...

    def result(self, slot: int) -> npt.NDArray[np.float16]:
        """Wait for `slot` and give its (n, d) unit-norm vectors, on the host, in memory the caller owns."""
        ...
