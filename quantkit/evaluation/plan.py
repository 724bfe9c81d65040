"""What is asked of every model of an evaluation alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from quantkit.engines import load_engine, scoring_engine
from quantkit.errors import EvaluationError
from quantkit.models.engine_config import EngineConfig, Option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from quantkit.engines.base import Engine
    from quantkit.evaluation.perplexity import Windows
    from quantkit.evaluation.prompt_file import Prompts
    from quantkit.models.variant import Model


@dataclass(frozen=True)
class EvaluationPlan:
    """What is asked of every model alike.

    ``texts``: their windows by name, and ``prompts``: the user's own, None where there are none.
    ``tokenizer`` and ``max_length`` (tokens) are the source's: questions become the same ids on
    every engine.
    ``engine``: for the models that it takes; the one that gives full logits for the others, and
    where None. ``engine_options``: of each, by the engine's name. ``shots``, ``limit`` and
    ``chat``: see ``run_task``. ``data``: where tasks find their questions, by the task's name
    (``mmlu_csv``).
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    texts: Mapping[str, Windows] = field(default_factory=dict)
    prompts: Prompts | None = None
    tasks: tuple[str, ...] = ()
    shots: int | None = None
    limit: int | None = None
    chat: bool = False
    data: Mapping[str, str] = field(default_factory=dict)
    engine: EngineConfig | None = None
    engine_options: Mapping[str, Mapping[str, Option]] = field(default_factory=dict)

    @cached_property
    def files(self) -> dict[str, str]:
        """sha256 by path of the local files that the tasks read."""
        from quantkit.evaluation.task_files import digests

        return digests(self.tasks, self.data)

    def engine_of(self, model: Model) -> Engine:
        """The engine that measures a model.

        Raise ToolchainError or IncompatibleVariant where it cannot load the model, EvaluationError
        where it gives no logits and a text or prompts need them.
        """
        config = self._config(model)
        engine = load_engine(config.having(self.engine_options.get(config.name, {})))
        engine.check(model)
        if engine.capabilities.logits != "full" and (self.texts or self.prompts):
            raise EvaluationError(
                f"{engine.name} gives no logits of the whole vocabulary, which the metrics of a "
                f"text and of prompts need ({model.path}); take --eval tasks alone, or leave out "
                f"--engine: {scoring_engine(model).name} gives them"
            )
        return engine

    def engine_names(self, models: Iterable[Model]) -> list[str]:
        """Which engines measure these models."""
        return [self._config(model).name for model in models]

    def _config(self, model: Model) -> EngineConfig:
        if self.engine and model.format in load_engine(self.engine).capabilities.formats:
            return self.engine
        return EngineConfig(name=scoring_engine(model).name)
