"""What every method must do, whatever it is: one function per rule and contract, over `tiny()` of the method.

`tiny()` gives a small instance and its records (a plain function's module has a `tiny()` that gives its arguments by name).
A step's `neutral()` gives an instance whose settings leave every encoder as it is.
A rule that a method cannot keep is waived in the method's own file, with the reason: `waivers = {"batch_order": "..."}` on
the class, `WAIVERS` in a function's module. A waived rule must indeed fail, or the waiver has to go.
"""

from __future__ import annotations

import copy
import pickle
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ecliptic.core.batches import collate
from ecliptic.core.contracts import DataStep, Features, ModelStep, Objective, Prediction, Predictor, Views
from ecliptic.core.encoder import HFEncoder
from ecliptic.core.encoder import load as load_encoder
from ecliptic.data.records import Records

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums in another order; exact equality is asked for where it is due
Check = Callable[["Case", HFEncoder], None]


@dataclass(frozen=True)
class Case:
    """One class or function under test."""

    name: str
    kind: str
    subject: Any

    def tiny(self) -> tuple[Any, Any]:
        """(instance, records); for a function (function, arguments by name)."""
        if self.kind == "function":
            return self.subject, sys.modules[self.subject.__module__].tiny()
        instance, records = self.subject.tiny()
        assert type(instance) is self.subject, f"tiny() gave a {type(instance).__name__}"
        return instance, records

    @property
    def waivers(self) -> Mapping[str, str]:
        if self.kind == "function":
            return getattr(sys.modules[self.subject.__module__], "WAIVERS", {})
        return getattr(self.subject, "waivers", {})


def run_check(case: Case, rule: str, encoder: HFEncoder) -> str | None:
    """Hold a case to a rule, warnings being errors; returns the reason if the rule is waived, and does fail."""
    check = CHECKS[case.kind][rule]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reason = case.waivers.get(rule)
        if reason is None:
            check(case, encoder)
            return None
        try:
            check(case, encoder)
        except Exception:
            return reason
    raise AssertionError(f"{case.name} keeps the rule {rule!r}: remove the waiver ({reason})")


# Comparing


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Everything inside a value that can be compared, with where it stands."""
    if isinstance(value, Tensor | np.ndarray | str | int | float | bool | bytes) or value is None:
        yield path, value
    elif isinstance(value, Image.Image):
        yield path, (value.mode, value.size, value.tobytes())
    elif isinstance(value, Mapping):
        yield f"{path}.keys", [str(k) for k in value]
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}")
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from leaves(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, list | tuple):
        yield f"{path}.length", len(value)
        for i, item in enumerate(value):
            yield from leaves(item, f"{path}.{i}")
    elif isinstance(value, nn.Module):
        yield from leaves(dict(value.state_dict()), path)
    else:
        yield path, repr(value)


def same(a: Any, b: Any, what: str, *, exact: bool = False) -> None:
    """Assert that two values agree: exactly, or as close as float32 allows."""
    left, right = list(leaves(a)), list(leaves(b))
    assert [p for p, _ in left] == [p for p, _ in right], f"{what}: different parts"
    for (path, x), (_, y) in zip(left, right):
        if isinstance(x, Tensor | np.ndarray) and isinstance(y, Tensor | np.ndarray):
            x, y = torch.as_tensor(x), torch.as_tensor(y)
            assert x.shape == y.shape, f"{what}: {path} is {tuple(x.shape)} and {tuple(y.shape)}"
            assert x.dtype == y.dtype, f"{what}: {path} is {x.dtype} and {y.dtype}"
            equal = torch.equal(x, y) if exact or not x.is_floating_point() else torch.allclose(x, y, **CLOSE)
            assert equal, f"{what}: {path} differs"
        elif isinstance(x, float) and isinstance(y, float) and not exact:
            assert abs(x - y) <= 1e-5 + 1e-4 * abs(y), f"{what}: {path} is {x} and {y}"
        else:
            assert x == y, f"{what}: {path} differs"


def finite(value: Any, what: str) -> None:
    """Assert that something was said and no number in it is NaN or infinite."""
    said = [(p, x) for p, x in leaves(value) if x is not None and not p.endswith((".keys", ".length"))]
    assert said, f"{what}: nothing in it"
    for path, x in said:
        if isinstance(x, Tensor | np.ndarray):
            x = torch.as_tensor(x)
            assert not x.is_floating_point() or bool(x.isfinite().all()), f"{what}: {path} is not finite"
        elif isinstance(x, float):
            assert np.isfinite(x), f"{what}: {path} is {x}"


def rows(value: Any, order: list[int]) -> Any:
    """The same prediction for some of its pictures."""
    if isinstance(value, Prediction):
        picked = {f.name: getattr(value, f.name) for f in fields(value)}
        return Prediction(**{k: v if k == "classes" else rows(v, order) for k, v in picked.items()})
    if isinstance(value, Tensor):
        return value[order]
    return None if value is None else [value[i] for i in order]


@contextmanager
def untouched(what: str, **given: Any) -> Iterator[None]:
    """Assert that the block changes neither these values nor any global random state."""
    before = {name: freeze(value) for name, value in given.items()}
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()  # noqa: NPY002 (that state is the point)
    yield
    for name, value in given.items():
        same(freeze(value), before[name], f"{what} changed its {name}", exact=True)
    assert random.getstate() == states[0], f"{what} drew from the global generator of `random`"
    assert (np.random.get_state()[1] == states[1][1]).all(), f"{what} drew from numpy's global generator"  # noqa: NPY002
    assert torch.equal(torch.random.get_rng_state(), states[2]), f"{what} drew from torch's global generator"


def freeze(value: Any) -> Any:
    """A copy that later changes cannot reach; of a model also modes, gradients and history."""
    if isinstance(value, HFEncoder):
        return {
            "weights": {k: v.clone() for k, v in value.state_dict().items()},
            "training": [m.training for m in value.modules()],
            "trained": [p.requires_grad for p in value.parameters()],
            "gradients": [p.grad is None for p in value.parameters()],
            "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in value.modules()),
            "history": value.history,
        }
    return copy.deepcopy(value)


# Predictor


def pixels_of(encoder: HFEncoder, records: Any) -> Tensor:
    return encoder.preprocess([record["image"] for record in records])


def fitted(case: Case, encoder: HFEncoder) -> tuple[Any, Any, Tensor]:
    judge, records = case.tiny()
    return judge.fit(encoder, records), records, pixels_of(encoder, records)


def predictor_finite(case: Case, encoder: HFEncoder) -> None:
    judge, _, pixels = fitted(case, encoder)
    said = judge.predict(pixels)
    assert isinstance(said, Prediction)
    finite(said, "predict")
    for name in ("scores", "labels", "maps", "boxes", "text"):
        value = getattr(said, name)
        assert value is None or len(value) == len(pixels), (
            f"predict gave {len(value)} {name} for {len(pixels)} pictures"
        )


def predictor_deterministic(case: Case, encoder: HFEncoder) -> None:
    one, _, pixels = fitted(case, encoder)
    torch.randn(3, generator=None)  # global randomness in between must not matter
    two, _, _ = fitted(case, encoder)
    same(one.predict(pixels), two.predict(pixels), "two fits with the same seed", exact=True)
    same(one.predict(pixels), one.predict(pixels), "the same question twice", exact=True)


def predictor_batch_order(case: Case, encoder: HFEncoder) -> None:
    judge, _, pixels = fitted(case, encoder)
    order = list(range(len(pixels)))[::-1]
    same(judge.predict(pixels[order]), rows(judge.predict(pixels), order), "pictures in another order")


def predictor_batch_size(case: Case, encoder: HFEncoder) -> None:
    judge, _, pixels = fitted(case, encoder)
    whole = judge.predict(pixels)
    for part in ([0], [1, 2, 3]):
        same(judge.predict(pixels[part]), rows(whole, part), f"a batch of {len(part)}")


def predictor_inputs(case: Case, encoder: HFEncoder) -> None:
    judge, records = case.tiny()
    pixels = pixels_of(encoder, records)
    settings = judge.get_params()
    with untouched("fit", encoder=encoder, records=list(records), settings=settings):
        judge.fit(encoder, records)
        settings = judge.get_params()
    with untouched("predict", encoder=encoder, pixels=pixels):
        judge.predict(pixels)


def predictor_no_gradients(case: Case, encoder: HFEncoder) -> None:
    judge, _, pixels = fitted(case, encoder)
    for path, value in leaves(judge.predict(pixels)):
        assert not (isinstance(value, Tensor) and value.requires_grad), f"predict{path} still carries gradients"
    assert all(p.grad is None for p in encoder.parameters()), "predict left gradients on the encoder"


def predictor_fit(case: Case, encoder: HFEncoder) -> None:
    judge, records = case.tiny()
    assert isinstance(judge, Predictor)
    before = set(vars(judge))
    assert not [name for name in before if name.endswith("_")], "something is learnt before fit"
    assert judge.fit(encoder, records) is judge, "fit must return self"
    assert judge.encoder_ is encoder, "fit keeps the frozen model as encoder_"
    stray = [n for n in set(vars(judge)) - before if not n.endswith("_") and not n.startswith("_")]
    assert not stray, f"fit left {stray}: what is learnt ends in an underscore"
    again = judge.predict(pixels_of(encoder, records))
    judge.fit(encoder, records)
    same(judge.predict(pixels_of(encoder, records)), again, "fitted a second time", exact=True)


def predictor_save_load(case: Case, encoder: HFEncoder) -> None:
    judge, _, pixels = fitted(case, encoder)
    with tempfile.TemporaryDirectory() as folder:
        judge.save(Path(folder) / "a")
        opened = type(judge).load(Path(folder) / "a", encoder)
    same(opened.predict(pixels), judge.predict(pixels), "saved and opened", exact=True)
    same(opened.get_params(), judge.get_params(), "settings saved and opened", exact=True)


def predictor_clone(case: Case, encoder: HFEncoder) -> None:
    from sklearn.base import clone

    judge, records, pixels = fitted(case, encoder)
    said = judge.predict(pixels)
    for copied in (clone(judge), judge.clone()):  # the first also sees that the constructor only stores
        same(copied.get_params(), judge.get_params(), "settings of a clone", exact=True)
        assert not [n for n in vars(copied) if n.endswith("_")], "a clone must be unfitted"
        same(copied.fit(encoder, records).predict(pixels), said, "a clone, fitted", exact=True)
    same(judge.predict(pixels), said, "the original after its clone was fitted", exact=True)


# Objective


def views_of(case: Case, encoder: HFEncoder, order: list[int] | None = None) -> tuple[Any, Views, Mapping[str, Any]]:
    """The bound objective, its views with gradients reaching the encoder, and the batch they come from."""
    objective, records = case.tiny()
    records = [list(records)[i] for i in order] if order is not None else list(records)
    bind = getattr(objective, "bind", None)
    objective = objective if bind is None else bind(encoder)
    own = getattr(objective, "collate", None)
    batch = collate(encoder, records, objective) if own is None else own(encoder, records)
    views = objective.encode(encoder, batch)
    if "group" in batch:
        views.groups = batch["group"]  # type: ignore[attr-defined]
    return objective, views, batch


def detached(views: Views) -> Views:
    """The same views, cut off from the encoder, pooled features as leaves that collect gradients."""

    def cut(f: Features) -> Features:
        return Features(
            f.pooled.detach().clone().requires_grad_(),
            None if f.tokens is None else f.tokens.detach().clone().requires_grad_(),
            {k: v.detach().clone().requires_grad_() for k, v in f.layers.items()},
            f.grid,
            f.mask,
        )

    bias = None if views.bias is None else views.bias.detach()
    found = Views({name: cut(f) for name, f in views.items()}, views.scale.detach(), bias)
    found.__dict__.update({k: v for k, v in views.__dict__.items() if k not in ("scale", "bias")})
    return found


def total(terms: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


def objective_finite(case: Case, encoder: HFEncoder) -> None:
    objective, views, _ = views_of(case, encoder)
    assert isinstance(objective, Objective)
    assert set(objective.needs) <= set(views), f"encode gave {sorted(views)}, needs are {sorted(objective.needs)}"
    terms = objective.terms(views)
    assert terms, "terms gave nothing to minimise"
    for name, value in terms.items():
        assert value.shape == (), f"term {name} is {tuple(value.shape)}, not a scalar"
    finite(terms, "terms")


def objective_deterministic(case: Case, encoder: HFEncoder) -> None:
    (one, a, _), (two, b, _) = views_of(case, encoder), views_of(case, encoder)
    same(one.terms(a), two.terms(b), "the same batch twice", exact=True)
    same(one.terms(a), one.terms(a), "the same views twice", exact=True)


def objective_batch_order(case: Case, encoder: HFEncoder) -> None:
    n = len(list(case.tiny()[1]))
    one, views, _ = views_of(case, encoder)
    two, turned, _ = views_of(case, encoder, list(range(n))[::-1])
    same(dict(two.terms(turned)), dict(one.terms(views)), "pairs in another order")


def objective_inputs(case: Case, encoder: HFEncoder) -> None:
    _, records = case.tiny()
    with untouched("encode and terms", encoder=encoder, records=list(records)):
        objective, views, batch = views_of(case, encoder)  # bound: only then are its learnt parts there
    with untouched("terms", views={n: f.pooled for n, f in detached(views).items()}):
        objective.terms(detached(views))
    leaf = detached(views)
    before = {name: f.pooled.detach().clone() for name, f in leaf.items()}
    objective.terms(leaf)
    same({name: f.pooled.detach() for name, f in leaf.items()}, before, "terms changed its views", exact=True)
    assert isinstance(batch, Mapping)


def objective_gradients(case: Case, encoder: HFEncoder) -> None:
    """Every view it needs is pulled, finitely; no other view, and no input tensor, is."""
    objective, views, batch = views_of(case, encoder)
    leaf = detached(views)
    total(objective.terms(leaf)).backward()
    for name, f in leaf.items():
        grads = [t.grad for t in (f.pooled, f.tokens, *f.layers.values()) if t is not None and t.grad is not None]
        pulled = any(float(g.abs().sum()) > 0 for g in grads)
        assert all(bool(g.isfinite().all()) for g in grads), f"the gradient on {name!r} is not finite"
        if name in objective.needs:
            assert pulled, f"no gradient reaches {name!r}, which it needs"
        else:
            assert not pulled, f"{name!r} is pulled, but is not among the needs"
    assert not any(isinstance(v, Tensor) and v.requires_grad for v in batch.values()), "the batch carries gradients"
    trial = encoder.clone()
    trial.requires_grad_(True)
    objective, views, _ = views_of(case, trial)
    total(objective.terms(views)).backward()
    grads = [p.grad for p in trial.parameters() if p.grad is not None]
    assert grads, "no gradient reaches the encoder"
    assert all(bool(g.isfinite().all()) for g in grads), "a gradient of the encoder is not finite"


def objective_save_load(case: Case, encoder: HFEncoder) -> None:
    objective, views, _ = views_of(case, encoder)
    same(pickle.loads(pickle.dumps(objective)).terms(views), objective.terms(views), "pickled", exact=True)
    same(copy.deepcopy(objective).terms(views), objective.terms(views), "copied", exact=True)


# ModelStep


def outputs(encoder: Any, records: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        found = {"images": encoder.encode_images([r["image"] for r in records])}
        found["texts"] = encoder.encode_texts([r.get("caption", "a photo") for r in records])
    return found


def applied(case: Case, encoder: HFEncoder) -> tuple[HFEncoder, Any]:
    step, records = case.tiny()
    return step.apply(encoder, records), records


def step_finite(case: Case, encoder: HFEncoder) -> None:
    assert isinstance(case.tiny()[0], ModelStep)
    changed, records = applied(case, encoder)
    finite(outputs(changed, records), "the new encoder")


def step_copy(case: Case, encoder: HFEncoder) -> None:
    """What comes back is another encoder: it shares no weight that a later change could reach."""
    changed, _ = applied(case, encoder)
    assert changed is not encoder, "apply gave back the encoder it was given"
    ours = {p.data_ptr() for p in encoder.parameters()}
    shared = [name for name, p in changed.named_parameters() if p.data_ptr() in ours]
    assert not shared, f"the new encoder shares weights with the old one: {shared[:3]}"


def step_inputs(case: Case, encoder: HFEncoder) -> None:
    step, records = case.tiny()
    before = outputs(encoder, records)
    with untouched("apply", encoder=encoder, records=list(records)):
        step.apply(encoder, records)
    same(outputs(encoder, records), before, "the old encoder afterwards", exact=True)


def step_deterministic(case: Case, encoder: HFEncoder) -> None:
    one, records = applied(case, encoder)
    two, _ = applied(case, encoder)
    same(outputs(one, records), outputs(two, records), "applied twice", exact=True)


def step_neutral(case: Case, encoder: HFEncoder) -> None:
    """`neutral()`, a classmethod, gives the settings at which the step changes nothing that is asked of the encoder."""
    assert hasattr(case.subject, "neutral"), "neutral() must give the settings at which the step changes nothing"
    step, records = case.subject.neutral(), case.tiny()[1]
    assert type(step) is case.subject, f"neutral() gave a {type(step).__name__}"
    same(outputs(step.apply(encoder, records), records), outputs(encoder, records), "at its neutral setting")


def step_history(case: Case, encoder: HFEncoder) -> None:
    changed, _ = applied(case, encoder)
    assert changed.history[: len(encoder.history)] == encoder.history, "earlier steps are forgotten"
    assert len(changed.history) == len(encoder.history) + 1, "apply records itself once, by record_step"


def step_save_load(case: Case, encoder: HFEncoder) -> None:
    changed, records = applied(case, encoder)
    with tempfile.TemporaryDirectory() as folder:
        changed.save_pretrained(Path(folder) / "a")
        opened = load_encoder(Path(folder) / "a")
    same(outputs(opened, records), outputs(changed, records), "saved and opened")
    same(opened.history, changed.history, "history saved and opened", exact=True)


def step_batch_size(case: Case, encoder: HFEncoder) -> None:
    changed, records = applied(case, encoder)
    records = list(records)
    whole = outputs(changed, records)
    same(outputs(changed, records[:1]), {k: v[:1] for k, v in whole.items()}, "a batch of one")
    same(outputs(changed, records[::-1]), {k: v.flip(0) for k, v in whole.items()}, "another order")


# DataStep


def by_id(records: Any) -> dict[str, Any]:
    found = {}
    for record in records:
        assert record["id"] not in found, f"two records are called {record['id']!r}"
        found[record["id"]] = record
    return found


def data_finite(case: Case, encoder: HFEncoder) -> None:
    step, records = case.tiny()
    assert isinstance(step, DataStep)
    kept = list(step.apply(records))
    assert kept, "apply kept nothing of the tiny data"
    finite(kept, "apply")


def data_reiterable(case: Case, encoder: HFEncoder) -> None:
    step, records = case.tiny()
    stream = step.apply(records)
    first, second = list(stream), list(stream)
    assert first, "apply kept nothing of the tiny data"
    same(second, first, "walked over twice", exact=True)


def data_deterministic(case: Case, encoder: HFEncoder) -> None:
    (one, records), (two, again) = case.tiny(), case.tiny()
    same(list(one.apply(records)), list(two.apply(again)), "applied twice", exact=True)


def data_order(case: Case, encoder: HFEncoder) -> None:
    step, records = case.tiny()
    turned = by_id(step.apply(list(records)[::-1]))
    straight = by_id(step.apply(records))
    same({k: turned.get(k) for k in sorted(turned)}, {k: straight[k] for k in sorted(straight)}, "another order")
    places = {record["id"]: i for i, record in enumerate(records)}
    found = [places[id] for id in straight if id in places]
    assert found == sorted(found), "the records came out in another order than they went in"


def data_lazy(case: Case, encoder: HFEncoder) -> None:
    """apply opens no picture and walks over nothing that has no length; each picture is then opened at most once a walk."""
    step, records = case.tiny()
    records = list(records)
    opened: list[str] = []
    walks: list[None] = []

    def load(record: Any) -> Any:
        opened.append(record["id"])
        return {**record, "image": records[record["place"]]["image"]}

    stored = Records(len(records), lambda i: {**records[i], "image": f"{i}.png", "place": i}, load=load)

    class Pool:
        def __iter__(self) -> Iterator[Any]:
            walks.append(None)
            return iter(records)

    from_records, from_pool = step.apply(stored), step.apply(Pool())
    assert not opened, f"apply opened the pictures of {opened}"
    assert not walks, "apply walked over the records"
    kept = [{key: value for key, value in record.items() if key != "place"} for record in from_records]
    assert len(opened) == len(set(opened)), "a picture was opened more than once in one walk"
    same(kept, list(from_pool), "from records and from a pool that can only be walked over", exact=True)


def data_shards(case: Case, encoder: HFEncoder) -> None:
    """Decisions depend only on (seed, record id): shards done apart are the whole."""
    step, records = case.tiny()
    records = list(records)
    apart = by_id([*step.apply(records[::2]), *step.apply(records[1::2])])
    whole = by_id(step.apply(records))
    same({k: apart[k] for k in sorted(apart)}, {k: whole[k] for k in sorted(whole)}, "in two shards")


def data_inputs(case: Case, encoder: HFEncoder) -> None:
    step, records = case.tiny()
    with untouched("apply", records=list(records)):
        list(step.apply(records))


# Function


def call(case: Case, encoder: HFEncoder) -> tuple[Any, dict[str, Any]]:
    """The result, and the arguments; an argument `encoder` is filled in with the tower under test."""
    import inspect

    function, arguments = case.tiny()
    if "encoder" in inspect.signature(function).parameters:
        arguments = {"encoder": encoder, **arguments}
    return function(**arguments), arguments


def function_finite(case: Case, encoder: HFEncoder) -> None:
    finite(call(case, encoder)[0], case.name)


def function_deterministic(case: Case, encoder: HFEncoder) -> None:
    same(call(case, encoder)[0], call(case, encoder)[0], "called twice", exact=True)


def function_inputs(case: Case, encoder: HFEncoder) -> None:
    function, arguments = case.tiny()
    _, full = call(case, encoder)
    with untouched(case.name, **full):
        function(**full)
    assert arguments.keys() <= full.keys()


CHECKS: dict[str, dict[str, Check]] = {
    "Predictor": {
        "finite": predictor_finite,
        "deterministic": predictor_deterministic,
        "batch_order": predictor_batch_order,
        "batch_size": predictor_batch_size,
        "inputs": predictor_inputs,
        "no_gradients": predictor_no_gradients,
        "fit": predictor_fit,
        "save_load": predictor_save_load,
        "clone": predictor_clone,
    },
    "Objective": {
        "finite": objective_finite,
        "deterministic": objective_deterministic,
        "batch_order": objective_batch_order,
        "inputs": objective_inputs,
        "gradients": objective_gradients,
        "save_load": objective_save_load,
    },
    "ModelStep": {
        "finite": step_finite,
        "copy": step_copy,
        "inputs": step_inputs,
        "deterministic": step_deterministic,
        "neutral": step_neutral,
        "history": step_history,
        "save_load": step_save_load,
        "batch_size": step_batch_size,
    },
    "DataStep": {
        "finite": data_finite,
        "reiterable": data_reiterable,
        "deterministic": data_deterministic,
        "order": data_order,
        "lazy": data_lazy,
        "shards": data_shards,
        "inputs": data_inputs,
    },
    "function": {
        "finite": function_finite,
        "deterministic": function_deterministic,
        "inputs": function_inputs,
    },
}
