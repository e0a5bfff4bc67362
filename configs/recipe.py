"""A recipe: every setting of a run, as data that is safe to take from a stranger.

A recipe is written as TOML by the organizer and travels as canonical JSON to every volunteer. Both ways in lead through
the same check: each field's allowed values stand beside the field, and whatever is not named there is refused. The
ranges are wide for whoever trains and narrow for whoever attacks: no accepted value can overflow a counter or hold a
volunteer for ever.
"""

import difflib
import json
import math
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

MAX_RECIPE_BYTES = 256 * 1024

_SUFFIX = ".toml"
_MAX_SHOWN = 60

# What other trainers call it: spelling alone finds no way from one to the other.
_OTHER_NAMES = {
    "learning_rate": "lr", "batch_size": "batch_sequences", "max_steps": "total_steps", "grad_clip": "clip_norm",
    "hidden_size": "width", "n_embd": "width", "n_head": "heads", "n_layer": "layers", "block_size": "context",
}  # fmt: skip

T = TypeVar("T")
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
StepCount = Annotated[int, Meta(ge=1, le=10**7)]
StepMark = Annotated[int, Meta(ge=0, le=10**7)]
RoundCount = Annotated[int, Meta(ge=1, le=10**6)]
Seconds = Annotated[float, Meta(gt=0, le=86400)]


class RecipeError(Exception):
    """A recipe that cannot be used: the message names file and key, what is allowed, and what to do."""


class _Mistake(Exception):
    """What is wrong with a table, without the file it came from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """The network that is trained; its first weights follow from these settings alone."""

    family: Literal["byte-gpt"]
    """Which architecture, out of those the software ships."""
    layers: Annotated[int, Meta(ge=1, le=256)]
    """Transformer blocks."""
    heads: Annotated[int, Meta(ge=1, le=1024)]
    """Attention heads in each layer; they divide the width."""
    width: Annotated[int, Meta(ge=1, le=16384)]
    """Elements in the residual stream."""
    context: Annotated[int, Meta(ge=1, le=65536)]
    """Tokens in a sequence; for a byte model, bytes."""
    seed: Seed
    """Seed of the first weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSettings:
    """What is read, and what is held back to measure progress on."""

    corpus: Literal["shakespeare"]
    """Which text, out of those the software ships."""
    validation_bytes: Annotated[int, Meta(ge=1, le=2**40)]
    """Bytes at the end of the corpus that nobody trains on."""
    seed: Seed
    """Seed of the order in which samples are drawn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InnerSettings:
    """How each volunteer trains by itself between two exchanges."""

    optimizer: Literal["adamw", "adamw8bit"]
    """The inner optimizer; `adamw8bit` keeps its moments in 8 bits, and volunteers need an NVIDIA GPU for it."""
    lr: Annotated[float, Meta(gt=0, le=1)]
    """Learning rate after the warm-up."""
    beta1: Annotated[float, Meta(ge=0, lt=1)]
    """Decay of the mean of gradients, per step."""
    beta2: Annotated[float, Meta(ge=0, lt=1)]
    """Decay of the mean of squared gradients, per step."""
    weight_decay: Annotated[float, Meta(ge=0, le=10)]
    """Decoupled weight decay, in units of the learning rate."""
    clip_norm: Annotated[float, Meta(gt=0, le=10**6)]
    """Largest norm of the whole gradient; a longer one is scaled down to it."""
    warmup_steps: StepMark
    """Steps over which the learning rate rises from almost nothing to `lr`."""
    decay_steps: StepCount
    """Global step at which the learning rate has come down to its floor."""
    lr_floor: Annotated[float, Meta(ge=0, le=1)]
    """Learning rate from `decay_steps` on, as a fraction of `lr`."""
    batch_sequences: Annotated[int, Meta(ge=1, le=65536)]
    """Sequences in one step of one volunteer."""
    joiner_warmup_steps: StepMark
    """Steps over which a newcomer, whose optimizer knows nothing yet, rises to the learning rate of the others."""

    def lr_at(self, global_step: int) -> float:
        """The learning rate of the step with number `global_step`, counted from 0.

        Rises linearly through `warmup_steps`, falls along a half cosine to `lr * lr_floor` at `decay_steps`, and stays.
        """
        if global_step < self.warmup_steps:
            return self.lr * (global_step + 1) / self.warmup_steps
        progress = min(1.0, (global_step - self.warmup_steps) / (self.decay_steps - self.warmup_steps))
        height = 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.lr * (self.lr_floor + (1.0 - self.lr_floor) * height)


@dataclass(frozen=True, kw_only=True, slots=True)
class OuterSettings:
    """What the swarm does with the average of everyone's change to the weights."""

    lr: Annotated[float, Meta(gt=0, le=10)]
    """Learning rate of the outer Nesterov step."""
    momentum: Annotated[float, Meta(ge=0, lt=1)]
    """Share of the outer momentum that survives a round."""
    plain_until_step: StepMark
    """A round that starts before this global step averages plainly: learning rate 1, momentum untouched."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A stretch of the run in which rounds have the same length."""

    until_step: StepCount
    """Rounds that start before this global step belong to the stage or to an earlier one."""
    steps: Annotated[int, Meta(ge=1, le=10**6)]
    """Inner steps in a round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundSettings:
    """How long rounds are, in steps and in seconds."""

    total_steps: StepCount
    """Inner steps that each volunteer takes in the whole run."""
    schedule: Annotated[tuple[Stage, ...], Meta(min_length=1, max_length=64)]
    """Stages in the order of their `until_step`; the last ends at `total_steps`."""
    min_peers: Annotated[int, Meta(ge=1, le=1024)]
    """A round waits until so many volunteers are there."""
    train_s: Seconds
    """Seconds for the inner steps, before the slowest are left out."""
    exchange_s: Seconds
    """Seconds for exchanging results."""
    silence_s: Seconds
    """Seconds without a word after which a member counts as lost."""
    report_s: Seconds
    """Seconds between two reports of a member."""

    def steps_at(self, global_step: int) -> int:
        """Inner steps of the round that starts at `global_step`; 0 when the run is done.

        The last round is cut short, so that the run ends on `total_steps` exactly.
        """
        left = max(0, self.total_steps - global_step)
        stage = next((stage for stage in self.schedule if global_step < stage.until_step), self.schedule[-1])
        return min(stage.steps, left)

    def num_rounds(self) -> int:
        """Rounds that a run trains from step 0 to `total_steps`, if every round succeeds."""
        rounds = step = 0
        for stage in self.schedule:
            here = max(0, -(-(stage.until_step - step) // stage.steps))
            rounds += here
            step += here * stage.steps
        return rounds


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecSettings:
    """How a change to the weights is packed for the wire."""

    kind: Literal["int8"]
    """The number format."""
    block_elements: Annotated[int, Meta(ge=64, le=65536, multiple_of=64)]
    """Elements that share one scale."""
    part_elements: Annotated[int, Meta(ge=64, le=2**26, multiple_of=64)]
    """Elements that one member averages and sends as one piece; whole blocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSettings:
    """How often the loss on held-back text is measured, and on how much of it."""

    every_rounds: RoundCount
    """Rounds from one evaluation to the next."""
    sequences: Annotated[int, Meta(ge=1, le=65536)]
    """Sequences of validation text in one evaluation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSettings:
    """How often the shared model is written to disk, and how many copies stay."""

    every_rounds: Annotated[int, Meta(ge=1, le=16)]
    """Rounds from one checkpoint to the next; what follows the last but one can still be replayed, hence the limit."""
    keep: Annotated[int, Meta(ge=1, le=1000)]
    """Newest checkpoints that are kept; older ones are deleted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdmissionSettings:
    """Who may be a member, whom the run trusts, and so how many votes decide."""

    kind: Literal["invited", "allow-list", "open"]
    """invited: whoever holds a ticket of the organizer's. allow-list: those keys that the organizer allowed. Of both,
    one vote each, more than half decide. open: anyone; votes weigh what was earned, more than two thirds decide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Every setting of a run. Take one from `load`, `loads` or `decode`: those check it, the constructor does not."""

    name: Annotated[str, Meta(min_length=1, max_length=64, pattern=r"\A[a-z0-9]+(-[a-z0-9]+)*\Z")]
    """Short name in lower case, as in `tiny-books`."""
    summary: Annotated[str, Meta(min_length=1, max_length=400)]
    """One line for a volunteer who wonders whether to join."""
    model: ModelSettings
    data: DataSettings
    inner: InnerSettings
    outer: OuterSettings
    rounds: RoundSettings
    codec: CodecSettings
    evaluation: EvaluationSettings
    checkpoints: CheckpointSettings
    admission: AdmissionSettings

    def cut(self, rounds: int) -> "Recipe":
        """The recipe of a run that ends after the first `rounds` rounds of this one; at most `rounds.num_rounds()`."""
        step = 0
        for _ in range(rounds):
            step += self.rounds.steps_at(step)
        kept = [stage for stage in self.rounds.schedule if stage.until_step < step]
        last = next(stage for stage in self.rounds.schedule if stage.until_step >= step)
        schedule = (*kept, Stage(until_step=step, steps=last.steps))
        outer = replace(self.outer, plain_until_step=min(self.outer.plain_until_step, step))
        return replace(self, rounds=replace(self.rounds, total_steps=step, schedule=schedule), outer=outer)


def bundled() -> list[str]:
    """Names of the recipes that ship with the software, sorted."""
    files = resources.files("dugnad.configs").iterdir()
    return sorted(file.name.removesuffix(_SUFFIX) for file in files if file.name.endswith(_SUFFIX))


def load(name_or_path: str | Path) -> Recipe:
    """Read a bundled recipe by its name, or any other by the path of its `.toml` file. Raises RecipeError."""
    given = str(name_or_path)
    if given in bundled():
        return loads((resources.files("dugnad.configs") / (given + _SUFFIX)).read_text("utf-8"), source=given + _SUFFIX)
    try:
        with Path(given).open("rb") as file:
            raw = file.read(MAX_RECIPE_BYTES + 1)
        _check_size(raw, given)
        return loads(raw.decode("utf-8"), source=given)
    except FileNotFoundError:
        raise RecipeError(f"{given}: no such recipe or file; {_offer(given)}") from None
    except OSError as error:
        raise RecipeError(f"{given}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{given}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from None


def loads(text: str, *, source: str) -> Recipe:
    """Read a recipe from TOML text; `source` is what errors call it. Raises RecipeError."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        last = text.rstrip("\n").split("\n")
        end = f"line {len(last)}, column {len(last[-1]) + 1}, the end of the file"
        raise RecipeError(f"{source}: not valid TOML: {str(error).replace('end of document', end)}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, brackets nested thousands deep
        raise RecipeError(f"{source}: not a recipe: numbers too long or tables too deep") from None
    return _checked(table, source)


def encode(recipe: Recipe) -> bytes:
    """The one byte string that stands for a checked `recipe`: compact JSON, keys sorted, UTF-8."""
    return json.dumps(
        asdict(recipe), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def decode(data: bytes) -> Recipe:
    """Read what `encode` wrote. Raises RecipeError for anything else, be it another spelling of a valid recipe."""
    source = "received recipe"
    _check_size(data, source)
    try:
        table = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        raise RecipeError(f"{source}: not valid JSON; ask the organizer for the invite again") from None
    recipe = _checked(table, source)
    if encode(recipe) != data:
        # A run is named by the hash of its recipe: one recipe must not have two hashes.
        raise RecipeError(f"{source}: not in canonical form; ask the organizer for the invite again")
    return recipe


def _checked(table: Any, source: str) -> Recipe:
    try:
        recipe = _build(Recipe, table)
        _check_together(recipe)
    except _Mistake as mistake:
        raise RecipeError(f"{source}: {mistake}") from None
    return recipe


def _check_together(recipe: Recipe) -> None:
    """Check what no single field can know. Raises _Mistake."""
    model, data, inner, codec = recipe.model, recipe.data, recipe.inner, recipe.codec
    if model.width % model.heads:
        raise _Mistake(f"model.width is {model.width}; it must be a multiple of model.heads = {model.heads}")
    if codec.part_elements % codec.block_elements:
        blocks = f"codec.block_elements = {codec.block_elements}"
        raise _Mistake(f"codec.part_elements is {codec.part_elements}; it must be a multiple of {blocks}")
    if inner.decay_steps <= inner.warmup_steps:
        warmup = f"inner.warmup_steps = {inner.warmup_steps}"
        raise _Mistake(f"inner.decay_steps is {inner.decay_steps}; it must come after {warmup}")
    if not recipe.summary.isprintable():
        # It is shown to volunteers: an escape sequence in it would steer their terminal.
        raise _Mistake("summary holds line ends or control characters; it must be one line of printable text")
    needed = recipe.evaluation.sequences * (model.context + 1)
    if needed > data.validation_bytes:
        reads = f"evaluation.sequences = {recipe.evaluation.sequences} read {needed} bytes"
        raise _Mistake(f"data.validation_bytes is {data.validation_bytes}, but {reads}; hold more back or read less")
    _check_rounds(recipe)


def _check_rounds(recipe: Recipe) -> None:
    rounds, plain = recipe.rounds, recipe.outer.plain_until_step
    marks = [stage.until_step for stage in rounds.schedule]
    for index, (before, after) in enumerate(pairwise(marks), start=1):
        if after <= before:
            raise _Mistake(
                f"rounds.schedule[{index}].until_step is {after}; it must be greater than {before} before it"
            )
    if marks[-1] != rounds.total_steps:
        total = f"rounds.total_steps = {rounds.total_steps}"
        raise _Mistake(f"rounds.schedule[{len(marks) - 1}].until_step is {marks[-1]}; the last must equal {total}")
    if plain > rounds.total_steps:
        raise _Mistake(
            f"outer.plain_until_step is {plain}; it must be at most rounds.total_steps, {rounds.total_steps}"
        )
    if rounds.silence_s <= rounds.report_s:
        # Otherwise everyone counts as lost between two reports.
        report = f"rounds.report_s = {rounds.report_s}"
        raise _Mistake(f"rounds.silence_s is {rounds.silence_s}; it must be greater than {report}")


def _check_size(data: bytes, source: str) -> None:
    if len(data) > MAX_RECIPE_BYTES:
        raise RecipeError(f"{source}: larger than {MAX_RECIPE_BYTES // 1024} KiB; this is not a recipe")


def _offer(given: str) -> str:
    names = bundled()
    near = _nearest(Path(given).name.removesuffix(_SUFFIX), names)
    return f"bundled recipes: {', '.join(names)}" + (f"; did you mean {near}?" if near else "")


def _build(cls: type[T], table: Any, key: str = "") -> T:
    """Make the dataclass `cls` of `table`, which stands at `key` (dotted, "" at the top). Raises _Mistake."""
    hints = _hints(cls)
    if not isinstance(table, dict):
        raise _Mistake(f"{key or 'the whole'} is {_shown(table)}; it must be a table with {', '.join(hints)}")
    for name in table:
        if name not in hints:
            raise _Mistake(f'unknown key "{_dotted(key, _cut(name))}"{_instead(cls, key, name)}')
    for name, hint in hints.items():
        if name not in table:
            raise _Mistake(f'missing key "{_dotted(key, name)}"; it must be {_allowed(hint)}')
    return cls(**{name: _value(hint, table[name], _dotted(key, name)) for name, hint in hints.items()})


def _value(hint: Any, value: Any, key: str) -> Any:
    if not get_args(hint):
        return _build(hint, value, key)
    stage = _item(hint)
    try:
        # Of an array only the length is checked here: its tables go through _build for the sake of its errors.
        checked = msgspec.convert(value, Annotated[list[Any], get_args(hint)[1]] if stage else hint)
    except ValueError:  # msgspec's own, or half a surrogate pair where it looks for a word
        raise _Mistake(f"{key} is {_shown(value)}; it must be {_allowed(hint)}") from None
    if stage:
        return tuple(_build(stage, entry, f"{key}[{index}]") for index, entry in enumerate(checked))
    # + 0.0 makes -0.0 the 0.0 that it equals: equal recipes must have equal bytes.
    return checked + 0.0 if isinstance(checked, float) else checked


def _hints(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in fields(cls)}


def _item(hint: Any) -> Any:
    """The dataclass that an array field holds; None for any other field."""
    inner = get_args(get_args(hint)[0]) if get_origin(hint) is Annotated else ()
    return inner[0] if inner else None


def _allowed(hint: Any) -> str:
    """What a field takes, to stand after "it must be"."""
    if not get_args(hint):
        return f"a table with {', '.join(_hints(hint))}"
    if get_origin(hint) is Literal:
        return " or ".join(f'"{word}"' for word in get_args(hint))
    kind, meta = get_args(hint)
    if stage := _item(hint):
        return f"an array of {meta.min_length} to {meta.max_length} tables with {', '.join(_hints(stage))}"
    if kind is str:
        letters = "of a-z, 0-9 and inner hyphens" if meta.pattern else "characters in one line"
        return f"text: {meta.min_length} to {meta.max_length} {letters}"
    low = f"at least {meta.ge}" if meta.gt is None else f"above {meta.gt}"
    high = f"at most {meta.le}" if meta.lt is None else f"below {meta.lt}"
    step = f", and a multiple of {meta.multiple_of}" if meta.multiple_of else ""
    return f"a {'whole ' if kind is int else ''}number {low} and {high}{step}"


def _instead(cls: type, key: str, name: str) -> str:
    """What to write instead of the unknown `name` in the table of `cls` at `key`."""
    known = _hints(cls)
    word = _OTHER_NAMES.get(name, name)
    near = word if word in known else _nearest(word, known)
    if near:
        return f'; did you mean "{_dotted(key, near)}"?'
    return f"; known keys here: {', '.join(known)}"


def _nearest(word: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(_cut(word), known, n=1)), None)


def _dotted(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _cut(text: str) -> str:
    """`text` short enough for an error line, and unable to steer the terminal it is shown on."""
    safe = text[:_MAX_SHOWN]
    safe = safe if safe.isprintable() else ascii(safe)[1:-1]
    return safe if len(text) <= _MAX_SHOWN else safe + "…"


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else f"an array of {len(value)}"
    if isinstance(value, str):
        return f'"{_cut(value)}"'
    if isinstance(value, int) and abs(value) >= 10**_MAX_SHOWN:
        return "a huge number"
    return _cut(json.dumps(value, default=str))
