"""Engine configurations: how they are written, told apart, and kept to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from quantkit import api
from quantkit.cli.main import cli
from quantkit.engines import load_engine
from quantkit.engines.base import Engine, config_of
from quantkit.engines.llamacpp.server import server_command
from quantkit.engines.server import ServeOptions
from quantkit.errors import QuantkitError, RecipeError
from quantkit.formats.detect import open_variant
from quantkit.gateway.command import ServeCommand, gateway_config
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.engine_config import EngineConfig, by_engine
from quantkit.models.spec import Spec
from quantkit.models.variant import Model, Variant
from quantkit.producers.convert import convert
from quantkit.recommendation import Wants, recommend
from quantkit.reports.claims import claims
from quantkit.runs.recipe import Recipe, load_recipe
from quantkit.runs.stages import evaluated_as_served
from quantkit.toolchains.llama_programs import Program
from tests import ledgers, loads

Q8 = EngineConfig(name="llamacpp", options={"kv_cache": "q8_0"})


@pytest.fixture(scope="module")
def variant(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    out = tmp_path_factory.mktemp("variants")
    return convert(Checkpoint.open(tiny_llama), Spec("gguf", "F16"), None, out)


@pytest.mark.parametrize(
    "entry",
    ["llamacpp:kv_cache=q8_0", {"name": "llamacpp", "kv_cache": "q8_0"}, Q8, Q8.model_dump()],
)
def test_engine_entry_is_one_object(entry: Any) -> None:
    assert EngineConfig.of_entry(entry) == Q8
    recipe = load_recipe("quickstart")
    given = recipe.model_dump()
    given["bench"]["engines"] = ["vllm", entry]
    again = Recipe.model_validate(Recipe.model_validate(given).model_dump(mode="json"))
    assert again.bench is not None
    assert again.bench.engines == [EngineConfig(name="vllm"), Q8]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("lamacpp", "unknown engine 'lamacpp'.*did you mean 'llamacpp'"),
        ("llamacpp:port=1", "'port' is decided by quantkit"),
        ({"kv_cache": "q8_0"}, "expected an engine's name, or a mapping of its `name`"),
        ({"name": "vllm", "a b": 1}, "'a b' is not the name of an engine's option"),
        ({"name": "vllm", "kv_cache": [1]}, "engine vllm: "),
        (7, "expected an engine's name"),
    ],
)
def test_engine_entry_that_makes_no_sense(entry: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        EngineConfig.of_entry(entry)


def test_engine_config_names_itself() -> None:
    one = EngineConfig(name="vllm", version="1.0", options={"kv_cache": "fp8", "enforce": True})
    assert one.id == "vllm (enforce=true, kv_cache=fp8)"
    assert str(one) == "vllm 1.0 (enforce=true, kv_cache=fp8)"
    other = EngineConfig(name="vllm", version="1.0", options={"enforce": True, "kv_cache": "fp8"})
    assert one == other
    assert len({one, other, one.having({"kv_cache": "auto"}), EngineConfig(name="vllm")}) == 3


def test_options_of_llamacpp_reach_its_server(variant: Variant) -> None:
    def words(**options: Any) -> list[str]:
        command = server_command(
            Program(Path("/llama-server")), variant, ServeOptions(1, context=64), options
        )
        return list(command.argv)

    plain = words()
    assert words(kv_cache="q8_0", mlock=True) == [
        *plain, "--cache-type-k", "q8_0", "--cache-type-v", "q8_0", "--flash-attn", "on", "--mlock",
    ]  # fmt: skip
    assert words(kv_cache="bf16") == [*plain, "--cache-type-k", "bf16", "--cache-type-v", "bf16"]
    more = words(slots=2, context=100)
    assert more[more.index("--parallel") + 1] == "2"
    assert more[more.index("--ctx-size") + 1] == "200"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("llamacpp:kv_cache=q8", "kv_cache is 'q8'; llama.cpp takes .*did you mean 'q8_0'"),
        ("llamacpp:slots=many", "context and slots are whole numbers"),
        ("llamacpp:slots=0", "slots is 0"),
        ("transformers:kv_cache=q8_0", "unknown option 'kv_cache'; it takes batch"),
    ],
)
def test_option_that_an_engine_does_not_take(
    config: str, message: str, variant: Variant, tiny_llama: Path
) -> None:
    engine = load_engine(EngineConfig.parse(config))
    model = variant if engine.name == "llamacpp" else Checkpoint.open(tiny_llama)
    with pytest.raises(QuantkitError, match=message):
        _use(engine, model)


def _use(engine: Engine, model: Model) -> None:
    engine.check(model)
    engine.server(model, ServeOptions(1))


def test_llamacpp_scores_with_the_cache_that_it_serves_with(variant: Variant) -> None:
    """Coarser keys and values move the logits more; usual ones named move nothing."""
    ids = [[(7 * n) % 900 + 3 for n in range(96)]]

    def logits(kind: str | None) -> Any:
        options = {} if kind is None else {"kv_cache": kind}
        engine = load_engine(EngineConfig(name="llamacpp", options=options))
        assert config_of(engine).kv_cache == (None if kind == "f16" else kind)
        with engine.scorer(variant, 128) as scorer:
            return next(iter(scorer.logits(ids, [32])))

    plain = logits(None)
    moved = {kind: (logits(kind) - plain).abs().mean().item() for kind in ("f16", "q8_0", "q4_0")}
    assert moved["f16"] == 0
    assert 0 < moved["q8_0"] < 0.5 * moved["q4_0"]


def test_two_configurations_of_an_engine_stand_beside_each_other() -> None:
    ledger = ledgers.swept()
    index, row = next((i, row) for i, row in enumerate(ledger.variants) if row.id == "gguf-Q4_K_M")
    mine = [one for one in row.bench if one.engine.name == "llamacpp"]
    coarse = mine[0].engine.having({"kv_cache": "q4_0"})
    faster = [
        loads.bench(coarse, one.concurrency, [2 * one.output_tokens_per_s] * 3) for one in mine
    ]
    both = ledgers.with_row(ledger, index, bench=[*mine, *faster])
    found = claims(both)
    assert found is not None
    (race,) = (one for one in found.races if one.title == "gguf-Q4_K_M")
    assert race.engines == ("llama.cpp (kv_cache=q4_0)", "llama.cpp")
    assert all(ratio.value == pytest.approx(2) for _, ratio, *_ in race.ratios)
    # What a coarser cache loses was not measured: it is not recommended, and that is said.
    advice = recommend(both, Wants(profile="server"))
    assert advice.pick is not None
    assert advice.pick.candidate.config.kv_cache is None
    assert any(
        one.id == "gguf-Q4_K_M on llamacpp (kv_cache=q4_0)" and "KV cache" in one.reason
        for one in advice.missing
    )


def test_what_is_served_is_measured_with_its_options() -> None:
    def engine(*overrides: str) -> EngineConfig | None:
        section = evaluated_as_served(load_recipe("quickstart", overrides))
        assert section is not None
        return section.engine

    options = "bench.engines=[vllm, {name: llamacpp, kv_cache: q8_0}]"
    assert engine() is None
    assert engine(options) == Q8
    assert engine(options, "evaluate.engine=transformers") == EngineConfig(name="transformers")
    assert engine("bench=null") is None


def test_serving_a_run_uses_the_options_that_were_measured(tmp_path: Path) -> None:
    ledger = ledgers.swept()
    rows = []
    for row in ledger.variants:
        engine = {one.engine.name: one.engine.having({"kv_cache": "q8_0"}) for one in row.bench}
        rows.append(
            row.model_copy(
                update={
                    "bench": [
                        one.model_copy(update={"engine": engine[one.engine.name]})
                        for one in row.bench
                    ]
                }
            )
        )
        (tmp_path / row.path).mkdir(parents=True, exist_ok=True)
    ledger.model_copy(update={"variants": rows}).write(tmp_path / "ledger.json")
    backends = gateway_config(ServeCommand(from_run=tmp_path)).backends
    assert {one.engine.kv_cache for one in backends.values() if one.engine} == {"q8_0"}
    for row in rows[1:]:
        assert backends[row.id].engine == row.bench[0].engine.having({})


def test_variants_open_as_before_with_their_files(variant: Variant) -> None:
    assert open_variant(variant.path).weights == variant.weights
    assert open_variant(variant.weights).path == variant.path


def test_dashes_and_underscores_are_one_option() -> None:
    dashed = EngineConfig.parse("vllm:tensor-parallel-size=2")
    assert dashed == EngineConfig(name="vllm", options={"tensor_parallel_size": "2"})
    assert dashed.having({"tensor-parallel-size": 4}).options == {"tensor_parallel_size": 4}


def test_options_go_to_the_engine_that_they_name() -> None:
    both = ["llamacpp", "vllm", "llamacpp"]
    given = {"vllm.dtype": "half", "llamacpp.kv-cache": "q8_0", "vllm.compilation-config.mode": 0}
    assert by_engine(given, both) == {
        "llamacpp": {"kv-cache": "q8_0"},
        "vllm": {"dtype": "half", "compilation-config.mode": 0},
    }
    assert by_engine({"compilation-config.mode": 0}, ["vllm"]) == {
        "vllm": {"compilation-config.mode": 0}
    }
    assert by_engine({}, both) == {"llamacpp": {}, "vllm": {}}


@pytest.mark.parametrize(
    ("name", "engines", "message"),
    [
        (
            "gpu-memory-utilization",
            ["llamacpp", "vllm"],
            "engine option gpu-memory-utilization: llamacpp and vllm run here; say whose it is: "
            "llamacpp.gpu-memory-utilization or vllm.gpu-memory-utilization",
        ),
        (
            "vllm.tensor_parallel_size",
            ["llamacpp"],
            "engine option vllm.tensor_parallel_size: vllm does not run here, only llamacpp; "
            "leave it out, or choose --engine vllm",
        ),
        (
            "vlm.dtype",
            ["vllm"],
            "engine option vlm.dtype: unknown engine 'vlm'; engines are transformers, llamacpp, "
            "vllm; did you mean 'vllm'?",
        ),
        ("vllm.port", ["vllm"], "engine option vllm.port: 'port' is decided by quantkit"),
    ],
)
def test_options_of_no_engine_or_of_several(name: str, engines: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        by_engine({name: 1}, engines)
    assert str(caught.value) == message


@pytest.mark.parametrize("verb", ["bench", "evaluate", "serve"])
def test_commands_refuse_an_option_that_two_engines_could_take(
    verb: str, tiny_llama: Path, variant: Variant
) -> None:
    """Before anything is started."""
    options = [
        "--engine-arg",
        "dtype=half",
        *(["--text", "pydoc:evaluation"] * (verb == "evaluate")),
    ]
    done = CliRunner().invoke(cli, [verb, str(tiny_llama), str(variant.path), *options])
    served = "transformers" if verb == "evaluate" else "vllm"
    assert str(done.exception) == (
        f"engine option dtype: {served} and llamacpp run here; say whose it is: "
        f"{served}.dtype or llamacpp.dtype"
    )


@pytest.mark.parametrize("verb", ["bench", "evaluate", "serve"])
def test_parallelism_is_for_vllm(verb: str, variant: Variant) -> None:
    options = [
        "--tensor-parallel-size",
        "2",
        *(["--text", "pydoc:evaluation"] * (verb == "evaluate")),
    ]
    done = CliRunner().invoke(cli, [verb, str(variant.path), *options])
    assert str(done.exception).startswith(
        "engine option vllm.tensor_parallel_size: vllm does not run here, only llamacpp"
    )
    recipes = EngineConfig.of_entry({"name": "llamacpp", "tensor_parallel_size": 2})
    with pytest.raises(RecipeError, match="llamacpp: tensor_parallel_size is an option of vllm"):
        load_engine(recipes).check(variant)


def test_evaluate_gives_options_to_the_engine_that_measures(variant: Variant) -> None:
    options = {"llamacpp.kv_cache": "q4_9"}
    with pytest.raises(RecipeError, match="kv_cache is 'q4_9'"):
        api.evaluate([variant.path], texts=["pydoc:evaluation"], engine_options=options)
