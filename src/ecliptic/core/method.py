"""What a method is, and how the toolkit finds them: by reading files, never by a list of names.

A method is `methods/<stage>/<slug>.py` (or a folder `<slug>/` whose `__init__.py` plays that part) that decorates one
class or function with `@method(...)`, plus a test and a claim of the same name. Discovery parses the files and reads
only the literals of the decorator, so that listing imports neither the methods nor torch.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

CONTRACTS = ("DataStep", "Objective", "ModelStep", "Predictor")
"""The abstract classes of `core.contracts`; whatever is none of them is a plain function."""

STAGES = (
    "attend",
    "curate",
    "pretrain",
    "enhance",
    "adapt",
    "segment",
    "detect",
    "restore",
    "caption",
    "retrieve",
    "compress",
    "audit",
)
"""The folders of `methods/` in the order of a model's life; an unknown folder is listed after them."""

PACKAGE = Path(__file__).resolve().parents[1]
T = TypeVar("T")


class MethodError(ValueError):
    """A method file that breaks the rules of the house, or a name that no method has."""


@dataclass(frozen=True)
class Paper:
    """Where a method was published. `arxiv` is the bare number; `url` is for papers that are not on arXiv."""

    title: str
    arxiv: str | None = None
    year: int | None = None
    url: str | None = None

    @property
    def link(self) -> str | None:
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else self.url


@dataclass(frozen=True)
class Card:
    """What can be said about a method without importing it.

    kind: the contract of `name`, one of `CONTRACTS` or "function". parts: every public class of the file that meets a
    contract, as (name, kind), `name` first: a paper may need a step and an objective. file: where it stands.
    """

    slug: str
    stage: str
    name: str
    title: str
    arxiv: str | None
    year: int | None
    url: str | None
    purpose: str
    claim: str
    kind: str
    file: Path
    parts: tuple[tuple[str, str], ...]

    @property
    def paper(self) -> Paper:
        return Paper(self.title, self.arxiv, self.year, self.url)

    @property
    def link(self) -> str | None:
        return self.paper.link

    @property
    def module(self) -> str:
        return f"ecliptic.methods.{self.stage}.{self.slug}"

    @property
    def test_file(self) -> str:
        """Path of the test that shares the name, relative to the checkout."""
        return f"tests/methods/{self.stage}/test_{self.slug}.py"

    @property
    def claim_file(self) -> str:
        """Path of the claim that shares the name, relative to the checkout."""
        return f"claims/{self.stage}/{self.slug}.py"

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: plain values only."""
        return {**asdict(self), "file": str(self.file), "link": self.link}


@dataclass(frozen=True)
class Method:
    """What the decorator leaves on the class or function as `.card`: the literals, before any file is read."""

    paper: Paper
    purpose: str
    claim: str


def method(paper: Paper, *, purpose: str, claim: str) -> Callable[[T], T]:
    """Declare the decorated class or function to be the method of its file.

    `purpose` says in one line what it is for, `claim` in one line what its claim shows. Every argument must be a
    literal, because listing reads the file without running it.
    """

    def declare(subject: T) -> T:
        subject.card = Method(paper, purpose, claim)  # type: ignore[attr-defined]
        return subject

    return declare


def cards(root: Path | None = None) -> list[Card]:
    """Every method under `root` (the package's own `methods/`), in the order of the stages, then by slug.

    Raises MethodError, naming file and line, for a file without a well-formed `@method`, and for a slug that two
    stages share.
    """
    return list(_cards((root or PACKAGE / "methods").resolve()))


def stages(root: Path | None = None) -> dict[str, str]:
    """Each stage that has a folder, in order, with the first line of its docstring: the question it answers."""
    root = root or PACKAGE / "methods"
    found = sorted((p for p in root.iterdir() if p.is_dir() and not p.name.startswith(("_", "."))), key=_by_stage)
    return {p.name: _first_line(p / "__init__.py") for p in found}


def baselines() -> dict[str, str]:
    """What methods are compared with, the files of `baselines/`: slug -> the first line of its docstring."""
    files = sorted((PACKAGE / "baselines").glob("[!_]*.py"))
    return {file.stem: _first_line(file) for file in files}


def get(name: str, root: Path | None = None) -> Any:
    """The class or function behind a slug, of a method or a baseline, imported now. `slug:Part` names another class of the file.

    Hyphens may stand for underscores. Raises MethodError with the nearest names where there is no such method.
    """
    slug, _, part = name.partition(":")
    if root is None and _is_baseline(plain := _slug(slug)):
        found = "".join(word.capitalize() for word in plain.split("_"))
        if part and part != found:
            raise MethodError(f"{plain} has no part {part!r}; it has {found}")
        return getattr(importlib.import_module(f"ecliptic.baselines.{plain}"), found)
    card = find(slug, root)
    if part and part not in dict(card.parts):
        raise MethodError(f"{card.slug} has no part {part!r}; it has {', '.join(p for p, _ in card.parts)}")
    return getattr(importlib.import_module(card.module), part or card.name)


def find(slug: str, root: Path | None = None) -> Card:
    """The card of one method. Raises MethodError with the nearest names where there is none."""
    known = {card.slug: card for card in cards(root)}
    wanted = _slug(slug)
    if wanted in known:
        return known[wanted]
    names = [*known, *(baselines() if root is None else ())]
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.6)
    near = near or [s for s in names if wanted and (wanted in s or s in wanted)][:3]
    hint = f"did you mean {' or '.join(near)}?" if near else "`ecliptic methods` lists them"
    raise MethodError(f"no method {slug!r}; {hint}")


def _is_baseline(slug: str) -> bool:
    """Without reading them all, as `baselines` does."""
    return slug.isidentifier() and slug[0] != "_" and (PACKAGE / "baselines" / f"{slug}.py").is_file()


def _slug(name: str) -> str:
    return name.strip().lower().replace("-", "_")


@cache
def _cards(root: Path) -> tuple[Card, ...]:
    found = [_card(file, stage, slug) for stage, slug, file in _files(root)]
    seen: dict[str, Card] = {}
    for card in found:
        if card.slug in seen:
            raise MethodError(f"two methods are called {card.slug!r}: {seen[card.slug].file} and {card.file}")
        seen[card.slug] = card
    return tuple(sorted(found, key=lambda card: (_stage_order(card.stage), card.slug)))


def _by_stage(folder: Path) -> tuple[int, str]:
    return _stage_order(folder.name)


def _first_line(file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_bytes())) if file.is_file() else None
    return (text or "").partition("\n")[0]


def _stage_order(stage: str) -> tuple[int, str]:
    return (STAGES.index(stage) if stage in STAGES else len(STAGES), stage)


def _files(root: Path) -> Iterator[tuple[str, str, Path]]:
    """(stage, slug, file) of each method; names that start with an underscore or a dot are machinery."""
    for stage in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(("_", "."))):
        for entry in sorted(stage.iterdir()):
            if entry.name.startswith(("_", ".")):
                continue
            if entry.is_dir():
                yield stage.name, entry.name, entry / "__init__.py"
            elif entry.suffix == ".py":
                yield stage.name, entry.stem, entry


_HEADER = re.compile(r"@[\w.]+(\(|\s*$)|class \w+\s*[(:]|def \w+\(|\)")


def _skeleton(source: str) -> str:
    """The decorators and class headers of a file in the usual layout: a tenth of the work of parsing all of it."""
    kept: list[str] = []
    keep = False
    for line in source.splitlines():
        if _HEADER.match(line):
            keep = keep or line[0] in "@c"
        elif line and not line[0].isspace():
            keep = False
        if keep:
            kept.append(line)
            if line.endswith(":") and not line[0].isspace():
                kept.append("    ...")
                keep = False
    return "\n".join(kept)


def _card(file: Path, stage: str, slug: str) -> Card:
    """Read the skeleton; where that does not make a card, the whole file, whose errors have the true line numbers."""
    try:
        return _read_card(file, stage, slug, quick=True)
    except MethodError:
        return _read_card(file, stage, slug, quick=False)


def _read_card(file: Path, stage: str, slug: str, *, quick: bool) -> Card:
    try:
        source = file.read_text(encoding="utf-8")
        tree = ast.parse(_skeleton(source) if quick else source, filename=str(file))
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise MethodError(f"cannot read the method {file}: {error}") from error
    declared = list(_declarations(tree))
    if len(declared) != 1:
        raise MethodError(f"{file}: exactly one class or function carries @method(...), found {len(declared)}")
    node, call = declared[0]
    paper, rest = _literals(call, file)
    kinds = _kinds(tree)
    kind = "function"
    if isinstance(node, ast.ClassDef):
        if node.name not in kinds:
            raise MethodError(f"{file}:{node.lineno}: class {node.name} derives from none of {', '.join(CONTRACTS)}")
        kind = kinds.pop(node.name)
    public = [(name, k) for name, k in kinds.items() if not name.startswith("_")]
    return Card(
        slug=slug,
        stage=stage,
        name=node.name,
        kind=kind,
        file=file,
        parts=((node.name, kind), *public),
        title=paper.title,
        arxiv=paper.arxiv,
        year=paper.year,
        url=paper.url,
        **rest,
    )


def _declarations(tree: ast.Module) -> Iterator[tuple[ast.ClassDef | ast.FunctionDef, ast.Call]]:
    """The top-level definitions that carry `@method(...)`, each with that call."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            for call in node.decorator_list:
                if isinstance(call, ast.Call) and _last_name(call.func) == "method":
                    yield node, call


def _last_name(node: ast.expr) -> str | None:
    """`Predictor` for `Predictor`, `contracts.Predictor` and `Predictor[X]`."""
    if isinstance(node, ast.Subscript):
        node = node.value
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else None


def _kinds(tree: ast.Module) -> dict[str, str]:
    """Contract of every top-level class that meets one, in file order, bases within the file followed.

    A base from elsewhere is read by its name: core has `FeaturePredictor` and others, each named after its contract.
    """
    kinds: dict[str, str] = {name: name for name in CONTRACTS}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            bases = [base for base in map(_last_name, node.bases) if base]
            inherited = [kinds.get(base) or next((c for c in CONTRACTS if base.endswith(c)), None) for base in bases]
            if found := [kind for kind in inherited if kind]:
                kinds[node.name] = found[0]
    return {name: kind for name, kind in kinds.items() if name not in CONTRACTS}


def _literals(call: ast.Call, file: Path) -> tuple[Paper, dict[str, str]]:
    """The paper, and purpose and claim, of one declaration."""
    where = f"{file}:{call.lineno}"
    if len(call.args) != 1 or not isinstance(call.args[0], ast.Call) or _last_name(call.args[0].func) != "Paper":
        raise MethodError(f"{where}: @method takes Paper(...) first, then purpose= and claim=")
    rest = _arguments(call, ("",), where)
    paper = _arguments(call.args[0], ("title", "arxiv", "year", "url"), where)
    if rest.keys() != {"purpose", "claim"} or not all(isinstance(v, str) and v.strip() for v in rest.values()):
        raise MethodError(f"{where}: @method needs purpose= and claim=, one line each")
    if not isinstance(paper.get("title"), str) or not isinstance(paper.get("year"), int):
        raise MethodError(f"{where}: Paper needs a title and a year")
    if not (paper.get("arxiv") or paper.get("url")):
        raise MethodError(f"{where}: Paper needs arxiv= or url=")
    return Paper(**paper), rest


def _arguments(call: ast.Call, positional: tuple[str, ...], where: str) -> dict[str, Any]:
    """Arguments of a call by name; nested `Paper(...)` calls are left out, everything else must be a literal."""
    named = dict(zip(positional, call.args)) | {k.arg or "**": k.value for k in call.keywords}
    values = {}
    for name, value in named.items():
        if isinstance(value, ast.Call) and _last_name(value.func) == "Paper":
            continue
        try:
            values[name] = ast.literal_eval(value)
        except ValueError:
            raise MethodError(f"{where}: {name} must be a literal, since listing does not run the file") from None
    return values
