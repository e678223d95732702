"""GDA: classes as Gaussians with one covariance over frozen features, added to the zero-shot logits.

Features of one encoder vary far more in some directions than in others, within every class alike. A cache of cosine
similarities (Tip-Adapter) weighs all directions the same; the inverse covariance silences those that only make noise.
Bayes' rule then gives a linear classifier in closed form: means, one shrunk precision, no gradient step.

`Gda` learns from a few labelled pictures, `GdaNewClasses` makes classifiers for classes known by name only, out of the
labelled pictures of other classes, `GdaUnlabelled` learns from pictures without labels. Each is a few lines around
`gda_classifier`, `new_class_classifier` and `unlabelled_classifier`, which take plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ecliptic.core.contracts import Pairs, Prediction, Predictor, Record
from ecliptic.core.encoder import Encoder
from ecliptic.core.method import Paper, method
from ecliptic.core.zeroshot import template_set, zero_shot_head
from ecliptic.data.shots import (
    Shots,
    check_classes,
    check_features,
    check_labels,
    encode_shots,
    encode_views,
    folds_of,
    label_map,
    tiny_records,
)
from ecliptic.ops.gaussian import (
    SHRINKAGES,
    Linear,
    centred,
    class_means,
    covariance,
    discriminant,
    ks_precision,
    precision,
)

GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # released code, `main_few_shots.py`
USUAL_ALPHA = 1.0  # the weight the released few-shot logs choose most often; ours where nothing can be validated
ESTIMATORS = (*SHRINKAGES, "mean_pinv")
CROP = (0.5, 1.0)  # share of the area an augmented view keeps, released code


class _TextAndGaussian(Predictor):
    """scale * f @ T' + logit bias + alpha * (f @ W + b): what all variants predict with once they have learnt.

    classes_: names, in the order of the columns. text_ (K, d) unit rows, or None without a text term. weight_ (d, K),
    bias_ (K,). alpha_: the mixing weight. scale_ and logit_bias_: the model's own, scalars.
    """

    classes_: tuple[str, ...]
    text_: Tensor | None
    weight_: Tensor
    bias_: Tensor
    alpha_: float
    scale_: Tensor
    logit_bias_: Tensor

    @torch.no_grad()
    def predict(self, pixels: Tensor, classes: Sequence[str] | None = None) -> Prediction:
        """Pixels (B, 3, H, W), as `encoder.preprocess` gives them -> logits (B, K) and labels.

        classes: answer among these only, in this order (a label space that is a part of the one learnt).
        """
        if (encoder := getattr(self, "encoder_", None)) is None:
            raise ValueError("no encoder here: call fit(encoder, pairs) first, or predict_features on features")
        return self.predict_features(encoder.images(pixels).pooled.float(), classes)

    @torch.no_grad()
    def predict_features(self, features: Tensor, classes: Sequence[str] | None = None) -> Prediction:
        """Unit features (B, d) -> logits (B, K) and labels. alpha_ = 0 gives the zero-shot logits, bit for bit."""
        if not hasattr(self, "weight_"):
            raise ValueError(f"{type(self).__name__} has learnt nothing yet: call fit() first")
        scores = ensemble(self._zero_shot(features), Linear(self.weight_, self.bias_)(features), self.alpha_)
        return _answer(scores, self.classes_, classes)

    def _zero_shot(self, features: Tensor) -> Tensor | None:
        if features.ndim != 2 or features.shape[1] != len(self.weight_):
            raise ValueError(f"features must be (B, {len(self.weight_)}), got {tuple(features.shape)}")
        return zero_shot_logits(features, self.text_, self.scale_, self.logit_bias_)

    def _learn(self, classes: Sequence[str], head: Linear, text: Tensor | None, scale: Any, logit_bias: Any) -> None:
        self.classes_ = tuple(classes)
        self.weight_, self.bias_ = head.weight.float(), head.bias.float()
        self.text_ = text
        self.scale_, self.logit_bias_ = _scalar(scale), _scalar(0.0 if logit_bias is None else logit_bias)


@method(
    Paper("A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation", arxiv="2402.04087", year=2024),
    purpose="name pictures better after seeing a few labelled ones, in closed form, without training",
    claim="where classes share an anisotropic covariance, zero-shot + GDA beats zero-shot + Tip-Adapter and the nearest "
    "mean from 4-8 shots on; where it is isotropic, or with one shot, it does not",
)
@dataclass(eq=False)
class Gda(_TextAndGaussian):
    """Few labelled pictures per class; unequal numbers are fine (the prior stays uniform, so frequent classes get no bonus).

    With one picture per class and no augmented views there is no covariance: the precision is then the identity, and
    `shrinkage_` says so.
    """

    classes: tuple[str, ...] | None = None  # names in the order wanted; None: the labels found, sorted
    templates: str | tuple[str, ...] = "photo"  # as `core.zeroshot.zero_shot_head` takes them
    shrinkage: str = "ks"  # or pinv, ledoit_wolf, oas, graphical_lasso, identity, mean_pinv
    alpha: float | None = None  # None: the best of `grid` on validation pictures
    grid: tuple[float, ...] = GRID
    views: int = 10  # augmented views of each picture, each a sample of its own; 0: the pictures as they are
    folds: int = 4  # without validation pictures, alpha is cross-validated over the shots in this many parts; ours
    text: bool = True  # False: the Gaussian classifier alone
    seed: int = 0

    def fit(self, encoder: Encoder, pairs: Pairs, validation: Pairs | None = None) -> Self:
        """Learn from records with `image` and `label`; choose alpha on `validation`, or by cross-validation."""
        template_set(self.templates)  # what is wrong is said before any picture is opened
        if self.shrinkage not in ESTIMATORS:
            raise ValueError(f"shrinkage must be one of {', '.join(ESTIMATORS)}, not {self.shrinkage!r}")
        shots, rest = _encoded(self, encoder, pairs, validation)
        text = _text_head(encoder, shots.classes, self.templates) if self.text else None
        self.fit_features(shots.features, shots.labels, text, **rest)
        self.encoder_ = encoder
        return self

    @torch.no_grad()
    def fit_features(
        self,
        features: Tensor,
        labels: Tensor,
        text: Tensor | None = None,
        *,
        views: Tensor | None = None,
        validation: tuple[Tensor, Tensor] | None = None,
        classes: Sequence[str] | None = None,
        scale: Tensor | float = 100.0,
        logit_bias: Tensor | float | None = None,
    ) -> Self:
        """The same from tensors: features (N, d), labels (N,) int64, text (K, d) unit rows or None for no text term.

        views (V, N, d): augmented views of the same N pictures, which then stand for them in the statistics. validation:
        features and labels to choose alpha on. classes: names, by default "0", "1" ...
        """
        names = _names(classes, labels, text)
        check_features(features, text, len(names))
        check_labels(labels, len(features), names)
        if views is not None and views.shape[1:] != features.shape:
            raise ValueError(f"views must be (V, {', '.join(map(str, features.shape))}), got {tuple(views.shape)}")

        def head_of(rows: Tensor) -> Linear:
            return gda_classifier(*_stacked(features, labels, views, rows), len(names), self.shrinkage)

        everything = torch.arange(len(features))
        samples, owners = _stacked(features, labels, views, everything)
        flat = _is_flat(centred(samples, owners, class_means(samples, owners, len(names))), samples)
        self.shrinkage_ = "identity" if flat else self.shrinkage
        self._learn(names, head_of(everything), text, scale, logit_bias)
        self.alpha_, self.validation_accuracy_ = self._choose_alpha(features, labels, head_of, validation, text is None)
        return self

    def _choose_alpha(
        self,
        features: Tensor,
        labels: Tensor,
        head_of: Callable[[Tensor], Linear],
        validation: tuple[Tensor, Tensor] | None,
        alone: bool,
    ) -> tuple[float, dict[float, float]]:
        """The weight and, where it was chosen, the validation accuracy of each weight of the grid."""
        if alone or self.alpha is not None:
            return (1.0 if alone else float(self.alpha or 0.0)), {}
        if validation is not None:
            held, truth = validation
            if held.ndim != 2 or held.shape[1] != features.shape[1]:
                raise ValueError(f"validation features must be (N, {features.shape[1]}), got {tuple(held.shape)}")
            check_features(held, self.text_)
            check_labels(truth, len(held), self.classes_, every_class=False)
            found = select_alpha(self._zero_shot(held), head_of(torch.arange(len(features)))(held), truth, self.grid)
            return found.alpha, found.accuracy
        fold = folds_of(labels, self.folds, self.seed)
        if not (fold >= 0).any():  # one picture per class: nothing to validate on
            return USUAL_ALPHA, {}
        parts = [(fold == k).nonzero()[:, 0] for k in range(int(fold.max()) + 1)]
        order = torch.cat(parts)
        gaussian = torch.cat([head_of((fold != k).nonzero()[:, 0])(features[rows]) for k, rows in enumerate(parts)])
        found = select_alpha(self._zero_shot(features[order]), gaussian, labels[order], self.grid)
        return found.alpha, found.accuracy

    @classmethod
    def tiny(cls) -> tuple[Gda, list[Record]]:
        return cls(views=2), tiny_records()


@dataclass(eq=False)
class GdaNewClasses(_TextAndGaussian):
    """Base-to-new: labelled pictures of base classes make a classifier for `new_classes`, known by name only.

    `predict` answers among the new classes, `predict_base` among the base ones. The two do not share a precision, so their
    logits cannot be compared (each omits its own f' P f), and the paper never mixes them. alpha is chosen on the base.
    """

    new_classes: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None  # base classes; None: the labels found, sorted
    templates: str | tuple[str, ...] = "photo"  # as `core.zeroshot.zero_shot_head` takes them
    neighbours: int = 64  # base features that stand for a new class; released `main_base2new.py`
    copies: int = 16  # how often its text vector is counted among them; same source
    alpha: float | None = None
    grid: tuple[float, ...] = GRID
    views: int = 10
    folds: int = 4
    seed: int = 0

    def fit(self, encoder: Encoder, pairs: Pairs, validation: Pairs | None = None) -> Self:
        """Learn from labelled records of the base classes."""
        if not self.new_classes:
            raise ValueError("GdaNewClasses needs new_classes=: the names of the classes to make a classifier for")
        template_set(self.templates)
        shots, rest = _encoded(self, encoder, pairs, validation)
        text, new_text = (_text_head(encoder, names, self.templates) for names in (shots.classes, self.new_classes))
        self.fit_features(shots.features, shots.labels, text, new_text, **rest)
        self.encoder_ = encoder
        return self

    @torch.no_grad()
    def fit_features(
        self,
        features: Tensor,
        labels: Tensor,
        text: Tensor,
        new_text: Tensor,
        *,
        views: Tensor | None = None,
        validation: tuple[Tensor, Tensor] | None = None,
        classes: Sequence[str] | None = None,
        scale: Tensor | float = 100.0,
        logit_bias: Tensor | float | None = None,
    ) -> Self:
        """The same from tensors: base features (N, d), labels (N,), text vectors of base (K, d) and new (M, d) classes."""
        base = Gda(alpha=self.alpha, grid=self.grid, folds=self.folds, seed=self.seed, shrinkage="mean_pinv")
        base.fit_features(
            features,
            labels,
            text,
            views=views,
            validation=validation,
            classes=classes,
            scale=scale,
            logit_bias=logit_bias,
        )
        if new_text.ndim != 2 or new_text.shape[1] != features.shape[1]:
            raise ValueError(
                f"text vectors of new classes must be (M, {features.shape[1]}), got {tuple(new_text.shape)}"
            )
        names = self.new_classes or tuple(f"new {i}" for i in range(len(new_text)))
        if len(names) != len(new_text):
            raise ValueError(f"{len(names)} new classes, but {len(new_text)} text vectors for them")
        samples = features if views is None else views.flatten(0, 1)
        head = new_class_classifier(samples, new_text, self.neighbours, self.copies)
        self._learn(names, head, new_text, scale, logit_bias)
        self.alpha_, self.validation_accuracy_ = base.alpha_, base.validation_accuracy_
        self.base_classes_, self.base_text_ = base.classes_, text
        self.base_weight_, self.base_bias_ = base.weight_, base.bias_
        return self

    @torch.no_grad()
    def predict_base(self, features: Tensor, classes: Sequence[str] | None = None) -> Prediction:
        """Unit features (B, d) -> logits over the base classes, and labels."""
        zero_shot = zero_shot_logits(features, self.base_text_, self.scale_, self.logit_bias_)
        scores = ensemble(zero_shot, Linear(self.base_weight_, self.base_bias_)(features), self.alpha_)
        return _answer(scores, self.base_classes_, classes)

    @classmethod
    def tiny(cls) -> tuple[GdaNewClasses, list[Record]]:
        return cls(new_classes=("cup", "boat"), views=2, neighbours=8), tiny_records()


@dataclass(eq=False)
class GdaUnlabelled(_TextAndGaussian):
    """Pictures without labels: a mixture of one Gaussian per class, started from the zero-shot answers, fitted by EM.

    Not in the released code. The paper leaves alpha and the number of rounds open; the values here are ours: there is nothing
    to validate alpha on, and the shrunk precision is about d / N times the inverse covariance, so any fixed weight would
    fade as N grows. N / d makes the Gaussian logits log-likelihoods again.
    """

    classes: tuple[str, ...] = ()
    templates: str | tuple[str, ...] = "photo"  # as `core.zeroshot.zero_shot_head` takes them
    alpha: float | None = None  # None: N / d
    rounds: int = 20
    tolerance: float = 1e-4  # stop once no responsibility moves by more

    def fit(self, encoder: Encoder, pairs: Pairs) -> Self:
        """Learn from the pictures of `pairs`; labels, if there are any, are not looked at."""
        if len(self.classes) < 2:
            raise ValueError(
                "GdaUnlabelled needs classes=: the names of two or more classes, since there are no labels"
            )
        text = _text_head(encoder, self.classes, self.templates)
        features, _ = encode_views(encoder, pairs)
        self.fit_features(features, text, scale=encoder.scale, logit_bias=encoder.bias)
        self.encoder_ = encoder
        return self

    @torch.no_grad()
    def fit_features(
        self, features: Tensor, text: Tensor, *, scale: Tensor | float = 100.0, logit_bias: Tensor | float | None = None
    ) -> Self:
        """The same from tensors: features (N, d) and text (K, d), unit rows both."""
        names = self.classes or tuple(map(str, range(len(text))))
        check_classes(names)
        check_features(features, text, len(names))
        self.alpha_ = len(features) / features.shape[1] if self.alpha is None else float(self.alpha)
        found = unlabelled_classifier(features, text, float(_scalar(scale)), self.alpha_, self.rounds, self.tolerance)
        self._learn(names, found.head, text, scale, logit_bias)
        self.rounds_, self.converged_ = found.rounds, found.converged
        return self

    @classmethod
    def tiny(cls) -> tuple[GdaUnlabelled, list[Record]]:
        return cls(classes=("red", "green", "blue")), tiny_records()


def _encoded(
    judge: Gda | GdaNewClasses, encoder: Encoder, pairs: Pairs, validation: Pairs | None
) -> tuple[Shots, dict[str, Any]]:
    """Pictures as features, and all that `fit_features` takes by keyword."""
    shots = encode_shots(
        encoder, pairs, validation, classes=judge.classes, views=judge.views, seed=judge.seed, crop=CROP
    )
    return shots, {
        "views": shots.views,
        "validation": shots.validation,
        "classes": shots.classes,
        "scale": encoder.scale,
        "logit_bias": encoder.bias,
    }


# The mathematics, on plain tensors


def gda_classifier(features: Tensor, labels: Tensor, n_classes: int, shrinkage: str = "ks") -> Linear:
    """(N, d), (N,) -> the closed form: means, pooled within-class covariance, shrunk inverse, Bayes' rule; uniform prior.

    shrinkage: one of `ESTIMATORS`; "mean_pinv" is what the base-to-new variant uses on base classes.
    Where no class has two different samples the covariance is zero and the precision is the identity.
    """
    means = class_means(features, labels, n_classes)
    if shrinkage == "mean_pinv":
        return discriminant(means, _mean_covariance_precision(features, labels, means))
    deviations = centred(features, labels, means)
    return discriminant(means, precision(deviations, "identity" if _is_flat(deviations, features) else shrinkage))


def _mean_covariance_precision(features: Tensor, labels: Tensor, means: Tensor) -> Tensor:
    """pinv(mean over classes of their own covariance), the base classifier of the released base-to-new script."""
    deviations = centred(features, labels, means)
    if _is_flat(deviations, features):
        return precision(deviations, "identity")
    own = [covariance(deviations[labels == k]) for k in range(len(means))]
    inverse: Tensor = torch.linalg.pinv(torch.stack(own).mean(0), hermitian=True)
    return inverse


def new_class_classifier(base_features: Tensor, text: Tensor, neighbours: int = 64, copies: int = 16) -> Linear:
    """Base features (N, d) and text vectors (M, d) of classes without pictures -> their classifier.

    A class is its `neighbours` nearest base features (by t' f) and `copies` of its text vector t; each scatter is centred
    at t, not at the mean; the precision is the mean of the shrunk inverses over the new classes.
    """
    k = min(neighbours, len(base_features))
    if k < 2:
        raise ValueError(f"new classes need two or more base features to borrow from, got {k}")
    features, text = base_features.double(), text.double()
    near = features[(text @ features.T).topk(k, dim=-1).indices]  # (M, k, d)
    means = (near.sum(1) + copies * text) / (k + copies)
    deviations = near - text[:, None]
    mean_precision = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for z in deviations:
        mean_precision += ks_precision(z.T @ z / (k - 1), k) / len(text)
    return discriminant(means, mean_precision)


class Mixture(NamedTuple):
    """What EM ended with: the classifier, responsibilities (N, K), rounds run, and whether they had stopped moving."""

    head: Linear
    responsibilities: Tensor
    rounds: int
    converged: bool


def unlabelled_classifier(
    features: Tensor,
    text: Tensor,
    scale: float = 100.0,
    alpha: float = 1.0,
    rounds: int = 20,
    tolerance: float = 1e-4,
) -> Mixture:
    """EM for K Gaussians with one covariance and a fixed uniform prior; features (N, d), text (K, d), unit rows.

    Responsibilities start as the zero-shot softmax; the E step uses the ensembled logits, the M step `ks_precision`.
    """
    if rounds < 1:
        raise ValueError(f"EM needs at least one round, got {rounds}")
    features = features.double()
    zero_shot = scale * features @ text.double().T
    log_r = zero_shot.log_softmax(-1)
    for done in range(1, rounds + 1):
        responsibilities = log_r.exp()
        means = log_r.softmax(0).T @ features  # sum_i r_ik f_i / sum_i r_ik, in a form that cannot be 0 / 0
        # mean_i sum_k r_ik (f_i - mu_k)(f_i - mu_k)', whose mixed terms are those of the means
        cov = (features.T @ features - (means.T * responsibilities.sum(0)) @ means) / len(features)
        cov = (cov + cov.T) / 2
        flat = cov.trace() <= 1e-12 * features.square().mean() * features.shape[1]
        head = discriminant(means, precision(features, "identity") if flat else ks_precision(cov, len(features)))
        log_r = (zero_shot + alpha * head(features)).log_softmax(-1)
        if float((log_r.exp() - responsibilities).abs().max()) < tolerance:
            return Mixture(head, log_r.exp(), done, True)
    return Mixture(head, log_r.exp(), rounds, False)


def zero_shot_logits(features: Tensor, text: Tensor | None, scale: Tensor, logit_bias: Tensor) -> Tensor | None:
    """scale * f @ T' + bias with the model's own scale and bias, as `Encoder.logits` has it; None without text."""
    if text is None:
        return None
    logits = scale.to(features) * features @ text.to(features).T
    return logits + logit_bias.to(features) if logit_bias != 0 else logits


def ensemble(zero_shot: Tensor | None, gaussian: Tensor, alpha: float) -> Tensor:
    """(B, K) twice -> zero_shot + alpha * gaussian; alpha = 0 is the zero-shot baseline, bit for bit."""
    if zero_shot is None:
        return gaussian
    return zero_shot if alpha == 0 else zero_shot + alpha * gaussian


class Choice(NamedTuple):
    """The weight chosen, and the validation accuracy of every weight of the grid."""

    alpha: float
    accuracy: dict[float, float]


def select_alpha(zero_shot: Tensor | None, gaussian: Tensor, labels: Tensor, grid: Sequence[float] = GRID) -> Choice:
    """The weight of the highest validation accuracy; among equals the first, so an ascending grid prefers the text."""
    accuracy = {a: float((ensemble(zero_shot, gaussian, a).argmax(-1) == labels).double().mean()) for a in grid}
    return Choice(max(accuracy, key=accuracy.__getitem__), accuracy)


def _names(classes: Sequence[str] | None, labels: Tensor, text: Tensor | None) -> tuple[str, ...]:
    if classes is not None:
        return tuple(classes)
    return tuple(str(k) for k in range(len(text) if text is not None else int(labels.max()) + 1))


def _stacked(features: Tensor, labels: Tensor, views: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The samples of some pictures and their labels: every view is one, or the picture itself where there are none."""
    if views is None:
        return features[rows], labels[rows]
    return views[:, rows].flatten(0, 1), labels[rows].repeat(len(views))


def _is_flat(deviations: Tensor, features: Tensor) -> bool:
    """True if what is left after centring is rounding error."""
    return bool(deviations.square().sum() <= 1e-24 * features.double().square().sum())


def _text_head(encoder: Any, names: Sequence[str], templates: str | Sequence[str]) -> Tensor:
    return zero_shot_head(encoder, names, templates)


def _scalar(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32).detach().cpu().clone()


def _answer(scores: Tensor, known: tuple[str, ...], wanted: Sequence[str] | None) -> Prediction:
    if wanted is not None:
        scores = scores @ label_map(known, wanted).to(scores)
        known = tuple(wanted)
    return Prediction(scores=scores, labels=[known[i] for i in scores.argmax(-1).tolist()], classes=known)
