"""The main job on real pictures, start to end: find, name, highlight and learn by text, written up as one page.

Works with what PyPI packages carry (photographs, textiles); the Tux Paint stamps join in where they can be fetched. Every
section names the commands that do the same on a folder of one's own, and shows what went wrong beside what went right.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ecliptic.apps.adaptation import Adapted, adapt, predictor
from ecliptic.apps.index import Hit, Index
from ecliptic.apps.index.scan import absolute
from ecliptic.apps.index.towers import TowerEmbedder
from ecliptic.data.debian import SourceUnavailable
from ecliptic.data.folder import folder
from ecliptic.data.images import open_image
from ecliptic.data.photos import photos
from ecliptic.data.records import Records
from ecliptic.data.textiles import textiles
from ecliptic.eval import metrics
from ecliptic.eval.report import (
    FRACTION,
    Commands,
    Content,
    Gallery,
    Heatmap,
    Heatmaps,
    Number,
    Numbers,
    Picture,
    Report,
    Section,
    Table,
)

if TYPE_CHECKING:
    from ecliptic.core.encoder import HFEncoder

Say = Callable[[str], None]

SHOWN = 5  # hits per query
CAPTION = 40  # characters of a description below a picture
FETCH_SECONDS = 60  # how long the page may wait for the stamps (160 MB, once)
TEXTILES_SHOWN = 10  # of each kind, among the pictures that are searched


class Query(NamedTuple):
    """What is typed, and the words of which one must stand in a picture's description for it to be right."""

    text: str
    right: str

    def accepts(self, description: str) -> bool:
        return re.search(rf"\b({self.right})\b", description, re.IGNORECASE) is not None


QUERIES = (
    Query("a cup of coffee", "coffee|espresso"),
    Query("a cat", "cat|kitten|cats"),
    Query("a rocket on its launch pad", "rocket|shuttle"),
    Query("an astronaut", "astronaut"),
    Query("ancient coins", "coins?"),
    Query("a motorcycle", "motorcycles?|motorbike"),
    Query("the surface of the moon", "moon"),
    Query("a photographer at work", "camera|photographer"),
    Query("a brick wall", "bricks?"),
    Query("a Chinese temple", "temple|pagoda"),
    Query("woven fabric", "textile|fabric|cloth"),
    Query("handwritten formulas", "formulas|handwriting"),
)
"""Asked of all pictures; ours, written down before the first run."""

FRUIT = (
    "fruit|kiwifruit|apples?|apricot|avocado|bananas?|blueberries|cherimoya|cherr(y|ies)|grapes?|lemon|lime|mandarin|mango|"
    "oranges?|peach|pear|pineapple|plum|pomegranate|prune|raspberry|strawberry|watermelon"
)
INSTRUMENT = "guitar|cello|violin|trumpet|bassoon|flute|piano|accordion|harp|saxophone|cymbal|drums?|drum kit"
INSECT = "insect|bee|butterfly|dragonfly|fly|ladybug|grasshopper|hornet|hoverfly|mantis|xanthia|moth|beetle|ant|wasp"

STAMP_QUERIES = (
    Query("a dinosaur", "dinosaur|[a-z]*saurus"),
    Query("a penguin", "penguins?"),
    Query("a piece of fruit", FRUIT),
    Query("a musical instrument", INSTRUMENT),
    Query("a butterfly", "butterfly"),
    Query("an old steam train", "train|locomotive|steam engine"),
    Query("a snowman", "snowman"),
    Query("an insect", INSECT),
)
"""Asked where the stamps are there."""

PHOTO_WORDS = {
    "photographer": "photographer with a camera",
    "cell": "cell under the microscope",
    "coffee cup": "cup of coffee",
    "galaxies": "galaxies in space",
    "tissue": "tissue under the microscope",
    "blood vessels": "blood vessels in an eye",
    "moon": "surface of the moon",
    "retina": "retina of an eye",
    "handwriting": "page of handwriting",
}
"""Where a label alone would leave open what is meant: what one would say instead."""

OTHER_LABELS = (
    *("dog", "bird", "fish", "elephant", "airplane", "car", "bicycle", "boat", "bridge", "castle", "guitar", "chair"),
    *("pizza", "apple", "tree", "mountain", "beach", "map"),
)
"""What the photographs might have shown and do not: with their own 22 labels, 40 to choose from."""

PROMPTS = {
    "chelsea": ("a cat", "a nose"),
    "coffee": ("a cup of coffee", "a spoon"),
    "motorcycle_left": ("a motorcycle", "shelves"),
    "rocket": ("a rocket", "the sky"),
    "china": ("a temple", "a lake"),
    "camera": ("a camera on a tripod", "grass"),
}
"""A thing, and something smaller or less of a thing, which is harder."""

TEXTILE_WORDS = {"nominal": "intact textile", "local": "damaged textile", "global": "unusual textile"}
STAMP_WORDS = {"naturalforces": "natural force"}


@dataclass
class Demo:
    """What the sections share."""

    encoder: HFEncoder
    model: str
    work: Path
    say: Say
    stamps: Records | None = None
    missing: str = ""
    descriptions: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, Number] = field(default_factory=dict)
    details: dict[str, Number] = field(default_factory=dict)
    trouble: list[str] = field(default_factory=list)

    @property
    def flag(self) -> str:
        return "" if self.model == "offline" else f" --model {self.model}"


def run(
    out: Path,
    work: Path,
    model: str = "offline",
    *,
    load: Callable[[str], HFEncoder],
    say: Say,
    fetch: bool = True,
    shots: int = 8,
    held_out: int = 150,
    settings: Mapping[str, Any] | None = None,
) -> Report:
    """Do everything and write the page to `out`; pictures and the index go to `work`. Returns the report."""
    began = time.perf_counter()

    def tell(text: str) -> None:
        say(f"[{time.perf_counter() - began:5.1f} s] {text}")

    fetching = _fetch_stamps(tell) if fetch else None
    tell(f"loading the model {model}")
    demo = Demo(load(model), model, work, tell)
    demo.stamps, demo.missing = _stamps(fetching, fetch, tell)
    sections = [
        _find(demo),
        _name(demo),
        _highlight(demo),
        _learn(demo, shots, held_out, settings or {}),
    ]
    seconds = time.perf_counter() - began
    report = Report("Pictures by text", subtitle=_subtitle(demo, seconds))
    report.numbers, report.details = demo.numbers, demo.details
    report.notes.append(
        "Everything on this page was computed on this machine by the commands it names, without a GPU and, but for fetching "
        "the stamps once, without a network. Intervals are 95 % bootstraps over pictures. Green ticks and red crosses compare "
        "with written descriptions or labels."
    )
    report.sections = [*sections, _limits(demo)]
    report.html(out)
    report.save(work / "report.json")
    tell(f"done: {out.resolve()}")
    return report


# Finding


def _find(demo: Demo) -> Section:
    top = demo.work / "pictures"
    demo.descriptions = gather(top, demo.stamps)
    demo.say(f"indexing {len(demo.descriptions)} pictures")
    embedder = TowerEmbedder(demo.encoder)
    place = top / ".ecliptic"
    shutil.rmtree(place, ignore_errors=True)  # a demonstration measures from nothing
    start = time.perf_counter()
    with Index.create(place, embedder.signature, root=top, source=demo.model) as index:
        change = index.add(top, embedder)
        seconds = time.perf_counter() - start
        demo.say(f"indexed {len(index)} pictures in {seconds:.1f} s ({len(index) / seconds:.0f} per second)")
        queries = QUERIES + (STAMP_QUERIES if demo.stamps is not None else ())
        rows = demo.encoder.encode_texts([query.text for query in queries]).numpy()
        began = time.perf_counter()
        answers = [index.search(row, SHOWN) for row in rows]
        each = (time.perf_counter() - began) / len(rows)
        cat = top / "photos" / "chelsea.png"
        vector = index.vector(cat)
        assert vector is not None
        like = index.search(vector, SHOWN + 1)
    if change.bad:
        demo.trouble.append(f"{len(change.bad)} pictures could not be read, for example {change.bad[0][0]}")
    first = [_right(demo, query, hits[0]) for query, hits in zip(queries, answers, strict=True)]
    among = [any(_right(demo, query, hit) for hit in hits) for query, hits in zip(queries, answers, strict=True)]
    demo.numbers["found_among_5_hits"] = _fraction(among)
    demo.details["search.first_hit_right"] = _fraction(first)
    demo.say(f"searched by text: the first hit is right for {sum(first)} of {len(first)} queries")
    missed = [query.text for query, found in zip(queries, among, strict=True) if not found]
    if missed:
        demo.trouble.append(f"Search found nothing right among the first {SHOWN} for: {', '.join(missed)}.")
    galleries: list[Content] = [
        Gallery([_shown(demo, hit, _right(demo, query, hit)) for hit in hits], f"“{query.text}”")
        for query, hits in zip(queries, answers, strict=True)
    ]
    galleries.append(
        Gallery(
            [_shown(demo, hit, None) for hit in like if Path(hit.path).name != cat.name][:SHOWN],
            "More like the photograph of the cat",
        )
    )
    shown = top.as_posix()
    return Section(
        "Find pictures by text",
        f"{len(demo.descriptions)} pictures were indexed in {seconds:.0f} seconds "
        f"({len(demo.descriptions) / seconds:.0f} per second); a query then takes {1000 * each:.1f} ms "
        f"plus the reading of its words. File names and descriptions are not looked at: the descriptions below the pictures "
        "only serve to judge the answers. The number is the cosine between text and picture; compare it within one row only.",
        *galleries,
        Commands(
            [
                f"ecliptic index {shown}{demo.flag}",
                f'ecliptic search "a cup of coffee" --index {shown}',
                f"ecliptic search --image {cat.as_posix()} --index {shown}",
                "# on your own pictures",
                'ecliptic index ~/Pictures && ecliptic search "children on a beach" --index ~/Pictures',
            ]
        ),
        *_measured(demo, place),
    )


def gather(top: Path, stamps: Records | None) -> dict[str, str]:
    """Copy the pictures to search into one folder, as a user would have them; returns path -> description."""
    described: dict[str, str] = {}

    def take(source: Any, name: str, text: str) -> None:
        target = top / name
        if not target.exists() or target.stat().st_size != Path(source).stat().st_size:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        described[absolute(target).as_posix()] = text  # as the index names it

    shown = photos()
    for path, text in zip(shown.column("image"), shown.column("caption"), strict=True):
        take(path, f"photos/{Path(path).name}", text)
    cloth = textiles()
    for kind in cloth.classes:
        part = cloth.filter(lambda record, kind=kind: record["label"] == kind)[:TEXTILES_SHOWN]  # type: ignore[misc]
        for path, text in zip(part.column("image"), part.column("caption"), strict=True):
            take(path, f"textiles/{kind}/{Path(path).name}", text)
    if stamps is not None:
        for key, path, text in zip(stamps.ids, stamps.column("image"), stamps.column("caption"), strict=True):
            take(path, f"{key}.png", text)
    return described


def _right(demo: Demo, query: Query, hit: Hit) -> bool:
    return query.accepts(demo.descriptions.get(hit.path, ""))


def _shown(demo: Demo, hit: Hit, good: bool | None) -> Picture:
    words = demo.descriptions.get(hit.path, "")
    short = words if len(words) <= CAPTION else words[: CAPTION - 1].rpartition(" ")[0] + " …"
    return Picture(hit.path, short, score=f"{hit.score:.2f}", good=good)


def _measured(demo: Demo, place: Path) -> list[Content]:
    """Recall over all stamps, from the vectors that are in the index anyway."""
    if demo.stamps is None:
        return (
            [f"The Tux Paint stamps, on which search is measured, are not here: {demo.missing}"] if demo.missing else []
        )
    import numpy as np
    import torch

    from ecliptic.eval.retrieval import retrieval
    from ecliptic.eval.subjects import Encoded, Skipped

    with Index.open(place) as index:
        found = [index.vector(place.parent / f"{key}.png") for key in demo.stamps.ids]
    kept = [i for i, vector in enumerate(found) if vector is not None]
    rows = torch.from_numpy(np.stack([vector for vector in found if vector is not None]))
    encoded = Encoded(rows, np.array(kept, dtype=np.int64), Skipped(), len(demo.stamps))
    report = retrieval(demo.encoder, demo.stamps, encoded=encoded)
    one, five, ten = (report[f"text_to_image.recall@{k}"] for k in (1, 5, 10))
    back = [report[f"image_to_text.recall@{k}"] for k in (1, 5, 10)]
    guess = [Number(k / len(kept), unit=FRACTION) for k in (1, 5, 10)]
    demo.details["stamps.recall@1"], demo.details["stamps.recall@10"] = one, ten
    demo.say(f"stamps: the right one of {len(kept)} is the first hit for {one}, among ten for {ten}")
    return [
        f"Measured over {len(kept)} stamps that the model has never seen in training: how often the right picture is the "
        "first, among the first five, among the first ten of all when its description is typed, and the other way round.",
        Table(
            ["", "first", "first 5", "first 10"],
            [["description to picture", one, five, ten], ["picture to description", *back], ["guessing", *guess]],
        ),
        Commands(
            [
                f"ecliptic evaluate {demo.model} stamps",
                "# a CSV with columns image and caption measures your own",
                f"ecliptic evaluate {demo.model} my.csv",
            ]
        ),
    ]


# Naming


def _name(demo: Demo) -> Section:
    import torch

    from ecliptic.apps.naming import usual_templates
    from ecliptic.core.zeroshot import zero_shot_head, zero_shot_probabilities

    records = photos()
    truth = [PHOTO_WORDS.get(label, label) for label in records.column("label")]
    labels = [*truth, *OTHER_LABELS]
    demo.say(f"naming {len(records)} photographs among {len(labels)} labels")
    listed = demo.work / "labels.txt"
    listed.write_text("\n".join(labels) + "\n", encoding="utf-8")
    top = demo.work / "pictures" / "photos"
    paths = [top / Path(path).name for path in records.column("image")]
    with Index.open(top.parent / ".ecliptic") as index:
        rows = [index.vector(path) for path in paths]  # they have been embedded already
    seen = torch.stack([torch.from_numpy(row) for row in rows if row is not None])
    head = zero_shot_head(demo.encoder, labels, usual_templates(demo.encoder))
    shares = zero_shot_probabilities(demo.encoder, seen, head).numpy()
    answers = [labels[int(row.argmax())] for row in shares]
    right = [answer == label for answer, label in zip(answers, truth, strict=True)]
    third = [truth[i] in [labels[j] for j in row.argsort()[::-1][:3]] for i, row in enumerate(shares)]
    demo.numbers["photographs_named_right"] = _fraction(right)
    demo.say(f"named {sum(right)} of {len(right)} photographs right")
    pictures = [
        Picture(
            paths[i],
            answers[i],
            score=Number(float(shares[i].max()), unit=FRACTION),
            good=right[i],
            note="" if right[i] else f"it is: {truth[i]} ({100 * shares[i][i]:.1f} %)",
        )
        for i in sorted(range(len(truth)), key=lambda i: (right[i], -shares[i].max()))
    ]
    wrong = [f"{truth[i]} (taken for {answers[i]})" for i in range(len(truth)) if not right[i]]
    if wrong:
        demo.trouble.append(f"Photographs that were named wrong: {', '.join(wrong)}.")
    return Section(
        "Name pictures by words alone",
        f"Each photograph gets one of {len(labels)} labels: what the {len(truth)} photographs show, and "
        f"{len(OTHER_LABELS)} things that they do not. Nothing was trained on these labels. The percentage compares the "
        "labels with each other. Mistakes come first.",
        Numbers({"named_right": _fraction(right), "right_among_3": _fraction(third)}),
        Gallery(pictures),
        Commands(
            [
                f"ecliptic classify {top.as_posix()} --labels @{listed.as_posix()}{demo.flag}",
                "# on your own pictures",
                'ecliptic classify ~/Pictures --labels "receipt, screenshot, people, landscape"',
            ]
        ),
    )


# Highlighting


def _highlight(demo: Demo) -> Section:
    from ecliptic.apps.heat import heat_of
    from ecliptic.eval.overlay import overlay

    demo.say("drawing heat maps")
    paths = {Path(path).stem: path for path in photos().column("image")}
    maps = []
    for stem, prompts in PROMPTS.items():
        picture = open_image(paths[stem])
        picture.thumbnail((480, 480))
        heat = heat_of(demo.encoder, picture, prompts).numpy()
        maps.append(Heatmap(picture, {text: overlay(picture, h) for text, h in zip(prompts, heat, strict=True)}))
    coffee = (demo.work / "pictures" / "photos" / "coffee.png").as_posix()
    return Section(
        "Show where in the picture",
        "The same model says which part of a picture a text is about. Each map runs from its own weakest to its own strongest "
        "place, so it always shows something bright, also for what is not there. Whole things it usually finds; parts of "
        "things and backgrounds often not.",
        Heatmaps(maps),
        Commands(
            [
                f'ecliptic highlight "a spoon" {coffee} --out spoon.png{demo.flag}',
                "# on a picture of your own, against what else is in it",
                'ecliptic highlight "a dog" garden.jpg --versus "grass" --versus "a fence"',
            ]
        ),
    )


# Learning


def _learn(demo: Demo, shots: int, held_out: int, settings: Mapping[str, Any]) -> Section:
    content: list[Content] = []
    demo.say(f"learning textile defects from {shots} pictures of each kind")
    cloth = adapt(
        demo.encoder, textiles(), predictor("gda", settings), shots=shots, held_out=held_out, words=TEXTILE_WORDS
    )
    content += _told(demo, "textiles", "Textile inspection: flawless, small defect, changed weave", cloth)
    commands = [
        f"ecliptic adapt textiles --method gda --shots {shots} --held-out {held_out} {_words(TEXTILE_WORDS)}{demo.flag}"
    ]
    if demo.stamps is not None:
        place = demo.work / "pictures" / "stamps"
        demo.say(f"learning the kinds of stamps from {shots} pictures of each")
        kinds = adapt(
            demo.encoder,
            folder(place),
            predictor("gda", {**settings, "views": 0}),
            shots=shots,
            held_out=held_out,
            words=STAMP_WORDS,
        )
        content += _told(
            demo,
            "stamps",
            f"Sorting stamps into {len(kinds.classes)} kinds, without augmented views to save time",
            kinds,
        )
        commands.append(
            f"ecliptic adapt {place.as_posix()} --method gda --shots {shots} --held-out {held_out} --set views=0 "
            f"{_words(STAMP_WORDS)}{demo.flag}"
        )
    commands += [
        "# on a folder of your own with one sub-folder per class",
        "ecliptic adapt parts/ --out parts-predictor",
        "ecliptic classify new-pictures/ --predictor parts-predictor",
    ]
    return Section(
        "Learn from a handful of labelled pictures",
        "Where words are not enough, a few labelled pictures help. The method `gda` (arXiv 2402.04087) estimates one "
        "Gaussian per class on frozen features and adds it to the zero-shot answer: no gradient step, a few seconds. "
        f"It learns from {shots} pictures per class and is judged on others.",
        *content,
        Commands(commands),
    )


def _told(demo: Demo, key: str, title: str, done: Adapted) -> list[Content]:
    numbers = done.report.numbers
    gain = numbers["gain"]
    demo.numbers[f"{key}_right_after_learning"] = numbers["adapted.accuracy"]
    demo.details |= {f"{key}.{name}": number for name, number in numbers.items()}
    demo.say(f"{key}: {numbers['zero_shot.accuracy']} by words alone, {numbers['adapted.accuracy']} after learning")
    assert gain.low is not None
    assert gain.high is not None
    verdict = "The gain over words alone is real: its interval lies above zero."
    if gain.high < 0:
        verdict = "Learning did harm here: the interval of the difference lies below zero."
        demo.trouble.append(f"Learning from few pictures made {key} worse.")
    elif gain.low <= 0:
        verdict = "No gain can be claimed here: the interval of the difference includes zero."
        demo.trouble.append(f"Learning from few pictures gained nothing certain on {key}.")
    usual = done.report["most_frequent.accuracy"]
    if numbers["zero_shot.accuracy"].value < usual.value:
        demo.trouble.append(
            f"By words alone {key} are right for {numbers['zero_shot.accuracy'].text}; always giving the most frequent answer "
            f"would be right for {usual.text}."
        )
    for name in done.classes:
        own = done.report.details.get(f"adapted.accuracy[{name}]")
        if own is not None and own.value < 0.5 and (own.n or 0) >= 10:
            demo.trouble.append(f"After learning, “{name}” is still recognised in only {own.text} of {own.n} {key}.")
    figures = list(done.report.figures)
    mistakes = [part for section in done.report.sections if section.title == "Mistaken" for part in section.content]
    shown: list[Content] = [
        Gallery(part.pictures[:6], "Surest mistakes after learning", small=True)
        for part in mistakes
        if isinstance(part, Gallery)
    ]
    return [f"{title}. {done.report.subtitle}. {verdict}", Numbers({"gain": gain}), *figures, *shown]


def _words(words: Mapping[str, str]) -> str:
    return " ".join(f'--name "{label}={meaning}"' for label, meaning in words.items())


# Parts


def _limits(demo: Demo) -> Section:
    text = "What went wrong on this page, in one place."
    lines = demo.trouble or [
        "Nothing did, on these pictures. On yours something will: measure with `ecliptic evaluate`."
    ]
    if demo.missing:
        lines.append(f"The Tux Paint stamps could not be had: {demo.missing}")
    return Section("What did not work", text, *lines)


def _subtitle(demo: Demo, seconds: float) -> str:
    return f"Find, name, highlight and learn with the model “{demo.encoder.name}” · {seconds:.0f} seconds in all"


def _fraction(hits: Sequence[bool]) -> Number:
    values = [float(hit) for hit in hits]
    return Number(sum(values) / len(values), *metrics.proportion_interval(values), n=len(values), unit=FRACTION)


def _fetch_stamps(tell: Say) -> subprocess.Popen[str] | None:
    """Begin to fetch the stamps beside everything else; None where they are here already."""
    if _stamps_here() is not None:
        return None
    tell(f"fetching the Tux Paint stamps (160 MB, once; waiting for at most {FETCH_SECONDS} s)")
    code = "from ecliptic.data.stamps import stamps; stamps()"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _stamps_here() -> Records | None:
    from ecliptic.data.debian import package_folder
    from ecliptic.data.stamps import stamps

    try:
        package_folder("tuxpaint-stamps-default", "usr/share/tuxpaint/stamps", fetch=False)
        return stamps()
    except SourceUnavailable:
        return None


def _stamps(fetching: subprocess.Popen[str] | None, fetch: bool, tell: Say) -> tuple[Records | None, str]:
    """The stamps, or why they are not here."""
    if not fetch:
        return None, "fetching was switched off"
    why = ""
    if fetching is not None:
        try:
            _, said = fetching.communicate(timeout=FETCH_SECONDS)
            why = said.strip().splitlines()[-1].rpartition("SourceUnavailable: ")[2] if said.strip() else ""
        except subprocess.TimeoutExpired:
            fetching.send_signal(2)  # it cleans up after itself
            why = f"fetching took more than {FETCH_SECONDS} s; `ecliptic evaluate offline stamps` fetches them without a limit"
    found = _stamps_here()
    if found is None:
        tell("going on without the stamps")
    return found, "" if found is not None else why or "they could not be fetched"
