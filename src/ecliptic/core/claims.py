"""Claims: small honest experiments that show a paper's central effect against its own baseline.

A claim file `claims/<stage>/<slug>.py` holds `CLAIM = Claim(...)` and `run(arm, seed) -> float | dict[str, float]`. The
harness runs every (arm, seed), judges the gates, and writes `claims/results/<slug>.json` with all it takes to repeat or
doubt the number. Cells already measured by the same code are kept, so an interrupted run resumes.

    python -m ecliptic.core.claims run gda [--seeds 0,1,2] [--fresh]
    python -m ecliptic.core.claims run --all
    python -m ecliptic.core.claims --table      # write METHODS.md
    python -m ecliptic.core.claims --repeat 1   # is a published figure still what this code gives? (a new one every day)
    python -m ecliptic.core.claims --check      # is METHODS.md, or any result, older than its code?
"""

from __future__ import annotations

import argparse
import ast
import datetime
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import platform
import subprocess
import sys
import time
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ecliptic.core.files import atomic_file
from ecliptic.core.method import PACKAGE, Card, MethodError, cards, find, stages
from ecliptic.core.progress import Progress

Mode = Literal["ratio", "difference"]
Kind = Literal["effect", "control", "headroom"]
Metrics = dict[str, float]
Values = dict[str, dict[int, Metrics]]
"""Measured figures: arm -> seed -> metric -> value."""

SCORE = "score"
"""Name of the metric of a `run` that returns one number."""


AGREES = 0.02
"""How far a repeated figure may lie from the published one."""


class ClaimError(ValueError):
    """A claim file that cannot be run; the message says why."""


@dataclass(frozen=True)
class Gate:
    """One comparison, over seeds: the effect is `better` against the best of `than`, as a ratio or a difference.

    kind: an "effect" must reach `margin` in the mean over seeds, a "control" must not exceed it, "headroom" must reach it
    or nothing can be concluded. gate: False for what is measured and told but does not decide. metric: which figure of
    `run`. lower: smaller values are better. note: what a reader should know, such as what was tried where it fails.
    """

    says: str
    better: str
    than: str | tuple[str, ...]
    margin: float
    metric: str = SCORE
    kind: Kind = "effect"
    mode: Mode | None = None  # the claim's own
    gate: bool = True
    lower: bool = False
    note: str = ""

    @property
    def rivals(self) -> tuple[str, ...]:
        return (self.than,) if isinstance(self.than, str) else self.than


@dataclass(frozen=True)
class Claim:
    """What is claimed and how it is tested. The margins are set before the run they judge.

    says: the claim in one line. arms: names, or names with what `run` is to be called with. seeds: all that a result
    must have. Either `gates`, or the short form `better`, `than`, `margin`: one effect, and for `control` (an arm that
    lacks the decisive part) one control that must stay at or below `control_margin` (the margin, if not given).
    note: what was tried, and what a failed part means.
    """

    says: str
    arms: Mapping[str, Any] | Sequence[str]
    better: str = ""
    than: str | tuple[str, ...] = ""
    margin: float | None = None
    mode: Mode = "ratio"
    seeds: tuple[int, ...] = (0, 1, 2)
    control: str = ""
    control_margin: float | None = None
    gates: tuple[Gate, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ClaimError(f"seeds must be different numbers, at least one: {self.seeds}")
        if bool(self.gates) == bool(self.better):
            raise ClaimError("a claim has either gates=, or better=, than= and margin=")
        if self.better and self.margin is None:
            raise ClaimError("the short form needs margin=, set before the first run")
        for gate in self.all_gates:
            if unknown := {gate.better, *gate.rivals} - set(self.arms):
                raise ClaimError(f"gate {gate.says!r} names arms that do not exist: {', '.join(sorted(unknown))}")
        if not any(gate.gate and gate.kind == "effect" for gate in self.all_gates):
            raise ClaimError("no gate of kind 'effect' decides: there is nothing to hold")

    @property
    def all_gates(self) -> tuple[Gate, ...]:
        if self.gates or self.margin is None:
            return self.gates
        found = [Gate(self.says, self.better, self.than, self.margin)]
        if self.control:
            limit = self.margin if self.control_margin is None else self.control_margin
            found.append(
                Gate(f"control {self.control} does not show it", self.control, self.than, limit, kind="control")
            )
        return tuple(found)

    def subject(self, arm: str) -> Any:
        """What `run` gets for an arm."""
        return self.arms[arm] if isinstance(self.arms, Mapping) else arm


# Judging: figures to verdict, no files


def judge(claim: Claim, values: Values, seeds: Sequence[int]) -> dict[str, Any]:
    """The verdict over the seeds: every gate with its effects, and whether the whole claim `holds`.

    A gate whose figures are missing for any seed is not measured (`holds` None), and a claim with such a gate does not
    hold. `verdict` is "holds", "no headroom", "not fully measured" or "fails".
    """
    gates = [_judge_gate(gate, gate.mode or claim.mode, values, seeds) for gate in claim.all_gates]
    deciding = [gate for gate in gates if gate["gate"]]
    if any(gate["holds"] is False and gate["kind"] == "headroom" for gate in deciding):
        verdict = "no headroom"
    elif any(gate["holds"] is False for gate in deciding):
        verdict = "fails"
    elif any(gate["holds"] is None for gate in deciding):
        verdict = "not fully measured"
    else:
        verdict = "holds"
    return {"holds": verdict == "holds", "verdict": verdict, "gates": gates}


def _judge_gate(gate: Gate, mode: Mode, values: Values, seeds: Sequence[int]) -> dict[str, Any]:
    sign = -1 if gate.lower else 1
    found: dict[str, Any] = {
        "says": gate.says,
        "kind": gate.kind,
        "gate": gate.gate,
        "metric": gate.metric,
        "better": gate.better,
        "than": list(gate.rivals),
        "mode": mode,
        "lower": gate.lower,
        "margin": gate.margin,
        "note": gate.note,
        "holds": None,
    }
    pairs: list[tuple[float, float]] = []
    for seed in seeds:
        ours = values.get(gate.better, {}).get(seed, {}).get(gate.metric)
        theirs = [values.get(rival, {}).get(seed, {}).get(gate.metric) for rival in gate.rivals]
        if ours is None or any(value is None for value in theirs):
            return found
        pairs.append((ours, sign * max(sign * value for value in theirs if value is not None)))
    effects = [effect(a, b, mode, gate.lower) for a, b in pairs]
    mean = sum(effects) / len(effects)
    half = half_width(effects)
    reached = mean >= gate.margin if gate.kind != "control" else mean <= gate.margin
    return found | {
        "value": sum(a for a, _ in pairs) / len(pairs),
        "baseline": sum(b for _, b in pairs) / len(pairs),
        "effects": effects,
        "mean": mean,
        "low": None if half is None else mean - half,
        "high": None if half is None else mean + half,
        "holds": bool(reached),
    }


def effect(ours: float, theirs: float, mode: Mode, lower: bool = False) -> float:
    """How much better `ours` is: a ratio (1 is equal) or a difference (0 is equal); `lower` turns both round."""
    a, b = (theirs, ours) if lower else (ours, theirs)
    if mode == "difference":
        return a - b
    if b == 0:
        return math.inf if a > 0 else 1.0
    return a / b


_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % Student interval of the mean over seeds, None for one seed."""
    n = len(values)
    if n < 2 or not all(map(math.isfinite, values)):
        return None
    mean = sum(values) / n
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    t = _T95[n - 2] if n - 2 < len(_T95) else 1.96 + 2.5 / (n - 1)
    return t * deviation / math.sqrt(n)


# Running


def run_claim(
    slug: str,
    seeds: Sequence[int] | None = None,
    *,
    root: Path | None = None,
    methods: Path | None = None,
    fresh: bool = False,
) -> dict[str, Any]:
    """Measure every (arm, seed), judge, and write the result; returns it.

    seeds: others than the claim's own give a preliminary result, kept apart from the published ones. fresh: measure
    everything again, even what this very code has measured before. Runs on one thread.
    """
    root = checkout(root)
    card = find(slug, methods)
    claim, run, file = load_claim(card, root)
    chosen = tuple(claim.seeds if seeds is None else seeds)
    if not chosen:
        raise ClaimError("no seeds: give at least one")
    files = source_files(card, root)
    digests = {_relative(path, root): code_digest(path) for path in files}
    digest = _joined(digests)
    store = _Cells(_partial_file(root, card.slug), digest)
    if not fresh:
        store.resume(result_file(root, card.slug))
    todo = [(arm, seed) for arm in claim.arms for seed in chosen if not store.has(arm, seed)]
    with _one_thread(), Progress(f"claim {card.slug}", len(claim.arms) * len(chosen)) as bar:
        bar.advance(len(claim.arms) * len(chosen) - len(todo))
        for arm, seed in todo:
            began = time.perf_counter()
            metrics = _metrics(run(claim.subject(arm), seed), file)
            store.add(arm, seed, metrics, time.perf_counter() - began)
            bar.advance(note=f"{arm}, seed {seed}")
    values = store.values(claim.arms, chosen)
    verdict = judge(claim, values, chosen)
    command = f"python -m ecliptic.core.claims run {card.slug}"
    if seeds is not None and chosen != claim.seeds:
        command += f" --seeds {','.join(map(str, chosen))}"
    result = {
        "format": 1,
        "slug": card.slug,
        "stage": card.stage,
        "says": claim.says,
        **verdict,
        "note": claim.note,
        "seeds": list(chosen),
        "values": {arm: {str(s): m for s, m in by_seed.items()} for arm, by_seed in values.items()},
        "seconds": round(store.seconds(claim.arms, chosen), 1),
        "command": command,
        "commit": _git(root, "rev-parse", "HEAD"),
        "uncommitted": _uncommitted(root, list(digests)),
        "digest": digest,
        "sources": digests,
        "versions": _versions(),
        "machine": _machine(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    full = set(chosen) >= set(claim.seeds)
    _write(result_file(root, card.slug) if full else _preliminary_file(root, card.slug), result)
    if full:
        store.forget()
    return result


def repeat(slug: str, seed: int, *, root: Path | None = None, methods: Path | None = None) -> list[str]:
    """Measure one seed of a published result again, writing nothing; what differs from it, a line each.

    Another machine may round differently and flip a few predictions: figures agree within `AGREES`, relative where larger than 1.
    """
    root = checkout(root)
    card = find(slug, methods)
    published = read_result(card.slug, root)
    if published is None:
        return [f"{card.slug}: no published result to repeat"]
    claim, run, file = load_claim(card, root)
    lines = []
    with _one_thread():
        for arm in claim.arms:
            before = published["values"][arm][str(seed)]
            now = _metrics(run(claim.subject(arm), seed), file)
            for name in sorted(before.keys() & now.keys()):
                if abs(now[name] - before[name]) > AGREES * max(1.0, abs(before[name])):
                    lines.append(f"{card.slug}: {arm}, seed {seed}, {name} was {before[name]:.4f}, is {now[name]:.4f}")
    return lines


def turn(count: int, day: int, root: Path | None = None, methods: Path | None = None) -> list[tuple[str, int]]:
    """Which (slug, seed) to repeat on a day: over time every published cell comes round."""
    known = [(card.slug, read_result(card.slug, root)) for card in cards(methods)]
    cells = [(slug, seed) for slug, result in known if result is not None for seed in result["seeds"]]
    return [cells[(day * count + i) % len(cells)] for i in range(min(count, len(cells)))]


def load_claim(card: Card, root: Path) -> tuple[Claim, Callable[[Any, int], Any], Path]:
    """The `CLAIM` and `run` of a method's claim file."""
    file = root / card.claim_file
    if not file.is_file():
        raise ClaimError(f"{card.slug} has no claim: write {card.claim_file} with CLAIM and run(arm, seed)")
    spec = importlib.util.spec_from_file_location(f"ecliptic_claim_{card.slug}", file)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that what it defines can be pickled and found by its dataclasses
    # Not by the loader: its cached bytecode is taken for fresh if a file of the same length was written in the same second.
    exec(compile(file.read_bytes(), str(file), "exec"), module.__dict__)
    claim, run = getattr(module, "CLAIM", None), getattr(module, "run", None)
    if not isinstance(claim, Claim) or not callable(run):
        raise ClaimError(f"{file} must define CLAIM = Claim(...) and run(arm, seed)")
    return claim, run, file


def checkout(root: Path | None = None) -> Path:
    """The folder that holds `claims/`: the one given, the checkout this package stands in, or the current folder."""
    for candidate in [root] if root else [PACKAGE.parents[1], Path.cwd()]:
        if candidate and (candidate / "claims").is_dir():
            return candidate.resolve()
    raise ClaimError("claims run from a checkout of the repository: there is no claims/ folder here")


def result_file(root: Path, slug: str) -> Path:
    return root / "claims" / "results" / f"{slug}.json"


def read_result(slug: str, root: Path | None = None) -> dict[str, Any] | None:
    """The published result of a claim, or None."""
    file = result_file(checkout(root), slug)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _partial_file(root: Path, slug: str) -> Path:
    return root / "claims" / "results" / ".partial" / f"{slug}.json"


def _preliminary_file(root: Path, slug: str) -> Path:
    return root / "claims" / "results" / ".partial" / f"{slug}.preliminary.json"


class _Cells:
    """Figures by (arm, seed), on disk after each, valid for one state of the code."""

    def __init__(self, file: Path, digest: str):
        self.file, self.digest = file, digest
        self.cells: dict[str, dict[str, Any]] = {}

    def resume(self, result: Path) -> None:
        """Take over what the same code has measured: a published result, then an interrupted run."""
        if result.is_file():
            old = json.loads(result.read_text(encoding="utf-8"))
            if old.get("digest") == self.digest:
                share = old["seconds"] / max(sum(len(v) for v in old["values"].values()), 1)
                for arm, by_seed in old["values"].items():
                    for seed, metrics in by_seed.items():
                        self.cells[f"{arm}|{seed}"] = {"metrics": metrics, "seconds": share}
        if self.file.is_file():
            old = json.loads(self.file.read_text(encoding="utf-8"))
            if old.get("digest") == self.digest:
                self.cells.update(old["cells"])

    def has(self, arm: str, seed: int) -> bool:
        return f"{arm}|{seed}" in self.cells

    def add(self, arm: str, seed: int, metrics: Metrics, seconds: float) -> None:
        self.cells[f"{arm}|{seed}"] = {"metrics": metrics, "seconds": seconds}
        _write(self.file, {"digest": self.digest, "cells": self.cells})

    def values(self, arms: Mapping[str, Any] | Sequence[str], seeds: Sequence[int]) -> Values:
        return {arm: {seed: self.cells[f"{arm}|{seed}"]["metrics"] for seed in seeds} for arm in arms}

    def seconds(self, arms: Mapping[str, Any] | Sequence[str], seeds: Sequence[int]) -> float:
        return float(sum(self.cells[f"{arm}|{seed}"]["seconds"] for arm in arms for seed in seeds))

    def forget(self) -> None:
        self.file.unlink(missing_ok=True)


def _metrics(found: Any, file: Path) -> Metrics:
    named = found if isinstance(found, Mapping) else {SCORE: found}
    metrics = {str(name): float(value) for name, value in named.items()}
    if bad := [name for name, value in metrics.items() if not math.isfinite(value)]:
        raise ClaimError(f"{file}: run returned a value that is not finite for {', '.join(bad)}")
    return metrics


class _one_thread:
    """One thread for torch while a claim runs, so that figures do not depend on the number of cores."""

    def __enter__(self) -> None:
        self.before = None
        if "torch" in sys.modules:
            import torch

            self.before = torch.get_num_threads()
            torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            import torch

            torch.set_num_threads(self.before)


# Staleness


def source_files(card: Card, root: Path) -> list[Path]:
    """What a result depends on: the method, its claim, every `ecliptic.ops` module that either reaches, and the weights of
    the built-in models that the claim loads by name."""
    own = sorted(card.file.parent.rglob("*.py")) if card.file.name == "__init__.py" else [card.file]
    found = [*own, root / card.claim_file]
    waiting = list(found)
    while waiting:
        for module in _ops_imports(waiting.pop()):
            if module not in found:
                found.append(module)
                waiting.append(module)
    return [*found, *_weights(root / card.claim_file)]


def _weights(claim: Path) -> Iterator[Path]:
    """The weight files behind each `load("name")` of a claim."""
    folder = PACKAGE / "models" / "weights"
    for node in ast.walk(ast.parse(claim.read_bytes())):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            name = node.args[0].value
            if called == "load" and isinstance(name, str) and name.isidentifier():
                yield from sorted([*folder.glob(f"{name}.safetensors"), *folder.glob(f"{name}/*.safetensors")])


def _ops_imports(file: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(file.read_bytes())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.startswith("ecliptic.ops."):
                path = PACKAGE.joinpath(*name.split(".")[1:])
                candidates = (path.with_suffix(".py"), path / "__init__.py")
                yield from (p for p in candidates if p.is_file())


def code_digest(file: Path) -> str:
    """A hash of what a file does: comments, docstrings and line breaks of code do not count."""
    if file.suffix != ".py":
        return hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest()
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}
    layout = {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    text = file.read_text(encoding="utf-8")
    tokens = [t for t in _tokens(text) if t.type not in skip]
    kept: list[str] = []
    starts = True  # at the beginning of a statement
    for token, following in zip(tokens, [*tokens[1:], None]):
        ends = following is None or following.type == tokenize.NEWLINE
        if token.type in layout:
            if not (token.type == tokenize.NEWLINE and (not kept or kept[-1] in {"\n", ">", "<"})):
                kept.append({tokenize.NEWLINE: "\n", tokenize.INDENT: ">", tokenize.DEDENT: "<"}[token.type])
            starts = True
            continue
        docstring = starts and ends and token.type == tokenize.STRING
        starts = False
        trailing_comma = token.string == "," and following is not None and following.string in ")]}"
        if not docstring and not trailing_comma:
            kept.append(token.string)
    return hashlib.blake2b("\0".join(kept).encode(), digest_size=8).hexdigest()


def _tokens(text: str) -> Iterator[tokenize.TokenInfo]:
    """Tokens with each f-string in one piece: Python takes them apart from 3.12 on, and digests must not depend on that."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    opening = {getattr(tokenize, f"{kind}STRING_START", None) for kind in "FT"} - {None}
    closing = {getattr(tokenize, f"{kind}STRING_END", None) for kind in "FT"} - {None}
    depth, first = 0, None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in opening:
            depth, first = depth + 1, first or token
        elif token.type in closing:
            depth -= 1
            if depth == 0 and first is not None:
                (row, column), (last_row, last_column) = first.start, token.end
                whole = text[starts[row - 1] + column : starts[last_row - 1] + last_column]
                yield tokenize.TokenInfo(tokenize.STRING, whole, first.start, token.end, first.line)
                first = None
        elif depth == 0:
            yield token


def why_stale(result: Mapping[str, Any], *, root: Path | None = None, methods: Path | None = None) -> str | None:
    """What changed since the result was measured, in words, or None if nothing did."""
    root = checkout(root)
    try:
        card = find(result["slug"], methods)
    except MethodError:
        return f"there is no method {result['slug']} any more"
    if not (root / card.claim_file).is_file():
        return f"{card.claim_file} is gone"
    now = {_relative(path, root): code_digest(path) for path in source_files(card, root)}
    then = result["sources"]
    changed = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
    return f"changed since it was measured: {', '.join(changed)}" if changed else None


def is_stale(result: Mapping[str, Any], *, root: Path | None = None, methods: Path | None = None) -> bool:
    """True if any source file of the result does something else than when it was measured."""
    return why_stale(result, root=root, methods=methods) is not None


def check(root: Path | None = None, methods: Path | None = None) -> list[str]:
    """What is out of date, one line each: missing or stale results, results of no method, METHODS.md."""
    root = checkout(root)
    problems = []
    known = cards(methods)
    for card in known:
        result = read_result(card.slug, root)
        if result is None:
            problems.append(f"{card.slug}: no result; run `python -m ecliptic.core.claims run {card.slug}`")
        elif reason := why_stale(result, root=root, methods=methods):
            problems.append(f"{card.slug}: {reason}; run `python -m ecliptic.core.claims run {card.slug}`")
    for file in sorted((root / "claims" / "results").glob("*.json")):
        if file.stem not in {card.slug for card in known}:
            problems.append(f"claims/results/{file.name}: there is no such method")
    page = root / "METHODS.md"
    if not page.is_file() or page.read_text(encoding="utf-8") != table(root, methods):
        problems.append("METHODS.md is out of date; run `python -m ecliptic.core.claims --table`")
    return problems


# Telling


def table(root: Path | None = None, methods: Path | None = None) -> str:
    """METHODS.md: every method with its paper, its purpose and what its claim measured."""
    root = checkout(root)
    known = cards(methods)
    lines = [
        "<!-- Generated by `python -m ecliptic.core.claims --table`. Do not edit. -->",
        "# Methods",
        "",
        f"{len(known)} method{'s' * (len(known) != 1)}, by stage. Every figure comes from a result file in `claims/results/`, "
        "which holds seeds, commit, versions, machine and command; "
        "`ecliptic claim <slug>` (or `python -m ecliptic.core.claims run <slug>`) measures it again.",
        "",
    ]
    details: list[str] = []
    described = stages(methods)
    for stage in dict.fromkeys(card.stage for card in known):
        lines += [f"## {stage}", "", described.get(stage, ""), ""]
        lines += ["| method | paper | purpose | claim | verdict | measured |", "|---|---|---|---|---|---|"]
        for card in (c for c in known if c.stage == stage):
            result = read_result(card.slug, root)
            stale = result is not None and is_stale(result, root=root, methods=methods)
            source = f"[{card.title}]({card.link}) ({card.year})"
            row = [f"`{card.slug}`", source, card.purpose, card.claim, _verdict(result, stale), _headline(result)]
            lines.append("| " + " | ".join(_cell(text) for text in row) + " |")
            if result is not None:
                details += _details(result)
        lines.append("")
    if details:
        lines += ["## What each claim measured", "", *details]
    return "\n".join(lines).rstrip() + "\n"


def _verdict(result: Mapping[str, Any] | None, stale: bool) -> str:
    if result is None:
        return "not run yet"
    deciding = [gate for gate in result["gates"] if gate["gate"]]
    passed = sum(gate["holds"] is True for gate in deciding)
    seeds = len(result["seeds"])
    text = f"{result['verdict']}: {passed} of {len(deciding)} gates, {seeds} seed{'s' * (seeds != 1)}"
    return f"{text} (stale)" if stale else text


def _headline(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return ""
    gate = next(g for g in result["gates"] if g["gate"] and g["kind"] == "effect")
    return f"{gate['says']}: {_measured(gate)}"


def _measured(gate: Mapping[str, Any]) -> str:
    if gate["holds"] is None:
        return "not measured"
    interval = "" if gate["low"] is None else f" [{_signed(gate, gate['low'])}, {_signed(gate, gate['high'])}]"
    return f"{gate['value']:.3g} against {gate['baseline']:.3g}, {_signed(gate, gate['mean'])}{interval}"


def _signed(gate: Mapping[str, Any], value: float) -> str:
    return f"x{value:.3g}" if gate["mode"] == "ratio" else f"{value:+.3f}"


def _details(result: Mapping[str, Any]) -> list[str]:
    lines = [f"### {result['slug']}", "", result["says"], ""]
    lines += ["| | what | better against | measured, mean over seeds [95 %] | asked | |", "|---|---|---|---|---|---|"]
    for gate in result["gates"]:
        kind = gate["kind"] if gate["gate"] else f"{gate['kind']}, reported only"
        asked = f"{'at most' if gate['kind'] == 'control' else 'at least'} {_signed(gate, gate['margin'])}"
        mark = {True: "yes", False: "**no**", None: "not measured"}[gate["holds"]]
        says = gate["says"] + (f" ({gate['note']})" if gate["note"] else "")
        row = [kind, says, f"{gate['better']} against {' and '.join(gate['than'])}", _measured(gate), asked, mark]
        lines.append("| " + " | ".join(_cell(text) for text in row) + " |")
    if result["note"]:
        lines += ["", result["note"]]
    commit = (result["commit"] or "no commit")[:10]
    lines += [
        "",
        f"Seeds {', '.join(map(str, result['seeds']))}; {result['seconds']:.0f} s on one thread of {result['machine']['cpu']}; "
        f"commit {commit}; `{result['command']}`.",
        "",
    ]
    return lines


def summary(result: Mapping[str, Any]) -> str:
    """A result for the terminal."""
    lines = [f"{result['slug']}: {result['verdict']}", result["says"], ""]
    for gate in result["gates"]:
        mark = {True: "yes", False: "NO ", None: "-  "}[gate["holds"]]
        sense = "<=" if gate["kind"] == "control" else ">="
        role = gate["kind"] if gate["gate"] else "report"
        asked = f"asked {sense} {_signed(gate, gate['margin'])}"
        lines.append(f"  {mark} {role:8} {gate['says']}: {_measured(gate)}; {asked}")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


# Where it ran


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("ecliptic", "torch", "transformers", "numpy", "scikit-learn", "pillow"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name == "ecliptic":
                from ecliptic import __version__

                found[name] = __version__
    return found


def _machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    memory = None
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        cpu = next(line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name"))
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (OSError, StopIteration, ValueError, AttributeError):
        pass  # no such file on this system: the processor's family is what can be said
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_gib": memory, "system": platform.platform(), "threads": 1}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _uncommitted(root: Path, files: list[str]) -> list[str]:
    """Which of the sources differ from the commit, so that the commit alone does not repeat the result."""
    listed = _git(root, "status", "--porcelain", "--", *files)
    return [] if listed is None else [line[2:].strip() for line in listed.splitlines()]


def _relative(path: Path, root: Path) -> str:
    path = path.resolve()
    return (
        path.relative_to(root).as_posix() if path.is_relative_to(root) else path.relative_to(PACKAGE.parent).as_posix()
    )


def _joined(digests: Mapping[str, str]) -> str:
    return hashlib.blake2b(json.dumps(digests, sort_keys=True).encode(), digest_size=8).hexdigest()


def _write(file: Path, content: Any) -> None:
    """JSON in one step: a reader sees the old file or the new one."""
    with atomic_file(file, "w") as draft:
        draft.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 if all that was asked holds."""
    parser = argparse.ArgumentParser(prog="python -m ecliptic.core.claims", description="Run claims and tell of them.")
    parser.add_argument("command", nargs="?", choices=["run"], help="measure claims")
    parser.add_argument("slugs", nargs="*", help="which methods")
    parser.add_argument("--all", action="store_true", help="run the claim of every method")
    parser.add_argument("--seeds", help="other seeds than the claim's own, such as 0,1,2: a preliminary result")
    parser.add_argument("--fresh", action="store_true", help="measure again what this code has measured before")
    parser.add_argument("--json", action="store_true", help="print the result files")
    parser.add_argument("--check", action="store_true", help="fail if METHODS.md or a result is older than its code")
    parser.add_argument("--repeat", type=int, metavar="N", help="measure N published seeds again, others every day")
    parser.add_argument("--table", action="store_true", help="write METHODS.md")
    asked = parser.parse_args(arguments)
    if not (asked.command or asked.check or asked.table or asked.repeat):
        parser.error("say run SLUG, run --all, --table, --repeat N or --check")
    if asked.command and bool(asked.slugs) == asked.all:
        parser.error("run needs either slugs or --all")
    code = 0
    try:
        seeds = tuple(int(s) for s in asked.seeds.split(",")) if asked.seeds else None
        slugs = [card.slug for card in cards()] if asked.all else asked.slugs
        for slug in slugs if asked.command else []:
            result = run_claim(slug, seeds, fresh=asked.fresh)
            print(json.dumps(result, indent=1) if asked.json else summary(result) + "\n")
            code |= not result["holds"]
        if asked.table:
            (checkout() / "METHODS.md").write_text(table(), encoding="utf-8")
        for slug, seed in turn(asked.repeat, datetime.date.today().toordinal()) if asked.repeat else []:
            differences = repeat(slug, seed)
            print("\n".join(differences) or f"{slug}, seed {seed}: measured again, as published")
            code |= bool(differences)
        if asked.check:
            problems = check()
            print("\n".join(problems) if problems else "METHODS.md and every result are up to date")
            code |= bool(problems)
    except (ClaimError, MethodError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(code)


if __name__ == "__main__":
    from ecliptic.core.claims import main as run_main  # claim files import this module by name: be the same one

    sys.exit(run_main())
