"""Recipes: what is read, what is refused and in which words, and the one byte string that stands for each."""

import json
import math
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dugnad.configs import recipe as module
from dugnad.configs.recipe import (
    MAX_RECIPE_BYTES,
    AdmissionSettings,
    CheckpointSettings,
    CodecSettings,
    DataSettings,
    EvaluationSettings,
    InnerSettings,
    ModelSettings,
    OuterSettings,
    Recipe,
    RecipeError,
    RoundSettings,
    Stage,
    bundled,
    decode,
    encode,
    load,
    loads,
)

TINY = load("tiny-books")
TEXT = (Path(module.__file__).parent / "tiny-books.toml").read_text("utf-8")


def table() -> dict[str, Any]:
    """tiny-books as a fresh table of plain values."""
    whole: dict[str, Any] = json.loads(encode(TINY))
    return whole


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def with_value(key: str, value: Any) -> bytes:
    """tiny-books as bytes, with the value at the dotted `key` put in place of what stood there."""
    whole = table()
    *path, last = key.split(".")
    place: Any = whole
    for name in path:
        place = place[int(name) if name.isdigit() else name]
    place[int(last) if last.isdigit() else last] = value
    return canonical(whole)


def seconds() -> st.SearchStrategy[float]:
    return st.floats(0, 40000, exclude_min=True)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[Stage, ...]:
    marks = sorted(draw(st.sets(st.integers(1, 10**7), min_size=1, max_size=64)))
    return tuple(Stage(until_step=mark, steps=draw(st.integers(1, 10**6))) for mark in marks)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Any valid recipe."""
    heads, block = draw(st.integers(1, 64)), draw(st.integers(1, 16)) * 64
    schedule = draw(schedules())
    total, report_s, warmup = schedule[-1].until_step, draw(seconds()), draw(st.integers(0, 10**6))
    sequences, context = draw(st.integers(1, 65536)), draw(st.integers(1, 65536))
    fraction, seed = st.floats(0, 1, exclude_max=True), st.integers(0, 2**63 - 1)
    return Recipe(
        name=draw(st.from_regex(r"\A[a-z0-9]{1,8}(-[a-z0-9]{1,8}){0,3}\Z")),
        summary=draw(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=400)),
        model=ModelSettings(
            family="byte-gpt",
            layers=draw(st.integers(1, 256)),
            heads=heads,
            width=heads * draw(st.integers(1, 256)),
            context=context,
            seed=draw(seed),
        ),
        data=DataSettings(
            corpus="shakespeare",
            validation_bytes=draw(st.integers(sequences * (context + 1), 2**40)),
            seed=draw(seed),
        ),
        inner=InnerSettings(
            optimizer=draw(st.sampled_from(["adamw", "adamw8bit"])),
            lr=draw(st.floats(0, 1, exclude_min=True)),
            beta1=draw(fraction),
            beta2=draw(fraction),
            weight_decay=draw(st.floats(0, 10)),
            clip_norm=draw(st.floats(0, 10**6, exclude_min=True)),
            warmup_steps=warmup,
            decay_steps=draw(st.integers(warmup + 1, 10**7)),
            lr_floor=draw(st.floats(0, 1)),
            batch_sequences=draw(st.integers(1, 65536)),
            joiner_warmup_steps=draw(st.integers(0, 10**7)),
        ),
        outer=OuterSettings(
            lr=draw(st.floats(0, 10, exclude_min=True)),
            momentum=draw(fraction),
            plain_until_step=draw(st.integers(0, total)),
        ),
        rounds=RoundSettings(
            total_steps=total,
            schedule=schedule,
            min_peers=draw(st.integers(1, 1024)),
            train_s=draw(seconds()),
            exchange_s=draw(seconds()),
            silence_s=report_s * 2,
            report_s=report_s,
        ),
        codec=CodecSettings(kind="int8", block_elements=block, part_elements=block * draw(st.integers(1, 4096))),
        evaluation=EvaluationSettings(every_rounds=draw(st.integers(1, 10**6)), sequences=sequences),
        checkpoints=CheckpointSettings(every_rounds=draw(st.integers(1, 16)), keep=draw(st.integers(1, 1000))),
        admission=AdmissionSettings(kind=draw(st.sampled_from(["invited", "open"]))),
    )


@given(recipes())
def test_any_valid_recipe_survives_the_wire_and_keeps_its_bytes(recipe: Recipe) -> None:
    data = encode(recipe)
    assert decode(data) == recipe
    assert encode(decode(data)) == data


@given(recipes())
def test_the_rounds_counted_ahead_are_the_rounds_walked_through(recipe: Recipe) -> None:
    # Fewer rounds, or the walk takes millions of steps.
    schedule = tuple(replace(stage, steps=max(stage.steps, 20_000)) for stage in recipe.rounds.schedule)
    rounds = replace(recipe.rounds, schedule=schedule)
    step = walked = 0
    while steps := rounds.steps_at(step):
        step, walked = step + steps, walked + 1
    assert step == rounds.total_steps
    assert rounds.num_rounds() == walked


@given(st.binary(max_size=300))
def test_random_bytes_raise_nothing_but_recipe_error(data: bytes) -> None:
    with pytest.raises(RecipeError):
        decode(data)


@given(
    st.sampled_from(
        [f"{section}.{key}" for section, keys in table().items() if isinstance(keys, dict) for key in keys]
    ),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=5,
    ),
)
def test_any_value_anywhere_is_taken_or_refused_as_a_recipe_error(key: str, value: Any) -> None:
    data = with_value(key, value)
    outcome: Recipe | RecipeError
    try:
        outcome = decode(data)
    except RecipeError as error:
        outcome = error
    if isinstance(outcome, Recipe):
        assert encode(outcome) == data
    else:
        assert "\n" not in str(outcome)
        assert len(str(outcome)) < 500


def test_the_bundled_recipe_is_the_one_described() -> None:
    assert bundled() == ["tiny-books"]
    assert TINY.name == "tiny-books"
    assert (TINY.model.layers, TINY.model.width, TINY.model.heads, TINY.model.context) == (4, 128, 4, 128)
    assert [(stage.until_step, stage.steps) for stage in TINY.rounds.schedule] == [
        (60, 5), (150, 10), (300, 20), (600, 30),
    ]  # fmt: skip
    assert TINY.rounds.num_rounds() == 12 + 9 + 8 + 10


def test_a_recipe_is_loaded_by_path_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TEXT)
    assert load(path) == load(str(path)) == TINY


def test_a_schedule_may_be_written_as_sections() -> None:
    head, _, tail = TEXT.partition("schedule = [")
    sections = "".join(
        f"[[rounds.schedule]]\nuntil_step = {stage.until_step}\nsteps = {stage.steps}\n"
        for stage in TINY.rounds.schedule
    )
    assert loads(head + sections + tail.partition("\n]\n")[2], source="mine.toml") == TINY


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lr = 2e-3", "learning_rate = 2e-3", 'unknown key "inner.learning_rate"; did you mean "inner.lr"?'),
        ("weight_decay", "wieght_decay", 'unknown key "inner.wieght_decay"; did you mean "inner.weight_decay"?'),
        ("[outer]", "[outre]", 'unknown key "outre"; did you mean "outer"?'),
        ("keep = 3", "zzz = 3", 'unknown key "checkpoints.zzz"; known keys here: every_rounds, keep'),
        ("keep = 3", "", 'missing key "checkpoints.keep"; it must be a whole number at least 1 and at most 1000'),
        ("beta1 = 0.9", "beta1 = 1.0", "inner.beta1 is 1.0; it must be a number at least 0 and below 1"),
        ("beta1 = 0.9", "beta1 = nan", "inner.beta1 is NaN; it must be a number at least 0 and below 1"),
        ("clip_norm = 1.0", "clip_norm = inf", "inner.clip_norm is Infinity; it must be a number above 0"),
        ("heads = 4 ", "heads = true", "model.heads is true; it must be a whole number at least 1"),
        ("heads = 4 ", "heads = 4.0", "model.heads is 4.0; it must be a whole number at least 1"),
        ('"adamw"', '"sgd"', 'inner.optimizer is "sgd"; it must be "adamw" or "adamw8bit"'),
        ("train_s = 60", "train_s = '60'", 'rounds.train_s is "60"; it must be a number above 0 and at most 86400'),
        ('name = "tiny-books"', 'name = "../books"', 'name is "../books"; it must be text: 1 to 64 of a-z'),
        ("300, steps = 20", "300, steps = 0", "rounds.schedule[2].steps is 0; it must be a whole number at least 1"),
        ("block_elements = 256", "block_elements = 100", "and a multiple of 64"),
        ("heads = 4 ", "heads = 3 ", "model.width is 128; it must be a multiple of model.heads = 3"),
        ("until_step = 150", "until_step = 60", "rounds.schedule[1].until_step is 60; it must be greater than 60"),
        ("total_steps = 600", "total_steps = 700", "until_step is 600; the last must equal rounds.total_steps = 700"),
        ("part_elements = 65_536", "part_elements = 65_600", "must be a multiple of codec.block_elements = 256"),
        ("decay_steps = 600", "decay_steps = 50", "inner.decay_steps is 50; it must come after inner.warmup_steps"),
        ("silence_s = 8", "silence_s = 1", "rounds.silence_s is 1.0; it must be greater than rounds.report_s = 1.0"),
        ("plain_until_step = 60", "plain_until_step = 601", "it must be at most rounds.total_steps, 600"),
        ("262_144", "8255", "evaluation.sequences = 64 read 8256 bytes"),
        ('summary = "A', 'summary = "\\u001b[2JA', "summary holds line ends or control characters"),
        ("[model]", "[model", "not valid TOML: Expected ']' at the end of a table declaration (at line 7, column 7)"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_file_key_and_remedy(old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(RecipeError) as caught:
        loads(TEXT.replace(old, new, 1), source="my.toml")
    assert str(caught.value).startswith("my.toml: ")
    assert message in str(caught.value)


def test_toml_that_ends_too_early_is_placed_by_line_and_column() -> None:
    with pytest.raises(RecipeError, match=r"my\.toml: not valid TOML: .*line 2, column 6"):
        loads("a = 1\nb = [\n", source="my.toml")


def test_the_edges_of_a_range_are_allowed_where_the_message_says_so() -> None:
    for key, value in [("model.layers", 256), ("inner.lr", 1.0), ("inner.beta2", 0.0), ("rounds.train_s", 86400.0)]:
        assert encode(decode(with_value(key, value)))
    for key, value in [("model.layers", 257), ("inner.lr", 0.0), ("inner.beta2", 1.0), ("rounds.train_s", 86400.1)]:
        with pytest.raises(RecipeError, match=key):
            decode(with_value(key, value))


def test_a_file_that_is_not_there_offers_the_nearest_bundled_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"tinybooks: no such recipe or file; .*did you mean tiny-books\?"):
        load("tinybooks")
    with pytest.raises(RecipeError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe5"')
    with pytest.raises(RecipeError, match="not UTF-8"):
        load(tmp_path / "latin.toml")
    (tmp_path / "huge.toml").write_bytes(b"#" * (MAX_RECIPE_BYTES + 1))
    with pytest.raises(RecipeError, match="larger than 256 KiB"):
        load(tmp_path / "huge.toml")


def refused() -> dict[str, bytes]:
    whole = encode(TINY)
    return {
        "too deep": b"[" * 100_000,
        "number of thousands of digits": b'{"a":' + b"1" * 5000 + b"}",
        "not UTF-8": b"\xff" + whole,
        "UTF-16": whole.decode().encode("utf-16"),
        "spaces": json.dumps(table(), sort_keys=True).encode(),
        "order of keys": json.dumps(dict(reversed(table().items())), separators=(",", ":")).encode(),
        "a key twice": b'{"name":"x",' + whole[1:],
        "a number spelled otherwise": with_value("rounds.train_s", 60),
        "minus zero": with_value("inner.weight_decay", -0.0),
        "NaN": with_value("inner.lr", math.nan),
        "trailing bytes": whole + b"\n",
        "65 stages": with_value("rounds.schedule", [{"steps": 1, "until_step": n + 536} for n in range(65)]),
        "no table": b"[]",
        "half a surrogate pair in a word": whole.replace(b'"int8"', b'"\\ud800"'),
        "half a surrogate pair in a line": whole.replace(b'"summary":"', b'"summary":"\\ud800'),
        "half a surrogate pair for a number": whole.replace(b'"context":128', b'"context":"\\ud800"'),
        "half a surrogate pair as a key": whole.replace(b'"context"', b'"\\ud800"'),
        "a number beyond float": whole.replace(b'"lr":0.7', b'"lr":1' + b"0" * 4000),
        "nested stages": whole.replace(b'"schedule":[', b'"schedule":[' + b"[" * 900 + b"]" * 900 + b","),
        "text that turns the line around": with_value("summary", "harmless\u202e"),
        "endless name": with_value("name", "a" * 65),
    }


@pytest.mark.parametrize("case", refused())
def test_a_strangers_bytes_are_refused_unless_canonical(case: str) -> None:
    with pytest.raises(RecipeError, match="received recipe: "):
        decode(refused()[case])


def test_size_is_checked_before_anything_is_parsed() -> None:
    with pytest.raises(RecipeError, match="larger than 256 KiB"):
        decode(b" " * (MAX_RECIPE_BYTES + 1))


def test_every_cut_of_a_recipe_is_refused() -> None:
    data = encode(TINY)
    for length in range(len(data)):
        with pytest.raises(RecipeError):
            decode(data[:length])


def test_an_error_does_not_repeat_a_strangers_text_at_length_or_raw() -> None:
    with pytest.raises(RecipeError) as caught:
        decode(with_value("inner.optimizer", "\x1b[2J" + "x" * 100_000))
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_rounds_grow_along_the_schedule_and_end_on_the_last_step() -> None:
    steps = [(0, 5), (59, 5), (60, 10), (149, 10), (150, 20), (300, 30), (580, 20), (599, 1), (600, 0), (10**9, 0)]
    assert [(at, TINY.rounds.steps_at(at)) for at, _ in steps] == steps


def test_the_learning_rate_rises_falls_and_stays() -> None:
    inner = TINY.inner
    assert inner.lr_at(0) == pytest.approx(inner.lr / 50)
    assert inner.lr_at(49) == inner.lr_at(50) == pytest.approx(inner.lr)
    assert inner.lr_at(325) == pytest.approx(inner.lr * 0.55)
    assert inner.lr_at(600) == inner.lr_at(10**7) == pytest.approx(inner.lr * 0.1)
    falling = [inner.lr_at(step) for step in range(50, 601)]
    assert falling == sorted(falling, reverse=True)
    assert replace(inner, warmup_steps=0).lr_at(0) == inner.lr


def test_whole_numbers_in_toml_stand_for_fractions_with_the_same_bytes() -> None:
    assert tomllib.loads(TEXT)["rounds"]["train_s"] == 60
    spelled = TEXT.replace("train_s = 60", "train_s = 60.0").replace("weight_decay = 0.1", "weight_decay = -0.0")
    zero = TEXT.replace("weight_decay = 0.1", "weight_decay = 0")
    assert encode(loads(spelled, source="a")) == encode(loads(zero, source="b"))
