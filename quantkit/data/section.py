"""The section of a recipe that says what quantizers are calibrated on."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from quantkit.data.mix import parse_mix
from quantkit.system.devices import AUTO, Precision
from quantkit.system.yaml_file import Section, as_value_error


def _mix(text: Any) -> Any:
    if isinstance(text, dict):
        with as_value_error():
            parse_mix(text)
    return text


class CalibrationSection(Section):
    """Which text the quantizers see, and how much of it."""

    text: Annotated[str | dict[str, Any], BeforeValidator(_mix)] = "mix"
    """A mix by its name (``mix``, ``mix:hub``), one text by its name or file, or a mix of your own:
    ``{code: {text: ./src.txt, share: 0.3}, …}``."""
    samples: int = Field(128, ge=1)
    """Number of windows taken from the text."""
    sequence_length: int = Field(512, ge=8)
    """Length of each window, in tokens."""
    seed: int = 0
    """Seed of the random choice of windows."""
    device: str = AUTO
    """Where calibration and the native quantizers run: ``cpu``, ``cuda``, ``cuda:N``, ``auto``."""
    precision: Precision = "auto"
    """What matrix products are computed in; ``auto`` is bfloat16 where that is faster, else
    float32. float64 is slow, and gives the same integers on every device."""

    def windows(self) -> dict[str, Any]:
        """How the text is cut and sampled, and where it runs: the keywords of ``calibrate``."""
        return self.model_dump(exclude={"text"})
