"""Recipes: YAML files that say what a run makes and measures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from quantkit.brought import Brought
from quantkit.devices import AUTO, Precision
from quantkit.errors import RecipeError, did_you_mean
from quantkit.ledger.load import Arrivals, Slo
from quantkit.mix import parse_mix
from quantkit.packaged import packaged_files
from quantkit.spec import Spec
from quantkit.yaml_file import first_problem, read_yaml


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _variant(entry: Any) -> Spec | Brought:
    """What an entry of ``convert`` says: what to make, or what somebody else made."""
    if isinstance(entry, dict) and "path" in entry:
        return Brought.of_entry(entry)
    return Spec.of_entry(entry)


def _entry(entry: Any) -> Any:
    try:
        _variant(entry)
    except RecipeError as error:
        raise ValueError(str(error)) from error
    return entry


def _mix(text: Any) -> Any:
    if isinstance(text, dict):
        try:
            parse_mix(text)
        except RecipeError as error:
            raise ValueError(str(error)) from error
    return text


class CalibrationSection(_Section):
    """Which text the quantizers see, and how much of it."""

    text: Annotated[str | dict[str, Any], BeforeValidator(_mix)] = "mix"
    """A mix by its name (``mix``, ``mix:hub``), one text by its name or file, or a mix of your own:
    ``{code: {text: ./src.txt, share: 0.3}, …}``."""
    samples: int = Field(128, ge=1)
    """Number of windows that are taken from the text."""
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


class EvaluateSection(_Section):
    """What is measured of every variant: texts, and lm-eval tasks by name or YAML file."""

    texts: list[str] = Field(default_factory=lambda: ["wikitext-2:test"])
    """Texts by name, such as ``pydoc:evaluation``, or UTF-8 files, each measured for itself;
    ``[]``: none."""
    context: int = Field(512, ge=16)
    """Length of each window of a text, in tokens: llama.cpp's n_ctx."""
    windows: int | None = Field(None, ge=1)
    """Number of windows that are read of each text, from its beginning; null: all."""
    split_windows: int | None = Field(None, ge=2)
    """Number of windows of the first text over which each loss is split into conversion,
    quantization and engine; null: it is not split."""
    tasks: list[str] = Field(default_factory=list)
    """lm-eval tasks by name, such as ``mmlu``, or YAML files of your own."""
    shots: int | None = Field(None, ge=0)
    """Number of solved examples before each question; null: the task's own."""
    limit: int | None = Field(None, ge=1)
    """Number of questions in each task, and in each subject of a task that has subjects; null:
    all."""
    until: Literal["decided"] | None = None
    """``decided``: ask in random order, and stop when every verdict is decided."""
    prompts: str | None = None
    """File of prompts whose greedy answers are compared, one JSON object a line; or ``everyday``:
    the two dozen that come with quantkit."""
    answer_tokens: int = Field(128, ge=1)
    """Longest answer to a prompt, in tokens."""
    tolerance: float = Field(1.0, gt=0, lt=100)
    """Largest difference that counts as none: in points of accuracy, and in percent of
    perplexity."""
    chat: bool = False
    """Ask each question as a user's message in the model's chat template."""
    engine: str | None = None
    """Engine that measures the formats that it takes; for others, and where null, the one that
    gives full logits."""
    data: dict[str, str] = Field(default_factory=dict)
    """Where tasks find their data on this machine, by the task's name: ``mmlu_csv`` and
    ``wikitext_file``."""


WORKLOADS = {"chat": (512, 128), "summarize": (2048, 128), "long_output": (128, 512)}
"""Tokens of prompt and of output, by the workload's name."""


class BenchSection(_Section):
    """The load: which requests, how many at a time or a second, for how long and how often."""

    engines: list[str] = Field(default_factory=list)
    """Engines that serve: each variant on each of them that takes it. Where there is none, the
    first that serves the format."""
    concurrency: list[Annotated[int, Field(ge=1)]] | Literal["auto"] = Field(
        default_factory=lambda: [1, 4]
    )
    """Requests at the same time; ``auto`` tries 1, 2, 4 … until throughput stops growing."""
    rates: list[Annotated[float, Field(gt=0)]] = Field(default_factory=list)
    """Requests per second, sent whether or not earlier ones are answered."""
    arrivals: Arrivals = "poisson"
    """How the requests of ``rates`` and ``slo`` arrive: at random times, or evenly."""
    slo: Slo | None = None
    """``{ttft_ms: 500, itl_ms: 50, share: 0.95}``: goodput is the highest rate that meets it."""
    workload: Literal["chat", "summarize", "long_output"] | None = None
    """Lengths of prompt and answer by name, in tokens: 512 and 128, 2048 and 128, 128 and 512."""
    prompt_tokens: int | None = Field(None, ge=1)
    """Length of each prompt, in tokens; null: that of ``workload``, or 128."""
    output_tokens: int | None = Field(None, ge=2)
    """Length of each answer, in tokens, which all have exactly; null: that of ``workload``, or
    32."""
    prompts: str | None = None
    """File of your own prompts, one JSON object a line as for ``evaluate.prompts``; null: synthetic
    ones."""
    prefix_cache: bool = False
    """Let engines reuse what prompts have in common; false: each prompt is new to them."""
    seconds: float = Field(15.0, gt=0)
    """Length of each repetition, in seconds, after its warm-up."""
    repetitions: int = Field(3, ge=1)
    """How often each load is repeated; results are medians and carry their spread."""
    budget_seconds: float | None = Field(None, gt=0)
    """Time for all loads of one variant on one engine, in seconds: windows and repetitions are cut
    to fit, and the results say so; null: no limit."""
    price_per_hour: float | None = Field(None, gt=0)
    """Price of this machine per hour, in your currency: gives the cost per million tokens."""

    @model_validator(mode="after")
    def _one_workload(self) -> Self:
        lengths = self.prompt_tokens is not None or self.output_tokens is not None
        if self.workload and (lengths or self.prompts):
            raise ValueError("give either workload, or lengths or prompts of your own")
        if self.prompts and self.prompt_tokens is not None:
            raise ValueError("prompts have lengths of their own: leave prompt_tokens out")
        return self

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of each prompt (where they are synthetic) and of each output."""
        prompt, output = WORKLOADS[self.workload] if self.workload else (128, 32)
        return self.prompt_tokens or prompt, self.output_tokens or output


class Recipe(_Section):
    """One run. ``evaluate`` or ``bench`` null leaves it out."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run, and of its directory under runs/."""
    description: str = ""
    """What the run is for, shown in its report."""
    source: str
    """A directory, a hub id such as ``org/name@revision``, or ``demo:smollm2-135m``."""
    calibration: CalibrationSection = CalibrationSection()
    """The text that GPTQ, AWQ and importance matrices are fitted to."""
    convert: list[Annotated[str | dict[str, Any], BeforeValidator(_entry)]]
    """The variants: ``gguf:Q4_K_M``, or ``spec: gguf:Q4_K_M`` with a ``name`` and with the format's
    options, or ``path: ./theirs``, made by somebody else and measured beside the others."""
    allow_tokenizer_differences: bool = False
    """Accept GGUF files with which llama.cpp splits some texts into other tokens than the source's
    tokenizer; their notes say which."""
    evaluate: EvaluateSection | None = EvaluateSection()
    """What is measured of every variant; null: nothing."""
    bench: BenchSection | None = BenchSection()
    """The load that every variant is put under; null: none."""

    @property
    def variants(self) -> list[Spec | Brought]:
        """The entries of ``convert``, parsed."""
        return [_variant(entry) for entry in self.convert]

    @property
    def specs(self) -> list[Spec]:
        """Those of them that are to be made."""
        return [entry for entry in self.variants if isinstance(entry, Spec)]


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by the name of a shipped one or by its path, with ``key=value`` overrides.

    Keys are dotted (``evaluate.windows=8``), values YAML. Raise RecipeError with the
    file, the line and the key of the first thing that is wrong.
    """
    path = find_recipe(name)
    text, content = read_yaml(path)
    for override in overrides:
        _override(content, override)
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise first_problem(Recipe, path, text, error) from error
    names = [entry.directory for entry in recipe.variants]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(
                f"{path}: convert has {name} more than once; give each its own `name`"
            )
    return recipe


def find_recipe(name: str) -> Path:
    """A path as given, or a recipe that quantkit ships, by its name."""
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise RecipeError(f"recipe {path}: no such file")
        return path
    shipped = {file.stem: file for file in packaged_files("recipes")}
    if name not in shipped:
        raise RecipeError(
            f"recipe {name!r}: no such file, and not a shipped recipe ({', '.join(shipped)})"
            + did_you_mean(name, shipped)
        )
    return shipped[name]


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override!r}: expected key=value, such as bench.seconds=30")
    *sections, last = key.split(".")
    for section in sections:
        if not isinstance(content.get(section), dict):
            content[section] = {}
        content = content[section]
    try:
        content[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override!r}: the value is not YAML") from error
