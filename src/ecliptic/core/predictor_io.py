"""Saving a fitted predictor, and opening it again with the same answers.

A saved predictor is a folder: `predictor.json` (which method, its settings, what it learnt), `predictor.safetensors` (the
tensors among that) and, if asked for, `encoder/`. What is learnt is every public attribute that ends in one `_`; a fitted
predictor of the house may be part of it, if it sees pictures through the same encoder.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ecliptic.core.files import atomic_folder, require_own

if TYPE_CHECKING:
    from ecliptic.core.contracts import Predictor
    from ecliptic.core.encoder import Encoder

CARD, TENSORS, ENCODER = "predictor.json", "predictor.safetensors", "encoder"
NOT_LEARNT = {"encoder_"}  # given to `fit`, and saved apart


def settings_of(predictor: Any) -> dict[str, Any]:
    """The constructor's arguments by name: the constructor only stores, so they are attributes."""
    names = [n for n in inspect.signature(type(predictor).__init__).parameters if n != "self"]
    return {name: getattr(predictor, name) for name in names}


def learnt_by(predictor: Any) -> dict[str, Any]:
    """What `fit` left: public attributes that end in one underscore, the encoder apart."""
    return {
        name: value
        for name, value in vars(predictor).items()
        if name.endswith("_") and not name.startswith("_") and not name.endswith("__") and name not in NOT_LEARNT
    }


def save_predictor(predictor: Predictor, folder: str | Path, *, with_encoder: bool = False) -> Path:
    """Write the folder; it appears whole or not at all, and replaces an older predictor of that name.

    with_encoder: put the model beside it, so that the folder needs nothing else. Raises ValueError before `fit`,
    TypeError for learnt values that have no plain form, FileExistsError where the folder holds something else.
    """
    folder = Path(folder)
    learnt = learnt_by(predictor)
    if not learnt:
        raise ValueError(f"{type(predictor).__name__} has learnt nothing yet: call fit() before save()")
    require_own(folder, CARD)
    encoder = getattr(predictor, "encoder_", None)
    if with_encoder and encoder is None:
        raise ValueError("there is no encoder to save: this predictor was fitted on features")
    tensors: dict[str, Tensor] = {}
    card = {
        "format": 1,
        "predictor": _name(type(predictor)),
        "settings": _pack(settings_of(predictor), "settings", tensors),
        "learnt": _pack(learnt, "learnt", tensors, encoder),
        "encoder": None if encoder is None else {"name": encoder.name, "id": encoder.id},
    }
    with atomic_folder(folder, replace=True) as draft:
        (draft / CARD).write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        save_file(tensors, draft / TENSORS)
        if with_encoder and encoder is not None:
            encoder.save_pretrained(draft / ENCODER)
    return folder


def load_predictor(folder: str | Path, encoder: Encoder | None = None, kind: type[Predictor] | None = None) -> Any:
    """Open a saved predictor. `encoder` is the model it was fitted on, unless that was saved too or is a built-in.

    Raises ValueError where the folder is not one, holds another kind than `kind`, or the encoder is not the same.
    """
    folder = Path(folder)
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
    except OSError as error:
        raise ValueError(f"{folder} is no saved predictor: {error.strerror or error}") from error
    if kind is not None and _name(kind) != card["predictor"]:
        raise ValueError(f"{folder} holds {card['predictor']}, not {_name(kind)}: open it with `load_predictor`")
    if kind is None:
        from ecliptic.core.method import get

        kind = get(card["predictor"])
    assert kind is not None
    return _rebuilt(kind, card, tensors, _encoder(folder, card["encoder"], encoder))


def _rebuilt(kind: type[Predictor], card: dict[str, Any], tensors: dict[str, Tensor], encoder: Encoder | None) -> Any:
    found = kind(**_unpack(card["settings"], tensors))
    for name, value in _unpack(card["learnt"], tensors, encoder).items():
        setattr(found, name, value)
    found.encoder_ = encoder
    return found


def _encoder(folder: Path, wanted: dict[str, str] | None, given: Encoder | None) -> Encoder | None:
    from ecliptic.core.encoder import BUILT_IN, load

    if wanted is None:
        return given
    if given is None:
        if (folder / ENCODER).is_dir():
            given = load(folder / ENCODER)
        elif wanted["name"] in BUILT_IN or "/" in wanted["name"]:
            given = load(wanted["name"])
        else:
            raise ValueError(f"{folder} was fitted on {wanted['id']}: pass that model as encoder=")
    if (id := getattr(given, "id", None)) != wanted["id"]:
        raise ValueError(f"{folder} was fitted on {wanted['id']}, and {id} sees pictures differently: fit it again")
    return given


def _name(kind: type) -> str:
    """`slug:Class` for a method or a baseline of the house, `module:Class` otherwise."""
    match kind.__module__.split("."):
        case ["ecliptic", "methods", _, slug, *_] | ["ecliptic", "baselines", slug]:
            return f"{slug}:{kind.__qualname__}"
        case _:
            return f"{kind.__module__}:{kind.__qualname__}"


def _pack(value: Any, path: str, tensors: dict[str, Tensor], encoder: Encoder | None = None) -> Any:
    """JSON for a value; tensors go to `tensors` under their path, tuples keep their kind, predictors share the encoder."""
    from ecliptic.core.contracts import Predictor

    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"tensor": path}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_pack(v, f"{path}.{i}", tensors, encoder) for i, v in enumerate(value)]}
    if isinstance(value, dict):
        return {
            "dict": [
                [_pack(k, f"{path}.key", tensors), _pack(v, f"{path}.{k}", tensors, encoder)] for k, v in value.items()
            ]
        }
    if isinstance(value, Predictor):
        return {"predictor": _nested(value, path, tensors, encoder)}
    raise TypeError(
        f"{path} is a {type(value).__name__}: keep tensors, numbers, strings, lists, tuples and dicts of them"
    )


def _nested(value: Predictor, path: str, tensors: dict[str, Tensor], encoder: Encoder | None) -> dict[str, Any]:
    name = _name(type(value))
    if "." in name.partition(":")[0]:
        raise TypeError(
            f"{path} is a {type(value).__name__}, which could not be found again: keep methods of the house"
        )
    if getattr(value, "encoder_", None) is not encoder:
        raise TypeError(f"{path} sees pictures through another encoder than what holds it: fit both on the same")
    learnt = learnt_by(value)
    if not learnt:
        raise TypeError(f"{path} is a {type(value).__name__} that has learnt nothing: fit it first")
    settings = _pack(settings_of(value), f"{path}.settings", tensors)
    return {"predictor": name, "settings": settings, "learnt": _pack(learnt, f"{path}.learnt", tensors, encoder)}


def _unpack(value: Any, tensors: dict[str, Tensor], encoder: Encoder | None = None) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_unpack(k, tensors): _unpack(v, tensors, encoder) for k, v in content}
    if kind == "predictor":
        from ecliptic.core.method import get

        return _rebuilt(get(content["predictor"]), content, tensors, encoder)
    items = [_unpack(v, tensors, encoder) for v in content]
    return tuple(items) if kind == "tuple" else items
