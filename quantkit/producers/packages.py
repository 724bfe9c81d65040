"""The packages that make GPTQ and AWQ here, and what each may be told."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from quantkit.producers.package import Package, Schemes


class PackageOptions(BaseModel):
    """Options under the package's own names; no value is taken for one of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class AutoRoundOptions(PackageOptions):
    """Options of ``auto_round.AutoRound``."""

    iters: int = Field(200, ge=0)
    """Steps of tuning for each block; 0: no tuning, scales by activations only."""
    batch_size: int = Field(8, ge=1)
    lr: float | None = Field(None, gt=0)


class AutoRound(Package):
    """Cheng et al. 2023, arXiv 2309.05516: rounding learned by signed gradients."""

    name = "auto-round"
    script = "with_auto_round.py"
    schemes: ClassVar[dict[str, Schemes]] = {
        "gptq": ((4, 8), (32, 64, 128, -1)),
        "awq": ((4,), (32, 64, 128)),
    }
    options = AutoRoundOptions


class AutoAWQOptions(PackageOptions):
    """Options of ``AutoAWQForCausalLM.quantize``."""

    apply_clip: bool = True
    duo_scaling: bool = True
    n_parallel_calib_samples: int | None = Field(None, ge=1)
    """Samples that are run at a time; all of them where null."""


class AutoAWQ(Package):
    """Lin et al. 2023, arXiv 2306.00978, in what was its standard implementation."""

    name = "autoawq"
    script = "with_autoawq.py"
    schemes: ClassVar[dict[str, Schemes]] = {"awq": ((4,), (32, 64, 128))}
    options = AutoAWQOptions
    transformers_4 = True


class AutoGPTQOptions(PackageOptions):
    """Options of ``auto_gptq.BaseQuantizeConfig`` and of its ``quantize``."""

    damp_percent: float = Field(0.01, gt=0, lt=1)
    desc_act: bool = False
    static_groups: bool = False
    true_sequential: bool = True
    batch_size: int = Field(1, ge=1)


class AutoGPTQ(Package):
    """Frantar et al. 2022, arXiv 2210.17323, in what was its standard implementation."""

    name = "auto-gptq"
    script = "with_auto_gptq.py"
    schemes: ClassVar[dict[str, Schemes]] = {"gptq": ((4, 8), (32, 64, 128, -1))}
    options = AutoGPTQOptions
    needs_cuda = True
    transformers_4 = True
