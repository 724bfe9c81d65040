"""The questions behind ``evals/*.yaml``, read from local files only."""

from __future__ import annotations

import csv
import json
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from quantkit.errors import EvaluationError

if TYPE_CHECKING:
    from datasets import Dataset

LETTERS = "ABCDE"
_QUESTION = re.compile(
    r"(.*?)\s*\n\s*\(A\)(.*?)\(B\)(.*?)\(C\)(.*?)\(D\)(.*?)(?:\(E\)(.*))?", re.DOTALL
)
_ANSWER = re.compile(r"\(([A-E])\)\.?\s*$")
_ARTICLE = re.compile(r"(?:(?<=\n)|^) ?\n(?= = [^=\n]+ = \n ?\n)")


def mmlu_dev(**_: Any) -> dict[str, Dataset]:
    """MMLU's dev questions as lm-eval carries them: split ``test`` of a ``custom_dataset``."""
    from datasets import Dataset

    return {"test": Dataset.from_list(dev_questions())}


def mmlu_csv(subject: str, mmlu_csv: str | None = None, **_: Any) -> dict[str, Dataset]:
    """One subject of MMLU, splits dev and test, from the CSV files that its authors published, or
    from a copy of the hub's ``cais/mmlu``, which holds a directory of Parquet files a subject."""
    from datasets import Dataset

    layout = "MMLU's dev/*_dev.csv and test/*_test.csv"
    directory = _given("mmlu_csv", mmlu_csv, f"the directory of {layout}")
    if (directory / subject).is_dir():
        return {split: _parquet(directory / subject, split) for split in ("dev", "test")}
    return {
        split: Dataset.from_list(csv_questions(directory / split / f"{subject}_{split}.csv"))
        for split in ("dev", "test")
    }


def wikitext_file(wikitext_file: str | None = None, **_: Any) -> dict[str, Dataset]:
    """The articles of a WikiText file, split ``test``: one ``page`` each.

    An article starts with a heading of the first level, `` = Title = ``, between empty lines.
    """
    from datasets import Dataset

    path = _given("wikitext_file", wikitext_file, "a file such as wiki.test.raw")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read: {error}") from error
    pages = [page for page in _ARTICLE.split(text) if page.strip()]
    if not pages:
        raise EvaluationError(f"{path}: no text in it")
    return {"test": Dataset.from_list([{"page": page} for page in pages])}


def json_lines(file: str, directory: str, **_: Any) -> dict[str, Dataset]:
    """The questions of a file with one JSON object a line, split ``test``.

    ``file``: in ``directory``, which is the task's own. Raise EvaluationError with the line that
    is not one, or has other keys than the first.
    """
    from datasets import Dataset

    path = Path(directory) / Path(file).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read: {error}") from error
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise EvaluationError(f"{path}: line {number}: not JSON: {error}") from error
        if not isinstance(entry, dict) or (found and entry.keys() != found[0].keys()):
            keys = ", ".join(found[0]) if found else "a question"
            raise EvaluationError(f"{path}: line {number}: expected a JSON object with {keys}")
        found.append(entry)
    if not found:
        raise EvaluationError(f"{path}: no questions; expected one JSON object a line")
    return {"test": Dataset.from_list(found)}


@cache
def dev_questions() -> list[dict[str, Any]]:
    """Subject, question, choices and the answer's index of all that lm-eval carries.

    They are the examples of its chain-of-thought task: 282 of the 285 that were published (it
    lacks one each of college_chemistry, formal_logic and human_aging). One of them has five
    choices (its published key was wrong). Raise EvaluationError where one cannot be read.
    """
    import lm_eval

    directory = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "flan_cot_fewshot"
    found = []
    for path in sorted(directory.glob("mmlu_*.yaml")):
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
        subject = task["dataset_name"].replace("_", " ")
        found += [
            {"subject": subject, **_parse(path, sample["question"], sample["target"])}
            for sample in task["fewshot_config"]["samples"]
        ]
    if not found:
        raise EvaluationError(f"{directory}: no MMLU questions in this version of lm-eval")
    return found


def csv_questions(path: Path) -> list[dict[str, Any]]:
    """Question, four choices and the answer's index of every row; no header."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
    except FileNotFoundError as error:
        raise EvaluationError(
            f"{path}: no such file; expected MMLU's CSV layout, dev/*_dev.csv and test/*_test.csv"
        ) from error
    for number, row in enumerate(rows, start=1):
        if len(row) != 6 or row[5] not in tuple(LETTERS[:4]):
            raise EvaluationError(
                f"{path}: row {number}: expected a question, four choices and a letter A to D, "
                f"found {len(row)} fields"
            )
    return [
        {"question": row[0], "choices": row[1:5], "answer": LETTERS.index(row[5])} for row in rows
    ]


def _parquet(directory: Path, split: str) -> Dataset:
    """``test-00000-of-00001.parquet`` and any more of the split."""
    from datasets import Dataset
    from pyarrow import ArrowInvalid, concat_tables
    from pyarrow.parquet import read_table

    files = sorted(directory.glob(f"{split}-*.parquet"))
    columns = ["question", "choices", "answer"]
    try:
        table = concat_tables(read_table(file, columns=columns) for file in files)
    except (ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())
        raise EvaluationError(
            f"{directory}: expected {split}-*.parquet with {', '.join(columns)}, as the hub's "
            f"cais/mmlu has them: {reason}"
        ) from error
    return Dataset(table)


def _parse(path: Path, text: str, target: str) -> dict[str, Any]:
    """``question \\n(A) … (B) … (C) … (D) …`` and ``… The answer is (C).`` taken apart."""
    match = _QUESTION.fullmatch(text)
    answer = _ANSWER.search(target)
    if match is None or answer is None:
        raise EvaluationError(f"{path}: cannot read this question: {text[:80]!r}")
    question, *choices = (part.strip() for part in match.groups() if part is not None)
    return {"question": question, "choices": choices, "answer": LETTERS.index(answer[1])}


def _given(task: str, path: str | None, what: str) -> Path:
    if not path:
        raise EvaluationError(
            f"{task}: its data is local; say where it is: --eval-data {task}=PATH (in a "
            f"recipe evaluate.data.{task}), {what}"
        )
    return Path(path).expanduser()
