"""A recipe: a flat list of steps, each a method's slug with its arguments, checked before anything starts.

    - load: tiny
    - data: {source: scenes, part: train}
    - train: {objective: cloob, steps: 400}
    - gda
    - evaluate: {source: scenes, part: test}

A step works on what the steps before it left: records, an encoder, a fitted predictor. Each keeps a folder of its own, so that
a run that was stopped goes on where it was; a step is done again only where something before it has changed.
This module knows `load`, `train` and every method; `data` and `evaluate` come from the caller, who knows where data are.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import shutil
import sys
import time
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from ecliptic.core.contracts import DataStep, ModelStep, Objective, Pairs, Predictor
from ecliptic.core.files import atomic_file
from ecliptic.core.method import MethodError, cards, find, get

if TYPE_CHECKING:
    from ecliptic.core.encoder import HFEncoder

STATE = "step.json"
OURS = {"checkpoints", "log", "resume"}  # of a training: the run decides where these lie, or it could not go on


class RecipeError(ValueError):
    """A recipe that cannot be run as it is written; the message names the step, the argument and what would fit."""


@dataclass
class State:
    """What steps hand on. judge: fitted on `encoder` as it is now, or None. reports: one (title, report) per evaluation."""

    pairs: Pairs | None = None
    encoder: HFEncoder | None = None
    judge: Predictor | None = None
    reports: list[tuple[str, Any]] = field(default_factory=list)


class Action(ABC):
    """One step with its arguments in place. `needs` and `gives` name fields of `State`."""

    needs: ClassVar[tuple[str, ...]] = ()
    gives: ClassVar[str] = ""
    kept: ClassVar[bool] = True  # False: cheap and exact to do again, so nothing is written

    @abstractmethod
    def run(self, state: State, folder: Path) -> str:
        """Do it; returns what came out, in a few words that change if the outcome does. May be called on a folder that an
        interrupted call left."""

    def restore(self, state: State, folder: Path) -> None:
        """Bring back what `run` left, from the folder."""
        raise NotImplementedError


class Load(Action):
    """`load: MODEL`: the encoder to work on, whatever `ecliptic.load` opens."""

    gives = "encoder"
    kept = False

    def __init__(self, model: str):
        self.model = model

    def run(self, state: State, folder: Path) -> str:
        from ecliptic.core.encoder import load

        state.encoder, state.judge = load(self.model), None
        return state.encoder.id


class Curate(Action):
    """A `DataStep` on the records. Lazy, and decided by seed and record id alone, so nothing of it needs keeping."""

    needs = ("pairs",)
    gives = "pairs"
    kept = False

    def __init__(self, step: DataStep):
        self.step = step

    def run(self, state: State, folder: Path) -> str:
        assert state.pairs is not None
        state.pairs = self.step.apply(state.pairs)
        return f"{len(state.pairs):,} records" if isinstance(state.pairs, Sized) else "records"


class Change(Action):
    """A `ModelStep` on the encoder, with the records where there are any; `train` is one. `name` is added to the encoder's."""

    needs = ("encoder",)
    gives = "encoder"

    def __init__(self, step: ModelStep, name: str):
        self.step, self.name = step, name

    def run(self, state: State, folder: Path) -> str:
        from ecliptic.core.train import Train

        assert state.encoder is not None
        step = self.step
        if isinstance(step, Train):  # it can go on from the middle
            step = replace(step, checkpoints=folder / "checkpoints", log=folder / "log.jsonl")
        changed = cast("HFEncoder", step.apply(state.encoder, state.pairs))
        changed.name = f"{state.encoder.name}+{self.name}"
        changed.save_pretrained(folder / "model")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        state.encoder, state.judge = changed, None
        return changed.id

    def restore(self, state: State, folder: Path) -> None:
        from ecliptic.core.encoder import load

        state.encoder, state.judge = load(folder / "model"), None


class Learn(Action):
    """A `Predictor`, fitted on the records."""

    needs = ("encoder", "pairs")
    gives = "judge"

    def __init__(self, predictor: Predictor):
        self.predictor = predictor

    def run(self, state: State, folder: Path) -> str:
        from ecliptic.core.encoder import BUILT_IN

        assert state.encoder is not None
        assert state.pairs is not None
        state.judge = self.predictor.clone().fit(state.encoder, state.pairs)
        state.judge.save(folder / "predictor", with_encoder=state.encoder.name not in BUILT_IN)
        return f"fitted {type(self.predictor).__name__}"

    def restore(self, state: State, folder: Path) -> None:
        from ecliptic.core.predictor_io import load_predictor

        state.judge = load_predictor(folder / "predictor", state.encoder)


@dataclass(frozen=True)
class Step:
    """One line of a recipe, understood. `number` counts from 1."""

    number: int
    name: str
    arguments: dict[str, Any]
    action: Action

    @property
    def folder(self) -> str:
        return f"{self.number:02d}-{self.name.replace(':', '-')}"


@dataclass(frozen=True)
class Done:
    """One step of a finished run: what came out, how long it took, and whether it had been done before."""

    step: Step
    outcome: str
    seconds: float
    resumed: bool
    folder: Path | None


@dataclass(frozen=True)
class Outcome:
    """What a run left. model, predictor: the folders of the last ones that a step wrote."""

    steps: list[Done]
    state: State
    model: Path | None
    predictor: Path | None


class Recipe:
    """Steps that fit together. Building one checks names, arguments and order; nothing is opened or computed."""

    def __init__(self, lines: Sequence[Any], verbs: Mapping[str, Callable[..., Action]] | None = None):
        """lines: a slug, or a mapping of one slug to its arguments (a mapping, or a value for the first of them).
        verbs: further names that are no methods. Raises RecipeError."""
        if isinstance(lines, str | Mapping) or not isinstance(lines, Sequence):
            raise RecipeError("a recipe is a list of steps, each `- slug` or `- slug: arguments`")
        if not lines:
            raise RecipeError("the recipe has no steps")
        from ecliptic.core.train import Train

        self.verbs: Mapping[str, Callable[..., Any]] = {"load": Load, "train": Train, **(verbs or {})}
        self.steps = [self._read(number, line) for number, line in enumerate(lines, start=1)]
        have: set[str] = set()
        for step in self.steps:
            for need in step.action.needs:
                if need not in have:
                    raise RecipeError(f"step {step.number} ({step.name}) needs {_WORDS[need]}")
            if step.action.gives == "encoder":
                have.discard("judge")
            have.add(step.action.gives)

    def run(self, folder: str | Path, *, fresh: bool = False, told: Callable[[Done], None] | None = None) -> Outcome:
        """Do what is not yet done. folder: one sub-folder per step. fresh: do everything again.

        told: called after each step. Killed at any moment, the same call goes on; nothing done is done twice.
        """
        folder, state, token, done = Path(folder), State(), "", list[Done]()
        for step in self.steps:
            place = folder / step.folder
            token = _digest(token, step.name, step.arguments)
            began = time.perf_counter()
            before = None if fresh or not step.action.kept else _state(place)
            if before and before["token"] == token and before["done"]:
                step.action.restore(state, place)
                done.append(Done(step, before["outcome"], before["seconds"], True, place))
            else:
                if step.action.kept:
                    if before is None or before["token"] != token:  # of another recipe, or to be done afresh
                        shutil.rmtree(place, ignore_errors=True)
                    _note(place, token=token, done=False)
                outcome = step.action.run(state, place)
                seconds = time.perf_counter() - began
                if step.action.kept:
                    _note(place, token=token, done=True, outcome=outcome, seconds=seconds)
                done.append(Done(step, outcome, seconds, False, place if step.action.kept else None))
            token = _digest(token, done[-1].outcome)
            if told is not None:
                told(done[-1])
        return Outcome(done, state, _last(done, "model"), _last(done, "predictor"))

    def _read(self, number: int, line: Any) -> Step:
        where = f"step {number}"
        if isinstance(line, str):
            name, given = line, None
        elif isinstance(line, Mapping) and len(line) == 1:
            ((name, given),) = line.items()
        else:
            raise RecipeError(f"{where}: write `- slug` or `- slug: arguments`, not {line!r}")
        name = str(name)
        where = f"{where} ({name})"
        make: Any = self.verbs.get(name) or _method(name, self.verbs, where)
        arguments = _named(make, given, where)
        if name == "train" and (own := sorted(OURS & arguments.keys())):
            raise RecipeError(f"{where}: {', '.join(own)} cannot be set: the run keeps its own")
        return Step(number, name, arguments, _action(construct(make, arguments, where), name, where))


def construct(subject: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> Any:
    """Call it with arguments as a recipe has them: names are checked, and values brought to the annotated types."""
    signature = inspect.signature(subject)
    takes = {p.name: p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD}
    for name in arguments:
        if name not in takes:
            near = difflib.get_close_matches(name, takes, 1)
            listed = ", ".join(takes) or "none"
            raise RecipeError(
                f"{where}: no argument {name!r}; " + (f"did you mean {near[0]}?" if near else f"it takes {listed}")
            )
    for name, parameter in takes.items():
        if (
            parameter.default is parameter.empty
            and name not in arguments
            and parameter.kind is not parameter.VAR_POSITIONAL
        ):
            raise RecipeError(f"{where}: the argument {name!r} is missing")
    hints = _hints(subject)
    values = {name: _brought(value, hints.get(name, Any), f"{where}, {name}") for name, value in arguments.items()}
    try:
        return subject(**values)
    except RecipeError:
        raise
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {error}") from error


def named_objective(name: str) -> type[Objective]:
    """`infonce`, `sigmoid`, or the objective that a method's slug (or `slug:Part`) stands for. Raises MethodError."""
    from ecliptic.core.objectives import InfoNCE, Sigmoid

    plain: dict[str, type[Objective]] = {"infonce": InfoNCE, "sigmoid": Sigmoid}
    if (key := name.lower().replace("-", "").replace("_", "")) in plain:
        return plain[key]
    losses = [f"{c.slug}:{part}" for c in cards() for part, kind in c.parts if kind == "Objective"]
    try:
        found = get(name)
    except MethodError as error:
        raise MethodError(f"no loss {name!r}; choose one of {', '.join([*plain, *losses])}") from error
    if isinstance(found, type) and issubclass(found, Objective):
        return found
    raise MethodError(f"{name} is no loss; choose one of {', '.join([*plain, *losses])}")


_WORDS = {
    "pairs": "records: put a `data` step before it",
    "encoder": "a model: put a `load` step before it",
    "judge": "a fitted predictor: put one before it, after the last step that changes the model",
}


def _method(name: str, verbs: Mapping[str, Any], where: str) -> Any:
    try:
        card = find(name.partition(":")[0])
        found = get(name)
    except MethodError as error:
        near = difflib.get_close_matches(name, verbs, 1)
        raise RecipeError(f"{where}: " + (f"did you mean {near[0]}?" if near else str(error))) from error
    if dict(card.parts).get(name.partition(":")[2] or card.name) not in ("DataStep", "ModelStep", "Predictor"):
        how = f"write `- train: {{objective: {name}}}`" if _is(found, Objective) else "it is a plain function"
        raise RecipeError(f"{where} is no step of its own: {how}")
    return found


def _action(subject: Any, name: str, where: str) -> Action:
    if isinstance(subject, Action):
        return subject
    if isinstance(subject, DataStep):
        return Curate(subject)
    if isinstance(subject, ModelStep):
        return Change(subject, name)
    if isinstance(subject, Predictor):
        return Learn(subject)
    raise RecipeError(f"{where}: a {type(subject).__name__} is no step")


def _named(subject: Any, given: Any, where: str) -> dict[str, Any]:
    """Arguments by name; a bare value is the first."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return {str(name): value for name, value in given.items()}
    first = next(iter(inspect.signature(subject).parameters), None)
    if first is None:
        raise RecipeError(f"{where}: takes no arguments")
    return {first: given}


def _hints(subject: Any) -> dict[str, Any]:
    """Types of the arguments by name; one that only a type checker can resolve is left out, and its values pass as they are."""
    bases = inspect.getmro(subject) if isinstance(subject, type) else (subject,)
    names: dict[str, Any] = {}
    for base in reversed(bases):
        names |= vars(sys.modules[base.__module__])
    hints = {}
    for name, parameter in inspect.signature(subject).parameters.items():
        hint = parameter.annotation
        try:
            hints[name] = eval(hint, names) if isinstance(hint, str) else hint  # annotations of our own package
        except NameError:
            continue
    return {name: hint for name, hint in hints.items() if hint is not inspect.Parameter.empty}


def _is(subject: Any, kind: type) -> bool:
    return isinstance(subject, type) and issubclass(subject, kind)


def _brought(value: Any, hint: Any, where: str) -> Any:
    """The value as the type hint wants it, where YAML can mean only one thing; RecipeError where it cannot be that type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, typing.TypeVar | str):
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        problems = []
        for choice in (c for c in inner if c is not type(None)):
            try:
                return _brought(value, choice, where)
            except RecipeError as error:
                problems.append(error)
        raise problems[0]
    if origin is Literal:
        if value in inner:
            return value
        raise RecipeError(f"{where}: {value!r} is none of {', '.join(map(str, inner))}")
    if _is(hint, Objective):
        return _objective(value, where)
    if is_dataclass(hint) and isinstance(value, Mapping):
        return construct(cast(Any, hint), {str(k): v for k, v in value.items()}, where)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-4, without a point, as text
        try:
            return float(value)
        except ValueError:
            raise RecipeError(f"{where}: {value!r} is no number") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    kind = origin or hint
    if kind in (tuple, list) or kind is Sequence:
        if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
            raise RecipeError(f"{where}: {value!r} is no list")
        return list(value) if kind is list else tuple(value)
    if kind in (int, float, bool, str):
        if isinstance(value, kind) and (kind in (bool, str) or not isinstance(value, bool)):
            return value
        raise RecipeError(f"{where}: {value!r} is no {_KINDS[kind]}")
    return value


_KINDS: dict[Any, str] = {int: "whole number", float: "number", bool: "yes or no", str: "text"}


def _objective(value: Any, where: str) -> Objective:
    """`cloob`, or `{cloob: {beta: 8}}`."""
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise RecipeError(f"{where}: write the slug of a loss, or one slug with its arguments, not {value!r}")
    ((name, given),) = value.items()
    try:
        kind = named_objective(str(name))
    except MethodError as error:
        raise RecipeError(f"{where}: {error}") from error
    return cast(Objective, construct(kind, _named(kind, given, f"{where}, {name}"), f"{where}, {name}"))


def _digest(*parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _state(place: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((place / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"token", "done"} <= found.keys() else None


def _note(place: Path, **state: Any) -> None:
    with atomic_file(place / STATE, "w") as file:
        json.dump(state, file, indent=1)


def _last(done: Sequence[Done], name: str) -> Path | None:
    found = [d.folder / name for d in done if d.folder is not None and (d.folder / name).is_dir()]
    return found[-1] if found else None
