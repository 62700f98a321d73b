"""scikit-learn's estimators: its own checks, and what a user does with them."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures
from sklearn.utils.estimator_checks import check_estimator
from torch import nn

from layerwise import LayerwiseError
from layerwise.sklearn import LayerwiseClassifier, LayerwiseRegressor

SMALL = {"width": 16, "depth": 1, "epochs": 8, "lr": 2e-2, "random_state": 0}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [LayerwiseClassifier, LayerwiseRegressor])
def test_scikit_learns_own_checks(kind):
    found = check_estimator(kind("local_ce", **SMALL | {"epochs": 30}), on_fail=None, on_skip=None)
    assert [check["check_name"] for check in found if check["status"] == "failed"] == []


def test_a_classifier_in_a_pipeline_a_search_and_a_pickle():
    X, y = load_digits(return_X_y=True)
    X, y = X[:400], np.array(list("abcdefghij"))[y[:400]]
    search = GridSearchCV(LayerwiseClassifier(**SMALL), {"rule": ["local_ce", "sll"]}, cv=2).fit(X[:300], y[:300])
    best = search.best_estimator_
    assert best.score(X[300:], y[300:]) > 0.7 and set(best.predict(X)) <= set(y)
    probabilities = best.predict_proba(X[300:])
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert (best.classes_[probabilities.argmax(1)] == best.predict(X[300:])).all()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(best)).predict_proba(X), best.predict_proba(X))
    assert len(best.loss_curve_) == best.n_iter_ == 8 and best.loss_curve_[-1] < best.loss_curve_[0]


def test_a_regressor_is_near_least_squares_where_that_is_right():
    """With a linear network under backprop: the targets' own scale comes back, for one target and for two."""
    generator = np.random.default_rng(0)
    X = generator.normal(5, 3, (160, 4))
    y = X @ generator.normal(size=(4, 2)) * [1, 1000] + [7, -5000]
    linear = lambda columns, outputs: nn.Sequential(nn.Linear(columns, 8), nn.Linear(8, outputs))  # noqa: E731
    options = SMALL | {"network": linear, "weight_decay": 0.0}
    model = LayerwiseRegressor("backprop", **options | {"epochs": 40}).fit(X, y)
    assert model.predict(X).shape == y.shape and model.score(X, y) > 0.999
    assert LayerwiseRegressor("backprop", **options | {"epochs": 1}).fit(X, y[:, 1]).predict(X).shape == y[:, 1].shape
    X, y = load_diabetes(return_X_y=True)
    pipeline = make_pipeline(PolynomialFeatures(1), LayerwiseRegressor("local_ce", **SMALL))
    assert pipeline.fit(X[:300], y[:300]).score(X[300:], y[300:]) > 0.3


def test_the_global_generator_is_left_alone_and_a_seed_decides():
    X, y = load_digits(return_X_y=True)
    X, y = X[:60], y[:60]
    before = torch.get_rng_state()
    one, two, other = (LayerwiseClassifier(**SMALL | {"random_state": seed}).fit(X, y) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(one.predict_proba(X), two.predict_proba(X))
    assert not np.array_equal(one.predict_proba(X), other.predict_proba(X))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="of one class"):
        LayerwiseClassifier().fit(np.ones((4, 2)), np.zeros(4))
    with pytest.raises(LayerwiseError, match="network returns NoneType"):
        LayerwiseClassifier(network=lambda columns, outputs: None).fit(np.eye(4), [0, 1, 0, 1])


def test_columns_are_standardised_as_in_a_run_on_a_table():
    """Of 33 equal numbers the mean is a rounding error off, and no deviation: the column stays on its own scale."""
    X = np.c_[np.random.default_rng(0).normal(3, 2, (33, 2)), np.full(33, 0.1)]
    y = (X[:, 0] > 3).astype(int)
    model = LayerwiseClassifier("local_ce", **SMALL).fit(X, y)
    np.testing.assert_allclose(model.scale_, [*X[:, :2].std(0), 1.0])
    np.testing.assert_allclose(model.predict_proba(X + np.array([0, 0, 1e-6])), model.predict_proba(X), atol=1e-4)
    regressor = LayerwiseRegressor("local_ce", **SMALL).fit(X, np.c_[X[:, 0], np.full(33, 0.1)])
    np.testing.assert_allclose(regressor.target_scale_, [X[:, 0].std(), 1.0])
    for large in (
        LayerwiseClassifier("local_ce", **SMALL).fit,
        lambda X, y: LayerwiseRegressor(**SMALL).fit(X, X[:, 0]),
    ):
        with pytest.raises(LayerwiseError, match="too large"):
            large(X * 1e300, y)
    with pytest.raises(LayerwiseError, match="row 32 is not finite"):
        model.predict(np.r_[X[:32], X[:1] * 1e300])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"learner": {"lr": 0.1}}, "'lr' is an argument of its own"),
        ({"learner": {"seed": 1}}, "random_state"),
        ({"learner": {"clip_norm": 1.0}}, "no argument 'clip_norm'; did you mean"),
        ({"learner": ["clip"]}, "give a mapping"),
        ({"network": 3}, "give a function"),
        ({"network": lambda columns, outputs: nn.Sequential(nn.Linear(columns, 4), nn.Linear(4, 5))}, "instead of"),
    ],
)
def test_options_are_checked_before_the_training(options, sentence):
    with pytest.raises(LayerwiseError, match=sentence):
        LayerwiseClassifier("local_ce", **SMALL | options).fit(np.eye(4), [0, 1, 0, 1])


LONG = 2**53 + 1


@pytest.mark.filterwarnings("ignore:X has feature names")
@pytest.mark.parametrize(
    "make",
    [
        lambda: np.array([[LONG], [1], [2], [3]]),
        lambda: np.array([[-LONG], [1], [2], [3]], dtype=object),
        lambda: np.array([[2**63], [1], [2], [3]], dtype=np.uint64),
        lambda: np.array([[f" {LONG}"], ["1"], ["2"], ["3"]]),
        lambda: [[LONG, 0.5], [1, 0.5], [2, 0.5], [3, 0.5]],
        lambda: torch.tensor([[LONG], [1], [2], [3]]),
        lambda: pytest.importorskip("pandas").DataFrame({"id": [LONG, 1, 2, 3], "width": [0.5, 1, 2, 3]}),
    ],
)
def test_whole_numbers_that_float64_would_merge_are_refused(make):
    """Two different ids would be one number: as features, as targets, and in what is to be predicted."""
    X, y, kind = make(), [0, 1, 0, 1], LayerwiseClassifier("local_ce", **SMALL | {"epochs": 1})
    with pytest.raises(LayerwiseError, match=r"features have the whole number .* float64 merges"):
        kind.fit(X, y)
    columns = np.asarray(X).shape[1]
    with pytest.raises(LayerwiseError, match="features have the whole number"):
        kind.fit(np.random.default_rng(0).normal(size=(4, columns)), y).predict(X)
    if not isinstance(X, list) and not isinstance(np.asarray(X).flat[0], str):
        with pytest.raises(LayerwiseError, match="targets have the whole number"):
            LayerwiseRegressor("local_ce", **SMALL | {"epochs": 1}).fit(np.eye(4), X)


def test_long_labels_stay_different():
    for labels in (np.array([LONG, LONG - 1] * 2), [LONG, LONG - 1] * 2):
        model = LayerwiseClassifier("local_ce", **SMALL | {"epochs": 1}).fit(np.eye(4), labels)
        assert [int(label) for label in model.classes_] == [LONG - 1, LONG]
    with pytest.raises(LayerwiseError, match="labels have the whole number"):  # numpy makes floats of such a list
        LayerwiseClassifier("local_ce", **SMALL).fit(np.eye(4), [LONG, LONG - 1, 1.0, 2.0])


@pytest.mark.parametrize("rule", ["dgl", "ssl_local"])
def test_a_sample_that_is_left_over_joins_the_batch_before(rule):
    """Both need two samples in a batch."""
    X = np.random.default_rng(0).normal(size=(9, 4))
    model = LayerwiseClassifier(rule, **SMALL | {"epochs": 1}, batch_size=4).fit(X, [0, 1] * 4 + [0])
    assert model.learner_.steps == 2
