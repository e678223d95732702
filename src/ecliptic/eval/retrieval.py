"""Finding pictures by text and texts by picture."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ecliptic.eval import metrics
from ecliptic.eval.metrics import Ranks
from ecliptic.eval.report import FRACTION, BarChart, Gallery, Number, Picture, Report, Section, Table
from ecliptic.eval.subjects import Encoded, Thumbnails, as_records, encode, picture_groups, values

if TYPE_CHECKING:
    from ecliptic.core.contracts import Record
    from ecliptic.core.encoder import HFEncoder

KS = (1, 5, 10)
QUERIES = 6  # shown per gallery of queries
RESULTS = 5  # pictures shown per query
SHOWN = 12  # pictures whose captions were missed
BLOCK = 1 << 24  # similarities held at a time


def retrieval(
    encoder: HFEncoder,
    records: Iterable[Record],
    *,
    field: Literal["caption", "captions"] | None = None,
    ks: Sequence[int] = KS,
    overflow: Literal["error", "truncate", "windows"] = "truncate",
    batch_size: int = 32,
    resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    encoded: Encoded | None = None,
) -> Report:
    """Rank all pictures for each caption and all captions for each picture.

    field: `captions` (a list per picture) or `caption`; by default the list where records have one (a mapping, such as
    translations, is not a list). Rows that name the same file are one picture with several captions. encoded: embeddings of
    these records, if you have them. Pictures that cannot be opened are left out with their captions, and counted.

    Numbers: `text_to_image.recall@k`, `image_to_text.recall@k` (a picture counts as found when any of its captions is among
    the first k) and `.median_rank`, with 95 % bootstrap intervals over pictures; ties count by their expected value. Details:
    `text_to_image.recall@k[category]` and so on where records have a `category`, `pictures.used`, `pictures.skipped`.
    """
    records = as_records(records)
    texts = captions_of(values(records, "caption"), values(records, "captions"), field)
    if not any(texts):
        raise ValueError(f"{records.name} has no {field or 'caption'!r}: retrieval needs captions")
    found = encoded or encode(encoder, records, batch_size, progress)
    groups = picture_groups(records)
    first: dict[Any, int] = {}  # group -> row among the pictures
    pictures: list[int] = []  # position of each picture in the records
    rows: list[int] = []  # and in the embeddings
    captions: list[str] = []
    owner: list[int] = []
    for row, i in enumerate(found.kept.tolist()):
        if not texts[i]:
            continue
        if groups[i] not in first:
            first[groups[i]] = len(pictures)
            pictures.append(i)
            rows.append(row)
        captions += texts[i]
        owner += [first[groups[i]]] * len(texts[i])
    if not captions:
        raise ValueError(f"none of the captioned pictures of {records.name} can be read")
    unique = sorted(set(captions))  # equal captions share one column, so that they tie exactly
    column = {text: j for j, text in enumerate(unique)}
    image = found.features[rows].float().numpy()
    text, cut = _encode_texts(encoder, unique, overflow)
    search = Search(image, text, np.array([column[c] for c in captions]), np.array(owner))

    report = Report(f"Retrieval: {encoder.name} on {records.name}")
    report.subtitle = f"{len(pictures)} pictures, {len(captions)} captions"
    draw: dict[str, Any] = {"resamples": resamples, "seed": seed}
    forth, back = search.text_to_image(), search.image_to_text()
    ways = {"text_to_image": (forth, search.owner), "image_to_text": (back, np.arange(len(pictures)))}
    hits = {f"{way}.recall@{k}": (metrics.recall_hits(r, k), g) for way, (r, g) in ways.items() for k in ks}
    for way, (ranks, group) in ways.items():
        for k in ks:
            key = f"{way}.recall@{k}"
            report.numbers[key] = _proportion(hits[key][0], group, draw)
        report.numbers[f"{way}.median_rank"] = _median(metrics.expected_rank(ranks), group, draw)
    _by_category(report, [_category(v) for v in values(records[pictures], "category")], hits, draw)

    report.notes.append(f"Intervals: 95 %, percentile bootstrap over pictures, {resamples} resamples, seed {seed}.")
    chance = ", ".join(f"{100 * min(k / len(pictures), 1):.1f} %" for k in ks)
    report.notes.append(f"Chance for text to image is {chance} at {', '.join(map(str, ks))}.")
    report.notes += cut
    if len(unique) < len(captions):
        report.notes.append(f"{len(captions) - len(unique)} captions repeat another; they tie with it by necessity.")
    uncaptioned = sum(not texts[i] for i in found.kept)
    if uncaptioned:
        report.notes.append(f"{uncaptioned} of {found.of} records have no caption and were left out.")
    report.notes += found.skipped.note(found.of)
    report.details["pictures.used"] = Number(len(pictures))
    report.details["pictures.skipped"] = Number(len(found.skipped.entries))
    report.sections += _shown(search, forth, back, captions, pictures, Thumbnails(records), seed)
    return report


def _encode_texts(
    encoder: HFEncoder, texts: Sequence[str], overflow: Literal["error", "truncate", "windows"]
) -> tuple[NDArray[Any], list[str]]:
    """(U, D) unit rows, and what the reader should know about captions that were cut (the warning is passed on too)."""
    from ecliptic.core.encoder import TruncationWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        embedded = encoder.encode_texts(texts, overflow=overflow).float().numpy()
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return embedded, [f"{w.message}." for w in caught if issubclass(w.category, TruncationWarning)]


class Search:
    """Similarities between N pictures and M captions in blocks of queries, never all at once.

    image (N, D), text (U, D): unit rows; column (M,): the text row of each caption; owner (M,): its picture.
    """

    def __init__(
        self, image: NDArray[Any], text: NDArray[Any], column: NDArray[np.int64], owner: NDArray[np.int64]
    ) -> None:
        self.image, self.text, self.column, self.owner = image, text, column, owner
        self.pictures = np.arange(len(image))

    def of_captions(self, captions: NDArray[np.int64]) -> NDArray[Any]:
        """(q, N) similarities of some captions to all pictures."""
        return np.asarray(self.text[self.column[captions]] @ self.image.T)

    def of_pictures(self, pictures: NDArray[np.int64]) -> NDArray[Any]:
        """(q, M) similarities of some pictures to all captions."""
        return np.asarray((self.image[pictures] @ self.text.T)[:, self.column])

    def text_to_image(self) -> Ranks:
        return self._ranks(self.of_captions, self.owner, self.pictures)

    def image_to_text(self) -> Ranks:
        return self._ranks(self.of_pictures, self.pictures, self.owner)

    @staticmethod
    def _ranks(
        similarity: Callable[[NDArray[np.int64]], NDArray[Any]], query: NDArray[np.int64], gallery: NDArray[np.int64]
    ) -> Ranks:
        block = max(1, BLOCK // len(gallery))
        parts = []
        for start in range(0, len(query), block):
            some = np.arange(start, min(start + block, len(query)))
            parts.append(metrics.ranks(similarity(some), query[some], gallery))
        return Ranks(*(np.concatenate(columns) for columns in zip(*parts)))


def captions_of(caption: Sequence[Any], captions: Sequence[Any], field: str | None) -> list[list[str]]:
    """Per record the texts to use; empty where there are none."""
    out = []
    for one, many in zip(caption, captions, strict=True):
        listed = isinstance(many, Sequence) and not isinstance(many, str)
        if field == "captions" and many is not None and not listed:
            raise TypeError(f"'captions' must be a list of texts, got {type(many).__name__}: use field='caption'")
        chosen = list(many) if listed and many and field != "caption" else [] if field == "captions" else [one]
        out.append([str(text) for text in chosen if text is not None and str(text).strip()])
    return out


def _proportion(hits: NDArray[Any], groups: NDArray[np.int64], draw: Mapping[str, Any]) -> Number:
    return Number(float(hits.mean()), *metrics.proportion_interval(hits, groups, **draw), n=len(hits), unit=FRACTION)


def _median(ranks: NDArray[Any], groups: NDArray[np.int64], draw: Mapping[str, Any]) -> Number:
    """Median rank; whole pictures are drawn, so their captions stand as the columns of one row (NaN where fewer)."""
    order = np.argsort(groups, kind="stable")
    counts = np.bincount(groups)
    table = np.full((len(counts), counts.max()), np.nan)
    table[groups[order], np.concatenate([np.arange(c) for c in counts])] = ranks[order]
    return Number(
        float(np.median(ranks)), *metrics.bootstrap(lambda t: float(np.nanmedian(t)), table, **draw), n=len(ranks)
    )


def _category(value: Any) -> str | None:
    """The first level of a category path."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = value[0] if value else None
    return None if value is None else str(value)


def _by_category(
    report: Report,
    categories: Sequence[str | None],
    hits: Mapping[str, tuple[NDArray[Any], NDArray[np.int64]]],
    draw: Mapping[str, Any],
) -> None:
    """categories: of each picture; queries count under the category of their picture, searched among all pictures."""
    names = sorted({c for c in categories if c is not None})
    if len(names) < 2:
        return
    of_picture = np.array([c if c is not None else "" for c in categories], dtype=object)
    rows: list[list[str | int | Number]] = []
    bars: dict[str, Number] = {}
    shown = list(hits)[:2] + list(hits)[len(hits) // 2 : len(hits) // 2 + 1]
    for name in names:
        for key, (values_, groups) in hits.items():
            inside = of_picture[groups] == name
            report.details[f"{key}[{name}]"] = _proportion(values_[inside], groups[inside], draw)
        bars[name] = report.details[f"{shown[0]}[{name}]"]
        count = int((of_picture == name).sum())
        rows.append([name, count, *(report.details[f"{key}[{name}]"] for key in shown)])
    rows.sort(key=lambda row: -int(row[1]))  # type: ignore[arg-type]
    order = sorted(bars, key=lambda name: -bars[name].value)
    if len(names) <= 30:
        report.figures.append(BarChart({n: bars[n] for n in order}, f"{_words(shown[0]).capitalize()} by category"))
    report.tables.append(Table(["category", "pictures", *map(_words, shown)], rows, "By category"))


def _words(key: str) -> str:
    return key.replace("_", " ").replace(".", ", ")


def _shown(
    search: Search,
    forth: Ranks,
    back: Ranks,
    captions: Sequence[str],
    pictures: Sequence[int],
    thumbnails: Thumbnails,
    seed: int,
) -> list[Section]:
    """Queries that found their picture, queries that missed it, pictures whose captions were missed: random samples."""
    rng = np.random.default_rng(seed)
    ranks = metrics.expected_rank(forth)

    def query(c: int) -> Gallery:
        similarity = search.of_captions(np.array([c]))[0]
        wanted = int(search.owner[c])
        best = np.argsort(-similarity, kind="stable")[:RESULTS].tolist()
        shown = [
            thumbnails.show(pictures[p], score=float(similarity[p]), good=p == wanted, note=f"{place}.")
            for place, p in enumerate(best, 1)
        ]
        if wanted not in best:
            note = f"wanted, rank {ranks[c]:.0f} of {len(pictures)}"
            shown.append(thumbnails.show(pictures[wanted], score=float(similarity[wanted]), note=note))
        return Gallery(shown, f"“{captions[c]}”", small=True)

    def some(chosen: NDArray[np.int64], count: int) -> list[int]:
        return sorted(rng.choice(chosen, min(count, len(chosen)), replace=False).tolist())

    sections = []
    found = np.flatnonzero(ranks == 1)
    if len(found):
        text = f"{len(found)} of {len(captions)} captions find their picture at the first place. A random sample."
        sections.append(Section("Found by text", text, *map(query, some(found, QUERIES))))
    far = np.flatnonzero(ranks > RESULTS)
    missed = far if len(far) else np.flatnonzero(ranks > 1)
    if len(missed):
        limit = f"among the first {RESULTS}" if len(far) else "at the first place"
        text = f"{len(missed)} of {len(captions)} captions do not find their picture {limit}. A random sample."
        sections.append(Section("Missed by text", text, *map(query, some(missed, QUERIES))))
    ranks_back = metrics.expected_rank(back)
    lost = np.flatnonzero(ranks_back > RESULTS)
    if len(lost):
        gallery: list[Picture] = []
        for p in some(lost, SHOWN):
            similarity = search.of_pictures(np.array([p]))[0]
            own = captions[int(np.flatnonzero(search.owner == p)[0])]
            best = int(similarity.argmax())
            note = f"own caption: {own} (rank {ranks_back[p]:.0f})"
            gallery.append(
                thumbnails.show(pictures[p], captions[best], score=float(similarity[best]), good=False, note=note)
            )
        text = f"{len(lost)} of {len(pictures)} pictures do not find a caption of theirs among the first {RESULTS}. "
        sections.append(
            Section("Described wrongly", text + "A random sample, each under the closest caption.", Gallery(gallery))
        )
    return sections
