"""Mixes of calibration texts: shares, windows, chats, the record, and what ships."""

from __future__ import annotations

import json
import random
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from quantkit.cli.main import cli
from quantkit.data.calibration import Calibration, calibrate, hash_ids, rendered
from quantkit.data.mix import MIXES, Mix, Part, allot, interleave, load_calibration
from quantkit.data.section import CalibrationSection
from quantkit.data.text import MissingText, Text, of_conversations, paragraphs
from quantkit.data.texts import NAMED, check_disjoint, load_text
from quantkit.errors import RecipeError
from quantkit.evaluation.questions import dev_questions
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.tokenizer import load_tokenizer
from quantkit.models.variant import read_manifest
from quantkit.producers.convert import convert
from quantkit.producers.gguf.importance import compute
from quantkit.runs.recipe import load_recipe
from quantkit.runs.stages import Texts
from quantkit.system.files import sha256_json
from tests.models import begin_with_bos, write_tokenizer

CHAT = (
    {"role": "user", "content": "Is the cat in?"},
    {"role": "assistant", "content": "It is out."},
)
IM = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


def shares(*values: str) -> list[Fraction]:
    return [Fraction(value) for value in values]


@pytest.mark.parametrize(
    ("parts", "available", "samples", "expected"),
    [
        (shares("0.5", "0.3", "0.2"), [99, 99, 99], 10, [5, 3, 2]),
        # 1.8, 1.4 and 0.8: the two largest remainders get the two that the floors leave.
        (shares("0.45", "0.35", "0.2"), [99, 99, 99], 4, [2, 1, 1]),
        # Equal remainders: the larger share, then the one named first.
        (shares("1/4", "1/4", "1/2"), [99, 99, 99], 1, [0, 0, 1]),
        (shares("1/3", "1/3", "1/3"), [99, 99, 99], 10, [4, 3, 3]),
        # The first has one; of the nine left, 3/5 and 2/5 are 5.4 and 3.6.
        (shares("0.5", "0.3", "0.2"), [1, 99, 99], 10, [1, 5, 4]),
        # What the first lacks makes the second too short as well.
        (shares("0.5", "0.3", "0.2"), [1, 4, 99], 10, [1, 4, 5]),
        (shares("0.5", "0.5"), [2, 3], 5, [2, 3]),
        (shares("0.5", "0.5"), [0, 3], 2, [0, 2]),
    ],
)
def test_allot_by_largest_remainder(
    parts: list[Fraction], available: list[int], samples: int, expected: list[int]
) -> None:
    assert allot(parts, available, samples) == expected


def test_allot_never_gives_more_than_there_is() -> None:
    chance = random.Random(0)
    for _ in range(300):
        kinds = chance.randint(1, 6)
        parts = [Fraction(chance.randint(1, 9), 10) for _ in range(kinds)]
        available = [chance.randint(0, 12) for _ in range(kinds)]
        samples = chance.randint(0, sum(available))
        given = allot(parts, available, samples)
        assert sum(given) == samples
        assert all(0 <= one <= has for one, has in zip(given, available, strict=True))
    with pytest.raises(ValueError, match="5 are fewer than 6"):
        allot(shares("0.5", "0.5"), [2, 3], 6)


def test_kinds_take_turns() -> None:
    # In the middle of their parts of the whole: 1/2; 1/6, 3/6 and 5/6.
    assert interleave([1, 3]) == [1, 0, 1, 1]
    assert interleave([2, 2, 0]) == [0, 1, 0, 1]


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    write_tokenizer(tmp_path)
    return load_tokenizer(tmp_path)


@pytest.fixture
def three() -> Mix:
    """Kinds that have no token in common."""
    texts = {
        "letters": " ".join(["abc"] * 3 + ["if"] * 2 + ["the"]) * 60,
        "digits": "0123456789" * 40,
        "signs": "()[]{}<>?!" * 40,
    }
    parts = [
        Part(kind, share, Text(f"{kind}.txt", "1", texts[kind]))
        for kind, share in zip(texts, shares("1/2", "1/4", "1/4"), strict=True)
    ]
    return Mix("own mix", tuple(parts))


def cut(mix: Text | Mix, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Calibration:
    return calibrate(mix, tokenizer, samples=8, sequence_length=16, seed=seed)


def where(window: torch.Tensor, stream: list[int]) -> int:
    """The index of a window among those that the stream is cut into."""
    length = len(window)
    found = [
        i
        for i in range(len(stream) // length)
        if stream[i * length : (i + 1) * length] == window.tolist()
    ]
    assert found, "the window is not one of this text's"
    return found[0]


def test_windows_of_a_mix_each_lie_in_one_kind(
    three: Mix, tokenizer: PreTrainedTokenizerBase
) -> None:
    found = cut(three, tokenizer)
    assert [kind.samples for kind in found.record.kinds] == [4, 2, 2]
    streams = [tokenizer(part.text.text).input_ids for part in three.parts]
    for kind, window in zip(interleave([4, 2, 2]), found.ids, strict=True):
        where(window, streams[kind])
    assert found.record.sha256 == hash_ids(found.ids.flatten().tolist())


def test_windows_of_a_mix_are_decided_by_the_seed_and_the_kind_alone(
    three: Mix, tokenizer: PreTrainedTokenizerBase
) -> None:
    found = cut(three, tokenizer)
    assert torch.equal(found.ids, cut(three, tokenizer).ids)
    assert found.record == cut(three, tokenizer).record
    assert not torch.equal(found.ids, cut(three, tokenizer, seed=1).ids)
    # Alone, a kind gives the same windows first.
    alone = cut(three.parts[0].text, tokenizer).ids
    mine = found.ids[[i for i, kind in enumerate(interleave([4, 2, 2])) if kind == 0]]
    assert torch.equal(mine, alone[:4])


def test_one_text_is_cut_as_a_mix_of_one_kind_and_recorded_as_itself(
    three: Mix, tokenizer: PreTrainedTokenizerBase
) -> None:
    text = three.parts[0].text
    found = cut(text, tokenizer)
    stream = torch.tensor(tokenizer(text.text).input_ids)
    windows = stream[: len(stream) // 16 * 16].view(-1, 16)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.ids, windows[order[:8]])
    assert (found.record.dataset, found.record.revision) == ("letters.txt", "1")
    assert (found.record.kinds, found.record.template) == ([], None)
    assert found.record.datasets == ("letters.txt",)


def test_each_window_of_a_mix_begins_with_bos_where_texts_do(three: Mix, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    begin_with_bos(tmp_path)
    found = cut(three, load_tokenizer(tmp_path)).ids
    assert found[:, 0].tolist() == [1] * 8
    assert not (found[:, 1:] == 1).any()


def test_a_kind_that_is_too_short_gives_all_and_says_so(
    three: Mix, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    short = Part("signs", Fraction(1, 4), Text("s", None, "()[]{}<>?!" * 2))
    mix = Mix("own mix", (*three.parts[:2], short))
    found = cut(mix, tokenizer)
    assert [kind.samples for kind in found.record.kinds] == [5, 2, 1]
    assert [kind.share for kind in found.record.kinds] == [0.5, 0.25, 0.25]
    said = " ".join(capsys.readouterr().err.split())
    assert "signs has 1 windows, fewer than its share of 8; the other kinds give more" in said
    with pytest.raises(RecipeError, match=r"'own mix' has \d+ windows of 16 tokens, 4000 were"):
        calibrate(mix, tokenizer, samples=4000, sequence_length=16, seed=0)


@pytest.fixture
def chats() -> Text:
    return of_conversations(Text("chats", None, ""), [CHAT] * 40)


def test_chats_are_read_as_the_served_model_reads_them(
    chats: Text, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = IM
    whole = (
        "<|im_start|>user\nIs the cat in?<|im_end|>\n<|im_start|>assistant\nIt is out.<|im_end|>\n"
    )
    found = cut(chats, tokenizer)
    stream = tokenizer(whole * 40).input_ids
    for window in found.ids:
        where(window, stream)
    assert {1, 2} <= set(found.ids.flatten().tolist())  # <|im_start|> and <|im_end|> as such
    assert found.record.template == sha256_json(IM)


def test_chats_are_plain_text_where_the_model_has_no_template(
    chats: Text, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = None
    found = cut(chats, tokenizer)
    stream = tokenizer("\n\n".join(["Is the cat in?\n\nIt is out."] * 40)).input_ids
    for window in found.ids:
        where(window, stream)
    assert found.record.template is None


def test_chats_are_plain_text_where_the_template_refuses_them(
    chats: Text, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer.chat_template = "{{ raise_exception('no cats here') }}"
    refused = cut(chats, tokenizer)
    assert "the chat template refuses them: no cats here" in " ".join(
        capsys.readouterr().err.split()
    )
    tokenizer.chat_template = None
    assert torch.equal(refused.ids, cut(chats, tokenizer).ids)
    assert refused.record.template is None


def test_chats_are_the_same_tomorrow(tokenizer: PreTrainedTokenizerBase) -> None:
    template = "{{ strftime_now('%d %B %Y') }}{{ bos_token }}"
    assert rendered(CHAT, template, tokenizer) == "01 January 2026<|im_start|>"


def test_conversations_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    line = json.dumps({"messages": CHAT, "id": 7})
    path.write_text(f"{line}\n\n{line}\n")
    found = load_text(str(path))
    assert found.conversations == (CHAT, CHAT)
    assert found.text == "\n\n".join(["Is the cat in?\n\nIt is out."] * 2)
    for wrong in ('{"prompt": "a"}', '{"messages": []}', '{"messages": [{"role": "user"}]}', "[]"):
        path.write_text(f"{line}\n{wrong}\n")
        with pytest.raises(RecipeError, match=r"chats\.jsonl:2: expected .\"messages\""):
            load_text(str(path))
    path.write_text("{\n")
    with pytest.raises(RecipeError, match=r"chats\.jsonl:1: not JSON"):
        load_text(str(path))


def test_a_mix_of_ones_own(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name} text")
    entry = {
        "first": {"text": str(tmp_path / "a.txt"), "share": 0.3},
        "second": {"text": str(tmp_path / "b.txt"), "share": 0.9},
    }
    found = load_calibration(entry)
    assert isinstance(found, Mix)
    assert found.name == "own mix"
    assert [(p.kind, p.share, p.text.text) for p in found.parts] == [
        ("first", Fraction(1, 4), "a text"),
        ("second", Fraction(3, 4), "b text"),
    ]
    assert CalibrationSection(text=entry).text == entry
    alone = load_calibration(str(tmp_path / "a.txt"))
    assert isinstance(alone, Text)
    with pytest.raises(RecipeError, match=r"one of mix, mix:hub, pydoc.* did you mean 'mix:hub'"):
        load_calibration("mix:hbu")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{}", "calibration.text: a mix needs at least one kind"),
        ("{code: {text: a.py, share: 0}}", r"code\.share: Input should be greater than 0"),
        ("{code: {text: a.py}}", r"code\.share: Field required; expected {text: NAME or FILE"),
        ("{code: {text: a.py, shares: 1}}", r"code\.share: Field required"),
        ("{code: a.py}", "code: Input should be a valid dictionary"),
    ],
)
def test_a_mix_that_is_wrong_is_refused_with_its_kind(entry: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe("quickstart", [f"calibration.text={entry}"])
    assert "\n" not in str(caught.value)


def test_a_kind_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> Text:
        raise MissingText("the package sympy is not installed")

    plain = {name: (lambda name=name: Text(name, None, name)) for name in NAMED}
    monkeypatch.setattr("quantkit.data.texts.NAMED", {**plain, "packages:math": missing})
    found = load_calibration("mix")
    assert isinstance(found, Mix)
    kinds = [part.kind for part in found.parts]
    assert kinds == [kind for kind in MIXES["mix"] if kind != "math"]
    assert sum(part.share for part in found.parts) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "no math; the other kinds give more: the package sympy is not installed" in said
    with pytest.raises(MissingText, match="sympy"):  # asked for by name
        load_calibration({"math": {"text": "packages:math", "share": 1}})
    monkeypatch.setattr("quantkit.data.texts.NAMED", dict.fromkeys(NAMED, missing))
    with pytest.raises(RecipeError, match="'mix': none of its kinds is installed; name a file"):
        load_calibration("mix")


def test_a_mix_shares_no_paragraph_with_the_evaluation_text(
    tiny_llama: Path, tmp_path: Path
) -> None:
    shared = (
        "This sentence stands in what is calibrated on and in what is evaluated on, by mistake."
    )
    (tmp_path / "one.txt").write_text("Nothing of the kind stands in here.\n")
    (tmp_path / "two.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": f"Read this:\n{shared}"}]}) + "\n"
    )
    (tmp_path / "evaluated.txt").write_text(f"{shared}\n")
    parts = [f"{name}: {{text: {tmp_path / name}, share: 1}}" for name in ("one.txt", "two.jsonl")]
    mix = "{" + ", ".join(parts) + "}"
    evaluated = f"evaluate.texts=[{tmp_path}/evaluated.txt]"
    recipe = load_recipe("quickstart", [f"calibration.text={mix}", evaluated])
    with pytest.raises(RecipeError, match=r"'two\.jsonl' holds 1 paragraphs of the evaluation"):
        Texts.load(recipe, Checkpoint.open(str(tiny_llama)), needs_calibration=True)


def test_a_mix_from_text_to_manifest(tiny_llama: Path, tmp_path: Path, three: Mix) -> None:
    source = Checkpoint.open(str(tiny_llama))
    chats = of_conversations(Text("chats.jsonl", "sha256:1", ""), [CHAT] * 40)
    mix = Mix("own mix", (*three.parts, Part("chat", Fraction(1, 4), chats)))
    windows = calibrate(mix, source.tokenizer, samples=10, sequence_length=32, seed=3)
    variant = convert(source, Spec.parse("gptq:w4g64"), windows, tmp_path)
    record = read_manifest(variant.path / "quantkit.json").calibration
    assert record == windows.record
    assert (record.dataset, record.revision) == ("own mix", None)
    assert [(k.kind, k.dataset, k.revision, k.share, k.samples) for k in record.kinds] == [
        ("letters", "letters.txt", "1", 0.5, 4),
        ("digits", "digits.txt", "1", 0.25, 2),
        ("signs", "signs.txt", "1", 0.25, 2),
        ("chat", "chats.jsonl", "sha256:1", 0.25, 2),
    ]
    assert record.template == sha256_json(source.tokenizer.chat_template)
    # An importance matrix is of the same windows, and says of what.
    matrix = compute(source, windows)
    assert matrix.datasets == ("letters.txt", "digits.txt", "signs.txt", "chats.jsonl")
    assert (matrix.chunks, matrix.chunk_size) == (10, 32)
    tokens = {int(entry.counts.max()) for entry in matrix.entries.values()}
    assert tokens == {10 * 32}


@pytest.fixture(scope="module")
def shipped() -> Mix:
    found = load_calibration("mix")
    assert isinstance(found, Mix)
    return found


def test_the_shipped_mix_has_all_its_kinds(shipped: Mix) -> None:
    assert [part.kind for part in shipped.parts] == list(MIXES["mix"])
    assert all(part.text.revision for part in shipped.parts)
    texts = {part.kind: part.text for part in shipped.parts}
    assert "\n    def " in texts["code"].text
    assert ".. math ::" in texts["math"].text
    assert len(texts["chat"].conversations) > 150
    assert all(chat[0]["role"] == "user" for chat in texts["chat"].conversations)
    for word in ("Bahnhof", "rivière", "поезд".capitalize(), "清晨", "القهوة", "할머니"):
        assert word in texts["languages"].text
    for name, parts in MIXES.items():
        assert sum(Fraction(str(one.share)) for one in parts.values()) == 1, name


def test_the_shipped_mix_has_nothing_that_is_evaluated_offline(shipped: Mix) -> None:
    for part in shipped.parts:
        for name in ("pydoc:evaluation", "stdlib:code"):
            check_disjoint(part.text, load_text(name))
    calibrated = set().union(*(paragraphs(part.text.text) for part in shipped.parts))
    whole = "\n".join(part.text.text for part in shipped.parts)
    questions = [question["question"] for question in dev_questions()]
    assert len(questions) > 250
    assert calibrated.isdisjoint(set().union(*map(paragraphs, questions)))
    long = [question.strip() for question in questions if len(question.strip()) > 40]
    assert not [question for question in long if question in whole]


def test_the_shipped_mix_is_the_same_every_time(shipped: Mix) -> None:
    again = load_calibration("mix")
    assert isinstance(again, Mix)
    assert again == shipped


def test_mix_is_the_default_of_recipes_and_of_the_command_line() -> None:
    assert CalibrationSection().text == "mix"
    (option,) = [one for one in cli.commands["convert"].params if "--calibration" in one.opts]
    assert option.default == "mix"
    assert {one.text for parts in MIXES.values() for one in parts.values()} <= NAMED.keys()
