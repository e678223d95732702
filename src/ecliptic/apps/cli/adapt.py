"""`ecliptic adapt FOLDER`: learn your classes from your pictures, by the method that suits them best, and see what it gained."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ecliptic.apps.cli._inputs import labels_of, open_records
from ecliptic.apps.cli._shell import (
    DEFAULT_MODEL,
    Json,
    Model,
    bad_json,
    bad_lines,
    counting,
    emit,
    fail,
    load_model,
    note,
    warn,
)
from ecliptic.core.files import require_own

if TYPE_CHECKING:
    from ecliptic.core.encoder import HFEncoder
    from ecliptic.data.records import Records

NEEDS = True
RESUME = "what was fitted is kept: run the same command again to go on"
TASKS = ("name", "ood", "rank")


def adapt(
    source: Annotated[str, typer.Argument(help="A folder per class, a CSV of image and label, or a built-in source.")],
    method: Annotated[
        list[str] | None,
        typer.Option(help="Fit this one and no other; several: choose among them. Default: choose among all that fit."),
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="Time for trying methods, beside encoding; those that need more are left out.")
    ] = 4.0,
    shots: Annotated[
        int | None, typer.Option(min=1, help="Labelled pictures per class, at most. Default: all; 8 with one --method.")
    ] = None,
    held_out: Annotated[
        int, typer.Option(min=1, help="With one --method: other pictures to judge it on, at most.")
    ] = 400,
    task: Annotated[
        str,
        typer.Option(
            help="name: which class. ood: the same, and refuse what is none of them. rank: order by a quantity."
        ),
    ] = "name",
    labels: Annotated[
        str | None, typer.Option("--labels", "-l", help="No picture is labelled: the classes, 'cat, dog' or @file.")
    ] = None,
    unknown: Annotated[
        str | None,
        typer.Option(help="For ood: pictures of none of the classes. Default: classes are left out in turn."),
    ] = None,
    instruction: Annotated[
        str | None, typer.Option(help="For rank: what to order by, in words: 'number of circles'.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the fitted predictor.")] = None,
    name: Annotated[
        list[str] | None, typer.Option("--name", help="Words for a class, as in 'ok=a flawless textile'.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="With one --method: a setting of it, alpha=1.0")
    ] = None,
    folds: Annotated[int, typer.Option(min=3, help="Parts of the cross-validation.")] = 4,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page with pictures.")] = None,
    model: Model = DEFAULT_MODEL,
    json: Json = False,
) -> None:
    """Fit predictors on your pictures and keep the best.

    Every method that suits the labels present is fitted within the time, and one is chosen by nested cross-validation, so that
    the accuracy printed for it, and its gain over words alone, are honest. Pictures without a label help where some have one.
    The saved folder is for `ecliptic classify --predictor` (or --model) and `ecliptic evaluate`.
    """
    if task not in TASKS:
        fail(f"no task {task!r}: there are {', '.join(TASKS)}")
    for option, given, meant in (
        ("--method", method, "name"),
        ("--labels", labels, "name"),
        ("--unknown", unknown, "ood"),
        ("--instruction", instruction, "rank"),
    ):
        if given and task != meant:
            fail(f"{option} is for --task {meant}, not for {task}")
    if out is not None:
        require_own(out, "predictor.json")
    words = _words(name or [])
    records = open_records(source, partly_labelled=True)
    one = method[0] if method and len(method) == 1 and task == "name" and labels is None else None
    if set_ and one is None:
        fail("--set needs one --method, whose setting it is")
    if task != "rank" and labels is None and not has_labels(records):
        fail(
            f"{source} has no labels: make one sub-folder per class, or a CSV with columns image and label; or name the "
            'classes with --labels "cat, dog", and words alone and the pictures decide'
        )
    from ecliptic.apps import adaptation
    from ecliptic.core.encoder import BUILT_IN
    from ecliptic.core.predictor_io import save_predictor

    if one is not None:
        labelled = [record.get("label") not in (None, "") for record in records.undecoded()]
        if not all(labelled):
            warn(f"note: {labelled.count(False)} pictures have no label; one method alone is fitted on the others")
            records = records[labelled]
        judge = adaptation.predictor(one, adaptation.parse_settings(set_ or []))
        encoder = load_model(model)
        with counting("judging") as advance:
            done: Any = adaptation.adapt(
                encoder, records, judge, shots=shots or 8, held_out=held_out, words=words, seed=seed, progress=advance
            )
        value = {"method": one, "classes": done.classes, "shots": done.shots}
        done.report.commands.append(f"ecliptic adapt {source} --method {one} --shots {shots or 8}")
    else:
        options = {"minutes": minutes, "folds": folds, "seed": seed}
        done, value = _chosen(task, records, model, method, shots, words, labels, unknown, instruction, options)
        done.report.commands.append(_command(source, task, minutes, out, unknown, instruction))
    if not json:
        for line in bad_lines(done.bad):
            warn(line)
    if out is not None:
        encoder = done.judge.encoder_
        save_predictor(done.judge, out, with_encoder=encoder.name not in BUILT_IN)
        done.report.html(out / "report.html")
        done.report.save(out / "report.json")
        note(f"saved {out}")
    if html is not None:
        note(f"wrote {done.report.html(html)}")
    shown = {**done.report.to_json(), **value, "out": out, "bad": bad_json(done.bad)}
    saved = f"\n\nuse it: ecliptic classify PICTURES --predictor {out}" if out is not None else ""
    emit(shown, json, lambda: f"{done.report}{saved}")


def has_labels(records: Records) -> bool:
    """Whether any record carries a label."""
    return any(record.get("label") not in (None, "") for record in records.undecoded())


def _chosen(
    task: str,
    records: Records,
    model: str,
    methods: list[str] | None,
    shots: int | None,
    words: Mapping[str, str],
    labels: str | None,
    unknown: str | None,
    instruction: str | None,
    options: dict[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """What a task's chooser found, and what --json says beside its numbers."""
    from ecliptic.apps import selection

    candidates = selection.known_candidates(methods) if methods else None
    encoder = load_model(model)
    work = work_folder(encoder, records)
    if task == "rank":
        from ecliptic.apps.adapt_rank import choose_rank

        done: Any = choose_rank(encoder, records, work, instruction=instruction, **options)
        return done, {"method": done.winner.name, "instruction": instruction}
    if task == "ood":
        from ecliptic.apps.adapt_ood import choose_ood

        strangers = None if unknown is None else open_records(unknown)
        done = choose_ood(encoder, records, work, unknown=strangers, shots=shots, words=words, **options)
        return done, {"method": done.winner.name, "classes": done.classes}
    if labels is not None:
        from ecliptic.apps.adapt_unlabelled import choose_unlabelled

        done = choose_unlabelled(
            encoder, records, work, labels_of(labels), candidates=candidates, minutes=options["minutes"]
        )
        return done, {"method": done.winner.name, "classes": done.classes, "unlabelled": done.unlabelled}
    done = selection.choose(encoder, records, work, candidates=candidates, shots=shots, words=words, **options)
    board = [
        {
            "method": entry.candidate.name,
            "seconds": entry.seconds,
            "trained": entry.trained,
            "left_out": entry.problem or None,
        }
        for entry in done.tried
    ]
    return done, {
        "method": done.winner.name,
        "classes": done.classes,
        "shots": done.counts,
        "unlabelled": done.unlabelled,
        "tried": board,
    }


def work_folder(encoder: HFEncoder, records: Records) -> Path:
    """Where features and fits of these records are kept between calls: in the cache, by model and records."""
    from ecliptic.data.cache import cache_dir

    named = "\0".join([encoder.id, records.name, *map(str, records.column("id"))])
    return cache_dir() / "adapt" / hashlib.blake2b(named.encode(), digest_size=12).hexdigest()


def _words(given: list[str]) -> dict[str, str]:
    words = {}
    for item in given:
        label, equals, meaning = item.partition("=")
        if not equals or not meaning.strip():
            fail(f"--name {item!r}: write label=words")
        words[label.strip()] = meaning.strip()
    return words


def _command(
    source: str, task: str, minutes: float, out: Path | None, unknown: str | None, instruction: str | None
) -> str:
    parts = [f"ecliptic adapt {source}"]
    parts += [f"--task {task}"] if task != "name" else []
    parts += [f"--unknown {unknown}"] if unknown else []
    parts += [f'--instruction "{instruction}"'] if instruction else []
    parts += [f"--minutes {minutes:g}"]
    parts += [f"--out {out}"] if out is not None else []
    return " ".join(parts)
